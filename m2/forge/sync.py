"""From the trainer to the engine: weights and their version."""

from typing import Any

import jax
import jax.numpy as jnp

from m2.engine import engine as engines


@jax.jit
def copy(params: Any) -> Any:
  """The same values in buffers of their own, on the same devices.

  The trainer's next step reuses its buffers; the engine keeps these.
  """
  return jax.tree.map(jnp.copy, params)


def to_engine(params: Any, engine: engines.Engine, version: int) -> None:
  """Gives the engine a copy of `params`.

  Args:
    params: parameters on the mesh that both share.
    engine: takes them between two of its steps.
    version: number of updates that made them.

  Raises:
    ValueError: a version that is not newer than the engine's.
  """
  engine.load(copy(params), version)
