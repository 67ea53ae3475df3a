"""The derivative of routing, for backends that only choose."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def route(
  choose: Callable[..., tuple[jax.Array, ...]],
  score_ME: jax.Array,
  bias_E: jax.Array,
  *,
  top_k: int,
  min_k: int,
  min_share: float,
) -> tuple[jax.Array, ...]:
  """What `choose` gives: chosen experts, their weights, and maybe counts.

  Args:
    choose: (score_ME, bias_E, top_k, min_k, min_share) -> index_MX, weight_MX
      and what else there is, without a derivative.
    score_ME: see `pallas_kernels.route.api.route`.
    bias_E: likewise.
    top_k: likewise.
    min_k: likewise.
    min_share: likewise.
  """
  return _route(
    choose, top_k, min_k, min_share, score_ME, lax.stop_gradient(bias_E)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _route(choose, top_k, min_k, min_share, score_ME, bias_E):
  return choose(score_ME, bias_E, top_k, min_k, min_share)


def _forward(choose, top_k, min_k, min_share, score_ME, bias_E):
  # By way of the rule, so that weights among the residuals have derivatives.
  found = _route(choose, top_k, min_k, min_share, score_ME, bias_E)
  return found, (score_ME, *found[:2])


def _backward(choose, top_k, min_k, min_share, residuals, cotangents):
  """With w = s / sum(s) over used slots, dw_j/ds_i = (i==j - w_j) / sum(s)."""
  del choose, top_k, min_k, min_share
  score_ME, index_MX, weight_MX = residuals
  dweight_MX = cotangents[1]
  own_ME = jnp.arange(score_ME.shape[1])[None]
  slots = range(index_MX.shape[1])
  # Sums over slots written out become one loop over [M, E]; a scatter would
  # be serial and a product with one-hot rows X times as large.
  chosen_ME = sum(index_MX[:, x, None] == own_ME for x in slots)
  total_M1 = (score_ME * chosen_ME).sum(1, keepdims=True)
  mean_M1 = (dweight_MX * weight_MX).sum(1, keepdims=True)
  dchosen_MX = (dweight_MX - mean_M1) / total_M1
  dscore_ME = sum(
    jnp.where(index_MX[:, x, None] == own_ME, dchosen_MX[:, x, None], 0)
    for x in slots
  )
  return dscore_ME, None


_route.defvjp(_forward, _backward)
