"""Rows that a Hopper product looks up in an index while it multiplies.

A bulk copy moves a box of neighbouring rows, and tokens are no neighbours of
those that chose the same expert. So the copying warpgroup fetches them row by
row, 16 bytes a thread (`cp.async`), to where a bulk copy would have put them,
and rows in expert order are never written to memory.

These copies arrive at barriers of their own, `landed`, one a stage: Pallas'
barriers count bulk copies alone. They belong to the generic proxy and wgmma to
the async one, so who waits for them fences before it multiplies (PTX ISA, async
proxy).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf, vector

from pallas_kernels.gmm import pipeline

THREADS = 128  # of a warpgroup
UNIT = 16  # bytes that a thread copies at a time
UNITS = pipeline.SWIZZLE // UNIT  # of a row in shared memory: 64 columns
STEP = THREADS // UNITS  # rows that the warpgroup copies at a time
SCALAR = plgpu.Layout.WG_SPLAT(())
PLAIN = plgpu.RefType()


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows in the order of their groups, as an index into tokens.

  Attributes:
    x_MD: bfloat16 tokens.
    source_P: int32 flat (token, choice) index of the row at each position
      (`permute.layout.Plan`).
    choices: of a token.
  """

  x_MD: jax.Array
  source_P: jax.Array
  choices: int

  @property
  def shape(self) -> tuple[int, int]:
    return self.source_P.shape[0], self.x_MD.shape[1]

  @property
  def dtype(self) -> jnp.dtype:
    return self.x_MD.dtype


def barriers(stages: int) -> plgpu.SMEM:
  """Memory for `landed`: 8 bytes each."""
  return plgpu.SMEM((stages, 2), jnp.int32)


def prepare(landed) -> None:
  """Makes the barriers ready; all threads of a block begin with it."""

  @plgpu.inline_mgpu(arg_types=(PLAIN,))
  def initialise(ctx, memory):
    del ctx
    one = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.BLOCK)
    for stage in range(landed.shape[0]):
      barrier = _barrier(memory, _number(stage))
      nvvm.mbarrier_init(barrier, _number(THREADS), predicate=one)
    gpu.barrier()

  initialise(landed)


def look_up(source_ref, *, first, count, left, choices) -> jax.Array:
  """Which tokens the next rows are, for any number of `copy`.

  Args:
    source_ref: index of each position.
    first: position of the first row.
    count: rows, at the most.
    left: rows that hold a token.
    choices: of a token.

  Returns:
    int32, for each thread the tokens of which it copies units; those past
    `left` may be any.
  """
  share = pl.cdiv(count, STEP)
  layout = plgpu.Layout.WG_STRIDED((share * THREADS,), vec_size=1)

  @plgpu.inline_mgpu(
    arg_types=(PLAIN, SCALAR, SCALAR),
    return_type=plgpu.ShapeDtypeStruct(
      (share * THREADS,), jnp.int32, layout=layout
    ),
  )
  def load(ctx, sources, first, left):
    del ctx
    first, left = _scalars(first, left)
    i32 = ir.IntegerType.get_signless(32)
    pointer = mgpu.utils.memref_ptr(sources)
    last = ir.MemRefType(sources.type).shape[0] - 1
    last = arith.minsi(arith.addi(first, left), _number(last))
    tokens = np.empty(share, object)
    for index in range(share):
      position = arith.minsi(arith.addi(first, _row(index)), last)
      place = mgpu.utils.getelementptr(pointer, [position], i32)
      token = arith.divui(llvm.load(i32, place), _number(choices))
      tokens[index] = vector.from_elements(
        ir.VectorType.get((1,), i32), [token]
      )
    return mgpu.FragmentedArray(
      _registers=tokens, _layout=layout.to_mgpu(), _is_signed=True
    )

  return load(source_ref, first, left)


def copy(x_ref, tokens, smem, landed, *, slot, column, count, left) -> None:
  """Starts the copies of 64 columns of rows to shared memory.

  Args:
    x_ref: [M, D] in device memory.
    tokens: what `look_up` found.
    smem: [at least count, 64], swizzled.
    landed: barriers of the stages.
    slot: the one at which the copies arrive.
    column: of x with which they start.
    count: rows, a multiple of 8.
    left: rows that hold a token; the others are not written.
  """
  swizzled = plgpu.RefType(pipeline.transforms(x_ref.dtype))
  layout = plgpu.Layout.WG_STRIDED(tokens.shape, vec_size=1)
  issue = plgpu.inline_mgpu(
    arg_types=(PLAIN, layout, swizzled, PLAIN, SCALAR, SCALAR, SCALAR)
  )(functools.partial(_copy, count=count))
  issue(x_ref, tokens, smem, landed, slot, column, left)


def _copy(ctx, x, tokens, smem, landed, slot, column, left, *, count):
  """`copy` for one thread: the same unit of every STEP-th row."""
  del ctx
  slot, column, left = _scalars(slot, column, left)
  i8, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 64))
  token_bytes = ir.MemRefType(x.type).shape[1] * 2

  def at(pointer, offset):
    return mgpu.utils.getelementptr(pointer, [offset], i8)

  unit = arith.remui(_thread(), _number(UNITS))
  # Where the swizzle puts the unit depends on the row modulo 8 alone.
  low = arith.remui(_row(0), _number(pipeline.ALIGN))
  within = arith.muli(arith.xori(unit, low), _number(UNIT))
  target = at(mgpu.utils.memref_ptr(smem), within)
  start = arith.addi(
    arith.muli(column, _number(2)), arith.muli(unit, _number(UNIT))
  )
  source = llvm.addrspacecast(
    llvm.PointerType.get(address_space=1),
    at(mgpu.utils.memref_ptr(x), start),
  )
  for index in range(pl.cdiv(count, STEP)):
    row = _row(index)
    inside = arith.cmpi(arith.CmpIPredicate.slt, row, left)
    branch = scf.IfOp(inside)
    with ir.InsertionPoint(branch.then_block):
      token = vector.extract(tokens.registers[index], [], [0])
      offset = arith.muli(arith.extui(i64, token), _number(token_bytes, 64))
      nvvm.cp_async_shared_global(
        at(target, arith.muli(row, _number(pipeline.SWIZZLE))),
        at(source, offset),
        UNIT,
        nvvm.LoadCacheModifierKind.CG,
      )
      scf.yield_([])
  nvvm.cp_async_mbarrier_arrive(_barrier(landed, slot), noinc=True)


def wait(landed, ring) -> None:
  """Waits for the rows of the `ring`-th stage, which wgmma may read then."""
  stages = landed.shape[0]

  @plgpu.inline_mgpu(arg_types=(PLAIN, SCALAR, SCALAR))
  def arrived(ctx, memory, slot, parity):
    del ctx
    slot, parity = _scalars(slot, parity)
    ticks = _number(10_000_000)
    nvvm.mbarrier_try_wait_parity(_barrier(memory, slot), parity, ticks)
    nvvm.fence_proxy(
      nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta
    )

  parity = lax.rem(lax.div(ring, stages), 2)
  arrived(landed, lax.rem(ring, stages), parity)


def _number(value, bits=32):
  return arith.constant(ir.IntegerType.get_signless(bits), value)


def _scalars(*values):
  return [value.registers.item() for value in values]


def _thread():
  return arith.remui(mgpu.utils.thread_idx(), _number(THREADS))


def _row(index):
  """Row of which the thread copies its `index`-th unit."""
  row = arith.divui(_thread(), _number(UNITS))
  return arith.addi(row, _number(index * STEP))


def _barrier(memory, slot):
  pointer = mgpu.utils.memref_ptr(memory)
  return mgpu.utils.getelementptr(
    pointer, [slot], ir.IntegerType.get_signless(64)
  )
