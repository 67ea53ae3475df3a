"""One step directory: what is in it, and whether it is what was written.

    <step>/params/    parameters                     (Orbax)
    <step>/trainer/   step, optimiser                (Orbax)
    <step>/data/      data iterator, a file a shard  (JSON)
    <step>/meta/      shapes, checksums, settings    (JSON)

Nothing in it depends on the number of processes, or on the mesh: any other
layout can read it.

Arrays carry checksums of their values (in `meta`), JSON files one of their
text: what is read back is what was written, or an error names the part.
"""

import contextlib
import gc
import hashlib
import json
import logging
import pathlib
import sys
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from orbax.checkpoint._src.futures import synchronization  # the only way to it

from m2.checkpoint import fingerprint
from m2.parallel import hosts, sharding

FORMAT = 'm2-jax checkpoint 2'
_WHOLE = 'value'  # file of a value that is not split
_CHUNK = 2**26  # bytes of the embedding or the head that lie together
_WORTH_A_PROGRAM = 2**22  # bytes of a part that one of several devices writes
_LISTED = 5  # mismatches that an error spells out


class CheckpointError(Exception):
  """A checkpoint is missing, foreign, corrupt or could not be written."""


class _NotOrbax(logging.Filter):
  """Drops what Orbax logs: failures come back as exceptions, one line each."""

  def filter(self, record: logging.LogRecord) -> bool:
    """False for a record whose caller is in Orbax."""
    return '/orbax/' not in record.pathname


logging.getLogger('absl').addFilter(_NotOrbax())


class Json:
  """JSON values as an Orbax checkpointable, one checked file for each.

  Takes a dict, written by process 0 as one value; or what has `get_state` and
  `set_state`. The entries of such a state become files of their own, written
  by every process that has them: they are the same there. Reading, a process
  takes those whose names its own state has.
  """

  def __init__(self, item: Any):
    self.item = item

  async def save(self, directory: Any) -> Awaitable[None]:
    """Takes the state now; the returned awaitable writes it."""
    if not isinstance(self.item, dict):
      values = self.item.get_state()
    else:
      values = {_WHOLE: self.item} if jax.process_index() == 0 else {}
    texts = {name: json.dumps(value) for name, value in values.items()}
    return self._write(directory, texts)

  async def _write(self, directory: Any, texts: dict[str, str]) -> None:
    folder = await directory.await_creation()
    for name, body in texts.items():
      (folder / f'{name}.json').write_text(f'{digest(body)}\n{body}\n')

  async def load(self, directory: Any) -> Awaitable[None]:
    """The returned awaitable reads the state and sets it."""
    return self._read(directory)

  async def _read(self, directory: Any) -> None:
    if isinstance(self.item, dict):
      self.item.update(_read_json(directory / f'{_WHOLE}.json'))
      return
    names = self.item.get_state()
    self.item.set_state(
      {name: _read_json(directory / f'{name}.json') for name in names}
    )


def _read_json(path: Any) -> Any:
  if not path.exists():
    raise CheckpointError(f'{path} is missing')
  said, _, body = path.read_bytes().decode(errors='replace').partition('\n')
  body = body.removesuffix('\n')
  if said != digest(body):
    raise CheckpointError(f'{path} is corrupt: not what its checksum says')
  return json.loads(body)


def digest(body: str) -> str:
  """Checksum of a JSON file's text."""
  return hashlib.sha256(body.encode()).hexdigest()


def contents(
  state: Any, data_iter: Any | None, *, step: int, extra: dict[str, Any]
) -> dict[str, Any]:
  """Checkpointables of one step; waits for the arrays, to sum them up."""
  tree = nested(state)
  meta = {'format': FORMAT, 'step': step, 'extra': extra}
  meta['leaves'] = describe(tree, fingerprint.sums(tree))
  items = {'meta': Json(meta), 'params': tree.pop('params')}
  if tree:
    items['trainer'] = tree
  if data_iter is not None:
    items['data'] = Json(data_iter)
  return items


def options() -> ocp.Context:
  """How parameters are written: in chunks of one layer's, or expert's, matrix.

  Orbax would make one chunk of all that a device holds of a leaf, and nobody
  could read a matrix without the rest. What devices hold alike is written by
  all of them, a part each, if a part is large: each is cut by its own program.
  """
  context = ocp.Context()
  saving = context.array.saving
  saving.scoped_storage_options_creator = _storage
  saving.min_slice_bytes_for_replica_parallel = _WORTH_A_PROGRAM
  return context


def _storage(key: tuple, _: Any) -> Any:
  name = sharding.name_of(key)
  options = ocp.options.ArrayOptions.Saving.StorageOptions
  if name in ('embed', 'head'):
    return options(chunk_byte_size=_CHUNK)
  if name.split('/')[0] in ('blocks', 'mtp'):
    return options(shard_axes=tuple(range(sharding.stacked(name))))
  return None  # of the trainer


def read_meta(path: str | pathlib.Path) -> dict[str, Any]:
  """Format, step, leaves and extra of a step directory, without any array.

  Raises:
    CheckpointError: it is not one of ours, or its metadata is corrupt.
  """
  path = pathlib.Path(path)
  if not (path / 'meta').is_dir():
    raise CheckpointError(f'{path} is not a checkpoint of this code: no meta/')
  meta: dict[str, Any] = {}
  load(path, {'meta': Json(meta)})
  if meta.get('format') != FORMAT:
    raise CheckpointError(
      f'{path} has format {meta.get("format")!r}; this code reads {FORMAT!r}'
    )
  return meta


def load(path: pathlib.Path, items: dict[str, Any]) -> dict[str, Any]:
  """Reads `items` of a step directory: abstract trees, or `Json`.

  Raises:
    CheckpointError: one is absent or cannot be read.
  """
  for name in items:
    if not (path / name).is_dir():
      raise CheckpointError(f'{path} holds no {name}/')
  with quiet(), _alone():
    try:
      return ocp.load_checkpointables(path, items)
    except Exception as error:  # Orbax and TensorStore raise many kinds
      reason = _reason(path, items, error)
      traceback.clear_frames(error.__traceback__)
    # Only now is nothing of the error left to hold abandoned coroutines: they
    # complain here, not later.
    gc.collect()
  raise CheckpointError(reason)


def _reason(path: pathlib.Path, items: dict[str, Any], error: Exception) -> str:
  inner = root(error)
  if isinstance(inner, CheckpointError):
    return str(inner)
  names = ' or '.join(items)
  return f'{path} is corrupt: {names} cannot be read: {summary(error)}'


def _alone() -> ocp.Context:
  """Reading without the other processes, each its own part.

  Orbax would have them wait for one that could not read, and for minutes.
  """
  context, own = ocp.Context(), jax.process_index()
  context.multiprocessing.primary_host = own
  context.multiprocessing.active_processes = {own}
  context.multiprocessing.barrier_sync_key_prefix = f'host{own}'
  return context


def together[T](path: pathlib.Path, read: Callable[[], T]) -> T:
  """What `read` gives of `path`, unless it fails on some host.

  All hosts must call it at the same place.

  Args:
    path: of the checkpoint, for the error.
    read: calls `load`.

  Raises:
    CheckpointError: it failed here or elsewhere; on all hosts.
  """
  found, trouble = None, ''
  try:
    found = read()
  except CheckpointError as error:
    trouble = str(error)
    traceback.clear_frames(error.__traceback__)  # they may hold arrays
  said = [
    json.loads(text)
    for text in hosts.exchange(json.dumps([trouble, _operations()]))
  ]
  # Orbax names the meetings of a save by how many operations there were, and
  # whoever failed has begun fewer.
  while _operations() < max(count for _, count in said):
    synchronization.OperationIdGenerator.next_operation_id()
  if trouble:
    raise CheckpointError(trouble)
  others = [
    f'host {host}: {text}' for host, (text, _) in enumerate(said) if text
  ]
  if others:
    del found
    raise CheckpointError(f'{path}: {"; ".join(others)}')
  return found


def _operations() -> int:
  return int(synchronization.OperationIdGenerator.get_current_operation_id())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps Orbax from burying our one error under its abandoned coroutines."""
  hook, tasks = sys.unraisablehook, logging.getLogger('asyncio')
  sys.unraisablehook = lambda _: None
  tasks.disabled = True
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    sys.unraisablehook = hook
    tasks.disabled = False


def steps_in(folder: pathlib.Path) -> list[int]:
  """Steps with a complete checkpoint in `folder`, oldest first.

  What is being written has another name until it is complete.
  """
  entries = folder.iterdir() if folder.is_dir() else ()
  return sorted(
    int(entry.name)
    for entry in entries
    if entry.name.isdecimal() and entry.is_dir()
  )


def folders(path: str | pathlib.Path) -> list[pathlib.Path]:
  """Where files may lie that belong to the weights at `path`.

  There, and in the workdir if it is `<workdir>/checkpoints` or a step in it.
  """
  path = pathlib.Path(path).resolve()
  found = [path]
  if path.name == 'checkpoints':
    found.append(path.parent)
  if path.name.isdecimal():
    found.append(path.parents[1])
  return found


def beside(path: str | pathlib.Path, name: str) -> pathlib.Path | None:
  """The file `name` that belongs to the weights at `path`, if there is one."""
  files = (folder / name for folder in folders(path))
  return next((file for file in files if file.is_file()), None)


def newest(path: str | pathlib.Path) -> pathlib.Path:
  """The newest step directory of a workdir, checkpoint or step directory.

  Raises:
    CheckpointError: there is none.
  """
  path = pathlib.Path(path)
  if (path / 'meta').is_dir():
    return path
  for parent in (path / 'checkpoints', path):
    if steps := steps_in(parent):
      return parent / str(steps[-1])
  raise CheckpointError(
    f'{path} holds no checkpoint: expected <step>/ or checkpoints/<step>/ '
    'directories, or the *.safetensors of a Hugging Face model'
  )


def leaves(tree: Any) -> list[tuple[str, Any]]:
  """Names and leaves, in flattening order."""
  named = jax.tree.leaves_with_path(tree)
  return [(sharding.name_of(key), leaf) for key, leaf in named]


def nested(state: Any) -> dict[str, Any]:
  """Any pytree as nested dicts by the names on its paths; no empty nodes."""
  out: dict[str, Any] = {}
  for name, leaf in leaves(state):
    *parents, last = name.split('/')
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return out


def describe(tree: Any, sums: list[int] | None = None) -> dict[str, dict]:
  """Shape, dtype and, if given, checksum of every leaf, by name."""
  described = {}
  for index, (name, leaf) in enumerate(leaves(tree)):
    described[name] = {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
    if sums is not None:
      described[name]['sum'] = sums[index]
  return described


def check_leaves(path: pathlib.Path, saved: dict, wanted: dict) -> None:
  """Raises `CheckpointError` unless the saved leaves are the wanted ones."""
  errors = [f'{name}: not in the checkpoint' for name in wanted.keys() - saved]
  errors += [f'{name}: not in the model' for name in saved.keys() - wanted]
  for name in wanted.keys() & saved.keys():
    for what in ('shape', 'dtype'):
      if saved[name][what] != wanted[name][what]:
        errors.append(
          f'{name}: {what} {saved[name][what]}, wanted {wanted[name][what]}'
        )
  if errors:
    more = f' and {len(errors) - _LISTED} more' * (len(errors) > _LISTED)
    listed = '; '.join(sorted(errors)[:_LISTED])
    raise CheckpointError(f'{path} is of another model: {listed}{more}')


def of_params(meta: dict[str, Any]) -> dict[str, dict]:
  """What `meta` says of the parameters, by name."""
  return {
    name: leaf
    for name, leaf in meta['leaves'].items()
    if name.startswith('params/')
  }


def check_loaded(path: pathlib.Path, saved: dict, loaded: Any) -> None:
  """Raises `CheckpointError` if a value is not the one that was written."""
  names = [name for name, _ in leaves(loaded)]
  check_sums(path, saved, dict(zip(names, fingerprint.sums(loaded))))


def check_sums(path: pathlib.Path, saved: dict, found: dict[str, int]) -> None:
  """The same of checksums by name."""
  for name, value in found.items():
    if saved[name]['sum'] != value:
      raise CheckpointError(
        f'{path} is corrupt: {name} is not what its checksum says'
      )


def root(error: BaseException) -> BaseException:
  """The error that the chain of `raise ... from` began with."""
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def summary(error: BaseException) -> str:
  """The first line of the error that caused `error`, its middle cut out.

  TensorStore names the file first and says what is wrong with it last.
  """
  line = (str(root(error)).strip().splitlines() or [''])[0]
  return line if len(line) <= 200 else f'{line[:60]} ... {line[-120:]}'
