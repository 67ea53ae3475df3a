"""FP8 blocks: the format's arithmetic, and bytes that survive a round trip."""

from unittest import mock

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from m2.checkpoint import fp8, host

SHAPES = ((128, 128), (256, 384), (130, 200), (40, 300))


def random(shape, seed=0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def codes(shape, top: float, seed=0) -> np.ndarray:
  """Random codes up to `top`, which every block has once."""
  values = np.random.default_rng(seed).uniform(-top, top, shape)
  values[::128, ::128] = top
  return values.astype(fp8.DTYPE)


def scales(shape, seed=0) -> np.ndarray:
  powers = np.random.default_rng(seed).uniform(-12, 2, fp8.scale_shape(shape))
  return np.exp2(powers).astype(np.float32)


class Fp8Test(parameterized.TestCase):
  def test_dequantise_is_code_times_the_scale_of_its_block(self):
    shape = (130, 200)
    code, scale = codes(shape, 448), scales(shape)
    out = fp8.dequantise(code, scale)
    self.assertEqual(out.dtype, np.float32)
    for i, j in ((0, 0), (127, 127), (128, 0), (129, 199), (5, 128)):
      want = np.float32(code[i, j]) * scale[i // 128, j // 128]
      self.assertEqual(out[i, j], want)

  def test_every_code(self):
    code = np.tile(np.arange(256, dtype=np.uint8), (3, 1)).view(fp8.DTYPE)
    scale = np.array([[2.0**-9, 1e3]], np.float32)
    want = code.astype(np.float32) * np.repeat(scale, 128, axis=1)
    np.testing.assert_array_equal(fp8.dequantise(code, scale), want)
    self.assertEqual(np.isnan(want).sum(), 6)

  def test_a_part_cut_anywhere(self):
    code, scale = codes((300, 400), 448), scales((300, 400))
    out = np.empty((150, 200), np.float16)
    got = fp8.dequantise(code[70:220, 130:330], scale, out, (70, 130))
    want = fp8.dequantise(code, scale)[70:220, 130:330]
    np.testing.assert_array_equal(got, want.astype(np.float16))

  @parameterized.parameters(
    # Shape, whether it is the view of a transpose, its first row and column,
    # the weights' type, and codes of a strip at the most.
    ((300, 400), False, (0, 0), np.float32, 2**21),
    ((300, 400), True, (0, 0), ml_dtypes.bfloat16, 2**21),
    ((200, 300), True, (70, 130), np.float32, 2**9),
    ((7, 2100), False, (70, 130), ml_dtypes.bfloat16, 2**9),
  )
  def test_compiled_and_plain_give_the_same_bits(
    self, shape, flipped, first, dtype, strip
  ):
    rng = np.random.default_rng(shape)
    whole = tuple(n + at for n, at in zip(shape, first))
    code = rng.integers(0, 256, whole, np.uint8).view(fp8.DTYPE)
    scale = scales(whole)
    code = code[first[0] :, first[1] :]
    if flipped:
      code, scale, first = code.T, scale.T, first[::-1]
    found = []
    for device in (host.device(), None):
      out = np.empty(code.shape, dtype)
      with (
        mock.patch.object(fp8, '_STRIP', strip),
        mock.patch.object(host, 'LEAST', 1),
        mock.patch.object(host, 'device', lambda device=device: device),
      ):
        found.append(fp8.dequantise(code, scale, out, first).tobytes())
    self.assertEqual(*found)

  def test_weights_below_the_normal_numbers_are_kept(self):
    code = np.arange(256, dtype=np.uint8).view(fp8.DTYPE)[None]
    scale = np.array([[2.0**-130, 2.0**-125]], np.float32)
    want = code.astype(np.float32) * np.repeat(scale, 128, axis=1)
    self.assertGreater((np.abs(want[0, :100]) > 0).sum(), 90)
    np.testing.assert_array_equal(fp8.dequantise(code, scale), want)

  def test_codes_are_the_nearest_ties_to_even(self):
    value = np.arange(127, dtype=np.uint8).view(fp8.DTYPE).astype(np.float32)
    ties = (value[1:] + value[:-1]) / 2
    weight = np.zeros((128, 128), np.float32)
    points = [value, ties, *(np.nextafter(ties, x) for x in (-1, 1e9))]
    points = np.concatenate(points).astype(np.float32)
    weight.reshape(-1)[: 2 * points.size] = [*points, *-points]
    weight[-1, :2] = 448.0, 0.0  # the scale is 1
    code, scale = fp8.quantise(weight)
    self.assertEqual(scale[0, 0], 1)
    np.testing.assert_array_equal(
      code.view(np.uint8), weight.astype(fp8.DTYPE).view(np.uint8)
    )

  @parameterized.parameters(*SHAPES)
  def test_error_is_half_a_step(self, *shape):
    weight = random(shape)
    code, scale = fp8.quantise(weight)
    self.assertEqual(scale.shape, fp8.scale_shape(shape))
    error = np.abs(fp8.dequantise(code, scale) - weight)
    # Codes of the top binade are 32 apart; no weight is clipped.
    self.assertLessEqual(error.max(), 16 * scale.max() * (1 + 1e-6))
    peak = np.abs(weight[:128, :128]).max()
    self.assertEqual(np.abs(code[:128, :128].astype(np.float32)).max(), 448)
    self.assertAlmostEqual(scale[0, 0] * 448 / peak, 1, places=6)

  @parameterized.product(shape=SHAPES, top=(448.0, 416.0, 256.0, 240.0))
  def test_what_was_quantised_gets_its_bytes_back(self, shape, top):
    for seed in range(4):
      code, scale = codes(shape, top, seed), scales(shape, seed)
      again, scale_again = fp8.quantise(fp8.dequantise(code, scale))
      np.testing.assert_array_equal(scale_again, scale)
      np.testing.assert_array_equal(again.view('uint8'), code.view('uint8'))

  def test_power_of_two_scales_come_back_too(self):
    weight = random((256, 256))
    scale = np.exp2(
      np.ceil(np.log2(np.full((2, 2), np.abs(weight).max() / 448)))
    )
    scale = scale.astype(np.float32)
    code = (weight / scale[0, 0]).astype(fp8.DTYPE)
    again, scale_again = fp8.quantise(fp8.dequantise(code, scale))
    np.testing.assert_array_equal(scale_again, scale)
    np.testing.assert_array_equal(again.view('uint8'), code.view('uint8'))

  def test_values_stay_exact_where_the_scale_cannot_be_told(self):
    code, scale = codes((128, 128), 3.5), scales((128, 128))
    weight = fp8.dequantise(code, scale)
    np.testing.assert_array_equal(fp8.dequantise(*fp8.quantise(weight)), weight)

  @parameterized.parameters(0.0, -0.0, 1e-44, 3e38)
  def test_extreme_blocks_stay_finite(self, value):
    weight = np.full((130, 3), value, np.float32)
    code, scale = fp8.quantise(weight)
    self.assertTrue((scale > 0).all() and np.isfinite(scale).all())
    out = fp8.dequantise(code, scale)
    np.testing.assert_allclose(out, weight, rtol=1e-6, atol=1e-38)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(weight))

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_refuses_what_it_cannot_store(self, value):
    weight = random((130, 130))
    weight[129, 129] = value
    with self.assertRaisesRegex(ValueError, 'infinite or NaN'):
      fp8.quantise(weight)


if __name__ == '__main__':
  absltest.main()
