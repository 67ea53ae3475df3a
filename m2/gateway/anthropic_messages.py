"""Anthropic's Messages, as far as the engine serves it.

The model always reasons before it answers: answers begin with a `thinking`
block, whose signature is empty. Blocks come back as they were given out, or
without the thinking. An answer that was malformed says so in `errors`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2 import types
from m2.data import template
from m2.data import tokenizer as tokenizers
from m2.gateway import ask as asks
from m2.gateway import capture
from m2.gateway import stream as streams

_REASONS = {
  types.StopReason.EOS: 'end_turn',
  types.StopReason.STRING: 'stop_sequence',
  types.StopReason.LENGTH: 'max_tokens',
  types.StopReason.CANCELLED: 'end_turn',
}
_MARKS = 'cache_control', 'citations'  # of blocks: prefixes are always cached
_KINDS = {  # of a streamed event: its block, and what that is while empty
  'reasoning': ('thinking', {'thinking': '', 'signature': ''}),
  'content': ('text', {'text': ''}),
}


def read(tree: Any, length: int) -> tuple[str, asks.Ask]:
  """A request's model and what it asks for.

  Args:
    tree: the JSON of its body.
    length: tokens that an answer may have at the most.

  Raises:
    asks.Refusal: it makes no sense, or wants what is not served.
  """
  fields = asks.Fields(tree)
  most = asks.whole(fields, 'max_tokens', ..., 1, 2**31 - 1)
  model, messages, tools = _conversation(fields)
  found = asks.Ask(
    messages=messages,
    tools=tools,
    sampling=asks.sampling(fields, min(most, length), asks.seed()),
    stop=asks.strings(fields, 'stop_sequences'),
    stream=fields.take('stream', bool, False),
    usage=True,
  )
  fields.ignore('metadata', 'service_tier', 'cache_control')
  fields.close()
  return model, found


def read_count(tree: Any) -> tuple[str, asks.Ask]:
  """A request to count the tokens of a prompt.

  Args:
    tree: the JSON of its body.

  Raises:
    asks.Refusal: it makes no sense, or wants what is not served.
  """
  fields = asks.Fields(tree)
  model, messages, tools = _conversation(fields)
  fields.ignore('cache_control')
  fields.close()
  return model, asks.Ask(messages, tools, types.Sampling(max_new=1))


def _conversation(fields: asks.Fields) -> tuple[str, tuple, tuple]:
  """Model, messages and tools, which both kinds of requests have."""
  model = fields.take('model', str, ...)
  found = []
  system = fields.take('system', (str, list), None)
  if system is not None:
    text = asks.text(system, 'system', _MARKS)
    found.append(types.Message('system', text))
  trees = fields.take('messages', list, ...)
  if not trees:
    raise asks.Refusal('is empty', 'messages')
  calls: list[str] = []
  for index, tree in enumerate(trees):
    path = f'messages[{index}]'
    message = asks.Fields(tree, path)
    role = message.take('role', str, ...)
    content = message.take('content', (str, list), ...)
    message.close()
    if isinstance(content, str):
      content = [{'type': 'text', 'text': content}]
    blocks = [
      asks.Fields(block, f'{path}.content[{place}]')
      for place, block in enumerate(content)
    ]
    if role == 'assistant':
      calls, said = _assistant(blocks)
      found.append(said)
    elif role == 'user':
      found += _user(blocks, calls)
      calls = []
    else:
      raise asks.Refusal(f'{role!r} is neither user nor assistant', path)
  if found[-1].role == 'assistant':
    raise asks.Refusal(
      "the last message is the assistant's: answers are not continued",
      'messages',
    )
  _thinks(fields)
  return model, tuple(found), _tools(fields)


def _thinks(fields: asks.Fields) -> None:
  """Refuses to answer without reasoning."""
  tree = fields.take('thinking', dict, {'type': 'enabled'})
  thinking = asks.Fields(tree, 'thinking')
  kind = thinking.take('type', str, ...)
  if kind not in ('enabled', 'adaptive'):
    raise asks.Refusal(
      f'{kind!r} is not served here: the model always reasons', 'thinking.type'
    )
  thinking.ignore('budget_tokens', 'display')
  thinking.close()


def _assistant(blocks: Sequence[asks.Fields]) -> tuple[list, types.Message]:
  """An assistant's turn and the ids of its calls."""
  text, thinking, ids, calls = [], [], [], []
  for block in blocks:
    kind = block.take('type', str, ...)
    if kind == 'text':
      text.append(block.take('text', str, ...))
    elif kind == 'thinking':
      thinking.append(block.take('thinking', str, ...))
      block.ignore('signature')
    elif kind == 'tool_use':
      ids.append(block.take('id', str, ...))
      name = block.take('name', str, ...)
      calls.append(types.ToolCall(name, block.take('input', dict, ...)))
      block.ignore('caller')
    else:
      raise asks.Refusal(f'{kind!r} is not served here', block.path('type'))
    block.ignore(*_MARKS)
    block.close()
  message = types.Message(
    'assistant', ''.join(text), ''.join(thinking), tuple(calls)
  )
  return ids, message


def _user(
  blocks: Sequence[asks.Fields], calls: Sequence[str]
) -> list[types.Message]:
  """A user's turn: results of tools first, then what is said."""
  text, results = [], []
  for block in blocks:
    kind = block.take('type', str, ...)
    if kind == 'text':
      text.append(block.take('text', str, ...))
    elif kind == 'tool_result':
      id = block.take('tool_use_id', str, ...)
      content = block.take('content', (str, list), None)
      said = asks.text(content, block.path('content'), _MARKS)
      if block.take('is_error', bool, False):
        said = f'error: {said}'
      results.append(
        (block.path('tool_use_id'), id, types.Message('tool', said))
      )
    else:
      raise asks.Refusal(
        f'{kind!r} is not served here: the model reads text alone',
        block.path('type'),
      )
    block.ignore(*_MARKS)
    block.close()
  found = asks.in_order(results, calls)
  if text or not found:
    found.append(types.Message('user', ''.join(text)))
  return found


def _tools(fields: asks.Fields) -> tuple[Mapping[str, Any], ...]:
  """Tools in OpenAI's form, as the model's format has them."""
  found = []
  for index, tree in enumerate(fields.take('tools', list, [])):
    tool = asks.Fields(tree, f'tools[{index}]')
    tool.only('type', 'custom')
    function = {'name': tool.take('name', str, ...)}
    if description := tool.take('description', str, ''):
      function['description'] = description
    function['parameters'] = tool.take('input_schema', dict, ...)
    tool.ignore(*_MARKS)
    tool.close()
    found.append({'type': 'function', 'function': function})
  choice = asks.Fields(
    fields.take('tool_choice', dict, {'type': 'auto'}), 'tool_choice'
  )
  kind = choice.take('type', str, ...)
  if kind != 'auto' and (kind != 'none' or found):
    raise asks.Refusal(
      f'{kind!r} is not served here, only auto, and none without tools',
      'tool_choice.type',
    )
  choice.only('disable_parallel_tool_use', False)
  choice.close()
  return tuple(found)


def whole(
  asked: asks.Ask,
  answers: Sequence[capture.Answer],
  head: Mapping[str, Any],
  words: tokenizers.Tokenizer,
) -> dict[str, Any]:
  """The response of a request without `stream`; see `openai_chat.whole`."""
  del asked, words
  (answer,) = answers
  message, content = answer.message, []
  if message.reasoning:
    content.append(
      {'type': 'thinking', 'thinking': message.reasoning, 'signature': ''}
    )
  if message.content:
    content.append({'type': 'text', 'text': message.content})
  content += [
    {
      'type': 'tool_use',
      'id': call_id(head['id'], place),
      'name': call.name,
      'input': dict(call.arguments),
    }
    for place, call in enumerate(message.tool_calls)
  ]
  errors = {'errors': list(message.errors)} if message.errors else {}
  return _message(head) | {
    **errors,
    'content': content,
    'stop_reason': _reason(answer),
    'stop_sequence': answer.stopped,
    'usage': {
      'input_tokens': len(answer.prompt_ids),
      'output_tokens': len(answer.ids),
    },
  }


class Writer:
  """The events of a request with `stream`, as lines of server-sent events."""

  def __init__(
    self,
    asked: asks.Ask,
    head: Mapping[str, Any],
    words: tokenizers.Tokenizer,
  ):
    """Starts a response; see `openai_chat.whole`."""
    del asked, words
    self._head = head
    self._begun = False
    self._blocks = 0  # begun so far
    self._open = ''  # kind of the block that is open
    self._calls = 0

  def part(self, index: int, part: streams.Part) -> Iterator[str]:
    """What one part of the answer becomes."""
    del index  # there is one answer
    if not self._begun:
      self._begun = True
      usage = {'input_tokens': len(part.prompt_ids), 'output_tokens': 0}
      message = _message(self._head) | {'content': [], 'usage': usage}
      yield _line('message_start', message=message)
    for event in part.events:
      yield from self._event(event)

  def end(self, answers: Sequence[capture.Answer]) -> Iterator[str]:
    """What follows the last part."""
    (answer,) = answers
    yield from self._close()
    yield _line(
      'message_delta',
      delta={
        'stop_reason': _reason(answer),
        'stop_sequence': answer.stopped,
        **(
          {'errors': list(errors)} if (errors := answer.message.errors) else {}
        ),
      },
      usage={'output_tokens': len(answer.ids)},
    )
    yield _line('message_stop')

  def fail(self, message: str, kind: str) -> Iterator[str]:
    """What ends a response that broke off."""
    yield _line('error', error=error(message, kind, '')['error'])

  def _event(self, event: template.Event) -> Iterator[str]:
    if event.call is not None:
      yield from self._close()
      id = call_id(self._head['id'], self._calls)
      self._calls += 1
      yield from self._start(
        'tool_use', {'id': id, 'name': event.call.name, 'input': {}}
      )
      yield self._delta(
        'input_json_delta',
        {'partial_json': json.dumps(dict(event.call.arguments))},
      )
      yield from self._close()
      return
    kind, empty = _KINDS[event.kind]
    if self._open != kind:
      yield from self._close()
      yield from self._start(kind, empty)
    yield self._delta(f'{kind}_delta', {kind: event.text})

  def _start(self, kind: str, fields: Mapping[str, Any]) -> Iterator[str]:
    self._open = kind
    self._blocks += 1
    yield _line(
      'content_block_start',
      index=self._blocks - 1,
      content_block={'type': kind, **fields},
    )

  def _delta(self, kind: str, fields: Mapping[str, Any]) -> str:
    return _line(
      'content_block_delta',
      index=self._blocks - 1,
      delta={'type': kind, **fields},
    )

  def _close(self) -> Iterator[str]:
    if self._open:
      self._open = ''
      yield _line('content_block_stop', index=self._blocks - 1)


def error(message: str, kind: str, field: str) -> dict[str, Any]:
  """An error in the form of this API."""
  del field  # the message names it
  return {'type': 'error', 'error': {'type': kind, 'message': message}}


def call_id(request: str, place: int) -> str:
  """The id of a call: the same in a stream and in a whole response."""
  return f'toolu_{request.rpartition("_")[2]}_{place}'


def _message(head: Mapping[str, Any]) -> dict[str, Any]:
  return {
    'id': head['id'],
    'type': 'message',
    'role': 'assistant',
    'model': head['model'],
    'stop_reason': None,
    'stop_sequence': None,
  }


def _reason(answer: capture.Answer) -> str:
  if answer.message.tool_calls and answer.stop == types.StopReason.EOS:
    return 'tool_use'
  return _REASONS[answer.stop]


def _line(kind: str, **fields: Any) -> str:
  return f'event: {kind}\ndata: {json.dumps({"type": kind, **fields})}\n\n'
