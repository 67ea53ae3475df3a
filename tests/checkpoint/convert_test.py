"""The convert mode: there and back, and what it refuses."""

import pathlib

import jax
import numpy as np
from absl.testing import absltest, parameterized

from configs import convert as convert_config
from m2 import config as settings
from m2.checkpoint import convert, hf, shards, store
from m2.model import transformer

FP8 = pathlib.Path(__file__).resolve().parents[1] / 'data' / 'hf' / 'fp8'


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
    logits = transformer.logits(cfg, hf.load(out, cfg), np.ones((1, 3)))
    self.assertEqual(logits.shape, (1, 3, cfg.vocab))

  def test_a_full_target_is_refused(self):
    (self.folder / 'run').mkdir()
    (self.folder / 'run' / 'something').touch()
    for format in ('hf', 'workdir'):
      with self.assertRaisesRegex(FileExistsError, 'convert.target=.*run'):
        self.run_mode(FP8, self.folder / 'run', format=format)

  def test_sources_of_the_other_kind(self):
    target = self.folder / 'out'
    with self.assertRaisesRegex(store.CheckpointError, 'holds no checkpoint'):
      self.run_mode(self.folder, target)
    with self.assertRaises(FileNotFoundError):
      self.run_mode(self.folder, target, format='workdir')
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
