"""The model: counts, equations, masks, decoding, meshes."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from m2 import config
from m2.model import attention, logprob, moe, params, transformer
from m2.model import cache as kv
from m2.parallel import mesh as meshes
from m2.parallel import sharding
from tests import clock

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5  # relative to the largest value of a leaf

TINY = config.ModelConfig(
  vocab=64,
  d_model=24,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  rotary_dim=4,
  experts=8,
  d_expert=16,
  top_k=2,
  min_k=2,
  dtype='float32',
)


def rows(batch=8, length=12, vocab=64):
  tokens_BT = jax.random.randint(jax.random.key(1), (batch, length), 0, vocab)
  positions_BT = jnp.broadcast_to(jnp.arange(length)[None], tokens_BT.shape)
  return tokens_BT, positions_BT, jnp.full(tokens_BT.shape, length)


def loss(values, cfg, tokens_BT, positions_BT, until_BT):
  out = transformer.forward(cfg, values, tokens_BT, positions_BT, until_BT)
  logp_BT, entropy_BT, logz_BT = logprob.from_hidden(
    values, out.hidden_BTD, tokens_BT, chunk=32
  )
  total = -logp_BT.mean() + 0.1 * entropy_BT.mean() + 0.01 * logz_BT.mean()
  return total + 0.1 * out.balance, out.load_LE


class CountTest(absltest.TestCase):
  def test_full_shape_has_the_published_counts(self):
    start = time.process_time()
    cfg = config.ModelConfig()
    self.assertEqual(params.count(cfg), 228_689_764_864)
    self.assertEqual(params.active_count(cfg), 9_801_356_800)
    # About 0.4 s when idle.
    self.assertLess(time.process_time() - start, 5 * clock.slow())

  def test_every_leaf_has_axes(self):
    cfg = config.ModelConfig(mtp_modules=3)
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2, 1), meshes.AXES)
    shardings = sharding.param_shardings(params.abstract(cfg), mesh)
    self.assertLen(
      jax.tree.leaves(shardings), len(jax.tree.leaves(params.abstract(cfg)))
    )

  def test_indivisible_and_unknown_leaves_are_all_named(self):
    mesh = jax.sharding.AbstractMesh((1, 1, 3, 1, 1), meshes.AXES)
    tree = dict(params.abstract(TINY), stray=jnp.zeros(3))
    with self.assertRaisesRegex(ValueError, 'wi_0.*8.*stray|stray.*wi_0'):
      sharding.param_shardings(tree, mesh)


class EquationTest(parameterized.TestCase):
  def test_rope_turns_half_and_is_relative(self):
    x = jax.random.normal(jax.random.key(0), (1, 6, 4, 8))
    at = jnp.arange(6)[None]
    turned = attention.rotate(x, at, TINY)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    # Hand-written: pairs (i, i + 2) of the 4 rotated dims.
    angle = 3 * TINY.rope_theta ** (-2 * 1 / 4)
    a, b = x[0, 3, 0, 1], x[0, 3, 0, 3]
    np.testing.assert_allclose(
      turned[0, 3, 0, 1], a * np.cos(angle) - b * np.sin(angle), atol=TOLERANCE
    )
    np.testing.assert_allclose(
      turned[0, 3, 0, 3], b * np.cos(angle) + a * np.sin(angle), atol=TOLERANCE
    )
    later = attention.rotate(x, at + 11, TINY)
    for left in (turned, later):
      self.assertEqual(left.shape, x.shape)
    dot = jnp.einsum('bqnh,bknh->bnqk', turned, turned)
    dot_later = jnp.einsum('bqnh,bknh->bnqk', later, later)
    np.testing.assert_allclose(dot, dot_later, atol=1e-4)

  def test_qk_norm_is_over_the_whole_vector(self):
    values = params.init(TINY, jax.random.key(0))
    weights = jax.tree.map(lambda leaf: leaf[0], values['blocks']['attn'])
    weights['q'] = weights['q'].at[:, 0].multiply(100.0)
    x_BTD = jax.random.normal(jax.random.key(1), (1, 3, 24))
    q_BTNH, _, _ = attention.project(
      TINY, weights, x_BTD, jnp.zeros((1, 3), jnp.int32)
    )
    mean_square = jnp.square(q_BTNH).mean((2, 3))
    np.testing.assert_allclose(mean_square, 1, atol=1e-3)
    per_head = jnp.square(q_BTNH).mean(3)[0, 0]
    self.assertGreater(per_head[0], 3.5)  # one head takes nearly all of 4
    self.assertLess(per_head[1:].max(), 0.5)

  def test_moe_equals_a_loop_over_experts(self):
    values = params.init(TINY, jax.random.key(0))
    weights = jax.tree.map(lambda leaf: leaf[0], values['blocks']['moe'])
    weights['bias'] = jax.random.normal(jax.random.key(3), (8,))
    weights = jax.tree.map(lambda w: w * 5, weights)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 5, 24))
    y_BTD, routed = moe.mix(TINY, weights, x_BTD, jnp.ones((2, 5)), None, False)
    x, w = np.float64(x_BTD).reshape(-1, 24), jax.tree.map(np.float64, weights)
    score = 1 / (1 + np.exp(-x @ w['gate']))
    want = np.zeros_like(x)
    for m in range(len(x)):
      chosen = np.argsort(-(score[m] + w['bias']))[:2]
      for e in chosen:
        gate = x[m] @ w['wi_0'][e]
        hidden = gate / (1 + np.exp(-gate)) * (x[m] @ w['wi_1'][e])
        mix = score[m, e] / score[m, chosen].sum()
        want[m] += mix * hidden @ w['wo'][e]
    np.testing.assert_allclose(
      np.array(y_BTD).reshape(-1, 24), want, rtol=1e-3, atol=1e-3
    )
    self.assertEqual(routed['load_E'].sum(), 20)

  def test_adaptive_experts_report_their_mean(self):
    cfg = dataclasses.replace(TINY, top_k=4, min_k=2, min_share=0.251)
    values = params.init(cfg, jax.random.key(0))
    out = transformer.forward(cfg, values, *rows())
    self.assertBetween(float(out.active), 2, 4)
    used = (np.array(out.experts_LBTX) < 8).sum(-1)
    self.assertBetween(used.min(), 2, 4)
    self.assertAlmostEqual(float(out.active), used.mean(), places=5)

  def test_replay_gives_the_same_output(self):
    values = params.init(TINY, jax.random.key(0))
    out = transformer.forward(TINY, values, *rows())
    again = transformer.forward(
      TINY, values, *rows(), experts_LBTX=out.experts_LBTX
    )
    np.testing.assert_allclose(out.hidden_BTD, again.hidden_BTD, atol=TOLERANCE)

  def test_replayed_padding_may_have_no_expert(self):
    values = params.init(TINY, jax.random.key(0))
    tokens_BT, positions_BT, until_BT = rows()
    until_BT = jnp.where(jnp.arange(12)[None] < 9, 9, 0) * jnp.ones_like(
      until_BT
    )
    plain = transformer.forward(TINY, values, tokens_BT, positions_BT, until_BT)
    real_BT1 = (until_BT > 0)[..., None]

    def hidden(values, nobody):
      routes_LBTX = jnp.where(real_BT1[None], plain.experts_LBTX, nobody)
      output = transformer.forward(
        TINY, values, tokens_BT, positions_BT, until_BT,
        experts_LBTX=routes_LBTX,
      )  # fmt: skip
      return jnp.where(real_BT1, output.hidden_BTD, 0)

    for nobody in (-1, TINY.experts):
      np.testing.assert_allclose(
        hidden(values, nobody),
        jnp.where(real_BT1, plain.hidden_BTD, 0),
        atol=TOLERANCE,
      )
      gradient = jax.grad(lambda v, n=nobody: hidden(v, n).sum())(values)
      for leaf in jax.tree.leaves(gradient):
        self.assertTrue(np.isfinite(leaf).all())

  def test_gradient_reaches_all_but_the_bias(self):
    values = params.init(TINY, jax.random.key(0))
    grads, _ = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(
      values, TINY, *rows()
    )
    for path, leaf in jax.tree.leaves_with_path(grads):
      largest = float(jnp.abs(leaf).max())
      if path[-1].key == 'bias':
        self.assertEqual(largest, 0, path)
      else:
        self.assertGreater(largest, 0, path)


class MaskTest(absltest.TestCase):
  def test_packed_documents_do_not_see_each_other(self):
    values = params.init(TINY, jax.random.key(0))
    tokens_BT, _, _ = rows(1, 10)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    until = jnp.array([[4] * 4 + [10] * 6])
    packed = transformer.logits(TINY, values, tokens_BT, positions, until)
    first = transformer.logits(TINY, values, tokens_BT[:, :4])
    second = transformer.logits(TINY, values, tokens_BT[:, 4:])
    both = jnp.concatenate([first, second], 1)
    np.testing.assert_allclose(packed, both, atol=TOLERANCE)

  def test_prefix_tree_equals_separate_rows(self):
    values = params.init(TINY, jax.random.key(0))
    a, b, c = ([5, 9, 3], [7, 1], [2, 8, 4])
    # Tree: a, then children b and c, laid out depth first.
    tokens = jnp.array([a + b + c])
    positions = jnp.array([[0, 1, 2, 3, 4, 3, 4, 5]])
    until = jnp.array([[8, 8, 8, 5, 5, 8, 8, 8]])
    tree = transformer.logits(TINY, values, tokens, positions, until)
    left = transformer.logits(TINY, values, jnp.array([a + b]))
    right = transformer.logits(TINY, values, jnp.array([a + c]))
    np.testing.assert_allclose(tree[:, :5], left, atol=TOLERANCE)
    np.testing.assert_allclose(tree[:, 5:], right[:, 3:], atol=TOLERANCE)


class DecodeTest(absltest.TestCase):
  def test_tokens_one_by_one_equal_the_full_pass(self):
    values = params.init(TINY, jax.random.key(0))
    tokens_BT, positions_BT, _ = rows(4, 12)
    want = transformer.logits(TINY, values, tokens_BT)
    lengths = np.array([3, 5, 4, 1])  # prompts of different length, padded
    cache = kv.empty(TINY, 4, 16)
    live = jnp.arange(5)[None] < jnp.asarray(lengths)[:, None]
    out = transformer.forward(
      TINY,
      values,
      tokens_BT[:, :5],
      positions_BT[:, :5],
      jnp.where(live, 1 << 30, 0),
      cache,
    )
    np.testing.assert_array_equal(out.cache.filled_B, lengths)
    for step in range(7):
      at = jnp.asarray(lengths + step)[:, None]
      token_B1 = jnp.take_along_axis(tokens_BT, at, 1)
      out = transformer.forward(
        TINY, values, token_B1, at, jnp.full((4, 1), 1 << 30), out.cache
      )
      got = transformer.head_logits(values, out.hidden_BTD)[:, 0]
      expected = jnp.take_along_axis(want, at[..., None], 1)[:, 0]
      np.testing.assert_allclose(got, expected, atol=TOLERANCE)


class MeshTest(parameterized.TestCase):
  @parameterized.parameters(
    (2, 2, 2, 1), (2, 1, 2, 2), (8, 1, 1, 1), (1, 2, 4, 1), (1, 1, 1, 1)
  )
  def test_loss_load_and_gradients_equal_one_device(self, *shape):
    values = params.init(TINY, jax.random.key(0))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (want, want_load), want_grads = step(values, TINY, *rows())
    count = int(np.prod(shape))
    mesh = meshes.make_mesh(config.MeshConfig(*shape), jax.devices()[:count])
    with jax.set_mesh(mesh):
      spread = jax.device_put(
        values, sharding.param_shardings(params.abstract(TINY), mesh)
      )
      batch = jax.device_put(rows(), sharding.batch_sharding(mesh))
      (got, load), grads = step(spread, TINY, *batch)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(np.array(load), np.array(want_load))
    for (path, a), b in zip(
      jax.tree.leaves_with_path(grads), jax.tree.leaves(want_grads)
    ):
      a, b = np.array(a), np.array(b)
      scale = max(np.abs(b).max(), 1e-3)
      self.assertLess(np.abs(a - b).max() / scale, GRADIENT_TOLERANCE, path)

  def test_replayed_routes_with_padding_are_the_same_on_any_mesh(self):
    """More choices than a device has experts, more lines than devices."""
    cfg = dataclasses.replace(TINY, top_k=4, min_k=4, layers=1)
    values = params.init(cfg, jax.random.key(0))
    tokens_BT, positions_BT, _ = rows(batch=16)
    until_BT = jnp.where(jnp.arange(12)[None] < 7, 7, 0).repeat(16, 0)
    plain = transformer.forward(cfg, values, tokens_BT, positions_BT, until_BT)
    real_BT1 = (until_BT > 0)[..., None]
    routes_LBTX = jnp.where(real_BT1[None], plain.experts_LBTX, -1)
    mesh = meshes.make_mesh(config.MeshConfig(fsdp=1, expert=8))
    for strategy in ('gather', 'exchange'):
      cfg = dataclasses.replace(cfg, expert_strategy=strategy)
      with jax.set_mesh(mesh):
        output = jax.jit(functools.partial(transformer.forward, cfg))(
          values, tokens_BT, positions_BT, until_BT, experts_LBTX=routes_LBTX
        )
      np.testing.assert_allclose(
        np.where(real_BT1, output.hidden_BTD, 0),
        np.where(real_BT1, plain.hidden_BTD, 0),
        atol=TOLERANCE,
      )

  def test_rows_that_cannot_be_shared_out_are_named(self):
    mesh = meshes.make_mesh(config.MeshConfig(fsdp=8))
    values = params.init(TINY, jax.random.key(0))
    with (
      jax.set_mesh(mesh),
      self.assertRaisesRegex(ValueError, '1 rows are not'),
    ):
      transformer.logits(TINY, values, jnp.zeros((1, 4), jnp.int32))

  def test_sizes_that_do_not_fit_are_named(self):
    with self.assertRaisesRegex(ValueError, 'expert=3'):
      meshes.make_mesh(config.MeshConfig(expert=3))


if __name__ == '__main__':
  absltest.main()
