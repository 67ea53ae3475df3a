"""Pretraining and fine-tuning: data, steps, metrics, checkpoints.

The two differ by their data only. A run continues from the newest checkpoint
of its work directory, to the bit: whatever a step depends on is in the
checkpoint or follows from the config and the number of the step.
"""

import functools
import math
import pathlib
from collections.abc import Callable

import jax
import optax

from m2 import config as settings
from m2.checkpoint import store
from m2.data import pipeline, sources
from m2.parallel import context, sharding
from m2.parallel import mesh as meshes
from m2.train import journal, optim, resume
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
    m2.train.journal.TrainingError: a loss or gradient is not finite.
    m2.checkpoint.store.CheckpointError: a checkpoint cannot be read or
      written; those that are complete stay.
    ValueError: settings that do not fit the data, the devices, or the run that
      `workdir` holds.
  """
  mesh = meshes.make_mesh(config.mesh)
  _check(config, mesh)
  data = resume.data_config(config)
  tokenizer = pipeline.tokenizer(data, source, config.model.vocab, workdir)
  batches = iter(
    pipeline.make(
      data,
      tokenizer,
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      source=source,
    )
  )
  optimizer = optim.make(config.optim, config.steps)
  note = resume.note(config, tokenizer)
  folder = workdir / 'checkpoints'
  with (
    jax.set_mesh(mesh),
    store.Store(folder, config.checkpoint.keep) as checkpoints,
  ):
    state = resume.begin(config, mesh, optimizer, checkpoints, batches, note)
    start = int(state.step)
    if start >= config.steps:
      print(f'{workdir}: trained for {start} steps already', flush=True)
      return state
    with journal.Journal(config, workdir, start) as log:
      return _train(
        config, mesh, optimizer, checkpoints, batches, note, state, log
      )


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


def _train(config, mesh, optimizer, checkpoints, batches, note, state, log):
  """The loop itself; `log` reads each step's numbers during the next."""
  plain, inspecting = compiled(config, optimizer)
  for step in range(int(state.step), config.steps):
    log.before(step)
    batch = next(batches)
    rows = pipeline.to_device(batch, mesh)
    update = inspecting if inspects(config, step) else plain
    with jax.transfer_guard('disallow'):
      state, fresh = update(state, rows)
    done = step + 1
    log.after(done, fresh, batch, batches.counts, state.params)
    if done % config.checkpoint.every == 0 or done == config.steps:
      log.flush(state.params)  # a bad step must not become a checkpoint
      checkpoints.save(state, batches, step=done, extra=note)
  return state


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
