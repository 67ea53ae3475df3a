"""A tiny run in its own process, to be killed: `python -m tests.train.worker`.

Arguments: the workdir, and settings as `section.field=value`.
"""

import dataclasses
import pathlib
import sys

import jax

from m2.train import loop
from tests.train import small

# One layer: the loop does not care, and a second makes its programs half as
# large again.
MODEL = dataclasses.replace(small.MODEL, layers=1)

WORDS = 'select create table alter column index drop rename from where'.split()


def source() -> list[dict[str, str]]:
  """Sentences with a pattern that a small model learns at once."""
  return [
    {'text': ' '.join(WORDS[(i * k) % len(WORDS)] for k in range(5))}
    for i in range(200)
  ]


def settings(*arguments: str):
  """A config of `small.run_config` with `section.field=value` changes."""
  changes: dict = {'model': {'layers': MODEL.layers}}
  for argument in arguments:
    path, value = argument.split('=')
    section, _, field = path.rpartition('.')
    node = changes.setdefault(section, {}) if section else changes
    node[field] = type_of(value)
  return small.run_config(**changes)


def type_of(text: str) -> int | float | str:
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)  # as tests/conftest.py has it
  loop.run(settings(*sys.argv[2:]), pathlib.Path(sys.argv[1]), source())
