"""The report in a real browser: it draws, answers, adapts, and stays silent."""

import pathlib

import pytest
from absl.testing import absltest, parameterized

from m2.obs import dashboard
from tests.browser import chromium
from tests.obs import sample

pytestmark = pytest.mark.heavy

# Marks (lines, dots, bars, cells) of every figure, in the page's order.
MARKS = """[...document.querySelectorAll('[data-chart]')].map(figure => {
  const marks = [...figure.querySelectorAll('.mark')];
  return {
    count: marks.length,
    drawn: marks.filter(m => {
      const box = m.getBoundingClientRect();
      return box.width + box.height > 0;
    }).length,
    bad: figure.innerHTML.includes('NaN') ||
      figure.innerHTML.includes('undefined'),
    label: figure.querySelector('svg').getAttribute('aria-label'),
  };
})"""
SURFACE = 'getComputedStyle(document.body).backgroundColor'


class ReportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    workdir = pathlib.Path(self.create_tempdir().full_path)
    sample.write(workdir)
    self.report = dashboard.build(workdir)
    self.page = self.enter_context(chromium.Page())
    self.page.resize(1100)
    self.page.open(self.report)

  def tearDown(self):
    self.assertEmpty(self.page.errors)
    self.assertEqual(self.page.requests, [self.report.resolve().as_uri()])
    super().tearDown()

  def test_every_chart_has_marks(self):
    figures = self.page.evaluate(MARKS)
    self.assertGreater(len(figures), 8)
    for figure in figures:
      self.assertGreater(figure['count'], 0, figure)
      self.assertEqual(figure['count'], figure['drawn'], figure)
      self.assertFalse(figure['bad'], figure)
      self.assertNotEmpty(figure['label'])

  def test_hostile_text_did_not_run(self):
    self.assertIsNone(self.page.evaluate('window.pwned ?? null'))
    self.assertEqual(self.page.evaluate('document.images.length'), 0)

  def test_the_pointer_shows_values(self):
    place = self.page.evaluate("""(() => {
      const chart = document.querySelector('#learning svg');
      chart.scrollIntoView({block: 'center'});
      const box = chart.getBoundingClientRect();
      return [box.left + box.width / 2, box.top + box.height / 2];
    })()""")
    self.page.move(*place)
    shown = self.page.evaluate(
      "document.querySelector('#learning .tooltip:not([hidden])').textContent"
    )
    self.assertRegex(shown, r'step [\d,]+cross-entropy [\d.]+')

  def test_the_slider_moves_through_time(self):
    first, last = self.page.evaluate("""(() => {
      const slider = document.querySelector('#experts input[type=range]');
      const read = () => slider.parentNode.querySelector('output').textContent;
      const last = read();
      slider.value = 0;
      slider.dispatchEvent(new Event('input'));
      return [read(), last];
    })()""")
    self.assertEqual((first, last), ('0', '1,150'))

  def test_one_trajectory_at_a_time(self):
    script = """[...document.querySelectorAll('.trajectory')]
      .filter(item => item.offsetHeight > 0).map(item => item.id)"""
    self.assertEqual(self.page.evaluate(script), ['episode-0'])
    self.page.evaluate("""(() => {
      const picker = document.getElementById('trajectory');
      picker.value = 'episode-1';
      picker.dispatchEvent(new Event('change'));
    })()""")
    self.assertEqual(self.page.evaluate(script), ['episode-1'])

  def test_light_and_dark_follow_the_reader_and_the_button(self):
    self.page.prefer('light')
    light = self.page.evaluate(SURFACE)
    self.page.prefer('dark')
    dark = self.page.evaluate(SURFACE)
    self.assertNotEqual(light, dark)
    self.page.evaluate("document.getElementById('theme').click()")
    self.assertEqual(self.page.evaluate(SURFACE), light)

  @parameterized.parameters(360, 768, 1600)
  def test_fits_the_window(self, width):
    self.page.resize(width)
    self.assertLessEqual(
      self.page.evaluate('document.documentElement.scrollWidth'), width
    )


if __name__ == '__main__':
  absltest.main()
