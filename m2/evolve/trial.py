"""One stage = one `main.py` in its own process and folder, run at most once.

    trial/stage.json    the config; a folder never serves two of them
    trial/log.txt       everything the stage printed
    trial/unread.json   the settings that the stage did not read (main.py)
    trial/done.json     written last: the stage is complete and is not repeated
    trial/lock          held by the stage, and by nobody after it

A stage that is killed leaves no `done.json`; the next call starts it again in
the same folder, where training resumes from its own checkpoint. A stage that
fails raises with the end of its log.

Asked to stop, by SIGINT or SIGTERM, a stage may end by itself: under training
it saves first. A second signal ends it at once.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import ml_collections

from m2 import config as m2_config
from m2.evolve import provenance

MAIN = provenance.ROOT / 'main.py'

_TAIL = 20  # log lines that a failure quotes
_HEARTBEAT = 30.0  # seconds between progress lines where nothing is a terminal
_SAME = 2.0  # seconds within which a second signal is the first, passed on
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h
_COUNT = re.compile(r'(?<![\w.])(\d+)/(\d+)(?![\w.])')  # 'step 30/200'


class TrialError(RuntimeError):
  """A stage failed, or its folder belongs to something else."""


@dataclasses.dataclass(frozen=True)
class Trial:
  """A finished stage.

  Attributes:
    workdir: its folder.
    seconds: wall-clock time of the attempt that finished.
    peak_bytes: largest resident memory of its process.
    attempts: times it was started, the last one included.
  """

  workdir: pathlib.Path
  seconds: float
  peak_bytes: int
  attempts: int


def child(
  config: m2_config.RunConfig, mode: str, **sections: Any
) -> ml_collections.ConfigDict:
  """The config of a stage: the sections of `mode`, taken over from `config`.

  Taking a leaf over is not reading it: see `run_main`.

  Args:
    config: the run that starts the stage.
    mode: a key of `m2.config.MODES`.
    **sections: whole sections that `config` lacks, as dictionaries.

  Returns:
    An unlocked ConfigDict with `mode`, `seed`, `steps` and the sections.
  """
  whole = m2_config.to_config(config)
  tree = ml_collections.ConfigDict({'mode': mode})
  for name in ('seed', 'steps', *m2_config.MODES[mode]):
    tree[name] = whole[name] if name not in sections else sections[name]
  return tree


def run_main(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  label: str,
  main: pathlib.Path = MAIN,
) -> Trial:
  """Runs `main.py` on `config` in `workdir`, unless that is done already.

  The settings that the stage read count as read here as well.

  Args:
    config: all settings of the stage.
    workdir: its folder; made if absent.
    label: what progress lines call it.
    main: the script to run.

  Returns:
    Time and memory, of this call or of the one that finished the stage.

  Raises:
    TrialError: the stage failed (with the end of its log), the folder holds a
      run with another config, or another process is at work there.
    KeyboardInterrupt: asked for by a signal, once the stage has ended.
  """
  workdir = pathlib.Path(workdir).resolve()
  workdir.mkdir(parents=True, exist_ok=True)
  settings = json.loads(config.to_json())
  with open(workdir / 'lock', 'a') as lock:
    _take(lock, workdir)
    _claim(workdir, settings)
    done = workdir / 'done.json'
    if done.exists():
      found = load(workdir)
      _note_reads(settings, workdir)
      print(f'{label:<24} done before, {clock(found.seconds)}', flush=True)
      return found
    attempts = workdir / 'attempts'
    with open(attempts, 'a') as file:
      file.write('.')
    seconds, peak_bytes = _run(workdir, label, main, lock)
    record = {
      'config_hash': provenance.digest(settings),
      'seconds': round(seconds, 3),
      'peak_bytes': peak_bytes,
      'attempts': attempts.stat().st_size,
    }
    provenance.write_json(done, record)
    _note_reads(settings, workdir)
  again = f', attempt {record["attempts"]}' if record['attempts'] > 1 else ''
  print(f'{label:<24} done in {clock(seconds)}{again}', flush=True)
  return load(workdir)


def _note_reads(settings: dict[str, Any], workdir: pathlib.Path) -> None:
  """Counts the leaves of `settings` as read, but those in `unread.json`."""
  path = workdir / 'unread.json'
  unread = set(json.loads(path.read_text())) if path.exists() else ()
  reads = m2_config.Settings.READS
  for name, value in settings.items():
    if isinstance(value, dict):
      reads.update(
        (f'{name.capitalize()}Config', leaf)
        for leaf in value
        if f'{name}.{leaf}' not in unread
      )
    elif name not in unread:
      reads.add(('RunConfig', name))


def load(workdir: pathlib.Path) -> Trial:
  """A finished stage, from its folder.

  Raises:
    TrialError: it has not finished.
  """
  done = workdir / 'done.json'
  if not done.exists():
    raise TrialError(f'{workdir}: the stage has not finished')
  record = json.loads(done.read_text())
  return Trial(
    workdir, record['seconds'], record['peak_bytes'], record['attempts']
  )


def clock(seconds: float) -> str:
  """Minutes and seconds, such as 3:07."""
  minutes, rest = divmod(round(seconds), 60)
  return f'{minutes}:{rest:02d}'


def _take(lock: Any, workdir: pathlib.Path) -> None:
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    raise TrialError(
      f'{workdir}: an earlier run is still at work there; wait for it or stop '
      'it first'
    ) from None


def _claim(workdir: pathlib.Path, settings: dict[str, Any]) -> None:
  """Files the config, or checks that the folder was made for this one."""
  path = workdir / 'stage.json'
  if not path.exists():
    provenance.write_json(path, settings)
    return
  changed = provenance.difference(json.loads(path.read_text()), settings)
  if changed:
    raise TrialError(
      f'{workdir} holds a run whose {", ".join(changed[:5])} differ'
      f'{" and more" if changed[5:] else ""}; choose a new --workdir, or '
      'delete that folder to run it anew'
    )


def _run(
  workdir: pathlib.Path, label: str, main: pathlib.Path, lock: Any
) -> tuple[float, int]:
  """One attempt: seconds and peak memory in bytes; raises if it fails."""
  command = [
    sys.executable,
    str(main),
    f'--config={main.parent / "configs" / "rerun.py"}:{workdir}/stage.json',
    f'--workdir={workdir}',
  ]
  start = time.monotonic()
  process = subprocess.Popen(
    command,
    cwd=provenance.ROOT,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    pass_fds=[lock.fileno()],  # held for as long as the stage lives
    preexec_fn=_with_parent(),
  )
  try:
    with _patience(process.pid, label):
      tail = _follow(process.stdout, workdir / 'log.txt', label, start)
      _, status, usage = os.wait4(process.pid, 0)
      process.returncode = os.waitstatus_to_exitcode(status)
  except BaseException:
    process.kill()
    process.wait()
    raise
  finally:
    process.stdout.close()
  if process.returncode:
    raise TrialError(
      f'{label} ended with exit code {process.returncode}; the end of '
      f'{workdir / "log.txt"}:\n' + '\n'.join(tail)
    )
  return time.monotonic() - start, _peak_bytes(usage)


@contextlib.contextmanager
def _patience(pid: int, label: str) -> Iterator[None]:
  """Lets the stage `pid` end before SIGINT or SIGTERM has its usual effect.

  The first one is passed on, in case it reached us alone, and takes effect
  when the block is over. The second one takes effect at once.
  """
  raised: list[tuple[int, float]] = []  # the first signal, and when it came
  asking = (signal.SIGINT, signal.SIGTERM)
  before = {one: signal.getsignal(one) for one in asking}

  def restore() -> None:
    for one, handler in before.items():
      signal.signal(one, handler)

  def mark(number: int, _: types.FrameType | None) -> None:
    if raised:
      if time.monotonic() - raised[0][1] > _SAME:
        restore()
        signal.raise_signal(number)
      return
    raised.append((number, time.monotonic()))
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, number)
    # Not `print`: the signal may have come in the middle of one.
    text = f'\n{label}: waits until it has stopped; a second signal kills it\n'
    os.write(2, text.encode())

  for one in asking:
    signal.signal(one, mark)
  try:
    yield
  finally:
    restore()
  if raised:
    signal.raise_signal(raised[0][0])


def own_peak_bytes() -> int:
  """Largest resident memory of this process so far."""
  return _peak_bytes(resource.getrusage(resource.RUSAGE_SELF))


def _peak_bytes(usage: resource.struct_rusage) -> int:
  # Kilobytes on Linux, bytes on macOS: getrusage(2).
  return usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def _with_parent() -> Callable[[], None] | None:
  """On Linux, what makes a child die with us, even by SIGKILL."""
  if not sys.platform.startswith('linux'):
    return None
  prctl = ctypes.CDLL(None).prctl  # looked up before the fork
  return lambda: prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _follow(
  stream: BinaryIO, path: pathlib.Path, label: str, start: float
) -> list[str]:
  """Copies a stage's output to its log and shows the last line; its tail."""
  tail: list[str] = []
  live = sys.stdout.isatty()
  shown = start
  with open(path, 'a', encoding='utf-8') as log:
    for line, final in _lines(stream):
      if final:
        log.write(line + '\n')
        log.flush()
      if not line.strip():
        continue
      if final:
        tail = [*tail, line][-_TAIL:]
      now = time.monotonic()
      if live:
        width = shutil.get_terminal_size().columns - 1
        text = _progress(label, line, now - start)[:width]
        print(f'\r\x1b[K{text}', end='', flush=True)
      elif now - shown > _HEARTBEAT:
        print(_progress(label, line, now - start), flush=True)
        shown = now
  if live:
    print('\r\x1b[K', end='', flush=True)
  return tail


def _lines(stream: BinaryIO) -> Iterator[tuple[str, bool]]:
  """Lines as they come; False marks one that a carriage return overwrites."""
  rest = b''
  while chunk := os.read(stream.fileno(), 65536):
    *whole, rest = re.split(rb'([\r\n]+)', rest + chunk)
    for text, end in zip(whole[::2], whole[1::2]):
      yield text.decode(errors='replace'), b'\n' in end
  if rest:
    yield rest.decode(errors='replace'), True


def _progress(label: str, line: str, seconds: float) -> str:
  """A stage's own line, with its time and, unless the line has one, an ETA."""
  count = None if ' left' in line else _COUNT.search(line)
  left = ''
  if count and 0 < int(count[1]) <= int(count[2]):
    share = int(count[1]) / int(count[2])
    left = f', {clock(seconds * (1 - share) / share)} left'
  return f'{label:<24} {clock(seconds)}{left} | {line.strip()}'
