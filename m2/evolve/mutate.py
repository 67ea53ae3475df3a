"""Findings become typed edits; the applier lets nothing else through.

A proposer, whether rules, a language model or the model under training, hands
over data: `ConfigEdit(path, old, new)`. `apply_edits` is the only way from
there to a config. It knows the few paths that may change (`RULES`), their
types, ranges and steps, and how they hang together (`_check_mixture`). All the
rest (evaluation, splits, seeds, budgets, the gate) is frozen: no rule matches
it, so there is no list of forbidden names to forget one in.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import ml_collections

from m2.evolve import diagnose

MAX_EDITS = 2  # per proposal: one mechanism at a time
REPLAY = 0.2  # least part of its old share that every skill keeps
_ROUNDING = 1e-9  # of shares computed from weights


@dataclasses.dataclass(frozen=True)
class ConfigEdit:
  """One change of one leaf.

  Attributes:
    path: dotted path of the leaf, such as 'tasks.skills.add_col'.
    old: the value the proposer saw; must be the value that is there.
    new: the value it wants; of the same type.
  """

  path: str
  old: int | float
  new: int | float


@dataclasses.dataclass(frozen=True)
class Mutation:
  """A proposal: what to change, why, and what should come of it.

  Attributes:
    edits: at most `MAX_EDITS`.
    skill: the skill it is meant to help.
    why: one sentence.
    expects: predicted gain in success rate on `skill`, in [0, 1].
  """

  edits: tuple[ConfigEdit, ...]
  skill: str
  why: str
  expects: float


@dataclasses.dataclass(frozen=True)
class Rule:
  """Bounds of the leaves that one pattern of the allow-list covers.

  Attributes:
    type: exact type of the value; bool is not an int here.
    low, high: closed range of the new value.
    step: largest absolute change; 0 = not bounded so.
  """

  type: type
  low: float
  high: float
  step: float = 0.0


# Path pattern -> bounds; '*' stands for one existing key of that section.
# Weights have no unit: `_check_mixture` bounds their shares.
RULES: dict[str, Rule] = {
  'tasks.skills.*': Rule(float, 0.0, 1e100),
  'tasks.difficulty_min': Rule(int, 0, 4, step=1),
  'tasks.difficulty_max': Rule(int, 0, 4, step=1),
}


class EditError(ValueError):
  """A proposal that the allow-list does not let through."""


def propose(
  finding: diagnose.Finding,
  config: ml_collections.ConfigDict,
  targeted: float,
) -> Mutation:
  """Moves a share of the task mixture to the weak skill.

  The new mixture is `targeted` parts of the skill alone and `1 - targeted`
  parts of the old mixture (replay), expressed as one edit: a higher weight.

  Args:
    finding: names the skill.
    config: holds `tasks.skills`, the mixture as it is.
    targeted: share moved, in (0, 1).

  Returns:
    The proposal.
  """
  weights = config.tasks.skills.to_dict()
  old = weights[finding.skill]
  others = sum(weights.values()) - old
  share = targeted + (1 - targeted) * old / (old + others)
  if not others:
    raise EditError(
      f'tasks.skills holds only {finding.skill!r}: there is no mixture to shift'
    )
  edit = ConfigEdit(
    f'tasks.skills.{finding.skill}', old, others * share / (1 - share)
  )
  return Mutation(
    edits=(edit,),
    skill=finding.skill,
    why=finding.summary,
    expects=finding.expects,
  )


def apply_edits(
  config: ml_collections.ConfigDict, edits: Sequence[ConfigEdit]
) -> ml_collections.ConfigDict:
  """A copy of `config` with the edits applied, or an error and no change.

  Args:
    config: the base; not modified.
    edits: the proposal.

  Returns:
    A locked copy that differs from `config` at the edited leaves only.

  Raises:
    EditError: no sequence of edits, or too many, a path the allow-list does not
      cover, a stale `old`, a wrong type, a value out of range or too far from
      the old one, or a combination that would drop a skill's replay.
  """
  try:
    edits = tuple(edits)
  except TypeError:
    raise EditError(
      f'{_show(edits)} is no sequence of edits; a proposal is a list of '
      'ConfigEdit'
    ) from None
  if not 0 < len(edits) <= MAX_EDITS:
    raise EditError(f'{len(edits)} edits; a proposal has 1 to {MAX_EDITS}')
  edited = ml_collections.ConfigDict(config.to_dict()).lock()
  seen = set()
  for edit in edits:
    if type(edit) is not ConfigEdit or type(edit.path) is not str:
      raise EditError(f'{_show(edit)} is not a ConfigEdit with a string path')
    if edit.path in seen:
      raise EditError(f'{edit.path} is edited twice')
    seen.add(edit.path)
    *above, leaf = edit.path.split('.')
    section = edited
    rule = _rule(edit.path)
    for name in above:
      section = section[name]
    if leaf not in section:
      raise EditError(f'{edit.path} does not exist; edits add no keys')
    _check_value(edit, rule, section[leaf])
    section[leaf] = edit.new
  _check_mixture(config, edited)
  return edited


def _rule(path: str) -> Rule:
  parts = path.split('.')
  for pattern, rule in RULES.items():
    names = pattern.split('.')
    if len(names) == len(parts) and all(
      name in ('*', part) for name, part in zip(names, parts)
    ):
      return rule
  raise EditError(
    f'{path} is frozen; a proposal may edit {", ".join(RULES)} only'
  )


def _check_value(edit: ConfigEdit, rule: Rule, current: int | float) -> None:
  for name, value in (('old', edit.old), ('new', edit.new)):
    if type(value) is not rule.type:
      raise EditError(
        f'{edit.path}: {name}={_show(value)} is a {type(value).__name__}, '
        f'expected {rule.type.__name__}'
      )
  if edit.old != current:
    raise EditError(
      f'{edit.path}: the proposal saw {_show(edit.old)}, the config holds '
      f'{current!r}; diagnose again'
    )
  if not rule.low <= edit.new <= rule.high:  # NaN is in no range
    raise EditError(
      f'{edit.path}: {_show(edit.new)} is not in [{rule.low:g}, {rule.high:g}]'
    )
  if rule.step and abs(edit.new - edit.old) > rule.step:
    raise EditError(
      f'{edit.path}: {edit.old!r} to {edit.new!r} is more than {rule.step:g} '
      'in one round'
    )


def _show(value: Any) -> str:
  """How an error names a value: by its type where it cannot be written."""
  try:
    return repr(value)
  except Exception:  # such as an int of more digits than Python writes
    return f'a {type(value).__name__}'


def _check_mixture(
  base: ml_collections.ConfigDict, edited: ml_collections.ConfigDict
) -> None:
  """Coupling: difficulties stay ordered, and every skill keeps its replay."""
  low, high = edited.tasks.difficulty_min, edited.tasks.difficulty_max
  if low > high:
    raise EditError(
      f'tasks.difficulty_min={low} would exceed tasks.difficulty_max={high}'
    )
  if not any(edited.tasks.skills.values()):
    raise EditError('tasks.skills would have no weight above 0')
  old, new = shares(base), shares(edited)
  for skill, share in old.items():
    if not base.tasks.skills[skill] and edited.tasks.skills[skill]:
      raise EditError(
        f'tasks.skills.{skill} has weight 0: it is held out of training'
      )
    if new[skill] < REPLAY * share * (1 - _ROUNDING):
      raise EditError(
        f'tasks.skills.{skill} would fall from {share:.1%} to '
        f'{new[skill]:.1%} of the mixture; at least {REPLAY:.0%} of its share '
        'stays as replay'
      )


def shares(config: ml_collections.ConfigDict) -> dict[str, float]:
  """The share of every skill in the task mixture; sums to 1."""
  weights = config.tasks.skills.to_dict()
  total = math.fsum(weights.values())
  return {skill: weight / total for skill, weight in weights.items()}
