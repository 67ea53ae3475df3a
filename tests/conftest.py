"""What every test runs under: eight CPU devices, strict shapes, a warm cache.

Imported by pytest before any test module, so the settings stand before the
first array exists. One process serves single- and multi-device tests alike.
"""

import gc
import os
import pathlib

import pytest
from absl import flags

from configs import common

# Compiled programs are kept and shared with the processes that tests start;
# `JAX_COMPILATION_CACHE_DIR= bash tests/run.sh` goes without.
for _name, _value in common.compilation_cache().items():
  os.environ.setdefault(_name, _value)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Two thirds of the time to compile; what is tested does not depend on it.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
# XLA's CPU threads wait inside a collective; with one thread a device, two
# collectives in flight block each other for good. This is their number.
os.environ.setdefault('NPROC', '64')

import jax  # noqa: E402  (reads the environment above when imported)

from m2 import config as m2_config  # noqa: E402

DEVICES = 8

jax.config.update('jax_num_cpu_devices', DEVICES)
jax.config.update('jax_numpy_rank_promotion', 'raise')
flags.FLAGS.mark_as_parsed()  # absltest's temporary folders read absl flags
# Tracing makes many small objects, and hardly a cycle: looking for cycles after
# every 700 of them, the default, is a twentieth of the run.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Files with heavy tests come first: none is left to one process alone."""
  long = 'heavy', 'exhaustive'
  heavy = {
    item.path for item in items if any(map(item.get_closest_marker, long))
  }
  items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  """Drops a file's programs at its end.

  Each maps memory a dozen times and more, and a process may do so 65,530 times:
  after that, compiling ends it with a segmentation fault.
  """
  yield
  jax.clear_caches()


@pytest.fixture
def tiny() -> m2_config.ModelConfig:
  """The smallest model with every part of M2: 2 layers, 8 experts, top 2."""
  return m2_config.ModelConfig(
    vocab=512,
    d_model=48,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    max_positions=256,
    experts=8,
    d_expert=24,
    top_k=2,
    min_k=2,
    dtype='float32',
  )


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  """An empty work directory whose name has a space, as users' may."""
  path = tmp_path / 'work dir'
  path.mkdir()
  return path
