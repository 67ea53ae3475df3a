"""Routing and permutation at the shapes of M2, against peers.

    python -m tests.bench.route [--sweep] [--out FOLDER] [--tokens T ...]

Needs one Hopper GPU and PyTorch. Parts: `route`, scores to choices and
weights; `plan`, choices to places; `gather`, tokens to places; `permute`, the
three in one program, which is what comes before the experts; `combine`, the
weighted sum of each token's rows, which comes after. Contenders: ours; `xla`,
the specification in plain jnp; `xla_sum`, a combination written out as a sum
over slots; and PyTorch, whose places are dense where ours are aligned to 8.

A call is one turn of a loop inside one program, and of one CUDA graph for
PyTorch, so the host's launches do not count. JAX's turns depend on each other,
so that none is left out, through a small operand: ours pay up to one more
kernel of a microsecond or two for it. Contenders take turns, round by round,
since a warm GPU lowers its clock. `floor` is the bytes that a part must move,
each once, at the rate of a copy measured in the same run. `--sweep` first
prints times of ours with other numbers of blocks and of rows in flight.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

# JAX would otherwise keep three quarters of the memory from PyTorch.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402  (reads the environment above when imported)
import jax.numpy as jnp  # noqa: E402
import torch  # noqa: E402
from jax import lax  # noqa: E402

from pallas_kernels import hopper  # noqa: E402
from pallas_kernels.permute import layout, mosaic_gpu, xla  # noqa: E402
from pallas_kernels.route import mosaic_gpu as router  # noqa: E402
from pallas_kernels.route import ref  # noqa: E402
from tests.bench import record, timing  # noqa: E402

WIDTH, TOP_K, ALIGN = 3072, 8, 8
ROUTINGS = ('uniform', 'zipf', 'eight')
ROUNDS = 5
TOLERANCE = 1e-2  # of bfloat16 results against each other, in norm


@dataclasses.dataclass(frozen=True)
class Case:
  """A routing of tokens to experts."""

  tokens: int
  experts: int
  routing: str

  @property
  def turns(self) -> int:
    """Calls in one program: some milliseconds."""
    return max(10, min(200, (1 << 19) // self.tokens))

  @property
  def bytes(self) -> dict[str, int]:
    """What each part reads and writes at least."""
    rows = self.tokens * TOP_K
    positions = layout.positions(rows, self.experts, ALIGN)
    found = {
      'route': 4 * self.tokens * self.experts + 8 * rows,
      'plan': 4 * (2 * rows + positions),
      'gather': 4 * rows + 2 * WIDTH * (self.tokens + positions),
      'combine': 8 * rows + 2 * WIDTH * (self.tokens + rows),
    }
    found['permute'] = found['route'] + found['gather']
    return found


def operands(case: Case) -> dict[str, jax.Array]:
  """Scores of the named law, tokens, and their routing."""
  keys = jax.random.split(jax.random.key(case.tokens), 2)
  logit_ME = jax.random.gumbel(keys[0], (case.tokens, case.experts))
  if case.routing == 'zipf':
    logit_ME -= 0.5 * jnp.log(jnp.arange(1.0, case.experts + 1))
  # Far from where a sigmoid saturates, so that no two scores are equal.
  score_ME = jax.nn.sigmoid(logit_ME / 8)
  first_E = jnp.arange(case.experts) < TOP_K
  bias_E = jnp.where(first_E & (case.routing == 'eight'), 1.0, 0.0)
  x_MD = jax.random.normal(keys[1], (case.tokens, WIDTH), jnp.bfloat16)
  index_MX, weight_MX = ours_route(score_ME, bias_E)
  plan = jax.jit(mosaic_gpu.plan, static_argnums=(1, 2))(
    index_MX, case.experts, ALIGN
  )
  y_PD = jax.jit(mosaic_gpu.gather)(x_MD, plan)
  return {
    'score': score_ME,
    'bias': bias_E,
    'x': x_MD,
    'index': index_MX,
    'weight': weight_MX,
    'plan': plan,
    'y': y_PD,
  }


@jax.jit
def ours_route(score_ME, bias_E):
  return router.route(score_ME, bias_E, top_k=TOP_K, min_k=TOP_K, min_share=0.0)


def xla_sum(y_PD, place_MX, weight_MX):
  """A sum over slots, which XLA makes one kernel without an [M, X, D]."""
  total_MD = 0.0
  for x in range(TOP_K):
    y_MD = y_PD.at[place_MX[:, x]].get(mode='fill', fill_value=0)
    total_MD += weight_MX[:, x, None] * y_MD.astype(jnp.float32)
  return total_MD.astype(y_PD.dtype)


def programs(experts: int) -> dict[str, tuple[tuple[str, ...], dict]]:
  """Part -> names of its operands, and contender -> function of them."""

  def chain(route, plan, gather):
    def run(score, bias, x):
      index, weight = route(score, bias)
      where = plan(index, experts, ALIGN)
      return gather(x, where), where.sizes_G, where.place_MX, weight

    return run

  def spec_route(score, bias):
    return ref.route(score, bias, top_k=TOP_K, min_k=TOP_K, min_share=0.0)

  def planned(plan):
    return lambda index: plan(index, experts, ALIGN)

  def combined(combine):
    return lambda y, plan, weight: combine(y, plan.place_MX, weight)

  ours = mosaic_gpu
  return {
    'route': (('score', 'bias'), {'ours': ours_route, 'xla': spec_route}),
    'plan': (
      ('index',),
      {'ours': planned(ours.plan), 'xla': planned(xla.plan)},
    ),
    'gather': (('x', 'plan'), {'ours': ours.gather, 'xla': xla.gather}),
    'permute': (
      ('score', 'bias', 'x'),
      {
        'ours': chain(ours_route, ours.plan, ours.gather),
        'xla': chain(spec_route, xla.plan, xla.gather),
      },
    ),
    'combine': (
      ('y', 'plan', 'weight'),
      {
        'ours': combined(ours.combine),
        'xla': combined(xla.combine),
        'xla_sum': combined(xla_sum),
      },
    ),
  }


def tied(part: str, zero: jax.Array, *arguments: Any) -> tuple[Any, ...]:
  """The operands, a small one of them plus a zero that XLA cannot foresee."""
  if part == 'plan':
    return (arguments[0] + zero,)
  if part == 'gather':
    x, plan = arguments
    sizes_G, source_P = plan.sizes_G + zero, plan.source_P + zero
    return x, plan._replace(sizes_G=sizes_G, source_P=source_P)
  if part == 'combine':
    return *arguments[:2], arguments[2] + zero
  return arguments[0], arguments[1] + zero, *arguments[2:]


def looped(part: str, call: Callable, turns: int) -> Callable:
  """`call`, `turns` times in one program, each after the one before."""

  def run(*arguments):
    def turn(_, result):
      first = jax.tree.leaves(result)[0].reshape(-1)[0]
      zero = (first == -12345).astype(jnp.int32)  # which no result begins with
      return call(*tied(part, zero, *arguments))

    blank = jax.tree.map(
      lambda z: jnp.zeros(z.shape, z.dtype), jax.eval_shape(call, *arguments)
    )
    return lax.fori_loop(0, turns, turn, blank)

  return jax.jit(run)


def compiled(
  case: Case, arrays: Mapping[str, jax.Array]
) -> dict[tuple[str, str], Callable]:
  """(part, contender) -> a program for all cases of this shape."""
  lowered = {
    (part, name): looped(part, call, case.turns).lower(
      *(arrays[n] for n in names)
    )
    for part, (names, calls) in programs(case.experts).items()
    for name, call in calls.items()
  }
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    done = pool.map(lambda one: one.compile(), lowered.values())
    return dict(zip(lowered, done))


def peers(
  case: Case, arrays: Mapping[str, jax.Array]
) -> dict[str, Callable[[], Any]]:
  """Part -> PyTorch's call."""
  score, bias, x, weight = (
    torch.from_dlpack(arrays[n]) for n in ('score', 'bias', 'x', 'weight')
  )
  index = torch.from_dlpack(arrays['index']).long()
  one = torch.ones(index.numel(), device='cuda', dtype=torch.int64)
  number = torch.arange(index.numel(), device='cuda')

  def route():
    chosen = torch.topk(score + bias, TOP_K).indices
    picked = score.gather(1, chosen)
    return chosen, picked / picked.sum(1, keepdim=True)

  def plan(index):
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    place = torch.empty_like(order).scatter_(0, order, number)
    sizes = torch.zeros(case.experts, device='cuda', dtype=torch.int64)
    return sizes.scatter_add_(0, flat, one), place, order

  def permute():
    chosen, weight = route()
    sizes, place, order = plan(chosen)
    return x.index_select(0, order // TOP_K), sizes, place, weight

  _, place, order = plan(index)
  y = x.index_select(0, order // TOP_K)
  narrow = weight.to(torch.bfloat16)[:, None]

  def combine():
    rows = y.index_select(0, place).view(case.tokens, TOP_K, WIDTH)
    return torch.bmm(narrow, rows)[:, 0]

  return {
    'route': route,
    'plan': lambda: plan(index),
    'gather': lambda: x.index_select(0, order // TOP_K),
    'permute': permute,
    'combine': combine,
  }


def graph(call: Callable, turns: int) -> Callable[[], None]:
  """`call`, `turns` times in one CUDA graph."""
  side = torch.cuda.Stream()
  side.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(side):
    call()
  torch.cuda.current_stream().wait_stream(side)
  recorded = torch.cuda.CUDAGraph()
  with torch.cuda.graph(recorded, capture_error_mode='thread_local'):
    for _ in range(turns):
      call()
  return recorded.replay


def check(case: Case, arrays: Mapping[str, jax.Array], part: str, call) -> None:
  """Raises RuntimeError where PyTorch's result differs from ours."""
  if part == 'route':
    got, want = arrays['index'], jnp.from_dlpack(call()[0].int())
    same = float((got == want).mean())
    if same < 1 - 1e-3:  # the last bit of score + bias may order two
      raise RuntimeError(f'{case}: only {same} of the choices are the same')
  if part == 'combine':
    got, want = arrays['x'], jnp.from_dlpack(call())
    ours = jax.jit(mosaic_gpu.combine)(
      arrays['y'], arrays['plan'].place_MX, arrays['weight']
    )
    for z in (want, ours):
      error = float(
        jnp.linalg.norm((z - got).astype(jnp.float32))
        / jnp.linalg.norm(got.astype(jnp.float32))
      )
      if not error < TOLERANCE:
        raise RuntimeError(f'{case}: tokens come back changed by {error:.2e}')


def race(calls: Mapping[str, Callable], turns: int) -> dict[str, dict]:
  """Seconds a turn of each contender; see `record.summary`."""
  samples = {name: [] for name in calls}
  for number in range(ROUNDS + 1):
    for name, call in calls.items():
      torch.cuda.synchronize()
      start = time.perf_counter()
      jax.block_until_ready(call())
      torch.cuda.synchronize()
      if number:  # the first warms up
        samples[name].append((time.perf_counter() - start) / turns)
  return {name: record.summary(seconds) for name, seconds in samples.items()}


def measure(
  case: Case, found: Mapping, arrays: Mapping[str, jax.Array], rate: float
) -> list[dict[str, Any]]:
  """Rows of the table, one a part."""
  rows, torch_calls = [], peers(case, arrays)
  for part, (names, calls) in programs(case.experts).items():
    check(case, arrays, part, torch_calls[part])
    inputs = [arrays[name] for name in names]
    contenders = {
      name: functools.partial(found[part, name], *inputs) for name in calls
    }
    contenders['torch'] = graph(torch_calls[part], case.turns)
    seconds = race(contenders, case.turns)
    ours, floor = seconds['ours']['median'], case.bytes[part] / rate
    rows.append(
      {
        'part': part,
        'tokens': case.tokens,
        'experts': case.experts,
        'routing': case.routing,
        'seconds': seconds,
        'bytes_per_second': case.bytes[part] / ours,
        'floor_seconds': floor,
        'ratio_to_floor': ours / floor,
        'speedup': {
          name: summary['median'] / ours
          for name, summary in seconds.items()
          if name != 'ours'
        },
      }
    )
    micro = {k: f'{1e6 * v["median"]:.1f}' for k, v in seconds.items()}
    print(part, case, f'floor {1e6 * floor:.1f} us:', micro, flush=True)
  return rows


def sweep() -> None:
  """Prints times of the copies with other numbers of blocks and slots."""
  case = Case(8192, 256, 'uniform')
  arrays = operands(case)
  tried = {
    'gather': [
      {'RESIDENT': blocks, 'GATHER_SLOTS': slots, 'GATHER_AHEAD': ahead}
      for blocks in (1, 2, 3)
      for slots, ahead in ((4, 2), (8, 4), (8, 6))
    ],
    'combine': [
      {'RESIDENT': blocks, 'COMBINE_SLOTS': slots}
      for blocks, slots in ((1, 2), (1, 3), (1, 4), (2, 2))
    ],
  }
  for part, settings in tried.items():
    names, calls = programs(case.experts)[part]
    inputs = [arrays[name] for name in names]
    for setting in settings:
      jax.clear_caches()  # what was traced has the numbers of its time
      with mock.patch.multiple(mosaic_gpu, **setting):
        program = looped(part, calls['ours'], case.turns)
        call = functools.partial(program, *inputs)
        seconds = race({'ours': call}, case.turns)['ours']['median']
      print(part, setting, f'{1e6 * seconds:.1f} us', flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sweep', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, default=record.RESULTS)
  parser.add_argument(
    '--tokens',
    type=int,
    nargs='*',
    default=[128, 1024, 4096, 8192, 16384, 32768],
  )
  flags = parser.parse_args()
  if reason := hopper.refusal():
    raise SystemExit(f'route: {reason}')
  if flags.sweep:
    sweep()
  # Not in a graph: inside one the same copy ran at 0.6 to 0.8 of this rate.
  rate = timing.denominators()['copy']
  print(f'copy {rate:.4g}', flush=True)
  rows = [{'part': 'copy', 'rate': rate, 'torch': torch.__version__}]
  for tokens, experts in itertools.product(flags.tokens, (256, 32)):
    found = None
    for routing in ROUTINGS:
      case = Case(tokens, experts, routing)
      arrays = operands(case)
      found = found or compiled(case, arrays)
      rows += measure(case, found, arrays, rate)
      del arrays
      torch.cuda.empty_cache()
    path = record.write(
      'route',
      jax.devices()[0].device_kind,
      rows,
      command=record.command('route'),
      folder=flags.out,
    )
  print(path)


if __name__ == '__main__':
  main()
