"""The `eval` mode: a checkpoint plays tasks of one split and is told how well.

Writes `<workdir>/eval.json` with every episode and prints the table.
"""

import asyncio
import dataclasses
import pathlib
import time

import jax

from m2 import config as settings
from m2.checkpoint import store
from m2.data import tokenizer as tokenizers
from m2.engine import engine as engines
from m2.eval import play, report
from m2.eval import run as eval_run
from m2.gateway import capture
from m2.parallel import mesh as meshes
from m2.train import resume


def run(
  config: settings.RunConfig, workdir: pathlib.Path
) -> eval_run.EvalReport:
  """Evaluates `checkpoint.init_from`.

  Args:
    config: frozen settings of mode `eval`.
    workdir: gets `eval.json`.

  Returns:
    The report, as written.

  Raises:
    ValueError: no checkpoint is named, or settings do not fit it.
    m2.checkpoint.store.CheckpointError: the checkpoint cannot be read.
  """
  drawn = play.exam(config)
  mesh = meshes.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    engine, words = load(config, mesh)
    gateway = capture.Gateway(engine, words)
    began = time.monotonic()
    result = asyncio.run(
      _play(config, drawn, play.Player(config, gateway), engine)
    )
  seconds = time.monotonic() - began
  eval_run.save(result, workdir / 'eval.json')
  print(report.table(result))
  print(
    f'{len(result.rows)} episodes in {seconds:.1f} s, '
    f'{engine.counters.sampled_tokens / seconds:.0f} sampled tokens/s',
    flush=True,
  )
  return result


def load(
  config: settings.RunConfig, mesh: jax.sharding.Mesh
) -> tuple[engines.Engine, tokenizers.Tokenizer]:
  """An engine with the weights of `checkpoint.init_from`, and their words.

  Raises:
    ValueError: no checkpoint is named, or settings do not fit it.
    m2.checkpoint.store.CheckpointError: the checkpoint cannot be read.
  """
  start = config.checkpoint.init_from
  if not start:
    raise ValueError(
      f'checkpoint.init_from is empty: name a run to {config.mode}'
    )
  words = tokenizer(start)
  check_tokenizer(start, words)
  model = dataclasses.replace(config.model, fp8_experts=config.engine.fp8)
  params = store.load_params(start, model, mesh)
  engine = engines.Engine(config.model, config.engine, params, mesh=mesh)
  return engine, words


async def _play(config, drawn, player, engine) -> eval_run.EvalReport:
  """Plays everything, as many episodes at once as the engine has slots."""
  driver = asyncio.create_task(engine.drive())
  playing = asyncio.create_task(
    eval_run.evaluate(
      drawn,
      player,
      trials=config.eval.trials,
      seed=config.seed,
      concurrency=config.engine.slots,
    )
  )
  done, _ = await asyncio.wait(
    {driver, playing}, return_when=asyncio.FIRST_COMPLETED
  )
  if driver in done:
    playing.cancel()
    driver.result()
  driver.cancel()
  return playing.result()


def tokenizer(start: str) -> tokenizers.Tokenizer:
  """The tokenizer that belongs to the weights in `checkpoint.init_from`.

  Args:
    start: a workdir, a directory of checkpoints, one step of it, or a Hugging
      Face model directory; `tokenizer.json` lies there or in the workdir.

  Raises:
    ValueError: there is none; names where it was looked for.
  """
  if file := store.beside(start, 'tokenizer.json'):
    return tokenizers.load(file)
  looked = ' or '.join(map(str, store.folders(start)))
  raise ValueError(
    f'checkpoint.init_from={start!r}: no tokenizer.json in {looked}; copy the '
    'one that the weights were trained with'
  )


def check_tokenizer(start: str, words: tokenizers.Tokenizer) -> None:
  """Refuses weights that say they were trained with another tokenizer.

  Args:
    start: as for `tokenizer`; a Hugging Face model does not say.
    words: the tokenizer to use.

  Raises:
    ValueError: it is another one.
    m2.checkpoint.store.CheckpointError: there is no readable checkpoint.
  """
  noted = resume.trained_with(start)
  if noted not in (None, words.fingerprint()):
    raise ValueError(
      f'checkpoint.init_from={start}: its tokenizer.json has fingerprint '
      f'{words.fingerprint()}, and the weights were trained with {noted}; put '
      'that tokenizer.json back'
    )
