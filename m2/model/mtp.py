"""Multi-token prediction: modules that look one more token ahead each.

Module j (from 1) reads the hidden state of module j - 1 (the trunk for j = 1)
at token i and the embedding of token i + j, and predicts token i + j + 1 with
the trunk's own head (report 2.3, which follows arXiv 2412.19437, section 2.2).
The block type and the order of the two halves are not published for M2: the
modules here are whole M2 layers, hidden state first.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from m2 import config
from m2.model import attention, logprob, moe, norm, transformer
from m2.parallel import context, order, sharding


class Module(nn.Module):
  """Declares the parameters of one module."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(self, carry, _):
    cfg = self.cfg
    ones, dtype = nn.initializers.ones, jnp.dtype(cfg.param_dtype)
    for name in ('enorm', 'hnorm', 'norm'):
      self.param(name, ones, (cfg.d_model,), dtype)
    normal = nn.initializers.normal(cfg.init_std)
    self.param('proj', normal, (2 * cfg.d_model, cfg.d_model), dtype)
    attention.Attention(cfg, name='attn')()
    moe.Moe(cfg, name='moe')()
    return carry, None


def init(cfg: config.ModelConfig, key: jax.Array) -> Any:
  """Parameters of `cfg.mtp_modules` modules, stacked on a leading axis."""
  modules = nn.scan(
    Module,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=cfg.mtp_modules,
  )
  return modules(cfg, name='mtp').init(key, 0.0, None)['params']


def expand(cfg: config.ModelConfig, params: Any) -> Any:
  """Gives `params` the modules that `cfg` asks for, by copying.

  Existing modules are kept; new ones are copies of the first, or of the
  trunk's last layer where there is none (report 2.3: copying converges faster
  than random values). The trunk is returned untouched.

  Raises:
    ValueError: `params` has more modules than `cfg.mtp_modules`.
  """
  present = params['mtp']['norm'].shape[0] if 'mtp' in params else 0
  missing = cfg.mtp_modules - present
  if missing < 0:
    raise ValueError(
      f'the checkpoint has {present} MTP modules but model.mtp_modules='
      f'{cfg.mtp_modules}; dropping trained modules must be explicit'
    )
  if not missing:
    return params
  if present:
    first = jax.tree.map(lambda leaf: leaf[:1], params['mtp'])
    copies = [params['mtp']] + [first] * missing
  else:
    copies = [_from_trunk(params)] * missing
  stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *copies)
  return {**params, 'mtp': stacked}


def _from_trunk(params: Any) -> Any:
  """A module that repeats the last layer on the trunk's hidden state."""
  last = jax.tree.map(lambda leaf: leaf[-1:], params['blocks'])
  ones = jnp.ones_like(last['attn']['norm'])
  width = ones.shape[1]
  # [I; 0] passes the hidden state through; the embedding half starts at 0.
  proj = jnp.concatenate([jnp.eye(width), jnp.zeros((width, width))])
  return {
    **last,
    'enorm': ones,
    'hnorm': ones,
    'norm': ones,
    'proj': proj[None].astype(ones.dtype),
  }


def shifted(batch: Mapping[str, jax.Array], modules: int) -> dict:
  """What each module reads and predicts, stacked on a leading axis J.

  Returns:
    `tokens_JBT` = t[i + j], `targets_JBT` = t[i + j + 1], `weights_JBT`, which
    is 0 where either lies outside the document of token i, and `counts_JBT`,
    float32, 1 where t[i + j] lies in it.
  """
  index_BT = jnp.arange(batch['tokens'].shape[1])[None]
  rows = {'tokens': [], 'targets': [], 'weights': []}
  counts = []
  for ahead in range(1, modules + 1):
    inside_BT = index_BT + ahead < batch['until']
    counts.append(inside_BT.astype(jnp.float32))
    for name, out in rows.items():
      out.append(jnp.where(inside_BT, _ahead(batch[name], ahead), 0))
  rows['counts'] = counts
  return {f'{name}_JBT': jnp.stack(out) for name, out in rows.items()}


def _ahead(x_BT: jax.Array, count: int) -> jax.Array:
  """The value `count` tokens later in the row; zeros at its end."""
  rows = sharding.spec('batch', 'sequence')
  local = functools.partial(context.ahead, count=count)
  return sharding.manual(local, (rows,), rows)(x_BT)


def loss(
  cfg: config.ModelConfig,
  params: Any,
  output: transformer.Output,
  batch: Mapping[str, jax.Array],
  *,
  chunk: int,
  round_tokens: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of weighted cross-entropies of each module.

  Args:
    cfg: model shape.
    params: parameters with `mtp`.
    output: the trunk's output for `batch`.
    batch: tokens, targets, weights, positions, until; each [B, T].
    chunk: tokens whose logits exist at once.
    round_tokens: as `transformer.forward` takes it.

  Returns:
    float32[J] sums of weight * cross-entropy, and a dict: `weight_J` sums of
    the weights, `load_JE` expert assignments, `balance` auxiliary loss.
  """
  ahead = shifted(batch, cfg.mtp_modules)
  shared = (batch['positions'], batch['until'])

  @order.checkpoint
  def one(outer, shared, h_BTD, xs):
    weights, token_BT, target_BT, weight_BT, count_BT = xs
    x_BTD = _enter(cfg, outer, weights, h_BTD, token_BT)
    (h_BTD, _), routed = transformer.block(
      cfg,
      weights['attn'],
      weights['moe'],
      (x_BTD, None),
      0,
      None,
      (*shared, count_BT),
      False,
      round_tokens,
    )
    out_BTD = norm.rms_norm(h_BTD, weights['norm'], cfg.norm_eps)
    logp_BT, _, _ = logprob.from_hidden(outer, out_BTD, target_BT, chunk=chunk)
    total = -(logp_BT * weight_BT).sum()
    return h_BTD, (total, routed['load_E'], routed['balance'])

  outer = {name: params[name] for name in ('embed', 'head')}
  _, (total_J, load_JE, balance_J) = jax.lax.scan(
    functools.partial(one, outer, shared),
    output.last_BTD,
    (
      params['mtp'],
      ahead['tokens_JBT'],
      ahead['targets_JBT'],
      ahead['weights_JBT'],
      ahead['counts_JBT'],
    ),
  )
  return total_J, {
    'weight_J': ahead['weights_JBT'].sum((1, 2)),
    'load_JE': load_JE,
    'balance': balance_J.mean(),
  }


def _enter(cfg, params, weights, h_BTD, token_BT):
  """Joins the hidden state and the next token's embedding."""
  h_BTD, embed_VD = order.together((h_BTD, params['embed']))
  emb_BTD = transformer.embed_tokens(cfg, embed_VD, token_BT)
  both_BTC = jnp.concatenate(
    [
      norm.rms_norm(h_BTD, weights['hnorm'], cfg.norm_eps),
      norm.rms_norm(emb_BTD, weights['enorm'], cfg.norm_eps),
    ],
    axis=-1,
  )
  return sharding.project(
    'btc,cd->btd',
    both_BTC,
    weights['proj'].astype(h_BTD.dtype),
    axes=(transformer.HIDDEN, ('embed', None)),
    out=transformer.HIDDEN,
  )
