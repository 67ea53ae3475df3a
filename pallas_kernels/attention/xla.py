"""Attention in plain XLA: short rows at once, long rows block by block.

Scores of a short row's block of queries stay in cache, and keys after the
block's last query are skipped where the layout says so; on a CPU both together
are worth 8 times.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import blocks

SMALL_BLOCK = 64  # queries per block of a short row
UNROLLED = 1024  # longest row whose blocks are unrolled
# What rematerialisation policies call the output.
NAME = 'attn_out'


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  until_BS: jax.Array,
  query_BT: jax.Array,
  *,
  scale: float,
  causal: bool,
) -> jax.Array:
  """See `pallas_kernels.attention.api.attention`.

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    until_BS: first index that can no longer see each key.
    query_BT: index of each query.
    scale: multiplies the scores.
    causal: query t has index t, so later keys can be skipped.
  """
  queries, keys = q_BTNH.shape[1], k_BSKH.shape[1]
  q_BKGTH, k_BKSH, v_BKSH = by_head(q_BTNH, k_BSKH, v_BSKH, scale)
  if queries <= UNROLLED and queries * keys <= UNROLLED**2:
    k_BKHS = k_BKSH.swapaxes(2, 3)
    o_BKGTH = _unrolled(q_BKGTH, k_BKHS, v_BKSH, until_BS, query_BT, causal)
    o_BKGTH = checkpoint_name(o_BKGTH, NAME)
  else:
    o_BKGTH = blocks.attention(
      q_BKGTH, k_BKSH, v_BKSH, until_BS, query_BT, NAME
    )
  return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def by_head(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, scale: float
) -> tuple[jax.Array, ...]:
  """Scaled q_BKGTH, k_BKSH and v_BKSH."""
  batch, queries, heads, width = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  shape = (batch, queries, kv_heads, heads // kv_heads, width)
  q_BKGTH = (q_BTNH * scale).reshape(shape).transpose(0, 2, 3, 1, 4)
  return q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)


def _unrolled(q_BKGTH, k_BKHS, v_BKSH, until_BS, query_BT, causal):
  queries = q_BKGTH.shape[3]
  outputs = []
  for start in range(0, queries, SMALL_BLOCK):
    stop = min(start + SMALL_BLOCK, queries)
    keys = stop if causal else k_BKHS.shape[3]
    outputs.append(
      _block(
        q_BKGTH[:, :, :, start:stop],
        k_BKHS[..., :keys],
        v_BKSH[:, :, :keys],
        until_BS[:, :keys],
        query_BT[:, start:stop],
      )
    )
  return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)


def _block(q_BKGTH, k_BKHS, v_BKSH, until_BS, query_BT):
  """Softmax attention of some queries to some keys, float32 inside."""
  s_BKGTS = jnp.einsum(
    'bkgth,bkhs->bkgts', q_BKGTH, k_BKHS, preferred_element_type=jnp.float32
  )
  key_11S = jnp.arange(until_BS.shape[1])[None, None]
  query_BT1 = query_BT[:, :, None]
  seen_BTS = (key_11S <= query_BT1) & (query_BT1 < until_BS[:, None])
  s_BKGTS += jnp.where(seen_BTS, 0.0, blocks.HIDDEN)[:, None, None]
  # Above HIDDEN, so that a query that sees no key (padding) gets zeros.
  top_BKGT1 = jnp.maximum(s_BKGTS.max(-1, keepdims=True), blocks.HIDDEN / 2)
  p_BKGTS = jnp.exp(s_BKGTS - jax.lax.stop_gradient(top_BKGT1))
  # At least 1 wherever a key is seen.
  total_BKGT1 = jnp.maximum(p_BKGTS.sum(-1, keepdims=True), 0.5)
  o_BKGTH = jnp.einsum(
    'bkgts,bksh->bkgth',
    p_BKGTS.astype(v_BKSH.dtype),
    v_BKSH,
    preferred_element_type=jnp.float32,
  )
  return (o_BKGTH / total_BKGT1).astype(q_BKGTH.dtype)
