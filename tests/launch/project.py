"""A project of its own for a launch script, whose programs note their calls."""

import os
import pathlib
import shutil
import subprocess

from absl.testing import parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / 'launch'
SECRET = 'hunter-2'
# Notes its name, arguments, the variables of a run, and what comes by pipe.
RECORDER = """#!/bin/bash
text=$(printf '<%s>' "$(basename "$0")" "$@"; env | sort |
  grep -E '^(JAX|CUDA|M2|RAY)_' | tr '\\n' ' '; cat)
echo "$text" >>"$RECORD"
case "$*" in *--format=value*) echo ACTIVE ;; esac
"""
PROGRAMS = ('gcloud', 'kubectl', 'docker', 'xpk', 'scontrol', 'nvidia-smi')
ODD = '--config.data.path=a "b" $c \'d\''  # survives every shell between
RUN = ['--config=configs/m2.py:tiny,steps=2', ODD]
CLOUD = {'NAME': 'exp1', 'PROJECT': 'proj', 'ZONE': 'us-x1-a', 'BUCKET': 'bkt'}
TPU_VM = CLOUD | {'TPU': 'v5p-128', 'SECRETS': 'TOKEN_A TOKEN_B'}
GPUS = {'HOSTS': '2', 'HOST_INDEX': '1', 'COORDINATOR': 'n0:99', 'GPUS': '8'}


class Project(parameterized.TestCase):
  """A copy of launch/, called from elsewhere, by a path with spaces."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path) / 'my project'
    shutil.copytree(LAUNCH, self.folder / 'launch')
    self.programs = self.folder / 'programs'
    self.record = self.folder / 'record'
    for name in PROGRAMS:
      self.program(self.programs / name)
    for path in ('launch/env.sh', '.venv/bin/python', '.venv/bin/ray'):
      self.program(self.folder / path)
    (self.folder / 'main.py').touch()
    shutil.copy(ROOT / '.gitignore', self.folder)
    subprocess.run(['git', 'init', '-q'], cwd=self.folder, check=True)

  def program(self, path: pathlib.Path, text: str = RECORDER) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def environment(self, **variables: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ('HOME', 'LANG')
            if name in os.environ}  # fmt: skip
    path = f'{self.programs}:{os.environ["PATH"]}'
    return {'PATH': path, 'RECORD': str(self.record), **kept, **variables}

  def call(self, script: str, *arguments: str, **variables: str):
    return subprocess.run(
      ['bash', str(self.folder / 'launch' / script), *arguments],
      env=self.environment(**variables),
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=60,
    )

  def recorded(self) -> list[str]:
    """What programs noted since the last time; in no order between hosts."""
    text = self.record.read_text() if self.record.exists() else ''
    self.record.unlink(missing_ok=True)
    return sorted(text.splitlines())
