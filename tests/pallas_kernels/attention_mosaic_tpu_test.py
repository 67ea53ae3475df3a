"""Attention's TPU kernels, interpreted, against the specification."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import tiles_tpu
from pallas_kernels.attention import mosaic_tpu, ref, xla
from tests.pallas_kernels import programs

TOLERANCE = {'float32': 5e-6, 'bfloat16': 2e-2}  # of the largest value
WIDTH = 128


def small(queries=128, keys=256):
  """Blocks of which even a short row has several."""
  return mock.patch.multiple(mosaic_tpu, QUERIES=queries, KEYS=keys)


def masks(law, batch, keys):
  """Where each key is seen until."""
  rng = np.random.default_rng([batch, keys])
  index = np.arange(keys)
  if law == 'causal':
    until = np.full(keys, keys)
  elif law == 'documents':
    borders = np.sort(rng.choice(index[1:], 3, replace=False))
    until = np.append(borders, keys)[np.searchsorted(borders, index, 'right')]
  elif law == 'branches':  # of one trunk, a third each
    third = keys // 3
    until = np.where(index < third, keys, third * (index // third + 1))
  else:  # a key may be seen until anywhere
    until = index + rng.integers(0, keys, keys)
  until = np.tile(np.int32(until), (batch, 1))
  until[:, -2:] = 0  # padding
  if batch > 1:
    until[-1] = 0  # a row of nothing else
  return until


def case(shape, law, dtype):
  batch, queries, keys, heads, kv_heads = shape
  rng = np.random.default_rng(queries + keys)
  q, k, v, dy = (
    jnp.asarray(rng.standard_normal((batch, rows, n, WIDTH)), dtype)
    for rows, n in (
      (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads),
    )
  )  # fmt: skip
  return (q, k, v), dy, masks(law, batch, keys)


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters(
    ((2, 300, 300, 4, 2), 'documents', 'float32'),
    ((1, 384, 384, 3, 1), 'branches', 'bfloat16'),
  )
  def test_equals_specification(self, *args):
    self.check(*args)

  @parameterized.parameters(
    ((2, 300, 300, 4, 2), 'anywhere', 'float32'),
    ((1, 512, 512, 2, 2), 'causal', 'float32'),
    ((2, 384, 384, 6, 1), 'documents', 'bfloat16'),
    ((1, 128, 128, 2, 1), 'branches', 'float32'),
    ((1, 700, 700, 2, 1), 'branches', 'bfloat16'),
  )
  @pytest.mark.heavy
  def test_others_equal_specification(self, *args):
    self.check(*args)

  def test_queries_lie_anywhere_among_the_keys(self):
    """As in a cache, and in a part of a row that is cut over devices."""
    first = np.int32([[0], [171]]) + np.arange(70)
    second = np.int32([[70], [240]]) + np.arange(60)
    query = np.concatenate([first, second], axis=1).astype(np.int32)
    self.check((2, 130, 300, 2, 1), 'anywhere', 'float32', query)

  def check(self, shape, law, dtype, query=None):
    operands, dy, until = case(shape, law, dtype)

    def ours(q, k, v):
      return pallas_kernels.attention(
        q, k, v, until, query_BT=query, scale=0.1, impl='mosaic_tpu'
      )

    if query is None:
      own = np.tile(np.arange(shape[1]), (shape[0], 1))
    else:
      own = query
    with small():
      got = programs.with_gradients(ours, operands, dy)
    spec = functools.partial(ref.attention, scale=0.1)
    exact = [z.astype(jnp.float32) for z in operands]
    with jax.default_matmul_precision('highest'):
      want = programs.with_gradients(
        spec, exact, dy.astype(jnp.float32), until, own
      )
    for name, ours, other in zip(('y', 'dq', 'dk', 'dv'), got, want):
      self.assertEqual(ours.dtype, jnp.dtype(dtype), name)
      size = np.abs(other).max()
      np.testing.assert_allclose(
        np.float32(ours) / size,
        other / size,
        atol=TOLERANCE[dtype],
        err_msg=name,
      )

  @parameterized.parameters('causal', 'documents', 'branches', 'anywhere')
  def test_lists_the_pairs_that_see_each_other(self, law):
    batch, length, p, w = 2, 1024, 128, 256
    until = masks(law, batch, length)
    query = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    with small(p, w):
      layout = mosaic_tpu._layout(None, batch, length, length, True)
    index = np.arange(length)
    seen = (index[None] <= index[:, None]) & (index[:, None] < until[:, None])
    rows, columns = length // p, length // w
    exact = seen.reshape(batch, rows, p, columns, w).any((2, 4))
    for by_key in (False, True):
      run = functools.partial(mosaic_tpu._pairs, layout=layout, by_key=by_key)
      table, count = jax.jit(run)(until, query)
      self.assertEqual(int(table[int(count)]), exact.size)
      self.assertLessEqual(int(count), layout.most)
      listed = np.asarray(table)[: int(count)]
      self.assertTrue((np.diff(listed) > 0).all())
      found = np.zeros(exact.size, bool)
      found[listed] = True
      found = found.reshape((batch, columns, rows) if by_key else exact.shape)
      found = found.swapaxes(1, 2) if by_key else found
      # All that is seen, and every block of results; of a plain mask no more.
      self.assertFalse((exact & ~found).any())
      self.assertTrue(found.any(1 if by_key else 2).all())
      if law == 'causal':
        np.testing.assert_array_equal(found[0], exact[0])

  def test_who_keeps_the_output_runs_the_forward_kernel_once(self):
    (q, k, v), _, until = case((1, 256, 256, 2, 1), 'causal', 'float32')

    def kernels(*kept):
      policy = jax.checkpoint_policies.save_only_these_names(*kept)

      @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
      def layer(x):
        return pallas_kernels.attention(
          x, k, v, until, scale=0.3, impl='mosaic_tpu'
        )

      def total(x):
        return jax.lax.scan(lambda x, _: (layer(x), None), x, length=2)[0].sum()

      text = jax.jit(jax.grad(total)).lower(q).compile().as_text()
      return len(re.findall(r' while\(', text))  # of the interpreter

    with small(128, 128):
      self.assertLess(kernels(xla.NAME), kernels('nothing'))

  def test_under_vmap_and_the_highest_precision(self):
    (q, k, v), _, until = case((2, 256, 256, 2, 1), 'causal', 'bfloat16')

    def run(impl, q):
      return pallas_kernels.attention(q, k, v, until, scale=0.3, impl=impl)

    both = jnp.stack([q, 2 * q])
    with small(128, 128), jax.default_matmul_precision('highest'):
      got, want = (
        jax.jit(jax.vmap(functools.partial(run, impl)))(both)
        for impl in ('mosaic_tpu', 'xla')
      )
    np.testing.assert_allclose(
      np.float32(got), np.float32(want), atol=TOLERANCE['bfloat16']
    )

  def test_keeps_the_axes_over_which_rows_differ(self):
    (q, k, v), _, until = case((2, 128, 128, 2, 1), 'causal', 'float32')
    rows = jax.P('data')

    def local(q, k, v, until):
      run = functools.partial(
        pallas_kernels.attention, scale=0.3, impl='mosaic_tpu'
      )
      y, pull = jax.vjp(lambda *z: run(*z, until), q, k, v)
      found = y, *pull(y)
      for z in found:
        self.assertEqual(jax.typeof(z).mat.varying, {'data'})
      return found

    with jax.set_mesh(jax.make_mesh((2,), ('data',))):
      operands = jax.device_put((q, k, v, jnp.asarray(until)), rows)
      found = jax.eval_shape(
        jax.shard_map(local, out_specs=(rows,) * 4), *operands
      )
    shapes = [z.shape for z in (q, q, k, v)]
    self.assertEqual([z.shape for z in found], shapes)

  def test_refuses_what_it_cannot_do(self):
    refusal = functools.partial(mosaic_tpu.refusal, causal=True)
    rows, bf16 = (1, 512, 512), {jnp.dtype('bfloat16')}
    mixed = bf16 | {jnp.dtype('float32')}
    self.assertIsNone(refusal(bf16, 128, rows))
    self.assertIn('not float16', refusal({jnp.dtype('float16')}, 128, rows))
    self.assertIn('not bfloat16, float32', refusal(mixed, 128, rows))
    self.assertIn('multiples of 128, not 64', refusal(bf16, 64, rows))
    self.assertIn('128 queries', refusal(bf16, 128, (8, 1, 512)))
    self.assertIn('pairs of blocks', refusal(bf16, 128, (64, 1 << 18, 1 << 18)))
    with mock.patch.object(tiles_tpu, 'here', lambda: None):
      self.assertIn('interprets on CPUs', refusal(bf16, 128, rows))


if __name__ == '__main__':
  absltest.main()
