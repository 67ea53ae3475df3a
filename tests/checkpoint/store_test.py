"""Checkpoints: complete or not there, what was written or an error."""

import dataclasses
import functools
import gc
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import warnings
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2.checkpoint import directory, fingerprint, store
from m2.model import params as model_params
from m2.parallel import mesh as meshes
from m2.train import optim
from m2.train import state as train_state
from tests.pods import pod
from tests.train import small

EXTRA = {'config': {'model': dataclasses.asdict(small.MODEL)}, 'note': 'ä'}


class Counter:
  """Stands for a data iterator."""

  def __init__(self, at: int = 0):
    self.at = at

  def get_state(self) -> dict:
    return {'at': self.at}

  def set_state(self, state: dict) -> None:
    self.at = state['at']


def mesh_of(devices: int) -> jax.sharding.Mesh:
  shape = small.EIGHT if devices == 8 else small.ONE
  return meshes.make_mesh(shape, jax.devices()[:devices])


@functools.cache
def make(devices: int = 1, name: str = 'adamw', seed: int = 0):
  """A state and its description."""
  cfg = small.run_config(modules=1, optim={'name': name})
  optimizer = optim.make(cfg.optim, cfg.steps)
  mesh, key = mesh_of(devices), jax.random.key(seed)
  return (
    train_state.create(cfg.model, key, mesh, optimizer),
    train_state.abstract(cfg.model, mesh, optimizer),
  )


def described(leaf: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def assert_same(first, second) -> None:
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((first, second)))


class StoreTest(parameterized.TestCase):
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.create_tempdir().full_path) / 'checkpoints'

  @parameterized.parameters((1, 'adamw'), (8, 'muon'))
  def test_gives_back_what_it_was_given(self, devices, name):
    state, abstract = make(devices, name)
    folder = self.folder()
    with store.Store(folder) as saved:
      saved.save(state, Counter(7), step=3, extra=EXTRA)
      saved.wait()
      counter = Counter()
      restored = saved.restore(abstract, counter)
    assert_same(state, restored.state)
    self.assertEqual(jax.tree.structure(state), jax.tree.structure(abstract))
    self.assertEqual((restored.step, counter.at), (3, 7))
    self.assertEqual(restored.extra, EXTRA)
    for leaf, wanted in zip(
      jax.tree.leaves(restored.state), jax.tree.leaves(abstract), strict=True
    ):
      self.assertEqual(leaf.sharding, wanted.sharding)

  def test_moves_to_another_mesh(self):
    state, _ = make(8)
    _, abstract = make(1)
    with store.Store(self.folder()) as saved:
      saved.save(state, None, step=1, extra={})
      saved.wait()
      assert_same(state, saved.restore(abstract, None).state)

  def test_the_iterator_is_saved_as_it_was_at_the_call(self):
    state, abstract = make()
    counter = Counter(5)
    with store.Store(self.folder()) as saved:
      saved.save(state, counter, step=1, extra={})
      counter.at = 6  # the loop goes on while the save is being written
      saved.wait()
      saved.restore(abstract, counter)
    self.assertEqual(counter.at, 5)

  def test_keeps_the_newest_and_replaces_a_step(self):
    (first, abstract), (second, _) = make(seed=0), make(seed=1)
    with store.Store(self.folder(), keep=2) as saved:
      for step in (1, 2, 3):
        saved.save(first, None, step=step, extra={})
      saved.save(second, None, step=3, extra={})
      saved.wait()
      self.assertEqual(saved.steps(), [2, 3])
      assert_same(second, saved.restore(abstract, None).state)
      assert_same(first, saved.restore(abstract, None, step=2).state)

  @parameterized.parameters('lr[1e-3]', 'a*', 'b?c')
  def test_paths_that_orbax_reads_as_patterns_are_refused(self, name):
    with self.assertRaisesRegex(
      store.CheckpointError, 'give another --workdir'
    ):
      store.Store(f'{self.create_tempdir().full_path}/{name}/checkpoints')

  def test_one_process_at_a_time(self):
    folder = self.folder()
    with store.Store(folder):
      with self.assertRaisesRegex(store.CheckpointError, 'in use by another'):
        store.Store(folder)
    store.Store(folder).close()

  def test_full_disk_is_an_error_and_loses_nothing(self):
    (first, abstract), (second, _) = make(seed=0), make(seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.Store(self.folder(), keep=1) as saved:
      saved.save(first, Counter(1), step=1, extra={}, asynchronous=False)
      # Files of more than 20 kB cannot be written from here on.
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
      try:
        with self.assertRaisesRegex(
          store.CheckpointError,
          r'checkpoint 2 could not be written to .*checkpoints there: 1\. Free',
        ):
          saved.save(second, Counter(2), step=2, extra={}, asynchronous=False)
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with store.Store(saved.directory, keep=1) as again:
      self.assertEqual(again.steps(), [1])
      assert_same(first, again.restore(abstract, Counter()).state)


class CorruptTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Few leaves, so that every file can be damaged in turn; one is large.
    w = np.arange(4096, dtype=np.float32).reshape(64, 64)
    params = {'w': w, 'b': np.ones(7, np.float32)}
    cls.state = jax.device_put({'params': params, 'step': np.int32(3)})
    cls.abstract = jax.tree.map(described, cls.state)

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    with store.Store(self.folder) as saved:
      for step in (10, 20):
        saved.save(self.state, Counter(step), step=step, extra=EXTRA)

  def damage(self, file: pathlib.Path, how: str) -> None:
    body = bytearray(file.read_bytes())
    if how == 'flipped':
      body[len(body) // 2] ^= 0x10
      file.write_bytes(body)
    elif how == 'cut':
      file.write_bytes(body[: len(body) // 2])
    else:
      file.unlink()

  def restore(self, **kwargs):
    with store.Store(self.folder) as saved:
      return saved.restore(self.abstract, Counter(), **kwargs)

  def test_no_damage_goes_unnoticed(self):
    self.damage_all('flipped')

  @parameterized.parameters('cut', 'gone')
  @pytest.mark.heavy
  def test_no_other_damage_goes_unnoticed(self, how):
    self.damage_all(how)

  def damage_all(self, how):
    """Every file in turn: the right values, or an error naming the place."""
    noticed = 0
    files = [f for f in sorted((self.folder / '20').rglob('*')) if f.is_file()]
    for file in files:
      whole = file.read_bytes()
      self.damage(file, how)
      try:
        assert_same(self.state, self.restore().state)
      except store.CheckpointError as error:
        noticed += 1
        self.assertIn(str(self.folder / '20'), str(error))
        self.assertNotIn('\n', str(error))
      file.write_bytes(whole)
    self.assertGreaterEqual(noticed, 8)

  def test_what_cannot_be_read_leaves_no_warning(self):
    """Of what Orbax had begun to read and then left."""
    self.damage(self.folder / '20' / 'params' / '_METADATA', 'gone')
    with warnings.catch_warnings(record=True) as warned:
      warnings.simplefilter('always', RuntimeWarning)
      with self.assertRaisesRegex(store.CheckpointError, 'cannot be read'):
        self.restore()
      gc.collect()
    self.assertEmpty([str(warning.message) for warning in warned])

  def test_the_previous_one_is_used_when_asked(self):
    meta = self.folder / '20' / 'meta' / 'value.json'
    self.damage(meta, 'flipped')
    with self.assertRaisesRegex(store.CheckpointError, 'is corrupt'):
      self.restore()
    restored = self.restore(on_corrupt='previous')
    self.assertEqual(restored.step, 10)
    assert_same(self.state, restored.state)

  def test_hosts_go_back_together(self):
    """Also those that can read what another cannot."""
    folder = self.create_tempdir().full_path
    address = f'127.0.0.1:{pod.free_port()}'
    command = [sys.executable, '-m', 'tests.checkpoint.two_hosts', folder]
    runs = [
      subprocess.Popen(
        [*command, address, str(index)],
        cwd=pod.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for index in range(2)
    ]
    for run in runs:
      self.addCleanup(run.kill)
    logs = [run.communicate(timeout=pod.LIMIT)[0] for run in runs]
    for index, log in enumerate(logs):
      self.assertRegex(log, r'checkpoint skipped: \S+/20')
      self.assertIn('[(20, 20), (10, 10), (30, 30), ', log)
      self.assertIn(f'{folder}/30 is corrupt: params cannot be read', log)
      self.assertEqual(log.count('host 1: '), 2 * (index == 0), log)

  def test_one_bit_of_a_value_is_found(self):
    """What Orbax itself does not see: a bit flipped inside the array data."""
    files = [f for f in (self.folder / '20' / 'params').rglob('*')]
    largest = max(filter(pathlib.Path.is_file, files), key=_size)
    self.damage(largest, 'flipped')
    with self.assertRaisesRegex(store.CheckpointError, 'not what its checksum'):
      self.restore()

  def test_foreign_directories_are_refused(self):
    shutil.rmtree(self.folder / '20' / 'meta')
    with self.assertRaisesRegex(store.CheckpointError, 'no meta/'):
      self.restore()
    with self.assertRaisesRegex(store.CheckpointError, 'holds no checkpoint'):
      store.load_params(self.create_tempdir().full_path, small.MODEL)
    with self.assertRaisesRegex(store.CheckpointError, 'not a directory'):
      store.load_params('/does/not/exist', small.MODEL)

  def test_another_format_is_refused(self):
    path = self.folder / '20' / 'meta' / 'value.json'
    body = path.read_text().partition('\n')[2].strip()
    body = json.dumps(json.loads(body) | {'format': 'm2-jax checkpoint 9'})
    digest = directory.digest(body)
    path.write_text(f'{digest}\n{body}\n')
    with self.assertRaisesRegex(store.CheckpointError, 'checkpoint 9'):
      self.restore()

  def test_another_model_is_refused_with_its_leaves(self):
    abstract = dict(self.abstract)
    abstract['params'] = {
      f'w{i}': self.abstract['params']['w'] for i in range(6)
    } | {'b': self.abstract['params']['b'].update(shape=(8,))}
    with store.Store(self.folder) as saved:
      with self.assertRaisesRegex(
        store.CheckpointError,
        r'another model: params/b: shape \[7\], wanted \[8\].*and 3 more',
      ):
        saved.restore(abstract, None)


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size


class LoadParamsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.state, _ = make()
    cls.model = small.run_config(modules=1).model

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    with store.Store(self.workdir / 'checkpoints') as saved:
      saved.save(self.state, None, step=4, extra=EXTRA)

  @parameterized.parameters('', 'checkpoints', 'checkpoints/4')
  def test_finds_the_weights(self, below):
    found = store.load_params(self.workdir / below, self.model)
    assert_same(self.state.params, found)

  def test_on_a_mesh_in_another_type(self):
    cfg = dataclasses.replace(self.model, param_dtype='bfloat16')
    found = store.load_params(self.workdir, cfg, mesh_of(8))
    wanted = small.leaves(model_params.abstract(cfg))
    for path, leaf in small.leaves(found).items():
      self.assertEqual(leaf.dtype, wanted[path].dtype)
      self.assertLen(leaf.devices(), 8)
      saved = np.asarray(small.leaves(self.state.params)[path])
      np.testing.assert_array_equal(leaf, saved.astype(leaf.dtype))

  def test_mtp_modules_are_copied_or_left_out(self):
    more = dataclasses.replace(self.model, mtp_modules=3)
    found = store.load_params(self.workdir, more, mesh_of(8))
    first = np.asarray(self.state.params['mtp']['proj'])[0]
    for copy in np.asarray(found['mtp']['proj']):
      np.testing.assert_array_equal(copy, first)
    none = dataclasses.replace(self.model, mtp_modules=0)
    found = store.load_params(self.workdir, none)
    self.assertNotIn('mtp', found)
    assert_same(found['blocks'], self.state.params['blocks'])

  def test_a_model_that_computes_otherwise_is_refused(self):
    fewer = dataclasses.replace(self.model, top_k=1, min_k=1)
    with self.assertRaisesRegex(store.CheckpointError, 'top_k is 2 .* 1 here'):
      store.load_params(self.workdir, fewer)
    other = dataclasses.replace(self.model, rope_theta=1e4)
    with self.assertRaisesRegex(
      store.CheckpointError, 'rope_theta is 5000000.0 there and 10000.0 here'
    ):
      store.load_params(self.workdir, other)


class FingerprintTest(parameterized.TestCase):
  @parameterized.parameters('float32', 'bfloat16', 'int32', 'uint8')
  def test_one_changed_bit_changes_the_sum(self, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 99, (5, 7)).astype(jax.numpy.dtype(dtype))
    before = fingerprint.sums({'x': x})
    for _ in range(20):
      y = x.copy()
      raw = y.view(np.uint8).reshape(-1)
      raw[rng.integers(raw.size)] ^= 1 << rng.integers(8)
      self.assertNotEqual(before, fingerprint.sums({'x': y}))

  def test_exchanged_values_change_the_sum(self):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    self.assertNotEqual(fingerprint.sums(x), fingerprint.sums(x[::-1]))

  def test_a_sum_does_not_depend_on_the_sharding(self):
    x = np.random.default_rng(0).standard_normal((8, 6), np.float32)
    mesh = mesh_of(8)
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P('data', 'fsdp')))
    with jax.set_mesh(mesh):
      self.assertEqual(fingerprint.sums(x), fingerprint.sums(spread))

  @parameterized.parameters('float32', 'bfloat16', 'int8')
  def test_parts_add_up(self, dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(-99, 99, (7, 30, 11)).astype(jax.numpy.dtype(dtype))
    with mock.patch.object(fingerprint, '_STRIP', 64):
      fingerprint._odd.cache_clear()
      parts = [fingerprint.partial(x[i], i * 330) for i in range(7)]
    fingerprint._odd.cache_clear()
    self.assertEqual([sum(parts) % 2**32], fingerprint.sums(x))


if __name__ == '__main__':
  absltest.main()
