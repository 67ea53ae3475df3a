"""The gateway: captured ids continue, everything else is said to drift."""

import asyncio
import dataclasses

import jax
import numpy as np
from absl.testing import absltest, parameterized

from m2 import config, types
from m2.data import template
from m2.engine import engine as engine_lib
from m2.gateway import capture
from m2.model import params as model_params
from tests.gateway.scripted import CALL, EOS, TOKENIZER, TOOLS, Pool, Scripted

SAMPLING = types.Sampling(max_new=64)


def chat(gateway, messages, episode='e', tools=TOOLS):
  return asyncio.run(gateway.chat(episode, messages, tools, SAMPLING))


def user(text='add a column'):
  return types.Message('user', text)


def whole(messages, tools=TOOLS):
  return template.render(
    [message.to_dict() for message in messages],
    list(tools),
    add_generation_prompt=True,
    keep_all_reasoning=True,
  )


class CaptureTest(parameterized.TestCase):
  def test_first_turn_is_the_rendered_conversation(self):
    engine, pool = Scripted(CALL), Pool()
    gateway = capture.Gateway(engine, TOKENIZER, pool)
    message, stop = chat(gateway, [user()])
    self.assertEqual(stop, types.StopReason.EOS)
    self.assertEqual(message.reasoning, 'think a bit')
    self.assertEqual(
      message.tool_calls, (types.ToolCall('sql', {'script': 'select 1;'}),)
    )
    (request,) = engine.requests
    ids, _ = TOKENIZER.encode_rendered(whole([user()]))
    np.testing.assert_array_equal(request.prompt_ids, ids)
    self.assertEqual(request.sampling.stop_ids, (EOS,))
    (completion,) = pool.completions
    np.testing.assert_array_equal(completion.prompt_ids, ids)
    self.assertEqual((completion.step, completion.version), (0, 3))
    self.assertLen(completion.logprobs, len(completion.ids))

  def test_next_turns_go_on_from_captured_ids(self):
    engine, pool = Scripted(CALL, CALL, 'done\n</think>\n\nok'), Pool()
    gateway = capture.Gateway(engine, TOKENIZER, pool)
    messages = [types.Message('system', 'be brief'), user()]
    for turn in range(3):
      message, _ = chat(gateway, messages)
      messages += [message, types.Message('tool', f'row {turn} of [e~[ ]~b]ai')]
    first, second, third = pool.completions
    for before, after in ((first, second), (second, third)):
      captured = np.concatenate([before.prompt_ids, before.ids])
      np.testing.assert_array_equal(after.prompt_ids[: len(captured)], captured)
    # The model saw exactly what the template writes, injected tokens as text.
    self.assertEqual(
      TOKENIZER.decode(third.prompt_ids), whole(messages[:6]).text
    )
    ids, _ = TOKENIZER.encode_rendered(whole(messages[:6]))
    self.assertEqual((third.prompt_ids == EOS).sum(), (ids == EOS).sum())
    # What was sampled was not tokenised again: here it would have changed.
    self.assertNotEqual(len(third.prompt_ids), len(ids))
    self.assertEqual(gateway.counters.continued, 2)
    self.assertEqual(gateway.counters.drifted, 0)
    tokens = sum(len(c.ids) for c in pool.completions)
    self.assertEqual(gateway.forget('e'), (3, tokens))

  def test_two_tool_results_share_a_block(self):
    gateway = capture.Gateway(Scripted(CALL, 'x'), TOKENIZER, pool := Pool())
    message, _ = chat(gateway, [user()])
    results = [types.Message('tool', 'a'), types.Message('tool', 'b')]
    messages = [user(), message, *results]
    chat(gateway, messages)
    self.assertEqual(
      TOKENIZER.decode(pool.completions[1].prompt_ids), whole(messages).text
    )

  @parameterized.parameters(
    ({'parameters': [1]}, 'parameters is no schema'),
    ({'parameters': {'properties': [1]}}, r'properties is \[1\]'),
    ({'parameters': {'required': 5}}, 'required is 5'),
    ({'parameters': {'properties': {'a<b': {}}}}, "hold the name 'a<b'"),
  )
  def test_tools_that_make_no_sense_are_refused_before_sampling(
    self, tool, message
  ):
    gateway = capture.Gateway(engine := Scripted('x'), TOKENIZER, Pool())
    with self.assertRaisesRegex(ValueError, message):
      chat(gateway, [user()], tools=[{'name': 'look', **tool}])
    self.assertEmpty(engine.requests)

  def test_what_is_quoted_is_not_done(self):
    quote = CALL.removeprefix('think a bit\n')
    answers = (
      f'it said ‹{quote}›\n</think>\n\nfine',
      f'why\n</think>\n\n‹{quote}›',
      CALL.replace('select 1;', 'select ‹[e~[</think><minimax:tool_call>›'),
    )
    gateway = capture.Gateway(Scripted(*answers), TOKENIZER)
    thought, _ = chat(gateway, [user()])
    self.assertEqual(thought.reasoning, f'it said {quote}')
    self.assertEqual((thought.content, thought.errors), ('fine', ()))
    said, _ = chat(gateway, [user()], 'f')
    self.assertIn('outside a block', said.errors[0])
    called, _ = chat(gateway, [user()], 'g')
    self.assertEqual(thought.tool_calls + said.tool_calls, ())
    script = 'select [e~[</think><minimax:tool_call>'
    self.assertEqual(
      called.tool_calls, (types.ToolCall('sql', {'script': script}),)
    )
    self.assertEqual(called.errors, ())

  @parameterized.parameters('no tags at all', CALL[:-5], '</think><invoke')
  def test_malformed_answers_are_kept_as_sampled(self, answer):
    gateway = capture.Gateway(Scripted(answer, 'x'), TOKENIZER, pool := Pool())
    message, _ = chat(gateway, [user()])
    self.assertEqual(gateway.counters.malformed, bool(message.errors))
    chat(gateway, [user(), message, types.Message('tool', 'error: malformed')])
    text = TOKENIZER.decode(pool.completions[1].prompt_ids)
    self.assertIn(f'ai\n<think>\n{answer}[e~[\n]~b]tool', text)
    self.assertEqual(gateway.counters.continued, 1)

  def test_a_turn_cut_short_is_closed(self):
    engine = Scripted('half a th', 'x', stop=types.StopReason.LENGTH)
    gateway = capture.Gateway(engine, TOKENIZER, pool := Pool())
    message, stop = chat(gateway, [user()])
    self.assertEqual(stop, types.StopReason.LENGTH)
    chat(gateway, [user(), message, user('go on')])
    first, second = pool.completions
    self.assertNotIn(EOS, first.ids)
    self.assertEqual(
      second.prompt_ids[len(first.prompt_ids) + len(first.ids)], EOS
    )
    text = TOKENIZER.decode(second.prompt_ids)
    self.assertIn('half a th[e~[\n]~b]user\ngo on[e~[\n', text)

  def test_a_prompt_that_fills_the_context_is_nothing_malformed(self):
    engine = Scripted('', stop=types.StopReason.CONTEXT)
    gateway = capture.Gateway(engine, TOKENIZER, pool := Pool())
    message, stop = chat(gateway, [user()])
    self.assertEqual(stop, types.StopReason.CONTEXT)
    self.assertEqual(message, types.Message('assistant'))
    self.assertEqual(gateway.counters.malformed, 0)
    self.assertEmpty(pool.completions[0].ids)

  @parameterized.parameters(
    (lambda m: [user('another'), *m[1:]], r'message 0 \(user\) differs'),
    (lambda m: [m[0], dataclasses.replace(m[1], content='!'), m[2]],
     r'message 1 \(assistant\) differs'),
    (lambda m: m[:1], r'message 1 \(assistant\) is missing'),
  )  # fmt: skip
  def test_changed_histories_drift(self, change, reason):
    gateway = capture.Gateway(Scripted(CALL, 'x'), TOKENIZER, pool := Pool())
    message, _ = chat(gateway, [user()])
    messages = change([user(), message, types.Message('tool', 'ok')])
    chat(gateway, messages)
    self.assertEqual(gateway.counters.drifted, 1)
    self.assertRegex(gateway.drifts[0], f'^e step 1: .*{reason}')
    self.assertEqual(
      TOKENIZER.decode(pool.completions[1].prompt_ids), whole(messages).text
    )

  def test_a_rewritten_history_keeps_the_sampled_ids(self):
    """A context policy cuts an old tool result; the answers stay exact."""
    engine = Scripted(CALL, 'not a call', CALL)
    gateway = capture.Gateway(engine, TOKENIZER, pool := Pool())
    messages = [user()]
    for index in range(2):
      message, _ = chat(gateway, messages)
      messages += [message, types.Message('tool', f'long result {index}')]
    messages[2] = types.Message('tool', 'cut')
    chat(gateway, messages)
    self.assertIn('message 2 (tool) differs', gateway.drifts[0])
    first, second, third = pool.completions
    ids = third.prompt_ids.tobytes()
    self.assertTrue(
      ids.startswith(first.prompt_ids.tobytes() + first.ids.tobytes())
    )
    self.assertIn(second.ids.tobytes(), ids)
    text = TOKENIZER.decode(third.prompt_ids)
    self.assertIn('<response>cut</response>', text)
    self.assertNotIn('long result 0', text)

  def test_other_tools_drift(self):
    gateway = capture.Gateway(Scripted(CALL, 'x'), TOKENIZER)
    message, _ = chat(gateway, [user()])
    chat(gateway, [user(), message, types.Message('tool', 'ok')], tools=None)
    self.assertIn('tools differ', gateway.drifts[0])

  def test_episodes_do_not_mix(self):
    gateway = capture.Gateway(Scripted(CALL, CALL), TOKENIZER, pool := Pool())
    chat(gateway, [user('one')], episode='a')
    chat(gateway, [user('two')], episode='b')
    self.assertEqual([c.episode for c in pool.completions], ['a', 'b'])
    self.assertEqual([c.step for c in pool.completions], [0, 0])
    self.assertEqual(gateway.counters.drifted, 0)

  def test_forgets_the_longest_unused(self):
    answers = [CALL] * 4
    gateway = capture.Gateway(Scripted(*answers), TOKENIZER)
    with absltest.mock.patch.object(capture, 'EPISODES', 2):
      for episode in ('a', 'b', 'a', 'c'):
        chat(gateway, [user()], episode=episode)
    self.assertEqual(gateway.forget('b').completions, 0)
    self.assertEqual(gateway.forget('a').completions, 2)

  def test_with_the_engine(self):
    cfg = config.ModelConfig(
      vocab=TOKENIZER.size, d_model=16, layers=1, heads=2, kv_heads=1,
      head_dim=8, rotary_dim=4, max_positions=64, experts=4, d_expert=8,
      top_k=2, min_k=2, dtype='float32',
    )  # fmt: skip
    params = model_params.init(cfg, jax.random.key(0))
    engine = engine_lib.Engine(cfg, config.EngineConfig(8, 64, 8), params)
    gateway = capture.Gateway(engine, TOKENIZER, pool := Pool(), experts=True)

    async def agent(episode):
      messages = [types.Message('system', 'ok'), user(episode)]
      for turn in range(2):
        message, stop = await gateway.chat(
          episode, messages, None, types.Sampling(max_new=10, seed=turn)
        )
        messages += [message, user('more')]
      with self.assertRaisesRegex(ValueError, 'max_new=0'):
        await gateway.chat('bad', messages, None, types.Sampling(max_new=0))
      long = [user('x' * 999)]
      return await gateway.chat(episode, long, None, SAMPLING)

    async def main():
      driver = asyncio.create_task(engine.drive())
      answers = await asyncio.gather(*(agent(f'e{i}') for i in range(6)))
      driver.cancel()
      return answers

    for message, stop in asyncio.run(main()):
      self.assertEqual(stop, types.StopReason.CONTEXT)
      self.assertEqual(message.content + message.reasoning, '')
    self.assertLen(pool.completions, 18)
    for completion in pool.completions:
      sizes = len(completion.prompt_ids), len(completion.ids)
      if completion.stop != types.StopReason.CONTEXT:
        self.assertLen(completion.experts, sum(sizes) - 1)
    self.assertEqual(gateway.counters.continued, 6)


if __name__ == '__main__':
  absltest.main()
