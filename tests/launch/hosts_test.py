"""The launch scripts for real, on one machine: two processes; RL over Ray.

The RL run is that of three hosts: the trainer's Ray has no CPUs, and two more
join it as hosts for agents do.
"""

import json
import os
import pathlib
import re
import secrets
import signal
import socket
import subprocess
import sys
import time

import pytest
from absl.testing import absltest

from m2.forge import pool as pools
from tests.pods import pod

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = [
  f'--config.model.{name}={value}'
  for name, value in {
    'd_model': 32, 'layers': 2, 'heads': 4, 'kv_heads': 2, 'head_dim': 8,
    'rotary_dim': 8, 'experts': 4, 'd_expert': 16,
  }.items()
]  # fmt: skip
TRAIN = [
  *SMALL, '--config.steps=3', '--config.log.introspect=0',
  '--config.log.every=1', '--config.checkpoint.every=100',
  '--config.data.batch=8', '--config.data.length=64',
]  # fmt: skip
RL = [
  *SMALL, '--config.steps=2', '--config.log.introspect=0',
  '--config.forge.groups=2', '--config.forge.in_flight=2',
  '--config.forge.group_size=4', '--config.agent.max_turns=2',
  '--config.agent.max_new=8', '--config.engine.slots=8',
]  # fmt: skip


class HostsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def start(self, *command: str, **variables: str) -> subprocess.Popen:
    log = self.enter_context((self.root / 'log').open('a'))
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      env=os.environ | variables,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      start_new_session=True,
    )
    self.addCleanup(_end, process)
    return process

  def finish(self, process: subprocess.Popen, seconds: float = 900) -> str:
    """What everybody printed, once `process` has ended well."""
    code = process.wait(timeout=seconds)
    said = (self.root / 'log').read_text()
    self.assertEqual(code, 0, said[-4000:])
    return said

  def wait_for(self, text: str, count: int, process: subprocess.Popen) -> None:
    """Until `text` was printed so often, or `process` is no more."""
    log = self.root / 'log'
    while log.read_text().count(text) < count and process.poll() is None:
      time.sleep(0.5)

  def losses(self, name: str, **variables: str) -> list[float]:
    workdir = self.root / name
    run = self.start(
      'bash', 'launch/gpu.sh', '--config=configs/m2.py:tiny',
      f'--workdir={workdir}', *TRAIN, PLATFORM='cpu', **variables,
    )  # fmt: skip
    self.finish(run)
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line)['loss'] for line in lines]

  def test_two_processes_train_as_one_does(self):
    one = self.losses('one', DEVICES='2')
    two = self.losses('two', DEVICES='1', PROCESSES='2')
    self.assertLen(one, 3)
    for left, right in zip(one, two, strict=True):
      self.assertAlmostEqual(left, right, delta=1e-4)

  def test_rl_with_agents_on_other_hosts(self):
    sft = self.root / 'sft'
    self.finish(
      self.start(
        sys.executable,
        'main.py',
        '--config=configs/sft.py:tiny',
        f'--workdir={sft}',
        *TRAIN[:-1],
        '--config.data.length=512',
      )  # fmt: skip
    )
    variables = {
      'PLATFORM': 'cpu',
      'TRAINER': '127.0.0.1',
      'PORT': str(pod.free_port()),
      'RAY_AUTH_TOKEN': secrets.token_hex(32),
      'RAY_TMPDIR': '/tmp/m2-ray',  # sockets in it: a long path does not do
      # Agents wait so long for a head that went; by default a minute.
      'RAY_gcs_rpc_server_reconnect_timeout_s': '5',
    }
    trainer = self.start(
      'bash', 'launch/rl.sh', 'trainer', '--config=configs/rl.py:tiny',
      f'--config.checkpoint.init_from={sft}', f'--workdir={self.root / "rl"}',
      *RL, **variables,
    )  # fmt: skip
    agents = []
    for number in range(2):
      # On one machine they would take the same ports if they started at once.
      self.wait_for('Ray runtime started', number, trainer)
      agents.append(
        self.start('bash', 'launch/rl.sh', 'agents', CPUS='1', **variables)
      )
    said = self.finish(trainer)
    self.assertNotIn(variables['RAY_AUTH_TOKEN'], said)
    with pools.DataPool(pools.file_url(self.root / 'rl/pool.db')) as pool:
      episodes = pool.read([f'g{g}.0/{m}' for g in range(4) for m in range(4)])
    self.assertLen({episode.task for episode in episodes}, 4)
    for episode in episodes:
      self.assertNotEmpty(episode.completions)
    for host in agents:  # they go when the trainer has gone
      host.wait(timeout=180)

  def test_agents_with_another_token_are_kept_out(self):
    port, token = str(pod.free_port()), secrets.token_hex(32)
    given = {'TRAINER': '127.0.0.1', 'PORT': port, 'PLATFORM': 'cpu'}
    head = self.start(
      sys.executable, '-m', 'ray.scripts.scripts', 'start', '--head', '--block',
      f'--port={port}', '--node-ip-address=127.0.0.1', '--num-cpus=0',
      '--disable-usage-stats', '--include-dashboard=false',
      RAY_AUTH_MODE='token', RAY_AUTH_TOKEN=token, RAY_TMPDIR='/tmp/m2-ray',
    )  # fmt: skip
    end = time.monotonic() + 60
    while time.monotonic() < end:
      with socket.socket() as probe:
        if probe.connect_ex(('127.0.0.1', int(port))) == 0:
          break
      time.sleep(0.5)
    other = self.start(
      'bash', 'launch/rl.sh', 'agents', CPUS='1',
      RAY_AUTH_TOKEN=secrets.token_hex(32), **given,
    )  # fmt: skip
    self.assertNotEqual(other.wait(timeout=200), 0)
    self.assertIsNone(head.poll())
    said = (self.root / 'log').read_text()
    self.assertTrue(re.search('(?i)authenti|token', said), said[-2000:])


def _end(process: subprocess.Popen) -> None:
  """Ends what a test started, and what that started."""
  try:
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=20)
  except (ProcessLookupError, subprocess.TimeoutExpired):
    pass
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()


if __name__ == '__main__':
  absltest.main()
