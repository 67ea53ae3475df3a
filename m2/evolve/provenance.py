"""What makes a result traceable: hashes, atomic files, machine, commit."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the source tree

# Asked of a process of its own: naming the device initialises the backend,
# which would hold the accelerator's memory while the stages need it.
_DEVICE = 'import jax; d = jax.devices(); print(len(d), d[0].device_kind)'


def canonical(value: Any) -> str:
  """The one JSON text of `value`: sorted keys, no spaces, no NaN."""
  return json.dumps(
    value,
    sort_keys=True,
    separators=(',', ':'),
    ensure_ascii=False,
    allow_nan=False,
  )


def digest(value: Any) -> str:
  """SHA-256 of the canonical JSON of `value`."""
  return hashlib.sha256(canonical(value).encode()).hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces `path` in one step: readers see the old file or the new one."""
  text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
  part = path.with_name(f'.{path.name}.{os.getpid()}')
  with open(part, 'w') as file:
    file.write(text + '\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(part, path)
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def difference(old: Any, new: Any, path: str = '') -> list[str]:
  """Dotted paths at which two JSON trees differ."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    found = []
    for name in sorted({*old, *new}):
      below = f'{path}.{name}' if path else name
      if name not in old or name not in new:
        found.append(below)
      else:
        found += difference(old[name], new[name], below)
    return found
  return [] if old == new and type(old) is type(new) else [path]


def fingerprint(paths: Sequence[pathlib.Path], base: pathlib.Path) -> str:
  """SHA-256 of the names (relative to `base`) and bytes of all files."""
  total = hashlib.sha256()
  files = set()
  for path in paths:
    found = path.rglob('*') if path.is_dir() else [path]
    files.update(file for file in found if file.is_file())
  for file in sorted(files):
    with open(file, 'rb') as stream:
      content = hashlib.file_digest(stream, 'sha256').hexdigest()
    total.update(f'{file.relative_to(base)}\0{content}\n'.encode())
  return total.hexdigest()


def evaluator(root: pathlib.Path = ROOT) -> str:
  """Fingerprint of the code that draws, plays, verifies, scores and gates.

  It covers `main.py`, every Python file of `m2` and of `pallas_kernels`, and
  the scaffolds, `configs/scaffold/*.md`. Arms may differ in the settings that
  `mutate.RULES` lists and in weights, neither of which is in these files. It
  does not cover settings, which have hashes of their own, libraries, or a
  `prompt.scaffold` of another folder.

  Args:
    root: of the source tree.
  """
  patterns = 'm2/**/*.py', 'pallas_kernels/**/*.py', 'configs/scaffold/*.md'
  files = [path for pattern in patterns for path in root.glob(pattern)]
  return fingerprint([root / 'main.py', *files], root)


def commit() -> str:
  """The git commit, with '+changes' if the tree differs; else 'unknown'."""
  git = ['git', '-C', str(ROOT)]
  try:
    if pathlib.Path(_ask([*git, 'rev-parse', '--show-toplevel'])) != ROOT:
      return 'unknown'  # an archive unpacked inside somebody's repository
    head = _ask([*git, 'rev-parse', 'HEAD'])
    changed = _ask([*git, 'status', '--porcelain', '--untracked-files=no'])
  except (OSError, subprocess.SubprocessError):
    return 'unknown'
  return head + ('+changes' if changed else '')


def environment() -> dict[str, Any]:
  """Python, jax, cores, platform, processor and device, to file with results.

  Returns:
    strings and ints; `device` is what JAX runs on, asked of another process.
  """
  return {
    'python': platform.python_version(),
    'jax': importlib.metadata.version('jax'),
    'cores': len(os.sched_getaffinity(0))
    if hasattr(os, 'sched_getaffinity')
    else os.cpu_count(),
    'platform': platform.platform(),
    'processor': _processor(),
    'device': _ask([sys.executable, '-c', _DEVICE]),
  }


def _processor() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    for line in info.read_text(errors='replace').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def _ask(command: Sequence[str]) -> str:
  return subprocess.run(
    command, capture_output=True, text=True, check=True, timeout=120
  ).stdout.strip()
