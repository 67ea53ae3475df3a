"""Rows to and from the other devices by XLA's collectives."""

import jax

from pallas_kernels.links import layout
from pallas_kernels.permute import api as permute


def gather(axis: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """See `layout.Links`."""
  return tuple(jax.lax.all_gather(x, axis, tiled=True) for x in arrays)


def combine(
  axis: str, y_PD: jax.Array, plan: permute.Plan, weight_MX: jax.Array
) -> jax.Array:
  """See `layout.Links`; the devices' sums are added as XLA adds them."""
  y_MD = permute.combine(y_PD, plan, weight_MX)
  return jax.lax.psum_scatter(y_MD, axis, scatter_dimension=0, tiled=True)


LINKS = layout.Links(gather, combine)
