"""The report: everything one run wrote, as a single HTML file.

`build(workdir)` collects what lies in the folders under `workdir`

    results.json           the table of the whole loop, as m2/stages.py states
    **/metrics.jsonl       one line a step (m2/obs/metrics.py)
    **/introspection.jsonl a record now and then (m2/train/introspect.py)
    **/eval.json           evaluations, row by row (m2/eval/run.py)
    **/ledger.jsonl        the evolution round's record (m2/evolve/ledger.py)

and writes `report.html` with styles, scripts and data inside; nothing is
fetched. A part whose file is absent is left out. A line that cannot be read is
left out, counted, and the count shown.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2.obs import curves, page

EPISODES = 8  # shown turn by turn, at most
ARMS = 4  # bars side by side for one skill, at most


def build(workdir: pathlib.Path | str) -> pathlib.Path:
  """Writes `<workdir>/report.html` in one step and returns its path.

  Args:
    workdir: a work directory of any mode; `quickstart` fills every part.

  Raises:
    FileNotFoundError: there is nothing under `workdir` to report on.
    ValueError: results.json or an eval.json is not a JSON object.
  """
  workdir = pathlib.Path(workdir)
  content = page.render(collect(workdir))
  target = workdir / 'report.html'
  part = target.with_name(f'.{target.name}.{os.getpid()}')
  part.write_text(content, encoding='utf-8', errors='backslashreplace')
  os.replace(part, target)
  return target


def collect(workdir: pathlib.Path) -> page.Run:
  """Reads all that the page shows; raises as `build` does."""
  unreadable: dict[str, int] = {}
  metrics = _read_lines(workdir, 'metrics.jsonl', unreadable)
  records = _read_lines(workdir, 'introspection.jsonl', unreadable)
  ledgers = _read_lines(workdir, 'ledger.jsonl', unreadable)
  evaluations = {
    _folder(workdir, path): _read_object(path)
    for path in sorted(workdir.rglob('eval.json'), key=_written)
  }
  path = workdir / 'results.json'
  results = _read_object(path) if path.exists() else {}
  if not (metrics or results or evaluations):
    raise FileNotFoundError(
      f'{workdir} holds no results.json, metrics.jsonl or eval.json; give the '
      'work directory of a run'
    )
  stages = results.get('stages', [])
  charts = [*_success(stages), *curves.lines(metrics), *_skills(stages)]
  return page.Run(
    title=f'M2-JAX: {results.get("mode", workdir.resolve().name)}',
    stages=stages,
    differences=results.get('differences', []),
    tiles=_tiles(results),
    charts=[*charts, *curves.heat(records)],
    verdict=results.get('evolve') or {},
    ledger=[entry for rows in ledgers.values() for entry in rows],
    episodes=list(_episodes(evaluations)),
    notes=results.get('notes', []),
    environment=_environment(results),
    unreadable=unreadable,
  )


def _folder(workdir: pathlib.Path, path: pathlib.Path) -> str:
  name = path.parent.relative_to(workdir).as_posix()
  return 'run' if name == '.' else name


def _read_lines(
  workdir: pathlib.Path, filename: str, unreadable: dict[str, int]
) -> dict[str, list[dict[str, Any]]]:
  """Rows of every `filename`, by folder, the first one written first."""
  found = {}
  for path in sorted(workdir.rglob(filename), key=_written):
    rows = []
    for line in path.read_bytes().splitlines():
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if isinstance(row, dict):
        rows.append(row)
      else:
        name = path.relative_to(workdir).as_posix()
        unreadable[name] = unreadable.get(name, 0) + 1
    if rows:
      found[_folder(workdir, path)] = rows
  return found


def _written(path: pathlib.Path) -> float:
  return path.stat().st_mtime


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds no JSON object')
  return value


def _rate(row: Mapping[str, Any]) -> dict[str, Any]:
  return {'value': row['rate'], 'interval': row['interval'], 'n': row['n']}


def _success(stages: Sequence[Mapping[str, Any]]) -> Iterator[page.Chart]:
  """Success on the sealed test, a dot with its interval for each stage."""
  if stages:
    said = '; '.join(f'{s["name"]} {page.percent(s["rate"])}' for s in stages)
    yield page.Chart(
      section='result',
      title='Success on the sealed test',
      note='Dots are shares of episodes that passed; bars are 95% intervals.',
      data={
        'kind': 'forest',
        'rows': [{'name': s['name']} | _rate(s) for s in stages],
        'summary': f'Success on the sealed test: {said}.',
      },
    )


def _skills(stages: Sequence[Mapping[str, Any]]) -> Iterator[page.Chart]:
  """Success by skill, a bar for each stage; the hardest skill first."""
  arms = [stage for stage in stages if stage.get('skills')][:ARMS]
  if not arms:
    return
  names = sorted(
    {name for arm in arms for name in arm['skills']},
    # Without a verdict there is no rate.
    key=lambda name: arms[0]['skills'].get(name, {}).get('rate') or 0.0,
  )
  groups = [
    {
      'name': name,
      'bars': [
        _rate(arm['skills'][name]) if name in arm['skills'] else None
        for arm in arms
      ],
    }
    for name in names
  ]
  yield page.Chart(
    section='skills',
    title='Success on the sealed test by skill',
    note='Thin lines are 95% intervals: with few tasks a skill, they are wide.',
    data={
      'kind': 'bars',
      'arms': [arm['name'] for arm in arms],
      'groups': groups,
      'summary': f'Success by skill for {", ".join(a["name"] for a in arms)}.',
    },
  )


def _episodes(
  evaluations: Mapping[str, Mapping[str, Any]],
) -> Iterator[page.Episode]:
  """Trajectories that eval.json files keep, newest evaluation first.

  From each evaluation in turn one that passed and one that failed, the longest
  of each: an error that the agent answered is worth reading.
  """
  kept: list[page.Episode] = []
  for folder, report in reversed(evaluations.items()):
    rows = [row for row in report.get('rows', ()) if row['transcript']]
    for passed in (True, False):
      own = [row for row in rows if row['passed'] is passed]
      if own:
        longest = max(own, key=lambda row: len(row['transcript']))
        kept.append(_episode(folder, longest))
  yield from kept[:EPISODES]


def _episode(folder: str, row: Mapping[str, Any]) -> page.Episode:
  word = 'passed' if row['passed'] else f'failed ({row["error_class"]})'
  told = [row['evidence']] if row['evidence'] else []
  if row['malformed']:
    told.append(f'{row["malformed"]} of {row["turns"]} turns malformed')
  return page.Episode(
    title=f'{folder}: {row["skill"]}, {word}, {row["task"]}',
    passed=row['passed'],
    verdict='; '.join(told),
    messages=row['transcript'],
  )


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str]]:
  tiles = []
  for difference in results.get('differences', []):
    if difference.get('skill') is None:
      name = f'{difference["after"]} over {difference["before"]}, points'
      tiles.append((f'{100 * difference["mean"]:+.1f}', name))
  if results.get('evolve'):
    tiles.append((results['evolve']['verdict'], 'verdict of the evolve round'))
  if 'seconds' in results:
    tiles.append((f'{results["seconds"] / 60:.1f} min', 'all stages'))
  if 'peak_bytes' in results:
    tiles.append((f'{results["peak_bytes"] / 2**30:.1f} GiB', 'peak memory'))
  return tiles


def _environment(results: Mapping[str, Any]) -> dict[str, Any]:
  names = ('commit', 'seed', 'config_hash')
  own = {name: results[name] for name in names if name in results}
  ledger = results.get('ledger') or {}
  head = {'ledger head': ledger['head']} if 'head' in ledger else {}
  return {**results.get('environment', {}), **own, **head}
