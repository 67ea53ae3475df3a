"""Checkpoints in the public Hugging Face format of MiniMax-M2.

`config` reads a model's shape, `load` its weights, `save` writes both. `NAMES`
is the table of tensors (m2/checkpoint/hf_names.py).
"""

import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2 import config as settings
from m2.checkpoint import (
  fp8,
  hf_config,
  hf_names,
  hf_save,
  hf_tree,
  planes,
  shards,
  storage,
  stream,
)
from m2.parallel import sharding

config = hf_config.read
save = hf_save.save
NAMES = hf_names.NAMES

# Settings that no shape of a tensor shows.
_MEANING = (
  'top_k',
  'heads',
  'kv_heads',
  'head_dim',
  'rotary_dim',
  'rope_theta',
  'norm_eps',
)
_SCALE = hf_tree.SCALE
_FLOATS = ('F32', 'BF16', 'F16')
_HELD = ('float32', 'bfloat16')
_LISTED = 1_000_000  # matrices that may be missing and are still listed
# Rotation tables that some writers store; they follow from config.json.
_IGNORED = ('rotary_emb.inv_freq',)


def load(
  path: str | os.PathLike,
  cfg: settings.ModelConfig,
  mesh: jax.sharding.Mesh | None = None,
  dtype: Any = None,
  *,
  in_flight: int = stream.IN_FLIGHT,
) -> dict[str, Any]:
  """Reads a checkpoint; float32, bfloat16, float16 or block-FP8.

  Nothing is loaded unless every tensor fits. Then the files are read in their
  own order by many threads (m2/checkpoint/stream.py); with a mesh, each process
  reads only what its devices hold. Host memory holds `in_flight` bytes of the
  files and at most six times as much of what is being made of them, beside the
  headers, the scales and what CPU devices hold themselves.

  Args:
    path: directory, or its URL in an object store (m2/checkpoint/storage.py),
      with `model.safetensors`, or shards and their index.
    cfg: shape of the model; `config(path)` reads it. `fp8_experts` keeps the
      codes and scales of an FP8 checkpoint's experts, byte for byte.
    mesh: place leaves by `m2.parallel.sharding`; None makes plain arrays.
    dtype: float32 or bfloat16; None = `cfg.param_dtype`. The router is float32
      in any case.
    in_flight: bytes of files in host memory at a time.

  Returns:
    Parameters as `m2.model.params.abstract(cfg)` describes them.

  Raises:
    FileNotFoundError: no such checkpoint, or shards are not there.
    OSError: files cannot be read.
    ValueError: a file is corrupt or an FP8 weight NaN; config.json, if there is
      one, says otherwise than `cfg`; or tensors are missing, unexpected, of
      another shape or type: one error that lists them.
  """
  path = os.fspath(path)
  dtype = cfg.param_dtype if dtype is None else jnp.dtype(dtype).name
  if dtype not in _HELD:
    raise ValueError(
      f'hf.load: dtype={dtype!r}: choose {" or ".join(_HELD)}; experts in FP8 '
      'are model.fp8_experts'
    )
  folder = storage.folder(path)
  _check_config(path, cfg)
  tensors = shards.read(path)
  slots = _slots(path, cfg, tensors)
  scales = _scales(folder, slots, tensors, in_flight)
  if errors := _misfits(cfg, slots, tensors, scales):
    raise ValueError(
      f'{path}: {len(errors)} tensors do not fit the model: '
      + shards.listing(errors)
    )
  leaves = hf_tree.abstract(cfg, dtype)
  places = dict.fromkeys(leaves)
  if mesh:
    places = sharding.param_shardings(leaves, mesh)
  parts = _parts(cfg, leaves, places)
  needs = [
    planes.Need(name, tensors[name], slot, scales.get(name + _SCALE))
    for name, slot in slots.items()
  ]
  stream.read(folder, stream.stretches(needs, parts), in_flight, path)
  arrays = {
    name: _array(leaves[name], places[name], parts.pop(name))
    for name in list(parts)
  }
  arrays |= _scale_leaves(leaves, places, slots, scales)
  return hf_tree.nested(cfg, arrays)


def _slots(path, cfg, tensors) -> dict[str, hf_names.Slot]:
  """The model's tensors by name, unless they are far too many to be these."""
  matrices = 3 * cfg.layers * cfg.experts
  if matrices > max(_LISTED, 4 * len(tensors)):
    raise ValueError(
      f'{path}: {len(tensors)} tensors, where {cfg.layers} layers of '
      f'{cfg.experts} experts have {matrices} matrices'
    )
  return hf_names.slots(cfg)


def holds_codes(path: str | os.PathLike) -> bool:
  """Whether a checkpoint's experts are FP8, so that they can be kept as such.

  Raises:
    FileNotFoundError: no such checkpoint, or shards are not there.
    OSError: files cannot be read.
    ValueError: a file is corrupt, or config.json cannot be read.
  """
  tensors = shards.read(path)
  return all(
    name in tensors and tensors[name].dtype == 'F8_E4M3'
    for name, slot in _slots(path, config(path), tensors).items()
    if '{expert}' in slot.entry.pattern
  )


def _check_config(path: str, cfg: settings.ModelConfig) -> None:
  """Raises where the same tensors would mean another function."""
  folder = storage.folder(path)
  if not folder.has('config.json'):
    return
  found = config(path)
  differing = [
    f'model.{name}={getattr(cfg, name)} but it has {getattr(found, name)}'
    for name in _MEANING
    if getattr(cfg, name) != getattr(found, name)
  ]
  if differing:
    raise ValueError(f'{folder.file("config.json")}: {"; ".join(differing)}')


def _scales(folder, slots, tensors, in_flight: int) -> dict[str, np.ndarray]:
  """The scales of FP8 weights, as far as they are what they should be."""
  found = {}
  for name, slot in slots.items():
    scale = tensors.get(name + _SCALE)
    shape = fp8.scale_shape(slot.shape) if len(slot.shape) == 2 else None
    if scale and (scale.dtype, scale.shape) == ('F32', shape):
      found[name + _SCALE] = scale
  return stream.whole(folder, found, in_flight)


def _misfits(cfg, slots, tensors, scales) -> list[str]:
  """What keeps these tensors from being this model, a line for each."""
  errors = []
  known = set(slots)
  for name, slot in slots.items():
    tensor = tensors.get(name)
    quantised = slot.last in hf_tree.QUANTISED
    if tensor is None:
      errors.append(f'{name}: missing')
    elif tensor.shape != slot.shape:
      errors.append(
        f'{name}: shape {list(tensor.shape)}, the model has {list(slot.shape)}'
      )
    elif tensor.dtype == 'F8_E4M3' and quantised:
      errors += _scale_misfits(name + _SCALE, slot, tensors, scales)
    elif tensor.dtype not in _FLOATS:
      errors.append(f'{name}: type {tensor.dtype}, not {", ".join(_FLOATS)}')
    elif slot.codes:
      errors.append(
        f'{name}: type {tensor.dtype}, but model.fp8_experts keeps F8_E4M3'
      )
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


def _scale_misfits(name, slot, tensors, scales) -> list[str]:
  if name not in tensors:
    return [f'{name}: missing, and its weight is FP8']
  if name not in scales:
    tensor, shape = tensors[name], fp8.scale_shape(slot.shape)
    return [
      f'{name}: {tensor.dtype} {list(tensor.shape)}, not F32 {list(shape)}'
    ]
  if not np.isfinite(scales[name]).all():
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


def _parts(cfg, leaves, places) -> dict[str, list[Any]]:
  """By leaf, scales left out: a buffer for each part that is on a device."""
  layouts = {entry.leaf: entry.layout for entry in hf_names.names(cfg)}
  sizes = hf_names.sizes_of(cfg)
  parts: dict[str, list[Any]] = {}
  for name, leaf in leaves.items():
    if name.endswith(hf_names.SCALES):
      continue
    groups = hf_names.groups(layouts[name], sizes)
    parts[name] = [
      planes.part(planes.Plane(groups, box), leaf.dtype, devices)
      for box, devices in boxes(leaf.shape, places[name]).items()
    ]
  return parts


def boxes(
  shape: tuple[int, ...], place: jax.sharding.Sharding | None
) -> dict[tuple[range, ...], list[Any]]:
  """The parts of an array on this process's devices, and who holds each."""
  if place is None:
    return {tuple(range(size) for size in shape): [None]}
  found: dict[tuple[range, ...], list[Any]] = {}
  for device, index in place.addressable_devices_indices_map(shape).items():
    box = tuple(range(size)[cut] for size, cut in zip(shape, index))
    found.setdefault(box, []).append(device)
  return found


def _array(leaf, place, parts) -> jax.Array:
  if place is None:
    return parts[0].arrays(leaf.shape)[0]
  arrays = [
    x for part in parts for x in part.arrays(place.shard_shape(leaf.shape))
  ]
  return jax.make_array_from_single_device_arrays(leaf.shape, place, arrays)


def _scale_leaves(leaves, places, slots, scales) -> dict[str, jax.Array]:
  """The leaves of scales, where there are codes."""
  by_leaf: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
  for name, slot in slots.items():
    if slot.codes:
      by_leaf.setdefault(slot.scales, {})[slot.index] = scales[name + _SCALE]

  def read(name: str, index) -> np.ndarray:
    ranges = [range(n)[cut] for n, cut in zip(leaves[name].shape, index)]
    stacked = itertools.product(*ranges[:-2])
    flat = np.stack([by_leaf[name][place][index[-2:]] for place in stacked])
    return flat.reshape([len(r) for r in ranges])

  return {
    name: jax.make_array_from_callback(
      leaves[name].shape, places[name], functools.partial(read, name)
    )
    if places[name]
    else jnp.asarray(read(name, (slice(None),) * len(leaves[name].shape)))
    for name in by_leaf
  }
