"""Windowed FIFO: which finished rollouts the trainer may take (report 6.2.4).

Groups queue in submission order. The head is the oldest group not yet taken;
only finished groups with an index in [head, head + W) may be taken, however
many later ones are done. W = 1 is strict FIFO, W = N is greedy.

A slot is occupied from `submit` until `free` (or `drop`). The loop frees slots
once the weights trained on the taken groups are in the engine, or the groups
are left out, so a new group never starts on weights that are already known to
be replaced. With at most N occupied slots this bounds, in groups taken between
a group's submission and its own turn,

  lag  <= N + W - 2     (N - 1 older ones, W - 1 younger ones)
  slip <= W - 1         (younger groups taken before it)

Pure Python, no threads: the state is a small dictionary that travels in the
checkpoint with the model.
"""

import operator
from typing import Any


class WindowedFifo:
  """A queue whose reordering is bounded by a window.

  Attributes:
    window: how many submission indices, from the head on, may be taken.
    head: index of the oldest group not yet taken.
    next_index: index that the next `submit` returns.
  """

  def __init__(self, window: int):
    """Starts empty; ValueError for a window that is no number from 1 on."""
    try:
      window = operator.index(window)
    except TypeError:
      raise ValueError(f'{window=} must be a whole number') from None
    if window < 1:
      raise ValueError(f'{window=} must be at least 1 (1 is strict FIFO)')
    self.window = window
    self.head = 0
    self.next_index = 0
    self._index: dict[str, int] = {}  # queued id -> index, oldest first
    self._done: set[str] = set()
    self._taken: list[str] = []  # taken, slot not yet free

  def submit(self, id: str) -> int:
    """Appends a group; returns its submission index."""
    if id in self._index or id in self._taken:
      raise ValueError(f'group {id!r} is already in the window')
    index = self.next_index
    self.next_index += 1
    self._index[id] = index
    return index

  def done(self, id: str) -> None:
    """Marks a queued group as finished."""
    self._require(id)
    self._done.add(id)

  def drop(self, id: str) -> None:
    """Removes a group that failed: nobody waits for it, its slot is free."""
    self._require(id)
    del self._index[id]
    self._done.discard(id)
    self._advance()

  def take(self, count: int) -> list[str]:
    """Takes up to `count` finished groups, oldest first, from the window.

    Taking the head moves the window, so one call may reach groups that were
    outside it before. An empty answer means: wait.
    """
    taken = []
    while len(taken) < count:
      id = next((id for id in self._eligible() if id in self._done), None)
      if id is None:
        break
      del self._index[id]
      self._done.discard(id)
      self._advance()
      taken.append(id)
    self._taken += taken
    return taken

  def free(self) -> None:
    """Frees the slots of all taken groups, which are trained on or left out."""
    self._taken.clear()

  @property
  def occupied(self) -> int:
    """Slots in use: queued groups and those taken but not yet freed."""
    return len(self._index) + len(self._taken)

  def unfinished(self) -> list[tuple[str, int]]:
    """Queued groups that are not done, as (id, index), oldest first."""
    return [pair for pair in self._index.items() if pair[0] not in self._done]

  def state(self) -> dict[str, Any]:
    """JSON-able state; taken groups belong to the step being saved."""
    return {
      'head': self.head,
      'next_index': self.next_index,
      'queued': [[id, index] for id, index in self._index.items()],
      'done': sorted(self._done, key=self._index.__getitem__),
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Replaces the content with what `state` returned.

    Raises:
      ValueError: no window was ever in that state; nothing is replaced.
    """
    try:
      head = operator.index(state['head'])
      following = operator.index(state['next_index'])
      queued = [(id, operator.index(index)) for id, index in state['queued']]
      index, done = dict(queued), set(state['done'])
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f'window state {state}: {error!r}') from None
    order = [number for _, number in queued]
    if len(index) < len(queued):
      raise ValueError(f'window state: a group is queued twice: {queued}')
    if missing := done - set(index):
      raise ValueError(f'window state: done but not queued: {sorted(missing)}')
    if order != sorted(set(order)):
      raise ValueError(f'window state: indices that do not rise: {queued}')
    if head < 0 or head != (order or [following])[0]:
      raise ValueError(
        f'window state: {head=} is not the oldest queued index, or next_index='
        f'{following} where none is: {queued}'
      )
    if order and order[-1] >= following:
      raise ValueError(
        f'window state: index {order[-1]} is not below next_index={following}'
      )
    self._index, self._done, self._taken = index, done, []
    self.head, self.next_index = head, following

  def _eligible(self) -> list[str]:
    end = self.head + self.window
    eligible = []
    for id, index in self._index.items():
      if index >= end:
        break
      eligible.append(id)
    return eligible

  def _advance(self) -> None:
    self.head = next(iter(self._index.values()), self.next_index)

  def _require(self, id: str) -> None:
    if id not in self._index:
      raise KeyError(f'group {id!r} is not in the window')
