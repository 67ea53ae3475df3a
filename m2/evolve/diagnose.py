"""Names the weakest skill, with evidence that can be checked line by line.

The rule is fixed and needs no model: the weakest skill is the one whose success
rate has the lowest upper Wilson bound, which is where the most could be gained
for sure if all skills matter alike. A skill with few episodes has a high bound:
it waits for more evidence rather than win by chance.

What introspection adds is stated as it is: its fields cover the whole mixture,
so they cannot name a skill. They serve to name the rival explanation (a sick
training run) and to lower the confidence when one of them is out of range.
"""

import dataclasses
import statistics
import textwrap
from collections.abc import Sequence

from m2.evolve import observe

# How much of the way to the median skill a round is predicted to close. A
# guess made before the trial; the ledger scores it against what came.
_CLOSED = 0.5
_QUOTED = 160  # characters of a verifier's line


@dataclasses.dataclass(frozen=True)
class Evidence:
  """One fact behind a finding.

  Attributes:
    source: the file it was read from.
    text: what it says, with its numbers.
    ids: task ids to look up there; empty for run-wide facts.
  """

  source: str
  text: str
  ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
  """A weakness, why we believe in it, and what else it could be.

  Attributes:
    skill: the weakest skill.
    summary: one sentence.
    hypothesis: what goes wrong, from the largest cluster of failures.
    alternative: the explanation that would make the edit useless.
    evidence: facts, the decisive ones first.
    confidence: in [0, 1]; that this is the weakest skill and that training
      data is what it lacks.
    expects: gain in its success rate that the edit should bring, in [0, 1].
  """

  skill: str
  summary: str
  hypothesis: str
  alternative: str
  evidence: tuple[Evidence, ...]
  confidence: float
  expects: float


_HYPOTHESES = {
  'format': 'it cannot yet write a well-formed call for this skill',
  'tool': 'its statements are rejected by the database and it does not mend '
  'them',
  'unfinished': 'it runs out of turns or tokens before finishing',
  'artifact': 'its statements run but leave the wrong state',
}


def diagnose(report: observe.RunReport, source: str) -> list[Finding]:
  """Findings about the skills of a report, the weakest first.

  Args:
    report: DEV record and readings.
    source: name of the DEV evaluation, cited as where the ids are found.

  Returns:
    One finding for every skill with a failure; empty if all passed.
  """
  ranked = sorted(
    report.skills.values(), key=lambda s: (s.interval[1], s.skill)
  )
  failing = [skill for skill in ranked if skill.successes < skill.n]
  return [_finding(skill, ranked, report, source) for skill in failing]


def _finding(
  skill: observe.SkillRecord,
  ranked: Sequence[observe.SkillRecord],
  report: observe.RunReport,
  source: str,
) -> Finding:
  rate = skill.successes / skill.n
  others = [s for s in ranked if s.skill != skill.skill]
  median = statistics.median(
    [s.successes / s.n for s in others] if others else [1.0]
  )
  largest = skill.failures[0]
  sick = [reading for reading in report.readings if not reading.healthy]
  return Finding(
    skill=skill.skill,
    summary=(
      f'{skill.skill} passes {skill.successes} of {skill.n} on DEV '
      f'({rate:.0%}), the median of the other skills is {median:.0%}'
    ),
    hypothesis=_HYPOTHESES[largest.label.partition(':')[0]],
    alternative=(
      'the training run itself is at fault: '
      + '; '.join(f'{r.name} {r.value}' for r in sick)
      if sick
      else 'the skill is beyond this model, whatever its share of the data'
    ),
    evidence=(
      *_episodes(skill, others, source),
      *(
        Evidence(
          r.source,
          f'{r.name}: {r.value}{"" if r.healthy else ", OUT OF RANGE"}; covers '
          'the whole mixture, names no skill',
        )
        for r in report.readings
      ),
    ),
    confidence=_confidence(skill, others) * (0.5 if sick else 1.0),
    expects=round(max(0.0, _CLOSED * (median - rate)), 4),
  )


def _episodes(
  skill: observe.SkillRecord,
  others: Sequence[observe.SkillRecord],
  source: str,
) -> list[Evidence]:
  low, high = skill.interval
  facts = [
    Evidence(
      source,
      f'{skill.successes} of {skill.n} passed, 95% interval '
      f'[{low:.0%}, {high:.0%}]',
    )
  ]
  if others:
    rival = others[0]
    facts.append(
      Evidence(
        source,
        f'next is {rival.skill}: {rival.successes} of {rival.n}, interval '
        f'[{rival.interval[0]:.0%}, {rival.interval[1]:.0%}]',
      )
    )
  failed = skill.n - skill.successes
  facts += [
    Evidence(
      source,
      f'{cluster.count} of {failed} failures are {cluster.label}; such as: '
      f'{textwrap.shorten(cluster.example, _QUOTED)}',
      cluster.ids,
    )
    for cluster in skill.failures[:3]
  ]
  return facts


def _confidence(
  skill: observe.SkillRecord, others: Sequence[observe.SkillRecord]
) -> float:
  """Share of the other skills whose interval lies above this one's rate.

  Overlapping intervals mean that another skill may well be the weakest.
  """
  if not others:
    return 1.0
  rate = skill.successes / skill.n
  return sum(s.interval[0] > rate for s in others) / len(others)
