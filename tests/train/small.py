"""The smallest training run that has every part, for the tests of m2/train."""

import dataclasses
import functools

import jax
import numpy as np

from m2 import config
from m2.model import params as model_params
from m2.parallel import mesh as meshes
from m2.parallel import sharding
from m2.train import optim, step
from m2.train import state as train_state

ROWS, LENGTH = 8, 16

MODEL = config.ModelConfig(
  vocab=320,
  d_model=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  rotary_dim=4,
  max_positions=64,
  experts=8,
  d_expert=16,
  top_k=2,
  min_k=2,
  dtype='float32',
  remat='none',
)
ONE = config.MeshConfig()
EIGHT = config.MeshConfig(data=2, fsdp=2, expert=2)
# Eight as well, with rows cut along their length.
CUT = config.MeshConfig(fsdp=2, expert=2, context=2)


def run_config(modules: int = 0, **changes) -> config.RunConfig:
  """A run; `changes` are `section={field: value}` or fields of RunConfig."""
  sections = {
    'model': dataclasses.replace(MODEL, mtp_modules=modules),
    'mesh': ONE,
    'optim': config.OptimConfig(lr=1e-2, warmup=2),
    'loss': config.LossConfig(
      mtp=0.3 * bool(modules), mtp_final=0.1 * bool(modules)
    ),
    'data': config.DataConfig(batch=ROWS, length=LENGTH),
    'checkpoint': config.CheckpointConfig(every=4),
    'log': config.LogConfig(introspect=0, tensorboard=False),
    'guard': config.GuardConfig(),
  }
  fields = {'mode': 'pretrain', 'steps': 20}
  for name, value in changes.items():
    if name in sections:
      sections[name] = dataclasses.replace(sections[name], **value)
    else:
      fields[name] = value
  return config.RunConfig(**sections, **fields)


def batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
  """Random tokens in two documents a row and some padding; uneven weights."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, MODEL.vocab, (rows, LENGTH + 1)).astype(np.int32)
  index = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
  border = LENGTH // 2 - 1
  until = np.where(index < border, border, LENGTH - 2).astype(np.int32)
  until[:, -2:] = 0
  weights = rng.random((rows, LENGTH)).astype(np.float32)
  weights[:, [border - 1, LENGTH - 3]] = 0  # the last token of a document
  weights[until == 0] = 0
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': weights,
    'positions': np.where(index < border, index, index - border),
    'until': until,
  }


@functools.cache
def compiled(cfg: config.RunConfig, mesh: config.MeshConfig, inspect: bool):
  """The mesh, the optimiser and the jitted update; shared by the tests."""
  devices = jax.devices()[: 1 if mesh == ONE else 8]
  optimizer = optim.make(cfg.optim, cfg.steps)
  update = functools.partial(
    step.train_step,
    model=cfg.model,
    optimizer=optimizer,
    cfg=cfg,
    inspect=inspect,
  )
  made = meshes.make_mesh(mesh, devices)
  return made, optimizer, jax.jit(update)


def steps(
  cfg: config.RunConfig,
  count: int = 1,
  mesh: config.MeshConfig = ONE,
  *,
  state: train_state.TrainState | None = None,
  rows: dict[str, np.ndarray] | None = None,
  inspect: bool = False,
) -> tuple[train_state.TrainState, dict]:
  """State and last metrics, on the host, after `count` updates on one batch."""
  made, optimizer, update = compiled(cfg, mesh, inspect)
  with jax.set_mesh(made):
    if state is None:
      key = jax.random.key(0)
      state = train_state.create(cfg.model, key, made, optimizer)
    else:
      abstract = train_state.abstract(cfg.model, made, optimizer)
      where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
      state = jax.device_put(state, where)
    where = sharding.batch_sharding(made)
    rows = jax.device_put(batch() if rows is None else rows, where)
    for _ in range(count):
      state, metrics = update(state, rows)
  assert update._cache_size() == 1, 'compiled more than once'
  return jax.device_get((state, metrics))


@functools.cache
def weights(model: config.ModelConfig):
  """Random parameters, on the host, where no test can write to them."""
  return jax.device_get(model_params.init(model, jax.random.key(0)))


def noise(tree, seed: int):
  """Random values, on the host, in the shapes of the tree's leaves."""
  rng = np.random.default_rng(seed)
  draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32)
  return jax.tree.map(draw, tree)


def leaves(tree) -> dict[str, np.ndarray]:
  """Leaves by the names on their paths."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
