"""Converts weights between a run's checkpoint and the public format.

    python main.py --config=configs/convert.py \
      --config.convert.source=WORKDIR --config.convert.target=DIR

writes the newest checkpoint of a run as Hugging Face files (bfloat16; float32
or fp8 by --config.convert.dtype). --config.convert.format=workdir goes the
other way: DIR of such files to a directory that --config.checkpoint.init_from
of a run accepts. The shape of the model is read from the source. The public
files may be in an object store: DIR is gs://... or s3://... then. The same
command again goes on with a conversion to them that was interrupted.
"""

import ml_collections

from m2 import config as settings


def get_config() -> ml_collections.ConfigDict:
  """Settings of the conversion; source and target must be given."""
  return settings.to_config(
    settings.RunConfig(
      mode='convert',
      mesh=settings.MeshConfig(data=1, fsdp=-1),  # over all devices
      convert=settings.ConvertConfig(),
    )
  )
