"""One order of collectives for all devices of a mesh of CPUs.

XLA's CPU backend starts what follows a loop in a program, and needs nothing of
it, before the loop has ended. Where both hold collectives, devices can meet in
different ones: they then wait for each other for good, or take each other's
values (jaxlib 0.11.2; an edge that only orders when operations start, in
`ThunkExecutor`). What needs a loop's result does wait, so here values are made
to need one another. Accelerators run the collectives of a program in its order.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def together(values: Any) -> Any:
  """The same values, none of which exists before all do.

  Their gradients exist only once all of them, and the values, do. Where no mesh
  of several CPUs is set this is the identity, and so it is in `shard_map`.

  What is waited for is the first element on each device: of a value that only
  joins others, XLA may take it from one of them.

  Args:
    values: pytree of arrays.
  """
  if not _loose():
    return values
  leaves, tree = jax.tree.flatten(values)
  return jax.tree.unflatten(tree, _together(*leaves))


def checkpoint(function: Callable) -> Callable:
  """`jax.checkpoint` that computes again only once gradients have come.

  Args:
    function: of pytrees of arrays; it closes over no array.
  """
  plain, waiting = jax.checkpoint(function), jax.custom_vjp(function)

  def backward(given, gradients):
    given, gradients = together((given, gradients))
    return jax.vjp(function, *given)[1](gradients)

  waiting.defvjp(lambda *given: (function(*given), given), backward)
  return lambda *given: (waiting if _loose() else plain)(*given)


def _loose() -> bool:
  """Whether the mesh in use is of several CPUs."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
    return False
  return dispatch.device().platform == 'cpu'


@jax.custom_vjp
def _together(*leaves: jax.Array) -> tuple[jax.Array, ...]:
  specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
  # The values of a device wait for its own only: which of them are copies of
  # another device's does not change, but cannot be seen in what is done here.
  return jax.shard_map(_wait, in_specs=specs, out_specs=specs, check_vma=False)(
    *leaves
  )


def _forward(*leaves):
  done = _together(*leaves)
  return done, min(done, key=lambda leaf: leaf.size or math.inf)


def _backward(done, gradients):
  real = [g for g in gradients if g.dtype != jax.dtypes.float0]
  waited = iter(_together(*real, done))
  return tuple(
    g if g.dtype == jax.dtypes.float0 else next(waited) for g in gradients
  )


_together.defvjp(_forward, _backward)


def _wait(*blocks: jax.Array) -> tuple[jax.Array, ...]:
  """Selects each block by a condition that reads one element of every block."""
  first = [_first(block) for block in blocks if block.size]
  if not first:
    return blocks
  # A sort is one operation, which XLA does not repeat for every block.
  one = jnp.sort(jax.lax.concatenate(first, 0))[0]
  true = (one & 1) >> 1 == 0  # which no pass of XLA knows
  return tuple(
    jax.lax.select(true, block, jnp.zeros_like(block)) for block in blocks
  )


def _first(block: jax.Array) -> jax.Array:
  """The bits of the first element, uint32[1]."""
  corner = jax.lax.slice(block, (0,) * block.ndim, (1,) * block.ndim)
  if corner.dtype != jnp.bool_:
    kind = _BITS[corner.dtype.itemsize]
    corner = jax.lax.bitcast_convert_type(corner, kind)
  return corner.astype(jnp.uint32).reshape(1)
