"""One form for every measurement kept: who measured, on what, with what.

A result is a JSON file `results/<bench>-<device>.json`; README's tables are
made from these files (`tests/bench/readme.py`), never typed.
"""

import importlib.metadata
import json
import pathlib
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from m2.evolve import provenance

RESULTS = pathlib.Path(__file__).parent / 'results'
VERSIONS = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


def summary(values: Sequence[float]) -> dict[str, float | int]:
  """Median, extremes and count of repeated measurements."""
  if not values:
    raise ValueError('nothing was measured')
  return {
    'n': len(values),
    'median': statistics.median(values),
    'min': min(values),
    'max': max(values),
  }


def slug(device: str) -> str:
  """A device's name as part of a file name: letters, digits and dashes."""
  return re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-') or 'unknown'


def command(bench: str) -> str:
  """The words that started this benchmark, but for where results go."""
  words = ['python', '-m', f'tests.bench.{bench}']
  given = iter(sys.argv[1:])
  for word in given:
    if word == '--out':
      next(given)
    elif not word.startswith('--out='):
      words.append(word)
  return ' '.join(words)


def write(
  bench: str,
  device: str,
  rows: Sequence[dict[str, Any]],
  *,
  command: str,
  folder: pathlib.Path = RESULTS,
  part: str = '',
) -> pathlib.Path:
  """Writes one result file, replacing that of the same bench, device and part.

  Args:
    bench: name of the benchmark.
    device: what it ran on, such as 'NVIDIA H100' or a processor's name.
    rows: what was measured, one dictionary a case.
    command: the words that measure it again.
    folder: where the file goes.
    part: names a run that stands beside the others of its bench and device.

  Returns:
    The file's path.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{bench}-{slug(f"{device} {part}")}.json'
  provenance.write_json(
    path,
    {
      'bench': bench,
      'device': device,
      'platform': platform.platform(),
      'python': platform.python_version(),
      'versions': {x: importlib.metadata.version(x) for x in VERSIONS},
      'commit': provenance.commit(),
      'command': command,
      'rows': list(rows),
    },
  )
  return path


def read(bench: str, folder: pathlib.Path = RESULTS) -> list[dict[str, Any]]:
  """All results of one benchmark, in the order of their file names."""
  paths = sorted(folder.glob(f'{bench}-*.json'))
  return [json.loads(path.read_text()) for path in paths]
