"""Parameters: shapes without allocation, initial values, counts."""

import functools
import math
from typing import Any

import jax

import pallas_kernels
from m2 import config
from m2.model import mtp, transformer
from m2.parallel import sharding


def _init(cfg: config.ModelConfig, key: jax.Array) -> Any:
  config.check(cfg)
  params = transformer.M2(cfg).init(key, None, None, None)['params']
  if cfg.mtp_modules:
    params = {**params, 'mtp': mtp.init(cfg, jax.random.fold_in(key, 1))}
  return params


def abstract(cfg: config.ModelConfig) -> Any:
  """The tree of `jax.ShapeDtypeStruct`, without allocating anything.

  Raises:
    ValueError: values of `cfg` that make no model.
  """
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    return jax.eval_shape(functools.partial(_init, cfg), jax.random.key(0))


def init(
  cfg: config.ModelConfig, key: jax.Array, mesh: jax.sharding.Mesh | None = None
) -> Any:
  """Random initial parameters, made in place on `mesh` if one is given.

  Raises:
    ValueError: values of `cfg` that make no model.
  """
  if mesh is None:
    return jax.jit(functools.partial(_init, cfg))(key)
  shardings = sharding.param_shardings(abstract(cfg), mesh)
  # Traced without a mesh: the values must not depend on it.
  make = jax.jit(functools.partial(_init, cfg), out_shardings=shardings)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    return make(key)


def quantise(params: Any) -> Any:
  """`params` with the experts in block-FP8, as `model.fp8_experts` has them."""

  def part(tree):
    moe = {
      name: pallas_kernels.quantise(leaf)
      if name in ('wi_0', 'wi_1', 'wo')
      else leaf
      for name, leaf in tree['moe'].items()
    }
    return {**tree, 'moe': moe}

  parts = [name for name in ('blocks', 'mtp') if name in params]
  return {**params, **{name: part(params[name]) for name in parts}}


def is_quantised(params: Any) -> bool:
  """Whether the experts are in block-FP8 already."""
  return isinstance(params['blocks']['moe']['wi_0'], pallas_kernels.Quantized)


def count(cfg: config.ModelConfig) -> int:
  """All stored parameters, router bias included."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(cfg)))


def active_count(cfg: config.ModelConfig) -> int:
  """Parameters one token uses in the blocks: no embedding, no head."""
  blocks = abstract(cfg)['blocks']
  total = 0
  for path, leaf in jax.tree.leaves_with_path(blocks):
    names = sharding.name_of(path).split('/')  # in FP8, below the matrix's own
    size = math.prod(leaf.shape)
    if {'wi_0', 'wi_1', 'wo'} & set(names):
      size = size * cfg.top_k // cfg.experts
    total += size
  return total
