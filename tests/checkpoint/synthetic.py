"""Block-FP8 checkpoints of any size, made up quickly.

Names, types and files are those of a save with dtype='fp8'; the values are cut
out of one block of random bytes, so that gigabytes take seconds.
"""

import math
import pathlib

import numpy as np

from m2 import config
from m2.checkpoint import fp8, hf_config, hf_save, shards, storage


def write(
  path: pathlib.Path,
  cfg: config.ModelConfig,
  *,
  shard_bytes: int,
  seed: int = 0,
) -> int:
  """Writes a checkpoint; returns the bytes of its tensors."""
  path.mkdir()
  folder = storage.folder(path)
  random = _random(seed)
  items = hf_save.items(cfg, {}, 'fp8')
  plan = shards.plan(items, shard_bytes)
  tree = hf_config.to_json(cfg, 'fp8')
  storage.put(folder, 'config.json', shards.to_json(tree))
  for number, shard in enumerate(plan):
    with open(path / shard.file, 'wb') as file:
      file.write(shard.header)
      for dtype in ('F32', 'BF16', 'F8_E4M3'):  # the order in files
        _fill(file, random[dtype], shard, dtype, number)
  storage.put(folder, shards.INDEX, shards.index(plan))
  return sum(item.nbytes for item in items)


def _fill(file, random: np.ndarray, shard, dtype: str, number: int) -> None:
  """Writes all tensors of one type, which lie together."""
  left = sum(
    math.prod(shape)
    for item in shard.items
    for kind, shape in item.specs.values()
    if kind == dtype
  )
  start = number * 7919 % (len(random) // 2)
  while left:
    part = random[start : start + left]
    file.write(part.view(np.uint8))
    left -= len(part)
    start = (start + 104_729) % (len(random) // 2)


def _random(seed: int) -> dict[str, np.ndarray]:
  """A million values of each type."""
  rng = np.random.default_rng(seed)
  code = rng.integers(0, 256, 1 << 20, np.uint8)
  code[code & 0x7F == 0x7F] = 0x7E  # 448, the largest, in place of NaN
  code[::64] = 0x7E  # as every block has that was scaled to its largest
  weight = rng.normal(scale=0.05, size=1 << 20).astype(np.float32)
  return {
    'F8_E4M3': code.view(fp8.DTYPE),
    'BF16': weight.astype(shards.DTYPES['BF16']),
    'F32': np.abs(weight) * 1e-2 + 1e-5,
  }
