"""The RL loop on a toy task: it learns, stays exact, and resumes cleanly."""

import json
import pathlib
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from m2 import config, types
from m2.checkpoint import store
from m2.data import tokenizer
from m2.forge import loop, rollout
from m2.model import params as model_params
from m2.parallel import mesh as meshes
from m2.train import optim
from m2.train import state as train_state

# Rollout against trainer, CPU float32 (issue 2).
MISMATCH = 1e-4
TOKENIZER = tokenizer.train(['say something now'], 272)
MODEL = config.ModelConfig(
  vocab=272,
  d_model=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  rotary_dim=4,
  max_positions=128,
  experts=4,
  d_expert=16,
  top_k=2,
  min_k=2,
  dtype='float32',
  remat='none',
)


def settings(start: str, **changes) -> config.RunConfig:
  """A run of a few seconds; `forge`, `checkpoint` fields and others change."""
  forge = {'groups': 4, 'group_size': 8, 'in_flight': 4, 'row_tokens': 128}
  forge |= changes.pop('forge', {})
  checkpoint = {'init_from': start} | changes.pop('checkpoint', {})
  agent = {'max_turns': 2, 'max_new': 4} | changes.pop('agent', {})
  lr = changes.pop('lr', 1e-2)
  return config.RunConfig(
    mode='rl',
    model=MODEL,
    mesh=config.MeshConfig(data=1, fsdp=1, expert=1, tensor=1),
    optim=config.OptimConfig(
      lr=lr,
      warmup=1,
      weight_decay=0.0,
      bias_rate=0.0,
      **changes.pop('optim', {}),
    ),
    checkpoint=config.CheckpointConfig(**checkpoint),
    log=config.LogConfig(every=100, introspect=5, tensorboard=False),
    tasks=config.TasksConfig(),
    agent=config.AgentConfig(**agent),
    engine=config.EngineConfig(slots=32, length=128, chunk=4),
    forge=config.ForgeConfig(**forge),
    **{'steps': 12, 'seed': 1} | changes,
  )


class Tasks:
  def __getitem__(self, index):
    return types.Task(
      f't{index}', 'toy', 'even', 'train', 0, f'say {index % 3}', {}, ''
    )


class Agent:
  """Two turns; each is rewarded if its text starts with an even character."""

  def __init__(self, llm, fail_after=None, infra=()):
    self._llm, self._fail_after, self._infra = llm, fail_after, infra
    self.played = []

  async def play(self, task, episode, seed):
    self.played.append(episode)
    if self._fail_after is not None and len(self.played) > self._fail_after:
      raise RuntimeError('the machine went down')
    steps, messages = [], [types.Message('user', task.prompt)]
    for turn in range(2):
      message, _ = await self._llm.chat(
        episode, messages, None, types.Sampling(max_new=4, seed=seed + turn)
      )
      text = message.reasoning + message.content
      steps.append(float(bool(text) and ord(text[0]) % 2 == 0))
      messages += [message, types.Message('user', 'more')]
    outcome = types.Outcome.SCORE
    if task.id in self._infra:
      outcome, steps = types.Outcome.INFRA, []
    return types.Reward(episode, outcome, tuple(steps), passed=sum(steps) > 1)


class LoopTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.start = self.root / 'sft'
    self.start.mkdir()
    TOKENIZER.save(self.start / 'tokenizer.json')
    mesh = meshes.make_mesh(
      config.MeshConfig(data=1), devices=jax.devices()[:1]
    )
    self.enter_context(
      mock.patch.object(meshes, 'make_mesh', return_value=mesh)
    )
    state = train_state.start(
      model_params.init(MODEL, jax.random.key(0), mesh),
      mesh,
      optim.make(config.OptimConfig(), 1),
    )
    with store.Store(self.start / 'checkpoints') as checkpoints:
      checkpoints.save(state, None, step=0, extra={})

  def run_loop(self, cfg, workdir='rl', **agent):
    """Runs; returns the final state, the metrics and the trained groups."""
    taken, agents = [], []
    take = rollout.Rollouts.take

    async def logged(rollouts, count):
      ids = await take(rollouts, count)
      taken.append(ids)
      return ids

    def cast(cfg, llm):
      agents.append(Agent(llm, **agent))
      return agents[0], Tasks()

    folder = self.root / workdir
    folder.mkdir(exist_ok=True)
    self.taken, self.agents = taken, agents
    with mock.patch.object(rollout.Rollouts, 'take', logged):
      state = loop.run(cfg, folder, cast)
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    return state, [json.loads(line) for line in lines]

  def test_reward_rises_on_policy(self):
    state, rows = self.run_loop(settings(str(self.start)))
    self.assertEqual(int(state.step), 12)
    self.assertLen(rows, 12)
    first = sum(row['reward/mean'] for row in rows[:3]) / 3
    last = sum(row['reward/mean'] for row in rows[-3:]) / 3
    self.assertGreater(last, first + 0.3)
    for row in rows:
      self.assertLess(row['mismatch/max'], MISMATCH)
      self.assertEqual(row['mismatch/fresh'], 1)
      self.assertEqual(row['stale/max'], 0)
      self.assertEqual(row['gateway/drifted'], 0)
      self.assertAlmostEqual(row['ratio/mean'], 1, delta=1e-3)
      self.assertGreater(row['tree/token_ratio'], 1.5)
    records = (self.root / 'rl' / 'introspection.jsonl').read_text()
    self.assertEqual(
      [json.loads(line)['step'] for line in records.splitlines()], [5, 10, 12]
    )
    # The next stage finds tokenizer and weights here.
    again = loop.run(settings(str(self.start)), self.root / 'rl', None)
    self.assertEqual(int(again.step), 12)
    self.assertTrue((self.root / 'rl' / 'tokenizer.json').exists())

  def test_many_in_flight_stay_within_the_bound(self):
    groups, flight, share = 2, 8, 0.5
    cfg = settings(
      str(self.start),
      steps=10,
      lr=1e-3,
      forge={'groups': groups, 'in_flight': flight, 'window': share},
    )
    _, rows = self.run_loop(cfg)
    # Window of 4: at most N + W - 2 groups between submission and use.
    bound = (flight + 4 - 2) // groups
    self.assertLessEqual(max(row['stale/max'] for row in rows), bound)
    self.assertGreater(max(row['stale/max'] for row in rows), 0)
    trained = sorted(_index(id) for ids in self.taken for id in ids)
    self.assertLen(set(trained), 20)
    for row in rows:  # what is fresh agrees with the trainer here, too
      self.assertLess(row['mismatch/max'], MISMATCH)

  def test_a_killed_run_trains_on_every_prompt_once(self):
    cfg = settings(
      str(self.start),
      steps=6,
      forge={'groups': 2, 'in_flight': 4, 'window': 1.0, 'group_size': 4},
      checkpoint={'every': 2},
    )
    with self.assertRaisesRegex(RuntimeError, 'went down'):
      self.run_loop(cfg, fail_after=41)
    with store.Store(self.root / 'rl' / 'checkpoints') as checkpoints:
      saved = checkpoints.steps()[-1]
    self.assertIn(saved, (2, 4))
    before = [_index(id) for ids in self.taken[:saved] for id in ids]
    played = set(self.agents[0].played)
    _, rows = self.run_loop(cfg)
    after = [_index(id) for ids in self.taken for id in ids]
    trained = before + after
    self.assertLen(trained, 12)
    self.assertLen(set(trained), 12)
    # Nothing was passed over: what is missing was still in flight at the end.
    missing = set(range(max(trained))) - set(trained)
    self.assertLessEqual(len(missing), 3)
    self.assertEqual([row['step'] for row in rows], [1, 2, 3, 4, 5, 6])
    # Replayed groups record under new names; nothing was written twice.
    self.assertEmpty(played & set(self.agents[0].played))

  def test_groups_without_scores_are_dropped(self):
    cfg = settings(
      str(self.start),
      steps=2,
      forge={'groups': 2, 'in_flight': 2, 'group_size': 4},
    )
    _, rows = self.run_loop(cfg, infra=('t0', 't2'))
    trained = {_index(id) for ids in self.taken for id in ids}
    self.assertEqual(trained & {0, 2}, set())
    self.assertLen(trained, 4)
    self.assertEqual(sum(row['env/dropped'] for row in rows), 2)
    self.assertEqual(sum(row['env/infra'] for row in rows), 8)

  @parameterized.parameters(({'merge': False}, None), ({'replay': True}, None))
  def test_unmerged_and_replayed_runs(self, forge, _):
    sizes = {'groups': 2, 'in_flight': 2, 'group_size': 4}
    cfg = settings(str(self.start), steps=2, forge=sizes | forge)
    _, rows = self.run_loop(cfg)
    for row in rows:
      self.assertLess(row['mismatch/max'], MISMATCH)
    if not cfg.forge.merge:
      self.assertEqual(rows[0]['tree/token_ratio'], 1)

  def test_bad_weights_stop_the_run(self):
    cfg = settings(str(self.start), steps=3, lr=1e30)
    with self.assertRaisesRegex(ValueError, 'version 1 have diverged'):
      self.run_loop(cfg)

  @parameterized.parameters(
    ({'agent': {'temperature': 0.7}}, 'agent.temperature=0.7'),
    ({'agent': {'top_k': 40}}, 'agent.top_k=40'),
    ({'optim': {'accumulate': 2}}, 'optim.accumulate=2'),
    ({'forge': {'row_tokens': 64}}, 'forge.row_tokens=64 is below'),
    ({'checkpoint': {'init_from': ''}}, 'checkpoint.init_from is empty'),
  )
  def test_settings_that_cannot_work(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      loop.check(settings(str(self.start), **changes))

  def test_the_tokenizer_must_be_there(self):
    (self.start / 'tokenizer.json').unlink()
    with self.assertRaisesRegex(ValueError, 'no tokenizer.json there'):
      self.run_loop(settings(str(self.start)))


def _index(group: str) -> int:
  return int(group[1:].split('.')[0])


if __name__ == '__main__':
  absltest.main()
