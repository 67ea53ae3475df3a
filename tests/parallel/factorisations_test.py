"""Experts over eight devices in every way to cut them: the same layer."""

import itertools
import math

import pytest
from absl.testing import absltest, parameterized

from tests.parallel import routings

# Those of (data, fsdp, expert, context, tensor) that cut the experts.
SIZES = [
  sizes
  for sizes in itertools.product((1, 2, 4, 8), repeat=5)
  if math.prod(sizes) == 8 and sizes[2] > 1
]
WAYS = (
  # strategy, chunks, whether the slices have too little room
  ('gather', 2, False),
  ('exchange', 2, True),
  ('ragged', 2, True),
)


class FactorisationsTest(parameterized.TestCase):
  @parameterized.product(sizes=SIZES, way=WAYS)
  @pytest.mark.exhaustive
  def test_equals_one_device(self, sizes, way):
    self.compare(sizes, way)

  @parameterized.parameters(*zip(SIZES, itertools.cycle(WAYS)))
  @pytest.mark.heavy
  def test_equals_one_device_one_way(self, sizes, way):
    self.compare(sizes, way)

  def compare(self, sizes, way):
    strategy, chunks, tight = way
    error = routings.largest_error(sizes, strategy, chunks, tight=tight)
    self.assertLess(error, routings.TOLERANCE)


if __name__ == '__main__':
  absltest.main()
