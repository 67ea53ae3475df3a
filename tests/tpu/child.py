"""Runs a module that compiles for TPUs in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from m2.plan import compiler as tpu_compiler

ROOT, LIBTPU = tpu_compiler.ROOT, tpu_compiler.LIBTPU


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
    env=os.environ | tpu_compiler.ENVIRONMENT | extra,
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f'{module} {" ".join(arguments)}: {done.stderr[-2000:]}')
  lines = done.stdout.splitlines()
  return [json.loads(line) for line in lines if line.startswith('{')]
