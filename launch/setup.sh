#!/usr/bin/env bash
# Create or reuse .venv and install the package with the given extras; for sourcing.
#   . launch/setup.sh [extra[,extra...]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $python is older than Python 3.11: install a newer one or set PYTHON" >&2
  exit 2
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  # Missing, or incomplete: an earlier run was interrupted, or python3-venv was missing.
  if ! "$python" -m venv --clear .venv; then
    echo "error: no virtual environment: install python3-venv (apt install python3-venv)" >&2
    exit 2
  fi
fi
# The stamp is a copy of pyproject.toml at the last installation of these extras.
stamp=.venv/installed-${extra:-none}
if ! cmp -s pyproject.toml "$stamp"; then
  echo "installing vjepa_jax${extra:+[$extra]} into .venv" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  cp pyproject.toml "$stamp"
fi
