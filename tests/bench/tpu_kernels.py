"""What the TPU compiler makes of the expert layer's kernels, on no TPU.

    python -m tests.bench.tpu_kernels

Nothing is run and no time is measured. Each kernel is compiled ahead of time
for each chip at M2's widths, next to the megablox product that comes with JAX;
`tests/tpu/kernels.py` says what the figures are. Of those, `optimal_seconds` is
the compiler's own estimate, `vmem_bytes` and `temp_bytes` are facts of the
program, `moved_over_ideal` counts the copies that the kernel's plan asks for,
and `matrix_slots` is how full the slots of the matrix units are in the
compiler's schedule of the loop that fills most. Needs libtpu in `.tpu`, which
`tests/run.sh --all` puts there; takes a quarter of an hour on two cores.
"""

import argparse
import tempfile

from tests.bench import record
from tests.tpu import child

# One device of each; what the compiler calls them is in the rows.
TOPOLOGIES = 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'
PRODUCTS = (
  'up', 'down', 'down_backward', 'up_backward', 'weight_gradient',
  'weight_gradient_fp32', 'product', 'transposed', 'megablox',
)  # fmt: skip
SOME = 'up', 'down_backward', 'weight_gradient', 'product', 'megablox'
CASES = (
  *(f'{name}:8192:256' for name in PRODUCTS),
  *(f'{name}:32768:256' for name in SOME),
  *(f'{name}:128:256' for name in ('up', 'product', 'megablox')),
  *(f'{name}:32768:32' for name in ('up', 'weight_gradient')),
  *(f'{name}:8192:256' for name in ('gather', 'combine', 'route', 'layer')),
)
# The schedules, and of those only how full every bundle is.
DUMP = (
  '--xla_jf_dump_to={0} --xla_jf_dump_llo_text=true '
  '--xla_jf_dump_llo_pass_label_regex=.*utilization.*'
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('topologies', nargs='*', default=TOPOLOGIES)
  for topology in parser.parse_args().topologies:
    rows = []
    for case in CASES:
      # A process and a folder a case: schedules are told apart by name only.
      with tempfile.TemporaryDirectory() as folder:
        rows += child.run(
          'tests.tpu.kernels',
          [topology, case, '--vmem', '--dump', folder],
          compiler=DUMP.format(folder),
        )
      print(rows[-1], flush=True)
    path = record.write(
      'tpu_kernels',
      rows[0]['device'],
      rows,
      command=f'python -m tests.bench.tpu_kernels {topology}',
    )
    print(path)


if __name__ == '__main__':
  main()
