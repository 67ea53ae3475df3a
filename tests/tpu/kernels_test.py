"""The TPU kernels compile for chips that are not here, at the shapes of M2."""

import pytest
from absl.testing import absltest, parameterized

from tests.tpu import child

TOPOLOGIES = {
  'TPU v5': 'v5p:2x2x1',
  'TPU v6 lite': 'v6e:2x2',
  'TPU7x': 'tpu7x:2x2x1',
}
# None has less vector memory: what fits there should fit the others.
SAMPLED = 'TPU7x'
# Each operation where a group has a few hundred rows; for one chip also with
# thousands and with a handful.
STREAMED = (
  'up:8192:256', 'down:8192:256', 'down_backward:8192:256',
  'up_backward:8192:256', 'transposed:8192:256', 'weight_gradient:8192:256',
)  # fmt: skip
SIZES = {
  SAMPLED: (
    'weight_gradient_fp32:32768:32', 'up:32768:256', 'up:128:256',
    'down_backward:32768:32',
  ),
}  # fmt: skip
OTHERS = (
  'gather:8192:256', 'combine:8192:256', 'route:8192:256',
  'attention:8192:256',
)  # fmt: skip
MOST = 1.1  # bytes over the ideal
# The bookkeeping of a plan, beside the work of the products.
FLOPS_TOLERANCE = 1e-3
# Rows of the worst case over those of 128 tokens that are there.
PADDED = 4864 / 1024


class KernelsTest(parameterized.TestCase):
  @pytest.mark.heavy
  def test_compile_and_stay_near_the_ideal(self):
    self.check_kernels(SAMPLED)

  @pytest.mark.heavy
  def test_layer_and_derivative_compile_as_one(self):
    self.check_layer(SAMPLED)

  @parameterized.parameters(*sorted(TOPOLOGIES.keys() - {SAMPLED}))
  @pytest.mark.exhaustive
  def test_other_chips(self, kind):
    self.check_kernels(kind)
    self.check_layer(kind)

  def check_kernels(self, kind):
    cases = *STREAMED, *SIZES.get(kind, ()), *OTHERS
    # That they compile says that they fit the chip's vector memory.
    found = child.run('tests.tpu.kernels', [TOPOLOGIES[kind], *cases])
    self.assertLen(found, len(cases))
    for row in found:
      with self.subTest(f'{row["operation"]}:{row["tokens"]}'):
        self.assertEqual(row['device'], kind)
        if 'matrix_bytes' not in row:
          continue
        # What the compiler counts is what the kernel declares and XLA adds.
        self.assertAlmostEqual(
          row['flops'] / row['flops_analytic'], 1, delta=FLOPS_TOLERANCE
        )
        self.assertLess(row['bytes'], MOST * row['bytes_ideal'])
        # What its plan copies for routed tokens is counted, not declared.
        self.assertLess(row['moved_over_ideal'], MOST)
        # Not one matrix is copied, or turned, in memory; numbers of rows,
        # spread over lanes, are.
        temp = row['temp_bytes'] - row['padding_bytes']
        self.assertLess(temp, row['matrix_bytes'] / row['experts'])

  def check_layer(self, kind):
    (row,) = child.run('tests.tpu.kernels', [TOPOLOGIES[kind], 'layer:128:256'])
    self.assertAlmostEqual(
      row['flops'] / row['flops_analytic'], PADDED, delta=0.1 * PADDED
    )
    # With few rows all that is left is what nobody should copy: the matrices.
    self.assertLess(row['temp_bytes'], 0.1 * row['bytes_ideal'] / 9)


if __name__ == '__main__':
  absltest.main()
