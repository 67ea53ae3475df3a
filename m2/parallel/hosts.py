"""The processes of one run: joining them, naming them, what they tell another.

A run is one process on every host, each with the devices of its host. They
meet in jax's coordination service, which process 0 serves; it also keeps a few
small texts for them (`post`, `posted`), which needs no devices and so works
while a device hangs. Alone, a process needs none of this and all of it works.
"""

import itertools
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the only way to the key-value store

_FAILED = 'm2/failed'
_MEETING_MS = 1_800_000  # the longest compilation, and more
_exchanges = itertools.count()  # the same on all hosts


def join(
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
) -> int:
  """Joins the run, before the first use of a device; this process's number.

  Args:
    coordinator: HOST:PORT of process 0. None = all three are found by jax.
    count: processes of the run.
    index: number of this one.
  """
  jax.distributed.initialize(coordinator, count, index)
  return jax.process_index()


def name() -> str:
  """This process in words: `host 1 of 2 (node7)`."""
  return (
    f'host {jax.process_index()} of {jax.process_count()} '
    f'({socket.gethostname()})'
  )


def say(text: str) -> None:
  """Prints a line; with several processes, behind the number of this one."""
  rank = f'[{jax.process_index()}] ' if jax.process_count() > 1 else ''
  print(f'{rank}{text}', flush=True)


def anywhere(flag: bool, mesh: jax.sharding.Mesh) -> Any:
  """Whether `flag` is true on some host: the same answer on all of them.

  All hosts must call it at the same place. With several, the answer is a bool
  that a device is still computing: it costs one tiny all-reduce, and reading
  it waits for what was dispatched before.
  """
  if jax.process_count() == 1:
    return flag
  spread = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
  flags_D = jax.make_array_from_callback(
    (mesh.size,), spread, lambda _: np.full(1, flag)
  )
  return _any(flags_D)


@jax.jit
def _any(flags_D: jax.Array) -> jax.Array:
  return flags_D.any()


def meet(label: str) -> None:
  """Waits until all processes are here, without the devices.

  Before a program runs for the first time: they may take different times to
  compile it, and collectives on CPU give up after half a minute.

  Args:
    label: names the meeting; once a run.
  """
  if store := distributed.global_state.client:
    store.wait_at_barrier(f'm2/{label}', _MEETING_MS)


def exchange(text: str) -> list[str]:
  """What every process says at the same place, by its number; all wait."""
  if jax.process_count() == 1:
    return [text]
  label = f'exchange/{next(_exchanges)}'
  post(f'm2/{label}/{jax.process_index()}', text)
  meet(label)
  said = posted(f'm2/{label}')
  return [said[str(index)] for index in range(jax.process_count())]


def first[T](label: str, make: Callable[[], T]) -> T:
  """Calls `make` on process 0, then on the others: they find what it wrote.

  Args:
    label: names the meeting between the two; once a run.
    make: what to call.
  """
  if jax.process_index() == 0:
    made = make()
    meet(label)
    return made
  meet(label)
  return make()


def post(key: str, value: str) -> None:
  """Leaves a text for the other processes; replaces an older one."""
  if store := distributed.global_state.client:
    store.key_value_set(key, value, allow_overwrite=True)


def posted(folder: str) -> dict[str, str]:
  """The texts under `folder`, by the last part of their keys."""
  store = distributed.global_state.client
  found = store.key_value_dir_get(folder) if store else ()
  return {key.rsplit('/', 1)[1]: value for key, value in found}


def failures() -> list[str]:
  """What other processes said when they failed."""
  own = str(jax.process_index())
  found = posted(_FAILED)
  return [text for index, text in sorted(found.items()) if index != own]


def leave(reason: str, code: int) -> None:
  """Ends this process after a failure and tells the others why, if any.

  Without the farewell that jax has for them: it would wait minutes for hosts
  that wait for this one.
  """
  if distributed.global_state.client is None:
    return
  try:
    post(f'{_FAILED}/{jax.process_index()}', reason)
  except jax.errors.JaxRuntimeError:
    pass  # process 0 is gone: nobody is left to read it
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
