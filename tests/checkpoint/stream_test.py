"""Streaming: what is read, what is held, what a kill leaves behind."""

import os
import pathlib
import threading
import time
import types
import unittest.mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2 import config
from m2.checkpoint import (
  fp8,
  hf,
  hf_names,
  hf_tree,
  planes,
  shards,
  storage,
  stream,
)
from m2.parallel import mesh as meshes
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
  def setUp(self):
    super().setUp()
    self.cfg = hf_test.small(mtp_modules=1, **BLOCKS)
    self.path = self.folder / 'fp8'
    hf.save(
      hf_test.draw(self.cfg), self.path, self.cfg, dtype='fp8',
      shard_bytes=500_000,
    )  # fmt: skip

  @parameterized.parameters(*MESHES)
  def test_a_mesh_holds_what_one_device_does(self, *sizes):
    mesh = meshes.make_mesh(config.MeshConfig(*sizes))
    # Small runs, so that a tensor is read in several and parts are cut.
    with unittest.mock.patch.object(stream, 'RUN', 20_000):
      for dtype in ('bfloat16', 'float8_e4m3fn'):
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
    places = hf_tree.shardings(abstract, mesh)
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
      needs.append(planes.Need(tensor, slot))
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

  def test_codes_times_scales_are_the_weights(self):
    codes = hf.load(self.path, self.cfg, dtype='float8_e4m3fn')
    want = hf.load(self.path, self.cfg, dtype='float32')
    moe, attn = codes['blocks']['moe'], codes['blocks']['attn']
    for name, leaf, matrix in (
      ('wi_0', moe, (256, 192)),
      ('wo', moe, (192, 256)),
      ('q', attn, (256, 4 * 32)),
      ('o', attn, (4 * 32, 256)),
    ):
      code = np.asarray(leaf[name]).reshape(-1, *matrix)
      scale = np.asarray(leaf[name + '_scale_inv'])
      scale = scale.reshape(-1, *fp8.scale_shape(matrix))
      group = 'moe' if leaf is moe else 'attn'
      weight = np.asarray(want['blocks'][group][name]).reshape(code.shape)
      for one, its, value in zip(code, scale, weight):
        np.testing.assert_array_equal(fp8.dequantise(one, its), value)
    self.assertEqual(codes['head'].dtype.name, 'bfloat16')
    self.assertEqual(moe['gate'].dtype, np.float32)

  def test_codes_are_asked_of_a_checkpoint_without(self):
    path = hf_test.DATA / 'ratios_of_m2'
    with self.assertRaisesRegex(ValueError, 'type BF16, but float8_e4m3fn'):
      hf.load(path, hf.config(path), dtype='float8_e4m3fn')

  def test_codes_are_written_as_codes_only(self):
    codes = hf.load(self.path, self.cfg, dtype='float8_e4m3fn')
    with self.assertRaisesRegex(ValueError, "dtype='bfloat16' must be fp8"):
      hf.save(codes, self.folder / 'out', self.cfg)
    del codes['blocks']['attn']['q_scale_inv']
    with self.assertRaisesRegex(ValueError, 'q_scale_inv: missing'):
      hf.save(codes, self.folder / 'out', self.cfg, dtype='fp8')

  def test_a_file_that_shrinks_meanwhile(self):
    file = sorted(self.path.glob('*.safetensors'))[1]
    real = stream.whole

    def shrink(*args):
      found = real(*args)
      os.truncate(file, file.stat().st_size - 100)
      return found

    with unittest.mock.patch.object(stream, 'whole', shrink):
      with self.assertRaisesRegex(ValueError, f'{file.name}: truncated'):
        hf.load(self.path, self.cfg)


def sharding_of(name, leaf, mesh) -> jax.sharding.NamedSharding:
  return hf_tree.shardings({name: leaf}, mesh)[name]


class RoundTripTest(hf_test.FilesTest):
  def test_bytes_survive_each_type_that_weights_are_held_in(self):
    """Codes always; scales where the type held them exactly."""
    cfg = hf_test.small(**BLOCKS)
    path = self.folder / 'fp8'
    synthetic.write(path, cfg, shard_bytes=10**6)
    before = hf_test.stored(path)
    for dtype in ('float8_e4m3fn', 'float32', 'bfloat16'):
      out = self.folder / dtype
      hf.save(hf.load(path, cfg, dtype=dtype), out, cfg, dtype='fp8')
      after = hf_test.stored(out)
      for name, (kind, data) in before.items():
        if kind == 'F8_E4M3' or dtype != 'bfloat16' or 'scale' not in name:
          self.assertEqual(after[name], (kind, data), f'{dtype} {name}')
        else:
          got = np.frombuffer(after[name][1], np.float32)
          want = np.frombuffer(data, np.float32)
          np.testing.assert_allclose(got, want, rtol=2**-8)

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
    codes = hf.load(path, cfg, mesh, dtype='float8_e4m3fn')
    hf.save(codes, out, cfg, dtype='fp8', shard_bytes=2 * 10**6)
    for file in path.iterdir():
      self.assertEqual((out / file.name).read_bytes(), file.read_bytes())


@pytest.mark.heavy
class MemoryTest(hf_test.FilesTest):
  """A few GB at the real widths, each load in a process of its own."""

  @parameterized.parameters('', '2x2x2x1', '1x2x2x2')
  def test_peak_memory(self, sizes):
    path = self.folder / 'checkpoint'
    size = synthetic.write(path, bench.model(2, 48), shard_bytes=10**9)
    self.assertGreater(size, 1.5 * GIB)
    words = [f'--mesh={sizes}'] * bool(sizes)
    out = self.folder / 'out'
    row = bench.load_apart(path, '--dtype=bfloat16', *words)
    self.assertLess(row['peak'] - row['share'], 2 * GIB)
    row = bench.load_apart(
      path, '--dtype=float8_e4m3fn', f'--save={out}', *words
    )
    self.assertLess(row['save_peak'] - row['share'], 2 * GIB)
    self.assertEqual(bench.same_codes(path, out), 1.0)
    # The rates proper are the bench's; others use this machine meanwhile.
    slower = min(bench.disk_rate(path), bench.core_rate(path)['core'])
    self.assertGreater(size / row['seconds'], 0.1 * slower)


if __name__ == '__main__':
  absltest.main()
