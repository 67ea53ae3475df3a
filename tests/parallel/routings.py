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


def choices(routing: str) -> tuple[jax.Array, jax.Array]:
  """index_BTX (EXPERTS = slot not used) and weight_BTX."""
  keys = jax.random.split(jax.random.key(1), 3)
  score = jax.random.uniform(keys[0], (BATCH, LENGTH, EXPERTS))
  _, index = jax.lax.top_k(score, TOP_K)
  slot = jnp.arange(TOP_K).reshape(1, 1, -1)
  if routing == 'same':
    index = jnp.broadcast_to(slot + 6, index.shape)
  if routing == 'idle':
    even = (jnp.arange(LENGTH) % 2 == 0).reshape(1, -1, 1)
    index = jnp.where(even, slot + EXPERTS - TOP_K, EXPERTS) + 0 * index
  if routing == 'adaptive':
    used = jax.random.randint(keys[1], (BATCH, LENGTH, 1), 2, TOP_K + 1)
    index = jnp.where(slot < used, index, EXPERTS)
  weight = jax.random.uniform(keys[2], index.shape, minval=0.1)
  weight = jnp.where(index < EXPERTS, weight, 0)
  return index, weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)


def operands(routing: str) -> tuple[jax.Array, ...]:
  """Tokens, choices, weights, three matrices and the sum's gradient."""
  keys = jax.random.split(jax.random.key(2), 5)
  wide, tall = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
  shapes = (BATCH, LENGTH, WIDTH), wide, wide, tall, (BATCH, LENGTH, WIDTH)
  x, wi_0, wi_1, wo, dy = map(jax.random.normal, keys, shapes)
  return x, *choices(routing), wi_0, wi_1, wo, dy


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

  Where the sizes that are announced do not agree it gives NaN.
  """
  rows, first, sent, there = (
    jax.lax.all_gather(z, axis_name)
    for z in (operand, input_offsets, send_sizes, output_offsets)
  )
  devices, total = sent.shape
  first, sent, there = (
    z.reshape(devices, devices, -1)[:, jax.lax.axis_index(axis_name)]
    for z in (first, sent, there)
  )
  place = jnp.arange(len(output))
  for source in range(devices):
    for update in range(total // devices):
      start = there[source, update]
      here = (place >= start) & (place < start + sent[source, update])
      index = place - start + first[source, update]
      index = jnp.clip(index, 0, len(operand) - 1)
      output = jnp.where(here[:, None], rows[source][index], output)
  agree = (sent.reshape(-1) == recv_sizes).all()
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
