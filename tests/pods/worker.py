"""`main.py` with a ledger: `python -m tests.pods.worker` and its flags.

Every step appends a line to `<workdir>/ledger/<process>.jsonl`: the step, the
attempt, and for each row of the batch that this process gave, by its number in
the whole batch, the numbers of the documents in it.
"""

import json
import os
import pathlib
import types

import jax
from absl import app
from jax._src import compiler

import main
from m2.data import pipeline
from m2.train import journal
from tests.pods import documents


def keep_ledger() -> None:
  """Wraps what the loop calls with every batch."""
  local_rows, after = pipeline.local_rows, journal.Journal.after
  rows: list[int] = []

  def listed(mesh, batch):
    rows[:] = local_rows(mesh, batch)
    return list(rows)

  def noted(self, step, fresh, batch, *rest):
    found = {
      row: documents.numbers(tokens, positions)
      for row, tokens, positions in zip(
        rows, batch['tokens'], batch['positions'], strict=True
      )
    }
    line = {'step': step, 'attempt': os.environ['ATTEMPT'], 'rows': found}
    file = folder() / f'{jax.process_index()}.jsonl'
    with open(file, 'a', buffering=1) as ledger:
      ledger.write(json.dumps(line) + '\n')
    after(self, step, fresh, batch, *rest)

  pipeline.local_rows, journal.Journal.after = listed, noted


def keep_compiled() -> None:
  """Lets every process keep the programs it compiles, as jax lets the first.

  The others would compile anew at every start, and there are many starts.
  """
  state = types.SimpleNamespace(process_id=0, client=None)
  compiler.distributed = types.SimpleNamespace(global_state=state)


def shrink_windows() -> None:
  """One window of the pipeline is one epoch."""
  pipeline._WINDOW_TOKENS = documents.COUNT * documents.LENGTH


def folder() -> pathlib.Path:
  path = pathlib.Path(main.WORKDIR.value) / 'ledger'
  path.mkdir(exist_ok=True)
  return path


if __name__ == '__main__':
  keep_ledger()
  keep_compiled()
  shrink_windows()
  app.run(main.main, flags_parser=main.parse)
