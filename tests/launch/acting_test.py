"""What tpu_vm.sh tells its hosts, and gpu.sh its processes, really done."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

from absl.testing import absltest, parameterized

from tests.launch import project


class TpuVmTest(project.Project):
  """What hosts are told, done in a folder here by a gcloud of our own."""

  def setUp(self):
    super().setUp()
    self.host = self.folder / 'host'
    (self.host / 'bucket').mkdir(parents=True)
    self.program(self.programs / 'mountpoint', '#!/bin/sh\ntest -d "$1"\n')
    self.program(
      self.programs / 'gcloud',
      '#!/bin/bash\nfor word; do case $word in\n'
      '  --command=*) cd "$HOST_FOLDER" && exec bash -c "${word#*=}" ;;\n'
      '  --secret=*) [[ -z ${DENIED:-} ]] || exit 1\n'
      f'    printf %s "{project.SECRET}-${{word#*=}}" ;;\n'
      '  exp1:*) cp "$packed" "$HOST_FOLDER/${word#*:}" ;;\n'
      '  *.tar.gz) packed=$word ;;\n'
      'esac; done\n',
    )
    self.program(
      self.folder / '.venv/bin/python',
      '#!/bin/bash\n(printf "<%s>" "$@"; echo; env) >>"$RECORD"\n'
      'trap \'echo saved >>"$RECORD"; exit 0\' TERM\n'
      'for ((i = 0; i < 300; i++)); do sleep 0.1; done\n',
    )

  def act(self, *words: str, **changes: str):
    given = project.TPU_VM | {'HOST_FOLDER': str(self.host)} | changes
    return self.call('tpu_vm.sh', *words, **given)

  def eventually(self, text: str) -> str:
    end = time.monotonic() + 20
    while time.monotonic() < end:
      said = self.record.read_text() if self.record.exists() else ''
      if text in said:
        return said
      time.sleep(0.05)
    self.fail(f'{text!r} did not come: {said}')

  def test_a_run_is_started_once_with_its_secrets_and_stopped(self):
    copied = self.act('copy')
    self.assertEqual(copied.returncode, 0, copied.stderr)
    self.assertTrue((self.host / 'm2-jax' / 'launch' / 'gke.sh').exists())
    shutil.copytree(self.folder / '.venv', self.host / 'm2-jax' / '.venv')
    started = self.act('run', *project.RUN)
    self.assertEqual(started.returncode, 0, started.stderr)
    said = self.eventually('M2_HOSTS=auto')
    arguments = ['main.py', '--workdir=../bucket/exp1', *project.RUN]
    self.assertIn(''.join(f'<{word}>' for word in arguments), said)
    self.assertIn(f'TOKEN_A={project.SECRET}-exp1-TOKEN_A\n', said)
    again = self.act('run', *project.RUN)
    self.assertNotEqual(again.returncode, 0)
    self.assertIn('main.py runs already', again.stdout)
    self.assertEqual(self.act('stop').returncode, 0)
    self.eventually('saved')

  def test_files_deleted_but_not_staged_are_left_out(self):
    subprocess.run(['git', 'add', '.'], cwd=self.folder, check=True)
    (self.folder / 'launch' / 'gke.sh').unlink()
    copied = self.act('copy')
    self.assertEqual(copied.returncode, 0, copied.stderr)
    launch = self.host / 'm2-jax' / 'launch'
    self.assertTrue((launch / 'gpu.sh').exists())
    self.assertFalse((launch / 'gke.sh').exists())

  def test_without_a_secret_nothing_starts(self):
    (self.host / 'm2-jax').mkdir()
    run = self.act('run', *project.RUN, DENIED='yes')
    self.assertNotEqual(run.returncode, 0)
    self.assertFalse(self.record.exists())

  def test_without_the_bucket_nothing_starts(self):
    (self.host / 'bucket').rmdir()
    (self.host / 'm2-jax').mkdir()
    self.assertNotEqual(self.act('run', *project.RUN).returncode, 0)
    self.assertFalse(self.record.exists())


class GpuTest(project.Project):
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
    return self.call(
      'gpu.sh', '--dry-run', *project.RUN, **self.SLURM | changes
    )

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
      given = project.GPUS | {'HOST_INDEX': str(host), 'PROCESSES': '4'}
      shown = self.call('gpu.sh', '--dry-run', *project.RUN, **given).stdout
      ranks += re.findall(r'JAX_PROCESS_ID=(\d+)', shown)
      devices += re.findall(r'CUDA_VISIBLE_DEVICES=([\d,]+)', shown)
    self.assertEqual(ranks, [str(i) for i in range(8)])
    self.assertEqual(devices, ['0,1', '2,3', '4,5', '6,7'] * 2)

  @parameterized.parameters(('08', '8'), ('010', '10'))
  def test_a_number_with_zeros_before_it_is_decimal(self, index, rank):
    given = project.GPUS | {'HOSTS': '012', 'HOST_INDEX': index}
    shown = self.call('gpu.sh', '--dry-run', *project.RUN, **given).stdout
    self.assertIn(f'JAX_NUM_PROCESSES=12 JAX_PROCESS_ID={rank} ', shown)

  def test_only_the_gpus_that_are_visible_are_shared_out(self):
    given = {'CUDA_VISIBLE_DEVICES': '4,GPU-5a,6,7', 'PROCESSES': '2'}
    shown = self.call('gpu.sh', '--dry-run', *project.RUN, **given).stdout
    devices = re.findall(r'CUDA_VISIBLE_DEVICES=(\S+)', shown)
    self.assertEqual(devices, ['4,GPU-5a', '6,7'])

  def test_one_process_needs_no_coordinator(self):
    self.assertNotIn(
      'JAX_', self.call('gpu.sh', '--dry-run', *project.RUN).stdout
    )

  def test_a_failure_ends_the_others_and_is_passed_on(self):
    self.program(
      self.folder / '.venv/bin/python',
      '#!/bin/bash\n[[ $JAX_PROCESS_ID == 0 ]] && exec sleep 50\nexit 7\n',
    )
    start = time.monotonic()
    run = self.call(
      'gpu.sh', *project.RUN, PLATFORM='cpu', PROCESSES='2', GRACE='1'
    )
    self.assertEqual(run.returncode, 7)
    self.assertLess(time.monotonic() - start, 20)
    self.assertRegex(run.stderr, r'process \d+ ended with 7')

  def test_a_signal_while_processes_are_started_reaches_them(self):
    self.program(
      self.folder / '.venv/bin/python',
      '#!/bin/bash\n[[ $JAX_PROCESS_ID != 0 ]] || kill -TERM $PPID\n'
      'exec sleep 20\n',
    )
    start = time.monotonic()
    run = self.call('gpu.sh', *project.RUN, PLATFORM='cpu', PROCESSES='20')
    self.assertEqual(run.returncode, 128 + signal.SIGTERM)
    self.assertLess(time.monotonic() - start, 15)

  @parameterized.parameters(
    (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)
  )
  def test_a_signal_reaches_the_processes_and_is_waited_for(self, number, all):
    """`all`: Ctrl-C and some schedulers signal the whole process group."""
    self.program(
      self.folder / '.venv/bin/python',
      '#!/bin/bash\ntrap \'sleep 1; echo saved >>"$RECORD"; exit 0\' TERM\n'
      'echo up >>"$RECORD"\nfor ((i = 0; i < 500; i++)); do sleep 0.1; done\n',
    )
    run = subprocess.Popen(
      ['bash', self.folder / 'launch' / 'gpu.sh', *project.RUN],
      env=self.environment(PLATFORM='cpu', PROCESSES='2'),
      stderr=subprocess.DEVNULL,
      start_new_session=True,
      # Ignored where the tests run in the background; so it would stay.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 20
    while time.monotonic() < end:
      if self.record.exists() and self.record.read_text().count('up') == 2:
        break
      time.sleep(0.05)
    os.killpg(run.pid, number) if all else run.send_signal(number)
    self.assertEqual(run.wait(timeout=20), 0)
    self.assertEqual(self.recorded().count('saved'), 2)


class RlTest(project.Project):
  """What rl.sh does with Ray and main.py."""

  def setUp(self):
    super().setUp()
    self.server = self.enter_context(socket.create_server(('127.0.0.1', 0)))
    self.port = str(self.server.getsockname()[1])
    self.given = {
      'PLATFORM': 'cpu', 'TRAINER': '127.0.0.1', 'PORT': self.port,
      'RAY_AUTH_TOKEN': project.SECRET,
    }  # fmt: skip

  @parameterized.parameters(
    (['local', *project.RUN], 'python'), (['agents'], 'ray')
  )
  def test_a_signal_to_the_script_reaches_what_it_runs(self, words, name):
    self.program(
      self.folder / '.venv/bin' / name,
      '#!/bin/bash\ntrap \'echo saved >>"$RECORD"; exit 0\' TERM\n'
      'echo up >>"$RECORD"\nfor ((i = 0; i < 300; i++)); do sleep 0.1; done\n',
    )
    run = subprocess.Popen(
      ['bash', self.folder / 'launch' / 'rl.sh', *words],
      env=self.environment(**self.given),
      stdin=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 20
    while time.monotonic() < end:
      if self.record.exists() and 'up\n' in self.record.read_text():
        break
      time.sleep(0.05)
    run.terminate()
    self.assertEqual(run.wait(timeout=20), 0)
    self.assertIn('saved', self.recorded())

  def train(self) -> str:
    run = self.call('rl.sh', 'trainer', *project.RUN, **self.given)
    self.assertEqual(run.returncode, 2, run.stderr)
    self.assertNotIn('main.py', ''.join(self.recorded()))
    return run.stderr

  def test_a_port_that_is_taken_is_refused(self):
    self.assertIn(f'listens at 127.0.0.1:{self.port} already', self.train())

  def test_who_listens_in_place_of_ray_is_not_taken_for_it(self):
    self.server.close()
    listen = (
      'import os, socket, time;'
      f' s = socket.create_server(("127.0.0.1", {self.port}));'
      ' os.fork() or time.sleep(3)'
    )
    self.program(
      self.folder / '.venv/bin/ray',
      f"#!/bin/bash\n{sys.executable} -c '{listen}' 2>/dev/null\nexit 1\n",
    )
    self.assertIn('Ray did not start', self.train())


if __name__ == '__main__':
  absltest.main()
