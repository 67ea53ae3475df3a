"""The engine's device state and its two programs: prefill and decode.

A slot is one row of a dense cache with the request that lives in it. Every
program has a fixed shape: `length` entries of each row (of a few allowed
lengths), `rows` prompts at once. So nothing is compiled after warm-up.

Letters: B slots, R prompts of one prefill, A admissions of one prefill, C
tokens of a chunk, S cache entries, T = S, I stop ids, V vocabulary, L layers, X
experts used, D model.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from m2 import config
from m2.engine import requests, sampling
from m2.model import cache as kv
from m2.model import transformer
from m2.parallel import order, sharding

# Logical axes of a cache's keys and values.
LAYERS = (None, 'batch', None, 'kv_heads', None)
FOREVER = 2**30  # `until` of a generated token: every later one sees it


@flax.struct.dataclass
class Slots:
  """One row a slot; `left_B` 0 marks a slot in which nothing is generated.

  Attributes:
    cache: keys and values of the tokens fed so far.
    token_B: int32, the last token, sampled but not fed.
    left_B: int32, tokens that may still be sampled.
    seed_B2: uint32 key of the request.
    temperature_B: float32.
    top_p_B: float32.
    top_k_B: int32.
    stop_BI: int32 stop ids; -1 where there is none.
  """

  cache: kv.KVCache
  token_B: jax.Array
  left_B: jax.Array
  seed_B2: jax.Array
  temperature_B: jax.Array
  top_p_B: jax.Array
  top_k_B: jax.Array
  stop_BI: jax.Array


@flax.struct.dataclass
class Admission:
  """Prompts to prefill and the slots they go to.

  Attributes:
    tokens_RT: int32, what must be computed of each prompt.
    size_R: int32, tokens of each row of `tokens_RT`; 0 = unused row.
    origin_R: int32, slot whose cache begins like the prompt.
    keep_R: int32, entries taken over from it.
    source_A: int32, prompt of each admitted request.
    slot_A: int32, its slot; a number past the last slot = unused.
    left_A: int32, tokens it may sample.
    seed_A2: uint32.
    temperature_A: float32.
    top_p_A: float32.
    top_k_A: int32.
    stop_AI: int32.
  """

  tokens_RT: Any
  size_R: Any
  origin_R: Any
  keep_R: Any
  source_A: Any
  slot_A: Any
  left_A: Any
  seed_A2: Any
  temperature_A: Any
  top_p_A: Any
  top_k_A: Any
  stop_AI: Any


def empty(cfg: config.ModelConfig, slots: int, length: int) -> Slots:
  """All slots idle."""

  def column(value, dtype, *width):
    x = jnp.full((slots, *width), value, dtype)
    return sharding.place(x, 'batch', *(None for _ in width))

  return Slots(
    cache=kv.empty(cfg, slots, length),
    token_B=column(0, jnp.int32),
    left_B=column(0, jnp.int32),
    seed_B2=column(0, jnp.uint32, 2),
    temperature_B=column(1, jnp.float32),
    top_p_B=column(1, jnp.float32),
    top_k_B=column(0, jnp.int32),
    stop_BI=column(-1, jnp.int32, requests.STOP_IDS),
  )


def decode(
  cfg: config.ModelConfig,
  length: int,
  chunk: int,
  want_experts: bool,
  params: Any,
  slots: Slots,
) -> tuple[Slots, dict[str, jax.Array]]:
  """Samples up to `chunk` tokens for every live slot.

  Args:
    cfg: model shape.
    length: S, entries of each row to attend to; no live row may pass it.
    chunk: C, most tokens a slot gets.
    want_experts: also return the routes of the tokens that were fed.
    params: parameters.
    slots: device state.

  Returns:
    The new state; and `ids` int32[C, B] (-1 where a slot was idle), `logprobs`
    float32[C, B], `left` int32[B] and, if wanted, `experts` int32[C, L, B, X].
  """
  rows = slots.token_B.shape[0]
  whole = slots.cache
  slots = slots.replace(cache=_shorten(whole, length))
  out = {
    'ids': _buffer((chunk, rows), -1, jnp.int32, None, 'batch'),
    'logprobs': _buffer((chunk, rows), 0, jnp.float32, None, 'batch'),
  }
  if want_experts:
    shape = (chunk, cfg.layers, rows, cfg.top_k)
    out['experts'] = _buffer(shape, 0, jnp.int32, None, None, 'batch', None)

  def going(carry):
    step, slots, _ = carry
    return (step < chunk) & (slots.left_B > 0).any()

  def body(carry):
    step, slots, out = carry
    live_B = slots.left_B > 0
    output = transformer.forward(
      cfg,
      params,
      slots.token_B[:, None],
      slots.cache.filled_B[:, None],
      jnp.where(live_B, FOREVER, 0)[:, None],
      slots.cache,
    )
    slots = slots.replace(cache=output.cache)
    slots, token_B, logp_B = _next(params, slots, output.hidden_BTD, live_B)
    fresh = {'ids': token_B, 'logprobs': logp_B}
    if want_experts:
      fresh['experts'] = output.experts_LBTX[:, :, 0]
    out = {
      name: jax.lax.dynamic_update_index_in_dim(out[name], value, step, 0)
      for name, value in fresh.items()
    }
    return step + 1, slots, out

  _, slots, out = jax.lax.while_loop(going, body, (jnp.int32(0), slots, out))
  slots = slots.replace(cache=_lengthen(whole, slots.cache))
  return slots, out | {'left': slots.left_B}


def prefill(
  cfg: config.ModelConfig,
  length: int,
  chunk: int,
  want_experts: bool,
  params: Any,
  slots: Slots,
  admission: Admission,
) -> tuple[Slots, dict[str, jax.Array]]:
  """Computes prompts and samples the first token of every admitted request.

  Prompts are computed `chunk` tokens at a time; several requests with the same
  prompt share one row.

  Args:
    cfg: model shape.
    length: S, entries of the prompts' rows.
    chunk: C, tokens of each prompt computed at once.
    want_experts: also return the routes of the prompts.
    params: parameters.
    slots: device state.
    admission: what to compute and where it goes.

  Returns:
    The new state; and `ids`, `logprobs` and `left` of all slots (meaningful
    for the admitted ones) and, if wanted, `experts` int32[L, R, T, X].
  """
  rows = _take_rows(
    _shorten(slots.cache, length), admission.origin_R, admission.keep_R
  )
  rows, hidden_RD, experts = _run_prompts(
    cfg, chunk, want_experts, params, rows, admission
  )
  slots, hidden_BD, new_B = _install(slots, rows, hidden_RD, admission)
  slots, token_B, logp_B = _next(params, slots, hidden_BD[:, None], new_B)
  out = {'ids': token_B, 'logprobs': logp_B, 'left': slots.left_B}
  return slots, out | ({'experts': experts} if want_experts else {})


def _next(params, slots: Slots, hidden_BTD, live_B):
  """Samples the next token of the live slots; stops those that are through."""
  logits_BV = transformer.head_logits(params, hidden_BTD)[:, 0]
  token_B, logp_B = sampling.sample(
    logits_BV,
    slots.seed_B2,
    slots.cache.filled_B,
    slots.temperature_B,
    slots.top_p_B,
    slots.top_k_B,
  )
  stopped_B = (token_B[:, None] == slots.stop_BI).any(-1)
  left_B = jnp.where(stopped_B, 0, slots.left_B - 1)
  slots = slots.replace(
    token_B=jnp.where(live_B, token_B, slots.token_B),
    left_B=jnp.where(live_B, left_B, slots.left_B),
  )
  return slots, jnp.where(live_B, token_B, -1), jnp.where(live_B, logp_B, 0.0)


def _run_prompts(cfg, chunk, want_experts, params, rows, admission):
  """Feeds every prompt, `chunk` tokens a turn; the last hidden states."""
  tokens_RT, size_R = admission.tokens_RT, admission.size_R
  count, length = tokens_RT.shape
  hidden_RD = _buffer((count, cfg.d_model), 0, cfg.dtype, 'batch', None)
  experts = ()
  if want_experts:
    shape = (cfg.layers, count, length, cfg.top_k)
    experts = _buffer(shape, 0, jnp.int32, None, 'batch', None, None)

  def body(at, carry):
    rows, hidden_RD, experts = carry
    index_C = at * chunk + jnp.arange(chunk)
    tokens_RC = jax.lax.dynamic_slice_in_dim(tokens_RT, at * chunk, chunk, 1)
    real_RC = index_C[None] < size_R[:, None]
    output = transformer.forward(
      cfg,
      params,
      tokens_RC,
      admission.keep_R[:, None] + index_C[None],
      jnp.where(real_RC, FOREVER, 0),
      rows,
    )
    last_RC = index_C[None] == size_R[:, None] - 1
    picked_RD = jnp.where(last_RC[..., None], output.hidden_BTD, 0).sum(1)
    hidden_RD = hidden_RD + picked_RD.astype(hidden_RD.dtype)
    if want_experts:
      new = sharding.place(output.experts_LBTX, None, 'batch', None, None)
      experts = jax.lax.dynamic_update_slice_in_dim(experts, new, at * chunk, 2)
    return output.cache, hidden_RD, experts

  turns = -(-size_R.max() // chunk)
  return jax.lax.fori_loop(0, turns, body, (rows, hidden_RD, experts))


def _take_rows(
  cache: kv.KVCache, origin_R: jax.Array, keep_R: jax.Array
) -> kv.KVCache:
  """Copies the first `keep` entries of other slots' rows.

  A layer at a time, as rows may come from any device: reduce-scatter of its
  keys and values, R * S * K * H each, over the batch axes.
  """

  def local(k_LBSKH, v_LBSKH, origin_R):
    own_R, at_R = _here(origin_R, k_LBSKH.shape[1])

    def one(x_BSKH):
      own_RSKH = own_R.reshape(-1, 1, 1, 1)
      return _scattered(jnp.where(own_RSKH, x_BSKH[at_R], 0))

    return jax.lax.map(lambda pair: tuple(map(one, pair)), (k_LBSKH, v_LBSKH))

  layers = sharding.spec(*LAYERS)
  run = sharding.manual(
    local, (layers, layers, sharding.spec(None)), (layers, layers)
  )
  k_LRSKH, v_LRSKH = run(cache.k_LBSKH, cache.v_LBSKH, origin_R)
  keep_R = sharding.place(keep_R, 'batch')
  index_1S = jnp.arange(k_LRSKH.shape[2])[None]
  until_RS = jnp.where(index_1S < keep_R[:, None], FOREVER, 0)
  return kv.KVCache(k_LRSKH, v_LRSKH, until_RS, keep_R)


def _install(
  slots: Slots, rows: kv.KVCache, hidden_RD: jax.Array, admission: Admission
) -> tuple[Slots, jax.Array, jax.Array]:
  """Moves computed prompts and their requests into their slots.

  A layer at a time: all-gather of its keys and values, R * S * K * H each, over
  the batch axes; what is not of a layer is gathered before.
  """

  def local(slots, rows, hidden_RD, admission):
    count = slots.token_B.shape[0]
    own_A, at_A = _here(admission.slot_A, count)
    at_A = jnp.where(own_A, at_A, count)  # past the end: dropped
    # Of each slot, whether something comes to it, and the prompt it holds.
    fresh_B = jnp.zeros(count, bool).at[at_A].set(True, mode='drop')
    from_B = jnp.zeros(count, jnp.int32)
    from_B = from_B.at[at_A].set(admission.source_A, mode='drop')

    def put(x, value):
      return x.at[at_A].set(value, mode='drop')

    def move(x, all_R):
      """Entries of prompts to the slots that hold them, from the start."""
      new_B = all_R[from_B]
      fresh = fresh_B.reshape(-1, *(1,) * (x.ndim - 1))
      if x.ndim == 1:
        return jnp.where(fresh, new_B, x)
      old_B = jax.lax.slice_in_dim(x, 0, new_B.shape[1], axis=1)
      new_B = jnp.where(fresh, new_B, old_B)
      return jax.lax.dynamic_update_slice_in_dim(x, new_B, 0, axis=1)

    until_RS = rows.until_BS
    short = slots.cache.until_BS.shape[1] - until_RS.shape[1]
    until_RS = jnp.pad(until_RS, ((0, 0), (0, short)))
    k_LBSKH, v_LBSKH = jax.lax.map(
      lambda layer: tuple(move(x, _everyone(new)) for x, new in layer),
      (
        (slots.cache.k_LBSKH, rows.k_LBSKH),
        (slots.cache.v_LBSKH, rows.v_LBSKH),
      ),
    )
    cache = kv.KVCache(
      k_LBSKH=k_LBSKH,
      v_LBSKH=v_LBSKH,
      until_BS=move(slots.cache.until_BS, until_RS),
      filled_B=move(slots.cache.filled_B, rows.filled_B),
    )
    moved = Slots(
      cache=cache,
      token_B=slots.token_B,
      left_B=put(slots.left_B, admission.left_A),
      seed_B2=put(slots.seed_B2, admission.seed_A2),
      temperature_B=put(slots.temperature_B, admission.temperature_A),
      top_p_B=put(slots.top_p_B, admission.top_p_A),
      top_k_B=put(slots.top_k_B, admission.top_k_A),
      stop_BI=put(slots.stop_BI, admission.stop_AI),
    )
    hidden_BD = jnp.zeros((count, hidden_RD.shape[1]), hidden_RD.dtype)
    return moved, move(hidden_BD, hidden_RD), fresh_B

  row, rows_2 = sharding.spec('batch'), sharding.spec('batch', None)
  layers = sharding.spec(*LAYERS)
  cache = kv.KVCache(layers, layers, rows_2, row)
  state = Slots(cache, row, row, rows_2, row, row, row, rows_2)
  everywhere = jax.tree.map(
    lambda x: sharding.spec(*(None,) * x.ndim), (rows, hidden_RD, admission)
  )
  prompts = everywhere[0].replace(k_LBSKH=layers, v_LBSKH=layers)
  run = sharding.manual(
    local, (state, prompts, *everywhere[1:]), (state, rows_2, row)
  )
  return order.together(run(slots, rows, hidden_RD, admission))


def _here(slot: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Whether slots are among this device's `count`, and which of them."""
  first = 0
  if sharding.axis_sizes():
    first = jax.lax.axis_index(sharding.RULES['batch']) * count
  at = slot - first
  return (at >= 0) & (at < count), jnp.clip(at, 0, count - 1)


def _scattered(x_RC: jax.Array) -> jax.Array:
  """This device's rows of the sum over the batch axes."""
  if not sharding.axis_sizes():
    return x_RC
  return jax.lax.psum_scatter(x_RC, sharding.RULES['batch'], tiled=True)


def _everyone(x_RC: jax.Array) -> jax.Array:
  """The rows of all devices."""
  if not sharding.axis_sizes():
    return x_RC
  return jax.lax.all_gather(x_RC, sharding.RULES['batch'], tiled=True)


def _buffer(shape, value, dtype, *axes):
  return sharding.place(jnp.full(shape, value, dtype), *axes)


def _shorten(cache: kv.KVCache, length: int) -> kv.KVCache:
  return cache.replace(
    k_LBSKH=cache.k_LBSKH[:, :, :length],
    v_LBSKH=cache.v_LBSKH[:, :, :length],
    until_BS=cache.until_BS[:, :length],
  )


def _lengthen(whole: kv.KVCache, part: kv.KVCache) -> kv.KVCache:
  """The whole cache with its first entries replaced."""
  if whole.until_BS.shape == part.until_BS.shape:
    return part
  length = part.until_BS.shape[1]
  return kv.KVCache(
    k_LBSKH=whole.k_LBSKH.at[:, :, :length].set(part.k_LBSKH),
    v_LBSKH=whole.v_LBSKH.at[:, :, :length].set(part.v_LBSKH),
    until_BS=whole.until_BS.at[:, :length].set(part.until_BS),
    filled_B=part.filled_B,
  )
