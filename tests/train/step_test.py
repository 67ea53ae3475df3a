"""One update: the same by microbatches and on a mesh, guarded, balanced."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from m2 import config
from m2.model import transformer
from m2.train import step
from tests.train import small

# float32 sums in another order, relative to the largest value of a leaf.
SUM_TOLERANCE = 5e-6
# Adam divides a gradient by its own size: rounding of the tiniest ones shows.
UPDATE_TOLERANCE = 2e-3


def run_config(**changes):
  """One block beside the module: a second compiles to half as much again."""
  return small.run_config(modules=1, model={'layers': 1}, **changes)


BASE = run_config()


@functools.partial(jax.jit, static_argnums=0)
def first(cfg, params, batch):
  return step.gradients(
    params, batch, model=cfg.model, cfg=cfg, step=jnp.int32(0)
  )


def gradients(cfg):
  return jax.device_get(first(cfg, small.weights(cfg.model), small.batch()))


balance = jax.jit(step.balance, static_argnums=2)


def assert_close(first, second, tolerance):
  other = small.leaves(second)
  for path, leaf in small.leaves(first).items():
    size = max(np.abs(leaf).max(), 1e-3)
    np.testing.assert_allclose(
      leaf / size, other[path] / size, atol=tolerance, err_msg=path
    )


class AccumulateTest(parameterized.TestCase):
  @pytest.mark.heavy  # on eight devices it is in every run: `MeshTest`
  def test_microbatches_add_up_to_the_batch(self):
    # Uneven weights: rows with few trained tokens must not count more.
    whole, metrics = gradients(BASE)
    cfg = run_config(optim={'accumulate': 4})
    parts, summed = gradients(cfg)
    assert_close(whole, parts, SUM_TOLERANCE)
    for metrics_of in (metrics, summed):
      # Not linear in the batch: the mean over microbatches, see `loss_fn`.
      self.assertAlmostEqual(metrics_of.pop('balance'), 1, places=1)
    summed.pop('noise_scale')
    assert_close(metrics, summed, SUM_TOLERANCE)

  def test_noise_scale_of_known_squares(self):
    # Microbatch gradients (1, 0) and (0, 1), given as shares of their mean:
    # |G|^2 = (2 * 0.5 - 1) / 1 = 0, so there is nothing but noise.
    run, squares = jax.jit(step._noise_scale), np.float32([0.25, 0.25])
    scale = run({'a': np.float32([0.5, 0.5])}, squares)
    self.assertGreater(scale, 1e6)
    # Equal ones have none.
    scale = run({'a': np.float32([1, 0])}, squares)
    self.assertEqual(scale, 0)


class MeshTest(parameterized.TestCase):
  def test_eight_devices_with_microbatches_compute_what_one_does_at_once(self):
    one, metrics = small.steps(BASE, 2)
    cfg = run_config(optim={'accumulate': 2}, data={'batch': 2 * small.ROWS})
    twice = {k: np.repeat(v, 2, axis=0) for k, v in small.batch().items()}
    eight, others = small.steps(cfg, 2, small.CUT, rows=twice)
    assert_close(one.params, eight.params, UPDATE_TOLERANCE)
    for key in ('loss', 'ce', 'mtp', 'grad_norm', 'load_max', 'active'):
      np.testing.assert_allclose(
        metrics[key], others[key], rtol=UPDATE_TOLERANCE, err_msg=key
      )
    for part in ('blocks', 'mtp'):
      np.testing.assert_array_equal(
        one.params[part]['moe']['bias'], eight.params[part]['moe']['bias']
      )


class RoundingTest(parameterized.TestCase):
  CFG = run_config(loss={'round_tokens': 16})

  def test_every_expert_runs_whole_tiles(self):
    batch = small.batch()
    where = (batch[name] for name in ('tokens', 'positions', 'until'))
    run = functools.partial(
      transformer.forward, self.CFG.model, round_tokens=16
    )
    out = jax.jit(run)(small.weights(self.CFG.model), *where)
    experts, top_k = self.CFG.model.experts, self.CFG.model.top_k
    self.assertGreater(out.experts_LBTX.shape[-1], top_k)
    for layer_BTX in np.asarray(out.experts_LBTX):
      sizes_E = np.bincount(layer_BTX.ravel(), minlength=experts + 1)[:-1]
      np.testing.assert_array_equal(sizes_E % 16, 0)
      # Padding has no experts.
      self.assertTrue((layer_BTX[batch['until'] == 0] == experts).all())

  def test_the_load_is_that_of_the_routers_own_choices(self):
    batch = small.batch()
    where = [batch[name] for name in ('tokens', 'positions', 'until')]
    load_LE, rounded_LE = (
      jax.jit(
        functools.partial(
          transformer.forward, self.CFG.model, round_tokens=tile
        )
      )(small.weights(self.CFG.model), *where).load_LE
      for tile in (0, 16)
    )
    np.testing.assert_array_equal(load_LE, rounded_LE)

  def test_trunk_and_module_round(self):
    with mock.patch.object(
      pallas_kernels, 'round_tokens', wraps=pallas_kernels.round_tokens
    ) as rounds:
      jax.eval_shape(
        lambda params, batch: step.gradients(
          params, batch, model=self.CFG.model, cfg=self.CFG, step=jnp.int32(0)
        ),
        small.weights(self.CFG.model),
        small.batch(),
      )
    tiles = [call.kwargs['tile'] for call in rounds.call_args_list]
    self.assertLen(set(tiles), 1)
    self.assertGreater(len(tiles), 1)

  @parameterized.parameters(('exchange', 2), ('gather', 2))
  @pytest.mark.heavy
  def test_named_strategies_compute_what_one_device_does(
    self, strategy, chunks
  ):
    one, _ = small.steps(self.CFG, 2)
    cfg = small.run_config(
      modules=1,
      model={
        'layers': 1,
        'expert_strategy': strategy,
        'expert_chunks': chunks,
        'remat': 'block',
      },
      loss={'round_tokens': 16},
    )
    mesh = config.MeshConfig(expert=4, tensor=2)
    others, _ = small.steps(cfg, 2, mesh)
    assert_close(one.params, others.params, UPDATE_TOLERANCE)

  def test_too_few_tokens_to_fill_tiles_are_an_error(self):
    cfg = run_config(loss={'round_tokens': 64})
    with self.assertRaisesRegex(ValueError, '128 tokens.*set it to 32 at most'):
      jax.eval_shape(
        lambda params, batch: step.gradients(
          params, batch, model=cfg.model, cfg=cfg, step=jnp.int32(0)
        ),
        small.weights(cfg.model),
        small.batch(),
      )

  def test_devices_that_share_experts_compute_what_one_does(self):
    one, metrics = small.steps(self.CFG, 2)
    plain, _ = small.steps(BASE, 2)
    eight, others = small.steps(self.CFG, 2, config.MeshConfig(expert=8))
    assert_close(one.params, eight.params, UPDATE_TOLERANCE)
    for key in ('loss', 'ce', 'mtp', 'grad_norm', 'load_max', 'active'):
      np.testing.assert_allclose(
        metrics[key], others[key], rtol=UPDATE_TOLERANCE, err_msg=key
      )
    with self.assertRaises(AssertionError):
      assert_close(one.params, plain.params, UPDATE_TOLERANCE)

  def test_choices_that_are_replayed_are_not_rounded(self):
    batch = small.batch()
    where = [batch[name] for name in ('tokens', 'positions', 'until')]
    params = small.weights(self.CFG.model)
    experts_LBTX = np.zeros((1, *where[0].shape, 2), np.int32)
    with self.assertRaisesRegex(ValueError, 'replayed are fixed'):
      transformer.forward(
        self.CFG.model,
        params,
        *where,
        experts_LBTX=experts_LBTX,
        round_tokens=16,
      )


class BalanceTest(parameterized.TestCase):
  def test_bias_moves_by_the_sign_of_the_error_of_the_summed_load(self):
    cfg = small.run_config(modules=1, optim={'bias_rate': 0.5})
    params = small.weights(cfg.model)
    load = {
      'blocks': np.float32([[9, 1, 2, 4, 4, 4, 4, 4], [1] * 8]),
      'mtp': np.float32([[0, 8, 0, 8, 0, 8, 0, 8]]),
    }
    moved = balance(params, load, cfg, jnp.int32(5))
    np.testing.assert_array_equal(
      moved['blocks']['moe']['bias'],
      [[-0.5, 0.5, 0.5, 0, 0, 0, 0, 0], [0] * 8],
    )
    np.testing.assert_array_equal(
      moved['mtp']['moe']['bias'], [[0.5, -0.5] * 4]
    )

  @parameterized.parameters((True, 0.05), (False, 0.5))
  def test_rate_follows_the_schedule_if_asked(self, decays, expected):
    cfg = small.run_config(
      optim={'bias_rate': 0.5, 'bias_decay': decays, 'final': 0.1}
    )
    load = {'blocks': np.arange(16, dtype=np.float32).reshape(2, 8)}
    last = jnp.int32(cfg.steps - 1)
    moved = balance(small.weights(cfg.model), load, cfg, last)
    np.testing.assert_allclose(
      np.abs(moved['blocks']['moe']['bias']), expected, rtol=1e-5
    )

  def test_step_balances_by_the_load_it_saw(self):
    after, metrics = small.steps(BASE, 1)
    load = gradients(BASE)[1]['load']
    rate = BASE.optim.bias_rate / BASE.optim.warmup
    for part, load_LE in load.items():
      error = load_LE.mean(-1, keepdims=True) - load_LE
      np.testing.assert_allclose(
        after.params[part]['moe']['bias'], rate * np.sign(error), rtol=1e-6
      )
    tokens = (small.batch()['until'] > 0).sum()
    layers, top_k = BASE.model.layers, BASE.model.top_k
    self.assertEqual(load['blocks'].sum(), tokens * layers * top_k)
    self.assertAlmostEqual(metrics['active'], top_k, places=5)

  def test_mtp_only_leaves_the_trunk_as_it_is_to_the_bit(self):
    cfg = run_config(optim={'train_only': 'mtp'})
    before = small.steps(cfg, 1)[0]
    after = small.leaves(small.steps(cfg, 1, state=before)[0].params)
    for path, leaf in small.leaves(before.params).items():
      same = np.array_equal(leaf, after[path])
      self.assertEqual(same, not path.startswith('mtp/'), path)

  def test_modules_without_a_weight_stay_as_they_are(self):
    cfg = run_config(loss={'mtp': 0.0, 'mtp_final': 0.0})
    before = small.steps(cfg, 1)[0]
    after, metrics = small.steps(cfg, 1, state=before)
    self.assertNotIn('mtp', metrics)
    after = small.leaves(after.params)
    for path, leaf in small.leaves(before.params).items():
      if path.startswith('mtp/'):
        np.testing.assert_array_equal(leaf, after[path], path)


class GuardTest(parameterized.TestCase):
  def test_a_bad_update_is_not_applied(self):
    state, metrics = small.steps(BASE, 1)
    self.assertFalse(metrics['bad'].any())
    broken = jax.tree.map(np.copy, state)
    broken.params['blocks']['moe']['wi_0'][0, :, 3, 4] = np.inf
    after, metrics = small.steps(BASE, 1, state=broken)
    self.assertTrue(metrics['bad'][0])
    self.assertEqual(after.step, state.step + 1)
    after = after.replace(step=broken.step)
    jax.tree.map(np.testing.assert_array_equal, after, broken)


class InspectTest(parameterized.TestCase):
  def test_looking_does_not_change_the_step(self):
    plain, metrics = small.steps(BASE, 1)
    looked, more = small.steps(BASE, 1, inspect=True)
    self.assertIn('expert_load', more.pop('introspection'))
    self.assertEqual(metrics.keys(), more.keys())
    assert_close(plain.params, looked.params, UPDATE_TOLERANCE)


if __name__ == '__main__':
  absltest.main()
