"""Sigmoid top-k routing: the specification."""

import jax
import jax.numpy as jnp


def route(
  score_ME: jax.Array,
  bias_E: jax.Array,
  *,
  top_k: int,
  min_k: int,
  min_share: float,
) -> tuple[jax.Array, jax.Array]:
  """Chosen experts and their weights; see `pallas_kernels.route.api.route`."""
  experts = score_ME.shape[1]
  # The bias decides who is chosen and never scales the outputs (report 2.2).
  selection_ME = jax.lax.stop_gradient(score_ME + bias_E[None])
  _, index_MX = jax.lax.top_k(selection_ME, top_k)
  # A gather by one-hot: its transpose is a product, not a scalar scatter.
  own_MXE = jax.nn.one_hot(index_MX, experts, dtype=score_ME.dtype)
  # In full precision: a GPU would else round the scores to 10 bits.
  chosen_MX = jnp.einsum(
    'mxe,me->mx', own_MXE, score_ME, precision=jax.lax.Precision.HIGHEST
  )
  keep_MX = jnp.ones(index_MX.shape, bool)
  if min_k < top_k:
    share_MX = chosen_MX / chosen_MX.sum(1, keepdims=True)
    keep_MX = (jnp.arange(top_k) < min_k)[None] | (share_MX >= min_share)
  kept_MX = jnp.where(keep_MX, chosen_MX, 0)
  weight_MX = kept_MX / kept_MX.sum(1, keepdims=True)
  return jnp.where(keep_MX, index_MX, experts), weight_MX
