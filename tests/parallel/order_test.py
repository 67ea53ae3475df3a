"""Values that wait for each other: unchanged, and the same order everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from m2 import config
from m2.parallel import mesh, order, sharding
from tests.parallel import loops

AXES = (('batch', None), ('embed', None), (None, None), ('batch', None))


def values():
  """Arrays of several types and partitions, with what is not finite in them."""
  keys = jax.random.split(jax.random.key(0), 3)
  odd_8 = jnp.asarray([-0.0, 0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-40, 1, 2])
  arrays = (
    jnp.stack([odd_8] * 8),
    jax.random.normal(keys[1], (8, 4), jnp.bfloat16),
    jax.random.randint(keys[2], (3, 2), -9, 9),
    jnp.eye(8, dtype=bool),
  )
  return {
    str(at): sharding.place(x, *axes)
    for at, (x, axes) in enumerate(zip(arrays, AXES))
  }


class OrderTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    sizes = config.MeshConfig(data=2, fsdp=2, expert=2)
    self.enter_context(jax.set_mesh(mesh.make_mesh(sizes)))

  def test_nothing_changes(self):
    given = values()
    got = jax.jit(order.together)(given)
    for name, want in given.items():
      self.assertEqual(jax.typeof(got[name]), jax.typeof(want))
      self.assertEqual(
        np.asarray(got[name]).tobytes(), np.asarray(want).tobytes(), name
      )

  def test_gradients_pass(self):
    given = {name: values()[name] for name in '12'}
    given['0'] = sharding.place(jnp.arange(16.0).reshape(8, 2), 'batch', None)

    @jax.jit
    def gradient(given):
      def total(wrt):
        x = order.together(given | wrt)
        return jnp.sum(x['0'] ** 3) + jnp.sum(x['1'] * 2) + jnp.sum(x['2'])

      return jax.grad(total)({name: given[name] for name in '01'})

    got = gradient(given)
    np.testing.assert_array_equal(got['0'], 3 * given['0'] ** 2)
    np.testing.assert_array_equal(got['1'], np.full((8, 4), 2))
    self.assertEqual(jax.typeof(got['1']), jax.typeof(given['1']))

  def test_a_loop_is_waited_for(self):
    x_BD = sharding.place(jnp.ones((8, 16)), 'batch', None)

    def loop(x_BD):
      def body(x_BD, _):
        return jnp.sin(x_BD - x_BD.mean(0, keepdims=True)), None

      return jax.lax.scan(body, x_BD, length=3)[0]

    def program(wait):
      def run(x_BD, other_BD):
        y_BD, other_BD = wait((loop(x_BD), other_BD))
        return y_BD, loop(other_BD)

      return jax.jit(run).lower(x_BD, 2 * x_BD).compile().as_text()

    self.assertLen(loops.unordered(program(lambda pair: pair)), 1)
    self.assertEmpty(loops.unordered(program(order.together)))


class ElsewhereTest(absltest.TestCase):
  def test_without_several_cpus_it_is_the_identity(self):
    x = {'a': jnp.ones(3)}
    self.assertIs(order.together(x), x)
    one = mesh.make_mesh(config.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(one):
      self.assertIs(order.together(x), x)


if __name__ == '__main__':
  absltest.main()
