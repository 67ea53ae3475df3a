"""Grouped matrix products at the shapes of M2's experts, against peers.

    python -m tests.bench.grouped_matmul [--tune] [--out FOLDER]

Needs one Hopper GPU and PyTorch. `up+gate` is the product 3072 -> 3072 of both
projections at once, `down` is 1536 -> 3072; `product` is the forward pass,
`transposed` the gradient of the rows, `weight_gradient` that of the matrices.
Contenders take turns, round by round, since a warm GPU lowers its clock; a
round is a few calls, timed by the host until the last has finished. What every
contender computes is compared first. `floor` is the larger of the operations
at the rate of a dense product and of the bytes, each moved once, at the rate
of a copy, both measured in the same run. Compiling a lone `grouped_mm` with
torch.compile gives the same kernel, so there is no row for it.

`--tune` first times tiles for the shapes of the model and writes the best to
`pallas_kernels/tiles.json`, which then holds for what follows.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

# JAX would otherwise keep three quarters of the memory from PyTorch.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402  (reads the environment above when imported)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from pallas_kernels import tiles as tile_tables  # noqa: E402
from pallas_kernels.gmm import mosaic_gpu, pipeline, xla  # noqa: E402
from tests.bench import record, timing  # noqa: E402

TOP_K = 8
ALIGN = pipeline.ALIGN
LAYERS = {'up+gate': (3072, 3072), 'down': (1536, 3072)}
DOWN_TOKENS = (8192, 32768)  # the smaller layer is measured at these
OPERATIONS = ('product', 'transposed', 'weight_gradient')
ROUTINGS = ('uniform', 'zipf', 'eight')
TUNED = ((3072, 3072), (3072, 1536), (1536, 3072))
CANDIDATES = (
  tile_tables.Tiles(band=8),
  tile_tables.Tiles(band=16),
  tile_tables.Tiles(band=4, cluster=2),
  tile_tables.Tiles(band=8, cluster=2),
)
ROW_CANDIDATES = {
  'few': (
    tile_tables.ROW_TILES['few'],
    tile_tables.RowTiles(rows=(8, 32, 64, 144), cluster=1, stages=3),
  ),
  'many': (
    tile_tables.ROW_TILES['many'],
    tile_tables.RowTiles(staging=2),
    tile_tables.RowTiles(rows=(64, 128, 144, 176), stages=3, staging=6),
  ),
}
TEMPORARIES = 24e9  # bytes; contenders that would need more are left out
TOLERANCE = 1e-2  # of bfloat16 results against each other, in norm


@dataclasses.dataclass(frozen=True)
class Case:
  """One product; arrays are dense rows for peers, aligned rows for ours."""

  layer: str
  operation: str
  tokens: int
  experts: int
  routing: str
  sizes: np.ndarray

  @property
  def rows(self) -> int:
    return self.tokens * TOP_K

  @property
  def flops(self) -> int:
    return 2 * self.rows * int(np.prod(LAYERS[self.layer]))

  @property
  def bytes(self) -> int:
    """Rows in and out, and the matrices of experts that have rows."""
    wide, out = LAYERS[self.layer]
    # Every matrix is written by the gradient, zeros where there are no rows.
    active = self.experts
    if self.operation != 'weight_gradient':
      active = int((self.sizes > 0).sum())
    return 2 * (self.rows * (wide + out) + active * wide * out)


def route(routing: str, tokens: int, experts: int) -> np.ndarray:
  """Rows of each expert: top-k assignments drawn from the named law."""
  weight = {
    'uniform': np.ones(experts),
    'zipf': np.arange(1, experts + 1) ** -0.5,
    'eight': (np.arange(experts) < 8).astype(float),
  }[routing]
  rng = np.random.default_rng(tokens + experts)
  return rng.multinomial(tokens * TOP_K, weight / weight.sum())


def operands(
  layer: str, tokens: int, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
  """Random rows, matrices and gradients of rows, in bfloat16."""
  wide, out = LAYERS[layer]
  rows = tokens * TOP_K
  make = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16)
  return make(rows, wide), make(experts, wide, out), make(rows, out)


def spread(
  z: torch.Tensor, sizes: np.ndarray, align: int
) -> tuple[torch.Tensor, torch.Tensor]:
  """Rows at aligned group starts, and where each dense row went."""
  padded = -(-sizes // align) * align
  gap = np.repeat(np.cumsum(padded - sizes) - (padded - sizes), sizes)
  place = torch.tensor(np.arange(len(z)) + gap, device='cuda')
  aligned = z.new_zeros(len(z) + len(sizes) * align, z.shape[1])
  aligned[place] = z
  return aligned, place


def contenders(
  case: Case, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor
) -> dict[str, Callable[[], Any]]:
  """Name -> call; ours gives aligned rows, the others dense rows."""
  sizes = jnp.asarray(case.sizes, jnp.int32)
  x_a, place = spread(x, case.sizes, ALIGN)
  dy_a, _ = spread(dy, case.sizes, ALIGN)
  pair = [
    jax.dlpack.from_dlpack(z) for z in _operands(case.operation, x_a, w, dy_a)
  ]
  offsets = torch.tensor(np.cumsum(case.sizes), device='cuda').int()
  peer = functools.partial(torch.nn.functional.grouped_mm, offs=offsets)
  calls = {
    'product': lambda: peer(x, w),
    'transposed': lambda: peer(dy, w.transpose(-2, -1)),
    'weight_gradient': lambda: peer(x.t(), dy),
  }
  run = _compiled(mosaic_gpu, case.operation, ALIGN, len(x_a), tuple(w.shape))
  found = {
    'mosaic_gpu': lambda: run(*pair, sizes),
    'torch.grouped_mm': calls[case.operation],
  }
  _check(case, found, place)
  wide, out = LAYERS[case.layer]
  block = xla.block_rows(case.rows, case.experts)
  gathered = 2 * wide * out * (case.rows // block + case.experts)
  if case.operation == 'product' and gathered < TEMPORARIES:
    wider = jax.dlpack.from_dlpack(spread(x, case.sizes, block)[0])
    slow = _compiled(xla, case.operation, block, len(wider), tuple(w.shape))
    found['xla'] = lambda: slow(wider, pair[1], sizes)
  expanded = 2 * case.experts * case.rows * (wide + out)
  if case.operation == 'product' and expanded < TEMPORARIES:
    dense_x, dense_w = (jax.dlpack.from_dlpack(z) for z in (x, w))
    ragged = jax.jit(jax.lax.ragged_dot)
    found['ragged_dot'] = lambda: ragged(dense_x, dense_w, sizes)
  return found


@functools.cache
def _compiled(
  backend: Any, operation: str, align: int, rows: int, shape: tuple[int, ...]
) -> Callable:
  """(x or dy, w or dy, sizes) -> result of the operation on aligned rows."""
  experts, wide, out = shape
  options = {'align': align, 'out_dtype': jnp.bfloat16}
  if operation == 'weight_gradient':
    # Rows of no group are zeros, as they are in the layer.
    run = functools.partial(backend.weight_gradient, clean=True, **options)
    widths = (rows, wide), (rows, out)
  else:
    transpose = operation == 'transposed'
    run = functools.partial(backend.product, transpose=transpose, **options)
    widths = (rows, out if transpose else wide), shape
  shapes = [jax.ShapeDtypeStruct(width, jnp.bfloat16) for width in widths]
  shapes.append(jax.ShapeDtypeStruct((experts,), jnp.int32))
  return timing.compile(f'grouped_matmul-{operation}', run, *shapes)


def _operands(operation: str, x: Any, w: Any, dy: Any) -> tuple[Any, Any]:
  """What the operation multiplies."""
  pairs = {'product': (x, w), 'transposed': (dy, w), 'weight_gradient': (x, dy)}
  return pairs[operation]


def _check(case: Case, calls: Mapping[str, Callable], place: Any) -> None:
  """Raises RuntimeError if ours and PyTorch's results differ."""
  got = torch.from_dlpack(calls['mosaic_gpu']())
  want = calls['torch.grouped_mm']()
  if case.operation == 'weight_gradient':
    # PyTorch does not write the matrices of experts without rows.
    active = torch.tensor(case.sizes > 0, device='cuda')
    if got[~active].any():
      raise RuntimeError(f'{case}: experts without rows have a gradient')
    got, want = got[active], want[active]
  else:
    got = got[place]
  for ours, peers in zip(got.chunk(16), want.chunk(16)):
    error = float((ours - peers).norm() / peers.norm())
    if not error < TOLERANCE:
      raise RuntimeError(f'{case}: differs from PyTorch by {error:.2e}')


def measure(
  case: Case, rates: Mapping[str, float], arrays: tuple[torch.Tensor, ...]
) -> dict[str, Any]:
  """One row of the table."""
  seconds = timing.race(contenders(case, *arrays))
  ours = seconds['mosaic_gpu']['median']
  floor = max(case.flops / rates['dense'], case.bytes / rates['copy'])
  row = {
    'layer': case.layer,
    'operation': case.operation,
    'tokens': case.tokens,
    'experts': case.experts,
    'routing': case.routing,
    'seconds': seconds,
    'flops_per_second': case.flops / ours,
    'floor_seconds': floor,
    'ratio_to_floor': ours / floor,
    'speedup': {
      name: summary['median'] / ours
      for name, summary in seconds.items()
      if name != 'mosaic_gpu'
    },
  }
  times = '  '.join(f'{k} {1e3 * v["median"]:.3f}' for k, v in seconds.items())
  print(
    f'{case.layer:8} {case.operation:15} T={case.tokens:<6} E={case.experts:<4}'
    f'{case.routing:8} {case.flops / ours / 1e12:4.0f} TF/s  floor '
    f'{1e3 * floor:.3f}  ms: {times}',
    flush=True,
  )
  return row


def tune(path: pathlib.Path) -> None:
  """Times candidates for the shapes of the model; the best go into `path`."""
  table = json.loads(path.read_text())
  entry = table.setdefault(jax.devices()[0].device_kind, {})
  for (depth, columns), experts in itertools.product(TUNED, (256,)):
    arrays = _tuned_operands(8192, experts, depth, columns)
    call = functools.partial(_tunable, 'weight_gradient')
    best, seconds = tile_tables.autotune(call, arrays, CANDIDATES)
    entry.setdefault('weight_gradient', {})[f'{depth}x{columns}'] = (
      dataclasses.asdict(best)
    )
    _say(f'weight_gradient {depth}x{columns}', best, seconds)
  for tokens in (1024, 8192):
    arrays = _tuned_operands(tokens, 256, *LAYERS['up+gate'])
    size = tile_tables.size_of(tokens * TOP_K // 256)
    call = functools.partial(_tunable, 'product')
    best, seconds = tile_tables.autotune(call, arrays, ROW_CANDIDATES[size])
    entry.setdefault('rows', {})[size] = dataclasses.asdict(best)
    _say(f'product, {size} rows a group', best, seconds)
  path.write_text(json.dumps(table, indent=2) + '\n')


def _tuned_operands(tokens, experts, depth, columns):
  """Rows, matrices, gradients of rows and sizes of the groups."""
  sizes = jnp.asarray(route('uniform', tokens, experts), jnp.int32)
  rows = tokens * TOP_K + experts * ALIGN
  keys = jax.random.split(jax.random.key(depth + columns), 3)
  shapes = (rows, depth), (experts, depth, columns), (rows, columns)
  made = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes)]
  return *made, sizes


def _say(what, best, seconds) -> None:
  times = ', '.join(f'{1e3 * value:.3f}' for value in seconds.values())
  print(f'{what}: {best}, ms: {times}', flush=True)


def _tunable(operation, tiles, x, w, dy, sizes):
  """The operation, cut up as `tiles` say."""
  options = {'align': ALIGN, 'out_dtype': x.dtype, 'tiles': tiles}
  if operation == 'weight_gradient':
    return mosaic_gpu.weight_gradient(x, dy, sizes, clean=True, **options)
  return mosaic_gpu.product(x, w, sizes, transpose=False, **options)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tune', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, default=record.RESULTS)
  parser.add_argument(
    '--tokens',
    type=int,
    nargs='*',
    default=[128, 1024, 4096, 8192, 16384, 32768],
  )
  flags = parser.parse_args()
  refusal = mosaic_gpu.refusal(
    jnp.dtype('bfloat16'), LAYERS['up+gate'], jnp.dtype('bfloat16')
  )
  if refusal:
    raise SystemExit(f'grouped_matmul: {refusal}')
  if flags.tune:
    tune(tile_tables.TABLE)
  rates = timing.denominators()
  print({name: f'{rate:.4g}' for name, rate in rates.items()}, flush=True)
  rows = [{'operation': name, 'rate': rate} for name, rate in rates.items()]
  rows.append({'operation': 'peer', 'torch': torch.__version__})
  for layer, tokens, experts in itertools.product(
    LAYERS, flags.tokens, (256, 32)
  ):
    if layer == 'down' and tokens not in DOWN_TOKENS:
      continue
    arrays = operands(layer, tokens, experts)
    for operation, routing in itertools.product(OPERATIONS, ROUTINGS):
      sizes = route(routing, tokens, experts)
      case = Case(layer, operation, tokens, experts, routing, sizes)
      rows.append(measure(case, rates, arrays))
    del arrays
    torch.cuda.empty_cache()
    path = record.write(
      'grouped_matmul',
      jax.devices()[0].device_kind,
      rows,
      command=record.command('grouped_matmul'),
      folder=flags.out,
    )
  print(path)


if __name__ == '__main__':
  main()
