"""Where the rows of a file's tensors go: the parts of leaves on devices.

Letters: R rows and C columns of the matrix in the file, A and B of the same as
it lies in the leaf.
"""

import dataclasses
import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from m2.checkpoint import fp8, hf_names, host, shards

# More threads than cores would push each other's rows out of the caches.
_CORES = threading.BoundedSemaphore(os.cpu_count() or 1)
_ALIGNED = 64  # bytes; then the CPU's runtime takes a NumPy array as it is


@dataclasses.dataclass(frozen=True)
class Need:
  """One tensor of a file and where it goes.

  Attributes:
    name: of the tensor.
    tensor: where it lies.
    slot: its place in the leaf.
    scale: of a block-FP8 tensor, else None.
  """

  name: str
  tensor: shards.Tensor
  slot: hf_names.Slot
  scale: np.ndarray | None = None


class Plane:
  """The part of a leaf that some devices hold, seen as a file's matrix.

  Behind the stacked axes a leaf's axes are the rows and columns of the file's
  matrix, in that order or the other.

  Attributes:
    rows: rows of the file's matrix that it holds.
    flipped: whether the leaf has the file's columns first.
    shape: of the part: stacked axes, then the matrix as it lies in the leaf.
  """

  def __init__(self, groups: Sequence[hf_names.Group], ranges: Sequence[range]):
    """Sees `ranges`, one an axis of the leaf, as part of the matrix."""
    behind = sum(group.where.ndim for group in groups)
    self._stacked = ranges[: len(ranges) - behind]
    at = len(self._stacked)
    picked: dict[int, np.ndarray] = {}
    for group in groups:
      cut = ranges[at : at + group.where.ndim]
      at += group.where.ndim
      picked[group.source] = group.where[
        tuple(slice(r.start, r.stop) for r in cut)
      ].reshape(-1)
    self.flipped = groups[0].source == 1
    self.rows = _stretch(picked[0])
    if self.rows is None:
      raise ValueError('rows of a tensor are not in order in its leaf')
    columns = picked.get(1, np.zeros(1, int))
    stretch = _stretch(columns)
    self._left = stretch.start if stretch else 0
    self._columns = slice(stretch.start, stretch.stop) if stretch else columns
    matrix = (len(self.rows), len(columns))
    self.shape = (
      *map(len, self._stacked),
      *(matrix[::-1] if self.flipped else matrix),
    )

  def holds(self, index: tuple[int, ...]) -> bool:
    """Whether the tensor at this place of the stacked axes is in the part."""
    return all(i in r for i, r in zip(index, self._stacked))

  def cut(self, need: Need, x_RC: np.ndarray, first: int):
    """What rows `first`... of a file's tensor are here.

    Returns:
      Where they start in an array of `shape`; their matrix, a view with the
      axes of the leaf; and the row and column of the leaf's full matrix where
      it starts.
    """
    top = max(first, self.rows.start)
    stop = min(first + len(x_RC), self.rows.stop)
    x_RC = x_RC[top - first : stop - first, self._columns]
    start, place = (top - self.rows.start, 0), (top, self._left)
    if self.flipped:
      x_RC, start, place = x_RC.T, start[::-1], place[::-1]
    stacked = (i - r.start for i, r in zip(need.slot.index, self._stacked))
    return (*stacked, *start), x_RC, place


def _stretch(index: np.ndarray) -> range | None:
  """The range that the indices are; None if they are not in order."""
  found = range(int(index[0]), int(index[-1]) + 1)
  return found if np.array_equal(index, found) else None


def part(
  plane: Plane, dtype: np.dtype, devices: Sequence[jax.Device | None]
) -> 'HostPart | DevicePart':
  """The buffer of a part of a leaf; a device of None is the default one."""
  platform = devices[0].platform if devices[0] else jax.default_backend()
  kind = HostPart if platform == 'cpu' else DevicePart
  return kind(plane, dtype, devices)


class HostPart:
  """A part of a leaf in host memory, which is a CPU device's own."""

  def __init__(self, plane: Plane, dtype: np.dtype, devices: Sequence[Any]):
    """Makes the buffer; its pages are taken as they are filled."""
    self.plane, self.devices = plane, devices
    size = math.prod(plane.shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    self._buffer = memory[start : start + size].view(dtype)
    self._buffer = self._buffer.reshape(plane.shape)

  def put(self, need: Need, x_RC: np.ndarray, first: int) -> None:
    """Takes rows `first`... of a tensor."""
    start, x, place = self.plane.cut(need, x_RC, first)
    *stacked, top, left = start
    down, across = slice(top, top + len(x)), slice(left, left + x.shape[1])
    out = self._buffer[*stacked, down, across]
    write(out, x, need.scale, place, self.plane.flipped)

  def arrays(self, shape: tuple[int, ...]) -> list[jax.Array]:
    """The part, in the leaf's own axes, on each device that holds it."""
    x = self._buffer.reshape(shape)
    return [jax.device_put(x, device) for device in self.devices]


class DevicePart:
  """A part of a leaf in an accelerator's memory, filled there in place."""

  def __init__(self, plane: Plane, dtype: np.dtype, devices: Sequence[Any]):
    """Makes the buffers, one a device."""
    self.plane, self.devices = plane, devices
    self._dtype = dtype
    self._lock = threading.Lock()
    self._buffers = [_zeros(plane.shape, dtype, device) for device in devices]

  def put(self, need: Need, x_RC: np.ndarray, first: int) -> None:
    """Takes rows `first`... of a tensor; they are on the device then."""
    start, x, place = self.plane.cut(need, x_RC, first)
    out = np.empty(x.shape, self._dtype)
    write(out, x, need.scale, place, self.plane.flipped)
    out = out.reshape((1,) * (len(start) - 2) + out.shape)
    pieces = [jax.device_put(out, device) for device in self.devices]
    with self._lock:
      self._buffers = [
        _update(buffer, piece, np.array(start, np.int32))
        for buffer, piece in zip(self._buffers, pieces)
      ]
    jax.block_until_ready(pieces)

  def arrays(self, shape: tuple[int, ...]) -> list[jax.Array]:
    """The part, in the leaf's own axes, on each device that holds it."""
    buffers, self._buffers = self._buffers, []
    made = []
    for buffer, device in zip(buffers, self.devices):
      with host.alone(device):
        made.append(_reshape(buffer, shape))
    return made


def _zeros(shape, dtype, device) -> jax.Array:
  with host.alone(device):
    return _fill(tuple(shape), dtype)


@jax.jit(static_argnums=(0, 1))
def _fill(shape, dtype):
  return jax.numpy.zeros(shape, dtype)


@jax.jit(donate_argnums=0)
def _update(buffer, piece, start):
  return jax.lax.dynamic_update_slice(buffer, piece, tuple(start))


@jax.jit(static_argnums=1, donate_argnums=0)
def _reshape(buffer, shape):
  return buffer.reshape(shape)


def write(out_AB, x_AB, scale, place, flipped: bool) -> None:
  """Puts a tensor's matrix into a leaf's, in the leaf's type.

  Codes are multiplied by their scales, unless the leaf holds codes too.
  """
  with _CORES:
    if scale is None or out_AB.dtype == fp8.DTYPE:
      out_AB[...] = host.transpose(x_AB.T) if flipped else x_AB
    else:
      fp8.dequantise(x_AB, scale.T if flipped else scale, out_AB, place)
