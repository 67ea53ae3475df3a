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
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from m2 import types
from m2.data import template
from m2.data import tokenizer as tokenizers
from m2.engine import engine as engines
from m2.gateway import history as histories
from m2.gateway import stream as streams

EPISODES = 16_384  # conversations remembered; the longest unused go first
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


@dataclasses.dataclass(frozen=True)
class Answer:
  """One assistant turn, and the ids that it is.

  Attributes:
    message: what was sampled, parsed; up to the stop string, if one came.
    stop: why it ended.
    stopped: the stop string that ended it, or None.
    prompt_ids: int32[P], what the model saw.
    ids: int32[N], what it sampled.
    logprobs: float32[N], the model's own of each at temperature 1.
    version: of the weights; the oldest, if they changed meanwhile.
  """

  message: types.Message
  stop: types.StopReason
  stopped: str | None
  prompt_ids: np.ndarray
  ids: np.ndarray
  logprobs: np.ndarray
  version: int


@dataclasses.dataclass
class _Conversation:
  """What one episode has said so far, and what it used."""

  history: histories.History = dataclasses.field(
    default_factory=histories.History
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
    self.tokenizer = tokenizer
    self._engine, self._pool = engine, pool
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
    (answer,) = await self.answer(episode, messages, tools, sampling)
    return answer.message, answer.stop

  async def answer(
    self,
    episode: str,
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
    sampling: types.Sampling,
    *,
    count: int = 1,
    stop: Sequence[str] = (),
    listen: streams.Listener | None = None,
    unsaid: bool = False,
    aside: bool = False,
  ) -> list[Answer]:
    """Completes one turn `count` times over; `chat` for those who want more.

    Requests of an episode may overlap here: each goes on from whatever it
    continues. Who cancels it ends the sampling, and nothing is recorded.

    Args:
      episode: as for `chat`.
      messages: as for `chat`.
      tools: as for `chat`.
      sampling: as for `chat`; the first answer has this seed.
      count: answers.
      stop: strings that end an answer; what was sampled behind one is dropped.
      listen: takes each answer's number and its parts as they come.
      unsaid: an answer may come back without its reasoning, and without what
        was malformed in it, as in APIs that have no place for them.
      aside: look for the prompt's ids in another thread, while others go on;
        when the engine gets the request is then up to that thread.

    Returns:
      The answers, in order.

    Raises:
      ValueError: as for `chat`.
    """
    template.read_tools(tools)  # what is sampled can be parsed
    conversation = self._conversation(episode)
    build = functools.partial(
      conversation.history.prompt,
      functools.partial(self._render, tools),
      self.tokenizer.eos_id,
      messages,
      tools,
      unsaid=unsaid,
    )
    prompt = await asyncio.to_thread(build) if aside else build()
    stop_ids = dict.fromkeys((*sampling.stop_ids, self.tokenizer.eos_id))
    sampling = dataclasses.replace(sampling, stop_ids=tuple(stop_ids))
    request = engines.GenRequest(prompt.ids, sampling, self._experts)
    if count == 1 and not stop and listen is None:
      result = await asyncio.wrap_future(self._engine.submit(request))
      message = self._parse(result, tools)
      sampled = [streams.Sampled(result, None, message)]
    else:
      start = functools.partial(streams.Stream, self.tokenizer, tools, stop)
      sampled = await streams.follow(
        self._engine, request, start, count, listen
      )
    self._tell(episode, conversation, prompt)
    return self._keep(episode, conversation, prompt, tools, sampled)

  def _keep(
    self,
    episode: str,
    conversation: _Conversation,
    prompt: histories.Prompt,
    tools: Sequence[Mapping[str, Any]] | None,
    sampled: Sequence[streams.Sampled],
  ) -> list[Answer]:
    """Records what was sampled; one that cannot be costs no other."""
    answers, failed = [], None
    for result, stopped, message in sampled:
      self.counters.malformed += bool(message.errors)
      try:
        self._record(episode, conversation, prompt.ids, result)
      except Exception as error:  # raised below
        failed = failed or error
        continue
      if result.stop != types.StopReason.CONTEXT:  # else nothing was said
        conversation.history.add(prompt, tools, message, result.ids)
      answers.append(
        Answer(
          message, result.stop, stopped, prompt.ids, result.ids,
          result.logprobs, result.version,
        )
      )  # fmt: skip
    if failed is not None:
      raise failed
    return answers

  def count(
    self,
    messages: Sequence[types.Message],
    tools: Sequence[Mapping[str, Any]] | None,
  ) -> int:
    """Tokens of a prompt that goes on from nothing that was sampled.

    Raises:
      ValueError: as for `chat`.
    """
    template.read_tools(tools)
    prompt = histories.History().prompt(
      functools.partial(self._render, tools),
      self.tokenizer.eos_id,
      messages,
      tools,
      unsaid=False,
    )
    return len(prompt.ids)

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

  def _render(self, tools, block, *, first: bool) -> np.ndarray:
    """Messages up to the next answer's generation prompt.

    Args:
      tools: shown in front of the first block.
      block: messages without a sampled answer among them.
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
    return self.tokenizer.encode_rendered(rendered)[0]

  def _parse(self, result: engines.GenResult, tools) -> types.Message:
    """The message of sampled ids: what they quote is no tag."""
    if result.stop == types.StopReason.CONTEXT:  # nothing was sampled
      return types.Message('assistant')
    stream = template.StreamParser(tools or None, thinking=True, spelled=False)
    for text, special in self.tokenizer.pieces(result.ids):
      if special:
        stream.feed_special(text)
      else:
        stream.feed(text)
    return stream.close()

  def _tell(
    self, episode: str, conversation: _Conversation, prompt: histories.Prompt
  ) -> None:
    """Counts whether a request went on from an answer before it."""
    if prompt.first:
      return
    if prompt.change is None:
      self.counters.continued += 1
      return
    self.counters.drifted += 1
    step = conversation.usage.completions
    self.drifts.append(f'{episode} step {step}: {prompt.change}')

  def _record(
    self,
    episode: str,
    conversation: _Conversation,
    prompt_ids: np.ndarray,
    result: engines.GenResult,
  ) -> None:
    step, sampled = conversation.usage
    conversation.usage = Usage(step + 1, sampled + len(result.ids))
    self.counters.requests += 1
    self.counters.sampled_tokens += len(result.ids)
    if self._pool is not None:
      self._pool.put(
        types.Completion(
          episode=episode,
          step=step,
          prompt_ids=prompt_ids,
          ids=result.ids,
          logprobs=result.logprobs,
          version=result.version,
          stop=result.stop,
          seconds=result.seconds,
          experts=result.experts,
        )
      )
