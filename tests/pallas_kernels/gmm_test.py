"""Grouped products against the specification, any skew, both derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.gmm import api, ref, xla
from tests.pallas_kernels import programs

FP32_TOLERANCE = 1e-5  # relative to the largest value
BF16_TOLERANCE = 1e-2


def case(seed, sizes, rows, width=12, out=7, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  x_MK, w_GKN, dy_MN = (
    rng.standard_normal(shape).astype(dtype)
    for shape in ((rows, width), (len(sizes), width, out), (rows, out))
  )
  return x_MK, w_GKN, np.asarray(sizes, np.int32), dy_MN


def assert_close(test, got, want, tolerance):
  got, want = np.float64(got), np.float64(want)
  test.assertTrue(np.isfinite(got).all())
  scale = max(np.abs(want).max(), 1e-6)
  test.assertLess(np.abs(got - want).max() / scale, tolerance)


class GroupedMatmulTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('even', [8, 8, 8, 8], 1, 32),
    ('zero_and_one', [0, 1, 17, 0], 1, 18),
    ('all_on_one', [0, 0, 40, 0], 1, 40),
    ('rows_of_no_group', [3, 5, 2], 1, 29),
    ('nothing', [0, 0, 0], 1, 5),
    ('aligned_8', [3, 0, 9, 1], 8, 48),
    ('aligned_16', [16, 1, 0, 20], 16, 96),
    ('aligned_but_for_the_last_rows', [5], 8, 12),
    ('many_groups', [1, 0, 2, 3] * 16, 1, 100),
  )
  def test_equals_specification(self, sizes, align, rows):
    ours = functools.partial(pallas_kernels.grouped_matmul, align=align)
    spec = functools.partial(
      ref.grouped_matmul, align=align, out_dtype=jnp.float32
    )
    for dtype, tolerance in (
      (jnp.float32, FP32_TOLERANCE),
      (jnp.bfloat16, BF16_TOLERANCE),
    ):
      x_MK, w_GKN, sizes_G, dy_MN = case(rows, sizes, rows, dtype=dtype)
      got = programs.with_gradients(ours, (x_MK, w_GKN), dy_MN, sizes_G)
      self.assertEqual(got[0].dtype, dtype)
      x_MK, w_GKN, dy_MN = (z.astype(np.float32) for z in (x_MK, w_GKN, dy_MN))
      want = programs.with_gradients(spec, (x_MK, w_GKN), dy_MN, sizes_G)
      # The gradient only flows through rows that belong to a group.
      for found, wanted in zip(got, want, strict=True):
        assert_close(self, found, wanted, tolerance)

  def test_random_skews(self):
    rng = np.random.default_rng(0)
    ours = jax.jit(pallas_kernels.grouped_matmul)
    spec = jax.jit(functools.partial(ref.grouped_matmul, out_dtype='float32'))
    for seed in range(20):
      groups = int(rng.integers(1, 9))
      sizes = rng.multinomial(50, rng.dirichlet([0.2] * groups))
      *args, _ = case(seed, sizes, 53)
      assert_close(self, ours(*args), spec(*args), FP32_TOLERANCE)

  def test_work_is_that_of_the_rows(self):
    x_MK, w_GKN, sizes_G, _ = case(0, [64] * 16, 1024, 64, 64)
    cost = (
      jax.jit(pallas_kernels.grouped_matmul)
      .lower(x_MK, w_GKN, sizes_G)
      .compile()
      .cost_analysis()
    )
    useful = 2 * 1024 * 64 * 64
    self.assertLess(cost['flops'], 2 * useful)  # dense would be 16 times

  def test_bad_input_is_named(self):
    x_MK, w_GKN, sizes_G, _ = case(0, [2, 2], 4)
    with self.assertRaisesRegex(ValueError, 'do not contract'):
      pallas_kernels.grouped_matmul(x_MK[:, :3], w_GKN, sizes_G)
    with self.assertRaisesRegex(ValueError, 'one entry for each'):
      pallas_kernels.grouped_matmul(x_MK, w_GKN, sizes_G[:1])
    with self.assertRaisesRegex(ValueError, 'align=0 must be positive'):
      pallas_kernels.grouped_matmul(x_MK, w_GKN, sizes_G, align=0)
    with self.assertRaisesRegex(ValueError, 'groups=0 and align=1 must'):
      pallas_kernels.grouped_matmul(x_MK, w_GKN[:0], sizes_G[:0])
    with self.assertRaisesRegex(ValueError, 'align=-8 must be positive'):
      api.weight_gradient(x_MK, x_MK, sizes_G, align=-8)
    with self.assertRaisesRegex(ValueError, 'bfloat16'):
      pallas_kernels.grouped_matmul(x_MK.astype(jnp.bfloat16), w_GKN, sizes_G)
    with self.assertRaisesRegex(NotImplementedError, 'mosaic_tpu'):
      pallas_kernels.grouped_matmul(x_MK, w_GKN, sizes_G, impl='mosaic_tpu')
    with self.assertRaisesRegex(NotImplementedError, 'deprecated'):
      pallas_kernels.grouped_matmul(x_MK, w_GKN, sizes_G, impl='triton')

  def test_weight_gradient_in_float32(self):
    x_MK, w_GKN, sizes_G, dy_MN = case(3, [4, 0, 6], 13, dtype=jnp.bfloat16)
    ours = functools.partial(api.weight_gradient, out_dtype=jnp.float32)
    dw_GKN = jax.jit(ours)(x_MK, dy_MN, sizes_G)
    spec = functools.partial(ref.grouped_matmul, out_dtype=jnp.float32)
    f32 = x_MK.astype(np.float32), w_GKN.astype(np.float32)
    *_, want_GKN = programs.with_gradients(spec, f32, dy_MN, sizes_G)
    assert_close(self, dw_GKN, want_GKN, FP32_TOLERANCE)
    from_numpy = ours(x_MK, dy_MN, sizes_G)
    assert_close(self, from_numpy, want_GKN, FP32_TOLERANCE)
    with self.assertRaisesRegex(ValueError, 'do not contract'):
      api.weight_gradient(x_MK, dy_MN[:5], sizes_G)

  def test_block_grows_with_group(self):
    self.assertEqual(xla.block_rows(8, 16), 8)
    self.assertEqual(xla.block_rows(1 << 20, 2), xla.MAX_BLOCK)


if __name__ == '__main__':
  absltest.main()
