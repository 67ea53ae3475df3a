"""What is planned must be a program that the mesh can run."""

from absl.testing import absltest, parameterized

from m2 import config as settings
from m2.parallel import mesh as meshes
from m2.plan import programs
from tests.plan import search_test


class RowsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('train', {'data': {'batch': 36, 'shards': 12}}, r'data.batch=36 .* of 8,'),
    (
      'train',
      {'data': {'batch': 16, 'shards': 16}, 'optim': {'accumulate': 4}},
      'data.batch=16 is not a multiple of 32, .* times optim.accumulate=4',
    ),
    ('rl', {'forge': {'lines': 12}}, r'forge.lines=12 .* of 8,'),
    ('decode', {'engine': {'slots': 20}}, r'engine.slots=20 .* of 8,'),
    ('prefill', {'engine': {'slots': 20}}, r'engine.slots=20 .* of 8,'),
  )
  def test_rows_that_the_devices_cannot_share_are_named(
    self, program, sections, message
  ):
    run = search_test.planned(**sections)
    mesh = meshes.make_mesh(settings.MeshConfig(data=1, fsdp=2, expert=4))
    with self.assertRaisesRegex(ValueError, message):
      programs.PROGRAMS[program](run, mesh)


if __name__ == '__main__':
  absltest.main()
