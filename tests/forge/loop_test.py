"""The RL loop on a toy task: it learns, stays exact, and resumes cleanly."""

import dataclasses
import json
import os
import pathlib
import signal
import zlib
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from m2 import config, types
from m2.checkpoint import directory, store
from m2.data import tokenizer
from m2.forge import dataset, evaluate, loop, rollout
from m2.model import params as model_params
from m2.parallel import mesh as meshes
from m2.train import journal, optim, resume, signals
from m2.train import state as train_state

# Rollout against trainer, CPU float32 (issue 2).
MISMATCH = 1e-4
TOKENIZER = tokenizer.train(['say something now'], 272)
MODEL = config.ModelConfig(
  vocab=272,
  d_model=32,
  layers=1,  # loops do not care; a second makes programs half as large again
  heads=4,
  kv_heads=2,
  head_dim=8,
  rotary_dim=4,
  max_positions=64,
  experts=4,
  d_expert=16,
  top_k=2,
  min_k=2,
  dtype='float32',
  remat='none',
)


def settings(start: str, **changes) -> config.RunConfig:
  """A run of a few seconds; `forge`, `checkpoint` fields and others change."""
  forge = {'groups': 4, 'group_size': 8, 'in_flight': 4, 'row_tokens': 64}
  forge |= changes.pop('forge', {})
  checkpoint = {'init_from': start} | changes.pop('checkpoint', {})
  agent = {'max_turns': 2, 'max_new': 4} | changes.pop('agent', {})
  lr = changes.pop('lr', 3e-2)
  introspect = changes.pop('introspect', 0)
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
    log=config.LogConfig(every=100, introspect=introspect, tensorboard=False),
    tasks=config.TasksConfig(),
    agent=config.AgentConfig(**agent),
    engine=config.EngineConfig(slots=8, length=64, chunk=4),
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
    steps, messages = (
      [],
      [types.Message('system', 'now'), types.Message('user', task.prompt)],
    )
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
    self.save_start(lambda leaf: leaf)

  def save_start(self, change, extra=None, run='sft'):
    """Writes the checkpoint that runs start from, or that of another run."""
    mesh = meshes.make_mesh(None)
    params = model_params.init(MODEL, jax.random.key(0), mesh)
    state = train_state.start(
      jax.tree.map(change, params), mesh, optim.make(config.OptimConfig(), 1)
    )
    with store.Store(self.root / run / 'checkpoints') as checkpoints:
      checkpoints.save(state, None, step=0, extra=extra or {})

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
    state, rows = self.run_loop(settings(str(self.start), introspect=5))
    self.assertEqual(int(state.step), 12)
    self.assertLen(rows, 12)
    first = sum(row['reward/mean'] for row in rows[:3]) / 3
    last = sum(row['reward/mean'] for row in rows[-3:]) / 3
    self.assertGreater(last, first + 0.5)
    for row in rows:
      self.assertLess(row['mismatch/max'], MISMATCH)
      self.assertEqual(row['mismatch/fresh'], 1)
      self.assertEqual(row['stale/max'], 0)
      self.assertEqual(row['gateway/drifted'], 0)
      self.assertAlmostEqual(row['ratio/mean'], 1, delta=1e-3)
      self.assertGreater(row['tree/token_ratio'], 1.3)
    # New weights in every step; the last are those of the checkpoint.
    self.assertLen({row['sync/checksum'] for row in rows}, 12)
    meta = store.read_meta(self.root / 'rl' / 'checkpoints' / '12')
    saved = directory.of_params(meta).values()
    sums = np.array([leaf['sum'] for leaf in saved], np.uint32)
    self.assertEqual(rows[-1]['sync/checksum'], zlib.crc32(sums))
    records = (self.root / 'rl' / 'introspection.jsonl').read_text()
    self.assertEqual(
      [json.loads(line)['step'] for line in records.splitlines()],
      [5, 10, 12],
    )
    # The next stage finds tokenizer and weights here.
    again = loop.run(settings(str(self.start)), self.root / 'rl', None)
    self.assertEqual(int(again.step), 12)
    self.assertTrue((self.root / 'rl' / 'tokenizer.json').exists())

  def test_asynchronous_failing_killed_and_resumed(self):
    groups, flight = 2, 8
    cfg = settings(
      str(self.start),
      steps=8,
      lr=1e-3,
      forge={
        'groups': groups, 'in_flight': flight, 'window': 0.5, 'group_size': 4,
      },
      checkpoint={'every': 2},
    )  # fmt: skip
    lost = ('t0', 't5')  # whose workspaces break
    with self.assertRaisesRegex(RuntimeError, 'went down'):
      self.run_loop(cfg, fail_after=61, infra=lost)
    with store.Store(self.root / 'rl' / 'checkpoints') as checkpoints:
      saved = checkpoints.steps()[-1]
    self.assertIn(saved, (2, 4))
    before = [_index(id) for ids in self.taken[:saved] for id in ids]
    played = set(self.agents[0].played)
    _, rows = self.run_loop(cfg, infra=lost)
    trained = before + [_index(id) for ids in self.taken for id in ids]
    # Every prompt once: none twice, and none passed over but the failed ones
    # and those that were still in flight at the end.
    self.assertLen(trained, 16)
    self.assertLen(set(trained), 16)
    self.assertEmpty({0, 5} & set(trained))
    missing = set(range(max(trained))) - set(trained) - {0, 5}
    self.assertLessEqual(len(missing), 3)
    # Groups played again record under new names; nothing was written twice.
    self.assertEmpty(played & set(self.agents[0].played))
    self.assertEqual([row['step'] for row in rows], list(range(1, 9)))
    # Window of 4: at most N + W - 2 groups between submission and use.
    ages = [row['stale/max'] for row in rows]
    self.assertLessEqual(max(ages), (flight + 4 - 2) // groups)
    self.assertGreater(max(ages), 0)
    for row in rows:  # what is fresh agrees with the trainer here, too
      if row['mismatch/fresh']:
        self.assertLess(row['mismatch/max'], MISMATCH)
      else:
        self.assertIsNone(row['mismatch/max'])
    self.assertGreaterEqual(sum(row['env/dropped'] for row in rows), 1)

  @pytest.mark.heavy
  def test_a_bad_batch_is_met_again_until_it_is_left_out(self):
    forge = {'groups': 2, 'in_flight': 2, 'group_size': 4}
    given = {'steps': 3, 'checkpoint': {'every': 1}}
    draw = dataset.RolloutIterator.__next__

    def poisoned(batches):
      batch = draw(batches)
      if sorted(map(_index, self.taken[-1])) not in ([2, 3], [8, 9]):
        return batch
      tree = batch.tree.replace(
        advantage_Z=batch.tree.advantage_Z * float('nan')
      )
      return dataclasses.replace(batch, tree=tree)

    with mock.patch.object(dataset.RolloutIterator, '__next__', poisoned):
      for _ in range(2):
        cfg = settings(str(self.start), forge=forge, **given)
        with self.assertRaisesRegex(
          journal.TrainingError, 'step 2 is not finite.* forge.bad_batches=1'
        ):
          self.run_loop(cfg)
      forge['bad_batches'] = 1
      cfg = settings(str(self.start), forge=forge, **given)
      state, rows = self.run_loop(cfg)
      trained = [sorted(map(_index, ids)) for ids in self.taken]
      # What was left out before counts after a restart, too.
      cfg = settings(str(self.start), forge=forge, **given | {'steps': 5})
      with self.assertRaisesRegex(
        journal.TrainingError, 'step 4 is not finite.* forge.bad_batches=2'
      ):
        self.run_loop(cfg)
    self.assertEqual(int(state.step), 3)
    self.assertEqual([row['step'] for row in rows], [1, 2, 3])
    self.assertEqual([row['optim/left_out'] for row in rows], [0, 1, 1])
    self.assertEqual(trained, [[2, 3], [4, 5], [6, 7]])

  @pytest.mark.heavy
  def test_asked_to_stop_it_saves_after_the_step(self):
    sizes = {'groups': 2, 'in_flight': 2, 'group_size': 4}
    cfg = settings(
      str(self.start), steps=4, forge=sizes, checkpoint={'every': 10}
    )
    free = rollout.Rollouts.free

    def signalled(rollouts):
      if len(self.taken) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
      free(rollouts)

    with mock.patch.object(rollout.Rollouts, 'free', signalled):
      with self.assertRaises(signals.Stopped) as stopped:
        self.run_loop(cfg)
    self.assertEqual(stopped.exception.code, 143)
    before = [_index(id) for ids in self.taken for id in ids]
    state, rows = self.run_loop(cfg)
    self.assertEqual(int(state.step), 4)
    self.assertEqual([row['step'] for row in rows], [1, 2, 3, 4])
    after = [_index(id) for ids in self.taken for id in ids]
    self.assertLen(set(before + after), 8)  # each prompt once

  @parameterized.named_parameters(
    ('unmerged', {'merge': False}), ('replayed', {'replay': True})
  )
  @pytest.mark.heavy
  def test_a_run_that_is(self, forge):
    sizes = {'groups': 2, 'in_flight': 2, 'group_size': 4}
    cfg = settings(str(self.start), steps=2, forge=sizes | forge)
    _, rows = self.run_loop(cfg)
    for row in rows:
      self.assertLess(row['mismatch/max'], MISMATCH)
    if not cfg.forge.merge:
      self.assertEqual(rows[0]['tree/token_ratio'], 1)

  def test_weights_that_have_diverged_stop_the_run(self):
    self.save_start(lambda leaf: leaf * float('nan'))
    with self.assertRaisesRegex(ValueError, 'version 0 have diverged'):
      self.run_loop(settings(str(self.start), steps=3))

  @parameterized.parameters(
    ({'agent': {'temperature': 0.7}}, 'agent.temperature=0.7'),
    ({'agent': {'top_k': 40}}, 'agent.top_k=40'),
    ({'optim': {'accumulate': 2}}, 'optim.accumulate=2'),
    ({'forge': {'row_tokens': 63}}, 'forge.row_tokens=63 is below'),
    ({'checkpoint': {'init_from': ''}}, 'checkpoint.init_from is empty'),
  )
  def test_settings_that_cannot_work(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      loop.check(settings(str(self.start), **changes))

  def test_a_runner_that_is_not_installed(self):
    cfg = settings(str(self.start), forge={'runner': 'ray'})
    with mock.patch.object(loop.importlib.util, 'find_spec', lambda name: None):
      with self.assertRaisesRegex(ValueError, 'env.sh launch/ray.txt'):
        loop.check(cfg)

  def test_the_tokenizer_must_be_there(self):
    (self.start / 'tokenizer.json').unlink()
    with self.assertRaisesRegex(ValueError, 'no tokenizer.json in .*; copy'):
      self.run_loop(settings(str(self.start)))

  def test_another_tokenizer_than_the_weights_had(self):
    self.save_start(lambda leaf: leaf, {'tokenizer': 'another'})
    cfg = settings(str(self.start))
    asked = dataclasses.replace(
      cfg, mode='eval', eval=config.EvalConfig(tasks=1)
    )
    message = f'{TOKENIZER.fingerprint()}, and .* trained with another; put'
    for refused in (
      lambda: self.run_loop(cfg), lambda: evaluate.run(asked, self.root)
    ):  # fmt: skip
      with self.assertRaisesRegex(ValueError, message):
        refused()
    self.assertFalse((self.root / 'rl' / 'tokenizer.json').exists())

  def test_a_refused_start_leaves_the_tokenizer_of_the_run(self):
    cfg = settings(str(self.start))
    other = tokenizer.train(['another text altogether'], 272)
    other.save(self.root / 'rl' / 'tokenizer.json')
    self.save_start(lambda leaf: leaf, resume.note(cfg, other), 'rl')
    with self.assertRaisesRegex(ValueError, 'rl/checkpoints holds a run with'):
      self.run_loop(cfg)
    kept = tokenizer.load(self.root / 'rl').fingerprint()
    self.assertEqual(kept, other.fingerprint())


def _index(group: str) -> int:
  return int(group[1:].split('.')[0])


if __name__ == '__main__':
  absltest.main()
