#!/bin/sh
# `make demo`: the whole method in a minute, on pictures that are drawn for it and the small CLIP in weights/, or
# on the user's own MODEL and IMAGES. Everything goes into out/. The variables are the Makefile's.
set -eu
drawn=out/world/pictures unseen=out/unseen/pictures acts=out/seen.safetensors
[ -n "$IMAGES" ] && own=1 || own='' IMAGES=$drawn

say() { printf '\n%s\n' "$*"; }
saeclip() {                                      # shows what it does
    echo "  saeclip $*"
    ./saeclip "$@" --quiet
}
train() {
    saeclip train --acts $acts --arch "$@" --expansion "$EXPANSION" --epochs "$EPOCHS" --lr 2e-3 --warmup 20 \
        --b-dec geomedian
}
# The columns of eval's table that a terminal has room for.
short_table() {
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i
                       printf "  %-10s  %-8s %9s %10s %9s %8s %5s\n", "activation", "data", "MSE", "explained",
                              "L0", "entropy", "dead" }
             NR > 1  { gsub(/"/, ""); sub(/.*\//, "", $at["data"]); sub(/[.].*/, "", $at["data"])
                       printf "  %-10s  %-8s %9.3g %8.1f %% %9.1f %8.2f %5d\n", $at["activation"], $at["data"],
                              $at["mse"], 100 * $at["explained_variance"], $at["l0"], $at["entropy_mean"],
                              $at["dead"] }' "$1"
}

mkdir -p out/figures
rm -rf out/masks                                 # whose files are all drawn
if [ ! "$own" ]; then
    say "1. Pictures of shapes: $PICTURES to learn from, $UNSEEN others to test on. Does the model know what it sees?"
    rm -rf out/world out/unseen
    tests/synth draw -o out/world --seed 1 --count "$PICTURES"
    tests/synth draw -o out/unseen --seed 1 --first "$PICTURES" --count "$UNSEEN"
    saeclip zeroshot -m "$MODEL" $unseen
fi

say "2. Activations: the output of the MLP in the last block but one, for each token of each picture"
saeclip extract -m "$MODEL" "$IMAGES" -o $acts
[ "$own" ] || saeclip extract -m "$MODEL" $unseen -o out/unseen.safetensors

say "3. Two sparse autoencoders of $EXPANSION latents for each dimension of the activations"
train relu --l1 1.3e-3 --log out/relu.csv -o out/relu.safetensors
train topk --k 8 --log out/topk.csv -o out/topk.safetensors

say "4. How well they do (MSE and L0 a token, explained variance, entropy of a latent's classes, dead latents)"
set -- -s out/relu.safetensors -s out/topk.safetensors --acts $acts --format csv
[ "$own" ] || set -- "$@" --also out/unseen.safetensors
echo "  saeclip eval $*"
./saeclip eval "$@" --quiet >out/table.csv
short_table out/table.csv
for sae in relu topk; do
    saeclip stats -s out/$sae.safetensors --acts $acts -o out/$sae.stats.safetensors
done
if [ ! "$own" ]; then
    saeclip stats -s out/relu.safetensors --acts out/unseen.safetensors -o out/unseen.stats.safetensors
    for sae in relu topk; do                     # does the model still know, with the SAE in its place?
        saeclip zeroshot -m "$MODEL" -s out/$sae.safetensors $unseen
    done
fi

say "5. Figures"
set -- out/relu.stats.safetensors
saeclip plot curves out/relu.csv out/topk.csv -o out/figures/curves.svg
[ "$own" ] || set -- "$@" out/unseen.stats.safetensors
saeclip plot latents "$@" -o out/figures/latents.svg
for kind in activations counts; do
    saeclip plot $kind out/relu.stats.safetensors out/topk.stats.safetensors -o out/figures/$kind.svg
done
if [ "$own" ]; then set -- "$IMAGES" --class "$CLASS" -l "$LATENTS"
else
    set -- "$unseen/red star"/*.ppm
    set -- "$1" -l 204,277,312,433               # checked, red, square, star
fi
saeclip mask -s out/relu.safetensors -m "$MODEL" "$@" -o out/masks
saeclip plot mask out/masks/*.pgm -o out/figures/mask.svg

say "6. What latents mean: sheets of their top pictures, dark where they are silent, and an atlas of all of them"
set -- -s out/relu.safetensors -t out/relu.stats.safetensors -m "$MODEL" "$IMAGES"
saeclip top "$@" -l "$LATENTS" --mask value -o out/sheets
saeclip atlas "$@" -o out/atlas

if [ ! "$own" ]; then
    say "7. For each thing drawn the latent that knows it best: area under the ROC curve and overlap with the true mask"
    saeclip encode -s out/relu.safetensors --mean --acts $acts -o out/codes.safetensors
    saeclip encode -s out/relu.safetensors --mean --acts out/unseen.safetensors -o out/unseen.codes.safetensors
    tests/synth score --seed 1 --codes out/codes.safetensors --unseen out/unseen.codes.safetensors
fi
say "Now open out/atlas/index.html, then out/figures/*.svg and out/sheets/*.ppm."
