"""The gateway in process: conversations in, messages out, exact ids kept.

Every request of an episode becomes a `Completion` with the ids that the model
saw and those it sampled. What was sampled is never tokenised again: wherever an
answer of this episode comes back in a later request, its sampled ids stand in
the prompt; only what the conversation gained between them is rendered.

So the prompt of the next turn is the last prompt, what was sampled, and what is
new. Where it is not (a context policy has rewritten the history, or the caller
changed something), the request is a branch: it is counted as drifted, with the
first message that differs.
"""

import asyncio
import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from m2 import types
from m2.data import template
from m2.data import tokenizer as tokenizers
from m2.engine import engine as engines

EPISODES = 65_536  # conversations remembered; the longest unused go first
DRIFTS = 1_000  # explanations kept

# Stands for the answer before a block, so that tool results may follow it.
_ANSWER = {
  'role': 'assistant',
  'tool_calls': [{'function': {'name': 'any', 'arguments': {}}}],
}


class Pool(Protocol):
  """Where completions go; `m2.forge.pool.DataPool` is one."""

  def put(self, completion: types.Completion) -> None:
    """Adds one completion."""
    ...


@dataclasses.dataclass
class Counters:
  """Running totals of a gateway."""

  requests: int = 0
  continued: int = 0  # began with the last prompt and its answer
  drifted: int = 0  # did not, though there was one
  malformed: int = 0  # answers with at least one parse error
  sampled_tokens: int = 0


class Usage(NamedTuple):
  """What an episode used."""

  completions: int
  sampled_tokens: int


@dataclasses.dataclass
class _Conversation:
  """What one episode has said so far.

  Attributes:
    messages: of the last request, and its answer.
    tools: of the last request.
    ids: the last prompt and what was sampled after it.
    answers: every answer with its sampled ids, in order.
    usage: totals.
  """

  messages: tuple[types.Message, ...] = ()
  tools: tuple[Mapping[str, Any], ...] = ()
  ids: np.ndarray | None = None
  answers: list[tuple[types.Message, np.ndarray]] = dataclasses.field(
    default_factory=list
  )
  usage: Usage = Usage(0, 0)


class Gateway:
  """Implements `m2.types.LLM` on an engine of this process."""

  def __init__(
    self,
    engine: engines.Engine,
    tokenizer: tokenizers.Tokenizer,
    pool: Pool | None = None,
    *,
    experts: bool = False,
  ):
    """Connects an engine to agents.

    Args:
      engine: somebody must run its `drive` (or `step`).
      tokenizer: the model's.
      pool: gets every completion; None keeps none.
      experts: also record routed experts, for router replay.
    """
    self.counters = Counters()
    self.drifts: collections.deque[str] = collections.deque(maxlen=DRIFTS)
    self._engine, self._tokenizer, self._pool = engine, tokenizer, pool
    self._experts = experts
    self._conversations: collections.OrderedDict[str, _Conversation] = (
      collections.OrderedDict()
    )

  async def chat(
    self,
    episode: str,
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
    sampling: types.Sampling,
  ) -> tuple[types.Message, types.StopReason]:
    """Completes one assistant turn of `episode`.

    Args:
      episode: id; its requests must come one after another.
      messages: the whole conversation.
      tools: OpenAI-style schemas to render and to check calls by; None or
        empty for neither.
      sampling: how to sample; the end-of-message id is added to its stop ids.

    Returns:
      The parsed message (what was malformed is in its `errors`) and why it
      ended. With `StopReason.CONTEXT` the message is empty.

    Raises:
      ValueError: messages, tools or sampling values that make no sense.
    """
    template.read_tools(tools)  # what is sampled can be parsed
    conversation = self._conversation(episode)
    prompt_ids = self._prompt(conversation.answers, messages, tools)
    stop_ids = dict.fromkeys((*sampling.stop_ids, self._tokenizer.eos_id))
    request = engines.GenRequest(
      prompt_ids,
      dataclasses.replace(sampling, stop_ids=tuple(stop_ids)),
      self._experts,
    )
    result = await asyncio.wrap_future(self._engine.submit(request))
    if result.stop == types.StopReason.CONTEXT:  # nothing was sampled
      message = types.Message('assistant')
    else:
      message = self._parse(result.ids, tools)
    self._compare(episode, conversation, prompt_ids, messages, tools)
    self._record(episode, conversation, prompt_ids, result)
    conversation.messages = (*messages, message)
    conversation.tools = tuple(tools or ())
    conversation.ids = np.concatenate([prompt_ids, result.ids])
    conversation.answers.append((message, result.ids))
    return message, result.stop

  def forget(self, episode: str) -> Usage:
    """Drops an episode that is over; returns what it used."""
    known = self._conversations.pop(episode, None)
    return known.usage if known else Usage(0, 0)

  def _conversation(self, episode: str) -> _Conversation:
    known = self._conversations.setdefault(episode, _Conversation())
    self._conversations.move_to_end(episode)
    if len(self._conversations) > EPISODES:
      self._conversations.popitem(last=False)
    return known

  def _prompt(
    self,
    answers: Sequence[tuple[types.Message, np.ndarray]],
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
  ) -> np.ndarray:
    """The ids of a request: sampled ones for every answer in it."""
    parts: list[np.ndarray] = []
    block: list[types.Message] = []
    left = iter(answers)
    for message in messages:
      sampled = None
      if message.role == 'assistant':
        rest, left = itertools.tee(left)
        sampled = next((ids for known, ids in rest if known == message), None)
      if sampled is None:
        block.append(message)
        continue
      left = rest
      parts += [self._render(block, tools, first=not parts), sampled]
      if not len(sampled) or sampled[-1] != self._tokenizer.eos_id:
        parts.append(np.array([self._tokenizer.eos_id], np.int32))
      block = []
    parts.append(self._render(block, tools, first=not parts))
    return np.concatenate(parts)

  def _render(self, block, tools, *, first: bool) -> np.ndarray:
    """Messages up to the next answer's generation prompt.

    Args:
      block: messages without a sampled answer among them.
      tools: shown in front of the first block.
      first: the block begins the conversation; others follow an answer.
    """
    dicts = [message.to_dict() for message in block]
    rendered = template.render(
      dicts if first else [_ANSWER, *dicts],
      list(tools) if tools and first else None,
      add_generation_prompt=True,
      keep_all_reasoning=True,  # report Eq. 10: states keep all reasoning
    )
    if not first:
      end = rendered.spans[0][1]  # behind the answer's end token
      rendered = template.Rendered(
        rendered.text[end:],
        (),
        tuple((a - end, b - end) for a, b in rendered.marks if a >= end),
      )
    return self._tokenizer.encode_rendered(rendered)[0]

  def _parse(self, ids: np.ndarray, tools) -> types.Message:
    """The message of sampled ids: what they quote is no tag."""
    stream = template.StreamParser(tools or None, thinking=True, spelled=False)
    for text, special in self._tokenizer.pieces(ids):
      if special:
        stream.feed_special(text)
      else:
        stream.feed(text)
    message = stream.close()
    self.counters.malformed += bool(message.errors)
    return message

  def _compare(self, episode, conversation, prompt_ids, messages, tools):
    """Counts whether a request goes on from the last one."""
    before = conversation.ids
    if before is None:
      return
    # An answer that was cut off is closed by its end token: no difference.
    if np.array_equal(prompt_ids[: len(before)], before):
      self.counters.continued += 1
      return
    self.counters.drifted += 1
    reason = _difference(conversation, messages, tools)
    step = conversation.usage.completions
    self.drifts.append(f'{episode} step {step}: {reason}')

  def _record(
    self,
    episode: str,
    conversation: _Conversation,
    prompt_ids: np.ndarray,
    result: engines.GenResult,
  ) -> None:
    completions, sampled = conversation.usage
    self.counters.requests += 1
    self.counters.sampled_tokens += len(result.ids)
    if self._pool is not None:
      self._pool.put(
        types.Completion(
          episode=episode,
          step=completions,
          prompt_ids=prompt_ids,
          ids=result.ids,
          logprobs=result.logprobs,
          version=result.version,
          stop=result.stop,
          seconds=result.seconds,
          experts=result.experts,
        )
      )
    conversation.usage = Usage(completions + 1, sampled + len(result.ids))


def _difference(
  conversation: _Conversation,
  messages: Sequence[types.Message],
  tools: Sequence[Mapping[str, Any]] | None,
) -> str:
  """Why a request does not go on from the last one."""
  if tuple(tools or ()) != conversation.tools:
    return 'the tools differ'
  pairs = itertools.zip_longest(conversation.messages, messages)
  for index, (before, now) in enumerate(pairs):
    if before is None:
      break
    if now is None:
      return f'message {index} ({before.role}) is missing'
    if before != now:
      return f'message {index} ({before.role}) differs'
  return 'an answer of the same text has other ids'
