"""Grouped-query attention with whole-vector QK-norm and partial RoPE."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

import pallas_kernels
from m2 import config
from m2.model import cache as kv
from m2.model import norm
from m2.parallel import context, sharding
from pallas_kernels.attention import ref

HEADS = ('batch', 'sequence', 'heads', None)
KV_HEADS = ('batch', 'sequence', 'kv_heads', None)
HIDDEN = ('batch', 'sequence', None)
# Keys and values of whole rows, as a cache has them.
CACHED = ('batch', None, 'kv_heads', None)
# Scores of a row and head that introspection holds at once.
SCORES = 2**20


class Attention(nn.Module):
  """Declares the attention parameters of one layer."""

  cfg: config.ModelConfig

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    cfg = self.cfg
    d, n, k, h = cfg.d_model, cfg.heads, cfg.kv_heads, cfg.head_dim
    normal = nn.initializers.normal(cfg.init_std)
    # The output projection starts smaller by depth, as residuals add up.
    out = nn.initializers.normal(cfg.init_std / (2 * cfg.layers) ** 0.5)
    ones = nn.initializers.ones
    dtype = jnp.dtype(cfg.param_dtype)
    return {
      'norm': self.param('norm', ones, (d,), dtype),
      'q': self.param('q', normal, (d, n, h), dtype),
      'k': self.param('k', normal, (d, k, h), dtype),
      'v': self.param('v', normal, (d, k, h), dtype),
      'q_norm': self.param('q_norm', ones, (n, h), dtype),
      'k_norm': self.param('k_norm', ones, (k, h), dtype),
      'o': self.param('o', out, (n, h, d), dtype),
    }


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, cfg) -> jax.Array:
  """Rotary embedding of the leading `rotary_dim` dims, halves rotated.

  Angle i is position * theta^(-2i / rotary_dim); pairs are (i, i + half),
  not neighbours. The other dims pass through. Angles are float32.
  """
  half = cfg.rotary_dim // 2
  power = jnp.arange(half, dtype=jnp.float32) * 2 / cfg.rotary_dim
  angle_BTR = positions_BT[..., None].astype(jnp.float32) * (
    cfg.rope_theta**-power
  ).reshape(1, 1, half)
  cos_BT1R = jnp.cos(angle_BTR)[:, :, None]
  sin_BT1R = jnp.sin(angle_BTR)[:, :, None]
  x_f32 = x_BTNH.astype(jnp.float32)
  first, second = x_f32[..., :half], x_f32[..., half : 2 * half]
  turned = jnp.concatenate(
    [
      first * cos_BT1R - second * sin_BT1R,
      second * cos_BT1R + first * sin_BT1R,
    ],
    axis=-1,
  ).astype(x_BTNH.dtype)
  return jnp.concatenate([turned, x_BTNH[..., 2 * half :]], axis=-1)


def project(
  cfg: config.ModelConfig,
  weights: Mapping[str, jax.Array],
  x_BTD: jax.Array,
  positions_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries, keys and values: projection, norm over all heads, rotation."""
  # FSDP: all-gather of D * (N + 2K) * H weights before use.
  q_DNH = sharding.place(weights['q'].astype(x_BTD.dtype), None, 'heads', None)
  k_DKH, v_DKH = (
    sharding.place(weights[name].astype(x_BTD.dtype), None, 'kv_heads', None)
    for name in ('k', 'v')
  )
  q_BTNH = sharding.einsum('btd,dnh->btnh', x_BTD, q_DNH, out=HEADS)
  k_BTKH = sharding.einsum('btd,dkh->btkh', x_BTD, k_DKH, out=KV_HEADS)
  v_BTKH = sharding.einsum('btd,dkh->btkh', x_BTD, v_DKH, out=KV_HEADS)
  # One variance a token over every head at once ("per_layer" in config.json).
  q_BTNH = norm.rms_norm(q_BTNH, weights['q_norm'], cfg.norm_eps, (-2, -1))
  k_BTKH = norm.rms_norm(k_BTKH, weights['k_norm'], cfg.norm_eps, (-2, -1))
  return (
    rotate(q_BTNH, positions_BT, cfg),
    rotate(k_BTKH, positions_BT, cfg),
    v_BTKH,
  )


def attend(
  cfg: config.ModelConfig,
  weights: Mapping[str, jax.Array],
  x_BTD: jax.Array,
  positions_BT: jax.Array,
  until_BT: jax.Array,
  cache: kv.KVCache | None,
  layer: jax.Array,
  want_stats: bool,
) -> tuple[jax.Array, kv.KVCache | None, dict[str, jax.Array]]:
  """One attention sub-layer on normalised input.

  Args:
    cfg: model shape.
    weights: what `Attention` declares.
    x_BTD: normalised hidden states.
    positions_BT: int32 positions, for the rotation only.
    until_BT: int32 mask intervals of the tokens of the row, or of the whole
      cache once it is given.
    cache: keys and values so far; `until_BS` already includes the new tokens.
    layer: index of this layer in the cache.
    want_stats: also return the largest score and the mean entropy (nats) of
      each head.

  Returns:
    The sub-layer's output [B, T, D], the cache with this layer written, stats.
  """
  q_BTNH, k_BTKH, v_BTKH = project(cfg, weights, x_BTD, positions_BT)
  offset_B = None
  if cache is not None:
    offset_B = cache.filled_B
    cache = cache.replace(
      k_LBSKH=kv.write_layer(cache.k_LBSKH, k_BTKH, offset_B, layer),
      v_LBSKH=kv.write_layer(cache.v_LBSKH, v_BTKH, offset_B, layer),
    )
    k_BTKH = jax.lax.dynamic_index_in_dim(cache.k_LBSKH, layer, 0, False)
    v_BTKH = jax.lax.dynamic_index_in_dim(cache.v_LBSKH, layer, 0, False)
    until_BT = cache.until_BS
  scale = cfg.head_dim**-0.5
  o_BTNH = _local_attention(q_BTNH, k_BTKH, v_BTKH, until_BT, offset_B, scale)
  o_NHD = sharding.place(weights['o'].astype(x_BTD.dtype), 'heads', None, None)
  # all-reduce over 'tensor': B * T * D.
  y_BTD = sharding.einsum('btnh,nhd->btd', o_BTNH, o_NHD, out=HIDDEN)
  stats = {}
  if want_stats:
    stats = score_stats(q_BTNH, k_BTKH, until_BT, offset_B, scale)
  return y_BTD, cache, stats


def _local_attention(q_BTNH, k_BSKH, v_BSKH, until_BS, offset_B, scale):
  """Attention on each device's own rows, heads and part of the tokens."""
  if offset_B is None:
    specs = (HEADS, KV_HEADS, KV_HEADS, ('batch', 'sequence'))
    operands = (q_BTNH, k_BSKH, v_BSKH, until_BS)
    function = functools.partial(context.attention, scale=scale)
  else:
    specs = (HEADS, CACHED, CACHED, ('batch', None), ('batch',))
    operands = (q_BTNH, k_BSKH, v_BSKH, until_BS, offset_B)

    def function(q_BTNH, k_BSKH, v_BSKH, until_BS, offset_B):
      query_BT = offset_B[:, None] + jnp.arange(q_BTNH.shape[1])[None]
      return pallas_kernels.attention(
        q_BTNH, k_BSKH, v_BSKH, until_BS, query_BT=query_BT, scale=scale
      )

  run = sharding.manual(
    function, [sharding.spec(*axes) for axes in specs], sharding.spec(*HEADS)
  )
  return run(*operands)


def score_stats(q_BTNH, k_BSKH, until_BS, offset_B, scale):
  """Largest score and mean entropy of each head, over visible keys.

  Holds `SCORES` scores of each row and head at a time: for introspection of a
  few rows.
  """
  if offset_B is None:
    specs = (HEADS, KV_HEADS, ('batch', 'sequence'))
    operands = (q_BTNH, k_BSKH, until_BS)
  else:
    specs = (HEADS, CACHED, ('batch', None), ('batch',))
    operands = (q_BTNH, k_BSKH, until_BS, offset_B)
  axes = (*sharding.RULES['batch'], context.AXIS)

  def local(q, k, until, offset=None):
    if offset is None:
      k, until = context.whole(k), context.whole(until)
      offset = jnp.full(len(q), context.first(q.shape[1]))
    largest_N, entropy_N, count = _score_sums(q, k, until, offset, scale)
    if sharding.axis_sizes():
      # The maximum has no derivative across devices; nobody needs one.
      largest_N = jax.lax.pmax(jax.lax.stop_gradient(largest_N), axes)
      entropy_N = jax.lax.psum(entropy_N, axes)
      count = jax.lax.psum(count, axes)
    return largest_N, entropy_N / jnp.maximum(count, 1)

  heads = sharding.spec('heads')
  run = sharding.manual(
    local, [sharding.spec(*axes) for axes in specs], (heads, heads)
  )
  largest_N, entropy_N = run(*operands)
  return {'attn_max_logit_N': largest_N, 'attn_entropy_N': entropy_N}


def _score_sums(q_BTNH, k_BSKH, until_BS, offset_B, scale):
  """Largest score and summed entropy of each head, and queries that see."""
  batch, queries, heads, width = q_BTNH.shape
  size = max(1, min(queries, SCORES // until_BS.shape[1]))
  count = -(-queries // size)
  pad = count * size - queries
  query_BT = offset_B[:, None] + jnp.arange(queries)[None]
  # Padded queries are before all keys: they see none and do not count.
  query_BT = jnp.pad(query_BT, ((0, 0), (0, pad)), constant_values=-1)
  q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))

  def one(xs):
    return _sums_of(*xs, k_BSKH, until_BS, scale)

  largest_CN, entropy_CN, seen_C = jax.lax.map(
    one,
    (
      q_BTNH.reshape(batch, count, size, heads, width).swapaxes(0, 1),
      query_BT.reshape(batch, count, size).swapaxes(0, 1),
    ),
  )
  return largest_CN.max(0), entropy_CN.sum(0), seen_C.sum()


def _sums_of(q_BTNH, query_BT, k_BSKH, until_BS, scale):
  """`_score_sums` of a few queries, all their scores at once."""
  s_BKGTS = ref.scores(q_BTNH, k_BSKH, until_BS, query_BT, scale)
  seen_BKGT = jnp.isfinite(s_BKGTS).any(-1)
  safe_BKGTS = jnp.where(seen_BKGT[..., None], s_BKGTS, 0)
  logp_BKGTS = jax.nn.log_softmax(safe_BKGTS)
  terms_BKGTS = jnp.where(
    jnp.isfinite(logp_BKGTS), jnp.exp(logp_BKGTS) * logp_BKGTS, 0
  )
  entropy_BKGT = -terms_BKGTS.sum(-1) * seen_BKGT
  count = seen_BKGT[:, 0, 0].sum()
  return (
    s_BKGTS.max((0, 3, 4)).reshape(-1),
    entropy_BKGT.sum((0, 3)).reshape(-1),
    count.astype(jnp.float32),
  )
