#!/bin/sh
# `make demo`: the whole method in a minute, on images that are drawn for it and the small CLIP in weights/, or on
# the user's own MODEL and IMAGES. Everything goes into out/. The variables are set by the Makefile.
set -eu
drawn=out/world/pictures unseen=out/unseen/pictures acts=out/seen.safetensors warmup=20
# For own photos: the usual k and L1 weight with a higher learning rate, since runs are short. The drawn images are
# simpler: fewer latents are active in each.
if [ "$IMAGES" ]; then own=1 l1=8e-5 k=32 lr=1e-3
else own='' l1=1.3e-3 k=8 lr=2e-3 IMAGES=$drawn; fi

say() { printf '\n%s\n' "$*"; }
show() {
    printf '  saeclip'
    for word; do
        case $word in *' '*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    echo
}
saeclip() {                                      # prints the command, then runs it
    show "$@"
    ./saeclip "$@" --quiet
}
train() {
    saeclip train --acts $acts --arch "$@" --expansion "$EXPANSION" --epochs "$EPOCHS" --lr $lr --warmup $warmup \
        --b-dec geomedian
}
# The latents that `synth score` found to detect these things best, each once: J,J,...
detecting() {
    for name; do awk -v name="$name" '$(NF - 4) == name { print $(NF - 3); exit }' out/scores.txt; done |
        awk '!seen[$1]++' | paste -s -d , -
}
# The twelve latents that are strongest on the first photo, among those that fire on at most this share of all photos.
strongest() {                                    # SHARE
    ./saeclip explain -s out/relu.safetensors -t out/relu.stats.safetensors -m "$MODEL" "$IMAGES" --limit 1 \
        --max-frequency "$1" --format csv --quiet | sed -n 's/^\([0-9]*\),.*/\1/p' | head -n 12 | paste -s -d , -
}

rm -rf out/figures out/masks out/sheets out/atlas    # of an earlier run
mkdir -p out/figures
if [ "$own" ] && [ "$MODEL" = weights/demo.safetensors ]; then
    say "Note: $MODEL was trained on drawn shapes, not on photos. MODEL=FILE names another model."
fi
if [ ! "$own" ]; then
    say "Drawn shapes: $PICTURES images for training, $UNSEEN for testing, and the accuracy of the model on the latter"
    rm -rf out/world out/unseen
    tests/synth draw -o out/world --seed 1 --count "$PICTURES"
    tests/synth draw -o out/unseen --seed 1 --first "$PICTURES" --count "$UNSEEN"
    saeclip zeroshot -m "$MODEL" $unseen
fi

say "Activations: the output of the MLP in the last block but one, for each token of each image"
saeclip extract -m "$MODEL" "$IMAGES" -o $acts
[ "$own" ] || saeclip extract -m "$MODEL" $unseen -o out/unseen.safetensors

say "Two sparse autoencoders with $EXPANSION latents per dimension of the activations"
# images, steps (of 16 images each), a fifth of the steps, and the epochs that make 500 steps
set -- $(./saeclip info --tensors $acts | awk -v epochs="$EPOCHS" '$1 == "activations" {
    steps = int($3 * epochs / 16 + 0.5); print $3, steps, int(steps / 5), int(8000 / $3) + 1 }')
if [ "$2" -lt 100 ]; then
    warmup=$3
    echo "  ($1 images make only $2 steps; more photos, or EPOCHS=$4, give better latents)"
fi
train relu --l1 $l1 --log out/relu.csv -o out/relu.safetensors
train topk --k $k --log out/topk.csv -o out/topk.safetensors

say "How well they reconstruct the activations, and how sparsely"
set -- -s out/relu.safetensors -s out/topk.safetensors --acts $acts
[ "$own" ] || set -- "$@" --also out/unseen.safetensors
saeclip eval "$@"
for sae in relu topk; do
    saeclip stats -s out/$sae.safetensors --acts $acts -o out/$sae.stats.safetensors
done
if [ ! "$own" ]; then
    saeclip stats -s out/relu.safetensors --acts out/unseen.safetensors -o out/unseen.stats.safetensors
    for sae in relu topk; do                     # accuracy with x' in place of x
        saeclip zeroshot -m "$MODEL" -s out/$sae.safetensors $unseen
    done
fi

if [ ! "$own" ]; then
    say "For each thing drawn, its best detector: area under the ROC curve, overlap with the true mask"
    saeclip encode -s out/relu.safetensors --image-means --acts $acts -o out/codes.safetensors
    saeclip encode -s out/relu.safetensors --image-means --acts out/unseen.safetensors -o out/unseen.codes.safetensors
    tests/synth score --seed 1 --codes out/codes.safetensors --unseen out/unseen.codes.safetensors >out/scores.txt
    cat out/scores.txt
    : "${LATENTS:=$(detecting cross disc ring square star triangle blue red yellow checked dotted striped)}"
fi
for share in 0.5 1; do : "${LATENTS:=$(strongest $share)}"; done

say "Figures"
set -- out/relu.stats.safetensors
saeclip plot curves out/relu.csv out/topk.csv -o out/figures/curves.svg
[ "$own" ] || set -- "$@" out/unseen.stats.safetensors
saeclip plot latents "$@" -o out/figures/latents.svg
for kind in activations counts; do
    saeclip plot $kind out/relu.stats.safetensors out/topk.stats.safetensors -o out/figures/$kind.svg
done
if [ ! "$own" ]; then
    set -- "$unseen/red star"/*.ppm
    [ -f "$1" ] || set -- "$unseen"/*/*.ppm
    set -- "$1" -l "$(detecting checked red square star)"
elif [ "$CLASS" ]; then set -- "$IMAGES" --class "$CLASS" -l "$LATENTS"
else set -- "$IMAGES" --limit 1 -l "$LATENTS"
fi
if saeclip mask -s out/relu.safetensors -m "$MODEL" "$@" -o out/masks; then
    for name in checked red square star; do
        latent=$(detecting $name)
        [ "$own" ] || cp out/masks/latent_"$latent"_*.pgm out/masks/$name-"$latent".pgm
    done
    [ "$own" ] || rm out/masks/latent_*.pgm
    saeclip plot mask out/masks/*.pgm -o out/figures/mask.svg
else say "  (the figure of masks was left out, for this reason)"; fi

say "What latents mean: sheets of their top images, dark where the latent is silent, and an atlas of all latents"
set -- -s out/relu.safetensors -t out/relu.stats.safetensors -m "$MODEL" "$IMAGES"
[ ! "$LATENTS" ] || saeclip top "$@" -l "$LATENTS" --mask value -o out/sheets
saeclip atlas "$@" -o out/atlas

say "Now open out/atlas/index.html, then out/figures/*.svg and out/sheets/*.ppm."
