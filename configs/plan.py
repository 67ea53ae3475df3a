"""What the full model takes on TPUs that are not here: RL, serving, training.

    python main.py --config=configs/plan.py --config.plan.topology=v5p:8x8x8
    python main.py --config=configs/plan.py --config.plan.topology=v6e:4x4 \
      --config.plan.programs=decode,prefill --config.engine.fp8=True \
      --config.engine.slots=32 --config.engine.prompts=8 \
      --config.plan.rollout_expert=4 --config.plan.rollout_tensor=4

compiles the programs of configs/m2.py and configs/rl.py for the topology with
its own compiler and prints what each device holds, sends and could at best do;
a minute or more a program, 3 GB, no TPU. A config of training or RL is planned
in place, into a folder of its own:
`--config=configs/m2.py --config.mode=plan`. launch/README.md has the results
for some pods. Needs libtpu: `bash tests/run.sh --all` gets it, or
`pip install --no-deps --target .tpu -r tests/tpu_requirements.txt`.
Words are those of configs/m2.py.
"""

import ml_collections

from configs import common, m2
from m2 import config as settings


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of a plan; see the module's docstring."""
  words, leaves = common.parse_arg(arg, m2.WORDS)
  config = m2.get_config(','.join(words))
  config.mode = 'plan'
  config.engine = settings.to_config(
    settings.EngineConfig(slots=512, length=16_384)
  )
  config.forge = settings.to_config(
    settings.ForgeConfig(row_tokens=16_384, lines=512)
  )
  del config.checkpoint
  del config.log
  return common.set_leaves(config, leaves)
