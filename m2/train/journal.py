"""The host side of a step: reads its metrics one step late, writes them down.

While the device works on a step, the numbers of the one before are read,
checked and written, so that the device never waits for the host. Of the times,
`seconds` is from the end of the step before to its own end, `seconds_data`
what it took to draw and place the step's batch, mostly while the device worked
on the step before, and `seconds_compile`, on steps that compiled, the part of
`seconds` that `tokens_per_second` leaves out.
"""

import pathlib
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2 import config as settings
from m2.model import params as model_params
from m2.obs import metrics, profile
from m2.parallel import sharding
from m2.train import guard as guards
from m2.train import introspect

SHOWN = ('loss', 'grad_norm')  # on the progress line
# In an introspection record, beside what introspection is about.
_RECORDED = ('loss', 'ce', 'z', 'log_z', 'guard/rewinds', 'guard/skipped')


class TrainingError(Exception):
  """Training cannot go on; the weights of the last checkpoint are sound."""


class _Pending(NamedTuple):
  """A step whose numbers are still on the device."""

  step: int
  metrics: dict[str, Any]
  host: dict[str, float]


class Journal:
  """Writes what steps report; a context manager."""

  def __init__(
    self,
    config: settings.RunConfig,
    workdir: pathlib.Path,
    start: int,
    guard: guards.Guard,
  ):
    """Opens the files of `workdir`, on the first host only.

    Args:
      config: `log`, `model`, `data`, `steps` are read.
      workdir: of the run.
      start: step that the run goes on from.
      guard: judges every loss.
    """
    self._workdir, self._guard = workdir, guard
    self._pending: _Pending | None = None
    self._writer = self._progress = None
    if jax.process_index() == 0:
      self._writer = metrics.MetricWriter(
        workdir, tensorboard=config.log.tensorboard, resume=start
      )
      self._progress = metrics.Progress(config.steps, every=config.log.every)
    self._tracer = profile.Tracer(
      workdir, jax.profiler.start_trace, jax.profiler.stop_trace
    )
    self._flops = profile.train_flops(
      model_params.active_count(config.model)
      + config.model.d_model * config.model.vocab,
      config.model.layers,
      config.model.heads,
      config.model.head_dim,
      config.data.length,
    )
    self._clock = time.monotonic()

  def __enter__(self) -> 'Journal':
    """Gives the journal itself."""
    return self

  def __exit__(self, *_) -> None:
    """Ends a trace that is going on and closes the files."""
    try:
      self._tracer.close()
    finally:
      if self._writer:
        self._writer.close()

  def before(self, step: int) -> None:
    """Call before step `step` (counted from 0)."""
    self._tracer.before(step)

  def after(
    self,
    step: int,
    fresh: dict[str, Any],
    batch: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    seconds: Mapping[str, float],
    params: Any,
  ) -> None:
    """Takes the numbers of a step, and writes those of the one before.

    Args:
      step: updates done, this one included.
      fresh: what `train_step` returned; still being computed.
      batch: what it was given, on the host.
      counts: of the data so far (`m2.data.pipeline.BatchIterator.counts`).
      seconds: by part: `data`, and `compile` if it compiled. Call `flush`
        before compiling: else the time counts for the step before.
      params: newest parameters, for the diagnosis of a failure.

    Raises:
      TrainingError: the step before was bad.
    """
    host = {
      'data/fill': float((batch['until'] > 0).mean()),
      'data/truncated': counts['truncated'],
      'data/hash': zlib.crc32(batch['tokens'].tobytes()),
    }
    host |= {f'seconds_{name}': value for name, value in seconds.items()}
    self.flush(params)
    self._pending = _Pending(step, fresh, host)

  def flush(self, params: Any) -> None:
    """Writes what is pending; waits for the device.

    Raises:
      TrainingError: that step was bad: not finite, or a spike.
    """
    if self._pending is None:
      return
    (step, fresh, host), self._pending = self._pending, None
    values = jax.device_get(fresh)
    now, before = time.monotonic(), self._clock
    self._clock = now
    record = values.pop('introspection', None)
    bad = values.pop('bad')
    host['seconds'] = now - before
    working = host['seconds'] - host.get('seconds_compile', 0.0)
    host['tokens_per_second'] = float(values['tokens']) / working
    share = profile.mfu(
      host['tokens_per_second'],
      self._flops,
      jax.devices()[0].device_kind,
      jax.device_count(),
    )
    if share is not None:
      host['mfu'] = share
    host['guard/rewinds'] = self._guard.rewinds
    host['guard/skipped'] = self._guard.skipped
    if self._writer:
      self._write(step, values | host, record)
    if bad.any():
      raise TrainingError(self._diagnosis(step, values, bad, params))
    if reason := self._guard.spike(float(values['loss'])):
      raise TrainingError(
        f'step {step} is a spike: {reason} (guard.spike, guard.window)'
      )

  def _write(self, step: int, values: dict, record: dict | None) -> None:
    self._writer.write(step, values)
    if record is not None:
      named = {name: float(values[name]) for name in _RECORDED}
      self._writer.record(step, named | introspect.flatten(record))
    self._progress.update(
      step,
      int(values['tokens']),
      {name: values[name] for name in SHOWN},
      compiling=values.get('seconds_compile', 0.0),
    )

  def _diagnosis(self, step: int, values: dict, bad, params: Any) -> str:
    """One line: what is not finite, where first, and what is still sound."""
    names = [
      sharding.name_of(path) for path, _ in jax.tree.leaves_with_path(params)
    ]
    broken = [
      name
      for name, fine in zip(names, jax.device_get(_finite(params)))
      if not fine
    ]
    gradients = [name for name, hit in zip(names, bad[1:]) if hit]
    if broken:
      leaf = broken[0]
      where = f'the weights {leaf} were not finite before it'
      held = _holders(jax.tree.leaves(params)[names.index(leaf)])
      where += f', here on {", ".join(held)}' if held else ', on other hosts'
    elif gradients:
      where = f'the weights are finite, the gradient of {gradients[0]} is not'
    else:
      where = 'weights and gradients are finite'
    return (
      f'step {step} is not finite: loss {float(values["loss"])}; {where}. '
      'Nothing was updated and the checkpoints in '
      f'{self._workdir / "checkpoints"} are sound; a lower optim.lr or '
      'optim.clip may help, and metrics.jsonl shows how it came'
    )


@jax.jit
def _finite(params: Any) -> list[jax.Array]:
  return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]


def _holders(leaf: jax.Array) -> list[str]:
  """Devices of this host whose part of `leaf` is not finite."""
  return [
    str(shard.device)
    for shard in leaf.addressable_shards
    if not np.isfinite(np.asarray(shard.data, np.float32)).all()
  ]
