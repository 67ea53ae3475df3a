"""Plans the documented pods: `results/plan-*.json`, launch/README.md's table.

    python -m tests.bench.plan [POD...]

Nothing is run on any TPU. Each pod is `main.py --config.mode=plan` with the
settings below, in a process of its own; one takes a few minutes of a core and
about 3 GB. Needs libtpu in `.tpu`, which `tests/run.sh --all` puts there.
`python -m tests.bench.readme` then writes the table.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from tests.bench import record

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Pod -> config file and what it sets; the words of launch/README.md's rows.
ONE = 'model.expert_strategy=gather model.expert_chunks=1'
PODS = {
  'v5p:8x8x8, 8K rows': (
    'configs/m2.py',
    'plan.topology=v5p:8x8x8 plan.programs=train mesh.fsdp=64 mesh.expert=8 '
    f'data.batch=512 data.length=8192 {ONE}',
  ),
  'v5p:8x8x8, 32K rows': (
    'configs/m2.py',
    'plan.topology=v5p:8x8x8 plan.programs=train mesh.fsdp=16 mesh.expert=8 '
    f'mesh.context=4 data.batch=128 data.length=32768 {ONE}',
  ),
  'v6e:16x16, 4K rows': (
    'configs/m2.py',
    'plan.topology=v6e:16x16 plan.programs=train mesh.fsdp=16 mesh.expert=8 '
    'mesh.context=2 data.batch=128 data.length=4096 model.remat=full '
    f'{ONE}',
  ),
  'tpu7x:4x4x8': (
    'configs/plan.py',
    'plan.topology=tpu7x:4x4x8 plan.programs=train,rl mesh.fsdp=32 '
    'mesh.expert=8 data.batch=256 data.length=8192 forge.row_tokens=8192 '
    f'forge.lines=256 {ONE}',
  ),
  'tpu7x:4x4x8, to the engine': (
    'configs/plan.py',
    'plan.topology=tpu7x:4x4x8 plan.programs=sync mesh.fsdp=32 mesh.expert=8 '
    f'plan.rollout_expert=8 plan.rollout_tensor=4 data.batch=256 {ONE}',
  ),
  'v5e:4x8': (
    'configs/plan.py',
    'plan.topology=v5e:4x8 plan.programs=decode,prefill engine.fp8=True '
    'engine.slots=64 engine.length=8192 engine.prompts=8 '
    'plan.rollout_expert=8 plan.rollout_tensor=4',
  ),
  'v6e:4x4': (
    'configs/plan.py',
    'plan.topology=v6e:4x4 plan.programs=decode,prefill engine.fp8=True '
    'engine.slots=32 engine.length=16384 engine.prompts=8 '
    'plan.rollout_expert=4 plan.rollout_tensor=4',
  ),
}


def command(pod: str, workdir: str) -> list[str]:
  """The words that plan `pod`."""
  config, leaves = PODS[pod]
  return [
    'main.py',
    f'--config={config}',
    '--config.mode=plan',
    f'--workdir={workdir}',
    *(f'--config.{leaf}' for leaf in leaves.split()),
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('pods', nargs='*', default=PODS)
  for pod in parser.parse_args().pods:
    with tempfile.TemporaryDirectory() as workdir:
      subprocess.run(
        [sys.executable, *command(pod, workdir)], cwd=ROOT, check=True
      )
      plan = json.loads((pathlib.Path(workdir) / 'plan.json').read_text())
    words = ' '.join(command(pod, 'DIR'))
    print(record.write('plan', pod, plan['programs'], command=words))


if __name__ == '__main__':
  main()
