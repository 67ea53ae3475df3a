"""What an episode has said, and the ids of a request that goes on from it.

Wherever an answer of the episode comes back in a request, the ids that were
sampled stand in the prompt; only what lies between them is rendered. Which
answer it is, is told by the ids before it: the one that was sampled after just
those. Where none was, the history has been rewritten, and what is equal in
every word still keeps its ids, in order. What a request was once read as, its
beginning is read as again, whatever was said in other branches since.

APIs without a place for reasoning give answers back without it. Such an answer
is known by the ids before it as well; in a rewritten history by its place among
the messages, if the first or the last message before it is the same and there
are not several.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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
    read: of each assistant's message, the digest of all up to it, and which
      answer it was taken for.
    around: digests of the first and of the last message.
    traces: of the messages.
  """

  ids: np.ndarray
  mark: Any
  end: bytes | None
  change: str | None
  first: bool
  read: Sequence[tuple[bytes, int | None]]
  around: tuple[bytes, bytes]
  traces: Sequence['_Trace']


@dataclasses.dataclass(frozen=True)
class _Said:
  """One answer.

  Attributes:
    message: what came of it.
    ids: what was sampled.
    before: digest of its prompt.
    place: how many messages that had.
    around: digests of the first and of the last of them.
  """

  message: types.Message
  ids: np.ndarray
  before: bytes
  place: int
  around: tuple[bytes, bytes]


class _Trace(NamedTuple):
  """What is kept of a message to say whether it has changed."""

  role: str
  words: bytes
  reasoning: bytes
  errors: tuple[str, ...]


class History:
  """The answers of one episode."""

  def __init__(self):
    """Nothing is said yet."""
    self._answers: list[_Said] = []
    self._numbers: dict[bytes, list[int]] = {}  # of answers, by what is said
    self._read: dict[bytes, int | None] = {}  # see `Prompt.read`
    self._ends: list[bytes] = []
    self._traces: tuple[_Trace, ...] = ()  # of the last request and its answer
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
    traces = [_trace(message) for message in messages]
    digests = [_digest(trace) for trace in traces]
    upto = hashlib.blake2b(repr(tools or ()).encode(errors='replace'))
    read = []

    def add(ids: np.ndarray) -> None:
      parts.append(ids)
      mark.update(_bytes(ids))

    for place, message in enumerate(messages):
      upto.update(digests[place])
      if message.role != 'assistant':
        block.append(message)
        continue
      known = {
        number: said
        for number in self._numbers.get(traces[place].words, ())
        if _is(said := self._answers[number], message, unsaid)
      }
      between, before = None, b''
      # The same ids are those of as many messages, but for a system message
      # that says what is said without one.
      if any(abs(said.place - place) <= 1 for said in known.values()):
        between = render(block, first=not parts)
        here = mark.copy()
        here.update(_bytes(between))
        before = here.digest()
      around = digests[0], digests[place - 1] if place else b''
      whole = upto.digest()
      found = self._find(message, known, before, whole, place, around, after)
      read.append((whole, found))
      if found is None:
        block.append(message)
        continue
      after, said = found + 1, self._answers[found]
      add(render(block, first=not parts) if between is None else between)
      add(said.ids)
      end = mark.digest()
      if not len(said.ids) or said.ids[-1] != eos_id:
        add(np.array([eos_id], np.int32))
      block = []
    add(render(block, first=not parts))
    change = None
    if self._ends and end not in self._ends:
      change = self._difference(traces, tools, unsaid)
    around = (digests[0], digests[-1]) if digests else (b'', b'')
    ids, first = np.concatenate(parts), not self._ends
    return Prompt(ids, mark, end, change, first, read, around, traces)

  def add(
    self,
    prompt: Prompt,
    tools: Sequence[Mapping[str, Any]] | None,
    message: types.Message,
    ids: np.ndarray,
  ) -> None:
    """Adds an answer.

    Args:
      prompt: what it was sampled after.
      tools: of the request.
      message: what came of it.
      ids: what was sampled.
    """
    number, trace = len(self._answers), _trace(message)
    # First the answer: another thread may be reading a request.
    self._answers.append(
      _Said(
        message, ids, prompt.mark.digest(), len(prompt.traces), prompt.around
      )
    )
    self._numbers.setdefault(trace.words, []).append(number)
    for upto, found in prompt.read:
      self._read.setdefault(upto, found)
    mark = prompt.mark.copy()
    mark.update(_bytes(ids))
    if prompt.end in self._ends:
      self._ends.remove(prompt.end)
    self._ends = [*self._ends, mark.digest()][-ENDS:]
    self._traces = (*prompt.traces, trace)
    self._tools = tuple(tools or ())

  def _find(
    self,
    message: types.Message,
    known: Mapping[int, _Said],
    before: bytes,
    upto: bytes,
    place: int,
    around: tuple[bytes, bytes],
    after: int,
  ) -> int | None:
    """Which answer has come back as `message`, if one has.

    Args:
      message: of the request.
      known: answers that it may be, by number.
      before: digest of the ids in front of it.
      upto: digest of all messages up to it.
      place: of the message.
      around: digests of the first message and of that in front of it.
      after: the answers from there on have not come back yet.
    """
    exact = [n for n, said in known.items() if said.before == before]
    for number in exact:
      if known[number].message == message:
        return number
    if exact:
      return exact[0]
    if upto in self._read:
      return self._read[upto]
    equal = [n for n, x in known.items() if n >= after and x.message == message]
    if equal:
      return equal[0]
    here = [
      number
      for number, said in known.items()
      if said.place == place
      and (said.around[0] == around[0] or said.around[1] == around[1])
    ]
    return here[0] if len(here) == 1 else None

  def _difference(
    self,
    traces: Sequence[_Trace],
    tools: Sequence[Mapping[str, Any]] | None,
    unsaid: bool,
  ) -> str:
    """Why a request does not go on from the last answer."""
    if tuple(tools or ()) != self._tools:
      return 'the tools differ'
    pairs = itertools.zip_longest(self._traces, traces)
    for index, (before, now) in enumerate(pairs):
      if before is None:
        break
      if now is None:
        return f'message {index} ({before.role}) is missing'
      if unsaid and now.role == 'assistant':
        now = now._replace(errors=before.errors)
        if now.reasoning == _hash(''):
          now = now._replace(reasoning=before.reasoning)
      if before != now:
        return f'message {index} ({before.role}) differs'
    return 'an answer of the same text has other ids'


def _is(said: _Said, message: types.Message, unsaid: bool) -> bool:
  """Whether a message of the same words may be an answer."""
  if unsaid and message.reasoning in ('', said.message.reasoning):
    return True
  return said.message == message


def _trace(message: types.Message) -> _Trace:
  words = [message.content]
  for call in message.tool_calls:
    words += [call.name, _json(dict(call.arguments))]
  return _Trace(
    message.role,
    _hash(repr(words)),
    _hash(message.reasoning),
    message.errors,
  )


def _json(arguments: Mapping[str, Any]) -> str:
  """JSON, which tells true from 1; 1.0 is 1, as some languages write it."""

  def plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
      return int(value)
    if isinstance(value, Mapping):
      return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
      return [plain(inner) for inner in value]
    return value

  try:
    return json.dumps(plain(arguments), sort_keys=True, default=repr)
  except RecursionError:  # deeper than anybody nests
    return '...'


def _digest(trace: _Trace) -> bytes:
  return _hash(repr(trace))


def _hash(text: str) -> bytes:
  data = text.encode(errors='surrogatepass')
  return hashlib.blake2b(data, digest_size=16).digest()


def _bytes(ids: np.ndarray) -> bytes:
  return np.ascontiguousarray(ids, np.int32).tobytes()
