"""How the tests of Hopper kernels run and lower them on any machine."""

import contextlib
import types
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gmm import gathered, slices

CUSTOM_CALLS = ('mosaic_gpu_v2', 'mosaic_gpu')


def barriers(stages):
  return plgpu.Barrier(num_barriers=stages)


def look_up(source_ref, *, first, count, left, choices):
  del left
  last = source_ref.shape[0] - 1
  places = [jnp.minimum(first + row, last) for row in range(count)]
  return jnp.stack([source_ref[place] for place in places]) // choices


def copy(x_ref, tokens, smem, landed, *, slot, column, count, left):
  columns_MK = x_ref[:, pl.ds(column, smem.shape[1])]
  rows = jnp.take(columns_MK, tokens[:count], axis=0, mode='clip')
  inside = (jnp.arange(count) < left)[:, None]
  smem[pl.ds(0, count)] = jnp.where(inside, rows, jnp.nan).astype(rows.dtype)
  plgpu.barrier_arrive(landed.at[slot])


def wait(landed, ring):
  plgpu.barrier_wait(landed.at[lax.rem(ring, landed.shape[0])])


# `gathered` without the instructions that the interpreter cannot run: whole
# rows instead of threads' units, and Pallas' barriers instead of its own.
def add(total_MN, a_smem, b_smem, count):
  rows = pl.ds(0, slices.ROWS * count)
  a_RM, b_RN = (z[rows].astype(jnp.float32) for z in (a_smem, b_smem))
  return total_MN + a_RM.T @ b_RN


PLAIN = {
  'barriers': barriers,
  'prepare': lambda landed: None,
  'look_up': look_up,
  'copy': copy,
  'wait': wait,
}


@contextlib.contextmanager
def compiled_here():
  """Interprets the kernels where there is no GPU."""
  if jax.default_backend() == 'gpu':
    yield
    return
  with (
    mock.patch.multiple(gathered, **PLAIN),
    mock.patch.object(slices, 'add', add),
    plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()),
  ):
    yield


HOPPER = types.SimpleNamespace(
  platform='gpu',
  compute_capability='9.0',
  device_kind='NVIDIA H100 80GB HBM3',
  core_count=132,
  local_hardware_id=0,
)


def hopper_here():
  """Kernels believe in a GPU while they are lowered; nothing can be run."""
  return mock.patch.object(jax, 'local_devices', lambda: [HOPPER])


def export(call, *shapes):
  """`call` lowered for GPUs, which needs none."""
  return jax.export.export(
    jax.jit(call),
    platforms=['cuda'],
    disabled_checks=[
      jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS
    ],
  )(*shapes)


def kernels(exported) -> int:
  """How many of our kernels a lowered program has."""
  text = exported.mlir_module()
  return sum(text.count(f'@{name}(') for name in CUSTOM_CALLS)
