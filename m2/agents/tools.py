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


async def call(request: types.ToolCall, workspace: types.Workspace) -> str:
  """Carries out one call; the answer is what the model reads."""
  if request.name == 'sql':
    return await workspace.execute(str(request.arguments['script']))
  return 'ok'
