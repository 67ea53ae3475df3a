"""Several processes of one run on this machine, as hosts of a pod.

Each has its own CPU devices and its own log; all are killed at the end, and
nothing waits without a limit.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from configs import common
from m2 import config as settings
from m2.checkpoint import directory
from tests.pods import documents
from tests.train import small

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVERY = 5  # steps between checkpoints
LIMIT = 600.0  # seconds that anything may take, on a busy machine


def config(folder: pathlib.Path, **changes: Any) -> settings.RunConfig:
  """A tiny run on numbered documents; `changes` as in `small.run_config`.

  Its rate does not decay, so that runs of any length share their programs.
  """
  source, words = documents.write(folder)
  data = {
    'source': 'jsonl',
    'path': str(source),
    'tokenizer': str(words),
    'shards': 2,
  }
  mesh = {'data': 2, 'fsdp': 2, 'expert': 2}
  changes['model'] = {'layers': 1} | changes.get('model', {})
  changes['data'] = data | changes.get('data', {})
  changes['mesh'] = mesh | changes.get('mesh', {})
  optim = {'lr': 1e-4, 'warmup': 2, 'decay': 0.0}
  changes['optim'] = optim | changes.get('optim', {})
  changes['checkpoint'] = {'every': EVERY} | changes.get('checkpoint', {})
  return small.run_config(**changes)


class Pod:
  """Processes of one run; a context manager.

  Attributes:
    workdir: of the run.
    processes: by their number.
  """

  def __init__(
    self,
    cfg: settings.RunConfig,
    workdir: pathlib.Path,
    *,
    processes: int = 1,
    devices: int = 8,
    attempt: int = 0,
  ):
    """Starts them.

    Args:
      cfg: of the run.
      workdir: of the run; made if absent.
      processes: how many.
      devices: of all processes together.
      attempt: number that logs and ledger carry.
    """
    self.workdir, self._attempt = workdir, attempt
    workdir.mkdir(parents=True, exist_ok=True)
    kept = workdir / 'given.json'
    kept.write_text(settings.to_config(cfg).to_json())
    command = [sys.executable, '-m', 'tests.pods.worker']
    command += [f'--config=configs/rerun.py:{kept}', f'--workdir={workdir}']
    shared = (
      common.compilation_cache()
      | os.environ
      | {
        'JAX_NUM_CPU_DEVICES': str(devices // processes),
        'ATTEMPT': str(attempt),
        # Half the time to compile; what is tested does not depend on it.
        'XLA_FLAGS': '--xla_backend_optimization_level=0',
      }
    )
    address = f'127.0.0.1:{free_port()}'
    self.processes, self._logs = [], []
    for index in range(processes):
      several = {
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_NUM_PROCESSES': str(processes),
        'JAX_PROCESS_ID': str(index),
      }
      log = workdir / f'log-{attempt}-{index}.txt'
      self._logs.append(log)
      with log.open('wb') as file:
        self.processes.append(
          subprocess.Popen(
            command,
            cwd=ROOT,
            env=shared | (several if processes > 1 else {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
          )
        )

  def __enter__(self) -> 'Pod':
    """Gives the pod itself."""
    return self

  def __exit__(self, *_) -> None:
    """Kills what still runs."""
    for process in self.processes:
      process.kill()
    for process in self.processes:
      process.wait()

  def log(self, index: int = 0) -> str:
    """What process `index` has printed."""
    return self._logs[index].read_text(errors='replace')

  def codes(self) -> list[int]:
    """Waits for all; their exit codes."""
    until = time.monotonic() + LIMIT
    for process in self.processes:
      process.wait(max(until - time.monotonic(), 1))
    return [process.returncode for process in self.processes]

  def finish(self) -> None:
    """Waits for all; an error with the logs unless each ended well."""
    if any(codes := self.codes()):
      logs = [self.log(index)[-3000:] for index in range(len(codes))]
      raise AssertionError(f'exit codes {codes}:\n' + '\n---\n'.join(logs))

  def send(self, number: signal.Signals, *indices: int) -> None:
    """Sends a signal to some processes."""
    for index in indices:
      self.processes[index].send_signal(number)

  def wait_for(self, moment: Callable[[], Any], every: float = 0.02) -> None:
    """Waits until `moment()` holds; an error if a process ends before."""
    until = time.monotonic() + LIMIT
    while not moment():
      ended = any(process.poll() is not None for process in self.processes)
      if ended or time.monotonic() > until:
        logs = '\n---\n'.join(
          self.log(i)[-3000:] for i in range(len(self._logs))
        )
        raise AssertionError(f'ended={ended}, waited in vain:\n{logs}')
      time.sleep(every)

  def taken(self) -> int:
    """Steps that this attempt has begun itself."""
    path = self.workdir / 'ledger' / '0.jsonl'
    text = path.read_text() if path.exists() else ''
    return text.count(f'"attempt": "{self._attempt}"')

  def steps(self) -> int:
    """Steps in `metrics.jsonl`, those of earlier attempts included."""
    path = self.workdir / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0


def free_port() -> int:
  """One that nobody listens on now."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def losses(workdir: pathlib.Path) -> list[float]:
  """Of steps 1, 2, ... as written."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row['step'] for row in rows] == list(range(1, len(rows) + 1))
  return [row['loss'] for row in rows]


def saved(workdir: pathlib.Path) -> list[int]:
  """Steps with a complete checkpoint."""
  return directory.steps_in(workdir / 'checkpoints')


def resumed(log: str) -> int:
  """The step that a process said it went on from; 0 = it began."""
  found = re.search(r'resumed from step (\d+)', log)
  return int(found[1]) if found else 0


def ledger(workdir: pathlib.Path) -> dict[int, dict[int, list[int]]]:
  """Documents by step and row of the batch.

  A step may have been done in several attempts, and a row by several
  processes; that they all had the same documents is checked.
  """
  book: dict[int, dict[int, list[int]]] = {}
  for path in sorted((workdir / 'ledger').glob('*.jsonl')):
    for line in path.read_text().splitlines():
      entry = json.loads(line)
      rows = book.setdefault(entry['step'], {})
      for row, numbers in entry['rows'].items():
        kept = rows.setdefault(int(row), numbers)
        assert kept == numbers, (entry['step'], row, kept, numbers)
  return book
