#!/usr/bin/env bash
# The whole loop on this machine: set-up, SFT, agentic RL, one self-evolution
# round, sealed test, report. Arguments go to main.py and may replace these:
#
#   bash launch/quickstart.sh --config.seed=1 --workdir=runs/seed1
#
# --dry-run prints what would be run. A run that was stopped goes on where it was
# when called again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/steps.sh "$@"
step bash launch/env.sh
last_step .venv/bin/python main.py --config=configs/quickstart.py \
  --workdir=runs/quickstart ${words[@]+"${words[@]}"}
