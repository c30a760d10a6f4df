#!/usr/bin/env bash
# Builds the wheel and the source distribution, installs each in a fresh environment outside the checkout, with the
# newest and with the lowest stated versions of what the planner needs, and runs its commands there.
#   tests/support/installed.sh [PYTHON ...]      each a Python to try, python3 by default: python3.11 python3.12 python3.13
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
pythons=("${@:-python3}")

"${pythons[0]}" -m venv "$work/build"
"$work/build/bin/python" -m pip install -q build
git -C "$root" archive --format=tar HEAD | (mkdir "$work/source" && tar -x -C "$work/source")
"$work/build/bin/python" -m build -q --outdir "$work/dist" "$work/source"
ls "$work/dist"

try() { # python, package, versions ...
    local python="$1" package="$2" place
    shift 2
    place="$(mktemp -d "$work/env.XXXX")"
    "$python" -m venv "$place"
    "$place/bin/python" -m pip install -q "$package" "$@"
    cd "$place"
    PATH="$place/bin:$PATH"
    kvsim --version
    kvsim estimate qwen3-8b --gpu h100-sxm --ctx 32k >estimate.txt
    grep -q "fp16" estimate.txt
    kvsim explain gpt2 --json >explain.json
    kvsim report gpt2 --gpu l4 --out page.html >report.txt
    kvsim plan gpt2 --gpu l4 --users 8 --out rows.csv >plan.txt
    kvsim sweep --model gpt2 --out grid.csv --quiet >sweep.txt
    test -s page.html && test -s rows.csv && test -s grid.csv
    "$place/bin/python" -c "import kvsim, kvruntime, pathlib; assert '$root' not in kvsim.__file__, kvsim.__file__"
    cd "$root"
    echo "ok: $("$python" --version), $(basename "$package"), ${*:-newest}"
}

for python in "${pythons[@]}"; do
    for package in "$work"/dist/*.whl "$work"/dist/*.tar.gz; do
        try "$python" "$package[plan]"
    done
    wheel="$(ls "$work"/dist/*.whl)"
    numpy="$("$python" -c 'import sys; print("1.26.0" if sys.version_info < (3, 13) else "2.1.0")')" # the first that has it
    try "$python" "$wheel[plan]" "click==8.1.0" "numpy==$numpy"
done
