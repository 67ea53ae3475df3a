"""A directory of safetensors files: one file, or shards with an index.

Reading is lazy: `read` returns where each tensor lies, `Tensor.array` maps it.
Writing plans the shards first and then holds one of them at a time.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

# Names of the format for the types that a weight may have.
DTYPES: dict[str, np.dtype] = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies.

  Attributes:
    file: the safetensors file.
    dtype: its type in the format's own words, such as 'BF16'.
    shape: its shape.
    offset: byte in the file at which it starts.
  """

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def array(self) -> np.ndarray:
    """Maps the tensor; only what is used of it is read from disk."""
    return np.memmap(
      self.file, DTYPES[self.dtype], 'r', self.offset, self.shape
    )


def names(path: pathlib.Path) -> set[str]:
  """Names of all tensors, by the index if there is one; empty without files."""
  if (path / INDEX).exists():
    return set(_weight_map(path / INDEX))
  return set(_header(path / SINGLE)) if (path / SINGLE).exists() else set()


def read(path: pathlib.Path) -> dict[str, Tensor]:
  """Finds every tensor of a checkpoint directory.

  Args:
    path: directory with `model.safetensors`, or with shards and
      `model.safetensors.index.json` (which wins if both exist).

  Returns:
    Tensors by name.

  Raises:
    FileNotFoundError: no such files, or a shard of the index is not there.
    ValueError: a file is truncated or corrupt, or index and shards disagree.
  """
  if not (path / INDEX).exists():
    if not (path / SINGLE).exists():
      raise FileNotFoundError(f'{path}: neither {INDEX} nor {SINGLE} is there')
    return _header(path / SINGLE)
  weight_map = _weight_map(path / INDEX)
  files = sorted(set(weight_map.values()))
  absent = [name for name in files if not (path / name).is_file()]
  if absent:
    raise FileNotFoundError(
      f'{path / INDEX} names {len(absent)} of {len(files)} files that are not '
      f'there: {listing(absent)}'
    )
  tensors: dict[str, Tensor] = {}
  errors = []
  for file in files:
    for name, tensor in _header(path / file).items():
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


def _weight_map(file: pathlib.Path) -> dict[str, str]:
  try:
    weight_map = json.loads(file.read_text())['weight_map']
    # A name with a directory part could reach outside the checkpoint.
    good = all(
      isinstance(name, str) and pathlib.PurePath(name).parts == (name,)
      for name in weight_map.values()
    )
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{file}: not a safetensors index with a weight_map: {error!r}'
    ) from error
  if not good or '..' in weight_map.values():
    raise ValueError(f'{file}: weight_map must name files beside it')
  return weight_map


def _header(file: pathlib.Path) -> dict[str, Tensor]:
  try:
    # Opening checks that offsets are in order and cover the file exactly. Its
    # own reader is not used: it has no NumPy type for FP8.
    with safetensors.safe_open(file, 'numpy'):
      pass
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f'{file}: truncated or not a safetensors file ({error}); fetch it again'
    ) from error
  with open(file, 'rb') as stream:
    start = 8 + int.from_bytes(stream.read(8), 'little')
    header = json.loads(stream.read(start - 8))
  header.pop('__metadata__', None)
  return {
    name: Tensor(
      file, item['dtype'], tuple(item['shape']), start + item['data_offsets'][0]
    )
    for name, item in header.items()
  }


@dataclasses.dataclass(frozen=True)
class Item:
  """Tensors made together and kept in one shard.

  Attributes:
    specs: type in the format's words and shape of each, by name.
    make: returns the arrays by name.
  """

  specs: Mapping[str, tuple[str, tuple[int, ...]]]
  make: Callable[[], Mapping[str, np.ndarray]]

  @property
  def nbytes(self) -> int:
    """Bytes of its tensors in a file."""
    return sum(
      math.prod(shape) * DTYPES[dtype].itemsize
      for dtype, shape in self.specs.values()
    )


def write(path: pathlib.Path, items: Sequence[Item], shard_bytes: int) -> None:
  """Writes items into an existing directory, in order.

  Args:
    path: the directory; files in it are overwritten.
    items: what to write; each is made when its shard is.
    shard_bytes: largest size of a shard; an item beyond it gets its own.

  Raises:
    OSError: a file could not be written whole.
  """
  plan: list[list[Item]] = [[]]
  room = shard_bytes
  for item in items:
    if plan[-1] and item.nbytes > room:
      plan.append([])
      room = shard_bytes
    plan[-1].append(item)
    room -= item.nbytes
  weight_map: dict[str, str] = {}
  for number, shard in enumerate(plan, 1):
    one = len(plan) == 1
    file = SINGLE if one else f'model-{number:05}-of-{len(plan):05}.safetensors'
    arrays: dict[str, np.ndarray] = {}
    for item in shard:
      arrays.update(item.make())
    _write_file(path / file, arrays)
    weight_map |= dict.fromkeys(arrays, file)
  if len(plan) > 1:
    total = sum(item.nbytes for item in items)
    write_json(
      path / INDEX,
      {
        'metadata': {'total_size': total},
        'weight_map': dict(sorted(weight_map.items())),
      },
    )


def _write_file(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  try:
    # Readers of the public format refuse files without this entry.
    safetensors.numpy.save_file(dict(arrays), file, {'format': 'pt'})
  except safetensors.SafetensorError as error:
    raise OSError(f'{file}: not written: {error}') from error
  file.chmod(0o644)  # the library makes files private
  _sync(file)


def write_json(file: pathlib.Path, value: Any) -> None:
  """Writes a JSON file and waits until it is on disk."""
  file.write_text(json.dumps(value, indent=2) + '\n')
  _sync(file)


def _sync(file: pathlib.Path) -> None:
  with open(file, 'rb') as stream:
    os.fsync(stream.fileno())
