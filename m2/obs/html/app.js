'use strict';
// Puts the charts where the page has a place for them, follows the window's
// width, remembers nothing, loads nothing.

const DATA = JSON.parse(document.getElementById('data').textContent);

function draw() {
  for (const figure of document.querySelectorAll('[data-chart]')) {
    const chart = DATA.charts[figure.dataset.chart];
    figure.replaceChildren();
    KINDS[chart.kind](figure, chart);
  }
}

let width = 0;
new ResizeObserver(() => {
  if (Math.abs(document.body.clientWidth - width) < 2) return;
  width = document.body.clientWidth;
  draw();
}).observe(document.body);

// Charts inside a closed <details> have no width until it opens.
for (const details of document.querySelectorAll('details')) {
  details.addEventListener('toggle', () => {
    if (details.open && details.querySelector('[data-chart]')) draw();
  });
}

document.getElementById('theme').addEventListener('click', () => {
  const root = document.documentElement;
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const now = root.dataset.theme || (dark ? 'dark' : 'light');
  root.dataset.theme = now === 'dark' ? 'light' : 'dark';
});

const picker = document.getElementById('trajectory');
if (picker) {
  const show = () => {
    for (const item of document.querySelectorAll('.trajectory')) {
      item.hidden = item.id !== picker.value;
    }
  };
  picker.addEventListener('change', show);
  show();
}
