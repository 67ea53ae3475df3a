"""The sparse feed-forward layer: sigmoid router and SwiGLU experts."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

import pallas_kernels
from m2 import config
from m2.parallel import experts, serving, sharding

TOKENS = ('batch', 'sequence', None)


class Moe(nn.Module):
  """Declares the router and expert parameters of one layer."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    cfg = self.cfg
    d, e, f = cfg.d_model, cfg.experts, cfg.d_expert
    scores = normal = nn.initializers.normal(cfg.init_std)
    out = nn.initializers.normal(cfg.init_std / (2 * cfg.layers) ** 0.5)
    dtype = jnp.dtype(cfg.param_dtype)
    if cfg.fp8_experts:
      normal, out = (_quantised(init) for init in (normal, out))
    return {
      'norm': self.param('norm', nn.initializers.ones, (d,), dtype),
      # The router is float32 whatever the rest is (spec of the checkpoint).
      'gate': self.param('gate', scores, (d, e), jnp.float32),
      'bias': self.param('bias', nn.initializers.zeros, (e,), jnp.float32),
      'wi_0': self.param('wi_0', normal, (e, d, f), dtype),
      'wi_1': self.param('wi_1', normal, (e, d, f), dtype),
      'wo': self.param('wo', out, (e, f, d), dtype),
    }


def _quantised(init: nn.initializers.Initializer) -> Callable:
  return lambda *args: pallas_kernels.quantise(init(*args))


def route(
  cfg: config.ModelConfig,
  weights: Mapping[str, jax.Array],
  x_BTD: jax.Array,
  count_BT: jax.Array,
  experts_BTX: jax.Array | None,
  round_tokens: int = 0,
) -> tuple[jax.Array, ...]:
  """Scores, chosen experts and mixing weights of every token.

  Args:
    cfg: model shape.
    weights: what `Moe` declares.
    x_BTD: normalised hidden states.
    count_BT: 0 for padding, which has no experts where tokens are rounded.
    experts_BTX: replay these choices instead of selecting; the weights still
      come from the live scores. A token's are distinct; values outside [0, E)
      choose none.
    round_tokens: rows of the tiles that an expert's tokens are rounded to; 0
      leaves them.

  Returns:
    score_BTE float32, index_BTX int32 (E = slot not used), weight_BTX float32,
    and the choices before rounding; with rounding there are spare slots in X.

  Raises:
    ValueError: what cannot be rounded: replayed choices, a number of experts
      that varies, or tokens that do not fill a tile of each expert on average.
  """
  logit_BTE = sharding.project(
    'btd,de->bte',
    x_BTD.astype(jnp.float32),
    weights['gate'],
    axes=(TOKENS, ('embed', None)),
    out=TOKENS,
    precision=jax.lax.Precision.HIGHEST,
  )
  score_BTE = jax.nn.sigmoid(logit_BTE)
  rows = sharding.spec(*TOKENS)
  if experts_BTX is not None:
    if round_tokens:
      raise ValueError(f'{round_tokens=}: choices that are replayed are fixed')
    weight_BTX = sharding.manual(_replayed, (rows, rows), rows)(
      score_BTE, experts_BTX
    )
    return score_BTE, experts_BTX, weight_BTX, experts_BTX

  def local(score, bias, count):
    score_ME = score.reshape(-1, cfg.experts)
    if round_tokens:
      real_M1 = count.reshape(-1, 1) > 0
      found = _rounded(cfg, score_ME, bias, real_M1, round_tokens)
    else:
      index_MX, weight_MX = pallas_kernels.route(
        score_ME,
        bias,
        top_k=cfg.top_k,
        min_k=cfg.min_k,
        min_share=cfg.min_share,
      )
      found = index_MX, weight_MX, index_MX
    return tuple(part.reshape(*score.shape[:2], -1) for part in found)

  each = rows, sharding.spec(None), sharding.spec(*TOKENS[:2])
  run = sharding.manual(local, each, (rows,) * 3)
  return score_BTE, *run(score_BTE, weights['bias'], count_BT)


def _rounded(cfg, score_ME, bias_E, real_M1, tile) -> tuple[jax.Array, ...]:
  """Whole tiles of tokens for each expert, of all devices that share them.

  Returns:
    Choices and weights, and the own choices that there were before.
  """
  if cfg.min_k != cfg.top_k:
    raise ValueError(f'round_tokens={tile} needs {cfg.min_k=} = {cfg.top_k=}')
  ways = sharding.axis_sizes().get('expert', 1)
  tokens = ways * len(score_ME)
  if tokens * cfg.top_k < cfg.experts * tile:
    raise ValueError(
      f'round_tokens={tile}: {tokens} tokens that are rounded together choose '
      f'{cfg.top_k} experts each, which does not fill a tile for each of '
      f'{cfg.experts}; set it to {tokens * cfg.top_k // cfg.experts} at most, '
      'or raise the tokens of a microbatch on a device'
    )
  spare = pallas_kernels.spare_choices(tokens, cfg.experts, cfg.top_k, tile)
  index_MX, weight_MX = pallas_kernels.route(
    score_ME, bias_E, top_k=cfg.top_k + spare
  )
  rank_MX = jnp.take_along_axis(score_ME, index_MX, axis=1)
  rounded = pallas_kernels.round_tokens(
    pallas_kernels.Routing(
      jnp.where(real_M1, index_MX, cfg.experts), weight_MX
    ),
    rank_MX,
    cfg.experts,
    top_k=cfg.top_k,
    tile=tile,
    axis='expert' if ways > 1 else None,
  )
  return *rounded, index_MX[:, : cfg.top_k]


def _replayed(score_BTE: jax.Array, experts_BTX: jax.Array) -> jax.Array:
  """Weights of given choices from live scores; unused slots get 0."""
  own_BTXE = jax.nn.one_hot(experts_BTX, score_BTE.shape[-1])
  # Copies of scores, to the last bit: no reduced precision on accelerators.
  chosen_BTX = jnp.einsum(
    'btxe,bte->btx',
    own_BTXE,
    score_BTE,
    precision=jax.lax.Precision.HIGHEST,
  )
  total_BT1 = chosen_BTX.sum(-1, keepdims=True)
  # Padding may have no choice at all.
  return chosen_BTX / jnp.where(total_BT1 > 0, total_BT1, 1)


def mix(
  cfg: config.ModelConfig,
  weights: Mapping[str, jax.Array],
  x_BTD: jax.Array,
  count_BT: jax.Array,
  experts_BTX: jax.Array | None,
  want_stats: bool,
  round_tokens: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """One mixture-of-experts sub-layer on normalised input.

  Args:
    cfg: model shape.
    weights: what `Moe` declares.
    x_BTD: normalised hidden states.
    count_BT: float32, how many training tokens each token stands for in load
      statistics: 0 for padding, the number of branches in a prefix tree.
    experts_BTX: replayed choices, or None.
    want_stats: also return introspection statistics.
    round_tokens: as `route` takes it.

  Returns:
    The sub-layer's output [B, T, D], and a dict: `experts_BTX` chosen,
    `load_E` assignments, `balance` auxiliary loss, `active` experts per token.
  """
  x_BTD = checkpoint_name(x_BTD, 'moe_in')
  score_BTE, index_BTX, weight_BTX, own_BTX = route(
    cfg, weights, x_BTD, count_BT, experts_BTX, round_tokens
  )
  matrices = [weights[name] for name in ('wi_0', 'wi_1', 'wo')]
  routing = index_BTX, weight_BTX
  if cfg.fp8_experts:
    y_BTD = serving.experts(x_BTD, routing, *matrices)
  else:
    most = None
    if round_tokens:
      most = functools.partial(
        pallas_kernels.rounded_rows, top_k=cfg.top_k, tile=round_tokens
      )
    y_BTD = experts.expert_parallel(
      x_BTD,
      routing,
      *(w.astype(x_BTD.dtype) for w in matrices),
      strategy=cfg.expert_strategy,
      chunks=cfg.expert_chunks,
      most=most,
    )
  out = {'experts_BTX': index_BTX}
  # What the router wants is balanced, not what rounding makes of it.
  out |= _load(cfg, score_BTE, own_BTX, count_BT)
  if want_stats:
    out['stats'] = _router_stats(score_BTE, count_BT)
  return y_BTD, out


def _load(cfg, score_BTE, index_BTX, count_BT) -> dict[str, jax.Array]:
  """Load of each expert and the auxiliary loss E * sum_e f_e * p_e.

  f_e is the share of assignments, p_e the mean share of the scores; the loss
  is 1 when both are uniform (arXiv 2101.03961, equation 4).
  """
  chosen_BTXE = index_BTX[..., None] == jnp.arange(cfg.experts).reshape(
    1, 1, 1, -1
  )
  used_BTE = chosen_BTXE.any(2).astype(jnp.float32)
  load_E = (used_BTE * count_BT[..., None]).sum((0, 1))
  tokens = jnp.maximum(count_BT.sum(), 1)
  share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True)
  mean_E = (share_BTE * count_BT[..., None]).sum((0, 1)) / tokens
  frequency_E = load_E / jnp.maximum(load_E.sum(), 1)
  return {
    'load_E': load_E,
    'balance': cfg.experts * jnp.sum(frequency_E * mean_E),
    'active': load_E.sum() / tokens,
  }


def _router_stats(score_BTE, count_BT) -> dict[str, jax.Array]:
  share_BTE = score_BTE / score_BTE.sum(-1, keepdims=True)
  entropy_BT = -(share_BTE * jnp.log(share_BTE + 1e-9)).sum(-1)
  tokens = jnp.maximum(count_BT.sum(), 1)
  return {'router_entropy': (entropy_BT * count_BT).sum() / tokens}
