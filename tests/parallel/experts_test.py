"""Experts over devices: every strategy is the layer on one device."""

import contextlib
import functools
import io
import math
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2 import config
from m2.parallel import cost, experts
from m2.parallel import mesh as meshes
from tests.parallel import routings

TOLERANCE = 2e-5  # float32, of the largest value
NAMES = 'y', 'x', 'weight', 'wi_0', 'wi_1', 'wo'
# So little that uniform routing needs rounds of the rest, too.
TIGHT = cost.Room(copies=3, choices=6, always=False)
AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')


def factorisations() -> list[tuple[int, ...]]:
  """Sizes of (data, fsdp, expert, context, tensor) of 8 devices, expert > 1."""
  found = []
  for expert in (2, 4, 8):
    rest = 8 // expert
    powers = [1, 2, 4][: int(math.log2(rest)) + 1]
    for data in powers:
      for fsdp in powers:
        for context in powers:
          if rest % (data * fsdp * context) == 0:
            tensor = rest // (data * fsdp * context)
            found.append((data, fsdp, expert, context, tensor))
  return found


def mesh(sizes) -> jax.sharding.Mesh:
  return meshes.make_mesh(config.MeshConfig(**dict(zip(AXES, sizes))))


@functools.cache
def one_device(routing: str):
  return [np.asarray(z) for z in routings.layer()(*routings.operands(routing))]


@contextlib.contextmanager
def emulated():
  """XLA on CPUs has no ragged_all_to_all: its documentation, on a "TPU"."""
  with (
    mock.patch.object(jax.lax, 'ragged_all_to_all', routings.ragged_all_to_all),
    mock.patch.object(experts, '_device', lambda: ('tpu', 'TPU v5')),
  ):
    yield


class ExpertsTest(parameterized.TestCase):
  def check(self, sizes, strategy, chunks, names=routings.ROUTINGS):
    with jax.set_mesh(mesh(sizes)):
      run = routings.layer(strategy=strategy, chunks=chunks)
      for routing in names:
        got = run(*routings.operands(routing))
        for name, a, b in zip(NAMES, got, one_device(routing), strict=True):
          error = np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-6)
          self.assertLess(error, TOLERANCE, f'{routing} {name}')

  @parameterized.parameters(
    ((1, 2, 4, 1, 1), 'gather', 2),
    ((1, 1, 4, 1, 2), 'exchange', 1),  # the room is ample: no more rounds
  )
  def test_equals_one_device(self, sizes, strategy, chunks):
    self.check(sizes, strategy, chunks)

  @parameterized.parameters(
    ((1, 1, 8, 1, 1), 'exchange', 2),  # more devices than choices
    ((2, 1, 2, 2, 1), 'exchange', 1),
    ((1, 2, 4, 1, 1), 'ragged', 2),
  )
  def test_equals_one_device_in_many_rounds(self, sizes, strategy, chunks):
    with mock.patch.object(cost, 'room', lambda *_: TIGHT), emulated():
      self.check(sizes, strategy, chunks)

  @pytest.mark.heavy
  @parameterized.product(
    sizes=factorisations(),
    strategy=cost.STRATEGIES,
    chunks=(1, 4),
    tight=(False, True),
  )
  def test_all_factorisations(self, sizes, strategy, chunks, tight):
    if tight and strategy == 'gather':
      return  # it has no rounds
    room = TIGHT if tight else None
    with emulated(), contextlib.ExitStack() as stack:
      if room:
        stack.enter_context(mock.patch.object(cost, 'room', lambda *_: room))
      self.check(sizes, strategy, chunks)

  def test_bfloat16_partial_sums_are_added_in_float32(self):
    """The order of the devices decides, not that of arrival: no difference."""
    with jax.set_mesh(mesh((1, 1, 8, 1, 1))):
      run = routings.layer(strategy='exchange', chunks=1)
      args = [
        z.astype('bfloat16') if z.dtype == 'float32' and i not in (2,) else z
        for i, z in enumerate(routings.operands('uniform'))
      ]
      first, again = run(*args), run(*args)
    for a, b in zip(first, again):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class ChoiceTest(parameterized.TestCase):
  def traced(self, sizes=(1, 1, 8, 1, 1), **options):
    with jax.set_mesh(mesh(sizes)):
      return jax.eval_shape(
        routings.layer(**options), *routings.operands('uniform')
      )

  def test_ragged_on_a_cpu_refuses_and_says_what_to_use(self):
    with self.assertRaisesRegex(NotImplementedError, "use 'exchange'"):
      self.traced(strategy='ragged')

  def test_unknown_strategy_and_chunks_are_named(self):
    with self.assertRaisesRegex(ValueError, 'raged.*auto, gather'):
      self.traced(strategy='raged')
    with self.assertRaisesRegex(ValueError, 'chunks=3 does not divide the 16'):
      self.traced(strategy='gather', chunks=3)

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
      emulated(),
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
  types = (jax.sharding.AxisType.Explicit,) * len(AXES)
  sizes = (1, 1, 2, 1, 1)
  where = jax.sharding.AbstractMesh(sizes, AXES, types, abstract_device=device)
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
    # Rows and what is known of them there, sums back; backward the same, once
    # more for the rounds of the rest, in which they are sent again.
    self.assertEqual(module.count('@ragged_all_to_all'), 3 + 3 + 3 + 6)
    self.assertNotIn('all_gather', module)


if __name__ == '__main__':
  absltest.main()
