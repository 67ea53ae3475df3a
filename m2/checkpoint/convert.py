"""The `convert` mode: between a run's checkpoint and the public format."""

import dataclasses
import pathlib

from m2 import config as settings
from m2.checkpoint import hf, store

# Files that belong to the weights and are the same in both forms.
_BESIDE = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
  'generation_config.json',
)


def run(config: settings.RunConfig, workdir: pathlib.Path) -> None:
  """Writes `convert.target` from `convert.source`; prints what was written.

  The model's shape comes from the source. Optimiser state is not converted:
  what is written starts a run (`checkpoint.init_from`), it does not resume one.
  Weights pass through the first device; a model too large for it converts on
  the host with JAX_PLATFORMS=cpu.

  Args:
    config: its section `convert` says what to do.
    workdir: not used; both directories are named in `config`.

  Raises:
    FileExistsError: the target is there already.
    m2.checkpoint.store.CheckpointError: the source is no checkpoint of a run.
    ValueError: the source is no public checkpoint of this model.
  """
  del workdir
  convert = config.convert
  source, target = pathlib.Path(convert.source), pathlib.Path(convert.target)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise FileExistsError(
      f'convert.target={target} is there already: give an empty directory'
    )
  folder = source
  if convert.format == 'hf':
    source = store.newest(source)
    folder = source.resolve().parents[1]  # of <workdir>/checkpoints/<step>
  beside = [folder / name for name in _BESIDE if (folder / name).is_file()]
  write = _to_public if convert.format == 'hf' else _to_run
  cfg = write(source, target, convert.dtype, beside)
  print(
    f'{target}: {cfg.layers} layers, {cfg.experts} experts, '
    f'{cfg.mtp_modules} MTP modules, {convert.dtype}; with the weights: '
    + (', '.join(path.name for path in beside) or 'no tokenizer'),
    flush=True,
  )


def _to_public(step, target, dtype, beside) -> settings.ModelConfig:
  saved = store.read_meta(step)['extra'].get('config', {}).get('model')
  if saved is None:
    raise store.CheckpointError(f'{step} does not say the shape of its model')
  cfg = settings.ModelConfig(**saved)
  params = store.load_params(step, cfg)
  hf.save(params, target, cfg, dtype=dtype, beside=beside)
  return cfg


def _to_run(source, target, dtype, beside) -> settings.ModelConfig:
  cfg = dataclasses.replace(hf.config(source), param_dtype=dtype)
  params = hf.load(source, cfg)
  model = settings.to_config(cfg).to_dict()
  with store.Store(target / 'checkpoints') as checkpoints:
    checkpoints.save(
      {'params': params},
      None,
      step=0,
      extra={'config': {'model': model}},
      asynchronous=False,
    )
  for path in beside:
    (target / path.name).write_bytes(path.read_bytes())
  return cfg
