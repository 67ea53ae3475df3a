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
  group_R = jnp.where(valid_MX, index_MX, experts).reshape(-1)
  group_R = group_R.astype(jnp.int32)
  expert_E = jnp.arange(experts, dtype=jnp.int32)
  size_E = (group_R[:, None] == expert_E[None]).sum(0, dtype=jnp.int32)
  # So few tokens fill no more than the narrowest product: then each expert
  # takes them all, as they lie, and nothing has to be gathered.
  whole = tokens <= ALIGN
  padded_E = -(-size_E // ALIGN) * ALIGN
  if whole:
    padded_E = jnp.where(size_E > 0, ALIGN, 0)
  before_RE = expert_E[None] < group_R[:, None]
  start_R = jnp.where(before_RE, padded_E[None], 0).sum(1)
  if whole:
    rank_R = jnp.arange(slots, dtype=jnp.int32) // choices
  else:
    same_RR = group_R[:, None] == group_R[None]
    rank_R = (same_RR & jnp.tri(slots, k=-1, dtype=bool)).sum(1)
  valid_R = valid_MX.reshape(-1)
  place_R = jnp.where(valid_R, start_R + rank_R, 0).astype(jnp.int32)
  source_P = None
  if not whole:
    row_P = jnp.arange(rows(tokens, choices, experts, tile), dtype=jnp.int32)
    here_PR = (row_P[:, None] == place_R[None]) & valid_R[None]
    token_R = jnp.arange(slots, dtype=jnp.int32) // choices
    source_P = jnp.where(here_PR, token_R[None], 0).sum(1)
  return Plan(
    place_R.reshape(index_MX.shape),
    valid_MX,
    source_P,
    _table(padded_E, tile, min(slots, experts) + slots // tile),
  )


def _table(padded_E: jax.Array, tile: int, length: int) -> jax.Array:
  """`Plan.table_4T` of groups of so many rows."""
  experts = len(padded_E)
  expert_E = jnp.arange(experts, dtype=jnp.int32)
  count_E = -(-padded_E // tile)
  below_EE = jnp.tri(experts, k=-1, dtype=bool)
  sums_2E = jnp.where(
    below_EE[None], jnp.stack([padded_E, count_E])[:, None], 0
  ).sum(2)
  start_E, first_E = sums_2E
  tile_T1 = jnp.arange(length, dtype=jnp.int32)[:, None]
  offset_TE = (tile_T1 - first_E[None]) * tile
  own_TE = (offset_TE >= 0) & (tile_T1 < (first_E + count_E)[None])
  columns_4TE = jnp.stack(
    [
      jnp.where(own_TE, expert_E[None], 0),
      jnp.where(own_TE, start_E[None] + offset_TE, 0),
      jnp.where(own_TE, jnp.minimum(padded_E[None] - offset_TE, tile), 0),
      jnp.broadcast_to(count_E[None], own_TE.shape),
    ]
  )
  return columns_4TE.sum(2, dtype=jnp.int32)


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
