"""Typed rewards: alpha * process + beta * speed + perf (report 6.1.5)."""

from m2 import config, types

ERROR = -0.25  # process reward of an action whose tool answer is an error
MALFORMED = -1.0  # of an action that could not be parsed
UNFINISHED = -1.0  # of a last action that does not end the episode itself


def steps(
  episode: str,
  transcript: types.Transcript,
  verdict: types.Verdict,
  cfg: config.ForgeConfig,
) -> types.Reward:
  """The reward of an episode, one number for each of its actions.

  The process term belongs to the action that earned it; speed and outcome are
  paid with the last action.

  Args:
    episode: its id.
    transcript: what the agent did.
    verdict: what the verifier says; its outcome becomes the reward's.
    cfg: `alpha`, `beta` and `target_seconds` are read.
  """
  process = _process(transcript)
  # 1 for an instant episode, 0 at the target time, never below -1.
  speed = max(1 - transcript.seconds / cfg.target_seconds, -1.0)
  values = [cfg.alpha * value for value in process]
  values[-1] += cfg.beta * speed + verdict.score
  return types.Reward(
    episode=episode,
    outcome=verdict.outcome,
    steps=tuple(values),
    passed=verdict.passed,
    parts={
      'process': sum(process),
      'speed': speed,
      'perf': verdict.score,
    },
    evidence=verdict.evidence,
  )


def _process(transcript: types.Transcript) -> list[float]:
  """Process reward of each assistant turn."""
  values: list[float] = []
  for message in transcript.messages:
    if message.role == 'assistant':
      values.append(MALFORMED if message.errors else 0.0)
    elif message.role == 'tool' and values and not values[-1]:
      values[-1] = ERROR if message.content.startswith('error:') else 0.0
  if not transcript.finished:
    values[-1] += UNFINISHED
  return values
