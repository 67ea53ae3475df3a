"""The whole loop on a fake main: right order, right numbers, kill anywhere."""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

from absl.testing import absltest, parameterized

from m2 import config as m2_config
from m2 import stages
from m2.eval import run as eval_run
from m2.evolve import ledger, provenance, trial
from tests.evolve import fake_main

FAKE = pathlib.Path(fake_main.__file__)
SKILLS = ('add_col', 'rename_col', 'drop_col', fake_main.HARD)
TRAINED = ('sft', 'rl', 'evolve/targeted', 'evolve/control')
ASKED = (
  'evolve/dev',
  *(f'evolve/gate/{arm}' for arm in ('base', 'targeted', 'control')),
  *(f'test/{name}' for name in ('sft', 'rl', 'targeted', 'control')),
)
DRAWS = 500  # bootstrap resamples, fewer than in earnest
RATE_TOLERANCE = 0.12  # of a rate over 60 tasks


def config(**changes) -> m2_config.RunConfig:
  """A quickstart in miniature; `changes` replace whole sections."""
  sections = {
    'model': m2_config.ModelConfig(),
    'mesh': m2_config.MeshConfig(),
    'optim': m2_config.OptimConfig(),
    'loss': m2_config.LossConfig(),
    'data': m2_config.DataConfig(source='tasks'),
    'checkpoint': m2_config.CheckpointConfig(),
    'log': m2_config.LogConfig(),
    'guard': m2_config.GuardConfig(),
    'tasks': m2_config.TasksConfig(
      skills=tuple((skill, 1.0) for skill in sorted(SKILLS))
    ),
    'prompt': m2_config.PromptConfig(),
    'agent': m2_config.AgentConfig(),
    'engine': m2_config.EngineConfig(),
    'forge': m2_config.ForgeConfig(),
    'evolve': m2_config.EvolveConfig(
      dev_tasks=120, gate_tasks=300, gate_share=0.4
    ),
    'stages': m2_config.StagesConfig(
      rl_steps=10, evolve_steps=20, test_tasks=240
    ),
  }
  return m2_config.RunConfig(
    mode='quickstart', steps=30, **(sections | changes)
  )


def small() -> m2_config.RunConfig:
  """The same with few tasks: for tests that are not about the numbers."""
  return config(
    evolve=m2_config.EvolveConfig(dev_tasks=60, gate_tasks=60, gate_share=0.4),
    stages=m2_config.StagesConfig(rl_steps=10, evolve_steps=20, test_tasks=20),
  )


def run_here(config, workdir) -> dict:
  """All stages, acted in this process instead of one each."""

  def act(folder, label, main, lock):
    settings = json.loads((folder / 'stage.json').read_text())
    fake_main.act(settings, folder)
    for step in folder.glob('checkpoints/*'):  # as iterators leave there
      (step / 'data').mkdir(exist_ok=True)
      (step / 'data' / 'done.json').write_text('[]')
    return 1.0, 2**20

  with (
    mock.patch.object(trial, '_run', act),
    mock.patch.object(provenance, 'environment', lambda: {'device': 'none'}),
    mock.patch.object(eval_run, 'DRAWS', DRAWS),
    contextlib.redirect_stdout(io.StringIO()) as printed,
  ):
    found = stages.run(config, workdir, main=FAKE)
  return {**found, 'printed': printed.getvalue()}


def ran(workdir: pathlib.Path) -> dict[str, int]:
  """How often each stage was started."""
  return {
    path.parent.relative_to(workdir).as_posix(): path.stat().st_size
    for path in workdir.rglob('ran')
  }


def files(workdir: pathlib.Path) -> dict[str, bytes]:
  """What the stages wrote, but times, starts and rendered pages."""
  return {
    path.relative_to(workdir).as_posix(): path.read_bytes()
    for path in workdir.rglob('*.json*')
    if not path.name.startswith(
      ('ledger', 'done', 'results', 'adopted', 'round')
    )
  }


class StagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_story(self):
    found = run_here(config(), self.root)
    self.assertEqual(ran(self.root), dict.fromkeys((*TRAINED, *ASKED), 1))
    for one in found['stages']:
      folder = next(
        self.root / name for name in TRAINED if name.endswith(one['name'])
      )
      rates = fake_main.load(folder)
      self.assertEqual(one['n'], 240)
      for skill, score in one['skills'].items():
        self.assertAlmostEqual(
          score['rate'], rates[skill], delta=RATE_TOLERANCE
        )
      self.assertBetween(one['rate'], *one['interval'])
      self.assertEqual(one['tokens'], 90 * one['steps'])
      (apart,) = one['held_out'].values()
      self.assertEqual(apart['n'], 60)
      self.assertAlmostEqual(
        apart['rate'], fake_main.START, delta=RATE_TOLERANCE
      )
    evolve = found['evolve']
    self.assertEqual(evolve['skill'], fake_main.HARD)
    self.assertEqual(evolve['verdict'], 'keep', evolve['reasons'])
    self.assertEqual(evolve['adopted'], 'targeted')
    self.assertEqual(
      [one['name'] for one in found['stages'] if one['adopted']], ['targeted']
    )
    on_disk = json.loads((self.root / 'results.json').read_text())
    self.assertEqual({**on_disk, 'printed': found['printed']}, _json(found))
    self.assertTrue((self.root / 'report.html').exists())

  def test_a_setting_is_read_where_a_stage_reads_it(self):
    demos = ['tasks.retry_demos']
    unread = {'sft': ['data.path'], 'rl': demos, 'eval': demos}
    for _ in range(2):  # the second time, all stages were done before
      frozen = m2_config.RunConfig.from_config(m2_config.to_config(small()))
      with mock.patch.dict(fake_main.UNREAD, unread):
        run_here(frozen, self.root)
      self.assertEqual(m2_config.unread(frozen), ['data.path'])

  def test_both_arms_cost_the_same_and_differ_in_the_mixture_alone(self):
    run_here(config(), self.root)
    targeted, control = (
      json.loads((self.root / 'evolve' / arm / 'stage.json').read_text())
      for arm in ('targeted', 'control')
    )
    self.assertEqual(
      provenance.difference(targeted, control),
      [f'tasks.skills.{fake_main.HARD}'],
    )
    self.assertEqual(targeted['steps'], 20)
    self.assertEqual(targeted['seed'], 1)
    self.assertEqual(
      targeted['checkpoint']['init_from'], str((self.root / 'rl').resolve())
    )

  def test_no_evaluation_sees_the_edited_mixture(self):
    run_here(config(), self.root)
    for name in ASKED:
      stage = json.loads((self.root / name / 'stage.json').read_text())
      weights = stage['tasks']['skills']
      usual = {s: w for s, w in weights.items() if s != fake_main.HARD}
      self.assertEqual(set(usual.values()), {1.0})
      self.assertEqual('two_step_held_out' in usual, 'test' in name)
      hard = 2.0 if 'gate' in name else 1.0  # 0.4 of the tasks, beside three
      self.assertAlmostEqual(weights[fake_main.HARD], hard)
      self.assertEqual(stage['seed'], 0)

  def test_the_record_says_all(self):
    found = run_here(config(), self.root)
    entries = ledger.read(self.root / 'evolve' / 'ledger.jsonl')
    kinds = [entry.kind for entry in entries]
    self.assertEqual(
      kinds,
      [
        'registered',
        'evaluated dev',
        'proposed',
        'trained targeted',
        'trained control',
        'evaluated gate/base',
        'evaluated gate/targeted',
        'evaluated gate/control',
        'decided',
        'test opened',
        'test read',
      ],
    )
    self.assertEqual(found['ledger']['head'], entries[-1].hash)
    adopted = json.loads((self.root / 'evolve' / 'adopted.json').read_text())
    self.assertEqual(adopted['ledger'], entries[8].hash)
    proposed = entries[2].data
    self.assertTrue(
      any(fact['ids'] for fact in proposed['finding']['evidence'])
    )
    trained = [entries[3].data, entries[4].data]
    for name in ('steps', 'slots', 'lr', 'seed'):
      self.assertEqual(trained[0][name], trained[1][name])
    for text in (entry.hash[:12] for entry in entries[-1:]):
      self.assertIn(text, found['printed'])

  def test_killed_between_any_two_writes_it_ends_the_same(self):
    """Dies before and after every file and ledger write; nothing repeats."""
    whole = self.root / 'whole'
    ended = run_here(small(), whole)
    broken = self.root / 'broken'
    points = set()
    while True:
      try:
        with dying(points):
          found = run_here(small(), broken)
        break
      except Death:
        pass
    # 12 stages: config, work, marker; 11 entries; 5 files; each twice.
    self.assertGreater(len(points), 100)
    self.assertEqual(found['evolve']['gain'], ended['evolve']['gain'])
    self.assertEqual(
      _placeless(files(broken), broken), _placeless(files(whole), whole)
    )
    self.assertEqual(
      [(e.kind, _placeless(e.data, broken)) for e in entries(broken)],
      [(e.kind, _placeless(e.data, whole)) for e in entries(whole)],
    )
    # A stage runs again only if it died before its marker was written: when
    # its files were whole (twice: before and after them) or none.
    self.assertLessEqual(max(ran(broken).values()), 3)

  def test_killed_for_real_in_a_stage(self):
    """SIGKILL to the loop and its stage, at three of them, then to the end."""
    for name in ('rl', 'targeted', None):
      done = self._drive(name)
      self.assertEqual(
        done.returncode, -signal.SIGKILL if name else 0, done.stderr
      )
    times = ran(self.root)
    self.assertEqual(times.pop('rl'), 2)
    self.assertEqual(times.pop('evolve/targeted'), 2)
    # FAKE_KILL names the last folder: TEST of the arms died there as well.
    self.assertEqual(set(times.values()), {1}, times)
    self.assertTrue((self.root / 'results.json').exists())

  def _drive(self, kill: str | None) -> subprocess.CompletedProcess:
    code = (
      'import pathlib, sys; from m2 import stages; '
      'from tests import stages_test as t; '
      'stages.run(t.small(), pathlib.Path(sys.argv[1]), main=t.FAKE)'
    )
    environment = os.environ | {
      'FAKE_KILL': kill or '',
      'PYTHONPATH': str(provenance.ROOT),
      'JAX_PLATFORMS': 'cpu',
    }
    return subprocess.run(
      [sys.executable, '-c', code, str(self.root)],
      env=environment,
      cwd=provenance.ROOT,
      capture_output=True,
      text=True,
    )

  def test_test_is_not_opened_twice(self):
    run_here(config(), self.root)
    more = m2_config.StagesConfig(rl_steps=10, evolve_steps=20, test_tasks=241)
    with self.assertRaisesRegex(ledger.LedgerError, 'test opened'):
      run_here(config(stages=more), self.root)

  def test_a_checkpoint_changed_after_the_fact_is_found(self):
    run_here(config(), self.root)
    (path,) = (self.root / 'rl').glob('checkpoints/*/rates.json')
    path.write_text(path.read_text().replace('0.', '0.9'))
    with self.assertRaisesRegex(ledger.LedgerError, 'checkpoint_hash'):
      run_here(config(), self.root)

  def test_answers_changed_after_the_fact_are_found(self):
    run_here(config(), self.root)
    path = self.root / 'evolve' / 'gate' / 'targeted' / 'eval.json'
    path.write_text(path.read_text() + ' ')
    with self.assertRaisesRegex(ledger.LedgerError, 'report_hash'):
      run_here(config(), self.root)

  def test_answers_to_fewer_tasks_are_found(self):
    run_here(config(), self.root)
    path = self.root / 'test' / 'rl' / 'eval.json'
    content = json.loads(path.read_text())
    content['rows'] = [row for row in content['rows'] if row['passed']]
    path.write_text(json.dumps(content))
    with self.assertRaisesRegex(ledger.LedgerError, 'other test tasks'):
      run_here(config(), self.root)

  def test_another_seed_needs_another_folder(self):
    run_here(config(), self.root)
    other = m2_config.RunConfig(
      **{
        name: getattr(config(), name)
        for name in ('mode', 'steps', *m2_config.MODES['quickstart'])
      },
      seed=3,
    )
    with self.assertRaisesRegex(trial.TrialError, 'seed differ'):
      run_here(other, self.root)

  def test_without_a_failing_skill_there_is_no_round(self):
    with mock.patch.object(fake_main, 'START', 1.0):
      found = run_here(config(), self.root)
    self.assertEqual(found['evolve']['verdict'], 'none')
    self.assertEqual([one['name'] for one in found['stages']], ['sft', 'rl'])
    self.assertEqual(
      [one['name'] for one in found['stages'] if one['adopted']], ['rl']
    )
    self.assertIn('no skill fails', found['printed'])

  def test_a_useless_edit_is_reverted(self):
    with mock.patch.object(fake_main, 'HARDER', 1e6):
      found = run_here(config(), self.root)
    self.assertEqual(found['evolve']['verdict'], 'revert')
    self.assertEqual(
      [one['name'] for one in found['stages'] if one['adopted']], ['rl']
    )

  @parameterized.parameters(
    ({'data': m2_config.DataConfig(source='files')}, 'data.source'),
    ({'tasks': m2_config.TasksConfig()}, 'tasks.skills'),
    ({'stages': m2_config.StagesConfig(test_tasks=3)}, 'stages.test_tasks=3'),
    ({'evolve': m2_config.EvolveConfig(gate_tasks=3)}, 'evolve.gate_tasks=3'),
  )
  def test_impossible_settings_stop_before_anything_runs(self, change, named):
    with self.assertRaisesRegex(ValueError, named):
      run_here(config(**change), self.root)
    self.assertEmpty(ran(self.root))

  def test_the_table_is_aligned(self):
    printed = run_here(config(), self.root)['printed']
    lines = printed.split('checkpoint', 1)[1].splitlines()
    columns = [line.rindex('[') for line in lines[2:6]]
    self.assertLen(set(columns), 1)


class Death(BaseException):
  """Stands for SIGKILL."""


@contextlib.contextmanager
def dying(points: set):
  """Raises `Death` once more, at the first write not yet in `points`.

  A write is a JSON file, a ledger entry or all files of a stage; each is a
  point twice, before it and after it.
  """

  def at(point):
    if point not in points:
      points.add(point)
      raise Death

  def fragile(write, name):
    def wrapped(*arguments):
      at(('before', name(*arguments)))
      result = write(*arguments)
      at(('after', name(*arguments)))
      return result

    return wrapped

  with (
    mock.patch.object(
      provenance,
      'write_json',
      fragile(provenance.write_json, lambda path, _: str(path)),
    ),
    mock.patch.object(
      fake_main, 'act', fragile(fake_main.act, lambda _, folder: str(folder))
    ),
    mock.patch.object(
      ledger.Ledger,
      'append',
      fragile(ledger.Ledger.append, lambda _, kind, data: kind),
    ),
  ):
    yield


def _json(value):
  return json.loads(json.dumps(value))


def entries(workdir: pathlib.Path):
  return ledger.read(workdir / 'evolve' / 'ledger.jsonl')


def _placeless(value, workdir: pathlib.Path):
  """`value` as text, without the path of its folder or what depends on it."""
  if isinstance(value, dict):
    return {
      key: _placeless(inner, workdir)
      for key, inner in value.items()
      if key not in ('config_hash', 'time')
    }
  text = value.decode() if isinstance(value, bytes) else json.dumps(value)
  return text.replace(str(workdir.resolve()), '')


if __name__ == '__main__':
  absltest.main()
