"""Loading and saving an FP8 checkpoint of real widths: rates and memory.

    python -m tests.bench.stream [--experts=64] [--layers=2] [--rounds=3]

Makes a checkpoint of a few GB beside the temporary files and deletes it after.
Each round reads the files in order with one thread (the disk), multiplies codes
by their scales into the leaf's axes with one thread (the core), and loads the
checkpoint as bfloat16 in a process of its own, whose peak memory is noted. What
the system cached of the files is dropped before each reading. The rates are of
bytes in files; `_cpu` are of the seconds that processors spent on it, which
others on the machine disturb less. The last rows save what was loaded.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from m2 import config
from m2.checkpoint import fp8, hf, shards
from m2.parallel import mesh as meshes
from tests.bench import record, step_time
from tests.checkpoint import synthetic

ROOT = pathlib.Path(__file__).resolve().parents[2]


def model(layers: int, experts: int) -> config.ModelConfig:
  """M2's widths with fewer layers, experts and words."""
  return dataclasses.replace(
    config.ModelConfig(), layers=layers, experts=experts, vocab=32_000
  )


def forget(path: pathlib.Path) -> None:
  """Drops what the system cached of the files."""
  for file in path.iterdir():
    with open(file, 'rb') as stream:
      os.fsync(stream.fileno())
      os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(path: pathlib.Path) -> float:
  """Bytes a second of reading the shards in order."""
  forget(path)
  data = bytearray(16 * 2**20)
  total, start = 0, time.perf_counter()
  for file in sorted(path.glob('*.safetensors')):
    with open(file, 'rb', buffering=0) as stream:
      while count := stream.readinto(data):
        total += count
  return total / (time.perf_counter() - start)


def core_rate(path: pathlib.Path, count: int = 64) -> dict[str, float]:
  """Bytes of codes a second that one thread turns into weights of a leaf.

  `core` writes them to memory that is new, as a loader must; `core_again` to
  the same place each time. `_cpu` counts the seconds that the thread ran.
  """
  tensors = shards.read(path)
  names = [n for n in tensors if n.endswith('w1.weight')][:count]
  loaded = [
    (tensors[n].array(), tensors[n + '_scale_inv'].array()) for n in names
  ]
  total = sum(code.nbytes for code, _ in loaded)
  shape = loaded[0][0].shape[::-1]
  out = np.empty((len(loaded), *shape), shards.DTYPES['BF16'])
  rates = {}
  for name, places in (('core', out), ('core_again', [out[0]] * len(out))):
    start, begun = time.perf_counter(), time.thread_time()
    for (code, scale), place in zip(loaded, places):
      fp8.dequantise(code.T, scale.T, place)
    rates[name] = total / (time.perf_counter() - start)
    rates[name + '_cpu'] = total / (time.thread_time() - begun)
  return rates


def load_apart(path: pathlib.Path, *words: str) -> dict[str, Any]:
  """Runs `child` in a process of its own."""
  run = subprocess.run(
    [sys.executable, '-m', 'tests.bench.stream', '--child', str(path), *words],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(run.stdout.splitlines()[-1])


def child(path: pathlib.Path, fp8_experts: bool, sizes: str, save: str) -> None:
  """Loads, perhaps saves, and prints seconds and bytes."""
  mesh = None
  if sizes:
    ways = [int(size) for size in sizes.split('x')]
    jax.config.update('jax_num_cpu_devices', math.prod(ways))
    mesh = meshes.make_mesh(config.MeshConfig(*ways))
  cfg = dataclasses.replace(
    hf.config(path), param_dtype='bfloat16', fp8_experts=fp8_experts
  )
  before = peak()
  start, begun = time.perf_counter(), time.process_time()
  params = jax.block_until_ready(hf.load(path, cfg, mesh))
  row = {'seconds': time.perf_counter() - start, 'before': before}
  row['cpu_seconds'] = time.process_time() - begun
  row['share'] = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(params)
    for shard in leaf.addressable_shards
    if shard.replica_id == 0  # CPU devices share the memory of replicas
  )
  row['peak'] = peak()
  if save:
    start = time.perf_counter()
    hf.save(params, save, cfg, dtype='fp8', shard_bytes=10**9)
    row |= {'save_seconds': time.perf_counter() - start, 'save_peak': peak()}
  print(json.dumps(row))


def peak() -> int:
  """The most memory that this process has had, in bytes."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmHWM:'):
      return int(line.split()[1]) * 1024
  raise RuntimeError('no VmHWM in /proc/self/status')


def measure(layers: int, experts: int, rounds: int) -> list[dict[str, Any]]:
  """All rows of the result."""
  with tempfile.TemporaryDirectory(prefix='stream-') as folder:
    path = pathlib.Path(folder) / 'checkpoint'
    size = synthetic.write(path, model(layers, experts), shard_bytes=10**9)
    print(f'{size / 1e9:.2f} GB of tensors', flush=True)
    rows = []
    for number in range(rounds):
      row = {'disk': disk_rate(path)} | core_rate(path)
      forget(path)
      row |= load_apart(path)
      row['load'] = size / row['seconds']
      row['load_cpu'] = size / row['cpu_seconds']
      row['of_slower'] = row['load'] / min(row['disk'], row['core'])
      rows.append({'case': 'load', 'round': number, 'bytes': size} | row)
      print(json.dumps(rows[-1]), flush=True)
    for held, word in (('experts in FP8', ['--fp8']), ('bfloat16', [])):
      target = str(pathlib.Path(folder) / held)
      row = load_apart(path, f'--save={target}', *word)
      row['save'] = size / row['save_seconds']
      row['codes_equal'] = same_codes(path, pathlib.Path(target))
      rows.append({'case': f'save from {held}', 'bytes': size} | row)
      print(json.dumps(rows[-1]), flush=True)
  return rows


def same_codes(one: pathlib.Path, other: pathlib.Path) -> float:
  """The share of FP8 tensors whose bytes are the same in both."""
  first, second = shards.read(one), shards.read(other)
  names = [name for name, x in first.items() if x.dtype == 'F8_E4M3']
  same = [
    first[name].array().tobytes() == second[name].array().tobytes()
    for name in names
  ]
  return sum(same) / len(same)


def main() -> None:
  """Measures and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--layers', type=int, default=2)
  parser.add_argument('--experts', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--child', type=pathlib.Path)
  parser.add_argument('--fp8', action='store_true')
  parser.add_argument('--mesh', default='')
  parser.add_argument('--save', default='')
  given = parser.parse_args()
  if given.child:
    child(given.child, given.fp8, given.mesh, given.save)
    return
  rows = measure(given.layers, given.experts, given.rounds)
  best = record.summary([row['of_slower'] for row in rows if 'load' in row])
  print(f'load: {best["median"]:.0%} of the slower of disk and core')
  path = record.write(
    'stream',
    step_time.device_name(),
    rows,
    command=f'python -m tests.bench.stream --layers={given.layers} '
    f'--experts={given.experts} --rounds={given.rounds}',
  )
  print(path)


if __name__ == '__main__':
  main()
