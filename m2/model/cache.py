"""The key-value cache of generation: one dense array a tensor, all layers."""

import flax.struct
import jax
import jax.numpy as jnp

from m2 import config
from m2.parallel import sharding


@flax.struct.dataclass
class KVCache:
  """Keys and values of every token so far.

  Attributes:
    k_LBSKH: keys, after normalisation and rotation.
    v_LBSKH: values.
    until_BS: int32, first index that can no longer see each entry; 0 = empty.
    filled_B: int32, entries used in each row.
  """

  k_LBSKH: jax.Array
  v_LBSKH: jax.Array
  until_BS: jax.Array
  filled_B: jax.Array


def empty(cfg: config.ModelConfig, batch: int, length: int) -> KVCache:
  """A cache of `length` entries for `batch` rows, in the compute dtype."""
  shape = (cfg.layers, batch, length, cfg.kv_heads, cfg.head_dim)
  axes = (None, 'batch', None, 'kv_heads', None)
  zeros = sharding.place(jnp.zeros(shape, cfg.dtype), *axes)
  return KVCache(
    k_LBSKH=zeros,
    v_LBSKH=sharding.place(jnp.zeros(shape, cfg.dtype), *axes),
    until_BS=sharding.place(jnp.zeros(shape[1:3], jnp.int32), 'batch', None),
    filled_B=sharding.place(jnp.zeros(batch, jnp.int32), 'batch'),
  )


def write(
  rows_BSC: jax.Array, new_BTC: jax.Array, filled_B: jax.Array
) -> jax.Array:
  """Writes T new entries of each row at `filled_B`; trailing dims are free."""
  spec = sharding.spec('batch', None, *_tail(rows_BSC))

  def local(rows, new, filled):
    batch_B1 = jnp.arange(new.shape[0])[:, None]
    index_BT = filled[:, None] + jnp.arange(new.shape[1])[None]
    return rows.at[batch_B1, index_BT].set(new, mode='drop')

  run = sharding.manual(local, (spec, spec, sharding.spec('batch')), spec)
  return run(rows_BSC, new_BTC.astype(rows_BSC.dtype), filled_B)


def write_layer(
  all_LBSKH: jax.Array,
  new_BTKH: jax.Array,
  filled_B: jax.Array,
  layer: jax.Array,
) -> jax.Array:
  """Writes one layer's new entries in place, at `filled_B` of each row."""
  spec = sharding.spec(None, 'batch', None, 'kv_heads', None)
  new_spec = sharding.spec('batch', None, 'kv_heads', None)

  def local(rows, new, filled, layer):
    batch_B1 = jnp.arange(new.shape[0])[:, None]
    index_BT = filled[:, None] + jnp.arange(new.shape[1])[None]
    return rows.at[layer, batch_B1, index_BT].set(new, mode='drop')

  run = sharding.manual(
    local,
    (spec, new_spec, sharding.spec('batch'), sharding.spec()),
    spec,
  )
  return run(all_LBSKH, new_BTKH.astype(all_LBSKH.dtype), filled_B, layer)


def _tail(rows_BSC: jax.Array) -> tuple[None, ...]:
  return (None,) * (rows_BSC.ndim - 2)
