"""A first signal leaves a mark, a second one ends the process."""

import os
import signal
import time
from unittest import mock

from absl.testing import absltest, parameterized

from m2.train import signals


class SignalsTest(parameterized.TestCase):
  @parameterized.parameters((signal.SIGTERM, 143), (signal.SIGINT, 130))
  def test_the_first_is_remembered_and_decides_the_code(self, number, code):
    before = signal.getsignal(number)
    with signals.Signals() as asked:
      self.assertEqual(asked.raised, 0)
      os.kill(os.getpid(), number)
      self.assertEqual(asked.raised, number)
      stopped = asked.stopped(12)
    self.assertEqual(stopped.code, code)
    self.assertIs(signal.getsignal(number), before)

  def test_the_second_is_not_caught(self):
    with signals.Signals():
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes it on
      now = time.monotonic() + 3
      with mock.patch.object(signals.time, 'monotonic', return_value=now):
        with self.assertRaises(KeyboardInterrupt):
          os.kill(os.getpid(), signal.SIGINT)

  def test_a_host_that_got_none_ends_as_the_others(self):
    """It learns from them that the run is to stop."""
    self.assertEqual(signals.Signals().stopped(3).code, 143)


if __name__ == '__main__':
  absltest.main()
