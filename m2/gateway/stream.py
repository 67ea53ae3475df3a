"""Answers as they are sampled: ids go in, pieces of a message come out."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m2 import types
from m2.data import template, tokenizer
from m2.engine import engine as engines


@dataclasses.dataclass(frozen=True)
class Part:
  """What came of an answer since the part before.

  Attributes:
    events: of its message.
    ids: int32, sampled.
    logprobs: float32, of each.
    prompt_ids: int32, the same in every part.
  """

  events: tuple[template.Event, ...]
  ids: np.ndarray
  logprobs: np.ndarray
  prompt_ids: np.ndarray


Listener = Callable[[int, Part], None]  # of an answer's number and its parts


class Sampled(NamedTuple):
  """A finished answer.

  Attributes:
    result: the engine's, up to the stop string if one came.
    stopped: that string, or None.
    message: what was sampled, parsed.
  """

  result: engines.GenResult
  stopped: str | None
  message: types.Message


class Stream:
  """Reads one answer id by id, up to a stop string if one comes.

  Stop strings are looked for in what is said behind the reasoning, before any
  call, as it is sampled: the answer ends with the id that completes one. What
  could become one is held back.

  Attributes:
    count: ids that belong to the answer.
    stopped: the stop string that ended it, or None.
  """

  def __init__(
    self,
    words: tokenizer.Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None,
    stop: Sequence[str] = (),
  ):
    """Starts an answer to a generation prompt.

    Args:
      words: the model's tokenizer.
      tools: what its calls are checked by; None or empty for neither.
      stop: strings that end it.

    Raises:
      ValueError: tools that make no sense.
    """
    self.count = 0
    self.stopped: str | None = None
    self._reader = tokenizer.Reader(words)
    self._parser = template.StreamParser(
      tools or None, thinking=True, spelled=False
    )
    self._stop = tuple(stop)
    self._saying = False  # behind the reasoning, before any call
    self._lead = 2  # newlines that the template puts there
    self._said = ''  # since then
    self._parsed = ''  # of it, what the parser has let go
    self._shown = 0  # characters of it that were given out

  def feed(self, id: int) -> list[template.Event]:
    """What one more id makes certain; nothing once a stop string has come."""
    if self.stopped is not None:
      return []
    self.count += 1
    return self._read(self._reader.feed(id))

  def close(self) -> tuple[types.Message, list[template.Event]]:
    """The message, and what was still held back of it."""
    events = []
    if self.stopped is None:
      events = self._read(self._reader.finish())
    if self.stopped is None:
      events += self._let_go(self._parser.finish(), everything=True)
    message = self._parser.close()
    if self.stopped is not None:
      message = dataclasses.replace(
        message, content=self._said, tool_calls=(), errors=()
      )
    return message, events

  def _read(self, pieces: Sequence[tuple[str, bool]]) -> list[template.Event]:
    events = []
    for text, special in pieces:
      found = (
        self._parser.feed_special(text) if special else self._parser.feed(text)
      )
      ended = special and (
        text == template.EOS or (text == template.CALLS and self._saying)
      )
      if self._saying and not ended:
        self._say(text)
      events += self._let_go(found, everything=ended)
      if self.stopped is not None:
        break
      if ended:
        self._saying, self._stop = False, ()
      elif special and text == template.THINK_END:
        self._saying = True
    return events

  def _say(self, text: str) -> None:
    """Adds to what is said, and cuts it where a stop string begins."""
    while self._lead and text.startswith('\n'):
      text, self._lead = text[1:], self._lead - 1
    if not text:
      return
    self._lead = 0
    start = len(self._said)
    self._said += text
    first = min(
      (
        (at, word)
        for word in self._stop
        if (at := self._said.find(word, max(0, start - len(word) + 1))) >= 0
      ),
      default=None,
    )
    if first is not None:
      at, self.stopped = first
      self._said = self._said[:at]

  def _let_go(
    self, events: Sequence[template.Event], *, everything: bool
  ) -> list[template.Event]:
    """Events, but for content that may begin a stop string."""
    if not self._stop:
      return list(events)
    text = ''.join(e.text for e in events if e.kind == 'content')
    others = [event for event in events if event.kind != 'content']
    self._parsed += text
    if self.stopped is not None:
      until = len(self._said)  # the parser may hold some of it back
      fresh, others = self._said[self._shown :], []
    else:
      until = len(self._parsed)
      if not everything:
        held = max(_overlap(self._said, word) for word in self._stop)
        until = min(until, len(self._said) - held)
      fresh = self._parsed[self._shown : until]
    self._shown = max(self._shown, until)
    shown = [template.Event('content', fresh)] if fresh else []
    return [*shown, *others]


def _overlap(text: str, word: str) -> int:
  """Characters at the end of `text` that `word` begins with."""
  for size in range(min(len(word) - 1, len(text)), 0, -1):
    if text.endswith(word[:size]):
      return size
  return 0


async def follow(
  engine: engines.Engine,
  request: engines.GenRequest,
  start: Callable[[], Stream],
  count: int,
  listen: Listener | None,
) -> list[Sampled]:
  """Samples `count` answers to one prompt, and reads them as they come.

  Who cancels it, or an error, ends the sampling of all.

  Args:
    engine: somebody must drive it, in whatever thread.
    request: the first answer's; the others' seeds depend on its seed.
    start: makes the reader of an answer.
    count: answers.
    listen: called in this event loop; None does without.
  """
  first = request.sampling
  answers = []
  for index in range(count):
    seed = types.seed(first.seed, index) if index else first.seed
    mine = dataclasses.replace(
      request, sampling=dataclasses.replace(first, seed=seed)
    )
    tell = functools.partial(listen, index) if listen else None
    answers.append(asyncio.ensure_future(_one(engine, mine, start(), tell)))
  try:
    return await asyncio.gather(*answers)
  finally:
    for answer in answers:
      answer.cancel()


async def _one(engine, request, stream, listen) -> Sampled:
  """Reads one answer while it is sampled."""
  loop, parts = asyncio.get_running_loop(), asyncio.Queue()

  def put(part) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
      loop.call_soon_threadsafe(parts.put_nowait, part)

  def tell(events, ids, logprobs) -> None:
    if listen is not None:
      listen(Part(tuple(events), ids, logprobs, request.prompt_ids))

  future = engine.submit(
    dataclasses.replace(request, listen=lambda *part: put(part))
  )
  future.add_done_callback(lambda _: put(None))
  try:
    while (part := await parts.get()) is not None:
      if stream.stopped is not None:
        continue
      before = stream.count
      events = _joined(e for id in part[0] for e in stream.feed(int(id)))
      size = stream.count - before
      tell(events, part[0][:size], part[1][:size])
      if stream.stopped is not None:
        engine.cancel(future)
  except BaseException:
    future.cancel()
    raise
  result = future.result()
  if not len(result.ids):  # no room, or cancelled: nothing is malformed
    return Sampled(result, None, types.Message('assistant'))
  message, events = stream.close()
  if events:
    tell(events, result.ids[:0], result.logprobs[:0])
  if stream.stopped is not None:
    result = _shortened(result, stream.count)
  return Sampled(result, stream.stopped, message)


def _joined(events: Iterable[template.Event]) -> list[template.Event]:
  """The same with neighbouring text of a kind in one."""
  found: list[template.Event] = []
  for event in events:
    if found and event.call is None and found[-1].kind == event.kind:
      event = template.Event(event.kind, found.pop().text + event.text)
    found.append(event)
  return found


def _shortened(result: engines.GenResult, count: int) -> engines.GenResult:
  """The first `count` ids of a result that a stop string ended."""
  experts = result.experts
  if experts is not None:
    experts = experts[: len(experts) - (len(result.ids) - count)]
  versions = result.versions[:count]
  return dataclasses.replace(
    result,
    ids=result.ids[:count],
    logprobs=result.logprobs[:count],
    versions=versions,
    version=int(versions.min()),
    stop=types.StopReason.STRING,
    experts=experts,
  )
