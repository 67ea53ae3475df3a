r"""M2's chat template: conversations to text, and what of it to train on.

`render` writes, byte for byte, what the published template writes. It also says

* which special tokens the template itself wrote (`marks`). The same characters
  inside a message are only characters: `Tokenizer.encode_rendered` turns marks
  into special ids and everything else into plain ones, so that no user text or
  tool output can close a message or open a role.
* which characters the model itself must produce (`spans`): of every assistant
  turn, all after what the generation prompt gives, through `[e~[`. Reasoning
  starts after `<think>\n`, because the generation prompt ends with it.

The template writes a turn without reasoning without `<think>` too. No sampling
from the generation prompt reaches such a turn; its span starts right after
`]~b]ai\n`, so it trains answering directly. Demonstrations for an agent should
therefore carry reasoning, and `keep_all_reasoning` keeps it on every turn (the
published template drops it before the last user message).

Null content counts as absent, as the public servers pass it on.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2.data import markup, parser

CALLS, EOS, THINK_END = markup.CALLS, markup.EOS, markup.THINK_END
parse = parser.parse
Event = parser.Event
StreamParser = parser.StreamParser
read_tools = markup.read_tools

DEFAULT_SYSTEM = 'You are a helpful assistant.'
_ROLES = ('system', 'user', 'assistant', 'tool')

_TOOLS_HEAD = (
  '\n\n# Tools\n'
  'You may call one or more tools to assist with the user query.\n'
  'Here are the tools available in JSONSchema format:\n\n<tools>\n'
)
_TOOLS_FOOT = (
  '</tools>\n\n'
  'When making tool calls, use XML format to invoke tools and pass parameters:'
  '\n\n'
)
_TOOLS_EXAMPLE = (
  '\n<invoke name="tool-name-1">\n'
  '<parameter name="param-key-1">param-value-1</parameter>\n'
  '<parameter name="param-key-2">param-value-2</parameter>\n'
  '...\n</invoke>\n'
)


@dataclasses.dataclass(frozen=True)
class Piece:
  """A run of rendered text that is tokenised by itself.

  Attributes:
    text: its characters.
    special: it is one special token of the template.
    trained: the model itself produces it.
  """

  text: str
  special: bool
  trained: bool


@dataclasses.dataclass(frozen=True)
class Rendered:
  """A conversation as text.

  Attributes:
    text: what the published template writes.
    spans: [start, end) characters that the model itself must produce.
    marks: [start, end) characters of each special token the template wrote.
    muted: those of `spans` that carry no loss: turns of `weight` 0.
  """

  text: str
  spans: tuple[tuple[int, int], ...]
  marks: tuple[tuple[int, int], ...]
  muted: tuple[tuple[int, int], ...] = ()

  def pieces(self) -> Iterator[Piece]:
    """Cuts the text at marks and at the ends of spans, in order.

    A span starts a piece because sampling starts there: no token may reach
    from the prompt into what the model produced.
    """
    marks, muted = dict(self.marks), set(self.muted)
    edges = {0, len(self.text)}
    edges.update(edge for pair in (*self.spans, *self.marks) for edge in pair)
    edges = sorted(edges)
    spans = iter((*self.spans, (len(self.text), len(self.text))))
    span = next(spans)
    for start, end in zip(edges, edges[1:]):
      while span[1] <= start:
        span = next(spans)
      trained = start >= span[0] and span not in muted
      yield Piece(self.text[start:end], start in marks, trained)


class _Writer:
  """Collects text with its marks and spans."""

  def __init__(self):
    self._parts: list[str] = []
    self._marks: list[tuple[int, int]] = []
    self._spans: list[tuple[int, int]] = []
    self._muted: list[tuple[int, int]] = []
    self._length = 0
    self._opened = 0

  def text(self, *parts: str) -> None:
    self._parts += parts
    self._length += sum(map(len, parts))

  def special(self, token: str) -> None:
    self._marks.append((self._length, self._length + len(token)))
    self.text(token)

  def open_span(self) -> None:
    self._opened = self._length

  def close_span(self, muted: bool) -> None:
    self._spans.append((self._opened, self._length))
    self._muted += self._spans[-1:] if muted else []

  def rendered(self) -> Rendered:
    return Rendered(
      ''.join(self._parts),
      tuple(self._spans),
      tuple(self._marks),
      tuple(self._muted),
    )


def render(
  messages: Sequence[Mapping[str, Any]],
  tools: Sequence[Mapping[str, Any]] | None = None,
  *,
  add_generation_prompt: bool = False,
  keep_all_reasoning: bool = False,
) -> Rendered:
  """Renders a conversation as the published chat template does.

  Like that template, it takes a system message only in the first place, shows
  only the text parts of list contents, and splits the reasoning off the text
  at `</think>` where a turn has no `reasoning_content`.

  Args:
    messages: OpenAI-style dictionaries: role; content (text, parts or null);
      reasoning_content and tool_calls of an assistant, and its weight, 0 for
      a turn that is shown but not to be learned; current_date and
      current_location of the system message. Arguments of a call are a
      mapping or its JSON.
    tools: OpenAI-style tool dictionaries, wrapped in `function` or not.
    add_generation_prompt: end with the prompt of the next assistant turn.
    keep_all_reasoning: also render reasoning before the last user message.

  Raises:
    ValueError: a message is malformed, or a tool result answers no call; names
      the message and what is wrong with it.
  """
  out = _Writer()
  roles = [_role(index, message) for index, message in enumerate(messages)]
  skip = 1 if roles[:1] == ['system'] else 0
  _system(out, messages[0] if skip else {}, tools)
  asked = max((i for i, role in enumerate(roles) if role == 'user'), default=-1)
  called = False
  for index in range(skip, len(messages)):
    message, role = messages[index], roles[index]
    try:
      if role == 'assistant':
        _assistant(out, message, keep_all_reasoning or index > asked)
        called = bool(message.get('tool_calls'))
      elif role == 'tool':
        _require(called, 'a tool result without a call before it')
        _tool(
          out,
          message.get('content'),
          first=index == skip or roles[index - 1] != 'tool',
          last=roles[index + 1 : index + 2] != ['tool'],
        )
      elif role == 'user':
        _open(out, 'user\n')
        out.text(_visible(message.get('content')))
        _close(out)
    except ValueError as error:
      raise ValueError(f'messages[{index}] ({role}): {error}') from None
  if add_generation_prompt:
    _open(out, 'ai\n')
    out.special(markup.THINK)
    out.text('\n')
  return out.rendered()


def _role(index: int, message: Any) -> str:
  _require(
    isinstance(message, Mapping),
    f'messages[{index}]={message!r:.200}: expected a mapping',
  )
  role = message.get('role')
  _require(
    role in _ROLES,
    f'messages[{index}]: role {role!r}; choose one of {", ".join(_ROLES)}',
  )
  return role


def _open(out: _Writer, role: str) -> None:
  out.special(markup.ROLE)
  out.text(role)


def _close(out: _Writer) -> None:
  out.special(markup.EOS)
  out.text('\n')


def _system(
  out: _Writer,
  message: Mapping[str, Any],
  tools: Sequence[Mapping[str, Any]] | None,
) -> None:
  out.special(markup.BOS)
  _open(out, 'system\n')
  content = message.get('content')
  out.text(_visible(content) if content else DEFAULT_SYSTEM)
  for key, label in (
    ('current_date', 'Current date'),
    ('current_location', 'Current location'),
  ):
    if value := message.get(key):
      _require(isinstance(value, str), f'{key}={value!r}: expected text')
      out.text(f'\n{label}: {value}')
  if tools:
    out.text(_TOOLS_HEAD)
    for tool in tools:
      out.text(f'<tool>{markup.to_json(markup.function(tool))}</tool>\n')
    out.text(_TOOLS_FOOT)
    out.special(markup.CALLS)
    out.text(_TOOLS_EXAMPLE)
    out.special(markup.CALLS_END)
  _close(out)


def _assistant(out: _Writer, message: Mapping[str, Any], shown: bool) -> None:
  """Writes one turn; `shown` is whether its reasoning is rendered."""
  content = _visible(message.get('content'))
  reasoning = message.get('reasoning_content')
  if not isinstance(reasoning, str):
    reasoning = ''
    if markup.THINK_END in content:
      head, *_, content = content.split(markup.THINK_END)
      reasoning = head.strip('\n').split(markup.THINK)[-1].strip('\n')
      content = content.strip('\n')
  _open(out, 'ai\n')
  if reasoning and shown:
    out.special(markup.THINK)
    out.text('\n')
    out.open_span()
    out.text(reasoning, '\n')
    out.special(markup.THINK_END)
    out.text('\n\n')
  else:
    out.open_span()
  out.text(content)
  if calls := message.get('tool_calls'):
    _calls(out, calls)
  out.special(markup.EOS)
  weight = message.get('weight')
  weight = 1 if weight is None else weight
  _require(weight in (0, 1), f'weight={weight!r}: expected 0 or 1')
  out.close_span(muted=not weight)
  out.text('\n')


def _calls(out: _Writer, calls: Sequence[Mapping[str, Any]]) -> None:
  _require(
    isinstance(calls, list | tuple),
    f'tool_calls={calls!r:.100}: expected a list',
  )
  out.text('\n')
  out.special(markup.CALLS)
  out.text('\n')
  for call in calls:
    called = markup.function(call)
    out.text(f'<invoke name="{called["name"]}">\n')
    for name, value in _arguments(called).items():
      out.text(
        f'<parameter name="{name}">',
        markup.encode(value),
        f'{markup.PARAMETER_END}\n',
      )
    out.text(f'{markup.INVOKE_END}\n')
  out.special(markup.CALLS_END)


def _arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
  arguments = call.get('arguments')
  if isinstance(arguments, str) and arguments:
    try:
      arguments = json.loads(arguments)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'arguments of {call["name"]!r}: {error}') from None
  arguments = arguments or {}
  _require(
    isinstance(arguments, Mapping)
    and all(isinstance(k, str) for k in arguments),
    f'arguments of {call["name"]!r} are {arguments!r:.200}: expected a mapping '
    'or its JSON',
  )
  return arguments


def _tool(out: _Writer, content: Any, *, first: bool, last: bool) -> None:
  """Writes one tool message; neighbours share one block."""
  if first:
    _open(out, 'tool')
  if isinstance(content, str):
    out.text('\n<response>', content, '</response>')
  elif content is not None:
    for part in _parts(content):
      text = part
      if isinstance(part, Mapping):
        text = part.get('output', part)
        if text is part and part.get('type') == 'text':
          text = part.get('text', part)
      out.text('\n<response>', str(text), '\n</response>')
  if last:
    _close(out)


def _visible(content: Any) -> str:
  """The text of a message's content; other kinds of parts are not shown."""
  if content is None or isinstance(content, str):
    return content or ''
  texts = []
  for part in _parts(content):
    if isinstance(part, str):
      texts.append(part)
    elif isinstance(part, Mapping) and part.get('type') == 'text':
      texts.append(str(part.get('text', '')))
  return ''.join(texts)


def _parts(content: Any) -> Sequence[Any]:
  _require(
    isinstance(content, Sequence) and not isinstance(content, bytes),
    f'content is {content!r:.200}: expected text, a list of parts or null',
  )
  return content


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)
