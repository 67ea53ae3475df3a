"""Who may import whom: the order in which the code can be read.

Every import statement of every module is looked at, function-level ones too,
so a lazy import is no way round. Packages are given by their path under the
root; a name covers what is below it unless a longer name is listed.
"""

import ast
import functools
import pathlib

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Package -> the packages of ours that it may import, beside itself.
MAY = {
  'pallas_kernels': '',
  'm2.types': '',
  'm2.obs': 'm2.types',
  'm2.config': '',
  'm2.parallel': 'pallas_kernels m2.config',
  'm2.model': 'm2.parallel pallas_kernels m2.config',
  'm2.data': 'm2.types m2.config',
  'm2.checkpoint': 'm2.model m2.parallel m2.config m2.types m2.obs',
  'm2.train': (
    'm2.model m2.parallel m2.data m2.checkpoint m2.obs m2.config m2.types'
  ),
  'm2.engine': 'm2.model m2.parallel pallas_kernels m2.types m2.config',
  'm2.gateway': 'm2.data.template m2.data.tokenizer m2.types m2.obs m2.engine',
  'm2.forge': (
    'm2.engine m2.gateway m2.model m2.parallel m2.train m2.data m2.checkpoint '
    'm2.eval m2.obs m2.types m2.config'  # agents and envs through m2.eval only
  ),
  'm2.agents': 'm2.types m2.config',
  'm2.envs': 'm2.types m2.config',
  'm2.synth': 'm2.agents m2.envs m2.types m2.obs m2.config',
  'm2.eval': 'm2.agents m2.envs m2.types m2.obs m2.config',
  'm2.evolve': 'm2.synth m2.eval m2.config m2.types m2.obs m2.envs',
  # Above everything: it compiles what the loops compile.
  'm2.plan': (
    'm2.engine m2.forge m2.train m2.model m2.parallel m2.evolve.provenance '
    'm2.config pallas_kernels'
  ),
  'configs': 'm2.config',
}
# These act through files and HTTP alone; a machine without jax can run them.
WITHOUT_JAX = ('agents', 'envs', 'synth', 'eval', 'evolve', 'types')
JAX = ('jax', 'jaxlib', 'flax', 'optax', 'orbax')


def modules() -> list[pathlib.Path]:
  """Every Python file of the product, tests not included."""
  found = [ROOT / 'main.py']
  for folder in ('m2', 'pallas_kernels', 'configs'):
    found += sorted((ROOT / folder).rglob('*.py'))
  return found


def dotted(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


@functools.cache
def imports(path: pathlib.Path) -> tuple[tuple[int, str], ...]:
  """(line, dotted name) of everything `path` imports, most specific first."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        parts = dotted(path).split('.')
        keep = len(parts) - node.level + (path.name == '__init__.py')
        base = '.'.join([*parts[:keep], *filter(None, [base])])
      found += [(node.lineno, f'{base}.{a.name}') for a in node.names]
  return tuple(found)


def under(name: str, package: str) -> bool:
  return name == package or name.startswith(package + '.')


def owner(name: str) -> str | None:
  """The entry of MAY that rules over the module `name`."""
  rules = [package for package in MAY if under(name, package)]
  return max(rules, key=len) if rules else None


def breaches(path: pathlib.Path) -> list[str]:
  """Imports of our own packages in `path` that MAY does not list."""
  package = owner(dotted(path))
  if package is None:
    return []
  allowed = [package, *MAY[package].split()]
  found = []
  for line, name in imports(path):
    ours = name.split('.')[0] in ('m2', 'pallas_kernels', 'configs', 'tests')
    if ours and not any(under(name, entry) for entry in allowed):
      where = path.relative_to(ROOT)
      found.append(f'{where}:{line}: {package} may not import {name}')
  return found


class LayeringTest(parameterized.TestCase):
  def test_packages_import_only_what_is_below_them(self):
    found = [line for path in modules() for line in breaches(path)]
    self.assertEmpty(found, '\n'.join(found))

  def test_every_package_has_a_rule(self):
    entries = {dotted(p) for p in modules()} - {'main', 'm2', 'm2.stages'}
    self.assertEmpty(sorted(name for name in entries if owner(name) is None))

  @parameterized.parameters(*WITHOUT_JAX)
  def test_does_not_import_jax(self, name):
    for path in modules():
      if under(dotted(path), f'm2.{name}'):
        for line, imported in imports(path):
          where = f'{path.relative_to(ROOT)}:{line}'
          self.assertNotIn(imported.split('.')[0], JAX, where)

  def test_stages_acts_by_files_and_processes_only(self):
    for line, imported in imports(ROOT / 'm2' / 'stages.py'):
      allowed = ('m2.evolve', 'm2.eval', 'm2.obs', 'm2.config', 'm2.types')
      ours = under(imported, 'm2')
      self.assertTrue(
        not ours or any(under(imported, name) for name in allowed),
        f'm2/stages.py:{line} imports {imported}',
      )
      self.assertNotIn(imported.split('.')[0], JAX)

  def test_only_main_and_plan_import_forge(self):
    for path in modules():
      owners = 'm2.forge', 'm2.plan'
      if path.name == 'main.py' or owner(dotted(path)) in owners:
        continue
      for line, imported in imports(path):
        where = f'{path.relative_to(ROOT)}:{line}'
        self.assertFalse(under(imported, 'm2.forge'), where)

  def test_kernels_do_not_import_m2(self):
    for path in modules():
      if under(dotted(path), 'pallas_kernels'):
        for line, imported in imports(path):
          where = f'{path.relative_to(ROOT)}:{line}'
          self.assertFalse(under(imported, 'm2'), where)

  def test_the_reader_sees_lazy_and_relative_imports(self):
    """The rules above are only as good as `imports`."""
    path = self.create_tempfile(
      content='def f():\n  import jax.numpy as jnp\n  from m2.forge import tree'
    )
    imports.cache_clear()
    found = imports(pathlib.Path(path.full_path))
    self.assertEqual(found, ((2, 'jax.numpy'), (3, 'm2.forge.tree')))


if __name__ == '__main__':
  absltest.main()
