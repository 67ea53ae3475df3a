"""Drives a headless Chromium over its debugging pipe, standard library only.

The DevTools protocol speaks JSON messages ended by a zero byte on file
descriptors 3 (to the browser) and 4 (from it). No port is opened.
"""

import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

NAMES = (
  'chromium',
  'chromium-browser',
  'google-chrome',
  'google-chrome-stable',
)
FLAGS = (
  '--headless=new',
  '--remote-debugging-pipe',
  '--no-sandbox',  # the browser reads a page of ours, as root in CI
  '--disable-gpu',
  '--disable-dev-shm-usage',
  '--no-first-run',
  '--disable-background-networking',
  '--hide-scrollbars',
)


def find() -> str:
  """The browser on PATH. Raises FileNotFoundError that says what to install."""
  for name in NAMES:
    path = shutil.which(name)
    if path:
      return path
  raise FileNotFoundError(
    f'no browser on PATH (looked for {", ".join(NAMES)}); install one: '
    'apt install chromium'
  )


class Page:
  """One page of one browser; a context manager that ends the browser.

  Attributes:
    errors: uncaught exceptions and console errors, as text.
    requests: addresses that the page asked for.
  """

  def __init__(self, seconds: float = 30.0):
    self.errors: list[str] = []
    self.requests: list[str] = []
    self._seconds = seconds
    self._ids = itertools.count(1)
    self._buffer = b''
    self._loaded = False
    self._session = ''

  def __enter__(self) -> 'Page':
    self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    to_read, self._write = os.pipe()
    self._read, to_write = os.pipe()
    # The shell moves the two ends to the numbers that Chromium expects.
    script = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
    command = [find(), *FLAGS, f'--user-data-dir={self._profile.name}']
    self._browser = subprocess.Popen(
      ['bash', '-c', script, *command, 'about:blank'],
      pass_fds=(to_read, to_write),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    targets = self.call('Target.getTargets')['targetInfos']
    page = next(t for t in targets if t['type'] == 'page')['targetId']
    self._session = self.call(
      'Target.attachToTarget', targetId=page, flatten=True
    )['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')
    return self

  def __exit__(self, *_: object) -> None:
    os.close(self._write)
    os.close(self._read)
    self._browser.terminate()
    try:
      self._browser.wait(5)
    except subprocess.TimeoutExpired:
      self._browser.kill()
      self._browser.wait()
    self._profile.cleanup()

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """Sends one command and returns its result; events are taken in passing."""
    number = next(self._ids)
    message = {'id': number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    end = time.monotonic() + self._seconds
    while True:
      reply = self._next(end, method)
      if reply.get('id') == number:
        if 'error' in reply:
          raise RuntimeError(f'{method}: {reply["error"]["message"]}')
        return reply['result']

  def open(self, path: pathlib.Path) -> None:
    """Loads a file and waits until its scripts have run."""
    self._loaded = False
    self.call('Page.navigate', url=path.resolve().as_uri())
    end = time.monotonic() + self._seconds
    while not self._loaded:
      self._next(end, 'Page.loadEventFired')
    self.settle()

  def settle(self) -> None:
    """Waits for two frames, so that what a handler drew is in the page."""
    self.evaluate(
      'new Promise(r => requestAnimationFrame(() => requestAnimationFrame('
      '() => r(true))))'
    )

  def evaluate(self, script: str) -> Any:
    """The JSON value of a JavaScript expression; promises are awaited."""
    reply = self.call(
      'Runtime.evaluate',
      expression=script,
      returnByValue=True,
      awaitPromise=True,
    )
    if 'exceptionDetails' in reply:
      raise RuntimeError(f'{script}: {reply["exceptionDetails"]}')
    return reply['result'].get('value')

  def resize(self, width: int, height: int = 900) -> None:
    self.call(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )
    self.settle()

  def prefer(self, scheme: str) -> None:
    """Sets the colour scheme that the reader prefers: light or dark."""
    feature = {'name': 'prefers-color-scheme', 'value': scheme}
    self.call('Emulation.setEmulatedMedia', features=[feature])
    self.settle()

  def move(self, x: float, y: float) -> None:
    """Moves the pointer to a place in the window."""
    self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)
    self.settle()

  def _next(self, end: float, waiting_for: str) -> dict[str, Any]:
    while b'\0' not in self._buffer:
      left = end - time.monotonic()
      if left <= 0 or not select.select([self._read], [], [], left)[0]:
        raise TimeoutError(f'{waiting_for}: no answer in {self._seconds} s')
      chunk = os.read(self._read, 1 << 16)
      if not chunk:
        raise RuntimeError(f'{waiting_for}: the browser ended')
      self._buffer += chunk
    text, self._buffer = self._buffer.split(b'\0', 1)
    message = json.loads(text)
    self._note(message.get('method', ''), message.get('params', {}))
    return message

  def _note(self, event: str, params: dict[str, Any]) -> None:
    if event == 'Page.loadEventFired':
      self._loaded = True
    elif event == 'Runtime.exceptionThrown':
      self.errors.append(str(params['exceptionDetails']))
    elif event == 'Runtime.consoleAPICalled' and params['type'] == 'error':
      self.errors.append(str(params['args']))
    elif event == 'Log.entryAdded' and params['entry']['level'] == 'error':
      self.errors.append(params['entry']['text'])
    elif event == 'Network.requestWillBeSent':
      self.requests.append(params['request']['url'])
