"""Grouped matrix product in plain XLA: only the rows' own work, dropless.

`lax.ragged_dot` expands to a product with every group on CPU and GPU, G times
the work. Here rows are cut into blocks that never straddle two groups, each
block gathers its group's matrix, and one batched product does the rest. The
number of blocks is the static worst case, so any skew of groups fits.
"""

import functools

import jax
import jax.numpy as jnp

MAX_BLOCK = 64


def block_rows(rows: int, groups: int) -> int:
  """Rows per block: near half a mean group, so that padding stays small."""
  mean = max(rows // (2 * groups), 1)
  return min(MAX_BLOCK, max(8, 1 << (mean.bit_length() - 1)))


def grouped_matmul(
  x_MK: jax.Array,
  w_GKN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int = 1,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """See `pallas_kernels.gmm.api.grouped_matmul`."""
  rows, groups = x_MK.shape[0], w_GKN.shape[0]
  if align % 8 == 0 and align <= MAX_BLOCK and rows % align == 0:
    return _aligned(align, out_dtype, align, x_MK, w_GKN, sizes_G)
  block = block_rows(rows, groups)
  source_P, back_M = _spread(sizes_G, rows, block, align)
  x_PK = x_MK.at[source_P].get(mode='fill', fill_value=0)
  y_PN = _aligned(block, out_dtype, block, x_PK, w_GKN, sizes_G)
  return y_PN.at[back_M].get(mode='fill', fill_value=0)


def _spread(
  sizes_G: jax.Array, rows: int, block: int, align: int
) -> tuple[jax.Array, jax.Array]:
  """Indices from and to a layout whose groups start at multiples of `block`.

  Returns:
    source int32[P]: row of the input at each padded position, or `rows`.
    back int32[rows]: padded position of each input row, or P.
  """
  groups = sizes_G.shape[0]
  positions = -(-(rows + groups * (block - 1)) // block) * block
  old_G = _starts(sizes_G, align)
  new_G = _starts(sizes_G, block)
  group_P, valid_P = _owner(new_G, sizes_G, positions)
  source_P = jnp.arange(positions) - new_G[group_P] + old_G[group_P]
  group_M, valid_M = _owner(old_G, sizes_G, rows)
  back_M = jnp.arange(rows) - old_G[group_M] + new_G[group_M]
  return (
    jnp.where(valid_P, source_P, rows),
    jnp.where(valid_M, back_M, positions),
  )


def _starts(sizes_G: jax.Array, align: int) -> jax.Array:
  padded_G = -(-sizes_G // align) * align
  return jnp.cumsum(padded_G) - padded_G


def _owner(
  start_G: jax.Array, sizes_G: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
  """The last group that starts at or before each row, and if it covers it."""
  row_R = jnp.arange(rows)
  group_R = jnp.searchsorted(start_G, row_R, side='right') - 1
  # Empty groups share a start with their successor; 'right' finds the last.
  return group_R, row_R - start_G[group_R] < sizes_G[group_R]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _aligned(block, out_dtype, align, x_PK, w_GKN, sizes_G):
  """Product when every group starts at a multiple of `block`."""
  return _forward(block, out_dtype, align, x_PK, w_GKN, sizes_G)[0]


def _forward(block, out_dtype, align, x_PK, w_GKN, sizes_G):
  rows, width = x_PK.shape
  group_B, inside_BR = _blocks(sizes_G, rows // block, block, align)
  y_BRN = jnp.einsum(
    'brk,bkn->brn',
    x_PK.reshape(-1, block, width),
    w_GKN[group_B],
    preferred_element_type=jnp.float32,
  )
  y_BRN = jnp.where(inside_BR[..., None], y_BRN, 0).astype(out_dtype)
  return y_BRN.reshape(rows, -1), (x_PK, w_GKN, group_B, inside_BR)


def _backward(block, out_dtype, align, residuals, dy_PN):
  x_PK, w_GKN, group_B, inside_BR = residuals
  dy_BRN = dy_PN.reshape(-1, block, dy_PN.shape[1]).astype(w_GKN.dtype)
  dy_BRN = jnp.where(inside_BR[..., None], dy_BRN, 0)
  dx_BRK = jnp.einsum(
    'brn,bkn->brk',
    dy_BRN,
    w_GKN[group_B],
    preferred_element_type=jnp.float32,
  )
  dw_BKN = jnp.einsum(
    'brk,brn->bkn',
    x_PK.reshape(-1, block, x_PK.shape[1]),
    dy_BRN,
    preferred_element_type=jnp.float32,
  )
  # Summing blocks into groups as a product: XLA:CPU scatters are scalar loops.
  own_GB = group_B[None] == jnp.arange(w_GKN.shape[0])[:, None]
  dw_GKN = jnp.einsum('gb,bkn->gkn', own_GB.astype(jnp.float32), dw_BKN)
  return (
    dx_BRK.reshape(x_PK.shape).astype(x_PK.dtype),
    dw_GKN.astype(w_GKN.dtype),
    None,
  )


def _blocks(sizes_G, count, block, align):
  """The group of each block, and which of its rows that group owns."""
  start_G = _starts(sizes_G, align)
  first_B = jnp.arange(count) * block
  group_B = jnp.searchsorted(start_G, first_B, side='right') - 1
  left_B = sizes_G[group_B] - (first_B - start_G[group_B])
  return group_B, jnp.arange(block)[None] < left_B[:, None]


_aligned.defvjp(_forward, _backward)
