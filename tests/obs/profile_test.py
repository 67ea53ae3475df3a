"""Peaks, and traces asked for while a run goes on."""

import pathlib
from unittest import mock

from absl.testing import absltest, parameterized

from m2.model import params
from m2.obs import profile
from tests.train import small


class ProfileTest(parameterized.TestCase):
  def test_flops_of_a_token(self):
    # Two FLOPs a parameter forward, twice that backward; and attention over
    # half a row: 2 products x 2 x heads x head_dim x length / 2, three times.
    self.assertEqual(profile.train_flops(1000, 3, 4, 8, 16), 6000 + 3 * 3072)
    active = params.active_count(small.MODEL)
    self.assertGreater(profile.train_flops(active, 2, 4, 8, 16), 6 * active)

  def test_share_of_the_peak(self):
    share = profile.mfu(1e5, 9.89e9, 'NVIDIA H200', 2)
    self.assertAlmostEqual(share, 0.5)
    self.assertIsNone(profile.mfu(1e5, 1e9, 'cpu', 1))

  def test_a_trace_lasts_some_steps_and_is_asked_for_by_a_file(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    calls = []
    tracer = profile.Tracer(workdir, calls.append, lambda: calls.append('stop'))
    for step in range(4):
      tracer.before(step)
    self.assertEmpty(calls)
    (workdir / 'trace').touch()
    for step in range(4, 12):
      tracer.before(step)
      if step == 6:
        self.assertNotIn('stop', calls)
    self.assertEqual(calls, [str(workdir / 'traces' / '4'), 'stop'])
    (workdir / 'trace').touch()
    tracer.before(12)
    tracer.close()
    self.assertEqual(calls[-1], 'stop')
    tracer.close()
    self.assertLen(calls, 4)

  def test_hosts_that_share_the_folder_may_all_see_the_file(self):
    workdir = pathlib.Path(self.create_tempdir().full_path)
    calls = []
    tracer = profile.Tracer(workdir, calls.append, lambda: None)
    with mock.patch.object(pathlib.Path, 'exists', return_value=True):
      tracer.before(1)
    self.assertLen(calls, 1)


if __name__ == '__main__':
  absltest.main()
