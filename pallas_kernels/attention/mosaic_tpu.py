"""Attention of long rows for TPUs, in Pallas: only blocks that see each other.

The pairs of a block of queries and one of keys in which some key may be seen
are listed on the device, whatever the mask is: a causal row costs half a
square, packed documents their own squares, and the branches of a tree skip each
other. Each kernel walks such a list: those of queries, in their order, sum over
keys (outputs, and gradients of queries), that of keys over queries (their own
gradients). The grid is as long as the list, so what nobody sees is neither read
nor visited. Scores lie transposed, [keys, queries]: maxima and sums over keys
are then additions of whole registers, and what belongs to a query is a row.

The algorithms are those of `blocks.py`. Letters beside those of `api`: P
queries and W keys of a block, G query heads of one key head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tiles_tpu
from pallas_kernels.attention import blocks, xla
from pallas_kernels.gmm import mosaic_tpu, stream_tpu

QUERIES, KEYS = 256, 1024  # P and W, at the most
PART = 128  # keys whose scores the forward kernel holds at a time
LISTED = 1 << 17  # pairs, at the most: scalar memory holds their list
DTYPES = 'bfloat16', 'float32'


class Layout(NamedTuple):
  """What all kernels of one call agree on.

  Attributes:
    chip: the device.
    queries: P.
    keys: W.
    most: pairs that a list may hold.
  """

  chip: tiles_tpu.Chip
  queries: int
  keys: int
  most: int


def refusal(
  dtypes: set[jnp.dtype],
  width: int,
  rows: tuple[int, int, int],
  causal: bool,
) -> str | None:
  """Why these kernels cannot attend here, or None.

  Args:
    dtypes: of queries, keys and values.
    width: of a head.
    rows: B, T, S.
    causal: query t has index t.
  """
  if len(dtypes) > 1 or not dtypes <= {jnp.dtype(z) for z in DTYPES}:
    found = ', '.join(sorted(map(str, dtypes)))
    return f'takes bfloat16 alone or float32 alone, not {found}'
  if width % tiles_tpu.LANES:
    return f'needs heads in multiples of {tiles_tpu.LANES}, not {width}'
  if min(rows[1:]) < tiles_tpu.LANES:
    least = tiles_tpu.LANES
    return f'needs {least} queries and keys at least, not {rows[1:]}'
  if (listed := _layout(None, *rows, causal).most) > LISTED:
    return (
      f'lists at most {LISTED} pairs of blocks, not {listed}: give a device '
      'fewer rows'
    )
  return mosaic_tpu.no_device()


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  until_BS: jax.Array,
  query_BT: jax.Array,
  *,
  scale: float,
  causal: bool,
) -> jax.Array:
  """See `pallas_kernels.attention.api.attention`; as `xla.attention`."""
  queries, keys = q_BTNH.shape[1], k_BSKH.shape[1]
  layout = _layout(tiles_tpu.here(), len(q_BTNH), queries, keys, causal)
  q_BKGTH, k_BKSH, v_BKSH = xla.by_head(q_BTNH, k_BSKH, v_BSKH, scale)
  # Keys past the end are seen by nobody; queries past it repeat the last one.
  operands = blocks.alike(
    _pad(q_BKGTH, 3, layout.queries),
    _pad(k_BKSH, 2, layout.keys),
    _pad(v_BKSH, 2, layout.keys),
    _pad(until_BS.astype(jnp.int32), 1, layout.keys),
    _pad(query_BT.astype(jnp.int32), 1, layout.queries, mode='edge'),
  )
  o_BKGTH = _attention(*operands, layout)[:, :, :, :queries]
  return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _layout(chip, batch: int, queries: int, keys: int, causal: bool) -> Layout:
  def side(block, length):
    return min(block, -(-length // tiles_tpu.LANES) * tiles_tpu.LANES)

  p, w = side(QUERIES, queries), side(KEYS, keys)
  rows, columns = -(-queries // p), -(-keys // w)
  pairs = rows * columns
  if causal:  # and one a block of keys that no query sees
    seen = sum(min(columns, -(-(r + 1) * p // w)) for r in range(rows))
    pairs = min(pairs, seen + columns)
  return Layout(chip, p, w, batch * pairs)


def _pad(x: jax.Array, axis: int, block: int, mode: str = 'constant'):
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, pad, mode=mode)


def _pairs(
  until_BS: jax.Array, query_BT: jax.Array, layout: Layout, *, by_key: bool
) -> tuple[jax.Array, jax.Array]:
  """Pairs of blocks in which a key may be seen, and for each block one.

  Returns:
    int32[most + 1] and their number: (b * A + a) * Z + z of each pair, where a
    is the block that is summed for and z the one that is summed over; rising.
    What follows them is of no block.
  """
  batch = len(until_BS)
  query_BRP = query_BT.reshape(batch, -1, layout.queries)
  until_BCW = until_BS.reshape(batch, -1, layout.keys)
  rows, columns = query_BRP.shape[1], until_BCW.shape[1]
  r_1R1 = jnp.arange(rows, dtype=jnp.int32)[None, :, None]
  c_11C = jnp.arange(columns, dtype=jnp.int32)[None, None]
  seen_BRC = (c_11C * layout.keys <= query_BRP.max(2)[:, :, None]) & (
    query_BRP.min(2)[:, :, None] < until_BCW.max(2)[:, None]
  )
  # Results of a block that sees nothing, or is not seen, are written, too.
  if by_key:
    diagonal_11C = c_11C * layout.keys // layout.queries
    seen_BRC |= r_1R1 == jnp.minimum(diagonal_11C, rows - 1)
    seen_BRC = seen_BRC.swapaxes(1, 2)
  else:
    diagonal_1R1 = r_1R1 * layout.queries // layout.keys
    seen_BRC |= c_11C == jnp.minimum(diagonal_1R1, columns - 1)
  seen_AZ = seen_BRC.reshape(-1, seen_BRC.shape[2])
  order_AZ, count_A = blocks.listed(seen_AZ)
  sum_N, end_A = stream_tpu.segments(count_A, layout.most + 1)
  number_N = jnp.arange(layout.most + 1, dtype=jnp.int32)
  index_N = number_N - (end_A - count_A)[sum_N]
  over_N = order_AZ.at[sum_N, index_N].get(mode='clip')
  pair_N = sum_N * seen_AZ.shape[1] + over_N
  return jnp.where(number_N < end_A[-1], pair_N, seen_AZ.size), end_A[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BKGTH, k_BKSH, v_BKSH, until_BS, query_BT, layout):
  return _forward(q_BKGTH, k_BKSH, v_BKSH, until_BS, query_BT, layout)[0]


def _forward(q_BKGTH, k_BKSH, v_BKSH, until_BS, query_BT, layout):
  """The output, and what the backward pass needs."""
  operands = q_BKGTH, k_BKSH, v_BKSH, until_BS, query_BT
  groups, width = q_BKGTH.shape[2], q_BKGTH.shape[4]
  rows = groups, layout.queries
  o_BKGTH, lse_BKGT = _walk(
    _forward_body,
    'attention',
    layout,
    operands,
    by_key=False,
    outputs={'q': q_BKGTH.dtype, 'row': jnp.float32},
    scratch=[rows, rows, (groups, width, layout.queries)],
    products=2,
  )
  # A policy that keeps both runs the forward kernel once, not twice.
  o_BKGTH, lse_BKGT = (
    checkpoint_name(z, xla.NAME) for z in (o_BKGTH, lse_BKGT)
  )
  return o_BKGTH, (*operands, o_BKGTH, lse_BKGT)


def _backward(layout, kept, do_BKGTH):
  """Gradients of queries, keys and values (arXiv 2205.14135, algorithm 4)."""
  *operands, o_BKGTH, lse_BKGT = kept
  q_BKGTH, k_BKSH, v_BKSH = operands[:3]
  delta_BKGT = (do_BKGTH.astype(jnp.float32) * o_BKGTH).sum(-1)
  walk = functools.partial(
    _walk,
    layout=layout,
    operands=operands,
    more=(do_BKGTH, lse_BKGT, delta_BKGT),
  )
  groups, width = q_BKGTH.shape[2], q_BKGTH.shape[4]
  (dq_BKGTH,) = walk(
    _queries_body,
    'attention_queries',
    by_key=False,
    outputs={'q': q_BKGTH.dtype},
    scratch=[(groups, layout.queries, width)],
    products=3,
  )
  dk_BKSH, dv_BKSH = walk(
    _keys_body,
    'attention_keys',
    by_key=True,
    outputs={'k': k_BKSH.dtype, 'v': v_BKSH.dtype},
    scratch=[(layout.keys, width), (layout.keys, width)],
    products=4,
  )
  return dq_BKGTH, dk_BKSH, dv_BKSH, None, None


_attention.defvjp(
  dispatch.underivable('attention', _forward),
  dispatch.underivable('attention', _backward),
)


def _walk(
  body, name, layout, operands, *, by_key, outputs, scratch, products, more=()
):
  """Runs a kernel for each key head over a list of pairs.

  Args:
    body: of the kernel.
    name: of the kernel.
    layout: of this call.
    operands: of `_attention`.
    by_key: the list is for `_keys_body`.
    outputs: kind of block, of those of `_blocks`, -> dtype.
    scratch: shapes, float32.
    products: of a pair of blocks.
    more: what the backward pass has beside the operands.
  """
  q_BKGTH, k_BKSH, v_BKSH, until_BS, query_BT = operands
  _, kv_heads, groups, queries, width = q_BKGTH.shape
  keys = k_BKSH.shape[2]
  table_N, count = _pairs(until_BS, query_BT, layout, by_key=by_key)
  per_row = queries // layout.queries, keys // layout.keys
  place, specs = _blocks(layout, groups, width, per_row, by_key)
  given = ['q', 'k', 'v', 'until', 'query']
  if more:
    given += ['q', 'row', 'row']
  shapes = {
    'q': q_BKGTH.shape,
    'k': k_BKSH.shape,
    'v': v_BKSH.shape,
    'row': q_BKGTH.shape[:-1],
  }
  inputs = (
    q_BKGTH, k_BKSH, v_BKSH, until_BS[..., None], query_BT[:, None], *more,
  )  # fmt: skip
  visits = layout.most * kv_heads
  scores = visits * groups * layout.queries * layout.keys
  # A pair fetches the blocks that are summed over; those summed for stay.
  value = q_BKGTH.dtype.itemsize
  if by_key:
    moved = visits * groups * layout.queries * (2 * width * value + 8)
    moved += 4 * k_BKSH.size * value
  else:
    # `until` is a column, and its row of 4 bytes padded to the lanes.
    key = 2 * width * value + 4 * tiles_tpu.LANES
    moved = visits * layout.keys * key
    moved += (3 if more else 2) * q_BKGTH.size * value
  call = pl.pallas_call(
    functools.partial(
      body,
      layout=layout,
      over=per_row[0] if by_key else per_row[1],
      place=place,
    ),
    out_shape=[
      stream_tpu.like(q_BKGTH, shapes[kind], dtype)
      for kind, dtype in outputs.items()
    ],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(kv_heads, count),
      in_specs=[specs[kind] for kind in given],
      out_specs=[specs[kind] for kind in outputs],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    compiler_params=stream_tpu.params(layout.chip, 2),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * scores * width,
      bytes_accessed=moved,
      transcendentals=scores,
    ),
    interpret=layout.chip.interpret,
    name=name,
  )
  return dispatch.narrow(call)(table_N, *inputs)


def _blocks(layout, groups, width, per_row, by_key):
  """Where a step is, and kind of block -> its spec.

  Args:
    layout: of this call.
    groups: G.
    width: H.
    per_row: blocks of queries, and of keys.
    by_key: the list is for `_keys_body`.
  """

  def place(step, table):
    """Row, block of queries and block of keys of a step."""
    pair = table[step]
    for_, over = reversed(per_row) if by_key else per_row
    b, a = lax.div(pair, for_ * over), lax.rem(lax.div(pair, over), for_)
    z = lax.rem(pair, over)
    return (b, z, a) if by_key else (b, a, z)

  def block(shape, index):
    return pl.BlockSpec(
      shape, lambda k, step, table: index(k, *place(step, table))
    )

  q_shape = 1, 1, groups, layout.queries, width
  k_spec = block((1, 1, layout.keys, width), lambda k, b, r, c: (b, k, c, 0))
  return place, {
    'q': block(q_shape, lambda k, b, r, c: (b, k, 0, r, 0)),
    'k': k_spec,
    'v': k_spec,
    'until': block((1, layout.keys, 1), lambda k, b, r, c: (b, c, 0)),
    'query': block((1, 1, layout.queries), lambda k, b, r, c: (b, 0, r)),
    'row': block(q_shape[:-1], lambda k, b, r, c: (b, k, 0, r)),
  }


def _ends(table_ref, over: int) -> tuple[jax.Array, jax.Array]:
  """Whether this step is the first, and the last, of its sum."""
  step = pl.program_id(1)
  before, own, after = (
    lax.div(table_ref[jnp.maximum(step + by, 0)], over) for by in (-1, 0, 1)
  )
  return (step == 0) | (before != own), after != own


def _bias(table_ref, until_ref, query_ref, layout, place) -> jax.Array:
  """float32 [W, P]: 0 where a key is seen."""
  _, _, c = place(pl.program_id(1), table_ref)
  shape = layout.keys, layout.queries
  key_WP = c * layout.keys + lax.broadcasted_iota(jnp.int32, shape, 0)
  query_1P = query_ref[0]
  seen_WP = (key_WP <= query_1P) & (query_1P < until_ref[0])
  return jnp.where(seen_WP, 0.0, blocks.HIDDEN)


def _dot(a: jax.Array, b: jax.Array, contracted: str) -> jax.Array:
  """float32 product over a dimension of each, 'ab' by their numbers."""
  dims = tuple((int(axis),) for axis in contracted)
  full = a.dtype == jnp.float32
  return lax.dot_general(
    a,
    b,
    (dims, ((), ())),
    precision=lax.Precision.HIGHEST if full else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def _forward_body(
  table_ref, q_ref, k_ref, v_ref, until_ref, query_ref, o_ref, lse_ref,
  top_ref, total_ref, sum_ref, *, layout, over, place,
):  # fmt: skip
  """Running maxima [G, P], sums [G, P] and transposed outputs [G, H, P]."""
  first, last = _ends(table_ref, over)

  @pl.when(first)
  def _():
    # Above HIDDEN, so that a query that sees no key (padding) gets zeros.
    top_ref[...] = jnp.full(top_ref.shape, blocks.HIDDEN / 2, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

  bias_WP = _bias(table_ref, until_ref, query_ref, layout, place)
  k_WH, v_WH = k_ref[0, 0], v_ref[0, 0]
  for g in range(q_ref.shape[2]):
    own = pl.ds(g, 1)
    top_1P, total_1P, sum_HP = top_ref[own], total_ref[own], sum_ref[g]
    for first_key in range(0, layout.keys, PART):
      # Letter U: keys of a part, whose scores fit the registers.
      part = slice(first_key, first_key + PART)
      s_UP = _dot(k_WH[part], q_ref[0, 0, g], '11') + bias_WP[part]
      new_1P = jnp.maximum(top_1P, s_UP.max(0, keepdims=True))
      p_UP = jnp.exp(s_UP - new_1P)
      shrink_1P = jnp.exp(top_1P - new_1P)
      total_1P = total_1P * shrink_1P + p_UP.sum(0, keepdims=True)
      fresh_HP = _dot(v_WH[part], p_UP.astype(v_WH.dtype), '00')
      sum_HP = sum_HP * shrink_1P + fresh_HP
      top_1P = new_1P
    top_ref[own], total_ref[own], sum_ref[g] = top_1P, total_1P, sum_HP

  @pl.when(last)
  def _():
    # At least 1 wherever a key is seen.
    total_GP = jnp.maximum(total_ref[...], 0.5)
    lse_ref[0, 0] = top_ref[...] + jnp.log(total_GP)
    for g in range(q_ref.shape[2]):
      o_HP = sum_ref[g] / total_GP[g : g + 1]
      o_ref[0, 0, g] = o_HP.T.astype(o_ref.dtype)


def _slopes(q_PH, k_WH, v_WH, bias_WP, do_PH, lse_1P, delta_1P):
  """Probabilities, and the gradient of the scores, both [W, P]."""
  p_WP = jnp.exp(_dot(k_WH, q_PH, '11') + bias_WP - lse_1P)
  return p_WP, p_WP * (_dot(v_WH, do_PH, '11') - delta_1P)


def _queries_body(
  table_ref, q_ref, k_ref, v_ref, until_ref, query_ref, do_ref, lse_ref,
  delta_ref, dq_ref, sum_ref, *, layout, over, place,
):  # fmt: skip
  """Gradients of a block of queries, [G, P, H], over its keys."""
  first, last = _ends(table_ref, over)

  @pl.when(first)
  def _():
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

  bias_WP = _bias(table_ref, until_ref, query_ref, layout, place)
  k_WH, v_WH = k_ref[0, 0], v_ref[0, 0]
  for g in range(q_ref.shape[2]):
    at, own = (0, 0, g), (0, 0, pl.ds(g, 1))
    _, ds_WP = _slopes(
      q_ref[at], k_WH, v_WH, bias_WP, do_ref[at], lse_ref[own], delta_ref[own]
    )
    sum_ref[g] += _dot(ds_WP.astype(k_WH.dtype), k_WH, '00')

  @pl.when(last)
  def _():
    dq_ref[0, 0] = sum_ref[...].astype(dq_ref.dtype)


def _keys_body(
  table_ref, q_ref, k_ref, v_ref, until_ref, query_ref, do_ref, lse_ref,
  delta_ref, dk_ref, dv_ref, dk_sum, dv_sum, *, layout, over, place,
):  # fmt: skip
  """Gradients of a block of keys and values, [W, H], over their queries."""
  first, last = _ends(table_ref, over)

  @pl.when(first)
  def _():
    dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
    dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

  bias_WP = _bias(table_ref, until_ref, query_ref, layout, place)
  k_WH, v_WH = k_ref[0, 0], v_ref[0, 0]
  for g in range(q_ref.shape[2]):
    at, own = (0, 0, g), (0, 0, pl.ds(g, 1))
    q_PH, do_PH = q_ref[at], do_ref[at]
    p_WP, ds_WP = _slopes(
      q_PH, k_WH, v_WH, bias_WP, do_PH, lse_ref[own], delta_ref[own]
    )
    dv_sum[...] += _dot(p_WP.astype(do_PH.dtype), do_PH, '10')
    dk_sum[...] += _dot(ds_WP.astype(q_PH.dtype), q_PH, '10')

  @pl.when(last)
  def _():
    dk_ref[0, 0] = dk_sum[...].astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)
