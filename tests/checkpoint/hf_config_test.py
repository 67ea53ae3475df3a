"""config.json: both forms, defaults, and what is refused by name."""

import json
import pathlib

from absl.testing import absltest, parameterized

from m2 import config
from m2.checkpoint import hf, hf_config

# The released file (M2.5), without its 62-fold list and its class names.
RELEASED = {
  'architectures': ['MiniMaxM2ForCausalLM'],
  'attn_type_list': [1] * 62,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 3072,
  'intermediate_size': 1536,
  'max_position_embeddings': 196608,
  'model_type': 'minimax_m2',
  'mtp_transformer_layers': 1,
  'num_attention_heads': 48,
  'num_experts_per_tok': 8,
  'num_hidden_layers': 62,
  'num_key_value_heads': 8,
  'num_local_experts': 256,
  'num_mtp_modules': 3,
  'qk_norm_type': 'per_layer',
  'quantization_config': {
    'activation_scheme': 'dynamic',
    'fmt': 'float8_e4m3fn',
    'quant_method': 'fp8',
    'weight_block_size': [128, 128],
    'modules_to_not_convert': ['gate', 'e_score_correction_bias', 'lm_head'],
  },
  'rms_norm_eps': 1e-06,
  'rope_theta': 5000000,
  'rotary_dim': 64,
  'scoring_func': 'sigmoid',
  'shared_intermediate_size': 0,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'use_cache': True,
  'use_mtp': True,
  'use_qk_norm': True,
  'use_routing_bias': True,
  'vocab_size': 200064,
}
NEW_ROPE = {
  'rope_type': 'default',
  'rope_theta': 5e6,
  'partial_rotary_factor': 0.5,
}


class ConfigTest(parameterized.TestCase):
  def read(self, **changes) -> config.ModelConfig:
    """Reads the released file with changes; an ellipsis removes a key."""
    tree = RELEASED | changes
    gone = {key for key, value in changes.items() if value is Ellipsis}
    tree = {key: value for key, value in tree.items() if key not in gone}
    path = pathlib.Path(self.create_tempdir().full_path)
    (path / 'config.json').write_text(json.dumps(tree))
    return hf.config(path)

  def test_released_file_is_the_default_shape(self):
    self.assertEqual(self.read(), config.ModelConfig())

  def test_form_of_transformers_5(self):
    cfg = self.read(rotary_dim=..., rope_theta=..., rope_parameters=NEW_ROPE)
    self.assertEqual(cfg, config.ModelConfig())

  def test_defaults_of_absent_keys(self):
    cfg = self.read(
      head_dim=...,
      max_position_embeddings=...,
      rms_norm_eps=...,
      rope_theta=...,
      scoring_func=...,
      torch_dtype=...,
      quantization_config=...,
    )
    self.assertEqual(cfg, config.ModelConfig())
    # As in the library: rotate all of the head where nothing says how much.
    self.assertEqual(self.read(rotary_dim=...).rotary_dim, 128)

  @parameterized.parameters(
    ('float32', 'float32'),
    ('float16', 'float32'),
    ('torch.bfloat16', 'bfloat16'),
  )
  def test_compute_type(self, value, dtype):
    self.assertEqual(self.read(dtype=value, torch_dtype=...).dtype, dtype)

  @parameterized.parameters(
    ('model_type', 'minimax_m1'),
    ('model_type', None),
    ('num_expert_group', 8),
    ('topk_group', 2),
    ('use_qk_norm', None),
    ('use_routing_bias', None),
    ('quantization_config', {'quant_method': None}),
    ('num_local_experts', None),
    ('attention_bias', True),
    ('scoring_func', 'softmax'),
    ('use_routing_bias', False),
    ('shared_intermediate_size', 512),
    ('n_shared_experts', 1),
    ('rope_scaling', {'type': 'yarn', 'factor': 4.0}),
    ('rope_scaling', 'yarn'),
    ('rope_parameters', NEW_ROPE | {'rope_type': 'linear', 'factor': 2}),
    ('rope_parameters', {'full_attention': NEW_ROPE}),
    ('rope_parameters', 'half'),
    ('sliding_window', 4096),
    ('tie_word_embeddings', True),
    ('hidden_act', 'gelu'),
    ('use_qk_norm', False),
    ('qk_norm_type', 'per_head'),
    ('attn_type_list', [1, 0] * 31),
    ('attn_type_list', 3),
    ('layer_types', ['sliding_attention'] * 62),
    ('attention_dropout', 0.1),
    ('router_jitter_noise', 0.01),
    ('routed_scaling_factor', 2.5),
    ('dtype', 'int8'),
    ('dtype', 8),
    ('quantization_config', {'quant_method': 'awq'}),
    ('quantization_config', {'bits': 4}),
    ('quantization_config', 'fp8'),
    (
      'weight_block_size',
      {'quant_method': 'fp8', 'weight_block_size': [64, 64]},
      'quantization_config',
    ),
    ('rotary_dim', 62.5),
    ('rotary_dim', 63),
    ('rotary_dim', 130),
    ('rotary_dim', '64'),
    (
      'rotary_dim',
      NEW_ROPE | {'partial_rotary_factor': 0.25},
      'rope_parameters',
    ),
    ('rope_theta', NEW_ROPE | {'rope_theta': 1e4}, 'rope_parameters'),
    ('rope_theta', float('nan')),
    ('partial_rotary_factor', 'half'),
    ('hidden_size', ...),
    ('head_dim', None),
    ('num_local_experts', '256'),
    ('num_hidden_layers', True),
    ('kv_heads', 7, 'num_key_value_heads'),
    ('top_k', 257, 'num_experts_per_tok'),
    ('vocab', -1, 'vocab_size'),
    ('norm_eps', float('nan'), 'rms_norm_eps'),
  )
  def test_refused_by_name(self, name, value, key=None):
    with self.assertRaises(ValueError) as caught:
      self.read(**{key or name: value})
    self.assertIn('config.json: not supported', str(caught.exception))
    self.assertIn(name, str(caught.exception))

  @parameterized.parameters(
    'mtp_transformer_layers',
    'attention_bias',
    'router_jitter_noise',
    'qk_norm_type',
    'hidden_act',
    'num_expert_group',
    'topk_group',
    'max_position_embeddings',
    'rms_norm_eps',
    'initializer_range',
    'rope_scaling',
  )
  def test_null_is_as_good_as_absent(self, key):
    self.assertEqual(self.read(**{key: None}), self.read(**{key: ...}))

  def test_null_within_an_object(self):
    scheme = RELEASED['quantization_config'] | {'scale_fmt': None, 'fmt': None}
    cfg = self.read(
      quantization_config=scheme, rope_parameters=NEW_ROPE | {'rope_type': None}
    )
    self.assertEqual(cfg, config.ModelConfig())

  def test_the_older_name_counts_with_the_architecture_alone(self):
    self.assertEqual(self.read(model_type='minimax'), config.ModelConfig())
    for names in (['MiniMaxForCausalLM'], None, 'MiniMaxM2ForCausalLM'):
      with self.assertRaisesRegex(ValueError, "model_type='minimax', not"):
        self.read(model_type='minimax', architectures=names)

  def test_all_are_listed_at_once(self):
    with self.assertRaises(ValueError) as caught:
      self.read(hidden_act='gelu', vocab_size=..., tie_word_embeddings=True)
    for name in ('hidden_act', 'vocab_size: missing', 'tie_word_embeddings'):
      self.assertIn(name, str(caught.exception))

  @parameterized.parameters('{', '[]', '"text"', '[' * 100_000)
  def test_not_an_object(self, text):
    path = pathlib.Path(self.create_tempdir().full_path)
    (path / 'config.json').write_text(text)
    with self.assertRaisesRegex(ValueError, 'config.json: not'):
      hf.config(path)

  @parameterized.parameters(
    config.ModelConfig(),
    # 29.999... is what 44 * (30 / 44) is in floating point.
    config.ModelConfig(head_dim=44, rotary_dim=30, vocab=100, top_k=3, min_k=3),
  )
  def test_written_file_reads_the_same(self, cfg):
    for dtype in ('bfloat16', 'fp8'):
      path = pathlib.Path(self.create_tempdir().full_path)
      tree = hf_config.to_json(cfg, dtype)
      (path / 'config.json').write_text(json.dumps(tree))
      self.assertEqual(hf.config(path), cfg)

  def test_writes_what_the_released_file_has(self):
    tree = hf_config.to_json(config.ModelConfig(), 'fp8')
    mtp = ('use_mtp', 'num_mtp_modules')  # there are none to announce
    for key in set(RELEASED) - set(mtp):
      self.assertEqual(tree[key], RELEASED[key], key)
    self.assertEqual(tree['eos_token_id'], 200020)
    self.assertFalse(tree['use_mtp'])


if __name__ == '__main__':
  absltest.main()
