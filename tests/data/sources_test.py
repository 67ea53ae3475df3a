"""Sources: the same row at the same index, and errors that say where."""

import json
import pathlib
import pickle

import numpy as np
from absl.testing import absltest, parameterized
from array_record.python import array_record_module

from m2.data import sources


class SourcesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.create_tempdir())

  def write(self, name, data):
    path = self.dir / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path

  def records(self, name, records):
    path = self.dir / name
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
      writer.write(record)
    writer.close()
    return path

  def test_json_lines_over_files(self):
    self.write('b.jsonl', '{"text": "3"}')
    self.write('a.jsonl', '{"text": "1"}\r\n\n   \n{"text": "é2"}\n')
    source = sources.make('jsonl', str(self.dir / '*.jsonl'))
    self.assertEqual([row['text'] for row in source], ['1', 'é2', '3'])
    self.assertEndsWith(source.where(1), 'a.jsonl line 4')
    again = pickle.loads(pickle.dumps(source))
    self.assertEqual(again[2], {'text': '3'})

  @parameterized.parameters(
    (b'{"text": "b"', 'line 2.*delimiter'),
    (b'[1]', 'line 2.*expected an object, got list'),
    (b'{"text": "\xff"}', 'line 2.*utf-8'),
    (b'[' * 200_000, 'line 2.*recursion'),
  )
  def test_a_broken_line_is_named_and_costs_no_other(self, line, error):
    path = self.write('a.jsonl', b'{"text": "a"}\n' + line + b'\n{"text": "c"}')
    source = sources.make('jsonl', str(path))
    with self.assertRaisesRegex(ValueError, f'a.jsonl {error}'):
      source[1]
    self.assertEqual((source[0]['text'], source[2]['text']), ('a', 'c'))

  def test_lines_longer_than_what_is_read_at_once(self):
    texts = ['x' * (sources._SCAN + 5), 'y', 'z' * sources._SCAN]
    lines = '\n'.join(json.dumps({'text': text}) for text in texts)
    source = sources.make('jsonl', str(self.write('a.jsonl', lines)))
    self.assertEqual([row['text'] for row in source], texts)

  def test_blank_lines_of_any_length(self):
    blank = b' ' * 100 + b'\t\r\n' + b' ' * (2 * sources._SCAN) + b'\n'
    zero = b'\0' * 3 + b'\n'
    path = self.write('a.jsonl', blank + b'{"text": "a"}\n' + zero + blank)
    source = sources.make('jsonl', str(path))
    self.assertLen(source, 2)
    self.assertEqual(source[0]['text'], 'a')
    with self.assertRaisesRegex(ValueError, 'line 4'):
      source[1]  # zeros are no blanks: a file that was cut by a crash
    for end in range(-2, 3):  # a line that ends where a read does
      line = json.dumps({'text': 'x'}).ljust(sources._SCAN + end).encode()
      path = self.write('b.jsonl', line + b'\n{"text": "y"}\n')
      self.assertLen(sources.make('jsonl', str(path)), 2)

  def test_a_byte_order_mark_is_no_text(self):
    path = self.write('a.jsonl', b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}')
    self.assertEqual(sources.make('jsonl', str(path))[0]['text'], 'a')
    for start in (b'\xef\xbb\xbf\r\n', b'\xef\xbb\xbf \n\n', b'\xef\xbb\xbf'):
      path = self.write('b.jsonl', start + b'{"text": "a"}')
      source = sources.make('jsonl', str(path))
      self.assertLen(source, 1)
      self.assertEqual(source[0]['text'], 'a')
    path = self.write('c.jsonl', b'\xef\xbb\xbf')
    self.assertEmpty(sources.make('jsonl', str(path)))
    path = self.write('a.txt', b'\xef\xbb\xbfa')
    self.assertEqual(sources.make('files', str(path))[0]['text'], 'a')

  def test_a_name_that_looks_like_a_glob(self):
    path = self.write('a[1].jsonl', '{"text": "a"}')
    self.assertLen(sources.make('jsonl', str(path)), 1)

  def test_array_records(self):
    rows = [{'text': str(i)} for i in range(5)]
    path = self.records(
      'a.array_record', [json.dumps(r).encode() for r in rows]
    )
    self.records('b.array_record', [b'{"text": "5"}', b'broken'])
    source = sources.make('array_record', f'{path},{self.dir}/b*')
    self.assertLen(source, 7)
    self.assertEqual([source[i]['text'] for i in (4, 5, 0)], ['4', '5', '0'])
    with self.assertRaisesRegex(ValueError, 'record 6: '):
      source[6]
    self.assertEqual(pickle.loads(pickle.dumps(source))[3], rows[3])

  def test_a_cut_array_record_is_an_error(self):
    path = self.records('a.array_record', [b'{"text": "x"}'] * 100)
    path.write_bytes(path.read_bytes()[:-300])
    with self.assertRaisesRegex(ValueError, 'a.array_record'):
      sources.make('array_record', str(path))

  def test_files(self):
    self.write('b.txt', 'two')
    self.write('a.txt', 'one')
    bad = self.write('c.txt', b'\xff')
    source = sources.make('files', f'{self.dir}/*.txt')
    self.assertEqual([source[0]['text'], source[1]['text']], ['one', 'two'])
    with self.assertRaisesRegex(ValueError, str(bad)):
      source[2]

  def test_standard_library(self):
    source = sources.make('files', 'stdlib')
    places = [source.where(i) for i in range(len(source))]
    self.assertGreater(len(source), 300)
    self.assertEqual(places, sorted(places, key=pathlib.Path))
    self.assertIn('json/decoder.py', ' '.join(places))
    self.assertNotIn('site-packages', ' '.join(places))
    for index in range(0, len(source), 10):
      self.assertIsInstance(source[index]['text'], str)

  @parameterized.parameters(
    ('files', '{dir}/none*', 'matches no file'),
    ('files', '{dir}', 'a folder needs a glob'),
    ('files', ' , ', 'names no file'),
    ('csv', '{dir}', 'choose one of files, jsonl, array_record'),
  )
  def test_refuses(self, kind, path, error):
    with self.assertRaisesRegex(ValueError, error):
      sources.make(kind, path.format(dir=self.dir))

  def test_a_fingerprint_is_of_rows(self):
    odd = {'weights': np.ones(2), 'made': {1: object(), (2, 3): np.int8(4)}}
    rows = [{'text': f'row {i}', **odd} for i in range(300)]
    of = sources.fingerprint(sources.Memory(rows))
    self.assertStartsWith(of, '300 rows, like ')
    self.assertEqual(of, sources.fingerprint(sources.Memory(list(rows), 'x')))
    turned = [dict(reversed(row.items())) for row in rows]
    self.assertEqual(of, sources.fingerprint(sources.Memory(turned)))
    for changed in (rows[:-1], rows[1:], [*rows[:-1], {'text': 'row 2'}]):
      self.assertNotEqual(of, sources.fingerprint(sources.Memory(changed)))

  def test_a_broken_row_has_a_fingerprint_too(self):
    path = self.write('a.jsonl', '{"text": "a"}\nbroken\n{"text": "b"}\n')
    of = sources.fingerprint(sources.make('jsonl', str(path)))
    self.assertStartsWith(of, '3 rows, like ')
    path.write_text('{"text": "a"}\n{"text": "c"}\n{"text": "b"}\n')
    mended = sources.fingerprint(sources.make('jsonl', str(path)))
    self.assertNotEqual(of, mended)

  def test_memory(self):
    source = sources.Memory([{'text': 'a'}], 'demos')
    self.assertIsInstance(source, sources.Source)
    self.assertEqual((len(source), source[0]['text']), (1, 'a'))
    self.assertEqual(source.where(0), 'demos[0]')


if __name__ == '__main__':
  absltest.main()
