"""Writes tiny random checkpoints with transformers, and what it makes of them.

Runs in the oracle environment (tests/oracle/env.sh):

    .oracle/bin/python tests/oracle/make_fixtures.py tests/data/hf --seed 0

Each shape becomes a directory with the checkpoint, `tokens.npy` (two prompts
continued greedily by transformers) and `logits.npy` (float32, all positions).
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import safetensors.torch
import score
import torch
import transformers

PROMPT = 8
NEW = 64
MIN_GAP = 1e-3  # between the two largest logits: ten times the tolerance

# What differs from MiniMaxM2Config: `stored` is the type of the weights,
# `released` writes config.json as the released checkpoints have it, `shard`
# bounds the size of a file.
SHAPES = {
  'one_kv_head': dict(heads=3, kv=1, head=16, rotary=8, experts=4, top=2),
  'five_heads': dict(
    heads=5, kv=5, head=8, rotary=8, experts=4, top=2, stored='float16'
  ),
  'top_eight': dict(
    heads=6, kv=2, head=8, rotary=4, experts=16, top=8, released=True
  ),
  'ratios_of_m2': dict(
    heads=12,
    kv=2,
    head=8,
    rotary=4,
    experts=32,
    top=1,
    hidden=48,
    expert=24,
    layers=1,
    stored='bfloat16',
    released=True,
    shard='40KB',
  ),
  'quarter_rotary': dict(
    heads=2, kv=1, head=16, rotary=4, experts=8, top=8, layers=1, theta=100.0
  ),
  'fp8': dict(
    heads=4,
    kv=1,
    head=64,
    rotary=32,
    experts=3,
    top=2,
    hidden=128,
    expert=64,
    layers=1,
    stored='fp8',
    released=True,
  ),
}


def build(shape: dict) -> transformers.MiniMaxM2ForCausalLM:
  """A random model whose parts all matter to the result."""
  config = transformers.MiniMaxM2Config(
    vocab_size=61,
    hidden_size=shape.get('hidden', 32),
    intermediate_size=shape.get('expert', 16),
    num_hidden_layers=shape.get('layers', 2),
    num_attention_heads=shape['heads'],
    num_key_value_heads=shape['kv'],
    head_dim=shape['head'],
    num_local_experts=shape['experts'],
    num_experts_per_tok=shape['top'],
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_parameters={
      'rope_type': 'default',
      'rope_theta': shape.get('theta', 5e6),
      'partial_rotary_factor': shape['rotary'] / shape['head'],
    },
    bos_token_id=None,
    eos_token_id=None,
  )
  model = transformers.MiniMaxM2ForCausalLM(config).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if name.endswith('norm.weight'):
        weight.uniform_(0.5, 1.5)
      else:
        weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
    for layer in model.model.layers:
      layer.mlp.e_score_correction_bias.uniform_(-0.5, 0.5)
  return model


def save(model, shape: dict, path: pathlib.Path) -> None:
  """Stores the model as the shape says."""
  stored = shape.get('stored', 'float32')
  whole = 'bfloat16' if stored == 'fp8' else stored
  model = model.to(getattr(torch, whole))
  # The router stays in float32, as in the released files.
  for layer in model.model.layers:
    layer.mlp.gate.float()
    layer.mlp.e_score_correction_bias.data = (
      layer.mlp.e_score_correction_bias.float()
    )
  model.save_pretrained(path, max_shard_size=shape.get('shard', '1GB'))
  (path / 'generation_config.json').unlink()
  tree = json.loads((path / 'config.json').read_text())
  if shape.get('released'):
    rope = tree.pop('rope_parameters')
    tree |= {
      'rope_theta': int(rope['rope_theta']),
      'rotary_dim': shape['rotary'],
      'torch_dtype': tree.pop('dtype'),
      'attn_type_list': [1] * shape.get('layers', 2),
      'scoring_func': 'sigmoid',
      'use_routing_bias': True,
      'use_qk_norm': True,
      'qk_norm_type': 'per_layer',
      'shared_intermediate_size': 0,
      'use_mtp': True,
      'num_mtp_modules': 3,
      'mtp_transformer_layers': 1,
    }
  if stored == 'fp8':
    quantise(path / 'model.safetensors')
    tree['quantization_config'] = {
      'quant_method': 'fp8',
      'fmt': 'float8_e4m3fn',
      'activation_scheme': 'dynamic',
      'weight_block_size': [128, 128],
      'modules_to_not_convert': ['gate', 'e_score_correction_bias', 'lm_head'],
    }
  (path / 'config.json').write_text(json.dumps(tree, indent=2) + '\n')


def quantise(file: pathlib.Path) -> None:
  """Turns the linear layers of a file to FP8, one 128 x 128 block at a time."""
  out = {}
  for name, weight in safetensors.torch.load_file(file).items():
    out[name] = weight
    if not any(part in name for part in ('_proj.', '.w1.', '.w2.', '.w3.')):
      continue
    rows, columns = (-(-size // 128) for size in weight.shape)
    scales = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
      for column in range(columns):
        here = (
          slice(128 * row, 128 * row + 128),
          slice(128 * column, 128 * column + 128),
        )
        block = weight[here].float()
        scales[row, column] = block.abs().max() / 448
        codes[here] = (block / scales[row, column]).to(torch.float8_e4m3fn)
    out[name] = codes
    out[name + '_scale_inv'] = scales
  safetensors.torch.save_file(out, file, {'format': 'pt'})


@torch.no_grad()
def bias_matters(model, tokens: np.ndarray) -> bool:
  """Whether the correction bias changes which experts are used."""
  with_bias = score.logits(model, tokens)
  for layer in model.model.layers:
    layer.mlp.e_score_correction_bias.zero_()
  return bool(np.abs(score.logits(model, tokens) - with_bias).max() > 1e-3)


def make(name: str, shape: dict, path: pathlib.Path, seed: int) -> None:
  """Writes one directory; draws again where the greedy choice is too close."""
  for attempt in range(10):
    torch.manual_seed(seed + attempt)
    shutil.rmtree(path, ignore_errors=True)
    save(build(shape), shape, path)
    model = score.load(path)
    prompt = torch.randint(model.config.vocab_size, (2, PROMPT))
    tokens = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      do_sample=False,
      max_new_tokens=NEW,
      pad_token_id=0,
      use_mtp=False,  # released configs announce modules that are not there
    ).numpy()
    logits = score.logits(model, tokens)
    top = np.sort(logits[:, PROMPT - 1 : -1], -1)
    gap = (top[..., -1] - top[..., -2]).min()
    # The bias changes nothing only where all experts are used anyway.
    chooses = shape['top'] < shape['experts']
    if gap > MIN_GAP and bias_matters(model, tokens) == chooses:
      np.save(path / 'tokens.npy', tokens)
      np.save(path / 'logits.npy', logits)
      print(f'{name}: {tokens.shape[1]} tokens, smallest gap {gap:.4f}')
      return
  raise ValueError(f'{name}: no draw has a gap above {MIN_GAP}')


def main() -> None:
  """Writes all shapes below the directory named on the command line."""
  parser = argparse.ArgumentParser()
  parser.add_argument('target', type=pathlib.Path)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  torch.set_num_threads(1)
  for number, (name, shape) in enumerate(SHAPES.items()):
    path = args.target / name
    make(name, shape, path, 1000 * args.seed + number)


if __name__ == '__main__':
  main()
