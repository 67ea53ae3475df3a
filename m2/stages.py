"""The whole loop: SFT, agentic RL, one self-evolution round, sealed test.

Every stage is a `main.py` of its own in a folder of `workdir`:

    sft/                  supervised fine-tuning on verified demonstrations
    rl/                   agentic RL on verified outcomes, from sft
    evolve/               the round (m2/evolve/loop.py), from rl
    evolve/targeted/      fine-tuning on the edited mixture, from rl
    evolve/control/       the same steps on the unedited mixture, from rl
    test/<name>/          TEST, opened once, for each of the four above
    results.json          all numbers; report.html, the same to look at

Run again after a kill, finished stages are not repeated. `results.json`:

    mode, seed, config_hash, commit
    environment: {python, jax, cores, platform, processor, device}
    seconds       of all stages, each by the attempt that finished it
    wall_seconds  of the call that wrote this; a resumed run's is shorter
    peak_bytes    resident memory of the largest stage and of this process
    stages: [{name, steps, seconds, tokens, peak_bytes,       # training
              n, successes, rate, interval, masked,           # sealed TEST
              skills, held_out, test_seconds, test_tokens, adopted}]
        # interval: [low, high], 95% Wilson; masked: episodes without a verdict
        # skills: {skill: {n, successes, rate, interval, masked}}; held_out,
        # alike: skills that nothing was trained on, counted nowhere else
    differences: [{after, before, skill, n, clusters, mean, interval, p}]
        # paired by task on TEST; skill null = all; 95% over clusters
    evolve: {verdict, reasons, adopted, skill, why, hypothesis, alternative,
             confidence, evidence: [{source, text, ids}],
             edits: [{path, old, new}], predicted, gain, over_control, others,
             protected: {skill: {..., status}}, ledger}
        # verdict: keep | revert | none; effects are measured on GATE and have
        # the fields of a difference; status: cleared | harmed | unresolved
    ledger: {path, entries, head}
    notes: [sentence]     what these numbers do and do not show
"""

import json
import pathlib
import time
from typing import Any

from m2 import config as m2_config
from m2.eval import run as eval_run
from m2.evolve import ledger, loop, provenance, results, sealed, trial
from m2.obs import dashboard


def run(
  config: m2_config.RunConfig,
  workdir: pathlib.Path,
  *,
  main: pathlib.Path = trial.MAIN,
) -> dict[str, Any]:
  """Runs all stages that are not done yet, then the report.

  Args:
    config: of mode quickstart.
    workdir: the folder of everything.
    main: the script that every stage runs.

  Returns:
    What `results.json` holds.

  Raises:
    ValueError: the config has no curriculum of at least two skills, or data
      that is not the tasks.
    trial.TrialError: a stage failed; the message ends with its log.
    ledger.LedgerError: the record was changed, or TEST was opened before for
      something else.
  """
  start = time.monotonic()
  workdir = pathlib.Path(workdir).resolve()
  loop.check_curriculum(config)
  folders = {'sft': workdir / 'sft', 'rl': workdir / 'rl'}
  train_sft(config, folders['sft'], main)
  config = loop.with_tokenizer(config, folders['sft'])
  train_rl(config, folders, main)
  round = loop.run(
    evolve_config(config, folders['rl']), workdir / 'evolve', main=main
  )
  if round['verdict'] != 'none':
    folders |= {arm: workdir / 'evolve' / arm for arm in loop.ARMS[1:]}
  with ledger.Ledger(workdir / 'evolve' / 'ledger.jsonl') as book:
    reports = test(config, folders, workdir, book, main)
    found = collect(config, folders, workdir, reports, round, book)
  found['wall_seconds'] = time.monotonic() - start
  provenance.write_json(workdir / 'results.json', found)
  page = dashboard.build(workdir)
  print(f'\n{results.table(found)}\n\nreport: {page}', flush=True)
  return found


def train_sft(
  config: m2_config.RunConfig, folder: pathlib.Path, main: pathlib.Path
) -> None:
  """Supervised fine-tuning on demonstrations of the curriculum."""
  stage = trial.child(config, 'sft')
  trial.run_main(stage, folder, label='sft', main=main)


def train_rl(
  config: m2_config.RunConfig,
  folders: dict[str, pathlib.Path],
  main: pathlib.Path,
) -> None:
  """Agentic RL from the SFT checkpoint."""
  later = shortened(config, config.stages.rl_steps, config.stages.rl_lr)
  # Rewards alone move the policy: routing that shifts by itself, and decay,
  # would undo in a few dozen steps what SFT has learned.
  optim = m2_config.replace(later.optim, bias_rate=0.0, weight_decay=0.0)
  stage = trial.child(m2_config.replace(later, optim=optim), 'rl')
  stage.checkpoint.init_from = str(folders['sft'])
  trial.run_main(stage, folders['rl'], label='rl', main=main)


def evolve_config(
  config: m2_config.RunConfig, base: pathlib.Path
) -> m2_config.RunConfig:
  """The settings of the evolve round that starts from `base`."""
  later = shortened(config, config.stages.evolve_steps, config.stages.evolve_lr)
  checkpoint = m2_config.replace(config.checkpoint, init_from=str(base))
  return m2_config.replace(
    later, mode='evolve', checkpoint=checkpoint, forge=None, stages=None
  )


def shortened(
  config: m2_config.RunConfig, steps: int, lr: float
) -> m2_config.RunConfig:
  """A later stage: its own steps and peak, a tenth at most to warm up."""
  warmup = min(config.optim.warmup, steps // 10)
  optim = m2_config.replace(config.optim, lr=lr, warmup=warmup)
  return m2_config.replace(config, steps=steps, optim=optim)


def test(
  config: m2_config.RunConfig,
  folders: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  book: ledger.Ledger,
  main: pathlib.Path,
) -> dict[str, eval_run.EvalReport]:
  """Opens TEST, once: every checkpoint answers the same tasks and seeds.

  The opening is recorded first, with what is to be evaluated. A run that was
  killed in the middle finishes the same opening; any other is refused.

  Raises:
    ledger.LedgerError: TEST was opened before for other checkpoints or tasks.
  """
  exam = sealed.last(config, config.stages.test_tasks)
  book.once(
    'test opened',
    {
      'tasks_hash': sealed.tasks_hash(config, exam),
      'seed': config.seed,
      'evaluator_hash': provenance.evaluator(),
      'checkpoints': {
        name: sealed.checkpoint_hash(folder) for name, folder in folders.items()
      },
    },
  )
  reports = {}
  for name, folder in folders.items():
    answers = workdir / 'test' / name
    reports[name] = sealed.evaluate(
      config, exam, folder, answers, label=f'test/{name}', main=main
    )
  book.once(
    'test read',
    {name: results.score(report) for name, report in reports.items()},
  )
  return reports


def collect(
  config: m2_config.RunConfig,
  folders: dict[str, pathlib.Path],
  workdir: pathlib.Path,
  reports: dict[str, eval_run.EvalReport],
  round: dict[str, Any],
  book: ledger.Ledger,
) -> dict[str, Any]:
  """`results.json`; the module docstring states its layout."""
  skills = sealed.skills(config)
  adopted = (workdir / 'evolve' / round['adopted']).resolve()
  trials = [trial.load(path.parent) for path in workdir.rglob('stage.json')]
  settings = json.loads(m2_config.to_config(config).to_json())
  return {
    'mode': config.mode,
    'seed': config.seed,
    'config_hash': provenance.digest(settings),
    'commit': provenance.commit(),
    'environment': provenance.environment(),
    'seconds': sum(one.seconds for one in trials),
    'peak_bytes': trial.own_peak_bytes()
    + max(one.peak_bytes for one in trials),
    'stages': [
      results.stage(
        name,
        folder,
        workdir / 'test' / name,
        reports[name],
        skills,
        adopted=folder == adopted,
      )
      for name, folder in folders.items()
    ],
    'differences': results.differences(reports, skills, round.get('skill')),
    'evolve': round,
    'ledger': {
      'path': 'evolve/ledger.jsonl',
      'entries': len(book.entries),
      'head': book.head,
    },
    'notes': notes(config),
  }


def notes(config: m2_config.RunConfig) -> list[str]:
  """What a reader has to know before believing a number."""
  weights = {weight for _, weight in config.tasks.skills if weight > 0}
  return [
    'The model is small and trained from nothing on this machine; the results '
    'say nothing about a model of 229B parameters.',
    'Demonstrations are written by the task generator and checked by '
    'execution: what the targeted arm gains comes from them, not from the '
    'model alone.',
    'The weakness is natural: the curriculum gives every skill the same weight.'
    if len(weights) == 1
    else 'The weakness may be planted: the curriculum gives skills different '
    'weights, and a plain rebalancing would be expected to help.',
    'TEST was opened once, after the verdict; the ledger holds what was asked '
    'and what came of it. Splits are by the column names of the table that is '
    'changed: an easy TEST task may be one of TRAIN with other names.',
    'One seed: intervals cover the choice of tasks and the sampling, not the '
    'choice of the training seed.',
  ]
