"""The ledger shows every kind of tampering, and survives being killed."""

import json
import multiprocessing
import pathlib

from absl.testing import absltest, parameterized

from m2.evolve import ledger


def fill(path: pathlib.Path, count: int = 4) -> list[bytes]:
  """A ledger with `count` entries; its lines."""
  with ledger.Ledger(path) as book:
    for number in range(count):
      book.append('note', {'number': number, 'text': 'grün'})
  return path.read_bytes().splitlines(keepends=True)


def _edit(lines, index, old, new):
  lines[index] = lines[index].replace(old, new)


TAMPERINGS = {
  'changed data': lambda lines: _edit(lines, 1, b'"number":1', b'"number":9'),
  'changed time': lambda lines: _edit(lines, 0, b'"time":"2', b'"time":"1'),
  'changed hash': lambda lines: _edit(lines, 2, b'"hash":"', b'"hash":"0'),
  'removed line': lambda lines: lines.pop(1),
  'removed first line': lambda lines: lines.pop(0),
  'swapped lines': lambda lines: lines.insert(1, lines.pop(2)),
  'repeated line': lambda lines: lines.insert(1, lines[0]),
  'blank line': lambda lines: lines.insert(1, b'\n'),
  'not json': lambda lines: lines.insert(2, b'hello\n'),
  'json of another kind': lambda lines: lines.insert(2, b'[1]\n'),
  'a number': lambda lines: lines.insert(2, b'5\n'),
  'null': lambda lines: lines.insert(2, b'null\n'),
  'a mixed list': lambda lines: lines.insert(2, b'[1,"a"]\n'),
  'deep nesting': lambda lines: lines.insert(2, b'[' * 100_000 + b'\n'),
  'spaces': lambda lines: _edit(lines, 1, b'":', b'": '),
  'hidden duplicate key': lambda lines: _edit(
    lines, 1, b'{"data"', b'{"data":{},"data"'
  ),
  'cut tail': lambda lines: lines.pop(),
  'cut two': lambda lines: [lines.pop(), lines.pop()],
  'emptied': lambda lines: lines.clear(),
}


class LedgerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path) / 'ledger.jsonl'

  def test_entries_chain_from_the_genesis(self):
    fill(self.path, 3)
    entries = ledger.read(self.path)
    self.assertEqual([entry.index for entry in entries], [0, 1, 2])
    self.assertEqual(entries[0].previous, ledger.GENESIS)
    self.assertEqual(entries[2].previous, entries[1].hash)
    self.assertEqual(entries[1].data, {'number': 1, 'text': 'grün'})

  def test_reopened_it_goes_on(self):
    fill(self.path, 2)
    with ledger.Ledger(self.path) as book:
      book.append('note', {'number': 2})
    self.assertLen(ledger.read(self.path), 3)

  @parameterized.named_parameters(TAMPERINGS.items())
  def test_tampering_is_found(self, tamper):
    lines = fill(self.path)
    tamper(lines)
    self.path.write_bytes(b''.join(lines))
    with self.assertRaises(ledger.LedgerError):
      ledger.read(self.path)
    with self.assertRaises(ledger.LedgerError):
      ledger.Ledger(self.path)

  def test_every_single_byte_is_covered(self):
    original = b''.join(fill(self.path, 2))
    for position in range(len(original)):
      changed = bytearray(original)
      changed[position] ^= 1
      self.path.write_bytes(changed)
      with self.assertRaises(ledger.LedgerError, msg=f'byte {position}'):
        ledger.read(self.path)

  def test_a_whole_rewritten_tail_is_found(self):
    """A forged chain of the right form still misses the acknowledged hash."""
    fill(self.path, 2)
    head = self.path.with_suffix('.head.json')
    acknowledged = head.read_bytes()
    self.path.unlink()
    head.unlink()
    with ledger.Ledger(self.path) as book:
      book.append('note', {'number': 0, 'text': 'grün'})
      book.append('note', {'number': 'forged'})
    head.write_bytes(acknowledged)
    with self.assertRaisesRegex(ledger.LedgerError, 'cut off or replaced'):
      ledger.read(self.path)

  @parameterized.parameters('ledger.jsonl', 'ledger.head.json')
  def test_a_missing_file_is_found(self, name):
    fill(self.path)
    (self.path.parent / name).unlink()
    with self.assertRaisesRegex(ledger.LedgerError, f'{name} is missing'):
      ledger.Ledger(self.path)

  @parameterized.parameters('[' * 100_000, '{"count": 1e999, "hash": ""}', '5')
  def test_a_damaged_head_is_found(self, text):
    fill(self.path)
    self.path.with_suffix('.head.json').write_text(text)
    with self.assertRaisesRegex(ledger.LedgerError, 'head.json is damaged'):
      ledger.read(self.path)

  def test_a_torn_last_line_is_detected_and_recorded(self):
    fill(self.path, 2)
    torn = b'{"data":{"number":2},"ha'
    with open(self.path, 'ab') as file:
      file.write(torn)
    with self.assertRaisesRegex(ledger.LedgerError, 'line 3 is torn'):
      ledger.read(self.path)
    with ledger.Ledger(self.path) as book:
      self.assertEqual(book.entries[-1].kind, 'recovered')
      self.assertEqual(book.entries[-1].data['bytes'], len(torn))
    self.assertLen(ledger.read(self.path), 3)
    kept = self.path.with_suffix('.torn').read_bytes()
    self.assertEqual(kept, torn + b'\n')

  def test_a_torn_line_does_not_excuse_a_cut_one(self):
    lines = fill(self.path)
    self.path.write_bytes(b''.join(lines[:2]) + lines[2][:20])
    with self.assertRaisesRegex(ledger.LedgerError, 'cut off'):
      ledger.Ledger(self.path)

  def test_killed_between_line_and_acknowledgement(self):
    fill(self.path, 1)
    head = self.path.with_suffix('.head.json').read_bytes()
    with ledger.Ledger(self.path) as book:
      book.append('note', {'number': 1})
    self.path.with_suffix('.head.json').write_bytes(head)
    with ledger.Ledger(self.path) as book:
      self.assertLen(book.entries, 2)
    known = json.loads(self.path.with_suffix('.head.json').read_text())
    self.assertEqual(known['count'], 2)

  def test_once_keeps_the_first_and_refuses_another(self):
    with ledger.Ledger(self.path) as book:
      first = book.once('test opened', {'seed': 1, 'tasks': {'n': (1, 2)}})
      again = book.once('test opened', {'seed': 1, 'tasks': {'n': [1, 2]}})
      self.assertEqual(first, again)
      with self.assertRaisesRegex(ledger.LedgerError, 'tasks.n'):
        book.once('test opened', {'seed': 1, 'tasks': {'n': [1, 3]}})
      self.assertLen(book.entries, 1)

  @parameterized.parameters(float('nan'), float('inf'), ({1, 2},), object())
  def test_data_that_is_not_json_is_refused(self, value):
    with ledger.Ledger(self.path) as book:
      with self.assertRaises((TypeError, ValueError)):
        book.append('note', {'value': value})
    self.assertEmpty(ledger.read(self.path))  # nor was any part of it written

  def test_one_writer_at_a_time(self):
    with ledger.Ledger(self.path):
      context = multiprocessing.get_context('spawn')
      with context.Pool(1) as pool:
        message = pool.apply(_open_elsewhere, (str(self.path),))
    self.assertIn('another process', message)
    ledger.Ledger(self.path).__exit__()


def _open_elsewhere(path: str) -> str:
  try:
    ledger.Ledger(pathlib.Path(path))
  except ledger.LedgerError as error:
    return str(error)
  return 'opened'


if __name__ == '__main__':
  absltest.main()
