"""The programs of a run, with the shapes they are compiled for.

What is here is what the loops compile: the same functions, jitted the same
way, given shapes with shardings on the topology's devices instead of arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m2 import config as settings
from m2.engine import engine as engines
from m2.engine import requests, slots
from m2.forge import step as rl_step
from m2.forge import tree as tree_lib
from m2.model import params as model_params
from m2.parallel import sharding
from m2.plan import counts, hlo, memory
from m2.train import loop as train
from m2.train import optim
from m2.train import state as train_state
from pallas_kernels.attention import blocks


@dataclasses.dataclass(frozen=True)
class Program:
  """A function and what it is compiled for.

  Attributes:
    name: train, rl, prefill, decode or sync.
    call: jitted.
    arguments: shapes with shardings.
    mesh: the devices.
    tokens: that one call of it processes, over all devices.
    keys: that the attention of a token goes over.
    training: whether it has a backward pass.
    memory: bytes of a device that follow from shapes; `work` is 0.
    expected: the collectives that the sharding asks for.
    logits: the share of tokens whose logits are computed.
    least: bytes that a device must receive at the very least, where the
      collectives are the compiler's choice.
    tiles: turns of the loop over FP8 experts that hold a token.
  """

  name: str
  call: Callable
  arguments: tuple[Any, ...]
  mesh: jax.sharding.Mesh
  tokens: int
  keys: int
  training: bool
  memory: memory.Memory
  expected: tuple[counts.Expected, ...]
  logits: float = 1.0
  least: float = 0.0
  tiles: float = 0.0

  def trips(self, loop: hlo.Instruction) -> float:
    """Turns of a loop that ends on a condition of the data, for full rows.

    Attention visits the blocks of keys before each block of queries; rounds
    for experts that are chosen too often do not happen; everything else, such
    as steps of decoding, is counted once.
    """
    _, local, path = loop.origin.partition('shard_map')
    if not local:
      return 1
    if self.tiles:
      return self.tiles
    nested = path.count('while') > 1
    return (self.keys / blocks.BLOCK + 1) / 2 if nested else 0


def train_program(
  config: settings.RunConfig, mesh: jax.sharding.Mesh
) -> Program:
  """The update of pretraining and fine-tuning."""
  model, cfg = config.model, config.optim
  optimizer = optim.make(cfg, config.steps)
  state = train_state.abstract(model, mesh, optimizer)
  rows, length = config.data.batch, config.data.length
  _check_rows('data.batch', rows, mesh, cfg.accumulate)
  dtypes = dict.fromkeys(('tokens', 'targets', 'positions', 'until'), jnp.int32)
  where = sharding.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)
    for name, dtype in {**dtypes, 'weights': jnp.float32}.items()
  }
  work = _work(mesh, model, rows // cfg.accumulate, length, cfg.accumulate)
  return Program(
    'train',
    train.compiled(config, optimizer)[0],
    (state, batch),
    mesh,
    rows * length,
    length,
    True,
    _training_memory(state, batch, work),
    tuple(counts.train(work)),
  )


def _check_rows(name: str, rows: int, mesh, parts: int = 1) -> None:
  """Refuses a setting that the devices, in `parts` turns, cannot share."""
  ways = parts * sharding.row_ways(mesh.shape)
  if rows % ways:
    turns = f' times optim.accumulate={parts}' if parts > 1 else ''
    raise ValueError(
      f'{name}={rows} is not a multiple of {ways}, the devices that rows are '
      f'split over (data * fsdp * expert){turns}: change it or the mesh'
    )


def _work(mesh, model, rows: int, length: int, parts: int = 1) -> counts.Work:
  kind = mesh.devices.flat[0].device_kind
  return counts.Work(model, dict(mesh.shape), rows, length, parts, kind)


def _training_memory(state, batch, work: counts.Work) -> memory.Memory:
  weights = memory.on_device(state.params)
  return memory.Memory(
    weights=weights,
    optimiser=memory.on_device(state.opt_state),
    batch=memory.on_device(batch),
    # Sums over microbatches exist beside the newest one's gradients.
    gradients=weights * (2 if work.parts > 1 else 1),
    residuals=memory.residuals(work),
  )


def rl_program(config: settings.RunConfig, mesh: jax.sharding.Mesh) -> Program:
  """The RL update, on one microbatch of full lines."""
  model, forge = config.model, config.forge
  optimizer = optim.make(config.optim, config.steps)
  state = train_state.abstract(model, mesh, optimizer)
  shape = forge.lines, forge.row_tokens
  _check_rows('forge.lines', forge.lines, mesh)
  everywhere = jax.sharding.NamedSharding(mesh, jax.P())
  lines = sharding.batch_sharding(mesh)

  def pairs(dtype):
    return jax.ShapeDtypeStruct((math.prod(shape),), dtype, sharding=everywhere)

  tree = tree_lib.TreeBatch(
    **{
      name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lines)
      for name in rl_step.LINES
    },
    **{name: pairs(jnp.int32) for name in ('edge_Z', 'token_Z', 'version_Z')},
    **{
      name: pairs(jnp.float32)
      for name in ('old_logp_Z', 'advantage_Z', 'weight_Z')
    },
    total=jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
  )
  work = _work(mesh, model, *shape)
  held = _training_memory(state, tree, work)
  return Program(
    'rl',
    jax.jit(
      functools.partial(
        rl_step.rl_step, model=model, optimizer=optimizer, cfg=config
      ),
      donate_argnums=0,
    ),
    (state, tree),
    mesh,
    math.prod(shape),
    forge.row_tokens,
    True,
    # The loop over lines sums gradients: the sum and the newest exist at once.
    dataclasses.replace(held, gradients=2 * held.gradients),
    tuple(counts.rl(work)),
  )


def rollout_params(model: settings.ModelConfig, mesh: jax.sharding.Mesh) -> Any:
  """Shapes of the engine's parameters, in its compute dtype."""
  shapes = model_params.abstract(model)
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    sharding.param_shardings(shapes, mesh),
  )


def _slots(config: settings.RunConfig, mesh: jax.sharding.Mesh) -> slots.Slots:
  """Shapes of the engine's state; shardings are part of their types."""
  engine = config.engine
  _check_rows('engine.slots', engine.slots, mesh)
  make = functools.partial(
    slots.empty, config.model, engine.slots, engine.length
  )
  with jax.set_mesh(mesh):
    state = jax.eval_shape(make)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=jax.sharding.NamedSharding(mesh, leaf.sharding.spec),
    ),
    state,
  )


def decode_program(
  config: settings.RunConfig, mesh: jax.sharding.Mesh
) -> Program:
  """One token of every slot, at the full length of the cache."""
  model, engine = memory.served_model(config), config.engine
  weights, state = rollout_params(model, mesh), _slots(config, mesh)
  run = jax.jit(slots.decode, static_argnums=(0, 1, 2, 3), donate_argnums=5)
  work = _work(mesh, model, engine.slots, 1)
  return Program(
    'decode',
    run,
    (model, engine.length, engine.chunk, False, weights, state),
    mesh,
    engine.slots,
    engine.length,
    False,
    _serving_memory(weights, state),
    tuple(counts.forward(work, logits=engine.slots)),
    tiles=_tiles(work),
  )


def _tiles(work: counts.Work) -> float:
  """Experts of a device that some token chose, if all are as likely."""
  cfg, ways = work.cfg, work.mesh['expert']
  chosen = round(work.tokens * ways * cfg.top_k)
  return cfg.experts / ways * (1 - (1 - 1 / cfg.experts) ** chosen)


def prefill_program(
  config: settings.RunConfig, mesh: jax.sharding.Mesh
) -> Program:
  """One turn of `engine.PREFILL` tokens of a full batch of prompts."""
  model, engine = memory.served_model(config), config.engine
  weights, state = rollout_params(model, mesh), _slots(config, mesh)
  ways = sharding.row_ways(mesh.shape)
  rows = engines.prefill_rows(engine, ways, engine.prompts)
  where = jax.sharding.NamedSharding(mesh, jax.P())

  def host(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  count = engine.slots
  admission = slots.Admission(
    tokens_RT=host(rows, engine.length),
    size_R=host(rows),
    origin_R=host(rows),
    keep_R=host(rows),
    source_A=host(count),
    slot_A=host(count),
    left_A=host(count),
    seed_A2=host(count, 2, dtype=jnp.uint32),
    temperature_A=host(count, dtype=jnp.float32),
    top_p_A=host(count, dtype=jnp.float32),
    top_k_A=host(count),
    stop_AI=host(count, requests.STOP_IDS),
  )
  run = jax.jit(slots.prefill, static_argnums=(0, 1, 2, 3), donate_argnums=5)
  work = _work(mesh, model, rows, engines.PREFILL)
  held = _serving_memory(weights, state)
  return Program(
    'prefill',
    run,
    (
      model, engine.length, engines.PREFILL, False, weights, state, admission,
    ),
    mesh,
    rows * engines.PREFILL,
    engine.length,
    False,
    dataclasses.replace(held, batch=held.batch + memory.on_device(admission)),
    tuple(counts.forward(work, logits=count, entries=engine.length)),
    count / (rows * engines.PREFILL),
    tiles=_tiles(work),
  )  # fmt: skip


def sync_program(
  config: settings.RunConfig,
  mesh: jax.sharding.Mesh,
  target: jax.sharding.Mesh,
) -> Program:
  """From the trainer's weights to the engine's: cast, then moved.

  Both meshes are of the same devices in the same order.
  """
  # Automatic axes: one program, two meshes.
  source, target = (
    jax.sharding.Mesh(mesh.devices.reshape(m.devices.shape), m.axis_names)
    for m in (mesh, target)
  )
  trained = rollout_params(config.model, source)
  served = rollout_params(
    dataclasses.replace(config.model, param_dtype=config.model.dtype), target
  )
  dtypes = jax.tree.map(lambda leaf: leaf.dtype, served)
  call = jax.jit(
    lambda params: jax.tree.map(lambda x, d: x.astype(d), params, dtypes),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, served),
  )
  return Program(
    'sync',
    call,
    (trained,),
    source,
    0,
    0,
    False,
    memory.Memory(
      weights=memory.on_device(trained), cache=0, batch=memory.on_device(served)
    ),
    (),
    least=moved(trained, served),
  )


def moved(source: Any, target: Any) -> float:
  """Bytes that a device must receive, the mean: what it lacks of its part."""
  total, count = 0, 0
  for old, new in zip(jax.tree.leaves(source), jax.tree.leaves(target)):
    held = old.sharding.devices_indices_map(old.shape)
    wanted = new.sharding.devices_indices_map(new.shape)
    count = len(wanted)
    itemsize = jnp.dtype(new.dtype).itemsize
    for device, want in wanted.items():
      part = common = 1
      for size, a, b in zip(new.shape, want, held[device]):
        first, last, _ = a.indices(size)
        start, stop, _ = b.indices(size)
        part *= last - first
        common *= max(0, min(last, stop) - max(first, start))
      total += (part - common) * itemsize
  return total / count


def _serving_memory(weights, state: slots.Slots) -> memory.Memory:
  cache = memory.on_device((state.cache.k_LBSKH, state.cache.v_LBSKH))
  return memory.Memory(
    weights=memory.on_device(weights),
    cache=cache,
    batch=memory.on_device(state) - cache,
  )


PROGRAMS: Mapping[str, Callable[..., Program]] = {
  'train': train_program,
  'rl': rl_program,
  'prefill': prefill_program,
  'decode': decode_program,
}
