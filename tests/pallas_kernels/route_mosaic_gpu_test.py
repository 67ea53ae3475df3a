"""Hopper's routing and permutation against the specification.

On a CPU the kernels run in Pallas' interpreter at small sizes; on a Hopper GPU
the same tests run the compiled kernels, at the sizes of the model too:
`python -m tests.pallas_kernels.route_mosaic_gpu_test`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels.permute import api, layout, mosaic_gpu, xla
from pallas_kernels.route import mosaic_gpu as router
from pallas_kernels.route import ref
from tests.pallas_kernels import hopper_cases

WEIGHT_TOLERANCE = 1e-6  # of float32 weights and their gradients
ROW_TOLERANCE = {'bfloat16': 4e-3, 'float32': 1e-6}  # in norm: one rounding
GPU = jax.default_backend() == 'gpu'
# Tokens, experts, top_k, min_k: not multiples of anything; all, and 2 to 4.
CHOICES = ((1, 5, 2, 2), (37, 130, 8, 8), (19, 24, 4, 2))
# Tokens, groups, choices, alignment, width.
LAYOUTS = ((1, 1, 1, 1, 128), (70, 6, 3, 8, 128), (130, 70, 2, 8, 384))
# The rows of a token of the last are more than are summed together.
LAYOUTS += ((70, 520, 2, 8, 128), (7, 6, 20, 1, 2560))
if GPU:
  CHOICES += ((1, 256, 8, 8), (7, 64, 4, 2), (128, 32, 8, 8), (8192, 256, 8, 8))
  CHOICES += ((8193, 64, 8, 8), (8193, 64, 4, 2), (100, 512, 8, 8))
  LAYOUTS += ((1, 256, 8, 8, 3072), (7, 64, 8, 8, 3072), (128, 32, 8, 8, 3072))
  LAYOUTS += ((8192, 256, 8, 8, 3072), (8193, 5, 8, 8, 768))
  LAYOUTS += ((8193, 1000, 8, 8, 128), (8192, 256, 12, 8, 3072))
  LAYOUTS += ((8192, 256, 8, 64, 1536), (32768, 256, 8, 8, 3072))
# Few blocks on a CPU, so that each walks several tokens and gaps.
BLOCKS = None if GPU else 3
MOVES = layout.Moves(
  functools.partial(mosaic_gpu.gather, blocks=BLOCKS),
  functools.partial(mosaic_gpu.combine, blocks=BLOCKS),
  mosaic_gpu.weight_gradient,
)
PLAN = jax.jit(xla.plan, static_argnums=(1, 2))


def poison():
  """Leaves NaN in the memory that the next results will take."""
  if GPU:
    jnp.full(1 << 30, jnp.nan, jnp.float32).block_until_ready().delete()


def scores(tokens, experts, levels):
  """Sigmoid scores and a bias; `levels` > 0 makes many of them equal."""
  rng = np.random.default_rng(tokens + experts)
  score_ME = 1 / (1 + np.exp(-rng.standard_normal((tokens, experts))))
  bias_E = rng.standard_normal(experts) / 8
  if levels:
    score_ME, bias_E = (
      np.ceil(z * levels) / levels for z in (score_ME, bias_E)
    )
  return np.float32(score_ME), np.float32(bias_E)


def indices(tokens, groups, choices, law='uniform'):
  """Choices of which some are of no group, some repeat within a token."""
  rng = np.random.default_rng(tokens + groups)
  low, high = {
    'uniform': (0, groups),
    'outside': (-groups, 2 * groups),
    'few': (max(0, groups - 8), groups),
  }[law]
  return rng.integers(low, high, (tokens, choices), np.int32)


# On the device, where the arrays are: some have 3 GB.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def rows(seed, count, width, dtype):
  key = jax.random.key(seed)
  return jax.random.normal(key, (count, width)).astype(dtype)


@jax.jit
def errors(got, want):
  """Distances in norm, relative to `want`; NaN if anything is not finite."""

  def error(got, want):
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    norm = jnp.maximum(jnp.linalg.norm(want), 1e-6)
    return jnp.linalg.norm(got - want) / norm

  return jax.tree.map(error, got, want)


@jax.jit
def equal(got, want):
  return jax.tree.map(jnp.array_equal, got, want)


class RouteTest(parameterized.TestCase):
  @parameterized.parameters(*itertools.product(CHOICES, (0, 16)))
  def test_equals_the_specification(self, shape, levels):
    tokens, experts, top_k, min_k = shape
    score_ME, bias_E = scores(tokens, experts, levels)
    options = {'top_k': top_k, 'min_k': min_k, 'min_share': 0.2123}

    rng = np.random.default_rng(2)
    dweight_MX = np.float32(rng.standard_normal((tokens, top_k)))
    given = score_ME, bias_E, dweight_MX

    @functools.partial(jax.jit, static_argnums=0)
    def run(route, score_ME, bias_E, dweight_MX):
      routing, pull = jax.vjp(
        functools.partial(route, **options), score_ME, bias_E
      )
      none = np.zeros((tokens, top_k), jax.dtypes.float0)
      return routing, pull((none, dweight_MX))

    poison()
    with hopper_cases.compiled_here():
      (index_MX, weight_MX), (dscore_ME, dbias_E) = run(router.route, *given)
    (want_MX, weights_MX), (dwant_ME, _) = run(ref.route, *given)
    np.testing.assert_array_equal(index_MX, want_MX)
    np.testing.assert_allclose(weight_MX, weights_MX, atol=WEIGHT_TOLERANCE)
    self.assertEqual(dscore_ME.shape, dwant_ME.shape)
    self.assertLess(float(errors(dscore_ME, dwant_ME)), WEIGHT_TOLERANCE)
    self.assertFalse(np.asarray(dbias_E).any())
    if min_k < top_k and tokens > 10:  # few may all use every choice
      self.assertTrue((np.asarray(index_MX) == experts).any())

  def test_order_is_that_of_floats(self):
    """A bias may be anything, infinities and both zeros included."""
    bias_E = np.float32([0.0, -0.0, -np.inf, 3e-42, -3.0, np.inf, -0.0, 1])
    score_ME = np.zeros((3, 8), np.float32)
    options = {'top_k': 8, 'min_k': 8, 'min_share': 0.0}
    ours, spec = (
      jax.jit(functools.partial(route, **options))
      for route in (router.route, ref.route)
    )
    with hopper_cases.compiled_here():
      index_MX, _ = ours(score_ME, bias_E)
    want_MX, _ = spec(score_ME, bias_E)
    np.testing.assert_array_equal(index_MX, want_MX)


class PlanTest(parameterized.TestCase):
  @parameterized.parameters(*itertools.product(LAYOUTS, ('outside', 'few')))
  def test_equals_a_sort(self, shape, law):
    tokens, groups, choices, align, _ = shape
    index_MX = indices(tokens, groups, choices, law)
    with hopper_cases.compiled_here():
      got = jax.jit(mosaic_gpu.plan, static_argnums=(1, 2))(
        index_MX, groups, align
      )
    for ours, want in zip(got, PLAN(index_MX, groups, align)):
      self.assertEqual(ours.dtype, want.dtype)
      np.testing.assert_array_equal(ours, want)

  def test_blocks_carry_their_counts(self):
    index_MX = indices(300, 70, 2)
    before = mosaic_gpu.RANKERS
    self.addCleanup(setattr, mosaic_gpu, 'RANKERS', before)
    mosaic_gpu.RANKERS = 2
    with hopper_cases.compiled_here():
      got = jax.jit(lambda index: mosaic_gpu.plan(index, 70, 8))(index_MX)
    jax.tree.map(np.testing.assert_array_equal, got, PLAN(index_MX, 70, 8))


class MoveTest(parameterized.TestCase):
  @parameterized.parameters(
    *zip(LAYOUTS, itertools.cycle(('bfloat16', 'float32')))
  )
  def test_rows_come_and_go(self, shape, dtype):
    self.check_rows(shape, dtype)

  @parameterized.parameters(
    *zip(LAYOUTS, itertools.cycle(('float32', 'bfloat16')))
  )
  @pytest.mark.heavy
  def test_rows_of_the_other_type_come_and_go(self, shape, dtype):
    self.check_rows(shape, dtype)

  def check_rows(self, shape, dtype):
    tokens, groups, choices, align, width = shape
    index_MX = indices(tokens, groups, choices, 'outside')
    where = PLAN(index_MX, groups, align)
    x_MD = rows(0, tokens, width, dtype)
    rng = np.random.default_rng(1)
    weight_MX = np.float32(rng.uniform(size=(tokens, choices)))
    dy_MD = rows(2, tokens, width, dtype)
    dx_PD = rows(3, len(where.source_P), width, dtype)

    given = where, x_MD, weight_MX, dy_MD, dx_PD

    # Gigabytes: as constants of the program they would take minutes to fold.
    @functools.partial(jax.jit, static_argnums=0)
    def run(moves, where, x_MD, weight_MX, dy_MD, dx_PD):
      x_PD, pull_x = jax.vjp(lambda x: api._gather(moves, None, x, where), x_MD)
      y_MD, pull_y = jax.vjp(
        lambda y, w: api._combine(moves, y, w, where.place_MX, where.source_P),
        dx_PD,
        weight_MX,
      )
      return x_PD, y_MD, *pull_x(dx_PD), *pull_y(dy_MD)

    poison()
    with hopper_cases.compiled_here():
      got = run(MOVES, *given)
    with jax.default_matmul_precision('highest'):
      want = run(xla.MOVES, *given)
    self.assertTrue(equal(got[0], want[0]))
    names = 'x', 'y', 'dx', 'dy', 'dw'
    found = zip(names, got, want, errors(got, want), strict=True)
    for name, ours, spec, error in found:
      self.assertEqual(ours.dtype, spec.dtype, name)
      self.assertEqual(ours.shape, spec.shape, name)
      tolerance = ROW_TOLERANCE['bfloat16' if name == 'dw' else dtype]
      self.assertLess(float(error), tolerance, name)

  @parameterized.parameters(0, 16, 1000)
  def test_gather_leaves_what_it_need_not_clear(self, clear):
    tokens, groups, choices, align = 70, 6, 3, 8
    index_MX = indices(tokens, groups, choices, 'outside')
    where = PLAN(index_MX, groups, align)
    x_MD = rows(0, tokens, 128, jnp.bfloat16)
    with hopper_cases.compiled_here():
      got = jax.jit(lambda *z: MOVES.gather(*z, clear))(x_MD, where)
    got, want = np.float32(got), np.float32(jax.jit(xla.gather)(x_MD, where))
    end = int(np.asarray(where.start_G)[-1] + np.asarray(where.sizes_G)[-1])
    end += clear
    np.testing.assert_array_equal(got[:end], want[:end])
    if not GPU:  # an interpreted kernel has NaN where it writes nothing
      self.assertTrue(np.isnan(got[end:]).all())

  def test_runs_are_bitwise_equal(self):
    if not GPU:
      self.skipTest('the interpreter is sequential; a GPU is not')
    score_ME, bias_E = scores(8193, 256, 0)
    x_MD = rows(0, 8193, 3072, jnp.bfloat16)

    @jax.jit
    def run(score_ME, x_MD):
      routing = pallas_kernels.route(score_ME, bias_E, top_k=8)

      def layer(x_MD, weight_MX):
        moved = pallas_kernels.permute(x_MD, routing.index_MX, 256, align=8)
        return pallas_kernels.unpermute(moved.x_PD, moved, weight_MX)

      y_MD, pull = jax.vjp(layer, x_MD, routing.weight_MX)
      return *routing, y_MD, *pull(y_MD)

    first = run(score_ME, x_MD)
    self.assertLess(float(errors(first[2], x_MD)), ROW_TOLERANCE['bfloat16'])
    for _ in range(5):
      poison()
      self.assertTrue(all(equal(first, run(score_ME, x_MD))))


class LowerTest(parameterized.TestCase):
  @parameterized.parameters((8192, 256), (8193, 32), (32768, 256))
  def test_lowers_for_hopper_at_the_shapes_of_m2(self, tokens, groups):
    def layer(x_MD, score_ME, bias_E):
      index_MX, weight_MX = router.route(
        score_ME, bias_E, top_k=8, min_k=8, min_share=0.0
      )
      where = mosaic_gpu.plan(index_MX, groups, 8)
      x_PD = mosaic_gpu.gather(x_MD, where, blocks=264)
      return mosaic_gpu.combine(x_PD, where.place_MX, weight_MX, blocks=264)

    exported = hopper_cases.export(
      layer,
      jax.ShapeDtypeStruct((tokens, 3072), jnp.bfloat16),
      jax.ShapeDtypeStruct((tokens, groups), jnp.float32),
      jax.ShapeDtypeStruct((groups,), jnp.float32),
    )
    self.assertEqual(exported.out_avals[0].shape, (tokens, 3072))
    self.assertGreater(hopper_cases.kernels(exported), 0)

  def test_keeps_the_axes_over_which_operands_differ(self):
    mesh = jax.make_mesh((1,), ('expert',))
    split = jax.P('expert')

    def local(x_MD, score_ME, bias_E):
      def layer(x_MD, score_ME):
        index_MX, weight_MX = router.route(
          score_ME, bias_E, top_k=2, min_k=2, min_share=0.0
        )
        where = mosaic_gpu.plan(index_MX - jax.lax.axis_index('expert'), 4, 8)
        moves = layout.Moves(
          functools.partial(mosaic_gpu.gather, blocks=264),
          functools.partial(mosaic_gpu.combine, blocks=264),
          mosaic_gpu.weight_gradient,
        )
        x_PD = api._gather(moves, None, x_MD, where)
        return api._combine(
          moves, x_PD, weight_MX, where.place_MX, where.source_P
        )

      y_MD, pull = jax.vjp(layer, x_MD, score_ME)
      return y_MD, *pull(y_MD)

    with jax.set_mesh(mesh):
      shapes = [
        jax.ShapeDtypeStruct(
          shape, dtype, sharding=jax.NamedSharding(mesh, spec)
        )
        for shape, dtype, spec in (
          ((64, 256), jnp.bfloat16, split),
          ((64, 8), jnp.float32, split),
          ((8,), jnp.float32, jax.P()),
        )
      ]
      found = jax.eval_shape(
        jax.shard_map(
          local, in_specs=(split, split, jax.P()), out_specs=(split,) * 3
        ),
        *shapes,
      )
    self.assertEqual([z.shape for z in found], [(64, 256), (64, 256), (64, 8)])

  def test_refuses_what_it_cannot_do(self):
    self.assertIn('512 experts', router.refusal(513, 8))
    self.assertIn('not 33 of 512', router.refusal(512, 33))
    self.assertIn('1024 groups', mosaic_gpu.plan_refusal(1025))
    refusal = mosaic_gpu.rows_refusal
    self.assertIn('float16', refusal(jnp.dtype('float16'), 128))
    self.assertIn('96', refusal(jnp.dtype('float32'), 96))
    self.assertIn('needs a row', refusal(jnp.dtype('bfloat16'), 16384))
    if GPU:
      self.skipTest('nothing else is refused on a Hopper GPU')
    score_ME, bias_E = scores(2, 8, 0)
    with self.assertRaisesRegex(NotImplementedError, 'needs a Hopper GPU'):
      pallas_kernels.route(score_ME, bias_E, top_k=2, impl='mosaic_gpu')
    index_MX = indices(2, 8, 2)
    with self.assertRaisesRegex(NotImplementedError, 'needs a Hopper GPU'):
      pallas_kernels.plan(index_MX, 8, impl='mosaic_gpu')
    with self.assertRaisesRegex(NotImplementedError, 'needs a Hopper GPU'):
      pallas_kernels.gather(
        np.zeros((2, 128), np.float32),
        PLAN(index_MX, 8, 1),
        impl='mosaic_gpu',
      )


if __name__ == '__main__':
  absltest.main()
