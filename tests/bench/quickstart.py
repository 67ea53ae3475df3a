"""Files the results of whole quickstart runs.

    python -m tests.bench.quickstart WORKDIR [WORKDIR...]

Each WORKDIR holds the `results.json` of one finished run of
`launch/quickstart.sh`, with a seed of its own. They go together into
`results/quickstart-<device>.json`, a row a seed; README's table and the claim
that it holds for every seed are made from that.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from tests.bench import record

COMMAND = 'bash launch/quickstart.sh --config.seed=SEED --workdir=runs/SEED'


def row(results: dict[str, Any]) -> dict[str, Any]:
  """What is kept of one run: all but the per-skill tables."""
  stages = [
    {key: value for key, value in stage.items() if key != 'skills'}
    for stage in results['stages']
  ]
  kept = ('seed', 'commit', 'config_hash', 'seconds', 'peak_bytes')
  evolve = ('verdict', 'skill', 'reasons', 'gain', 'over_control')
  return {name: results[name] for name in kept} | {
    'environment': results['environment'],
    'stages': stages,
    'differences': results['differences'],
    'evolve': {k: results['evolve'].get(k) for k in evolve},
    'ledger_head': results['ledger']['head'],
  }


def collect(workdirs: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
  """Rows of finished runs, by seed.

  Raises:
    FileNotFoundError: a folder holds no `results.json`.
    ValueError: two runs of one seed, or of different commits.
  """
  rows = []
  for workdir in workdirs:
    path = workdir / 'results.json'
    if not path.exists():
      raise FileNotFoundError(f'{path} is missing: the run did not finish')
    rows.append(row(json.loads(path.read_text())))
  seeds = [one['seed'] for one in rows]
  if len(set(seeds)) < len(seeds):
    raise ValueError(f'seeds {seeds}: every run needs one of its own')
  commits = sorted({one['commit'] for one in rows})
  if len(commits) > 1:
    raise ValueError(f'the runs are of different commits: {commits}')
  return sorted(rows, key=lambda one: one['seed'])


def device(environment: dict[str, Any]) -> str:
  """The accelerator that a run had, or else its processor."""
  _, kind = environment['device'].split(' ', 1)
  return environment['processor'] if kind == 'cpu' else kind


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdirs', nargs='+', type=pathlib.Path)
  rows = collect(parser.parse_args().workdirs)
  name = device(rows[0]['environment'])
  print(record.write('quickstart', name, rows, command=COMMAND))


if __name__ == '__main__':
  main()
