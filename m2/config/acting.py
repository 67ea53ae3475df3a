"""Sections of acting: tasks, agent, engine, Forge, evaluation, evolution."""

from m2.config import base


@base.section
class TasksConfig(base.Settings):
  """The curriculum: which verifiable tasks, how hard, in what mixture."""

  family: str = 'sql'
  skills: tuple[tuple[str, float], ...] = ()  # (skill, weight); () = all equal
  difficulty_min: int = 0
  difficulty_max: int = 2
  retry_demos: float = 0.3  # share of demonstrations with a mistake, then a fix

  def _check(self) -> None:
    names = [name for name, _ in self.skills]
    base.require(
      len(set(names)) == len(names), f'tasks.skills repeats a skill: {names}'
    )
    for name, weight in self.skills:
      base.require(weight >= 0, f'tasks.skills.{name}={weight} must be >= 0')
    base.require(
      not self.skills or sum(weight for _, weight in self.skills) > 0,
      'tasks.skills: every weight is zero; nothing could be drawn',
    )
    base.require(
      0 <= self.difficulty_min <= self.difficulty_max,
      f'tasks.difficulty_min={self.difficulty_min} must be between 0 and '
      f'tasks.difficulty_max={self.difficulty_max}',
    )
    base.require(
      0 <= self.retry_demos <= 1, f'tasks.retry_demos={self.retry_demos}'
    )


@base.section
class PromptConfig(base.Settings):
  """What an agent is told before the task (m2/agents/scaffold.py)."""

  scaffold: str = 'configs/scaffold/default.md'
  tools: bool = True  # show the tool schemas; False leaves them to training

  def _check(self) -> None:
    base.require(bool(self.scaffold), 'prompt.scaffold is empty: give a file')


@base.section
class AgentConfig(base.Settings):
  """The white-box agent and its sampling (m2/agents/whitebox.py)."""

  max_turns: int = 4
  max_new: int = 160  # tokens per turn
  temperature: float = 1.0  # report 8.1
  top_p: float = 1.0
  top_k: int = 0  # 0 = off
  tool_chars: int = 0  # cut all but the newest tool answer to this; 0 = never

  def _check(self) -> None:
    base.positive(self, 'max_turns max_new')
    base.require(
      self.temperature >= 0, f'agent.temperature={self.temperature} negative'
    )
    base.require(0 < self.top_p <= 1, f'agent.top_p={self.top_p} not in (0, 1]')
    for name in ('top_k', 'tool_chars'):
      value = getattr(self, name)
      base.require(value >= 0, f'agent.{name}={value} is negative')


@base.section
class EngineConfig(base.Settings):
  """The in-process generation engine (m2/engine/engine.py)."""

  slots: int = 64  # sequences decoded at once
  length: int = 512  # tokens of cache per slot
  chunk: int = 16  # decode steps per device call
  prompts: int = 32  # computed at once; each needs a second row of cache then
  fp8: bool = False  # experts in block-FP8, made of each version that is loaded

  def _check(self) -> None:
    base.positive(self, 'slots length chunk prompts')


@base.section
class ForgeConfig(base.Settings):
  """Agent RL (report 6): rollouts, window, advantages, objective, reward."""

  groups: int = 16  # prompt groups trained per step
  group_size: int = 8  # rollouts per prompt
  in_flight: int = 32  # prompt groups running at once (N)
  window: float = 0.3  # share of in_flight that may be taken out of order
  runner: str = 'asyncio'  # asyncio | ray: agents here, or on Ray's hosts
  episode_seconds: float = 3600.0  # of rollout, after which one is given up
  clip_high: float = 5.0  # CISPO: ratio is clipped to [0, 1 + clip_high]
  baseline: str = 'group'  # group | leave_one_out
  merge: bool = True  # prefix trees; False trains separate rows
  row_tokens: int = 2048  # tokens per packed line
  lines: int = 8  # packed lines computed at once
  chunk: int = 1024  # tokens whose logits exist at once
  bad_batches: int = 0  # left out for numbers not finite; one more ends the run
  replay: bool = False  # train under the experts that the rollout chose
  alpha: float = 0.1  # weight of the process reward
  beta: float = 0.0  # weight of the completion-time reward
  gamma: float = 1.0
  target_seconds: float = 1.0  # completion time that earns zero speed reward

  def _check(self) -> None:
    base.positive(self, 'groups group_size in_flight window row_tokens')
    base.positive(self, 'lines chunk')
    base.positive(self, 'clip_high target_seconds episode_seconds')
    base.require(
      self.bad_batches >= 0,
      f'forge.bad_batches={self.bad_batches} must not be negative',
    )
    base.choice(self, 'forge', 'baseline', ('group', 'leave_one_out'))
    base.choice(self, 'forge', 'runner', ('asyncio', 'ray'))
    base.require(
      self.groups <= self.in_flight,
      f'forge.groups={self.groups} exceeds forge.in_flight={self.in_flight}: '
      'a step could never fill',
    )
    base.require(self.window <= 1, f'forge.window={self.window} not in (0, 1]')
    base.require(
      self.group_size > 1,
      f'forge.group_size={self.group_size}: a group baseline needs at least 2',
    )
    base.require(
      0 <= self.gamma <= 1, f'forge.gamma={self.gamma} not in [0, 1]'
    )


@base.section
class EvalConfig(base.Settings):
  """Evaluation on one sealed split (m2/eval/run.py)."""

  split: str = 'dev'
  tasks: int = 300
  trials: int = 1  # episodes per task
  difficulty: int = -1  # -1 = the range of `tasks`

  def _check(self) -> None:
    base.choice(self, 'eval', 'split', ('train', 'dev', 'gate', 'test'))
    base.positive(self, 'tasks trials')


@base.section
class EvolveConfig(base.Settings):
  """One self-evolution round (m2/evolve/loop.py).

  `steps` and `optim` of the run are those of each fine-tuned arm.
  """

  targeted: float = 0.5  # share of the mixture moved to the weakest skill
  dev_tasks: int = 300
  gate_tasks: int = 300
  gate_share: float = 0.25  # of the GATE tasks, spent on the targeted skill
  confidence: float = 0.95
  min_gain: float = 0.0  # lower bound of the gain on the weak skill
  max_loss: float = 0.1  # non-inferiority margin of every other skill

  def _check(self) -> None:
    base.positive(self, 'dev_tasks gate_tasks')
    for name in ('targeted', 'gate_share', 'confidence', 'max_loss'):
      value = getattr(self, name)
      base.require(0 < value < 1, f'evolve.{name}={value} is not in (0, 1)')
    base.require(
      self.targeted <= 0.8,
      f'evolve.targeted={self.targeted} exceeds 0.8: a fifth of the mixture at '
      'least is replay (m2/evolve/mutate.py)',
    )
    base.require(
      -1 < self.min_gain < 1, f'evolve.min_gain={self.min_gain} not in (-1, 1)'
    )


@base.section
class ConvertConfig(base.Settings):
  """Checkpoint conversion between a workdir and the public format."""

  source: str = ''  # its files say the model's shape
  target: str = ''  # a directory that is empty or does not exist yet
  format: str = 'hf'  # of the target: hf | workdir
  dtype: str = 'bfloat16'  # float32 | bfloat16 | fp8 (128 x 128 blocks, hf)

  def _check(self) -> None:
    base.choice(self, 'convert', 'format', ('hf', 'workdir'))
    base.choice(self, 'convert', 'dtype', ('float32', 'bfloat16', 'fp8'))
    base.require(
      self.format == 'hf' or self.dtype != 'fp8',
      'convert.dtype=fp8 is for files: a run holds float32 or bfloat16',
    )
    for name in ('source', 'target'):
      base.require(getattr(self, name), f'convert.{name} is empty: give a path')


@base.section
class ServeConfig(base.Settings):
  """A checkpoint behind HTTP (m2/gateway/server.py)."""

  host: str = '127.0.0.1'  # 0.0.0.0 listens to other machines, too
  port: int = 8000  # 0 = any that is free
  name: str = 'm2'  # of the model, which requests must name
  secret_file: str = ''  # of the episodes' keys; '' = anybody may ask
  megabytes: int = 8  # of a request's body
  requests: int = 256  # answered at once; more are refused
  seconds: float = 600.0  # that a request may take

  def _check(self) -> None:
    base.positive(self, 'megabytes requests seconds')
    base.require(0 <= self.port < 65536, f'serve.port={self.port} is no port')
    for name in ('host', 'name'):
      base.require(bool(getattr(self, name)), f'serve.{name} is empty')
    base.require(
      self.host in ('127.0.0.1', '::1', 'localhost') or bool(self.secret_file),
      f'serve.host={self.host} listens to other machines: give '
      'serve.secret_file, without which anybody may ask',
    )


@base.section
class StagesConfig(base.Settings):
  """The whole loop (m2/stages.py): what differs from stage to stage.

  `steps` and `optim` of the run are those of its first stage, SFT.
  """

  rl_steps: int = 60
  rl_lr: float = 3e-4
  evolve_steps: int = 200  # of each arm
  evolve_lr: float = 3e-4
  test_tasks: int = 400

  def _check(self) -> None:
    base.positive(self, 'rl_steps rl_lr evolve_steps evolve_lr test_tasks')


@base.section
class PlanConfig(base.Settings):
  """What `--config.mode=plan` compiles, and for which TPUs (m2/plan/run.py).

  The run that is planned is that of the other sections. A config without
  `engine` and `forge` is planned with those of configs/rl.py.
  """

  topology: str = 'v5p:8x8x8'  # CHIP:SIDES; chips: v5e, v5p, v6e, tpu7x
  slices: int = 1  # of that topology, joined by the data center network
  programs: str = 'train,prefill,decode,rl,sync'
  rollout_expert: int = 32  # mesh of generation: the rest is data
  rollout_tensor: int = 1
  search: bool = False  # look for the best configuration that fits

  def _check(self) -> None:
    base.positive(self, 'slices rollout_expert rollout_tensor')
    names = self.programs.split(',')
    known = ('train', 'prefill', 'decode', 'rl', 'sync')
    base.require(
      set(names) <= set(known) and len(set(names)) == len(names),
      f'plan.programs={self.programs!r}: some of {",".join(known)}, each once',
    )
