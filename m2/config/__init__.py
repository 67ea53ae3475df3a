"""Settings: ConfigDicts stop here and become frozen, hashable dataclasses.

`configs/*.py` build ConfigDicts; `RunConfig.from_config` freezes one, once, at
the door. It names every unknown key, wrong type and impossible combination
before anything is compiled. A section that a mode does not use is absent from
its config and `None` here, so no setting can be set and then ignored.
"""

from m2.config.acting import (
  AgentConfig,
  ConvertConfig,
  EngineConfig,
  EvalConfig,
  EvolveConfig,
  ForgeConfig,
  PlanConfig,
  PromptConfig,
  ServeConfig,
  StagesConfig,
  TasksConfig,
)
from m2.config.base import Settings, check, replace
from m2.config.run import MODES, RunConfig, to_config, unread
from m2.config.training import (
  CheckpointConfig,
  DataConfig,
  GuardConfig,
  LogConfig,
  LossConfig,
  MeshConfig,
  ModelConfig,
  OptimConfig,
)

__all__ = [
  'AgentConfig',
  'CheckpointConfig',
  'ConvertConfig',
  'DataConfig',
  'EngineConfig',
  'EvalConfig',
  'EvolveConfig',
  'ForgeConfig',
  'GuardConfig',
  'LogConfig',
  'LossConfig',
  'MODES',
  'MeshConfig',
  'ModelConfig',
  'OptimConfig',
  'PlanConfig',
  'PromptConfig',
  'RunConfig',
  'ServeConfig',
  'Settings',
  'StagesConfig',
  'TasksConfig',
  'check',
  'replace',
  'to_config',
  'unread',
]
