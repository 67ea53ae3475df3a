"""Bytes against the program's own collectives; choices that must not flip."""

import dataclasses
import math

import jax
from absl.testing import absltest, parameterized
from jax.extend import core as extend_core

from m2 import config
from m2.parallel import cost, experts
from m2.parallel import mesh as meshes
from tests.parallel import routings

KINDS = {
  'all_gather': 'all-gather',
  'reduce_scatter': 'reduce-scatter',
  'all_to_all': 'all-to-all',
}


def m2(tokens: int, devices: int) -> cost.Layer:
  return cost.Layer(tokens, 8, 3072, 1536, 256 // devices, devices, 2)


def collectives(jaxpr, ways: int, found: dict[str, float]) -> dict[str, float]:
  """Bytes that a device receives over `expert`; not of rounds of the rest."""
  for eqn in jaxpr.eqns:
    kind, axes = KINDS.get(eqn.primitive.name), eqn.params.get('axis_name')
    if kind and 'expert' in (axes if isinstance(axes, tuple) else (axes,)):
      sides = [*eqn.invars, *eqn.outvars]
      whole = max(z.aval.size * z.aval.dtype.itemsize for z in sides)
      found[kind] = found.get(kind, 0) + whole * (ways - 1) / ways
    if eqn.primitive.name != 'while':
      for inner in extend_core.jaxprs_in_params(eqn.params):
        collectives(inner, ways, found)
  return found


class BytesTest(parameterized.TestCase):
  @parameterized.product(strategy=('gather', 'exchange'), chunks=(1, 2))
  def test_are_those_of_the_program(self, strategy, chunks):
    ways = 4
    mesh = meshes.make_mesh(config.MeshConfig(expert=ways))
    x, index, weight, *matrices, dy = routings.operands('uniform')

    def layer(x, weight, *matrices):
      return experts.expert_parallel(
        x, (index, weight), *matrices, strategy=strategy, chunks=chunks
      )

    def backward(*operands):
      return jax.vjp(layer, *operands)[1](dy)

    with jax.set_mesh(mesh):
      run = x, weight, *matrices
      forward = jax.make_jaxpr(layer)(*run).jaxpr
      both = jax.make_jaxpr(backward)(*run).jaxpr
    tokens = x.shape[0] * x.shape[1] // mesh.size
    want = cost.Layer(
      tokens, index.shape[2], x.shape[2], routings.HIDDEN,
      routings.EXPERTS // ways, ways, 4,
    )  # fmt: skip
    found = collectives(forward, ways, {})
    self.assertEqual(found, cost.expert_bytes(strategy, want, chunks))
    found_both = collectives(both, ways, {})
    back = {kind: found_both[kind] - found[kind] for kind in found_both}
    self.assertEqual(
      back, cost.expert_bytes(strategy, want, chunks, backward=True)
    )

  def test_a_row_crosses_once_a_device(self):
    """At two devices nearly every token needs both; far fewer of 64."""
    self.assertAlmostEqual(cost.reach(8, 128, 2), 0.997, delta=1e-3)
    sent = cost.expert_bytes('ragged', m2(8192, 64))['ragged-all-to-all']
    rows = 63 * cost.reach(8, 4, 64)
    self.assertAlmostEqual(rows, 7.56, delta=0.01)
    self.assertAlmostEqual(sent / (8192 * rows * (2 * 6144 + 64)), 1)

  def test_an_unknown_strategy_is_named(self):
    with self.assertRaisesRegex(ValueError, 'scatter'):
      cost.expert_bytes('scatter', m2(8, 8))


class RoomTest(parameterized.TestCase):
  @parameterized.product(
    tokens=(1, 7, 512, 8192), top_k=(1, 8), experts=(4, 32), devices=(2, 64)
  )
  def test_is_ample_and_never_more_than_all(
    self, tokens, top_k, experts, devices
  ):
    room = cost.room(tokens, top_k, experts, devices)
    most = min(top_k, experts)
    self.assertLessEqual(room.copies, tokens)
    self.assertLessEqual(room.choices, tokens * most)
    self.assertGreaterEqual(room.choices, most)
    self.assertGreaterEqual(
      room.choices, min(tokens * most, tokens * top_k / devices)
    )
    full = room.copies == tokens and room.choices == tokens * most
    self.assertEqual(room.always, full)

  def test_memory_stays_near_the_balanced_load(self):
    for devices in (4, 8, 64):
      layer = m2(8192, devices)
      self.assertLess(cost.rows('exchange', layer, 1), 1.45 * 8192 * 8)
      self.assertGreaterEqual(cost.rows('gather', layer, 1), 4 * 8192 * 8)


class ChoiceTest(parameterized.TestCase):
  def test_an_unknown_device_takes_the_first_and_says_why(self):
    choice = cost.choose(m2(8192, 8), 'cpu')
    self.assertEqual(choice[:2], ('gather', 1))
    self.assertIn("no link speeds are known of 'cpu'", choice.reason)

  def test_over_many_devices_rows_are_sent_and_not_gathered(self):
    choice = cost.choose(m2(4096, 64), 'TPU v5')
    self.assertEqual(choice.strategy, 'ragged')
    self.assertGreater(choice.chunks, 1)
    self.assertRegex(choice.reason, r'ms a layer.*others: gather \d')

  @parameterized.parameters('NVIDIA H100 80GB HBM3', 'NVIDIA H200')
  def test_over_two_gpus_it_is_what_was_fastest_there(self, kind):
    for tokens in (8192, 16384):  # tests/bench/results/expert_parallel-*
      self.assertEqual(cost.choose(m2(tokens, 2), kind)[:2], ('gather', 1))
      choice = cost.choose(m2(tokens, 2), kind, strategies=cost.WITH_DIRECT)
      self.assertEqual(choice[:2], ('direct', 1))

  def test_sums_are_hidden_by_direct_only_as_far_as_rows_are_read(self):
    chip = cost.CHIPS['NVIDIA H200']
    for devices in (2, 8):
      layer = m2(16384, devices)
      _, talk = cost.seconds('direct', layer, 1, chip)
      crossing = (devices - 1) * 16384 * 6144 / chip.direct
      read = 16384 * 8 * (devices - 1) / devices * 6144 / chip.bandwidth
      # There and back, forward and backward; what is known adds 2% at most.
      want = 2 * (2 * crossing - read) + 5 * chip.latency
      self.assertBetween(talk, want, 1.02 * want)

  def test_few_tokens_are_not_cut(self):
    self.assertEqual(cost.choose(m2(64, 8), 'TPU v5').chunks, 1)

  def test_chunks_that_do_not_divide_are_passed_over(self):
    self.assertEqual(cost.choose(m2(4095, 64), 'TPU v5').chunks, 1)

  def test_what_is_forced_stays(self):
    for strategy in cost.STRATEGIES:
      choice = cost.choose(
        m2(4096, 64), 'TPU v6 lite', strategies=(strategy,), chunks=(2,)
      )
      self.assertEqual(choice[:2], (strategy, 2))
      self.assertIn('forced', choice.reason)

  def test_slower_links_never_make_gathering_better(self):
    chip, layer, saved = cost.CHIPS['TPU v5'], m2(4096, 64), []
    for factor in (1, 0.5, 0.1):
      slow = dataclasses.replace(chip, link=chip.link * factor)
      gather, _ = cost.seconds('gather', layer, 1, slow)
      sent, _ = cost.seconds('ragged', layer, 1, slow)
      saved.append(gather - sent)
    self.assertEqual(saved, sorted(saved))

  @parameterized.parameters('TPU v5', 'TPU v5 lite', 'TPU7x')
  def test_names_of_devices(self, kind):
    self.assertIs(cost.chip_of(kind), cost.CHIPS[kind])
    self.assertIs(
      cost.chip_of('NVIDIA H100 80GB HBM3'), cost.CHIPS['NVIDIA H100']
    )

  @parameterized.product(devices=(1, 2, 6, 8, 16, 64, 256), dimensions=(2, 3))
  def test_torus_sides_hold_the_devices(self, devices, dimensions):
    sides = cost.torus_sides(devices, dimensions)
    self.assertLen(sides, dimensions)
    self.assertEqual(math.prod(sides), devices)


if __name__ == '__main__':
  absltest.main()
