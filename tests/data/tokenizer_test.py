"""Tokenizer: nothing lost, nothing spelt that may not be, clear refusals."""

import json
import pathlib
import pickle
import random

import numpy as np
import tokenizers
from absl.testing import absltest, parameterized

from m2.data import markup, template, tokenizer

TEXTS = ['The quick brown fox; jumps over 12345 lazy dogs.\n' * 9, 'é漢字 ok']
VOCAB = 300


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

  def test_needs_an_end_token(self):
    def drop(tree):
      tree['added_tokens'] = [
        t for t in tree['added_tokens'] if t['content'] != markup.EOS
      ]
      id = tree['model']['vocab'].pop(markup.EOS)
      tree['model']['vocab']['other'] = id

    with self.assertRaisesRegex(ValueError, 'no end token'):
      tokenizer.load(self.path(drop))

  def test_a_tokenizer_without_chat_tokens_says_so(self):
    def drop(tree):
      tree['added_tokens'] = [
        t for t in tree['added_tokens'] if t['content'] == markup.EOS
      ]
      for token in (markup.THINK, markup.ROLE, markup.PAD, markup.BOS):
        tree['model']['vocab'][f'{token}.'] = tree['model']['vocab'].pop(token)

    tok = tokenizer.load(self.path(drop))
    self.assertEqual((tok.pad_id, tok.bos_id), (tok.eos_id, None))
    self.assertNotEmpty(tok.encode_plain('text works'))
    with self.assertRaisesRegex(ValueError, 'special token .* template needs'):
      tok.encode_rendered(template.render([{'role': 'user', 'content': 'x'}]))

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


if __name__ == '__main__':
  absltest.main()
