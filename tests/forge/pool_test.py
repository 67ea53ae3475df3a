"""The data pool: exact, append-only, idempotent, quick."""

import dataclasses
import re
import sqlite3
import time

import numpy as np
from absl.testing import absltest

from m2 import types
from m2.forge import pool
from tests import clock

# Two cores and a quiet disk reach well over ten times this.
PER_SECOND = 2000


def completion(episode='e', step=0, seed=0, experts=False):
  draw = np.random.default_rng((seed, step))
  ids = draw.integers(0, 9999, 30).astype(np.int32)
  return types.Completion(
    episode=episode,
    step=step,
    prompt_ids=ids[:20],
    ids=ids[20:],
    logprobs=-draw.random(10).astype(np.float32),
    version=3,
    stop=types.StopReason.EOS,
    seconds=0.25,
    experts=draw.integers(0, 8, (29, 2, 2)).astype(np.int32)
    if experts
    else None,
  )


def reward(episode='e', steps=(0.0, 1.0)):
  return types.Reward(
    episode,
    types.Outcome.SCORE,
    steps,
    passed=True,
    parts={'perf': 1.0},
    evidence="3 rows equal; it's fine",
  )


class PoolTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = self.create_tempdir().full_path + '/a?b%20c.db'
    self.pool = pool.DataPool(pool.file_url(self.path))
    self.addCleanup(lambda: self.pool.dispose())

  def reopen(self):
    self.pool.dispose()
    self.pool = pool.DataPool(pool.file_url(self.path))

  def limit(self, pages):
    """How large the file may become; SQLite calls it a full disk."""
    with self.pool._transaction() as connection:
      connection.exec_driver_sql(f'PRAGMA max_page_count={pages}')

  def test_reads_back_exactly_what_was_put(self):
    put = [completion(step=1), completion(step=0, experts=True)]
    for one in put:
      self.pool.put(one)
    self.pool.put_reward(reward())
    self.pool.close('e', group='g', task='sql/7', skill='add_col')
    self.reopen()
    (episode,) = self.pool.read(['e'])
    self.assertEqual(
      (episode.id, episode.group, episode.task, episode.skill),
      ('e', 'g', 'sql/7', 'add_col'),
    )
    self.assertEqual(episode.reward, reward())
    for got, want in zip(episode.completions, reversed(put)):
      self.assertEqual(got.step, want.step)
      self.assertEqual(got.stop, want.stop)
      self.assertEqual((got.version, got.seconds), (3, 0.25))
      for name in ('prompt_ids', 'ids', 'logprobs'):
        value = getattr(got, name)
        np.testing.assert_array_equal(value, getattr(want, name))
        self.assertEqual(value.dtype, getattr(want, name).dtype)
    np.testing.assert_array_equal(
      episode.completions[0].experts, put[1].experts
    )
    self.assertIsNone(episode.completions[1].experts)

  def test_equal_repeats_are_ignored_and_others_refused(self):
    for _ in range(2):  # pending, then stored
      self.pool.put(completion())
      self.pool.put(completion())
      self.pool.flush()
    self.assertEqual(self.pool.state()['completions'], 1)
    self.pool.put(completion(seed=1))
    with self.assertRaisesRegex(ValueError, 'append-only'):
      self.pool.flush()

  def test_numbers_of_any_kind_are_stored_as_numbers(self):
    plain = dataclasses.replace(completion(step=1), seconds=2.0, version=3)
    kinds = dataclasses.replace(
      plain, step=np.int64(1), seconds=2, version=np.int32(3)
    )
    paid = dataclasses.replace(
      reward(), steps=(np.float32(0.5), 1), passed=1, parts={'perf': 1}
    )
    for one in (kinds, plain, kinds):
      self.pool.put(completion())
      self.pool.put(one)
      self.pool.put_reward(paid)
      self.pool.close('e')
      (episode,) = self.pool.read(['e'])
    self.assertEqual(episode.completions[1].version, 3)
    self.assertEqual(episode.completions[1].seconds, 2)
    self.assertEqual(episode.reward, reward(steps=(0.5, 1.0)))

  def test_conflict_before_the_write_is_refused(self):
    self.pool.put(completion())
    with self.assertRaisesRegex(ValueError, r"\('e', 0\).*append-only"):
      self.pool.put(completion(seed=1))

  def test_rows_cannot_be_changed_or_deleted(self):
    self.pool.put(completion())
    self.pool.flush()
    for statement in (
      'UPDATE completions SET version=9',
      'DELETE FROM completions',
    ):
      with sqlite3.connect(self.path) as connection:
        with self.assertRaisesRegex(sqlite3.Error, 'append-only'):
          connection.execute(statement)

  def test_unfinished_episodes_cannot_be_read(self):
    self.pool.put(completion())
    with self.assertRaisesRegex(KeyError, 'closings'):
      self.pool.read(['e'])
    self.pool.close('e')
    with self.assertRaisesRegex(KeyError, 'rewards'):
      self.pool.read(['e'])
    self.pool.put_reward(reward())
    with self.assertRaisesRegex(ValueError, r'completions \[0\] but 2 rewards'):
      self.pool.read(['e'])
    self.pool.put(completion(step=1))
    self.assertLen(self.pool.read(['e'])[0].completions, 2)

  def test_failed_episodes_need_no_reward_for_each_action(self):
    self.pool.put(completion())
    self.pool.put_reward(types.Reward('e', types.Outcome.INFRA, (), False))
    self.pool.close('e')
    self.assertLen(self.pool.read(['e'])[0].completions, 1)

  def test_every_process_gets_its_own_number(self):
    self.assertEqual(self.pool.begin(), 0)
    self.reopen()
    self.assertEqual([self.pool.begin(), self.pool.begin()], [1, 2])

  def test_only_sqlite(self):
    refused = r'postgresql://me:\*+@localhost/x: only sqlite'
    with self.assertRaisesRegex(ValueError, refused):
      pool.DataPool('postgresql://me:secret@localhost/x')

  def test_a_full_disk_is_an_error_of_one_line_that_names_the_pool(self):
    self.limit(pages=32)
    with self.assertRaises(pool.PoolError) as caught:
      for step in range(10 * pool.BATCH):
        self.pool.put(completion(step=step))
    self.assertRegex(
      str(caught.exception),
      f'^data pool {re.escape(self.path)}: database or disk is full; .*space.*'
      'run again$',
    )
    self.limit(pages=10**6)
    # Nothing that was put is lost once there is space.
    self.assertEqual(self.pool.state()['completions'], step + 1)

  def test_a_file_that_is_no_pool_is_named(self):
    path = self.create_tempfile('other.db', 'no database' * 100).full_path
    with self.assertRaisesRegex(pool.PoolError, 'other.db: file is not a data'):
      pool.DataPool(pool.file_url(path))

  def test_thousands_of_completions_a_second(self):
    start = time.process_time()
    for index in range(PER_SECOND):
      self.pool.put(completion(episode=f'e{index}'))
      self.pool.put_reward(reward(f'e{index}', (1.0,)))
      self.pool.close(f'e{index}')
    self.assertLen(
      self.pool.read([f'e{i}' for i in range(PER_SECOND)]), PER_SECOND
    )
    self.assertLess(time.process_time() - start, clock.slow())


if __name__ == '__main__':
  absltest.main()
