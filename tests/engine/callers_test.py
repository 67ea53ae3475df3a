"""Whoever waits for a request may submit or cancel another once it is told."""

import threading
from unittest import mock

from absl.testing import absltest

from m2 import types
from m2.engine import engine as engine_lib
from tests.engine import engine_test

WAIT = 60.0  # seconds; what is locked for good would wait for ever


class CallersTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.engine, _ = engine_test.make()
    self.again = []

    def submit(_):
      try:
        self.again.append(self.engine.submit(self.request))
      except RuntimeError as error:
        self.again.append(error)

    self.request = engine_test.request(engine_test.prompts(1)[0])
    self.first = self.engine.submit(self.request)
    self.first.add_done_callback(submit)

  def check(self, function) -> None:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(WAIT)
    self.assertFalse(thread.is_alive(), 'it waits for itself')
    self.assertLen(self.again, 1)

  def test_of_a_request_that_was_cancelled(self):
    self.engine.cancel(self.first)
    self.check(self.engine._drop_cancelled)
    self.assertEqual(self.first.result().stop, types.StopReason.CANCELLED)
    self.assertFalse(self.again[0].done())

  def test_of_an_engine_that_has_failed(self):
    def step():
      with self.assertRaisesRegex(OSError, 'lost'):
        self.engine.step()

    lost = OSError('lost')
    with mock.patch.object(engine_lib, '_PREFILL', side_effect=lost):
      self.check(step)
    self.assertIsInstance(self.again[0], RuntimeError)

  def test_what_is_cancelled_during_a_step_ends_at_the_next(self):
    engine, _ = engine_test.make()
    first, second = (
      engine.submit(engine_test.request(p, max_new=60, seed=9))
      for p in engine_test.prompts(2, high=60)
    )
    engine.cancel(first)
    first.add_done_callback(lambda _: engine.cancel(second))
    engine.run([])
    self.assertEqual(second.result().stop, types.StopReason.CANCELLED)
    self.assertLess(len(second.result().ids), 60)


if __name__ == '__main__':
  absltest.main()
