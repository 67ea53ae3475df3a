"""Sorting tokens by group, in plain jnp: the specification."""

import jax
import jax.numpy as jnp

from pallas_kernels.permute import layout


def plan(
  index_MX: jax.Array, groups: int, align: int, rows: int | None = None
) -> layout.Plan:
  """See `pallas_kernels.permute.api.plan`."""
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
  positions = layout.positions(rows or slots, groups, align)
  safe_R = jnp.minimum(group_R, groups - 1)
  place_R = rank_R - dense_G[safe_R] + start_G[safe_R]
  place_R = jnp.where(group_R < groups, place_R, positions)
  position_P = jnp.arange(positions)
  group_P = jnp.searchsorted(start_G, position_P, side='right') - 1
  offset_P = position_P - start_G[group_P]
  sorted_P = jnp.minimum(dense_G[group_P] + offset_P, slots - 1)
  source_P = jnp.where(offset_P < sizes_G[group_P], order_R[sorted_P], slots)
  place_MX = place_R.reshape(index_MX.shape)
  return layout.Plan(sizes_G, start_G, place_MX, source_P)


def gather(
  x_MD: jax.Array, plan: layout.Plan, clear: int | None = None
) -> jax.Array:
  """Each position's token; zeros where there is none, whatever `clear`."""
  del clear
  token_P = plan.source_P // plan.place_MX.shape[1]
  return x_MD.at[token_P].get(mode='fill', fill_value=0)


def combine(
  y_PD: jax.Array, place_MX: jax.Array, weight_MX: jax.Array | None
) -> jax.Array:
  """Sum of each token's rows in float32, times weights if there are any."""
  y_MXD = y_PD.at[place_MX].get(mode='fill', fill_value=0)
  if weight_MX is None:
    return y_MXD.sum(1, dtype=jnp.float32).astype(y_PD.dtype)
  y_MD = jnp.einsum(
    'mxd,mx->md', y_MXD, weight_MX, preferred_element_type=jnp.float32
  )
  return y_MD.astype(y_PD.dtype)


def weight_gradient(
  y_PD: jax.Array, dy_MD: jax.Array, place_MX: jax.Array
) -> jax.Array:
  """float32 products of each token's rows with the gradient of their sum."""
  y_MXD = y_PD.at[place_MX].get(mode='fill', fill_value=0)
  return jnp.einsum(
    'mxd,md->mx', y_MXD, dy_MD, preferred_element_type=jnp.float32
  )


MOVES = layout.Moves(gather, combine, weight_gradient)
