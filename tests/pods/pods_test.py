"""Runs of several processes: what one alone computes, through every change."""

import dataclasses
import json
import pathlib
import re
import signal
import time

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2 import config as settings
from tests.bench import kills
from tests.pods import documents, pod

STEPS = 16
# Relative, of losses: between processes gloo adds in another order than XLA
# within one, and other meshes add in others still. Seen: 2.3e-7, over 512 steps
# (`tests/bench/results/kills-*.json`); a step moves the loss by a hundredth.
SAME = 1e-5
NAMED_WITHIN = 60.0  # seconds


class PodTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.cfg = pod.config(self.folder, steps=STEPS)

  def stop_after(self, steps: int, workdir: pathlib.Path, **layout) -> int:
    """Starts a run, asks its last process to stop; the step where it did."""
    with pod.Pod(self.cfg, workdir, **layout) as run:
      run.wait_for(lambda: run.taken() >= steps)
      run.send(signal.SIGTERM, -1)
      codes = run.codes()
      logs = [run.log(index) for index in range(len(codes))]
    self.assertEqual(codes, [143] * len(codes), logs)
    stopped = pod.saved(workdir)[-1]
    for log in logs:
      self.assertIn(f'stopped at step {stopped}, which is saved', log)
    self.assertLen(pod.losses(workdir), stopped)
    return stopped

  def check(self, workdir, whole) -> None:
    """Losses and rows of two runs are the same."""
    np.testing.assert_allclose(
      pod.losses(workdir), pod.losses(whole), rtol=SAME
    )
    self.assertLen(pod.losses(workdir), STEPS)
    self.assertEqual(pod.ledger(workdir), pod.ledger(whole))

  @pytest.mark.heavy
  def test_two_processes_are_stopped_and_one_goes_on(self):
    whole, torn = self.folder / 'whole', self.folder / 'torn'
    with pod.Pod(self.cfg, whole) as alone:
      stopped = self.stop_after(5, torn, processes=2)
      alone.finish()
    self.assertLess(stopped, STEPS)
    # Each host read its own half of the rows and of the source, all of it.
    hosts = [
      [json.loads(line) for line in path.read_text().splitlines()]
      for path in sorted((torn / 'ledger').glob('*.jsonl'))
    ]
    self.assertEqual(
      [set(h[0]['rows']) for h in hosts], [set('0123'), set('4567')]
    )
    read = [
      {n for e in h for ns in e['rows'].values() for n in ns} for h in hosts
    ]
    self.assertEqual([{n % 2 for n in numbers} for numbers in read], [{0}, {1}])
    with pod.Pod(self.cfg, torn, attempt=1) as run:
      run.finish()
      self.assertEqual(pod.resumed(run.log()), stopped)
    self.check(torn, whole)

  @pytest.mark.heavy
  def test_layouts_read_each_other(self):
    """Meshes, devices and processes change; batch, rows and losses do not."""
    whole, torn = self.folder / 'whole', self.folder / 'torn'
    with pod.Pod(self.cfg, whole) as run:
      run.finish()
    # 2x2x2, then 8x1x1, then two processes, then half of the devices.
    layouts = (
      (1, 8, settings.MeshConfig(data=2, fsdp=2, expert=2)),
      (1, 8, settings.MeshConfig(data=8, fsdp=1, expert=1)),
      (2, 8, settings.MeshConfig(data=2, fsdp=1, expert=2, tensor=2)),
      (1, 4, settings.MeshConfig(data=4, fsdp=1, expert=1)),
    )
    for attempt, (processes, devices, mesh) in enumerate(layouts):
      self.cfg = dataclasses.replace(self.cfg, mesh=mesh)
      layout = {'processes': processes, 'devices': devices, 'attempt': attempt}
      if attempt < len(layouts) - 1:
        self.stop_after(2, torn, **layout)
      else:
        with pod.Pod(self.cfg, torn, **layout) as run:
          run.finish()
    self.check(torn, whole)

  @pytest.mark.heavy
  def test_a_hung_host_is_named(self):
    self.cfg = dataclasses.replace(self.cfg, steps=100_000)
    with pod.Pod(self.cfg, self.folder / 'run', processes=2) as run:
      run.wait_for(lambda: run.steps() >= 5)
      run.send(signal.SIGSTOP, 1)
      begin = time.monotonic()
      silent = re.compile(r'host 1 of 2 \(\S+\) has been silent for \d+ s')
      run.wait_for(lambda: silent.search(run.log(0)))
      self.assertLess(time.monotonic() - begin, NAMED_WITHIN)
      run.wait_for(lambda: 'its stacks follow' in run.log(0))
      run.wait_for(lambda: 'in _steps' in run.log(0))  # where it waits
      steps = run.steps()
      run.send(signal.SIGCONT, 1)
      run.wait_for(lambda: run.steps() > steps + 3)
      on = re.compile(r'host 1 of 2 \(\S+\) goes on after \d+ s')
      run.wait_for(lambda: on.search(run.log(0)))

  @pytest.mark.heavy
  def test_a_failure_on_one_host_ends_all_and_says_where(self):
    """A broken row of the second shard, which only process 1 reads."""
    path = self.folder / documents.FILE
    rows = path.read_text().splitlines()
    rows[101] = '{"tokens": "none"}'
    path.write_text('\n'.join(rows) + '\n')
    with pod.Pod(self.cfg, self.folder / 'run', processes=2) as run:
      codes = run.codes()
      self.assertNotIn(0, codes)
      for index in range(2):
        self.assertRegex(
          run.log(index),
          r'jsonl line 102: tokens must .* \(on host 1 of 2 \(\S+\), at step 1',
        )
    self.assertEmpty(pod.saved(self.folder / 'run'))

  def test_modes_of_one_process_refuse_several(self):
    """Before anything is joined, so that one process is enough to see it."""
    cfg = settings.RunConfig(
      mode='convert',
      convert=settings.ConvertConfig(source='a', target='b'),
      mesh=settings.MeshConfig(),
    )
    with pod.Pod(cfg, self.folder / 'run', processes=2) as run:
      self.assertEqual(run.codes(), [2, 2])
      self.assertIn('mode=convert runs as one process', run.log(0))


class KillsTest(absltest.TestCase):
  @pytest.mark.heavy
  def test_kills_lose_and_repeat_nothing(self):
    self.kill(3, 2089)  # in every layout; the second while it saves

  @pytest.mark.exhaustive
  def test_more_kills(self):
    self.kill(20, 3)

  def kill(self, times: int, seed: int):
    folder = pathlib.Path(self.create_tempdir().full_path)
    found = kills.campaign(times, seed, folder)
    self.assertEmpty(kills.faults(found), found)


if __name__ == '__main__':
  absltest.main()
