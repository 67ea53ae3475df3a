"""Names the host that is hung or behind, while the devices wait for it.

Every process beats: it leaves where it is in jax's key-value store, which does
not need the devices. Process 0 compares the beats by its own clock and says who
has gone silent, who is behind the others, and for how long. A process that is
stuck itself writes the Python stack of every thread to standard error, and one
that learns that another failed ends, because its devices would wait for ever.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from typing import NamedTuple

import jax

from m2.parallel import hosts

_BEATS = 'm2/beats'
# Where a process is within a step, in order. Compiling takes what it takes.
PHASES = ('data', 'compile', 'step', 'save')
_GRACE = 5.0  # seconds that a process has to end by itself


class Beat(NamedTuple):
  """What a process says of itself.

  Attributes:
    host: its name.
    count: beats so far.
    step: updates begun.
    phase: index in `PHASES`.
  """

  host: str
  count: int
  step: int
  phase: int

  def __str__(self) -> str:
    """Where it is: `step 12 (data)`."""
    if self.step < 0:
      return 'the start'
    return f'step {self.step} ({PHASES[self.phase]})'


class Standing:
  """Who has stood still for how long, by one clock; pure."""

  def __init__(self, limit: float):
    """A host is named after `limit` seconds, or three of the slowest step.

    One that does not even beat is named after half of them.
    """
    self._limit = limit
    self._slowest = 0.0  # time that a host took before it went on unnamed
    self._beats: dict[int, Beat] = {}
    self._heard: dict[int, float] = {}
    self._moved: dict[int, float] = {}
    self._named: set[int] = set()

  def update(self, beats: dict[int, Beat], now: float) -> list[str]:
    """Takes the newest beats; says in words what is new.

    Args:
      beats: by process; of all that beat at all.
      now: seconds.
    """
    lines = []
    for index, beat in beats.items():
      before = self._beats.get(index)
      if before is None or beat.count != before.count:
        self._heard[index] = now
      if before is None or beat[2:] != before[2:]:
        lines += self._moves(index, before, beat, now)
      self._beats[index] = beat
    late = [index for index in self._beats if self.is_late(index, now)]
    ahead = max((beat[2:] for beat in self._beats.values()), default=())
    behind = [i for i in late if self._silent(i, now) or beats[i][2:] < ahead]
    for index in behind or late:
      if index not in self._named:
        self._named.add(index)
        lines.append(self._line(index, now))
    return lines

  def _moves(self, index, before, beat, now) -> list[str]:
    """`index` has gone on to `beat`."""
    took = now - self._moved.get(index, now)
    self._moved[index] = now
    if index in self._named:
      self._named.remove(index)
      return [f'{beat.host} goes on after {took:.0f} s, at {beat}']
    if before is not None and PHASES[before.phase] != 'compile':
      self._slowest = max(self._slowest, took)
    return []

  def _patience(self) -> float:
    return max(self._limit, 3 * self._slowest)

  def _silent(self, index: int, now: float) -> bool:
    return now - self._heard[index] > self._limit / 2  # three beats

  def is_late(self, index: int, now: float) -> bool:
    """Whether process `index` has stood still for too long."""
    compiles = PHASES[self._beats[index].phase] == 'compile'
    stands = now - self._moved[index] > self._patience()
    return self._silent(index, now) or (stands and not compiles)

  def _line(self, index: int, now: float) -> str:
    beat = self._beats[index]
    if self._silent(index, now):
      silent = now - self._heard[index]
      return f'{beat.host} has been silent for {silent:.0f} s, at {beat}'
    stood = now - self._moved[index]
    front = max(self._beats.values(), key=lambda other: other[2:])
    others = f', others are at {front}' if front[2:] > beat[2:] else ''
    return f'{beat.host} has been at {beat} for {stood:.0f} s{others}'


class Watchdog:
  """Beats and listens in a thread of its own; a context manager.

  Attributes:
    step: updates begun, or -1 before the first.
  """

  def __init__(self, limit: float):
    """See `Standing`; a beat is a sixth of `limit`."""
    self._period, self._limit = limit / 6, limit
    self._beat = Beat(hosts.name(), 0, -1, PHASES.index('compile'))
    self._dumped: tuple[int, int] | None = None  # where its stacks were written
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  @property
  def step(self) -> int:
    """Updates begun, or -1 before the first."""
    return self._beat.step

  def __enter__(self) -> 'Watchdog':
    """Begins to watch."""
    self._thread.start()
    return self

  def __exit__(self, _, error: BaseException | None, __) -> None:
    """Ends the thread; an error is told where it came."""
    if isinstance(error, Exception):
      where = f', at {self._beat}' if self._beat.step > 0 else ''
      error.add_note(f'on {self._beat.host}{where}')
    self._done.set()
    self._thread.join(self._period)

  def at(self, step: int, phase: str) -> None:
    """Call where the loop goes on to `phase` of step `step` (from 1)."""
    self._beat = self._beat._replace(step=step, phase=PHASES.index(phase))

  def _watch(self) -> None:
    standing, index = Standing(self._limit), jax.process_index()
    while True:
      self._beat = self._beat._replace(count=self._beat.count + 1)
      now = time.monotonic()
      try:
        lines = standing.update(self._exchange(index), now)
        self._heed(hosts.failures())
      except jax.errors.JaxRuntimeError as error:
        if not self._done.is_set():
          reason = str(error).splitlines()[0]
          hosts.say(f'host 0 does not answer; it may have ended: {reason}')
        return
      for line in lines if index == 0 else ():
        hosts.say(line)
      if standing.is_late(index, now):
        self._dump()
      if self._done.wait(self._period):
        return

  def _exchange(self, index: int) -> dict[int, Beat]:
    """Leaves its own beat; process 0 sees all, others only themselves."""
    if jax.process_count() == 1:
      return {index: self._beat}
    hosts.post(f'{_BEATS}/{index}', json.dumps(self._beat))
    if index != 0:
      return {index: self._beat}
    found, count = hosts.posted(_BEATS), jax.process_count()
    silent = {
      other: Beat(f'host {other} of {count}', 0, -1, PHASES.index('compile'))
      for other in range(count)
    }
    return silent | {int(k): Beat(*json.loads(v)) for k, v in found.items()}

  def _dump(self) -> None:
    """Writes the stacks of all threads, once for each place it is stuck at."""
    place = self._beat[2:]
    if place != self._dumped:
      self._dumped = place
      hosts.say(
        f'{self._beat.host} is stuck at {self._beat}: its stacks follow'
      )
      faulthandler.dump_traceback(sys.__stderr__)

  def _heed(self, failures: list[str]) -> None:
    """Ends this process where another has failed and its own cannot."""
    if failures and not self._done.wait(_GRACE):
      for line in failures:
        hosts.say(line)
      sys.stdout.flush()
      os._exit(1)
