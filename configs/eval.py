"""Evaluation: a checkpoint plays sealed tasks; rates with n and intervals.

    python main.py --config=configs/eval.py:tiny --workdir=runs/eval \
      --config.checkpoint.init_from=runs/rl

plays 300 tasks of DEV and prints a line for each skill; `eval.json` holds every
episode, with the transcripts of all failures. --config.eval.split=test opens
the sealed split: do that once. Words are those of configs/m2.py.
"""

import ml_collections

from configs import common, m2, rl
from m2 import config as settings


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of an evaluation; see the module's docstring."""
  words, leaves = common.parse_arg(arg, m2.WORDS)
  config = rl.get_config(','.join(words))
  config.mode = 'eval'
  for name in set(settings.MODES['rl']) - set(settings.MODES['eval']):
    del config[name]
  config.eval = settings.to_config(settings.EvalConfig())
  return common.set_leaves(config, leaves)
