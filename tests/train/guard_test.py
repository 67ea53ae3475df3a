"""What counts as a spike, and how often a run goes back."""

import json

import numpy as np
from absl.testing import absltest, parameterized

from m2 import config
from m2.train import guard


def make(kept=None, **changes) -> guard.Guard:
  return guard.Guard(config.GuardConfig(**changes), kept)


def noisy(count: int, seed: int = 0) -> list[float]:
  """Losses that fall and scatter, as in a sound run."""
  scatter = np.random.default_rng(seed).normal(0, 0.05, count)
  return list(3 - np.arange(count) / count + scatter)


class SpikeTest(parameterized.TestCase):
  @parameterized.parameters(range(10))
  def test_a_sound_run_has_none(self, seed):
    judge = make(spike=10.0, window=50)
    found = [judge.spike(loss) for loss in noisy(300, seed)]
    self.assertEqual(set(found), {None})

  @parameterized.parameters(9, 40, 299)
  def test_one_is_found_and_does_not_count(self, at):
    judge = make(spike=10.0, window=50)
    losses = noisy(300)
    for loss in losses[:at]:
      judge.spike(loss)
    before = judge.state()
    said = judge.spike(losses[at] + 4)
    if at < 10:
      self.assertIsNone(said)  # too few to compare with
    else:
      self.assertRegex(said, r'loss \S+ is \S+ deviations above')
      self.assertEqual(judge.state(), before)
    self.assertIsNone(judge.spike(losses[at]))

  def test_falling_is_no_spike(self):
    judge = make(spike=5.0)
    for loss in noisy(100):
      judge.spike(loss)
    self.assertIsNone(judge.spike(0.1))

  def test_equal_losses_have_a_deviation_too(self):
    judge = make(spike=5.0)
    for _ in range(20):
      judge.spike(2.0)
    self.assertIsNone(judge.spike(2.05))
    self.assertIsNotNone(judge.spike(2.5))

  def test_off_by_default(self):
    judge = make()
    for loss in (*noisy(100), 1e9):
      self.assertIsNone(judge.spike(loss))

  def test_a_resumed_guard_judges_alike(self):
    judge = make(spike=4.0, window=30)
    for loss in noisy(60):
      judge.spike(loss)
    again = make(json.loads(json.dumps(judge.state())), spike=4.0, window=30)
    for loss in (*noisy(20, 1), 2.3, 2.4, 2.5, 2.6, 2.8, 3.0):
      self.assertEqual(judge.spike(loss), again.spike(loss))


class RewindTest(absltest.TestCase):
  ERROR = RuntimeError('step 7 is bad')

  def test_stops_by_default(self):
    with self.assertRaisesRegex(RuntimeError, 'step 7'):
      make().rewind(self.ERROR, [4])

  def test_needs_a_checkpoint(self):
    with self.assertRaisesRegex(RuntimeError, 'step 7') as caught:
      make(policy='rewind').rewind(RuntimeError('step 7'), [])
    self.assertIn('no checkpoint yet', caught.exception.__notes__[0])

  def test_goes_back_so_often_to_each_checkpoint(self):
    judge = make(policy='rewind', rewinds=2)
    for steps in ([2, 4], [2, 4], [4, 8], [4, 8]):
      self.assertEqual(judge.rewind(self.ERROR, steps), steps[-1])
    with self.assertRaises(RuntimeError) as caught:
      judge.rewind(RuntimeError('again'), [4, 8])
    self.assertIn('step 8 2 times', caught.exception.__notes__[0])

  def test_counts_are_kept(self):
    judge = make(policy='rewind')
    judge.resume({'losses': [1.0], 'rewinds': 0, 'skipped': 0}, 5)
    judge.resume({'losses': [1.0], 'rewinds': 0, 'skipped': 0}, 2)
    self.assertEqual(
      judge.state(), {'losses': [1.0], 'rewinds': 2, 'skipped': 7}
    )


if __name__ == '__main__':
  absltest.main()
