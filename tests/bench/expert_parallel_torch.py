"""The peer of `expert_parallel`: PyTorch over NCCL, one process a device.

    python -m tests.bench.expert_parallel_torch --tokens T ... --out FILE

What PyTorch users write: every (token, choice) row is sorted by expert, counts
and then rows go through `all_to_all_single`, rows are sorted by the experts of
their new device, pass `grouped_mm` and element-wise glue, and come back the
same way to be weighted and added up. A row crosses once a choice. `--cpu` runs
it over gloo. Both ranks' seconds are of calls that start together; the slower
counts.
"""

import argparse
import json
import pathlib
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

RANKS = 2
ROUNDS, CALLS = 5, 5
CHECKED = 16  # tokens compared with the plain formula
TOLERANCE = 3e-2


class Exchange(torch.autograd.Function):
  """`all_to_all_single` and its gradient."""

  @staticmethod
  def forward(ctx, rows, sent, received):
    ctx.sizes = sent, received
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent)
    return out

  @staticmethod
  def backward(ctx, grad):
    sent, received = ctx.sizes
    return Exchange.apply(grad, received, sent), None, None


def layer(x, index, weight, w13, wo):
  """The layer on this rank's tokens and experts; w13 is [E, D, 2F]."""
  experts, top_k = len(wo), index.shape[1]
  flat = index.reshape(-1)
  order = torch.argsort(flat, stable=True)
  counts = torch.bincount(flat, minlength=RANKS * experts)
  theirs = torch.empty_like(counts)
  dist.all_to_all_single(theirs, counts)
  sent = counts.view(RANKS, experts).sum(1).tolist()
  received = theirs.view(RANKS, experts).sum(1).tolist()
  rows = Exchange.apply(x[order // top_k], sent, received)
  # Rows lie by sender, then by expert; the products need them by expert.
  owner = torch.arange(experts, device=x.device).repeat(RANKS)
  again = torch.argsort(torch.repeat_interleave(owner, theirs), stable=True)
  ends = torch.cumsum(theirs.view(RANKS, experts).sum(0), 0).int()
  product = torch.nn.functional.grouped_mm
  gate, up = product(rows[again], w13, offs=ends).chunk(2, 1)
  y = product(torch.nn.functional.silu(gate) * up, wo, offs=ends)
  y = Exchange.apply(y[inverse(again)], received, sent)
  y = y[inverse(order)].view(*index.shape, -1)
  return (y * weight[..., None].to(y.dtype)).sum(1)


def inverse(order):
  back = torch.empty_like(order)
  back[order] = torch.arange(len(order), device=order.device)
  return back


def matrices(rank: int, flags, device):
  """This rank's experts; any rank can make another's."""
  make = torch.Generator(device).manual_seed(rank)
  held, d, f = flags.experts // RANKS, flags.width, flags.hidden

  def normal(*shape):
    return 0.02 * torch.randn(
      *shape, generator=make, device=device, dtype=torch.bfloat16
    )

  return normal(held, d, 2 * f), normal(held, f, d)


def check(y, x, index, weight, flags, device) -> None:
  """Raises RuntimeError where the layer is not the plain formula."""
  w13, wo = zip(*(matrices(rank, flags, device) for rank in range(RANKS)))
  w13, wo = torch.cat(w13), torch.cat(wo)
  want = []
  for token in range(min(CHECKED, len(x))):
    rows = []
    for expert, share in zip(index[token].tolist(), weight[token].tolist()):
      gate, up = (x[token].float() @ w13[expert].float()).chunk(2)
      act = torch.nn.functional.silu(gate) * up
      rows.append(share * (act @ wo[expert].float()))
    want.append(sum(rows))
  want = torch.stack(want)
  error = ((y[: len(want)].float() - want).norm() / want.norm()).item()
  if not error < TOLERANCE:
    raise RuntimeError(f'the PyTorch layer is wrong by {error:.2e}')


def main(rank: int, flags) -> None:
  """One process: measures, and rank 0 writes."""
  torch.manual_seed(100 + rank)
  device = torch.device('cpu' if flags.cpu else f'cuda:{rank}')
  if not flags.cpu:
    torch.cuda.set_device(device)
  dist.init_process_group(
    'gloo' if flags.cpu else 'nccl',
    init_method=f'tcp://127.0.0.1:{flags.port}',
    rank=rank,
    world_size=RANKS,
  )
  w13, wo = matrices(rank, flags, device)
  found = []
  for tokens in flags.tokens:
    x = torch.randn(tokens, flags.width, device=device, dtype=torch.bfloat16)
    score = torch.rand(tokens, flags.experts, device=device)
    index = score.topk(flags.top_k, dim=1).indices
    weight = torch.rand(tokens, flags.top_k, device=device) + 0.1
    weight /= weight.sum(1, keepdim=True)
    leaves = [x, weight, w13, wo]
    for leaf in leaves:
      leaf.requires_grad_()
    dy = torch.randn_like(x)

    def forward(operands=(x, index, weight, w13, wo)):
      with torch.no_grad():
        return layer(*operands)

    def both(operands=(x, index, weight, w13, wo), leaves=leaves, dy=dy):
      y = layer(*operands)
      return y, *torch.autograd.grad(y, leaves, dy)

    with torch.no_grad():
      check(forward(), x, index, weight, flags, device)
    for direction, run in (('forward', forward), ('both', both)):
      row = {'tokens': tokens, 'direction': direction}
      found.append({**row, 'seconds': seconds(run, device)})
    del x, leaves, dy, forward, both
  if rank == 0:
    text = json.dumps({'torch': torch.__version__, 'rows': found})
    flags.out.write_text(text)
  dist.destroy_process_group()


def seconds(run, device) -> dict[str, float]:
  """Seconds of a call, of rounds of some calls; of the slower rank."""
  samples = []
  for step in range(ROUNDS + 1):
    wait(device)
    dist.barrier()
    wait(device)
    start = time.perf_counter()
    for _ in range(CALLS):
      run()
    wait(device)
    took = torch.tensor([time.perf_counter() - start], device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    if step:  # the first is for warming up
      samples.append(took.item() / CALLS)
  return {
    'n': len(samples),
    'median': statistics.median(samples),
    'min': min(samples),
    'max': max(samples),
  }


def wait(device) -> None:
  if device.type == 'cuda':
    torch.cuda.synchronize()


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tokens', type=int, nargs='+', required=True)
  parser.add_argument('--width', type=int, required=True)
  parser.add_argument('--hidden', type=int, required=True)
  parser.add_argument('--experts', type=int, required=True)
  parser.add_argument('--top-k', type=int, required=True)
  parser.add_argument('--port', type=int, default=29517)
  parser.add_argument('--cpu', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, required=True)
  return parser.parse_args()


if __name__ == '__main__':
  flags = arguments()
  torch.multiprocessing.spawn(main, args=(flags,), nprocs=RANKS)
