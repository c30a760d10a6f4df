#!/usr/bin/env bash
# Everything that wants a CUDA device, in one go: kernel tests there, memory and peaks, benchmarks, perplexity.
#
#   validation/record.sh [TEXT]      TEXT: WikiText-2's raw test split for perplexity (skipped without it)
#
# Results go to validation/results/ and validation/results/bench/; every part resumes where an earlier run stopped, so a
# machine that is only lent for minutes can be used in several goes. Needs the runtime and test extras; about twenty
# minutes on an H100, most of them Triton compiling.
set -uo pipefail
text="$(realpath "${1:-/dev/null}")"
cd "$(dirname "$0")/.."
bench=validation/results/bench
mkdir -p "$bench"
python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "no CUDA device" >&2; exit 2; }
name="$(python3 -c 'import torch; from validation.results import slug; print(slug(torch.cuda.get_device_name()))')"

python3 -m pytest -q -p no:cacheprovider -p no:benchmark -n $(($(nproc) / 2)) tests/test_kernels.py tests/test_fast.py \
    tests/test_hf_generate.py tests/test_hf_honesty.py tests/test_hf_masks.py &
tests=$!
python3 -m validation memory --device cuda --jobs $(($(nproc) / 4)) --record --resume >/dev/null &
memory=$!
failed=""
if [ -f "$text" ] && [ "$text" != /dev/null ]; then
    folder="$(dirname "$text")" file="$(basename "$text")" out="$PWD/$bench" root="$PWD"
    (cd "$folder" && PYTHONPATH="$root" python3 -m kvruntime perplexity --text "$file" --window 1024 --chunk 1 --batch 296 \
        --max-tokens 0 --nbits 8 --nbits 4 --nbits 2 --resume --out "$out/$name-wikitext2.json") || failed+=" perplexity"
fi
wait "$tests" || failed+=" tests"
wait "$memory" || failed+=" memory"
for model in gpt2 gpt2-medium gpt2-large; do # speed alone on the device
    python3 -m kvruntime bench --model "$model" --only memory --only speed --nbits 2 --nbits 4 --batch 1,64 \
        --resume --out "$bench/$name-$model.json" || failed+=" bench:$model"
done
for part in kernels engine; do # each resumes; a lost device (exit code 3) asks for a new process
    mkdir -p "validation/results/$part"
    options="--peers"
    [ "$part" = engine ] || options="--more --splits"
    for turn in 1 2 3; do
        # shellcheck disable=SC2086
        python3 -m kvruntime bench "$part" $options --resume --out "validation/results/$part/$name.json"
        code=$?
        [ "$code" = 3 ] || break
    done
    [ "$code" = 0 ] || failed+=" $part"
done
python3 tests/test_docs.py || failed+=" documents"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
