"""Public checkpoints: golden files made by transformers, names, round trips.

`tests/data/hf` is written by `tests/oracle/make_fixtures.py`; each directory
holds a checkpoint, token ids that transformers continued greedily from a prompt
of eight, and its logits.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from m2 import config
from m2.checkpoint import hf, hf_names, hf_save, shards
from m2.model import params as model_params
from m2.model import transformer
from m2.parallel import mesh as meshes

DATA = pathlib.Path(__file__).resolve().parents[1] / 'data' / 'hf'
GOLDEN = sorted(path.name for path in DATA.iterdir())
PROMPT = 8
LOGITS = 1e-4  # largest absolute difference, float32


def small(**changes) -> config.ModelConfig:
  fields = dict(
    vocab=40, d_model=16, layers=2, heads=4, kv_heads=2, head_dim=8,
    rotary_dim=4, max_positions=64, experts=4, d_expert=8, top_k=2, min_k=2,
    dtype='float32',
  )  # fmt: skip
  return config.ModelConfig(**(fields | changes))


def draw(cfg: config.ModelConfig, seed: int = 0):
  """Random values in every leaf, norms and biases included."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
    model_params.abstract(cfg),
  )


def stored(path: pathlib.Path) -> dict[str, tuple[str, bytes]]:
  return {
    name: (tensor.dtype, tensor.array().tobytes())
    for name, tensor in shards.read(path).items()
  }


def assert_same(got, want) -> None:
  jax.tree.map(np.testing.assert_array_equal, got, want)


class FilesTest(parameterized.TestCase):
  """Base: a scratch folder, and copies of golden checkpoints to spoil."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def copy(self, name: str = 'one_kv_head') -> pathlib.Path:
    return pathlib.Path(shutil.copytree(DATA / name, self.folder / name))

  def rewrite(self, path: pathlib.Path, change) -> None:
    """Applies `change` to the tensors of a checkpoint of one file."""
    tensors = safetensors.numpy.load_file(path / shards.SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, path / shards.SINGLE)


class GoldenTest(FilesTest):
  def test_there_are_six_shapes_with_both_forms_of_config(self):
    forms = {
      'rope_parameters' in json.loads((DATA / name / 'config.json').read_text())
      for name in GOLDEN
    }
    self.assertEqual(forms, {True, False})
    self.assertLen(GOLDEN, 6)

  @parameterized.parameters(*GOLDEN)
  def test_logits_and_greedy_continuation(self, name):
    path = DATA / name
    cfg = dataclasses.replace(hf.config(path), dtype='float32')
    params = hf.load(path, cfg)
    tokens = np.load(path / 'tokens.npy')
    logits = np.asarray(transformer.logits(cfg, params, tokens))
    np.testing.assert_allclose(
      logits, np.load(path / 'logits.npy'), rtol=0, atol=LOGITS
    )
    # One pass checks all greedy steps: each choice follows from the tokens
    # before it, which are the reference's.
    greedy = logits[:, PROMPT - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(greedy, tokens[:, PROMPT:])
    self.assertEqual(greedy.shape[1], 64)

  @parameterized.parameters(
    ('fp8', 'fp8', 'float32'),
    ('fp8', 'fp8', 'bfloat16'),
    ('ratios_of_m2', 'bfloat16', 'float32'),
    ('ratios_of_m2', 'bfloat16', 'bfloat16'),
    ('top_eight', 'float32', 'float32'),
  )
  def test_round_trip_is_byte_identical(self, name, dtype, held):
    cfg = dataclasses.replace(hf.config(DATA / name), param_dtype=held)
    params = hf.load(DATA / name, cfg)
    target = self.folder / 'new' / 'out'
    hf.save(params, target, cfg, dtype=dtype, shard_bytes=30_000)
    self.assertEqual(stored(target), stored(DATA / name))
    self.assertGreater(len(list(target.glob('*.safetensors'))), 1)
    again = dataclasses.replace(hf.config(target), param_dtype=held)
    self.assertEqual(again, cfg)

  @parameterized.parameters(('float32', 'F32'), ('bfloat16', 'BF16'))
  def test_without_a_type_nothing_is_lost(self, held, stored_as):
    path, target = DATA / 'ratios_of_m2', self.folder / 'out'
    cfg = dataclasses.replace(hf.config(path), param_dtype=held)
    params = hf.load(path, cfg)
    hf.save(params, target, cfg)
    weight = 'model.layers.0.block_sparse_moe.experts.0.w1.weight'
    self.assertEqual(shards.read(target)[weight].dtype, stored_as)
    assert_same(hf.load(target, cfg), params)

  def test_types_by_name_or_as_jax_has_them_in_the_fourth_place(self):
    cfg = hf.config(DATA / 'ratios_of_m2')
    params = hf.load(DATA / 'ratios_of_m2', cfg, None, jnp.bfloat16)
    self.assertEqual(params['head'].dtype, jnp.bfloat16)
    hf.save(params, self.folder / 'out', cfg, jnp.float32)
    head = shards.read(self.folder / 'out')['lm_head.weight']
    self.assertEqual(head.dtype, 'F32')

  def test_the_files_say_the_type_that_config_json_does_not(self):
    for name, dtype in (('top_eight', 'float32'), ('fp8', 'bfloat16')):
      path = shutil.copytree(DATA / name, self.folder / name)
      tree = json.loads((path / 'config.json').read_text())
      for key in ('dtype', 'torch_dtype'):
        tree.pop(key, None)
      (path / 'config.json').write_text(json.dumps(tree))
      self.assertEqual(hf.config(path).dtype, dtype)

  def test_float16_is_read(self):
    cfg = hf.config(DATA / 'five_heads')
    self.assertEqual(cfg.dtype, 'float32')
    got = hf.load(DATA / 'five_heads', cfg)['blocks']['attn']['k']
    tensors = shards.read(DATA / 'five_heads')
    self.assertEqual(tensors['model.embed_tokens.weight'].dtype, 'F16')
    want = tensors['model.layers.1.self_attn.k_proj.weight'].array()
    want = want.astype(np.float32).reshape(5, 8, 32).transpose(2, 0, 1)
    np.testing.assert_array_equal(got[1], want)


class NamesTest(FilesTest):
  def test_table_covers_every_leaf_with_its_shape(self):
    cfg = small(mtp_modules=2)
    abstract = {
      jax.tree_util.keystr(key, simple=True, separator='/'): leaf.shape
      for key, leaf in jax.tree.leaves_with_path(model_params.abstract(cfg))
    }
    self.assertEqual({entry.leaf for entry in hf.NAMES}, set(abstract))
    sizes = hf_names.sizes_of(cfg)
    for slot in hf_names.slots(cfg).values():
      layout = slot.entry.layout
      leaf = hf_names.to_leaf(np.zeros(slot.shape), layout, sizes)
      here = abstract[slot.entry.leaf][len(slot.index) :]
      self.assertEqual(leaf.shape, here, slot)

  def test_full_size_counts_of_the_released_checkpoint(self):
    items = hf_save.items(config.ModelConfig(), {}, 'fp8')
    specs = {name: spec for item in items for name, spec in item.specs.items()}
    scales = [s for name, (_, s) in specs.items() if name.endswith('scale_inv')]
    self.assertLen(specs, 96_103)
    self.assertEqual(sum(r * c for r, c in scales), 13_880_064)
    self.assertEqual(sum(item.nbytes for item in items), 230_121_630_720)

  def test_layouts_by_hand(self):
    cfg = small()
    params = draw(cfg)
    hf.save(params, self.folder / 'out', cfg, dtype='float32')
    files = {n: t.array() for n, t in shards.read(self.folder / 'out').items()}
    layer, attn = 'model.layers.1.', params['blocks']['attn']
    q_ND = files[layer + 'self_attn.q_proj.weight']
    np.testing.assert_array_equal(q_ND[2 * 8 + 3], attn['q'][1, :, 2, 3])
    o_DN = files[layer + 'self_attn.o_proj.weight']
    np.testing.assert_array_equal(o_DN[:, 3 * 8 + 5], attn['o'][1, 3, 5])
    moe = params['blocks']['moe']
    expert = layer + 'block_sparse_moe.experts.3.'
    for name, leaf in (('w1', 'wi_0'), ('w3', 'wi_1'), ('w2', 'wo')):
      got = files[f'{expert}{name}.weight']
      np.testing.assert_array_equal(got, moe[leaf][1, 3].T)
    np.testing.assert_array_equal(files['lm_head.weight'], params['head'].T)

  def test_router_is_float32_in_every_format(self):
    cfg = small()
    for dtype in ('float32', 'bfloat16', 'fp8'):
      hf.save(draw(cfg), self.folder / dtype, cfg, dtype=dtype)
      tensors = shards.read(self.folder / dtype)
      for name in ('gate.weight', 'e_score_correction_bias'):
        full = f'model.layers.0.block_sparse_moe.{name}'
        self.assertEqual(tensors[full].dtype, 'F32')
    params = hf.load(self.folder / 'fp8', cfg, dtype='bfloat16')
    self.assertEqual(params['blocks']['moe']['gate'].dtype, np.float32)
    self.assertEqual(params['blocks']['moe']['wo'].dtype.name, 'bfloat16')


class MeshTest(FilesTest):
  def test_placed_leaves_hold_the_same_values_and_save_the_same_bytes(self):
    cfg = small(mtp_modules=1)
    params = draw(cfg)
    hf.save(params, self.folder / 'plain', cfg, dtype='fp8')
    mesh = meshes.make_mesh(config.MeshConfig(1, 2, 2, 2))
    placed = hf.load(self.folder / 'plain', cfg, mesh)
    plain = hf.load(self.folder / 'plain', cfg)
    assert_same(placed, plain)
    wi_0 = placed['blocks']['moe']['wi_0']
    self.assertEqual(wi_0.addressable_shards[0].data.shape, (2, 2, 8, 4))
    with jax.set_mesh(mesh):
      hf.save(placed, self.folder / 'placed', cfg, dtype='fp8')
    self.assertEqual(
      stored(self.folder / 'placed'), stored(self.folder / 'plain')
    )


class ModulesTest(FilesTest):
  """Multi-token-prediction modules behind the last layer."""

  def setUp(self):
    super().setUp()
    self.cfg = small(mtp_modules=2)
    self.params = draw(self.cfg)
    self.path = self.folder / 'out'
    hf.save(self.params, self.path, self.cfg, dtype='float32')

  def test_round_trip_and_count(self):
    self.assertEqual(hf.config(self.path).mtp_modules, 2)
    assert_same(hf.load(self.path, self.cfg), self.params)

  def test_embedding_comes_first_in_eh_proj(self):
    name = 'model.layers.3.eh_proj.weight'
    file = shards.read(self.path)[name].array()
    leaf = self.params['mtp']['proj'][1]  # hidden first
    np.testing.assert_array_equal(file[:, :16], leaf[16:].T)
    np.testing.assert_array_equal(file[:, 16:], leaf[:16].T)

  def test_a_model_without_them_leaves_them_out(self):
    trunk = {k: v for k, v in self.params.items() if k != 'mtp'}
    assert_same(hf.load(self.path, small()), trunk)

  def test_a_model_with_too_few_layers_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'layers.1.*unexpected'):
      hf.load(self.path, small(layers=1))

  def test_more_modules_than_stored_are_missing(self):
    with self.assertRaisesRegex(ValueError, 'layers.4.eh_proj.weight: missing'):
      hf.load(self.path, small(mtp_modules=3))

  def test_released_announce_modules_they_do_not_hold(self):
    tree = json.loads((DATA / 'fp8' / 'config.json').read_text())
    self.assertEqual((tree['use_mtp'], tree['num_mtp_modules']), (True, 3))
    self.assertEqual(hf.config(DATA / 'fp8').mtp_modules, 0)


if __name__ == '__main__':
  absltest.main()
