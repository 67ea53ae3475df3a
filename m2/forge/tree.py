"""Prefix trees: the rows of a batch share what they have in common (6.2.5).

A row is one completion: the ids that the model saw, then those it sampled.
Rows with a common prefix become one tree; a shared token is computed once and
is scored by as many rows as sampled it. Tokens lie in depth-first order, so
that the model's one attention mask covers the tree: token j is visible to i iff
`j <= i < until[j]`, where `until[j]` ends the subtree of j. A token's position
is its depth; `parent` is the token whose hidden state predicts it.

Rows are sorted by their tokens. Neighbours then share the longest prefixes,
depth-first order is the order of first appearance, and a tree is the run of
rows it was cut from. What does not fit one line of `tokens` is cut at a row
border and the shared prefix is computed again in the next line: the loss is a
sum over rows, so a cut costs time and changes nothing else.

Two tokens are the same node iff their whole prefixes, the weight version that
sampled the row, and (when routes are recorded) the experts of every token of
the prefix are equal. The loss stays per row: `TreeBatch` carries, for every
trained (row, token) pair Z, the edge that scores it, and `separate` builds the
same Z over unshared tokens, so both go through the same loss.

Letters: B lines, T tokens of a line, Z trained pairs, L layers, X experts used.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from m2 import types

NOBODY = -1  # the routes of padding: no expert


@dataclasses.dataclass(frozen=True)
class Row:
  """One completion to train on.

  Attributes:
    ids: int32[N], prompt then sampled ids.
    start: index of the first sampled id; at least 1.
    old_logp: float32[N - start], behaviour log-probabilities.
    advantage: of the whole completion.
    version: weight version that sampled it.
    weight: of each of its sampled tokens in the loss.
    experts: int32[N - 1, L, X], routes of the tokens that were fed; or None.
  """

  ids: np.ndarray
  start: int
  old_logp: np.ndarray
  advantage: float
  version: int = 0
  weight: float = 1.0
  experts: np.ndarray | None = None

  def __post_init__(self):
    """Raises ValueError on lengths that disagree and values out of range."""
    size = len(self.ids)
    if not 1 <= self.start < size:
      raise ValueError(
        f'row: start={self.start} must lie in [1, {size}): a row needs context '
        'and at least one sampled id'
      )
    if len(self.old_logp) != size - self.start:
      raise ValueError(
        f'row: {len(self.old_logp)} log-probs for {size - self.start} ids'
      )
    values = np.append(self.old_logp, (self.advantage, self.weight))
    if not np.isfinite(values).all():
      raise ValueError('row: log-probs, advantage and weight must be finite')
    if self.weight < 0:
      raise ValueError(f'row: weight={self.weight} must not be negative')
    if self.experts is not None and len(self.experts) != size - 1:
      raise ValueError(
        f'row: routes of {len(self.experts)} tokens; {size - 1} were fed'
      )


@flax.struct.dataclass
class TreeBatch:
  """Packed trees and the pairs that the loss sums over.

  Attributes:
    tokens_BT: int32, depth-first order; pads are 0.
    positions_BT: int32 depth in the tree.
    until_BT: int32 end of the token's subtree in its line; 0 for pads.
    parent_BT: int32 index in the line of the predicting token; roots: self.
    count_BT: int32 rows that pass through the token; 0 for pads.
    edge_Z: int32 index into the flattened [B, T] of the scored token.
    token_Z: int32 the scored token.
    old_logp_Z: float32 behaviour log-probability.
    advantage_Z: float32.
    weight_Z: float32; 0 for pads.
    version_Z: int32 weight version that sampled it; -1 for pads.
    total: float32 scalar, weight of all rows of the batch: the normaliser.
    experts_LBTX: int32 routes to replay, or None.
  """

  tokens_BT: jax.Array
  positions_BT: jax.Array
  until_BT: jax.Array
  parent_BT: jax.Array
  count_BT: jax.Array
  edge_Z: jax.Array
  token_Z: jax.Array
  old_logp_Z: jax.Array
  advantage_Z: jax.Array
  weight_Z: jax.Array
  version_Z: jax.Array
  total: jax.Array
  experts_LBTX: jax.Array | None = None


def row(
  completion: types.Completion,
  advantage: float,
  *,
  replay: bool = False,
) -> Row | None:
  """The row of a completion; None if nothing was sampled.

  Raises:
    ValueError: its log-probabilities are not finite, or `replay` is asked for
      and there are no routes; names the completion.
  """
  if not len(completion.ids):
    return None
  if not np.isfinite(completion.logprobs).all():
    raise ValueError(
      f'episode {completion.episode} step {completion.step}: log-probs are not '
      f'finite; weights of version {completion.version} have diverged. A lower '
      'optim.lr may help; earlier checkpoints are sound'
    )
  if replay and completion.experts is None:
    raise ValueError(
      f'episode {completion.episode} step {completion.step}: router replay '
      'needs recorded routes; ask the engine for them'
    )
  return Row(
    ids=np.concatenate([completion.prompt_ids, completion.ids]),
    start=len(completion.prompt_ids),
    old_logp=completion.logprobs,
    advantage=advantage,
    version=completion.version,
    experts=completion.experts if replay else None,
  )


def merge_prefixes(
  rows: Sequence[Row],
  *,
  tokens: int,
  samples: int | None = None,
  lines: int | None = None,
) -> TreeBatch:
  """Packs rows into lines, computing every shared prefix once per line.

  Args:
    rows: completions, in any order.
    tokens: length T of a line.
    samples: capacity Z; None takes what the rows need.
    lines: capacity B; None takes what the rows need.

  Returns:
    The batch, as numpy arrays.

  Raises:
    ValueError: no rows, or none with a weight, a row longer than a line,
      routes of some rows only or of several shapes, or a capacity that is too
      small; the message names both numbers.
  """
  _check(rows)
  codes, order = _codes(rows)
  shared = [0]
  for before, after in zip(order, order[1:]):
    shared.append(_common(codes[before], codes[after]))
  return _fit(_pack(rows, order, shared, tokens), lines, samples)


def separate(
  rows: Sequence[Row],
  *,
  tokens: int,
  samples: int | None = None,
  lines: int | None = None,
) -> TreeBatch:
  """The unmerged twin of `merge_prefixes`: every row computes all its tokens.

  Rows keep their order and are packed into lines; masks keep them apart.

  Raises:
    ValueError: as `merge_prefixes`.
  """
  _check(rows)
  order = list(range(len(rows)))
  return _fit(_pack(rows, order, [0] * len(rows), tokens), lines, samples)


def _check(rows: Sequence[Row]) -> None:
  """Refuses rows that cannot be one batch."""
  if not rows:
    raise ValueError('no rows to pack')
  routed = [row.experts.shape[1:] for row in rows if row.experts is not None]
  if 0 < len(routed) < len(rows):
    raise ValueError('some rows carry routes and some do not')
  if len(set(routed)) > 1:
    raise ValueError(
      f'routes of several shapes [layers, experts]: {sorted(set(routed))}; '
      'rows of one batch come from one model'
    )


def _fit(batch: TreeBatch, lines: int | None, samples: int | None) -> TreeBatch:
  return pad(
    batch,
    lines=len(batch.tokens_BT) if lines is None else lines,
    samples=len(batch.token_Z) if samples is None else samples,
  )


def _codes(rows: Sequence[Row]) -> tuple[list[np.ndarray], list[int]]:
  """Node identity of each token as an integer, and the sorted order of rows."""
  if rows[0].experts is None:
    codes = [np.append(row.version, row.ids).astype(np.int64) for row in rows]
  else:
    columns = []
    for row in rows:
      # The last id was sampled but not fed: it has no route of its own.
      route = row.experts.reshape(len(row.ids) - 1, -1)
      route = np.concatenate([route, np.full_like(route[:1], -1)])
      columns.append(np.column_stack([row.ids, route]))
    _, flat = np.unique(np.concatenate(columns), axis=0, return_inverse=True)
    ends = np.cumsum([len(row.ids) for row in rows])[:-1]
    codes = [
      np.append(row.version, part)
      for row, part in zip(rows, np.split(flat.reshape(-1), ends))
    ]
  # Big-endian bytes compare like the (non-negative) integers they hold.
  keys = [code.astype('>u8').tobytes() for code in codes]
  return codes, sorted(range(len(rows)), key=keys.__getitem__)


def _common(before: np.ndarray, after: np.ndarray) -> int:
  """Length of the common prefix of two rows, given with their versions."""
  size = min(len(before), len(after))
  different = before[:size] != after[:size]
  length = int(different.argmax()) if different.any() else size
  return max(length - 1, 0)  # the version in front is no token


class _Line:
  """One line while it is filled: rows come in depth-first order."""

  def __init__(self, tokens: int):
    self.columns = {
      name: np.zeros(tokens, np.int32)
      for name in ('tokens', 'positions', 'until', 'count')
    }
    self.columns['parent'] = np.arange(tokens, dtype=np.int32)
    self.experts: list[np.ndarray] = []
    self.size = 0
    self._path = np.zeros(0, np.int32)  # indices of the last row's tokens

  def add(self, row: Row, shared: int) -> np.ndarray:
    """Appends what `row` does not share; returns the indices of its tokens."""
    self.end(shared)
    fresh = np.arange(
      self.size, self.size + len(row.ids) - shared, dtype=np.int32
    )
    columns = self.columns
    columns['tokens'][fresh] = row.ids[shared:]
    columns['positions'][fresh] = np.arange(shared, len(row.ids))
    self._path = path = np.concatenate([self._path, fresh])
    first = max(shared, 1)  # roots are their own parents
    columns['parent'][path[first:]] = path[first - 1 : -1]
    columns['count'][path] += 1
    if row.experts is not None:
      # Nothing depends on what the last token computes: it was not fed.
      routes = np.concatenate([row.experts, row.experts[-1:]])
      self.experts.append(routes[shared:])
    self.size += len(fresh)
    return path

  def end(self, shared: int = 0) -> None:
    """Ends the subtrees of the last row's tokens from depth `shared` on."""
    self.columns['until'][self._path[shared:]] = self.size
    self._path = self._path[:shared]


def _pack(
  rows: Sequence[Row], order: list[int], shared: list[int], tokens: int
) -> TreeBatch:
  lines: list[_Line] = []
  edges = []
  for at, common in zip(order, shared):
    row = rows[at]
    if len(row.ids) > tokens:
      raise ValueError(
        f'a row of {len(row.ids)} tokens does not fit a line of {tokens}; '
        'raise forge.row_tokens or lower engine.length'
      )
    if not lines or lines[-1].size + len(row.ids) - common > tokens:
      if lines:
        lines[-1].end()
      lines.append(_Line(tokens))
      common = 0
    path = lines[-1].add(row, common)
    edges.append((len(lines) - 1) * tokens + path[row.start :])
  lines[-1].end()
  return TreeBatch(
    **{
      f'{name}_BT': np.stack([line.columns[name] for line in lines])
      for name in lines[0].columns
    },
    **_pairs([rows[at] for at in order], edges),
    experts_LBTX=_routes(lines, tokens),
  )


def _routes(lines: list[_Line], tokens: int) -> np.ndarray | None:
  if not lines[0].experts:
    return None
  shape = lines[0].experts[0].shape[1:]
  # Padding has no expert: one that it shared would have no room for others.
  out_BTLX = np.full((len(lines), tokens, *shape), NOBODY, np.int32)
  for index, line in enumerate(lines):
    out_BTLX[index, : line.size] = np.concatenate(line.experts)
  return out_BTLX.transpose(2, 0, 1, 3)


def _pairs(rows: list[Row], edges: list[np.ndarray]) -> dict[str, np.ndarray]:
  sizes = [len(edge) for edge in edges]

  def column(values, dtype):
    return np.repeat(np.asarray(values, dtype), sizes)

  weight_Z = column([row.weight for row in rows], np.float32)
  if not weight_Z.any():
    raise ValueError(f'all {len(rows)} rows have weight 0: nothing to train on')
  return {
    'edge_Z': np.concatenate(edges).astype(np.int32),
    'token_Z': np.concatenate([row.ids[row.start :] for row in rows]),
    'old_logp_Z': np.concatenate([row.old_logp for row in rows]).astype(
      np.float32
    ),
    'advantage_Z': column([row.advantage for row in rows], np.float32),
    'weight_Z': weight_Z,
    'version_Z': column([row.version for row in rows], np.int32),
    'total': np.float32(weight_Z.sum()),
  }


def pad(batch: TreeBatch, *, lines: int, samples: int) -> TreeBatch:
  """Adds empty lines and pairs of weight 0, up to these numbers.

  Raises:
    ValueError: the batch has more already; the message names both numbers.
  """
  have_B, tokens = batch.tokens_BT.shape
  have_Z = len(batch.token_Z)
  for name, have, want in (
    ('lines', have_B, lines),
    ('samples', have_Z, samples),
  ):
    if have > want:
      raise ValueError(f'the rows need {name}={have}; the capacity is {want}')

  def grow(field):
    value = getattr(batch, field.name)
    if value is None or field.name == 'total':
      return value
    pairs = field.name.endswith('_Z')
    width = [(0, 0)] * value.ndim
    axis = 1 if field.name == 'experts_LBTX' else 0
    width[axis] = (0, samples - have_Z if pairs else lines - have_B)
    fill = {'version_Z': -1, 'experts_LBTX': NOBODY}.get(field.name, 0)
    return np.pad(value, width, constant_values=fill)

  grown = {field.name: grow(field) for field in dataclasses.fields(batch)}
  grown['parent_BT'][have_B:] = np.arange(tokens)
  return TreeBatch(**grown)
