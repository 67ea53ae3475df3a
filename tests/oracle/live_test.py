"""Live comparison with transformers: fresh random models, both directions.

The oracle runs in an environment of its own and exchanges files only.
"""

import dataclasses
import os
import pathlib
import subprocess
import tempfile

import numpy as np
import pytest
from absl.testing import absltest

from m2.checkpoint import hf
from m2.model import transformer

HERE = pathlib.Path(__file__).resolve().parent
PROMPT, NEW = 8, 64
LOGITS = 1e-4  # largest absolute difference, float32


def oracle(script: str, *arguments: str) -> None:
  """Runs a script of this folder in the oracle environment."""
  found = subprocess.run(
    ['bash', HERE / 'env.sh'], capture_output=True, text=True, check=False
  )
  if found.returncode:
    raise RuntimeError(found.stderr)
  run = subprocess.run(
    [found.stdout.split()[-1], HERE / script, *arguments],
    capture_output=True,
    text=True,
    # Without it, the library asks the network for newer files.
    env={**os.environ, 'HF_HUB_OFFLINE': '1'},
    check=False,
  )
  if run.returncode:
    raise RuntimeError(run.stderr[-3000:])


@pytest.mark.heavy
class LiveTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    scratch = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(scratch) / 'theirs'
    cls.seed = int.from_bytes(os.urandom(3), 'little')
    oracle('make_fixtures.py', str(cls.folder), '--seed', str(cls.seed))
    cls.sources = sorted(cls.folder.iterdir())

  def ours(self, path: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    cfg = dataclasses.replace(hf.config(path), dtype='float32')
    return np.asarray(transformer.logits(cfg, hf.load(path, cfg), tokens))

  def test_we_compute_what_transformers_computes(self):
    self.assertGreaterEqual(len(self.sources), 6)
    for path in self.sources:
      with self.subTest(path.name, seed=self.seed):
        tokens = np.load(path / 'tokens.npy')
        logits = self.ours(path, tokens)
        np.testing.assert_allclose(
          logits, np.load(path / 'logits.npy'), rtol=0, atol=LOGITS
        )
        greedy = logits[:, PROMPT - 1 : -1].argmax(-1)
        np.testing.assert_array_equal(greedy, tokens[:, PROMPT:])
        self.assertEqual(greedy.shape[1], NEW)

  def test_transformers_reads_what_we_write(self):
    targets = []
    for path in self.sources:
      cfg = hf.config(path)
      params = hf.load(path, cfg)
      for dtype in ('float32', 'bfloat16', 'fp8'):
        target = self.folder.parent / dtype / path.name
        hf.save(params, target, cfg, dtype=dtype, shard_bytes=50_000)
        np.save(target / 'tokens.npy', np.load(path / 'tokens.npy'))
        targets.append(target)
    oracle('score.py', *map(str, targets))
    for target in targets:
      with self.subTest(str(target), seed=self.seed):
        logits = self.ours(target, np.load(target / 'tokens.npy'))
        np.testing.assert_allclose(
          logits, np.load(target / 'logits.npy'), rtol=0, atol=LOGITS
        )


if __name__ == '__main__':
  absltest.main()
