"""Log-probabilities from hidden states, a chunk of logits at a time."""

from typing import Any

import jax
import jax.numpy as jnp

from m2.parallel import sharding


def from_hidden(
  params: Any,
  hidden_BTD: jax.Array,
  target_BT: jax.Array,
  *,
  chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scores `target_BT` under the head, in float32.

  Args:
    params: parameters; only `head` is read.
    hidden_BTD: hidden states after the final norm.
    target_BT: int32, the token each hidden state should predict.
    chunk: tokens whose logits exist at once on a device; recomputed in the
      backward pass.

  Returns:
    log-probability, entropy (nats) and log-partition, each float32[B, T].
  """
  rows = sharding.spec('batch', 'sequence')
  run = sharding.manual(
    lambda head, hidden, target: _local(head, hidden, target, chunk),
    (
      sharding.spec(None, 'ffn'),
      sharding.spec('batch', 'sequence', None),
      rows,
    ),
    (rows, rows, rows),
  )
  return run(params['head'].astype(jnp.float32), hidden_BTD, target_BT)


def _local(head_DV, hidden_BTD, target_BT, chunk):
  axis = 'tensor' if sharding.axis_sizes() else None
  head_DV = sharding.varying(head_DV)
  batch, length, width = hidden_BTD.shape
  tokens = batch * length
  chunks = -(-tokens // chunk)
  size = -(-tokens // chunks)
  pad = chunks * size - tokens
  hidden_MD = jnp.pad(hidden_BTD.reshape(tokens, width), ((0, pad), (0, 0)))
  target_M = jnp.pad(target_BT.reshape(tokens), (0, pad))

  @jax.checkpoint
  def score(xs):
    hidden_CD, target_C = xs
    logits_CV = jnp.einsum(
      'cd,dv->cv',
      hidden_CD.astype(jnp.float32),
      head_DV,
      precision=jax.lax.Precision.HIGHEST,
    )
    return statistics(logits_CV, target_C, axis)

  xs = (hidden_MD.reshape(chunks, size, width), target_M.reshape(chunks, size))
  results = (
    score(jax.tree.map(lambda x: x[0], xs))
    if chunks == 1
    else (jax.lax.map(score, xs))
  )
  return tuple(
    result.reshape(-1)[:tokens].reshape(batch, length) for result in results
  )


def statistics(
  logits_CV: jax.Array, target_C: jax.Array, axis: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Log-probability of the targets, entropy and log-partition of each row.

  With `axis`, each device of that mesh axis holds a slice of the vocabulary.
  """
  first = jax.lax.axis_index(axis) * logits_CV.shape[1] if axis else 0

  def total(x_C):
    return jax.lax.psum(x_C, axis) if axis else x_C

  top_C = jax.lax.stop_gradient(logits_CV.max(-1))
  if axis:
    top_C = jax.lax.pmax(top_C, axis)
  exp_CV = jnp.exp(logits_CV - top_C[:, None])
  sum_C = total(exp_CV.sum(-1))
  logz_C = jnp.log(sum_C) + top_C
  # Masked sum instead of a gather: its transpose is not a scatter.
  own_CV = target_C[:, None] == first + jnp.arange(logits_CV.shape[1])[None]
  logp_C = total(jnp.where(own_CV, logits_CV, 0).sum(-1)) - logz_C
  mean_C = total((exp_CV * logits_CV).sum(-1)) / sum_C
  return logp_C, logz_C - mean_C, logz_C
