"""Derivatives of derivatives: XLA has them, kernels say that they do not."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.experts import ref as experts_ref
from pallas_kernels.gmm import api as gmm
from pallas_kernels.gmm import ref as gmm_ref
from pallas_kernels.route import ref as route_ref
from tests.pallas_kernels import hopper_cases

TOLERANCE = 1e-5  # in norm: float32 sums in another order, twice
WIDTH, GROUPS = 256, 2
SIZES = np.full(GROUPS, 16, np.int32)


def second(scalar):
  """The gradient of a product with the gradient, of every argument."""

  def product(*args):
    slopes = jax.grad(scalar, range(len(args)))(*args)
    return sum(jnp.sin(z.astype(jnp.float32)).sum() for z in slopes)

  return lambda *args: jax.grad(product, range(len(args)))(*args)


def squares(z):
  return jnp.square(z.astype(jnp.float32)).sum()


def normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return np.float32(rng.standard_normal(shape) / 4)


class XlaTest(parameterized.TestCase):
  def check(self, ours, spec, *args):
    with jax.default_matmul_precision('highest'):
      got, want = (jax.jit(second(call))(*args) for call in (ours, spec))
    for found, wanted in zip(got, want, strict=True):
      error = np.linalg.norm(np.asarray(found) - wanted)
      self.assertGreater(np.linalg.norm(wanted), 0)
      self.assertLess(error / np.linalg.norm(wanted), TOLERANCE)

  def test_grouped_matmul(self):
    def ours(x_MK, w_GKN):
      product = pallas_kernels.grouped_matmul
      return squares(product(x_MK, w_GKN, np.array([3, 6]), impl='xla'))

    def spec(x_MK, w_GKN):
      sizes_G = jnp.array([3, 6])
      product = gmm_ref.grouped_matmul
      return squares(product(x_MK, w_GKN, sizes_G, out_dtype='float32'))

    self.check(ours, spec, normal(9, 5), normal(2, 5, 4))

  def test_experts(self):
    index_MX = np.array([[0, 1], [2, 0], [3, 1]])  # 3 is of no expert

    def of(layer, x_MD, weight_MX, *matrices):
      return squares(layer(x_MD, index_MX, weight_MX, *matrices))

    def ours(*args):
      return of(lambda *z: pallas_kernels.experts(*z, impl='xla'), *args)

    def spec(*args):
      return of(experts_ref.experts, *args)

    wide, tall = normal(3, 4, 6), normal(3, 6, 4)
    args = normal(3, 4), normal(3, 2), wide, 1 - wide, tall
    self.check(ours, spec, *args)

  def test_a_routing_kernel_has_them_too(self):
    score_ME, cotangent_MX = normal(5, 8) + 1, normal(5, 3)
    options = {'top_k': 3, 'min_k': 1, 'min_share': 0.3}

    def ours(score_ME):
      weight_MX = pallas_kernels.route(
        score_ME, np.zeros(8, np.float32), impl='mosaic_tpu', **options
      ).weight_MX
      return (weight_MX * cotangent_MX).sum()

    def spec(score_ME):
      _, weight_MX = route_ref.route(score_ME, jnp.zeros(8), **options)
      return (weight_MX * cotangent_MX).sum()

    self.check(ours, spec, score_ME)


def calls(impl):
  """Name in the message, a scalar of rows, and which derivative has none."""
  w = jnp.zeros((GROUPS, WIDTH, WIDTH), jnp.bfloat16)
  index = np.arange(32, dtype=np.int32)[:, None] % GROUPS
  weight = np.ones((32, 1), np.float32)
  plan = pallas_kernels.plan(index, GROUPS, align=16, impl='xla')
  options = {'align': 16, 'impl': impl}

  def layer(x, **how):
    operands = x, index, weight, w, w, w
    return squares(pallas_kernels.experts(*operands, impl=impl, **how))

  def product(x):
    return squares(pallas_kernels.grouped_matmul(x, w, SIZES, **options))

  def gradient(x):
    return squares(gmm.weight_gradient(x, x, SIZES, **options))

  def moved(x):
    return squares(pallas_kernels.gather(x, plan, impl=impl))

  def combined(weight):
    y = jnp.zeros((len(plan.source_P), WIDTH), jnp.bfloat16)
    return squares(pallas_kernels.combine(y, plan, weight, impl=impl))

  def attended(q):
    until = np.full(q.shape[:2], q.shape[1])
    return squares(
      pallas_kernels.attention(q, q, q, until, scale=0.1, impl=impl)
    )

  x = jax.ShapeDtypeStruct((32, WIDTH), jnp.bfloat16)
  yield 'experts', layer, x, 2
  if impl == 'mosaic_tpu':  # on GPUs the matrices are turned first
    yield 'experts', lambda x: layer(x, transposed=True), x, 1
    yield 'attention', attended, jnp.zeros((1, 128, 1, 128)), 2
  yield 'grouped_matmul', product, x, 2
  yield 'weight_gradient', gradient, x, 1
  yield 'gather', moved, x, 2
  yield 'combine', combined, jax.eval_shape(lambda: jnp.asarray(weight)), 2


class KernelsTest(parameterized.TestCase):
  def check(self, impl):
    for name, scalar, operand, order in calls(impl):

      def forward_over_reverse(z, scalar=scalar):
        return jax.jvp(jax.grad(scalar), (z,), (jnp.ones_like(z),))

      with self.subTest(name):
        asked = [second(scalar), forward_over_reverse]
        if order == 1:
          asked.append(jax.grad(scalar))
        else:
          jax.eval_shape(jax.grad(scalar), operand)
        for derivative in asked:
          with self.assertRaisesRegex(
            NotImplementedError, f"^{name}: .* use impl='xla'"
          ):
            jax.eval_shape(derivative, operand)

  def test_for_tpus(self):
    self.check('mosaic_tpu')

  def test_for_gpus(self):
    with hopper_cases.hopper_here():
      self.check('mosaic_gpu')


if __name__ == '__main__':
  absltest.main()
