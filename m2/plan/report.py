"""A plan as values, and as lines to read."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from m2.plan import (
  chips,
  collectives,
  compiler,
  counts,
  flops,
  hlo,
  programs,
  roofline,
)

# Collective bytes may differ from the count by this share before the plan says
# which instructions make the difference.
CLOSE = 0.02
# Groups of collectives below this share of all bytes are summed up.
SMALL = 0.005


def measure(
  program: programs.Program,
  outcome: compiler.Outcome,
  target: chips.Topology,
  model: Any,
) -> dict[str, Any]:
  """All that a plan says of one program, as plain values for JSON."""
  held = program.memory
  row = {
    'program': program.name,
    'topology': str(target),
    'chips': target.chips,
    'devices': target.count,
    'mesh': {a: n for a, n in program.mesh.shape.items() if n > 1},
    'tokens': program.tokens,
    'length': program.keys,
    'compile_seconds': round(outcome.seconds, 1),
    'compiler_bytes': outcome.compiler_bytes,
    'fits': outcome.fits,
    'hbm': {
      'limit': target.chip.device_hbm,
      'peak': outcome.peak,
      **{
        field.name: getattr(held, field.name)
        for field in dataclasses.fields(held)
        if field.name != 'work'
      },
      'work': outcome.peak - held.peak,
    },
  }
  if not outcome.fits:
    row['hbm']['limit'] = outcome.limit
    return row
  module = hlo.parse(outcome.text)
  found = collectives.find(
    module, dict(program.mesh.shape), unknown=program.trips
  )
  row['collectives'] = compare(program, found)
  row['flops'] = _flops(program, target, model, outcome)
  bound = _bound(program, module, found, target, row['flops'])
  row['seconds'] = {name: value for name, value in bound.parts.items()}
  row['bound'] = {'seconds': bound.step, 'by': bound.by}
  if program.tokens:
    peak = target.chip.bf16 * target.chips
    row['mfu'] = row['flops']['useful'] / (bound.step * peak)
    row['tokens_per_second_per_chip'] = (
      program.tokens / bound.step / target.chips
    )
  return row


def compare(
  program: programs.Program, found: Sequence[collectives.Collective]
) -> dict[str, Any]:
  """Bytes on the wire by kind and axes, beside the analytic count."""
  got = collectives.totals(found)
  want = counts.by_axes(program.expected, dict(program.mesh.shape))
  rows, everything = [], sum(got.values()) or 1.0
  for key in sorted({*got, *want}, key=lambda key: -got.get(key, 0.0)):
    kind, axes = key
    here = [one for one in found if (one.kind, one.axes) == key]
    row = {
      'kind': kind,
      'axes': '+'.join(axes),
      'bytes': got.get(key, 0.0),
      'expected': want.get(key, 0.0),
    }
    if abs(row['bytes'] - row['expected']) > CLOSE * max(
      row['expected'], SMALL * everything
    ):
      here.sort(key=lambda one: -one.wire)
      row['instructions'] = [
        {'name': one.name, 'bytes': one.wire, 'origin': one.origin}
        for one in here[:4]
      ]
    rows.append(row)
  return {
    'rows': rows,
    'bytes': sum(got.values()),
    'expected': sum(want.values()) or program.least,
  }


def _flops(program, target, model, outcome) -> dict[str, float]:
  """FLOPs of all devices, and the compiler's count of one device."""
  if not program.tokens:
    return {'useful': 0.0, 'done': 0.0, 'passes': 0.0}
  one = flops.per_token(
    model,
    program.keys,
    training=program.training,
    logits=program.logits,
    modules=model.mtp_modules if program.name == 'train' else 0,
  )
  return {
    'useful': one.useful * program.tokens,
    'done': one.done * program.tokens,
    'passes': one.passes * program.tokens,
    # Every loop body once, kernels as they declare themselves.
    'compiler_per_device': outcome.flops,
  }


def _bound(program, module, found, target, work) -> roofline.Bound:
  rates = roofline.chip_rates(target, program.mesh)
  return roofline.Bound(
    compute=work['passes'] / (target.chip.bf16 * target.chips),
    memory=roofline.traffic(module, program.trips)
    / (target.chip.hbm_rate / target.chip.devices),
    links=roofline.links(found, rates),
  )


def lines(row: Mapping[str, Any]) -> list[str]:
  """What is printed of one program."""
  mesh = ' '.join(f'{axis}={n}' for axis, n in row['mesh'].items())
  held = row['hbm']
  out = [
    f'{row["program"]} on {row["topology"]} ({row["chips"]} chips, '
    f'{row["devices"]} devices), mesh {mesh or "of one device"}',
    f'  compiled in {row["compile_seconds"]:.0f} s, '
    f'{gib(row["compiler_bytes"])} of this machine',
    f'  HBM of a device {gib(held["peak"])} of {gib(held["limit"])}: '
    + ', '.join(
      f'{name} {gib(value)}'
      for name, value in held.items()
      if name not in ('limit', 'peak') and value
    ),
  ]
  if not row['fits']:
    return [*out, '  DOES NOT FIT']
  return [*out, *_collective_lines(row['collectives']), *_bound_lines(row)]


def _collective_lines(found: Mapping[str, Any]) -> list[str]:
  out = [
    f'  collectives {gb(found["bytes"])} a device and call, '
    f'{gb(found["expected"])} by count{difference(found)}'
  ]
  for row in found['rows']:
    if max(row['bytes'], row['expected']) < SMALL * found['bytes']:
      continue
    out.append(
      f'    {row["kind"]:18} {row["axes"]:16} {gb(row["bytes"]):>10} '
      f'{gb(row["expected"]):>10}{difference(row)}'
    )
    for one in row.get('instructions', ()):
      out.append(f'      {gb(one["bytes"])} {one["name"]} {one["origin"]}')
  return out


def _bound_lines(row: Mapping[str, Any]) -> list[str]:
  parts = ', '.join(f'{k} {1e3 * v:.1f}' for k, v in row['seconds'].items())
  out = [
    f'  at least {1e3 * row["bound"]["seconds"]:.1f} ms a call, bound by '
    f'{row["bound"]["by"]} (ms: {parts})'
  ]
  if row['tokens']:
    work = row['flops']
    out.append(
      f'  {work["useful"]:.3g} FLOPs of the model, {work["done"]:.3g} done, '
      f'{work["passes"]:.3g} in bfloat16 passes; the compiler counts '
      f'{work["compiler_per_device"]:.3g} a device, each loop body once'
    )
    out.append(
      f'  MFU at most {100 * row["mfu"]:.1f}%, '
      f'{row["tokens_per_second_per_chip"]:,.0f} tokens/s a chip'
    )
  return out


def gib(size: float) -> str:
  return f'{size / 2**30:.2f} GiB'


def gb(size: float) -> str:
  return f'{size / 1e9:.3f} GB'


def difference(row: Mapping[str, Any]) -> str:
  if not row['expected']:
    return ' (not counted)'
  return f' ({100 * (row["bytes"] / row["expected"] - 1):+.1f}%)'
