"""Checkpoints in the public Hugging Face format of MiniMax-M2.

`config` reads a model's shape, `load` its weights, `save` writes both. `NAMES`
is the table of tensors (m2/checkpoint/hf_names.py).
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2 import config as settings
from m2.checkpoint import fp8, hf_config, hf_names, shards
from m2.model import params as shapes
from m2.parallel import sharding

config = hf_config.read
NAMES = hf_names.NAMES

# By the last part of the leaf's path. The router is float32 in every released
# file; the matrices of `_QUANTISED` are the ones FP8 checkpoints store as FP8.
_FLOAT32 = ('gate', 'bias')
_QUANTISED = ('q', 'k', 'v', 'o', 'wi_0', 'wi_1', 'wo')
# Settings that no shape of a tensor shows.
_MEANING = (
  'heads',
  'kv_heads',
  'head_dim',
  'rotary_dim',
  'rope_theta',
  'norm_eps',
)
_SCALE = '_scale_inv'  # appended to a weight's name
_FLOATS = ('F32', 'BF16', 'F16')
_STORED = {'float32': 'F32', 'bfloat16': 'BF16', 'fp8': 'BF16'}
# Rotation tables that some writers store; they follow from config.json.
_IGNORED = ('rotary_emb.inv_freq',)


def load(
  path: str | os.PathLike,
  cfg: settings.ModelConfig,
  mesh: jax.sharding.Mesh | None = None,
  *,
  dtype: Any = None,
) -> dict[str, Any]:
  """Reads a checkpoint; float32, bfloat16, float16 or block-FP8.

  Nothing is loaded unless every tensor fits. Then one leaf at a time is
  assembled; with a mesh, each process reads only the parts its devices hold.

  Args:
    path: directory with `model.safetensors`, or shards and their index.
    cfg: shape of the model; `config(path)` reads it.
    mesh: place leaves by `m2.parallel.sharding`; None makes plain arrays.
    dtype: float32 or bfloat16; None = `cfg.param_dtype`. The router is float32
      in any case.

  Returns:
    Parameters as `m2.model.params.abstract(cfg)` describes them.

  Raises:
    FileNotFoundError: no such checkpoint, or shards are not there.
    ValueError: a file is corrupt; config.json, if there is one, says otherwise
      than `cfg`; or tensors are missing, unexpected, of another shape or type:
      one error that lists them.
  """
  path = pathlib.Path(path)
  dtype = cfg.param_dtype if dtype is None else jnp.dtype(dtype).name
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f'hf.load: dtype={dtype!r}: choose float32 or bfloat16')
  _check_config(path, cfg)
  tensors = shards.read(path)
  slots = hf_names.slots(cfg)
  if errors := _misfits(cfg, slots, tensors):
    raise ValueError(
      f'{path}: {len(errors)} tensors do not fit the model: '
      + shards.listing(errors)
    )
  abstract = shapes.abstract(dataclasses.replace(cfg, param_dtype=dtype))
  parts = _parts(cfg, slots, tensors)

  def make(key_path, struct, place=None):
    leaf = jax.tree_util.keystr(key_path, simple=True, separator='/')
    # Devices that hold the same part share one read of it.
    read = functools.cache(functools.partial(_assemble, parts[leaf], struct))
    if place is None:
      return jnp.asarray(read((slice(None),) * len(struct.shape)))
    return jax.make_array_from_callback(struct.shape, place, read)

  trees = [abstract]
  if mesh is not None:
    trees.append(sharding.param_shardings(abstract, mesh))
  return jax.tree_util.tree_map_with_path(make, *trees)


def _check_config(path: pathlib.Path, cfg: settings.ModelConfig) -> None:
  """Raises where the same tensors would mean another function."""
  if not (path / 'config.json').exists():
    return
  found = config(path)
  differing = [
    f'model.{name}={getattr(cfg, name)} but it has {getattr(found, name)}'
    for name in _MEANING
    if getattr(cfg, name) != getattr(found, name)
  ]
  if differing:
    raise ValueError(f'{path / "config.json"}: {"; ".join(differing)}')


def _misfits(cfg, slots, tensors) -> list[str]:
  """What keeps these tensors from being this model, a line for each."""
  errors = []
  known = set(slots)
  for name, slot in slots.items():
    tensor = tensors.get(name)
    if tensor is None:
      errors.append(f'{name}: missing')
    elif tensor.shape != slot.shape:
      errors.append(
        f'{name}: shape {list(tensor.shape)}, the model has {list(slot.shape)}'
      )
    elif tensor.dtype == 'F8_E4M3' and slot.last in _QUANTISED:
      errors += _scale_misfits(name + _SCALE, slot, tensors)
    elif tensor.dtype not in _FLOATS:
      errors.append(f'{name}: type {tensor.dtype}, not {", ".join(_FLOATS)}')
    if tensor is not None and tensor.dtype == 'F8_E4M3':
      known.add(name + _SCALE)
  extra = set(tensors) - known
  spare = _spare_modules(cfg, extra)
  errors += [
    f'{name}: unexpected'
    for name in sorted(extra)
    if not name.startswith(spare) and not name.endswith(_IGNORED)
  ]
  return errors


def _scale_misfits(name, slot, tensors) -> list[str]:
  tensor = tensors.get(name)
  shape = fp8.scale_shape(slot.shape)
  if tensor is None:
    return [f'{name}: missing, and its weight is FP8']
  if (tensor.dtype, tensor.shape) != ('F32', shape):
    return [
      f'{name}: {tensor.dtype} {list(tensor.shape)}, not F32 {list(shape)}'
    ]
  if not np.isfinite(tensor.array()).all():
    return [f'{name}: a scale is infinite or not a number']
  return []


def _spare_modules(cfg, extra) -> tuple[str, ...]:
  """Prefixes of MTP modules beyond those that the model has.

  A layer behind the last is an MTP module only if it holds an eh_proj: a
  decoder layer there means that `cfg.layers` is wrong.
  """
  prefixes = (
    f'model.layers.{cfg.layers + module}.'
    for module in range(cfg.mtp_modules, hf_config.MAX_MODULES)
  )
  return tuple(p for p in prefixes if p + 'eh_proj.weight' in extra)


def _parts(cfg, slots, tensors) -> dict[str, dict[tuple, Callable]]:
  """By leaf and stacked index: a function that returns the tensor there."""
  sizes = hf_names.sizes_of(cfg)
  parts: dict[str, dict[tuple, Callable]] = {}
  for name, slot in slots.items():
    part = functools.partial(_weight, tensors, name, slot, sizes)
    parts.setdefault(slot.entry.leaf, {})[slot.index] = part
  return parts


def _weight(tensors, name, slot, sizes) -> np.ndarray:
  """One tensor in its axes here; mapped, not read, unless it is FP8."""
  x = tensors[name].array()
  if tensors[name].dtype == 'F8_E4M3':
    x = fp8.dequantise(x, tensors[name + _SCALE].array())
  return hf_names.to_leaf(x, slot.entry.layout, sizes)


def _assemble(parts, struct, index) -> np.ndarray:
  """The part `index` of a stacked leaf, from the tensors it needs only."""
  ranges = [range(size)[cut] for size, cut in zip(struct.shape, index)]
  out = np.empty([len(r) for r in ranges], struct.dtype)
  stacked = len(next(iter(parts)))
  for place in itertools.product(*(enumerate(r) for r in ranges[:stacked])):
    target = tuple(i for i, _ in place)
    source = tuple(i for _, i in place)
    out[target] = parts[source]()[tuple(index[stacked:])]
  return out


def save(
  params: Mapping[str, Any],
  path: str | os.PathLike,
  cfg: settings.ModelConfig,
  *,
  dtype: str = 'bfloat16',
  shard_bytes: int = 5 * 10**9,
  beside: Sequence[pathlib.Path] = (),
) -> None:
  """Writes a checkpoint that transformers and its kin read.

  The files appear at `path` all at once, when all of them are on disk.

  Args:
    params: parameters; every part of them on this host's devices.
    path: a directory that does not exist yet or is empty.
    cfg: shape of the model.
    dtype: float32, bfloat16, or fp8 (see `fp8.quantise`: what was FP8 and was
      loaded as float32 gets its bytes back). The router is float32 in any case.
    shard_bytes: largest file.
    beside: files to copy next to the weights, such as a tokenizer's.

  Raises:
    ValueError: `dtype` is unknown, leaves are missing, unexpected or of another
      shape, or the format cannot express the model.
    FileExistsError: something is at `path`.
    OSError: a file could not be written; nothing is left at `path`.
  """
  path = pathlib.Path(path).absolute()
  if dtype not in _STORED:
    raise ValueError(f'hf.save: dtype={dtype!r}: choose {", ".join(_STORED)}')
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise FileExistsError(f'{path} is there already: give an empty directory')
  tree = hf_config.to_json(cfg, dtype)
  items = _items(cfg, _flatten(cfg, params), dtype)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = tempfile.mkdtemp(prefix=f'{path.name}.partial-', dir=path.parent)
  try:
    partial = pathlib.Path(partial)
    shards.write(partial, items, shard_bytes)
    shards.write_json(partial / 'config.json', tree)
    for file in beside:
      shutil.copyfile(file, partial / file.name)
    partial.chmod(0o755)  # made private by mkdtemp
    partial.rename(path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _flatten(cfg, params) -> dict[str, Any]:
  """Leaves by path, after checking them against the model's."""

  def leaves(tree):
    return {
      jax.tree_util.keystr(key, simple=True, separator='/'): leaf
      for key, leaf in jax.tree.leaves_with_path(tree)
    }

  found, wanted = leaves(params), leaves(shapes.abstract(cfg))
  errors = [f'{name}: missing' for name in sorted(wanted.keys() - found.keys())]
  errors += [
    f'{name}: unknown' for name in sorted(found.keys() - wanted.keys())
  ]
  for name in sorted(found.keys() & wanted.keys()):
    shape, right = found[name].shape, wanted[name].shape
    if shape != right:
      errors.append(f'{name}: shape {shape}, the model has {right}')
    elif not getattr(found[name], 'is_fully_addressable', True):
      errors.append(f'{name}: parts of it are on other hosts')
  if errors:
    raise ValueError('hf.save: params: ' + shards.listing(errors))
  return found


def _items(cfg, leaves, dtype) -> Sequence[shards.Item]:
  """What to write, in order; see `shards.Item`."""
  sizes = hf_names.sizes_of(cfg)
  # The tensors of one leaf's layer follow each other.
  fetch = functools.lru_cache(1)(lambda leaf, row: _row(leaves[leaf], row))
  items = []
  for name, slot in hf_names.slots(cfg).items():
    specs = {name: (_STORED[dtype], slot.shape)}
    if slot.last in _FLOAT32:
      specs = {name: ('F32', slot.shape)}
    elif dtype == 'fp8' and slot.last in _QUANTISED:
      scale = fp8.scale_shape(slot.shape)
      specs = {name: ('F8_E4M3', slot.shape), name + _SCALE: ('F32', scale)}
    make = functools.partial(_arrays, fetch, name, slot, sizes, specs)
    items.append(shards.Item(specs, make))
  return items


def _arrays(fetch, name, slot, sizes, specs) -> dict[str, np.ndarray]:
  """The tensors of one item: a weight, and its scales if it is FP8."""
  row, rest = slot.index[:1], slot.index[1:]
  x = fetch(slot.entry.leaf, *row or (None,))[rest]
  x = hf_names.to_file(x, slot.entry.layout, sizes)
  if len(specs) == 1:
    return {name: x.astype(shards.DTYPES[specs[name][0]])}
  try:
    code, scale = fp8.quantise(x)
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error
  return {name: code, name + _SCALE: scale}


def _row(leaf: Any, row: int | None) -> np.ndarray:
  """Fetches one layer of a leaf to the host; all of it if `row` is None."""
  if row is None:
    return np.asarray(leaf)
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf[row])
  # Piece by piece: indexing the whole would move all of it between devices.
  out = np.empty(leaf.shape[1:], leaf.dtype)
  for shard in leaf.addressable_shards:
    rows = range(leaf.shape[0])[shard.index[0]]
    if shard.replica_id == 0 and row in rows:
      # A piece is on one device; the caller's mesh may have more.
      with jax.set_mesh(jax.sharding.Mesh(np.array(shard.device), ())):
        out[shard.index[1:]] = np.asarray(shard.data[row - rows.start])
  return out
