"""Who is named, when, and how often: by a clock that the test sets."""

from absl.testing import absltest

from m2.train import watchdog

LIMIT = 40.0
DATA, COMPILE, STEP, SAVE = range(4)


class StandingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.standing = watchdog.Standing(LIMIT)
    self.beats = {
      index: watchdog.Beat(f'host {index}', 0, 1, COMPILE) for index in range(3)
    }
    self.now = 0.0

  def pass_time(self, seconds, *, silent=(), **moves) -> list[str]:
    """All beat every second; `h1=(step, phase)` moves host 1 at once."""
    for name, (step, phase) in moves.items():
      index = int(name[1:])
      self.beats[index] = self.beats[index]._replace(step=step, phase=phase)
    lines = []
    for _ in range(seconds):
      self.now += 1
      for index, beat in self.beats.items():
        if index not in silent:
          self.beats[index] = beat._replace(count=beat.count + 1)
      lines += self.standing.update(dict(self.beats), self.now)
    return lines

  def run_steps(self, count, first=1):
    for step in range(first, first + count):
      at = (step, STEP)
      self.assertEmpty(self.pass_time(2, h0=at, h1=at, h2=at))

  def test_nobody_while_all_go_on_or_compile(self):
    self.assertEmpty(self.pass_time(300))
    self.run_steps(100)

  def test_a_silent_host_within_a_minute_and_once(self):
    self.run_steps(5)
    lines = self.pass_time(200, silent=(1,), h0=(6, STEP), h2=(6, STEP))
    self.assertLen(lines, 1)
    self.assertRegex(lines[0], r'^host 1 has been silent for 2\d s, at step 5')
    lines = self.pass_time(3, h1=(6, STEP))
    self.assertRegex(lines[0], r'^host 1 goes on after 2\d\d s, at step 6')

  def test_the_host_that_is_behind_not_those_that_wait(self):
    self.run_steps(5)
    lines = self.pass_time(55, h0=(6, STEP), h1=(6, DATA), h2=(6, STEP))
    self.assertEqual(
      lines,
      [
        'host 1 has been at step 6 (data) for 41 s, others are at step 6 (step)'
      ],
    )

  def test_all_of_them_if_none_is_ahead(self):
    self.run_steps(5)
    lines = self.pass_time(55)
    self.assertLen(lines, 3)
    self.assertRegex(lines[2], r'host 2 has been at step 5 \(step\) for 4\d s$')

  def test_slow_steps_are_no_news(self):
    self.run_steps(2)
    self.pass_time(35, h0=(3, STEP), h1=(3, STEP), h2=(3, STEP))
    at = (4, STEP)
    self.assertEmpty(self.pass_time(90, h0=at, h1=at, h2=at))
    self.assertNotEmpty(self.pass_time(40))

  def test_a_host_that_never_beat(self):
    self.beats[2] = watchdog.Beat('host 2', 0, -1, COMPILE)
    lines = self.pass_time(60, silent=(2,))
    self.assertLen(lines, 1)
    self.assertRegex(
      lines[0], r'^host 2 has been silent for 2\d s, at the start'
    )


if __name__ == '__main__':
  absltest.main()
