"""The routed feed-forward layer: SwiGLU experts on the tokens that chose them.

On GPUs and TPUs the layer is fused: gate and up projections are one pass that
ends in SwiGLU, and the backward pass keeps the input and the pre-activations
alone. In XLA it is composed of the public operations, whose derivatives keep
what they need.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.experts import mosaic_gpu, mosaic_tpu, vjp
from pallas_kernels.gmm import api as gmm
from pallas_kernels.links import mosaic_gpu as links_gpu
from pallas_kernels.links import xla as links_xla
from pallas_kernels.permute import api as permute


def experts(
  x_MD: Float[Array, 'M D'],
  index_MX: Int[Array, 'M X'],
  weight_MX: Float[Array, 'M X'],
  wi_0_EDF: Float[Array, 'E D F'],
  wi_1_EDF: Float[Array, 'E D F'],
  wo_EFD: Float[Array, 'E F D'],
  *,
  rows: int | None = None,
  transposed: bool = False,
  axis: str | None = None,
  impl: dispatch.Impl | None = None,
) -> Float[Array, 'M D']:
  """Sum over each token's experts of weight * (silu(x wi_0) * (x wi_1)) wo.

  Dropless and deterministic; products accumulate in float32, and so does the
  sum over a token's experts. With `axis`, what a device makes of a token is
  rounded to the dtype of the rows before the devices' shares are added.

  Args:
    x_MD: tokens; of the dtype of the matrices.
    index_MX: chosen experts; values outside [0, E) contribute nothing, such as
      unused slots or experts of another device.
    weight_MX: float32 mixing weights.
    wi_0_EDF: gate projections.
    wi_1_EDF: up projections.
    wo_EFD: down projections.
    rows: choices that contribute, at the most, for which room is made; None =
      M * X. The caller answers for it: those past it would be lost.
    transposed: the matrices are (out, in), [E, F, D] and [E, D, F], as in
      checkpoints. On TPUs they are not turned in memory then, and there is no
      derivative.
    axis: inside `shard_map`, a mesh axis over whose devices, in their order,
      the experts are split: each holds E of them and M tokens, whose indices
      count all devices' experts. Kernels write rows into the memory of the
      other GPU where a mesh is of the two of one process, or, asked for by
      name, of all it has; elsewhere XLA gathers and scatters them.
      `rows` are then the choices, of all tokens, of this device's experts;
      not together with `transposed`.
    impl: backend of the products; None picks the best for this platform. Rows
      that its kernels cannot move, XLA moves.

  Raises:
    ValueError: shapes or dtypes that do not match; `transposed` with `axis`.
    NotImplementedError: a backend forced by name that cannot do this, or a
      second derivative, which kernels do not have; XLA does.
  """
  x_MD, wi_0_EDF, wi_1_EDF, wo_EFD = map(
    jnp.asarray, (x_MD, wi_0_EDF, wi_1_EDF, wo_EFD)
  )
  index_MX = jnp.asarray(index_MX, jnp.int32)
  weight_MX = jnp.asarray(weight_MX, jnp.float32)
  matrices = wi_0_EDF, wi_1_EDF, wo_EFD
  widths = wi_0_EDF.shape[:0:-1] if transposed else wi_0_EDF.shape[1:]
  _check(x_MD, index_MX, weight_MX, *matrices, widths, transposed)
  if transposed and axis is not None:
    raise ValueError(f'{axis=}: experts that are split take no transposed ones')
  if not index_MX.size:
    return jnp.zeros_like(x_MD)
  refusals = {
    'mosaic_gpu': mosaic_gpu.refusal(x_MD.dtype, widths)
    if axis is None
    else split_refusal(x_MD.dtype, widths, named=impl is not None),
    'mosaic_tpu': mosaic_tpu.refusal(x_MD.dtype, widths),
  }
  table = TRANSPOSED if transposed else BACKENDS
  run = dispatch.pick('experts', impl, table, refusals)
  return run(axis, rows, x_MD, index_MX, weight_MX, *matrices)


def split_refusal(
  dtype: jnp.dtype, widths: tuple[int, int], *, named: bool
) -> str | None:
  """Why GPUs cannot write each other's rows for such a layer, or None.

  Args:
    dtype: of the tokens.
    widths: D, F.
    named: it is asked for, and so on more GPUs than it ever ran on.
  """
  return (
    mosaic_gpu.refusal(dtype, widths)
    or links_gpu.refusal(dtype, widths[0])
    or (None if named else _untried())
  )


def _untried() -> str | None:
  size = jax.sharding.get_abstract_mesh().size
  if size > 2:
    return f'never ran on {size} GPUs, only on two; it has to be named'
  return None


def _check(
  x_MD, index_MX, weight_MX, wi_0_EDF, wi_1_EDF, wo_EFD, widths, transposed
) -> None:
  (width, hidden), experts = widths, len(wi_0_EDF)
  if not experts:
    raise ValueError(f'wi_0 {wi_0_EDF.shape} holds no expert')
  down = (width, hidden) if transposed else (hidden, width)
  want = {
    'x': (x_MD, (x_MD.shape[0], width)),
    'weight': (weight_MX, index_MX.shape),
    'index': (index_MX, (x_MD.shape[0], *index_MX.shape[1:])),
    'wi_1': (wi_1_EDF, wi_0_EDF.shape),
    'wo': (wo_EFD, (experts, *down)),
  }
  for name, (found, shape) in want.items():
    if found.shape != shape:
      raise ValueError(
        f'{name} is {found.shape} and not {shape}, which wi_0 '
        f'{wi_0_EDF.shape}, x {x_MD.shape} and index {index_MX.shape} ask for'
      )
  dtypes = {z.dtype for z in (x_MD, wi_0_EDF, wi_1_EDF, wo_EFD)}
  if len(dtypes) > 1:
    raise ValueError(f'x and the matrices differ in dtype: {dtypes}')


def _fused(backend, links, run, axis, rows, *operands) -> jax.Array:
  """A backend's fused layer, of `vjp.experts` or `vjp.inference`."""
  split = None if axis is None else vjp.Split(axis, links)
  return run(backend, None, split, rows, *operands)


def _composed(axis, rows, x_MD, index_MX, weight_MX, *matrices) -> jax.Array:
  """The layer of XLA's operations."""
  if axis is None:
    return composed('xla', rows, x_MD, index_MX, weight_MX, *matrices)
  x_MD, index_MX, weight_MX = links_xla.gather(axis, x_MD, index_MX, weight_MX)
  index_MX -= jax.lax.axis_index(axis) * len(matrices[0])
  y_MD = composed('xla', rows, x_MD, index_MX, weight_MX, *matrices)
  return jax.lax.psum_scatter(y_MD, axis, scatter_dimension=0, tiled=True)


def composed(
  impl, rows, x_MD, index_MX, weight_MX, wi_0_EDF, wi_1_EDF, wo_EFD
) -> jax.Array:
  """The layer of the public operations, each of backend `impl`."""
  align = gmm.alignment(
    rows or index_MX.size,
    wi_0_EDF.shape[0],
    wi_0_EDF.shape[1:],
    x_MD.dtype,
    impl=impl,
  )
  sorted_rows = permute.permute(
    x_MD, index_MX, wi_0_EDF.shape[0], align=align, rows=rows, impl=impl
  )

  def product(x_PK, w_EKN):
    sizes_E = sorted_rows.sizes_G
    return gmm.grouped_matmul(x_PK, w_EKN, sizes_E, align=align, impl=impl)

  gate_PF = product(sorted_rows.x_PD, wi_0_EDF)
  hidden_PF = jax.nn.silu(gate_PF) * product(sorted_rows.x_PD, wi_1_EDF)
  y_PD = product(hidden_PF, wo_EFD)
  weight_MX = weight_MX.astype(jnp.float32)
  return permute.unpermute(y_PD, sorted_rows, weight_MX, impl=impl)


def _turned(run, axis, rows, x_MD, index_MX, weight_MX, *matrices) -> jax.Array:
  """Runs the layer on matrices that are turned first."""
  turned = (w.swapaxes(1, 2) for w in matrices)
  return run(axis, rows, x_MD, index_MX, weight_MX, *turned)


BACKENDS = {
  'mosaic_gpu': functools.partial(
    _fused, mosaic_gpu.BACKEND, links_gpu.LINKS, vjp.experts
  ),
  'mosaic_tpu': functools.partial(
    _fused, mosaic_tpu.BACKEND, links_xla.LINKS, vjp.experts
  ),
  'xla': _composed,
}
TRANSPOSED = {
  'mosaic_gpu': functools.partial(_turned, BACKENDS['mosaic_gpu']),
  'mosaic_tpu': functools.partial(
    _fused,
    mosaic_tpu.TRANSPOSED,
    links_xla.LINKS,
    dispatch.underivable('experts', vjp.inference),
  ),
  'xla': functools.partial(_turned, BACKENDS['xla']),
}
