"""Groups in flight: never more than allowed, none lost, none doubled."""

import asyncio
import contextlib
import io
import time
from unittest import mock

import numpy as np
from absl.testing import absltest

from m2 import types
from m2.forge import pool as pools
from m2.forge import rollout, window


class Tasks:
  def __getitem__(self, index):
    return types.Task(f't{index}', 'toy', 'say', 'train', 0, '', {}, '')


class Agent:
  """Finishes episodes in an order that the tests choose."""

  def __init__(
    self, pool, delay=lambda task: 1, outcome=lambda task: types.Outcome.SCORE
  ):
    self._pool, self._delay, self._outcome = pool, delay, outcome
    self.paid = lambda task, episode: 1.0
    self.playing, self.most, self.seeds = 0, 0, {}

  async def play(self, task, episode, seed):
    self.seeds[episode] = seed
    self.playing += 1
    self.most = max(self.most, self.playing)
    for _ in range(self._delay(task)):
      await asyncio.sleep(0)
    self.playing -= 1
    self._pool.put(
      types.Completion(
        episode, 0, np.array([1]), np.array([2]), np.array([-1.0]), 0,
        types.StopReason.EOS,
      )
    )  # fmt: skip
    outcome = self._outcome(task)
    steps = (self.paid(task, episode),)
    return types.Reward(
      episode, outcome, steps, passed=True, evidence='no disk'
    )


async def turns(count):
  """Lets everything else go on, however busy the machine is."""
  for _ in range(count):
    await asyncio.sleep(0)


class RolloutTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.pool = self.enter_context(pools.DataPool('sqlite://'))
    self.scene = self.enter_context(rollout.Scene())

  def make(self, width=4, in_flight=4, **kwargs):
    return rollout.Rollouts(
      window.WindowedFifo(width),
      self.pool,
      in_flight=in_flight,
      group_size=3,
      seed=7,
      **kwargs,
    )

  def test_slots_are_refilled_when_freed_and_not_before(self):
    rollouts, agent = self.make(), Agent(self.pool)
    self.scene.start(rollouts.keep_running(agent, Tasks()))
    first = self.scene.until(rollouts.take(2))
    self.assertEqual(first, ['g0.0', 'g1.0'])
    self.scene.until(turns(100))
    self.assertEqual(rollouts.window.next_index, 4)  # taken, not freed
    rollouts.free()
    self.scene.until(turns(100))
    self.assertEqual(rollouts.window.next_index, 6)
    self.assertLessEqual(agent.most, 12)
    episodes = self.pool.read(rollout.episodes('g0.0', 3))
    self.assertEqual({e.group for e in episodes}, {'g0.0'})
    self.assertEqual({e.task for e in episodes}, {'t0'})

  def test_a_slow_head_lets_the_window_pass_and_no_more(self):
    rollouts = self.make(width=2, in_flight=4)
    slow = Agent(self.pool, delay=lambda task: 500 if task.id == 't0' else 1)
    self.scene.start(rollouts.keep_running(slow, Tasks()))
    self.assertEqual(self.scene.until(rollouts.take(1)), ['g1.0'])
    # 2 and 3 are done, yet outside the window until 0 is taken.
    self.assertEqual(self.scene.until(rollouts.take(3))[0], 'g0.0')

  def test_nothing_runs_between_batches(self):
    rollouts = self.make()
    agent = Agent(self.pool, delay=lambda task: 10 + int(task.id[1:]) * 50)
    self.scene.start(rollouts.keep_running(agent, Tasks()))
    self.scene.until(rollouts.take(1))
    self.assertGreater(agent.playing, 0)  # suspended, not lost
    self.assertEqual(
      self.scene.until(rollouts.take(3)), ['g1.0', 'g2.0', 'g3.0']
    )

  def test_groups_without_two_scores_are_dropped(self):
    rollouts = self.make()
    failing = Agent(self.pool, outcome=lambda task: types.Outcome.INFRA)
    self.scene.start(rollouts.keep_running(failing, Tasks()))
    with self.assertRaisesRegex(
      rollout.RolloutError, '8 groups in a row .* g7.0/2: infra: no disk'
    ):
      self.scene.until(rollouts.take(1))
    self.assertEqual(rollouts.counters.dropped, 8)
    self.assertEqual(rollouts.counters.infra, 3 * rollouts.counters.groups)

  def test_a_score_that_is_no_number_is_a_failure_of_the_machinery(self):
    rollouts, agent = self.make(), Agent(self.pool)
    agent.paid = lambda task, episode: (
      float('nan') if episode == 'g0.0/1' else 1.0
    )
    self.scene.start(rollouts.keep_running(agent, Tasks()))
    with contextlib.redirect_stderr(io.StringIO()) as said:
      self.assertEqual(self.scene.until(rollouts.take(1)), ['g0.0'])
    self.assertEqual(rollouts.counters.infra, 1)
    evidence = 'rewards [nan] are not finite'
    said = said.getvalue()
    self.assertEqual(said, f'rollout: episode g0.0/1: {evidence}\n')
    rewards = [e.reward for e in self.pool.read(rollout.episodes('g0.0', 3))]
    self.assertEqual([r.outcome for r in rewards], ['score', 'infra', 'score'])
    self.assertEqual(rewards[1].evidence, evidence)

  def test_an_episode_without_end_is_given_up(self):
    rollouts = self.make(episode_seconds=0.05)
    agent, play = Agent(self.pool), Agent.play

    async def stuck(task, episode, seed):
      if episode == 'g0.0/1':
        await asyncio.Event().wait()
      return await play(agent, task, episode, seed)

    agent.play = stuck
    self.scene.start(rollouts.keep_running(agent, Tasks()))
    with contextlib.redirect_stderr(io.StringIO()) as said:
      taken = self.scene.until(rollouts.take(4))
    self.assertIn('g0.0', taken)
    self.assertIn('g0.0/1: no end after forge.episode_sec', said.getvalue())
    self.assertEqual(rollouts.counters.timeout, 1)
    rewards = [e.reward for e in self.pool.read(rollout.episodes('g0.0', 3))]
    outcomes = [r.outcome for r in rewards]
    self.assertEqual(outcomes, ['score', 'timeout', 'score'])

  def test_an_agents_own_timeout_is_raised(self):
    rollouts, agent = self.make(episode_seconds=60), Agent(self.pool)
    agent.play = mock.AsyncMock(side_effect=TimeoutError('no answer'))
    self.scene.start(rollouts.keep_running(agent, Tasks()))
    with self.assertRaisesRegex(TimeoutError, 'no answer'):
      self.scene.until(rollouts.take(1))

  def test_failures_between_others_do_not_end_the_run(self):
    rollouts = self.make()
    seventh = ('infra',) * 6 + ('score',)
    agent = Agent(
      self.pool,
      outcome=lambda task: types.Outcome(seventh[int(task.id[1:]) % 7]),
    )
    self.scene.start(rollouts.keep_running(agent, Tasks()))
    for index in (6, 13, 20):
      self.assertEqual(self.scene.until(rollouts.take(1)), [f'g{index}.0'])
      rollouts.free()
    self.assertGreaterEqual(rollouts.counters.dropped, 18)

  def test_episodes_do_not_pay_for_the_training_between_batches(self):
    clock = []

    async def episode():
      start = asyncio.get_running_loop().time()
      await asyncio.sleep(0.05)
      clock.append(asyncio.get_running_loop().time() - start)
      await asyncio.Event().wait()

    self.scene.start(episode())
    self.scene.until(turns(3))
    time.sleep(1)  # a training step
    self.assertEmpty(clock)
    self.scene.until(asyncio.sleep(0.1))
    self.assertBetween(clock[0], 0.05, 0.9)

  def test_an_error_of_an_episode_reaches_the_run(self):
    rollouts = self.make()

    def fail(task):
      raise RuntimeError(f'bug in {task.id}')

    agent = Agent(self.pool, delay=fail)
    self.scene.start(rollouts.keep_running(agent, Tasks()))
    with self.assertRaisesRegex(RuntimeError, 'bug in t0'):
      self.scene.until(rollouts.take(1))

  def test_restored_groups_are_played_again_alike(self):
    rollouts, agent = self.make(), Agent(self.pool)
    self.scene.start(rollouts.keep_running(agent, Tasks()))
    self.scene.until(rollouts.take(1))
    again = self.make()
    again.window.restore(
      {
        'head': 1,
        'next_index': 3,
        'queued': [[again.group_id(1), 1], ['g2.0', 2]],
        'done': ['g2.0'],
      }
    )
    self.assertEqual(again.group_id(1), 'g1.1')
    other = Agent(self.pool)
    self.scene.start(again.keep_running(other, Tasks()))
    taken = self.scene.until(again.take(3))
    self.assertEqual(taken, ['g2.0', 'g1.1', 'g3.1'])  # 2 was done
    self.assertEqual(other.seeds['g1.1/2'], agent.seeds['g1.0/2'])
    self.assertLen(set(agent.seeds.values()), len(agent.seeds))


if __name__ == '__main__':
  absltest.main()
