"""Functions as one program each: eagerly, every step of them would be one."""

import functools

import jax


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, args, dy, *others):
  """Of `function(*args, *others)`: what comes out, and each arg's gradient."""
  y, pull = jax.vjp(lambda *args: function(*args, *others), *args)
  return y, *pull(dy.astype(y.dtype))
