"""Sharding as one table: leaf name -> logical axes -> mesh axes.

A leaf that is not in `AXES` is an error, and so is a mesh axis used twice or a
dimension that does not divide. Functions here do nothing where no mesh is set,
so that the model also runs on one device with plain arrays.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from m2.parallel import order

# Logical axes of each parameter, by the last name of its path, or last two.
AXES: dict[str, tuple[str | None, ...]] = {
  'embed': ('vocab', 'embed'),
  'head': ('embed', 'vocab'),
  'final_norm': (None,),
  'norm': ('layer', None),
  'q': ('layer', 'embed', 'heads', None),
  'k': ('layer', 'embed', 'kv_heads', None),
  'v': ('layer', 'embed', 'kv_heads', None),
  'o': ('layer', 'heads', None, 'embed'),
  'q_norm': ('layer', 'heads', None),
  'k_norm': ('layer', 'kv_heads', None),
  'gate': ('layer', 'embed', None),
  'bias': ('layer', None),
  'wi_0': ('layer', 'expert', 'embed', 'ffn'),
  'wi_1': ('layer', 'expert', 'embed', 'ffn'),
  'wo': ('layer', 'expert', 'ffn', 'embed'),
  # Block-FP8: (out, in), each matrix with the scales of its blocks.
  'wi_0/values': ('layer', 'expert', 'ffn', 'embed'),
  'wi_0/scale_inv': ('layer', 'expert', 'ffn', 'embed'),
  'wi_1/values': ('layer', 'expert', 'ffn', 'embed'),
  'wi_1/scale_inv': ('layer', 'expert', 'ffn', 'embed'),
  'wo/values': ('layer', 'expert', 'embed', 'ffn'),
  'wo/scale_inv': ('layer', 'expert', 'embed', 'ffn'),
  'enorm': ('layer', None),
  'hnorm': ('layer', None),
  'proj': ('layer', 'embed', None),
}

# Logical axis -> mesh axes. Weights are stored split over `fsdp` and `context`
# and gathered before use. Rows of the batch are split over the axes of `batch`,
# the tokens of each row over `context`; `tensor` sees the same tokens.
RULES: dict[str, str | tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'sequence': 'context',
  # `tensor` first: gathered over `expert`, a part of the vocabulary is a range.
  'vocab': ('tensor', 'expert'),
  'embed': ('fsdp', 'context'),
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'ffn': 'tensor',
  'expert': 'expert',
}


def name_of(path: tuple) -> str:
  """A leaf's path as text: `params/blocks/attn/q`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def stacked(name: str) -> int:
  """How many axes, layer and expert, lead to the matrices of a parameter."""
  axes = AXES[name.rsplit('/', 1)[-1]]
  return sum(axis in ('layer', 'expert') for axis in axes)


def spec(*axes: str | None, rules: Mapping[str, Any] = RULES) -> P:
  """The partition of an array whose dimensions have these logical axes."""
  return P(*(rules.get(axis) if axis else None for axis in axes))


def active() -> bool:
  """Whether a mesh is set (`jax.set_mesh`) and it is not manual already."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and not mesh.are_all_axes_manual


def row_ways(sizes: Mapping[str, int]) -> int:
  """Over how many devices a mesh of these axis sizes splits the rows."""
  return math.prod(sizes[axis] for axis in RULES['batch'])


def check_rows(rows: int) -> None:
  """Refuses a batch that the mesh cannot share out evenly.

  Raises:
    ValueError: names the rows and what they must be a multiple of.
  """
  if not active():
    return
  ways = row_ways(jax.sharding.get_abstract_mesh().shape)
  if rows % ways:
    raise ValueError(
      f'{rows} rows are not a multiple of the {ways} devices that rows are '
      'split over (mesh data * fsdp * expert): pad the batch or set other axes'
    )


def place(x: jax.Array, *axes: str | None) -> jax.Array:
  """Moves `x` to the sharding of these logical axes."""
  return jax.sharding.reshard(x, spec(*axes)) if active() else x


def einsum(
  equation: str, *operands: jax.Array, out: Sequence[str | None], **kwargs
) -> jax.Array:
  """`jnp.einsum` whose result has the sharding of the logical axes `out`."""
  if active():
    kwargs['out_sharding'] = spec(*out)
  return jax.numpy.einsum(equation, *operands, **kwargs)


def manual(function: Callable, in_specs: Sequence[P], out_specs: Any):
  """Runs `function` on the local blocks of its arguments (`shard_map`).

  Arguments are first moved to `in_specs`; without a mesh the function simply
  runs. Inside, collectives must be guarded by `axis_sizes()`.
  """

  @functools.wraps(function)
  def wrapped(*args):
    if not active():
      return function(*args)
    placed = [
      jax.tree.map(_move, s, arg, is_leaf=lambda x: isinstance(x, P))
      for arg, s in zip(args, in_specs, strict=True)
    ]
    return jax.shard_map(
      function, in_specs=tuple(in_specs), out_specs=out_specs
    )(*order.together(placed))

  return wrapped


def _move(where: P, part: Any) -> Any:
  return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, where), part)


def project(
  equation: str,
  x: jax.Array,
  weight: jax.Array,
  *,
  axes: tuple[Sequence[str | None], Sequence[str | None]],
  out: Sequence[str | None],
  **kwargs,
) -> jax.Array:
  """`jnp.einsum` of activations and a stored weight.

  The weight is gathered where it is used, so that its gradient comes back by
  reduce-scatter (`gathered`); sums over split dimensions are completed.

  Args:
    equation: of `x` and `weight`.
    x: activations.
    weight: as stored.
    axes: logical axes of both.
    out: logical axes of the result.
    **kwargs: of `jnp.einsum`.
  """

  def local(x, weight):
    reach = jax.typeof(x).mat.varying if axis_sizes() else ()
    weight = gathered(weight, *axes[1], over=reach)
    y = jax.numpy.einsum(equation, x, weight, **kwargs)
    return total(y, out)

  return manual(local, [spec(*one) for one in axes], spec(*out))(x, weight)


def gathered(
  weight: jax.Array, *axes: str | None, over: Iterable[str] | None = None
) -> jax.Array:
  """A weight as it is used, from the block stored here; inside `manual`.

  all-gather of its `embed` and `vocab` dimensions over their mesh axes but
  `tensor`; its transpose is the reduce-scatter of the gradient, and the sum
  over axes that hold copies then is of the scattered part.

  Args:
    weight: this device's block.
    axes: logical axes of its dimensions.
    over: mesh axes over which its use differs; None is all.
  """
  sizes = axis_sizes()
  if not sizes:
    return weight
  weight = varying(weight, over)
  for dim, axis in enumerate(axes):
    if axis in ('embed', 'vocab'):
      names = [name for name in mesh_axes(axis) if name != 'tensor']
      names = tuple(name for name in names if sizes[name] > 1)
      if names:
        weight = jax.lax.all_gather(weight, names, axis=dim, tiled=True)
  return weight


def total(x: jax.Array, out: Sequence[str | None]) -> jax.Array:
  """Sums over the mesh axes along which `x` differs and `out` does not."""
  if not axis_sizes():
    return x
  kept = {name for axis in out if axis for name in mesh_axes(axis)}
  axes = tuple(a for a in axis_sizes() if a in jax.typeof(x).mat.varying - kept)
  return jax.lax.psum(x, axes) if axes else x


def mesh_axes(axis: str) -> tuple[str, ...]:
  """The mesh axes of a logical axis, major first."""
  names = RULES[axis]
  return (names,) if isinstance(names, str) else names


def axis_sizes() -> Mapping[str, int]:
  """Mesh axis sizes, empty without a mesh."""
  return dict(jax.sharding.get_abstract_mesh().shape)


def varying(x: jax.Array, over: Iterable[str] | None = None) -> jax.Array:
  """Marks a value as differing over mesh axes, all if None, inside `manual`.

  Its transpose sums the gradient over the axes that held copies.
  """
  wanted = axis_sizes() if over is None else over
  axes = tuple(a for a in wanted if a not in jax.typeof(x).mat.varying)
  return jax.lax.pcast(x, axes, to='varying') if axes else x


def param_shardings(
  abstract: Any, mesh: Mesh, rules: Mapping[str, Any] = RULES
) -> Any:
  """The sharding of every parameter.

  Args:
    abstract: pytree of arrays or shapes; a leaf's last key names it.
    mesh: the device mesh.
    rules: logical axis -> mesh axes.

  Raises:
    ValueError: leaves that are not in `AXES`, have another rank, use a mesh
      axis twice, or do not divide; all of them are listed.
  """
  errors: list[str] = []

  def one(path, leaf):
    name = name_of(path)
    last = name.rsplit('/', 2)
    axes = AXES.get('/'.join(last[-2:])) or AXES.get(last[-1])
    if axes is None:
      errors.append(f'{name}: no line in m2.parallel.sharding.AXES')
      return NamedSharding(mesh, P())
    if len(axes) != len(leaf.shape):
      errors.append(f'{name}: shape {leaf.shape} but axes {axes}')
      return NamedSharding(mesh, P())
    partition = spec(*axes, rules=rules)
    _check_partition(name, leaf.shape, partition, mesh, errors)
    return NamedSharding(mesh, partition)

  shardings = jax.tree_util.tree_map_with_path(one, abstract)
  if errors:
    raise ValueError('sharding: ' + '; '.join(errors))
  return shardings


def _check_partition(name, shape, partition, mesh, errors) -> None:
  used: list[str] = []
  for size, entry in zip(shape, partition):
    axes = (entry,) if isinstance(entry, str) else entry or ()
    ways = 1
    for axis in axes:
      ways *= mesh.shape[axis]
      used.append(axis)
    if size % ways:
      errors.append(
        f'{name}: dimension {size} does not divide over {axes} ({ways} ways)'
      )
  if len(set(used)) < len(used):
    errors.append(f'{name}: {partition} uses a mesh axis twice')


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Arrays [B, T, ...]: rows over the batch axes, tokens over `context`."""
  return NamedSharding(mesh, spec('batch', 'sequence'))
