"""sqlite databases that an agent's statements run in, and what they hold.

The authoriser and the limits keep a script inside its own small in-memory
database: no files, no pragmas, no triggers or views, no runaway queries. They
count while a statement runs; sqlite cannot be stopped while it reads one, and
names that stand for expressions of other such names multiply there. So a script
may name one query or expression, `... AS (...)`, tables have no generated
columns, and a statement may not grow past `TERMS` terms. What a script leaves
is read within limits as well. All these are guards against wrong and hostile
scripts, not a security boundary against bugs of sqlite itself.
"""

import contextlib
import functools
import re
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

STEPS = 100_000  # virtual-machine instructions of one script or state
LOOK = 1000  # instructions between two looks at the budget
# Of the processor, of one script or state: a function may be slow.
SECONDS = 2.0
SCRIPT = 8000  # characters
# Bytes of a value: a function of two values may take their product in time.
VALUE = 4000
PAGES = 200  # of 4 KiB
UNDONE = 20  # ROLLBACKs of a script: each may copy all pages until its end
TERMS = 100_000  # of a statement, names replaced by what they stand for
# Characters of all rows and declarations of a state: ten times what the gold
# script of the largest task leaves.
READ = 400_000
SHOWN = 5  # rows of a query that the agent sees

ALLOWED = {
  sqlite3.SQLITE_SELECT,
  sqlite3.SQLITE_READ,
  sqlite3.SQLITE_INSERT,
  sqlite3.SQLITE_UPDATE,
  sqlite3.SQLITE_DELETE,
  sqlite3.SQLITE_CREATE_TABLE,
  sqlite3.SQLITE_CREATE_INDEX,
  sqlite3.SQLITE_DROP_TABLE,
  sqlite3.SQLITE_DROP_INDEX,
  sqlite3.SQLITE_ALTER_TABLE,
  sqlite3.SQLITE_REINDEX,
  sqlite3.SQLITE_SAVEPOINT,  # within the transaction of `run`, which stays
}
# No clock and no chance: an artifact has one verdict. Those that begin with
# sqlite_ are ALTER TABLE's own.
FUNCTIONS = frozenset(
  'abs avg char coalesce concat concat_ws count dense_rank first_value format '
  'glob group_concat hex ifnull iif instr lag last_value lead length like '
  'lower ltrim max min nullif printf quote rank replace round row_number rtrim '
  'sign string_agg substr substring sum total trim typeof unicode upper '
  'sqlite_drop_column sqlite_rename_column sqlite_rename_quotefix '
  'sqlite_rename_table sqlite_rename_test'.split()
)
# What a declaration can add that the pragmas below do not report.
ADDED = re.compile(
  r'\b(CHECK|COLLATE|CONFLICT|DEFERRABLE|AUTOINCREMENT|WITHOUT|STRICT)\b', re.I
)
# Quoted text, or what sqlite skips: comments and byte order marks.
QUOTED = re.compile(
  r"""('(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\])"""
  r'|--[^\n]*|/\*.*?\*/|\ufeff',
  re.DOTALL,
)
# A common table expression, a window or a generated column.
NAMED = re.compile(r'\bAS\s*(?:(?:NOT\s+)?MATERIALIZED\s*)?\(', re.I)
# A query that names of the one around it may stand for. A comma before one
# may as well be between two expressions, which then counts too much.
DERIVED = re.compile(r'(?:\b(?:FROM|JOIN)|,)[\s(]*\(\s*(?:SELECT|WITH)\b', re.I)
# A query within another, or another bracket.
BRACKET = re.compile(r'\(\s*(?:SELECT|WITH)\b|[()]', re.I)
# Names may have any letter that is not ASCII; a star stands for columns.
WORD = re.compile(r'[\w\x80-\U0010ffff]+|\*')
# A default whose value is read without running anything of the script's.
LITERAL = re.compile(
  r"""NULL|[+-]?\s*[0-9.][0-9a-z.+-]*|"(?:[^"]|"")*"|'(?:[^']|'')*'""", re.I
)
OBJECTS = (
  'SELECT type, name, tbl_name, sql FROM sqlite_master '
  "WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"
)
ROLLBACK = re.compile(r'\bROLLBACK\b', re.I)
# What changes nothing: each script is one transaction of ours, and sqlite
# switches foreign keys between transactions only.
IDLE = re.compile(
  r'(BEGIN|COMMIT|END)(\s.*)?'
  r'|PRAGMA\s+foreign_keys\s*(=\s*\w+|\(\s*\w+\s*\))',
  re.I | re.DOTALL,
)


class ScriptError(Exception):
  """A script that sqlite or a guard refused; the database is as before it."""

  def __init__(self, message: str, limited: bool = False):
    """Keeps whether a limit ended it."""
    super().__init__(message)
    self.limited = limited


class Database:
  """One in-memory database; `run` executes a script whole or not at all."""

  def __init__(self, image: bytes):
    """Opens a database serialised by `build`."""
    self._own = True  # statements of ours pass the authoriser and the budget
    self._left, self._deadline, self._room = STEPS, 0.0, READ
    self._db = sqlite3.connect(':memory:', isolation_level=None)
    self._db.deserialize(image)
    self._db.execute(f'PRAGMA max_page_count={PAGES}')
    self._db.execute('PRAGMA temp_store=MEMORY')  # sorters stay off the disk
    self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE)
    self._db.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 2 * SCRIPT)
    self._db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    self._db.set_authorizer(self._authorise)
    self._db.set_progress_handler(self._interrupt, LOOK)

  def close(self) -> None:
    """Forgets the database."""
    self._db.close()

  def run(self, script: str) -> list[tuple[Any, ...]]:
    """Executes statements in one transaction; returns the last rows.

    Raises:
      ScriptError: with sqlite's own words; nothing of the script stays.
    """
    if len(script) > SCRIPT:
      raise ScriptError(f'script of {len(script)} characters is too long')
    self._left, self._deadline = STEPS, time.thread_time() + SECONDS
    rows: list[tuple[Any, ...]] = []
    self._db.execute('BEGIN')
    try:
      plain = _plain(script)
      undone = len(ROLLBACK.findall(plain))
      if undone > UNDONE:
        raise ValueError(f'a script may say ROLLBACK {UNDONE} times: {undone}')
      named = len(NAMED.findall(plain))
      if named > 1:
        raise ValueError(f'a script may say AS (...) once, not {named} times')
      for statement in split(script):
        _refuse_growth(statement)
        self._own = False
        try:
          rows = self._db.execute(statement).fetchmany(SHOWN)
        finally:
          self._own = True
        if named and NAMED.search(_plain(statement)):
          self._refuse_generated()
      self._db.execute('COMMIT')
    except (sqlite3.Error, ValueError, OverflowError, MemoryError) as error:
      if self._db.in_transaction:
        self._db.execute('ROLLBACK')
      raise ScriptError(str(error), _interrupted(error)) from None
    return rows

  def _refuse_generated(self) -> None:
    for kind, name, *_ in self._db.execute(OBJECTS).fetchall():
      if kind == 'table':
        info = self._db.execute(f'PRAGMA table_xinfo({_quote(name)})')
        if any(column[6] for column in info):
          raise ValueError('generated columns are not allowed')

  def state(self, keyless: tuple[str, ...]) -> dict[str, Any]:
    """Everything that matters: schema and rows, free of spelling and order.

    What each table is, by name in `tables`, and what the whole database is.
    Columns are compared by name, not by place; indices by table, columns and
    uniqueness, not by name. Tables in `keyless` leave out their `id` values
    among `rows`, and have them with the rest of each row in `ids`.
    `exact` is the table to the letter, for those that must not change.

    Raises:
      ScriptError: a script left more than the limits let one read or check.
      sqlite3.Error: a script left what sqlite itself cannot read back.
    """
    self._left, self._deadline = STEPS, time.thread_time() + SECONDS
    self._room = READ
    self._db.set_authorizer(None)
    self._own = False  # the budget counts
    try:
      objects = self._read(OBJECTS)
      return {
        'tables': {
          name: self._table(name, name in keyless, objects)
          for kind, name, _, _ in objects
          if kind == 'table'
        },
        'other objects': sorted(
          kind for kind, *_ in objects if kind not in ('table', 'index')
        ),
        # One violation is enough.
        'integrity': (
          self._db.execute('PRAGMA integrity_check(1)').fetchone(),
          self._db.execute('PRAGMA foreign_key_check').fetchone(),
        ),
      }
    except sqlite3.Error as error:
      if _interrupted(error):
        raise ScriptError(str(error), limited=True) from None
      raise
    finally:
      self._own = True
      self._db.set_authorizer(self._authorise)

  def _read(self, query: str) -> list[tuple[Any, ...]]:
    rows = []
    for row in self._db.execute(query):
      self._room -= len(repr(row))
      if self._room < 0:
        raise ScriptError(
          f'the database has over {READ} characters to compare: leave less',
          limited=True,
        )
      rows.append(row)
    return rows

  def _table(
    self, name: str, keyless: bool, objects: list[tuple]
  ) -> dict[str, Any]:
    quoted = _quote(name)
    info = self._read(f'PRAGMA table_xinfo({quoted})')
    columns = sorted(
      (column, kind.upper(), notnull, _value(default), key, hidden)
      for _, column, kind, notnull, default, key, hidden in info
    )
    links = self._read(f'PRAGMA foreign_key_list({quoted})')
    places = sorted(range(len(info)), key=lambda place: info[place][1])
    whole = places
    if keyless:
      places = [place for place in places if info[place][1] != 'id']
    rows = self._read(f'SELECT * FROM {quoted} NOT INDEXED')
    texts = [sql for _, _, table, sql in objects if table == name and sql]
    state = {
      'columns': columns,
      'indices': sorted(self._indices(quoted)),
      'links': sorted((ln[2], ln[3], ln[4] or 'id', *ln[5:]) for ln in links),
      'extras': sorted(
        word.upper() for text in texts for word in ADDED.findall(_plain(text))
      ),
      'rows': sorted(repr([row[place] for place in places]) for row in rows),
      'exact': (texts, rows),
    }
    if keyless:
      state['ids'] = sorted(repr([row[p] for p in whole]) for row in rows)
    return state

  def _indices(self, quoted: str) -> Iterator[tuple[Any, ...]]:
    listed = self._read(f'PRAGMA index_list({quoted})')
    # An integer key that is the row's own id has no index: one that has (`id
    # INTEGER PRIMARY KEY DESC`) takes NULL and numbers no new rows.
    for _, name, unique, _, partial in listed:
      parts = self._read(f'PRAGMA index_xinfo({_quote(name)})')
      # (column, descending, collation) of the keys; the rest is the row's id.
      yield (
        tuple((str(p[2]), p[3], p[4]) for p in parts if p[5]),
        unique,
        partial,
      )

  def _authorise(self, action: int, _: Any, name: str | None, *__: Any) -> int:
    if self._own or action in ALLOWED:
      return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and name.lower() in FUNCTIONS:
      return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY

  def _interrupt(self) -> bool:
    if self._own:
      return False
    self._left -= LOOK
    return self._left <= 0 or time.thread_time() > self._deadline


def _interrupted(error: Exception) -> bool:
  code = getattr(error, 'sqlite_errorcode', None)
  return code == sqlite3.SQLITE_INTERRUPT


def _plain(text: str) -> str:
  """SQL with a name in the place of quoted text, and without comments."""
  return QUOTED.sub(lambda found: ' q ' if found[1] else ' ', text)


def _refuse_growth(statement: str) -> None:
  """Refuses what could grow past TERMS while sqlite reads it.

  A query's results may be used in its own conditions and in the query around
  it: so many times are the words of one multiplied by those of another, and
  they are most where each has as many as the next.
  """
  text = _plain(statement)
  rest, named = NAMED.subn('(q ', text)
  levels = 2 + named + max(len(DERIVED.findall(text)), _depth(rest))
  words = len(WORD.findall(text))
  if re.search(r'\bSELECT\b', text, re.I) and words > levels * TERMS ** (
    1 / levels
  ):
    raise ValueError(
      f'{words} words are too many for a statement of {levels - 1} queries '
      'within each other: take fewer or split it'
    )


def _depth(text: str) -> int:
  """How many queries in brackets are within each other."""
  most, depths = 0, [0]
  for found in BRACKET.finditer(text):
    if found[0] != ')':
      depths.append(depths[-1] + (found[0] != '('))
      most = max(most, depths[-1])
    elif len(depths) > 1:
      depths.pop()
  return most


@functools.lru_cache(1024)
def _value(default: str | None) -> str:
  """A default as sqlite spells its value; what is no literal as it stands."""
  if default is None:
    return 'NULL'
  if not LITERAL.fullmatch(default):
    return default
  with contextlib.closing(sqlite3.connect(':memory:')) as db:
    try:
      return db.execute(f'SELECT quote({default})').fetchone()[0]
    except sqlite3.Error:
      return default


def _quote(name: str) -> str:
  return '"' + name.replace('"', '""') + '"'


def split(script: str) -> Iterator[str]:
  """Statements of a script, without those that change nothing."""
  start = 0
  for end, letter in enumerate(script, 1):
    if letter == ';' and sqlite3.complete_statement(script[start:end]):
      yield from _kept(script[start:end])
      start = end
  yield from _kept(script[start:])


def _kept(statement: str) -> Iterator[str]:
  text = _plain(statement).strip().rstrip(';').strip()
  if text and not IDLE.fullmatch(text):
    yield statement.strip().rstrip(';')


def build(statements: list[str], rows: dict[str, list[tuple]]) -> bytes:
  """A serialised database: schema, then rows."""
  db = sqlite3.connect(':memory:', isolation_level=None)
  try:
    db.execute('BEGIN')
    for statement in statements:
      db.execute(statement)
    for table, values in rows.items():
      marks = ','.join('?' * len(values[0]))
      db.executemany(f'INSERT INTO {table} VALUES({marks})', values)
    db.execute('COMMIT')
    return db.serialize()
  finally:
    db.close()
