"""Routing and row movement for TPUs against XLA's, interpreted on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles_tpu
from pallas_kernels.permute import mosaic_tpu as permute
from pallas_kernels.permute import xla
from pallas_kernels.route import mosaic_tpu as route
from pallas_kernels.route import ref

TOLERANCE = 1e-6
SIMULATED = pltpu.InterpretParams(num_cores_or_threads=2)


def chip(cores=2, interpret=SIMULATED):
  return dataclasses.replace(
    tiles_tpu.INTERPRETED, cores=cores, interpret=interpret
  )


class RouteMosaicTpuTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('all_of_few', 37, 8, 8, 8, 0.0, 1),
    ('m2', 300, 256, 8, 8, 0.0, 2),
    ('adaptive', 40, 64, 4, 2, 0.26, 2),
    ('one_token', 1, 16, 1, 1, 0.0, 1),
  )
  def test_equals_specification(
    self, tokens, experts, top_k, min_k, min_share, cores
  ):
    score_ME = jax.nn.sigmoid(
      jax.random.normal(jax.random.key(tokens), (tokens, experts))
    )
    score_ME = score_ME.at[0].set(0.5)  # ties go to the lowest index
    bias_E = jax.random.normal(jax.random.key(1), (experts,)) / 8
    bias_E = bias_E.at[:2].set(0.25)
    options = {'top_k': top_k, 'min_k': min_k, 'min_share': min_share}

    def ours(score_ME, bias_E):
      return route.route_and_count(
        score_ME, bias_E, **options, chip=chip(cores)
      )

    def pulled(choose):
      found, pull = jax.vjp(lambda *z: choose(*z)[1], score_ME, bias_E)
      dweight_MX = jax.random.normal(jax.random.key(2), found.shape)
      return pull(dweight_MX)

    index_MX, weight_MX, count_E = ours(score_ME, bias_E)
    want = ref.route(score_ME, bias_E, **options)
    np.testing.assert_array_equal(index_MX, want[0])
    np.testing.assert_allclose(weight_MX, want[1], atol=TOLERANCE)
    counts = np.bincount(np.ravel(want[0]), minlength=experts + 1)
    np.testing.assert_array_equal(count_E, counts[:experts])
    spec = pulled(lambda *z: ref.route(*z, **options))
    for got, wanted in zip(pulled(ours), spec):
      np.testing.assert_allclose(got, wanted, atol=TOLERANCE)

  def test_refuses_what_it_cannot_do(self):
    self.assertIsNone(route.refusal(256, 8))
    self.assertIn('1024', route.refusal(4096, 8))


class PermuteMosaicTpuTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('one_core', 1, True), ('two_cores', 2, False)
  )
  def test_moves_equal_xla(self, cores, simulated):
    on = chip(cores, SIMULATED if simulated else True)
    self.enter_context(absltest.mock.patch.object(permute, 'GATHER_ROWS', 64))
    keys = jax.random.split(jax.random.key(cores), 4)
    x_MD = jax.random.normal(keys[0], (37, 256)).astype(jnp.bfloat16)
    index_MX = jax.random.randint(keys[1], (37, 3), -1, 7)  # -1, 6: nowhere
    plan = xla.plan(index_MX, 6, 16)
    x_PD = permute.gather(x_MD, plan, chip=on)
    np.testing.assert_array_equal(
      np.float32(x_PD), np.float32(xla.gather(x_MD, plan))
    )
    y_PD = jax.random.normal(keys[2], x_PD.shape).astype(jnp.bfloat16)
    # Nothing reads rows of no token.
    y_PD = jnp.where((plan.source_P < 111)[:, None], y_PD, jnp.nan)
    weight_MX = jax.random.uniform(keys[3], (37, 3))
    for weights in (weight_MX, None):
      got = permute.combine(y_PD, plan.place_MX, weights, chip=on)
      want = xla.combine(
        jnp.nan_to_num(y_PD).astype(jnp.float32), plan.place_MX, weights
      )
      self.assertEqual(got.dtype, jnp.bfloat16)
      np.testing.assert_array_equal(
        np.float32(got), np.float32(want.astype(jnp.bfloat16))
      )

  def test_every_index_outside_is_a_row_of_zeros(self):
    x_MD = jnp.ones((5, 256), jnp.bfloat16)
    found = permute.gather_rows(x_MD, jnp.array([4, -1, 5, 0]), chip=chip(1))
    np.testing.assert_array_equal(np.float32(found[:, 0]), [1, 0, 0, 1])

  def test_refuses_what_it_cannot_do(self):
    self.assertIsNone(permute.refusal(jnp.dtype('bfloat16'), 3072))
    self.assertIn('256', permute.refusal(jnp.dtype('bfloat16'), 128))
    self.assertIn('float32', permute.refusal(jnp.dtype('float32'), 256))


if __name__ == '__main__':
  absltest.main()
