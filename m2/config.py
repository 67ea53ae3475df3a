"""Settings: ConfigDicts stop here and become frozen, hashable dataclasses.

`configs/*.py` build ConfigDicts; `RunConfig.from_config` freezes one, once, at
the door. It names every unknown key, wrong type and impossible combination
before anything is compiled. A section that a mode does not use is absent from
its config and `None` here, so no setting can be set and then ignored.
"""

import dataclasses
import types
import typing
from typing import Any

import ml_collections


class Settings:
  """Base of the frozen sections; remembers which fields were read.

  Reads are recorded by (class name, field name), so that a run can tell which
  settings no code consulted (`unread`). Hashing and comparing do not count.
  """

  READS: typing.ClassVar[set[tuple[str, str]]] = set()

  def __getattribute__(self, name: str) -> Any:
    if not name.startswith('_'):
      Settings.READS.add((type(self).__name__, name))
    return object.__getattribute__(self, name)

  def _values(self) -> tuple:
    return tuple(
      object.__getattribute__(self, field.name)
      for field in dataclasses.fields(self)
    )

  def __eq__(self, other: object) -> bool:
    return type(self) is type(other) and self._values() == other._values()

  def __hash__(self) -> int:
    return hash((type(self), self._values()))


def section(cls):
  """Declares a settings section: a frozen dataclass that tracks reads."""
  return dataclasses.dataclass(frozen=True, eq=False)(cls)


@section
class ModelConfig(Settings):
  """Shape of the model; the defaults are MiniMax-M2 (report 2.1)."""

  vocab: int = 200_064
  d_model: int = 3072
  layers: int = 62
  heads: int = 48
  kv_heads: int = 8
  head_dim: int = 128
  rotary_dim: int = 64  # leading dims of each head that RoPE rotates
  rope_theta: float = 5e6
  max_positions: int = 196_608
  experts: int = 256
  d_expert: int = 1536  # SwiGLU width of one expert
  top_k: int = 8  # experts selected per token
  min_k: int = 8  # experts always used; the rest need `min_share`
  min_share: float = 0.0  # of the selected weight, to use experts past min_k
  mtp_modules: int = 0  # multi-token-prediction modules (report 2.3)
  norm_eps: float = 1e-6
  init_std: float = 0.02
  dtype: str = 'bfloat16'  # activations and matmuls
  param_dtype: str = 'float32'  # stored weights
  remat: str = 'block'  # none | block | full: see m2/model/transformer.py

  def _check(self) -> None:
    _positive(self, 'vocab d_model layers heads kv_heads head_dim experts')
    _positive(self, 'd_expert top_k min_k norm_eps rope_theta max_positions')
    _require(
      self.heads % self.kv_heads == 0,
      f'model.heads={self.heads} is not a multiple of '
      f'model.kv_heads={self.kv_heads}',
    )
    _require(
      self.rotary_dim % 2 == 0 and 0 <= self.rotary_dim <= self.head_dim,
      f'model.rotary_dim={self.rotary_dim} must be even and at most '
      f'model.head_dim={self.head_dim}',
    )
    _require(
      self.top_k <= self.experts,
      f'model.top_k={self.top_k} exceeds model.experts={self.experts}',
    )
    _require(
      self.min_k <= self.top_k,
      f'model.min_k={self.min_k} exceeds model.top_k={self.top_k}; set them '
      'equal for a fixed number of active experts',
    )
    _require(
      0 <= self.min_share < 1, f'model.min_share={self.min_share} not in [0, 1)'
    )
    _require(
      self.min_k == self.top_k or self.min_share > 0,
      f'model.min_k={self.min_k} below model.top_k={self.top_k} needs '
      'model.min_share > 0, else it does nothing',
    )
    _choice(self, 'model', 'dtype', ('float32', 'bfloat16'))
    _choice(self, 'model', 'param_dtype', ('float32', 'bfloat16'))
    _choice(self, 'model', 'remat', ('none', 'block', 'full'))
    _require(self.mtp_modules >= 0, 'model.mtp_modules must not be negative')


@section
class MeshConfig(Settings):
  """Mesh axis sizes; one axis may be -1 and takes the devices left over."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1

  def _check(self) -> None:
    sizes = (self.data, self.fsdp, self.expert, self.tensor)
    _require(
      all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
      f'mesh axes (data, fsdp, expert, tensor)={sizes}: each must be positive, '
      'at most one may be -1',
    )


@section
class OptimConfig(Settings):
  """AdamW or Muon under a warm-up-stable-decay schedule."""

  name: str = 'adamw'
  lr: float = 3e-4  # peak
  warmup: int = 100  # steps, linear from 0
  decay: float = 0.2  # share of the steps, at the end, that decay linearly
  final: float = 0.1  # last learning rate, as a share of the peak
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1  # on matrices only: never norms or biases
  clip: float = 1.0  # global gradient norm
  accumulate: int = 1  # microbatches per step
  train_only: str = 'all'  # all | mtp: mtp freezes the trunk (report 2.3)
  bias_rate: float = 1e-3  # router bias step per sign of load error
  bias_decay: bool = True  # scale bias_rate with the schedule

  def _check(self) -> None:
    _choice(self, 'optim', 'name', ('adamw', 'muon'))
    _choice(self, 'optim', 'train_only', ('all', 'mtp'))
    _positive(self, 'lr clip accumulate eps')
    for name in ('decay', 'final'):
      value = getattr(self, name)
      _require(0 <= value <= 1, f'optim.{name}={value} is not in [0, 1]')
    for name in ('b1', 'b2'):
      value = getattr(self, name)
      _require(0 <= value < 1, f'optim.{name}={value} is not in [0, 1)')
    for name in ('warmup', 'weight_decay', 'bias_rate'):
      value = getattr(self, name)
      _require(value >= 0, f'optim.{name}={value} must not be negative')


@section
class LossConfig(Settings):
  """Weights of the terms added to next-token cross-entropy."""

  z: float = 1e-4  # on the squared log-partition of the head
  balance: float = 0.0  # auxiliary load balance (report 2.2.1 keeps it small)
  mtp: float = 0.0  # multi-token prediction (report 2.3: 0.3)
  mtp_final: float = 0.0  # its value after the decay phase (report: 0.1)
  chunk: int = 1024  # tokens whose logits exist at once

  def _check(self) -> None:
    _positive(self, 'chunk')
    for name in ('z', 'balance', 'mtp', 'mtp_final'):
      value = getattr(self, name)
      _require(value >= 0, f'loss.{name}={value} must not be negative')
    _require(
      self.mtp_final <= self.mtp,
      f'loss.mtp_final={self.mtp_final} exceeds loss.mtp={self.mtp}: the weight '
      'only falls',
    )


@section
class DataConfig(Settings):
  """Where rows come from and how they are packed (m2/data/pipeline.py)."""

  source: str = 'files'  # files | jsonl | array_record | tasks
  path: str = 'stdlib'  # globs, by commas; 'stdlib' = Python's own sources
  tokenizer: str = ''  # tokenizer.json; '' trains a byte-level BPE in workdir
  batch: int = 8  # rows per step over all hosts
  length: int = 1024  # tokens per row
  keep_all_reasoning: bool = True  # report Eq. 10 keeps every turn's reasoning
  examples: int = 20_000  # task source: distinct demonstrations
  prefetch: int = 2  # batches made ahead, by each worker
  workers: int = 0  # processes; 0 = in this one

  def _check(self) -> None:
    _choice(self, 'data', 'source', ('files', 'jsonl', 'array_record', 'tasks'))
    _positive(self, 'batch length examples prefetch')
    _require(self.workers >= 0, f'data.workers={self.workers} is negative')


@section
class CheckpointConfig(Settings):
  """Saving, resuming and starting weights (m2/checkpoint/store.py)."""

  every: int = 500  # steps
  keep: int = 2
  init_from: str = ''  # a workdir or Hugging Face directory: weights only
  on_corrupt: str = 'error'  # error | previous: use the last good one

  def _check(self) -> None:
    _positive(self, 'every keep')
    _choice(self, 'checkpoint', 'on_corrupt', ('error', 'previous'))


@section
class LogConfig(Settings):
  """Progress line, metrics.jsonl and TensorBoard (m2/obs/metrics.py)."""

  every: int = 10  # steps
  introspect: int = 50  # steps between introspection records; 0 = never
  tensorboard: bool = True

  def _check(self) -> None:
    _positive(self, 'every')
    _require(self.introspect >= 0, f'log.introspect={self.introspect} negative')


@section
class TasksConfig(Settings):
  """The curriculum: which verifiable tasks, how hard, in what mixture."""

  family: str = 'sql'
  skills: tuple[tuple[str, float], ...] = ()  # (skill, weight); () = all equal
  difficulty_min: int = 0
  difficulty_max: int = 2
  retry_demos: float = 0.3  # share of demonstrations with a mistake, then a fix

  def _check(self) -> None:
    names = [name for name, _ in self.skills]
    _require(
      len(set(names)) == len(names), f'tasks.skills repeats a skill: {names}'
    )
    for name, weight in self.skills:
      _require(weight >= 0, f'tasks.skills.{name}={weight} must be >= 0')
    _require(
      not self.skills or sum(weight for _, weight in self.skills) > 0,
      'tasks.skills: every weight is zero; nothing could be drawn',
    )
    _require(
      0 <= self.difficulty_min <= self.difficulty_max,
      f'tasks.difficulty_min={self.difficulty_min} must be between 0 and '
      f'tasks.difficulty_max={self.difficulty_max}',
    )
    _require(
      0 <= self.retry_demos <= 1, f'tasks.retry_demos={self.retry_demos}'
    )


@section
class PromptConfig(Settings):
  """What an agent is told before the task (m2/agents/scaffold.py)."""

  scaffold: str = 'configs/scaffold/default.md'
  tools: bool = True  # show the tool schemas; False leaves them to training

  def _check(self) -> None:
    _require(bool(self.scaffold), 'prompt.scaffold is empty: give a file')


@section
class AgentConfig(Settings):
  """The white-box agent and its sampling (m2/agents/whitebox.py)."""

  max_turns: int = 4
  max_new: int = 160  # tokens per turn
  temperature: float = 1.0  # report 8.1
  top_p: float = 1.0
  top_k: int = 0  # 0 = off
  tool_chars: int = 0  # cut all but the newest tool answer to this; 0 = never

  def _check(self) -> None:
    _positive(self, 'max_turns max_new')
    _require(
      self.temperature >= 0, f'agent.temperature={self.temperature} negative'
    )
    _require(0 < self.top_p <= 1, f'agent.top_p={self.top_p} not in (0, 1]')
    for name in ('top_k', 'tool_chars'):
      value = getattr(self, name)
      _require(value >= 0, f'agent.{name}={value} is negative')


@section
class EngineConfig(Settings):
  """The in-process generation engine (m2/engine/engine.py)."""

  slots: int = 64  # sequences decoded at once
  length: int = 512  # tokens of cache per slot
  chunk: int = 16  # decode steps per device call

  def _check(self) -> None:
    _positive(self, 'slots length chunk')


@section
class ForgeConfig(Settings):
  """Agent RL (report 6): rollouts, window, advantages, objective, reward."""

  groups: int = 16  # prompt groups trained per step
  group_size: int = 8  # rollouts per prompt
  in_flight: int = 32  # prompt groups running at once (N)
  window: float = 0.3  # share of in_flight that may be taken out of order
  clip_high: float = 5.0  # CISPO: ratio is clipped to [0, 1 + clip_high]
  baseline: str = 'group'  # group | leave_one_out
  merge: bool = True  # prefix trees; False trains separate rows
  row_tokens: int = 2048  # tokens per packed line
  lines: int = 8  # packed lines computed at once
  chunk: int = 1024  # tokens whose logits exist at once
  replay: bool = False  # train under the experts that the rollout chose
  alpha: float = 0.1  # weight of the process reward
  beta: float = 0.0  # weight of the completion-time reward
  gamma: float = 1.0
  target_seconds: float = 1.0  # completion time that earns zero speed reward

  def _check(self) -> None:
    _positive(self, 'groups group_size in_flight window row_tokens')
    _positive(self, 'lines chunk')
    _positive(self, 'clip_high target_seconds')
    _choice(self, 'forge', 'baseline', ('group', 'leave_one_out'))
    _require(
      self.groups <= self.in_flight,
      f'forge.groups={self.groups} exceeds forge.in_flight={self.in_flight}: '
      'a step could never fill',
    )
    _require(self.window <= 1, f'forge.window={self.window} not in (0, 1]')
    _require(
      self.group_size > 1,
      f'forge.group_size={self.group_size}: a group baseline needs at least 2',
    )
    _require(0 <= self.gamma <= 1, f'forge.gamma={self.gamma} not in [0, 1]')


@section
class EvalConfig(Settings):
  """Evaluation on one sealed split (m2/eval/run.py)."""

  split: str = 'dev'
  tasks: int = 300
  trials: int = 1  # episodes per task
  difficulty: int = -1  # -1 = the range of `tasks`

  def _check(self) -> None:
    _choice(self, 'eval', 'split', ('train', 'dev', 'gate', 'test'))
    _positive(self, 'tasks trials')


@section
class EvolveConfig(Settings):
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
    _positive(self, 'dev_tasks gate_tasks')
    for name in ('targeted', 'gate_share', 'confidence', 'max_loss'):
      value = getattr(self, name)
      _require(0 < value < 1, f'evolve.{name}={value} is not in (0, 1)')
    _require(
      self.targeted <= 0.8,
      f'evolve.targeted={self.targeted} exceeds 0.8: a fifth of the mixture at '
      'least is replay (m2/evolve/mutate.py)',
    )
    _require(
      -1 < self.min_gain < 1, f'evolve.min_gain={self.min_gain} not in (-1, 1)'
    )


@section
class ConvertConfig(Settings):
  """Checkpoint conversion between a workdir and the public format."""

  source: str = ''  # its files say the model's shape
  target: str = ''  # a directory that is empty or does not exist yet
  format: str = 'hf'  # of the target: hf | workdir
  dtype: str = 'bfloat16'  # float32 | bfloat16 | fp8 (128 x 128 blocks, hf)

  def _check(self) -> None:
    _choice(self, 'convert', 'format', ('hf', 'workdir'))
    _choice(self, 'convert', 'dtype', ('float32', 'bfloat16', 'fp8'))
    _require(
      self.format == 'hf' or self.dtype != 'fp8',
      'convert.dtype=fp8 is for files: a run holds float32 or bfloat16',
    )
    for name in ('source', 'target'):
      _require(getattr(self, name), f'convert.{name} is empty: give a path')


@section
class StagesConfig(Settings):
  """The whole loop (m2/stages.py): what differs from stage to stage.

  `steps` and `optim` of the run are those of its first stage, SFT.
  """

  rl_steps: int = 60
  rl_lr: float = 3e-4
  evolve_steps: int = 200  # of each arm
  evolve_lr: float = 3e-4
  test_tasks: int = 400

  def _check(self) -> None:
    _positive(self, 'rl_steps rl_lr evolve_steps evolve_lr test_tasks')


# Which sections each mode reads; a config has exactly these, plus the fields
# of RunConfig that are not sections.
_TRAIN = ('model', 'mesh', 'optim', 'loss', 'data', 'checkpoint', 'log')
_AGENT = ('tasks', 'prompt', 'agent', 'engine')
MODES: dict[str, tuple[str, ...]] = {
  'pretrain': _TRAIN,
  'sft': (*_TRAIN, 'tasks', 'prompt'),
  'rl': ('model', 'mesh', 'optim', 'checkpoint', 'log', *_AGENT, 'forge'),
  'eval': ('model', 'mesh', 'checkpoint', *_AGENT, 'eval'),
  'evolve': (*_TRAIN, *_AGENT, 'evolve'),
  'convert': ('convert',),
  'quickstart': (*_TRAIN, *_AGENT, 'forge', 'evolve', 'stages'),
}


@section
class RunConfig(Settings):
  """Everything one run of `main.py` needs. Sections a mode lacks are None."""

  mode: str = 'pretrain'
  seed: int = 0
  steps: int = 1000
  model: ModelConfig | None = None
  mesh: MeshConfig | None = None
  optim: OptimConfig | None = None
  loss: LossConfig | None = None
  data: DataConfig | None = None
  checkpoint: CheckpointConfig | None = None
  log: LogConfig | None = None
  tasks: TasksConfig | None = None
  prompt: PromptConfig | None = None
  agent: AgentConfig | None = None
  engine: EngineConfig | None = None
  forge: ForgeConfig | None = None
  eval: EvalConfig | None = None
  evolve: EvolveConfig | None = None
  convert: ConvertConfig | None = None
  stages: StagesConfig | None = None

  @classmethod
  def from_config(cls, config: ml_collections.ConfigDict) -> 'RunConfig':
    """Freezes a ConfigDict.

    Args:
      config: what a file in `configs/` returns, with overrides applied.

    Returns:
      The frozen settings.

    Raises:
      ValueError: unknown or missing keys, wrong types, or values that cannot
        work together; the message lists all of them with their full paths.
    """
    tree = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    errors: list[str] = []
    mode = tree.get('mode')
    if mode not in MODES:
      raise ValueError(f'mode={mode!r}: choose one of {", ".join(MODES)}')
    sections = {'mode', 'seed', 'steps', *MODES[mode]}
    for name in sorted(sections - set(tree)):
      errors.append(f'{name}: missing; mode {mode!r} needs it')
    for name in sorted(set(tree) - sections):
      errors.append(f'{name}: unknown key for mode {mode!r}')
    kwargs = {}
    hints = typing.get_type_hints(cls)
    for name in sections & set(tree):
      kwargs[name] = _freeze(hints[name], tree[name], name, errors)
    if not errors:
      run = cls(**kwargs)
      run._check(errors)
    if errors:
      raise ValueError('config: ' + '; '.join(errors))
    Settings.READS.clear()  # checking is not using
    return run

  def _check(self, errors: list[str]) -> None:
    for field in dataclasses.fields(self):
      value = object.__getattribute__(self, field.name)
      if isinstance(value, Settings):
        try:
          value._check()
        except ValueError as error:
          errors.append(str(error))
    if self.steps <= 0:
      errors.append(f'steps={self.steps} must be positive')
    if self.seed < 0:
      errors.append(f'seed={self.seed} must not be negative')
    if errors:
      return
    if self.data and self.optim and self.data.batch % self.optim.accumulate:
      errors.append(
        f'data.batch={self.data.batch} is not a multiple of '
        f'optim.accumulate={self.optim.accumulate}'
      )
    if self.loss and self.loss.mtp > 0 and self.model.mtp_modules == 0:
      errors.append(
        f'loss.mtp={self.loss.mtp} needs model.mtp_modules >= 1; it is 0'
      )
    mtp = self.loss.mtp if self.loss else 0
    if self.optim and self.optim.train_only == 'mtp' and not mtp:
      errors.append('optim.train_only=mtp needs loss.mtp > 0')
    if self.agent and self.agent.max_new >= self.engine.length:
      errors.append(
        f'agent.max_new={self.agent.max_new} leaves no room for a prompt in '
        f'engine.length={self.engine.length}'
      )


def _freeze(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
  """Checks `value` against a field's type; appends what is wrong."""
  if isinstance(hint, types.UnionType):
    hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
  if isinstance(hint, type) and issubclass(hint, Settings):
    if not isinstance(value, dict):
      errors.append(f'{path}={value!r}: expected a section of settings')
      return None
    return _freeze_section(hint, value, path, errors)
  if typing.get_origin(hint) is tuple:
    return _freeze_weights(value, path, errors)
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is not hint:
    errors.append(
      f'{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}'
    )
  return value


def _freeze_section(
  cls: type, tree: dict, path: str, errors: list[str]
) -> Settings | None:
  hints = typing.get_type_hints(cls)
  names = {field.name for field in dataclasses.fields(cls)}
  for name in sorted(set(tree) - names):
    errors.append(f'{path}.{name}: unknown key')
  for name in sorted(names - set(tree)):
    errors.append(f'{path}.{name}: missing')
  before = len(errors)
  kwargs = {
    name: _freeze(hints[name], tree[name], f'{path}.{name}', errors)
    for name in sorted(names & set(tree))
  }
  return (
    None if len(errors) > before or len(kwargs) < len(names) else cls(**kwargs)
  )


def _freeze_weights(
  value: Any, path: str, errors: list[str]
) -> tuple[tuple[str, float], ...]:
  """A name -> weight mapping becomes sorted pairs."""
  pairs = value.items() if isinstance(value, dict) else value
  frozen = []
  for pair in pairs:
    name, weight = pair
    if type(name) is not str or type(weight) not in (int, float):
      errors.append(f'{path}.{name}={weight!r}: expected a number')
      continue
    frozen.append((name, float(weight)))
  return tuple(sorted(frozen))


def to_config(settings: Settings) -> ml_collections.ConfigDict:
  """The ConfigDict that `RunConfig.from_config` would freeze to `settings`."""
  tree = ml_collections.ConfigDict()
  for field in dataclasses.fields(settings):
    value = object.__getattribute__(settings, field.name)
    if value is None:
      continue
    if isinstance(value, Settings):
      value = to_config(value)
    elif field.name == 'skills':
      value = ml_collections.ConfigDict(dict(value))
    tree[field.name] = value
  return tree


def unread(settings: Settings) -> list[str]:
  """Paths of the leaves of `settings` that no code has read so far."""
  paths = []
  for field in dataclasses.fields(settings):
    value = object.__getattribute__(settings, field.name)
    if isinstance(value, Settings):
      paths += [f'{field.name}.{path}' for path in unread(value)]
    elif value is not None:
      if (type(settings).__name__, field.name) not in Settings.READS:
        paths.append(field.name)
  return paths


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _positive(settings: Settings, names: str) -> None:
  label = type(settings).__name__.removesuffix('Config').lower()
  for name in names.split():
    value = object.__getattribute__(settings, name)
    _require(value > 0, f'{label}.{name}={value} must be positive')


def _choice(
  settings: Settings, label: str, name: str, choices: tuple[str, ...]
) -> None:
  value = object.__getattribute__(settings, name)
  _require(
    value in choices,
    f'{label}.{name}={value!r}: choose one of {", ".join(choices)}',
  )
