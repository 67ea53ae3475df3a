"""The reader of compiled programs, on programs small enough to count."""

import numpy as np
from absl.testing import absltest, parameterized

from m2.plan import collectives, hlo

MESH = {'data': 2, 'fsdp': 4, 'tensor': 1}
LOOP = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(256)} parameter(0)
  %b = f32[]{:T(256)} parameter(1)
  ROOT %sum = f32[]{:T(256)} add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[64,128]{1,0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %cut = bf16[16,128]{1,0} slice(%all-reduce.7), slice={[0:16], [0:128]}
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %all-reduce.8 = f32[8]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(step)/inner/psum"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %all-reduce.8)
}

%inner_condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %while.1 = (s32[], f32[8]{0}) while(%p.1), condition=%inner_condition, body=%inner
}

%condition (q.1: (s32[], f32[8])) -> pred[] {
  %q.1 = (s32[], f32[8]{0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  ROOT %less.1 = pred[] compare(%j.1, %j.1), direction=LT
}

ENTRY %main (x: f32[8], y: bf16[64,128]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %y = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %x.1)
  %while.2 = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"62"}}
  %fusion.1 = bf16[16,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather-start.1 = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%fusion.1), replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'fsdp'}, dimensions={0}
  %all-gather-done.1 = bf16[64,128]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %out = f32[8]{0} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501


class ModuleTest(absltest.TestCase):
  def test_loops_multiply_and_unknown_ones_are_asked_for(self):
    module = hlo.parse(LOOP)
    self.assertEqual(module.times()['inner'], 62 * 5)
    self.assertEqual(module.times()['inner_condition'], 62 * 6)
    unknown = hlo.parse(LOOP.replace(', backend_config={"known', ', {"un'))
    self.assertEqual(unknown.times(lambda loop: 3)['inner'], 3 * 5)

  def test_shapes_layouts_and_memory_spaces(self):
    start = hlo.parse(LOOP).by_name['all-gather-start.1']
    self.assertEqual([shape.bytes for shape in start.shapes], [4096, 16384])
    self.assertEqual(hlo.parse(LOOP).by_name['y'].shapes[0].space, 1)

  def test_text_that_is_no_program(self):
    with self.assertRaisesRegex(ValueError, 'no ENTRY'):
      hlo.parse('fusion')


class CollectivesTest(parameterized.TestCase):
  def test_kinds_axes_sizes_and_times(self):
    found = collectives.find(hlo.parse(LOOP), MESH)
    got = {
      one.name: (one.kind, one.axes, one.ways, one.size, one.times)
      for one in found
    }
    self.assertEqual(
      got,
      {
        'all-reduce.7': ('reduce-scatter', ('fsdp',), 4, 64 * 128 * 2, 1),
        'all-reduce.8': ('all-reduce', ('fsdp',), 4, 32, 310),
        'all-gather-start.1': ('all-gather', ('fsdp',), 4, 64 * 128 * 2, 1),
      },
    )
    self.assertEqual(
      collectives.totals(found),
      {
        ('reduce-scatter', ('fsdp',)): 16384 * 3 / 4,
        ('all-reduce', ('fsdp',)): 310 * 32 * 2 * 3 / 4,
        ('all-gather', ('fsdp',)): 16384 * 3 / 4,
      },
    )

  @parameterized.parameters(
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', ('fsdp',), 4),
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', ('data',), 2),
    ('replica_groups={}', ('data', 'fsdp'), 8),
    ('replica_groups=[2,4]<=[8]', ('fsdp',), 4),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', ('data',), 2),
    ('replica_groups=[1,8]<=[8]', ('data', 'fsdp'), 8),
    ("replica_groups=mesh['a'=8] {'a'}", ('data', 'fsdp'), 8),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ('data',), 2),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", ('data', 'fsdp'), 8),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", ('fsdp',), 4),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", ('data',), 2),
    ("replica_groups=mesh['a'=8,'b'=1] {'a':(2)2,'b'}", ('fsdp',), 2),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}", ('data', 'fsdp'), 4),
    ('source_target_pairs={{0,1},{1,2},{2,3},{3,0}}', ('fsdp',), 2),
    ('source_target_pairs={{0,4},{4,0}}', ('data',), 2),
  )
  def test_groups_in_every_form(self, text, axes, ways):
    members = collectives.groups(f', channel_id=1, {text}, dimensions=', 8)
    self.assertEqual(tuple(collectives.reach(members, MESH)), axes)
    self.assertEqual(members.shape[1], ways)

  def test_a_part_of_an_axis_counts_as_much(self):
    halves = np.arange(8).reshape(4, 2)  # of two of the four along fsdp
    self.assertEqual(collectives.reach(halves, MESH), {'fsdp': 2})
    self.assertEqual(
      collectives.reach(np.arange(8)[None], MESH), {'data': 2, 'fsdp': 4}
    )

  def test_a_permute_to_oneself_is_free(self):
    text = LOOP.replace(
      'ROOT %out',
      '%there = f32[8]{0} collective-permute(%x.1), '
      'source_target_pairs={{0,1},{1,0},{2,2},{3,3}}\n  ROOT %out',
    )
    found = {one.name: one for one in collectives.find(hlo.parse(text), MESH)}
    # Two of eight devices send 32 bytes.
    self.assertEqual(found['there'].axes, ('fsdp',))
    self.assertEqual(found['there'].wire, 32 * 2 / 8)

  @parameterized.parameters(
    ('channel_id=1', 'no replica groups'),
    ('replica_groups={{0,1},{2}}', 'different sizes'),
    ("replica_groups=mesh['a'=8] {'b'}", 'no such axes'),
    ("replica_groups=mesh['a'=8] {'a':(3)2}", 'do not divide'),
  )
  def test_groups_that_cannot_be_read(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      collectives.groups(text, 8)

  @parameterized.parameters(
    ('all-gather', 4, 75.0),
    ('reduce-scatter', 4, 75.0),
    ('all-reduce', 4, 150.0),
    ('all-to-all', 2, 50.0),
    ('collective-permute', 8, 100.0),
  )
  def test_bytes_on_the_wire(self, kind, ways, wire):
    self.assertEqual(collectives.wire_bytes(kind, 100.0, ways), wire)


if __name__ == '__main__':
  absltest.main()
