"""The report holds what the files say, and only shows what it is given."""

import html.parser
import json
import pathlib
import re

from absl.testing import absltest, parameterized

from m2.obs import curves, dashboard, page
from tests.obs import sample


class Elements(html.parser.HTMLParser):
  """Counts elements as a browser's parser would see them."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: dict[str, int] = {}
    self.words: list[str] = []
    self.data = ''
    self.ids: set[str] = set()
    self.targets: set[str] = set()
    self._inside = ''
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags[tag] = self.tags.get(tag, 0) + 1
    named = dict(attrs)
    self._inside = named.get('id', '') if tag == 'script' else ''
    self.ids.add(named.get('id', ''))
    if tag == 'a':
      self.targets.add(named['href'].removeprefix('#'))

  def handle_data(self, data):
    if self._inside == 'data':
      self.data += data
    self.words.append(data)


class DashboardTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)

  def build(self) -> tuple[str, Elements]:
    text = dashboard.build(self.workdir).read_text()
    return text, Elements(text)

  def test_a_whole_run_fills_every_section(self):
    sample.write(self.workdir)
    text, seen = self.build()
    for key, _ in page.SECTIONS:
      self.assertIn(key, seen.ids)
    self.assertEqual(seen.targets, {key for key, _ in page.SECTIONS})
    said = ' '.join(seen.words)
    self.assertIn('success went from 42.0% (sft) to 61.0% (rl)', said)
    self.assertIn('168 of 400', said)
    self.assertIn('targeted (adopted)', said)
    self.assertIn('1 unreadable line of rl/metrics.jsonl left out.', said)
    self.assertIn('The gold solutions come from the task generator.', said)
    charts = json.loads(seen.data)['charts']
    kinds = {chart['kind'] for chart in charts}
    self.assertEqual(kinds, {'lines', 'forest', 'bars', 'heat'})
    self.assertEqual(text.count('data-chart='), len(charts))

  def test_a_skill_without_a_verdict_has_no_rate(self):
    sample.write(self.workdir)
    path = self.workdir / 'results.json'
    results = json.loads(path.read_text())
    for stage in results['stages']:
      skill = min(stage['skills'])
      stage['skills'][skill] |= {'n': 0, 'rate': None, 'interval': [0, 1]}
    results['stages'][0] |= {'n': 0, 'rate': None, 'interval': [0, 1]}
    path.write_text(json.dumps(results))
    _, seen = self.build()
    self.assertIn('sealed test: sft -; rl 61.0%', seen.data)

  def test_nothing_is_fetched(self):
    sample.write(self.workdir)
    text, seen = self.build()
    self.assertNotIn('link', seen.tags)
    self.assertNotIn('img', seen.tags)
    self.assertNotRegex(text, r'(?:src|href)="(?!#)')
    self.assertNotRegex(text, r'@import|url\(|fetch\(')
    self.assertIn("default-src 'none'", text)

  def test_text_from_files_stays_text(self):
    sample.write(self.workdir)
    text, seen = self.build()
    self.assertEqual(seen.tags['script'], 3)  # data, charts.js, app.js
    self.assertNotIn(sample.HOSTILE, text)
    self.assertIn(sample.HOSTILE.split('>')[0], ''.join(seen.words))

  def test_metrics_alone_are_enough(self):
    sample.lines(self.workdir / 'metrics.jsonl', [{'step': 1, 'ce': 2.0}])
    _, seen = self.build()
    charts = json.loads(seen.data)['charts']
    self.assertEqual(charts[0]['series'][0]['points'], [[1, 2.0]])
    self.assertNotIn('evolve', seen.targets)

  def test_values_that_are_no_numbers_are_left_out(self):
    rows = [
      {'step': i, 'ce': v}
      for i, v in enumerate((1.0, float('nan'), 'x', 10**400))
    ]
    sample.lines(self.workdir / 'metrics.jsonl', rows)
    loads = ([[1.0, 0.0]], [[None, 1.0]], [[]], [], None)
    sample.lines(
      self.workdir / 'introspection.jsonl',
      [{'step': i, 'expert_load': load} for i, load in enumerate(loads)],
    )
    with (self.workdir / 'ledger.jsonl').open('w') as ledger:
      ledger.write('[' * 100_000)
    _, seen = self.build()
    charts = json.loads(seen.data)['charts']
    (heat,) = (z for z in charts if z['kind'] == 'heat')
    self.assertEqual([frame['step'] for frame in heat['frames']], [0])
    series = json.loads(seen.data)['charts'][0]['series']
    self.assertEqual(series[0]['points'], [[0, 1.0]])

  def test_an_empty_folder_is_an_error_that_names_it(self):
    with self.assertRaisesRegex(
      FileNotFoundError, re.escape(self.workdir.name)
    ):
      dashboard.build(self.workdir)

  @parameterized.parameters('{"stages": [', '[1, 2]')
  def test_a_broken_table_is_an_error_that_names_it(self, content):
    (self.workdir / 'results.json').write_text(content)
    with self.assertRaisesRegex(ValueError, 'results.json'):
      dashboard.build(self.workdir)

  def test_steps_that_compared_nothing_have_no_point(self):
    sample.write(self.workdir)
    charts = dashboard.collect(self.workdir).charts
    chart = next(c for c in charts if c.title == 'Rollout against trainer: rl')
    for series in chart.data['series']:
      steps = [step for step, _ in series['points']]
      self.assertEqual(steps, [step for step in range(40) if step % 3])

  def test_arms_of_a_comparison_share_a_chart(self):
    sample.write(self.workdir)
    charts = dashboard.collect(self.workdir).charts
    shared = next(c for c in charts if c.title == 'Training loss: evolve')
    names = [series['name'] for series in shared.data['series']]
    self.assertCountEqual(
      names, ['targeted: cross-entropy', 'control: cross-entropy']
    )

  def test_long_runs_are_averaged_without_losing_the_mean(self):
    points = [(step, float(step % 7)) for step in range(7 * 1000)]
    short = curves.thin(points, 14)
    self.assertLen(short, 500)
    self.assertTrue(all(value == 3.0 for _, value in short))
    self.assertEqual(short[-1][0], points[-1][0])

  def test_a_fair_share_of_the_load_is_one(self):
    record = {'step': 5, 'expert_load': [[0.25, 0.25, 0.5, 0.0]]}
    heat, busiest = curves.heat({'sft': [record]})
    self.assertEqual(heat.data['frames'][0]['load'], [[1.0, 1.0, 2.0, 0.0]])
    self.assertEqual(busiest.data['series'][0]['points'], [(5, 2.0)])


if __name__ == '__main__':
  absltest.main()
