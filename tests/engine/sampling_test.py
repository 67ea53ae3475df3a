"""Sampling: distributions, filters, seeds."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from m2.engine import sampling

DRAWS = 20_000
# Four standard errors of a frequency near 1/2 over DRAWS draws.
FREQUENCY = 4 * 0.5 / DRAWS**0.5

draw = jax.jit(sampling.sample)


def sample(logits_V, *, seeds=None, **kwargs):
  rows = DRAWS if seeds is None else len(seeds)
  seed_B2 = np.zeros((rows, 2), np.uint32)
  seed_B2[:, 1] = np.arange(rows) if seeds is None else seeds
  options = {'temperature': 1.0, 'top_p': 1.0, 'top_k': 0} | kwargs
  token_and_logp_B = draw(
    np.tile(np.float32(logits_V), (rows, 1)),
    seed_B2,
    np.full(rows, options.get('position', 3), np.int32),
    np.full(rows, options['temperature'], np.float32),
    np.full(rows, options['top_p'], np.float32),
    np.full(rows, options['top_k'], np.int32),
  )
  return jax.device_get(token_and_logp_B)


def frequencies(token_B, vocab):
  return np.bincount(token_B, minlength=vocab) / len(token_B)


class SamplingTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 7, 64, 130)
  def test_draws_follow_the_model(self, vocab):
    logits_V = np.random.default_rng(vocab).normal(size=vocab) * 2
    logits_V[:: max(vocab // 3, 2)] = -np.inf
    if vocab == 1:
      logits_V[:] = 0
    token_B, logp_B = sample(logits_V)
    p_V = np.exp(logits_V) / np.exp(logits_V).sum()
    logp_V = logits_V - np.log(np.exp(logits_V).sum())
    np.testing.assert_allclose(frequencies(token_B, vocab), p_V, atol=FREQUENCY)
    np.testing.assert_allclose(logp_B, logp_V[token_B], atol=1e-5)

  @parameterized.parameters(
    ({'top_k': 2}, [0, 1]),
    ({'top_p': 0.6}, [0, 1]),  # 0.5 does not reach 0.6, 0.8 does
    ({'top_p': 0.5}, [0]),
    ({'top_p': 0.01}, [0]),
    ({'top_k': 3, 'top_p': 0.85}, [0, 1, 2]),
    ({'top_k': 1}, [0]),
    ({'temperature': 0.0}, [0]),
    ({'top_k': 99}, [0, 1, 2, 3]),
  )
  def test_filters_keep_what_they_say(self, options, kept):
    p_V = np.array([0.5, 0.3, 0.15, 0.05])
    token_B, logp_B = sample(np.log(p_V), **options)
    want_V = np.where(np.isin(np.arange(4), kept), p_V, 0)
    np.testing.assert_allclose(
      frequencies(token_B, 4), want_V / want_V.sum(), atol=FREQUENCY
    )
    # The rule: the model's own log-probability, whatever was filtered.
    np.testing.assert_allclose(logp_B, np.log(p_V)[token_B], atol=1e-5)

  def test_temperature_sharpens_the_draw_and_not_the_log_prob(self):
    p_V = np.array([0.6, 0.3, 0.1])
    token_B, logp_B = sample(np.log(p_V), temperature=0.5)
    np.testing.assert_allclose(
      frequencies(token_B, 3), p_V**2 / (p_V**2).sum(), atol=FREQUENCY
    )
    np.testing.assert_allclose(logp_B, np.log(p_V)[token_B], atol=1e-5)

  def test_ties_with_the_last_kept_token_stay(self):
    token_B, _ = sample(np.zeros(4), top_k=2)
    self.assertLen(set(token_B.tolist()), 4)

  def test_draw_depends_on_seed_and_position_only(self):
    logits_V = np.zeros(64)
    alone, _ = sample(logits_V, seeds=[7])
    among, _ = sample(logits_V, seeds=[1, 2, 7, 7, 9])
    self.assertEqual(int(alone[0]), int(among[2]))
    self.assertEqual(int(alone[0]), int(among[3]))
    later, _ = sample(logits_V, seeds=range(64), position=4)
    now, _ = sample(logits_V, seeds=range(64))
    self.assertGreater((now != later).sum(), 32)

  def test_a_filter_in_one_row_leaves_the_others_alone(self):
    rows = 64
    logits_BV = np.zeros((rows, 16), np.float32)
    seed_B2 = np.stack([np.zeros(rows), np.arange(rows)], 1).astype(np.uint32)
    ones, off = np.ones(rows, np.float32), np.zeros(rows, np.int32)
    first = np.where(np.arange(rows) == 0, 1, off)
    plain_B, cut_B = (
      np.asarray(draw(logits_BV, seed_B2, off, ones, ones, top_k_B)[0])
      for top_k_B in (off, first)
    )
    np.testing.assert_array_equal(plain_B[1:], cut_B[1:])

  def test_all_64_bits_of_a_seed_count(self):
    self.assertEqual(sampling.seed_words(5), (0, 5))
    self.assertEqual(sampling.seed_words((3 << 32) + 5), (3, 5))


if __name__ == '__main__':
  absltest.main()
