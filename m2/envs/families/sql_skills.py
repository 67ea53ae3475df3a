"""The migration skills: each turns a schema into a request and a gold script.

A skill works on the first table of the schema, the target; the others are
distractors. It may add what its job needs to the schema (a partner table, an
index to drop); what its gold script then does is in `Job.after`, for the skills
that another can follow.
"""

import dataclasses
import random
from collections.abc import Callable

from m2.envs.families import sql_schema


@dataclasses.dataclass
class Job:
  """What one skill asks for.

  Attributes:
    request: what the user says.
    gold: statements of one right answer.
    mistakes: (right, wrong) words; writing the wrong one makes sqlite object.
    keyless: tables whose `id` values are free.
    link: (table, column, parent) of a new column of a parent's keys, which may
      as well be INTEGER and reference the parent; () where there is none.
    after: the schema once the gold script ran; None where nothing follows.
  """

  request: str
  gold: list[str]
  mistakes: list[tuple[str, str]]
  keyless: tuple[str, ...] = ()
  link: tuple[str, ...] = ()
  after: sql_schema.Schema | None = None


def _literal(rng: random.Random, kind: str) -> str:
  if kind == 'INT':
    return str(rng.randrange(10))
  if kind == 'REAL':
    return f'{rng.randrange(10)}.5'
  return f"'{rng.choice(sql_schema.WORDS)}'"


def _parts(rng: random.Random, schema: sql_schema.Schema):
  """The target, one of its columns and type, a free name, another free name."""
  table = schema.tables[0]
  column, kind = rng.choice(table.columns)
  free = [n for n in sql_schema.COLUMNS if n not in table.names()]
  return table, column, kind, *rng.sample(free, 2)


def add_col(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, _, _, new, _ = _parts(rng, schema)
  kind = rng.choice(sql_schema.TYPES)
  after = schema.copy()
  after.tables[0].columns.append((new, kind))
  request = rng.choice(
    (
      f'add column {new} {kind} to {table.name}',
      f'{table.name} needs a new column {new} {kind}',
    )
  )
  gold = [f'ALTER TABLE {table.name} ADD COLUMN {new} {kind}']
  return Job(request, gold, [(new, table.columns[0][0])], after=after)


def add_col_default_notnull(rng, schema: sql_schema.Schema) -> Job:
  table, _, _, new, _ = _parts(rng, schema)
  kind = rng.choice(sql_schema.TYPES)
  value = _literal(rng, kind)
  request = rng.choice(
    (
      f'add column {new} {kind} to {table.name}, not null, default {value}',
      f'{table.name} needs column {new} {kind}, not null, default {value}',
    )
  )
  gold = [
    f'ALTER TABLE {table.name} ADD COLUMN {new} {kind} NOT NULL DEFAULT {value}'
  ]
  return Job(request, gold, [(f' DEFAULT {value}', '')])


def rename_col(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, column, _, new, other = _parts(rng, schema)
  after = schema.copy()
  after.tables[0].columns = [
    (new if name == column else name, kind) for name, kind in table.columns
  ]
  request = rng.choice(
    (
      f'rename column {column} of {table.name} to {new}',
      f'in {table.name}, call {column} {new} instead',
    )
  )
  gold = [f'ALTER TABLE {table.name} RENAME COLUMN {column} TO {new}']
  mistakes = [(f'COLUMN {column}', f'COLUMN {other}')]
  return Job(request, gold, mistakes, after=after)


def rename_table(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table = schema.tables[0]
  old, new, wrong = table.name, schema.free_table(rng), schema.free_table(rng)
  request = rng.choice(
    (
      f'rename table {old} to {new}',
      f'call table {old} {new} instead',
    )
  )
  gold = [f'ALTER TABLE {old} RENAME TO {new}']
  return Job(request, gold, [(f'TABLE {old}', f'TABLE {wrong}')])


def drop_col(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, column, _, other, _ = _parts(rng, schema)
  after = schema.copy()
  after.tables[0].columns = [p for p in table.columns if p[0] != column]
  request = rng.choice(
    (
      f'drop column {column} from {table.name}',
      f'{table.name} no longer needs {column}',
    )
  )
  gold = [f'ALTER TABLE {table.name} DROP COLUMN {column}']
  mistakes = [(f'COLUMN {column}', f'COLUMN {other}')]
  return Job(request, gold, mistakes, after=after)


def create_index(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, column, _, other, _ = _parts(rng, schema)
  name = f'{table.name}_{column}'
  after = schema.copy()
  after.indices.append((name, table.name, column))
  request = rng.choice(
    (
      f'index {table.name} by {column}',
      f'lookups of {table.name} by {column} are slow, add an index',
    )
  )
  gold = [f'CREATE INDEX {name} ON {table.name}({column})']
  return Job(request, gold, [(f'({column})', f'({other})')], after=after)


def drop_index(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, column, _, other, _ = _parts(rng, schema)
  name = f'{table.name}_{column}'
  request = rng.choice(
    (
      f'drop the index of {table.name} by {column}',
      f'{table.name} needs no index by {column}',
    )
  )
  job = Job(request, [f'DROP INDEX {name}'], [(name, f'{table.name}_{other}')])
  schema.indices.append((name, table.name, column))
  return job


def backfill_expr(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, _, _, new, other = _parts(rng, schema)
  factor = rng.randrange(2, 9)
  table.columns += [(new, 'INT'), (other, 'INT')]
  rng.shuffle(table.columns)
  request = rng.choice(
    (
      f'set {new} of {table.name} to {factor} times {other}',
      f'in {table.name}, {new} must be {other} times {factor}',
    )
  )
  gold = [f'UPDATE {table.name} SET {new}={other}*{factor}']
  wrong = next(n for n in sql_schema.COLUMNS if n not in table.names())
  return Job(request, gold, [(f'={other}', f'={wrong}')])


def _rebuild(table: sql_schema.Table, changed: str, kind: str, cast: str):
  """Create, copy, drop, rename: what ALTER TABLE of sqlite cannot do."""
  columns = [(n, kind if n == changed else k) for n, k in table.columns]
  copied = ','.join(cast if n == changed else n for n in table.names())
  return [
    sql_schema.Table('new', columns).sql(),
    f'INSERT INTO new SELECT id,{copied} FROM {table.name}',
    f'DROP TABLE {table.name}',
    f'ALTER TABLE new RENAME TO {table.name}',
  ]


def retype_rebuild(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, column, old, other, _ = _parts(rng, schema)
  kind = rng.choice([k for k in sql_schema.TYPES if not old.startswith(k)])
  request = rng.choice(
    (
      f'cast column {column} of {table.name} to {kind}',
      f'change {column} of {table.name} to {kind}, cast its values',
    )
  )
  gold = _rebuild(table, column, kind, f'CAST({column} AS {kind})')
  return Job(request, gold, [(f'CAST({column}', f'CAST({other}')])


def split_table(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, column, kind, other, _ = _parts(rng, schema)
  child, owner = schema.free_table(rng), f'{table.name}_id'
  columns = f'with key id and {owner} INT'
  request = rng.choice(
    (
      f'move {column} of {table.name} to a new table {child} {columns}',
      f'split {column} from {table.name} into a new table {child} {columns}',
    )
  )
  gold = [
    sql_schema.Table(child, [(owner, 'INT'), (column, kind)]).sql(),
    f'INSERT INTO {child}({owner},{column}) SELECT id,{column} '
    f'FROM {table.name}',
    f'ALTER TABLE {table.name} DROP COLUMN {column}',
  ]
  mistake = (f'id,{column} ', f'id,{other} ')
  link = (child, owner, table.name)
  return Job(request, gold, [mistake], keyless=(child,), link=link)


def merge_tables(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, _, _, other, _ = _parts(rng, schema)
  twin = schema.free_table(rng)
  schema.tables.append(sql_schema.Table(twin, list(table.columns)))
  columns = ','.join(table.names())
  request = rng.choice(
    (
      f'move all rows of {twin} into {table.name} and drop {twin}',
      f'merge table {twin} into {table.name}, then drop {twin}',
    )
  )
  gold = [
    f'INSERT INTO {table.name}({columns}) SELECT {columns} FROM {twin}',
    f'DROP TABLE {twin}',
  ]
  first = table.names()[0]
  mistake = (f'SELECT {first}', f'SELECT {other}')
  return Job(request, gold, [mistake], keyless=(table.name,))


def add_fk_rebuild(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, column, _, other, _ = _parts(rng, schema)
  parent = schema.free_table(rng)
  link = f'{parent}_id'
  schema.tables.append(
    sql_schema.Table(parent, [(column, 'TEXT'), (other, 'INT')])
  )
  at = rng.randrange(len(table.columns) + 1)
  table.columns.insert(at, (link, 'INT'))
  request = rng.choice(
    (
      f'{link} of {table.name} must reference {parent}',
      f'add a foreign key from {link} of {table.name} to {parent}',
    )
  )
  gold = _rebuild(table, link, f'INT REFERENCES {parent}(id)', link)
  first = table.names()[0]
  return Job(request, gold, [(f'SELECT id,{first}', f'SELECT id,{other}')])


def unique_dedup(rng: random.Random, schema: sql_schema.Schema) -> Job:
  table, column, _, other, _ = _parts(rng, schema)
  request = rng.choice(
    (
      f'make {column} of {table.name} unique, keep the first of each',
      f'{column} of {table.name} must be unique, keep the lowest id',
    )
  )
  gold = [
    f'DELETE FROM {table.name} WHERE id NOT IN '
    f'(SELECT min(id) FROM {table.name} GROUP BY {column})',
    f'CREATE UNIQUE INDEX {table.name}_{column} ON {table.name}({column})',
  ]
  return Job(request, gold, [(f'GROUP BY {column}', f'GROUP BY {other}')])


Skill = Callable[[random.Random, sql_schema.Schema], Job]
SINGLE: dict[str, Skill] = {
  'add_col': add_col,
  'add_col_default_notnull': add_col_default_notnull,
  'rename_col': rename_col,
  'rename_table': rename_table,
  'drop_col': drop_col,
  'create_index': create_index,
  'drop_index': drop_index,
  'backfill_expr': backfill_expr,
  'retype_rebuild': retype_rebuild,
  'split_table': split_table,
  'merge_tables': merge_tables,
  'add_fk_rebuild': add_fk_rebuild,
  'unique_dedup': unique_dedup,
}
# Pairs done one after the other: the second works on what the first left.
CHAINS: dict[str, tuple[tuple[str, str], ...]] = {
  'two_step': (
    ('add_col', 'create_index'),
    ('add_col', 'rename_table'),
    ('rename_col', 'add_col'),
    ('drop_col', 'add_col_default_notnull'),
    ('create_index', 'add_col'),
    ('rename_col', 'retype_rebuild'),
  ),
  # Never in TRAIN, whatever its weight: composition out of distribution.
  'two_step_held_out': (('rename_col', 'create_index'),),
}
HELD_OUT = ('two_step_held_out',)
SKILLS = (*SINGLE, *CHAINS)


def draw(rng: random.Random, skill: str, schema: sql_schema.Schema) -> Job:
  """One job of `skill`; `schema` gets what the job needs to be there."""
  if skill in SINGLE:
    return SINGLE[skill](rng, schema)
  first, second = rng.choice(CHAINS[skill])
  job = SINGLE[first](rng, schema)
  following = SINGLE[second](rng, job.after)
  return Job(
    f'{job.request}; then {following.request}',
    job.gold + following.gold,
    job.mistakes,
  )
