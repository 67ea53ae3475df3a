"""Compiles one train step for a TPU that is not here; prints what it takes.

Run by `train_step_test.py` in a process of its own, because the TPU compiler
(libtpu) must be on the path before jax starts:

    PYTHONPATH=.tpu python -m tests.tpu.train_step TOPOLOGY AXIS=SIZE...

Nothing is executed and nothing allocated: shapes go in, and one line of JSON
comes out with the number of chips, bytes per chip and the collectives.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from m2 import config
from m2.parallel import mesh as mesh_lib
from m2.parallel import sharding
from m2.train import optim, step
from m2.train import state as train_state

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
# M2's ratios (48 heads on 8, half of each head rotated), at a width that
# fills a TPU's lanes.
MODEL = config.ModelConfig(
  vocab=2048,
  d_model=512,
  layers=4,
  heads=12,
  kv_heads=2,
  head_dim=64,
  rotary_dim=32,
  max_positions=1024,
  experts=16,
  d_expert=256,
  top_k=4,
  min_k=4,
)
BATCH, LENGTH = 8, 128


def main(topology: str, sizes: dict[str, int]) -> None:
  chips = topologies.get_topology_desc(
    platform='tpu',
    topology_name=topology,
    num_slices=sizes.get('slices', 1),
  )
  mesh = mesh_lib.make_mesh(config.MeshConfig(**sizes), chips.devices)
  cfg = config.RunConfig(
    model=MODEL,
    optim=config.OptimConfig(),
    loss=config.LossConfig(),
    log=config.LogConfig(),
    guard=config.GuardConfig(),
  )
  optimizer = optim.make(cfg.optim, cfg.steps)
  state = train_state.abstract(MODEL, mesh, optimizer)
  rows = sharding.batch_sharding(mesh)
  dtypes = dict.fromkeys(('tokens', 'targets', 'positions', 'until'), jnp.int32)
  batch = {
    name: jax.ShapeDtypeStruct((BATCH, LENGTH), dtype, sharding=rows)
    for name, dtype in {**dtypes, 'weights': jnp.float32}.items()
  }
  step_fn = functools.partial(
    step.train_step, model=MODEL, optimizer=optimizer, cfg=cfg
  )
  with jax.set_mesh(mesh):
    lowered = jax.jit(step_fn, donate_argnums=0).lower(state, batch)
    compiled = lowered.compile()
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  print(
    json.dumps(
      {
        'device': chips.devices[0].device_kind,
        'chips': mesh.size,
        'slices_of_data': [_slices(block) for block in mesh.devices],
        'argument_bytes': memory.argument_size_in_bytes,
        'alias_bytes': memory.alias_size_in_bytes,
        'peak_bytes': memory.peak_memory_in_bytes,
        'collectives': {
          name: len(re.findall(rf' {name}(?:-start)?\(', text))
          for name in COLLECTIVES
        },
      }
    )
  )


def _slices(devices: np.ndarray) -> list[int]:
  return sorted({getattr(x, 'slice_index', 0) for x in devices.flat})


if __name__ == '__main__':
  pairs = (argument.split('=') for argument in sys.argv[2:])
  main(sys.argv[1], {axis: int(size) for axis, size in pairs})
