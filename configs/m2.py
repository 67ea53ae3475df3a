"""Pretraining of MiniMax-M2: the full 228.7B model, or the same in small.

    python main.py --config=configs/m2.py:tiny --config.steps=50

trains the small one on a laptop's CPU, on the sources of Python's own standard
library: the loss falls from about 6.9 (all of 1024 tokens alike) below 6 in 50
steps, in a minute or two, most of which is compilation. `configs/m2.py` alone
is the published shape on 512 devices of 95 GB. Words, which combine:

    tiny   every dimension shrunk, ratios kept
    e64    64 experts, of which each token uses 2 to 4: the third and fourth
           only with at least a fifth of the weight

`configs/m2.py:e64,tiny,steps=20` sets leaves, too.
"""

import ml_collections

from configs import common
from m2 import config as settings

WORDS = ('tiny', 'e64')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of a pretraining run; see the module's docstring."""
  words, leaves = common.parse_arg(arg, WORDS)
  config = settings.to_config(
    settings.RunConfig(
      mode='pretrain',
      steps=500_000,
      model=settings.ModelConfig(),
      mesh=settings.MeshConfig(data=-1, fsdp=8, expert=64),
      optim=settings.OptimConfig(warmup=2000),
      loss=settings.LossConfig(balance=1e-4),
      data=settings.DataConfig(batch=512, length=4096, shards=128),
      checkpoint=settings.CheckpointConfig(),
      log=settings.LogConfig(),
      guard=settings.GuardConfig(),
      plan=settings.PlanConfig(),
    )
  )
  config.model.min_k = 0  # follows top_k where that is set
  if 'e64' in words:
    config.model.experts = 64
    config.model.top_k = 4
    config.model.min_k = 2
    config.model.min_share = 0.2
  if 'tiny' in words:
    _shrink(config)
  return common.set_leaves(config, leaves)


def _shrink(config: ml_collections.ConfigDict) -> None:
  """A model of a few million parameters, and a run of minutes on two cores."""
  fixed = not config.model.min_k
  config.model.update(
    vocab=1024,
    d_model=96,
    layers=4,
    heads=12,  # six for each key-value head, twice d_model together
    kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    max_positions=2048,
    experts=config.model.experts // 4,
    d_expert=48,
    dtype='float32',
    remat='none',
  )
  if fixed:  # where the number varies, its range is what e64 is about
    config.model.top_k = 2
  config.steps = 300
  config.mesh.update(fsdp=1, expert=1)
  config.optim.update(lr=3e-3, warmup=20)
  config.data.update(batch=8, length=256, shards=1)
  config.checkpoint.every = 100
