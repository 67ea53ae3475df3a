"""What the engine samples with is what the trainer has."""

import dataclasses
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from m2 import config
from m2.engine import engine as engines
from m2.forge import sync
from m2.model import params as model_params

# The smallest model whose experts can be in FP8.
MODEL = config.ModelConfig(
  vocab=16,
  d_model=128,
  layers=1,
  heads=2,
  kv_heads=1,
  head_dim=8,
  rotary_dim=4,
  max_positions=64,
  experts=2,
  d_expert=128,
  top_k=1,
  dtype='float32',
)
ENGINE = config.EngineConfig(slots=2, length=16, chunk=4)


class SyncTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.params = model_params.init(MODEL, jax.random.key(0))

  def engine(self, **changes) -> engines.Engine:
    settings = dataclasses.replace(ENGINE, **changes)
    return engines.Engine(MODEL, settings, sync.copy(self.params), version=3)

  def changed(self):
    """The parameters with one value changed in its last bits."""
    norm_D = self.params['final_norm']
    return self.params | {'final_norm': norm_D.at[0].multiply(1 + 2e-7)}

  @parameterized.parameters(False, True)
  def test_the_checksum_is_of_the_weights(self, fp8):
    engine = self.engine(fp8=fp8)
    first = sync.to_engine(self.params, engine, 4)
    self.assertEqual(model_params.is_quantised(engine.params), fp8)
    self.assertEqual(engine.version, 4)
    second = sync.to_engine(self.changed(), engine, 5)
    self.assertNotEqual(first, second)
    self.assertEqual(first, sync.to_engine(self.params, engine, 6))

  @parameterized.parameters(False, True)
  def test_weights_that_do_not_arrive_are_an_error(self, fp8):
    engine = self.engine(fp8=fp8)
    with mock.patch.object(engines.Engine, 'load'):  # takes and forgets them
      sync.to_engine(self.params, engine, 4)  # the same that it has
      with self.assertRaisesRegex(
        sync.SyncError, 'weights of version 5 .* other values of final_norm'
      ):
        sync.to_engine(self.changed(), engine, 5)

  def test_an_older_version_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'version=3 is not newer than 3'):
      sync.to_engine(self.params, self.engine(), 3)


if __name__ == '__main__':
  absltest.main()
