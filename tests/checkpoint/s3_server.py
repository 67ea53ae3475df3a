"""A server that speaks as much of S3's protocol as TensorStore asks for."""

import contextlib
import http.server
import re
import threading
import urllib.parse
from collections.abc import Iterator


class Server(http.server.ThreadingHTTPServer):
  """Objects in memory.

  Attributes:
    objects: bytes by '/bucket/key'.
    ranges: (key, first byte, last byte) of every partial read.
    whole: keys that were read whole.
    refuse: status and S3 error code to answer with, by method; once each.
    always: the same, for every request.
    cut: bytes that are left out at the end of every partial answer.
  """

  daemon_threads = True

  def __init__(self):
    """Listens on a free port of this machine."""
    super().__init__(('127.0.0.1', 0), _Handler)
    self.objects: dict[str, bytes] = {}
    self.ranges: list[tuple[str, int, int]] = []
    self.whole: list[str] = []
    self.refuse: list[tuple[int, str]] = []
    self.always: tuple[int, str] | None = None
    self.cut = 0


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  server: Server

  def log_message(self, *_) -> None:
    """Says nothing."""

  def _key(self) -> str:
    return urllib.parse.unquote(urllib.parse.urlparse(self.path).path)

  def _answer(self, status: int, body: bytes = b'', **headers: str) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def _refused(self) -> bool:
    server = self.server
    refusal = server.refuse.pop() if server.refuse else server.always
    if refusal:
      status, code = refusal
      self._answer(status, f'<Error><Code>{code}</Code></Error>'.encode())
    return bool(refusal)

  def do_GET(self) -> None:
    """An object or a part of it."""
    server, key = self.server, self._key()
    if self._refused():
      return
    if key not in server.objects:
      self._answer(404, b'<Error><Code>NoSuchKey</Code></Error>')
      return
    data = server.objects[key]
    wanted = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range') or '')
    if not wanted:
      if self.command == 'GET':
        server.whole.append(key)
      self._answer(200, data, ETag='"1"')
      return
    first, last = map(int, wanted.groups())
    if first >= len(data):
      self._answer(416, Content_Range=f'bytes */{len(data)}')
      return
    server.ranges.append((key, first, last))
    part = data[first : last + 1][: last + 1 - first - server.cut]
    span = f'bytes {first}-{first + len(part) - 1}/{len(data)}'
    self._answer(206, part, ETag='"1"', Content_Range=span)

  do_HEAD = do_GET

  def do_PUT(self) -> None:
    """Stores an object."""
    data = self.rfile.read(int(self.headers['Content-Length']))
    if not self._refused():
      self.server.objects[self._key()] = data
      self._answer(200, ETag='"1"')

  def do_DELETE(self) -> None:
    """Forgets an object."""
    self.server.objects.pop(self._key(), None)
    self._answer(204)


@contextlib.contextmanager
def running() -> Iterator[Server]:
  """A server that answers until the end of the block."""
  server = Server()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
