#!/bin/sh
# `make verify`: an implementation in PyTorch (example.py) beside saeclip, right and then with two deliberate bugs.
# Fails if the right one differs from saeclip beyond the tolerance, or if a bug does not show up first in the file and
# the tensors where it should. README.md here explains the output. PYTHON is set by the Makefile.
set -eu
"$PYTHON" -c 'import numpy, torch' 2>/dev/null || {
    echo "make verify needs PyTorch and NumPy (Debian: apt install python3-torch python3-numpy); PYTHON=... names the" \
        "python3 that has them"
    exit 0
}
out=build/verify s=build/verify/saeclip
hooks='attn mlp resid'
rm -rf $out
mkdir -p $s

say() { printf '\n%s\n' "$*"; }
saeclip() {                                      # prints the command, then runs it
    echo "  ./saeclip $*"
    ./saeclip "$@" --quiet
}

# The files in the order of the computation. Both programs make each of them from the same file of saeclip's.
files=
for layer in 1 2 3 4 5 6; do
    for hook in $hooks; do files="$files $layer-$hook"; done
done
files="$files codes start step1 trained"

# Compares the files in FOLDER with saeclip's, up to the first that differs. Sets $first: that file and the tensors that
# differ in it, or nothing; $agreeing: how many files agree before it; in the file `rows`: what compare says of them.
compare() {                                      # FOLDER
    first= agreeing=0
    : >$out/rows
    for file in $files; do
        atol=1e-4
        [ $file != step1 ] || atol=1e-7          # gradients, which are small
        set -- "$1" --common --rtol 1e-4 --atol $atol "$1/$file.safetensors" $s/$file.safetensors
        if ./saeclip compare "$2" "$3" "$4" "$5" "$6" "$7" "$8" >$out/row 2>$out/error; then
            # Without the places.
            sed "s/  */ /g; s/ at \[.*//; s/^/  $file: /" $out/row >>$out/rows
            agreeing=$((agreeing + 1))
        else
            shift
            echo "  ./saeclip compare $*"
            sed 's/^/    /' $out/row $out/error
            first="$file:$(sed -n 's/^\([^ ]*\) .*: [1-9][0-9]* of [0-9]* beyond.*/ \1/p' $out/row | tr -d '\n')"
            return
        fi
    done
}

# Runs the example with a bug, or '' for none, and compares. EXPECTED: what $first should be.
check() {                                        # FOLDER BUG EXPECTED
    echo "  $PYTHON tests/verify/example.py $s $1${2:+ $2}"
    "$PYTHON" tests/verify/example.py $s "$1" $2
    compare "$1"
    if [ "$2" ]; then echo "  (files before it, which agree: $agreeing)"; else cat $out/rows; fi
    [ "$first" = "$3" ] || {
        say "make verify FAILED: the first difference is '$first' (expected '$3')"
        exit 1
    }
}

say "saeclip's files"
tests/synth draw -o $out/drawn --seed 11 --count 16
saeclip pack --size 112 $out/drawn/pictures -o $s/images.safetensors
set -- extract -m weights/demo.safetensors $s/images.safetensors
for layer in 1 2 3 4 5 6; do
    for hook in $hooks; do saeclip "$@" --layer $layer --hook $hook -o $s/$layer-$hook.safetensors; done
done
set -- train --acts $s/5-mlp.safetensors --order sequential --batch 8 --lr 1e-3 --warmup 0 --l1 1e-3
saeclip "$@" --expansion 4 --b-dec geomedian --steps 0 -o $s/start.safetensors
saeclip "$@" --init $s/start.safetensors --steps 1 --checkpoint $s/step1.safetensors -o $out/first.safetensors
saeclip "$@" --init $s/start.safetensors --steps 10 --log $s/log.csv -o $s/trained.safetensors
saeclip encode -s $s/trained.safetensors --acts $s/5-mlp.safetensors --dense --reconstruction --image-means \
    -o $s/codes.safetensors

say "The right implementation: every file agrees"
check $out/right '' ''

say "Exact GELU in place of QuickGELU: the first difference is in the MLP's output of block 1"
check $out/gelu gelu '1-mlp: activations'

say "The L1 penalty summed over tokens, not latents: the first gradients differ, except that of W_dec"
check $out/penalty penalty 'step1: W_enc_m b_dec_m b_enc_m'
echo "  loss, mse, l1 and l0 of the first step: saeclip $(sed -n 2p $s/log.csv | cut -d, -f5-7,9)"
echo "                                          example $(sed -n 2p $out/penalty/log.csv)"

say "make verify passed: the right implementation agrees with saeclip, and both bugs were found."
