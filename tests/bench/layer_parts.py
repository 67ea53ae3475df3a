"""What the time of a routed expert layer is made of, kernel by kernel.

    python -m tests.bench.layer_parts [--out FOLDER] [--tokens T ...]

Needs one Hopper GPU. The layer runs as users run it, from router scores to the
weighted sum of the experts' rows, forward and with the gradients, at the shapes
of M2; JAX's profiler says how long each kernel took on the device, and the
program's named scopes what it was for: `route`, scores to choices; `plan`,
choices to places; `gather` and `combine`, rows copied to experts or back; the
rest are the experts' products and their schedules, in the backward pass with
the look-ups of routing weights. Time between kernels is in none of them. Run
without command buffers, which hide the scopes.
"""

import argparse
import collections
import glob
import gzip
import itertools
import json
import os
import pathlib
import re
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402  (reads the environment above when imported)
import jax.numpy as jnp  # noqa: E402

import pallas_kernels  # noqa: E402
from m2.plan import hlo  # noqa: E402
from pallas_kernels import hopper  # noqa: E402
from tests.bench import record  # noqa: E402

WIDTH, HIDDEN, TOP_K = 3072, 1536, 8
SCOPES = 'route', 'plan', 'gather', 'combine'
OPTIONS = {'xla_gpu_enable_command_buffer': ''}
TURNS = 30


def layer(score_ME, bias_E, x_MD, wi_0_EDF, wi_1_EDF, wo_EFD) -> jax.Array:
  """Router scores and tokens to the experts' sum."""
  with jax.named_scope('route'):
    routing = pallas_kernels.route(score_ME, bias_E, top_k=TOP_K)
  return pallas_kernels.experts(
    x_MD, *routing, wi_0_EDF, wi_1_EDF, wo_EFD, impl='mosaic_gpu'
  )


def both(score_ME, bias_E, x_MD, *matrices):
  """The layer and all its gradients."""
  y_MD, pull = jax.vjp(
    lambda score, x, *w: layer(score, bias_E, x, *w), score_ME, x_MD, *matrices
  )
  return y_MD, pull(x_MD)


def operands(tokens: int, experts: int, routing: str) -> tuple[jax.Array, ...]:
  """Scores, biases, tokens and matrices."""
  keys = jax.random.split(jax.random.key(tokens), 5)
  logit_ME = jax.random.gumbel(keys[0], (tokens, experts))
  if routing == 'zipf':
    logit_ME -= 0.5 * jnp.log(jnp.arange(1.0, experts + 1))

  def normal(key, *shape, scale=1.0):
    return scale * jax.random.normal(key, shape, jnp.bfloat16)

  wide, tall = (experts, WIDTH, HIDDEN), (experts, HIDDEN, WIDTH)
  return (
    jax.nn.sigmoid(logit_ME / 8),
    jnp.zeros(experts),
    normal(keys[1], tokens, WIDTH),
    normal(keys[2], *wide, scale=0.02),
    normal(keys[3], *wide, scale=0.02),
    normal(keys[4], *tall, scale=0.02),
  )


def kernels(call: Callable[[], Any]) -> dict[str, list[float]]:
  """Seconds on the device of every kernel of `call`, by HLO instruction."""
  jax.block_until_ready([call() for _ in range(3)])
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(TURNS):
        result = call()
      jax.block_until_ready(result)
    (path,) = glob.glob(f'{folder}/**/*.trace.json.gz', recursive=True)
    with gzip.open(path) as file:
      events = json.load(file)['traceEvents']
  streams = {
    (event['pid'], event['tid'])
    for event in events
    if event.get('name') == 'thread_name' and 'Stream' in event['args']['name']
  }
  found = collections.defaultdict(list)
  for event in events:
    if event.get('ph') == 'X' and (event['pid'], event['tid']) in streams:
      found[event['args']['hlo_op']].append(1e-6 * event['dur'])
  return found


def measure(tokens, experts, routing, direction) -> dict[str, Any]:
  """One row: seconds of each scope, and their share of all kernels."""
  arrays = operands(tokens, experts, routing)
  run = {'forward': layer, 'both': both}[direction]
  program = jax.jit(run).lower(*arrays).compile(compiler_options=OPTIONS)
  traced = hlo.parse(program.as_text()).by_name
  seconds = dict.fromkeys((*SCOPES, 'products'), 0.0)
  for name, samples in kernels(lambda: program(*arrays)).items():
    words = re.findall(r'\w+', traced[name].origin.rpartition('/')[0])
    scope = next((word for word in words if word in SCOPES), 'products')
    seconds[scope] += statistics.median(samples) * len(samples) / TURNS
  total = sum(seconds.values())
  return {
    'direction': direction,
    'tokens': tokens,
    'experts': experts,
    'routing': routing,
    'turns': TURNS,
    'seconds': seconds,
    'total': total,
    'share': 1 - seconds['products'] / total,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=record.RESULTS)
  parser.add_argument('--tokens', type=int, nargs='*', default=[8192, 32768])
  flags = parser.parse_args()
  if reason := hopper.refusal():
    raise SystemExit(f'layer_parts: {reason}')
  cases = itertools.product(
    flags.tokens, (256, 32), ('uniform', 'zipf'), ('forward', 'both')
  )
  rows = []
  for case in cases:
    rows.append(measure(*case))
    print(rows[-1], flush=True)
  print(
    record.write(
      'layer_parts',
      jax.devices()[0].device_kind,
      rows,
      command=record.command('layer_parts'),
      folder=flags.out,
    )
  )


if __name__ == '__main__':
  main()
