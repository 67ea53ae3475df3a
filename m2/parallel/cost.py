"""What each expert strategy moves and takes, by arithmetic; no jax here.

Notation: M tokens a device, X experts each, E experts on each of n devices.
Routing is taken to be uniform; a token then needs a given device with
probability `reach` = 1 - C(nE - E, X) / C(nE, X).

Bytes that a device receives from others over the `expert` axis, in the forward
pass of one layer; R = M * D * itemsize, and the backward pass moves as many:

  gather    all-gather       (n - 1) * (R + 8 * M * X)    rows, ids, weights
            reduce-scatter   (n - 1) * R                  partial sums
  exchange  all-to-all       (n - 1) * C * (2 * D * itemsize + 8 * X), C from
            `room`: M * reach with HEADROOM, at most M
  ragged    ragged-all-to-all  the same with M * reach instead of C, and an
            all-to-all of n integers
  direct    what `gather` moves, by kernels: on the way back a row leaves while
            the next ones are read

(Backward, `gather` exchanges the two kinds: (n - 1) * 4 * M * X less.) A
chunked layer moves the same in `chunks` parts. What `exchange` adds under skew
is not counted: it runs zero times when routing is near uniform.

Seconds are a model for choosing, not a measurement: rates from `CHIPS`, the
products at RATE of the peak or at the pace at which the matrices are read,
whichever is slower, the sums of the slices' weight gradients, a pass over the
room that rows leave empty where kernels make one, the placing of what is sent,
and communication of which all but the first and last part is hidden.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

STRATEGIES = ('gather', 'ragged', 'exchange')
WITH_DIRECT = (*STRATEGIES, 'direct')  # on GPUs of one process
CHUNKS = (1, 2, 4, 8)
HEADROOM = 1.25  # room of a slice over the balanced load
RATE = 0.7  # of a chip's peak that grouped products reach
WORKSPACE = 0.25  # of a chip's memory that rows of one layer may take


@dataclasses.dataclass(frozen=True)
class Chip:
  """One jax device.

  Attributes:
    flops: bfloat16 operations a second.
    memory: bytes.
    bandwidth: of the memory, bytes a second.
    link: bytes a second one way, of one link of a torus or of all links of a
      device to a switch; those that collectives reach where it is known.
    torus: dimensions of the torus; 0 = all devices on one switch.
    latency: seconds a collective takes at least.
    ragged: share of `link` that `ragged_all_to_all` reaches.
    placing: seconds in which `exchange` and `ragged` place a slice's copies.
    skips: kernels do not touch the room that rows leave empty.
    direct: bytes a second at which kernels write into the memory of another
      device of their process; 0 = they cannot.
  """

  flops: float
  memory: float
  bandwidth: float
  link: float
  torus: int
  latency: float
  ragged: float
  placing: float
  skips: bool
  direct: float = 0.0


# TPUs: cloud.google.com/tpu/docs (flops, memory, bandwidth, total of links
# both ways); one-way rates as in jax-ml.github.io/scaling-book, "How to think
# about TPUs". A TPU7x chip is two devices, which share its links.
# GPUs: NVIDIA's datasheets; NVLink is 450e9, of which an all-reduce over two
# H100 was measured to reach 329e9 (bus bandwidth, 1 GiB); the share of
# ragged_all_to_all and the placing are of `tests/bench/expert_parallel.py` on
# two H200, and so is the rate of `direct`. No TPU's placing was measured.
_HOPPER = {
  'link': 3.3e11,
  'torus': 0,
  'latency': 2e-5,
  'ragged': 0.8,
  'placing': 5e-4,
  'skips': True,
  'direct': 3.6e11,
}
CHIPS: Mapping[str, Chip] = {
  'TPU v5 lite': Chip(1.97e14, 16e9, 8.1e11, 4.5e10, 2, 5e-6, 1.0, 0, False),
  'TPU v5': Chip(4.59e14, 95e9, 2.8e12, 9e10, 3, 5e-6, 1.0, 0, False),
  'TPU v6 lite': Chip(9.18e14, 32e9, 1.6e12, 9e10, 2, 5e-6, 1.0, 0, False),
  'TPU7x': Chip(1.153e15, 96e9, 3.7e12, 5e10, 3, 5e-6, 1.0, 0, False),
  'NVIDIA H100': Chip(9.89e14, 80e9, 3.35e12, **_HOPPER),
  'NVIDIA H200': Chip(9.89e14, 141e9, 4.8e12, **_HOPPER),
}


@dataclasses.dataclass(frozen=True)
class Layer:
  """One expert layer as one device sees it.

  Attributes:
    tokens: M, of a device.
    top_k: X.
    width: D.
    hidden: F, of a device.
    experts: E, of a device.
    devices: n, of the `expert` axis.
    itemsize: bytes of a value of tokens and matrices.
  """

  tokens: int
  top_k: int
  width: int
  hidden: int
  experts: int
  devices: int
  itemsize: int

  @classmethod
  def of(cls, x_MD: Any, index_MX: Any, wi_EDF: Any, devices: int) -> 'Layer':
    """The layer of these local arrays."""
    experts, width, hidden = wi_EDF.shape
    return cls(
      *index_MX.shape, width, hidden, experts, devices, x_MD.dtype.itemsize
    )


class Room(NamedTuple):
  """What one slice has room for, from one device to another.

  Attributes:
    copies: tokens.
    choices: (token, choice) pairs.
    always: there is room for every routing.
  """

  copies: int
  choices: int
  always: bool


class Choice(NamedTuple):
  """What to run, and why in words."""

  strategy: str
  chunks: int
  reason: str


def reach(top_k: int, experts: int, devices: int) -> float:
  """Probability that a token needs a given device, routed uniformly."""
  total = experts * devices
  return 1 - math.comb(total - experts, top_k) / math.comb(total, top_k)


def room(tokens: int, top_k: int, experts: int, devices: int) -> Room:
  """Room for the balanced load of `tokens`, HEADROOM and four deviations.

  Args:
    tokens: of a slice.
    top_k: choices of a token.
    experts: experts a device.
    devices: devices of the axis.
  """

  def ample(mean: float) -> int:
    return math.ceil((HEADROOM * mean + 4 * math.sqrt(mean)) / 8) * 8

  most = min(top_k, experts)  # choices that one copy stands for
  choices = max(most, ample(tokens * top_k / devices))
  choices = min(tokens * most, choices)
  copies = ample(tokens * reach(top_k, experts, devices))
  copies = min(tokens, choices, copies)
  return Room(copies, choices, copies == tokens and choices == tokens * most)


def expert_bytes(
  strategy: str, layer: Layer, chunks: int = 1, *, backward: bool = False
) -> dict[str, float]:
  """Bytes that a device receives over the `expert` axis, by collective.

  Args:
    strategy: one of WITH_DIRECT.
    layer: the layer.
    chunks: slices of its tokens.
    backward: of the backward pass instead of the forward.
  """
  others, tokens = layer.devices - 1, layer.tokens
  row, known = layer.width * layer.itemsize, 8 * layer.top_k
  if strategy in ('gather', 'direct'):
    first = others * tokens * (row + (known // 2 if backward else known))
    kinds = 'all-gather', 'reduce-scatter'
    return dict(
      zip(kinds[::-1] if backward else kinds, (first, others * tokens * row))
    )
  if strategy == 'exchange':
    copies = chunks * slice_room(layer, chunks).copies
    return {'all-to-all': others * copies * (2 * row + known)}
  if strategy == 'ragged':
    copies = tokens * reach(layer.top_k, layer.experts, layer.devices)
    sizes = 0 if backward else 4 * others * chunks
    return {
      'ragged-all-to-all': others * copies * (2 * row + known),
      'all-to-all': sizes,
    }
  raise ValueError(f'{strategy=}: choose one of {", ".join(WITH_DIRECT)}')


def slice_room(layer: Layer, chunks: int) -> Room:
  """The room of one of `chunks` slices of the layer's tokens."""
  return room(layer.tokens // chunks, layer.top_k, layer.experts, layer.devices)


def rows(strategy: str, layer: Layer, chunks: int) -> int:
  """Rows for which a slice's products have room on a device."""
  tokens = layer.tokens // chunks
  if strategy in ('gather', 'direct'):
    return layer.devices * tokens * min(layer.top_k, layer.experts)
  return layer.devices * slice_room(layer, chunks).choices


def torus_sides(devices: int, dimensions: int) -> tuple[int, ...]:
  """Sides of a block of a torus with so many devices, as cubic as it goes."""
  sides = []
  for left in range(dimensions, 0, -1):
    root = round(devices ** (1 / left), 6)
    side = max(
      d for d in range(1, math.ceil(root) + 1) if devices % d == 0
    ) if left > 1 else devices  # fmt: skip
    sides.append(side)
    devices //= side
  return tuple(sides)


def communication_seconds(
  kind: str, size: float, devices: int, chip: Chip
) -> float:
  """Seconds of one collective in which a device receives `size` bytes.

  On a torus, gathering uses the links of all dimensions at once both ways; in
  an all-to-all, data travel a quarter of each side on average.
  """
  rate = chip.link * (chip.ragged if kind == 'ragged-all-to-all' else 1)
  if chip.torus:
    sides = [s for s in torus_sides(devices, chip.torus) if s > 1]
    if kind in ('all-gather', 'reduce-scatter'):
      rate *= 2 * len(sides)
    else:
      rate *= 8 * (devices - 1) / devices / max(sides)
  return chip.latency + size / rate


def seconds(
  strategy: str, layer: Layer, chunks: int, chip: Chip
) -> tuple[float, float]:
  """Seconds of the layer forward and backward, and of communication alone."""
  chosen = layer.tokens * layer.top_k
  matrices = 3 * layer.width * layer.hidden
  stored = layer.experts * matrices * layer.itemsize
  total = talked = 0.0
  for backward in (False, True):
    moved = expert_bytes(strategy, layer, chunks, backward=backward)
    if strategy == 'direct':
      read = chosen * (layer.devices - 1) / layer.devices
      read *= layer.width * layer.itemsize / chip.bandwidth
      sums = max(0, moved['reduce-scatter'] / chip.direct - read)
      talk = moved['all-gather'] / chip.direct + sums
      talk += chunks * (3 if backward else 2) * chip.latency
    else:
      talk = sum(
        chunks * communication_seconds(kind, size / chunks, layer.devices, chip)
        for kind, size in moved.items()
      )
    # Backward: two products instead of one; each slice reads the matrices and
    # writes its gradient, which is added to that of the slices before it.
    work = 2 * chosen * matrices * (2 if backward else 1) / (chip.flops * RATE)
    touched = stored * chunks * (2 if backward else 1)
    work = max(work, touched / chip.bandwidth)
    if backward:
      work += 3 * (chunks - 1) * stored / chip.bandwidth
    elif strategy in ('exchange', 'ragged'):
      work += chunks * chip.placing
    if not chip.skips:
      spare = chunks * rows(strategy, layer, chunks) - chosen
      spare *= layer.itemsize * (layer.width + 3 * layer.hidden)
      work += spare * (2 if backward else 1) / chip.bandwidth
    total += work + talk
    if strategy != 'direct':  # whose kernels take turns with the products
      total -= min(work, talk) * (chunks - 1) / chunks
    talked += talk
  return total, talked


def slices(tokens: int, most: int) -> tuple[int, ...]:
  """Numbers of equal slices to choose from, given `model.expert_chunks`.

  One setting serves training, its looks at a few rows, and generation: where it
  does not divide the tokens of a device, the next lower number that does.
  """
  if not most:
    return CHUNKS
  return (max(c for c in range(1, most + 1) if tokens % c == 0),)


def choose(
  layer: Layer,
  kind: str,
  *,
  strategies: Sequence[str] = STRATEGIES,
  chunks: Sequence[int] = CHUNKS,
) -> Choice:
  """The fastest by the model; the first of `strategies` for unknown devices.

  Args:
    layer: the layer.
    kind: jax's name of the device, such as 'TPU v5'.
    strategies: to choose from.
    chunks: numbers of slices to choose from; those that do not divide the
      tokens are passed over.
  """
  chip = chip_of(kind)
  fitting = [c for c in chunks if layer.tokens % c == 0]
  if chip is None:
    reason = f'no link speeds are known of {kind!r}'
    return Choice(strategies[0], fitting[0], reason)
  options = {}
  for strategy in strategies:
    for count in fitting:
      held = rows(strategy, layer, count) * layer.itemsize
      held *= layer.width + 3 * layer.hidden
      fits = held <= WORKSPACE * chip.memory
      total, talk = seconds(strategy, layer, count, chip)
      options[strategy, count] = not fits, total, talk
  (strategy, count), (_, total, talk) = min(
    options.items(), key=lambda item: item[1]
  )
  others = [
    f'{name} {1e3 * min(o[1] for k, o in options.items() if k[0] == name):.2f}'
    for name in strategies
    if name != strategy
  ]
  reason = (
    f'{1e3 * total:.2f} ms a layer forward and backward expected, of which '
    f'communication alone {1e3 * talk:.2f}; others: '
    f'{", ".join(others) or "forced"}'
  )
  return Choice(strategy, count, reason)


def chip_of(kind: str) -> Chip | None:
  """The device of this kind, such as 'TPU v5'; None if it is not known."""
  names = [name for name in CHIPS if kind.startswith(name)]
  return CHIPS[max(names, key=len)] if names else None
