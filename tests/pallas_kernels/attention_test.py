"""Attention under the interval mask against the specification."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.attention import ref, xla

TOLERANCE = 2e-6


def case(seed, batch, queries, keys, heads, kv_heads, width=8):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(batch, queries, heads, width))
  k = rng.normal(size=(batch, keys, kv_heads, width))
  v = rng.normal(size=(batch, keys, kv_heads, width))
  until = np.arange(keys) + rng.integers(0, keys, (batch, keys))
  until[:, -2:] = 0  # padding
  return (*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(until))


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters(
    (2, 16, 4, 2), (1, 130, 6, 1), (2, 65, 3, 3), (1, 200, 5, 5)
  )
  def test_equals_specification(self, batch, length, heads, kv_heads):
    q, k, v, until = case(length, batch, length, length, heads, kv_heads)
    query = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))

    def ours(q, k, v):
      return pallas_kernels.attention(q, k, v, until, scale=0.3)

    def spec(q, k, v):
      return ref.attention(q, k, v, until, query, scale=0.3)

    dy = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), q.dtype)
    got, pull = jax.vjp(ours, q, k, v)
    want, want_pull = jax.vjp(spec, q, k, v)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    for ours_d, spec_d in zip(pull(dy), want_pull(dy)):
      np.testing.assert_allclose(ours_d, spec_d, atol=10 * TOLERANCE)

  def test_offset_sees_the_cache(self):
    q, k, v, until = case(0, 3, 1, 40, 4, 2)
    until = jnp.full_like(until, 1 << 30)
    offset = jnp.array([0, 7, 39])
    got = pallas_kernels.attention(q, k, v, until, offset_B=offset, scale=0.3)
    for row, last in enumerate(offset):
      alone = slice(row, row + 1)
      want = ref.attention(
        q[alone],
        k[alone, : last + 1],
        v[alone, : last + 1],
        until[alone, : last + 1],
        jnp.array([[last]]),
        scale=0.3,
      )
      np.testing.assert_allclose(got[alone], want, atol=TOLERANCE)

  def test_long_rows_take_the_loop(self):
    q, k, v, until = case(0, 1, 150, 150, 2, 1)
    want = pallas_kernels.attention(q, k, v, until, scale=0.3)
    with (
      mock.patch.object(xla, 'UNROLLED', 64),
      mock.patch.object(xla, 'LARGE_BLOCK', 64),
    ):
      got = pallas_kernels.attention(q, k, v, until, scale=0.3)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)

  def test_a_query_that_sees_nothing_is_zero_and_finite(self):
    q, k, v, until = case(0, 1, 12, 12, 2, 1)

    def total(q):
      y = pallas_kernels.attention(q, k, v, jnp.zeros_like(until), scale=0.3)
      return y.sum(), y

    grad, y = jax.grad(total, has_aux=True)(q)
    self.assertEqual(np.abs(y).max(), 0)
    self.assertTrue(np.isfinite(grad).all())

  def test_heads_must_group(self):
    q, k, v, until = case(0, 1, 4, 4, 3, 2)
    with self.assertRaisesRegex(ValueError, '3 query heads'):
      pallas_kernels.attention(q, k, v, until, scale=1.0)


if __name__ == '__main__':
  absltest.main()
