"""The ledger: an append-only, hash-chained record of an evolution round.

One JSON object a line. Every entry carries the SHA-256 of the one before, so a
changed, removed, inserted or reordered line breaks the chain, and opening the
file says where. Beside it `<name>.head.json` holds how many entries were
acknowledged and the last hash, so a tail that was cut off shows as well.

This makes tampering evident, not impossible: who rewrites both files can
rewrite history. Results therefore print the head hash; kept elsewhere, it pins
the whole record.

A process killed while it writes leaves a torn last line. It was never
acknowledged, so the next writer moves its bytes to `<name>.torn`, and records
an entry of kind `recovered` that says so.
"""

import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from m2.evolve import provenance

GENESIS = '0' * 64  # what the first entry follows
# What reading JSON that somebody else wrote may raise.
_DAMAGE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
_FIELDS = ('data', 'hash', 'index', 'kind', 'previous', 'time')


class LedgerError(RuntimeError):
  """The record is not what it was, or what is asked would break its rules."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the ledger.

  Attributes:
    index: position, from 0.
    time: UTC, ISO 8601, to the second.
    kind: what happened: registered, proposed, decided and so on.
    data: JSON-able particulars.
    previous: hash of the entry before; `GENESIS` for the first.
    hash: SHA-256 of the canonical JSON of all the other fields.
  """

  index: int
  time: str
  kind: str
  data: Mapping[str, Any]
  previous: str
  hash: str


class Ledger:
  """A verified ledger, open for appending by this process alone.

  Use as a context manager; leaving it releases the lock.

  Args:
    path: the JSONL file; created if absent.

  Raises:
    LedgerError: the file fails verification, or another process has it open.
  """

  def __init__(self, path: pathlib.Path):
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._lock = open(self.path.with_suffix('.lock'), 'a')
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self._lock.close()
      raise LedgerError(
        f'{self.path} is open in another process; one round at a time'
      ) from None
    try:
      self._open()
    except BaseException:
      self._lock.close()
      raise

  def __enter__(self) -> 'Ledger':
    return self

  def __exit__(self, *unused) -> None:
    self._lock.close()

  @property
  def head(self) -> str:
    """Hash of the last entry."""
    return self.entries[-1].hash if self.entries else GENESIS

  def find(self, kind: str) -> Entry | None:
    """The first entry of `kind`, if there is one."""
    return next((entry for entry in self.entries if entry.kind == kind), None)

  def append(self, kind: str, data: Mapping[str, Any]) -> Entry:
    """Writes an entry through to the disk, then acknowledges it.

    Raises:
      TypeError, ValueError: `data` is not JSON, or holds NaN or infinity.
    """
    body = {
      'index': len(self.entries),
      'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'kind': kind,
      'data': json.loads(provenance.canonical(data)),
      'previous': self.head,
    }
    entry = Entry(**body, hash=provenance.digest(body))
    line = provenance.canonical(dataclasses.asdict(entry)) + '\n'
    with open(self.path, 'ab') as file:
      file.write(line.encode())
      file.flush()
      os.fsync(file.fileno())
    self.entries.append(entry)
    self._acknowledge()
    return entry

  def once(self, kind: str, data: Mapping[str, Any]) -> Entry:
    """Appends unless an entry of `kind` exists; then it must say the same.

    A round that is run again after a kill goes through the same steps; what it
    finds must be what it recorded.

    Raises:
      LedgerError: the recorded entry differs; the message names the fields.
    """
    entry = self.find(kind)
    if entry is None:
      return self.append(kind, data)
    fresh = json.loads(provenance.canonical(data))
    changed = provenance.difference(entry.data, fresh)
    if changed:
      raise LedgerError(
        f'{self.path}: entry {entry.index} ({kind}) was recorded with other '
        f'values of {", ".join(changed)}; start a new workdir for a new round'
      )
    return entry

  def _open(self) -> None:
    head = self.path.with_suffix('.head.json')
    if not self.path.exists() and not head.exists():
      self.entries: list[Entry] = []
      self._acknowledge()
      return
    entries, torn = _verify(self.path)
    self.entries = list(entries)
    if torn:
      self._recover(torn)
    else:
      self._acknowledge()  # of a line whose writer died right after it

  def _recover(self, torn: bytes) -> None:
    with open(self.path.with_suffix('.torn'), 'ab') as file:
      file.write(torn + b'\n')
    with open(self.path, 'r+b') as file:
      file.truncate(self.path.stat().st_size - len(torn))
    self.append(
      'recovered',
      {'bytes': len(torn), 'sha256': hashlib.sha256(torn).hexdigest()},
    )

  def _acknowledge(self) -> None:
    provenance.write_json(
      self.path.with_suffix('.head.json'),
      {'count': len(self.entries), 'hash': self.head},
    )


def read(path: pathlib.Path) -> tuple[Entry, ...]:
  """Verifies and reads a ledger without opening it for writing.

  Raises:
    LedgerError: the chain is broken, the tail was cut, or the last line is
      torn; the message says where.
  """
  entries, torn = _verify(pathlib.Path(path))
  if torn:
    raise LedgerError(
      f'{path}: line {len(entries) + 1} is torn: its writer was killed; run '
      'the round again to recover'
    )
  return entries


def _verify(path: pathlib.Path) -> tuple[tuple[Entry, ...], bytes]:
  """All whole entries, checked, and the bytes of a torn last line."""
  count, last = _read_head(path)
  if not path.exists() and count:
    raise LedgerError(f'{path} is missing: {count} entries were acknowledged')
  content = path.read_bytes() if path.exists() else b''
  *lines, torn = content.split(b'\n')
  entries: list[Entry] = []
  for line in lines:
    previous = entries[-1].hash if entries else GENESIS
    entries.append(_check_line(path, line, len(entries), previous))
  hashes = [GENESIS, *(entry.hash for entry in entries)]
  # One entry more than acknowledged: its writer died between the two files.
  if len(entries) not in (count, count + 1) or hashes[count] != last:
    raise LedgerError(
      f'{path} holds {len(entries)} entries, but {count} were acknowledged '
      f'up to {last[:12]}: the tail was cut off or replaced'
    )
  return tuple(entries), torn


def _read_head(path: pathlib.Path) -> tuple[int, str]:
  """How many entries were acknowledged, and the hash of the last."""
  head = path.with_suffix('.head.json')
  try:
    known = json.loads(head.read_bytes())
    return int(known['count']), str(known['hash'])
  except FileNotFoundError:
    raise LedgerError(f'{head} is missing: the record is not whole') from None
  except _DAMAGE as error:
    raise LedgerError(f'{head} is damaged: {error!r}') from None


def _check_line(
  path: pathlib.Path, line: bytes, index: int, previous: str
) -> Entry:
  where = f'{path}: line {index + 1}'
  try:
    fields = json.loads(line)
    # Canonical bytes: no repeated key can hide a second value.
    canonical = provenance.canonical(fields).encode() == line
    sound = canonical and isinstance(fields, dict)
  except _DAMAGE:
    sound = False
  if not sound or sorted(fields) != list(_FIELDS):
    raise LedgerError(f'{where} is not an entry as this code writes it')
  body = {name: fields[name] for name in _FIELDS if name != 'hash'}
  if provenance.digest(body) != fields['hash']:
    raise LedgerError(f'{where} was changed: its hash does not match')
  if fields['index'] != index or fields['previous'] != previous:
    raise LedgerError(f'{where} does not follow the line before it')
  return Entry(**fields)
