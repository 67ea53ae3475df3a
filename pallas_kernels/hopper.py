"""What the kernels for Hopper GPUs share beside their own files."""

import jax
from jax import lax

BOX = 256  # longest side of a bulk copy
SHARED = 224 << 10  # bytes of shared memory that buffers of a block may take


def refusal() -> str | None:
  """Why such kernels cannot run on this device, or None."""
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or device.compute_capability != '9.0':
    return f'needs a Hopper GPU, not {device.device_kind}'
  return None


def box(width: int) -> tuple[int, int]:
  """`width`, a multiple of 8, as two sides of at most BOX, while that goes."""
  side = next(s for s in range(BOX, 0, -8) if width % s == 0)
  return width // side, side


def varying_like(x: jax.Array, y: jax.Array) -> jax.Array:
  """Inside `shard_map`, marks `y` as differing over the axes that `x` does.

  Kernels are not told on which axes their operands differ.
  """
  axes = jax.typeof(x).mat.varying - jax.typeof(y).mat.varying
  return lax.pcast(y, tuple(axes), to='varying') if axes else y
