"""Experts in block-FP8 over devices, for generation: no derivative.

As strategy `gather` of `experts.py`: every device of the `expert` axis sees the
tokens of its peers and gives back partial sums. The matrices never move.
"""

import jax

import pallas_kernels
from m2.parallel import experts as expert_layers
from m2.parallel import sharding

# Logical axes of codes and scales alike: out, then in, as in checkpoints.
UP = ('expert', 'ffn', None)
DOWN = ('expert', None, 'ffn')
# Up to so many tokens, matrices are read as they are; for more, those of a
# layer are made bfloat16 first, which then costs less than it saves.
FEW = 512


def experts(
  x_BTD: jax.Array,
  routing: pallas_kernels.Routing,
  wi_0: pallas_kernels.Quantized,
  wi_1: pallas_kernels.Quantized,
  wo: pallas_kernels.Quantized,
) -> jax.Array:
  """Sum over each token's experts of weight * SwiGLU expert.

  Args:
    x_BTD: tokens, split over the batch axes.
    routing: chosen experts and weights of each token, both [B, T, X].
    wi_0: gate projections, [E, F, D].
    wi_1: up projections, [E, F, D].
    wo: down projections, [E, D, F].

  Returns:
    y_BTD, sharded like `x_BTD`.
  """
  matrices = wi_0, wi_1, wo
  return expert_layers.on_tokens(
    _local, x_BTD, routing, matrices, (UP, UP, DOWN)
  )


def _local(x_MD, index_MX, weight_MX, *weights):
  """What one device does; sums over the `tensor` axis at the end."""
  tokens, sizes = (x_MD, index_MX, weight_MX), sharding.axis_sizes()
  if not sizes:
    return _apply(*tokens, *weights)
  tokens = [sharding.varying(z) for z in tokens]
  weights = jax.tree.map(sharding.varying, weights)
  if sizes['expert'] == 1:
    y_MD = _apply(*tokens, *weights)
  else:
    held = weights[0].values.shape[0]
    y_MD = expert_layers.gather(
      lambda *tokens: _apply(*tokens, *weights), held, 1, *tokens
    )
  return jax.lax.psum(y_MD, 'tensor')


def _apply(x_MD, index_MX, weight_MX, *weights):
  if len(x_MD) <= FEW:
    return pallas_kernels.decode_experts(x_MD, index_MX, weight_MX, *weights)
  plain = (
    pallas_kernels.dequantise(w, x_MD.dtype, transposed=True) for w in weights
  )
  return pallas_kernels.experts(
    x_MD, index_MX, weight_MX, *plain, transposed=True
  )
