"""CISPO against closed forms worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from m2.forge import cispo, tree

ATOL = 1e-6


def batch(logp, ratio, advantage, weight=None, pads=0):
  """Pairs over one line of tokens, with these ratios to the behaviour."""
  count = len(logp)
  size = count + pads
  grid = jnp.zeros((1, count), jnp.int32)

  def column(values, fill=0.0):
    return jnp.concatenate(
      [jnp.asarray(values, jnp.float32), jnp.full(pads, fill)]
    )

  old = np.asarray(logp) - np.log(ratio)
  weight = np.ones(count) if weight is None else weight
  return tree.TreeBatch(
    tokens_BT=grid,
    positions_BT=grid,
    until_BT=grid,
    parent_BT=grid,
    count_BT=grid,
    edge_Z=jnp.arange(size) % count,
    token_Z=jnp.zeros(size, jnp.int32),
    old_logp_Z=column(old),
    advantage_Z=column(advantage, 5.0),
    weight_Z=column(weight),
    version_Z=jnp.where(jnp.arange(size) < count, 3, -1),
    total=jnp.float32(np.sum(weight)),
  )


class CispoTest(parameterized.TestCase):
  A = (1.0, -0.5, 2.0, -1.0)
  LOGP = (-0.7, -1.2, -0.4, -2.1)

  @parameterized.parameters(
    # Ratio 1.56 is cut at 1.28; 0.4 is not, as the lower bound is 0.
    ((1, 1.14, 1.56, 0.4), 0.28, (0.7, -0.684, 1.024, -0.84)),
    # 9 is cut at 5.
    ((1, 3, 9, 0.4), 4.0, (0.7, -1.8, 4.0, -0.84)),
  )
  def test_closed_forms(self, ratio, clip_high, terms):
    trees = batch(self.LOGP, ratio, self.A, pads=3)

    def loss(logp_BT):
      return cispo.cispo_loss(logp_BT, trees, clip_high=clip_high)[0]

    logp_BT = jnp.array([self.LOGP])
    value, grad_BT = jax.value_and_grad(loss)(logp_BT)
    np.testing.assert_allclose(value, np.mean(terms), atol=ATOL)
    # The gradient is the clipped ratio times the advantage, none through it.
    want = -np.minimum(ratio, 1 + clip_high) * self.A / 4
    np.testing.assert_allclose(grad_BT[0], want, atol=ATOL)
    self.assertTrue((np.asarray(grad_BT) != 0).all())  # no token is masked

  def test_ratio_one_is_reinforce(self):
    trees = batch(self.LOGP, (1, 1, 1, 1), self.A)
    grad_BT = jax.grad(
      lambda logp: cispo.cispo_loss(logp, trees, clip_high=5.0)[0]
    )(jnp.array([self.LOGP]))
    np.testing.assert_allclose(grad_BT[0], -np.array(self.A) / 4, atol=ATOL)

  def test_normaliser_is_the_total_weight(self):
    trees = batch(self.LOGP, (1, 1, 1, 1), self.A, weight=(1, 1, 2, 0))
    loss, _ = cispo.cispo_loss(jnp.array([self.LOGP]), trees, clip_high=5.0)
    terms = -np.array(self.A) * self.LOGP * (1, 1, 2, 0)
    np.testing.assert_allclose(loss, terms.sum() / 4, atol=ATOL)
    # Rows that were left out still count.
    more = trees.replace(total=jnp.float32(16))
    loss, _ = cispo.cispo_loss(jnp.array([self.LOGP]), more, clip_high=5.0)
    np.testing.assert_allclose(loss, terms.sum() / 16, atol=ATOL)

  def test_huge_gaps_stay_finite(self):
    trees = batch((-1e-3, -90.0, -1.0), (np.exp(95), np.exp(-80), 1), (1, 1, 1))
    (loss, metrics), grad = jax.value_and_grad(
      lambda logp: cispo.cispo_loss(logp, trees, clip_high=5.0), has_aux=True
    )(jnp.array([[-1e-3, -90.0, -1.0]]))
    self.assertTrue(np.isfinite(loss) and np.isfinite(grad).all())
    for name, value in metrics.items():
      self.assertTrue(np.isfinite(value), name)

  def test_statistics(self):
    ratio = np.array([0.5, 1.0, 2.0, 8.0])
    trees = batch(self.LOGP, ratio, self.A, pads=5)
    _, metrics = cispo.cispo_loss(jnp.array([self.LOGP]), trees, clip_high=5.0)
    want = {
      'ratio/mean': ratio.mean(),
      'ratio/max': 8.0,
      'ratio/p05': 0.5,
      'ratio/p50': 1.0,
      'ratio/p95': 2.0,
      'ratio/clipped': 0.25,
      'ratio/ess': ratio.sum() ** 2 / (4 * (ratio**2).sum()),
    }
    self.assertEqual(set(metrics), set(want))
    for name, value in want.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)

  def test_mismatch_looks_at_fresh_pairs_only(self):
    trees = batch(self.LOGP, (1, 1, 1, 1), self.A, pads=2)
    trees = trees.replace(version_Z=jnp.array([3, 3, 2, 2, -1, -1]))
    gap_Z = jnp.array([0.1, -0.3, 9.0, 9.0, 9.0, 9.0])
    metrics = cispo.mismatch(gap_Z, trees, jnp.int32(3))
    np.testing.assert_allclose(metrics['mismatch/mean'], 0.2, atol=ATOL)
    np.testing.assert_allclose(metrics['mismatch/max'], 0.3, atol=ATOL)
    np.testing.assert_allclose(metrics['mismatch/fresh'], 0.5, atol=ATOL)
    kl = np.mean([np.expm1(0.1) - 0.1, np.expm1(-0.3) + 0.3])
    np.testing.assert_allclose(metrics['mismatch/kl'], kl, atol=ATOL)

  def test_mismatch_of_stale_pairs_alone_is_no_number(self):
    trees = batch(self.LOGP, (1, 1, 1, 1), self.A, pads=2)
    metrics = cispo.mismatch(jnp.ones(6), trees, jnp.int32(7))
    self.assertEqual(float(metrics.pop('mismatch/fresh')), 0)
    for name, value in metrics.items():
      self.assertTrue(np.isnan(value), name)


if __name__ == '__main__':
  absltest.main()
