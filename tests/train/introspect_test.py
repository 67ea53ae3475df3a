"""The introspection record says what it claims to."""

import functools
import json

import jax
import numpy as np
from absl.testing import absltest, parameterized

from m2.parallel import sharding
from m2.train import introspect
from tests.train import small

TOLERANCE = 1e-5
# Values in the file are rounded to five digits.
ROUNDED = 2e-5


def record(mesh):
  """A record of made-up gradients and updates, and what it was made of."""
  cfg = small.run_config(modules=1)
  made, _, _ = small.compiled(cfg, mesh, True)
  before = small.weights(cfg.model)
  grads, change = (small.noise(before, seed) for seed in (1, 2))
  after = jax.tree.map(lambda x, y: x + 0.01 * y, before, change)
  load = {'blocks': np.arange(16, dtype=np.float32).reshape(2, 8)}
  where = sharding.param_shardings(before, made)
  with jax.set_mesh(made):
    trees = [jax.device_put(tree, where) for tree in (before, after, grads)]
    rows = jax.device_put(small.batch(), sharding.batch_sharding(made))
    call = jax.jit(functools.partial(introspect.record, model=cfg.model))
    return jax.device_get((call(*trees, rows, load), *trees))


class RecordTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.record, cls.before, cls.after, cls.grads = record(small.ONE)

  def test_shapes_of_every_field(self):
    layers, heads, experts = 2, 4, 8
    expected = {
      'residual_rms': (layers,),
      'attn_out_rms': (layers,),
      'moe_out_rms': (layers,),
      'attn_max_logit': (layers, heads),
      'attn_entropy': (layers, heads),
      'router_entropy': (layers,),
      'router_bias': (layers, experts),
      'expert_load': (layers, experts),
      'expert_cosine': (layers,),
      'dead_experts': (layers,),
      'dead_units': (layers,),
    }
    for name, shape in expected.items():
      self.assertEqual(self.record[name].shape, shape, name)
    groups = {'embed', 'head', 'final_norm', 'attn', 'experts', 'router'}
    groups |= {'norms', 'mtp_attn', 'mtp_experts', 'mtp_router', 'mtp_norms'}
    for name in ('grad_norm_by_group', 'weight_norm', 'update_ratio'):
      self.assertEqual(set(self.record[name]), groups | {'mtp_proj'}, name)

  def test_group_norms_make_up_the_whole_gradient(self):
    squares = [
      np.square(value).sum()
      for value in self.record['grad_norm_by_group'].values()
    ]
    total = sum(
      np.square(leaf, dtype=np.float64).sum()
      for path, leaf in small.leaves(self.grads).items()
      if not path.endswith('bias')
    )
    np.testing.assert_allclose(sum(squares), total, rtol=TOLERANCE)

  def test_update_ratio_of_a_group(self):
    before, after = (t['blocks']['moe'] for t in (self.before, self.after))
    for layer in range(2):
      change = weight = 0
      for name in ('wi_0', 'wi_1', 'wo'):
        moved = after[name][layer] - before[name][layer]
        change += np.square(moved).sum()
        weight += np.square(before[name][layer]).sum()
      np.testing.assert_allclose(
        self.record['update_ratio']['experts'][layer],
        np.sqrt(change / weight),
        rtol=TOLERANCE,
      )

  def test_load_is_a_share_and_a_dead_expert_is_counted(self):
    np.testing.assert_allclose(
      self.record['expert_load'][0], np.arange(8) / 28, rtol=TOLERANCE
    )
    np.testing.assert_array_equal(self.record['dead_experts'], [1 / 8, 0])

  def test_flatten_is_json_and_keeps_five_digits(self):
    flat = introspect.flatten(self.record)
    self.assertEqual(json.loads(json.dumps(flat)), flat)
    np.testing.assert_allclose(
      flat['weight_norm']['attn'],
      self.record['weight_norm']['attn'],
      rtol=ROUNDED,
    )

  def test_on_a_mesh(self):
    found = record(small.CUT)[0]
    for name in found:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found[name],
        self.record[name],
      )


experts = jax.jit(introspect._experts)


class ExpertsTest(parameterized.TestCase):
  def moe(self):
    weights = small.weights(small.run_config(modules=1).model)
    return jax.tree.map(np.copy, weights['blocks']['moe'])

  def test_copies_of_one_expert_are_alike(self):
    moe = self.moe()
    for name in ('wi_0', 'wi_1', 'wo'):
      moe[name][1] = moe[name][1, 3]
    found = np.asarray(experts(moe)['expert_cosine'])
    self.assertLess(abs(found[0]), 0.2)
    self.assertAlmostEqual(float(found[1]), 1.0, places=5)

  def test_opposite_pairs(self):
    y_EPD = np.ones((2, 3, 4), np.float32)
    y_EPD[1] = -1
    cosine = jax.jit(introspect._cosine)(y_EPD)
    self.assertAlmostEqual(float(cosine), -1, places=5)

  def test_dead_units_are_counted(self):
    moe = self.moe()
    self.assertEqual(experts(moe)['dead_units'].tolist(), [0, 0])
    moe['wi_1'][0, :2, :, :4] = 0
    found = experts(moe)['dead_units']
    np.testing.assert_allclose(found, [2 * 4 / (8 * 16), 0], rtol=TOLERANCE)

  def test_few_rows_bounds_the_scores(self):
    for shape, few in (((64, 4096), (1, 4096)), ((8, 16), (8, 16))):
      found = jax.eval_shape(introspect._few_rows, np.zeros(shape))
      self.assertEqual(found.shape, few)


if __name__ == '__main__':
  absltest.main()
