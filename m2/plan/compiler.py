"""The TPU compiler (libtpu) on a machine without a TPU.

`prepare` comes before jax is imported: libtpu is looked for when jax starts,
and inside the environment it would look for a TPU in every process.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import resource
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBTPU = ROOT / '.tpu'

# `MULTIPLE`: a second compiling process on this host would otherwise die on
# libtpu's lock file. The rest only spares it looking for a TPU host.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  # What is compiled without a device cannot be read back.
  'JAX_ENABLE_COMPILATION_CACHE': 'false',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
}
_MEMORY = re.compile(r'([\d.]+)([KMGT]) of ([\d.]+)([KMGT])')
_TEMPORARY = re.compile(
  r'HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM '
  r'\(([\d.]+)([KMGT])\)'
)
_UNIT = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def prepare() -> None:
  """Makes libtpu importable and keeps jax on the CPU.

  Raises:
    ValueError: there is no libtpu; says how to get it.
  """
  os.environ.update(ENVIRONMENT)
  if importlib.util.find_spec('libtpu') is None:
    if not LIBTPU.is_dir():
      raise ValueError(
        'mode plan needs the TPU compiler: python -m pip install --no-deps '
        '--target .tpu -r tests/tpu_requirements.txt'
      )
    sys.path.append(str(LIBTPU))


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of compiling one program.

  Attributes:
    seconds: of the compiler, wall clock.
    compiler_bytes: resident memory of this process at its largest.
    peak: bytes of a device; what it would need where it does not fit.
    arguments: bytes of what comes in.
    limit: bytes that the compiler had, where it said so.
    flops: by the compiler's count, every loop body once.
    text: the program; empty where it does not fit.
  """

  seconds: float
  compiler_bytes: int
  peak: int
  arguments: int = 0
  limit: int = 0
  flops: float = 0.0
  text: str = ''

  @property
  def fits(self) -> bool:
    return bool(self.text)


def compile_program(program: Any) -> Outcome:
  """Compiles a `programs.Program` for its mesh.

  A program that does not fit is an outcome; any other refusal is raised.
  """
  import jax

  with jax.set_mesh(program.mesh):
    lowered = program.call.lower(*program.arguments)
    start = time.monotonic()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      needed, limit = out_of_memory(str(error))
      return Outcome(time.monotonic() - start, _resident(), needed, limit=limit)
  seconds = time.monotonic() - start
  found = compiled.memory_analysis()
  return Outcome(
    seconds,
    _resident(),
    found.peak_memory_in_bytes,
    found.argument_size_in_bytes,
    flops=compiled.cost_analysis().get('flops', 0.0),
    text=compiled.as_text(),
  )


def out_of_memory(message: str) -> tuple[int, int]:
  """Bytes needed and available, from the compiler's refusal.

  Raises:
    RuntimeError: it is about something else.
  """
  found = _TEMPORARY.search(message) or _MEMORY.search(message)
  if 'memory' not in message or not found:
    raise RuntimeError(f'the TPU compiler failed: {message[:2000]}')
  amount, unit, limit, limit_unit = found.groups()
  return (
    round(float(amount) * _UNIT[unit]),
    round(float(limit) * _UNIT[limit_unit]),
  )


def _resident() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
