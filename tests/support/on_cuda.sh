#!/usr/bin/env bash
# What of the kernels' tests must also run on a CUDA device, in two parts: `on_cuda.sh pools`, `on_cuda.sh rest`.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD
unset TRITON_INTERPRET
t=tests/kvruntime
case "${1:-pools}" in
  pools) # tables, pages, lines; the step's slot and its rotary position; layers stored together
    python -m pytest -q "$t/test_pools.py" "$t/test_step.py" "$t/test_prompt.py" "$t/test_kernels.py::test_block_table" \
      "$t/test_kernels.py::test_words_bit_exact"
    python -m pytest -q "$t/test_fast.py" -k "pool or block_table or fresh or one_row or several_queries"
    ;;
  rest) # what has no pool, as before
    python -m pytest -q "$t/test_kernels.py" "$t/test_fast.py" "$t/test_full.py" -k "not test_compiles"
    ;;
esac
