"""Which waiting requests enter which slots, and what must be computed for them.

Requests with equal prompts are computed once. A prompt that continues what a
slot's cache holds (the next turn of a conversation), or that is the beginning
of it (another member of a rollout group), takes those entries over.
"""

import collections
import dataclasses

import numpy as np

from m2.engine import requests, sampling, slots

_ID_BYTES = 4


@dataclasses.dataclass
class Prompt:
  """One row to compute and the requests that go on from it.

  Attributes:
    ids: int32, the whole prompt.
    origin: slot whose first `keep` entries are taken over.
    keep: how many.
    users: (request, slot) pairs.
  """

  ids: np.ndarray
  origin: int
  keep: int
  users: list[tuple[requests.Progress, int]]


def choose(
  waiting: collections.deque[requests.Progress],
  idle: collections.deque[int],
  held: dict[int, bytes],
  rows: int,
) -> list[Prompt]:
  """Moves requests from `waiting` into `idle` slots, in order of arrival.

  Args:
    waiting: requests; those that are placed are removed.
    idle: free slots, the longest idle first; those that are used are removed.
    held: slot -> the ids, as int32 bytes, whose entries its cache holds.
    rows: most prompts to compute at once.

  Returns:
    The prompts; at least one if there was a request and a slot.
  """
  chosen: dict[tuple[bytes, bool], Prompt] = {}
  while waiting and idle:
    progress = waiting[0]
    ids = progress.context.tobytes()
    key = ids, progress.request.experts
    if key not in chosen:
      if len(chosen) == rows:
        break
      origin, keep = 0, 0
      if not progress.request.experts:  # routes are known only if computed
        origin, keep = _longest(ids, held)
      chosen[key] = Prompt(progress.context, origin, keep, [])
    waiting.popleft()
    chosen[key].users.append((progress, idle.popleft()))
  return list(chosen.values())


def _longest(ids: bytes, held: dict[int, bytes]) -> tuple[int, int]:
  """The slot that shares most with a prompt, and how many entries.

  The last token is always computed: its hidden state predicts the next.
  """
  but_last = ids[:-_ID_BYTES]
  best = 0, 0
  for slot, content in held.items():
    if ids.startswith(content):
      keep = min(len(content), len(but_last)) // _ID_BYTES
    elif content.startswith(but_last):
      keep = len(but_last) // _ID_BYTES
    else:
      continue
    if keep > best[1]:
      best = slot, keep
  return best


def arrays(
  prompts: list[Prompt],
  *,
  rows: int,
  entries: int,
  length: int,
  slot_count: int,
) -> slots.Admission:
  """The device program's arguments; unused rows and entries do nothing.

  Args:
    prompts: what to compute.
    rows: R of the program.
    entries: A of the program.
    length: T of the program.
    slot_count: number of slots; the same number marks an unused entry.
  """
  out = slots.Admission(
    tokens_RT=np.zeros((rows, length), np.int32),
    size_R=np.zeros(rows, np.int32),
    origin_R=np.zeros(rows, np.int32),
    keep_R=np.zeros(rows, np.int32),
    source_A=np.zeros(entries, np.int32),
    slot_A=np.full(entries, slot_count, np.int32),
    left_A=np.zeros(entries, np.int32),
    seed_A2=np.zeros((entries, 2), np.uint32),
    temperature_A=np.ones(entries, np.float32),
    top_p_A=np.ones(entries, np.float32),
    top_k_A=np.zeros(entries, np.int32),
    stop_AI=np.full((entries, requests.STOP_IDS), -1, np.int32),
  )
  at = 0
  for row, prompt in enumerate(prompts):
    rest = prompt.ids[prompt.keep :]
    out.tokens_RT[row, : len(rest)] = rest
    out.size_R[row] = len(rest)
    out.origin_R[row] = prompt.origin
    out.keep_R[row] = prompt.keep
    for progress, slot in prompt.users:
      wanted = progress.request.sampling
      out.source_A[at], out.slot_A[at] = row, slot
      out.left_A[at] = progress.left
      out.seed_A2[at] = sampling.seed_words(wanted.seed)
      out.temperature_A[at] = wanted.temperature
      out.top_p_A[at], out.top_k_A[at] = wanted.top_p, wanted.top_k
      out.stop_AI[at, : len(wanted.stop_ids)] = wanted.stop_ids
      at += 1
  return out
