"""The smallest model that has every part, for the tests of m2/model."""

import functools
from typing import Any

import jax

from m2 import config
from m2.model import params, transformer

TINY = config.ModelConfig(
  vocab=64,
  d_model=24,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  rotary_dim=4,
  experts=8,
  d_expert=16,
  top_k=2,
  min_k=2,
  dtype='float32',
)

# One program for all calls with equal shapes; the configuration is static.
forward = jax.jit(transformer.forward, static_argnums=0)
logits = jax.jit(transformer.logits, static_argnums=0)


@functools.cache
def weights(cfg: config.ModelConfig = TINY) -> Any:
  """Random parameters, on the host, where no test can write to them."""
  return jax.device_get(params.init(cfg, jax.random.key(0)))
