"""Runs a module that compiles for TPUs in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBTPU = ROOT / '.tpu'

# `MULTIPLE`: a second compiling process on this host would otherwise die on
# libtpu's lock file. The rest only spares it looking for a TPU host.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
}


def run(
  module: str, arguments: Sequence[str], *, compiler: str = ''
) -> list[dict[str, Any]]:
  """The lines of JSON that the module prints.

  Args:
    module: such as 'tests.tpu.kernels'.
    arguments: for it.
    compiler: flags of the TPU compiler.

  Raises:
    FileNotFoundError: the compiler is not there.
    RuntimeError: the module failed; with the end of what it wrote.
  """
  if not LIBTPU.is_dir():
    raise FileNotFoundError(
      'no .tpu folder with libtpu; bash tests/run.sh --all makes it'
    )
  extra = {'PYTHONPATH': str(LIBTPU), 'LIBTPU_INIT_ARGS': compiler}
  done = subprocess.run(
    [sys.executable, '-m', module, *arguments],
    cwd=ROOT,
    env=os.environ | ENVIRONMENT | extra,
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f'{module} {" ".join(arguments)}: {done.stderr[-2000:]}')
  lines = done.stdout.splitlines()
  return [json.loads(line) for line in lines if line.startswith('{')]
