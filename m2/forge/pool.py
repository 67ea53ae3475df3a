"""The data pool: every completion and reward, kept as it happened.

Tables over SQLAlchemy Core, in one SQLite file in write-ahead mode. Rows are
only ever added: triggers refuse updates and deletions, a second write of equal
content is ignored and one of other content is an error. Arrays are stored as
little-endian bytes, exactly as they were sampled.

Writes are collected and go in as one transaction when `BATCH` of them wait, and
before every read, `state` and `flush`. A killed process loses at most what came
after the last of these; a run flushes before it saves a checkpoint, so nothing
that a checkpoint refers to can be missing.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from m2 import types

BATCH = 512
_READ = 400  # episode ids per query: SQLite bounds the bound variables

_TABLES = sa.MetaData()
_COMPLETIONS = sa.Table(
  'completions',
  _TABLES,
  sa.Column('episode', sa.String, primary_key=True),
  sa.Column('step', sa.Integer, primary_key=True),
  sa.Column('prompt_ids', sa.LargeBinary, nullable=False),
  sa.Column('ids', sa.LargeBinary, nullable=False),
  sa.Column('logprobs', sa.LargeBinary, nullable=False),
  sa.Column('version', sa.Integer, nullable=False),
  sa.Column('stop', sa.String, nullable=False),
  sa.Column('seconds', sa.Float, nullable=False),
  sa.Column('experts', sa.LargeBinary),
  sa.Column('experts_shape', sa.String),
  sa.Column('digest', sa.LargeBinary, nullable=False),
)
_REWARDS = sa.Table(
  'rewards',
  _TABLES,
  sa.Column('episode', sa.String, primary_key=True),
  sa.Column('outcome', sa.String, nullable=False),
  sa.Column('steps', sa.String, nullable=False),
  sa.Column('passed', sa.Boolean, nullable=False),
  sa.Column('parts', sa.String, nullable=False),
  sa.Column('evidence', sa.String, nullable=False),
  sa.Column('digest', sa.LargeBinary, nullable=False),
)
_CLOSINGS = sa.Table(
  'closings',
  _TABLES,
  sa.Column('episode', sa.String, primary_key=True),
  sa.Column('group', sa.String, nullable=False),
  sa.Column('task', sa.String, nullable=False),
  sa.Column('skill', sa.String, nullable=False),
  sa.Column('digest', sa.LargeBinary, nullable=False),
)
_RUNS = sa.Table(
  'runs', _TABLES, sa.Column('run', sa.Integer, primary_key=True)
)
_ALL = (_COMPLETIONS, _REWARDS, _CLOSINGS)


class PoolError(Exception):
  """The database of a pool cannot be read or written."""


def file_url(path: pathlib.Path | str) -> sa.URL:
  """The URL of a pool in a file, whose path may hold `?`, `%` and the like."""
  return sa.URL.create('sqlite', database=str(path))


class DataPool:
  """Append-only store of episodes, one writer; a context manager.

  Whatever reads or writes, `put`, `put_reward` and `close` included, raises
  PoolError where the database fails, as on a full disk; the writes still wait.
  """

  def __init__(self, url: str | sa.URL):
    """Opens or creates the pool.

    Args:
      url: `sqlite:///path` or `sqlite://` (memory); see `file_url`.

    Raises:
      ValueError: another database than SQLite.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != 'sqlite':
      raise ValueError(
        f'data pool {parsed}: only sqlite:///FILE and sqlite:// are supported'
      )
    memory = parsed.database in (None, '', ':memory:')
    self._name = 'in memory' if memory else parsed.database
    self._engine = sa.create_engine(
      parsed, poolclass=sa.pool.StaticPool if memory else None
    )
    sa.event.listen(self._engine, 'connect', _configure)
    with self._transaction() as connection:
      _TABLES.create_all(connection)
      for table in (*_ALL, _RUNS):
        for action in ('UPDATE', 'DELETE'):
          connection.exec_driver_sql(
            f'CREATE TRIGGER IF NOT EXISTS {table.name}_no_{action.lower()} '
            f'BEFORE {action} ON {table.name} BEGIN '
            f"SELECT RAISE(ABORT, '{table.name} is append-only'); END"
          )
    self._pending: dict[sa.Table, dict[tuple, dict[str, Any]]] = {
      table: {} for table in _ALL
    }
    self._count = 0

  def begin(self) -> int:
    """A number that no process got from this pool before; starts at 0.

    Ids made from it stay unique when a run is killed and goes on.
    """
    with self._transaction() as connection:
      run = connection.execute(
        sa.select(sa.func.count()).select_from(_RUNS)
      ).scalar_one()
      connection.execute(sa.insert(_RUNS), {'run': run})
    return run

  def put(self, completion: types.Completion) -> None:
    """Adds one completion."""
    experts = completion.experts
    # Numbers as Python's own: SQLite would store numpy's as bytes.
    self._add(
      _COMPLETIONS,
      {
        'episode': completion.episode,
        'step': int(completion.step),
        'prompt_ids': _bytes(completion.prompt_ids, '<i4'),
        'ids': _bytes(completion.ids, '<i4'),
        'logprobs': _bytes(completion.logprobs, '<f4'),
        'version': int(completion.version),
        'stop': str(completion.stop),
        'seconds': float(completion.seconds),
        'experts': None if experts is None else _bytes(experts, '<i4'),
        'experts_shape': (
          None if experts is None else json.dumps(np.shape(experts))
        ),
      },
    )

  def put_reward(self, reward: types.Reward) -> None:
    """Adds the reward of an episode."""
    parts = {name: float(value) for name, value in reward.parts.items()}
    self._add(
      _REWARDS,
      {
        'episode': reward.episode,
        'outcome': str(reward.outcome),
        'steps': json.dumps([float(value) for value in reward.steps]),
        'passed': bool(reward.passed),
        'parts': json.dumps(parts, sort_keys=True),
        'evidence': reward.evidence,
      },
    )

  def close(
    self, episode: str, *, group: str = '', task: str = '', skill: str = ''
  ) -> None:
    """Declares an episode complete: nothing follows.

    Args:
      episode: its id.
      group: prompt group whose statistics it enters.
      task: id of the task.
      skill: the skill that the task exercises.
    """
    self._add(
      _CLOSINGS,
      {'episode': episode, 'group': group, 'task': task, 'skill': skill},
    )

  def read(self, episodes: Sequence[str]) -> list[types.Episode]:
    """The closed episodes with these ids, in this order.

    Raises:
      KeyError: an episode that is unknown, not closed, or without a reward.
      ValueError: a completion is missing; or a scored episode without exactly
        one reward for each.
    """
    self.flush()
    found: dict[sa.Table, dict[str, list]] = {table: {} for table in _ALL}
    with self._transaction() as connection:
      for table in _ALL:
        for at in range(0, len(episodes), _READ):
          part = list(episodes[at : at + _READ])
          query = sa.select(table).where(table.c.episode.in_(part))
          for row in connection.execute(query):
            found[table].setdefault(row.episode, []).append(row)
    return [_episode(id, found) for id in episodes]

  def state(self) -> dict[str, int]:
    """Rows of each table."""
    self.flush()
    with self._transaction() as connection:
      return {
        table.name: connection.execute(
          sa.select(sa.func.count()).select_from(table)
        ).scalar_one()
        for table in _ALL
      }

  def flush(self) -> None:
    """Writes what waits, in one transaction."""
    if not any(self._pending.values()):
      return
    with self._transaction() as connection:
      for table, rows in self._pending.items():
        if rows:
          _insert(connection, table, rows)
    for rows in self._pending.values():
      rows.clear()
    self._count = 0

  def __enter__(self) -> 'DataPool':
    """Gives the pool itself."""
    return self

  def __exit__(self, *_) -> None:
    """Disposes of it."""
    self.dispose()

  def dispose(self) -> None:
    """Flushes and closes the file."""
    try:
      self.flush()
    finally:
      self._engine.dispose()

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[sa.Connection]:
    try:
      with self._engine.begin() as connection:
        yield connection
    except sa.exc.SQLAlchemyError as error:
      # Its own text has the statement and a link as further lines.
      text = str(getattr(error, 'orig', None) or error)
      reason = text.partition('\n')[0]
      raise PoolError(
        f'data pool {self._name}: {reason}; make sure that its disk has space '
        'and that it can be written, and run again'
      ) from error

  def _add(self, table: sa.Table, row: dict[str, Any]) -> None:
    row['digest'] = _digest(row)
    key = tuple(row[column.name] for column in table.primary_key)
    known = self._pending[table].setdefault(key, row)
    if known['digest'] != row['digest']:
      raise _conflict(table, key)
    self._count += known is row
    if self._count >= BATCH:
      self.flush()


def _configure(connection, record) -> None:
  del record  # SQLAlchemy passes it to every listener
  cursor = connection.cursor()
  cursor.execute('PRAGMA journal_mode=WAL')
  cursor.execute('PRAGMA synchronous=NORMAL')
  cursor.close()


def _insert(connection, table: sa.Table, rows: dict[tuple, dict]) -> None:
  values = list(rows.values())
  result = connection.execute(
    sqlite.insert(table).on_conflict_do_nothing(), values
  )
  if result.rowcount == len(values):
    return
  # Some were there before: equal content is a repeat, other is a mistake.
  columns = list(table.primary_key)
  for key, row in rows.items():
    match = sa.and_(*(column == part for column, part in zip(columns, key)))
    digest = connection.execute(
      sa.select(table.c.digest).where(match)
    ).scalar_one()
    if digest != row['digest']:
      del rows[key]  # the others still go in at the next flush
      raise _conflict(table, key)


def _conflict(table: sa.Table, key: tuple) -> ValueError:
  return ValueError(
    f'{table.name} {key}: already written with other content; the pool is '
    'append-only'
  )


def _bytes(array: np.ndarray, dtype: str) -> bytes:
  return np.ascontiguousarray(array, dtype).tobytes()


def _digest(row: dict[str, Any]) -> bytes:
  hasher = hashlib.blake2b(digest_size=16)
  for name in sorted(row):
    value = row[name]
    data = value if isinstance(value, bytes) else repr(value).encode()
    hasher.update(b'%d:%b' % (len(data), data))
  return hasher.digest()


def _episode(id: str, found: dict[sa.Table, dict[str, list]]) -> types.Episode:
  for table in (_CLOSINGS, _REWARDS):
    if id not in found[table]:
      raise KeyError(f'episode {id!r} is not in {table.name}')
  closing, reward = found[_CLOSINGS][id][0], found[_REWARDS][id][0]
  rewards = tuple(json.loads(reward.steps))
  rows = sorted(found[_COMPLETIONS].get(id, []), key=lambda row: row.step)
  steps = [row.step for row in rows]
  scored = reward.outcome == types.Outcome.SCORE
  count = len(rewards) if scored else len(rows)
  if steps != list(range(count)):
    raise ValueError(
      f'episode {id!r}: completions {steps} but {len(rewards)} rewards; each '
      'action of a scored episode needs exactly one'
    )
  return types.Episode(
    id=id,
    group=closing.group,
    task=closing.task,
    skill=closing.skill,
    completions=tuple(_completion(row) for row in rows),
    reward=types.Reward(
      episode=id,
      outcome=types.Outcome(reward.outcome),
      steps=rewards,
      passed=reward.passed,
      parts=json.loads(reward.parts),
      evidence=reward.evidence,
    ),
  )


def _completion(row) -> types.Completion:
  experts = None
  if row.experts is not None:
    experts = np.frombuffer(row.experts, '<i4').reshape(
      json.loads(row.experts_shape)
    )
  return types.Completion(
    episode=row.episode,
    step=row.step,
    prompt_ids=np.frombuffer(row.prompt_ids, '<i4'),
    ids=np.frombuffer(row.ids, '<i4'),
    logprobs=np.frombuffer(row.logprobs, '<f4'),
    version=row.version,
    stop=types.StopReason(row.stop),
    seconds=row.seconds,
    experts=experts,
  )
