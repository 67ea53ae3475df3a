"""From sources to batches on the devices, in one fixed order.

source (encoded on access), shard, seed, shuffle, repeat, pack, batch, prefetch;
then the shards side by side. The iterator, not the dataset, goes to the
checkpoint: its state is a few numbers a shard and resumes to the bit, in the
middle of an epoch and of a window.

What row r of step s is follows from the seed and `data.shards`, not from the
hosts: shard k of n makes rows [k/n, (k+1)/n) of every batch, and a host reads
the shards that its devices' rows are in. So a run may go on with another number
of hosts or another mesh, and neither skips nor repeats a row. Where n is a
multiple of the hosts, no document is read on two of them.
"""

import functools
import logging
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2 import config
from m2.data import documents, packing, sources
from m2.data import tokenizer as tokenizers

# Mesh axes that the rows of a batch are spread over.
ROW_AXES = ('data', 'fsdp', 'expert')
TOKEN_AXIS = 'context'  # and the tokens of each row
# Tokens packed together: enough documents to fill rows well, few enough to be
# read again when a run resumes (0.2 s of chats; seconds, if all are a few
# tokens long).
_WINDOW_TOKENS = 1 << 16
_WINDOW_ROWS = 8  # at the least
# Shards of fewer documents are permuted by a table: Grain's shuffle finds an
# index by trial, and takes 10 ms for one of three documents, 0.2 for one of 200
# and 0.01 for one of 10,000; a window may ask for thousands.
_SMALL = 4096
# Text that a new tokenizer learns from: so much for each of its ids, at most
# so much.
_CHARACTERS_PER_ID = 2_000
_MOST_CHARACTERS = 20_000_000


def make(
  cfg: config.DataConfig,
  tokenizer: tokenizers.Tokenizer,
  *,
  seed: int,
  wanted: Sequence[int] | None = None,
  source: sources.Source | Sequence[sources.Row] | None = None,
) -> 'Batches':
  """The endless stream of this host's rows of every batch.

  Shards are disjoint and together the whole source; every epoch shuffles a
  shard anew. Rows may mix documents of neighbouring epochs.

  Args:
    cfg: what to read and how to cut it.
    tokenizer: for text and chats.
    seed: of every shuffle.
    wanted: numbers of the rows of a batch to give, ascending (`local_rows`);
      None = all.
    source: rows to read instead of the configured source.

  Raises:
    ValueError: the source cannot be opened or is too small, or the batch does
      not divide over the shards. Iterating raises it, with its place, for a
      row that is broken.
  """
  if cfg.batch % cfg.shards:
    raise ValueError(
      f'data.batch={cfg.batch} is not a multiple of data.shards={cfg.shards}'
    )
  if cfg.length < 2:
    raise ValueError(f'data.length={cfg.length}: a row needs 2 tokens or more')
  rows = documents.Documents(
    open_source(cfg, source), tokenizer, cfg.keep_all_reasoning
  )
  if len(rows) < cfg.shards:
    raise ValueError(
      f'the source has {len(rows)} rows for data.shards={cfg.shards}'
    )
  wanted = range(cfg.batch) if wanted is None else wanted
  size = cfg.batch // cfg.shards
  shards = sorted({row // size for row in wanted})
  keep = np.asarray([shards.index(r // size) * size + r % size for r in wanted])
  streams = [_shard(cfg, rows, tokenizer, seed, shard) for shard in shards]
  return Batches(streams, [f'{k}-of-{cfg.shards}' for k in shards], keep)


def _shard(
  cfg: config.DataConfig,
  rows: documents.Documents,
  tokenizer: tokenizers.Tokenizer,
  seed: int,
  shard: int,
) -> grain.IterDataset:
  """The stream of shard `shard`: its rows of every batch."""
  own = grain.MapDataset.source(rows)[shard :: cfg.shards].seed(seed)
  small = len(own) < _SMALL
  own = Permuted(own, f'{seed}/{shard}') if small else own.shuffle()
  dataset = own.repeat().to_iter_dataset(
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )
  window = max(_WINDOW_ROWS, _WINDOW_TOKENS // cfg.length // cfg.shards)
  dataset = packing.Rows(
    dataset, length=cfg.length, rows=window, pad=tokenizer.pad_id, seed=seed
  ).batch(cfg.batch // cfg.shards, drop_remainder=True)
  if cfg.workers:
    if not flags.FLAGS.is_parsed():  # outside of main.py; Grain reads its own
      flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=cfg.workers, per_worker_buffer_size=cfg.prefetch
      )
    )
  return grain.experimental.ThreadPrefetchIterDataset(
    dataset, prefetch_buffer_size=cfg.prefetch
  )


class Permuted(grain.MapDataset):
  """A dataset in another order every epoch, by a table of its indices."""

  def __init__(self, parent: grain.MapDataset, seed: str):
    """Takes the dataset, and what its orders follow from."""
    super().__init__(parent)
    self._permuted_seed = seed

  def __len__(self) -> int:
    """Elements of an epoch."""
    return len(self._parent)

  def __getitem__(self, index):
    """Element `index`, of epoch index // len."""
    if isinstance(index, slice):
      return self.slice(index)
    epoch, place = divmod(index, len(self))
    return self._parent[order(self._permuted_seed, epoch, len(self))[place]]


@functools.lru_cache(64)
def order(seed: str, epoch: int, count: int) -> list[int]:
  """A permutation of `count` indices."""
  places = list(range(count))
  random.Random(f'{seed}/{epoch}').shuffle(places)
  return places


def open_source(
  cfg: config.DataConfig,
  source: sources.Source | Sequence[sources.Row] | None = None,
) -> sources.Source:
  """The configured source, or `source` where one is given.

  Raises:
    ValueError: it cannot be opened, is empty, or must be given and is not.
  """
  if source is None and cfg.source == 'tasks':
    raise ValueError('data.source=tasks: the mode must give its demonstrations')
  if source is None:
    source = sources.make(cfg.source, cfg.path)
  elif not isinstance(source, sources.Source):
    source = sources.Memory(source)
  if not len(source):
    raise ValueError(f'data.source={cfg.source} ({cfg.path}) has no rows')
  return source


def tokenizer(
  cfg: config.DataConfig,
  source: sources.Source | Sequence[sources.Row] | None,
  vocab: int,
  workdir: pathlib.Path,
  *,
  bound: bool,
) -> tokenizers.Tokenizer:
  """The run's tokenizer, kept as `<workdir>/tokenizer.json`.

  It is the work directory's own if the run is bound to it, so that a resumed
  run cannot change it; else the configured file; else one trained on the
  source, which gives the same one every time.

  Args:
    cfg: names the tokenizer, and the source if none is given.
    source: rows to train on; None = the configured source.
    vocab: the model's vocabulary; no id may reach it.
    workdir: where it is kept.
    bound: whether the one that is there was trained with; otherwise it is what
      a start that came to nothing left, and is replaced.

  Raises:
    ValueError: the file is broken, the tokenizer is larger than `vocab`, or
      the configured one is not the one that the work directory holds.
  """
  kept = pathlib.Path(workdir) / 'tokenizer.json'
  held = bound and kept.exists()
  if cfg.tokenizer:
    found = tokenizers.load(cfg.tokenizer)
    if held and tokenizers.load(kept).fingerprint() != found.fingerprint():
      raise ValueError(
        f'data.tokenizer={cfg.tokenizer} differs from {kept}, with which '
        'this run began; use another workdir'
      )
  elif held:
    found = tokenizers.load(kept)
  else:
    enough = min(vocab * _CHARACTERS_PER_ID, _MOST_CHARACTERS)
    found = tokenizers.train(texts(open_source(cfg, source), enough), vocab)
  if found.size > vocab:
    raise ValueError(
      f'the tokenizer has {found.size} ids but model.vocab={vocab}; raise '
      'model.vocab or use a smaller tokenizer'
    )
  if not held:
    found.save(kept)
  return found


def texts(source: sources.Source, enough: int) -> Iterator[str]:
  """Text to train a tokenizer on: rows in a fixed mixed order.

  Chats are rendered; special tokens are cut out. Rows of ready tokens, which
  some other tokenizer made, are an error.

  Args:
    source: the rows.
    enough: characters; the row that reaches them is the last.
  """
  read = 0
  for index in np.random.default_rng(0).permutation(len(source)):
    row, where = source[int(index)], source.where(int(index))
    for text in documents.plain(row, where):
      yield text
      read += len(text)
    if read >= enough:
      return


class Batches(grain.IterDataset):
  """The last stage: puts the shards side by side and adds up their counts."""

  def __init__(
    self,
    shards: Sequence[grain.IterDataset],
    names: Sequence[str],
    keep: np.ndarray,
  ):
    """Takes the shards.

    Args:
      shards: datasets of batches, each a shard's rows.
      names: of the shards, in the state.
      keep: which of all their rows to give.
    """
    super().__init__(shards)
    self._names, self._keep = names, keep

  def __iter__(self) -> 'BatchIterator':
    """A fresh iterator, to be checkpointed with the model."""
    shards = [iter(shard) for shard in self._parents]
    return BatchIterator(shards, self._names, self._keep)


class BatchIterator(grain.DatasetIterator):
  """Iterates over `packing.Batch` and knows what became of the documents.

  Attributes:
    counts: documents and tokens packed, slots they lie in (tokens / slots is
      the fill ratio), chats `truncated` to the row, documents `untrained` and
      so left out; in the shards of this host, since this iterator was made.
  """

  def __init__(
    self,
    shards: Sequence[grain.DatasetIterator],
    names: Sequence[str],
    keep: np.ndarray,
  ):
    """Reads from the prefetching stages; see `Batches`."""
    super().__init__(shards)
    self._names, self._keep = names, keep
    self.counts = dict.fromkeys((*packing.COUNTS, 'slots'), 0)

  def __next__(self) -> packing.Batch:
    """The next batch: this host's rows of the five arrays.

    Raises:
      ValueError: a row of the source is broken; says where.
    """
    parts = [next(shard) for shard in self._parents]
    # Copies, because worker processes lend memory that they share.
    batch = {
      name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }
    for name, count in zip(packing.COUNTS, batch.pop('counts').sum(axis=0)):
      if count and not self.counts[name] and name in ('truncated', 'untrained'):
        logging.warning(
          'data: documents are %s (counted in the metrics); see data.length',
          name,
        )
      self.counts[name] += int(count)
    self.counts['slots'] += batch['tokens'].size
    return packing.Batch(
      **{name: rows[self._keep] for name, rows in batch.items()}
    )

  def get_state(self) -> dict[str, Any]:
    """The position in each shard by its name: JSON, a few hundred bytes."""
    return {
      name: shard.get_state() for name, shard in zip(self._names, self._parents)
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position that `get_state` gave."""
    for name, shard in zip(self._names, self._parents):
      shard.set_state(state[name])


def local_rows(mesh: Mesh, batch: int) -> list[int]:
  """Numbers of the rows of a batch that this host's devices take, ascending.

  Raises:
    ValueError: the rows do not divide over the mesh.
  """
  shards = int(np.prod([mesh.shape[axis] for axis in ROW_AXES]))
  if batch % shards:
    raise ValueError(
      f'data.batch={batch} is not a multiple of the {shards} shards that the '
      f'mesh axes {", ".join(ROW_AXES)} make'
    )
  spread = NamedSharding(mesh, PartitionSpec(ROW_AXES))
  blocks = spread.addressable_devices_indices_map((batch,)).values()
  return sorted({row for (rows,) in blocks for row in range(batch)[rows]})


def to_device(
  batch: Mapping[str, np.ndarray], mesh: Mesh, size: int
) -> dict[str, jax.Array]:
  """Puts rows on this host's devices; tokens of a row over `context`.

  Args:
    batch: the rows that `local_rows(mesh, size)` lists.
    mesh: the device mesh.
    size: rows of the batch over all hosts.
  """
  sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES, TOKEN_AXIS))
  places = {row: at for at, row in enumerate(local_rows(mesh, size))}

  def block(value, index):
    rows, columns = index
    return value[[places[row] for row in range(size)[rows]], columns]

  return {
    name: jax.make_array_from_callback(
      (size, *value.shape[1:]),
      sharding,
      functools.partial(block, value),
    )
    for name, value in batch.items()
  }
