"""The databases of SQL workspaces: what scripts may do in them, and at once."""

import asyncio
import time
import tracemalloc
from unittest import mock

from absl.testing import absltest, parameterized

from m2 import types
from m2.envs.families import sql, sql_database
from tests import clock


class GuardTest(parameterized.TestCase):
  @parameterized.parameters(
    "ATTACH '/tmp/x' AS x",
    "VACUUM INTO '/tmp/x'",
    'PRAGMA user_version=3',
    "SELECT load_extension('x')",
    "SELECT writefile('/tmp/x', 'y')",
    'CREATE TEMP TABLE t(a)',
    'CREATE VIRTUAL TABLE t USING fts5(a)',
    "UPDATE sqlite_master SET sql=''",
    'SELECT zeroblob(1000000000)',
    'ROLLBACK',
    'SAVEPOINT a; ROLLBACK',
    'RELEASE a',
    'SAVEPOINT a' + '; DELETE FROM note; ROLLBACK TO a' * 21,
    'PRAGMA foreign_keys',
    'PRAGMA foreign_key_check',
    '/**/PRAGMA/**/user_version=3',
    '/**/COMMIT; DROP TABLE note',
    'INSERT INTO note VALUES(1); INSERT INTO note VALUES(1)',
    'SELECT \x00',
    'SELECT ' + '(' * 5000,
    ';' * 200_000,
    'SELECT random()',
    "SELECT date('now')",
    'SELECT current_timestamp',
    # Few instructions, each of them long: only the clock ends it.
    "SELECT sum(instr(printf('%.3900c', '0'), printf('%.1900c', '0') || a.i)) "
    'FROM (SELECT 1 AS i UNION ALL SELECT 2 UNION ALL SELECT 3) AS a, '
    + ', '.join(
      f'(SELECT 1 AS i UNION ALL SELECT 2 UNION ALL SELECT 3) AS b{n}'
      for n in range(12)
    ),
    'SELECT count(*) FROM sqlite_master AS a' + ';SELECT 1' * 900,
    # Short scripts that sqlite would read for hours: nothing executes yet.
    'WITH c0 AS (SELECT 1 AS i)'
    + ''.join(
      f', c{i + 1} /**/ as/**/ not materialized (SELECT 1 AS i FROM c{i}, c{i} '
      'UNION ALL SELECT 2)'
      for i in range(30)
    )
    + ' SELECT count(*) FROM c30',
    'CREATE TABLE spare(g0 INT'
    + ''.join(f', g{i + 1} AS (g{i}+g{i})' for i in range(30))
    + ')',
    'ALTER TABLE note ADD COLUMN g GENERATED ALWAYS AS (id + id)',
  )
  def test_refused_and_nothing_stays(self, script):
    db = sql_database.Database(
      sql_database.build(['CREATE TABLE note(id INTEGER PRIMARY KEY)'], {})
    )
    before = db.state(())
    try:
      db.run(script)
    except sql_database.ScriptError:
      pass
    else:
      self.assertIn(script, ('/**/COMMIT; DROP TABLE note',))
    if 'DROP' not in script:
      self.assertEqual(db.state(()), before)
    self.assertEqual(db.run('SELECT 1'), [(1,)])

  def test_what_changes_nothing_is_accepted(self):
    db = sql_database.Database(
      sql_database.build(['CREATE TABLE note(id INTEGER PRIMARY KEY)'], {})
    )
    for number, script in enumerate(
      (
        'PRAGMA foreign_keys=OFF; {}; pragma foreign_keys ( on );',
        '/**/PRAGMA/**/foreign_keys = 0 -- no links\n; {}',
        'BEGIN/* x */; {}; COMMIT/* y */;',
        '-- a\n/* b */ begin immediate; {}; end -- c',
        '\ufeffBEGIN; {}',
        'SAVEPOINT a; {}; RELEASE a',
        'BEGIN; SAVEPOINT a; {}; RELEASE SAVEPOINT a; COMMIT',
        'SAVEPOINT a; {}; SAVEPOINT a; DELETE FROM note; ROLLBACK TO a',
        '{}; SAVEPOINT a; DROP TABLE note; ROLLBACK TRANSACTION TO a; COMMIT',
      )
    ):
      db.run(script.format(f'INSERT INTO note VALUES({number})'))
      self.assertEqual(
        db.run('SELECT count(*) FROM note'), [(number + 1,)], script
      )
    # A savepoint ends with its script.
    with self.assertRaisesRegex(sql_database.ScriptError, 'no such savepoint'):
      db.run('DELETE FROM note; RELEASE a')
    self.assertEqual(db.run('SELECT count(*) FROM note'), [(number + 1,)])

  @parameterized.parameters(
    # Each level puts eight times as much in the place of x.
    (
      'SELECT x+x+x+x+x+x+x+x AS x FROM (' * 8
      + 'SELECT id AS x FROM note'
      + ')' * 8,
    ),
    (
      f'SELECT {"+".join(["id"] * 900)} AS x FROM note WHERE '
      f'{"+".join(["x"] * 900)}>0',
    ),
    (
      f'WITH c AS (SELECT {"+".join(["id"] * 900)} AS x FROM note) '
      f'SELECT {"+".join(["x"] * 900)} FROM c',
    ),
    (
      'SELECT * FROM note, ( SELECT "x"+"x"+"x"+"x"+"x"+"x" AS x FROM ('
      'SELECT "x"+"x"+"x"+"x"+"x"+"x" AS x FROM ((SELECT '
      + '+'.join(['[id]'] * 200)
      + ' AS x FROM note))))',
    ),
    *(
      (f'SELECT {x}+{x}+{x}+{x} AS {x} FROM{gap}(' * 10
       + f'SELECT id AS {x} FROM note' + ')' * 10,)
      for gap, x in (
        ('/**/', 'x'), ('--\n', 'x'), ('(/* ( */', 'x'), (' \ufeff', 'x'),
        ('', '\u20ac'),
      )
    ),
    (
      'WITH c AS/**/(SELECT ' + '+'.join(['id'] * 100) + ' AS x FROM note) '
      f'SELECT {"+".join(["x"] * 100)} FROM c',
    ),
    # Queries of expressions: each level has the one within it five times.
    (
      'SELECT (' * 10 + 'SELECT id FROM note'
      + ''.join(
        f') AS x{n} FROM note WHERE x{n}+x{n}+x{n}+x{n}>0' for n in range(10)
      ),
    ),
  )  # fmt: skip
  def test_what_grows_while_it_is_read_is_refused_at_once(self, script):
    db = sql_database.Database(
      sql_database.build(['CREATE TABLE note(id INTEGER PRIMARY KEY)'], {})
    )
    start = time.process_time()
    with self.assertRaisesRegex(sql_database.ScriptError, 'words are too many'):
      db.run(script)
    self.assertLess(time.process_time() - start, 0.1 * clock.slow())

  def test_usual_queries_are_not_too_many_words(self):
    db = sql_database.Database(
      sql_database.build(['CREATE TABLE t(id INTEGER PRIMARY KEY, a, b)'], {})
    )
    db.run(
      'SELECT t.a, s.total, (SELECT count(*) FROM t AS u WHERE u.b = t.b) '
      'FROM t JOIN (SELECT a, sum(b) AS total FROM t GROUP BY a) AS s '
      'ON s.a = t.a WHERE t.id NOT IN (SELECT min(id) FROM t GROUP BY a, b)'
    )
    rows = ','.join(f"({n}, 'word {n}', {n})" for n in range(300))
    db.run(f'INSERT INTO t VALUES {rows}')
    self.assertEqual(db.run('SELECT count(*) FROM t'), [(300,)])

  def test_growth_is_bounded(self):
    db = sql_database.Database(sql_database.build(['CREATE TABLE t(a)'], {}))
    db.run("INSERT INTO t VALUES(printf('%.3000c', 'x'))")
    with self.assertRaises(sql_database.ScriptError):
      for _ in range(20):
        db.run('INSERT INTO t SELECT a FROM t')

  @parameterized.named_parameters(
    (
      'links',
      'INSERT INTO note VALUES(9)',
      'CREATE TABLE z(a' + ', FOREIGN KEY(a) REFERENCES note' * 100 + ')',
      'INSERT INTO z VALUES' + ','.join(['(9)'] * 80),
      'INSERT INTO z SELECT 9 FROM z, z AS y LIMIT 6000',
    ),
    (
      'defaults',
      'CREATE TABLE z(a); INSERT INTO z VALUES' + ','.join(['(1)'] * 99),
      'INSERT INTO z SELECT 1 FROM z, z AS y LIMIT 6000',
      f"ALTER TABLE z ADD COLUMN b DEFAULT '{'x' * 1900}'",
    ),
    (
      'columns',
      *(
        f'CREATE TABLE z{n}(' + ','.join(f'c{m}' for m in range(700)) + ')'
        for n in range(40)
      ),
    ),
    (
      'checks',
      'CREATE TABLE z(a CHECK('
      + '+'.join(
        ["instr(printf('%.3900c', a), printf('%.1900c', a)||'b')"] * 30
      )
      + "<1)); INSERT INTO z VALUES('a')",
      *['INSERT INTO z SELECT a FROM z'] * 6,
    ),
  )
  def test_what_is_left_is_read_within_limits(self, *scripts):
    db = sql_database.Database(
      sql_database.build(['CREATE TABLE note(id INTEGER PRIMARY KEY)'], {})
    )
    for script in scripts:
      db.run(script)
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    start = time.process_time()
    with mock.patch.object(sql_database, 'SECONDS', 0.04):
      with self.assertRaises(sql_database.ScriptError) as caught:
        db.state(())
    self.assertTrue(caught.exception.limited)
    self.assertLess(time.process_time() - start, 1.0 * clock.slow())
    self.assertLess(tracemalloc.get_traced_memory()[1], 2**24)
    self.assertEqual(db.run('SELECT 1'), [(1,)])

  def test_columns_are_looked_at_once_per_script(self):
    db = sql_database.Database(
      sql_database.build(['CREATE TABLE note(id INTEGER PRIMARY KEY)'], {})
    )
    for n in range(60):
      columns = ','.join(f'c{m}' for m in range(700))
      db.run(f'CREATE TABLE z{n}({columns})')
    start = time.process_time()
    db.run('WITH x AS (SELECT 1) SELECT * FROM x' + ';SELECT 1' * 50)
    self.assertLess(time.process_time() - start, 0.3 * clock.slow())

  def test_one_violation_is_reported(self):
    db = sql_database.Database(
      sql_database.build(['CREATE TABLE note(id INTEGER PRIMARY KEY)'], {})
    )
    self.assertEqual(db.state(())['integrity'], (('ok',), None))
    db.run('CREATE TABLE z(a REFERENCES note); INSERT INTO z VALUES(8),(9)')
    self.assertEqual(db.state(())['integrity'], (('ok',), ('z', 1, 'note', 0)))

  def test_defaults_are_compared_by_value(self):
    def columns(declared):
      db = sql_database.Database(
        sql_database.build([f'CREATE TABLE t(a INT {declared})'], {})
      )
      return db.state(())['tables']['t']['columns']

    for same in (
      ('', 'DEFAULT NULL', 'DEFAULT null', 'DEFAULT (NULL)'),
      ('DEFAULT 7.5', 'DEFAULT 7.50', 'DEFAULT +7.5', 'DEFAULT (75e-1)'),
      ("DEFAULT 'cod'", 'DEFAULT "cod"', "DEFAULT ('cod')"),
      ('DEFAULT -1', 'DEFAULT - 1', 'DEFAULT (-1)'),
    ):
      self.assertLen({str(columns(one)) for one in same}, 1, same)
    other = (
      '',
      'DEFAULT 1',
      "DEFAULT '1'",
      'DEFAULT 1.0',
      "DEFAULT 'NULL'",
      'DEFAULT None',
      "DEFAULT ''",
      "DEFAULT 'COD'",
      "DEFAULT 'cod'",
      'DEFAULT current_timestamp',
      'DEFAULT (random())',
      "DEFAULT ('cod' || printf('%.3900c', 'x'))",
    )
    self.assertLen({str(columns(one)) for one in other}, len(other))
    # What is no literal is not run.
    self.assertEqual(columns('DEFAULT (random())')[0][3], 'random()')

  def test_a_call_is_whole_or_nothing(self):
    task = sql.generate('add_col', 0, 'dev', 'x')
    name = task.data['tables'][0]['name']

    async def play():
      async with sql.Workspace(task) as workspace:
        bad = await workspace.execute(f'DELETE FROM {name}; SELECT nowhere')
        count = await workspace.execute(f'SELECT count(*) FROM {name}')
        good = await workspace.execute(sql.script_of(task))
        return workspace, bad, count, good

    workspace, bad, count, good = asyncio.run(play())
    self.assertStartsWith(bad, 'error: no such column')
    self.assertGreater(int(count), 3)
    self.assertEqual(good, 'ok')
    self.assertLen(workspace.scripts, 2)
    self.assertTrue(sql.verify(task, workspace.scripts).passed)

  @parameterized.parameters(
    'pragma', 'attach', 'schema_write', 'temp_shadow', 'view', 'trigger'
  )
  def test_what_is_refused_is_an_answer_and_no_tampering(self, attack):
    task = sql.generate('add_col', 0, 'dev', 'x')

    async def play():
      async with sql.Workspace(task) as workspace:
        scripts, _ = sql.controls(task)[attack]
        answers = [await workspace.execute(script) for script in scripts]
        return sorted(answers), workspace.scripts

    (refused, done), artifact = asyncio.run(play())
    self.assertStartsWith(refused, 'error: ')
    self.assertEqual((done, artifact), ('ok', [sql.script_of(task)]))
    passed = types.Verdict(types.Outcome.SCORE, True, 1.0)
    self.assertEqual(sql.verify(task, artifact), passed)


if __name__ == '__main__':
  absltest.main()
