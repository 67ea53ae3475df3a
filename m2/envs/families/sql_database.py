"""sqlite databases that an agent's statements run in, and what they hold.

The authoriser and the limits keep a script inside its own small in-memory
database: no files, no pragmas, no triggers or views, no runaway queries. They
are guards against wrong and hostile scripts, not a security boundary against
bugs of sqlite itself.
"""

import re
import sqlite3
from collections.abc import Iterator
from typing import Any

STEPS = 100_000  # virtual-machine instructions of one script
LENGTH = 100_000  # bytes of a value, and characters of a script
PAGES = 200  # of 4 KiB
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
  sqlite3.SQLITE_FUNCTION,
}
# Each script is one transaction of ours; its own brackets change nothing.
COMMENT = re.compile(r'^(\s*(--[^\n]*(\n|$)|/\*.*?\*/))+', re.DOTALL)
BRACKETS = ('BEGIN', 'COMMIT', 'END')


class ScriptError(Exception):
  """A script that sqlite or a guard refused; the database is as before it."""

  def __init__(self, message: str, timeout: bool = False):
    """Keeps whether the instruction limit was what ended it."""
    super().__init__(message)
    self.timeout = timeout


class Database:
  """One in-memory database; `run` executes a script whole or not at all."""

  def __init__(self, image: bytes):
    """Opens a database serialised by `build`."""
    self._own = True  # statements of ours pass the authoriser
    self._db = sqlite3.connect(':memory:', isolation_level=None)
    self._db.deserialize(image)
    self._db.execute(f'PRAGMA max_page_count={PAGES}')
    self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LENGTH)
    self._db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    self._db.set_authorizer(self._authorise)
    self._db.set_progress_handler(self._interrupt, STEPS)

  def close(self) -> None:
    """Forgets the database."""
    self._db.close()

  def run(self, script: str) -> list[tuple[Any, ...]]:
    """Executes statements in one transaction; returns the last rows.

    Raises:
      ScriptError: with sqlite's own words; nothing of the script stays.
    """
    if len(script) > LENGTH:
      raise ScriptError(f'script of {len(script)} characters is too long')
    rows: list[tuple[Any, ...]] = []
    self._db.execute('BEGIN')
    try:
      for statement in split(script):
        self._own = False
        try:
          rows = self._db.execute(statement).fetchmany(SHOWN)
        finally:
          self._own = True
      self._db.execute('COMMIT')
    except (sqlite3.Error, ValueError, OverflowError) as error:
      if self._db.in_transaction:
        self._db.execute('ROLLBACK')
      timeout = 'interrupted' in str(error)
      raise ScriptError(str(error), timeout) from None
    return rows

  def state(self, keyless: tuple[str, ...]) -> dict[str, Any]:
    """Everything that matters: schema and rows, free of spelling and order.

    Columns are compared by name, not by place; indices by table, columns and
    uniqueness, not by name. Tables in `keyless` leave out their `id` values.
    """
    objects = self._db.execute(
      "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    ).fetchall()
    tables = sorted(name for kind, name in objects if kind == 'table')
    state = {name: self._table(name, name in keyless) for name in tables}
    state['other objects'] = sorted(
      kind for kind, _ in objects if kind not in ('table', 'index')
    )
    state['integrity'] = (
      self._db.execute('PRAGMA integrity_check').fetchall(),
      self._db.execute('PRAGMA foreign_key_check').fetchall(),
    )
    return state

  def _table(self, name: str, keyless: bool) -> dict[str, Any]:
    quoted = '"' + name.replace('"', '""') + '"'
    info = self._db.execute(f'PRAGMA table_info({quoted})').fetchall()
    columns = sorted(
      (column, kind.upper(), notnull, default, key)
      for _, column, kind, notnull, default, key in info
    )
    links = self._db.execute(f'PRAGMA foreign_key_list({quoted})').fetchall()
    shown = [c[0] for c in columns if not (keyless and c[0] == 'id')]
    listed = ','.join('"' + c.replace('"', '""') + '"' for c in shown)
    rows = self._db.execute(f'SELECT {listed} FROM {quoted}').fetchall()
    return {
      'columns': columns,
      'indices': sorted(self._indices(quoted)),
      'links': sorted((link[2], link[3], link[4] or 'id') for link in links),
      'rows': sorted(map(repr, rows)),
    }

  def _indices(self, quoted: str) -> Iterator[tuple[Any, ...]]:
    listed = self._db.execute(f'PRAGMA index_list({quoted})').fetchall()
    for _, name, unique, origin, partial in listed:
      if origin == 'pk':
        continue
      inner = '"' + name.replace('"', '""') + '"'
      columns = self._db.execute(f'PRAGMA index_info({inner})').fetchall()
      yield tuple(str(c[2]) for c in columns), unique, partial

  def _authorise(self, action: int, *_: Any) -> int:
    if self._own or action in ALLOWED:
      return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY

  def _interrupt(self) -> bool:
    return not self._own


def split(script: str) -> Iterator[str]:
  """Statements of a script, without empty ones and transaction brackets."""
  start = 0
  for end, letter in enumerate(script, 1):
    if letter == ';' and sqlite3.complete_statement(script[start:end]):
      yield from _kept(script[start:end])
      start = end
  yield from _kept(script[start:])


def _kept(statement: str) -> Iterator[str]:
  text = COMMENT.sub('', statement.rstrip().rstrip(';')).strip()
  if text and text.split()[0].upper() not in BRACKETS:
    yield text


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
