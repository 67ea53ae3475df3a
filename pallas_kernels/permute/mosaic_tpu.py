"""Moving rows to and from expert order on TPUs, in Pallas Mosaic.

Every row is a copy of its own into vector memory; a tile of them is in flight
while the tile before is worked on. Copies cannot be smaller than a 32-bit word
and bfloat16 packs two rows into one, so rows to gather are first packed with
their own halves, which is cheap since there are few; rows to combine are read
as they lie, with the neighbour that shares their words.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles_tpu
from pallas_kernels.gmm import mosaic_tpu, stream_tpu
from pallas_kernels.permute import layout, xla

GATHER_ROWS = 128  # of a tile
COMBINE_ROWS = 16
UNROLL = 8  # copies started in a row: scalar work is what limits them
HIGH = 0xFFFF0000


def refusal(dtype: jnp.dtype, width: int) -> str | None:
  """Why these kernels cannot move such rows here, or None."""
  if dtype != jnp.bfloat16:
    return f'moves bfloat16, not {dtype}'
  if width % (2 * tiles_tpu.LANES):
    return f'needs widths in multiples of 256, not {width}'
  return mosaic_tpu.no_device()


def gather(
  x_MD: jax.Array,
  plan: layout.Plan,
  clear: int | None = None,
  *,
  chip: tiles_tpu.Chip | None = None,
) -> jax.Array:
  """Each position's token; zeros where there is none, whatever `clear`."""
  del clear
  tokens, choices = plan.place_MX.shape
  token_P = jnp.minimum(plan.source_P // choices, tokens)
  return gather_rows(x_MD, token_P, chip=chip)


def gather_rows(
  x_MD: jax.Array, index_P: jax.Array, *, chip: tiles_tpu.Chip | None = None
) -> jax.Array:
  """Row `index_P[p]` of `x_MD` at p; zeros where there is no such row.

  Args:
    x_MD: bfloat16 rows.
    index_P: int32; indices outside [0, M) have a row of zeros.
    chip: what to compile for; None is the device at hand.
  """
  chip = chip or tiles_tpu.here()
  tokens, width = x_MD.shape
  rows = index_P.shape[0]
  tile = min(GATHER_ROWS, -(-rows // stream_tpu.ALIGN) * stream_tpu.ALIGN)
  tiles = -(-rows // tile)
  steps = -(-tiles // chip.cores)
  index_P = jnp.where((index_P >= 0) & (index_P < tokens), index_P, tokens)
  index_T1R = _tiled(index_P, tiles, tile, tokens)

  def block(core, n):
    # With an odd number of tiles the last core does its last one twice.
    return jnp.minimum(core * steps + n, tiles - 1)

  call = pl.pallas_call(
    functools.partial(_gather_body, steps=steps),
    out_shape=stream_tpu.like(x_MD, (rows, width), x_MD.dtype),
    grid=(chip.cores, steps),
    in_specs=[
      *_now_and_next(tile, block),
      pl.BlockSpec(memory_space=pltpu.HBM),
    ],
    out_specs=pl.BlockSpec((tile, width), lambda core, n: (block(core, n), 0)),
    scratch_shapes=[
      pltpu.VMEM((2, tile, width // 2), jnp.uint32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    compiler_params=stream_tpu.params(chip, 2),
    cost_estimate=pl.CostEstimate(
      flops=0, bytes_accessed=4 * rows * width, transcendentals=0
    ),
    interpret=chip.interpret,
    name='gather_rows',
  )
  return call(index_T1R, index_T1R, _packed(x_MD))


def _packed(x_MD: jax.Array) -> jax.Array:
  """uint32[M + 1, D / 2]: a row's halves in one word, then a row of zeros."""
  half = x_MD.shape[1] // 2
  low, high = (
    lax.bitcast_convert_type(z, jnp.uint16).astype(jnp.uint32)
    for z in (x_MD[:, :half], x_MD[:, half:])
  )
  return jnp.pad(low | (high << 16), ((0, 1), (0, 0)))


def _tiled(index_R, tiles: int, tile: int, fill: int) -> jax.Array:
  """int32[tiles, 1, tile]: indices as blocks of scalar memory."""
  pad = tiles * tile - index_R.shape[0]
  index_R = jnp.pad(index_R.astype(jnp.int32), (0, pad), constant_values=fill)
  return index_R.reshape(tiles, 1, tile)


def _now_and_next(tile: int, block) -> list[pl.BlockSpec]:
  """The indices of a step and of the one whose copies start meanwhile."""
  return [
    pl.BlockSpec(
      (1, 1, tile),
      lambda core, n, ahead=ahead: (block(core, n + ahead), 0, 0),
      memory_space=pltpu.SMEM,
    )
    for ahead in (0, 1)
  ]


def _pipelined(now_ref, next_ref, fetch, buffer, arrived, steps: int):
  """Starts the next tile's copies and waits for this one's; its slot.

  Args:
    now_ref: indices of this step's tile.
    next_ref: of the next step's.
    fetch: (indices, n, slot) -> the n-th copy of a tile.
    buffer: [2, ...], what the copies of a tile fill together.
    arrived: a semaphore a slot.
    steps: of this core.
  """
  step = pl.program_id(1)
  slot = lax.rem(step, 2)

  def start(index_ref, into):
    count = index_ref.shape[2]

    def some(n, _):
      for near in range(UNROLL):
        fetch(index_ref, n * UNROLL + near, into).start()

    lax.fori_loop(0, count // UNROLL, some, None)

  pl.when(step == 0)(lambda: start(now_ref, slot))
  pl.when(step + 1 < steps)(lambda: start(next_ref, 1 - slot))
  # One wait for the bytes of them all.
  whole = buffer.at[slot]
  pltpu.make_async_copy(whole, whole, arrived.at[slot]).wait()
  return slot


def _gather_body(now_ref, next_ref, x_hbm, out_ref, buffer, arrived, *, steps):
  half = out_ref.shape[1] // 2

  def fetch(index_ref, n, slot):
    target = buffer.at[slot, pl.ds(n, 1)]
    source = x_hbm.at[pl.ds(index_ref[0, 0, n], 1)]
    return pltpu.make_async_copy(source, target, arrived.at[slot])

  slot = _pipelined(now_ref, next_ref, fetch, buffer, arrived, steps)
  words = buffer[slot]
  out_ref[:, :half] = _low(words).astype(out_ref.dtype)
  out_ref[:, half:] = _high(words).astype(out_ref.dtype)


def _low(words: jax.Array) -> jax.Array:
  """The float32 of the bfloat16 in the lower halves."""
  return lax.bitcast_convert_type(words << 16, jnp.float32)


def _high(words: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(words & jnp.uint32(HIGH), jnp.float32)


def combine(
  y_PD: jax.Array,
  place_MX: jax.Array,
  weight_MX: jax.Array | None,
  *,
  chip: tiles_tpu.Chip | None = None,
) -> jax.Array:
  """Sum of each token's rows in float32, times weights if there are any.

  Args:
    y_PD: bfloat16 rows.
    place_MX: int32 rows of a token; outside [0, P) are rows of zeros.
    weight_MX: float32, or None for ones.
    chip: what to compile for; None is the device at hand.
  """
  chip = chip or tiles_tpu.here()
  (tokens, choices), (rows, width) = place_MX.shape, y_PD.shape
  if rows % 2:
    y_PD = jnp.pad(y_PD, ((0, 1), (0, 0)))
  if weight_MX is None:
    weight_MX = jnp.ones(place_MX.shape, jnp.float32)
  tile = COMBINE_ROWS
  tiles = -(-tokens // tile)
  steps = -(-tiles // chip.cores)
  if chip.interpret:
    # The simulator's copies do not follow a memory's change of type.
    pairs = y_PD.reshape(-1, 2, width).swapaxes(1, 2)
    words = lax.bitcast_convert_type(pairs, jnp.uint32)
  else:
    words = y_PD
  valid_MX = (place_MX >= 0) & (place_MX < rows)
  pad = (0, tiles * tile - tokens), (0, 0)
  # -1 marks a row of zeros: it is fetched from somewhere and not used.
  place_MX = jnp.pad(
    jnp.where(valid_MX, place_MX, -1), pad, constant_values=-1
  ).astype(jnp.int32)
  weight_MX = jnp.pad(weight_MX.astype(jnp.float32), pad)
  pair_T1R = _tiled(
    jnp.maximum(place_MX, 0).reshape(-1) // 2, tiles, tile * choices, 0
  )

  def block(core, n):
    return jnp.minimum(core * steps + n, tiles - 1)

  def vector(columns):
    return pl.BlockSpec((tile, columns), lambda core, n: (block(core, n), 0))

  call = pl.pallas_call(
    functools.partial(_combine_body, choices=choices, steps=steps),
    out_shape=stream_tpu.like(y_PD, (tokens, width), y_PD.dtype),
    grid=(chip.cores, steps),
    in_specs=[
      *_now_and_next(tile * choices, block),
      vector(choices),
      vector(choices),
      pl.BlockSpec(memory_space=pltpu.HBM),
    ],
    out_specs=vector(width),
    scratch_shapes=[
      pltpu.VMEM((2, choices, tile, width), jnp.uint32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    compiler_params=stream_tpu.params(chip, 2),
    cost_estimate=pl.CostEstimate(
      flops=2 * tokens * choices * width,
      bytes_accessed=(4 * choices + 2) * tokens * width,
      transcendentals=0,
    ),
    interpret=chip.interpret,
    name='combine_rows',
  )
  return call(pair_T1R, pair_T1R, place_MX, weight_MX, words)


def _combine_body(
  now_ref,
  next_ref,
  place_ref,
  weight_ref,
  y_hbm,
  out_ref,
  buffer,
  arrived,
  *,
  choices,
  steps,
):
  words = y_hbm.dtype == jnp.uint32
  y_words = y_hbm if words else y_hbm.bitcast(jnp.uint32)

  def fetch(index_ref, n, slot):
    token, choice = lax.div(n, choices), lax.rem(n, choices)
    target = buffer.at[slot, choice, pl.ds(token, 1)]
    source = y_words.at[pl.ds(index_ref[0, 0, n], 1)]
    return pltpu.make_async_copy(source, target, arrived.at[slot])

  slot = _pipelined(now_ref, next_ref, fetch, buffer, arrived, steps)
  place, weight = place_ref[...], weight_ref[...]
  total = jnp.zeros(out_ref.shape, jnp.float32)
  for x in range(choices):
    words = buffer[slot, x]
    here, share = place[:, x : x + 1], weight[:, x : x + 1]
    row = jnp.where((here & 1) == 1, _high(words), _low(words))
    total += jnp.where(here >= 0, share * row, 0)
  out_ref[...] = total.astype(out_ref.dtype)


MOVES = layout.Moves(gather, combine, xla.weight_gradient)
