"""Charts of what was recorded step by step: metrics and introspection."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2.obs import page

POINTS = 500  # of one line in a chart; more are averaged in equal buckets
FRAMES = 60  # of the expert heat map's slider, at most
CELLS = 200_000  # of all its frames together: what a page can hold with ease

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Panel:
  """A line chart: which metrics it draws and how.

  Attributes:
    section: of the page.
    title: heading of the chart.
    unit: of the vertical axis, written beside it.
    keys: metric names -> names in the legend.
    percent: values are shares in [0, 1].
    log: logarithmic axis; values of 0 are left out.
    note: one sentence under the chart.
  """

  section: str
  title: str
  unit: str
  keys: Mapping[str, str]
  percent: bool = False
  log: bool = False
  note: str = ''


PANELS = (
  Panel(
    'learning',
    'Training loss',
    'nats per trained token',
    {'ce': 'cross-entropy', 'mtp': 'multi-token prediction'},
  ),
  Panel(
    'learning',
    'Reward',
    'per episode',
    {'reward/mean': 'mean', 'reward/std': 'standard deviation'},
  ),
  Panel(
    'learning',
    'Episodes passed',
    'share of episodes',
    {
      'reward/passed': 'passed',
      'group/zero_variance_frac': 'groups of equal outcomes: no signal',
    },
    percent=True,
    note='On training tasks, at the sampling temperature; not the sealed test.',
  ),
  Panel(
    'faithful',
    'Rollout against trainer',
    'nats',
    {'mismatch/max': 'largest gap', 'mismatch/mean': 'mean gap'},
    log=True,
    note='Absolute difference of the log-probabilities that engine and trainer '
    'give the same token under the same weights.',
  ),
  Panel('faithful', 'Entropy', 'nats per token', {'policy/entropy': 'entropy'}),
  Panel(
    'faithful',
    'Importance ratio',
    'probability now / when sampled',
    {
      'ratio/p95': '95th percentile',
      'ratio/p50': 'median',
      'ratio/p05': '5th percentile',
    },
  ),
  Panel(
    'faithful',
    'Effective sample size',
    'share of trained tokens',
    {'ratio/ess': 'effective sample size', 'ratio/clipped': 'ratio clipped'},
    percent=True,
  ),
  Panel(
    'faithful',
    'Age of rollouts',
    'weight versions',
    {'stale/max': 'oldest', 'stale/mean': 'mean'},
  ),
)


def lines(metrics: Mapping[str, Rows]) -> Iterator[page.Chart]:
  """Line charts of all panels.

  Args:
    metrics: rows of each run's metrics.jsonl by the run's folder. Runs side by
      side in one folder (the arms of a comparison) share a chart.

  Yields:
    One chart for each panel and group of runs that recorded its metrics.
  """
  groups: dict[str, list[str]] = {}
  for name in metrics:
    groups.setdefault(name.rpartition('/')[0] or name, []).append(name)
  for panel in PANELS:
    for group, names in groups.items():
      series = []
      for name in names:
        arm = '' if len(names) == 1 else name.rpartition('/')[2] + ': '
        series += _series(panel, metrics[name], arm)
      if series:
        yield _chart(panel, group, series)


def _series(panel: Panel, rows: Rows, arm: str) -> list[dict[str, Any]]:
  """The panel's lines of one run, those it recorded."""
  found = []
  for key, label in panel.keys.items():
    points = [
      (row['step'], row[key])
      for row in rows
      if finite(row.get('step'))
      and finite(row.get(key))
      and (row[key] > 0 or not panel.log)
    ]
    if points:
      found.append({'name': arm + label, 'points': points})
  return found


def finite(value: Any) -> bool:
  """Whether a value from a file is a number that can be drawn."""
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # an integer of hundreds of digits
    return False


def _chart(
  panel: Panel, group: str, series: list[dict[str, Any]]
) -> page.Chart:
  bucket = max(-(-len(one['points']) // POINTS) for one in series)
  note = panel.note
  if bucket > 1:
    note = f'{note} Each point is the mean of {bucket} records.'.strip()
  ends = '; '.join(f'{s["name"]} {s["points"][-1][1]:.4g}' for s in series)
  title = f'{panel.title}: {group}'
  return page.Chart(
    section=panel.section,
    title=title,
    note=note,
    data={
      'kind': 'lines',
      'x': 'step',
      'y': panel.unit,
      'unit': '%' if panel.percent else '',
      'log': panel.log,
      'domain': [0, 1] if panel.percent else None,
      'series': [s | {'points': thin(s['points'], bucket)} for s in series],
      'summary': f'{title}. At the end: {ends}.',
    },
  )


def thin(
  points: Sequence[tuple[float, float]], bucket: int
) -> list[tuple[float, float]]:
  """Means over `bucket` consecutive points, each at the last one's step."""
  parts = [points[i : i + bucket] for i in range(0, len(points), bucket)]
  return [(p[-1][0], sum(y for _, y in p) / len(p)) for p in parts]


def heat(records: Mapping[str, Rows]) -> Iterator[page.Chart]:
  """Expert load over layers, experts and time, one chart a run.

  Args:
    records: rows of each run's introspection.jsonl; `expert_load` is a list
      over layers of lists over experts, shares of the layer's assignments.

  Yields:
    Two charts for each run whose records hold the load; at most `FRAMES` steps
    and `CELLS` values, evenly chosen, the last step included.
  """
  for name, rows in records.items():
    loads = [row for row in rows if finite(row.get('step')) and _is_load(row)]
    if not loads:
      continue
    last = loads[-1]['expert_load']
    room = max(CELLS // (len(last) * len(last[0])), 1)
    every = -(-len(loads) // min(FRAMES, room))
    frames = [
      {
        'step': row['step'],
        # A share times the number of experts: 1 is a fair share.
        'load': [
          [round(x * len(ys), 3) for x in ys] for ys in row['expert_load']
        ],
      }
      for row in loads[::-1][::every][::-1]
    ]
    yield _heat_chart(name, frames)
    yield _busiest(name, frames)


def _is_load(row: dict[str, Any]) -> bool:
  """Whether `expert_load` can be drawn: numbers of every expert of layers."""
  layers = row.get('expert_load')
  return (
    isinstance(layers, list)
    and bool(layers)
    and all(isinstance(layer, list) and layer for layer in layers)
    and all(finite(x) for layer in layers for x in layer)
  )


def _heat_chart(name: str, frames: list[dict[str, Any]]) -> page.Chart:
  last = max(x for layer in frames[-1]['load'] for x in layer)
  return page.Chart(
    section='experts',
    title=f'Load of every expert: {name}',
    note='Tokens sent to an expert over the fair share of its layer, in the '
    'batch of the step that the slider picks.',
    data={
      'kind': 'heat',
      'frames': frames,
      'summary': f'Expert load, {name}: at step {frames[-1]["step"]} the '
      f'busiest expert has {last:.2f} of a fair share.',
    },
  )


def _busiest(name: str, frames: list[dict[str, Any]]) -> page.Chart:
  """Imbalance over time, in up to six layers from first to last."""
  layers = len(frames[0]['load'])
  chosen = sorted({round(i * (layers - 1) / 5) for i in range(6)})
  series = [
    {
      'name': f'layer {layer}',
      'points': [(f['step'], max(f['load'][layer])) for f in frames],
    }
    for layer in chosen
  ]
  panel = Panel('experts', 'Busiest expert', 'fair shares', {})
  return _chart(panel, name, series)
