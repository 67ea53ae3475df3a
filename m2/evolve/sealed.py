"""Evaluations on the splits that training never draws from.

DEV may be read by the proposer; GATE is read by the gate alone, once a round;
TEST is opened once. What an evaluation asks is fixed here, from settings that
no proposal can edit, and the ids of its tasks are hashed before anything is
answered: the ledger holds the hash, and the answers must match it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import ml_collections

from m2 import config as m2_config
from m2.envs import tasks as env_tasks
from m2.eval import run as eval_run
from m2.evolve import ledger, provenance, trial


@dataclasses.dataclass(frozen=True)
class Exam:
  """A set of tasks that several checkpoints answer with the same seeds.

  Attributes:
    split: dev, gate or test.
    count: tasks.
    weights: skill -> share of the tasks, up to a factor.
  """

  split: str
  count: int
  weights: Mapping[str, float]


def even(config: m2_config.RunConfig, split: str, count: int) -> Exam:
  """All skills of the curriculum alike, whatever their training weight."""
  return Exam(split, count, dict.fromkeys(skills(config), 1.0))


def focused(
  config: m2_config.RunConfig, split: str, count: int, skill: str, share: float
) -> Exam:
  """`share` of the tasks on one skill, the rest even over the others."""
  weights = dict.fromkeys(skills(config), 1.0)
  weights[skill] = (len(weights) - 1) * share / (1 - share)
  return Exam(split, count, weights)


def last(config: m2_config.RunConfig, count: int) -> Exam:
  """TEST: the curriculum, and as often what the family holds out of training.

  `count` tasks are of the curriculum; those of held-out skills come on top and
  are scored apart, as behaviour out of distribution.
  """
  weights = dict.fromkeys((*skills(config), *held_out(config)), 1.0)
  extra = round(count * len(held_out(config)) / len(skills(config)))
  return Exam('test', count + extra, weights)


def held_out(config: m2_config.RunConfig) -> list[str]:
  """Skills of the family that have no training tasks."""
  return list(env_tasks.family(config.tasks.family).HELD_OUT)


def skills(config: m2_config.RunConfig) -> list[str]:
  """The skills of the curriculum: those that training draws."""
  return [name for name, weight in config.tasks.skills if weight > 0]


def tasks_hash(config: m2_config.RunConfig, exam: Exam) -> str:
  """Hash of the ids of the exam's tasks, drawn here without any answer."""
  settings = m2_config.replace(
    config.tasks, skills=tuple(sorted(exam.weights.items()))
  )
  return _hash(_ids(settings, exam.split, exam.count, config.seed))


@functools.cache
def _ids(
  settings: m2_config.TasksConfig, split: str, count: int, seed: int
) -> tuple[str, ...]:
  tasks = env_tasks.sample(settings, split, count, seed)
  return tuple(task.id for task in tasks)


def evaluate(
  config: m2_config.RunConfig,
  exam: Exam,
  checkpoint: pathlib.Path,
  workdir: pathlib.Path,
  *,
  label: str,
  main: pathlib.Path,
) -> eval_run.EvalReport:
  """Lets one checkpoint answer an exam in a process of its own.

  Args:
    config: model, agent, engine and task settings; the seed of the sampling.
    exam: what is asked.
    checkpoint: the run whose weights answer.
    workdir: folder of the evaluation; `eval.json` is written there.
    label: what progress lines call it.
    main: the script to run.

  Returns:
    The report.

  Raises:
    trial.TrialError: the evaluation failed.
    ledger.LedgerError: it answered other tasks than the exam's.
  """
  drawn = {
    'split': exam.split,
    'tasks': exam.count,
    'trials': 1,
    'difficulty': -1,
  }
  stage = trial.child(config, 'eval', eval=drawn)
  stage.tasks.skills = ml_collections.ConfigDict(dict(exam.weights))
  stage.checkpoint.init_from = str(checkpoint)
  trial.run_main(stage, workdir, label=label, main=main)
  report = eval_run.load(workdir / 'eval.json')
  answered = _hash([row.task for row in report.rows])
  if answered != tasks_hash(config, exam):
    raise ledger.LedgerError(
      f'{workdir / "eval.json"} answers other {exam.split} tasks than the '
      'settings and the seed draw; the file or the generator was changed'
    )
  return report


def checkpoint_hash(path: pathlib.Path) -> str:
  """Fingerprint of the weights that a run, or a Hugging Face directory, gives.

  Of a run it is the newest checkpoint, `checkpoints/<step>`, that counts.
  """
  steps = [
    folder
    for folder in (path / 'checkpoints').glob('*')
    if folder.name.isdecimal()
  ]
  newest = max(steps, key=lambda folder: int(folder.name), default=path)
  return provenance.fingerprint([newest], path)


def _hash(ids: Sequence[str]) -> str:
  return provenance.digest(sorted(ids))
