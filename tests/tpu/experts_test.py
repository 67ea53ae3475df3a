"""The expert layer compiles over TPUs that are not here, as it was written."""

import pytest
from absl.testing import absltest

from tests.tpu import child

# Rows and what is known of them go there, sums come back: forward, in rounds of
# the rest, and backward; the gradient of these rounds sends there once more.
MOVES = 3 + 3 + 3 + (3 + 2)


class ExpertsTest(absltest.TestCase):
  @pytest.mark.heavy
  def test_rows_are_exchanged_and_never_gathered(self):
    # All-to-alls tell sizes: forward, in rounds of the rest and their gradient.
    self.check('ragged', {'all-to-all': 3, 'ragged-all-to-all': MOVES})

  @pytest.mark.exhaustive
  def test_whole_blocks_are_exchanged(self):
    self.check('exchange', {'all-to-all': MOVES, 'ragged-all-to-all': 0})

  def check(self, strategy, want):
    (found,) = child.run('tests.tpu.experts', ['v5p:2x2x1', strategy, '1'])
    none = {'all-gather': 0, 'reduce-scatter': 0}
    self.assertEqual(found['collectives'], none | want)


if __name__ == '__main__':
  absltest.main()
