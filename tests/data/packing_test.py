"""Packing: every trained token once, no row overfull, resumable anywhere."""

import json

import grain
import numpy as np
from absl.testing import absltest, parameterized

from m2.data import packing

LENGTH = 32
PAD = 0
FILL = 0.93  # least share of slots used; items up to the row are hardest


def documents(count, longest, *, whole, seed=0):
  """Documents whose tokens are all different, from 1 up."""
  rng = np.random.default_rng(seed)
  result, next_token = [], 1
  for _ in range(count):
    size = int(rng.integers(1, longest + 1))
    tokens = np.arange(next_token, next_token + size, dtype=np.int32)
    next_token += size
    weights = np.ones(size, np.float32)
    result.append(packing.Document(tokens=tokens, weights=weights, whole=whole))
  return result


def rows(docs, *, window=4, seed=3):
  parent = grain.MapDataset.source(docs).to_iter_dataset()
  return packing.Rows(parent, length=LENGTH, rows=window, pad=PAD, seed=seed)


class RowsTest(parameterized.TestCase):
  def check_row(self, row):
    """What holds for every row, whatever is in it."""
    until, positions = row['until'], row['positions']
    at = 0
    while at < LENGTH and until[at]:
      end = until[at]
      np.testing.assert_array_equal(until[at:end], end)
      np.testing.assert_array_equal(positions[at:end], np.arange(end - at))
      np.testing.assert_array_equal(
        row['targets'][at : end - 1], row['tokens'][at + 1 : end]
      )
      self.assertEqual(row['weights'][end - 1], 0)
      self.assertEqual(row['targets'][end - 1], PAD)
      at = end
    for name, empty in (
      ('tokens', PAD),
      ('targets', PAD),
      ('weights', 0),
      ('positions', 0),
      ('until', 0),
    ):
      self.assertTrue((row[name][at:] == empty).all(), name)
    for name, dtype in (('weights', np.float32), ('until', np.int32)):
      self.assertEqual(row[name].dtype, dtype)
    return at

  @parameterized.parameters(8, 32, 200)
  def test_every_token_of_a_text_is_predicted_once(self, longest):
    docs = documents(200, longest, whole=False)
    targets, used, slots = [], 0, 0
    for row in rows(docs, window=64):
      used += self.check_row(row)
      slots += LENGTH
      targets += row['targets'][row['weights'] > 0].tolist()
    expected = [t for d in docs for t in d['tokens'][1:].tolist()]
    self.assertEqual(sorted(targets), expected)
    self.assertGreater(used / slots, FILL)

  def test_long_chats_lose_their_end_and_are_counted(self):
    docs = documents(100, 3 * LENGTH, whole=True)
    counts = np.zeros(4, np.int64)
    targets = []
    for row in rows(docs):
      self.check_row(row)
      counts += row['counts']
      targets += row['targets'][row['weights'] > 0].tolist()
    expected = [t for d in docs for t in d['tokens'][1:LENGTH].tolist()]
    self.assertEqual(sorted(targets), expected)
    sizes = [len(d['tokens']) for d in docs]
    total = dict(zip(packing.COUNTS, counts.tolist()))
    self.assertEqual(total['truncated'], sum(n > LENGTH for n in sizes))
    self.assertEqual(total['untrained'], sizes.count(1))
    self.assertEqual(total['documents'], len(sizes) - sizes.count(1))

  def test_what_trains_nothing_is_left_out_and_counted(self):
    docs = documents(20, LENGTH, whole=True)
    for doc in docs[:10]:
      doc['weights'][:] = 0
    docs[11]['weights'][1:] = 0  # the first token is predicted by none
    found = list(rows(docs))
    self.assertEqual(sum(row['counts'][3] for row in found), 11)
    kept = {t for row in found for t in row['tokens'].tolist()}
    self.assertTrue(kept.isdisjoint(docs[11]['tokens'].tolist()))

  def test_weights_belong_to_the_predicted_token(self):
    doc = packing.Document(
      tokens=np.int32([5, 6, 7]), weights=np.float32([9, 0.25, 1]), whole=True
    )
    row = next(iter(rows([doc])))
    np.testing.assert_array_equal(row['weights'][:4], [0.25, 1, 0, 0])
    np.testing.assert_array_equal(row['targets'][:4], [6, 7, PAD, PAD])

  def test_hopeless_data_is_an_error_and_not_an_endless_search(self):
    doc = documents(1, 4, whole=True)[0]
    doc['weights'][:] = 0
    parent = grain.MapDataset.source([doc]).repeat().to_iter_dataset()
    dataset = packing.Rows(parent, length=LENGTH, rows=4, pad=PAD, seed=0)
    with self.assertRaisesRegex(ValueError, 'no trained token within 32'):
      next(iter(dataset))

  def test_resumes_to_the_bit_at_every_row(self):
    docs = documents(120, 2 * LENGTH, whole=False)
    iterator = iter(rows(docs))
    states, found = [], []
    for row in iterator:
      found.append(row)
      states.append(json.loads(json.dumps(iterator.get_state())))
    self.assertLess(max(len(json.dumps(state)) for state in states), 200)
    for at in range(0, len(states), 7):
      again = iter(rows(docs))
      again.set_state(states[at])
      rest = list(again)
      self.assertLen(rest, len(found) - at - 1)
      for one, other in zip(found[at + 1 :], rest):
        for name in one:
          np.testing.assert_array_equal(one[name], other[name])

  def test_rows_come_in_a_seeded_order(self):
    docs = documents(100, LENGTH, whole=False)
    first, same, other = (
      [row['tokens'].tolist() for row in rows(docs, seed=seed)]
      for seed in (1, 1, 2)
    )
    self.assertEqual(first, same)
    self.assertNotEqual(first, other)
    self.assertCountEqual(first, other)


class BestFitTest(absltest.TestCase):
  def test_fills_bins_and_loses_nothing(self):
    rng = np.random.default_rng(0)
    for _ in range(50):
      lengths = rng.integers(1, LENGTH + 1, rng.integers(0, 80)).tolist()
      bins = packing.best_fit(lengths, LENGTH)
      self.assertCountEqual(sum(bins, []), range(len(lengths)))
      loads = [sum(lengths[i] for i in items) for items in bins]
      self.assertLessEqual(max(loads, default=0), LENGTH)
      # No two bins could be one: the bound that a careless packing misses.
      if len(loads) > 1:
        self.assertGreater(sum(sorted(loads)[:2]), LENGTH)

  def test_is_exact_where_pairs_fit(self):
    self.assertLen(packing.best_fit([10, 22, 30, 2, 16, 16], LENGTH), 3)


if __name__ == '__main__':
  absltest.main()
