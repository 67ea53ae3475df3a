"""The expert layer's products on Hopper, with what follows them fused in.

Forward, gate and up projections are one pass over the rows whose results meet
in registers: the pre-activations and the activation leave together. Backward,
the gradient of the activation never reaches memory: the pre-activations are
read while the products run, and what is stored is what the weight gradients
and the gradient of the rows need. See `gmm/panels.py` for the products.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles as tile_tables
from pallas_kernels.experts import vjp
from pallas_kernels.gmm import layout, mosaic_gpu, panels, pipeline

LINE = 32  # float32 values of the 128 bytes to which bulk copies align
LOADS = 2  # pieces of the pre-activations that are on their way at a time
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
  tiles = tiles or mosaic_gpu.row_tiles('up', rows, sizes_E.shape[0])
  form = _form(x_PD, tiles, paired=True, transpose=False, panel_count=2)
  found = panels.call(
    'experts_up',
    form,
    functools.partial(_store_activations, form=form, save=save),
    layout.segments(sizes_E, rows, align, tiles.rows[-1], tiles.cluster),
    [x_PD],
    [wi_0_EDF, wi_1_EDF],
    [],
    width,
    [jax.ShapeDtypeStruct((rows, width), x_PD.dtype)] * (3 if save else 1),
    blocks=blocks,
  )
  found = [mosaic_gpu.varying_like(x_PD, z) for z in found]
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
  rows, width = gate_PF.shape
  tiles = tiles or mosaic_gpu.row_tiles('down_backward', rows, sizes_E.shape[0])
  form = _form(
    dy_PD,
    tiles,
    paired=False,
    transpose=True,
    panel_count=panels.adjacent(width),
  )
  result = jax.ShapeDtypeStruct((rows, width), dy_PD.dtype)
  staged = (pipeline.CONSUMERS, LOADS, 2, form.chunk, pipeline.HALF)
  plan = layout.segments(sizes_E, rows, align, tiles.rows[-1], tiles.cluster)
  # Sums over F, a line a tile and part of F, as long as a bulk copy needs.
  line = layout.round_up(tiles.rows[-1], LINE)
  parts = width // (form.panels * pipeline.HALF)
  lines = len(plan.row_S) * tiles.cluster
  *found, share_CTR = panels.call(
    'experts_down_backward',
    form,
    functools.partial(_store_gradients, form=form),
    plan,
    [dy_PD],
    [wo_EFD],
    [gate_PF, up_PF, weight_P],
    width,
    [result] * 3 + [jax.ShapeDtypeStruct((parts, lines, line), jnp.float32)],
    blocks=blocks,
    begin=functools.partial(_load_first, form=form),
    scratch={
      'in_smem': pipeline.swizzled(staged, dy_PD.dtype),
      'weight_smem': plgpu.SMEM((pipeline.CONSUMERS, line), jnp.float32),
      'share_smem': plgpu.SMEM((pipeline.CONSUMERS, line), jnp.float32),
      'loaded': plgpu.Barrier(
        num_arrivals=2, num_barriers=pipeline.CONSUMERS * LOADS
      ),
      'weighted': plgpu.Barrier(num_barriers=pipeline.CONSUMERS),
    },
  )
  found = [mosaic_gpu.varying_like(dy_PD, z) for z in found]
  share_TR = mosaic_gpu.varying_like(dy_PD, share_CTR).sum(0)
  return *found, _rows_of_tiles(share_TR, plan, rows, tiles.cluster)


def _rows_of_tiles(share_TR, plan, rows, members) -> jax.Array:
  """float32[rows]: the sum that each row has in the line of its tile."""
  row_P = jnp.arange(rows, dtype=jnp.int32)
  segment_S = jnp.arange(len(plan.row_S))
  begun_PS = (plan.row_S[None] <= row_P[:, None]) & (
    segment_S < plan.count_1[0]
  )[None]
  segment_P = begun_PS.sum(1, dtype=jnp.int32) - 1
  offset_P = row_P - plan.row_S[segment_P]
  tile_P = jnp.maximum(plan.tile_S[segment_P], 1)
  line_P = segment_P * members + offset_P // tile_P
  share_P = share_TR[line_P, offset_P % tile_P]
  return jnp.where(offset_P < plan.valid_S[segment_P], share_P, 0)


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


def _pieces(form, place, count) -> Sequence[tuple[int, int, int]]:
  """(first row, rows, panel) of the pieces of a tile in their order."""
  return [
    (first, size, panel)
    for first, size in panels.chunks(count, form.chunk)
    for panel in range(form.panels)
  ]


def _load(form, place, count, refs, in_smem, loaded, index) -> None:
  """Fetches the pre-activations of the index-th piece of a tile."""
  first, size, panel = _pieces(form, place, count)[index]
  slot = index % LOADS
  rows = pl.ds(place.row + first, size)
  columns = pl.ds(place.columns[panel], pipeline.HALF)
  for which, ref in enumerate(refs[:2]):
    plgpu.copy_gmem_to_smem(
      ref.at[rows, columns],
      in_smem.at[place.warpgroup, slot, which, pl.ds(0, size)],
      loaded.at[place.warpgroup * LOADS + slot],
    )


def _load_first(
  place, count, refs, *, form, in_smem, weight_smem, loaded, weighted, **_
) -> None:
  """Starts the loads that a tile's results will meet."""
  plgpu.copy_gmem_to_smem(
    refs[2].at[pl.ds(place.row, count)],
    weight_smem.at[place.warpgroup, pl.ds(0, count)],
    weighted.at[place.warpgroup],
  )
  for index in range(min(LOADS, len(_pieces(form, place, count)))):
    _load(form, place, count, refs, in_smem, loaded, index)


def _store_gradients(
  place,
  values,
  count,
  refs,
  *,
  form,
  out_smem,
  in_smem,
  weight_smem,
  share_smem,
  loaded,
  weighted,
) -> None:
  """Stores the gradients of the pre-activations and of the weights."""
  stager = _Stager(form, place, out_smem)
  me = place.warpgroup
  outputs = refs[3:6]
  pieces = _pieces(form, place, count)
  plgpu.barrier_wait(weighted.at[me])
  # The last tile's shares have left `share_smem`.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for index, (first, size, panel) in enumerate(pieces):
    slot = index % LOADS
    plgpu.barrier_wait(loaded.at[me * LOADS + slot])
    gate_FR, up_FR = (
      in_smem.at[me, slot, which, pl.ds(0, size)]
      .transpose((1, 0))[...]
      .astype(jnp.float32)
      for which in range(2)
    )
    weight_R = plgpu.load(
      weight_smem.at[me, pl.ds(first, size)],
      layout=plgpu.Layout.WGMMA.reduce(0),
    )
    weight_FR = jax.lax.broadcast_in_dim(weight_R, gate_FR.shape, (1,))
    dact_FR = values[panel][:, first : first + size]
    sigmoid_FR = _sigmoid(gate_FR)
    silu_FR = gate_FR * sigmoid_FR
    act_FR = silu_FR * up_FR
    share_FR = panels.masked(dact_FR * act_FR, first, place.valid)
    share_R = jnp.sum(share_FR, axis=0)
    if panel:
      share_R += plgpu.load(
        share_smem.at[me, pl.ds(first, size)],
        layout=plgpu.Layout.WGMMA.reduce(0),
      )
    share_smem[me, pl.ds(first, size)] = share_R
    scaled_FR = weight_FR * dact_FR
    slope_FR = sigmoid_FR + silu_FR - silu_FR * sigmoid_FR
    results = (
      scaled_FR * up_FR * slope_FR,
      scaled_FR * silu_FR,
      weight_FR * act_FR,
    )
    for result_FR, y_ref in zip(results, outputs):
      stager.put(
        panels.masked(result_FR, first, place.valid),
        y_ref,
        first,
        place.columns[panel],
      )
    # `put` has synchronised the warpgroup: all have read the slot.
    if index + LOADS < len(pieces):
      _load(form, place, count, refs, in_smem, loaded, index + LOADS)
  _store_shares(form, place, refs[6], share_smem)


def _store_shares(form, place, y_ref, share_smem) -> None:
  """Sends a warpgroup's sums over its part of F to memory."""
  me = place.warpgroup
  column = jax.lax.div(
    place.columns[0] - me * pipeline.HALF, panels.PANEL * form.panels
  )
  part = column * pipeline.CONSUMERS + me
  line = place.segment * form.tiles.cluster + jax.lax.axis_index('member')
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(share_smem.at[me], y_ref.at[part, line])


BACKEND = vjp.Backend(
  alignment=lambda rows, groups: pipeline.ALIGN,
  up=up,
  down=down,
  down_backward=down_backward,
  up_backward=up_backward,
  weight_gradient=mosaic_gpu.weight_gradient,
)
