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


def small(operation):
  """One of the backend's products on the smallest tiles."""
  return functools.partial(operation, align=ALIGN, tiles=TILES, chip=CHIP)


class ExpertsMosaicTpuTest(parameterized.TestCase):
  # A group of one row, an empty one, one of two tiles, rows after the last.
  SIZES, ROWS = (3, 0, 50, 1), 112

  def assert_close(self, got, want, tolerance=TOLERANCE):
    row_cases.assert_close(self, got, want, tolerance)

  def test_up(self):
    sizes_E = jnp.asarray(self.SIZES, jnp.int32)
    owner_P, inside_P1, (x_PD,) = row_cases.rows_of(
      self.SIZES, self.ROWS, (DIM,), ALIGN
    )
    wi_0, wi_1 = row_cases.matrices(4, (DIM, HIDDEN), (DIM, HIDDEN))
    gate, up, act = small(mosaic_tpu.up)(x_PD, wi_0, wi_1, sizes_E, save=True)
    x = jnp.where(inside_P1, x_PD, 0).astype(jnp.float32)
    want = [
      jnp.einsum('pd,pdf->pf', x, w[jnp.minimum(owner_P, 3)].astype(x.dtype))
      for w in (wi_0, wi_1)
    ]
    for ours, spec in zip(
      (gate, up, act), (*want, jax.nn.silu(want[0]) * want[1])
    ):
      self.assert_close(ours, spec)
      self.assertFalse(np.float32(ours)[~np.asarray(inside_P1)[:, 0]].any())
    *none, alone = small(mosaic_tpu.up)(x_PD, wi_0, wi_1, sizes_E, save=False)
    self.assertEqual(none, [None, None])
    np.testing.assert_array_equal(np.float32(alone), np.float32(act))
    turned = [w.swapaxes(1, 2) for w in (wi_0, wi_1)]
    transposed = functools.partial(mosaic_tpu.up, transpose=True)
    *_, alone = small(transposed)(x_PD, *turned, sizes_E, save=False)
    np.testing.assert_array_equal(np.float32(alone), np.float32(act))

  def test_up_backward(self):
    sizes_E = jnp.asarray(self.SIZES, jnp.int32)
    owner_P, inside_P1, (dgate, dup) = row_cases.rows_of(
      self.SIZES, self.ROWS, (HIDDEN, HIDDEN), ALIGN
    )
    wi_0, wi_1 = row_cases.matrices(4, (DIM, HIDDEN), (DIM, HIDDEN))
    dx = small(mosaic_tpu.up_backward)(dgate, dup, wi_0, wi_1, sizes_E)
    want = sum(
      jnp.einsum(
        'pf,pdf->pd',
        jnp.where(inside_P1, dz, 0).astype(jnp.float32),
        w[jnp.minimum(owner_P, 3)].astype(jnp.float32),
      )
      for dz, w in ((dgate, wi_0), (dup, wi_1))
    )
    self.assert_close(dx, want)
    self.assertFalse(np.float32(dx)[~np.asarray(inside_P1)[:, 0]].any())

  def test_down_backward(self):
    sizes_E = jnp.asarray(self.SIZES, jnp.int32)
    owner_P, inside_P1, (dy, gate, up) = row_cases.rows_of(
      self.SIZES, self.ROWS, (DIM, HIDDEN, HIDDEN), ALIGN
    )
    (wo,) = row_cases.matrices(4, (HIDDEN, DIM))
    weight_P = jnp.where(
      inside_P1[:, 0], jax.random.uniform(jax.random.key(0), (self.ROWS,)), 0
    )
    got = small(mosaic_tpu.down_backward)(dy, wo, gate, up, weight_P, sizes_E)
    dy, gate, up = (
      jnp.where(inside_P1, z, 0).astype(jnp.float32) for z in (dy, gate, up)
    )
    wo = wo[jnp.minimum(owner_P, 3)].astype(jnp.float32)
    dact = jnp.einsum('pd,pfd->pf', dy, wo)
    act, pull = jax.vjp(lambda g, u: jax.nn.silu(g) * u, gate, up)
    want = (
      *pull(weight_P[:, None] * dact),
      weight_P[:, None] * act,
      (dact * act).sum(1),
    )
    for ours, spec in zip(got, want):
      self.assert_close(ours, spec)
      self.assertFalse(np.float32(ours)[~np.asarray(inside_P1)[:, 0]].any())
    self.assertEqual(got[3].dtype, jnp.float32)

  def test_layer_and_derivative(self):
    tokens, experts, top_k = 23, 5, 2
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (tokens, DIM)).astype(jnp.bfloat16)
    # Expert 3 gets nothing; index 5 is of no expert here.
    index = jax.random.choice(
      keys[1], jnp.asarray([0, 1, 2, 4, 5]), (tokens, top_k)
    )
    weight = jax.random.uniform(keys[2], (tokens, top_k))
    dy = jax.random.normal(keys[3], (tokens, DIM)).astype(jnp.bfloat16)
    ws = row_cases.matrices(
      experts, (DIM, HIDDEN), (DIM, HIDDEN), (HIDDEN, DIM)
    )
    cut = 'up', 'down', 'down_backward', 'up_backward', 'weight_gradient'
    backend = mosaic_tpu.BACKEND
    tiny = backend._replace(
      **{
        name: functools.partial(getattr(backend, name), tiles=TILES, chip=CHIP)
        for name in cut
      }
    )

    def run(layer):
      y, pull = jax.vjp(
        lambda x, weight, *ws: layer(x, index, weight, *ws), x, weight, *ws
      )
      return y, *pull(dy.astype(y.dtype))

    got = run(functools.partial(vjp.experts, tiny, 'xla', None, None))
    with jax.default_matmul_precision('highest'):
      want = run(ref.experts)
    for ours, spec in zip(got, want):
      self.assert_close(ours, spec)

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
