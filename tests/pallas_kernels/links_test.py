"""Experts split over devices, and the kernels that write into other GPUs.

On CPUs the split layer runs by XLA's collectives, and the kernels are lowered.
Where there are Hopper GPUs the same tests run these:
`python -m tests.pallas_kernels.links_test`.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.experimental.mosaic.gpu import core as mosaic

import pallas_kernels
from pallas_kernels.experts import api as layers
from pallas_kernels.experts import ref
from pallas_kernels.links import mosaic_gpu, xla
from pallas_kernels.permute import api as permute
from tests.pallas_kernels import experts_test, hopper_cases, row_cases

GPU = jax.default_backend() == 'gpu'
SPEC = jax.P('expert')
TOKENS = 19  # a device; no multiple of anything
# Width, hidden, dtype, tolerance in norm.
LAYERS = {
  'xla': (24, 40, 'float32', experts_test.FP32_TOLERANCE),
  'mosaic_tpu': (128, 128, 'bfloat16', experts_test.BF16_TOLERANCE),
  'mosaic_gpu': (768, 384, 'bfloat16', experts_test.BF16_TOLERANCE),
}


def mesh(devices: int) -> jax.sharding.Mesh:
  types = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh(
    (devices,), ('expert',), types, devices=jax.devices()[:devices]
  )


def spread(run, where, *, check=True):
  """`run` on the local blocks of its arguments, jitted."""
  return jax.jit(
    jax.shard_map(
      run, mesh=where, in_specs=SPEC, out_specs=SPEC, check_vma=check
    )
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def rows_and_plan(tokens: int, devices: int, width: int, dtype):
  """What each device has of rows and places of all tokens, stacked."""

  def one(key):
    keys = jax.random.split(key, 3)
    index_MX = jax.random.randint(keys[0], (devices * tokens, 3), -2, 8)
    plan = permute.plan(index_MX, 5, align=8, impl='xla')
    y_PD = jax.random.normal(keys[1], (len(plan.source_P), width))
    weight_MX = jax.random.uniform(keys[2], index_MX.shape)
    return y_PD.astype(dtype), plan, weight_MX

  found = jax.vmap(one)(jax.random.split(jax.random.key(tokens), devices))
  return jax.tree.map(lambda z: z.reshape(-1, *z.shape[2:]), found)


class SplitTest(parameterized.TestCase):
  @parameterized.parameters(2, 4)
  def test_equals_one_device_that_holds_all(self, devices):
    if jax.device_count() < devices:
      self.skipTest(f'needs {devices} devices')
    self.check('mosaic_gpu' if GPU else 'xla', devices)

  @pytest.mark.heavy
  def test_kernels_for_tpus_are_split_too(self):
    if GPU:
      self.skipTest('runs in the interpreter')
    self.check('mosaic_tpu', 2)

  def test_more_than_two_have_to_be_named(self):
    for devices in (2, 4):
      if jax.device_count() < devices:
        self.skipTest(f'needs {devices} devices')
      with jax.set_mesh(mesh(devices)):
        reason = layers._untried()
      self.assertEqual('4 GPUs' in (reason or ''), devices == 4)

  def check(self, impl, devices):
    width, hidden, dtype, tolerance = LAYERS[impl]
    rng = np.random.default_rng(devices)
    tokens, experts = devices * TOKENS, 3 * devices
    # Expert 1 has nothing, and -1 and `experts` are none.
    index = rng.integers(-1, experts + 1, (tokens, 3))
    index = np.where(index == 1, 2, index)
    weight = np.float32(rng.uniform(size=index.shape))
    wide, tall = (experts, width, hidden), (experts, hidden, width)
    shapes = (tokens, width), wide, wide, tall
    x, *ws = (
      jnp.asarray(rng.standard_normal(shape) / 4, dtype) for shape in shapes
    )
    layer = functools.partial(pallas_kernels.experts, axis='expert', impl=impl)
    # Pallas' interpreter does not know on which axes its values differ.
    layer = spread(layer, mesh(devices), check=impl != 'mosaic_tpu')
    with jax.default_matmul_precision('highest'):
      args = x, index, weight, *ws
      got = row_cases.layer_with_gradients(layer, *args)
      want = row_cases.layer_with_gradients(ref.experts, *args)
    names = 'y', 'x', 'weight', 'wi_0', 'wi_1', 'wo'
    for name, ours, spec in zip(names, got, want, strict=True):
      row_cases.assert_close(self, ours, spec, tolerance, name)


class KernelsTest(parameterized.TestCase):
  @parameterized.product(
    name=('gather', 'combine'), sizes=((1, 2, 1), (2, 2, 2), (1, 4, 1))
  )
  def test_lowers_to_a_kernel_that_reaches_other_devices(self, name, sizes):
    if jax.device_count() < np.prod(sizes):
      self.skipTest(f'needs {np.prod(sizes)} devices')
    where = jax.make_mesh(
      sizes,
      ('data', 'expert', 'tensor'),
      (jax.sharding.AxisType.Auto,) * 3,
      devices=jax.devices()[: np.prod(sizes)],
    )
    dtype, width, devices = 'bfloat16', 768, sizes[1]
    arguments = rows_and_plan.eval_shape(TOKENS, devices, width, dtype)
    if name == 'gather':
      arguments = (
        jax.ShapeDtypeStruct((devices * TOKENS, width), dtype),
        jax.ShapeDtypeStruct((devices * TOKENS, 3), jnp.float32),
      )
    run = functools.partial(getattr(mosaic_gpu, name), 'expert')
    with (
      hopper_cases.hopper_here(),
      mock.patch.object(
        mosaic, 'is_single_process_multi_device_topology', lambda: True
      ),
    ):
      exported = hopper_cases.export(spread(run, where), *arguments)
    module = exported.mlir_module()
    self.assertEqual(hopper_cases.kernels(exported), 1)
    self.assertIn('uses_xla_collective_metadata = true', module)
    everyone = ','.join(map(str, range(np.prod(sizes))))
    self.assertIn(f'xla_replica_ids = "{everyone}"', module)

  @parameterized.product(
    # Of the last, most blocks have an odd number, and more than one.
    tokens=(1, TOKENS, 31 * 264),
    dtype=('bfloat16', 'float32'),
  )
  def test_gather_and_combine_are_xlas(self, tokens, dtype):
    if not GPU or jax.device_count() < 2:
      self.skipTest('needs two Hopper GPUs')
    devices = jax.device_count()
    keys = jax.random.split(jax.random.key(tokens), 3)
    x = jax.random.normal(keys[0], (devices * tokens, 768)).astype(dtype)
    index = jax.random.randint(keys[1], (devices * tokens, 3), -1, 9)
    weight = jax.random.uniform(keys[2], index.shape)
    pulled = (x, index, weight)
    summed = rows_and_plan(tokens, devices, 768, dtype)

    def run(links, pulled, summed):
      everything = links.gather('expert', *pulled)
      return *everything, links.combine('expert', *summed)

    ours, theirs = (
      spread(functools.partial(run, links), mesh(devices))
      for links in (mosaic_gpu.LINKS, xla.LINKS)
    )
    *want, want_sum = theirs(pulled, summed)
    first = ours(pulled, summed)
    for found, spec in zip(first[:3], want, strict=True):
      np.testing.assert_array_equal(found, spec)
    error = np.float64(first[3]) - np.float64(want_sum)
    limit = {'bfloat16': 8e-3, 'float32': 1e-6}[dtype]
    self.assertLess(
      np.linalg.norm(error), limit * np.linalg.norm(np.float64(want_sum))
    )
    for _ in range(20):  # bit for bit, whoever is first
      for found, spec in zip(ours(pulled, summed), first, strict=True):
        np.testing.assert_array_equal(found, spec)


class RefusalTest(absltest.TestCase):
  def refusal(self, devices=None):
    over = mesh(devices or jax.device_count())
    with hopper_cases.hopper_here(), jax.set_mesh(over):
      return mosaic_gpu.refusal(jnp.dtype('bfloat16'), 768)

  def test_all_devices_are_needed(self):
    if jax.device_count() < 2:
      self.skipTest('needs two devices')
    self.assertRegex(self.refusal(1), 'needs a mesh of all . GPUs, not of 1')

  def test_one_process_is_needed(self):
    self.assertIsNone(self.refusal())
    with mock.patch.object(jax, 'process_count', lambda: 2):
      self.assertRegex(self.refusal(), 'of one process')

  def test_gpus_that_cannot_reach_each_other_are_named(self):
    answers = {(0, 1): 1, (1, 0): 1, (0, 3): 1, (3, 0): 0, (1, 3): 1, (3, 1): 1}

    class Driver:
      def cuDeviceGet(self, handle, ordinal):
        handle._obj.value = ordinal
        return 0

      def cuDeviceCanAccessPeer(self, able, one, other):
        able._obj.value = answers[one.value, other.value]
        return 0

    with mock.patch.object(mosaic_gpu.ctypes, 'CDLL', lambda name: Driver()):
      self.assertIsNone(mosaic_gpu._apart.__wrapped__((0, 1)))
      self.assertEqual(mosaic_gpu._apart.__wrapped__((0, 1, 3)), (3, 0))


if __name__ == '__main__':
  absltest.main()
