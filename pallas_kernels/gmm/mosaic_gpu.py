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
from pallas_kernels.gmm import layout, vjp

ALIGN = 8
SWIZZLE = 128  # bytes; also the width of a staged piece of output
CONSUMERS = 2  # warpgroups that multiply
HALF = 64  # rows of a wgmma, and of a warpgroup's share of a tile
COPIER_REGISTERS = 40
CONSUMER_REGISTERS = 232  # 2 * 232 + 40 fill the 504 a thread triple may have


def alignment(rows: int, groups: int, align: int) -> int:
  """The alignment that these kernels need, given rows aligned to `align`."""
  del groups
  return align if align % ALIGN == 0 and rows % ALIGN == 0 else ALIGN


def refusal(
  dtype: jnp.dtype, widths: tuple[int, int], out_dtype: jnp.dtype
) -> str | None:
  """Why these kernels cannot multiply such matrices, or None if they can."""
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or device.compute_capability != '9.0':
    return f'needs a Hopper GPU, not {device.device_kind}'
  if dtype != jnp.bfloat16:
    return f'multiplies bfloat16, not {dtype}'
  if out_dtype not in (jnp.bfloat16, jnp.float32):
    return f'gives bfloat16 or float32, not {out_dtype}'
  if any(width % 128 for width in widths):
    return f'needs widths in multiples of 128, not {widths}'
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
  plan = layout.schedule(sizes_G, rows, align, tiles.rows)
  chunk = SWIZZLE // jnp.dtype(out_dtype).itemsize
  w_shape = (tiles.depth, tiles.columns)
  kernel = plgpu.kernel(
    functools.partial(_product_body, tiles=tiles, transpose=transpose),
    out_type=jax.ShapeDtypeStruct((rows, columns), out_dtype),
    scratch_types=_scratch(
      tiles,
      (tiles.rows, tiles.depth),
      w_shape[::-1] if transpose else w_shape,
      chunk,
      out_dtype,
    ),
    **_mesh('grouped_matmul', tiles, blocks),
  )
  return kernel(*plan, x_PK, w_GKN)


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
  chunk = SWIZZLE // jnp.dtype(out_dtype).itemsize
  sizes_G = sizes_G.astype(jnp.int32)
  shape = sizes_G.shape[0], width, columns
  kernel = plgpu.kernel(
    functools.partial(_gradient_body, tiles=tiles),
    out_type=jax.ShapeDtypeStruct(shape, out_dtype),
    scratch_types=_scratch(
      tiles,
      (tiles.depth, tiles.rows),
      (tiles.depth, tiles.columns),
      chunk,
      out_dtype,
    )
    | {'masked': plgpu.Barrier(num_arrivals=CONSUMERS)},
    **_mesh('grouped_matmul_gradient', tiles, blocks),
  )
  return kernel(layout.starts(sizes_G, align), sizes_G, x_PK, dy_PN)


def _lookup(operation: str, depth: int, columns: int) -> tile_tables.Tiles:
  kind = jax.local_devices()[0].device_kind
  return tile_tables.lookup(kind, operation, (depth, columns))


def _mesh(name: str, tiles: tile_tables.Tiles, blocks: int | None) -> dict:
  blocks = blocks or jax.local_devices()[0].core_count
  return {
    'kernel_name': name,
    'grid': (blocks // tiles.cluster,),
    'grid_names': ('cluster',),
    'cluster': (tiles.cluster,),
    'cluster_names': ('member',),
    'num_threads': CONSUMERS + 1,
    'thread_name': 'warpgroup',
  }


def _scratch(tiles, a_shape, b_shape, chunk, out_dtype) -> dict:
  """The ring of stages, the staging of results, and their barriers."""

  def swizzled(shape, dtype):
    columns = SWIZZLE // jnp.dtype(dtype).itemsize
    transforms = (
      plgpu.TilingTransform((ALIGN, columns)),
      plgpu.SwizzleTransform(SWIZZLE),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)

  # A slot is free once the consumers of the whole cluster have read it, since
  # each member copies its part of a_smem to all.
  if tiles.cluster > 1:
    empty = plgpu.ClusterBarrier(
      collective_axes=('member',),
      num_arrivals=CONSUMERS,
      num_barriers=tiles.stages,
    )
  else:
    empty = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages)
  return {
    'a_smem': swizzled((tiles.stages, *a_shape), jnp.bfloat16),
    'b_smem': swizzled((tiles.stages, *b_shape), jnp.bfloat16),
    'out_smem': swizzled((CONSUMERS, tiles.staging, HALF, chunk), out_dtype),
    'full': plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
    'empty': empty,
  }


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
    tile, column = _raster(item, row_tiles, column_tiles, tiles.band)
    # A tile of no valid rows is stored as zeros without being multiplied.
    steps = jnp.where(valid_ref[tile] > 0, depth_steps, 0)
    return tile, _first_column(column, tiles), steps

  def fetch(item, ring):
    tile, column, steps = locate(item)
    row = pl.multiple_of(row_ref[tile], ALIGN)
    columns = pl.ds(column, tiles.columns)
    group, extent = group_ref[tile], extent_ref[tile]

    def copy(step, slot):
      deep = pl.ds(step * tiles.depth, tiles.depth)
      w_slice = (columns, deep) if transpose else (deep, columns)
      w_source = w_ref.at[group, *w_slice]
      plgpu.copy_gmem_to_smem(w_source, b_smem.at[slot], full.at[slot])

      def copy_rows(count):
        plgpu.copy_gmem_to_smem(
          x_ref.at[pl.ds(row, count), deep],
          a_smem.at[slot, pl.ds(0, count)],
          full.at[slot],
          **_multicast(tiles),
        )

      # The second half is not read where the tile ends within the first.
      lax.cond(
        extent > HALF, lambda: copy_rows(tiles.rows), lambda: copy_rows(HALF)
      )

    return _fetch(copy, steps, ring, empty, tiles)

  def multiply(item, ring, warpgroup):
    tile, column, steps = locate(item)
    first = warpgroup * HALF
    valid = valid_ref[tile] - first
    extent = extent_ref[tile] - first
    row = pl.multiple_of(row_ref[tile] + first, ALIGN)

    def step(acc, slot, index):
      del index
      w_smem = b_smem.at[slot]
      w_smem = w_smem.transpose((1, 0)) if transpose else w_smem
      plgpu.wgmma(acc, a_smem.at[slot, pl.ds(first, HALF)], w_smem)

    def store(chunk, values, slot):
      inside = _row_index(values.shape) < valid
      values = jnp.where(inside, values, jnp.zeros_like(values))
      out_smem[warpgroup, slot] = values.astype(y_ref.dtype)
      plgpu.commit_smem()
      width = values.shape[1]
      columns = pl.ds(column + chunk * width, width)
      _store_rows(out_smem.at[warpgroup, slot], y_ref, row, columns, extent)

    @pl.when(extent > 0)
    def _():
      _accumulate(step, store, steps, ring, full, empty, tiles, out_smem)

    @pl.when(extent <= 0)
    def _():
      _skip(steps, ring, full, empty, tiles)

    return ring + steps

  _run(fetch, multiply, row_tiles * column_tiles, empty, tiles)


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
  row_tiles = width // tiles.rows
  column_tiles = columns // (tiles.columns * tiles.cluster)

  def locate(item):
    group = lax.div(item, row_tiles * column_tiles)
    inner = lax.rem(item, row_tiles * column_tiles)
    tile, column = _raster(inner, row_tiles, column_tiles, tiles.band)
    steps = lax.div(size_ref[group] + tiles.depth - 1, tiles.depth)
    return group, tile * tiles.rows, _first_column(column, tiles), steps

  def fetch(item, ring):
    group, tile, column, steps = locate(item)
    start = start_ref[group]

    def copy(step, slot):
      first = pl.multiple_of(start + step * tiles.depth, ALIGN)
      rows = pl.ds(first, tiles.depth)
      plgpu.copy_gmem_to_smem(
        x_ref.at[rows, pl.ds(tile, tiles.rows)],
        a_smem.at[slot],
        full.at[slot],
        **_multicast(tiles),
      )
      plgpu.copy_gmem_to_smem(
        dy_ref.at[rows, pl.ds(column, tiles.columns)],
        b_smem.at[slot],
        full.at[slot],
      )

    return _fetch(copy, steps, ring, empty, tiles)

  def multiply(item, ring, warpgroup):
    group, tile, column, steps = locate(item)
    size = size_ref[group]
    mine = pl.ds(warpgroup * HALF, HALF)
    share = tiles.columns // CONSUMERS

    def step(acc, slot, index):
      left = size - index * tiles.depth

      # Rows past the group's last are another group's, or nobody's.
      @pl.when(left < tiles.depth)
      def _():
        _mask_rows(a_smem.at[slot, :, mine], left)
        _mask_rows(b_smem.at[slot, :, pl.ds(warpgroup * share, share)], left)
        plgpu.commit_smem()
        # Both warpgroups read all of b, of which each has masked its share.
        plgpu.barrier_arrive(masked)
        plgpu.barrier_wait(masked)

      x_smem = a_smem.at[slot, :, mine].transpose((1, 0))
      plgpu.wgmma(acc, x_smem, b_smem.at[slot])

    def store(chunk, values, slot):
      out_smem[warpgroup, slot] = values.astype(dw_ref.dtype)
      plgpu.commit_smem()
      width = values.shape[1]
      target = dw_ref.at[
        group,
        pl.ds(tile + warpgroup * HALF, HALF),
        pl.ds(column + chunk * width, width),
      ]
      plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, slot], target)

    _accumulate(step, store, steps, ring, full, empty, tiles, out_smem)
    return ring + steps

  _run(fetch, multiply, groups * row_tiles * column_tiles, empty, tiles)


def _run(fetch, multiply, items, empty, tiles):
  """Walks this block's share of the items, each warpgroup in its own role.

  Args:
    fetch: (item, ring) -> ring; copies an item's operands. `ring` counts the
      stages used so far, so that both roles agree on the next slot.
    multiply: (item, ring, warpgroup) -> ring.
    items: how many there are, for all blocks together.
    empty: barriers of the slots that may be filled again.
    tiles: how the products are cut.
  """
  cluster, clusters = lax.axis_index('cluster'), lax.axis_size('cluster')
  warpgroup = lax.axis_index('warpgroup')
  mine = lax.div(items - cluster + clusters - 1, clusters)

  def walk(visit):
    def body(index, ring):
      return visit(cluster + index * clusters, ring)

    lax.fori_loop(0, mine, body, jnp.int32(0))

  @pl.when(warpgroup == CONSUMERS)
  def _():
    plgpu.set_max_registers(COPIER_REGISTERS, action='decrease')
    walk(fetch)
    for slot in range(tiles.stages):  # leave no arrival unobserved
      plgpu.barrier_wait(empty.at[slot])

  @pl.when(warpgroup < CONSUMERS)
  def _():
    plgpu.set_max_registers(CONSUMER_REGISTERS, action='increase')
    for slot in range(tiles.stages):
      plgpu.barrier_arrive(empty.at[slot])
    walk(lambda item, ring: multiply(item, ring, warpgroup))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _fetch(copy, steps, ring, empty, tiles):
  """Copies `steps` pairs of operand tiles into the ring as slots get free."""

  def body(step, ring):
    slot = lax.rem(ring, tiles.stages)
    plgpu.barrier_wait(empty.at[slot])
    copy(step, slot)
    return ring + 1

  return lax.fori_loop(0, steps, body, ring)


def _multicast(tiles) -> dict:
  """Arguments of a copy that each member of a cluster does a part of."""
  return {'collective_axes': 'member'} if tiles.cluster > 1 else {}


def _first_column(column, tiles):
  """First column of this member's tile, of the cluster's `column`-th tiles."""
  column = column * tiles.cluster + lax.axis_index('member')
  return pl.multiple_of(column * tiles.columns, tiles.columns)


def _accumulate(step, store, steps, ring, full, empty, tiles, out_smem):
  """Sums `steps` stages of the ring into registers, then stores them.

  Args:
    step: (acc, slot, index) issues the product of one stage.
    store: (chunk, values, slot) writes a piece of the sum through the output
      staging `slot`.
    steps: stages to sum; none leave zeros.
    ring: stages used before.
    full: barriers of the slots that have been filled.
    empty: barriers of the slots that may be filled again.
    tiles: how the products are cut.
    out_smem: staging of the output.
  """

  def scope(acc):
    def body(index, _):
      slot = lax.rem(ring + index, tiles.stages)
      plgpu.barrier_wait(full.at[slot])
      step(acc, slot, index)
      # The product before this one is done: its slot may be filled again.
      plgpu.wgmma_wait(1)

      @pl.when(index > 0)
      def _():
        before = lax.rem(ring + index - 1, tiles.stages)
        plgpu.barrier_arrive(empty.at[before])

    lax.fori_loop(0, steps, body, None)
    plgpu.wgmma_wait(0)

    @pl.when(steps > 0)
    def _():
      last = lax.rem(ring + steps - 1, tiles.stages)
      plgpu.barrier_arrive(empty.at[last])

    return acc[...]

  total = pl.run_scoped(scope, plgpu.ACC((HALF, tiles.columns), jnp.float32))
  width = out_smem.shape[-1]
  for chunk in range(tiles.columns // width):
    plgpu.wait_smem_to_gmem(tiles.staging - 1, wait_read_only=True)
    values = total[:, chunk * width : (chunk + 1) * width]
    store(chunk, values, chunk % tiles.staging)


def _skip(steps, ring, full, empty, tiles):
  """Gives back `steps` stages unread."""

  def body(index, _):
    slot = lax.rem(ring + index, tiles.stages)
    plgpu.barrier_wait(full.at[slot])
    plgpu.barrier_arrive(empty.at[slot])

  lax.fori_loop(0, steps, body, None)


def _store_rows(staged, y_ref, row, columns, extent):
  """Copies the first `extent` staged rows, a multiple of 8, to `row` on."""

  @pl.when(extent >= HALF)
  def _():
    target = y_ref.at[pl.ds(row, HALF), columns]
    plgpu.copy_smem_to_gmem(staged, target, commit_group=False)

  @pl.when(extent < HALF)
  def _():
    for piece in range(0, HALF - ALIGN, ALIGN):

      @pl.when(piece < extent)
      def _(piece=piece):
        plgpu.copy_smem_to_gmem(
          staged.at[pl.ds(piece, ALIGN)],
          y_ref.at[pl.ds(row + piece, ALIGN), columns],
          commit_group=False,
        )

  plgpu.commit_smem_to_gmem_group()


def _mask_rows(ref, count):
  """Sets the rows from `count` on to zero."""
  values = ref[...]
  ref[...] = jnp.where(
    _row_index(values.shape) < count, values, jnp.zeros_like(values)
  )


def _row_index(shape):
  return plgpu.broadcasted_iota(
    jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA
  )


def _raster(item, rows, columns, band):
  """Row and column of the item-th tile: bands of rows, columns outermost.

  Blocks that run at the same time then share the same few columns of one
  operand and `band` rows of the other.
  """
  first = lax.div(item, band * columns) * band
  inner = item - first * columns
  height = jnp.minimum(band, rows - first)
  return first + lax.rem(inner, height), lax.div(inner, height)


BACKEND = vjp.Backend(alignment, product, weight_gradient)
