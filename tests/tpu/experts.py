"""Compiles the expert layer over TPUs that are not here; prints what it takes.

Run by `experts_test.py` in a process of its own, because the TPU compiler
(libtpu) must be on the path before jax starts:

    PYTHONPATH=.tpu python -m tests.tpu.experts TOPOLOGY STRATEGY CHUNKS

All chips are on the `expert` axis. Nothing is executed: shapes go in, and one
line of JSON comes out, with bytes per chip and how often each collective is in
the program, forward and backward.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from m2 import config
from m2.parallel import experts, sharding
from m2.parallel import mesh as meshes

COLLECTIVES = 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all'
TOKENS, WIDTH, HIDDEN, TOP_K, EXPERTS = 1024, 512, 256, 8, 4  # of a chip


def main(topology: str, strategy: str, chunks: int) -> None:
  chips = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  ways = len(chips.devices)
  mesh = meshes.make_mesh(config.MeshConfig(data=1, expert=ways), chips.devices)

  def array(*shape, axes, dtype=jnp.bfloat16):
    where = jax.NamedSharding(mesh, sharding.spec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  def layer(x, index, weight, wi_0, wi_1, wo, dy):
    y, pull = jax.vjp(
      lambda x, weight, *ws: experts.expert_parallel(
        x, (index, weight), *ws, strategy=strategy, chunks=chunks
      ),
      x,
      weight,
      wi_0,
      wi_1,
      wo,
    )
    return y, *pull(dy)

  rows = 'batch', 'sequence', None
  x = array(ways, TOKENS, WIDTH, axes=rows)
  wi = array(ways * EXPERTS, WIDTH, HIDDEN, axes=('expert', None, 'ffn'))
  wo = array(ways * EXPERTS, HIDDEN, WIDTH, axes=('expert', 'ffn', None))
  index = array(ways, TOKENS, TOP_K, axes=rows, dtype=jnp.int32)
  weight = array(ways, TOKENS, TOP_K, axes=rows, dtype=jnp.float32)
  with jax.set_mesh(mesh):
    lowered = jax.jit(layer).lower(x, index, weight, wi, wi, wo, x)
    compiled = lowered.compile()
  text = compiled.as_text()
  found = {
    name: len(re.findall(rf'= .*? {name}(?:-start)?\(', text))
    for name in COLLECTIVES
  }
  memory = compiled.memory_analysis().peak_memory_in_bytes
  print(json.dumps({'chips': ways, 'collectives': found, 'bytes': memory}))


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
