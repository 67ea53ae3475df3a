"""Context parallelism: the tokens of each row are cut over the axis `context`.

Device c of n holds the c-th part of every row, for all that is done token by
token. Attention alone looks across: the keys and values of the whole row are
gathered, which with few key heads is far less than the scores cost, takes any
mask, and needs no device to wait for another block by block (arXiv 2407.21783,
section 3.3.2). Under a causal mask the last part would have almost twice the
average work; so each part is two halves, and device c computes the attention
of halves c and 2n - 1 - c of the row, which together see 2n - 1 halves on
every device. Queries travel there and outputs back; positions, masks, targets
and everything else stay in the order of the row.

Functions here run on local blocks, inside `sharding.manual`.
"""

import jax
import jax.numpy as jnp

import pallas_kernels
from m2.parallel import sharding

AXIS = 'context'


def ways() -> int:
  """Parts that a row is cut into; 1 without a mesh."""
  return sharding.axis_sizes().get(AXIS, 1)


def check(length: int, parts: int) -> None:
  """Refuses rows that cannot be cut into parts, and these in halves.

  Raises:
    ValueError: names the length and what it must be a multiple of.
  """
  if parts > 1 and length % (2 * parts):
    raise ValueError(
      f'a row of {length} tokens (data.length) is not a multiple of '
      f'{2 * parts} = 2 * mesh.context'
    )


def first(length: int) -> jax.Array | int:
  """Index in the row of the first of this device's `length` tokens."""
  return jax.lax.axis_index(AXIS) * length if ways() > 1 else 0


def whole(x_BTC: jax.Array) -> jax.Array:
  """The whole rows, of which every device has a part; trailing dims are free.

  all-gather over 'context': (n - 1) times the part in; the transpose sums the
  gradients of all devices and gives each its part (reduce-scatter).
  """
  if ways() == 1:
    return x_BTC
  return jax.lax.all_gather(x_BTC, AXIS, axis=1, tiled=True)


def ahead(x_BT: jax.Array, count: int) -> jax.Array:
  """`x[i + count]` at token i, and zeros at the row's last `count` tokens.

  Raises:
    ValueError: `count` reaches past the next device's part.
  """
  length, parts = x_BT.shape[1], ways()
  if parts == 1:
    count = min(count, length)
    return jnp.pad(x_BT[:, count:], ((0, 0), (0, count)))
  if count > length:
    raise ValueError(
      f'looking {count} tokens ahead, but mesh.context={parts} leaves '
      f'{length} tokens of a row to a device; lower mesh.context'
    )
  # The last device receives nothing, which is zeros.
  back = [(part + 1, part) for part in range(parts - 1)]
  halo_BT = jax.lax.ppermute(x_BT[:, :count], AXIS, back)
  return jnp.concatenate([x_BT[:, count:], halo_BT], axis=1)


def attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  until_BT: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """`pallas_kernels.attention` of rows cut into parts.

  Bytes in per device, for n parts of T tokens of `itemsize` bytes a number:
  all-gather (n - 1) * T * 2 * K * H, and T * N * H twice for queries and
  outputs.

  Args:
    q_BTNH: this part's queries.
    k_BTKH: its keys.
    v_BTKH: its values.
    until_BT: its mask intervals, counted in the whole row.
    scale: multiplies the scores.

  Returns:
    This part of the output.

  Raises:
    ValueError: parts have an odd number of tokens.
  """
  parts = ways()
  if parts == 1:
    return pallas_kernels.attention(
      q_BTNH, k_BTKH, v_BTKH, until_BT, scale=scale
    )
  length = q_BTNH.shape[1]
  check(length * parts, parts)
  half = length // 2
  there = [travels(parts, slot) for slot in (0, 1)]
  back = [[(worker, owner) for owner, worker in pairs] for pairs in there]
  index_T = jnp.concatenate(
    [_received(parts, slot) * half + jnp.arange(half) for slot in (0, 1)]
  )
  o_BTNH = pallas_kernels.attention(
    _exchange(q_BTNH, there),
    *(whole(x) for x in (k_BTKH, v_BTKH, until_BT)),
    query_BT=jnp.broadcast_to(index_T[None], q_BTNH.shape[:2]),
    scale=scale,
  )
  return _exchange(o_BTNH, back)


def _exchange(x_BTNH: jax.Array, routes: list) -> jax.Array:
  """Sends both halves of each part on their routes."""
  halves = jnp.split(x_BTNH, 2, axis=1)
  return jnp.concatenate(
    [jax.lax.ppermute(x, AXIS, pairs) for x, pairs in zip(halves, routes)],
    axis=1,
  )


def travels(parts: int, slot: int) -> list[tuple[int, int]]:
  """Where the first (`slot` 0) or second half of each part is computed.

  Device c takes halves c and 2 * parts - 1 - c of the row, one of which is even
  and so a first half: each slot is one exchange in which all take part.

  Returns:
    Pairs of the device that owns the half, and the one that computes it.
  """
  last = 2 * parts - 1
  halves = range(slot, 2 * parts, 2)
  return [(half // 2, min(half, last - half)) for half in halves]


def _received(parts: int, slot: int) -> jax.Array:
  """Index in the row of the half that this device gets in `travels`."""
  device = jax.lax.axis_index(AXIS)
  other = 2 * parts - 1 - device
  return jnp.where(device % 2 == slot, device, other)
