"""The experts' matrices as the model or as a checkpoint holds them."""

import dataclasses

import jax
import jax.numpy as jnp

BLOCK = 128  # side of the squares that share a scale
LARGEST = 448.0  # finite code


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """Block-FP8 matrices in the orientation of the checkpoint: (out, in).

  Attributes:
    values: float8_e4m3fn[E, N, K].
    scale_inv: float32[E, N / 128, K / 128]; a weight is value times scale,
      despite the name that checkpoints give it.
  """

  values: jax.Array
  scale_inv: jax.Array


# Plain matrices are [E, K, N], contraction first, as the model holds them.
Weights = jax.Array | Quantized


def widths(w: Weights) -> tuple[int, int]:
  """K and N of the product."""
  if isinstance(w, Quantized):
    return w.values.shape[2], w.values.shape[1]
  return w.shape[1], w.shape[2]


def experts(w: Weights) -> int:
  return (w.values if isinstance(w, Quantized) else w).shape[0]


def dequantised(w: Weights, *, transposed: bool = False) -> jax.Array:
  """[..., K, N]: plain matrices as they are, others in float32.

  Args:
    w: matrices.
    transposed: of codes, give [..., N, K], as they lie. Where the compiler has
      to turn those of one layer, it may keep turned ones of all layers.
  """
  if not isinstance(w, Quantized):
    return w
  scale_NK = w.scale_inv.repeat(BLOCK, -2).repeat(BLOCK, -1)
  w_NK = w.values.astype(jnp.float32) * scale_NK
  return w_NK if transposed else w_NK.swapaxes(-2, -1)


def one(w: Weights, expert: jax.Array) -> Weights:
  """The matrix of one expert."""
  return jax.tree.map(lambda z: z[expert], w)


def quantised(w_KN: jax.Array) -> Quantized:
  """Plain matrices [..., K, N] in block-FP8, largest weights to largest codes.

  Blocks of zeros, and of what is next to nothing, get scale 1.

  Raises:
    ValueError: K or N is not a multiple of `BLOCK`.
  """
  *_, k, n = w_KN.shape
  if k % BLOCK or n % BLOCK:
    raise ValueError(
      f'{w_KN.shape}: the last two must be multiples of {BLOCK} to be quantised'
    )
  w_NK = w_KN.astype(jnp.float32).swapaxes(-2, -1)
  shape = (*w_NK.shape[:-2], n // BLOCK, BLOCK, k // BLOCK, BLOCK)
  blocks = w_NK.reshape(shape)
  peak = jnp.abs(blocks).max((-3, -1), keepdims=True)
  least = LARGEST * jnp.finfo(jnp.float32).tiny  # below, scales would be 0
  scale = jnp.where(peak > least, peak / LARGEST, 1.0)
  values = (blocks / scale).reshape(w_NK.shape).astype(jnp.float8_e4m3fn)
  return Quantized(values, scale[..., 0, :, 0])
