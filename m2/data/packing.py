"""Documents into rows of one length, with little padding.

Packing reads a window of documents, worth about `rows` rows, and puts the
longest first into the row whose free space it fills best. The state is where
the window began and how many of its rows are out: small, and enough to read,
pack and shuffle the window again to the bit.

A text longer than a row becomes several documents; each begins with the last
token of the one before, so every token but the first is predicted once. A
chat longer than a row loses its end, which is counted. A document in which
nothing is trained is left out, which is counted too.
"""

import bisect
from collections.abc import Sequence
from typing import Any, TypedDict

import grain
import numpy as np

COUNTS = ('documents', 'tokens', 'truncated', 'untrained')
# As many documents in a row without anything to train are no accident.
_HOPELESS = 2_000


class Document(TypedDict):
  """One document as ids.

  Attributes:
    tokens: int32[N].
    weights: float32[N]; weight of predicting each token, the first unused.
    whole: cut it short where it is too long, rather than in pieces.
  """

  tokens: np.ndarray
  weights: np.ndarray
  whole: bool


class Batch(TypedDict):
  """What a training step takes; B rows of T tokens.

  Attributes:
    tokens: int32[B,T]; the pad id behind the last document.
    targets: int32[B,T]; the next token of the same document, else the pad id.
    weights: float32[B,T]; weight of predicting the target; 0 on prompts, tool
      output, the last token of a document and padding.
    positions: int32[B,T]; 0 at the start of each document, and on padding.
    until: int32[B,T]; index in the row where the token's document ends; 0 on
      padding. Key j is visible to query i iff j <= i < until[j].
  """

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  positions: np.ndarray
  until: np.ndarray


def cut(document: Document, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Pieces (tokens, weights) of at most `length` that have something to train.

  Pieces of a long text overlap by one token: the last of one is only input.
  """
  tokens, weights = document['tokens'], document['weights']
  if document['whole'] or len(tokens) <= length:
    starts = [0]
  else:
    starts = range(0, len(tokens) - 1, length - 1)
  pieces = [(tokens[s : s + length], weights[s : s + length]) for s in starts]
  return [piece for piece in pieces if piece[1][1:].any()]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Packs items into bins: longest first, each into the fullest that holds it.

  Args:
    lengths: size of each item, at most `capacity`.
    capacity: size of a bin.

  Returns:
    The indices of the items of each bin.
  """
  bins: list[list[int]] = []
  free: list[tuple[int, int]] = []  # (space left, bin), sorted
  for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    at = bisect.bisect_left(free, (lengths[item], -1))
    if at == len(free):
      space, index = capacity, len(bins)
      bins.append([])
    else:
      space, index = free.pop(at)
    bins[index].append(item)
    bisect.insort(free, (space - lengths[item], index))
  return bins


def fill_row(
  documents: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad: int
) -> dict[str, np.ndarray]:
  """Lays documents one after another into a row: `Batch` without B."""
  row = {
    'tokens': np.full(length, pad, np.int32),
    'targets': np.full(length, pad, np.int32),
    'weights': np.zeros(length, np.float32),
    'positions': np.zeros(length, np.int32),
    'until': np.zeros(length, np.int32),
  }
  begin = 0
  for tokens, weights in documents:
    end = begin + len(tokens)
    row['tokens'][begin:end] = tokens
    row['targets'][begin : end - 1] = tokens[1:]
    row['weights'][begin : end - 1] = weights[1:]
    row['positions'][begin:end] = np.arange(len(tokens))
    row['until'][begin:end] = end
    begin = end
  return row


class Rows(grain.IterDataset):
  """Packs an endless or finite stream of documents into rows.

  Elements are `Batch` without B, and 'counts': int64[4] of `COUNTS`, what the
  row adds to the totals (a window's losses are on its first row).
  """

  def __init__(
    self,
    parent: grain.IterDataset,
    *,
    length: int,
    rows: int,
    pad: int,
    seed: int,
  ):
    """Packs the documents of `parent`.

    Args:
      parent: dataset of `Document`.
      length: tokens per row, at least 2.
      rows: rows' worth of tokens that are packed together.
      pad: id of padding.
      seed: of the order of rows within a window.
    """
    super().__init__(parent)
    self.length, self.rows, self.pad, self.seed = length, rows, pad, seed

  def __iter__(self) -> grain.DatasetIterator:
    """A fresh iterator."""
    return _RowIterator(self, iter(self._parent))

  def __str__(self) -> str:
    """Its name in Grain's traces."""
    return f'Rows(length={self.length}, rows={self.rows})'


class _RowIterator(grain.DatasetIterator):
  """Emits the rows of one window after another."""

  def __init__(self, dataset: Rows, parent: grain.DatasetIterator):
    super().__init__(parent)
    self._dataset = dataset
    self._window = 0  # number of the current window
    self._begin = parent.get_state()  # where it begins
    self._emitted = 0  # rows of it that are out
    self._ready: list[dict[str, np.ndarray]] | None = None

  def __next__(self) -> dict[str, np.ndarray]:
    """The next row.

    Raises:
      StopIteration: the documents are at an end.
      ValueError: no document has anything to train.
    """
    if self._ready is None:
      self._ready = self._pack()
    if self._emitted == len(self._ready):
      self._begin = self._parent.get_state()
      self._window, self._emitted = self._window + 1, 0
      self._ready = self._pack()
    if not self._ready:
      raise StopIteration
    row = self._ready[self._emitted]
    self._emitted += 1
    return row

  def get_state(self) -> dict[str, Any]:
    """A few numbers: where the window began and how far it is out."""
    return {
      'parent': self._begin,
      'window': self._window,
      'emitted': self._emitted,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes back to `state`; the window is packed again when next needed."""
    self._parent.set_state(state['parent'])
    self._begin = state['parent']
    self._window, self._emitted = state['window'], state['emitted']
    self._ready = None

  def _pack(self) -> list[dict[str, np.ndarray]]:
    """Reads and packs the window that begins here; [] at the end."""
    dataset = self._dataset
    pieces, losses = self._read()
    bins = best_fit([len(tokens) for tokens, _ in pieces], dataset.length)
    order = np.random.default_rng((dataset.seed, self._window))
    rows = []
    for index in order.permutation(len(bins)):
      chosen = [pieces[item] for item in bins[index]]
      row = fill_row(chosen, dataset.length, dataset.pad)
      tokens = sum(len(tokens) for tokens, _ in chosen)
      row['counts'] = np.asarray([len(chosen), tokens, 0, 0], np.int64)
      rows.append(row)
    if rows:
      rows[0]['counts'][2:] = losses
    return rows

  def _read(self) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """Pieces worth a window, and the documents (truncated, untrained)."""
    length = self._dataset.length
    wanted = self._dataset.rows * length
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    total = truncated = untrained = 0
    for document in self._parent:
      found = cut(document, length)
      if found:
        truncated += document['whole'] and len(document['tokens']) > length
      else:
        untrained += 1
      if not pieces and untrained > _HOPELESS:
        raise ValueError(
          f'{untrained} documents in a row have no trained token within '
          f'{length}: check the roles of the messages and data.length'
        )
      pieces += found
      total += sum(len(tokens) for tokens, _ in found)
      if total >= wanted:
        break
    return pieces, [truncated, untrained]
