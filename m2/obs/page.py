"""HTML of the report: what `m2.obs.dashboard` collected, as one page.

Every text from a file passes through `text` (html.escape) or, inside the data
block, through `embed`: a transcript that holds `</script>` is shown as such.
"""

import dataclasses
import html
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HTML = pathlib.Path(__file__).parent / 'html'
SECTIONS = (
  ('result', 'Result'),
  ('learning', 'How it learned'),
  ('skills', 'Skill by skill'),
  ('evolve', 'Self-evolution'),
  ('faithful', 'Rollouts and trainer'),
  ('experts', 'Experts'),
  ('episodes', 'Turn by turn'),
  ('notes', 'How to read this'),
)

# Of `evolve` in results.json, what is not left to the table of facts.
SHOWN = ('verdict', 'reasons', 'evidence', 'edits')


@dataclasses.dataclass(frozen=True)
class Chart:
  """One chart: where it stands, its words, and what `charts.js` draws."""

  section: str
  title: str
  note: str
  data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Episode:
  """One trajectory: a heading and its messages (OpenAI-style dictionaries)."""

  title: str
  passed: bool
  verdict: str
  messages: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
  """All that the page shows; empty parts are left out.

  Attributes:
    title: heading of the page.
    stages: rows of the result table, as in results.json.
    differences: paired comparisons, as in results.json.
    tiles: short facts, (value, what it is).
    charts: in any order; each names its section.
    verdict: `evolve` of results.json.
    ledger: entries of the evolution round's record.
    episodes: trajectories.
    notes: sentences a reader must know before believing a number.
    environment: where it ran, by name.
    unreadable: file -> lines that could not be read.
  """

  title: str
  stages: Sequence[Mapping[str, Any]]
  differences: Sequence[Mapping[str, Any]]
  tiles: Sequence[tuple[str, str]]
  charts: Sequence[Chart]
  verdict: Mapping[str, Any]
  ledger: Sequence[Mapping[str, Any]]
  episodes: Sequence[Episode]
  notes: Sequence[str]
  environment: Mapping[str, Any]
  unreadable: Mapping[str, int]


def text(value: Any) -> str:
  """Any value as text that cannot become markup."""
  return html.escape(str(value))


def embed(value: Any) -> str:
  """JSON for a <script> block: no value in it can end the block."""
  out = json.dumps(value, ensure_ascii=True, allow_nan=False)
  return out.replace('<', '\\u003c').replace('>', '\\u003e')


def percent(value: float | None) -> str:
  return '-' if value is None else f'{100 * value:.1f}%'


def interval(ends: Sequence[float]) -> str:
  return f'[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]'


def render(run: Run) -> str:
  """The whole page."""
  parts = {
    'result': _result(run),
    'evolve': _evolve(run),
    'episodes': _episodes(run.episodes),
    'notes': _notes(run),
  }
  charts = []
  for section, _ in SECTIONS:
    own = [chart for chart in run.charts if chart.section == section]
    parts[section] = parts.get(section, '') + _figures(own, len(charts))
    charts += own
  shown = [(key, title) for key, title in SECTIONS if parts[key]]
  body = ''.join(
    f'<section id="{key}"><h2>{title}</h2>{parts[key]}</section>'
    for key, title in shown
  )
  links = ''.join(f'<a href="#{key}">{title}</a>' for key, title in shown)
  data = embed({'charts': [chart.data for chart in charts]})
  style, *scripts = (
    (HTML / name).read_text(encoding='utf-8')
    for name in ('style.css', 'charts.js', 'app.js')
  )
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
    " style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">"
    f'<title>{text(run.title)}</title><style>\n{style}</style></head><body>'
    '<header><button id="theme" type="button">Light or dark</button>'
    f'<h1>{text(run.title)}</h1>{_lead(run)}<nav>{links}</nav>'
    f'{_tiles(run.tiles)}</header>'
    f'<main>{body}</main>'
    f'<footer>{_environment(run.environment)}</footer>'
    f'<script type="application/json" id="data">{data}</script>'
    + ''.join(f'<script>\n{script}</script>' for script in scripts)
    + '</body></html>\n'
  )


def _lead(run: Run) -> str:
  """The finding in one sentence: the first paired difference over all tasks."""
  whole = [row for row in run.differences if row.get('skill') is None]
  if not whole:
    return ''
  row = whole[0]
  rates = {stage['name']: percent(stage['rate']) for stage in run.stages}
  return (
    f'<p class="lead">On {row["n"]} sealed test tasks, success went from '
    f'{text(rates.get(row["before"], "?"))} ({text(row["before"])}) to '
    f'{text(rates.get(row["after"], "?"))} ({text(row["after"])}): '
    f'{100 * row["mean"]:+.1f} points, 95% interval '
    f'{interval(row["interval"])}.</p>'
  )


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
  cells = ''.join(
    f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>'
    for value, name in tiles
  )
  return f'<div class="tiles">{cells}</div>' if cells else ''


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table of plain text; every column but the first is a number."""
  kinds = ['word', *['number'] * (len(head) - 1)]
  top = ''.join(
    f'<th class="{kind}" scope="col">{text(name)}</th>'
    for kind, name in zip(kinds, head)
  )
  body = ''.join(
    '<tr>'
    + ''.join(
      f'<td class="{kind}">{text(cell)}</td>' for kind, cell in zip(kinds, row)
    )
    + '</tr>'
    for row in rows
  )
  return f'<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _result(run: Run) -> str:
  out = ''
  if run.stages:
    head = (
      'stage',
      'success',
      '95% interval',
      'passed',
      'training s',
      'tokens',
    )
    rows = [
      (
        stage['name'] + (' (adopted)' if stage.get('adopted') else ''),
        percent(stage['rate']),
        interval(stage['interval']),
        f'{stage["successes"]} of {stage["n"]}',
        f'{stage["seconds"]:,.0f}',
        f'{stage["tokens"]:,}',
      )
      for stage in run.stages
    ]
    out += f'<div class="card">{table(head, rows)}</div>'
  if run.differences:
    head = ('paired by task', 'gain, points', '95% interval', 'tasks')
    rows = [
      (
        f'{row["after"]} over {row["before"]}, {row.get("skill") or "all"}',
        f'{100 * row["mean"]:+.1f}',
        interval(row['interval']),
        str(row['n']),
      )
      for row in run.differences
    ]
    out += f'<div class="card">{table(head, rows)}</div>'
  return out


def _figures(charts: Sequence[Chart], first: int) -> str:
  """Places for the charts; `first` is the index of the first in the data."""
  cards = ''
  for index, chart in enumerate(charts, first):
    note = f'<p class="note">{text(chart.note)}</p>' if chart.note else ''
    wide = '' if chart.data['kind'] == 'lines' else ' wide'
    cards += (
      f'<div class="card{wide}"><h3>{text(chart.title)}</h3>'
      f'<figure data-chart="{index}"></figure>{note}</div>'
    )
  if not cards:
    return ''
  return f'<div class="grid2">{cards}</div>' if len(charts) > 1 else cards


def facts(values: Mapping[str, Any]) -> str:
  """A mapping as a two-column table; nested values as JSON."""
  rows = ''.join(
    f'<tr><td>{text(name)}</td><td class="word">{_fact(value)}</td></tr>'
    for name, value in values.items()
  )
  return f'<table><tbody>{rows}</tbody></table>'


def _fact(value: Any) -> str:
  if isinstance(value, float):
    return text(f'{value:.4g}')
  if isinstance(value, str | int) or value is None:
    return text(value)
  return f'<code>{text(json.dumps(value, ensure_ascii=False))}</code>'


def _badge(word: str) -> str:
  good = {'keep': 'good', 'pass': 'good', 'revert': 'bad', 'fail': 'bad'}
  return f'<span class="badge {good.get(word, "")}">{text(word)}</span>'


def _evolve(run: Run) -> str:
  out = ''
  if run.verdict:
    rest = {k: v for k, v in run.verdict.items() if k not in SHOWN}
    word = run.verdict.get('verdict', '')
    reasons = ''.join(
      f'<li>{text(reason)}</li>' for reason in run.verdict.get('reasons', ())
    )
    evidence = ''.join(
      f'<li>{text(item.get("text", item))}'
      f'<span class="soft"> {text(item.get("source", ""))}</span></li>'
      for item in run.verdict.get('evidence', ())
    )
    edits = ''.join(
      f'<li><code>{text(edit["path"])}</code> {text(edit["old"])} → '
      f'{text(edit["new"])}</li>'
      for edit in run.verdict.get('edits', ())
    )
    out += (
      f'<div class="card"><h3>Verdict {_badge(word)}</h3><ul>{reasons}</ul>'
      f'<h3>Evidence</h3><ul>{evidence}</ul>'
      f'<h3>Edit</h3><ul>{edits}</ul>{facts(rest)}</div>'
    )
  if run.ledger:
    items = ''.join(_entry(entry) for entry in run.ledger)
    out += (
      '<div class="card"><h3>Ledger</h3><p class="note">Append-only: every '
      'entry carries the hash of the one before.</p>'
      f'<ol class="ledger">{items}</ol></div>'
    )
  return out


def _entry(entry: Mapping[str, Any]) -> str:
  """One line of the ledger, its particulars folded away."""
  short = text(str(entry.get('hash', ''))[:12])
  data = entry.get('data')
  word = data.get('verdict') if isinstance(data, Mapping) else None
  return (
    f'<li><b>{text(entry.get("index", ""))}. {text(entry.get("kind", ""))}</b> '
    f'{_badge(word) if isinstance(word, str) else ""} '
    f'<span class="soft">{text(entry.get("time", ""))}</span>'
    f'<details><summary>particulars, hash <code>{short}</code></summary>'
    f'{facts(_mapping(data))}</details></li>'
  )


def _mapping(value: Any) -> Mapping[str, Any]:
  return value if isinstance(value, Mapping) else {'value': value}


def _episodes(episodes: Sequence[Episode]) -> str:
  if not episodes:
    return ''
  options = ''.join(
    f'<option value="episode-{i}">{text(episode.title)}</option>'
    for i, episode in enumerate(episodes)
  )
  bodies = ''.join(
    f'<div class="trajectory" id="episode-{i}">'
    f'<p>{_badge("pass" if one.passed else "fail")} {text(one.verdict)}</p>'
    f'{"".join(_turn(message) for message in one.messages)}</div>'
    for i, one in enumerate(episodes)
  )
  return (
    '<div class="card"><p><label>Episode <select id="trajectory">'
    f'{options}</select></label></p>{bodies}</div>'
  )


def _turn(message: Mapping[str, Any]) -> str:
  role = str(message.get('role', ''))
  out = f'<div class="who">{text(role)}</div>'
  if message.get('reasoning_content'):
    out += f'<div class="thought">{text(message["reasoning_content"])}</div>'
  if message.get('content'):
    out += f'<pre>{text(message["content"])}</pre>'
  for call in message.get('tool_calls') or ():
    inner = call.get('function', call)
    out += f'<div class="call"><b>{text(inner.get("name", ""))}</b>'
    for name, value in _mapping(inner.get('arguments')).items():
      out += f'<pre><span class="soft">{text(name)}</span>\n{text(value)}</pre>'
    out += '</div>'
  kind = role if role in ('user', 'assistant', 'tool', 'system') else ''
  return f'<div class="turn {kind}">{out}</div>'


def _notes(run: Run) -> str:
  notes = list(run.notes)
  notes += [
    f'{count} unreadable line{"s" * (count > 1)} of {name} left out.'
    for name, count in run.unreadable.items()
  ]
  items = ''.join(f'<li>{text(note)}</li>' for note in notes)
  return f'<div class="card"><ul>{items}</ul></div>' if items else ''


def _environment(values: Mapping[str, Any]) -> str:
  return ' · '.join(
    f'{text(name)} {text(value)}' for name, value in values.items()
  )
