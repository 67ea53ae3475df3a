"""What the HTTP gateway refuses, and that nothing of it harms others."""

import concurrent.futures
import json
import random
import socket
import threading
import time
from unittest import mock

import httpx2
import numpy as np
import openai
from absl.testing import absltest, parameterized

from m2.gateway import keys
from tests import clock
from tests.gateway import scripted
from tests.gateway.scripted import (
  ASK,
  CHAT,
  MESSAGES,
  SECRET,
  TALK,
  post,
  sdk,
)

TOOL = scripted.TOOLS[0]


class RefusedTest(parameterized.TestCase):
  """Errors have the form of the API, name the value, and harm nobody."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.engine = scripted.Scripted(*[TALK] * 2000)
    cls.url, cls.gateway, _ = cls.enterClassContext(scripted.served(cls.engine))

  @parameterized.parameters(
    ({'temperature': 3}, 'temperature'),
    ({'temperature': 'hot'}, 'temperature: expected a whole number or a'),
    ({'temperature': True}, 'temperature'),
    ({'top_p': 0}, 'top_p'),
    ({'n': 0}, 'n: 0'),
    ({'n': 10**9}, 'n: 10'),
    ({'max_tokens': 0}, 'max_tokens'),
    ({'stop': ['']}, 'stop'),
    ({'stop': ['x'] * 99}, 'stop'),
    ({'logit_bias': {'5': 1}}, 'logit_bias'),
    ({'response_format': {'type': 'json_object'}}, 'response_format'),
    ({'tool_choice': 'required'}, 'tool_choice'),
    ({'frequency_penalty': 0.5}, 'frequency_penalty'),
    ({'top_logprobs': 5, 'logprobs': True}, 'top_logprobs'),
    ({'unheard_of': 1}, 'unheard_of'),
    ({'stream': 'yes'}, 'stream'),
    ({'seed': 2**70}, 'seed'),
    ({'messages': []}, 'messages'),
    ({'messages': ['hello']}, r'messages\[0\]'),
    ({'messages': [{'role': 'judge', 'content': 'x'}]}, 'judge'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]},
     'image_url'),
    ({'messages': [{'role': 'tool', 'tool_call_id': 'x', 'content': 'y'}]},
     r"messages\[0\]: no call before it has the id 'x'"),
    ({'messages': [*ASK['messages'], {'role': 'system', 'content': 'x'}]},
     r'messages\[1\].role: the model has room for one system message'),
    ({'messages': [{'role': 'assistant', 'tool_calls': [
      {'id': id, 'type': 'function', 'function': {'name': 'f'}}
      for id in 'ab']},
      {'role': 'tool', 'tool_call_id': 'b', 'content': 'y'}]},
     r"messages\[1\]: the call 'a' has no result"),
    ({'messages': [{'role': 'assistant', 'function_call': {'name': 'f'}}]},
     r'messages\[0\].function_call'),
    ({'messages': [{'role': 'assistant', 'tool_calls': [
      {'id': 'a', 'function': {'name': 'f', 'arguments': '{'}}]}]},
     r'messages\[0\].tool_calls\[0\].function.arguments: no JSON'),
    ({'tool_choice': 'none', 'tools': [TOOL]}, 'none without tools'),
    ({'\ud800': 1}, r'\\ud800'),
    ({'tools': [{'type': 'function', 'function': {
      'name': '\ud800', 'parameters': [1]}}]}, 'parameters'),
    ({'messages': [{'role': 'user', 'content': '\ud800'}]}, 'UTF-8'),
    ({'tools': [{'type': 'function'}]}, 'name'),
    ({'tools': [{'type': 'function', 'function': {
      'name': 'f', 'parameters': [1]}}]}, 'parameters'),
  )  # fmt: skip
  def test_what_makes_no_sense(self, change, message):
    got = post(self.url + CHAT, ASK | change)
    self.assertEqual(got.status_code, 400, got.text)
    self.assertRegex(got.json()['error']['message'], message)
    self.assertEqual(got.json()['error']['type'], 'invalid_request_error')
    self.assertEqual(post(self.url + CHAT, ASK).status_code, 200)

  @parameterized.parameters(
    ({'max_tokens': None}, 'max_tokens: is missing'),
    ({'thinking': {'type': 'disabled'}}, 'thinking'),
    ({'tool_choice': {'type': 'any'}}, 'tool_choice'),
    ({'messages': [*ASK['messages'], {'role': 'assistant', 'content': 'x'}]},
     'not continued'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image'}]}]},
     'image'),
  )  # fmt: skip
  def test_what_makes_no_sense_to_anthropic(self, change, message):
    got = post(self.url + MESSAGES, ASK | {'max_tokens': 9} | change)
    self.assertEqual(got.status_code, 400)
    self.assertEqual(got.json()['type'], 'error')
    self.assertEqual(got.json()['error']['type'], 'invalid_request_error')
    self.assertRegex(got.json()['error']['message'], message)

  @parameterized.parameters(
    b'', b'{', b'[]', b'null', b'{"a": 1, "a": 2}', b'\xff\xfe',
    b'{"model": NaN}', b'9' * 9999, b'[' * 100_000, b'{"a":' * 50_000,
  )  # fmt: skip
  def test_bodies_that_are_no_request(self, body):
    for path in (CHAT, MESSAGES):
      got = httpx2.post(self.url + path, content=body)
      self.assertEqual(got.status_code, 400, got.text)

  def test_random_changes_of_a_request_never_break_the_server(self):
    rng = random.Random(0)
    junk = [
      None, True, -1, 0, 2**63, 1e308, '', 'x', '\ud800', '</think>', [], [[]],
      {}, {'type': 'text'}, {'type': 'text', 'text': 1}, ['a', None],
    ]  # fmt: skip
    whole = ASK | {
      'tools': [TOOL], 'stop': ['a'], 'n': 1, 'max_tokens': 9,
      'messages': [
        {'role': 'system', 'content': 'be brief'},
        {'role': 'user', 'content': [{'type': 'text', 'text': 'hello'}]},
        {'role': 'assistant', 'content': 'x', 'tool_calls': [
          {'id': 'c', 'type': 'function',
           'function': {'name': 'sql', 'arguments': '{"script": "a"}'}}]},
        {'role': 'tool', 'tool_call_id': 'c', 'content': 'ok'},
      ],
    }  # fmt: skip

    def places(node):
      """Every (container, key) of a tree."""
      items = node.items() if isinstance(node, dict) else enumerate(node)
      for name, value in list(items):
        yield node, name
        if isinstance(value, dict | list):
          yield from places(value)

    with httpx2.Client() as session:
      for _ in range(300):
        tree = json.loads(json.dumps(whole))
        for _ in range(rng.choice((1, 1, 2, 3))):
          node, name = rng.choice(list(places(tree)))
          node[name] = rng.choice(junk)
        got = session.post(
          self.url + rng.choice((CHAT, MESSAGES)), content=json.dumps(tree)
        )
        self.assertIn(got.status_code, (200, 400, 404), (tree, got.text))
        self.assertIsInstance(got.json(), dict)

  def test_limits(self):
    with scripted.served(scripted.Scripted(), size=1000) as (url, *_):
      got = post(url + MESSAGES, ASK | {'user': 'x' * 2000})
      self.assertEqual(got.status_code, 413)
      self.assertEqual(got.json()['error']['type'], 'request_too_large')
    with self.assertRaisesRegex(openai.NotFoundError, "'gpt'"):
      sdk(self.url).chat.completions.create(**ASK | {'model': 'gpt'})
    with self.assertRaises(openai.NotFoundError):
      sdk(self.url).models.retrieve('gpt')
    self.assertEqual([m.id for m in sdk(self.url).models.list()], ['m2'])
    with scripted.served(scripted.Scripted(TALK, room=3)) as (url, *_):
      with self.assertRaisesRegex(openai.BadRequestError, 'leaves no room'):
        sdk(url).chat.completions.create(**ASK, stream=True)

  @parameterized.parameters(False, True)
  def test_too_long_and_too_many(self, stream):
    slow = scripted.Scripted(*[TALK * 20] * 3, pause=0.05, chunk=1)
    limits = {'requests': 1, 'seconds': 1.0}
    with scripted.served(slow, **limits) as (url, *_):
      failed = []

      def ask():
        try:
          found = sdk(url).chat.completions.create(**ASK, stream=stream)
          list(found)
        except openai.APIError as error:
          failed.append(error)

      first = threading.Thread(target=ask)
      first.start()
      while not slow.requests:
        time.sleep(0.01)
      with self.assertRaises(openai.RateLimitError):
        sdk(url).chat.completions.create(**ASK)
      first.join()
      self.assertIn('no end after 1 seconds', str(failed[0]))
      self.assertLen(slow.requests, 1)
      _wait(lambda: slow.cancelled)
      metrics = httpx2.get(url + '/metrics').text
      self.assertIn('m2_requests_running 0', metrics)
      self.assertIn(f'path="{CHAT}",status="429"}} 1', metrics)

  def test_keys_of_no_episode(self):
    engine = scripted.Scripted()
    wrong = 'x', 'e', 'e.', 'e.00', '.', 'ü.x', 'f.' + '0' * 64
    with scripted.served(engine, secret=SECRET) as (url, *_):
      for key in map(str.encode, wrong):
        for headers in (
          {'x-api-key': key},
          {'Authorization': b'Bearer ' + key},
          {},
        ):
          got = post(url + MESSAGES, ASK, headers=headers)
          self.assertEqual(got.status_code, 401)
          self.assertEqual(got.json()['error']['type'], 'authentication_error')
      other = keys.key('another secret, just as long', 'e')
      with self.assertRaises(openai.AuthenticationError):
        sdk(url, other).chat.completions.create(**ASK)
    self.assertEmpty(engine.requests)

  def test_anybody_is_nobody_afterwards(self):
    sdk(self.url).chat.completions.create(**ASK)
    self.assertEqual(self.gateway.forget('any').completions, 0)
    self.assertEmpty(self.gateway._conversations)

  @parameterized.parameters(False, True)
  def test_who_leaves_ends_the_sampling(self, stream):
    slow = scripted.Scripted(TALK * 99, TALK, pause=0.02, chunk=1)
    with scripted.served(slow, secret=SECRET) as (url, gateway, pool):
      host, port = url.removeprefix('http://').split(':')
      body = json.dumps(ASK | {'stream': stream}).encode()
      head = (
        f'POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n'
        f'Authorization: Bearer {keys.key(SECRET, "e")}\r\n\r\n'
      )
      with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        _wait(lambda: slow.requests)
        if stream:
          connection.recv(64)
      _wait(lambda: slow.cancelled)
      self.assertEmpty(pool.completions)
      _wait(lambda: 'running 0' in httpx2.get(url + '/metrics').text)
      left = f'path="{CHAT}",status="{200 if stream else 499}"}} 1'
      self.assertIn(left, httpx2.get(url + '/metrics').text)

  def test_who_leaves_a_stream_before_it_begins(self):
    slow = scripted.Scripted(TALK, pause=3.0)
    with scripted.served(slow) as (url, *_):
      with self.assertRaises(httpx2.ReadTimeout):
        post(url + CHAT, ASK | {'stream': True}, timeout=0.5)
      _wait(lambda: 'status="499"} 1' in httpx2.get(url + '/metrics').text, 1.5)
      self.assertIn('running 0', httpx2.get(url + '/metrics').text)

  def test_a_request_of_many_results_is_read_at_once(self):
    calls = [
      {'id': f'c{i}', 'type': 'function', 'function': {'name': 'f'}}
      for i in range(20_000)
    ]
    results = [
      {'role': 'tool', 'tool_call_id': call['id'], 'content': 'x'}
      for call in calls
    ]
    said = {'role': 'assistant', 'tool_calls': calls}
    tree = ASK | {'messages': [*ASK['messages'], said, *results], 'n': 0}
    start = time.process_time()
    got = post(self.url + CHAT, tree, timeout=60)
    self.assertIn('n: 0', got.json()['error']['message'])
    self.assertLess(time.process_time() - start, 2 * clock.slow())

  def test_paths_and_methods_that_are_none(self):
    for got, status in (
      (httpx2.get(self.url + '/v1/nothing'), 404),
      (httpx2.get(self.url + CHAT), 405),
      (httpx2.get(self.url + MESSAGES), 405),
    ):
      self.assertEqual(got.status_code, status)
      self.assertIn('message', got.json()['error'])

  def test_an_engine_that_fails_meanwhile(self):
    for error in (ValueError('lost'), TypeError('lost')):
      engine = scripted.Scripted()
      future = concurrent.futures.Future()
      future.set_exception(error)
      engine.submit, engine.failed = mock.Mock(return_value=future), error
      with scripted.served(engine) as (url, *_):
        got = post(url + CHAT, ASK)
      self.assertEqual(got.status_code, 503)
      self.assertIn('has failed: lost', got.json()['error']['message'])

  def test_log_probabilities_that_are_no_numbers(self):
    engine = scripted.Scripted(TALK)
    with scripted.served(engine) as (url, *_):
      with mock.patch.object(np, 'linspace', lambda *_: np.array([np.nan])):
        got = post(url + CHAT, ASK | {'logprobs': True})
    self.assertEqual(got.status_code, 500)
    self.assertIn('no JSON', got.json()['error']['message'])

  def test_who_leaves_in_the_middle_of_a_request(self):
    host, port = self.url.removeprefix('http://').split(':')
    head = f'POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n'
    with socket.create_connection((host, int(port))) as connection:
      connection.sendall(head.encode() + b'{"model"')
      time.sleep(0.1)
    _wait(lambda: 'status="499"} 1\n' in httpx2.get(self.url + '/metrics').text)

  def test_a_failed_engine(self):
    engine = scripted.Scripted()
    engine.failed = ValueError('lost')
    engine.submit = mock.Mock(side_effect=RuntimeError('it has failed'))
    with scripted.served(engine) as (url, *_):
      self.assertEqual(httpx2.get(url + '/health').status_code, 503)
      with self.assertRaisesRegex(openai.InternalServerError, 'has failed'):
        sdk(url).chat.completions.create(**ASK)
      got = post(url + MESSAGES, ASK | {'max_tokens': 9})
      self.assertEqual(got.json()['error']['type'], 'overloaded_error')


def _wait(condition, seconds=10):
  """Until it holds; fails after so many seconds."""
  end = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > end:
      raise AssertionError('it never came')
    time.sleep(0.02)


if __name__ == '__main__':
  absltest.main()
