"""The expert layer's products on Hopper, with what follows them fused in.

Forward, gate and up projections are one pass over the rows, which it looks up
among the tokens; results meet in registers, and the pre-activations and the
activation leave together. Backward, both products of the rows' gradient are
summed in registers, and the gradient of SwiGLU is a pass of its own. See
`gmm/panels.py` for the products.

Rows that no group needs cost nothing, however many there is room for: of those
after the last group CLEAR are zeros, and the others are never read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, hopper
from pallas_kernels import tiles as tile_tables
from pallas_kernels.experts import vjp
from pallas_kernels.gmm import (
  gathered,
  layout,
  mosaic_gpu,
  panels,
  pipeline,
)
from pallas_kernels.permute import api as permute

LOG2_E = 1.4426950408889634
CLEAR = max(tile_tables.DEPTHS)  # what a weight gradient may read past a group
SLOTS = 2  # rows of each operand of the SwiGLU gradient in shared memory
RESIDENT = 3  # of its blocks a multiprocessor


def refusal(dtype: jnp.dtype, widths: tuple[int, int]) -> str | None:
  """Why these kernels cannot compute such a layer here, or None."""
  return mosaic_gpu.refusal(dtype, widths, dtype)


def look_up(x_MD: jax.Array, plan: permute.Plan, *, impl=None) -> gathered.Rows:
  """Tokens in the order of their experts, which `up` looks up as it goes."""
  del impl
  return gathered.Rows(x_MD, plan.source_P, plan.place_MX.shape[1])


def up(
  x_PD: jax.Array | gathered.Rows,
  wi_0_EDF: jax.Array,
  wi_1_EDF: jax.Array,
  sizes_E: jax.Array,
  *,
  align: int,
  save: bool,
  tiles: tile_tables.RowTiles | None = None,
  blocks: int | None = None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
  """Gate and up projections and SwiGLU of them; see `vjp.Backend`."""
  rows = x_PD.shape[0]
  width = wi_0_EDF.shape[2]
  tiles = tiles or mosaic_gpu.row_tiles(rows, sizes_E.shape[0])
  form = _form(x_PD, tiles, paired=True, transpose=False, panel_count=2)
  found = panels.call(
    'experts_up',
    form,
    functools.partial(_store_activations, form=form, save=save),
    layout.segments(sizes_E, rows, align, tiles.rows[-1], tiles.cluster, CLEAR),
    [x_PD],
    [wi_0_EDF, wi_1_EDF],
    width,
    [jax.ShapeDtypeStruct((rows, width), x_PD.dtype)] * (3 if save else 1),
    blocks=blocks,
  )
  x = x_PD.x_MD if isinstance(x_PD, gathered.Rows) else x_PD
  found = [hopper.varying_like(x, z) for z in found]
  return tuple(found) if save else (None, None, *found)


def up_backward(
  dgate_PF: jax.Array,
  dup_PF: jax.Array,
  wi_0_EDF: jax.Array,
  wi_1_EDF: jax.Array,
  sizes_E: jax.Array,
  *,
  align: int,
  tiles: tile_tables.RowTiles | None = None,
  blocks: int | None = None,
) -> jax.Array:
  """Gradient of the rows; see `vjp.Backend`."""
  return mosaic_gpu.sums(
    [dgate_PF, dup_PF],
    [wi_0_EDF, wi_1_EDF],
    sizes_E,
    wi_0_EDF.shape[1],
    align=align,
    transpose=True,
    out_dtype=dgate_PF.dtype,
    clear=0,
    tiles=tiles,
    blocks=blocks,
  )


def down(act_PF, wo_EFD, sizes_E, *, align, tiles=None, blocks=None):
  """Down projection; see `vjp.Backend`."""
  return mosaic_gpu.product(
    act_PF,
    wo_EFD,
    sizes_E,
    align=align,
    transpose=False,
    out_dtype=act_PF.dtype,
    clear=0,
    tiles=tiles,
    blocks=blocks,
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
  tiles: tile_tables.RowTiles | None = None,
  blocks: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients through the down projection and SwiGLU; see `vjp.Backend`."""
  dact_PF = mosaic_gpu.product(
    dy_PD,
    wo_EFD,
    sizes_E,
    align=align,
    transpose=True,
    out_dtype=dy_PD.dtype,
    clear=CLEAR,
    tiles=tiles,
    blocks=blocks,
  )
  rows = dy_PD.shape[0]
  padded_E = layout.round_up(sizes_E.astype(jnp.int32), align)
  end = padded_E.sum(dtype=jnp.int32) + CLEAR
  # A pass of its own; NOTES.md has why it is not the product's epilogue. Rows
  # of no group have a gradient of zeros, and `up` left zeros there.
  return _swiglu_backward(
    dact_PF, gate_PF, up_PF, weight_P, jnp.minimum(end, rows), blocks=blocks
  )


def _swiglu_backward(
  dact_PF: jax.Array,
  gate_PF: jax.Array,
  up_PF: jax.Array,
  weight_P: jax.Array,
  end: jax.Array,
  *,
  blocks: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients through weight * SwiGLU of the rows before `end`.

  Args:
    dact_PF: gradient of the activation, before the weight; bfloat16.
    gate_PF: pre-activation.
    up_PF: pre-activation.
    weight_P: float32 weights.
    end: int32; results of the rows from there on are left as they were.
    blocks: persistent blocks; None takes RESIDENT a multiprocessor.

  Returns:
    dgate_PF, dup_PF, the weighted activation, float32 dweight_P.
  """
  rows, width = dact_PF.shape
  if 3 * (SLOTS + 2) * width * dact_PF.dtype.itemsize > hopper.SHARED:
    return _swiglu_backward_xla(dact_PF, gate_PF, up_PF, weight_P)
  box = hopper.box(width)
  kernel = plgpu.kernel(
    _swiglu_backward_body,
    out_type=[jax.ShapeDtypeStruct((rows, *box), dact_PF.dtype)] * 3
    + [jax.ShapeDtypeStruct((rows,), jnp.float32)],
    scratch_types={
      'ring': plgpu.SMEM((SLOTS, 3, *box), dact_PF.dtype),
      'staging': plgpu.SMEM((2, 3, *box), dact_PF.dtype),
      'full': plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
    },
    grid=(blocks or RESIDENT * jax.local_devices()[0].core_count,),
    grid_names=('block',),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name='swiglu_backward',
  )
  operands = (z.reshape(rows, *box) for z in (dact_PF, gate_PF, up_PF))
  *found, dweight_P = (
    hopper.varying_like(dact_PF, z)
    for z in dispatch.narrow(kernel)(end[None], weight_P, *operands)
  )
  return *(z.reshape(rows, width) for z in found), dweight_P


def _swiglu_backward_xla(dact_PF, gate_PF, up_PF, weight_P):
  """The same of rows that do not fit shared memory, and of all of them."""
  dact, gate, up = (z.astype(jnp.float32) for z in (dact_PF, gate_PF, up_PF))
  act, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
  weight = weight_P[:, None]
  results = *pull(weight * dact), weight * act
  return *(z.astype(dact_PF.dtype) for z in results), (dact * act).sum(1)


def _swiglu_backward_body(
  end_ref, weight_ref, *refs, ring, staging, full
) -> None:
  sources, targets, dweight_ref = refs[:3], refs[3:6], refs[6]
  block, blocks = lax.axis_index('block'), lax.axis_size('block')
  mine = lax.div(jnp.maximum(end_ref[0] - block + blocks - 1, 0), blocks)

  def load(index):
    slot = lax.rem(index, SLOTS)
    for x, source in enumerate(sources):
      plgpu.copy_gmem_to_smem(
        source.at[block + index * blocks], ring.at[slot, x], full.at[slot]
      )

  for index in range(SLOTS):
    pl.when(index < mine)(functools.partial(load, index))

  def row(index, _):
    slot, half = lax.rem(index, SLOTS), lax.rem(index, 2)
    number = block + index * blocks
    weight = weight_ref[number]
    plgpu.barrier_wait(full.at[slot])
    dact, gate, up = (ring[slot, x].astype(jnp.float32) for x in range(3))
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu - silu * sigmoid
    act = silu * up
    scaled = weight * dact
    dweight_ref[number] = jnp.sum(dact * act)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    results = scaled * up * slope, scaled * silu, weight * act
    for x, result in enumerate(results):
      staging[half, x] = result.astype(staging.dtype)
    # All threads have read the slot once they are here.
    plgpu.commit_smem()
    for x, target in enumerate(targets):
      plgpu.copy_smem_to_gmem(
        staging.at[half, x], target.at[number], commit_group=False
      )
    plgpu.commit_smem_to_gmem_group()
    pl.when(index + SLOTS < mine)(functools.partial(load, index + SLOTS))

  lax.fori_loop(0, mine, row, None)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _form(x, tiles, *, paired, transpose, panel_count) -> panels.Form:
  return panels.Form(
    parts=1,
    panels=panel_count,
    paired=paired,
    transpose=transpose,
    tiles=tiles,
    chunk=panels.CHUNK,
    out_dtype=jnp.dtype(x.dtype),
  )


def _sigmoid(x: jax.Array) -> jax.Array:
  """By two fast instructions, to float32 accuracy: no division."""
  root = jax.lax.rsqrt(1 + jnp.exp2(-LOG2_E * x))
  return root * root


class _Stager:
  """Hands out the staging slots of a warpgroup in turns."""

  def __init__(self, form: panels.Form, place: panels.Place, out_smem):
    self._form, self._place, self._smem = form, place, out_smem
    self._piece = 0

  def put(self, values_FR, y_ref, first, columns) -> None:
    """Sends one piece of results to memory."""
    slots = self._form.tiles.staging
    panels.wait_for_slot(slots, self._piece)
    staged = self._smem.at[self._place.warpgroup, self._piece % slots]
    panels.store(values_FR, y_ref, self._place, first, columns, staged)
    self._piece += 1


def _store_activations(
  place, values, count, refs, out_smem, *, form, save
) -> None:
  """Stores the pre-activations, if wanted, and SwiGLU of them."""
  stager = _Stager(form, place, out_smem)
  column = place.columns[0]
  for first, size in panels.chunks(count, form.chunk):
    gate_FR, up_FR = (
      panels.masked(z[:, first : first + size], first, place.valid)
      for z in values
    )
    act_FR = gate_FR * _sigmoid(gate_FR) * up_FR
    pieces = (gate_FR, up_FR, act_FR) if save else (act_FR,)
    for piece_FR, y_ref in zip(pieces, refs):
      stager.put(piece_FR, y_ref, first, column)


BACKEND = vjp.Backend(
  alignment=lambda rows, groups: pipeline.ALIGN,
  up=up,
  down=down,
  down_backward=down_backward,
  up_backward=up_backward,
  # Rows come from `permute.gather` and the products above: zeros in the gaps.
  weight_gradient=functools.partial(mosaic_gpu.weight_gradient, clean=True),
  clear=CLEAR,
  rows=look_up,
)
