"""Collectives of a compiled program: kind, mesh axes, bytes on the wire.

Bytes are what one device sends in one call of the program, by the usual ring:
of an array of S bytes that n devices share, all-gather and reduce-scatter send
S (n - 1) / n, all-reduce twice that, all-to-all S (n - 1) / n, and a permute
S. S is the whole array, gathered or not yet scattered. Any algorithm that is
optimal in bandwidth sends as much.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from m2.plan import hlo

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# The TPU compiler's reduce-scatter is a fusion of all-reduce and slice.
_SCATTERED = 'all-reduce-scatter'
# An asynchronous one is written out in every fusion that it runs beside.
_GOES_ON = re.compile(
  r'"async_collective_fusion_config":\{"flag_start":"(?!-1")'
)
_EXPLICIT = re.compile(r'replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}')
_IOTA = re.compile(
  r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}')
_PAIRS = re.compile(r'source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    name: of the instruction.
    kind: one of `KINDS`.
    axes: mesh axes over which its groups reach.
    sizes: how many places along each of these axes a group has; those of the
      whole axes for a permute.
    ways: devices of a group.
    size: bytes of the whole array: gathered, or before it is scattered; of a
      permute, what a device sends on average.
    dtype: of its first array.
    times: how often it runs in one call of the program.
    origin: the operations that it was traced from.
  """

  name: str
  kind: str
  axes: tuple[str, ...]
  sizes: tuple[int, ...]
  ways: int
  size: float
  dtype: str
  times: float
  origin: str

  @property
  def wire(self) -> float:
    """Bytes that one device sends, all times together."""
    return self.times * wire_bytes(self.kind, self.size, self.ways)


def wire_bytes(kind: str, size: float, ways: int) -> float:
  """Bytes that each of `ways` devices sends for an array of `size` bytes."""
  if kind == 'collective-permute':
    return size
  share = (ways - 1) / ways
  return size * share * (2 if kind == 'all-reduce' else 1)


def find(
  module: hlo.Module,
  mesh: Mapping[str, int],
  *,
  unknown: Callable[[hlo.Instruction], float] = lambda loop: 1,
) -> list[Collective]:
  """The collectives of a program that was partitioned over `mesh`.

  Args:
    module: the parsed program.
    mesh: axis sizes in the order of the mesh; partition i is the device at
      position i of the flattened mesh.
    unknown: trips of a loop whose count is not in the program.

  Raises:
    ValueError: replica groups in a form that is not known here.
  """
  times = module.times(unknown)
  found = []
  for computation, lines in module.computations.items():
    for one in lines:
      kind = one.opcode.removesuffix('-start')
      if kind == 'all-reduce' and computation.startswith(_SCATTERED):
        kind = 'reduce-scatter'
      if kind in KINDS and times[computation] and not _GOES_ON.search(one.text):
        found.append(_read(one, kind, mesh, times[computation]))
  return found


def _read(one, kind, mesh, times) -> Collective:
  pairs = groups(one.text, math.prod(mesh.values()))
  reached = reach(pairs, mesh)
  ways = pairs.shape[1]
  arrays = one.shapes
  if one.opcode.endswith('-start') and kind != 'all-reduce':
    # (operands, results, scratch): as many results as operands.
    arrays = arrays[len(one.operands) : 2 * len(one.operands)]
  size = sum(shape.bytes for shape in arrays)
  if one.opcode.startswith('reduce-scatter'):
    size *= ways
  if kind == 'collective-permute':
    # The mean: a device that is sent its own block sends nothing.
    size *= (pairs[:, 0] != pairs[:, 1]).sum() / math.prod(mesh.values())
    reached = {axis: mesh[axis] for axis in reached}
    ways = math.prod(reached.values())
  return Collective(
    one.name,
    kind,
    tuple(reached),
    tuple(reached.values()),
    ways,
    size,
    arrays[0].dtype,
    times,
    one.origin,
  )


def groups(text: str, devices: int) -> np.ndarray:
  """int[groups, members]: who talks to whom, as the attributes say.

  Raises:
    ValueError: no such attribute, or groups of different sizes.
  """
  if found := _MESH.search(text):
    return _of_mesh(*found.groups())
  if found := _IOTA.search(text):
    shape, reshape, order = (
      [int(n) for n in part.split(',')] if part else None
      for part in found.groups()
    )
    ids = np.arange(int(np.prod(reshape))).reshape(reshape)
    return (ids.transpose(order) if order else ids).reshape(shape)
  found = _PAIRS.search(text) or _EXPLICIT.search(text)
  if not found:
    raise ValueError(f'no replica groups in {text[:200]!r}')
  members = [
    [int(n) for n in group.split(',')]
    for group in re.findall(r'\{([\d,\s]+)\}', found[1])
  ]
  if not members:
    return np.arange(devices)[None]  # {} is everybody
  if len({len(group) for group in members}) > 1:
    raise ValueError(f'groups of different sizes: {text[:200]!r}')
  return np.array(members)


def _of_mesh(axes: str, grouped: str) -> np.ndarray:
  """Groups given as axes of a mesh, such as mesh['a'=2,'b'=8] {'a','b':(2)4}.

  'b':(2)4 is a part of axis b, which is cut into 2 x 4 x 1: the 4.

  Raises:
    ValueError: axes that the mesh lacks, parts that do not divide theirs, or
      devices in an order of their own.
  """
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
  parts = [
    (name, int(first or 1), int(size or sizes.get(name, 1)))
    for name, first, size in re.findall(
      r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped
    )
  ]
  if 'device' in axes:
    raise ValueError(f'devices in an order of their own: mesh[{axes}]')
  if not {name for name, *_ in parts} <= set(sizes):
    raise ValueError(f'no such axes: mesh[{axes}] {{{grouped}}}')
  shape, cuts = [], []  # each axis in the pieces that the parts cut it into
  for axis, size in sizes.items():
    ends = {1, size}
    for name, first, length in parts:
      ends |= {first, first * length} if name == axis else set()
    ends = sorted(ends)
    if any(end % start for start, end in zip(ends, ends[1:])):
      raise ValueError(f'parts do not divide: mesh[{axes}] {{{grouped}}}')
    pieces = list(zip(ends, ends[1:])) or [(1, 1)]
    cuts += [(axis, start) for start, _ in pieces]
    shape += [end // start for start, end in pieces]
  order = [
    index
    for name, first, length in parts
    for index, (axis, start) in enumerate(cuts)
    if axis == name and first <= start < first * length
  ]
  ids = np.arange(math.prod(shape)).reshape(shape)
  ids = np.moveaxis(ids, order, range(-len(order), 0))
  return ids.reshape(-1, math.prod(shape[index] for index in order))


def reach(members: np.ndarray, mesh: Mapping[str, int]) -> dict[str, int]:
  """Places along each mesh axis that a group has, if more than one."""
  places = np.unravel_index(members, tuple(mesh.values()))
  steps = (np.diff(np.sort(place, axis=1)) > 0 for place in places)
  found = {
    axis: 1 + int(step.sum(1).max(initial=0)) for axis, step in zip(mesh, steps)
  }
  return {axis: count for axis, count in found.items() if count > 1}


def totals(
  found: Sequence[Collective],
) -> dict[tuple[str, tuple[str, ...]], float]:
  """Bytes on the wire by (kind, axes), those of one device."""
  total: dict[tuple[str, tuple[str, ...]], float] = collections.Counter()
  for one in found:
    if one.wire:
      total[one.kind, one.axes] += one.wire
  return dict(total)
