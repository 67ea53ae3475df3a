"""Which rows go through which expert: tables for kernels of few tokens.

Experts read their weights once a tile, so the tokens of an expert are one tile
where they fit. All of it is arithmetic on small integers on the device, written
as sums over comparisons: each is one small kernel on a GPU, where a sort, a
scan or a scatter is several.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ALIGN = 8  # rows of a swizzled tile in shared memory
WHOLE = 16  # tokens up to which every expert gets them all


class Plan(NamedTuple):
  """Rows grouped by expert; groups start at multiples of `ALIGN`.

  Attributes:
    place_MX: row of each (token, choice); -1 where it has no expert.
    source_P: the token of each row; rows of no group hold any token. None if
      every group holds all tokens in their own order.
    table_4T: of each tile its expert, its first row, how many rows it owns (a
      multiple of `ALIGN`), and how many tiles there are in all; entries past
      that number are padding.
  """

  place_MX: jax.Array
  source_P: jax.Array | None
  table_4T: jax.Array


def span(tokens: int) -> int | None:
  """Rows of every group where each holds all tokens in their own order.

  Products of so few tokens cost no more than reading the weights does, and
  nothing has to be gathered. None if there are too many tokens for that.
  """
  return -(-tokens // ALIGN) * ALIGN if tokens <= WHOLE else None


def rows(tokens: int, choices: int, experts: int, tile: int) -> int:
  """The worst case of rows that tiles may touch."""
  slots = tokens * choices
  groups = min(slots, experts)
  if span(tokens):
    return groups * span(tokens)
  # All but ALIGN - 1 rows of a group may be padding, and a tile may read past
  # those that it owns.
  return -(-(slots + groups * (ALIGN - 1)) // ALIGN) * ALIGN + tile


def make(index_MX: jax.Array, experts: int, tile: int) -> Plan:
  """Groups (token, choice) pairs by expert and cuts groups into tiles.

  Args:
    index_MX: chosen experts; values outside [0, experts) choose none.
    experts: number of experts E.
    tile: most rows of a tile, a multiple of `ALIGN`, and no less than `span`.
  """
  tokens, choices = index_MX.shape
  slots = tokens * choices
  # Negative values wrap around to large ones.
  group_R = index_MX.reshape(-1).astype(jnp.uint32)
  group_R = jnp.minimum(group_R, experts).astype(jnp.int32)
  # Known when compiled, unlike what XLA would make of the same in jnp.
  slot_R = np.arange(slots, dtype=np.int32)
  token_R = slot_R // choices
  same_RR = group_R[:, None] == group_R[None]
  earlier_RR = same_RR & (slot_R[None] < slot_R[:, None])
  size_R, rank_R = _count(same_RR, earlier_RR)
  # One slot speaks for its whole group.
  first_R = (group_R < experts) & (rank_R == 0)
  whole = span(tokens)
  padded_R = whole or (size_R + ALIGN - 1) & -ALIGN
  padded_R = jnp.where(first_R, padded_R, 0).astype(jnp.int32)
  tiles_R = lax.div(padded_R + tile - 1, jnp.int32(tile))
  below_RR = group_R[None] < group_R[:, None]
  start_R, tile_R = _count(
    jnp.where(below_RR, padded_R[None], 0),
    jnp.where(below_RR, tiles_R[None], 0),
  )
  offset_R = token_R if whole else rank_R
  place_R = jnp.where(group_R < experts, start_R + offset_R, -1)
  length = min(slots, experts) + slots // tile
  tile_T1 = np.arange(length, dtype=np.int32)[:, None]
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
    row_P = np.arange(rows(tokens, choices, experts, tile), dtype=np.int32)
    here_PR = row_P[:, None] == place_R[None]
    source_P = jnp.where(here_PR, token_R[None], 0).sum(1, dtype=jnp.int32)
  return Plan(place_R.reshape(index_MX.shape), source_P, table_4T)


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
    place_M = plan.place_MX[:, choice]
    y_MN = y_PN[jnp.maximum(place_M, 0)].astype(jnp.float32)
    scaled_MN = y_MN * weight_MX[:, choice, None].astype(jnp.float32)
    # Rows of no expert may hold anything, not a number even.
    total_MN += jnp.where(place_M[:, None] >= 0, scaled_MN, 0)
  return total_MN.astype(dtype)


def varying_like(operands: Sequence[jax.Array], y: jax.Array) -> jax.Array:
  """Inside `shard_map`, marks `y` as differing over the axes that any does.

  Neither kernels nor fresh arrays are told on which axes others differ.
  """
  axes = set().union(*(jax.typeof(z).mat.varying for z in operands))
  axes -= jax.typeof(y).mat.varying
  return lax.pcast(y, tuple(axes), to='varying') if axes else y
