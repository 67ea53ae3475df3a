"""A finished work directory, written by hand: what the report is made from."""

import json
import math
import pathlib
import random
from typing import Any

# Text that a model or a task could hold, and a page must only ever show.
HOSTILE = (
  '</script><script>window.pwned = 1</script><img src=x onerror=alert(1)>'
)
SKILLS = ('add_col', 'rename_table', 'split_table', 'backfill_expr')
LAYERS, EXPERTS = 3, 16


def rate(n: int, successes: int) -> dict[str, Any]:
  share = successes / n
  half = 1.96 * math.sqrt(share * (1 - share) / n)
  ends = [max(share - half, 0.0), min(share + half, 1.0)]
  return {'n': n, 'successes': successes, 'rate': share, 'interval': ends}


def stage(name: str, share: float, adopted: bool) -> dict[str, Any]:
  skills = {
    skill: rate(100, round(100 * min(share + 0.2 * i - 0.3, 1)))
    for i, skill in enumerate(SKILLS)
  }
  return {
    'name': name,
    'steps': 100,
    'seconds': 201.25,
    'tokens': 1234567,
    'peak_bytes': 2**31,
    'masked': 0,
    'skills': skills,
    'test_seconds': 20.0,
    'test_tokens': 54321,
    'adopted': adopted,
  } | rate(400, round(400 * share))


def results() -> dict[str, Any]:
  return {
    'mode': 'quickstart',
    'seed': 0,
    'config_hash': 'ab' * 32,
    'commit': 'cd' * 20,
    'environment': {'python': '3.12.1', 'jax': '0.11.2', 'cores': 2},
    'seconds': 780.0,
    'peak_bytes': 3 * 2**30,
    'stages': [
      stage('sft', 0.42, False),
      stage('rl', 0.61, False),
      stage('targeted', 0.68, True),
      stage('control', 0.62, False),
    ],
    'differences': [
      {
        'after': 'rl',
        'before': 'sft',
        'skill': None,
        'n': 400,
        'clusters': 320,
        'mean': 0.19,
        'interval': [0.14, 0.24],
      }
    ],
    'evolve': {
      'verdict': 'keep',
      'reasons': ['the gain on split_table is above zero'],
      'skill': 'split_table',
      'why': f'lowest on DEV {HOSTILE}',
      'edits': [{'path': 'tasks.skills.split_table', 'old': 1.0, 'new': 13.0}],
      'predicted': 0.1,
      'evidence': [
        {'source': 'eval.json', 'text': '31 of 60 fail', 'ids': ['sql/dev/3']}
      ],
    },
    'ledger': {'path': 'evolve/ledger.jsonl', 'entries': 2, 'head': 'ef' * 32},
    'notes': ['The gold solutions come from the task generator.'],
  }


def messages(passed: bool) -> list[dict[str, Any]]:
  call = {'name': 'sql', 'arguments': {'script': 'ALTER TABLE a ADD b INT;'}}
  return [
    {'role': 'user', 'content': f'tables: a(x)\nadd column b. {HOSTILE}'},
    {
      'role': 'assistant',
      'content': '',
      'reasoning_content': 'table a, column b',
      'tool_calls': [{'type': 'function', 'function': call}],
    },
    {'role': 'tool', 'content': 'ok' if passed else f'error: {HOSTILE}'},
  ]


def lines(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def write(workdir: pathlib.Path) -> None:
  """Fills `workdir` as a quickstart run does."""
  draw = random.Random(0)
  (workdir / 'results.json').write_text(json.dumps(results()))
  lines(
    workdir / 'sft' / 'metrics.jsonl',
    [{'step': i, 'ce': 6 / (1 + i / 90)} for i in range(1200)],
  )
  loads = []
  for step in range(0, 1200, 50):
    load = [[draw.gammavariate(3, 1) for _ in range(EXPERTS)] for _ in 'abc']
    load = [[x / sum(layer) for x in layer] for layer in load]
    loads.append({'step': step, 'expert_load': load})
  lines(workdir / 'sft' / 'introspection.jsonl', loads)
  rl = [
    {
      'step': i,
      'reward/mean': 0.4 + i / 150 + 0.05 * draw.random(),
      'reward/passed': 0.4 + i / 200,
      'policy/entropy': 0.9 - i / 100,
      # Null: no sample of the step was of its own weights.
      'mismatch/max': 10 ** (-5 + draw.random()) if i % 3 else None,
      'mismatch/mean': 10 ** (-6.5 + draw.random() / 2) if i % 3 else None,
      'ratio/p05': 0.8,
      'ratio/p50': 1.0,
      'ratio/p95': 1.3 + 0.1 * draw.random(),
      'ratio/ess': 0.93,
      'stale/mean': 0.5,
    }
    for i in range(40)
  ]
  lines(workdir / 'rl' / 'metrics.jsonl', rl)
  with open(workdir / 'rl' / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 40, "rew')  # the line that a kill tore
  for name, slope in (('targeted', 4e-3), ('control', 2e-3)):
    curve = [{'step': i, 'ce': 1.2 - slope * i} for i in range(100)]
    lines(workdir / 'evolve' / name / 'metrics.jsonl', curve)
  entry = {'index': 0, 'time': '2026-01-01T00:00:00+00:00', 'hash': 'ef' * 32}
  lines(
    workdir / 'evolve' / 'ledger.jsonl',
    [
      entry | {'kind': 'registered', 'data': {'rule': HOSTILE}},
      entry | {'index': 1, 'kind': 'decided', 'data': {'verdict': 'keep'}},
    ],
  )
  rows = [
    {
      'task': f'sql/test/{i}',
      'skill': 'add_col',
      'passed': bool(i),
      'error_class': '' if i else 'rows',
      'evidence': f'rows differ {HOSTILE}',
      'malformed': 1 - i,
      'turns': 2,
      'transcript': messages(bool(i)),
    }
    for i in range(2)
  ]
  path = workdir / 'test' / 'rl' / 'eval.json'
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps({'rows': rows}))
