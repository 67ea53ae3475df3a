"""Rows to documents: what is trained, and which row is at fault."""

import numpy as np
from absl.testing import absltest, parameterized

from m2.data import documents, sources, tokenizer

TEXT = 'some text to learn from [e~['


def _call(calls):
  return {'messages': [{'role': 'assistant', 'tool_calls': calls}]}


class DocumentsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tok = tokenizer.train([TEXT], 280)

  def encode(self, row, keep=True):
    return documents.Documents(sources.Memory([row]), self.tok, keep)[0]

  def test_text_is_all_trained_and_ends(self):
    document = self.encode({'text': TEXT})
    self.assertEqual(document['tokens'][-1], self.tok.eos_id)
    self.assertEqual((document['tokens'] == self.tok.eos_id).sum(), 1)
    self.assertEqual(self.tok.decode(document['tokens'][:-1]), TEXT)
    self.assertTrue((document['weights'] == 1).all())
    self.assertFalse(document['whole'])

  def test_chats_train_on_spans_with_reasoning_as_configured(self):
    turn = {'role': 'assistant', 'content': 'b', 'reasoning_content': 'why'}
    user = {'role': 'user', 'content': 'a'}
    for keep in (True, False):
      document = self.encode({'messages': [user, turn, user, turn]}, keep)
      trained = document['tokens'][document['weights'] > 0]
      first = 'why\n</think>\n\nb[e~[' if keep else 'b[e~['
      self.assertEqual(
        self.tok.decode(trained), first + 'why\n</think>\n\nb[e~['
      )
      self.assertTrue(document['whole'])

  def test_ready_tokens(self):
    document = self.encode({'tokens': [1, 2], 'weights': [0, 0.5]})
    np.testing.assert_array_equal(document['tokens'], np.int32([1, 2]))
    np.testing.assert_array_equal(document['weights'], np.float32([0, 0.5]))
    self.assertTrue(document['whole'])
    self.assertFalse(self.encode({'tokens': [1, 2]})['whole'])
    self.assertEqual(document['tokens'].dtype, np.int32)

  def test_null_counts_as_absent(self):
    messages = [{'role': 'assistant', 'content': 'a', 'weight': None}]
    rows = (
      {'messages': messages, 'tools': None},
      {'text': TEXT},
      {'tokens': [1, 2]},
    )
    empty = dict.fromkeys(('text', 'messages', 'tools', 'tokens', 'weights'))
    for row in rows:
      document, filled = self.encode(row), self.encode({**empty, **row})
      self.assertEqual(document['whole'], filled['whole'])
      for key in ('tokens', 'weights'):
        np.testing.assert_array_equal(document[key], filled[key])
    self.assertIn(1, self.encode(rows[0])['weights'])

  @parameterized.parameters(
    ({'texts': 'x'}, 'exactly one of text, messages and tokens'),
    ({'text': 'x', 'tokens': [1]}, 'exactly one of'),
    ({'text': None}, 'exactly one of text, messages and tokens'),
    ({'text': 3, 'tokens': None}, 'text is 3'),
    ({'text': '\ud800'}, 'UTF-8'),
    ({'messages': 'hello'}, "messages is 'hello'"),
    ({'messages': [], 'tools': {}}, 'tools is {}'),
    ({'messages': [{'role': 'tool'}]}, 'without a call'),
    ({'tokens': [1, 2], 'weights': [1]}, 'tokens must be'),
    ({'tokens': [1, 10**6]}, r'ids in \[0, 280\)'),
    ({'tokens': [-1]}, 'tokens must be'),
    ({'tokens': []}, 'one or more ids'),
    ({'tokens': ['a']}, 'tokens must be'),
    ({'tokens': [1.5]}, 'tokens must be'),
    ({'tokens': [1], 'weights': [float('nan')]}, 'finite'),
    ({'tokens': [1], 'weights': [1e300]}, 'finite'),
    ({'tokens': [1, 2], 'weights': [1, -1]}, 'none below 0'),
    (_call(3), r'messages\[0\].*tool_calls=3: expected a list'),
    (_call({'name': 'f'}), 'expected a list'),
    ({'tokens': 3}, 'tokens must be'),
  )
  def test_a_broken_row_is_named(self, row, error):
    with self.assertRaisesRegex(ValueError, rf'^rows\[0\]: .*{error}'):
      self.encode(row)

  def test_plain_text_has_no_special_tokens(self):
    texts = documents.plain(
      {'messages': [{'role': 'user', 'content': 'a'}]}, 'r'
    )
    self.assertEqual(''.join(texts).count('[e~['), 0)
    self.assertIn('user\na', texts)
    with self.assertRaisesRegex(ValueError, 'r: ready tokens'):
      documents.plain({'tokens': [1]}, 'r')
    with self.assertRaisesRegex(ValueError, r'^r: .*surrogates'):
      documents.plain({'text': 'a\ud800'}, 'r')


if __name__ == '__main__':
  absltest.main()
