"""The whole expert layer at the shapes of M2, against peers.

    python -m tests.bench.moe [--tokens T ...] [--routings R ...]
      [--peers NAME ...] [--part NAME] [--out FOLDER]

Needs one Hopper GPU and PyTorch. Liger's fused MoE and SonicMoE, on matrices in
the order that each wants, and tokamax, with the tiles that it picks without a
search, take part where they are installed (`moe_peers.py`). `forward` starts
from given choices and weights: plan, gather, gate and up projections with
SwiGLU, down projection, combination. `both` adds the gradients of the tokens,
of the routing weights and of the three matrices. The first peer is what PyTorch
users write: a sort, `grouped_mm` and element-wise glue, run eagerly (`torch`)
and compiled (`torch.compile`).

Every contender's output is compared before it is timed, and all our gradients;
results are written as they come, with `--part` to a file of that name beside
the device's. Contenders take turns, round by round, since a warm GPU lowers its
clock; a round is a few calls, timed by the host until the last has finished.
`saved` is what a contender keeps for the backward pass, beside its inputs and
weights. `floor` is the larger of the operations at the rate of a dense product
and of the bytes that a fused layer must move, each once, at the rate of a copy,
both measured in the same run.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

# JAX would otherwise keep three quarters of the memory from PyTorch.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402  (reads the environment above when imported)
import jax.numpy as jnp  # noqa: E402
import torch  # noqa: E402

from pallas_kernels.experts import api, mosaic_gpu  # noqa: E402
from tests.bench import moe_peers, record, timing  # noqa: E402

WIDE, HIDDEN, TOP_K = 3072, 1536, 8
ROUTINGS = ('uniform', 'zipf', 'eight')
TOLERANCE = 2e-2  # of bfloat16 results against each other, in norm


@dataclasses.dataclass(frozen=True)
class Case:
  """One layer and one routing of tokens to its experts."""

  tokens: int
  experts: int
  routing: str

  def flops(self, direction: str) -> int:
    forward = 2 * self.tokens * TOP_K * 3 * WIDE * HIDDEN
    return forward * (3 if direction == 'both' else 1)

  def bytes(self, direction: str, active: int) -> int:
    """What a fused layer reads and writes, each array once.

    Args:
      direction: forward or both.
      active: experts that have rows.
    """
    rows, matrix = self.tokens * TOP_K, 3 * WIDE * HIDDEN
    x, h, a, y = (
      2 * n
      for n in (
        self.tokens * WIDE, 2 * rows * HIDDEN, rows * HIDDEN, rows * WIDE,
      )
    )  # fmt: skip
    forward = 2 * active * matrix + 2 * x + 2 * a + 2 * y
    if direction == 'forward':
      return forward
    # Pre-activations are written; weights read again, gradients written.
    gradients = 2 * (active + self.experts) * matrix
    return forward + h + gradients + 4 * x + h + 2 * (h + a) + 2 * y


def operands(case: Case) -> dict[str, jax.Array]:
  """Tokens, their choices by the named law, weights and matrices."""
  keys = jax.random.split(jax.random.key(case.tokens + case.experts), 7)
  logit_ME = jax.random.gumbel(keys[0], (case.tokens, case.experts))
  if case.routing == 'zipf':
    logit_ME -= 0.5 * jnp.log(jnp.arange(1.0, case.experts + 1))
  if case.routing == 'eight':
    logit_ME += jnp.where(jnp.arange(case.experts) < TOP_K, 1e3, 0.0)
  _, index_MX = jax.lax.top_k(logit_ME, TOP_K)
  weight_MX = jax.random.uniform(keys[1], index_MX.shape, minval=0.1)

  def normal(key, *shape, scale=1.0):
    return scale * jax.random.normal(key, shape, jnp.bfloat16)

  wide, tall = (case.experts, WIDE, HIDDEN), (case.experts, HIDDEN, WIDE)
  return {
    'x': normal(keys[2], case.tokens, WIDE),
    'index': index_MX.astype(jnp.int32),
    'weight': weight_MX / weight_MX.sum(1, keepdims=True),
    'wi_0': normal(keys[3], *wide, scale=0.02),
    'wi_1': normal(keys[4], *wide, scale=0.02),
    'wo': normal(keys[5], *tall, scale=0.02),
    'dy': normal(keys[6], case.tokens, WIDE),
  }


def pull_back(layer: Callable, x, index, weight, wi_0, wi_1, wo, dy):
  """Output and gradients of a layer."""
  y, pull = jax.vjp(
    lambda x, weight, *ws: layer(x, index, weight, *ws),
    x,
    weight,
    wi_0,
    wi_1,
    wo,
  )
  return y, *pull(dy)


@functools.cache
def program(name: str, direction: str, tokens: int, experts: int) -> Callable:
  """A compiled layer of ours, or None where it does not fit."""
  layer = functools.partial(LAYERS[name])
  run = layer if direction == 'forward' else functools.partial(pull_back, layer)
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  wide, tall = (experts, WIDE, HIDDEN), (experts, HIDDEN, WIDE)
  shapes = [
    bf16((tokens, WIDE)),
    jax.ShapeDtypeStruct((tokens, TOP_K), jnp.int32),
    jax.ShapeDtypeStruct((tokens, TOP_K), jnp.float32),
    bf16(wide),
    bf16(wide),
    bf16(tall),
  ]
  if direction == 'both':
    shapes.append(bf16((tokens, WIDE)))
  return timing.compile(f'moe-{name}-{direction}', run, *shapes)


def first(result):
  """The tokens of what `forward` or `both` gave."""
  return result[0] if isinstance(result, tuple) else result


def ours(x, index, weight, wi_0, wi_1, wo):
  return api.experts(x, index, weight, wi_0, wi_1, wo, impl='mosaic_gpu')


LAYERS = {'mosaic_gpu': ours, 'tokamax': moe_peers.tokamax}


def saved_by_ours(name: str, case: Case) -> int:
  """The same of a layer in JAX, and its input, which a remat would keep."""

  def residuals(x, index, weight, *ws):
    _, pull = jax.vjp(
      lambda x, weight, *ws: LAYERS[name](x, index, weight, *ws), x, weight, *ws
    )
    return pull

  shapes = jax.eval_shape(lambda: operands(case))
  names = 'x', 'index', 'weight', 'wi_0', 'wi_1', 'wo'
  pull = jax.eval_shape(residuals, *(shapes[name] for name in names))
  kept = jax.tree.leaves(pull)
  weights = {shapes[name].shape for name in names[3:]}
  return sum(z.size * z.dtype.itemsize for z in kept if z.shape not in weights)


def check(name: str, got, want) -> None:
  """Raises RuntimeError where two contenders' tokens differ."""
  got, want = (jnp.asarray(z).astype(jnp.float32) for z in (got, want))
  error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
  if not error < TOLERANCE:
    raise RuntimeError(f'{name} differs from PyTorch by {error:.2e}')


def compare(ours_both, theirs_both) -> None:
  """Checks output and all gradients; PyTorch's first matrices are one."""
  y, dx, dweight, dwi_0, dwi_1, dwo = ours_both
  their_y, their_dx, their_dweight, dw13, their_dwo = theirs_both
  halves = dw13.chunk(2, 2)
  pairs = {
    'y': (y, their_y),
    'dx': (dx, their_dx),
    'dweight': (dweight, their_dweight),
    'dwi_0': (dwi_0, halves[0]),
    'dwi_1': (dwi_1, halves[1]),
    'dwo': (dwo, their_dwo),
  }
  for name, (got, want) in pairs.items():
    if name in ('dwi_0', 'dwi_1', 'dwo'):  # as many experts as fit beside
      got, want = got[:8], want[:8]
    check(name, got, jnp.from_dlpack(want.detach().contiguous()))


def measure(
  case: Case, rates: Mapping[str, float], wanted: Collection[str]
) -> Iterator[dict[str, Any]]:
  """Rows of the table: forward, and both."""
  arrays = operands(case)
  active = int((jnp.bincount(arrays['index'].reshape(-1)) > 0).sum())
  inputs = list(arrays.values())
  usual = case.experts == 256 and case.routing == 'uniform'
  compiles = usual and case.tokens in moe_peers.COMPILED
  theirs = moe_peers.calls(arrays, wanted, compiled=compiles)
  layers = [name for name in LAYERS if name in ('mosaic_gpu', *wanted)]
  compiled = {
    (name, direction): program(name, direction, case.tokens, case.experts)
    for name in layers
    for direction in ('forward', 'both')
  }
  compare(compiled['mosaic_gpu', 'both'](*inputs), theirs['torch', 'both']())
  for direction in ('forward', 'both'):
    given = inputs if direction == 'both' else inputs[:-1]
    calls = {
      name: functools.partial(run, *given)
      for (name, way), run in compiled.items()
      if way == direction
    }
    calls |= {
      name: run for (name, way), run in theirs.items() if way == direction
    }
    want = jnp.from_dlpack(first(calls['torch']()).detach())
    for name, call in calls.items():
      got = first(call())
      got = got if isinstance(got, jax.Array) else jnp.from_dlpack(got.detach())
      check(name, got, want)
    found = row(case, direction, timing.race(calls), rates, active)
    if direction == 'both':
      kept = {name: saved_by_ours(name, case) for name in layers} | {
        name: run() for (name, way), run in theirs.items() if way == 'saved'
      }
      found['saved_bytes'] = kept
      kept = {name: f'{z / 2**20:.0f} MiB' for name, z in kept.items()}
      print('  saved:', kept, flush=True)
    yield found


def row(case, direction, seconds, rates, active) -> dict[str, Any]:
  """One line of results."""
  mine = seconds['mosaic_gpu']['median']
  floor = max(
    case.flops(direction) / rates['dense'],
    case.bytes(direction, active) / rates['copy'],
  )
  times = '  '.join(f'{k} {1e3 * v["median"]:.3f}' for k, v in seconds.items())
  print(
    f'{direction:8} T={case.tokens:<6} E={case.experts:<4}{case.routing:8} '
    f'floor {1e3 * floor:.3f}  ms: {times}',
    flush=True,
  )
  return {
    'direction': direction,
    **dataclasses.asdict(case),
    'seconds': seconds,
    'flops_per_second': case.flops(direction) / mine,
    'floor_seconds': floor,
    'ratio_to_floor': mine / floor,
    'speedup': {
      name: summary['median'] / mine
      for name, summary in seconds.items()
      if name != 'mosaic_gpu'
    },
    'saved_bytes': {},
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=record.RESULTS)
  parser.add_argument(
    '--tokens',
    type=int,
    nargs='*',
    default=[128, 1024, 4096, 8192, 16384, 32768],
  )
  parser.add_argument('--experts', type=int, nargs='*', default=[256, 32])
  parser.add_argument('--routings', nargs='*', default=list(ROUTINGS))
  parser.add_argument(
    '--peers', nargs='*', choices=moe_peers.NAMES, default=moe_peers.NAMES
  )
  parser.add_argument('--part', default='')
  flags = parser.parse_args()
  refusal = mosaic_gpu.refusal(jnp.dtype('bfloat16'), (WIDE, HIDDEN))
  if refusal:
    raise SystemExit(f'moe: {refusal}')
  rates = timing.denominators()
  print({name: f'{rate:.4g}' for name, rate in rates.items()}, flush=True)
  rows = [{'direction': name, 'rate': rate} for name, rate in rates.items()]
  versions = moe_peers.installed(flags.peers)
  rows.append({'direction': 'peer', 'torch': torch.__version__, **versions})
  wanted = {
    z for z in flags.peers if z not in moe_peers.PACKAGES or z in versions
  }
  cases = itertools.product(flags.tokens, flags.experts, flags.routings)
  for case in itertools.starmap(Case, cases):
    for found in measure(case, rates, wanted):
      rows.append(found)
      path = record.write(
        'moe',
        jax.devices()[0].device_kind,
        rows,
        command=record.command('moe'),
        folder=flags.out,
        part=flags.part,
      )
    torch.cuda.empty_cache()
  print(path)


if __name__ == '__main__':
  main()
