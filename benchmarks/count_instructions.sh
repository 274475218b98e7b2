#!/usr/bin/env bash
# Instructions per element of each kernel and of the memory bounds it is compared with (bfloat16, H 4096), counted by
# valgrind's callgrind. Its virtual processor has AVX2 and no AVX-512.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/count
cmake -S . -B "$build" -DAXISCAP_PYTHON=OFF -DAXISCAP_TESTS=ON >/dev/null
cmake --build "$build" --target instructions >/dev/null
rows=256
for case in "read none" "cap none" "read_modify_write all" "cap all"; do
  read -r what fire <<<"$case"
  counted=$(valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect="axiscap::cpu::$what*" \
    "$build/instructions" "$what" 4096 $rows "$fire" 2>&1 | sed -n 's/.*Collected : //p')
  awk -v n="$counted" -v rows=$rows -v what="$what" -v fire="$fire" \
    'BEGIN { printf "%-18s %-5s %.3f instructions an element\n", what, fire, n / (rows * 4096) }'
done
