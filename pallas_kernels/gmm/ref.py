"""Grouped matrix product: the specification."""

import jax
import jax.numpy as jnp


def group_of_rows(sizes_G: jax.Array, rows: int, align: int) -> jax.Array:
  """int32[rows]: the group of each row; `len(sizes)` where there is none."""
  padded_G = -(-sizes_G // align) * align
  start_G = jnp.cumsum(padded_G) - padded_G
  row_M1 = jnp.arange(rows)[:, None]
  inside_MG = (row_M1 >= start_G[None]) & (row_M1 < (start_G + sizes_G)[None])
  groups = sizes_G.shape[0]
  return jnp.where(inside_MG.any(1), inside_MG.argmax(1), groups)


def grouped_matmul(
  x_MK: jax.Array,
  w_GKN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int = 1,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Each row times its own group's matrix, by trying every group."""
  groups = w_GKN.shape[0]
  group_M = group_of_rows(sizes_G, x_MK.shape[0], align)
  own_MG = jax.nn.one_hot(group_M, groups, dtype=x_MK.dtype)
  y_MN = jnp.einsum(
    'mg,mk,gkn->mn', own_MG, x_MK, w_GKN, preferred_element_type=jnp.float32
  )
  return y_MN.astype(out_dtype)
