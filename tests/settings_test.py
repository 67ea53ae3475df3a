"""No setting is read by nobody, and none is wrong without being told.

Two questions are asked of every leaf of every config. Does freezing notice it:
another value gives other settings, or an error? And does code read it: a real
run of its mode, in small, leaves no leaf unread? The second runs are in
`tests/story_test.py`, beside what they are to show.
"""

import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import ml_collections
from absl.testing import absltest, parameterized

from m2 import config as m2_config
from tests import clock
from tests.bench import configs

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Every config file with every form of its argument.
FORMS = (
  'configs/m2.py',
  'configs/m2.py:tiny',
  'configs/m2.py:e64',
  'configs/m2.py:e64,tiny',
  'configs/sft.py',
  'configs/rl.py',
  'configs/eval.py',
  'configs/serve.py',
  'configs/evolve.py',
  'configs/quickstart.py',
  'configs/convert.py',
  'configs/plan.py',
)
NO_CONFIG = ('__init__.py', 'common.py', 'rerun.py')
# A refusal imports neither jax nor anything that compiles.
SECONDS_TO_REFUSE = 5.0


def frozen(tree: ml_collections.ConfigDict) -> m2_config.RunConfig:
  return m2_config.RunConfig.from_config(tree)


def leaves(tree: dict[str, Any], path: str = '') -> list[str]:
  """Dotted paths of what a ConfigDict holds; a mapping of weights is one."""
  found = []
  for name, value in tree.items():
    inner = isinstance(value, dict) and name != 'skills'
    found += leaves(value, f'{path}{name}.') if inner else [path + name]
  return found


def another(value: Any) -> Any:
  """A value of the same type that differs."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + 1
  if isinstance(value, float):
    return 0.9 * value + 0.003
  if isinstance(value, str):
    return value + 'x'
  return {**value, 'one_more_skill': 1.0}


def filled(form: str) -> ml_collections.ConfigDict:
  """The config of `form`, with the paths that a user has to give."""
  tree = configs.config_dict(form)
  if form == 'configs/convert.py':
    tree.convert.source, tree.convert.target = 'from', 'to'
  return tree


class FreezingTest(parameterized.TestCase):
  def test_every_config_file_is_here(self):
    files = {path.name for path in (ROOT / 'configs').glob('*.py')}
    named = {form.split(':')[0].removeprefix('configs/') for form in FORMS}
    self.assertEqual(files - set(NO_CONFIG), named)

  @parameterized.parameters(*FORMS)
  def test_every_leaf_is_noticed(self, form):
    before = frozen(filled(form))
    paths = leaves(filled(form).to_dict())
    self.assertNotEmpty(paths)
    for path in paths:
      tree = filled(form).to_dict()
      *parents, last = path.split('.')
      node = tree
      for parent in parents:
        node = node[parent]
      node[last] = another(node[last])
      try:
        after = frozen(ml_collections.ConfigDict(tree))
      except ValueError as error:
        self.assertNotEmpty(str(error), path)
        continue
      self.assertFalse(before == after, f'{form}: {path} changed nothing')

  @parameterized.parameters(*FORMS)
  def test_a_leaf_more_or_less_is_an_error_that_names_it(self, form):
    for path in leaves(filled(form).to_dict()):
      tree = filled(form).to_dict()
      *parents, last = path.split('.')
      node = tree
      for parent in parents:
        node = node[parent]
      node[f'{last}_typo'] = node.pop(last)
      with self.assertRaisesRegex(ValueError, re.escape(last)):
        frozen(ml_collections.ConfigDict(tree))

  @parameterized.parameters(*FORMS)
  def test_frozen_settings_thaw_and_hash(self, form):
    run = frozen(filled(form))
    again = frozen(m2_config.to_config(run))
    self.assertEqual(run, again)
    self.assertEqual(hash(run), hash(again))


class RefusalTest(parameterized.TestCase):
  """Through the command line, as a user meets it."""

  @parameterized.named_parameters(
    ('unknown_key', ['--config.model.layer=3'], 'layer'),
    (
      'unknown_section',
      ['--config.optm.lr=3'],
      'error: --config.optm.lr=3: no such setting; did you mean optim?',
    ),
    ('no_section', ['--config.xyz.x=2'], '--config.xyz.x=2: no such setting'),
    ('below_a_leaf', ['--config.seed.x=2'], '--config.seed.x=2: no such'),
    ('stray_word', ['extra'], "'extra' is no flag"),
    ('wrong_type', ['--config.model.layers=many'], 'layers'),
    ('not_a_whole_number', ['--config.steps=1.5'], 'steps'),
    ('impossible_alone', ['--config.model.layers=0'], 'layers=0'),
    ('impossible_together', ['--config.model.kv_heads=5'], 'kv_heads=5'),
    ('too_many_chosen', ['--config.model.top_k=999'], 'top_k=999'),
    ('not_finite', ['--config.optim.lr=inf'], 'optim.lr=inf'),
    ('no_key', ['--config.seed=4294967296'], 'seed=4294967296'),
    ('too_many', ['--config.steps=2147483648'], 'steps=2147483648: the larg'),
    ('too_long', ['--config.log.every=2147483648'], 'log.every=2147483648'),
  )
  def test_one_line_and_exit_code_two(self, overrides, named):
    self.refuse(['--config=configs/m2.py:tiny', *overrides], named)

  @parameterized.named_parameters(
    ('no_such_file', 'configs/no.py', 'no.py'),
    ('unknown_word', 'configs/m2.py:small', 'small'),
    ('unknown_leaf', 'configs/m2.py:tiny,step=20', 'step'),
  )
  def test_a_wrong_file_or_argument(self, config, named):
    self.refuse([f'--config={config}'], named)

  def test_a_plan_of_what_the_config_has_not(self):
    self.refuse(
      ['--config=configs/rl.py', '--config.mode=plan'], 'has no data section'
    )
    self.refuse(
      [
        '--config=configs/m2.py',
        '--config.mode=plan',
        '--config.model.expert_strategy=direct',
      ],
      'direct is for GPUs',
    )

  def test_experts_that_have_no_gradient(self):
    self.refuse(
      ['--config=configs/m2.py', '--config.model.fp8_experts=True'],
      'have no gradient',
    )

  def test_rounded_tokens_of_a_number_of_experts_that_varies(self):
    self.refuse(
      ['--config=configs/m2.py:e64,tiny', '--config.loss.round_tokens=128'],
      'set model.min_k=2 to model.top_k=4',
    )

  @parameterized.parameters(
    ('add_col=-1', 'tasks.skills.add_col=-1.0 must be >= 0'),
    ('fly=1', '--config.tasks.skills.fly=1: no such setting'),
  )
  def test_the_weight_of_a_skill(self, given, named):
    self.refuse(
      ['--config=configs/sft.py:tiny', f'--config.tasks.skills.{given}'], named
    )

  def test_no_config_at_all(self):
    self.refuse([], '--config')

  def test_a_saved_config_that_is_broken(self):
    path = self.create_tempfile(content='{"mode": ')
    self.refuse([f'--config=configs/rerun.py:{path.full_path}'], path.full_path)

  def test_a_saved_config_of_an_unknown_mode(self):
    path = self.create_tempfile(content=json.dumps({'mode': 'pretrian'}))
    self.refuse([f'--config=configs/rerun.py:{path.full_path}'], 'pretrian')

  def refuse(self, arguments: list[str], named: str) -> None:
    workdir = pathlib.Path(self.create_tempdir().full_path) / 'never'
    start = time.monotonic()
    run = subprocess.run(
      [sys.executable, 'main.py', *arguments, f'--workdir={workdir}'],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    seconds = time.monotonic() - start
    self.assertEqual(run.returncode, 2, run.stderr)
    self.assertLen(run.stderr.splitlines(), 1, run.stderr)
    self.assertIn(named, run.stderr)
    self.assertFalse(workdir.exists(), 'a refused run left a folder')
    self.assertLess(seconds, SECONDS_TO_REFUSE * clock.slow())


if __name__ == '__main__':
  absltest.main()
