"""One episode: an agent, a workspace and its verifier, put together.

The same `Player` serves evaluation (`judge`) and reinforcement learning
(`play`). What fails in the machinery, and not in the agent, is an outcome of
its own and never a zero.
"""

import dataclasses
import sqlite3
from typing import Protocol

from m2 import config, types
from m2.agents import whitebox
from m2.envs import reward, tasks

# What a workspace or verifier raises when the machine, not the agent, is at
# fault: no memory, no disk, a broken database library.
FAILURES = (OSError, MemoryError, sqlite3.Error)


class Sessions(types.LLM, Protocol):
  """A model that keeps count of each episode; `m2.gateway` has one."""

  def forget(self, episode: str) -> tuple[int, int]:
    """Drops an episode; returns its completions and sampled tokens."""
    ...


class Player:
  """The configured agent in the workspaces of the configured family."""

  def __init__(self, cfg: config.RunConfig, llm: Sessions):
    """Prepares.

    Args:
      cfg: `agent`, `prompt`, `tasks` and, for `play`, `forge` are read.
      llm: the model.

    Raises:
      ValueError: a scaffold or family that does not exist.
    """
    self._cfg, self._llm = cfg, llm
    self._agent = whitebox.WhiteBox(cfg.agent, cfg.prompt)
    self._family = tasks.family(cfg.tasks.family)

  async def judge(
    self, task: types.Task, episode: str, seed: int
  ) -> tuple[types.Transcript, types.Verdict, int]:
    """Plays one episode and verifies its artifact.

    Args:
      task: what to do.
      episode: its id.
      seed: of the sampling.

    Returns:
      Transcript, verdict and number of sampled tokens. A failure of the
      machinery gives an empty transcript and `Outcome.INFRA`.
    """
    try:
      async with self._family.Workspace(task) as workspace:
        transcript = await self._agent.run(
          task, workspace, self._llm, episode, seed
        )
      verdict = self._family.verify(task, workspace.scripts)
    except FAILURES as error:
      transcript = types.Transcript((), 0, 0.0, 0, False, types.StopReason.EOS)
      verdict = types.Verdict(
        types.Outcome.INFRA, False, 0.0, 'infra', f'{type(error)}: {error}'
      )
    return transcript, verdict, self._llm.forget(episode)[1]

  async def play(
    self, task: types.Task, episode: str, seed: int
  ) -> types.Reward:
    """Plays one episode; the typed reward of each of its actions."""
    transcript, verdict, _ = await self.judge(task, episode, seed)
    if not transcript.turns:
      return types.Reward(
        episode, verdict.outcome, (), False, evidence=verdict.evidence
      )
    return reward.steps(episode, transcript, verdict, self._cfg.forge)


def cast(cfg: config.RunConfig, llm: Sessions) -> tuple[Player, tasks.Stream]:
  """Who plays, and the endless list of training tasks, for one RL run."""
  return Player(cfg, llm), tasks.Stream(cfg.tasks, 'train', cfg.seed)


def exam(cfg: config.RunConfig) -> list[types.Task]:
  """The tasks of an evaluation: a function of `tasks`, `eval` and `seed`."""
  chosen = cfg.tasks
  if cfg.eval.difficulty >= 0:
    chosen = dataclasses.replace(
      chosen,
      difficulty_min=cfg.eval.difficulty,
      difficulty_max=cfg.eval.difficulty,
    )
  return tasks.sample(chosen, cfg.eval.split, cfg.eval.tasks, cfg.seed)
