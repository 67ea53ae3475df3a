"""The markup of M2's conversations: special tokens, tags, tools, typed values.

A tool call travels as XML whose values are raw text: strings unescaped, every
other type as JSON. What a value means is therefore decided by the schema of
the tool, and by nothing else.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Public tokenizer ids 200000, 200034, 200019 to 200021 and 200050 to 200053.
PAD = ']!p~['
BOS = ']~!b['  # start of a conversation
ROLE = ']~b]'  # start of a role's block
EOS = '[e~['  # end of a message
DOCUMENT = ']!d~['  # also the unknown token; byte-level BPE never needs it
THINK = '<think>'
THINK_END = '</think>'
CALLS = '<minimax:tool_call>'
CALLS_END = '</minimax:tool_call>'
SPECIALS = (
  PAD,
  BOS,
  ROLE,
  EOS,
  DOCUMENT,
  THINK,
  THINK_END,
  CALLS,
  CALLS_END,
)

INVOKE_END = '</invoke>'
PARAMETER_END = '</parameter>'
# A name stops at the next '<' and has a greatest length: no quadratic rescans.
NAME = r'[^"<>\n]{1,256}'

_INTEGER = re.compile(r'\s*[+-]?[0-9]+\s*')
_NUMBER = re.compile(r'\s*[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?\s*')
_BOOLEANS = {'true': True, '1': True, 'false': False, '0': False}
# Kinds are tried in this order where a schema allows several: text fits all.
_KINDS = ('integer', 'number', 'boolean', 'object', 'array', 'unknown')
_TYPES = (*_KINDS, 'string', 'null')
# Other names of types that the model's tool guide knows, in lower case.
_ALIASES = {
  'str': 'string',
  'text': 'string',
  'int': 'integer',
  'float': 'number',
  'bool': 'boolean',
}
_JSON_TYPES = {'object': dict, 'array': list}
# bool comes before int, of which Python makes it one.
_PYTHON_TYPES = {
  'string': str,
  'boolean': bool,
  'integer': int,
  'number': float,
  'object': Mapping,
  'array': list | tuple,
}
# Keywords that only one type has.
_IMPLIED = {
  'properties': 'object',
  'additionalProperties': 'object',
  'items': 'array',
  'prefixItems': 'array',
}


@dataclasses.dataclass(frozen=True)
class Tool:
  """What a call of one tool is checked against.

  Attributes:
    kinds: the JSON-schema types of each declared parameter.
    required: parameters that a call must give.
    closed: undeclared parameters are refused (additionalProperties: false).
  """

  kinds: Mapping[str, frozenset[str]]
  required: tuple[str, ...]
  closed: bool


def function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
  """The function of an OpenAI-style tool or call, wrapped or not.

  Raises:
    ValueError: it is no mapping, or has no name.
  """
  inner = tool.get('function') or tool if isinstance(tool, Mapping) else None
  if not isinstance(inner, Mapping) or not isinstance(inner.get('name'), str):
    raise ValueError(
      f'{tool!r:.200}: expected a mapping with a name, or one under "function"'
    )
  return inner


def read_tools(
  tools: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Tool] | None:
  """Indexes tools by name for `decode`; None stays None (nothing is checked).

  Raises:
    ValueError: a tool is not a named function with an object schema, or a name
      is one that no call can be read back with.
  """
  if tools is None:
    return None
  index = {}
  for tool in tools:
    declared = function(tool)
    schema = declared.get('parameters') or {}
    if not isinstance(schema, Mapping):
      raise ValueError(f'tool {declared["name"]}: parameters is no schema')
    properties: dict[str, list[Any]] = {}
    required: dict[str, None] = {}
    members = _members(schema)
    for one in members:
      for name, kind in _properties(declared['name'], one).items():
        properties.setdefault(name, []).append(kind)
      required.update(dict.fromkeys(_required(declared['name'], one)))
    for name in (declared['name'], *properties):
      if not (isinstance(name, str) and re.fullmatch(NAME, name)):
        raise ValueError(
          f'tool {declared["name"]!r}: no call can hold the name {name!r}; '
          'names have 1 to 256 letters, none of them " < > or a line break'
        )
    index[declared['name']] = Tool(
      {
        name: _kinds({'allOf': kinds}, schema)
        for name, kinds in properties.items()
      },
      tuple(required),
      any(one.get('additionalProperties') is False for one in members),
    )
  return index


def _members(root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The schemas that all hold at `root`: its own, its $ref's, its allOf's."""
  found: list[Mapping[str, Any]] = []
  followed: set[str] = set()
  left: list[Any] = [root]
  while left:
    one = left.pop()
    if not isinstance(one, Mapping):
      continue
    found.append(one)
    place = one.get('$ref')
    if isinstance(place, str) and place not in followed:
      followed.add(place)
      left.append(_referred(place, root))
    options = one.get('allOf')
    left += reversed(options) if isinstance(options, list | tuple) else ()
  return found


def _properties(name: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
  properties = schema.get('properties') or {}
  if not isinstance(properties, Mapping):
    raise ValueError(
      f'tool {name}: properties is {properties!r:.200}; expected a mapping'
    )
  return properties


def _required(name: str, schema: Mapping[str, Any]) -> Sequence[str]:
  required = schema.get('required') or ()
  if not (
    isinstance(required, list | tuple)
    and all(isinstance(one, str) for one in required)
  ):
    raise ValueError(
      f'tool {name}: required is {required!r:.200}; expected a list of '
      'parameter names'
    )
  return required


def _kinds(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
  """The types a schema within `root` allows; text where it does not say."""
  found: set[str] = set()
  followed: set[str] = set()
  left = [schema]
  while left:
    one = left.pop()
    if not isinstance(one, Mapping):
      continue
    kinds = one.get('type')
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(kinds, list | tuple):
      found.update(map(_named, kinds))
      continue
    place = one.get('$ref')
    if isinstance(place, str) and place not in followed:
      followed.add(place)
      target = _referred(place, root)
      found |= {'unknown'} if target is None else set()
      left.append(target)
    values = one.get('enum')
    found |= set(map(_kind_of, values if isinstance(values, list) else ()))
    found |= {_kind_of(one['const'])} if 'const' in one else set()
    found |= {kind for word, kind in _IMPLIED.items() if word in one}
    for word in ('anyOf', 'oneOf', 'allOf'):
      options = one.get(word)
      left += options if isinstance(options, list | tuple) else ()
  return frozenset(found) or frozenset(['string'])


def _named(kind: Any) -> str:
  """The type that a schema means by the name `kind`."""
  name = kind.lower() if isinstance(kind, str) else ''
  name = _ALIASES.get(name, name)
  return name if name in _TYPES else 'unknown'


def _referred(place: str, root: Mapping[str, Any]) -> Any:
  """What a reference such as '#/$defs/Point' stands for; None if nothing."""
  head, *steps = place.split('/')
  found: Any = root if head == '#' else None
  for step in steps:
    step = step.replace('~1', '/').replace('~0', '~')
    found = found.get(step) if isinstance(found, Mapping) else None
  return found


def _kind_of(value: Any) -> str:
  """The JSON-schema type of a value that a schema lists."""
  for kind, types in _PYTHON_TYPES.items():
    if isinstance(value, types):
      return kind
  return 'null' if value is None else 'unknown'


def encode(value: Any) -> str:
  """The text of one argument: strings as they are, the rest as JSON.

  Raises:
    ValueError: the value is neither.
  """
  return value if isinstance(value, str) else to_json(value)


def to_json(value: Any) -> str:
  """JSON as the template writes it: real characters, ', ' and ': '.

  Raises:
    ValueError: the value cannot be written as JSON.
  """
  try:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f'{value!r:.200} is not JSON: {error}') from None


def decode(text: str, kinds: frozenset[str]) -> Any:
  """The value that the text of an argument stands for.

  The rule of the model's tool guide: one newline is dropped from each end;
  'null' in any case is None; then the schema decides. Where the guide falls
  back to text for a value that does not fit its type, this raises instead.

  Args:
    text: what stood between the parameter's tags.
    kinds: JSON-schema types it may have.

  Raises:
    ValueError: it has none of them.
  """
  text = text.removeprefix('\n').removesuffix('\n')
  if text.lower() == 'null':
    return None
  for kind in _KINDS:
    if kind in kinds:
      try:
        return _decode_as(text, kind)
      except (ValueError, RecursionError):
        continue  # another kind may fit; if none does, it is an error below
  if 'string' in kinds or 'unknown' in kinds:
    return text
  raise ValueError(f'expected {" or ".join(sorted(kinds))}')


def _decode_as(text: str, kind: str) -> Any:
  """`text` as exactly one kind; ValueError or RecursionError if it is not."""
  if kind == 'boolean':
    if text.strip().lower() not in _BOOLEANS:
      raise ValueError(text)
    return _BOOLEANS[text.strip().lower()]
  if kind in ('integer', 'number') and _INTEGER.fullmatch(text):
    return int(text)
  if kind == 'number' and _NUMBER.fullmatch(text):
    number = _finite(text)
    return int(number) if number.is_integer() else number
  if kind in ('integer', 'number'):
    raise ValueError(text)
  value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
  to_json(value).encode()  # refuses lone surrogates
  if kind in _JSON_TYPES and not isinstance(value, _JSON_TYPES[kind]):
    raise ValueError(text)
  return value


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise ValueError(text)
  return number


def _refuse(constant: str) -> None:
  """NaN and the infinities are Python's, not JSON's."""
  raise ValueError(f'{constant} is not JSON')
