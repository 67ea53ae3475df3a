"""Runs one config: `python main.py --config=configs/m2.py:tiny`.

Results go to `--workdir`, with a `config.json` that `configs/rerun.py` repeats;
`unread.json` lists the settings that no code read, once the run has ended.
Settings that make no sense stop here in one line, before anything is compiled.
Compiled programs are kept for later runs; `JAX_COMPILATION_CACHE_DIR= python
main.py ...` goes without.
"""

import contextlib
import fcntl
import importlib
import json
import os
import pathlib
import re
import sys
import traceback

try:
  from absl import app, flags, logging
  from ml_collections import config_flags
except ImportError as error:
  sys.exit(
    f'error: {error}: `bash launch/env.sh` makes the environment, and '
    '`source .venv/bin/activate` enters it'
  )

from configs import common
from m2 import config as settings

CONFIG = config_flags.DEFINE_config_file('config', None, 'FILE[:words,a.b=1]')
WORKDIR = flags.DEFINE_string('workdir', None, 'Default: runs/<config>.')

# Mode -> module whose `run(config, workdir)` it is; imported when chosen.
RUNS = {
  'pretrain': 'm2.train.loop',
  'sft': 'm2.train.loop',
  'rl': 'm2.forge.loop',
  'eval': 'm2.forge.evaluate',
  'serve': 'm2.forge.serve',
  'evolve': 'm2.evolve.loop',
  'convert': 'm2.checkpoint.convert',
  'quickstart': 'm2.stages',
  'plan': 'm2.plan.run',
}
# Modes that run as one process on every host; the others are one process.
ON_HOSTS = ('pretrain', 'sft')


def main(_) -> None:
  """Freezes the config, keeps it in the workdir, runs its mode."""
  for name, value in common.compilation_cache().items():
    os.environ.setdefault(name, value)  # before jax is imported
  try:
    config = settings.RunConfig.from_config(CONFIG.value)
    if '://' in (WORKDIR.value or ''):
      raise ValueError(
        f'--workdir={WORKDIR.value} is no folder of a disk: mount the bucket '
        '(launch/README.md) and give its folder'
      )
    rank = join(config.mode)
  except ValueError as error:
    stop(error, 2)
  # A plan beside the run that it is of, whose config.json it must not replace.
  beside = '-plan' if config.mode == 'plan' else ''
  workdir = pathlib.Path(
    WORKDIR.value or common.workdir(CONFIG.config_filename) + beside
  )
  kept = workdir / 'config.json'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if rank == 0 and in_use(workdir):
      stop(
        f'{workdir} is in use by another process; give each run its own '
        '--workdir',
        1,
      )
    if rank == 0:
      put_back(kept)  # after a run that was killed
      put_aside(kept)
      keep(kept, (CONFIG.value.to_json(indent=2) + '\n').encode())
  except OSError as error:
    stop(f'--workdir={workdir}: {error}', 1)
  try:
    with contextlib.ExitStack() as undo:
      if rank == 0:
        undo.callback(put_back, kept)
      run(config, workdir)
      undo.pop_all()
  except KeyboardInterrupt:  # training takes it itself: m2/train/signals.py
    stop('interrupted; the same command goes on', 130)
  except Exception as error:
    details = workdir / (f'error-{rank}.txt' if rank else 'error.txt')
    ours = type(error).__module__.startswith('m2.')
    refused = isinstance(error, ValueError | NotImplementedError)
    with contextlib.suppress(OSError):  # the disk may be what failed
      text = traceback.format_exc()
      details.write_text(text, encoding='utf-8', errors='backslashreplace')
    if not ours and not refused and not isinstance(error, OSError):
      traceback.print_exc()  # a bug, not a message to the user
    notes = getattr(error, '__notes__', ())
    # Those of jax and Grain have several lines, on frames that they hide.
    where = ''.join(f'{note}; ' for note in notes if '\n' not in note)
    code = 2 if refused else 1
    stop(f'{error} ({where}details: {details})', code)
  if rank == 0:
    unread = settings.unread(config)
    with contextlib.suppress(OSError):
      aside(kept).unlink(missing_ok=True)
      keep(workdir / 'unread.json', json.dumps(unread).encode())
    if named := [path for path in unread if given(path)]:
      print(f'no code read these settings: {", ".join(named)}', file=sys.stderr)


def join(mode: str) -> int:
  """Joins the other processes of the run, if any; the number of this one.

  Raises:
    ValueError: the environment speaks of several, but not how or not for this
      mode.
  """
  found = common.hosts(os.environ)
  if found is None:
    return 0
  if mode not in ON_HOSTS:
    raise ValueError(
      f'mode={mode} runs as one process, and the environment speaks of several '
      f'(see configs/common.py); only {", ".join(ON_HOSTS)} run on many hosts'
    )
  from m2.parallel import hosts

  return hosts.join(*found)


def run(config: settings.RunConfig, workdir: pathlib.Path) -> None:
  """Runs the mode's module; fine-tuning is given its demonstrations."""
  module, given = importlib.import_module(RUNS[config.mode]), ()
  if config.mode == 'sft' and config.data.source == 'tasks':
    from m2.agents import whitebox
    from m2.envs import tasks

    system, tools = whitebox.opening(config.prompt)
    count, seed = config.data.examples, config.seed
    given = (
      tasks.Demonstrations(
        config.tasks, count, seed, system=system, tools=tools
      ),
    )
  module.run(config, workdir, *given)


def parse(argv: list[str]) -> list[str]:
  """Reads flags, config file and overrides; wrong ones end in one line."""
  try:
    left = flags.FLAGS(argv)
    config = CONFIG.value is not None and CONFIG.value.to_dict()
  except Exception as error:  # config files are code: anything may come
    stop(common.explain(error, argv), 2)
  if left[1:]:
    stop(f'{left[1]!r} is no flag: settings are --config.NAME=VALUE', 2)
  if not config:
    stop('give --config=FILE, such as --config=configs/m2.py:tiny', 2)
  logging.set_verbosity(logging.WARNING)
  return left


def given(path: str) -> bool:
  """Whether the command line sets the leaf: by a flag or in the argument."""
  leaf = rf'(:|,|--?config\.){re.escape(path)}(=|$)'
  return any(re.search(leaf, word.replace(' ', '')) for word in sys.argv)


def in_use(workdir: pathlib.Path) -> bool:
  """Whether another run holds the lock of m2/checkpoint/store.py."""
  with contextlib.suppress(FileNotFoundError):
    with (workdir / 'checkpoints' / '.lock').open() as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except BlockingIOError:
        return True
  return False


def sizes(workdir: pathlib.Path) -> dict[str, int]:
  """Bytes of what runs, and stages below them, record step by step."""
  found = {}
  for file in workdir.rglob('*.jsonl'):
    with contextlib.suppress(FileNotFoundError):  # gone, or a link to nothing
      found[str(file.relative_to(workdir))] = file.stat().st_size
  return found


def aside(kept: pathlib.Path) -> pathlib.Path:
  """Where the config before lies while a run has not ended."""
  return kept.with_name(f'{kept.name}.before')


def put_aside(kept: pathlib.Path) -> None:
  """Keeps a config, if there is one, below the sizes of what is recorded."""
  if kept.exists():
    recorded = json.dumps(sizes(kept.parent)).encode()
    keep(aside(kept), recorded + b'\n' + kept.read_bytes())


def put_back(kept: pathlib.Path) -> None:
  """Puts it back if nothing was recorded since: it is of what was."""
  with contextlib.suppress(OSError):
    if aside(kept).exists():
      recorded, _, before = aside(kept).read_bytes().partition(b'\n')
      with contextlib.suppress(ValueError):  # cut short: nothing to go by
        if sizes(kept.parent) == json.loads(recorded):
          keep(kept, before)
      aside(kept).unlink()


def keep(path: pathlib.Path, data: bytes) -> None:
  """Writes a file, whole or not at all."""
  fresh = path.with_name(f'{path.name}.partial')
  fresh.write_bytes(data)
  fresh.replace(path)


def stop(reason: object, code: int) -> None:
  """Ends the process with one line on standard error; tells other hosts."""
  print(f'error: {reason}', file=sys.stderr)
  if hosts := sys.modules.get('m2.parallel.hosts'):
    hosts.leave(str(reason), code)  # ends the process, if there are others
  sys.exit(code)


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
