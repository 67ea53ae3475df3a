"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp


def rms_norm(
  x: jax.Array, weight: jax.Array, eps: float, axes: tuple[int, ...] = (-1,)
) -> jax.Array:
  """Normalises over `axes` in float32, then scales in the input's dtype.

  The cast back comes before the weight, as in the public implementation.
  """
  x_f32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x_f32), axis=axes, keepdims=True)
  normed = (x_f32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
  scale = weight.astype(x.dtype)
  return normed * scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
