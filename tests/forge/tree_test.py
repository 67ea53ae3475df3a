"""Prefix trees: structure, packing, refusals."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from m2 import types
from m2.forge import tree
from tests.forge import forest


def ancestors(batch, line, index):
  """Ids from the root to `index`, by parent links."""
  ids = []
  while True:
    ids.append(int(batch.tokens_BT[line, index]))
    parent = int(batch.parent_BT[line, index])
    if parent == index:
      return ids[::-1]
    index = parent


def visible(batch, line, index):
  """Ids that the model's mask shows to `index`, in order."""
  until_T = batch.until_BT[line]
  keys = [j for j in range(index + 1) if index < until_T[j]]
  return [int(batch.tokens_BT[line, j]) for j in keys], keys


def edges(batch):
  """Every trained pair: (context, token, log-prob, advantage, version)."""
  out = []
  tokens = batch.tokens_BT.shape[1]
  for at in range(len(batch.weight_Z)):
    if batch.weight_Z[at]:
      line, index = divmod(int(batch.edge_Z[at]), tokens)
      path = tuple(ancestors(batch, line, index))
      assert path[-1] == batch.token_Z[at]
      out.append(
        (
          path,
          float(batch.old_logp_Z[at]),
          float(batch.advantage_Z[at]),
          int(batch.version_Z[at]),
        )
      )
  return sorted(out)


class TreeTest(parameterized.TestCase):
  def test_figure_6(self):
    batch = tree.merge_prefixes(forest.figure_6(), tokens=32)
    used = int((batch.until_BT > 0).sum())
    self.assertEqual(used, 7 + 5 + 4 + 6)  # every segment once
    self.assertEqual(sorted(set(batch.count_BT[0, :used])), [1, 2, 3])
    self.assertEqual(int((batch.count_BT == 3).sum()), 7)  # C
    self.assertEqual(int((batch.count_BT == 2).sum()), 4)  # s2
    self.assertLen(edges(batch), 5 + 4 + 6)  # each sampled token once
    self.assertEqual(float(batch.total), 15)

  @parameterized.parameters(range(6))
  def test_trees_hold_exactly_the_rows(self, seed):
    rows = forest.rollouts(seed)
    merged = tree.merge_prefixes(rows, tokens=64)
    flat = tree.separate(rows, tokens=64)
    want = sorted(
      (
        tuple(r.ids[: r.start + i + 1].tolist()),
        float(r.old_logp[i]),
        float(np.float32(r.advantage)),
        0,
      )
      for r in rows
      for i in range(len(r.old_logp))
    )
    self.assertEqual(edges(merged), want)
    self.assertEqual(edges(flat), want)
    self.assertLess(
      (merged.until_BT > 0).sum(), 0.8 * (flat.until_BT > 0).sum()
    )
    total = sum(len(row.ids) for row in rows)
    for batch in (merged, flat):
      self.assertEqual(int(batch.count_BT.sum()), total)

  @parameterized.parameters(range(4))
  def test_the_mask_shows_the_prefix_and_positions_are_depths(self, seed):
    batch = tree.merge_prefixes(forest.rollouts(seed), tokens=48)
    for line in range(len(batch.tokens_BT)):
      for index in np.flatnonzero(batch.until_BT[line]):
        ids, keys = visible(batch, line, index)
        self.assertEqual(ids, ancestors(batch, line, index))
        self.assertEqual(
          batch.positions_BT[line, keys].tolist(), list(range(len(keys)))
        )
      pads = batch.until_BT[line] == 0
      self.assertFalse(batch.tokens_BT[line][pads].any())

  def test_siblings_are_different_nodes(self):
    batch = tree.merge_prefixes(forest.rollouts(1), tokens=96)
    for line in range(len(batch.tokens_BT)):
      real = np.flatnonzero(batch.until_BT[line])
      links = {
        (int(batch.parent_BT[line, i]), int(batch.tokens_BT[line, i]))
        for i in real
        if batch.parent_BT[line, i] != i
      }
      roots = [i for i in real if batch.parent_BT[line, i] == i]
      self.assertLen(links, len(real) - len(roots))

  def test_the_order_of_rows_does_not_matter(self):
    rows = forest.rollouts(2)
    one = tree.merge_prefixes(rows, tokens=64)
    two = tree.merge_prefixes(rows[::-1], tokens=64)
    np.testing.assert_array_equal(one.tokens_BT, two.tokens_BT)
    self.assertEqual(edges(one), edges(two))

  def test_equal_rows_share_everything_and_train_twice(self):
    first = forest.figure_6()[0]
    other = dataclasses.replace(first, advantage=-2.0)
    batch = tree.merge_prefixes([first, other], tokens=16)
    self.assertEqual(int((batch.until_BT > 0).sum()), len(first.ids))
    self.assertLen(edges(batch), 10)

  def test_versions_are_not_mixed(self):
    rows = forest.figure_6()
    rows[2] = dataclasses.replace(rows[2], version=3)
    batch = tree.merge_prefixes(rows, tokens=64)
    self.assertEqual(int((batch.until_BT > 0).sum()), 7 + 5 + 4 + 17)
    self.assertEqual({edge[3] for edge in edges(batch)}, {0, 3})

  def test_routes_are_part_of_the_identity(self):
    rows = forest.figure_6()
    plain = tree.merge_prefixes(rows, tokens=64)
    alike = forest.with_routes(rows, seed=3)
    same = [
      dataclasses.replace(r, experts=np.zeros_like(r.experts)) for r in alike
    ]
    batch = tree.merge_prefixes(same, tokens=64)
    # Only the end of s2 is split: sampled last in one row, fed in the other.
    self.assertEqual((batch.until_BT > 0).sum(), (plain.until_BT > 0).sum() + 1)
    different = [*same]
    routes = same[0].experts.copy()
    routes[2] = 1  # the third token of C takes another way in row 0
    different[0] = dataclasses.replace(same[0], experts=routes)
    split = tree.merge_prefixes(different, tokens=64)
    self.assertEqual((split.until_BT > 0).sum(), (batch.until_BT > 0).sum() + 5)
    # Routes lie where their tokens do: one token in all took experts 1.
    self.assertEqual(int((split.experts_LBTX[0] == 1).all(-1).sum()), 1)
    narrow = dataclasses.replace(same[0], experts=same[0].experts[..., :1])
    for pack in (tree.merge_prefixes, tree.separate):
      for mixed in ([rows[0], same[1]], [same[1], rows[0]]):
        with self.assertRaisesRegex(ValueError, 'some rows carry routes'):
          pack(mixed, tokens=64)
      with self.assertRaisesRegex(ValueError, 'routes of several shapes'):
        pack([narrow, same[1]], tokens=64)

  def test_padding_has_no_routes(self):
    rows = [
      dataclasses.replace(r, experts=np.ones_like(r.experts))
      for r in forest.with_routes(forest.figure_6(), seed=3)
    ]
    for pack in (tree.merge_prefixes, tree.separate):
      packed = pack(rows, tokens=32)
      lines = len(packed.tokens_BT)
      packed = tree.pad(packed, lines=lines + 2, samples=999)
      padding_BT = packed.until_BT == 0
      self.assertTrue(padding_BT.any())
      self.assertTrue((packed.experts_LBTX[:, padding_BT] == -1).all())
      self.assertTrue((packed.experts_LBTX[:, ~padding_BT] == 1).all())

  def test_capacities(self):
    rows = forest.rollouts(0)
    need = tree.merge_prefixes(rows, tokens=32)
    lines, samples = len(need.tokens_BT), len(need.token_Z)
    room = tree.merge_prefixes(
      rows, tokens=32, lines=lines + 2, samples=samples + 9
    )
    self.assertEqual(room.tokens_BT.shape, (lines + 2, 32))
    self.assertEqual(edges(room), edges(need))
    self.assertEqual(room.total, need.total)
    with self.assertRaisesRegex(ValueError, f'lines={lines}; .* {lines - 1}'):
      tree.merge_prefixes(rows, tokens=32, lines=lines - 1)
    with self.assertRaisesRegex(ValueError, f'samples={samples}; .* is 3'):
      tree.merge_prefixes(rows, tokens=32, samples=3)
    with self.assertRaisesRegex(ValueError, 'row of .* a line of 8'):
      tree.merge_prefixes(rows, tokens=8)
    for pack in (tree.merge_prefixes, tree.separate):
      with self.assertRaisesRegex(ValueError, 'no rows'):
        pack([], tokens=8)
      idle = [dataclasses.replace(row, weight=0.0) for row in rows]
      with self.assertRaisesRegex(ValueError, 'rows have weight 0: nothing'):
        pack(idle, tokens=32)
      one = pack([rows[0], *idle[1:]], tokens=32)
      self.assertEqual(one.total, len(rows[0].old_logp))

  @parameterized.parameters(
    ({'start': 0}, 'start=0'),
    ({'start': 3}, 'start=3'),
    ({'old_logp': np.zeros(3)}, '3 log-probs for 2 ids'),
    ({'old_logp': np.array([0, np.nan])}, 'finite'),
    ({'advantage': np.inf}, 'finite'),
    ({'weight': -0.5}, 'weight=-0.5 must not be negative'),
    ({'experts': np.zeros((3, 1, 1))}, 'routes of 3 tokens; 2 were fed'),
  )
  def test_bad_rows_are_refused(self, change, message):
    good = {
      'ids': np.array([1, 2, 3]),
      'start': 1,
      'old_logp': np.zeros(2),
      'advantage': 1.0,
    }
    tree.Row(**good)
    with self.assertRaisesRegex(ValueError, message):
      tree.Row(**(good | change))

  def test_rows_of_completions(self):
    completion = types.Completion(
      'e', 0, np.array([1, 2]), np.array([3]), np.array([-1.0]), 7,
      types.StopReason.EOS,
    )  # fmt: skip
    row = tree.row(completion, 0.5)
    np.testing.assert_array_equal(row.ids, [1, 2, 3])
    self.assertEqual((row.start, row.version, row.advantage), (2, 7, 0.5))
    with self.assertRaisesRegex(ValueError, 'step 0: router replay'):
      tree.row(completion, 0.5, replay=True)
    nothing = dataclasses.replace(
      completion, ids=np.zeros(0, int), logprobs=np.zeros(0)
    )
    self.assertIsNone(tree.row(nothing, 0.5))


if __name__ == '__main__':
  absltest.main()
