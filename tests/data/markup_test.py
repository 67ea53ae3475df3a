"""Values of tool calls: what a schema makes of raw text."""

import re

from absl.testing import absltest, parameterized

from m2.data import markup


def kinds(*names):
  return frozenset(names)


class DecodeTest(parameterized.TestCase):
  @parameterized.parameters(
    ('text', ('string',), 'text'),
    ('\ntext\n', ('string',), 'text'),
    ('\n\ntext\n\n', ('string',), '\ntext\n'),
    ('5', ('string',), '5'),
    ('', ('string',), ''),
    ('NULL', ('string',), None),
    ('null', ('integer',), None),
    ('12', ('integer',), 12),
    (' -7 ', ('integer',), -7),
    ('2.5', ('number',), 2.5),
    ('3.0', ('number',), 3),
    ('1e3', ('number',), 1000),
    ('12345678901234567890', ('number',), 12345678901234567890),
    ('true', ('boolean',), True),
    ('1', ('boolean',), True),
    ('False', ('boolean',), False),
    ('[1, "é"]', ('array',), [1, 'é']),
    ('{"a": null}', ('object',), {'a': None}),
    ('{"a": 1}', ('unknown',), {'a': 1}),
    ('{a', ('unknown',), '{a'),
    ('7', ('integer', 'string'), 7),
    ('seven', ('integer', 'string'), 'seven'),
    ('1', ('integer', 'boolean'), 1),
  )
  def test_follows_the_rule(self, text, names, expected):
    value = markup.decode(text, kinds(*names))
    self.assertEqual(value, expected)
    self.assertIs(type(value), type(expected))

  @parameterized.parameters(
    ('2.5', 'integer'),
    ('1_000', 'integer'),
    ('', 'integer'),
    ('9' * 5000, 'integer'),
    ('nan', 'number'),
    ('1e999', 'number'),
    ('1_0.5', 'number'),
    ('yes', 'boolean'),
    ('{"a": 1}', 'array'),
    ('[1', 'array'),
    ('[NaN]', 'array'),
    ('[1e999]', 'array'),
    ('["\\ud800"]', 'array'),
    ('[' * 100_000, 'array'),
    ('[1]', 'object'),
  )
  def test_refuses_what_does_not_fit(self, text, kind):
    with self.assertRaisesRegex(ValueError, f'expected {kind}'):
      markup.decode(text, kinds(kind))


class ToolsTest(parameterized.TestCase):
  def test_reads_types_from_any_form_of_schema(self):
    tools = markup.read_tools(
      [
        {
          'name': 'f',
          'parameters': {
            'properties': {
              'a': {'type': ['integer', 'null']},
              'b': {'anyOf': [{'type': 'number'}, {'type': 'array'}]},
              'c': {'description': 'no type'},
              'd': {'type': 'date'},
            },
            'required': ['a'],
            'additionalProperties': False,
          },
        }
      ]
    )
    self.assertEqual(
      tools['f'].kinds,
      {
        'a': {'integer', 'null'},
        'b': {'number', 'array'},
        'c': {'string'},
        'd': {'unknown'},
      },
    )
    self.assertEqual(tools['f'].required, ('a',))
    self.assertTrue(tools['f'].closed)

  @parameterized.parameters(
    ('str', 'string'),
    ('Text', 'string'),
    ('INT', 'integer'),
    ('Integer', 'integer'),
    ('float', 'number'),
    ('Bool', 'boolean'),
    ('OBJECT', 'object'),
    ('Null', 'null'),
    ('dict', 'unknown'),
  )
  def test_names_of_types_are_those_of_the_models_guide(self, name, kind):
    (tool,) = markup.read_tools(
      [
        {
          'name': 'f',
          'parameters': {
            'properties': {'a': {'type': name}, 'b': {'type': [name, 'array']}}
          },
        }
      ]
    ).values()
    self.assertEqual(tool.kinds, {'a': {kind}, 'b': {kind, 'array'}})

  def test_a_root_may_refer_and_be_composed(self):
    node = {
      'type': 'object',
      'properties': {
        'size': {'type': 'integer'},
        'next': {'$ref': '#/$defs/Node'},
      },
      'required': ['size'],
      'additionalProperties': False,
    }
    named = {
      'allOf': [{'$ref': '#/$defs/Node'}, {'$ref': '#/$defs/Named'}],
      'properties': {'name': {'type': 'string'}, 'size': {'minimum': 0}},
      'required': ['name', 'size'],
    }
    parameters = {'$defs': {'Node': node, 'Named': named}}
    read = markup.read_tools(
      [
        {'name': 'f', 'parameters': {**parameters, '$ref': '#/$defs/Node'}},
        {'name': 'g', 'parameters': {**parameters, '$ref': '#/$defs/Named'}},
        {'name': 'h', 'parameters': {**parameters, **named}},
        {'name': 'i', 'parameters': {'$ref': '#/$defs/none'}},
        {'name': 'j', 'parameters': {'$ref': '#', 'allOf': [3, {'$ref': '#'}]}},
      ]
    )
    kinds = {'size': {'integer'}, 'next': {'object'}}
    self.assertEqual(read['f'], markup.Tool(kinds, ('size',), True))
    for name in 'gh':
      self.assertEqual(read[name].kinds, {**kinds, 'name': {'string'}})
      self.assertCountEqual(read[name].required, ('size', 'name'))
      self.assertTrue(read[name].closed)
    for name in 'ij':
      self.assertEqual(read[name], markup.Tool({}, (), False))

  @parameterized.parameters(
    ([['a']],), ([None],), ({'a': True},), ('a',), (True,)
  )
  def test_what_is_required_is_a_list_of_names(self, required):
    value = re.escape(repr(required))
    for parameters in (
      {'required': required},
      {'allOf': [{'required': required}]},
    ):
      with self.assertRaisesRegex(ValueError, f'tool f: required is {value}'):
        markup.read_tools([{'name': 'f', 'parameters': parameters}])

  def test_what_a_schema_cannot_mean_says_nothing(self):
    (tool,) = markup.read_tools(
      [
        {
          'name': 'f',
          'parameters': {
            'properties': {
              'a': {'type': 5},
              'b': {'anyOf': True, 'type': None},
              'c': {'oneOf': 7, 'enum': [3]},
            }
          },
        }
      ]
    ).values()
    self.assertEqual(
      tool.kinds, {'a': {'string'}, 'b': {'string'}, 'c': {'integer'}}
    )

  def test_follows_references_and_reads_listed_values(self):
    twice = {'0': {'type': 'boolean'}}
    for level in range(60):  # each is looked at once, not 2**60 times
      twice[f'{level + 1}'] = {'anyOf': [{'$ref': f'#/$defs/{level}'}] * 2}
    (tool,) = markup.read_tools(
      [
        {
          'name': 'f',
          'parameters': {
            '$defs': {
              'a/b': {'type': 'object'},
              'Mode': {'enum': ['on', 3]},
              'Tree': {'anyOf': [{'$ref': '#/$defs/Tree'}, {'type': 'array'}]},
              'Self': {'$ref': '#/$defs/Self'},
              **twice,
            },
            'properties': {
              'a': {'$ref': '#/$defs/a~1b'},
              'b': {'allOf': [{'$ref': '#/$defs/Mode'}], 'default': 'on'},
              'c': {'$ref': '#/$defs/Tree'},
              'd': {'$ref': '#/$defs/Self'},
              'e': {'$ref': '#/$defs/none'},
              'f': {'$ref': 'https://example.org/schema'},
              'g': {'enum': [1, 2.5, True, None]},
              'h': {'const': [1]},
              'i': {'properties': {}},
              'j': {'items': {'type': 'string'}},
              'k': {'enum': None},
              'l': {'$ref': '#/$defs/60'},
            },
          },
        }
      ]
    ).values()
    self.assertEqual(
      tool.kinds,
      {
        'a': {'object'},
        'b': {'string', 'integer'},
        'c': {'array'},
        'd': {'string'},
        'e': {'unknown'},
        'f': {'unknown'},
        'g': {'integer', 'number', 'boolean', 'null'},
        'h': {'array'},
        'i': {'object'},
        'j': {'array'},
        'k': {'string'},
        'l': {'boolean'},
      },
    )

  @parameterized.parameters(
    ({'type': 'function'},),
    ({'function': {'name': 3}},),
    ('f',),
    ({'name': 'f', 'parameters': 'none'},),
    ({'name': 'f', 'parameters': {'properties': [1]}},),
    ({'name': 'f<g>'},),
    ({'name': ''},),
    ({'name': 'f', 'parameters': {'properties': {'a "b"': {}}}},),
    ({'name': 'f', 'parameters': {'properties': {'a\nb': {}}}},),
    ({'name': 'f', 'parameters': {'properties': {3: {}}}},),
  )
  def test_refuses_what_is_no_tool(self, tool):
    with self.assertRaises(ValueError):
      markup.read_tools([tool])

  def test_refuses_what_is_not_json(self):
    for value in (float('nan'), object(), {1, 2}):
      with self.assertRaisesRegex(ValueError, 'is not JSON'):
        markup.encode(value)


if __name__ == '__main__':
  absltest.main()
