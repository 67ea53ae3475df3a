"""The public tensor names of MiniMax-M2 and what each is here.

In files every layer and every expert has tensors of its own, stored [out, in];
here they are stacked, with the contracted axis first. Reading and writing both
walk the one table `NAMES`; experts held in block-FP8 lie as in the file.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from m2 import config


class Name(NamedTuple):
  """One line of `NAMES`.

  Attributes:
    pattern: tensor name in files. {layer}, {module} and {expert} run over the
      leading axes of the leaf; {module} counts on from the last layer.
    leaf: path of the stacked leaf in the parameters.
    layout: axes in the file -> axes of the leaf behind the stacked ones. Axes
      are separated by commas, letters within one are merged; a lower-case
      letter on the right is a reversed axis. V vocabulary, D and O model
      width, N query heads, K key-value heads, H head width, E experts,
      F expert width, C the two inputs of a multi-token-prediction module.
  """

  pattern: str
  leaf: str
  layout: str


_EXPERT = 'block_sparse_moe.experts.{expert}.'
_LAYER = (
  ('input_layernorm.weight', 'attn/norm', 'D->D'),
  ('self_attn.q_proj.weight', 'attn/q', 'NH,D->D,N,H'),
  ('self_attn.k_proj.weight', 'attn/k', 'KH,D->D,K,H'),
  ('self_attn.v_proj.weight', 'attn/v', 'KH,D->D,K,H'),
  ('self_attn.q_norm.weight', 'attn/q_norm', 'NH->N,H'),
  ('self_attn.k_norm.weight', 'attn/k_norm', 'KH->K,H'),
  ('self_attn.o_proj.weight', 'attn/o', 'D,NH->N,H,D'),
  ('post_attention_layernorm.weight', 'moe/norm', 'D->D'),
  ('block_sparse_moe.gate.weight', 'moe/gate', 'E,D->D,E'),
  ('block_sparse_moe.e_score_correction_bias', 'moe/bias', 'E->E'),
  (_EXPERT + 'w1.weight', 'moe/wi_0', 'F,D->D,F'),
  (_EXPERT + 'w3.weight', 'moe/wi_1', 'F,D->D,F'),
  (_EXPERT + 'w2.weight', 'moe/wo', 'D,F->F,D'),
)

# The released checkpoints hold no multi-token-prediction (MTP) weights and no
# names are published for them; readers of M2 reserve the layer numbers behind
# the last. The other names, and the order of the two inputs of eh_proj
# (embedding, then hidden; the leaf has hidden first), follow DeepSeek-V3.
_MODULE = (
  ('enorm.weight', 'enorm', 'D->D'),
  ('hnorm.weight', 'hnorm', 'D->D'),
  ('eh_proj.weight', 'proj', 'O,CD->cD,O'),
  ('final_layernorm.weight', 'norm', 'D->D'),
)

NAMES: tuple[Name, ...] = (
  Name('model.embed_tokens.weight', 'embed', 'V,D->V,D'),
  *(
    Name('model.layers.{layer}.' + name, 'blocks/' + leaf, layout)
    for name, leaf, layout in _LAYER
  ),
  *(
    Name('model.layers.{module}.' + name, 'mtp/' + leaf, layout)
    for name, leaf, layout in (*_MODULE, *_LAYER)
  ),
  Name('model.norm.weight', 'final_norm', 'D->D'),
  Name('lm_head.weight', 'head', 'V,D->D,V'),
)


# Behind a weight's path: its leaves in block-FP8 (`pallas_kernels.Quantized`).
CODES, SCALES = '/values', '/scale_inv'


def names(cfg: config.ModelConfig) -> tuple[Name, ...]:
  """`NAMES` for parameters as `cfg` holds them."""
  if not cfg.fp8_experts:
    return NAMES
  return tuple(
    entry._replace(leaf=entry.leaf + CODES, layout=_unturned(entry.layout))
    if '{expert}' in entry.pattern
    else entry
    for entry in NAMES
  )


def _unturned(layout: str) -> str:
  in_file = layout.split('->')[0]
  return f'{in_file}->{in_file}'


@dataclasses.dataclass(frozen=True)
class Slot:
  """One tensor of a file.

  Attributes:
    entry: its line of the table.
    index: its place in the stacked axes of the leaf.
    shape: its shape in the file.
  """

  entry: Name
  index: tuple[int, ...]
  shape: tuple[int, ...]

  @property
  def last(self) -> str:
    """Last part of the leaf's path; of codes, that of their weight's."""
    return self.entry.leaf.removesuffix(CODES).rsplit('/', 1)[-1]

  @property
  def codes(self) -> bool:
    """Whether the leaf is of codes of FP8."""
    return self.entry.leaf.endswith(CODES)

  @property
  def scales(self) -> str:
    """The leaf beside that of codes."""
    return self.entry.leaf.removesuffix(CODES) + SCALES


def sizes_of(cfg: config.ModelConfig) -> dict[str, int]:
  """Size of the axis behind each letter of a layout."""
  return {
    'V': cfg.vocab,
    'D': cfg.d_model,
    'O': cfg.d_model,
    'N': cfg.heads,
    'K': cfg.kv_heads,
    'H': cfg.head_dim,
    'E': cfg.experts,
    'F': cfg.d_expert,
    'C': 2,
  }


def slots(cfg: config.ModelConfig) -> dict[str, Slot]:
  """Every tensor of a checkpoint of this shape by name, in layer order."""
  sizes = sizes_of(cfg)
  found = []
  for order, entry in enumerate(names(cfg)):
    shape = tuple(
      math.prod(sizes[letter] for letter in axis)
      for axis in entry.layout.split('->')[0].split(',')
    )
    for layer, index, name in _places(cfg, entry.pattern):
      found.append(((layer, order, index), name, Slot(entry, index, shape)))
  # Embedding, layers, the rest; the tensors of one leaf's layer are together.
  return {name: slot for _, name, slot in sorted(found, key=lambda x: x[0])}


def _places(
  cfg: config.ModelConfig, pattern: str
) -> Iterator[tuple[int, tuple[int, ...], str]]:
  """Layer number to sort by, index in the leaf, and name of each tensor."""
  if '{' not in pattern:
    last = cfg.layers + cfg.mtp_modules
    yield (-1 if pattern == NAMES[0].pattern else last), (), pattern
    return
  module = '{module}' in pattern
  experts = range(cfg.experts) if '{expert}' in pattern else (None,)
  for row in range(cfg.mtp_modules if module else cfg.layers):
    number = row + cfg.layers if module else row
    for expert in experts:
      index = (row,) if expert is None else (row, expert)
      name = pattern.format(layer=number, module=number, expert=expert)
      yield number, index, name


class Group(NamedTuple):
  """Neighbouring axes of a leaf that come from one axis of the file.

  Attributes:
    source: that axis of the file.
    where: the index along it of each place in these axes of the leaf.
  """

  source: int
  where: np.ndarray


def groups(layout: str, sizes: Mapping[str, int]) -> list[Group]:
  """How the axes of a leaf follow from those of the file, one after another."""
  left, right = layout.split('->')
  found = []
  for source, axes in itertools.groupby(
    right.split(','), lambda axis: _source(left, axis)
  ):
    letters = left.split(',')[source]
    flat = np.arange(math.prod(sizes[letter] for letter in letters))
    part = f'{letters}->{",".join(axes)}'
    found.append(Group(source, to_leaf(flat, part, sizes)))
  return found


def _source(left: str, axis: str) -> int:
  return next(
    i for i, part in enumerate(left.split(',')) if axis[0].upper() in part
  )


def to_leaf(x: np.ndarray, layout: str, sizes: Mapping[str, int]) -> np.ndarray:
  """Turns a tensor of a file into its axes here; a view if it can be one."""
  left, right = layout.split('->')
  source = left.replace(',', '')
  target = right.replace(',', '')
  x = x.reshape([sizes[letter] for letter in source])
  x = x.transpose([source.index(letter.upper()) for letter in target])
  x = np.flip(x, [i for i, c in enumerate(target) if c.islower()])
  return x.reshape(_dims(right, sizes))


def to_file(x: np.ndarray, layout: str, sizes: Mapping[str, int]) -> np.ndarray:
  """Undoes `to_leaf`; contiguous, as writing needs it."""
  left, right = layout.split('->')
  source = right.replace(',', '')
  target = left.replace(',', '')
  x = x.reshape([sizes[letter.upper()] for letter in source])
  x = np.flip(x, [i for i, c in enumerate(source) if c.islower()])
  x = x.transpose([source.upper().index(letter) for letter in target])
  return np.ascontiguousarray(x.reshape(_dims(left, sizes)))


def _dims(axes: str, sizes: Mapping[str, int]) -> list[int]:
  return [
    math.prod(sizes[letter.upper()] for letter in axis)
    for axis in axes.split(',')
  ]
