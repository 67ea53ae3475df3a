"""What an RL step reports: `metrics.jsonl`, introspection, the console line.

Names are grouped: `reward/`, `advantage/`, `group/`, `rollout/` and `env/`
describe episodes; `policy/`, `ratio/`, `mismatch/`, `moe/` and `optim/` the
update; `stale/` how old its samples were; `tree/`, `engine/`, `gateway/` and
`perf/` what it cost. `sync/checksum` says which weights the step ended with and
the engine has. A step whose samples are all older than its weights has compared
none of them: `mismatch/` is null then, and `-` on the console.
"""

import dataclasses
import pathlib
from typing import Any

from m2 import config as settings
from m2.engine import engine as engines
from m2.forge import rollout
from m2.gateway import capture
from m2.obs import metrics
from m2.train import introspect

_POLICY = ('loss', 'entropy')
_OPTIM = ('grad_norm', 'lr', 'bad')


class Journal:
  """Writes what steps report; a context manager."""

  def __init__(
    self,
    config: settings.RunConfig,
    workdir: pathlib.Path,
    start: int,
    engine: engines.Engine,
    gateway: capture.Gateway,
    rollouts: rollout.Rollouts,
  ):
    """Opens the files of `workdir`.

    Args:
      config: `log` and `steps` are read.
      workdir: of the run.
      start: step that the run goes on from.
      engine: its counters become `engine/`.
      gateway: its counters become `gateway/`.
      rollouts: its counters become `env/`.
    """
    self._writer = metrics.MetricWriter(
      workdir, tensorboard=config.log.tensorboard, resume=start
    )
    self._progress = metrics.Progress(
      config.steps, every=config.log.every, label='rl'
    )
    self._sources = {'engine': engine, 'gateway': gateway, 'env': rollouts}
    self._before = self._totals()

  def __enter__(self) -> 'Journal':
    """Gives the journal itself."""
    return self

  def __exit__(self, *_) -> None:
    """Closes the files."""
    self._writer.close()

  def write(
    self,
    step: int,
    report: dict[str, float],
    values: dict[str, Any],
    seconds: dict[str, float],
  ) -> None:
    """Writes one step.

    Args:
      step: updates done, this one included.
      report: of the batch, from `m2.forge.dataset`.
      values: of the update, from `m2.forge.step.rl_step`, on the host.
      seconds: by part: rollout, train, sync.
    """
    record = values.pop('introspection', None)
    row = dict(report)
    for name, value in values.items():
      group = 'policy/' if name in _POLICY else 'moe/'
      group = 'optim/' if name in _OPTIM else group
      row[name if '/' in name else group + name] = float(value)
    trained = step - 1  # the version that this step started from
    row |= {
      'version': step,
      'stale/mean': trained - row.pop('version/mean'),
      'stale/max': trained - row.pop('version/oldest'),
    }
    row |= self._changes()
    whole = sum(seconds.values())
    row |= {f'perf/{name}_seconds': value for name, value in seconds.items()}
    sampled = row['engine/sampled_tokens']
    row['perf/rollout_tokens_per_second'] = sampled / max(
      seconds['rollout'], 1e-9
    )
    row['perf/tokens_per_second'] = sampled / max(whole, 1e-9)
    self._writer.write(step, row)
    if record is not None:
      flat = introspect.flatten(record)
      self._writer.record(step, {'loss': row['policy/loss']} | flat)
    self._progress.update(
      step,
      int(sampled),
      {
        'version': row['version'],
        'reward': row['reward/mean'],
        'passed': row['reward/passed'],
        'entropy': row['policy/entropy'],
        'mismatch': row['mismatch/max'] if row['mismatch/fresh'] else None,
        'age': row['stale/max'],
        'dropped': row['env/dropped'],
        'infra': row['env/infra'],
      },
    )

  def _totals(self) -> dict[str, float]:
    return {
      f'{group}/{name}': value
      for group, source in self._sources.items()
      for name, value in dataclasses.asdict(source.counters).items()
    }

  def _changes(self) -> dict[str, float]:
    """What the counters gained since the last step."""
    now, before = self._totals(), self._before
    self._before = now
    return {name: now[name] - before[name] for name in now}
