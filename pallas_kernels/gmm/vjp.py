"""The derivative of the grouped product, once for all backends.

With y = x w[g] for the rows of group g: dx = dy w[g]^T is the same product with
the matrices transposed, and dw[g] = x^T dy sums over the group's rows.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.gmm import layout


class Backend(NamedTuple):
  """What a backend provides; group starts are aligned as it asked.

  Attributes:
    alignment: (rows, groups, align) -> the alignment that it needs; `align`
      itself where it can work on the rows as they lie.
    product: (x_PK, w_GKN, sizes_G, *, align, transpose, out_dtype) -> y_PN.
      With `transpose` the matrices are w_GNK. Rows of no group give zeros.
    weight_gradient: (x_PK, dy_PN, sizes_G, *, align, out_dtype) -> dw_GKN.
      Groups of no rows give zeros; rows of no group do not count.
  """

  alignment: Callable[[int, int, int], int]
  product: Callable[..., jax.Array]
  weight_gradient: Callable[..., jax.Array]


def grouped_matmul(
  backend: Backend,
  x_MK: jax.Array,
  w_GKN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """See `pallas_kernels.gmm.api.grouped_matmul`."""
  rows, groups = x_MK.shape[0], w_GKN.shape[0]
  needed = backend.alignment(rows, groups, align)
  # Backends write whole steps of the alignment, and would miss what is over.
  if needed == align and rows % align == 0:
    return _aligned(backend, align, out_dtype, x_MK, w_GKN, sizes_G)
  source_P, back_M = layout.spread(sizes_G, rows, needed, align)
  x_PK = x_MK.at[source_P].get(mode='fill', fill_value=0)
  y_PN = _aligned(backend, needed, out_dtype, x_PK, w_GKN, sizes_G)
  return y_PN.at[back_M].get(mode='fill', fill_value=0)


def weight_gradient(
  backend: Backend,
  x_MK: jax.Array,
  dy_MN: jax.Array,
  sizes_G: jax.Array,
  *,
  align: int,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """See `pallas_kernels.gmm.api.weight_gradient`."""
  rows = x_MK.shape[0]
  needed = backend.alignment(rows, sizes_G.shape[0], align)
  if needed != align or rows % align:
    source_P, _ = layout.spread(sizes_G, rows, needed, align)
    x_MK, dy_MN = (
      z.at[source_P].get(mode='fill', fill_value=0) for z in (x_MK, dy_MN)
    )
  return backend.weight_gradient(
    x_MK, dy_MN, sizes_G, align=needed, out_dtype=out_dtype
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _aligned(backend, align, out_dtype, x_PK, w_GKN, sizes_G):
  return backend.product(
    x_PK, w_GKN, sizes_G, align=align, transpose=False, out_dtype=out_dtype
  )


def _forward(backend, align, out_dtype, x_PK, w_GKN, sizes_G):
  y_PN = _aligned(backend, align, out_dtype, x_PK, w_GKN, sizes_G)
  return y_PN, (x_PK, w_GKN, sizes_G)


def _backward(backend, align, out_dtype, residuals, dy_PN):
  x_PK, w_GKN, sizes_G = residuals
  dy_PN = dy_PN.astype(w_GKN.dtype)
  dx_PK = backend.product(
    dy_PN, w_GKN, sizes_G, align=align, transpose=True, out_dtype=x_PK.dtype
  )
  dw_GKN = backend.weight_gradient(
    x_PK, dy_PN, sizes_G, align=align, out_dtype=w_GKN.dtype
  )
  return dx_PK, dw_GKN, None


_aligned.defvjp(_forward, _backward)
