"""Bytes that a compiled program moves in HBM, on programs small to count."""

from absl.testing import absltest, parameterized

from m2.plan import hlo, roofline

# Matrices of a layer, of which a kernel makes one plain in each of six turns.
KERNEL = """HloModule jit_run

%body (p: (s32[], u8[64,384,128])) -> (s32[], u8[64,384,128]) {
  %p = (s32[], u8[64,384,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %codes = u8[64,384,128]{2,1,0} get-tuple-element(%p), index=1
  %plain = bf16[384,128]{1,0} custom-call(%i, %codes), custom_call_target="tpu_custom_call"DECLARED
  ROOT %t = (s32[], u8[64,384,128]{2,1,0}) tuple(%i, %codes)
}

%condition (q: (s32[], u8[64,384,128])) -> pred[] {
  %q = (s32[], u8[64,384,128]{2,1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (x: (s32[], u8[64,384,128])) -> (s32[], u8[64,384,128]) {
  %x = (s32[], u8[64,384,128]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], u8[64,384,128]{2,1,0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""  # noqa: E501
ALL = 4 + 64 * 384 * 128 + 2 * 384 * 128


class TrafficTest(parameterized.TestCase):
  @parameterized.parameters(('', ALL), (1000, 1000), (10**9, ALL))
  def test_a_kernel_moves_its_operands_or_what_it_declares(self, said, moved):
    declared = (
      ', backend_config={"custom_call_config":{"body":"x","cost_estimate":'
      f'{{"flops":"7","transcendentals":"0","bytes_accessed":"{said}"}}}}}}'
    )
    text = KERNEL.replace('DECLARED', declared if said else '')
    self.assertEqual(roofline.traffic(hlo.parse(text)), 6 * moved)


if __name__ == '__main__':
  absltest.main()
