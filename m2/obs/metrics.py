"""What a run writes while it goes: lines of JSON, TensorBoard, progress.

    <workdir>/metrics.jsonl        one line a step
    <workdir>/introspection.jsonl  one record every `log.introspect` steps
    <workdir>/tensorboard/         the numbers of metrics.jsonl, if asked for

`step` counts finished updates, so a run's first line says 1. Every line is
handed to the system as it is written: a killed process loses none.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import tensorboardX


class MetricWriter:
  """Appends to the metric files of a run; a context manager."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    tensorboard: bool = False,
    resume: int = 0,
  ):
    """Opens the files.

    Args:
      workdir: made if absent.
      tensorboard: also write event files.
      resume: the step that the run continues from. Lines after it, which a
        killed run wrote past its last checkpoint, are dropped, and so is a
        line that was torn: the run writes them again.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._files = {}
    for name in ('metrics', 'introspection'):
      path = workdir / f'{name}.jsonl'
      _drop_after(path, resume)
      self._files[name] = path.open('a', buffering=1, encoding='utf-8')
    self._board = None
    if tensorboard:
      self._board = tensorboardX.SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=resume + 1, flush_secs=10
      )

  def __enter__(self) -> 'MetricWriter':
    """Gives the writer itself."""
    return self

  def __exit__(self, *_) -> None:
    """Closes the files."""
    self.close()

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the numbers of one step.

    Args:
      step: updates done, this one included.
      metrics: scalars by name, numbers or arrays without dimensions. What is
        not finite becomes null, so that every line stays valid JSON.
    """
    row = {
      name: _finite(value if isinstance(value, int) else float(value))
      for name, value in metrics.items()
    }
    self._line('metrics', step, row)
    if self._board:
      for name, value in row.items():
        if value is not None:
          self._board.add_scalar(name, value, step)

  def record(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one introspection record of numbers, lists and dicts of them.

    As in `write`, what is not finite becomes null.
    """
    self._line('introspection', step, _finite(values))

  def _line(self, name: str, step: int, row: Mapping[str, Any]) -> None:
    # One write call a line: the kernel has it whole or not at all.
    self._files[name].write(
      json.dumps({'step': step, **row}, allow_nan=False) + '\n'
    )

  def close(self) -> None:
    """Closes the files; nothing is buffered, so a kill loses nothing."""
    for file in self._files.values():
      file.close()
    if self._board:
      self._board.close()


def _finite(value: Any) -> Any:
  """Numbers, lists and dicts of them, with None for what is not finite."""
  if isinstance(value, Mapping):
    return {name: _finite(one) for name, one in value.items()}
  if isinstance(value, list):
    return [_finite(one) for one in value]
  return value if math.isfinite(value) else None


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Rewrites `path` without lines past `step` or torn, in one rename."""
  if not path.exists():
    return
  lines = path.read_text(encoding='utf-8', errors='replace').splitlines(True)
  kept = [line for line in lines if _step_of(line) <= step]
  if len(kept) == len(lines):
    return
  fresh = path.with_name(path.name + '.tmp')
  fresh.write_text(''.join(kept), encoding='utf-8')
  os.replace(fresh, path)


def _step_of(line: str) -> float:
  """The step of a line; infinity for one that is not whole."""
  try:
    return json.loads(line)['step'] if line.endswith('\n') else math.inf
  except (json.JSONDecodeError, KeyError, TypeError):
    return math.inf


class Progress:
  """One line on how far a run is: `step 30/200  loss 3.21  12k tok/s  0:52`.

  On a terminal the line replaces itself; elsewhere one is printed every
  `every` steps. Rate and time left are from the speed since the run
  (re)started, without its first step and without time spent compiling.
  """

  def __init__(
    self,
    total: int,
    *,
    every: int,
    label: str = 'step',
    stream: TextIO | None = None,
  ):
    """Starts the clock.

    Args:
      total: steps of the whole run.
      every: steps between lines where the output is not a terminal.
      label: what is counted.
      stream: where to print; None = standard output.
    """
    self._total, self._every, self._label = total, every, label
    self._stream = sys.stdout if stream is None else stream
    self._live = self._stream.isatty()
    self._origin: tuple[int, float] | None = None
    self._tokens = 0
    self._width = 0

  def update(
    self,
    step: int,
    tokens: int,
    shown: Mapping[str, float | None],
    compiling: float = 0.0,
  ) -> None:
    """Reports a finished step.

    Args:
      step: updates done.
      tokens: tokens it trained on, padding left out.
      shown: numbers for the line, by name; None is shown as `-`.
      compiling: seconds since the last call that went into compiling.
    """
    now = time.monotonic()
    if self._origin is None:
      self._origin = (step, now)
    else:
      self._tokens += tokens
      first, start = self._origin
      self._origin = (first, start + compiling)
    due = step % self._every == 0 or step == self._total
    if self._live or due:
      self._print(self._text(step, now, shown), last=step == self._total)

  def _text(self, step: int, now: float, shown: Mapping) -> str:
    parts = [f'{self._label} {step}/{self._total}']
    for name, value in shown.items():
      parts.append(f'{name} -' if value is None else f'{name} {value:.4g}')
    first, start = self._origin
    if step > first and now > start:
      parts.append(f'{count(self._tokens / (now - start))} tok/s')
      left = (now - start) / (step - first) * (self._total - step)
      parts.append(f'{clock(left)} left')
    return '  '.join(parts)

  def _print(self, text: str, last: bool) -> None:
    if not self._live:
      print(text, file=self._stream, flush=True)
      return
    padded = text.ljust(self._width)
    self._width = len(text)
    end = '\n' if last else ''
    print(f'\r{padded}', end=end, file=self._stream, flush=True)


def clock(seconds: float) -> str:
  """Time as 0:52, 12:07 or 1:02:07."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f'{hours}:{minutes:02d}:{rest:02d}' if hours else f'{minutes}:{rest:02d}'
  )


def count(value: float) -> str:
  """A rate or size to three digits: 870, 12.3k, 4.56M."""
  for unit in ('', 'k', 'M'):
    if value < 1000:
      return f'{value:.3g}{unit}'
    value /= 1000
  return f'{value:.3g}G'
