"""Which rows go through which expert: tables for kernels of few tokens.

Experts read their weights once a tile, so the tokens of an expert are one tile
where they fit. All of it is arithmetic on small integers on the device, written
as sums over comparisons: each is one small kernel on a GPU, where a sort, a
scan or a scatter is several.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGN = 8  # rows of a swizzled tile in shared memory


class Plan(NamedTuple):
  """Rows grouped by expert; groups start at multiples of `ALIGN`.

  Attributes:
    place_MX: row of each (token, choice); 0 where it has no expert.
    valid_MX: whether it has one.
    source_P: the token of each row; rows of no group hold any token. None if
      every group holds all tokens in their own order.
    table_4T: of each tile its expert, its first row, how many rows it owns (a
      multiple of `ALIGN`), and how many tiles there are in all; entries past
      that number are padding.
  """

  place_MX: jax.Array
  valid_MX: jax.Array
  source_P: jax.Array | None
  table_4T: jax.Array


def rows(tokens: int, choices: int, experts: int, tile: int) -> int:
  """The worst case of rows that tiles may touch."""
  slots = tokens * choices
  groups = min(slots, experts)
  if tokens <= ALIGN:
    return groups * ALIGN
  # A tile may read past the rows that it owns.
  return (
    -(-slots // ALIGN) * ALIGN + groups * (ALIGN - 1) // ALIGN * ALIGN + (tile)
  )


def make(index_MX: jax.Array, experts: int, tile: int) -> Plan:
  """Groups (token, choice) pairs by expert and cuts groups into tiles.

  Args:
    index_MX: chosen experts; values outside [0, experts) choose none.
    experts: number of experts E.
    tile: most rows of a tile, a multiple of `ALIGN`.
  """
  tokens, choices = index_MX.shape
  slots = tokens * choices
  valid_MX = (index_MX >= 0) & (index_MX < experts)
  valid_R = valid_MX.reshape(-1)
  slot_R = jnp.arange(slots, dtype=jnp.int32)
  group_R = jnp.where(valid_R, index_MX.reshape(-1), experts).astype(jnp.int32)
  same_RR = group_R[:, None] == group_R[None]
  earlier_RR = same_RR & (slot_R[None] < slot_R[:, None])
  size_R, rank_R = _count(same_RR, earlier_RR)
  # One slot speaks for its whole group.
  first_R = valid_R & (rank_R == 0)
  # So few tokens fill no more than the narrowest product: then each expert
  # takes them all, as they lie, and nothing has to be gathered.
  whole = tokens <= ALIGN
  padded_R = ALIGN if whole else -(-size_R // ALIGN) * ALIGN
  padded_R = jnp.where(first_R, padded_R, 0)
  tiles_R = -(-padded_R // tile)
  below_RR = group_R[None] < group_R[:, None]
  start_R, tile_R = _count(
    jnp.where(below_RR, padded_R[None], 0),
    jnp.where(below_RR, tiles_R[None], 0),
  )
  offset_R = slot_R // choices if whole else rank_R
  place_R = jnp.where(valid_R, start_R + offset_R, 0)
  tile_T1 = jnp.arange(min(slots, experts) + slots // tile)[:, None]
  inner_TR = tile_T1 - tile_R[None]
  own_TR = (inner_TR >= 0) & (inner_TR < tiles_R[None])
  row_TR = inner_TR * tile
  table_4T = _count(
    jnp.where(own_TR, group_R[None], 0),
    jnp.where(own_TR, start_R[None] + row_TR, 0),
    jnp.where(own_TR, jnp.minimum(padded_R[None] - row_TR, tile), 0),
    jnp.broadcast_to(tiles_R[None], own_TR.shape),
  )
  source_P = None
  if not whole:
    row_P = jnp.arange(rows(tokens, choices, experts, tile), dtype=jnp.int32)
    here_PR = (row_P[:, None] == place_R[None]) & valid_R[None]
    source_P = jnp.where(here_PR, slot_R[None] // choices, 0).sum(1)
  place_MX = place_R.reshape(index_MX.shape)
  return Plan(place_MX, valid_MX, source_P, table_4T)


def _count(*z_NR: jax.Array) -> jax.Array:
  """Sums of several arrays along their last axis, in one kernel."""
  return jnp.stack(z_NR).sum(-1, dtype=jnp.int32)


def combine(
  y_PN: jax.Array, plan: Plan, weight_MX: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """Weighted sum over each token's choices, accumulated in float32."""
  # A sum over explicit choices is one kernel that reads each row once.
  total_MN = 0.0
  for choice in range(weight_MX.shape[1]):
    y_MN = y_PN[plan.place_MX[:, choice]].astype(jnp.float32)
    scaled_MN = y_MN * weight_MX[:, choice, None].astype(jnp.float32)
    # Rows of no expert may hold anything, not a number even.
    total_MN += jnp.where(plan.valid_MX[:, choice, None], scaled_MN, 0)
  return total_MN.astype(dtype)
