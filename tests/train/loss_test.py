"""The loss against plain arithmetic on all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from m2.train import loss
from tests.model import tiny
from tests.train import small

TOLERANCE = 1e-5


@functools.partial(jax.jit, static_argnums=0)
def first(cfg, params, batch, norm):
  return loss.loss_fn(
    params, batch, model=cfg.model, cfg=cfg, step=jnp.int32(0), norm=norm
  )


def run(cfg, batch, norm=None):
  return jax.device_get(first(cfg, small.weights(cfg.model), batch, norm))


def oracle(cfg, batch):
  """Cross-entropy, log-partition, its square and entropy, in float64."""
  logits = tiny.logits(
    cfg.model,
    small.weights(cfg.model),
    batch['tokens'],
    batch['positions'],
    batch['until'],
  )
  logits = np.asarray(logits, np.float64)
  logz = np.log(np.exp(logits).sum(-1))
  logp = logits - logz[..., None]
  own = np.take_along_axis(logp, batch['targets'][..., None], -1)[..., 0]
  entropy = -(np.exp(logp) * logp).sum(-1)
  share = batch['weights'] / batch['weights'].sum()
  return tuple((x * share).sum() for x in (-own, logz, logz**2, entropy))


class LossTest(parameterized.TestCase):
  @parameterized.parameters(7, 1024)
  def test_terms_are_weighted_means_over_all_logits(self, chunk):
    cfg = small.run_config(loss={'chunk': chunk, 'z': 0.01, 'balance': 0.5})
    batch = small.batch()
    total, metrics = run(cfg, batch)
    ce, log_z, z, entropy = oracle(cfg, batch)
    np.testing.assert_allclose(metrics['ce'], ce, rtol=TOLERANCE)
    np.testing.assert_allclose(metrics['log_z'], log_z, rtol=TOLERANCE)
    np.testing.assert_allclose(metrics['z'], z, rtol=TOLERANCE)
    np.testing.assert_allclose(metrics['entropy'], entropy, rtol=TOLERANCE)
    expected = ce + 0.01 * z + 0.5 * metrics['balance']
    np.testing.assert_allclose(total, expected, rtol=TOLERANCE)
    self.assertEqual(metrics['loss'], total)

  def test_tokens_of_weight_zero_do_not_matter(self):
    cfg, batch = small.run_config(), small.batch()
    other = dict(batch)
    other['targets'] = np.where(batch['weights'] == 0, 7, batch['targets'])
    self.assertEqual(run(cfg, batch)[0], run(cfg, other)[0])

  def test_scale_of_the_weights_does_not_matter(self):
    cfg, batch = small.run_config(), small.batch()
    other = batch | {'weights': batch['weights'] * 8}
    np.testing.assert_allclose(
      run(cfg, batch)[0], run(cfg, other)[0], rtol=TOLERANCE
    )

  def test_a_batch_without_trained_tokens_has_loss_zero(self):
    cfg, batch = small.run_config(modules=1), small.batch()
    total, _ = run(cfg, batch | {'weights': 0 * batch['weights']})
    self.assertEqual(total, 0)

  def test_mtp_weight_falls_over_the_decay_phase(self):
    cfg = small.run_config(modules=1, optim={'decay': 0.5})
    weight = jax.jit(functools.partial(loss.mtp_weight, cfg))
    values = [weight(jnp.int32(s)) for s in (0, 9, 14, 19)]
    np.testing.assert_allclose(values, [0.3, 0.3, 0.2, 0.1], rtol=TOLERANCE)

  def test_mtp_term_is_the_mean_over_modules(self):
    cfg, batch = small.run_config(modules=2), small.batch()
    total, metrics = run(cfg, batch)
    rest = metrics['ce'] + cfg.loss.z * metrics['z']
    np.testing.assert_allclose(
      total, rest + 0.3 * metrics['mtp'], rtol=TOLERANCE
    )
    # Random modules know nothing: each is near the entropy of all tokens.
    self.assertBetween(metrics['mtp'], 0.9 * np.log(320), 1.1 * np.log(320))
    self.assertEqual(metrics['load']['mtp'].shape, (2, small.MODEL.experts))

  def test_halves_under_one_norm_add_up(self):
    cfg, batch = small.run_config(modules=1), small.batch()
    norm = jax.jit(loss.totals, static_argnums=0)(cfg.model, batch)
    halves = [{k: v[i::2] for k, v in batch.items()} for i in (0, 1)]
    parts = [run(cfg, half, norm=norm)[0] for half in halves]
    np.testing.assert_allclose(sum(parts), run(cfg, batch)[0], rtol=TOLERANCE)


if __name__ == '__main__':
  absltest.main()
