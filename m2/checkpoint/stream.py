"""Reads tensors of files into parts of leaves, a few megabytes at a time.

    files --runs--> threads --planes--> one buffer a leaf and device

A run is a stretch of a file that one request reads: neighbouring tensors, or
rows of a large one. Runs are begun in the order of the files. Only rows that a
device of this process holds are read, and each once, however many devices hold
it. Rows are read whole: a part of a row saves less than it costs in requests.

Device memory does not outlive the process, so a load that is killed begins
anew; what it had read is in the system's file cache at best.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from m2.checkpoint import fp8, planes, shards, storage

RUN = 16 * 2**20  # bytes that one request reads at the most
IN_FLIGHT = 16 * RUN  # bytes of files in memory at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
  """Bytes of a file that are read together.

  Attributes:
    file: name of the file.
    start: the first byte.
    stop: the byte behind the last.
    take: is given them, as uint8.
  """

  file: str
  start: int
  stop: int
  take: Callable[[np.ndarray], None]


def stretches(
  needs: Sequence[planes.Need], parts: Mapping[str, Sequence[Any]]
) -> list[Stretch]:
  """What of the tensors is needed.

  Args:
    needs: the tensors.
    parts: by leaf, what has a `plane` and takes rows by `put`.
  """
  found = []
  for need in needs:
    tensor = need.tensor
    here = [
      part
      for part in parts[need.slot.entry.leaf]
      if part.plane.holds(need.slot.index)
    ]
    row_bytes = tensor.nbytes // need.slot.shape[0]
    step = max(1, RUN // row_bytes)
    step -= step % fp8.BLOCK if step > fp8.BLOCK else 0
    for rows in _union([part.plane.rows for part in here]):
      for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        takers = [
          part
          for part in here
          if part.plane.rows.start < last and first < part.plane.rows.stop
        ]
        found.append(
          Stretch(
            tensor.file,
            tensor.offset + first * row_bytes,
            tensor.offset + last * row_bytes,
            functools.partial(_give, need, first, takers),
          )
        )
  return found


def _give(need: planes.Need, first: int, takers, data: np.ndarray) -> None:
  if need.tensor.dtype == 'F8_E4M3' and fp8.broken(data):
    raise ValueError(f'{need.tensor.file}: {need.name}: a weight is NaN')
  columns = math.prod(need.slot.shape[1:])
  x_RC = data.view(shards.DTYPES[need.tensor.dtype]).reshape(-1, columns)
  for part in takers:
    part.put(need, x_RC, first)


def _union(ranges: Sequence[range]) -> list[range]:
  merged: list[range] = []
  for r in sorted(ranges, key=lambda r: r.start):
    if merged and r.start <= merged[-1].stop:
      merged[-1] = range(merged[-1].start, max(merged[-1].stop, r.stop))
    else:
      merged.append(r)
  return merged


def runs(found: Sequence[Stretch], gap: int) -> list[list[Stretch]]:
  """Groups what one request reads, in the order of the files.

  Args:
    found: what to read.
    gap: bytes between two that are read rather than skipped.
  """
  grouped: list[list[Stretch]] = []
  for one in sorted(found, key=lambda x: (x.file, x.start)):
    run = grouped[-1] if grouped else None
    if (
      run
      and one.file == run[0].file
      and one.start - run[-1].stop <= gap
      and one.stop - run[0].start <= RUN
    ):
      run.append(one)
    else:
      grouped.append([one])
  return grouped


def read(
  folder: storage.Folder, found: Sequence[Stretch], in_flight: int, title: str
) -> None:
  """Reads stretches and gives each to its `take`, in threads.

  Args:
    folder: where the files are.
    found: what to read.
    in_flight: bytes of files in memory at a time; threads follow from it.
    title: shown before the progress.
  """

  def one(run: list[Stretch]) -> int:
    start, stop = run[0].start, run[-1].stop
    data = folder.read(run[0].file, start, stop)
    for item in run:
      item.take(data[item.start - start : item.stop - start])
    return stop - start

  todo = runs(found, folder.gap)
  total = sum(run[-1].stop - run[0].start for run in todo)
  with progress(title, total) as bar:
    for count in shards.each(one, todo, max(1, in_flight // RUN)):
      bar.update(count)


def whole(
  folder: storage.Folder, tensors: Mapping[str, shards.Tensor], in_flight: int
) -> dict[str, np.ndarray]:
  """Reads small tensors as they are."""
  found: dict[str, np.ndarray] = {}

  def take(name: str, data: np.ndarray) -> None:
    x = data.view(shards.DTYPES[tensors[name].dtype])
    found[name] = x.reshape(tensors[name].shape).copy()

  wanted = [
    Stretch(
      tensor.file,
      tensor.offset,
      tensor.offset + tensor.nbytes,
      functools.partial(take, name),
    )
    for name, tensor in tensors.items()
  ]
  read(folder, wanted, in_flight, 'scales')
  return found


def progress(title: str, total: int) -> tqdm.tqdm:
  """A bar of bytes and bytes a second; nothing if all is done in two seconds.

  Shown by the first process only; where nobody watches, every half minute.
  """
  return tqdm.tqdm(
    total=total,
    desc=title,
    unit='B',
    unit_scale=True,
    delay=2,
    mininterval=1 if sys.stderr.isatty() else 30,
    disable=jax.process_index() != 0,
  )
