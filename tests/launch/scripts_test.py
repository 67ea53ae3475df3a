"""The launch scripts, in a project whose programs only note their calls.

What --dry-run prints is pasted into a shell, and must call what the script
calls without it: so the tests hold no copy of what is printed.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / 'launch'
BIN = pathlib.Path(sys.executable).parent
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

CLOUD = {'NAME': 'exp1', 'PROJECT': 'proj', 'ZONE': 'us-x1-a', 'BUCKET': 'bkt'}
TPU_VM = CLOUD | {'TPU': 'v5p-128', 'SECRETS': 'TOKEN_A TOKEN_B'}
GKE = CLOUD | {
  'IMAGE': 'reg/m2@sha256:0', 'ACCELERATOR': 'tpu-v5p-slice',
  'TOPOLOGY': '4x4x4', 'SECRETS': 'TOKEN_A TOKEN_B',
}  # fmt: skip
XPK = GKE | {'CLUSTER': 'c', 'TPU': 'v5p-128', 'STORAGE': 's', 'SECRETS': ''}
GPUS = {'HOSTS': '2', 'HOST_INDEX': '1', 'COORDINATOR': 'n0:99', 'GPUS': '8'}
RL = {'TRAINER': '127.0.0.1', 'PORT': '1'}
RUN = ['--config=configs/m2.py:tiny,steps=2', ODD]
# Script, action and arguments, variables: every action of every script.
CALLS = (
  *(
    ('tpu_vm.sh', [action], TPU_VM)
    for action in (
      'create', 'wait', 'copy', 'setup', 'secrets', 'logs', 'status', 'stop',
      'fetch', 'delete',
    )
  ),
  ('tpu_vm.sh', ['run', *RUN], TPU_VM),
  ('tpu_vm.sh', ['copy'], TPU_VM | {'REPO': 'https://h/r', 'REF': 'abc'}),
  *(
    ('gke.sh', [action], GKE)
    for action in ('image', 'secrets', 'status', 'logs', 'fetch', 'delete')
  ),
  ('gke.sh', ['apply', *RUN], GKE),
  ('gke.sh', ['xpk', *RUN], XPK),
  ('gpu.sh', RUN, {'PLATFORM': 'cpu', 'DEVICES': '3'}),
  ('gpu.sh', RUN, GPUS | {'PROCESSES': '2'}),
  ('rl.sh', ['local', *RUN], {'PLATFORM': 'cpu'}),
  ('rl.sh', ['agents'], RL | {'CPUS': '3'}),
)  # fmt: skip
# Script, arguments, variables, and variable -> what shows that it was heard.
HEARD = (
  ('tpu_vm.sh', ['create'], TPU_VM, {
    'NAME': 'xyz', 'PROJECT': 'xyz', 'ZONE': 'xyz', 'TPU': 'v6e-16',
    'RUNTIME': 'xyz', 'NETWORK': 'xyz', 'SUBNETWORK': 'xyz',
    'SERVICE_ACCOUNT': 'xyz', 'SPOT': 'yes', 'RESERVED': 'yes', 'SLICES': '3',
  }),
  ('tpu_vm.sh', ['run', *RUN], TPU_VM, {'SECRETS': 'TOKEN_C'}),
  ('tpu_vm.sh', ['setup'], TPU_VM, {'BUCKET': 'xyz'}),
  ('tpu_vm.sh', ['logs'], TPU_VM, {'WORKER': '77', 'SLICE': '66'}),
  ('gke.sh', ['apply', *RUN], GKE, {
    'NAME': 'xyz', 'NAMESPACE': 'xyz', 'IMAGE': 'xyz', 'ACCELERATOR': 'xyz',
    'TOPOLOGY': '2x2x4', 'CHIPS': '8', 'SLICES': '3', 'SPOT': 'yes',
    'RESTARTS': '77', 'BUCKET': 'xyz', 'SERVICE_ACCOUNT': 'xyz', 'SECRETS': '',
  }),
  ('gke.sh', ['apply', *RUN], GKE | {'TOPOLOGY': '', 'HOSTS': '2'},
   {'HOSTS': '77'}),
  ('gke.sh', ['image'], GKE, {'KIND': 'cuda', 'IMAGE': 'xyz'}),
  ('gke.sh', ['logs'], GKE, {'WORKER': '77', 'SLICE': '66'}),
  ('gke.sh', ['xpk', *RUN], XPK, {
    'CLUSTER': 'xyz', 'PROJECT': 'xyz', 'ZONE': 'xyz', 'TPU': 'xyz',
    'STORAGE': 'xyz', 'SLICES': '3', 'RESTARTS': '77',
  }),
  ('gpu.sh', RUN, GPUS | {'PROCESSES': '2'}, {
    'HOSTS': '3', 'HOST_INDEX': '0', 'COORDINATOR': 'n7:7', 'PROCESSES': '4',
    'GPUS': '4', 'PLATFORM': 'cpu',
  }),
  ('gpu.sh', RUN, {'PLATFORM': 'cpu'}, {'DEVICES': '77'}),
  ('rl.sh', ['agents'], RL, {'TRAINER': 'n7', 'PORT': '77', 'CPUS': '66'}),
  ('rl.sh', ['trainer', *RUN], RL, {'PLATFORM': 'tpu'}),
)  # fmt: skip
# Script, arguments, what must be set, and what is missing when nothing is.
MISSING = (
  ('tpu_vm.sh', ['create'], {}, 'NAME PROJECT ZONE'),
  ('tpu_vm.sh', ['create'], CLOUD, 'TPU'),
  ('tpu_vm.sh', ['run', *RUN], CLOUD | {'BUCKET': ''}, 'BUCKET'),
  ('tpu_vm.sh', ['secrets'], CLOUD, 'SECRETS'),
  ('gke.sh', ['apply', *RUN], {}, 'NAME IMAGE ACCELERATOR HOSTS BUCKET'),
  ('gke.sh', ['xpk', *RUN], {}, 'NAME IMAGE CLUSTER PROJECT ZONE TPU STORAGE'),
  ('gpu.sh', RUN, {'HOSTS': '2'}, 'HOST_INDEX COORDINATOR'),
  ('rl.sh', ['agents'], {}, 'TRAINER'),
  ('rl.sh', ['trainer', *RUN], {}, 'TRAINER'),
)
# Script, arguments, variables, and what the refusal says.
WRONG = (
  ('tpu_vm.sh', ['creat'], TPU_VM, "'creat' is no action"),
  ('tpu_vm.sh', ['run'], TPU_VM, 'run what?'),
  ('tpu_vm.sh', ['create'], TPU_VM | {'TPU': 'v9-8'}, 'TPU=v9-8: set RUNTIME'),
  ('tpu_vm.sh', ['create'], TPU_VM | {'SLICES': 'two'}, "SLICES='two'"),
  ('tpu_vm.sh', ['run', *RUN], TPU_VM | {'SECRETS': 'A=1'}, 'no name of a var'),
  ('gke.sh', ['apply', *RUN], GKE | {'TOPOLOGY': '4by4'}, 'TOPOLOGY=4by4'),
  ('gke.sh', ['apply', *RUN], GKE | {'TOPOLOGY': '2x3'}, 'no multiple of'),
  ('gke.sh', ['apply', *RUN], GKE | {'NAME': 'a"b'}, 'NAME='),
  ('gke.sh', ['apply'], GKE, 'apply what?'),
  ('gke.sh', ['xpk', *RUN], XPK | {'SECRETS': 'A'}, 'use apply'),
  ('gpu.sh', RUN, {'PLATFORM': 'gpu'}, 'PLATFORM=gpu: choose'),
  ('gpu.sh', RUN, GPUS | {'HOST_INDEX': '2'}, 'HOST_INDEX=2'),
  ('gpu.sh', RUN, {'PROCESSES': '3', 'GPUS': '8'}, 'evenly'),
  ('rl.sh', ['head'], RL, "'head' is no role"),
  ('rl.sh', ['trainer'], RL, 'trainer what?'),
  ('rl.sh', ['agents', 'x'], RL, 'takes no arguments'),
)


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


class DryRunTest(Project):
  @parameterized.parameters(*CALLS)
  def test_prints_what_is_done_and_does_nothing(self, script, words, given):
    secrets = {name: f'{SECRET}-{name}' for name in ('TOKEN_A', 'TOKEN_B')}
    secrets['RAY_AUTH_TOKEN'] = SECRET
    shown = self.call(script, '--dry-run', *words, **given, **secrets)
    self.assertEqual((shown.returncode, shown.stderr), (0, ''))
    self.assertEmpty(self.recorded(), 'a dry run called something')
    self.assertNotIn(SECRET, shown.stdout)
    done = self.call(script, *words, **given, **secrets)
    self.assertEqual(done.returncode, 0, done.stderr)
    calls = self.recorded()
    self.assertNotEmpty(calls)
    pasted = subprocess.run(
      ['bash', '-euc', shown.stdout],
      stdin=subprocess.DEVNULL,
      env=self.environment(**given, **secrets),
      cwd=self.folder,
      capture_output=True,
      text=True,
      timeout=60,
    )
    self.assertEqual(pasted.returncode, 0, pasted.stderr)
    self.assertEqual(self.recorded(), calls)
    self.assertNotIn(SECRET, done.stdout + done.stderr)
    for call in calls:  # by pipe alone, never where `ps` or a log shows it
      arguments = re.findall(r'<([^>]*)>', call)
      self.assertNotIn(SECRET, ' '.join(arguments))
    if words == ['secrets']:
      self.assertIn(secrets['TOKEN_A'], ' '.join(calls))
    for left in self.folder.rglob('*'):
      if left.is_file() and '.git' not in left.parts and left != self.record:
        self.assertNotIn(SECRET.encode(), left.read_bytes(), left)

  @parameterized.parameters(*CALLS)
  def test_needs_no_program_and_no_secret(self, script, words, given):
    shutil.rmtree(self.programs)
    run = self.call(script, *words, '--dry-run', **given)
    self.assertEqual((run.returncode, run.stderr), (0, ''))

  @parameterized.parameters(*HEARD)
  def test_hears_its_variables(self, script, words, given, others):
    usual = self.call(script, '--dry-run', *words, **given).stdout
    self.assertNotEmpty(usual)
    for name, value in others.items():
      changed = self.call(script, '--dry-run', *words, **given | {name: value})
      self.assertEqual(changed.returncode, 0, changed.stderr)
      self.assertNotEqual(changed.stdout, usual, f'{name}={value} is not heard')
      if value not in ('yes', ''):
        self.assertIn(value, changed.stdout, name)

  @parameterized.parameters(*MISSING)
  def test_names_every_variable_that_is_missing(
    self, script, words, given, names
  ):
    for dry in ([], ['--dry-run']):
      run = self.call(script, *dry, *words, **given)
      self.assertEqual((run.returncode, run.stdout), (2, ''))
      for name in names.split():
        self.assertRegex(run.stderr, rf'(?m)^  {name}: \S')
      self.assertEmpty(self.recorded())

  @parameterized.parameters(*WRONG)
  def test_refuses_in_one_line(self, script, words, given, message):
    run = self.call(script, '--dry-run', *words, **given)
    self.assertEqual((run.returncode, run.stdout), (2, ''))
    self.assertIn(message, run.stderr)
    self.assertLen(run.stderr.splitlines(), 1)

  @parameterized.parameters('tpu_vm.sh', 'gke.sh')
  def test_a_secret_without_a_value_is_named(self, script):
    given = {'tpu_vm.sh': TPU_VM, 'gke.sh': GKE}[script]
    run = self.call(script, 'secrets', TOKEN_A='x', **given)
    self.assertEqual(run.returncode, 2)
    self.assertIn('TOKEN_B: ', run.stderr)
    self.assertEmpty(self.recorded())

  @parameterized.parameters('tpu_vm.sh', 'gke.sh', 'gpu.sh', 'rl.sh')
  def test_the_manual_tells_of_all_that_there_is(self, script):
    manual = self.call(script)
    self.assertEqual(manual.returncode, 2)
    text = (LAUNCH / script).read_text()
    body = text.split('set -euo pipefail')[1]
    told = re.search(r'Variables:\n(.*)', manual.stdout, re.S).group(1)
    variables = re.findall(r'^  ([A-Z_]+(?:, [A-Z_]+)*)', told, re.M)
    for name in ' '.join(variables).replace(',', ' ').split():
      self.assertRegex(body, rf'\b{name}\b', f'{script} does not read {name}')
    actions = re.findall(r'^  ([a-z]+)  ', manual.stdout, re.M)
    for action in actions:
      run = self.call(script, '--dry-run', action)
      self.assertNotIn('is no ', run.stderr, action)

  def test_a_program_that_is_not_there_is_named(self):
    for name in PROGRAMS:
      (self.programs / name).unlink()
    path = f'{self.programs}:/usr/bin:/bin'
    for name in ('bash', 'basename', 'dirname', 'sed', 'cat'):
      (self.programs / name).symlink_to(shutil.which(name))
    run = subprocess.run(
      ['bash', self.folder / 'launch' / 'gke.sh', 'xpk', *RUN],
      env=self.environment(**XPK) | {'PATH': path},
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 2)
    self.assertIn('xpk is not installed: pip install xpk', run.stderr)

  def test_waiting_ends_when_nothing_will_come(self):
    self.program(self.programs / 'gcloud', '#!/bin/sh\necho SUSPENDED\n')
    run = self.call('tpu_vm.sh', 'wait', **TPU_VM)
    self.assertEqual(run.returncode, 2)
    self.assertIn('exp1 is SUSPENDED after 0 minutes', run.stderr)
    self.assertIn('delete it', run.stderr)


class GpuTest(Project):
  """What gpu.sh does with its processes."""

  SLURM = {
    'SLURM_JOB_ID': '5000', 'SLURM_JOB_NUM_NODES': '3',
    'SLURM_STEP_NODELIST': 'gpu[7-9]', 'SLURM_STEP_NUM_NODES': '3',
    'SLURM_STEP_NUM_TASKS': '3', 'SLURM_NODEID': '2',
  }  # fmt: skip

  def slurm(self, **changes):
    self.program(
      self.programs / 'scontrol',
      '#!/bin/sh\n[ "$*" = "show hostnames gpu[7-9]" ] &&'
      ' printf "gpu7\\ngpu8\\ngpu9\\n"\n',
    )
    return self.call('gpu.sh', '--dry-run', *RUN, **self.SLURM | changes)

  def test_slurm_says_where_this_is(self):
    shown = self.slurm().stdout
    self.assertIn('JAX_COORDINATOR_ADDRESS=gpu7:62344 ', shown)
    self.assertIn('JAX_NUM_PROCESSES=3 JAX_PROCESS_ID=2 ', shown)

  def test_slurm_tasks_beside_its_own_processes_are_refused(self):
    run = self.slurm(SLURM_STEP_NUM_TASKS='24')
    self.assertEqual(run.returncode, 2)
    self.assertIn('--ntasks-per-node=1', run.stderr)

  def test_a_batch_script_without_srun_is_refused(self):
    run = self.slurm(SLURM_STEP_NODELIST='')
    self.assertEqual(run.returncode, 2)
    self.assertIn('srun', run.stderr)

  def test_ranks_and_devices_are_shared_out_whole(self):
    ranks, devices = [], []
    for host in range(2):
      given = GPUS | {'HOST_INDEX': str(host), 'PROCESSES': '4'}
      shown = self.call('gpu.sh', '--dry-run', *RUN, **given).stdout
      ranks += re.findall(r'JAX_PROCESS_ID=(\d+)', shown)
      devices += re.findall(r'CUDA_VISIBLE_DEVICES=([\d,]+)', shown)
    self.assertEqual(ranks, [str(i) for i in range(8)])
    self.assertEqual(devices, ['0,1', '2,3', '4,5', '6,7'] * 2)

  def test_one_process_needs_no_coordinator(self):
    self.assertNotIn('JAX_', self.call('gpu.sh', '--dry-run', *RUN).stdout)

  def test_a_failure_ends_the_others_and_is_passed_on(self):
    self.program(
      self.folder / '.venv/bin/python',
      '#!/bin/bash\n[[ $JAX_PROCESS_ID == 0 ]] && exec sleep 50\nexit 7\n',
    )
    start = time.monotonic()
    run = self.call('gpu.sh', *RUN, PLATFORM='cpu', PROCESSES='2', GRACE='1')
    self.assertEqual(run.returncode, 7)
    self.assertLess(time.monotonic() - start, 20)
    self.assertRegex(run.stderr, r'process \d+ ended with 7')

  def test_a_signal_reaches_the_processes_and_is_waited_for(self):
    self.program(
      self.folder / '.venv/bin/python',
      '#!/bin/bash\ntrap \'echo saved >>"$RECORD"; exit 0\' TERM\n'
      'echo up >>"$RECORD"\nfor ((i = 0; i < 500; i++)); do sleep 0.1; done\n',
    )
    run = subprocess.Popen(
      ['bash', self.folder / 'launch' / 'gpu.sh', *RUN],
      env=self.environment(PLATFORM='cpu', PROCESSES='2'),
      stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 20
    while time.monotonic() < end:
      if self.record.exists() and self.record.read_text().count('up') == 2:
        break
      time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    self.assertEqual(run.wait(timeout=20), 0)
    self.assertEqual(self.recorded().count('saved'), 2)


class LintTest(absltest.TestCase):
  def test_shellcheck(self):
    scripts = [*LAUNCH.glob('*.sh'), *(ROOT / 'tests').rglob('*.sh')]
    run = subprocess.run(
      [BIN / 'shellcheck', '--external-sources', *scripts, ROOT / '.ci/run'],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

  def test_dockerfile(self):
    run = subprocess.run(
      [BIN / 'hadolint', LAUNCH / 'Dockerfile'], capture_output=True, text=True
    )
    self.assertEqual(run.returncode, 0, run.stdout + run.stderr)


if __name__ == '__main__':
  absltest.main()
