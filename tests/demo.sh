#!/bin/sh
# `make demo`: the whole method, on images that are drawn for it and the small CLIP in weights/, or on the user's own
# MODEL and IMAGES. Everything is written into out/. The Makefile sets the variables.
set -eu
drawn=out/world/pictures unseen=out/unseen/pictures acts=out/seen.safetensors warmup=20
# Own photos: the usual k and L1 weight with a higher learning rate, since runs are short. In so few steps the L1
# penalty does not make the ReLU SAE sparse on photos, so the TopK SAE is the one that is shown. The drawn images are
# simpler: fewer latents are active in each, and the ReLU SAE has one latent for each thing that is drawn.
if [ "$IMAGES" ]; then own=1 shown=topk l1=8e-5 k=32 lr=1e-3
else own='' shown=relu l1=1.3e-3 k=8 lr=2e-3 IMAGES=$drawn; fi
if [ ! "$own" ] && [ "$MODEL" != weights/demo.safetensors ]; then
    echo "make demo: MODEL is given without IMAGES (expected IMAGES=FOLDER, with your photos)" >&2
    exit 1
fi
sae=out/$shown.safetensors stats=out/$shown.stats.safetensors

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
# The latents that `synth score` found to be the best detectors of these things, each once: J,J,...
detecting() {
    for name; do awk -v name="$name" '$(NF - 4) == name { print $(NF - 3); exit }' out/scores.txt; done |
        awk '!seen[$1]++' | paste -s -d , -
}
# The twelve strongest latents on the first photo, of those that fire on at most this share of all photos: J,J,...
strongest() {                                    # SHARE
    ./saeclip explain -s "$sae" -t "$stats" -m "$MODEL" "$IMAGES" --limit 1 \
        --max-frequency "$1" --quiet | sed -n 's/^\([0-9][0-9]*\) .*/\1/p' | head -n 12 | paste -s -d , -
}

# What an earlier run has made.
for name in atlas figures masks sheets world unseen relu.csv topk.csv scores.txt; do rm -rf out/$name; done
rm -f out/seen.safetensors out/unseen.*safetensors out/codes.safetensors out/relu.*safetensors out/topk.*safetensors
mkdir -p out/figures
if [ "$own" ] && [ "$MODEL" = weights/demo.safetensors ]; then
    say "Note: $MODEL was trained on drawn shapes and does not know photos. MODEL=FILE gives another model."
fi
if [ ! "$own" ]; then
    say "Drawn shapes: $PICTURES images to train on and $UNSEEN to test on; how many of these the model names correctly"
    tests/synth draw -o out/world --seed 1 --count "$PICTURES"
    tests/synth draw -o out/unseen --seed 1 --first "$PICTURES" --count "$UNSEEN"
    saeclip zeroshot -m "$MODEL" $unseen
fi

say "Activations: the output of the MLP in the last block but one, for each token of each image"
saeclip extract -m "$MODEL" "$IMAGES" -o $acts
[ "$own" ] || saeclip extract -m "$MODEL" $unseen -o out/unseen.safetensors

say "Two sparse autoencoders, ReLU and TopK, with $EXPANSION latents per dimension of the activations"
# images, steps (of 16 images each), a fifth of the steps, and the epochs that make 500 steps
set -- $(./saeclip info $acts | awk -v epochs="$EPOCHS" '$1 == "activations" {
    steps = int($3 * epochs / 16 + 0.5); print $3, steps, int(steps / 5), int(8000 / $3) + 1 }')
if [ "$2" -lt 100 ]; then
    warmup=$3
    echo "  (Only $2 training steps with $1 images: more images, or EPOCHS=$4, give better latents.)"
fi
train relu --l1 $l1 --log out/relu.csv -o out/relu.safetensors
train topk --k $k --log out/topk.csv -o out/topk.safetensors

say "How well they reconstruct the activations (explained variance), and how many latents are active (L0)"
set -- -s out/relu.safetensors -s out/topk.safetensors --acts $acts
[ "$own" ] || set -- "$@" --also out/unseen.safetensors
saeclip eval "$@"

say "Statistics of each latent: how often it fires, how strongly, and on which images most"
for name in relu topk; do
    saeclip stats -s out/$name.safetensors --acts $acts -o out/$name.stats.safetensors
done
[ "$own" ] || saeclip stats -s out/relu.safetensors --acts out/unseen.safetensors -o out/unseen.stats.safetensors

if [ ! "$own" ]; then
    say "How many images the model names correctly when the reconstruction replaces the activations"
    for name in relu topk; do
        saeclip zeroshot -m "$MODEL" -s out/$name.safetensors $unseen
    done
    say "The latent that best detects each thing drawn: area under the ROC curve on the images trained on and on" \
        "unseen ones, and overlap of its patches with the true mask"
    saeclip encode -s out/relu.safetensors --image-means --acts $acts -o out/codes.safetensors
    saeclip encode -s out/relu.safetensors --image-means --acts out/unseen.safetensors -o out/unseen.codes.safetensors
    tests/synth score --seed 1 --codes out/codes.safetensors --unseen out/unseen.codes.safetensors >out/scores.txt
    cat out/scores.txt
    : "${LATENTS:=$(detecting cross disc ring square star triangle blue red yellow checked dotted striped)}"
fi
for share in 0.5 1; do : "${LATENTS:=$(strongest $share)}"; done

say "Figures"
set -- "$stats"
saeclip plot curves out/relu.csv out/topk.csv -o out/figures/curves.svg
[ "$own" ] || set -- "$@" out/unseen.stats.safetensors
saeclip plot latents "$@" -o out/figures/latents.svg
for kind in activations counts; do
    saeclip plot $kind out/relu.stats.safetensors out/topk.stats.safetensors -o out/figures/$kind.svg
done

masked=$LATENTS things=''
if [ ! "$own" ]; then
    things='checked red square star'
    masked=$(detecting $things)
    set -- "$unseen/red star"/*.ppm
    [ -f "$1" ] || set -- "$unseen"/*/*.ppm
    set -- "$1"
elif [ "$CLASS" ]; then set -- "$IMAGES" --class "$CLASS"
else set -- "$IMAGES" --limit 1
fi
if saeclip mask -s "$sae" -m "$MODEL" "$@" -l "$masked" -o out/masks; then
    for thing in $things; do                     # the name of the thing in place of the image's
        latent=$(detecting "$thing")
        for file in "out/masks/latent_${latent}_"*.p[gp]m; do
            [ ! -f "$file" ] || mv "$file" "out/masks/latent_${latent}_$thing.${file##*.}"
        done
    done
    set --
    for latent in $(echo "$masked" | tr , ' '); do
        for mask in "out/masks/latent_${latent}_"*.pgm; do set -- "$@" "$mask"; done
    done
    saeclip plot mask "$@" -o out/figures/mask.svg
else echo "  (The figure of masks is left out, for the reason above.)"; fi

say "The top images of some latents, dark where the latent is silent, and an atlas of all latents"
set -- -s "$sae" -t "$stats" -m "$MODEL" "$IMAGES"
[ ! "$LATENTS" ] || saeclip top "$@" -l "$LATENTS" --mask value -o out/sheets
saeclip atlas "$@" -o out/atlas

say "Made in out/:"
if [ "$own" ]; then
    echo "  The atlas, masks and sheets show the TopK SAE: so short a training does not make the ReLU SAE sparse on photos."
else
    echo "  The atlas, masks and sheets show the ReLU SAE."
fi
cat <<END
  out/atlas/index.html   open this first, in a browser: all latents, with the images and patches where each fires most
  out/figures/*.svg      in a browser: training curves; frequency, mean activation and entropy of the latents; counts
                         of images per latent; distribution of activations; masks
  out/sheets/*.ppm       in an image viewer: the top images of latents $LATENTS
END
set -- out/masks/*.ppm                           # a class has none
[ ! -f "$1" ] || cat <<END
  out/masks/*.ppm        in an image viewer: where latents ${masked}${things:+ ($things)} fire in one image
END
cat <<END
  $sae   the SAE; its statistics are in $stats
END
