"""One of two hosts that read a checkpoint, in a process of its own.

Arguments: the folder, the coordinator's address and the host's number. Each
prints what it read where host 1 cannot read the newest one, and saves again.
"""

import pathlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp

from m2.checkpoint import directory, store
from m2.parallel import hosts
from tests.checkpoint import store_test

LOST = {'20'}  # steps whose parameters host 1 cannot read


def broken(path, items):
  """Stands for a disk that does not give a file."""
  if path.name in LOST and 'params' in items:
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
  data, found = store_test.Counter(), []
  with store.Store(folder, keep=2) as checkpoints:

    def save(step):
      data.at = step
      checkpoints.save(state, data, step=step, extra={}, asynchronous=False)

    def restore(on_corrupt):
      step = checkpoints.restore(abstract, data, None, on_corrupt).step
      found.append((step, data.at))

    save(10)
    save(20)
    restore('error')
    with mock.patch.object(directory, 'load', broken if index else load):
      restore('previous')
      save(30)  # its place among Orbax's operations is the same on both
      restore('error')
      LOST.add('30')
      try:
        restore('error')
      except store.CheckpointError as error:
        found.append(str(error))
  print(found, flush=True)


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 1)
  main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
