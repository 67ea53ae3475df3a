"""Reads what a run left behind: DEV episodes, its losses, its inner state.

The report keeps apart what was measured per skill (episodes) from what was
measured over the whole mixture (losses, introspection): only the first can
say which skill is weak.
"""

import collections
import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from m2.eval import run as eval_run

# A layer is out of balance when its busiest expert serves this many times its
# even share; sparse models train well below it (anchors: one short run showed
# an expert above 0.6 of the tokens where 0.25 was even).
_OVERLOAD = 3.0
_DEAD_EXPERTS = 0.25  # share of a layer's experts without a token
# Update over weight, RMS: near 1e-3 is healthy; far off, a layer is frozen or
# thrashing.
_UPDATE_RANGE = (1e-6, 3e-2)
_CLIPPED = 0.9  # share of steps whose gradient was clipped
# Metrics of SFT, then of RL, that a finding cites.
_CITED = (
  'ce',
  'log_z',  # a head that drifts; where it settles depends on `loss.z`
  'grad_norm',
  'clipped',
  'reward/passed',
  'policy/entropy',
)


@dataclasses.dataclass(frozen=True)
class Failures:
  """One cluster of failed episodes of a skill.

  Attributes:
    label: `<role>: <error class>`; the role is whose turn went wrong.
    count: episodes in it.
    ids: task ids, a few.
    example: the verifier's line for the first of them.
  """

  label: str
  count: int
  ids: tuple[str, ...]
  example: str


@dataclasses.dataclass(frozen=True)
class SkillRecord:
  """DEV episodes of one skill. `n` leaves out masked episodes."""

  skill: str
  n: int
  successes: int
  interval: tuple[float, float]
  failures: tuple[Failures, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
  """One quantity of the training run, judged.

  Attributes:
    name: the field it comes from.
    source: the file, as `<run>/<file>`.
    value: the figure, in words.
    healthy: inside the range that training is expected to stay in.
  """

  name: str
  source: str
  value: str
  healthy: bool


@dataclasses.dataclass(frozen=True)
class RunReport:
  """What is known about a checkpoint before anything is changed."""

  skills: Mapping[str, SkillRecord]
  readings: tuple[Reading, ...]
  masked: int


def observe(
  dev: pathlib.Path, checkpoint: pathlib.Path, skills: Sequence[str]
) -> RunReport:
  """Collects the evidence about one checkpoint.

  Args:
    dev: `eval.json` of the checkpoint on DEV.
    checkpoint: the run that made it, or a step of it; runs it started from
      are followed until one holds an introspection record.
    skills: the skills of the curriculum; others in `dev` are not for tuning.

  Returns:
    The report.

  Raises:
    ValueError: `dev` holds no verdict for one of the skills.
  """
  report = eval_run.load(dev)
  rows = collections.defaultdict(list)
  for row in report.rows:
    rows[row.skill].append(row)
  records = {}
  for skill in skills:
    records[skill] = _skill_record(skill, rows[skill])
    if not records[skill].n:
      asked = len(rows[skill])
      fix = 'their evidence says why' if asked else 'raise evolve.dev_tasks'
      raise ValueError(
        f'{dev}: of {asked} episodes of {skill!r} none has a verdict; {fix}'
      )
  masked = sum(not row.judged for row in report.rows)
  return RunReport(records, tuple(_readings(checkpoint)), masked)


def trained_tokens(run: pathlib.Path) -> int:
  """Tokens of a training run: trained on, padding left out; RL: sampled."""
  rows = _records(run / 'metrics.jsonl')
  name = 'tokens' if 'tokens' in rows[0] else 'engine/sampled_tokens'
  return round(sum(row[name] for row in rows))


def run_of(checkpoint: pathlib.Path) -> pathlib.Path:
  """The run, or Hugging Face directory, that holds `checkpoint`.

  That is the workdir of `<workdir>/checkpoints` and of a step in it, and any
  other folder itself.
  """
  folder = checkpoint.resolve()
  if (folder / 'tokenizer.json').exists():
    return folder
  if _step(folder) is not None:
    folder = folder.parent
  return folder.parent if folder.name == 'checkpoints' else folder


def _step(folder: pathlib.Path) -> int | None:
  """The step of `checkpoints/<step>`; None for any other folder."""
  if folder.parent.name != 'checkpoints' or not folder.name.isdecimal():
    return None
  return int(folder.name)


def _skill_record(skill: str, rows: Sequence[eval_run.Row]) -> SkillRecord:
  judged = [row for row in rows if row.judged]
  clusters = collections.defaultdict(list)
  for row in judged:
    if not row.passed:
      clusters[f'{_role(row)}: {row.error_class}'].append(row)
  ordered = sorted(clusters.items(), key=lambda item: (-len(item[1]), item[0]))
  successes = sum(row.passed for row in judged)
  return SkillRecord(
    skill=skill,
    n=len(judged),
    successes=successes,
    interval=eval_run.wilson(successes, len(judged)),
    failures=tuple(
      Failures(
        label,
        len(failed),
        tuple(row.task for row in failed[:3]),
        failed[0].evidence,
      )
      for label, failed in ordered
    ),
  )


def _role(row: eval_run.Row) -> str:
  """Whose turn went wrong in a failed episode.

  `format`: the model wrote a call that could not be parsed; `tool`: the last
  answer of a tool was an error, and was not mended; `unfinished`: it never
  called finish; `artifact`: everything ran, the result is wrong.
  """
  if row.malformed:
    return 'format'
  answers = [m['content'] for m in row.transcript if m['role'] == 'tool']
  if answers and answers[-1].startswith('error:'):
    return 'tool'
  return 'artifact' if row.finished else 'unfinished'


def _readings(checkpoint: pathlib.Path) -> list[Reading]:
  found = []
  rows, source = _rows_with('introspection.jsonl', checkpoint)
  if rows:
    found += _from_introspection(rows[-1], source)
  rows, source = _rows_with('metrics.jsonl', checkpoint)
  if rows:
    found += _from_metrics(rows, source)
  return found


def _rows_with(
  name: str, checkpoint: pathlib.Path
) -> tuple[list[dict[str, Any]], str]:
  """Records that led to `checkpoint`, and `<run>/<name>` they are from.

  They are of its run, or of the nearest one before it that wrote `name`. A
  step of a run is led to by the records up to it alone.
  """
  seen = set()
  while checkpoint.is_dir() and checkpoint.resolve() not in seen:
    seen.add(checkpoint.resolve())
    run, step = run_of(checkpoint), _step(checkpoint.resolve())
    rows = _records(run / name) if (run / name).exists() else []
    if step is not None:
      rows = [row for row in rows if row['step'] <= step]
    if rows:
      return rows, f'{run.name}/{name}'
    config = run / 'config.json'
    if not config.exists():
      break
    before = json.loads(config.read_text()).get('checkpoint', {})
    if not before.get('init_from'):
      break
    checkpoint = pathlib.Path(before['init_from'])
  return [], ''


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
  """All whole lines; the last one may be torn if the run was killed."""
  *lines, _ = path.read_text().split('\n')
  return [json.loads(line) for line in lines]


def _from_introspection(
  record: Mapping[str, Any], source: str
) -> list[Reading]:
  step = record.get('step')
  found = []

  def add(name: str, value: str, healthy: bool) -> None:
    found.append(Reading(name, source, f'{value} (step {step})', healthy))

  if 'expert_load' in record:
    peaks = [max(layer) * len(layer) for layer in record['expert_load']]
    layer = max(range(len(peaks)), key=peaks.__getitem__)
    add(
      'expert_load',
      f'busiest expert serves {peaks[layer]:.1f} x its even share, in layer '
      f'{layer}',
      peaks[layer] <= _OVERLOAD,
    )
  if 'dead_experts' in record:
    worst = max(record['dead_experts'])
    add(
      'dead_experts', f'{worst:.0%} at most in a layer', worst <= _DEAD_EXPERTS
    )
  if 'update_ratio' in record:
    # Null stands for a value that was not finite.
    values = [
      (math.nan if value is None else value, name)
      for name, layers in record['update_ratio'].items()
      for value in (layers if isinstance(layers, list) else [layers])
    ]
    # One that is not a number comes last, as the largest.
    values.sort(key=lambda pair: (math.isnan(pair[0]), pair[0]))
    (low, _), (high, group) = values[0], values[-1]
    healthy = low >= _UPDATE_RANGE[0] and high <= _UPDATE_RANGE[1]
    add('update_ratio', f'{low:.1e} to {high:.1e}, largest in {group}', healthy)
  return found


def _from_metrics(
  rows: Sequence[Mapping[str, Any]], source: str
) -> list[Reading]:
  found = []
  for name in _CITED:
    # Null stands for a value that was not finite.
    values = [
      math.nan if row[name] is None else row[name]
      for row in rows
      if name in row
    ]
    if not values:
      continue
    tail = values[-max(1, len(values) // 10) :]
    mean = statistics.fmean(tail)
    healthy = math.isfinite(mean) and (name != 'clipped' or mean <= _CLIPPED)
    text = f'{mean:.4g} over the last {len(tail)} of {len(values)} lines'
    found.append(Reading(name, source, text, healthy))
  return found
