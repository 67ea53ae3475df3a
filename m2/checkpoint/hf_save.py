"""Writes parameters in the public format, a few megabytes at a time.

Every file's plan is known before the first is begun, so that tensors are
fetched from the devices, converted and written by many threads, each at its
place, and a shard that is there already need not be made again.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from m2 import config as settings
from m2.checkpoint import (
  fp8,
  hf_config,
  hf_names,
  hf_tree,
  host,
  shards,
  storage,
  stream,
)

_STORED = {'float32': 'F32', 'bfloat16': 'BF16', 'fp8': 'BF16'}
_PIECE = 16 * 2**20  # bytes of a tensor's rows made at a time, more or less
_MARK = 'unfinished.json'  # says what an interrupted `save` was writing
# An object store gets a shard in one request, from memory.
SHARD_BYTES = {False: 5 * 10**9, True: 5 * 10**8}


def save(
  params: Mapping[str, Any],
  path: str | os.PathLike,
  cfg: settings.ModelConfig,
  dtype: Any = None,
  *,
  shard_bytes: int | None = None,
  beside: Mapping[str, bytes] = types.MappingProxyType({}),
  resume: str = '',
  in_flight: int = stream.IN_FLIGHT,
) -> None:
  """Writes a checkpoint that transformers and its kin read.

  On a disk the files appear at `path` all at once, when all of them are there.
  In an object store they appear one by one, the index last: without it there is
  no checkpoint yet.

  Args:
    params: parameters; every part of them on this host's devices.
    path: a directory that does not exist yet or is empty, or such a prefix of
      an object store by its URL.
    cfg: shape of the model, and whether experts are held in FP8.
    dtype: float32, bfloat16, or fp8 (see `fp8.quantise`: what was FP8 and was
      loaded as float32 gets its bytes back, and so do experts that were kept
      in FP8); None = what holds `params` as they are. The router is float32 in
      any case.
    shard_bytes: largest file; None = 5 GB, and 500 MB in an object store, where
      a file is held in host memory until it is sent.
    beside: files to write next to the weights, such as a tokenizer's.
    resume: names the values written: where it is given, what an interrupted
      save leaves behind stays (on a disk in `<path>.unfinished`), and a save
      with the same name and plan keeps the shards that are whole there.
    in_flight: bytes of tensors in host memory at a time, besides at most six
      times as many of what they are made from.

  Raises:
    ValueError: `dtype` is unknown, leaves are missing, unexpected or of another
      shape, or the format cannot express the model.
    FileExistsError: something is at `path`, be it a mounted disk, or at
      `<path>.unfinished` what no save left there.
    OSError: a file could not be written; nothing is left at `path`.
  """
  dtype = _own_dtype(params) if dtype is None else _name(dtype)
  remote = storage.is_url(path)
  path = os.fspath(path) if remote else pathlib.Path(path).resolve()
  _check_free(path, resume)
  small = {'config.json': shards.to_json(hf_config.to_json(cfg, dtype))}
  small |= beside
  leaves = _checked(cfg, params, dtype)
  if shard_bytes is None:
    shard_bytes = SHARD_BYTES[remote]
  plan = shards.plan(items(cfg, leaves, dtype), shard_bytes)
  mark = _mark(plan, resume) if resume else b''
  with _place(path, mark) as folder:
    finished = _prepare(folder, plan, small, mark)
    total = sum(shard.nbytes for shard in plan)
    threads = in_flight // (2 * _PIECE) or 1
    with stream.progress(f'to {path}', total) as bar:
      for shard in plan:
        if shard.file in finished:
          bar.update(shard.nbytes)
          continue
        for count in shards.write(folder, shard, threads):
          bar.update(count)
    if len(plan) > 1:
      storage.put(folder, shards.INDEX, shards.index(plan))
    if mark:
      folder.remove(_MARK)


def _name(dtype: Any) -> str:
  """`fp8`, or a type by its name or as JAX and NumPy have it."""
  if dtype not in _STORED:
    with contextlib.suppress(TypeError):
      dtype = np.dtype(dtype).name
  if dtype not in _STORED:
    raise ValueError(f'hf.save: dtype={dtype!r}: choose {", ".join(_STORED)}')
  return dtype


def _own_dtype(params: Mapping[str, Any]) -> str:
  """What loses nothing of the weights that may be in either type."""
  held = {
    leaf.dtype.name
    for path, leaf in hf_tree.flat(params).items()
    if path.rpartition('/')[2] not in (*hf_tree.FLOAT32, 'scale_inv')
  }
  if fp8.DTYPE.name in held:
    return 'fp8'
  return 'bfloat16' if held == {'bfloat16'} else 'float32'


def _check_free(path: str | pathlib.Path, resume: str) -> None:
  if isinstance(path, pathlib.Path):
    if path.is_mount():
      raise FileExistsError(
        f'{path} is a mount point, where no folder can be moved once it is '
        'whole: give a folder inside it'
      )
    full = path.exists() and not (path.is_dir() and not any(path.iterdir()))
  else:
    folder = storage.folder(path)
    names = (shards.INDEX, shards.SINGLE)
    full = any(map(folder.has, names)) and not (resume and folder.has(_MARK))
  if full:
    raise FileExistsError(f'{path} is there already: give an empty directory')


def _mark(plan: Sequence[shards.Shard], resume: str) -> bytes:
  """What an unfinished save says it is writing."""
  digest = hashlib.sha256(resume.encode())
  for shard in plan:
    digest.update(shard.header)
  return shards.to_json({'writing': digest.hexdigest()})


def _marked(folder: storage.Folder, mark: bytes) -> bool:
  return folder.has(_MARK) and folder.read(_MARK).tobytes() == mark


@contextlib.contextmanager
def _place(path: str | pathlib.Path, mark: bytes) -> Iterator[storage.Folder]:
  """Where to write; on a disk, what becomes `path` when all is written."""
  if isinstance(path, str):
    yield storage.folder(path)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  if mark:
    partial = path.with_name(f'{path.name}.unfinished')
    if partial.exists() and not _marked(storage.folder(partial), mark):
      if any(partial.iterdir()) and not (partial / _MARK).exists():
        raise FileExistsError(
          f'{partial} is in the way, and no save left it: move it elsewhere'
        )
      shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
  else:
    made = tempfile.mkdtemp(prefix=f'{path.name}.partial-', dir=path.parent)
    partial = pathlib.Path(made)
  try:
    yield storage.folder(partial)
    partial.chmod(0o755)  # made private by mkdtemp
    partial.rename(path)
    storage.sync(path.parent)
  finally:
    if not mark:
      shutil.rmtree(partial, ignore_errors=True)


def _prepare(folder, plan, small, mark: bytes) -> set[str]:
  """Writes all but the weights; returns the shards that are whole already."""
  finished = set()
  if mark and _marked(folder, mark):
    finished = {
      shard.file for shard in plan if shards.is_written(folder, shard)
    }
  elif mark:
    # Shards of other values may have the very headers of these.
    for name in (shards.INDEX, *(shard.file for shard in plan)):
      folder.remove(name)
    storage.put(folder, _MARK, mark)
  for name, data in small.items():
    storage.put(folder, name, data)
  return finished


def _checked(cfg, params, dtype: str) -> dict[str, Any]:
  """Leaves by path, after checking them against the model's."""
  found = hf_tree.flat(params)
  wanted = hf_tree.abstract(cfg, 'float32')
  errors = [f'{name}: missing' for name in sorted(wanted.keys() - found.keys())]
  errors += [
    f'{name}: unknown' for name in sorted(found.keys() - wanted.keys())
  ]
  for name in sorted(found.keys() & wanted.keys()):
    leaf, right = found[name], wanted[name].shape
    if leaf.shape != right:
      errors.append(f'{name}: shape {leaf.shape}, the model has {right}')
    elif (leaf.dtype == fp8.DTYPE) != (wanted[name].dtype == fp8.DTYPE):
      errors.append(f'{name}: {leaf.dtype}, the model has {wanted[name].dtype}')
    elif not getattr(leaf, 'is_fully_addressable', True):
      errors.append(f'{name}: parts of it are on other hosts')
  if cfg.fp8_experts and dtype != 'fp8':
    errors.append(f'experts are codes of FP8: dtype={dtype!r} must be fp8')
  if errors:
    raise ValueError('hf.save: params: ' + shards.listing(errors))
  return found


def items(cfg, leaves, dtype: str) -> list[shards.Item]:
  """What to write, in order; see `shards.Item`."""
  sizes = hf_names.sizes_of(cfg)
  found = []
  for name, slot in hf_names.slots(cfg).items():
    specs = {name: (_STORED[dtype], slot.shape)}
    if slot.last in hf_tree.FLOAT32:
      specs = {name: ('F32', slot.shape)}
    elif dtype == 'fp8' and slot.last in hf_tree.QUANTISED:
      scale = fp8.scale_shape(slot.shape)
      specs = {
        name: ('F8_E4M3', slot.shape),
        name + hf_tree.SCALE: ('F32', scale),
      }
    make = functools.partial(_arrays, leaves, name, slot, sizes, specs)
    found.append(shards.Item(specs, make))
  return found


def _arrays(
  leaves, name, slot, sizes, specs
) -> Iterator[tuple[str, int, np.ndarray]]:
  """The parts of one item: rows of a weight, and their scales if it is FP8."""
  leaf = leaves[slot.entry.leaf]
  scale_name = name + hf_tree.SCALE
  if slot.codes:
    yield scale_name, 0, fetch(leaves[slot.scales], slot.index)
  dtype = shards.DTYPES[specs[name][0]]
  for row, x in _rows(leaf, slot, sizes):
    if slot.codes or len(specs) == 1:
      yield name, row, x.astype(dtype, copy=False)
      continue
    try:
      code, scale = fp8.quantise(x)
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from error
    yield name, row, code
    yield scale_name, row // fp8.BLOCK, scale


def _rows(leaf, slot, sizes) -> Iterator[tuple[int, np.ndarray]]:
  """A tensor as it is in the file; a large one is cut into rows."""
  layout = slot.entry.layout
  letter = layout.split('->')[0].split(',')[0]
  count = slot.shape[0]
  step = count
  if len(letter) == 1:  # one axis of the leaf is these rows
    row_bytes = leaf.dtype.itemsize * (np.prod(slot.shape[1:], dtype=int))
    step = max(1, _PIECE // row_bytes // fp8.BLOCK) * fp8.BLOCK
  axes = layout.split('->')[1].split(',')
  for row in range(0, count, step):
    stop = min(row + step, count)
    cut = [slice(row, stop) if axis == letter else slice(None) for axis in axes]
    x = fetch(leaf, (*slot.index, *cut))
    yield row, hf_names.to_file(x, layout, sizes | {letter: stop - row})


def fetch(leaf: Any, index: tuple[int | slice, ...]) -> np.ndarray:
  """A part of a leaf on the host; nothing else of it is moved there.

  Args:
    leaf: an array of NumPy, or of JAX with all parts on this host.
    index: integers for the first axes, then slices for some.
  """
  index = (*index, *[slice(None)] * (leaf.ndim - len(index)))
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf[index])
  want = [
    range(i, i + 1) if isinstance(i, int) else range(n)[i]
    for i, n in zip(index, leaf.shape)
  ]
  out = np.empty([len(r) for r in want], leaf.dtype)
  for shard in leaf.addressable_shards:
    have = [range(n)[cut] for n, cut in zip(leaf.shape, shard.index)]
    both = [
      range(max(w.start, h.start), min(w.stop, h.stop))
      for w, h in zip(want, have)
    ]
    if shard.replica_id or not all(both):
      continue
    source = tuple(
      slice(b.start - h.start, b.stop - h.start) for b, h in zip(both, have)
    )
    target = tuple(
      slice(b.start - w.start, b.stop - w.start) for b, w in zip(both, want)
    )
    out[target] = _piece(shard, source)
  return out.reshape(
    [len(r) for r, i in zip(want, index) if not isinstance(i, int)]
  )


def _piece(shard: Any, index: tuple[slice, ...]) -> np.ndarray:
  if shard.device.platform == 'cpu':
    return np.asarray(shard.data)[index]  # a view of the device's memory
  with host.alone(shard.device):
    return np.asarray(shard.data[index])
