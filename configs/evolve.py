"""One round of self-evolution on a trained checkpoint.

    python main.py --config=configs/evolve.py \
      --config.checkpoint.init_from=runs/quickstart/rl --workdir=runs/evolve

finds the weakest skill of the checkpoint on DEV, moves half of the training
mixture to it, fine-tunes, and fine-tunes a control as long on the mixture as
it was. Prints the verdict of the gate with its reasons; `adopted.json` points
at the checkpoint in force, `ledger.jsonl` holds every step. The settings are
those of configs/quickstart.py, whose model the checkpoint must have.
"""

import ml_collections

from configs import common, quickstart
from m2 import config as settings


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of one round; see the module's docstring."""
  _, leaves = common.parse_arg(arg)
  config = quickstart.get_config()
  config.mode = 'evolve'
  config.steps = config.stages.evolve_steps
  config.optim.lr = config.stages.evolve_lr
  config.optim.warmup = config.steps // 10
  for name in set(settings.MODES['quickstart']) - set(settings.MODES['evolve']):
    del config[name]
  return common.set_leaves(config, leaves)
