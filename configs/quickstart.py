"""The whole loop on a laptop: SFT, agentic RL, self-evolution, sealed test.

    bash launch/quickstart.sh

or, in an environment that is set up,

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart

A mixture-of-experts model of M2's shape and 0.8 million parameters learns to
migrate SQL schemas: from demonstrations, then by reinforcement learning on
what its own statements do to a database, then by a round in which the loop
finds the weakest skill and tries to mend it. Ends within 15 minutes on two
cores with a table of the sealed TEST, results.json and report.html: success
rises from about 48% (sft) by 4 to 7 points (rl), and the round's verdict stands
beside its control arm. SFT is short, so that RL finds skills of middling
success; 500 steps of it alone reach some 70% of DEV.
`configs/quickstart.py:seed=1`, or any leaf so, is another run.
"""

import ml_collections

from configs import common
from m2 import config as settings

# Tokens of a training row, an episode, a cache slot and a line of RL rows: all
# demonstrations fit, with a mistake and its correction, too.
LENGTH = 256


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of the whole loop; see the module's docstring."""
  _, leaves = common.parse_arg(arg)
  config = settings.to_config(
    settings.RunConfig(
      mode='quickstart',
      steps=200,  # of SFT
      model=model(),
      mesh=settings.MeshConfig(),
      optim=settings.OptimConfig(
        name='muon',
        lr=3e-3,
        warmup=50,
        bias_rate=1e-2,  # balance within the few hundred steps there are
      ),
      loss=settings.LossConfig(),
      data=settings.DataConfig(source='tasks', batch=8, length=LENGTH),
      checkpoint=settings.CheckpointConfig(every=300, keep=1),
      log=settings.LogConfig(introspect=50),
      guard=settings.GuardConfig(),
      tasks=settings.TasksConfig(
        skills=common.CURRICULUM,
        difficulty_max=0,
        retry_demos=0.1,
      ),
      prompt=settings.PromptConfig(
        tools=False,  # the prompt is a third as long without
      ),
      agent=settings.AgentConfig(max_new=96),
      engine=settings.EngineConfig(slots=128, length=LENGTH),
      forge=settings.ForgeConfig(
        groups=16, group_size=8, in_flight=16, row_tokens=LENGTH
      ),
      evolve=settings.EvolveConfig(dev_tasks=210, gate_tasks=280),
      stages=settings.StagesConfig(
        rl_steps=50,
        rl_lr=3e-4,
        evolve_steps=100,
        evolve_lr=1e-3,
        test_tasks=700,
      ),
    )
  )
  return common.set_leaves(config, leaves)


def model() -> settings.ModelConfig:
  """M2 in small: 6 query heads on 2, 2 of 16 experts, QK-norm, half RoPE."""
  return settings.ModelConfig(
    vocab=768,
    d_model=96,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=32,
    rotary_dim=16,
    rope_theta=100.0,  # positions end at 256 here, not at 196,608
    max_positions=LENGTH,
    experts=16,
    d_expert=64,
    top_k=2,
    min_k=2,
    dtype='float32',
    remat='none',
  )
