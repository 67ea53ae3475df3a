"""The least time that a program can take on its chips, and what bounds it.

Four things happen at once at best: products, memory traffic, and messages
along each mesh axis over its own links. A call takes at least as long as the
longest of them; that is a bound, not a forecast, and where nothing overlaps it
is the sum. Peaks are the makers' (`chips.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from m2.plan import chips, collectives, hlo

# Instructions that move no memory of their own.
FREE = frozenset((
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'conditional', 'call', 'partition-id', 'after-all', 'optimization-barrier',
  'async-start', 'async-update', 'async-done', 'copy-done', 'iota',
  'broadcast',
))  # fmt: skip


SLICES = frozenset(('dynamic-slice', 'slice', 'gather'))
ALIKE = frozenset(('copy', 'convert', 'fusion'))
# What is written into their first operand: the number of that operand.
IN_PLACE = {'dynamic-update-slice': 1, 'scatter': 2}


@dataclasses.dataclass(frozen=True)
class Bound:
  """Seconds of one call.

  Attributes:
    compute: products at the peak of the matrix units.
    memory: traffic of the compiled program at the peak of HBM.
    links: by mesh axis.
  """

  compute: float
  memory: float
  links: Mapping[str, float]

  @property
  def parts(self) -> dict[str, float]:
    axes = {f'links {axis}': value for axis, value in self.links.items()}
    return {'compute': self.compute, 'memory': self.memory, **axes}

  @property
  def step(self) -> float:
    return max(self.parts.values())

  @property
  def by(self) -> str:
    """The part that takes longest."""
    return max(self.parts, key=self.parts.__getitem__)


def links(
  found: Sequence[collectives.Collective], rates: Mapping[str, float]
) -> dict[str, float]:
  """Seconds that each mesh axis's links are busy.

  A collective over several axes is done axis by axis: of n devices on the
  first, each sends its share over the links of that axis, and what remains is
  an n-th. That splits its bytes as (a - 1) / a, then (b - 1) / (a b).
  """
  seconds: dict[str, float] = {}
  for one in found:
    rest, whole = 1.0, wire_share(math.prod(one.sizes))
    for axis, ways in axis_ways(one, rates):
      share = rest * wire_share(ways) / whole if whole else 1.0
      rest /= ways
      seconds[axis] = seconds.get(axis, 0.0) + one.wire * share / rates[axis]
  return seconds


def wire_share(ways: int) -> float:
  return (ways - 1) / ways


def axis_ways(one, rates):
  """Axes of a collective with their sizes, fastest links first."""
  sizes = dict(zip(one.axes, one.sizes))
  return sorted(sizes.items(), key=lambda pair: -rates[pair[0]])


def traffic(
  module: hlo.Module,
  unknown: Callable[[hlo.Instruction], float] = lambda loop: 1,
) -> float:
  """Bytes that the program's instructions read and write in HBM.

  Every operand and result of what is not inside a fusion, at the times it
  runs; slices read and write only what they touch. Kernels are counted as if
  they read each operand once, unless they declare less.
  """
  times, inside = module.times(unknown), module.fused()
  total = 0.0
  for name, lines in module.computations.items():
    if times[name] and name not in inside:
      total += times[name] * sum(_moved(module, one) for one in lines)
  return total


def _moved(module: hlo.Module, one: hlo.Instruction) -> float:
  if one.opcode in FREE:
    return 0
  sizes = [_hbm(module.by_name[name]) for name in one.operands]
  if one.opcode in SLICES:
    return 2 * min(_hbm(one), sizes[0])
  if one.opcode in IN_PLACE:
    return 2 * sizes[IN_PLACE[one.opcode]]
  if one.opcode != 'fusion':
    return min(sum(sizes) + _hbm(one), one.declared)
  body = module.computations[dict(one.called)['calls']]
  return sum(
    _read(module, body, place, size) for place, size in enumerate(sizes)
  ) + _written(module, body, one)


def _read(module, body, place: int, size: float) -> float:
  """Bytes that a fusion reads of its operand number `place`."""
  (given,) = (
    one
    for one in body
    if one.opcode == 'parameter' and one.arguments == str(place)
  )
  names, dims, total = {given.name}, given.shapes[0].dims, 0.0
  for one in body:
    used = [at for at, operand in enumerate(one.operands) if operand in names]
    if not used:
      continue
    alike = one.opcode in ALIKE and one.shapes[0].dims == dims
    if (alike or one.opcode == 'bitcast') and one is not body[-1]:
      names.add(one.name)  # made element by element, where it is used
    elif one.opcode in SLICES and used == [0]:
      total += one.bytes
    elif one.opcode == 'fusion':
      inner = module.computations[dict(one.called)['calls']]
      total += sum(_read(module, inner, at, size) for at in used)
    elif one.opcode not in IN_PLACE or used != [0]:
      return size
  return min(total, size)


def _written(module, body, fusion: hlo.Instruction) -> float:
  """Bytes that a fusion writes; updates in place are their size alone."""
  inside = {one.name: one for one in body}
  last = body[-1]
  roots = [last]
  if last.opcode == 'tuple':
    roots = [inside[name] for name in last.operands]
  total = 0.0
  for root, shape in zip(roots, fusion.shapes):
    while root.opcode == 'bitcast':
      root = inside[root.operands[0]]
    if shape.space:
      continue
    if root.opcode in IN_PLACE:
      total += inside[root.operands[IN_PLACE[root.opcode]]].bytes
    else:
      total += shape.bytes
  return total


def _hbm(one: hlo.Instruction) -> int:
  return sum(shape.bytes for shape in one.shapes if shape.space == 0)


def chip_rates(target: chips.Topology, mesh) -> dict[str, float]:
  """Bytes/s of each mesh axis that splits anything."""
  return {
    axis: chips.axis_rate(mesh, axis, target)
    for axis, ways in mesh.shape.items()
    if ways > 1
  }
