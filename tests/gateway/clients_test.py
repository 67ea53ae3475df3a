"""The HTTP gateway through the official SDKs: what users' agents see."""

import json

import numpy as np
import openai
import pydantic
from absl.testing import absltest, parameterized

from m2 import types
from m2.gateway import keys
from tests.gateway import scripted
from tests.gateway.scripted import ASK, CALL, SECRET, TALK, claude, sdk

TOOL = scripted.TOOLS[0]


def merged(chunks):
  """The message of a stream's chunks, as the API documents it."""
  found = {'content': '', 'reasoning_content': '', 'tool_calls': {}}
  for chunk in chunks:
    for choice in chunk.choices:
      delta = choice.delta.model_dump(exclude_none=True)
      for name in ('content', 'reasoning_content'):
        found[name] += delta.get(name, '')
      for call in delta.get('tool_calls', ()):
        found['tool_calls'][call['index']] = call
      found['finish'] = choice.finish_reason or found.get('finish')
  return found


class OpenaiTest(parameterized.TestCase):
  def test_a_conversation_goes_on_from_what_was_sampled(self):
    engine = scripted.Scripted(CALL, 'ok\n</think>\n\ndone')
    with scripted.served(engine, secret=SECRET) as (url, gateway, pool):
      client = sdk(url, keys.key(SECRET, 'g7/0'))
      messages = [{'role': 'user', 'content': 'add a column'}]
      first = client.chat.completions.create(
        model='m2', messages=messages, tools=[TOOL]
      )
      message = first.choices[0].message
      self.assertEqual(first.choices[0].finish_reason, 'tool_calls')
      self.assertEqual(message.reasoning_content, 'think a bit')
      (call,) = message.tool_calls
      self.assertEqual(
        (call.function.name, json.loads(call.function.arguments)),
        ('sql', {'script': 'select 1;'}),
      )
      # As clients do, without the reasoning.
      said = {'role': 'assistant', 'content': None, 'tool_calls': [call]}
      result = {'role': 'tool', 'tool_call_id': call.id, 'content': '1'}
      second = client.chat.completions.create(
        model='m2', messages=[*messages, said, result], tools=[TOOL]
      )
    self.assertEqual(second.choices[0].message.content, 'done')
    self.assertEqual(second.choices[0].finish_reason, 'stop')
    one, two = pool.completions
    self.assertEqual((one.episode, two.episode), ('g7/0', 'g7/0'))
    before = np.concatenate([one.prompt_ids, one.ids])
    np.testing.assert_array_equal(two.prompt_ids[: len(before)], before)
    self.assertEqual(gateway.counters.continued, 1)
    self.assertEqual(first.usage.prompt_tokens, len(one.prompt_ids))
    self.assertEqual(first.usage.completion_tokens, len(one.ids))

  def test_a_changed_answer_is_a_branch(self):
    engine = scripted.Scripted(TALK, TALK)
    with scripted.served(engine, secret=SECRET) as (url, gateway, pool):
      client = sdk(url, keys.key(SECRET, 'e'))
      for content in ('now then END of it', 'something else'):
        said = {'role': 'assistant', 'content': content}
        more = {'role': 'user', 'content': 'more'}
        rest = [said, more] if pool.completions else []
        client.chat.completions.create(
          model='m2', messages=[*ASK['messages'], *rest]
        )
    self.assertEqual(gateway.counters.drifted, 1)
    self.assertIn('message 1 (assistant) differs', gateway.drifts[0])

  @parameterized.parameters(CALL, TALK, 'cut short', 'a\n</think>\n\nü€😀')
  def test_a_stream_says_what_the_whole_does(self, answer):
    engine = scripted.Scripted(answer, answer)
    with scripted.served(engine) as (url, *_):
      ask = dict(ASK, tools=[TOOL])
      whole = sdk(url).chat.completions.create(**ask).choices[0]
      *chunks, last = sdk(url).chat.completions.create(
        **ask, stream=True, stream_options={'include_usage': True}
      )
    found = merged(chunks)
    self.assertEqual(found['content'], whole.message.content or '')
    reasoning = getattr(whole.message, 'reasoning_content', '')
    self.assertEqual(found['reasoning_content'], reasoning)
    self.assertEqual(found['finish'], whole.finish_reason)
    calls = whole.message.tool_calls or []
    self.assertEqual(
      [call['function'] for call in found['tool_calls'].values()],
      [call.function.model_dump() for call in calls],
    )
    self.assertEqual(last.choices, [])
    self.assertGreater(last.usage.completion_tokens, 0)
    self.assertGreater(len(chunks), 2)

  @parameterized.parameters(False, True)
  def test_stop_strings_end_an_answer_and_its_sampling(self, stream):
    engine = scripted.Scripted('END\n</think>\n\nnow then END of it' * 9)
    with scripted.served(engine, secret=SECRET) as (url, _, pool):
      client = sdk(url, keys.key(SECRET, 'e'))
      found = client.chat.completions.create(
        **ASK, stop=['never', 'END'], stream=stream
      )
      if stream:
        text = merged(found)['content']
      else:
        text = found.choices[0].message.content
    self.assertEqual(text, 'now then ')
    (completion,) = pool.completions
    self.assertEqual(completion.stop, types.StopReason.STRING)
    said = scripted.TOKENIZER.decode(completion.ids)
    self.assertEqual(said, 'END\n</think>\n\nnow then END')
    self.assertLen(completion.logprobs, len(completion.ids))
    self.assertLen(engine.cancelled, 1)

  @parameterized.parameters(False, True)
  def test_several_answers_with_ids_and_logprobs(self, stream):
    answers = [f'a\n</think>\n\nanswer {i}' for i in range(3)]
    engine = scripted.Scripted(*answers)
    with scripted.served(engine) as (url, *_):
      found = sdk(url).chat.completions.create(
        **ASK, n=3, seed=5, logprobs=True, stream=stream,
        extra_body={'return_token_ids': True},
      )  # fmt: skip
      ids, texts, logprobs = [], [], []
      if stream:
        chunks = list(found)
        for index in range(3):
          mine = [c for x in chunks for c in x.choices if c.index == index]
          ids.append([i for c in mine for i in getattr(c, 'token_ids', [])])
          texts.append(''.join(c.delta.content or '' for c in mine))
          logprobs.append(
            [z.logprob for c in mine if c.logprobs for z in c.logprobs.content]
          )
      else:
        for choice in found.choices:
          ids.append(choice.token_ids)
          texts.append(choice.message.content)
          logprobs.append([z.logprob for z in choice.logprobs.content])
          self.assertEqual(choice.weight_version, 3)
      got = chunks[0] if stream else found
      self.assertEqual(
        got.prompt_token_ids, engine.requests[0].prompt_ids.tolist()
      )
    self.assertCountEqual(texts, [f'answer {i}' for i in range(3)])
    for text, mine, values in zip(texts, ids, logprobs):
      self.assertEqual(mine, scripted.encode(f'a\n</think>\n\n{text}'))
      self.assertLen(values, len(mine))
    seeds = [request.sampling.seed for request in engine.requests]
    self.assertLen({*seeds}, 3)
    self.assertIn(5, seeds)

  def test_results_are_told_apart_by_their_calls(self):
    two = CALL.replace(
      '</minimax:tool_call>',
      '<invoke name="sql">\n<parameter name="script">two</parameter>\n'
      '</invoke>\n</minimax:tool_call>',
    )
    engine = scripted.Scripted(two, TALK)
    with scripted.served(engine) as (url, *_):
      client = sdk(url)
      message = client.chat.completions.create(**ASK, tools=[TOOL])
      message = message.choices[0].message
      results = [
        {'role': 'tool', 'tool_call_id': call.id, 'content': name}
        for call, name in zip(message.tool_calls, ('of one', 'of two'))
      ]
      client.chat.completions.create(
        model='m2',
        messages=[*ASK['messages'], message, *reversed(results)],
        tools=[TOOL],
      )
    text = scripted.TOKENIZER.decode(engine.requests[1].prompt_ids)
    self.assertLess(text.index('of one'), text.index('of two'))

  def test_the_sdk_may_parse(self):
    class Sql(pydantic.BaseModel):
      script: str

    tool = openai.pydantic_function_tool(Sql, name='sql')
    engine = scripted.Scripted(CALL, TALK)
    with scripted.served(engine) as (url, *_):
      client = sdk(url)
      first = client.chat.completions.parse(**ASK, tools=[tool])
      message = first.choices[0].message
      (call,) = message.tool_calls
      self.assertEqual(call.function.parsed_arguments, Sql(script='select 1;'))
      result = {'role': 'tool', 'tool_call_id': call.id, 'content': '1'}
      client.chat.completions.parse(
        model='m2', messages=[*ASK['messages'], message, result], tools=[tool]
      )
    self.assertLen(engine.requests, 2)

  def test_sampling_is_passed_on(self):
    engine = scripted.Scripted(TALK)
    with scripted.served(engine) as (url, *_):
      sdk(url).chat.completions.create(
        **ASK, temperature=0.5, top_p=0.9, seed=7, max_completion_tokens=99,
        extra_body={'top_k': 4},
      )  # fmt: skip
    got = engine.requests[0].sampling
    self.assertEqual(
      (got.temperature, got.top_p, got.top_k, got.seed, got.max_new),
      (0.5, 0.9, 4, 7, 99),
    )

  def test_a_length_that_ends(self):
    with scripted.served(scripted.Scripted(TALK, obey=True)) as (url, *_):
      found = sdk(url).chat.completions.create(**ASK, max_tokens=5)
    self.assertEqual(found.choices[0].finish_reason, 'length')
    self.assertEqual(found.usage.completion_tokens, 5)


class AnthropicTest(parameterized.TestCase):
  TOOL = {'name': 'sql', 'input_schema': TOOL['function']['parameters']}

  @parameterized.parameters(False, True)
  def test_a_conversation_goes_on_from_what_was_sampled(self, stream):
    engine = scripted.Scripted(CALL, 'ok\n</think>\n\ndone')
    with scripted.served(engine, secret=SECRET) as (url, gateway, pool):
      client = claude(url, keys.key(SECRET, 'e'))
      messages = [{'role': 'user', 'content': 'add a column'}]

      def ask(messages):
        wanted = {
          'model': 'm2', 'max_tokens': 999, 'system': 'be brief',
          'messages': messages, 'tools': [self.TOOL],
        }  # fmt: skip
        if not stream:
          return client.messages.create(**wanted)
        with client.messages.stream(**wanted) as events:
          return events.get_final_message()

      first = ask(messages)
      self.assertEqual(first.stop_reason, 'tool_use')
      thinking, call = first.content
      self.assertEqual(thinking.thinking, 'think a bit')
      self.assertEqual(
        (call.name, call.input), ('sql', {'script': 'select 1;'})
      )
      result = {'type': 'tool_result', 'tool_use_id': call.id, 'content': '1'}
      messages += [
        {'role': 'assistant', 'content': first.content},
        {'role': 'user', 'content': [result]},
      ]
      second = ask(messages)
      counted = client.messages.count_tokens(
        model='m2', system='be brief', messages=messages[:1], tools=[self.TOOL]
      )
    self.assertEqual(second.content[-1].text, 'done')
    self.assertEqual(second.stop_reason, 'end_turn')
    one, two = pool.completions
    before = np.concatenate([one.prompt_ids, one.ids])
    np.testing.assert_array_equal(two.prompt_ids[: len(before)], before)
    self.assertEqual(gateway.counters.continued, 1)
    self.assertEqual(first.usage.input_tokens, len(one.prompt_ids))
    self.assertEqual(first.usage.output_tokens, len(one.ids))
    self.assertEqual(counted.input_tokens, len(one.prompt_ids))

  def test_both_apis_show_the_model_the_same(self):
    engine = scripted.Scripted(TALK, TALK)
    with scripted.served(engine) as (url, *_):
      claude(url).messages.create(
        model='m2', max_tokens=9, system=[{'type': 'text', 'text': 'be brief'}],
        messages=[{'role': 'user', 'content': [
          {'type': 'text', 'text': 'hello',
           'cache_control': {'type': 'ephemeral'}}]}],
        tools=[self.TOOL],
      )  # fmt: skip
      system = {'role': 'system', 'content': 'be brief'}
      sdk(url).chat.completions.create(
        model='m2', messages=[system, *ASK['messages']], tools=[TOOL]
      )
    one, two = engine.requests
    np.testing.assert_array_equal(one.prompt_ids, two.prompt_ids)

  def test_stop_sequences(self):
    with scripted.served(scripted.Scripted(TALK)) as (url, *_):
      found = claude(url).messages.create(
        **ASK, max_tokens=999, stop_sequences=['END']
      )
    self.assertEqual(found.stop_reason, 'stop_sequence')
    self.assertEqual(found.stop_sequence, 'END')
    self.assertEqual(found.content[-1].text, 'now then ')


if __name__ == '__main__':
  absltest.main()
