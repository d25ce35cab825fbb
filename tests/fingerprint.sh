#!/bin/sh
# One line that stands for every number saeclip computes: a checksum of what it writes, from drawn pictures
# and the demo model. It must be the same on every machine; README.md has it.
#     sh tests/fingerprint.sh        in the checkout's root, after make saeclip tests/synth
# Environment: SAECLIP and SYNTH name the two programs, or scripts that start them; THREADS; SAECLIP_ISA.
set -eu
export LC_ALL=C                     # the order in which names are listed
root=$PWD
absolute() { case $1 in /*) echo "$1" ;; *) echo "$root/$1" ;; esac; }
saeclip=$(absolute "${SAECLIP:-saeclip}") synth=$(absolute "${SYNTH:-tests/synth}")
folder=$(mktemp -d "${TMPDIR:-/tmp}/saeclip-fingerprint-XXXXXX")
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
"$synth" draw -o "$folder" --count 6 --seed 5
cd "$folder"                         # so that no path of this machine is in a file
cp "$root/weights/demo.safetensors" model

s() { "$saeclip" "$@" --quiet ${THREADS:+--threads "$THREADS"}; }

# Preprocessing: made smaller, made larger, cropped; the model: every hook point, both GELUs, its head.
s pack pictures --size 90 -o packed.safetensors
s pack pictures.txt --square 150 --limit 2 -o square
s extract -m model packed.safetensors -o acts
s extract -m model pictures --limit 1 --layer 1 --hook attn --gelu erf --dtype f16 -o attn
s extract -m model pictures --limit 1 --layer 2 --hook resid --tokens patches --crop hf -o resid
s zeroshot -m model pictures --limit 1 --format json > zeroshot

# Both kinds of training, with ghost gradients and each geometric median; codes.
train="train --acts acts --expansion 2 --steps 12 --batch 2 --warmup 4 --ghost --dead-window 0"
s $train --arch relu --lr 2e-2 --l1 1e-2 --b-dec geomedian --log relu.csv -o relu
s $train --arch topk --lr 4e-3 --k 6 --b-dec geomedian-images --b-dec-images 5 --log topk.csv -o topk
cut -d , -f 1-12 relu.csv topk.csv > logs                    # column 13 is time
s encode -s relu --acts acts --reconstruction --image-means -o codes
s encode -s topk --acts acts --dense -o dense

# Measuring, whole and in shards, and looking.
s stats -s relu --acts acts --class-counts -o stats
for shard in 1 2 3; do s stats -s topk -m model packed.safetensors --limit 2 --shard $shard/3 -o shard$shard; done
s merge shard3 shard1 shard2 -o merged
s eval -s relu -s topk --acts acts --format json > table
s mask -s relu --acts acts -l 3,30,200 -o lit
s mask -s topk -t merged --mask top -m model packed.safetensors --limit 2 -l 5,50 -o lit
s top -s topk -t merged -m model packed.safetensors --limit 2 -l 5,50 --mask value -o sheets

"$synth" digest factors.csv packed.safetensors square acts attn resid zeroshot logs relu topk codes dense stats merged \
    table lit/* sheets/*
