"""What the Hopper products share: roles, the ring of stages, the walk.

A block is three warpgroups. The first two are consumers: each issues wgmma for
half the rows of an output tile and stores them. The third is the copier: it
fills a ring of stages with operand tiles and runs ahead from one tile into the
next, so that the pipeline does not drain while results are stored.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles as tile_tables

ALIGN = 8  # rows of a swizzled tile in shared memory
SWIZZLE = 128  # bytes; also the width of a staged piece of output
CONSUMERS = 2  # warpgroups that multiply
HALF = 64  # rows of a wgmma, and of a warpgroup's share of a tile
ROWS = CONSUMERS * HALF  # of an output tile
COPIER_REGISTERS = 40
CONSUMER_REGISTERS = 232  # 2 * 232 + 40 fill the 504 a thread triple may have


def check(tiles: tile_tables.Tiles, rows: int, columns: int) -> None:
  """Raises ValueError if the tiles do not divide the output."""
  if rows % (ROWS * tiles.cluster) or columns % tiles.columns:
    raise ValueError(
      f'{tiles} do not divide {rows} rows and {columns} columns: tiles are '
      f'{ROWS * tiles.cluster} by {tiles.columns}'
    )


def mesh(name: str, tiles: tile_tables.Tiles, blocks: int | None) -> dict:
  """The grid of persistent blocks; None takes one a multiprocessor."""
  blocks = blocks or jax.local_devices()[0].core_count
  if blocks < tiles.cluster:
    raise ValueError(f'{blocks=} are fewer than {tiles.cluster=}')
  return {
    'kernel_name': name,
    'grid': (blocks // tiles.cluster,),
    'grid_names': ('cluster',),
    'cluster': (tiles.cluster,),
    'cluster_names': ('member',),
    'num_threads': CONSUMERS + 1,
    'thread_name': 'warpgroup',
  }


def swizzled(shape, dtype) -> plgpu.SMEM:
  """Shared memory in tiles of 8 rows of 128 bytes, as wgmma reads it."""
  return plgpu.SMEM(shape, dtype, transforms=transforms(dtype))


def transforms(dtype):
  """Of `swizzled` memory."""
  columns = SWIZZLE // jnp.dtype(dtype).itemsize
  return (
    plgpu.TilingTransform((ALIGN, columns)),
    plgpu.SwizzleTransform(SWIZZLE),
  )


def freed(tiles) -> plgpu.Barrier | plgpu.ClusterBarrier:
  """Barriers of the slots that may be filled again.

  A slot is free once the consumers of the whole cluster have read it, since
  what its members share is copied into the slots of all. There one thread of a
  warpgroup arrives, so its four warps must have met before: by wgmma, or by a
  barrier. A warp that has not seen its slot filled when it is filled again
  waits for a phase that never comes.
  """
  if tiles.cluster > 1:
    return plgpu.ClusterBarrier(
      collective_axes=('member',),
      num_arrivals=CONSUMERS,
      num_barriers=tiles.stages,
    )
  return plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages)


def scratch(tiles, a_shape, b_shape, chunk, out_dtype) -> dict:
  """The ring of stages, the staging of results, and their barriers."""
  return {
    'a_smem': swizzled((tiles.stages, *a_shape), jnp.bfloat16),
    'b_smem': swizzled((tiles.stages, *b_shape), jnp.bfloat16),
    'out_smem': swizzled((CONSUMERS, tiles.staging, HALF, chunk), out_dtype),
    'full': plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
    'empty': freed(tiles),
  }


def raster(item, rows, columns, band):
  """Row and column of the item-th tile: bands of rows, columns outermost.

  Blocks that run at the same time then share the same few columns of one
  operand and `band` rows of the other.
  """
  first = lax.div(item, band * columns) * band
  inner = item - first * columns
  height = jnp.minimum(band, rows - first)
  return first + lax.rem(inner, height), lax.div(inner, height)


def run(fetch, multiply, items, empty, tiles, ahead=lambda item: ()):
  """Walks this block's share of the items, each warpgroup in its own role.

  Args:
    fetch: (item, ring, *found) -> ring; copies an item's operands. `ring`
      counts the stages used so far, so that both roles agree on the next slot;
      `found` is what `ahead` gave for the item.
    multiply: (item, ring, warpgroup) -> ring.
    items: how many there are, for all blocks together.
    empty: barriers of the slots that may be filled again.
    tiles: how the products are cut.
    ahead: (item) -> arrays that the copier loads before the item's turn.
  """
  cluster, clusters = lax.axis_index('cluster'), lax.axis_size('cluster')
  warpgroup = lax.axis_index('warpgroup')
  mine = lax.div(items - cluster + clusters - 1, clusters)

  def walk(visit, *start):
    def body(index, carry):
      return visit(cluster + index * clusters, *carry)

    lax.fori_loop(0, mine, body, (jnp.int32(0), *start))

  @pl.when(warpgroup == CONSUMERS)
  def _():
    plgpu.set_max_registers(COPIER_REGISTERS, action='decrease')

    def find(item):  # past the last item it finds what nobody needs
      return ahead(jnp.maximum(jnp.minimum(item, items - 1), 0))

    def visit(item, ring, *found):
      return fetch(item, ring, *found), *find(item + clusters)

    walk(visit, *find(cluster))
    for slot in range(tiles.stages):  # leave no arrival unobserved
      plgpu.barrier_wait(empty.at[slot])

  @pl.when(warpgroup < CONSUMERS)
  def _():
    plgpu.set_max_registers(CONSUMER_REGISTERS, action='increase')
    for slot in range(tiles.stages):
      plgpu.barrier_arrive(empty.at[slot])
    walk(lambda item, ring: (multiply(item, ring, warpgroup),))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def fetch(copy, steps, ring, empty, tiles):
  """Copies `steps` pairs of operand tiles into the ring as slots get free."""

  def body(step, ring):
    slot = lax.rem(ring, tiles.stages)
    plgpu.barrier_wait(empty.at[slot])
    copy(step, slot)
    return ring + 1

  return lax.fori_loop(0, steps, body, ring)


def accumulate(step, steps, ring, full, empty, tiles, shapes, arrived=None):
  """Sums `steps` stages of the ring into registers.

  Args:
    step: (accs, slot, index) issues one product an accumulator.
    steps: stages to sum; none leave zeros.
    ring: stages used before.
    full: barriers of the slots that have been filled.
    empty: barriers of the slots that may be filled again.
    tiles: how the products are cut.
    shapes: of the accumulators.
    arrived: (ring) waits for what no bulk copy brings to the `ring`-th stage.

  Returns:
    The sums, float32.
  """

  def scope(*accs):
    def body(index, _):
      slot = lax.rem(ring + index, tiles.stages)
      plgpu.barrier_wait(full.at[slot])
      if arrived is not None:
        arrived(ring + index)
      step(accs, slot, index)
      # The products before these are done: their slot may be filled again.
      plgpu.wgmma_wait(len(accs))

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

    return [acc[...] for acc in accs]

  return pl.run_scoped(
    scope, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)
  )


def skip(steps, ring, full, empty, tiles, arrived=None):
  """Gives back `steps` stages unread."""

  def body(index, _):
    slot = lax.rem(ring + index, tiles.stages)
    plgpu.barrier_wait(full.at[slot])
    if arrived is not None:
      arrived(ring + index)
    plgpu.commit_smem()  # all four warps have seen it; see `freed`
    plgpu.barrier_arrive(empty.at[slot])

  lax.fori_loop(0, steps, body, None)


def multicast(tiles) -> dict:
  """Arguments of a copy that each member of a cluster does a part of."""
  return {'collective_axes': 'member'} if tiles.cluster > 1 else {}


def mask_rows(ref, count):
  """Sets the rows from `count` on to zero."""
  values = ref[...]
  ref[...] = jnp.where(
    row_index(values.shape) < count, values, jnp.zeros_like(values)
  )


def row_index(shape):
  return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
