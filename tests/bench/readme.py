"""Writes the READMEs' tables of measurements from `results/*.json`.

    python -m tests.bench.readme

Each table stands between `<!-- results: NAME -->` and `<!-- end -->`. A table
whose results are absent says so; no number in it is ever typed by hand. The
test beside this file fails when README and the results differ.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.bench import record

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / 'README.md'
LAUNCH = ROOT / 'launch' / 'README.md'
BLOCK = re.compile(
  r'(<!-- results: (?P<name>\w+) -->\n)(?P<body>.*?)(<!-- end -->)', re.DOTALL
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; '' without rows."""
  if not rows:
    return ''
  lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


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
  return table(head, rows)


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
    f'`{run["commit"][:9]}`',
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
      f'`{result["commit"][:9]}`',
    ]
    for result in results
    for row in result['rows']
  ]
  head = (
    'config', 'parameters', 'tokens a step', 'median ms', 'n', 'tokens/s',
    'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def by_tokens(result: dict[str, Any]) -> list[dict[str, Any]]:
  """A result's rows; those of a case, such as a rate, need no tokens."""

  def size(row: dict[str, Any]) -> tuple[int, int]:
    return row.get('tokens', 0), row.get('experts', 0)

  return sorted(result['rows'], key=size)


def grouped_matmul(results: Sequence[dict[str, Any]]) -> str:
  """The experts' first product, evenly routed."""

  def shown(row: dict[str, Any]) -> bool:
    return row['operation'] == 'product' and row['routing'] == 'uniform'

  rows = [
    [
      str(row['experts']),
      f'{row["tokens"]:,}',
      *(
        f'{1e3 * row["seconds"][name]["median"]:.2f}'
        if name in row['seconds']
        else ''
        for name in ('mosaic_gpu', 'torch.grouped_mm', 'xla')
      ),
      f'{row["ratio_to_floor"]:.2f}',
      result['device'],
      f'`{result["commit"][:9]}`',
    ]
    for result in results
    for row in by_tokens(result)
    if 'seconds' in row and shown(row)
  ]
  head = (
    'experts', 'tokens', 'Pallas ms', 'torch ms', 'XLA ms', 'over floor',
    'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def moe(results: Sequence[dict[str, Any]]) -> str:
  """The whole expert layer, evenly routed, forward and with all gradients."""

  def milliseconds(row: dict[str, Any], name: str) -> str:
    found = row['seconds'].get(name)
    return f'{1e3 * found["median"]:.2f}' if found else ''

  def saved(row: dict[str, Any], name: str) -> str:
    size = row['saved_bytes'].get(name)
    return f'{size / 2**20:,.0f}' if size else ''

  rows = [
    [
      {'forward': 'forward', 'both': 'with gradients'}[row['direction']],
      str(row['experts']),
      f'{row["tokens"]:,}',
      *(milliseconds(row, x) for x in ('mosaic_gpu', 'torch', 'torch.compile')),
      f'{row["ratio_to_floor"]:.2f}',
      *(saved(row, name) for name in ('mosaic_gpu', 'torch')),
      result['device'],
      f'`{result["commit"][:9]}`',
    ]
    for result in results
    for row in by_tokens(result)
    if row.get('routing') == 'uniform'
  ]
  head = (
    'layer', 'experts', 'tokens', 'Pallas ms', 'torch ms', 'torch.compile ms',
    'over floor', 'keeps MiB', 'torch keeps MiB', 'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def route(results: Sequence[dict[str, Any]]) -> str:
  """What comes before and after the experts, evenly routed."""
  rows = [
    [
      row['part'],
      str(row['experts']),
      f'{row["tokens"]:,}',
      *(
        f'{1e6 * row["seconds"][name]["median"]:.0f}'
        for name in ('ours', 'torch', 'xla')
      ),
      f'{row["ratio_to_floor"]:.2f}',
      result['device'],
      f'`{result["commit"][:9]}`',
    ]
    for result in results
    for row in by_tokens(result)
    if row['part'] in ('permute', 'combine') and row['routing'] == 'uniform'
  ]
  head = (
    'part', 'experts', 'tokens', 'Pallas us', 'torch us', 'XLA us',
    'over floor', 'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def decode_experts(results: Sequence[dict[str, Any]]) -> str:
  """All experts on one device, evenly routed."""

  def shown(row: dict[str, Any]) -> bool:
    return row.get('routing') == 'uniform' and row['held'] == 256

  def microseconds(row: dict[str, Any], name: str) -> str:
    found = row['seconds'].get(name)
    return f'{1e6 * found["median"]:,.0f}' if found else ''

  rows = [
    [
      str(row['tokens']),
      row['format'],
      f'{row["distinct"]:.0f}',
      microseconds(row, 'mosaic_gpu'),
      f'{1e6 * row["floor_seconds"]:,.0f}',
      f'{100 * row["share"]:.0f}%',
      microseconds(row, 'training path'),
      microseconds(row, 'torch.grouped_mm'),
      str(row['seconds']['mosaic_gpu']['n']),
      result['device'],
      f'`{result["commit"][:9]}`',
    ]
    for result in results
    for row in result['rows']
    if shown(row)
  ]
  head = (
    'tokens', 'weights', 'experts read', 'us', 'reading alone, us',
    'share of bandwidth', 'our training path, us', 'torch, us', 'n',
    'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def expert_parallel(results: Sequence[dict[str, Any]]) -> str:
  """The expert layer over two GPUs: each strategy's best, and the peer."""

  def milliseconds(row: dict[str, Any], name: str) -> str:
    found = row['seconds'].get(name)
    return f'{1e3 * found["median"]:.2f}' if found else ''

  def cells(row: dict[str, Any], strategy: str, rate: float) -> list[str]:
    names = [x for x in row['hidden'] if x.startswith(f'{strategy}:')]
    best = max(names, key=row['of_single'].__getitem__)
    torch = row['of_single'].get('torch')
    return [
      {'forward': 'forward', 'both': 'with gradients'}[row['direction']],
      f'{row["tokens"]:,}',
      milliseconds(row, 'single'),
      f'`{strategy}`, {best.rpartition(":")[2]}',
      milliseconds(row, best),
      f'{100 * row["of_single"][best]:.1f}%',
      f'{100 * row["hidden"][best]:.0f}%',
      f'{rate / 1e9:,.0f}',
      milliseconds(row, 'torch'),
      f'{100 * torch:.1f}%' if torch else '',
    ]

  rows = [
    [
      *cells(row, strategy, rate),
      f'{result["device"]} x {row["devices"]}',
      f'`{result["commit"][:9]}`',
    ]
    for result in results
    for row in result['rows']
    for strategy, rate in row.get('useful_bytes_per_second', {}).items()
  ]
  head = (
    'layer', 'tokens a GPU', 'one GPU, ms', 'strategy, chunks', 'ms',
    'of one GPU', 'hidden', 'useful GB/s', 'torch, ms', 'torch of one GPU',
    'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def tpu_kernels(results: Sequence[dict[str, Any]]) -> str:
  """What the compiler says of the largest kernels, at one shape."""
  names = 'up', 'down_backward', 'weight_gradient', 'product', 'megablox'

  def mebibytes(row: dict[str, Any]) -> str:
    if not row.get('vmem_bytes'):
      return ''
    return f'{row["vmem_bytes"] / 2**20:.0f} of {row["vmem_limit"] >> 20}'

  rows = [
    [
      f'`{row["operation"]}`',
      row['device'],
      f'{row["moved_over_ideal"]:.2f}',
      mebibytes(row),
      f'{100 * row["matrix_slots"]:.0f}%',
      f'{1e3 * row["optimal_seconds"]:.2f}',
      f'{row["compile_seconds"]:.1f}',
      f'`{result["commit"][:9]}`',
    ]
    for name in names
    for result in results
    for row in result['rows']
    if (row['operation'], row['tokens'], row['experts']) == (name, 8192, 256)
  ]
  head = (
    'kernel', 'compiled for', 'bytes / ideal', 'vector memory, MiB',
    'matrix slots filled', "compiler's estimate, ms", 'compile s', 'commit',
  )  # fmt: skip
  return table(head, rows)


def plan(results: Sequence[dict[str, Any]]) -> str:
  """A row for each program on each pod, compiled and never run."""

  def gib(size: float) -> str:
    return f'{size / 2**30:.1f}'

  rows = [
    [
      result['device'],
      row['program'],
      ' '.join(f'{axis}={n}' for axis, n in row['mesh'].items()),
      f'{row["tokens"]:,}',
      f'{gib(row["hbm"]["peak"])} of {gib(row["hbm"]["limit"])}',
      *(
        gib(sum(row['hbm'][name] for name in names.split()))
        for names in ('weights', 'optimiser', 'residuals cache', 'work')
      ),
      f'{row["collectives"]["bytes"] / 1e9:,.2f}',
      difference(row['collectives']),
      f'{1e3 * row["bound"]["seconds"]:,.0f} ({row["bound"]["by"]})',
      f'{100 * row["mfu"]:.0f}%',
      f'{row["tokens_per_second_per_chip"]:,.0f}',
      f'{row["compile_seconds"]:.0f}',
      gib(row['compiler_bytes']),
      f'`{result["commit"][:9]}`',
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
  return table(head, rows)


def difference(row: dict[str, Any]) -> str:
  return f'{100 * (row["bytes"] / row["expected"] - 1):+.1f}%'


TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
  'quickstart': quickstart,
  'step_time': step_time,
  'grouped_matmul': grouped_matmul,
  'moe': moe,
  'route': route,
  'decode_experts': decode_experts,
  'expert_parallel': expert_parallel,
  'tpu_kernels': tpu_kernels,
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
