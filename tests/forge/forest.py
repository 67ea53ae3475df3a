"""Random rows with shared prefixes, for the tests of trees and steps."""

import dataclasses

import numpy as np

from m2 import config
from m2.forge import tree

MODEL = config.ModelConfig(
  vocab=64,
  d_model=24,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=8,
  rotary_dim=4,
  max_positions=256,
  experts=8,
  d_expert=16,
  top_k=2,
  min_k=2,
  dtype='float32',
  init_std=0.2,
)


def run_config(**forge) -> config.RunConfig:
  return config.RunConfig(
    mode='rl',
    optim=config.OptimConfig(bias_rate=0.0),
    forge=config.ForgeConfig(**({'lines': 1, 'row_tokens': 96} | forge)),
  )


def row(context, response, draw, **kwargs) -> tree.Row:
  """A row with random behaviour log-probabilities and advantage."""
  return tree.Row(
    ids=np.concatenate([context, response]).astype(np.int32),
    start=len(context),
    old_logp=-3 + draw.normal(size=len(response)).astype(np.float32),
    advantage=float(draw.normal()),
    **kwargs,
  )


def figure_6(seed=0) -> list[tree.Row]:
  """Rows (C, s1), (C, s2), (C, s2, s3): s2 is response and then context."""
  draw = np.random.default_rng(seed)
  c, s1, s2, s3 = (draw.integers(0, MODEL.vocab, n) for n in (7, 5, 4, 6))
  return [
    row(c, s1, draw),
    row(c, s2, draw),
    row(np.concatenate([c, s2]), s3, draw),
  ]


def rollouts(seed, groups=3, members=4, turns=2) -> list[tree.Row]:
  """Episodes of several turns over shared prompts, in random order."""
  draw = np.random.default_rng(seed)
  system = draw.integers(0, MODEL.vocab, 5)
  rows = []
  for _ in range(groups):
    size = draw.integers(2, 9)
    prompt = np.append(system, draw.integers(0, MODEL.vocab, size))
    for _ in range(members):
      context = prompt
      for _ in range(draw.integers(1, turns + 1)):
        # Few different tokens: responses share prefixes too.
        response = draw.integers(0, 3, draw.integers(1, 8))
        rows.append(row(context, response, draw))
        observed = draw.integers(0, MODEL.vocab, draw.integers(0, 5))
        context = np.concatenate([context, response, observed])
  draw.shuffle(rows)
  return rows


def with_routes(rows, seed=0) -> list[tree.Row]:
  """The same rows with routes that are a function of the prefix, mostly."""
  draw = np.random.default_rng(seed)
  known = {}
  out = []
  for item in rows:
    routes = []
    for size in range(1, len(item.ids)):
      key = item.ids[:size].tobytes(), bool(draw.random() < 0.05)
      if key not in known:
        known[key] = np.stack(
          [
            draw.choice(MODEL.experts, MODEL.top_k, replace=False)
            for _ in range(MODEL.layers)
          ]
        )
      routes.append(known[key])
    experts = np.asarray(routes, np.int32)
    out.append(dataclasses.replace(item, experts=experts))
  return out
