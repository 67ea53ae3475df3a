"""Returns-to-go and group baselines (report Eq. 4, 6 and 7).

The advantage of every token of completion t of episode i is

  A = sum_{tau >= t} gamma^(tau - t) r_tau - B_i

with B_i the mean return of the episode's group, or of the others in it. Only
episodes with a SCORE enter the statistics: a failed sandbox is no zero.
"""

from collections.abc import Sequence

import numpy as np

from m2 import types


def returns_to_go(rewards: Sequence[float], gamma: float) -> np.ndarray:
  """float64[T]: the discounted sum of `rewards` from each step on."""
  out = np.zeros(len(rewards))
  after = 0.0
  for step in reversed(range(len(rewards))):
    after = rewards[step] + gamma * after
    out[step] = after
  return out


def baselines(returns_G: np.ndarray, kind: str) -> np.ndarray:
  """float64[G]: the baseline of each episode of a group.

  Args:
    returns_G: return of each scored episode.
    kind: 'group' takes the mean of all, 'leave_one_out' that of the others.

  Raises:
    ValueError: fewer than two episodes, or an unknown kind.
  """
  count = len(returns_G)
  if count < 2:
    raise ValueError(f'{count} scored episodes: a group baseline needs two')
  if kind == 'group':
    return np.full(count, np.mean(returns_G))
  if kind == 'leave_one_out':
    return (np.sum(returns_G) - returns_G) / (count - 1)
  raise ValueError(f'{kind=}: choose group or leave_one_out')


def group(
  episodes: Sequence[types.Episode], *, gamma: float, baseline: str
) -> dict[str, np.ndarray]:
  """Advantages of one prompt group.

  Args:
    episodes: all closed rollouts of the group.
    gamma: discount per step.
    baseline: see `baselines`.

  Returns:
    Episode id -> float64[steps], for scored episodes; empty when fewer than
    two have a score, because nothing could be compared.

  Raises:
    ValueError: the rewards of a scored episode, or their sum, are not finite.
  """
  scored = [e for e in episodes if e.reward.outcome == types.Outcome.SCORE]
  if len(scored) < 2:
    return {}
  returns = [returns_to_go(e.reward.steps, gamma) for e in scored]
  for episode, values in zip(scored, returns):
    if not np.isfinite(values).all():
      raise ValueError(
        f'episode {episode.id} of task {episode.task}: rewards '
        f'{list(episode.reward.steps)} have no finite sum; mend what judges '
        'it, and give another --workdir: a data pool keeps what it has'
      )
  base_G = baselines(
    np.array([r[0] if len(r) else 0.0 for r in returns]), baseline
  )
  return {e.id: r - b for e, r, b in zip(scored, returns, base_G)}
