#!/usr/bin/env bash
# The whole road by one command, from data to a published model: bash launch/speedrun.sh --scale demo
# In a fresh clone it installs into .venv first; PYTHON=... takes another Python, in which all is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  make --no-print-directory install >&2
  PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m fvlm.research.speedrun.run "$@"
