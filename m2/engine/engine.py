"""The generation engine: one owner of the device, many callers.

Requests queue; `step` admits what fits into free slots, computes the new
prompts, and samples up to `chunk` tokens for every live slot in one device
call. Callers hold futures: threads wait on them, coroutines await them while
`drive` turns the crank.

`load` forgets every cached key: nothing that old weights computed is read under
new ones. Requests in flight then go on from their own tokens, recomputed under
the new weights, and record for each token the version that sampled it.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from m2 import config, types
from m2.engine import admission, requests, slots
from m2.model import params as model_params
from m2.parallel import sharding

GenRequest = requests.GenRequest
GenResult = requests.GenResult

PREFILL = 64  # tokens of each prompt computed at once
FEW = 8  # prompts of one prefill while there is but a trickle
QUIET = 4  # turns of the event loop without a new request, before a step

# Compiled once for all engines of a process; the slots are updated in place.
_DECODE, _PREFILL = (
  jax.jit(program, static_argnums=(0, 1, 2, 3), donate_argnums=5)
  for program in (slots.decode, slots.prefill)
)
_QUANTISE = jax.jit(model_params.quantise)


def compiled() -> int:
  """Programs compiled so far in this process, for all engines."""
  return _DECODE._cache_size() + _PREFILL._cache_size()


@dataclasses.dataclass
class Counters:
  """Running totals since the engine was made."""

  prompt_tokens: int = 0  # asked for
  reused_tokens: int = 0  # of those, not computed again
  sampled_tokens: int = 0
  prefills: int = 0  # device calls
  decodes: int = 0
  seconds: float = 0.0  # inside `step`


def prefill_rows(engine: config.EngineConfig, ways: int, most: int) -> int:
  """Prompts of one prefill, over `ways` devices, where `most` may wait."""
  return min(-(-min(most, engine.prompts) // ways) * ways, engine.slots)


class Engine:
  """Generates for many callers at once.

  `submit` and `cancel` may be called from any thread; everything else belongs
  to one.
  """

  def __init__(
    self,
    cfg: config.ModelConfig,
    engine: config.EngineConfig,
    params: Any,
    *,
    version: int = 0,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Allocates the cache.

    Args:
      cfg: model shape.
      engine: sizes.
      params: parameters; neither changed nor donated. With `engine.fp8` their
        experts may be in FP8 already (`m2.model.params.quantise`).
      version: their version.
      mesh: device mesh; slots are split over its batch axes.

    Raises:
      ValueError: sizes that do not fit the model or the mesh.
    """
    if engine.length > cfg.max_positions:
      raise ValueError(
        f'engine.length={engine.length} exceeds '
        f'model.max_positions={cfg.max_positions}'
      )
    ways = 1
    if mesh is not None:
      ways = sharding.row_ways(mesh.shape)
    if engine.slots % ways:
      raise ValueError(
        f'engine.slots={engine.slots} is not a multiple of the {ways} devices '
        'that rows are split over (mesh data * fsdp * expert)'
      )
    self.version = version
    self.counters = Counters()
    if engine.fp8:
      cfg = dataclasses.replace(cfg, fp8_experts=True)
    self._cfg, self._engine, self._mesh = cfg, engine, mesh
    self._params = self._held_as(params)
    # Programs exist for a quarter, a half, ... of the cache, so that short
    # contexts pay for what they use; and for few and for many new prompts.
    quarters = (math.ceil(engine.length * k / 4 / PREFILL) for k in range(1, 5))
    self._lengths = sorted({PREFILL * x for x in quarters})
    few, many = (
      prefill_rows(engine, ways, most) for most in (FEW, engine.prompts)
    )
    self._batches = sorted({(few, few), (many, engine.slots)})
    make = functools.partial(slots.empty, cfg, engine.slots, self._lengths[-1])
    with self._on_mesh():
      self._slots = jax.jit(make)()
    self._lock = threading.Lock()
    self._waiting: collections.deque[requests.Progress] = collections.deque()
    self._live: dict[int, requests.Progress] = {}  # by slot
    self._idle = collections.deque(range(engine.slots))  # longest idle first
    self._held: dict[int, bytes] = {}  # slot -> ids whose entries it holds
    self._cancelled: set[concurrent.futures.Future] = set()
    self._submitted = 0
    self._failed: Exception | None = None
    self._wake: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

  def submit(self, request: GenRequest) -> concurrent.futures.Future[GenResult]:
    """Queues a request.

    Raises:
      ValueError: an empty prompt, ids outside the vocabulary, or sampling
        values out of range. A prompt that is too long is no error: its result
        is empty, with `StopReason.CONTEXT`.
      RuntimeError: the engine has failed before; its cause is what failed.
    """
    prompt = requests.check(request, self._cfg.vocab)
    room = self._engine.length - len(prompt)
    budget = min(request.sampling.max_new, room)
    progress = requests.Progress(request, prompt, budget)
    if room < 1:
      progress.finish(types.StopReason.CONTEXT, self.version)
      return progress.future
    with self._lock:
      if self._failed is not None:
        raise RuntimeError(
          f'the engine has failed, make a new one: {self._failed}'
        ) from self._failed
      self._waiting.append(progress)
      self._submitted += 1
    if self._wake is not None:
      loop, event = self._wake
      loop.call_soon_threadsafe(event.set)
    return progress.future

  def cancel(self, future: concurrent.futures.Future[GenResult]) -> None:
    """Ends a request at the next step; its result holds what was sampled.

    `future.cancel()` works too, and discards the result.
    """
    self._cancelled.add(future)

  @property
  def failed(self) -> Exception | None:
    """What has ended it, if anything has."""
    return self._failed

  @property
  def busy(self) -> bool:
    """Whether a request is queued or in flight."""
    return bool(self._waiting or self._live)

  def step(self) -> int:
    """Admits, computes prompts, decodes one chunk; returns live requests.

    Raises:
      Exception: whatever the device raised; every request fails with it, and
        the engine takes no more: what its cache holds is unknown.
    """
    start = time.perf_counter()
    try:
      with self._on_mesh():
        self._drop_cancelled()
        fresh = []
        while self._waiting and self._idle:
          fresh.append(self._admit())
        if self._live:
          self._advance(fresh)
    except Exception as error:
      with self._lock:
        self._failed = error
        failed = (*self._waiting, *self._live.values())
        self._waiting.clear()
        self._live.clear()
      for progress in failed:  # who waits may submit at once: not locked
        progress.fail(error)
      raise
    self.counters.seconds += time.perf_counter() - start
    return len(self._live)

  def run(self, wanted: Iterable[GenRequest]) -> list[GenResult]:
    """Generates for all of `wanted`, and whatever else is queued."""
    futures = [self.submit(request) for request in wanted]
    while self.busy:
      self.step()
    return [future.result() for future in futures]

  async def drive(self) -> None:
    """Steps for as long as there is work; runs until cancelled.

    Before every step all coroutines that can run do so, and what they submit
    goes into the same batch. A step blocks the event loop for one chunk; other
    processes and threads go on.
    """
    event = asyncio.Event()
    self._wake = asyncio.get_running_loop(), event
    try:
      while True:
        event.clear()
        quiet, seen = 0, self._submitted
        while quiet < QUIET:
          await asyncio.sleep(0)
          quiet = quiet + 1 if self._submitted == seen else 0
          seen = self._submitted
        if self.busy:
          self.step()
        else:
          await event.wait()
    finally:
      self._wake = None

  def load(self, params: Any, version: int) -> None:
    """Replaces the weights between two steps.

    Args:
      params: the new parameters, laid out like the old.
      version: greater than the present one.

    Raises:
      ValueError: a version that is not newer.
    """
    if version <= self.version:
      raise ValueError(f'{version=} is not newer than {self.version}')
    self._params, self.version = self._held_as(params), version
    self._held.clear()
    with self._lock:
      for slot in sorted(self._live, reverse=True):
        self._waiting.appendleft(self._live.pop(slot))
        self._idle.append(slot)
    with self._on_mesh():
      self._slots = self._slots.replace(left_B=self._slots.left_B * 0)

  @property
  def params(self) -> Any:
    """The weights it samples with; with `engine.fp8`, experts in FP8."""
    return self._params

  def warm_up(self, *, experts: bool = False) -> int:
    """Compiles every program, so that no step does; see `compiled`."""
    with self._on_mesh():
      for length in self._lengths:
        self._run_decode(length, experts)
        for rows, entries in self._batches:
          self._run_prefill([], rows, entries, length, experts)
    return compiled()

  def _held_as(self, params: Any) -> Any:
    """The parameters in the engine's format."""
    if not self._engine.fp8 or model_params.is_quantised(params):
      return params
    with self._on_mesh():
      return _QUANTISE(params)

  def _on_mesh(self):
    if self._mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)

  def _drop_cancelled(self) -> None:
    # Others may be cancelled meanwhile: they wait for the next step.
    cancelled, self._cancelled = self._cancelled, set()

    def is_gone(progress: requests.Progress) -> bool:
      return progress.future in cancelled or progress.future.cancelled()

    with self._lock:
      dropped = [p for p in self._waiting if is_gone(p)]
      for progress in dropped:
        self._waiting.remove(progress)
    for progress in dropped:
      progress.finish(types.StopReason.CANCELLED, self.version)
    gone = [slot for slot, p in self._live.items() if is_gone(p)]
    if gone:
      # Not put there by `device_put`: what is committed is compiled for anew.
      kept_B = np.ones(self._slots.left_B.shape, np.int32)
      kept_B[gone] = 0
      self._slots = self._slots.replace(left_B=self._slots.left_B * kept_B)
    for slot in gone:
      self._release(slot, types.StopReason.CANCELLED)

  def _admit(self) -> tuple[list[admission.Prompt], dict[str, jax.Array]]:
    """Computes one batch of prompts; returns them and the program's output."""
    with self._lock:
      prompts = admission.choose(
        self._waiting, self._idle, self._held, self._batches[-1][0]
      )
    users = [user for prompt in prompts for user in prompt.users]
    self._live.update((slot, progress) for progress, slot in users)
    rows, entries = next(
      batch
      for batch in self._batches
      if len(prompts) <= batch[0] and len(users) <= batch[1]
    )
    longest = max(len(prompt.ids) for prompt in prompts)
    length = next(size for size in self._lengths if longest <= size)
    experts = any(progress.request.experts for progress, _ in users)
    out = self._run_prefill(prompts, rows, entries, length, experts)
    for prompt in prompts:
      for _, slot in prompt.users:
        self._held[slot] = prompt.ids.tobytes()
      asked = len(prompt.ids) * len(prompt.users)
      self.counters.prompt_tokens += asked
      self.counters.reused_tokens += asked - len(prompt.ids) + prompt.keep
    self.counters.prefills += 1
    return prompts, out

  def _advance(self, fresh: list) -> None:
    """Decodes one chunk; hands out first tokens and decoded ones."""
    longest = max(len(p.context) for p in self._live.values())
    longest = min(longest + self._engine.chunk, self._lengths[-1])
    length = next(size for size in self._lengths if longest <= size)
    experts = any(p.request.experts for p in self._live.values())
    decoded = self._run_decode(length, experts)
    self.counters.decodes += 1
    firsts, decoded = jax.device_get(([out for _, out in fresh], decoded))
    for (prompts, _), out in zip(fresh, firsts):
      for row, prompt in enumerate(prompts):
        for progress, slot in prompt.users:
          at = slice(slot, slot + 1)
          self._extend(progress, out['ids'][at], out['logprobs'][at])
          if progress.request.experts:
            size = len(prompt.ids) - prompt.keep
            routes_LTX = out['experts'][:, row, :size]
            progress.route(prompt.keep, routes_LTX.swapaxes(0, 1))
    counts_B = (decoded['ids'] >= 0).sum(0)
    for slot, progress in list(self._live.items()):
      count = counts_B[slot]
      if progress.request.experts:
        routes_CLX = decoded['experts'][:count, :, slot]
        progress.route(len(progress.context) - 1, routes_CLX)
      self._extend(
        progress,
        decoded['ids'][:count, slot],
        decoded['logprobs'][:count, slot],
      )
      if not decoded['left'][slot]:
        stops = progress.request.sampling.stop_ids
        ended = int(progress.context[-1]) in stops
        self._release(
          slot, types.StopReason.EOS if ended else types.StopReason.LENGTH
        )

  def _extend(self, progress, ids, logprobs) -> None:
    progress.extend(ids, logprobs, self.version)
    self.counters.sampled_tokens += len(ids)

  def _release(self, slot: int, stop: types.StopReason) -> None:
    """Ends the request in `slot`; its cache entries stay until overwritten."""
    progress = self._live.pop(slot)
    # The last sampled id was never fed.
    self._held[slot] = progress.context[:-1].tobytes()
    self._idle.append(slot)
    progress.finish(stop, self.version)

  def _run_decode(self, length: int, experts: bool) -> dict[str, jax.Array]:
    self._slots, out = _DECODE(
      self._cfg, length, self._engine.chunk, experts, self._params, self._slots
    )
    return out

  def _run_prefill(
    self, prompts, rows: int, entries: int, length: int, experts: bool
  ) -> dict[str, jax.Array]:
    arrays = admission.arrays(
      prompts,
      rows=rows,
      entries=entries,
      length=length,
      slot_count=self._engine.slots,
    )
    self._slots, out = _PREFILL(
      self._cfg, length, PREFILL, experts, self._params, self._slots, arrays
    )
    return out
