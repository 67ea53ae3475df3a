"""The JobSet that launch/gke.sh applies, by the schemas of its clusters.

The JobSet's own fields are those of the models that Kubeflow's API package
generates from its definition; what it holds is a Job of Kubernetes, whose
schemas `kubernetes-validate` ships.
"""

import copy
import math
import pathlib
import subprocess

import kubernetes_validate
import yaml
from absl.testing import absltest, parameterized
from kubeflow_trainer_api.models import jobset_v1alpha2_job_set

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'gke.sh'
KUBERNETES = ('1.30', '1.37')  # what clusters run in between is held to both
BASE = {'NAME': 'exp1', 'IMAGE': 'reg/m2:1', 'BUCKET': 'bkt'}
TPU = BASE | {'ACCELERATOR': 'tpu-v5p-slice', 'TOPOLOGY': '4x4x8'}
GPU = BASE | {'ACCELERATOR': 'nvidia-h100-mega-80gb', 'HOSTS': '4'}
ALL = {'SECRETS': 'A', 'SPOT': 'yes', 'SERVICE_ACCOUNT': 'sa', 'RESTARTS': '0'}
ARGUMENTS = ['--config=configs/m2.py', '--x=a: "b" \\ $c # d', "--y='", '*&!']


def manifest(**variables: str) -> dict:
  run = subprocess.run(
    ['bash', SCRIPT, '--dry-run', 'apply', *ARGUMENTS],
    env={'PATH': '/usr/bin:/bin', **variables},
    capture_output=True,
    text=True,
    check=True,
  )
  first, *lines, last = run.stdout.splitlines()
  assert first.startswith('kubectl apply --filename=- <<') and last == 'END'
  return yaml.safe_load('\n'.join(lines))


def lost(given, kept, path: str) -> list[str]:
  """Paths of what is in `given` and not, or otherwise, in `kept`."""
  if isinstance(given, dict) and isinstance(kept, dict):
    pairs = [(key, given[key], kept.get(key)) for key in given]
  elif isinstance(given, list) and isinstance(kept, list):
    pairs = [(i, *pair) for i, pair in enumerate(zip(given, kept, strict=True))]
  else:
    return [] if given == kept else [f'{path}: {given!r} is {kept!r}']
  return sum((lost(a, b, f'{path}.{key}') for key, a, b in pairs), [])


def check(jobset: dict) -> None:
  """Raises where a cluster would refuse, or would drop a field unsaid."""
  model = jobset_v1alpha2_job_set.JobsetV1alpha2JobSet
  unknown = lost(jobset, model.from_dict(jobset).to_dict(), 'jobset')
  if unknown:
    raise ValueError(f'no fields of a JobSet: {unknown}')
  for part in jobset['spec']['replicatedJobs']:
    job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'x'}}
    for version in KUBERNETES:
      kubernetes_validate.validate(job | part['template'], version, strict=True)


def pod(jobset: dict) -> dict:
  (part,) = jobset['spec']['replicatedJobs']
  return part['template']['spec']['template']['spec']


class ManifestTest(parameterized.TestCase):
  @parameterized.parameters(
    TPU, TPU | ALL, TPU | {'SLICES': '2'}, GPU, GPU | ALL
  )
  def test_is_valid_and_carries_arguments_whole(self, **variables):
    jobset = manifest(**variables)
    check(jobset)
    (main,) = pod(jobset)['containers']
    self.assertEqual(main['args'], ['--workdir=/bucket/exp1', *ARGUMENTS])

  @parameterized.parameters(
    ('4x4x8', '', 32, 4), ('16x16', '', 64, 4), ('2x4', '8', 1, 8)
  )
  def test_every_chip_of_a_topology_is_asked_for_once(
    self, topology, chips, hosts, each
  ):
    jobset = manifest(**TPU | {'TOPOLOGY': topology, 'CHIPS': chips})
    (part,) = jobset['spec']['replicatedJobs']
    job = part['template']['spec']
    self.assertEqual((job['parallelism'], job['completions']), (hosts, hosts))
    (main,) = pod(jobset)['containers']
    self.assertEqual(main['resources']['limits'], {'google.com/tpu': each})
    self.assertEqual(hosts * each, math.prod(map(int, topology.split('x'))))
    selector = pod(jobset)['nodeSelector']
    self.assertEqual(selector['cloud.google.com/gke-tpu-topology'], topology)

  def test_hosts_of_gpus_find_each_other_and_those_of_tpus_are_told(self):
    (main,) = pod(manifest(**GPU))['containers']
    found = {one['name']: one for one in main['env']}
    # JobSet names host i of job j NAME-JOB-j-i, in the domain NAME.
    address = found['JAX_COORDINATOR_ADDRESS']['value']
    self.assertEqual(address, 'exp1-hosts-0-0.exp1:8476')
    self.assertEqual(found['JAX_NUM_PROCESSES']['value'], '4')
    field = found['JAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']
    self.assertIn('batch.kubernetes.io/job-completion-index', field)
    (main,) = pod(manifest(**TPU))['containers']
    self.assertNotIn('env', main)

  def test_secrets_are_referred_to_and_nothing_runs_as_root(self):
    for variables in (TPU | ALL, GPU | ALL):
      spec = pod(manifest(**variables))
      (main,) = spec['containers']
      self.assertEqual(main['envFrom'], [{'secretRef': {'name': 'exp1'}}])
      self.assertTrue(spec['securityContext']['runAsNonRoot'])
      self.assertGreater(spec['terminationGracePeriodSeconds'], 60)

  def test_the_check_sees_what_a_cluster_would_not_take(self):
    sound = manifest(**TPU)
    misspelt = copy.deepcopy(sound)
    misspelt['spec']['failurePolicy']['maxRestart'] = 3
    with self.assertRaisesRegex(ValueError, 'maxRestart'):
      check(misspelt)
    wrong = copy.deepcopy(sound)
    wrong['spec']['replicatedJobs'][0]['replicas'] = 'two'
    with self.assertRaises(ValueError):
      check(wrong)
    inner = copy.deepcopy(sound)
    pod(inner)['containers'][0]['arg'] = []
    with self.assertRaises((ValueError, kubernetes_validate.ValidationError)):
      check(inner)


if __name__ == '__main__':
  absltest.main()
