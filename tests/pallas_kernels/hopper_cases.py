"""How the tests of Hopper kernels run and lower them on any machine."""

import contextlib

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

CUSTOM_CALLS = ('mosaic_gpu_v2', 'mosaic_gpu')


def compiled_here():
  """Interprets the kernels where there is no GPU."""
  if jax.default_backend() == 'gpu':
    return contextlib.nullcontext()
  return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())


def export(call, *shapes):
  """`call` lowered for GPUs, which needs none."""
  return jax.export.export(
    jax.jit(call),
    platforms=['cuda'],
    disabled_checks=[
      jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS
    ],
  )(*shapes)
