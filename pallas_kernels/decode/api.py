"""The experts of a few tokens: bound by reading the chosen experts' weights."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.decode import mosaic_gpu, mosaic_tpu, weights, xla
from pallas_kernels.decode.weights import Quantized, Weights

__all__ = ['Quantized', 'decode_experts', 'dequantise']

BACKENDS = {
  'mosaic_gpu': mosaic_gpu.decode_experts,
  'mosaic_tpu': mosaic_tpu.decode_experts,
  'xla': xla.decode_experts,
}


def decode_experts(
  x_MD: Float[Array, 'M D'],
  index_MX: Int[Array, 'M X'],
  weight_MX: Float[Array, 'M X'],
  wi_0: Weights,
  wi_1: Weights,
  wo: Weights,
  *,
  impl: dispatch.Impl | None = None,
) -> Float[Array, 'M D']:
  """Weighted sum of each token's experts, (silu(x wi_0) * (x wi_1)) wo.

  For one to a few hundred tokens, as in decoding. Products accumulate in
  float32; the activation and each expert's output are rounded to the dtype of
  `x_MD`, their weighted sum is accumulated in float32. Has no derivative.

  Args:
    x_MD: tokens.
    index_MX: chosen experts; values outside [0, E), as of experts that lie on
      another device or of unused slots, contribute nothing.
    weight_MX: what each choice counts.
    wi_0: gate, [E, D, F] in the dtype of `x_MD`, or `Quantized` [E, F, D].
    wi_1: up, like `wi_0`.
    wo: down, [E, F, D] in the dtype of `x_MD`, or `Quantized` [E, D, F].
    impl: backend; None picks the best for this platform.

  Raises:
    ValueError: shapes or dtypes that do not match.
    NotImplementedError: a backend forced by name that cannot do this.
  """
  x_MD, index_MX, weight_MX, wi_0, wi_1, wo = jax.tree.map(
    jnp.asarray, (x_MD, index_MX, weight_MX, wi_0, wi_1, wo)
  )
  _check(x_MD, index_MX, weight_MX, wi_0, wi_1, wo)
  if not index_MX.size:
    return jnp.zeros_like(x_MD)
  refusals = {
    'mosaic_gpu': mosaic_gpu.refusal(x_MD.dtype, weights.widths(wi_0)),
    'mosaic_tpu': mosaic_tpu.refusal(wi_0, None if impl else len(x_MD)),
  }
  backend = dispatch.pick('decode_experts', impl, BACKENDS, refusals)
  return backend(x_MD, index_MX, weight_MX, wi_0, wi_1, wo)


def dequantise(
  w: Quantized,
  dtype: jnp.dtype = jnp.float32,
  *,
  transposed: bool = False,
  impl: dispatch.Impl | None = None,
) -> Float[Array, '...']:
  """Plain matrices of block-FP8 ones.

  Args:
    w: codes [..., N, K] and their scales.
    dtype: of the result; products are float32 before.
    transposed: give [..., N, K], as the codes lie, and not [..., K, N]. On TPUs
      a kernel does it, for matrices [E, N, K], and no codes are copied.
    impl: backend; None picks the best for this platform.

  Raises:
    ValueError: codes that are no FP8, or scales that do not fit them.
    NotImplementedError: a backend forced by name that cannot do this.
  """
  _check_codes('w', w)
  refusal = mosaic_tpu.refusal(w)
  if not transposed or w.values.ndim != 3:
    refusal = 'gives [E, N, K] of [E, N, K] alone'
  table = {
    'mosaic_tpu': mosaic_tpu.dequantised,
    'xla': functools.partial(_dequantised, transposed),
  }
  run = dispatch.pick('dequantise', impl, table, {'mosaic_tpu': refusal})
  return run(w, dtype)


def _dequantised(transposed: bool, w: Quantized, dtype) -> Array:
  return weights.dequantised(w, transposed=transposed).astype(dtype)


def _check(x_MD, index_MX, weight_MX, wi_0, wi_1, wo) -> None:
  """Raises ValueError if the arguments do not fit together."""
  if x_MD.ndim != 2 or index_MX.ndim != 2 or len(index_MX) != len(x_MD):
    raise ValueError(
      f'x {x_MD.shape} and index {index_MX.shape} must be [M, D] and [M, X]'
    )
  if weight_MX.shape != index_MX.shape:
    raise ValueError(
      f'weight {weight_MX.shape} and index {index_MX.shape} differ in shape'
    )
  for name, w in (('wi_0', wi_0), ('wi_1', wi_1), ('wo', wo)):
    _check_matrices(name, w, x_MD.dtype)
  width, hidden = weights.widths(wi_0)
  fits = (
    width == x_MD.shape[1]
    and weights.widths(wi_1) == (width, hidden)
    and weights.widths(wo) == (hidden, width)
    and weights.experts(wi_0) == weights.experts(wi_1) == weights.experts(wo)
  )
  if not fits:
    found = [(weights.experts(w), *weights.widths(w)) for w in (wi_0, wi_1, wo)]
    raise ValueError(
      f'x {x_MD.shape} does not fit matrices whose (E, in, out) are {found}'
    )
  if len({isinstance(w, Quantized) for w in (wi_0, wi_1, wo)}) > 1:
    raise ValueError('either all matrices are quantised or none is')


def _check_matrices(name: str, w: Weights, dtype: jnp.dtype) -> None:
  if not isinstance(w, Quantized):
    if w.ndim != 3 or w.dtype != dtype:
      raise ValueError(
        f'{name} is {w.dtype}{list(w.shape)}; expected {dtype}[E, in, out]'
      )
    return
  if w.values.ndim != 3:
    raise ValueError(
      f'{name} holds codes {list(w.values.shape)}; expected [E, out, in]'
    )
  _check_codes(name, w)


def _check_codes(name: str, w: Quantized) -> None:
  """Raises ValueError if these are no codes of whole blocks with scales."""
  if w.values.ndim < 2 or w.values.dtype != jnp.float8_e4m3fn:
    raise ValueError(
      f'{name} holds {w.values.dtype}{list(w.values.shape)}; expected '
      'float8_e4m3fn[..., out, in]'
    )
  *lead, rows, columns = w.values.shape
  blocks = rows // weights.BLOCK, columns // weights.BLOCK
  ragged = rows % weights.BLOCK or columns % weights.BLOCK
  if ragged or w.scale_inv.shape != (*lead, *blocks):
    raise ValueError(
      f'{name} has scales {w.scale_inv.shape} for values {w.values.shape}; '
      f'expected one for each block of {weights.BLOCK} x {weights.BLOCK}'
    )
