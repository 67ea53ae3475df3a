"""The text of a compiled program: its instructions and how often each runs.

XLA prints a module as computations of one instruction a line. Fusions, calls
and loops name the computations that they run, so the times a computation runs
follow from the entry down: a loop's body runs its trip count for each time of
the loop. XLA's own cost analysis counts a body once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

DTYPE_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
  's32': 32, 'u32': 32, 's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16,
  'f32': 32, 'f64': 64, 'c64': 64, 'f8e4m3fn': 8, 'f8e5m2': 8, 'token': 0,
}  # fmt: skip

_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$')
_START = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = ')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
  r'\b(calls|to_apply|body|condition|branch_computations|'
  r'true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)'
)
_DECLARED = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array of an instruction's result.

  Attributes:
    dtype: as XLA spells it.
    dims: sizes.
    space: memory space; 0 is the main memory, on TPUs HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def bytes(self) -> int:
    return math.prod(self.dims) * DTYPE_BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the module.
    opcode: such as fusion or all-gather.
    shapes: arrays of the result, tuples flattened.
    operands: names.
    text: everything after the operands: attributes and metadata.
    called: (attribute, computation) of what it runs.
    arguments: what stands between its parentheses.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  text: str
  called: tuple[tuple[str, str], ...]
  arguments: str

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  @property
  def declared(self) -> float:
    """Bytes that a kernel says it moves; infinity where nothing is said."""
    found = _DECLARED.search(self.text)
    return float(found[1]) if found else math.inf

  @property
  def origin(self) -> str:
    """The path of named scopes and operations that it was traced from."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ''


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program.

  Attributes:
    computations: name -> instructions in order.
    entry: name of the computation that runs first.
  """

  computations: dict[str, tuple[Instruction, ...]]
  entry: str

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {
      one.name: one for lines in self.computations.values() for one in lines
    }

  def times(
    self, unknown: Callable[[Instruction], float] = lambda loop: 1
  ) -> dict[str, float]:
    """How often each computation runs in one call of the program.

    Args:
      unknown: trips of a loop that ends on a condition of the data.
    """
    total = dict.fromkeys(self.computations, 0)

    def run(name: str, count: float) -> None:
      total[name] += count
      for one in self.computations[name]:
        for attribute, callee in one.called:
          trips = 1
          if one.opcode == 'while':
            trips = self.trips(one)
            trips = unknown(one) if trips is None else trips
            trips += attribute == 'condition'
          run(callee, count * trips)

    run(self.entry, 1)
    return total

  def trips(self, loop: Instruction) -> int | None:
    """The trip count of a while loop, if the program holds it.

    XLA's own note of it, or the bound of a counter: jax counts up from 0 by
    one, and no pass that keeps the comparison changes that.
    """
    if found := _TRIPS.search(loop.text):
      return int(found[1])
    condition = dict(loop.called)['condition']
    last = self.computations[condition][-1]
    if last.opcode != 'compare' or 'direction=LT' not in last.text:
      return None
    bound = self.by_name[last.operands[1]]
    return int(bound.arguments) if bound.opcode == 'constant' else None

  def fused(self) -> frozenset[str]:
    """Computations inside fusions and reductions: no memory of their own."""
    found = set()

    def add(name: str) -> None:
      found.add(name)
      for one in self.computations[name]:
        for _, callee in one.called:
          add(callee)

    for one in self.by_name.values():
      for attribute, callee in one.called:
        if one.opcode == 'fusion' or attribute == 'to_apply':
          add(callee)
    return frozenset(found)


def parse(text: str) -> Module:
  """Parses what `jax.stages.Compiled.as_text` gives.

  Raises:
    ValueError: a program without an entry computation.
  """
  computations: dict[str, tuple[Instruction, ...]] = {}
  entry = name = ''
  lines: list[Instruction] = []
  for line in text.splitlines():
    if head := _HEAD.match(line):
      name, lines = head[2], []
      entry = name if head[1] else entry
    elif line.startswith('}'):
      computations[name] = tuple(lines)
    elif found := _START.match(line):
      lines.append(_instruction(found[1], line[found.end() :]))
  if not entry:
    raise ValueError('no ENTRY computation in this text: not an HLO module')
  return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
  """`rest` is all that follows `%name = `."""
  kind, rest = _split_type(rest)
  opcode, _, rest = rest.strip().partition('(')
  arguments, text = _until_closed(rest)
  called = tuple(
    (attribute, callee)
    for attribute, names in _CALLED.findall(text)
    for callee in _NAME.findall(names)
  )
  operands = tuple(_NAME.findall(arguments))
  return Instruction(
    name, opcode, tuple(shapes(kind)), operands, text, called, arguments
  )


def _split_type(text: str) -> tuple[str, str]:
  """A type, array or tuple, and what follows it."""
  if text.startswith('('):
    inside, rest = _until_closed(text[1:])
    return inside, rest
  kind, _, rest = text.partition(' ')
  return kind, rest


def _until_closed(text: str) -> tuple[str, str]:
  """What stands before the parenthesis that closes one already open."""
  depth = 1
  for found in re.finditer(r'[()]', text):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return text[: found.start()], text[found.end() :]
  raise ValueError(f'unbalanced parentheses: {text[:80]!r}')


def shapes(text: str) -> Iterator[Shape]:
  """Every array shape in a type."""
  for dtype, dims, layout in _SHAPE.findall(text):
    if dtype in DTYPE_BITS:
      space = re.search(r'S\((\d+)\)', layout)
      sizes = tuple(int(size) for size in dims.split(',') if size)
      yield Shape(dtype, sizes, int(space[1]) if space else 0)
