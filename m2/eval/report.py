"""An evaluation as a table; every rate with its n and 95% interval."""

from m2 import types
from m2.eval import run


def table(report: run.EvalReport) -> str:
  """A line for each skill, then all of them."""
  lines = [f'{"skill":<26}{"passed":>12}{"rate":>8}   95% interval']
  for name, part in [*report.skills().items(), ('all', report)]:
    if not part.n:
      lines.append(f'{name:<26}{"0 / 0":>12}{"-":>8}   -')
      continue
    low, high = run.interval(part)
    count = f'{part.successes} / {part.n}'
    rate = f'{part.successes / part.n:.1%}'
    lines.append(f'{name:<26}{count:>12}{rate:>8}   [{low:.1%}, {high:.1%}]')
  masked = len(report.rows) - report.n
  if masked:
    lines.append(f'{masked} episodes have no verdict and count nowhere')
  full = sum(row.stop == types.StopReason.CONTEXT for row in report.rows)
  if full:
    lines.append(f'{full} episodes ran out of context (engine.length)')
  return '\n'.join(lines)
