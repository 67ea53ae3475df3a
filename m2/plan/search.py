"""Which configuration fits, and of those, which could be the fastest.

Every factorisation of the devices into mesh axes, with every policy of
rematerialisation, number of microbatches and dtype of the first moment, is
held against the memory of a device by `memory.estimate`, and ranked by the
time of its products and messages one after the other, at peak: many plans
share the same longest part, and the compiler hides only some of the rest. What
the step computes stays: model, rows, their length, and the optimiser's rule. Of
an RL update the number of lines that are computed at once may change.

Of generation the mesh changes first, then how many prompts are computed at
once, then the number of slots, and last the experts' dtype; a slot's length
stays.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from m2 import config as settings
from m2.parallel import mesh as meshes
from m2.plan import chips, collectives, counts, flops, memory, roofline

# Share of a device's memory that the estimate may fill.
FILL = 0.92
SERVING_FILL = 0.95  # the estimate is nearer there
REMAT = ('block', 'full')
MOMENTS = ('float32', 'bfloat16')
ACCUMULATE = (1, 2, 4, 8)
TENSOR = (1, 2, 4, 8)
GENERATION = 'decode', 'prefill'
HALVINGS = 6  # of slots and prompts, at the most


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A configuration that should fit.

  Attributes:
    config: with what was changed of it.
    changed: the leaves that may differ from the run's, by their names.
    memory: the estimate.
    seconds: bound on a call.
    by: what bounds it.
    apart: seconds of products and messages when nothing overlaps.
  """

  config: settings.RunConfig
  changed: tuple[str, ...]
  memory: memory.Memory
  seconds: float
  by: str
  apart: float

  def settings(self) -> str:
    """The overrides that make it, as words of a command line."""
    words = []
    for leaf in self.changed:
      section, name = leaf.split('.')
      value = getattr(getattr(self.config, section), name)
      words.append(f'--config.{leaf}={value}')
    return ' '.join(words)


CHANGED = (
  *(f'mesh.{axis}' for axis in meshes.AXES),
  'model.remat',
  'optim.moment',
)


@dataclasses.dataclass(frozen=True)
class Update:
  """One way to update weights, as the search sees it.

  Attributes:
    leaf: the setting that says how much is computed at once.
    shape: rows of a call and their length, from a run's settings.
    value: of `leaf`, from the rows and in how many parts they are computed.
    parts: of a call, from a run's settings.
    memory: the estimate.
    messages: what is expected of the collectives.
  """

  leaf: str
  shape: Callable[[settings.RunConfig], tuple[int, int]]
  value: Callable[[int, int], int]
  parts: Callable[[settings.RunConfig], int]
  memory: Callable[..., memory.Memory]
  messages: Callable[[counts.Work], Sequence[counts.Expected]]


UPDATES = {
  'train': Update(
    leaf='optim.accumulate',
    shape=lambda config: (config.data.batch, config.data.length),
    value=lambda rows, parts: parts,
    parts=lambda config: config.optim.accumulate,
    memory=memory.estimate,
    messages=counts.train,
  ),
  # A call computes `forge.lines` lines; an update is as many calls as it takes.
  'rl': Update(
    leaf='forge.lines',
    shape=lambda config: (config.forge.lines, config.forge.row_tokens),
    value=lambda rows, parts: rows // parts,
    parts=lambda config: 1,
    memory=memory.estimate_rl,
    messages=counts.rl,
  ),
}
SERVING = (
  'plan.rollout_expert',
  'plan.rollout_tensor',
  'engine.slots',
  'engine.prompts',
  'engine.fp8',
)


def search(
  config: settings.RunConfig,
  target: chips.Topology,
  rates: Callable[[settings.MeshConfig], Mapping[str, float]],
  program: str = 'train',
  *,
  fill: float = FILL,
) -> list[Candidate]:
  """Candidates for an update that fit, the least time a token first.

  Args:
    config: the run; what may change of it does.
    target: the chips.
    rates: bytes/s along each axis of a mesh (`roofline.chip_rates`).
    program: train or rl.
    fill: share of a device's memory that the estimate may take.
  """
  limit = fill * target.chip.device_hbm
  update, found = UPDATES[program], []
  for sizes in factorisations(config, target, program):
    links = None
    for one in variants(config, sizes, program):
      try:
        held = update.memory(one, sizes, target.chip.kind)
      except ValueError:
        break  # a dimension does not divide: no variant of this mesh will do
      if held.peak > limit:
        continue
      links = links or rates(one.mesh)
      found.append(_ranked(one, sizes, held, target, links, update))

  def key(one: Candidate):
    seconds = one.apart / math.prod(update.shape(one.config))
    # Rounder moments are for runs that need the memory.
    rounder = one.config.optim.moment != config.optim.moment
    return seconds, rounder, one.memory.peak

  return sorted(found, key=key)


def factorisations(
  config: settings.RunConfig, target: chips.Topology, program: str = 'train'
) -> Iterator[dict[str, int]]:
  """Axis sizes that multiply to the devices and divide what they split."""
  model, (batch, length) = config.model, UPDATES[program].shape(config)
  powers = [n for n in range(1, target.count + 1) if target.count % n == 0]
  # A run that generates, too, keeps rows whole (`RunConfig` refuses others).
  contexts = [1] if config.engine else powers
  for fsdp, expert, context, tensor in itertools.product(
    powers, powers, contexts, TENSOR
  ):
    rest, left = divmod(target.count, fsdp * expert * context * tensor)
    if left or not rest or rest % target.slices:
      continue
    rows = rest * fsdp * expert
    divides = (
      batch % rows == 0
      and model.experts % expert == 0
      and model.kv_heads % tensor == 0
      and (context == 1 or length % (2 * context) == 0)
    )
    if divides:
      sizes = rest, fsdp, expert, context, tensor
      yield dict(zip(meshes.AXES, sizes))


def variants(
  config: settings.RunConfig, sizes: dict[str, int], program: str = 'train'
) -> Iterator[settings.RunConfig]:
  """What may change on one mesh: the cheapest in time first."""
  ways = sizes['data'] * sizes['fsdp'] * sizes['expert']
  update = UPDATES[program]
  rows, _ = update.shape(config)
  section, leaf = update.leaf.split('.')
  for moment, remat, parts in itertools.product(MOMENTS, REMAT, ACCUMULATE):
    if rows % (ways * parts):
      continue
    one = dataclasses.replace(
      config,
      mesh=dataclasses.replace(config.mesh, **sizes),
      model=dataclasses.replace(config.model, remat=remat),
      optim=dataclasses.replace(config.optim, moment=moment),
    )
    value = update.value(rows, parts)
    changed = dataclasses.replace(getattr(one, section), **{leaf: value})
    yield dataclasses.replace(one, **{section: changed})


def _ranked(config, sizes, held, target, rates, update) -> Candidate:
  (rows, length), parts = update.shape(config), update.parts(config)
  work = counts.Work(
    config.model, sizes, rows // parts, length, parts, target.chip.kind
  )
  one = flops.per_token(config.model, length, training=True)
  passes = one.passes * rows * length
  bound = roofline.Bound(
    compute=passes / (target.chip.bf16 * target.chips),
    memory=3 * held.peak / (target.chip.hbm_rate / target.chip.devices),
    links=roofline.links(_as_found(work, update.messages(work)), rates),
  )
  apart = bound.compute + sum(bound.links.values())
  changed = *CHANGED, update.leaf
  return Candidate(config, changed, held, bound.step, bound.by, apart)


def serving(
  config: settings.RunConfig,
  target: chips.Topology,
  rates: Callable[[settings.MeshConfig], Mapping[str, float]],
  *,
  fill: float = SERVING_FILL,
) -> list[Candidate]:
  """Candidates for generation that fit: what changes least, then the fastest.

  One engine decodes and prefills, so each fits both; one follows another only
  if it needs less memory.

  Args:
    config: the run; `engine` and the mesh of generation may change.
    target: the chips.
    rates: bytes/s along each axis of a mesh (`roofline.chip_rates`).
    fill: share of a device's memory that the estimate may take.
  """
  limit = fill * target.chip.device_hbm
  links = functools.cache(rates)
  found = []
  for one in _served(config, target):
    mesh = serving_mesh(one.plan)
    rest = target.count // (mesh.expert * mesh.tensor)
    sizes = dict(zip(meshes.AXES, (rest, 1, mesh.expert, 1, mesh.tensor)))
    try:
      programs = [memory.serving(one, sizes, name) for name in GENERATION]
    except ValueError:
      continue  # a dimension does not divide
    held = max(programs, key=lambda program: program.peak)
    if held.peak <= limit:
      found.append(_ranked_serving(one, sizes, held, target, links(mesh)))

  def least(found: Candidate):
    engine = found.config.engine
    return (engine.fp8, -engine.slots, -engine.prompts, found.apart)

  kept: list[Candidate] = []
  for one in sorted(found, key=least):
    if not kept or one.memory.peak < kept[-1].memory.peak:
      kept.append(one)
  return kept


def serving_mesh(plan: settings.PlanConfig) -> settings.MeshConfig:
  """The mesh of generation."""
  return settings.MeshConfig(
    data=-1,
    fsdp=1,
    expert=plan.rollout_expert,
    tensor=plan.rollout_tensor,
    slices=plan.slices,
  )


def _served(
  config: settings.RunConfig, target: chips.Topology
) -> Iterator[settings.RunConfig]:
  """Every way to serve: meshes, fewer slots and prompts, experts in FP8."""
  engine, model = config.engine, config.model
  ways = [n for n in range(1, target.count + 1) if target.count % n == 0]
  whole = model.d_model % 128 == 0 == model.d_expert % 128  # blocks of FP8
  codes = sorted({engine.fp8, engine.fp8 or whole})
  for expert, tensor in itertools.product(ways, TENSOR):
    if (
      target.count % (expert * tensor * target.slices)
      or model.experts % expert
      or model.kv_heads % tensor
    ):
      continue
    plan = dataclasses.replace(
      config.plan, rollout_expert=expert, rollout_tensor=tensor
    )
    for count, most, fp8 in itertools.product(
      _halves(engine.slots), _halves(engine.prompts), codes
    ):
      served = dataclasses.replace(engine, slots=count, prompts=most, fp8=fp8)
      yield dataclasses.replace(config, plan=plan, engine=served)


def _halves(most: int) -> list[int]:
  return [most >> n for n in range(HALVINGS) if most >> n]


def _ranked_serving(config, sizes, held, target, rates) -> Candidate:
  """Ranked by a decoded token of every slot: what is read, what is sent."""
  engine, model = config.engine, memory.served_model(config)
  work = counts.Work(model, sizes, engine.slots, 1, 1, target.chip.kind)
  one = flops.per_token(config.model, engine.length, training=False)
  read = held.weights + held.cache
  bound = roofline.Bound(
    compute=one.passes * engine.slots / (target.chip.bf16 * target.chips),
    memory=read / (target.chip.hbm_rate / target.chip.devices),
    links=roofline.links(
      _as_found(work, counts.forward(work, logits=engine.slots)), rates
    ),
  )
  apart = bound.memory + sum(bound.links.values())
  return Candidate(config, SERVING, held, bound.step, bound.by, apart)


def _as_found(
  work: counts.Work, expected: Sequence[counts.Expected]
) -> list[collectives.Collective]:
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
    for one in expected
  ]
