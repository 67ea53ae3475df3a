"""What an RL step says where there was nothing to compare."""

import contextlib
import io
import json
import pathlib
import types as python_types

import numpy as np
from absl.testing import absltest, parameterized

from m2 import config
from m2.engine import engine
from m2.forge import journal, rollout
from m2.gateway import capture

REPORT = {
  'reward/mean': 0.5,
  'reward/passed': 0.25,
  'version/mean': 0.0,
  'version/oldest': 0,
}


class JournalTest(parameterized.TestCase):
  @parameterized.parameters((0.0, np.nan, None, '-'), (0.5, 0.25, 0.25, '0.25'))
  def test_mismatch(self, fresh, largest, written, shown):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    cfg = python_types.SimpleNamespace(
      log=config.LogConfig(every=1, tensorboard=True), steps=2
    )
    sources = [
      python_types.SimpleNamespace(counters=counters)
      for counters in (
        engine.Counters(), capture.Counters(), rollout.Counters()
      )
    ]  # fmt: skip
    values = {
      'loss': np.float32(1),
      'entropy': np.float32(1),
      'mismatch/fresh': np.float32(fresh),
      'mismatch/max': np.float32(largest),
    }
    seconds = {'rollout': 1.0, 'train': 1.0, 'sync': 1.0}
    with (
      contextlib.redirect_stdout(io.StringIO()) as stdout,
      journal.Journal(cfg, workdir, 0, *sources) as log,
    ):
      log.write(1, dict(REPORT), values, seconds)
    row = json.loads((workdir / 'metrics.jsonl').read_text())
    self.assertEqual(row['mismatch/max'], written)
    self.assertIn(f'  mismatch {shown}  ', stdout.getvalue())


if __name__ == '__main__':
  absltest.main()
