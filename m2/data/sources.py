"""Random-access sources of rows: JSON lines, ArrayRecord, files, memory.

A row is a dictionary of one of three shapes:

  {'text': str}                             every token is trained
  {'messages': [...], 'tools': [...]}       a chat; the model's turns are
  {'tokens': [int], 'weights': [float]}     ready-made; weights are optional

A key whose value is null counts as absent.

Row i is always the same row, in any process, and reading one row reads no
other: a broken row is an error of its own that says where it is.
"""

import bisect
import codecs
import glob as globbing
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_record.python import array_record_data_source

Row = Mapping[str, Any]

STDLIB = 'stdlib'
# Installed packages are not the standard library; tests hold broken encodings.
_NOT_STDLIB = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__'}
_SAMPLED = 64  # rows that a fingerprint reads
_SCAN = 1 << 22  # bytes read at once while indexing lines
_TEXT = np.ones(256, bool)  # whether a byte makes a line more than blank
_TEXT[list(b' \t\n\r\v\f')] = False


@runtime_checkable
class Source(Protocol):
  """What the pipeline reads rows from."""

  def __len__(self) -> int:
    """Number of rows."""
    ...

  def __getitem__(self, index: int) -> Row:
    """Row `index`; ValueError says where a broken one is and why."""
    ...

  def where(self, index: int) -> str:
    """Where a person finds row `index`, such as 'a.jsonl line 7'."""
    ...


class Memory:
  """Rows that are already in memory."""

  def __init__(self, rows: Sequence[Row], name: str = 'rows'):
    """Keeps `rows`; `name` says in errors where they came from."""
    self._rows = rows
    self._name = name

  def __len__(self) -> int:
    """Number of rows."""
    return len(self._rows)

  def __getitem__(self, index: int) -> Row:
    """Row `index`."""
    return self._rows[index]

  def where(self, index: int) -> str:
    """Its index."""
    return f'{self._name}[{index}]'


class Files:
  """One text row per file."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    """Takes UTF-8 files, in the order given."""
    self._paths = list(paths)

  def __len__(self) -> int:
    """Number of files."""
    return len(self._paths)

  def __getitem__(self, index: int) -> Row:
    """The file's text.

    Raises:
      ValueError: it cannot be read or is not UTF-8.
    """
    try:
      return {'text': self._paths[index].read_text(encoding='utf-8-sig')}
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f'{self.where(index)}: {error}') from None

  def where(self, index: int) -> str:
    """Its path."""
    return str(self._paths[index])


class JsonLines:
  """One JSON object per line; blank lines and a byte-order mark are skipped."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    """Indexes the lines of `paths` by their byte offsets.

    Raises:
      ValueError: a file cannot be read.
    """
    self._paths = list(paths)
    self._starts = [0]  # first row of each file, then the number of rows
    self._spans: list[np.ndarray] = []  # int64[rows, 3] begin, end, line
    for path in self._paths:
      try:
        spans = _index_lines(path)
      except OSError as error:
        raise ValueError(f'{path}: {error}') from None
      self._spans.append(spans)
      self._starts.append(self._starts[-1] + len(spans))

  def __len__(self) -> int:
    """Number of lines that are not blank."""
    return self._starts[-1]

  def __getitem__(self, index: int) -> Row:
    """The object on that line.

    Raises:
      ValueError: the line is no JSON object; the others stay readable.
    """
    path, begin, end, _ = self._find(index)
    try:
      with open(path, 'rb') as file:
        file.seek(begin)
        encoding = 'utf-8' if begin else 'utf-8-sig'
        row = json.loads(file.read(end - begin).decode(encoding))
    except (OSError, ValueError, RecursionError) as error:
      raise ValueError(f'{self.where(index)}: {error}') from None
    if not isinstance(row, dict):
      kind = type(row).__name__
      raise ValueError(f'{self.where(index)}: expected an object, got {kind}')
    return row

  def where(self, index: int) -> str:
    """Its file and line."""
    path, _, _, line = self._find(index)
    return f'{path} line {line}'

  def _find(self, index: int) -> tuple[pathlib.Path, int, int, int]:
    if not 0 <= index < len(self):
      raise IndexError(f'row {index} of {len(self)}')
    file = bisect.bisect_right(self._starts, index) - 1
    begin, end, line = self._spans[file][index - self._starts[file]]
    return self._paths[file], int(begin), int(end), int(line)


class ArrayRecord:
  """One JSON object per record of ArrayRecord files."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    """Opens the files.

    Raises:
      ValueError: one is no ArrayRecord file, or is cut short.
    """
    self._paths = [str(path) for path in paths]
    try:
      self._records = array_record_data_source.ArrayRecordDataSource(
        self._paths
      )
      self._length = len(self._records)
    except Exception as error:  # the library raises bare ones of several kinds
      raise ValueError(f'{", ".join(self._paths)}: {error}') from None

  def __len__(self) -> int:
    """Number of records."""
    return self._length

  def __getitem__(self, index: int) -> Row:
    """The object in that record.

    Raises:
      ValueError: the record is no JSON object.
    """
    try:
      row = json.loads(self._records[index])
    except (ValueError, RecursionError, RuntimeError) as error:
      raise ValueError(f'{self.where(index)}: {error}') from None
    if not isinstance(row, dict):
      kind = type(row).__name__
      raise ValueError(f'{self.where(index)}: expected an object, got {kind}')
    return row

  def where(self, index: int) -> str:
    """Its index over all the files."""
    return f'{", ".join(self._paths)} record {index}'


def fingerprint(source: Source) -> str:
  """How many rows, and a digest of some: 'N rows, like HEX'.

  At most _SAMPLED rows are read, evenly spaced, the first and last among them;
  broken ones count as such.
  """
  count, digest = len(source), hashlib.sha256()
  for index in np.linspace(0, count - 1, min(count, _SAMPLED)).astype(int):
    try:
      row = sorted(source[int(index)].items())
    except ValueError:
      row = 'broken'
    text = json.dumps(row, default=_plain, skipkeys=True)
    digest.update(text.encode() + b'\n')
  return f'{count} rows, like {digest.hexdigest()[:12]}'


def _plain(value: Any) -> Any:
  """What stands in a digest for what JSON does not know."""
  arrays = np.ndarray | np.generic
  return value.tolist() if isinstance(value, arrays) else type(value).__name__


KINDS = {'files': Files, 'jsonl': JsonLines, 'array_record': ArrayRecord}


def make(kind: str, path: str) -> Source:
  """Opens a source.

  Args:
    kind: files, jsonl or array_record.
    path: files and globs, separated by commas, taken in the order given (a
      glob's in sorted order); 'stdlib' stands for the sources of the running
      Python's standard library.

  Raises:
    ValueError: nothing matches, or a file cannot be opened.
  """
  if kind not in KINDS:
    raise ValueError(f'source {kind!r}: choose one of {", ".join(KINDS)}')
  if path == STDLIB:
    return KINDS[kind](_stdlib())
  paths: list[pathlib.Path] = []
  for pattern in filter(None, map(str.strip, path.split(','))):
    found = sorted(globbing.glob(pattern, recursive=True))
    if os.path.isfile(pattern):  # brackets and stars may be part of a name
      found = [pattern]
    files = [pathlib.Path(name) for name in found if os.path.isfile(name)]
    if not files:
      hint = '; a folder needs a glob such as folder/**/*' if found else ''
      raise ValueError(f'{pattern!r} matches no file{hint}')
    paths += files
  if not paths:
    raise ValueError(f'path {path!r} names no file')
  return KINDS[kind](paths)


def _stdlib() -> list[pathlib.Path]:
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  paths = (p.relative_to(root) for p in root.rglob('*.py'))
  return [root / p for p in sorted(paths) if not _NOT_STDLIB & set(p.parts)]


def _index_lines(path: pathlib.Path) -> np.ndarray:
  """Begin, end and number of each line that is not blank: int64[N, 3]."""
  ends, kept = [], []
  at, open_line = 0, False  # whether the line that is not at its end has text
  with open(path, 'rb') as file:
    while chunk := file.read(_SCAN):
      data = np.frombuffer(chunk, np.uint8)
      texts = _TEXT[data]
      if not at and chunk.startswith(codecs.BOM_UTF8):
        texts[: len(codecs.BOM_UTF8)] = False
      newlines = np.flatnonzero(data == ord('\n'))
      begins = np.concatenate([[0], newlines + 1])
      has_text = np.zeros(len(begins), bool)
      inside = begins < len(data)  # but for a line that begins with the next
      has_text[inside] = np.logical_or.reduceat(texts, begins[inside])
      has_text[0] |= open_line
      open_line = has_text[-1]
      kept.append(has_text[:-1])
      ends.append(newlines.astype(np.int64) + at)
      at += len(data)
  keep = np.concatenate([*kept, [open_line]])
  ends = np.concatenate([*ends, np.asarray([at], np.int64)])
  begins = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
  lines = np.stack([begins, ends, np.arange(1, len(ends) + 1)], axis=1)
  return lines[keep]
