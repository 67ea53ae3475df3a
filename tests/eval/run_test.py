"""Intervals and paired comparisons against known values."""

import asyncio
import dataclasses
import pathlib

import numpy as np
from absl.testing import absltest

from m2 import types
from m2.envs.families import sql
from m2.eval import report, run
from tests.evolve import reports


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


class IntervalTest(absltest.TestCase):
  def test_wilson_known_values(self):
    # 8 of 10: the textbook's interval.
    low, high = run.wilson(8, 10)
    self.assertAlmostEqual(low, 0.4902, places=3)
    self.assertAlmostEqual(high, 0.9433, places=3)
    self.assertEqual(run.wilson(0, 0), (0.0, 1.0))

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
