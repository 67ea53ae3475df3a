"""Loads configs as `main.py` does, without its flags: `configs/m2.py:tiny`."""

import importlib.util
import pathlib

import ml_collections

from m2 import config as m2_config

ROOT = pathlib.Path(__file__).resolve().parents[2]


def config_dict(name: str) -> ml_collections.ConfigDict:
  """What the file's `get_config` returns.

  Args:
    name: path under the repository, and perhaps an argument after a colon.
  """
  file, _, argument = name.partition(':')
  spec = importlib.util.spec_from_file_location('one_config', ROOT / file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument) if argument else module.get_config()


def load(name: str) -> m2_config.RunConfig:
  """The frozen settings; raises ValueError as `main.py` would report it."""
  return m2_config.RunConfig.from_config(config_dict(name))
