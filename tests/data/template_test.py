"""The chat template against the published one, and the spans it trains."""

import json
import pathlib
import random

import numpy as np
from absl.testing import absltest, parameterized

from m2 import types
from m2.data import markup, template, tokenizer

VECTORS = pathlib.Path(__file__).parent / 'vectors'
TRIALS = 150
WORDS = (
  'select', ' name', '\n', '\n\n', '  ', 'é漢', '"q"', '<b>', "it's", ' 12345',
  '[e~[', ']~b]user\n', '<think>', '</invoke', '//\n', '\t', '{"a": 1}', 'null',
)  # fmt: skip
TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': 'sql',
      'parameters': {
        'type': 'object',
        'properties': {
          'query': {'type': 'string'},
          'limit': {'type': 'integer'},
          'rate': {'type': 'number'},
          'dry': {'type': 'boolean'},
          'names': {'type': 'array'},
          'options': {'type': 'object'},
        },
      },
    },
  }
]


def vectors(name):
  lines = (VECTORS / name).read_text(encoding='utf-8').splitlines()
  return [json.loads(line) for line in lines]


def small_tokenizer():
  texts = [v['text'] for v in vectors('chat_template.jsonl')]
  return tokenizer.train(texts, 400)


def words(rng, most=6):
  return ''.join(rng.choices(WORDS, k=rng.randrange(most)))


def arguments(rng):
  """Random arguments that the schema above types and no newline frames."""
  values = {
    'query': f'({words(rng)})',
    'limit': rng.randrange(-9, 10**12),
    'rate': rng.choice((0.5, -2.25, 3)),
    'dry': rng.random() < 0.5,
    'names': [words(rng), None, 1.5, {'k': ['é']}],
    'options': {'k': words(rng), 'n': None},
  }
  names = rng.sample(sorted(values), rng.randrange(7))
  nulls = {name for name in names if rng.random() < 0.1}
  return {name: None if name in nulls else values[name] for name in names}


def conversation(rng):
  """A random conversation whose assistant turns all have reasoning."""
  messages = [{'role': 'system', 'content': words(rng)}]
  for _ in range(rng.randrange(1, 4)):
    messages.append({'role': 'user', 'content': words(rng)})
    for _ in range(rng.randrange(1, 3)):
      calls = [
        types.ToolCall('sql', arguments(rng)) for _ in range(rng.randrange(3))
      ]
      turn = types.Message(
        'assistant', words(rng), f'.{words(rng)}', tuple(calls)
      )
      messages.append(turn.to_dict())
      messages += [{'role': 'tool', 'content': words(rng)} for _ in calls]
  return messages


class PublishedTest(parameterized.TestCase):
  @parameterized.parameters(*vectors('chat_template.jsonl'))
  def test_byte_equal(self, messages, tools, add_generation_prompt, text, name):
    rendered = template.render(
      messages, tools, add_generation_prompt=add_generation_prompt
    )
    self.assertEqual(rendered.text, text, name)

  def test_byte_equal_on_random_conversations(self):
    """Made once by the published template; null = it refuses the messages."""
    refused = 0
    for case in vectors('chat_template_random.jsonl'):
      text = case.pop('text')
      if text is None:
        refused += 1
        with self.assertRaises(ValueError):
          template.render(**case)
      else:
        self.assertEqual(template.render(**case).text, text)
    self.assertGreater(refused, 5)

  def test_keeps_all_reasoning_when_told(self):
    messages = [
      {'role': 'user', 'content': 'a'},
      {'role': 'assistant', 'content': 'b', 'reasoning_content': 'why'},
      {'role': 'user', 'content': 'c'},
    ]
    self.assertNotIn('why', template.render(messages).text)
    kept = template.render(messages, keep_all_reasoning=True).text
    self.assertIn(']~b]ai\n<think>\nwhy\n</think>\n\nb[e~[', kept)

  def test_takes_json_arguments_bare_tools_and_null_content(self):
    def turn(content, arguments):
      call = {'name': 'sql', 'arguments': arguments}
      return [{'role': 'assistant', 'content': content, 'tool_calls': [call]}]

    given = template.render(turn(None, '{"limit": 3}'), [TOOLS[0]['function']])
    self.assertEqual(given, template.render(turn('', {'limit': 3}), TOOLS))
    self.assertEqual(
      template.render(turn(None, '')), template.render(turn('', {}))
    )

  def test_a_tool_message_without_content_has_no_response(self):
    call = {'role': 'assistant', 'tool_calls': [{'name': 'f'}]}
    for message in ({}, {'content': None}, {'content': []}):
      text = template.render([call, {'role': 'tool', **message}]).text
      self.assertEndsWith(text, '[e~[\n]~b]tool[e~[\n')
    text = template.render([call, {'role': 'tool', 'content': ''}]).text
    self.assertEndsWith(text, ']~b]tool\n<response></response>[e~[\n')

  @parameterized.parameters(
    ([{'role': 'tool', 'content': 'x'}], 'without a call'),
    ([{'role': 'developer', 'content': 'x'}], "role 'developer'"),
    (['hello'], 'expected a mapping'),
    ([{'role': 'user', 'content': 3}], 'messages\\[0\\].*content is 3'),
    (
      [{'role': 'assistant', 'tool_calls': [{'name': 'f', 'arguments': '{'}]}],
      "arguments of 'f'",
    ),
    (
      [
        {'role': 'assistant', 'tool_calls': [{'name': 'f', 'arguments': '[1]'}]}
      ],
      'expected a mapping',
    ),
    ([{'role': 'assistant', 'tool_calls': [{'function': {}}]}], 'with a name'),
  )
  def test_names_what_is_malformed(self, messages, error):
    with self.assertRaisesRegex(ValueError, error):
      template.render(messages)


class RoundTripTest(absltest.TestCase):
  def test_parse_reads_what_render_wrote(self):
    """All but what no text can say: see the two rules tested below."""
    rng = random.Random(0)
    calls = 0
    for _ in range(TRIALS):
      messages = conversation(rng)
      turns = [m for m in messages if m['role'] == 'assistant']
      rendered = template.render(messages, TOOLS, keep_all_reasoning=True)
      self.assertLen(rendered.spans, len(turns))
      for turn, (start, end) in zip(turns, rendered.spans):
        if (
          any(
            markup.EOS in text
            for text in (str(turn.get('tool_calls')), turn['content'])
          )
          or markup.EOS in turn['reasoning_content']
        ):
          continue  # in a text this ends the message; among ids see below
        if turn['content'].startswith('\n'):
          continue  # its newlines are the template's
        text = rendered.text[start:end]
        message = template.parse(text, TOOLS, thinking=True)
        self.assertEqual(message.errors, (), text)
        self.assertEqual(message.to_dict(), turn)
        calls += len(message.tool_calls)
    self.assertGreater(calls, TRIALS // 4)

  def test_ids_say_what_no_text_can(self):
    """Special tokens that a turn only quotes come back as its text."""
    tok, rng = small_tokenizer(), random.Random(1)
    quoted = 0
    for _ in range(TRIALS // 4):
      messages = conversation(rng)
      turns = [m for m in messages if m['role'] == 'assistant']
      for turn in turns:
        turn['reasoning_content'] += rng.choice(markup.SPECIALS)
      rendered = template.render(messages, TOOLS, keep_all_reasoning=True)
      ids, weights = tok.encode_rendered(rendered)
      edges = np.flatnonzero(np.diff(weights, prepend=0, append=0))
      self.assertLen(edges, 2 * len(turns))
      for turn, (start, end) in zip(turns, edges.reshape(-1, 2)):
        if turn['content'].startswith('\n'):
          continue  # its newlines are the template's
        stream = template.StreamParser(TOOLS, thinking=True, spelled=False)
        for text, special in tok.pieces(ids[start:end]):
          (stream.feed_special if special else stream.feed)(text)
        message = stream.close()
        self.assertEqual((message.errors, message.to_dict()), ((), turn))
        quoted += markup.EOS in str(turn)
    self.assertGreater(quoted, 5)

  def test_what_a_value_cannot_say(self):
    """'null' is None, and one newline at each end is the markup's."""
    call = {'name': 'sql', 'arguments': {'query': 'Null', 'names': '\nx\n'}}
    rendered = template.render([{'role': 'assistant', 'tool_calls': [call]}])
    message = template.parse(rendered.text[slice(*rendered.spans[0])], None)
    self.assertEqual(
      message.tool_calls[0].arguments, {'query': None, 'names': 'x'}
    )

  def test_markup_in_a_value_is_reported(self):
    for value in (
      'a</parameter>b',
      'x</invoke>',
      '<parameter name="q">',
      'a</minimax:tool_call>',
    ):
      call = {'name': 'sql', 'arguments': {'query': value}}
      rendered = template.render([{'role': 'assistant', 'tool_calls': [call]}])
      message = template.parse(rendered.text[slice(*rendered.spans[0])], TOOLS)
      self.assertNotEmpty(message.errors, value)
      self.assertEqual(message.tool_calls, ())


class SpansTest(absltest.TestCase):
  def test_trained_tokens_are_what_sampling_gives(self):
    """Every turn's prompt is a prefix of the row, and training starts there."""
    tok = small_tokenizer()
    rng = random.Random(1)
    for _ in range(TRIALS):
      messages = conversation(rng)
      rendered = template.render(messages, TOOLS, keep_all_reasoning=True)
      ids, weights = (list(x) for x in tok.encode_rendered(rendered))
      expected = [0.0] * len(ids)
      spans = iter(rendered.spans)
      for index, message in enumerate(messages):
        if message['role'] != 'assistant':
          continue
        prompt, _ = tok.encode_rendered(
          template.render(
            messages[:index],
            TOOLS,
            add_generation_prompt=True,
            keep_all_reasoning=True,
          )
        )
        self.assertEqual(ids[: len(prompt)], list(prompt))
        end = ids.index(tok.eos_id, len(prompt)) + 1
        self.assertEqual(
          tok.decode(ids[len(prompt) : end]), rendered.text[slice(*next(spans))]
        )
        self.assertEqual(tok.decode(ids[end:])[:1], '\n')
        expected[len(prompt) : end] = [1.0] * (end - len(prompt))
      self.assertEqual(weights, expected)

  def test_a_turn_of_weight_0_is_shown_and_not_trained(self):
    tok = small_tokenizer()
    user = {'role': 'user', 'content': 'a'}
    turns = [{'role': 'assistant', 'content': text} for text in ('b', 'c')]
    muted = [user, turns[0] | {'weight': 0}, user, turns[1]]
    plain, shown = (
      template.render(messages)
      for messages in ([user, turns[0], user, turns[1]], muted)
    )
    self.assertEqual((shown.text, shown.spans), (plain.text, plain.spans))
    ids, weights = tok.encode_rendered(shown)
    self.assertEqual(tok.decode(ids[weights > 0]), 'c[e~[')
    with self.assertRaisesRegex(ValueError, 'weight=0.5'):
      template.render([user, turns[0] | {'weight': 0.5}])

  def test_a_turn_without_reasoning_is_trained_from_its_first_letter(self):
    rendered = template.render(
      [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    )
    self.assertEqual(rendered.text[slice(*rendered.spans[0])], 'b[e~[')

  def test_prompts_train_nothing(self):
    rendered = template.render(
      [{'role': 'user', 'content': 'a'}], TOOLS, add_generation_prompt=True
    )
    self.assertEqual(rendered.spans, ())
    self.assertTrue(
      rendered.text.endswith(f'{markup.ROLE}ai\n{markup.THINK}\n')
    )
    self.assertFalse(any(piece.trained for piece in rendered.pieces()))

  def test_nobody_can_write_a_special_token_into_a_conversation(self):
    tok = small_tokenizer()
    attack = ''.join(markup.SPECIALS)
    call = {'name': attack, 'arguments': {attack: attack}}
    for where in ('user', 'assistant', 'reasoning', 'tool', 'schema'):
      evil = {name: 'x' for name in ('user', 'assistant', 'reasoning', 'tool')}
      evil[where] = attack
      messages = [
        {'role': 'system', 'content': evil['user']},
        {'role': 'user', 'content': [{'type': 'text', 'text': evil['user']}]},
        {
          'role': 'assistant',
          'content': evil['assistant'],
          'reasoning_content': evil['reasoning'],
          'tool_calls': [call],
        },
        {'role': 'tool', 'content': evil['tool']},
      ]
      tools = [{'name': 'f', 'description': attack}]
      rendered = template.render(messages, tools)
      ids, _ = tok.encode_rendered(rendered)
      special = {tok.encode(token)[0]: token for token in markup.SPECIALS}
      found = [special[id] for id in ids.tolist() if id in special]
      marks = [rendered.text[a:b] for a, b in rendered.marks]
      self.assertEqual(found, marks)
      self.assertEqual(marks.count(markup.EOS), 4)
      self.assertEqual(tok.decode(ids), rendered.text)


if __name__ == '__main__':
  absltest.main()
