"""The MiniMax-M2 decoder.

Letters: B batch, T query time, S key time, D model, N query heads, K key-value
heads, H head width, E experts, X chosen experts, F expert width, L layers,
V vocabulary, M = B * T. A suffix on a name is its shape.

Modules declare parameters; functions compute. `forward` serves training,
prefill and decoding: with a cache the T tokens are appended to each row.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from m2 import config
from m2.model import attention, moe, norm
from m2.model import cache as kv
from m2.parallel import context, sharding

HIDDEN = ('batch', 'sequence', None)


@flax.struct.dataclass
class Output:
  """What one pass through the blocks returns.

  Attributes:
    hidden_BTD: after the final norm; the head reads it.
    last_BTD: before the final norm; multi-token prediction reads it.
    cache: the cache with the new tokens, if one was given.
    experts_LBTX: int32 chosen experts; E marks an unused slot.
    load_LE: float32 assignments of each expert.
    balance: float32 scalar, auxiliary load-balance loss, mean over layers.
    active: float32 scalar, experts used per token, mean over layers.
    stats: per-layer introspection statistics, empty unless asked for.
  """

  hidden_BTD: jax.Array
  last_BTD: jax.Array
  cache: kv.KVCache | None
  experts_LBTX: jax.Array
  load_LE: jax.Array
  balance: jax.Array
  active: jax.Array
  stats: dict[str, jax.Array]


class Block(nn.Module):
  """One decoder layer: attention and experts, each behind a norm."""

  cfg: config.ModelConfig
  want_stats: bool = False
  round_tokens: int = 0

  @nn.compact
  def __call__(self, carry, layer, experts_BTX, shared):
    cfg = self.cfg
    attn = attention.Attention(cfg, name='attn')()
    ffn = moe.Moe(cfg, name='moe')()
    if self.is_initializing():  # parameters are declared: no more is needed
      return carry, None
    return block(
      cfg,
      attn,
      ffn,
      carry,
      layer,
      experts_BTX,
      shared,
      self.want_stats,
      self.round_tokens,
    )


def block(
  cfg, attn, ffn, carry, layer, experts_BTX, shared, want_stats, round_tokens
):
  """Applies one layer to `carry` = (x_BTD, cache); pre-norm, two residuals."""
  x_BTD, cache = carry
  positions_BT, until_BT, count_BT = shared
  h_BTD = norm.rms_norm(x_BTD, attn['norm'], cfg.norm_eps)
  a_BTD, cache, stats = attention.attend(
    cfg, attn, h_BTD, positions_BT, until_BT, cache, layer, want_stats
  )
  x_BTD = x_BTD + a_BTD
  h_BTD = norm.rms_norm(x_BTD, ffn['norm'], cfg.norm_eps)
  y_BTD, routed = moe.mix(
    cfg, ffn, h_BTD, count_BT, experts_BTX, want_stats, round_tokens
  )
  if want_stats:
    stats |= routed.pop('stats') | _activation_stats(x_BTD, a_BTD, y_BTD)
  return (x_BTD + y_BTD, cache), routed | {'stats': stats}


def _activation_stats(x_BTD, a_BTD, y_BTD) -> dict[str, jax.Array]:
  def rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))

  return {
    'residual_rms': rms(x_BTD),
    'attn_out_rms': rms(a_BTD),
    'moe_out_rms': rms(y_BTD),
  }


# Named rematerialisation policies: what the backward pass may keep.
REMAT = {
  'block': jax.checkpoint_policies.save_only_these_names('attn_out', 'moe_in'),
  'full': jax.checkpoint_policies.nothing_saveable,
}


class M2(nn.Module):
  """The whole model; `apply({'params': params}, ...)` returns an `Output`.

  `init` only declares parameters: its inputs may be None, as its result is.
  """

  cfg: config.ModelConfig
  want_stats: bool = False
  round_tokens: int = 0

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array | None,
    positions_BT: jax.Array | None,
    until_BT: jax.Array | None,
    cache: kv.KVCache | None = None,
    experts_LBTX: jax.Array | None = None,
    count_BT: jax.Array | None = None,
  ) -> Output | None:
    cfg = self.cfg
    dtype = jnp.dtype(cfg.param_dtype)
    normal = nn.initializers.normal(cfg.init_std)
    embed_VD = self.param('embed', normal, (cfg.vocab, cfg.d_model), dtype)
    final_D = self.param('final_norm', nn.initializers.ones, cfg.d_model, dtype)
    self.param('head', normal, (cfg.d_model, cfg.vocab), dtype)
    blocks = scanned(Block, cfg, cfg.layers)(
      cfg, self.want_stats, self.round_tokens, name='blocks'
    )
    if self.is_initializing():
      blocks(None, jnp.arange(cfg.layers), None, None)
      return None
    sharding.check_rows(len(tokens_BT))
    x_BTD = embed_tokens(cfg, embed_VD, tokens_BT)
    cache, count_BT = _prepare(cache, until_BT, count_BT)
    (x_BTD, cache), routed = blocks(
      (x_BTD, cache),
      jnp.arange(cfg.layers),
      experts_LBTX,
      (positions_BT, until_BT, count_BT),
    )
    if cache is not None:
      new_B = (until_BT > 0).sum(1, dtype=jnp.int32)
      cache = cache.replace(filled_B=cache.filled_B + new_B)
    return Output(
      hidden_BTD=norm.rms_norm(x_BTD, final_D, cfg.norm_eps),
      last_BTD=x_BTD,
      cache=cache,
      experts_LBTX=routed['experts_BTX'],
      load_LE=routed['load_E'],
      balance=routed['balance'].mean(),
      active=routed['active'].mean(),
      stats=routed['stats'],
    )


def scanned(module: type[nn.Module], cfg: config.ModelConfig, length: int):
  """`module` over a leading layer axis, rematerialised by `cfg.remat`."""
  if cfg.remat != 'none':
    module = nn.remat(module, policy=REMAT[cfg.remat], prevent_cse=False)
  return nn.scan(
    module,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=(0, 0, nn.broadcast),
    length=length,
  )


def embed_tokens(
  cfg: config.ModelConfig, embed_VD: jax.Array, tokens_BT: jax.Array
) -> jax.Array:
  """Rows of the embedding table, in the compute dtype.

  Few tokens go to where the rows lie, an all-gather and a reduce-scatter of
  tokens over `expert`; for many, the table comes here, an all-gather of V * D.
  """

  def local(table_VD, tokens_BT):
    sizes = sharding.axis_sizes()
    if not sizes:
      return table_VD[tokens_BT]
    reach = jax.typeof(tokens_BT).mat.varying
    ways = sizes['expert']
    few = ways > 1 and tokens_BT.size * ways < cfg.vocab
    place = jax.lax.axis_index('tensor')
    table_axes = (None if few else 'vocab', 'embed')
    table_VD = sharding.gathered(table_VD, *table_axes, over=reach)
    if few:
      place = place * ways + jax.lax.axis_index('expert')
      tokens_BT = jax.lax.all_gather(tokens_BT, 'expert', axis=0, tiled=True)
    row_BT = tokens_BT - place * len(table_VD)
    own_BT1 = ((row_BT >= 0) & (row_BT < len(table_VD)))[..., None]
    x_BTD = jnp.where(own_BT1, table_VD[row_BT], 0)
    if few:
      x_BTD = jax.lax.psum_scatter(x_BTD, 'expert', tiled=True)
    return sharding.total(x_BTD, HIDDEN)

  run = sharding.manual(
    local,
    (sharding.spec('vocab', 'embed'), sharding.spec(*HIDDEN[:2])),
    sharding.spec(*HIDDEN),
  )
  return run(embed_VD.astype(cfg.dtype), tokens_BT)


def _prepare(cache, until_BT, count_BT):
  """Marks the new tokens in the cache's mask; default load weights."""
  if count_BT is None:
    count_BT = (until_BT > 0).astype(jnp.float32)
  if cache is not None:
    if context.ways() > 1:
      raise ValueError(
        f'mesh.context={context.ways()}: a key-value cache holds whole rows; '
        'generate on a mesh with context=1'
      )
    until_BS = kv.write(cache.until_BS, until_BT, cache.filled_B)
    cache = cache.replace(until_BS=until_BS)
  return cache, count_BT


def forward(
  cfg: config.ModelConfig,
  params: Any,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  until_BT: jax.Array,
  cache: kv.KVCache | None = None,
  experts_LBTX: jax.Array | None = None,
  *,
  count_BT: jax.Array | None = None,
  want_stats: bool = False,
  round_tokens: int = 0,
) -> Output:
  """Hidden states of every token.

  Args:
    cfg: model shape.
    params: parameters as `m2.model.params.abstract` describes them.
    tokens_BT: int32 token ids.
    positions_BT: int32 positions for the rotary embedding.
    until_BT: int32; key j is visible to query i iff j <= i < until[j], counted
      in the row (in the cache, if one is given). Padding has 0.
    cache: append the tokens to these rows and attend to all of each.
    experts_LBTX: int32, replay these routing choices.
    count_BT: float32, weight of each token in load statistics; None counts
      every token that is not padding once.
    want_stats: fill `Output.stats`.
    round_tokens: rows of the tiles that each expert's tokens are rounded to
      (`pallas_kernels.round_tokens`), for training alone; 0 leaves them. Those
      of devices that share experts are rounded together. Routes then have spare
      slots, and later tokens decide on the experts of earlier ones, too.

  Raises:
    ValueError: a cache on a mesh that cuts rows (`mesh.context` above 1).
  """
  return M2(cfg, want_stats, round_tokens).apply(
    {'params': params},
    tokens_BT,
    positions_BT,
    until_BT,
    cache,
    experts_LBTX,
    count_BT,
  )


def logits(
  cfg: config.ModelConfig,
  params: Any,
  tokens_BT: jax.Array,
  positions_BT: jax.Array | None = None,
  until_BT: jax.Array | None = None,
) -> jax.Array:
  """All logits at once; for small models and tests.

  Args:
    cfg: model shape.
    params: parameters.
    tokens_BT: int token ids.
    positions_BT: int positions; None counts from 0.
    until_BT: mask intervals; None is plain causal attention.

  Returns:
    float32[B, T, V].

  Raises:
    ValueError: they are not [B, T], no whole numbers or, where their values
      are known, out of range.
  """
  tokens_BT = _whole('tokens', tokens_BT, cfg.vocab)
  length = tokens_BT.shape[1]
  if positions_BT is None:
    positions_BT = jnp.broadcast_to(jnp.arange(length)[None], tokens_BT.shape)
  if until_BT is None:
    until_BT = jnp.full(tokens_BT.shape, length)
  output = forward(
    cfg,
    params,
    tokens_BT,
    _whole('positions', positions_BT, 2**31),
    _whole('until', until_BT, 2**31),
  )
  return head_logits(params, output.hidden_BTD)


def _whole(name: str, given_BT: Any, limit: int) -> jax.Array:
  """`given_BT` as int32, checked as far as its values are known."""
  if not isinstance(given_BT, jax.Array):
    given_BT = np.asarray(given_BT)
  if not jnp.issubdtype(given_BT.dtype, jnp.integer):
    raise ValueError(f'{name} are {given_BT.dtype}: integers are expected')
  if given_BT.ndim != 2:
    raise ValueError(f'{name} are {given_BT.shape}: [B, T] is expected')
  known = not isinstance(given_BT, jax.core.Tracer) and given_BT.size
  if known and getattr(given_BT, 'is_fully_addressable', True):
    values = np.asarray(given_BT)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= limit:
      raise ValueError(f'{name} are {least} to {most}: 0 to {limit - 1} exist')
  return jnp.asarray(given_BT, jnp.int32)


def head_logits(params: Any, hidden_BTD: jax.Array) -> jax.Array:
  """float32 logits: the head is kept out of low precision (M1 report 3).

  The head stays where it is but for FSDP: hidden states are gathered over
  `expert`, and each device's slice of the vocabulary is sent to their owners.
  """

  def local(hidden_BTD, head_DV):
    sizes = sharding.axis_sizes()
    if not sizes:
      return _products(hidden_BTD, head_DV)
    head_DV = sharding.gathered(head_DV, 'embed', None)
    hidden_BTD = sharding.varying(hidden_BTD)
    if sizes['expert'] > 1:
      hidden_BTD = jax.lax.all_gather(hidden_BTD, 'expert', axis=0, tiled=True)
    logits_BTV = _products(hidden_BTD, head_DV)
    if sizes['expert'] > 1:
      logits_BTV = jax.lax.all_to_all(
        logits_BTV, 'expert', split_axis=0, concat_axis=2, tiled=True
      )
    return jax.lax.all_gather(
      logits_BTV, 'tensor', axis=2, tiled=True, to='invarying'
    )

  run = sharding.manual(
    local,
    (sharding.spec(*HIDDEN), sharding.spec('embed', 'vocab')),
    sharding.spec(*HIDDEN),
  )
  return run(hidden_BTD.astype(jnp.float32), params['head'].astype(jnp.float32))


def _products(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
  return jnp.einsum(
    'btd,dv->btv', hidden_BTD, head_DV, precision=jax.lax.Precision.HIGHEST
  )
