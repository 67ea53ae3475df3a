"""The model: counts, equations, masks, decoding, meshes."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2 import config
from m2.model import attention, logprob, moe, params, transformer
from m2.model import cache as kv
from m2.parallel import mesh as meshes
from m2.parallel import sharding
from tests import clock
from tests.model import tiny
from tests.model.tiny import TINY

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5  # relative to the largest value of a leaf


def rows(batch=8, length=12, vocab=64):
  tokens_BT = np.random.default_rng(1).integers(0, vocab, (batch, length))
  positions_BT = np.broadcast_to(np.arange(length), tokens_BT.shape)
  return tokens_BT, positions_BT, np.full(tokens_BT.shape, length)


def loss(values, cfg, tokens_BT, positions_BT, until_BT):
  out = transformer.forward(cfg, values, tokens_BT, positions_BT, until_BT)
  logp_BT, entropy_BT, logz_BT = logprob.from_hidden(
    values, out.hidden_BTD, tokens_BT, chunk=32
  )
  total = -logp_BT.mean() + 0.1 * entropy_BT.mean() + 0.01 * logz_BT.mean()
  return total + 0.1 * out.balance, out.load_LE


gradients = jax.jit(
  jax.value_and_grad(loss, has_aux=True), static_argnames='cfg'
)


def layer():
  """The first layer's weights, to be changed."""
  return jax.tree.map(lambda leaf: leaf[0].copy(), tiny.weights()['blocks'])


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
    tree = dict(params.abstract(TINY), stray=np.zeros(3))
    with self.assertRaisesRegex(ValueError, 'wi_0.*8.*stray|stray.*wi_0'):
      sharding.param_shardings(tree, mesh)


class EquationTest(parameterized.TestCase):
  def test_rope_turns_half_and_is_relative(self):
    x = np.random.default_rng(0).standard_normal((1, 6, 4, 8), np.float32)
    at = np.arange(6)[None]
    rotate = jax.jit(lambda x, at: attention.rotate(x, at, TINY))
    turned, later = jax.device_get((rotate(x, at), rotate(x, at + 11)))
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
    for left in (turned, later):
      self.assertEqual(left.shape, x.shape)
    dot = np.einsum('bqnh,bknh->bnqk', turned, turned)
    dot_later = np.einsum('bqnh,bknh->bnqk', later, later)
    np.testing.assert_allclose(dot, dot_later, atol=1e-4)

  def test_qk_norm_is_over_the_whole_vector(self):
    weights = layer()['attn']
    weights['q'][:, 0] *= 100
    x_BTD = np.random.default_rng(1).standard_normal((1, 3, 24), np.float32)
    q_BTNH, _, _ = jax.jit(functools.partial(attention.project, TINY))(
      weights, x_BTD, np.zeros((1, 3), np.int32)
    )
    q_BTNH = np.asarray(q_BTNH)
    mean_square = np.square(q_BTNH).mean((2, 3))
    np.testing.assert_allclose(mean_square, 1, atol=1e-3)
    per_head = np.square(q_BTNH).mean(3)[0, 0]
    self.assertGreater(per_head[0], 3.5)  # one head takes nearly all of 4
    self.assertLess(per_head[1:].max(), 0.5)

  def test_moe_equals_a_loop_over_experts(self):
    rng = np.random.default_rng(1)
    weights = layer()['moe']
    weights['bias'] = rng.standard_normal(8, np.float32)
    weights = jax.tree.map(lambda w: w * 5, weights)
    x_BTD = rng.standard_normal((2, 5, 24), np.float32)
    y_BTD, routed = jax.jit(
      lambda weights, x_BTD: moe.mix(
        TINY, weights, x_BTD, jnp.ones((2, 5)), None, False
      )
    )(weights, x_BTD)
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
    self.assertEqual(np.sum(routed['load_E']), 20)

  def test_adaptive_experts_report_their_mean(self):
    cfg = dataclasses.replace(TINY, top_k=4, min_k=2, min_share=0.251)
    out = tiny.forward(cfg, tiny.weights(cfg), *rows())
    self.assertBetween(float(out.active), 2, 4)
    used = (np.array(out.experts_LBTX) < 8).sum(-1)
    self.assertBetween(used.min(), 2, 4)
    self.assertAlmostEqual(float(out.active), used.mean(), places=5)

  def test_replay_gives_the_same_output(self):
    out = tiny.forward(TINY, tiny.weights(), *rows())
    again = tiny.forward(
      TINY, tiny.weights(), *rows(), experts_LBTX=out.experts_LBTX
    )
    np.testing.assert_allclose(out.hidden_BTD, again.hidden_BTD, atol=TOLERANCE)

  def test_replayed_padding_may_have_no_expert(self):
    tokens_BT, positions_BT, until_BT = rows()
    until_BT = np.where(positions_BT < 9, 9, 0)
    batch = tokens_BT, positions_BT, until_BT
    plain = tiny.forward(TINY, tiny.weights(), *batch)
    real_BT1 = (until_BT > 0)[..., None]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(values, routes_LBTX):
      output = transformer.forward(
        TINY, values, *batch, experts_LBTX=routes_LBTX
      )
      hidden_BTD = jnp.where(real_BT1, output.hidden_BTD, 0)
      return hidden_BTD.sum(), hidden_BTD

    for nobody in (-1, TINY.experts):
      routes_LBTX = np.where(real_BT1, plain.experts_LBTX, nobody)
      (_, hidden_BTD), gradient = run(tiny.weights(), routes_LBTX)
      np.testing.assert_allclose(
        hidden_BTD, np.where(real_BT1, plain.hidden_BTD, 0), atol=TOLERANCE
      )
      for leaf in jax.tree.leaves(gradient):
        self.assertTrue(np.isfinite(leaf).all())

  def test_gradient_reaches_all_but_the_bias(self):
    _, grads = gradients(tiny.weights(), TINY, *rows())
    for path, leaf in jax.tree.leaves_with_path(grads):
      largest = np.abs(leaf).max()
      if path[-1].key == 'bias':
        self.assertEqual(largest, 0, path)
      else:
        self.assertGreater(largest, 0, path)


class MaskTest(absltest.TestCase):
  def test_packed_documents_do_not_see_each_other(self):
    values = tiny.weights()
    tokens_BT, _, _ = rows(1, 10)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    until = np.array([[4] * 4 + [10] * 6])
    packed = tiny.logits(TINY, values, tokens_BT, positions, until)
    first = tiny.logits(TINY, values, tokens_BT[:, :4])
    second = tiny.logits(TINY, values, tokens_BT[:, 4:])
    both = np.concatenate([first, second], 1)
    np.testing.assert_allclose(packed, both, atol=TOLERANCE)

  def test_prefix_tree_equals_separate_rows(self):
    values = tiny.weights()
    a, b, c = ([5, 9, 3], [7, 1], [2, 8, 4])
    # Tree: a, then children b and c, laid out depth first.
    tokens = np.array([a + b + c])
    positions = np.array([[0, 1, 2, 3, 4, 3, 4, 5]])
    until = np.array([[8, 8, 8, 5, 5, 8, 8, 8]])
    run = lambda *rows: np.asarray(tiny.logits(TINY, values, *rows))
    tree = run(tokens, positions, until)
    left, right = run(np.array([a + b])), run(np.array([a + c]))
    np.testing.assert_allclose(tree[:, :5], left, atol=TOLERANCE)
    np.testing.assert_allclose(tree[:, 5:], right[:, 3:], atol=TOLERANCE)


class DecodeTest(absltest.TestCase):
  def test_tokens_one_by_one_equal_the_full_pass(self):
    values = tiny.weights()
    tokens_BT, positions_BT, _ = rows(4, 12)
    want = np.asarray(tiny.logits(TINY, values, tokens_BT))
    head = jax.jit(transformer.head_logits)
    lengths = np.array([3, 5, 4, 1])  # prompts of different length, padded
    cache = kv.empty(TINY, 4, 16)
    live = np.arange(5) < lengths[:, None]
    out = tiny.forward(
      TINY,
      values,
      tokens_BT[:, :5],
      positions_BT[:, :5],
      np.where(live, 1 << 30, 0),
      cache,
    )
    np.testing.assert_array_equal(out.cache.filled_B, lengths)
    for step in range(7):
      at = (lengths + step)[:, None]
      token_B1 = np.take_along_axis(tokens_BT, at, 1)
      out = tiny.forward(
        TINY, values, token_B1, at, np.full((4, 1), 1 << 30), out.cache
      )
      got = np.asarray(head(values, out.hidden_BTD))[:, 0]
      expected = np.take_along_axis(want, at[..., None], 1)[:, 0]
      np.testing.assert_allclose(got, expected, atol=TOLERANCE)


class MeshTest(parameterized.TestCase):
  def test_loss_load_and_gradients_equal_one_device(self):
    self.compare(2, 2, 2, 1)

  @parameterized.parameters(
    (2, 1, 2, 2), (8, 1, 1, 1), (1, 2, 4, 1), (1, 1, 1, 1)
  )
  @pytest.mark.heavy
  def test_so_they_do_on_other_meshes(self, *shape):
    self.compare(*shape)

  def compare(self, *shape):
    values = tiny.weights()
    (want, want_load), want_grads = gradients(values, TINY, *rows())
    count = int(np.prod(shape))
    mesh = meshes.make_mesh(config.MeshConfig(*shape), jax.devices()[:count])
    with jax.set_mesh(mesh):
      spread = jax.device_put(
        values, sharding.param_shardings(params.abstract(TINY), mesh)
      )
      batch = jax.device_put(rows(), sharding.batch_sharding(mesh))
      (got, load), grads = gradients(spread, TINY, *batch)
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
    tokens_BT, positions_BT, _ = rows(batch=16)
    until_BT = np.where(positions_BT < 7, 7, 0)
    batch = tiny.weights(cfg), tokens_BT, positions_BT, until_BT
    plain = tiny.forward(cfg, *batch)
    real_BT1 = (until_BT > 0)[..., None]
    routes_LBTX = np.where(real_BT1, plain.experts_LBTX, -1)
    mesh = meshes.make_mesh(config.MeshConfig(fsdp=1, expert=8))
    for strategy in ('gather', 'exchange'):
      cfg = dataclasses.replace(cfg, expert_strategy=strategy)
      with jax.set_mesh(mesh):
        output = tiny.forward(cfg, *batch, experts_LBTX=routes_LBTX)
      np.testing.assert_allclose(
        np.where(real_BT1, output.hidden_BTD, 0),
        np.where(real_BT1, plain.hidden_BTD, 0),
        atol=TOLERANCE,
      )

  def test_rows_that_cannot_be_shared_out_are_named(self):
    mesh = meshes.make_mesh(config.MeshConfig(fsdp=8))
    values = tiny.weights()
    with (
      jax.set_mesh(mesh),
      self.assertRaisesRegex(ValueError, '1 rows are not'),
    ):
      tiny.logits(TINY, values, np.zeros((1, 4), np.int32))

  @parameterized.parameters(
    (np.ones((1, 4), np.float32), None, 'tokens are float32'),
    (np.ones(4, np.int32), None, r'tokens are \(4,\): \[B, T\]'),
    ([[1, -1]], None, 'tokens are -1 to 1'),
    ([[1, 2**40]], None, f'tokens are 1 to {2**40}: 0 to {TINY.vocab - 1}'),
    ([[1, 2]], np.ones((1, 2)), 'positions are float64'),
  )
  def test_tokens_that_are_no_ids_are_refused(self, tokens, positions, named):
    with self.assertRaisesRegex(ValueError, named):
      transformer.logits(TINY, None, tokens, positions)

  @parameterized.parameters(
    {'rotary_dim': 3},
    {'dtype': 'float16'},
    {'layers': 0},
    {'heads': 5},
  )
  def test_a_shape_that_is_no_model_is_refused(self, **fields):
    cfg = dataclasses.replace(TINY, **fields)
    before = set(config.Settings.READS)
    ((name, value),) = fields.items()
    with self.assertRaisesRegex(ValueError, f'model.{name}=.?{value}'):
      params.abstract(cfg)
    with self.assertRaisesRegex(ValueError, f'model.{name}=.?{value}'):
      params.init(cfg, jax.random.key(0))
    self.assertEqual(config.Settings.READS, before)

  def test_sizes_that_do_not_fit_are_named(self):
    with self.assertRaisesRegex(ValueError, 'expert=3'):
      meshes.make_mesh(config.MeshConfig(expert=3))


if __name__ == '__main__':
  absltest.main()
