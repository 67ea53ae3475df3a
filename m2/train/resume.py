"""Where a run begins: its own checkpoint, given weights, or random ones."""

import json
import pathlib
from typing import Any

import jax
import optax

from m2 import config as settings
from m2.checkpoint import storage, store
from m2.data import sources
from m2.data import tokenizer as tokenizers
from m2.parallel import hosts
from m2.train import state as train_state

# What a run is: changed between start and resume, its steps would no longer
# be those of one run. Everything else may change, and is printed if it does.
FIXED = ('mode', 'seed', 'model', 'data', 'tasks', 'prompt')
FIXED_LEAVES = (
  'optim.name',
  'optim.moment',
  'optim.train_only',
  'forge.group_size',  # the window holds finished groups, as they were played
  'forge.replay',
)
FREE = (
  'data.prefetch',
  'model.remat',
  'model.expert_strategy',  # how tokens move to their experts
  'model.expert_chunks',
)


def note(
  config: settings.RunConfig,
  tokenizer: tokenizers.Tokenizer,
  source: sources.Source | None = None,
) -> dict[str, Any]:
  """What every checkpoint of the run says of it: config, tokenizer and rows."""
  tree = json.loads(settings.to_config(config).to_json())
  found = {'config': tree, 'tokenizer': tokenizer.fingerprint()}
  if source is not None:
    found['rows'] = sources.fingerprint(source)
  return found


def begun(checkpoints: store.Store) -> bool:
  """Whether the run has a checkpoint to go on from; all processes must ask.

  Raises:
    ValueError: what is there is no run, but converted weights.
  """
  steps = checkpoints.agreed_steps()
  if steps:
    _noted(checkpoints.directory / str(steps[-1]))
  return bool(steps)


def data_config(
  config: settings.RunConfig, resumed: bool
) -> settings.DataConfig:
  """The data settings, with the tokenizer that `checkpoint.init_from` brings.

  A tokenizer named in `data.tokenizer` comes first.

  Args:
    config: `data` and `checkpoint` are read.
    resumed: whether the run has begun: it has a tokenizer then.

  Raises:
    m2.checkpoint.store.CheckpointError: there is no such directory.
    ValueError: weights without a tokenizer, whose ids a new one would not be.
  """
  start = config.checkpoint.init_from
  if config.data.tokenizer or not start:
    return config.data
  if storage.is_url(start):
    raise ValueError(
      f'checkpoint.init_from={start} is no path on this disk: copy its '
      'tokenizer.json here and name it in data.tokenizer'
    )
  if file := store.beside(start, 'tokenizer.json'):
    tree = settings.to_config(config.data).to_dict()
    tree['tokenizer'] = str(file)
    return settings.DataConfig(**tree)
  if resumed:
    return config.data
  if not pathlib.Path(start).is_dir():
    raise store.CheckpointError(f'{start} is not a directory')
  looked = ' or '.join(map(str, store.folders(start)))
  raise ValueError(
    f'checkpoint.init_from={start}: no tokenizer.json in {looked}; copy there '
    'the one that the weights were trained with, or name it in data.tokenizer'
  )


def begin(
  config: settings.RunConfig,
  mesh: jax.sharding.Mesh,
  optimizer: optax.GradientTransformation,
  checkpoints: store.Store,
  batches: Any,
  run_note: dict[str, Any],
) -> store.Restored:
  """State, step and extra to go on from; moves `batches` to its place.

  Args:
    config: `checkpoint`, `model` and `seed` are read.
    mesh: where the state lives.
    optimizer: makes its moments.
    checkpoints: of this run.
    batches: iterator with `set_state`.
    run_note: from `note`; compared with that of the checkpoint.

  Raises:
    m2.checkpoint.store.CheckpointError: a checkpoint cannot be used.
    ValueError: the run in the workdir has other settings, or the weights to
      start from belong to another tokenizer.
  """
  on_corrupt = config.checkpoint.on_corrupt
  if steps := checkpoints.agreed_steps():
    _check_same(checkpoints.directory / str(steps[-1]), run_note)
    abstract = train_state.abstract(config.model, mesh, optimizer)
    restored = checkpoints.restore(abstract, batches, on_corrupt=on_corrupt)
    for line in changes(restored.extra, run_note, str(checkpoints.directory)):
      hosts.say(line)
    hosts.say(f'resumed from step {restored.step}')
    return restored
  if config.checkpoint.init_from:
    start = config.checkpoint.init_from
    params = store.load_params(start, config.model, mesh)
    if not storage.is_url(start):
      _check_tokenizer(pathlib.Path(start), run_note)
    return store.Restored(train_state.start(params, mesh, optimizer), 0, {})
  key = jax.random.key(config.seed)
  state = train_state.create(config.model, key, mesh, optimizer)
  return store.Restored(state, 0, {})


def _check_same(step: pathlib.Path, run_note: dict[str, Any]) -> None:
  """Names settings of another run, before their arrays fail to fit."""
  if before := _noted(step):
    changes(before, run_note, str(step.parent))


def _noted(step: pathlib.Path) -> dict[str, Any] | None:
  """What `note` gave when a checkpoint was saved; None if it is broken."""
  try:
    before = store.read_meta(step)['extra']
  except store.CheckpointError:
    return None  # whether an older one may be read is for `restore` to say
  if 'tokenizer' not in before:
    raise ValueError(
      f'{step.parent} holds converted weights, not a run: start from them with '
      f'checkpoint.init_from={step.parents[1]} and another --workdir'
    )
  return before


def changes(
  before: dict[str, Any], now: dict[str, Any], where: str
) -> list[str]:
  """Lines on settings that differ from those the run was started with.

  Raises:
    ValueError: one that makes it another run.
  """
  old, new = _flat(before['config']), _flat(now['config'])
  differing = {
    name: (old.get(name), new.get(name))
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  }
  if before['tokenizer'] != now['tokenizer']:
    differing['data.tokenizer'] = (before['tokenizer'], now['tokenizer'])
  if before.get('rows', now.get('rows')) != now.get('rows'):
    differing['data'] = (before['rows'], now.get('rows'))
  lines = [
    f'{name} was {was!r}, is {now_is!r}'
    for name, (was, now_is) in differing.items()
  ]
  fixed = [
    line
    for line, name in zip(lines, differing)
    if name not in FREE
    and (name.split('.')[0] in FIXED or name in FIXED_LEAVES)
  ]
  if fixed:
    raise ValueError(
      f'{where} holds a run with other settings: {"; ".join(fixed)}. Set them '
      'back to resume it, or give another --workdir'
    )
  return [f'resuming with a changed setting: {line}' for line in lines]


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def trained_with(path: str | pathlib.Path) -> str | None:
  """Fingerprint of the tokenizer that weights were trained with, if they say.

  The public format does not, nor do converted weights.

  Raises:
    m2.checkpoint.store.CheckpointError: there is no readable checkpoint.
  """
  if any(pathlib.Path(path).glob('*.safetensors')):
    return None
  return store.read_meta(store.newest(path))['extra'].get('tokenizer')


def _check_tokenizer(path: pathlib.Path, run_note: dict[str, Any]) -> None:
  if trained_with(path) not in (None, run_note['tokenizer']):
    raise ValueError(
      f'checkpoint.init_from={path} was trained with another tokenizer; name '
      'its tokenizer.json in data.tokenizer'
    )
