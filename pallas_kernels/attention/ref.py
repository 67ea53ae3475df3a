"""Attention under an interval mask: the specification."""

import jax
import jax.numpy as jnp


def visible(until_BS: jax.Array, query_BT: jax.Array) -> jax.Array:
  """bool[B, T, S]: key j is visible to query i iff j <= i < until[j]."""
  key_11S = jnp.arange(until_BS.shape[1])[None, None]
  query_BT1 = query_BT[:, :, None]
  return (key_11S <= query_BT1) & (query_BT1 < until_BS[:, None, :])


def scores(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  until_BS: jax.Array,
  query_BT: jax.Array,
  scale: float,
) -> jax.Array:
  """float32[B, K, N / K, T, S] masked scores; hidden keys are -inf."""
  batch, queries, heads, width = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(batch, queries, kv_heads, heads // kv_heads, width)
  s_BKGTS = jnp.einsum(
    'btkgh,bskh->bkgts',
    q_BTKGH,
    k_BSKH,
    preferred_element_type=jnp.float32,
  )
  mask_BTS = visible(until_BS, query_BT)[:, None, None]
  return jnp.where(mask_BTS, s_BKGTS * scale, -jnp.inf)


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  until_BS: jax.Array,
  query_BT: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """See `pallas_kernels.attention.api.attention`."""
  s_BKGTS = scores(q_BTNH, k_BSKH, until_BS, query_BT, scale)
  top_BKGT1 = s_BKGTS.max(-1, keepdims=True)
  top_BKGT1 = jax.lax.stop_gradient(
    jnp.where(jnp.isinf(top_BKGT1), 0, top_BKGT1)
  )
  p_BKGTS = jnp.exp(s_BKGTS - top_BKGT1)
  # A query that sees no key (padding) gets zeros, not NaN.
  # At least 1 wherever a key is seen.
  total_BKGT1 = jnp.maximum(p_BKGTS.sum(-1, keepdims=True), 0.5)
  p_BKGTS = (p_BKGTS / total_BKGT1).astype(v_BSKH.dtype)
  o_BTKGH = jnp.einsum(
    'bkgts,bskh->btkgh',
    p_BKGTS,
    v_BSKH,
    preferred_element_type=jnp.float32,
  )
  return o_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
