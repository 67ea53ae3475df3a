"""What may change between start and resume, and where tokenizers come from."""

import copy
import pathlib

import jax.numpy as jnp
from absl.testing import absltest, parameterized

from m2 import config as settings
from m2.checkpoint import store
from m2.data import tokenizer
from m2.train import resume
from tests.train import small, worker


class ChangesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    words = tokenizer.train((row['text'] for row in worker.source()), 320)
    self.note = resume.note(small.run_config(), words)

  def change(self, path: str, value) -> list[str]:
    now = copy.deepcopy(self.note)
    node, names = now['config'], path.split('.')
    for name in names[:-1]:
      node = node[name]
    node[names[-1]] = value
    return resume.changes(self.note, now, 'here')

  def test_nothing_changed(self):
    self.assertEqual(resume.changes(self.note, self.note, 'here'), [])

  @parameterized.parameters(
    ('seed', 3),
    ('model.rope_theta', 1e4),
    ('data.batch', 4),
    ('data.workers', 1),
    ('optim.name', 'muon'),
    ('optim.moment', 'bfloat16'),
    ('optim.train_only', 'mtp'),
  )
  def test_another_run_is_refused(self, path, value):
    with self.assertRaisesRegex(
      ValueError, rf'here holds .* settings: {path} was .*, is {value!r}. Set'
    ):
      self.change(path, value)

  @parameterized.parameters(
    ('steps', 99),
    ('optim.lr', 1.0),
    ('model.remat', 'full'),
    ('model.expert_strategy', 'gather'),
    ('model.expert_chunks', 2),
    ('data.prefetch', 9),
    ('mesh.fsdp', 4),
    ('log.every', 1),
  )
  def test_what_may_change_is_said(self, path, value):
    (line,) = self.change(path, value)
    self.assertRegex(line, f'changed setting: {path} was .*, is {value!r}')

  def test_a_leaf_that_did_not_exist_before_counts(self):
    del self.note['config']['model']['norm_eps']
    now = resume.note(
      small.run_config(),
      tokenizer.train((row['text'] for row in worker.source()), 320),
    )
    with self.assertRaisesRegex(ValueError, 'norm_eps was None'):
      resume.changes(self.note, now, 'here')

  def test_another_tokenizer_is_refused(self):
    other = self.note | {'tokenizer': 'x'}
    with self.assertRaisesRegex(ValueError, 'data.tokenizer was'):
      resume.changes(self.note, other, 'here')

  def test_other_rows_are_refused_where_they_were_noted(self):
    now = self.note | {'rows': '3 rows, like 0'}
    self.assertEqual(resume.changes(self.note, now, 'here'), [])
    other = now | {'rows': '4 rows, like 1'}
    with self.assertRaisesRegex(ValueError, "data was '3 rows, like 0', is '4"):
      resume.changes(now, other, 'here')

  def test_settings_are_compared_before_arrays(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    now = copy.deepcopy(self.note)
    now['config']['optim']['name'] = 'muon'
    with store.Store(folder) as checkpoints:
      params = {'params': {'w': jnp.ones(3)}}
      checkpoints.save(params, None, step=1, extra=self.note)
      checkpoints.wait()
      with self.assertRaisesRegex(ValueError, "optim.name was 'adamw'"):
        resume.begin(small.run_config(), None, None, checkpoints, None, now)
      self.assertTrue(resume.begun(checkpoints))

  def test_converted_weights_are_no_run(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    with store.Store(folder / 'checkpoints') as checkpoints:
      self.assertFalse(resume.begun(checkpoints))
      params, extra = {'params': {'w': jnp.ones(3)}}, {'config': {'model': {}}}
      checkpoints.save(params, None, step=0, extra=extra, asynchronous=False)
      message = f'no.* run: .* checkpoint.init_from={folder} and another'
      with self.assertRaisesRegex(ValueError, message):
        resume.begun(checkpoints)
      config = small.run_config()
      with self.assertRaisesRegex(ValueError, message):
        resume.begin(config, None, None, checkpoints, None, self.note)


class TokenizerTest(parameterized.TestCase):
  @parameterized.parameters('', 'checkpoints', 'checkpoints/4')
  def test_the_start_brings_its_tokenizer(self, below):
    start = pathlib.Path(self.create_tempdir().full_path)
    (start / 'checkpoints' / '4').mkdir(parents=True)
    (start / 'tokenizer.json').write_text('{}')
    cfg = small.run_config(checkpoint={'init_from': str(start / below)})
    found = resume.data_config(cfg, resumed=False)
    path = pathlib.Path(found.tokenizer)
    self.assertTrue(path.samefile(start / 'tokenizer.json'))
    self.assertEqual(found.batch, cfg.data.batch)

  def test_a_public_models_neighbours_are_not_asked(self):
    above = pathlib.Path(self.create_tempdir().full_path)
    (above / 'model').mkdir()
    (above / 'tokenizer.json').write_text('{}')
    cfg = small.run_config(checkpoint={'init_from': str(above / 'model')})
    with self.assertRaisesRegex(
      ValueError, r'no tokenizer.json in .*/model; .* in data\.tokenizer'
    ):
      resume.data_config(cfg, resumed=False)
    # A run that has begun has one in its workdir.
    self.assertEqual(resume.data_config(cfg, resumed=True).tokenizer, '')

  def test_a_start_that_is_not_there(self):
    cfg = small.run_config(checkpoint={'init_from': '/does/not/exist'})
    with self.assertRaisesRegex(store.CheckpointError, 'not a directory'):
      resume.data_config(cfg, resumed=False)

  def test_a_tokenizer_that_is_named_comes_first(self):
    start = pathlib.Path(self.create_tempdir().full_path)
    (start / 'tokenizer.json').write_text('{}')
    cfg = small.run_config(
      checkpoint={'init_from': str(start)}, data={'tokenizer': 'mine.json'}
    )
    found = resume.data_config(cfg, resumed=False)
    self.assertEqual(found.tokenizer, 'mine.json')

  def test_looking_does_not_count_as_reading(self):
    start = pathlib.Path(self.create_tempdir().full_path)
    (start / 'tokenizer.json').write_text('{}')
    cfg = small.run_config(checkpoint={'init_from': str(start)})
    settings.Settings.READS.clear()
    resume.data_config(cfg, resumed=False)
    self.assertIn('data.examples', settings.unread(cfg))


if __name__ == '__main__':
  absltest.main()
