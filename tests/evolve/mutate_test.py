"""Nothing but small, typed curriculum edits passes the applier."""

import copy
import math
import random

import ml_collections
from absl.testing import absltest, parameterized

from m2.evolve import diagnose, mutate

SKILLS = ('add_col', 'rename_col', 'split_table', 'unique_dedup')
HOSTILE_ATTEMPTS = 3000
SHARE_TOLERANCE = 1e-9


def config() -> ml_collections.ConfigDict:
  """A whole evolve config in miniature: what is frozen is there to be hit."""
  return ml_collections.ConfigDict(
    {
      'mode': 'evolve',
      'seed': 0,
      'steps': 100,
      'tasks': {
        'family': 'sql',
        'skills': dict.fromkeys(SKILLS, 1.0) | {'held_out': 0.0},
        'difficulty_min': 0,
        'difficulty_max': 2,
        'retry_demos': 0.3,
      },
      'eval': {'split': 'gate', 'tasks': 300, 'trials': 1},
      'evolve': {'steps': 200, 'min_gain': 0.0, 'max_loss': 0.1},
      'optim': {'lr': 3e-4},
      'checkpoint': {'init_from': 'runs/rl'},
    }
  ).lock()


def finding(skill: str) -> diagnose.Finding:
  return diagnose.Finding(skill, 'why', 'what', 'else', (), 1.0, 0.2)


def edit(path, old, new) -> mutate.ConfigEdit:
  return mutate.ConfigEdit(path, old, new)


class Liar(str):
  """A path that claims to be another one when it is compared or split."""

  def __eq__(self, other):
    return True

  __hash__ = str.__hash__

  def split(self, *unused):
    return ['tasks', 'skills', 'add_col']


class Elastic(float):
  """A number that is within every bound."""

  def __le__(self, other):
    return True

  __ge__ = __lt__ = __gt__ = __le__


class Short(list):
  """A list that claims to hold one item."""

  def __len__(self):
    return 1


WEIGHT = 'tasks.skills.add_col'
REFUSED = {
  'seed': [edit('seed', 0, 1)],
  'steps': [edit('steps', 100, 101)],
  'evaluation': [edit('eval.tasks', 300, 3)],
  'split': [edit('eval.split', 'gate', 'train')],
  'the gate': [edit('evolve.min_gain', 0.0, -1.0)],
  'learning rate': [edit('optim.lr', 3e-4, 1e-3)],
  'checkpoint': [edit('checkpoint.init_from', 'runs/rl', 'elsewhere')],
  'whole section': [edit('tasks.skills', {}, {'add_col': 1.0})],
  'whole config': [edit('', 0, 1)],
  'new skill': [edit('tasks.skills.cheat', 0.0, 1.0)],
  'below a leaf': [edit('tasks.skills.add_col.real', 1.0, 2.0)],
  'attribute': [edit('tasks.skills.__class__', 1.0, 2.0)],
  'wildcard': [edit('tasks.skills.*', 1.0, 2.0)],
  'family': [edit('tasks.family', 'sql', 'shell')],
  'spaces': [edit(' tasks.skills.add_col', 1.0, 2.0)],
  'other letters': [edit('tasks.skillѕ.add_col', 1.0, 2.0)],
  'dots': [edit('tasks..skills.add_col', 1.0, 2.0)],
  'path of another type': [edit(('tasks', 'skills'), 1.0, 2.0)],
  'lying path': [edit(Liar('seed'), 1.0, 2.0)],
  'not an edit': [('tasks.skills.add_col', 1.0, 2.0)],
  'stale': [edit(WEIGHT, 0.5, 2.0)],
  'int for float': [edit(WEIGHT, 1.0, 2)],
  'bool for float': [edit(WEIGHT, 1.0, True)],
  'text for float': [edit(WEIGHT, 1.0, '2.0')],
  'elastic number': [edit(WEIGHT, 1.0, Elastic(1e9))],
  'nan': [edit(WEIGHT, 1.0, math.nan)],
  'infinity': [edit(WEIGHT, 1.0, math.inf)],
  'zero': [edit(WEIGHT, 1.0, 0.0)],
  'negative': [edit(WEIGHT, 1.0, -1.0)],
  'tiny': [edit(WEIGHT, 1.0, 1e-9)],
  'huge': [edit(WEIGHT, 1.0, 1e9)],
  'starves the others': [edit(WEIGHT, 1.0, 500.0)],
  'held-out skill': [edit('tasks.skills.held_out', 0.0, 1.0)],
  'starves itself': [edit(WEIGHT, 1.0, 0.01)],
  'bool for int': [edit('tasks.difficulty_max', 2, True)],
  'two steps harder': [edit('tasks.difficulty_max', 2, 4)],
  'too hard': [
    edit('tasks.difficulty_max', 2, 3),
    edit('tasks.difficulty_max', 3, 4),
  ],
  'twice': [edit(WEIGHT, 1.0, 2.0), edit(WEIGHT, 2.0, 4.0)],
  'one of two is frozen': [edit(WEIGHT, 1.0, 2.0), edit('seed', 0, 1)],
  'three': [edit(f'tasks.skills.{skill}', 1.0, 2.0) for skill in SKILLS[:3]],
  'three that claim to be one': Short(
    edit(f'tasks.skills.{skill}', 1.0, 2.0) for skill in SKILLS[:3]
  ),
  'none': [],
  'no sequence': None,
  'a number': 5,
  'text': 'tasks.skills.add_col',
  'beyond floats': [edit('tasks.difficulty_max', 2, 10**400)],
  'beyond text': [edit('tasks.difficulty_max', 2, 10**5000)],
  'beyond text for float': [edit(WEIGHT, 1.0, 10**5000)],
  'stale beyond text': [edit('tasks.difficulty_max', 10**5000, 3)],
  'edit beyond text': [10**5000],
}


class ScaleTest(parameterized.TestCase):
  @parameterized.parameters(1e-9, 1.0, 500.0, 1e9)
  def test_weights_have_no_unit(self, scale):
    base = config()
    for name, weight in base.tasks.skills.to_dict().items():
      base.tasks.skills[name] = weight * scale
    old = base.tasks.skills['add_col']
    edited = mutate.apply_edits(base, [edit(WEIGHT, old, old * 3)])
    self.assertGreater(mutate.shares(edited)['add_col'], 0.3)


class ApplyTest(parameterized.TestCase):
  @parameterized.named_parameters((name, name) for name in REFUSED)
  def test_is_refused_and_changes_nothing(self, name):
    base = config()
    before = copy.deepcopy(base.to_dict())
    with self.assertRaises(mutate.EditError):
      mutate.apply_edits(base, REFUSED[name])
    self.assertEqual(base.to_dict(), before)

  def test_applies_to_a_locked_copy(self):
    base = config()
    edited = mutate.apply_edits(
      base, [edit(WEIGHT, 1.0, 3.0), edit('tasks.difficulty_max', 2, 3)]
    )
    self.assertEqual(edited.tasks.skills.add_col, 3.0)
    self.assertEqual(edited.tasks.difficulty_max, 3)
    self.assertEqual(base.tasks.skills.add_col, 1.0)
    self.assertTrue(edited.is_locked)

  def test_no_weight_is_too_small_to_be_seen_or_too_large_to_add(self):
    base = config()
    with base.unlocked():
      base.tasks.skills.add_col = 0.0
    with self.assertRaisesRegex(mutate.EditError, 'held out of training'):
      mutate.apply_edits(base, [edit(WEIGHT, 0.0, 5e-324)])
    with self.assertRaises(mutate.EditError):
      mutate.apply_edits(config(), [edit(WEIGHT, 1.0, 1e308)])

  def test_some_weight_remains(self):
    base = config()
    with base.unlocked():
      for skill in SKILLS[2:]:
        base.tasks.skills[skill] = 0.0
    edits = [edit(f'tasks.skills.{skill}', 1.0, 0.0) for skill in SKILLS[:2]]
    with self.assertRaisesRegex(mutate.EditError, 'no weight above 0'):
      mutate.apply_edits(base, edits)

  def test_difficulties_stay_ordered(self):
    base = config()
    with base.unlocked():
      base.tasks.difficulty_min = 2
    with self.assertRaisesRegex(mutate.EditError, 'difficulty_min=2'):
      mutate.apply_edits(base, [edit('tasks.difficulty_max', 2, 1)])

  def test_no_sequence_of_hostile_proposals_leaves_the_allow_list(self):
    """Random chains, half of them near the rules; all invariants hold."""
    rng = random.Random(0)
    base = config()
    current = base
    passed = 0
    for _ in range(HOSTILE_ATTEMPTS):
      edits = [_random_edit(rng, current) for _ in range(rng.randint(0, 3))]
      try:
        after = mutate.apply_edits(current, edits)
      except mutate.EditError:
        continue
      passed += 1
      _check_invariants(self, current, after)
      current = after if rng.random() < 0.9 else base
    self.assertGreater(passed, HOSTILE_ATTEMPTS // 50)
    frozen = {k: v for k, v in current.to_dict().items() if k != 'tasks'}
    self.assertEqual(
      frozen, {k: v for k, v in base.to_dict().items() if k != 'tasks'}
    )


def _random_edit(rng, current):
  paths = [path for path, _ in _leaves(current.to_dict())]
  paths += ['tasks.skills', 'tasks.skills.new', 'gate', 'tasks.skills.']
  near = [path for path in paths if path.startswith('tasks.')]
  path = rng.choice(near if rng.random() < 0.7 else paths)
  held = dict(_leaves(current.to_dict())).get(path, 1.0)
  old = (
    held if rng.random() < 0.9 else rng.choice([0, 0.0, None, 'x', math.nan])
  )
  factor = rng.choice([0.5, 0.9, 1.1, 2.0, 10.0, 100.0])
  values = [
    0,
    1,
    2,
    3,
    True,
    math.nan,
    math.inf,
    -1.0,
    None,
    'x',
    {},
    [],
    1e300,
  ]
  if isinstance(held, float) and rng.random() < 0.7:
    values = [held * factor]
  return edit(path, old, rng.choice(values))


def _leaves(tree, above=''):
  for name, value in tree.items():
    path = f'{above}.{name}' if above else name
    if isinstance(value, dict):
      yield from _leaves(value, path)
    else:
      yield path, value


def _check_invariants(test, before, after):
  old, new = dict(_leaves(before.to_dict())), dict(_leaves(after.to_dict()))
  test.assertEqual(list(old), list(new))
  changed = [path for path in old if old[path] != new[path]]
  test.assertLessEqual(len(changed), mutate.MAX_EDITS)
  for path in changed:
    test.assertTrue(
      path.startswith('tasks.skills.')
      or path in ('tasks.difficulty_min', 'tasks.difficulty_max'),
      path,
    )
    test.assertIs(type(new[path]), type(old[path]))
  shares, were = mutate.shares(after), mutate.shares(before)
  for skill in SKILLS:
    test.assertGreaterEqual(shares[skill], mutate.REPLAY * were[skill])
  test.assertLessEqual(new['tasks.difficulty_min'], new['tasks.difficulty_max'])


class ProposeTest(parameterized.TestCase):
  @parameterized.product(targeted=(0.1, 0.5, 0.8), weight=(0.03, 1.0, 5.0))
  def test_moves_the_share_and_keeps_the_rest_in_proportion(
    self, targeted, weight
  ):
    base = config()
    with base.unlocked():
      base.tasks.skills.split_table = weight
      base.tasks.skills.add_col = 2.0
    mutation = mutate.propose(finding('split_table'), base, targeted)
    after = mutate.shares(mutate.apply_edits(base, mutation.edits))
    before = mutate.shares(base)
    for skill in SKILLS:
      wanted = (1 - targeted) * before[skill]
      wanted += targeted * (skill == 'split_table')
      self.assertAlmostEqual(after[skill], wanted, delta=SHARE_TOLERANCE)

  def test_is_one_edit_that_states_what_it_saw(self):
    mutation = mutate.propose(finding('add_col'), config(), 0.5)
    self.assertLen(mutation.edits, 1)
    self.assertEqual(mutation.edits[0].path, WEIGHT)
    self.assertEqual(mutation.edits[0].old, 1.0)
    self.assertEqual(mutation.expects, 0.2)

  def test_needs_another_skill_to_take_from(self):
    base = ml_collections.ConfigDict({'tasks': {'skills': {'add_col': 1.0}}})
    with self.assertRaisesRegex(mutate.EditError, 'no mixture'):
      mutate.propose(finding('add_col'), base, 0.5)


if __name__ == '__main__':
  absltest.main()
