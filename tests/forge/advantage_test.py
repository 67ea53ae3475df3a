"""Returns, baselines, and who enters them."""

import numpy as np
from absl.testing import absltest, parameterized

from m2 import types
from m2.forge import advantage


def episode(id, steps, outcome=types.Outcome.SCORE):
  reward = types.Reward(id, outcome, tuple(steps), passed=sum(steps) > 0)
  return types.Episode(id, 'g', 't', 's', (), reward)


class AdvantageTest(parameterized.TestCase):
  @parameterized.parameters(
    (1.0, [3.5, 3.0, 2.0]), (0.5, [1.5, 2.0, 2.0]), (0.0, [0.5, 1.0, 2.0])
  )
  def test_returns_to_go(self, gamma, want):
    got = advantage.returns_to_go([0.5, 1.0, 2.0], gamma)
    np.testing.assert_allclose(got, want)

  def test_leave_one_out_is_rloo(self):
    returns = np.arange(1.0, 7.0).reshape(2, 3)
    for group in returns:
      base = advantage.baselines(group, 'leave_one_out')
      np.testing.assert_allclose(group - base, [-1.5, 0, 1.5])

  def test_group_mean(self):
    base = advantage.baselines(np.array([1.0, 0, 0, 1]), 'group')
    np.testing.assert_allclose(base, 0.5)

  def test_steps_share_the_baseline_of_their_episode(self):
    got = advantage.group(
      [episode('a', [0.0, 1.0]), episode('b', [-0.5, 0.0])],
      gamma=1.0,
      baseline='group',
    )
    np.testing.assert_allclose(got['a'], [0.75, 0.75])
    np.testing.assert_allclose(got['b'], [-0.75, -0.25])

  @parameterized.parameters('infra', 'timeout', 'tamper')
  def test_only_scores_count(self, name):
    failed = episode('c', [-9.0], types.Outcome(name))
    got = advantage.group(
      [episode('a', [1.0]), failed, episode('b', [0.0])],
      gamma=1.0,
      baseline='leave_one_out',
    )
    self.assertEqual(set(got), {'a', 'b'})
    np.testing.assert_allclose([got['a'][0], got['b'][0]], [1, -1])

  @parameterized.parameters(
    ([0.0, float('nan')],), ([float('-inf')],), ([1e308, 1e308],)
  )
  def test_rewards_that_are_no_numbers_are_named(self, steps):
    with self.assertRaisesRegex(ValueError, 'episode b of task t: rewards .*'):
      advantage.group(
        [episode('a', [1.0]), episode('b', steps)], gamma=1.0, baseline='group'
      )

  def test_one_score_has_nothing_to_compare_with(self):
    failed = episode('b', [0.0], types.Outcome.INFRA)
    got = advantage.group(
      [episode('a', [1.0]), failed], gamma=1.0, baseline='group'
    )
    self.assertEqual(got, {})
    with self.assertRaisesRegex(ValueError, '1 scored episodes'):
      advantage.baselines(np.ones(1), 'group')
    with self.assertRaisesRegex(ValueError, "kind='median'"):
      advantage.baselines(np.ones(2), 'median')


if __name__ == '__main__':
  absltest.main()
