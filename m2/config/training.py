"""Sections of training: model, mesh, optimiser, loss, data, saving, log."""

from m2.config import base


@base.section
class ModelConfig(base.Settings):
  """Shape of the model; the defaults are MiniMax-M2 (report 2.1)."""

  vocab: int = 200_064
  d_model: int = 3072
  layers: int = 62
  heads: int = 48
  kv_heads: int = 8
  head_dim: int = 128
  rotary_dim: int = 64  # leading dims of each head that RoPE rotates
  rope_theta: float = 5e6
  max_positions: int = 196_608
  experts: int = 256
  d_expert: int = 1536  # SwiGLU width of one expert
  top_k: int = 8  # experts selected per token
  min_k: int = 0  # experts always used, the rest need `min_share`; 0 = top_k
  min_share: float = 0.0  # of the selected weight, to use experts past min_k
  mtp_modules: int = 0  # multi-token-prediction modules (report 2.3)
  norm_eps: float = 1e-6
  init_std: float = 0.02
  dtype: str = 'bfloat16'  # activations and matmuls
  param_dtype: str = 'float32'  # stored weights
  fp8_experts: bool = False  # hold the experts in block-FP8: no training
  remat: str = 'block'  # none | block | full: see m2/model/transformer.py
  # auto | gather | ragged | exchange | direct; experts in FP8 always gather
  expert_strategy: str = 'auto'
  expert_chunks: int = 0  # most slices of tokens that overlap; 0 = auto

  def __post_init__(self):
    """Fills in `min_k`: everybody else sees the number."""
    if object.__getattribute__(self, 'min_k') == 0:  # following is not using
      top_k = object.__getattribute__(self, 'top_k')
      object.__setattr__(self, 'min_k', top_k)

  def _check(self) -> None:
    base.positive(self, 'vocab d_model layers heads kv_heads head_dim experts')
    base.positive(
      self, 'd_expert top_k min_k norm_eps rope_theta max_positions'
    )
    base.require(
      self.heads % self.kv_heads == 0,
      f'model.heads={self.heads} is not a multiple of '
      f'model.kv_heads={self.kv_heads}',
    )
    base.require(
      self.rotary_dim % 2 == 0 and 0 <= self.rotary_dim <= self.head_dim,
      f'model.rotary_dim={self.rotary_dim} must be even and at most '
      f'model.head_dim={self.head_dim}',
    )
    base.require(
      self.top_k <= self.experts,
      f'model.top_k={self.top_k} exceeds model.experts={self.experts}',
    )
    base.require(
      self.min_k <= self.top_k,
      f'model.min_k={self.min_k} exceeds model.top_k={self.top_k}; set '
      'model.min_k=0 for a fixed number of active experts',
    )
    base.require(
      0 <= self.min_share < 1, f'model.min_share={self.min_share} not in [0, 1)'
    )
    base.require(
      self.min_k < self.top_k or not self.min_share,
      f'model.min_share={self.min_share} does nothing where model.min_k='
      f'{self.min_k} is model.top_k; set it to 0, or min_k below',
    )
    base.require(
      self.min_k == self.top_k or self.min_share > 0,
      f'model.min_k={self.min_k} below model.top_k={self.top_k} needs '
      'model.min_share > 0, else it does nothing; set model.min_k=0 for a '
      'fixed number of active experts',
    )
    base.choice(self, 'model', 'dtype', ('float32', 'bfloat16'))
    base.choice(self, 'model', 'param_dtype', ('float32', 'bfloat16'))
    base.require(
      not self.fp8_experts or self.d_model % 128 == 0 == self.d_expert % 128,
      f'model.fp8_experts needs model.d_model={self.d_model} and '
      f'model.d_expert={self.d_expert} in multiples of 128',
    )
    base.choice(self, 'model', 'remat', ('none', 'block', 'full'))
    strategies = 'auto', 'gather', 'ragged', 'exchange', 'direct'
    base.choice(self, 'model', 'expert_strategy', strategies)
    base.require(
      self.expert_chunks >= 0,
      f'model.expert_chunks={self.expert_chunks} must not be negative',
    )
    base.require(
      self.mtp_modules >= 0, 'model.mtp_modules must not be negative'
    )


@base.section
class MeshConfig(base.Settings):
  """Mesh axis sizes; one axis may be -1 and takes the devices left over."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  context: int = 1  # ways that each row of tokens is cut along its length
  slices: int = 1  # TPU slices that the data axis spans

  def _check(self) -> None:
    sizes = (self.data, self.fsdp, self.expert, self.context, self.tensor)
    base.require(
      all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
      f'mesh axes (data, fsdp, expert, context, tensor)={sizes}: each must be '
      'positive, at most one may be -1',
    )
    base.positive(self, 'slices')
    base.require(
      self.data == -1 or self.data % self.slices == 0,
      f'mesh.data={self.data} is not a multiple of mesh.slices={self.slices}: '
      'each slice holds the same number of blocks of the data axis',
    )


@base.section
class OptimConfig(base.Settings):
  """AdamW or Muon under a warm-up-stable-decay schedule."""

  name: str = 'adamw'
  lr: float = 3e-4  # peak
  warmup: int = 100  # steps, linear from 0
  decay: float = 0.2  # share of the steps, at the end, that decay linearly
  final: float = 0.1  # last learning rate, as a share of the peak
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  moment: str = 'float32'  # of the first moment; bfloat16 saves memory
  weight_decay: float = 0.1  # on matrices only: never norms or biases
  clip: float = 1.0  # global gradient norm
  accumulate: int = 1  # microbatches per step
  train_only: str = 'all'  # all | mtp: mtp freezes the trunk (report 2.3)
  bias_rate: float = 1e-3  # router bias step per sign of load error
  bias_decay: bool = True  # scale bias_rate with the schedule

  def _check(self) -> None:
    base.choice(self, 'optim', 'name', ('adamw', 'muon'))
    base.choice(self, 'optim', 'moment', ('float32', 'bfloat16'))
    base.choice(self, 'optim', 'train_only', ('all', 'mtp'))
    base.positive(self, 'lr clip accumulate eps')
    for name in ('decay', 'final'):
      value = getattr(self, name)
      base.require(0 <= value <= 1, f'optim.{name}={value} is not in [0, 1]')
    for name in ('b1', 'b2'):
      value = getattr(self, name)
      base.require(0 <= value < 1, f'optim.{name}={value} is not in [0, 1)')
    for name in ('warmup', 'weight_decay', 'bias_rate'):
      value = getattr(self, name)
      base.require(value >= 0, f'optim.{name}={value} must not be negative')


@base.section
class LossConfig(base.Settings):
  """Weights of the terms added to next-token cross-entropy."""

  z: float = 1e-4  # on the squared log-partition of the head
  balance: float = 0.0  # auxiliary load balance (report 2.2.1 keeps it small)
  mtp: float = 0.0  # multi-token prediction (report 2.3: 0.3)
  mtp_final: float = 0.0  # its value after the decay phase (report: 0.1)
  chunk: int = 1024  # tokens whose logits exist at once
  round_tokens: int = 0  # rows of a tile that experts' tokens fill; 0 = off

  def _check(self) -> None:
    base.positive(self, 'chunk')
    for name in ('z', 'balance', 'mtp', 'mtp_final', 'round_tokens'):
      value = getattr(self, name)
      base.require(value >= 0, f'loss.{name}={value} must not be negative')
    base.require(
      self.mtp_final <= self.mtp,
      f'loss.mtp_final={self.mtp_final} exceeds loss.mtp={self.mtp}: the '
      'weight only falls',
    )


@base.section
class DataConfig(base.Settings):
  """Where rows come from and how they are packed (m2/data/pipeline.py)."""

  source: str = 'files'  # files | jsonl | array_record | tasks
  path: str = 'stdlib'  # globs, by commas; 'stdlib' = Python's own sources
  tokenizer: str = ''  # tokenizer.json; '' trains a byte-level BPE in workdir
  batch: int = 8  # rows per step over all hosts
  length: int = 1024  # tokens per row
  keep_all_reasoning: bool = True  # report Eq. 10 keeps every turn's reasoning
  examples: int = 20_000  # task source: distinct demonstrations
  prefetch: int = 2  # batches made ahead, by each worker
  workers: int = 0  # processes for each shard; 0 = in this one
  shards: int = 1  # best a multiple of the hosts; fixes the order of rows

  def _check(self) -> None:
    base.choice(
      self, 'data', 'source', ('files', 'jsonl', 'array_record', 'tasks')
    )
    base.positive(self, 'batch length examples prefetch shards')
    base.require(
      self.batch % self.shards == 0,
      f'data.batch={self.batch} is not a multiple of data.shards={self.shards}',
    )
    base.require(self.workers >= 0, f'data.workers={self.workers} is negative')


@base.section
class CheckpointConfig(base.Settings):
  """Saving, resuming and starting weights (m2/checkpoint/store.py)."""

  every: int = 500  # steps
  keep: int = 2
  init_from: str = ''  # a workdir or Hugging Face directory: weights only
  on_corrupt: str = 'error'  # error | previous: the last good one is used

  def _check(self) -> None:
    base.positive(self, 'every keep')
    base.choice(self, 'checkpoint', 'on_corrupt', ('error', 'previous'))


@base.section
class LogConfig(base.Settings):
  """Progress line, metrics.jsonl and TensorBoard (m2/obs/metrics.py)."""

  every: int = 10  # steps
  introspect: int = 50  # steps between introspection records; 0 = never
  tensorboard: bool = True

  def _check(self) -> None:
    base.positive(self, 'every')
    base.require(
      self.introspect >= 0, f'log.introspect={self.introspect} negative'
    )


@base.section
class GuardConfig(base.Settings):
  """What a run does about bad steps and hosts (m2/train/guard.py)."""

  policy: str = 'stop'  # stop | rewind: go back to the checkpoint, other data
  spike: float = 0.0  # a loss so many deviations above the last is bad; 0 = off
  window: int = 100  # losses that it is compared with
  skip: int = 0  # batches left out beyond those since the checkpoint
  rewinds: int = 3  # to one checkpoint, then stop
  stall: float = 40.0  # seconds without progress until a host is named

  def _check(self) -> None:
    base.choice(self, 'guard', 'policy', ('stop', 'rewind'))
    base.positive(self, 'window rewinds stall')
    for name in ('spike', 'skip'):
      value = getattr(self, name)
      base.require(value >= 0, f'guard.{name}={value} must not be negative')
