"""How answers reach their clients, and what happens when those leave."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette import requests, responses

from m2.gateway import ask as asks

GRACE = 5.0  # seconds that a reader has to take what was sampled in time


class Stream(responses.StreamingResponse):
  """Server-sent events; `ended` is called however they end.

  Who reads slowly has until GRACE seconds after `end`, by the event loop's
  clock. Then the connection is closed, and `ended` is told that it was late.
  """

  def __init__(
    self,
    events: AsyncIterator[str],
    ended: Callable[[bool], None],
    end: float,
  ):
    """Prepares."""
    super().__init__(events, media_type='text/event-stream')
    self._ended, self._end = ended, end

  async def __call__(self, scope, receive, send) -> None:
    """Sends them."""
    late = False
    try:
      async with asyncio.timeout_at(self._end + GRACE):
        await super().__call__(scope, receive, send)
    except TimeoutError:
      late = True
    finally:
      self._ended(late)


def json(tree: object, status: int = 200) -> responses.Response:
  """A response; numbers that JSON has not are an error of ours."""
  try:
    return responses.JSONResponse(tree, status)
  except ValueError as error:
    raise ArithmeticError(f'the answer is no JSON: {error}') from error


async def unless_gone(request: requests.Request, task: asyncio.Task) -> Any:
  """What comes of a task, unless the client leaves first.

  Raises:
    asks.Refusal: it has left.
    Exception: what the task raised.
  """

  async def gone() -> None:
    while (await request.receive())['type'] != 'http.disconnect':
      pass

  leaving = asyncio.create_task(gone())
  try:
    await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise asks.Refusal('the client has left', status=499)
    return task.result()
  finally:
    leaving.cancel()
