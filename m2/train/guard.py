"""Bad steps: what counts as one, and what a run does about it.

A step is bad if its loss or a gradient is not finite, or if its loss stands out
by more than `guard.spike` deviations above the median of the last
`guard.window` losses. The deviation is 1.4826 times the median absolute one,
which a few outliers do not move, and at least a hundredth of the median.

`stop` ends the run with an error. `rewind` goes back to the newest checkpoint
and on with the data behind the bad batch, as PaLM did (arXiv 2204.02311,
section 5.1): the batches since the checkpoint and `guard.skip` more are left
out. A checkpoint holds the guard's state, so that a run that was killed meets
the same spike again, and passes it in the same way, to the bit.
"""

import collections
import statistics
from typing import Any

from m2 import config as settings

_NORMAL = 1.4826  # median absolute deviations in a standard deviation
_LEAST = 0.01  # of the median: how small a deviation counts
_ENOUGH = 10  # losses before anything can stand out


class Guard:
  """Judges losses and counts the ways back.

  Attributes:
    skip: batches to leave out beyond those since the checkpoint.
    rewinds: how often the run went back.
    skipped: batches that it left out because of that.
  """

  def __init__(self, cfg: settings.GuardConfig, kept: dict[str, Any] | None):
    """Begins with what a checkpoint kept; None = nothing."""
    self._goes_back, self._most = cfg.policy == 'rewind', cfg.rewinds
    self._spike, self._window, self.skip = cfg.spike, cfg.window, cfg.skip
    self._tries = collections.Counter()  # by the checkpoint gone back to
    self.restore(kept or {'losses': [], 'rewinds': 0, 'skipped': 0})

  def state(self) -> dict[str, Any]:
    """JSON-able; for the checkpoint."""
    return {
      'losses': list(self._losses),
      'rewinds': self.rewinds,
      'skipped': self.skipped,
    }

  def restore(self, kept: dict[str, Any]) -> None:
    """Goes back to what `state` gave."""
    self._losses = collections.deque(kept['losses'], self._window)
    self.rewinds, self.skipped = kept['rewinds'], kept['skipped']

  def spike(self, loss: float) -> str | None:
    """Takes a finite loss; says in words how it stands out, if it does."""
    losses, limit = self._losses, self._spike
    if limit and len(losses) >= min(_ENOUGH, self._window):
      middle = statistics.median(losses)
      spread = statistics.median(abs(one - middle) for one in losses)
      spread = max(_NORMAL * spread, _LEAST * abs(middle))
      above = (loss - middle) / spread if spread else 0.0
      if above > limit:
        return (
          f'loss {loss:.4g} is {above:.1f} deviations above the median '
          f'{middle:.4g} of the last {len(losses)}'
        )
    losses.append(loss)
    return None

  def rewind(self, error: Exception, steps: list[int]) -> int:
    """The checkpoint to go back to after `error`.

    Args:
      error: what came of the bad step.
      steps: those with a checkpoint, ascending.

    Raises:
      Exception: `error`, where the run is to stop, there is no checkpoint, or
        it was gone back to often enough.
    """
    if not self._goes_back:
      raise error
    if not steps:
      error.add_note('there is no checkpoint yet to rewind to')
      raise error
    if self._tries[steps[-1]] == self._most:
      error.add_note(
        f'went back to step {steps[-1]} {self._most} times already '
        '(guard.rewinds)'
      )
      raise error
    self._tries[steps[-1]] += 1
    return steps[-1]

  def resume(self, kept: dict[str, Any], skipped: int) -> None:
    """Goes on from a checkpoint that was gone back to.

    Args:
      kept: its state.
      skipped: batches left out since it.
    """
    rewinds, total = self.rewinds + 1, self.skipped + skipped
    self.restore(kept | {'rewinds': rewinds, 'skipped': total})
