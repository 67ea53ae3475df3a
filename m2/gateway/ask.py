"""What a client of any API asks for, in one form, and how JSON becomes it.

Nothing is dropped in silence: a field that would change the answer and that is
not served is refused by its name, and so is one that nobody knows. A field that
is null is absent.
"""

import collections
import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from m2 import types

NUMBER = int, float
MOST = 64  # answers of a request; stop strings of one


class Refusal(ValueError):
  """A request that cannot be served as it is.

  Attributes:
    field: path of what is wrong, '' if it is no single field.
    status: of HTTP.
  """

  def __init__(self, message: str, field: str = '', status: int = 400):
    """Says what is wrong, and with which field."""
    self.field, self.status = printable(field), status
    super().__init__(printable(f'{field}: {message}' if field else message))


@dataclasses.dataclass(frozen=True)
class Ask:
  """One request.

  Attributes:
    messages: the conversation.
    tools: OpenAI-style schemas; empty for none.
    sampling: how to sample.
    count: answers.
    stop: strings that end an answer.
    stream: send parts as they come.
    usage: of a stream, end it with the numbers of tokens.
    logprobs: the log-probability of every sampled token.
    ids: the ids of prompt and answer, and the version of the weights.
  """

  messages: tuple[types.Message, ...]
  tools: tuple[Mapping[str, Any], ...]
  sampling: types.Sampling
  count: int = 1
  stop: tuple[str, ...] = ()
  stream: bool = False
  usage: bool = False
  logprobs: bool = False
  ids: bool = False


def printable(text: str) -> str:
  """The text, with what UTF-8 cannot write spelled out."""
  return text.encode('utf-8', 'backslashreplace').decode()


class Fields:
  """A JSON object whose fields are taken by name and type."""

  def __init__(self, tree: Any, path: str = ''):
    """Wraps an object.

    Args:
      tree: what the JSON holds.
      path: of it in the request, for messages.

    Raises:
      Refusal: it is no object.
    """
    if not isinstance(tree, Mapping):
      raise Refusal(f'expected an object, not {_shown(tree)}', path)
    self._left = {k: v for k, v in tree.items() if v is not None}
    self._path = path

  def path(self, name: str) -> str:
    """The path of a field."""
    return f'{self._path}.{name}' if self._path else name

  def take(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """Removes a field and gives its value; `default` where it is absent.

    Raises:
      Refusal: it is of another type; `...` as default: it is missing.
    """
    if name not in self._left:
      if default is ...:
        raise Refusal('is missing', self.path(name))
      return default
    value = self._left.pop(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wrong = isinstance(value, bool) and bool not in kinds
    if wrong or not isinstance(value, kinds):
      names = ' or '.join(_NAMES[kind] for kind in kinds)
      raise Refusal(f'expected {names}, not {_shown(value)}', self.path(name))
    return value

  def only(self, name: str, *allowed: Any) -> None:
    """Removes a field that may have these values alone, or be absent.

    Raises:
      Refusal: it has another.
    """
    value = self._left.pop(name, None)
    if value is not None and not any(
      value == good and isinstance(value, bool) == isinstance(good, bool)
      for good in allowed
    ):
      known = ', '.join(map(_shown, allowed))
      raise Refusal(
        f'{_shown(value)} is not served here, only {known}', self.path(name)
      )

  def ignore(self, *names: str) -> None:
    """Removes fields that change no answer."""
    for name in names:
      self._left.pop(name, None)

  def close(self) -> None:
    """Refuses what is left.

    Raises:
      Refusal: something is.
    """
    for name in self._left:
      raise Refusal('is not served here; leave it out', self.path(name))


def number(
  fields: Fields, name: str, default: float, low: float, high: float
) -> float:
  """Takes a number in [low, high].

  Raises:
    Refusal: it is none, or outside.
  """
  value = fields.take(name, NUMBER, default)
  if not low <= value <= high:  # false for NaN
    raise Refusal(
      f'{_shown(value)} is not in [{low}, {high}]', fields.path(name)
    )
  return value


def whole(fields: Fields, name: str, default: int, low: int, high: int) -> int:
  """Takes a whole number in [low, high].

  Raises:
    Refusal: it is none, or outside.
  """
  value = fields.take(name, int, default)
  if not low <= value <= high:
    raise Refusal(
      f'{_shown(value)} is not in [{low}, {high}]', fields.path(name)
    )
  return value


def sampling(fields: Fields, max_new: int, seed: int) -> types.Sampling:
  """Takes how to sample, as far as all APIs name it the same.

  Raises:
    Refusal: a value out of range.
  """
  return types.Sampling(
    max_new=max_new,
    temperature=number(fields, 'temperature', 1.0, 0, 2),
    top_p=number(fields, 'top_p', 1.0, 1e-6, 1),
    top_k=whole(fields, 'top_k', 0, 0, 2**31 - 1),
    seed=seed,
  )


def strings(fields: Fields, name: str) -> tuple[str, ...]:
  """Takes stop strings: one, a list of some, or none.

  Raises:
    Refusal: what is there is neither, too many, or empty.
  """
  value = fields.take(name, (str, list), [])
  found = (value,) if isinstance(value, str) else tuple(value)
  if not all(isinstance(word, str) and word for word in found):
    raise Refusal('expected strings that are not empty', fields.path(name))
  if len(found) > MOST:
    raise Refusal(f'{len(found)} are more than {MOST}', fields.path(name))
  return found


def text(content: Any, path: str, fields: Sequence[str] = ()) -> str:
  """The text of a content: itself, or its text parts, joined.

  Args:
    content: what the message has.
    path: of it.
    fields: what parts may have beside type and text, without effect.

  Raises:
    Refusal: other parts, such as images: the model reads text alone.
  """
  if content is None or isinstance(content, str):
    return content or ''
  if not isinstance(content, list):
    raise Refusal(f'expected text or parts, not {_shown(content)}', path)
  texts = []
  for index, part in enumerate(content):
    part = Fields(part, f'{path}[{index}]')
    part.only('type', 'text', 'input_text')
    texts.append(part.take('text', str, ...))
    part.ignore(*fields)
    part.close()
  return ''.join(texts)


def in_order(
  results: Sequence[tuple[str, str, types.Message]], calls: Sequence[str]
) -> list[types.Message]:
  """Results of tools in the order of the calls that they answer.

  The model's format tells results apart by their order alone, so that there has
  to be one for each call, or none at all, of a turn that was broken off.

  Args:
    results: path in the request, id of the call, message.
    calls: ids of the calls of the turn before.

  Raises:
    Refusal: a result of no such call, two of one, or none of one.
  """
  if not results:
    return []
  found: dict[str, types.Message] = {}
  known = set(calls)
  if len(known) < len(calls):
    raise Refusal('two calls before it have the same id', results[0][0])
  for path, id, message in results:
    if id not in known:
      raise Refusal(f'no call before it has the id {_shown(id)}', path)
    if id in found:
      raise Refusal(f'the call {_shown(id)} is answered twice', path)
    found[id] = message
  for id in calls:
    if id not in found:
      raise Refusal(f'the call {_shown(id)} has no result', results[-1][0])
  return [found[id] for id in calls]


def seed() -> int:
  """One for a request that names none."""
  return secrets.randbits(63)


def load(data: str | bytes, path: str = '') -> Any:
  """What JSON says.

  Args:
    data: the JSON.
    path: of it in a request, for messages.

  Raises:
    Refusal: it is none, holds what is none, such as NaN, or a name twice.
  """

  def refuse(name: str):
    raise ValueError(f'{name} is no JSON')

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      counts = collections.Counter(name for name, _ in pairs)
      twice, _ = counts.most_common(1)[0]
      raise ValueError(f'{_shown(twice)} is given twice')
    return found

  try:
    return json.loads(data, parse_constant=refuse, object_pairs_hook=once)
  except (ValueError, RecursionError) as error:
    raise Refusal(f'no JSON: {error}', path) from None


_NAMES = {
  bool: 'true or false',
  str: 'text',
  int: 'a whole number',
  float: 'a number',
  list: 'a list',
  dict: 'an object',
}


def _shown(value: Any) -> str:
  return f'{value!r:.100}'
