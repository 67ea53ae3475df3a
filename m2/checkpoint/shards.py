"""A directory of safetensors files: one file, or shards with an index.

Reading is lazy: `read` returns where each tensor lies. Writing plans every
shard first and then fills it piece by piece, never holding a whole one.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from m2.checkpoint import storage

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
WORKERS = 16  # threads that read or write; a disk or store serves them at once

# Names of the format for the types that a weight may have.
DTYPES: dict[str, np.dtype] = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
}
_BATCH = 2**20  # bytes
# What JSON of another form than expected raises.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    folder: the directory.
    file: the safetensors file in it.
    dtype: its type in the format's own words, such as 'BF16'.
    shape: its shape.
    offset: byte in the file at which it starts.
    nbytes: how many bytes it has.
  """

  folder: storage.Folder
  file: str
  dtype: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int

  def array(self) -> np.ndarray:
    """Reads the tensor."""
    stop = self.offset + self.nbytes
    data = self.folder.read(self.file, self.offset, stop)
    return data.view(DTYPES[self.dtype]).reshape(self.shape)


def names(path: str | os.PathLike) -> set[str]:
  """Names of all tensors, by the index if there is one; empty without files."""
  folder = storage.folder(path)
  if folder.has(INDEX):
    return set(_weight_map(folder))
  return set(_header(folder, SINGLE)) if folder.has(SINGLE) else set()


def read(path: str | os.PathLike) -> dict[str, Tensor]:
  """Finds every tensor of a checkpoint directory.

  Args:
    path: directory or URL with `model.safetensors`, or with shards and
      `model.safetensors.index.json` (which wins if both exist).

  Returns:
    Tensors by name, in the order in which they lie in the files.

  Raises:
    FileNotFoundError: no such files, or a shard of the index is not there.
    ValueError: a file is truncated or corrupt, or index and shards disagree.
    OSError: they cannot be read.
  """
  folder = storage.folder(path)
  if not folder.has(INDEX):
    if not folder.has(SINGLE):
      raise FileNotFoundError(f'{path}: neither {INDEX} nor {SINGLE} is there')
    return _header(folder, SINGLE)
  weight_map = _weight_map(folder)
  files = sorted(set(weight_map.values()))
  there = dict(each(lambda file: (file, folder.has(file)), files, WORKERS))
  if absent := [file for file in files if not there[file]]:
    raise FileNotFoundError(
      f'{folder.file(INDEX)} names {len(absent)} of {len(files)} files that '
      f'are not there: {listing(absent)}'
    )
  headers = dict(
    each(lambda file: (file, _header(folder, file)), files, WORKERS)
  )
  tensors: dict[str, Tensor] = {}
  errors = []
  for file in files:
    for name, tensor in headers[file].items():
      if weight_map.get(name) != file:
        errors.append(f'{name}: in {file}, index says {weight_map.get(name)}')
      tensors[name] = tensor
  for name in sorted(set(weight_map) - set(tensors)):
    errors.append(f'{name}: not in {weight_map[name]}, as the index says')
  if errors:
    raise ValueError(f'{path}: index and files disagree: {listing(errors)}')
  return tensors


def listing(items: Sequence[str], limit: int = 40) -> str:
  """Joins lines for an error message, the first `limit` of them."""
  more = [f'... and {len(items) - limit} more'] if len(items) > limit else []
  return '; '.join([*items[:limit], *more])


def _weight_map(folder: storage.Folder) -> dict[str, str]:
  file = folder.file(INDEX)
  try:
    weight_map = json.loads(folder.read(INDEX).tobytes())['weight_map']
    files = set(weight_map.values())
    # A name with a directory part could reach outside the checkpoint.
    good = all(
      isinstance(file, str) and pathlib.PurePath(file).parts == (file,)
      for file in files
    )
  except _MALFORMED as error:
    raise ValueError(
      f'{file}: not a safetensors index with a weight_map: {error!r}'
    ) from error
  if not good or '..' in files:
    raise ValueError(f'{file}: weight_map must name files beside it')
  return weight_map


def _header(folder: storage.Folder, file: str) -> dict[str, Tensor]:
  try:
    size = int.from_bytes(folder.read(file, 0, 8).tobytes(), 'little')
    if size > _MAX_HEADER:
      raise ValueError(f'a header of {size} bytes')
    header = json.loads(folder.read(file, 8, 8 + size).tobytes())
    header.pop('__metadata__', None)
    tensors = _tensors(folder, file, header, 8 + size)
  except _MALFORMED as error:
    raise ValueError(
      f'{folder.file(file)}: truncated or not a safetensors file ({error}); '
      'fetch it again'
    ) from error
  return tensors


def _tensors(folder, file, header, start: int) -> dict[str, Tensor]:
  """Checks that the tensors cover the file exactly, as the format demands."""
  tensors = {}
  end = start
  for name, item in sorted(
    header.items(), key=lambda pair: pair[1]['data_offsets']
  ):
    first, stop = item['data_offsets']
    dtype, shape = item['dtype'], tuple(item['shape'])
    if not all(type(n) is int and n >= 0 for n in (first, stop, *shape)):
      raise ValueError(f'{name} has shape {item["shape"]} at {first}:{stop}')
    tensor = Tensor(folder, file, dtype, shape, start + first, stop - first)
    if tensor.offset != end or stop < first:
      raise ValueError(f'{name} begins at byte {tensor.offset}, not {end}')
    if dtype in DTYPES:
      nbytes = math.prod(shape) * DTYPES[dtype].itemsize
      if tensor.nbytes != nbytes:
        raise ValueError(f'{name} has {tensor.nbytes} bytes, not {nbytes}')
    tensors[name] = tensor
    end += tensor.nbytes
  if not folder.size_is(file, end):
    raise ValueError(f'its size is not the {end} bytes that its header says')
  return tensors


@dataclasses.dataclass(frozen=True)
class Item:
  """Tensors made together and kept in one shard.

  Attributes:
    specs: type in the format's words and shape of each, by name.
    make: yields (name, row at which it starts, array) of their parts.
  """

  specs: Mapping[str, tuple[str, tuple[int, ...]]]
  make: Callable[[], Iterable[tuple[str, int, np.ndarray]]]

  @property
  def nbytes(self) -> int:
    """Bytes of its tensors in a file."""
    return sum(_nbytes(*spec) for spec in self.specs.values())


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
  return math.prod(shape) * DTYPES[dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file to write: its items, and where in it each tensor goes.

  Attributes:
    file: its name.
    items: what it holds.
    header: the bytes before the tensors.
    offsets: byte at which each tensor starts.
    size: bytes in all.
  """

  file: str
  items: tuple[Item, ...]
  header: bytes
  offsets: Mapping[str, int]
  size: int

  @property
  def nbytes(self) -> int:
    """Bytes of its tensors."""
    return self.size - len(self.header)


def plan(items: Sequence[Item], shard_bytes: int) -> list[Shard]:
  """Divides items into files, in order.

  Args:
    items: what to write.
    shard_bytes: largest size of a shard's tensors; an item beyond it gets its
      own.
  """
  groups: list[list[Item]] = [[]]
  room = shard_bytes
  for item in items:
    if groups[-1] and item.nbytes > room:
      groups.append([])
      room = shard_bytes
    groups[-1].append(item)
    room -= item.nbytes
  many = f'-of-{len(groups):05}.safetensors'
  return [
    _lay_out(f'model-{number:05}{many}' if len(groups) > 1 else SINGLE, group)
    for number, group in enumerate(groups, 1)
  ]


def _lay_out(file: str, items: Sequence[Item]) -> Shard:
  specs = {name: spec for item in items for name, spec in item.specs.items()}
  # The widest types first, so that every tensor is aligned to its own.
  order = sorted(specs, key=lambda name: -DTYPES[specs[name][0]].itemsize)
  # Readers of the public format refuse files without this entry.
  tree: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end, starts = 0, {}
  for name in order:
    dtype, shape = specs[name]
    starts[name] = end
    end += _nbytes(dtype, shape)
    tree[name] = {
      'dtype': dtype,
      'shape': shape,
      'data_offsets': (starts[name], end),
    }
  text = json.dumps(tree, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  header = len(text).to_bytes(8, 'little') + text
  offsets = {name: len(header) + start for name, start in starts.items()}
  return Shard(file, tuple(items), header, offsets, len(header) + end)


def is_written(folder: storage.Folder, shard: Shard) -> bool:
  """Whether the whole shard is there already."""
  return (
    folder.has(shard.file)
    and folder.size_is(shard.file, shard.size)
    and folder.read(shard.file, 0, len(shard.header)).tobytes() == shard.header
  )


def write(folder: storage.Folder, shard: Shard, workers: int) -> Iterator[int]:
  """Writes one shard; it appears when all of it is there.

  Args:
    folder: where to.
    shard: what to write.
    workers: threads; each makes one part of an item at a time.

  Yields:
    How many bytes are written, as they are.

  Raises:
    OSError: it could not be written whole.
    Exception: what an item's `make` raised.
  """
  writer = folder.create(shard.file, shard.size)
  try:
    writer.put(0, np.frombuffer(shard.header, np.uint8))
    fill = functools.partial(_fill, writer, shard)
    yield from each(fill, _batches(shard.items), workers)
  except BaseException:
    writer.abandon()
    raise
  writer.close()


def _batches(items: Sequence[Item]) -> list[list[Item]]:
  """Neighbours that one thread makes in turn, so that small ones cost less."""
  batches: list[list[Item]] = []
  room = 0
  for item in items:
    room -= item.nbytes
    if room < 0:
      batches.append([])
      room = _BATCH - item.nbytes
    batches[-1].append(item)
  return batches


def _fill(writer: storage.Writer, shard: Shard, items: Sequence[Item]) -> int:
  for item in items:
    for name, row, array in item.make():
      dtype, shape = item.specs[name]
      line = _nbytes(dtype, shape[1:])
      data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
      writer.put(shard.offsets[name] + row * line, data)
  return sum(item.nbytes for item in items)


def each(
  function: Callable[[Any], Any], items: Iterable[Any], workers: int
) -> Iterator[Any]:
  """Calls `function` on every item in threads; yields results as they come.

  After an error no further call is begun, and those that run are waited for.
  """
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = [pool.submit(function, item) for item in items]
    try:
      for future in concurrent.futures.as_completed(futures):
        yield future.result()
    finally:
      for future in futures:
        future.cancel()


def index(shards: Sequence[Shard]) -> bytes:
  """The text of the index file."""
  items = [item for shard in shards for item in shard.items]
  weight_map = {
    name: shard.file for shard in shards for name in sorted(shard.offsets)
  }
  return to_json(
    {
      'metadata': {'total_size': sum(item.nbytes for item in items)},
      'weight_map': dict(sorted(weight_map.items())),
    }
  )


def to_json(value: Any) -> bytes:
  """A JSON file's bytes."""
  return (json.dumps(value, indent=2) + '\n').encode()
