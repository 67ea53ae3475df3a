"""Windowed FIFO: the report's figure 5, its bounds, failures and state."""

import json
import random

from absl.testing import absltest, parameterized

from m2.forge import window


def simulate(slots, width, batch, seed, count=400):
  """Random finishing order; yields (index, slip, lag) of every taken group."""
  draw = random.Random(seed)
  fifo = window.WindowedFifo(width)
  submitted_at, taken, running = {}, [], []

  def refill():
    while fifo.occupied < slots:
      index = fifo.submit(str(fifo.next_index))
      submitted_at[index] = len(taken)
      running.append(str(index))

  refill()
  while len(taken) < count:
    batch_ids = []
    while len(batch_ids) < batch:
      if running and draw.random() < 0.7:
        # Long rollouts: finish an old one seldom, a young one often.
        at = draw.choice([0, draw.randrange(len(running)), -1])
        fifo.done(running.pop(at))
      for id in fifo.take(batch - len(batch_ids)):
        index = int(id)
        slip = sum(other > index for other in taken)
        yield index, slip, len(taken) - submitted_at[index]
        taken.append(index)
        batch_ids.append(id)
    fifo.free()
    refill()


class WindowTest(parameterized.TestCase):
  def test_figure_5_of_the_report(self):
    fifo = window.WindowedFifo(4)
    for index in range(8):
      fifo.submit(str(index))
    taken = []
    while True:
      for id, _ in fifo.unfinished():
        if id != '7':
          fifo.done(id)
      fresh = fifo.take(1)
      if not fresh:
        break
      taken += fresh
      fifo.free()
      fifo.submit(str(fifo.next_index))
    # All up to 10 but the slow 7 are used; 11 and later are done yet hidden.
    self.assertEqual(taken, [str(i) for i in range(11) if i != 7])
    self.assertEqual(fifo.head, 7)
    self.assertEqual([id for id, _ in fifo.unfinished()], ['7'])
    fifo.done('7')
    self.assertEqual(fifo.take(3), ['7', '11', '12'])
    # 7 was submitted before anything was taken: lag 10 = N + W - 2, slip 3.
    self.assertLen([i for i in taken if int(i) > 7], 3)
    self.assertLen(taken, 10)

  @parameterized.parameters(
    (8, 4, 1), (8, 1, 2), (8, 8, 4), (32, 10, 16), (5, 3, 5), (6, 64, 3)
  )
  def test_slip_and_lag_are_bounded(self, slots, width, batch):
    worst_slip = worst_lag = 0
    for seed in range(20):
      for _, slip, lag in simulate(slots, width, batch, seed):
        worst_slip = max(worst_slip, slip)
        worst_lag = max(worst_lag, lag)
    self.assertLessEqual(worst_slip, width - 1)
    self.assertLessEqual(worst_lag, slots + width - 2)
    if batch == 1:  # slots freed at once: the bound is attained
      self.assertEqual(worst_lag, slots + width - 2)

  def test_every_group_is_taken_once(self):
    taken = [index for index, _, _ in simulate(16, 5, 4, seed=3)]
    self.assertLen(set(taken), len(taken))
    self.assertEqual(set(range(max(taken) - 4 - 16)) - set(taken), set())

  def test_failed_head_does_not_block(self):
    fifo = window.WindowedFifo(1)
    for id in 'abc':
      fifo.submit(id)
    fifo.done('b')
    self.assertEqual(fifo.take(1), [])
    fifo.drop('a')
    self.assertEqual(fifo.take(2), ['b'])
    self.assertEqual(fifo.occupied, 2)  # b until freed, and c
    fifo.free()
    self.assertEqual(fifo.occupied, 1)

  def test_state_round_trip_continues_alike(self):
    fifo = window.WindowedFifo(3)
    for id in 'abcdef':
      fifo.submit(id)
    for id in 'bcf':
      fifo.done(id)
    fifo.take(1)
    other = window.WindowedFifo(3)
    other.restore(json.loads(json.dumps(fifo.state())))
    for queue in (fifo, other):
      queue.done('a')
    self.assertEqual(fifo.take(9), other.take(9))
    self.assertEqual(fifo.state(), other.state())
    self.assertEqual(fifo.submit('g'), other.submit('g'))

  def test_misuse_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'window=0'):
      window.WindowedFifo(0)
    for width in (1.5, float('nan'), '2'):
      with self.assertRaisesRegex(ValueError, 'must be a whole number'):
        window.WindowedFifo(width)
    fifo = window.WindowedFifo(2)
    fifo.submit('a')
    with self.assertRaisesRegex(ValueError, "'a' is already"):
      fifo.submit('a')
    with self.assertRaisesRegex(KeyError, "'b' is not"):
      fifo.done('b')
    with self.assertRaisesRegex(ValueError, 'done but not queued'):
      fifo.restore({'head': 0, 'next_index': 1, 'queued': [], 'done': ['x']})

  @parameterized.parameters(
    ({'head': 3}, 'head=3 is not the oldest queued index'),
    ({'head': 1.0}, "'float' object cannot be"),
    ({'queued': []}, 'head=2 is not .* next_index=6'),
    ({'queued': [], 'done': [], 'head': -1, 'next_index': -1}, 'head=-1'),
    ({'queued': [['a', 2], ['b', 2]]}, 'do not rise'),
    ({'queued': [['b', 5], ['a', 2]]}, 'do not rise'),
    ({'queued': [['a', 2], ['a', 5]]}, 'queued twice'),
    ({'queued': [['a', 2], ['b', 5, 6]]}, 'too many values'),
    ({'next_index': 5}, 'index 5 is not below next_index=5'),
    ({'done': ['x']}, "done but not queued: .'x'"),
    ({'done': None}, "'NoneType' object is not iterable"),
  )
  def test_states_that_cannot_be(self, change, message):
    good = {
      'head': 2, 'next_index': 6, 'queued': [['a', 2], ['b', 5]], 'done': [],
    }  # fmt: skip
    fifo = window.WindowedFifo(2)
    fifo.restore(good)
    with self.assertRaisesRegex(ValueError, message):
      fifo.restore(good | change)
    self.assertEqual(fifo.state(), good)
    for name in good:
      with self.assertRaisesRegex(ValueError, f"KeyError.'{name}'"):
        fifo.restore({key: good[key] for key in good if key != name})


if __name__ == '__main__':
  absltest.main()
