"""Transposes on the host's processor: the bytes that NumPy's own give."""

from unittest import mock

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from m2.checkpoint import host


class TransposeTest(parameterized.TestCase):
  @parameterized.product(
    shape=((4, 4), (128, 260), (5, 8), (8, 6), (1, 16), (0, 8)),
    dtype=(ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16),
    compiled=(True, False),
  )
  def test_is_a_matrix_in_order(self, shape, dtype, compiled):
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    x = data.view(dtype).reshape(shape)
    device = host.device() if compiled else None
    with (
      mock.patch.object(host, 'LEAST', 1),
      mock.patch.object(host, 'device', lambda: device),
    ):
      got = host.transpose(x)
    self.assertTrue(got.flags.c_contiguous)
    self.assertEqual(got.shape, shape[::-1])
    self.assertEqual(got.dtype, x.dtype)
    self.assertEqual(got.tobytes(), x.T.tobytes())

  def test_of_a_part_of_a_matrix(self):
    x = np.arange(240, dtype=np.uint8).reshape(12, 20)[2:10, 4:16]
    with mock.patch.object(host, 'LEAST', 1):
      np.testing.assert_array_equal(host.transpose(x), x.T)


if __name__ == '__main__':
  absltest.main()
