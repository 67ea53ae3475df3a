"""Finds the collectives of a program that do not wait for a loop of others.

On CPUs these are not in one order on all devices; see `m2.parallel.order`.
"""

from m2.plan import collectives, hlo

RUNS = frozenset(('while', 'call', 'conditional'))


def unordered(text: str) -> list[tuple[str, str]]:
  """Pairs of a loop with collectives and a later operation that has some too.

  Args:
    text: a compiled program; its instructions are in the order of its schedule.

  Returns:
    Origins of both, where the second needs nothing of the first.
  """
  module = hlo.parse(text)
  found = []
  for lines in module.computations.values():
    loops, needs = [], {}
    for one in lines:
      reached = set().union(*(needs.get(x, ()) for x in one.operands))
      if _meets(module, one):
        late = [loop for loop in loops if loop.name not in reached]
        found += [(loop.origin, one.origin) for loop in late]
        if one.opcode in RUNS:
          loops.append(one)
          reached.add(one.name)
      needs[one.name] = reached
  return found


def _meets(module: hlo.Module, one: hlo.Instruction) -> bool:
  """Whether an instruction is a collective or runs any."""
  if one.opcode in collectives.KINDS:
    return True
  return one.opcode in RUNS and any(
    _meets(module, inner)
    for _, name in one.called
    for inner in module.computations[name]
  )
