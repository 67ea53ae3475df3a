"""Reads the model's own output: reasoning, visible text, tool calls.

One machine serves all ways in: `parse` feeds it a whole text, a stream feeds
it pieces, and any cutting gives the same message. Who is not told whether the
text begins inside the reasoning finds out: `parse` from all of it, a stream
from the first tag that comes. Whoever has the ids feeds special tokens apart
from text, which then cannot spell one: a model that quotes `</think>` or a call
of a tool in its reasoning has neither ended it nor called.

What is malformed is reported and never guessed at. A block of calls whose
structure is broken (a tag left open, text between tags, a block in a block)
has no calls at all. In a sound block, a call that its tool's schema refuses is
left out and the others stand. A value ends at the first `</parameter>`, and no
value may contain the markup of calls: there is no escape for it, so such text
cannot be told from a tag that was forgotten.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from m2 import types
from m2.data import lexer, markup

_FORGOTTEN = 'tool-call markup outside a block'
_TRAILING = 'text after the tool calls'


@dataclasses.dataclass(frozen=True)
class Event:
  """A piece of a message as it streams in.

  Attributes:
    kind: which part of the message grows.
    text: what is added to the reasoning or the content.
    call: a finished, checked call; calls come when their block closes.
  """

  kind: Literal['reasoning', 'content', 'tool_call']
  text: str = ''
  call: types.ToolCall | None = None


def parse(
  text: str,
  tools: Sequence[Mapping[str, Any]] | None = None,
  *,
  thinking: bool = False,
) -> types.Message:
  """Parses one whole output of the model.

  Args:
    text: what the model wrote, with or without the leading `<think>` and the
      closing `[e~[`.
    tools: OpenAI-style tools that the calls are checked against; None leaves
      names and types unchecked and every value text.
    thinking: the text continues the generation prompt, which already opened
      the reasoning; so text without `</think>` is reasoning cut short. Where
      False, it does so if it has a `</think>` outside the values of calls and
      no leading `<think>`; without any think tag it is visible content.

  Returns:
    The assistant's message; `errors` lists what was malformed. No text raises.

  Raises:
    ValueError: `tools` itself is malformed.
  """
  if not thinking and not text.lstrip().startswith(markup.THINK):
    message = _without_values(text).partition(markup.EOS)[0]
    thinking = markup.THINK_END in message
  parser = StreamParser(tools, thinking=thinking)
  parser.feed(text)
  return parser.close()


def _without_values(text: str) -> str:
  """The text less the parameters of calls; in one pass, whatever it is."""
  parts, at = [], 0
  while (start := text.find(lexer.PARAMETER, at)) >= 0:
    opened = text.find('>', start)
    closed = text.find(markup.PARAMETER_END, opened + 1) if opened >= 0 else -1
    if closed < 0:  # nor is any that follows
      break
    parts.append(text[at:start])
    at = closed + len(markup.PARAMETER_END)
  return ''.join([*parts, text[at:]])


class _Section:
  """Text of one part, less the newlines that the template puts around it."""

  def __init__(self, kind: Literal['reasoning', 'content']):
    self.kind = kind
    self.lead = 0  # newlines still to drop at the front
    self._parts: list[str] = []
    self._held = ''  # a newline that may turn out to be the template's

  def add(self, text: str) -> list[Event]:
    while self.lead and text.startswith('\n'):
      text, self.lead = text[1:], self.lead - 1
    if not text:
      return []
    self.lead = 0
    text = self._held + text
    self._held = '\n' if text.endswith('\n') else ''
    return self._emit(text.removesuffix('\n'))

  def end(self, *, trim: bool) -> list[Event]:
    """Ends the part; `trim` drops its last newline."""
    held, self._held = self._held, ''
    return [] if trim else self._emit(held)

  def text(self) -> str:
    return ''.join(self._parts)

  def _emit(self, text: str) -> list[Event]:
    if not text:
      return []
    self._parts.append(text)
    return [Event(self.kind, text)]


class StreamParser:
  """`parse` for text that arrives in pieces.

  `feed` returns what became certain; `finish` ends the text and returns the
  rest; `close` finishes and returns the message. Without `thinking` and
  without a leading `<think>`, text before the first tag may still turn out to
  be reasoning, so it is held back until one comes.
  """

  def __init__(
    self,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinking: bool = False,
    spelled: bool = True,
  ):
    """See `parse` for the other arguments and errors.

    Args:
      tools: of `parse`.
      thinking: of `parse`.
      spelled: text spells special tokens; where False, only `feed_special`
        gives one.
    """
    self._tools = markup.read_tools(tools)
    self._thinking = thinking
    self._lexer = lexer.Lexer(spelled)
    self._finished = False
    self._state = self._start
    self._undecided: list[lexer.Token] = []
    self._blank = True  # nothing but whitespace so far
    self._reasoning_text = _Section('reasoning')
    self._content_text = _Section('content')
    self._calls: list[types.ToolCall] = []
    self._errors: list[str] = []
    self._once: set[str] = set()  # errors not to repeat
    self._block: list[types.ToolCall] = []  # calls of the open block
    self._invokes = 0  # in the open block, malformed ones included
    self._call = ''  # name of the open invoke
    self._raw: dict[str, str] = {}  # its parameters
    self._faults: list[str] = []  # what is wrong with it
    self._name = ''  # the open parameter
    self._value: list[str] = []

  def feed(self, text: str) -> list[Event]:
    """Takes the next piece; returns what it made certain.

    Raises:
      ValueError: the parser is closed.
    """
    self._refuse_closed()
    return self._take(self._lexer.feed(text))

  def feed_special(self, token: str) -> list[Event]:
    """Takes a special token; one that is no tag stands for its characters.

    Raises:
      ValueError: the parser is closed.
    """
    self._refuse_closed()
    if token not in lexer.SPECIAL:
      return self.feed(token)
    return self._take([*self._lexer.finish(), (token, '')])

  def finish(self) -> list[Event]:
    """Ends the text; returns what was held back. Twice is the same as once."""
    if self._finished:
      return []
    self._finished = True
    return self._take([*self._lexer.finish(), lexer.END])

  def close(self) -> types.Message:
    """Ends the text and returns the message."""
    self.finish()
    return types.Message(
      role='assistant',
      content=self._content_text.text(),
      reasoning=self._reasoning_text.text(),
      tool_calls=tuple(self._calls),
      errors=tuple(self._errors),
    )

  def _refuse_closed(self) -> None:
    if self._finished:
      raise ValueError('this parser is closed; use a new one for a new message')

  def _take(self, tokens: Iterable[lexer.Token]) -> list[Event]:
    events = []
    for token in tokens:
      events += self._state(*token)
    return events

  # States. Each takes a tag, or a text, or neither at the end of the message.

  def _start(self, tag: str, text: str) -> list[Event]:
    """Decides whether the message opens with reasoning or with content."""
    if tag == markup.THINK and self._blank:
      self._reasoning_text.lead = 1
      self._state = self._reasoning
      return []
    self._undecided.append((tag, text))
    self._blank = self._blank and not tag and not text.strip()
    if text and (self._blank or not self._thinking):
      return []
    if self._thinking or tag == markup.THINK_END:
      self._state = self._reasoning
    elif tag in (markup.CALLS, markup.EOS, ''):
      self._state = self._content
    else:
      return []
    return self._take(self._undecided)

  def _reasoning(self, tag: str, text: str) -> list[Event]:
    if tag == markup.THINK_END:
      self._content_text.lead = 2
      self._state = self._content
      return self._reasoning_text.end(trim=True)
    if tag == markup.EOS or not (tag or text):
      self._errors.append(f'the reasoning is not closed by {markup.THINK_END}')
      self._state = self._end
      return self._reasoning_text.end(trim=False)
    return self._reasoning_text.add(tag or text)

  def _content(self, tag: str, text: str) -> list[Event]:
    if tag == markup.CALLS:
      self._open_block()
      return self._content_text.end(trim=True)
    if tag == markup.EOS or not (tag or text):
      self._state = self._end
      return self._content_text.end(trim=False)
    if tag and tag not in (markup.THINK, markup.THINK_END):
      self._report(_FORGOTTEN)
    return self._content_text.add(tag or text)

  def _open_block(self) -> None:
    self._block, self._invokes = [], 0
    self._state = self._in_block

  def _in_block(self, tag: str, text: str) -> list[Event]:
    if tag.startswith(lexer.INVOKE):
      self._call = tag[len(lexer.INVOKE) : -2]
      self._raw, self._faults = {}, []
      self._invokes += 1
      self._state = self._in_invoke
      return []
    if tag == markup.CALLS_END:
      if not self._invokes:
        self._errors.append('a tool-call block without a call')
      self._calls += self._block
      self._state = self._after
      return [Event('tool_call', call=call) for call in self._block]
    return self._broken(tag, text, 'the tool-call block')

  def _in_invoke(self, tag: str, text: str) -> list[Event]:
    if tag.startswith(lexer.PARAMETER):
      self._name, self._value = tag[len(lexer.PARAMETER) : -2], []
      self._state = self._in_value
      return []
    if tag == markup.INVOKE_END:
      self._finish_call()
      self._state = self._in_block
      return []
    return self._broken(tag, text, f'the call of {self._call!r}')

  def _in_value(self, tag: str, text: str) -> list[Event]:
    if tag == markup.PARAMETER_END:
      if self._name in self._raw:
        self._faults.append(f'parameter {self._name!r} is given twice')
      self._raw[self._name] = ''.join(self._value)
      self._state = self._in_invoke
      return []
    if text or tag in (markup.THINK, markup.THINK_END):
      self._value.append(tag or text)
      return []
    return self._broken(
      tag, '', f'parameter {self._name!r} of the call of {self._call!r}'
    )

  def _broken(self, tag: str, text: str, where: str) -> list[Event]:
    """Handles what is no part of a sound block; whitespace between tags is."""
    if text and not text.strip():
      return []
    if text:
      self._errors.append(f'stray text in {where}')
    elif tag in (markup.EOS, ''):
      self._errors.append(f'{where} is not closed')
    else:
      self._errors.append(f'{tag} in {where}, which is not closed')
    closed = tag == markup.CALLS_END
    ended = tag == markup.EOS or not (tag or text)
    self._state = (
      self._after if closed else self._end if ended else self._in_wreck
    )
    return []

  def _in_wreck(self, tag: str, text: str) -> list[Event]:
    """Skips the rest of a block whose structure is already reported."""
    if tag == markup.CALLS_END:
      self._state = self._after
    elif tag == markup.EOS:
      self._state = self._end
    return []

  def _after(self, tag: str, text: str) -> list[Event]:
    if tag == markup.CALLS:
      self._open_block()
    elif tag == markup.EOS:
      self._state = self._end
    elif tag or text.strip():
      self._report(_TRAILING)
    return []

  def _end(self, tag: str, text: str) -> list[Event]:
    if tag or text.strip():
      self._report(f'text after {markup.EOS}')
    return []

  def _report(self, error: str) -> None:
    """Reports once what could otherwise repeat for every piece of text."""
    if error not in self._once:
      self._once.add(error)
      self._errors.append(error)

  def _finish_call(self) -> None:
    """Checks the invoke that just closed against its tool."""
    arguments = dict(self._raw)
    if self._tools is not None and self._call not in self._tools:
      self._faults.append('unknown tool')
    else:
      tool = (self._tools or {}).get(self._call)
      arguments = self._decode(tool)
    if self._faults:
      self._errors += [f'call of {self._call!r}: {f}' for f in self._faults]
    else:
      self._block.append(types.ToolCall(self._call, arguments))

  def _decode(self, tool: markup.Tool | None) -> dict[str, Any]:
    """The typed arguments of the open invoke; notes what is wrong."""
    arguments = {}
    for name, raw in self._raw.items():
      kinds = frozenset(['string'])
      if tool is not None and name in tool.kinds:
        kinds = tool.kinds[name]
      elif tool is not None and tool.closed:
        self._faults.append(f'unknown parameter {name!r}')
        continue
      try:
        arguments[name] = markup.decode(raw, kinds)
      except ValueError as error:
        self._faults.append(f'parameter {name!r}: {error}')
    for name in tool.required if tool is not None else ():
      if name not in self._raw:
        self._faults.append(f'parameter {name!r} is missing')
    return arguments
