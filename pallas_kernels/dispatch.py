"""Which backend runs an operation: asked for by name, or the best that can."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Literal

import jax

Impl = Literal['mosaic_tpu', 'mosaic_gpu', 'triton', 'xla']

# Order of preference on each platform.
PREFERRED = {
  'tpu': ('mosaic_tpu', 'xla'),
  'gpu': ('mosaic_gpu', 'xla'),
  'cpu': ('xla',),
}


def pick(
  operation: str, impl: Impl | None, table: Mapping[str, Callable]
) -> Callable:
  """Returns the backend function of `operation`.

  Args:
    operation: its name, for messages.
    impl: a backend by name, or None for the best available on this platform.
    table: backend name -> function, all with the same signature.

  Raises:
    NotImplementedError: a backend asked for by name does not exist here; a
      forced backend never falls back to another.
  """
  if impl == 'triton':
    raise NotImplementedError(
      f'{operation}: Pallas on Triton is deprecated since JAX 0.11 and not '
      "supported; use impl='mosaic_gpu' or 'xla'"
    )
  if impl is not None:
    if impl not in table:
      raise NotImplementedError(
        f'{operation}: no backend {impl!r}; there are {", ".join(table)}'
      )
    return table[impl]
  platform = jax.default_backend()
  name = next(name for name in PREFERRED[platform] if name in table)
  _announce(operation, platform, name)
  return table[name]


@functools.cache
def _announce(operation: str, platform: str, name: str) -> None:
  """Says once a process what was picked and why."""
  wanted = PREFERRED[platform][0]
  why = 'preferred' if name == wanted else f'no {wanted} backend yet'
  logging.getLogger('pallas_kernels').info(
    '%s on %s: %s (%s)', operation, platform, name, why
  )
