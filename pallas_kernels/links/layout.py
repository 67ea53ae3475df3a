"""What a backend provides that moves rows between devices."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Links(NamedTuple):
  """How a backend reaches the other devices of an axis, inside `shard_map`.

  N devices hold M tokens each; those of device d are rows [d * M, (d + 1) * M)
  of what is gathered. Neither has a derivative of its own.

  Attributes:
    gather: (axis, *arrays) -> the arrays of all devices, [M, ...] to
      [N * M, ...].
    combine: (axis, y_PD, plan, weight_MX) -> y_MD of this device's tokens. Plan
      and weights are of N * M tokens, as `permute.combine` takes them; what a
      device makes of another's token is rounded to the dtype of the rows.
  """

  gather: Callable[..., tuple[jax.Array, ...]]
  combine: Callable[..., jax.Array]
