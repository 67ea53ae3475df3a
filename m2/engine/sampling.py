"""Choosing the next token: pure functions of logits and a key per row.

Order of the filters: temperature, then top-k, then top-p; ties with the last
kept token stay. Temperature 0 is the most likely token.

The log-probability that comes back is always the model's own, at temperature 1
over the whole vocabulary: what the trainer computes for the same token. With
temperature 1 and no filter that is also what the token was drawn from; in every
other case the ratio of CISPO does not see the difference, so the RL loop
refuses such settings.

Letters: B rows, V vocabulary, C blocks of the vocabulary, W width of a block.
"""

import jax
import jax.numpy as jnp

from m2.parallel import sharding


def seed_words(seed: int) -> tuple[int, int]:
  """The two 32-bit words of the key that a request's seed stands for."""
  return (seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF


def sample(
  logits_BV: jax.Array,
  seed_B2: jax.Array,
  position_B: jax.Array,
  temperature_B: jax.Array,
  top_p_B: jax.Array,
  top_k_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token a row.

  A row's draw depends on its logits, seed and position alone: the same request
  gives the same tokens whatever else is in the batch.

  Args:
    logits_BV: float32 logits of the model.
    seed_B2: uint32 key of each request, see `seed_words`.
    position_B: int32 position that the drawn token will have.
    temperature_B: float32; 0 is greedy.
    top_p_B: float32 in (0, 1]; 1 is off.
    top_k_B: int32; 0 is off.

  Returns:
    Tokens int32[B] and the model's log-probability of each, float32[B].
  """
  row = sharding.spec('batch')
  rows = sharding.spec('batch', None)
  run = sharding.manual(_local, (rows, rows, row, row, row, row), (row, row))
  return run(logits_BV, seed_B2, position_B, temperature_B, top_p_B, top_k_B)


def _local(logits_BV, seed_B2, position_B, temperature_B, top_p_B, top_k_B):
  greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  warm_B = jnp.where(temperature_B > 0, temperature_B, 1.0)
  scaled_BV = logits_BV / warm_B[:, None]
  # Filters sort the vocabulary: only paid for when a row asks for one.
  scaled_BV = jax.lax.cond(
    ((top_p_B < 1) | (top_k_B > 0)).any(),
    restrict,
    lambda scaled, top_p, top_k: scaled,
    scaled_BV,
    top_p_B,
    top_k_B,
  )
  weight_BV = jnp.exp(scaled_BV - scaled_BV.max(-1, keepdims=True))
  drawn_B = draw(weight_BV, uniforms(seed_B2, position_B))
  token_B = jnp.where(temperature_B > 0, drawn_B, greedy_B)
  own_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
  return token_B, own_B - jax.nn.logsumexp(logits_BV, axis=-1)


def restrict(
  logits_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array
) -> jax.Array:
  """Sets what top-k, then top-p, leave out to -inf."""
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  vocab = logits_BV.shape[-1]
  rank_1V = jnp.arange(vocab)[None]
  limit_B1 = jnp.where(top_k_B > 0, top_k_B, vocab)[:, None]
  kept_BV = jnp.where(rank_1V < limit_B1, sorted_BV, -jnp.inf)
  p_BV = jax.nn.softmax(kept_BV, axis=-1)
  # A token stays if what precedes it has not reached top_p.
  before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
  stays_BV = (before_BV < top_p_B[:, None]) & (rank_1V < limit_B1)
  last_B1 = jnp.where(stays_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
  return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)


def uniforms(seed_B2: jax.Array, position_B: jax.Array) -> jax.Array:
  """float32[B, 2] in [0, 1): a function of each row's seed and position."""

  def one(seed_2, position):
    key = jax.random.fold_in(jax.random.wrap_key_data(seed_2), position)
    return jax.random.uniform(key, (2,))

  return jax.vmap(one)(seed_B2, position_B)


def draw(weight_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
  """Draws from unnormalised weights: first a block, then a token in it.

  Two short cumulative sums instead of one random number for every token of the
  vocabulary, and no sum long enough to lose small probabilities.
  """
  batch, vocab = weight_BV.shape
  width = max(1, round(vocab**0.5))
  blocks = -(-vocab // width)
  pad = blocks * width - vocab
  weight_BCW = jnp.pad(weight_BV, ((0, 0), (0, pad))).reshape(
    batch, blocks, width
  )
  block_B = _first_above(weight_BCW.sum(-1), uniform_B2[:, 0])
  inside_BW = jnp.take_along_axis(weight_BCW, block_B[:, None, None], axis=1)
  offset_B = _first_above(inside_BW[:, 0], uniform_B2[:, 1])
  return block_B * width + offset_B


def _first_above(weight_BC: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """First index whose cumulative weight exceeds `uniform` of the total."""
  sum_BC = jnp.cumsum(weight_BC, axis=-1)
  goal_B1 = uniform_B[:, None] * sum_BC[:, -1:]
  return jnp.argmax(sum_BC > goal_B1, axis=-1).astype(jnp.int32)
