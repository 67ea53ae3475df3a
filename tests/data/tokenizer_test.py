"""Tokenizer: nothing lost, nothing spelt that may not be, clear refusals."""

import functools
import json
import pathlib
import pickle
import random
from unittest import mock

import numpy as np
import tokenizers
from absl.testing import absltest, parameterized
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from m2 import config
from m2.data import markup, pipeline, template, tokenizer

TEXTS = ['The quick brown fox; jumps over 12345 lazy dogs.\n' * 9, 'é漢字 ok']
VOCAB = 300


def joined(pieces):
  """Pieces with neighbouring text in one."""
  found = []
  for text, special in pieces:
    if found and not special and not found[-1][1]:
      text = found.pop()[0] + text
    found.append((text, special))
  return found


class TokenizerTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = tokenizer.train(TEXTS, VOCAB)

  def test_any_text_comes_back(self):
    rng = random.Random(0)
    for _ in range(300):
      codes = (rng.choice((rng.randrange(128), rng.randrange(0x2FFFF)))
               for _ in range(rng.randrange(40)))  # fmt: skip
      text = ''.join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
      self.assertEqual(self.tok.decode(self.tok.encode_plain(text)), text)
      self.assertEqual(self.tok.decode(self.tok.encode(text)), text)

  def test_special_tokens_only_where_meant(self):
    text = 'a[e~[\n]~b]ai\n<think>'
    self.assertEqual(self.tok.encode(text).count(self.tok.eos_id), 1)
    self.assertIn(self.tok.role_id, self.tok.encode(text))
    special = set(range(len(markup.SPECIALS)))
    self.assertEmpty(special & set(self.tok.encode_plain(text)))
    self.assertEqual(self.tok.decode(self.tok.encode_plain(text)), text)

  def test_a_reader_gives_the_pieces_one_id_after_another(self):
    rng = random.Random(0)
    single = sorted(self.tok.encode_plain(''.join(map(chr, range(128, 2048)))))
    texts = 'aé€😀\ufffd', 'select name', '\n', '中文'
    for _ in range(500):
      ids = []
      for _ in range(rng.randrange(1, 30)):
        ids += rng.choice(
          (
            [rng.choice(single)],  # half a character, mostly
            [rng.randrange(self.tok.size + 5)],
            self.tok.encode_plain(rng.choice(texts)),
          )
        )
      reader = tokenizer.Reader(self.tok)
      found = [piece for id in ids for piece in reader.feed(id)]
      self.assertEqual(
        joined([*found, *reader.finish()]), joined(self.tok.pieces(ids))
      )

  def test_pieces_tell_special_tokens_from_their_characters(self):
    ids = self.tok.encode('a</think>\n')
    ids += self.tok.encode_plain('ß</think>[e~[')[1:]  # cut in a character
    ids += self.tok.encode('[e~[[e~[') + [self.tok.size]
    pieces = list(self.tok.pieces(np.array(ids, np.int32)))
    self.assertEqual(
      pieces,
      [
        ('a', False),
        ('</think>', True),
        ('\n\ufffd</think>[e~[', False),
        ('[e~[', True),
        ('[e~[', True),
        ('\ufffd', False),
      ],
    )
    self.assertEqual(''.join(text for text, _ in pieces), self.tok.decode(ids))

  def test_trained_on_its_own_markup_it_still_cannot_spell_it(self):
    texts = [''.join(markup.SPECIALS) + ' ', *markup.SPECIALS] * 50
    tok = tokenizer.train(texts, VOCAB)
    for token in markup.SPECIALS:
      self.assertGreater(len(tok.encode_plain(token)), 1)

  def test_roles_and_size(self):
    tok = self.tok
    roles = (tok.pad_id, tok.bos_id, tok.role_id, tok.eos_id)
    self.assertEqual(
      [tok.decode([id]) for id in roles],
      [markup.PAD, markup.BOS, markup.ROLE, markup.EOS],
    )
    self.assertEqual(tok.size, VOCAB)
    self.assertEqual(tokenizer.train(['x'], VOCAB).size, 265)

  def test_a_word_has_the_same_ids_wherever_it_stands(self):
    text = 'size,size size(size)_size\n"size" Size1234 <a b="c">\n</a>size'
    tok = tokenizer.train([text] * 20, 600)
    pieces = [tok.decode([id]) for id in tok.encode_plain(text)]
    self.assertEqual(pieces.count('size'), text.count('size'))
    # Digits by three, tags as one, all else up to the next word as one.
    self.assertContainsSubset(
      ['Size', '123', '4', ')_', '\n"', '" ', '<a b="c">\n</a>'], pieces
    )

  def test_training_is_deterministic_and_saving_keeps_everything(self):
    self.assertEqual(
      tokenizer.train(TEXTS, VOCAB).fingerprint(), self.tok.fingerprint()
    )
    other = tokenizer.train(TEXTS, VOCAB - 1).fingerprint()
    self.assertNotEqual(other, self.tok.fingerprint())
    path = pathlib.Path(self.create_tempdir()) / 'new' / 'tokenizer.json'
    self.tok.save(path)
    self.assertEqual([p.name for p in path.parent.iterdir()], [path.name])
    for again in (
      tokenizer.load(path),
      tokenizer.load(path.parent),
      pickle.loads(pickle.dumps(self.tok)),
    ):
      self.assertEqual(again.fingerprint(), self.tok.fingerprint())
      self.assertEqual(again.encode(TEXTS[0]), self.tok.encode(TEXTS[0]))

  def test_cached_ids_are_not_shared(self):
    self.tok.encode_plain('the fox').append(-1)
    self.assertNotIn(-1, self.tok.encode_plain('the fox'))

  def test_benign_chats_get_the_ids_of_their_whole_text(self):
    rendered = template.render(
      [
        {'role': 'user', 'content': 'The fox?'},
        {'role': 'assistant', 'content': 'It jumps.', 'reasoning_content': 'x'},
      ]
    )
    ids, weights = self.tok.encode_rendered(rendered)
    self.assertEqual(ids.tolist(), self.tok.encode(rendered.text))
    self.assertEqual((ids.dtype, weights.dtype), (np.int32, np.float32))

  def test_refuses_bad_ids_and_text(self):
    with self.assertRaisesRegex(ValueError, 'id -1 '):
      self.tok.decode([5, -1])
    # A model's table is padded past the vocabulary.
    padding = [self.tok.size, self.tok.size + 9]
    self.assertEqual(self.tok.decode(padding), '\ufffd' * 2)
    for encode in (self.tok.encode, self.tok.encode_plain):
      with self.assertRaisesRegex(ValueError, 'UTF-8'):
        encode('a\ud800')

  def test_text_without_lower_case_may_be_long(self):
    texts = ['中文，你好。\n' * 130_000, '<a' + ' b' * 400_000, ' ' * 900_000]
    for text in texts:
      self.assertEqual(self.tok.decode(self.tok.encode_plain(text)), text)
    trained = tokenizer.train(texts[:1], VOCAB)
    self.assertLess(len(trained.encode_plain(texts[0])), len(texts[0]))

  def test_a_panic_of_the_library_is_an_error_like_others(self):
    class PanicException(BaseException):
      pass

    backend = mock.Mock()
    backend.encode.side_effect = PanicException('retry-limit-in-match over')
    with self.assertRaisesRegex(ValueError, 'cannot read this.*retry-limit'):
      tokenizer._encode(backend, 'x')
    backend.encode.side_effect = KeyboardInterrupt
    with self.assertRaises(KeyboardInterrupt):
      tokenizer._encode(backend, 'x')

  def test_refuses_to_train_on_too_little(self):
    with self.assertRaisesRegex(ValueError, 'vocab=264 .* at least 265'):
      tokenizer.train(TEXTS, 264)
    with self.assertRaisesRegex(ValueError, 'no text'):
      tokenizer.train(['', ''], VOCAB)


class FileTest(parameterized.TestCase):
  def path(self, change=lambda tree: None, cut=None):
    tree = json.loads(tokenizer.train(TEXTS, VOCAB).to_text())
    change(tree)
    path = pathlib.Path(self.create_tempdir()) / 'tokenizer.json'
    path.write_text(json.dumps(tree)[:cut])
    return path

  def test_names_the_file_that_is_missing_or_broken(self):
    missing = pathlib.Path(self.create_tempdir()) / 'none.json'
    for path in (missing, self.path(cut=500), self.path(dict.clear)):
      with self.assertRaisesRegex(ValueError, str(path)):
        tokenizer.load(path)

  def test_what_is_there_of_the_special_tokens_keeps_its_ids(self):
    def drop(tree):
      tree['added_tokens'] = [
        t for t in tree['added_tokens'] if t['content'] == markup.EOS
      ]
      for token in set(markup.SPECIALS) - {markup.EOS}:
        tree['model']['vocab'][f'{token}.'] = tree['model']['vocab'].pop(token)

    full, tok = (tokenizer.load(self.path(*how)) for how in ((), (drop,)))
    self.assertEqual(tok.eos_id, full.eos_id)
    self.assertEqual((tok.bos_id, tok.role_id), (VOCAB, VOCAB + 1))
    self.assertEqual(tok.pad_id, tok.eos_id)  # the template needs no padding
    self.assertEqual((full.size, tok.size), (VOCAB, VOCAB + 6))

  def test_refuses_a_file_that_leaves_no_id_for_them(self):
    def gap(tree):
      vocab = tree['model']['vocab']
      vocab[next(token for token, id in vocab.items() if id == 299)] = 301
      tree['added_tokens'] = []
      vocab['end'] = vocab.pop(markup.EOS)
      vocab['begin'] = vocab.pop(markup.BOS)

    with self.assertRaisesRegex(ValueError, '300 tokens and ids up to 301, '):
      tokenizer.load(self.path(gap))

  def test_ignores_truncation_and_padding_of_the_file(self):
    path = self.path()
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=64)
    backend.save(str(path))
    tok = tokenizer.load(path)
    text = 'The quick brown fox'
    self.assertEqual(tok.decode(tok.encode(text)), text)
    self.assertEqual(tok.decode(tok.encode_plain(text)), text)


class ForeignTest(parameterized.TestCase):
  """Files that were made without M2: its special tokens come after theirs."""

  TEXT = 'the quick brown fox jumps over 12345 dogs'
  NEEDED = [
    token
    for token in markup.SPECIALS
    if token not in (markup.PAD, markup.DOCUMENT)
  ]

  def foreign(self, kind) -> tokenizers.Tokenizer:
    """A small tokenizer with special tokens of its own."""
    if kind == 'bytes':
      found = tokenizers.Tokenizer(models.BPE())
      found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
      found.post_processor = processors.ByteLevel(trim_offsets=False)
      found.decoder = decoders.ByteLevel()
      trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
      )
    elif kind == 'unigram':
      found = tokenizers.Tokenizer(models.Unigram())
      found.pre_tokenizer = pre_tokenizers.Metaspace()
      found.decoder = decoders.Metaspace()
      trainer = trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=['<unk>', '<s>', '</s>'],
        unk_token='<unk>',
        show_progress=False,
      )
    else:
      found = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
      found.normalizer = normalizers.BertNormalizer()
      found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
      found.decoder = decoders.WordPiece()
      trainer = trainers.WordPieceTrainer(
        vocab_size=120,
        special_tokens=['[UNK]', '[CLS]', '[SEP]'],
        show_progress=False,
      )
    found.train_from_iterator([*TEXTS, self.TEXT], trainer)
    return found

  @parameterized.parameters('bytes', 'unigram', 'wordpiece')
  def test_text_keeps_its_ids_and_special_tokens_get_the_next(self, kind):
    plain = self.foreign(kind)
    path = pathlib.Path(self.create_tempdir()) / 'tokenizer.json'
    plain.save(str(path))
    tok = tokenizer.load(path)

    ids = plain.encode(self.TEXT, add_special_tokens=False).ids
    self.assertEqual(tok.encode(self.TEXT), ids)
    self.assertEqual(tok.encode_plain(self.TEXT), ids)
    self.assertEqual(tok.decode(ids), self.TEXT)

    size = plain.get_vocab_size()
    new = list(range(size, size + len(self.NEEDED)))
    self.assertEqual([*map(tok.encode, self.NEEDED)], [[id] for id in new])
    self.assertEqual([tok.decode([id]) for id in new], self.NEEDED)
    self.assertEqual(tok.size, new[-1] + 1)
    self.assertEqual(tok.pad_id, tok.eos_id)
    spelled = tok.encode_plain(''.join(self.NEEDED))
    self.assertEmpty(set(new) & set(spelled))

    pieces = list(tok.pieces([*ids, tok.eos_id]))
    self.assertEqual(pieces, [(self.TEXT, False), (markup.EOS, True)])
    chat = template.render([{'role': 'user', 'content': self.TEXT}])
    chat, _ = tok.encode_rendered(chat)
    self.assertContainsSubset({tok.bos_id, tok.role_id, tok.eos_id}, set(chat))

    tok.save(path)
    again = tokenizer.load(path)
    self.assertEqual(again.to_text(), tok.to_text())
    self.assertEqual(again.fingerprint(), tok.fingerprint())

  def test_a_model_that_is_too_small_for_them_names_the_sizes(self):
    folder = pathlib.Path(self.create_tempdir())
    self.foreign('bytes').save(str(folder / 'words.json'))
    cfg = config.DataConfig(tokenizer=str(folder / 'words.json'))
    make = functools.partial(
      pipeline.tokenizer, cfg, None, workdir=folder, bound=False
    )
    with self.assertRaisesRegex(ValueError, '307 ids but model.vocab=300'):
      make(vocab=300)
    made = make(vocab=307)
    # Found again by a run that goes on, whether it names the file or not.
    for named in cfg, config.DataConfig():
      again = pipeline.tokenizer(named, None, 307, folder, bound=True)
      self.assertEqual(again.fingerprint(), made.fingerprint())


if __name__ == '__main__':
  absltest.main()
