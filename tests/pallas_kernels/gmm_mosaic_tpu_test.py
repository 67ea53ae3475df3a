"""The TPU products against the specification, interpreted on a CPU.

The interpreter simulates vector memory that holds NaN until it is written,
copies that land as late as they may, semaphores, and cores as threads; the
same kernels are compiled for TPUs by `tests/tpu/kernels_test.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels import tiles_tpu
from pallas_kernels.gmm import mosaic_tpu, stream_tpu, vjp, xla
from tests.pallas_kernels import programs, row_cases

BF16_TOLERANCE = 5e-3  # in norm: one rounding of the result
FP32_TOLERANCE = 1e-5
TILES = tiles_tpu.Tiles(rows=32, chunk=32, rest=16)
SIMULATED = pltpu.InterpretParams(num_cores_or_threads=2)


def chip(cores=1, interpret=SIMULATED):
  return dataclasses.replace(
    tiles_tpu.INTERPRETED, cores=cores, interpret=interpret
  )


def backend(tiles=TILES, on=None):
  on = on or chip(cores=2)
  return vjp.Backend(
    mosaic_tpu.alignment,
    functools.partial(mosaic_tpu.product, tiles=tiles, chip=on),
    functools.partial(mosaic_tpu.weight_gradient, tiles=tiles, chip=on),
  )


def both(ours, x_MK, w_GKN, sizes_G, dy_MN, align, out_dtype=jnp.bfloat16):
  """y, dx and dw of a backend."""
  product = functools.partial(
    vjp.grouped_matmul, ours, align=align, out_dtype=out_dtype
  )
  return programs.with_gradients(product, (x_MK, w_GKN), dy_MN, sizes_G)


class MosaicTpuTest(parameterized.TestCase):
  def assert_close(self, got, want, tolerance):
    row_cases.assert_close(self, got, want, tolerance)

  @parameterized.named_parameters(
    # A group of one row, an empty one, one of two tiles, rows after the last.
    ('mixed', [3, 0, 50, 1, 0], 16, 144),
    ('all_on_one', [0, 0, 70, 0], 16, 80),
    ('nothing', [0, 0, 0], 16, 48),
    ('wider_alignment', [1, 0, 33], 64, 192),
    ('one_group', [64], 16, 64),
  )
  def test_product_and_derivative(self, sizes, align, rows):
    x_MK, w_GKN, sizes_G, dy_MN, inside_M1 = row_cases.operands(
      sizes, align, rows, 128, 256
    )
    got = both(backend(), x_MK, w_GKN, sizes_G, dy_MN, align)
    x_MK, w_GKN, dy_MN = row_cases.cleared(x_MK, w_GKN, dy_MN)
    with jax.default_matmul_precision('highest'):
      want = both(xla.BACKEND, x_MK, w_GKN, sizes_G, dy_MN, align, jnp.float32)
    for ours, spec in zip(got, want):
      self.assertEqual(ours.dtype, jnp.bfloat16)
      self.assert_close(ours, spec, BF16_TOLERANCE)
    outside_M = ~inside_M1[:, 0]
    self.assertFalse(np.float32(got[0])[outside_M].any())
    self.assertFalse(np.float32(got[1])[outside_M].any())
    self.assertFalse(np.float32(got[2])[np.asarray(sizes) == 0].any())

  def test_groups_may_start_anywhere(self):
    x_MK, w_GKN, sizes_G, dy_MN, _ = row_cases.operands(
      [7, 0, 1], 1, 9, 128, 128
    )
    got = both(backend(), x_MK, w_GKN, sizes_G, dy_MN, 1)
    x_MK, w_GKN, dy_MN = (
      z.astype(jnp.bfloat16) for z in row_cases.cleared(x_MK, w_GKN, dy_MN)
    )
    want = both(xla.BACKEND, x_MK, w_GKN, sizes_G, dy_MN, 1)
    for ours, spec in zip(got, want):
      self.assert_close(ours, spec, BF16_TOLERANCE)

  def test_parts_of_columns_and_float32_results(self):
    self.check_parts(chip(2))

  @pytest.mark.heavy
  def test_parts_in_the_interpreter_of_a_forced_backend(self):
    self.check_parts(chip(1, True))

  def check_parts(self, on):
    tiles = tiles_tpu.Tiles(rows=32, chunk=16, rest=16, stages=3, columns=128)
    x_MK, w_GKN, sizes_G, dy_MN, _ = row_cases.operands(
      [5, 66], 16, 96, 256, 256
    )
    ours = backend(tiles, on)
    options = {'align': 16, 'out_dtype': jnp.float32}

    @jax.jit
    def run(x, w, sizes, dy):
      return (
        ours.product(x, w, sizes, transpose=False, **options),
        ours.product(dy, w, sizes, transpose=True, **options),
        ours.weight_gradient(x, dy, sizes, **options),
      )

    got = run(x_MK, w_GKN, sizes_G, dy_MN)
    x_MK, w_GKN, dy_MN = row_cases.cleared(x_MK, w_GKN, dy_MN)
    with jax.default_matmul_precision('highest'):
      want = both(xla.BACKEND, x_MK, w_GKN, sizes_G, dy_MN, 16, jnp.float32)
    for found, spec in zip(got, want):
      self.assertEqual(found.dtype, jnp.float32)
      self.assert_close(found, spec, FP32_TOLERANCE)

  def test_no_races_and_bitwise_equal_runs(self):
    x_MK, w_GKN, sizes_G, dy_MN, _ = row_cases.operands(
      [3, 0, 50, 1], 16, 112, 128, 128
    )
    options = {'align': 16, 'out_dtype': jnp.bfloat16}
    runs = []
    for seed in (0, 1):
      params = pltpu.InterpretParams(
        num_cores_or_threads=2, detect_races=True, random_seed=seed
      )
      ours = backend(on=chip(2, params))
      plain = functools.partial(ours.product, transpose=False)
      transposed = functools.partial(ours.product, transpose=True)
      # One at a time: races are forgotten when the next kernel begins.
      runs.append([])
      for kernel, a, b in (
        (plain, x_MK, w_GKN),
        (transposed, dy_MN, w_GKN),
        (ours.weight_gradient, x_MK, dy_MN),
      ):
        found = jax.jit(functools.partial(kernel, **options))(a, b, sizes_G)
        runs[-1].append(np.float32(found))
        self.assertFalse(races_found())
    jax.tree.map(np.testing.assert_array_equal, *runs)

  def test_forced_on_a_cpu_it_is_interpreted(self):
    x_MK, w_GKN, sizes_G, *_ = row_cases.operands([7, 4], 16, 32, 128, 128)
    product = jax.jit(
      pallas_kernels.grouped_matmul, static_argnames=('align', 'impl')
    )
    y_MN = product(x_MK, w_GKN, sizes_G, align=16, impl='mosaic_tpu')
    x_MK, w_GKN = row_cases.cleared(x_MK, w_GKN)
    want = product(x_MK, w_GKN, sizes_G, align=16, impl='xla')
    self.assert_close(y_MN, want, BF16_TOLERANCE)

  @parameterized.named_parameters(
    ('one_group_of_no_power_of_two', [41], 48),
    ('rows_past_the_last_alignment', [10, 3], 33),
  )
  def test_any_number_of_rows(self, sizes, rows):
    x_MK, w_GKN, sizes_G, dy_MN, inside_M1 = row_cases.operands(
      sizes, 16, rows, 128, 128
    )
    product = functools.partial(
      pallas_kernels.grouped_matmul, align=16, impl='mosaic_tpu'
    )
    args = (x_MK, w_GKN), dy_MN, sizes_G
    got = programs.with_gradients(product, *args)
    x_MK, w_GKN, dy_MN = row_cases.cleared(x_MK, w_GKN, dy_MN)
    with jax.default_matmul_precision('highest'):
      want = both(xla.BACKEND, x_MK, w_GKN, sizes_G, dy_MN, 16, jnp.float32)
    for ours, spec in zip(got, want, strict=True):
      self.assert_close(ours, spec, BF16_TOLERANCE)
    self.assertFalse(np.float32(got[0])[~inside_M1[:, 0]].any())

  def test_keeps_the_axes_over_which_operands_differ(self):
    mesh = jax.make_mesh((1,), ('expert',))
    rows = jax.P('expert')

    def local(x, w, sizes, dy):
      return both(backend(), x, w, sizes, dy, 16)

    with jax.set_mesh(mesh):
      shapes = [
        jax.ShapeDtypeStruct(
          shape, dtype, sharding=jax.NamedSharding(mesh, rows)
        )
        for shape, dtype in (
          ((64, 128), jnp.bfloat16),
          ((2, 128, 256), jnp.bfloat16),
          ((2,), jnp.int32),
          ((64, 256), jnp.bfloat16),
        )
      ]
      found = jax.eval_shape(
        jax.shard_map(local, in_specs=(rows,) * 4, out_specs=(rows,) * 3),
        *shapes,
      )
    self.assertEqual(
      [z.shape for z in found], [(64, 256), (64, 128), (2, 128, 256)]
    )

  def test_refuses_what_it_cannot_do(self):
    refusal = functools.partial(mosaic_tpu.refusal, out_dtype=jnp.bfloat16)
    self.assertIn('float32', refusal(jnp.dtype('float32'), (128, 128)))
    self.assertIn('128', refusal(jnp.dtype('bfloat16'), (128, 96)))
    self.assertIsNone(refusal(jnp.dtype('bfloat16'), (128, 128)))
    with absltest.mock.patch.object(tiles_tpu, 'here', return_value=None):
      self.assertIn('TPU v6', refusal(jnp.dtype('bfloat16'), (128, 128)))


def races_found():
  # Where jax keeps it; there is no public name yet.
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  return interpret_pallas_call.races.races_found


class PlanTest(parameterized.TestCase):
  @parameterized.parameters(1, 2)
  def test_every_row_is_written_once_by_its_group(self, cores):
    rng = np.random.default_rng(cores)
    groups, rows, tile = 6, 1024, 128
    plan_of = jax.jit(stream_tpu.plan, static_argnums=(1, 2, 3, 4))
    for trial in range(40):
      align = (16, 64)[trial % 2]
      law = rng.dirichlet([0.3] * groups)
      sizes = rng.multinomial(int(rng.integers(0, 600)), law)
      plan = jax.tree.map(np.asarray, plan_of(sizes, rows, align, tile, cores))
      writes, owner = np.zeros(rows, int), np.full(rows, groups)
      for core in range(cores):
        held = None
        for t in range(plan.first_C[core], plan.first_C[core + 1]):
          row, group = plan.row_T[t], plan.group_T[t]
          self.assertEqual(plan.extent_T[t] % stream_tpu.ALIGN, 0)
          writes[row : row + plan.extent_T[t]] += 1
          owner[row : row + plan.valid_T[t]] = group
          if held is None or plan.turn_T[t] != held[0]:
            self.assertTrue(held is None or held[1] == t)  # as announced
            held = plan.turn_T[t], plan.next_T[t], group
          self.assertEqual(held, (plan.turn_T[t], plan.next_T[t], group))
      np.testing.assert_array_equal(writes, 1)
      np.testing.assert_array_equal(owner, row_cases.OWNERS(sizes, rows, align))

  @parameterized.parameters(1, 2)
  def test_gradients_visit_every_group_on_one_core(self, cores):
    rng = np.random.default_rng(cores)
    groups, rows, tile, align = 6, 1024, 128, 16
    plan_of = jax.jit(mosaic_tpu.gradient_plan, static_argnums=(1, 2, 3, 4))
    for _ in range(40):
      law = rng.dirichlet([0.3] * groups)
      sizes = rng.multinomial(int(rng.integers(0, 600)), law)
      plan = jax.tree.map(np.asarray, plan_of(sizes, rows, align, tile, cores))
      owner, where = np.full(rows, groups), {}
      for core in range(cores):
        for t in range(plan.first_C[core], plan.first_C[core + 1]):
          group, row = plan.group_T[t], plan.row_T[t]
          self.assertEqual(where.setdefault(group, core), core)
          owner[row : row + plan.valid_T[t]] = group
      self.assertLen(where, groups)
      np.testing.assert_array_equal(owner, row_cases.OWNERS(sizes, rows, align))


class TilesTpuTest(absltest.TestCase):
  def test_grow_with_groups_until_memory_ends(self):
    on = tiles_tpu.CHIPS['TPU v5']
    sizes = [
      mosaic_tpu.product_tiles(
        on, mean, 3072, 1536, jnp.dtype('bfloat16'), False
      ).rows
      for mean in (1, 4, 32, 256, 4096)
    ]
    self.assertEqual(sizes, [16, 16, 32, 256, tiles_tpu.MAX_ROWS])

  def test_columns_are_parted_where_a_matrix_does_not_fit(self):
    for kind, on in tiles_tpu.CHIPS.items():
      tiles = mosaic_tpu.product_tiles(
        on, 256, 8192, 8192, jnp.dtype('bfloat16'), False
      )
      self.assertGreater(tiles.columns, 0, kind)
      self.assertLess(2 * 2 * 8192 * tiles.columns, on.vmem_limit)
      self.assertEqual(8192 % tiles.columns, 0)

  def test_bad_tiles_are_named(self):
    with self.assertRaisesRegex(ValueError, 'rows=100'):
      tiles_tpu.Tiles(rows=100)
    with self.assertRaisesRegex(ValueError, 'rest <= chunk'):
      tiles_tpu.Tiles(rows=64, chunk=128)
    with self.assertRaisesRegex(ValueError, '2 stages'):
      tiles_tpu.Tiles(stages=1)


if __name__ == '__main__':
  absltest.main()
