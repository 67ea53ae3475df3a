"""The expert layers of others, for `tests/bench/moe.py`.

Each takes the same tokens, choices and weights, and matrices in the order in
memory that it wants. Those of packages take part where they are installed.
"""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import torch

NAMES = ('torch.compile', 'liger', 'sonic', 'tokamax')  # beside torch
COMPILED = (8192, 32768)  # tokens at which torch.compile takes part, E 256
MOST_LIGER = 8192  # tokens: beyond, its copies of the matrices leave no room
# Contender -> its module and its package.
PACKAGES = {
  'liger': ('liger_kernel', 'liger_kernel'),
  'sonic': ('sonicmoe', 'sonic-moe'),
  'tokamax': ('tokamax', 'tokamax'),
}


def installed(wanted: Collection[str]) -> dict[str, str]:
  """Those of the peers that need a package and have it -> its version."""
  return {
    name: importlib.metadata.version(package)
    for name, (module, package) in PACKAGES.items()
    if name in wanted and importlib.util.find_spec(module)
  }


def tokamax(x, index, weight, wi_0, wi_1, wo):
  """Tokamax's ragged product with plain glue around it, in JAX."""
  import tokamax

  # On the way it sets Triton's cache folder to '', which PyTorch cannot make.
  os.environ.pop('TRITON_CACHE_DIR', None)
  choices = index.shape[1]
  order = jnp.argsort(index.reshape(-1), stable=True)
  sizes = jnp.bincount(index.reshape(-1), length=wi_0.shape[0])
  groups = tokamax.RaggedDotGroupSizes(sizes, index.size)
  product = functools.partial(tokamax.ragged_dot, group_sizes=groups)
  rows = x[order // choices]
  act = jax.nn.silu(product(rows, wi_0)) * product(rows, wi_1)
  y = product(act, wo)
  back = jnp.argsort(order).reshape(index.shape)
  return (y[back] * weight[..., None].astype(y.dtype)).sum(1)


def plain(x, index, weight, w13, wo):
  """A layer as PyTorch users write it; w13 is [E, D, 2F]."""
  flat = index.reshape(-1)
  order = torch.argsort(flat, stable=True)
  sizes = torch.bincount(flat, minlength=len(wo))
  offsets = torch.cumsum(sizes, 0).int()
  rows = x[order // index.shape[1]]
  gate, up = torch.nn.functional.grouped_mm(rows, w13, offs=offsets).chunk(2, 1)
  act = torch.nn.functional.silu(gate) * up
  y = torch.nn.functional.grouped_mm(act, wo, offs=offsets)
  back = torch.empty_like(order)
  back[order] = torch.arange(len(order), device=order.device)
  y = y[back].view(*index.shape, -1)
  return (y * weight[..., None].to(y.dtype)).sum(1)


def liger(x, index, weight, w13, wo):
  """Liger's fused layer; its matrices are [E, 2F, D] and [E, D, F]."""
  from liger_kernel.ops import fused_moe

  return fused_moe.LigerFusedMoEFunction.apply(x, w13, wo, index, weight)


def sonic(x, index, weight, w13, wo):
  """SonicMoE's fused layer after its router (arXiv 2512.14080).

  Its matrices are [2F, D, E], gate and up in turns, and [D, F, E], of which the
  last axis is the slowest. Its products choose their tiles when they first
  meet a shape, which takes minutes.
  """
  from sonicmoe import enums, functional

  tokens, choices = index.shape
  slots, experts = index.numel(), wo.shape[-1]
  place = functools.partial(torch.empty, dtype=torch.int32, device=x.device)
  sizes, offsets = place(experts), place(experts + 1)
  token, order, back = place(slots), place(slots), place(slots)
  functional.TC_topk_router_metadata_triton(
    index, experts, sizes, offsets, token, order, back
  )
  kind = enums.ActivationType.SWIGLU
  act, pre = functional._UpProjection.apply(
    x, w13, None, offsets, slots, choices, token, order, back, None, False,
    kind, not torch.is_grad_enabled(), False,
  )  # fmt: skip
  return functional._DownProjection.apply(
    act, pre, wo, None, weight, offsets, tokens, choices, token, order, back,
    None, False, kind,
  )  # fmt: skip


def calls(
  arrays: Mapping[str, jax.Array], wanted: Collection[str], *, compiled: bool
) -> dict[tuple[str, str], Callable]:
  """(name, forward, both or saved) -> call, of PyTorch's contenders.

  Args:
    arrays: what `tests.bench.moe.operands` gives.
    wanted: contenders beside `torch`.
    compiled: whether `torch.compile` may take part.
  """
  tensors = {name: torch.from_dlpack(array) for name, array in arrays.items()}
  x, index, weight = (tensors[name] for name in ('x', 'index', 'weight'))
  w0, w1, wo = (tensors[name] for name in ('wi_0', 'wi_1', 'wo'))
  w13 = torch.cat([w0, w1], 2)
  layers = {'torch': (plain, w13, wo)}
  if compiled and 'torch.compile' in wanted:
    layers['torch.compile'] = torch.compile(plain, dynamic=False), w13, wo
  if 'liger' in wanted and len(x) <= MOST_LIGER:
    own = (z.transpose(1, 2).contiguous() for z in (w13, wo))
    layers['liger'] = liger, *own
  if 'sonic' in wanted:
    pairs = torch.stack([w0.transpose(1, 2), w1.transpose(1, 2)], 2)
    own = (
      pairs.reshape(len(wo), -1, x.shape[1]),
      wo.transpose(1, 2).contiguous(),
    )
    layers['sonic'] = sonic, *(z.permute(1, 2, 0) for z in own)

  def forward(layer, *ws):
    with torch.no_grad():
      return layer(x, index, weight, *ws)

  def both(layer, *ws):
    y = layer(x, index, weight, *ws)
    return y, *torch.autograd.grad(y, (x, weight, *ws), tensors['dy'])

  found = {}
  for name, (layer, *ws) in layers.items():
    leaves = [x, weight, *ws]
    for leaf in leaves:
      leaf.requires_grad_()
    found[name, 'forward'] = functools.partial(forward, layer, *ws)
    found[name, 'both'] = functools.partial(both, layer, *ws)
    found[name, 'saved'] = functools.partial(
      _saved, functools.partial(layer, x, index, weight, *ws), leaves
    )
  return found


def _saved(layer: Callable, leaves) -> int:
  """Bytes that a layer keeps for its backward pass beside its operands."""
  kept = {}
  own = {leaf.untyped_storage().data_ptr() for leaf in leaves}

  def pack(tensor):
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in own:
      kept[storage.data_ptr()] = storage.nbytes()
    return tensor

  with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
    layer()
  return sum(kept.values())
