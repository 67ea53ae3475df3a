"""Every kernel for Hopper becomes one at other shapes than M2's, too.

The interpreter takes layouts that Pallas' compiler refuses. What that makes of
a kernel needs no GPU, only to be told of one; the last step, from PTX to
machine code, is left to the tests on one.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from tests.pallas_kernels import hopper_cases

pytestmark = pytest.mark.heavy

# Tokens, width, hidden, experts, choices: odd multiples of 128 below 512 and
# past it, few rows and many.
SHAPES = (
  (5, 640, 384, 3, 2),
  (64, 768, 1152, 70, 6),
  (4096, 2048, 896, 128, 8),
)


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def with_gradients(call):
  """`call` on the arrays it has derivatives for, and all of these."""

  def run(differentiable, *others):
    y, pull = jax.vjp(lambda *x: call(*x, *others), *differentiable)
    return y, pull(y)

  return run


class LoweringTest(parameterized.TestCase):
  def lower(self, kernels, call, *arguments):
    with hopper_cases.hopper_here():
      exported = hopper_cases.export(call, *arguments)
    self.assertEqual(hopper_cases.kernels(exported), kernels)

  @parameterized.parameters(*SHAPES[:2])
  def test_experts(self, tokens, width, hidden, experts, choices):
    def layer(x, weight, wi_0, wi_1, wo, index):
      return pallas_kernels.experts(
        x, index, weight, wi_0, wi_1, wo, impl='mosaic_gpu'
      )

    wide, tall = array(experts, width, hidden), array(experts, hidden, width)
    weight = array(tokens, choices, dtype=jnp.float32)
    self.lower(
      8,
      with_gradients(layer),
      (array(tokens, width), weight, wide, wide, tall),
      array(tokens, choices, dtype=jnp.int32),
    )

  @parameterized.product(shape=SHAPES, fp8=(False, True))
  def test_decode(self, shape, fp8):
    tokens, width, hidden, experts, choices = shape
    wide, tall = array(experts, width, hidden), array(experts, hidden, width)
    if fp8:
      wide, tall = jax.eval_shape(
        lambda *w: tuple(map(pallas_kernels.quantise, w)), wide, tall
      )
    self.lower(
      2,
      functools.partial(pallas_kernels.decode_experts, impl='mosaic_gpu'),
      array(min(tokens, 256), width),
      array(min(tokens, 256), choices, dtype=jnp.int32),
      array(min(tokens, 256), choices, dtype=jnp.float32),
      wide,
      wide,
      tall,
    )

  @parameterized.parameters(*SHAPES)
  def test_grouped_matmul(self, tokens, width, hidden, experts, choices):
    def product(x, w, sizes):
      return pallas_kernels.grouped_matmul(
        x, w, sizes, impl='mosaic_gpu', out_dtype=jnp.float32
      )

    self.lower(
      3,
      with_gradients(product),
      (array(tokens * choices, width), array(experts, width, hidden)),
      array(experts, dtype=jnp.int32),
    )

  @parameterized.parameters(
    (1, 1, 1, 1), (5, 40, 3, 2), (100, 256, 8, 8), (17, 512, 10, 4)
  )
  def test_route(self, tokens, experts, top_k, min_k):
    self.lower(
      1,
      functools.partial(
        pallas_kernels.route,
        top_k=top_k,
        min_k=min_k,
        min_share=0.2,
        impl='mosaic_gpu',
      ),
      array(tokens, experts, dtype=jnp.float32),
      array(experts, dtype=jnp.float32),
    )

  @parameterized.parameters(
    (384, jnp.float32),
    (640, jnp.bfloat16),
    (768, jnp.bfloat16),
    (1152, jnp.float32),
  )
  def test_permute(self, width, dtype):
    def layer(x, weight, index):
      moved = pallas_kernels.permute(x, index, 300, impl='mosaic_gpu')
      return pallas_kernels.unpermute(
        moved.x_PD, moved, weight, impl='mosaic_gpu'
      )

    self.lower(
      4,
      with_gradients(layer),
      (array(70, width, dtype=dtype), array(70, 2, dtype=jnp.float32)),
      array(70, 2, dtype=jnp.int32),
    )


if __name__ == '__main__':
  absltest.main()
