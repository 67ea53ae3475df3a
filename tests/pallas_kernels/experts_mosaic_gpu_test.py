"""The fused expert layer for Hopper against the specification.

Interpreted on a CPU, on the smallest tiles; compiled on a Hopper GPU:
`python -m tests.pallas_kernels.experts_mosaic_gpu_test`.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import hopper
from pallas_kernels import tiles as tile_tables
from pallas_kernels.experts import mosaic_gpu, ref, vjp
from pallas_kernels.gmm import gathered
from pallas_kernels.permute import api as permute
from pallas_kernels.permute import xla
from tests.pallas_kernels import hopper_cases, row_cases

TOLERANCE = 8e-3  # in norm: bfloat16 results of bfloat16 intermediate values
DIM, HIDDEN, ALIGN = 128, 256, 8
ROW_TILES = tile_tables.RowTiles(rows=(8, 40, 72), stages=2)
BLOCKS = 4  # two clusters of two


def jitted(name, **options):
  """`small`, of rows aligned as here, as one program."""
  return jax.jit(functools.partial(small(name), align=ALIGN, **options))


class ExpertsMosaicGpuTest(parameterized.TestCase):
  # A group of one row, an empty one, one of two tiles, and more rows after the
  # last than are set to zero: an interpreted kernel leaves NaN there.
  SIZES, END = (3, 0, 130, 1), 152
  CLEARED = END + mosaic_gpu.CLEAR
  ROWS = CLEARED + 24

  def assert_close(self, got, want, tolerance=TOLERANCE):
    row_cases.assert_close(self, got, want, tolerance)

  @parameterized.parameters(True, False)
  def test_up(self, save):
    sizes_E = np.asarray(self.SIZES, np.int32)
    owner_P, _, (x_PD,) = row_cases.rows_of(
      self.SIZES, self.ROWS, (DIM,), ALIGN
    )
    ws = row_cases.matrices(4, (DIM, HIDDEN), (DIM, HIDDEN))
    with hopper_cases.compiled_here():
      got = jitted('up', save=save)(x_PD, *ws, sizes_E)
    want = row_cases.up(x_PD, *ws, owner_P)
    cleared = slice(self.CLEARED)
    for ours, spec in zip(got, want, strict=True):
      if ours is not None:
        self.assert_close(np.float32(ours)[cleared], spec[cleared])
    self.assertEqual([z is None for z in got], [not save, not save, False])

  def test_up_backward(self):
    sizes_E = np.asarray(self.SIZES, np.int32)
    owner_P, _, dz = row_cases.rows_of(
      self.SIZES, self.ROWS, (HIDDEN, HIDDEN), ALIGN
    )
    ws = row_cases.matrices(4, (DIM, HIDDEN), (DIM, HIDDEN))
    with hopper_cases.compiled_here():
      dx = jitted('up_backward')(*dz, *ws, sizes_E)
    want = row_cases.up_backward(*dz, *ws, owner_P)
    self.assert_close(np.float32(dx)[: self.END], want[: self.END])

  def test_down_backward(self):
    self.check_down_backward(HIDDEN)

  @pytest.mark.heavy
  def test_down_backward_of_a_narrow_layer(self):
    self.check_down_backward(128)

  def check_down_backward(self, hidden):
    sizes_E = np.asarray(self.SIZES, np.int32)
    owner_P, inside_P1, (dy, gate, up) = row_cases.rows_of(
      self.SIZES, self.ROWS, (DIM, hidden, hidden), ALIGN
    )
    (wo,) = row_cases.matrices(4, (hidden, DIM))
    gate, up = (z.astype(jnp.bfloat16) for z in row_cases.cleared(gate, up))
    args = dy, wo, gate, up, row_cases.weights(inside_P1)
    with hopper_cases.compiled_here():
      got = jitted('down_backward')(*args, sizes_E)
    want = row_cases.down_backward(*args, owner_P)
    cleared = slice(self.CLEARED)
    for ours, spec in zip(got, want, strict=True):
      self.assert_close(np.float32(ours)[cleared], spec[cleared])
    outside = ~inside_P1[cleared, 0]
    self.assertFalse(np.float32(got[2])[cleared][outside].any())

  def test_rows_that_do_not_fit_shared_memory(self):
    shapes = [((6, 128), 'bfloat16')] * 3 + [((6,), 'float32')]
    rng = np.random.default_rng(5)
    args = [rng.standard_normal(shape).astype(kind) for shape, kind in shapes]

    def run(*args):
      return mosaic_gpu._swiglu_backward(*args, np.int32(6), blocks=2)

    with hopper_cases.compiled_here():
      want = jax.jit(run)(*args)
    with mock.patch.object(hopper, 'SHARED', 0):
      text = jax.make_jaxpr(lambda *args: run(*args))(*args).pretty_print()
      got = jax.jit(lambda *args: run(*args))(*args)
    self.assertNotIn('swiglu_backward', text)
    for found, spec in zip(got, want, strict=True):
      self.assertEqual(found.dtype, spec.dtype)
      self.assert_close(np.float32(found), np.float32(spec))

  def test_layer_and_derivative(self):
    self.compare(90, 0.8)

  @pytest.mark.heavy
  def test_layer_and_derivative_of_a_few_tokens(self):
    self.compare(23, 0.1)

  def compare(self, tokens, elsewhere):
    given = row_cases.layer(tokens, DIM, HIDDEN, elsewhere)
    tiny = vjp.Backend(
      alignment=mosaic_gpu.BACKEND.alignment,
      clear=mosaic_gpu.BACKEND.clear,
      rows=mosaic_gpu.BACKEND.rows,
      up=small('up'),
      down=small('down'),
      down_backward=small('down_backward'),
      up_backward=small('up_backward'),
      weight_gradient=functools.partial(
        mosaic_gpu.BACKEND.weight_gradient,
        tiles=tile_tables.Tiles(columns=128, stages=2, band=2),
        blocks=2,
      ),
    )

    ours = functools.partial(vjp.experts, tiny, 'xla', None, None)
    moves = xla.MOVES._replace(gather=gather_and_poison)
    with (
      hopper_cases.compiled_here(),
      mock.patch.dict(permute.MOVES, {'xla': moves}),
    ):
      got = row_cases.layer_with_gradients(ours, *given)
    with jax.default_matmul_precision('highest'):
      want = row_cases.layer_with_gradients(ref.experts, *given)
    for found, spec in zip(got, want, strict=True):
      self.assert_close(found, spec)

  @parameterized.parameters(
    'up', 'looked_up', 'down', 'down_backward', 'up_backward'
  )
  def test_lowers_for_hopper_at_the_shapes_of_m2(self, name):
    experts, rows, wide, hidden = 256, 65536 + 2048, 3072, 1536

    def shape(*dims, dtype=jnp.bfloat16):
      return jax.ShapeDtypeStruct(dims, dtype)

    operands = {
      'up': (shape(rows, wide), *[shape(experts, wide, hidden)] * 2),
      'looked_up': (
        shape(8192, wide),
        shape(rows, dtype=jnp.int32),
        *[shape(experts, wide, hidden)] * 2,
      ),
      'down': (shape(rows, hidden), shape(experts, hidden, wide)),
      'down_backward': (
        shape(rows, wide),
        shape(experts, hidden, wide),
        *[shape(rows, hidden)] * 2,
        shape(rows, dtype=jnp.float32),
      ),
      'up_backward': (
        *[shape(rows, hidden)] * 2,
        *[shape(experts, wide, hidden)] * 2,
      ),
    }[name]

    def looked_up(x, source, *args, **options):
      found = gathered.Rows(x, source, 8)
      return mosaic_gpu.up(found, *args, save=True, **options)

    call = functools.partial(
      looked_up if name == 'looked_up' else getattr(mosaic_gpu, name),
      align=8,
      blocks=132,
      tiles=one_count(tile_tables.ROW_TILES['many']),
      **({'save': True} if name == 'up' else {}),
    )
    exported = hopper_cases.export(
      call, *operands, shape(experts, dtype=jnp.int32)
    )
    self.assertGreater(hopper_cases.kernels(exported), 0)


class ResidualsTest(absltest.TestCase):
  def test_input_and_preactivations_alone_are_kept(self):
    tokens, experts, top_k, wide, hidden = 8192, 256, 8, 3072, 1536
    tiles = one_count(tile_tables.ROW_TILES['many'])
    options = {'tiles': tiles, 'blocks': 132}
    layer = functools.partial(
      vjp.experts,
      mosaic_gpu.BACKEND._replace(
        up=functools.partial(mosaic_gpu.up, **options),
        down=functools.partial(mosaic_gpu.down, **options),
      ),
      'xla',
      None,
      None,
    )

    def shape(*dims, dtype=jnp.bfloat16):
      return jax.ShapeDtypeStruct(dims, dtype)

    matrix = shape(experts, wide, hidden)
    kept = jax.eval_shape(
      lambda x, index, weight, *ws: jax.vjp(
        lambda x, weight, *ws: layer(x, index, weight, *ws), x, weight, *ws
      )[1],
      shape(tokens, wide),
      shape(tokens, top_k, dtype=jnp.int32),
      shape(tokens, top_k, dtype=jnp.float32),
      matrix,
      matrix,
      shape(experts, hidden, wide),
    )
    size = sum(
      z.size * z.dtype.itemsize
      for z in jax.tree.leaves(kept)
      if z.shape[0] != experts
    )
    self.assertLess(size, 480 * 2**20)
    # No gathered input, no output of the down projection.
    rows = [z for z in jax.tree.leaves(kept) if z.shape[1:] == (wide,)]
    self.assertEqual([z.shape for z in rows], [(tokens, wide)])

  def test_gradients_keep_the_axes_over_which_operands_differ(self):
    mesh = jax.make_mesh((1,), ('expert',))
    spec = jax.P('expert')
    tiles = {'tiles': tile_tables.RowTiles(rows=(64,)), 'blocks': 132}
    layer = functools.partial(
      vjp.experts,
      mosaic_gpu.BACKEND._replace(
        up=functools.partial(mosaic_gpu.up, **tiles),
        down=functools.partial(mosaic_gpu.down, **tiles),
        down_backward=functools.partial(mosaic_gpu.down_backward, **tiles),
        up_backward=functools.partial(mosaic_gpu.up_backward, **tiles),
        weight_gradient=functools.partial(
          mosaic_gpu.BACKEND.weight_gradient,
          tiles=tile_tables.Tiles(),
          blocks=132,
        ),
      ),
      'xla',
      None,
      None,
    )

    def local(x, index, weight, *ws):
      y, pull = jax.vjp(
        lambda x, weight, *ws: layer(x, index, weight, *ws), x, weight, *ws
      )
      return y, *pull(y)

    def shape(*dims, dtype=jnp.bfloat16):
      return jax.ShapeDtypeStruct(
        dims, dtype, sharding=jax.NamedSharding(mesh, spec)
      )

    with jax.set_mesh(mesh):
      found = jax.eval_shape(
        jax.shard_map(local, in_specs=(spec,) * 6, out_specs=(spec,) * 6),
        shape(16, 256),
        shape(16, 2, dtype=jnp.int32),
        shape(16, 2, dtype=jnp.float32),
        shape(4, 256, 256),
        shape(4, 256, 256),
        shape(4, 256, 256),
      )
    self.assertEqual([z.shape for z in found[3:]], [(4, 256, 256)] * 3)


def one_count(tiles):
  """The same with code for one row count: lowering takes seconds each."""
  return dataclasses.replace(tiles, rows=tiles.rows[-1:])


def gather_and_poison(x_MD, plan, clear):
  """Rows at their places, and NaN where they may hold anything."""
  x_PD = xla.gather(x_MD, plan)
  end = plan.start_G[-1] + plan.sizes_G[-1] + clear
  return jnp.where((jnp.arange(len(x_PD)) < end)[:, None], x_PD, jnp.nan)


def small(name):
  """One of the backend's products on the smallest tiles."""
  return functools.partial(
    getattr(mosaic_gpu, name), tiles=ROW_TILES, blocks=BLOCKS
  )


if __name__ == '__main__':
  absltest.main()
