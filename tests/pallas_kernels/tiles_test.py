"""Tiles: what is checked in is sound, found, and picked by time."""

import dataclasses
import json
import time
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest

from pallas_kernels import tiles


class TilesTest(absltest.TestCase):
  def test_every_entry_of_the_table_is_found_and_fits(self):
    table = json.loads(tiles.TABLE.read_text())
    self.assertTrue(table)
    for kind, operations in table.items():
      for size, entry in operations.pop('rows', {}).items():
        mean = tiles.FEW + (size == 'many')
        found = dataclasses.asdict(tiles.row_tiles(kind, mean))
        self.assertEqual(found | {'rows': list(found['rows'])}, entry)
      for operation, entries in operations.items():
        for shape, entry in entries.items():
          depth, columns = map(int, shape.split('x'))
          if operation.startswith('decode_'):
            found = tiles.lookup_decode(kind, operation, (depth, columns))
            self.assertEqual(dataclasses.asdict(found), entry)
            continue
          found = tiles.lookup(kind, operation, (depth, columns))
          self.assertEqual(dataclasses.asdict(found), entry)
          self.assertEqual(columns % found.columns, 0)

  def test_unknown_shapes_take_a_default_that_fits(self):
    found = tiles.lookup('none', 'weight_gradient', (128, 512))
    self.assertEqual(found, tiles.Tiles())
    found = tiles.lookup('none', 'weight_gradient', (128, 384))
    self.assertEqual(found.columns, 128)
    self.assertEqual(tiles.row_tiles('none', 4), tiles.ROW_TILES['few'])
    self.assertEqual(tiles.row_tiles('none', 1024), tiles.ROW_TILES['many'])

  def test_bad_tiles_are_named(self):
    with self.assertRaisesRegex(ValueError, 'columns=100'):
      tiles.Tiles(columns=100)
    with self.assertRaisesRegex(ValueError, 'stages=1'):
      tiles.Tiles(stages=1)
    for rows in ((), (12,), (64, 32), (264,)):
      with self.assertRaisesRegex(ValueError, 'rows'):
        tiles.RowTiles(rows=rows)

  def test_a_bad_entry_of_the_table_is_named(self):
    table = {'X1': {
      'weight_gradient': {'128x256': {'colums': 128}},
      'decode_up': {'128x256': {'depth': 3}},
      'rows': {'few': {'rows': [12]}},
    }}  # fmt: skip
    with mock.patch.object(tiles, '_table', lambda: table):
      with self.assertRaisesRegex(
        ValueError, 'tiles.json: X1, weight_gradient, 128x256: .*colums'
      ):
        tiles.lookup('X1', 'weight_gradient', (128, 256))
      with self.assertRaisesRegex(ValueError, 'X1, decode_up, 128x256: .*dep'):
        tiles.lookup_decode('X1', 'decode_up', (128, 256))
      with self.assertRaisesRegex(ValueError, 'X1, rows, few: .*multiples'):
        tiles.row_tiles('X1', 4)

  def test_autotune_picks_the_fastest(self):
    slow, fast = tiles.Tiles(band=1), tiles.Tiles(band=2)

    def call(candidate, x):
      def wait(x):
        time.sleep(0.02 if candidate is slow else 0)
        return x

      return jax.pure_callback(wait, jax.typeof(x), x)

    best, seconds = tiles.autotune(
      call, (jnp.ones(4),), (slow, fast), repeats=3
    )
    self.assertEqual(best, fast)
    self.assertGreater(seconds[slow], seconds[fast])
    with self.assertRaisesRegex(ValueError, 'candidate'):
      tiles.autotune(call, (jnp.ones(4),), ())


if __name__ == '__main__':
  absltest.main()
