"""Where a program does not fit, a plan looks for the next that does."""

import contextlib
import dataclasses
import io
import json
import pathlib
from unittest import mock

from absl.testing import absltest

from configs import m2
from m2 import config as settings
from m2.parallel import mesh as meshes
from m2.plan import chips, compiler, run


def row(fits: bool) -> dict:
  """The plan of a program, as far as a line of print goes."""
  return {
    'program': 'train',
    'topology': 'v5p:4x4x4',
    'chips': 64,
    'devices': 64,
    'mesh': {'fsdp': 64},
    'compile_seconds': 1.0,
    'compiler_bytes': 2**30,
    'fits': fits,
    'hbm': {'limit': 2**30, 'peak': 2**31, 'weights': 2**30},
  }


class RunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    tree = m2.get_config('data.batch=64,data.shards=64')
    tree.mode = 'plan'
    tree.plan.topology, tree.plan.programs = 'v5p:4x4x4', 'train'
    self.config = settings.RunConfig.from_config(tree)
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    rates = {axis: 1e11 for axis in meshes.AXES}
    for where, name, value in (
      (compiler, 'prepare', None),
      (chips, 'devices', []),
      (meshes, 'make_mesh', None),
    ):
      self.enter_context(mock.patch.object(where, name, return_value=value))
    self.enter_context(
      mock.patch('m2.plan.roofline.chip_rates', return_value=rates)
    )

  def plan(self, *fits: bool | Exception) -> tuple[list[dict], str]:
    """Rows and what is printed, if compiling comes out as given."""
    text = io.StringIO()
    rows = [row(one) if isinstance(one, bool) else one for one in fits]
    lines = mock.patch('m2.plan.report.lines', return_value=['a line'])
    with (
      mock.patch.object(run, 'one', side_effect=rows),
      lines,
      contextlib.redirect_stdout(text),
    ):
      return run.run(self.config, self.workdir), text.getvalue()

  def test_what_fits_is_left_alone(self):
    rows, text = self.plan(True)
    self.assertLen(rows, 1)
    self.assertNotIn('should fit', text)
    kept = json.loads((self.workdir / 'plan.json').read_text())
    self.assertEqual(kept['programs'], rows)

  def test_candidates_are_compiled_until_one_fits(self):
    rows, text = self.plan(False, False, True)
    self.assertEqual([one['fits'] for one in rows], [False, False, True])
    self.assertIn('--config.mesh.fsdp=', rows[-1]['proposed'])
    self.assertIn(rows[-1]['proposed'], text)
    self.assertIn('should fit v5p:4x4x4', text)

  def test_generation_is_looked_for_as_well(self):
    self.config = dataclasses.replace(
      self.config,
      plan=dataclasses.replace(self.config.plan, programs='decode'),
      engine=settings.EngineConfig(slots=512, length=16384),
    )
    rows, text = self.plan(False, True)
    self.assertIn('--config.plan.rollout_tensor=', rows[-1]['proposed'])
    self.assertIn('--config.engine.slots=', rows[-1]['proposed'])
    self.assertIn('ms a decoded token by', text)
    self.assertNotIn('configs/plan.py', text)
    _, text = self.plan(False, *[False] * run.TRIES)
    self.assertIn('use more chips or a shorter engine.length', text)
    self.config = dataclasses.replace(self.config, engine=None)
    _, text = self.plan(False, True)
    self.assertIn('configs/plan.py', text)

  def test_a_mesh_that_cannot_be_is_no_end_of_a_search(self):
    wrong = ValueError('axes multiply to 512')
    with self.assertRaisesRegex(ValueError, 'multiply to 512'):
      self.plan(wrong)
    plan = dataclasses.replace(self.config.plan, search=True)
    self.config = dataclasses.replace(self.config, plan=plan)
    rows, text = self.plan(wrong, True)
    self.assertEqual([one['fits'] for one in rows], [True])
    self.assertIn('it cannot be: axes multiply to 512', text)

  def test_giving_up_says_what_to_do(self):
    rows, text = self.plan(False, *[False] * run.TRIES)
    self.assertLen(rows, 1 + run.TRIES)
    self.assertIn('none of the 3 tried fits', text)
    self.assertIn('use more chips or fewer tokens', text)


if __name__ == '__main__':
  absltest.main()
