"""The introspection record: what a step looked like from inside.

Computed on the device by the step that carries it (`log.introspect`), so the
steps between pay nothing; `flatten` turns it into one line of
`introspection.jsonl`. Per layer and parameter group: gradient norm, weight
norm, update over weight. Per layer: sizes of the residual stream and of each
sub-layer's output, router entropy, expert load and bias, experts and hidden
units that do nothing, similarity of the experts. Per head: largest attention
score and entropy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2 import config
from m2.model import transformer
from m2.parallel import order, sharding

# Attention scores that the forward pass over a few rows may hold at once, for
# each device and head.
SCORES = 2**22
# Random inputs, of the size a norm gives, on which experts are compared.
PROBES = 8
# A hidden unit is dead if no probe drives it past this share of the average.
DEAD = 1e-3


def record(
  before: Any,
  after: Any,
  grads: Any,
  batch: dict[str, jax.Array],
  load: dict[str, jax.Array],
  *,
  model: config.ModelConfig,
) -> dict[str, Any]:
  """Statistics of one update.

  Args:
    before: parameters that the gradients were taken at.
    after: parameters after the update.
    grads: gradients, before clipping.
    batch: the step's batch; activations come from a few of its rows.
    load: expert assignments of the whole batch, float32[layers, E] by part.
    model: model shape.

  Returns:
    A nested dict of float32 arrays; layers lead where there are several.
  """
  groups = _groups(before, after, grads)
  before, batch, groups = order.together((before, dict(batch), groups))
  rows = {name: _few_rows(x_BT) for name, x_BT in batch.items()}
  output = transformer.forward(
    model,
    before,
    rows['tokens'],
    rows['positions'],
    rows['until'],
    want_stats=True,
  )
  stats, moe = order.together((output.stats, before['blocks']['moe']))
  out = {name.removesuffix('_N'): value for name, value in stats.items()}
  out |= groups | _experts(moe)
  load_LE = load['blocks']
  total_L1 = jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
  out['expert_load'] = load_LE / total_L1
  out['dead_experts'] = (load_LE == 0).mean(-1)
  out['router_bias'] = moe['bias']
  return order.together(out)


def _few_rows(x_BT: jax.Array) -> jax.Array:
  """The first rows of each device, as many as `SCORES` allows."""
  batch, length = x_BT.shape
  sizes = sharding.axis_sizes()
  shards = 1
  for axis in sharding.RULES['batch'] if sizes else ():
    shards *= sizes[axis]
  keep = max(1, min(batch // shards, SCORES // length**2))
  x_RBT = x_BT.reshape(shards, batch // shards, length)
  return x_RBT[:, :keep].reshape(shards * keep, length)


def _groups(before: Any, after: Any, grads: Any) -> dict[str, Any]:
  """Norms of gradients, weights and updates by group, over layers if any."""
  change = jax.tree.map(lambda new, old: new - old, after, before)
  grad, weight, update = (
    _square_sums(tree) for tree in (grads, before, change)
  )
  return {
    'grad_norm_by_group': {name: jnp.sqrt(grad[name]) for name in grad},
    'weight_norm': {name: jnp.sqrt(weight[name]) for name in weight},
    # The ratio of RMS values: both are over the same elements.
    'update_ratio': {
      name: jnp.sqrt(update[name] / jnp.maximum(weight[name], 1e-30))
      for name in update
    },
  }


def _square_sums(tree: Any) -> dict[str, jax.Array]:
  """Sums of squares by group: [layers] for stacked leaves, else a scalar."""
  sums: dict[str, jax.Array] = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    names = [entry.key for entry in path]
    if names[-1] == 'bias':  # moved by the balancing rule; recorded as it is
      continue
    axes = tuple(range(1 if len(names) > 1 else 0, leaf.ndim))
    square = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
    group = group_of(names)
    sums[group] = sums[group] + square if group in sums else square
  return sums


def group_of(names: list[str]) -> str:
  """The group of a parameter: attn, experts, router, norms, or its own name.

  Groups of the MTP modules are prefixed with `mtp_`.
  """
  if len(names) == 1:
    return names[0]
  prefix = 'mtp_' if names[0] == 'mtp' else ''
  if names[-1].endswith('norm'):
    return prefix + 'norms'
  if names[-1] in ('wi_0', 'wi_1', 'wo'):
    return prefix + 'experts'
  return prefix + {'gate': 'router', 'proj': 'proj'}.get(names[-1], 'attn')


def _experts(moe: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """How alike the experts of each layer answer, and how many units are dead."""
  width = moe['norm'].shape[-1]
  probe_PD = jax.random.normal(jax.random.key(0), (PROBES, width))

  def one(weights):
    scale_1D = weights['norm'].astype(jnp.float32)[None]
    x_PD = probe_PD * scale_1D
    wi_0, wi_1, wo = (
      weights[name].astype(jnp.float32) for name in ('wi_0', 'wi_1', 'wo')
    )
    hidden = ('expert', None, 'ffn')
    gate_EPF = sharding.einsum('pd,edf->epf', x_PD, wi_0, out=hidden)
    up_EPF = sharding.einsum('pd,edf->epf', x_PD, wi_1, out=hidden)
    h_EPF = jax.nn.silu(gate_EPF) * up_EPF
    y_EPD = sharding.einsum(
      'epf,efd->epd', h_EPF, wo, out=('expert',) + 2 * (None,)
    )
    return _cosine(y_EPD), _dead(h_EPF)

  names = ('norm', 'wi_0', 'wi_1', 'wo')
  cosine_L, dead_L = jax.lax.map(one, {name: moe[name] for name in names})
  return {'expert_cosine': cosine_L, 'dead_units': dead_L}


def _cosine(y_EPD: jax.Array) -> jax.Array:
  """Mean cosine over pairs of different experts, from the sum of all."""
  count = y_EPD.shape[0]
  norm_EP1 = jnp.linalg.norm(y_EPD, axis=-1, keepdims=True)
  unit_EPD = y_EPD / jnp.maximum(norm_EP1, 1e-30)
  square_P = jnp.square(unit_EPD.sum(0)).sum(-1)
  own_P = jnp.square(unit_EPD).sum((0, 2))
  return (square_P - own_P).mean() / max(count * (count - 1), 1)


def _dead(h_EPF: jax.Array) -> jax.Array:
  rms = jnp.sqrt(jnp.mean(jnp.square(h_EPF)))
  return (jnp.abs(h_EPF).max(1) < DEAD * rms).mean()


def flatten(values: dict[str, Any]) -> dict[str, Any]:
  """Host arrays of a record as numbers and (nested) lists for JSON."""
  out = {}
  for name, value in values.items():
    if isinstance(value, dict):
      out[name] = flatten(value)
    else:
      # Five digits are enough to read, and halve the file.
      rounded = np.vectorize(lambda x: float(f'{x:.5g}'), otypes=[float])
      out[name] = rounded(np.asarray(value, np.float64)).tolist()
  return out
