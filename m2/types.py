"""Host records that cross the seams: tasks, messages, completions, rewards.

Plain frozen dataclasses of numpy and the standard library; no jax here, so that
agents, environments and evolution stay apart from training and inference.
Expected failures are values (`StopReason`, `Outcome`), never exceptions.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class StopReason(enum.StrEnum):
  """Why a completion ended."""

  EOS = 'eos'  # the model closed its message
  LENGTH = 'length'  # its token budget ran out
  CONTEXT = 'context'  # the prompt left no room to generate
  CANCELLED = 'cancelled'  # the caller gave up
  STRING = 'string'  # a stop string of the caller's came


class Outcome(enum.StrEnum):
  """What a reward means. Only SCORE enters group statistics.

  What the agent's artifact does in every replay is its own: one that exhausts
  the steps or the processor time it has is a SCORE that did not pass.

  TAMPER is for workspaces whose agents can reach more than the artifact. SQL's
  refuses such statements before they touch anything: an answer like any other,
  and no outcome, or an agent that fails could leave every rate by trying one.
  """

  SCORE = 'score'  # the verifier judged the artifact
  INFRA = 'infra'  # the sandbox or verifier failed, not the agent
  TIMEOUT = 'timeout'  # wall-clock time ran out
  TAMPER = 'tamper'  # the agent touched what it must not


def seed(*parts: object) -> int:
  """63 bits that depend on all of `parts`, the same in every process."""
  text = ' '.join(map(str, parts)).encode()
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """One call the model asked for; `arguments` as its schema typed them."""

  name: str
  arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn of a conversation.

  Attributes:
    role: system, user, assistant or tool.
    content: visible text.
    reasoning: the model's thinking, without its tags; '' if none.
    tool_calls: calls of an assistant turn, in order.
    errors: what was malformed in the model's own output; never guessed at.
  """

  role: str
  content: str = ''
  reasoning: str = ''
  tool_calls: tuple[ToolCall, ...] = ()
  errors: tuple[str, ...] = ()

  def to_dict(self) -> dict[str, Any]:
    """The OpenAI-style dictionary that `m2.data.template.render` takes."""
    out: dict[str, Any] = {'role': self.role, 'content': self.content}
    if self.role == 'assistant':  # also '': else `</think>` in content splits
      out['reasoning_content'] = self.reasoning
    if self.tool_calls:
      out['tool_calls'] = [
        {
          'type': 'function',
          'function': {'name': call.name, 'arguments': dict(call.arguments)},
        }
        for call in self.tool_calls
      ]
    return out


@dataclasses.dataclass(frozen=True)
class Task:
  """One verifiable task.

  Attributes:
    id: unique and stable; a function of family, split and index.
    family: which environment family made it, such as 'sql'.
    skill: the skill it exercises.
    split: train, dev, gate or test.
    difficulty: 0 is easiest.
    prompt: what the user asks of the agent.
    data: what its workspace and verifier need (JSON-able); agents never see it.
    signature: hash that decides the split, of what its family says; disjoint
      across splits.
  """

  id: str
  family: str
  skill: str
  split: str
  difficulty: int
  prompt: str
  data: Mapping[str, Any]
  signature: str


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a verifier says of an artifact, with its evidence.

  Attributes:
    outcome: SCORE when `passed` and `score` mean something.
    passed: every requirement holds.
    score: in [0, 1].
    error_class: short failure label for clustering; '' when passed.
    evidence: one line a person can check.
  """

  outcome: Outcome
  passed: bool
  score: float
  error_class: str = ''
  evidence: str = ''


@dataclasses.dataclass(frozen=True)
class Completion:
  """One (state, action) pair of an episode: exact ids, never re-tokenised.

  Attributes:
    episode: id of the episode it belongs to.
    step: index of the action within the episode.
    prompt_ids: int32[P], the state as the model saw it.
    ids: int32[R], what it sampled, incl. the end token if any.
    logprobs: float32[R], behaviour log-probabilities of `ids`.
    version: weight version that sampled them.
    stop: why it ended.
    seconds: generation time, wall clock.
    experts: int32[P + R - 1, L, X] routed experts, if asked for.
  """

  episode: str
  step: int
  prompt_ids: np.ndarray
  ids: np.ndarray
  logprobs: np.ndarray
  version: int
  stop: StopReason
  seconds: float = 0.0
  experts: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Reward:
  """The typed reward of one episode.

  Attributes:
    episode: id of the episode.
    outcome: only SCORE is trained on.
    steps: reward of each action, composite (report 6.1.5).
    passed: the verifier's pass or fail.
    parts: named sums of the terms (process, speed, perf), for the record.
    evidence: the verifier's line.
  """

  episode: str
  outcome: Outcome
  steps: tuple[float, ...]
  passed: bool
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
  evidence: str = ''


@dataclasses.dataclass(frozen=True)
class Episode:
  """One closed rollout as the data pool returns it."""

  id: str
  group: str
  task: str
  skill: str
  completions: tuple[Completion, ...]
  reward: Reward


@dataclasses.dataclass(frozen=True)
class Transcript:
  """What an agent did in one episode.

  Attributes:
    messages: the whole conversation, tool results included.
    turns: completions used.
    seconds: wall-clock time of the episode.
    malformed: completions with at least one malformed call.
    finished: the agent called `finish` by itself.
    stop: why the last completion ended.
  """

  messages: tuple[Message, ...]
  turns: int
  seconds: float
  malformed: int
  finished: bool
  stop: StopReason


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to sample one completion. `top_k` 0 and `top_p` 1 switch them off."""

  max_new: int
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  seed: int = 0
  stop_ids: tuple[int, ...] = ()


class LLM(Protocol):
  """The agent's only view of a model: a conversation in, a message out."""

  async def chat(
    self,
    episode: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    sampling: Sampling,
  ) -> tuple[Message, StopReason]:
    """Completes one assistant turn of `episode`."""
    ...


class Workspace(Protocol):
  """A single-use place to act in: `async with`, then verify, then gone."""

  async def execute(self, command: str) -> str:
    """Runs `command`; returns its output or its error as text."""
    ...
