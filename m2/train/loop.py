"""Pretraining and fine-tuning: data, steps, metrics, checkpoints.

The two differ by their data only. A run continues from the newest checkpoint
of its work directory, to the bit: whatever a step depends on is in the
checkpoint or follows from the config and the number of the step.
"""

import functools
import math
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from m2 import config as settings
from m2.checkpoint import store
from m2.data import pipeline, sources
from m2.parallel import context, hosts, sharding
from m2.parallel import mesh as meshes
from m2.train import guard as guards
from m2.train import journal, optim, resume, signals, watchdog
from m2.train import state as train_state
from m2.train import step as train


def run(
  config: settings.RunConfig,
  workdir: pathlib.Path,
  source: sources.Source | None = None,
) -> train_state.TrainState:
  """Trains until `config.steps`; a finished run only returns its state.

  Args:
    config: frozen settings, of mode `pretrain` or `sft`.
    workdir: checkpoints, metrics and tokenizer; made if absent.
    source: rows to train on instead of the configured source; this is how the
      `sft` mode gives its demonstrations.

  Returns:
    The state after the last step, on the mesh.

  Raises:
    m2.train.journal.TrainingError: a loss or gradient is not finite, or a loss
      is a spike, and the guard does not go back.
    m2.train.signals.Stopped: a signal asked for it; the last step is saved.
    m2.checkpoint.store.CheckpointError: a checkpoint cannot be read or
      written; those that are complete stay.
    ValueError: settings that do not fit the data, the devices, or the run that
      `workdir` holds.
  """
  mesh = meshes.make_mesh(config.mesh)
  _check(config, mesh)
  source = pipeline.open_source(config.data, source)
  optimizer = optim.make(config.optim, config.steps)
  folder = workdir / 'checkpoints'
  with (
    jax.set_mesh(mesh),
    signals.Signals() as asked,
    watchdog.Watchdog(config.guard.stall) as watch,
    store.Store(folder, config.checkpoint.keep) as checkpoints,
  ):
    resumed = resume.begun(checkpoints)
    batches, note = _data(config, mesh, workdir, source, resumed)
    begun = resume.begin(config, mesh, optimizer, checkpoints, batches, note)
    if begun.step >= config.steps:
      hosts.say(f'{workdir}: trained for {begun.step} steps already')
      return begun.state
    guard = guards.Guard(config.guard, begun.extra.get('guard'))
    parts = _Run(
      config,
      workdir,
      mesh,
      optimizer,
      checkpoints,
      batches,
      note,
      asked,
      watch,
      guard,
    )
    return _train(parts, begun.state)


class _Run(NamedTuple):
  """What the loop works with, from `run`."""

  config: settings.RunConfig
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  checkpoints: store.Store
  batches: pipeline.BatchIterator
  note: dict[str, Any]
  asked: signals.Signals
  watch: watchdog.Watchdog
  guard: guards.Guard


def _check(config: settings.RunConfig, mesh: jax.sharding.Mesh) -> None:
  """Refuses a batch that the model or the devices cannot take."""
  data, reach = config.data, config.model.max_positions
  if data.length > reach:
    raise ValueError(
      f'data.length={data.length} exceeds model.max_positions={reach}'
    )
  context.check(data.length, mesh.shape[context.AXIS])
  axes, parts = sharding.RULES['batch'], config.optim.accumulate
  shards = math.prod(mesh.shape[axis] for axis in axes)
  if data.batch % (shards * parts):
    raise ValueError(
      f'data.batch={data.batch} is not a multiple of optim.accumulate={parts} '
      f'times the {shards} shards of the mesh axes {", ".join(axes)}'
    )


def _data(config, mesh, workdir, source, resumed):
  """Batches from the first on, and what checkpoints say of the run.

  The workdir's tokenizer binds a run that has a checkpoint. One without makes
  the same one again, unless its settings or its data are others now.
  """
  data = resume.data_config(config, resumed)
  tokenizer = hosts.first(
    'tokenizer',
    lambda: pipeline.tokenizer(
      data,
      source,
      config.model.vocab,
      workdir,
      bound=resumed or jax.process_index() > 0,  # process 0 has written it
    ),
  )
  dataset = pipeline.make(
    data,
    tokenizer,
    seed=config.seed,
    wanted=pipeline.local_rows(mesh, data.batch),
    source=source,
  )
  # Demonstrations follow from the config; files may be written anew.
  files = None if data.source == 'tasks' else source
  return iter(dataset), resume.note(config, tokenizer, files)


def _train(run: _Run, state: train_state.TrainState) -> train_state.TrainState:
  """Steps to the end; bad ones lead back to a checkpoint, if so configured."""
  updates, programs = compiled(run.config, run.optimizer), {}
  while True:
    start = int(state.step)
    with journal.Journal(run.config, run.workdir, start, run.guard) as log:
      try:
        return _steps(run, updates, programs, state, log)
      except journal.TrainingError as error:
        state = _rewind(run, error)


def _steps(run, updates, programs, state, log):
  """The loop itself; `log` reads each step's numbers during the next."""
  config, mesh, watch = run.config, run.mesh, run.watch
  for step in range(int(state.step), config.steps):
    done = step + 1
    watch.at(done, 'data')
    log.before(step)
    begun = time.monotonic()
    batch = next(run.batches)
    rows = pipeline.to_device(batch, mesh, config.data.batch)
    seconds = {'data': time.monotonic() - begun}
    looks = inspects(config, step)
    if looks not in programs:
      log.flush(state.params)  # compiling is not time of the step before
      watch.at(done, 'compile')
      begun = time.monotonic()
      programs[looks] = updates[looks].lower(state, rows).compile()
      hosts.meet(f'compiled {done}')
      seconds['compile'] = time.monotonic() - begun
    stop = hosts.anywhere(run.asked.raised > 0, mesh)
    watch.at(done, 'step')
    with jax.transfer_guard('disallow'):
      state, fresh = programs[looks](state, rows)
    log.after(done, fresh, batch, run.batches.counts, seconds, state.params)
    stop = bool(stop) and done < config.steps
    if stop or done % config.checkpoint.every == 0 or done == config.steps:
      log.flush(state.params)  # a bad step must not become a checkpoint
      watch.at(done, 'save')
      note = run.note | {'guard': run.guard.state()}
      run.checkpoints.save(state, run.batches, step=done, extra=note)
    if stop:
      run.checkpoints.wait()
      raise run.asked.stopped(done)
  return state


def _rewind(run: _Run, error: journal.TrainingError) -> train_state.TrainState:
  """The state of the newest checkpoint; the data stay where they are.

  Raises:
    TrainingError: `error`, where the guard says so.
  """
  run.checkpoints.wait()
  step = run.guard.rewind(error, run.checkpoints.agreed_steps())
  # Its frames hold the newest state: two would not fit the devices.
  traceback.clear_frames(error.__traceback__)
  abstract = train_state.abstract(run.config.model, run.mesh, run.optimizer)
  restored = run.checkpoints.restore(abstract, None, step)
  for _ in range(run.guard.skip):
    next(run.batches)
  skipped = run.watch.step - step + run.guard.skip
  run.guard.resume(restored.extra['guard'], skipped)
  hosts.say(f'{error}; back to step {step}, {skipped} batches are left out')
  return restored.state


def compiled(
  config: settings.RunConfig, optimizer: optax.GradientTransformation
) -> tuple[Callable, Callable]:
  """The update, jitted without and with introspection; the state is donated."""
  update = functools.partial(
    train.train_step, model=config.model, optimizer=optimizer, cfg=config
  )
  return tuple(
    jax.jit(functools.partial(update, inspect=inspect), donate_argnums=0)
    for inspect in (False, True)
  )


def inspects(config: settings.RunConfig, step: int) -> bool:
  """Whether step `step` (from 0) leaves an introspection record.

  Every `log.introspect` updates, and at the last one; never if that is 0.
  """
  every = config.log.introspect
  done = step + 1
  return every > 0 and (done % every == 0 or done == config.steps)
