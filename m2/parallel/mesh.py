"""The device mesh: axes data, fsdp, expert, context, tensor, all Explicit.

The order is by how often an axis communicates, the most often last, where
neighbours are closest: `tensor` reduces activations twice a layer, `context`
gathers keys and values once a layer, `expert` exchanges tokens once a layer,
`fsdp` gathers weights ahead of their use, and `data` sums gradients once a
step. So `data` is the axis that may cross slices of a TPU, over the data-centre
network.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from m2 import config

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')


def make_mesh(
  cfg: config.MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Builds the mesh.

  Args:
    cfg: axis sizes, of which the one that is -1 takes the devices left over,
      and the number of slices.
    devices: devices to use; None = all.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or the
      slices are not those that the devices are in.
  """
  devices = jax.devices() if devices is None else list(devices)
  types = (AxisType.Explicit,) * len(AXES)
  return Mesh(arrange(cfg, devices), AXES, axis_types=types)


def arrange(
  cfg: config.MeshConfig, devices: Sequence[jax.Device]
) -> np.ndarray:
  """The devices in the shape of the mesh, near ones next to each other.

  Block i of the `data` axis, of data / slices rows, is slice i.

  Raises:
    ValueError: as in `make_mesh`.
  """
  data, *others = _sizes(cfg, len(devices))
  _check_slices(cfg.slices, data, devices)
  # Whole sides of the torus where they fit the sizes, parts of sides elsewhere.
  if cfg.slices == 1:
    return mesh_utils.create_device_mesh(
      (data, *others), devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_hybrid_device_mesh(
    (data // cfg.slices, *others),
    (cfg.slices, *(1 for _ in others)),
    devices,
    allow_split_physical_axes=True,
  )


def _sizes(cfg: config.MeshConfig, count: int) -> tuple[int, ...]:
  """Axis sizes over `count` devices, -1 filled in."""
  sizes = [getattr(cfg, axis) for axis in AXES]
  fixed = math.prod(size for size in sizes if size != -1)
  if count % fixed or (-1 not in sizes and fixed != count):
    named = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))
    raise ValueError(
      f'mesh {named}: the fixed axes multiply to {fixed}, which does not fit '
      f'{count} devices; change mesh.* or set one axis to -1'
    )
  return tuple(count // fixed if size == -1 else size for size in sizes)


def _check_slices(slices: int, data: int, devices: Sequence) -> None:
  """Refuses slices that the devices are not in, or `data` cannot be cut to.

  GPUs give a slice to each host, or each NVLink domain, which a mesh of one
  slice may span: there, 1 is never wrong.
  """
  found = len({getattr(device, 'slice_index', 0) for device in devices})
  if found != slices and (slices > 1 or devices[0].platform == 'tpu'):
    raise ValueError(
      f'mesh.slices={slices} but the {len(devices)} devices are in {found}; '
      f'set mesh.slices={found}'
    )
  if data % slices:
    raise ValueError(
      f'mesh.data={data} is not a multiple of mesh.slices={slices}: each '
      'slice holds the same number of blocks of the data axis'
    )
