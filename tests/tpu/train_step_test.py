"""The train step compiles for TPU chips that are not here, sharded as meant."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl.testing import absltest

from m2.model import params
from tests.tpu import train_step

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBTPU = ROOT / '.tpu'
CHIP_BYTES = 16 * 2**30  # of one TPU v5e
# Of the state on one chip of four: a quarter, what is kept whole, and padding.
SHARE = 0.3

# `MULTIPLE`: a second compiling process on this host would otherwise die on
# libtpu's lock file. The rest only spares it looking for a TPU host.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
}


class TrainStepTest(absltest.TestCase):
  def test_compiles_for_four_chips_and_is_sharded_over_all(self):
    if not LIBTPU.is_dir():
      self.fail('no .tpu folder with libtpu; bash tests/run.sh --all makes it')
    run = subprocess.run(
      [sys.executable, '-m', 'tests.tpu.train_step', 'v5e:2x2', '2', '2'],
      cwd=ROOT,
      env=os.environ | ENVIRONMENT | {'PYTHONPATH': str(LIBTPU)},
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stderr[-2000:])
    found = json.loads(run.stdout.splitlines()[-1])
    self.assertEqual((found['device'], found['chips']), ('TPU v5 lite', 4))
    self.assertLess(found['peak_bytes'], CHIP_BYTES)
    # float32 weights and two moments.
    state_bytes = 12 * params.count(train_step.MODEL)
    self.assertLess(found['argument_bytes'], SHARE * state_bytes)
    # The old state's memory becomes the new one's.
    self.assertGreater(found['alias_bytes'], 0.99 * found['argument_bytes'])
    self.assertGreater(found['collectives']['all-gather'], 0, found)


if __name__ == '__main__':
  absltest.main()
