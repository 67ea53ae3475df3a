"""Attention under the interval mask against the specification."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.attention import blocks, ref, xla
from tests.pallas_kernels import programs

TOLERANCE = 2e-6


def case(seed, batch, queries, keys, heads, kv_heads, width=8):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(batch, queries, heads, width))
  k = rng.normal(size=(batch, keys, kv_heads, width))
  v = rng.normal(size=(batch, keys, kv_heads, width))
  until = np.arange(keys) + rng.integers(0, keys, (batch, keys))
  until[:, -2:] = 0  # padding
  return *(np.float32(x) for x in (q, k, v)), np.int32(until)


class AttentionTest(parameterized.TestCase):
  def assert_close(self, got, want):
    """Outputs, and with less precision their gradients."""
    tolerances = (TOLERANCE, *(10 * TOLERANCE,) * 3)
    for ours, spec, atol in zip(got, want, tolerances, strict=True):
      np.testing.assert_allclose(ours, spec, atol=atol)

  @parameterized.parameters(
    (2, 16, 4, 2), (1, 130, 6, 1), (2, 65, 3, 3), (1, 200, 5, 5)
  )
  def test_equals_specification(self, batch, length, heads, kv_heads):
    q, k, v, until = case(length, batch, length, length, heads, kv_heads)
    query = np.tile(np.arange(length), (batch, 1))
    dy = np.random.default_rng(1).normal(size=q.shape)
    ours = functools.partial(pallas_kernels.attention, scale=0.3)
    got = programs.with_gradients(ours, (q, k, v), dy, until)
    spec = functools.partial(ref.attention, scale=0.3)
    want = programs.with_gradients(spec, (q, k, v), dy, until, query)
    self.assert_close(got, want)

  def test_offset_sees_the_cache(self):
    q, k, v, until = case(0, 3, 1, 40, 4, 2)
    until = np.full_like(until, 1 << 30)
    offset = np.array([0, 7, 39])
    ours = jax.jit(functools.partial(pallas_kernels.attention, scale=0.3))
    got = np.asarray(ours(q, k, v, until, query_BT=offset[:, None]))
    spec = jax.jit(functools.partial(ref.attention, scale=0.3))
    for row, last in enumerate(offset):
      alone = slice(row, row + 1)
      want = spec(
        q[alone],
        k[alone, : last + 1],
        v[alone, : last + 1],
        until[alone, : last + 1],
        np.array([[last]]),
      )
      np.testing.assert_allclose(got[alone], want, atol=TOLERANCE)

  @parameterized.parameters((150, None), (40, (0, 117)))
  def test_long_rows_go_block_by_block(self, queries, offset):
    rows, keys = (1, queries) if offset is None else (2, 200)
    q, k, v, until = case(0, rows, queries, keys, 4, 2)
    until[:, 70:90] = until[:, 70:90].min(1, keepdims=True)
    query = np.array(offset or [0])[:, None] + np.arange(queries)
    dy = np.random.default_rng(1).normal(size=q.shape)

    def ours(q, k, v, until, query):
      given = None if offset is None else query
      return pallas_kernels.attention(q, k, v, until, query_BT=given, scale=0.3)

    with (
      mock.patch.object(xla, 'UNROLLED', 32),
      mock.patch.object(blocks, 'BLOCK', 32),
    ):
      got = programs.with_gradients(ours, (q, k, v), dy, until, query)
    spec = functools.partial(ref.attention, scale=0.3)
    want = programs.with_gradients(spec, (q, k, v), dy, until, query)
    self.assert_close(got, want)

  def test_blocks_that_no_query_sees_are_not_visited(self):
    # A trunk of 8 and branches of 8 and 16; then 8 of padding: blocks of 4.
    until = np.repeat([32, 16, 32, 0], [8, 8, 16, 8])
    query = np.arange(40)
    with mock.patch.object(blocks, 'BLOCK', 4):
      order, count = jax.jit(blocks._visits)(
        until.reshape(10, 1, 4), query.reshape(10, 1, 4)
      )
    visited = [row[:n].tolist() for row, n in zip(np.asarray(order), count)]
    self.assertEqual(
      visited,
      [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
      + [[0, 1, *range(4, last + 1)] for last in range(4, 8)]
      + [[], []],
    )

  def test_who_keeps_the_output_runs_the_forward_loop_once(self):
    q, k, v, until = case(0, 1, 16, 16, 2, 1)

    def loops(*kept):
      policy = jax.checkpoint_policies.save_only_these_names(*kept)

      @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
      def layer(x, _):
        return x + pallas_kernels.attention(x, k, v, until, scale=0.3), None

      def total(x):
        return jax.lax.scan(layer, x, None, length=2)[0].sum()

      text = jax.jit(jax.grad(total)).lower(q).compile().as_text()
      return len(re.findall(r' while\(', text))

    with (
      mock.patch.object(xla, 'UNROLLED', 0),
      mock.patch.object(blocks, 'BLOCK', 8),
    ):
      self.assertLess(loops(xla.NAME), loops('nothing'))

  def test_a_query_that_sees_nothing_is_zero_and_finite(self):
    q, k, v, until = case(0, 1, 12, 12, 2, 1)

    def total(q):
      y = pallas_kernels.attention(q, k, v, jnp.zeros_like(until), scale=0.3)
      return y.sum(), y

    grad, y = jax.jit(jax.grad(total, has_aux=True))(q)
    self.assertEqual(np.abs(y).max(), 0)
    self.assertTrue(np.isfinite(grad).all())

  def test_misfits_are_named(self):
    q, k, until = np.ones((2, 3, 4, 8)), np.ones((2, 5, 2, 8)), np.ones((2, 5))
    for args in (q, k[:1], k[:1], until[:1]), (q, k, k, until[:1]), (
      q, k[..., :4], k[..., :4], until,
    ), (q, k, k[:, :4], until):  # fmt: skip
      with self.assertRaisesRegex(ValueError, 'do not match'):
        pallas_kernels.attention(*args, scale=1.0)
    with self.assertRaisesRegex(ValueError, 'query .2, 2. do not match'):
      pallas_kernels.attention(
        q, k, k, until, query_BT=np.ones((2, 2)), scale=1.0
      )

  def test_heads_must_group(self):
    q, k, v, until = case(0, 1, 4, 4, 3, 2)
    with self.assertRaisesRegex(ValueError, '3 query heads'):
      pallas_kernels.attention(q, k, v, until, scale=1.0)


if __name__ == '__main__':
  absltest.main()
