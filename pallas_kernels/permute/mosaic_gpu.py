"""Sorting tokens by group on Hopper GPUs, in Pallas Mosaic GPU.

Nothing is sorted: where a (token, choice) goes is the start of its group, plus
how many chose that group in the blocks before, plus its rank within its block.
64 tokens get their ranks among 64 groups from one product of a triangle of ones
with their one-hot choices, exact in float32.

Rows then move by bulk copies, each token's row once through shared memory: out
to all its places, or in from all of them and summed. A row of M2 is one copy
of 6 KB, so a single warpgroup keeps a multiprocessor's share of the memory
bandwidth busy.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.permute import layout

BAND = 64  # tokens that are ranked together: the height of a wgmma
LANES = 8  # choices come in multiples of this
GROUPS = 64  # groups of a block, a swizzled tile's width
WIDEST = 1024  # groups; XLA compares each with all others
RANKERS = 128  # blocks of tokens; each carries its counts along its tokens
WIDTH = 128  # rows come in multiples of this, one value a thread
TOKEN_BYTES = 48 << 10  # of a token's rows that are summed together
GATHER_SLOTS, GATHER_AHEAD = 8, 4  # rows in shared memory; loads in flight
COMBINE_SLOTS = 2  # such sums whose rows are in shared memory
RESIDENT = 2  # blocks a multiprocessor that move rows


def plan_refusal(groups: int) -> str | None:
  """Why these kernels cannot place rows of so many groups here, or None."""
  if groups > WIDEST:
    return f'places at most {WIDEST} groups, not {groups}'
  return hopper.refusal()


def rows_refusal(dtype: jnp.dtype, width: int) -> str | None:
  """Why these kernels cannot move such rows here, or None."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f'moves bfloat16 or float32, not {dtype}'
  if width % WIDTH:
    return f'needs rows in multiples of {WIDTH}, not {width}'
  row = width * dtype.itemsize
  if (GATHER_SLOTS + 1) * row > hopper.SHARED:
    most = hopper.SHARED // (GATHER_SLOTS + 1)
    return f'needs a row in {most} bytes, not {row}'
  return hopper.refusal()


def plan(
  index_MX: jax.Array, groups: int, align: int, rows: int | None = None
) -> layout.Plan:
  """See `pallas_kernels.permute.api.plan`."""
  slots = index_MX.size
  positions = layout.positions(rows or slots, groups, align)
  here_MX = (index_MX >= 0) & (index_MX < groups)
  rank_MX, counts_BG, block = ranks(index_MX, groups)
  blocks = counts_BG.shape[0]
  # Sums of a comparison of all with all are one small kernel each on a GPU,
  # where a scan is many. The last row is what all blocks together have.
  earlier_CB = jnp.tri(blocks + 1, blocks, -1, dtype=jnp.int32)
  before_CG = (earlier_CB[:, :, None] * counts_BG[None]).sum(1)
  sizes_G = before_CG[-1]
  padded_G = -(-sizes_G // align) * align
  earlier_GG = jnp.tri(groups, k=-1, dtype=jnp.int32)
  start_G = (earlier_GG * padded_G[None]).sum(1)
  base_CG = before_CG + start_G[None]
  block_M1 = jnp.arange(index_MX.shape[0])[:, None] // block
  base_MX = base_CG.at[block_M1, jnp.where(here_MX, index_MX, 0)].get(
    mode='promise_in_bounds'
  )
  place_MX = jnp.where(here_MX, base_MX + rank_MX, positions)
  # No two of the places below P are equal, and those at P are dropped.
  source_P = (
    jnp.full(positions, slots, jnp.int32)
    .at[place_MX.reshape(-1)]
    .set(jnp.arange(slots, dtype=jnp.int32), mode='drop', unique_indices=True)
  )
  return layout.Plan(sizes_G, start_G, place_MX, source_P)


def ranks(index_MX: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, int]:
  """How many choices before each one, in its block, are of the same group.

  Args:
    index_MX: chosen groups; values outside [0, groups) choose none.
    groups: number of groups G.

  Returns:
    int32 rank_MX, undefined where there is no group; int32 counts_BG, choices
    of each group in each block; and how many tokens a block has.
  """
  tokens, choices = index_MX.shape
  steps = pl.cdiv(pl.cdiv(tokens, BAND), RANKERS)
  blocks = pl.cdiv(tokens, steps * BAND)
  pad_M = blocks * steps * BAND - tokens
  pad_X = -choices % LANES
  if pad_M or pad_X:
    index_MX = jnp.pad(index_MX, ((0, pad_M), (0, pad_X)), constant_values=-1)
  parts = pl.cdiv(groups, GROUPS)
  transforms = (
    plgpu.TilingTransform((8, GROUPS)),
    plgpu.SwizzleTransform(2 * GROUPS),
  )
  kernel = plgpu.kernel(
    functools.partial(_rank_body, steps=steps, choices=choices),
    out_type=(
      jax.ShapeDtypeStruct((parts, *index_MX.shape), jnp.int32),
      jax.ShapeDtypeStruct((blocks, parts * GROUPS), jnp.int32),
    ),
    scratch_types={
      'earlier_smem': plgpu.SMEM(
        (BAND, BAND), jnp.bfloat16, transforms=transforms
      ),
      'chose_smem': plgpu.SMEM(
        (BAND, GROUPS), jnp.bfloat16, transforms=transforms
      ),
    },
    grid=(blocks, parts),
    grid_names=('block', 'part'),
    kernel_name='rank',
  )
  rank_QMX, counts_BG = (
    hopper.varying_like(index_MX, x) for x in kernel(index_MX.astype(jnp.int32))
  )
  rank_MX = rank_QMX.sum(0)[:tokens, :choices]
  return rank_MX, counts_BG[:, :groups], steps * BAND


def _rank_body(
  index_ref, rank_ref, counts_ref, *, earlier_smem, chose_smem, steps, choices
):
  """Ranks of a block's choices among the groups of a part; 0 for others."""
  block, part = lax.axis_index('block'), lax.axis_index('part')
  wgmma = plgpu.Layout.WGMMA
  iota = functools.partial(plgpu.broadcasted_iota, layout=wgmma)
  square = BAND, GROUPS
  later = iota(jnp.int32, square, 0) > iota(jnp.int32, square, 1)
  earlier_smem[...] = jnp.where(later, 1.0, 0.0).astype(jnp.bfloat16)
  slot = iota(jnp.int32, (BAND, index_ref.shape[1]), 1)
  group = iota(jnp.int32, square, 1)

  def spread(value, shape=square):
    return lax.broadcast_in_dim(value, shape, (0,))

  def product(acc):
    plgpu.wgmma(acc, earlier_smem, chose_smem)
    plgpu.wgmma_wait(0)
    return acc[...]

  def step(index, counts):
    first = pl.multiple_of((block * steps + index) * BAND, BAND)
    rows = pl.ds(first, BAND)
    index_MX = plgpu.load(index_ref.at[rows], layout=wgmma, optimized=False)
    index_MX -= part * GROUPS
    chosen = [
      jnp.sum(jnp.where(slot == x, index_MX, 0), axis=1) for x in range(choices)
    ]
    chose = sum(jnp.where(spread(c) == group, 1.0, 0.0) for c in chosen)
    chose_smem[...] = chose.astype(jnp.bfloat16)
    plgpu.commit_smem()
    before = pl.run_scoped(product, plgpu.ACC(square, jnp.float32))
    before += lax.broadcast_in_dim(counts, square, (1,))
    # Compared as another type, so that the compiler does not keep the first
    # comparisons, more than there are registers, instead of repeating them.
    group_f = group.astype(jnp.float32)
    ranks = jnp.zeros(slot.shape, jnp.float32)
    for x in range(choices):
      own = spread(chosen[x].astype(jnp.float32)) == group_f
      rank = jnp.sum(jnp.where(own, before, 0.0), axis=1)
      for y in range(x):  # a token may choose a group twice
        rank += jnp.where(chosen[y] == chosen[x], 1.0, 0.0)
      ranks = jnp.where(slot == x, spread(rank, slot.shape), ranks)
    here = (index_MX >= 0) & (index_MX < GROUPS)
    rank_ref[part, rows] = jnp.where(here, ranks.astype(jnp.int32), 0)
    return counts + jnp.sum(chose, axis=0)

  none = plgpu.layout_cast(jnp.zeros(GROUPS, jnp.float32), wgmma.reduce(0))
  counts = lax.fori_loop(0, steps, step, none)
  counts_ref[block, pl.ds(part * GROUPS, GROUPS)] = counts.astype(jnp.int32)


def gather(
  x_MD: jax.Array,
  plan: layout.Plan,
  clear: int | None = None,
  *,
  blocks: int | None = None,
) -> jax.Array:
  """Copies each token's row to its places; zeros where there is no token.

  Args:
    x_MD: tokens, bfloat16 or float32.
    plan: their places, and where groups begin and end.
    clear: of the positions after the last group only so many are set to zero,
      the others are left as they were in memory; None = all are zero.
    blocks: persistent blocks; None takes two a multiprocessor.

  Returns:
    x_PD in the dtype of `x_MD`.
  """
  positions = plan.source_P.shape[0]
  tokens, width = x_MD.shape
  box = hopper.box(width)
  kernel = plgpu.kernel(
    functools.partial(
      _gather_body, clear=positions if clear is None else clear
    ),
    out_type=jax.ShapeDtypeStruct((positions, *box), x_MD.dtype),
    scratch_types={
      'ring': plgpu.SMEM((GATHER_SLOTS, *box), x_MD.dtype),
      'zero': plgpu.SMEM(box, x_MD.dtype),
      'full': plgpu.Barrier(num_barriers=GATHER_SLOTS),
    },
    grid=(blocks or resident_blocks(),),
    grid_names=('block',),
    kernel_name='gather_rows',
  )
  x_PD = kernel(
    x_MD.reshape(tokens, *box), plan.sizes_G, plan.start_G, plan.place_MX
  )
  return hopper.varying_like(x_MD, x_PD.reshape(positions, width))


def _gather_body(
  x_ref, sizes_ref, start_ref, place_ref, out_ref, *, ring, zero, full, clear
):
  block, blocks = lax.axis_index('block'), lax.axis_size('block')
  tokens, choices = place_ref.shape
  groups, positions = sizes_ref.shape[0], out_ref.shape[0]
  mine = lax.div(tokens - block + blocks - 1, blocks)

  def load(index):
    slot = lax.rem(index, GATHER_SLOTS)
    source = x_ref.at[block + index * blocks]
    plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])

  for index in range(GATHER_AHEAD):
    pl.when(index < mine)(functools.partial(load, index))

  # With a layout of its own: that of a constant does not fit every width.
  strided = plgpu.Layout.WG_STRIDED(zero.shape, vec_size=1)
  zero[...] = plgpu.layout_cast(jnp.zeros(zero.shape, zero.dtype), strided)
  plgpu.commit_smem()

  def erase(position, _):
    plgpu.copy_smem_to_gmem(zero, out_ref.at[position])

  def gap(index, _):
    group = block + index * blocks
    end = start_ref[group] + sizes_ref[group]
    lax.fori_loop(end, start_ref[group + 1], erase, None)

  # A gap is at most align - 1 rows, except that after the last group.
  lax.fori_loop(0, lax.div(groups - block + blocks - 2, blocks), gap, None)
  tail = start_ref[groups - 1] + sizes_ref[groups - 1]
  count = jnp.minimum(positions - tail, clear)
  left = lax.div(jnp.maximum(count - block + blocks - 1, 0), blocks)
  lax.fori_loop(
    0, left, lambda index, _: erase(tail + block + index * blocks, None), None
  )

  def token(index, _):
    slot = lax.rem(index, GATHER_SLOTS)
    places = [place_ref[block + index * blocks, x] for x in range(choices)]
    plgpu.barrier_wait(full.at[slot])
    for position in places:

      @pl.when(position < positions)
      def _(position=position):
        plgpu.copy_smem_to_gmem(
          ring.at[slot], out_ref.at[position], commit_group=False
        )

    plgpu.commit_smem_to_gmem_group()
    # The slot filled next was stored from SLOTS - AHEAD tokens ago.
    plgpu.wait_smem_to_gmem(GATHER_SLOTS - GATHER_AHEAD, wait_read_only=True)
    pl.when(index + GATHER_AHEAD < mine)(
      functools.partial(load, index + GATHER_AHEAD)
    )

  lax.fori_loop(0, mine, token, None)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def combine(
  y_PD: jax.Array,
  place_MX: jax.Array,
  weight_MX: jax.Array | None,
  *,
  blocks: int | None = None,
) -> jax.Array:
  """Sums the rows at each token's places, times weights, in float32.

  Args:
    y_PD: rows, bfloat16 or float32.
    place_MX: positions of each token's rows, or P for a row of zeros.
    weight_MX: float32 weights; None takes 1.
    blocks: persistent blocks; None takes two a multiprocessor.

  Returns:
    y_MD in the dtype of `y_PD`.
  """
  if y_PD.shape[0] == 1:  # bulk copies do not check the bounds of one row
    y_PD = jnp.pad(y_PD, ((0, 1), (0, 0)))
  positions, width = y_PD.shape
  tokens, choices = place_MX.shape
  box = hopper.box(width)
  weights = () if weight_MX is None else (weight_MX.astype(jnp.float32),)
  kernel = plgpu.kernel(
    _combine_body if weights else functools.partial(_combine_body, None),
    out_type=jax.ShapeDtypeStruct((tokens, *box), y_PD.dtype),
    scratch_types=combine_scratch(choices, box, y_PD.dtype),
    grid=(blocks or resident_blocks(),),
    grid_names=('block',),
    kernel_name='combine_rows',
  )
  y_MD = kernel(*weights, place_MX, y_PD.reshape(positions, *box))
  return hopper.varying_like(y_PD, y_MD.reshape(tokens, width))


def combine_scratch(choices: int, box: tuple[int, int], dtype) -> dict:
  """What `combine_tokens` needs of shared memory and barriers."""
  most = TOKEN_BYTES // (math.prod(box) * jnp.dtype(dtype).itemsize)
  together = pl.cdiv(choices, pl.cdiv(choices, most))
  return {
    'ring': plgpu.SMEM((COMBINE_SLOTS, together, *box), dtype),
    'staging': plgpu.SMEM((2, *box), dtype),
    'full': plgpu.Barrier(num_arrivals=together, num_barriers=COMBINE_SLOTS),
  }


def _combine_body(
  weight_ref, place_ref, y_ref, out_ref, *, ring, staging, full
):
  block, blocks = lax.axis_index('block'), lax.axis_size('block')
  tokens = place_ref.shape[0]
  combine_tokens(
    weight_ref, place_ref, y_ref, ring, staging, full,
    count=lax.div(tokens - block + blocks - 1, blocks),
    number=lambda index: block + index * blocks,
    target=lambda index: out_ref.at[block + index * blocks],
  )  # fmt: skip


def combine_tokens(
  weight_ref,
  place_ref,
  y_ref,
  ring,
  staging,
  full,
  *,
  count: jax.Array,
  number: Callable,
  target: Callable,
  added: Sequence[Callable] = (),
) -> None:
  """A block's part of `combine`; returns when `staging` is free again.

  Args:
    weight_ref: float32 weights, or None for 1.
    place_ref: positions of each token's rows.
    y_ref: the rows.
    ring: as `combine_scratch` has it, and so are those that follow.
    staging: two rows on their way to memory.
    full: one barrier a slot of the ring.
    count: tokens.
    number: index below `count` -> the token.
    target: index -> where its sum goes.
    added: index -> a row that is added to the sum, each.
  """
  choices, together = place_ref.shape[1], ring.shape[1]
  parts = pl.cdiv(choices, together)

  def load(index, part):
    slot, token = lax.rem(index * parts + part, COMBINE_SLOTS), number(index)
    for x in range(together):
      # Position P is past the end, where a bulk copy reads zeros.
      choice = part * together + x
      position = place_ref[token, min(choice, choices - 1)]
      if choice >= choices:
        position += y_ref.shape[0]
      plgpu.copy_gmem_to_smem(
        y_ref.at[position], ring.at[slot, x], full.at[slot]
      )

  def ahead(index, part):
    """Loads what comes so many parts later as there are slots."""
    tokens, part = divmod(part + COMBINE_SLOTS, parts)
    pl.when(index + tokens < count)(lambda: load(index + tokens, part))

  for unit in range(COMBINE_SLOTS):
    ahead(0, unit - COMBINE_SLOTS)

  def token(index, _):
    half = lax.rem(index, 2)
    rows = [row(index) for row in added]  # on their way while others come
    total = jnp.zeros(staging.shape[1:], jnp.float32)
    for part in range(parts):
      slot = lax.rem(index * parts + part, COMBINE_SLOTS)
      plgpu.barrier_wait(full.at[slot])
      first = part * together
      for x in range(first, min(first + together, choices)):
        row = ring[slot, x - first].astype(jnp.float32)
        weighted = weight_ref is not None
        total += weight_ref[number(index), x] * row if weighted else row
      if part + 1 < parts:
        plgpu.commit_smem()  # all threads have read the slot
        ahead(index, part)
    for row in rows:
      total += row.astype(jnp.float32)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    staging[half] = total.astype(staging.dtype)
    # All threads have read the slot once they are here.
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.at[half], target(index))
    ahead(index, parts - 1)

  lax.fori_loop(0, count, token, None)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def weight_gradient(
  y_PD: jax.Array, dy_MD: jax.Array, place_MX: jax.Array
) -> jax.Array:
  """float32 products of each token's rows with the gradient of their sum."""
  dy_MD = dy_MD.astype(jnp.float32)
  # One slot at a time: XLA then gathers inside the sum.
  return jnp.stack(
    [
      (y_PD.at[place_M].get(mode='fill', fill_value=0) * dy_MD).sum(1)
      for place_M in place_MX.T
    ],
    axis=1,
  )


def resident_blocks() -> int:
  """Persistent blocks of the kernels that move rows."""
  return RESIDENT * jax.local_devices()[0].core_count


MOVES = layout.Moves(gather, combine, weight_gradient)
