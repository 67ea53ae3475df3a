"""The white-box agent: think, act, observe, in the M2 chat format."""

import time
from collections.abc import Sequence

from m2 import config, types
from m2.agents import context, scaffold, tools


class WhiteBox:
  """Plays tasks through any `types.LLM`, acting in the task's workspace."""

  def __init__(self, cfg: config.AgentConfig):
    """Reads the scaffold and the context policy.

    Args:
      cfg: turns, sampling, scaffold and context.

    Raises:
      ValueError: a scaffold that cannot be used.
    """
    self._cfg, self._policy = cfg, context.policy(cfg.tool_chars)
    guide = scaffold.load(cfg.scaffold)
    self.system = guide.system
    self._tools = tools.schemas(guide)
    self.shown = self._tools if cfg.tools_in_prompt else None

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
    start = time.monotonic()
    messages = [
      types.Message('system', self.system),
      types.Message('user', task.prompt),
    ]
    malformed, finished, stop, turn = 0, False, types.StopReason.EOS, 0
    while turn < self._cfg.max_turns and not finished:
      reply, stop = await llm.chat(
        episode, self._policy(messages), self.shown, self._sampling(seed, turn)
      )
      turn += 1
      messages.append(reply)
      if stop != types.StopReason.EOS:
        break
      malformed += bool(reply.errors)
      answers, finished = await self._act(reply, workspace)
      messages += answers
      if not answers:
        break
    return types.Transcript(
      messages=tuple(messages),
      turns=turn,
      seconds=time.monotonic() - start,
      malformed=malformed,
      finished=finished,
      stop=stop,
    )

  async def _act(
    self, reply: types.Message, workspace: types.Workspace
  ) -> tuple[Sequence[types.Message], bool]:
    """Answers of the tools, and whether the agent is done."""
    answers = [types.Message('tool', f'error: {e}') for e in reply.errors]
    for request in reply.tool_calls:
      if request.name == tools.FINISH and not reply.errors:
        return answers, True
      answers.append(
        types.Message('tool', await tools.call(request, workspace))
      )
    return answers, False

  def _sampling(self, seed: int, turn: int) -> types.Sampling:
    return types.Sampling(
      max_new=self._cfg.max_new,
      temperature=self._cfg.temperature,
      top_p=self._cfg.top_p,
      top_k=self._cfg.top_k,
      seed=seed + turn,
    )
