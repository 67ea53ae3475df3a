"""Products over fewer rows than a stage holds, for what is left of a group.

Pallas multiplies over as many rows as a swizzle is wide, 64 of bfloat16; wgmma
itself takes 16 at a time. Groups of some 256 rows would else be multiplied as
320 rows half of the time.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu.wgmma import wgmma_m64
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import nvvm

from pallas_kernels.gmm import pipeline

ROWS = 16  # that one instruction multiplies
WIDE = pipeline.SWIZZLE // 2  # columns of a swizzled tile


def add(total_MN: jax.Array, a_smem, b_smem, count: int) -> jax.Array:
  """`total` + a^T b over the first `count` slices of their rows.

  Args:
    total_MN: float32 sums of a warpgroup; M is 64.
    a_smem: bfloat16 [R, M], swizzled.
    b_smem: bfloat16 [R, N], swizzled.
    count: slices of ROWS rows, at least 1 and at most R / ROWS.
  """
  layout = plgpu.Layout.WGMMA
  operand = plgpu.RefType(pipeline.transforms(jnp.bfloat16))

  @plgpu.inline_mgpu(
    arg_types=(layout, operand, operand),
    return_type=plgpu.ShapeDtypeStruct(
      total_MN.shape, jnp.float32, layout=layout
    ),
  )
  def multiply(ctx, total, a, b):
    del ctx
    sums = mgpu.WGMMAAccumulator.from_registers(total)
    # From [rows, columns] in tiles to a first operand's [columns, rows].
    a = mgpu.utils.memref_transpose(a, (1, 0, 3, 2))
    (a_start, (_, (a_step,))), _, _ = mma_utils.create_descriptor(
      a, pipeline.SWIZZLE, (pipeline.HALF, WIDE), logical_k_major=False
    )
    (b_start, (_, (b_step,))), _, _ = mma_utils.create_descriptor(
      b, pipeline.SWIZZLE, (WIDE, total.shape[1]), logical_k_major=True
    )
    bf16 = ir.BF16Type.get()
    registers = wgmma_m64(
      sums._value.registers,
      a_start,
      b_start,
      a_transpose=True,
      b_transpose=True,
      a_k_stride=a_step,
      b_k_stride=b_step,
      n=total.shape[1],
      swizzle=2 * ROWS * count,  # bytes, from which it counts its instructions
      a_element_type=bf16,
      b_element_type=bf16,
    )
    nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(0)
    found = mgpu.FragmentedArray(
      _registers=registers, _layout=sums._value.layout, _is_signed=None
    )
    return found.to_layout(total.layout)

  return multiply(total_MN, a_smem, b_smem)
