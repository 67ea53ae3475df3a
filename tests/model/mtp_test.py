"""Multi-token prediction: targets, expansion by copying, a frozen trunk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from m2.model import mtp, params
from tests.model import tiny

CFG = dataclasses.replace(tiny.TINY, mtp_modules=2)


def batch():
  tokens_BT = np.arange(20).reshape(2, 10) % 13
  targets_BT = np.roll(tokens_BT, -1, 1)
  positions_BT = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], list(range(10))])
  until_BT = np.array([[4] * 4 + [10] * 6, [8] * 8 + [0] * 2])
  weights_BT = (np.arange(10) + 1 < until_BT).astype(np.float32)
  return {
    'tokens': tokens_BT,
    'targets': targets_BT,
    'positions': positions_BT,
    'until': until_BT,
    'weights': weights_BT,
  }


def forward(values, data, cfg=CFG):
  return tiny.forward(
    cfg, values, data['tokens'], data['positions'], data['until']
  )


@functools.partial(jax.jit, static_argnums=0)
def loss(cfg, values, data):
  """The modules' loss after a pass through the trunk."""
  return mtp.loss(cfg, values, forward(values, data, cfg), data, chunk=8)


expand = jax.jit(mtp.expand, static_argnums=0)
shifted = jax.jit(functools.partial(mtp.shifted, modules=2))


class MtpTest(absltest.TestCase):
  def test_modules_read_and_predict_further_ahead(self):
    data = batch()
    ahead = jax.device_get(shifted(data))
    # Row 0, document 0 holds tokens 0..3; module 1 at token 0 reads token 1
    # and predicts token 2; at token 2 its target would leave the document.
    np.testing.assert_array_equal(ahead['tokens_JBT'][0, 0, :3], [1, 2, 3])
    np.testing.assert_array_equal(ahead['targets_JBT'][0, 0, :2], [2, 3])
    np.testing.assert_array_equal(
      ahead['weights_JBT'][0, 0], [1, 1, 0, 0, 1, 1, 1, 1, 0, 0]
    )
    np.testing.assert_array_equal(
      ahead['weights_JBT'][1, 0], [1, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    )

  def test_only_tokens_that_read_something_count_as_load(self):
    cfg = dataclasses.replace(CFG, mtp_modules=3)
    _, extra = loss(cfg, tiny.weights(cfg), batch())
    # Documents of 4, 6 and 8 tokens; module j reads j fewer of each.
    want = [cfg.top_k * sum(n - j for n in (4, 6, 8)) for j in (1, 2, 3)]
    np.testing.assert_array_equal(np.asarray(extra['load_JE']).sum(1), want)

  def test_rows_shorter_than_there_are_modules(self):
    data = {name: value[:, :1] for name, value in batch().items()}
    ahead = jax.device_get(shifted(data))
    self.assertEqual(ahead['tokens_JBT'].shape, (2, 2, 1))
    self.assertFalse(ahead['weights_JBT'].any())

  def test_other_documents_do_not_matter(self):
    data = batch()
    data['weights'][0, 4:] = data['weights'][1] = 0
    other = batch() | {'weights': data['weights']}
    other['tokens'][0, 4:] += 1  # the second document
    first, second = (loss(CFG, tiny.weights(CFG), x)[0] for x in (data, other))
    np.testing.assert_allclose(first, second, rtol=1e-6)

  def test_expansion_copies_and_leaves_the_trunk(self):
    plain = tiny.weights()
    one = dataclasses.replace(CFG, mtp_modules=1)
    three = dataclasses.replace(CFG, mtp_modules=3)
    grown = expand(one, plain)
    grown['mtp']['proj'] += 0.01
    larger = expand(three, grown)
    for leaf in jax.tree.leaves(larger['mtp']):
      self.assertEqual(leaf.shape[0], 3)
      leaf = np.asarray(leaf)
      np.testing.assert_array_equal(leaf[0], leaf[2])
    self.assertEqual(
      jax.tree.map(jnp.shape, larger),
      jax.tree.map(lambda leaf: leaf.shape, params.abstract(three)),
    )
    data = batch()
    np.testing.assert_array_equal(
      forward(plain, data).hidden_BTD, forward(larger, data).hidden_BTD
    )
    with self.assertRaisesRegex(ValueError, '3 MTP modules'):
      mtp.expand(one, larger)

  def test_expansion_from_the_trunk_starts_below_random(self):
    grown = expand(CFG, tiny.weights())
    total_J, aux = loss(CFG, grown, batch())
    self.assertTrue(np.isfinite(total_J).all())
    self.assertEqual(aux['load_JE'].shape, (2, 8))


if __name__ == '__main__':
  absltest.main()
