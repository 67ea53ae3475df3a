"""Experts in block-FP8 compute what their dequantised weights would."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from m2 import config, types
from m2.checkpoint import hf, store
from m2.engine import engine
from m2.model import params, transformer
from m2.parallel import mesh as meshes
from m2.parallel import serving, sharding
from tests.model import tiny

MODEL = config.ModelConfig(
  vocab=64,
  d_model=128,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=16,
  rotary_dim=8,
  experts=8,
  d_expert=256,
  top_k=2,
  min_k=2,
  max_positions=64,
  dtype='float32',
  remat='none',
)
FP8 = dataclasses.replace(MODEL, fp8_experts=True)
# The same products in another order.
CLOSE = {'rtol': 2e-4, 'atol': 2e-5}


@jax.jit
def restored(held):
  """Plain parameters of the values that `held` stands for."""
  return jax.tree.map(
    lambda leaf: (
      pallas_kernels.dequantise(leaf)
      if isinstance(leaf, pallas_kernels.Quantized)
      else leaf
    ),
    held,
    is_leaf=lambda leaf: isinstance(leaf, pallas_kernels.Quantized),
  )


class Fp8Test(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.plain = params.init(MODEL, jax.random.key(0))
    cls.held = jax.jit(params.quantise)(cls.plain)
    cls.tokens_BT = np.random.default_rng(1).integers(0, 64, (8, 6))

  def test_rounding_is_that_of_three_bits(self):
    for name in ('wi_0', 'wi_1', 'wo'):
      before = np.asarray(self.plain['blocks']['moe'][name])
      after = np.asarray(restored(self.held)['blocks']['moe'][name])
      error = np.abs(after - before)
      # Half a unit of a mantissa of 3 bits; below 2^-6 / 448 of the largest
      # weight, half a subnormal.
      floor = float(np.abs(before).max()) * 2**-10 / 448
      self.assertTrue((error <= np.abs(before) / 16 + floor).all(), name)
      self.assertGreater(error.max(), 0)

  def test_the_declaration_is_what_quantising_gives(self):
    chex.assert_trees_all_equal_shapes_and_dtypes(
      params.abstract(FP8), self.held
    )

  def test_same_logits_as_the_restored_weights(self):
    found = tiny.logits(FP8, self.held, self.tokens_BT)
    wanted = tiny.logits(MODEL, restored(self.held), self.tokens_BT)
    np.testing.assert_allclose(found, wanted, **CLOSE)

  @parameterized.parameters(serving.FEW, 4)
  def test_same_over_eight_devices(self, few):
    """Few tokens and many, experts and their width over the mesh."""
    mesh = meshes.make_mesh(config.MeshConfig(data=1, expert=4, tensor=2))
    wanted = tiny.logits(MODEL, restored(self.held), self.tokens_BT)
    where = sharding.param_shardings(self.held, mesh)
    held = jax.device_put(jax.device_get(self.held), where)
    self.enter_context(absltest.mock.patch.object(serving, 'FEW', few))
    with jax.set_mesh(mesh):
      found = jax.jit(
        lambda held, tokens_BT: transformer.logits(FP8, held, tokens_BT)
      )(held, self.tokens_BT)
    np.testing.assert_allclose(found, wanted, **CLOSE)

  @pytest.mark.heavy
  def test_the_engine_holds_what_it_is_given(self):
    """It samples what an engine of the restored weights samples."""
    sizes = config.EngineConfig(slots=2, length=64, chunk=4)
    ids = {}
    for fp8, given in ((True, self.plain), (False, restored(self.held))):
      made = engine.Engine(MODEL, dataclasses.replace(sizes, fp8=fp8), given)
      sampling = types.Sampling(max_new=8, temperature=0.0)
      (result,) = made.run([engine.GenRequest([1, 2, 3], sampling)])
      ids[fp8] = list(result.ids)
    self.assertEqual(ids[True], ids[False])

  def test_experts_of_a_public_checkpoint_go_to_the_engine_as_they_are(self):
    path = self.create_tempdir().full_path + '/fp8'
    hf.save(self.plain, path, MODEL, dtype='fp8')
    mesh = meshes.make_mesh(config.MeshConfig(data=2, expert=2, tensor=2))
    with absltest.mock.patch.object(hf, 'load', wraps=hf.load) as load:
      kept = store.load_params(path, FP8, mesh)
    (call,) = load.call_args_list
    self.assertTrue(call.args[1].fp8_experts)  # no other form in between
    want = sharding.param_shardings(kept, mesh)
    self.assertEqual(jax.tree.map(lambda leaf: leaf.sharding, kept), want)
    alone = hf.load(path, FP8)
    chex.assert_trees_all_equal(kept, alone)
    sizes = config.EngineConfig(slots=8, length=64, chunk=4, fp8=True)
    made = engine.Engine(MODEL, sizes, kept, mesh=mesh)
    sampling = types.Sampling(max_new=8, temperature=0.0)
    (result,) = made.run([engine.GenRequest([1, 2, 3], sampling)])
    given = [1, 2, 3, *result.ids]
    logits_BTV = np.asarray(tiny.logits(FP8, alone, np.array([given])))
    self.assertEqual(list(logits_BTV[0, 2:-1].argmax(-1)), list(result.ids))

  def test_other_checkpoints_are_quantised_when_they_are_loaded(self):
    folder = self.create_tempdir().full_path
    hf.save(self.plain, f'{folder}/plain', MODEL, dtype='float32')
    with store.Store(f'{folder}/run/checkpoints') as checkpoints:
      checkpoints.save(
        {'params': self.plain}, None, step=1, extra={}, asynchronous=False
      )
    mesh = meshes.make_mesh(config.MeshConfig(data=2, expert=2, tensor=2))
    for name in ('plain', 'run'):
      for where in (None, mesh):
        found = store.load_params(f'{folder}/{name}', FP8, where)
        chex.assert_trees_all_equal(found, self.held)


if __name__ == '__main__':
  absltest.main()
