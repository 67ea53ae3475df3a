"""Folders that the tests of one class share."""

import pathlib
import tempfile

from absl.testing import absltest


def of_class(test: type[absltest.TestCase]) -> pathlib.Path:
  """A new folder, gone after the class's last test; for `setUpClass`."""
  folder = tempfile.TemporaryDirectory()
  test.addClassCleanup(folder.cleanup)
  return pathlib.Path(folder.name)
