"""Which answer has come back: told by ids before it, words, or its place."""

import asyncio
from unittest import mock

import numpy as np
from absl.testing import absltest

from m2 import types
from m2.gateway import capture
from tests.gateway.scripted import CALL, TALK, TOKENIZER, Pool, Scripted

SAMPLING = types.Sampling(max_new=99)


def user(text='a'):
  return types.Message('user', text)


def said(text='ok', reasoning=''):
  return types.Message('assistant', text, reasoning)


class HistoryTest(absltest.TestCase):
  def start(self, *answers, **options):
    self.engine, self.pool = Scripted(*answers, **options), Pool()
    self.gateway = capture.Gateway(self.engine, TOKENIZER, self.pool)

  def ask(self, *messages, tools=None, **options):
    (answer,) = asyncio.run(
      self.gateway.answer(
        'e', messages, tools, SAMPLING, unsaid=True, **options
      )
    )
    return answer

  def follows(self, completion, before):
    ids = np.concatenate([before.prompt_ids, before.ids])
    np.testing.assert_array_equal(completion.prompt_ids[: len(ids)], ids)

  def test_an_example_of_the_same_words_is_no_answer(self):
    self.start('R1\n</think>\n\nok', 'R2\n</think>\n\nok')
    shown = user('example'), said(), user('real')
    self.ask(*shown)
    self.ask(*shown, said(), user('more'))
    self.follows(self.pool.completions[1], self.pool.completions[0])
    self.assertEqual(self.gateway.counters.continued, 1)
    text = TOKENIZER.decode(self.pool.completions[1].prompt_ids)
    self.assertEqual(text.count('R1'), 1)

  def test_branches_of_the_same_words_keep_their_reasoning(self):
    self.start(*(f'R{i}\n</think>\n\nok' for i in range(4)))
    self.ask(user('main'))
    self.ask(user('sub'))
    self.ask(user('sub'), said(), user('more'))
    self.ask(user('main'), said(), user('more'))
    main, sub, of_sub, of_main = self.pool.completions
    self.follows(of_sub, sub)
    self.follows(of_main, main)
    self.assertEqual(self.gateway.counters.continued, 2)
    self.assertEqual(self.gateway.counters.drifted, 1)  # `sub` is a branch

  def test_what_was_read_once_is_read_like_that_again(self):
    self.start('R1\n</think>\n\nfine', 'R2\n</think>\n\nok', *[TALK] * 4)
    both = user('task'), said('one')
    shown = *both, user('b'), said(), user('real')
    first = self.ask(*shown)
    self.ask(*both, user('c'))  # another branch says what the example does
    again = self.ask(*shown, said('fine'), user('more'))
    self.follows(again, first)

  def test_an_example_like_an_answer_without_reasoning(self):
    self.start('</think>\n\nok', TALK)
    shown = user('example'), said(), user('real')
    first = self.ask(*shown)
    self.follows(self.ask(*shown, said(), user('more')), first)
    self.assertEqual(self.gateway.counters.continued, 1)

  def test_other_conversations_are_no_place_to_look(self):
    self.start('SECRET\n</think>\n\nok', TALK)
    self.ask(user('question'))
    answer = self.ask(user('example'), said(), user('real'))
    self.assertNotIn('SECRET', TOKENIZER.decode(answer.prompt_ids))

  def test_many_examples_are_rendered_once(self):
    self.start('R\n</think>\n\nyes', *[TALK] * 2)
    self.ask(user('q'))
    many = [m for i in range(300) for m in (user(f'item {i}'), said('yes'))]
    calls = []
    render = self.gateway._render
    with mock.patch.object(
      self.gateway,
      '_render',
      lambda *a, **k: calls.append(a) or render(*a, **k),
    ):
      self.ask(*many, user('last'))
    self.assertLess(len(calls), 5)

  def test_in_a_rewritten_history_the_place_tells(self):
    self.start(*(f'R{i}\n</think>\n\nok' for i in range(2)), 'x')
    self.ask(user('task'))
    self.ask(user('task'), said(), user('long'))
    self.ask(user('task'), said(), user('cut'), said(), user('last'))
    text = TOKENIZER.decode(self.pool.completions[2].prompt_ids)
    self.assertLess(text.index('R0'), text.index('R1'))
    self.assertIn('message 2 (user) differs', self.gateway.drifts[0])

  def test_a_guess_is_not_made(self):
    self.start('R0\n</think>\n\nok', 'R1\n</think>\n\nok', 'x')
    self.ask(user('one'))
    self.ask(user('two'))
    self.ask(user('neither'), said(), user('more'))
    text = TOKENIZER.decode(self.pool.completions[2].prompt_ids)
    self.assertNotIn('R0', text)
    self.assertNotIn('R1', text)

  def test_one_point_zero_is_one(self):
    call = '{"t": 1.0, "u": [2.5, 3.0]}'
    answer = CALL.replace('select 1;', call)
    number = {'type': 'object', 'properties': {'script': {'type': 'object'}}}
    tools = [{'type': 'function',
              'function': {'name': 'sql', 'parameters': number}}]  # fmt: skip
    self.start(answer, TALK)
    (sampled,) = self.ask(user(), tools=tools).message.tool_calls
    self.assertEqual(sampled.arguments, {'script': {'t': 1, 'u': [2.5, 3]}})
    call = types.ToolCall('sql', {'script': {'t': 1, 'u': [2.5, 3]}})
    back = types.Message('assistant', tool_calls=(call,))
    self.ask(user(), back, types.Message('tool', 'ok'), tools=tools)
    self.assertEqual(self.gateway.counters.continued, 1)

  def test_true_is_not_one(self):
    answer = CALL.replace('select 1;', '1')
    number = {'type': 'object', 'properties': {'script': {'type': 'integer'}}}
    tools = [{'type': 'function',
              'function': {'name': 'sql', 'parameters': number}}]  # fmt: skip
    for value, continued in ((1, 1), (True, 0)):
      self.start(answer, 'x')
      self.ask(user(), tools=tools)
      call = types.ToolCall('sql', {'script': value})
      back = types.Message('assistant', tool_calls=(call,))
      self.ask(user(), back, types.Message('tool', 'ok'), tools=tools)
      self.assertEqual(self.gateway.counters.continued, continued)

  def test_the_message_that_differs_is_named(self):
    self.start(TALK, TALK)
    self.ask(user())
    known = said('now then END of it')
    self.ask(user('b'), known, user('c'))
    self.assertIn('message 0 (user) differs', self.gateway.drifts[0])

  def test_requests_that_overlap(self):
    self.start(*[TALK] * 5, pause=0.01)

    async def main():
      def one(*messages):
        return self.gateway.answer('e', messages, None, SAMPLING, unsaid=True)

      await asyncio.gather(one(user('a')), one(user('b')))
      self.assertEqual(self.gateway.counters.drifted, 0)  # both are the first
      known = said('now then END of it')
      await asyncio.gather(
        one(user('a'), known, user('c')), one(user('a'), known, user('d'))
      )

    asyncio.run(main())
    self.assertEqual(self.gateway.counters.continued, 2)
    self.assertEqual(self.gateway.counters.drifted, 0)
    self.assertEqual([c.step for c in self.pool.completions], [0, 1, 2, 3])

  def test_what_had_no_room_was_not_said(self):
    self.start(TALK, TALK, room=60)
    self.ask(user('long ' * 99))
    answer = self.ask(user('x'), said(''), user('y'))
    text = TOKENIZER.decode(answer.prompt_ids)
    self.assertNotIn('<think>\n[e~[', text)
    self.assertEqual(self.gateway.counters.drifted, 0)

  def test_a_pool_that_fails_once_fails_once(self):
    self.start(TALK, TALK)
    with mock.patch.object(self.pool, 'put', side_effect=OSError('full')):
      with self.assertRaisesRegex(OSError, 'full'):
        self.ask(user())
    self.ask(user())
    self.assertEqual([c.step for c in self.pool.completions], [1])

  def test_a_pool_that_fails_in_the_middle_keeps_the_rest(self):
    self.start(*[TALK] * 3)
    put, steps = self.pool.put, []

    def failing(completion):
      steps.append(completion.step)
      if len(steps) == 2:
        raise OSError('full')
      put(completion)

    self.pool.put = failing
    with self.assertRaisesRegex(OSError, 'full'):
      self.ask(user(), count=3)
    self.assertEqual([c.step for c in self.pool.completions], [0, 2])

  def test_long_texts_and_short_ones_are_the_same(self):
    self.start(TALK, TALK)
    one = self.ask(user('hello'), aside=True)
    two = self.ask(user('hello'))
    np.testing.assert_array_equal(one.prompt_ids, two.prompt_ids)
    self.assertEqual(
      self.gateway.count([user('hello')], None), len(one.prompt_ids)
    )


if __name__ == '__main__':
  absltest.main()
