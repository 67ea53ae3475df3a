"""Grouped matrix product in plain XLA: only the rows' own work, dropless.

`lax.ragged_dot` expands to a product with every group on CPU and GPU, G times
the work. Here rows are cut into blocks that never straddle two groups, each
block gathers its group's matrix, and one batched product does the rest. The
number of blocks is the static worst case, so any skew of groups fits.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gmm import layout, vjp

MAX_BLOCK = 64


def block_rows(rows: int, groups: int) -> int:
  """Rows per block: near half a mean group, so that padding stays small."""
  mean = max(rows // (2 * groups), 1)
  return min(MAX_BLOCK, max(8, 1 << (mean.bit_length() - 1)))


def alignment(rows: int, groups: int, align: int) -> int:
  """The alignment that these products need, given rows aligned to `align`."""
  if align % 8 == 0 and align <= MAX_BLOCK and rows % align == 0:
    return align
  return block_rows(rows, groups)


def product(
  x_PK: jax.Array,
  w_GKN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  transpose: bool,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Each row times its group's matrix; see `vjp.Backend`."""
  group_B, x_BRK = _blocks(x_PK, sizes_G, align)
  y_BRN = jnp.einsum(
    'brk,bnk->brn' if transpose else 'brk,bkn->brn',
    x_BRK,
    w_GKN[group_B],
    preferred_element_type=jnp.float32,
  )
  return y_BRN.astype(out_dtype).reshape(x_PK.shape[0], -1)


def weight_gradient(
  x_PK: jax.Array,
  dy_PN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Sum over each group's rows of x^T dy; see `vjp.Backend`."""
  group_B, x_BRK = _blocks(x_PK, sizes_G, align)
  _, dy_BRN = _blocks(dy_PN, sizes_G, align)
  dw_BKN = jnp.einsum(
    'brk,brn->bkn', x_BRK, dy_BRN, preferred_element_type=jnp.float32
  )
  groups = sizes_G.shape[0]
  dw_GKN = jax.lax.platform_dependent(
    dw_BKN,
    group_B,
    cpu=functools.partial(_added, groups=groups),
    default=functools.partial(_multiplied, groups=groups),
  )
  return dw_GKN.astype(out_dtype)


def _added(dw_BKN: jax.Array, group_B: jax.Array, groups: int) -> jax.Array:
  """Blocks summed into groups, one after the other."""
  return jax.ops.segment_sum(dw_BKN, group_B, groups, indices_are_sorted=True)


def _multiplied(
  dw_BKN: jax.Array, group_B: jax.Array, groups: int
) -> jax.Array:
  """The same as a product: a GPU's scatter adds in any order."""
  own_GB = group_B[None] == jnp.arange(groups)[:, None]
  return jnp.einsum('gb,bkn->gkn', own_GB.astype(jnp.float32), dw_BKN)


def _blocks(
  x_PK: jax.Array, sizes_G: jax.Array, align: int
) -> tuple[jax.Array, jax.Array]:
  """The group of each block of rows; the blocks, rows of no group zeroed."""
  start_G = layout.starts(sizes_G, align)
  first_B = jnp.arange(x_PK.shape[0] // align) * align
  # Unlike a binary search, which is a loop, XLA computes this once for the
  # product and both its gradients; so with the zeroed rows.
  group_B = (start_G[None] <= first_B[:, None]).sum(1) - 1
  left_B = sizes_G[group_B] - (first_B - start_G[group_B])
  inside_BR = jnp.arange(align)[None] < left_B[:, None]
  x_BRK = x_PK.reshape(-1, align, x_PK.shape[1])
  return group_B, jnp.where(inside_BR[..., None], x_BRK, 0)


BACKEND = vjp.Backend(alignment, product, weight_gradient)
