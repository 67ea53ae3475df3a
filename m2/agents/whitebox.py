"""The white-box agent: think, act, observe, in the M2 chat format."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from m2 import config, types
from m2.agents import context, scaffold, tools


class WhiteBox:
  """Plays tasks through any `types.LLM`, acting in the task's workspace."""

  def __init__(self, cfg: config.AgentConfig, prompt: config.PromptConfig):
    """Reads the scaffold and the context policy.

    Args:
      cfg: turns, sampling and context.
      prompt: scaffold, and whether the tools are shown.

    Raises:
      ValueError: a scaffold that cannot be used.
    """
    self._cfg, self._policy = cfg, context.policy(cfg.tool_chars)
    self._system, self._shown = opening(prompt)

  async def run(
    self,
    task: types.Task,
    workspace: types.Workspace,
    llm: types.LLM,
    episode: str,
    seed: int,
  ) -> types.Transcript:
    """Plays one episode to its end.

    A malformed call is answered with an error that says what is wrong, and
    counted; a turn without a call ends the episode, and so does `finish`.

    Args:
      task: what is asked; its `data` is not looked at.
      workspace: an open workspace of the task.
      llm: the model.
      episode: id under which the model's side records the requests.
      seed: of the sampling; turn t of the episode uses seed + t.
    """
    clock = asyncio.get_running_loop().time  # stands while the engine does
    start = clock()
    messages = [
      types.Message('system', self._system),
      types.Message('user', task.prompt),
    ]
    malformed, finished, stop, turn = 0, False, types.StopReason.EOS, 0
    while turn < self._cfg.max_turns and not finished:
      reply, stop = await llm.chat(
        episode, self._policy(messages), self._shown, self._sampling(seed, turn)
      )
      turn += 1
      messages.append(reply)
      if stop != types.StopReason.EOS:
        break
      problems = [tools.problem(request) for request in reply.tool_calls]
      malformed += bool(reply.errors or any(problems))
      answers, finished = await self._act(reply, problems, workspace)
      messages += answers
      if not answers:
        break
    return types.Transcript(
      messages=tuple(messages),
      turns=turn,
      seconds=clock() - start,
      malformed=malformed,
      finished=finished,
      stop=stop,
    )

  async def _act(
    self,
    reply: types.Message,
    problems: Sequence[str],
    workspace: types.Workspace,
  ) -> tuple[Sequence[types.Message], bool]:
    """Answers of the tools, and whether the agent is done.

    Only their order says which call they answer: one each, with its problem if
    it has one, then the errors that belong to no call.
    """
    answers, sound = [], not (reply.errors or any(problems))
    for request, problem in zip(reply.tool_calls, problems):
      if request.name == tools.FINISH and sound:
        return answers, True
      answer = f'error: {problem}'
      if not problem:
        answer = await tools.call(request, workspace)
      answers.append(types.Message('tool', answer))
    answers += [types.Message('tool', f'error: {e}') for e in reply.errors]
    return answers, False

  def _sampling(self, seed: int, turn: int) -> types.Sampling:
    return types.Sampling(
      max_new=self._cfg.max_new,
      temperature=self._cfg.temperature,
      top_p=self._cfg.top_p,
      top_k=self._cfg.top_k,
      seed=seed + turn,
    )


def opening(
  prompt: config.PromptConfig,
) -> tuple[str, Sequence[Mapping[str, Any]] | None]:
  """System text and shown tool schemas of a conversation.

  Demonstrations open the same way, so that training and acting agree.

  Raises:
    ValueError: a scaffold that cannot be used.
  """
  guide = scaffold.load(prompt.scaffold)
  schemas = tools.schemas(guide)
  return guide.system, schemas if prompt.tools else None
