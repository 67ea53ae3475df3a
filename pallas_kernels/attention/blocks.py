"""Attention of long rows in plain XLA: block by block, with its own gradient.

Neither pass holds more scores than one block of queries has with one block of
keys: the forward pass keeps a running maximum and sum (arXiv 1805.02867), the
backward pass makes the scores again from the kept log-sum-exp (arXiv
2205.14135). Only pairs of blocks are visited in which some key may be seen,
wherever the mask has them: a causal row costs half a square, packed documents
their own squares, and the branches of a tree skip each other.

Letters beside those of `api`: R blocks of P queries, C blocks of W keys, G
query heads of one key head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 512  # P and W
HIDDEN = -1e30  # score of a key that a query does not see


def attention(
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  until_BS: jax.Array,
  query_BT: jax.Array,
  name: str,
) -> jax.Array:
  """See `pallas_kernels.attention.api.attention`.

  Args:
    q_BKGTH: queries, already scaled.
    k_BKSH: keys.
    v_BKSH: values.
    until_BS: first index that can no longer see each key.
    query_BT: index of each query.
    name: what the output and its log-sum-exp are called for rematerialisation:
      a policy that keeps them runs the forward loop once, not twice.
  """
  # Keys past the end are seen by nobody; queries past it repeat the last one.
  operands = (
    _cut(q_BKGTH, 3),
    _cut(k_BKSH, 2),
    _cut(v_BKSH, 2),
    _cut(until_BS, 1),
    _cut(query_BT, 1, mode='edge'),
  )
  o_RBKGPH = _attention(*alike(*operands), name)
  o_BKGTH = jnp.moveaxis(o_RBKGPH, 0, 3).reshape(
    *q_BKGTH.shape[:3], -1, q_BKGTH.shape[4]
  )
  return o_BKGTH[:, :, :, : q_BKGTH.shape[3]]


def _cut(x: jax.Array, axis: int, mode: str = 'constant') -> jax.Array:
  """Cuts an axis into blocks, the last one padded; they come first."""
  count = -(-x.shape[axis] // BLOCK)
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, count * BLOCK - x.shape[axis])
  x = jnp.pad(x, pad, mode=mode)
  shape = (*x.shape[:axis], count, BLOCK, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis, 0)


def alike(*xs: jax.Array) -> list[jax.Array]:
  """Inside `shard_map`: marks all as differing over the same mesh axes.

  So that loops and the gradient below see one kind of value.
  """
  axes = frozenset().union(*(jax.typeof(x).mat.varying for x in xs))
  return [_varying(x, axes) for x in xs]


def _varying(x, axes):
  axes = tuple(axes - jax.typeof(x).mat.varying)
  return jax.lax.pcast(x, axes, to='varying') if axes else x


def _full(shape, value, like) -> jax.Array:
  """float32 constants that differ over the mesh axes that `like` does."""
  return _varying(jnp.full(shape, value), jax.typeof(like).mat.varying)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_RBKGPH, k_CBKWH, v_CBKWH, until_CBW, query_RBP, name):
  return _forward(q_RBKGPH, k_CBKWH, v_CBKWH, until_CBW, query_RBP, name)[0]


def _forward(q_RBKGPH, k_CBKWH, v_CBKWH, until_CBW, query_RBP, name):
  """The output, and what the backward pass needs."""

  def rows(xs):
    q_BKGPH, query_BP, order_C, count = xs

    def add(index, carry):
      o_BKGPH, top_BKGP, total_BKGP = carry
      at = order_C[index]
      s_BKGPW = _scores(q_BKGPH, k_CBKWH[at], until_CBW[at], query_BP, at)
      new_BKGP = jnp.maximum(top_BKGP, s_BKGPW.max(-1))
      p_BKGPW = jnp.exp(s_BKGPW - new_BKGP[..., None])
      shrink_BKGP = jnp.exp(top_BKGP - new_BKGP)
      fresh_BKGPH = jnp.einsum(
        'bkgpw,bkwh->bkgph',
        p_BKGPW.astype(v_CBKWH.dtype),
        v_CBKWH[at],
        preferred_element_type=jnp.float32,
      )
      return (
        o_BKGPH * shrink_BKGP[..., None] + fresh_BKGPH,
        new_BKGP,
        total_BKGP * shrink_BKGP + p_BKGPW.sum(-1),
      )

    shape = q_BKGPH.shape
    start = (
      _full(shape, 0.0, q_BKGPH),
      # Above HIDDEN, so that a query that sees no key (padding) gets zeros.
      _full(shape[:-1], HIDDEN / 2, q_BKGPH),
      _full(shape[:-1], 0.0, q_BKGPH),
    )
    o_BKGPH, top_BKGP, total_BKGP = jax.lax.fori_loop(0, count, add, start)
    # At least 1 wherever a key is seen.
    total_BKGP = jnp.maximum(total_BKGP, 0.5)
    o_BKGPH = (o_BKGPH / total_BKGP[..., None]).astype(q_BKGPH.dtype)
    return o_BKGPH, top_BKGP + jnp.log(total_BKGP)

  order_RC, count_R = _visits(until_CBW, query_RBP)
  o_RBKGPH, lse_RBKGP = (
    checkpoint_name(x, name)
    for x in jax.lax.map(rows, (q_RBKGPH, query_RBP, order_RC, count_R))
  )
  operands = (q_RBKGPH, k_CBKWH, v_CBKWH, until_CBW, query_RBP)
  return o_RBKGPH, (*operands, o_RBKGPH, lse_RBKGP)


def _backward(name, kept, do_RBKGPH):
  """Gradients of queries, keys and values (arXiv 2205.14135, algorithm 4)."""
  q_RBKGPH, k_CBKWH, v_CBKWH, until_CBW, query_RBP, o_RBKGPH, lse_RBKGP = kept
  delta_RBKGP = jnp.einsum(
    'rbkgph,rbkgph->rbkgp',
    do_RBKGPH,
    o_RBKGPH,
    preferred_element_type=jnp.float32,
  )
  order_RC, count_R = _visits(until_CBW, query_RBP)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def rows(carry, xs):
    q_BKGPH, query_BP, do_BKGPH, lse_BKGP, delta_BKGP, order_C, count = xs

    def add(index, carry):
      dq_BKGPH, dk_CBKWH, dv_CBKWH = carry
      at = order_C[index]
      k_BKWH, v_BKWH = k_CBKWH[at], v_CBKWH[at]
      s_BKGPW = _scores(q_BKGPH, k_BKWH, until_CBW[at], query_BP, at)
      p_BKGPW = jnp.exp(s_BKGPW - lse_BKGP[..., None])
      dp_BKGPW = product('bkgph,bkwh->bkgpw', do_BKGPH, v_BKWH)
      ds_BKGPW = p_BKGPW * (dp_BKGPW - delta_BKGP[..., None])
      p_BKGPW = p_BKGPW.astype(v_BKWH.dtype)
      ds_BKGPW = ds_BKGPW.astype(k_BKWH.dtype)
      dv_BKWH = product('bkgpw,bkgph->bkwh', p_BKGPW, do_BKGPH)
      dk_BKWH = product('bkgpw,bkgph->bkwh', ds_BKGPW, q_BKGPH)
      return (
        dq_BKGPH + product('bkgpw,bkwh->bkgph', ds_BKGPW, k_BKWH),
        dk_CBKWH.at[at].add(dk_BKWH),
        dv_CBKWH.at[at].add(dv_BKWH),
      )

    start = (_full(q_BKGPH.shape, 0.0, q_BKGPH), *carry)
    dq_BKGPH, *carry = jax.lax.fori_loop(0, count, add, start)
    return tuple(carry), dq_BKGPH.astype(q_BKGPH.dtype)

  zeros = tuple(_full(x.shape, 0.0, x) for x in (k_CBKWH, v_CBKWH))
  (dk_CBKWH, dv_CBKWH), dq_RBKGPH = jax.lax.scan(
    rows,
    zeros,
    (q_RBKGPH, query_RBP, do_RBKGPH, lse_RBKGP, delta_RBKGP, order_RC, count_R),
  )
  return (
    dq_RBKGPH,
    dk_CBKWH.astype(k_CBKWH.dtype),
    dv_CBKWH.astype(v_CBKWH.dtype),
    None,
    None,
  )


_attention.defvjp(_forward, _backward)


def _scores(q_BKGPH, k_BKWH, until_BW, query_BP, at) -> jax.Array:
  """float32 scores of block `at` of the keys; hidden keys near HIDDEN."""
  s_BKGPW = jnp.einsum(
    'bkgph,bkwh->bkgpw', q_BKGPH, k_BKWH, preferred_element_type=jnp.float32
  )
  key_11W = at * BLOCK + jnp.arange(BLOCK)[None, None]
  query_BP1 = query_BP[:, :, None]
  seen_BPW = (key_11W <= query_BP1) & (query_BP1 < until_BW[:, None])
  return s_BKGPW + jnp.where(seen_BPW, 0.0, HIDDEN)[:, None, None]


def _visits(until_CBW, query_RBP) -> tuple[jax.Array, jax.Array]:
  """Blocks of keys in the order that each block of queries visits them.

  Returns:
    int32[R, C], of which the first so many are those in which a key may be
    seen, and how many, int32[R].
  """
  first_1C = jnp.arange(until_CBW.shape[0])[None] * BLOCK
  seen_RBC = (first_1C[:, None] <= query_RBP.max(2)[:, :, None]) & (
    query_RBP.min(2)[:, :, None] < until_CBW.max(2).T[None]
  )
  return listed(seen_RBC.any(1))


def listed(seen_RC: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The true entries of each row.

  Returns:
    int32[R, C], of which the first so many are their columns, rising, and how
    many, int32[R].
  """
  # The n-th of them comes after all those up to which fewer than n were seen.
  # Compared instead of sorted, which takes TPU compilers seconds.
  so_far_R1C = jnp.cumsum(seen_RC, axis=1, dtype=jnp.int32)[:, None]
  index_1C1 = jnp.arange(seen_RC.shape[1])[None, :, None]
  order_RC = (so_far_R1C <= index_1C1).sum(2, dtype=jnp.int32)
  return order_RC, seen_RC.sum(1, dtype=jnp.int32)
