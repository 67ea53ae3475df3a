"""What a program computes, from its settings: FLOPs of one token."""

import dataclasses

from m2 import config


@dataclasses.dataclass(frozen=True)
class Flops:
  """Multiply-adds times two, of one token.

  Attributes:
    useful: of the model, each product once (and twice backward in training),
      attention over the keys that are visible on average.
    done: recomputation included.
    passes: the same in passes of the bfloat16 units; a float32 product at the
      highest precision is six.
  """

  useful: float
  done: float
  passes: float


# Passes of a float32 product at Precision.HIGHEST on bfloat16 units.
HIGHEST = 6


def per_token(
  cfg: config.ModelConfig,
  keys: int,
  *,
  training: bool,
  logits: float = 1.0,
  modules: int = 0,
) -> Flops:
  """FLOPs of one token.

  Args:
    cfg: model shape.
    keys: keys that the attention of a query goes over, visible or not.
    training: forward, backward and what is recomputed; else forward alone.
      Rows are causal then, and half of the keys are seen.
    logits: share of tokens whose logits are computed.
    modules: of multi-token prediction that the program has: each is a layer,
      its projection of two hidden states, and the head.
  """
  d = cfg.d_model
  heads = 2 * cfg.heads + 2 * cfg.kv_heads
  matrices = 2 * d * heads * cfg.head_dim
  matrices += 2 * 3 * cfg.top_k * d * cfg.d_expert
  router = 2 * d * cfg.experts
  seen = 0.5 if training else 1.0
  scores = 4 * cfg.heads * cfg.head_dim * keys
  table = 2 * d * cfg.vocab * logits * (1 + modules)
  layers, joins = cfg.layers + modules, modules * 2 * 2 * d * d
  again = training and cfg.remat != 'none'
  each = 3 + again if training else 1
  # Two products forward, and backward three for queries and four for keys;
  # where the output is not kept, two more. Of long rows, only blocks in which a
  # key is seen.
  blocks = (5.5 if cfg.remat == 'full' else 4.5) if training else 1
  heads = 4 if training else 1
  useful = (3 if training else 1) * (
    layers * (matrices + router + scores * seen) + joins + table
  )
  lean = layers * (each * matrices + blocks * scores * seen) + each * joins
  wide = layers * each * router + heads * table
  return Flops(useful, lean + wide, lean + HIGHEST * wide)
