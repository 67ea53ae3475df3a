"""Intervals and paired comparisons against known values."""

import asyncio
import dataclasses
import pathlib
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from m2 import types
from m2.envs.families import sql
from m2.eval import report, run
from tests.evolve import reports

# Simulated intervals, and the coverage that this many of 95% may show.
REPEATS = 250
COVERAGE = (0.92, 0.985)
# Clusters -> interval of a percentile bootstrap.
BOOTSTRAP = {
  15: (-0.07, 0.18181818181818182),
  40: (-0.17708333333333334, 0.0970873786407767),
}


class Player:
  """Passes every second task; one episode has no verdict."""

  async def judge(self, task, episode, seed):
    await asyncio.sleep(0)
    passed = int(task.id.rsplit('.', 1)[-1]) % 2 == 0
    infra = task.id.endswith('.3')
    outcome = types.Outcome.INFRA if infra else types.Outcome.SCORE
    full = task.id.endswith('.5')
    transcript = types.Transcript(
      (types.Message('user', 'x'),), 1, 0.1, 0, not full,
      types.StopReason.CONTEXT if full else types.StopReason.EOS,
    )  # fmt: skip
    verdict = types.Verdict(
      outcome, passed, float(passed), '' if passed else 'x'
    )
    return transcript, verdict, seed % 7


def trials_of(passed_TN: np.ndarray) -> run.EvalReport:
  """A report of T tasks with N trials each."""
  return reports.report(
    reports.row(str(task), 's', bool(ok), trial=trial)
    for (task, trial), ok in np.ndenumerate(passed_TN)
  )


class EvaluateTest(absltest.TestCase):
  def test_counts_mask_and_round_trip(self):
    tasks = [sql.generate('add_col', 0, 'dev', f'0.{i}') for i in range(10)]
    found = asyncio.run(
      run.evaluate(tasks, Player(), trials=2, seed=1, concurrency=4)
    )
    self.assertLen(found.rows, 20)
    self.assertEqual((found.successes, found.n), (10, 18))
    again = asyncio.run(
      run.evaluate(tasks, Player(), trials=2, seed=1, concurrency=1)
    )
    self.assertEqual(found, again)
    path = pathlib.Path(self.create_tempdir().full_path) / 'eval.json'
    run.save(found, path)
    self.assertEqual(run.load(path), found)
    text = report.table(found)
    self.assertIn('10 / 18', text)
    self.assertIn('2 episodes have no verdict', text)
    self.assertIn('2 episodes ran out of context (engine.length)', text)
    # Successes keep one transcript a skill, failures keep theirs.
    shown = sum(bool(r.transcript) for r in found.rows if r.passed)
    self.assertEqual(shown, 1)

  def test_a_foreign_file_is_named(self):
    path = self.create_tempfile('eval.json', '{"rows": [{"x": 1}]}').full_path
    with self.assertRaisesRegex(ValueError, 'eval.json is no evaluation'):
      run.load(path)


class IntervalTest(parameterized.TestCase):
  def test_wilson_known_values(self):
    # 8 of 10: the textbook's interval.
    low, high = run.wilson(8, 10)
    self.assertAlmostEqual(low, 0.4902, places=3)
    self.assertAlmostEqual(high, 0.9433, places=3)
    self.assertEqual(run.wilson(0, 0), (0.0, 1.0))

  @parameterized.parameters((75, 4), (40, 8), (300, 8), (10, 8))
  def test_trials_of_a_task_are_not_independent(self, tasks, trials):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(REPEATS):
      rate_T = rng.beta(0.3, 0.3, tasks)
      passed_TN = rng.random((tasks, trials)) < rate_T[:, None]
      low, high = run.interval(trials_of(passed_TN))
      covered += low <= 0.5 <= high
    self.assertBetween(covered / REPEATS, *COVERAGE)

  def test_interval_of_trials_known_values(self):
    rng = np.random.default_rng(0)
    passed_TN = rng.random((50, 4)) < 0.3
    one = trials_of(passed_TN[:, :1])
    self.assertEqual(run.interval(one), run.wilson(one.successes, 50))
    self.assertEqual(run.interval(reports.report([])), (0.0, 1.0))
    # Trials that repeat one another say no more than one of them, those of
    # equal tasks as much as other tasks would.
    z = run.student(0.95, 49)
    alike = trials_of(np.repeat(passed_TN[:, :1], 4, axis=1))
    np.testing.assert_allclose(
      run.interval(alike), run.wilson(one.successes, 50, z)
    )
    equal = trials_of(np.tile([True, False, False, False], (50, 1)))
    np.testing.assert_allclose(run.interval(equal), run.wilson(50, 200, z))
    # Nothing tells whether ten tasks that always pass are alike.
    np.testing.assert_allclose(
      run.interval(trials_of(np.ones((10, 8), bool))),
      run.wilson(10, 10, run.student(0.95, 9)),
    )
    self.assertEqual(
      run.interval(trials_of(np.array([[True, False]]))), run.wilson(0.5, 1)
    )
    # An episode without verdict counts nowhere.
    rows = [dataclasses.replace(r, judged=r.trial == 0) for r in alike.rows]
    self.assertEqual(run.interval(reports.report(rows)), run.interval(one))
    low, high = run.interval(alike)
    self.assertIn(f'[{low:.1%}, {high:.1%}]', report.table(alike))

  @parameterized.parameters(
    (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.99, 3, 5.8409),
    (0.95, 4, 2.7764), (0.9, 13, 1.7709), (0.95, 14, 2.1448),
    (0.95, 299, 1.9679),
  )  # fmt: skip
  def test_student_known_values(self, confidence, freedom, t):
    self.assertAlmostEqual(run.student(confidence, freedom), t, places=4)

  @parameterized.parameters(3, 6, 14)
  def test_few_clusters_make_no_narrow_interval(self, clusters):
    """20% of the tasks are gained and 10% lost."""
    rng = np.random.default_rng(0)
    covered = 0
    with mock.patch.object(run, 'DRAWS', 500):
      for _ in range(REPEATS):
        luck = rng.random(50)
        pair = [
          reports.report(
            reports.row(str(i), 's', bool(ok), signature=str(i % clusters))
            for i, ok in enumerate(passed)
          )
          for passed in ((luck > 0.2) & (luck < 0.5), luck < 0.4)
        ]
        low, high = run.paired(*pair).interval
        covered += low <= 0.1 <= high
    self.assertBetween(covered / REPEATS, *COVERAGE)

  def test_many_clusters_are_resampled(self):
    """The figures of the percentile bootstrap, to the bit."""
    for clusters, interval in BOOTSTRAP.items():
      rng = np.random.default_rng(clusters)
      pair = [
        reports.report(
          reports.row(str(i), 's', bool(ok), signature=str(i % clusters))
          for i, ok in enumerate(rng.random(100) < rate)
        )
        for rate in (0.4, 0.5)
      ]
      self.assertEqual(run.paired(*pair).interval, interval)

  def test_paired_difference_and_clusters(self):
    before = reports.report(
      [
        reports.row(f't{i}', 's', False, signature=f'c{i // 2}')
        for i in range(80)
      ]
    )
    after = reports.report(
      [
        reports.row(f't{i}', 's', i < 20, signature=f'c{i // 2}')
        for i in range(80)
      ]
    )
    found = run.paired(before, after)
    self.assertEqual(found.n, 80)
    self.assertAlmostEqual(found.mean, 0.25)
    self.assertLen(found.by_cluster, 40)
    # Ten of 40 clusters gain both tasks: sd = sqrt(.25 * .75 / 40) = 0.068.
    self.assertAlmostEqual(found.interval[0], 0.25 - 1.96 * 0.068, delta=0.02)
    same = run.paired(before, before)
    self.assertEqual(same.mean, 0.0)
    # None of 40 changed: up to log(40) / 40 may, either way.
    np.testing.assert_allclose(same.interval, (-0.0922, 0.0922), atol=1e-4)
    few = [reports.row(f't{i}', 's', False, signature=f'c{i}') for i in (0, 1)]
    better = [dataclasses.replace(row, passed=True) for row in few]
    for count in (1, 2):
      pair = reports.report(few[:count]), reports.report(better[:count])
      found = run.paired(*pair)
      self.assertEqual((found.mean, found.interval), (1.0, (-1.0, 1.0)))
    apart = run.paired(before, reports.report([reports.row('z', 's', True)]))
    self.assertEqual((apart.n, apart.interval), (0, (-1.0, 1.0)))


if __name__ == '__main__':
  absltest.main()
