"""Routing and row movement for TPUs against XLA's, interpreted on a CPU."""

import dataclasses
import functools

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
    rng = np.random.default_rng(tokens)
    score_ME = 1 / (1 + np.exp(-rng.standard_normal((tokens, experts))))
    score_ME[0] = 0.5  # ties go to the lowest index
    bias_E = rng.standard_normal(experts) / 8
    bias_E[:2] = 0.25
    given = score_ME, bias_E, rng.standard_normal((tokens, top_k))
    options = {'top_k': top_k, 'min_k': min_k, 'min_share': min_share}

    @functools.partial(jax.jit, static_argnums=0)
    def run(choose, score_ME, bias_E, dweight_MX):
      def weights(*z):
        index_MX, weight_MX, *counts = choose(*z, **options)
        return weight_MX, (index_MX, *counts)

      weight_MX, pull, chosen = jax.vjp(weights, score_ME, bias_E, has_aux=True)
      return *chosen, weight_MX, *pull(dweight_MX)

    ours = functools.partial(route.route_and_count, chip=chip(cores))
    index_MX, count_E, *found = run(ours, *given)
    want_MX, *wanted = run(ref.route, *given)
    np.testing.assert_array_equal(index_MX, want_MX)
    counts = np.bincount(np.ravel(want_MX), minlength=experts + 1)
    np.testing.assert_array_equal(count_E, counts[:experts])
    for got, want in zip(found, wanted, strict=True):
      np.testing.assert_allclose(got, want, atol=TOLERANCE)

  @parameterized.named_parameters(
    ('some', [0, 1, 3, 4, 6], 5, 5),
    ('all', range(8), 8, 8),
    ('adaptive', [0, 1, 3, 4, 6], 5, 2),
  )
  def test_masked_experts_are_the_last_choices(self, masked, top_k, min_k):
    score_ME = np.random.default_rng(0).uniform(0.1, 1, (9, 8))
    bias_E = np.zeros(8)
    bias_E[list(masked)] = -np.inf
    options = {'top_k': top_k, 'min_k': min_k, 'min_share': 0.2}
    got, want = (
      jax.jit(functools.partial(run, **options))(score_ME, bias_E)
      for run in (functools.partial(route.route, chip=chip(1)), ref.route)
    )
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=TOLERANCE)

  def test_no_number_is_chosen_first_and_seen_in_the_weights(self):
    score_ME = np.random.default_rng(0).uniform(size=(4, 8)).astype(np.float32)
    score_ME[0, 5] = score_ME[1] = score_ME[2, 1:3] = np.nan
    score_ME[3, 7] = -np.float32(np.nan)  # some arithmetic sets the sign
    run = functools.partial(route.route, top_k=4, min_share=0.2, chip=chip(1))
    for min_k in (4, 2):
      options = {'min_k': min_k}
      found = jax.jit(functools.partial(run, **options))(score_ME, np.zeros(8))
      index_MX, weight_MX = map(np.asarray, found)
      for m, first in enumerate(([5], [0, 1, 2, 3], [1, 2], [7])):
        used = index_MX[m, :min_k]
        np.testing.assert_array_equal(used[: len(first)], first[:min_k])
        self.assertLen(set(used), min_k)
        self.assertBetween(used.min(), 0, used.max())
        self.assertLess(used.max(), 8)
      self.assertTrue(np.isnan(weight_MX).all())

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
    rng = np.random.default_rng(cores)
    x_MD = jnp.asarray(rng.standard_normal((37, 256)), jnp.bfloat16)
    index_MX = rng.integers(-1, 7, (37, 3))  # -1, 6: nowhere
    plan = jax.jit(xla.plan, static_argnums=(1, 2))(index_MX, 6, 16)
    gather = jax.jit(functools.partial(permute.gather, chip=on))
    x_PD = np.float32(gather(x_MD, plan))
    want_PD = jax.jit(xla.gather)(x_MD, plan)
    np.testing.assert_array_equal(x_PD, np.float32(want_PD))
    y_PD = rng.standard_normal(x_PD.shape).astype(jnp.bfloat16)
    # Nothing reads rows of no token.
    inside_P1 = (np.asarray(plan.source_P) < 111)[:, None]
    poisoned_PD = np.where(inside_P1, y_PD, np.array(np.nan, y_PD.dtype))
    plain_PD = np.where(inside_P1, np.float32(y_PD), 0)
    weight_MX = np.float32(rng.uniform(size=(37, 3)))
    combine = jax.jit(functools.partial(permute.combine, chip=on))
    for weights in (weight_MX, None):
      got = combine(poisoned_PD, plan.place_MX, weights)
      want = jax.jit(xla.combine)(plain_PD, plan.place_MX, weights)
      self.assertEqual(got.dtype, jnp.bfloat16)
      want = np.asarray(want).astype(jnp.bfloat16)
      np.testing.assert_array_equal(np.float32(got), np.float32(want))

  def test_every_index_outside_is_a_row_of_zeros(self):
    x_MD = np.ones((5, 256), jnp.bfloat16)
    gather_rows = jax.jit(functools.partial(permute.gather_rows, chip=chip(1)))
    found = gather_rows(x_MD, np.array([4, -1, 5, 0]))
    np.testing.assert_array_equal(np.float32(found)[:, 0], [1, 0, 0, 1])

  def test_refuses_what_it_cannot_do(self):
    self.assertIsNone(permute.refusal(jnp.dtype('bfloat16'), 3072))
    self.assertIn('256', permute.refusal(jnp.dtype('bfloat16'), 128))
    self.assertIn('float32', permute.refusal(jnp.dtype('float32'), 256))


if __name__ == '__main__':
  absltest.main()
