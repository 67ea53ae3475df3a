"""launch/env.sh on a small project of its own: made, kept, mended, refused."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from absl.testing import absltest

from tests import clock, folders

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS_UNCHANGED = 2.0


def project(folder: pathlib.Path) -> pathlib.Path:
  """A new project in `folder`, with pins that need no network."""
  root = folder / 'a folder with spaces'
  (root / 'launch').mkdir(parents=True)
  shutil.copy(ROOT / 'launch' / 'env.sh', root / 'launch')
  (root / 'launch' / 'constraints.txt').write_text('# none\n')
  (root / 'requirements.txt').write_text('# nothing\n')
  (root / 'more.txt').write_text('# nothing either\n')
  return root


class Case(absltest.TestCase):
  """A project in a folder of its own, and calls of its env.sh."""

  root: pathlib.Path
  elsewhere: pathlib.Path

  def setUp(self):
    super().setUp()
    self.elsewhere = pathlib.Path(self.create_tempdir().full_path)
    self.root = project(self.elsewhere)

  def environment(self, **changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith('PIP_')}
    kept |= {'M2_PYTHON': sys.executable, 'PIP_NO_INDEX': '1'}
    return {k: v for k, v in {**kept, **changes}.items() if v}

  def env(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    """Calls env.sh from another folder, by a path with spaces."""
    return subprocess.run(
      ['bash', str(self.root / 'launch' / 'env.sh'), *arguments],
      cwd=self.elsewhere,
      env=self.environment(**changes),
      capture_output=True,
      text=True,
    )

  def make(self) -> pathlib.Path:
    run = self.env()
    self.assertEqual(run.returncode, 0, run.stderr)
    return self.root / '.venv'


class MadeTest(Case):
  """One environment for all: what they do to it, they undo."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.kept = folders.of_class(cls)
    project(cls.kept)

  def setUp(self):
    super().setUp()
    self.elsewhere = self.kept
    self.root = self.kept / 'a folder with spaces'

  def test_made_once_then_left_alone_then_extended(self):
    venv = self.make()
    subprocess.run([venv / 'bin' / 'python', '-m', 'pip', '--version'], check=1)
    (venv / 'witness').touch()
    start = time.monotonic()
    again = self.env()
    seconds = time.monotonic() - start
    self.assertLess(seconds, SECONDS_UNCHANGED * clock.slow())
    self.assertEqual((again.returncode, again.stderr), (0, ''))
    more = self.env('more.txt')
    self.assertIn('installing more.txt', more.stderr)
    self.assertEqual(self.env('more.txt').stderr, '')
    (self.root / 'requirements.txt').write_text('# changed\n')
    self.assertIn('installing requirements.txt', self.env().stderr)
    self.assertTrue((venv / 'witness').exists(), 'made anew without a reason')

  def test_a_failed_install_says_so_and_spoils_nothing(self):
    venv = self.make()
    (venv / 'witness').touch()
    (self.root / 'wrong.txt').write_text('no-such-package==1.0\n')
    run = self.env('wrong.txt')
    self.assertEqual(run.returncode, 1)
    self.assertIn('could not install wrong.txt', run.stderr)
    self.assertEqual(self.env().returncode, 0)
    self.assertTrue((venv / 'witness').exists())

  def test_a_finished_one_needs_no_lock(self):
    self.make()
    lock = self.root / '.venv.lock'
    lock.unlink(missing_ok=True)
    lock.mkdir()  # cannot be opened for writing, by root either
    self.addCleanup(lock.rmdir)
    run = self.env()
    self.assertEqual((run.returncode, run.stderr), (0, ''))


class EnvTest(Case):
  def test_what_was_interrupted_is_made_anew(self):
    run = subprocess.Popen(
      ['bash', str(self.root / 'launch' / 'env.sh')],
      env=self.environment(),
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )
    mark = self.root / '.venv' / '.m2' / 'unfinished'
    end = time.monotonic() + 30
    while not mark.exists() and time.monotonic() < end:
      time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    self.assertTrue(mark.exists())
    (self.root / '.venv' / 'witness').touch()
    (mark.parent / 'kind').write_text('')  # as a full disk leaves it
    venv = self.make()
    self.assertFalse((venv / 'witness').exists())
    self.assertFalse(mark.exists())

  def test_an_own_venv_that_will_not_do_is_refused_and_kept(self):
    old = self.root / '.venv' / 'bin' / 'python'
    old.parent.mkdir(parents=True)
    old.write_text('#!/bin/sh\necho "Python 3.11.2 is older than 3.12"\nexit 1')
    old.chmod(0o755)
    for _ in range(2):
      run = self.env()
      self.assertEqual(run.returncode, 1)
      self.assertRegex(
        run.stderr,
        r'\A.*your own and will not do \(.*3\.11\.2 is older.*move it away\n\Z',
      )
      self.assertTrue(old.exists())

  def test_an_own_venv_is_used_whatever_happens_and_never_deleted(self):
    venv = self.root / '.venv'
    # Without pip, as `uv venv` makes it.
    subprocess.run(
      [sys.executable, '-m', 'venv', '--without-pip', venv], check=True
    )
    (venv / 'witness').touch()
    self.make()
    run = self.env('cuda')
    self.assertEqual(run.returncode, 1)
    self.assertIn('your own and will not do (it is for cpu, not', run.stderr)
    (venv / '.m2' / 'unfinished').touch()  # as pip leaves it when killed
    run = self.env()
    self.assertEqual(run.returncode, 0, run.stderr)
    self.assertIn('installing requirements.txt', run.stderr)
    self.assertFalse((venv / '.m2' / 'unfinished').exists())
    self.assertTrue((venv / 'witness').exists())

  def test_a_host_with_the_right_jax_keeps_it(self):
    """Without an index: had it wanted another jax, it would have failed."""
    host = self.elsewhere / 'host'
    subprocess.run(
      [sys.executable, '-m', 'venv', '--without-pip', host], check=1
    )
    site = next(host.glob('lib/python*/site-packages'))
    for name in ('jax', 'jax_cuda13_plugin'):
      info = site / f'{name}-0.0.1.dist-info'
      info.mkdir()
      (info / 'METADATA').write_text(
        f'Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n'
      )
    (site / 'jax.py').write_text('HOST = True\n')
    (self.root / 'requirements.txt').write_text('jax==0.0.1\n')
    run = self.env('cuda', M2_PYTHON=str(host / 'bin' / 'python'))
    self.assertIn('keeping the jax 0.0.1', run.stderr)
    self.assertEqual(run.returncode, 0, run.stderr)
    python = self.root / '.venv' / 'bin' / 'python'
    subprocess.run([python, '-c', 'import jax; assert jax.HOST'], check=True)

  def test_without_a_python_it_says_what_was_tried(self):
    # A PATH with the shell's own tools, and pythons that are too old.
    path = self.elsewhere / 'bin'
    path.mkdir()
    for tool in ('bash', 'sed', 'dirname', 'cat', 'flock', 'env'):
      if found := shutil.which(tool):
        (path / tool).symlink_to(found)
    for name in ('python3', 'python3.12'):
      old = path / name
      old.write_text(
        '#!/bin/sh\necho "Python 3.8.1 is older than 3.12"\nexit 1'
      )
      old.chmod(0o755)
    run = self.env(M2_PYTHON='', PATH=str(path), HOME=str(self.elsewhere),
                   PYENV_ROOT='')  # fmt: skip
    self.assertEqual(run.returncode, 1, run.stderr)
    self.assertIn('found no Python >= 3.12', run.stderr)
    self.assertIn(f'{path}/python3.12: Python 3.8.1 is older', run.stderr)
    self.assertIn('uv: not on PATH', run.stderr)
    self.assertIn('apt install python3.12', run.stderr)
    self.assertFalse((self.root / '.venv').exists())

  def test_an_unknown_kind_is_refused(self):
    run = self.env('gpu')
    self.assertEqual(run.returncode, 2)
    self.assertIn("'gpu' is not a kind", run.stderr)


if __name__ == '__main__':
  absltest.main()
