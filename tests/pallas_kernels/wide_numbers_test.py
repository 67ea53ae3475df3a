"""Under `jax.enable_x64` every operation gives what it gives without.

A kernel for TPUs or GPUs is the same then; it takes no number of 64 bits.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import tiles_tpu
from tests.pallas_kernels import hopper_cases

TOKENS, WIDTH, HIDDEN, EXPERTS = 20, 256, 128, 2
KERNEL = re.compile(r'custom_call @tpu_custom_call.*?backend_config = "(.*?)",')


def operands():
  """Tokens, float64 weights, matrices and int64 choices, one of no expert."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return (rng.standard_normal(shape) / 8).astype(jnp.bfloat16)

  index_MX = rng.integers(0, EXPERTS + 1, (TOKENS, 2))
  weight_MX = rng.uniform(size=index_MX.shape)
  wide = EXPERTS, WIDTH, HIDDEN
  matrices = normal(*wide), normal(*wide), normal(EXPERTS, HIDDEN, WIDTH)
  return normal(TOKENS, WIDTH), weight_MX, *matrices, index_MX


def layer(impl, x_MD, weight_MX, wi_0, wi_1, wo, index_MX):
  """The expert layer, and in float32 all its gradients."""

  def run(*args):
    x, weight, *matrices = args
    return pallas_kernels.experts(x, index_MX, weight, *matrices, impl=impl)

  y_MD, pull = jax.vjp(run, x_MD, weight_MX, wi_0, wi_1, wo)
  return y_MD, *map(jnp.float32, pull(y_MD))


def routes(impl, score_ME, bias_E):
  """Choices, weights, and in float32 the gradient of the scores."""

  def run(score_ME):
    options = {'top_k': 3, 'min_k': 1, 'min_share': 0.3, 'impl': impl}
    index_MX, weight_MX = pallas_kernels.route(score_ME, bias_E, **options)
    return weight_MX, index_MX

  weight_MX, pull, index_MX = jax.vjp(run, score_ME, has_aux=True)
  return index_MX, weight_MX, *map(jnp.float32, pull(weight_MX))


def attended(impl, q_BTNH, until_BS):
  """Attention of a row to itself, and in float32 the gradient."""

  def run(q):
    return pallas_kernels.attention(q, q, q, until_BS, scale=0.1, impl=impl)

  o_BTNH, pull = jax.vjp(run, q_BTNH)
  return o_BTNH, *map(jnp.float32, pull(o_BTNH))


def cases(impl):
  """What has kernels, and operands of it."""
  x_MD, weight_MX, *matrices, index_MX = operands()
  yield functools.partial(layer, impl), *operands()
  yield functools.partial(routes, impl), np.zeros((9, 8)), np.zeros(8)
  if impl == 'mosaic_tpu':  # others have no such kernels
    matrices = [pallas_kernels.quantise(w) for w in matrices]
    q_BTNH = np.zeros((1, 128, 1, 128), jnp.bfloat16)
    yield functools.partial(attended, impl), q_BTNH, np.full((1, 128), 128)
  decode = functools.partial(pallas_kernels.decode_experts, impl=impl)
  for few in (4, TOKENS):
    yield decode, x_MD[:few], index_MX[:few], weight_MX[:few], *matrices


class WideNumbersTest(parameterized.TestCase):
  def check(self, run, *args):
    want = jax.jit(run)(*args)
    with jax.enable_x64(True):
      got = jax.jit(run)(*args)
    for found, wanted in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      self.assertEqual(found.dtype, wanted.dtype)
      np.testing.assert_array_equal(np.float32(found), np.float32(wanted))

  def test_experts(self):
    self.check(functools.partial(layer, 'xla'), *operands())

  @pytest.mark.heavy
  def test_interpreted_experts(self):
    self.check(functools.partial(layer, 'mosaic_tpu'), *operands())

  @parameterized.parameters('xla', 'mosaic_tpu')
  def test_route(self, impl):
    rng = np.random.default_rng(0)
    score_ME, bias_E = rng.uniform(size=(9, 8)), rng.uniform(size=8)
    self.check(functools.partial(routes, impl), score_ME, bias_E)
    self.check(functools.partial(routes, impl), score_ME[:0], bias_E)

  @parameterized.parameters('xla', 'mosaic_tpu')
  def test_grouped_matmul(self, impl):
    x_MK, _, _, _, w_GKN, _ = operands()
    run = functools.partial(pallas_kernels.grouped_matmul, impl=impl)
    self.check(run, x_MK[:, :HIDDEN], w_GKN, np.array([7, 9]))

  @parameterized.parameters('xla', 'mosaic_tpu')
  def test_attention(self, impl):
    rng = np.random.default_rng(0)
    q_BTNH = rng.standard_normal((1, 128, 1, 128)).astype(jnp.bfloat16)
    run = functools.partial(attended, impl)
    self.check(run, q_BTNH, np.full((1, 128), 100))

  def test_plan_is_of_int32(self):
    *_, index_MX = operands()
    plan = functools.partial(pallas_kernels.plan, groups=EXPERTS, align=16)
    self.check(plan, index_MX)
    self.check(plan, index_MX[:0])

  @parameterized.product(few=(4, TOKENS), impl=('xla', 'mosaic_tpu'))
  def test_decode(self, few, impl):
    x_MD, weight_MX, *matrices, index_MX = operands()
    if impl == 'mosaic_tpu':
      matrices = [pallas_kernels.quantise(w) for w in matrices]
    run = functools.partial(pallas_kernels.decode_experts, impl=impl)
    self.check(run, *(z[:few] for z in (x_MD, index_MX, weight_MX)), *matrices)

  def test_kernels_for_tpus(self):
    for run, *args in cases('mosaic_tpu'):
      found = []
      for wide in (False, True):
        with tiles_tpu.compiling_for('TPU v6 lite'), jax.enable_x64(wide):
          exported = jax.export.export(jax.jit(run), platforms=['tpu'])(*args)
        found.append(KERNEL.findall(exported.mlir_module()))
      self.assertNotEmpty(found[0])
      self.assertEqual(*found)

  @pytest.mark.heavy
  def test_kernels_for_gpus(self):
    for run, *args in cases('mosaic_gpu'):
      with hopper_cases.hopper_here(), jax.enable_x64(True):
        exported = hopper_cases.export(run, *args)
      lines = exported.mlir_module().splitlines()
      kernels = [z for z in lines if '@mosaic_gpu' in z]
      self.assertNotEmpty(kernels)
      for kernel in kernels:
        self.assertNotRegex(kernel.split(' : ')[-1], '[if]64>')


if __name__ == '__main__':
  absltest.main()
