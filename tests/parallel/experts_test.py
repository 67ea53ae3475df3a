"""Experts over devices: every strategy is the layer on one device."""

import contextlib
import io
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2.parallel import cost, exchange, experts
from pallas_kernels.permute import mosaic_gpu as permute
from tests.parallel import routings


class ExpertsTest(parameterized.TestCase):
  @parameterized.parameters(
    ((1, 2, 4, 1, 1), 'gather', 2, False),
    ((1, 1, 4, 1, 2), 'exchange', 1, False),
    ((1, 2, 4, 1, 1), 'ragged', 2, True),
    ((1, 2, 2, 2, 1), 'direct', 2, False),
  )
  def test_equals_one_device(self, *case):
    self.check(*case)

  @parameterized.parameters(
    ((1, 1, 8, 1, 1), 'exchange', 2, True),  # more devices than choices
    ((2, 1, 2, 2, 1), 'exchange', 1, True),
  )
  @pytest.mark.heavy
  def test_too_little_room_equals_one_device(self, *case):
    self.check(*case)

  def check(self, sizes, strategy, chunks, tight):
    error = routings.largest_error(sizes, strategy, chunks, tight=tight)
    self.assertLess(error, routings.TOLERANCE)


class ChoiceTest(parameterized.TestCase):
  def traced(self, sizes=(1, 1, 8, 1, 1), **options):
    with jax.set_mesh(routings.mesh(sizes)):
      return jax.eval_shape(
        routings.layer(**options), *routings.operands('uniform')
      )

  def test_ragged_on_a_cpu_refuses_and_says_what_to_use(self):
    with self.assertRaisesRegex(NotImplementedError, "use 'exchange'"):
      self.traced(strategy='ragged')

  def test_direct_off_gpus_refuses_and_says_what_to_use(self):
    with self.assertRaisesRegex(NotImplementedError, "Hopper.*use 'gather'"):
      self.traced(strategy='direct')

  def test_auto_knows_of_direct_where_it_can_run(self):
    asked = []

    def choose(layer, kind, *, strategies, chunks):
      asked.append(strategies)
      return cost.Choice('gather', 1, 'said so')

    two = 1, 1, 2, 1, 1
    kernels = experts.expert_kernels
    with (
      mock.patch.object(cost, 'choose', choose),
      mock.patch.object(experts, '_device', lambda: ('gpu', 'H100')),
    ):
      self.traced(two)
      with (
        mock.patch.object(kernels.mosaic_gpu, 'refusal', lambda *_: None),
        mock.patch.object(permute, 'rows_refusal', lambda *_: None),
        mock.patch.object(kernels.links_gpu, '_apart', lambda _: None),
      ):
        with self.assertRaisesRegex(NotImplementedError, 'all 8 GPUs, not of'):
          self.traced(two, strategy='direct')
        with mock.patch.object(jax, 'device_count', lambda: 2):
          self.traced(two)
          self.traced(two, impl='xla')
      with self.assertRaisesRegex(NotImplementedError, 'not of xla'):
        self.traced(two, strategy='direct', impl='xla')
    everywhere = cost.STRATEGIES
    self.assertEqual(asked, [everywhere, cost.WITH_DIRECT, everywhere])

  def test_unknown_strategy_and_chunks_are_named(self):
    with self.assertRaisesRegex(ValueError, 'raged.*auto, gather'):
      self.traced(strategy='raged')
    with self.assertRaisesRegex(ValueError, 'chunks=-1 must not be negative'):
      self.traced(strategy='gather', chunks=-1)

  def test_chunks_divide_the_tokens(self):
    self.assertEqual(cost.slices(16, 3), (2,))
    self.assertEqual(cost.slices(5, 4), (1,))
    self.assertEqual(cost.slices(16, 0), cost.CHUNKS)

  def test_the_choice_is_printed_once_with_its_reason(self):
    experts._announce.cache_clear()
    with contextlib.redirect_stdout(io.StringIO()) as out:
      self.traced()
      self.traced()
    lines = out.getvalue().splitlines()
    self.assertLen(lines, 1)
    self.assertIn('experts over 8 x cpu, 16 tokens each: gather', lines[0])
    self.assertIn('no link speeds are known', lines[0])

  @parameterized.parameters(('exchange', 0), ('gather', 4), ('ragged', 2))
  def test_what_is_forced_is_what_runs(self, strategy, chunks):
    seen = []
    run = experts.STRATEGIES[strategy]

    def watched(chunks, *args, **kwargs):
      seen.append(chunks)
      return run(chunks, *args, **kwargs)

    with (
      routings.emulated(),
      mock.patch.dict(experts.STRATEGIES, {strategy: watched}),
    ):
      self.traced(strategy=strategy, chunks=chunks)
    self.assertEqual(seen, [chunks or 1])

  def test_auto_asks_the_cost_model_of_the_meshs_devices(self):
    choice = cost.Choice('exchange', 2, 'said so')
    ran = mock.Mock(side_effect=experts.STRATEGIES['exchange'])
    with (
      mock.patch.object(cost, 'choose', return_value=choice) as asked,
      mock.patch.dict(experts.STRATEGIES, {'exchange': ran}),
    ):
      self.traced()
    layer, kind = asked.call_args.args
    self.assertEqual(kind, 'cpu')
    self.assertEqual(layer, cost.Layer(16, 4, 8, 4, 2, 8, 4))
    self.assertEqual(ran.call_args.args[0], 2)


def lowered(platform: str, kind: str, strategy: str) -> str:
  """The layer over two devices that are not here, lowered for them."""
  from jax._src import mesh as jax_mesh  # no public name makes one

  device = jax_mesh.AbstractDevice(kind, 1, platform)
  types = (jax.sharding.AxisType.Explicit,) * len(routings.AXES)
  sizes = (1, 1, 2, 1, 1)
  where = jax.sharding.AbstractMesh(
    sizes, routings.AXES, types, abstract_device=device
  )
  check = jax.export.DisabledSafetyCheck.custom_call('ragged_all_to_all')
  with jax.sharding.use_abstract_mesh(where):
    exported = jax.export.export(
      routings.layer(strategy=strategy, chunks=1, impl='xla'),
      platforms=[{'gpu': 'cuda'}.get(platform, platform)],
      disabled_checks=[check],
    )(*jax.eval_shape(lambda: routings.operands('uniform')))
  return exported.mlir_module()


class LoweringTest(parameterized.TestCase):
  @parameterized.parameters(('gpu', 'NVIDIA H100 80GB HBM3'), ('tpu', 'TPU v5'))
  def test_ragged_for_accelerators(self, platform, kind):
    module = lowered(platform, kind, 'ragged')
    # Rows and what is known of them there, sums back; the same in rounds of the
    # rest, and backward; these rounds' gradient sends there once more.
    self.assertEqual(module.count('@ragged_all_to_all'), 3 + 3 + 3 + (3 + 2))
    self.assertNotIn('all_gather', module)

  @parameterized.parameters(1, 3, 24, 100)
  def test_updates_of_a_block_are_its_rows_in_order(self, updates):
    """GPUs send a block as several updates; any number gives the same."""
    sent, copies = np.asarray([[5, 0], [24, 1]], np.int32), 24
    x = np.arange(4 * copies, dtype=np.float32).reshape(-1, 1)
    mesh, spec = jax.make_mesh((2,), ('expert',)), jax.P('expert')

    want = np.zeros_like(x).reshape(2, 2, copies)
    for source, target in np.ndindex(2, 2):
      own = slice(sent[source, target])
      want[target, source, own] = x.reshape(2, 2, copies)[source, target, own]
    with (
      mock.patch.object(exchange, '_updates', lambda *_: updates),
      routings.emulated(),
      jax.set_mesh(mesh),
    ):
      run = jax.shard_map(
        exchange._ragged, in_specs=(spec,) * 3, out_specs=spec
      )
      operands = (x, sent.reshape(-1), sent.T.reshape(-1))
      got = jax.jit(run)(*(jax.device_put(z, spec) for z in operands))
    np.testing.assert_array_equal(got, want.reshape(-1, 1))


if __name__ == '__main__':
  absltest.main()
