"""Hashes cover what they say, and files are replaced whole."""

import json
import pathlib
import shutil
import subprocess

from absl.testing import absltest, parameterized

from m2.evolve import provenance

EVALUATOR = (
  'main.py',
  'configs/scaffold/default.md',
  'm2/agents/whitebox.py',
  'm2/data/parser.py',
  'm2/engine/sampling.py',
  'm2/envs/families/sql.py',
  'm2/eval/run.py',
  'm2/evolve/gate.py',
  'm2/evolve/sealed.py',
  'm2/forge/evaluate.py',
  'm2/gateway/capture.py',
  'm2/types.py',
  'pallas_kernels/__init__.py',
)


class ProvenanceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_digest_does_not_depend_on_the_order_of_keys(self):
    one = provenance.digest({'a': 1, 'b': [1, {'c': 2.5}]})
    self.assertEqual(one, provenance.digest({'b': [1, {'c': 2.5}], 'a': 1}))
    self.assertNotEqual(one, provenance.digest({'b': [1, {'c': 2}], 'a': 1}))

  @parameterized.parameters(
    ({'a': 1}, {'a': 1}, []),
    ({'a': 1}, {'a': 1.0}, ['a']),
    ({'a': True}, {'a': 1}, ['a']),
    ({'a': {'b': 1, 'c': 2}}, {'a': {'b': 1, 'd': 2}}, ['a.c', 'a.d']),
    ({'a': [1, 2]}, {'a': [2, 1]}, ['a']),
    ({'a': {}}, {'a': 1}, ['a']),
  )
  def test_difference_names_paths(self, old, new, paths):
    self.assertEqual(provenance.difference(old, new), paths)

  def test_fingerprint_sees_names_and_bytes(self):
    def take():
      return provenance.fingerprint([self.root / 'x'], self.root)

    (self.root / 'x' / 'y').mkdir(parents=True)
    (self.root / 'x' / 'y' / 'one').write_bytes(b'1')
    first = take()
    self.assertEqual(first, take())
    (self.root / 'x' / 'y' / 'one').write_bytes(b'2')
    second = take()
    (self.root / 'x' / 'y' / 'one').rename(self.root / 'x' / 'two')
    self.assertLen({first, second, take()}, 3)

  def test_a_failed_write_leaves_the_old_file(self):
    path = self.root / 'adopted.json'
    provenance.write_json(path, {'checkpoint': 'rl'})
    with self.assertRaises(ValueError):
      provenance.write_json(path, {'checkpoint': float('nan')})
    self.assertEqual(json.loads(path.read_text()), {'checkpoint': 'rl'})
    self.assertEqual([p.name for p in self.root.iterdir()], ['adopted.json'])

  def test_the_commit_is_that_of_this_tree_or_unknown(self):
    inside = subprocess.run(
      ['git', '-C', str(provenance.ROOT), 'rev-parse', '--show-prefix', 'HEAD'],
      capture_output=True,
      text=True,
    )
    lines = inside.stdout.splitlines()
    if inside.returncode or lines[0]:
      self.assertEqual(provenance.commit(), 'unknown')
    else:
      self.assertStartsWith(provenance.commit(), lines[1])

  def test_environment_names_the_device(self):
    found = provenance.environment()
    self.assertEqual(
      set(found),
      {'python', 'jax', 'cores', 'platform', 'processor', 'device'},
    )
    self.assertRegex(found['device'], r'^\d+ \w+')

  def test_the_evaluator_hash_covers_what_an_evaluation_runs(self):
    for name in ('m2', 'pallas_kernels', 'configs'):
      shutil.copytree(provenance.ROOT / name, self.root / name)
    shutil.copy(provenance.ROOT / 'main.py', self.root)
    first = provenance.evaluator(self.root)
    self.assertEqual(first, provenance.evaluator())
    for name in EVALUATOR:
      path = self.root / name
      before = path.read_bytes()
      path.write_bytes(before + b'\n')
      self.assertNotEqual(provenance.evaluator(self.root), first, name)
      path.write_bytes(before)
    # Settings have a hash of their own.
    (self.root / 'configs' / 'sft.py').write_text('')
    self.assertEqual(provenance.evaluator(self.root), first)


if __name__ == '__main__':
  absltest.main()
