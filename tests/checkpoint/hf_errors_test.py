"""Public checkpoints that are spoilt or refused: one clear error each."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from unittest import mock

import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from m2.checkpoint import hf, shards
from tests.checkpoint import hf_test


class LoadErrorsTest(hf_test.FilesTest):
  def check(self, path, *patterns, error=ValueError, cfg=None):
    cfg = cfg or hf.config(hf_test.DATA / path.name)
    with self.assertRaises(error) as caught:
      hf.load(path, cfg)
    for pattern in patterns:
      self.assertRegex(str(caught.exception), pattern)
    return str(caught.exception)

  def test_one_error_lists_everything(self):
    def spoil(tensors):
      del tensors['model.norm.weight']
      tensors['model.layers.9.spare'] = np.zeros(3, np.float32)
      tensors['lm_head.weight'] = tensors['lm_head.weight'][1:]
      tensors['model.layers.0.self_attn.q_proj.weight'] = np.zeros((48, 32))

    path = self.copy()
    self.rewrite(path, spoil)
    self.check(
      path,
      '4 tensors do not fit',
      r'model.norm.weight: missing',
      r'model.layers.9.spare: unexpected',
      r'lm_head.weight: shape \[60, 32\], the model has \[61, 32\]',
      r'q_proj.weight: type F64',
    )

  def test_long_lists_are_cut(self):
    def spoil(tensors):
      for name in [name for name in tensors if 'experts' in name]:
        del tensors[name]
      tensors.update({f'x{i}': np.zeros(1) for i in range(100)})

    path = self.copy()
    self.rewrite(path, spoil)
    message = self.check(path, '124 tensors', 'and 84 more')
    self.assertLess(len(message), 5000)

  def test_wild_sizes_are_refused_at_once(self):
    path = self.copy()
    wild = dataclasses.replace(hf.config(path), layers=10**9)
    (path / 'config.json').unlink()
    self.check(path, '1000000000 layers of .* matrices', cfg=wild)

  @parameterized.parameters('missing', 'shape', 'type', 'nan')
  def test_scales(self, case):
    name = 'model.layers.0.self_attn.q_proj.weight_scale_inv'
    path = self.copy('fp8')
    source = {n: t.array() for n, t in shards.read(path).items()}
    scale = np.array(source.pop(name))
    wrong = {
      'missing': None,
      'shape': scale[:1],
      'type': scale.astype(np.float16),
      'nan': scale * np.nan,
    }[case]
    if wrong is not None:
      source[name] = wrong
    (path / shards.SINGLE).unlink()
    safetensors.numpy.save_file(source, path / shards.SINGLE)
    self.check(path, '1 tensors', name)

  @parameterized.parameters(0x7F, 0xFF)
  def test_a_code_that_is_no_number(self, code):
    name = 'model.layers.0.block_sparse_moe.experts.1.w2.weight'
    path = self.copy('fp8')
    tensor = shards.read(path)[name]
    with open(path / tensor.file, 'r+b') as file:
      file.seek(tensor.offset + tensor.nbytes - 1)
      file.write(bytes([code]))
    self.check(path, f'{name}: a weight is NaN')

  def test_scale_without_fp8_weight_is_unexpected(self):
    name = 'model.layers.0.self_attn.q_proj.weight_scale_inv'
    path = self.copy()
    self.rewrite(path, lambda t: t.update({name: np.ones((1, 1), np.float32)}))
    self.check(path, f'{name}: unexpected')

  def test_rotation_tables_are_ignored(self):
    path = self.copy()
    name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    self.rewrite(path, lambda t: t.update({name: np.ones(4, np.float32)}))
    hf.load(path, hf.config(path))

  @parameterized.parameters(0, 5, 200, -7)
  def test_truncated_file_is_named(self, end):
    path = self.copy()
    file = path / shards.SINGLE
    file.write_bytes(file.read_bytes()[:end])
    self.check(path, 'model.safetensors: truncated or not a safetensors file')

  @parameterized.parameters(
    '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0.0, 4.0]}}',
    '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    '{"a": ' + '[' * 100_000 + ']' * 100_000 + '}',
    '[]',
  )
  def test_a_lying_header(self, header):
    path = self.copy()
    text = header.encode()
    file = path / shards.SINGLE
    file.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(4))
    cfg = hf.config(hf_test.DATA / path.name)
    self.check(path, 'truncated or not a safetensors file', cfg=cfg)

  def test_truncated_shard_is_named(self):
    path = self.copy('ratios_of_m2')
    file = sorted(path.glob('*.safetensors'))[1]
    file.write_bytes(file.read_bytes()[:-1])
    self.check(path, f'{file.name}: truncated')

  def test_absent_shard_is_named(self):
    path = self.copy('ratios_of_m2')
    file = sorted(path.glob('*.safetensors'))[1]
    file.unlink()
    self.check(path, file.name, error=FileNotFoundError)

  def test_absent_checkpoint(self):
    cfg = hf.config(hf_test.DATA / 'fp8')
    nowhere = self.folder / 'nowhere'
    self.check(nowhere, 'neither', error=FileNotFoundError, cfg=cfg)
    with self.assertRaises(FileNotFoundError):
      hf.config(nowhere)

  @parameterized.parameters(
    ('{', 'not a safetensors index'),
    ('[]', 'not a safetensors index'),
    ('{"weight_map": {"a": 3}}', 'must name files beside it'),
    ('{"weight_map": {"a": "../one.safetensors"}}', 'files beside it'),
    ('{"weight_map": {"a": ".."}}', 'files beside it'),
  )
  def test_bad_index(self, text, pattern):
    path = self.copy('ratios_of_m2')
    (path / shards.INDEX).write_text(text)
    cfg = hf.config(hf_test.DATA / 'ratios_of_m2')
    self.check(path, pattern, cfg=cfg)

  def test_index_and_files_disagree(self):
    path = self.copy('ratios_of_m2')
    tree = json.loads((path / shards.INDEX).read_text())
    files = sorted(set(tree['weight_map'].values()))
    moved = next(n for n, f in tree['weight_map'].items() if f != files[0])
    tree['weight_map'][moved] = files[0]
    tree['weight_map']['ghost'] = files[0]
    (path / shards.INDEX).write_text(json.dumps(tree))
    self.check(path, f'{moved}: in', 'ghost: not in')

  def test_config_that_means_another_function(self):
    """Heads and widths that tensors do not tell apart."""
    cfg = hf.config(hf_test.DATA / 'one_kv_head')
    cfg = dataclasses.replace(
      cfg, top_k=1, min_k=1, head_dim=24, heads=2, rope_theta=1e4
    )
    pattern = (
      'model.top_k=1 but it has 2.*model.heads=2 but it has 3.*head_dim=24.*'
      'rope_theta=10000'
    )
    self.check(hf_test.DATA / 'one_kv_head', pattern, cfg=cfg)

  def test_dtype(self):
    with self.assertRaisesRegex(ValueError, 'float16.*choose float32'):
      hf.load(
        hf_test.DATA / 'fp8', hf.config(hf_test.DATA / 'fp8'), dtype='float16'
      )


class SaveTest(hf_test.FilesTest):
  def test_refuses_what_is_there(self):
    cfg = hf_test.small()
    target = self.folder / 'full'
    target.mkdir()
    hf.save(hf_test.draw(cfg), target, cfg)  # an empty directory is fine
    before = hf_test.stored(target)
    with self.assertRaisesRegex(FileExistsError, 'full is there already'):
      hf.save(hf_test.draw(cfg, seed=1), target, cfg)
    self.assertEqual(hf_test.stored(target), before)

  def test_a_link_to_an_empty_folder_is_followed(self):
    cfg = hf_test.small()
    folder, link = self.folder / 'real', self.folder / 'link'
    folder.mkdir()
    link.symlink_to(folder)
    hf.save(hf_test.draw(cfg), link, cfg, resume='x')
    self.assertEqual(hf.config(folder).layers, cfg.layers)

  def test_a_mounted_disk_is_refused_before_anything_is_written(self):
    cfg = hf_test.small()
    with mock.patch.object(pathlib.Path, 'is_mount', return_value=True):
      with self.assertRaisesRegex(FileExistsError, 'disk is a mount point'):
        hf.save(hf_test.draw(cfg), self.folder / 'disk', cfg)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_a_failure_leaves_nothing(self):
    cfg = hf_test.small()
    params = hf_test.draw(cfg)
    params['blocks']['moe']['wo'][1, 3, 2, 2] = np.nan
    with self.assertRaisesRegex(ValueError, 'layers.1.*experts.3.w2.weight'):
      hf.save(params, self.folder / 'out', cfg, dtype='fp8', shard_bytes=1000)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_a_full_disk_is_an_error_and_leaves_nothing(self):
    code = (
      'import pathlib, resource, signal, sys\n'
      'from tests.checkpoint import hf_test\n'
      'from m2.checkpoint import hf\n'
      'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
      'resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n'
      'cfg = hf_test.small()\n'
      'try:\n'
      '  hf.save(hf_test.draw(cfg), sys.argv[1], cfg)\n'
      'except OSError as error:\n'
      '  print("refused", error)\n'
    )
    run = subprocess.run(
      [sys.executable, '-c', code, str(self.folder / 'out')],
      cwd=hf_test.DATA.parents[2],
      capture_output=True,
      text=True,
      timeout=60,
    )
    self.assertIn('refused', run.stdout, run.stderr)
    self.assertIn('model.safetensors', run.stdout)
    self.assertEmpty(list(self.folder.iterdir()))

  def test_leaves_must_be_the_model_s(self):
    cfg = hf_test.small()
    params = hf_test.draw(cfg)
    params['head'] = params['head'].T
    params['spare'] = params.pop('embed')
    with self.assertRaises(ValueError) as caught:
      hf.save(params, self.folder / 'out', cfg)
    for part in ('head: shape', 'spare: unknown', 'embed: missing'):
      self.assertIn(part, str(caught.exception))

  def test_what_the_format_cannot_say(self):
    cfg = hf_test.small(min_k=1, min_share=0.2)
    with self.assertRaisesRegex(ValueError, 'model.min_k=1.*fixed number'):
      hf.save(hf_test.draw(cfg), self.folder / 'out', cfg)
    with self.assertRaisesRegex(ValueError, "dtype='int8'"):
      hf.save(
        hf_test.draw(hf_test.small()),
        self.folder / 'out',
        hf_test.small(),
        dtype='int8',
      )

  def test_others_may_read_the_files(self):
    hf.save(hf_test.draw(hf_test.small()), self.folder / 'out', hf_test.small())
    for file in (self.folder / 'out', *(self.folder / 'out').iterdir()):
      self.assertEqual(file.stat().st_mode & 0o444, 0o444, file)


if __name__ == '__main__':
  absltest.main()
