"""What the search offers fits by its own estimate, and is a real run."""

import math

from absl.testing import absltest

from configs import m2, plan
from m2 import config as settings
from m2.model import params
from m2.parallel import mesh as meshes
from m2.plan import chips, counts, flops, memory, search
from m2.train import optim
from m2.train import state as train_state

LINK = 10**11


def config(**leaves) -> settings.RunConfig:
  leaves = {'data__shards': 16} | leaves
  words = [f'{name.replace("__", ".")}={x}' for name, x in leaves.items()]
  return settings.RunConfig.from_config(m2.get_config(','.join(words)))


def planned(**sections) -> settings.RunConfig:
  """What configs/plan.py says, with some leaves of some sections changed."""
  tree = plan.get_config('')
  tree.mode = 'plan'
  for name, leaves in sections.items():
    tree[name].update(leaves)
  return settings.RunConfig.from_config(tree)


def rates(mesh):
  return {axis: LINK for axis in meshes.AXES}


class SearchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.run_config = config(data__batch=64, data__length=4096)
    self.target = chips.topology('v5p:4x4x4')

  def test_candidates_fit_and_divide(self):
    found = search.search(self.run_config, self.target, rates)
    self.assertNotEmpty(found)
    limit = search.FILL * self.target.chip.device_hbm
    for one in found:
      mesh = one.config.mesh
      sizes = [getattr(mesh, axis) for axis in meshes.AXES]
      self.assertEqual(math.prod(sizes), 64)
      self.assertLessEqual(one.memory.peak, limit)
      rows = mesh.data * mesh.fsdp * mesh.expert * one.config.optim.accumulate
      self.assertEqual(one.config.data.batch % rows, 0)
    apart = [one.apart for one in found]
    self.assertEqual(apart, sorted(apart))

  def test_moments_are_rounder_only_where_that_is_needed(self):
    found = search.search(self.run_config, self.target, rates)
    seen = {}
    for one in found:
      seen.setdefault(one.apart, []).append(one.config.optim.moment)
    both = [moments for moments in seen.values() if len(set(moments)) == 2]
    self.assertNotEmpty(both)
    for moments in both:
      self.assertEqual(moments, sorted(moments, reverse=True))  # float32 first

  def test_settings_are_a_command_line(self):
    best = search.search(self.run_config, self.target, rates)[0]
    leaves = dict(
      word.removeprefix('--config.').split('=')
      for word in best.settings().split()
    )
    again = m2.get_config(','.join(f'{k}={v}' for k, v in leaves.items()))
    frozen = settings.RunConfig.from_config(again)
    self.assertEqual(frozen.mesh, best.config.mesh)
    self.assertEqual(frozen.model.remat, best.config.model.remat)

  def test_nothing_fits_too_few_chips(self):
    small = chips.topology('v6e:4x4')
    run = config(data__batch=16, data__length=4096)
    self.assertEmpty(search.search(run, small, rates))

  def test_what_saves_memory_saves_memory(self):
    sizes = dict(zip(meshes.AXES, (1, 16, 4, 1, 1)))

    def peak(**leaves):
      run = config(data__batch=64, data__length=4096, **leaves)
      return memory.estimate(run, sizes, self.target.chip.kind).peak

    base = peak()
    self.assertLess(peak(model__remat='full'), base)
    self.assertLess(peak(optim__moment='bfloat16'), base)
    self.assertLess(base, peak(model__remat='none'))

  def test_moments_are_those_that_the_optimiser_makes(self):
    sizes = dict(zip(meshes.AXES, (1, 2, 4, 1, 1)))
    mesh = meshes.make_mesh(settings.MeshConfig(fsdp=2, expert=4))
    for leaves in (
      {'optim__name': 'adamw', 'optim__moment': 'bfloat16'},
      {'optim__name': 'muon'},
      {'optim__train_only': 'mtp', 'model__mtp_modules': 1, 'loss__mtp': 0.3},
    ):
      run = config(data__batch=64, data__length=4096, **leaves)
      found = memory.estimate(run, sizes, self.target.chip.kind).optimiser
      optimizer = optim.make(run.optim, run.steps)
      state = train_state.abstract(run.model, mesh, optimizer).opt_state
      self.assertAlmostEqual(found / memory.on_device(state), 1, places=4)


class UpdateTest(absltest.TestCase):
  """RL: the number of lines at once may change, and no number of parts."""

  def find(self, topology, **forge):
    run, target = planned(forge=forge), chips.topology(topology)
    found = search.search(run, target, rates, 'rl')
    for one in found:
      mesh = one.config.mesh
      sizes = [getattr(mesh, axis) for axis in meshes.AXES]
      self.assertEqual(math.prod(sizes), target.count)
      self.assertLessEqual(
        one.memory.peak, search.FILL * target.chip.device_hbm
      )
      rows = mesh.data * mesh.fsdp * mesh.expert
      self.assertEqual(one.config.forge.lines % rows, 0)
      self.assertEqual(one.config.forge.row_tokens, run.forge.row_tokens)
      self.assertEqual(one.config.optim.accumulate, run.optim.accumulate)
    return found

  def test_fewer_lines_where_all_at_once_do_not_fit(self):
    few = self.find('tpu7x:4x4x8', lines=256, row_tokens=8192)
    many = self.find('v5p:4x4x4', lines=1024, row_tokens=16384)
    self.assertEqual(few[0].config.forge.lines, 256)
    self.assertLess(many[0].config.forge.lines, 1024)
    self.assertIn(
      f'--config.forge.lines={many[0].config.forge.lines}', many[0].settings()
    )
    self.assertNotIn('accumulate', many[0].settings())

  def test_settings_are_a_command_line(self):
    best = self.find('v6e:16x16', lines=256, row_tokens=16384)[0]
    words = [w.removeprefix('--config.') for w in best.settings().split()]
    again = plan.get_config(','.join(words))
    again.forge.row_tokens = 16384
    run = settings.RunConfig.from_config(again)
    self.assertEqual(run.mesh, best.config.mesh)
    self.assertEqual(run.forge.lines, best.config.forge.lines)

  def test_estimate_is_near_what_the_compiler_said(self):
    run = planned(
      forge={'lines': 256, 'row_tokens': 8192},
      model={'expert_strategy': 'gather', 'expert_chunks': 1},
    )
    sizes = dict(zip(meshes.AXES, (1, 32, 8, 1, 1)))
    kind = chips.topology('tpu7x:4x4x8').chip.kind
    found = memory.estimate_rl(run, sizes, kind)
    planned_bytes = {'weights': 3.61, 'optimiser': 7.23, 'gradients': 7.23}
    planned_bytes |= {'batch': 0.05, 'residuals': 11.73}
    for name, size in planned_bytes.items():
      self.assertAlmostEqual(getattr(found, name) / 2**30, size, delta=0.01)
    self.assertBetween(found.peak / 2**30 / 49.67, 1, 1.2)


class ServingTest(absltest.TestCase):
  def find(self, topology, **engine):
    target = chips.topology(topology)
    run = planned(engine=engine)
    found = search.serving(run, target, rates)
    for one in found:
      mesh, served = one.config.plan, one.config.engine
      ways, left = divmod(target.count, mesh.rollout_tensor)
      self.assertEqual((left, ways % mesh.rollout_expert), (0, 0))
      self.assertEqual(served.slots % ways, 0)
      self.assertEqual(served.length, run.engine.length)
      self.assertLessEqual(
        one.memory.peak, search.SERVING_FILL * target.chip.device_hbm
      )
    return found

  def test_the_mesh_changes_before_what_is_served(self):
    best, *_ = self.find('v6e:4x4', slots=32, length=16384, fp8=True)
    self.assertEqual(best.config.engine.slots, 32)
    self.assertEqual(best.config.plan.rollout_expert, 4)
    self.assertEqual(best.config.plan.rollout_tensor, 4)

  def test_experts_stay_as_they_are_where_they_fit(self):
    large = self.find('v5p:2x2x4', slots=256, length=16384)
    self.assertFalse(large[0].config.engine.fp8)
    self.assertTrue(large[-1].config.engine.fp8)
    small = self.find('v5e:4x8', slots=512, length=16384)
    self.assertEqual({one.config.engine.fp8 for one in small}, {True})
    self.assertEmpty(self.find('v5e:2x4', slots=64, length=8192))

  def test_each_needs_less_than_the_one_before(self):
    found = self.find('v5e:4x8', slots=64, length=8192, prompts=64, fp8=True)
    # As many prompts at once as fit beside all slots, then fewer slots.
    self.assertEqual(found[0].config.engine.slots, 64)
    self.assertLess(found[0].config.engine.prompts, 64)
    peaks = [one.memory.peak for one in found]
    self.assertEqual(peaks, sorted(set(peaks), reverse=True))

  def test_settings_are_a_command_line(self):
    best, *_ = self.find('v5e:4x8', slots=512, length=8192)
    words = [w.removeprefix('--config.') for w in best.settings().split()]
    leaves = dict(word.split('=') for word in words)
    self.assertEqual(leaves['engine.fp8'], 'True')
    self.assertEqual(int(leaves['engine.slots']), best.config.engine.slots)

  def test_estimates_are_near_what_compilers_said(self):
    for axes, slots, length, decode, prefill in (
      ((1, 1, 4, 1, 4), 32, 16384, 27.3, 28.7),  # v6e:4x4
      ((1, 1, 8, 1, 4), 64, 8192, 14.4, 14.7),  # v5e:4x8
    ):
      engine = {'slots': slots, 'length': length, 'prompts': 8, 'fp8': True}
      run = planned(engine=engine)
      sizes = dict(zip(meshes.AXES, axes))
      for name, compiled in (('decode', decode), ('prefill', prefill)):
        found = memory.serving(run, sizes, name).peak / 2**30
        self.assertAlmostEqual(found / compiled, 1, delta=0.04)


class CountsTest(absltest.TestCase):
  def test_one_device_sends_nothing(self):
    run = config()
    work = counts.Work(run.model, dict.fromkeys(meshes.AXES, 1), 1, 4096)
    self.assertEmpty(counts.train(work))

  def test_gathers_of_experts(self):
    """By hand: 3 * 64 experts * 3072 * 1536 bfloat16, 16 ways, 62 layers."""
    run = config(model__expert_strategy='gather')
    sizes = dict(zip(meshes.AXES, (1, 16, 4, 1, 1)))
    work = counts.Work(run.model, sizes, 64, 4096, 1, 'TPU v5')
    (one,) = (
      x
      for x in counts.train(work)
      if (x.name, x.kind) == ('experts', 'all-gather')
    )
    self.assertEqual(one.size, 3 * 64 * 3072 * 1536 * 2)
    self.assertEqual((one.axes, one.times), (('fsdp',), 2 * 62))

  def test_flops_of_a_token(self):
    """6 FLOPs a parameter that a token passes, and the scores."""
    run = config()
    found = flops.per_token(run.model, 4096, training=True)
    active = params.active_count(run.model) + 3072 * 200_064
    scores = 6 * 62 * 48 * 128 * 4096
    # Norms and biases are no products.
    self.assertAlmostEqual(found.useful / (6 * active + scores), 1, places=3)
    self.assertGreater(found.done, found.useful)
    self.assertGreater(found.passes, found.done)
    # Three modules: as many layers, projections and heads more.
    more = flops.per_token(run.model, 4096, training=True, modules=3)
    extra = 3 * (found.useful - 6 * 3072 * 200_064) / 62
    extra += 3 * 6 * (3072 * 200_064 + 2 * 3072 * 3072)
    self.assertAlmostEqual((more.useful - found.useful) / extra, 1, places=6)


if __name__ == '__main__':
  absltest.main()
