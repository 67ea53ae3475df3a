"""Rows times their group's matrix on Hopper, matrices on wgmma's tall side.

wgmma multiplies 64 rows of its first operand at a time, but any multiple of 8
columns of its second. So the matrices' output features, which are many and
divide evenly, are the first operand, and the rows of a group, which are any
number, the second: a tile is as wide as its rows need, and results are turned
back when they are stored.

A cluster of blocks takes one stretch of a group's rows together
(`layout.segments`), each block a tile of them, against the same panels of 128
features: a panel's weights are fetched once and copied to all members. The
first two warpgroups of a block own half of each panel, the third copies.

Rows of no group are stored as zeros, whatever they hold.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels import tiles as tile_tables
from pallas_kernels.gmm import gathered, layout, pipeline

PANEL = pipeline.CONSUMERS * pipeline.HALF  # output features of a panel
DEPTH = 64  # contraction length of a stage: a row of it is one swizzle
CHUNK = 32  # bfloat16 rows that are staged at a time


@dataclasses.dataclass(frozen=True)
class Form:
  """What is multiplied with what, all of it known when the kernel is made.

  Attributes:
    parts: pairs of rows and matrices whose products are summed.
    panels: panels of an output tile, 1 or 2.
    paired: panel p is of matrix p (one part); otherwise the panels lie next to
      each other in the matrix of each part.
    transpose: matrices are [G, N, K] instead of [G, K, N].
    tiles: how the rows are cut.
    chunk: rows that are staged and stored at a time.
    out_dtype: of every result.
    choices: of a token, where its rows are looked up (one part); 0 = rows lie
      in the order of their groups.
  """

  parts: int
  panels: int
  paired: bool
  transpose: bool
  tiles: tile_tables.RowTiles
  chunk: int
  out_dtype: jnp.dtype
  choices: int = 0

  def columns(self, column: jax.Array, panel: int) -> jax.Array:
    """First output feature of a panel of the `column`-th tile."""
    place = column if self.paired else column * self.panels + panel
    return pl.multiple_of(place * PANEL, PANEL)

  def weights(self, part: int, panel: int) -> int:
    """Which matrix a panel comes from."""
    return panel if self.paired else part


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the results of one warpgroup's part of a tile belong.

  Attributes:
    row: first row.
    valid: rows that hold results; the others get zeros.
    extent: rows to write, a multiple of 8.
    columns: first output feature of each panel's part.
    warpgroup: who stores.
  """

  row: jax.Array
  valid: jax.Array
  extent: jax.Array
  columns: Sequence[jax.Array]
  warpgroup: jax.Array


Finish = Callable[..., None]


def call(
  name: str,
  form: Form,
  finish: Finish,
  plan: layout.Segments,
  xs: Sequence[jax.Array | gathered.Rows],
  ws: Sequence[jax.Array],
  columns: int,
  outputs: Sequence[jax.ShapeDtypeStruct],
  *,
  blocks: int | None,
) -> Sequence[jax.Array]:
  """Runs one kernel.

  Args:
    name: of the kernel.
    form: what it is made for.
    finish: (place, values, count, outputs, staging memory) stores the sums
      `values` of a tile, float32[64, count] a panel.
    plan: segments of the rows.
    xs: bfloat16 rows of each part; of one part they may be looked up.
    ws: bfloat16 matrices.
    columns: output features that the tiles have to cover, of one matrix.
    outputs: what comes out.
    blocks: persistent blocks; None takes one a multiprocessor.
  """
  width = PANEL if form.paired else PANEL * form.panels
  if xs[0].shape[1] % DEPTH or columns % width:
    raise ValueError(
      f'{form} does not divide rows of {xs[0].shape[1]} and matrices of '
      f'{columns} columns'
    )
  operands = xs
  if isinstance(xs[0], gathered.Rows):
    (rows,) = xs
    form = dataclasses.replace(form, choices=rows.choices)
    operands = rows.x_MD, rows.source_P
  kernel = plgpu.kernel(
    functools.partial(
      _body,
      form=form,
      finish=finish,
      sources=len(ws),
      column_tiles=columns // width,
    ),
    out_type=list(outputs),
    scratch_types=_scratch(form),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    **pipeline.mesh(name, form.tiles, blocks),
  )
  return dispatch.narrow(kernel)(*plan, *operands, *ws)


def _scratch(form: Form) -> dict:
  tiles = form.tiles
  w_shape = (PANEL, DEPTH) if form.transpose else (DEPTH, PANEL)
  staged = (pipeline.CONSUMERS, tiles.staging, form.chunk, pipeline.HALF)
  bf16 = jnp.bfloat16
  return {
    'w_smem': pipeline.swizzled((tiles.stages, form.panels, *w_shape), bf16),
    'x_smem': pipeline.swizzled((tiles.stages, tiles.rows[-1], DEPTH), bf16),
    'out_smem': pipeline.swizzled(staged, form.out_dtype),
    'full': plgpu.Barrier(
      num_arrivals=form.panels + (form.choices == 0),
      num_barriers=tiles.stages,
    ),
    'empty': pipeline.freed(tiles),
  } | ({'landed': gathered.barriers(tiles.stages)} if form.choices else {})


def _body(*refs, form, finish, sources, column_tiles, **memory):
  plan = layout.Segments(*refs[: len(layout.Segments._fields)])
  refs = refs[len(plan) :]
  rows = form.parts + (form.choices > 0)
  block = _Block(
    form=form,
    finish=finish,
    plan=plan,
    column_tiles=column_tiles,
    x_refs=refs[:rows],
    w_refs=refs[rows : rows + sources],
    outputs=refs[rows + sources :],
    **memory,
  )
  items = plan.count_1[0] * column_tiles
  if form.choices:
    gathered.prepare(block.landed)
  pipeline.run(
    block.fetch, block.multiply, items, block.empty, form.tiles, block.ahead
  )


@dataclasses.dataclass(frozen=True)
class _Block:
  """What one block works with, and its two roles."""

  form: Form
  finish: Finish
  plan: layout.Segments
  column_tiles: int
  x_refs: Sequence
  w_refs: Sequence
  outputs: Sequence
  w_smem: Any
  x_smem: Any
  out_smem: Any
  full: Any
  empty: Any
  landed: Any = None

  @property
  def part_steps(self) -> int:
    """Stages of a part of the contraction."""
    return self.x_refs[0].shape[1] // DEPTH

  def locate(self, item):
    """Segment, column tile and stages of an item; this member's rows of it."""
    plan = self.plan
    segment = lax.div(item, self.column_tiles)
    # A segment of no valid rows is stored as zeros without being multiplied.
    busy = plan.valid_S[segment] > 0
    steps = jnp.where(busy, self.form.parts * self.part_steps, 0)
    tile = plan.tile_S[segment]
    first = lax.axis_index('member') * tile
    extent = jnp.clip(plan.extent_S[segment] - first, 0, tile)
    valid = jnp.clip(plan.valid_S[segment] - first, 0, tile)
    row = pl.multiple_of(plan.row_S[segment] + first, pipeline.ALIGN)
    return segment, lax.rem(item, self.column_tiles), steps, row, valid, extent

  def ahead(self, item):
    """The tokens of an item's rows, if they have to be looked up."""
    if not self.form.choices:
      return ()
    *_, row, valid, _ = self.locate(item)
    tokens = gathered.look_up(
      self.x_refs[1],
      first=row,
      count=self.form.tiles.rows[-1],
      left=valid,
      choices=self.form.choices,
    )
    return (tokens,)

  def fetch(self, item, ring, tokens=None):
    """Copies an item's operands into the ring."""
    segment, column, steps, *rows = self.locate(item)
    group = self.plan.group_S[segment]

    def copy(step, slot):
      for part in range(self.form.parts):
        in_part = lax.div(step, self.part_steps) == part
        run = functools.partial(
          self._copy_part, part, group, column, rows, tokens, step, slot
        )
        pl.when(in_part)(run) if self.form.parts > 1 else run()

    return pipeline.fetch(copy, steps, ring, self.empty, self.form.tiles)

  def _copy_part(self, part, group, column, rows, tokens, step, slot):
    form = self.form
    row, valid, extent = rows
    depth = (step - part * self.part_steps) * DEPTH
    deep = pl.ds(depth, DEPTH)
    for panel in range(form.panels):
      wide = pl.ds(form.columns(column, panel), PANEL)
      cut = (wide, deep) if form.transpose else (deep, wide)
      plgpu.copy_gmem_to_smem(
        self.w_refs[form.weights(part, panel)].at[group, *cut],
        self.w_smem.at[slot, panel],
        self.full.at[slot],
        **pipeline.multicast(form.tiles),
      )

    def copy_rows(count):
      if form.choices:
        gathered.copy(
          self.x_refs[part],
          tokens,
          self.x_smem.at[slot],
          self.landed,
          slot=slot,
          column=depth,
          count=count,
          left=valid,
        )
        return
      plgpu.copy_gmem_to_smem(
        self.x_refs[part].at[pl.ds(row, count), deep],
        self.x_smem.at[slot, pl.ds(0, count)],
        self.full.at[slot],
      )

    counts = form.tiles.rows
    _by_count(extent, counts, copy_rows, none=counts[0])

  def multiply(self, item, ring, warpgroup):
    """Sums an item's products and stores them."""
    form = self.form
    _, column, steps, row, valid, extent = self.locate(item)
    half = warpgroup * pipeline.HALF
    starts = [form.columns(column, p) + half for p in range(form.panels)]
    place = Place(row, valid, extent, starts, warpgroup)
    where = steps, ring, self.full, self.empty, form.tiles
    arrived = None
    if form.choices:
      arrived = functools.partial(gathered.wait, self.landed)

    def tile(count):
      shapes = [(pipeline.HALF, count)] * form.panels
      step = functools.partial(self._step, count, pl.ds(half, pipeline.HALF))
      values = pipeline.accumulate(step, *where, shapes, arrived)
      self.finish(place, values, count, self.outputs, self.out_smem)

    _by_count(extent, form.tiles.rows, tile)

    @pl.when(extent <= 0)
    def _():
      pipeline.skip(*where, arrived)

    return ring + steps

  def _step(self, count, mine, accs, slot, index):
    del index
    x_KR = self.x_smem.at[slot, pl.ds(0, count)].transpose((1, 0))
    for panel, acc in enumerate(accs):
      if self.form.transpose:
        w_FK = self.w_smem.at[slot, panel, mine]
      else:
        w_FK = self.w_smem.at[slot, panel, :, mine].transpose((1, 0))
      plgpu.wgmma(acc, w_FK, x_KR)


def _by_count(extent, counts, run, none=None):
  """Calls `run` with the least static count that holds `extent` rows."""
  below = 0
  for count in counts:
    fits = extent <= count
    if none != count:
      fits &= extent > below
    pl.when(fits)(functools.partial(run, count))
    below = count


def adjacent(columns: int) -> int:
  """Panels of a tile of matrices of so many columns."""
  return 1 + (columns % (2 * PANEL) == 0)


def chunks(count: int, chunk: int) -> list[tuple[int, int]]:
  """(first, size) of the pieces of `count` rows."""
  return [(at, min(chunk, count - at)) for at in range(0, count, chunk)]


def masked(values_FR: jax.Array, first: int, valid: jax.Array) -> jax.Array:
  """Zeroes the rows from the tile's `valid`-th on; rows are the last axis."""
  row_FR = plgpu.broadcasted_iota(
    jnp.int32, values_FR.shape, 1, layout=plgpu.Layout.WGMMA
  )
  inside_FR = row_FR < valid - first
  return jnp.where(inside_FR, values_FR, jnp.zeros_like(values_FR))


def wait_for_slot(slots: int, piece: int) -> None:
  """Waits until a tile's `piece`-th staging slot, modulo `slots`, is free.

  Every tile starts with the first slot, whichever the last one ended with: only
  the pieces of its own may still be on their way to memory.
  """
  plgpu.wait_smem_to_gmem(min(piece, slots - 1), wait_read_only=True)


def store(values_FR, y_ref, place, first, columns, staged):
  """Turns a chunk around and sends the rows that are the tile's to memory.

  Args:
    values_FR: [64, rows] results.
    y_ref: where they go.
    place: of the tile.
    first: its row with which the chunk starts.
    columns: first output feature.
    staged: shared memory of the chunk, free to be written.
  """
  size = values_FR.shape[1]
  staged = staged.at[pl.ds(0, size)]
  values_FR = values_FR.astype(y_ref.dtype)
  if y_ref.dtype == jnp.float32:  # transposing stores have 16 bits a value
    values_FR = plgpu.layout_cast(values_FR, plgpu.Layout.WGMMA_TRANSPOSED)
  staged.transpose((1, 0))[...] = values_FR
  plgpu.commit_smem()
  wide = pl.ds(columns, pipeline.HALF)
  send_rows(
    staged,
    lambda at, rows: y_ref.at[pl.ds(place.row + first + at, rows), wide],
    place.extent - first,
  )


def send_rows(staged, target, left) -> None:
  """Copies the first `left` staged rows, a multiple of 8, as one group.

  Args:
    staged: [rows, ...] in shared memory, committed.
    target: (at, size) -> where `size` rows from the `at`-th on go.
    left: how many there are to copy, if fewer than staged.
  """
  size = staged.shape[0]

  @pl.when(left >= size)
  def _():
    plgpu.copy_smem_to_gmem(staged, target(0, size), commit_group=False)

  if size > pipeline.ALIGN:

    @pl.when(left < size)
    def _():
      for at in range(0, size - pipeline.ALIGN, pipeline.ALIGN):

        @pl.when(at < left)
        def _(at=at):
          plgpu.copy_smem_to_gmem(
            staged.at[pl.ds(at, pipeline.ALIGN)],
            target(at, pipeline.ALIGN),
            commit_group=False,
          )

  plgpu.commit_smem_to_gmem_group()
