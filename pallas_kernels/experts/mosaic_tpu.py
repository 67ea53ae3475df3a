"""The expert layer's products on TPUs, with what follows them fused in.

Rows stream past their expert's matrices, which stay in vector memory
(`gmm/stream_tpu.py`): gate and up projections are one pass whose results meet
as SwiGLU before anything is stored, and backward the gradient of the
activation never reaches memory. Activations are made of the pre-activations as
they were rounded, forward and backward, so both passes see the same ones.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiles_tpu
from pallas_kernels.experts import vjp
from pallas_kernels.gmm import mosaic_tpu, stream_tpu

# A number a row takes a row of lanes in memory.
LANES = tiles_tpu.LANES


def alignment(rows: int, groups: int) -> int:
  """The alignment that these kernels need."""
  return mosaic_tpu.alignment(rows, groups, 1)


def refusal(dtype: jnp.dtype, widths: tuple[int, int]) -> str | None:
  """Why these kernels cannot compute such a layer here, or None."""
  if reason := mosaic_tpu.refusal(dtype, widths, dtype):
    return reason
  chip, (width, hidden) = tiles_tpu.here(), widths
  wants = up_tiles, down_backward_tiles, up_backward_tiles
  if not all(want(chip, 1, width, hidden) for want in wants):
    return (
      f'needs two matrices {width}x{hidden} twice in {chip.vmem_limit >> 20} '
      'MiB of vector memory'
    )
  return None


def up_tiles(
  chip: tiles_tpu.Chip,
  mean_rows: int,
  width: int,
  hidden: int,
  transpose: bool = False,
) -> tiles_tpu.Tiles | None:
  """Tiles of `up`, or None if two experts' matrices do not fit."""
  return tiles_tpu.choose(
    chip,
    mean_rows,
    chip.transposed_chunk if transpose else chip.chunk,
    resident=8 * width * hidden,
    row_in=2 * width,
    row_out=6 * hidden,
    row_scratch=8 * hidden,
  )


def down_backward_tiles(
  chip: tiles_tpu.Chip, mean_rows: int, width: int, hidden: int
) -> tiles_tpu.Tiles | None:
  """Tiles of `down_backward`."""
  return tiles_tpu.choose(
    chip,
    mean_rows,
    chip.transposed_chunk,
    resident=4 * width * hidden,
    row_in=2 * width + 4 * hidden + 4 * LANES,
    row_out=6 * hidden + 4 * LANES,
    row_scratch=12 * hidden,
  )


def up_backward_tiles(
  chip: tiles_tpu.Chip, mean_rows: int, width: int, hidden: int
) -> tiles_tpu.Tiles | None:
  """Tiles of `up_backward`."""
  return tiles_tpu.choose(
    chip,
    mean_rows,
    chip.transposed_chunk,
    resident=8 * width * hidden,
    row_in=4 * hidden,
    row_out=2 * width,
    row_scratch=8 * width,
  )


def up(
  x_PD: jax.Array,
  wi_0_EDF: jax.Array,
  wi_1_EDF: jax.Array,
  sizes_E: jax.Array,
  *,
  align: int,
  save: bool,
  transpose: bool = False,
  tiles: tiles_tpu.Tiles | None = None,
  chip: tiles_tpu.Chip | None = None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
  """Gate and up projections and SwiGLU of them; see `vjp.Backend`.

  With `transpose` the matrices are [E, F, D].
  """
  chip = chip or tiles_tpu.here()
  rows, width = x_PD.shape
  experts = wi_0_EDF.shape[0]
  hidden = wi_0_EDF.shape[1 if transpose else 2]
  tiles = tiles or up_tiles(chip, rows // experts, width, hidden, transpose)
  side = 0 if transpose else 1
  shape = jax.ShapeDtypeStruct((rows, hidden), x_PD.dtype)
  found = stream_tpu.stream(
    functools.partial(
      _swiglu, save=save, dtype=x_PD.dtype, transpose=transpose
    ),
    stream_tpu.plan(sizes_E, rows, align, tiles.rows, chip.cores),
    [x_PD],
    [stream_tpu.Matrices(w, side, hidden) for w in (wi_0_EDF, wi_1_EDF)],
    [shape] * (3 if save else 1),
    tiles=tiles,
    chip=chip,
    flops=4 * rows * width * hidden,
    transcendentals=rows * hidden,
    name='experts_up',
  )
  return tuple(found) if save else (None, None, *found)


def _swiglu(x_blocks, w_refs, *, save, dtype, transpose):
  gate, up = (
    stream_tpu.dot(x_blocks[0], w_ref[...], transpose)
    .astype(dtype)
    .astype(jnp.float32)
    for w_ref in w_refs
  )
  act = gate * jax.nn.sigmoid(gate) * up
  return [gate, up, act] if save else [act]


def down(
  act_PF: jax.Array,
  wo_EFD: jax.Array,
  sizes_E: jax.Array,
  *,
  align: int,
  transpose: bool = False,
  tiles: tiles_tpu.Tiles | None = None,
  chip: tiles_tpu.Chip | None = None,
) -> jax.Array:
  """Down projection; see `vjp.Backend`. `transpose`: of [E, D, F]."""
  return mosaic_tpu.product(
    act_PF,
    wo_EFD,
    sizes_E,
    align=align,
    transpose=transpose,
    out_dtype=act_PF.dtype,
    tiles=tiles,
    chip=chip,
  )


def down_backward(
  dy_PD: jax.Array,
  wo_EFD: jax.Array,
  gate_PF: jax.Array,
  up_PF: jax.Array,
  weight_P: jax.Array,
  sizes_E: jax.Array,
  *,
  align: int,
  tiles: tiles_tpu.Tiles | None = None,
  chip: tiles_tpu.Chip | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients through the down projection and SwiGLU; see `vjp.Backend`."""
  chip = chip or tiles_tpu.here()
  rows, hidden = gate_PF.shape
  width = dy_PD.shape[1]
  tiles = tiles or down_backward_tiles(
    chip, rows // sizes_E.shape[0], width, hidden
  )
  weight_PL = jnp.broadcast_to(
    weight_P.astype(jnp.float32)[:, None], (rows, LANES)
  )
  *found, dweight_PL = stream_tpu.stream(
    _swiglu_backward,
    stream_tpu.plan(sizes_E, rows, align, tiles.rows, chip.cores),
    [dy_PD, gate_PF, up_PF, weight_PL],
    [stream_tpu.Matrices(wo_EFD, 0, hidden)],
    [
      *[jax.ShapeDtypeStruct((rows, hidden), gate_PF.dtype)] * 3,
      jax.ShapeDtypeStruct((rows, LANES), jnp.float32),
    ],
    tiles=tiles,
    chip=chip,
    flops=2 * rows * width * hidden,
    transcendentals=rows * hidden,
    name='experts_down_backward',
  )
  return *found, dweight_PL.sum(1)


def _swiglu_backward(blocks, w_refs):
  dy, gate, up, weight = blocks
  dact = stream_tpu.dot(dy, w_refs[0][...], True)
  gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
  share = jax.nn.sigmoid(gate)
  silu = gate * share
  act = silu * up
  weight = weight[:, :1]
  scaled_dact = weight * dact
  dgate = scaled_dact * up * (share + silu * (1 - share))
  # Sums over F are finished outside: lanes add up there without shuffles.
  product = dact * act
  parts = [
    product[:, first : first + LANES]
    for first in range(0, product.shape[1], LANES)
  ]
  return [dgate, scaled_dact * silu, weight * act, sum(parts)]


def up_backward(
  dgate_PF: jax.Array,
  dup_PF: jax.Array,
  wi_0_EDF: jax.Array,
  wi_1_EDF: jax.Array,
  sizes_E: jax.Array,
  *,
  align: int,
  tiles: tiles_tpu.Tiles | None = None,
  chip: tiles_tpu.Chip | None = None,
) -> jax.Array:
  """Gradient of the rows; see `vjp.Backend`."""
  chip = chip or tiles_tpu.here()
  rows, hidden = dgate_PF.shape
  experts, width, _ = wi_0_EDF.shape
  tiles = tiles or up_backward_tiles(chip, rows // experts, width, hidden)
  (dx_PD,) = stream_tpu.stream(
    _sum_of_two,
    stream_tpu.plan(sizes_E, rows, align, tiles.rows, chip.cores),
    [dgate_PF, dup_PF],
    [stream_tpu.Matrices(w, 0, width) for w in (wi_0_EDF, wi_1_EDF)],
    [jax.ShapeDtypeStruct((rows, width), dgate_PF.dtype)],
    tiles=tiles,
    chip=chip,
    flops=4 * rows * width * hidden,
    name='experts_up_backward',
  )
  return dx_PD


def _sum_of_two(blocks, w_refs):
  return [
    sum(stream_tpu.dot(x, w_ref[...], True) for x, w_ref in zip(blocks, w_refs))
  ]


BACKEND = vjp.Backend(
  alignment,
  up,
  down,
  down_backward,
  up_backward,
  mosaic_tpu.weight_gradient,
)
# Of matrices as they lie in checkpoints; for inference.
TRANSPOSED = BACKEND._replace(
  up=functools.partial(up, transpose=True),
  down=functools.partial(down, transpose=True),
)
