"""What goes into the engine and what comes out."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from m2 import types

STOP_IDS = 8  # stop ids a request may have
LEAST = 1e-6  # of a top_p, and of a temperature that is not 0


@dataclasses.dataclass(frozen=True)
class GenRequest:
  """A prompt to continue.

  Attributes:
    prompt_ids: what to continue.
    sampling: how.
    experts: the result has the routed experts as well.
    listen: takes ids and log-probabilities as they are sampled, in the thread
      that drives the engine, which waits for it; it must not raise.
  """

  prompt_ids: Sequence[int] | np.ndarray
  sampling: types.Sampling
  experts: bool = False
  listen: Callable[[np.ndarray, np.ndarray], None] | None = None


@dataclasses.dataclass(frozen=True)
class GenResult:
  """A finished request.

  Attributes:
    ids: int32[N] sampled ids, the stop id included.
    logprobs: float32[N], the model's own at temperature 1.
    versions: int32[N], weight version that sampled each id.
    version: the oldest of them; the engine's if nothing was sampled.
    stop: why it ended.
    seconds: from submission to the end.
    experts: int32[P + N - 1, L, X] routes of all tokens that were fed.
  """

  ids: np.ndarray
  logprobs: np.ndarray
  versions: np.ndarray
  version: int
  stop: types.StopReason
  seconds: float
  experts: np.ndarray | None = None


def check(request: GenRequest, vocab: int) -> np.ndarray:
  """The prompt as int32[P].

  Raises:
    ValueError: an empty prompt, ids outside the vocabulary, or sampling values
      out of range; the message names the value.
  """
  prompt = np.asarray(request.prompt_ids)
  if prompt.ndim != 1 or not len(prompt) or prompt.dtype.kind not in 'iu':
    raise ValueError(
      f'prompt of shape {prompt.shape} and type {prompt.dtype}: expected one '
      'row of at least one integer id'
    )
  if prompt.min() < 0 or prompt.max() >= vocab:
    raise ValueError(
      f'prompt ids span [{prompt.min()}, {prompt.max()}]; the vocabulary has '
      f'{vocab}'
    )
  wanted = request.sampling
  for name, good in (
    ('max_new', wanted.max_new >= 1),
    # Less than LEAST may be 0 in float32, or make logits infinite.
    (
      'temperature',
      wanted.temperature == 0 or LEAST <= wanted.temperature < float('inf'),
    ),
    ('top_p', LEAST <= wanted.top_p <= 1),
    ('top_k', 0 <= wanted.top_k < 2**31),
    ('seed', 0 <= wanted.seed < 2**64),
    ('stop_ids', len(wanted.stop_ids) <= STOP_IDS),
    ('stop_ids', all(0 <= id < 2**31 for id in wanted.stop_ids)),
  ):
    if not good:
      raise ValueError(
        f'sampling.{name}={getattr(wanted, name)} is out of range'
      )
  for name in ('max_new', 'top_k', 'seed', 'stop_ids'):
    value = getattr(wanted, name)
    numbers = value if name == 'stop_ids' else [value]
    if not all(isinstance(z, int | np.integer) for z in numbers):
      raise ValueError(f'sampling.{name}={value}: expected whole numbers')
  return prompt.astype(np.int32)


class Progress:
  """One request on its way through the engine.

  Attributes:
    request: what was asked.
    future: where the result goes.
    budget: most ids it may still get, from the start.
    context: int32 ids: the prompt and what was sampled.
  """

  def __init__(self, request: GenRequest, prompt: np.ndarray, budget: int):
    self.request = request
    self.future: concurrent.futures.Future[GenResult] = (
      concurrent.futures.Future()
    )
    self.budget = budget
    self.context = prompt
    self._started = time.perf_counter()
    self._prompt_size = len(prompt)
    self._logprobs: list[np.ndarray] = []
    self._versions: list[np.ndarray] = []
    self._experts: list[np.ndarray] = []

  @property
  def left(self) -> int:
    """Ids it may still sample."""
    return self.budget - (len(self.context) - self._prompt_size)

  def extend(self, ids: np.ndarray, logprobs: np.ndarray, version: int) -> None:
    """Adds sampled ids."""
    self.context = np.concatenate([self.context, ids])
    self._logprobs.append(logprobs)
    self._versions.append(np.full(len(ids), version, np.int32))
    if self.request.listen is not None and len(ids):
      self.request.listen(ids, logprobs)

  def route(self, first: int, experts_TLX: np.ndarray) -> None:
    """Adds routes of the tokens from index `first` on; known ones stay."""
    known = sum(map(len, self._experts))
    if first + len(experts_TLX) > known:
      self._experts.append(experts_TLX[known - first :])

  def finish(self, stop: types.StopReason, version: int) -> None:
    """Sets the result, unless the caller has cancelled the future."""
    versions = np.concatenate([np.zeros(0, np.int32), *self._versions])
    result = GenResult(
      ids=self.context[self._prompt_size :],
      logprobs=np.concatenate([np.zeros(0, np.float32), *self._logprobs]),
      versions=versions,
      version=int(versions.min()) if len(versions) else version,
      stop=stop,
      seconds=time.perf_counter() - self._started,
      experts=np.concatenate(self._experts) if self._experts else None,
    )
    if self.future.set_running_or_notify_cancel():
      self.future.set_result(result)

  def fail(self, error: Exception) -> None:
    """Gives the caller `error`."""
    if self.future.set_running_or_notify_cancel():
      self.future.set_exception(error)
