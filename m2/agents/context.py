"""Context policies: s_(t+1) = f(s_t, a_t, o_t) (report 6.2.3).

A policy sees the whole conversation before every request and returns what the
model is shown; states after it are what is recorded and trained on.
"""

from collections.abc import Callable, Sequence

from m2 import types

Policy = Callable[[Sequence[types.Message]], Sequence[types.Message]]


def keep(messages: Sequence[types.Message]) -> Sequence[types.Message]:
  """The conversation as it is."""
  return messages


def truncate(limit: int) -> Policy:
  """Shortens tool answers that the model has replied to, to `limit`."""

  def shorten(messages: Sequence[types.Message]) -> Sequence[types.Message]:
    replied = [i for i, m in enumerate(messages) if m.role == 'assistant']
    last = replied[-1] if replied else -1
    return [
      types.Message('tool', message.content[:limit])
      if message.role == 'tool' and index < last
      else message
      for index, message in enumerate(messages)
    ]

  return shorten


def policy(tool_chars: int) -> Policy:
  """The policy of the settings: `keep`, or `truncate` at a positive limit."""
  return truncate(tool_chars) if tool_chars else keep
