"""Rows in groups and their matrices, for the tests of every backend."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gmm import ref


def operands(sizes, align, rows, width, out):
  """Random bfloat16 operands; rows of no group hold NaN."""
  keys = jax.random.split(jax.random.key(rows), 3)
  sizes_G = jnp.asarray(sizes, jnp.int32)
  inside_M1 = (ref.group_of_rows(sizes_G, rows, align) < len(sizes))[:, None]
  x_MK, w_GKN, dy_MN = (
    jax.random.normal(key, shape).astype(jnp.bfloat16)
    for key, shape in zip(
      keys, ((rows, width), (len(sizes), width, out), (rows, out))
    )
  )
  x_MK = jnp.where(inside_M1, x_MK, jnp.nan)
  return x_MK, w_GKN, sizes_G, jnp.where(inside_M1, dy_MN, jnp.nan), inside_M1


def rows_of(sizes, rows, widths, align):
  """Owners, which rows have one, and random rows; those of nobody hold NaN."""
  keys = jax.random.split(jax.random.key(rows), len(widths))
  owner_P = ref.group_of_rows(jnp.asarray(sizes), rows, align)
  inside_P1 = (owner_P < len(sizes))[:, None]
  found = [
    jnp.where(
      inside_P1,
      jax.random.normal(key, (rows, width)).astype(jnp.bfloat16),
      jnp.nan,
    )
    for key, width in zip(keys, widths)
  ]
  return owner_P, inside_P1, found


def matrices(groups, *shapes):
  """Random bfloat16 matrices, one of each shape a group."""
  keys = jax.random.split(jax.random.key(groups), len(shapes))
  return [
    (jax.random.normal(key, (groups, *shape)) / 8).astype(jnp.bfloat16)
    for key, shape in zip(keys, shapes)
  ]


def assert_close(test, got, want, tolerance):
  """Same shape, finite, and near in norm."""
  got, want = np.float64(got), np.float64(want)
  test.assertEqual(got.shape, want.shape)
  test.assertTrue(np.isfinite(got).all())
  error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)
  test.assertLess(error, tolerance)
