"""Agents and their workspaces on other hosts, as Ray actors.

The trainer's process keeps the model: engine, gateway and pool. A worker, one a
CPU of the cluster, plays many episodes at once and has no jax. It cannot call
the trainer; the trainer steps it instead. Each call to a worker ends when its
agent asks the model something, or is done:

    trainer                              worker
    start(task, episode, seed)   ->      agent plays up to its first question
    gateway.chat(question)       <-      Question
    answer(episode, message)     ->      agent plays on
                                 <-      Question ... or Done(reward)

So completions are recorded where they are sampled, seeds and ids are those of
the asyncio runner, and a worker that dies fails the very calls of its episodes:
they count as `Outcome.INFRA`, each named on standard error. Hosts may come and
go; every CPU that is there gets a worker.
"""

import asyncio
import dataclasses
import functools
import hashlib
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from m2 import config, types
from m2.forge import rollout

PATROL = 10.0  # seconds between looks for CPUs that came
PATIENCE = 600.0  # seconds without any worker after which a run gives up


class RunnerError(Exception):
  """No host can play: none is there, or it runs other code."""


@dataclasses.dataclass(frozen=True)
class Question:
  """An agent's request to the model; the arguments of `types.LLM.chat`."""

  messages: Sequence[types.Message]
  tools: Sequence[Mapping[str, Any]] | None
  sampling: types.Sampling


@dataclasses.dataclass(frozen=True)
class Done:
  """The end of an episode, and the settings that playing it has read."""

  reward: types.Reward
  reads: frozenset[tuple[str, str]]


@dataclasses.dataclass
class _Episode:
  """The two directions of one episode in a worker."""

  playing: asyncio.Task | None = None
  outbox: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)
  inbox: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)


class Worker:
  """Plays episodes; to its agent, it is the model."""

  def __init__(self):
    """Does nothing yet: what `join` raises reaches the trainer as it is."""
    self._episodes: dict[str, _Episode] = {}

  async def join(
    self, cfg: config.RunConfig, cast: rollout.Cast, code: str
  ) -> str:
    """Makes the agent.

    Args:
      cfg: the run's settings.
      cast: its first result plays here.
      code: `fingerprint()` of the trainer.

    Returns:
      Host name and process id.

    Raises:
      RunnerError: this host runs other code than the trainer.
    """
    name = f'{socket.gethostname()}:{os.getpid()}'
    if fingerprint() != code:
      raise RunnerError(
        f'{name} runs another m2/ than the trainer; bring both to one commit '
        'and start Ray there anew'
      )
    self._agent, _ = cast(cfg, self)
    return name

  async def start(
    self, task: types.Task, episode: str, seed: int
  ) -> Question | Done:
    """Begins an episode; returns at its first question or its end."""
    here = self._episodes[episode] = _Episode()
    here.playing = asyncio.create_task(self._agent.play(task, episode, seed))
    here.playing.add_done_callback(here.outbox.put_nowait)
    return await self._next(episode)

  async def answer(
    self, episode: str, message: types.Message, stop: types.StopReason
  ) -> Question | Done:
    """Goes on with what the model said; returns as `start` does."""
    self._episodes[episode].inbox.put_nowait((message, stop))
    return await self._next(episode)

  async def chat(
    self,
    episode: str,
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
    sampling: types.Sampling,
  ) -> tuple[types.Message, types.StopReason]:
    """The agent's side of a question; see `types.LLM.chat`."""
    here = self._episodes[episode]
    here.outbox.put_nowait(Question(messages, tools, sampling))
    return await here.inbox.get()

  def forget(self, episode: str) -> tuple[int, int]:
    """Counts nothing: the trainer's gateway knows what was sampled."""
    return 0, 0

  async def _next(self, episode: str) -> Question | Done:
    said = await self._episodes[episode].outbox.get()
    if isinstance(said, Question):
      return said
    del self._episodes[episode]
    return Done(said.result(), frozenset(config.Settings.READS))


@dataclasses.dataclass(eq=False)
class _Hired:
  """A worker as the trainer sees it."""

  actor: Any
  name: str
  busy: int = 0  # episodes it plays


class Runner:
  """A `rollout.Agent` whose episodes are played by Ray's hosts.

  A context manager; `staff` must run beside it.
  """

  def __init__(self, cfg: config.RunConfig, cast: rollout.Cast, llm: Any):
    """Prepares.

    Args:
      cfg: the run's settings; goes to every worker.
      cast: makes the agent there; a function that pickles.
      llm: answers the agents' questions; `m2.gateway.capture.Gateway` is one.
    """
    self._cfg, self._cast, self._llm = cfg, cast, llm
    self._workers: list[_Hired] = []
    self._came = asyncio.Event()
    self._ours = False  # whether Ray was started or joined here

  def __enter__(self) -> 'Runner':
    """Joins the cluster at RAY_ADDRESS; without one, starts it here."""
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # tells nobody
    self._ours = not ray.is_initialized()
    # What workers print stays in Ray's logs; it would echo libtpu's as well.
    quiet = {'logging_level': 'warning', 'log_to_driver': False}
    if self._ours and 'RAY_ADDRESS' in os.environ:
      ray.init(**quiet)
    elif self._ours:
      # Ray's own default would leave a token in the home directory.
      os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))
      ray.init('local', include_dashboard=False, **quiet)
    return self

  def __exit__(self, *_) -> None:
    """Ends the workers, and Ray if it was started here."""
    for worker in self._workers:
      ray.kill(worker.actor)
    if self._ours:
      ray.shutdown()

  async def staff(self) -> None:
    """Gives every CPU of the cluster a worker, until cancelled.

    Raises:
      RunnerError: there was no worker for `PATIENCE` seconds, or one runs other
        code.
      Exception: what making the agent raised.
    """
    hiring: set[asyncio.Task] = set()
    last = time.monotonic()
    while True:
      cpus = int(ray.cluster_resources().get('CPU', 0))
      for _ in range(cpus - len(self._workers) - len(hiring)):
        hiring.add(asyncio.create_task(self._hire()))
      rest = asyncio.create_task(asyncio.sleep(PATROL))
      done, _ = await asyncio.wait(
        {rest, *hiring}, return_when=asyncio.FIRST_COMPLETED
      )
      for task in done & hiring:
        hiring.remove(task)
        task.result()
      rest.cancel()
      last = time.monotonic() if self._workers else last
      if time.monotonic() - last > PATIENCE:
        raise RunnerError(
          f'no Ray worker for {PATIENCE:.0f} s ({cpus} CPUs in the cluster); '
          'start hosts for agents: bash launch/rl.sh agents'
        )

  async def play(
    self, task: types.Task, episode: str, seed: int
  ) -> types.Reward:
    """Has one episode played; a worker's death is `Outcome.INFRA`."""
    while not self._workers:
      self._came.clear()
      await self._came.wait()
    worker = min(self._workers, key=lambda one: one.busy)
    worker.busy += 1
    try:
      said = await _result(worker.actor.start.remote(task, episode, seed))
      while isinstance(said, Question):
        reply = await self._llm.chat(
          episode, said.messages, said.tools, said.sampling
        )
        said = await _result(worker.actor.answer.remote(episode, *reply))
    except ray.exceptions.RayActorError as error:
      return self._lost(worker, task, episode, error)
    finally:
      worker.busy -= 1
      self._llm.forget(episode)
    config.Settings.READS |= said.reads
    return said.reward

  async def _hire(self) -> None:
    options = {
      'num_cpus': 1,
      'max_concurrency': self._cfg.forge.in_flight * self._cfg.forge.group_size,
    }
    actor = ray.remote(Worker).options(**options).remote()
    try:
      name = await _result(
        actor.join.remote(self._cfg, self._cast, fingerprint())
      )
    except ray.exceptions.RayActorError as error:
      print(f'rollout: a worker died at its start: {error}', file=sys.stderr)
      return
    self._workers.append(_Hired(actor, name))
    self._came.set()

  def _lost(self, worker, task, episode, error) -> types.Reward:
    if worker in self._workers:
      self._workers.remove(worker)
      ray.kill(worker.actor)  # one that is out of reach would keep its CPU
    reason = str(error).strip().splitlines()[0]
    evidence = f'worker {worker.name} died in task {task.id}: {reason}'
    print(f'rollout: episode {episode}: {evidence}', file=sys.stderr)
    return types.Reward(
      episode, types.Outcome.INFRA, (), False, evidence=evidence
    )


async def _result(call: Any) -> Any:
  """What a call to a worker gave; what it raised is raised here as it was."""
  try:
    return await call
  except ray.exceptions.RayTaskError as error:
    raise error.cause from error


@functools.cache
def fingerprint() -> str:
  """Digest of m2's sources and the scaffolds, by which hosts compare."""
  root = pathlib.Path(types.__file__).parents[1]
  digest = hashlib.blake2b(digest_size=16)
  files = (*root.glob('m2/**/*.py'), *root.glob('configs/scaffold/*.md'))
  for path in sorted(files):
    digest.update(path.relative_to(root).as_posix().encode() + b'\0')
    digest.update(path.read_bytes() + b'\0')
  return digest.hexdigest()
