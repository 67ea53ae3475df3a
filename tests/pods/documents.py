"""Documents whose tokens say which one they are."""

import json
import pathlib

import numpy as np

from m2 import config as settings
from m2.data import tokenizer

LENGTH = 8  # tokens of a document; two fill a row of 16
# An epoch of 64 steps. The workers' pipeline packs and shuffles this many
# together, so that its batches hold each of them once, and no other.
COUNT = 1024
VOCAB = 320
FILE = 'documents.jsonl'
_BASE = 100


def write(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes all of them and a tokenizer; their paths."""
  rows = [
    {'tokens': [number // _BASE, number % _BASE, *range(2, LENGTH)]}
    for number in range(COUNT)
  ]
  source = folder / FILE
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  words = tokenizer.train(['the quick brown fox'], VOCAB)
  words.save(folder / 'tokenizer.json')
  return source, folder / 'tokenizer.json'


def numbers(tokens_T: np.ndarray, positions_T: np.ndarray) -> list[int]:
  """Numbers of the documents in a row without padding."""
  starts = np.flatnonzero(positions_T == 0)
  return [int(tokens_T[at]) * _BASE + int(tokens_T[at + 1]) for at in starts]


def in_batch(cfg: settings.RunConfig) -> int:
  """How many a batch holds."""
  return cfg.data.batch * cfg.data.length // LENGTH
