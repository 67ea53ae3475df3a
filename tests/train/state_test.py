"""States are placed as their description says, on one device or eight."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from m2.parallel import mesh as meshes
from m2.train import optim
from m2.train import state as train_state
from tests.train import small


class StateTest(parameterized.TestCase):
  @parameterized.parameters(('adamw', 1), ('adamw', 8), ('muon', 8))
  def test_abstract_is_what_create_makes(self, name, devices):
    cfg = small.run_config(modules=1, optim={'name': name})
    mesh = meshes.make_mesh(
      small.EIGHT if devices == 8 else small.ONE, jax.devices()[:devices]
    )
    optimizer = optim.make(cfg.optim, cfg.steps)
    key = jax.random.key(3)
    state = train_state.create(cfg.model, key, mesh, optimizer)
    abstract = train_state.abstract(cfg.model, mesh, optimizer)
    self.assertEqual(jax.tree.structure(state), jax.tree.structure(abstract))
    wanted = small.leaves(abstract)
    for path, leaf in small.leaves(state).items():
      found = (leaf.shape, leaf.dtype, leaf.sharding)
      other = wanted[path]
      self.assertEqual(found, (other.shape, other.dtype, other.sharding), path)

  def test_moments_are_sharded_like_their_parameters(self):
    cfg = small.run_config()
    mesh = meshes.make_mesh(small.EIGHT, jax.devices())
    optimizer = optim.make(cfg.optim, cfg.steps)
    state = train_state.abstract(cfg.model, mesh, optimizer)
    leaves = small.leaves(state)
    moments = [p for p in leaves if p.endswith('mu/blocks/moe/wi_0')]
    self.assertLen(moments, 1)
    spec = leaves['params/blocks/moe/wi_0'].sharding.spec
    self.assertEqual(leaves[moments[0]].sharding.spec, spec)
    self.assertIn('expert', spec)

  def test_values_do_not_depend_on_the_mesh(self):
    cfg = small.run_config()
    optimizer = optim.make(cfg.optim, cfg.steps)
    one, eight = (
      train_state.create(cfg.model, jax.random.key(0), mesh, optimizer)
      for mesh in (
        meshes.make_mesh(small.ONE, jax.devices()[:1]),
        meshes.make_mesh(small.EIGHT, jax.devices()),
      )
    )
    jax.tree.map(
      np.testing.assert_array_equal, *jax.device_get((one.params, eight.params))
    )
    self.assertEqual(one.step, 0)


if __name__ == '__main__':
  absltest.main()
