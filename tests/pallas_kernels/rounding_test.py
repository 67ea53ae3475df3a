"""Token rounding against a loop over experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import pallas_kernels

# Tokens, experts, own choices, spare choices, tile.
CASES = (
  (33, 8, 2, 1, 4),
  (64, 8, 2, 2, 16),
  (100, 16, 4, 4, 8),
  (300, 6, 3, 3, 128),
  (17, 4, 2, 0, 1),
  (5, 8, 8, 0, 3),
  (1, 4, 1, 3, 2),
)
ROUND = jax.jit(
  pallas_kernels.round_tokens, static_argnames=('experts', 'top_k', 'tile')
)


def chosen(case, seed=0):
  """Routing of coarse scores, so that there are ties, and its scores."""
  tokens, experts, top_k, spare, _ = case
  rng = np.random.default_rng([seed, *case])
  score_ME = np.float32(rng.integers(1, 20, (tokens, experts)) / 20)
  score_ME[:, 0] += 0.3  # one that more want
  bias_E = np.zeros(experts, np.float32)
  routing = pallas_kernels.route(score_ME, bias_E, top_k=top_k + spare)
  rank_MX = np.take_along_axis(score_ME, np.asarray(routing.index_MX), 1)
  return jax.tree.map(np.asarray, routing), rank_MX


def rounded(routing, rank_MX, case):
  _, experts, top_k, _, tile = case
  found = ROUND(routing, rank_MX, experts=experts, top_k=top_k, tile=tile)
  return jax.tree.map(np.asarray, found)


def oracle(index_MX, rank_MX, case):
  """Which choices stay, one expert after the other."""
  _, experts, top_k, _, tile = case
  keep_MX = np.zeros(index_MX.shape, bool)
  for expert in range(experts):
    own, spare = [], []
    for m, x in np.argwhere(index_MX == expert):
      (own if x < top_k else spare).append((-rank_MX[m, x], m, x))
    down = len(own) // tile * tile
    closer = len(own) - down >= tile / 2
    enough = len(own) + len(spare) >= down + tile
    target = down + tile if closer and enough else down
    for _, m, x in (sorted(own) + sorted(spare))[:target]:
      keep_MX[m, x] = True
  return keep_MX


class RoundingTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_equals_a_loop_over_experts(self, *case):
    routing, rank_MX = chosen(case)
    found = rounded(routing, rank_MX, case)
    keep_MX = oracle(routing.index_MX, rank_MX, case)
    np.testing.assert_array_equal(
      found.index_MX, np.where(keep_MX, routing.index_MX, case[1])
    )
    weight_MX = np.where(keep_MX, rank_MX, 0)
    total_M1 = weight_MX.sum(1, keepdims=True)
    want_MX = weight_MX / np.where(total_M1 > 0, total_M1, 1)
    np.testing.assert_allclose(found.weight_MX, want_MX, atol=1e-6)

  @parameterized.parameters(*CASES)
  def test_tiles_are_whole_and_close(self, *case):
    _, experts, top_k, _, tile = case
    routing, rank_MX = chosen(case, seed=1)
    found = rounded(routing, rank_MX, case)
    sizes_E = np.bincount(found.index_MX.ravel(), minlength=experts + 1)[:-1]
    own_E = np.bincount(routing.index_MX[:, :top_k].ravel(), minlength=experts)
    np.testing.assert_array_equal(sizes_E % tile, 0)
    self.assertLess(abs(sizes_E - own_E).max(), tile)
    most = pallas_kernels.rounded_rows(len(rank_MX), experts, top_k, tile)
    self.assertLessEqual(sizes_E.sum(), most)

  def test_spare_choices_are_enough_to_round_up(self):
    tokens, experts, top_k, tile = 2048, 32, 4, 128
    spare = pallas_kernels.spare_choices(tokens, experts, top_k, tile)
    self.assertEqual((spare, pallas_kernels.spare_choices(9, 8, 2, 9)), (2, 2))
    case = tokens, experts, top_k, spare, tile
    routing, rank_MX = chosen(case)
    own_E = np.bincount(routing.index_MX[:, :top_k].ravel(), minlength=experts)
    found = rounded(routing, rank_MX, case)
    sizes_E = np.bincount(found.index_MX.ravel(), minlength=experts + 1)[:-1]
    np.testing.assert_array_equal(
      sizes_E, (own_E + tile // 2) // tile * tile, str(own_E)
    )

  def test_rounding_up_every_expert_fills_the_room(self):
    tile, experts = 4, 3
    own, spare = tile + tile // 2, tile // 2
    index_MX = np.full((experts * own, 2), experts)
    for expert in range(experts):
      rows = slice(expert * own, (expert + 1) * own)
      index_MX[rows, 0] = expert
      index_MX[rows, 1][:spare] = (expert + 1) % experts
    routing = pallas_kernels.Routing(index_MX, np.ones(index_MX.shape))
    shape = len(index_MX), experts, 1, 1, tile
    found = rounded(routing, np.ones(index_MX.shape), shape)
    kept = (found.index_MX < experts).sum()
    self.assertEqual(
      kept, pallas_kernels.rounded_rows(len(index_MX), experts, 1, tile)
    )

  @parameterized.parameters('uint8', 'int16', 'uint32')
  def test_indices_of_few_bits(self, dtype):
    case = 300, 200, 2, 2, 2
    routing, rank_MX = chosen(case)
    few = routing._replace(index_MX=routing.index_MX.astype(dtype))
    for got, want in zip(
      rounded(few, rank_MX, case), rounded(routing, rank_MX, case)
    ):
      np.testing.assert_array_equal(got, want)

  def test_no_tokens(self):
    none = np.zeros((0, 3))
    self.assertEqual(pallas_kernels.spare_choices(0, 8, 2, 4), 2)
    found = rounded(
      pallas_kernels.Routing(none.astype(np.int32), none), none, (0, 8, 2, 1, 4)
    )
    self.assertEqual(found.index_MX.shape, (0, 3))

  def test_a_token_that_loses_all_its_experts_weighs_nothing(self):
    routing = pallas_kernels.Routing(
      np.int32([[0], [0], [0], [1]]), np.ones((4, 1), np.float32)
    )
    rank_MX = np.float32([[0.5], [0.9], [0.9], [0.1]])
    found = rounded(routing, rank_MX, (4, 2, 1, 0, 2))
    np.testing.assert_array_equal(found.index_MX[:, 0], [2, 0, 0, 2])
    np.testing.assert_array_equal(found.weight_MX[:, 0], [0, 1, 1, 0])

  def test_gradients_are_those_of_the_scores_that_stay(self):
    case = 40, 8, 2, 2, 8
    routing, rank_MX = chosen(case)
    _, experts, top_k, _, tile = case
    keep_MX = oracle(routing.index_MX, rank_MX, case)
    pull_MX = np.random.default_rng(2).standard_normal(rank_MX.shape)

    def through(score_MX):
      weight_MX = score_MX / score_MX.sum(1, keepdims=True)
      found = pallas_kernels.round_tokens(
        pallas_kernels.Routing(routing.index_MX, weight_MX),
        score_MX, experts, top_k=top_k, tile=tile,
      )  # fmt: skip
      return (found.weight_MX * pull_MX).sum()

    def direct(score_MX):
      kept_MX = jnp.where(keep_MX, score_MX, 0)
      total_M1 = kept_MX.sum(1, keepdims=True)
      return (kept_MX / jnp.where(total_M1 > 0, total_M1, 1) * pull_MX).sum()

    got, want = (jax.jit(jax.grad(f))(rank_MX) for f in (through, direct))
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_devices_that_share_experts_round_all_their_tokens(self):
    if len(jax.devices()) < 4:
      self.skipTest('needs four devices, as there are on CPUs')
    case = 64, 8, 2, 2, 16
    routing, rank_MX = chosen(case)
    run = functools.partial(
      pallas_kernels.round_tokens,
      experts=8, top_k=2, tile=16, axis='expert',
    )  # fmt: skip
    with jax.set_mesh(jax.make_mesh((4,), ('expert',))):
      split = jax.jit(jax.shard_map(run, out_specs=jax.P('expert')))
      found = split(*jax.device_put((routing, rank_MX), jax.P('expert')))
    for got, want in zip(found, rounded(routing, rank_MX, case)):
      np.testing.assert_array_equal(got, want)

  def test_bad_arguments_are_named(self):
    routing, rank_MX = chosen(CASES[0])
    run = functools.partial(pallas_kernels.round_tokens, routing, experts=8)
    with self.assertRaisesRegex(ValueError, 'top_k=4 <= 3'):
      run(rank_MX, top_k=4, tile=4)
    with self.assertRaisesRegex(ValueError, 'tile=0 positive'):
      run(rank_MX, top_k=2, tile=0)
    with self.assertRaisesRegex(ValueError, r'ranks \(33, 2\)'):
      run(rank_MX[:, :2], top_k=2, tile=4)
    with self.assertRaisesRegex(TypeError, 'float'):
      run(rank_MX, top_k=2, tile=2.5)


if __name__ == '__main__':
  absltest.main()
