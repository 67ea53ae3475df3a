"""Experts in block-FP8 over devices, for generation: no derivative.

As strategy `gather` of `experts.py`: every device of the `expert` axis sees the
tokens of its peers and gives back partial sums. The matrices never move.
"""

import jax

import pallas_kernels
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
  rows = sharding.spec('batch', 'sequence', None)
  up, down = sharding.spec(*UP), sharding.spec(*DOWN)

  def local(x_BTD, index_BTX, weight_BTX, *weights):
    tokens = [
      x.reshape(-1, x.shape[-1]) for x in (x_BTD, index_BTX, weight_BTX)
    ]
    return _gather(tokens, weights).reshape(x_BTD.shape)

  run = sharding.manual(local, (rows, rows, rows, up, up, down), rows)
  return run(x_BTD, *routing, wi_0, wi_1, wo)


def _gather(tokens, weights):
  sizes = sharding.axis_sizes()
  if not sizes:
    return _apply(*tokens, *weights)
  tokens = [sharding.varying(x) for x in tokens]
  weights = jax.tree.map(sharding.varying, weights)
  if sizes['expert'] > 1:
    # all-gather over 'expert': (n - 1) * M * D * itemsize in.
    tokens = [
      jax.lax.all_gather(x, 'expert', axis=0, tiled=True) for x in tokens
    ]
  x_MD, index_MX, weight_MX = tokens
  first = jax.lax.axis_index('expert') * weights[0].values.shape[0]
  # Experts of other devices are outside [0, E): they contribute nothing.
  y_MD = _apply(x_MD, index_MX - first, weight_MX, *weights)
  if sizes['expert'] > 1:
    # reduce-scatter over 'expert': (n - 1) * M * D * itemsize out.
    y_MD = jax.lax.psum_scatter(y_MD, 'expert', scatter_dimension=0, tiled=True)
  return jax.lax.psum(y_MD, 'tensor')


def _apply(x_MD, index_MX, weight_MX, *weights):
  if len(x_MD) <= FEW:
    return pallas_kernels.decode_experts(x_MD, index_MX, weight_MX, *weights)
  plain = (pallas_kernels.dequantise(w).astype(x_MD.dtype) for w in weights)
  return pallas_kernels.experts(x_MD, index_MX, weight_MX, *plain)
