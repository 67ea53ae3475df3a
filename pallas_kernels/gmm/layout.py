"""Where the rows of each group lie, and the order in which tiles visit them.

Group g owns `sizes[g]` rows from `starts[g]`; starts are multiples of an
alignment, so between groups, and after the last, there are rows of no group.
All of it is arithmetic on a few hundred integers on the device: sizes are
never read by the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
  """Tiles that together cover every row once, the fuller ones first.

  Attributes:
    group_T: group of the tile; any group where `valid_T` is 0.
    row_T: its first row.
    valid_T: how many of its rows, from the first, that group owns.
    extent_T: how many rows are its to write; those past `valid_T` are zeros.
    count_1: how many of the T tiles there are; the rest is padding.
  """

  group_T: jax.Array
  row_T: jax.Array
  valid_T: jax.Array
  extent_T: jax.Array
  count_1: jax.Array


def starts(sizes_G: jax.Array, align: int) -> jax.Array:
  """int32[G]: the first row of each group."""
  padded_G = round_up(sizes_G, align)
  return jnp.cumsum(padded_G) - padded_G


def round_up(count: jax.Array, multiple: int) -> jax.Array:
  return -(-count // multiple) * multiple


def owner(
  start_G: jax.Array, sizes_G: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
  """The last group that starts at or before each row, and if it covers it."""
  row_R = jnp.arange(rows)
  group_R = jnp.searchsorted(start_G, row_R, side='right') - 1
  # Empty groups share a start with their successor; 'right' finds the last.
  return group_R, row_R - start_G[group_R] < sizes_G[group_R]


def spread(
  sizes_G: jax.Array, rows: int, block: int, align: int
) -> tuple[jax.Array, jax.Array]:
  """Indices from and to a layout whose groups start at multiples of `block`.

  Returns:
    source int32[P]: row of the input at each padded position, or `rows`.
    back int32[rows]: padded position of each input row, or P.
  """
  groups = sizes_G.shape[0]
  positions = -(-(rows + groups * (block - 1)) // block) * block
  old_G = starts(sizes_G, align)
  new_G = starts(sizes_G, block)
  group_P, valid_P = owner(new_G, sizes_G, positions)
  source_P = jnp.arange(positions) - new_G[group_P] + old_G[group_P]
  group_M, valid_M = owner(old_G, sizes_G, rows)
  back_M = jnp.arange(rows) - old_G[group_M] + new_G[group_M]
  return (
    jnp.where(valid_P, source_P, rows),
    jnp.where(valid_M, back_M, positions),
  )


def schedule(sizes_G: jax.Array, rows: int, align: int, tile: int) -> Schedule:
  """Cuts `rows` rows into tiles of at most `tile` that no two groups share.

  Tiles more than half full come first, in order of rows, then the others, in
  order of rows: blocks that take tiles in turns then stay abreast, and read
  what they share from the cache while it is there.
  """
  groups = sizes_G.shape[0]
  sizes_G = sizes_G.astype(jnp.int32)
  padded_G = round_up(sizes_G, align)
  # The rows after the last group are one more group, which owns none of them.
  tail_1 = rows - padded_G.sum(keepdims=True)
  padded_S = jnp.concatenate([padded_G, tail_1])
  sizes_S = jnp.concatenate([sizes_G, jnp.zeros(1, jnp.int32)])
  full_S = (sizes_S + (tile - tile // 2 - 1)) // tile
  rest_S = -(-padded_S // tile) - full_S
  # Sums of a comparison of all with all are one small kernel each on a GPU,
  # where a scan or a binary search is many.
  before_SS = jnp.tri(groups + 1, k=-1, dtype=jnp.int32)
  start_S = (before_SS * padded_S[None]).sum(1)
  full_end_S = (before_SS * full_S[None]).sum(1) + full_S
  rest_end_S = (before_SS * rest_S[None]).sum(1) + rest_S + full_S.sum()
  end_C = jnp.concatenate([full_end_S, rest_end_S])
  tile_T = jnp.arange(-(-rows // tile) + groups + 1, dtype=jnp.int32)
  run_T = (end_C[None] <= tile_T[:, None]).sum(1, dtype=jnp.int32)
  run_T = jnp.minimum(run_T, 2 * groups + 1)
  group_T = run_T % (groups + 1)
  # A group's tiles of the second run follow those of the first.
  count_C = jnp.concatenate([full_S, rest_S])
  skipped_C = jnp.concatenate([jnp.zeros_like(full_S), full_S])
  first_C = end_C - count_C - skipped_C
  offset_T = (tile_T - first_C[run_T]) * tile
  return Schedule(
    group_T=jnp.minimum(group_T, groups - 1),
    row_T=start_S[group_T] + offset_T,
    valid_T=jnp.clip(sizes_S[group_T] - offset_T, 0, tile),
    extent_T=jnp.clip(padded_S[group_T] - offset_T, 0, tile),
    count_1=end_C[-1:],
  )
