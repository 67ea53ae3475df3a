"""Batches: what is trained, what is only counted, and the window's state."""

import contextlib
import dataclasses
import io
import types as python_types

import numpy as np
from absl.testing import absltest

from m2 import config, types
from m2.forge import dataset, window


def episode(id, steps, version=0, outcome=types.Outcome.SCORE):
  """An episode of one group member; each completion adds three ids."""
  prompt = np.array([5, 6, 7 + int(id[1])], np.int32)
  completions = []
  for step in range(max(len(steps), 1)):
    ids = np.array([1, int(id[-1]), step], np.int32)
    completions.append(
      types.Completion(
        id, step, prompt, ids, np.full(3, -1.0, np.float32), version,
        types.StopReason.LENGTH if step else types.StopReason.EOS,
      )
    )  # fmt: skip
    prompt = np.concatenate([prompt, ids])
  return types.Episode(
    id, id.split('/')[0], f't{id[1]}', 'say', tuple(completions),
    types.Reward(id, outcome, tuple(steps), passed=sum(steps) > 0.5),
  )  # fmt: skip


class Rollouts:
  """Finished groups, as `m2.forge.rollout.Rollouts` offers them."""

  def __init__(self, groups):
    self.window = window.WindowedFifo(8)
    self.pool = python_types.SimpleNamespace(
      read=lambda ids: [groups[id.split('/')[0]][int(id[-1])] for id in ids],
      flush=lambda: None,
    )

  async def take(self, count):
    return self.window.take(count)

  def group_id(self, index):
    return f'again{index}'


class Scene:
  def until(self, coroutine):
    try:
      coroutine.send(None)
    except StopIteration as stop:
      return stop.value
    raise AssertionError('the fake take never waits')


class DatasetTest(absltest.TestCase):
  def make(self, groups, /, **forge):
    sizes = {'groups': len(groups), 'group_size': 2, 'row_tokens': 16}
    cfg = config.ForgeConfig(**(sizes | {'lines': 2} | forge))
    self.rollouts = Rollouts(groups)
    for id in groups:
      self.rollouts.window.submit(id)
      self.rollouts.window.done(id)
    return iter(dataset.RolloutDataset(self.rollouts, Scene(), cfg))

  def test_rows_without_advantage_only_count(self):
    batch = next(
      self.make(
        {
          'g0': [episode('g0/0', [1.0]), episode('g0/1', [0.0])],
          'g1': [episode('g1/0', [1.0]), episode('g1/1', [1.0])],
        }
      )
    )
    tree = batch.tree
    self.assertEqual(int((tree.weight_Z > 0).sum()), 6)  # of g0 alone
    self.assertEqual(float(tree.total), 12)  # of both
    self.assertEqual(set(tree.advantage_Z[tree.weight_Z > 0]), {0.5, -0.5})
    self.assertEqual(batch.report['tree/rows_skipped'], 2)
    self.assertEqual(batch.report['group/zero_variance_frac'], 0.5)
    self.assertEqual(batch.report['reward/mean'], 0.75)
    self.assertEqual(batch.report['reward/passed'], 0.75)
    self.assertEqual(batch.report['advantage/max_abs'], 0.5)

  def test_a_batch_without_any_advantage_still_is_one(self):
    batch = next(
      self.make({'g0': [episode('g0/0', [1.0]), episode('g0/1', [1.0])]})
    )
    self.assertEqual(int((batch.tree.weight_Z > 0).sum()), 6)
    self.assertFalse(batch.tree.advantage_Z.any())
    self.assertEqual(batch.report['advantage/max_abs'], 0)

  def test_equal_returns_are_equal_though_their_mean_is_rounded(self):
    group = [episode(f'g0/{member}', [-0.1]) for member in range(7)]
    other = [episode(f'g1/{member}', [member / 7]) for member in range(7)]
    batch = next(self.make({'g0': group, 'g1': other}, group_size=7))
    self.assertEqual(batch.report['group/zero_variance_frac'], 0.5)
    self.assertEqual(batch.report['tree/rows_skipped'], 7 + 1)

  def test_prompts_that_fill_the_context_are_named(self):
    full = [
      dataclasses.replace(
        one,
        completions=(
          dataclasses.replace(
            one.completions[0],
            ids=np.zeros(0, np.int32),
            logprobs=np.zeros(0, np.float32),
            stop=types.StopReason.CONTEXT,
          ),
        ),
      )
      for one in (episode('g0/0', [1.0]), episode('g0/1', [0.0]))
    ]
    with self.assertRaisesRegex(ValueError, 'fills engine.length; raise it'):
      next(self.make({'g0': full}))

  def test_steps_have_their_own_returns(self):
    batch = next(
      self.make(
        {'g0': [episode('g0/0', [0.0, 1.0]), episode('g0/1', [-0.5, 0.0])]},
        gamma=1.0,
      )
    )
    got = batch.tree.advantage_Z[batch.tree.weight_Z > 0]
    np.testing.assert_allclose(
      sorted(set(np.round(got, 6))), [-0.75, -0.25, 0.75]
    )
    self.assertEqual(batch.report['rollout/turns'], 2)
    self.assertEqual(batch.report['rollout/truncated_frac'], 0.5)

  def test_failures_are_left_out_of_everything_but_their_share(self):
    infra = types.Outcome.INFRA
    batch = next(
      self.make(
        {
          'g0': [
            episode('g0/0', [1.0]),
            episode('g0/1', [0.0]),
            episode('g0/2', [], outcome=infra),
          ]
        },
        group_size=3,
      )
    )
    self.assertEqual(float(batch.tree.total), 6)
    self.assertEqual(batch.report['reward/mean'], 0.5)
    self.assertAlmostEqual(batch.report['env/infra_failed_frac'], 1 / 3)
    self.assertAlmostEqual(batch.report['env/unscored_frac'], 1 / 3)

  def test_versions(self):
    batch = next(
      self.make({'g0': [episode('g0/0', [1.0], 3), episode('g0/1', [0.0], 5)]})
    )
    self.assertEqual(batch.report['version/oldest'], 3)
    self.assertEqual(batch.report['version/mean'], 4)
    self.assertEqual(set(batch.tree.version_Z), {3, 5, -1})

  def test_shapes_only_grow(self):
    small = {'g0': [episode('g0/0', [1.0]), episode('g0/1', [0.0])]}
    large = {
      'g0': [
        episode(f'g0/{i}', [float(i % 2)] * 3, version=i) for i in range(8)
      ]
    }
    iterator = self.make(small, groups=1)
    first = next(iterator).tree
    self.assertEqual(len(first.tokens_BT) % 2, 0)
    self.assertGreaterEqual(len(first.token_Z), 12)  # twice the need
    shapes = []
    for groups, size in ((large, 8), (small, 2)):
      fresh = self.make(groups, groups=1, group_size=size)
      fresh._capacity = iterator._capacity
      shapes.append(next(fresh).tree.tokens_BT.shape)
    self.assertGreater(shapes[0][0], len(first.tokens_BT))
    self.assertEqual(shapes[0], shapes[1])

  def test_state_is_the_window_and_renames_what_must_be_replayed(self):
    groups = {
      id: [episode(f'{id}/{member}', [1.0]) for member in range(2)]
      for id in ('g0', 'g1', 'g2')
    }
    iterator = self.make(groups, groups=1)
    queue = self.rollouts.window
    queue.submit('g3')
    queue.take(1)
    state = iterator.get_state()
    self.assertEqual(state, queue.state())
    iterator.set_state(state)
    self.assertEqual(queue.unfinished(), [('again3', 3)])
    self.assertEqual(queue.take(9), ['g1', 'g2'])
    self.assertEqual(queue.next_index, 4)
    del groups['g1']
    with contextlib.redirect_stderr(io.StringIO()) as said:
      iterator.set_state(state)
    self.assertIn('lacks 1 of the groups', said.getvalue())
    self.assertEqual(queue.unfinished(), [('again1', 1), ('again3', 3)])


if __name__ == '__main__':
  absltest.main()
