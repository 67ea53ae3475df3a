"""The expert layer: the specification."""

import jax
import jax.numpy as jnp


def experts(
  x_MD: jax.Array,
  index_MX: jax.Array,
  weight_MX: jax.Array,
  wi_0_EDF: jax.Array,
  wi_1_EDF: jax.Array,
  wo_EFD: jax.Array,
) -> jax.Array:
  """Every token through every expert, mixed by weight; float32 inside."""
  x_MD, wi_0_EDF, wi_1_EDF, wo_EFD = (
    z.astype(jnp.float32) for z in (x_MD, wi_0_EDF, wi_1_EDF, wo_EFD)
  )
  gate_MEF = jnp.einsum('md,edf->mef', x_MD, wi_0_EDF)
  up_MEF = jnp.einsum('md,edf->mef', x_MD, wi_1_EDF)
  y_MED = jnp.einsum('mef,efd->med', jax.nn.silu(gate_MEF) * up_MEF, wo_EFD)
  # An index outside [0, E) has a row of zeros here: it mixes nothing in.
  own_MXE = jax.nn.one_hot(index_MX, wi_0_EDF.shape[0])
  return jnp.einsum('mxe,mx,med->md', own_MXE, weight_MX, y_MED)
