#!/usr/bin/env bash
# The day a GPU comes: build for it, run every kernel, test, sanitize, measure; within nine minutes, without a network.
#
#   bash bench/device_day.sh [FOLDER]        (default: $OUT, else device-day)
#
# Needs Python with torch and setuptools, g++ and, for a GPU, nvcc. A part that lacks anything else is SKIPPED by name.
#
#   build       the extension in place, for the visible GPUs alone; nothing if one of these sources is there for them
#   kernels     bench/every_kernel.py: every kernel once, compared with the reference
#   tests       pytest -m cuda (and multi_gpu where there are two)
#   sanitize    every_kernel.py under memcheck, racecheck, initcheck and synccheck
#   bench       bench/run.py --quick, a file at a time, as many as there is time for
#
# FOLDER is written as things happen, so that what is known stays if the machine goes: summary.txt (a line when a part
# begins, one when it ends), a log of each part, bench.tar.gz anew after each file of benches.
# Without a device, and on a virtual one, all that can run does; benches then only show that they run.
# Environment: PYTHON (python3); DAY_SECONDS (530) for all parts together; DAY_TESTS, what pytest is given (tests).
# Exit status: 0 if nothing failed or was cut off.
set -uo pipefail
began=$SECONDS
folder=${1:-${OUT:-device-day}}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3} total=${DAY_SECONDS:-530} tests=${DAY_TESTS:-tests}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
declare -A budget=([build]=300 [kernels]=30 [tests]=120 [sanitize]=160 [bench]=$total)
failed=0
: >"$folder/summary.txt"

say() { printf '%s\n' "$*" | tee -a "$folder/summary.txt"; }

left() { # seconds that this part may still take
  local ours=$((started + ${budget[$part]} - SECONDS)) all=$((began + total - SECONDS))
  echo $((ours < all ? ours : all))
}

begin() { # PART
  part=$1 started=$SECONDS
  : >"$folder/$part.log"
  say "$part: begun at $((SECONDS - began)) s, has $(left) s"
}

end() { # STATUS|skip TEXT...
  local verdict=passed
  case $1 in
    0) ;;
    skip) verdict=SKIPPED ;;
    124 | 137) verdict="CUT OFF" failed=1 ;;
    *) verdict=FAILED failed=1 ;;
  esac
  say "$part: $verdict: ${*:2} [$((SECONDS - started)) s]"
}

within() { # SECONDS COMMAND...: its output to the log; interrupted first, so that pytest still says what it knows
  [ "$1" -gt 0 ] || { echo "no time is left" >>"$folder/$part.log"; return 124; }
  timeout --signal=INT --kill-after=10 "$@" >>"$folder/$part.log" 2>&1
}

last_words() { grep -v '^[ =]*$' "$folder/$part.log" | tail -n 1 | sed -e 's/^[= ]*//' -e 's/[= ]*$//' | cut -c 1-200; }

facts() { "$python" -W ignore bench/device_facts.py "$@"; }

said=$(facts machine 2>&1) || { say "machine: FAILED: ${said##*$'\n'}"; exit 2; }
read -r devices archs is_virtual words <<<"${said##*$'\n'}"
say "machine: $words, $(nvcc --version 2>/dev/null | grep release || echo "no nvcc")"
device=cpu effort=--smoke markers="cuda or multi_gpu"
if [ "$devices" -gt 0 ]; then
  device=cuda
  [ "$is_virtual" = 1 ] || effort=--quick
  [ "$devices" -gt 1 ] || markers="cuda and not multi_gpu"
  export TOLARIA_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$archs} TOLARIA_REQUIRE_CUDA=1
fi

begin build
status=0
if said=$(facts extension 2>/dev/null); then
  said="it was there, $said"
else
  within "$(left)" "$python" setup.py build_ext --inplace || status=$?
  if [ "$status" -ne 0 ]; then said=$(last_words); else said=$(facts extension 2>&1) || status=$?; fi
fi
end "$status" "$said"
if [ "$failed" -ne 0 ]; then say "device day: FAILED, there is nothing to run [$((SECONDS - began)) s]"; exit 1; fi

begin kernels
within "$(left)" "$python" bench/every_kernel.py --device "$device"
end $? "$(last_words)"

begin tests
missing=$(facts lacks pytest)
if [ -n "$missing" ]; then
  end skip "there is no $missing"
else
  # shellcheck disable=SC2086
  within "$(left)" "$python" -m pytest -q --color=no -p no:cacheprovider --durations=10 -m "$markers" $tests
  end $? "-m '$markers' $tests: $(last_words)"
fi

begin sanitize
if [ "$device" = cpu ]; then
  end skip "compute-sanitizer has no CUDA device to look at"
elif ! command -v compute-sanitizer >/dev/null; then
  end skip "there is no compute-sanitizer"
else
  tools=(memcheck racecheck initcheck synccheck) verdicts=() status=0
  for i in "${!tools[@]}"; do
    # Every tensor is an allocation of its own, so bounds are exact. initcheck must see all writers: it gets no filter.
    options=(--tool "${tools[i]}" --error-exitcode 9 --launch-timeout 60 --print-limit 20)
    [ "${tools[i]}" = initcheck ] || options+=(--kernel-name kernel_substring=tolaria)
    [ "${tools[i]}" != memcheck ] || options+=(--report-api-errors no) # torch asks for what may fail; we check ours
    one=0
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within $(($(left) / (${#tools[@]} - i))) \
      compute-sanitizer "${options[@]}" "$python" bench/every_kernel.py --device cuda || one=$?
    [ "$one" -eq 0 ] || status=$one
    verdicts+=("${tools[i]} status $one, $(last_words);")
    say "sanitize: ${verdicts[-1]}"
  done
  end "$status" "${verdicts[@]}"
fi

begin bench
missing=$(facts lacks pytest pytest_benchmark)
if [ -n "$missing" ]; then
  end skip "there is no $missing"
else
  ran=() status=0
  for name in blend stats governor snapshot metrics straight_through steps memory; do
    one=0
    within "$(left)" "$python" bench/run.py "$effort" --device "$device" --out "$scratch/bench" "bench_$name" || one=$?
    if [ -d "$scratch/bench" ]; then # whole or not at all, also if the machine goes now
      tar -C "$scratch" -czf "$scratch/bench.tar.gz" bench && cp "$scratch/bench.tar.gz" "$folder/.bench.tar.gz" &&
        mv "$folder/.bench.tar.gz" "$folder/bench.tar.gz"
    fi
    [ "$one" -eq 0 ] || status=$one
    ran+=("$name $([ "$one" -eq 0 ] && echo ok || echo "status $one"),")
    say "bench: ${ran[-1]} at $((SECONDS - began)) s"
  done
  end "$status" "$effort on $device: ${ran[*]}"
fi
say "device day: $([ "$failed" -eq 0 ] && echo passed || echo FAILED) on $words [$((SECONDS - began)) s]"
exit "$failed"
