"""Grouped matrix products for Hopper GPUs, in Pallas Mosaic GPU.

One persistent block a multiprocessor. Its first two warpgroups own half the
rows of an output tile each and issue wgmma; the third only issues bulk copies
into a ring of stages, and runs ahead from one tile into the next, so that the
pipeline never drains while results are stored. Which tile belongs to which
group is read from tables made on the device (`layout.schedule`).

Groups start at multiples of 8 rows, the height of a swizzled tile in shared
memory: a tile may read rows of the next group, and results of those are not
stored; rows of no group are stored as zeros.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles as tile_tables
from pallas_kernels.gmm import layout, pipeline, vjp


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
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or device.compute_capability != '9.0':
    return f'needs a Hopper GPU, not {device.device_kind}'
  return None


def product(
  x_PK: jax.Array,
  w_GKN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  transpose: bool,
  out_dtype: jax.typing.DTypeLike,
  tiles: tile_tables.Tiles | None = None,
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
    tiles: how to cut; None looks the device up.
    blocks: persistent blocks; None takes one a multiprocessor.
  """
  rows, depth = x_PK.shape
  columns = w_GKN.shape[1 if transpose else 2]
  operation = 'transposed' if transpose else 'product'
  tiles = tiles or _lookup(operation, depth, columns)
  pipeline.check(tiles, depth % tiles.depth, columns)
  plan = layout.schedule(sizes_G, rows, align, pipeline.ROWS)
  chunk = pipeline.SWIZZLE // jnp.dtype(out_dtype).itemsize
  w_shape = (tiles.depth, tiles.columns)
  kernel = plgpu.kernel(
    functools.partial(_product_body, tiles=tiles, transpose=transpose),
    out_type=jax.ShapeDtypeStruct((rows, columns), out_dtype),
    scratch_types=pipeline.scratch(
      tiles,
      (pipeline.ROWS, tiles.depth),
      w_shape[::-1] if transpose else w_shape,
      chunk,
      out_dtype,
    ),
    **pipeline.mesh('grouped_matmul', tiles, blocks),
  )
  return _varying_like(x_PK, kernel(*plan, x_PK, w_GKN))


def weight_gradient(
  x_PK: jax.Array,
  dy_PN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  out_dtype: jax.typing.DTypeLike,
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
    tiles: how to cut; None looks the device up.
    blocks: persistent blocks; None takes one a multiprocessor.
  """
  width, columns = x_PK.shape[1], dy_PN.shape[1]
  tiles = tiles or _lookup('weight_gradient', width, columns)
  pipeline.check(tiles, width % pipeline.ROWS, columns)
  chunk = pipeline.SWIZZLE // jnp.dtype(out_dtype).itemsize
  sizes_G = sizes_G.astype(jnp.int32)
  shape = sizes_G.shape[0], width, columns
  kernel = plgpu.kernel(
    functools.partial(_gradient_body, tiles=tiles),
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
  return _varying_like(x_PK, kernel(start_G, sizes_G, x_PK, dy_PN))


def _varying_like(x: jax.Array, y: jax.Array) -> jax.Array:
  """Inside `shard_map`, marks `y` as differing over the axes that `x` does.

  Kernels are not told on which axes their operands differ.
  """
  axes = jax.typeof(x).mat.varying - jax.typeof(y).mat.varying
  return lax.pcast(y, tuple(axes), to='varying') if axes else y


def _lookup(operation: str, depth: int, columns: int) -> tile_tables.Tiles:
  kind = jax.local_devices()[0].device_kind
  return tile_tables.lookup(kind, operation, (depth, columns))


def _copy_rows(x_ref, row, deep, extent, a_smem, full, slot, tiles):
  """Fetches a tile of rows; its second half only if the tile reaches it."""

  def copy(count):
    plgpu.copy_gmem_to_smem(
      x_ref.at[pl.ds(row, count), deep],
      a_smem.at[slot, pl.ds(0, count)],
      full.at[slot],
      **pipeline.multicast(tiles),
    )

  lax.cond(
    extent > pipeline.HALF,
    lambda: copy(pipeline.ROWS),
    lambda: copy(pipeline.HALF),
  )


def _product_body(
  group_ref,
  row_ref,
  valid_ref,
  extent_ref,
  count_ref,
  x_ref,
  w_ref,
  y_ref,
  *,
  a_smem,
  b_smem,
  out_smem,
  full,
  empty,
  tiles,
  transpose,
):
  depth_steps = x_ref.shape[1] // tiles.depth
  column_tiles = y_ref.shape[1] // (tiles.columns * tiles.cluster)
  row_tiles = count_ref[0]

  def locate(item):
    tile, column = pipeline.raster(item, row_tiles, column_tiles, tiles.band)
    # A tile of no valid rows is stored as zeros without being multiplied.
    steps = jnp.where(valid_ref[tile] > 0, depth_steps, 0)
    return tile, pipeline.first_column(column, tiles), steps

  def fetch(item, ring):
    tile, column, steps = locate(item)
    row = pl.multiple_of(row_ref[tile], pipeline.ALIGN)
    columns = pl.ds(column, tiles.columns)
    group, extent = group_ref[tile], extent_ref[tile]

    def copy(step, slot):
      deep = pl.ds(step * tiles.depth, tiles.depth)
      w_slice = (columns, deep) if transpose else (deep, columns)
      w_source = w_ref.at[group, *w_slice]
      plgpu.copy_gmem_to_smem(w_source, b_smem.at[slot], full.at[slot])

      _copy_rows(x_ref, row, deep, extent, a_smem, full, slot, tiles)

    return pipeline.fetch(copy, steps, ring, empty, tiles)

  def multiply(item, ring, warpgroup):
    tile, column, steps = locate(item)
    first = warpgroup * pipeline.HALF
    valid = valid_ref[tile] - first
    extent = extent_ref[tile] - first
    row = pl.multiple_of(row_ref[tile] + first, pipeline.ALIGN)

    def step(acc, slot, index):
      del index
      w_smem = b_smem.at[slot]
      w_smem = w_smem.transpose((1, 0)) if transpose else w_smem
      plgpu.wgmma(acc, a_smem.at[slot, pl.ds(first, pipeline.HALF)], w_smem)

    def store(chunk, values, slot):
      inside = pipeline.row_index(values.shape) < valid
      values = jnp.where(inside, values, jnp.zeros_like(values))
      out_smem[warpgroup, slot] = values.astype(y_ref.dtype)
      plgpu.commit_smem()
      width = values.shape[1]
      columns = pl.ds(column + chunk * width, width)
      _store_rows(out_smem.at[warpgroup, slot], y_ref, row, columns, extent)

    @pl.when(extent > 0)
    def _():
      pipeline.accumulate(
        step, store, steps, ring, full, empty, tiles, out_smem
      )

    @pl.when(extent <= 0)
    def _():
      pipeline.skip(steps, ring, full, empty, tiles)

    return ring + steps

  pipeline.run(fetch, multiply, row_tiles * column_tiles, empty, tiles)


def _mask_tail(a_smem, b_smem, left, masked, tiles):
  """Zeroes rows past the group's last: another group's, or nobody's."""

  @pl.when(left < tiles.depth)
  def _():
    pipeline.mask_rows(a_smem, left)
    pipeline.mask_rows(b_smem, left)
    plgpu.commit_smem()
    # Both warpgroups read all of b, of which each has masked its share.
    plgpu.barrier_arrive(masked)
    plgpu.barrier_wait(masked)


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
):
  groups, width, columns = dw_ref.shape
  row_tiles = width // pipeline.ROWS
  column_tiles = columns // (tiles.columns * tiles.cluster)

  def locate(item):
    group = lax.div(item, row_tiles * column_tiles)
    inner = lax.rem(item, row_tiles * column_tiles)
    tile, column = pipeline.raster(inner, row_tiles, column_tiles, tiles.band)
    steps = lax.div(size_ref[group] + tiles.depth - 1, tiles.depth)
    first = pipeline.first_column(column, tiles)
    return group, tile * pipeline.ROWS, first, steps

  def fetch(item, ring):
    group, tile, column, steps = locate(item)
    start = start_ref[group]

    def copy(step, slot):
      first = pl.multiple_of(start + step * tiles.depth, pipeline.ALIGN)
      rows = pl.ds(first, tiles.depth)
      plgpu.copy_gmem_to_smem(
        x_ref.at[rows, pl.ds(tile, pipeline.ROWS)],
        a_smem.at[slot],
        full.at[slot],
        **pipeline.multicast(tiles),
      )
      plgpu.copy_gmem_to_smem(
        dy_ref.at[rows, pl.ds(column, tiles.columns)],
        b_smem.at[slot],
        full.at[slot],
      )

    return pipeline.fetch(copy, steps, ring, empty, tiles)

  def multiply(item, ring, warpgroup):
    group, tile, column, steps = locate(item)
    size = size_ref[group]
    mine = pl.ds(warpgroup * pipeline.HALF, pipeline.HALF)
    share = tiles.columns // pipeline.CONSUMERS

    def step(acc, slot, index):
      left = size - index * tiles.depth
      ours = b_smem.at[slot, :, pl.ds(warpgroup * share, share)]
      _mask_tail(a_smem.at[slot, :, mine], ours, left, masked, tiles)
      x_smem = a_smem.at[slot, :, mine].transpose((1, 0))
      plgpu.wgmma(acc, x_smem, b_smem.at[slot])

    def store(chunk, values, slot):
      out_smem[warpgroup, slot] = values.astype(dw_ref.dtype)
      plgpu.commit_smem()
      width = values.shape[1]
      target = dw_ref.at[
        group,
        pl.ds(tile + warpgroup * pipeline.HALF, pipeline.HALF),
        pl.ds(column + chunk * width, width),
      ]
      plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, slot], target)

    pipeline.accumulate(step, store, steps, ring, full, empty, tiles, out_smem)
    return ring + steps

  pipeline.run(fetch, multiply, groups * row_tiles * column_tiles, empty, tiles)


def _store_rows(staged, y_ref, row, columns, extent):
  """Copies the first `extent` staged rows, a multiple of 8, to `row` on."""

  @pl.when(extent >= pipeline.HALF)
  def _():
    target = y_ref.at[pl.ds(row, pipeline.HALF), columns]
    plgpu.copy_smem_to_gmem(staged, target, commit_group=False)

  @pl.when(extent < pipeline.HALF)
  def _():
    for piece in range(0, pipeline.HALF - pipeline.ALIGN, pipeline.ALIGN):

      @pl.when(piece < extent)
      def _(piece=piece):
        plgpu.copy_smem_to_gmem(
          staged.at[pl.ds(piece, pipeline.ALIGN)],
          y_ref.at[pl.ds(row + piece, pipeline.ALIGN), columns],
          commit_group=False,
        )

  plgpu.commit_smem_to_gmem_group()


BACKEND = vjp.Backend(alignment, product, weight_gradient)
