"""The training loss: next token, log-partition, balance, multi-token."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m2 import config
from m2.model import logprob, mtp, transformer
from m2.parallel import order
from m2.train import optim

Batch = Mapping[str, jax.Array]


class Totals(NamedTuple):
  """Sums over a whole batch that microbatches are normalised by.

  Attributes:
    weight: float32 scalar, sum of the token weights, at least 1e-6.
    tokens: float32 scalar, tokens that are not padding, at least 1.
    weight_J: float32[J], sum of the weights of each MTP module's targets.
  """

  weight: jax.Array
  tokens: jax.Array
  weight_J: jax.Array


def totals(model: config.ModelConfig, batch: Batch) -> Totals:
  """The normalisers of `batch`; global, whatever the microbatches are."""
  ahead = jnp.zeros((0, 1, 1))
  if model.mtp_modules:
    ahead = mtp.shifted(batch, model.mtp_modules)['weights_JBT']
  return Totals(
    weight=jnp.maximum(batch['weights'].sum(), 1e-6),
    tokens=jnp.maximum((batch['until'] > 0).sum().astype(jnp.float32), 1),
    weight_J=jnp.maximum(ahead.sum((1, 2)), 1e-6),
  )


def mtp_weight(cfg: config.RunConfig, step: jax.Array) -> jax.Array:
  """Weight of the MTP term: `loss.mtp`, then linearly to `loss.mtp_final`."""
  late = optim.decayed(cfg.optim, cfg.steps, step)
  return cfg.loss.mtp + (cfg.loss.mtp_final - cfg.loss.mtp) * late


def loss_fn(
  params: Any,
  batch: Batch,
  *,
  model: config.ModelConfig,
  cfg: config.RunConfig,
  step: jax.Array,
  norm: Totals | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
  """The loss of one (micro)batch.

  Args:
    params: parameters.
    batch: tokens, targets, positions, until int32 and weights float32; [B, T].
    model: model shape.
    cfg: `loss`, `optim` and `steps` are read.
    step: int32 scalar, for the annealed MTP weight.
    norm: normalisers of the whole batch; None takes those of `batch`. The
      losses of microbatches under one `norm` add up to the batch's loss,
      except for the balance term, which is not linear: it becomes the mean
      over microbatches, by tokens; and with `loss.round_tokens` each rounds its
      own.

  Returns:
    float32 scalar, and metrics that add up over microbatches: `loss`, `ce`,
    `z`, `log_z`, `entropy`, `balance`, `mtp` (terms before their weights;
    `log_z` is the mean log-partition in nats, of whose square `z` is the mean),
    `tokens`, `weight` and `load`, a dict of expert assignments
    float32[layers, E].
  """
  norm = totals(model, batch) if norm is None else norm
  output = transformer.forward(
    model,
    params,
    batch['tokens'],
    batch['positions'],
    batch['until'],
    round_tokens=cfg.loss.round_tokens,
  )
  hidden_BTD, ahead = output.hidden_BTD, None
  # Before the head, and after it in the backward pass.
  if model.mtp_modules and cfg.loss.mtp:
    ahead = mtp.loss(
      model,
      params,
      output,
      batch,
      chunk=cfg.loss.chunk,
      round_tokens=cfg.loss.round_tokens,
    )
    ahead, hidden_BTD = order.together((ahead, hidden_BTD))
  logp_BT, entropy_BT, logz_BT = logprob.from_hidden(
    params, hidden_BTD, batch['targets'], chunk=cfg.loss.chunk
  )
  share_BT = batch['weights'] / norm.weight
  tokens = (batch['until'] > 0).sum().astype(jnp.float32)
  metrics = {
    'ce': -(logp_BT * share_BT).sum(),
    'z': (jnp.square(logz_BT) * share_BT).sum(),
    'log_z': (logz_BT * share_BT).sum(),
    'entropy': (entropy_BT * share_BT).sum(),
    'balance': output.balance * tokens / norm.tokens,
    'tokens': tokens,
    'weight': batch['weights'].sum(),
    'load': {'blocks': output.load_LE},
  }
  loss = metrics['ce'] + cfg.loss.z * metrics['z']
  loss += cfg.loss.balance * metrics['balance']
  if ahead:
    total_J, extra = ahead
    # The mean over modules, as in arXiv 2412.19437, equation 25.
    metrics['mtp'] = (total_J / norm.weight_J).mean()
    metrics['load']['mtp'] = extra['load_JE']
    loss += mtp_weight(cfg, step) * metrics['mtp']
    loss += cfg.loss.balance * extra['balance'] * tokens / norm.tokens
  return order.together((loss, metrics | {'loss': loss}))
