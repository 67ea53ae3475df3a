"""AdamW or Muon under a warm-up-stable-decay schedule.

Which rule moves a leaf depends on its name alone:

| leaves                          | adamw        | muon         | weight decay |
|---------------------------------|--------------|--------------|--------------|
| attention and expert matrices   | Adam         | Muon         | yes          |
| embed, head, router gate        | Adam         | Adam         | yes          |
| norms                           | Adam         | Adam         | no           |
| router bias, frozen leaves      | never moved  | never moved  | no           |

The router bias has no gradient; `m2.train.step` moves it by the balancing rule.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m2 import config
from m2.parallel import sharding

# Leaf name -> axes summed over in x @ W and axes of the output; the other axes
# (layer, expert) are a batch of matrices, each orthogonalised by itself.
MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
  'q': ((1,), (2, 3)),
  'k': ((1,), (2, 3)),
  'v': ((1,), (2, 3)),
  'o': ((1, 2), (3,)),
  'wi_0': ((2,), (3,)),
  'wi_1': ((2,), (3,)),
  'wo': ((2,), (3,)),
  'proj': ((1,), (2,)),
}
TABLES = ('embed', 'head', 'gate')
NEVER = ('bias',)  # selection only: no gradient reaches it

# Momentum of Muon and the update size that lets it share AdamW's learning rate
# and weight decay (arXiv 2502.16982, section 2.2).
MUON_BETA = 0.95
MUON_RMS = 0.2


def name_of(path: tuple) -> str:
  """The last key of a leaf's path."""
  return sharding.name_of(path).rsplit('/')[-1]


def _by_name(tree: Any, rule: Callable[[str], Any]) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rule(name_of(path)), tree
  )


def trained(cfg: config.OptimConfig, params: Any) -> Any:
  """Which leaves of `params` the optimiser moves, as a tree of bools."""

  def rule(path, _):
    inside = cfg.train_only == 'all' or path[0].key == cfg.train_only
    return inside and name_of(path) not in NEVER

  return jax.tree_util.tree_map_with_path(rule, params)


def freeze(cfg: config.OptimConfig, params: Any) -> Any:
  """`params` with no gradient through the leaves that stay as they are."""
  return jax.tree.map(
    lambda leaf, moves: leaf if moves else jax.lax.stop_gradient(leaf),
    params,
    trained(cfg, params),
  )


def decay_steps(cfg: config.OptimConfig, steps: int) -> int:
  """Length of the decay phase at the end of a run of `steps` steps."""
  return round(cfg.decay * steps)


def decayed(cfg: config.OptimConfig, steps: int, step: jax.Array) -> jax.Array:
  """How far into the decay phase `step` is: 0 before it, 1 at the last step."""
  length = decay_steps(cfg, steps)
  if not length:
    return jnp.zeros((), jnp.float32)
  passed = jnp.asarray(step, jnp.float32) - (steps - 1 - length)
  return jnp.clip(passed / length, 0.0, 1.0)


def schedule(
  cfg: config.OptimConfig, steps: int
) -> Callable[[jax.Array], jax.Array]:
  """Learning rate by step: linear warm-up, stable, linear decay.

  Step 0 already moves (1 / warmup of the peak), and the last step uses
  `final` of the peak. Where a short run makes both ramps meet, the product of
  the two holds.
  """

  def rate(step: jax.Array) -> jax.Array:
    begun = jnp.asarray(step, jnp.float32) + 1
    warm = jnp.minimum(begun / max(cfg.warmup, 1), 1.0)
    return cfg.lr * warm * (1 - (1 - cfg.final) * decayed(cfg, steps, step))

  return rate


def make(cfg: config.OptimConfig, steps: int) -> optax.GradientTransformation:
  """The optimiser of a run of `steps` steps.

  Gradients are clipped by their global norm over the leaves that move. Leaves
  that never move get a zero update and no moments.
  """
  rules = {'adamw': _adamw, 'muon': _muon}
  moving = optax.chain(
    optax.clip_by_global_norm(cfg.clip),
    rules[cfg.name](cfg),
    optax.add_decayed_weights(
      cfg.weight_decay,
      lambda tree: _by_name(tree, lambda n: n in MATRICES or n in TABLES),
    ),
    optax.scale_by_learning_rate(schedule(cfg, steps)),
  )

  def label(params: Any) -> Any:
    return jax.tree.map(
      lambda moves: 'move' if moves else 'stay', trained(cfg, params)
    )

  return optax.partition({'move': moving, 'stay': optax.set_to_zero()}, label)


def _adamw(cfg: config.OptimConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.moment)


def _muon(cfg: config.OptimConfig) -> optax.GradientTransformation:
  """Muon on attention and expert matrices, Adam on everything else."""

  def dims(tree: Any) -> Any:
    return _by_name(
      tree, lambda name: optax.contrib.MuonDimensionNumbers(*MATRICES[name])
    )

  orthogonal = optax.contrib.scale_by_muon(
    beta=MUON_BETA, mu_dtype=cfg.moment, weight_dimension_numbers=dims
  )
  return optax.partition(
    {
      'muon': optax.chain(_automatic(orthogonal), _equal_rms()),
      'adam': _adamw(cfg),
    },
    lambda tree: _by_name(tree, lambda n: 'muon' if n in MATRICES else 'adam'),
  )


def _equal_rms() -> optax.GradientTransformation:
  """Scales orthogonal matrices to the root-mean-square size of Adam's steps."""

  def scale(path, x):
    axes = MATRICES[name_of(path)]
    sizes = [math.prod(x.shape[axis] for axis in group) for group in axes]
    return x * (MUON_RMS * max(sizes) ** 0.5)

  return optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates)
  )


def _automatic(
  transform: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Lets the compiler place the matrix products of `transform`.

  Newton-Schulz multiplies a matrix with its own transpose, for which explicit
  axes would need a choice at every product; results keep their shardings.
  """

  def update(updates, state, params=None):
    if jax.sharding.get_abstract_mesh().empty:
      return transform.update(updates, state, params)
    out = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
    run = jax.sharding.auto_axes(transform.update, out_sharding=out)
    return run(updates, state)

  return optax.GradientTransformation(transform.init, update)
