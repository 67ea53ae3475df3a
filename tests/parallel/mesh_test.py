"""The mesh: sizes, slices, which devices are next to each other."""

import dataclasses

import jax
import numpy as np
from absl.testing import absltest, parameterized

from m2 import config
from m2.parallel import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Chip:
  """What arranging reads of a device."""

  id: int
  slice_index: int
  platform: str = 'tpu'
  device_kind: str = 'any'

  @property
  def coords(self) -> tuple[int, int, int]:
    """A torus of 4x2 in each slice."""
    return (self.id % 4, self.id // 4 % 2, 0)

  core_on_chip: int = 0


def chips(slices: int, platform: str = 'tpu') -> list[Chip]:
  """Slices of eight chips, listed in turns: order must not matter."""
  return [
    Chip(8 * part + i, part, platform)
    for i in range(8)
    for part in range(slices)
  ]


class SliceTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(data=-1, slices=2),
    dict(data=2, fsdp=4, tensor=2, slices=2),
    dict(data=4, expert=4, slices=4, context=2),
    dict(data=4, fsdp=2, expert=2, tensor=2, slices=4),
  )
  def test_only_the_data_axis_crosses_slices(self, **sizes):
    cfg = config.MeshConfig(**sizes)
    array = meshes.arrange(cfg, chips(cfg.slices))
    self.assertEqual(array.size, 8 * cfg.slices)
    self.assertLen({chip.id for chip in array.flat}, array.size)
    blocks = array.reshape(cfg.slices, -1)
    for index, block in enumerate(blocks):
      self.assertEqual({chip.slice_index for chip in block}, {index})

  def test_slices_that_are_not_there_are_named(self):
    cases = (
      (dict(slices=1), chips(2), 'mesh.slices=1 .* 16 devices are in 2'),
      (dict(slices=4, data=4, fsdp=4), chips(2), 'set mesh.slices=2'),
      (dict(slices=2), jax.devices(), 'mesh.slices=2 .* 8 devices are in 1'),
      (dict(slices=2, data=-1, fsdp=16), chips(2), 'mesh.data=1 .*slices=2'),
    )
    for sizes, devices, message in cases:
      with self.assertRaisesRegex(ValueError, message):
        meshes.make_mesh(config.MeshConfig(**sizes), devices)
    with self.assertRaisesRegex(ValueError, 'mesh.data=3 .*mesh.slices=2'):
      config.MeshConfig(data=3, slices=2)._check()

  def test_one_mesh_may_span_gpus_of_several_hosts(self):
    array = meshes.arrange(config.MeshConfig(expert=16), chips(2, 'gpu'))
    np.testing.assert_array_equal(
      [chip.id for chip in array.flat], np.arange(16)
    )


class SizesTest(absltest.TestCase):
  def test_the_free_axis_takes_what_is_left(self):
    mesh = meshes.make_mesh(config.MeshConfig(context=2, tensor=2))
    self.assertEqual(
      dict(mesh.shape), dict(data=2, fsdp=1, expert=1, context=2, tensor=2)
    )

  def test_a_side_of_the_torus_may_be_cut(self):
    cfg = config.MeshConfig(fsdp=2, context=2, tensor=2)
    self.assertEqual(meshes.arrange(cfg, chips(1)).shape, (1, 2, 1, 2, 2))

  def test_sizes_that_do_not_fit_are_named(self):
    with self.assertRaisesRegex(
      ValueError, 'context=3, tensor=1: .* 8 devices'
    ):
      meshes.make_mesh(config.MeshConfig(context=3))


if __name__ == '__main__':
  absltest.main()
