"""A checkpoint behind HTTP, for any agent that speaks a usual API.

    python main.py --config=configs/serve.py:tiny --workdir=runs/serve \
      --config.checkpoint.init_from=runs/rl

prints `m2 at http://127.0.0.1:8000` and answers there, as OpenAI's Chat
Completions (`/v1/chat/completions`) and Anthropic's Messages (`/v1/messages`)
do, until it is interrupted:

    from openai import OpenAI
    client = OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='any')
    client.chat.completions.create(
      model='m2', messages=[{'role': 'user', 'content': 'hello'}]
    )

It listens to this machine alone: --config.serve.host=0.0.0.0 changes that, and
then wants --config.serve.secret_file=FILE, say of `openssl rand -hex 32`. Who
asks then needs a key for an episode of some name,

    python -c "import sys; from m2.gateway import keys; \
      print(keys.key(open('FILE').read().strip(), sys.argv[1]))" NAME

and what the episode samples is kept in pool.db, exactly. Words are those of
configs/m2.py.
"""

import ml_collections

from configs import common, m2, rl
from m2 import config as settings


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Settings of a server; see the module's docstring."""
  words, leaves = common.parse_arg(arg, m2.WORDS)
  config = rl.get_config(','.join(words))
  config.mode = 'serve'
  for name in set(settings.MODES['rl']) - set(settings.MODES['serve']):
    del config[name]
  config.serve = settings.to_config(settings.ServeConfig())
  return common.set_leaves(config, leaves)
