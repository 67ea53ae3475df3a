"""Cuts the model's output into tags and text, in pieces of any size.

Tags are recognised only whole. A suffix that may be the start of a tag is held
back until the next piece decides, so the tokens do not depend on the cutting
(but for where a run of text is cut). Time is linear in the text.
"""

import re
from collections.abc import Iterator

from m2.data import markup

# (tag, ''), ('', text), or END, which the lexer itself never gives.
Token = tuple[str, str]
END: Token = ('', '')

INVOKE = '<invoke name="'
PARAMETER = '<parameter name="'
_FIXED = (
  markup.THINK,
  markup.THINK_END,
  markup.CALLS,
  markup.CALLS_END,
  markup.INVOKE_END,
  markup.PARAMETER_END,
  markup.EOS,
)


def _starts(tag: str) -> str:
  """A pattern of every proper start of `tag`."""
  pattern = ''
  for letter in reversed(tag[1:-1]):
    pattern = f'(?:{re.escape(letter)}{pattern})?'
  return re.escape(tag[0]) + pattern


_WHOLE = '|'.join(
  [re.escape(tag) for tag in _FIXED]
  + [f'{tag}{markup.NAME}">' for tag in (INVOKE, PARAMETER)]
)
_START = '|'.join(
  [_starts(tag) for tag in (*_FIXED, INVOKE, PARAMETER)]
  + [f'{tag}(?:{markup.NAME})?"?' for tag in (INVOKE, PARAMETER)]
)
# The leftmost match wins, so a start that may yet become a tag goes before a
# whole tag inside its name.
_TAG = re.compile(f'(?P<whole>{_WHOLE})')
_TAG_OR_START = re.compile(f'(?P<whole>{_WHOLE})|(?:{_START})\\Z')


class Lexer:
  """Holds the text that is not yet decided."""

  def __init__(self):
    """Starts at the beginning of a message."""
    self._held = ''

  def feed(self, text: str) -> Iterator[Token]:
    """Yields the tokens that `text` completes."""
    return self._cut(self._held + text, _TAG_OR_START)

  def finish(self) -> Iterator[Token]:
    """Yields what was held back; the message has ended."""
    return self._cut(self._held, _TAG)

  def _cut(self, text: str, pattern: re.Pattern) -> Iterator[Token]:
    self._held = ''
    at = 0
    for match in pattern.finditer(text):
      if match.start() > at:
        yield '', text[at : match.start()]
      at = match.end()
      if match.lastgroup == 'whole':
        yield match[0], ''
      else:
        self._held = match[0]
    if at < len(text):
      yield '', text[at:]
