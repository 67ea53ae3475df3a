'use strict';
// SVG charts without a library: axes with units, values on hover and by the
// arrow keys, colours from the style sheet so that light and dark both work.
// Every text goes in through textContent: no value can become markup.

const SVG = 'http://www.w3.org/2000/svg';

function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    node.setAttribute(name, value);
  }
  if (text !== null) node.textContent = text;
  return node;
}

function html(tag, className = '', text = null) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== null) node.textContent = text;
  return node;
}

// Numbers as people read them: 1,234  0.0421  3.1e-6  62.5%
function format(value, unit = '') {
  if (value === null || !Number.isFinite(value)) return 'none';
  if (unit === '%') return `${(100 * value).toFixed(1)}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) {
    return value.toExponential(1).replace('.0e', 'e');
  }
  return value.toLocaleString('en', {
    maximumFractionDigits: size >= 100 ? 0 : size >= 1 ? 2 : 4,
  });
}

// At most `count` + 1 round numbers that cover [low, high].
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
    found.push(i * step + 0);  // never -0
  }
  return found;
}

// A tick with as many decimals as tell it from the next one.
function label(value, marks, unit) {
  if (unit === '%') return `${Math.round(100 * value)}%`;
  const step = Math.abs(marks[1] - marks[0]) || Math.abs(value);
  if (step < 1e-4 || Math.abs(value) >= 1e6) return format(value);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return value.toLocaleString('en', {
    minimumFractionDigits: digits, maximumFractionDigits: digits,
  });
}

function decades(low, high) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const every = Math.ceil((last - first + 1) / 6);
  const found = [];
  for (let e = first; e <= last; e += every) found.push(10 ** e);
  return found;
}

// A scale: position of a value in pixels, with the ticks that label it.
function scale(low, high, from, to, count, log = false) {
  if (log) {
    const marks = decades(low, high);
    const [a, b] = [Math.log10(low), Math.log10(high)];
    const at = (v) => from + ((Math.log10(v) - a) / (b - a || 1)) * (to - from);
    return {at, ticks: marks.filter((v) => v >= low * 0.99 && v <= high * 1.01)};
  }
  const at = (v) => from + ((v - low) / (high - low || 1)) * (to - from);
  return {at, ticks: ticks(low, high, count)};
}

function domain(chart, values) {
  if (chart.domain) return chart.domain;
  const low = Math.min(...values);
  const high = Math.max(...values);
  if (chart.log) return [low / 1.3, high * 1.3];
  // At least a thousandth of the value, or rounding would fill the chart.
  const span = Math.max(high - low, 1e-3 * Math.abs(high)) || 1;
  const floor = low >= 0 ? 0 : -Infinity;
  const pad = 0.06 * span;
  return [
    Math.max(Math.min(low, high - span) - pad, floor),
    Math.max(high, low + span) + pad,
  ];
}

function canvas(figure, height, label) {
  const width = Math.max(figure.clientWidth, 260);
  const node = svg('svg', {
    viewBox: `0 0 ${width} ${height}`, width, height, role: 'img',
    'aria-label': label,
  });
  figure.append(node);
  return [node, width];
}

function legend(figure, names) {
  const row = html('div', 'legend');
  names.forEach((name, i) => {
    const item = html('span', '', name);
    item.prepend(html('i', `swatch c${i % 6}`));
    row.append(item);
  });
  figure.append(row);
}

function tooltip(figure) {
  const node = html('div', 'tooltip');
  node.hidden = true;
  figure.append(node);
  return {
    hide: () => { node.hidden = true; },
    show: (x, y, title, rows) => {
      node.replaceChildren(html('b', '', title));
      for (const [colour, text] of rows) {
        const line = html('div', '', text);
        line.prepend(html('i', `swatch c${colour}`));
        node.append(line);
      }
      node.hidden = false;
      const limit = figure.clientWidth - node.offsetWidth - 4;
      node.style.left = `${Math.max(4, Math.min(x + 14, limit))}px`;
      node.style.top = `${y}px`;
    },
  };
}

function axes(node, x, y, box, chart) {
  for (const value of y.ticks) {
    const at = y.at(value);
    node.append(svg('line', {
      class: 'grid', x1: box.left, x2: box.right, y1: at, y2: at,
    }));
    node.append(svg('text', {
      class: 'tick', x: box.left - 8, y: at + 4, 'text-anchor': 'end',
    }, chart.log ? format(value) : label(value, y.ticks, chart.unit)));
  }
  for (const value of x.ticks) {
    node.append(svg('text', {
      class: 'tick', x: x.at(value), y: box.bottom + 18, 'text-anchor': 'middle',
    }, format(value)));
  }
  node.append(svg('line', {
    class: 'axis', x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom,
  }));
  node.append(svg('text', {
    class: 'unit', x: box.right, y: box.bottom + 34, 'text-anchor': 'end',
  }, chart.x));
  node.append(svg('text', {class: 'unit', x: 2, y: 11}, chart.y));
}

function lines(figure, chart) {
  if (chart.series.length > 1) legend(figure, chart.series.map((s) => s.name));
  const [node, width] = canvas(figure, 240, chart.summary);
  const box = {left: 54, right: width - 14, top: 24, bottom: 196};
  const points = chart.series.flatMap((s) => s.points);
  const [low, high] = domain(chart, points.map((p) => p[1]));
  const xs = [...new Set(points.map((p) => p[0]))].sort((a, b) => a - b);
  const x = scale(xs[0], xs.at(-1), box.left, box.right, Math.min(6, width / 90));
  x.ticks = x.ticks.filter(Number.isInteger);
  const y = scale(low, high, box.bottom, box.top, 5, chart.log);
  axes(node, x, y, box, chart);
  chart.series.forEach((series, i) => {
    const path = series.points.map((p) => `${x.at(p[0])},${y.at(p[1])}`);
    if (path.length > 1) {
      node.append(svg('polyline', {
        class: `mark line c${i % 6}`, points: path.join(' '),
      }));
    }
    if (path.length < 2) {
      const [px, py] = path[0].split(',');
      node.append(svg('circle', {class: `mark dot c${i % 6}`, cx: px, cy: py, r: 4}));
    }
  });
  hover(figure, node, chart, xs, x, y, box);
}

// Follows the pointer, or the arrow keys: the values at the nearest x.
function hover(figure, node, chart, xs, x, y, box) {
  const tip = tooltip(figure);
  const cursor = svg('g');
  node.append(cursor);
  node.setAttribute('tabindex', '0');
  let index = xs.length - 1;
  const show = () => {
    const here = xs[index];
    const at = x.at(here);
    cursor.replaceChildren(svg('line', {
      class: 'cursor', x1: at, x2: at, y1: box.top, y2: box.bottom,
    }));
    const rows = [];
    chart.series.forEach((series, i) => {
      const point = series.points.find((p) => p[0] === here);
      if (!point) return;
      cursor.append(svg('circle', {
        class: `dot c${i % 6}`, cx: at, cy: y.at(point[1]), r: 4,
      }));
      rows.push([i % 6, `${series.name} ${format(point[1], chart.unit)}`]);
    });
    tip.show(at, node.offsetTop || 0, `${chart.x} ${format(here)}`, rows);
  };
  const hide = () => { cursor.replaceChildren(); tip.hide(); };
  node.addEventListener('pointermove', (event) => {
    const px = event.clientX - node.getBoundingClientRect().left;
    const far = (i) => Math.abs(x.at(xs[i]) - px);
    index = xs.reduce((best, _, i) => (far(i) < far(best) ? i : best), 0);
    show();
  });
  node.addEventListener('pointerleave', hide);
  node.addEventListener('blur', hide);
  node.addEventListener('keydown', (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    index = Math.min(Math.max(index + move, 0), xs.length - 1);
    show();
  });
}

function rateAxis(node, x, top, bottom) {
  for (const value of x.ticks) {
    node.append(svg('line', {
      class: value ? 'grid' : 'axis', x1: x.at(value), x2: x.at(value),
      y1: top, y2: bottom,
    }));
    node.append(svg('text', {
      class: 'tick', x: x.at(value), y: bottom + 16, 'text-anchor': 'middle',
    }, `${Math.round(100 * value)}%`));
  }
}

function whisker(node, x, y, row, colour) {
  const [low, high] = row.interval;
  node.append(svg('line', {
    class: `whisker ${colour}`, x1: x.at(low), x2: x.at(high), y1: y, y2: y,
  }));
  for (const end of [low, high]) {
    node.append(svg('line', {
      class: `whisker ${colour}`, x1: x.at(end), x2: x.at(end), y1: y - 4, y2: y + 4,
    }));
  }
}

function rateText(row) {
  const [low, high] = row.interval.map((v) => (100 * v).toFixed(1));
  return `${format(row.value, '%')}  [${low}, ${high}]  n=${row.n}`;
}

// One dot with its interval per row, values written beside it, or under it
// where the page is narrow.
function forest(figure, chart) {
  const narrow = figure.clientWidth < 620;
  const pitch = narrow ? 48 : 34;
  const height = pitch * chart.rows.length + 48;
  const [node, width] = canvas(figure, height, chart.summary);
  const left = Math.min(170, width * 0.32);
  const right = narrow ? width - 16 : width - 220;
  const x = scale(0, 1, left, right, narrow ? 2 : 5);
  rateAxis(node, x, 8, height - 34);
  chart.rows.forEach((row, i) => {
    const y = pitch * i + 26;
    const colour = `c${i % 6}`;
    node.append(svg('text', {
      class: 'label', x: left - 12, y: y + 4, 'text-anchor': 'end',
    }, row.name));
    whisker(node, x, y, row, colour);
    const dot = svg('circle', {
      class: `mark dot ${colour}`, cx: x.at(row.value), cy: y, r: 6,
    });
    dot.append(svg('title', {}, rateText(row)));
    node.append(dot);
    node.append(svg('text', {
      class: 'value', x: narrow ? left + 6 : right + 20, y: narrow ? y + 23 : y + 4,
    }, rateText(row)));
  });
}

// Groups of horizontal bars, one group a skill, one bar an arm.
function bars(figure, chart) {
  legend(figure, chart.arms);
  const thick = 9;
  const group = chart.arms.length * (thick + 2) + 12;
  const height = group * chart.groups.length + 34;
  const [node, width] = canvas(figure, height, chart.summary);
  const left = Math.min(180, width * 0.36);
  const x = scale(0, 1, left, width - 20, 5);
  rateAxis(node, x, 4, height - 26);
  const tip = tooltip(figure);
  chart.groups.forEach((skill, g) => {
    const top = group * g + 10;
    node.append(svg('text', {
      class: skill.strong ? 'label strong' : 'label', x: left - 12,
      y: top + (group - 12) / 2 + 4, 'text-anchor': 'end',
    }, skill.name));
    skill.bars.forEach((bar, i) => {
      if (!bar) return;
      const y = top + i * (thick + 2);
      node.append(svg('rect', {
        class: `mark bar c${i % 6}`, x: left, y, height: thick, rx: 2,
        width: Math.max(x.at(bar.value) - left, 1.5),
      }));
      whisker(node, x, y + thick / 2, bar, 'ink');
    });
    const area = svg('rect', {
      class: 'hit', x: 0, y: top - 6, width, height: group,
    });
    area.addEventListener('pointermove', () => tip.show(
      left + 40, node.offsetTop + top + group - 8, skill.name,
      skill.bars.flatMap((bar, i) => (
        bar ? [[i % 6, `${chart.arms[i]} ${rateText(bar)}`]] : [])),
    ));
    area.addEventListener('pointerleave', tip.hide);
    node.append(area);
  });
}

// Layers down, experts across; colour = load over the fair share, at a step.
function heat(figure, chart) {
  const [layers, experts] = [chart.frames[0].load.length, chart.frames[0].load[0].length];
  const control = html('label', 'slider', 'step ');
  const range = html('input');
  Object.assign(range, {type: 'range', min: 0, max: chart.frames.length - 1});
  range.value = chart.frames.length - 1;
  const out = html('output');
  control.append(range, out);
  figure.append(control);
  const width = Math.max(figure.clientWidth, 260);
  const cell = Math.min((width - 64) / experts, 58);
  const tall = layers > 20 ? Math.max(6, 420 / layers) : Math.min(Math.max(cell, 18), 28);
  const round = Math.min(cell, tall) > 12 ? 2 : 0;
  const labelEvery = Math.ceil(14 / tall);
  const [node] = canvas(figure, tall * layers + 46, chart.summary);
  const tip = tooltip(figure);
  const cells = [];
  for (let l = 0; l < layers; l++) {
    if (l % labelEvery === 0) {
      node.append(svg('text', {
        class: 'tick', x: 54, y: tall * (l + 0.5) + 8, 'text-anchor': 'end',
      }, `layer ${l}`));
    }
    for (let e = 0; e < experts; e++) {
      const rect = svg('rect', {
        class: 'mark cell', x: 62 + e * cell, y: 4 + l * tall, rx: round,
        width: cell * 0.95, height: tall * 0.94,
      });
      rect.addEventListener('pointermove', () => tip.show(
        62 + e * cell, node.offsetTop + (l + 1) * tall + 8,
        `layer ${l}, expert ${e}`,
        [['none', `${format(Number(rect.dataset.load))} of a fair share`]],
      ));
      rect.addEventListener('pointerleave', tip.hide);
      cells.push(rect);
      node.append(rect);
    }
  }
  for (let e = 0; e < experts; e += Math.ceil(experts / 16)) {
    node.append(svg('text', {
      class: 'tick', x: 62 + (e + 0.5) * cell, y: tall * layers + 20,
      'text-anchor': 'middle',
    }, e));
  }
  node.append(svg('text', {
    class: 'unit', x: 62, y: tall * layers + 38,
  }, 'expert'));
  const paint = () => {
    const frame = chart.frames[range.value];
    out.textContent = format(frame.step);
    frame.load.flat().forEach((load, i) => {
      // Two doublings either way are the ends of the colours.
      const doublings = Math.max(-2, Math.min(2, Math.log2(Math.max(load, 0.01))));
      cells[i].dataset.load = load;
      cells[i].style.setProperty('--heat', `${Math.abs(doublings) * 50}%`);
      cells[i].classList.toggle('over', doublings > 0);
    });
  };
  range.addEventListener('input', paint);
  paint();
  const key = html('div', 'heatkey');
  for (const text of ['a quarter or less', 'fair share', 'four times or more']) {
    key.append(html('span', '', text));
  }
  figure.append(key);
}

const KINDS = {lines, forest, bars, heat};
