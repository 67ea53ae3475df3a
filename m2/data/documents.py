"""Rows of a source as documents of ids, encoded when they are asked for."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from m2.data import packing, sources, template
from m2.data import tokenizer as tokenizers


class Documents:
  """A source of rows as a source of token documents (random access)."""

  def __init__(
    self,
    source: sources.Source,
    tokenizer: tokenizers.Tokenizer,
    keep_all_reasoning: bool,
  ):
    """Encodes the rows of `source` when they are asked for."""
    self._source = source
    self._tokenizer = tokenizer
    self._keep_all_reasoning = keep_all_reasoning

  def __len__(self) -> int:
    """Number of rows."""
    return len(self._source)

  def __getitem__(self, index: int) -> packing.Document:
    """The document of row `index`: text ends with `[e~[`, chats as rendered.

    Raises:
      ValueError: the row is broken; says where it is and why.
    """
    row = self._source[index]
    with _naming(self._source.where(index)):
      shape = _shape(row)
      if shape == 'tokens':
        return self._ready(row)
      if shape == 'text':
        ids = self._tokenizer.encode_plain(row['text'])
        ids.append(self._tokenizer.eos_id)
        return _document(ids, np.ones(len(ids)), whole=False)
      rendered = _render(row, self._keep_all_reasoning)
      return _document(*self._tokenizer.encode_rendered(rendered), whole=True)

  def _ready(self, row: sources.Row) -> packing.Document:
    """Checks ready-made tokens; those with weights are kept in one piece."""
    weighted = row.get('weights') is not None
    try:
      tokens = np.asarray(row['tokens'])
      weights = np.asarray(row['weights'] if weighted else np.ones(len(tokens)))
      sound = (
        tokens.ndim == 1
        and tokens.shape == weights.shape
        and tokens.dtype.kind in 'iu'
        and weights.dtype.kind in 'iuf'
        and np.isfinite(_narrow(weights)).all()
        and 0 <= weights.min()
        and 0 <= tokens.min()
        and tokens.max() < self._tokenizer.size
      )
    except (TypeError, ValueError):
      sound = False
    if not sound:
      raise ValueError(
        f'tokens must be one or more ids in [0, {self._tokenizer.size}) and '
        'weights as many finite numbers, none below 0'
      )
    return _document(tokens, weights, whole=weighted)


def _narrow(weights: np.ndarray) -> np.ndarray:
  with np.errstate(over='ignore'):  # what does not fit becomes infinite
    return weights.astype(np.float32)


def plain(row: sources.Row, where: str) -> list[str]:
  """The text of a row without special tokens, to train a tokenizer on.

  Raises:
    ValueError: the row is broken, or holds ready tokens.
  """
  with _naming(where):
    shape = _shape(row)
    if shape == 'tokens':
      raise ValueError(
        'ready tokens need the tokenizer that made them; set data.tokenizer'
      )
    if shape == 'text':
      found = [row['text']]
    else:
      pieces = _render(row, keep_all_reasoning=True).pieces()
      found = [piece.text for piece in pieces if not piece.special]
    for text in found:
      text.encode()  # lone surrogates are a ValueError
    return found


def _document(tokens: Any, weights: Any, *, whole: bool) -> packing.Document:
  return packing.Document(
    tokens=np.asarray(tokens, np.int32),
    weights=np.asarray(weights, np.float32),
    whole=whole,
  )


def _shape(row: sources.Row) -> str:
  """Which of the three shapes of rows this is."""
  given = sorted(key for key in row if row[key] is not None)
  shapes = [key for key in ('text', 'messages', 'tokens') if key in given]
  if len(shapes) != 1:
    raise ValueError(
      'a row needs exactly one of text, messages and tokens; without nulls it '
      f'has the keys {given}'
    )
  if shapes == ['text'] and not isinstance(row['text'], str):
    raise ValueError(f'text is {row["text"]!r:.100}: expected a string')
  return shapes[0]


def _render(row: sources.Row, keep_all_reasoning: bool) -> template.Rendered:
  for key in ('messages', 'tools'):
    if not isinstance(row.get(key), list | tuple | types.NoneType):
      raise ValueError(f'{key} is {row[key]!r:.100}: expected a list')
  return template.render(
    row['messages'],
    row.get('tools'),
    keep_all_reasoning=keep_all_reasoning,
  )


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
  """Says in front of an error which row it is about."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None
