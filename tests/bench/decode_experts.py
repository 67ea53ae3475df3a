"""M2's experts at decode, from one token to a few hundred, against peers.

    python -m tests.bench.decode_experts [--tune] [--out FOLDER]

Needs one Hopper GPU and PyTorch. What is timed is the expert layer after the
router: from tokens, chosen experts and their weights to the summed output, so
sorting and combining count. `CALLS` layers follow one another in one program,
each with its own draw of the routing and so its own experts, which keeps
weights out of the cache; the host queues such programs and waits for the last,
so that gaps between kernels count as they do in a model. PyTorch replays a CUDA
graph of the same. `share` is the bytes of the distinct experts' weights over
the time, divided by the rate at which the same run reads memory (`floor`).

A shard (`experts` 32 of 256) holds the first experts, and gets all choices.

`--tune` first times how to cut the products and writes the best to
`pallas_kernels/tiles.json`, which then holds for what follows. `--kernels`
lists what each kernel takes at 8 and 64 tokens.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

# JAX would otherwise keep three quarters of the memory from PyTorch.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402  (reads the environment above when imported)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import pallas_kernels  # noqa: E402
from pallas_kernels import tiles as tile_tables  # noqa: E402
from pallas_kernels.decode import mosaic_gpu  # noqa: E402
from tests.bench import record, timing  # noqa: E402
from tests.pallas_kernels import decode_cases  # noqa: E402

EXPERTS, WIDTH, HIDDEN, TOP_K = 256, 3072, 1536, 8
TOKENS = {256: (1, 2, 4, 8, 16, 32, 64, 128, 256), 32: (1, 8, 64, 256)}
ROUTINGS = ('uniform', 'zipf', 'eight')
FORMATS = {'bf16': 2, 'fp8': 1}  # bytes of a weight
CALLS = 4  # layers a program
MOST = 50  # programs of a round
TOLERANCE = 1e-2  # of bfloat16 results against each other, in norm
PROFILED = (8, 64)  # tokens at which more is looked at
CANDIDATES = {
  'bf16': tuple(
    tile_tables.DecodeTiles(columns, depth, tokens=128)
    for columns, depth in ((128, 64), (128, 128), (256, 64))
  ),
  'fp8': tuple(
    tile_tables.DecodeTiles(columns, depth)
    for columns, depth in ((128, 128), (128, 256), (256, 128))
  ),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One layer; `held` of the experts are here."""

  held: int
  tokens: int
  routing: str
  format: str

  def draws(self) -> np.ndarray:
    """int32[CALLS, M, X]: the experts that each layer's tokens choose."""
    rng = np.random.default_rng(self.tokens)
    law = np.ones(EXPERTS)
    if self.routing == 'zipf':
      law = rng.permutation(np.arange(1, EXPERTS + 1.0) ** -0.5)
    layers = []
    for call in range(CALLS):
      if self.routing == 'eight':
        law = np.arange(EXPERTS) // TOP_K == call
      # The largest of these are a draw without replacement.
      keys = rng.random((self.tokens, EXPERTS)) ** (1 / np.maximum(law, 1e-9))
      layers.append(np.argsort(-keys, axis=1)[:, :TOP_K])
    return np.stack(layers).astype(np.int32)

  def distinct(self) -> float:
    """Experts here that some token chose, in the mean over the layers."""
    found = [len(np.unique(z[z < self.held])) for z in self.draws()]
    return float(np.mean(found))

  @property
  def bytes(self) -> float:
    """Weights, and scales if there are any, of the distinct experts."""
    size = 3 * WIDTH * HIDDEN
    scales = 4 * size / 128**2 if self.format == 'fp8' else 0
    return self.distinct() * (size * FORMATS[self.format] + scales)


def inputs(case: Case) -> tuple[jax.Array, tuple, tuple]:
  """Tokens, each layer's choices, and what they count."""
  rng = np.random.default_rng(case.tokens + 1)
  x_MD = rng.standard_normal((case.tokens, WIDTH), np.float32)
  index = case.draws()
  weight = rng.dirichlet(np.ones(TOP_K), index.shape[:2]).astype(np.float32)
  layers = tuple(map(jnp.asarray, index)), tuple(map(jnp.asarray, weight))
  return jnp.asarray(x_MD, jnp.bfloat16), *layers


def chained(layer: Callable) -> Callable:
  """(x, indices, weights, *matrices) -> the result of `CALLS` layers."""

  def run(x, indices, weights, *matrices):
    for index, weight in zip(indices, weights):
      x = (x + layer(x, index, weight, *matrices)) / 2
    return x

  return run


def lower(layer: Callable, *args) -> Any:
  """A program of `CALLS` layers, to be compiled."""

  @jax.jit
  def ordered(x, index, weight, *matrices):
    # As in a model, nothing of a layer starts before the one below is done.
    tied = jax.lax.optimization_barrier((x, index, weight))
    return layer(*tied, *matrices)

  return jax.jit(chained(ordered)).lower(*args)


def torch_layer(x, index, weight, wi, wo):
  """The layer from PyTorch's operations; `wi` is gate and up side by side."""
  held = len(wi)
  expert, order = index.flatten().long().sort(stable=True)
  ends = torch.searchsorted(
    expert, torch.arange(held, device='cuda', dtype=expert.dtype), right=True
  )
  product = functools.partial(torch.nn.functional.grouped_mm, offs=ends.int())
  gate, up = product(x[order // TOP_K], wi).chunk(2, -1)
  y = product(torch.nn.functional.silu(gate) * up, wo)
  # Rows after the last group's are not written.
  y = torch.where((expert < held)[:, None], y, 0)
  y = y * weight.flatten()[order][:, None]
  back = torch.empty_like(order).scatter_(
    0, order, torch.arange(len(order), device='cuda')
  )
  return y[back].view(*index.shape, -1).sum(1).to(x.dtype)


def liger_layer() -> Callable | None:
  """(x, index, weight, wi [E, 2F, D], wo [E, D, F]) -> y, or None."""
  try:
    module = importlib.import_module('liger_kernel.ops.fused_moe')
  except ImportError:
    return None

  def layer(x, index, weight, wi, wo):
    run = module.LigerFusedMoEFunction.apply
    return run(x, wi, wo, index, weight.to(x.dtype))

  return layer


class Bench:
  """The weights, and programs compiled for them."""

  def __init__(self, held: int):
    self.held = held
    shape = decode_cases.Shape(held, WIDTH, HIDDEN)
    self.matrices = {
      name: decode_cases.matrices(jax.random.key(held), shape, name == 'fp8')
      for name in FORMATS
    }
    wi_0, wi_1, wo = map(torch.from_dlpack, self.matrices['bf16'])
    self.torch_matrices = torch.cat([wi_0, wi_1], -1), wo
    self.liger = liger_layer()
    if self.liger:
      wi = self.torch_matrices[0].transpose(1, 2).contiguous()
      self.liger_matrices = wi, wo.transpose(1, 2).contiguous()

  def programs(self, cases: Sequence[Case]) -> dict[tuple, Callable]:
    """(contender, tokens, format) -> compiled program; routing is data."""
    ours = functools.partial(pallas_kernels.decode_experts, impl='mosaic_gpu')
    lowered = {}
    for case in cases:
      layers = {'mosaic_gpu': ours}
      kind = self.held, case.format
      if kind == (EXPERTS, 'bf16') and case.tokens in PROFILED:
        layers['training path'] = pallas_kernels.experts  # for many tokens
      for name, layer in layers.items():
        key = name, case.tokens, case.format
        if key not in lowered:
          matrices = self.matrices[case.format]
          lowered[key] = lower(layer, *inputs(case), *matrices)
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      compiled = pool.map(lambda z: z.compile(), lowered.values())
      return dict(zip(lowered, compiled))

  def contenders(
    self, case: Case, programs: Mapping[tuple, Callable]
  ) -> dict[str, Callable[[], Any]]:
    """Name -> call of `CALLS` layers."""
    args = inputs(case)
    matrices = self.matrices[case.format]
    found = {
      name: functools.partial(program, *args, *matrices)
      for (name, tokens, format), program in programs.items()
      if (tokens, format) == (case.tokens, case.format)
    }
    if case.format == 'bf16':
      args = jax.tree.map(torch.from_dlpack, args)
      found['torch.grouped_mm'] = graphed(
        functools.partial(chained(torch_layer), *args, *self.torch_matrices)
      )
      # Liger's has no notion of experts elsewhere.
      if self.liger and self.held == EXPERTS:
        found['liger'] = functools.partial(
          chained(self.liger), *args, *self.liger_matrices
        )
    return found


def graphed(run: Callable) -> Callable:
  """A CUDA graph's replay of `run`, or `run` if it cannot be captured."""
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    for _ in range(2):
      run()
  torch.cuda.current_stream().wait_stream(stream)
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    result = run()

  def replay():
    graph.replay()
    return result

  return replay


def kernels(call: Callable) -> dict[str, float]:
  """Kernel -> microseconds a layer, launched by whomever in this process."""
  on_gpu = [torch.profiler.ProfilerActivity.CUDA]
  with torch.profiler.profile(activities=on_gpu) as profile:
    timing.timed(call, 5)
  return {
    event.key[:60]: event.device_time_total / (5 * CALLS)
    for event in profile.key_averages()
    if event.device_time_total
  }


def read_rate(w: jax.Array) -> float:
  """Bytes a second at which the better of two reductions reads memory."""
  total = jax.jit(lambda w: jnp.sum(w, dtype=jnp.float32))
  most = jax.jit(lambda w: jnp.max(w))
  same = torch.from_dlpack(w).view(torch.float32)
  calls = {'sum': lambda: total(w), 'max': lambda: most(w), 'torch': same.amax}
  return w.nbytes / min(
    z['median'] for z in timing.race(calls, most=MOST).values()
  )


def check(case: Case, calls: Mapping[str, Callable]) -> None:
  """Raises RuntimeError if contenders differ."""
  want = None
  for name, call in calls.items():
    got = call()
    got = np.float32(got if isinstance(got, jax.Array) else got.float().cpu())
    want = got if want is None else want
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    if not error < TOLERANCE:
      raise RuntimeError(f'{case}: {name} differs by {error:.2e}')


def measure(
  bench: Bench, case: Case, programs: Mapping, rate: float, listed: bool
) -> dict[str, Any]:
  """One row of the table, with the kernels' own times if `listed`."""
  calls = bench.contenders(case, programs)
  check(case, calls)
  seconds = timing.race(calls, most=MOST, parts=CALLS)
  ours = seconds['mosaic_gpu']['median']
  floor = case.bytes / rate
  row = dataclasses.asdict(case) | {
    'distinct': case.distinct(),
    'seconds': seconds,
    'floor_seconds': floor,
    'share': floor / ours,
    'speedup': {
      name: summary['median'] / ours
      for name, summary in seconds.items()
      if name != 'mosaic_gpu'
    },
  }
  if listed and case.tokens in PROFILED and case.routing == 'uniform':
    row['kernels'] = kernels(calls['mosaic_gpu'])
  times = '  '.join(f'{k} {1e6 * v["median"]:.1f}' for k, v in seconds.items())
  print(
    f'E={case.held:<4}B={case.tokens:<4}{case.routing:8}{case.format:5}'
    f'{row["distinct"]:6.1f} experts  share {100 * row["share"]:5.1f}%  floor '
    f'{1e6 * floor:.1f}  us: {times}',
    flush=True,
  )
  for name, value in row.get('kernels', {}).items():
    print(f'    {value:8.1f} us  {name}', flush=True)
  return row


def tune(bench: Bench, path: pathlib.Path) -> None:
  """Times `CANDIDATES` at 8 and 32 tokens; merges the best into `path`."""
  table = json.loads(path.read_text())
  entry = table.setdefault(jax.devices()[0].device_kind, {})
  for format, candidates in CANDIDATES.items():
    best = dict.fromkeys(('up_tiles', 'down_tiles'), candidates[0])
    for side in best:
      lowered = {}
      for tiles, count in itertools.product(candidates, PROFILED):
        layer = functools.partial(
          mosaic_gpu.decode_experts, **best | {side: tiles}
        )
        args = inputs(Case(bench.held, count, 'uniform', format))
        args += bench.matrices[format]
        lowered[tiles, count] = lower(layer, *args), args
      with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = pool.map(lambda z: z[0].compile(), lowered.values())
      calls = {
        key: functools.partial(program, *args)
        for program, (key, (_, args)) in zip(programs, lowered.items())
      }
      seconds = {
        key: z['median']
        for key, z in timing.race(calls, most=MOST, parts=CALLS).items()
      }
      for (tiles, count), value in seconds.items():
        print(f'{format} {side} B={count}: {tiles} {1e6 * value:.1f} us')
      best[side] = min(
        candidates,
        key=lambda z: sum(np.log(seconds[z, count]) for count in PROFILED),
      )
    suffix = '_fp8' if format == 'fp8' else ''
    up, down = (dataclasses.asdict(tiles) for tiles in best.values())
    entry[f'decode_up{suffix}'] = {f'{WIDTH}x{HIDDEN}': up}
    entry[f'decode_down{suffix}'] = {f'{HIDDEN}x{WIDTH}': down}
  path.write_text(json.dumps(table, indent=2) + '\n')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tune', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, default=record.RESULTS)
  parser.add_argument('--kernels', action='store_true')
  parser.add_argument('--tokens', type=int, nargs='*')
  parser.add_argument('--held', type=int, nargs='*', default=list(TOKENS))
  parser.add_argument('--routings', nargs='*', default=list(ROUTINGS))
  flags = parser.parse_args()
  refusal = mosaic_gpu.refusal(jnp.dtype('bfloat16'), (WIDTH, HIDDEN))
  if refusal:
    raise SystemExit(f'decode_experts: {refusal}')
  rows, rate = [], None
  for held in flags.held:
    bench = Bench(held)
    if rate is None:
      rate = read_rate(bench.matrices['bf16'][0])
      print(f'reads {rate:.4g} bytes/s', flush=True)
      rows.append({'operation': 'read', 'rate': rate})
      rows.append({'operation': 'peer', 'torch': torch.__version__})
      if flags.tune:
        tune(bench, tile_tables.TABLE)
    cases = [
      Case(held, *rest)
      for rest in itertools.product(
        flags.tokens or TOKENS[held], flags.routings, FORMATS
      )
    ]
    programs = bench.programs(cases)
    for case in cases:
      rows.append(measure(bench, case, programs, rate, flags.kernels))
    del bench, programs
    torch.cuda.empty_cache()
    kind = jax.devices()[0].device_kind
    path = record.write(
      'decode_experts',
      kind,
      rows,
      command=record.command('decode_experts'),
      folder=flags.out,
    )
  print(path)


if __name__ == '__main__':
  main()
