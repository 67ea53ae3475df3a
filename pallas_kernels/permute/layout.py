"""Where sorted rows lie, and what a backend that moves them provides."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Int

from pallas_kernels import dispatch


class Plan(NamedTuple):
  """Where each (token, choice) goes; starts are multiples of the alignment.

  All int32.

  Attributes:
    sizes_G: rows of each group.
    start_G: first position of each group.
    place_MX: position of each (token, choice) in P, or P if it has no group.
    source_P: flat (token, choice) index m * X + x at each position, or M * X.
  """

  sizes_G: Int[Array, 'G']
  start_G: Int[Array, 'G']
  place_MX: Int[Array, 'M X']
  source_P: Int[Array, 'P']


class Moves(NamedTuple):
  """How a backend moves rows.

  Attributes:
    gather: (x_MD, plan, clear) -> x_PD. Positions of no token are zero; of
      those after the last group at least `clear`, None = all of them.
    combine: (y_PD, place_MX, weight_MX) -> y_MD, summed in float32; weights
      None are 1, and place P is a row of zeros.
    weight_gradient: (y_PD, dy_MD, place_MX) -> float32[M, X], the product of
      each of the rows with its token's.
  """

  gather: Callable[[jax.Array, Plan, int | None], jax.Array]
  combine: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
  weight_gradient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def of_kernels(moves: Moves) -> Moves:
  """`moves` as kernels need it: see `dispatch.narrow` and `underivable`."""
  names = 'gather', 'combine', 'combine'
  return Moves(
    *(
      dispatch.underivable(name, dispatch.narrow(move))
      for name, move in zip(names, moves)
    )
  )


def positions(slots: int, groups: int, align: int) -> int:
  """P: the worst case, where the last `align` rows of each group hold one."""
  return -(-(slots + groups * (align - 1)) // align) * align
