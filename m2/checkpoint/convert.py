"""The `convert` mode: between a run's checkpoint and the public format."""

import dataclasses
import json
import pathlib

from m2 import config as settings
from m2.checkpoint import hf, saved, storage, store
from m2.parallel import mesh as meshes

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
  The public form may be in an object store. To it, weights go from disk to disk
  a few megabytes at a time, of a model of any size: first all are read to
  compare their checksums, then they are converted; an interrupted conversion
  goes on where it stopped if it is started again. In the other direction they
  pass through the devices, split by `config.mesh`, and it begins anew; a run
  that is to start from a public checkpoint needs none (`checkpoint.init_from`).

  Args:
    config: its sections `convert` and `mesh` say what to do.
    workdir: not used; both directories are named in `config`.

  Raises:
    FileExistsError: the target is there already.
    m2.checkpoint.store.CheckpointError: the source is no checkpoint of a run.
    ValueError: the source is no public checkpoint of this model.
    OSError: files cannot be read or written.
  """
  del workdir
  convert = config.convert
  source, target = convert.source, convert.target
  to_public = convert.format == 'hf'
  ours = source if to_public else target
  if storage.is_url(ours):
    raise ValueError(f'{ours}: the checkpoint of a run is on a disk, not a URL')
  if not storage.is_url(target):
    _check_free(pathlib.Path(target), begun=not to_public)
  folder = source
  if to_public:
    if storage.is_url(source) or any(
      pathlib.Path(source).glob('*.safetensors')
    ):
      raise ValueError(
        f'convert.source={source} is in the public format already, which '
        'convert.format=hf writes: give the workdir of a run, or set '
        'convert.format=workdir'
      )
    source = store.newest(source)
    folder = source.resolve().parents[1]  # of <workdir>/checkpoints/<step>
  files = storage.folder(folder)
  beside = {
    name: files.read(name).tobytes() for name in _BESIDE if files.has(name)
  }
  if to_public:
    cfg = _to_public(source, target, convert.dtype, beside)
  else:
    mesh = meshes.make_mesh(config.mesh)
    cfg = _to_run(source, target, mesh, convert.dtype, beside)
  print(
    f'{target}: {cfg.layers} layers, {cfg.experts} experts, '
    f'{cfg.mtp_modules} MTP modules, {convert.dtype}; with the weights: '
    + (', '.join(beside) or 'no tokenizer'),
    flush=True,
  )


def _check_free(target: pathlib.Path, begun: bool) -> None:
  """Refuses a target with anything in it but what `_to_run` has begun."""
  full = target.exists() and not target.is_dir()
  names = {x.name for x in target.iterdir()} if target.is_dir() else set()
  made = target / 'checkpoints'
  if begun and made.is_dir() and not store.steps_in(made):
    names -= {made.name, *_BESIDE}
  if full or names:
    raise FileExistsError(
      f'convert.target={target} is there already: give an empty directory'
    )


def _to_public(step, target, dtype, beside) -> settings.ModelConfig:
  meta = store.read_meta(step)
  model = meta['extra'].get('config', {}).get('model')
  if model is None:
    raise store.CheckpointError(f'{step} does not say the shape of its model')
  cfg = settings.ModelConfig(**model)
  params = saved.params(step, meta, cfg)
  saved.check_sums(step, meta, params)
  # The leaves' checksums say which values these are.
  same = json.dumps(meta['leaves'], sort_keys=True)
  hf.save(params, target, cfg, dtype=dtype, beside=beside, resume=same)
  return cfg


def _to_run(source, target, mesh, dtype, beside) -> settings.ModelConfig:
  cfg = dataclasses.replace(hf.config(source), param_dtype=dtype)
  params = hf.load(source, cfg, mesh)
  model = settings.to_config(cfg).to_dict()
  target = pathlib.Path(target)
  with store.Store(target / 'checkpoints') as checkpoints:
    for name in _BESIDE:
      (target / name).unlink(missing_ok=True)
    for name, data in beside.items():
      (target / name).write_bytes(data)
    # Last: the step appears at once, and without it there is no conversion.
    checkpoints.save(
      {'params': params},
      None,
      step=0,
      extra={'config': {'model': model}},
      asynchronous=False,
    )
  return cfg
