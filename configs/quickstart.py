"""The whole loop on a laptop: SFT, agentic RL, self-evolution, sealed test.

    bash launch/quickstart.sh

or, in an environment that is set up,

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

A mixture-of-experts model of M2's shape and half a million parameters learns
to migrate SQL schemas: from demonstrations, then by reinforcement learning on
what its own statements do to a database, then by a round in which the loop
finds the weakest skill and tries to mend it. Ends within 15 minutes on two
cores with a table of the sealed TEST, results.json and report.html: success
rises from sft to rl, and the round's verdict stands beside its control arm.
`configs/quickstart.py:seed=1`, or any leaf so, is another run.
"""

import ml_collections

from configs import common
from m2 import config as settings

# The curriculum: every skill of the family that is not held out, alike.
SKILLS = (
  'add_col',
  'add_col_default_notnull',
  'rename_col',
  'rename_table',
  'drop_col',
  'create_index',
  'drop_index',
  'backfill_expr',
  'retype_rebuild',
  'split_table',
  'merge_tables',
  'add_fk_rebuild',
  'unique_dedup',
  'two_step',
)
LENGTH = 512  # tokens of a training row, of an episode, of a cache slot


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of the whole loop; see the module's docstring."""
  _, leaves = common.parse_arg(arg)
  config = settings.to_config(
    settings.RunConfig(
      mode='quickstart',
      steps=450,  # of SFT
      model=model(),
      mesh=settings.MeshConfig(),
      optim=settings.OptimConfig(
        lr=3e-3,
        warmup=40,
        bias_rate=1e-2,  # balance within the few hundred steps there are
      ),
      loss=settings.LossConfig(),
      data=settings.DataConfig(source='tasks', batch=16, length=LENGTH),
      checkpoint=settings.CheckpointConfig(every=100, keep=1),
      log=settings.LogConfig(introspect=25),
      tasks=settings.TasksConfig(
        skills=tuple((skill, 1.0) for skill in SKILLS),
        difficulty_max=1,
      ),
      prompt=settings.PromptConfig(
        tools=False,  # the prompt is a third as long without
      ),
      agent=settings.AgentConfig(max_new=96),
      engine=settings.EngineConfig(slots=128, length=LENGTH),
      forge=settings.ForgeConfig(
        groups=16, group_size=8, in_flight=16, row_tokens=LENGTH
      ),
      evolve=settings.EvolveConfig(dev_tasks=420, gate_tasks=600),
      stages=settings.StagesConfig(
        rl_steps=60,
        rl_lr=3e-4,
        evolve_steps=120,
        evolve_lr=1e-3,
        test_tasks=560,
      ),
    )
  )
  return common.set_leaves(config, leaves)


def model() -> settings.ModelConfig:
  """M2 in small: 12 query heads on 2, 2 of 16 experts, QK-norm, half RoPE."""
  return settings.ModelConfig(
    vocab=1024,
    d_model=96,
    layers=3,
    heads=12,
    kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    max_positions=LENGTH,
    experts=16,
    d_expert=64,
    top_k=2,
    min_k=2,
    dtype='float32',
    remat='none',
  )
