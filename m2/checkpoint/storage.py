"""A directory of files: on disk, or in an object store.

`folder` takes a path or a URL (`gs://bucket/dir`, `s3://bucket/dir`, and
TensorStore's `file://` and `memory://`). Disks are read by the system's own
calls, stores by TensorStore, which Orbax brings along: it finds credentials the
way the vendors' tools do. For S3, AWS_REGION names the region where it is set,
and AWS_ENDPOINT_URL a server that speaks its protocol.

Every failure is one line with the file's name: FileNotFoundError, ValueError
for a file that is shorter than it should be, OSError for the rest.
"""

import os
import pathlib
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

# Half a minute of retries, not TensorStore's ten: a bucket that is not there
# or not ours is a mistake to report.
_RETRIES = {'max_retries': 5, 'initial_delay': '1s', 'max_delay': '10s'}
# One for all, so that `memory://` is the same store for writer and reader.
_CONTEXT = ts.Context(
  {'gcs_request_retries': _RETRIES, 's3_request_retries': _RETRIES}
)


class Writer(Protocol):
  """A file of known size that is filled in any order, by any thread."""

  def put(self, offset: int, data: np.ndarray) -> None:
    """Writes uint8 data at a byte of the file."""

  def close(self) -> None:
    """Gives the file its name; it is whole and durable then."""

  def abandon(self) -> None:
    """Leaves nothing of it."""


class Folder(Protocol):
  """What the checkpoint code asks of a directory.

  Attributes:
    gap: bytes that are cheaper to read than to skip by a second request.
    whole: whether a file is sent at once, from memory.
  """

  gap: int
  whole: bool

  def file(self, name: str) -> str:
    """The full name of a file, for messages."""

  def has(self, name: str) -> bool:
    """Whether the file is there."""

  def size_is(self, name: str, size: int) -> bool:
    """Whether the file has exactly this many bytes."""

  def read(self, name: str, start: int = 0, stop: int | None = None):
    """Bytes of a file, as uint8[stop - start]; None = to its end."""

  def create(self, name: str, size: int) -> Writer:
    """Begins a file."""

  def remove(self, name: str) -> None:
    """Removes a file; fine if it is not there."""


def is_url(path: str | os.PathLike) -> bool:
  """Whether `path` is a URL and not a path on a disk."""
  return '://' in os.fspath(path)


def folder(path: str | os.PathLike) -> Folder:
  """Opens a directory by its path or URL; it may be absent still.

  Raises:
    ValueError: the URL is of no known kind.
  """
  return _Store(os.fspath(path)) if is_url(path) else Disk(path)


def put(where: Folder, name: str, data: bytes) -> None:
  """Writes a small file; it appears with all its bytes."""
  writer = where.create(name, len(data))
  writer.put(0, np.frombuffer(data, np.uint8))
  writer.close()


def _short(file: str, stop: int) -> ValueError:
  return ValueError(
    f'{file}: truncated: it ends before byte {stop}; fetch it again'
  )


class Disk:
  """A directory of the file system; see `Folder`."""

  gap = 1 << 16
  whole = False

  def __init__(self, path: str | os.PathLike):
    """Opens a directory by its path."""
    self.path = pathlib.Path(path)

  def file(self, name: str) -> str:
    """See `Folder`."""
    return str(self.path / name)

  def has(self, name: str) -> bool:
    """See `Folder`."""
    return (self.path / name).is_file()

  def size_is(self, name: str, size: int) -> bool:
    """See `Folder`."""
    return (self.path / name).stat().st_size == size

  def read(self, name: str, start: int = 0, stop: int | None = None):
    """See `Folder`."""
    descriptor = os.open(self.path / name, os.O_RDONLY)
    try:
      stop = os.fstat(descriptor).st_size if stop is None else stop
      data = np.empty(stop - start, np.uint8)
      done = 0
      while done < data.size:
        count = os.preadv(descriptor, [data[done:]], start + done)
        if not count:
          raise _short(self.file(name), stop)
        done += count
      return data
    finally:
      os.close(descriptor)

  def create(self, name: str, size: int) -> '_DiskWriter':
    """See `Folder`."""
    return _DiskWriter(self.path / name, size)

  def remove(self, name: str) -> None:
    """See `Folder`."""
    (self.path / name).unlink(missing_ok=True)


class _DiskWriter:
  """Writes beside the final name and renames at the end."""

  def __init__(self, path: pathlib.Path, size: int):
    self._path = path
    self._partial = path.with_name(path.name + '.partial')
    self._descriptor = os.open(
      self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
    )
    try:
      os.truncate(self._descriptor, size)
    except OSError as error:
      self.abandon()
      raise OSError(f'{path}: not written: {error}') from error

  def put(self, offset: int, data: np.ndarray) -> None:
    view = memoryview(data)
    try:
      while view:
        count = os.pwrite(self._descriptor, view, offset)
        view, offset = view[count:], offset + count
    except OSError as error:
      raise OSError(f'{self._path}: not written: {error}') from error

  def close(self) -> None:
    try:
      os.fsync(self._descriptor)
    finally:
      os.close(self._descriptor)
    self._partial.rename(self._path)
    sync(self._path.parent)

  def abandon(self) -> None:
    os.close(self._descriptor)
    self._partial.unlink(missing_ok=True)


def sync(path: pathlib.Path) -> None:
  """Waits until a file's bytes, or a directory's names, are on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


class _Store:
  """A prefix of an object store, through TensorStore; see `Folder`."""

  gap = 1 << 20  # a request's delay is worth that much
  whole = True

  def __init__(self, url: str):
    self._url = url.rstrip('/') + '/'
    try:
      spec = ts.KvStore.Spec(self._url).to_json()
      if spec['driver'] == 's3':
        if endpoint := os.environ.get('AWS_ENDPOINT_URL'):
          spec |= {'endpoint': endpoint, 'aws_region': 'us-east-1'}
        if region := os.environ.get('AWS_REGION'):
          spec['aws_region'] = region
      self._files = ts.KvStore.open(spec, context=_CONTEXT).result()
    except ValueError as error:
      raise ValueError(f'{url}: no place for files: {_line(error)}') from None

  def file(self, name: str) -> str:
    return self._url + name

  def _ask(self, name: str, call: Any) -> Any:
    try:
      return call.result()
    except ValueError as error:  # all that TensorStore raises
      kind = PermissionError if _denied(error) else OSError
      raise kind(f'{self.file(name)}: {_line(error)}') from None

  def has(self, name: str) -> bool:
    return self._part(name, 0, 1) is not None

  def size_is(self, name: str, size: int) -> bool:
    last, behind = (
      self._part(name, stop - 1, stop) for stop in (size, size + 1)
    )
    return bool(last) and not behind

  def _part(self, name: str, start: int, stop: int | None) -> bytes | None:
    """Bytes of a file: b'' if it ends before; None if there is no file."""
    try:
      cut = slice(start, stop)
      found = self._ask(name, self._files.read(name, byte_range=cut))
    except OSError as error:
      if 'OUT_OF_RANGE' in str(error):
        return b''
      raise
    return found.value if found.state == 'value' else None

  def read(self, name: str, start: int = 0, stop: int | None = None):
    data = self._part(name, start, stop)
    if data is None:
      raise FileNotFoundError(f'{self.file(name)}: no such file')
    if stop is not None and len(data) != stop - start:
      raise _short(self.file(name), stop)
    return np.frombuffer(data, np.uint8)

  def create(self, name: str, size: int) -> '_StoreWriter':
    return _StoreWriter(self, name, size)

  def remove(self, name: str) -> None:
    self._ask(name, self._files.write(name, None))

  def send(self, name: str, data: bytes) -> None:
    """Writes a whole file."""
    self._ask(name, self._files.write(name, data))


class _StoreWriter:
  """Holds the file until it is whole: objects appear by one request."""

  def __init__(self, store: _Store, name: str, size: int):
    self._store, self._name = store, name
    self._data = bytearray(size)

  def put(self, offset: int, data: np.ndarray) -> None:
    self._data[offset : offset + data.size] = memoryview(data)

  def close(self) -> None:
    self._store.send(self._name, self._data)

  def abandon(self) -> None:
    self._data = bytearray()


def _denied(error: Exception) -> bool:
  text = str(error)
  return 'PERMISSION_DENIED' in text or 'UNAUTHENTICATED' in text


def _line(error: Exception) -> str:
  """The first line of TensorStore's message, cut to a readable length."""
  return str(error).splitlines()[0][:300]
