"""Grouped matrix products for TPUs, in Pallas Mosaic.

Both products keep the large side in vector memory and stream rows. Forward and
input gradient hold a group's whole matrix (`stream_tpu`); the input gradient
contracts with the matrix's other side, which the multiplying units take
transposed, so no transposed copy exists. The weight gradient holds a group's
whole sum in float32 and writes it once.

Each matrix, each row and each result crosses the memory's bus once, where the
matrices fit; where they do not, rows are read again for every part of columns.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tiles_tpu
from pallas_kernels.gmm import layout, stream_tpu, vjp

# Side of the part of a weight gradient that one product of a chunk fills.
PART = 512


def alignment(rows: int, groups: int, align: int) -> int:
  """The alignment that these kernels need, given rows aligned to `align`."""
  del groups
  return stream_tpu.alignment(rows, align)


def refusal(
  dtype: jnp.dtype, widths: tuple[int, int], out_dtype: jnp.dtype
) -> str | None:
  """Why these kernels cannot multiply such matrices here, or None."""
  if dtype != jnp.bfloat16:
    return f'multiplies bfloat16, not {dtype}'
  if out_dtype not in (jnp.bfloat16, jnp.float32):
    return f'gives bfloat16 or float32, not {out_dtype}'
  if any(width % tiles_tpu.LANES for width in widths):
    return f'needs widths in multiples of 128, not {tuple(widths)}'
  return no_device()


def no_device() -> str | None:
  """Why TPU kernels cannot run on the device at hand, or None."""
  if tiles_tpu.here():
    return None
  kind = dispatch.device().device_kind
  known = ', '.join(tiles_tpu.CHIPS)
  return f'knows {known} (and interprets on CPUs), not {kind}'


def product(
  x_PK: jax.Array,
  w_GKN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  transpose: bool,
  out_dtype: jax.typing.DTypeLike,
  tiles: tiles_tpu.Tiles | None = None,
  chip: tiles_tpu.Chip | None = None,
) -> jax.Array:
  """Each row times its group's matrix; see `vjp.Backend`.

  Args:
    x_PK: bfloat16 rows.
    w_GKN: bfloat16 matrices, [G, N, K] if `transpose`.
    sizes_G: rows per group.
    align: multiple of 16 to which group starts are rounded up.
    transpose: multiply with the transposed matrices.
    out_dtype: bfloat16 or float32.
    tiles: how to cut; None chooses by the chip's memory.
    chip: what to compile for; None is the device at hand.
  """
  chip = chip or tiles_tpu.here()
  rows, depth = x_PK.shape
  columns = w_GKN.shape[1 if transpose else 2]
  out_dtype = jnp.dtype(out_dtype)
  tiles = tiles or product_tiles(
    chip, rows // len(w_GKN), depth, columns, out_dtype, transpose
  )
  matrices = stream_tpu.Matrices(
    w_GKN, 0 if transpose else 1, tiles.columns or columns
  )
  plan = stream_tpu.plan(sizes_G, rows, align, tiles.rows, chip.cores)
  (y_PN,) = stream_tpu.stream(
    functools.partial(_product_chunk, transpose=transpose),
    plan,
    [x_PK],
    [matrices],
    [jax.ShapeDtypeStruct((rows, columns), out_dtype)],
    tiles=tiles,
    chip=chip,
    flops=2 * rows * depth * columns,
    name='grouped_matmul_t' if transpose else 'grouped_matmul',
  )
  return y_PN


def _product_chunk(x_blocks, w_refs, *, transpose):
  return [stream_tpu.dot(x_blocks[0], w_refs[0][...], transpose)]


def product_tiles(
  chip: tiles_tpu.Chip,
  mean_rows: int,
  depth: int,
  columns: int,
  out_dtype: jnp.dtype,
  transpose: bool,
) -> tiles_tpu.Tiles:
  """Tiles of `product`: all columns of a matrix if they fit, or a part."""

  def fit(part):
    return tiles_tpu.choose(
      chip,
      mean_rows,
      chip.transposed_chunk if transpose else chip.chunk,
      resident=2 * 2 * depth * part,
      row_in=2 * depth,
      row_out=out_dtype.itemsize * part,
      row_scratch=4 * part,
    )

  return _fewest_parts(fit, columns)


def _fewest_parts(fit, columns: int) -> tiles_tpu.Tiles:
  """The tiles of the widest part of `columns` for which `fit` finds some."""
  lanes = columns // tiles_tpu.LANES
  for parts in range(1, lanes + 1):
    if lanes % parts == 0 and (found := fit(columns // parts)):
      return found if parts == 1 else found.narrowed(columns // parts)
  raise ValueError(f'{columns=}: not even {tiles_tpu.LANES} fit vector memory')


class GradientPlan(NamedTuple):
  """Tiles of rows in the order of their groups, at least one a group; int32.

  Attributes:
    first_C: where each core's tiles begin, always a group's first; the last
      entry is the number of tiles.
    group_T: whose rows they are.
    row_T: the first row.
    valid_T: how many rows, from the first, the group owns.
  """

  first_C: jax.Array
  group_T: jax.Array
  row_T: jax.Array
  valid_T: jax.Array


def gradient_plan(
  sizes_G: jax.Array, rows: int, align: int, tile: int, cores: int
) -> GradientPlan:
  """Cuts the rows of each group into tiles; empty groups have one of none."""
  groups = sizes_G.shape[0]
  sizes_G = sizes_G.astype(jnp.int32)
  count_G = jnp.maximum(-(-sizes_G // tile), 1)
  group_T, end_G = stream_tpu.segments(count_G, rows // tile + groups)
  index_T = jnp.arange(group_T.shape[0], dtype=jnp.int32)
  offset_T = (index_T - (end_G - count_G)[group_T]) * tile
  spent_G = jnp.cumsum(sizes_G + stream_tpu.FETCH_ROWS)
  share_C = spent_G[-1] * jnp.arange(1, cores) // cores
  whole_C = (spent_G[None] <= share_C[:, None]).sum(1)
  bounds_S = jnp.append(0, end_G)
  plan = GradientPlan(
    first_C=jnp.concatenate([bounds_S[:1], bounds_S[whole_C], bounds_S[-1:]]),
    group_T=group_T,
    row_T=layout.starts(sizes_G, align)[group_T] + offset_T,
    valid_T=jnp.clip(sizes_G[group_T] - offset_T, 0, tile),
  )
  return jax.tree.map(lambda z: z.astype(jnp.int32), plan)


def weight_gradient(
  x_PK: jax.Array,
  dy_PN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  out_dtype: jax.typing.DTypeLike,
  tiles: tiles_tpu.Tiles | None = None,
  chip: tiles_tpu.Chip | None = None,
) -> jax.Array:
  """Sum over each group's rows of x^T dy; see `vjp.Backend`.

  Args:
    x_PK: bfloat16 rows.
    dy_PN: bfloat16 rows.
    sizes_G: rows per group.
    align: multiple of 16 to which group starts are rounded up.
    out_dtype: bfloat16 or float32.
    tiles: how to cut; None chooses by the chip's memory.
    chip: what to compile for; None is the device at hand.
  """
  chip = chip or tiles_tpu.here()
  rows, width = x_PK.shape
  columns, groups = dy_PN.shape[1], sizes_G.shape[0]
  out_dtype = jnp.dtype(out_dtype)
  tiles = tiles or gradient_tiles(
    chip, rows // groups, width, columns, out_dtype
  )
  part = tiles.columns or columns
  sums = [pltpu.VMEM((2, width, part), out_dtype)]
  if out_dtype != jnp.float32:
    sums.append(pltpu.VMEM((width, part), jnp.float32))
  plan = gradient_plan(sizes_G, rows, align, tiles.rows, chip.cores)
  anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
  shape = groups, width, columns
  parts = columns // part
  moved = parts * x_PK.size + dy_PN.size
  call = pl.pallas_call(
    functools.partial(_gradient_body, tiles=tiles),
    out_shape=stream_tpu.like(x_PK, shape, out_dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(plan),
      grid=(chip.cores, parts),
      in_specs=[anywhere] * 2,
      out_specs=anywhere,
      scratch_shapes=[
        pltpu.VMEM((tiles.stages, tiles.rows, width), x_PK.dtype),
        pltpu.VMEM((tiles.stages, tiles.rows, part), dy_PN.dtype),
        pltpu.SemaphoreType.DMA((2, tiles.stages)),
        pltpu.SemaphoreType.DMA((2,)),
        *sums,
      ],
    ),
    compiler_params=stream_tpu.params(chip, 2),
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * width * columns,
      bytes_accessed=2 * moved + out_dtype.itemsize * groups * width * columns,
      transcendentals=0,
    ),
    interpret=chip.interpret,
    name='grouped_matmul_gradient',
  )
  return dispatch.narrow(call)(*plan, x_PK, dy_PN)


def gradient_tiles(
  chip: tiles_tpu.Chip,
  mean_rows: int,
  width: int,
  columns: int,
  out_dtype: jnp.dtype,
) -> tiles_tpu.Tiles:
  """Tiles of `weight_gradient`: all columns of a sum if they fit."""

  def fit(part):
    # bfloat16 needs a float32 sum and two results on their way to memory.
    return tiles_tpu.choose(
      chip,
      mean_rows,
      chip.gradient_chunk,
      resident=8 * width * part + 4 * min(width, PART) * part,
      row_in=2 * (width + part),
      row_out=0,
      row_scratch=2 * (width + part),
    )

  return _fewest_parts(fit, columns)


def _gradient_body(*refs, tiles):
  count = len(GradientPlan._fields)
  plan = GradientPlan(*refs[:count])
  x_hbm, dy_hbm, dw_hbm, x_vmem, dy_vmem, arrived, left, out, *sums = refs[
    count:
  ]
  block = pl.program_id(1)
  begin = plan.first_C[pl.program_id(0)]
  end = plan.first_C[pl.program_id(0) + 1]
  first_group = plan.group_T[jnp.minimum(begin, plan.group_T.shape[0] - 1)]
  ahead = tiles.stages - 1
  columns = pl.ds(block * out.shape[2], out.shape[2])

  def move_rows(tile, slot, act):
    extent = (plan.valid_T[tile] + stream_tpu.ALIGN - 1) & -stream_tpu.ALIGN
    row = plan.row_T[tile]

    def piece(offset, size):
      rows = pl.ds(pl.multiple_of(row + offset, stream_tpu.ALIGN), size)
      inside = pl.ds(offset, size)
      pairs = (x_hbm.at[rows], x_vmem), (dy_hbm.at[rows, columns], dy_vmem)
      for n, (source, vmem) in enumerate(pairs):
        target = vmem.at[slot, inside]
        act(pltpu.make_async_copy(source, target, arrived.at[n, slot]))

    stream_tpu.pieces(extent, tiles.rows, x_hbm.shape[0], piece)

  def move_sum(group, act):
    slot = (group - first_group) & 1
    target = dw_hbm.at[group, :, columns]
    act(pltpu.make_async_copy(out.at[slot], target, left.at[slot]))

  def step(tile, _):
    since = tile - begin
    slot = lax.rem(since, tiles.stages)
    group = plan.group_T[tile]
    half = (group - first_group) & 1
    before = plan.group_T[jnp.maximum(tile - 1, 0)]
    after = plan.group_T[jnp.minimum(tile + 1, end - 1)]
    opens = (since == 0) | (before != group)
    closes = (tile + 1 == end) | (after != group)

    @pl.when(tile + ahead < end)
    def _():
      later = lax.rem(since + ahead, tiles.stages)
      move_rows(tile + ahead, later, stream_tpu.start)

    move_rows(tile, slot, stream_tpu.wait)

    @pl.when(opens & (group - first_group >= 2))
    def _():
      move_sum(group - 2, stream_tpu.wait)

    _add_tile(
      x_vmem.at[slot],
      dy_vmem.at[slot],
      sums[0] if sums else out.at[half],
      out.at[half],
      plan.valid_T[tile],
      opens,
      closes,
      tiles.chunk,
    )

    @pl.when(closes)
    def _():
      move_sum(group, stream_tpu.start)

  stream_tpu.start_early(move_rows, begin, end, ahead)
  lax.fori_loop(begin, end, step, None)
  for late in (1, 0):
    group = plan.group_T[jnp.maximum(end - 1, 0)] - late

    @pl.when((begin < end) & (group >= first_group))
    def _(group=group):
      move_sum(group, stream_tpu.wait)


def _add_tile(
  x_ref, dy_ref, sum_ref, out_ref, valid, opens, closes, chunk
):  # fmt: skip
  """Adds x^T dy of a tile's valid rows; the group's last goes to `out_ref`."""
  chunks = lax.div(valid + chunk - 1, chunk)

  def add(n, _):
    first = pl.multiple_of(n * chunk, stream_tpu.ALIGN)
    rows = pl.ds(first, chunk)

    @pl.when(first + chunk > valid)
    def _():
      # What was not fetched may be anything, and 0 times NaN is NaN.
      for ref in (x_ref, dy_ref):
        index = lax.broadcasted_iota(jnp.int32, (chunk, ref.shape[1]), 0)
        inside = index < valid - first
        ref[rows] = jnp.where(inside, ref[rows], jnp.zeros((), ref.dtype))

    fresh = opens & (n == 0)
    final = closes & (n + 1 == chunks)
    _for_parts(x_ref, rows, dy_ref, sum_ref, fresh, final, out_ref)

  lax.fori_loop(0, chunks, add, None)

  @pl.when(chunks == 0)
  def _():
    out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)


def _for_parts(x_ref, rows, dy_ref, sum_ref, fresh, final, out_ref):
  """Part by part, sum (at the end, out) = sum + x[rows]^T dy[rows]."""
  same = out_ref.dtype == jnp.float32
  width = x_ref.shape[1]
  part = max(n for n in range(128, PART + 1, 128) if width % n == 0)

  def put(target_ref):
    for first in range(0, width, part):
      inside = slice(first, first + part)
      sum_here = jnp.where(fresh, 0.0, sum_ref[inside])
      value = sum_here + lax.dot_general(
        x_ref[rows, inside],
        dy_ref[rows],
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )
      target_ref[inside] = value.astype(target_ref.dtype)

  if same:
    put(sum_ref)
    return
  pl.when(~final)(lambda: put(sum_ref))
  pl.when(final)(lambda: put(out_ref))


BACKEND = vjp.Backend(
  alignment,
  dispatch.underivable('grouped_matmul', product),
  dispatch.underivable('weight_gradient', weight_gradient),
)
