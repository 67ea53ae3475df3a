"""The public expert layer: specification, backends by name, bad arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.experts import ref
from pallas_kernels.gmm import api as gmm
from tests.pallas_kernels import row_cases

FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 1e-2  # in norm: bfloat16 results of bfloat16 values
TOKENS, EXPERTS, TOP_K = 37, 5, 3


def operands(dim, hidden, dtype):
  """A routing with an expert that has nothing, and a choice of no expert."""
  rng = np.random.default_rng(dim)
  index_MX = rng.choice([0, 1, 2, 4, EXPERTS, -1], (TOKENS, TOP_K))
  weight_MX = np.float32(rng.uniform(size=index_MX.shape))

  def normal(shape, scale=1.0):
    return jnp.asarray(rng.standard_normal(shape) * scale, dtype)

  wide, tall = (EXPERTS, dim, hidden), (EXPERTS, hidden, dim)
  matrices = (normal(shape, 1 / 8) for shape in (wide, wide, tall))
  return normal((TOKENS, dim)), index_MX, weight_MX, *matrices


class ExpertsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('xla', 24, 40, 'float32', FP32_TOLERANCE),
    ('xla', 128, 128, 'bfloat16', BF16_TOLERANCE),
  )
  def test_is_the_specification(self, *case):
    self.check(*case)

  @pytest.mark.heavy
  def test_an_interpreted_kernel_is_too(self):
    self.check('mosaic_tpu', 256, 256, 'bfloat16', BF16_TOLERANCE)

  def check(self, impl, dim, hidden, dtype, tolerance):
    args = operands(dim, hidden, dtype)
    layer = functools.partial(pallas_kernels.experts, impl=impl)
    with jax.default_matmul_precision('highest'):
      got = row_cases.layer_with_gradients(layer, *args)
      want = row_cases.layer_with_gradients(ref.experts, *args)
    names = 'y', 'x', 'weight', 'wi_0', 'wi_1', 'wo'
    for name, ours, spec in zip(names, got, want, strict=True):
      row_cases.assert_close(self, ours, spec, tolerance, name)
    turned = [np.asarray(w).swapaxes(1, 2) for w in args[3:]]
    layer = jax.jit(functools.partial(layer, transposed=True))
    y = layer(*args[:3], *turned)
    np.testing.assert_array_equal(np.float32(y), np.float32(got[0]))

  def test_small_integers_and_numpy_arrays_do(self):
    rng = np.random.default_rng(0)
    wide, tall = ((256, 8, 16), (256, 16, 8))
    matrices = [np.float32(rng.normal(size=z)) for z in (wide, wide, tall)]
    x_MD = np.float32(rng.normal(size=(5, 8)))
    index_MX = rng.integers(0, 256, (5, 2)).astype(np.uint8)
    weight_MX = np.float32(rng.uniform(size=(5, 2)))
    want = ref.experts(x_MD, np.int32(index_MX), weight_MX, *matrices)
    for layer in (pallas_kernels.experts, pallas_kernels.decode_experts):
      got = layer(x_MD, index_MX, weight_MX, *matrices)
      row_cases.assert_close(self, got, want, FP32_TOLERANCE, layer.__name__)
    moved = pallas_kernels.permute(x_MD, index_MX, 256)
    self.assertEqual(int(moved.sizes_G.sum()), index_MX.size)
    back = pallas_kernels.unpermute(np.asarray(moved.x_PD), moved, weight_MX)
    spec = x_MD * weight_MX.sum(1, keepdims=True)
    np.testing.assert_allclose(back, spec, rtol=1e-5)
    product = pallas_kernels.grouped_matmul(
      np.asarray(moved.x_PD), matrices[0], np.asarray(moved.sizes_G)
    )
    self.assertEqual(product.shape, (10, 16))

  def test_split_experts_are_not_transposed(self):
    x, index, weight, *matrices = operands(24, 40, 'float32')
    turned = [np.asarray(w).swapaxes(1, 2) for w in matrices]
    with self.assertRaisesRegex(ValueError, "axis='expert'"):
      pallas_kernels.experts(
        x, index, weight, *turned, transposed=True, axis='expert'
      )

  def test_without_a_choice_here_nothing_comes_out(self):
    x, index, *rest = operands(128, 128, 'float32')
    layer = jax.jit(pallas_kernels.experts)
    y = layer(x, np.full_like(index, EXPERTS), *rest)
    self.assertFalse(np.asarray(y).any())

  @parameterized.parameters((0, 3), (4, 0))
  def test_nothing_to_do_gives_nothing(self, tokens, choices):
    x_MD, _, _, *matrices = operands(8, 16, jnp.float32)
    x_MD = np.asarray(x_MD)[:tokens]
    index_MX = np.zeros((tokens, choices), np.int32)
    weight_MX = np.zeros((tokens, choices), np.float32)
    for layer in (pallas_kernels.experts, pallas_kernels.decode_experts):
      y_MD = layer(x_MD, index_MX, weight_MX, *matrices)
      np.testing.assert_array_equal(y_MD, np.zeros((tokens, 8)))
    rows = pallas_kernels.permute(x_MD, index_MX, EXPERTS, align=8)
    back_MD = pallas_kernels.unpermute(rows.x_PD, rows, weight_MX)
    self.assertEqual(back_MD.shape, x_MD.shape)
    self.assertFalse(rows.sizes_G.any() or rows.x_PD.any())

  def test_no_rows_keys_or_scores(self):
    def ones(*shape):
      return np.ones(shape, np.float32)

    none_MK, sizes_G = ones(0, 8), np.zeros(2, np.int32)
    y_MN = pallas_kernels.grouped_matmul(none_MK, ones(2, 8, 4), sizes_G)
    self.assertEqual(y_MN.shape, (0, 4))
    dw_GKN = gmm.weight_gradient(none_MK, ones(0, 4), sizes_G)
    np.testing.assert_array_equal(dw_GKN, np.zeros((2, 8, 4)))
    routing = pallas_kernels.route(none_MK, np.zeros(8, np.float32), top_k=2)
    self.assertEqual(routing.index_MX.shape, (0, 2))
    for queries, keys in ((0, 3), (3, 0)):
      q_BTNH, k_BSKH = ones(2, queries, 4, 8), ones(2, keys, 2, 8)
      y_BTNH = pallas_kernels.attention(
        q_BTNH, k_BSKH, k_BSKH, np.ones((2, keys), np.int32), scale=1.0
      )
      np.testing.assert_array_equal(y_BTNH, np.zeros_like(q_BTNH))

  def test_a_backend_by_name_refuses_and_says_why(self):
    args = operands(128, 128, 'bfloat16')
    for impl, reason in (('mosaic_gpu', 'Hopper'), ('triton', 'deprecated')):
      if impl == 'mosaic_gpu' and jax.default_backend() == 'gpu':
        continue
      with self.assertRaisesRegex(NotImplementedError, reason):
        pallas_kernels.experts(*args, impl=impl)

  def test_arguments_that_do_not_fit_are_named(self):
    x, index, weight, wi_0, wi_1, wo = operands(128, 256, 'float32')
    with self.assertRaisesRegex(ValueError, 'wo is'):
      pallas_kernels.experts(x, index, weight, wi_0, wi_1, wi_1)
    with self.assertRaisesRegex(ValueError, 'holds no expert'):
      pallas_kernels.experts(x, index, weight, wi_0[:0], wi_1[:0], wo[:0])
    with self.assertRaisesRegex(ValueError, 'weight is'):
      pallas_kernels.experts(x, index, weight[:, :1], wi_0, wi_1, wo)
    with self.assertRaisesRegex(ValueError, 'x is'):
      pallas_kernels.experts(x, index, weight, wi_0, wi_1, wo, transposed=True)
    with self.assertRaisesRegex(ValueError, 'x is'):
      pallas_kernels.experts(x[:, :64], index, weight, wi_0, wi_1, wo)
    with self.assertRaisesRegex(ValueError, 'differ in dtype'):
      pallas_kernels.experts(
        x.astype(jnp.bfloat16), index, weight, wi_0, wi_1, wo
      )


if __name__ == '__main__':
  absltest.main()
