#!/usr/bin/env bash
# Everything that wants a CUDA device: kernel tests there, memory and peaks, benchmarks, perplexity, the sanitizer.
#
#   validation/record.sh [--text FILE] [PART]...
#
# PART: tests memory quality bench generate kernels engine calibrate memcheck racecheck; all of them without one.
# FILE: WikiText-2's raw test split, for `quality`, which is skipped without it.
#
# A part takes minutes on an H100, much of it Triton compiling, and goes on where an earlier run of the same commit
# stopped: a machine that is there for minutes only can be used in several goes. What an older commit recorded stays until it
# is measured again. Needs the runtime and test extras.
set -uo pipefail
text=""
if [ "${1:-}" = --text ]; then
    text="$(realpath -e -- "${2:-}")" || { echo "no such text: ${2:-}" >&2; exit 2; }
    shift 2
fi
cd "$(dirname "$0")/.." || exit
all="tests memory quality bench generate kernels engine calibrate memcheck racecheck"
# shellcheck disable=SC2086
[ $# != 0 ] || set -- $all
for part in "$@"; do
    [[ " $all " == *" $part "* ]] || { echo "unknown part $part: allowed are $all" >&2; exit 2; }
done
python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "no CUDA device" >&2; exit 2; }
name="$(python3 -c 'import torch; from validation.recorded import slug; print(slug(torch.cuda.get_device_name()))')"
results="$PWD/validation/results"
mkdir -p "$results"/{bench,quality,generate,kernels,engine,profiles}

tests() {
    OMP_NUM_THREADS=1 python3 -m pytest -q -p no:cacheprovider -p no:benchmark -n $(($(nproc) * 3 / 4)) tests/kvruntime/test_kernels.py \
        tests/kvruntime/test_fast.py tests/kvruntime/test_step.py tests/kvruntime/test_full.py tests/kvruntime/test_prompt.py tests/kvruntime/test_engine.py \
        tests/kvruntime/test_engine_decoders.py tests/kvruntime/test_engine_linear.py tests/kvruntime/test_hf_compiled.py tests/kvruntime/test_hf_generate.py tests/kvruntime/test_hf_graphs.py \
        tests/kvruntime/test_hf_honesty.py tests/kvruntime/test_hf_masks.py tests/kvruntime/test_hf_interface.py \
        tests/kvruntime/test_hf_stateful.py tests/kvruntime/test_evict.py tests/kvruntime/test_pools.py
}

memory() {
    python3 -m validation memory --device cuda --jobs $(($(nproc) / 4)) --record --resume >/dev/null
}

quality() {
    [ -n "$text" ] || { echo "quality is skipped: no --text" >&2; return 0; }
    (cd "$(dirname "$text")" && PYTHONPATH="$OLDPWD${PYTHONPATH:+:$PYTHONPATH}" python3 -m kvruntime perplexity --text "$(basename "$text")" \
        --window 1024 --chunk 1 --batch 296 --max-tokens 0 --nbits 8 --nbits 4 --nbits 2 --anew \
        --out "$results/bench/$name-wikitext2.json" &&
        PYTHONPATH="$OLDPWD${PYTHONPATH:+:$PYTHONPATH}" python3 -m kvruntime eval --text "$(basename "$text")" \
            --window 1024 --window 4096 --chunk 1 --batch 296 --anew --method kivi-boost \
            --method kivi-boost:value_nbits=3 --method kivi-boost:nbits=3,value_nbits=3 \
            --method kivi-boost:key_nbits=3,boost_nbits=2,value_nbits=4 --method kivi:nbits=2,group_size=32 \
            --method kivi:nbits=2,group_size=64 --method kivi:nbits=4,group_size=64 --method int8 --method int4 \
            --method turboquant:nbits=4 --method turboquant:nbits=3 --method turboquant:nbits=2 --method fp8-token-head \
            --method kivi-boost:group_size=128 --out "$results/quality/$name-smollm2-wikitext2.json")
}

bench() {
    local code=0 model
    for model in gpt2 gpt2-medium gpt2-large; do
        python3 -m kvruntime bench --model "$model" --only memory --only speed --nbits 2 --nbits 4 --batch 1,64 --anew \
            --out "$results/bench/$name-$model.json" || code=1
    done
    return $code
}

turns() { # a lost device (exit code 3) asks for a new process
    local code
    for _ in 1 2 3; do
        python3 -m kvruntime bench "$@" --anew
        code=$?
        [ $code = 3 ] || return $code
    done
    return $code
}

kernels() {
    turns kernels --more --splits --out "$results/kernels/$name.json"
}

generate() {
    turns generate --out "$results/generate/$name.json"
}

engine() {
    turns engine --model gpt2 --model llama-3-8b --model gpt2-large --peers --out "$results/engine/$name.json"
}

calibrate() {
    python3 -m kvsim calibrate --device cuda --out "$results/profiles/$name.json"
}

sanitized() { # compute-sanitizer over the kernels' grid in float16, in one process; first without it, which compiles
    local apart=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1) # else a tensor is a part of 2 MB, and what leaves it is not seen
    local -x PYTHONPATH="$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}" # of judged_on_cpu
    local said
    said="$("${apart[@]}" compute-sanitizer --tool "$1" --kernel-name kns=faulty_kernel python3 tests/support/faults.py "$1" 2>&1)"
    [[ "$said" == *"at faulty_kernel"* ]] || {
        echo "$1 does not see the fault of tests/support/faults.py, so it says nothing of the others" >&2
        return 1
    }
    # without weights that the CPU is too slow to judge: racecheck aborts where PyTorch multiplies
    local points=(-p no:cacheprovider -p no:benchmark -p judged_on_cpu tests/kvruntime/test_step.py tests/kvruntime/test_full.py tests/kvruntime/test_fast.py tests/kvruntime/test_pools.py
        tests/kvruntime/test_hf_graphs.py::test_what_is_fused_is_what_models_do
        tests/kvruntime/test_prompt.py::test_layers_stored_together_hold_what_each_holds_alone
        tests/kvruntime/test_prompt.py::test_layers_that_differ_are_stored_alone
        tests/kvruntime/test_kernels.py::test_words_bit_exact tests/kvruntime/test_engine_linear.py
        tests/kvruntime/test_kernels.py::test_boosted_channels_weigh_what_queries_say
        tests/kvruntime/test_token_fast.py tests/kvruntime/test_token.py tests/kvruntime/test_paged.py
        tests/kvruntime/test_hf_latents.py::test_the_kernel_is_the_reference
        tests/kvruntime/test_hf_windows.py::test_steps_forget_what_the_host_would
        -k "not compiles and not bfloat16 and not float32 and not 50257 and not 14336 and not 13824 and not 6144
            and not generate and not 8b_model and not padded_graph and not anew")
    local kernels=() name
    for name in append attend combine step store pack freeze linear product stream add_norm embed rms_norm rotate silu_product \
        order weigh pages gather store_slots latent forget prompt; do
        kernels+=(--kernel-name "kns=${name}_kernel")
    done
    OMP_NUM_THREADS=1 python3 -m pytest -q -n $(($(nproc) * 3 / 4)) "${points[@]}" || return
    "${apart[@]}" compute-sanitizer --tool "$1" "${kernels[@]}" --error-exitcode 1 python3 -m pytest -v -x -p no:xdist "${points[@]}"
}

memcheck() { sanitized memcheck; }

racecheck() { sanitized racecheck; }

failed=""
for part in "$@"; do
    echo "== $part" >&2
    "$part" || failed+=" $part"
done
python3 tests/house/test_docs.py || failed+=" documents"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
