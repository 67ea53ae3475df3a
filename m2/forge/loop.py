"""Agent RL: rollouts, window, update, sync, checkpoint; until `config.steps`.

One process alternates: the event loop plays episodes until the window has given
`forge.groups` groups, the trainer updates the weights on them, the engine gets
the weights and the groups' slots are freed. Groups in flight stand still
meanwhile and go on under the new weights. With `forge.in_flight` equal to
`forge.groups` every step trains on what its own weights sampled; more in flight
is older, never by more than the window's bound.

A checkpoint holds model, optimiser and window of one moment. Started again, a
run takes every prompt exactly once: groups that were finished are read from the
pool, groups that were in flight are played again from their start. So a batch
that makes a loss or gradient not finite can come again for ever: the first
`forge.bad_batches` of those are left out, with nothing updated.
"""

import collections
import contextlib
import functools
import importlib.util
import math
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from m2 import config as settings
from m2.checkpoint import store
from m2.engine import engine as engines
from m2.eval import play
from m2.forge import dataset, evaluate, rollout, step, sync
from m2.forge import journal as journals
from m2.forge import pool as pools
from m2.forge import window as windows
from m2.gateway import capture
from m2.parallel import mesh as meshes
from m2.parallel import sharding
from m2.train import journal as train_journal
from m2.train import loop as train_loop
from m2.train import optim, resume, signals
from m2.train import state as train_state


def run(
  config: settings.RunConfig,
  workdir: pathlib.Path,
  cast: rollout.Cast = play.cast,
) -> train_state.TrainState:
  """Trains until `config.steps`; a finished run only returns its state.

  Args:
    config: frozen settings of mode `rl`.
    workdir: checkpoints, metrics, data pool and tokenizer; made if absent.
    cast: who plays; by default the configured agent on the configured tasks.

  Returns:
    The state after the last step, on the mesh.

  Raises:
    ValueError: settings that cannot work; before anything is compiled.
    m2.train.journal.TrainingError: a loss or gradient is not finite, more
      often than `forge.bad_batches`; the checkpoints are sound.
    m2.forge.rollout.RolloutError: groups end without a verdict in a row.
    m2.forge.sync.SyncError: the engine holds other weights than the trainer.
    m2.forge.pool.PoolError: the pool cannot be read or written.
    m2.checkpoint.store.CheckpointError: a checkpoint cannot be read or written.
    m2.train.signals.Stopped: a signal asked for it; the last step is saved.
  """
  check(config)
  mesh = _mesh(config)
  tokenizer = evaluate.tokenizer(config.checkpoint.init_from)
  forge = config.forge
  with (
    jax.set_mesh(mesh),
    store.Store(workdir / 'checkpoints', config.checkpoint.keep) as checkpoints,
    pools.DataPool(pools.file_url(workdir / 'pool.db')) as pool,
    contextlib.ExitStack() as stack,
    rollout.Scene() as scene,
    signals.Signals() as asked,
  ):
    rollouts = _rollouts(config, pool)
    batches = iter(dataset.RolloutDataset(rollouts, scene, forge))
    optimizer = optim.make(config.optim, config.steps)
    note = resume.note(config, tokenizer)
    if not checkpoints.steps():
      evaluate.check_tokenizer(config.checkpoint.init_from, tokenizer)
    state, start, kept = resume.begin(
      config, mesh, optimizer, checkpoints, batches, note
    )
    # Not before: a start that is refused leaves the run's own where it is.
    tokenizer.save(workdir / 'tokenizer.json')
    if start >= config.steps:
      print(f'{workdir}: trained for {start} steps already', flush=True)
      return state
    engine = engines.Engine(
      config.model,
      config.engine,
      sync.copy(state.params),
      version=start,
      mesh=mesh,
    )
    gateway = capture.Gateway(engine, tokenizer, pool, experts=forge.replay)
    scene.start(engine.drive())
    playing = _players(config, cast, gateway, scene, stack)
    scene.start(rollouts.keep_running(*playing))

    def save(state: train_state.TrainState, done: int, left_out: int) -> None:
      extra = note | {'left_out': left_out}
      checkpoints.save(state, batches, step=done, extra=extra)
      if asked.raised and done < config.steps:
        checkpoints.wait()
        raise asked.stopped(done)

    with journals.Journal(
      config, workdir, start, engine, gateway, rollouts
    ) as journal:
      parts = _Run(
        config, optimizer, batches, engine, rollouts, journal, asked, save
      )
      return _train(parts, state, kept.get('left_out', 0))


class _Run(NamedTuple):
  """What the loop works with, from `run`."""

  config: settings.RunConfig
  optimizer: optax.GradientTransformation
  batches: dataset.RolloutIterator
  engine: engines.Engine
  rollouts: rollout.Rollouts
  journal: journals.Journal
  asked: signals.Signals
  save: Callable[[train_state.TrainState, int, int], None]


def _mesh(config: settings.RunConfig) -> jax.sharding.Mesh:
  mesh = meshes.make_mesh(config.mesh)
  ways = sharding.row_ways(mesh.shape)
  if config.forge.lines % ways:
    raise ValueError(
      f'forge.lines={config.forge.lines} is not a multiple of the {ways} '
      'devices that lines are split over (mesh data * fsdp * expert)'
    )
  return mesh


def _rollouts(
  config: settings.RunConfig, pool: pools.DataPool
) -> rollout.Rollouts:
  forge = config.forge
  return rollout.Rollouts(
    # Rounded first: 0.07 * 100 is above 7 by the last digit.
    windows.WindowedFifo(math.ceil(round(forge.window * forge.in_flight, 9))),
    pool,
    in_flight=forge.in_flight,
    group_size=forge.group_size,
    seed=config.seed,
    episode_seconds=forge.episode_seconds,
  )


def _players(config, cast, gateway, scene, stack):
  """Who plays, in this process or on Ray's hosts; and the tasks."""
  agent, tasks = cast(config, gateway)
  if config.forge.runner == 'ray':
    from m2.forge import ray_runner  # Ray is not installed everywhere

    agent = stack.enter_context(ray_runner.Runner(config, cast, gateway))
    scene.start(agent.staff())
  return agent, tasks


def check(config: settings.RunConfig) -> None:
  """Refuses what agent RL cannot do, naming the value and the fix.

  Raises:
    ValueError: lists all of it.
  """
  agent, forge = config.agent, config.forge
  problems = []
  if not config.checkpoint.init_from:
    problems.append(
      'checkpoint.init_from is empty; RL starts from a trained model: give the '
      'workdir of an SFT run'
    )
  if (agent.temperature, agent.top_p, agent.top_k) != (1.0, 1.0, 0):
    problems.append(
      f'agent.temperature={agent.temperature}, agent.top_p={agent.top_p}, '
      f'agent.top_k={agent.top_k}; the importance ratio needs samples of the '
      'model itself: set 1.0, 1.0 and 0'
    )
  if config.optim.accumulate != 1:
    problems.append(
      f'optim.accumulate={config.optim.accumulate}; RL computes forge.lines '
      'lines at a time by itself: set 1'
    )
  if config.engine.length > forge.row_tokens:
    problems.append(
      f'forge.row_tokens={forge.row_tokens} is below engine.length='
      f'{config.engine.length}; a long episode would fit no line'
    )
  if forge.beta and forge.runner == 'ray' and forge.in_flight > forge.groups:
    problems.append(
      f'forge.beta={forge.beta} pays for speed, and episodes on Ray wait while '
      f'weights are trained: set forge.in_flight to forge.groups='
      f'{forge.groups}, or forge.beta to 0'
    )
  if forge.runner == 'ray' and importlib.util.find_spec('ray') is None:
    problems.append(
      'forge.runner=ray needs Ray: bash launch/env.sh launch/ray.txt'
    )
  if problems:
    raise ValueError('rl: ' + '; '.join(problems))


def _train(
  run: _Run, state: train_state.TrainState, left_out: int
) -> train_state.TrainState:
  """The loop itself: batch, update, sync, checkpoint."""
  config, rollouts = run.config, run.rollouts
  update = jax.jit(
    functools.partial(
      step.rl_step, model=config.model, optimizer=run.optimizer, cfg=config
    ),
    donate_argnums=0,
  )
  done, most = int(state.step) + 1, config.forge.bad_batches
  spent = collections.Counter()  # seconds since the last line of the journal
  while done <= config.steps:
    begun = time.monotonic()
    batch = next(run.batches)
    drawn = time.monotonic()
    inspects = train_loop.inspects(config, done - 1)
    state, values = update(
      state,
      jax.tree.map(jnp.asarray, batch.tree),
      inspect=jnp.asarray(inspects) if config.log.introspect else None,
    )
    values = jax.device_get(values)
    if not inspects:
      values.pop('introspection', None)
    trained = time.monotonic()
    spent.update(rollout=drawn - begun, train=trained - drawn)
    if values['bad']:
      left_out += 1
      _leave_out(done, values, left_out, most)
      rollouts.free()
      if run.asked.raised:
        run.save(state, done - 1, left_out)
      continue
    checksum = sync.to_engine(state.params, run.engine, done)
    rollouts.free()
    spent.update(sync=time.monotonic() - trained)
    report = batch.report | {
      'optim/left_out': left_out,
      'sync/checksum': checksum,
    }
    run.journal.write(done, report, values, dict(spent))
    spent.clear()
    due = done % config.checkpoint.every == 0 or done == config.steps
    if due or run.asked.raised:
      run.save(state, done, left_out)
    done += 1
  return state


def _leave_out(step: int, values: dict, left_out: int, most: int) -> None:
  """Says that a batch is left out; an error if it is one too many."""
  what = (
    f'step {step} is not finite: loss {float(values["loss"])}, gradient norm '
    f'{float(values["grad_norm"])}'
  )
  if left_out > most:
    raise train_journal.TrainingError(
      f'{what}. Nothing was updated; a lower optim.lr may help, and '
      'metrics.jsonl shows how it came. Started again the run may meet the '
      f'same batch: forge.bad_batches={left_out} leaves it out'
    )
  print(
    f'{what}; its groups are left out, {left_out} of {most} '
    '(forge.bad_batches)',
    flush=True,
  )
