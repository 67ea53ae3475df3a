"""What each TPU can do: the public figures that plans are made of.

Sources, read in November 2026:
  v5e    https://docs.cloud.google.com/tpu/docs/v5e
  v5p    https://docs.cloud.google.com/tpu/docs/v5p
  v6e    https://docs.cloud.google.com/tpu/docs/v6e
  tpu7x  https://docs.cloud.google.com/tpu/docs/tpu7x
Figures there are of a chip. A JAX device is a chip, but half of one on tpu7x,
whose two cores have memory and arithmetic of their own and share the links.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

GB = 10**9
GIB = 2**30
TERA = 10**12
GBIT = 10**9 / 8


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU.

  Attributes:
    name: as topologies spell it, such as v5p.
    kind: `jax.Device.device_kind`.
    hbm: bytes of memory of a chip.
    bf16: peak FLOP/s of a chip.
    hbm_rate: bytes/s of memory of a chip.
    link: bytes/s of one ICI link in one direction.
    dims: dimensions of the torus; a chip has two links in each.
    wraps: sides of this length or a multiple close to a ring.
    dcn: bytes/s of a chip's share of the data center network.
    devices: JAX devices of a chip.
  """

  name: str
  kind: str
  hbm: int
  bf16: float
  hbm_rate: float
  link: float
  dims: int
  wraps: int
  dcn: float
  devices: int = 1

  @property
  def device_hbm(self) -> int:
    """Bytes of memory of one JAX device."""
    return self.hbm // self.devices


CHIPS = {
  chip.name: chip
  for chip in (
    # 400 GB/s both ways over 4 links; FP8 has no arithmetic of its own.
    # A pod's 6.4 Tbit/s of DCN over its 256 chips.
    Chip(
      name='v5e',
      kind='TPU v5 lite',
      hbm=16 * GIB,
      bf16=197 * TERA,
      hbm_rate=819 * GB,
      link=50 * GB,
      dims=2,
      wraps=16,
      dcn=25 * GBIT,
    ),
    # 1200 GB/s both ways over 6 links.
    Chip(
      name='v5p',
      kind='TPU v5',
      hbm=95 * GIB,
      bf16=459 * TERA,
      hbm_rate=2765 * GB,
      link=100 * GB,
      dims=3,
      wraps=4,
      dcn=50 * GBIT,
    ),
    # 800 GB/s both ways over 4 links.
    Chip(
      name='v6e',
      kind='TPU v6 lite',
      hbm=32 * GIB,
      bf16=918 * TERA,
      hbm_rate=1638 * GB,
      link=100 * GB,
      dims=2,
      wraps=16,
      dcn=100 * GBIT,
    ),
    # 1200 GB/s both ways over 6 links.
    Chip(
      name='tpu7x',
      kind='TPU7x',
      hbm=192 * GIB,
      bf16=2307 * TERA,
      hbm_rate=7380 * GB,
      link=100 * GB,
      dims=3,
      wraps=4,
      dcn=100 * GBIT,
      devices=2,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of chips, or several joined by the data center network.

  Attributes:
    chip: of what kind.
    sides: chips in each dimension.
    slices: how many.
  """

  chip: Chip
  sides: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    return self.slices * math.prod(self.sides)

  @property
  def count(self) -> int:
    """JAX devices, which is what a mesh is made of."""
    return self.chips * self.chip.devices

  @property
  def name(self) -> str:
    return f'{self.chip.name}:{"x".join(map(str, self.sides))}'

  def __str__(self) -> str:
    return self.name + (f' x {self.slices} slices' if self.slices > 1 else '')


def topology(text: str, slices: int = 1) -> Topology:
  """Reads a topology such as v5p:8x8x8.

  Raises:
    ValueError: an unknown chip, or sides that are not those of its torus.
  """
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', text)
  chip = CHIPS.get(found[1]) if found else None
  if not chip:
    raise ValueError(
      f'topology {text!r}: give CHIP:SIDES such as v5p:8x8x8, with a chip of '
      f'{", ".join(CHIPS)}'
    )
  sides = tuple(int(side) for side in found[2].split('x'))
  if len(sides) != chip.dims or not all(sides):
    raise ValueError(
      f'topology {text!r}: {chip.name} is connected in {chip.dims} dimensions; '
      f'give {chip.dims} sides'
    )
  return Topology(chip, sides, slices)


def devices(target: Topology) -> Sequence[jax.Device]:
  """The topology's devices, as far as a compiler needs them.

  Raises:
    ValueError: the TPU compiler (libtpu) is not installed, or it does not know
      this topology.
  """
  from jax.experimental import topologies

  more = {'num_slices': target.slices} if target.slices > 1 else {}
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=target.name, **more
    )
  except Exception as error:
    raise ValueError(f'no TPU compiler for {target}: {error}') from error
  return found.devices


def axis_rate(mesh: jax.sharding.Mesh, axis: str, target: Topology) -> float:
  """Bytes/s that each device can send along a mesh axis.

  An axis lies along some dimensions of the torus, or parts of them, and uses
  their links: both directions of a dimension that closes to a ring, one where
  it does not. The cores of a chip share its links; an axis of nothing but
  cores of one chip never leaves it. Slices are joined by DCN alone: of n
  devices in s slices, each need send (s - 1) / (n - 1) of its bytes there, the
  rest within its slice.
  """
  place = mesh.axis_names.index(axis)
  line = np.moveaxis(mesh.devices, place, 0).reshape(mesh.shape[axis], -1)[:, 0]
  slices = len({getattr(one, 'slice_index', 0) for one in line})
  if slices > 1:
    own = target.chip.dcn / target.chip.devices
    return own * (len(line) - 1) / (slices - 1)
  coords = np.array([one.coords for one in line])
  links = 0
  for dim, side in enumerate(target.sides):
    length = len(set(coords[:, dim]))
    if length > 1:
      ring = length == side and side % target.chip.wraps == 0
      links += 2 if ring else 1
  if not links:
    return target.chip.hbm_rate / target.chip.devices
  return links * target.chip.link / target.chip.devices
