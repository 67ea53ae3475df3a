"""What the stages measured, as `results.json` and as the table on the screen.

`m2/stages.py` states the layout. Nothing here measures: it counts what the
stages wrote, so the same folders always give the same numbers.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from m2.eval import run as eval_run
from m2.evolve import gate, observe, trial

CONFIDENCE = 0.95


def stage(
  name: str,
  folder: pathlib.Path,
  exam: pathlib.Path,
  report: eval_run.EvalReport,
  skills: Sequence[str],
  adopted: bool,
) -> dict[str, Any]:
  """One row: how a checkpoint was made, and how it did on TEST.

  Args:
    name: sft, rl, targeted or control.
    folder: its training run.
    exam: folder of its evaluation on TEST.
    report: that evaluation.
    skills: the curriculum; what else the report holds was never trained.
    adopted: it is the checkpoint in force at the end.

  Returns:
    JSON-able fields, as `m2/stages.py` lists them.
  """
  made, asked = trial.load(folder), trial.load(exam)
  parts = report.skills()
  return {
    'name': name,
    'steps': json.loads((folder / 'stage.json').read_text())['steps'],
    'seconds': made.seconds,
    'tokens': observe.trained_tokens(folder),
    'peak_bytes': max(made.peak_bytes, asked.peak_bytes),
    **score(gate.only(report, skills)),
    'skills': {
      name: score(gate.only(report, [name])) for name in sorted(skills)
    },
    'held_out': {
      name: score(part) for name, part in parts.items() if name not in skills
    },
    'test_seconds': asked.seconds,
    'test_tokens': sum(row.tokens for row in report.rows),
    'adopted': adopted,
  }


def score(report: eval_run.EvalReport) -> dict[str, Any]:
  """n, successes, rate, 95% Wilson interval, and how many were masked."""
  return {
    'n': report.n,
    'successes': report.successes,
    'rate': report.successes / report.n if report.n else None,
    'interval': list(eval_run.wilson(report.successes, report.n)),
    'masked': len(report.rows) - report.n,
  }


def differences(
  reports: Mapping[str, eval_run.EvalReport],
  skills: Sequence[str],
  skill: str | None,
) -> list[dict[str, Any]]:
  """Paired differences on TEST between checkpoints that follow one another.

  Args:
    reports: by name; sft and rl, and targeted and control if there was a round.
    skills: the curriculum; differences are over its tasks.
    skill: the one that the round targeted; its own differences are added.

  Returns:
    One dictionary a pair and scope.
  """
  pairs = [('rl', 'sft')]
  if 'targeted' in reports:
    pairs += [('targeted', 'rl'), ('control', 'rl'), ('targeted', 'control')]
  found = []
  for scope in (None, skill) if skill else (None,):
    for after, before in pairs:
      effect = gate.compare(
        reports[before],
        reports[after],
        [scope] if scope else skills,
        CONFIDENCE,
      )
      found.append(
        {
          'after': after,
          'before': before,
          'skill': scope,
          **dataclasses.asdict(effect),
        }
      )
  return found


def table(results: Mapping[str, Any]) -> str:
  """The results as aligned text: stages, differences, verdict, cost."""
  rows = [('checkpoint', 'steps', 'tokens', 'time', 'TEST', 'rate', '95%')]
  for one in results['stages']:
    rows.append(
      (
        one['name'] + (' *' if one['adopted'] else ''),
        str(one['steps']),
        f'{one["tokens"]:,}',
        trial.clock(one['seconds']),
        f'{one["successes"]}/{one["n"]}',
        percent(one['rate']),
        interval(one['interval']),
      )
    )
  lines = align(rows, '<>>>>>>')
  lines += ['', *_difference_lines(results['differences'])]
  lines += ['', *_verdict_lines(results['evolve'])]
  gib = results['peak_bytes'] / 2**30
  lines += [
    '',
    f'* adopted. {trial.clock(results["wall_seconds"])} in all, of which '
    f'{trial.clock(results["seconds"])} in stages; {gib:.2f} GiB at most. '
    f'{results["environment"]["device"]}, commit '
    f'{short(results["commit"])}, config {results["config_hash"][:12]}, ledger '
    f'{results["ledger"]["head"][:12]}',
  ]
  return '\n'.join(lines)


def short(commit: str) -> str:
  """The start of a commit's hash; changes on top of it stay visible."""
  head, plus, changes = commit.partition('+')
  return head[:12] + plus + changes


def percent(value: float | None) -> str:
  return '-' if value is None else f'{100 * value:.1f}%'


def interval(ends: Sequence[float]) -> str:
  return f'[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]'


def _difference_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
  rows = [('TEST, paired', 'tasks', 'n', 'points', '95%')]
  for one in found:
    rows.append(
      (
        f'{one["after"]} - {one["before"]}',
        one['skill'] or 'all',
        str(one['n']),
        f'{100 * one["mean"]:+.1f}',
        interval(one['interval']),
      )
    )
  return align(rows, '<<>>>')


def _verdict_lines(evolve: Mapping[str, Any]) -> list[str]:
  if evolve['verdict'] == 'none':
    return ['evolve: no skill fails on DEV, nothing was proposed']
  gain = evolve['gain']
  control = evolve['over_control']
  return [
    f'evolve: {evolve["verdict"].upper()} the edit for {evolve["skill"]}. '
    f'Points on GATE (n={gain["n"]}): predicted '
    f'{100 * evolve["predicted"]:+.1f}, measured {_points(gain)}, over the '
    f'control {_points(control)}'
  ]


def _points(effect: Mapping[str, Any]) -> str:
  return f'{100 * effect["mean"]:+.1f} {interval(effect["interval"])}'


def align(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
  """Columns of equal width; `sides` holds < or > for each."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [
    '  '.join(
      f'{cell:{side}{width}}' for cell, side, width in zip(row, sides, widths)
    ).rstrip()
    for row in rows
  ]
  return [lines[0], '-' * max(map(len, lines)), *lines[1:]]
