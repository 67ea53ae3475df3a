"""Agentic RL on verified outcomes, from a model that SFT taught to act.

    python main.py --config=configs/sft.py:tiny --workdir=runs/sft
    python main.py --config=configs/rl.py:tiny --workdir=runs/rl \
      --config.checkpoint.init_from=runs/sft

plays 16 SQL tasks eight times a step and trains on what the statements did to
hidden databases; `reward` and `passed` of the progress line rise over a hundred
steps. `mismatch` stays below 1e-4 on CPU: the engine and the trainer agree.
Twice as many groups are in flight as a step trains on, so `age` is 0 and 1 in
turn, and `mismatch` is `-` where no sample is of the step's own weights;
--config.forge.in_flight=16 is on-policy. Words are those of configs/m2.py.
"""

import ml_collections

from configs import common, m2
from m2 import config as settings


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of an RL run; see the module's docstring."""
  words, leaves = common.parse_arg(arg, m2.WORDS)
  config = m2.get_config(','.join(words))
  config.mode = 'rl'
  config.steps = 1000
  # The router bias balances pretraining; here it stays as it is (report 2.2.1
  # keeps balancing small, and RL needs the routes that were sampled).
  config.optim.update(lr=1e-6, warmup=10, weight_decay=0.0, bias_rate=0.0)
  config.checkpoint.every = 20
  sections = {
    'tasks': settings.TasksConfig(skills=common.CURRICULUM),
    'prompt': settings.PromptConfig(),
    'agent': settings.AgentConfig(),
    'engine': settings.EngineConfig(slots=512, length=16_384),
    'forge': settings.ForgeConfig(row_tokens=16_384, lines=512),
  }
  if 'tiny' in words:
    config.steps = 100
    config.optim.lr = 3e-4
    sections['engine'] = settings.EngineConfig(slots=128, length=1024)
    sections['forge'] = settings.ForgeConfig(row_tokens=1024)
  for name in set(settings.MODES['pretrain']) - set(settings.MODES['rl']):
    del config[name]
  for name, section in sections.items():
    config[name] = settings.to_config(section)
  return common.set_leaves(config, leaves)
