"""Checksums of arrays, computed where the arrays live.

Orbax finds truncated files but not flipped bits inside them. These sums are
saved with a checkpoint and compared when it is read back. They depend on the
values alone, not on how an array is sharded, so a checkpoint may be restored
on another mesh.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_STRIP = 2**16  # values that stay in the cache


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
  return [_sum(leaf) for leaf in leaves]


def _sum(x: jax.Array) -> jax.Array:
  """Sum of bits * (2 * index + 1) modulo 2^32.

  Odd factors are invertible, so a change of one element always shows; they
  differ, so most exchanges show too.
  """
  unsigned = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  index = jnp.zeros(x.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(x.ndim)):
    steps = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    index += steps * jnp.uint32(stride % 2**32)
    stride *= x.shape[axis]
  return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def partial(x: np.ndarray, first: int) -> int:
  """What some neighbouring values of an array add to its checksum.

  Args:
    x: the values, of an 8, 16 or 32 bit type.
    first: place of the first of them in the flat array.

  Returns:
    An int; the sum of all parts, modulo 2^32, is what `sums` gives.
  """
  bits = np.ascontiguousarray(x).reshape(-1).view(f'uint{8 * x.itemsize}')
  total = 0
  for start in range(0, bits.size, _STRIP):
    strip = bits[start : start + _STRIP].astype(np.uint32)
    plain = int(strip.sum(dtype=np.uint32))
    strip *= _odd()[: strip.size]
    total += int(strip.sum(dtype=np.uint32)) + 2 * (first + start) * plain
  return total % 2**32


@functools.cache
def _odd() -> np.ndarray:
  return np.arange(1, 2 * _STRIP, 2, dtype=np.uint32)


def sums(tree: Any) -> list[int]:
  """A 32-bit checksum of every array of `tree`, in flattening order.

  Args:
    tree: arrays of 8, 16 or 32 bit types.

  Returns:
    One int in [0, 2^32) for each leaf; waits for the arrays.
  """
  leaves = jax.tree.leaves(tree)
  return [int(np.asarray(value)) for value in jax.device_get(_sums(leaves))]
