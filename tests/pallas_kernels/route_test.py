"""Routing, permutation and combination."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels

TOLERANCE = 1e-6
ROUTE = jax.jit(
  pallas_kernels.route, static_argnames=('top_k', 'min_k', 'min_share')
)


def scores(seed, tokens, experts):
  rng = np.random.default_rng(seed)
  return np.float32(1 / (1 + np.exp(-rng.standard_normal((tokens, experts)))))


class RouteTest(parameterized.TestCase):
  @parameterized.parameters((5, 8, 1), (9, 8, 8), (33, 64, 4))
  def test_bias_selects_and_scores_weigh(self, tokens, experts, top_k):
    score_ME = scores(tokens, tokens, experts)
    bias_E = np.zeros(experts, np.float32)
    bias_E[-1] = 10.0
    index_MX, weight_MX = map(np.asarray, ROUTE(score_ME, bias_E, top_k=top_k))
    self.assertTrue((index_MX == experts - 1).any(1).all())
    for m in range(tokens):
      choice = np.argsort(-(score_ME[m] + bias_E))[:top_k]
      self.assertSameElements(index_MX[m], choice)
      chosen = score_ME[m, index_MX[m]]
      np.testing.assert_allclose(
        weight_MX[m], chosen / chosen.sum(), atol=TOLERANCE
      )
    np.testing.assert_allclose(weight_MX.sum(1), 1, atol=TOLERANCE)

  def test_adaptive_keeps_two_to_four(self):
    score_ME = np.float32(
      [
        [0.9, 0.8, 0.7, 0.6, 0.1],  # shares 0.3, 0.27, 0.23, 0.2: all four
        [0.9, 0.8, 0.1, 0.05, 0.01],  # third and fourth too small
        [0.9, 0.8, 0.5, 0.05, 0.01],  # third counts, fourth does not
      ]
    )
    route = functools.partial(ROUTE, top_k=4, min_k=2, min_share=0.15)
    index_MX, weight_MX = route(score_ME, np.zeros(5, np.float32))
    np.testing.assert_array_equal(
      index_MX, [[0, 1, 2, 3], [0, 1, 5, 5], [0, 1, 2, 5]]
    )
    weight_MX = np.asarray(weight_MX)
    np.testing.assert_allclose(weight_MX.sum(1), 1, atol=TOLERANCE)
    np.testing.assert_allclose(
      weight_MX[1], [0.9 / 1.7, 0.8 / 1.7, 0, 0], atol=TOLERANCE
    )

  def test_no_gradient_through_selection(self):
    score_ME = scores(0, 6, 8)

    def mixed(score_ME, bias_E):
      routing = pallas_kernels.route(score_ME, bias_E, top_k=2)
      mixed = (routing.weight_MX * np.arange(2.0)[None]).sum()
      return mixed, routing.index_MX

    (d_score, d_bias), chosen = jax.jit(jax.grad(mixed, (0, 1), has_aux=True))(
      score_ME, np.zeros(8, np.float32)
    )
    self.assertEqual(np.abs(d_bias).max(), 0)
    d_score, chosen = np.asarray(d_score), np.asarray(chosen)
    for m in range(6):
      others = np.delete(d_score[m], chosen[m])
      self.assertEqual(np.abs(others).max(), 0)
      self.assertGreater(np.abs(d_score[m, chosen[m]]).min(), 0)

  def test_bad_counts(self):
    with self.assertRaisesRegex(ValueError, 'top_k=9'):
      pallas_kernels.route(scores(0, 2, 8), np.zeros(8), top_k=9)
    for shape in (1,), (7,), (2, 8), ():
      with self.assertRaisesRegex(ValueError, 'bias .* each of the 8 experts'):
        pallas_kernels.route(scores(0, 2, 8), np.zeros(shape), top_k=2)

  def test_weights_are_float32_whatever_the_scores(self):
    score_ME = scores(0, 5, 8).astype('bfloat16')
    bias_E = np.zeros(8, 'bfloat16')
    run = jax.jit(functools.partial(pallas_kernels.route, top_k=3))
    rounded = run(np.float32(score_ME), np.float32(bias_E))
    for found, want in zip(run(score_ME, bias_E), rounded):
      self.assertEqual(found.dtype, want.dtype)
      np.testing.assert_array_equal(found, want)


class PermuteTest(parameterized.TestCase):
  def test_misfits_are_named(self):
    index_MX = np.zeros((3, 2), np.int32)
    for wrong in {'groups': 0}, {'align': 0}, {'rows': 0}:
      given = {'groups': 4} | wrong
      with self.assertRaisesRegex(ValueError, 'must be positive'):
        pallas_kernels.plan(index_MX, **given)
    for index in index_MX[0], np.float32(index_MX):
      with self.assertRaisesRegex(ValueError, r'expected int\[M, X\]'):
        pallas_kernels.plan(index, 4)
    plan = jax.eval_shape(lambda: pallas_kernels.plan(index_MX, 4))
    plan = jax.tree.map(lambda z: np.zeros(z.shape, z.dtype), plan)
    with self.assertRaisesRegex(ValueError, 'x is .2, 8.; the plan is of 3'):
      pallas_kernels.gather(np.ones((2, 8)), plan)
    with self.assertRaisesRegex(ValueError, 'y is .5, 8.; the plan is of 6'):
      pallas_kernels.combine(np.ones((5, 8)), plan, np.ones((3, 2)))
    for shape in (3, 1), (1, 2), (2, 2):
      with self.assertRaisesRegex(ValueError, 'each choice of the plan'):
        pallas_kernels.combine(np.ones((6, 8)), plan, np.ones(shape))

  @parameterized.parameters(1, 8, 32)
  def test_sorts_stably_and_comes_back(self, align):
    rng = np.random.default_rng(align)
    index_MX = rng.integers(-1, 7, (19, 3))  # -1 and 6: nowhere
    x_MD = np.float32(rng.normal(size=(19, 4)))
    weight_MX = np.float32(rng.uniform(size=(19, 3)))

    @jax.jit
    def move(x_MD, index_MX, weight_MX):
      rows = pallas_kernels.permute(x_MD, index_MX, 6, align=align)
      return rows, pallas_kernels.unpermute(rows.x_PD, rows, weight_MX)

    rows, y_MD = jax.tree.map(np.asarray, move(x_MD, index_MX, weight_MX))
    start = 0
    for group, size in enumerate(rows.sizes_G):
      chose = [
        (m, x) for m in range(19) for x in range(3) if index_MX[m, x] == group
      ]
      self.assertLen(chose, size)
      for offset, (m, x) in enumerate(chose):
        np.testing.assert_array_equal(rows.x_PD[start + offset], x_MD[m])
        self.assertEqual(rows.place_MX[m, x], start + offset)
      padded = -(-size // align) * align
      self.assertEqual(
        np.abs(rows.x_PD[start + size : start + padded]).sum(), 0
      )
      start += padded
    here_MX = (index_MX >= 0) & (index_MX < 6)
    want = x_MD * (weight_MX * here_MX).sum(1)[:, None]
    np.testing.assert_allclose(y_MD, want, atol=1e-5)

  def test_gradients_equal_a_dense_mixture(self):
    rng = np.random.default_rng(1)
    index_MX = rng.integers(0, 5, (11, 2))
    x_MD = np.float32(rng.normal(size=(11, 4)))
    weight_MX = np.float32(rng.uniform(size=(11, 2)))
    scale_E = jnp.asarray(rng.normal(size=5), jnp.float32)

    def sparse(x_MD, weight_MX):
      rows = pallas_kernels.permute(x_MD, index_MX, 5, align=8)
      starts = jnp.cumsum(-(-rows.sizes_G // 8) * 8)
      group_P = jnp.searchsorted(
        starts, jnp.arange(rows.x_PD.shape[0]), side='right'
      )
      y_PD = rows.x_PD * scale_E[jnp.minimum(group_P, 4)][:, None]
      return jnp.sin(pallas_kernels.unpermute(y_PD, rows, weight_MX)).sum()

    def dense(x_MD, weight_MX):
      gain_M = (weight_MX * scale_E[index_MX]).sum(1)
      return jnp.sin(x_MD * gain_M[:, None]).sum()

    got, want = (
      jax.jit(jax.grad(mixture, (0, 1)))(x_MD, weight_MX)
      for mixture in (sparse, dense)
    )
    for ours, spec in zip(got, want, strict=True):
      np.testing.assert_allclose(ours, spec, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
