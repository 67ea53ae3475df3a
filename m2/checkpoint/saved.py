"""Parameters of a step directory, read from the disk a matrix at a time.

`store.load_params` puts a model on devices; these stay where they are, so that
one host converts a model of any size. A chunk on the disk is what one device
held of one layer's, or one expert's, tensor (`directory.options`).
"""

import functools
import itertools
import math
import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from m2 import config
from m2.checkpoint import directory, fingerprint, hf_tree, shards, stream
from m2.parallel import sharding

# Decoded chunks that are kept: several reads may want parts of the same.
_CACHE = 2**28  # bytes
_SMALL = 2**20  # bytes; a leaf that is no larger is read whole
_THREADS = 8  # each holds one matrix


class Leaf:
  """A leaf on the disk; indexing reads, as of a NumPy array.

  Attributes:
    shape: of the whole leaf.
    dtype: stored type.
  """

  def __init__(self, name: str, array: ts.TensorStore, stacked: int):
    """Knows the array; `stacked` axes lead to matrices of their own."""
    self.shape: tuple[int, ...] = tuple(array.shape)
    self.dtype = np.dtype(array.dtype.numpy_dtype)
    self._name, self._array, self._stacked = name, array, stacked

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of all of it."""
    return math.prod(self.shape) * self.dtype.itemsize

  def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
    """Reads a part; of a leaf that is small or one matrix, all of it, once.

    Raises:
      directory.CheckpointError: it cannot be read.
    """
    if self.nbytes <= _SMALL:
      return self._kept[index]
    if self._stacked:
      return _read(self._name, self._array[index])
    return _newest(self)[index]

  @functools.cached_property
  def _kept(self) -> np.ndarray:
    return _whole(self)

  def parts(self) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The matrices: place of the first value in the leaf, and index."""
    sizes = self.shape[: self._stacked if self.nbytes > _SMALL else 0]
    step = math.prod(self.shape[len(sizes) :])
    for number, index in enumerate(itertools.product(*map(range, sizes))):
      yield number * step, index


def _whole(leaf: Leaf) -> np.ndarray:
  """All of a leaf, chunk by chunk: nothing else is held meanwhile."""
  out = np.empty(leaf.shape, leaf.dtype)
  sizes = leaf._array.chunk_layout.read_chunk.shape
  starts = (range(0, n, size) for n, size in zip(leaf.shape, sizes))
  for at in itertools.product(*starts):
    box = tuple(
      slice(i, min(i + size, n)) for i, size, n in zip(at, sizes, leaf.shape)
    )
    out[box] = _read(leaf._name, leaf._array[box])
  return out


# Of large leaves that are one matrix; small ones, read in between, keep theirs.
_newest = functools.lru_cache(maxsize=1)(_whole)


def _read(name: str, array: ts.TensorStore) -> np.ndarray:
  return _result(name, array.read())


def _result(name: str, future: ts.Future) -> Any:
  try:
    return future.result()
  except Exception as error:  # TensorStore raises many kinds
    raise directory.CheckpointError(
      f'{name} cannot be read: {directory.summary(error)}'
    ) from error


def params(
  step: pathlib.Path, meta: dict[str, Any], cfg: config.ModelConfig
) -> dict[str, Any]:
  """The parameters, as `m2.model.params.abstract(cfg)` has them.

  Args:
    step: a step directory (`directory.newest`).
    meta: what `directory.read_meta` says of it.
    cfg: the model that was saved.

  Returns:
    A tree of `Leaf`.

  Raises:
    directory.CheckpointError: it is of another model, or cannot be opened.
  """
  wanted = hf_tree.abstract(cfg, cfg.param_dtype)
  described = directory.describe({'params': wanted})
  directory.check_leaves(step, directory.of_params(meta), described)
  context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE}})
  return hf_tree.nested(
    cfg, {name: _open(step / 'params', name, context) for name in wanted}
  )


def _open(folder: pathlib.Path, name: str, context: ts.Context) -> Leaf:
  """Finds a leaf where Orbax keeps it."""
  base = f'file://{urllib.parse.quote(str(folder))}/'
  path = name.replace('/', '.') + '/'
  store = {'driver': 'ocdbt', 'base': base, 'path': path}
  spec = {'driver': 'zarr3', 'kvstore': store}
  title = f'{folder}: {name}'
  opened = ts.open(spec, open=True, read=True, context=context)
  return Leaf(title, _result(title, opened), sharding.stacked(name))


def check_sums(
  step: pathlib.Path, meta: dict[str, Any], tree: dict[str, Any]
) -> None:
  """Reads all of `params(step, meta, ...)` and compares its checksums.

  Raises:
    directory.CheckpointError: a value is not the one that was written.
  """
  leaves = hf_tree.flat({'params': tree})
  sums = dict.fromkeys(leaves, 0)
  work = [
    (name, first, index)
    for name, leaf in leaves.items()
    for first, index in leaf.parts()
  ]

  def one(item: tuple[str, int, tuple[int, ...]]) -> tuple[str, int, int]:
    name, first, index = item
    x = leaves[name][index]
    return name, fingerprint.partial(x, first), x.nbytes

  total = sum(leaf.nbytes for leaf in leaves.values())
  with stream.progress(f'checking {step}', total) as bar:
    for name, part, nbytes in shards.each(one, work, _THREADS):
      sums[name] += part
      bar.update(nbytes)
  found = {name: total % 2**32 for name, total in sums.items()}
  directory.check_sums(step, directory.of_params(meta), found)
