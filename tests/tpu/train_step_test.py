"""The train step compiles for TPU chips that are not here, sharded as meant."""

import pytest
from absl.testing import absltest

from m2.model import params
from tests.tpu import child, train_step

CHIP_BYTES = 16 * 2**30  # of one TPU v5e
# Of the state on one chip of four: a quarter, what is kept whole, and padding.
SHARE = 0.3


class TrainStepTest(absltest.TestCase):
  @pytest.mark.exhaustive  # plans of small models hold much the same
  def test_compiles_for_four_chips_and_is_sharded_over_all(self):
    (found,) = child.run(
      'tests.tpu.train_step', ['v5e:2x2', 'fsdp=2', 'expert=2']
    )
    self.assertEqual((found['device'], found['chips']), ('TPU v5 lite', 4))
    self.assertLess(found['peak_bytes'], CHIP_BYTES)
    # float32 weights and two moments.
    state_bytes = 12 * params.count(train_step.MODEL)
    self.assertLess(found['argument_bytes'], SHARE * state_bytes)
    self.check_donation(found)
    self.assertGreater(found['collectives']['all-gather'], 0, found)

  @pytest.mark.heavy
  def test_compiles_for_two_slices_that_only_the_data_axis_crosses(self):
    (found,) = child.run(
      'tests.tpu.train_step',
      ['v6e:2x2', 'data=4', 'context=2', 'slices=2'],
    )
    self.assertEqual(found['chips'], 8)
    self.assertEqual(found['slices_of_data'], [[0], [0], [1], [1]])
    self.check_donation(found)
    # Queries and outputs of both halves, there and back, and their gradients.
    self.assertGreaterEqual(found['collectives']['collective-permute'], 8)

  def check_donation(self, found):
    """The old state's becomes the new one's."""
    self.assertGreater(found['alias_bytes'], 0.99 * found['argument_bytes'])


if __name__ == '__main__':
  absltest.main()
