"""Scores checkpoints with transformers. Runs in the oracle environment.

    .oracle/bin/python tests/oracle/score.py DIR [DIR ...]

Each directory holds a checkpoint and `tokens.npy` (int64[B, T]); float32
logits of every position are written beside them as `logits.npy`.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers


def load(path: pathlib.Path) -> transformers.MiniMaxM2ForCausalLM:
  """The model in float32, whatever the file stores."""
  config = transformers.AutoConfig.from_pretrained(path)
  extra = {}
  if getattr(config, 'quantization_config', None):
    extra['quantization_config'] = transformers.FineGrainedFP8Config(
      dequantize=True
    )
  model, info = transformers.MiniMaxM2ForCausalLM.from_pretrained(
    path, dtype=torch.float32, output_loading_info=True, **extra
  )
  odd = {key: names for key, names in info.items() if names}
  if odd:
    raise ValueError(f'{path}: transformers reports {odd}')
  return model.float().eval()  # FP8 loading leaves the embedding as stored


@torch.no_grad()
def logits(
  model: transformers.MiniMaxM2ForCausalLM, tokens: np.ndarray
) -> np.ndarray:
  """float32[B, T, V]."""
  return model(torch.from_numpy(tokens)).logits.float().numpy()


def main() -> None:
  """Scores the directories named on the command line."""
  torch.set_num_threads(1)
  for name in sys.argv[1:]:
    path = pathlib.Path(name)
    scores = logits(load(path), np.load(path / 'tokens.npy'))
    np.save(path / 'logits.npy', scores)


if __name__ == '__main__':
  main()
