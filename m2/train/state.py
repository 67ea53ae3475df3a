"""What training carries from step to step, and where it lives."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from m2 import config
from m2.model import params as model_params
from m2.parallel import sharding


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and writes.

  Attributes:
    step: int32 scalar, updates done so far.
    params: parameters; the router bias is one of them.
    opt_state: moments and counters of the optimiser.
  """

  step: jax.Array
  params: Any
  opt_state: Any


def wrap(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """A state at step 0 around given parameters."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
  )


def create(
  cfg: config.ModelConfig,
  key: jax.Array,
  mesh: jax.sharding.Mesh,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """A state at step 0 with random parameters, placed on `mesh`."""
  return start(model_params.init(cfg, key, mesh), mesh, optimizer)


def start(
  params: Any,
  mesh: jax.sharding.Mesh,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """A state at step 0 around given parameters, moments made on `mesh`."""
  shapes = jax.tree.map(lambda leaf: _placed(leaf, leaf.sharding), params)
  where = jax.tree.map(
    lambda leaf: leaf.sharding, _abstract(shapes, mesh, optimizer)
  )
  with jax.set_mesh(mesh):
    make = functools.partial(wrap, optimizer=optimizer)
    return jax.jit(make, out_shardings=where)(params)


def abstract(
  cfg: config.ModelConfig,
  mesh: jax.sharding.Mesh,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """Shapes, dtypes and shardings of a state, without allocating anything."""
  shapes = model_params.abstract(cfg)
  shardings = sharding.param_shardings(shapes, mesh)
  return _abstract(jax.tree.map(_placed, shapes, shardings), mesh, optimizer)


def _abstract(shapes: Any, mesh: jax.sharding.Mesh, optimizer: Any) -> Any:
  """Moments are sharded like their parameters.

  Under explicit axes the sharding is part of the type, so that tracing the
  optimiser's `init` infers it.
  """
  with jax.set_mesh(mesh):
    state = jax.eval_shape(functools.partial(wrap, optimizer=optimizer), shapes)
  return jax.tree.map(functools.partial(_concrete, mesh=mesh), state)


def _concrete(leaf: Any, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
  # What depends on no parameter (counters) has no sharding: on every device.
  everywhere = jax.P(*(None for _ in leaf.shape))
  spec = leaf.sharding.spec if leaf.sharding else everywhere
  return _placed(leaf, jax.sharding.NamedSharding(mesh, spec))


def _placed(leaf: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
