"""Rows to and from the other GPUs of an axis, in Pallas Mosaic GPU.

Kernels write straight into the other GPUs' memory, whose addresses XLA hands
over where one process has all devices; it also lets no kernel begin before all
of them may. A token's row is one bulk copy through shared memory, as in
`permute/mosaic_gpu.py`. Block b of a GPU waits for what block b of the others
writes. At M2's widths all blocks of an idle GPU are resident; where they are
not, the wait ends because a GPU starts blocks in the order of their numbers,
which is observed, not promised by CUDA.

`combine` hides the links: what it sums for other GPUs' tokens leaves while the
next rows are read. See NOTES.md for rates.
"""

import ctypes
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, hopper
from pallas_kernels.links import layout
from pallas_kernels.permute import api as permute
from pallas_kernels.permute import mosaic_gpu as moves

SLOTS, AHEAD = 8, 4  # rows of an array in shared memory; loads in flight
SIDE = 256  # values of a copy of arrays whose rows are too short for one
SHORT = 1 << 10  # bytes of a row that is


def refusal(dtype: jnp.dtype, width: int) -> str | None:
  """Why these kernels cannot serve such a layer here, or None."""
  if reason := moves.rows_refusal(dtype, width):
    return reason
  if jax.process_count() > 1:
    return 'writes into the memory of GPUs of one process, not of several'
  size = jax.sharding.get_abstract_mesh().size
  if size != jax.device_count():
    return f'needs a mesh of all {jax.device_count()} GPUs, not of {size}'
  ordinals = tuple(device.local_hardware_id for device in jax.local_devices())
  if pair := _apart(ordinals):
    return f'needs GPUs that reach the memory of each other, not {pair}'
  return None


@functools.cache
def _apart(ordinals: tuple[int, ...]) -> tuple[int, int] | None:
  """Two GPUs of which one cannot reach the other's memory, by the driver."""
  if len(ordinals) < 2:
    return None
  driver, able = ctypes.CDLL('libcuda.so.1'), ctypes.c_int()
  handle = {number: ctypes.c_int() for number in ordinals}
  for number, found in handle.items():
    if error := driver.cuDeviceGet(ctypes.byref(found), number):
      raise RuntimeError(f'cuDeviceGet({number}) failed: CUDA error {error}')
  for pair in itertools.permutations(ordinals, 2):
    devices = (handle[number] for number in pair)
    failed = driver.cuDeviceCanAccessPeer(ctypes.byref(able), *devices)
    if failed or not able.value:
      return pair
  return None


def gather(axis: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """See `layout.Links`; values of 16 or 32 bits."""
  devices = lax.axis_size(axis)
  items = [_items(x) for x in arrays]
  kernel = plgpu.kernel(
    functools.partial(_gather_body, axis=axis, devices=devices),
    out_type=[
      jax.ShapeDtypeStruct((devices, *x.shape), x.dtype) for x in items
    ],
    scratch_types={
      'rings': [plgpu.SMEM((SLOTS, *x.shape[1:]), x.dtype) for x in items],
      'full': plgpu.Barrier(num_barriers=SLOTS),
      'landed': plgpu.SemaphoreType.REGULAR,
    },
    grid=(moves.resident_blocks(),),
    grid_names=('block',),
    kernel_name='all_gather_rows',
  )
  found = []
  for x, y in zip(arrays, dispatch.narrow(kernel)(*items)):
    y = y.reshape(devices, -1)[:, : x.size]
    y = y.reshape(devices * x.shape[0], *x.shape[1:])
    found.append(hopper.varying_like(x, y))
  return tuple(found)


def _items(x: jax.Array) -> jax.Array:
  """An array as what single copies carry, [items, ...]."""
  row = x.size // x.shape[0]
  if row * x.dtype.itemsize > SHORT:
    return x.reshape(x.shape[0], *hopper.box(row))
  return jnp.pad(x.reshape(-1), (0, -x.size % SIDE)).reshape(-1, SIDE)


def _gather_body(*refs, rings, full, landed, axis, devices):
  block, blocks = lax.axis_index('block'), lax.axis_size('block')
  me = lax.axis_index(axis)
  for x_ref, y_ref, ring in zip(refs, refs[len(rings) :], rings):
    mine = lax.div(x_ref.shape[0] - block + blocks - 1, blocks)

    def load(index, x_ref=x_ref, ring=ring):
      slot = lax.rem(index, SLOTS)
      source = x_ref.at[block + index * blocks]
      plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])

    for index in range(AHEAD):
      pl.when(index < mine)(functools.partial(load, index))

    def item(index, _, y_ref=y_ref, ring=ring, load=load, mine=mine):
      slot, number = lax.rem(index, SLOTS), block + index * blocks
      plgpu.barrier_wait(full.at[slot])
      for target in (*_others(y_ref, axis, devices), y_ref):
        plgpu.copy_smem_to_gmem(
          ring.at[slot], target.at[me, number], commit_group=False
        )
      plgpu.commit_smem_to_gmem_group()
      # The slot filled next was stored from SLOTS - AHEAD items ago.
      plgpu.wait_smem_to_gmem(SLOTS - AHEAD, wait_read_only=True)
      pl.when(index + AHEAD < mine)(functools.partial(load, index + AHEAD))

    lax.fori_loop(0, mine, item, None)
  _tell(landed, axis, devices)
  pl.semaphore_wait(landed, devices - 1, decrement=False)


def _others(ref, axis: str, devices: int):
  """`ref` on the other devices, the next one first."""
  me = lax.axis_index(axis)
  return [
    plgpu.remote_ref(ref, {axis: lax.rem(me + step, devices)})
    for step in range(1, devices)
  ]


def _tell(landed, axis: str, devices: int) -> None:
  """Tells the same block of the other devices that all is written."""
  plgpu.wait_smem_to_gmem(0)
  me = lax.axis_index(axis)
  for step in range(1, devices):
    other = {axis: lax.rem(me + step, devices)}
    pl.semaphore_signal(landed, device_id=other)


def combine(
  axis: str, y_PD: jax.Array, plan: permute.Plan, weight_MX: jax.Array
) -> jax.Array:
  """See `layout.Links`; bfloat16 or float32."""
  devices = lax.axis_size(axis)
  place_MX = plan.place_MX
  if y_PD.shape[0] == 1:  # bulk copies do not check the bounds of one row
    y_PD = jnp.pad(y_PD, ((0, 1), (0, 0)))
  positions, width = y_PD.shape
  tokens = place_MX.shape[0] // devices
  box = hopper.box(width)
  kernel = plgpu.kernel(
    functools.partial(_combine_body, axis=axis, devices=devices),
    out_type=[
      jax.ShapeDtypeStruct((tokens, *box), y_PD.dtype),
      jax.ShapeDtypeStruct((devices - 1, tokens, *box), y_PD.dtype),
    ],
    scratch_types=moves.combine_scratch(place_MX.shape[1], box, y_PD.dtype)
    | {'landed': plgpu.SemaphoreType.REGULAR},
    grid=(moves.resident_blocks(),),
    grid_names=('block',),
    kernel_name='combine_scatter_rows',
  )
  weight_MX = weight_MX.astype(jnp.float32)
  y_PD = y_PD.reshape(positions, *box)
  y_MD, _ = dispatch.narrow(kernel)(weight_MX, place_MX, y_PD)
  return hopper.varying_like(y_PD, y_MD.reshape(tokens, width))


def _combine_body(
  weight_ref,
  place_ref,
  y_ref,
  out_ref,
  theirs_ref,
  *,
  ring,
  staging,
  full,
  landed,
  axis,
  devices,
):
  """Other devices' tokens first; own ones take up what those sent."""
  block, blocks = lax.axis_index('block'), lax.axis_size('block')
  me = lax.axis_index(axis)
  tokens = out_ref.shape[0]
  mine = lax.div(tokens - block + blocks - 1, blocks)
  run = functools.partial(
    moves.combine_tokens,
    weight_ref, place_ref, y_ref, ring, staging, full, count=mine,
  )  # fmt: skip

  def own(index):
    return block + index * blocks

  for step, theirs in enumerate(_others(theirs_ref, axis, devices), 1):
    first = lax.rem(me + step, devices) * tokens
    # Seen from there, this device is `devices - step` further on.
    target = theirs.at[devices - step - 1]
    run(
      number=lambda index, first=first: first + own(index),
      target=lambda index, target=target: target.at[own(index)],
    )
  _tell(landed, axis, devices)
  pl.semaphore_wait(landed, devices - 1, decrement=False)
  run(
    number=lambda index: me * tokens + own(index),
    target=lambda index: out_ref.at[own(index)],
    added=[
      lambda index, step=step: theirs_ref[step, own(index)]
      for step in range(devices - 1)
    ],
  )


LINKS = layout.Links(gather, combine)
