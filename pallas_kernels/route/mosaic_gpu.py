"""Sigmoid top-k routing for Hopper GPUs, in Pallas Mosaic GPU.

A warp owns a token: its scores lie in the registers of the 32 threads, as
integers of the same order. A round finds the largest and the lowest index that
has it, each by arithmetic in a thread and one instruction across the warp, and
takes it out. Nothing is sorted, and only the choice and its weights are stored.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, hopper
from pallas_kernels.route import vjp

WARPS = 4  # of a warpgroup
ROWS = 4 * WARPS  # tokens of a block
LANES = 128  # experts come in multiples of this: a vector of 4 for each thread
WIDEST = 512  # experts; their scores and ranks have to fit the registers
MOST = 32  # choices: their loop is unrolled
TAKEN = -(2**31)  # below every score

# [ROWS, experts]: rows to warps in turns, columns to threads.
ROW_A_WARP = plgpu.Layout.TILED(
  plgpu.Tiling(((WARPS, LANES), (4,))),
  warp_dims=(-3,),
  lane_dims=(-2,),
  vector_dim=-1,
)


def refusal(experts: int, top_k: int) -> str | None:
  """Why this kernel cannot choose among so many experts here, or None."""
  if experts > WIDEST or top_k > MOST:
    return (
      f'chooses at most {MOST} of at most {WIDEST} experts, not {top_k} of '
      f'{experts}'
    )
  return hopper.refusal()


def route(
  score_ME: jax.Array,
  bias_E: jax.Array,
  *,
  top_k: int,
  min_k: int,
  min_share: float,
) -> tuple[jax.Array, jax.Array]:
  """Chosen experts and their weights; see `pallas_kernels.route.api.route`."""
  return vjp.route(
    _choose, score_ME, bias_E, top_k=top_k, min_k=min_k, min_share=min_share
  )


def _choose(score_ME, bias_E, top_k, min_k, min_share):
  """The kernel on operands of the shapes that it wants."""
  tokens, experts = score_ME.shape
  pad_M = max(0, ROWS - tokens)
  pad_E = -experts % LANES
  bias_E = jnp.pad(bias_E, (0, pad_E))
  score_ME = jnp.pad(score_ME, ((0, pad_M), (0, pad_E)))
  rows = tokens + pad_M
  kernel = plgpu.kernel(
    functools.partial(
      _body,
      experts=experts,
      min_k=min_k,
      min_share=min_share,
    ),
    out_type=(
      jax.ShapeDtypeStruct((rows, top_k), jnp.int32),
      jax.ShapeDtypeStruct((rows, top_k), jnp.float32),
    ),
    grid=(pl.cdiv(rows, ROWS),),
    grid_names=('block',),
    kernel_name='route',
  )
  outputs = dispatch.narrow(kernel)(score_ME, bias_E)
  return tuple(hopper.varying_like(score_ME, x[:tokens]) for x in outputs)


def _body(
  score_ref, bias_ref, index_ref, weight_ref, *, experts, min_k, min_share
):
  # The last block starts early enough to be whole; tokens that it shares with
  # its neighbour get the same values from both.
  first = lax.min(lax.axis_index('block') * ROWS, score_ref.shape[0] - ROWS)
  rows = pl.ds(first, ROWS)
  score = plgpu.load(score_ref.at[rows], layout=ROW_A_WARP, optimized=False)
  bias = plgpu.load(bias_ref, layout=ROW_A_WARP.reduce(0), optimized=False)
  width = bias.shape[0]
  column = plgpu.broadcasted_iota(jnp.int32, score.shape, 1, layout=ROW_A_WARP)

  def spread(value):
    return lax.broadcast_in_dim(value, score.shape, (0,))

  left = _ordered(score + lax.broadcast_in_dim(bias, score.shape, (1,)))
  left = jnp.where(column < experts, left, TAKEN)
  bits = lax.bitcast_convert_type(score, jnp.int32)
  indices, chosen = [], []
  for _ in range(index_ref.shape[1]):
    best = left == spread(jnp.max(left, axis=1))
    # Ties go to the lowest index, the highest from the other end.
    index = width - jnp.max(jnp.where(best, width - column, 0), axis=1)
    own = column == spread(index)
    # A sum over one: integers have an instruction for it.
    score_bits = jnp.sum(jnp.where(own, bits, 0), axis=1)
    left = jnp.where(own, TAKEN, left)
    indices.append(index)
    chosen.append(lax.bitcast_convert_type(score_bits, jnp.float32))
  total = sum(chosen)
  for x in range(min_k, len(chosen)):
    keep = chosen[x] / total >= min_share
    indices[x] = jnp.where(keep, indices[x], experts)
    chosen[x] = jnp.where(keep, chosen[x], 0.0)
  total = sum(chosen)
  for x in range(len(chosen)):
    index_ref[rows, x] = indices[x]
    weight_ref[rows, x] = chosen[x] / total


def _ordered(x):
  """float32 as int32 of the same order, that of `lax.top_k`."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
