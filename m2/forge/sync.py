"""From the trainer to the engine: weights and their version."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2.checkpoint import directory, fingerprint
from m2.engine import engine as engines


class SyncError(Exception):
  """The engine does not hold the weights that it was given."""


@jax.jit
def copy(params: Any) -> Any:
  """The same values in buffers of their own, on the same devices.

  The trainer's next step reuses its buffers; the engine keeps these.
  """
  return jax.tree.map(jnp.copy, params)


def to_engine(params: Any, engine: engines.Engine, version: int) -> int:
  """Gives the engine a copy of `params`, and looks whether it has it.

  Args:
    params: parameters on the mesh that both share.
    engine: takes them between two of its steps.
    version: number of updates that made them.

  Returns:
    A checksum of `params`, in [0, 2^32), that depends on their values alone.

  Raises:
    ValueError: a version that is not newer than the engine's.
    SyncError: a leaf that the engine holds as it was given, which experts in
      FP8 are not, has other values there.
  """
  engine.load(copy(params), version)
  own, held = (dict(directory.leaves(x)) for x in (params, engine.params))
  both = [name for name in own if name in held]
  sums = dict(zip(own, fingerprint.sums([*own.values()])))
  for name, value in zip(both, fingerprint.sums([held[n] for n in both])):
    if value != sums[name]:
      raise SyncError(
        f'the engine was given the weights of version {version} and holds '
        f'other values of {name}: what it samples would not be theirs. The '
        'checkpoints are of the trainer, and sound; start again to go on'
      )
  return zlib.crc32(np.asarray([*sums.values()], np.uint32))
