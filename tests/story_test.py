"""Every mode, run for real in small: it works, and reads all its settings.

The runs are those of `tests/play.py`, in a process with one CPU device; under
`--all` again on a mesh of eight. The loop over the stages (`evolve`,
`quickstart`) has its story in `stages_test.py` and is only read here.
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import chex
import pytest
from absl.testing import absltest, parameterized

from m2 import config as m2_config
from m2.checkpoint import store
from m2.eval import run as eval_run
from m2.obs import curves, dashboard
from tests import folders, play, settings_test, stages_test
from tests.parallel import loops

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The programs of these runs in which devices meet in loops.
PROGRAMS = ('train_step', 'rl_step', 'prefill', 'decode')
MISMATCH = 1e-4  # nats; float32 on CPU
# Settings that a mode is given with the rest of their section, and why it has
# no use for them. One that is read after all is an error, and so is one that
# no other mode reads.
UNUSED = {
  'pretrain': {'data.examples': 'counts demonstrations; these rows are files'},
  'sft': {'data.path': 'rows are demonstrations of tasks, not files'},
  'rl': {'tasks.retry_demos': 'of demonstrations; the agent plays itself'},
  'eval': {
    'steps': 'nothing is trained',
    'checkpoint.every': 'nothing is saved',
    'checkpoint.keep': 'nothing is saved',
    'checkpoint.on_corrupt': 'nothing is resumed',
    'tasks.retry_demos': 'of demonstrations; the agent plays itself',
  },
  'serve': {
    'seed': 'requests bring their own',
    'steps': 'nothing is trained',
    'checkpoint.every': 'nothing is saved',
    'checkpoint.keep': 'nothing is saved',
    'checkpoint.on_corrupt': 'nothing is resumed',
  },
  'convert': {'seed': 'nothing is drawn', 'steps': 'nothing is trained'},
}


class Story(parameterized.TestCase):
  """The runs, and what is asked of them; the classes below are the tests."""

  __test__ = False
  devices = 1

  @classmethod
  def environment(cls) -> dict[str, str]:
    """What the runs find in their environment beside that of the tests."""
    return {}

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = folders.of_class(cls)
    run = subprocess.run(
      [sys.executable, '-m', 'tests.play', str(cls.root), str(cls.devices)],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'} | cls.environment(),
      capture_output=True,
      text=True,
    )
    if run.returncode:
      raise RuntimeError(run.stderr[-4000:])
    cls.unread = json.loads((cls.root / 'unread.json').read_text())

  def rows(self, name: str) -> list[dict]:
    lines = (self.root / name / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]

  @parameterized.parameters(*play.FORMS)
  def test_every_setting_is_read(self, mode):
    self.assertEqual(self.unread[mode], sorted(UNUSED.get(mode, {})))

  def test_no_setting_is_read_by_no_mode(self):
    read = set()
    for mode, form in play.FORMS.items():
      tree = m2_config.to_config(play.config(form)).to_dict()
      read |= set(settings_test.leaves(tree)) - set(self.unread[mode])
    self.assertContainsSubset(
      {leaf for unused in UNUSED.values() for leaf in unused}, read
    )

  @parameterized.parameters('pretrain', 'sft', 'rl')
  def test_training_leaves_a_line_a_step_and_finite_losses(self, name):
    rows = self.rows(name)
    self.assertEqual([row['step'] for row in rows], [1, 2])
    key = 'policy/loss' if name == 'rl' else 'loss'
    self.assertTrue(all(math.isfinite(row[key]) for row in rows), rows)

  def test_the_trainer_scores_what_the_engine_sampled(self):
    for row in self.rows('rl'):
      self.assertLess(row['mismatch/max'], MISMATCH)
      self.assertGreater(row['mismatch/fresh'], 0)

  def test_evaluation_leaves_a_row_for_every_task(self):
    report = eval_run.load(self.root / 'eval' / 'eval.json')
    self.assertLen(report.rows, play.MICRO['eval.tasks'])

  def test_a_client_is_answered(self):
    answer = json.loads((self.root / 'serve' / 'answer.json').read_text())
    self.assertEqual(answer['choices'][0]['finish_reason'], 'length')
    self.assertEqual(answer['usage']['completion_tokens'], 4)

  def test_conversion_and_back_keeps_every_weight(self):
    mesh = play.MESH if self.devices > 1 else {}
    model = play.config('configs/sft.py:tiny', **mesh).model
    before, after = (
      store.load_params(self.root / name, model) for name in ('rl', 'again')
    )
    chex.assert_trees_all_equal(before, after)

  def test_the_report_draws_what_they_left(self):
    titles = {chart.title for chart in dashboard.collect(self.root).charts}
    for panel in curves.PANELS:
      drawn = {f'{panel.title}: {name}' for name in ('rl', 'sft')}
      self.assertNotEmpty(drawn & titles, f'{panel.title} draws nothing')
    self.assertIn('Load of every expert: rl', titles)


class OneDeviceTest(Story):
  __test__ = True

  def test_the_loop_over_the_stages_reads_every_setting(self):
    thawed = m2_config.to_config(stages_test.config())
    config = m2_config.RunConfig.from_config(thawed)
    stages_test.run_here(config, self.root / 'stages')
    self.assertEqual(m2_config.unread(config), [])


@pytest.mark.heavy
class MeshTest(Story):
  __test__ = True
  devices = 8

  @classmethod
  def environment(cls):
    # Compiled anew, once each, and kept as text.
    flags = (
      os.environ.get('XLA_FLAGS', ''),
      f'--xla_dump_to={cls.root / "programs"}',
      f'--xla_dump_hlo_module_re=.*({"|".join(PROGRAMS)}).*',
      '--xla_dump_hlo_as_text',
    )
    return {
      'XLA_FLAGS': ' '.join(flags),
      'JAX_COMPILATION_CACHE_DIR': str(cls.root / 'compiled'),
    }

  @parameterized.parameters(*PROGRAMS)
  def test_devices_meet_in_one_order(self, program):
    pattern = f'programs/*{program}*.cpu_after_optimizations.txt'
    texts = [path.read_text() for path in self.root.glob(pattern)]
    self.assertNotEmpty(texts)
    for text in texts:
      self.assertEmpty(loops.unordered(text))


if __name__ == '__main__':
  absltest.main()
