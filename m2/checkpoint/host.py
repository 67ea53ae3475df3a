"""What XLA compiles for the host's own processor while files are converted.

NumPy passes over memory once an operation; a compiled program passes once, and
in wide registers. Callers use NumPy, for the same bytes, where a call costs
more than it saves, and where JAX was told to leave the CPU out.

Letters: R rows and C columns of a matrix of bytes; r and c words of four bytes
along them, w and v of the bytes in one.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LOW = np.uint32(0x0000FFFF)  # of a word's bytes, the two that come first
_EVEN = np.uint32(0x00FF00FF)
LEAST = 2**16  # values for which a program is worth its call
_MAKING = threading.Lock()


@functools.cache
def device() -> jax.Device | None:
  """The host's processor; None where JAX was told to leave it out."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None


def pays(size: int) -> bool:
  """Whether so many values are worth a program, and there can be one."""
  return size >= LEAST and device() is not None


def alone(device: jax.Device | None) -> Any:
  """A context in which the caller's mesh, which may have more, is not set."""
  device = device or jax.devices()[0]
  return jax.set_mesh(jax.sharding.Mesh(np.array(device), ()))


def once(make: Callable[..., Callable]) -> Callable[..., Callable]:
  """Keeps what `make` gives; threads do not make the same program twice."""
  kept = functools.cache(make)

  @functools.wraps(make)
  def find(*key: Any) -> Callable:
    with _MAKING:
      return kept(*key)

  return find


def compiled(run: Callable, *shapes: jax.ShapeDtypeStruct) -> Callable:
  """`run` for the host, of NumPy arrays of these shapes."""
  place = jax.sharding.SingleDeviceSharding(device())
  with alone(device()):
    placed = [z.update(sharding=place) for z in shapes]
    return jax.jit(run).lower(*placed).compile()


def transpose(x_RC: np.ndarray) -> np.ndarray:
  """The transpose of a matrix, in order in memory."""
  rows, columns = x_RC.shape
  if x_RC.itemsize > 1 or rows % 4 or columns % 4 or not pays(x_RC.size):
    return _transpose_words(x_RC)
  words_rwc = np.ascontiguousarray(x_RC).view(np.uint32)
  words_rwc = words_rwc.reshape(rows // 4, 4, columns // 4)
  words_cvr = np.asarray(_bytes_program(words_rwc.shape)(words_rwc))
  return words_cvr.view(x_RC.dtype).reshape(columns, rows)


@once
def _bytes_program(shape: tuple[int, int, int]) -> Callable:
  return compiled(_transpose_bytes, jax.ShapeDtypeStruct(shape, np.uint32))


def _transpose_bytes(words_rwc: jax.Array) -> jax.Array:
  """Squares of 4 x 4 bytes in registers, then their words in memory."""
  a, b, c, d = (words_rwc[:, row] for row in range(4))
  a, c = (a & _LOW) | (c << 16), (a >> 16) | (c & ~_LOW)
  b, d = (b & _LOW) | (d << 16), (b >> 16) | (d & ~_LOW)
  (a, b), (c, d) = (
    ((x & _EVEN) | ((y & _EVEN) << 8), ((x >> 8) & _EVEN) | (y & ~_EVEN))
    for x, y in ((a, b), (c, d))
  )
  # One pass each: together they would do the squares again for every byte.
  words_vrc = jax.lax.optimization_barrier(jnp.stack([a, b, c, d]))
  return words_vrc.transpose(2, 0, 1)


def _transpose_words(x_RC: np.ndarray) -> np.ndarray:
  """By NumPy: groups of columns are moved as 8-byte words first.

  That is three times as fast as NumPy's own copy, element by element.
  """
  rows, columns = x_RC.shape
  each = 8 // x_RC.itemsize
  if columns % each or x_RC.strides[1] != x_RC.itemsize:
    return np.ascontiguousarray(x_RC.T)
  words_cR = np.ascontiguousarray(x_RC.view(np.uint64).T)
  x_cRw = words_cR.view(x_RC.dtype).reshape(columns // each, rows, each)
  return np.ascontiguousarray(x_cRw.transpose(0, 2, 1)).reshape(columns, rows)
