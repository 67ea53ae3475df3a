"""Expert parallelism: one `shard_map` around the routed feed-forward layer.

Strategies, all of them dropless:

  gather    every device of the `expert` axis sees all tokens of its peers
            (all-gather), computes the rows that chose its own experts, and
            gives the partial sums back (reduce-scatter). It runs on every
            platform and is the oracle of the others.
  exchange  a token's row goes once to each device with an expert it chose
            (`all_to_all` over buffers of fixed size; see `exchange.py`).
  ragged    the same, but only what the buffers hold (`ragged_all_to_all`):
            TPUs and GPUs.
  direct    `gather` by kernels of ours, which write rows straight into the
            other devices' memory: Hopper GPUs of one process, in a mesh of all
            of them. `auto` knows it of two, where it has run.

`auto` asks the cost model (`cost.py`, which also has each one's bytes). With M
tokens a device, width D and n devices on the axis, the bytes that a device
receives forward, and again backward, are 2 * (n - 1) * M * D * itemsize for
`gather` and `direct`; `exchange` and `ragged` replace (n - 1) * M by the copies
between devices, at most min(n - 1, X) * M, the former with some room to spare.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from m2.parallel import cost, exchange, sharding
from pallas_kernels import dispatch
from pallas_kernels.experts import api as expert_kernels


def expert_parallel(
  x_BTD: jax.Array,
  routing: pallas_kernels.Routing,
  wi_0_EDF: jax.Array,
  wi_1_EDF: jax.Array,
  wo_EFD: jax.Array,
  *,
  strategy: str = 'auto',
  chunks: int = 0,
  most: Callable[[int, int], int] | None = None,
  impl: dispatch.Impl | None = None,
) -> jax.Array:
  """Sum over each token's experts of weight * SwiGLU expert.

  Args:
    x_BTD: tokens, split over the batch axes and `context`.
    routing: chosen experts and weights of each token, both [B, T, X]. A
      token's experts are distinct; values outside [0, E) choose none.
    wi_0_EDF: gate projections (w1 of the public checkpoint).
    wi_1_EDF: up projections (w3).
    wo_EFD: down projections (w2).
    strategy: how tokens reach their experts, auto, direct or one of
      `cost.STRATEGIES`; one that is named never falls back to another. With
      one device on the axis there is nothing to choose.
    chunks: most equal slices of a device's tokens, whose communication and
      products overlap: the largest number up to it that divides the tokens; 0
      leaves it to the cost model.
    most: (tokens, experts) -> the most choices that so many tokens have of so
      many experts, for which room is made; None is all of the tokens'. The
      cost model, `exchange` and `ragged` go by all slots, used or not.
    impl: kernel backend.

  Returns:
    y_BTD in the dtype of `x_BTD`, sharded like it.

  Raises:
    ValueError: an unknown strategy; negative chunks.
    NotImplementedError: `ragged` on a platform whose XLA does not have it;
      `direct` where its kernels cannot run.
  """
  if strategy != 'auto' and strategy not in STRATEGIES:
    known = ', '.join(('auto', *STRATEGIES))
    raise ValueError(f'{strategy=}: choose one of {known}')
  if chunks < 0:
    raise ValueError(f'{chunks=} must not be negative; 0 leaves it open')
  stored = [
    ('expert', 'embed', 'ffn'),
    ('expert', 'embed', 'ffn'),
    ('expert', 'ffn', 'embed'),
  ]

  def run(x_MD, index_MX, weight_MX, *weights):
    # FSDP: all-gather of this device's experts, 3 * E * D * F weights.
    weights = [sharding.gathered(w, *axes) for w, axes in zip(weights, stored)]
    return _local(
      x_MD, index_MX, weight_MX, *weights,
      strategy=strategy, chunks=chunks, most=most, impl=impl,
    )  # fmt: skip

  matrices = wi_0_EDF, wi_1_EDF, wo_EFD
  return on_tokens(run, x_BTD, routing, matrices, stored)


def on_tokens(
  run: Callable[..., jax.Array],
  x_BTD: jax.Array,
  routing: pallas_kernels.Routing,
  matrices: Sequence[Any],
  stored: Sequence[Sequence[str | None]],
) -> jax.Array:
  """Runs a layer on each device's own tokens and part of the matrices.

  Args:
    run: (x_MD, index_MX, weight_MX, *matrices) -> y_MD, of local blocks.
    x_BTD: tokens, split over the batch axes and `context`.
    routing: chosen experts and weights of each token, both [B, T, X].
    matrices: of all experts; each may be a tree.
    stored: logical axes of each.

  Returns:
    y_BTD, sharded like `x_BTD`.
  """
  rows = sharding.spec('batch', 'sequence', None)

  def local(x_BTD, index_BTX, weight_BTX, *matrices):
    tokens = (
      z.reshape(-1, z.shape[-1]) for z in (x_BTD, index_BTX, weight_BTX)
    )
    return run(*tokens, *matrices).reshape(x_BTD.shape)

  specs = rows, rows, rows, *(sharding.spec(*axes) for axes in stored)
  return sharding.manual(local, specs, rows)(x_BTD, *routing, *matrices)


def _local(
  x_MD, index_MX, weight_MX, wi_0_EDF, wi_1_EDF, wo_EFD,
  *, strategy, chunks, most, impl,
):  # fmt: skip
  """What one device does; sums over the `tensor` axis at the end."""
  weights = wi_0_EDF, wi_1_EDF, wo_EFD
  sizes = sharding.axis_sizes()
  alone = functools.partial(
    pallas_kernels.experts, rows=_rows(most, index_MX, wi_0_EDF), impl=impl
  )
  if not sizes:
    return alone(x_MD, index_MX, weight_MX, *weights)
  # Every operand differs over every axis from here on, so that custom
  # derivatives inside see one kind of value; the transposes sum for us.
  tokens = [sharding.varying(x) for x in (x_MD, index_MX, weight_MX)]
  weights = [sharding.varying(w) for w in weights]
  if sizes['expert'] == 1:  # nothing to choose: all experts are here
    y_MD = alone(*tokens, *weights)
  else:
    layer = cost.Layer.of(x_MD, index_MX, wi_0_EDF, sizes['expert'])
    named = strategy == 'direct'
    refusal = _direct_refusal(x_MD.dtype, layer, impl, named)
    every = cost.STRATEGIES if refusal else cost.WITH_DIRECT
    strategies = every if strategy == 'auto' else (strategy,)
    strategy, chunks = _choose(strategies, chunks, layer, refusal)
    run = functools.partial(STRATEGIES[strategy], chunks, most, impl=impl)
    y_MD = run(*tokens, *weights)
  return jax.lax.psum(y_MD, 'tensor')


def _direct_refusal(dtype, layer: cost.Layer, impl, named: bool) -> str | None:
  """Why `direct` cannot run this layer, or None."""
  platform, kind = _device()
  if platform != 'gpu':
    return f'needs Hopper GPUs, not {kind}'
  if impl not in (None, 'mosaic_gpu'):
    return f'is of mosaic_gpu, not of {impl}'
  return expert_kernels.split_refusal(
    dtype, (layer.width, layer.hidden), named=named
  )


def _choose(
  strategies: Sequence[str],
  chunks: int,
  layer: cost.Layer,
  refusal: str | None,
) -> tuple[str, int]:
  """What is asked for, checked, and what is left open by the cost model.

  Args:
    strategies: to choose from; one that is named is alone.
    chunks: as `expert_parallel` takes them.
    layer: the layer.
    refusal: why `direct` cannot run it, or None.
  """
  platform, kind = _device()
  if strategies == ('ragged',) and platform == 'cpu':
    raise NotImplementedError(
      "strategy='ragged' needs ragged_all_to_all, which XLA does not have on "
      "CPUs; use 'exchange', which sends the same rows, or 'auto'"
    )
  if strategies == ('direct',) and refusal:
    raise NotImplementedError(
      f"strategy='direct' {refusal}; use 'gather', which sends the same rows "
      "by XLA's collectives, or 'auto'"
    )
  choice = cost.choose(
    layer,
    kind,
    strategies=strategies,
    chunks=cost.slices(layer.tokens, chunks),
  )
  _announce(layer, kind, choice)
  return choice.strategy, choice.chunks


def _device() -> tuple[str, str]:
  """Platform and kind of the mesh's devices, which need not be here."""
  device = dispatch.device()
  return device.platform, device.device_kind


@functools.cache
def _announce(layer: cost.Layer, kind: str, choice: cost.Choice) -> None:
  """Says once for each shape of layer what was chosen and why."""
  if jax.process_index() == 0:
    print(
      f'experts over {layer.devices} x {kind}, {layer.tokens} tokens each: '
      f'{choice.strategy}, chunks {choice.chunks} ({choice.reason})',
      flush=True,
    )


def _rows(most, index_MX, w_EDF, devices: int = 1) -> int | None:
  """Room for choices that the tokens of so many have here; None = all."""
  if most is None:
    return None
  slots = devices * index_MX.size
  return min(most(devices * len(index_MX), len(w_EDF)), slots)


def _gather(chunks, most, x_MD, index_MX, weight_MX, *weights, impl):
  def layer(x_MD, index_MX, weight_MX):
    rows = _rows(most, index_MX, weights[0])
    return exchange.layer(
      x_MD, index_MX, weight_MX, *weights, rows=rows, impl=impl
    )

  return gather(layer, weights[0].shape[0], chunks, x_MD, index_MX, weight_MX)


def gather(
  layer: Callable[..., jax.Array],
  held: int,
  chunks: int,
  x_MD: jax.Array,
  index_MX: jax.Array,
  weight_MX: jax.Array,
) -> jax.Array:
  """Strategy `gather`, inside `shard_map`.

  Args:
    layer: (x, index, weight) of tokens -> sums over this device's experts.
    held: how many those are.
    chunks: slices of the tokens; divides M.
    x_MD: this device's tokens.
    index_MX: chosen experts of all devices.
    weight_MX: mixing weights.
  """
  first = jax.lax.axis_index('expert') * held
  rows = []
  for part in zip(*(jnp.split(z, chunks) for z in (x_MD, index_MX, weight_MX))):
    # all-gather over 'expert': (n - 1) * M * D * itemsize in.
    x_MD, index_MX, weight_MX = (
      jax.lax.all_gather(z, 'expert', axis=0, tiled=True) for z in part
    )
    # Experts of other devices are outside [0, E): they contribute nothing.
    y_MD = layer(x_MD, index_MX - first, weight_MX)
    # reduce-scatter over 'expert': (n - 1) * M * D * itemsize in.
    rows.append(
      jax.lax.psum_scatter(y_MD, 'expert', scatter_dimension=0, tiled=True)
    )
  return jnp.concatenate(rows)


def _direct(chunks, most, x_MD, index_MX, weight_MX, *weights, impl):
  devices, rows = sharding.axis_sizes()['expert'], []
  for part in zip(*(jnp.split(z, chunks) for z in (x_MD, index_MX, weight_MX))):
    room = _rows(most, part[1], weights[0], devices)
    run = functools.partial(exchange.layer, rows=room, axis='expert')
    rows.append(run(*part, *weights, impl=impl or 'mosaic_gpu'))
  return jnp.concatenate(rows)


def _exchange(transport, chunks, most, *operands, impl):
  del most  # its rooms go by the slots
  return exchange.run(transport, chunks, *operands, impl=impl)


STRATEGIES = {
  'gather': _gather,
  'direct': _direct,
  'exchange': functools.partial(_exchange, 'exchange'),
  'ragged': functools.partial(_exchange, 'ragged'),
}
