"""Block-FP8 weights: float8_e4m3fn codes with one scale per 128 x 128 block.

The format of the released MiniMax-M2 checkpoints: a matrix [R, C] of codes and
a float32 matrix [ceil(R / 128), ceil(C / 128)] called `weight_scale_inv`; the
weight is code times scale, despite that name. Blocks at the right and bottom
edge may be ragged. Arrays here are NumPy: files are converted on the host,
large matrices by programs that XLA compiles for its processor.

Letters: R rows, C columns, r and c blocks along them, N = r * c blocks,
I and J rows and columns inside a block.
"""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from m2.checkpoint import host

BLOCK = 128
DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
MAX = 448.0  # the largest finite code

# Codes of the top binade. A block whose largest code is lower wastes a bit of
# every weight, so this is where each quantiser puts the largest weight.
_TOP = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
# Codes that are turned into weights together, about: by a program, whose calls
# cost, and by NumPy, whose many passes are to stay in the cache.
_STRIP, _PLAIN_STRIP = 2**21, 2**17
_TINY = np.finfo(np.float32).tiny
_NAN = 0x7FC00000


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
  """Shape of the scales of a matrix."""
  return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def broken(data: np.ndarray) -> bool:
  """Whether a code in bytes, uint8[N], is not a number: 0x7F or 0xFF."""
  # The largest numbers of 8 bits, with and without a sign.
  signed = data.view(np.int8)
  return data.max(initial=0) == 0xFF or signed.max(initial=0) == 0x7F


def dequantise(
  code_RC: np.ndarray,
  scale_rc: np.ndarray,
  out_RC: np.ndarray | None = None,
  first: tuple[int, int] = (0, 0),
) -> np.ndarray:
  """Weights of a quantised matrix, or of a rectangle cut out of one.

  Args:
    code_RC: float8_e4m3fn; may be a view, such as of a transpose.
    scale_rc: float32, as `scale_shape` says; those of the whole matrix.
    out_RC: where the weights go, in its own type; None = a new float32 array.
    first: row and column of the matrix at which `code_RC` begins.

  Returns:
    The weights, each the correctly rounded product (rounded once more where
    `out_RC` is not float32).
  """
  rows, columns = code_RC.shape
  if out_RC is None:
    out_RC = np.empty((rows, columns), np.float32)
  top, left = first
  scale_rC = np.repeat(scale_rc, BLOCK, axis=1)[:, left : left + columns]
  compiled = host.pays(code_RC.size) and not _faint(scale_rc)
  turn, most = (_compiled, _STRIP) if compiled else (_plain, _PLAIN_STRIP)
  # Strips of whole blocks, nearly all of one height: of one program.
  strips = -(-rows * columns // most)
  height = BLOCK * -(-rows // (BLOCK * max(1, strips)))
  start = 0
  while start < rows:
    block, inside = divmod(top + start, BLOCK)
    stop = min(rows, start + height - inside)
    scale = scale_rC[block : -(-(top + stop) // BLOCK)]
    out_RC[start:stop] = turn(code_RC[start:stop], scale, inside, out_RC.dtype)
    start = stop
  return out_RC


def _plain(code_RC, scale_rC, inside, dtype) -> np.ndarray:
  """Weights of rows that begin `inside` the first block, by NumPy."""
  del dtype
  scale_RC = np.repeat(scale_rC, BLOCK, axis=0)
  return _decode(code_RC) * scale_RC[inside : inside + len(code_RC)]


def _compiled(code_RC, scale_rC, inside, dtype) -> np.ndarray:
  """The same by XLA."""
  code = code_RC.view(np.uint8)
  if abs(code.strides[0]) < abs(code.strides[1]):  # the view of a transpose
    code = host.transpose(code.T)
  run = _program(code.shape, len(scale_rC), inside, dtype)
  return np.asarray(run(np.ascontiguousarray(code), scale_rC))


@host.once
def _program(shape, blocks, inside, dtype) -> Callable:
  """What `_compiled` runs, for arrays of these shapes."""
  rows, columns = shape

  def weights(code_RC, scale_rC):
    scale_rIC = jnp.broadcast_to(scale_rC[:, None], (blocks, BLOCK, columns))
    scale_RC = scale_rIC.reshape(blocks * BLOCK, columns)
    return (_values(code_RC) * scale_RC[inside : inside + rows]).astype(dtype)

  return host.compiled(
    weights,
    jax.ShapeDtypeStruct(shape, np.uint8),
    jax.ShapeDtypeStruct((blocks, columns), np.float32),
  )


def _values(code: jax.Array) -> jax.Array:
  """The float32 values of uint8 codes, by way of normal numbers alone."""
  size = (code & 0x7F).astype(jnp.int32)
  # Bits move to their places; 120 is the difference of the exponents' biases.
  # Below 2^-6 codes are multiples of 2^-9.
  fine = jax.lax.bitcast_convert_type(
    size.astype(jnp.float32) * np.float32(2.0**-9), jnp.int32
  )
  bits = jnp.where(size < 8, fine, (size << 20) + (120 << 23))
  bits |= (code & 0x80).astype(jnp.int32) << 24
  bits = jnp.where(size == 0x7F, _NAN, bits)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _faint(scale_rc: np.ndarray) -> bool:
  """Whether weights may lie below the normal numbers, which XLA makes zeros."""
  size_rc = np.abs(scale_rc)
  return bool(((size_rc > 0) & (size_rc < _TINY * 2.0**9)).any())


def _decode(code: np.ndarray) -> np.ndarray:
  """The float32 values of codes, by their bits: ten times as fast as a cast.

  Sign, exponent and mantissa are moved to their places in a float32; the
  difference between the two exponents' biases is a factor of 2^120.
  """
  bits = code.view(np.int8).astype(np.int32)
  bits <<= 20
  bits &= np.int32(-(2**31) + 2**27 - 1)  # unset the copies of the sign
  value = bits.view(np.float32)
  value *= np.float32(2.0**120)
  size = code.view(np.uint8) & 0x7F
  if size.max(initial=0) == 0x7F:
    value[size == 0x7F] = np.nan
  return value


def quantise(weight_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Codes and scales of a matrix; undoes `dequantise` byte for byte.

  A block that was dequantised gets its own scale back, found by trying the few
  scales that could have produced its largest weight: the first that reproduces
  every weight exactly is taken. This recovers any scale that put the block's
  largest code above 224, as all that scale to the maximum do. Where the block
  is all zeros or leaves the top bit of its codes unused, the values do not tell
  the scale: the values stay exact and the bytes may differ. Any other block is
  scaled so that its largest weight gets the largest code.

  Args:
    weight_RC: float32 or bfloat16.

  Returns:
    float8_e4m3fn[R, C] and float32 scales, as `scale_shape` says.

  Raises:
    ValueError: a weight is infinite or not a number.
  """
  block_NIJ = _split(weight_RC.astype(np.float32))
  peak_N = np.abs(block_NIJ).max((1, 2))
  if not np.isfinite(peak_N).all():
    raise ValueError('FP8 cannot store weights that are infinite or NaN')
  # Scales below the normal range would divide by zero; 1 keeps zeros zero.
  scale_N = np.where(peak_N > 0, np.maximum(peak_N / MAX, _TINY), 1)
  scale_N = scale_N.astype(np.float32)
  _recover(block_NIJ, peak_N, scale_N)
  code_NIJ = _encode(block_NIJ, scale_N)
  shape = scale_shape(weight_RC.shape)
  return _join(code_NIJ, weight_RC.shape), scale_N.reshape(shape)


def _recover(block_NIJ, peak_N, scale_N) -> None:
  """Overwrites the scales of blocks that were quantised before."""
  left_N = np.flatnonzero(peak_N > 0)
  # Rounding moved code * scale by less than one unit in the last place of the
  # scale, so the quotient rounds to the scale or to a neighbour.
  for code, ulps in itertools.product(_TOP, (0, 1, -1)):
    if not left_N.size:
      break
    guess_N = (peak_N[left_N] / np.float32(code)).view(np.int32) + ulps
    # Below the smallest number lies NaN, which `fmax` passes over.
    guess_N = np.fmax(guess_N.view(np.float32), _TINY)
    # One row of a block rules out nearly every wrong guess, at 1/128 the work.
    fits_N = _exact(block_NIJ[left_N, :1], guess_N)
    fits_N[fits_N] = _exact(block_NIJ[left_N[fits_N]], guess_N[fits_N])
    scale_N[left_N[fits_N]] = guess_N[fits_N]
    left_N = left_N[~fits_N]


def _exact(block_NIJ, scale_N) -> np.ndarray:
  """Whether each block is what its codes at this scale stand for."""
  fits_N = np.empty(len(block_NIJ), bool)
  for some in _chunks(block_NIJ):
    value_NIJ = _decode(_encode(block_NIJ[some], scale_N[some]))
    value_NIJ *= scale_N[some, None, None]
    fits_N[some] = (value_NIJ == block_NIJ[some]).all((1, 2))
  return fits_N


def _chunks(block_NIJ) -> Iterator[slice]:
  """Slices of blocks that stay in the cache."""
  step = max(1, 2**17 // max(1, block_NIJ[:1].size))
  return (slice(i, i + step) for i in range(0, len(block_NIJ), step))


def _encode(block_NIJ, scale_N) -> np.ndarray:
  """The nearest codes, ties to even; by bits, as `_decode`."""
  code_NIJ = np.empty(block_NIJ.shape, np.uint8)
  for some in _chunks(block_NIJ):
    x_NIJ = block_NIJ[some] / scale_N[some, None, None]
    np.clip(x_NIJ, -MAX, MAX, out=x_NIJ)
    bits_NIJ = x_NIJ.view(np.uint32)
    sign_NIJ = (bits_NIJ >> 24).astype(np.uint8) & 0x80
    size_NIJ = np.abs(x_NIJ)
    # Below 2^-6 codes are multiples of 2^-9.
    least = np.float32(2.0**-6)
    fine_NIJ = np.rint(np.minimum(size_NIJ, least) * 512).astype(np.uint8)
    small_NIJ = size_NIJ < least
    bits_NIJ = size_NIJ.view(np.uint32)
    bits_NIJ += ((bits_NIJ >> 20) & 1) + np.uint32(0x7FFFF)
    bits_NIJ >>= 20
    bits_NIJ -= 120 << 3  # the difference of the biases
    coarse_NIJ = bits_NIJ.astype(np.uint8)
    code_NIJ[some] = np.where(small_NIJ, fine_NIJ, coarse_NIJ) | sign_NIJ
  return code_NIJ.view(DTYPE)


def _split(weight_RC: np.ndarray) -> np.ndarray:
  """[N, I, J] blocks, row by row, zeros beyond the edges.

  I and J are 128, or the whole of a smaller matrix.
  """
  rows, columns = weight_RC.shape
  r, c = scale_shape(weight_RC.shape)
  i, j = min(rows, BLOCK), min(columns, BLOCK)
  padded = np.zeros((r * i, c * j), weight_RC.dtype)
  padded[:rows, :columns] = weight_RC
  blocks_rIcJ = padded.reshape(r, i, c, j)
  return blocks_rIcJ.transpose(0, 2, 1, 3).reshape(r * c, i, j)


def _join(block_NIJ: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Undoes `_split`."""
  r, c = scale_shape(shape)
  _, i, j = block_NIJ.shape
  blocks_rcIJ = block_NIJ.reshape(r, c, i, j)
  padded = blocks_rcIJ.transpose(0, 2, 1, 3).reshape(r * i, c * j)
  return np.ascontiguousarray(padded[: shape[0], : shape[1]])
