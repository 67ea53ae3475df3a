"""Writes the READMEs' tables of measurements from `results/*.json`.

    python -m tests.bench.readme

Each table stands between `<!-- results: NAME -->` and `<!-- end -->`. A table
whose results are absent says so; no number in it is ever typed by hand. The
test beside this file fails when README and the results differ.
"""

import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.bench import layer_tables, record

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / 'README.md'
LAUNCH = ROOT / 'launch' / 'README.md'
BLOCK = re.compile(
  r'(<!-- results: (?P<name>\w+) -->\n)(?P<body>.*?)(<!-- end -->)', re.DOTALL
)


def points(difference: dict[str, Any] | None) -> str:
  """A paired gain in points with its interval."""
  if not difference:
    return 'none'
  low, high = (100 * end for end in difference['interval'])
  return f'{100 * difference["mean"]:+.1f} [{low:+.1f}, {high:+.1f}]'


def quickstart(results: Sequence[dict[str, Any]]) -> str:
  """A row for each seed on each machine."""
  rows = [
    quickstart_row(result['device'], run)
    for result in results
    for run in result['rows']
  ]
  head = (
    'seed', 'SFT', 'RL', 'RL over SFT, points', 'evolve round', 'n',
    'minutes', 'peak GiB', 'machine', 'commit',
  )  # fmt: skip
  return layer_tables.table(head, rows)


def quickstart_row(device: str, run: dict[str, Any]) -> list[str]:
  stages = {stage['name']: stage for stage in run['stages']}
  whole = [x for x in run['differences'] if x['skill'] is None]
  pairs = {(x['after'], x['before']): x for x in whole}
  verdict = run['evolve']['verdict']
  if verdict != 'none':
    verdict += f': {run["evolve"]["skill"]}'
  return [
    str(run['seed']),
    f'{100 * stages["sft"]["rate"]:.1f}%',
    f'{100 * stages["rl"]["rate"]:.1f}%',
    points(pairs.get(('rl', 'sft'))),
    verdict,
    str(stages['rl']['n']),
    f'{run["seconds"] / 60:.1f}',
    f'{run["peak_bytes"] / 2**30:.1f}',
    f'{device}, {run["environment"]["cores"]} cores',
    layer_tables.commit(run),
  ]


def step_time(results: Sequence[dict[str, Any]]) -> str:
  """A row for each config on each device."""
  rows = [
    [
      f'`{row["config"]}`',
      f'{row["parameters"]:,}',
      f'{row["tokens_per_step"]:,}',
      f'{1e3 * row["seconds"]["median"]:.1f}',
      str(row['seconds']['n']),
      f'{row["tokens_per_second"]:,.0f}',
      f'{result["device"]} x {row["devices"]}',
      layer_tables.commit(result),
    ]
    for result in results
    for row in result['rows']
  ]
  head = (
    'config', 'parameters', 'tokens a step', 'median ms', 'n', 'tokens/s',
    'device', 'commit',
  )  # fmt: skip
  return layer_tables.table(head, rows)


def plan(results: Sequence[dict[str, Any]]) -> str:
  """A row for each program on each pod, compiled and never run."""

  def gib(size: float) -> str:
    return f'{size / 2**30:.1f}'

  rows = [
    [
      result['device'],
      row['program'],
      ' '.join(f'{axis}={n}' for axis, n in row['mesh'].items()),
      f'{row["tokens"]:,}' if row['tokens'] else '',
      f'{gib(row["hbm"]["peak"])} of {gib(row["hbm"]["limit"])}',
      *(
        gib(sum(row['hbm'][name] for name in names.split()))
        for names in ('weights', 'optimiser', 'residuals cache', 'work')
      ),
      f'{row["collectives"]["bytes"] / 1e9:,.2f}',
      difference(row['collectives']),
      f'{1e3 * row["bound"]["seconds"]:,.0f} ({row["bound"]["by"]})',
      f'{100 * row["mfu"]:.0f}%' if row['tokens'] else '',
      f'{row["tokens_per_second_per_chip"]:,.0f}' if row['tokens'] else '',
      f'{row["compile_seconds"]:.0f}',
      gib(row['compiler_bytes']),
      layer_tables.commit(result),
    ]
    for result in results
    for row in result['rows']
    if row['fits']
  ]
  head = (
    'pod', 'program', 'mesh', 'tokens a call', 'HBM of a device, GiB',
    'weights', 'optimiser', 'kept or cache', 'work', 'sent a device, GB',
    'over count', 'least ms (by)', 'MFU at most', 'tokens/s a chip at most',
    'compile s', 'compiler GiB', 'commit',
  )  # fmt: skip
  return layer_tables.table(head, rows)


def stream(results: Sequence[dict[str, Any]]) -> str:
  """Medians of the loads of each machine, in bytes of files a second."""

  def cells(result: dict[str, Any]) -> list[str]:
    loads = [row for row in result['rows'] if row['case'] == 'load']

    def median(name: str) -> float:
      return statistics.median(row[name] for row in loads)

    saves = [row for row in result['rows'] if 'codes_equal' in row]
    same = min(row['codes_equal'] for row in saves)
    return [
      f'{loads[0]["bytes"] / 1e9:.1f}',
      *(f'{median(name) / 1e9:.2f}' for name in ('disk', 'core', 'load')),
      f'{100 * median("of_slower"):.0f}%',
      f'{(median("peak") - loads[0]["share"]) / 2**30:.2f}',
      f'{100 * same:.0f}%',
      str(len(loads)),
      result['device'],
      layer_tables.commit(result),
    ]

  head = (
    'GB in files', 'disk, GB/s', 'one core, GB/s', 'load, GB/s',
    'of the slower', 'peak over weights, GiB', 'codes that came back', 'n',
    'machine', 'commit',
  )  # fmt: skip
  return layer_tables.table(head, [cells(result) for result in results])


def difference(row: dict[str, Any]) -> str:
  return f'{100 * (row["bytes"] / row["expected"] - 1):+.1f}%'


TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
  'quickstart': quickstart,
  'step_time': step_time,
  **layer_tables.TABLES,
  'stream': stream,
}


LAUNCH_TABLES = {'plan': plan}


def render(
  text: str,
  folder: pathlib.Path = record.RESULTS,
  tables: Mapping[str, Callable] = TABLES,
) -> str:
  """`text` with every results block made anew.

  Raises:
    ValueError: a block names no known table, or a known table has no block.
  """
  names = [match['name'] for match in BLOCK.finditer(text)]
  if sorted(names) != sorted(tables):
    raise ValueError(
      f'README has result blocks {sorted(names)}; expected {sorted(tables)}'
    )

  def fill(match: re.Match) -> str:
    body = tables[match['name']](record.read(match['name'], folder))
    return f'{match[1]}\n{body or "Not measured yet."}\n{match[4]}'

  return BLOCK.sub(fill, text)


def main() -> None:
  README.write_text(render(README.read_text()))
  LAUNCH.write_text(render(LAUNCH.read_text(), tables=LAUNCH_TABLES))


if __name__ == '__main__':
  main()
