"""A run learns, resumes to the bit after a kill, and stops on bad numbers."""

import contextlib
import gc
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2.checkpoint import store
from m2.data import pipeline, tokenizer
from m2.train import journal, loop, resume, signals
from tests import folders
from tests.train import small, worker

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 40
# One config for every test: its programs are compiled once.
SPIKES = ('guard.spike=8', 'guard.window=15')
ARGUMENTS = (f'steps={STEPS}', 'checkpoint.every=4', 'log.introspect=15')


def lines(workdir: pathlib.Path, name: str = 'metrics') -> list[dict]:
  text = (workdir / f'{name}.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def losses(workdir: pathlib.Path) -> list[float]:
  rows = lines(workdir)
  assert [row['step'] for row in rows] == list(range(1, len(rows) + 1)), rows
  return [row['loss'] for row in rows]


def checkpoints(workdir: pathlib.Path) -> list[str]:
  return sorted(path.name for path in (workdir / 'checkpoints').glob('[0-9]*'))


def run_loop(workdir: pathlib.Path, *arguments: str):
  settings = worker.settings(*ARGUMENTS, *arguments)
  return loop.run(settings, workdir, worker.source())


@contextlib.contextmanager
def on_batch(number: int, change):
  """Calls `change` on the batch drawn as `number`-th (from 1)."""
  draw, drawn = pipeline.BatchIterator.__next__, itertools.count(1)

  def changed(self):
    batch = draw(self)
    return change(batch) if next(drawn) == number else batch

  with mock.patch.object(pipeline.BatchIterator, '__next__', changed):
    yield


def not_finite(batch):
  return batch | {'weights': batch['weights'] * np.nan}


def senseless(batch):
  """Other words than the text: a loss as before any training."""
  shuffled = np.random.default_rng(0).permutation(batch['targets'].ravel())
  return batch | {'targets': shuffled.reshape(batch['targets'].shape)}


def live_bytes() -> int:
  gc.collect()
  return sum(x.nbytes for x in jax.live_arrays())


def content(batch) -> int:
  return zlib.crc32(batch['tokens'].tobytes())


def start(workdir: pathlib.Path) -> subprocess.Popen:
  """The run of `run_loop(workdir)` in a process of its own."""
  command = [sys.executable, '-m', 'tests.train.worker', str(workdir)]
  command += ARGUMENTS
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def kill_when(workdir: pathlib.Path, moment) -> None:
  """`kill -9` of a run at the first look at which `moment()` holds."""
  process = start(workdir)
  while process.poll() is None and not moment():
    time.sleep(0.0005)
  assert process.poll() is None, 'the run ended before it was killed'
  process.send_signal(signal.SIGKILL)
  process.wait()


class LoopTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.first = folders.of_class(cls) / 'a run'
    cls.first.mkdir()
    cls.state = jax.device_get(run_loop(cls.first))
    cls.outside = live_bytes()  # of other tests

  def workdir(self) -> pathlib.Path:
    return pathlib.Path(self.create_tempdir().full_path)

  def test_learns_and_records(self):
    self.assertEqual(self.state.step, STEPS)
    values = losses(self.first)
    self.assertLen(values, STEPS)
    self.assertLess(values[-1], values[0] - 1)
    looked = lines(self.first, 'introspection')
    self.assertEqual([row['step'] for row in looked], [15, 30, STEPS])
    self.assertEqual(looked[0]['loss'], values[14])
    self.assertEqual(looked[0]['log_z'], lines(self.first)[14]['log_z'])
    self.assertEqual(checkpoints(self.first), ['36', '40'])
    rows = lines(self.first)
    compiled = [row for row in rows if 'seconds_compile' in row]
    self.assertEqual([row['step'] for row in compiled], [1, 15])
    for row in rows:
      self.assertGreater(row['seconds_data'], 0)
      working = row['seconds'] - row.get('seconds_compile', 0)
      self.assertGreater(working, 0)
      self.assertAlmostEqual(row['tokens_per_second'] * working, row['tokens'])

  def test_a_finished_run_returns_at_once(self):
    before = (self.first / 'metrics.jsonl').read_bytes()
    again = jax.device_get(run_loop(self.first))
    jax.tree.map(np.testing.assert_array_equal, self.state, again)
    self.assertEqual((self.first / 'metrics.jsonl').read_bytes(), before)

  def test_a_killed_run_ends_as_if_it_had_not_been(self):
    torn = self.workdir()

    def steps_done() -> int:
      path = torn / 'metrics.jsonl'
      return path.read_bytes().count(b'\n') if path.exists() else 0

    def saving() -> bool:
      names = os.listdir(torn / 'checkpoints')
      return steps_done() > 14 and any('tmp' in name for name in names)

    kill_when(torn, lambda: steps_done() >= 10)  # amid the steps
    kill_when(torn, saving)  # amid a save
    self.assertEqual(start(torn).wait(), 0)
    self.assertEqual(losses(self.first), losses(torn))
    for row, other in zip(
      lines(self.first, 'introspection'),
      lines(torn, 'introspection'),
      strict=True,
    ):
      self.assertEqual(row, other)
    after = store.load_params(torn, worker.MODEL)
    jax.tree.map(np.testing.assert_array_equal, self.state.params, after)

  def test_another_run_in_the_workdir_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'seed was 0, is 1.*workdir'):
      run_loop(self.first, 'seed=1')
    with self.assertRaisesRegex(ValueError, 'data.length was 16, is 32'):
      run_loop(self.first, 'data.length=32')
    rows = worker.source()[:-1]
    with self.assertRaisesRegex(ValueError, 'data was .200 rows.*is .199 rows'):
      loop.run(worker.settings(*ARGUMENTS), self.first, rows)
    self.assertEqual(checkpoints(self.first), ['36', '40'])

  def test_starts_from_weights_of_another_run(self):
    second = self.workdir()
    run_loop(second, f'checkpoint.init_from={self.first}')
    # The tokenizer came along, and the loss goes on where the first ended.
    self.assertEqual(
      (self.first / 'tokenizer.json').read_bytes(),
      (second / 'tokenizer.json').read_bytes(),
    )
    first, values = losses(self.first), losses(second)
    self.assertLess(values[0], (first[0] + first[-1]) / 2)

  def test_weights_need_their_tokenizer(self):
    workdir, start = self.workdir(), self.workdir()
    os.symlink(self.first / 'checkpoints', start / 'checkpoints')
    with self.assertRaisesRegex(ValueError, 'no tokenizer.json in'):
      run_loop(workdir, f'checkpoint.init_from={start}')
    self.assertFalse((workdir / 'tokenizer.json').exists())

  def test_a_refused_start_does_not_bind_the_next(self):
    workdir = self.workdir()
    other = tokenizer.train(['other text'], small.MODEL.vocab)
    other.save(workdir / 'other.json')
    refused = mock.patch.object(resume, 'begin', side_effect=ValueError)
    with refused, self.assertRaises(ValueError):
      run_loop(workdir, f'data.tokenizer={workdir / "other.json"}')
    with refused, self.assertRaises(ValueError):
      run_loop(workdir)
    self.assertEqual(
      (self.first / 'tokenizer.json').read_bytes(),
      (workdir / 'tokenizer.json').read_bytes(),
    )

  def test_a_run_in_use_keeps_its_tokenizer(self):
    workdir = self.workdir()
    with store.Store(workdir / 'checkpoints'):
      with self.assertRaisesRegex(store.CheckpointError, 'in use by another'):
        run_loop(workdir)
    self.assertFalse((workdir / 'tokenizer.json').exists())

  def test_a_bad_weight_stops_the_run_and_is_named(self):
    workdir, start = self.workdir(), self.workdir()
    params = jax.tree.map(np.array, self.state.params)
    params['blocks']['moe']['wo'][0, :, 3] = np.nan  # whichever is chosen
    with store.Store(start / 'checkpoints') as made:
      placed = jax.tree.map(jax.numpy.asarray, params)
      made.save({'params': placed}, None, step=0, extra={})
    words = (self.first / 'tokenizer.json').read_bytes()
    (start / 'tokenizer.json').write_bytes(words)
    message = 'step 1 is not finite.*blocks/moe/wo were not finite before it'
    with self.assertRaisesRegex(journal.TrainingError, message):
      run_loop(workdir, f'checkpoint.init_from={start}')
    self.assertIsNone(losses(workdir)[0])
    self.assertEmpty(checkpoints(workdir))

  def test_asked_to_stop_it_saves_and_goes_on_to_the_bit(self):
    workdir, before = self.workdir(), signal.getsignal(signal.SIGTERM)
    with on_batch(7, lambda b: os.kill(os.getpid(), signal.SIGTERM) or b):
      with self.assertRaises(signals.Stopped) as stopped:
        run_loop(workdir)
    self.assertEqual(stopped.exception.code, 143)
    self.assertIs(signal.getsignal(signal.SIGTERM), before)
    self.assertEqual(checkpoints(workdir), ['4', '7'])
    self.assertLen(losses(workdir), 7)
    run_loop(workdir)
    self.assertEqual(losses(workdir), losses(self.first))

  def test_a_bad_batch_is_rewound_and_left_out(self):
    self.check_rewind(not_finite)

  @pytest.mark.heavy
  def test_a_senseless_batch_is_too(self):
    self.check_rewind(senseless)

  def check_rewind(self, change):
    workdir, held = self.workdir(), []
    restore = store.Store.restore

    def restored(*args):
      held.append(live_bytes())
      found = restore(*args)
      held.append(live_bytes())
      return found

    with (
      on_batch(30, change),
      mock.patch.object(store.Store, 'restore', restored),
    ):
      run_loop(workdir, 'guard.policy=rewind', *SPIKES)
    size = sum(x.nbytes for x in jax.tree.leaves(self.state))
    # The state is gone before it is read again: two may not fit the devices.
    before, after = held
    self.assertGreater(after - before, size / 2)
    self.assertLess(before - self.outside, size / 2)
    rows = lines(workdir)
    self.assertEqual([row['step'] for row in rows], list(range(1, STEPS + 1)))
    rewinds = [row['guard/rewinds'] for row in rows]
    self.assertEqual(rewinds, [0] * 28 + [1] * 12)
    # Batches 29 to 31: the bad one is found while the next is under way.
    self.assertEqual({row['guard/skipped'] for row in rows[28:]}, {3})
    self.assertEqual(
      [row['data/hash'] for row in rows[28:37]],
      [row['data/hash'] for row in lines(self.first)[31:40]],
    )
    looked = lines(workdir, 'introspection')
    self.assertEqual([row['guard/rewinds'] for row in looked], [0, 1, 1])
    self.assertLess(rows[-1]['loss'], rows[0]['loss'] - 1)

  def test_rows_longer_than_the_model_reaches_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'data.length=65 exceeds'):
      run_loop(self.workdir(), 'data.length=65')

  def test_a_batch_that_does_not_divide_is_refused(self):
    with self.assertRaisesRegex(
      ValueError, 'data.batch=8 .* optim.accumulate=2 times the 8 shards'
    ):
      run_loop(self.workdir(), 'optim.accumulate=2')


class GuardTest(parameterized.TestCase):
  """A bad batch at step 30; the newest checkpoint is that of step 28."""

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)

  def test_a_spike_stops(self):
    message = 'step 30 is a spike: loss .* deviations above'
    with on_batch(30, senseless):
      with self.assertRaisesRegex(journal.TrainingError, message) as caught:
        run_loop(self.workdir, *SPIKES)
    self.assertRegex(
      caught.exception.__notes__[0], 'on host 0 of 1 .*, at step'
    )
    self.assertEqual(checkpoints(self.workdir), ['24', '28'])

  @pytest.mark.heavy
  def test_a_run_killed_after_a_rewind_meets_it_again_to_the_bit(self):
    """The bad batch is in the data: it comes again after a restart."""
    draw, bad = pipeline.BatchIterator.__next__, set()
    with on_batch(30, lambda batch: bad.add(content(batch)) or batch):
      run_loop(self.workdir)

    def poisoned(self):
      batch = draw(self)
      return not_finite(batch) if content(batch) in bad else batch

    whole, torn = self.workdir / 'whole', self.workdir / 'torn'
    whole.mkdir()
    torn.mkdir()
    with mock.patch.object(pipeline.BatchIterator, '__next__', poisoned):
      run_loop(whole, 'guard.policy=rewind')
      with on_batch(33, lambda _: 1 / 0):
        with self.assertRaises(ZeroDivisionError):
          run_loop(torn, 'guard.policy=rewind')
      self.assertEqual(checkpoints(torn), ['24', '28'])
      run_loop(torn, 'guard.policy=rewind')
    self.assertEqual(losses(torn), losses(whole))
    self.assertEqual(lines(torn)[-1]['guard/rewinds'], 1)

  def test_gives_up_where_there_is_nothing_to_go_back_to(self):
    with on_batch(1, not_finite):
      with self.assertRaises(journal.TrainingError) as caught:
        run_loop(self.workdir, 'guard.policy=rewind')
    self.assertIn('no checkpoint yet', ' '.join(caught.exception.__notes__))


if __name__ == '__main__':
  absltest.main()
