"""A stage runs once, in its own process, and its failures are told."""

import contextlib
import io
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import time

import ml_collections
from absl.testing import absltest, parameterized

from configs import sft
from m2 import config as m2_config
from m2.evolve import provenance, trial

MIB = 2**20
WAIT = 20.0  # seconds for another process to reach a state

# Stands for main.py: does what `config.do` says.
SCRIPT = """
import json, os, pathlib, sys, time
arguments = dict(a.lstrip('-').split('=', 1) for a in sys.argv[1:])
path = pathlib.Path(arguments['config'].split(':', 1)[1])
config = json.loads(path.read_text())
workdir = pathlib.Path(arguments['workdir'])
with open(workdir / 'starts', 'a') as file:
  file.write(f'{os.getpid()}\\n')
exec(config['do'])
"""
# A stage that saves when it is asked to stop.
SAVING = """
import signal
def save(number, frame):
  print('saving', flush=True)
  for one in (signal.SIGINT, signal.SIGTERM):
    signal.signal(one, signal.SIG_IGN)
  time.sleep(0.3)
  (workdir / 'saved').touch()
  print('saved', flush=True)
  sys.exit(128 + number)
for one in (signal.SIGINT, signal.SIGTERM):
  signal.signal(one, save)
print('begun', flush=True)
time.sleep(600)
"""


# The real main.py with a run of its own.
MAIN = """
import sys
sys.path.insert(0, {root!r})
import main
def run(config, workdir):
  print(config.seed, config.data.source)
main.run = run
main.app.run(main.main, flags_parser=main.parse)
"""


class TrialTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = pathlib.Path(self.create_tempdir().full_path)
    self.main = root / 'main.py'
    self.main.write_text(SCRIPT)
    self.workdir = root / 'a stage'

  def run_main(self, do: str, **settings) -> trial.Trial:
    config = ml_collections.ConfigDict({'do': textwrap.dedent(do), **settings})
    self.printed = io.StringIO()
    with contextlib.redirect_stdout(self.printed):
      return trial.run_main(config, self.workdir, label='stage', main=self.main)

  def starts(self) -> int:
    return len((self.workdir / 'starts').read_text().split())

  def test_runs_in_its_folder_and_measures_it(self):
    done = self.run_main(
      f"""
      print('hello'); print('grün', file=sys.stderr)
      memory = bytearray({200 * MIB}); time.sleep(0.2)
      """
    )
    self.assertEqual(done.workdir, self.workdir.resolve())
    self.assertGreater(done.seconds, 0.2)
    # Linux counts what the starting process held when it forked.
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    self.assertBetween(done.peak_bytes, 200 * MIB, max(400 * MIB, started))
    self.assertEqual(done.attempts, 1)
    log = (self.workdir / 'log.txt').read_text()
    self.assertCountEqual(log.split(), ['hello', 'grün'])

  def test_a_finished_stage_is_not_repeated(self):
    first = self.run_main('pass')
    self.assertEqual(self.run_main('pass'), first)
    self.assertEqual(self.starts(), 1)
    self.assertIn('done before', self.printed.getvalue())

  def test_what_main_read_counts_as_read_here(self):
    self.main.write_text(MAIN.format(root=str(provenance.ROOT)))
    (self.main.parent / 'configs').symlink_to(provenance.ROOT / 'configs')
    run = m2_config.RunConfig.from_config(sft.get_config('tiny'))
    stage = trial.child(run, 'sft')
    everything = m2_config.unread(run)
    self.assertContainsSubset(('seed', 'steps', 'data.path'), everything)
    trial.run_main(stage, self.workdir, label='stage', main=self.main)
    read = set(everything) - set(m2_config.unread(run))
    self.assertEqual(read, {'seed', 'data.source'})

  def test_a_failed_stage_raises_with_the_end_of_its_log(self):
    with self.assertRaises(trial.TrialError) as caught:
      self.run_main(
        """
        for line in range(100):
          print('line', line)
        raise ValueError('model.heads=7 is odd')
        """
      )
    message = str(caught.exception)
    self.assertIn('exit code 1', message)
    self.assertIn('model.heads=7 is odd', message)
    self.assertIn('log.txt', message)
    self.assertNotIn('line 50', message)
    with self.assertRaises(trial.TrialError):
      trial.load(self.workdir)

  def test_a_failed_stage_is_started_again(self):
    do = """
      if not (workdir / 'half').exists():
        (workdir / 'half').touch(); sys.exit(3)
      """
    with self.assertRaisesRegex(trial.TrialError, 'exit code 3'):
      self.run_main(do)
    self.assertEqual(self.run_main(do).attempts, 2)

  def test_a_stage_killed_by_the_system_is_told_as_such(self):
    with self.assertRaisesRegex(trial.TrialError, 'exit code -9'):
      self.run_main('os.kill(os.getpid(), 9)')

  def test_a_folder_serves_one_config(self):
    self.run_main('pass', seed=0, model={'layers': 2})
    with self.assertRaisesRegex(trial.TrialError, 'model.layers, seed differ'):
      self.run_main('pass', seed=1, model={'layers': 3})
    self.assertEqual(self.starts(), 1)

  def test_one_process_in_a_folder_at_a_time(self):
    self.workdir.mkdir()
    with open(self.workdir / 'lock', 'a') as lock:
      trial._take(lock, self.workdir)
      with self.assertRaisesRegex(trial.TrialError, 'still at work'):
        self.run_main('pass')

  def test_a_stage_does_not_outlive_its_parent(self):
    """After kill -9 of the loop, no stage may go on writing in the folder."""
    if not sys.platform.startswith('linux'):
      self.skipTest('needs PR_SET_PDEATHSIG')
    parent, child = self.start_apart(
      "print('begun', flush=True); time.sleep(600)"
    )
    parent.kill()
    parent.wait()
    _wait_for(lambda: not _runs(child))
    with self.assertRaisesRegex(trial.TrialError, 'do differ'):
      self.run_main('pass')  # the lock is free: it is the config that stops

  @parameterized.parameters(signal.SIGINT, signal.SIGTERM)
  def test_asked_to_stop_a_stage_ends_by_itself(self, number):
    parent, child = self.start_apart(SAVING)
    parent.send_signal(number)  # to the parent alone: it is passed on
    self.assertEqual(parent.wait(WAIT), -number)
    self.assertFalse(_runs(child))
    self.assertTrue((self.workdir / 'saved').exists())
    self.assertFalse((self.workdir / 'done.json').exists())
    log = (self.workdir / 'log.txt').read_text()
    self.assertEqual(log.split(), ['begun', 'saving', 'saved'])

  def test_a_second_signal_kills_a_stage(self):
    parent, child = self.start_apart(SAVING.replace('sleep(0.3)', 'sleep(600)'))
    parent.send_signal(signal.SIGINT)
    log = self.workdir / 'log.txt'
    _wait_for(lambda: 'saving' in log.read_text())
    parent.send_signal(signal.SIGINT)  # at once: the first, passed on
    time.sleep(0.2)
    self.assertTrue(_runs(child))
    time.sleep(0.5)
    parent.send_signal(signal.SIGINT)
    self.assertEqual(parent.wait(WAIT), -signal.SIGINT)
    _wait_for(lambda: not _runs(child))
    self.assertFalse((self.workdir / 'saved').exists())

  def start_apart(self, do: str) -> tuple[subprocess.Popen, int]:
    """A process that runs a stage, and the id of the stage's process."""
    self.workdir.mkdir()
    code = f"""
      import ml_collections, pathlib, signal
      from m2.evolve import trial
      signal.signal(signal.SIGINT, signal.default_int_handler)
      trial._SAME = 0.6
      trial.run_main(
        ml_collections.ConfigDict({{'do': {textwrap.dedent(do)!r}}}),
        pathlib.Path({str(self.workdir)!r}), label='stage',
        main=pathlib.Path({str(self.main)!r}))
      """
    parent = subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(code)],
      cwd=provenance.ROOT,
      stderr=subprocess.DEVNULL,
    )
    self.addCleanup(parent.wait)
    self.addCleanup(parent.kill)
    log = self.workdir / 'log.txt'
    _wait_for(lambda: log.exists() and 'begun' in log.read_text())
    return parent, int((self.workdir / 'starts').read_text())

  def test_progress_lines_carry_time_and_eta(self):
    line = trial._progress('rl', ' step 30/120 loss 1.2 ', 60.0)
    self.assertEqual(
      line.split(), 'rl 1:00, 3:00 left | step 30/120 loss 1.2'.split()
    )
    line = trial._progress('rl', 'loss 1/x 2.5/3', 60.0)
    self.assertNotIn('left', line)

  def test_overwritten_lines_stay_out_of_the_log(self):
    self.run_main(r"print('1/3\r2/3\r3/3\nend')")
    log = (self.workdir / 'log.txt').read_text()
    self.assertEqual(log, '3/3\nend\n')


def _wait_for(condition) -> None:
  limit = time.monotonic() + WAIT
  while not condition():
    if time.monotonic() > limit:
      raise TimeoutError(f'still not after {WAIT} seconds')
    time.sleep(0.05)


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  return state.split()[0] != 'Z'


if __name__ == '__main__':
  absltest.main()
