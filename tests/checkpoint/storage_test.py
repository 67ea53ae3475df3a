"""Object stores: the same checkpoints through the same code, and their errors.

TensorStore's own S3 client talks to a server in this process.
"""

import os
import unittest.mock

import numpy as np
from absl.testing import absltest, parameterized

from m2.checkpoint import hf, shards, storage
from tests.checkpoint import hf_test, s3_server

FP8 = hf_test.DATA / 'fp8'


class UrlTest(hf_test.FilesTest):
  def setUp(self):
    super().setUp()
    self.server = self.enter_context(s3_server.running())
    host, port = self.server.server_address
    self.enter_context(
      unittest.mock.patch.dict(
        os.environ,
        AWS_ENDPOINT_URL=f'http://{host}:{port}',
        AWS_ACCESS_KEY_ID='name',
        AWS_SECRET_ACCESS_KEY='secret',
      )
    )

  def url(self, kind: str) -> str:
    return {
      's3': 's3://bucket/some/model',
      'file': f'file://{self.folder}/model',
      'memory': f'memory://{self.id()}/model',
    }[kind]

  def upload(self, path=FP8) -> None:
    for file in path.iterdir():
      self.server.objects[f'/bucket/some/model/{file.name}'] = file.read_bytes()

  @parameterized.parameters('s3', 'file', 'memory')
  def test_there_and_back(self, kind):
    cfg, url = hf.config(FP8), self.url(kind)
    params = hf.load(FP8, cfg)
    hf.save(params, url, cfg, dtype='fp8', shard_bytes=30_000)
    self.assertEqual(hf.config(url), cfg)
    hf_test.assert_same(hf.load(url, cfg), params)
    self.assertEqual(hf_test.stored(url), hf_test.stored(FP8))
    with self.assertRaisesRegex(FileExistsError, 'model is there already'):
      hf.save(params, url, cfg)

  def test_tensors_are_read_by_ranges(self):
    self.upload()
    hf.load(self.url('s3'), hf.config(FP8))
    name = '/bucket/some/model/model.safetensors'
    self.assertNotIn(name, self.server.whole)
    counts = np.zeros(len(self.server.objects[name]), int)
    for key, first, last in self.server.ranges:
      if key == name:
        counts[first : last + 1] += 1
    self.assertTrue(counts.all())
    tensors = shards.read(FP8)
    start = min(tensor.offset for tensor in tensors.values())
    # Scales are read once more when the gap between two weights holds them.
    self.assertLess(counts[start:].mean(), 1.3)

  def test_a_server_that_is_busy_is_asked_again(self):
    self.upload()
    self.server.refuse = [(503, 'SlowDown')] * 2
    self.assertEqual(hf.config(self.url('s3')), hf.config(FP8))
    self.assertEmpty(self.server.refuse)

  @parameterized.parameters(
    (403, 'AccessDenied', PermissionError),
    (404, 'NoSuchBucket', FileNotFoundError),
    (400, 'AuthorizationHeaderMalformed', OSError),
  )
  def test_refusals(self, status, code, kind):
    self.upload()
    cfg = hf.config(FP8)
    self.server.always = (status, code)
    with self.assertRaises(kind) as caught:
      hf.load(self.url('s3'), cfg)
    self.assertIn('s3://bucket/some/model', str(caught.exception))
    self.assertNotIn('\n', str(caught.exception))
    self.assertLess(len(str(caught.exception)), 500)
    with self.assertRaises(OSError) as caught:
      hf.save(hf_test.draw(hf_test.small()), self.url('s3'), hf_test.small())
    self.assertIn(code, str(caught.exception))
    self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(-1, 9)
  def test_an_object_of_another_size(self, change):
    self.upload()
    name = '/bucket/some/model/model.safetensors'
    data = self.server.objects[name]
    self.server.objects[name] = data[:change] if change < 0 else data + b'123'
    with self.assertRaisesRegex(
      ValueError, 's3://bucket/some/model/model.safetensors: truncated or not'
    ):
      hf.load(self.url('s3'), hf.config(FP8))

  def test_fewer_bytes_than_asked_for(self):
    self.upload()
    files = storage.folder(self.url('s3'))
    self.server.cut = 3
    with self.assertRaisesRegex(ValueError, 'config.json: truncated'):
      files.read('config.json', 0, 20)

  def test_a_save_without_its_index_is_no_checkpoint(self):
    cfg = hf_test.small()
    params = hf_test.draw(cfg)
    params['head'][0, 0] = np.inf  # FP8 leaves it as it is
    params['blocks']['moe']['wo'][1, 3, 2, 2] = np.nan
    with self.assertRaisesRegex(ValueError, 'experts.3.w2.weight'):
      hf.save(params, self.url('s3'), cfg, dtype='fp8', shard_bytes=1000)
    self.assertGreater(len(self.server.objects), 1)
    with self.assertRaisesRegex(FileNotFoundError, 'neither'):
      hf.load(self.url('s3'), cfg)

  @parameterized.parameters('ftp://host/x', 's3://', 'gs://B/')
  def test_urls_of_no_store(self, url):
    with self.assertRaisesRegex(ValueError, f'{url}: no place for files'):
      storage.folder(url)


if __name__ == '__main__':
  absltest.main()
