"""What an episode has said, and the ids of a request that goes on from it.

Wherever an answer of the episode comes back in a request, the ids that were
sampled stand in the prompt; only what lies between them is rendered. Which
answer it is, is told by the ids before it: the one that was sampled after just
those. Where none was, the history has been rewritten, and what is equal in
every word still keeps its ids, in order.

APIs without a place for reasoning give answers back without it. Such an answer
is known by the ids before it as well; in a rewritten history by its place among
the messages, unless there are several.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from m2 import types

ENDS = 64  # branches that a request may go on from; the newest


class Render(Protocol):
  """Ids of messages up to the generation prompt of the next answer."""

  def __call__(
    self, block: Sequence[types.Message], *, first: bool
  ) -> np.ndarray:
    """`first`: the block begins the conversation; others follow an answer."""
    ...


@dataclasses.dataclass(frozen=True)
class Prompt:
  """The ids of a request, and how it stands to what was said before.

  Attributes:
    ids: int32[P].
    mark: digest of them so far.
    end: the answer that it goes on from, or None.
    change: None if it is a first request or goes on from the end of a branch;
      else what is different.
    first: nothing was said before.
  """

  ids: np.ndarray
  mark: Any
  end: bytes | None
  change: str | None
  first: bool


@dataclasses.dataclass(frozen=True)
class _Said:
  """One answer.

  Attributes:
    message: what came of it.
    ids: what was sampled.
    before: digest of its prompt.
    place: how many messages that had.
  """

  message: types.Message
  ids: np.ndarray
  before: bytes
  place: int


class History:
  """The answers of one episode."""

  def __init__(self):
    """Nothing is said yet."""
    self._answers: list[_Said] = []
    self._numbers: dict[tuple, list[int]] = {}  # of answers, by what is said
    self._ends: list[bytes] = []
    self._messages: tuple[types.Message, ...] = ()
    self._tools: tuple[Mapping[str, Any], ...] = ()

  def prompt(
    self,
    render: Render,
    eos_id: int,
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    unsaid: bool,
  ) -> Prompt:
    """The prompt of a request: sampled ids for every answer in it.

    Args:
      render: makes ids of what was not sampled.
      eos_id: closes an answer that was cut off.
      messages: of the request.
      tools: of the request.
      unsaid: an answer may come back without reasoning and errors.
    """
    parts: list[np.ndarray] = []
    block: list[types.Message] = []
    mark, end, after = hashlib.blake2b(digest_size=16), None, 0

    def add(ids: np.ndarray) -> None:
      parts.append(ids)
      mark.update(_bytes(ids))

    for place, message in enumerate(messages):
      found = None
      numbers = self._numbers.get(_words(message), ())
      if message.role == 'assistant' and numbers:
        between = render(block, first=not parts)
        here = mark.copy()
        here.update(_bytes(between))
        found = self._find(
          message, numbers, here.digest(), place, after, unsaid
        )
      if found is None:
        block.append(message)
        continue
      after, said = found + 1, self._answers[found]
      add(between)
      add(said.ids)
      end = mark.digest()
      if not len(said.ids) or said.ids[-1] != eos_id:
        add(np.array([eos_id], np.int32))
      block = []
    add(render(block, first=not parts))
    change = None
    if self._ends and end not in self._ends:
      change = self._difference(messages, tools, unsaid)
    return Prompt(np.concatenate(parts), mark, end, change, not self._ends)

  def add(
    self,
    prompt: Prompt,
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
    message: types.Message,
    ids: np.ndarray,
  ) -> None:
    """Adds an answer.

    Args:
      prompt: what it was sampled after.
      messages: of the request.
      tools: of the request.
      message: what came of it.
      ids: what was sampled.
    """
    number = len(self._answers)
    self._numbers.setdefault(_words(message), []).append(number)
    self._answers.append(
      _Said(message, ids, prompt.mark.digest(), len(messages))
    )
    mark = prompt.mark.copy()
    mark.update(_bytes(ids))
    if prompt.end in self._ends:
      self._ends.remove(prompt.end)
    self._ends = [*self._ends, mark.digest()][-ENDS:]
    self._messages = (*messages, message)
    self._tools = tuple(tools or ())

  def _find(
    self,
    message: types.Message,
    numbers: Sequence[int],
    before: bytes,
    place: int,
    after: int,
    unsaid: bool,
  ) -> int | None:
    """Which answer has come back as `message`, if one has.

    Args:
      message: of the request.
      numbers: of the answers with the same words.
      before: digest of the ids in front of it.
      place: of the message.
      after: the answers from there on have not come back yet.
      unsaid: as in `prompt`.
    """
    known = {
      number: said
      for number in numbers
      if _is(said := self._answers[number], message, unsaid)
    }
    exact = [n for n, said in known.items() if said.before == before]
    if exact:
      return exact[0]
    equal = [n for n, x in known.items() if n >= after and x.message == message]
    if equal:
      return equal[0]
    here = [n for n, said in known.items() if said.place == place]
    return here[0] if len(here) == 1 else None

  def _difference(
    self,
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
    unsaid: bool,
  ) -> str:
    """Why a request does not go on from the last answer."""
    if tuple(tools or ()) != self._tools:
      return 'the tools differ'
    pairs = itertools.zip_longest(self._messages, messages)
    for index, (before, now) in enumerate(pairs):
      if before is None:
        break
      if now is None:
        return f'message {index} ({before.role}) is missing'
      same = before == now
      if before.role == now.role == 'assistant' and _words(before) == _words(
        now
      ):
        same = same or _loosely(before, now, unsaid)
      if not same:
        return f'message {index} ({before.role}) differs'
    return 'an answer of the same text has other ids'


def _is(said: _Said, message: types.Message, unsaid: bool) -> bool:
  """Whether a message of the same words may be an answer."""
  return said.message == message or _loosely(said.message, message, unsaid)


def _loosely(
  known: types.Message, message: types.Message, unsaid: bool
) -> bool:
  """The same, with reasoning and errors left out on the way."""
  return unsaid and message.reasoning in ('', known.reasoning)


def _words(message: types.Message) -> tuple:
  """What is said and called; JSON tells true from 1, which Python does not."""
  calls = [
    (call.name, json.dumps(dict(call.arguments), sort_keys=True, default=repr))
    for call in message.tool_calls
  ]
  return message.content, *calls


def _bytes(ids: np.ndarray) -> bytes:
  return np.ascontiguousarray(ids, np.int32).tobytes()
