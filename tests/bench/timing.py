"""How GPU contenders are compiled and timed, the same in every benchmark."""

import math
import sys
import time
from collections.abc import Callable, Mapping

import jax

from tests.bench import record

ROUNDS = 5
ROUND_SECONDS = 0.06  # many calls, so that the first one's launch is lost


def compile(
  name: str, run: Callable, *shapes: jax.ShapeDtypeStruct
) -> Callable:
  """`run` compiled for arrays of these shapes; `name` is for messages."""
  start = time.perf_counter()
  compiled = jax.jit(run).lower(*shapes).compile()
  print(f'  {name}: {time.perf_counter() - start:.0f} s to compile', flush=True)
  return compiled


def race(
  calls: Mapping[str, Callable],
  *,
  most: int = 20,
  parts: int = 1,
  before: float = 0.0,
) -> dict[str, dict[str, float]]:
  """Seconds a call of each contender, in turns; see `record.summary`.

  Args:
    calls: name -> call.
    most: calls of a round, at the most.
    parts: equal parts that a call consists of; seconds are of one.
    before: seconds for which a contender runs before each of its rounds, so
      that clocks have settled to what it takes and not the one before it.
  """
  count, warm = {}, {}
  for name, call in calls.items():
    timed(call, 1)
    seconds = timed(call, 1)
    count[name] = max(1, min(most, int(ROUND_SECONDS / seconds)))
    warm[name] = math.ceil(before / seconds)
  samples = {name: [] for name in calls}
  for _ in range(ROUNDS):
    for name, call in calls.items():
      if warm[name]:
        timed(call, warm[name])
      samples[name].append(timed(call, count[name]) / parts)
  return {name: record.summary(seconds) for name, seconds in samples.items()}


def timed(call: Callable, count: int) -> float:
  """Seconds a call, of `count` calls one after the other."""
  _wait_for_torch()
  start = time.perf_counter()
  for _ in range(count):
    result = call()
  jax.block_until_ready(
    [z for z in jax.tree.leaves(result) if isinstance(z, jax.Array)]
  )
  _wait_for_torch()
  return (time.perf_counter() - start) / count


def _wait_for_torch() -> None:
  """Waits for PyTorch's work, in benchmarks that use it."""
  if 'torch' in sys.modules:
    sys.modules['torch'].cuda.synchronize()


def denominators() -> dict[str, float]:
  """Rates of a dense product, FLOP/s, and of a copy, bytes/s, at their best."""
  import torch

  make = {'device': 'cuda', 'dtype': torch.bfloat16}
  a, b = torch.randn(8192, 8192, **make), torch.randn(8192, 8192, **make)
  source = torch.randn(1 << 31, **make)
  target = torch.empty_like(source)
  seconds = race({'dense': lambda: a @ b, 'copy': lambda: target.copy_(source)})
  return {
    'dense': 2 * 8192**3 / seconds['dense']['median'],
    'copy': 2 * source.nbytes / seconds['copy']['median'],
  }
