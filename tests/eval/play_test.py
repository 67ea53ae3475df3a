"""One episode: judged, rewarded, and never a zero for the machine's fault."""

import asyncio
import dataclasses
from unittest import mock

from absl.testing import absltest

from m2 import config, types
from m2.agents import llm
from m2.envs import tasks
from m2.envs.families import sql
from m2.eval import play

CFG = config.RunConfig(
  mode='rl',
  seed=3,
  tasks=config.TasksConfig(),
  prompt=config.PromptConfig(),
  agent=config.AgentConfig(),
  forge=config.ForgeConfig(alpha=0.1, beta=0.0),
  eval=config.EvalConfig(split='dev', tasks=24),
)


class Sessions(llm.Scripted):
  """Scripted replies; counts like the gateway."""

  def forget(self, episode):
    return sum(name == episode for name, _ in self.seen), 7


def call(name, **arguments):
  return types.Message(
    'assistant', reasoning='so', tool_calls=(types.ToolCall(name, arguments),)
  )


class PlayTest(absltest.TestCase):
  def player(self, *replies):
    return play.Player(CFG, Sessions({'e': replies}))

  def setUp(self):
    super().setUp()
    self.task = tasks.Stream(CFG.tasks, 'train', 0)[0]
    self.gold = sql.script_of(self.task)

  def test_the_gold_script_passes(self):
    player = self.player(call('sql', script=self.gold), call('finish'))
    transcript, verdict, tokens = asyncio.run(player.judge(self.task, 'e', 1))
    self.assertTrue(verdict.passed)
    self.assertEqual((transcript.turns, tokens), (2, 7))
    player = self.player(call('sql', script=self.gold), call('finish'))
    reward = asyncio.run(player.play(self.task, 'e', 1))
    self.assertEqual(reward.outcome, types.Outcome.SCORE)
    self.assertEqual(reward.steps, (0.0, 1.0))  # one number an action

  def test_failures_of_the_machine_are_no_zeros(self):
    for broken in ('Workspace', 'verify'):
      player = self.player(call('sql', script=self.gold), call('finish'))
      with mock.patch.object(sql, broken, side_effect=OSError('disk full')):
        reward = asyncio.run(player.play(self.task, 'e', 1))
      self.assertEqual(reward.outcome, types.Outcome.INFRA)
      self.assertEqual(reward.steps, ())
      self.assertIn('disk full', reward.evidence)

  def test_mistakes_in_our_code_are_not_hidden(self):
    player = self.player(call('finish'))
    with mock.patch.object(sql, 'verify', side_effect=KeyError('bug')):
      with self.assertRaisesRegex(KeyError, 'bug'):
        asyncio.run(player.play(self.task, 'e', 1))

  def test_exams_are_a_function_of_the_settings(self):
    drawn = play.exam(CFG)
    self.assertLen(drawn, 24)
    self.assertEqual(drawn, play.exam(CFG))
    self.assertEqual({task.split for task in drawn}, {'dev'})
    hard = dataclasses.replace(
      CFG, eval=config.EvalConfig(tasks=24, difficulty=2)
    )
    self.assertEqual({task.difficulty for task in play.exam(hard)}, {2})


if __name__ == '__main__':
  absltest.main()
