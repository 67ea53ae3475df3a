"""One RL update on a batch of prefix trees. Pure functions.

`rl_loss` is the definition: one forward pass over all lines, one loss.
`rl_step` computes the same gradient `forge.lines` lines at a time and skips
microbatches of padding, so that one program serves batches of any size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from m2 import config
from m2.forge import cispo
from m2.forge import tree as tree_lib
from m2.model import logprob, transformer
from m2.parallel import context, order, sharding
from m2.train import introspect, optim
from m2.train import state as train_state
from m2.train import step as train_step

# Fields of a TreeBatch that are lines; the rest belongs to the whole batch.
LINES = ('tokens_BT', 'positions_BT', 'until_BT', 'parent_BT', 'count_BT')


def score(
  params: Any,
  tree: tree_lib.TreeBatch,
  *,
  model: config.ModelConfig,
  cfg: config.RunConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scores every token under the hidden state of its parent.

  Args:
    params: parameters.
    tree: only its lines and routes are read.
    model: model shape.
    cfg: `forge.chunk` is read.

  Returns:
    Log-probability and entropy (nats) of the distribution it came from, both
    float32[B, T]; and the experts' load float32[L, E], a token counting once
    for each row that passes through it.
  """
  output = transformer.forward(
    model,
    params,
    tree.tokens_BT,
    tree.positions_BT,
    tree.until_BT,
    experts_LBTX=tree.experts_LBTX,
    count_BT=tree.count_BT.astype(jnp.float32),
  )
  parent_BTD = _at_parents(output.hidden_BTD, tree.parent_BT)
  logp_BT, entropy_BT, _ = logprob.from_hidden(
    params, parent_BTD, tree.tokens_BT, chunk=cfg.forge.chunk
  )
  return logp_BT, entropy_BT, output.load_LE


def _at_parents(hidden_BTD: jax.Array, parent_BT: jax.Array) -> jax.Array:
  """The hidden state of each token's parent; rows stay where they are."""
  rows, lines = (
    sharding.spec('batch', 'sequence', None),
    sharding.spec('batch', 'sequence'),
  )

  def local(hidden_BTD, parent_BT):
    # all-gather over 'context': a parent may be anywhere before in the line.
    hidden_BTD = context.whole(hidden_BTD)
    return jnp.take_along_axis(hidden_BTD, parent_BT[..., None], axis=1)

  return sharding.manual(local, (rows, lines), rows)(hidden_BTD, parent_BT)


def rl_loss(
  params: Any,
  tree: tree_lib.TreeBatch,
  *,
  model: config.ModelConfig,
  cfg: config.RunConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The policy loss of a batch, merged or not: the same line of code.

  Args:
    params: parameters; leaves that `optim` never moves get no gradient.
    tree: from `merge_prefixes` or `separate`.
    model: model shape.
    cfg: `forge` and `optim` are read.

  Returns:
    float32 scalar, and metrics: `cispo.statistics`, `entropy` (mean over
    trained tokens, nats) and `load` float32[L, E].
  """
  params = optim.freeze(cfg.optim, params)
  logp_BT, entropy_BT, load_LE = score(params, tree, model=model, cfg=cfg)
  loss, metrics = cispo.cispo_loss(logp_BT, tree, clip_high=cfg.forge.clip_high)
  metrics['entropy'] = _mean(entropy_BT, tree)
  return loss, metrics | {'load': load_LE}


def _mean(value_BT: jax.Array, tree: tree_lib.TreeBatch) -> jax.Array:
  """Mean over trained pairs, by weight."""
  weight_Z = tree.weight_Z
  value_Z = cispo.gather(value_BT, tree)
  return (value_Z * weight_Z).sum() / jnp.maximum(weight_Z.sum(), 1e-6)


def rl_step(
  state: train_state.TrainState,
  tree: tree_lib.TreeBatch,
  *,
  model: config.ModelConfig,
  optimizer: optax.GradientTransformation,
  cfg: config.RunConfig,
  inspect: jax.Array | None = None,
) -> tuple[train_state.TrainState, dict[str, Any]]:
  """Updates `state` on one batch.

  An update with a loss or gradient that is not finite is not applied: the
  state comes back as it was, and `metrics['bad']` is 1.

  Args:
    state: its `step` is also the weight version of its parameters.
    tree: a batch whose number of lines is a multiple of `forge.lines`.
    model: model shape.
    optimizer: from `m2.train.optim.make`.
    cfg: `forge`, `optim` and `steps` are read.
    inspect: bool scalar: whether to look inside this time, at run time, so
      that one program does both; None never looks.

  Returns:
    The new state, and float32 scalars: `loss`, `entropy`, `grad_norm`, `lr`,
    `bad`, `load_max`, and those of `cispo.statistics` and `cispo.mismatch`.
    Unless `inspect` is None also `introspection`; zeros if it is false.
  """
  grads, logp_BT, entropy_BT, load_LE = gradients(
    state.params, tree, model=model, cfg=cfg
  )
  loss, metrics = cispo.cispo_loss(logp_BT, tree, clip_high=cfg.forge.clip_high)
  gap_Z = cispo.gather(logp_BT, tree) - tree.old_logp_Z
  metrics |= cispo.mismatch(gap_Z, tree, state.step)
  norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if 'mtp' in params:
    # Nothing here trains them; weight decay alone must not wear them down.
    params = {**params, 'mtp': state.params['mtp']}
  # The balancing rule moves the router bias; `optim.bias_rate` 0 holds it.
  params = train_step.balance(params, {'blocks': load_LE}, cfg, state.step)
  after = train_state.TrainState(state.step + 1, params, opt_state)
  sound = jnp.isfinite(loss) & jnp.isfinite(norm)
  after = jax.tree.map(
    lambda new, old: jnp.where(sound, new, old), after, state
  )
  mean_L = jnp.maximum(load_LE.mean(-1), 1e-6)
  metrics |= {
    'loss': loss,
    'entropy': _mean(entropy_BT, tree),
    'grad_norm': norm,
    'lr': optim.schedule(cfg.optim, cfg.steps)(state.step),
    'bad': 1.0 - sound,
    'load_max': (load_LE.max(-1) / mean_L).mean(),
  }
  if inspect is not None:
    metrics, before = order.together((metrics, state.params))
    metrics['introspection'] = _look_inside(
      inspect, before, after.params, grads, tree, load_LE, model
    )
  return after, metrics


def _look_inside(wanted, before, after, grads, tree, load_LE, model):
  """The introspection record if `wanted`, else zeros of its shape."""
  names = ('tokens', 'positions', 'until')
  lines = {name: getattr(tree, f'{name}_BT') for name in names}

  def record():
    found = introspect.record(
      before, after, grads, lines, {'blocks': load_LE}, model=model
    )
    return _replicated(found)

  def nothing():
    return jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(record)
    )

  return jax.lax.cond(wanted, record, nothing)


def gradients(
  params: Any,
  tree: tree_lib.TreeBatch,
  *,
  model: config.ModelConfig,
  cfg: config.RunConfig,
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
  """The gradient of `rl_loss`, `forge.lines` lines at a time.

  Returns:
    Gradients (float32), log-probabilities and entropies float32[B, T] (0 in
    lines that hold only padding), and the load float32[L, E].
  """
  size = cfg.forge.lines
  # All-gather of a few integers a token, so that every microbatch can again be
  # split over all devices.
  tree = _replicated(tree)

  def scalar(params, part):
    params = optim.freeze(cfg.optim, params)
    logp_BT, entropy_BT, load_LE = score(params, part, model=model, cfg=cfg)
    loss, _ = cispo.cispo_loss(logp_BT, part, clip_high=cfg.forge.clip_high)
    return loss, (logp_BT, entropy_BT, load_LE)

  def add(at, carry):
    total, logp_BT, entropy_BT, load_LE = carry
    part = _part(tree, at * size, size)
    fresh, (logp, entropy, load) = order.together(
      jax.grad(scalar, has_aux=True)(params, part)
    )
    put = jax.lax.dynamic_update_slice_in_dim
    return (
      jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, fresh),
      put(logp_BT, sharding.place(logp, None, None), at * size, 0),
      put(entropy_BT, sharding.place(entropy, None, None), at * size, 0),
      load_LE + load,
    )

  empty_BT = jnp.zeros(tree.tokens_BT.shape)
  start = (
    jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params),
    empty_BT,
    empty_BT,
    jnp.zeros((model.layers, model.experts)),
  )
  used = (tree.until_BT > 0).any(1).sum()
  return jax.lax.fori_loop(0, -(-used // size), add, start)


def _replicated(values: Any) -> Any:
  """The whole of every array on every device."""
  return jax.tree.map(lambda x: sharding.place(x, *(None,) * x.ndim), values)


def _part(
  tree: tree_lib.TreeBatch, first: jax.Array, size: int
) -> tree_lib.TreeBatch:
  """`size` lines from `first` on; pairs scored elsewhere get weight 0."""

  def cut(x, axis, *axes):
    part = jax.lax.dynamic_slice_in_dim(x, first, size, axis)
    return sharding.place(part, *axes)

  lines = {
    name: cut(getattr(tree, name), 0, 'batch', 'sequence') for name in LINES
  }
  routes = tree.experts_LBTX
  if routes is not None:
    routes = cut(routes, 1, None, 'batch', 'sequence', None)
  tokens = tree.tokens_BT.shape[1]
  edge_Z = tree.edge_Z - first * tokens
  inside_Z = (edge_Z >= 0) & (edge_Z < size * tokens)
  return tree.replace(
    **lines,
    experts_LBTX=routes,
    edge_Z=jnp.where(inside_Z, edge_Z, 0),
    weight_Z=jnp.where(inside_Z, tree.weight_Z, 0.0),
  )
