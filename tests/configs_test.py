"""String arguments of config files, and what the variants are."""

import json

from absl.testing import absltest, parameterized

from configs import common, eval, m2, quickstart, rerun, rl, sft
from m2 import config as settings
from m2.envs import tasks
from m2.model import params


class ArgumentTest(parameterized.TestCase):
  def test_words_and_leaves(self):
    words, leaves = common.parse_arg(
      ' tiny, steps=20,optim.lr = 1e-3', ('tiny',)
    )
    self.assertEqual(words, {'tiny'})
    self.assertEqual(leaves, {'steps': '20', 'optim.lr': '1e-3'})
    self.assertEqual(common.parse_arg(''), (frozenset(), {}))

  @parameterized.parameters(
    ('tiny', (), "'tiny' is unknown"),
    ('tiny,tiny', ('tiny',), "'tiny' is given twice"),
    ('a=1,a=2', (), "'a' is given twice"),
    ('=3', (), "'' is not a setting"),
    ('steps', (), "'steps' is unknown"),
  )
  def test_what_is_not_understood_is_named(self, arg, words, message):
    with self.assertRaisesRegex(ValueError, message):
      common.set_leaves(m2.get_config(), common.parse_arg(arg, words)[1])

  def test_leaves_keep_their_types(self):
    config = m2.get_config('tiny,steps=7,optim.lr=1,optim.bias_decay=False')
    self.assertEqual(config.steps, 7)
    self.assertIsInstance(config.optim.lr, float)
    self.assertIs(config.optim.bias_decay, False)

  @parameterized.parameters(
    ('steps=1.5', 'steps=.1.5.: expected int'),
    ('optim.lr=fast', 'expected float'),
    ('log.tensorboard=1', 'expected bool'),
    ('optim.lrr=1', 'did you mean optim.lr'),
    ('optim=1', 'not a setting'),
    ('optim.lr.x=1', 'not a setting'),
    ('model.layers.=1', 'not a setting'),
  )
  def test_a_wrong_leaf_is_named(self, arg, message):
    with self.assertRaisesRegex(ValueError, message):
      m2.get_config(f'tiny,{arg}')

  def test_default_workdirs(self):
    for name, expected in {
      'configs/m2.py': 'runs/m2',
      'configs/m2.py:e64,tiny': 'runs/m2-e64-tiny',
      '/somewhere/my.py:a=b': 'runs/somewhere-my-a-b',
    }.items():
      self.assertEqual(common.workdir(name), expected)


class VariantTest(parameterized.TestCase):
  def model(self, arg) -> settings.ModelConfig:
    return settings.RunConfig.from_config(m2.get_config(arg)).model

  def test_full_shape(self):
    self.assertEqual(params.count(self.model('')), 228_689_764_864)

  def test_tiny_keeps_the_ratios(self):
    full, tiny = self.model(''), self.model('tiny')
    for ratio in (
      lambda m: m.heads / m.kv_heads,
      lambda m: m.heads * m.head_dim / m.d_model,
      lambda m: m.d_expert / m.d_model,
      lambda m: m.rotary_dim / m.head_dim,
      lambda m: m.experts / m.top_k,
    ):
      self.assertEqual(ratio(full), ratio(tiny))
    for name in ('vocab', 'd_model', 'layers', 'heads', 'head_dim', 'experts'):
      self.assertLess(getattr(tiny, name), getattr(full, name))

  @parameterized.parameters('e64', 'e64,tiny')
  def test_e64_uses_two_to_four(self, arg):
    model = self.model(arg)
    self.assertEqual((model.min_k, model.top_k), (2, 4))
    self.assertEqual(model.min_share, 0.2)
    self.assertEqual(model.experts, 16 if 'tiny' in arg else 64)

  def test_min_k_is_top_k_unless_given(self):
    self.assertEqual(settings.ModelConfig().min_k, 8)
    two = settings.ModelConfig(top_k=2)
    settings.check(two)
    self.assertEqual(two, settings.ModelConfig(top_k=2, min_k=2))
    tiny = 'tiny,model.top_k=4'
    self.assertEqual(self.model(f'{tiny},model.min_k=0').min_k, 4)
    for min_k in (2, 5):
      with self.assertRaisesRegex(
        ValueError, f'model.min_k={min_k} .*model.top_k=4.* set model.min_k=0 '
      ):
        self.model(f'{tiny},model.min_k={min_k}')

  def test_words_commute_and_leaves_come_last(self):
    first, second = m2.get_config('e64,tiny'), m2.get_config('tiny,e64')
    self.assertEqual(first.to_dict(), second.to_dict())
    self.assertEqual(m2.get_config('model.layers=3,tiny').model.layers, 3)

  def test_sft_differs_by_its_data(self):
    tiny, tuned = m2.get_config('tiny'), sft.get_config('tiny')
    self.assertEqual(tiny.model.to_dict(), tuned.model.to_dict())
    self.assertEqual(tuned.data.source, 'tasks')
    self.assertEqual(sft.get_config('tiny,steps=5').steps, 5)

  @parameterized.parameters(sft, rl, eval, quickstart)
  def test_every_skill_is_a_setting(self, file):
    config = file.get_config('tasks.skills.drop_col=2.5')
    self.assertEqual(config.tasks.skills.drop_col, 2.5)
    self.assertEqual(config.tasks.skills.add_col, 1.0)
    with self.assertRaisesRegex(ValueError, 'not a setting'):
      file.get_config('tasks.skills.fly=1')
    # As they are, they say what no list of skills says.
    run = settings.RunConfig.from_config(file.get_config())
    listed = tasks.Stream(run.tasks, 'train', 0)
    empty = tasks.Stream(settings.TasksConfig(), 'train', 0)
    self.assertEqual(
      dict(zip(listed.skills, listed.weights)),
      dict(zip(empty.skills, empty.weights)),
    )

  def test_rerun_gives_what_was_saved(self):
    config = sft.get_config('e64,tiny')
    config.tasks.skills = {'add_col': 2.0}
    path = self.create_tempfile(content=config.to_json()).full_path
    again = rerun.get_config(path)
    self.assertEqual(json.loads(again.to_json()), json.loads(config.to_json()))
    run = settings.RunConfig.from_config(again)
    self.assertEqual(run.tasks.skills, (('add_col', 2.0),))

  @parameterized.parameters('', '/does/not/exist')
  def test_rerun_of_nothing(self, path):
    with self.assertRaisesRegex(ValueError, 'needs a file|cannot be read'):
      rerun.get_config(path)

  def test_rerun_of_something_else(self):
    path = self.create_tempfile(content='[1, 2]').full_path
    with self.assertRaisesRegex(ValueError, 'holds no config'):
      rerun.get_config(path)


class HostsTest(parameterized.TestCase):
  def test_alone_unless_told_otherwise(self):
    for environ in (
      {},
      {'SLURM_NTASKS': '8'},  # inside salloc, not started by srun
      {'SLURM_NTASKS': '1', 'SLURM_STEP_NODELIST': 'n1'},
      {'TPU_WORKER_HOSTNAMES': 'localhost'},
      {'OMPI_COMM_WORLD_SIZE': '', 'MEGASCALE_NUM_SLICES': ''},
      {
        'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '1',
        'JAX_PROCESS_ID': '0',
      },
    ):  # fmt: skip
      self.assertIsNone(common.hosts(environ), environ)

  @parameterized.parameters(
    {'SLURM_NTASKS': '8', 'SLURM_STEP_NODELIST': 'n[1-8]'},
    {'OMPI_COMM_WORLD_SIZE': '2'},
    {'TPU_WORKER_HOSTNAMES': 'a,b'},
    {'MEGASCALE_NUM_SLICES': '2', 'TPU_WORKER_HOSTNAMES': 'a'},
    {'M2_HOSTS': 'auto'},
  )
  def test_jax_finds_what_a_scheduler_says(self, **environ):
    self.assertEqual(common.hosts(environ), (None, None, None))

  def test_what_is_given_comes_first(self):
    environ = {
      'JAX_COORDINATOR_ADDRESS': 'a:1234',
      'JAX_NUM_PROCESSES': '4',
      'JAX_PROCESS_ID': '3',
      'OMPI_COMM_WORLD_SIZE': '2',
    }
    self.assertEqual(common.hosts(environ), ('a:1234', 4, 3))

  @parameterized.parameters(
    ('a:1', '', '0', 'all three'),
    ('', '2', '0', 'HOST:PORT'),
    ('a:1', '2', 'x', 'all three'),
    ('a', '2', '0', 'HOST:PORT'),
    ('a:1', '2', '2', 'id < number'),
  )
  def test_half_of_it_is_refused(self, address, count, index, message):
    environ = {
      'JAX_COORDINATOR_ADDRESS': address,
      'JAX_NUM_PROCESSES': count,
      'JAX_PROCESS_ID': index,
    }
    with self.assertRaisesRegex(ValueError, message):
      common.hosts(environ)
    with self.assertRaisesRegex(ValueError, 'M2_HOSTS'):
      common.hosts({'M2_HOSTS': 'yes'})
    with self.assertRaisesRegex(ValueError, "OMPI_COMM_WORLD_SIZE='two'"):
      common.hosts({'OMPI_COMM_WORLD_SIZE': 'two'})


if __name__ == '__main__':
  absltest.main()
