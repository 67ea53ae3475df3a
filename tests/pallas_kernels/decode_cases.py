"""Experts of a few tokens to try kernels on, and what must come out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode import ref
from pallas_kernels.decode.weights import BLOCK, Quantized

TOLERANCE = 5e-3  # in norm: activation, outputs and sum are rounded once each


@dataclasses.dataclass(frozen=True)
class Shape:
  """How many experts there are and how wide they are."""

  experts: int
  width: int
  hidden: int


@functools.partial(jax.jit, static_argnums=(1, 2))
def matrices(key: jax.Array, shape: Shape, quantised: bool):
  """Gate, up and down at random."""

  def make(key, depth, columns):
    sizes = shape.experts, columns, depth
    if not quantised:
      w = jax.random.normal(key, (shape.experts, depth, columns), jnp.bfloat16)
      return w * jnp.bfloat16(depth**-0.5)
    keys = jax.random.split(key)
    # Every code there is, the two that are not numbers left out.
    bits = jax.random.bits(keys[0], sizes, jnp.uint8)
    bits = jnp.where(bits & 127 == 127, bits - 1, bits)
    blocks = shape.experts, columns // BLOCK, depth // BLOCK
    scale = jax.random.uniform(keys[1], blocks, minval=0.5, maxval=2)
    codes = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
    return Quantized(codes, scale * depth**-0.5 / 100)

  keys = jax.random.split(key, 3)
  wide, hidden = shape.width, shape.hidden
  return (
    make(keys[0], wide, hidden),
    make(keys[1], wide, hidden),
    make(keys[2], hidden, wide),
  )


def tokens(seed: int, index_MX: np.ndarray, width: int):
  """Random tokens for these choices, and what each choice counts."""
  rng = np.random.default_rng(seed)
  x_MD = jnp.asarray(rng.standard_normal((len(index_MX), width)), jnp.bfloat16)
  weight_MX = jnp.asarray(rng.uniform(size=index_MX.shape), jnp.float32)
  return x_MD, jnp.asarray(index_MX, jnp.int32), weight_MX


def choices(seed: int, count: int, top: int, experts: int) -> np.ndarray:
  """Each token's experts, evenly at random, none twice."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.permutation(experts)[:top] for _ in range(count)])


EXPECTED = jax.jit(ref.decode_experts)


def error(got: jax.Array, want: jax.Array) -> float:
  """Distance in norm; infinite if a number is none or a zero is not zero."""
  got, want = np.float64(got), np.float64(want)
  if got.shape != want.shape or not np.isfinite(got).all():
    return np.inf
  if got[~want.any(1)].any():
    return np.inf
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-9)
