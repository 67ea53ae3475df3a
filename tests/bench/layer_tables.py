"""README's tables of the expert layer and its kernels; see `readme.py`."""

from collections.abc import Callable, Sequence
from typing import Any

DIRECTIONS = {'forward': 'forward', 'both': 'with gradients'}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; '' without rows."""
  if not rows:
    return ''
  lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def commit(result: dict[str, Any]) -> str:
  """A result's commit in short, `+` after it where files had changes."""
  name, _, changes = result['commit'].partition('+')
  return f'`{name[:9]}{"+" if changes else ""}`'


def milliseconds(row: dict[str, Any], name: str) -> str:
  """A contender's median; '' where it took no part."""
  found = row['seconds'].get(name)
  return f'{1e3 * found["median"]:.2f}' if found else ''


def microseconds(row: dict[str, Any], name: str) -> str:
  """The same of what is a thousand times as fast."""
  found = row['seconds'].get(name)
  return f'{1e6 * found["median"]:,.0f}' if found else ''


def by_tokens(result: dict[str, Any]) -> list[dict[str, Any]]:
  """A result's rows; those of a case, such as a rate, need no tokens."""

  def size(row: dict[str, Any]) -> tuple[int, int]:
    return row.get('tokens', 0), row.get('experts', 0)

  return sorted(result['rows'], key=size)


def grouped_matmul(results: Sequence[dict[str, Any]]) -> str:
  """The experts' first product, evenly routed."""

  def shown(row: dict[str, Any]) -> bool:
    named = row['operation'], row.get('layer'), row.get('routing')
    return named == ('product', 'up+gate', 'uniform')

  rows = [
    [
      str(row['experts']),
      f'{row["tokens"]:,}',
      *(
        milliseconds(row, name)
        for name in ('mosaic_gpu', 'torch.grouped_mm', 'xla')
      ),
      f'{row["ratio_to_floor"]:.2f}',
      result['device'],
      commit(result),
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

  def saved(row: dict[str, Any], name: str) -> str:
    size = row['saved_bytes'].get(name)
    return f'{size / 2**20:,.0f}' if size else ''

  contenders = (
    'mosaic_gpu', 'torch', 'torch.compile', 'sonic', 'tokamax', 'liger',
  )  # fmt: skip
  rows = [
    [
      DIRECTIONS[row['direction']],
      str(row['experts']),
      f'{row["tokens"]:,}',
      *(milliseconds(row, name) for name in contenders),
      f'{row["ratio_to_floor"]:.2f}',
      *(saved(row, name) for name in ('mosaic_gpu', 'torch')),
      result['device'],
      commit(result),
    ]
    for result in results
    for row in by_tokens(result)
    if row.get('routing') == 'uniform'
  ]
  head = (
    'layer', 'experts', 'tokens', 'Pallas ms', 'torch ms', 'torch.compile ms',
    'SonicMoE ms', 'tokamax ms', 'Liger ms', 'over floor', 'keeps MiB',
    'torch keeps MiB', 'device', 'commit',
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
      f'{row["bytes_per_second"] / 1e12:.2f}',
      result['device'],
      commit(result),
    ]
    for result in results
    for row in by_tokens(result)
    if row['part'] in ('permute', 'combine') and row['routing'] == 'uniform'
  ]
  head = (
    'part', 'experts', 'tokens', 'Pallas us', 'torch us', 'XLA us',
    'Pallas TB/s', 'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def layer_parts(results: Sequence[dict[str, Any]]) -> str:
  """What a routed layer's time on the device is made of, evenly routed."""
  parts = 'route', 'plan', 'gather', 'combine', 'products'
  rows = [
    [
      DIRECTIONS[row['direction']],
      str(row['experts']),
      f'{row["tokens"]:,}',
      *(f'{1e6 * row["seconds"][part]:,.0f}' for part in parts),
      f'{100 * row["share"]:.1f}%',
      str(row['turns']),
      result['device'],
      commit(result),
    ]
    for result in results
    for row in by_tokens(result)
    if row['routing'] == 'uniform'
  ]
  head = (
    'layer', 'experts', 'tokens', *(f'{part}, us' for part in parts),
    'all but products', 'n', 'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def rounding(results: Sequence[dict[str, Any]]) -> str:
  """The layer without and with token rounding."""
  parts = {'choose': 'choices alone', **DIRECTIONS}
  rows = [
    [
      parts[row['part']],
      f'{row["tokens"]:,}',
      row['routing'],
      *(milliseconds(row, name) for name in ('top_k', 'rounded')),
      *(f'{100 * row["changed"][x]:.1f}%' for x in ('dropped', 'added')),
      result['device'],
      commit(result),
    ]
    for result in results
    for row in by_tokens(result)
  ]
  head = (
    'layer', 'tokens', 'routing', 'top 8, ms', 'rounded, ms', 'dropped',
    'added', 'device', 'commit',
  )  # fmt: skip
  return table(head, rows)


def decode_experts(results: Sequence[dict[str, Any]]) -> str:
  """All experts on one device, evenly routed."""

  def shown(row: dict[str, Any]) -> bool:
    return row.get('routing') == 'uniform' and row['held'] == 256

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
      commit(result),
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

  def cells(row: dict[str, Any], strategy: str, rate: float) -> list[str]:
    names = [x for x in row['hidden'] if x.startswith(f'{strategy}:')]
    best = max(names, key=row['of_single'].__getitem__)
    torch = row['of_single'].get('torch')
    return [
      DIRECTIONS[row['direction']],
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
      commit(result),
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
      commit(result),
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


TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
  'grouped_matmul': grouped_matmul,
  'moe': moe,
  'route': route,
  'layer_parts': layer_parts,
  'rounding': rounding,
  'decode_experts': decode_experts,
  'expert_parallel': expert_parallel,
  'tpu_kernels': tpu_kernels,
}
