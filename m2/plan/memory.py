"""Bytes of one device's memory by what they are for.

The compiler says how much a program holds at its peak and what comes in and
goes out. Of that, weights, moments, batch, gradients and what the forward pass
keeps for the backward pass follow from shapes and shardings; the rest is work
space. `estimate` is the same made without a compiler, for the search.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from m2 import config as settings
from m2.engine import engine as engines
from m2.forge import step as rl_step
from m2.forge import tree as tree_lib
from m2.model import params as model_params
from m2.parallel import cost, sharding
from m2.plan import counts
from m2.train import optim

# Work space beyond the analytic count: what the scheduler keeps alive.
FIXED = 2**30
# Work space of a prefill beside its rows of cache.
PREFILL = 2 * 2**30
# Numbers known of every token of an RL update.
PAIRS = sum(
  field.name.endswith('_Z') for field in dataclasses.fields(tree_lib.TreeBatch)
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device at the peak of a program.

  Attributes:
    weights: parameters that come in.
    optimiser: moments and counters.
    cache: keys and values of generation.
    batch: what a call brings along: tokens, requests.
    gradients: of all parameters, at once.
    residuals: what the forward pass keeps for the backward pass.
    work: everything else: gathered weights, activations inside a layer.
  """

  weights: float
  optimiser: float = 0.0
  cache: float = 0.0
  batch: float = 0.0
  gradients: float = 0.0
  residuals: float = 0.0
  work: float = 0.0

  @property
  def peak(self) -> float:
    return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def on_device(tree: Any) -> int:
  """Bytes of one device's part of a tree of arrays with shardings."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += math.prod(shape) * _itemsize(leaf.dtype)
  return total


def _itemsize(dtype: Any) -> int:
  return np.dtype(dtype).itemsize


def residuals(work: counts.Work) -> float:
  """What every layer keeps of a microbatch, by the policy of `model.remat`."""
  cfg = work.cfg
  hidden = work.tokens * cfg.d_model * work.itemsize
  heads = cfg.heads * cfg.head_dim / work.mesh['tensor']
  kept = hidden
  if cfg.remat != 'full':
    # Beside attention's output, a number a head: the log of its sum.
    kept += hidden + work.tokens * heads * work.itemsize
    kept += work.tokens * cfg.heads / work.mesh['tensor'] * counts.F32
  if cfg.remat == 'none':
    kept += _inside(work)
  return cfg.layers * (kept + work.tokens * cfg.top_k * 4)


def _inside(work: counts.Work) -> float:
  """Activations that one layer makes: attention, then experts."""
  cfg = work.cfg
  tensor, expert = work.mesh['tensor'], work.mesh['expert']
  heads = (2 * cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim / tensor
  name, chunks = counts.strategy(work)
  tokens = work.tokens * expert
  rows = cost.rows(name, counts.layer(work), chunks)
  wide = 3 * cfg.d_model + 5 * cfg.d_expert / tensor
  return work.itemsize * (
    work.tokens * heads + 2 * tokens * cfg.d_model + rows * wide
  )


@functools.cache
def numbers(model: settings.ModelConfig, mesh: tuple) -> int:
  """Parameters of one device of a mesh, given as pairs of axis and size.

  Raises:
    ValueError: a dimension does not divide over the mesh.
  """
  return sum(count for count, _ in _parts(model, mesh))


@functools.cache
def served(model: settings.ModelConfig, mesh: tuple) -> int:
  """Bytes of the parameters of one device of a mesh, as the engine holds them.

  Raises:
    ValueError: a dimension does not divide over the mesh.
  """
  return sum(count * _itemsize(dtype) for count, dtype in _parts(model, mesh))


def _parts(model, mesh) -> list[tuple[int, Any]]:
  """Numbers and dtype of one device's part of every leaf."""
  shapes = _shapes(model)
  axes, sizes = zip(*mesh)
  grid = jax.sharding.AbstractMesh(sizes, axes)
  where = sharding.param_shardings(shapes, grid)
  parts = jax.tree.map(
    lambda leaf, place: (math.prod(place.shard_shape(leaf.shape)), leaf.dtype),
    shapes,
    where,
  )
  return jax.tree.leaves(parts, is_leaf=lambda part: isinstance(part, tuple))


@functools.cache
def _moments(
  model: settings.ModelConfig, cfg: settings.OptimConfig, mesh: tuple
) -> int:
  """Bytes of one device's moments: Muon keeps one of a matrix, Adam two."""
  sizes = [count for count, _ in _parts(model, mesh)]
  moved = jax.tree.leaves_with_path(optim.trained(cfg, _shapes(model)))
  total = 0
  for count, (path, moves) in zip(sizes, moved, strict=True):
    one = cfg.name == 'muon' and optim.name_of(path) in optim.MATRICES
    each = _itemsize(cfg.moment) + (0 if one else counts.F32)
    total += count * each if moves else 0
  return total


@functools.cache
def _shapes(model: settings.ModelConfig) -> Any:
  return model_params.abstract(model)


def estimate(
  config: settings.RunConfig, mesh: Mapping[str, int], kind: str
) -> Memory:
  """Of a training step on devices of `kind`, without a compiler.

  Raises:
    ValueError: a dimension does not divide over the mesh.
  """
  data, parts = config.data, config.optim.accumulate
  work = counts.Work(
    config.model, mesh, data.batch // parts, data.length, parts, kind
  )
  tokens = data.batch * data.length / work.ways('batch', 'sequence')
  return _updating(
    config, work, 5 * counts.F32 * tokens, parts > 1, config.loss.chunk
  )


def estimate_rl(
  config: settings.RunConfig, mesh: Mapping[str, int], kind: str
) -> Memory:
  """Of an RL update on one microbatch of full lines, likewise.

  The full model on tpu7x:4x4x8 (32 x 8, 256 lines of 8K, `gather`) takes 53.7
  GiB by this count and 49.7 by the compiler; on v6e:16x16 (16 x 16, 256 lines
  of 8K, `ragged`) 27.8 and 28.1.
  """
  forge = config.forge
  work = counts.Work(config.model, mesh, forge.lines, forge.row_tokens, 1, kind)
  tokens = forge.lines * forge.row_tokens
  # Lines are split over devices, what is known of their tokens is not.
  fields = len(rl_step.LINES) / work.ways('batch', 'sequence') + PAIRS
  return _updating(
    config, work, counts.F32 * tokens * fields, True, forge.chunk
  )


def _updating(config, work: counts.Work, batch, sums: bool, chunk) -> Memory:
  """Of an update; `sums` of gradients exist beside the newest one's."""
  model = config.model
  # The same shapes whatever is kept for the backward pass.
  plain = dataclasses.replace(model, remat='none')
  held = numbers(plain, tuple(work.mesh.items()))
  stored = held * _itemsize(model.param_dtype)
  return Memory(
    weights=stored,
    optimiser=_moments(plain, config.optim, tuple(work.mesh.items())),
    batch=batch,
    gradients=stored * (2 if sums else 1),
    residuals=residuals(work),
    work=work_space(work, chunk),
  )


def served_model(config: settings.RunConfig) -> settings.ModelConfig:
  """The model as generation holds it: no copies in float32."""
  return dataclasses.replace(
    config.model,
    param_dtype=config.model.dtype,
    fp8_experts=config.engine.fp8,
  )


def serving(
  config: settings.RunConfig, mesh: Mapping[str, int], program: str
) -> Memory:
  """Of generation, without a compiler.

  The full model in FP8, as in launch/README.md, takes 27.3 GiB to decode and
  28.3 for a prefill on v6e:4x4 by this count, 27.3 and 28.7 by the compiler; on
  v5e:4x8 14.9 and 14.9, by the compiler 14.4 and 14.7.

  Args:
    config: of the run; `engine` says how it serves.
    mesh: axis sizes.
    program: decode or prefill.

  Raises:
    ValueError: a dimension does not divide over the mesh.
  """
  engine = config.engine
  model = served_model(config)
  ways = counts.ways(mesh, sharding.RULES['batch'])
  if engine.slots % ways:
    raise ValueError(f'{engine.slots} slots do not divide over {ways} devices')
  entry = 2 * model.layers * model.kv_heads * model.head_dim / mesh['tensor']
  slot = engine.length * entry * _itemsize(model.dtype)
  cache = engine.slots / ways * slot
  if program == 'decode':
    work = FIXED + cache / 2
  else:
    # Rows of cache of the prompts, and these once more, turned.
    rows = engines.prefill_rows(engine, ways, engine.prompts)
    work = PREFILL + 2 * rows / ways * slot
  return Memory(
    weights=served(model, tuple(mesh.items())), cache=cache, work=work
  )


def work_space(work: counts.Work, chunk: int) -> float:
  """The larger of the work inside a layer and at the head.

  The full model on v5p:8x8x8 (64 x 8, rows of 8K) has 20.2 GiB by this count
  and 15.9 by the compiler, which does not hold all rows at once.
  """
  cfg = work.cfg
  tensor, expert = work.mesh['tensor'], work.mesh['expert']
  matrices = 3 * cfg.experts * cfg.d_model * cfg.d_expert / expert / tensor
  layer = 2 * matrices * work.itemsize + _inside(work)
  table = cfg.d_model * cfg.vocab / tensor * counts.F32
  logits = min(chunk, work.tokens) * cfg.vocab / tensor * counts.F32
  head = 2 * table + 2 * logits
  return FIXED + max(layer, head)
