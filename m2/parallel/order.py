"""One order of collectives for all devices of a mesh of CPUs.

XLA's CPU backend starts what follows a loop in a program, and needs nothing of
it, before the loop has ended. Where both hold collectives, devices can meet in
different ones: they then wait for each other for good, or take each other's
values (jaxlib 0.11.2; an edge that only orders when operations start, in
`ThunkExecutor`). What needs a loop's result does wait, so here values are made
to need one another. Accelerators run the collectives of a program in its order.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def together(values: Any) -> Any:
  """The same values, none of which exists before all do.

  Their gradients, too, exist only once all of them do. Where no mesh of several
  CPUs is set this is the identity.

  Args:
    values: pytree of arrays.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or dispatch.device().platform != 'cpu':
    return values
  leaves, tree = jax.tree.flatten(values)
  return jax.tree.unflatten(tree, _together(*leaves))


@jax.custom_vjp
def _together(*leaves: jax.Array) -> tuple[jax.Array, ...]:
  specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
  # The values of a device wait for its own only: which of them are copies of
  # another device's does not change, but cannot be seen in what is done here.
  return jax.shard_map(_wait, in_specs=specs, out_specs=specs, check_vma=False)(
    *leaves
  )


def _forward(*leaves):
  return _together(*leaves), None


def _backward(_, gradients):
  real = [g for g in gradients if g.dtype != jax.dtypes.float0]
  waited = iter(_together(*real) if real else ())
  return tuple(
    g if g.dtype == jax.dtypes.float0 else next(waited) for g in gradients
  )


_together.defvjp(_forward, _backward)


def _wait(*blocks: jax.Array) -> tuple[jax.Array, ...]:
  """Selects each block by a condition that reads one element of every block."""
  first = [_bits(block.reshape(-1)[0]) for block in blocks if block.size]
  # A sort is one operation, which XLA does not repeat for every block.
  one = jnp.sort(jnp.stack(first))[0]
  true = (one & 1) >> 1 == 0  # which no pass of XLA knows
  return tuple(
    jnp.where(true, block, jnp.zeros_like(block)) for block in blocks
  )


def _bits(value: jax.Array) -> jax.Array:
  if value.dtype == jnp.bool_:
    return value.astype(jnp.uint32)
  kind = _BITS[value.dtype.itemsize]
  return jax.lax.bitcast_convert_type(value, kind).astype(jnp.uint32)
