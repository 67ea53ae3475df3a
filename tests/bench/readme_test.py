"""README's numbers are those of the results, and only those."""

import json
import pathlib
import sys
from typing import Any
from unittest import mock

from absl.testing import absltest

from tests.bench import layer_tables, quickstart, readme, record
from tests.obs import sample

EMPTY = '<!-- results: quickstart -->\nold\n<!-- end -->\n' + (
  '<!-- results: step_time -->\n<!-- end -->\n'
  '<!-- results: grouped_matmul -->\n<!-- end -->\n'
  '<!-- results: moe -->\n<!-- end -->\n'
  '<!-- results: route -->\n<!-- end -->\n'
  '<!-- results: layer_parts -->\n<!-- end -->\n'
  '<!-- results: rounding -->\n<!-- end -->\n'
  '<!-- results: decode_experts -->\n<!-- end -->\n'
  '<!-- results: expert_parallel -->\n<!-- end -->\n'
  '<!-- results: tpu_kernels -->\n<!-- end -->\n'
  '<!-- results: stream -->\n<!-- end -->'
)


def _with_commit(result: dict[str, Any], commit: str) -> dict[str, Any]:
  """A result, and what runs it is made of, as if measured at `commit`."""
  rows = [
    row | {'commit': commit} if 'commit' in row else row
    for row in result['rows']
  ]
  return result | {'commit': commit, 'rows': rows}


class ReadmeTest(absltest.TestCase):
  def test_readme_is_what_the_results_say(self):
    text = readme.README.read_text()
    self.assertEqual(
      text, readme.render(text), 'run: python -m tests.bench.readme'
    )

  def test_launch_readme_is_what_the_plans_say(self):
    text = readme.LAUNCH.read_text()
    self.assertEqual(
      text,
      readme.render(text, tables=readme.LAUNCH_TABLES),
      'run: python -m tests.bench.readme',
    )

  def test_absent_results_leave_no_numbers(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    text = readme.render(EMPTY, folder)
    self.assertNotIn('old', text)
    self.assertEqual(text.count('Not measured yet.'), len(readme.TABLES))

  def test_a_command_is_what_was_typed(self):
    typed = ['x.py', '--out', 'folder', '--tokens', '8', '16', '--out=other']
    with mock.patch.object(sys, 'argv', typed):
      words = record.command('moe')
    self.assertEqual(words, 'python -m tests.bench.moe --tokens 8 16')

  def test_a_run_becomes_a_row(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'run').mkdir()
    results = sample.results()
    results['environment'] |= {'processor': 'Some CPU (R) 9', 'device': '1 cpu'}
    (folder / 'run' / 'results.json').write_text(json.dumps(results))
    rows = quickstart.collect([folder / 'run'])
    device = quickstart.device(rows[0]['environment'])
    path = record.write('quickstart', device, rows, command='x', folder=folder)
    self.assertEqual(path.name, 'quickstart-some-cpu-r-9.json')
    text = readme.render(EMPTY, folder)
    self.assertIn(
      '| 0 | 42.0% | 61.0% | +19.0 [+14.0, +24.0] | keep: split_table | 400 | '
      '13.0 | 3.0 | Some CPU (R) 9, 2 cores | `cdcdcdcdc` |\n',
      text,
    )

  def test_a_run_is_filed_under_its_accelerator(self):
    environment = {'processor': 'Some CPU', 'device': '8 Some GPU 80GB'}
    self.assertEqual(quickstart.device(environment), 'Some GPU 80GB')

  def test_a_layer_becomes_a_row(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    row = {
      'direction': 'both',
      'tokens': 8192,
      'experts': 256,
      'routing': 'uniform',
      'seconds': {'mosaic_gpu': {'median': 0.012}, 'torch': {'median': 0.02}},
      'ratio_to_floor': 1.5,
      'saved_bytes': {'mosaic_gpu': 400 << 20, 'torch': 2000 << 20},
    }
    rows = [row, row | {'routing': 'zipf'}, {'direction': 'copy', 'rate': 1.0}]
    record.write('moe', 'Some GPU', rows, command='x', folder=folder)
    text = readme.render(EMPTY, folder)
    self.assertIn(
      '| with gradients | 256 | 8,192 | 12.00 | 20.00 |  |  |  |  | 1.50 | 400 '
      '| 2,000 | Some GPU | ',
      text,
    )
    self.assertEqual(text.count('Some GPU'), 1)

  def test_two_runs_of_one_seed_are_refused(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'results.json').write_text(json.dumps(sample.results()))
    with self.assertRaisesRegex(ValueError, 'needs one of its own'):
      quickstart.collect([folder, folder])

  def test_a_commit_says_that_files_had_changes(self):
    for suffix, mark in (('', ''), ('+changes', '+')):
      with self.subTest(suffix):
        result = {'commit': 'b025e13de' + 31 * 'c' + suffix}
        self.assertEqual(layer_tables.commit(result), f'`b025e13de{mark}`')

  def test_every_table_says_that_files_had_changes(self):
    tables = readme.TABLES | readme.LAUNCH_TABLES
    for name, table in tables.items():
      with self.subTest(name):
        results = record.read(name)
        clean, changed = (
          table([_with_commit(result, commit) for result in results])
          for commit in ('d' * 40, 'd' * 40 + '+changes')
        )
        self.assertIn(f'| `{"d" * 9}` |', clean)
        marked = clean.replace(f'`{"d" * 9}`', f'`{"d" * 9}+`')
        self.assertEqual(changed, marked)

  def test_a_missing_block_is_an_error(self):
    with self.assertRaisesRegex(ValueError, 'step_time'):
      readme.render('no blocks')

  def test_summary_gives_median_and_n(self):
    found = record.summary([3.0, 1.0, 2.0])
    self.assertEqual(found, {'n': 3, 'median': 2.0, 'min': 1.0, 'max': 3.0})
    with self.assertRaisesRegex(ValueError, 'nothing was measured'):
      record.summary([])


if __name__ == '__main__':
  absltest.main()
