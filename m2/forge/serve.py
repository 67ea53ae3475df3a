"""The `serve` mode: a checkpoint behind HTTP, for any agent (m2/gateway).

The engine has a thread of its own, so that a step of the device holds up no
connection. `<workdir>/serving.json` says where it listens. With a secret, what
episodes sample is kept in `<workdir>/pool.db`, those of the n-th start as
`EPISODE@n`.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import socket
import threading
from collections.abc import Iterator

import jax
import uvicorn
from uvicorn.protocols.http import h11_impl

from m2 import config as settings
from m2 import types
from m2.engine import engine as engines
from m2.forge import evaluate
from m2.forge import pool as pools
from m2.gateway import capture, server
from m2.parallel import mesh as meshes

SHORTEST = 16  # characters of a secret
PATIENCE = 15.0  # seconds; where nothing happens for twice as long, that is it
GRACE = 10  # seconds that answers get to end when the server is told to


def run(config: settings.RunConfig, workdir: pathlib.Path) -> None:
  """Serves `checkpoint.init_from` until it is told to stop.

  Args:
    config: frozen settings of mode `serve`.
    workdir: gets `serving.json`, and `pool.db` if there is a secret.

  Raises:
    ValueError: no checkpoint is named, settings do not fit it, or secret or
      port cannot be used.
    m2.checkpoint.store.CheckpointError: the checkpoint cannot be read.
  """
  serve = config.serve
  key = secret(serve.secret_file)
  listener = listen(serve.host, serve.port)  # before weights are loaded
  (workdir / 'serving.json').unlink(missing_ok=True)
  mesh = meshes.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    engine, words = evaluate.load(config, mesh)
    engine.warm_up()
  limits = server.Limits(
    size=serve.megabytes << 20,
    requests=serve.requests,
    seconds=serve.seconds,
    length=config.engine.length,
  )
  with contextlib.ExitStack() as stack:
    pool = stack.enter_context(kept(workdir / 'pool.db')) if key else None
    front = server.Server(
      capture.Gateway(engine, words, pool),
      engine,
      name=serve.name,
      secret=key,
      limits=limits,
    )
    http = _Http(front, serve, workdir / 'serving.json')
    stack.enter_context(driven(engine, http.stop))
    stack.callback((workdir / 'serving.json').unlink, missing_ok=True)
    http.run([listener])
  if engine.failed is not None:
    raise RuntimeError(f'the engine has failed: {engine.failed}')


def secret(path: str) -> str:
  """What the file of `serve.secret_file` holds; '' without one.

  Raises:
    ValueError: it cannot be read, or is too short to be one.
  """
  if not path:
    return ''
  try:
    found = pathlib.Path(path).read_text(encoding='utf-8').strip()
  except (OSError, ValueError) as error:
    raise ValueError(f'serve.secret_file={path}: {error}') from None
  if len(found) < SHORTEST:
    raise ValueError(
      f'serve.secret_file={path} has {len(found)} characters; {SHORTEST} at '
      'least, such as `openssl rand -hex 32` gives'
    )
  return found


@contextlib.contextmanager
def kept(path: pathlib.Path) -> Iterator[capture.Pool]:
  """A pool in a file, to which every completion goes as it comes.

  Raises:
    m2.forge.pool.PoolError: the file cannot be written.
  """
  with pools.DataPool(pools.file_url(path)) as pool:
    start = pool.begin()
    steps: collections.Counter[str] = collections.Counter()

    class Kept:
      """Names and numbers of its own: a gateway may forget, and end."""

      def put(self, completion: types.Completion) -> None:
        name = f'{completion.episode}@{start}'
        step = steps[name]
        steps[name] += 1  # also if what follows fails
        pool.put(dataclasses.replace(completion, episode=name, step=step))
        pool.flush()

    yield Kept()


def listen(host: str, port: int) -> socket.socket:
  """A socket that clients can connect to.

  Raises:
    ValueError: the port is taken, or the host is none of this machine's.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise ValueError(
      f'serve.host={host}, serve.port={port}: {error.strerror}; 0 is any port '
      'that is free'
    ) from None


class driven:
  """Drives an engine in a thread of its own, as a context manager."""

  def __init__(self, engine: engines.Engine, failed):
    """Prepares; `failed` is called in that thread if the engine fails."""
    self._engine, self._failed = engine, failed
    self._started: concurrent.futures.Future = concurrent.futures.Future()
    self._thread = threading.Thread(target=self._run, name='engine')

  def __enter__(self) -> None:
    """Starts."""
    self._thread.start()
    self._started.result()

  def __exit__(self, *_) -> None:
    """Ends after the step that is going on."""
    loop, task = self._started.result()
    if self._thread.is_alive():
      loop.call_soon_threadsafe(task.cancel)
    self._thread.join()

  def _run(self) -> None:
    async def main():
      task = asyncio.create_task(self._engine.drive())
      self._started.set_result((asyncio.get_running_loop(), task))
      await asyncio.wait([task])
      if not task.cancelled() and task.exception():
        self._failed()

    asyncio.run(main())


class Protocol(h11_impl.H11Protocol):
  """HTTP that gives up connections on which nothing happens.

  That is where no request begins, or the next one does not, and where what was
  sent is not read although the connection is to close.
  """

  def connection_made(self, transport) -> None:
    """Begins to look, now and then."""
    super().connection_made(transport)
    self._seen = None
    self.loop.call_later(PATIENCE, self._look)

  def _look(self) -> None:
    if self not in self.connections:
      return
    closing = self.transport.is_closing()
    idle = self.cycle is None or self.cycle.response_complete
    seen, self._seen = self._seen, (self.cycle, closing)
    if closing and seen == self._seen:
      self.transport.abort()
    elif idle and seen == self._seen:
      self.transport.close()
    self.loop.call_later(PATIENCE, self._look)


class _Http(uvicorn.Server):
  """Says where it listens, once it does."""

  def __init__(
    self, front: server.Server, serve: settings.ServeConfig, note: pathlib.Path
  ):
    super().__init__(
      uvicorn.Config(
        front.app,
        http=Protocol,
        # Others may wait; beyond, connections are refused.
        limit_concurrency=4 * serve.requests + 16,
        log_level='warning',
        lifespan='off',
        timeout_graceful_shutdown=GRACE,
      )
    )
    self._model, self._note = serve.name, note

  async def startup(self, sockets=None) -> None:
    await super().startup(sockets)
    host, port, *_ = self.servers[0].sockets[0].getsockname()
    url = f'http://{f"[{host}]" if ":" in host else host}:{port}'
    fresh = self._note.with_name(f'{self._note.name}.partial')
    fresh.write_text(json.dumps({'url': url, 'model': self._model}) + '\n')
    fresh.replace(self._note)
    print(f'{self._model} at {url}', flush=True)

  def stop(self) -> None:
    """Ends it; for other threads."""
    self.should_exit = True
