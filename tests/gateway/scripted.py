"""An engine that says what it is told to, a server of it, and its clients."""

import concurrent.futures
import contextlib
import json
import re
import threading
import time

import anthropic
import httpx2
import numpy as np
import openai
import uvicorn

from m2 import types
from m2.data import markup, tokenizer
from m2.engine import engine as engines
from m2.gateway import capture, server

TOKENIZER = tokenizer.train(
  ['add a column to the table users', 'select name from users;', 'tool ok'], 320
)
EOS = TOKENIZER.eos_id
TOOLS = (
  {
    'type': 'function',
    'function': {
      'name': 'sql',
      'parameters': {
        'type': 'object',
        'properties': {'script': {'type': 'string'}},
        'required': ['script'],
      },
    },
  },
)
CALL = (
  'think a bit\n</think>\n\n\n<minimax:tool_call>\n<invoke name="sql">\n'
  '<parameter name="script">select 1;</parameter>\n</invoke>\n'
  '</minimax:tool_call>'
)
SPECIAL = '|'.join(map(re.escape, markup.SPECIALS))
SECRET = 'a secret of enough characters'
TALK = 'so\n</think>\n\nnow then END of it'
ASK = {'model': 'm2', 'messages': [{'role': 'user', 'content': 'hello'}]}
CHAT, MESSAGES = '/v1/chat/completions', '/v1/messages'


class Scripted:
  """An engine that answers with given texts, cut up in a way of its own.

  Special tokens in a text are such, but for those inside ‹ and ›, which it
  quotes with plain ids. With `obey`, no more than asked for. Who listens gets
  `chunk` ids at a time, from another thread, `pause` seconds apart.
  """

  def __init__(
    self,
    *answers,
    stop=types.StopReason.EOS,
    chunk=3,
    pause=0.0,
    room=None,
    obey=False,
  ):
    self.requests, self.version, self.failed = [], 3, None
    self.counters = engines.Counters()
    self.cancelled = []  # futures
    self._answers, self._stop = list(answers), stop
    self._chunk, self._pause, self._room = chunk, pause, room
    self._obey = obey
    self._lock = threading.Lock()

  def submit(self, request):
    with self._lock:
      self.requests.append(request)
      text = self._answers.pop(0)
    ids = np.array(encode(text, self._stop), np.int32)
    stop = self._stop
    if self._room is not None and len(request.prompt_ids) > self._room:
      ids, stop = ids[:0], types.StopReason.CONTEXT
    if self._obey and len(ids) > request.sampling.max_new:
      ids, stop = ids[: request.sampling.max_new], types.StopReason.LENGTH
    logprobs = np.linspace(-1, 0, len(ids)).astype(np.float32)
    future = concurrent.futures.Future()
    if request.listen is None and not self._pause:
      future.set_result(_result(ids, logprobs, stop))
    else:
      threading.Thread(
        target=self._say, args=(request, future, ids, logprobs, stop)
      ).start()
    return future

  def cancel(self, future):
    self.cancelled.append(future)

  def _say(self, request, future, ids, logprobs, stop):
    said = 0
    while said < len(ids) and not future.cancelled():
      time.sleep(self._pause)
      if future in self.cancelled:
        stop = types.StopReason.CANCELLED
        break
      now = slice(said, said + self._chunk)
      said += self._chunk
      if request.listen is not None:
        request.listen(ids[now], logprobs[now])
    if future.set_running_or_notify_cancel():
      said = min(said, len(ids))
      future.set_result(_result(ids[:said], logprobs[:said], stop))
    else:
      self.cancelled.append(future)


def encode(text, stop=types.StopReason.EOS):
  """Ids of a text; no tokeniser would cut it up like that."""
  ids = []
  parts = re.split(f'({SPECIAL})|‹(.*?)›', text, flags=re.DOTALL)
  for place, part in enumerate(parts):  # text, special, quoted, text, ...
    if part and place % 3 == 1:
      ids += TOKENIZER.encode(part)
    else:  # one character at a time
      ids += [id for c in part or '' for id in TOKENIZER.encode_plain(c)]
  return [*ids, EOS] if stop == types.StopReason.EOS else ids


def _result(ids, logprobs, stop):
  return engines.GenResult(
    ids=ids,
    logprobs=logprobs,
    versions=np.full(len(ids), 3, np.int32),
    version=3,
    stop=stop,
    seconds=0.5,
  )


class Pool:
  """Keeps completions."""

  def __init__(self):
    self.completions = []

  def put(self, completion):
    self.completions.append(completion)


@contextlib.contextmanager
def served(
  engine, *, words=TOKENIZER, secret='', http='h11', connections=None, **limits
):
  """A server in a thread: its URL, the gateway and the pool.

  `connections` is a list that gets the set of those that it has.
  """
  pool = Pool()
  gateway = capture.Gateway(engine, words, pool)
  front = server.Server(
    gateway, engine, name='m2', secret=secret, limits=server.Limits(**limits)
  )
  running = uvicorn.Server(
    uvicorn.Config(
      front.app, port=0, log_level='error', lifespan='off', http=http
    )
  )
  if connections is not None:
    connections.append(running.server_state.connections)
  thread = threading.Thread(target=running.run)
  thread.start()
  while not running.started:
    time.sleep(0.01)
  port = running.servers[0].sockets[0].getsockname()[1]
  try:
    yield f'http://127.0.0.1:{port}', gateway, pool
  finally:
    running.should_exit = True
    thread.join()


def sdk(url, key='any'):
  """OpenAI's own client, which asks once."""
  return openai.OpenAI(base_url=f'{url}/v1', api_key=key, max_retries=0)


def claude(url, key='any'):
  """Anthropic's."""
  return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)


def post(url, tree, **more):
  """Any JSON, well formed or not in its strings."""
  return httpx2.post(url, content=json.dumps(tree), **more)
