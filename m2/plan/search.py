"""Which configuration fits, and of those, which could be the fastest.

Every factorisation of the devices into mesh axes, with every policy of
rematerialisation, number of microbatches and dtype of the first moment, is
held against the memory of a device by `memory.estimate`, and ranked by the
time of its products and messages one after the other, at peak: many plans
share the same longest part, and the compiler hides only some of the rest. What
the step computes stays: model, rows, their length, and the optimiser's rule.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

from m2 import config as settings
from m2.parallel import mesh as meshes
from m2.plan import chips, collectives, counts, flops, memory, roofline

# Share of a device's memory that the estimate may fill.
FILL = 0.92
REMAT = ('block', 'full')
MOMENTS = ('float32', 'bfloat16')
ACCUMULATE = (1, 2, 4, 8)
TENSOR = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A configuration that should fit.

  Attributes:
    config: with its mesh, remat, microbatches and moment.
    memory: the estimate.
    seconds: bound on a step.
    by: what bounds it.
    apart: seconds of products and messages when nothing overlaps.
  """

  config: settings.RunConfig
  memory: memory.Memory
  seconds: float
  by: str
  apart: float

  def settings(self) -> str:
    """The overrides that make it, as words of a command line."""
    mesh = self.config.mesh
    axes = {f'mesh.{axis}': getattr(mesh, axis) for axis in meshes.AXES}
    leaves = {
      **axes,
      'model.remat': self.config.model.remat,
      'optim.accumulate': self.config.optim.accumulate,
      'optim.moment': self.config.optim.moment,
    }
    return ' '.join(
      f'--config.{name}={value}' for name, value in leaves.items()
    )


def search(
  config: settings.RunConfig,
  target: chips.Topology,
  rates: Callable[[settings.MeshConfig], Mapping[str, float]],
  *,
  fill: float = FILL,
) -> list[Candidate]:
  """Candidates for the training step that fit, the fastest bound first.

  Args:
    config: the run; what may change of it does.
    target: the chips.
    rates: bytes/s along each axis of a mesh (`roofline.chip_rates`).
    fill: share of a device's memory that the estimate may take.
  """
  limit = fill * target.chip.device_hbm
  found = []
  for sizes in factorisations(config, target):
    links = None
    for one in variants(config, sizes):
      try:
        held = memory.estimate(one, sizes, target.chip.kind)
      except ValueError:
        break  # a dimension does not divide: no variant of this mesh will do
      if held.peak > limit:
        continue
      links = links or rates(one.mesh)
      found.append(_ranked(one, sizes, held, target, links))
  return sorted(found, key=lambda one: (one.apart, one.memory.peak))


def factorisations(
  config: settings.RunConfig, target: chips.Topology
) -> Iterator[dict[str, int]]:
  """Axis sizes that multiply to the devices and divide what they split."""
  model, data = config.model, config.data
  powers = [n for n in range(1, target.count + 1) if target.count % n == 0]
  for fsdp, expert, context, tensor in itertools.product(
    powers, powers, powers, TENSOR
  ):
    rest, left = divmod(target.count, fsdp * expert * context * tensor)
    if left or not rest or rest % target.slices:
      continue
    rows = rest * fsdp * expert
    divides = (
      data.batch % rows == 0
      and model.experts % expert == 0
      and model.kv_heads % tensor == 0
      and (context == 1 or data.length % (2 * context) == 0)
    )
    if divides:
      sizes = rest, fsdp, expert, context, tensor
      yield dict(zip(meshes.AXES, sizes))


def variants(
  config: settings.RunConfig, sizes: dict[str, int]
) -> Iterator[settings.RunConfig]:
  """What may change on one mesh: the cheapest in time first."""
  rows = sizes['data'] * sizes['fsdp'] * sizes['expert']
  for moment, remat, parts in itertools.product(MOMENTS, REMAT, ACCUMULATE):
    if config.data.batch % (rows * parts) == 0:
      yield dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **sizes),
        model=dataclasses.replace(config.model, remat=remat),
        optim=dataclasses.replace(
          config.optim, accumulate=parts, moment=moment
        ),
      )


def _ranked(config, sizes, held, target, rates) -> Candidate:
  data, parts = config.data, config.optim.accumulate
  work = counts.Work(
    config.model,
    sizes,
    data.batch // parts,
    data.length,
    parts,
    target.chip.kind,
  )
  one = flops.per_token(config.model, data.length, training=True)
  passes = one.passes * data.batch * data.length
  bound = roofline.Bound(
    compute=passes / (target.chip.bf16 * target.chips),
    memory=3 * held.peak / (target.chip.hbm_rate / target.chip.devices),
    links=roofline.links(_as_found(work), rates),
  )
  apart = bound.compute + sum(bound.links.values())
  return Candidate(config, held, bound.step, bound.by, apart)


def _as_found(work: counts.Work) -> list[collectives.Collective]:
  return [
    collectives.Collective(
      one.name,
      one.kind,
      one.axes,
      tuple(work.mesh[axis] for axis in one.axes),
      counts.ways(work.mesh, one.axes),
      one.size,
      '',
      one.times,
      one.name,
    )
    for one in counts.train(work)
  ]
