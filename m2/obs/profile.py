"""How fast a run could be: share of the device's peak, traces on demand.

`touch <workdir>/trace` while a run goes on: it traces its next steps into
`<workdir>/traces/<step>` (open with TensorBoard or Perfetto).
"""

import pathlib
from collections.abc import Callable

TRACED_STEPS = 3

# Dense bf16 peak, FLOP/s a JAX device, by the device's kind (makers' data
# sheets: cloud.google.com/tpu/docs, H100 and H200 data sheets, SXM without
# sparsity).
PEAKS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}


def train_flops(
  parameters: int, layers: int, heads: int, head_dim: int, length: int
) -> float:
  """Model FLOPs to train on one token, recomputation left out.

  Args:
    parameters: those a token passes through, embedding lookup left out.
    layers: attention layers.
    heads: query heads.
    head_dim: width of a head.
    length: tokens of a row; a token attends to half of them on average.

  Returns:
    6 a parameter, and 6 * heads * head_dim * length a layer: two products of
    2 * length / 2 multiply-adds each way, three times (arXiv 2204.02311,
    appendix B, with the causal half).
  """
  return 6.0 * parameters + 6.0 * layers * heads * head_dim * length


def mfu(
  tokens_per_second: float, flops: float, kind: str, devices: int
) -> float | None:
  """Share of the devices' peak that the model's own FLOPs make up.

  Args:
    tokens_per_second: over all devices.
    flops: a token, from `train_flops`.
    kind: `jax.Device.device_kind`.
    devices: how many.

  Returns:
    A share in [0, 1], or None for a kind whose peak is not in `PEAKS`.
  """
  peak = PEAKS.get(kind)
  return tokens_per_second * flops / (peak * devices) if peak else None


class Tracer:
  """Starts and stops a trace when a file asks for one."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    start: Callable[[str], None],
    stop: Callable[[], None],
  ):
    """Watches `<workdir>/trace`.

    Args:
      workdir: of the run.
      start: begins a trace in a directory (`jax.profiler.start_trace`).
      stop: ends it (`jax.profiler.stop_trace`).
    """
    self._workdir = pathlib.Path(workdir)
    self._start, self._stop = start, stop
    self._until: int | None = None

  def before(self, step: int) -> None:
    """Call before each step."""
    if self._until is not None and step >= self._until:
      self.close()
    asked = self._workdir / 'trace'
    if self._until is None and asked.exists():
      asked.unlink(missing_ok=True)  # another host may have been quicker
      self._start(str(self._workdir / 'traces' / str(step)))
      self._until = step + TRACED_STEPS

  def close(self) -> None:
    """Ends a trace that is going on."""
    if self._until is not None:
      self._until = None
      self._stop()
