"""Evaluation reports made up for the tests of the round."""

from collections.abc import Mapping, Sequence

import numpy as np

from m2.eval import run as eval_run


def row(task: str, skill: str, passed: bool, **fields) -> eval_run.Row:
  """One row; `fields` replace the plain values."""
  plain = {
    'task': task,
    'skill': skill,
    'signature': task,
    'split': 'gate',
    'trial': 0,
    'judged': True,
    'passed': passed,
    'error_class': '' if passed else 'wrong_state',
    'turns': 2,
    'tokens': 40,
    'seconds': 0.1,
    'evidence': '' if passed else 'users: 3 rows, expected 4',
    'malformed': 0,
    'finished': True,
    'transcript': (),
  }
  return eval_run.Row(**(plain | fields))


def report(rows: Sequence[eval_run.Row]) -> eval_run.EvalReport:
  return eval_run.EvalReport(tuple(rows))


def arm(
  rates: Mapping[str, float],
  counts: Mapping[str, int],
  rng: np.random.Generator,
  noise: float = 1.0,
  tasks_per_cluster: int = 2,
) -> eval_run.EvalReport:
  """Answers of a checkpoint to a fixed set of tasks.

  Every task has a difficulty of its own, the same for all arms, and so has
  every cluster. With `noise` 0 arms of equal rates answer alike; with 1 they
  are as different as two samplings of the same checkpoint can be.

  Args:
    rates: skill -> probability to pass a task, on average.
    counts: skill -> tasks.
    rng: of this arm.
    noise: share of the randomness that belongs to the arm.
    tasks_per_cluster: consecutive tasks that share a signature.
  """
  fixed = np.random.default_rng(0)
  rows = []
  for skill, count in counts.items():
    clusters = -(-count // tasks_per_cluster)
    hard = np.repeat(fixed.normal(size=clusters), tasks_per_cluster)[:count]
    luck = (1 - noise) * fixed.uniform(size=count)
    luck += noise * rng.uniform(size=count)
    logit = np.log(rates[skill] / (1 - rates[skill]))
    passed = luck < 1 / (1 + np.exp(-(logit + hard)))
    rows += [
      row(
        f'{skill}-{index}',
        skill,
        bool(ok),
        signature=f'{skill}-{index // tasks_per_cluster}',
      )
      for index, ok in enumerate(passed)
    ]
  return report(rows)
