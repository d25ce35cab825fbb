#!/bin/sh
# Builds saeclip and its tests with the Makefile for one target after the other, runs the tests and
# tests/fingerprint.sh, and prints a table: every target must have the fingerprint of README.md.
#     make portability                     all targets that the tools for are installed
#     make portability TARGETS="clang-O3 s390x" SUBJECTS="numbers sae"     some targets, some tests (-: none)
# Programs for other processors are linked statically and run by qemu-user.
set -u
export LC_ALL=C

# name | compiler | CFLAGS | emulator | environment | subjects of the tests (empty: all, -: none)
# Emulated, all tests would take an hour: there only the computing parts and the files are tested. Debian's
# headers for -m32 are in a folder that gcc does not search, unless gcc-multilib is installed.
emulated="numbers files images model sae stats threads look"
targets() {
    for cc in gcc clang; do
        for level in -O0 -O1 -O2 -O3 "-O3 -march=native" -Os; do
            echo "$cc$(echo "$level" | tr -d ' ')|$cc|$level|||"
        done
    done
    for isa in avx512 avx2 scalar; do echo "$isa|gcc|-O3||SAECLIP_ISA=$isa|"; done
    for threads in 1 2 3 7; do echo "threads-$threads|gcc|-O3||THREADS=$threads|-"; done
    echo "unsigned-char|gcc|-O2 -funsigned-char|||"
    echo "gnu11|gcc|-O2 -std=gnu11 -D_GNU_SOURCE|||"
    echo "musl|musl-gcc|-O3 -static|||"
    echo "i386|gcc -m32 -idirafter /usr/include/x86_64-linux-gnu|-O3 -static|qemu-i386||"
    echo "aarch64|aarch64-linux-gnu-gcc|-O3 -static|qemu-aarch64||$emulated"
    echo "aarch64-scalar|aarch64-linux-gnu-gcc|-O3 -static|qemu-aarch64|SAECLIP_ISA=scalar|-"
    echo "riscv64|riscv64-linux-gnu-gcc|-O3 -static|qemu-riscv64||$emulated"
    echo "ppc64le|powerpc64le-linux-gnu-gcc|-O3 -static|qemu-ppc64le||$emulated"
    echo "s390x|s390x-linux-gnu-gcc|-O3 -static|qemu-s390x||$emulated"
}

folder=$PWD/build/portability
table=$folder/table.$$
expected=$(sed -n 's/^ *fingerprint \([0-9a-f]\{16\}\) .*/\1/p' README.md)
passed=0 failed=0 skipped=0
mkdir -p "$folder"

# build FOLDER COMPILER CFLAGS: in a copy of the sources, where make builds only what is out of date
build() {
    mkdir -p "$1/tests"
    cp -pu Makefile saeclip.c saeclip.h "$1" && cp -pu tests/*.[ch] "$1/tests" &&
        make -C "$1" CC="$2" CFLAGS="$3" CFLAGS_EXTRA=-Werror saeclip tests/test tests/synth >"$1/log" 2>&1
}

# can_compile COMPILER
can_compile() {
    # shellcheck disable=SC2086
    printf '#include <errno.h>\nint main(void) { return 0; }\n' | $1 -x c -o /dev/null - 2>/dev/null
}

# starter FILE PROGRAM EMULATOR: writes a script that starts a program, for the tests and fingerprint.sh
starter() {
    printf '#!/bin/sh\nexec %s %s "$@"\n' "$3" "$2" >"$1" && chmod +x "$1"
}

# row NAME FINGERPRINT TESTS SECONDS
row() { printf '%-20s %-18s %-44s %5s s\n' "$@" | tee -a "$table"; }

skip() {                                         # NAME REASON
    skipped=$((skipped + 1))
    row "$1" "-" "skipped: $2" 0
}

# run_target NAME COMPILER CFLAGS EMULATOR ENVIRONMENT SUBJECTS
run_target() {
    name=$1 cc=$2 flags=$3 runner=$4 setting=$5 subjects=${SUBJECTS-$6} begin=$(date +%s)
    can_compile "$cc" || { skip "$name" "no $cc"; return; }
    place=$folder/$(echo "$cc $flags" | tr ' /=' '___')
    if ! build "$place" "$cc" "$flags"; then
        failed=$((failed + 1))
        row "$name" "-" "does not build: $place/log" $(($(date +%s) - begin))
        return
    fi
    "$place/saeclip" --version >/dev/null 2>&1 && runner=    # this machine runs it without an emulator
    if [ -n "$runner" ]; then command -v "$runner" >/dev/null || { skip "$name" "no $runner"; return; }; fi
    starter "$place/run" "$place/saeclip" "$runner" && starter "$place/draw" "$place/tests/synth" "$runner"
    env $setting "$place/run" info >/dev/null 2>"$place/says" || { skip "$name" "$(cat "$place/says")"; return; }
    print=$(env $setting SAECLIP="$place/run" SYNTH="$place/draw" sh tests/fingerprint.sh 2>&1 | tail -n 1 |
            sed 's/^fingerprint \([0-9a-f]*\) .*/\1/')
    if [ "$print" = "$expected" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    result="fingerprint only"
    if [ "$subjects" != - ]; then
        # shellcheck disable=SC2086
        env $setting SAECLIP="$place/run" SYNTH="$place/draw" $runner "$place/tests/test" $subjects \
            >"$place/$name.log" 2>&1
        result=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$place/$name.log" | tail -n 1)
        # shellcheck disable=SC2086
        set -- ${result:-0 passed, 1 failed, 0 skipped}
        passed=$((passed + $1)) failed=$((failed + $3)) skipped=$((skipped + $5))
        result="${result:-the tests broke off}${subjects:+ ($subjects)}"
        grep '^FAILED' "$place/$name.log"
    fi
    [ "$print" = "$expected" ] || result="$result; ANOTHER FINGERPRINT"
    row "$name" "$print" "$result" $(($(date +%s) - begin))
}

: >"$table"
targets >"$table.todo"
while IFS='|' read -r name cc flags runner setting subjects <&3; do
    case " ${*:-$name} " in *" $name "*) run_target "$name" "$cc" "$flags" "$runner" "$setting" "$subjects" ;; esac
done 3<"$table.todo"
echo
echo "All of it (README's fingerprint: ${expected:-none}):"
cat "$table"
rm -f "$table" "$table.todo"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
