"""The Hopper kernels for a few tokens against the specification.

On a CPU they run in Pallas' interpreter, at the smallest tiles; on a Hopper GPU
the same tests run the compiled kernels, and more at the sizes of the model:
`python -m tests.pallas_kernels.decode_mosaic_gpu_test`.
"""

import contextlib
import functools
import unittest

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import decode_experts
from pallas_kernels import tiles as tile_tables
from pallas_kernels.decode import mosaic_gpu, xla
from pallas_kernels.decode import plan as plans
from tests.pallas_kernels import decode_cases as cases
from tests.pallas_kernels import hopper_cases

SMALL = cases.Shape(experts=4, width=256, hidden=128)
M2 = cases.Shape(experts=256, width=3072, hidden=1536)
TILES = tile_tables.DecodeTiles(depth=128, stages=2, tokens=16)
BLOCKS = 2  # persistent blocks, so that each walks several tiles
ON_GPU = jax.default_backend() == 'gpu'
RUN = jax.jit(functools.partial(decode_experts, impl='mosaic_gpu'))


def plain_products(codes, x_KN):
  """Stands in for `multiply_codes`, which the interpreter cannot run.

  It has no products whose operand is in registers; everything around it runs.
  """
  x_KN = x_KN[...].astype(jnp.float32)
  return tuple(jnp.dot(code.astype(jnp.float32), x_KN) for code in codes)


@contextlib.contextmanager
def compiled_here():
  """Interprets the kernels where there is no GPU."""
  if ON_GPU:
    yield
    return
  substitute = unittest.mock.patch.object(
    mosaic_gpu, 'multiply_codes', plain_products
  )
  with substitute, plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    yield


def run_small(*args, **options):
  options = {
    'up_tiles': TILES,
    'down_tiles': TILES,
    'blocks': BLOCKS,
  } | options
  run = jax.jit(functools.partial(mosaic_gpu.decode_experts, **options))
  with compiled_here():
    return run(*args)


class MosaicGpuTest(parameterized.TestCase):
  @parameterized.named_parameters(
    # Values outside [0, 4) choose nobody.
    ('few', np.array([[0, 2], [2, 7], [-1, 9]]), False),
    ('few_fp8', np.array([[0, 2], [2, 7], [-1, 9]]), True),
    # A group of one row, one of two tiles, an empty one, one of 16 rows.
    ('many', np.array([[0, 1]] + [[1, -1]] * 16 + [[3, 1]] * 10), False),
    ('many_fp8', np.array([[0, 1]] + [[1, -1]] * 16 + [[3, 1]] * 10), True),
  )
  def test_small(self, index_MX, quantised):
    x_MD, *args = cases.tokens(0, index_MX, SMALL.width)
    args += cases.matrices(jax.random.key(1), SMALL, quantised)
    want = cases.EXPECTED(x_MD, *args)
    # A token that chose nobody: its rows must not reach any other.
    x_MD = np.array(x_MD)
    x_MD[(index_MX % 10 > 3).all(1)] = np.nan
    got = run_small(x_MD, *args)
    self.assertEqual(got.dtype, jnp.bfloat16)
    self.assertLess(cases.error(got, want), cases.TOLERANCE)

  def test_nobody_chose_anybody(self):
    args = cases.tokens(0, np.full((17, 1), 4), SMALL.width)
    args += cases.matrices(jax.random.key(1), SMALL, False)
    self.assertFalse(np.float32(run_small(*args)).any())

  def test_wide_blocks_and_shallow_stages(self):
    shape = cases.Shape(experts=2, width=256, hidden=256)
    args = cases.tokens(0, np.array([[1]]), shape.width)
    args += cases.matrices(jax.random.key(1), shape, False)
    wide = tile_tables.DecodeTiles(columns=256, depth=64, stages=3, tokens=8)
    got = run_small(*args, up_tiles=wide, down_tiles=wide)
    want = cases.EXPECTED(*args)
    self.assertLess(cases.error(got, want), cases.TOLERANCE)

  @parameterized.product(count=(1, 64, 256), quantised=(False, True))
  def test_lowers_for_hopper_at_the_shapes_of_m2(self, count, quantised):
    args = jax.eval_shape(
      lambda: (
        *cases.tokens(0, np.zeros((count, 8)), M2.width),
        *cases.matrices(jax.random.key(0), M2, quantised),
      )
    )
    tiles = tile_tables.DecodeTiles(tokens=64 if quantised else 128)
    run = functools.partial(
      mosaic_gpu.decode_experts, up_tiles=tiles, down_tiles=tiles, blocks=132
    )
    exported = hopper_cases.export(run, *args)
    self.assertGreater(hopper_cases.kernels(exported), 0)

  @parameterized.parameters('mosaic_gpu', 'xla')
  def test_keeps_the_axes_over_which_operands_differ(self, impl):
    mesh = jax.make_mesh((1,), ('expert',))
    args = jax.eval_shape(
      lambda: (
        *cases.tokens(0, np.zeros((20, 2)), SMALL.width),
        *cases.matrices(jax.random.key(0), SMALL, True),
      )
    )
    run = {'mosaic_gpu': mosaic_gpu, 'xla': xla}[impl].decode_experts
    if impl == 'mosaic_gpu':
      run = functools.partial(run, blocks=132)

    def local(*args):
      return jax.lax.psum(run(*args), 'expert')

    def spread(z):
      sharding = jax.NamedSharding(mesh, jax.P('expert'))
      return jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=sharding)

    specs = (jax.P(),) * 3 + (jax.P('expert'),) * 3
    with jax.set_mesh(mesh):
      found = jax.eval_shape(
        jax.shard_map(local, in_specs=specs, out_specs=jax.P()),
        *args[:3],
        *jax.tree.map(spread, args[3:]),
      )
    self.assertEqual(found.shape, (20, SMALL.width))

  def test_tiles_are_cut_to_what_shared_memory_holds(self):
    for tokens in mosaic_gpu.WIDTHS:
      for depth in (64, 128, 256):
        tiles = tile_tables.DecodeTiles(depth=depth, stages=99, tokens=tokens)
        for quantised in (False, True):
          cut = mosaic_gpu.fit(tiles, (3072, 1536), 2, quantised, tokens, False)
          held = mosaic_gpu.shared_bytes(cut)
          self.assertLessEqual(held, mosaic_gpu.SHARED_BYTES, cut)
    tiles = tile_tables.DecodeTiles(columns=256, depth=256, tokens=128)
    with self.assertRaisesRegex(ValueError, 'two stages do not fit'):
      mosaic_gpu.fit(tiles, (3072, 1536), 2, True, 128, False)
    small = mosaic_gpu.fit(tiles, (384, 640), 1, True, 8, False)
    self.assertEqual((small.depth, small.columns), (128, 128))


@unittest.skipUnless(ON_GPU, 'the sizes of the model need a GPU')
class FullSizeTest(parameterized.TestCase):
  @staticmethod
  @functools.cache
  def experts(quantised):
    return cases.matrices(jax.random.key(0), M2, quantised)

  def check(self, index_MX, quantised):
    args = cases.tokens(len(index_MX), index_MX, M2.width)
    args += self.experts(quantised)
    want = cases.EXPECTED(*args)
    self.assertLess(cases.error(RUN(*args), want), cases.TOLERANCE)

  @parameterized.product(
    quantised=(False, True), count=(1, 8, 9, 16, 31, 64, 256)
  )
  def test_evenly(self, count, quantised):
    self.check(cases.choices(count, count, 8, M2.experts), quantised)

  @parameterized.product(quantised=(False, True), count=(8, 64, 256))
  def test_all_on_eight(self, count, quantised):
    self.check(100 + cases.choices(count, count, 8, 8), quantised)

  @parameterized.product(quantised=(False, True), count=(1, 64, 256))
  def test_a_shard(self, count, quantised):
    # Most choices lie elsewhere, on both sides.
    self.check(cases.choices(count, count, 8, 700) - 300, quantised)

  @parameterized.product(quantised=(False, True), count=(8, 256))
  def test_all_on_one(self, count, quantised):
    index_MX = np.full((count, 8), -1)
    index_MX[:, 5] = M2.experts - 1
    self.check(index_MX, quantised)

  @parameterized.product(quantised=(False, True), count=(8, 64))
  def test_runs_are_bitwise_equal(self, count, quantised):
    index_MX = cases.choices(count, count, 8, M2.experts)
    args = cases.tokens(count, index_MX, M2.width) + self.experts(quantised)
    first = np.asarray(RUN(*args)).view(np.uint16)
    for _ in range(10):
      again = np.asarray(RUN(*args)).view(np.uint16)
      np.testing.assert_array_equal(first, again)

  @parameterized.parameters(False, True)
  def test_what_memory_held_before_does_not_matter(self, quantised):
    index_MX = cases.choices(5, 64, 8, M2.experts)
    args = cases.tokens(5, index_MX, M2.width) + self.experts(quantised)
    rows = plans.rows(64, 8, M2.experts, 64)
    clean = np.asarray(RUN(*args)).view(np.uint16)
    for _ in range(3):
      poison = [
        jnp.full((rows, width), jnp.nan, jnp.bfloat16)
        for width in (M2.width, M2.hidden) * 4
      ]
      jax.block_until_ready(poison)
      del poison
      again = np.asarray(RUN(*args)).view(np.uint16)
      np.testing.assert_array_equal(clean, again)


if __name__ == '__main__':
  absltest.main()
