"""The device mesh: axes data, fsdp, expert, tensor, all Explicit."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from m2 import config

AXES = ('data', 'fsdp', 'expert', 'tensor')


def make_mesh(
  cfg: config.MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Builds the mesh.

  Args:
    cfg: axis sizes; the one that is -1 takes the devices left over.
    devices: devices to use; None = all.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [cfg.data, cfg.fsdp, cfg.expert, cfg.tensor]
  fixed = math.prod(size for size in sizes if size != -1)
  if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
    named = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))
    raise ValueError(
      f'mesh {named}: the fixed axes multiply to {fixed}, which does not fit '
      f'{len(devices)} devices; change mesh.* or set one axis to -1'
    )
  sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
  return jax.make_mesh(
    tuple(sizes), AXES, (AxisType.Explicit,) * len(AXES), devices=devices
  )
