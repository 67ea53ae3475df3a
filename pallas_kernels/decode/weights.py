"""The experts' matrices as the model or as a checkpoint holds them."""

import dataclasses

import jax
import jax.numpy as jnp

BLOCK = 128  # side of the squares that share a scale


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


def dequantised(w: Weights) -> jax.Array:
  """[..., K, N]: plain matrices as they are, others in float32."""
  if not isinstance(w, Quantized):
    return w
  scale_NK = w.scale_inv.repeat(BLOCK, -2).repeat(BLOCK, -1)
  return (w.values.astype(jnp.float32) * scale_NK).swapaxes(-2, -1)


def one(w: Weights, expert: jax.Array) -> Weights:
  """The matrix of one expert."""
  return jax.tree.map(lambda z: z[expert], w)
