"""Matrices of FP8 codes made plain on TPUs, as they lie.

XLA would ask for the codes in another layout than parameters have, and keep a
copy of those of all layers in it; a kernel takes them as they are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tiles_tpu
from pallas_kernels.decode import weights
from pallas_kernels.decode import xla as loop
from pallas_kernels.gmm import mosaic_tpu, stream_tpu

# Up to so many tokens XLA's loop moves less: a kernel is given a copy of the
# layer that is cut out of the stack.
FEW = 128


def refusal(w: weights.Weights, tokens: int | None = None) -> str | None:
  """Why this kernel is of no use here, or None.

  Args:
    w: matrices.
    tokens: of the layer, where the best is asked for and not this by name.
  """
  if not isinstance(w, weights.Quantized):
    return 'takes codes of FP8; plain matrices need no kernel'
  if reason := mosaic_tpu.no_device():
    return reason
  if tokens is not None and tokens <= FEW:
    return f'is slower for {tokens} tokens'
  return None


def dequantised(
  w: weights.Quantized,
  dtype: jax.typing.DTypeLike,
  *,
  experts_I: jax.Array | None = None,
  chip: tiles_tpu.Chip | None = None,
) -> jax.Array:
  """`weights.dequantised(w, transposed=True)` in `dtype`.

  Args:
    w: matrices [E, N, K].
    dtype: of the result.
    experts_I: int32, make only these; None = all.
    chip: what to compile for; None is the device at hand.

  Returns:
    [I, N, K].
  """
  chip = chip or tiles_tpu.here()
  experts, rows, columns = w.values.shape
  if experts_I is None:
    experts_I = jnp.arange(experts, dtype=jnp.int32)
  side = weights.BLOCK
  high, wide = rows // side, columns // side
  shape, dtype = (len(experts_I), rows, columns), jnp.dtype(dtype)
  block = (1, side, columns)
  call = pl.pallas_call(
    functools.partial(_kernel, blocks=wide),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(len(experts_I), high),
      in_specs=[
        pl.BlockSpec(block, lambda i, n, e_ref: (e_ref[i], n, 0)),
        pl.BlockSpec((1, high, wide), lambda i, n, e_ref: (e_ref[i], 0, 0)),
      ],
      out_specs=pl.BlockSpec(block, lambda i, n, e_ref: (i, n, 0)),
    ),
    out_shape=stream_tpu.like(w.values, shape, dtype),
    cost_estimate=pl.CostEstimate(
      flops=math.prod(shape),
      bytes_accessed=math.prod(shape) * (1 + dtype.itemsize),
      transcendentals=0,
    ),
    compiler_params=stream_tpu.params(chip, 2),
    interpret=chip.interpret,
    name='fp8_dequantise',
  )
  return dispatch.narrow(call)(experts_I, w.values, w.scale_inv)


def _kernel(_, code_ref, scale_ref, out_ref, *, blocks: int):
  row = pl.program_id(1)
  for block in range(blocks):
    columns = pl.ds(block * weights.BLOCK, weights.BLOCK)
    scale = scale_ref[0, pl.ds(row, 1), pl.ds(block, 1)]
    code = code_ref[0, :, columns].astype(jnp.float32)
    out_ref[0, :, columns] = (code * scale).astype(out_ref.dtype)


def _one(w, expert: jax.Array, dtype) -> jax.Array:
  return dequantised(w, dtype, experts_I=expert[None])[0]


decode_experts = functools.partial(loop.decode_experts, one=_one)
