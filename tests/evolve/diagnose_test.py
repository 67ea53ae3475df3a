"""The diagnosis names the planted weakness and cites what can be looked up."""

import json
import pathlib

from absl.testing import absltest, parameterized

from m2.eval import run as eval_run
from m2.evolve import diagnose, observe
from tests.evolve import reports

SKILLS = ('add_col', 'drop_col', 'rename_col', 'split_table')
ERROR = ({'role': 'tool', 'content': 'error: duplicate column name: age'},)


def rows(skill: str, passed: int, failed: int, **fields):
  return [
    reports.row(f'{skill}-{number}', skill, number < passed, **fields)
    for number in range(passed + failed)
  ]


class DiagnoseTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.checkpoint = self.root / 'rl'
    self.checkpoint.mkdir()

  def observe(self, found, skills=SKILLS) -> observe.RunReport:
    path = self.root / 'eval.json'
    eval_run.save(reports.report(found), path)
    return observe.observe(path, self.checkpoint, skills)

  def findings(self, found) -> list[diagnose.Finding]:
    return diagnose.diagnose(self.observe(found), 'dev/eval.json')

  @parameterized.parameters(*SKILLS)
  def test_names_the_weakest(self, weak):
    found = []
    for skill in SKILLS:
      found += rows(skill, *((3, 22) if skill == weak else (20, 5)))
    finding = self.findings(found)[0]
    self.assertEqual(finding.skill, weak)
    self.assertEqual(finding.confidence, 1.0)
    self.assertIn('3 of 25', finding.summary)
    # Half of the way from 12% to 80%.
    self.assertAlmostEqual(finding.expects, 0.34)

  def test_few_episodes_do_not_make_the_weakest(self):
    """Nothing of two says less than a quarter of forty."""
    found = rows('add_col', 0, 2) + rows('drop_col', 10, 30)
    found += rows('rename_col', 30, 10) + rows('split_table', 30, 10)
    self.assertEqual(self.findings(found)[0].skill, 'drop_col')

  def test_overlapping_skills_lower_the_confidence(self):
    found = []
    for skill in SKILLS:
      found += rows(skill, 10, 15)
    self.assertEqual(self.findings(found)[0].confidence, 0.0)

  def test_the_evidence_can_be_looked_up(self):
    found = rows('add_col', 20, 5) + rows('drop_col', 20, 5)
    found += rows('rename_col', 20, 5)
    found += rows('split_table', 2, 4, error_class='wrong_state')
    found += [
      reports.row(
        f'rejected-{number}',
        'split_table',
        False,
        error_class='sql_error',
        evidence='duplicate column name: age',
        transcript=ERROR,
      )
      for number in range(9)
    ]
    finding = self.findings(found)[0]
    self.assertIn('rejected by the database', finding.hypothesis)
    (cluster,) = [f for f in finding.evidence if 'sql_error' in f.text]
    self.assertEqual(cluster.source, 'dev/eval.json')
    self.assertIn('9 of 13 failures are tool: sql_error', cluster.text)
    self.assertIn('duplicate column name: age', cluster.text)
    self.assertEqual(cluster.ids, ('rejected-0', 'rejected-1', 'rejected-2'))

  @parameterized.parameters(
    ({'malformed': 1, 'transcript': ERROR}, 'format'),
    ({'transcript': ERROR}, 'tool'),
    ({'finished': False}, 'unfinished'),
    ({}, 'artifact'),
    ({'transcript': (*ERROR, {'role': 'tool', 'content': 'ok'})}, 'artifact'),
  )
  def test_roles(self, fields, role):
    found = rows('add_col', 0, 3, **fields)
    report = self.observe(found, ('add_col',))
    (cluster,) = report.skills['add_col'].failures
    self.assertEqual(cluster.label, f'{role}: wrong_state')

  def test_no_failure_no_finding(self):
    self.assertEmpty(self.findings([r for s in SKILLS for r in rows(s, 9, 0)]))

  def test_masked_episodes_are_counted_apart(self):
    found = [r for s in SKILLS for r in rows(s, 9, 1)]
    found += rows('add_col', 0, 5, judged=False)
    report = self.observe(found)
    self.assertEqual(report.masked, 5)
    self.assertEqual(report.skills['add_col'].n, 10)

  def test_a_skill_without_a_verdict_is_an_error(self):
    found = [r for s in SKILLS[1:] for r in rows(s, 9, 1)]
    with self.assertRaisesRegex(ValueError, "'add_col'.*evolve.dev_tasks"):
      self.observe(found)
    found += rows('add_col', 0, 5, judged=False)
    with self.assertRaisesRegex(ValueError, "of 5 episodes of 'add_col' none"):
      self.observe(found)

  def test_skills_outside_the_curriculum_are_left_alone(self):
    found = [r for s in SKILLS for r in rows(s, 9, 1)]
    found += rows('held_out', 0, 20)
    skills = {finding.skill for finding in self.findings(found)}
    self.assertEqual(skills, set(SKILLS))


class ReadingsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = pathlib.Path(self.create_tempdir().full_path)
    self.sft, self.rl = root / 'sft', root / 'rl'
    for run, before in ((self.sft, ''), (self.rl, str(self.sft))):
      run.mkdir()
      config = {'checkpoint': {'init_from': before}}
      (run / 'config.json').write_text(json.dumps(config))
    self.dev = root / 'eval.json'
    found = [r for s in SKILLS for r in rows(s, 9, 1)]
    eval_run.save(reports.report(found), self.dev)

  def write(self, run, name, *lines) -> None:
    (run / name).write_text(''.join(json.dumps(line) + '\n' for line in lines))

  def readings(self) -> dict[str, observe.Reading]:
    report = observe.observe(self.dev, self.rl, SKILLS)
    return {reading.name: reading for reading in report.readings}

  def test_without_records_nothing_is_claimed(self):
    self.assertEmpty(self.readings())

  def test_the_last_record_counts(self):
    self.write(
      self.rl,
      'introspection.jsonl',
      {'step': 50, 'expert_load': [[0.97, 0.01, 0.01, 0.01]]},
      {'step': 100, 'expert_load': [[0.25] * 4, [0.4, 0.2, 0.2, 0.2]]},
    )
    found = self.readings()['expert_load']
    self.assertEqual(found.source, 'rl/introspection.jsonl')
    self.assertIn('1.6 x its even share, in layer 1 (step 100)', found.value)
    self.assertTrue(found.healthy)

  def test_the_run_before_is_followed(self):
    self.write(
      self.sft, 'introspection.jsonl', {'step': 9, 'dead_experts': [0.0, 0.5]}
    )
    found = self.readings()['dead_experts']
    self.assertEqual(found.source, 'sft/introspection.jsonl')
    self.assertFalse(found.healthy)

  def test_folders_of_checkpoints_are_read_as_their_run(self):
    (self.sft / 'checkpoints' / '9').mkdir(parents=True)
    for folder in ('checkpoints', 'checkpoints/9'):
      config = {'checkpoint': {'init_from': str(self.sft / folder)}}
      (self.rl / 'config.json').write_text(json.dumps(config))
      self.write(
        self.sft,
        'introspection.jsonl',
        {'step': 9, 'dead_experts': [0.5]},
        {'step': 12, 'dead_experts': [0.0]},
      )
      found = self.readings()['dead_experts']
      self.assertEqual(found.source, 'sft/introspection.jsonl')
      # Step 9 is not known by what came after it.
      self.assertEqual(found.healthy, folder == 'checkpoints')

  def test_a_sick_run_is_the_alternative_and_halves_the_confidence(self):
    report = observe.observe(self.dev, self.rl, SKILLS)
    well = diagnose.diagnose(report, 'dev')[0]
    self.write(
      self.rl,
      'introspection.jsonl',
      {'step': 1, 'update_ratio': {'attn': [1e-3, 0.2], 'embed': 1e-3}},
    )
    report = observe.observe(self.dev, self.rl, SKILLS)
    sick = diagnose.diagnose(report, 'dev')[0]
    self.assertEqual(sick.confidence, well.confidence / 2)
    self.assertIn('update_ratio', sick.alternative)
    self.assertIn('largest in attn', sick.alternative)
    cited = [f for f in sick.evidence if f.source == 'rl/introspection.jsonl']
    self.assertLen(cited, 1)
    self.assertIn('names no skill', cited[0].text)

  def test_metrics_are_averaged_over_the_end(self):
    self.write(
      self.rl,
      'metrics.jsonl',
      *({'step': n, 'ce': 5.0, 'clipped': 0.0} for n in range(1, 91)),
      *(
        {'step': n, 'ce': 2.0, 'clipped': 1.0, 'log_z': 9.0}
        for n in range(91, 101)
      ),
    )
    found = self.readings()
    self.assertIn('2 over the last 10 of 100 lines', found['ce'].value)
    self.assertFalse(found['clipped'].healthy)
    self.assertIn('9 over the last 1 of 10 lines', found['log_z'].value)

  def test_what_is_not_finite_is_not_healthy(self):
    self.write(
      self.rl,
      'metrics.jsonl',
      *({'step': n, 'ce': 2.0} for n in range(1, 91)),
      *({'step': n, 'ce': None} for n in range(91, 101)),
    )
    self.write(
      self.rl,
      'introspection.jsonl',
      {'step': 1, 'update_ratio': {'attn': [1e-3], 'experts': [None]}},
    )
    found = self.readings()
    self.assertFalse(found['ce'].healthy)
    self.assertFalse(found['update_ratio'].healthy)
    self.assertIn('largest in experts', found['update_ratio'].value)

  def test_runs_that_start_from_each_other_end(self):
    config = {'checkpoint': {'init_from': str(self.rl)}}
    (self.sft / 'config.json').write_text(json.dumps(config))
    self.assertEmpty(self.readings())

  def test_a_torn_last_line_is_left_out(self):
    self.write(self.rl, 'metrics.jsonl', {'step': 1, 'ce': 3.0})
    with open(self.rl / 'metrics.jsonl', 'a') as file:
      file.write('{"step": 2, "ce"')
    self.assertIn('3 over the last 1 of 1', self.readings()['ce'].value)


if __name__ == '__main__':
  absltest.main()
