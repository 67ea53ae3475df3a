"""Batches for RL: a Grain dataset over the data pool and the window.

Its iterator's state is the state of the window, so one checkpoint holds model,
optimiser and window, and they always agree. Groups that the window had finished
are read from the pool again; groups that were in flight start over.
"""

import dataclasses
import math
import sys
from typing import Any

import grain
import numpy as np

from m2 import config, types
from m2.forge import advantage, rollout, tree

EQUAL = 1e-9  # returns that differ by less are the same, but for rounding


@dataclasses.dataclass(frozen=True)
class Batch:
  """What one step trains on.

  Attributes:
    tree: packed rows.
    report: numbers on the groups it was made of.
  """

  tree: tree.TreeBatch
  report: dict[str, float]


class RolloutDataset(grain.IterDataset[Batch]):
  """Batches of finished groups."""

  def __init__(
    self,
    rollouts: rollout.Rollouts,
    scene: rollout.Scene,
    cfg: config.ForgeConfig,
  ):
    """Describes the stream.

    Args:
      rollouts: whose groups are taken; their window is the state.
      scene: the event loop that plays them while a batch is waited for.
      cfg: how to train on them.
    """
    super().__init__()
    self._rollouts, self._scene, self._cfg = rollouts, scene, cfg

  def __iter__(self) -> 'RolloutIterator':
    """The stream; there is one window, so use one iterator."""
    return RolloutIterator(self._rollouts, self._scene, self._cfg)


class RolloutIterator(grain.DatasetIterator[Batch]):
  """Takes groups from the window and packs them."""

  def __init__(
    self,
    rollouts: rollout.Rollouts,
    scene: rollout.Scene,
    cfg: config.ForgeConfig,
  ):
    """See `RolloutDataset`."""
    super().__init__()
    self._rollouts, self._scene, self._cfg = rollouts, scene, cfg
    self._capacity = {'lines': 0, 'samples': 0}

  def __next__(self) -> Batch:
    """Waits for the groups of one step."""
    rollouts, size = self._rollouts, self._cfg.group_size
    groups = self._scene.until(rollouts.take(self._cfg.groups))
    ids = [id for group in groups for id in rollout.episodes(group, size)]
    found = rollouts.pool.read(ids)
    return self._batch(
      [found[at : at + size] for at in range(0, len(found), size)]
    )

  def get_state(self) -> dict[str, Any]:
    """The window; what has been taken belongs to the step being saved."""
    self._rollouts.pool.flush()
    return self._rollouts.window.state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Restores the window; unfinished groups get new ids and start over.

    So do finished ones that the pool has not, as after it was deleted.
    """
    done = set(filter(self._is_held, state['done']))
    if lost := len(state['done']) - len(done):
      print(
        f'the pool lacks {lost} of the groups that the checkpoint has; they '
        'are played again',
        file=sys.stderr,
      )
    queued = [
      [id if id in done else self._rollouts.group_id(index), index]
      for id, index in state['queued']
    ]
    state = {**state, 'done': sorted(done), 'queued': queued}
    self._rollouts.window.restore(state)

  def _is_held(self, group: str) -> bool:
    try:
      self._rollouts.pool.read(rollout.episodes(group, self._cfg.group_size))
    except KeyError:
      return False
    return True

  def _batch(self, groups: list[list[types.Episode]]) -> Batch:
    cfg = self._cfg
    rows, flat = [], 0
    for episodes in groups:
      per_episode = advantage.group(
        episodes, gamma=cfg.gamma, baseline=cfg.baseline
      )
      for episode in episodes:
        if episode.id in per_episode:
          values = per_episode[episode.id]
          for completion, value in zip(episode.completions, values):
            row = tree.row(completion, float(value), replay=cfg.replay)
            rows += [row] if row else []
    # Rows without an advantage have no gradient: they only count in the
    # normaliser, and need not be computed.
    total = sum(row.weight * len(row.old_logp) for row in rows)
    kept = [row for row in rows if abs(row.advantage) > EQUAL] or rows
    if not kept:
      raise ValueError(
        'no episode of this batch sampled anything: each prompt alone fills '
        'engine.length; raise it, and forge.row_tokens with it'
      )
    flat = sum(len(row.ids) for row in kept)
    packed = self._pack(kept)
    packed = packed.replace(total=np.float32(total))
    report = describe(groups) | {
      'advantage/max_abs': max(abs(row.advantage) for row in rows),
      'tree/token_ratio': flat / max(int((packed.until_BT > 0).sum()), 1),
      'tree/pad_frac': _padding(packed.until_BT),
      'tree/rows': len(kept),
      'tree/rows_skipped': len(rows) - len(kept),
    }
    return Batch(packed, report)

  def _pack(self, rows: list[tree.Row]) -> tree.TreeBatch:
    """Packs into arrays whose sizes rarely change: each change compiles."""
    pack = tree.merge_prefixes if self._cfg.merge else tree.separate
    packed = pack(rows, tokens=self._cfg.row_tokens)
    need = {
      'lines': math.ceil(len(packed.tokens_BT) / self._cfg.lines),
      'samples': len(packed.token_Z),
    }
    for name, count in need.items():
      if count > self._capacity[name]:
        # Twice the need, as a power of two: room for longer rollouts.
        self._capacity[name] = 2 ** math.ceil(math.log2(2 * count))
    return tree.pad(
      packed,
      lines=self._capacity['lines'] * self._cfg.lines,
      samples=self._capacity['samples'],
    )


def _padding(until_BT: np.ndarray) -> float:
  used = until_BT[(until_BT > 0).any(1)]
  return float((used == 0).mean())


def _is_scored(episode: types.Episode) -> bool:
  return episode.reward.outcome == types.Outcome.SCORE


def describe(groups: list[list[types.Episode]]) -> dict[str, float]:
  """Rewards, lengths, ages and failures of the groups of a step.

  Only episodes with a score count in rewards and pass rates.
  """
  everyone = [episode for group in groups for episode in group]
  by_group = [[e for e in group if _is_scored(e)] for group in groups]
  scored = [episode for group in by_group for episode in group]
  returns = np.array([sum(e.reward.steps) for e in scored])
  spread = [np.ptp([sum(e.reward.steps) for e in group]) for group in by_group]
  completions = [c for e in scored for c in e.completions]
  versions = [c.version for c in completions]
  return {
    'reward/mean': float(returns.mean()),
    'reward/std': float(returns.std()),
    'reward/passed': float(np.mean([e.reward.passed for e in scored])),
    'group/zero_variance_frac': float(np.mean([s < EQUAL for s in spread])),
    'rollout/episodes': len(scored),
    'rollout/turns': len(completions) / len(scored),
    'rollout/tokens': float(np.mean([len(c.ids) for c in completions])),
    'rollout/truncated_frac': float(
      np.mean([c.stop == types.StopReason.LENGTH for c in completions])
    ),
    'rollout/context_frac': float(
      np.mean([c.stop == types.StopReason.CONTEXT for c in completions])
    ),
    'env/unscored_frac': 1 - len(scored) / len(everyone),
    'env/infra_failed_frac': float(
      np.mean([e.reward.outcome == types.Outcome.INFRA for e in everyone])
    ),
    'version/oldest': min(versions),
    'version/mean': float(np.mean(versions)),
  }
