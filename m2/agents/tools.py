"""The tools an agent may call: schemas, and dispatch to its workspace."""

from collections.abc import Mapping
from typing import Any

from m2 import types
from m2.agents import scaffold

FINISH = 'finish'
# Parameters of each tool; the descriptions are the scaffold's.
PARAMETERS: dict[str, dict[str, Any]] = {
  'sql': {
    'type': 'object',
    'properties': {'script': {'type': 'string'}},
    'required': ['script'],
  },
  FINISH: {'type': 'object', 'properties': {}},
}


def schemas(guide: scaffold.Scaffold) -> list[Mapping[str, Any]]:
  """OpenAI-style tool schemas, in the order of the scaffold.

  Raises:
    ValueError: the scaffold and the tools do not name each other.
  """
  if set(guide.tools) != set(PARAMETERS):
    raise ValueError(
      f'the scaffold describes {sorted(guide.tools)}; the tools are '
      f'{sorted(PARAMETERS)}'
    )
  return [
    {
      'type': 'function',
      'function': {
        'name': name,
        'description': text,
        'parameters': PARAMETERS[name],
      },
    }
    for name, text in guide.tools.items()
  ]


def problem(request: types.ToolCall) -> str:
  """What is wrong with a call; '' if it can be carried out.

  The parser checks calls against the schemas it was shown; a prompt without
  tools shows none.
  """
  if request.name not in PARAMETERS:
    return f'there is no tool {request.name!r}'
  known = PARAMETERS[request.name]
  missing = [n for n in known.get('required', ()) if n not in request.arguments]
  extra = [n for n in request.arguments if n not in known['properties']]
  if missing or extra:
    return f'{request.name}: missing {missing}, unknown {extra}'
  null = [n for n, value in request.arguments.items() if value is None]
  return f'{request.name}: {null} must not be null' if null else ''


async def call(request: types.ToolCall, workspace: types.Workspace) -> str:
  """Carries out one call; the answer is what the model reads."""
  if request.name == 'sql':
    return await workspace.execute(str(request.arguments['script']))
  return 'ok'
