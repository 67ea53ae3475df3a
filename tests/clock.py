"""How slow this machine is just now; what tests stretch their limits by."""

import time

_QUIET = 0.02  # seconds that `_work` takes on one core of a quiet server


def slow() -> float:
  """Times that fixed work takes here and now over a quiet server's; >= 1."""
  return max(1.0, min(_seconds() for _ in range(3)) / _QUIET)


def _seconds() -> float:
  start = time.perf_counter()
  sum(i * i % 7 for i in range(300_000))
  return time.perf_counter() - start
