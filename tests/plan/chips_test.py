"""Topologies by name, and what their links carry."""

from types import SimpleNamespace

import numpy as np
from absl.testing import absltest, parameterized

from m2.plan import chips

GB = 10**9


def mesh(coords, sizes, axes, slices=None):
  """A mesh of devices at these places."""
  devices = np.empty(len(coords), object)
  for i, place in enumerate(coords):
    devices[i] = SimpleNamespace(
      coords=place, slice_index=slices[i] if slices else 0
    )
  return SimpleNamespace(
    axis_names=axes,
    devices=devices.reshape(sizes),
    shape=dict(zip(axes, sizes)),
  )


class TopologyTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v5p:8x8x8', 512, 512),
    ('v5e:4x8', 32, 32),
    ('v6e:16x16', 256, 256),
    ('tpu7x:4x4x8', 128, 256),
  )
  def test_devices(self, text, count, devices):
    found = chips.topology(text)
    self.assertEqual((found.chips, found.count), (count, devices))
    self.assertEqual(found.name, text)

  @parameterized.parameters(
    ('v5p', 'CHIP:SIDES'),
    ('v7:4x4', 'v5e, v5p, v6e, tpu7x'),
    ('v5p:8x8', '3 sides'),
    ('v5e:2x2x2', '2 sides'),
    ('v5e:0x2', '2 sides'),
  )
  def test_a_wrong_name_says_what_is_right(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      chips.topology(text)

  def test_a_ring_of_a_torus_is_used_both_ways(self):
    target = chips.topology('v5p:4x4x4')
    places = [(x, y, 0) for x in range(4) for y in range(4)]
    one = mesh(places, (4, 4), ('a', 'b'))
    self.assertEqual(chips.axis_rate(one, 'a', target), 200 * GB)
    both = mesh(places, (16, 1), ('a', 'b'))
    self.assertEqual(chips.axis_rate(both, 'a', target), 400 * GB)

  def test_a_line_that_does_not_close_is_used_one_way(self):
    target = chips.topology('v6e:4x4')
    line = mesh([(x, 0) for x in range(4)], (4,), ('a',))
    self.assertEqual(chips.axis_rate(line, 'a', target), 100 * GB)
    part = mesh([(x, 0, 0) for x in range(4)], (4,), ('a',))
    self.assertEqual(
      chips.axis_rate(part, 'a', chips.topology('v5p:8x8x8')), 100 * GB
    )

  def test_slices_are_joined_by_the_data_center_network(self):
    places = [(0, 0, 0), (0, 0, 0)]
    two = mesh(places, (2,), ('data',), slices=[0, 1])
    target = chips.topology('v5p:2x2x1', 2)
    self.assertEqual(chips.axis_rate(two, 'data', target), 50 * GB / 8)
    self.assertEqual(target.chips, 8)
    # What two devices of a slice have is the same: once over DCN is enough.
    places = [(0, 0, 0), (1, 0, 0)] * 2
    four = mesh(places, (4,), ('data',), slices=[0, 0, 1, 1])
    self.assertEqual(chips.axis_rate(four, 'data', target), 3 * 50 * GB / 8)


if __name__ == '__main__':
  absltest.main()
