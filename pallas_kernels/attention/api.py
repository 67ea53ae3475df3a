"""Grouped-query attention under the interval mask."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import xla

BACKENDS = {'xla': xla.attention}


def attention(
  q_BTNH: Float[Array, 'B T N H'],
  k_BSKH: Float[Array, 'B S K H'],
  v_BSKH: Float[Array, 'B S K H'],
  until_BS: Int[Array, 'B S'],
  *,
  offset_B: Int[Array, 'B'] | None = None,
  scale: float,
  impl: dispatch.Impl | None = None,
) -> Float[Array, 'B T N H']:
  """Softmax attention; key j is visible to query i iff j <= i < until[j].

  Causal masks, packed documents, padding (until 0) and prefix trees in
  depth-first order are all values of `until`. Scores and softmax are float32.

  Args:
    q_BTNH: queries; query t of row b has index offset_B[b] + t.
    k_BSKH: keys, index = position in the row; query head n uses key head
      n // (N / K).
    v_BSKH: values.
    until_BS: first index that can no longer see each key.
    offset_B: index of the first query; None = 0.
    scale: multiplies the scores.
    impl: backend; None picks the best for this platform.

  Raises:
    ValueError: N is not a multiple of K.
  """
  queries, heads = q_BTNH.shape[1:3]
  if heads % k_BSKH.shape[2]:
    raise ValueError(
      f'{heads} query heads are not a multiple of {k_BSKH.shape[2]} key heads'
    )
  query_BT = jnp.arange(queries)[None, :]
  if offset_B is not None:
    query_BT = query_BT + offset_B[:, None]
  query_BT = jnp.broadcast_to(query_BT, q_BTNH.shape[:2])
  run = dispatch.pick('attention', impl, BACKENDS)
  return run(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    until_BS,
    query_BT,
    scale=scale,
    causal=offset_B is None,
  )
