"""From sources to batches on the devices, in one fixed order.

source (encoded on access), shard by host, seed, shuffle, repeat, pack, batch,
prefetch. The iterator, not the dataset, goes to the checkpoint: its state is a
few numbers and resumes to the bit, in the middle of an epoch and of a window.
"""

import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2 import config
from m2.data import documents, packing, sources
from m2.data import tokenizer as tokenizers

# Mesh axes that the rows of a batch are spread over.
ROW_AXES = ('data', 'fsdp', 'expert')
TOKEN_AXIS = 'context'  # and the tokens of each row
# Tokens packed together: enough documents to fill rows well, few enough to be
# read again in well under a second when a run resumes.
_WINDOW_TOKENS = 1 << 16
_WINDOW_ROWS = 8  # at the least
# Text that a new tokenizer learns from: so much for each of its ids, at most
# so much.
_CHARACTERS_PER_ID = 2_000
_MOST_CHARACTERS = 20_000_000


def make(
  cfg: config.DataConfig,
  tokenizer: tokenizers.Tokenizer,
  *,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  source: sources.Source | Sequence[sources.Row] | None = None,
) -> 'Batches':
  """The endless stream of this host's share of every batch.

  Hosts read disjoint shards that together are the whole source; every epoch
  shuffles a shard anew. Rows may mix documents of neighbouring epochs.

  Args:
    cfg: what to read and how to cut it.
    tokenizer: for text and chats.
    seed: of every shuffle.
    process_index: this host.
    process_count: number of hosts; each gives `cfg.batch / process_count` rows.
    source: rows to read instead of the configured source.

  Raises:
    ValueError: the source cannot be opened or is too small, or the batch does
      not divide over the hosts. Iterating raises it, with its place, for a row
      that is broken.
  """
  if cfg.batch % process_count:
    raise ValueError(
      f'data.batch={cfg.batch} is not a multiple of the {process_count} hosts'
    )
  if cfg.length < 2:
    raise ValueError(f'data.length={cfg.length}: a row needs 2 tokens or more')
  rows = documents.Documents(
    open_source(cfg, source), tokenizer, cfg.keep_all_reasoning
  )
  if len(rows) < process_count:
    raise ValueError(
      f'the source has {len(rows)} rows for {process_count} hosts'
    )
  dataset = (
    grain.MapDataset.source(rows)[process_index::process_count]
    .seed(seed)
    .shuffle()
    .repeat()
    .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  )
  dataset = packing.Rows(
    dataset,
    length=cfg.length,
    rows=max(_WINDOW_ROWS, _WINDOW_TOKENS // cfg.length),
    pad=tokenizer.pad_id,
    seed=seed,
  ).batch(cfg.batch // process_count, drop_remainder=True)
  if cfg.workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=cfg.workers, per_worker_buffer_size=cfg.prefetch
      )
    )
  else:
    dataset = grain.experimental.ThreadPrefetchIterDataset(
      dataset, prefetch_buffer_size=cfg.prefetch
    )
  return Batches(dataset)


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
) -> tokenizers.Tokenizer:
  """The run's tokenizer, kept as `<workdir>/tokenizer.json`.

  It is the work directory's own if there is one, so that a resumed run cannot
  change it; else the configured file; else one trained on the source.

  Args:
    cfg: names the tokenizer, and the source if none is given.
    source: rows to train on; None = the configured source.
    vocab: the model's vocabulary; no id may reach it.
    workdir: where it is kept.

  Raises:
    ValueError: the file is broken, the tokenizer is larger than `vocab`, or
      the configured one is not the one that the work directory holds.
  """
  kept = pathlib.Path(workdir) / 'tokenizer.json'
  if cfg.tokenizer:
    found = tokenizers.load(cfg.tokenizer)
    if kept.exists():
      held = tokenizers.load(kept)
      if held.fingerprint() != found.fingerprint():
        raise ValueError(
          f'data.tokenizer={cfg.tokenizer} differs from {kept}, with which '
          'this run began; use another workdir'
        )
  elif kept.exists():
    found = tokenizers.load(kept)
  else:
    enough = min(vocab * _CHARACTERS_PER_ID, _MOST_CHARACTERS)
    found = tokenizers.train(texts(open_source(cfg, source), enough), vocab)
  if found.size > vocab:
    raise ValueError(
      f'the tokenizer has {found.size} ids but model.vocab={vocab}; raise '
      'model.vocab or use a smaller tokenizer'
    )
  if not kept.exists():
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
  """The last stage: takes the counts off the batches and adds them up."""

  def __iter__(self) -> 'BatchIterator':
    """A fresh iterator, to be checkpointed with the model."""
    return BatchIterator(iter(self._parent))


class BatchIterator(grain.DatasetIterator):
  """Iterates over `packing.Batch` and knows what became of the documents.

  Attributes:
    counts: documents and tokens packed, slots they lie in (tokens / slots is
      the fill ratio), chats `truncated` to the row, documents `untrained` and
      so left out; since this iterator was made.
  """

  def __init__(self, parent: grain.DatasetIterator):
    """Reads from the prefetching stage."""
    super().__init__(parent)
    self.counts = dict.fromkeys((*packing.COUNTS, 'slots'), 0)

  def __next__(self) -> packing.Batch:
    """The next batch: this host's rows of the five arrays.

    Raises:
      ValueError: a row of the source is broken; says where.
    """
    # Copies, because worker processes lend memory that they share.
    batch = {name: np.array(rows) for name, rows in next(self._parent).items()}
    for name, count in zip(packing.COUNTS, batch.pop('counts').sum(axis=0)):
      if count and not self.counts[name] and name in ('truncated', 'untrained'):
        logging.warning(
          'data: documents are %s (counted in the metrics); see data.length',
          name,
        )
      self.counts[name] += int(count)
    self.counts['slots'] += batch['tokens'].size
    return packing.Batch(**batch)

  def get_state(self) -> dict[str, Any]:
    """The position in the stream: JSON, a few hundred bytes."""
    return self._parent.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position that `get_state` gave."""
    self._parent.set_state(state)


def to_device(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Puts this host's rows on its devices, tokens over the context axis.

  Raises:
    ValueError: the rows do not divide over the mesh.
  """
  sharding = NamedSharding(mesh, PartitionSpec(ROW_AXES, TOKEN_AXIS))
  shards = int(np.prod([mesh.shape[axis] for axis in ROW_AXES]))
  rows = len(batch['tokens']) * jax.process_count()
  if rows % shards:
    raise ValueError(
      f'data.batch={rows} is not a multiple of the {shards} shards that the '
      f'mesh axes {", ".join(ROW_AXES)} make'
    )
  return {
    name: jax.make_array_from_process_local_data(sharding, value)
    for name, value in batch.items()
  }
