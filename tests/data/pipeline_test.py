"""The pipeline: shards, resuming, workers, the tokenizer of a run, devices."""

import dataclasses
import itertools
import json
import pathlib
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import absltest, parameterized

from m2 import config
from m2.data import documents, pipeline, sources, tokenizer
from m2.parallel import mesh as meshes
from tests import clock

CFG = config.DataConfig(batch=4, length=64)
RESUMED = 20  # batches compared after a resume
FILL = 0.9
VOCAB = 300


def chats(count):
  """Short chats, each with a number of its own."""
  return [
    {
      'messages': [
        {'role': 'user', 'content': f'say {i}' + ' please' * (i % 4)},
        {'role': 'assistant', 'reasoning_content': 'ok', 'content': f'={i}='},
      ]
    }
    for i in range(count)
  ]


def change(**changes):
  return dataclasses.replace(CFG, **changes)


class PipelineTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.rows = chats(300)
    texts = pipeline.texts(sources.Memory(cls.rows), 1_000_000)
    cls.tok = tokenizer.train(texts, VOCAB)

  def make(self, cfg=CFG, **kwargs):
    dataset = pipeline.make(
      cfg, self.tok, **{'seed': 0, 'source': self.rows, **kwargs}
    )
    iterator = iter(dataset)
    self.addCleanup(iterator.close)
    return iterator

  def numbers(self, batches):
    """The numbers of the chats in some batches."""
    found = []
    for batch in batches:
      for tokens, until in zip(batch['tokens'], batch['until']):
        text = self.tok.decode(tokens[until > 0])
        found += [int(n) for n in text.split('=')[1::2]]
    return found

  def test_batches_have_the_agreed_shape(self):
    batch = next(self.make())
    expected = {
      'tokens': np.int32,
      'targets': np.int32,
      'weights': np.float32,
      'positions': np.int32,
      'until': np.int32,
    }
    self.assertEqual({k: v.dtype for k, v in batch.items()}, expected)
    self.assertEqual({v.shape for v in batch.values()}, {(4, 64)})

  def test_trains_on_what_the_model_says(self):
    batch = next(self.make())
    trained = self.tok.decode(batch['targets'][batch['weights'] > 0])
    self.assertStartsWith(trained, 'ok\n</think>\n\n=')
    self.assertNotIn('say', trained)
    self.assertTrue((batch['weights'][batch['until'] == 0] == 0).all())

  def test_shards_split_the_source_and_leave_nothing_out(self):
    """Over the first epoch of each, in any order."""
    epochs = []
    for row in range(3):
      iterator = self.make(change(batch=3, shards=3), wanted=[row])
      self.assertEqual(list(iterator.get_state()), [f'{row}-of-3'])
      seen = set()
      while len(seen) < 100:
        batch = next(iterator)
        self.assertEqual(batch['tokens'].shape, (1, 64))
        seen.update(self.numbers([batch]))
      epochs.append(seen)
    self.assertEqual([len(seen) for seen in epochs], [100, 100, 100])
    self.assertEqual(set.union(*epochs), set(range(300)))

  @parameterized.product(
    shards=(1, 2, 4),
    hosts=([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]], [[1, 2]]),
  )
  def test_rows_do_not_depend_on_the_hosts(self, shards, hosts):
    """Started on one host, gone on with on others: the rows of one alone."""
    cfg = change(shards=shards)
    whole = self.make(cfg)
    for _ in range(3):
      next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    parts = [self.make(cfg, wanted=rows) for rows in hosts]
    for part in parts:
      part.set_state(state)
    for _ in range(3):
      batch = next(whole)
      for rows, part in zip(hosts, parts):
        for name, x_BT in next(part).items():
          np.testing.assert_array_equal(x_BT, batch[name][rows])
    # And back: what the hosts have of the state is the state of one alone.
    merged = {k: v for part in parts for k, v in part.get_state().items()}
    self.assertEqual(merged, {name: whole.get_state()[name] for name in merged})

  def windows(self, count, **kwargs):
    """The numbers in the first windows, in order."""
    iterator = self.make(change(batch=1, length=512), **kwargs)
    batches = []
    while iterator.get_state()['0-of-1']['window'] < count:
      batches.append(next(iterator))
    return self.numbers(batches[:-1])  # the last begins the next window

  @parameterized.parameters(0, 4096)
  def test_epochs_show_every_row_as_often_in_a_seeded_order(self, small):
    with mock.patch.object(pipeline, '_SMALL', small):
      numbers = self.windows(3)
      counts = np.bincount(numbers, minlength=300)
      self.assertGreater(counts.min(), 5)
      self.assertLessEqual(counts.max() - counts.min(), 1)
      self.assertEqual(self.windows(3), numbers)
      self.assertNotEqual(self.windows(3, seed=1), numbers)

  def test_epochs_of_a_table_differ(self):
    orders = [tuple(pipeline.order('0/0', epoch, 50)) for epoch in range(20)]
    self.assertLen(set(orders), 20)
    for order in orders:
      self.assertEqual(sorted(order), list(range(50)))

  def test_a_few_short_rows_are_there_at_once(self):
    start = time.process_time()
    next(self.make(source=self.rows[:3]))
    self.assertLess(time.process_time() - start, 5 * clock.slow())

  @parameterized.parameters(0, 1, 5, 41)
  def test_a_killed_run_goes_on_to_the_bit(self, batches):
    iterator = self.make()
    for _ in range(batches):
      next(iterator)
    state = json.dumps(iterator.get_state())
    self.assertLess(len(state), 300)
    again = self.make()
    again.set_state(json.loads(state))
    for _ in range(RESUMED):
      for one, other in zip(next(iterator).values(), next(again).values()):
        np.testing.assert_array_equal(one, other)

  def test_fills_rows_and_counts(self):
    iterator = self.make(change(length=256))
    batches = list(itertools.islice(iterator, 50))
    used = sum(int((batch['until'] > 0).sum()) for batch in batches)
    self.assertEqual(iterator.counts['tokens'], used)
    self.assertEqual(iterator.counts['slots'], 50 * 4 * 256)
    self.assertGreater(used / iterator.counts['slots'], FILL)
    self.assertEqual(iterator.counts['truncated'], 0)

  def test_warns_of_truncated_chats_once(self):
    document = documents.Documents(sources.Memory(self.rows), self.tok, True)
    length = len(document[3]['tokens']) - 3  # short of the longest chats' end
    with self.assertLogs(level='WARNING') as logs:
      iterator = self.make(change(length=length))
      batches = list(itertools.islice(iterator, 5))
    self.assertLen(batches, 5)
    self.assertLen([line for line in logs.output if 'truncated' in line], 1)
    self.assertGreater(iterator.counts['truncated'], 5)

  def test_a_broken_row_stops_with_its_place(self):
    rows = [*self.rows[:20], {'messages': [{'role': 'robot'}]}]
    with self.assertRaisesRegex(ValueError, r'rows\[20\]: .*robot'):
      next(self.make(source=rows))

  def test_reads_files(self):
    folder = pathlib.Path(self.create_tempdir())
    (folder / 'a.jsonl').write_text(json.dumps({'text': 'to be read ' * 99}))
    cfg = change(source='jsonl', path=f'{folder}/*.jsonl')
    batch = next(self.make(cfg, source=None))
    self.assertIn('be read', self.tok.decode(batch['tokens'][0]))

  @parameterized.parameters(
    ({'batch': 4, 'shards': 3}, {}, 'data.batch=4 .* data.shards=3'),
    ({'length': 1}, {}, 'data.length=1'),
    ({'source': 'tasks'}, {'source': None}, 'data.source=tasks'),
    ({}, {'source': []}, 'no rows'),
    ({'shards': 4}, {'source': [{'text': 'x'}]}, '1 rows for data.shards=4'),
  )
  def test_refuses(self, changes, kwargs, error):
    with self.assertRaisesRegex(ValueError, error):
      self.make(change(**changes), **kwargs)

  @pytest.mark.heavy
  def test_worker_processes_give_the_rows_and_resume(self):
    flags.FLAGS.unparse_flags()  # as in a program that does not use them
    self.addCleanup(flags.FLAGS.mark_as_parsed)
    iterator = self.make(change(workers=2))
    batches = [next(iterator) for _ in range(3)]
    state = json.loads(json.dumps(iterator.get_state()))
    again = self.make(change(workers=2))
    again.set_state(state)
    for _ in range(RESUMED):
      batches.append(next(iterator))
      for one, other in zip(batches[-1].values(), next(again).values()):
        np.testing.assert_array_equal(one, other)
    self.assertEqual(
      iterator.counts['tokens'],
      sum(int((batch['until'] > 0).sum()) for batch in batches),
    )


class RunTokenizerTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir())

  def make(self, cfg, source, vocab=VOCAB, bound=True):
    return pipeline.tokenizer(cfg, source, vocab, self.workdir, bound=bound)

  def test_is_trained_once_and_kept(self):
    first = self.make(CFG, chats(50), bound=False)
    again = self.make(CFG, chats(99))
    self.assertEqual(first.fingerprint(), again.fingerprint())
    self.assertTrue((self.workdir / 'tokenizer.json').exists())
    self.assertEqual(first.size, VOCAB)

  def test_refuses_one_that_is_too_large_or_another(self):
    self.make(CFG, chats(50))
    with self.assertRaisesRegex(ValueError, 'model.vocab=299'):
      self.make(CFG, chats(50), VOCAB - 1)
    path = self.workdir / 'other.json'
    tokenizer.train(['other text'], VOCAB).save(path)
    cfg = change(tokenizer=str(path))
    with self.assertRaisesRegex(ValueError, 'differs from'):
      self.make(cfg, None)
    self.workdir = pathlib.Path(self.create_tempdir())
    found = self.make(cfg, None)
    held = tokenizer.load(self.workdir)
    self.assertEqual(found.fingerprint(), held.fingerprint())

  def test_what_binds_no_run_is_replaced(self):
    path = self.workdir / 'other.json'
    other = tokenizer.train(['other text'], VOCAB)
    other.save(path)
    first = self.make(CFG, chats(50), bound=False)
    for cfg, want in ((change(tokenizer=str(path)), other), (CFG, first)):
      found = self.make(cfg, chats(50), bound=False)
      self.assertEqual(found.fingerprint(), want.fingerprint())
      held = tokenizer.load(self.workdir)
      self.assertEqual(held.fingerprint(), want.fingerprint())

  def test_ready_tokens_need_their_tokenizer(self):
    with self.assertRaisesRegex(ValueError, r'rows\[0\]: ready tokens'):
      self.make(CFG, [{'tokens': [1]}])


class DeviceTest(absltest.TestCase):
  def test_rows_are_spread_over_the_row_axes(self):
    cfg = config.MeshConfig(data=2, fsdp=2, expert=2, tensor=1)
    mesh = meshes.make_mesh(cfg)
    batch = {'tokens': np.arange(8 * 4, dtype=np.int32).reshape(8, 4)}
    self.assertEqual(pipeline.local_rows(mesh, 8), list(range(8)))
    array = pipeline.to_device(batch, mesh, 8)['tokens']
    np.testing.assert_array_equal(array, batch['tokens'])
    self.assertLen({s.device for s in array.addressable_shards}, 8)
    self.assertEqual({s.data.shape for s in array.addressable_shards}, {(1, 4)})
    self.assertEqual(jax.typeof(array).sharding.spec[0], pipeline.ROW_AXES)
    with self.assertRaisesRegex(ValueError, 'data.batch=4 .* 8 shards'):
      pipeline.local_rows(mesh, 4)


if __name__ == '__main__':
  absltest.main()
