"""Runs exactly what a saved config says: `configs/rerun.py:PATH`.

    python main.py --config=configs/rerun.py:runs/m2-tiny/config.json \
      --workdir=runs/again

PATH is a config.json that `main.py` wrote, or any JSON of that form. Overrides
(`--config.optim.lr=1e-3`) still apply.
"""

import json
import pathlib

import ml_collections


def get_config(path: str = '') -> ml_collections.ConfigDict:
  """The settings in the JSON file `path`.

  Raises:
    ValueError: it cannot be read or is not an object.
  """
  if not path:
    raise ValueError('configs/rerun.py needs a file: configs/rerun.py:PATH')
  try:
    tree = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(f'{path} cannot be read as a config: {error}') from None
  if not isinstance(tree, dict):
    raise ValueError(f'{path} holds no config: expected an object of settings')
  return ml_collections.ConfigDict(tree)
