"""The white-box agent in real workspaces, its model scripted."""

import asyncio

from absl.testing import absltest

from m2 import config, types
from m2.agents import context, llm, scaffold, whitebox
from m2.envs import reward
from m2.envs.families import sql

TASK = sql.generate('add_col', 0, 'dev', 'agent')
CFG = config.AgentConfig(max_turns=3)


def call(name, **arguments):
  return types.Message(
    'assistant', tool_calls=(types.ToolCall(name, arguments),)
  )


def play(*replies, cfg=CFG):
  model = llm.Scripted({'e': replies})

  async def run():
    async with sql.Workspace(TASK) as workspace:
      agent = whitebox.WhiteBox(cfg, config.PromptConfig())
      transcript = await agent.run(TASK, workspace, model, 'e', 0)
    return transcript, workspace.scripts

  transcript, scripts = asyncio.run(run())
  return transcript, sql.verify(TASK, scripts), model


class WhiteBoxTest(absltest.TestCase):
  def test_acts_finishes_and_is_judged(self):
    transcript, verdict, model = play(
      call('sql', script=sql.script_of(TASK)), call('finish')
    )
    self.assertTrue(verdict.passed)
    self.assertTrue(transcript.finished)
    self.assertEqual(transcript.turns, 2)
    _, second = model.seen[1]
    self.assertEqual([m.role for m in second[2:]], ['assistant', 'tool'])
    self.assertEqual(second[-1].content, 'ok')

  def test_retries_after_an_error(self):
    transcript, verdict, _ = play(
      call('sql', script='ALTER TABLE nowhere ADD COLUMN x INT'),
      call('sql', script=sql.script_of(TASK)),
      call('finish'),
    )
    self.assertTrue(verdict.passed)
    self.assertIn('error: no such table', transcript.messages[3].content)
    paid = reward.steps('e', transcript, verdict, config.ForgeConfig(beta=0.0))
    self.assertEqual(paid.steps, (-0.025, 0.0, 1.0))

  def test_malformed_calls_are_answered_and_counted(self):
    broken = types.Message('assistant', errors=('unclosed <invoke>',))
    transcript, verdict, _ = play(broken, call('finish'))
    self.assertEqual(transcript.malformed, 1)
    self.assertEqual(transcript.messages[3].content, 'error: unclosed <invoke>')
    self.assertFalse(verdict.passed)

  def test_answers_come_in_the_order_of_the_calls(self):
    calls = (
      types.ToolCall('shell', {}),
      types.ToolCall('sql', {'script': 'SELECT 7'}),
      types.ToolCall('sql', {'script': None}),
      types.ToolCall('sql', {'script': 'SELECT 8'}),
    )
    several = types.Message(
      'assistant', tool_calls=calls, errors=('text after the tool calls',)
    )
    transcript, _, _ = play(several, call('finish'))
    self.assertEqual(transcript.malformed, 1)
    answers = [m.content for m in transcript.messages if m.role == 'tool']
    self.assertLen(answers, 5)
    for answer, part in zip(answers, ("'shell'", '7', 'null', '8', 'after')):
      self.assertIn(part, answer)

  def test_ends_at_its_turns_and_without_a_call(self):
    again = call('sql', script='SELECT 1')
    transcript, _, _ = play(again, again, again, again)
    self.assertEqual(transcript.turns, 3)
    self.assertFalse(transcript.finished)
    transcript, _, _ = play(types.Message('assistant', 'No.'))
    self.assertEqual(transcript.turns, 1)

  def test_old_answers_can_be_cut(self):
    cfg = config.AgentConfig(max_turns=3, tool_chars=2)
    rows = call('sql', script='SELECT 12345')
    _, _, model = play(rows, rows, rows, cfg=cfg)
    _, third = model.seen[2]
    self.assertEqual(
      [m.content for m in third if m.role == 'tool'], ['12', '12345']
    )
    self.assertIs(context.policy(0), context.keep)

  def test_all_answers_of_the_last_turn_are_kept_whole(self):
    roles = ('user', 'assistant', 'tool', 'tool', 'assistant', 'tool', 'tool')
    shown = context.truncate(2)([types.Message(r, 'text') for r in roles])
    self.assertEqual(
      [m.content for m in shown],
      ['text', 'text', 'te', 'te', 'text', 'text', 'text'],
    )


class ScaffoldTest(absltest.TestCase):
  def test_bad_files_are_named(self):
    with self.assertRaisesRegex(ValueError, 'nowhere.md'):
      scaffold.load('nowhere.md')
    path = self.create_tempfile('s.md', '# system\nHi\n# extra\n').full_path
    with self.assertRaisesRegex(ValueError, "s.md:3: section 'extra'"):
      scaffold.load(path)
    path = self.create_tempfile('t.md', '# system\nHi\n').full_path
    with self.assertRaisesRegex(ValueError, 'no section tools, rules'):
      scaffold.load(path)
    text = '# system\nHi. {rules}\n# tools\nsql: Run.\n# rules\na: Be brief.\n'
    path = self.create_tempfile('u.md', text).full_path
    self.assertEqual(scaffold.load(path).system, 'Hi. Be brief.')
    unsaid = self.create_tempfile('v.md', text.replace('{rules}', ''))
    with self.assertRaisesRegex(ValueError, 'v.md: # rules has a, but'):
      scaffold.load(unsaid.full_path)
    with self.assertRaisesRegex(ValueError, 'finish'):
      whitebox.opening(config.PromptConfig(scaffold=path))


if __name__ == '__main__':
  absltest.main()
