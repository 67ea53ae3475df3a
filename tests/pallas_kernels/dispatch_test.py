"""Which backend is picked, what is said about it, and what is refused."""

import jax
from absl.testing import absltest

from pallas_kernels import dispatch, tiles_tpu

TABLE = {'mosaic_gpu': 'fast', 'xla': 'plain'}


class DispatchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(
      absltest.mock.patch.object(
        dispatch.jax, 'default_backend', return_value='gpu'
      )
    )

  def test_best_that_does_not_refuse(self):
    self.assertEqual(dispatch.pick('one', None, TABLE), 'fast')
    refusals = {'mosaic_gpu': 'needs bfloat16'}
    with self.assertLogs('pallas_kernels', 'INFO') as logs:
      for _ in range(2):
        picked = dispatch.pick('two', None, TABLE, refusals)
    self.assertEqual(picked, 'plain')
    self.assertLen(logs.output, 1)  # said once
    self.assertIn('mosaic_gpu needs bfloat16', logs.output[0])

  def test_a_mesh_of_other_devices_decides(self):
    """Programs compiled ahead of time get the kernels of their devices."""
    device = jax.sharding.AbstractDevice('TPU v5', num_cores=2, platform='tpu')
    mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
    table = {**TABLE, 'mosaic_tpu': 'there'}
    with jax.sharding.use_abstract_mesh(mesh):
      self.assertEqual(dispatch.pick('four', None, table), 'there')
      self.assertEqual(tiles_tpu.here(), tiles_tpu.CHIPS['TPU v5'])
    self.assertEqual(dispatch.pick('four', None, table), 'fast')

  def test_forced_never_falls_back(self):
    self.assertEqual(dispatch.pick('three', 'xla', TABLE), 'plain')
    with self.assertRaisesRegex(NotImplementedError, 'needs bfloat16'):
      dispatch.pick(
        'three', 'mosaic_gpu', TABLE, {'mosaic_gpu': 'needs bfloat16'}
      )
    with self.assertRaisesRegex(NotImplementedError, 'mosaic_tpu'):
      dispatch.pick('three', 'mosaic_tpu', TABLE)


if __name__ == '__main__':
  absltest.main()
