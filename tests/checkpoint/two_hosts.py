"""One of two hosts that read a checkpoint, in a process of its own.

Arguments: the folder, the coordinator's address and the host's number. Each
prints what it read where host 1 cannot read the newest one.
"""

import pathlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp

from m2.checkpoint import directory, store
from m2.parallel import hosts


def broken(path, items):
  """Stands for a file that this host's disk does not give."""
  if path.name == '20' and 'params' in items:
    raise store.CheckpointError(f'{path} is corrupt: params cannot be read')
  return load(path, items)


load = directory.load


def main(folder: pathlib.Path, address: str, index: int) -> None:
  hosts.join(address, 2, index)
  spread = jax.NamedSharding(jax.make_mesh((2,), ('data',)), jax.P('data'))
  values = jax.device_put(jnp.arange(6.0), spread)
  state = {'params': {'w': values}}
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), state
  )
  with store.Store(folder, keep=2) as checkpoints:
    for step in 10, 20:
      checkpoints.save(state, None, step=step, extra={}, asynchronous=False)
    found = [checkpoints.restore(abstract, None).step]
    with mock.patch.object(directory, 'load', broken if index else load):
      found.append(checkpoints.restore(abstract, None, None, 'previous').step)
      try:
        checkpoints.restore(abstract, None)
      except store.CheckpointError as error:
        found.append(str(error))
  print(found, flush=True)


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 1)
  main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
