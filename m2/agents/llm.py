"""Models that are no model, for tests of agents."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from m2 import types


class Scripted:
  """Says given messages, one a turn, to whoever asks; an `LLM`."""

  def __init__(self, replies: Mapping[str, Sequence[types.Message]]):
    """Takes the replies of each episode, in order."""
    self._replies = {
      name: collections.deque(said) for name, said in replies.items()
    }
    self.seen: list[tuple[str, tuple[types.Message, ...]]] = []

  async def chat(
    self,
    episode: str,
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
    sampling: types.Sampling,
  ) -> tuple[types.Message, types.StopReason]:
    """The next reply of `episode`.

    Raises:
      ValueError: nothing is left to say.
    """
    self.seen.append((episode, tuple(messages)))
    if not self._replies.get(episode):
      raise ValueError(f'no reply left for episode {episode!r}')
    return self._replies[episode].popleft(), types.StopReason.EOS
