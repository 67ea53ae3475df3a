"""The expert layer's products on Hopper, with what follows them fused in.

Forward, gate and up projections are one pass over the rows whose results meet
in registers: the pre-activations and the activation leave together. Backward,
both products of the rows' gradient are summed in registers. See
`gmm/panels.py` for the products.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels import tiles as tile_tables
from pallas_kernels.experts import vjp
from pallas_kernels.gmm import layout, mosaic_gpu, panels, pipeline

LOG2_E = 1.4426950408889634


def refusal(dtype: jnp.dtype, widths: tuple[int, int]) -> str | None:
  """Why these kernels cannot compute such a layer here, or None."""
  return mosaic_gpu.refusal(dtype, widths, dtype)


def up(
  x_PD: jax.Array,
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
    layout.segments(sizes_E, rows, align, tiles.rows[-1], tiles.cluster),
    [x_PD],
    [wi_0_EDF, wi_1_EDF],
    width,
    [jax.ShapeDtypeStruct((rows, width), x_PD.dtype)] * (3 if save else 1),
    blocks=blocks,
  )
  found = [hopper.varying_like(x_PD, z) for z in found]
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
    tiles=tiles,
    blocks=blocks,
  )
  # One pass that XLA fuses; NOTES.md has why it is not the product's epilogue.
  # Rows of no group have a gradient of zeros, and `up` left zeros there.
  dact_PF, gate_PF, up_PF = (
    z.astype(jnp.float32) for z in (dact_PF, gate_PF, up_PF)
  )
  sigmoid_PF = jax.nn.sigmoid(gate_PF)
  silu_PF = gate_PF * sigmoid_PF
  slope_PF = sigmoid_PF + silu_PF - silu_PF * sigmoid_PF
  act_PF = silu_PF * up_PF
  scaled_PF = weight_P[:, None] * dact_PF
  results = scaled_PF * up_PF * slope_PF, scaled_PF * silu_PF
  results += (weight_P[:, None] * act_PF,)
  dweight_P = (dact_PF * act_PF).sum(1)
  return *(z.astype(dy_PD.dtype) for z in results), dweight_P


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
    self._slot = 0

  def put(self, values_FR, y_ref, first, columns) -> None:
    """Sends one piece of results to memory."""
    staging = self._form.tiles.staging
    plgpu.wait_smem_to_gmem(staging - 1, wait_read_only=True)
    staged = self._smem.at[self._place.warpgroup, self._slot]
    panels.store(values_FR, y_ref, self._place, first, columns, staged)
    self._slot = (self._slot + 1) % staging


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
)
