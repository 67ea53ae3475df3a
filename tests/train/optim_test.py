"""Which rule moves which leaf, by how much, and when."""

import dataclasses
import functools

import jax
import numpy as np
import optax
from absl.testing import absltest, parameterized

from m2 import config
from m2.model import params as model_params
from m2.parallel import mesh as meshes
from m2.parallel import sharding
from m2.train import optim
from tests.train import small

RATE_TOLERANCE = 1e-6
# Five Newton-Schulz steps leave small singular values short of 1, so the result
# points almost, not quite, where the polar factor does.
COSINE = 0.96


def cfg(**fields) -> config.OptimConfig:
  return config.OptimConfig(**fields)


def params(modules: int):
  """Random values in every leaf, norms and biases included."""
  model = dataclasses.replace(small.MODEL, mtp_modules=modules)
  return small.noise(model_params.abstract(model), 1)


@functools.partial(jax.jit, static_argnums=0)
def update(settings, grads, weights):
  """The first of ten steps."""
  transform = optim.make(settings, 10)
  return transform.update(grads, transform.init(weights), weights)[0]


class ScheduleTest(parameterized.TestCase):
  def test_warms_up_holds_and_decays(self):
    settings = cfg(lr=2.0, warmup=4, decay=0.2, final=0.1)
    rate = jax.jit(optim.schedule(settings, 100))
    np.testing.assert_allclose(
      [rate(s) for s in (0, 1, 3, 50, 79, 89, 99)],
      [0.5, 1.0, 2.0, 2.0, 2.0, 1.1, 0.2],
      rtol=RATE_TOLERANCE,
    )

  def test_never_rises_above_the_peak_or_leaves_zero_where_ramps_meet(self):
    settings = cfg(lr=1.0, warmup=50, decay=1.0, final=0.0)
    rate = jax.jit(optim.schedule(settings, 20))
    values = np.array([rate(s) for s in range(20)])
    self.assertLess(values.max(), 1.0)
    self.assertGreater(values[:-1].min(), 0.0)
    self.assertEqual(values[-1], 0.0)

  def test_no_decay_phase(self):
    rate = jax.jit(optim.schedule(cfg(lr=1.0, warmup=0, decay=0.0), 5))
    np.testing.assert_array_equal([rate(s) for s in range(5)], np.ones(5))


class RulesTest(parameterized.TestCase):
  def test_every_leaf_of_the_model_has_a_rule(self):
    for name in small.leaves(params(modules=2)):
      last = name.rsplit('/')[-1]
      rules = [
        last in optim.MATRICES,
        last in optim.TABLES,
        last in optim.NEVER,
        last.endswith('norm'),
      ]
      self.assertEqual(sum(rules), 1, name)

  @parameterized.parameters('adamw', 'muon')
  def test_decay_touches_matrices_only(self, name):
    weights = jax.tree.map(lambda x: x + 0.5, params(modules=1))
    zeros = jax.tree.map(np.zeros_like, weights)
    settings = cfg(name=name, lr=1.0, warmup=0, decay=0.0, weight_decay=0.1)
    for path, change in small.leaves(update(settings, zeros, weights)).items():
      weight = small.leaves(weights)[path]
      decays = path.endswith(('norm', 'bias')) is False
      np.testing.assert_allclose(
        change, -0.1 * weight * decays, rtol=RATE_TOLERANCE, err_msg=path
      )

  @parameterized.parameters('adamw', 'muon')
  def test_router_bias_is_never_moved_and_has_no_moments(self, name):
    weights = params(modules=1)
    ones = jax.tree.map(np.ones_like, weights)
    moved = small.leaves(update(cfg(name=name), ones, weights))
    for path in ('blocks/moe/bias', 'mtp/moe/bias'):
      np.testing.assert_array_equal(moved[path], 0)
    state = jax.eval_shape(optim.make(cfg(name=name), 10).init, weights)
    self.assertNotIn('bias', ' '.join(small.leaves(state)))

  def test_mtp_only_moves_the_modules_and_nothing_else(self):
    weights = params(modules=2)
    ones = jax.tree.map(np.ones_like, weights)
    settings = cfg(train_only='mtp')
    for path, change in small.leaves(update(settings, ones, weights)).items():
      moves = path.startswith('mtp/') and not path.endswith('bias')
      self.assertEqual(bool(np.any(np.asarray(change))), moves, path)

  def test_frozen_leaves_do_not_count_in_the_clipped_norm(self):
    weights = params(modules=1)
    grads = jax.tree.map(np.ones_like, weights)
    loud = {**grads, 'embed': grads['embed'] * 1e6}
    settings = cfg(train_only='mtp', clip=0.1)
    first, second = (update(settings, g, weights) for g in (grads, loud))
    jax.tree.map(np.testing.assert_array_equal, first, second)

  def test_freeze_cuts_the_gradient(self):
    weights = params(modules=1)
    settings = cfg(train_only='mtp')

    def total(tree):
      return sum(x.sum() for x in jax.tree.leaves(optim.freeze(settings, tree)))

    for path, grad in small.leaves(jax.jit(jax.grad(total))(weights)).items():
      moves = path.startswith('mtp/') and not path.endswith('bias')
      np.testing.assert_array_equal(grad, float(moves), err_msg=path)

  def test_adamw_is_optax_adamw_on_matrices(self):
    weights = small.noise({'head': np.zeros((8, 12))}, 0)
    grads = small.noise(weights, 1)
    settings = cfg(lr=0.1, warmup=0, decay=0.0, clip=1e9)
    oracle = optax.adamw(0.1, 0.9, 0.95, 1e-8, weight_decay=0.1)
    expected, _ = jax.jit(
      lambda grads, weights: oracle.update(grads, oracle.init(weights), weights)
    )(grads, weights)
    np.testing.assert_allclose(
      update(settings, grads, weights)['head'],
      expected['head'],
      rtol=RATE_TOLERANCE,
    )


class MuonTest(parameterized.TestCase):
  def grads(self):
    weights = params(modules=1)
    return weights, small.noise(weights, 2)

  def test_each_matrix_is_orthogonalised_by_itself(self):
    weights, grads = self.grads()
    settings = cfg(name='muon', lr=1.0, warmup=0, decay=0.0, weight_decay=0.0)
    changes = small.leaves(update(settings, grads, weights))
    for path, (inner, outer) in {
      'blocks/attn/q': (1, 2),
      'blocks/attn/o': (2, 1),
      'blocks/moe/wi_0': (1, 1),
      'mtp/moe/wo': (1, 1),
      'mtp/proj': (1, 1),
    }.items():
      change = np.asarray(changes[path])
      shape = change.shape[: change.ndim - inner - outer]
      split = change.ndim - outer
      rows = int(np.prod(change.shape[len(shape) : split]))
      matrices = change.reshape(int(np.prod(shape)), rows, -1)
      grad = np.asarray(small.leaves(grads)[path]).reshape(matrices.shape)
      u, _, v = np.linalg.svd(grad, full_matrices=False)
      polar = u @ v
      size = np.linalg.norm(matrices, axis=(1, 2))
      product = (matrices * polar).sum((1, 2))
      cosine = product / size / np.linalg.norm(polar, axis=(1, 2))
      self.assertGreater(-cosine.max(), COSINE, path)
      rms = size / matrices[0].size ** 0.5
      self.assertBetween(rms.min(), 0.7 * optim.MUON_RMS, optim.MUON_RMS * 1.1)

  def test_on_a_mesh(self):
    weights, grads = self.grads()
    mesh = meshes.make_mesh(small.EIGHT, jax.devices())
    where = sharding.param_shardings(weights, mesh)
    expected = small.leaves(update(cfg(name='muon'), grads, weights))
    with jax.set_mesh(mesh):
      placed = (jax.device_put(tree, where) for tree in (grads, weights))
      found = small.leaves(update(cfg(name='muon'), *placed))
    for path, leaf in expected.items():
      np.testing.assert_allclose(leaf, found[path], atol=1e-6, err_msg=path)
      self.assertEqual(found[path].sharding, small.leaves(where)[path])

  def test_experts_do_not_mix(self):
    weights, grads = self.grads()
    settings = cfg(name='muon', clip=1e9)
    # Fetched before the array changes: jax reads it where it is.
    first = jax.device_get(update(settings, grads, weights))
    grads['blocks']['moe']['wi_1'][1, 3] *= -2
    second = jax.device_get(update(settings, grads, weights))
    first, second = (tree['blocks']['moe']['wi_1'] for tree in (first, second))
    differs = np.any(first != second, axis=(2, 3))
    self.assertEqual(np.argwhere(differs).tolist(), [[1, 3]])


if __name__ == '__main__':
  absltest.main()
