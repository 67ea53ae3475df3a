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
tokens, routing weights and matrices. All are compared before they are timed.
Communication alone is the strategy with its products left out. Useful bytes are
the rows a GPU must receive: a token's, once for each other GPU that it needs,
and a partial sum for each of these on the way back; as many backward. With L, P
and C seconds of the layer, its products and its communication alone, the share
hidden is (P + C - L) / C: negative where the layer takes more than both.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

# JAX would otherwise keep three quarters of the memory from the peer.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402  (reads the environment above when imported)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import pallas_kernels  # noqa: E402
from m2 import config  # noqa: E402
from m2.parallel import cost, exchange, experts, sharding  # noqa: E402
from m2.parallel import mesh as meshes  # noqa: E402
from tests.bench import record, timing  # noqa: E402

DEVICES = 2
TOLERANCE = 2e-2  # of bfloat16 results against each other, in norm
COMPARED = 8  # experts whose gradients are
DIRECTIONS = ('forward', 'both')
CUSTOM_CALLS = ('mosaic_gpu_v2', 'mosaic_gpu', 'ragged_all_to_all')
# Without it communication waits its turn on GPUs.
OVERLAP = {'xla_gpu_enable_latency_hiding_scheduler': True}


@dataclasses.dataclass(frozen=True)
class Shape:
  """One layer: sizes, and the kernel backend that runs it."""

  tokens: int
  width: int
  hidden: int
  experts: int
  top_k: int
  impl: str | None


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled: a contender, or the communication of a strategy."""

  name: str
  direction: str
  shape: Shape


def spread() -> jax.sharding.Mesh:
  cfg = config.MeshConfig(data=1, expert=DEVICES)
  return meshes.make_mesh(cfg, jax.devices()[:DEVICES])


def shapes(program: Program) -> list[jax.ShapeDtypeStruct]:
  """Tokens, choices, weights, matrices and, for both, the sum's gradient."""
  s = program.shape
  held, lead = s.experts, (s.tokens,)
  rows = wide = tall = None
  if program.name == 'products':
    held, lead = s.experts // DEVICES, (DEVICES * s.tokens,)
  elif program.name != 'single':
    lead, mesh = (DEVICES, s.tokens), spread()
    rows, wide, tall = (
      jax.NamedSharding(mesh, sharding.spec(*axes))
      for axes in (
        ('batch', 'sequence', None),
        ('expert', None, 'ffn'),
        ('expert', 'ffn', None),
      )
    )
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  x = bf16((*lead, s.width), sharding=rows)
  found = [
    x,
    jax.ShapeDtypeStruct((*lead, s.top_k), jnp.int32, sharding=rows),
    jax.ShapeDtypeStruct((*lead, s.top_k), jnp.float32, sharding=rows),
    bf16((held, s.width, s.hidden), sharding=wide),
    bf16((held, s.width, s.hidden), sharding=wide),
    bf16((held, s.hidden, s.width), sharding=tall),
  ]
  return found + [x] * (program.direction == 'both')


def function(program: Program) -> Callable:
  """The contender in jax."""
  impl = program.shape.impl
  kind, _, name = program.name.rpartition(' ')
  strategy, _, chunks = name.partition(':')

  def layer(x, index, weight, *matrices):
    if strategy == 'single':
      return pallas_kernels.experts(x, index, weight, *matrices, impl=impl)
    if strategy == 'products':
      s = program.shape
      held = s.experts // DEVICES
      choices = cost.room(s.tokens, s.top_k, held, DEVICES).choices
      return pallas_kernels.experts(
        x, index, weight, *matrices, rows=DEVICES * choices, impl=impl
      )
    return experts.expert_parallel(
      x,
      (index, weight),
      *matrices,
      strategy=strategy,
      chunks=int(chunks),
      impl=impl,
    )

  def run(*operands):
    part = exchange.layer if kind != 'communication' else without_products
    with mock.patch.object(exchange, 'layer', part):
      if program.direction == 'forward':
        return layer(*operands)
      x, index, weight, *matrices, dy = operands
      y, pull = jax.vjp(
        lambda x, weight, *ws: layer(x, index, weight, *ws),
        x,
        weight,
        *matrices,
      )
      return y, *pull(dy)

  return run


def without_products(x_PD, index_PX, weight_PX, *matrices, rows=None, impl):
  """Stands for the experts: rows as they came, times their weights."""
  del index_PX, matrices, rows, impl
  return (x_PD * weight_PX.sum(1, keepdims=True)).astype(x_PD.dtype)


def lowered(program: Program) -> bytes:
  """A contender as a module, made in a process of its own."""
  with jax.set_mesh(spread()) if ':' in program.name else mock.MagicMock():
    exported = jax.export.export(
      jax.jit(function(program)),
      disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call(x) for x in CUSTOM_CALLS
      ],
    )(*shapes(program))
  return bytes(exported.serialize())


def compiled(program: Program, module: bytes) -> Callable:
  """A module compiled for the devices here."""
  start = time.perf_counter()
  call = jax.jit(jax.export.deserialize(bytearray(module)).call)
  on_gpu = jax.default_backend() == 'gpu'
  with jax.set_mesh(spread()) if ':' in program.name else mock.MagicMock():
    found = call.lower(*shapes(program)).compile(
      compiler_options=OVERLAP if on_gpu else None
    )
  took = time.perf_counter() - start
  print(f'  {program.name} {program.direction}: {took:.0f} s', flush=True)
  return found


def compile_all(
  programs: Sequence[Program], workers: int
) -> dict[Program, Callable]:
  """All programs: lowered by processes, since that is Python, then compiled.

  Args:
    programs: what to compile.
    workers: processes, and threads.
  """
  start = time.perf_counter()
  context = multiprocessing.get_context('spawn')
  with (
    concurrent.futures.ProcessPoolExecutor(workers, context) as processes,
    concurrent.futures.ThreadPoolExecutor(workers) as threads,
  ):
    modules = {processes.submit(lowered, x): x for x in programs}
    futures = {}
    for done in concurrent.futures.as_completed(modules):
      program = modules[done]
      futures[program] = threads.submit(compiled, program, done.result())
    found = {program: future.result() for program, future in futures.items()}
  took = time.perf_counter() - start
  print(f'{len(found)} programs in {took:.0f} s', flush=True)
  return found


class Operands:
  """The arrays of one shape, where each contender wants them."""

  def __init__(self, shape: Shape):
    """Draws both devices' tokens, and all matrices on the first device."""
    self.shape = s = shape
    keys = jax.random.split(jax.random.key(s.tokens), 7)
    total = DEVICES * s.tokens
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
    held = s.experts // DEVICES
    placed = shapes(Program('gather:1', 'both', shape))
    self.split = [
      jax.device_put(z.reshape(want.shape), want.sharding)
      for z, want in zip([*self.tokens, *self.matrices, self.dy], placed)
    ]
    self.half = [z[:held] for z in self.matrices]

  def of(self, program: Program) -> list[jax.Array]:
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
    index = np.asarray(self.tokens[1]).reshape(DEVICES, self.shape.tokens, -1)
    device = index // (self.shape.experts // DEVICES)
    copies = sum(
      (device[own] == other).any(1).sum()
      for own in range(DEVICES)
      for other in range(DEVICES)
      if own != other
    )
    times = 2 if direction == 'forward' else 4
    return float(times * copies / DEVICES * 2 * self.shape.width)


def compare(got, wants) -> float:
  """Largest error of a layer over devices, in norm, against one device."""
  y, dx, dweight, *dmatrices = got
  pairs = [
    (z.reshape(-1, z.shape[-1]), jnp.concatenate([want[i] for want in wants]))
    for i, z in enumerate((y, dx, dweight))
  ]
  for i, z in enumerate(dmatrices, 3):
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
  shape: Shape, names: Sequence[str], programs: Mapping[Program, Callable]
) -> list[dict[str, Any]]:
  """Rows of one shape, forward and both."""
  operands = Operands(shape)
  single = programs[Program('single', 'both', shape)]
  wants = [single(*operands.single(device)) for device in range(DEVICES)]
  errors = {}
  for name in names:
    program = Program(name, 'both', shape)
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
    seconds = timing.race(calls)
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
    shape.experts // DEVICES, DEVICES, 2,
  )  # fmt: skip
  choice = cost.choose(layer, jax.devices()[0].device_kind)
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
    'devices': DEVICES,
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
    default=['gather:1', 'gather:2', 'ragged:1', 'exchange:1', 'exchange:2'],
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
  every = [Shape(tokens, *sizes) for tokens in flags.tokens]
  programs = compile_all(
    [Program(x, way, s) for s in every for way in DIRECTIONS for x in names],
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
      command='python -m tests.bench.expert_parallel',
      folder=flags.out,
    )
  print(path)


if __name__ == '__main__':
  main()
