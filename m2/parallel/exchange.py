"""Expert parallelism by exchange: a token's row goes to a device once.

A device sends a token's row, with all its choices and weights, once to each
device that holds a chosen expert; that device adds up what its experts make of
it and returns one partial sum; the token's device adds up the partial sums, in
the order of the devices, in float32. Nothing is dropped under any routing, yet
every buffer has a fixed size near the balanced load:

  slices  `chunks` equal parts of the tokens, unrolled, so that one crosses the
          links while the products of another run
  rest    while some device still has a copy that found no room: one more round,
          out of all tokens

A round carries at most `cost.room` copies, and (token, choice) pairs, from one
device to another. The slices' room is above the balanced load; the rest runs
zero times unless routing is skewed, and as often as it takes when it is. The
gradient keeps what the slices' products need, and repeats the rest's rounds.

Two transports move the same buffers, block d of [n * C] for device d: that of
`exchange` sends whole blocks (`all_to_all`), that of `ragged` their filled part
alone (`ragged_all_to_all`, which XLA has for TPUs and GPUs).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from m2.parallel import cost, sharding
from pallas_kernels import dispatch

AXIS = 'expert'
# XLA's kernel on GPUs copies an update by one thread block, at some 2 GB/s: so
# many updates in all keep the links busy (`tests/bench/expert_parallel.py`).
GPU_UPDATES = 1024
# Slices and rounds of one shape share one program of the layer.
layer = jax.jit(
  pallas_kernels.experts, static_argnames=('rows', 'axis', 'impl')
)


class Routes(NamedTuple):
  """What is known of a routing before anything is sent; N destinations.

  Attributes:
    index_MX: chosen experts of all devices.
    device_MX: who holds them; N = slot not used.
    fits_MN: copies that the slices have room for.
    round_MN: in which round of the rest the others go; -1 = in none.
  """

  index_MX: jax.Array
  device_MX: jax.Array
  fits_MN: jax.Array
  round_MN: jax.Array


def run(
  transport: str,
  chunks: int,
  x_MD: jax.Array,
  index_MX: jax.Array,
  weight_MX: jax.Array,
  *weights: jax.Array,
  impl: dispatch.Impl | None = None,
) -> jax.Array:
  """The expert layer on this device's tokens, inside `shard_map`.

  Args:
    transport: exchange or ragged.
    chunks: slices of the tokens; divides M.
    x_MD: this device's tokens.
    index_MX: chosen experts of all devices; outside [0, N * E) = slot not used.
    weight_MX: float32 mixing weights.
    *weights: wi_0_EDF, wi_1_EDF, wo_EFD of this device's experts.
    impl: kernel backend.

  Returns:
    y_MD, a sum over this device's part of F.
  """
  tokens, top_k = index_MX.shape
  experts, devices = weights[0].shape[0], sharding.axis_sizes()[AXIS]
  room = cost.room(tokens // chunks, top_k, experts, devices)
  routes = plan_routes(index_MX, experts, devices, chunks, room)
  send = functools.partial(
    _round, transport, rows=devices * room.choices, impl=impl
  )

  def slices(routes, x_MD, weight_MX, *weights):
    operands = routes.fits_MN, *routes[:2], x_MD, weight_MX
    parts = zip(*(jnp.split(z, chunks) for z in operands))
    return jnp.concatenate([send(room.copies, *z, *weights) for z in parts])

  def rest(step, routes, *operands):
    now_MN = routes.round_MN == step
    return send(min(tokens, room.choices), now_MN, *routes[:2], *operands)

  operands = x_MD, weight_MX, *weights
  if room.always:
    return slices(routes, *operands)
  # Every device of the mesh runs as many rounds as the one that needs most.
  rounds = jax.lax.pmax(routes.round_MN.max() + 1, tuple(sharding.axis_sizes()))
  return _sum_rounds(slices, rest, rounds, routes, operands)


def plan_routes(
  index_MX: jax.Array, experts: int, devices: int, chunks: int, room: cost.Room
) -> Routes:
  """Which copies of its tokens a device sends when, by arithmetic alone.

  Args:
    index_MX: chosen experts; outside [0, devices * experts) = slot not used.
    experts: experts a device.
    devices: devices N.
    chunks: slices of the tokens.
    room: of a slice.
  """
  tokens, top_k = index_MX.shape
  used_MX = (index_MX >= 0) & (index_MX < experts * devices)
  device_MX = jnp.where(used_MX, index_MX // experts, devices)
  choices_MN = (device_MX[..., None] == jnp.arange(devices)[None, None]).sum(
    1, dtype=jnp.int32
  )
  needed_MN = choices_MN > 0
  shape = chunks, tokens // chunks, devices
  # Both sums count what does not fit, too: they only grow, so that those
  # who fit are within the room.
  fits_MN = needed_MN & (
    jnp.cumsum(choices_MN.reshape(shape), 1) <= room.choices
  ).reshape(tokens, devices)
  fits_MN &= (
    jnp.cumsum(needed_MN.reshape(shape), 1, dtype=jnp.int32) <= room.copies
  ).reshape(tokens, devices)
  left_MN = jnp.where(fits_MN, 0, choices_MN)
  before_MN = jnp.cumsum(left_MN, 0) - left_MN
  # The last copy of a round starts below `full`, and ends within the room.
  full = room.choices - min(top_k, experts) + 1
  round_MN = jnp.where(left_MN > 0, before_MN // full, -1)
  return Routes(index_MX, device_MX, fits_MN, round_MN)


def places(
  sent_MN: jax.Array, device_MX: jax.Array, copies: int, *, packed: bool
) -> pallas_kernels.Plan:
  """Where a round's copies lie in buffers [N * copies], by destination.

  Args:
    sent_MN: the copies; at most `copies` a destination.
    device_MX: devices of each token's choices.
    copies: of a block.
    packed: blocks are filled from their start, in the order of the tokens;
      else a block that holds all tokens has each at its own position.

  Returns:
    The plan; a token has one place a destination or, where that is less, one a
    choice.
  """
  tokens, devices = sent_MN.shape
  own_M1 = jnp.arange(tokens)[:, None]
  if packed or copies < tokens:
    slot_MN = jnp.cumsum(sent_MN, 0, dtype=jnp.int32) - 1
    # Tokens in their order; those that are not sent sort behind.
    token_NC = jnp.sort(jnp.where(sent_MN, own_M1, tokens).T)[:, :copies]
  else:
    slot_MN, token_NC = own_M1, jnp.where(sent_MN, own_M1, tokens).T
  start_N = jnp.arange(devices) * copies
  place_MN = jnp.where(sent_MN, start_N[None] + slot_MN, devices * copies)
  if devices > device_MX.shape[1]:
    place_MN = _by_choice(place_MN, device_MX, devices * copies)
  return pallas_kernels.Plan(
    sizes_G=sent_MN.sum(0, dtype=jnp.int32),
    start_G=start_N,
    place_MX=place_MN,
    source_P=token_NC.reshape(-1) * place_MN.shape[1],
  )


def _by_choice(place_MN, device_MX, nowhere: int) -> jax.Array:
  """The place at a token's first choice on each device, and `nowhere`."""
  top_k = device_MX.shape[1]
  same_MXX = device_MX[:, :, None] == device_MX[:, None, :]
  again_MX = (same_MXX & jnp.tri(top_k, k=-1, dtype=bool)[None]).any(2)
  place_MX = jnp.take_along_axis(
    place_MN, device_MX, 1, mode='fill', fill_value=nowhere
  )
  return jnp.where(again_MX, nowhere, place_MX)


def _round(
  transport: str,
  copies: int,
  sent_MN: jax.Array,
  index_MX: jax.Array,
  device_MX: jax.Array,
  x_MD: jax.Array,
  weight_MX: jax.Array,
  *weights: jax.Array,
  rows: int,
  impl: dispatch.Impl | None,
) -> jax.Array:
  """Sends copies, runs the experts on those that come, adds up what returns.

  Args:
    transport: exchange or ragged.
    copies: C, room of a block.
    sent_MN: which copies go.
    index_MX: chosen experts.
    device_MX: their devices.
    x_MD: tokens.
    weight_MX: mixing weights.
    *weights: matrices of this device's experts.
    rows: (token, choice) pairs that come from all devices, at the most.
    impl: kernel backend.

  Returns:
    y_MD, zero where a token has no copy in this round.
  """
  plan = places(sent_MN, device_MX, copies, packed=transport == 'ragged')
  there, back = TRANSPORTS[transport](plan.sizes_G)
  # Indices ride with the weights, in float32, exact and off by one: a place
  # that no copy took holds 0, which is no expert.
  known_MZ = jnp.concatenate(
    [weight_MX, (index_MX + 1).astype(jnp.float32)], axis=1
  )
  with jax.named_scope('dispatch'):
    x_PD = there(pallas_kernels.gather(x_MD, plan, impl='xla'))
    known_PZ = there(pallas_kernels.gather(known_MZ, plan, impl='xla'))
  weight_PX, index_PX = jnp.split(known_PZ, 2, axis=1)
  first = jax.lax.axis_index(AXIS) * weights[0].shape[0]
  y_PD = layer(
    x_PD,
    index_PX.astype(jnp.int32) - 1 - first,
    weight_PX,
    *weights,
    rows=min(rows, index_PX.size),
    impl=impl,
  )
  with jax.named_scope('return'):
    return _collect(impl, back(y_PD), plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(impl, y_PD, plan):
  """Sums each token's rows: the transpose of `gather`, which keeps no rows."""
  ones_MJ = sharding.varying(jnp.ones(plan.place_MX.shape, jnp.float32))
  return pallas_kernels.combine(y_PD, plan, ones_MJ, impl=impl)


def _collect_forward(impl, y_PD, plan):
  return _collect(impl, y_PD, plan), plan


def _collect_backward(impl, plan, dy_MD):
  del impl
  return pallas_kernels.gather(dy_MD, plan, impl='xla'), None


_collect.defvjp(_collect_forward, _collect_backward)


def _whole(sizes_N: jax.Array):
  """There and back by whole blocks."""
  del sizes_N
  move = functools.partial(
    jax.lax.all_to_all,
    axis_name=AXIS,
    split_axis=0,
    concat_axis=0,
    tiled=True,
  )
  return move, move


def _filled(sizes_N: jax.Array):
  """There and back by what the blocks hold."""
  theirs_N = jax.lax.all_to_all(sizes_N, AXIS, 0, 0, tiled=True)
  there = functools.partial(_ragged, sent_N=sizes_N, received_N=theirs_N)
  back = functools.partial(_ragged, sent_N=theirs_N, received_N=sizes_N)
  return there, back


TRANSPORTS: dict[str, Callable] = {'exchange': _whole, 'ragged': _filled}


def _updates(copies: int, blocks: int) -> int:
  """Updates in which a block of `copies` rows is sent."""
  if dispatch.device().platform != 'gpu':
    return 1
  return max(1, min(GPU_UPDATES // blocks, copies))


@jax.custom_vjp
def _ragged(x_PD, sent_N, received_N):
  blocks = received_N.shape[0]
  copies = x_PD.shape[0] // blocks
  updates = _updates(copies, blocks)
  size = -(-copies // updates)  # rows of an update, at the most
  first_1U = jnp.arange(updates)[None] * size
  start_N = jnp.arange(blocks) * copies
  mine_N = jnp.broadcast_to(jax.lax.axis_index(AXIS) * copies, blocks)

  def sizes(rows_N):
    return jnp.clip(rows_N[:, None] - first_1U, 0, size).reshape(-1)

  def offsets(rows_N):
    return sharding.varying((rows_N[:, None] + first_1U).reshape(-1))

  return jax.lax.ragged_all_to_all(
    x_PD,
    sharding.varying(jnp.zeros_like(x_PD)),
    offsets(start_N),
    sizes(sent_N),
    offsets(mine_N),
    sizes(received_N),
    axis_name=AXIS,
  )


def _ragged_forward(x_PD, sent_N, received_N):
  return _ragged(x_PD, sent_N, received_N), (sent_N, received_N)


def _ragged_backward(sizes, dy_PD):
  sent_N, received_N = sizes
  return _ragged(dy_PD, received_N, sent_N), None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_rounds(
  first: Callable,
  again: Callable,
  rounds: jax.Array,
  routes: Routes,
  operands: Sequence[jax.Array],
) -> jax.Array:
  """first(routes, *operands) + sum over step of again(step, ...).

  Args:
    first: always run; its residuals are kept.
    again: run with step = 0 .. rounds - 1; run again for its gradient.
    rounds: int32, the same on all devices.
    routes: what has no gradient.
    operands: what has one.
  """
  y_MD = first(routes, *operands)
  return _add_rounds(again, rounds, routes, operands, y_MD)


def _add_rounds(again, rounds, routes, operands, y_MD):
  def more(carry):
    step, y_MD = carry
    return step + 1, y_MD + again(step, routes, *operands)

  return jax.lax.while_loop(lambda carry: carry[0] < rounds, more, (0, y_MD))[1]


def _sum_rounds_forward(first, again, rounds, routes, operands):
  y_MD, pull = jax.vjp(functools.partial(first, routes), *operands)
  y_MD = _add_rounds(again, rounds, routes, operands, y_MD)
  return y_MD, (pull, rounds, routes, operands)


def _sum_rounds_backward(first, again, residuals, dy_MD):
  pull, rounds, routes, operands = residuals

  def more(carry):
    step, grads = carry
    _, pull = jax.vjp(functools.partial(again, step, routes), *operands)
    return step + 1, jax.tree.map(jnp.add, grads, pull(dy_MD))

  _, grads = jax.lax.while_loop(
    lambda carry: carry[0] < rounds, more, (0, pull(dy_MD))
  )
  return None, None, grads


_sum_rounds.defvjp(_sum_rounds_forward, _sum_rounds_backward)
