"""One round of self-evolution: observe, diagnose, edit, try, keep or revert.

    ledger.jsonl      entry 0 is the pre-registered rule; then every step
    dev/              the checkpoint on DEV, logs visible to the diagnosis
    targeted/         fine-tuned on the edited mixture
    control/          fine-tuned as long on the unedited mixture
    gate/<arm>/       all three on GATE; the proposer never sees these
    round.json        the whole round, to read
    adopted.json      pointer to the checkpoint in force, replaced in one step

Every step is a `main.py` of its own (m2/evolve/trial.py). A round that was
killed goes on where it was; what it finds must equal what the ledger holds.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from m2 import config as m2_config
from m2.eval import run as eval_run
from m2.evolve import (
  diagnose,
  gate,
  ledger,
  mutate,
  observe,
  provenance,
  sealed,
  trial,
)

ARMS = ('base', 'targeted', 'control')


def run(
  config: m2_config.RunConfig,
  workdir: pathlib.Path,
  *,
  main: pathlib.Path = trial.MAIN,
) -> dict[str, Any]:
  """Runs one round on `config.checkpoint.init_from`.

  Args:
    config: of mode evolve; `tasks.skills` is the curriculum to be edited.
    workdir: folder of the round.
    main: the script that every step runs.

  Returns:
    What `round.json` holds; `verdict` is keep, revert, or none when no skill
    of the curriculum fails on DEV.

  Raises:
    ValueError: the config has no curriculum, or no checkpoint to start from.
    trial.TrialError: a step failed; the message ends with its log.
    ledger.LedgerError: the ledger was changed, or holds another round.
  """
  workdir = pathlib.Path(workdir).resolve()
  base = starting_point(config)
  with ledger.Ledger(workdir / 'ledger.jsonl') as book:
    return Round(config, base, workdir, main, book).run()


class Round:
  """One round in its folder; see `run`."""

  def __init__(
    self,
    config: m2_config.RunConfig,
    base: pathlib.Path,
    workdir: pathlib.Path,
    main: pathlib.Path,
    book: ledger.Ledger,
  ):
    self.base = base
    self.config = with_tokenizer(config, base)
    self.workdir = workdir
    self.main = main
    self.book = book

  def run(self) -> dict[str, Any]:
    """All steps in order; each is skipped if it is done already."""
    first = self.register()
    if not (self.workdir / 'adopted.json').exists():
      self.adopt(self.base, first.hash)
    self.evaluate('dev', self.dev(), self.base)
    mutation, finding = self.propose()
    if mutation is None:
      done = self.book.once('decided', {'verdict': 'none'})
      return self.close({'verdict': 'none', 'ledger': done.hash})
    for arm in ARMS[1:]:
      self.train(arm, mutation)
    decision = self.decide(mutation.skill)
    done = self.book.once('decided', _decided(decision, mutation))
    if decision.verdict == 'keep':
      self.adopt(self.workdir / 'targeted', done.hash)
    return self.close(
      {
        **_decided(decision, mutation),
        'why': finding.summary,
        'hypothesis': finding.hypothesis,
        'alternative': finding.alternative,
        'confidence': finding.confidence,
        'evidence': [dataclasses.asdict(fact) for fact in finding.evidence],
        'edits': [dataclasses.asdict(edit) for edit in mutation.edits],
        'ledger': done.hash,
      }
    )

  def register(self) -> ledger.Entry:
    """Writes entry 0: the rule, the arms and every hash they depend on."""
    settings = json.loads(m2_config.to_config(self.config).to_json())
    return self.book.once(
      'registered',
      {
        'rule': gate.RULE,
        'arms': list(ARMS),
        'seeds': {'training': self.seed, 'evaluation': self.config.seed},
        'config_hash': provenance.digest(settings),
        'evolve': settings['evolve'],
        'checkpoint': self.relative(self.base),
        'checkpoint_hash': sealed.checkpoint_hash(self.base),
        'evaluator_hash': provenance.evaluator(),
        'dev_hash': sealed.tasks_hash(self.config, self.dev()),
      },
    )

  @property
  def seed(self) -> int:
    """Seed of both arms; a new one draws examples the base has not seen."""
    return self.config.seed + 1

  def propose(
    self,
  ) -> tuple[mutate.Mutation | None, diagnose.Finding | None]:
    """Diagnoses DEV and records the edit, before anything is trained."""
    report = observe.observe(
      self.workdir / 'dev' / 'eval.json', self.base, sealed.skills(self.config)
    )
    findings = diagnose.diagnose(report, 'dev/eval.json')
    if not findings:
      return None, None
    finding = findings[0]
    mutation = mutate.propose(
      finding, self.control(), self.config.evolve.targeted
    )
    mutate.apply_edits(self.control(), mutation.edits)  # or nothing is run
    self.book.once(
      'proposed',
      {
        'finding': dataclasses.asdict(finding),
        'runners_up': [other.skill for other in findings[1:3]],
        'edits': [dataclasses.asdict(edit) for edit in mutation.edits],
        'predicted': mutation.expects,
        'gate_hash': sealed.tasks_hash(self.config, self.gate(mutation.skill)),
      },
    )
    print(
      f'weakest skill: {finding.summary}; {finding.hypothesis} '
      f'(confidence {finding.confidence:.2f})'
    )
    return mutation, finding

  def control(self) -> ml_collections.ConfigDict:
    """The fine-tuning as it is without the edit."""
    stage = trial.child(self.config, 'sft')
    stage.seed = self.seed
    stage.checkpoint.init_from = str(self.base)
    return stage.lock()

  def train(self, arm: str, mutation: mutate.Mutation) -> None:
    """Fine-tunes one arm from the base; the arms differ by the edit alone."""
    stage = self.control()
    if arm == 'targeted':
      stage = mutate.apply_edits(stage, mutation.edits)
    trial.run_main(
      stage, self.workdir / arm, label=f'evolve/{arm}', main=self.main
    )
    self.book.once(
      f'trained {arm}',
      {
        'checkpoint_hash': sealed.checkpoint_hash(self.workdir / arm),
        'mixture': mutate.shares(stage),
        'steps': stage.steps,
        'slots': stage.steps * stage.data.batch * stage.data.length,
        'tokens': observe.trained_tokens(self.workdir / arm),
        'lr': stage.optim.lr,
        'seed': stage.seed,
      },
    )

  def decide(self, skill: str) -> gate.Decision:
    """Evaluates the arms on GATE and applies the registered rule."""
    folders = {
      'base': self.base,
      'targeted': self.workdir / 'targeted',
      'control': self.workdir / 'control',
    }
    reports = {
      arm: self.evaluate(f'gate/{arm}', self.gate(skill), folder)
      for arm, folder in folders.items()
    }
    registered = self.book.find('registered').data['evaluator_hash']
    if provenance.evaluator() != registered:
      raise ledger.LedgerError(
        'the evaluator (main.py, m2, pallas_kernels, configs/scaffold) changed '
        'during the round; nothing it measured can be compared. Start a new '
        'workdir'
      )
    return gate.decide(
      reports['base'],
      reports['targeted'],
      reports['control'],
      skill,
      self.config.evolve,
    )

  def evaluate(
    self, name: str, exam: sealed.Exam, checkpoint: pathlib.Path
  ) -> eval_run.EvalReport:
    """One checkpoint answers an exam; the ledger keeps what came of it."""
    report = sealed.evaluate(
      self.config,
      exam,
      checkpoint,
      self.workdir / name,
      label=f'evolve/{name}',
      main=self.main,
    )
    self.book.once(
      f'evaluated {name}',
      {
        'n': sum(row.judged for row in report.rows),
        'successes': sum(row.judged and row.passed for row in report.rows),
        'report_hash': provenance.fingerprint(
          [self.workdir / name / 'eval.json'], self.workdir
        ),
      },
    )
    return report

  def dev(self) -> sealed.Exam:
    return sealed.even(self.config, 'dev', self.config.evolve.dev_tasks)

  def gate(self, skill: str) -> sealed.Exam:
    evolve = self.config.evolve
    return sealed.focused(
      self.config, 'gate', evolve.gate_tasks, skill, evolve.gate_share
    )

  def relative(self, path: pathlib.Path) -> str:
    return os.path.relpath(path, self.workdir)

  def adopt(self, checkpoint: pathlib.Path, hash: str) -> None:
    """Points at the checkpoint in force; readers see the old or the new."""
    provenance.write_json(
      self.workdir / 'adopted.json',
      {
        'checkpoint': self.relative(checkpoint),
        'checkpoint_hash': sealed.checkpoint_hash(checkpoint),
        'config': self.relative(observe.run_of(checkpoint) / 'config.json'),
        'ledger': hash,
      },
    )

  def close(self, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `round.json` and says how it ended."""
    adopted = json.loads((self.workdir / 'adopted.json').read_text())
    round = {
      'verdict': summary['verdict'],
      'adopted': adopted['checkpoint'],
      **summary,
    }
    provenance.write_json(self.workdir / 'round.json', round)
    print(f'evolve verdict: {round["verdict"]}')
    for reason in round.get('reasons', ('no skill fails on DEV',)):
      print(f'  {reason}')
    return round


def starting_point(config: m2_config.RunConfig) -> pathlib.Path:
  """The checkpoint that a round starts from, checked with the rest it needs.

  Raises:
    ValueError: no such checkpoint, or see `check_curriculum`.
  """
  if not config.checkpoint.init_from:
    raise ValueError(
      'checkpoint.init_from is empty: a round starts from a trained checkpoint'
    )
  base = pathlib.Path(config.checkpoint.init_from).resolve()
  if not base.is_dir():
    raise ValueError(f'checkpoint.init_from={str(base)!r} is not a directory')
  if base.name == 'checkpoints':
    base = observe.run_of(base)  # its newest step either way
  check_curriculum(config)
  return base


def check_curriculum(config: m2_config.RunConfig) -> None:
  """Refuses settings under which there is no mixture to edit.

  Raises:
    ValueError: no list of skills, data that is not the tasks, or evaluations
      too small to ask for every skill.
  """
  if len(sealed.skills(config)) < 2:
    raise ValueError(
      'tasks.skills has fewer than two with a weight; list all of the '
      'curriculum with their weights, since a round moves weight between them'
    )
  if config.data.source != 'tasks':
    raise ValueError(
      f'data.source={config.data.source!r}: a round fine-tunes on the '
      "demonstrations of the curriculum; set data.source='tasks'"
    )
  asked = {
    'evolve.dev_tasks': config.evolve.dev_tasks,
    'evolve.gate_tasks': config.evolve.gate_tasks,
  }
  if config.stages:
    asked['stages.test_tasks'] = config.stages.test_tasks
  skills = len(sealed.skills(config))
  for name, count in asked.items():
    if count < skills:
      raise ValueError(
        f'{name}={count} is below the {skills} skills of tasks.skills: each '
        'needs a task at least'
      )


def with_tokenizer(
  config: m2_config.RunConfig, base: pathlib.Path
) -> m2_config.RunConfig:
  """Uses the tokenizer of the base unless the config names one."""
  if config.data.tokenizer:
    return config
  data = m2_config.replace(
    config.data, tokenizer=str(observe.run_of(base) / 'tokenizer.json')
  )
  return m2_config.replace(config, data=data)


def _decided(
  decision: gate.Decision, mutation: mutate.Mutation
) -> dict[str, Any]:
  """The decision as JSON: verdict, reasons, predicted and measured effects."""
  return {
    'verdict': decision.verdict,
    'reasons': list(decision.reasons),
    'skill': mutation.skill,
    'predicted': mutation.expects,
    'gain': dataclasses.asdict(decision.gain),
    'over_control': dataclasses.asdict(decision.over_control),
    'protected': {
      name: {**dataclasses.asdict(effect), 'status': status}
      for name, (effect, status) in decision.protected.items()
    },
    'others': decision.others and dataclasses.asdict(decision.others),
  }
