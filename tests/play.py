"""Plays every mode in small, one after the other, as a user would.

    python -m tests.play WORKDIR [DEVICES]

Pretraining with multi-token prediction, SFT from nothing, RL from SFT,
evaluation of RL and a client of it, conversion there and back; each in a folder
of WORKDIR.
DEVICES is 1, or 8 for a mesh of data 2, fsdp 2, expert 2. At the end
`unread.json` lists by mode the settings that no code read in any of its runs.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
import urllib.request
from typing import Any

import main
from configs import common
from m2 import config as m2_config
from tests.bench import configs

FORMS = {
  'pretrain': 'configs/m2.py:tiny',
  'sft': 'configs/sft.py:tiny',
  'rl': 'configs/rl.py:tiny',
  'eval': 'configs/eval.py:tiny',
  'serve': 'configs/serve.py:tiny',
  'convert': 'configs/convert.py',
}
MICRO = {
  'seed': 3,
  'steps': 2,
  'model.d_model': 32,
  'model.layers': 1,
  'model.heads': 4,
  'model.kv_heads': 2,
  'model.head_dim': 8,
  'model.rotary_dim': 4,
  'model.experts': 4,
  'model.d_expert': 16,
  'model.mtp_modules': 1,
  'loss.mtp': 0.1,
  'loss.mtp_final': 0.1,
  'data.batch': 8,
  'checkpoint.every': 1,
  'log.every': 1,
  'log.introspect': 1,
  'engine.slots': 8,
  'forge.groups': 2,
  'forge.group_size': 2,
  'forge.in_flight': 2,
  'agent.max_turns': 2,
  'agent.max_new': 8,
  'eval.tasks': 3,
  'serve.port': 0,
}
# Data is -1: what is left of 8.
MESH = {'mesh.fsdp': 2, 'mesh.expert': 2, 'model.layers': 2}


def config(form: str, **changes: Any) -> m2_config.RunConfig:
  """The frozen config of `form` in the smallest shape that still is M2's."""
  tree = configs.config_dict(form)
  for path, value in (MICRO | changes).items():
    section, _, leaf = path.rpartition('.')
    node = tree.get(section) if section else tree
    if node is not None and leaf in node:
      node[leaf] = value
  if 'convert' in tree and not tree.convert.source:
    tree.convert.update(source='from', target='to')
  return m2_config.RunConfig.from_config(tree)


def play(root: pathlib.Path, mesh: dict[str, int]) -> dict[str, list[str]]:
  """All runs; what each mode's runs did not read."""

  def start(name: str) -> dict[str, Any]:
    return {'checkpoint.init_from': str(root / name), **mesh}

  def convert(source: str, target: str, kind: str) -> dict[str, Any]:
    return {
      'convert.source': str(root / source),
      'convert.target': str(root / target),
      'convert.format': kind,
      'convert.dtype': 'float32',
    }

  runs = {
    'pretrain': mesh,
    'sft': mesh,
    'rl': start('sft'),
    'eval': start('rl'),
    'serve': start('rl'),
    'convert': convert('rl', 'public', 'hf'),
    'back': convert('public', 'again', 'workdir'),
  }
  unread: dict[str, set[str]] = {}
  for name, changes in runs.items():
    frozen = config(FORMS.get(name, FORMS['convert']), **changes)
    workdir = root / name
    workdir.mkdir()
    if name == 'serve':
      threading.Thread(target=ask, args=[workdir], daemon=True).start()
    with contextlib.redirect_stdout(sys.stderr):
      with contextlib.suppress(KeyboardInterrupt):
        main.run(frozen, workdir)
    left = set(m2_config.unread(frozen))
    unread[frozen.mode] = unread.get(frozen.mode, left) & left
  return {mode: sorted(left) for mode, left in unread.items()}


def ask(workdir: pathlib.Path) -> None:
  """Asks the server of this process once, keeps the answer, interrupts it."""
  try:
    while not (workdir / 'serving.json').exists():
      time.sleep(0.1)
    served = json.loads((workdir / 'serving.json').read_text())
    body = {
      'model': served['model'],
      'messages': [{'role': 'user', 'content': 'hello'}],
      'max_tokens': 4,
    }
    url = f'{served["url"]}/v1/chat/completions'
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
      (workdir / 'answer.json').write_bytes(answer.read())
  finally:
    os.kill(os.getpid(), signal.SIGINT)


def command() -> None:
  """Sets JAX up, then plays."""
  root, devices = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  for name, value in common.compilation_cache().items():
    os.environ.setdefault(name, value)
  import jax  # reads the environment when imported

  jax.config.update('jax_num_cpu_devices', devices)
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  unread = play(root, MESH if devices > 1 else {})
  (root / 'unread.json').write_text(json.dumps(unread))


if __name__ == '__main__':
  command()
