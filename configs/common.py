"""The string argument of a config file, and other needs of the command line.

The argument follows the file's name: `--config=configs/m2.py:tiny,steps=20`
calls `get_config('tiny,steps=20')`. Words such as `tiny` choose a variant that
the file defines; `name=value` sets a leaf, as `--config.name=value` does.
"""

import difflib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import ml_collections

# Every skill of the SQL tasks that is not held out, alike: `tasks.skills` where
# each is to be a setting of its own. An empty one means the same.
CURRICULUM = tuple(
  (skill, 1.0)
  for skill in (
    'add_col',
    'add_col_default_notnull',
    'rename_col',
    'rename_table',
    'drop_col',
    'create_index',
    'drop_index',
    'backfill_expr',
    'retype_rebuild',
    'split_table',
    'merge_tables',
    'add_fk_rebuild',
    'unique_dedup',
    'two_step',
  )
)


def parse_arg(
  arg: str, words: Sequence[str] = ()
) -> tuple[frozenset[str], dict[str, str]]:
  """Splits an argument into words and leaves.

  Args:
    arg: comma-separated words and `name=value` pairs.
    words: those that the config file knows.

  Returns:
    The words given, and the values given by dotted name, as text.

  Raises:
    ValueError: an unknown word, or one given twice; names it.
  """
  chosen: set[str] = set()
  leaves: dict[str, str] = {}
  for part in filter(None, (part.strip() for part in arg.split(','))):
    name, equals, value = (text.strip() for text in part.partition('='))
    if name in chosen or name in leaves:
      raise ValueError(f'config argument {name!r} is given twice')
    if equals:
      leaves[name] = value
    elif name in words:
      chosen.add(name)
    else:
      raise ValueError(
        f'config argument {name!r} is unknown: choose from '
        f'{", ".join(words) or "no words"}, or set a leaf as name=value'
      )
  return frozenset(chosen), leaves


def set_leaves(
  config: ml_collections.ConfigDict, leaves: dict[str, str]
) -> ml_collections.ConfigDict:
  """Sets leaves from text, in the type that each has; returns `config`.

  Raises:
    ValueError: a name that is not a leaf of `config`, or text that is not of
      its type; names it.
  """
  for path, text in leaves.items():
    *parents, last = path.split('.')
    node = config
    for parent in parents:
      node = node.get(parent) if _is_section(node) else None
    if not _is_section(node) or last not in node or _is_section(node[last]):
      near = difflib.get_close_matches(path, _names(config), 1)
      hint = f'; did you mean {near[0]}?' if near else ''
      raise ValueError(f'config argument {path!r} is not a setting{hint}')
    node[last] = _typed(path, text, type(node[last]))
  return config


def _is_section(node: object) -> bool:
  return isinstance(node, ml_collections.ConfigDict)


def _typed(path: str, text: str, kind: type) -> bool | int | float | str:
  """Text as a value of `kind`; no kind takes what belongs to another."""
  try:
    if kind is bool:
      return {'true': True, 'false': False}[text.lower()]
    return kind(text)
  except (KeyError, ValueError):
    raise ValueError(
      f'config argument {path}={text!r}: expected {kind.__name__}'
    ) from None


def _names(config: ml_collections.ConfigDict, prefix: str = '') -> list[str]:
  names = []
  for name, value in config.items():
    if _is_section(value):
      names += _names(value, f'{prefix}{name}.')
    else:
      names.append(prefix + name)
  return names


def workdir(filename: str) -> str:
  """Where a run goes by default: configs/m2.py:e64,tiny -> runs/m2-e64-tiny."""
  name = filename.removeprefix('configs/').replace('.py', '')
  return 'runs/' + re.sub(r'\W+', '-', name).strip('-')


def compilation_cache() -> dict[str, str]:
  """Environment under which jax keeps every compiled program for later runs."""
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return {
    'JAX_COMPILATION_CACHE_DIR': f'{cache}/m2-jax/compiled',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
  }


def hosts(environ: Mapping[str, str]) -> tuple[str | int | None, ...] | None:
  """How the processes of this run find each other; None = there is only one.

  `JAX_COORDINATOR_ADDRESS` (HOST:PORT of process 0), `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID` say it. Without them jax finds it by itself where the
  scheduler tells it: in a SLURM or Open MPI step of several tasks, on a TPU
  slice of several hosts under GKE, and wherever `M2_HOSTS=auto` is set, as on
  a TPU VM, which knows it only from its metadata server.

  Returns:
    Address, number of processes and number of this one; three times None where
    jax is to find them. None where this is the only process.

  Raises:
    ValueError: an incomplete or impossible triple, or a number that is none.
  """
  names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  given = [environ.get(name, '') for name in names]
  if any(given):
    said = ', '.join(f'{name}={value!r}' for name, value in zip(names, given))
    try:
      address, count, index = given[0], int(given[1]), int(given[2])
    except ValueError:
      raise ValueError(f'{said}: all three are needed') from None
    if ':' not in address or not 0 <= index < count:
      raise ValueError(f'{said}: expected HOST:PORT and 0 <= id < number')
    return (address, count, index) if count > 1 else None

  def number(name: str) -> int:
    value = environ.get(name) or '1'
    if not value.isdecimal():
      raise ValueError(f'{name}={value!r}: expected a number of processes')
    return int(value)

  tasks = (
    number('SLURM_NTASKS') if 'SLURM_STEP_NODELIST' in environ else 1,
    number('OMPI_COMM_WORLD_SIZE'),
    number('MEGASCALE_NUM_SLICES'),
    environ.get('TPU_WORKER_HOSTNAMES', '').count(',') + 1,
  )
  asked = environ.get('M2_HOSTS', '')
  if asked not in ('', 'auto'):
    raise ValueError(f'M2_HOSTS={asked!r}: set auto or leave it out')
  several = asked == 'auto' or any(count > 1 for count in tasks)
  return (None, None, None) if several else None


def explain(error: BaseException, argv: Sequence[str]) -> str:
  """One line on why the command line `argv` did not give a config."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  text = lines[-1] if lines else type(error).__name__
  if len(lines) > 1 and 'Traceback' in str(error):
    text = f'{lines[0].split(": ")[0]}: {text.partition(": ")[2] or text}'
  if isinstance(error, AttributeError | KeyError):
    # Only the name that is not there is in the message, however quoted; below
    # a leaf, the path.
    said = str(error).replace('\\n', ' ')
    name = re.search(r'(?<=lookup: )[\w.]+', said) or re.search(r'\w+', said)
    near = re.search(r'Did you mean "(\w+)"', str(error))
    for given in argv:
      if name and re.match(rf'--?\w+\.([\w.]+\.)?{name[0]}([.=]|$)', given):
        text = f'{given}: no such setting'
    text += f'; did you mean {near[1]}?' if near else ''
  return text
