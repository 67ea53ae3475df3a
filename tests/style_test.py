"""Format, lint, and the ceilings that keep a file readable in one sitting."""

import ast
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILE_LINES = 420
KERNEL_LINES = 600  # a kernel with its tiles and pipeline is read as one
FUNCTION_LINES = 80
FOLDERS = ('m2', 'pallas_kernels', 'configs', 'tests', 'launch')
RUFF = (*FOLDERS, 'main.py', 'README.md')
TEXT = ('.py', '.sh', '.md', '.txt', '.yml', '.yaml', '.toml', '.ini', '.js')
TOP_LEVEL = {
  'm2', 'configs', 'pallas_kernels', 'launch', 'tests', 'main.py', 'README.md',
  'requirements.txt', 'LICENSE',
}  # fmt: skip
# A path of one machine, in a form that no example needs.
HOST_PATH = re.compile(r'(?<![\w.])/(?:home|Users|root|work|workspace|data)/\w')
LEFT_OPEN = re.compile(r'\b(?:TO' + r'DO|FIX' + r'ME|XX' + r'X|HA' + r'CK)\b')


def files(*suffixes: str) -> list[pathlib.Path]:
  """The project's own files with one of `suffixes`."""
  found = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in suffixes]
  for folder in FOLDERS:
    found += [p for p in (ROOT / folder).rglob('*') if p.suffix in suffixes]
  return sorted(p for p in found if '__pycache__' not in p.parts)


def name(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


class StyleTest(parameterized.TestCase):
  @parameterized.parameters('format --check', 'check')
  def test_ruff(self, command):
    run = subprocess.run(
      [sys.executable, '-m', 'ruff', *command.split(), '--no-cache', *RUFF],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stdout + run.stderr)

  def test_files_fit_the_ceiling(self):
    over = {}
    for path in files('.py'):
      kernel = path.is_relative_to(ROOT / 'pallas_kernels')
      size = path.read_text().count('\n')
      if size > (KERNEL_LINES if kernel else FILE_LINES):
        over[name(path)] = size
    self.assertEmpty(over)

  def test_functions_fit_the_ceiling(self):
    over = []
    for path in files('.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
          lines = node.end_lineno - node.lineno + 1
          if lines > FUNCTION_LINES:
            over.append(f'{name(path)}:{node.lineno} {node.name}: {lines}')
    self.assertEmpty(over)

  def test_marks_are_of_tests_and_not_of_their_parameters(self):
    # A mark above them is lost without a word, and the test runs everywhere.
    lost = re.compile(r'@pytest\.mark.*\n\s*@parameterized')
    found = [p for p in files('.py') if lost.search(p.read_text())]
    self.assertEmpty(found)

  def test_no_path_of_one_machine_and_nothing_left_open(self):
    found = []
    for path in files(*TEXT):
      for number, line in enumerate(path.read_text().splitlines(), 1):
        if HOST_PATH.search(line) or LEFT_OPEN.search(line):
          found.append(f'{name(path)}:{number}: {line.strip()[:60]}')
    self.assertEmpty(found)

  def test_the_patterns_find_what_they_are_for(self):
    self.assertRegex('open("/home' + '/someone/x")', HOST_PATH)
    self.assertNotRegex('see runs/data/x and https://a.b/data/x', HOST_PATH)
    self.assertRegex('# TO' + 'DO: later', LEFT_OPEN)

  def test_top_level_is_the_agreed_one(self):
    listing = subprocess.run(
      ['git', 'ls-files', '-co', '--exclude-standard'],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    if listing.returncode:  # a source archive: no git here
      seen = {p.name for p in ROOT.iterdir() if p.is_file()}
    else:
      seen = {line.split('/')[0] for line in listing.stdout.splitlines()}
    self.assertEmpty({x for x in seen if x[0] != '.'} - TOP_LEVEL)

  def test_imports_name_modules_not_their_contents(self):
    """`from m2.forge import window`, then `window.WindowedFifo`."""
    found = []
    for path in files('.py'):
      if path.name == '__init__.py':  # what a package offers under its name
        continue
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '')[:2] == 'm2':
          for alias in node.names:
            target = ROOT / node.module.replace('.', '/') / alias.name
            if not target.with_suffix('.py').exists() and not target.is_dir():
              where = f'{name(path)}:{node.lineno}'
              found.append(f'{where}: from {node.module} import {alias.name}')
    self.assertEmpty(found)


if __name__ == '__main__':
  absltest.main()
