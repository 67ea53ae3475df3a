"""Grouped-query attention under the interval mask."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import mosaic_tpu, xla

BACKENDS = {'mosaic_tpu': mosaic_tpu.attention, 'xla': xla.attention}


def attention(
  q_BTNH: Float[Array, 'B T N H'],
  k_BSKH: Float[Array, 'B S K H'],
  v_BSKH: Float[Array, 'B S K H'],
  until_BS: Int[Array, 'B S'],
  *,
  query_BT: Int[Array, 'B T'] | None = None,
  scale: float,
  impl: dispatch.Impl | None = None,
) -> Float[Array, 'B T N H']:
  """Softmax attention; key j is visible to query i iff j <= i < until[j].

  Causal masks, packed documents, padding (until 0) and prefix trees in
  depth-first order are all values of `until`. Scores and softmax are float32.

  Args:
    q_BTNH: queries.
    k_BSKH: keys, index = position in the row; query head n uses key head
      n // (N / K).
    v_BSKH: values.
    until_BS: first index that can no longer see each key.
    query_BT: index of each query in the row of keys; None = 0, 1, ...
    scale: multiplies the scores.
    impl: backend; None picks the best for this platform.

  Raises:
    ValueError: shapes that do not match, or N is not a multiple of K.
    NotImplementedError: a backend forced by name that cannot do this, or a
      second derivative, which kernels do not have; XLA does (of rows past
      1,024 forward over reverse alone).
  """
  q_BTNH, k_BSKH, v_BSKH, until_BS = map(
    jnp.asarray, (q_BTNH, k_BSKH, v_BSKH, until_BS)
  )
  batch, queries, heads, _ = q_BTNH.shape
  keys = k_BSKH.shape[:2]
  query = (batch, queries) if query_BT is None else query_BT.shape
  if (
    keys[0] != batch
    or k_BSKH.shape != (*v_BSKH.shape[:3], q_BTNH.shape[3])
    or until_BS.shape != keys
    or query != (batch, queries)
  ):
    raise ValueError(
      f'q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}, until '
      f'{until_BS.shape} and query {query} do not match: expected '
      '[B, T, N, H], [B, S, K, H] twice, [B, S] and [B, T]'
    )
  if not q_BTNH.size or not k_BSKH.size:
    return jnp.zeros_like(q_BTNH)
  if heads % k_BSKH.shape[2]:
    raise ValueError(
      f'{heads} query heads are not a multiple of {k_BSKH.shape[2]} key heads'
    )
  causal = query_BT is None
  if causal:
    query_BT = jnp.broadcast_to(jnp.arange(queries)[None], q_BTNH.shape[:2])
  rows = batch, queries, keys[1]
  refusals = {
    'mosaic_tpu': mosaic_tpu.refusal(
      {z.dtype for z in (q_BTNH, k_BSKH, v_BSKH)},
      q_BTNH.shape[3],
      rows,
      causal,
    )
  }
  run = dispatch.pick('attention', impl, BACKENDS, refusals)
  return run(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    until_BS,
    query_BT,
    scale=scale,
    causal=causal,
  )
