"""Keeps prompt groups in flight: starts them, closes their episodes.

A group is `group_size` episodes on one task. Prompt number i is `tasks[i]`, i
being its submission index in the window: so no prompt is skipped or played
twice, whatever the window's state was restored from. A group that was in flight
when a run stopped is played again from its start, under the same index and with
the same seeds; what it had recorded stays in the pool under its old id.

One asyncio event loop plays all episodes, or lets Ray's hosts play them
(`m2/forge/ray_runner.py`), and drives the engine (`Engine.drive`). It only runs
while somebody waits for a batch; in between, while weights are trained,
everything in flight stands still.
"""

import asyncio
import dataclasses
import math
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from m2 import config, types
from m2.forge import pool as pools
from m2.forge import window as windows


class Agent(Protocol):
  """Plays tasks; talks to the model through the gateway it was given."""

  async def play(
    self, task: types.Task, episode: str, seed: int
  ) -> types.Reward:
    """Plays one episode and judges it; failures are typed, not raised."""
    ...


class Tasks(Protocol):
  """The endless list of prompts."""

  def __getitem__(self, index: int) -> types.Task:
    """Task of prompt number `index`."""
    ...


class RolloutError(Exception):
  """Episodes end without a verdict, one group after another."""


# Settings and model -> who plays, and prompt number -> task.
Cast = Callable[[config.RunConfig, types.LLM], tuple[Agent, Tasks]]


@dataclasses.dataclass
class Counters:
  """Running totals of episodes by outcome, and of groups."""

  episodes: int = 0
  infra: int = 0
  timeout: int = 0
  tamper: int = 0
  groups: int = 0
  dropped: int = 0  # groups with fewer than two scores


class Rollouts:
  """The groups of one run; use inside one event loop."""

  def __init__(
    self,
    window: windows.WindowedFifo,
    pool: pools.DataPool,
    *,
    in_flight: int,
    group_size: int,
    seed: int,
    episode_seconds: float | None = None,
  ):
    """Prepares; `keep_running` starts.

    Args:
      window: decides what may be taken, and when a slot is free.
      pool: gets rewards and closings; the gateway puts the completions there.
      in_flight: groups submitted and not yet freed, N.
      group_size: episodes of a group.
      seed: of the run.
      episode_seconds: an episode that has not ended then is given up as a
        TIMEOUT; None waits for ever. Time counts while episodes are played: see
        `Scene`.
    """
    self.counters = Counters()
    self.window, self.pool = window, pool
    self._in_flight, self._group_size = in_flight, group_size
    self._seed, self._episode_seconds = seed, episode_seconds
    self._run = pool.begin()
    self._barren = 0  # groups dropped since the last that was not
    self._changed = asyncio.Event()  # a group ended, or slots were freed

  async def keep_running(self, agent: Agent, tasks: Tasks) -> None:
    """Keeps `in_flight` groups going until cancelled.

    Args:
      agent: plays the episodes.
      tasks: prompt number -> task.

    Raises:
      RolloutError: twice `in_flight` groups in a row had nothing to compare.
      Exception: what an episode raised; a failure that is expected would have
        been its outcome.
    """
    running: dict[str, asyncio.Task] = {}

    def start(id: str, index: int) -> None:
      group = self._play_group(agent, tasks[index], id, index)
      running[id] = asyncio.create_task(group)

    try:
      while True:
        for id, index in self.window.unfinished():
          if id not in running:  # restored from a checkpoint
            start(id, index)
        while self.window.occupied < self._in_flight:
          id = self.group_id(self.window.next_index)
          start(id, self.window.submit(id))
        self._changed.clear()
        await self._changed.wait()
        for id in [id for id, task in running.items() if task.done()]:
          running.pop(id).result()
    finally:
      for task in running.values():
        task.cancel()

  async def take(self, count: int) -> list[str]:
    """Waits until the window has given `count` groups."""
    taken = self.window.take(count)
    while len(taken) < count:
      await self._changed.wait()
      await asyncio.sleep(0)  # `keep_running` clears the event
      taken += self.window.take(count - len(taken))
    return taken

  def free(self) -> None:
    """The taken groups are trained on, or left out: their slots are free."""
    self.window.free()
    self._changed.set()

  def group_id(self, index: int) -> str:
    """The id of prompt number `index` when this process plays it."""
    return f'g{index}.{self._run}'

  async def _play_group(
    self, agent: Agent, task: types.Task, id: str, index: int
  ) -> None:
    async def play(member: int, episode: str) -> types.Reward:
      seed = types.seed(self._seed, index, member)
      seconds = self._episode_seconds
      try:
        async with asyncio.timeout(seconds) as limit:
          reward = _finite(await agent.play(task, episode, seed))
      except TimeoutError:
        if not limit.expired():  # the agent's own
          raise
        reward = _failure(
          episode,
          types.Outcome.TIMEOUT,
          f'no end after forge.episode_seconds={seconds:g}',
        )
      self.pool.put_reward(reward)
      self.pool.close(episode, group=id, task=task.id, skill=task.skill)
      return reward

    names = enumerate(episodes(id, self._group_size))
    try:
      rewards = await asyncio.gather(*(play(*pair) for pair in names))
      self._count(rewards)
      failed = [r for r in rewards if r.outcome != types.Outcome.SCORE]
      if len(rewards) - len(failed) < 2:  # nothing to compare
        self.window.drop(id)
        self._drop(failed)
      else:
        self.window.done(id)
        self._barren = 0
    finally:
      self._changed.set()

  def _drop(self, failed: list[types.Reward]) -> None:
    self.counters.dropped += 1
    self._barren += 1
    if self._barren >= 2 * self._in_flight:
      last = failed[-1]
      raise RolloutError(
        f'{self._barren} groups in a row ended with fewer than two scores; the '
        f'last episode without one, {last.episode}: {last.outcome}: '
        f'{last.evidence}'
      )

  def _count(self, rewards: list[types.Reward]) -> None:
    self.counters.groups += 1
    self.counters.episodes += len(rewards)
    for name in ('infra', 'timeout', 'tamper'):
      count = sum(reward.outcome == name for reward in rewards)
      setattr(self.counters, name, getattr(self.counters, name) + count)


def _finite(reward: types.Reward) -> types.Reward:
  """The reward; a score that is no number is a failure of the machinery."""
  scored = reward.outcome == types.Outcome.SCORE
  if not scored or all(map(math.isfinite, reward.steps)):
    return reward
  steps = [*map(float, reward.steps)]
  return _failure(
    reward.episode, types.Outcome.INFRA, f'rewards {steps} are not finite'
  )


def _failure(
  episode: str, outcome: types.Outcome, evidence: str
) -> types.Reward:
  """What an episode without a score is worth; says so."""
  print(f'rollout: episode {episode}: {evidence}', file=sys.stderr)
  return types.Reward(episode, outcome, (), False, evidence=evidence)


class _Loop(asyncio.SelectorEventLoop):
  """An event loop whose clock stands while nobody runs it."""

  def __init__(self):
    super().__init__()
    self._stood, self._since = 0.0, None

  def time(self) -> float:
    now = super().time() if self._since is None else self._since
    return now - self._stood

  def run_forever(self) -> None:
    if self._since is not None:
      self._stood += super().time() - self._since
    self._since = None
    try:
      super().run_forever()
    finally:
      self._since = super().time()


class Scene:
  """An event loop that is wound on from outside, a context manager.

  Background coroutines run only inside `until`; one that ends, ends the run.
  Between two of them the loop's clock stands still too, and so episodes are not
  charged for the training step that they waited for.
  """

  def __init__(self):
    """Makes the loop."""
    self._runner = asyncio.Runner(loop_factory=_Loop)
    self._background: list[asyncio.Task] = []

  def __enter__(self) -> 'Scene':
    """Gives the scene itself."""
    return self

  def __exit__(self, *_) -> None:
    """Cancels what is left and closes the loop."""
    self._runner.close()

  def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
    """Adds a background coroutine."""
    task = self._runner.get_loop().create_task(coroutine)
    self._background.append(task)

  def until(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs everything until `coroutine` is done; returns its result.

    Raises:
      Exception: what it, or a background coroutine, raised.
    """

    async def race():
      main = asyncio.create_task(coroutine)
      done, _ = await asyncio.wait(
        {main, *self._background}, return_when=asyncio.FIRST_COMPLETED
      )
      for task in self._background:
        if task in done:
          main.cancel()
          task.result()
      return main.result()

    return self._runner.run(race())


def episodes(group: str, group_size: int) -> list[str]:
  """The ids of a group's episodes."""
  return [f'{group}/{member}' for member in range(group_size)]
