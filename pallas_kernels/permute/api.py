"""Sorting tokens by expert and combining them again, by gathers only.

A row scatter costs TPUs and CPUs many times a gather, so both directions, and
both derivatives, gather through precomputed indices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def permute(
  x_MD: Float[Array, 'M D'],
  index_MX: Int[Array, 'M X'],
  groups: int,
  *,
  align: int = 1,
) -> Permuted:
  """Copies each token to the groups it chose, stably sorted by group.

  Args:
    x_MD: tokens.
    index_MX: chosen groups; values outside [0, groups) choose none.
    groups: number of groups G.
    align: every group starts at a multiple of this. P is the worst case
      M * X + G * (align - 1), rounded up to a multiple of `align`.
  """
  sizes_G, place_MX, source_P = _plan(index_MX, groups, align)
  x_PD = _gather(x_MD, source_P // index_MX.shape[1], place_MX)
  return Permuted(x_PD, sizes_G, place_MX, source_P)


def unpermute(
  y_PD: Float[Array, 'P D'],
  permuted: Permuted,
  weight_MX: Float[Array, 'M X'],
) -> Float[Array, 'M D']:
  """Weighted sum over each token's choices, accumulated in float32."""
  return _combine(y_PD, weight_MX, permuted.place_MX, permuted.source_P)


def _plan(index_MX, groups, align):
  """Sizes of the groups, and indices between tokens and sorted positions."""
  slots = index_MX.size
  valid_MX = (index_MX >= 0) & (index_MX < groups)
  group_R = jnp.where(valid_MX, index_MX, groups).reshape(-1)
  order_R = jnp.argsort(group_R, stable=True)
  rank_R = jnp.argsort(order_R)  # the inverse permutation
  sizes_G = (group_R[:, None] == jnp.arange(groups)[None]).sum(
    0, dtype=jnp.int32
  )
  padded_G = -(-sizes_G // align) * align
  start_G = jnp.cumsum(padded_G) - padded_G
  dense_G = jnp.cumsum(sizes_G) - sizes_G
  positions = -(-(slots + groups * (align - 1)) // align) * align
  safe_R = jnp.minimum(group_R, groups - 1)
  place_R = rank_R - dense_G[safe_R] + start_G[safe_R]
  place_R = jnp.where(group_R < groups, place_R, positions)
  position_P = jnp.arange(positions)
  group_P = jnp.searchsorted(start_G, position_P, side='right') - 1
  offset_P = position_P - start_G[group_P]
  sorted_P = jnp.minimum(dense_G[group_P] + offset_P, slots - 1)
  source_P = jnp.where(offset_P < sizes_G[group_P], order_R[sorted_P], slots)
  return sizes_G, place_R.reshape(index_MX.shape), source_P


@jax.custom_vjp
def _gather(x_MD, token_P, place_MX):
  return x_MD.at[token_P].get(mode='fill', fill_value=0)


def _gather_forward(x_MD, token_P, place_MX):
  return _gather(x_MD, token_P, place_MX), (place_MX,)


def _gather_backward(residuals, dx_PD):
  (place_MX,) = residuals
  dx_MXD = dx_PD.at[place_MX].get(mode='fill', fill_value=0)
  dx_MD = dx_MXD.sum(1, dtype=jnp.float32).astype(dx_PD.dtype)
  return dx_MD, None, None


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def _combine(y_PD, weight_MX, place_MX, source_P):
  y_MXD = y_PD.at[place_MX].get(mode='fill', fill_value=0)
  y_MD = jnp.einsum(
    'mxd,mx->md', y_MXD, weight_MX, preferred_element_type=jnp.float32
  )
  return y_MD.astype(y_PD.dtype)


def _combine_forward(y_PD, weight_MX, place_MX, source_P):
  residuals = (y_PD, weight_MX, place_MX, source_P)
  return _combine(y_PD, weight_MX, place_MX, source_P), residuals


def _combine_backward(residuals, dy_MD):
  y_PD, weight_MX, place_MX, source_P = residuals
  choices = weight_MX.shape[1]
  weight_P = weight_MX.reshape(-1).at[source_P].get(mode='fill', fill_value=0)
  dy_PD = dy_MD.at[source_P // choices].get(mode='fill', fill_value=0)
  y_MXD = y_PD.at[place_MX].get(mode='fill', fill_value=0)
  dweight_MX = jnp.einsum(
    'mxd,md->mx', y_MXD, dy_MD, preferred_element_type=jnp.float32
  )
  return (
    (dy_PD * weight_P[:, None]).astype(y_PD.dtype),
    dweight_MX.astype(weight_MX.dtype),
    None,
    None,
  )


_combine.defvjp(_combine_forward, _combine_backward)
