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

  def ask(self, *messages, tools=None):
    (answer,) = asyncio.run(
      self.gateway.answer('e', messages, tools, SAMPLING, unsaid=True)
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

  def test_in_a_rewritten_history_the_place_tells(self):
    self.start(*(f'R{i}\n</think>\n\nok' for i in range(2)), 'x')
    self.ask(user('long'))
    self.ask(user('long'), said(), user('next'))
    self.ask(user('cut'), said(), user('next'), said(), user('last'))
    text = TOKENIZER.decode(self.pool.completions[2].prompt_ids)
    self.assertLess(text.index('R0'), text.index('R1'))
    self.assertIn('message 0 (user) differs', self.gateway.drifts[0])

  def test_a_guess_is_not_made(self):
    self.start('R0\n</think>\n\nok', 'R1\n</think>\n\nok', 'x')
    self.ask(user('one'))
    self.ask(user('two'))
    self.ask(user('neither'), said(), user('more'))
    text = TOKENIZER.decode(self.pool.completions[2].prompt_ids)
    self.assertNotIn('R0', text)
    self.assertNotIn('R1', text)

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

  def test_long_texts_and_short_ones_are_the_same(self):
    self.start(TALK, TALK)
    with mock.patch.object(capture, 'LONG', 0):
      one = self.ask(user('hello'))
    self.start(TALK)
    np.testing.assert_array_equal(
      one.prompt_ids, self.ask(user('hello')).prompt_ids
    )
    self.assertEqual(
      self.gateway.count([user('hello')], None), len(one.prompt_ids)
    )


if __name__ == '__main__':
  absltest.main()
