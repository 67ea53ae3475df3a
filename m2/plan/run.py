"""`config.mode=plan`: compiles a run for TPUs that are not here.

    python main.py --config=configs/m2.py --config.mode=plan \
      --config.plan.topology=v5p:8x8x8

prints, for each program, what a device holds and by category, what moves
between devices beside what the sharding table asks for, and the bound on its
time; `<workdir>/plan.json` holds the same, `<workdir>/<program>.hlo` what was
compiled. A program that does not fit is named with what it would take, and for
updates and generation a configuration that fits is looked for.
"""

import dataclasses
import pathlib
from typing import Any

from m2 import config as settings
from m2.evolve import provenance

TRIES = 3  # candidates that are compiled before giving up
# What is looked for if it does not fit: what its bound is of, and what helps.
SERVED = 'a decoded token', 'a shorter engine.length'
SEARCHED = {
  'train': ('a step', 'fewer tokens a step'),
  'rl': ('a microbatch', 'a smaller engine.length and forge.row_tokens'),
  'decode': SERVED,
  'prefill': SERVED,
}
# What configs/rl.py has.
ENGINE = settings.EngineConfig(slots=512, length=16_384)
FORGE = settings.ForgeConfig(row_tokens=16_384, lines=512)


def run(
  config: settings.RunConfig, workdir: pathlib.Path
) -> list[dict[str, Any]]:
  """Plans every program of `plan.programs`.

  Args:
    config: of mode plan.
    workdir: where `plan.json` goes.

  Returns:
    What is in the file: one dictionary a program (`report.measure`).

  Raises:
    ValueError: an unknown topology, or settings that do not fit the mesh.
  """
  from m2.plan import compiler

  compiler.prepare()  # before jax starts
  from m2.plan import report

  given = config
  config = dataclasses.replace(
    config, engine=config.engine or ENGINE, forge=config.forge or FORGE
  )
  rows = []
  for name in config.plan.programs.split(','):
    planned = given if name == 'train' else config
    fits = False
    try:
      row = one(planned, name, workdir)
    except ValueError as error:
      if name not in SEARCHED or not config.plan.search:
        raise
      print(f'{name}: as it is, it cannot be: {error}', flush=True)
    else:
      print('\n'.join(report.lines(row)), flush=True)
      if name == 'train' and config.model.mtp_modules:
        print(
          '  compiled, and counted in operations, with the '
          f'{config.model.mtp_modules} of model.mtp_modules; what is expected '
          'by count of collectives and searched for is without them'
        )
      rows.append(row)
      fits = row['fits']
    if name in SEARCHED and (config.plan.search or not fits):
      rows += propose(planned, name, workdir)
      section = 'forge' if name == 'rl' else 'engine'
      if name != 'train' and getattr(given, section) is None:
        print(
          f'{section}.* are settings of a config that has them, such as '
          f'configs/plan.py; planned was {getattr(config, section)}'
        )
    provenance.write_json(workdir / 'plan.json', {'programs': rows})
  return rows


def propose(
  config: settings.RunConfig, name: str, workdir: pathlib.Path
) -> list[dict[str, Any]]:
  """The best configuration by count that the compiler accepts, if any.

  Returns:
    One row for every candidate compiled; only the last can fit.
  """
  from m2.parallel import mesh as meshes
  from m2.plan import chips, report, roofline, search

  target = chips.topology(config.plan.topology, config.plan.slices)
  found = chips.devices(target)

  def rates(mesh):
    return roofline.chip_rates(target, meshes.make_mesh(mesh, found))

  if name in search.UPDATES:
    candidates = search.search(config, target, rates, name)
  else:
    candidates = search.serving(config, target, rates)
  rows, (what, remedy) = [], SEARCHED[name]
  print(f'{len(candidates)} configurations should fit {target}')
  for candidate in candidates[:TRIES]:
    print(
      f'  {report.gib(candidate.memory.peak)} by estimate, at least '
      f'{1e3 * candidate.seconds:.0f} ms {what} by {candidate.by}: '
      f'{candidate.settings()}',
      flush=True,
    )
    row = one(candidate.config, name, workdir)
    row['proposed'] = candidate.settings()
    row['hbm']['estimate'] = candidate.memory.peak
    print('\n'.join(report.lines(row)), flush=True)
    rows.append(row)
    if row['fits']:
      return rows
  print(
    f'none of the {len(rows)} tried fits {target}: use more chips or {remedy}'
  )
  return rows


def one(
  config: settings.RunConfig, name: str, workdir: pathlib.Path
) -> dict[str, Any]:
  """The plan of one program."""
  from m2.plan import compiler, report

  program, target = build(config, name)
  outcome = compiler.compile_program(program)
  (workdir / f'{name}.hlo').write_text(outcome.text)
  return report.measure(program, outcome, target, config.model)


def build(config: settings.RunConfig, name: str):
  """The program called `name`, and the topology it is for."""
  from m2.parallel import mesh as meshes
  from m2.plan import chips, programs, search

  plan = config.plan
  target = chips.topology(plan.topology, plan.slices)
  found = chips.devices(target)
  serving = search.serving_mesh(plan)
  if name in ('prefill', 'decode'):
    mesh = meshes.make_mesh(serving, found)
  else:
    mesh = meshes.make_mesh(config.mesh, found)
  if name == 'sync':
    made = programs.sync_program(config, mesh, meshes.make_mesh(serving, found))
  else:
    made = programs.PROGRAMS[name](config, mesh)
  return made, target
