"""What token rounding saves of the expert layer, and what it costs.

    python -m tests.bench.rounding [--tokens T ...] [--tiles R ...]
      [--routings R ...] [--part NAME] [--out FOLDER]

Needs one Hopper GPU and PyTorch. Both contenders start from the scores of all
experts: `top_k` chooses M2's 8 and runs the layer; `rounded` chooses spare ones
too, rounds each expert's tokens to whole tiles, and runs the layer on what is
left. `both` adds the gradients of scores, tokens and matrices. `choose` is the
part before the layer alone. `changed` is the share of choices that rounding
drops, and adds, of all; `rows` what the layer multiplies in either.
"""

import argparse
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402  (reads the environment above when imported)
import jax.numpy as jnp  # noqa: E402

import pallas_kernels  # noqa: E402
from pallas_kernels.experts import mosaic_gpu  # noqa: E402
from tests.bench import moe, record, timing  # noqa: E402

EXPERTS = 256
ROUTINGS = ('uniform', 'zipf')


def scores(tokens: int, routing: str) -> jax.Array:
  """Sigmoid scores whose largest are the choices of `moe.operands`."""
  key = jax.random.key(tokens)
  logit_ME = jax.random.normal(key, (tokens, EXPERTS))
  if routing == 'zipf':
    logit_ME -= 0.25 * jnp.log(jnp.arange(1.0, EXPERTS + 1))
  return jax.nn.sigmoid(logit_ME)


def choose(score_ME: jax.Array, tile: int) -> pallas_kernels.Routing:
  """M2's experts of each token, rounded to tiles; 0 is without."""
  none_E = jnp.zeros(EXPERTS)
  if not tile:
    return pallas_kernels.route(score_ME, none_E, top_k=moe.TOP_K)
  spare = pallas_kernels.spare_choices(len(score_ME), EXPERTS, moe.TOP_K, tile)
  routing = pallas_kernels.route(score_ME, none_E, top_k=moe.TOP_K + spare)
  rank_MX = jnp.take_along_axis(score_ME, routing.index_MX, axis=1)
  return pallas_kernels.round_tokens(
    routing, rank_MX, EXPERTS, top_k=moe.TOP_K, tile=tile
  )


def layer(tile: int, score_ME, x_MD, *matrices) -> jax.Array:
  routing = choose(score_ME, tile)
  rows = routing.index_MX.size
  if tile:
    most = pallas_kernels.rounded_rows(len(x_MD), EXPERTS, moe.TOP_K, tile)
    rows = min(rows, most)
  return pallas_kernels.experts(x_MD, *routing, *matrices, rows=rows)


def pull_back(tile: int, *operands) -> tuple[jax.Array, ...]:
  *given, dy_MD = operands
  y_MD, pull = jax.vjp(functools.partial(layer, tile), *given)
  return y_MD, *pull(dy_MD)


PARTS: dict[str, Callable] = {
  'choose': lambda tile, score_ME, *_: choose(score_ME, tile),
  'forward': lambda tile, *z: layer(tile, *z[:-1]),
  'both': pull_back,
}


def measure(tokens: int, routing: str, tile: int) -> Iterator[dict[str, Any]]:
  """Rows of the table: each part."""
  arrays = moe.operands(moe.Case(tokens, EXPERTS, routing))
  names = 'x', 'wi_0', 'wi_1', 'wo', 'dy'
  operands = scores(tokens, routing), *(arrays[name] for name in names)
  own = choose(operands[0], 0).index_MX
  kept = choose(operands[0], tile).index_MX
  counts = [
    jnp.bincount(z.reshape(-1), length=EXPERTS + 1) for z in (own, kept)
  ]
  plain, whole = (jax.device_get(n[:EXPERTS]) for n in counts)
  if (whole % tile).any():
    raise RuntimeError(f'{tile=}: an expert has {whole.max()} tokens')
  dropped = float((kept[:, : moe.TOP_K] == EXPERTS).mean())
  added = float((kept[:, moe.TOP_K :] < EXPERTS).sum() / own.size)
  for part, run in PARTS.items():
    calls = {}
    for name, size in (('top_k', 0), ('rounded', tile)):
      program = timing.compile(
        f'{part} {name}', functools.partial(run, size), *operands
      )
      calls[name] = functools.partial(program, *operands)
    seconds = timing.race(calls)
    found = {name: z['median'] for name, z in seconds.items()}
    ratio = found['top_k'] / found['rounded']
    times = '  '.join(f'{name} {1e3 * s:.3f}' for name, s in found.items())
    print(
      f'{part:8} T={tokens:<6}{routing:8} tile {tile:<4} ms: {times}  '
      f'ratio {ratio:.3f}',
      flush=True,
    )
    yield {
      'part': part,
      'tokens': tokens,
      'experts': EXPERTS,
      'routing': routing,
      'tile': tile,
      'seconds': seconds,
      'speedup': ratio,
      'rows': {'top_k': int(plain.sum()), 'rounded': int(whole.sum())},
      'changed': {'dropped': dropped, 'added': added},
    }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default=record.RESULTS)
  parser.add_argument(
    '--tokens', type=int, nargs='*', default=[4096, 8192, 32768]
  )
  parser.add_argument('--tiles', type=int, nargs='*', default=[128])
  parser.add_argument('--routings', nargs='*', default=list(ROUTINGS))
  parser.add_argument('--part', default='')
  flags = parser.parse_args()
  if refusal := mosaic_gpu.refusal(
    jnp.dtype('bfloat16'), (moe.WIDE, moe.HIDDEN)
  ):
    raise SystemExit(f'rounding: {refusal}')
  rows = []
  cases = itertools.product(flags.tokens, flags.routings, flags.tiles)
  for case in cases:
    for found in measure(*case):
      rows.append(found)
      path = record.write(
        'rounding',
        jax.devices()[0].device_kind,
        rows,
        command=record.command('rounding'),
        folder=flags.out,
        part=flags.part,
      )
  print(path)


if __name__ == '__main__':
  main()
