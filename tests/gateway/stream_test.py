"""Answers read id by id: the same message, and exact ends at stop strings."""

import random

from absl.testing import absltest, parameterized

from m2.data import template
from m2.gateway import stream
from tests.gateway import scripted
from tests.gateway.scripted import CALL, TOKENIZER, TOOLS

PIECES = (
  'ab', 'c', ' ', '\n', '\n\n', '<', '<parameter name="x', '</', 'END', 'EN',
  'é', '😀', '</think>', '‹</think>›', '<think>',
  CALL[CALL.index('<minimax') :],
)  # fmt: skip
STOPS = ('END', 'ENDEN', '\n', '<', 'b', '😀', ' a', '\n\n<')


def read(ids, stop=()):
  """The message, its shown content, ids used and the stop string."""
  one = stream.Stream(TOKENIZER, TOOLS, stop)
  events = [event for id in ids for event in one.feed(id)]
  message, rest = one.close()
  shown = ''.join(e.text for e in [*events, *rest] if e.kind == 'content')
  return message, shown, one.count, one.stopped


class StreamTest(parameterized.TestCase):
  @parameterized.parameters(
    (['\n'], 'one\ntwo', 'one', 'one\n'),
    (['<'], 'xx<parameter name="abc', 'xx', 'xx<'),
    (['tw', 'e\nt'], 'one\ntwo', 'on', 'one\nt'),
    (['END'], 'EN ENEND', 'EN EN', 'EN ENEND'),
    (['é'], 'aéb', 'a', 'aé'),
  )
  def test_ends_with_the_id_that_completes_it(self, stop, text, shown, taken):
    head = 'why END\n</think>\n\n'
    ids = scripted.encode(head + text + ' and more')
    message, streamed, count, stopped = read(ids, stop)
    self.assertEqual(message.content, shown)
    self.assertEqual(streamed, shown)
    self.assertIn(stopped, stop)
    self.assertEqual(TOKENIZER.decode(ids[:count]), head + taken)

  def test_a_call_within_the_reasoning_is_none(self):
    ids = scripted.encode('a<minimax:tool_call>b</think>\n\nhi END more')
    message, shown, _, stopped = read(ids, ['END'])
    self.assertEqual((message.content, shown, stopped), ('hi ', 'hi ', 'END'))

  def test_calls_are_no_place_for_them(self):
    ids = scripted.encode(CALL)
    message, *_, stopped = read(ids, ['select', 'think'])
    self.assertIsNone(stopped)
    self.assertLen(message.tool_calls, 1)

  def test_random_answers(self):
    rng = random.Random(0)
    stopped = 0
    for _ in range(600):
      text = ''.join(rng.choices(PIECES, k=rng.randrange(1, 12)))
      ids = scripted.encode(f'w\n</think>\n\n{text}')
      parser = template.StreamParser(TOOLS, thinking=True, spelled=False)
      for piece, special in TOKENIZER.pieces(ids):
        (parser.feed_special if special else parser.feed)(piece)
      whole = parser.close()
      message, shown, count, found = read(ids)
      self.assertEqual(
        (message, shown, count), (whole, whole.content, len(ids))
      )
      self.assertIsNone(found)
      stop = rng.sample(STOPS, k=rng.randrange(1, 4))
      message, shown, count, found = read(ids, stop)
      self.assertEqual(message.content, shown)
      if found is None:
        self.assertEqual((message, count), (whole, len(ids)))
        continue
      stopped += 1
      self.assertIn(found, stop)
      for word in stop:  # the first is the end
        self.assertNotIn(word, shown + found[:-1])
      before, now = (
        TOKENIZER.decode(ids[:size]).partition('</think>\n\n')[2]
        for size in (count - 1, count)
      )
      self.assertIn(shown + found, now)
      self.assertNotIn(shown + found, before)
    self.assertGreater(stopped, 100)


if __name__ == '__main__':
  absltest.main()
