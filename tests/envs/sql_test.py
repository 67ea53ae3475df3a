"""SQL tasks: the controls, the splits."""

import dataclasses
import random
import time
from unittest import mock

import pytest
from absl.testing import absltest

from m2 import config, types
from m2.envs import tasks
from m2.envs.families import sql, sql_database
from tests import clock

SPLITS = tuple(name for name, _ in sql.SPLITS)


def some(count, seed='s', levels=(0, 1, 2)):
  """`count` tasks over all skills, splits and levels."""
  rng = random.Random(seed)
  for index in range(count):
    skill, split = rng.choice(sql.SKILLS), rng.choice(SPLITS)
    if skill in sql.HELD_OUT and split == 'train':
      split = 'test'
    yield sql.generate(skill, rng.choice(levels), split, f'{seed}{index}')


def check_controls(test, found):
  """Every control of every task has its known verdict."""
  wrong = []
  for task in found:
    for name, (scripts, must_pass) in sql.controls(task).items():
      verdict = sql.verify(task, scripts)
      if verdict.passed != must_pass:
        wrong.append((name, task.id, verdict))
  test.assertEmpty(wrong[:5], f'{len(wrong)} wrong verdicts')


class ControlTest(absltest.TestCase):
  def test_all_controls_of_every_skill(self):
    check_controls(self, some(200))

  @pytest.mark.exhaustive
  def test_all_controls_of_10_000_instances(self):
    check_controls(self, some(10_000, 'heavy'))

  def test_the_same_artifact_has_the_same_verdict(self):
    for task in some(5):
      for scripts, _ in sql.controls(task).values():
        verdicts = {sql.verify(task, scripts) for _ in range(20)}
        self.assertLen(verdicts, 1)

  def test_a_runaway_query_has_failed(self):
    task = next(some(1))
    scripts, _ = sql.controls(task)['endless']
    verdict = sql.verify(task, scripts)
    # Recursion is refused outright; a join that explodes runs into the limit.
    self.assertEqual(verdict.error_class, 'hidden_error')
    name = task.data['tables'][0]['name']
    join = ','.join(f'{name} AS t{i}' for i in range(12))
    artifact = [sql.script_of(task), f'SELECT count(*) FROM {join}']
    for limit in ({'STEPS': 10**9, 'SECONDS': 0.05}, {'SECONDS': 1e9}):
      with mock.patch.multiple(sql_database, **limit):
        verdict = sql.verify(task, artifact)
      self.assertEqual(verdict.outcome, types.Outcome.SCORE)
      self.assertEqual((verdict.passed, verdict.error_class), (False, 'limit'))

  def test_a_database_too_large_to_compare_has_failed(self):
    task = next(some(1))
    wide = f"ALTER TABLE z ADD COLUMN b DEFAULT '{'x' * 1900}'"
    rows = ','.join(['(1)'] * 400)
    artifact = [f'CREATE TABLE z(a);INSERT INTO z VALUES{rows};{wide}']
    verdict = sql.verify(task, artifact)
    self.assertEqual(verdict.outcome, types.Outcome.SCORE)
    self.assertEqual((verdict.passed, verdict.error_class), (False, 'limit'))
    self.assertIn('characters to compare', verdict.evidence)

  def test_judged_databases_are_few(self):
    self.assertLessEqual(sql._judge.cache_info().maxsize, 512)

  def test_a_name_of_the_agents_is_no_timeout(self):
    task = next(some(1))
    script = 'CREATE TABLE interrupted(x UNIQUE);INSERT INTO interrupted '
    verdict = sql.verify(task, [script + 'VALUES(1),(1)'])
    self.assertEqual(verdict.outcome, types.Outcome.SCORE)
    self.assertIn('interrupted.x', verdict.evidence)

  def test_a_changed_task_is_another_task(self):
    task = sql.generate('add_col', 0, 'dev', 'x')
    self.assertTrue(sql.verify(task, [sql.script_of(task)]).passed)
    gold = [*task.data['gold'], 'CREATE TABLE spare(id INTEGER)']
    other = dataclasses.replace(task, data={**task.data, 'gold': gold})
    self.assertTrue(sql.verify(other, gold).passed)
    self.assertFalse(sql.verify(other, [sql.script_of(task)]).passed)
    broken = dataclasses.replace(task, data={**task.data, 'gold': ['DROP x']})
    verdict = sql.verify(broken, gold)
    self.assertEqual(verdict.outcome, types.Outcome.INFRA)
    self.assertIn('syntax error', verdict.evidence)

  def test_what_leaves_rows_out_is_seen(self):
    accepted = {'unique_dedup': 0, 'backfill_expr': 0}
    for seed in range(150):
      task = sql.generate('unique_dedup', 0, 'dev', f'p{seed}')
      last = task.data['gold'][-1]
      name = task.data['tables'][0]['name']
      short = f'DELETE FROM {name} WHERE id=(SELECT max(id) FROM {name})'
      accepted['unique_dedup'] += sql.verify(task, [short, last]).passed
      task = sql.generate('backfill_expr', 0, 'dev', f'p{seed}')
      short = sql.script_of(task) + ' WHERE id<7'
      accepted['backfill_expr'] += sql.verify(task, [short]).passed
    self.assertEqual(accepted, {'unique_dedup': 0, 'backfill_expr': 0})

  def test_other_right_answers_pass(self):
    def first(skill):
      return sql.generate(skill, 0, 'dev', 'variant')

    task = first('add_col')
    name, column, kind = _words(task.data['gold'][0], 2, 5, 6)
    old = task.data['tables'][0]['columns']
    kept = ','.join(c for c, _ in old)
    rebuilt = ','.join(f'{c} {k}' for c, k in [(column, kind), *old])
    self.assertTrue(
      sql.verify(
        task,
        [
          f'CREATE TABLE other(id INTEGER PRIMARY KEY,{rebuilt})',
          f'INSERT INTO other(id,{kept}) SELECT id,{kept} FROM {name}',
          f'DROP TABLE {name}; ALTER TABLE other RENAME TO {name}',
        ],
      ).passed
    )
    task = first('create_index')
    name = task.data['gold'][0].split(' ON ')[1]
    self.assertTrue(
      sql.verify(task, [f'create index "my own" on {name}']).passed
    )
    self.assertFalse(
      sql.verify(task, [f'CREATE UNIQUE INDEX u ON {name}']).passed
    )

  def test_a_default_may_be_spelled_otherwise(self):
    checked = 0
    for seed in range(20):
      task = sql.generate('add_col_default_notnull', 0, 'dev', f'd{seed}')
      (gold,) = task.data['gold']
      value = gold.rsplit(' ', 1)[1]
      if value.startswith("'"):
        same, wrong = f'"{value[1:-1]}"', f"'{value[1:-1]} '"
      else:
        same, wrong = f'(+{value})', f"'{value}'"
      head = gold.removesuffix(value)
      self.assertTrue(sql.verify(task, [head + same]).passed, same)
      verdict = sql.verify(task, [head + wrong])
      self.assertEqual(verdict.error_class, 'wrong_columns', wrong)
      checked += value.startswith("'")
    self.assertBetween(checked, 1, 19)

  def test_a_new_column_of_keys_may_reference_its_table(self):
    task = sql.generate('split_table', 0, 'dev', 'variant')
    child, owner, parent = task.data['link']
    self.assertIn(f'new table {child} with key id and {owner} INT', task.prompt)
    gold = sql.script_of(task)
    declared = f'{owner} INT,'
    self.assertIn(declared, gold)
    for kind, passes in (
      ('INTEGER', True),
      (f'INT REFERENCES {parent}', True),
      (f'integer REFERENCES {parent}(id)', True),
      (f'INT REFERENCES {parent}(id) ON DELETE CASCADE', False),
      (f'INT REFERENCES {child}(id)', False),
      ('TEXT', False),
      ('BIGINT', False),
      ('INT NOT NULL', False),
      ('INT UNIQUE', False),
    ):
      script = gold.replace(declared, f'{owner} {kind},')
      self.assertEqual(sql.verify(task, [script]).passed, passes, kind)
    key = gold.replace('id INTEGER PRIMARY KEY', 'id INT PRIMARY KEY', 1)
    self.assertFalse(sql.verify(task, [key]).passed)

  def test_mistakes_are_refused_with_sqlites_words(self):
    rng = random.Random(0)
    for task in some(100):
      wrong = sql.mistaken(task, rng)
      if wrong is not None:
        self.assertStartsWith(sql.answer(task, wrong), 'error: ')


def _words(text, *places):
  return [text.split()[place] for place in places]


class AnswerTest(absltest.TestCase):
  """Wrong answers that look right, or that sqlite cannot read back."""

  def check_wrong(self, task, *scripts, error):
    verdict = sql.verify(task, [sql.script_of(task), *scripts])
    self.assertEqual(verdict.outcome, types.Outcome.SCORE)
    self.assertFalse(verdict.passed)
    self.assertEqual(verdict.error_class, error)

  def test_what_cannot_be_read_back_is_a_zero_not_a_failed_machine(self):
    task = sql.generate('add_col', 0, 'dev', 'h0')
    name, column = _words(task.data['gold'][0], 2, 5)
    set_it = f"UPDATE {name} SET {column}=CAST(x'ff' AS TEXT)"
    self.check_wrong(task, set_it, error='broken_database')
    task = sql.generate('split_table', 0, 'dev', 'h0')
    (child,) = task.data['keyless']
    script = f'CREATE TABLE {child}(id INTEGER PRIMARY KEY)'
    verdict = sql.verify(task, [script])
    self.assertEqual(verdict.outcome, types.Outcome.SCORE)
    self.assertEqual(verdict.error_class, 'wrong_columns')
    task = sql.generate('add_fk_rebuild', 0, 'dev', 'h0')
    parent = task.data['tables'][1]
    script = sql.script_of(task).replace(
      f'{parent["name"]}(id)', f'{parent["name"]}({parent["columns"][0][0]})'
    )
    verdict = sql.verify(task, [script])
    self.assertEqual(verdict.outcome, types.Outcome.SCORE)
    self.assertEqual(verdict.error_class, 'broken_database')

  def test_declarations_nobody_asked_for(self):
    task = sql.generate('add_col', 0, 'dev', 'h0')
    name, column, kind = _words(task.data['gold'][0], 2, 5, 6)
    add = f'ALTER TABLE {name} ADD COLUMN {column} {kind}'
    drop = f'ALTER TABLE {name} DROP COLUMN {column}'
    for script, error in (
      (f'{drop};{add} COLLATE NOCASE', 'wrong_extras'),
      (f'ALTER TABLE {name} ADD COLUMN spare AS (id*2)', 'hidden_error'),
      ('CREATE TABLE sqlitespare(a)', 'extra_table'),
    ):
      self.check_wrong(task, script, error=error)
    said = f"{drop};{add} /* no COLLATE, no 'CHECK' */"
    self.assertTrue(sql.verify(task, [sql.script_of(task), said]).passed)
    task = sql.generate('add_fk_rebuild', 0, 'dev', 'h0')
    script = sql.script_of(task).replace('(id))', '(id) ON DELETE CASCADE)')
    script = script.replace('(id),', '(id) ON DELETE CASCADE,')
    self.assertEqual(sql.verify(task, [script]).error_class, 'wrong_links')

  def test_distractors_stay_to_the_letter(self):
    task = sql.generate('add_col', 2, 'dev', 'h0')
    index = task.data['schema'][-1]
    name = index.split()[2]
    again = index.replace(f'INDEX {name}', 'INDEX mine')
    self.check_wrong(task, f'DROP INDEX {name};{again}', error='wrong_exact')

  def test_a_key_that_numbers_no_rows_is_another_key(self):
    task = sql.generate('retype_rebuild', 0, 'dev', 'h0')
    script = sql.script_of(task).replace('PRIMARY KEY', 'PRIMARY KEY DESC')
    verdict = sql.verify(task, [script])
    self.assertEqual(verdict.error_class, 'wrong_indices')

  def test_rows_that_stay_keep_their_ids_where_others_have_any(self):
    task = sql.generate('merge_tables', 0, 'dev', 'h0')
    (name,) = task.data['keyless']
    twin = sql.script_of(task).split()[-1]
    self.check_wrong(task, f'UPDATE {name} SET id=id+1000', error='wrong_ids')
    self.check_wrong(task, f'UPDATE {name} SET id=-id', error='wrong_ids')
    first, rest = task.data['gold'][0], task.data['gold'][1]
    columns = first.split('(')[1].split(')')[0]
    far = (
      f'INSERT INTO {name}(id,{columns}) SELECT id+500,{columns} FROM {twin}'
    )
    self.assertTrue(sql.verify(task, [far, rest]).passed)

  def test_duplicates_are_always_there_to_delete(self):
    for seed in range(200):
      task = sql.generate('unique_dedup', seed % 3, 'dev', f'u{seed}')
      self.assertFalse(sql.verify(task, task.data['gold'][1:]).passed)

  def test_canonical_form_knows_no_names_values_or_phrases(self):
    forms: dict[str, set[str]] = {}
    for seed in range(400):
      task = sql.generate('add_col_default_notnull', 0, 'dev', f'c{seed}')
      kinds = [kind for _, kind in task.data['tables'][0]['columns']]
      key = f'{kinds} {task.data["gold"][0].split()[6]}'
      forms.setdefault(key, set()).add(sql.canonical_form(task))
    self.assertGreater(len(forms), 50)
    self.assertEqual({len(same) for same in forms.values()}, {1})
    every = [form for same in forms.values() for form in same]
    self.assertLen(set(every), len(every))


class SplitTest(absltest.TestCase):
  def test_signatures_never_cross_splits(self):
    where: dict[str, str] = {}
    for task in some(20_000, 'split'):
      self.assertEqual(where.setdefault(task.signature, task.split), task.split)
    counts = [list(where.values()).count(split) for split in SPLITS]
    self.assertGreater(min(counts), 50)

  def test_held_out_composition_is_not_for_training(self):
    with self.assertRaisesRegex(ValueError, 'held out'):
      sql.generate('two_step_held_out', 0, 'train', '0')
    mixture = config.TasksConfig(skills=(('two_step_held_out', 1.0),))
    with self.assertRaisesRegex(ValueError, 'held out'):
      tasks.Stream(mixture, 'train', 0)
    self.assertLen(tasks.sample(mixture, 'test', 3, 0), 3)

  def test_unknown_names_are_named(self):
    with self.assertRaisesRegex(ValueError, 'tasks.skills.fly'):
      tasks.Stream(config.TasksConfig(skills=(('fly', 1.0),)), 'train', 0)
    hard = config.TasksConfig(difficulty_max=sql.HARDEST)
    for index in range(30):
      tasks.Stream(hard, 'train', index)[0]
    harder = config.TasksConfig(difficulty_max=sql.HARDEST + 1)
    with self.assertRaisesRegex(ValueError, 'difficulty_max=19: the hardest'):
      tasks.Stream(harder, 'train', 0)
    with self.assertRaisesRegex(ValueError, "family='law'"):
      tasks.family('law')


class MixtureTest(absltest.TestCase):
  def test_weights_and_levels_are_kept(self):
    mixture = config.TasksConfig(
      skills=(('add_col', 3.0), ('rename_col', 1.0), ('drop_col', 0.0)),
      difficulty_min=1,
      difficulty_max=1,
    )
    drawn = tasks.sample(mixture, 'dev', 40, 0)
    skills = [task.skill for task in drawn]
    self.assertEqual(skills.count('add_col'), 30)
    self.assertEqual(skills.count('rename_col'), 10)
    self.assertEqual({task.difficulty for task in drawn}, {1})
    stream = tasks.Stream(mixture, 'dev', 0)
    self.assertEqual(stream[7], stream[7])
    share = [stream[i].skill for i in range(400)].count('add_col') / 400
    self.assertBetween(share, 0.65, 0.85)

  def test_no_skill_is_left_out_where_there_is_room(self):
    weights = {'add_col': 100.0, 'rename_col': 1.0, 'drop_col': 0.1}
    mixture = config.TasksConfig(skills=tuple(weights.items()))
    for count, skills in ((1, 1), (3, 3), (10, 3)):
      drawn = tasks.sample(mixture, 'dev', count, 0)
      self.assertLen(drawn, count)
      self.assertLen({task.skill for task in drawn}, skills)

  def test_demonstrations_solve_their_tasks(self):
    mixture = config.TasksConfig(retry_demos=0.5)
    rows = tasks.Demonstrations(mixture, 40, 0, system='S')
    self.assertEqual(rows[3], rows[3])
    retries = 0
    for index in range(len(rows)):
      messages = rows[index]['messages']
      answers = [m['content'] for m in messages if m['role'] == 'tool']
      self.assertEqual(answers[-1], 'ok')
      retries += answers[0].startswith('error:')
    self.assertBetween(retries, 10, 30)
    self.assertRaises(IndexError, lambda: rows[40])

  def test_speed(self):
    drawn = list(some(200))  # as many as gold states are kept of
    seconds = []
    for _ in range(3):
      start = time.process_time()
      for task in drawn:
        self.assertTrue(sql.verify(task, [sql.script_of(task)]).passed)
      seconds.append(time.process_time() - start)
    # 1,000 a second where nothing else runs; a quarter is a regression.
    self.assertGreater(len(drawn) / min(seconds), 250 / clock.slow())


if __name__ == '__main__':
  absltest.main()
