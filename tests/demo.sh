#!/bin/sh
# `make demo`: the whole method in a minute, on pictures that are drawn for it and the small CLIP in weights/, or
# on the user's own MODEL and IMAGES. Everything goes into out/. The variables are the Makefile's.
set -eu
drawn=out/world/pictures unseen=out/unseen/pictures acts=out/seen.safetensors
# What suits the drawn world, which is simple, and the report's values with a higher rate for shorter runs.
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
saeclip() {                                      # shows what it does
    show "$@"
    ./saeclip "$@" --quiet
}
train() {
    saeclip train --acts $acts --arch "$@" --expansion "$EXPANSION" --epochs "$EPOCHS" --lr $lr --warmup 20 \
        --b-dec geomedian
}
# The columns of eval's table that a terminal has room for.
short_table() {
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i
                       printf "  %-10s  %-8s %9s %10s %9s %8s %5s\n", "activation", "data", "MSE", "explained",
                              "L0", "entropy", "dead" }
             NR > 1  { gsub(/"/, ""); sub(/.*\//, "", $at["data"]); sub(/[.].*/, "", $at["data"])
                       printf "  %-10s  %-8s %9.3g %8.1f %% %9.1f %8s %5d\n", $at["activation"], $at["data"],
                              $at["mse"], 100 * $at["explained_variance"], $at["l0"],
                              $at["entropy_mean"] < 0 ? "-" : sprintf("%.2f", $at["entropy_mean"]), $at["dead"] }' "$1"
}

mkdir -p out/figures
rm -rf out/masks                                 # whose files are all drawn
if [ ! "$own" ]; then
    say "Pictures of shapes: $PICTURES to learn from, $UNSEEN others to test on. Does the model know what it sees?"
    rm -rf out/world out/unseen
    tests/synth draw -o out/world --seed 1 --count "$PICTURES"
    tests/synth draw -o out/unseen --seed 1 --first "$PICTURES" --count "$UNSEEN"
    saeclip zeroshot -m "$MODEL" $unseen
fi

say "Activations: the output of the MLP in the last block but one, for each token of each picture"
saeclip extract -m "$MODEL" "$IMAGES" -o $acts
[ "$own" ] || saeclip extract -m "$MODEL" $unseen -o out/unseen.safetensors

say "Two sparse autoencoders of $EXPANSION latents for each dimension of the activations"
train relu --l1 $l1 --log out/relu.csv -o out/relu.safetensors
train topk --k $k --log out/topk.csv -o out/topk.safetensors

say "How well they do (MSE and L0 a token, explained variance, entropy of a latent's classes, dead latents)"
set -- -s out/relu.safetensors -s out/topk.safetensors --acts $acts --format csv
[ "$own" ] || set -- "$@" --also out/unseen.safetensors
show eval "$@"
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

say "Figures"
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
    set -- "$1" -l 204,277,312,433
fi
if saeclip mask -s out/relu.safetensors -m "$MODEL" "$@" -o out/masks; then
    for known in 204-checked 277-red 312-square 433-star; do
        [ "$own" ] || mv out/masks/latent_${known%-*}_*.pgm out/masks/${known#*-}-${known%-*}.pgm
    done
    saeclip plot mask out/masks/*.pgm -o out/figures/mask.svg
else say "  (no figure of masks: CLASS=C names another class)"; fi

say "What latents mean: sheets of their top pictures, dark where they are silent, and an atlas of all of them"
set -- -s out/relu.safetensors -t out/relu.stats.safetensors -m "$MODEL" "$IMAGES"
saeclip top "$@" -l "$LATENTS" --mask value -o out/sheets
saeclip atlas "$@" -o out/atlas

if [ ! "$own" ]; then
    say "For each thing drawn the latent that knows it best: area under the ROC curve and overlap with the true mask"
    saeclip encode -s out/relu.safetensors --mean --acts $acts -o out/codes.safetensors
    saeclip encode -s out/relu.safetensors --mean --acts out/unseen.safetensors -o out/unseen.codes.safetensors
    tests/synth score --seed 1 --codes out/codes.safetensors --unseen out/unseen.codes.safetensors
fi
say "Now open out/atlas/index.html, then out/figures/*.svg and out/sheets/*.ppm."
