"""The model's own output: what is read, what is refused, in any cutting."""

import random
import re
import time

from absl.testing import absltest, parameterized

from m2 import types
from m2.data import lexer, parser

TRIALS = 400
LINEAR = 4.0  # most that ten times the text may cost above ten times the time

TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': 'bash',
      'parameters': {
        'type': 'object',
        'properties': {
          'command': {'type': 'string'},
          'timeout': {'type': 'number'},
        },
        'required': ['command'],
      },
    },
  },
  {'type': 'function', 'function': {'name': 'finish'}},
]
CALL = (
  '<minimax:tool_call>\n<invoke name="bash">\n'
  '<parameter name="command">ls</parameter>\n</invoke>\n</minimax:tool_call>'
)
BASH = types.ToolCall('bash', {'command': 'ls'})
# Everything that means something, and near misses, for random texts.
PIECES = (
  '<think>', '</think>', '<minimax:tool_call>', '</minimax:tool_call>',
  '<invoke name="bash">', '<invoke name="finish">', '<invoke name="no">',
  '</invoke>', '<parameter name="command">', '<parameter name="timeout">',
  '</parameter>', '[e~[', '\n', '\n\n', ' ', 'word', '3', '<', '[e~', '</inv',
  '<invoke name="', '"', '>', '[e~[e~[', '<invoke name="a[e~[b">', 'é', 'null',
  '<invoke name="' + 'x' * 300 + '">',
)  # fmt: skip


def block(inside):
  return f'<minimax:tool_call>\n{inside}\n</minimax:tool_call>'


def invoke(inside, name='bash'):
  return f'<invoke name="{name}">\n{inside}</invoke>'


def parameter(value, name='command'):
  return f'<parameter name="{name}">{value}</parameter>\n'


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(
    ('Hello.', '', 'Hello.'),
    ('Hello.[e~[', '', 'Hello.'),
    ('Hello.[e~[\n', '', 'Hello.'),
    ('why\n</think>\n\nHello.[e~[', 'why', 'Hello.'),
    ('<think>\nwhy\n</think>\n\nHello.', 'why', 'Hello.'),
    ('<think>why</think>Hello.', 'why', 'Hello.'),
    ('\n</think>\n\nHello.', '', 'Hello.'),
    ('<think>\n\nwhy\n\n</think>\n\n\nHello.\n', '\nwhy\n', '\nHello.\n'),
    ('a <minimax:tool_call> b</think>c', 'a <minimax:tool_call> b', 'c'),
    (f'a {CALL} b</think>c', f'a {CALL} b', 'c'),
    ('', '', ''),
  )
  def test_reasoning_and_content(self, text, reasoning, content):
    self.assertEqual(
      parser.parse(text, TOOLS),
      types.Message('assistant', content, reasoning=reasoning),
    )

  def test_calls_after_reasoning_and_text(self):
    message = parser.parse(f'why\n</think>\n\nLook.\n{CALL}[e~[', TOOLS)
    self.assertEqual(
      message, types.Message('assistant', 'Look.', 'why', (BASH,))
    )

  def test_parallel_calls_and_blocks(self):
    one = invoke(parameter('ls'))
    expected = types.Message('assistant', tool_calls=(BASH, BASH))
    self.assertEqual(parser.parse(block(one + '\n' + one), TOOLS), expected)
    self.assertEqual(parser.parse(f'{CALL}\n{CALL}', TOOLS), expected)

  def test_values_are_raw_text(self):
    for value in ('a "b" <c> & é', 'x\ny', '<b></b> </think>', 'a [e~ b', ' '):
      message = parser.parse(block(invoke(parameter(value))), TOOLS)
      self.assertEqual(message.errors, ())
      self.assertEqual(message.tool_calls[0].arguments, {'command': value})

  def test_without_tools_nothing_is_checked(self):
    text = block(invoke(parameter('5', 'x') + parameter('null', 'y'), 'any'))
    call = types.ToolCall('any', {'x': '5', 'y': None})
    self.assertEqual(parser.parse(text, None).tool_calls, (call,))

  def test_no_tools_means_every_call_is_unknown(self):
    message = parser.parse(CALL, [])
    self.assertEqual(message.tool_calls, ())
    self.assertIn('unknown tool', message.errors[0])

  @parameterized.named_parameters(
    ('block', CALL.removesuffix('</minimax:tool_call>'), 'not closed'),
    ('invoke', CALL.replace('</invoke>\n', ''), 'not closed'),
    ('parameter', CALL.replace('</parameter>', ''), 'not closed'),
    ('cut_in_a_tag', CALL[:-5], 'stray text'),
    ('cut_in_a_value', CALL[:70], 'not closed'),
    ('no_invoke', CALL.replace('<invoke name="bash">\n', ''), 'not closed'),
    ('no_block', CALL.replace('<minimax:tool_call>\n', ''), 'outside a block'),
    ('bare_name', CALL.replace('"bash"', 'bash'), 'stray text'),
    ('empty', block(''), 'without a call'),
    ('nested', block(CALL), 'not closed'),
    ('nested_invoke', block(invoke(invoke(parameter('x')))), 'not closed'),
    (
      'swallowed',
      CALL.replace('ls</p', 'ls<parameter name="b">1</p'),
      'not cl',
    ),
    ('stray_in_block', CALL.replace('</invoke>', '</invoke> hm'), 'stray text'),
    ('stray_in_invoke', block(invoke('hm' + parameter('x'))), 'stray text'),
    ('value_ends_early', block(invoke(parameter('a</parameter>b'))), 'stray'),
    ('unknown_tool', block(invoke(parameter('x'), 'sh')), 'unknown tool'),
    ('missing', block(invoke(parameter('1', 'timeout'))), 'is missing'),
    ('twice', block(invoke(parameter('a') + parameter('b'))), 'given twice'),
    (
      'type',
      block(invoke(parameter('a') + parameter('soon', 'timeout'))),
      'expected number',
    ),
    ('end_inside', CALL.replace('ls', 'ls[e~['), 'not closed'),
  )
  def test_malformed_is_reported_and_never_guessed(self, text, error):
    message = parser.parse(text, TOOLS)
    self.assertIn(error, ' '.join(message.errors))
    self.assertEqual(message.tool_calls, ())

  @parameterized.parameters(
    (f'{CALL} and so', (BASH,), 'after the tool calls'),
    (f'{CALL}[e~[\n]~b]user\n', (BASH,), 'after [e~['),
    ('<think>\nwhy', (), 'reasoning is not closed'),
  )
  def test_what_follows_or_lacks_an_end(self, text, calls, error):
    message = parser.parse(text, TOOLS)
    self.assertEqual(message.tool_calls, calls)
    self.assertIn(error, message.errors[0])

  def test_a_bad_call_leaves_its_neighbours(self):
    text = block(invoke('', 'finish') + invoke(parameter('x'), 'no'))
    message = parser.parse(text, TOOLS)
    self.assertEqual(message.tool_calls, (types.ToolCall('finish', {}),))
    self.assertEqual(message.errors, ("call of 'no': unknown tool",))

  def test_undeclared_parameters_follow_the_schema(self):
    tool = {'name': 'f', 'parameters': {'type': 'object'}}
    text = block(invoke(parameter('1', 'x'), 'f'))
    self.assertEqual(parser.parse(text, [tool]).errors, ())
    tool['parameters']['additionalProperties'] = False
    self.assertIn('unknown', parser.parse(text, [tool]).errors[0])

  def test_thinking_says_that_the_prompt_opened_the_reasoning(self):
    cut = parser.parse('half a thou', TOOLS, thinking=True)
    self.assertEqual((cut.reasoning, cut.content), ('half a thou', ''))
    self.assertIn('not closed', cut.errors[0])
    for text in ('a <minimax:tool_call> b</think>c', '<think>\nw</think>c'):
      whole = parser.parse(text, TOOLS, thinking=True)
      self.assertEqual((whole.content, whole.errors), ('c', ()))


class StreamTest(parameterized.TestCase):
  @parameterized.product(thinking=(False, True), tools=(TOOLS, None))
  def test_any_cutting_gives_the_same(self, thinking, tools):
    rng = random.Random(0)
    malformed = 0
    for _ in range(TRIALS):
      text = ''.join(rng.choices(PIECES, k=rng.randrange(20)))
      if rng.random() < 0.5:
        text = f'why</think>{CALL}' + text
      whole = parser.StreamParser(tools, thinking=thinking)
      whole.feed(text)
      expected = whole.close()
      if thinking or '</think>' not in text:
        self.assertEqual(parser.parse(text, tools, thinking=thinking), expected)
      stream = parser.StreamParser(tools, thinking=thinking)
      events, at = [], 0
      while at < len(text):
        size = rng.choice((1, 1, 2, 7, 40))
        events += stream.feed(text[at : at + size])
        at += size
      events += stream.finish()
      self.assertEqual(stream.close(), expected, text)
      for kind in ('reasoning', 'content'):
        joined = ''.join(e.text for e in events if e.kind == kind)
        self.assertEqual(joined, getattr(expected, kind), text)
      calls = tuple(e.call for e in events if e.kind == 'tool_call')
      self.assertEqual(calls, expected.tool_calls, text)
      malformed += bool(expected.errors)
    self.assertBetween(malformed, 0.2 * TRIALS, 0.99 * TRIALS)

  def test_any_cutting_between_special_tokens_gives_the_same(self):
    rng = random.Random(2)
    calls = quoted = 0
    for _ in range(TRIALS):
      pieces = rng.choices(PIECES, k=rng.randrange(20))
      if rng.random() < 0.5:
        inside = invoke(parameter('ls'))
        call = ['<minimax:tool_call>', inside, '</minimax:tool_call>']
        pieces = ['why', '</think>', *call, *pieces]
      whole = parser.StreamParser(TOOLS, thinking=True, spelled=False)
      cut = parser.StreamParser(TOOLS, thinking=True, spelled=False)
      run = ''
      for piece in [*pieces, '[e~[']:
        if piece in lexer.SPECIAL and rng.random() < 0.7:
          whole.feed(run)
          whole.feed_special(piece)
          cut.feed_special(piece)
          run = ''
          continue
        run += piece
        for letter in piece:
          cut.feed(letter)
      whole.feed(run)
      message = whole.close()
      self.assertEqual(cut.close(), message, pieces)
      calls += len(message.tool_calls)
      quoted += '</think>' in message.reasoning
    self.assertGreater(quoted, TRIALS / 20)
    self.assertGreater(calls, TRIALS / 20)

  def test_only_a_special_token_is_a_special_tag(self):
    stream = parser.StreamParser(TOOLS, thinking=True, spelled=False)
    begin, end = '<minimax:tool_call>', '</minimax:tool_call>'
    stream.feed(f'a </think>{CALL} <invoke name="')
    stream.feed_special('</think>')
    stream.feed(f'\n\nb {end}[e~[')
    stream.feed_special(']~b]')
    stream.feed_special(begin)
    stream.feed(invoke(parameter(f'{end} <think>')))
    stream.feed_special(end)
    stream.feed_special('[e~[')
    message = stream.close()
    self.assertEqual(message.reasoning, f'a </think>{CALL} <invoke name="')
    self.assertEqual(message.content, f'b {end}[e~[]~b]')
    call = types.ToolCall('bash', {'command': f'{end} <think>'})
    self.assertEqual((message.tool_calls, message.errors), ((call,), ()))
    with self.assertRaisesRegex(ValueError, 'closed'):
      stream.feed_special('[e~[')

  def test_text_streams_as_it_comes_but_for_starts_of_tags(self):
    stream = parser.StreamParser(TOOLS, thinking=True)
    texts = [
      [event.text for event in stream.feed(piece)]
      for piece in ('wh', 'y <', 'b', '\n</thi', 'nk>\n', '\nHi', '\n', '!')
    ]
    self.assertEqual(
      texts, [['wh'], ['y '], ['<b'], [], [], ['Hi'], [], ['\n!']]
    )
    self.assertEqual(stream.close().content, 'Hi\n!')

  def test_a_closed_parser_refuses_more(self):
    stream = parser.StreamParser()
    stream.close()
    with self.assertRaisesRegex(ValueError, 'closed'):
      stream.feed('x')

  @parameterized.parameters(
    '<',
    '<invoke name="',
    '<parameter name="',
    '<think>a',
    '\n',
    f'{block(invoke(parameter("1")))} ',
    f'<minimax:tool_call>{invoke(parameter("1"), "no")}</minimax:tool_call>x',
    '<minimax:tool_call><invoke name="bash"><parameter name="command">',
    '[e~[x',
    '[e~',
  )
  def test_hostile_text_takes_linear_time(self, piece):
    def seconds(size):
      text = piece * (size // len(piece))
      start = time.process_time()
      stream = parser.StreamParser(TOOLS)
      for at in range(0, len(text), 3):
        stream.feed(text[at : at + 3])
      stream.close()
      parser.parse(text, TOOLS)
      return time.process_time() - start

    # In turns, so that a machine that slows down does so for both.
    growth = min(seconds(60_000) / max(seconds(6_000), 1e-3) for _ in range(3))
    self.assertLess(growth, 10 * LINEAR)


class ValuesTest(absltest.TestCase):
  def test_are_what_a_pattern_would_find(self):
    pattern = re.compile('<parameter name="[^>]*>.*?</parameter>', re.DOTALL)
    pieces = '<parameter name="', '<parameter name="a">', '>', '\n', 'x'
    rng = random.Random(0)
    for _ in range(2000):
      text = ''.join(rng.choices((*pieces, '</parameter>', '<'), k=8))
      self.assertEqual(parser._without_values(text), pattern.sub('', text))


class LexerTest(absltest.TestCase):
  def test_tokens_hold_all_the_text(self):
    rng = random.Random(1)
    for _ in range(TRIALS):
      text = ''.join(rng.choices(PIECES, k=rng.randrange(20)))
      lex, tokens = lexer.Lexer(), []
      for character in text:
        tokens += lex.feed(character)
      tokens += lex.finish()
      self.assertEqual(''.join(tag + run for tag, run in tokens), text)
      self.assertTrue(all(bool(tag) != bool(run) for tag, run in tokens))


if __name__ == '__main__':
  absltest.main()
