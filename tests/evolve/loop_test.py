"""Where a round may start from; whole rounds are in tests/stages_test.py."""

import pathlib

from absl.testing import absltest, parameterized

from m2 import config as m2_config
from m2.evolve import loop


class StartingPointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = pathlib.Path(self.create_tempdir().full_path).resolve()
    self.run = root / 'rl'
    (self.run / 'checkpoints' / '9').mkdir(parents=True)
    (self.run / 'tokenizer.json').write_text('{}')

  @parameterized.parameters(
    ('', ''), ('checkpoints', ''), ('checkpoints/9', 'checkpoints/9')
  )
  def test_folders_of_checkpoints_have_the_tokenizer_of_their_run(
    self, named, base
  ):
    start = m2_config.RunConfig(
      mode='evolve',
      data=m2_config.DataConfig(source='tasks'),
      tasks=m2_config.TasksConfig(skills=(('add_col', 1.0), ('drop_col', 1.0))),
      checkpoint=m2_config.CheckpointConfig(init_from=str(self.run / named)),
      evolve=m2_config.EvolveConfig(),
    )
    found = loop.starting_point(start)
    self.assertEqual(found, self.run / base)
    words = loop.with_tokenizer(start, found).data.tokenizer
    self.assertEqual(words, str(self.run / 'tokenizer.json'))


if __name__ == '__main__':
  absltest.main()
