"""The launch scripts, in a project whose programs only note their calls.

What --dry-run prints is pasted into a shell, and must call what the script
calls without it: so the tests hold no copy of what is printed.
"""

import pathlib
import re
import shutil
import socket
import subprocess
import sys

from absl.testing import absltest, parameterized

from tests.launch import project

BIN = pathlib.Path(sys.executable).parent
GKE = project.CLOUD | {
  'IMAGE': 'reg/m2@sha256:0', 'ACCELERATOR': 'tpu-v5p-slice',
  'TOPOLOGY': '4x4x4', 'SECRETS': 'TOKEN_A TOKEN_B',
}  # fmt: skip
XPK = GKE | {'CLUSTER': 'c', 'TPU': 'v5p-128', 'STORAGE': 's', 'SECRETS': ''}
RL = {'TRAINER': '127.0.0.1', 'PORT': '1'}
# Script, action and arguments, variables: every action of every script.
CALLS = (
  *(
    ('tpu_vm.sh', [action], project.TPU_VM)
    for action in (
      'create', 'wait', 'copy', 'setup', 'secrets', 'logs', 'status', 'stop',
      'fetch', 'delete',
    )
  ),
  ('tpu_vm.sh', ['run', *project.RUN], project.TPU_VM),
  ('tpu_vm.sh', ['copy'], project.TPU_VM | {'REPO': 'https://h/r'}),
  *(
    ('gke.sh', [action], GKE)
    for action in ('image', 'secrets', 'status', 'logs', 'fetch', 'delete')
  ),
  ('gke.sh', ['apply', *project.RUN], GKE),
  ('gke.sh', ['xpk', *project.RUN], XPK),
  ('gpu.sh', project.RUN, {'PLATFORM': 'cpu', 'DEVICES': '3'}),
  ('gpu.sh', project.RUN, project.GPUS | {'PROCESSES': '2'}),
  ('rl.sh', ['local', *project.RUN], {'PLATFORM': 'cpu'}),
  ('quickstart.sh', ['--config.seed=1', project.ODD], {}),
  ('quickstart.sh', [], {}),
)  # fmt: skip
# Script, arguments, variables, and variable -> what shows that it was heard.
HEARD = (
  ('tpu_vm.sh', ['create'], project.TPU_VM, {
    'NAME': 'xyz', 'PROJECT': 'xyz', 'ZONE': 'xyz', 'TPU': 'v6e-16',
    'RUNTIME': 'xyz', 'NETWORK': 'xyz', 'SUBNETWORK': 'xyz',
    'SERVICE_ACCOUNT': 'xyz', 'SPOT': 'yes', 'RESERVED': 'yes', 'SLICES': '3',
  }),
  ('tpu_vm.sh', ['run', *project.RUN], project.TPU_VM, {'SECRETS': 'TOKEN_C'}),
  (
    'tpu_vm.sh', ['copy'], project.TPU_VM | {'REPO': 'https://h/r'},
    {'REPO': 'https://other', 'REF': 'abc'},
  ),
  ('tpu_vm.sh', ['setup'], project.TPU_VM, {'BUCKET': 'xyz'}),
  ('tpu_vm.sh', ['logs'], project.TPU_VM, {'WORKER': '77', 'SLICE': '66'}),
  ('gke.sh', ['apply', *project.RUN], GKE, {
    'NAME': 'xyz', 'NAMESPACE': 'xyz', 'IMAGE': 'xyz', 'ACCELERATOR': 'xyz',
    'TOPOLOGY': '2x2x4', 'CHIPS': '8', 'SLICES': '3', 'SPOT': 'yes',
    'RESTARTS': '77', 'BUCKET': 'xyz', 'SERVICE_ACCOUNT': 'xyz', 'SECRETS': '',
  }),
  ('gke.sh', ['apply', *project.RUN], GKE | {'TOPOLOGY': '', 'HOSTS': '2'},
   {'HOSTS': '77'}),
  ('gke.sh', ['image'], GKE, {'KIND': 'cuda', 'IMAGE': 'xyz'}),
  ('gke.sh', ['logs'], GKE, {'WORKER': '77', 'SLICE': '66'}),
  ('gke.sh', ['xpk', *project.RUN], XPK, {
    'CLUSTER': 'xyz', 'PROJECT': 'xyz', 'ZONE': 'xyz', 'TPU': 'xyz',
    'STORAGE': 'xyz', 'SLICES': '3', 'RESTARTS': '77',
  }),
  ('gpu.sh', project.RUN, project.GPUS | {'PROCESSES': '2'}, {
    'HOSTS': '3', 'HOST_INDEX': '0', 'COORDINATOR': 'n7:7', 'PROCESSES': '4',
    'GPUS': '4', 'PLATFORM': 'cpu',
  }),
  ('gpu.sh', project.RUN, {'PLATFORM': 'cpu'}, {'DEVICES': '77'}),
  ('rl.sh', ['agents'], RL, {'TRAINER': 'n7', 'PORT': '77', 'CPUS': '66'}),
  ('rl.sh', ['trainer', *project.RUN], RL, {'PLATFORM': 'tpu'}),
)  # fmt: skip
# Script, arguments, what must be set, and what is missing when nothing is.
MISSING = (
  ('tpu_vm.sh', ['create'], {}, 'NAME PROJECT ZONE'),
  ('tpu_vm.sh', ['create'], project.CLOUD, 'TPU'),
  (
    'tpu_vm.sh',
    ['run', *project.RUN],
    project.CLOUD | {'BUCKET': ''},
    'BUCKET',
  ),
  ('tpu_vm.sh', ['secrets'], project.CLOUD, 'SECRETS'),
  (
    'gke.sh',
    ['apply', *project.RUN],
    {},
    'NAME IMAGE ACCELERATOR HOSTS BUCKET',
  ),
  (
    'gke.sh',
    ['xpk', *project.RUN],
    {},
    'NAME IMAGE CLUSTER PROJECT ZONE TPU STORAGE',
  ),
  ('gpu.sh', project.RUN, {'HOSTS': '2'}, 'HOST_INDEX COORDINATOR'),
  ('rl.sh', ['agents'], {}, 'TRAINER'),
  ('rl.sh', ['trainer', *project.RUN], {}, 'TRAINER'),
)
# Script, arguments, variables, and what the refusal says.
WRONG = (
  ('tpu_vm.sh', ['creat'], project.TPU_VM, "'creat' is no action"),
  ('tpu_vm.sh', ['run'], project.TPU_VM, 'run what?'),
  (
    'tpu_vm.sh',
    ['create'],
    project.TPU_VM | {'TPU': 'v9-8'},
    'TPU=v9-8: set RUNTIME',
  ),
  ('tpu_vm.sh', ['create'], project.TPU_VM | {'SLICES': 'two'}, "SLICES='two'"),
  (
    'tpu_vm.sh',
    ['run', *project.RUN],
    project.TPU_VM | {'SECRETS': 'A=1'},
    'no name of a var',
  ),
  (
    'gke.sh',
    ['apply', *project.RUN],
    GKE | {'TOPOLOGY': '4by4'},
    'TOPOLOGY=4by4',
  ),
  (
    'gke.sh',
    ['apply', *project.RUN],
    GKE | {'TOPOLOGY': '2x3'},
    'no multiple of',
  ),
  ('gke.sh', ['apply', *project.RUN], GKE | {'NAME': 'a"b'}, 'NAME='),
  ('gke.sh', ['apply'], GKE, 'apply what?'),
  ('gke.sh', ['xpk', *project.RUN], XPK | {'SECRETS': 'A'}, 'use apply'),
  (
    'gke.sh',
    ['apply', *project.RUN],
    GKE | {'BUCKET': 'gs://b'},
    "BUCKET='gs://b': give the bucket's name",
  ),
  ('tpu_vm.sh', ['fetch'], project.TPU_VM | {'BUCKET': 'b/c'}, "BUCKET='b/c'"),
  ('gpu.sh', project.RUN, {'PLATFORM': 'gpu'}, 'PLATFORM=gpu: choose'),
  ('gpu.sh', project.RUN, project.GPUS | {'HOST_INDEX': '2'}, 'HOST_INDEX=2'),
  ('gpu.sh', project.RUN, {'PROCESSES': '3', 'GPUS': '8'}, 'evenly'),
  ('rl.sh', ['head'], RL, "'head' is no role"),
  ('rl.sh', ['trainer'], RL, 'trainer what?'),
  ('rl.sh', ['agents', 'x'], RL, 'takes no arguments'),
)


class DryRunTest(project.Project):
  @parameterized.parameters(*CALLS)
  def test_prints_what_is_done_and_does_nothing(self, script, words, given):
    self.check_same(script, words, given)

  def test_agents_do_what_they_print_once_the_trainer_listens(self):
    with socket.create_server(('127.0.0.1', 0)) as trainer:
      port = str(trainer.getsockname()[1])
      self.check_same('rl.sh', ['agents'], RL | {'CPUS': '3', 'PORT': port})

  def check_same(self, script, words, given):
    """A dry run, then its lines pasted, against the run itself."""
    secrets = {
      name: f'{project.SECRET}-{name}' for name in ('TOKEN_A', 'TOKEN_B')
    }
    secrets['RAY_AUTH_TOKEN'] = project.SECRET
    shown = self.call(script, '--dry-run', *words, **given, **secrets)
    self.assertEqual((shown.returncode, shown.stderr), (0, ''))
    self.assertEmpty(self.recorded(), 'a dry run called something')
    self.assertNotIn(project.SECRET, shown.stdout)
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
    self.assertNotIn(project.SECRET, done.stdout + done.stderr)
    for call in calls:  # by pipe alone, never where `ps` or a log shows it
      arguments = re.findall(r'<([^>]*)>', call)
      self.assertNotIn(project.SECRET, ' '.join(arguments))
    if words == ['secrets']:
      self.assertIn(secrets['TOKEN_A'], ' '.join(calls))
    for left in self.folder.rglob('*'):
      if left.is_file() and '.git' not in left.parts and left != self.record:
        self.assertNotIn(project.SECRET.encode(), left.read_bytes(), left)

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
    given = {'tpu_vm.sh': project.TPU_VM, 'gke.sh': GKE}[script]
    run = self.call(script, 'secrets', TOKEN_A='x', **given)
    self.assertEqual(run.returncode, 2)
    self.assertIn('TOKEN_B: ', run.stderr)
    self.assertEmpty(self.recorded())

  @parameterized.parameters('tpu_vm.sh', 'gke.sh', 'gpu.sh', 'rl.sh')
  def test_the_manual_tells_of_all_that_there_is(self, script):
    manual = self.call(script)
    self.assertEqual(manual.returncode, 2)
    text = (project.LAUNCH / script).read_text()
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
    for name in project.PROGRAMS:
      (self.programs / name).unlink()
    path = f'{self.programs}:/usr/bin:/bin'
    for name in ('bash', 'basename', 'dirname', 'sed', 'cat'):
      (self.programs / name).symlink_to(shutil.which(name))
    run = subprocess.run(
      ['bash', self.folder / 'launch' / 'gke.sh', 'xpk', *project.RUN],
      env=self.environment(**XPK) | {'PATH': path},
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 2)
    self.assertIn('xpk is not installed: pip install xpk', run.stderr)

  def test_waiting_ends_when_nothing_will_come(self):
    self.program(self.programs / 'gcloud', '#!/bin/sh\necho SUSPENDED\n')
    run = self.call('tpu_vm.sh', 'wait', **project.TPU_VM)
    self.assertEqual(run.returncode, 2)
    self.assertIn('exp1 is SUSPENDED after 0 minutes', run.stderr)
    self.assertIn('delete it', run.stderr)


class ReadmeTest(project.Project):
  def test_every_command_is_accepted(self):
    """In the order of the page: exports of an earlier line still stand."""
    text = (project.LAUNCH / 'README.md').read_text()
    blocks = re.findall(r'```bash\n(.*?)```', text, re.S)
    lines = ''.join(blocks).replace('\\\n', '').splitlines()
    exports, tried = [], []
    for line in lines:
      if line.startswith('export '):
        exports.append(line)
      found = re.match(r'([A-Z_]+=\S+ )*\s*bash (launch/(\w+)\.sh) ', line)
      if not found or found.group(3) in ('env', 'quickstart'):
        continue
      tried.append(found.group(3))
      dry = line.replace(found.group(2), f'{found.group(2)} --dry-run', 1)
      run = subprocess.run(
        ['bash', '-c', '\n'.join([*exports, dry])],
        env=self.environment(),
        cwd=self.folder,
        capture_output=True,
        text=True,
      )
      self.assertEqual((run.returncode, run.stderr), (0, ''), line)
      self.assertNotEmpty(run.stdout, line)
    self.assertEqual(set(tried), {'tpu_vm', 'gke', 'gpu', 'rl'})
    self.assertGreater(len(tried), 20)


class LintTest(absltest.TestCase):
  def test_shellcheck(self):
    scripts = [
      *project.LAUNCH.glob('*.sh'),
      *(project.ROOT / 'tests').rglob('*.sh'),
    ]
    run = subprocess.run(
      [
        BIN / 'shellcheck',
        '--external-sources',
        *scripts,
        project.ROOT / '.ci/run',
      ],
      cwd=project.ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

  def test_dockerfile(self):
    run = subprocess.run(
      [BIN / 'hadolint', project.LAUNCH / 'Dockerfile'],
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stdout + run.stderr)


if __name__ == '__main__':
  absltest.main()
