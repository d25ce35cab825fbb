#!/bin/sh
# fuzz.sh SECONDS TARGET...: runs build/fuzzer on each target in turn, from the seeds that
# build/guard_fuzz makes and from what earlier runs have kept in build/corpus; what goes wrong is kept
# in build/found. Ends with a line a target. With 0 seconds each target runs its seeds once.
# A target may take 2 GB, an input 20 seconds, a block of memory 32 MB (so that larger ones are
# refused, as on a small machine). The scratch folder is in memory where there is /dev/shm.
cd "$(dirname "$0")/../.." || exit 1
seconds=$1 found=0
shift
base=${TMPDIR:-/tmp}
[ -w /dev/shm ] && base=/dev/shm
scratch=$(mktemp -d "$base/saeclip-fuzz-XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' INT TERM HUP
export TMPDIR="$scratch"
export ASAN_OPTIONS=allocator_may_return_null=1:max_allocation_size_mb=32
here=$(pwd)
mkdir -p build/found
rm -rf build/seeds
build/guard_fuzz seeds build/seeds || exit 1
for target; do
    if [ "$seconds" = 0 ]; then
        build/guard_fuzz run "$target" "$here/build/seeds/$target" || found=1
        continue
    fi
    mkdir -p "build/corpus/$target"
    SAECLIP_FUZZ=$target build/fuzzer -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 \
        -max_len=8192 -dict="$here/build/seeds/words" -close_fd_mask=3 -print_final_stats=1 \
        -artifact_prefix="$here/build/found/$target-" "$here/build/corpus/$target" \
        "$here/build/seeds/$target" >"build/$target.log" 2>&1 || { found=1 bad="build/$target.log"; }
    rm -rf "$scratch"/*
    echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "build/$target.log") inputs," \
        "$(grep -o 'cov: [0-9]*' "build/$target.log" | tail -1 | tr -d 'a-z: ') edges${bad:+, A FINDING: see $bad}"
    unset bad
done
exit $found
