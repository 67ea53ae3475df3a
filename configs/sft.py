"""Supervised fine-tuning on task demonstrations: how a model learns to act.

    python main.py --config=configs/sft.py:tiny --config.steps=200

trains the small model from random weights on demonstrations of the SQL tasks;
the cross-entropy of its own words falls to about 1.2 in 200 steps. A real run
starts from weights:

    python main.py --config=configs/sft.py --config.checkpoint.init_from=DIR

where DIR is a workdir or a Hugging Face directory. Words and leaves are those
of configs/m2.py.
"""

import ml_collections

from configs import common, m2
from m2 import config as settings


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of a fine-tuning run; see the module's docstring."""
  words, leaves = common.parse_arg(arg, m2.WORDS)
  config = m2.get_config(','.join(words))
  config.mode = 'sft'
  config.steps = 2000
  config.optim.lr = 2e-5
  config.optim.warmup = 50
  config.data.source = 'tasks'
  config.data.path = ''
  if 'tiny' in words:
    config.steps = 300
    config.optim.lr = 3e-3
    config.optim.warmup = 20
  config.tasks = settings.to_config(
    settings.TasksConfig(skills=common.CURRICULUM)
  )
  config.prompt = settings.to_config(settings.PromptConfig())
  return common.set_leaves(config, leaves)
