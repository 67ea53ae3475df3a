"""Task families behind one interface, and the mixtures drawn from them."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from m2 import config, types
from m2.envs.families import sql


class Family(Protocol):
  """What a module of `m2.envs.families` offers.

  `SKILLS` and `HELD_OUT` name its skills, levels go from 0 to `HARDEST`;
  `generate`, `verify`, `Workspace`, `controls`, `canonical_form`, `script_of`
  and `mistaken` act on its tasks.
  """

  NAME: str
  SKILLS: Sequence[str]
  HELD_OUT: Sequence[str]
  HARDEST: int


FAMILIES: dict[str, Family] = {sql.NAME: sql}


def family(name: str) -> Family:
  """The family called `name`.

  Raises:
    ValueError: there is none.
  """
  if name not in FAMILIES:
    known = ', '.join(FAMILIES)
    raise ValueError(f'tasks.family={name!r}: choose one of {known}')
  return FAMILIES[name]


class Stream:
  """An endless, random-access list of tasks of one split.

  Task number i depends on (settings, split, seed, i) alone.
  """

  def __init__(self, cfg: config.TasksConfig, split: str, seed: int):
    """Checks the mixture.

    Raises:
      ValueError: an unknown family, skill or split, a held-out skill with
        weight in train, or a level that the family does not have.
    """
    self.family = family(cfg.family)
    if cfg.difficulty_max > self.family.HARDEST:
      raise ValueError(
        f'tasks.difficulty_max={cfg.difficulty_max}: the hardest of '
        f'{cfg.family} is {self.family.HARDEST}'
      )
    self._split, self._seed = split, seed
    self._low, self._high = cfg.difficulty_min, cfg.difficulty_max
    weights = dict(cfg.skills) or {
      skill: 1.0
      for skill in self.family.SKILLS
      if skill not in self.family.HELD_OUT
    }
    self.skills = [skill for skill, weight in weights.items() if weight > 0]
    self.weights = [weights[skill] for skill in self.skills]
    for skill in self.skills:  # unknown and held-out skills are refused here
      self.family.generate(skill, self._low, split, 'check')

  def __getitem__(self, index: int) -> types.Task:
    """Task number `index`."""
    rng = random.Random(f'{self._split}/{self._seed}/{index}')
    (skill,) = rng.choices(self.skills, self.weights)
    difficulty = rng.randint(self._low, self._high)
    return self.family.generate(
      skill, difficulty, self._split, f'{self._seed}.{index}'
    )


def sample(
  cfg: config.TasksConfig, split: str, count: int, seed: int
) -> list[types.Task]:
  """The first `count` tasks of a stream, shared out over the skills exactly.

  Every skill gets its share of `count`, rounded, and one task at least where
  `count` has room for all skills.
  """
  stream = Stream(cfg, split, seed)
  tasks: list[types.Task] = []
  for skill, share in zip(stream.skills, _shares(stream.weights, count)):
    for index in range(share):
      rng = random.Random(f'{split}/{seed}/{skill}/{index}')
      difficulty = rng.randint(cfg.difficulty_min, cfg.difficulty_max)
      tasks.append(
        stream.family.generate(skill, difficulty, split, f'{seed}.{index}')
      )
  return tasks


def _shares(weights: Sequence[float], count: int) -> list[int]:
  shares: list[int] = []
  carried = 0.0
  for weight in weights:
    carried += count * weight / sum(weights)
    shares.append(round(carried) - sum(shares))
  while count >= len(weights) and 0 in shares:
    shares[shares.index(max(shares))] -= 1
    shares[shares.index(0)] += 1
  return shares


class Demonstrations:
  """Random-access chat rows of solved tasks, made when they are read.

  A row is `{'messages': [...], 'skill': ...}`, with `tools` if the prompt shows
  them; the family's generator writes the solutions, not a model. In a share of
  the rows the first call is a realistic mistake, its answer is what the
  workspace really says, and the second call mends it. The mistake itself has
  weight 0: it is there to be mended, not to be learned.
  """

  def __init__(
    self,
    cfg: config.TasksConfig,
    count: int,
    seed: int,
    split: str = 'train',
    *,
    system: str = '',
    tools: Sequence[Mapping[str, Any]] | None = None,
  ):
    """Describes the rows.

    Args:
      cfg: the mixture, and the share of rows with a mistake.
      count: distinct rows.
      seed: of tasks and mistakes.
      split: where the tasks come from.
      system: the agent's system text, as its scaffold gives it.
      tools: the tool schemas, if the agent's prompt shows them.
    """
    self._stream = Stream(cfg, split, seed)
    self._count, self._retries = count, cfg.retry_demos
    self._seed, self._tools = seed, tools
    self._head = [{'role': 'system', 'content': system}]

  def __len__(self) -> int:
    """Distinct rows."""
    return self._count

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Row number `index`."""
    if not 0 <= index < self._count:
      raise IndexError(f'row {index} of {self._count}')
    task = self._stream[index]
    rng = random.Random(f'demonstration/{self._seed}/{index}')
    messages = solve(
      self._stream.family, task, rng, rng.random() < self._retries
    )
    row = {'messages': self._head + messages, 'skill': task.skill}
    return row if self._tools is None else row | {'tools': list(self._tools)}

  def where(self, index: int) -> str:
    """Names a row in error messages."""
    return f'demonstration {index}'


def solve(
  family: Family, task: types.Task, rng: random.Random, retry: bool
) -> list[Mapping[str, Any]]:
  """The messages of a solved episode, in the format the agent produces."""
  messages: list[Mapping[str, Any]] = [{'role': 'user', 'content': task.prompt}]
  wrong = family.mistaken(task, rng) if retry else None
  if wrong is not None:
    answer = family.answer(task, wrong)
    messages += [
      {**_call('sql', {'script': wrong}, task.skill), 'weight': 0},
      {'role': 'tool', 'content': answer},
    ]
  thought = 'mend' if wrong is not None else task.skill
  messages += [
    _call('sql', {'script': family.script_of(task)}, thought),
    {'role': 'tool', 'content': family.answer(task, family.script_of(task))},
    _call('finish', {}, 'done'),
  ]
  return messages


def _call(
  name: str, arguments: Mapping[str, Any], reasoning: str
) -> Mapping[str, Any]:
  return {
    'role': 'assistant',
    'content': '',
    'reasoning_content': reasoning,
    'tool_calls': [
      {'type': 'function', 'function': {'name': name, 'arguments': arguments}}
    ],
  }
