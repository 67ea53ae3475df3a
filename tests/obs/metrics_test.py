"""Metric files survive kills and resume without gaps or doubles."""

import io
import json
import pathlib

import numpy as np
from absl.testing import absltest, parameterized
from tensorboardX.proto import event_pb2

from m2.obs import metrics


class WriterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path) / 'new'
    self.path = self.workdir / 'metrics.jsonl'

  def rows(self) -> list[dict]:
    return [json.loads(line) for line in self.path.read_text().splitlines()]

  def test_lines_are_on_disk_as_they_are_written(self):
    writer = metrics.MetricWriter(self.workdir)
    writer.write(1, {'loss': np.float32(2.5), 'tokens': 7})
    self.assertEqual(self.rows(), [{'step': 1, 'loss': 2.5, 'tokens': 7}])
    writer.close()

  def test_float32_values_come_back_to_the_bit(self):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    with metrics.MetricWriter(self.workdir) as writer:
      for step, value in enumerate(values):
        writer.write(step + 1, {'loss': value})
    found = np.array([row['loss'] for row in self.rows()], np.float32)
    np.testing.assert_array_equal(found, values)

  def test_what_is_not_finite_is_null(self):
    with metrics.MetricWriter(self.workdir, tensorboard=True) as writer:
      writer.write(1, {'a': float('nan'), 'b': np.float32(np.inf)})
      writer.record(1, {'ratio': {'attn': [1.0, float('nan')], 'n': 2}})
    self.assertEqual(self.rows(), [{'step': 1, 'a': None, 'b': None}])
    (line,) = (self.workdir / 'introspection.jsonl').read_text().splitlines()
    want = {'step': 1, 'ratio': {'attn': [1.0, None], 'n': 2}}
    self.assertEqual(json.loads(line), want)

  def test_resuming_drops_later_and_torn_lines(self):
    with metrics.MetricWriter(self.workdir) as writer:
      for step in range(1, 8):
        writer.write(step, {'loss': step})
        writer.record(step, {'load': [[0.5, 0.5]]})
    with self.path.open('a') as file:
      file.write('{"step": 8, "lo')
    with metrics.MetricWriter(self.workdir, resume=4) as writer:
      writer.write(5, {'loss': 50})
    self.assertEqual([row['loss'] for row in self.rows()], [1, 2, 3, 4, 50])
    looked = (self.workdir / 'introspection.jsonl').read_text().splitlines()
    self.assertLen(looked, 4)

  def test_a_torn_line_alone_is_dropped(self):
    self.workdir.mkdir()
    self.path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}')
    with metrics.MetricWriter(self.workdir, resume=2) as writer:
      writer.write(2, {'loss': 3})
    self.assertEqual([row['loss'] for row in self.rows()], [1, 3])

  def test_tensorboard_holds_the_same_numbers(self):
    with metrics.MetricWriter(self.workdir, tensorboard=True) as writer:
      writer.write(3, {'loss': 1.5})
    (file,) = (self.workdir / 'tensorboard').iterdir()
    self.assertIn((3, 'loss', 1.5), list(scalars(file.read_bytes())))


def scalars(body: bytes):
  """(step, tag, value) of an event file: length, crc, record, crc."""
  at = 0
  while at < len(body):
    size = int.from_bytes(body[at : at + 8], 'little')
    event = event_pb2.Event.FromString(body[at + 12 : at + 12 + size])
    at += 16 + size
    for value in event.summary.value:
      yield event.step, value.tag, value.simple_value


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


class ProgressTest(parameterized.TestCase):
  def run_steps(self, stream, clock=None):
    progress = metrics.Progress(20, every=5, stream=stream)
    now = iter(range(100, 200))
    with absltest.mock.patch.object(
      metrics.time, 'monotonic', lambda: next(now)
    ):
      for step in range(1, 21):
        progress.update(step, 500, {'loss': 1.23456})
    return stream.getvalue()

  def test_plain_lines_every_few_steps_with_speed_and_time_left(self):
    lines = self.run_steps(io.StringIO()).splitlines()
    self.assertLen(lines, 4)
    # One second a step; the first one, which compiles, does not count.
    self.assertEqual(lines[0], 'step 5/20  loss 1.235  500 tok/s  0:15 left')
    self.assertEqual(lines[-1], 'step 20/20  loss 1.235  500 tok/s  0:00 left')

  def test_compiling_counts_for_neither_speed_nor_time_left(self):
    stream, now = io.StringIO(), iter((100, 102, 164))
    progress = metrics.Progress(5, every=1, stream=stream)
    with absltest.mock.patch.object(
      metrics.time, 'monotonic', lambda: next(now)
    ):
      progress.update(1, 500, {}, compiling=30.0)
      progress.update(2, 500, {})
      progress.update(3, 500, {'gap': None}, compiling=60.0)
    want = [  # two seconds a step, and a minute of compiling
      'step 1/5',
      'step 2/5  250 tok/s  0:06 left',
      'step 3/5  gap -  250 tok/s  0:04 left',
    ]
    self.assertEqual(stream.getvalue().splitlines(), want)

  def test_one_line_on_a_terminal(self):
    text = self.run_steps(Terminal())
    self.assertEqual(text.count('\n'), 1)
    self.assertEqual(text.count('\r'), 20)

  @parameterized.parameters((52, '0:52'), (727.4, '12:07'), (3727, '1:02:07'))
  def test_clock(self, seconds, text):
    self.assertEqual(metrics.clock(seconds), text)

  @parameterized.parameters((870, '870'), (12345, '12.3k'), (4.56e6, '4.56M'))
  def test_count(self, value, text):
    self.assertEqual(metrics.count(value), text)


if __name__ == '__main__':
  absltest.main()
