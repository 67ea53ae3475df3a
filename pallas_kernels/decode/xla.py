"""The experts of a few tokens in plain XLA: only the chosen experts' work.

One pass of a loop is one tile of one expert's tokens; the loop is as long as
there are tiles. FP8 matrices are dequantised one expert at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode import plan as plans
from pallas_kernels.decode import weights

TILE = 16  # most tokens of an expert that are multiplied together


def _one(w: weights.Quantized, expert: jax.Array, _) -> jax.Array:
  return weights.dequantised(weights.one(w, expert), transposed=True)


def decode_experts(
  x_MD: jax.Array,
  index_MX: jax.Array,
  weight_MX: jax.Array,
  wi_0: weights.Weights,
  wi_1: weights.Weights,
  wo: weights.Weights,
  *,
  one: Callable[..., jax.Array] = _one,
) -> jax.Array:
  """See `pallas_kernels.decode.api.decode_experts`.

  Args:
    x_MD: tokens.
    index_MX: chosen experts.
    weight_MX: what each choice counts.
    wi_0: gate.
    wi_1: up.
    wo: down.
    one: (matrices of codes, expert, dtype) -> that expert's matrix [out, in].
  """
  plan = plans.make(index_MX, weights.experts(wi_0), TILE)
  rows = plans.rows(*index_MX.shape, weights.experts(wi_0), TILE)
  tile = plans.span(len(x_MD)) or TILE
  if plan.source_P is None:
    x_PD = jnp.pad(x_MD, ((0, tile - len(x_MD)), (0, 0)))
  else:
    x_PD = x_MD[plan.source_P]

  def body(entry, y_PD):
    expert, row = plan.table_4T[0, entry], plan.table_4T[1, entry]
    first = 0 if plan.source_P is None else row
    x_ND = lax.dynamic_slice_in_dim(x_PD, first, tile)
    gate_NF, up_NF = (_product(x_ND, w, expert, one) for w in (wi_0, wi_1))
    act_NF = (jax.nn.silu(gate_NF) * up_NF).astype(x_ND.dtype)
    y_ND = _product(act_NF, wo, expert, one).astype(x_ND.dtype)
    # Later tiles overwrite what this one says of rows that it does not own.
    return lax.dynamic_update_slice_in_dim(y_PD, y_ND, row, 0)

  operands = x_MD, index_MX, *jax.tree.leaves((wi_0, wi_1, wo))
  y_PD = jnp.zeros((rows, x_MD.shape[1]), x_MD.dtype)
  y_PD = plans.varying_like(operands, y_PD)
  y_PD = lax.fori_loop(0, plan.table_4T[3, 0], body, y_PD)
  return plans.combine(y_PD, plan, weight_MX, x_MD.dtype)


def _product(x_NK: jax.Array, w: weights.Weights, expert: jax.Array, one):
  if isinstance(w, weights.Quantized):
    how, matrix = 'nk,fk->nf', one(w, expert, x_NK.dtype)
  else:
    how, matrix = 'nk,kf->nf', weights.one(w, expert)
  return jnp.einsum(how, x_NK, matrix, preferred_element_type=jnp.float32)
