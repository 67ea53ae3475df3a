"""OpenAI's Chat Completions, as far as the engine serves it.

Beside the API: `reasoning_content` of messages, `top_k`, and with
`return_token_ids` the `prompt_token_ids`, each choice's `token_ids` and the
`weight_version` that sampled it. An answer that was malformed says so in its
message's `errors`.
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

_FINISH = {
  types.StopReason.EOS: 'stop',
  types.StopReason.STRING: 'stop',
  types.StopReason.LENGTH: 'length',
  types.StopReason.CANCELLED: 'stop',
}
# Of a request; they say who asks, or what is so anyway.
_IGNORED = (
  'metadata', 'prompt_cache_key', 'safety_identifier', 'service_tier', 'store',
  'user',
)  # fmt: skip


def read(tree: Any, length: int) -> tuple[str, asks.Ask]:
  """A request's model and what it asks for.

  Args:
    tree: the JSON of its body.
    length: tokens that an answer may have at the most.

  Raises:
    asks.Refusal: it makes no sense, or wants what is not served.
  """
  fields = asks.Fields(tree)
  model = fields.take('model', str, ...)
  messages = _messages(fields.take('messages', list, ...))
  tools = _tools(fields)
  limits = [
    asks.whole(fields, name, length, 1, 2**31 - 1)
    for name in ('max_completion_tokens', 'max_tokens')
  ]
  seed = asks.whole(fields, 'seed', asks.seed(), -(2**63), 2**63 - 1) % 2**63
  options = asks.Fields(
    fields.take('stream_options', dict, {}), 'stream_options'
  )
  found = asks.Ask(
    messages=messages,
    tools=tools,
    sampling=asks.sampling(fields, min(limits), seed),
    count=asks.whole(fields, 'n', 1, 1, asks.MOST),
    stop=asks.strings(fields, 'stop'),
    stream=fields.take('stream', bool, False),
    usage=options.take('include_usage', bool, False),
    logprobs=fields.take('logprobs', bool, False),
    ids=fields.take('return_token_ids', bool, False),
  )
  options.only('include_obfuscation', False)
  options.close()
  for name, served in (
    ('top_logprobs', 0),
    ('frequency_penalty', 0),
    ('presence_penalty', 0),
    ('logit_bias', {}),
    ('parallel_tool_calls', True),
    ('response_format', {'type': 'text'}),
    ('modalities', ['text']),
  ):
    fields.only(name, served)
  fields.ignore(*_IGNORED)
  fields.close()
  return model, found


def _messages(trees: Sequence[Any]) -> tuple[types.Message, ...]:
  if not trees:
    raise asks.Refusal('is empty', 'messages')
  found: list[types.Message] = []
  calls: list[str] = []  # ids of the last assistant's calls
  results: list[tuple[str, str, types.Message]] = []
  for index, tree in enumerate(trees):
    path = f'messages[{index}]'
    fields = asks.Fields(tree, path)
    role = fields.take('role', str, ...)
    content = fields.take('content', (str, list), None)
    said = asks.text(content, f'{path}.content', ('annotations',))
    if role == 'tool':
      id = fields.take('tool_call_id', str, ...)
      results.append((path, id, types.Message('tool', said)))
      found_calls = calls
    else:
      found_calls, message = _message(fields, role, said, index)
      found += asks.in_order(results, calls)
      results = []
      found.append(message)
    fields.ignore('annotations', 'parsed')  # the SDK's own
    fields.close()
    calls = found_calls
  found += asks.in_order(results, calls)
  return tuple(found)


def _message(
  fields: asks.Fields, role: str, said: str, index: int
) -> tuple[list[str], types.Message]:
  """A message that is no tool's, and the ids of its calls."""
  if role == 'developer':
    role = 'system'
  if role not in ('system', 'user', 'assistant'):
    raise asks.Refusal(
      f'{role!r} is none of system, developer, user, assistant, tool',
      fields.path('role'),
    )
  if role == 'system' and index:
    raise asks.Refusal(
      'the model has room for one system message, the first',
      fields.path('role'),
    )
  if role != 'assistant':
    return [], types.Message(role, said)
  # Some clients return it under the other name.
  reasoning = fields.take('reasoning_content', str, '')
  reasoning = fields.take('reasoning', str, '') or reasoning
  fields.ignore('errors')
  ids, calls = [], []
  for place, tree in enumerate(fields.take('tool_calls', list, [])):
    path = f'{fields.path("tool_calls")}[{place}]'
    call = asks.Fields(tree, path)
    call.only('type', 'function')
    ids.append(call.take('id', str, ...))
    called = asks.Fields(call.take('function', dict, ...), f'{path}.function')
    called.ignore('parsed_arguments')
    name = called.take('name', str, ...)
    arguments = asks.load(
      called.take('arguments', str, '') or '{}', called.path('arguments')
    )
    if not isinstance(arguments, dict):
      raise asks.Refusal('expected the JSON of an object', f'{path}.arguments')
    calls.append(types.ToolCall(name, arguments))
    call.ignore('index')
    for left in (called, call):
      left.close()
  return ids, types.Message('assistant', said, reasoning, tuple(calls))


def _tools(fields: asks.Fields) -> tuple[Mapping[str, Any], ...]:
  tools = tuple(fields.take('tools', list, []))
  chosen = fields.take('tool_choice', (str, dict), 'auto')
  if chosen != 'auto' and (chosen != 'none' or tools):
    raise asks.Refusal(
      f'{chosen!r:.100} is not served here, only auto, and none without tools',
      'tool_choice',
    )
  return tools


def whole(
  asked: asks.Ask,
  answers: Sequence[capture.Answer],
  head: Mapping[str, Any],
  words: tokenizers.Tokenizer,
) -> dict[str, Any]:
  """The response of a request without `stream`.

  Args:
    asked: the request.
    answers: what came of it.
    head: id, time and model.
    words: the model's tokenizer.
  """
  choices = []
  for index, answer in enumerate(answers):
    message = answer.message
    said: dict[str, Any] = {'role': 'assistant', 'content': message.content}
    if message.reasoning:
      said['reasoning_content'] = message.reasoning
    if message.tool_calls:
      said['content'] = message.content or None
      said['tool_calls'] = [
        _call(call, call_id(head['id'], index, place))
        for place, call in enumerate(message.tool_calls)
      ]
    if message.errors:
      said['errors'] = list(message.errors)
    choice = {
      'index': index,
      'message': said,
      'finish_reason': _finish(answer),
      'logprobs': None,
    }
    if asked.logprobs:
      choice['logprobs'] = _logprobs(answer.ids, answer.logprobs, words)
    if asked.ids:
      choice['token_ids'] = answer.ids.tolist()
      choice['weight_version'] = answer.version
    choices.append(choice)
  found = {'object': 'chat.completion', **head, 'choices': choices}
  if asked.ids:
    found['prompt_token_ids'] = answers[0].prompt_ids.tolist()
  return found | {'usage': _usage(answers)}


class Writer:
  """The events of a request with `stream`, as lines of server-sent events."""

  def __init__(
    self,
    asked: asks.Ask,
    head: Mapping[str, Any],
    words: tokenizers.Tokenizer,
  ):
    """Starts a response; see `whole`."""
    self._asked, self._head, self._words = asked, head, words
    self._begun: set[int] = set()
    self._calls: dict[int, int] = {}  # of each answer, so far

  def part(self, index: int, part: streams.Part) -> Iterator[str]:
    """What one part of an answer becomes."""
    deltas = [self._delta(index, event) for event in part.events]
    extra: dict[str, Any] = {}
    head: dict[str, Any] = {}
    if index not in self._begun:
      if self._asked.ids and not self._begun:
        head['prompt_token_ids'] = part.prompt_ids.tolist()
      self._begun.add(index)
      deltas.insert(0, {'role': 'assistant', 'content': ''})
    if self._asked.logprobs and len(part.ids):
      extra['logprobs'] = _logprobs(part.ids, part.logprobs, self._words)
    if self._asked.ids and len(part.ids):
      extra['token_ids'] = part.ids.tolist()
    if extra and not deltas:  # nothing to show of them yet
      deltas.append({})
    for delta in deltas:
      yield self._chunk(
        [{'index': index, 'delta': delta, 'finish_reason': None, **extra}],
        **head,
      )
      extra, head = {}, {}

  def end(self, answers: Sequence[capture.Answer]) -> Iterator[str]:
    """What follows the last part."""
    for index, answer in enumerate(answers):
      choice: dict[str, Any] = {
        'index': index,
        'delta': {},
        'finish_reason': _finish(answer),
      }
      if answer.message.errors:
        choice['delta'] = {'errors': list(answer.message.errors)}
      if self._asked.ids:
        choice['weight_version'] = answer.version
      yield self._chunk([choice])
    if self._asked.usage:
      yield self._chunk([], usage=_usage(answers))
    yield 'data: [DONE]\n\n'

  def fail(self, message: str, kind: str) -> Iterator[str]:
    """What ends a response that broke off."""
    yield _line({'error': error(message, kind, '')['error']})

  def _delta(self, index: int, event: template.Event) -> dict[str, Any]:
    if event.call is None:
      name = {'reasoning': 'reasoning_content'}.get(event.kind, event.kind)
      return {name: event.text}
    place = self._calls.get(index, 0)
    self._calls[index] = place + 1
    call = _call(event.call, call_id(self._head['id'], index, place))
    return {'tool_calls': [{'index': place, **call}]}

  def _chunk(self, choices: list, **more: Any) -> str:
    return _line(
      {
        'object': 'chat.completion.chunk',
        **self._head,
        'choices': choices,
        **more,
      }
    )


def error(message: str, kind: str, field: str) -> dict[str, Any]:
  """An error in the form of this API."""
  return {
    'error': {
      'message': message,
      'type': kind,
      'param': field or None,
      'code': None,
    }
  }


def call_id(request: str, index: int, place: int) -> str:
  """The id of a call: the same in a stream and in a whole response."""
  return f'call_{request.rpartition("-")[2]}_{index}_{place}'


def _call(call: types.ToolCall, id: str) -> dict[str, Any]:
  arguments = json.dumps(dict(call.arguments))
  function = {'name': call.name, 'arguments': arguments}
  return {'id': id, 'type': 'function', 'function': function}


def _finish(answer: capture.Answer) -> str:
  if answer.message.tool_calls and answer.stop == types.StopReason.EOS:
    return 'tool_calls'
  return _FINISH[answer.stop]


def _usage(answers: Sequence[capture.Answer]) -> dict[str, int]:
  prompt = len(answers[0].prompt_ids)
  sampled = sum(len(answer.ids) for answer in answers)
  return {
    'prompt_tokens': prompt,
    'completion_tokens': sampled,
    'total_tokens': prompt + sampled,
  }


def _logprobs(ids, logprobs, words: tokenizers.Tokenizer) -> dict[str, Any]:
  content = []
  for id, logprob in zip(ids.tolist(), logprobs.tolist()):
    text = words.decode([id])
    whole = '\ufffd' not in text  # else a part of a character
    content.append(
      {
        'token': text,
        'logprob': logprob,
        'bytes': list(text.encode()) if whole else None,
        'top_logprobs': [],
      }
    )
  return {'content': content, 'refusal': None}


def _line(tree: Mapping[str, Any]) -> str:
  return f'data: {json.dumps(tree)}\n\n'
