"""Rows cut over the `context` axis: the same numbers as on one device.

The rows hold what masks can be: one long document, packed documents, a prefix
tree in depth-first order, padding. Parts of a row cut through all of them.
"""

import dataclasses
import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2 import config
from m2.model import cache as kv
from m2.model import mtp, params, transformer
from m2.parallel import context, sharding
from m2.parallel import mesh as meshes
from m2.train import loop, step
from pallas_kernels.attention import blocks, ref, xla
from tests.bench import configs
from tests.parallel import loops
from tests.train import small

RELATIVE = 1e-5  # to the largest value of a leaf
LENGTH = 32
CFG = small.run_config(
  model={'heads': 8, 'kv_heads': 4, 'remat': 'block'},
  loss={'balance': 0.1, 'z': 0.01},
)
MODEL = CFG.model
# With two modules that look ahead, whose programs are twice as long.
AHEAD = dataclasses.replace(
  CFG,
  model=dataclasses.replace(MODEL, mtp_modules=2),
  loss=dataclasses.replace(CFG.loss, mtp=0.3, mtp_final=0.1, chunk=8),
)


def rows() -> dict[str, np.ndarray]:
  """Four rows of tokens, weights and masks."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, MODEL.vocab, (4, LENGTH + 1)).astype(np.int32)
  index = np.arange(LENGTH, dtype=np.int32)
  ends = np.array([5, 6, 19, 32])
  document = np.searchsorted(ends, index, side='right')
  starts = np.array([0, 5, 6, 19])
  # A trunk of 9 tokens; branches of 8 and 12, the second with two of its own.
  tree = np.repeat([29, 17, 29, 24, 29, 0], [9, 8, 3, 4, 5, 3])
  depth = np.concatenate(
    [
      range(9),
      range(9, 17),
      range(9, 12),
      range(12, 16),
      range(12, 17),
      [0] * 3,
    ]
  )
  short = np.where(index < 7, 7, 0)
  until = np.stack([np.full(LENGTH, LENGTH), ends[document], tree, short])
  positions = np.stack([index, index - starts[document], depth, index])
  weights = rng.random((4, LENGTH)) * (index + 1 < until)
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': weights.astype(np.float32),
    'positions': positions.astype(np.int32),
    'until': until.astype(np.int32),
  }


def gradients(cfg: config.RunConfig):
  """A fresh jitted function of parameters and batch."""
  function = functools.partial(step.gradients, model=cfg.model, cfg=cfg, step=3)
  return jax.jit(function)


@functools.cache
def on_one_device(cfg: config.RunConfig):
  values = params.init(cfg.model, jax.random.key(0))
  return jax.device_get((values, gradients(cfg)(values, rows())))


def compare(cfg: config.RunConfig, sizes: config.MeshConfig) -> None:
  """Gradients and metrics on the mesh against those of one device."""
  values, (want, want_metrics) = on_one_device(cfg)
  mesh = meshes.make_mesh(sizes)
  values = jax.device_put(values, sharding.param_shardings(values, mesh))
  with jax.set_mesh(mesh):
    batch = jax.device_put(rows(), sharding.batch_sharding(mesh))
    run = gradients(cfg).lower(values, batch).compile()
    assert not loops.unordered(run.as_text())
    got, metrics = jax.device_get(run(values, batch))
  for found, expected in ((got, want), (metrics, want_metrics)):
    expected = small.leaves(expected)
    assert expected
    for path, leaf in small.leaves(found).items():
      scale = max(np.abs(expected[path]).max(), 1e-3)
      error = np.abs(leaf - expected[path]).max() / scale
      assert error < RELATIVE, (path, error)


def block_by_block():
  """Long-row attention for these short rows, in blocks of four."""
  return (
    mock.patch.object(xla, 'UNROLLED', 0),
    mock.patch.object(blocks, 'BLOCK', 4),
  )


def factorisations() -> list[config.MeshConfig]:
  """Every mesh of eight devices that cuts rows."""
  found = []
  for sizes in itertools.product((1, 2, 4, 8), repeat=len(meshes.AXES)):
    named = dict(zip(meshes.AXES, sizes))
    if math.prod(sizes) == 8 and named['context'] > 1:
      found.append(config.MeshConfig(**named))
  return found


class ModelTest(parameterized.TestCase):
  @pytest.mark.heavy
  def test_equals_one_device_also_block_by_block(self):
    on_one_device(AHEAD)  # not block by block
    small_rows, small_blocks = block_by_block()
    with small_rows, small_blocks:
      compare(AHEAD, config.MeshConfig(expert=2, context=2, tensor=2))

  @pytest.mark.heavy
  def test_equals_one_device_for_some_factorisations(self):
    self.compare_all(factorisations()[::4])

  @pytest.mark.exhaustive
  def test_equals_one_device_for_every_factorisation(self):
    found = factorisations()
    self.assertLen(found, 15)
    self.compare_all(found)

  def compare_all(self, found):
    for sizes in found:
      with self.subTest(str(sizes)):
        compare(CFG, sizes)

  def test_a_cache_is_refused(self):
    mesh = meshes.make_mesh(config.MeshConfig(context=2))
    with (
      jax.set_mesh(mesh),
      self.assertRaisesRegex(ValueError, 'mesh.context=2.*whole rows'),
    ):
      batch = jax.ShapeDtypeStruct((4, 4), jnp.int32)
      jax.eval_shape(
        lambda values, batch: transformer.forward(
          MODEL, values, batch, batch, batch, kv.empty(MODEL, 4, 8)
        ),
        params.abstract(MODEL),
        batch,
      )


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters(2, 3, 4, 8, 16)
  def test_work_is_even_and_every_device_takes_part(self, parts):
    done = np.zeros((2, parts), int)
    for slot in (0, 1):
      owners, workers = zip(*context.travels(parts, slot))
      self.assertEqual(sorted(owners), list(range(parts)))
      self.assertEqual(sorted(workers), list(range(parts)))
      done[slot, list(workers)] = 2 * np.array(owners) + slot
    np.testing.assert_array_equal(done.sum(0), 2 * parts - 1)

  @parameterized.parameters(3, 8)
  def test_equals_the_specification(self, parts):
    rng = np.random.default_rng(0)
    length = 6 * parts
    q, k, v, dy = (
      rng.standard_normal((2, length, heads, 8), np.float32)
      for heads in (4, 2, 2, 4)
    )
    until = np.arange(length) + rng.integers(0, length, (2, length))
    until[:, -2:] = 0
    query = np.broadcast_to(np.arange(length), (2, length))

    @jax.jit
    def reference(q, k, v, dy):
      want, pull = jax.vjp(
        lambda *x: ref.attention(*x, until, query, scale=0.3), q, k, v
      )
      return want, pull(dy)

    want, want_grads = jax.device_get(reference(q, k, v, dy))
    tokens = sharding.spec('batch', 'sequence', None, None)
    mesh = meshes.make_mesh(
      config.MeshConfig(data=1, context=parts), jax.devices()[:parts]
    )
    small_rows, small_blocks = block_by_block()
    with jax.set_mesh(mesh), small_rows, small_blocks:
      run = sharding.manual(
        functools.partial(context.attention, scale=0.3),
        (tokens, tokens, tokens, sharding.spec('batch', 'sequence')),
        tokens,
      )

      @jax.jit
      def ours(q, k, v, dy):
        got, pull = jax.vjp(lambda *x: run(*x, until), q, k, v)
        return got, pull(sharding.place(dy, 'batch', 'sequence', None, None))

      got, grads = jax.device_get(ours(q, k, v, dy))
    np.testing.assert_allclose(got, want, atol=2e-6)
    for mine, theirs in zip(grads, want_grads):
      np.testing.assert_allclose(mine, theirs, atol=2e-5)

  def test_lengths_that_cannot_be_cut_are_named(self):
    cfg = small.run_config(mesh={'context': 8}, data={'length': 24})
    with self.assertRaisesRegex(
      ValueError, '24 tokens .*16 = 2 . mesh.context'
    ):
      loop._check(cfg, meshes.make_mesh(cfg.mesh))

  def test_modes_that_generate_are_refused(self):
    tree = configs.config_dict('configs/eval.py')
    tree.mesh.context = 2
    with self.assertRaisesRegex(ValueError, "mesh.context=2: mode 'eval'"):
      config.RunConfig.from_config(tree)


class AheadTest(absltest.TestCase):
  def test_modules_look_into_the_next_part(self):
    data = rows()
    want = jax.jit(functools.partial(mtp.shifted, modules=2))(data)
    mesh = meshes.make_mesh(config.MeshConfig(context=8))
    with jax.set_mesh(mesh):
      batch = jax.device_put(data, sharding.batch_sharding(mesh))
      got = jax.jit(functools.partial(mtp.shifted, modules=2))(batch)
      with self.assertRaisesRegex(ValueError, '5 tokens ahead.*mesh.context=8'):
        jax.eval_shape(functools.partial(mtp.shifted, modules=5), batch)
    for name, value in want.items():
      np.testing.assert_array_equal(got[name], value, name)


if __name__ == '__main__':
  absltest.main()
