"""The `serve` mode: an engine in a thread of its own, many clients."""

import json
import pathlib
import socket
import sqlite3
import threading
import time
from unittest import mock

import httpx2
import jax
import numpy as np
from absl.testing import absltest, parameterized

from m2 import config, types
from m2.data import template
from m2.engine import engine as engine_lib
from m2.forge import serve
from m2.gateway import keys, replies
from m2.model import params as model_params
from tests.gateway import scripted
from tests.gateway.scripted import SECRET, sdk


class EngineTest(absltest.TestCase):
  """With the engine behind it, many at once."""

  def test_many_clients_get_what_each_would_alone(self):
    words = scripted.TOKENIZER
    cfg = config.ModelConfig(
      vocab=words.size, d_model=16, layers=1, heads=2, kv_heads=1,
      head_dim=8, rotary_dim=4, max_positions=128, experts=4, d_expert=8,
      top_k=2, min_k=2, dtype='float32',
    )  # fmt: skip
    params = model_params.init(cfg, jax.random.key(0))
    engine = engine_lib.Engine(cfg, config.EngineConfig(8, 128, 4), params)
    found = {}
    with (
      serve.driven(engine, lambda: None),
      scripted.served(engine, secret=SECRET, length=128) as (url, _, pool),
    ):

      def ask(index):
        client = sdk(url, keys.key(SECRET, f'e{index}'))
        messages = [{'role': 'user', 'content': f'table {index % 3}'}]
        answer = client.chat.completions.create(
          model='m2', messages=messages, seed=index % 3, max_tokens=20,
          stream=index % 2 == 1, logprobs=True,
          extra_body={'return_token_ids': True},
        )  # fmt: skip
        if index % 2:
          answer = list(answer)
          found[index] = [
            id for x in answer for c in x.choices
            for id in getattr(c, 'token_ids', ())
          ]  # fmt: skip
        else:
          found[index] = answer.choices[0].token_ids

      threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
      self.assertIsNone(engine.failed)
      self.assertFalse(engine.busy)
    self.assertLen(found, 24)
    for index in range(24):
      self.assertEqual(found[index], found[index % 3])
    self.assertLen(pool.completions, 24)
    for completion in pool.completions:
      index = int(completion.episode[1:])
      self.assertEqual(completion.ids.tolist(), found[index])
      (spec,) = (
        words.encode_rendered(
          template.render(
            [{'role': 'user', 'content': f'table {index % 3}'}],
            add_generation_prompt=True,
          )
        )[0],
      )
      np.testing.assert_array_equal(completion.prompt_ids, spec)

  def test_an_engine_that_fails_ends_the_server(self):
    class Failing:
      async def drive(self):
        raise ValueError('lost')

    failed = threading.Event()
    with serve.driven(Failing(), failed.set):
      self.assertTrue(failed.wait(10))


class ProtocolTest(absltest.TestCase):
  def test_connections_without_a_request_are_closed(self):
    with (
      mock.patch.object(serve, 'PATIENCE', 0.3),
      scripted.served(scripted.Scripted(), http=serve.Protocol) as (url, *_),
    ):
      host, port = url.removeprefix('http://').split(':')
      for said in (b'', b'POST /v1/messages HTTP/1.1\r\nHost: '):
        with socket.create_connection((host, int(port)), 10) as connection:
          connection.sendall(said)
          self.assertEqual(connection.recv(64), b'')
      with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n')
        self.assertIn(b'200 OK', connection.recv(4096))
        connection.sendall(b'G')  # and never the rest
        while connection.recv(4096):
          pass
      self.assertEqual(httpx2.get(url + '/health').status_code, 200)

  def test_what_is_not_read_is_dropped(self):
    long, held = scripted.Scripted('a' * 40_000, chunk=1000), []
    with (
      mock.patch.object(serve, 'PATIENCE', 0.3),
      mock.patch.object(replies, 'GRACE', 0.1),
      scripted.served(
        long, http=serve.Protocol, seconds=5.0, connections=held
      ) as (url, *_),
      socket.socket() as connection,
    ):
      host, port = url.removeprefix('http://').split(':')
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
      connection.connect((host, int(port)))
      body = json.dumps(scripted.ASK | {'stream': True, 'logprobs': True})
      connection.sendall(
        f'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n'
        f'Content-Length: {len(body)}\r\n\r\n{body}'.encode()
      )
      time.sleep(2)  # reads nothing, and is late after five seconds
      self.assertLen(held[0], 1)
      time.sleep(5)
      self.assertEmpty(held[0])


class KeptTest(absltest.TestCase):
  def test_episodes_of_every_start_are_kept_as_they_come(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'pool.db'
    ids = np.arange(3, dtype=np.int32)
    for start in range(2):
      with serve.kept(path) as pool:
        pool.put(
          types.Completion(
            'e', 0, ids, ids + start, np.float32(ids), 1, types.StopReason.EOS
          )
        )
        with sqlite3.connect(path) as connection:  # before the pool is closed
          query = 'SELECT episode, ids FROM completions ORDER BY episode'
          found = dict(connection.execute(query))
    self.assertEqual(found, {'e@0': ids.tobytes(), 'e@1': (ids + 1).tobytes()})


class SettingsTest(parameterized.TestCase):
  def test_secrets(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'short').write_text('abc\n')
    (folder / 'good').write_text(f'{SECRET}\n')
    self.assertEqual(serve.secret(''), '')
    self.assertEqual(serve.secret(str(folder / 'good')), SECRET)
    with self.assertRaisesRegex(ValueError, 'short has 3 characters'):
      serve.secret(str(folder / 'short'))
    with self.assertRaisesRegex(ValueError, 'absent: .*No such file'):
      serve.secret(str(folder / 'absent'))

  def test_ports(self):
    with serve.listen('127.0.0.1', 0) as listener:
      port = listener.getsockname()[1]
      with self.assertRaisesRegex(ValueError, f'{port}: Address already'):
        serve.listen('127.0.0.1', port)
    with self.assertRaisesRegex(ValueError, 'host=192.0.2.1'):
      serve.listen('192.0.2.1', 0)

  @parameterized.parameters(
    ({'host': '0.0.0.0'}, 'give serve.secret_file'),
    ({'port': 70_000}, 'serve.port=70000'),
    ({'name': ''}, 'serve.name is empty'),
    ({'seconds': 0.0}, 'serve.seconds=0.0'),
  )
  def test_settings_that_make_no_sense(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      config.check(config.ServeConfig(**change))


if __name__ == '__main__':
  absltest.main()
