"""The experts of a few tokens on Hopper GPUs, in Pallas Mosaic GPU.

Reading the chosen experts' weights is all the work there is, so the operands
of the products are swapped: weights lie on the 64 rows of a wgmma, tokens on
its columns, of which there may be as few as 8. A tile is all tokens of an
expert if they fit, which reads the weights once. Persistent blocks walk over
(tile, block of output features); a copier warpgroup keeps a ring of stages
full and runs ahead from one product into the next (`gmm.pipeline`).

Plain weights go from shared memory into the product, transposed, since they
lie contraction first. FP8 weights lie contraction last; they are loaded into
registers, where they become bfloat16, exactly, and each square that shares a
scale is summed by itself before it is scaled and added, in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels import tiles as tile_tables
from pallas_kernels.decode import plan as plans
from pallas_kernels.decode import weights
from pallas_kernels.gmm import pipeline

WIDTHS = (8, 16, 32, 64, 128)  # tokens of a product
SHARED_BYTES = 227 * 1024 - 4096  # of a block, less what barriers take

ENOUGH_STAGES = 3  # fewer deep stages are worse than more shallow ones


@dataclasses.dataclass(frozen=True)
class Cut:
  """How one product is cut, down to what the kernel's body unrolls.

  Attributes:
    columns: output features of a block.
    depth: contraction length of a stage.
    stages: how many of them the ring holds.
    widths: numbers of tokens for which there is a product.
    matrices: 2 if the product is the gated activation of two, else 1.
    quantised: whether weights are FP8.
    whole: whether every tile reads the same rows, the first.
  """

  columns: int
  depth: int
  stages: int
  widths: tuple[int, ...]
  matrices: int
  quantised: bool
  whole: bool

  @property
  def share(self) -> int:
    """Output features of a warpgroup."""
    return self.columns // pipeline.CONSUMERS


def refusal(dtype: jnp.dtype, widths: tuple[int, int]) -> str | None:
  """Why these kernels cannot run such experts here, or None."""
  if dtype != jnp.bfloat16:
    return f'multiplies bfloat16, not {dtype}'
  if any(width % 128 for width in widths):
    return f'needs widths in multiples of 128, not {tuple(widths)}'
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or device.compute_capability != '9.0':
    return f'needs a Hopper GPU, not {device.device_kind}'
  return None


def decode_experts(
  x_MD: jax.Array,
  index_MX: jax.Array,
  weight_MX: jax.Array,
  wi_0: weights.Weights,
  wi_1: weights.Weights,
  wo: weights.Weights,
  *,
  up_tiles: tile_tables.DecodeTiles | None = None,
  down_tiles: tile_tables.DecodeTiles | None = None,
  blocks: int | None = None,
) -> jax.Array:
  """See `pallas_kernels.decode.api.decode_experts`.

  Args:
    x_MD: bfloat16 tokens.
    index_MX: chosen experts.
    weight_MX: what each choice counts.
    wi_0: gate.
    wi_1: up.
    wo: down.
    up_tiles: how to cut gate and up; None looks the device up.
    down_tiles: how to cut down; None looks the device up.
    blocks: persistent blocks; None takes one a multiprocessor.
  """
  up_tiles = up_tiles or _lookup('decode_up', wi_0)
  down_tiles = down_tiles or _lookup('decode_down', wo)
  widest = max(min(up_tiles.tokens, down_tiles.tokens), plans.WHOLE)
  tile = min(widest, _width(len(x_MD)))
  plan = plans.make(index_MX, weights.experts(wi_0), tile)
  rows = plans.rows(*index_MX.shape, weights.experts(wi_0), tile)
  whole = plan.source_P is None
  if whole:
    x_PD = jnp.pad(x_MD, ((0, plans.span(len(x_MD)) - len(x_MD)), (0, 0)))
  else:
    x_PD = x_MD[plan.source_P]
  run = functools.partial(_product, rows=rows, tile=tile, blocks=blocks)
  act_PF = run(plan, x_PD, (wi_0, wi_1), tiles=up_tiles, whole=whole)
  y_PD = run(plan, act_PF, (wo,), tiles=down_tiles, whole=False)
  return plans.combine(y_PD, plan, weight_MX, x_MD.dtype)


def _width(count: int) -> int:
  """The narrowest product for `count` tokens, or the widest there is."""
  return next((width for width in WIDTHS if width >= count), WIDTHS[-1])


def _lookup(operation: str, w: weights.Weights) -> tile_tables.DecodeTiles:
  kind = jax.local_devices()[0].device_kind
  operation += '_fp8' if isinstance(w, weights.Quantized) else ''
  return tile_tables.lookup_decode(kind, operation, weights.widths(w))


def _product(
  plan: plans.Plan,
  x_PK: jax.Array,
  matrices: tuple[weights.Weights, ...],
  *,
  rows: int,
  tile: int,
  tiles: tile_tables.DecodeTiles,
  whole: bool,
  blocks: int | None,
) -> jax.Array:
  """Rows times their expert's matrix, or the gated activation of two.

  Args:
    plan: which rows go through which expert.
    x_PK: bfloat16 rows.
    matrices: down, or gate and up.
    rows: how many the result has; those of no tile are left as they were.
    tile: most rows of a tile.
    tiles: how to cut.
    whole: every tile multiplies the first rows of `x_PK`.
    blocks: persistent blocks; None takes one a multiprocessor.

  Returns:
    bfloat16[rows, N].
  """
  quantised = isinstance(matrices[0], weights.Quantized)
  widths = weights.widths(matrices[0])
  cut = fit(tiles, widths, len(matrices), quantised, tile, whole)
  kernel = plgpu.kernel(
    functools.partial(_body, cut=cut),
    out_type=jax.ShapeDtypeStruct((rows, widths[1]), jnp.bfloat16),
    scratch_types=_scratch(cut),
    kernel_name='decode_up' if cut.matrices == 2 else 'decode_down',
    grid=(blocks or jax.local_devices()[0].core_count,),
    grid_names=('cluster',),
    num_threads=pipeline.CONSUMERS + 1,
    thread_name='warpgroup',
  )
  operands = plan.table_4T, x_PK, *jax.tree.leaves(matrices)
  return plans.varying_like(operands, dispatch.narrow(kernel)(*operands))


def fit(
  tiles: tile_tables.DecodeTiles,
  widths: tuple[int, int],
  matrices: int,
  quantised: bool,
  tile: int,
  whole: bool,
) -> Cut:
  """Tiles made to divide the matrices and to fit into shared memory."""
  # A stage of FP8 weights holds whole squares.
  least = weights.BLOCK if quantised else weights.BLOCK // 2
  depth = max(tiles.depth, least)
  while widths[0] % depth:
    depth //= 2
  cut = Cut(
    columns=min(tiles.columns, widths[1] & -widths[1]),
    depth=depth,
    stages=tiles.stages,
    widths=tuple(width for width in WIDTHS if width <= tile),
    matrices=matrices,
    quantised=quantised,
    whole=whole,
  )
  while shared_bytes(cut) > SHARED_BYTES:
    if cut.stages > ENOUGH_STAGES or cut.depth == least:
      cut = dataclasses.replace(cut, stages=cut.stages - 1)
    else:
      cut = dataclasses.replace(cut, depth=cut.depth // 2, stages=tiles.stages)
    if cut.stages < 2:
      raise ValueError(f'{tiles}: two stages do not fit into shared memory')
  return cut


def shared_bytes(cut: Cut) -> int:
  """What the ring and the staged results take of a block's shared memory."""
  tile = cut.widths[-1]
  item = 1 if cut.quantised else 2
  stage = cut.depth * (cut.matrices * cut.columns * item + 2 * tile)
  return cut.stages * stage + 2 * tile * cut.columns


def _scratch(cut: Cut) -> dict:
  """The ring of stages, the staging of results, and their barriers."""
  tile = cut.widths[-1]
  if cut.quantised:
    dtype, shape = jnp.float8_e4m3fn, (cut.columns, cut.depth)
  else:
    dtype, shape = jnp.bfloat16, (cut.depth, cut.columns)
  return {
    'x_smem': pipeline.swizzled((cut.stages, tile, cut.depth), jnp.bfloat16),
    'w_smem': pipeline.swizzled((cut.stages, cut.matrices, *shape), dtype),
    'out_smem': pipeline.swizzled(
      (pipeline.CONSUMERS, tile, cut.share), jnp.bfloat16
    ),
    'full': plgpu.Barrier(
      num_arrivals=cut.matrices + 1, num_barriers=cut.stages
    ),
    'empty': plgpu.Barrier(
      num_arrivals=pipeline.CONSUMERS, num_barriers=cut.stages
    ),
  }


def _body(table_ref, x_ref, *refs, x_smem, w_smem, out_smem, full, empty, cut):
  *matrix_refs, y_ref = refs
  w_refs = matrix_refs[:: 2 if cut.quantised else 1]
  scale_refs = matrix_refs[1::2] if cut.quantised else ()
  column_blocks = y_ref.shape[1] // cut.columns
  steps = x_ref.shape[1] // cut.depth

  def locate(item):
    entry = lax.div(item, column_blocks)
    block = lax.rem(item, column_blocks)
    column = pl.multiple_of(block * cut.columns, cut.columns)
    row = pl.multiple_of(table_ref[1, entry], pipeline.ALIGN)
    return table_ref[0, entry], row, table_ref[2, entry], column

  def by_width(extent, visit):
    """Calls `visit` with the narrowest product that holds the rows."""
    below = 0
    for width in cut.widths:
      pl.when((extent > below) & (extent <= width))(
        functools.partial(visit, width)
      )
      below = width

  def fetch(item, ring):
    expert, row, extent, column = locate(item)
    first = 0 if cut.whole else row

    def copy(step, slot):
      deep = pl.ds(step * cut.depth, cut.depth)
      wide = pl.ds(column, cut.columns)
      for matrix, w_ref in enumerate(w_refs):
        place = (wide, deep) if cut.quantised else (deep, wide)
        plgpu.copy_gmem_to_smem(
          w_ref.at[expert, *place], w_smem.at[slot, matrix], full.at[slot]
        )
      by_width(
        extent,
        lambda width: plgpu.copy_gmem_to_smem(
          x_ref.at[pl.ds(first, width), deep],
          x_smem.at[slot, pl.ds(0, width)],
          full.at[slot],
        ),
      )

    return pipeline.fetch(copy, steps, ring, empty, cut)

  def multiply(item, ring, warpgroup):
    expert, row, extent, column = locate(item)
    column += warpgroup * cut.share

    def visit(width):
      if cut.quantised:
        block = lax.div(column, weights.BLOCK)
        scales = [scale.at[expert, block] for scale in scale_refs]
        sums = _sum_scaled(
          x_smem, w_smem, scales, warpgroup, width, steps, ring, full, empty,
          cut,
        )  # fmt: skip
      else:
        sums = _sum(
          x_smem, w_smem, warpgroup, width, steps, ring, full, empty, cut
        )
      value = sums[0]
      if cut.matrices == 2:
        value = value / (1 + jnp.exp(-value)) * sums[1]
      staged = out_smem.at[warpgroup]
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      staged.at[pl.ds(0, width)].transpose((1, 0))[...] = value.astype(
        jnp.bfloat16
      )
      plgpu.commit_smem()
      _store_rows(staged, y_ref, row, column, extent, width, cut)

    by_width(extent, visit)
    return ring + steps

  pipeline.run(fetch, multiply, table_ref[3, 0] * column_blocks, empty, cut)


def _sum(x_smem, w_smem, warpgroup, width, steps, ring, full, empty, cut):
  """Products of plain weights, summed over the stages of the ring."""
  mine = pl.ds(warpgroup * cut.share, cut.share)

  def step(accs, slot, index):
    del index
    x_KN = x_smem.at[slot, pl.ds(0, width)].transpose((1, 0))
    for matrix, acc in enumerate(accs):
      w = w_smem.at[slot, matrix, :, mine].transpose((1, 0))
      plgpu.wgmma(acc, w, x_KN)

  shapes = [(cut.share, width)] * cut.matrices
  return pipeline.accumulate(step, steps, ring, full, empty, cut, shapes)


def _sum_scaled(
  x_smem, w_smem, scales, warpgroup, width, steps, ring, full, empty, cut
):
  """Products of FP8 weights, each square scaled before it is added."""
  mine = pl.ds(warpgroup * cut.share, cut.share)
  squares = cut.depth // weights.BLOCK
  shape = cut.share, width

  def body(index, totals):
    slot = lax.rem(ring + index, cut.stages)
    # Read before the wait, which hides how long it takes.
    factors = [
      [scale[index * squares + square] for scale in scales]
      for square in range(squares)
    ]
    plgpu.barrier_wait(full.at[slot])
    for square in range(squares):
      deep = pl.ds(square * weights.BLOCK, weights.BLOCK)
      codes = [
        w_smem[slot, matrix, mine, deep] for matrix in range(cut.matrices)
      ]
      x_KN = x_smem.at[slot, pl.ds(0, width), deep].transpose((1, 0))
      totals = tuple(
        total + factor * partial
        for total, factor, partial in zip(
          totals, factors[square], multiply_codes(codes, x_KN)
        )
      )
    plgpu.barrier_arrive(empty.at[slot])
    return totals

  zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
  return lax.fori_loop(0, steps, body, (zeros,) * cut.matrices)


def multiply_codes(codes: list[jax.Array], x_KN) -> tuple[jax.Array, ...]:
  """Products of FP8 codes, in registers, with tokens, in shared memory.

  Args:
    codes: float8_e4m3fn[N, K], one or several.
    x_KN: bfloat16, a reference; here N are tokens.

  Returns:
    float32[N, N], as many as `codes`.
  """

  def scope(*accs):
    for acc, code in zip(accs, codes):
      # The hardware converts to float16 only; every step is exact.
      plgpu.wgmma(acc, code.astype(jnp.float32).astype(jnp.bfloat16), x_KN)
    plgpu.wgmma_wait(0)
    return tuple(acc[...] for acc in accs)

  accs = [
    plgpu.ACC((code.shape[0], x_KN.shape[1]), jnp.float32) for code in codes
  ]
  return pl.run_scoped(scope, *accs)


def _store_rows(staged, y_ref, row, column, extent, width, cut):
  """Copies the first `extent` staged rows, a multiple of 8, to `row` on."""
  for piece in range(0, width, pipeline.ALIGN):

    @pl.when(piece < extent)
    def _(piece=piece):
      plgpu.copy_smem_to_gmem(
        staged.at[pl.ds(piece, pipeline.ALIGN)],
        y_ref.at[pl.ds(row + piece, pipeline.ALIGN), pl.ds(column, cut.share)],
        commit_group=False,
      )

  plgpu.commit_smem_to_gmem_group()
