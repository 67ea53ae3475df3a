"""Time of one training step on the device at hand.

    python -m tests.bench.step_time [--config=configs/m2.py:tiny] [--steps=30]

Without --config: the quickstart's model and `m2.py:tiny`. Rows are random
tokens of the config's batch and length, already on the device, so this is the
step alone; the data pipeline has its own figures. Each step is timed by
waiting for its loss; the first ones, which compile, are not counted.
"""

import argparse
import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np

from m2 import config as m2_config
from m2.evolve import provenance
from m2.model import params
from m2.parallel import mesh as mesh_lib
from m2.parallel import sharding
from m2.train import optim, step
from m2.train import state as train_state
from tests.bench import configs, record

DEFAULT = ('configs/quickstart.py', 'configs/m2.py:tiny')
WARMUP = 3


def device_name() -> str:
  """What the numbers belong to: the accelerator, or the processor on CPU."""
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return provenance.environment()['processor']
  return device.device_kind


def random_batch(
  cfg: m2_config.RunConfig, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Full rows of random tokens, placed as the pipeline would place them."""
  shape = cfg.data.batch, cfg.data.length
  tokens = np.random.default_rng(0).integers(0, cfg.model.vocab, shape)
  rows = {
    'tokens': tokens.astype(np.int32),
    'targets': np.roll(tokens, -1, 1).astype(np.int32),
    'positions': np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    'until': np.full(shape, shape[1], np.int32),
    'weights': np.ones(shape, np.float32),
  }
  where = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(sharding.RULES['batch'])
  )
  return {name: jax.device_put(x_BT, where) for name, x_BT in rows.items()}


def measure(name: str, steps: int) -> dict[str, Any]:
  """Times `steps` training steps of the config called `name`.

  Returns:
    The config's name and sizes, seconds a step, and tokens a second at the
    median.
  """
  cfg = configs.load(name)
  mesh = mesh_lib.make_mesh(cfg.mesh)
  optimizer = optim.make(cfg.optim, cfg.steps)
  step_fn = functools.partial(
    step.train_step, model=cfg.model, optimizer=optimizer, cfg=cfg
  )
  seconds = []
  with jax.set_mesh(mesh):
    key = jax.random.key(cfg.seed)
    state = train_state.create(cfg.model, key, mesh, optimizer)
    batch = random_batch(cfg, mesh)
    compiled = jax.jit(step_fn, donate_argnums=0).lower(state, batch).compile()
    for index in range(WARMUP + steps):
      start = time.perf_counter()
      state, metrics = compiled(state, batch)
      loss = float(metrics['loss'])
      if index >= WARMUP:
        seconds.append(time.perf_counter() - start)
  if not np.isfinite(loss):
    raise RuntimeError(f'{name}: the loss became {loss}; not a valid run')
  times = record.summary(seconds)
  tokens = cfg.data.batch * cfg.data.length
  return {
    'config': name,
    'parameters': params.count(cfg.model),
    'tokens_per_step': tokens,
    'devices': mesh.size,
    'seconds': times,
    'tokens_per_second': tokens / times['median'],
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', action='append')
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--out', type=pathlib.Path, default=record.RESULTS)
  flags = parser.parse_args()
  rows = [measure(name, flags.steps) for name in flags.config or DEFAULT]
  for row in rows:
    print(
      f'{row["config"]:<24} {row["parameters"]:>12,} parameters  '
      f'{1e3 * row["seconds"]["median"]:9.2f} ms a step '
      f'(n={row["seconds"]["n"]})  {row["tokens_per_second"]:>12,.0f} tokens/s'
    )
  print(
    record.write(
      'step_time',
      device_name(),
      rows,
      command=record.command('step_time'),
      folder=flags.out,
    )
  )


if __name__ == '__main__':
  main()
