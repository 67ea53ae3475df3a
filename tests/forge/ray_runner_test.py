"""Episodes on Ray's hosts: those of the asyncio runner, and none lost.

One cluster of two CPUs on this machine; its workers are processes of their own.
What workers import stays free of jax here, too.
"""

import asyncio
import contextlib
import io
import os
import pathlib
import signal
import sys
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest

from m2 import config, types
from m2.eval import play
from m2.forge import pool as pools
from m2.forge import rollout, window

pytestmark = pytest.mark.heavy

CONFIG = config.RunConfig(
  mode='rl',
  tasks=config.TasksConfig(difficulty_max=1),
  prompt=config.PromptConfig(),
  agent=config.AgentConfig(),
  forge=config.ForgeConfig(in_flight=16, group_size=4),
)


class Model:
  """Answers by what it is asked alone; records as the gateway does."""

  def __init__(self, pool=None):
    self.asked, self.forgotten, self._pool = {}, [], pool

  async def chat(self, episode, messages, tools, sampling):
    await asyncio.sleep(0)
    asked = self.asked.setdefault(episode, [])
    if self._pool:
      self._pool.put(
        types.Completion(
          episode, len(asked), np.array([1]), np.array([2]), np.array([-1.0]),
          0, types.StopReason.EOS,
        )
      )  # fmt: skip
    asked.append((tuple(messages), tools, sampling))
    draw = types.seed(sampling.seed, len(messages)) % 4
    if draw == 0:
      return types.Message('assistant', 'that is all'), types.StopReason.EOS
    script = f'SELECT {draw}; SELECT name FROM sqlite_master'
    call = types.ToolCall('sql', {'script': script} if draw > 1 else {})
    message = types.Message('assistant', reasoning='hm', tool_calls=(call,))
    return message, types.StopReason.EOS

  def forget(self, episode):
    self.forgotten.append(episode)
    return 0, 0


class Toy:
  """Asks once, then does what its task's skill says."""

  def __init__(self, llm):
    self._llm = llm

  async def play(self, task, episode, seed):
    prompt = [types.Message('user', task.prompt)]
    await self._llm.chat(episode, prompt, None, types.Sampling(1, seed=seed))
    if task.skill == 'die':
      os.kill(os.getpid(), signal.SIGKILL)
    if task.skill == 'fail':
      raise LookupError(f'bug in {task.id}')
    evidence = f'{os.getpid()} {"jax" in sys.modules}'
    return types.Reward(
      episode, types.Outcome.SCORE, (1.0,), True, evidence=evidence
    )


class ToyTasks:
  """Every prompt is harmless but those that the index tells."""

  def __init__(self, **skills):
    self._skills = {int(name[1:]): skill for name, skill in skills.items()}

  def __getitem__(self, index):
    skill = self._skills.get(index, 'say')
    return types.Task(f't{index}', 'toy', skill, 'train', 0, 'say', {}, '')


def toys(cfg, llm):
  return Toy(llm), ToyTasks()


def dying(cfg, llm):
  return Toy(llm), ToyTasks(t2='die')


class RayRunnerTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    import ray

    os.environ |= {'RAY_USAGE_STATS_ENABLED': '0', 'RAY_AUTH_TOKEN': '0' * 64}
    ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False)
    cls.addClassCleanup(ray.shutdown)
    from m2.forge import ray_runner

    cls.module = ray_runner

  def play(self, episodes, cast=toys, model=None):
    """Rewards of (task, episode, seed) triples, all at once."""

    async def together(runner):
      staff = asyncio.create_task(runner.staff())
      playing = asyncio.gather(*(runner.play(*one) for one in episodes))
      await asyncio.wait({staff, playing}, return_when='FIRST_COMPLETED')
      for task in (staff, playing):
        if task.done():
          return task.result()

    with self.module.Runner(CONFIG, cast, model or Model()) as runner:
      return asyncio.run(together(runner))

  def test_the_same_episodes_as_here(self):
    model_here, model_there = Model(), Model()
    player, tasks = play.cast(CONFIG, model_here)
    episodes = [(tasks[i // 2], f'e{i}', 100 + i) for i in range(24)]

    async def here():
      return await asyncio.gather(*(player.play(*one) for one in episodes))

    there = self.play(episodes, play.cast, model_there)
    for left, right in zip(asyncio.run(here()), there, strict=True):
      self.assertEqual(_timeless(left), _timeless(right))
    self.assertEqual(model_here.asked, model_there.asked)
    self.assertCountEqual(model_there.forgotten, model_there.asked)
    turns = {len(asked) for asked in model_there.asked.values()}
    self.assertGreater(len(turns), 2, 'every episode was alike')

  def test_workers_are_other_processes_without_jax(self):
    tasks = ToyTasks()
    rewards = self.play([(tasks[i], f'e{i}', i) for i in range(40)])
    seen = {tuple(reward.evidence.split()) for reward in rewards}
    self.assertNotIn(str(os.getpid()), {pid for pid, _ in seen})
    self.assertEqual({jax for _, jax in seen}, {'False'})

  def test_what_workers_read_counts_as_read(self):
    _, tasks = play.cast(CONFIG, Model())
    config.Settings.READS.clear()
    self.play([(tasks[0], 'e', 0)], play.cast)
    self.assertContainsSubset(
      {('AgentConfig', 'max_turns'), ('AgentConfig', 'max_new')},
      config.Settings.READS,
    )

  def test_a_killed_worker_costs_its_episodes_and_says_so(self):
    """Group 2 kills whatever plays it; every group ends all the same."""
    pool = self.enter_context(pools.DataPool('sqlite://'))
    said = self.enter_context(contextlib.redirect_stderr(io.StringIO()))
    model = Model(pool)
    rollouts = rollout.Rollouts(
      window.WindowedFifo(8), pool, in_flight=8, group_size=2, seed=0
    )
    self.enter_context(mock.patch.object(self.module, 'PATROL', 0.5))
    runner = self.enter_context(self.module.Runner(CONFIG, dying, model))
    scene = self.enter_context(rollout.Scene())
    scene.start(runner.staff())
    scene.start(rollouts.keep_running(runner, dying(None, None)[1]))
    taken, fresh = [], []
    while len(taken) < 12:
      fresh = scene.until(rollouts.take(1))
      taken += fresh
      rollouts.free()
    self.assertNotIn('g2.0', taken)
    self.assertGreaterEqual(rollouts.counters.infra, 1)
    self.assertEqual(
      rollouts.counters.infra, said.getvalue().count('rollout: episode')
    )
    (lost,) = pool.read(['g2.0/0'])
    self.assertEqual(lost.reward.outcome, types.Outcome.INFRA)
    self.assertRegex(lost.reward.evidence, r'worker \S+:\d+ died in task t2')
    self.assertRegex(said.getvalue(), r'episode g2.0/0: worker .* task t2')
    for group in taken:  # trained on scores alone
      rewards = [
        one.reward.outcome for one in pool.read(rollout.episodes(group, 2))
      ]
      self.assertEqual(rewards, [types.Outcome.SCORE] * 2)

  def test_a_bug_of_the_agent_ends_the_run_as_itself(self):
    tasks = ToyTasks(t1='fail')
    with self.assertRaisesRegex(LookupError, 'bug in t1'):
      self.play([(tasks[i], f'e{i}', i) for i in range(2)])

  def test_a_host_with_other_code_is_refused(self):
    self.enter_context(
      mock.patch.object(self.module, 'fingerprint', return_value='other')
    )
    with self.assertRaisesRegex(self.module.RunnerError, 'another m2/ than'):
      self.play([(ToyTasks()[0], 'e', 0)])

  def test_a_cluster_without_cpus_gives_up_and_says_how_to_add_some(self):
    self.enter_context(mock.patch.object(self.module, 'PATROL', 0.05))
    self.enter_context(mock.patch.object(self.module, 'PATIENCE', 0.2))
    self.enter_context(
      mock.patch.object(
        self.module.ray, 'cluster_resources', return_value={'GPU': 8.0}
      )
    )
    with self.assertRaisesRegex(self.module.RunnerError, 'rl.sh agents'):
      self.play([(ToyTasks()[0], 'e', 0)])

  def test_the_loop_trains_on_the_same_episodes(self):
    from tests.forge import loop_test

    found = {}
    for runner in ('asyncio', 'ray'):
      case = loop_test.LoopTest()
      case.setUp()
      self.addCleanup(case.doCleanups)
      cfg = loop_test.settings(
        str(case.start), steps=1, forge={'runner': runner}
      )
      workdir = pathlib.Path(case.create_tempdir().full_path)
      loop_test.loop.run(cfg, workdir, loop_test_cast)
      with pools.DataPool(pools.file_url(workdir / 'pool.db')) as pool:
        names = [e for g in range(4) for e in rollout.episodes(f'g{g}.0', 8)]
        found[runner] = pool.read(names)
    for left, right in zip(found['asyncio'], found['ray'], strict=True):
      self.assertEqual(left.reward, right.reward)
      for one, other in zip(left.completions, right.completions, strict=True):
        self.assertEqual(list(one.prompt_ids), list(other.prompt_ids))
        self.assertEqual(list(one.ids), list(other.ids))
        for a, b in zip(one.logprobs, other.logprobs):
          self.assertAlmostEqual(a, b, delta=loop_test.MISMATCH)


def loop_test_cast(cfg, llm):
  from tests.forge import loop_test

  return loop_test.Agent(llm), loop_test.Tasks()


def _timeless(reward):
  """A reward without the part that the clock decides."""
  return (
    reward.episode, reward.outcome, reward.steps, reward.passed,
    reward.parts['process'], reward.parts['perf'], reward.evidence,
  )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
