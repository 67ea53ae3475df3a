"""The experts of a few tokens: specification, plan, XLA backend, refusals."""

import unittest

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import tiles as tile_tables
from pallas_kernels.decode import mosaic_gpu, mosaic_tpu, weights
from pallas_kernels.decode import plan as plans
from tests.pallas_kernels import decode_cases as cases

SHAPE = cases.Shape(experts=6, width=128, hidden=256)
RUN = jax.jit(pallas_kernels.decode_experts, static_argnames='impl')
PLAIN = jax.jit(weights.dequantised)
ON_CPU = unittest.skipUnless(
  jax.default_backend() == 'cpu', "a TPU's kernels are interpreted on CPUs"
)


def by_token(x_MD, index_MX, weight_MX, *matrices):
  """The specification once more, token by token, in float64."""
  wi_0, wi_1, wo = (np.float64(PLAIN(w)) for w in matrices)
  y_MD = np.zeros(x_MD.shape)
  for token, (x_D, chosen, counts) in enumerate(
    zip(np.float64(x_MD), np.asarray(index_MX), np.float64(weight_MX))
  ):
    for expert, count in zip(chosen, counts):
      if 0 <= expert < len(wi_0):
        gate_F = x_D @ wi_0[expert]
        act_F = gate_F / (1 + np.exp(-gate_F)) * (x_D @ wi_1[expert])
        y_MD[token] += count * (act_F @ wo[expert])
  return y_MD


INDICES = {
  'one token': np.array([[2, 0]]),
  'few, some elsewhere': np.array([[2, 0], [-1, 5], [6, 99], [2, 1]]),
  'an expert of one row': cases.choices(0, 17, 3, 5),
  'all on one': np.full((37, 1), 3),
  'the same twice': np.array([[1, 1]] * 20),
  'evenly': cases.choices(1, 70, 2, 6),
  'nobody': np.full((21, 2), 6),
}


class DecodeTest(parameterized.TestCase):
  @parameterized.product(name=list(INDICES), quantised=(False, True))
  def test_against_float64(self, name, quantised):
    args = cases.tokens(3, INDICES[name], SHAPE.width)
    args += cases.matrices(jax.random.key(4), SHAPE, quantised)
    want = by_token(*args)
    got = RUN(*args, impl='xla')
    self.assertEqual(got.dtype, jnp.bfloat16)
    self.assertLess(cases.error(got, want), cases.TOLERANCE)
    self.assertLess(cases.error(cases.EXPECTED(*args), want), 1e-5)

  @ON_CPU
  @parameterized.parameters('few, some elsewhere', 'evenly', 'nobody')
  def test_a_tpu_makes_codes_plain_by_a_kernel(self, name):
    args = cases.tokens(3, INDICES[name], SHAPE.width)
    args += cases.matrices(jax.random.key(4), SHAPE, True)
    got = RUN(*args, impl='mosaic_tpu')
    self.assertLess(cases.error(got, by_token(*args)), cases.TOLERANCE)
    plain = cases.matrices(jax.random.key(4), SHAPE, False)
    with self.assertRaisesRegex(NotImplementedError, 'need no kernel'):
      pallas_kernels.decode_experts(*args[:3], *plain, impl='mosaic_tpu')

  @ON_CPU
  @parameterized.parameters('float32', 'bfloat16')
  def test_dequantising(self, dtype):
    run = jax.jit(
      pallas_kernels.dequantise,
      static_argnames=('dtype', 'transposed', 'impl'),
    )
    run_some = jax.jit(mosaic_tpu.dequantised, static_argnames='dtype')
    some = np.array([4, 0, 4])
    for w in cases.matrices(jax.random.key(5), SHAPE, True):
      want = np.float32(run(w, dtype=dtype, impl='xla')).swapaxes(1, 2)
      for impl in ('xla', 'mosaic_tpu'):
        got = run(w, dtype=dtype, transposed=True, impl=impl)
        self.assertEqual(got.dtype, dtype)
        np.testing.assert_array_equal(np.float32(got), want)
      got = run_some(w, dtype=dtype, experts_I=some)
      np.testing.assert_array_equal(np.float32(got), want[some])
      with self.assertRaisesRegex(NotImplementedError, r'gives \[E, N, K\]'):
        pallas_kernels.dequantise(w, dtype, impl='mosaic_tpu')

  @parameterized.parameters(
    ((2, 192, 128), (2, 2, 1)), ((2, 128, 128), (1, 1, 1)), ((128,), (1,))
  )
  def test_codes_without_their_scales(self, shape, scales):
    w = pallas_kernels.Quantized(
      np.zeros(shape, jnp.float8_e4m3fn), np.ones(scales, np.float32)
    )
    with self.assertRaisesRegex(ValueError, 'w (has scales|holds)'):
      pallas_kernels.dequantise(w, transposed=True)

  def test_what_cannot_be_scaled(self):
    tiny = pallas_kernels.quantise(np.full((128, 256), 1e-37, np.float32))
    np.testing.assert_array_equal(pallas_kernels.dequantise(tiny), 0)
    with self.assertRaisesRegex(ValueError, r'\(100, 128\).*multiples of 128'):
      pallas_kernels.quantise(np.ones((100, 128)))

  def test_plain_matrices_may_be_float32(self):
    x, index, weight = cases.tokens(3, INDICES['evenly'], SHAPE.width)
    matrices = cases.matrices(jax.random.key(4), SHAPE, False)
    args = np.float32(x), index, weight, *map(np.float32, matrices)
    with jax.default_matmul_precision('float32'):  # a GPU's is tf32
      got = RUN(*args)
    self.assertEqual(got.dtype, jnp.float32)
    self.assertLess(cases.error(got, by_token(*args)), 1e-5)

  def test_misfits_are_named(self):
    x, index, weight = cases.tokens(0, INDICES['one token'], SHAPE.width)
    wi_0, wi_1, wo = cases.matrices(jax.random.key(0), SHAPE, False)
    codes = cases.matrices(jax.random.key(0), SHAPE, True)
    run = pallas_kernels.decode_experts
    with self.assertRaisesRegex(ValueError, 'differ in shape'):
      run(x, index, weight[:, :1], wi_0, wi_1, wo)
    with self.assertRaisesRegex(ValueError, 'wo is float32'):
      run(x, index, weight, wi_0, wi_1, wo.astype(jnp.float32))
    with self.assertRaisesRegex(ValueError, r'in, out\) are'):
      run(x, index, weight, wi_0, wi_1, wi_0)
    with self.assertRaisesRegex(ValueError, 'either all'):
      run(x, index, weight, wi_0, wi_1, codes[2])
    torn = pallas_kernels.Quantized(codes[0].values, codes[0].scale_inv[:, 1:])
    with self.assertRaisesRegex(ValueError, 'wi_0 has scales'):
      run(x, index, weight, torn, *codes[1:])

  def test_refuses_what_it_cannot_do(self):
    reason = mosaic_gpu.refusal(jnp.dtype('float32'), (128, 128))
    self.assertIn('float32', reason)
    reason = mosaic_gpu.refusal(jnp.dtype('bfloat16'), (128, 96))
    self.assertIn('128', reason)
    if jax.default_backend() == 'gpu':
      self.skipTest('nothing else is refused on a Hopper GPU')
    args = cases.tokens(0, INDICES['one token'], SHAPE.width)
    args += cases.matrices(jax.random.key(0), SHAPE, False)
    with self.assertRaisesRegex(NotImplementedError, 'needs a Hopper GPU'):
      pallas_kernels.decode_experts(*args, impl='mosaic_gpu')


class PlanTest(absltest.TestCase):
  def test_tiles_own_every_row_once(self):
    rng = np.random.default_rng(0)
    make = jax.jit(plans.make, static_argnums=(1, 2))
    for trial in range(60):
      tokens = (1, 8, 9, 17, 40)[trial % 5]
      experts, choices, tile = 7, 3, (16, 32)[trial % 2]
      law = rng.dirichlet([0.4] * (experts + 2))
      index_MX = rng.choice(experts + 2, (tokens, choices), p=law) - 1
      plan = jax.tree.map(np.asarray, make(index_MX, experts, tile))
      rows = plans.rows(tokens, choices, experts, tile)
      owner = np.full(rows, -1)
      for expert, row, extent, count in plan.table_4T.T[: plan.table_4T[3, 0]]:
        self.assertEqual((row % 8, extent % 8), (0, 0))
        self.assertBetween(extent, 8, tile)
        self.assertLessEqual(row + (plans.span(tokens) or tile), rows)
        self.assertTrue((owner[row : row + extent] == -1).all())
        owner[row : row + extent] = expert
        self.assertEqual(count, plan.table_4T[3, 0])
      self.assertFalse(plan.table_4T[2, plan.table_4T[3, 0] :].any())
      valid = (index_MX >= 0) & (index_MX < experts)
      np.testing.assert_array_equal(plan.place_MX >= 0, valid)
      place = plan.place_MX[valid]
      np.testing.assert_array_equal(owner[place], index_MX[valid])
      token = np.nonzero(valid)[0]
      if plan.source_P is None:
        np.testing.assert_array_equal(place % plans.span(tokens), token)
      else:
        self.assertLen(set(place), place.size)
        np.testing.assert_array_equal(plan.source_P[place], token)

  def test_rows_of_nobody_do_not_count(self):
    make = jax.jit(plans.make, static_argnums=(1, 2))
    plan = make(np.array([[0, 5], [5, 5]]), 2, 16)
    y_PN = np.full((16, 4), np.nan, jnp.bfloat16)
    y_PN[0] = 3
    combine = jax.jit(plans.combine, static_argnums=3)
    got = combine(y_PN, plan, np.full((2, 2), 0.5), jnp.float32)
    np.testing.assert_array_equal(got, [[1.5] * 4, [0] * 4])


class DecodeTilesTest(absltest.TestCase):
  def test_default_and_bad_tiles(self):
    default = tile_tables.lookup_decode('none', 'decode_up', (128, 128))
    self.assertEqual(default, tile_tables.DecodeTiles())
    with self.assertRaisesRegex(ValueError, 'columns=100'):
      tile_tables.DecodeTiles(columns=100)
    with self.assertRaisesRegex(ValueError, 'tokens=7'):
      tile_tables.DecodeTiles(tokens=7)


if __name__ == '__main__':
  absltest.main()
