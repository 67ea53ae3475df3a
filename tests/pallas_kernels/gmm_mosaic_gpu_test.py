"""The Hopper products against the specification.

On a CPU the kernels run in Pallas' interpreter, which simulates warpgroups,
bulk copies and barriers, on the smallest tiles; on a Hopper GPU the same tests
run the compiled kernels: `python -m tests.pallas_kernels.gmm_mosaic_gpu_test`.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import tiles as tile_tables
from pallas_kernels.experts import mosaic_gpu as experts
from pallas_kernels.gmm import (
  api,
  gathered,
  layout,
  mosaic_gpu,
  panels,
  ref,
  vjp,
)
from tests.pallas_kernels import hopper_cases, programs, row_cases

BF16_TOLERANCE = 5e-3  # in norm: one rounding of the result
FP32_TOLERANCE = 1e-5
TILES = tile_tables.Tiles(columns=128, stages=2, band=2)
ROW_TILES = tile_tables.RowTiles(rows=(8, 64, 72), stages=2, cluster=1)
BLOCKS = 2  # persistent blocks, so that each walks several tiles


def backend(tiles=TILES, blocks=BLOCKS, rows=ROW_TILES):
  return vjp.Backend(
    mosaic_gpu.alignment,
    functools.partial(mosaic_gpu.product, tiles=rows, blocks=blocks),
    functools.partial(mosaic_gpu.weight_gradient, tiles=tiles, blocks=blocks),
  )


def expected(x_MK, w_GKN, sizes_G, dy_MN, align):
  """y, dx and dw in float32 by the specification."""
  x_MK, w_GKN, dy_MN = row_cases.cleared(x_MK, w_GKN, dy_MN)
  spec = functools.partial(
    ref.grouped_matmul, align=align, out_dtype=jnp.float32
  )
  with jax.default_matmul_precision('highest'):
    return programs.with_gradients(spec, (x_MK, w_GKN), dy_MN, sizes_G)


class MosaicGpuTest(parameterized.TestCase):
  def test_product_and_derivative(self):
    # A group of one row, an empty one, one of two tiles, rows after the last.
    sizes, align, rows = [3, 0, 130, 1], 8, 168
    x_MK, w_GKN, sizes_G, dy_MN, inside_M1 = row_cases.operands(
      sizes, align, rows, 128, 128
    )
    product = functools.partial(
      vjp.grouped_matmul, backend(), align=align, out_dtype=x_MK.dtype
    )
    with hopper_cases.compiled_here():
      got = programs.with_gradients(product, (x_MK, w_GKN), dy_MN, sizes_G)
    want = expected(x_MK, w_GKN, sizes_G, dy_MN, align)
    for ours, spec in zip(got, want):
      self.assertEqual(ours.dtype, jnp.bfloat16)
      row_cases.assert_close(self, ours, spec, BF16_TOLERANCE)
    self.assertFalse(np.float32(got[0])[~inside_M1[:, 0]].any())
    self.assertFalse(np.float32(got[2])[np.asarray(sizes) == 0].any())

  def test_groups_may_start_anywhere(self):
    x_MK, w_GKN, sizes_G, dy_MN, _ = row_cases.operands(
      [7, 0, 1], 1, 9, 128, 128
    )
    product = functools.partial(
      vjp.grouped_matmul, backend(), align=1, out_dtype=x_MK.dtype
    )
    with hopper_cases.compiled_here():
      y_MN = jax.jit(product)(x_MK, w_GKN, sizes_G)
    want = expected(x_MK, w_GKN, sizes_G, dy_MN, 1)
    row_cases.assert_close(self, y_MN, want[0], BF16_TOLERANCE)

  def test_shared_copies_and_float32_results(self):
    sizes, rows = [5, 66], 80
    tiles = tile_tables.Tiles(columns=128, stages=2, cluster=2, staging=3)
    x_MK, w_GKN, sizes_G, dy_MN, _ = row_cases.operands(
      sizes, 8, rows, 256, 128
    )
    rows_of = tile_tables.RowTiles(rows=(16, 40), stages=2, staging=3)
    ours = backend(tiles, 2 * BLOCKS, rows_of)
    options = {'align': 8, 'out_dtype': jnp.float32}

    @jax.jit
    def run(x, w, sizes, dy):
      y = ours.product(x, w, sizes, transpose=False, **options)
      return y, ours.weight_gradient(x, dy, sizes, **options)

    with hopper_cases.compiled_here():
      y_MN, dw_GKN = run(x_MK, w_GKN, sizes_G, dy_MN)
    want = expected(x_MK, w_GKN, sizes_G, dy_MN, 8)
    row_cases.assert_close(self, y_MN, want[0], FP32_TOLERANCE)
    row_cases.assert_close(self, dw_GKN, want[2], FP32_TOLERANCE)

  def test_runs_are_bitwise_equal(self):
    if jax.default_backend() != 'gpu':
      self.skipTest('the interpreter is sequential; a GPU is not')
    x_MK, w_GKN, sizes_G, *_ = row_cases.operands(
      [900, 0, 70], 8, 1024, 512, 512
    )

    @jax.jit
    def run(x, w):
      y, pull = jax.vjp(
        lambda x, w: api.grouped_matmul(
          x, w, sizes_G, align=8, impl='mosaic_gpu'
        ),
        x,
        w,
      )
      return y, *pull(y)

    first = run(x_MK, w_GKN)
    for _ in range(5):
      for a, b in zip(first, run(x_MK, w_GKN)):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))

  def test_blocks_without_rows_hold_nobody_up(self):
    if jax.default_backend() != 'gpu':
      self.skipTest('the interpreter has one warp a warpgroup; a GPU has four')
    # Nine pairs of tiles of 136 rows hold a group, and the last has no rows.
    size, groups, wide, hidden = 17 * 136, 32, 3072, 1536
    keys = jax.random.split(jax.random.key(0), 2)
    w_GKN = jax.random.normal(keys[0], (groups, wide, hidden), jnp.bfloat16)
    x_MK = jax.random.normal(keys[1], (size * groups, wide), jnp.bfloat16)
    sizes_G = jnp.full(groups, size, jnp.int32)
    source_P = jnp.arange(size * groups, dtype=jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(looked_up, x, w, sizes, source):
      if not looked_up:
        return mosaic_gpu.product(
          x, w, sizes, align=8, transpose=False, out_dtype=x.dtype
        )
      rows = gathered.Rows(x, source, 1)
      *_, y = experts.up(rows, w, w, sizes, align=8, save=False)
      return y

    for looked_up in (False, True):
      operands = looked_up, x_MK, w_GKN, sizes_G, source_P
      first = run(*operands)
      for _ in range(200):
        y_MN = run(*operands)
      np.testing.assert_array_equal(np.float32(y_MN), np.float32(first))

  @parameterized.product(
    operation=('product', 'transposed', 'weight_gradient'),
    out_dtype=(jnp.bfloat16, jnp.float32),
  )
  def test_lowers_for_hopper_at_the_shapes_of_m2(self, operation, out_dtype):
    wide, hidden, experts, rows = 3072, 1536, 256, 65536 + 2048
    options = {'align': 8, 'out_dtype': out_dtype, 'blocks': 132}
    if operation == 'weight_gradient':
      call = functools.partial(
        mosaic_gpu.weight_gradient, tiles=tile_tables.Tiles()
      )
      second = rows, hidden
    else:
      transpose = operation == 'transposed'
      call = functools.partial(
        mosaic_gpu.product,
        tiles=tile_tables.RowTiles(rows=(144,)),
        transpose=transpose,
      )
      second = experts, *((hidden, wide) if transpose else (wide, hidden))
    shapes = (
      jax.ShapeDtypeStruct((rows, wide), jnp.bfloat16),
      jax.ShapeDtypeStruct(second, jnp.bfloat16),
      jax.ShapeDtypeStruct((experts,), jnp.int32),
    )
    exported = hopper_cases.export(functools.partial(call, **options), *shapes)
    self.assertGreater(hopper_cases.kernels(exported), 0)

  def test_keeps_the_axes_over_which_operands_differ(self):
    mesh = jax.make_mesh((1,), ('expert',))
    rows = jax.P('expert')
    ours = backend(tile_tables.Tiles(), 132, tile_tables.RowTiles())

    def local(x, w, sizes):
      y, pull = jax.vjp(
        lambda x, w: vjp.grouped_matmul(
          ours, x, w, sizes, align=8, out_dtype=x.dtype
        ),
        x,
        w,
      )
      return y, *pull(y)

    with jax.set_mesh(mesh):
      shapes = [
        jax.ShapeDtypeStruct(
          shape, dtype, sharding=jax.NamedSharding(mesh, rows)
        )
        for shape, dtype in (
          ((1024, 256), jnp.bfloat16),
          ((8, 256, 512), jnp.bfloat16),
          ((8,), jnp.int32),
        )
      ]
      found = jax.eval_shape(
        jax.shard_map(local, in_specs=(rows,) * 3, out_specs=(rows,) * 3),
        *shapes,
      )
    self.assertEqual([z.shape for z in found[1:]], [(1024, 256), (8, 256, 512)])

  def test_refuses_what_it_cannot_do(self):
    refusal = functools.partial(mosaic_gpu.refusal, out_dtype=jnp.bfloat16)
    self.assertIn('float32', refusal(jnp.dtype('float32'), (128, 128)))
    self.assertIn('128', refusal(jnp.dtype('bfloat16'), (128, 96)))
    if jax.default_backend() == 'gpu':
      self.skipTest('nothing else is refused on a Hopper GPU')
    x_MK, w_GKN, sizes_G, *_ = row_cases.operands([8], 8, 8, 128, 128)
    with self.assertRaisesRegex(NotImplementedError, 'needs a Hopper GPU'):
      pallas_kernels.grouped_matmul(x_MK, w_GKN, sizes_G, impl='mosaic_gpu')

  def test_a_cluster_needs_its_blocks(self):
    x_MK, w_GKN, sizes_G, *_ = row_cases.operands([8], 8, 8, 128, 128)
    with self.assertRaisesRegex(ValueError, 'blocks=1 are fewer'):
      mosaic_gpu.product(
        x_MK, w_GKN, sizes_G, align=8, transpose=False, out_dtype=x_MK.dtype,
        tiles=tile_tables.RowTiles(), blocks=1,
      )  # fmt: skip

  def test_tiles_must_divide(self):
    x_MK, _, sizes_G, dy_MN, _ = row_cases.operands([8], 8, 8, 128, 128)
    with self.assertRaisesRegex(ValueError, '128 columns'):
      backend(tile_tables.Tiles()).weight_gradient(
        x_MK, dy_MN, sizes_G, align=8, out_dtype=x_MK.dtype
      )


class StagingTest(parameterized.TestCase):
  """No slot is written while a bulk copy may still read it, across tiles.

  A copy runs beside the kernel, and waiting lets the newest few go on: neither
  the interpreter nor a GPU at rest shows a wait that is too short.
  """

  def setUp(self):
    super().setUp()
    self.going = []  # slots that copies may still read, oldest first

    def wait(newest, wait_read_only):
      self.assertTrue(wait_read_only)
      del self.going[: max(0, len(self.going) - newest)]

    self.enter_context(
      mock.patch.object(panels.plgpu, 'wait_smem_to_gmem', wait)
    )
    self.enter_context(mock.patch.object(panels, 'masked', lambda z, *_: z))

  def write(self, slot):
    self.assertNotIn(slot, self.going)
    self.going.append(slot)

  def store(self, values, y, place, first, columns, staged):
    del values, y, place, first, columns
    self.write(staged)

  @parameterized.product(
    staging=(1, 2, 3, 4), count=(8, 64, 128, 136, 144), panel_count=(1, 2)
  )
  def test_rows(self, staging, count, panel_count):
    tiles = tile_tables.RowTiles(staging=staging)
    form = panels.Form(
      1, panel_count, False, False, tiles, panels.CHUNK, jnp.bfloat16
    )
    place = panels.Place(0, count, count, range(panel_count), 0)
    values = [np.ones((64, count), np.float32)] * panel_count
    smem = mock.MagicMock()
    smem.at.__getitem__ = lambda _, at: at[1]  # the slot
    with mock.patch.object(panels, 'store', self.store):
      for _ in range(3):
        mosaic_gpu._store_sums(place, values, count, [None], smem, form=form)
      for save in (False, True) if panel_count == 2 else ():
        for _ in range(3):
          experts._store_activations(
            place, values, count, [None] * 3, smem, form=form, save=save
          )

  @parameterized.product(staging=(1, 2, 3, 4), columns=(128, 256))
  def test_columns(self, staging, columns):
    test, total = self, np.ones((64, columns), np.float32)

    class Slot:
      dtype = np.float32

      def __init__(self, slot):
        self.slot = slot

      def __setitem__(self, where, values):
        test.write(self.slot)

    smem = mock.MagicMock()
    smem.shape = staging, 64, 64
    smem.at.__getitem__ = lambda _, slot: Slot(slot)
    with mock.patch.multiple(
      mosaic_gpu.plgpu,
      commit_smem=mock.DEFAULT,
      copy_smem_to_gmem=mock.DEFAULT,
    ):
      for _ in range(3):
        mosaic_gpu._store_columns(total, mock.MagicMock(), 0, smem)


class SegmentsTest(absltest.TestCase):
  def test_rows_are_written_once_by_their_group_or_left(self):
    rng = np.random.default_rng(0)
    groups, rows, most = 6, 1024, 40
    plan_of = jax.jit(layout.segments, static_argnums=(1, 2, 3, 4, 5))
    for trial in range(60):
      align, members = (8, 64)[trial % 2], 1 + trial % 3
      law = rng.dirichlet([0.3] * groups)
      sizes = rng.multinomial(int(rng.integers(0, 600)), law)
      clear = (None, 0, 16)[trial % 3]
      plan = plan_of(sizes, rows, align, most, members, clear)
      plan = jax.tree.map(np.asarray, plan)
      writes, owner = np.zeros(rows, int), np.full(rows, groups)
      found = zip(*(z[: plan.count_1[0]] for z in plan[:-1]))
      for group, row, tile, valid, extent in found:
        self.assertEqual([tile % 8, extent % 8, row % 8], [0, 0, 0])
        self.assertBetween(tile, 8, most)
        self.assertLessEqual(extent, tile * members)
        writes[row : row + extent] += 1
        owner[row : row + valid] = group
      end = (-(-sizes // align) * align).sum()
      last = rows if clear is None else end + clear
      np.testing.assert_array_equal(writes, np.arange(rows) < last)
      np.testing.assert_array_equal(owner, row_cases.OWNERS(sizes, rows, align))


if __name__ == '__main__':
  absltest.main()
