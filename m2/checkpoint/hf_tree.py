"""The leaves that a public checkpoint is loaded into and written from.

Leaves go by their paths, such as 'blocks/moe/wi_0', in a flat dict. A model may
be held as the codes of its FP8 checkpoint: leaf `x` is float8_e4m3fn then, and
leaf `x_scale_inv` beside it has float32 scales: the stacked axes, and one scale
for each 128 x 128 block of the matrix that `x` is behind them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from m2 import config
from m2.checkpoint import fp8, hf_names
from m2.model import params
from m2.parallel import sharding

# By the last part of the leaf's path. The router is float32 in every released
# file; the matrices of `QUANTISED` are the ones FP8 checkpoints store as FP8.
FLOAT32 = ('gate', 'bias')
QUANTISED = ('q', 'k', 'v', 'o', 'wi_0', 'wi_1', 'wo')
SCALE = '_scale_inv'  # appended to a weight's name, in files and here
CODES = fp8.DTYPE.name


def flat(tree: Any) -> dict[str, Any]:
  """Leaves by path."""
  return {
    jax.tree_util.keystr(key, simple=True, separator='/'): leaf
    for key, leaf in jax.tree.leaves_with_path(tree)
  }


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Undoes `flat`."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def abstract(
  cfg: config.ModelConfig, dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and types of all leaves.

  Args:
    cfg: shape of the model.
    dtype: float32 or bfloat16 of the weights; float8_e4m3fn holds codes, and
      bfloat16 where FP8 checkpoints have none.
  """
  codes = dtype == CODES
  held = dataclasses.replace(cfg, param_dtype='bfloat16' if codes else dtype)
  leaves = flat(params.abstract(held))
  if not codes:
    return leaves
  sizes = hf_names.sizes_of(cfg)
  for entry in hf_names.NAMES:
    name = entry.leaf
    if name not in leaves or name.rsplit('/', 1)[-1] not in QUANTISED:
      continue
    leaves[name] = leaves[name].update(dtype=fp8.DTYPE)
    groups = hf_names.groups(entry.layout, sizes)
    stacked = leaves[name].ndim - sum(group.where.ndim for group in groups)
    blocks = fp8.scale_shape(tuple(group.where.size for group in groups))
    leaves[name + SCALE] = jax.ShapeDtypeStruct(
      (*leaves[name].shape[:stacked], *blocks), np.float32
    )
  return leaves


def shardings(
  leaves: Mapping[str, jax.ShapeDtypeStruct], mesh: jax.sharding.Mesh
) -> dict[str, jax.sharding.NamedSharding]:
  """Where the leaves of `abstract` go.

  Scales are split over experts only, as blocks do not follow the other axes;
  they are 1/4096 of the codes.
  """
  weights = {k: leaf for k, leaf in leaves.items() if not k.endswith(SCALE)}
  places = sharding.param_shardings(weights, mesh)
  for name in leaves.keys() - weights.keys():
    axes = sharding.AXES[name.removesuffix(SCALE).rsplit('/', 1)[-1]]
    kept = [axis if axis in ('layer', 'expert') else None for axis in axes]
    spec = sharding.spec(*kept[: len(leaves[name].shape)])
    places[name] = jax.sharding.NamedSharding(mesh, spec)
  return places
