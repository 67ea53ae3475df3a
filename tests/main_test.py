"""The command line: a run can be repeated, and a refused one leaves no mark.

Wrong settings are in `tests/settings_test.py`.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import unittest.mock

from absl.testing import absltest, parameterized

from m2.checkpoint import store
from m2.data import tokenizer
from tests import folders
from tests.train import small, worker

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = {
  name: getattr(small.MODEL, name)
  for name in 'd_model heads kv_heads head_dim rotary_dim layers vocab'.split()
} | {'experts': 8, 'd_expert': 16}


class MainTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = folders.of_class(cls)
    rows = worker.source()
    cls.data = cls.folder / 'rows.jsonl'
    cls.data.write_text('\n'.join(json.dumps(row) for row in rows))
    words = tokenizer.train((row['text'] for row in rows), 320)
    words.save(cls.folder / 'tokenizer.json')
    cls.workdir = cls.folder / 'first run'
    # A cache of its own, empty at first: what is compiled is known.
    cls.cache = cls.folder / 'cache'
    leaves = {f'model.{name}': value for name, value in MODEL.items()} | {
      'steps': 6,
      'data.source': 'jsonl',
      'data.path': cls.data,
      'data.tokenizer': cls.folder / 'tokenizer.json',
      'data.length': 16,
      'log.introspect': 0,
      'log.every': 2,
      'checkpoint.every': 3,
    }
    cls.first = cls.main(
      '--config=configs/m2.py:tiny',
      *(f'--config.{name}={value}' for name, value in leaves.items()),
      workdir=cls.workdir,
    )

  @classmethod
  def main(cls, *arguments, workdir):
    environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cls.cache)}
    return subprocess.run(
      [sys.executable, 'main.py', *arguments, f'--workdir={workdir}'],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
    )

  def losses(self, workdir) -> list[float]:
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line)['loss'] for line in lines]

  def test_what_the_platform_lacks_is_refused_in_one_line(self):
    with unittest.mock.patch.dict(os.environ, JAX_NUM_CPU_DEVICES='2'):
      refused = self.main(
        f'--config=configs/rerun.py:{self.workdir}/config.json',
        '--config.mesh.expert=2',
        '--config.model.expert_strategy=ragged',
        workdir=self.folder / 'refused',
      )
    self.assertEqual(refused.returncode, 2, refused.stderr)
    self.assertNotIn('Traceback', refused.stderr)
    last = refused.stderr.splitlines()[-1]
    self.assertRegex(last, "^error: strategy='ragged' .* use 'exchange'.*txt")

  def test_trains_and_says_how_far_it_is(self):
    self.assertEqual(self.first.returncode, 0, self.first.stderr)
    lines = self.first.stdout.splitlines()
    self.assertEqual(
      [line.split('  ')[0] for line in lines],
      ['step 2/6', 'step 4/6', 'step 6/6'],
    )
    self.assertLen(self.losses(self.workdir), 6)

  def test_its_config_repeats_it_to_the_bit_from_the_compilation_cache(self):
    before = sorted(path.name for path in self.cache.glob('*-cache'))
    self.assertNotEmpty(before)
    again = self.folder / 'again'
    run = self.main(
      f'--config=configs/rerun.py:{self.workdir}/config.json', workdir=again
    )
    self.assertEqual(run.returncode, 0, run.stderr)
    self.assertEqual(self.losses(again), self.losses(self.workdir))
    after = sorted(path.name for path in self.cache.glob('*-cache'))
    self.assertEqual(before, after, 'something was compiled again')
    self.assertEqual(
      (again / 'config.json').read_bytes(),
      (self.workdir / 'config.json').read_bytes(),
    )

  def test_a_refused_run_leaves_the_config_as_it_was(self):
    kept = (self.workdir / 'config.json').read_bytes()
    run = self.main(
      f'--config=configs/rerun.py:{self.workdir}/config.json',
      '--config.seed=5',
      workdir=self.workdir,
    )
    self.assertEqual(run.returncode, 2)
    self.assertRegex(run.stderr, 'seed was 0, is 5')
    self.assertLen(run.stderr.splitlines(), 1)
    self.assertEqual((self.workdir / 'config.json').read_bytes(), kept)
    self.assertIn('Traceback', (self.workdir / 'error.txt').read_text())

  def test_a_run_that_fails_keeps_the_config_it_ran_with(self):
    workdir = self.folder / 'fails'
    shutil.copytree(self.workdir, workdir)
    run = self.main(
      f'--config=configs/rerun.py:{self.workdir}/config.json',
      '--config.steps=12',
      '--config.optim.lr=1e30',
      workdir=workdir,
    )
    self.assertEqual(run.returncode, 1, run.stderr)
    kept = json.loads((workdir / 'config.json').read_text())
    self.assertEqual(kept['steps'], 12)

  def test_a_run_that_is_under_way_is_left_alone(self):
    workdir = self.folder / 'in use'
    workdir.mkdir()
    (workdir / 'config.json').write_text('{"seed": 1}')
    with store.Store(workdir / 'checkpoints'):
      run = self.main('--config=configs/m2.py:tiny', workdir=workdir)
    self.assertEqual(run.returncode, 1)
    self.assertRegex(run.stderr, 'in use is in use by another process; .*own')
    self.assertLen(run.stderr.splitlines(), 1)
    self.assertEqual((workdir / 'config.json').read_text(), '{"seed": 1}')
    self.assertFalse((workdir / 'error.txt').exists())

  def failing(self, workdir, *lines, words=()):
    """main.py with seed 7 whose run is these lines."""
    code = [
      'import main',
      'def run(config, workdir):',
      *(f'  {line}' for line in lines),
      'main.run = run',
      'main.app.run(main.main, flags_parser=main.parse)',
    ]
    words = '--config=configs/m2.py:tiny,seed=7', f'--workdir={workdir}', *words
    return subprocess.run(
      [sys.executable, '-c', '\n'.join(code), *words],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )

  def test_settings_that_were_given_and_not_read_are_named(self):
    for words, said in ((), ''), (('--config.model.layers=1',), 'model.layers'):
      run = self.failing(self.folder / 'unread', 'pass', words=words)
      self.assertEqual(run.returncode, 0, run.stderr)
      unread = f'no code read these settings: seed{said and ", " + said}\n'
      self.assertEqual(run.stderr, unread)

  def test_messages_that_are_no_text_are_still_one_line(self):
    workdir = self.folder / 'surrogate'
    run = self.failing(
      workdir, "raise ValueError('x' + chr(0xd800) + 'y is broken')"
    )
    self.assertEqual(run.returncode, 2, run.stderr)
    self.assertIn('y is broken', run.stderr)
    self.assertLen(run.stderr.splitlines(), 1)
    self.assertIn('ud800', (workdir / 'error.txt').read_text())

  @parameterized.parameters(
    (True, 7, 'ValueError', 2),
    (False, 1, 'ValueError', 2),
    (False, 1, 'OSError', 1),
    (False, 1, 'KeyboardInterrupt', 130),
  )
  def test_one_that_ends_under_way_keeps_its_own(
    self, recorded, seed, kind, code
  ):
    workdir = self.folder / f'under-way-{recorded}-{kind}'
    workdir.mkdir()
    (workdir / 'metrics.jsonl').write_text('{"step": 1}\n')
    (workdir / 'config.json').write_text('{"seed": 1}')
    run = self.failing(
      workdir,
      f'with open(workdir / "metrics.jsonl", "a") as file: '
      f'file.write("x" * {int(recorded)})',
      f'raise {kind}("row 3 is broken")',
    )
    self.assertEqual(run.returncode, code, run.stderr)
    said = 'interrupted' if code == 130 else 'row 3 is broken'
    self.assertIn(said, run.stderr)
    self.assertLen(run.stderr.splitlines(), 1)
    kept = json.loads((workdir / 'config.json').read_text())
    self.assertEqual(kept['seed'], seed)

  @parameterized.parameters(True, False)
  def test_a_kill_leaves_the_config_of_what_is_recorded(self, recorded):
    workdir = self.folder / f'killed-{recorded}'
    workdir.mkdir()
    (workdir / 'metrics.jsonl').write_text('{"step": 1}\n')
    (workdir / 'config.json').write_text('{"seed": 1}')
    run = self.failing(
      workdir,
      f'with open(workdir / "metrics.jsonl", "a") as file: '
      f'file.write("x" * {int(recorded)})',
      'import os, signal',
      'os.kill(os.getpid(), signal.SIGKILL)',
    )
    self.assertEqual(run.returncode, -9, run.stderr)
    # The next start puts it right, whatever comes of that.
    run = self.failing(workdir, 'raise ValueError("no")')
    self.assertEqual(run.returncode, 2, run.stderr)
    kept = json.loads((workdir / 'config.json').read_text())
    self.assertEqual(kept['seed'], 7 if recorded else 1)
    names = {path.name for path in workdir.iterdir()}
    self.assertEqual(names, {'config.json', 'metrics.jsonl', 'error.txt'})

  def test_outside_its_environment_it_says_how_to_enter_it(self):
    run = subprocess.run(
      [sys.executable, '-S', 'main.py', '--config=configs/m2.py:tiny'],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 1)
    self.assertRegex(run.stderr, r'\Aerror: .*absl.*\.venv/bin/activate`.*\n\Z')

  @parameterized.parameters(
    ('gs://bucket/run', 2, 'mount the bucket'),
    ('/proc/none/run', 1, '--workdir=/proc/none/run'),
  )
  def test_workdirs_that_are_no_folders(self, workdir, code, named):
    run = self.main('--config=configs/m2.py:tiny', workdir=workdir)
    self.assertEqual(run.returncode, code)
    self.assertIn(named, run.stderr)
    self.assertLen(run.stderr.splitlines(), 1)


if __name__ == '__main__':
  absltest.main()
