"""Sigmoid top-k routing with a selection-only bias."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.route import mosaic_gpu, mosaic_tpu, ref

BACKENDS = {
  'mosaic_gpu': mosaic_gpu.route,
  'mosaic_tpu': mosaic_tpu.route,
  'xla': ref.route,
}


class Routing(NamedTuple):
  """Where each token goes.

  Attributes:
    index_MX: chosen experts, best first; E marks a slot that is not used.
    weight_MX: float32 mixing weights; each row sums to 1, unused slots are 0.
  """

  index_MX: Int[Array, 'M X']
  weight_MX: Float[Array, 'M X']


def route(
  score_ME: Float[Array, 'M E'],
  bias_E: Float[Array, 'E'],
  *,
  top_k: int,
  min_k: int | None = None,
  min_share: float = 0.0,
  impl: dispatch.Impl | None = None,
) -> Routing:
  """Chooses experts by score + bias, weights them by score alone.

  Args:
    score_ME: sigmoid scores; chosen by and weighted in float32.
    bias_E: balancing bias, used for selection only (report 2.2).
    top_k: experts selected per token.
    min_k: experts always used; the others need `min_share`. None = top_k.
    min_share: share of the selected weight an expert past `min_k` must have.
      The weights are renormalised over those used.
    impl: backend; None picks the best for this platform.

  Raises:
    ValueError: `top_k` or `min_k` out of range, or a bias of another shape.
  """
  experts = score_ME.shape[1]
  min_k = top_k if min_k is None else min_k
  if not 0 < min_k <= top_k <= experts:
    raise ValueError(f'need 0 < {min_k=} <= {top_k=} <= {experts=}')
  if bias_E.shape != (experts,):
    raise ValueError(
      f'bias {bias_E.shape} must have one entry for each of the {experts} '
      'experts'
    )
  score_ME, bias_E = (z.astype(jnp.float32) for z in (score_ME, bias_E))
  if not len(score_ME):
    none_MX = jnp.zeros((0, top_k), jnp.float32)
    return Routing(none_MX.astype(jnp.int32), none_MX)
  refusals = {
    'mosaic_gpu': mosaic_gpu.refusal(experts, top_k),
    'mosaic_tpu': mosaic_tpu.refusal(experts, top_k),
  }
  run = dispatch.pick('route', impl, BACKENDS, refusals)
  return Routing(
    *run(score_ME, bias_E, top_k=top_k, min_k=min_k, min_share=min_share)
  )
