"""The fused expert layer for TPUs against the specification, interpreted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles_tpu
from pallas_kernels.experts import mosaic_tpu, ref, vjp
from tests.pallas_kernels import row_cases

TOLERANCE = 8e-3  # in norm: bfloat16 results of bfloat16 intermediate values
DIM, HIDDEN, ALIGN = 128, 256, 16
TILES = tiles_tpu.Tiles(rows=32, chunk=32, rest=16)
# Memory that holds NaN until written, copies as late as may be, two cores.
CHIP = dataclasses.replace(
  tiles_tpu.INTERPRETED,
  cores=2,
  interpret=pltpu.InterpretParams(num_cores_or_threads=2),
)


def jitted(operation, **options):
  """One of the backend's products on the smallest tiles."""
  return jax.jit(
    functools.partial(operation, align=ALIGN, tiles=TILES, chip=CHIP, **options)
  )


class ExpertsMosaicTpuTest(parameterized.TestCase):
  # A group of one row, an empty one, one of two tiles, rows after the last.
  SIZES, ROWS = (3, 0, 50, 1), 112

  def assert_close(self, got, want, tolerance=TOLERANCE):
    row_cases.assert_close(self, got, want, tolerance)

  def test_up(self):
    sizes_E = np.asarray(self.SIZES, np.int32)
    owner_P, inside_P1, (x_PD,) = row_cases.rows_of(
      self.SIZES, self.ROWS, (DIM,), ALIGN
    )
    ws = row_cases.matrices(4, (DIM, HIDDEN), (DIM, HIDDEN))
    found = jitted(mosaic_tpu.up, save=True)(x_PD, *ws, sizes_E)
    want = row_cases.up(x_PD, *ws, owner_P)
    for ours, spec in zip(found, want, strict=True):
      self.assert_close(ours, spec)
      self.assertFalse(np.float32(ours)[~inside_P1[:, 0]].any())
    *none, alone = jitted(mosaic_tpu.up, save=False)(x_PD, *ws, sizes_E)
    self.assertEqual(none, [None, None])
    np.testing.assert_array_equal(np.float32(alone), np.float32(found[2]))
    turned = [np.asarray(w).swapaxes(1, 2) for w in ws]
    transposed = jitted(mosaic_tpu.up, save=False, transpose=True)
    *_, alone = transposed(x_PD, *turned, sizes_E)
    np.testing.assert_array_equal(np.float32(alone), np.float32(found[2]))

  def test_up_backward(self):
    sizes_E = np.asarray(self.SIZES, np.int32)
    owner_P, inside_P1, dz = row_cases.rows_of(
      self.SIZES, self.ROWS, (HIDDEN, HIDDEN), ALIGN
    )
    ws = row_cases.matrices(4, (DIM, HIDDEN), (DIM, HIDDEN))
    dx = jitted(mosaic_tpu.up_backward)(*dz, *ws, sizes_E)
    self.assert_close(dx, row_cases.up_backward(*dz, *ws, owner_P))
    self.assertFalse(np.float32(dx)[~inside_P1[:, 0]].any())

  def test_down_backward(self):
    sizes_E = np.asarray(self.SIZES, np.int32)
    owner_P, inside_P1, (dy, gate, up) = row_cases.rows_of(
      self.SIZES, self.ROWS, (DIM, HIDDEN, HIDDEN), ALIGN
    )
    (wo,) = row_cases.matrices(4, (HIDDEN, DIM))
    weight_P = row_cases.weights(inside_P1)
    args = dy, wo, gate, up, weight_P
    got = jitted(mosaic_tpu.down_backward)(*args, sizes_E)
    want = row_cases.down_backward(*args, owner_P)
    for ours, spec in zip(got, want, strict=True):
      self.assert_close(ours, spec)
      self.assertFalse(np.float32(ours)[~inside_P1[:, 0]].any())
    self.assertEqual(got[3].dtype, jnp.float32)

  def test_layer_and_derivative(self):
    given = row_cases.layer(23, DIM, HIDDEN)
    cut = 'up', 'down', 'down_backward', 'up_backward', 'weight_gradient'
    backend = mosaic_tpu.BACKEND
    tiny = backend._replace(
      **{
        name: functools.partial(getattr(backend, name), tiles=TILES, chip=CHIP)
        for name in cut
      }
    )
    ours = functools.partial(vjp.experts, tiny, 'xla', None, None)
    got = row_cases.layer_with_gradients(ours, *given)
    with jax.default_matmul_precision('highest'):
      want = row_cases.layer_with_gradients(ref.experts, *given)
    for found, spec in zip(got, want, strict=True):
      self.assert_close(found, spec)

  def test_refuses_matrices_that_do_not_fit(self):
    bf16 = jnp.dtype('bfloat16')
    self.assertIsNone(mosaic_tpu.refusal(bf16, (3072, 1536)))
    self.assertIn('MiB', mosaic_tpu.refusal(bf16, (8192, 4096)))
    self.assertIn(
      'float32', mosaic_tpu.refusal(jnp.dtype('float32'), (128,) * 2)
    )

  def test_tiles_of_m2_fit_every_chip_and_any_batch(self):
    for kind, chip in tiles_tpu.CHIPS.items():
      for mean in (1, 19, 271, 1039, 8207):
        for choose in (
          mosaic_tpu.up_tiles,
          mosaic_tpu.down_backward_tiles,
          mosaic_tpu.up_backward_tiles,
        ):
          self.assertIsNotNone(choose(chip, mean, 3072, 1536), (kind, mean))


if __name__ == '__main__':
  absltest.main()
