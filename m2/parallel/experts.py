"""Expert parallelism: one `shard_map` around the routed feed-forward layer.

Strategy `gather`: every device of the `expert` axis sees all tokens of its
peers (all-gather), computes the rows that chose its own experts, and gives the
partial sums back (reduce-scatter). It runs on every platform and is the oracle
of any other strategy. Bytes per device and direction: M * D * (n - 1) / n.
"""

import functools

import jax

import pallas_kernels
from m2.parallel import sharding
from pallas_kernels import dispatch

STRATEGIES = ('gather',)


def expert_parallel(
  x_BTD: jax.Array,
  routing: pallas_kernels.Routing,
  wi_0_EDF: jax.Array,
  wi_1_EDF: jax.Array,
  wo_EFD: jax.Array,
  *,
  strategy: str = 'gather',
  impl: dispatch.Impl | None = None,
) -> jax.Array:
  """Sum over each token's experts of weight * SwiGLU expert.

  Args:
    x_BTD: tokens, split over the batch axes and `context`.
    routing: chosen experts and weights of each token, both [B, T, X].
    wi_0_EDF: gate projections (w1 of the public checkpoint).
    wi_1_EDF: up projections (w3).
    wo_EFD: down projections (w2).
    strategy: how tokens reach their experts.
    impl: kernel backend.

  Returns:
    y_BTD in the dtype of `x_BTD`, sharded like it.

  Raises:
    ValueError: an unknown strategy.
  """
  if strategy not in STRATEGIES:
    raise ValueError(f'{strategy=}: choose one of {", ".join(STRATEGIES)}')
  rows = sharding.spec('batch', 'sequence', None)

  def local(x_BTD, index_BTX, weight_BTX, *weights):
    x_MD, index_MX, weight_MX = (
      x.reshape(-1, x.shape[-1]) for x in (x_BTD, index_BTX, weight_BTX)
    )
    y_MD = _gather(x_MD, index_MX, weight_MX, *weights, impl)
    return y_MD.reshape(x_BTD.shape)

  run = sharding.manual(
    local,
    (
      rows,
      rows,
      rows,
      sharding.spec('expert', None, 'ffn'),
      sharding.spec('expert', None, 'ffn'),
      sharding.spec('expert', 'ffn', None),
    ),
    rows,
  )
  return run(x_BTD, *routing, wi_0_EDF, wi_1_EDF, wo_EFD)


def _gather(x_MD, index_MX, weight_MX, wi_0_EDF, wi_1_EDF, wo_EFD, impl):
  layer = functools.partial(pallas_kernels.experts, impl=impl)
  sizes = sharding.axis_sizes()
  if not sizes:
    return layer(x_MD, index_MX, weight_MX, wi_0_EDF, wi_1_EDF, wo_EFD)
  # Every operand differs over every axis from here on, so that custom
  # derivatives inside see one kind of value; the transposes sum for us.
  tokens = [sharding.varying(x) for x in (x_MD, index_MX, weight_MX)]
  weights = [sharding.varying(w) for w in (wi_0_EDF, wi_1_EDF, wo_EFD)]
  if sizes['expert'] > 1:
    # all-gather over 'expert': (n - 1) * M * D * itemsize in.
    tokens = [
      jax.lax.all_gather(x, 'expert', axis=0, tiled=True) for x in tokens
    ]
  x_MD, index_MX, weight_MX = tokens
  first = jax.lax.axis_index('expert') * wi_0_EDF.shape[0]
  # Experts of other devices are outside [0, E): they contribute nothing.
  y_MD = layer(x_MD, index_MX - first, weight_MX, *weights)
  if sizes['expert'] > 1:
    # reduce-scatter over 'expert': (n - 1) * M * D * itemsize out.
    y_MD = jax.lax.psum_scatter(y_MD, 'expert', scatter_dimension=0, tiled=True)
  return jax.lax.psum(y_MD, 'tensor')
