"""Random schemas of the SQL family and the rows that fill them.

Names come from two pools of everyday words, so that a small tokenizer spends
one token on each. Rows are drawn from a seed that no prompt contains.
"""

import dataclasses
import random
from typing import Any

TABLES = (
  'user',
  'post',
  'item',
  'city',
  'team',
  'desk',
  'book',
  'song',
  'file',
  'task',
  'note',
  'page',
  'plan',
  'room',
  'tag',
  'shop',
  'bill',
  'car',
  'pet',
  'job',
)
COLUMNS = (
  'name',
  'age',
  'size',
  'cost',
  'rank',
  'kind',
  'date',
  'code',
  'rate',
  'mass',
  'color',
  'level',
  'total',
  'score',
  'state',
  'title',
  'email',
  'phone',
  'width',
  'depth',
  'year',
  'month',
  'owner',
  'quota',
  'zone',
  'unit',
  'grade',
  'speed',
  'price',
  'label',
)
FEW = range(4, 9)  # rows that a workspace shows
# Rows that an artifact is judged on: each kind of row that a wrong one misses.
MANY = range(12, 25)
# Each level takes a table and a column more; skills need new names as well.
HARDEST = min(len(TABLES) - 2, len(COLUMNS) - 5)
TYPES = ('INT', 'TEXT', 'REAL')
WORDS = ('ash', 'bay', 'cod', 'dew', 'elm')
RARE = {'INT': (-3, 97), 'REAL': (-2.5, 97.5), 'TEXT': ('', 'Ash')}
KEY = 'id INTEGER PRIMARY KEY'


@dataclasses.dataclass
class Table:
  """One table: an integer key `id`, then (name, declared type) columns."""

  name: str
  columns: list[tuple[str, str]]

  def names(self) -> list[str]:
    """Column names, without the key."""
    return [name for name, _ in self.columns]

  def sql(self) -> str:
    """Its CREATE TABLE statement."""
    parts = [KEY, *(f'{name} {kind}' for name, kind in self.columns)]
    return f'CREATE TABLE {self.name}({",".join(parts)})'


@dataclasses.dataclass
class Schema:
  """Tables and single-column indices (index name, table, column)."""

  tables: list[Table]
  indices: list[tuple[str, str, str]]

  def sql(self) -> list[str]:
    """The statements that create it, in order."""
    return [table.sql() for table in self.tables] + [
      f'CREATE INDEX {name} ON {table}({column})'
      for name, table, column in self.indices
    ]

  def copy(self) -> 'Schema':
    """An independent copy."""
    tables = [Table(table.name, list(table.columns)) for table in self.tables]
    return Schema(tables, list(self.indices))

  def free_table(self, rng: random.Random) -> str:
    """A table name that is not taken."""
    taken = {table.name for table in self.tables}
    return rng.choice([name for name in TABLES if name not in taken])


def draw(rng: random.Random, difficulty: int) -> Schema:
  """A schema: more tables, wider ones and old indices as difficulty grows.

  Level 0 is one table of 2 or 3 columns; each level adds a distractor table
  and up to one column; from level 2 on, distractors carry indices.
  """
  tables = []
  for name in rng.sample(TABLES, 1 + difficulty):
    width = 2 + rng.randrange(2 + difficulty)
    columns = rng.sample(COLUMNS, width)
    tables.append(Table(name, [(c, rng.choice(TYPES)) for c in columns]))
  schema = Schema(tables, [])
  if difficulty >= 2:
    for table in tables[1:]:
      column = rng.choice(table.names())
      schema.indices.append((f'{table.name}_{column}', table.name, column))
  return schema


def rows(
  tables: list[dict[str, Any]], seed: str, sizes: range = FEW
) -> dict[str, list[tuple[Any, ...]]]:
  """Rows for every table; the last repeats the first but for its key.

  So every column holds a duplicate: a unique index without the deletion that
  must come before it fails on every instantiation. Where there are more than
  FEW, one before the last repeats the third, so that removing those of the
  first alone is not enough, and each column has values that a script may
  forget: see `_add_rare`.

  Args:
    tables: `{'name': ..., 'columns': [[name, type], ...]}`; a column
      `<table>_id` holds keys of that table.
    seed: of the values; the same seed gives the same rows.
    sizes: how many rows a table may have.
  """
  rng = random.Random(seed)
  counts = {table['name']: rng.choice(sizes) for table in tables}
  filled = {}
  for table in tables:
    filled[table['name']] = [
      (key, *(_value(rng, *column, counts) for column in table['columns']))
      for key in range(1, counts[table['name']])
    ]
    first, _, third, *_ = found = filled[table['name']]
    if len(found) >= FEW.stop:
      found[-2] = (found[-2][0], *third[1:])
    found.append((counts[table['name']], *first[1:]))
    if len(found) > FEW.stop:
      _add_rare(rng, found, table['columns'])
  return filled


def _add_rare(
  rng: random.Random, found: list[tuple], columns: list[list[str]]
) -> None:
  """Puts values that FEW do not show in rows that no other repeats.

  One of each in every column: NULL, of which two would leave open whether they
  are duplicates, in a row of its own as far as there are enough; and, but for
  keys, numbers on both sides of the others, or empty text and a word in
  another case.
  """
  places = rng.sample(range(3, len(found) - 2), len(found) - 5)
  for at, (name, kind) in enumerate(columns, 1):
    first = places.pop(0)
    rest = [] if name.endswith('_id') else RARE[kind.split()[0]]
    others = rng.sample(places, len(rest))
    for place, value in ((first, None), *zip(others, rest)):
      found[place] = (*found[place][:at], value, *found[place][at + 1 :])
    places.append(first)


def _value(
  rng: random.Random, name: str, kind: str, counts: dict[str, int]
) -> Any:
  parent = name.removesuffix('_id')
  if parent != name and parent in counts:
    return rng.randrange(1, counts[parent] + 1)
  if kind.startswith('INT'):
    return rng.randrange(6)
  if kind.startswith('REAL'):
    return rng.randrange(12) / 2
  return rng.choice((*WORDS, str(rng.randrange(6))))
