"""The experts of a few tokens: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode import weights


def decode_experts(
  x_MD: jax.Array,
  index_MX: jax.Array,
  weight_MX: jax.Array,
  wi_0: weights.Weights,
  wi_1: weights.Weights,
  wo: weights.Weights,
) -> jax.Array:
  """Every expert on every token, times what the token gives it: float32.

  See `pallas_kernels.decode.api.decode_experts`.
  """
  # Values outside [0, E) become rows of zeros.
  chosen_MXE = jax.nn.one_hot(index_MX, weights.experts(wi_0))
  share_ME = (chosen_MXE * weight_MX[..., None]).sum(1)
  x_MD = x_MD.astype(jnp.float32)

  def add(total_MD, expert):
    share_M, *matrices = expert
    wi_0_DF, wi_1_DF, wo_FD = (
      weights.dequantised(w).astype(jnp.float32) for w in matrices
    )
    act_MF = jax.nn.silu(x_MD @ wi_0_DF) * (x_MD @ wi_1_DF)
    y_MD = jnp.where(share_M[:, None] != 0, act_MF @ wo_FD, 0)
    return total_MD + share_M[:, None] * y_MD, None

  with jax.default_matmul_precision('highest'):
    stacked = share_ME.T.astype(jnp.float32), wi_0, wi_1, wo
    return jax.lax.scan(add, jnp.zeros_like(x_MD), stacked)[0]
