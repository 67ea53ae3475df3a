"""Where the rows of each group lie, and the order in which tiles visit them.

Group g owns `sizes[g]` rows from `starts[g]`; starts are multiples of an
alignment, so between groups, and after the last, there are rows of no group.
All of it is arithmetic on a few hundred integers on the device: sizes are
never read by the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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


class Segments(NamedTuple):
  """Stretches of one group's rows that a cluster of blocks works on together.

  Each is cut into equal tiles, one a member of the cluster. So the matrix of a
  group is fetched once for all its rows where they fit one segment, and no
  tile is much shorter than its neighbour, which would wait for it.

  Attributes:
    group_S: group of the segment; any group where `valid_S` is 0.
    row_S: its first row.
    tile_S: rows of a member's tile, a multiple of 8.
    valid_S: how many of its rows, from the first, that group owns.
    extent_S: how many rows are its to write; those past `valid_S` are zeros.
    count_1: how many of the S segments there are; the rest is padding.
  """

  group_S: jax.Array
  row_S: jax.Array
  tile_S: jax.Array
  valid_S: jax.Array
  extent_S: jax.Array
  count_1: jax.Array


def segments(
  sizes_G: jax.Array,
  rows: int,
  align: int,
  tile: int,
  members: int,
  clear: int | None = None,
) -> Segments:
  """Cuts `rows` rows into segments of `members` tiles of at most `tile` rows.

  Args:
    sizes_G: int32 rows per group.
    rows: all rows, of groups and of none; a multiple of 8.
    align: multiple of 8 to which group starts are rounded up.
    tile: most rows of a tile, a multiple of 8.
    members: tiles of a segment.
    clear: a multiple of 8: of the rows after the last group only so many belong
      to a segment, the others to none; None = all of them do.
  """
  groups = sizes_G.shape[0]
  sizes_G = sizes_G.astype(jnp.int32)
  padded_G = round_up(sizes_G, align)
  # The rows after the last group are one more group, which owns none of them.
  tail_1 = rows - padded_G.sum(keepdims=True, dtype=jnp.int32)
  if clear is not None:
    tail_1 = jnp.minimum(tail_1, clear)
  padded_R = jnp.concatenate([padded_G, tail_1])
  sizes_R = jnp.concatenate([sizes_G, jnp.zeros(1, jnp.int32)])
  count_R = -(-padded_R // (tile * members))
  share_R = padded_R // jnp.maximum(count_R * members, 1)
  # Rounded up twice: to whole rows, then to the height of a swizzled tile.
  exact_R = share_R * jnp.maximum(count_R * members, 1) == padded_R
  tile_R = round_up(share_R + jnp.where(exact_R, 0, 1), 8)
  # Sums of a comparison of all with all are one small kernel each on a GPU,
  # where a scan or a binary search is many.
  before_RR = jnp.tri(groups + 1, k=-1, dtype=jnp.int32)
  start_R = (before_RR * padded_R[None]).sum(1, dtype=jnp.int32)
  first_R = (before_RR * count_R[None]).sum(1, dtype=jnp.int32)
  segment_S = jnp.arange(rows // (tile * members) + groups + 1, dtype=jnp.int32)
  end_R = first_R + count_R
  run_S = (end_R[None] <= segment_S[:, None]).sum(1, dtype=jnp.int32)
  run_S = jnp.minimum(run_S, groups)
  reach_S = tile_R[run_S] * members
  offset_S = (segment_S - first_R[run_S]) * reach_S
  return Segments(
    group_S=jnp.minimum(run_S, groups - 1),
    row_S=start_R[run_S] + offset_S,
    tile_S=tile_R[run_S],
    valid_S=jnp.clip(sizes_R[run_S] - offset_S, 0, reach_S),
    extent_S=jnp.clip(padded_R[run_S] - offset_S, 0, reach_S),
    count_1=end_R[-1:],
  )
