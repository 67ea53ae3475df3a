"""Grouped matrix product: every row times the matrix of its own group."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.gmm import mosaic_gpu, mosaic_tpu, vjp, xla

BACKENDS = {
  'mosaic_gpu': mosaic_gpu.BACKEND,
  'mosaic_tpu': mosaic_tpu.BACKEND,
  'xla': xla.BACKEND,
}


def _refusals(
  dtype: jnp.dtype, widths: tuple[int, int], out_dtype: jnp.dtype
) -> dict[str, str | None]:
  return {
    'mosaic_gpu': mosaic_gpu.refusal(dtype, widths, out_dtype),
    'mosaic_tpu': mosaic_tpu.refusal(dtype, widths, out_dtype),
  }


def _check_groups(groups: int, align: int) -> None:
  if groups < 1 or align < 1:
    raise ValueError(f'{groups=} and {align=} must be positive')


def alignment(
  rows: int,
  groups: int,
  widths: tuple[int, int],
  dtype: jax.typing.DTypeLike,
  *,
  impl: dispatch.Impl | None = None,
) -> int:
  """The `align` that spares `grouped_matmul` a copy of its rows.

  Args:
    rows: rows of all groups together.
    groups: number of groups.
    widths: K and N of the product.
    dtype: of rows, matrices and result.
    impl: the backend that will be asked for; None is the best.
  """
  refusals = _refusals(jnp.dtype(dtype), widths, jnp.dtype(dtype))
  backend = dispatch.pick('grouped_matmul', impl, BACKENDS, refusals)
  return backend.alignment(rows, groups, 1)


def grouped_matmul(
  x_MK: Float[Array, 'M K'],
  w_GKN: Float[Array, 'G K N'],
  sizes_G: Int[Array, 'G'],
  *,
  align: int = 1,
  impl: dispatch.Impl | None = None,
  out_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, 'M N']:
  """Multiplies rows, sorted by group, with their group's matrix.

  Group g owns `sizes_G[g]` rows; it starts where group g - 1 ends, rounded up
  to a multiple of `align`. Rows of no group give zeros, and their gradient is
  zero. Products accumulate in float32. The gradient of the result is rounded to
  the dtype of the matrices, whatever `out_dtype` is, before it is multiplied.

  Args:
    x_MK: rows sorted by group; same dtype as `w_GKN`.
    w_GKN: one matrix a group.
    sizes_G: rows per group, zeros allowed; the aligned sum must not exceed M.
    align: rows to which group starts are rounded up. On a Hopper GPU a
      multiple of 8, on a TPU of 16, saves a copy of the rows.
    impl: backend; None picks the best for this platform.
    out_dtype: dtype of the result; None = that of `x_MK`.

  Raises:
    ValueError: shapes or dtypes that do not match, no group, or `align` below
      1.
    NotImplementedError: a backend forced by name that cannot do this, or a
      second derivative, which kernels do not have; XLA does.
  """
  x_MK, w_GKN, sizes_G = map(jnp.asarray, (x_MK, w_GKN, sizes_G))
  if x_MK.ndim != 2 or w_GKN.ndim != 3 or x_MK.shape[1] != w_GKN.shape[1]:
    raise ValueError(
      f'x {x_MK.shape} and w {w_GKN.shape} do not contract: expected [M, K] '
      'and [G, K, N]'
    )
  _check_groups(len(w_GKN), align)
  if sizes_G.shape != w_GKN.shape[:1]:
    raise ValueError(
      f'sizes {sizes_G.shape} must have one entry for each of the '
      f'{w_GKN.shape[0]} groups'
    )
  if x_MK.dtype != w_GKN.dtype:
    raise ValueError(f'x is {x_MK.dtype} but w is {w_GKN.dtype}')
  out_dtype = jnp.dtype(out_dtype or x_MK.dtype)
  if not x_MK.size:
    return jnp.zeros((len(x_MK), w_GKN.shape[2]), out_dtype)
  refusals = _refusals(x_MK.dtype, w_GKN.shape[1:], out_dtype)
  backend = dispatch.pick('grouped_matmul', impl, BACKENDS, refusals)
  return vjp.grouped_matmul(
    backend, x_MK, w_GKN, sizes_G, align=align, out_dtype=out_dtype
  )


def weight_gradient(
  x_MK: Float[Array, 'M K'],
  dy_MN: Float[Array, 'M N'],
  sizes_G: Int[Array, 'G'],
  *,
  align: int = 1,
  impl: dispatch.Impl | None = None,
  out_dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, 'G K N']:
  """Sums x^T dy over the rows of each group: the gradient of the matrices.

  Rows lie as in `grouped_matmul`, whose derivative this is; called by itself
  it can give float32 from bfloat16 rows, for accumulation over batches.

  Args:
    x_MK: rows sorted by group; same dtype as `dy_MN`.
    dy_MN: gradient of the rows of the product.
    sizes_G: rows per group; groups of no rows give zeros.
    align: rows to which group starts are rounded up.
    impl: backend; None picks the best for this platform.
    out_dtype: dtype of the result; None = that of `x_MK`.

  Raises:
    ValueError: shapes or dtypes that do not match, no group, or `align` below
      1.
    NotImplementedError: a backend forced by name that cannot do this, or a
      derivative, which kernels do not have; XLA does.
  """
  x_MK, dy_MN, sizes_G = map(jnp.asarray, (x_MK, dy_MN, sizes_G))
  if x_MK.ndim != 2 or dy_MN.ndim != 2 or len(x_MK) != len(dy_MN):
    raise ValueError(
      f'x {x_MK.shape} and dy {dy_MN.shape} do not contract: expected [M, K] '
      'and [M, N]'
    )
  _check_groups(len(sizes_G), align)
  if x_MK.dtype != dy_MN.dtype:
    raise ValueError(f'x is {x_MK.dtype} but dy is {dy_MN.dtype}')
  out_dtype = jnp.dtype(out_dtype or x_MK.dtype)
  widths = x_MK.shape[1], dy_MN.shape[1]
  if not x_MK.size:
    return jnp.zeros((len(sizes_G), *widths), out_dtype)
  refusals = _refusals(x_MK.dtype, widths, out_dtype)
  backend = dispatch.pick('weight_gradient', impl, BACKENDS, refusals)
  return vjp.weight_gradient(
    backend, x_MK, dy_MN, sizes_G, align=align, out_dtype=out_dtype
  )
