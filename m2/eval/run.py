"""Evaluation: episodes on sealed tasks, intervals, paired comparisons.

No number is printed without its n. Episodes whose outcome is not a score are
kept, counted, and left out of every rate.
"""

import asyncio
import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from m2 import types

Z95 = 1.959963984540054
DRAWS = 10_000  # bootstrap resamples
FEW = 15  # clusters; below, a bootstrap of them covers less than it says


@dataclasses.dataclass(frozen=True)
class Row:
  """One episode.

  Attributes:
    task: id of the task.
    skill: its skill.
    signature: its structural signature; tasks that share one are a cluster.
    split: its split.
    trial: which of the episodes on this task.
    judged: the verifier gave a score; the rest says nothing otherwise.
    passed: the artifact is right.
    error_class: failure label, '' when passed.
    turns: completions used.
    tokens: tokens sampled.
    seconds: wall clock of the episode, among others running beside it.
    evidence: the verifier's line.
    malformed: completions that could not be parsed.
    finished: the agent ended the episode itself.
    transcript: messages, kept for failures and for one success a skill.
    stop: why its last completion ended.
  """

  task: str
  skill: str
  signature: str
  split: str
  trial: int
  judged: bool
  passed: bool
  error_class: str
  turns: int
  tokens: int
  seconds: float
  evidence: str
  malformed: int
  finished: bool
  transcript: tuple[Mapping[str, Any], ...] = ()
  stop: str = ''


@dataclasses.dataclass(frozen=True)
class EvalReport:
  """All episodes of an evaluation."""

  rows: tuple[Row, ...]

  @property
  def n(self) -> int:
    """Judged episodes."""
    return sum(row.judged for row in self.rows)

  @property
  def successes(self) -> int:
    """Judged episodes that passed."""
    return sum(row.judged and row.passed for row in self.rows)

  def skills(self) -> dict[str, 'EvalReport']:
    """The report of each skill, by name."""
    by_skill = collections.defaultdict(list)
    for row in self.rows:
      by_skill[row.skill].append(row)
    return {
      skill: EvalReport(tuple(rows)) for skill, rows in sorted(by_skill.items())
    }


@dataclasses.dataclass(frozen=True)
class Paired:
  """Effect of `after` over `before` on the same (task, trial) pairs.

  Attributes:
    n: pairs judged on both sides.
    mean: mean difference of success.
    interval: of the mean, over clusters; see `paired`.
    by_cluster: signature -> summed difference.
  """

  n: int
  mean: float
  interval: tuple[float, float]
  by_cluster: Mapping[str, float]


class Player(Protocol):
  """Plays one episode for an evaluation."""

  async def judge(
    self, task: types.Task, episode: str, seed: int
  ) -> tuple[types.Transcript, types.Verdict, int]:
    """Transcript, verdict and number of sampled tokens."""
    ...


async def evaluate(
  tasks: Sequence[types.Task],
  player: Player,
  *,
  trials: int,
  seed: int,
  concurrency: int,
) -> EvalReport:
  """Plays every task `trials` times.

  The sampling of an episode depends on (seed, task, trial) alone, so that two
  checkpoints meet the same luck.

  Args:
    tasks: what to play.
    player: who plays and judges.
    trials: episodes per task.
    seed: of the sampling.
    concurrency: episodes at once.
  """
  gate = asyncio.Semaphore(concurrency)

  async def one(task: types.Task, trial: int) -> Row:
    async with gate:
      luck = types.seed(seed, task.id, trial)
      transcript, verdict, tokens = await player.judge(
        task, f'{task.id}/{trial}', luck
      )
    return _row(task, trial, transcript, verdict, tokens)

  pairs = [(task, trial) for task in tasks for trial in range(trials)]
  rows = await asyncio.gather(*(one(*pair) for pair in pairs))
  return EvalReport(tuple(_keep_examples(rows)))


def _row(task, trial, transcript, verdict, tokens) -> Row:
  return Row(
    task=task.id,
    skill=task.skill,
    signature=task.signature,
    split=task.split,
    trial=trial,
    judged=verdict.outcome == types.Outcome.SCORE,
    passed=verdict.passed,
    error_class=verdict.error_class,
    turns=transcript.turns,
    tokens=tokens,
    seconds=round(transcript.seconds, 4),
    evidence=verdict.evidence,
    malformed=transcript.malformed,
    finished=transcript.finished,
    transcript=tuple(message.to_dict() for message in transcript.messages),
    stop=transcript.stop,
  )


def _keep_examples(rows: Sequence[Row]) -> list[Row]:
  """Drops the transcripts of successes, but one for each skill."""
  shown: set[str] = set()
  kept = []
  for row in rows:
    if row.passed and row.skill in shown:
      row = dataclasses.replace(row, transcript=())
    elif row.passed:
      shown.add(row.skill)
    kept.append(row)
  return kept


def interval(report: EvalReport) -> tuple[float, float]:
  """95% interval of a report's rate of success; (0, 1) where n is 0.

  With one judged trial a task it is Wilson's. With more, the trials of a task
  are not independent: it is Wilson's with n over the design effect,
  1 + (trials - 1) * ICC, and Student's quantile of tasks - 1 degrees of freedom
  for the normal one. ICC, the correlation of two trials of a task, is the
  analysis of variance's, clipped to [0, 1], and 1 where nothing shows it: for
  one task, or where all trials agree. Tasks count as independent.
  """
  trials: dict[str, int] = collections.Counter()
  passed: dict[str, int] = collections.Counter()
  for row in report.rows:
    if row.judged:
      trials[row.task] += 1
      passed[row.task] += row.passed
  n, tasks, successes = report.n, len(trials), report.successes
  if n == tasks:
    return wilson(successes, n)
  if tasks == 1:
    return wilson(successes / n, 1)
  size_T = np.array([*trials.values()])
  rate_T = np.array([*passed.values()]) / size_T  # of the same tasks, in order
  between = size_T @ (rate_T - successes / n) ** 2 / (tasks - 1)
  within = size_T @ (rate_T * (1 - rate_T)) / (n - tasks)
  usual = (n - size_T @ size_T / n) / (tasks - 1)  # trials a task
  spread = between + (usual - 1) * within
  icc = np.clip((between - within) / spread, 0, 1) if spread else 1.0
  effect = 1 + (size_T @ size_T / n - 1) * icc
  z = student(0.95, tasks - 1)
  low, high = wilson(successes / effect, n / effect, z)
  return float(low), float(high)


def student(confidence: float, freedom: int) -> float:
  """The t that Student's distribution exceeds either way at 1 - confidence."""
  low, high = 0.0, math.pi / 2  # angles whose tangent is t / sqrt(freedom)
  for _ in range(60):
    middle = (low + high) / 2
    # Abramowitz and Stegun, 26.7.3 and 26.7.4: P(|T| < t).
    odd, cosine = freedom % 2, math.cos(middle)
    term = cosine if odd else 1.0
    inside = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
      term *= cosine * cosine * (k - 1) / k
      inside += term
    inside *= math.sin(middle)
    if odd:
      inside = (middle + inside) * 2 / math.pi
    low, high = (middle, high) if inside < confidence else (low, middle)
  return math.tan(low) * math.sqrt(freedom)


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
  """Wilson's score interval of a rate; (0, 1) where n is 0.

  It takes n trials as independent; `interval` is for a report.
  """
  if not n:
    return 0.0, 1.0
  rate, scale = successes / n, 1 + z * z / n
  middle = (rate + z * z / (2 * n)) / scale
  half = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
  return max(middle - half, 0.0), min(middle + half, 1.0)


def paired(
  before: EvalReport,
  after: EvalReport,
  *,
  confidence: float = 0.95,
  seed: int = 0,
) -> Paired:
  """Compares two evaluations of the same tasks, pair by pair.

  The interval is a percentile bootstrap of whole clusters (signatures), since
  tasks that share one are not independent (arXiv 2411.00640, section 3). Below
  `FEW` clusters that would be too narrow: there it is Student's, of the
  jackknife over clusters, within [-1, 1].

  Where no pair was judged on both sides nothing is known: mean 0 in (-1, 1).
  One cluster says nothing of the others: (-1, 1), too. Clusters that all agree
  have no spread to resample: as many more may be otherwise as could have been
  missed at this confidence (the rule of three), as far as they can.
  """
  left = {(r.task, r.trial): r for r in before.rows if r.judged}
  right = {(r.task, r.trial): r for r in after.rows if r.judged}
  keys = sorted(left.keys() & right.keys())
  if not keys:
    return Paired(n=0, mean=0.0, interval=(-1.0, 1.0), by_cluster={})
  sums: dict[str, float] = collections.defaultdict(float)
  sizes: dict[str, int] = collections.Counter()
  for key in keys:
    cluster = left[key].signature
    sums[cluster] += float(right[key].passed) - float(left[key].passed)
    sizes[cluster] += 1
  names = sorted(sums)
  total_C = np.array([sums[name] for name in names])
  size_C = np.array([sizes[name] for name in names])
  rng = np.random.default_rng(seed)
  drawn_BC = rng.multinomial(
    len(names), np.full(len(names), 1 / len(names)), size=DRAWS
  )
  means_B = drawn_BC @ total_C / (drawn_BC @ size_C)
  tail, mean = (1 - confidence) / 2, float(total_C.sum() / size_C.sum())
  low, high = np.quantile(means_B, [tail, 1 - tail])
  if len(names) == 1:
    low, high = -1.0, 1.0
  elif not np.ptp(total_C / size_C):
    missed = min(1.0, -math.log(tail) / len(names))
    low, high = mean - missed * (1 + mean), mean + missed * (1 - mean)
  elif len(names) < FEW:
    half = student(confidence, len(names) - 1) * _jackknife(total_C, size_C)
    low, high = max(mean - half, -1.0), min(mean + half, 1.0)
  return Paired(
    n=len(keys),
    mean=mean,
    interval=(float(low), float(high)),
    by_cluster=dict(sums),
  )


def _jackknife(total_C: np.ndarray, size_C: np.ndarray) -> float:
  """Standard error of sum(total) / sum(size), leaving out one cluster each."""
  mean_C = (total_C.sum() - total_C) / (size_C.sum() - size_C)
  return math.sqrt((len(mean_C) - 1) * mean_C.var())


def save(report: EvalReport, path: pathlib.Path | str) -> None:
  """Writes a report as JSON, whole or not at all."""
  path = pathlib.Path(path)
  rows = [dataclasses.asdict(row) for row in report.rows]
  partial = path.with_name(path.name + '.partial')
  partial.write_text(json.dumps({'n': report.n, 'rows': rows}, indent=1))
  partial.replace(path)


def load(path: pathlib.Path | str) -> EvalReport:
  """Reads what `save` wrote.

  Raises:
    ValueError: a file that `save` did not write; it is named.
  """
  try:
    rows = json.loads(pathlib.Path(path).read_text())['rows']
    return EvalReport(
      tuple(
        Row(**(row | {'transcript': tuple(row['transcript'])})) for row in rows
      )
    )
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is no evaluation report: {error}') from error
