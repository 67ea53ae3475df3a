"""The leaves that a public checkpoint is loaded into and written from.

Leaves go by their paths, such as 'blocks/moe/wi_0', in a flat dict. With
`model.fp8_experts` a matrix of experts is two leaves, 'blocks/moe/wi_0/values'
and 'blocks/moe/wi_0/scale_inv': what the file holds, as it lies there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from m2 import config
from m2.model import params
from m2.parallel import sharding

# By the last part of the leaf's path. The router is float32 in every released
# file; the matrices of `QUANTISED` are the ones FP8 checkpoints store as FP8.
FLOAT32 = ('gate', 'bias')
QUANTISED = ('q', 'k', 'v', 'o', 'wi_0', 'wi_1', 'wo')
SCALE = '_scale_inv'  # behind a weight's name in files


def flat(tree: Any) -> dict[str, Any]:
  """Leaves by path."""
  named = jax.tree.leaves_with_path(tree)
  return {sharding.name_of(key): leaf for key, leaf in named}


def nested(
  cfg: config.ModelConfig, leaves: Mapping[str, Any]
) -> dict[str, Any]:
  """Undoes `flat`, for the parameters of `cfg`."""
  return jax.tree_util.tree_map_with_path(
    lambda key, _: leaves[sharding.name_of(key)], params.abstract(cfg)
  )


def abstract(
  cfg: config.ModelConfig, dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and types of all leaves.

  Args:
    cfg: shape of the model.
    dtype: float32 or bfloat16, of the weights that are no codes.
  """
  return flat(params.abstract(dataclasses.replace(cfg, param_dtype=dtype)))
