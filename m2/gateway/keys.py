"""Keys with which agents speak for episodes, and for no other.

A key is the episode's name and its signature under the server's secret. So the
server keeps none of them, and whoever knows the secret makes as many as needed.
"""

import hashlib
import hmac


def key(secret: str, episode: str) -> str:
  """The key of an episode.

  Raises:
    ValueError: a name that is empty, or that headers cannot carry.
  """
  if not episode or not (episode.isascii() and episode.isprintable()):
    raise ValueError(f'{episode=}: expected printable ASCII')
  return f'{episode}.{_signature(secret, episode)}'


def episode_of(secret: str, given: str) -> str | None:
  """The episode of a key, or None; how long it takes says nothing of why."""
  episode, _, signature = given.rpartition('.')
  right = _signature(secret, episode).encode()
  same = hmac.compare_digest(right, signature.encode())
  return episode if same and episode else None


def _signature(secret: str, episode: str) -> str:
  name = episode.encode('utf-8', 'backslashreplace')
  return hmac.new(secret.encode(), name, hashlib.sha256).hexdigest()
