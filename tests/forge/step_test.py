"""The RL step: merged equals unmerged, to rounding, gradients above all."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2 import config
from m2.forge import step as step_lib
from m2.forge import tree
from m2.model import attention
from m2.model import params as model_params
from m2.parallel import mesh as mesh_lib
from m2.parallel import sharding
from m2.train import optim
from m2.train import state as train_state
from tests.forge import forest

# Issue 2: relative L2 of the gradient difference, float32.
GRADIENT = 1e-5
LOSS = 1e-5
# A detached trunk changes the gradient by tens of percent.
MUTANT = 1e-2
# One shape for all batches, so that little is compiled.
TOKENS, LINES, SAMPLES = 48, 16, 512


def relative(one, two):
  square = lambda tree: sum(np.sum(x**2) for x in jax.tree.leaves(tree))
  one, two = jax.device_get((one, two))
  return np.sqrt(square(jax.tree.map(np.subtract, one, two)) / square(two))


class StepTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.params = jax.device_get(
      model_params.init(forest.MODEL, jax.random.key(0))
    )
    moe = cls.params['blocks']['moe']
    draw = np.random.default_rng(1).standard_normal
    moe['bias'] = 0.1 * draw(moe['bias'].shape, np.float32)
    cls.cfg = forest.run_config()
    optimizer = optim.make(cls.cfg.optim, cls.cfg.steps)
    cls.state = jax.device_get(
      jax.jit(functools.partial(train_state.wrap, optimizer=optimizer))(
        cls.params
      )
    )
    cls.update = staticmethod(
      jax.jit(
        functools.partial(
          step_lib.rl_step,
          model=forest.MODEL,
          optimizer=optimizer,
          cfg=cls.cfg,
        )
      )
    )
    cls.grad = staticmethod(
      jax.jit(
        jax.value_and_grad(
          functools.partial(step_lib.rl_loss, model=forest.MODEL, cfg=cls.cfg),
          has_aux=True,
        )
      )
    )
    cls.score = staticmethod(
      jax.jit(
        functools.partial(step_lib.score, model=forest.MODEL, cfg=cls.cfg)
      )
    )

  def compare(self, rows):
    merged, flat = (
      pack(rows, tokens=TOKENS, samples=SAMPLES, lines=LINES)
      for pack in (tree.merge_prefixes, tree.separate)
    )
    (one, metrics), got = self.grad(self.params, merged)
    (two, twin), want = self.grad(self.params, flat)
    self.assertAlmostEqual(float(one), float(two), delta=LOSS)
    self.assertLessEqual(relative(got, want), GRADIENT)
    # Load statistics count a shared token once for each row through it.
    np.testing.assert_allclose(metrics['load'], twin['load'], rtol=1e-6)
    self.assertEqual(
      float(metrics['load'].sum()),
      forest.MODEL.layers
      * forest.MODEL.top_k
      * sum(len(row.ids) for row in rows),
    )
    return got

  def test_figure_6_equals_separate_rows(self):
    self.compare(forest.figure_6())

  @parameterized.parameters(range(6))
  def test_merged_equals_separate(self, seed):
    """Trees here are longer than a line, so cuts are compared as well."""
    self.compare(forest.rollouts(seed))

  @parameterized.parameters(range(2))
  def test_replayed_routes_equal_separate_rows(self, seed):
    rows = forest.with_routes(forest.rollouts(seed, groups=2), seed)
    replayed = self.compare(rows)
    plain = self.compare(
      [dataclasses.replace(row, experts=None) for row in rows]
    )
    self.assertGreater(relative(replayed, plain), MUTANT)

  def test_a_detached_trunk_is_caught(self):
    rows = forest.rollouts(0)
    merged, flat = (
      pack(rows, tokens=TOKENS, samples=SAMPLES, lines=LINES)
      for pack in (tree.merge_prefixes, tree.separate)
    )
    shared_BT11 = merged.count_BT[..., None, None] > 1
    project = attention.project

    def detached(*args):
      q, k, v = project(*args)
      stop = jax.lax.stop_gradient
      return (
        q,
        jnp.where(shared_BT11, stop(k), k),
        jnp.where(shared_BT11, stop(v), v),
      )

    loss = functools.partial(step_lib.rl_loss, model=forest.MODEL, cfg=self.cfg)
    with mock.patch.object(attention, 'project', detached):
      (one, _), mutant = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        self.params, merged
      )
    (two, _), want = self.grad(self.params, flat)
    # The loss cannot tell; only the gradient does.
    self.assertAlmostEqual(float(one), float(two), delta=LOSS)
    self.assertGreater(relative(mutant, want), MUTANT)

  def gradients(self, rows, cfg):
    batch = tree.merge_prefixes(
      rows, tokens=TOKENS, lines=LINES, samples=SAMPLES
    )
    return jax.jit(
      functools.partial(step_lib.gradients, model=forest.MODEL, cfg=cfg)
    )(self.params, batch), batch

  def test_microbatches_add_up(self):
    self.add_up(forest.rollouts(3))

  @pytest.mark.heavy
  def test_microbatches_with_routes_add_up(self):
    self.add_up(forest.with_routes(forest.rollouts(3)))

  def add_up(self, rows):
    cfg = forest.run_config(lines=2)
    (grads, logp_BT, _, load_LE), batch = self.gradients(rows, cfg)
    (_, metrics), want = self.grad(self.params, batch)
    self.assertLessEqual(relative(grads, want), GRADIENT)
    np.testing.assert_allclose(load_LE, metrics['load'], rtol=1e-6)
    # Lines of padding were not computed at all.
    used = int((batch.until_BT > 0).any(1).sum())
    self.assertLess(used, 10)
    self.assertFalse(np.asarray(logp_BT)[used + used % 2 :].any())

  def test_one_update(self):
    rows = [
      dataclasses.replace(row, version=4 + (at % 2))
      for at, row in enumerate(forest.rollouts(1))
    ]
    state, run = self.state.replace(step=jnp.int32(5)), self.update
    batch = tree.merge_prefixes(
      rows, tokens=TOKENS, lines=LINES, samples=SAMPLES
    )
    after, metrics = jax.device_get(run(state, batch))
    self.assertEqual(int(after.step), 6)
    (loss, own), _ = self.grad(self.params, batch)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics['entropy'], own['entropy'], rtol=1e-5)
    trained = [len(row.old_logp) for row in rows]
    fresh = sum(n for n, row in zip(trained, rows) if row.version == 5)
    np.testing.assert_allclose(
      metrics['mismatch/fresh'], fresh / sum(trained), rtol=1e-6
    )
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), after, state)
    self.assertGreater(moved.params['blocks']['attn']['q'], 0)
    self.assertEqual(moved.params['blocks']['moe']['bias'], 0)
    # The policy moves along the (clipped) advantages.
    gain = self.objective(after.params, batch) - self.objective(
      self.params, batch
    )
    self.assertGreater(gain, 0)

  def objective(self, params, batch):
    """What the step climbs: log-probabilities under its constant weights."""
    logp_BT, before_BT = (
      np.asarray(self.score(values, batch)[0])
      for values in (params, self.params)
    )
    old_Z = before_BT.reshape(-1)[batch.edge_Z] - batch.old_logp_Z
    ratio_Z = np.minimum(np.exp(old_Z), 1 + self.cfg.forge.clip_high)
    weight_Z = batch.weight_Z * batch.advantage_Z * ratio_Z
    return float((weight_Z * logp_BT.reshape(-1)[batch.edge_Z]).sum())

  def test_bad_numbers_change_nothing(self):
    state, run = self.state, self.update
    head = self.params['head'] * np.nan
    state = state.replace(params=state.params | {'head': head})
    batch = tree.merge_prefixes(
      forest.figure_6(), tokens=TOKENS, lines=LINES, samples=SAMPLES
    )
    after, metrics = run(state, batch)
    self.assertEqual(float(metrics['bad']), 1)
    jax.tree.map(np.testing.assert_array_equal, after, state)

  def test_mesh_of_eight_devices(self):
    rows = forest.rollouts(2)
    cfg = forest.run_config(lines=8)
    (want, logp_BT, _, load_LE), batch = self.gradients(rows, cfg)
    mesh = mesh_lib.make_mesh(config.MeshConfig(fsdp=2, expert=2, context=2))
    params = jax.device_put(
      self.params,
      sharding.param_shardings(model_params.abstract(forest.MODEL), mesh),
    )
    with jax.set_mesh(mesh):
      got, logp, _, load = jax.jit(
        functools.partial(step_lib.gradients, model=forest.MODEL, cfg=cfg)
      )(params, batch)
    got = jax.device_get(got)
    self.assertLessEqual(relative(got, jax.device_get(want)), GRADIENT)
    np.testing.assert_allclose(logp, logp_BT, atol=1e-4)
    np.testing.assert_allclose(load, load_LE, rtol=1e-6)


if __name__ == '__main__':
  absltest.main()
