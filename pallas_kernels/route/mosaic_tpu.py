"""Sigmoid top-k routing for TPUs, in Pallas Mosaic.

A block holds a few hundred tokens with their experts on the lanes. A round
finds each token's largest score and the lowest free lane that has it, and takes
it out; nothing is sorted. The same pass counts how often each expert was
chosen.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, tiles_tpu
from pallas_kernels.gmm import mosaic_tpu, stream_tpu
from pallas_kernels.route import vjp

LANES = tiles_tpu.LANES
SUBLANES = 8
WIDEST = 1024  # experts; a block of scores and ranks has to fit beside others
ROWS = 256  # tokens of a block


def refusal(experts: int, top_k: int) -> str | None:
  """Why this kernel cannot choose among so many experts here, or None."""
  if experts > WIDEST or top_k > LANES:
    return (
      f'chooses at most {LANES} of at most {WIDEST} experts, not {top_k} of '
      f'{experts}'
    )
  return mosaic_tpu.no_device()


def route(
  score_ME: jax.Array,
  bias_E: jax.Array,
  *,
  top_k: int,
  min_k: int,
  min_share: float,
  chip: tiles_tpu.Chip | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Chosen experts and their weights; see `pallas_kernels.route.api.route`."""
  index_MX, weight_MX, _ = route_and_count(
    score_ME, bias_E, top_k=top_k, min_k=min_k, min_share=min_share, chip=chip
  )
  return index_MX, weight_MX


def route_and_count(
  score_ME: jax.Array,
  bias_E: jax.Array,
  *,
  top_k: int,
  min_k: int,
  min_share: float,
  chip: tiles_tpu.Chip | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Also int32[E]: how many tokens chose each expert."""
  choose = functools.partial(_choose, chip=chip or tiles_tpu.here())
  return vjp.route(
    choose, score_ME, bias_E, top_k=top_k, min_k=min_k, min_share=min_share
  )


def _choose(score_ME, bias_E, top_k, min_k, min_share, *, chip):
  """The kernel on operands of the shapes that it wants."""
  tokens, experts = score_ME.shape
  rows = min(ROWS, -(-tokens // SUBLANES) * SUBLANES)
  steps = -(-tokens // (rows * chip.cores))
  pad_M = chip.cores * steps * rows - tokens
  pad_E = -experts % LANES
  score_ME = jnp.pad(score_ME, ((0, pad_M), (0, pad_E)))
  bias_1E = jnp.pad(bias_E, (0, pad_E))[None]
  wide = experts + pad_E

  def block(width):
    return pl.BlockSpec((rows, width), lambda core, n: (core * steps + n, 0))

  call = pl.pallas_call(
    functools.partial(
      _body,
      tokens=tokens,
      experts=experts,
      top_k=top_k,
      min_k=min_k,
      min_share=min_share,
    ),
    out_shape=[
      stream_tpu.like(score_ME, (tokens + pad_M, top_k), jnp.int32),
      stream_tpu.like(score_ME, (tokens + pad_M, top_k), jnp.float32),
      stream_tpu.like(score_ME, (chip.cores, SUBLANES, wide), jnp.float32),
    ],
    grid=(chip.cores, steps),
    in_specs=[block(wide), pl.BlockSpec((1, wide), lambda core, n: (0, 0))],
    out_specs=[
      block(top_k),
      block(top_k),
      pl.BlockSpec((1, SUBLANES, wide), lambda core, n: (core, 0, 0)),
    ],
    compiler_params=stream_tpu.params(chip, 2),
    cost_estimate=pl.CostEstimate(
      flops=9 * top_k * score_ME.size,
      bytes_accessed=4 * score_ME.size + 8 * tokens * top_k,
      transcendentals=0,
    ),
    interpret=chip.interpret,
    name='route',
  )
  index_MX, weight_MX, count_CSE = dispatch.narrow(call)(score_ME, bias_1E)
  count_E = count_CSE.sum((0, 1))[:experts].astype(jnp.int32)
  return index_MX[:tokens], weight_MX[:tokens], count_E


def _body(
  score_ref,
  bias_ref,
  index_ref,
  weight_ref,
  count_ref,
  *,
  tokens,
  experts,
  top_k,
  min_k,
  min_share,
):
  rows, wide = score_ref.shape
  score = score_ref[...]
  # Lanes as floats: every unit that reduces across lanes takes those.
  lane = lax.broadcasted_iota(jnp.int32, (rows, wide), 1).astype(jnp.float32)
  left = score + bias_ref[...]
  left = jnp.where(left == left, left, jnp.inf)  # no comparison finds a NaN
  left = jnp.where(lane < experts, left, -jnp.inf)
  # A bias of -inf is a score, too: what is taken is told by its lane.
  free = jnp.where(lane < experts, lane, float(wide))
  indices, chosen = [], []
  for _ in range(top_k):
    best = left.max(1, keepdims=True)
    index = jnp.where(left == best, free, float(wide)).min(1, keepdims=True)
    hit = lane == index
    indices.append(index)
    chosen.append(jnp.where(hit, score, 0).sum(1, keepdims=True))
    left = jnp.where(hit, -jnp.inf, left)
    free = jnp.where(hit, float(wide), free)
  keep = [True] * top_k
  if min_k < top_k:
    total = sum(chosen)
    keep[min_k:] = [z / total >= min_share for z in chosen[min_k:]]
  kept = [jnp.where(k, z, 0) for k, z in zip(keep, chosen)]
  total = sum(kept)
  slot = lax.broadcasted_iota(jnp.int32, (rows, top_k), 1)
  index_MX = jnp.full((rows, top_k), experts, jnp.float32)
  weight_MX = jnp.zeros((rows, top_k), jnp.float32)
  step = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
  row = step * rows + lax.broadcasted_iota(jnp.int32, (rows, wide), 0)
  count = jnp.zeros((rows, wide), jnp.float32)
  for x in range(top_k):
    used = jnp.where(keep[x], indices[x], float(experts))
    index_MX = jnp.where(slot == x, used, index_MX)
    weight_MX = jnp.where(slot == x, kept[x] / total, weight_MX)
    count += jnp.where((lane == used) & (row < tokens), 1.0, 0.0)
  index_ref[...] = index_MX.astype(jnp.int32)
  weight_ref[...] = weight_MX

  @pl.when(pl.program_id(1) == 0)
  def _():
    count_ref[...] = jnp.zeros(count_ref.shape, jnp.float32)

  # Rows add up in groups of a register's height; the rest is added outside.
  parts = count.reshape(rows // SUBLANES, SUBLANES, wide).sum(0)
  count_ref[0] += parts
