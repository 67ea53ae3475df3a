"""What a program must move between devices, from its settings.

This is arithmetic on the configuration and the sharding table alone; the
compiled program is held against it (`report.py`). Sizes are those of one
device and one call, in the terms of `collectives.wire_bytes`.

Letters: B rows, T tokens of a row, M tokens of a device, D model, N heads, K
key heads, H head width, E experts, X chosen experts, F expert width, V
vocabulary, L layers.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from m2 import config
from m2.parallel import context, cost, sharding
from m2.plan import collectives

BF16, F32 = 2, 4


@dataclasses.dataclass(frozen=True)
class Expected:
  """One collective that the sharding asks for.

  Attributes:
    name: what is moved.
    kind: as in `collectives.KINDS`.
    axes: mesh axes, in mesh order.
    size: bytes of the whole array.
    times: in one call of the program.
  """

  name: str
  kind: str
  axes: tuple[str, ...]
  size: float
  times: float


@dataclasses.dataclass(frozen=True)
class Work:
  """A forward or training pass over rows of tokens.

  Attributes:
    cfg: model shape.
    mesh: axis sizes, in mesh order.
    rows: B of one microbatch, over all devices.
    length: T of a whole row.
    parts: microbatches.
    kind: `jax.Device.device_kind`, by which expert strategies are chosen.
  """

  cfg: config.ModelConfig
  mesh: Mapping[str, int]
  rows: int
  length: int
  parts: int = 1
  kind: str = ''

  @property
  def tokens(self) -> float:
    """M: tokens of a device and a microbatch."""
    return self.rows * self.length / self.ways('batch', 'sequence')

  @property
  def itemsize(self) -> int:
    return BF16 if self.cfg.dtype == 'bfloat16' else F32

  def ways(self, *axes: str) -> int:
    """Devices that arrays with these logical axes are split over."""
    return math.prod(
      self.mesh[name] for axis in axes for name in sharding.mesh_axes(axis)
    )


def train(work: Work) -> list[Expected]:
  """The collectives of a training step."""
  again = 1 if work.cfg.remat == 'none' else 2
  layers = work.parts * work.cfg.layers
  found = [
    *_weights(work, again * layers, layers),
    *_tables(work),
    *_experts(work, again * layers, layers),
    *_tensor(work, again * layers, layers),
    *_context(work, again * layers, layers),
  ]
  return [one for one in found if one.axes and one.times]


def rl(work: Work) -> list[Expected]:
  """Those of an RL update on one microbatch of lines.

  Beside training's: every device sees the lines' integers, and the
  log-probabilities and entropies of all tokens.
  """
  rows = _axes(work, [*sharding.RULES['batch'], 'context'])
  line = work.rows * work.length * 4
  extra = [
    Expected('fields of the lines', 'all-gather', rows, 5 * line, 1),
    # Inside the gradient, for the result of the loop, and for its entropy.
    Expected('log-probabilities', 'all-gather', rows, line, 3),
  ]
  return [*train(work), *(one for one in extra if one.axes)]


def forward(work: Work, *, logits: int, entries: int = 0) -> list[Expected]:
  """Those of a forward pass with a cache that samples `logits` rows.

  Args:
    work: the pass.
    logits: rows that a token is sampled for.
    entries: of each row that come from slots and go to slots.
  """
  layers = work.cfg.layers
  gathers = [
    one
    for one in (*_weights(work, layers, 0), *_experts(work, layers, 0))
    if one.times
  ]
  axes = _axes(work, ['expert'])
  moved = []
  if axes:
    experts = work.mesh['expert']
    rows = work.tokens * experts
    hidden = rows * work.cfg.d_model * work.itemsize
    owned = logits / work.ways('batch') * experts
    slice_V = work.cfg.vocab / experts / work.mesh['tensor']
    moved = [
      Expected('experts to tokens', 'reduce-scatter', axes, hidden, layers),
      Expected('token ids', 'all-gather', axes, rows * 4, 1),
      Expected('embedded tokens', 'reduce-scatter', axes, hidden, 1),
      Expected(
        'hidden states to the head', 'all-gather', axes,
        owned * work.cfg.d_model * F32, 1,
      ),
      Expected('logits', 'all-to-all', axes, owned * slice_V * F32, 1),
    ]  # fmt: skip
  moved += _served_tensor(work, logits)
  if entries:
    rows = _axes(work, sharding.RULES['batch'])
    keys = 2 * work.cfg.kv_heads * work.cfg.head_dim / work.mesh['tensor']
    size = work.rows * entries * keys * work.itemsize
    moved += [
      Expected('rows from slots', 'reduce-scatter', rows, size, layers),
      Expected('rows to slots', 'all-gather', rows, size, layers),
    ]
  return [one for one in (*gathers, *moved) if one.axes]


def _served_tensor(work: Work, logits: int) -> list[Expected]:
  axes, layers = _axes(work, ['tensor']), work.cfg.layers
  hidden = work.tokens * work.cfg.d_model * work.itemsize
  table = logits / work.ways('batch') * work.cfg.vocab * F32
  return [
    Expected('attention output', 'all-reduce', axes, hidden, layers),
    Expected('expert output', 'all-reduce', axes, hidden, layers),
    Expected('embedded tokens', 'all-reduce', axes, hidden, 1),
    Expected('logits', 'all-gather', axes, table, 1),
  ]


def _axes(work: Work, names: Sequence[str]) -> tuple[str, ...]:
  """Those of the mesh axes that split anything, in mesh order."""
  return tuple(a for a in work.mesh if a in names and work.mesh[a] > 1)


def _moves(
  work: Work,
  name: str,
  size: float,
  axes: tuple[str, ...],
  copies: Sequence[str],
  gathers: float,
  scatters: float,
) -> Iterator[Expected]:
  """A weight of `size` bytes, gathered over `axes`; its gradient's way back.

  The gradient is scattered first, then summed over the axes with copies.
  """
  ways = math.prod(work.mesh[axis] for axis in axes)
  if ways > 1:
    yield Expected(name, 'all-gather', axes, size, gathers)
    yield Expected(f'{name} gradient', 'reduce-scatter', axes, size, scatters)
  if summed := _axes(work, copies):
    yield Expected(
      f'{name} gradient', 'all-reduce', summed, size / ways, scatters
    )


def _weights(work: Work, gathers: float, scatters: float) -> Iterator[Expected]:
  """FSDP: the matrices of every layer."""
  cfg = work.cfg
  stored = _axes(work, sharding.mesh_axes('embed'))
  tensor, expert = work.mesh['tensor'], work.mesh['expert']
  everyone = ('data', 'fsdp', 'expert', 'context')
  copies = [axis for axis in everyone if axis not in stored]
  heads = 2 * cfg.heads + 2 * cfg.kv_heads
  attention = cfg.d_model * heads * cfg.head_dim / tensor
  matrices = 3 * cfg.experts * cfg.d_model * cfg.d_expert / expert / tensor
  yield from _moves(
    work, 'attention', attention * work.itemsize, stored, copies,
    gathers, scatters,
  )  # fmt: skip
  yield from _moves(
    work, 'experts', matrices * work.itemsize, stored,
    [axis for axis in copies if axis != 'expert'], gathers, scatters,
  )  # fmt: skip
  yield from _moves(
    work, 'router', cfg.d_model * cfg.experts * F32, stored, copies,
    gathers, scatters,
  )  # fmt: skip
  norms = 2 * cfg.d_model + (cfg.heads + cfg.kv_heads) * cfg.head_dim / tensor
  yield Expected(
    'norm gradients', 'all-reduce', _axes(work, everyone),
    norms * work.itemsize, scatters,
  )  # fmt: skip


def few_tokens(work: Work) -> bool:
  """Whether embeddings are looked up where they lie (transformer.py)."""
  ways = work.mesh['expert']
  return ways > 1 and work.tokens * ways < work.cfg.vocab


def _tables(work: Work) -> Iterator[Expected]:
  """Embedding and head, once a microbatch."""
  cfg, parts = work.cfg, work.parts
  table = cfg.vocab * cfg.d_model / work.mesh['tensor']
  stored = _axes(work, sharding.mesh_axes('embed'))
  expert = _axes(work, ['expert'])
  ways, experts = work.ways('embed'), work.mesh['expert']
  copies = [a for a in ('data', 'context') if a not in stored]
  size = table * work.itemsize
  if few_tokens(work):
    rows = work.tokens * experts
    moved = rows * cfg.d_model * work.itemsize
    yield Expected('token ids', 'all-gather', expert, rows * 4, parts)
    yield Expected('embedded tokens', 'reduce-scatter', expert, moved, parts)
    yield Expected('their gradient', 'all-gather', expert, moved, parts)
    yield from _moves(
      work, 'embedding', size / experts, stored, copies, parts, parts
    )
  else:
    yield from _moves(work, 'embedding', size / ways, expert, [], parts, parts)
    yield from _moves(work, 'embedding', size, stored, [], parts, parts)
    yield from _copies(work, 'embedding', size / ways / experts, copies)
  size = table * F32
  yield from _moves(work, 'head', size / experts, stored, [], parts, parts)
  yield from _moves(work, 'head', size, expert, [], parts, parts)
  yield from _copies(work, 'head', size / ways / experts, copies)


def _copies(work, name, size, copies) -> Iterator[Expected]:
  if summed := _axes(work, copies):
    yield Expected(f'{name} gradient', 'all-reduce', summed, size, work.parts)


def layer(work: Work) -> cost.Layer:
  """The expert layer of one device and microbatch."""
  cfg = work.cfg
  return cost.Layer(
    round(work.tokens),
    cfg.top_k,
    cfg.d_model,
    cfg.d_expert // work.mesh['tensor'],
    cfg.experts // work.mesh['expert'],
    work.mesh['expert'],
    work.itemsize,
  )


def strategy(work: Work) -> tuple[str, int]:
  """How tokens reach their experts: what `m2.parallel.experts` will choose."""
  cfg = work.cfg
  if cfg.fp8_experts or work.mesh['expert'] == 1:
    return 'gather', 1
  named = cfg.expert_strategy
  choice = cost.choose(
    layer(work),
    work.kind,
    strategies=cost.STRATEGIES if named == 'auto' else (named,),
    chunks=cost.slices(layer(work).tokens, cfg.expert_chunks),
  )
  return choice.strategy, choice.chunks


def _experts(work: Work, forward: float, backward: float) -> Iterator[Expected]:
  """Tokens to the experts of the axis, sums back, and gradients alike."""
  axes = _axes(work, ['expert'])
  if not axes:
    return
  name, chunks = strategy(work)
  if name != 'gather':
    yield from _exchanged(work, name, chunks, axes, forward, backward)
    return
  cfg = work.cfg
  rows = work.tokens * work.mesh['expert']
  size = rows * cfg.d_model * work.itemsize
  choices = rows * cfg.top_k * 4
  yield Expected('tokens to experts', 'all-gather', axes, size, forward)
  yield Expected('choices', 'all-gather', axes, choices, 2 * forward)
  # The sum is not recomputed: nothing in the backward pass needs it.
  yield Expected('experts to tokens', 'reduce-scatter', axes, size, backward)
  yield Expected('output gradient', 'all-gather', axes, size, backward)
  yield Expected('token gradient', 'reduce-scatter', axes, size, backward)
  yield Expected('choice gradient', 'reduce-scatter', axes, choices, backward)


def _exchanged(
  work: Work,
  name: str,
  chunks: int,
  axes: tuple[str, ...],
  forward: float,
  backward: float,
) -> Iterator[Expected]:
  """Strategies of one copy a destination; rounds under skew do not count."""
  ways = work.mesh['expert']
  one = layer(work)
  for back, times in ((False, forward), (True, backward)):
    moved = cost.expert_bytes(name, one, chunks, backward=back)
    for kind, sent in moved.items():
      size = sent * ways / (ways - 1)
      yield Expected(f'{name} of copies', kind, axes, size, times)


def _tensor(work: Work, forward: float, backward: float) -> Iterator[Expected]:
  """Sums of activations over heads and expert width."""
  axes = _axes(work, ['tensor'])
  if not axes:
    return
  cfg = work.cfg
  size = work.tokens * cfg.d_model * work.itemsize
  yield Expected('attention output', 'all-reduce', axes, size, forward)
  # Of queries, keys and values: the compiler adds the three, then reduces.
  yield Expected('attention input gradient', 'all-reduce', axes, size, backward)
  yield Expected('expert output', 'all-reduce', axes, size, backward)
  yield Expected('expert input gradient', 'all-reduce', axes, size, backward)
  yield Expected('head input gradient', 'all-reduce', axes, size, work.parts)
  yield Expected('embedded tokens', 'all-reduce', axes, size, work.parts)


def _context(work: Work, forward: float, backward: float) -> Iterator[Expected]:
  """Keys and values of whole rows; halves of queries and outputs traded."""
  axes = _axes(work, ['context'])
  if not axes:
    return
  cfg, tensor = work.cfg, work.mesh['tensor']
  keys = 2 * cfg.kv_heads * cfg.head_dim / tensor * work.itemsize
  keys *= work.tokens * work.mesh['context']
  heads = work.tokens * cfg.heads * cfg.head_dim / tensor * work.itemsize
  rows = work.rows / work.ways('batch') * work.length * 4
  # Some halves are computed where they are.
  parts = work.mesh['context']
  routes = [pair for slot in (0, 1) for pair in context.travels(parts, slot)]
  heads *= sum(owner != worker for owner, worker in routes) / len(routes)
  yield Expected('keys and values', 'all-gather', axes, keys, forward)
  yield Expected('their masks', 'all-gather', axes, rows, forward)
  yield Expected('their gradient', 'reduce-scatter', axes, keys, backward)
  # What is kept of attention is where it was computed: both travel again.
  yield Expected('queries', 'collective-permute', axes, heads, forward)
  yield Expected('outputs', 'collective-permute', axes, heads, forward)
  yield Expected(
    'their gradients', 'collective-permute', axes, 2 * heads, backward
  )


def ways(mesh: Mapping[str, int], axes: Sequence[str]) -> int:
  """Devices of a group over these mesh axes."""
  return math.prod(mesh[axis] for axis in axes)


def by_axes(
  expected: Sequence[Expected], mesh: Mapping[str, int]
) -> dict[tuple[str, tuple[str, ...]], float]:
  """Bytes on the wire by (kind, axes), as `collectives.totals` has them."""
  total: dict[tuple[str, tuple[str, ...]], float] = collections.Counter()
  for one in expected:
    wire = collectives.wire_bytes(one.kind, one.size, ways(mesh, one.axes))
    total[one.kind, one.axes] += one.times * wire
  return dict(total)
