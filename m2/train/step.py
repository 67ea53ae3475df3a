"""One update: gradients over microbatches, optimiser, router bias."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m2 import config
from m2.parallel import order
from m2.train import introspect, loss, optim
from m2.train import state as train_state

# Parts of `params` with routers, and where their load is in the loss metrics.
ROUTED = ('blocks', 'mtp')


def train_step(
  state: train_state.TrainState,
  batch: loss.Batch,
  *,
  model: config.ModelConfig,
  optimizer: optax.GradientTransformation,
  cfg: config.RunConfig,
  inspect: bool = False,
) -> tuple[train_state.TrainState, dict[str, Any]]:
  """Updates `state` on one batch. Pure; `m2.train.loop` compiles it.

  An update whose loss or gradients are not finite is not applied: the state
  comes back as it was except for its step, and `metrics['bad']` says where
  the first such value is, so that the loop can stop with sound weights.

  Args:
    state: what to update.
    batch: tokens, targets, positions, until int32 and weights float32; [B, T].
    model: model shape.
    optimizer: from `m2.train.optim.make`.
    cfg: `optim`, `loss` and `steps` are read.
    inspect: also fill `metrics['introspection']`.

  Returns:
    The new state, and metrics: float32 scalars, and `bad`, bool[1 + leaves]:
    whether the loss, then each gradient leaf in flattening order, is not
    finite.
  """
  grads, metrics = gradients(
    state.params, batch, model=model, cfg=cfg, step=state.step
  )
  load = metrics.pop('load')
  norms = jax.tree.map(_norm, grads)
  bad = jnp.stack(
    [~jnp.isfinite(x) for x in (metrics['loss'], *jax.tree.leaves(norms))]
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if model.mtp_modules and not cfg.loss.mtp:
    # Nothing trains them; weight decay alone must not wear them down.
    params = {**params, 'mtp': state.params['mtp']}
  params = balance(params, load, cfg, state.step)
  after = train_state.TrainState(state.step + 1, params, opt_state)
  grad_norm = optax.tree.norm(norms)
  # One number stands for all of `bad`: it is not finite if any of them is.
  sound = jnp.isfinite(grad_norm + metrics['loss'])
  after = jax.tree.map(
    lambda new, old: jnp.where(sound, new, old), after, state
  )
  after = after.replace(step=state.step + 1)
  metrics |= {
    'grad_norm': grad_norm,
    'lr': optim.schedule(cfg.optim, cfg.steps)(state.step),
    'bad': bad,
  }
  metrics['clipped'] = (metrics['grad_norm'] > cfg.optim.clip) * 1.0
  metrics |= _load_metrics(load, metrics['tokens'])
  if inspect:
    metrics, before = order.together((metrics, state.params))
    metrics['introspection'] = introspect.record(
      before, after.params, grads, batch, load, model=model
    )
  return after, metrics


def gradients(
  params: Any,
  batch: loss.Batch,
  *,
  model: config.ModelConfig,
  cfg: config.RunConfig,
  step: jax.Array,
) -> tuple[Any, dict[str, Any]]:
  """Gradients and summed metrics, over `optim.accumulate` microbatches.

  Every microbatch is normalised by the totals of the whole batch, so that the
  sum is the gradient of the batch at once, to rounding. Sums are float32.
  """

  def scalar(params, rows):
    return loss.loss_fn(
      optim.freeze(cfg.optim, params),
      rows,
      model=model,
      cfg=cfg,
      step=step,
      norm=norm,
    )

  def grad_fn(params, rows):
    return order.together(jax.grad(scalar, has_aux=True)(params, rows))

  norm = loss.totals(model, batch)
  if cfg.optim.accumulate == 1:
    return grad_fn(params, batch)
  rows = jax.tree.map(
    functools.partial(_split, count=cfg.optim.accumulate), dict(batch)
  )

  def add(total, part):
    fresh, metrics = grad_fn(params, part)
    square = optax.tree.norm(fresh) ** 2
    return jax.tree.map(jnp.add, total, fresh), (metrics, square)

  zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
  total, (parts, squares) = jax.lax.scan(add, zeros, rows)
  metrics = jax.tree.map(lambda x: x.sum(0), parts)
  metrics['noise_scale'] = _noise_scale(total, squares)
  return total, metrics


def _split(x_BT: jax.Array, count: int) -> jax.Array:
  """[B, T] -> [count, B / count, T]; rows stay on the devices they are on."""
  rows, length = x_BT.shape
  return x_BT.reshape(rows // count, count, length).swapaxes(0, 1)


def _noise_scale(total: Any, squares_A: jax.Array) -> jax.Array:
  """Batches' worth of gradient noise: trace of covariance over squared norm.

  Estimated from microbatches (arXiv 1812.06162, appendix A.1), in units of
  this batch: above 1, a larger batch would still reduce the noise notably.
  """
  count = squares_A.shape[0]
  # Microbatch gradients are shares of the sum: undo the 1 / count.
  small = squares_A.mean() * count**2
  big = optax.tree.norm(total) ** 2
  signal = (count * big - small) / (count - 1)
  noise = (small - big) / (count - 1)
  return noise / jnp.maximum(signal, 1e-12)


def _norm(leaf: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32))))


def balance(
  params: Any, load: dict, cfg: config.RunConfig, step: jax.Array
) -> Any:
  """Moves each router bias against its expert's load error, by sign.

  b += rate * sign(mean load - load) (arXiv 2408.15664, algorithm 1). Loads
  are sums over the whole batch. Frozen parts keep their biases.
  """
  rate = jnp.float32(cfg.optim.bias_rate)
  if cfg.optim.bias_decay:
    rate *= optim.schedule(cfg.optim, cfg.steps)(step) / cfg.optim.lr
  moved = dict(params)
  for part in ROUTED:
    if part not in load or cfg.optim.train_only not in ('all', part):
      continue
    load_LE = load[part]
    error_LE = load_LE.mean(-1, keepdims=True) - load_LE
    moe = dict(params[part]['moe'])
    moe['bias'] = moe['bias'] + rate * jnp.sign(error_LE)
    moved[part] = {**params[part], 'moe': moe}
  return moved


def _load_metrics(load: dict, tokens: jax.Array) -> dict[str, jax.Array]:
  """Experts per token, and the busiest expert over the mean, over layers."""
  load_LE = load['blocks']
  mean_L = jnp.maximum(load_LE.mean(-1), 1e-6)
  return {
    'active': load_LE.sum() / load_LE.shape[0] / jnp.maximum(tokens, 1),
    'load_max': (load_LE.max(-1) / mean_L).mean(),
  }
