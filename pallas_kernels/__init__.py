"""Kernels for sparse mixtures of experts, one folder an operation.

Each folder holds `api.py` (the public function), `ref.py` (the specification in
plain jnp; in `permute/` it is `xla.py`) and one file a backend. `links/`, which
moves rows between devices, has backends alone: `experts` is its interface.
Usable without the rest of this repository.
"""

from pallas_kernels.attention.api import attention
from pallas_kernels.decode.api import Quantized, decode_experts, dequantise
from pallas_kernels.decode.weights import quantised as quantise
from pallas_kernels.experts.api import experts
from pallas_kernels.gmm.api import grouped_matmul
from pallas_kernels.permute.api import (
  Permuted,
  Plan,
  combine,
  gather,
  permute,
  plan,
  unpermute,
)
from pallas_kernels.route.api import Routing, route
from pallas_kernels.route.rounding import (
  round_tokens,
  rounded_rows,
  spare_choices,
)

__all__ = [
  'Permuted',
  'Plan',
  'Quantized',
  'Routing',
  'attention',
  'combine',
  'decode_experts',
  'dequantise',
  'experts',
  'gather',
  'grouped_matmul',
  'permute',
  'plan',
  'quantise',
  'round_tokens',
  'rounded_rows',
  'route',
  'spare_choices',
  'unpermute',
]
