"""CISPO: clipped importance weights outside the gradient (report Eq. 2, 3).

  L = - 1/W sum_z w_z sg(min(pi / pi_old, 1 + clip_high)) A_z log pi_z

over all trained tokens z of a batch of groups, W the sum of their weights. The
ratio is a constant, so no token is ever masked by the clip; the lower bound of
the clip is 0 and never acts. With pi = pi_old this is REINFORCE.
"""

import jax
import jax.numpy as jnp

from m2.forge import tree as tree_lib
from m2.parallel import sharding

QUANTILES = (('p05', 0.05), ('p50', 0.5), ('p95', 0.95))


def gather(logp_BT: jax.Array, tree: tree_lib.TreeBatch) -> jax.Array:
  """The value of each trained pair's edge: float32[Z], on every device."""
  # all-gather of B * T * 4 bytes: edges point anywhere in the batch.
  flat_M = sharding.place(logp_BT, None, None).reshape(-1)
  return flat_M[tree.edge_Z]


def cispo_loss(
  logp_BT: jax.Array, tree: tree_lib.TreeBatch, *, clip_high: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The policy loss of a batch of trees.

  Args:
    logp_BT: float32, log-probability of each token under its parent.
    tree: what to train on.
    clip_high: the ratio is clipped to [0, 1 + clip_high].

  Returns:
    The scalar loss, and `statistics` of the ratios.
  """
  logp_Z = gather(logp_BT, tree)
  gap_Z = jax.lax.stop_gradient(logp_Z) - tree.old_logp_Z
  # The logarithm is clipped, so that a large gap cannot overflow.
  ratio_Z = jnp.exp(jnp.minimum(gap_Z, jnp.log1p(clip_high)))
  terms_Z = tree.weight_Z * ratio_Z * tree.advantage_Z * logp_Z
  loss = -jnp.sum(terms_Z) / tree.total
  return loss, statistics(gap_Z, tree, clip_high=clip_high)


def statistics(
  gap_Z: jax.Array, tree: tree_lib.TreeBatch, *, clip_high: float
) -> dict[str, jax.Array]:
  """How far the trained policy is from the one that sampled.

  Args:
    gap_Z: log pi - log pi_old of each pair.
    tree: the batch; pairs of weight 0 do not count.
    clip_high: bound of the ratio.

  Returns:
    Float32 scalars: `ratio/mean`, `max`, `p05`, `p50`, `p95` of pi / pi_old
    before clipping; `ratio/clipped`, the share above the bound; `ratio/ess`,
    effective sample size over the number of pairs, in (0, 1].
  """
  real_Z = tree.weight_Z > 0
  count = jnp.maximum(real_Z.sum(), 1).astype(jnp.float32)
  ratio_Z = jnp.where(real_Z, jnp.exp(jnp.minimum(gap_Z, 80.0)), 0.0)
  # Halves of the range of exp keep the squares finite.
  small_Z = jnp.where(real_Z, jnp.exp(jnp.clip(gap_Z, -20.0, 20.0)), 0.0)
  spread = jnp.maximum(jnp.square(small_Z).sum(), 1e-30)
  metrics = {
    'ratio/mean': ratio_Z.sum() / count,
    'ratio/max': ratio_Z.max(),
    'ratio/clipped': (ratio_Z > 1 + clip_high).sum() / count,
    'ratio/ess': jnp.square(small_Z.sum()) / (count * spread),
  }
  # Pads sort to the end, behind the `count` real values.
  ordered_Z = jnp.sort(jnp.where(real_Z, ratio_Z, jnp.inf))
  for name, share in QUANTILES:
    at = jnp.floor(share * (count - 1)).astype(jnp.int32)
    value = ordered_Z[at]
    metrics[f'ratio/{name}'] = jnp.where(jnp.isfinite(value), value, 0.0)
  return metrics


def mismatch(
  gap_Z: jax.Array, tree: tree_lib.TreeBatch, version: jax.Array
) -> dict[str, jax.Array]:
  """Rollout against trainer, on pairs sampled by these very weights.

  Their gap is pure disagreement between the engine and the trainer: no
  optimiser step lies between. Older pairs are left to `statistics`.

  Args:
    gap_Z: log pi - log pi_old of each pair.
    tree: the batch.
    version: int32 scalar, of the weights that computed log pi.

  Returns:
    `mismatch/mean` and `mismatch/max` of the absolute gap, `mismatch/kl`
    (mean of r - 1 - log r), all NaN if no pair was compared, and
    `mismatch/fresh`, the share of pairs compared.
  """
  real_Z = tree.weight_Z > 0
  fresh_Z = real_Z & (tree.version_Z == version)
  fresh = fresh_Z.sum()
  count = jnp.maximum(fresh, 1)
  gap_Z = jnp.where(fresh_Z, gap_Z, 0.0)
  found = {
    'mismatch/mean': jnp.abs(gap_Z).sum() / count,
    'mismatch/max': jnp.abs(gap_Z).max(),
    'mismatch/kl': (jnp.expm1(jnp.minimum(gap_Z, 80.0)) - gap_Z).sum() / count,
  }
  metrics = {
    name: jnp.where(fresh > 0, value, jnp.nan) for name, value in found.items()
  }
  return metrics | {'mismatch/fresh': fresh / jnp.maximum(real_Z.sum(), 1)}
