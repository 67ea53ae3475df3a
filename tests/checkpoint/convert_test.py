"""The convert mode: there and back, and what it refuses."""

import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import tensorstore as ts
from absl.testing import absltest, parameterized

from configs import convert as convert_config
from m2 import config as settings
from m2.checkpoint import convert, hf, hf_tree, saved, shards, store
from m2.parallel import mesh as meshes
from m2.parallel import sharding
from tests.bench import stream
from tests.checkpoint import hf_test, synthetic
from tests.model import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
FP8 = ROOT / 'tests' / 'data' / 'hf' / 'fp8'
CFG = hf_test.small(mtp_modules=1, vocab=96)


class ConvertTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def run_mode(self, source, target, **fields) -> None:
    config = convert_config.get_config()
    config.convert.update(source=str(source), target=str(target), **fields)
    frozen = settings.RunConfig.from_config(config)
    convert.run(frozen, self.folder / 'unused')

  def test_there_and_back(self):
    run, back = self.folder / 'run', self.folder / 'back'
    self.run_mode(FP8, run, format='workdir', dtype='float32')
    cfg = hf.config(FP8)
    params = store.load_params(run, cfg)  # what checkpoint.init_from calls
    jax.tree.map(np.testing.assert_array_equal, params, hf.load(FP8, cfg))
    (run / 'tokenizer.json').write_text('{}')
    self.run_mode(run / 'checkpoints' / '0', back, dtype='fp8')
    self.assertEqual(hf.config(back), cfg)
    self.assertEqual((back / 'tokenizer.json').read_text(), '{}')
    for name, tensor in shards.read(FP8).items():
      again = shards.read(back)[name].array()
      self.assertEqual(again.tobytes(), tensor.array().tobytes(), name)

  def test_small_types_and_files_beside(self):
    run, out = self.folder / 'run', self.folder / 'out'
    self.run_mode(FP8, run, format='workdir')
    meta = store.read_meta(store.newest(run))
    self.assertEqual(meta['leaves']['params/embed']['dtype'], 'bfloat16')
    self.run_mode(run, out, dtype='float32')
    cfg = hf.config(out)
    logits = tiny.logits(cfg, hf.load(out, cfg), np.ones((1, 3), int))
    self.assertEqual(logits.shape, (1, 3, cfg.vocab))

  def save_run(self, mesh: jax.sharding.Mesh | None = None) -> dict:
    """A run's checkpoint of random values; returns them."""
    params = hf_test.draw(CFG)
    held = params
    if mesh:
      places = sharding.param_shardings(params, mesh)
      held = jax.device_put(params, places)
    with store.Store(self.folder / 'run' / 'checkpoints') as checkpoints:
      checkpoints.save(
        {'params': jax.device_put(held)},
        None,
        step=3,
        extra={'config': {'model': settings.to_config(CFG).to_dict()}},
        asynchronous=False,
      )
    return params

  @parameterized.parameters(None, ((1, 2, 2, 2),))
  def test_a_matrix_at_a_time_from_any_mesh(self, sizes):
    mesh = sizes and meshes.make_mesh(settings.MeshConfig(*sizes))
    params = self.save_run(mesh)
    read, reads = saved._read, []

    def count(name, array):
      reads.append(array.size)
      return read(name, array)

    out = self.folder / 'out'
    with (
      mock.patch.object(saved, '_read', count),
      mock.patch.object(saved, '_SMALL', 0),
    ):
      self.run_mode(self.folder / 'run', out, dtype='float32')
    jax.tree.map(np.testing.assert_array_equal, hf.load(out, CFG), params)
    words = CFG.vocab * CFG.d_model  # embedding and head: what a device held
    matrices = [
      math.prod(leaf.shape[sharding.stacked(name) :])
      for name, leaf in hf_tree.flat(params).items()
      if leaf.size != words
    ]
    held = words // (8 if mesh else 1)
    self.assertContainsSubset({held, *matrices}, set(reads))
    self.assertEqual(max(reads), max(held, *matrices))

  def test_small_leaves_do_not_push_out_a_large_one(self):
    """The embedding is read by pieces of rows, and norms in between."""
    self.save_run()
    step = store.newest(self.folder / 'run')
    meta = store.read_meta(step)
    params = saved.params(step, meta, CFG)
    self.enter_context(
      mock.patch.object(saved, '_SMALL', params['final_norm'].nbytes)
    )
    with mock.patch.object(saved, '_read', wraps=saved._read) as read:
      for row in range(0, CFG.vocab, 8):
        params['embed'][row : row + 8,]
        params['final_norm'][:,]
    self.assertEqual(read.call_count, 2)

  def test_a_wrong_value_is_found_before_anything_is_written(self):
    self.save_run()
    folder = self.folder / 'run' / 'checkpoints' / '3' / 'params'
    base = {'driver': 'ocdbt', 'base': f'file://{folder}/'}
    base['path'] = 'blocks.moe.wo/'
    spec = {'driver': 'zarr3', 'kvstore': base}
    array = ts.open(spec, open=True, write=True, read=True).result()
    array[1, 3, 2, 5] = array[1, 3, 2, 5].read().result() + 1
    with self.assertRaisesRegex(store.CheckpointError, 'moe/wo is not what'):
      self.run_mode(self.folder / 'run', self.folder / 'out')
    self.assertFalse((self.folder / 'out').exists())

  def test_what_cannot_be_read_is_named(self):
    self.save_run()
    for file in (self.folder / 'run').glob('checkpoints/3/params/**/d/*'):
      os.truncate(file, file.stat().st_size // 2)
    with self.assertRaisesRegex(store.CheckpointError, 'cannot be read'):
      self.run_mode(self.folder / 'run', self.folder / 'out')
    self.assertFalse((self.folder / 'out').exists())

  @pytest.mark.exhaustive
  def test_memory_does_not_grow_with_the_model(self):
    """A few GB of real widths, by the command; in bfloat16 they are 2.9 GB."""
    source, run = self.folder / 'fp8', self.folder / 'run'
    synthetic.write(source, stream.model(2, 48), shard_bytes=10**9)
    self.run_mode(source, run, format='workdir')
    shutil.rmtree(source)
    size = sum(x.stat().st_size for x in run.rglob('*') if x.is_file())
    self.assertGreater(size, 2e9)
    done = subprocess.run(
      [
        sys.executable,
        '-c',
        'import atexit, runpy; from tests.bench import stream;'
        'atexit.register(lambda: print("PEAK", stream.peak()));'
        'runpy.run_path("main.py", run_name="__main__")',
        '--config=configs/convert.py',
        f'--config.convert.source={run}',
        f'--config.convert.target={self.folder / "out"}',
        f'--workdir={self.folder / "workdir"}',
      ],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    peak = int(re.search(r'PEAK (\d+)', done.stdout)[1])
    self.assertLess(peak, 2 * 2**30)

  def test_an_interrupted_conversion_begins_anew(self):
    run = self.folder / 'run'
    source = shutil.copytree(FP8, self.folder / 'source')
    (source / 'tokenizer.json').write_text('{}')
    with mock.patch.object(store.Store, 'save', side_effect=OSError('full')):
      with self.assertRaisesRegex(OSError, 'full'):
        self.run_mode(source, run, format='workdir')
    self.assertEqual((run / 'tokenizer.json').read_text(), '{}')
    (run / 'checkpoints' / '0.orbax-checkpoint-tmp').mkdir()
    self.run_mode(FP8, run, format='workdir')
    self.assertEqual([path.name for path in run.iterdir()], ['checkpoints'])
    self.assertEqual(store.newest(run).name, '0')
    with self.assertRaisesRegex(FileExistsError, 'convert.target=.*run'):
      self.run_mode(FP8, run, format='workdir')

  def test_a_full_target_is_refused(self):
    (self.folder / 'run').mkdir()
    (self.folder / 'run' / 'tokenizer.json').touch()
    for format in ('hf', 'workdir'):
      with self.assertRaisesRegex(FileExistsError, 'convert.target=.*run'):
        self.run_mode(FP8, self.folder / 'run', format=format)

  def test_sources_of_the_other_kind(self):
    target = self.folder / 'out'
    with self.assertRaisesRegex(store.CheckpointError, 'holds no checkpoint'):
      self.run_mode(self.folder, target)
    with self.assertRaises(FileNotFoundError):
      self.run_mode(self.folder, target, format='workdir')
    with self.assertRaisesRegex(ValueError, 'in the public format already'):
      self.run_mode(FP8, target)
    self.assertFalse(target.exists())

  @parameterized.parameters(
    (dict(format='onnx'), 'convert.format'),
    (dict(dtype='int4'), 'convert.dtype'),
    (dict(format='workdir', dtype='fp8'), 'convert.dtype=fp8'),
    (dict(source=''), 'convert.source is empty'),
    (dict(target=''), 'convert.target is empty'),
  )
  def test_settings(self, fields, pattern):
    fields = {'source': FP8, 'target': self.folder / 'out'} | fields
    with self.assertRaisesRegex(ValueError, pattern):
      self.run_mode(**fields)


if __name__ == '__main__':
  absltest.main()
