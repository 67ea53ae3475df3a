"""Streaming: what is read, what is held, what a kill leaves behind."""

import dataclasses
import os
import pathlib
import shutil
import threading
import time
import types
import unittest.mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from m2 import config
from m2.checkpoint import (
  hf,
  hf_names,
  hf_tree,
  planes,
  shards,
  storage,
  stream,
)
from m2.parallel import mesh as meshes
from m2.parallel import sharding
from tests import folders
from tests.bench import stream as bench
from tests.checkpoint import hf_test, synthetic

ROOT = pathlib.Path(__file__).resolve().parents[2]
GIB = 2**30
# Every kind of sharding: data, fsdp, expert, tensor.
MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 2, 2, 2), (2, 1, 2, 2))
# Widths of whole and of ragged blocks, with rows of several pieces.
BLOCKS = dict(
  d_model=256, d_expert=192, experts=8, head_dim=32, kv_heads=2, vocab=160
)
WHOLE = BLOCKS | {'d_expert': 256}
KEPT = hf_test.small(
  mtp_modules=1, fp8_experts=True, param_dtype='bfloat16', **WHOLE
)


def plain(cfg: config.ModelConfig) -> config.ModelConfig:
  return dataclasses.replace(cfg, fp8_experts=False)


def bytes_equal(got, want) -> None:
  """Compares values by their bits."""
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(
      np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)
    ),
    got,
    want,
  )


class LoadTest(hf_test.FilesTest):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cfg = hf_test.small(mtp_modules=1, **BLOCKS)
    folder = folders.of_class(cls)
    cls.path, cls.codes = folder / 'fp8', folder / 'codes'
    for path, cfg in ((cls.path, cls.cfg), (cls.codes, plain(KEPT))):
      hf.save(hf_test.draw(cfg), path, cfg, dtype='fp8', shard_bytes=500_000)

  @parameterized.parameters(*MESHES)
  def test_a_mesh_holds_what_one_device_does(self, *sizes):
    mesh = meshes.make_mesh(config.MeshConfig(*sizes))
    # Small runs, so that a tensor is read in several and parts are cut.
    with unittest.mock.patch.object(stream, 'RUN', 20_000):
      for dtype in ('float32', 'bfloat16'):
        placed = hf.load(
          self.path, self.cfg, mesh, dtype=dtype, in_flight=160_000
        )
        bytes_equal(placed, hf.load(self.path, self.cfg, dtype=dtype))
    wi_0 = placed['blocks']['moe']['wi_0']
    shape = sharding_of('wi_0', wi_0, mesh).shard_shape(wi_0.shape)
    self.assertEqual(wi_0.addressable_shards[0].data.shape, shape)

  def test_every_byte_is_read_once_however_many_hold_it(self):
    counts = {
      file.name: np.zeros(file.stat().st_size, int)
      for file in self.path.glob('*.safetensors')
    }
    lock, read = threading.Lock(), storage.Disk.read

    def count(disk, name, start=0, stop=None):
      data = read(disk, name, start, stop)
      if name in counts:
        with lock:
          counts[name][start : start + data.size] += 1
      return data

    self.enter_context(unittest.mock.patch.object(storage.Disk, 'read', count))
    self.enter_context(unittest.mock.patch.object(storage.Disk, 'gap', 0))
    mesh = meshes.make_mesh(config.MeshConfig(4, 1, 2, 1))
    hf.load(self.path, self.cfg, mesh)
    for tensor in shards.read(self.path).values():
      part = counts[tensor.file][tensor.offset :][: tensor.nbytes]
      np.testing.assert_array_equal(part, 1)

  @parameterized.parameters(
    # Mesh, devices of a host, and the share of the experts' bytes it reads.
    ((1, 1, 8, 1), 1, 1 / 8),
    ((1, 1, 8, 1), 4, 1 / 2),
    ((2, 1, 4, 1), 4, 1),  # one replica
    ((4, 1, 2, 1), 2, 1),
    ((4, 1, 2, 1), 1, 1 / 2),
  )
  def test_a_host_reads_what_its_devices_hold(self, sizes, count, share):
    mesh = meshes.make_mesh(config.MeshConfig(*sizes))
    self.assertEqual(self.planned(mesh, count, ('wi_0', 'wi_1', 'wo')), share)

  @parameterized.parameters(
    ((1, 1, 1, 8), ('wi_0', 'wi_1', 'q'), 1 / 8),  # rows of the file
    ((1, 1, 1, 8), ('wo', 'o'), 1),  # columns: rows are read whole
    ((1, 8, 1, 1), ('wo', 'o'), 1 / 8),
    ((1, 8, 1, 1), ('wi_0', 'wi_1', 'q'), 1),
  )
  def test_splits_of_rows_and_columns(self, sizes, leaves, share):
    self.cfg = hf_test.small(**BLOCKS | {'kv_heads': 8, 'heads': 8})
    mesh = meshes.make_mesh(config.MeshConfig(*sizes))
    self.assertEqual(self.planned(mesh, 1, leaves), share)

  def planned(self, mesh, count: int, leaves) -> float:
    """The share of some leaves' bytes that `count` of the devices need."""
    sizes = hf_names.sizes_of(self.cfg)
    abstract = hf_tree.abstract(self.cfg, 'bfloat16')
    places = sharding.param_shardings(abstract, mesh)
    parts, needs, total = {}, [], 0
    for slot in hf_names.slots(self.cfg).values():
      leaf = slot.entry.leaf
      if slot.last not in leaves or leaf.startswith('mtp'):
        continue
      groups = hf_names.groups(slot.entry.layout, sizes)
      indices = places[leaf].devices_indices_map(abstract[leaf].shape)
      boxes = {
        tuple(range(n)[cut] for n, cut in zip(abstract[leaf].shape, index))
        for index in list(indices.values())[:count]
      }
      parts[leaf] = [
        types.SimpleNamespace(plane=planes.Plane(groups, box)) for box in boxes
      ]
      nbytes = int(np.prod(slot.shape))
      tensor = shards.Tensor(None, 'f', 'F8_E4M3', slot.shape, total, nbytes)
      needs.append(planes.Need('w', tensor, slot))
      total += nbytes
    found = stream.stretches(needs, parts)
    self.assertNotEmpty(found)
    return sum(one.stop - one.start for one in found) / total

  def test_memory_in_flight_is_bounded(self):
    now, most, lock = 0, 0, threading.Lock()
    take = planes.HostPart.put

    def put(part, need, x_RC, first):
      nonlocal now, most
      with lock:
        now += 1
        most = max(most, now)
      time.sleep(0.001)
      take(part, need, x_RC, first)
      with lock:
        now -= 1

    self.enter_context(unittest.mock.patch.object(stream, 'RUN', 50_000))
    self.enter_context(unittest.mock.patch.object(planes.HostPart, 'put', put))
    hf.load(self.path, self.cfg, in_flight=150_000)
    self.assertEqual(most, 3)

  def test_an_accelerator_s_parts_hold_the_same(self):
    """Filled in place on the device; here devices are the CPU's."""
    cfg = hf.config(hf_test.DATA / 'fp8')
    mesh = meshes.make_mesh(
      config.MeshConfig(1, 2, 1, 1), devices=jax.devices()[:2]
    )
    want = hf.load(hf_test.DATA / 'fp8', cfg)
    self.enter_context(
      unittest.mock.patch.object(planes, 'HostPart', planes.DevicePart)
    )
    self.enter_context(unittest.mock.patch.object(stream, 'RUN', 3_000))
    with jax.set_mesh(mesh):
      got = hf.load(hf_test.DATA / 'fp8', cfg, mesh, in_flight=12_000)
    bytes_equal(got, want)

  def test_experts_of_another_checkpoint_cannot_be_kept(self):
    path = hf_test.DATA / 'ratios_of_m2'
    cfg = hf.config(path)
    self.assertFalse(hf.holds_codes(path))
    with self.assertRaisesRegex(ValueError, 'd_expert=.*multiples of 128'):
      dataclasses.replace(cfg, fp8_experts=True)._check()
    cfg, path = plain(KEPT), self.folder / 'bfloat16'
    hf.save(hf_test.draw(cfg), path, cfg, dtype='bfloat16', shard_bytes=500_000)
    with self.assertRaisesRegex(ValueError, 'type BF16, but model.fp8_experts'):
      hf.load(path, KEPT)

  @parameterized.parameters((1, 2, 2, 2), (1, 1, 8, 1), (2, 2, 1, 2))
  def test_experts_are_kept_as_they_are_in_the_file(self, *sizes):
    path = self.codes
    self.assertTrue(hf.holds_codes(path))
    mesh = meshes.make_mesh(config.MeshConfig(*sizes))
    with unittest.mock.patch.object(stream, 'RUN', 20_000):
      kept = hf.load(path, KEPT, mesh, in_flight=160_000)
    bytes_equal(kept, hf.load(path, KEPT))
    want = hf.load(path, plain(KEPT), dtype='float32')
    for part in ('blocks', 'mtp'):
      for name in ('wi_0', 'wi_1', 'wo'):
        found = jax.jit(pallas_kernels.dequantise)(kept[part]['moe'][name])
        np.testing.assert_array_equal(found, want[part]['moe'][name])
    self.assertEqual(kept['head'].dtype.name, 'bfloat16')
    self.assertEqual(kept['blocks']['moe']['gate'].dtype, np.float32)
    raw = shards.read(path)[
      'model.layers.1.block_sparse_moe.experts.3.w2.weight'
    ]
    values = np.asarray(kept['blocks']['moe']['wo'].values)
    bytes_equal(values[1, 3], raw.array())

  def test_kept_experts_are_written_as_they_are_and_in_no_other_type(self):
    kept = hf.load(self.codes, KEPT)
    hf.save(kept, self.folder / 'same', KEPT)
    hf_test.assert_same(hf.load(self.folder / 'same', KEPT), kept)
    with self.assertRaisesRegex(ValueError, "dtype='bfloat16' must be fp8"):
      hf.save(kept, self.folder / 'out', KEPT, dtype='bfloat16')
    with self.assertRaisesRegex(ValueError, 'wi_0/values: unknown'):
      hf.save(kept, self.folder / 'out', plain(KEPT), dtype='fp8')
    wi_0 = kept['blocks']['moe']['wi_0']
    wrong = dataclasses.replace(wi_0, values=wi_0.values.astype(np.float32))
    kept['blocks']['moe']['wi_0'] = wrong
    with self.assertRaisesRegex(ValueError, 'wi_0/values: float32, the model'):
      hf.save(kept, self.folder / 'out', KEPT, dtype='fp8')

  def test_a_file_that_shrinks_meanwhile(self):
    path = shutil.copytree(self.path, self.folder / 'fp8')
    file = sorted(path.glob('*.safetensors'))[1]
    real = stream.whole

    def shrink(*args):
      found = real(*args)
      os.truncate(file, file.stat().st_size - 100)
      return found

    with unittest.mock.patch.object(stream, 'whole', shrink):
      with self.assertRaisesRegex(ValueError, f'{file.name}: truncated'):
        hf.load(path, self.cfg)


def sharding_of(name, leaf, mesh) -> jax.sharding.NamedSharding:
  return sharding.param_shardings({name: leaf}, mesh)[name]


class RoundTripTest(hf_test.FilesTest):
  def test_bytes_survive_each_type_that_weights_are_held_in(self):
    """Codes always; scales where the type held them exactly."""
    for widths in (BLOCKS, WHOLE):
      cfg = hf_test.small(**widths)
      path = self.folder / f'fp8_{cfg.d_expert}'
      synthetic.write(path, cfg, shard_bytes=10**6)
      for dtype in ('float32', 'bfloat16'):
        self.check(path, cfg, dtype)
    for dtype in ('float32', 'bfloat16'):
      self.check(path, dataclasses.replace(cfg, fp8_experts=True), dtype)

  def check(self, path, cfg, dtype: str) -> None:
    with self.subTest(dtype=dtype, cfg=cfg):
      out = self.folder / f'{path.name} {dtype} {cfg.fp8_experts}'
      hf.save(hf.load(path, cfg, dtype=dtype), out, cfg, dtype='fp8')
      after = hf_test.stored(out)
      for name, (kind, data) in hf_test.stored(path).items():
        exact = dtype == 'float32' or 'scale' not in name
        if exact or (cfg.fp8_experts and 'experts' in name):
          self.assertEqual(after[name], (kind, data), name)
        else:
          got = np.frombuffer(after[name][1], np.float32)
          want = np.frombuffer(data, np.float32)
          np.testing.assert_allclose(got, want, rtol=2**-8)

  @pytest.mark.exhaustive
  def test_the_released_number_of_tensors(self):
    """96,103 of them at reduced width, onto a mesh and back."""
    cfg = config.ModelConfig(
      vocab=512, d_model=16, heads=2, kv_heads=2, head_dim=8, rotary_dim=4,
      d_expert=8,
    )  # fmt: skip
    path, out = self.folder / 'in', self.folder / 'out'
    synthetic.write(path, cfg, shard_bytes=2 * 10**6)
    self.assertLen(shards.names(path), 96_103)
    mesh = meshes.make_mesh(config.MeshConfig(1, 2, 2, 2))
    params = hf.load(path, cfg, mesh, dtype='float32')
    hf.save(params, out, cfg, dtype='fp8', shard_bytes=2 * 10**6)
    for file in path.iterdir():
      self.assertEqual((out / file.name).read_bytes(), file.read_bytes())


class MemoryTest(parameterized.TestCase):
  """A few GB at the real widths, each load in a process of its own."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = folders.of_class(cls)
    cls.path = cls.folder / 'checkpoint'
    model = bench.model(2, 48)
    cls.size = synthetic.write(cls.path, model, shard_bytes=10**9)

  @pytest.mark.heavy
  def test_peak_memory(self):
    self.check_peak('')

  @pytest.mark.exhaustive
  def test_peak_memory_on_a_mesh(self):
    self.check_peak('1x2x2x2')

  def check_peak(self, sizes):
    self.assertGreater(self.size, 1.5 * GIB)
    words = [f'--mesh={sizes}'] * bool(sizes)
    out = self.folder / f'out{sizes}'
    self.addCleanup(shutil.rmtree, out, ignore_errors=True)
    row = bench.load_apart(self.path, *words)
    self.assertLess(row['peak'] - row['share'], 2 * GIB)
    row = bench.load_apart(self.path, '--fp8', f'--save={out}', *words)
    self.assertLess(row['save_peak'] - row['share'], 2 * GIB)
    self.assertEqual(bench.same_codes(self.path, out), 1.0)
    # The rates proper are the bench's; others use this machine meanwhile.
    slower = min(bench.disk_rate(self.path), bench.core_rate(self.path)['core'])
    self.assertGreater(self.size / row['seconds'], 0.1 * slower)


if __name__ == '__main__':
  absltest.main()
