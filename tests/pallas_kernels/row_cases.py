"""Rows in groups and their matrices, for the tests of every backend."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gmm import ref
from tests.pallas_kernels import programs

OWNERS = jax.jit(ref.group_of_rows, static_argnums=(1, 2))


def operands(sizes, align, rows, width, out):
  """Random bfloat16 operands; rows of no group hold NaN."""
  _, inside_M1, (x_MK, dy_MN) = rows_of(sizes, rows, (width, out), align)
  (w_GKN,) = matrices(len(sizes), (width, out))
  return x_MK, w_GKN, jnp.asarray(sizes, jnp.int32), dy_MN, inside_M1


def rows_of(sizes, rows, widths, align):
  """Owners, which rows have one, and random rows; those of nobody hold NaN."""
  rng = np.random.default_rng(rows)
  owner_P = np.asarray(OWNERS(np.asarray(sizes), rows, align))
  inside_P1 = (owner_P < len(sizes))[:, None]
  found = [rng.standard_normal((rows, width)) for width in widths]
  found = [np.where(inside_P1, z, np.nan) for z in found]
  return owner_P, inside_P1, [jnp.asarray(z, jnp.bfloat16) for z in found]


def matrices(groups, *shapes):
  """Random bfloat16 matrices, one of each shape a group."""
  rng = np.random.default_rng(groups)
  found = [rng.standard_normal((groups, *shape)) / 8 for shape in shapes]
  return [jnp.asarray(z, jnp.bfloat16) for z in found]


def cleared(*found):
  """In float32, and zeros for the NaN of rows of no group."""
  return [np.nan_to_num(np.float32(z)) for z in found]


def weights(inside_P1):
  """What each row counts: 0 where it is of no group."""
  chance_P = np.random.default_rng(0).uniform(size=len(inside_P1))
  return np.float32(np.where(inside_P1[:, 0], chance_P, 0))


def layer(tokens, width, hidden, elsewhere=0.2):
  """A layer of five experts: x, index, weight and three matrices."""
  rng = np.random.default_rng(tokens)
  x_MD = jnp.asarray(rng.standard_normal((tokens, width)), jnp.bfloat16)
  # Expert 3 gets nothing; index 5 is of no expert here.
  law = [*[(1 - elsewhere) / 4] * 4, elsewhere]
  index_MX = rng.choice([0, 1, 2, 4, 5], (tokens, 2), p=law)
  weight_MX = np.float32(rng.uniform(size=(tokens, 2)))
  wide, tall = (width, hidden), (hidden, width)
  return x_MD, index_MX, weight_MX, *matrices(5, wide, wide, tall)


def layer_with_gradients(run, x, index, weight, *matrices):
  """A layer's output, and the gradients of all but the choices."""
  dy = np.cos(np.arange(x.size)).reshape(x.shape)

  def call(x, weight, *others):
    *ws, index = others
    return run(x, index, weight, *ws)

  return programs.with_gradients(call, (x, weight, *matrices), dy, index)


def up(x_PD, wi_0, wi_1, owner_P):
  """Gate, up and activation of rows by the specification, in float32."""
  (x_PD,) = cleared(x_PD)
  gate, up = (
    np.einsum('pd,pdf->pf', x_PD, own(w, owner_P)) for w in (wi_0, wi_1)
  )
  return gate, up, gate / (1 + np.exp(-gate)) * up


def up_backward(dgate, dup, wi_0, wi_1, owner_P):
  """The gradient of rows by the specification, in float32."""
  return sum(
    np.einsum('pf,pdf->pd', dz, own(w, owner_P))
    for dz, w in zip(cleared(dgate, dup), (wi_0, wi_1))
  )


def down_backward(dy, wo, gate, up, weight_P, owner_P):
  """Gradients of gate and up, weighed activation, gradients of weights."""
  dy, gate, up = cleared(dy, gate, up)
  dact = np.einsum('pd,pfd->pf', dy, own(wo, owner_P))
  weight_P1 = weight_P[:, None]
  act, *dz = programs.with_gradients(
    lambda gate, up: jax.nn.silu(gate) * up, (gate, up), weight_P1 * dact
  )
  return *dz, weight_P1 * act, (dact * act).sum(1)


def own(w_EKN, owner_P):
  """Each row's own matrix in float32; any where it has none."""
  return np.float32(w_EKN)[np.minimum(owner_P, len(w_EKN) - 1)]


def assert_close(test, got, want, tolerance, name=None):
  """Same shape, finite, and near in norm."""
  got, want = np.float64(got), np.float64(want)
  test.assertEqual(got.shape, want.shape, name)
  test.assertTrue(np.isfinite(got).all(), name)
  error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)
  test.assertLess(error, tolerance, name)
