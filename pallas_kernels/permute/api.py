"""Sorting tokens by expert and combining them again, by copies only.

A row scatter that adds costs TPUs and CPUs many times a gather, so both
directions, and both derivatives, copy rows through precomputed indices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.permute import layout, mosaic_gpu, mosaic_tpu, xla

# On TPUs XLA sorts: there is no kernel of ours that places rows.
PLANS = {
  'mosaic_gpu': dispatch.narrow(mosaic_gpu.plan),
  'mosaic_tpu': xla.plan,
  'xla': xla.plan,
}
MOVES = {
  'mosaic_gpu': layout.of_kernels(mosaic_gpu.MOVES),
  'mosaic_tpu': layout.of_kernels(mosaic_tpu.MOVES),
  'xla': xla.MOVES,
}
Plan = layout.Plan


class Permuted(NamedTuple):
  """Rows sorted by group; group starts are multiples of the alignment.

  Attributes:
    x_PD: the rows; positions of no group are zero.
    sizes_G: rows of each group.
    place_MX: position of each (token, choice) in P, or P if it has no group.
    source_P: flat (token, choice) index m * X + x at each position, or M * X.
  """

  x_PD: Float[Array, 'P D']
  sizes_G: Int[Array, 'G']
  place_MX: Int[Array, 'M X']
  source_P: Int[Array, 'P']


def plan(
  index_MX: Int[Array, 'M X'],
  groups: int,
  *,
  align: int = 1,
  rows: int | None = None,
  impl: dispatch.Impl | None = None,
) -> Plan:
  """Where each token's choices go when they are stably sorted by group.

  Args:
    index_MX: chosen groups; values outside [0, groups) choose none.
    groups: number of groups G.
    align: every group starts at a multiple of this. P is the worst case
      rows + G * (align - 1), rounded up to a multiple of `align`.
    rows: choices that have a group, at the most; None = M * X. The caller
      answers for it: those past it would be lost.
    impl: backend; None picks the best for this platform.

  Raises:
    ValueError: choices that are no int[M, X]; no group, or `align` or `rows`
      below 1.
    NotImplementedError: a backend forced by name that cannot do this.
  """
  if index_MX.ndim != 2 or not jnp.issubdtype(index_MX.dtype, jnp.integer):
    raise ValueError(
      f'index is {index_MX.dtype}{list(index_MX.shape)}; expected int[M, X]'
    )
  # Of uint8, 256 groups would be none.
  index_MX = jnp.asarray(index_MX, jnp.int32)
  if min(groups, align, 1 if rows is None else rows) < 1:
    raise ValueError(f'{groups=}, {align=} and {rows=} must be positive')
  if not index_MX.size:
    none_G = jnp.zeros(groups, jnp.int32)
    places = layout.positions(rows or 0, groups, align)
    return Plan(none_G, none_G, index_MX, jnp.zeros(places, jnp.int32))
  refusals = {'mosaic_gpu': mosaic_gpu.plan_refusal(groups)}
  run = dispatch.pick('plan', impl, PLANS, refusals)
  found = run(index_MX, groups, align, rows)
  # XLA counts in int64 where JAX is told to; kernels read int32.
  return Plan(*(z.astype(jnp.int32) for z in found))


def gather(
  x_MD: Float[Array, 'M D'],
  plan: Plan,
  *,
  clear: int | None = None,
  impl: dispatch.Impl | None = None,
) -> Float[Array, 'P D']:
  """Copies each token to its places; positions of no group are zero.

  Args:
    x_MD: tokens.
    plan: their places.
    clear: how many of the positions after the last group have to be zero; what
      those that follow hold is not defined. None = all of them.
    impl: backend; None picks the best for this platform.

  Raises:
    ValueError: tokens that are not those of the plan.
    NotImplementedError: a backend forced by name that cannot do this, or a
      second derivative, which kernels do not have; XLA does.
  """
  x_MD = jnp.asarray(x_MD)
  _check_rows('x', x_MD, len(plan.place_MX), 'tokens')
  if not plan.place_MX.size:
    return jnp.zeros((len(plan.source_P), x_MD.shape[1]), x_MD.dtype)
  return _gather(_moves('gather', x_MD, plan, impl), clear, x_MD, plan)


def combine(
  y_PD: Float[Array, 'P D'],
  plan: Plan | Permuted,
  weight_MX: Float[Array, 'M X'],
  *,
  impl: dispatch.Impl | None = None,
) -> Float[Array, 'M D']:
  """Weighted sum over each token's choices, accumulated in float32.

  Args:
    y_PD: rows where `plan` put them.
    plan: their places.
    weight_MX: what each choice counts.
    impl: backend; None picks the best for this platform.

  Returns:
    Sums in the dtype of the rows; choices of no group add nothing.

  Raises:
    ValueError: rows or weights that are not those of the plan.
    NotImplementedError: a backend forced by name that cannot do this, or a
      second derivative, which kernels do not have; XLA does.
  """
  y_PD, weight_MX = jnp.asarray(y_PD), jnp.asarray(weight_MX)
  _check_rows('y', y_PD, len(plan.source_P), 'positions')
  if weight_MX.shape != plan.place_MX.shape:
    raise ValueError(
      f'weight {weight_MX.shape} must have one entry for each choice of the '
      f'plan, {plan.place_MX.shape}'
    )
  if not plan.place_MX.size:
    return jnp.zeros((len(plan.place_MX), y_PD.shape[1]), y_PD.dtype)
  moves = _moves('combine', y_PD, plan, impl)
  return _combine(moves, y_PD, weight_MX, plan.place_MX, plan.source_P)


def permute(
  x_MD: Float[Array, 'M D'],
  index_MX: Int[Array, 'M X'],
  groups: int,
  *,
  align: int = 1,
  rows: int | None = None,
  impl: dispatch.Impl | None = None,
) -> Permuted:
  """Copies each token to the groups it chose: `plan`, then `gather`.

  See them for arguments and errors.
  """
  where = plan(index_MX, groups, align=align, rows=rows, impl=impl)
  x_PD = gather(x_MD, where, impl=impl)
  return Permuted(x_PD, where.sizes_G, where.place_MX, where.source_P)


def unpermute(
  y_PD: Float[Array, 'P D'],
  permuted: Permuted,
  weight_MX: Float[Array, 'M X'],
  *,
  impl: dispatch.Impl | None = None,
) -> Float[Array, 'M D']:
  """Weighted sum over each token's choices: see `combine`."""
  return combine(y_PD, permuted, weight_MX, impl=impl)


def _check_rows(name: str, z: jax.Array, count: int, kind: str) -> None:
  if z.ndim != 2 or len(z) != count:
    raise ValueError(
      f'{name} is {list(z.shape)}; the plan is of {count} {kind}, one row each'
    )


def _moves(operation, z, plan, impl) -> layout.Moves:
  width = z.shape[1]
  refusals = {
    'mosaic_gpu': mosaic_gpu.rows_refusal(z.dtype, width),
    'mosaic_tpu': mosaic_tpu.refusal(z.dtype, width),
  }
  return dispatch.pick(operation, impl, MOVES, refusals)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(moves, clear, x_MD, plan):
  return moves.gather(x_MD, plan, clear)


def _gather_forward(moves, clear, x_MD, plan):
  return moves.gather(x_MD, plan, clear), plan.place_MX


def _gather_backward(moves, clear, place_MX, dx_PD):
  del clear
  return moves.combine(dx_PD, place_MX, None), None


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(moves, y_PD, weight_MX, place_MX, source_P):
  return moves.combine(y_PD, place_MX, weight_MX)


def _combine_forward(moves, y_PD, weight_MX, place_MX, source_P):
  y_MD = moves.combine(y_PD, place_MX, weight_MX)
  return y_MD, (y_PD, weight_MX, place_MX, source_P)


def _combine_backward(moves, residuals, dy_MD):
  y_PD, weight_MX, place_MX, source_P = residuals
  choices = weight_MX.shape[1]
  weight_P = weight_MX.reshape(-1).at[source_P].get(mode='fill', fill_value=0)
  dy_PD = dy_MD.at[source_P // choices].get(mode='fill', fill_value=0)
  dweight_MX = moves.weight_gradient(y_PD, dy_MD, place_MX)
  return (
    (dy_PD * weight_P[:, None]).astype(y_PD.dtype),
    dweight_MX.astype(weight_MX.dtype),
    None,
    None,
  )


_combine.defvjp(_combine_forward, _combine_backward)
