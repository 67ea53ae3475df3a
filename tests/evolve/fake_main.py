"""Stands for main.py: writes what each mode writes, in milliseconds.

A checkpoint is a table of success rates by skill. Training raises a skill's
rate by its share of the mixture; evaluation draws the real tasks and passes
each with the rate of its skill. Everything follows from config and checkpoint.

`FAKE_KILL=<folder>` kills the process that started this one, and this one,
when the stage of that folder has written all its files.
"""

import functools
import hashlib
import json
import os
import pathlib
import signal
import sys
from typing import Any

from m2 import config as m2_config
from m2.envs import tasks as env_tasks
from m2.eval import run as eval_run
from tests.evolve import reports

START = 0.2  # rate of every skill before training
LEARNED = 3.0  # how fast a share of the mixture closes the gap to 1
HARD = 'split_table'  # a skill that needs this many times more
HARDER = 6.0
UNREAD: dict[str, list[str]] = {}  # settings that no code reads, by mode


def act(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Does what `config['mode']` does."""
  with open(workdir / 'ran', 'a') as file:
    file.write('.')
  (workdir / 'config.json').write_text(json.dumps(config))
  if config['mode'] == 'eval':
    evaluate(config, workdir)
  else:
    train(config, workdir)
  unread = UNREAD.get(config['mode'], [])
  (workdir / 'unread.json').write_text(json.dumps(unread))


def train(config: dict[str, Any], workdir: pathlib.Path) -> None:
  base = config['checkpoint']['init_from']
  skills = config['tasks']['skills']
  rates = load(pathlib.Path(base)) if base else dict.fromkeys(skills, START)
  total = sum(skills.values())
  for skill, weight in skills.items():
    speed = LEARNED / (HARDER if skill == HARD else 1.0)
    left = (1 - rates[skill]) * (1 - weight / total) ** speed
    rates[skill] = 1 - left
  folder = workdir / 'checkpoints' / str(config['steps'])
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'rates.json').write_text(json.dumps(rates, sort_keys=True))
  (workdir / 'tokenizer.json').write_text('{}')
  with open(workdir / 'metrics.jsonl', 'w') as file:
    for step in range(1, config['steps'] + 1):
      row = {'step': step, 'loss': 1 / step, 'ce': 1 / step, 'tokens': 90.0}
      file.write(json.dumps(row) + '\n')
  record = {'step': config['steps'], 'expert_load': [[0.5, 0.5], [0.9, 0.1]]}
  (workdir / 'introspection.jsonl').write_text(json.dumps(record) + '\n')


def load(workdir: pathlib.Path) -> dict[str, float]:
  (path,) = workdir.glob('checkpoints/*/rates.json')
  return json.loads(path.read_text())


def evaluate(config: dict[str, Any], workdir: pathlib.Path) -> None:
  rates = load(pathlib.Path(config['checkpoint']['init_from']))
  settings = dict(config['tasks'])
  settings['skills'] = tuple(sorted(settings['skills'].items()))
  drawn = sample(
    m2_config.TasksConfig(**settings),
    config['eval']['split'],
    config['eval']['tasks'],
    config['seed'],
  )
  rows = [
    reports.row(
      task.id,
      task.skill,
      luck(task.id, config['seed']) < rates.get(task.skill, START),
      signature=task.signature,
      split=config['eval']['split'],
    )
    for task in drawn
  ]
  eval_run.save(reports.report(rows), workdir / 'eval.json')


# Drawing the real tasks is most of what a round of fake stages costs.
sample = functools.cache(env_tasks.sample)


def luck(task: str, seed: int) -> float:
  digest = hashlib.sha256(f'{task} {seed}'.encode()).digest()
  return int.from_bytes(digest[:8]) / 2**64


def main() -> None:
  arguments = dict(word.lstrip('-').split('=', 1) for word in sys.argv[1:])
  path = pathlib.Path(arguments['config'].partition(':')[2])
  workdir = pathlib.Path(arguments['workdir'])
  act(json.loads(path.read_text()), workdir)
  print(f'step 1/1 {workdir.name}', flush=True)
  if os.environ.get('FAKE_KILL') == workdir.name:
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == '__main__':
  main()
