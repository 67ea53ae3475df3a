"""What every section of settings is: frozen, hashable, and read by somebody."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator
from typing import Any


class Settings:
  """Base of the frozen sections; remembers which fields were read.

  Reads are recorded by (class name, field name), so that a run can tell which
  settings no code consulted (`unread`). Hashing and comparing do not count.
  """

  READS: typing.ClassVar[set[tuple[str, str]]] = set()

  def __getattribute__(self, name: str) -> Any:
    if not name.startswith('_'):
      Settings.READS.add((type(self).__name__, name))
    return object.__getattribute__(self, name)

  def _values(self) -> tuple:
    return tuple(
      object.__getattribute__(self, field.name)
      for field in dataclasses.fields(self)
    )

  def __eq__(self, other: object) -> bool:
    return type(self) is type(other) and self._values() == other._values()

  def __hash__(self) -> int:
    return hash((type(self), self._values()))


def section(cls):
  """Declares a settings section: a frozen dataclass that tracks reads."""
  return dataclasses.dataclass(frozen=True, eq=False)(cls)


def check(settings: Settings) -> None:
  """Checks a section that was made in Python; checking is not using.

  Raises:
    ValueError: a value that makes no sense; names it.
  """
  with _unnoticed():
    settings._check()


def replace[S: Settings](settings: S, **changes: Any) -> S:
  """`dataclasses.replace` of settings; copying is not using."""
  with _unnoticed():
    return dataclasses.replace(settings, **changes)


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
  before = frozenset(Settings.READS)
  try:
    yield
  finally:
    Settings.READS.intersection_update(before)


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def positive(settings: Settings, names: str) -> None:
  label = type(settings).__name__.removesuffix('Config').lower()
  for name in names.split():
    value = object.__getattribute__(settings, name)
    require(value > 0, f'{label}.{name}={value} must be positive')


def choice(
  settings: Settings, label: str, name: str, choices: tuple[str, ...]
) -> None:
  value = object.__getattribute__(settings, name)
  require(
    value in choices,
    f'{label}.{name}={value!r}: choose one of {", ".join(choices)}',
  )
