"""One run: which sections its mode has, and how a ConfigDict becomes one."""

import dataclasses
import math
import types
import typing
from typing import Any

import ml_collections

from m2.config import acting, base, training

# Which sections each mode reads; a config has exactly these, plus the fields
# of RunConfig that are not sections.
_SHARED = ('model', 'mesh', 'optim', 'checkpoint', 'log')
_TRAIN = (*_SHARED, 'loss', 'data', 'guard')
_AGENT = ('tasks', 'prompt', 'agent', 'engine')
MODES: dict[str, tuple[str, ...]] = {
  'pretrain': _TRAIN,
  'sft': (*_TRAIN, 'tasks', 'prompt'),
  'rl': (*_SHARED, *_AGENT, 'forge'),
  'eval': ('model', 'mesh', 'checkpoint', *_AGENT, 'eval'),
  'evolve': (*_TRAIN, *_AGENT, 'evolve'),
  'serve': ('model', 'mesh', 'checkpoint', 'engine', 'serve'),
  'convert': ('mesh', 'convert'),
  'quickstart': (*_TRAIN, *_AGENT, 'forge', 'evolve', 'stages'),
  'plan': ('model', 'mesh', 'optim', 'plan'),
}


@base.section
class RunConfig(base.Settings):
  """Everything one run of `main.py` needs. Sections a mode lacks are None."""

  mode: str = 'pretrain'
  seed: int = 0
  steps: int = 1000
  model: training.ModelConfig | None = None
  mesh: training.MeshConfig | None = None
  optim: training.OptimConfig | None = None
  loss: training.LossConfig | None = None
  data: training.DataConfig | None = None
  checkpoint: training.CheckpointConfig | None = None
  log: training.LogConfig | None = None
  guard: training.GuardConfig | None = None
  tasks: acting.TasksConfig | None = None
  prompt: acting.PromptConfig | None = None
  agent: acting.AgentConfig | None = None
  engine: acting.EngineConfig | None = None
  forge: acting.ForgeConfig | None = None
  eval: acting.EvalConfig | None = None
  evolve: acting.EvolveConfig | None = None
  convert: acting.ConvertConfig | None = None
  serve: acting.ServeConfig | None = None
  stages: acting.StagesConfig | None = None
  plan: acting.PlanConfig | None = None

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
    hints = typing.get_type_hints(cls)
    needed = {'mode', 'seed', 'steps', *MODES[mode]}
    # A plan is laid over the config of another mode, which may carry it.
    known = set(hints) if mode == 'plan' else {*needed, 'plan'}
    for name in sorted(needed - set(tree)):
      errors.append(f'{name}: missing; mode {mode!r} needs it')
    for name in sorted(set(tree) - known):
      errors.append(f'{name}: unknown key for mode {mode!r}')
    kwargs = {}
    for name in known & set(tree):
      kwargs[name] = _freeze(hints[name], tree[name], name, errors)
    if not errors:
      run = cls(**kwargs)
      run._check(errors)
    if errors:
      raise ValueError('config: ' + '; '.join(errors))
    base.Settings.READS.clear()  # checking is not using
    return run

  def _check(self, errors: list[str]) -> None:
    for field in dataclasses.fields(self):
      value = object.__getattribute__(self, field.name)
      if isinstance(value, base.Settings):
        try:
          value._check()
        except ValueError as error:
          errors.append(str(error))
    if self.steps <= 0:
      errors.append(f'steps={self.steps} must be positive')
    if not 0 <= self.seed < 2**31:  # jax.random.key takes 32 bits
      errors.append(f'seed={self.seed} is not in [0, 2**31)')
    if errors:
      return
    if self.data and self.optim and self.data.batch % self.optim.accumulate:
      errors.append(
        f'data.batch={self.data.batch} is not a multiple of '
        f'optim.accumulate={self.optim.accumulate}'
      )
    if self.mesh and self.engine and self.mesh.context != 1:
      errors.append(
        f'mesh.context={self.mesh.context}: mode {self.mode!r} generates, with '
        'whole rows in the key-value cache; set mesh.context=1'
      )
    if self.loss and self.loss.mtp > 0 and self.model.mtp_modules == 0:
      errors.append(
        f'loss.mtp={self.loss.mtp} needs model.mtp_modules >= 1; it is 0'
      )
    rounds = self.loss and self.loss.round_tokens
    if rounds and self.model.min_k != self.model.top_k:
      errors.append(
        f'loss.round_tokens={self.loss.round_tokens} is for a fixed number of '
        f'experts a token: set model.min_k={self.model.min_k} to model.top_k='
        f'{self.model.top_k}, or round_tokens to 0'
      )
    mtp = self.loss.mtp if self.loss else 0
    if self.optim and self.optim.train_only == 'mtp' and not mtp:
      errors.append('optim.train_only=mtp needs loss.mtp > 0')
    if self.model and self.model.fp8_experts and self.optim:
      errors.append(
        f'model.fp8_experts=True: experts in FP8 have no gradient, and mode '
        f'{self.mode!r} trains; set it to False (engine.fp8 is for generation)'
      )
    train = self.mode == 'plan' and 'train' in self.plan.programs
    if train and not self.data:
      errors.append(
        'plan.programs has train, and this config has no data section: leave '
        'it out, such as plan.programs=rl,decode,prefill,sync'
      )
    if self.mode == 'plan' and self.model.expert_strategy == 'direct':
      errors.append(
        'model.expert_strategy=direct is for GPUs and plans are of TPUs: set '
        'it to auto'
      )
    if self.engine and self.engine.fp8:
      try:
        dataclasses.replace(self.model, fp8_experts=True)._check()
      except ValueError as error:
        errors.append(f'engine.fp8: {error}')
    if self.agent and self.agent.max_new >= self.engine.length:
      errors.append(
        f'agent.max_new={self.agent.max_new} leaves no room for a prompt in '
        f'engine.length={self.engine.length}'
      )


def _freeze(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
  """Checks `value` against a field's type; appends what is wrong."""
  if isinstance(hint, types.UnionType):
    hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
  if isinstance(hint, type) and issubclass(hint, base.Settings):
    if not isinstance(value, dict):
      errors.append(f'{path}={value!r}: expected a section of settings')
      return None
    return _freeze_section(hint, value, path, errors)
  if typing.get_origin(hint) is tuple:
    return _freeze_weights(value, path, errors)
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is float and not math.isfinite(value):
    errors.append(f'{path}={value}: expected a finite number')
  if type(value) is int and value >= 2**31:  # devices count in 32 bits
    errors.append(f'{path}={value}: the largest is {2**31 - 1}')
  if type(value) is not hint:
    errors.append(
      f'{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}'
    )
  return value


def _freeze_section(
  cls: type, tree: dict, path: str, errors: list[str]
) -> base.Settings | None:
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
  if isinstance(value, tuple):  # as in a section that is frozen already
    value = dict(value)
  if not isinstance(value, dict):
    errors.append(f'{path}={value!r}: expected names with their weights')
    return ()
  frozen = []
  for name, weight in value.items():
    if type(weight) not in (int, float) or not math.isfinite(weight):
      errors.append(f'{path}.{name}={weight!r}: expected a finite number')
      continue
    frozen.append((name, float(weight)))
  return tuple(sorted(frozen))


def to_config(settings: base.Settings) -> ml_collections.ConfigDict:
  """The ConfigDict that `RunConfig.from_config` would freeze to `settings`."""
  tree = ml_collections.ConfigDict()
  for field in dataclasses.fields(settings):
    value = object.__getattribute__(settings, field.name)
    if value is None:
      continue
    if isinstance(value, base.Settings):
      value = to_config(value)
    elif field.name == 'skills':
      value = ml_collections.ConfigDict(dict(value))
    tree[field.name] = value
  return tree


def unread(settings: base.Settings) -> list[str]:
  """Paths of the leaves of `settings` that no code has read so far.

  A run and the plan of it read each other's sections to no end.
  """
  if isinstance(settings, RunConfig) and settings.mode == 'plan':
    return []
  paths = []
  for field in dataclasses.fields(settings):
    if field.name == 'plan':
      continue
    value = object.__getattribute__(settings, field.name)
    if isinstance(value, base.Settings):
      paths += [f'{field.name}.{path}' for path in unread(value)]
    elif value is not None:
      if (type(settings).__name__, field.name) not in base.Settings.READS:
        paths.append(field.name)
  return paths
