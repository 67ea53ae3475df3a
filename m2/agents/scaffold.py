"""The scaffold file: prompts and workflow rules, text that evolution may edit.

A Markdown file of three sections. `# system` is the system text; `# tools` has
a line `name: description` for each tool; `# rules` has lines `name: text`,
which are added to the system text where `# system` says `{rules}`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

SECTIONS = ('system', 'tools', 'rules')
ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Scaffold:
  """What the agent says of itself and its tools."""

  system: str
  tools: Mapping[str, str]


def load(path: str) -> Scaffold:
  """Reads a scaffold; relative paths start at the repository's root.

  Raises:
    ValueError: a section or a line that does not fit; it is named.
  """
  file = pathlib.Path(path)
  file = file if file.is_absolute() else ROOT / file
  if not file.is_file():
    raise ValueError(f'prompt.scaffold={path!r}: there is no file {file}')
  sections: dict[str, list[str]] = {}
  name = ''
  for number, line in enumerate(file.read_text().splitlines(), 1):
    if line.startswith('# '):
      name = line[2:].strip()
      if name not in SECTIONS or name in sections:
        raise ValueError(
          f'{file}:{number}: section {name!r}; a scaffold has each of '
          f'{", ".join(SECTIONS)} once'
        )
      sections[name] = []
    elif name:
      sections[name].append(line)
    elif line.strip():
      raise ValueError(f'{file}:{number}: text before the first section')
  if missing := [name for name in SECTIONS if name not in sections]:
    raise ValueError(f'{file}: no section {", ".join(missing)}')
  rules = _pairs(file, sections['rules'])
  system = '\n'.join(sections['system'])
  if rules and '{rules}' not in system:
    raise ValueError(
      f'{file}: # rules has {", ".join(rules)}, but # system does not say '
      'where they stand: write {rules} there'
    )
  system = system.replace('{rules}', '\n'.join(rules.values())).strip()
  return Scaffold(system, _pairs(file, sections['tools']))


def _pairs(file: pathlib.Path, lines: list[str]) -> dict[str, str]:
  pairs = {}
  for line in filter(str.strip, lines):
    name, colon, text = line.partition(':')
    if not colon or name.strip() in pairs:
      raise ValueError(f'{file}: {line!r} is not one "name: text" of its own')
    pairs[name.strip()] = text.strip()
  return pairs
