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
# Tags that are one special token each; the others are text for any tokenizer.
SPECIAL = (
  markup.THINK,
  markup.THINK_END,
  markup.CALLS,
  markup.CALLS_END,
  markup.EOS,
)
_TEXT = (markup.INVOKE_END, markup.PARAMETER_END)


def _starts(tag: str) -> str:
  """A pattern of every proper start of `tag`."""
  pattern = ''
  for letter in reversed(tag[1:-1]):
    pattern = f'(?:{re.escape(letter)}{pattern})?'
  return re.escape(tag[0]) + pattern


def _patterns(fixed: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
  """A whole tag, and a whole tag or the start of one at the text's end."""
  whole = '|'.join(
    [re.escape(tag) for tag in fixed]
    + [f'{tag}{markup.NAME}">' for tag in (INVOKE, PARAMETER)]
  )
  start = '|'.join(
    [_starts(tag) for tag in (*fixed, INVOKE, PARAMETER)]
    + [f'{tag}(?:{markup.NAME})?"?' for tag in (INVOKE, PARAMETER)]
  )
  # The leftmost match wins, so a start that may yet become a tag goes before a
  # whole tag inside its name.
  return (
    re.compile(f'(?P<whole>{whole})'),
    re.compile(f'(?P<whole>{whole})|(?:{start})\\Z'),
  )


_SPELLED = _patterns((*SPECIAL, *_TEXT))
_PLAIN = _patterns(_TEXT)


class Lexer:
  """Holds the text that is not yet decided."""

  def __init__(self, spelled: bool = True):
    """Starts at the beginning of a message.

    Args:
      spelled: the text spells special tags; where False, what looks like one
        is text.
    """
    self._held = ''
    self._tag, self._tag_or_start = _SPELLED if spelled else _PLAIN

  def feed(self, text: str) -> Iterator[Token]:
    """Yields the tokens that `text` completes."""
    return self._cut(self._held + text, self._tag_or_start)

  def finish(self) -> Iterator[Token]:
    """Yields what was held back; the message or a run of it has ended."""
    return self._cut(self._held, self._tag)

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
