"""Being asked to stop: SIGTERM of a preemption, SIGINT of a user.

The first signal only leaves a mark, which the loop looks at between steps: it
saves and raises `Stopped`. The second one has its usual effect, unless it comes
at once: Ctrl-C reaches a launcher and its processes alike, and the launcher
passes it on.
"""

import os
import signal
import time
import types

from m2.parallel import hosts

_ASKING = (signal.SIGTERM, signal.SIGINT)
_SAME = 2.0  # seconds within which a second signal is the first, passed on


class Stopped(SystemExit):
  """The run was asked to stop, has saved, and goes on when started again.

  The exit code is 128 plus the signal, 143 or 130, as if it had not been
  caught: whoever restarts jobs sees that this one is not finished.
  """


class Signals:
  """Catches the signals of the main thread; a context manager.

  Attributes:
    raised: number of the signal that came; 0 = none yet.
  """

  def __init__(self):
    """Nothing is caught before `with`."""
    self.raised, self._came = 0, 0.0

  def __enter__(self) -> 'Signals':
    """Begins to catch."""
    self._before = {one: signal.getsignal(one) for one in _ASKING}
    for one in _ASKING:
      signal.signal(one, self._mark)
    return self

  def __exit__(self, *_) -> None:
    """Puts the handlers back that were there."""
    for one, handler in self._before.items():
      signal.signal(one, handler)

  def _mark(self, number: int, _: types.FrameType | None) -> None:
    if self.raised:
      if time.monotonic() - self._came > _SAME:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(number)
      return
    self.raised, self._came = number, time.monotonic()
    # Not `print`: the signal may have come in the middle of one.
    said = f'{signal.Signals(number).name}: stops after this step and a save'
    os.write(2, f'{said}; a second signal stops at once\n'.encode())

  def stopped(self, step: int) -> Stopped:
    """What to raise once step `step` is saved."""
    hosts.say(f'stopped at step {step}, which is saved; start again to go on')
    return Stopped(128 + (self.raised or signal.SIGTERM))
