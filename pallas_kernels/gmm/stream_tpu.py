"""Rows that stream past matrices resident in a TPU's vector memory.

One program a core walks its share of a plan: tiles of rows in the order of
their groups. A group's matrices are fetched whole, once, while the rows of the
group before are multiplied; tiles of rows go in and out by copies of their own
extent, so nothing is read or written twice and nothing that no group owns is
read at all. The plan lies in scalar memory and is made on the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tiles_tpu
from pallas_kernels.gmm import layout

# What copies and group starts are cut to.
ALIGN = tiles_tpu.MIN_ROWS
# Waiting for a group's matrices, in rows multiplied meanwhile; only balances
# the cores of a chip.
FETCH_ROWS = 128


class Plan(NamedTuple):
  """Tiles of rows in the order of their groups; all int32.

  Attributes:
    first_C: where each core's tiles begin; the last entry is their number.
    group_T: whose matrix a tile takes.
    row_T: its first row.
    valid_T: how many of its rows, from the first, the group owns.
    extent_T: how many rows are its to write; those past `valid_T` are zeros.
    turn_T: how many other matrices were needed before its own.
    next_T: the first tile of the next matrix; past all tiles if none follows.
  """

  first_C: jax.Array
  group_T: jax.Array
  row_T: jax.Array
  valid_T: jax.Array
  extent_T: jax.Array
  turn_T: jax.Array
  next_T: jax.Array


def alignment(rows: int, align: int) -> int:
  """The alignment that these kernels need, given rows aligned to `align`."""
  return align if align % ALIGN == 0 and rows % ALIGN == 0 else ALIGN


def plan(
  sizes_G: jax.Array, rows: int, align: int, tile: int, cores: int
) -> Plan:
  """Cuts all rows into tiles that no two groups share.

  Rows after the last group are tiles without a valid row; groups without rows
  have no tile, so their matrices are never read.
  """
  groups = sizes_G.shape[0]
  sizes_G = sizes_G.astype(jnp.int32)
  padded_G = layout.round_up(sizes_G, align)
  padded_S = jnp.append(padded_G, rows - padded_G.sum())
  sizes_S = jnp.append(sizes_G, 0)
  count_S = -(-padded_S // tile)
  segment_T, end_S = segments(count_S, -(-rows // tile) + groups + 1)
  index_T = jnp.arange(segment_T.shape[0], dtype=jnp.int32)
  offset_T = (index_T - (end_S - count_S)[segment_T]) * tile
  row_S = jnp.cumsum(padded_S) - padded_S
  present_G = sizes_G > 0
  last = jnp.where(present_G, jnp.arange(groups), 0).max()
  turn_G = jnp.cumsum(present_G) - 1
  owner_T = jnp.minimum(segment_T, last)
  valid_T = jnp.clip(sizes_S[segment_T] - offset_T, 0, tile)
  # The cost of a tile is its rows, and a matrix has to arrive for the first.
  begins_T = (offset_T == 0) & (valid_T > 0)
  cost_T = valid_T + jnp.where(begins_T, FETCH_ROWS, 0) + 1
  spent_T = jnp.cumsum(jnp.where(index_T < end_S[-1], cost_T, 0))
  share_C = spent_T[-1] * jnp.arange(1, cores) // cores
  inner_C = (spent_T[None] <= share_C[:, None]).sum(1, dtype=jnp.int32)
  return _int32(
    Plan(
      first_C=jnp.concatenate([jnp.zeros(1, jnp.int32), inner_C, end_S[-1:]]),
      group_T=owner_T,
      row_T=row_S[segment_T] + offset_T,
      valid_T=valid_T,
      extent_T=jnp.clip(padded_S[segment_T] - offset_T, 0, tile),
      turn_T=jnp.maximum(turn_G[owner_T], 0),
      next_T=jnp.where(
        segment_T < last, end_S[segment_T], jnp.iinfo(jnp.int32).max
      ),
    )
  )


def segments(count_S: jax.Array, tiles: int) -> tuple[jax.Array, jax.Array]:
  """Which segment each of `tiles` tiles falls in, and where segments end."""
  end_S = jnp.cumsum(count_S)
  index_T = jnp.arange(tiles, dtype=jnp.int32)
  segment_T = (end_S[None] <= index_T[:, None]).sum(1, dtype=jnp.int32)
  return jnp.minimum(segment_T, count_S.shape[0] - 1), end_S


def _int32(tables: Plan) -> Plan:
  return jax.tree.map(lambda z: z.astype(jnp.int32), tables)


def pieces(extent, tile: int, rows: int, act: Callable) -> None:
  """Calls `act(offset, size)` on powers of two that make up `extent` rows.

  Sizes of copies have to be known when the kernel is compiled; the interpreter
  takes none of more than the array's `rows`, not even where it is never made.
  """
  if tile <= rows:

    @pl.when(extent == tile)
    def _():
      act(0, tile)

  @pl.when(extent < tile)
  def _():
    size = min(tile // 2, 1 << (rows.bit_length() - 1))
    while size >= ALIGN:

      @pl.when((extent & size) != 0)
      def _(size=size):
        act(pl.multiple_of(extent & -(2 * size), ALIGN), size)

      size //= 2


class Matrices(NamedTuple):
  """One matrix a group, and the part of it that is resident.

  Attributes:
    values: [G, A, B].
    axis: 0 or 1: the side of the matrix that makes the output's columns.
    columns: how many of those are resident at a time.
  """

  values: jax.Array
  axis: int
  columns: int

  @property
  def block(self) -> tuple[int, int]:
    shape = list(self.values.shape[1:])
    shape[self.axis] = self.columns
    return tuple(shape)


def stream(
  compute: Callable,
  tables: Plan,
  operands: Sequence[jax.Array],
  matrices: Sequence[Matrices],
  outputs: Sequence[jax.ShapeDtypeStruct],
  *,
  tiles: tiles_tpu.Tiles,
  chip: tiles_tpu.Chip,
  flops: int,
  transcendentals: int = 0,
  name: str,
) -> list[jax.Array]:
  """Runs `compute` on every tile of rows with its group's matrices.

  Args:
    compute: (blocks of operands, refs of matrices) -> float32 blocks of
      outputs, for `tiles.chunk` rows.
    tables: from `plan`.
    operands: [P, W] arrays of rows.
    matrices: resident while their group's rows pass.
    outputs: shapes of [P, W] results; rows of no group are zeros.
    tiles: how to cut.
    chip: the device.
    flops: of all rows, for the compiler.
    transcendentals: likewise.
    name: of the kernel, in profiles.
  """
  blocks = {m.values.shape[1 + m.axis] // m.columns for m in matrices}
  (blocks,) = blocks
  widths = [z.shape[1] // blocks for z in outputs]
  grid = (chip.cores, blocks)
  scratch = [
    *(
      pltpu.VMEM((tiles.stages, tiles.rows, x.shape[1]), x.dtype)
      for x in operands
    ),
    *(pltpu.VMEM((2, *m.block), m.values.dtype) for m in matrices),
    *(
      pltpu.VMEM((2, tiles.rows, width), y.dtype)
      for width, y in zip(widths, outputs)
    ),
    pltpu.SemaphoreType.DMA((len(operands), tiles.stages)),
    pltpu.SemaphoreType.DMA((len(matrices), 2)),
    pltpu.SemaphoreType.DMA((len(outputs), 2)),
  ]
  anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
  call = pl.pallas_call(
    functools.partial(
      _stream_body,
      compute=compute,
      tiles=tiles,
      axes=[(m.axis, m.columns) for m in matrices],
      counts=(len(operands), len(matrices), len(outputs)),
    ),
    out_shape=[like(operands[0], z.shape, z.dtype) for z in outputs],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(tables),
      grid=grid,
      in_specs=[anywhere] * (len(operands) + len(matrices)),
      out_specs=[anywhere] * len(outputs),
      scratch_shapes=scratch,
    ),
    compiler_params=params(chip, len(grid)),
    cost_estimate=pl.CostEstimate(
      flops=flops,
      bytes_accessed=_bytes(operands, matrices, outputs, blocks),
      transcendentals=transcendentals,
    ),
    interpret=chip.interpret,
    name=name,
  )
  values = (m.values for m in matrices)
  return dispatch.narrow(call)(*tables, *operands, *values)


def _bytes(operands, matrices, outputs, blocks: int) -> int:
  """Bytes between memory and cores where every group has rows."""
  rows = blocks * sum(x.size * x.dtype.itemsize for x in operands)
  held = sum(m.values.size * m.values.dtype.itemsize for m in matrices)
  return rows + held + sum(y.size * y.dtype.itemsize for y in outputs)


def dot(x: jax.Array, w: jax.Array, transpose: bool) -> jax.Array:
  """float32 x w, or x w^T without turning `w` in memory."""
  return lax.dot_general(
    x,
    w,
    (((1,), (1 if transpose else 0,)), ((), ())),
    precision=lax.Precision.DEFAULT,  # whatever the caller's: of bfloat16
    preferred_element_type=jnp.float32,
  )


def params(chip: tiles_tpu.Chip, dimensions: int) -> pltpu.CompilerParams:
  """Cores share the first dimension of the grid, each walks the others."""
  rest = ('arbitrary',) * (dimensions - 1)
  return pltpu.CompilerParams(
    dimension_semantics=('parallel', *rest), vmem_limit_bytes=chip.vmem_limit
  )


def like(
  x: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
  """A result that differs over the axes of a `shard_map` that `x` does."""
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )


def _copies(tables, refs, axes, counts, tile_rows):
  """What moves a tile's rows in, its matrices in, and its results out.

  Args:
    tables: the plan, in scalar memory.
    refs: operands, matrices and results in memory; the same in vector memory;
      a semaphore for each copy in flight of each kind.
    axes: of each matrix the axis that is parted, and the columns of a part.
    counts: how many operands, matrices and results there are.
    tile_rows: most rows of a tile.

  Returns:
    Three functions that take a tile, for rows also its slot, and what to do
    with each copy: `start` or `wait`; and the three groups of buffers.
  """
  splits = [sum((*counts, *counts)[:n]) for n in range(7)]
  x_hbm, w_hbm, y_hbm, x_vmem, w_vmem, y_vmem = (
    refs[a:b] for a, b in zip(splits, splits[1:])
  )
  x_arrived, w_arrived, y_left = refs[splits[-1] :]
  block = pl.program_id(1)

  def rows(tile, slot, act):
    extent = (tables.valid_T[tile] + ALIGN - 1) & -ALIGN
    row = tables.row_T[tile]

    def piece(offset, size):
      for n, (hbm, vmem) in enumerate(zip(x_hbm, x_vmem)):
        source = hbm.at[pl.ds(pl.multiple_of(row + offset, ALIGN), size)]
        target = vmem.at[slot, pl.ds(offset, size)]
        act(pltpu.make_async_copy(source, target, x_arrived.at[n, slot]))

    pieces(extent, tile_rows, x_hbm[0].shape[0], piece)

  def matrices(tile, act):
    slot = tables.turn_T[tile] & 1
    for n, (hbm, vmem, (axis, columns)) in enumerate(zip(w_hbm, w_vmem, axes)):
      inside = [slice(None)] * 2
      inside[axis] = pl.ds(block * columns, columns)
      source = hbm.at[tables.group_T[tile], *inside]
      act(pltpu.make_async_copy(source, vmem.at[slot], w_arrived.at[n, slot]))

  def results(tile, slot, act):
    row = tables.row_T[tile]

    def piece(offset, size):
      for n, (hbm, vmem) in enumerate(zip(y_hbm, y_vmem)):
        width = vmem.shape[2]
        here = pl.ds(pl.multiple_of(row + offset, ALIGN), size)
        target = hbm.at[here, pl.ds(block * width, width)]
        source = vmem.at[slot, pl.ds(offset, size)]
        act(pltpu.make_async_copy(source, target, y_left.at[n, slot]))

    pieces(tables.extent_T[tile], tile_rows, y_hbm[0].shape[0], piece)

  return rows, matrices, results, (x_vmem, w_vmem, y_vmem)


def _stream_body(*refs, compute, tiles, axes, counts):
  tables, refs = Plan(*refs[: len(Plan._fields)]), refs[len(Plan._fields) :]
  move_rows, move_matrices, move_results, buffers = _copies(
    tables, refs, axes, counts, tiles.rows
  )
  x_vmem, w_vmem, y_vmem = buffers
  begin = tables.first_C[pl.program_id(0)]
  end = tables.first_C[pl.program_id(0) + 1]
  ahead = tiles.stages - 1

  def step(tile, _):
    since = tile - begin
    slot = lax.rem(since, tiles.stages)
    half = lax.rem(since, 2)

    @pl.when(tile + ahead < end)
    def _():
      later = lax.rem(since + ahead, tiles.stages)
      move_rows(tile + ahead, later, start)

    turn = tables.turn_T[tile]

    @pl.when((since == 0) | (tables.turn_T[jnp.maximum(tile - 1, 0)] != turn))
    def _():
      following = tables.next_T[tile]

      @pl.when(following < end)
      def _():
        move_matrices(following, start)

      move_matrices(tile, wait)

    move_rows(tile, slot, wait)

    @pl.when(since >= 2)
    def _():
      move_results(tile - 2, half, wait)

    _multiply(
      compute,
      [x.at[slot] for x in x_vmem],
      [w.at[turn & 1] for w in w_vmem],
      [y.at[half] for y in y_vmem],
      tables.valid_T[tile],
      tables.extent_T[tile],
      tiles,
    )
    move_results(tile, half, start)

  @pl.when(begin < end)
  def _():
    move_matrices(begin, start)

  start_early(move_rows, begin, end, ahead)
  lax.fori_loop(begin, end, step, None)
  for late in (2, 1):

    @pl.when(end - begin >= late)
    def _(late=late):
      move_results(end - late, lax.rem(end - begin - late, 2), wait)


def start_early(move_rows: Callable, begin, end, count: int) -> None:
  """Starts the copies of the first `count` tiles, each into its own slot."""
  for early in range(count):

    @pl.when(begin + early < end)
    def _(early=early):
      move_rows(begin + early, early, start)


def start(copy) -> None:
  copy.start()


def wait(copy) -> None:
  copy.wait()


def _multiply(compute, x_refs, w_refs, y_refs, valid, extent, tiles):
  """Fills the first `extent` rows of a tile, past `valid` with zeros.

  Whole chunks first; what is left takes a chunk more, or the smaller rest.
  """

  def multiply(first, size):
    rows = pl.ds(pl.multiple_of(first, ALIGN), size)
    results = compute([x[rows] for x in x_refs], w_refs)
    for y_ref, value in zip(y_refs, results):
      index = lax.broadcasted_iota(jnp.int32, value.shape, 0)
      inside = index < valid - first
      y_ref[rows] = jnp.where(inside, value, 0).astype(y_ref.dtype)

  chunk, rest = tiles.chunk, tiles.rest
  whole = lax.div(valid, chunk)
  left = valid - whole * chunk
  chunks = whole + jnp.where(left > rest, 1, 0)
  lax.fori_loop(0, chunks, lambda n, _: multiply(n * chunk, chunk), None)

  @pl.when((left > 0) & (left <= rest))
  def _():
    multiply(whole * chunk, rest)

  def clear(n, _):
    rows = pl.ds(pl.multiple_of(n * ALIGN, ALIGN), ALIGN)
    for y_ref in y_refs:
      y_ref[rows] = jnp.zeros((ALIGN, y_ref.shape[1]), y_ref.dtype)

  done = lax.div(valid + ALIGN - 1, ALIGN)
  lax.fori_loop(done, lax.div(extent, ALIGN), clear, None)
