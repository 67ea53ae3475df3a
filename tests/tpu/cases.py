"""Kernels and shapes that `kernels.py` compiles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import megablox

import pallas_kernels
from pallas_kernels import tiles_tpu
from pallas_kernels.experts import mosaic_tpu as experts
from pallas_kernels.experts import vjp as experts_vjp
from pallas_kernels.gmm import mosaic_tpu
from pallas_kernels.permute import mosaic_tpu as permute
from pallas_kernels.route import mosaic_tpu as route

WIDTH, HIDDEN, TOP_K, ALIGN = 3072, 1536, 8, 16
BF16 = jnp.dtype('bfloat16')
# Rows, contraction and columns of the peer's tiles: the largest of the usual
# ones that fit the vector memory it is given, which it does not ask to extend.
PEER_TILES = 512, 1024, 1024
PEERS = ('megablox',)
OTHERS = ('gather', 'combine', 'route', 'layer', 'attention', *PEERS)


class Case(NamedTuple):
  """One kernel at one shape.

  Attributes:
    call: (*operands, chip, tiles) -> results; without the last two for peers,
      without the last for kernels that have no tiles.
    operands: shapes and dtypes.
    name: of the kernel in the compiler's files.
    flops: of all rows.
    ideal: bytes if every operand and result crossed the bus once.
    tiles: how it is cut, if rows stream past matrices.
    matrix_bytes: of one group: what is fetched, or for gradients written.
    row_in: bytes of a row of all operands.
    row_out: bytes of a row of all results.
    padding: bytes of a row that only fill lanes, no part of the ideal.
  """

  call: Callable[..., Any]
  operands: tuple[jax.ShapeDtypeStruct, ...]
  name: str
  flops: int
  ideal: int
  tiles: tiles_tpu.Tiles | None = None
  matrix_bytes: int = 0
  row_in: int = 0
  row_out: int = 0
  padding: int = 0


def array(*shape, dtype=BF16):
  return jax.ShapeDtypeStruct(shape, dtype)


def streamed(
  operation: str, tokens: int, groups: int, chip: tiles_tpu.Chip
) -> Case:
  """A product of the expert layer; rows are the worst case of the tokens."""
  rows = positions(tokens, groups)
  fit = chip, rows // groups, WIDTH, HIDDEN
  wide, narrow = array(rows, WIDTH), array(rows, HIDDEN)
  wi, wo = array(groups, WIDTH, HIDDEN), array(groups, HIDDEN, WIDTH)
  sizes = array(groups, dtype=jnp.int32)
  number = array(rows, dtype=jnp.float32)
  lanes = 4 * tiles_tpu.LANES
  matrix, work = 2 * WIDTH * HIDDEN, 2 * rows * WIDTH * HIDDEN
  product = functools.partial(mosaic_tpu.product, out_dtype=BF16)
  gradient = mosaic_tpu.weight_gradient

  def product_tiles(depth, columns, transpose):
    return mosaic_tpu.product_tiles(*fit[:2], depth, columns, BF16, transpose)

  def gradient_tiles(dtype):
    return mosaic_tpu.gradient_tiles(*fit, jnp.dtype(dtype))

  # call, operands, kernel, matrices, tiles, bytes of a row in, out, padding
  call, operands, name, matrices, tiles, row_in, row_out, padding = {
    'up': lambda: (
      functools.partial(experts.up, save=True), (wide, wi, wi, sizes),
      'experts_up', 2, experts.up_tiles(*fit), 2 * WIDTH, 6 * HIDDEN, 0,
    ),
    'down': lambda: (
      experts.down, (narrow, wo, sizes), 'grouped_matmul', 1,
      product_tiles(HIDDEN, WIDTH, False), 2 * HIDDEN, 2 * WIDTH, 0,
    ),
    'down_backward': lambda: (
      experts.down_backward, (wide, wo, narrow, narrow, number, sizes),
      'experts_down_backward', 1, experts.down_backward_tiles(*fit),
      2 * WIDTH + 4 * HIDDEN + lanes, 6 * HIDDEN + lanes, 2 * (lanes - 4),
    ),
    'up_backward': lambda: (
      experts.up_backward, (narrow, narrow, wi, wi, sizes),
      'experts_up_backward', 2, experts.up_backward_tiles(*fit),
      4 * HIDDEN, 2 * WIDTH, 0,
    ),
    'product': lambda: (
      functools.partial(product, transpose=False), (wide, wi, sizes),
      'grouped_matmul', 1, product_tiles(WIDTH, HIDDEN, False),
      2 * WIDTH, 2 * HIDDEN, 0,
    ),
    'transposed': lambda: (
      functools.partial(product, transpose=True), (wide, wo, sizes),
      'grouped_matmul_t', 1, product_tiles(WIDTH, HIDDEN, True),
      2 * WIDTH, 2 * HIDDEN, 0,
    ),
    'weight_gradient': lambda: (
      functools.partial(gradient, out_dtype=BF16), (wide, narrow, sizes),
      'grouped_matmul_gradient', 1, gradient_tiles(BF16),
      2 * (WIDTH + HIDDEN), 0, 0,
    ),
    'weight_gradient_fp32': lambda: (
      functools.partial(gradient, out_dtype=jnp.float32),
      (wide, narrow, sizes), 'grouped_matmul_gradient', 2,
      gradient_tiles(jnp.float32), 2 * (WIDTH + HIDDEN), 0, 0,
    ),
  }[operation]()  # fmt: skip
  return Case(
    functools.partial(call, align=ALIGN),
    operands,
    name,
    # The float32 gradient counts as two matrices in bytes, not in work.
    work * (2 if operation.startswith('up') else 1),
    groups * matrices * matrix + rows * (row_in + row_out - padding),
    tiles,
    matrices * matrix,
    row_in,
    row_out,
    padding,
  )


def other(operation: str, tokens: int, groups: int) -> Case:
  """Kernels without matrices, and the peer of `product`."""
  rows, slots = positions(tokens, groups), tokens * TOP_K
  place = array(tokens, TOP_K, dtype=jnp.int32)
  weight = array(tokens, TOP_K, dtype=jnp.float32)
  score = array(tokens, groups, dtype=jnp.float32)
  options = {'top_k': TOP_K, 'min_k': TOP_K, 'min_share': 0.0}
  row = 2 * WIDTH
  if operation == 'gather':
    return Case(
      permute.gather_rows,
      (array(tokens, WIDTH), array(rows, dtype=jnp.int32)),
      'gather_rows', 0, (slots + rows) * row,
    )  # fmt: skip
  if operation == 'combine':
    return Case(
      permute.combine, (array(rows, WIDTH), place, weight), 'combine_rows',
      2 * slots * WIDTH, (slots + tokens) * row,
    )  # fmt: skip
  if operation == 'route':
    return Case(
      functools.partial(route.route_and_count, **options),
      (score, array(groups, dtype=jnp.float32)), 'route',
      0, 4 * tokens * groups + 8 * slots,
    )  # fmt: skip
  if operation == 'layer':
    return layer(tokens, groups)
  if operation == 'attention':
    return attended(tokens)
  if operation != 'megablox':
    raise ValueError(f'no kernel {operation!r}')
  call = functools.partial(
    megablox.gmm, preferred_element_type=BF16, tiling=PEER_TILES
  )
  wi = array(groups, WIDTH, HIDDEN)
  sizes = array(groups, dtype=jnp.int32)
  ideal = 2 * (groups * WIDTH * HIDDEN + slots * (WIDTH + HIDDEN))
  return Case(
    call, (array(slots, WIDTH), wi, sizes), 'gmm',
    2 * slots * WIDTH * HIDDEN, ideal,
  )  # fmt: skip


def layer(tokens: int, groups: int) -> Case:
  """The whole expert layer and its derivative, every part on these kernels."""
  weight = array(tokens, TOP_K, dtype=jnp.float32)
  index = array(tokens, TOP_K, dtype=jnp.int32)
  x = array(tokens, WIDTH)
  wi, wo = array(groups, WIDTH, HIDDEN), array(groups, HIDDEN, WIDTH)

  def call(dy_MD, x_MD, index_MX, weight_MX, *matrices, chip):
    del chip  # stands in the context
    y_MD, pull = jax.vjp(
      lambda x_MD, weight_MX, *matrices: experts_vjp.experts(
        experts.BACKEND,
        'mosaic_tpu',
        None,
        None,
        x_MD,
        index_MX,
        weight_MX,
        *matrices,
      ),
      x_MD,
      weight_MX,
      *matrices,
    )
    return y_MD, pull(dy_MD)

  matrix = 2 * groups * WIDTH * HIDDEN
  slots = tokens * TOP_K
  # Forward and backward read each matrix, its gradient is written; the widths
  # of all rows that one kernel writes or reads add up to these.
  rows = 2 * slots * (15 * WIDTH + 14 * HIDDEN)
  return Case(
    call, (x, x, index, weight, wi, wi, wo), 'experts_up',
    18 * slots * WIDTH * HIDDEN, 9 * matrix + rows,
  )  # fmt: skip


def attended(tokens: int) -> Case:
  """Causal attention of a row and its derivative."""
  heads, kv_heads, width = 48, 8, 128
  q, k = (array(1, tokens, n, width) for n in (heads, kv_heads))
  index = array(1, tokens, dtype=jnp.int32)

  def call(q, k, v, until, dy, chip):
    del chip  # stands in the context
    attention = functools.partial(
      pallas_kernels.attention, scale=width**-0.5, impl='mosaic_tpu'
    )
    y, pull = jax.vjp(lambda *z: attention(*z, until), q, k, v)
    return y, *pull(dy)

  return Case(
    call, (q, k, k, index, q), 'attention',
    9 * heads * width * tokens**2, 8 * width * tokens * (heads + kv_heads),
  )  # fmt: skip


def positions(tokens: int, groups: int) -> int:
  """P for these tokens: room for any routing, group starts aligned."""
  slots = tokens * TOP_K
  return -(-(slots + groups * (ALIGN - 1)) // ALIGN) * ALIGN
