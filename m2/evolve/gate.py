"""Keep or revert: a rule written down before anything is measured.

Three checkpoints answer the same GATE tasks with the same sampling seeds: the
base, the targeted arm and the control arm (equal steps, tokens, learning rate
and seed on the unedited mixture). `RULE` is the whole decision; the ledger
holds it, with the hashes of tasks and of this file, before training starts.

Skills with few tasks. An interval over n tasks clears a margin m only if n is
large. To require it of a dozen skills with 30 tasks each would reject every
edit by noise alone; to trust the point estimates would let losses through. So
the margin has to be cleared by all other skills together, and each of them has
a veto of its own: it is *harmed*, and the edit falls, if its loss exceeds the
margin and an exact sign test finds the loss at a level that is divided by the
number of skills (Bonferroni), so that a dozen looks cost no more than one. A
skill whose own interval clears the margin, on at least ln(1 / (1 - confidence))
/ m tasks (the rule of three: fewer could hide a loss of m even if none failed),
is *cleared*; one that is neither is *unresolved*, and named as such.
"""

import collections
import dataclasses
import math
from collections.abc import Collection, Mapping

from m2 import config as m2_config
from m2.eval import run as eval_run

# Share of GATE episodes that may lack a verdict (sandbox faults and time-outs)
# before the round is void: an arm must not win because its failures vanished.
MAX_MASKED = 0.02

RULE = (
  'keep if and only if all hold on GATE, paired by task, intervals over '
  'clusters (signatures) at evolve.confidence, two-sided, by bootstrap from '
  f'{eval_run.FEW} clusters on and Student of the jackknife below: '
  '(1) gain: on the targeted skill the lower bound of targeted - base exceeds '
  'evolve.min_gain, and a one-sided exact sign test over clusters gives '
  'p <= (1 - evolve.confidence) / 2; '
  '(2) control: the same two tests of targeted - control on that skill, with '
  'bound 0; '
  '(3) nothing lost: over all other skills together the lower bound of '
  'targeted - base exceeds -evolve.max_loss, and none of the k other skills is '
  'harmed alone (loss above evolve.max_loss, and a one-sided exact sign test '
  'of the loss over its clusters gives p <= (1 - evolve.confidence) / k); '
  f'(4) at most {MAX_MASKED:.0%} of the episodes of any arm have no verdict. '
  'Otherwise revert: the adopted pointer stays.'
)


class GateError(RuntimeError):
  """The arms did not answer the same tasks; nothing can be decided."""


@dataclasses.dataclass(frozen=True)
class Effect:
  """A paired difference of success rates, after minus before.

  Attributes:
    n: tasks compared.
    clusters: distinct signatures among them.
    mean: difference of the rates, in [-1, 1].
    interval: of the mean, over clusters; see `eval_run.paired`.
    p: one-sided exact sign test over clusters that the difference is above 0.
    p_loss: the same that it is below 0.
  """

  n: int
  clusters: int
  mean: float
  interval: tuple[float, float]
  p: float
  p_loss: float


@dataclasses.dataclass(frozen=True)
class Decision:
  """What the rule says, and the figures that it used.

  Attributes:
    verdict: keep or revert.
    reasons: one sentence a part of the rule, failed parts first.
    gain: targeted - base on the targeted skill.
    over_control: targeted - control on the targeted skill.
    protected: every other skill: targeted - base, and its status.
    others: targeted - base over all other skills; None if there are none.
  """

  verdict: str
  reasons: tuple[str, ...]
  gain: Effect
  over_control: Effect
  protected: Mapping[str, tuple[Effect, str]]
  others: Effect | None


def decide(
  base: eval_run.EvalReport,
  targeted: eval_run.EvalReport,
  control: eval_run.EvalReport,
  skill: str,
  cfg: m2_config.EvolveConfig,
) -> Decision:
  """Applies `RULE`.

  Args:
    base: GATE report of the checkpoint the round started from.
    targeted: of the arm trained on the edited mixture.
    control: of the arm trained as long on the unedited mixture.
    skill: the one that the edit targets.
    cfg: confidence, min_gain, max_loss.

  Returns:
    The decision.

  Raises:
    GateError: the reports are not of the same tasks and trials, or none is of
      `skill`.
  """
  arms = {'base': base, 'targeted': targeted, 'control': control}
  _check_same_tasks(arms, skill)
  gain = compare(base, targeted, [skill], cfg.confidence)
  over_control = compare(control, targeted, [skill], cfg.confidence)
  names = sorted({row.skill for row in base.rows} - {skill})
  protected = {}
  for name in names:
    effect = compare(base, targeted, [name], cfg.confidence)
    protected[name] = (effect, status(effect, len(names), cfg))
  others = compare(base, targeted, names, cfg.confidence) if names else None
  parts = [
    _above(f'gain on {skill}', gain, cfg.min_gain, cfg),
    _above(f'{skill} against the control', over_control, 0.0, cfg),
    _together(others, cfg),
    _alone(protected),
    _masked(arms),
  ]
  return Decision(
    verdict='keep' if all(holds for holds, _ in parts) else 'revert',
    reasons=tuple(
      f'{"holds" if holds else "FAILS"}: {text}'
      for holds, text in sorted(parts, key=lambda part: part[0])
    ),
    gain=gain,
    over_control=over_control,
    protected=protected,
    others=others,
  )


def _above(
  what: str, effect: Effect, bound: float, cfg: m2_config.EvolveConfig
) -> tuple[bool, str]:
  most = (1 - cfg.confidence) / 2
  return effect.interval[0] > bound and effect.p <= most, (
    f'{what} is {_words(effect)}, sign test p={effect.p:.3g}; lower bound to '
    f'exceed {bound:+.1%}, p at most {most:.3g}'
  )


def _together(
  others: Effect | None, cfg: m2_config.EvolveConfig
) -> tuple[bool, str]:
  if others is None:
    return True, 'there is no other skill to lose'
  return others.interval[0] > -cfg.max_loss, (
    f'the other skills together are {_words(others)}; lower bound to exceed '
    f'{-cfg.max_loss:+.1%}'
  )


def _alone(protected: Mapping[str, tuple[Effect, str]]) -> tuple[bool, str]:
  by_state = collections.defaultdict(dict)
  for name, (effect, state) in protected.items():
    by_state[state][name] = effect
  if harmed := by_state['harmed']:
    return False, 'harmed: ' + '; '.join(
      f'{name} {_words(effect)}' for name, effect in harmed.items()
    )
  text = (
    f'of {len(protected)} other skills none is harmed, '
    f'{len(by_state["cleared"])} are cleared one by one'
  )
  if unresolved := by_state['unresolved']:
    named = (f'{name} (n={effect.n})' for name, effect in unresolved.items())
    text += f', too few tasks to tell: {", ".join(named)}'
  return True, text


def _masked(arms: Mapping[str, eval_run.EvalReport]) -> tuple[bool, str]:
  arm, share = max(
    (
      (name, sum(not row.judged for row in report.rows) / len(report.rows))
      for name, report in arms.items()
    ),
    key=lambda pair: pair[1],
  )
  return share <= MAX_MASKED, (
    f'{share:.1%} of the episodes of {arm} have no verdict, the most of any '
    f'arm; at most {MAX_MASKED:.0%}'
  )


def _words(effect: Effect) -> str:
  low, high = effect.interval
  return f'{effect.mean:+.1%} [{low:+.1%}, {high:+.1%}] (n={effect.n})'


def _check_same_tasks(
  arms: Mapping[str, eval_run.EvalReport], skill: str
) -> None:
  keys = {
    name: [(row.task, row.trial) for row in report.rows]
    for name, report in arms.items()
  }
  for name, found in keys.items():
    if len(set(found)) != len(found):
      raise GateError(f'{name} answered a GATE task twice in one trial')
    if set(found) != set(keys['base']):
      raise GateError(
        f'{name} and base answered different GATE tasks; evaluate them with '
        'the same settings and seed'
      )
  if not any(row.skill == skill for row in arms['base'].rows):
    raise GateError(f'no GATE task exercises {skill!r}')


def compare(
  before: eval_run.EvalReport,
  after: eval_run.EvalReport,
  skills: Collection[str] | None,
  confidence: float,
) -> Effect:
  """The paired effect on the tasks of some skills; None means all."""
  if skills is not None:
    before, after = only(before, skills), only(after, skills)
  paired = eval_run.paired(before, after, confidence=confidence)
  wins = sum(change > 0 for change in paired.by_cluster.values())
  losses = sum(change < 0 for change in paired.by_cluster.values())
  return Effect(
    n=paired.n,
    clusters=len(paired.by_cluster),
    mean=paired.mean,
    interval=paired.interval,
    p=sign_test(wins, losses),
    p_loss=sign_test(losses, wins),
  )


def only(
  report: eval_run.EvalReport, skills: Collection[str]
) -> eval_run.EvalReport:
  """The part of a report that exercises some skills."""
  rows = tuple(row for row in report.rows if row.skill in skills)
  return dataclasses.replace(report, rows=rows)


def sign_test(wins: int, losses: int) -> float:
  """P(at least `wins` heads in wins + losses fair tosses); 1.0 for none.

  Exact at any size, where a bootstrap of a few clusters is too sure.
  """
  total = wins + losses
  heads = sum(math.comb(total, k) for k in range(wins, total + 1))
  return heads / 2**total


def status(effect: Effect, skills: int, cfg: m2_config.EvolveConfig) -> str:
  """Cleared, harmed or unresolved: see the top of this file."""
  alpha = 1 - cfg.confidence
  if effect.mean < -cfg.max_loss and effect.p_loss <= alpha / skills:
    return 'harmed'
  enough = effect.n >= math.log(1 / alpha) / cfg.max_loss
  if enough and effect.interval[0] > -cfg.max_loss:
    return 'cleared'
  return 'unresolved'
