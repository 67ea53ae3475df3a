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
    ValueError: the part has an odd number of tokens.
  """
  parts = ways()
  if parts == 1:
    return pallas_kernels.attention(
      q_BTNH, k_BTKH, v_BTKH, until_BT, scale=scale
    )
  length = q_BTNH.shape[1]
  if length % 2:
    raise ValueError(
      f'a row of {length * parts} tokens is not a multiple of '
      f'{2 * parts} = 2 * mesh.context; change the length of rows'
    )
  half, last = length // 2, 2 * parts - 1
  keys = [whole(x) for x in (k_BTKH, v_BTKH, until_BT)]
  # Of its two halves, h and last - h, a device gets the even and the odd one
  # in one exchange each: all first halves of parts are even, all second odd.
  device = jax.lax.axis_index(AXIS)
  even = jnp.where(device % 2 == 0, device, last - device)
  outputs = []
  for slot, index in enumerate((even, last - even)):
    there = [(h // 2, min(h, last - h)) for h in range(slot, 2 * parts, 2)]
    back = [(to, at) for at, to in there]
    q_half = jax.lax.ppermute(
      q_BTNH[:, slot * half : (slot + 1) * half], AXIS, there
    )
    o_half = pallas_kernels.attention(
      q_half,
      *keys,
      offset_B=jnp.full(len(q_half), index * half),
      scale=scale,
    )
    outputs.append(jax.lax.ppermute(o_half, AXIS, back))
  return jnp.concatenate(outputs, axis=1)
