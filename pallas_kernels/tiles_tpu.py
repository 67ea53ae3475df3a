"""Tile sizes for TPUs: what a chip can hold, and how its kernels are cut.

A kernel keeps its group's whole matrices in vector memory, so that decides
what else fits. `CHIPS` says what each kind of device has; the sizes in it are
read off the compiler's schedules (`gmm/NOTES.md`), since no TPU has timed
them. Rows of a tile follow from the mean group and from the memory left.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

from pallas_kernels import dispatch

MIB = 2**20
MIN_ROWS = 16  # of a packed bfloat16 register
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How rows are cut up.

  Attributes:
    rows: most rows of one tile, the unit of copies; a power of two.
    chunk: rows multiplied at a time; enough to hide loading the matrices into
      the multiplying units.
    rest: rows multiplied at a time where no more are left.
    stages: tiles of operands in memory: one in use, the others arriving.
    columns: columns of the result whose matrices are resident; 0 is all.
  """

  rows: int = 256
  chunk: int = 128
  rest: int = 32
  stages: int = 2
  columns: int = 0

  def __post_init__(self):
    sizes = self.rows, self.chunk, self.rest
    if any(n & (n - 1) or n < MIN_ROWS for n in sizes):
      raise ValueError(f'{self}: rows are powers of two, {MIN_ROWS} at least')
    if not self.rest <= self.chunk <= self.rows:
      raise ValueError(f'{self}: needs rest <= chunk <= rows')
    if self.stages < 2 or self.columns % LANES:
      raise ValueError(f'{self}: needs 2 stages, columns in {LANES}s')

  def narrowed(self, columns: int) -> 'Tiles':
    """The same tiles for a part of the columns at a time."""
    return dataclasses.replace(self, columns=columns)


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, as its kernels see it.

  Attributes:
    cores: TensorCores that share the device's programs.
    vmem: bytes of vector memory of each core.
    chunk: rows at which loading matrices stops showing in the schedule.
    transposed_chunk: the same where matrices are transposed as they load.
    gradient_chunk: rows at which reading and writing sums stops showing.
    rest: rows below which a product costs no less.
    interpret: run in Pallas' interpreter: True, or its parameters.
  """

  cores: int
  vmem: int
  chunk: int
  transposed_chunk: int
  gradient_chunk: int
  rest: int
  interpret: Any = False

  @property
  def vmem_limit(self) -> int:
    """What a kernel may use; the rest is the compiler's."""
    return self.vmem - 4 * MIB


CHIPS = {
  # Of v5e no schedule was read: its chunks are those of v5p.
  'TPU v5 lite': Chip(
    cores=1,
    vmem=128 * MIB,
    chunk=128,
    transposed_chunk=128,
    gradient_chunk=128,
    rest=32,
  ),
  'TPU v5': Chip(
    cores=2,
    vmem=64 * MIB,
    chunk=128,
    transposed_chunk=128,
    gradient_chunk=128,
    rest=32,
  ),
  'TPU v6 lite': Chip(
    cores=1,
    vmem=128 * MIB,
    chunk=128,
    transposed_chunk=256,
    gradient_chunk=256,
    rest=64,
  ),
  'TPU7x': Chip(
    cores=1,
    vmem=64 * MIB,
    chunk=512,
    transposed_chunk=512,
    gradient_chunk=512,
    rest=64,
  ),
}
INTERPRETED = Chip(
  cores=1,
  vmem=64 * MIB,
  chunk=32,
  transposed_chunk=32,
  gradient_chunk=32,
  rest=16,
  interpret=True,
)
MAX_ROWS = 512


_compiling_for: contextvars.ContextVar[Chip | None] = contextvars.ContextVar(
  'compiling_for', default=None
)


@contextlib.contextmanager
def compiling_for(device_kind: str) -> Iterator[Chip]:
  """Makes `here` a device that is not, to compile ahead of time for it.

  Args:
    device_kind: as `jax.Device.device_kind` has it; a key of `CHIPS`.
  """
  token = _compiling_for.set(CHIPS[device_kind])
  try:
    yield CHIPS[device_kind]
  finally:
    _compiling_for.reset(token)


def here() -> Chip | None:
  """The device at hand; an interpreted one on a CPU; None if unknown."""
  if chip := _compiling_for.get():
    return chip
  device = dispatch.device()
  if device.platform == 'cpu':
    return INTERPRETED
  return CHIPS.get(device.device_kind)


def choose(
  chip: Chip,
  mean_rows: int,
  chunk: int,
  *,
  resident: int,
  row_in: int,
  row_out: int,
  row_scratch: int,
) -> Tiles | None:
  """The largest tiles that suit the groups and fit, or None if none fit.

  Args:
    chip: the device.
    mean_rows: rows of a group on average.
    chunk: most rows to multiply at a time.
    resident: bytes that stay in vector memory, all copies counted.
    row_in: bytes of a row of all operands.
    row_out: bytes of a row of all results.
    row_scratch: bytes of a row of a chunk, of everything between.
  """
  rows = _clip(1 << max(mean_rows - 1, 0).bit_length())
  # A chunk of the mean size, rounded down below its middle: a group a little
  # larger takes a rest more, not a chunk of twice its rows.
  chunk = min(chunk, _clip(1 << max(4 * mean_rows // 3, 1).bit_length() - 1))
  while rows >= MIN_ROWS:
    most = min(rows, chunk)
    tiles = Tiles(rows=rows, chunk=most, rest=min(most, chip.rest))
    need = resident + rows * (tiles.stages * row_in + 2 * row_out)
    if need + tiles.chunk * row_scratch <= chip.vmem_limit:
      return tiles
    rows //= 2
  return None


def _clip(rows: int) -> int:
  return min(MAX_ROWS, max(MIN_ROWS, rows))
