"""A save that was killed: what is kept, what is written anew."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time
import unittest.mock

from absl.testing import absltest

from m2.checkpoint import (
  hf,
  hf_save,
  shards,
  storage,
)
from tests.checkpoint import hf_test
from tests.checkpoint.stream_test import BLOCKS, ROOT


class ResumeTest(hf_test.FilesTest):
  """A save with `resume` goes on where it was killed."""

  cfg = hf_test.small(**BLOCKS)
  save = functools.partial(hf.save, cfg=cfg, dtype='fp8', shard_bytes=300_000)

  CHILD = """
import sys, time
from m2.checkpoint import hf, shards
from tests.checkpoint import hf_test, save_resume_test
write = shards.write
def slowly(*args):
  yield from write(*args)
  time.sleep(0.3)
shards.write = slowly
save_resume_test.ResumeTest.save(
  hf_test.draw(save_resume_test.ResumeTest.cfg), sys.argv[1], resume='drawn')
"""

  def kill_midway(self) -> pathlib.Path:
    """Kills a saving process behind its third shard; returns what is left."""
    target = self.folder / 'out'
    child = subprocess.Popen(
      [sys.executable, '-c', self.CHILD, str(target)], cwd=ROOT
    )
    left = self.folder / 'out.unfinished'
    end = time.monotonic() + 120
    while len(list(left.glob('*.safetensors'))) < 3:
      self.assertIsNone(child.poll())
      self.assertLess(time.monotonic(), end)
      time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    self.assertFalse(target.exists())
    self.assertFalse((left / shards.INDEX).exists())
    return left

  def test_finished_shards_are_kept_after_a_kill(self):
    left = self.kill_midway()
    whole = {f.name: f.stat() for f in left.glob('*.safetensors')}
    spoilt = sorted(whole)[1]
    os.truncate(left / spoilt, 100)  # what no rename protects: a bad disk
    target = self.folder / 'out'
    self.save(hf_test.draw(self.cfg), target, resume='drawn')
    self.assertFalse(left.exists())
    for name, stat in whole.items():
      kept = (target / name).stat().st_ino == stat.st_ino
      self.assertEqual(kept, name != spoilt, name)
    self.save(hf_test.draw(self.cfg), self.folder / 'at_once')
    names = {file.name for file in (self.folder / 'at_once').iterdir()}
    self.assertEqual({file.name for file in target.iterdir()}, names)
    for name in names:
      want = (self.folder / 'at_once' / name).read_bytes()
      self.assertEqual((target / name).read_bytes(), want, name)

  def test_other_values_are_written_anew(self):
    left = self.kill_midway()
    (left / 'model-00099-of-00099.safetensors').touch()
    target = self.folder / 'out'
    self.save(hf_test.draw(self.cfg, seed=1), target, resume='others')
    self.assertFalse((target / 'model-00099-of-00099.safetensors').exists())
    self.save(hf_test.draw(self.cfg, seed=1), self.folder / 'at_once')
    want = hf_test.stored(self.folder / 'at_once')
    self.assertEqual(hf_test.stored(target), want)

  def test_a_folder_of_the_user_is_not_cleared_away(self):
    own = self.folder / 'out.unfinished'
    own.mkdir()
    (own / 'notes.txt').write_text('mine')
    with self.assertRaisesRegex(FileExistsError, 'no save left it'):
      self.save(hf_test.draw(self.cfg), self.folder / 'out', resume='drawn')
    self.assertEqual((own / 'notes.txt').read_text(), 'mine')

  def test_shards_of_other_values_in_a_store_are_not_taken_over(self):
    url = f'memory://{self.id()}/out'
    real, room = shards.write, iter((3, 0))

    def fail(number):
      left = iter(range(number))

      def write(*args):
        if next(left, None) is None:
          raise OSError('no more')
        return real(*args)

      return unittest.mock.patch.object(shards, 'write', write)

    params = hf_test.draw(self.cfg, seed=1)
    for values, name in ((hf_test.draw(self.cfg), 'drawn'), (params, 'others')):
      with fail(next(room)), self.assertRaisesRegex(OSError, 'no more'):
        self.save(values, url, resume=name)
    self.save(params, url, resume='others')
    self.save(params, self.folder / 'disk')
    self.assertEqual(hf_test.stored(url), hf_test.stored(self.folder / 'disk'))

  def test_an_object_store_keeps_finished_shards_too(self):
    url = f'memory://{self.id()}/out'
    params = hf_test.draw(self.cfg)
    written = []
    real = shards.write

    def fail_at_fourth(folder, shard, workers):
      if len(written) == 3:
        raise OSError('no more')
      written.append(shard.file)
      return real(folder, shard, workers)

    with unittest.mock.patch.object(shards, 'write', fail_at_fourth):
      with self.assertRaisesRegex(OSError, 'no more'):
        self.save(params, url, resume='drawn')
      first, written[:] = list(written), []

    def note(folder, shard, workers):
      written.append(shard.file)
      return real(folder, shard, workers)

    with unittest.mock.patch.object(shards, 'write', note):
      self.save(params, url, resume='drawn')
    self.assertLen(first, 3)
    self.assertNotEmpty(written)
    self.assertEmpty(set(first) & set(written))
    self.save(params, self.folder / 'disk')
    self.assertEqual(hf_test.stored(url), hf_test.stored(self.folder / 'disk'))
    self.assertFalse(storage.folder(url).has(hf_save._MARK))


if __name__ == '__main__':
  absltest.main()
