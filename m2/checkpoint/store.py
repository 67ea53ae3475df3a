"""Checkpoints of a run: everything in one atomic step directory.

A step directory (m2/checkpoint/directory.py) gets its name only when it is
complete, so a kill at any moment leaves either the whole checkpoint or none.
`Store` writes and resumes a run; `load_params` reads weights alone.
"""

import contextlib
import dataclasses
import fcntl
import glob
import json
import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint.experimental.v1 as ocp

from m2 import config
from m2.checkpoint import directory as layout
from m2.checkpoint import hf, storage
from m2.model import mtp
from m2.model import params as model_params
from m2.parallel import hosts, sharding

CheckpointError = layout.CheckpointError
newest, read_meta, folders = layout.newest, layout.read_meta, layout.folders
beside, steps_in = layout.beside, layout.steps_in
# Fields that change what given weights compute, without changing any shape.
_MEANING = (
  'top_k',
  'min_k',
  'min_share',
  'rotary_dim',
  'rope_theta',
  'norm_eps',
)


class Restored(NamedTuple):
  """What `Store.restore` returns: the state, its step, the caller's extra."""

  state: Any
  step: int
  extra: dict[str, Any]


class Store:
  """Writes and reads the checkpoints of one run; a context manager.

  Attributes:
    directory: where the step directories are.
  """

  def __init__(self, directory: str | pathlib.Path, keep: int = 2):
    """Opens a directory, and clears away what a killed save left there.

    Args:
      directory: made if absent.
      keep: newest checkpoints to keep.

    Raises:
      CheckpointError: another process has it open, or its path holds `*`, `?`
        or `[...]`, which Orbax reads as a pattern: it would save no values.
    """
    self.directory = pathlib.Path(directory).resolve()
    if glob.has_magic(str(self.directory)):
      raise CheckpointError(
        f'{self.directory}: checkpoints cannot be saved below a name with *, ? '
        'or [...]; rename it, or give another --workdir'
      )
    self.directory.mkdir(parents=True, exist_ok=True)
    self._lock = _take_lock(self.directory / '.lock')
    with layout.quiet():
      self._manager = ocp.training.Checkpointer(
        self.directory,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
      )
    self._pending: tuple[int, Any] | None = None
    self._reported: tuple[type[Exception], ...] = ()

  def __enter__(self) -> 'Store':
    """Gives the store itself."""
    return self

  def __exit__(self, *_) -> None:
    """Closes it."""
    self.close()

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint on disk, oldest first."""
    return layout.steps_in(self.directory)

  def agreed_steps(self) -> list[int]:
    """The same as process 0 sees it; all processes must ask."""
    return json.loads(hosts.exchange(json.dumps(self.steps()))[0])

  def save(
    self,
    state: Any,
    data_iter: Any | None,
    *,
    step: int,
    extra: dict[str, Any],
    asynchronous: bool = True,
  ) -> None:
    """Saves one checkpoint; an existing one of this step is replaced.

    Args:
      state: pytree of arrays whose `params` are the parameters.
      data_iter: iterator with `get_state` and `set_state`, or None.
      step: names the checkpoint.
      extra: JSON-able; given back by `restore`. `extra['config']['model']`,
        if there, lets `load_params` refuse a model that computes otherwise.
      asynchronous: return once the values are copied; the next call to `save`,
        `wait` or `close` reports a failure.

    Raises:
      CheckpointError: this save, or the one before, failed; older checkpoints
        are untouched.
    """
    self.wait()
    items = layout.contents(state, data_iter, step=step, extra=extra)
    try:
      with layout.options():
        response = self._manager.save_checkpointables_async(
          step, items, force=True, overwrite=step in self.steps()
        )
    except Exception as error:  # whatever the file system made of it
      raise self._failed(step, error) from error
    self._pending = (step, response)
    if not asynchronous:
      self.wait()

  def wait(self) -> None:
    """Waits until the last save is on disk.

    Raises:
      CheckpointError: it failed.
    """
    if self._pending is None:
      return
    (step, response), self._pending = self._pending, None
    try:
      response.result()
    except Exception as error:  # whatever the file system made of it
      raise self._failed(step, error) from error

  def close(self) -> None:
    """Waits for the last save, then releases threads and lock."""
    try:
      self.wait()
    finally:
      # After a failed save, which was reported, it would raise that again.
      with contextlib.suppress(*self._reported):
        self._manager.close()
      self._lock.close()

  def _failed(self, step: int, error: Exception) -> CheckpointError:
    self._reported = (Exception,)
    kept = [str(found) for found in self.steps() if found != step]
    return CheckpointError(
      f'checkpoint {step} could not be written to {self.directory}: '
      f'{layout.summary(error)}. Complete checkpoints there: '
      f'{", ".join(kept) or "none"}. Free space or make it writable, and run '
      'again to resume'
    )

  def restore(
    self,
    abstract_state: Any,
    data_iter: Any | None,
    step: int | None = None,
    on_corrupt: str = 'error',
  ) -> Restored:
    """Reads a checkpoint onto the shardings of `abstract_state`.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.
      data_iter: iterator to move to the saved position, or None.
      step: which one; None = the newest.
      on_corrupt: 'previous' tries older ones where the newest is broken, and
        prints a line for each one it skips; 'error' does not. Several
        processes decide as one: what any of them finds broken is for all.

    Raises:
      CheckpointError: nothing there, or it is foreign, corrupt or of another
        model; names the directory and the reason.
    """
    steps = self.agreed_steps()[::-1] if step is None else [step]
    if not steps:
      raise CheckpointError(f'{self.directory} has no checkpoint')
    older = steps[1:] if on_corrupt == 'previous' else []
    path = self.directory / str(steps[0])
    for candidate in older:
      try:
        return _restore(path, abstract_state, data_iter)
      except CheckpointError as error:
        hosts.say(f'checkpoint skipped: {error}')
        path = self.directory / str(candidate)
    return _restore(path, abstract_state, data_iter)


def _take_lock(path: pathlib.Path) -> Any:
  """Holds `path` for this process; the kernel lets go when it ends."""
  lock = path.open('a')
  if jax.process_index() == 0:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      lock.close()
      raise CheckpointError(
        f'{path.parent} is in use by another process; give each run its own '
        '--workdir'
      ) from None
  return lock


def _restore(path: pathlib.Path, abstract: Any, data_iter: Any) -> Restored:
  meta, loaded = layout.together(path, lambda: _read(path, abstract, data_iter))
  layout.check_loaded(path, meta['leaves'], loaded)
  values = dict(layout.leaves(loaded))
  state = jax.tree_util.tree_map_with_path(
    lambda key, _: values[sharding.name_of(key)], abstract
  )
  return Restored(state, meta['step'], meta['extra'])


def _read(
  path: pathlib.Path, abstract: Any, data_iter: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What the checkpoint says of itself, and its arrays; moves the iterator."""
  meta = layout.read_meta(path)
  tree = layout.nested(abstract)
  layout.check_leaves(path, meta['leaves'], layout.describe(tree))
  items = {'params': tree.pop('params')}
  if tree:
    items['trainer'] = tree
  loaded = layout.load(path, items)
  if data_iter is not None:
    layout.load(path, {'data': layout.Json(data_iter)})
  return meta, {'params': loaded['params']} | loaded.get('trainer', {})


def load_params(
  path: str | pathlib.Path,
  cfg: config.ModelConfig,
  mesh: jax.sharding.Mesh | None = None,
) -> Any:
  """Parameters alone, to start from or to run.

  Args:
    path: a workdir, a directory of checkpoints, one step of it, or a Hugging
      Face model directory, which may be the URL of one in an object store.
    cfg: shape and stored type wanted. MTP modules that the checkpoint lacks
      are made by `m2.model.mtp.expand`; 0 leaves out those it has. With
      `fp8_experts`, those of an FP8 checkpoint are kept byte for byte and never
      held otherwise; those of another are loaded whole, then quantised.
    mesh: where to put them; None = the first device.

  Raises:
    CheckpointError: nothing usable there, or it is of another model.
    ValueError: a Hugging Face model that does not fit (`m2.checkpoint.hf`), or
      fewer MTP modules wanted than there are.
  """
  public = storage.is_url(path)
  if not public:
    path = pathlib.Path(path)
    if not path.is_dir():
      raise CheckpointError(f'{path} is not a directory')
    public = any(path.glob('*.safetensors'))
  if cfg.fp8_experts and not (public and hf.holds_codes(path)):
    plain = load_params(path, dataclasses.replace(cfg, fp8_experts=False), mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, _placed(cfg, mesh))
    return jax.jit(model_params.quantise, out_shardings=where)(plain)
  if public:
    modules = hf.config(path).mtp_modules
    found = dataclasses.replace(cfg, mtp_modules=modules)
    return _fit_modules(cfg, mesh, modules, hf.load(path, found, mesh))
  path = layout.newest(path)
  saved, wanted, loaded = layout.together(
    path, lambda: _read_params(path, cfg, mesh)
  )
  layout.check_loaded(path, saved, loaded)
  params = jax.tree.map(lambda x, to: x.astype(to.dtype), loaded, wanted)
  return _fit_modules(cfg, mesh, _modules(saved), params['params'])


def _modules(saved: dict[str, dict]) -> int:
  """MTP modules of a checkpoint, from what it says of its parameters."""
  return saved.get('params/mtp/norm', {'shape': [0]})['shape'][0]


def _read_params(path: pathlib.Path, cfg, mesh) -> tuple[dict, dict, dict]:
  """What was saved of the parameters, what is wanted, and the arrays."""
  meta = layout.read_meta(path)
  _check_meaning(path, cfg, meta['extra'])
  saved = layout.of_params(meta)
  found = dataclasses.replace(cfg, mtp_modules=_modules(saved))
  wanted = {'params': _placed(found, mesh)}
  stored = jax.tree_util.tree_map_with_path(
    lambda key, leaf: _as_saved(leaf, saved.get(sharding.name_of(key))), wanted
  )
  layout.check_leaves(path, saved, layout.describe(stored))
  return saved, wanted, layout.load(path, stored)


def _as_saved(leaf: jax.ShapeDtypeStruct, saved: dict | None) -> Any:
  """Read in the stored type, so that checksums hold; the cast comes after."""
  return leaf.update(dtype=saved['dtype']) if saved else leaf


def _placed(cfg: config.ModelConfig, mesh: jax.sharding.Mesh | None) -> Any:
  """Shapes of the parameters with the shardings they are to have."""
  shapes = model_params.abstract(cfg)
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: one, shapes)
  else:
    where = sharding.param_shardings(shapes, mesh)
  return jax.tree.map(lambda leaf, at: leaf.update(sharding=at), shapes, where)


def _fit_modules(cfg, mesh, present: int, params: Any) -> Any:
  """Fits the MTP modules to `cfg`: none wanted, or more than there are."""
  if cfg.mtp_modules == present:
    return params
  if not cfg.mtp_modules:
    return {name: part for name, part in params.items() if name != 'mtp'}
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    params = mtp.expand(cfg, params)
  where = jax.tree.map(lambda leaf: leaf.sharding, _placed(cfg, mesh))
  return jax.device_put(params, where)


def _check_meaning(path: pathlib.Path, cfg, extra: dict[str, Any]) -> None:
  saved = extra.get('config', {}).get('model', {})
  differing = [
    f'model.{name} is {saved[name]} there and {getattr(cfg, name)} here'
    for name in _MEANING
    if name in saved and saved[name] != getattr(cfg, name)
  ]
  if differing:
    raise CheckpointError(f'{path} is of another model: {"; ".join(differing)}')
