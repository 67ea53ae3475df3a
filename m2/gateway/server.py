"""The gateway over HTTP: any agent that speaks a usual API, exact ids kept.

    POST /v1/chat/completions          OpenAI
    POST /v1/messages                  Anthropic, and .../count_tokens
    GET  /v1/models, /health, /metrics

With a secret, who posts needs a key (`keys.py`): what is asked is captured as
that episode's, and no other episode can be read or written with it. Without one
anybody may ask, and nothing is captured.

A client that leaves ends its sampling. What goes wrong is told in the form of
the API that was used, and counted in `/metrics`.
"""

import asyncio
import collections
import dataclasses
import functools
import secrets
import time
import traceback
import types as modules
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette import applications, requests, responses, routing
from starlette.exceptions import HTTPException

from m2 import types
from m2.engine import engine as engines
from m2.gateway import (
  anthropic_messages,
  capture,
  keys,
  openai_chat,
  replies,
)
from m2.gateway import ask as asks
from m2.gateway import stream as streams

# What each API calls an error of a status.
_KINDS = {
  openai_chat: {
    401: 'authentication_error',
    404: 'not_found_error',
    429: 'rate_limit_error',
    503: 'service_unavailable',
    504: 'timeout',
  },
  anthropic_messages: {
    401: 'authentication_error',
    404: 'not_found_error',
    413: 'request_too_large',
    429: 'rate_limit_error',
    503: 'overloaded_error',
    504: 'timeout_error',
  },
}
LONG = 100_000  # bytes of a body that is read in a thread: others go on
_PREFIX = {openai_chat: 'chatcmpl-', anthropic_messages: 'msg_'}


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one client may do to others.

  Attributes:
    size: bytes of a request's body.
    requests: answered at once; more are refused with 429.
    seconds: that a request may take, from its first byte.
    length: tokens of prompt and answer together.
  """

  size: int = 8 << 20
  requests: int = 256
  seconds: float = 600.0
  length: int = 2**31 - 1


class Server:
  """Answers requests with one gateway; `app` is the ASGI application."""

  def __init__(
    self,
    gateway: capture.Gateway,
    engine: engines.Engine,
    *,
    name: str,
    secret: str = '',
    limits: Limits = Limits(),
  ):
    """Prepares.

    Args:
      gateway: in front of `engine`.
      engine: somebody else drives it.
      name: of the model, which requests must name.
      secret: of the keys; '' lets anybody ask, and captures nothing.
      limits: of requests.
    """
    self._gateway, self._engine = gateway, engine
    self._name, self._secret, self._limits = name, secret, limits
    self._words = gateway.tokenizer
    self._running = 0
    self._counts: collections.Counter[tuple[str, int]] = collections.Counter()
    self._began = int(time.time())

    def post(path: str, dialect: modules.ModuleType, run: Callable):
      async def endpoint(request: requests.Request) -> responses.Response:
        return await self._answered(request, dialect, run)

      return routing.Route(path, endpoint, methods=['POST'])

    self.app = applications.Starlette(
      routes=[
        post('/v1/chat/completions', openai_chat, self._complete),
        post('/v1/messages', anthropic_messages, self._complete),
        post('/v1/messages/count_tokens', anthropic_messages, self._count),
        routing.Route('/v1/models', self._models),
        routing.Route('/v1/models/{name:path}', self._model),
        routing.Route('/health', self._health),
        routing.Route('/metrics', self._metrics),
      ],
      exception_handlers={HTTPException: self._unknown},
    )

  async def _answered(
    self, request: requests.Request, dialect: modules.ModuleType, run: Callable
  ) -> responses.Response:
    """Runs a request within the limits; failures become the API's errors."""
    path = request.url.path
    end = asyncio.get_running_loop().time() + self._limits.seconds
    try:
      if self._running >= self._limits.requests:
        raise asks.Refusal(
          f'{self._running} requests are being answered already; try later',
          status=429,
        )
      self._running += 1
      kept = False  # a stream goes on after this
      try:
        async with asyncio.timeout_at(end):
          episode = self._episode(request)
          body = await self._body(request)
          request.state.long = len(body) > LONG
          tree = await _beside(request, asks.load, body)
          found = await run(request, dialect, episode, tree, end)
        kept = isinstance(found, replies.Stream)
        self._counts[path, 200] += 1
        return found
      finally:
        self._running -= not kept
    except Exception as error:
      status, kind, message = self._failure(error, dialect)
      self._counts[path, status] += 1
      field = getattr(error, 'field', '')
      headers = {'Retry-After': '1'} if status in (429, 503) else {}
      return responses.JSONResponse(
        dialect.error(message, kind, field), status, headers
      )

  def _ended(self, answering: asyncio.Task, late: bool) -> None:
    """A stream is over, or nobody reads it any more."""
    answering.cancel()
    self._running -= 1
    self._counts['stream', 504] += late

  def _failure(
    self, error: Exception, dialect: modules.ModuleType
  ) -> tuple[int, str, str]:
    """Status, kind and message of what went wrong."""
    status, message = 500, f'{type(error).__name__}: {error}'
    if self._engine.failed is not None:
      status, message = 503, f'the engine has failed: {self._engine.failed}'
    elif isinstance(error, asks.Refusal):
      status, message = error.status, str(error)
    elif isinstance(error, ValueError):  # messages or tools that make no sense
      status, message = 400, str(error)
    elif isinstance(error, requests.ClientDisconnect):
      status, message = 499, 'the client has left'
    elif isinstance(error, TimeoutError):
      status = 504
      message = f'no end after {self._limits.seconds:g} seconds'
    else:
      traceback.print_exception(error)  # a bug of ours, or a full disk
    usual = 'invalid_request_error' if status < 500 else 'api_error'
    kind = _KINDS[dialect].get(status, usual)
    return status, kind, asks.printable(message)

  async def _unknown(
    self, request: requests.Request, error: Exception
  ) -> responses.Response:
    """A path that is none, or a method that it has not."""
    path, status = request.url.path, error.status_code
    self._counts['other', status] += 1
    claude = path.startswith('/v1/messages')
    dialect = anthropic_messages if claude else openai_chat
    kind = _KINDS[dialect].get(status, 'invalid_request_error')
    message = f'{request.method} {path:.100}: {error.detail}'
    return replies.json(
      dialect.error(asks.printable(message), kind, ''), status
    )

  def _episode(self, request: requests.Request) -> str | None:
    """The episode that a request's key speaks for; None without a secret."""
    if not self._secret:
      return None
    scheme, _, given = request.headers.get('authorization', '').partition(' ')
    if scheme.lower() != 'bearer':
      given = request.headers.get('x-api-key', '')
    episode = keys.episode_of(self._secret, given.strip())
    if episode is None:
      raise asks.Refusal('this key is none of any episode', status=401)
    return episode

  async def _body(self, request: requests.Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
      body += chunk
      if len(body) > self._limits.size:
        raise asks.Refusal(
          f'the body has more than {self._limits.size} bytes', status=413
        )
    return bytes(body)

  async def _complete(
    self,
    request: requests.Request,
    dialect: modules.ModuleType,
    episode: str | None,
    tree: object,
    end: float,
  ) -> responses.Response:
    """Completes a conversation, whole or as a stream, until `end`."""
    model, asked = await _beside(
      request, dialect.read, tree, self._limits.length
    )
    self._known(model)
    head = {
      'id': _PREFIX[dialect] + secrets.token_hex(12),
      'created': int(time.time()),
      'model': self._name,
    }
    parts: asyncio.Queue = asyncio.Queue()
    answering = asyncio.create_task(
      self._answer(episode, asked, parts, aside=request.state.long)
    )
    try:
      if not asked.stream:
        answers = await replies.unless_gone(request, answering)
        return replies.json(dialect.whole(asked, answers, head, self._words))
      # Nothing is sent before something has come: until then, what fails has
      # a status.
      first = await replies.unless_gone(
        request, asyncio.create_task(parts.get())
      )
      if first is None:
        await answering
    except BaseException:
      answering.cancel()
      raise
    writer = dialect.Writer(asked, head, self._words)
    return replies.Stream(
      self._events(dialect, writer, answering, parts, first, end),
      functools.partial(self._ended, answering),
      end,
    )

  async def _answer(
    self,
    episode: str | None,
    asked: asks.Ask,
    parts: asyncio.Queue,
    *,
    aside: bool,
  ) -> list[capture.Answer]:
    """Answers; parts go to the queue, and None after the last."""
    name = episode or f'anybody-{secrets.token_hex(16)}'
    listen = (lambda *part: parts.put_nowait(part)) if asked.stream else None
    try:
      answers = await self._gateway.answer(
        name,
        asked.messages,
        asked.tools or None,
        asked.sampling,
        count=asked.count,
        stop=asked.stop,
        listen=listen,
        unsaid=True,
        aside=aside,
      )
    finally:
      parts.put_nowait(None)
      if episode is None:
        self._gateway.forget(name)
    if answers[0].stop == types.StopReason.CONTEXT:
      raise asks.Refusal(
        f'the prompt of {len(answers[0].prompt_ids)} tokens leaves no room for '
        f'an answer; the context has {self._limits.length}',
        'messages',
      )
    return answers

  async def _events(
    self,
    dialect: modules.ModuleType,
    writer,
    answering: asyncio.Task,
    parts: asyncio.Queue,
    first: tuple[int, streams.Part] | None,
    end: float,
  ) -> AsyncIterator[str]:
    """The lines of a stream."""
    try:
      part = first
      while part is not None:
        for line in writer.part(*part):
          yield line
        async with asyncio.timeout_at(end):
          part = await parts.get()
      for line in writer.end(await answering):
        yield line
    except Exception as error:
      status, kind, message = self._failure(error, dialect)
      self._counts['stream', status] += 1
      for line in writer.fail(message, kind):
        yield line

  async def _count(
    self,
    request: requests.Request,
    dialect: modules.ModuleType,
    episode: str | None,
    tree: object,
    end: float,
  ) -> responses.Response:
    """Counts the tokens of a prompt."""
    del episode, end
    model, asked = await _beside(request, dialect.read_count, tree)
    self._known(model)
    count = await _beside(
      request, self._gateway.count, asked.messages, asked.tools or None
    )
    return responses.JSONResponse({'input_tokens': count})

  def _known(self, model: str) -> None:
    if model != self._name:
      raise asks.Refusal(
        f'{model!r:.100} is not served here, but {self._name!r}', 'model', 404
      )

  def _description(self) -> dict:
    return {
      'id': self._name,
      'object': 'model',
      'created': self._began,
      'owned_by': 'm2',
      'max_model_len': self._limits.length,
    }

  async def _models(self, request: requests.Request) -> responses.Response:
    del request
    return responses.JSONResponse(
      {'object': 'list', 'data': [self._description()]}
    )

  async def _model(self, request: requests.Request) -> responses.Response:
    try:
      self._known(request.path_params['name'])
    except asks.Refusal as error:
      body = openai_chat.error(str(error), 'not_found_error', 'model')
      return responses.JSONResponse(body, error.status)
    return responses.JSONResponse(self._description())

  async def _health(self, request: requests.Request) -> responses.Response:
    del request
    failed = self._engine.failed
    if failed is not None:
      return responses.JSONResponse({'status': f'failed: {failed}'}, 503)
    return responses.JSONResponse(
      {'status': 'ok', 'weight_version': self._engine.version}
    )

  async def _metrics(self, request: requests.Request) -> responses.Response:
    """Prometheus' text format."""
    del request
    lines = ['# TYPE m2_requests_total counter']
    lines += [
      f'm2_requests_total{{path="{path}",status="{status}"}} {count}'
      for (path, status), count in sorted(self._counts.items())
    ]
    lines += ['# TYPE m2_requests_running gauge']
    lines += [f'm2_requests_running {self._running}']
    lines += ['# TYPE m2_weight_version gauge']
    lines += [f'm2_weight_version {self._engine.version}']
    for place, counters in (
      ('engine', self._engine.counters),
      ('gateway', self._gateway.counters),
    ):
      for name, value in dataclasses.asdict(counters).items():
        lines += [f'# TYPE m2_{place}_{name}_total counter']
        lines += [f'm2_{place}_{name}_total {value}']
    return responses.PlainTextResponse('\n'.join(lines) + '\n')


async def _beside(request: requests.Request, run: Callable, *args: Any) -> Any:
  """What a function gives; for long requests, from another thread."""
  if request.state.long:
    return await asyncio.to_thread(run, *args)
  return run(*args)
