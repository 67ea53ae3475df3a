"""Tile sizes are data: one frozen record an operation, a table a device kind.

`tiles.json` holds what `autotune` measured: device kind -> operation ->
contraction and output widths -> tiles; under 'rows' it may hold row tiles, by
size of the groups, and holds none now. What is not in the table takes the
default, which is sound on every Hopper GPU.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import jax

TABLE = pathlib.Path(__file__).with_name('tiles.json')

DEPTHS = 64, 128  # that `Tiles` may have


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How a grouped product is cut up.

  Attributes:
    columns: columns of an output tile of 128 rows.
    depth: contraction length of one pipeline stage.
    stages: how many stages are in flight.
    band: tiles along the rows that are visited together before the next
      columns, so that both operands stay in the L2 cache.
    cluster: neighbouring row tiles whose blocks share the copies of their
      common columns.
    staging: pieces of an output tile that may be on their way to memory.
  """

  columns: int = 256
  depth: int = 64
  stages: int = 4
  band: int = 16
  cluster: int = 1
  staging: int = 2

  def __post_init__(self):
    if self.columns not in (128, 256) or self.depth not in DEPTHS:
      raise ValueError(f'{self}: columns must be 128 or 256, depth 64 or 128')
    if self.stages < 2 or min(self.band, self.cluster, self.staging) < 1:
      raise ValueError(f'{self}: needs 2 stages and 1 of the rest at least')


@dataclasses.dataclass(frozen=True)
class RowTiles:
  """How the rows of a product are cut; see `gmm/panels.py`.

  Attributes:
    rows: row counts of a tile for which there is code, rising multiples of 8.
    stages: stages of 64 of the contraction that are in flight.
    cluster: blocks that share the copies of a panel of the matrix.
    staging: pieces of a tile that may be on their way to memory.
  """

  rows: tuple[int, ...] = (64, 128, 136, 144)
  stages: int = 4
  cluster: int = 2
  staging: int = 3

  def __post_init__(self):
    rising = all(a < b for a, b in zip(self.rows, self.rows[1:]))
    if not (rising and self.rows and all(8 <= r <= 256 for r in self.rows)):
      raise ValueError(f'{self}: rows must rise, between 8 and 256')
    if any(r % 8 for r in self.rows):
      raise ValueError(f'{self}: rows must be multiples of 8')
    if self.stages < 2 or min(self.cluster, self.staging) < 1:
      raise ValueError(f'{self}: needs 2 stages and 1 of the rest at least')


# Up to so many rows a group, in the mean, one block holds those of most groups.
FEW = 136
ROW_TILES = {
  'few': RowTiles(rows=(8, 32, 64, 144), cluster=1),
  'many': RowTiles(),
}


def row_tiles(device_kind: str, mean: int) -> RowTiles:
  """The table's row tiles for this device, or the default, as for all now.

  Args:
    device_kind: as `jax.Device.device_kind` has it, such as 'NVIDIA H200'.
    mean: rows a group, in the mean.
  """
  size = size_of(mean)
  return _measured(RowTiles, device_kind, 'rows', size) or ROW_TILES[size]


def size_of(mean: int) -> str:
  """Which entry of the table serves groups of `mean` rows."""
  return 'few' if mean <= FEW else 'many'


def lookup(device_kind: str, operation: str, shape: tuple[int, int]) -> Tiles:
  """The tiles measured best for this device and shape, or the default.

  Args:
    device_kind: as `jax.Device.device_kind` has it, such as 'NVIDIA H200'.
    operation: 'weight_gradient'.
    shape: widths of the output's two sides.
  """
  name = 'x'.join(map(str, shape))
  found = _measured(Tiles, device_kind, operation, name)
  return found or fitted(Tiles(), shape[1])


def _measured[T](kind: type[T], *place: str) -> T | None:
  """The tiles at a device's, operation's and shape's place, if it has any.

  Raises:
    ValueError: the entry there makes none; says where it is.
  """
  device_kind, operation, name = place
  entry = _table().get(device_kind, {}).get(operation, {}).get(name)
  if entry is None:
    return None
  lists = {k: tuple(v) for k, v in entry.items() if isinstance(v, list)}
  try:
    return kind(**entry | lists)
  except (TypeError, ValueError) as error:
    raise ValueError(f'{TABLE.name}: {", ".join(place)}: {error}') from None


def fitted(tiles: Tiles, columns: int) -> Tiles:
  """`tiles`, narrower where its columns do not divide the output's."""
  if columns % tiles.columns == 0:
    return tiles
  return dataclasses.replace(tiles, columns=128)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
  return json.loads(TABLE.read_text())


def autotune(
  call: Callable[..., jax.Array],
  operands: Sequence[jax.Array],
  candidates: Iterable[Tiles],
  *,
  repeats: int = 10,
) -> tuple[Tiles, dict[Tiles, float]]:
  """Times `call` with each candidate on the device at hand.

  Args:
    call: (tiles, *operands) -> result of the operation cut up like that.
    operands: what it computes with.
    candidates: what to try.
    repeats: timed calls a candidate, after two that compile and warm up.

  Returns:
    The candidate of the lowest median, and every median in seconds.

  Raises:
    ValueError: there are no candidates.
  """
  seconds = {}
  for tiles in candidates:
    run = jax.jit(functools.partial(call, tiles))
    for _ in range(2):
      jax.block_until_ready(run(*operands))
    samples = []
    for _ in range(repeats):
      start = time.perf_counter()
      jax.block_until_ready(run(*operands))
      samples.append(time.perf_counter() - start)
    seconds[tiles] = statistics.median(samples)
  if not seconds:
    raise ValueError('autotune needs at least one candidate')
  return min(seconds, key=seconds.get), seconds


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
  """How a product of a few tokens with their experts is cut up.

  Attributes:
    columns: output features of a block.
    depth: contraction length of one pipeline stage.
    stages: most stages in flight; fewer if shared memory does not hold them.
    tokens: most tokens that are multiplied together.
  """

  columns: int = 128
  depth: int = 128
  stages: int = 8
  tokens: int = 64

  def __post_init__(self):
    if self.columns not in (128, 256) or self.depth not in (64, 128, 256):
      raise ValueError(
        f'{self}: columns must be 128 or 256, depth 64, 128 or 256'
      )
    if self.stages < 2 or self.tokens not in (8, 16, 32, 64, 128):
      raise ValueError(f'{self}: needs 2 stages, and 8 to 128 tokens')


def lookup_decode(
  device_kind: str, operation: str, shape: tuple[int, int]
) -> DecodeTiles:
  """The tiles measured best for this device and shape, or the default.

  Args:
    device_kind: as `jax.Device.device_kind` has it.
    operation: 'decode_up' or 'decode_down', with '_fp8' for such weights.
    shape: widths of the contraction and of the output.
  """
  name = 'x'.join(map(str, shape))
  return _measured(DecodeTiles, device_kind, operation, name) or DecodeTiles()
