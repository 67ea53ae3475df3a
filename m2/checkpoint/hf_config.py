"""config.json of the public MiniMax-M2 format, read and written.

Two forms are read: that of the released checkpoints (`rotary_dim`,
`rope_theta`) and that of transformers 5 (`rope_parameters`). What is written
holds both. Keys are refused by name where the model would not be this one.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from m2 import config
from m2.checkpoint import fp8, shards, storage

MAX_MODULES = 3  # layer numbers that readers of M2 reserve for MTP modules

# Keys without which there is no shape: an error if absent.
_SHAPE: dict[str, str] = {
  'vocab_size': 'vocab',
  'hidden_size': 'd_model',
  'num_hidden_layers': 'layers',
  'num_attention_heads': 'heads',
  'num_key_value_heads': 'kv_heads',
  'num_local_experts': 'experts',
  'intermediate_size': 'd_expert',
  'num_experts_per_tok': 'top_k',
}

# Keys that may be absent, with the library's defaults (MiniMaxM2Config in
# transformers 5.23).
_OPTIONAL: dict[str, tuple[str, Any]] = {
  'head_dim': ('head_dim', 128),
  'max_position_embeddings': ('max_positions', 196_608),
  'rms_norm_eps': ('norm_eps', 1e-6),
  'initializer_range': ('init_std', 0.02),
}
_ARCHITECTURE = 'MiniMaxM2ForCausalLM'
_THETA = 5e6
_FACTOR = 1.0  # of head_dim that is rotated, where nothing says how much

# Keys that change the function or its training, with the only values this
# model has. Absent or null means the first. Keys of no effect on it are not
# read.
_FIXED: dict[str, tuple[Any, ...]] = {
  'hidden_act': ('silu',),
  'scoring_func': ('sigmoid',),
  'use_routing_bias': (True,),
  'use_qk_norm': (True,),
  'qk_norm_type': ('per_layer',),
  'tie_word_embeddings': (False,),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'attention_dropout': (0,),
  'router_jitter_noise': (0,),
  'sliding_window': (None,),
  'use_sliding_window': (False,),
  'shared_intermediate_size': (0, None),
  'n_shared_experts': (0, None),
  'first_k_dense_replace': (0, None),
  'norm_topk_prob': (True,),
  'routed_scaling_factor': (1, None),
  'n_group': (1, None),
  'num_expert_group': (1, None),
  'topk_group': (1, None),
  'mtp_transformer_layers': (1,),
}

# Those of them that readers of the format ask for.
_WRITTEN = (
  'hidden_act',
  'scoring_func',
  'use_routing_bias',
  'use_qk_norm',
  'qk_norm_type',
  'tie_word_embeddings',
  'attention_dropout',
  'shared_intermediate_size',
  'mtp_transformer_layers',
)

_QUANTISATION = {
  'quant_method': ('fp8',),
  'fmt': ('float8_e4m3fn', 'e4m3'),
  'weight_block_size': ([fp8.BLOCK, fp8.BLOCK],),
  'scale_fmt': ('float',),
}
# Linear layers that FP8 files store as they are; norms and embedding are none.
_NOT_CONVERTED = ['gate', 'e_score_correction_bias', 'lm_head']

# M2's own vocabulary has its special tokens at fixed ids; a model with another
# has none that the weights imply, and null keeps readers from assuming these.
_VOCAB = 200_064
_SPECIAL = {'bos_token_id': 200_034, 'eos_token_id': 200_020}

# float16 is not a type to compute in here; float32 holds all its values.
_COMPUTE = {'float32': 'float32', 'bfloat16': 'bfloat16', 'float16': 'float32'}


def read(path: str | os.PathLike) -> config.ModelConfig:
  """Reads the shape of a model.

  `param_dtype` is float32, which holds the weights of every format exactly;
  `dtype` is what it names, or that of the embedding in the files beside it, or
  bfloat16 where there are none. `mtp_modules` counts the modules whose weights
  are there: the released files announce three and hold none.

  Args:
    path: checkpoint directory, or its URL, with config.json.

  Returns:
    The model's configuration.

  Raises:
    FileNotFoundError: no config.json.
    ValueError: it is not JSON; or keys are missing, have wrong types, or ask
      for what this model does not have: one error that lists them.
  """
  folder = storage.folder(path)
  file = folder.file('config.json')
  text = folder.read('config.json').tobytes()
  try:
    tree = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{file}: not JSON: {error}') from error
  if not isinstance(tree, dict):
    raise ValueError(f'{file}: not a JSON object')
  errors: list[str] = []
  _refuse_kind(tree, errors)
  fields = _shape(tree, errors)
  _refuse(tree, _FIXED, '', errors)
  _refuse_layers(tree, errors)
  if quantisation := tree.get('quantization_config'):
    if isinstance(quantisation, dict):
      method = quantisation.get('quant_method') or 'missing'
      quantisation = {**quantisation, 'quant_method': method}
      _refuse(quantisation, _QUANTISATION, 'quantization_config.', errors)
    else:
      errors.append(f'quantization_config={quantisation!r} is not an object')
  fields['dtype'] = _dtype(tree, path, errors)
  if not errors:
    fields |= _rotary(tree, fields['head_dim'], errors)
  if not errors:
    fields['mtp_modules'] = _modules(path, fields['layers'])
    cfg = config.ModelConfig(param_dtype='float32', **fields)
    try:
      cfg._check()
    except ValueError as error:
      errors.append(str(error))
  if errors:
    raise ValueError(f'{file}: not supported: ' + shards.listing(errors))
  return cfg


def _shape(tree: Mapping[str, Any], errors: list[str]) -> dict[str, Any]:
  kinds = {f.name: f.type for f in dataclasses.fields(config.ModelConfig)}
  fields = {}
  for key in (*_SHAPE, *_OPTIONAL):
    field, *default = _OPTIONAL.get(key) or (_SHAPE[key],)
    if key not in tree and not default:
      errors.append(f'{key}: missing')
      continue
    value = tree.get(key, *default)
    if value is None and default and key != 'head_dim':
      value = default[0]
    if kinds[field] is float and type(value) is int and abs(value) < 1e300:
      value = float(value)
    if type(value) is not kinds[field]:
      errors.append(f'{key}={value!r} is not {kinds[field].__name__}')
    elif kinds[field] is float and not math.isfinite(value):
      errors.append(f'{key}={value!r} is not finite')
    fields[field] = value
  return fields


def _refuse(tree, table, prefix: str, errors: list[str]) -> None:
  for key, allowed in table.items():
    # Where the model has a switch on, null would leave it off.
    absent = key not in tree or (tree[key] is None and allowed[0] is not True)
    if not absent and tree[key] not in allowed:
      errors.append(
        f'{prefix}{key}={tree[key]!r}: this model has {allowed[0]!r} only'
      )


def _refuse_kind(tree: Mapping[str, Any], errors: list[str]) -> None:
  """Another model; `minimax` is an older one, unless the architecture is M2."""
  kind, names = tree.get('model_type'), tree.get('architectures')
  named = isinstance(names, list) and _ARCHITECTURE in names
  if kind != 'minimax_m2' and not (kind == 'minimax' and named):
    errors.append(f'model_type={kind!r}, not minimax_m2')


def _refuse_layers(tree: Mapping[str, Any], errors: list[str]) -> None:
  """Layers of other kinds: 0 is linear attention, 1 full attention."""
  for key, kind in (('attn_type_list', 1), ('layer_types', 'full_attention')):
    kinds = tree.get(key)
    if kinds is None:
      continue
    if not isinstance(kinds, list) or any(item != kind for item in kinds):
      errors.append(f'{key}={kinds!r}: this model has {kind!r} only')


def _dtype(tree: Mapping[str, Any], path: Any, errors: list[str]) -> str:
  """The compute type; `torch_dtype` is the key's older name."""
  value = tree.get('dtype') or tree.get('torch_dtype') or _embedded(path)
  if not isinstance(value, str) or value.split('.')[-1] not in _COMPUTE:
    errors.append(f'dtype={value!r}: choose one of {", ".join(_COMPUTE)}')
    return ''
  return _COMPUTE[value.split('.')[-1]]


def _embedded(path: str | os.PathLike) -> str:
  """The type of the embedding in the files; bfloat16 without any."""
  try:
    tensor = shards.read(path).get('model.embed_tokens.weight')
  except FileNotFoundError:
    tensor = None
  found = tensor and {'F32': 'float32', 'F16': 'float16'}.get(tensor.dtype)
  return found or 'bfloat16'


def _rotary(tree, head_dim: int, errors: list[str]) -> dict[str, Any]:
  """Rotary settings, from either form; where both are there, they agree."""
  new = tree.get('rope_parameters') or {}
  for name, form in (
    ('rope_parameters', new),
    ('rope_scaling', tree.get('rope_scaling') or {}),
  ):
    if not isinstance(form, dict):
      errors.append(f'{name}={form!r} is not an object')
      return {}
    kind = form.get('rope_type') or form.get('type') or 'default'
    if kind != 'default' or any(isinstance(x, dict) for x in form.values()):
      errors.append(f'{name}={form!r}: this model has one plain rotation only')
  found = {'rope_theta': [], 'partial_rotary_factor': [], 'rotary_dim': []}
  for form, (key, values) in itertools.product((new, tree), found.items()):
    value = form.get(key)
    if value is None:
      continue
    if type(value) not in (int, float) or not abs(value) < 1e300:
      errors.append(f'{key}={value!r} is not a number')
      return {}
    values.append(value)
  # Cut off, as the library does.
  dims = [int(head_dim * x) for x in found.pop('partial_rotary_factor')]
  found['rotary_dim'] = dims + found['rotary_dim'] or [int(head_dim * _FACTOR)]
  for key, values in found.items():
    if len(set(values)) > 1:
      errors.append(f'{key}: keys disagree: {values}')
  theta, dim = (found['rope_theta'] or [_THETA])[0], found['rotary_dim'][0]
  if type(dim) is not int:
    errors.append(f'rotary_dim={dim!r} is not int')
  return {'rope_theta': float(theta), 'rotary_dim': dim}


def _modules(path: str | os.PathLike, layers: int) -> int:
  names = shards.names(path)
  return sum(
    f'model.layers.{layers + module}.eh_proj.weight' in names
    for module in range(MAX_MODULES)
  )


def to_json(cfg: config.ModelConfig, dtype: str) -> dict[str, Any]:
  """What config.json says of a model.

  Args:
    cfg: shape of the model.
    dtype: float32, bfloat16 or fp8: how the weights are stored.

  Returns:
    The object, with the keys of both forms.

  Raises:
    ValueError: the format cannot express the model.
  """
  if cfg.min_k != cfg.top_k:
    raise ValueError(
      f'model.min_k={cfg.min_k} below model.top_k={cfg.top_k}: the public '
      'format has a fixed number of active experts; others would compute '
      'another function'
    )
  if cfg.mtp_modules > MAX_MODULES:
    raise ValueError(
      f'model.mtp_modules={cfg.mtp_modules}: the format has {MAX_MODULES}'
    )
  weights = 'float32' if dtype == 'float32' else 'bfloat16'
  tree = {
    'architectures': [_ARCHITECTURE],
    'model_type': 'minimax_m2',
    **{key: getattr(cfg, field) for key, field in _SHAPE.items()},
    **{key: getattr(cfg, field) for key, (field, _) in _OPTIONAL.items()},
    'rope_theta': cfg.rope_theta,
    'rotary_dim': cfg.rotary_dim,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': cfg.rope_theta,
      'partial_rotary_factor': _factor(cfg),
    },
    **{key: _FIXED[key][0] for key in _WRITTEN},
    'attn_type_list': [1] * cfg.layers,
    'use_mtp': cfg.mtp_modules > 0,
    'num_mtp_modules': cfg.mtp_modules,
    'use_cache': True,
    'bos_token_id': None,
    'eos_token_id': None,
    'dtype': weights,
    'torch_dtype': weights,  # the same key, before transformers 5
  }
  if cfg.vocab == _VOCAB:
    tree |= _SPECIAL
  if dtype == 'fp8':
    tree['quantization_config'] = {
      'quant_method': 'fp8',
      'fmt': 'float8_e4m3fn',
      'activation_scheme': 'dynamic',
      'weight_block_size': [fp8.BLOCK, fp8.BLOCK],
      'modules_to_not_convert': _NOT_CONVERTED
      + ['eh_proj'] * bool(cfg.mtp_modules),
    }
  return tree


def _factor(cfg: config.ModelConfig) -> float:
  """The share whose product with `head_dim`, cut off, is `rotary_dim`."""
  factor = cfg.rotary_dim / cfg.head_dim
  if int(cfg.head_dim * factor) < cfg.rotary_dim:
    factor = math.nextafter(factor, 2)
  return factor
