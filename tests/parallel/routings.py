"""Expert layers in small, and the routings that are hard on their exchange."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from m2 import config
from m2.parallel import cost, experts, order, sharding
from m2.parallel import mesh as meshes
from tests.parallel import loops

EXPERTS, TOP_K, WIDTH, HIDDEN = 16, 4, 8, 4
BATCH, LENGTH = 8, 16
# uniform; all tokens to the same experts, which are one device's or two's;
# every other token to one device and the others to none; two to four a token.
ROUTINGS = ('uniform', 'same', 'idle', 'adaptive')
AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
TOLERANCE = 2e-5  # float32, of the largest value
# So little that uniform routing needs rounds of the rest, too.
TIGHT = cost.Room(copies=3, choices=6, always=False)


def choices(routing: str) -> tuple[np.ndarray, np.ndarray]:
  """index_BTX (EXPERTS = slot not used) and weight_BTX."""
  rng = np.random.default_rng(1)
  index = rng.random((BATCH, LENGTH, EXPERTS)).argsort(-1)[..., :TOP_K]
  slot = np.arange(TOP_K)
  if routing == 'same':
    index = np.broadcast_to(slot + 6, index.shape)
  if routing == 'idle':
    even = (np.arange(LENGTH) % 2 == 0)[:, None]
    even_TX = np.where(even, slot + EXPERTS - TOP_K, EXPERTS)
    index = np.broadcast_to(even_TX, index.shape)
  if routing == 'adaptive':
    used = rng.integers(2, TOP_K, (BATCH, LENGTH, 1), endpoint=True)
    index = np.where(slot < used, index, EXPERTS)
  weight = np.where(index < EXPERTS, rng.uniform(0.1, 1, index.shape), 0)
  weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-6)
  return index.astype(np.int32), weight.astype(np.float32)


def operands(routing: str) -> tuple[np.ndarray, ...]:
  """Tokens, choices, weights, three matrices and the sum's gradient."""
  rng = np.random.default_rng(2)
  wide, tall = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
  shapes = (BATCH, LENGTH, WIDTH), wide, wide, tall, (BATCH, LENGTH, WIDTH)
  x, *rest = (rng.standard_normal(shape, np.float32) for shape in shapes)
  return x, *choices(routing), *rest


def layer(**options) -> Callable:
  """Jitted: operands -> the layer's output and all its gradients."""

  def run(x, index, weight, wi_0, wi_1, wo, dy):
    y, pull = jax.vjp(
      lambda x, weight, *ws: experts.expert_parallel(
        x, (index, weight), *ws, **options
      ),
      x,
      weight,
      wi_0,
      wi_1,
      wo,
    )
    # As in training, nothing of the backward pass begins before the forward's.
    y, dy = order.together((y, sharding.place(dy, 'batch', 'sequence', None)))
    return y, *pull(dy)

  return jax.jit(run)


def ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes,
  *, axis_name,
):  # fmt: skip
  """`jax.lax.ragged_all_to_all` by its documentation, for XLA on CPUs.

  Where sizes that are announced do not agree or rows are written twice it gives
  NaN.
  """
  rows, first, sent, there = (
    jax.lax.all_gather(z, axis_name)
    for z in (operand, input_offsets, send_sizes, output_offsets)
  )
  devices, total = sent.shape
  updates = total // devices
  # Those of every source to this device, K of them.
  first_K, sent_K, there_K = (
    z.reshape(devices, devices, -1)[:, jax.lax.axis_index(axis_name)].ravel()
    for z in (first, sent, there)
  )
  row_N = jnp.arange(len(output))
  ahead_NK = row_N[:, None] - there_K[None]
  here_NK = (ahead_NK >= 0) & (ahead_NK < sent_K[None])
  update_N = here_NK.argmax(1)  # no two of them write to one row
  index_N = row_N - there_K[update_N] + first_K[update_N]
  index_N = jnp.clip(index_N, 0, len(operand) - 1)
  found = rows[update_N // updates, index_N]
  output = jnp.where(here_NK.any(1)[:, None], found, output)
  agree = (sent_K == recv_sizes).all() & (here_NK.sum(1) <= 1).all()
  return jnp.where(agree, output, jnp.nan)


@contextlib.contextmanager
def emulated():
  """On CPUs said to be GPUs: `ragged` by its documentation, `direct` by XLA."""
  with (
    mock.patch.object(jax.lax, 'ragged_all_to_all', ragged_all_to_all),
    mock.patch.object(experts, '_device', lambda: ('gpu', 'NVIDIA H200')),
    mock.patch.object(experts, '_direct_refusal', lambda *_: None),
  ):
    yield


def mesh(sizes: Sequence[int]) -> jax.sharding.Mesh:
  """As many devices as it takes; sizes are those of AXES."""
  cfg = config.MeshConfig(**dict(zip(AXES, sizes)))
  return meshes.make_mesh(cfg, jax.devices()[: np.prod(sizes)])


@functools.cache
def one_device(routing: str) -> list[np.ndarray]:
  """What every strategy over every mesh is to give."""
  return [np.asarray(z) for z in layer()(*operands(routing))]


def largest_error(
  sizes: Sequence[int], strategy: str, chunks: int, *, tight: bool
) -> float:
  """Of all routings, outputs and gradients, over the largest value of each.

  Args:
    sizes: of the mesh.
    strategy: forced.
    chunks: forced.
    tight: leave the slices too little room, so that rounds follow.
  """
  wants = {routing: one_device(routing) for routing in ROUTINGS}
  errors = []
  room = mock.patch.object(cost, 'room', lambda *_: TIGHT)
  with room if tight else contextlib.nullcontext(), emulated():
    with jax.set_mesh(mesh(sizes)):
      given = operands(ROUTINGS[0])
      run = layer(strategy=strategy, chunks=chunks, impl='xla')
      run = run.lower(*given).compile()
      assert not loops.unordered(run.as_text())
      for routing, want in wants.items():
        for a, b in zip(run(*operands(routing)), want, strict=True):
          scale = max(np.abs(b).max(), 1e-6)
          errors.append(np.abs(np.asarray(a) - b).max() / scale)
  return float(np.max(errors))
