"""The fused expert layer and its derivative, once for all backends.

What the backward pass keeps of a layer is its input and the pre-activations of
the rows; rows in expert order and activations are made again, and the output
of the down projection is never needed:

  y[m] = sum_x weight[m, x] * down(act)[place[m, x]],  act = silu(gate) * up

gives for the weight of a row the product <dact, act> over F, where dact is the
gradient of its activation before the weight (SonicMoE, arXiv 2512.14080,
section 4, has the same identity).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.links import layout
from pallas_kernels.permute import api as permute


class Backend(NamedTuple):
  """What a backend provides; P rows lie in groups with aligned starts.

  Rows of no group give zeros, and operands hold zeros there: the gather and the
  products leave them. After the last group that is true of `clear` rows; those
  that follow may hold anything, and nothing may come of them.

  Attributes:
    alignment: (rows, groups) -> multiple to which group starts are rounded up.
    up: (x_PD, wi_0_EDF, wi_1_EDF, sizes_E, *, align, save) -> gate_PF, up_PF,
      act_PF: the pre-activations, None unless `save`, and SwiGLU of them.
    down: (act_PF, wo_EFD, sizes_E, *, align) -> y_PD.
    down_backward: (dy_PD, wo_EFD, gate_PF, up_PF, weight_P, sizes_E, *, align)
      -> dgate_PF, dup_PF, scaled_PF, dweight_P: with dact = dy wo^T, the
      gradients of the pre-activations from weight * dact; weight * act; and
      float32 sums over F of dact * act.
    up_backward: (dgate_PF, dup_PF, wi_0_EDF, wi_1_EDF, sizes_E, *, align) ->
      dx_PD, the sum of both products.
    weight_gradient: (x_PK, dy_PN, sizes_E, *, align, out_dtype) -> dw_EKN.
    clear: rows after the last group that hold zeros; None = all of them.
    rows: (x_MD, plan, *, impl) -> what `up` takes for x_PD where nobody else
      needs it: the forward pass.
  """

  alignment: Callable[[int, int], int]
  up: Callable[..., tuple[jax.Array | None, jax.Array | None, jax.Array]]
  down: Callable[..., jax.Array]
  down_backward: Callable[..., tuple[jax.Array, ...]]
  up_backward: Callable[..., jax.Array]
  weight_gradient: Callable[..., jax.Array]
  clear: int | None = None
  rows: Callable[..., Any] = permute.gather


class Split(NamedTuple):
  """Experts split over a mesh axis, whose devices hold M tokens each.

  Attributes:
    axis: its name.
    links: what reaches the other devices.
  """

  axis: str
  links: layout.Links


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def experts(
  backend: Backend,
  impl: dispatch.Impl | None,
  split: Split | None,
  rows: int | None,
  x_MD: jax.Array,
  index_MX: jax.Array,
  weight_MX: jax.Array,
  wi_0_EDF: jax.Array,
  wi_1_EDF: jax.Array,
  wo_EFD: jax.Array,
) -> jax.Array:
  """See `pallas_kernels.experts.api.experts`; `impl` is of the permutation."""
  weights = wi_0_EDF, wi_1_EDF, wo_EFD
  tokens = x_MD, index_MX, weight_MX
  return inference(backend, impl, split, rows, *tokens, *weights)


def inference(
  backend: Backend,
  impl: dispatch.Impl | None,
  split: Split | None,
  rows: int | None,
  *operands: jax.Array,
) -> jax.Array:
  """`experts` without a derivative."""
  y_MD, _ = _apply(backend, impl, split, rows, *operands, save=False)
  return y_MD


def _align(backend, rows, index_MX, wi_0_EDF) -> int:
  return backend.alignment(rows or index_MX.size, wi_0_EDF.shape[0])


def _combine(impl, split, y_PD, plan, weight_MX):
  """Weighted sums of this device's tokens."""
  with jax.named_scope('combine'):
    if split:
      return split.links.combine(split.axis, y_PD, plan, weight_MX)
    return permute.combine(y_PD, plan, weight_MX, impl=impl)


def _apply(
  backend,
  impl,
  split,
  rows,
  x_MD,
  index_MX,
  weight_MX,
  wi_0_EDF,
  wi_1_EDF,
  wo_EFD,
  *,
  save,
):
  if split:
    with jax.named_scope('dispatch'):
      x_MD, index_MX, weight_MX = split.links.gather(
        split.axis, x_MD, index_MX, weight_MX
      )
    index_MX -= jax.lax.axis_index(split.axis) * wi_0_EDF.shape[0]
  align = _align(backend, rows, index_MX, wi_0_EDF)
  with jax.named_scope('plan'):
    plan = permute.plan(
      index_MX, wi_0_EDF.shape[0], align=align, rows=rows, impl=impl
    )
  with jax.named_scope('gather'):
    x_PD = backend.rows(x_MD, plan, impl=impl)
  gate_PF, up_PF, act_PF = backend.up(
    x_PD, wi_0_EDF, wi_1_EDF, plan.sizes_G, align=align, save=save
  )
  y_PD = backend.down(act_PF, wo_EFD, plan.sizes_G, align=align)
  y_MD = _combine(impl, split, y_PD, plan, weight_MX)
  return y_MD, (x_MD, plan, weight_MX, gate_PF, up_PF)


def _forward(
  backend,
  impl,
  split,
  rows,
  x_MD,
  index_MX,
  weight_MX,
  wi_0_EDF,
  wi_1_EDF,
  wo_EFD,
):
  weights = wi_0_EDF, wi_1_EDF, wo_EFD
  y_MD, kept = _apply(
    backend, impl, split, rows, x_MD, index_MX, weight_MX, *weights, save=True
  )
  return y_MD, (*kept, *weights)


def _backward(backend, impl, split, rows, residuals, dy_MD):
  x_MD, plan, weight_MX, gate_PF, up_PF, wi_0_EDF, wi_1_EDF, wo_EFD = residuals
  align = _align(backend, rows, weight_MX, wi_0_EDF)
  sizes_E = plan.sizes_G
  weight_P = (
    weight_MX.astype(jnp.float32)
    .reshape(-1)
    .at[plan.source_P]
    .get(mode='fill', fill_value=0)
  )
  dy_MD = dy_MD.astype(x_MD.dtype)
  if split:
    with jax.named_scope('dispatch'):
      (dy_MD,) = split.links.gather(split.axis, dy_MD)
  with jax.named_scope('gather'):
    dy_PD = permute.gather(dy_MD, plan, clear=backend.clear, impl=impl)
  dgate_PF, dup_PF, scaled_PF, dweight_P = backend.down_backward(
    dy_PD, wo_EFD, gate_PF, up_PF, weight_P, sizes_E, align=align
  )
  gradient = functools.partial(
    backend.weight_gradient, align=align, out_dtype=wo_EFD.dtype
  )
  dwo_EFD = gradient(scaled_PF, dy_PD, sizes_E)
  with jax.named_scope('gather'):
    x_PD = permute.gather(x_MD, plan, clear=backend.clear, impl=impl)
  dwi_0_EDF = gradient(x_PD, dgate_PF, sizes_E)
  dwi_1_EDF = gradient(x_PD, dup_PF, sizes_E)
  dx_PD = backend.up_backward(
    dgate_PF, dup_PF, wi_0_EDF, wi_1_EDF, sizes_E, align=align
  )
  dx_MD = _combine(impl, split, dx_PD, plan, jnp.ones_like(weight_MX))
  dweight_MX = dweight_P.at[plan.place_MX].get(mode='fill', fill_value=0)
  if split:  # of each choice one device has the gradient, the others zero
    dweight_MX = jax.lax.psum_scatter(dweight_MX, split.axis, tiled=True)
  return (
    dx_MD,
    None,
    dweight_MX.astype(weight_MX.dtype),
    dwi_0_EDF,
    dwi_1_EDF,
    dwo_EFD,
  )


experts.defvjp(
  dispatch.underivable('experts', _forward),
  dispatch.underivable('experts', _backward),
)
