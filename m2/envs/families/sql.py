"""SQL schema migrations on real sqlite databases.

An agent sees a schema and a request, and calls `sql` in a workspace that holds
one visible instantiation of the schema. Each call runs whole or not at all; the
scripts of the calls that succeeded are the artifact. The verifier replays them
on fresh databases with other rows, which no prompt and no workspace has shown,
and compares everything with what the gold script does there.
"""

import functools
import hashlib
import random
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2 import types
from m2.envs.families import sql_database, sql_schema, sql_skills

NAME = 'sql'
SKILLS = sql_skills.SKILLS
HELD_OUT = sql_skills.HELD_OUT
HARDEST = sql_schema.HARDEST
NAMES = frozenset((*sql_schema.TABLES, *sql_schema.COLUMNS))
SHOWN = 400  # characters of an answer
HIDDEN = 2  # instantiations that an artifact is judged on
# Shares of the signatures, in this order.
SPLITS = (('train', 0.70), ('dev', 0.10), ('gate', 0.10), ('test', 0.10))
CANARY = 'm2-jax sql task; keep out of training corpora: 6d2f0c5e9b41'


def generate(skill: str, difficulty: int, split: str, seed: str) -> types.Task:
  """Draws a task of `skill` whose signature belongs to `split`.

  Args:
    skill: one of `SKILLS`.
    difficulty: 0 is easiest; see `sql_schema.draw`.
    split: train, dev, gate or test.
    seed: any text; the same arguments give the same task.

  Raises:
    ValueError: an unknown skill or split, or a held-out skill in train.
  """
  if skill not in SKILLS:
    raise ValueError(f'tasks.skills.{skill}: choose from {", ".join(SKILLS)}')
  if split not in dict(SPLITS):
    raise ValueError(f'{split=}: choose from {", ".join(dict(SPLITS))}')
  if skill in HELD_OUT and split == 'train':
    raise ValueError(f'{skill} is held out: it has no train tasks')
  rng = random.Random(f'{NAME}/{split}/{skill}/{difficulty}/{seed}')
  while True:
    schema = sql_schema.draw(rng, difficulty)
    job = sql_skills.draw(rng, skill, schema)
    signature = _signature(schema)
    if split_of(signature) == split:
      break
  data = {
    'tables': [
      {'name': table.name, 'columns': [list(pair) for pair in table.columns]}
      for table in schema.tables
    ],
    'schema': schema.sql(),
    'gold': job.gold,
    'mistakes': [list(pair) for pair in job.mistakes],
    'keyless': list(job.keyless),
    'link': list(job.link),
    'canary': CANARY,
  }
  return types.Task(
    id=f'{NAME}-{split}-{skill}-{difficulty}-{seed}',
    family=NAME,
    skill=skill,
    split=split,
    difficulty=difficulty,
    prompt=';'.join(schema.sql()) + '\n' + job.request,
    data=data,
    signature=signature,
  )


def _signature(schema: sql_schema.Schema) -> str:
  """Hash of the target table's set of column names: the split is by these."""
  names = ' '.join(sorted(schema.tables[0].names()))
  return hashlib.sha256(names.encode()).hexdigest()[:16]


def split_of(signature: str) -> str:
  """The split that a signature belongs to."""
  place = int(signature[:8], 16) / 16**8
  for name, share in SPLITS:
    if place < share:
      return name
    place -= share
  return SPLITS[-1][0]


def canonical_form(task: types.Task) -> str:
  """Schema and gold script with names numbered and literals bucketed.

  Tasks that differ only in names, values or phrasing share it.
  """
  numbers: dict[str, str] = {}

  def bucket(found: re.Match[str]) -> str:
    text = found.group()
    if not text[0].isalpha():
      return 'L'
    if text not in NAMES:
      return text
    return numbers.setdefault(text, f'n{len(numbers)}')

  text = ';'.join((*task.data['schema'], *task.data['gold']))
  # Words of letters alone: user_id and post_title are two names each.
  return f'{task.skill}:' + re.sub(
    r"'[^']*'|[0-9]+(?:\.[0-9]+)?|[A-Za-z]+", bucket, text
  )


def image(task: types.Task, place: str) -> bytes:
  """The task's database with the rows of `place`, serialised."""
  counts = sql_schema.FEW if place == 'visible' else sql_schema.MANY
  seed = f'{task.id}/{place}'
  rows = sql_schema.rows(task.data['tables'], seed, counts)
  return sql_database.build(task.data['schema'], rows)


class Workspace:
  """The agent's own database: the visible instantiation."""

  def __init__(self, task: types.Task):
    """Prepares; entering the context opens it."""
    self._task = task
    self._db: sql_database.Database | None = None
    self.scripts: list[str] = []

  async def __aenter__(self) -> 'Workspace':
    """Opens the database."""
    self._db = sql_database.Database(image(self._task, 'visible'))
    return self

  async def __aexit__(self, *_: Any) -> None:
    """Closes it; `scripts` stay for the verifier."""
    self._db.close()
    self._db = None

  async def execute(self, command: str) -> str:
    """Runs a script: `ok`, the rows of its last query, or `error: ...`."""
    try:
      rows = self._db.run(command)
    except sql_database.ScriptError as error:
      return f'error: {error}'[:SHOWN]
    self.scripts.append(command)
    return _say(rows)


def verify(task: types.Task, scripts: Sequence[str]) -> types.Verdict:
  """Replays the artifact on hidden instantiations and compares the states.

  Args:
    task: what was asked.
    scripts: the scripts of the agent's successful calls, in order.

  Returns:
    Passed iff every hidden database ends exactly as the gold script leaves it.
    A script that runs into a limit, of instructions, of processor time or of
    what its database may hold, has failed: it does so in every replay, on a
    busy machine or not. A gold script that does not run is the environment's
    failure.
  """
  score = types.Outcome.SCORE
  for place in range(HIDDEN):
    try:
      start, want = _judge(_Key(task, place))
    except (sql_database.ScriptError, sqlite3.Error) as error:
      return types.Verdict(
        types.Outcome.INFRA, False, 0.0, 'broken_task', str(error)
      )
    db = sql_database.Database(start)
    try:
      for script in scripts:
        db.run(script)
      got = db.state(tuple(task.data['keyless']))
      _settle(got, *task.data['link'])
    except sql_database.ScriptError as error:
      label = 'limit' if error.limited else 'hidden_error'
      return types.Verdict(score, False, 0.0, label, str(error))
    except sqlite3.Error as error:  # the agent's doing, not the machine's
      return types.Verdict(score, False, 0.0, 'broken_database', str(error))
    finally:
      db.close()
    difference = _difference(want, got)
    if difference:
      return types.Verdict(score, False, 0.0, *difference)
  return types.Verdict(score, True, 1.0)


def _settle(
  state: Mapping[str, Any], table: str = '', column: str = '', parent: str = ''
) -> None:
  """Drops what the declaration of a column of keys is free to say."""
  found = state['tables'].get(table)
  if found is None:
    return
  found['columns'] = [
    (name, 'INT' if (name, kind) == (column, 'INTEGER') else kind, *rest)
    for name, kind, *rest in found['columns']
  ]
  free = (parent, column, 'id', 'NO ACTION', 'NO ACTION', 'NONE')
  found['links'] = [link for link in found['links'] if link != free]


def _difference(
  want: Mapping[str, Any], got: Mapping[str, Any]
) -> tuple[str, str] | None:
  """Failure label and the first thing that differs."""
  for name in sorted({*want['tables'], *got['tables']}):
    right, found = want['tables'].get(name), got['tables'].get(name)
    if found is None:
      return 'missing_table', f'table {name} is missing'
    if right is None:
      return 'extra_table', f'table {name} should not be there'
    for part in right:
      if not _agree(part, right, found):
        text = f'{name}.{part}: {found[part]} instead of {right[part]}'
        return f'wrong_{part}', text[:300]
  for name in ('other objects', 'integrity'):
    if want[name] != got[name]:
      return 'broken_database', f'{name}: {got[name]}'
  return None


def _agree(part: str, want: Mapping[str, Any], got: Mapping[str, Any]) -> bool:
  if part == 'ids':  # of rows that stay: new ones may have any
    return set(want[part]) <= set(got[part])
  return want[part] == got[part]


# An entry has up to 0.9 MB: 512 are enough for the samples of the tasks in
# flight, and stay under 0.5 GB.
@functools.lru_cache(512)
def _judge(key: '_Key') -> tuple[bytes, Mapping[str, Any]]:
  """A hidden database before, and its state after, the gold script.

  Tables that the gold script leaves alone keep `exact`: whoever touches them,
  in rows, declaration or index names, has done something nobody asked for.
  Where `id` values are free, `ids` keeps the rows that it leaves as they were.
  """
  task = key.task
  start = image(task, f'hidden {key.place}')
  db = sql_database.Database(start)
  try:
    keyless = tuple(task.data['keyless'])
    before = db.state(keyless)
    db.run(script_of(task))
    want = db.state(keyless)
  finally:
    db.close()
  for name, table in want['tables'].items():
    if table != before['tables'].get(name):
      del table['exact']
      if 'ids' in table:
        old = before['tables'].get(name, {}).get('ids', [])
        table['ids'] = [row for row in table['ids'] if row in old]
  return start, want


class _Key:
  """A task and a hidden place, compared by the task's id and data."""

  def __init__(self, task: types.Task, place: int):
    self.task, self.place = task, place

  def __hash__(self) -> int:
    return hash((self.task.id, self.place))

  def __eq__(self, other: object) -> bool:
    mine, theirs = self.task, other.task
    return (mine.id, self.place, mine.data) == (
      theirs.id, other.place, theirs.data
    )  # fmt: skip


def mistaken(task: types.Task, rng: random.Random) -> str | None:
  """A script with one realistic mistake that sqlite refuses; None if none."""
  right, wrong = rng.choice(task.data['mistakes'])
  script = script_of(task)
  return script.replace(right, wrong, 1) if right in script else None


def script_of(task: types.Task) -> str:
  """The gold script as an agent writes it."""
  return ';'.join(task.data['gold'])


def controls(task: types.Task) -> dict[str, tuple[list[str], bool]]:
  """Artifacts whose verdict is known: name -> (scripts, must pass).

  The hard-coded control replays the visible rows as literals; the tampering
  ones attack the database or the verifier around the task itself.
  """
  gold = script_of(task)
  first = task.data['tables'][0]
  name = first['name']
  visible = sql_schema.rows(task.data['tables'], f'{task.id}/visible')[name]
  literals = ','.join(str(row) for row in visible)
  loop = 'WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) '
  return {
    'oracle': ([gold], True),
    'oracle_by_statement': (list(task.data['gold']), True),
    'oracle_respelled': (
      [f'-- migrate\nBEGIN;\n{gold.replace(";", " ;  ")};\nCOMMIT;'],
      True,
    ),
    'no_op': ([], False),
    'select_only': ([f'SELECT * FROM {name}'], False),
    'destructive': ([f'DROP TABLE {name}'], False),
    'half': ([_half(task.data['gold'])], False),
    **{
      f'partial_{number}': ([script], False)
      for number, script in enumerate(_partial(task.data['gold']))
    },
    'hard_code': (
      [
        gold,
        f'DELETE FROM {_after(task)}',
        f'INSERT INTO {_after(task)} VALUES{literals}',
      ],
      False,
    ),
    'extra_table': ([gold, 'CREATE TABLE spare(id INTEGER)'], False),
    'extra_table_of_a_known_name': (
      [gold, 'CREATE TABLE integrity(id INTEGER)'],
      False,
    ),
    'extra_index': ([gold, f'CREATE INDEX spare ON {_after(task)}(id)'], False),
    'temp_shadow': ([f'CREATE TEMP TABLE {name}(id INTEGER)', gold], False),
    'view': ([gold, 'CREATE VIEW spare AS SELECT 1'], False),
    'trigger': (
      [
        gold,
        f'CREATE TRIGGER spare AFTER INSERT ON {_after(task)} '
        'BEGIN SELECT 1; END',
      ],
      False,
    ),
    'pragma': (['PRAGMA writable_schema=1', gold], False),
    'attach': (["ATTACH ':memory:' AS other", gold], False),
    'schema_write': ([gold, 'DELETE FROM sqlite_master'], False),
    'endless': ([gold, loop + 'SELECT count(*) FROM n'], False),
  }


def _partial(gold: Sequence[str]) -> Iterator[str]:
  """Gold scripts of which one change leaves rows out, or drops some."""
  for place, statement in enumerate(gold):
    for short in _narrowed(statement):
      yield ';'.join((*gold[:place], short, *gold[place + 1 :]))


def _narrowed(statement: str) -> Iterator[str]:
  if found := re.fullmatch(r'UPDATE .*=(\w+)\*\d+', statement):
    for rows in ('id<7', '{}>=0', '{}<9', '{} IS NOT NULL'):
      yield f'{statement} WHERE {rows.format(found[1])}'
  if found := re.fullmatch(r'INSERT .* SELECT (.*) FROM \w+', statement):
    column = re.findall(r'\b[a-z]\w*', found[1].removeprefix('id,'))[0]
    yield f'{statement} WHERE {column} IS NOT NULL'
  if found := re.search(r'GROUP BY (\w+)\)$', statement):
    yield f'{statement} OR {found[1]} IS NULL'


def _after(task: types.Task) -> str:
  """The target table's name once the gold script ran."""
  name = task.data['tables'][0]['name']
  for statement in task.data['gold']:
    words = statement.split()
    if words[:2] == ['ALTER', 'TABLE'] and words[3:5] == ['RENAME', 'TO']:
      name = words[5] if words[2] == name else name
  return name


def _half(gold: Sequence[str]) -> str:
  """The gold script without its last statement, or nothing of one."""
  return ';'.join(gold[:-1]) or 'SELECT 1'


def answer(task: types.Task, script: str) -> str:
  """What the workspace answers to a first call with `script`."""
  db = sql_database.Database(image(task, 'visible'))
  try:
    return _say(db.run(script))
  except sql_database.ScriptError as error:
    return f'error: {error}'[:SHOWN]
  finally:
    db.close()


def _say(rows: list[tuple[Any, ...]]) -> str:
  if not rows:
    return 'ok'
  text = '\n'.join(' '.join(str(value)[:40] for value in row) for row in rows)
  return text[:SHOWN]
