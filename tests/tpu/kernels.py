"""Compiles the kernels of the expert layer for a TPU that is not here.

Run in a process of its own, because the TPU compiler (libtpu) must be on the
path before jax starts:

    PYTHONPATH=.tpu python -m tests.tpu.kernels TOPOLOGY CASE...

A case is OPERATION:TOKENS:EXPERTS, such as up:8192:256. Nothing is executed:
shapes go in, and a line of JSON a case comes out. `bytes` and `flops` are the
compiler's, which for kernels are what they declare; `moved_over_ideal` is what
the kernel's own plan copies for uniformly routed tokens, over each matrix, row
and result once. With `--dump FOLDER`, into which the compiler was told to
write its schedules, it also says how full the matrix units' slots are, and with
`--vmem`, at the price of a second compilation, how much vector memory is taken.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import megablox

from pallas_kernels import tiles_tpu
from pallas_kernels.experts import mosaic_tpu as experts
from pallas_kernels.experts import vjp as experts_vjp
from pallas_kernels.gmm import mosaic_tpu, stream_tpu
from pallas_kernels.permute import mosaic_tpu as permute
from pallas_kernels.route import mosaic_tpu as route

WIDTH, HIDDEN, TOP_K, ALIGN = 3072, 1536, 8, 16
BF16 = jnp.dtype('bfloat16')
# Rows, contraction and columns of the peer's tiles: the largest of the usual
# ones that fit the vector memory it is given, which it does not ask to extend.
PEER_TILES = 512, 1024, 1024
PEERS = ('megablox',)
OTHERS = ('gather', 'combine', 'route', 'layer', *PEERS)
NEEDED = re.compile(r'Scoped allocation with size ([\d.]+)([KMG])')
UNIT = {'K': 2**10, 'M': 2**20, 'G': 2**30}
# Slots of a bundle as the compiler's dumps list them, matrix units first.
SCHEDULE = '*{name}*final_hlo-static-per-bundle-utilization.txt'
# Compiled whole: one operation at a time takes seconds.
PLAN, GRADIENT_PLAN = (
  jax.jit(plan, static_argnums=(1, 2, 3, 4))
  for plan in (stream_tpu.plan, mosaic_tpu.gradient_plan)
)
IDLE = 100  # bundles between two loops over the matrix units


class Case(NamedTuple):
  """One kernel at one shape.

  Attributes:
    call: (*operands, chip, tiles) -> results; without the last two for peers,
      without the last for kernels that have no tiles.
    operands: shapes and dtypes.
    name: of the kernel in the compiler's files.
    flops: of all rows.
    ideal: bytes if every operand and result crossed the bus once.
    tiles: how it is cut, if rows stream past matrices.
    matrix_bytes: of one group: what is fetched, or for gradients written.
    row_in: bytes of a row of all operands.
    row_out: bytes of a row of all results.
    padding: bytes of a row that only fill lanes, no part of the ideal.
  """

  call: Callable[..., Any]
  operands: tuple[jax.ShapeDtypeStruct, ...]
  name: str
  flops: int
  ideal: int
  tiles: tiles_tpu.Tiles | None = None
  matrix_bytes: int = 0
  row_in: int = 0
  row_out: int = 0
  padding: int = 0


def array(*shape, dtype=BF16):
  return jax.ShapeDtypeStruct(shape, dtype)


def streamed(
  operation: str, tokens: int, groups: int, chip: tiles_tpu.Chip
) -> Case:
  """A product of the expert layer; rows are the worst case of the tokens."""
  rows = positions(tokens, groups)
  fit = chip, rows // groups, WIDTH, HIDDEN
  wide, narrow = array(rows, WIDTH), array(rows, HIDDEN)
  wi, wo = array(groups, WIDTH, HIDDEN), array(groups, HIDDEN, WIDTH)
  sizes = array(groups, dtype=jnp.int32)
  number = array(rows, dtype=jnp.float32)
  lanes = 4 * tiles_tpu.LANES
  matrix, work = 2 * WIDTH * HIDDEN, 2 * rows * WIDTH * HIDDEN
  product = functools.partial(mosaic_tpu.product, out_dtype=BF16)
  gradient = mosaic_tpu.weight_gradient

  def product_tiles(depth, columns, transpose):
    return mosaic_tpu.product_tiles(*fit[:2], depth, columns, BF16, transpose)

  def gradient_tiles(dtype):
    return mosaic_tpu.gradient_tiles(*fit, jnp.dtype(dtype))

  # call, operands, kernel, matrices, tiles, bytes of a row in, out, padding
  call, operands, name, matrices, tiles, row_in, row_out, padding = {
    'up': lambda: (
      functools.partial(experts.up, save=True), (wide, wi, wi, sizes),
      'experts_up', 2, experts.up_tiles(*fit), 2 * WIDTH, 6 * HIDDEN, 0,
    ),
    'down': lambda: (
      experts.down, (narrow, wo, sizes), 'grouped_matmul', 1,
      product_tiles(HIDDEN, WIDTH, False), 2 * HIDDEN, 2 * WIDTH, 0,
    ),
    'down_backward': lambda: (
      experts.down_backward, (wide, wo, narrow, narrow, number, sizes),
      'experts_down_backward', 1, experts.down_backward_tiles(*fit),
      2 * WIDTH + 4 * HIDDEN + lanes, 6 * HIDDEN + lanes, 2 * (lanes - 4),
    ),
    'up_backward': lambda: (
      experts.up_backward, (narrow, narrow, wi, wi, sizes),
      'experts_up_backward', 2, experts.up_backward_tiles(*fit),
      4 * HIDDEN, 2 * WIDTH, 0,
    ),
    'product': lambda: (
      functools.partial(product, transpose=False), (wide, wi, sizes),
      'grouped_matmul', 1, product_tiles(WIDTH, HIDDEN, False),
      2 * WIDTH, 2 * HIDDEN, 0,
    ),
    'transposed': lambda: (
      functools.partial(product, transpose=True), (wide, wo, sizes),
      'grouped_matmul_t', 1, product_tiles(WIDTH, HIDDEN, True),
      2 * WIDTH, 2 * HIDDEN, 0,
    ),
    'weight_gradient': lambda: (
      functools.partial(gradient, out_dtype=BF16), (wide, narrow, sizes),
      'grouped_matmul_gradient', 1, gradient_tiles(BF16),
      2 * (WIDTH + HIDDEN), 0, 0,
    ),
    'weight_gradient_fp32': lambda: (
      functools.partial(gradient, out_dtype=jnp.float32),
      (wide, narrow, sizes), 'grouped_matmul_gradient', 2,
      gradient_tiles(jnp.float32), 2 * (WIDTH + HIDDEN), 0, 0,
    ),
  }[operation]()  # fmt: skip
  return Case(
    functools.partial(call, align=ALIGN),
    operands,
    name,
    # The float32 gradient counts as two matrices in bytes, not in work.
    work * (2 if operation.startswith('up') else 1),
    groups * matrices * matrix + rows * (row_in + row_out - padding),
    tiles,
    matrices * matrix,
    row_in,
    row_out,
    padding,
  )


def other(operation: str, tokens: int, groups: int) -> Case:
  """Kernels without matrices, and the peer of `product`."""
  rows, slots = positions(tokens, groups), tokens * TOP_K
  place = array(tokens, TOP_K, dtype=jnp.int32)
  weight = array(tokens, TOP_K, dtype=jnp.float32)
  score = array(tokens, groups, dtype=jnp.float32)
  options = {'top_k': TOP_K, 'min_k': TOP_K, 'min_share': 0.0}
  row = 2 * WIDTH
  if operation == 'gather':
    return Case(
      permute.gather_rows,
      (array(tokens, WIDTH), array(rows, dtype=jnp.int32)),
      'gather_rows', 0, (slots + rows) * row,
    )  # fmt: skip
  if operation == 'combine':
    return Case(
      permute.combine, (array(rows, WIDTH), place, weight), 'combine_rows',
      2 * slots * WIDTH, (slots + tokens) * row,
    )  # fmt: skip
  if operation == 'route':
    return Case(
      functools.partial(route.route_and_count, **options),
      (score, array(groups, dtype=jnp.float32)), 'route',
      0, 4 * tokens * groups + 8 * slots,
    )  # fmt: skip
  if operation == 'layer':
    return layer(tokens, groups)
  if operation != 'megablox':
    raise ValueError(f'no kernel {operation!r}')
  call = functools.partial(
    megablox.gmm, preferred_element_type=BF16, tiling=PEER_TILES
  )
  wi = array(groups, WIDTH, HIDDEN)
  sizes = array(groups, dtype=jnp.int32)
  ideal = 2 * (groups * WIDTH * HIDDEN + slots * (WIDTH + HIDDEN))
  return Case(
    call, (array(slots, WIDTH), wi, sizes), 'gmm',
    2 * slots * WIDTH * HIDDEN, ideal,
  )  # fmt: skip


def layer(tokens: int, groups: int) -> Case:
  """The whole expert layer and its derivative, every part on these kernels."""
  weight = array(tokens, TOP_K, dtype=jnp.float32)
  index = array(tokens, TOP_K, dtype=jnp.int32)
  x = array(tokens, WIDTH)
  wi, wo = array(groups, WIDTH, HIDDEN), array(groups, HIDDEN, WIDTH)

  def call(dy_MD, x_MD, index_MX, weight_MX, *matrices, chip):
    del chip  # stands in the context
    y_MD, pull = jax.vjp(
      lambda x_MD, weight_MX, *matrices: experts_vjp.experts(
        experts.BACKEND,
        'mosaic_tpu',
        None,
        None,
        x_MD,
        index_MX,
        weight_MX,
        *matrices,
      ),
      x_MD,
      weight_MX,
      *matrices,
    )
    return y_MD, pull(dy_MD)

  matrix = 2 * groups * WIDTH * HIDDEN
  slots = tokens * TOP_K
  # Forward and backward read each matrix, its gradient is written; the widths
  # of all rows that one kernel writes or reads add up to these.
  rows = 2 * slots * (15 * WIDTH + 14 * HIDDEN)
  return Case(
    call, (x, x, index, weight, wi, wi, wo), 'experts_up',
    18 * slots * WIDTH * HIDDEN, 9 * matrix + rows,
  )  # fmt: skip


def positions(tokens: int, groups: int) -> int:
  """P for these tokens: room for any routing, group starts aligned."""
  slots = tokens * TOP_K
  return -(-(slots + groups * (ALIGN - 1)) // ALIGN) * ALIGN


def compile_for(device, chip, one: Case):
  """The compiled kernel and the seconds that took."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  shapes = [
    jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=sharding)
    for z in one.operands
  ]
  keywords = {} if chip is None else {'chip': chip}
  if one.tiles:
    keywords['tiles'] = one.tiles
  lowered = jax.jit(functools.partial(one.call, **keywords)).lower(*shapes)
  start = time.monotonic()
  return lowered.compile(), time.monotonic() - start


def vmem_bytes(device, chip, one: Case) -> int | None:
  """What the kernel takes, by the compiler's word when it may not have it."""
  poor = dataclasses.replace(chip, vmem=4 * tiles_tpu.MIB + 2**14)
  try:
    compile_for(device, poor, one)
  except jax.errors.JaxRuntimeError as error:
    if found := NEEDED.search(str(error)):
      return round(float(found[1]) * UNIT[found[2]])
    raise
  return None


def routed(tokens: int, groups: int) -> np.ndarray:
  """Rows of each group for uniformly routed tokens."""
  law = np.full(groups, 1 / groups)
  return np.random.default_rng(0).multinomial(tokens * TOP_K, law)


def moved(one: Case, chip: tiles_tpu.Chip, tokens: int) -> float:
  """Bytes that the plan of uniformly routed tokens copies, over the ideal."""
  groups, rows = one.operands[-1].shape[0], one.operands[0].shape[0]
  sizes = routed(tokens, groups)
  args = jnp.asarray(sizes), rows, ALIGN, one.tiles.rows, chip.cores
  if one.row_out:
    plan = PLAN(*args)
    matrices, needed = fetches(plan), (sizes > 0).sum()
    written = np.asarray(plan.extent_T).sum()
  else:
    plan = GRADIENT_PLAN(*args)
    matrices = needed = groups
    written = 0
  valid_T = np.asarray(plan.valid_T)[: np.asarray(plan.first_C)[-1]]
  read = (-(-valid_T // ALIGN) * ALIGN).sum()
  total = matrices * one.matrix_bytes + read * one.row_in
  total += written * one.row_out
  ideal = needed * one.matrix_bytes + sizes.sum() * one.row_in
  ideal += rows * one.row_out - sizes.sum() * one.padding
  return total / ideal


def peer_moved(one: Case, tokens: int) -> float:
  """The same for the peer, whose tiles on a group's edge are done twice."""
  groups, rows = one.operands[-1].shape[0], one.operands[0].shape[0]
  tile, _, columns = PEER_TILES
  end = np.cumsum(sizes := routed(tokens, groups))
  visits = -(-end // tile) - (end - sizes) // tile
  visits = visits[sizes > 0].sum()
  # Rows again for every column tile, matrices again for every row tile.
  total = visits * tile * 2 * WIDTH * -(-HIDDEN // columns)
  total += visits * 2 * WIDTH * HIDDEN + rows * 2 * HIDDEN
  needed = (sizes > 0).sum()
  ideal = needed * 2 * WIDTH * HIDDEN + rows * 2 * (WIDTH + HIDDEN)
  return total / ideal


def fetches(plan: stream_tpu.Plan) -> int:
  """How many matrices the cores fetch together."""
  first_C, turn_T = np.asarray(plan.first_C), np.asarray(plan.turn_T)
  return sum(
    len(set(turn_T[begin:end])) for begin, end in zip(first_C, first_C[1:])
  )


def schedule(folder: pathlib.Path, name: str) -> dict[str, Any]:
  """How full the matrix units' slots are where they work most."""
  files = sorted(folder.glob(SCHEDULE.format(name=f'{name}.')))
  if not files:
    return {}
  lines = files[-1].read_text().splitlines()
  units = int(lines[2].split()[0])
  used = np.array([int(line.split()[0]) for line in lines[4:]])
  busy = np.flatnonzero(used)
  if not len(busy):
    return {}
  cuts = np.flatnonzero(np.diff(busy) > IDLE)
  first = np.concatenate([busy[:1], busy[cuts + 1]])
  last = np.concatenate([busy[cuts], busy[-1:]])
  loops = [used[a : b + 1] for a, b in zip(first, last)]
  main = max(loops, key=lambda loop: loop.sum())
  return {'matrix_slots': main.sum() / (units * len(main))}


def measure(
  device, name: str, dump: pathlib.Path | None, vmem: bool
) -> dict[str, Any]:
  """What the compiler says of one case."""
  operation, tokens, groups = name.split(':')
  tokens, groups = int(tokens), int(groups)
  chip = tiles_tpu.CHIPS[device.device_kind]
  row = {
    'operation': operation,
    'tokens': tokens,
    'experts': groups,
    'device': device.device_kind,
  }
  if operation in OTHERS:
    one = other(operation, tokens, groups)
  else:
    one = streamed(operation, tokens, groups, chip)
    row |= {
      'tiles': dataclasses.asdict(one.tiles),
      'matrix_bytes': groups * one.matrix_bytes,
      'padding_bytes': one.operands[0].shape[0] * one.padding,
      'moved_over_ideal': round(moved(one, chip, tokens), 4),
    }
  if operation in PEERS:
    chip = None
    row['moved_over_ideal'] = round(peer_moved(one, tokens), 4)
    row['tiles'] = list(PEER_TILES)
  with tiles_tpu.compiling_for(device.device_kind):
    compiled, seconds = compile_for(device, chip, one)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  row |= {
    'compile_seconds': round(seconds, 1),
    'temp_bytes': memory.temp_size_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
    'flops': cost.get('flops', 0),
    'flops_analytic': one.flops,
    'bytes': cost['bytes accessed'],
    'bytes_ideal': one.ideal,
    'optimal_seconds': cost['optimal_seconds'],
  }
  if dump:
    row |= schedule(dump, one.name)
  if vmem and chip and operation != 'layer':
    row['vmem_bytes'] = vmem_bytes(device, chip, one)
    row['vmem_limit'] = chip.vmem_limit
  return row


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('topology')
  parser.add_argument('cases', nargs='+')
  parser.add_argument('--dump', type=pathlib.Path)
  parser.add_argument('--vmem', action='store_true')
  args = parser.parse_args(argv)
  device = topologies.get_topology_desc(
    platform='tpu', topology_name=args.topology
  ).devices[0]
  for name in args.cases:
    print(json.dumps(measure(device, name, args.dump, args.vmem)), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
