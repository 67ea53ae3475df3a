"""Grouped matrix products for Hopper GPUs, in Pallas Mosaic GPU.

One persistent block a multiprocessor. Its first two warpgroups issue wgmma; the
third only issues bulk copies into a ring of stages, and runs ahead from one
tile into the next, so that the pipeline never drains while results are stored.

Products are those of `panels.py`: a warpgroup owns half the output features of
a panel, for all rows of a tile. Which rows make a tile, and of which group, is
read from tables made on the device (`layout.segments`). Of a matrix's gradient
a warpgroup owns half the rows of an output tile; there are as many such tiles
in each group, so that an item's number says where it lies (`_locate`).

Groups start at multiples of 8 rows, the height of a swizzled tile in shared
memory: a tile may read rows of the next group, and results of those are not
stored; rows of no group are stored as zeros.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, hopper
from pallas_kernels import tiles as tile_tables
from pallas_kernels.gmm import layout, panels, pipeline, slices, vjp


def alignment(rows: int, groups: int, align: int) -> int:
  """The alignment that these kernels need, given rows aligned to `align`."""
  del groups
  return (
    align
    if align % pipeline.ALIGN == 0 and rows % pipeline.ALIGN == 0
    else pipeline.ALIGN
  )


def refusal(
  dtype: jnp.dtype, widths: tuple[int, int], out_dtype: jnp.dtype
) -> str | None:
  """Why these kernels cannot multiply such matrices here, or None."""
  if dtype != jnp.bfloat16:
    return f'multiplies bfloat16, not {dtype}'
  if out_dtype not in (jnp.bfloat16, jnp.float32):
    return f'gives bfloat16 or float32, not {out_dtype}'
  if any(width % 128 for width in widths):
    return f'needs widths in multiples of 128, not {tuple(widths)}'
  return hopper.refusal()


def product(
  x_PK: jax.Array,
  w_GKN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  transpose: bool,
  out_dtype: jax.typing.DTypeLike,
  clear: int | None = None,
  tiles: tile_tables.RowTiles | None = None,
  blocks: int | None = None,
) -> jax.Array:
  """Each row times its group's matrix; see `vjp.Backend`.

  Args:
    x_PK: bfloat16 rows.
    w_GKN: bfloat16 matrices, [G, N, K] if `transpose`.
    sizes_G: rows per group.
    align: multiple of 8 to which group starts are rounded up.
    transpose: multiply with the transposed matrices.
    out_dtype: bfloat16 or float32.
    clear: rows after the last group that are set to zero, a multiple of 8;
      those that follow are left as they were in memory. None = all are zero.
    tiles: how to cut; None looks the device up.
    blocks: persistent blocks; None takes one a multiprocessor.
  """
  columns = w_GKN.shape[1 if transpose else 2]
  return sums(
    [x_PK],
    [w_GKN],
    sizes_G,
    columns,
    align=align,
    transpose=transpose,
    out_dtype=out_dtype,
    clear=clear,
    tiles=tiles,
    blocks=blocks,
  )


def sums(
  xs: Sequence[jax.Array],
  ws: Sequence[jax.Array],
  sizes_G: jax.Array,
  columns: int,
  *,
  align: int,
  transpose: bool,
  out_dtype: jax.typing.DTypeLike,
  clear: int | None = None,
  tiles: tile_tables.RowTiles | None = None,
  blocks: int | None = None,
) -> jax.Array:
  """Sum of the products of pairs of rows and matrices; see `product`."""
  rows = xs[0].shape[0]
  tiles = tiles or row_tiles(rows, sizes_G.shape[0])
  form = panels.Form(
    parts=len(xs),
    panels=panels.adjacent(columns),
    paired=False,
    transpose=transpose,
    tiles=tiles,
    chunk=2 * panels.CHUNK // jnp.dtype(out_dtype).itemsize,
    out_dtype=jnp.dtype(out_dtype),
  )
  (y_PN,) = panels.call(
    'grouped_matmul',
    form,
    functools.partial(_store_sums, form=form),
    layout.segments(sizes_G, rows, align, tiles.rows[-1], tiles.cluster, clear),
    xs,
    ws,
    columns,
    [jax.ShapeDtypeStruct((rows, columns), out_dtype)],
    blocks=blocks,
  )
  return hopper.varying_like(xs[0], y_PN)


def _store_sums(place, values, count, refs, out_smem, *, form) -> None:
  """Stores the sums of a tile as they are."""
  slots, piece = form.tiles.staging, 0
  for panel, sums_FR in enumerate(values):
    for first, size in panels.chunks(count, form.chunk):
      panels.wait_for_slot(slots, piece)
      piece_FR = sums_FR[:, first : first + size]
      panels.store(
        panels.masked(piece_FR, first, place.valid),
        refs[0],
        place,
        first,
        place.columns[panel],
        out_smem.at[place.warpgroup, piece % slots],
      )
      piece += 1


def row_tiles(rows: int, groups: int) -> tile_tables.RowTiles:
  """How to cut the rows on the device at hand, by their mean number."""
  kind = jax.local_devices()[0].device_kind
  return tile_tables.row_tiles(kind, rows // groups)


def weight_gradient(
  x_PK: jax.Array,
  dy_PN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  out_dtype: jax.typing.DTypeLike,
  clean: bool = False,
  tiles: tile_tables.Tiles | None = None,
  blocks: int | None = None,
) -> jax.Array:
  """Sum over each group's rows of x^T dy; see `vjp.Backend`.

  Args:
    x_PK: bfloat16 rows.
    dy_PN: bfloat16 rows.
    sizes_G: rows per group.
    align: multiple of 8 to which group starts are rounded up.
    out_dtype: bfloat16 or float32.
    clean: the rows of no group are finite, too, at least `tiles.depth` of
      those after the last group: then it is enough that one operand is masked
      where a group ends, and nobody waits.
    tiles: how to cut; None looks the device up.
    blocks: persistent blocks; None takes one a multiprocessor.
  """
  width, columns = x_PK.shape[1], dy_PN.shape[1]
  tiles = tiles or _lookup('weight_gradient', width, columns)
  pipeline.check(tiles, width, columns)
  chunk = pipeline.SWIZZLE // jnp.dtype(out_dtype).itemsize
  sizes_G = sizes_G.astype(jnp.int32)
  shape = sizes_G.shape[0], width, columns
  kernel = plgpu.kernel(
    functools.partial(_gradient_body, tiles=tiles, clean=clean),
    out_type=jax.ShapeDtypeStruct(shape, out_dtype),
    scratch_types=pipeline.scratch(
      tiles,
      (tiles.depth, pipeline.ROWS),
      (tiles.depth, tiles.columns),
      chunk,
      out_dtype,
    )
    | {'masked': plgpu.Barrier(num_arrivals=pipeline.CONSUMERS)},
    **pipeline.mesh('grouped_matmul_gradient', tiles, blocks),
  )
  start_G = layout.starts(sizes_G, align)
  dw_GKN = dispatch.narrow(kernel)(start_G, sizes_G, x_PK, dy_PN)
  return hopper.varying_like(x_PK, dw_GKN)


def _lookup(operation: str, depth: int, columns: int) -> tile_tables.Tiles:
  kind = jax.local_devices()[0].device_kind
  return tile_tables.lookup(kind, operation, (depth, columns))


def _add_rest(total, left, x_smem, dy_smem, share, full, empty, masked):
  """Adds the products of a group's last rows, fewer than a stage, if any.

  Args:
    total: a warpgroup's sums.
    left: rows that the group still has.
    x_smem: this warpgroup's part of the first operand.
    dy_smem: the second operand.
    share: this warpgroup's share of it to mask, or None if it is finite.
    full: barrier of the stage.
    empty: barrier of its slot.
    masked: where the warpgroups wait for each other, if there is a share.
  """

  def add(count, total):
    plgpu.barrier_wait(full)

    @pl.when(lax.rem(left, slices.ROWS) > 0)
    def _():  # rows past the group's last are another group's, or nobody's
      pipeline.mask_rows(x_smem, left)
      if share is not None:
        pipeline.mask_rows(share, left)
      plgpu.commit_smem()
      if share is not None:
        # Both warpgroups read all of dy, of which each has masked its share.
        plgpu.barrier_arrive(masked)
        plgpu.barrier_wait(masked)

    total = slices.add(total, x_smem, dy_smem, count)
    plgpu.barrier_arrive(empty)
    return total

  counts = range(1, x_smem.shape[0] // slices.ROWS + 1)
  return lax.switch(
    pl.cdiv(left, slices.ROWS),
    [lambda total: total, *(functools.partial(add, n) for n in counts)],
    total,
  )


def _locate(width, columns, tiles, item):
  """Group, first row and first column of an item's tile."""
  row_tiles = width // (pipeline.ROWS * tiles.cluster)
  column_tiles = columns // tiles.columns
  group = lax.div(item, row_tiles * column_tiles)
  inner = lax.rem(item, row_tiles * column_tiles)
  tile, column = pipeline.raster(inner, row_tiles, column_tiles, tiles.band)
  tile = tile * tiles.cluster + lax.axis_index('member')
  return (
    group,
    pl.multiple_of(tile * pipeline.ROWS, pipeline.ROWS),
    pl.multiple_of(column * tiles.columns, tiles.columns),
  )


def _gradient_body(
  start_ref,
  size_ref,
  x_ref,
  dy_ref,
  dw_ref,
  *,
  a_smem,
  b_smem,
  out_smem,
  full,
  empty,
  masked,
  tiles,
  clean,
):
  groups, width, columns = dw_ref.shape
  locate = functools.partial(_locate, width, columns, tiles)

  def fetch(item, ring):
    group, tile, column = locate(item)
    start, steps = start_ref[group], pl.cdiv(size_ref[group], tiles.depth)

    def copy(step, slot):
      first = pl.multiple_of(start + step * tiles.depth, pipeline.ALIGN)
      rows = pl.ds(first, tiles.depth)
      plgpu.copy_gmem_to_smem(
        x_ref.at[rows, pl.ds(tile, pipeline.ROWS)],
        a_smem.at[slot],
        full.at[slot],
      )
      plgpu.copy_gmem_to_smem(
        dy_ref.at[rows, pl.ds(column, tiles.columns)],
        b_smem.at[slot],
        full.at[slot],
        **pipeline.multicast(tiles),
      )

    return pipeline.fetch(copy, steps, ring, empty, tiles)

  def multiply(item, ring, warpgroup):
    group, tile, column = locate(item)
    size = size_ref[group]
    mine = pl.ds(warpgroup * pipeline.HALF, pipeline.HALF)
    share = tiles.columns // pipeline.CONSUMERS
    whole = lax.div(size, tiles.depth)

    def step(accs, slot, index):
      del index
      x_smem = a_smem.at[slot, :, mine].transpose((1, 0))
      plgpu.wgmma(accs[0], x_smem, b_smem.at[slot])

    shapes = [(pipeline.HALF, tiles.columns)]
    (total,) = pipeline.accumulate(
      step, whole, ring, full, empty, tiles, shapes
    )
    slot = lax.rem(ring + whole, tiles.stages)
    ours = b_smem.at[slot, :, pl.ds(warpgroup * share, share)]
    total = _add_rest(
      total,
      lax.rem(size, tiles.depth),
      a_smem.at[slot, :, mine],
      b_smem.at[slot],
      None if clean else ours,
      full.at[slot],
      empty.at[slot],
      masked,
    )
    _store_columns(
      total,
      dw_ref.at[group, pl.ds(tile + warpgroup * pipeline.HALF, pipeline.HALF)],
      column,
      out_smem.at[warpgroup],
    )
    return ring + pl.cdiv(size, tiles.depth)

  items = groups * (width // pipeline.ROWS // tiles.cluster)
  items *= columns // tiles.columns
  pipeline.run(fetch, multiply, items, empty, tiles)


def _store_columns(total, target, column, staging) -> None:
  """Stores sums, a piece as wide as a swizzle at a time."""
  slots, _, width = staging.shape
  for piece in range(total.shape[1] // width):
    panels.wait_for_slot(slots, piece)
    values = total[:, piece * width : (piece + 1) * width]
    staged = staging.at[piece % slots]
    staged[...] = values.astype(staged.dtype)
    plgpu.commit_smem()
    columns = pl.ds(column + piece * width, width)
    plgpu.copy_smem_to_gmem(staged, target.at[:, columns])


BACKEND = vjp.Backend(
  alignment,
  dispatch.underivable('grouped_matmul', product),
  dispatch.underivable('weight_gradient', weight_gradient),
)
