#!/usr/bin/env bash
# Lint, check types and test.   ./tests/run.sh [pytest arguments]
. "$(dirname "$0")/../launch/setup.sh" test,report,torch,prepare,tfds
bin=.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
# Two workers, each test file in one of them: the tests of a file share their fixtures.
exec "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
