"""Text to ids and back: a thin layer over Hugging Face `tokenizers`.

Two ways in, because text has two kinds of authors. `encode` is for text whose
special tokens are meant (a prompt written by hand, a file of rendered chats).
`encode_plain` is for everybody else's text: `[e~[` in a web page or in a
tool's output becomes ordinary ids. `encode_rendered` combines them for a
rendered conversation and gives each token its training weight.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from m2.data import markup, template

# Pieces that `train` learns its merges within. Each is one of: words in lower
# case, at most their first letter not; digits by three; tags that follow each
# other, but none that is a special token; everything else up to the next of
# these, blanks included. See `train`. Bounded, since the library gives up a
# match of a few hundred thousand characters, as of Chinese, which has no case.
_WORD = r'\p{Lu}?[\p{Ll}\p{M}]+'
_NOT_SPECIAL = rf'(?!{"|".join(map(re.escape, markup.SPECIALS))})'
_TAG = rf'{_NOT_SPECIAL}</?\p{{Ll}}[^<>\n]{{0,256}}>'
PATTERN = '|'.join(
  (
    _WORD,
    r'\p{N}{1,3}',
    rf'\n?(?:{_TAG}\n?)+',
    rf'(?:(?!{_WORD}|\p{{N}}|\n?{_TAG})[\s\S]){{1,4096}}',
  )
)
# What the chat template writes; added to a tokenizer that lacks it.
_NEEDED = tuple(
  token
  for token in markup.SPECIALS
  if token not in (markup.PAD, markup.DOCUMENT)
)
_BYTES = 256
_LONGEST_CACHED = 512  # characters of a text whose ids are remembered
_CACHE_ENTRIES = 50_000
_LOOK_BACK = 8  # ids: each stands for a byte at least, a character for four


class Tokenizer:
  """A tokenizer with M2's special tokens at their roles.

  Those that the chat template writes and the text lacks get the ids after all
  others, in the order of `markup.SPECIALS`; any other text has the ids that it
  has without them.

  Attributes:
    eos_id: ends a message, `[e~[`.
    bos_id: starts a conversation.
    role_id: starts a role's block.
    pad_id: fills rows where nothing is trained or seen; `eos_id` where the
      text has no `]!p~[`.
    size: smallest vocabulary a model needs: the greatest id + 1.
  """

  def __init__(self, text: str):
    """Builds the tokenizer from the text of a `tokenizer.json`.

    Raises:
      ValueError: the text is no tokenizer, can spell a special token with
        ordinary ones, or lacks some and has no ids after all others for them.
    """
    try:
      tree = json.loads(text)
      self._special = tokenizers.Tokenizer.from_str(text)
      # The same without special tokens: no input can reach them.
      tree.update(added_tokens=[], post_processor=None)
      self._plain = tokenizers.Tokenizer.from_str(json.dumps(tree))
    except Exception as error:  # the library raises bare Exception
      raise ValueError(f'not a tokenizer.json: {error}') from None
    for backend in (self._special, self._plain):
      backend.no_truncation()
      backend.no_padding()
    _complete(self._special)
    self._ids = {
      token: id
      for token in markup.SPECIALS
      if (id := self._special.token_to_id(token)) is not None
    }
    self._tokens = {id: token for token, id in self._ids.items()}
    self._cache: dict[str, list[int]] = {}
    self.eos_id = self._ids[markup.EOS]
    self.bos_id = self._ids[markup.BOS]
    self.role_id = self._ids[markup.ROLE]
    self.pad_id = self._ids.get(markup.PAD, self.eos_id)
    self.size = (
      max(self._special.get_vocab(with_added_tokens=True).values()) + 1
    )
    for token, id in self._ids.items():
      if id in _encode(self._plain, token):
        raise ValueError(f'ordinary text can spell the special token {token!r}')

  def __reduce__(self):
    """Pickles as its text, for the processes that prepare data."""
    return Tokenizer, (self.to_text(),)

  def encode(self, text: str) -> list[int]:
    """Ids of trusted text: special tokens written in it become special ids."""
    return _encode(self._special, text)

  def encode_plain(self, text: str) -> list[int]:
    """Ids of anybody's text: never a special id, whatever it says.

    Raises:
      ValueError: the text has lone surrogates, which no bytes stand for.
    """
    ids = self._cache.get(text)
    if ids is None:
      ids = _encode(self._plain, text)
      if len(text) <= _LONGEST_CACHED:
        if len(self._cache) >= _CACHE_ENTRIES:
          self._cache.clear()
        self._cache[text] = ids
    return list(ids)

  def encode_rendered(
    self, rendered: template.Rendered
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a rendered conversation and the training weight of each.

    The ids are the prompt's followed by what sampling from it would give: each
    span is tokenised by itself. Only the template's own special tokens become
    special ids.

    Returns:
      ids int32[N] and weights float32[N], 1 where the model itself produces
      the token and 0 elsewhere.

    Raises:
      ValueError: the text has lone surrogates, which no bytes stand for.
    """
    ids: list[int] = []
    weights: list[float] = []
    for piece in rendered.pieces():
      if piece.special:
        added = [self._ids[piece.text]]
      else:
        added = self.encode_plain(piece.text)
      ids += added
      weights += [float(piece.trained)] * len(added)
    return np.asarray(ids, np.int32), np.asarray(weights, np.float32)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`, special tokens included.

    Bytes that are no UTF-8 (a character cut in two) become U+FFFD, and so do
    ids past the vocabulary: a model's table is padded (M2: 200,054 entries in
    200,064 rows), and an untrained one may sample its padding.

    Raises:
      ValueError: a negative id.
    """
    ids = [int(id) for id in ids]
    if ids and min(ids) < 0:
      raise ValueError(f'id {min(ids)} is negative')
    text = []
    for known, run in itertools.groupby(ids, lambda id: id < self.size):
      run = list(run)
      text.append(
        self._special.decode(run, skip_special_tokens=False)
        if known
        else '\ufffd' * len(run)
      )
    return ''.join(text)

  def pieces(self, ids: Iterable[int]) -> Iterator[tuple[str, bool]]:
    """The text of `ids`, each of M2's special tokens by itself.

    Yields:
      Text, and whether it is a special token: the same characters in other
      pieces are only characters.

    Raises:
      ValueError: a negative id.
    """
    for token, run in itertools.groupby(map(int, ids), self._tokens.get):
      if token is None:
        yield self.decode(run), False
      else:
        yield from ((token, True) for _ in run)

  def special(self, id: int) -> str | None:
    """The special token of M2's that `id` stands for, if any."""
    return self._tokens.get(id)

  def to_text(self) -> str:
    """The text of its `tokenizer.json`."""
    return self._special.to_str(pretty=False)

  def save(self, path: str | os.PathLike) -> None:
    """Writes `tokenizer.json`; a reader never sees half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f'{path.name}.{os.getpid()}')
    fresh.write_text(self.to_text(), encoding='utf-8')
    fresh.replace(path)

  def fingerprint(self) -> str:
    """A short hash of everything that decides the ids of a text."""
    return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]


class Reader:
  """`Tokenizer.pieces` of ids that come one after another.

  A character's bytes may be spread over several ids: it comes once all of it is
  there. Until then its beginning decodes to one U+FFFD at the end.
  """

  def __init__(self, tokenizer: Tokenizer):
    """Starts a text."""
    self._tokenizer = tokenizer
    self._ids: list[int] = []  # since the last special token, the newest
    self._given = 0  # characters of their text

  def feed(self, id: int) -> list[tuple[str, bool]]:
    """What one more id makes certain: text, and whether it is special.

    Raises:
      ValueError: a negative id.
    """
    token = self._tokenizer.special(id)
    if token is not None:
      return [*self.finish(), (token, True)]
    self._ids.append(id)
    text = self._tokenizer.decode(self._ids)
    fresh = self._take(text, _certain(text))
    if len(self._ids) > 4 * _LOOK_BACK:
      self._ids = self._ids[-_LOOK_BACK:]
      self._given = _certain(self._tokenizer.decode(self._ids))
    return fresh

  def finish(self) -> list[tuple[str, bool]]:
    """What is left; another text may follow."""
    text = self._tokenizer.decode(self._ids)
    fresh = self._take(text, len(text))
    self._ids, self._given = [], 0
    return fresh

  def _take(self, text: str, until: int) -> list[tuple[str, bool]]:
    fresh, self._given = text[self._given : until], max(self._given, until)
    return [(fresh, False)] if fresh else []


def _certain(text: str) -> int:
  """Characters that no further id changes."""
  return len(text) - text.endswith('\ufffd')


def _complete(backend: tokenizers.Tokenizer) -> None:
  """Adds the special tokens that the chat template needs and `backend` lacks.

  Raises:
    ValueError: its ids have gaps: the library counts tokens to find a free id.
  """
  missing = [token for token in _NEEDED if backend.token_to_id(token) is None]
  taken = set(backend.get_vocab(with_added_tokens=True).values())
  backend.add_special_tokens(
    [
      tokenizers.AddedToken(token, special=True, normalized=False)
      for token in missing
    ]
  )
  if taken.intersection(map(backend.token_to_id, missing)):
    raise ValueError(
      f'it has {len(taken)} tokens and ids up to {max(taken)}, so that the '
      f'special tokens {" ".join(missing)} find no free ids; give them some in '
      'its model.vocab'
    )


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
  try:
    with _no_panic():
      return backend.encode(text, add_special_tokens=False).ids
  except TypeError:
    raise ValueError(
      f'{text!r:.200} is not text that UTF-8 can write'
    ) from None


@contextlib.contextmanager
def _no_panic() -> Iterator[None]:
  """Makes a ValueError of the library's panic.

  It is no Exception: threads would end of it unseen, and others wait for them.
  """
  try:
    yield
  except BaseException as error:
    if type(error).__name__ != 'PanicException':
      raise
    raise ValueError(f'the tokenizer cannot read this text: {error}') from None


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads a Hugging Face `tokenizer.json`, or the directory that holds one.

  Raises:
    ValueError: no such file, or not a tokenizer that M2's special tokens can
      be added to; names the path.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / 'tokenizer.json'
  try:
    return Tokenizer(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(f'tokenizer {path}: {error}') from None


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
  """Trains a byte-level BPE on `texts`; the same texts give the same ids.

  Not within M2's pieces, in which a word swallows the blank or the sign before
  it: `(name`, `,name` and ` name` are then three ids of one identifier, and a
  small model must learn which of them copies which, for every name alone. Here
  a word has the same ids wherever it stands, so that copying one is copying;
  and what stands between two words, blanks included, may become one id
  (` INT,`), so that texts are shorter. Files of others keep their own rules.

  Ids 0 to 8 are M2's special tokens (0 pads), 9 to 264 the bytes, then merges.

  Args:
    texts: plain text, without special tokens.
    vocab: most ids to use; fewer come out where the texts have no more pairs.

  Raises:
    ValueError: `vocab` has no room for bytes and special tokens, or there is
      no text.
  """
  least = _BYTES + len(markup.SPECIALS)
  if vocab < least:
    raise ValueError(
      f'vocab={vocab} is too small: {_BYTES} bytes and {len(markup.SPECIALS)} '
      f'special tokens need at least {least}'
    )
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(PATTERN), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=[
      tokenizers.AddedToken(token, special=True, normalized=False)
      for token in markup.SPECIALS
    ],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  read = 0

  def counted():
    nonlocal read
    for text in texts:
      read += len(text)
      yield text

  with _no_panic():
    backend.train_from_iterator(counted(), trainer)
  if not read:
    raise ValueError('there is no text to train the tokenizer on')
  return Tokenizer(backend.to_str())
