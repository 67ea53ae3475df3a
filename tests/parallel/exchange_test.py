"""The arithmetic of the exchange: who is sent when, and where it lies."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from m2.parallel import cost, exchange

CASES = (
  # tokens, top_k, experts a device, devices, chunks, room
  (24, 4, 3, 4, 2, cost.Room(3, 5, False)),
  (24, 4, 3, 4, 1, cost.Room(24, 9, False)),
  (40, 2, 2, 8, 4, cost.Room(2, 3, False)),
  (16, 8, 8, 2, 1, cost.Room(16, 128, True)),
)
LAWS = ('uniform', 'one device', 'one expert', 'nowhere', 'some slots')


def index(law: str, tokens: int, top_k: int, total: int) -> np.ndarray:
  rng = np.random.default_rng(7)
  found = np.argsort(rng.random((tokens, total)))[:, :top_k]
  if law == 'one device':
    found = np.broadcast_to(np.arange(top_k), found.shape)
  if law == 'one expert':
    found = np.where(np.arange(top_k) == 0, total - 1, total) + 0 * found
  if law == 'nowhere':
    found = np.full_like(found, total)
  if law == 'some slots':
    found = np.where(rng.random(found.shape) < 0.4, total, found)
    found[::5] = -1
  return found.astype(np.int32)


class RoutesTest(parameterized.TestCase):
  @parameterized.product(case=CASES, law=LAWS)
  def test_every_copy_goes_once_and_there_is_room(self, case, law):
    tokens, top_k, experts, devices, chunks, room = case
    chosen_MX = index(law, tokens, top_k, experts * devices)
    routes = exchange.plan_routes(
      jnp.asarray(chosen_MX), experts, devices, chunks, room
    )
    fits_MN, round_MN = np.asarray(routes.fits_MN), np.asarray(routes.round_MN)
    here = (chosen_MX >= 0) & (chosen_MX < experts * devices)
    device_MX = np.where(here, chosen_MX // experts, devices)
    choices_MN = (device_MX[..., None] == np.arange(devices)).sum(1)
    needed_MN = choices_MN > 0
    np.testing.assert_array_equal(fits_MN | (round_MN >= 0), needed_MN)
    self.assertFalse((fits_MN & (round_MN >= 0)).any())
    for part in range(chunks):
      own = slice(part * tokens // chunks, (part + 1) * tokens // chunks)
      taken = np.where(fits_MN[own], choices_MN[own], 0)
      self.assertLessEqual(taken.sum(0).max(), room.choices)
      self.assertLessEqual(fits_MN[own].sum(0).max(), room.copies)
    for step in range(round_MN.max() + 1):
      now = round_MN == step
      self.assertTrue(now.any(), 'an empty round')
      self.assertLessEqual(np.where(now, choices_MN, 0).sum(0).max(), room[1])
      self.assertLessEqual(now.sum(0).max(), min(tokens, room.choices))
    if room.always:
      self.assertEqual(round_MN.max(), -1)

  @parameterized.product(
    law=LAWS, packed=(False, True), shape=((4, 4), (2, 8), (8, 2))
  )
  def test_places_hold_each_copy_in_its_block(self, law, packed, shape):
    top_k, devices = shape
    tokens, copies, experts = 12, 12, 4
    chosen_MX = index(law, tokens, top_k, experts * devices)
    routes = exchange.plan_routes(
      jnp.asarray(chosen_MX), experts, devices, 1, cost.Room(12, 99, True)
    )
    plan = exchange.places(
      routes.fits_MN, routes.device_MX, copies, packed=packed
    )
    place_MJ, columns = np.asarray(plan.place_MX), min(top_k, devices)
    self.assertEqual(place_MJ.shape, (tokens, columns))
    source_NC = np.asarray(plan.source_P).reshape(devices, copies) // columns
    fits_MN = np.asarray(routes.fits_MN)
    for device in range(devices):
      block = source_NC[device]
      sent = np.flatnonzero(fits_MN[:, device])
      np.testing.assert_array_equal(block[block < tokens], sent)
      if packed:  # from the start, as ragged sends them
        self.assertTrue((block[: len(sent)] < tokens).all())
      self.assertEqual(plan.sizes_G[device], len(sent))
    for token in range(tokens):
      found = place_MJ[token][place_MJ[token] < devices * copies]
      want = np.flatnonzero(source_NC.reshape(-1) == token)
      self.assertEqual(sorted(found), sorted(want))


if __name__ == '__main__':
  absltest.main()
