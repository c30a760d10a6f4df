#!/usr/bin/env bash
# Installs the lowest versions that pyproject.toml states for `[all]`, and runs the essential tests on them.
#   tests/support/lowest.sh [PYTHON] [NAME==VERSION ...]    each in place of the stated one: a machine without the CUDA
#                                                          build of the lowest torch gives torch==2.13.0
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
python="${1:-python3.11}"

"$python" -m venv "$work/env"
"$work/env/bin/python" "$root/tests/support/lowest.py" "${@:2}" >"$work/lowest.txt"
cat "$work/lowest.txt"
"$work/env/bin/python" -m pip install -q -r "$work/lowest.txt" pytest hypothesis
"$work/env/bin/python" -m pip install -q --no-deps "$root"
"$work/env/bin/python" -m pip check
cd "$root"
# DeprecationWarning: old packages beside the newest of what they need in turn
"$work/env/bin/python" -m pytest -p no:cacheprovider -W ignore::DeprecationWarning \
    tests/kvsim/test_{commandline,numbers,files,sweep,serve,page,install,plan,timing}.py \
    tests/kvruntime/test_{cli,full,token,evict,evict_scores,boost,reference,weights,results,hf_convert,hf_interface}.py \
    tests/validation/test_{quality_again,reliability}.py
