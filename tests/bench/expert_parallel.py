"""The expert layer over two devices, against one device and PyTorch over NCCL.

    python -m tests.bench.expert_parallel [--tokens T ...] [--out FOLDER]

Needs two GPUs of one host; `--peer` names a python that has PyTorch, if this
one has not. Contenders, at T tokens a device, each with its top experts drawn
uniformly:

  single          one GPU that holds all experts, on its T tokens
  products        one GPU that holds half of the experts, on the 2 T tokens that
                  reach it with two GPUs: the layer without communication
  STRATEGY:CHUNKS the layer over both GPUs, each with half of the experts
  torch           the same by PyTorch and NCCL, in processes of its own

`forward` starts from given choices and weights; `both` adds the gradients of
tokens, routing weights and matrices. All are compared before they are timed;
each runs for SETTLING before each of its rounds, since two GPUs at work are
held at their power limit, where a round would tell of what ran before it.
Communication alone is the strategy with its products left out; of `direct`, its
rows there and, as sums of one row, back. Useful bytes are the rows a GPU must
receive: a token's, once for each other GPU that it needs, and a partial sum for
each of these on the way back; as many backward. With L, P and C seconds of the
layer, its products and its communication alone, the share hidden is (P + C - L)
/ C: negative where the layer takes more than both.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# JAX would otherwise keep three quarters of the memory from the peer.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402  (reads the environment above when imported)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from m2.parallel import cost  # noqa: E402
from tests.bench import expert_programs, record, timing  # noqa: E402

TOLERANCE = 2e-2  # of bfloat16 results against each other, in norm
COMPARED = 8  # experts whose gradients are
DIRECTIONS = ('forward', 'both')
SETTLING = 0.2  # seconds; power limits set in within 0.15


class Operands:
  """The arrays of one shape, where each contender wants them."""

  def __init__(self, shape: expert_programs.Shape):
    """Draws both devices' tokens, and all matrices on the first device."""
    self.shape = s = shape
    keys = jax.random.split(jax.random.key(s.tokens), 7)
    total = expert_programs.DEVICES * s.tokens
    score = jax.random.uniform(keys[0], (total, s.experts))
    _, index = jax.lax.top_k(score, s.top_k)
    weight = jax.random.uniform(keys[1], index.shape, minval=0.1)

    def normal(key, *dims, scale=1.0):
      return scale * jax.random.normal(key, dims, jnp.bfloat16)

    wide, tall = (s.experts, s.width, s.hidden), (s.experts, s.hidden, s.width)
    self.tokens = [
      normal(keys[2], total, s.width),
      index.astype(jnp.int32),
      weight / weight.sum(1, keepdims=True),
    ]
    self.dy = normal(keys[3], total, s.width)
    self.matrices = [
      normal(keys[4], *wide, scale=0.02),
      normal(keys[5], *wide, scale=0.02),
      normal(keys[6], *tall, scale=0.02),
    ]
    held = s.experts // expert_programs.DEVICES
    placed = expert_programs.shapes(
      expert_programs.Program('gather:1', 'both', shape)
    )
    self.split = [
      jax.device_put(z.reshape(want.shape), want.sharding)
      for z, want in zip([*self.tokens, *self.matrices, self.dy], placed)
    ]
    self.half = [z[:held] for z in self.matrices]

  def of(self, program: expert_programs.Program) -> list[jax.Array]:
    """The operands of one program."""
    end = None if program.direction == 'both' else -1
    if program.name == 'single':
      return self.single(0)[:end]
    if program.name == 'products':
      return [*self.tokens, *self.half, self.dy][:end]
    return self.split[:end]

  def single(self, device: int) -> list[jax.Array]:
    """All experts and one device's tokens."""
    own = slice(device * self.shape.tokens, (device + 1) * self.shape.tokens)
    tokens = [z[own] for z in self.tokens]
    return [*tokens, *self.matrices, self.dy[own]]

  def useful_bytes(self, direction: str) -> float:
    """Bytes of rows that a device must receive, the mean of the devices."""
    index = np.asarray(self.tokens[1]).reshape(
      expert_programs.DEVICES, self.shape.tokens, -1
    )
    device = index // (self.shape.experts // expert_programs.DEVICES)
    copies = sum(
      (device[own] == other).any(1).sum()
      for own in range(expert_programs.DEVICES)
      for other in range(expert_programs.DEVICES)
      if own != other
    )
    times = 2 if direction == 'forward' else 4
    return float(
      times * copies / expert_programs.DEVICES * 2 * self.shape.width
    )


def compare(got, wants) -> float:
  """Largest error of a layer over devices, in norm, against one device."""
  y, dx, dweight, *dmatrices = got
  pairs = [
    (z.reshape(-1, z.shape[-1]), jnp.concatenate([want[i] for want in wants]))
    for i, z in enumerate((y, dx, dweight))
  ]
  for i, z in enumerate(map(np.asarray, dmatrices), 3):
    ends = slice(0, COMPARED), slice(-COMPARED, None)
    pairs += [
      (z[own], sum(want[i][own].astype(jnp.float32) for want in wants))
      for own in ends
    ]
  errors = []
  for a, b in pairs:
    a, b = (np.asarray(z).astype(np.float32) for z in (a, b))
    errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
  return max(errors)


def measure(
  shape: expert_programs.Shape,
  names: Sequence[str],
  programs: Mapping[expert_programs.Program, Callable],
) -> list[dict[str, Any]]:
  """Rows of one shape, forward and both."""
  operands = Operands(shape)
  single = programs[expert_programs.Program('single', 'both', shape)]
  wants = [
    single(*operands.single(device))
    for device in range(expert_programs.DEVICES)
  ]
  errors = {}
  for name in names:
    program = expert_programs.Program(name, 'both', shape)
    errors[name] = compare(programs[program](*operands.of(program)), wants)
    if not errors[name] < TOLERANCE:
      raise RuntimeError(f'{name} differs from one device: {errors[name]:.2e}')
  del wants
  rows = []
  for direction in DIRECTIONS:
    calls = {
      program.name: functools.partial(run, *operands.of(program))
      for program, run in programs.items()
      if (program.shape, program.direction) == (shape, direction)
    }
    seconds = timing.race(calls, before=SETTLING)
    useful = operands.useful_bytes(direction)
    rows.append(row(shape, direction, names, seconds, useful, errors))
  return rows


def row(shape, direction, names, seconds, useful, errors) -> dict[str, Any]:
  """One line of results."""
  median = {name: found['median'] for name, found in seconds.items()}
  strategies = dict.fromkeys(name.partition(':')[0] for name in names)
  alone = {x: median[f'communication {x}:1'] for x in strategies}
  layer = cost.Layer(
    shape.tokens, shape.top_k, shape.width, shape.hidden,
    shape.experts // expert_programs.DEVICES, expert_programs.DEVICES, 2,
  )  # fmt: skip
  kind = jax.devices()[0].device_kind
  choice = cost.choose(layer, kind, strategies=tuple(strategies))
  hidden = {
    name: (median['products'] + alone[name.partition(':')[0]] - median[name])
    / alone[name.partition(':')[0]]
    for name in names
  }
  print(f'{direction} T={shape.tokens} a device', flush=True)
  for name in ('single', 'products', *names):
    more = ''
    if name in names:
      more = f', hidden {100 * hidden[name]:4.0f}%'
    share = median['single'] / median[name]
    print(f'  {name:12} {1e3 * median[name]:8.3f} ms {100 * share:5.1f}%{more}')
  for name, took in alone.items():
    print(
      f'  {name:12} alone {1e3 * took:.3f} ms {useful / took / 1e9:.0f} GB/s'
    )
  return {
    'direction': direction,
    **dataclasses.asdict(shape),
    'devices': expert_programs.DEVICES,
    'seconds': seconds,
    'of_single': {name: median['single'] / median[name] for name in names},
    'useful_bytes': useful,
    'useful_bytes_per_second': {x: useful / took for x, took in alone.items()},
    'hidden': hidden,
    'errors': errors,
    'cost_model': choice._asdict(),
  }


def peer(flags) -> dict[str, Any] | None:
  """What PyTorch takes, in processes that end before ours begin."""
  if flags.peer == sys.executable and not importlib.util.find_spec('torch'):
    print('no PyTorch here, so no peer')
    return None
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, 'peer.json')
    sizes = '--width', '--hidden', '--experts', '--top-k'
    subprocess.run(
      [
        flags.peer,
        pathlib.Path(__file__).with_name('expert_parallel_torch.py'),
        *('--tokens', *map(str, flags.tokens), '--out', out),
        *(
          word
          for name in sizes
          for word in (name, str(vars(flags)[name[2:].replace('-', '_')]))
        ),
        *(['--cpu'] if flags.cpu_peer else []),
      ],
      check=True,
    )
    return json.loads(out.read_text())


def with_peer(row: dict[str, Any], found: dict[str, Any] | None) -> None:
  """Adds the peer's seconds to a row."""
  for theirs in found['rows'] if found else ():
    if all(theirs[x] == row[x] for x in ('tokens', 'direction')):
      row['seconds']['torch'] = theirs['seconds']
      share = row['seconds']['single']['median'] / theirs['seconds']['median']
      row['of_single']['torch'] = share
      print(
        f'{row["direction"]} T={row["tokens"]}: torch '
        f'{1e3 * theirs["seconds"]["median"]:.3f} ms, {100 * share:.1f}%'
      )


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=record.RESULTS)
  parser.add_argument('--tokens', type=int, nargs='+', default=[8192, 16384])
  parser.add_argument('--width', type=int, default=3072)
  parser.add_argument('--hidden', type=int, default=1536)
  parser.add_argument('--experts', type=int, default=256)
  parser.add_argument('--top-k', type=int, default=8)
  parser.add_argument('--impl', default='mosaic_gpu')
  parser.add_argument('--workers', type=int, default=14)
  parser.add_argument('--peer', default=sys.executable)
  parser.add_argument('--cpu-peer', action='store_true')
  parser.add_argument(
    '--contenders',
    nargs='+',
    default=[
      *('direct:1', 'gather:1', 'gather:2', 'ragged:1'),
      *('exchange:1', 'exchange:2'),
    ],
    help='STRATEGY:CHUNKS',
  )
  return parser.parse_args()


def main() -> None:
  flags = arguments()
  found = peer(flags)
  strategies = dict.fromkeys(x.partition(':')[0] for x in flags.contenders)
  names = [
    'single',
    'products',
    *(f'communication {x}:1' for x in strategies),
    *flags.contenders,
  ]
  sizes = flags.width, flags.hidden, flags.experts, flags.top_k, flags.impl
  every = [expert_programs.Shape(tokens, *sizes) for tokens in flags.tokens]
  programs = expert_programs.compile_all(
    [
      expert_programs.Program(x, way, s)
      for s in every
      for way in DIRECTIONS
      for x in names
    ],
    flags.workers,
  )
  rows = [{'direction': 'peer', 'torch': found['torch']}] if found else []
  for shape in every:
    fresh = measure(shape, flags.contenders, programs)
    for each in fresh:
      with_peer(each, found)
    rows += fresh
    path = record.write(
      'expert_parallel',
      jax.devices()[0].device_kind,
      rows,
      command=record.command('expert_parallel'),
      folder=flags.out,
    )
  print(path)


if __name__ == '__main__':
  main()
