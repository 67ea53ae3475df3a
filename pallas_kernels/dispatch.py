"""Which backend runs an operation: asked for by name, or the best that can."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Literal

import jax

Impl = Literal['mosaic_tpu', 'mosaic_gpu', 'triton', 'xla']

# Order of preference on each platform.
PREFERRED = {
  'tpu': ('mosaic_tpu', 'xla'),
  'gpu': ('mosaic_gpu', 'xla'),
  'cpu': ('xla',),
}


def pick[Backend](
  operation: str,
  impl: Impl | None,
  table: Mapping[str, Backend],
  refusals: Mapping[str, str | None] | None = None,
) -> Backend:
  """Returns the backend of `operation`.

  Args:
    operation: its name, for messages.
    impl: a backend by name, or None for the best that can on this platform.
    table: backend name -> what runs it, the same kind of thing for each.
    refusals: backend name -> why it cannot run these arguments on this
      device, or None if it can; a backend left out can always.

  Raises:
    NotImplementedError: a backend asked for by name does not exist here, or
      refuses; a forced backend never falls back to another.
  """
  refusals = refusals or {}
  if impl == 'triton':
    raise NotImplementedError(
      f'{operation}: Pallas on Triton is deprecated since JAX 0.11 and not '
      "supported; use impl='mosaic_gpu' or 'xla'"
    )
  if impl is not None:
    if impl not in table:
      raise NotImplementedError(
        f'{operation}: no backend {impl!r}; there are {", ".join(table)}'
      )
    if reason := refusals.get(impl):
      raise NotImplementedError(f'{operation}: {impl} {reason}')
    return table[impl]
  elsewhere = target()
  platform = elsewhere.platform if elsewhere else jax.default_backend()
  passed = []
  for name in PREFERRED[platform]:
    if name not in table:
      passed.append(f'no {name} backend yet')
    elif reason := refusals.get(name):
      passed.append(f'{name} {reason}')
    else:
      break
  _announce(operation, platform, name, '; '.join(passed) or 'preferred')
  return table[name]


def target() -> jax.sharding.AbstractDevice | None:
  """The kind of device of the mesh in use; None without a mesh.

  A mesh may be of devices that are not here: what is traced under it is
  compiled for them ahead of time, so they decide and not this host's.
  """
  return jax.sharding.get_abstract_mesh().abstract_device


def device() -> jax.Device | jax.sharding.AbstractDevice:
  """A device of the mesh in use, or one of this host without a mesh."""
  return target() or jax.local_devices()[0]


def narrow[Result](kernel: Callable[..., Result]) -> Callable[..., Result]:
  """`kernel`, traced with numbers of 32 bits whatever the caller's have.

  Where JAX is told to take 64, every Python number in a kernel's body would,
  too, and neither matches the kernel's int32 nor is there on the device.
  """

  @functools.wraps(kernel)
  def call(*operands):
    with jax.enable_x64(False):
      return kernel(*operands)

  return call


def underivable[Result](
  operation: str, run: Callable[..., Result]
) -> Callable[..., Result]:
  """`run`, whose derivative in any positional array is an error.

  For what a rule of differentiation calls: kernels have no derivative of their
  own. Asked for one, Pallas fails without a reason or, where a kernel's operand
  is made of a number's bits, takes it for zero.

  Args:
    operation: its name, for the message.
    run: (*operands, **options); only arrays among the operands count.
  """

  @functools.wraps(run)
  def guarded(*operands, **options):
    operands = jax.tree.map(
      lambda z: _guard(operation, z) if isinstance(z, jax.Array) else z,
      operands,
    )
    return run(*operands, **options)

  return guarded


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _guard(operation: str, z: jax.Array) -> jax.Array:
  return z


@_guard.defjvp
def _refuse(operation, primals, tangents):
  raise NotImplementedError(
    f"{operation}: no kernel computes this derivative; use impl='xla', which "
    'is made of what JAX can derive'
  )


@functools.cache
def _announce(operation: str, platform: str, name: str, why: str) -> None:
  """Says once a process what was picked and why."""
  logging.getLogger('pallas_kernels').info(
    '%s on %s: %s (%s)', operation, platform, name, why
  )
