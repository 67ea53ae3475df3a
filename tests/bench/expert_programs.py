"""The programs of `expert_parallel`: what each contender is, and compiling all.

Kernels are lowered by Python, which takes half a minute a program: processes
do that side by side and hand the modules over, which threads then compile.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp

import pallas_kernels
from m2 import config
from m2.parallel import cost, exchange, experts, sharding
from m2.parallel import mesh as meshes
from pallas_kernels.links import mosaic_gpu as links

DEVICES = 2
CUSTOM_CALLS = ('mosaic_gpu_v2', 'mosaic_gpu', 'ragged_all_to_all')
# Without it communication waits its turn on GPUs.
OVERLAP = {'xla_gpu_enable_latency_hiding_scheduler': True}


@dataclasses.dataclass(frozen=True)
class Shape:
  """One layer: sizes, and the kernel backend that runs it."""

  tokens: int
  width: int
  hidden: int
  experts: int
  top_k: int
  impl: str | None


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled: a contender, or the communication of a strategy."""

  name: str
  direction: str
  shape: Shape


def spread() -> jax.sharding.Mesh:
  cfg = config.MeshConfig(data=1, expert=DEVICES)
  return meshes.make_mesh(cfg, jax.devices()[:DEVICES])


def shapes(program: Program) -> list[jax.ShapeDtypeStruct]:
  """Tokens, choices, weights, matrices and, for both, the sum's gradient."""
  s = program.shape
  held, lead = s.experts, (s.tokens,)
  rows = wide = tall = None
  if program.name == 'products':
    held, lead = s.experts // DEVICES, (DEVICES * s.tokens,)
  elif program.name != 'single':
    lead, mesh = (DEVICES, s.tokens), spread()
    rows, wide, tall = (
      jax.NamedSharding(mesh, sharding.spec(*axes))
      for axes in (
        ('batch', 'sequence', None),
        ('expert', None, 'ffn'),
        ('expert', 'ffn', None),
      )
    )
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  x = bf16((*lead, s.width), sharding=rows)
  found = [
    x,
    jax.ShapeDtypeStruct((*lead, s.top_k), jnp.int32, sharding=rows),
    jax.ShapeDtypeStruct((*lead, s.top_k), jnp.float32, sharding=rows),
    bf16((held, s.width, s.hidden), sharding=wide),
    bf16((held, s.width, s.hidden), sharding=wide),
    bf16((held, s.hidden, s.width), sharding=tall),
  ]
  return found + [x] * (program.direction == 'both')


def function(program: Program) -> Callable:
  """The contender in jax."""
  impl = program.shape.impl
  kind, _, name = program.name.rpartition(' ')
  strategy, _, chunks = name.partition(':')

  def layer(x, index, weight, *matrices):
    if strategy == 'single':
      return pallas_kernels.experts(x, index, weight, *matrices, impl=impl)
    if strategy == 'products':
      s = program.shape
      held = s.experts // DEVICES
      choices = cost.room(s.tokens, s.top_k, held, DEVICES).choices
      return pallas_kernels.experts(
        x, index, weight, *matrices, rows=DEVICES * choices, impl=impl
      )
    return experts.expert_parallel(
      x,
      (index, weight),
      *matrices,
      strategy=strategy,
      chunks=int(chunks),
      impl=impl,
    )

  def run(*operands):
    part = exchange.layer if kind != 'communication' else without_products
    with mock.patch.object(exchange, 'layer', part):
      if program.direction == 'forward':
        return layer(*operands)
      x, index, weight, *matrices, dy = operands
      if kind == 'communication':  # no matrices: their gradients are zeros
        y, pull = jax.vjp(
          lambda x, weight: layer(x, index, weight, *matrices), x, weight
        )
      else:
        y, pull = jax.vjp(
          lambda x, weight, *ws: layer(x, index, weight, *ws),
          x,
          weight,
          *matrices,
        )
      return y, *pull(dy)

  return run


def without_products(
  x_PD, index_PX, weight_PX, *matrices, rows=None, axis=None, impl
):
  """Stands for the experts: rows as they came, times their weights."""
  del matrices, rows, impl
  if axis:
    return there_and_back(axis, x_PD, index_PX, weight_PX)
  return (x_PD * weight_PX.sum(1, keepdims=True)).astype(x_PD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def there_and_back(axis, x_MD, index_MX, weight_MX):
  """The rows of `direct` to all devices and, as sums of one row, back."""
  x_PD, _, weight_PX = links.LINKS.gather(axis, x_MD, index_MX, weight_MX)
  return _back(axis, x_PD, weight_PX)


def _back(axis, x_PD, weight_PX):
  place_P1 = sharding.varying(jnp.arange(len(x_PD), dtype=jnp.int32)[:, None])
  none = jnp.zeros(0, jnp.int32)  # what `combine` does not read
  plan = pallas_kernels.Plan(none, none, place_P1, none)
  weight_P1 = weight_PX.sum(1, keepdims=True)
  return links.LINKS.combine(axis, x_PD, plan, weight_P1)


def _there_and_back_forward(axis, x_MD, index_MX, weight_MX):
  x_PD, _, weight_PX = links.LINKS.gather(axis, x_MD, index_MX, weight_MX)
  return _back(axis, x_PD, weight_PX), weight_PX


def _there_and_back_backward(axis, weight_PX, dy_MD):
  (dy_PD,) = links.LINKS.gather(axis, dy_MD)
  dx_MD = _back(axis, dy_PD, weight_PX)
  dweight_MX = jax.lax.psum_scatter(weight_PX, axis, tiled=True)
  return dx_MD, None, dweight_MX


there_and_back.defvjp(_there_and_back_forward, _there_and_back_backward)


def lowered(program: Program) -> bytes:
  """A contender as a module, made in a process of its own."""
  with jax.set_mesh(spread()) if ':' in program.name else mock.MagicMock():
    exported = jax.export.export(
      jax.jit(function(program)),
      disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call(x) for x in CUSTOM_CALLS
      ],
    )(*shapes(program))
  return bytes(exported.serialize())


def compiled(program: Program, module: bytes) -> Callable:
  """A module compiled for the devices here."""
  start = time.perf_counter()
  call = jax.jit(jax.export.deserialize(bytearray(module)).call)
  on_gpu = jax.default_backend() == 'gpu'
  with jax.set_mesh(spread()) if ':' in program.name else mock.MagicMock():
    found = call.lower(*shapes(program)).compile(
      compiler_options=OVERLAP if on_gpu else None
    )
  took = time.perf_counter() - start
  print(f'  {program.name} {program.direction}: {took:.0f} s', flush=True)
  return found


def compile_all(
  programs: Sequence[Program], workers: int
) -> dict[Program, Callable]:
  """All programs: lowered by processes, since that is Python, then compiled.

  Args:
    programs: what to compile.
    workers: processes, and threads.
  """
  start = time.perf_counter()
  context = multiprocessing.get_context('spawn')
  with (
    concurrent.futures.ProcessPoolExecutor(workers, context) as processes,
    concurrent.futures.ThreadPoolExecutor(workers) as threads,
  ):
    modules = {processes.submit(lowered, x): x for x in programs}
    futures = {}
    for done in concurrent.futures.as_completed(modules):
      program = modules[done]
      futures[program] = threads.submit(compiled, program, done.result())
    found = {program: future.result() for program, future in futures.items()}
  took = time.perf_counter() - start
  print(f'{len(found)} programs in {took:.0f} s', flush=True)
  return found
