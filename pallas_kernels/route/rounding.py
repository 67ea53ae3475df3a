"""Token rounding: whole tiles of tokens for every expert, while training.

A grouped product computes whole tiles of rows, so an expert with 130 tokens
costs as much as one with 256. Rounding the tokens of each expert to a multiple
of the tile saves that work (SonicMoE, arXiv 2512.14080, section 5). It changes
what the model computes, by less than a tile for each expert, and makes a
token's experts depend on the other tokens of its batch, later ones too: it is
for training alone.
"""

import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.permute import api as permute
from pallas_kernels.route import api


def round_tokens(
  routing: api.Routing,
  rank_MX: Float[Array, 'M X'],
  experts: int,
  *,
  top_k: int,
  tile: int,
  axis: str | None = None,
  impl: dispatch.Impl | None = None,
) -> api.Routing:
  """Rounds each expert's tokens to the nearest multiple of a tile.

  An expert that is rounded down drops those of its tokens that want it least;
  one that is rounded up, as it is from half a tile, takes those that it wants
  most of the tokens that have it among their spare choices, and is rounded down
  where those are too few.

  Args:
    routing: of `route` with `top_k` and some spare choices: X in all, of which
      the first `top_k` are a token's own. E marks a slot that is not used.
    rank_MX: by what an expert prefers its tokens, none negative: the scores
      of the choices. Equal ones prefer the first token.
    experts: number of experts E.
    top_k: own choices of a token.
    tile: rows of a tile; 1 leaves the own choices as they are. Experts with
      less than half of one lose all their tokens.
    axis: inside `shard_map`, a mesh axis over whose devices the experts are
      split: the tokens of all of them are rounded together.
    impl: backend of `plan`, which ranks the choices; None picks the best.

  Returns:
    The choices, E where a slot is not used, and the weights of those that are
    used, which sum to 1, or to 0 for a token that lost all of them. They have
    derivatives with respect to the given weights.

  Raises:
    ValueError: `top_k` is not from 1 to X, `tile` below 1, or ranks of another
      shape.
  """
  index_MX, weight_MX, rank_MX = map(jnp.asarray, (*routing, rank_MX))
  index_MX = index_MX.astype(jnp.int32)  # groups are twice as many
  choices, tile = index_MX.shape[1], operator.index(tile)
  if not 0 < top_k <= choices or tile < 1:
    raise ValueError(f'need 0 < {top_k=} <= {choices} and {tile=} positive')
  if rank_MX.shape != index_MX.shape:
    raise ValueError(f'ranks {rank_MX.shape} are not of {index_MX.shape}')
  known = index_MX, jax.lax.stop_gradient(rank_MX)
  if axis is not None:
    # all-gather over `axis`: two numbers a choice.
    known = jax.lax.all_gather(known, axis, tiled=True)
  keep_MX = _kept(*known, experts, top_k, tile, impl)
  if axis is not None:
    first = jax.lax.axis_index(axis) * len(index_MX)
    keep_MX = jax.lax.dynamic_slice_in_dim(keep_MX, first, len(index_MX))
  weight_MX = jnp.where(keep_MX, weight_MX, 0)
  total_M1 = weight_MX.sum(1, keepdims=True)
  return api.Routing(
    jnp.where(keep_MX, index_MX, experts),
    weight_MX / jnp.where(total_M1 > 0, total_M1, 1),
  )


def spare_choices(tokens: int, experts: int, top_k: int, tile: int) -> int:
  """Spare choices a token: on average twice what rounding up needs.

  Args:
    tokens: M, of all that are rounded together.
    experts: E.
    top_k: own choices of a token; as many are spare at the most.
    tile: rows of a tile.
  """
  needed = -(-experts * tile // max(tokens, 1))
  return min(needed, top_k, experts - top_k)


def rounded_rows(tokens: int, experts: int, top_k: int, tile: int) -> int:
  """The most (token, choice) pairs that rounding leaves of some tokens.

  Args:
    tokens: all that are rounded together, or some of them.
    experts: those whose pairs count.
    top_k: own choices of a token.
    tile: rows of a tile.
  """
  return tokens * top_k + experts * (tile // 2)


def _kept(index_MX, rank_MX, experts, top_k, tile, impl) -> jax.Array:
  """Whether each choice stays."""
  choices = index_MX.shape[1]
  used_MX = (index_MX >= 0) & (index_MX < experts)
  spare_MX = jnp.broadcast_to(
    (jnp.arange(choices) >= top_k)[None], index_MX.shape
  )
  # Own choices of an expert are one group, its spare ones another.
  group_MX = jnp.where(used_MX, index_MX + experts * spare_MX, 2 * experts)
  # Bits of a float32 that is not negative are integers of the same order, and
  # one key and one value XLA sorts by radix on a GPU.
  bits_MX = jax.lax.bitcast_convert_type(
    jnp.abs(rank_MX.astype(jnp.float32)), jnp.int32
  )
  slot_P = jnp.arange(index_MX.size, dtype=jnp.int32)
  _, order_P = jax.lax.sort((-bits_MX.reshape(-1), slot_P), num_keys=1)
  # Stably by group, in the order of preference: places are ranks.
  sorted_P = group_MX.reshape(-1)[order_P]
  where = permute.plan(sorted_P[:, None], 2 * experts, impl=impl)
  start_G = jnp.append(where.start_G, 0)
  place_P = where.place_MX[:, 0] - start_G[sorted_P]
  place_MX = (
    jnp.zeros_like(place_P)
    .at[order_P]
    .set(place_P, unique_indices=True, mode='promise_in_bounds')
    .reshape(index_MX.shape)
  )
  own_E, spare_E = jnp.split(where.sizes_G, 2)
  down_E = own_E // tile * tile
  up_E = down_E + tile
  rises_E = (2 * (own_E - down_E) >= tile) & (own_E + spare_E >= up_E)
  target_E = jnp.where(rises_E, up_E, down_E)
  # Of the own ones the first `target` stay, of the spare ones what is lacking.
  quota_G = jnp.concatenate(
    [target_E, target_E - own_E, jnp.zeros(1, jnp.int32)]
  )
  return place_MX < quota_G[group_MX]
