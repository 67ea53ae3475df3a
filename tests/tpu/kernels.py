"""Compiles the kernels of the expert layer for a TPU that is not here.

Run in a process of its own, because the TPU compiler (libtpu) must be on the
path before jax starts:

    PYTHONPATH=.tpu python -m tests.tpu.kernels TOPOLOGY CASE...

A case is OPERATION:TOKENS:EXPERTS, such as up:8192:256. Nothing is executed:
shapes go in, and a line of JSON a case comes out. `bytes` and `flops` are the
compiler's, which for kernels are what they declare; `moved_over_ideal` is what
the kernel's own plan copies for uniformly routed tokens, over each matrix, row
and result once. With `--dump FOLDER`, into which the compiler was told to
write its schedules, it also says how full the matrix units' slots are, and with
`--vmem`, at the price of a second compilation, how much vector memory is taken.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from pallas_kernels import tiles_tpu
from pallas_kernels.gmm import mosaic_tpu, stream_tpu
from tests.tpu import cases

NEEDED = re.compile(r'Scoped allocation with size ([\d.]+)([KMG])')
UNIT = {'K': 2**10, 'M': 2**20, 'G': 2**30}
# Slots of a bundle as the compiler's dumps list them, matrix units first.
SCHEDULE = '*{name}*final_hlo-static-per-bundle-utilization.txt'
# Compiled whole: one operation at a time takes seconds.
PLAN, GRADIENT_PLAN = (
  jax.jit(plan, static_argnums=(1, 2, 3, 4))
  for plan in (stream_tpu.plan, mosaic_tpu.gradient_plan)
)
IDLE = 100  # bundles between two loops over the matrix units


def compile_for(device, chip, one: cases.Case):
  """The compiled kernel and the seconds that took."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  shapes = [
    jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=sharding)
    for z in one.operands
  ]
  keywords = {} if chip is None else {'chip': chip}
  if one.tiles:
    keywords['tiles'] = one.tiles
  lowered = jax.jit(functools.partial(one.call, **keywords)).lower(*shapes)
  start = time.monotonic()
  return lowered.compile(), time.monotonic() - start


def vmem_bytes(device, chip, one: cases.Case) -> int | None:
  """What the kernel takes, by the compiler's word when it may not have it."""
  poor = dataclasses.replace(chip, vmem=4 * tiles_tpu.MIB + 2**14)
  try:
    compile_for(device, poor, one)
  except jax.errors.JaxRuntimeError as error:
    if found := NEEDED.search(str(error)):
      return round(float(found[1]) * UNIT[found[2]])
    raise
  return None


def routed(tokens: int, groups: int) -> np.ndarray:
  """Rows of each group for uniformly routed tokens."""
  law = np.full(groups, 1 / groups)
  return np.random.default_rng(0).multinomial(tokens * cases.TOP_K, law)


def moved(one: cases.Case, chip: tiles_tpu.Chip, tokens: int) -> float:
  """Bytes that the plan of uniformly routed tokens copies, over the ideal."""
  groups, rows = one.operands[-1].shape[0], one.operands[0].shape[0]
  sizes = routed(tokens, groups)
  args = jnp.asarray(sizes), rows, cases.ALIGN, one.tiles.rows, chip.cores
  if one.row_out:
    plan = PLAN(*args)
    matrices, needed = fetches(plan), (sizes > 0).sum()
    written = np.asarray(plan.extent_T).sum()
  else:
    plan = GRADIENT_PLAN(*args)
    matrices = needed = groups
    written = 0
  valid_T = np.asarray(plan.valid_T)[: np.asarray(plan.first_C)[-1]]
  read = (-(-valid_T // cases.ALIGN) * cases.ALIGN).sum()
  total = matrices * one.matrix_bytes + read * one.row_in
  total += written * one.row_out
  ideal = needed * one.matrix_bytes + sizes.sum() * one.row_in
  ideal += rows * one.row_out - sizes.sum() * one.padding
  return total / ideal


def peer_moved(one: cases.Case, tokens: int) -> float:
  """The same for the peer, whose tiles on a group's edge are done twice."""
  groups, rows = one.operands[-1].shape[0], one.operands[0].shape[0]
  tile, _, columns = cases.PEER_TILES
  end = np.cumsum(sizes := routed(tokens, groups))
  visits = -(-end // tile) - (end - sizes) // tile
  visits = visits[sizes > 0].sum()
  # Rows again for every column tile, matrices again for every row tile.
  total = visits * tile * 2 * cases.WIDTH * -(-cases.HIDDEN // columns)
  total += visits * 2 * cases.WIDTH * cases.HIDDEN + rows * 2 * cases.HIDDEN
  needed = (sizes > 0).sum()
  ideal = needed * 2 * cases.WIDTH * cases.HIDDEN + rows * 2 * (
    cases.WIDTH + cases.HIDDEN
  )
  return total / ideal


def fetches(plan: stream_tpu.Plan) -> int:
  """How many matrices the cores fetch together."""
  first_C, turn_T = np.asarray(plan.first_C), np.asarray(plan.turn_T)
  return sum(
    len(set(turn_T[begin:end])) for begin, end in zip(first_C, first_C[1:])
  )


def schedule(folder: pathlib.Path, name: str) -> dict[str, Any]:
  """How full the matrix units' slots are where they work most."""
  files = sorted(folder.glob(SCHEDULE.format(name=f'{name}.')))
  if not files:
    return {}
  lines = files[-1].read_text().splitlines()
  units = int(lines[2].split()[0])
  used = np.array([int(line.split()[0]) for line in lines[4:]])
  busy = np.flatnonzero(used)
  if not len(busy):
    return {}
  cuts = np.flatnonzero(np.diff(busy) > IDLE)
  first = np.concatenate([busy[:1], busy[cuts + 1]])
  last = np.concatenate([busy[cuts], busy[-1:]])
  loops = [used[a : b + 1] for a, b in zip(first, last)]
  main = max(loops, key=lambda loop: loop.sum())
  return {'matrix_slots': main.sum() / (units * len(main))}


def measure(
  device, name: str, dump: pathlib.Path | None, vmem: bool
) -> dict[str, Any]:
  """What the compiler says of one case."""
  operation, tokens, groups = name.split(':')
  tokens, groups = int(tokens), int(groups)
  chip = tiles_tpu.CHIPS[device.device_kind]
  row = {
    'operation': operation,
    'tokens': tokens,
    'experts': groups,
    'device': device.device_kind,
  }
  if operation in cases.OTHERS:
    one = cases.other(operation, tokens, groups)
  else:
    one = cases.streamed(operation, tokens, groups, chip)
    row |= {
      'tiles': dataclasses.asdict(one.tiles),
      'matrix_bytes': groups * one.matrix_bytes,
      'padding_bytes': one.operands[0].shape[0] * one.padding,
      'moved_over_ideal': round(moved(one, chip, tokens), 4),
    }
  if operation in cases.PEERS:
    chip = None
    row['moved_over_ideal'] = round(peer_moved(one, tokens), 4)
    row['tiles'] = list(cases.PEER_TILES)
  with tiles_tpu.compiling_for(device.device_kind):
    compiled, seconds = compile_for(device, chip, one)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  row |= {
    'compile_seconds': round(seconds, 1),
    'temp_bytes': memory.temp_size_in_bytes,
    'code_bytes': memory.generated_code_size_in_bytes,
    'flops': cost.get('flops', 0),
    'flops_analytic': one.flops,
    'bytes': cost['bytes accessed'],
    'bytes_ideal': one.ideal,
    'optimal_seconds': cost['optimal_seconds'],
  }
  if dump:
    row |= schedule(dump, one.name)
  if vmem and chip and operation != 'layer':
    row['vmem_bytes'] = vmem_bytes(device, chip, one)
    row['vmem_limit'] = chip.vmem_limit
  return row


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('topology')
  parser.add_argument('cases', nargs='+')
  parser.add_argument('--dump', type=pathlib.Path)
  parser.add_argument('--vmem', action='store_true')
  args = parser.parse_args(argv)
  device = topologies.get_topology_desc(
    platform='tpu', topology_name=args.topology
  ).devices[0]
  for name in args.cases:
    print(json.dumps(measure(device, name, args.dump, args.vmem)), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
