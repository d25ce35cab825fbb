#!/bin/sh
# `make report MODEL=FILE TRAIN=IMAGES VAL=IMAGES OUT=DIR`: everything in the published report that saeclip reproduces.
# Five SAEs at a block's attention and MLP outputs (ReLU, TopK, and at the MLP ReLU with a geometric bias), the table,
# all figures, and report.html, which holds them. What OUT already has is not made again, and a training run that was
# stopped continues. The other variables are set by the Makefile, to the report's values. The last figure shows
# LATENTS, or the four latents that are strongest on the first photo of CLASS, among those that fire on at most half
# of the photos (if there are none, among all).
set -eu
for given in "MODEL=$MODEL" "TRAIN=$TRAIN" "VAL=$VAL" "OUT=$OUT"; do
    [ "${given#*=}" ] || { echo "make report: ${given}... is missing" >&2; exit 2; }
done
program=$PWD/saeclip
names='attn-relu attn-topk mlp-relu mlp-topk mlp-geometric'

saeclip() {                                      # prints the command, then runs it
    {
        printf 'saeclip'
        for word; do
            case $word in *' '*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
        done
        echo
    } >&2
    "$program" "$@"
}
plot() { (cd "$OUT" && saeclip plot "$@"); }     # in OUT: its legends show the names of the files
# from HOOK PART COMMAND...: runs the command on the stored activations of a part, or on its photos
from() {
    hook=$1 part=$2 images=$TRAIN
    shift 2
    [ "$part" = train ] || images=$VAL
    if [ "$KEEP" ]; then saeclip "$@" --acts "$OUT/$hook.$part.acts.safetensors"
    else saeclip "$@" -m "$MODEL" "$images" --square "$SQUARE" --layer "$LAYER" --hook "$hook"; fi
}
train() {                                        # NAME
    hook=${1%-*} sae="$OUT/$1.safetensors" log="$OUT/$1.csv"
    case $1 in
    *-topk) set -- --arch topk --k "$K" ;;
    *-geometric) set -- --arch relu --l1 "$L1" --b-dec geomedian-images ;;
    *) set -- --arch relu --l1 "$L1" ;;
    esac
    from "$hook" train train "$@" --expansion "$EXPANSION" --epochs "$EPOCHS" --batch "$BATCH" --lr "$LR" \
        --warmup "$WARMUP" --log "$log" --checkpoint "$OUT/training.ckpt" --resume -o "$sae"
    rm -f "$OUT/training.ckpt" "$OUT/training.ckpt.prev"
}
evaluate() {                                     # HOOK: one row per SAE on TRAIN, then one each on VAL
    hook=$1
    set --
    for name in $names; do
        [ "${name%-*}" != "$hook" ] || set -- "$@" -s "$OUT/$name.safetensors"
    done
    if [ "$KEEP" ]; then
        set -- "$@" --acts "$OUT/$hook.train.acts.safetensors" --also "$OUT/$hook.val.acts.safetensors"
    else set -- "$@" -m "$MODEL" "$TRAIN" --also "$VAL" --square "$SQUARE" --layer "$LAYER" --hook "$hook"; fi
    saeclip eval "$@" --format csv >"$OUT/table-$hook.tmp"
    mv "$OUT/table-$hook.tmp" "$OUT/table-$hook.csv"
}
# Rows of both hooks' tables as Markdown. Columns count from the right: paths, on the left, may hold commas.
rows() {                                         # 1: of TRAIN, 2: of VAL
    for hook in attn mlp; do
        awk -F, -v part="$1" 'function column(name) { return $(NF - at[name]) }
            { gsub(/"/, ""); line[NR] = $0 }
            NR == 1 { for (i = 1; i <= NF; i++) at[$i] = NF - i }
            END { for (r = 2 + (part - 1) * (NR - 1) / 2; r < 2 + part * (NR - 1) / 2; r++) {
                      $0 = line[r]
                      printf "| %s | %s | %s | %s | %.4g | %.1f %% | %.4g | %.2f | %.4g | %.3g | %d | %d | %d | %d |\n",
                          part == 1 ? "training" : "validation", column("output"), column("activation"),
                          column("geometric_bias"), column("mse"), 100 * column("explained_variance"),
                          column("mean_activation"), column("l0"), column("l0_fraction"), column("entropy_mean"),
                          column("dead"), column("every_image"), column("one_image"), column("two_images") } }' \
            "$OUT/table-$hook.csv"
    done
}
# The first image of CLASS in a packed set: the images, then labels of 8 bytes each, follow the header.
unpack() {
    set -- $("$program" info "$VAL" | awk '$1 == "images" { print $3, $5, $7 }')
    begin=$(od -A n -t u1 -N 4 "$VAL" | awk '{ print 8 + $1 + 256 * ($2 + 256 * ($3 + 256 * $4)) }')
    [ $# = 3 ] && [ $((begin + $1 * $2 * $3 * 3 + 8 * $1)) = $(($(wc -c <"$VAL"))) ] || return 0
    at=$(tail -c $((8 * $1)) "$VAL" | od -A n -v -t u1 | awk -v class="$CLASS" '
        { for (i = 1; i < NF; i += 8) { if ($i + 256 * $(i + 1) + 65536 * $(i + 2) == class) { print n + 0; exit }
                                        n++ } }')
    [ "$at" ] || return 0
    { printf 'P6 %d %d 255\n' "$3" "$2" &&
        dd if="$VAL" bs=1 skip=$((begin + at * $2 * $3 * 3)) count=$(($2 * $3 * 3)) 2>/dev/null; } >"$OUT/first.ppm"
    printf '%s\n' "$OUT/first.ppm"
}
# The first photo of the class in VAL: a file, or a folder of which it is the first; empty without classes.
photo() {
    case $VAL in
    *.safetensors) unpack ;;
    *.txt) awk -F'\t' -v class="$CLASS" '{ sub(/(^|[ \t])#.*/, ""); sub(/^[ \t\r]+/, "") }
               NF > 1 && $2 ~ /[0-9]/ && $2 + 0 == class { print $1; exit }' "$VAL" | while IFS= read -r file; do
            case $file in /*) ;; *) file=$(dirname "$VAL")/$file ;; esac
            printf '%s\n' "$file"
        done ;;
    *)  LC_ALL=C
        set -- "$VAL"/*/
        [ -d "$1" ] && [ "$CLASS" -lt $# ] || return 0
        shift "$CLASS"
        printf '%s\n' "$1" ;;
    esac
}
# The four latents that are strongest on a photo, among those that fire on at most this share of all photos.
strongest() {                                    # SAE PHOTO SHARE
    saeclip explain -s "$OUT/$1.safetensors" -t "$OUT/$1.train.stats" -m "$MODEL" --square "$SQUARE" --limit 1 \
        --max-frequency "$3" --quiet "$2" | sed -n 's/^\([0-9][0-9]*\) .*/\1/p' | head -n 4 | paste -s -d , -
}
masks() {                                        # without the class or such latents only this figure is left out
    sae=$1 latents=$LATENTS image=''
    rm -rf "$OUT/masks-$sae" "$OUT/mask-$sae.svg"
    [ "$latents" ] || image=$(photo)
    for share in 0.5 1; do
        [ "$latents" ] || [ ! "$image" ] || latents=$(strongest "$sae" "$image" $share)
    done
    if [ ! "$latents" ]; then
        echo "make report: no masks of $sae: no photo of class $CLASS was found (LATENTS=J,J,... names latents)" >&2
    elif saeclip mask -s "$OUT/$sae.safetensors" -m "$MODEL" --square "$SQUARE" "$VAL" -l "$latents" \
        --class "$CLASS" -o "$OUT/masks-$sae"; then
        (cd "$OUT/masks-$sae" && saeclip plot mask ./*.pgm -o "../mask-$sae.svg")
    else echo "make report: no masks of $sae, for the reason above; everything else was made" >&2
    fi
}
html() { sed 's/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g'; }
figure() {                                       # CAPTION NAME...: those of the figures that exist
    caption=$1
    shift
    for name; do
        [ -f "$OUT/$name.svg" ] || continue
        printf '%s<figure>\n' "${caption:+<h2>$caption</h2>}"
        cat "$OUT/$name.svg"
        echo "</figure>"
        caption=''
    done
    [ ! "$caption" ] || echo "<p>$caption: this figure could not be made; see the messages of \`make report\`.</p>"
}
page() {
    cat <<'END'
<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>saeclip: the report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
td { padding: .2em .6em; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap }
tr:first-child td { font-weight: bold; white-space: normal; vertical-align: bottom }
figure { margin: 1em 0 }
svg { max-width: 100%; height: auto }
pre { overflow-x: auto }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #16181c } }
</style>
<h1>Five sparse autoencoders</h1>
END
    printf '<p>%s</p><div class=wide><table>\n' "$(html <"$OUT/options.txt")"
    sed -n '/^$/q; /^|---/d; /^|/{s/^| /<tr><td>/; s/ | /<td>/g; s/ |$//; p;}' "$OUT/table.md"
    echo "</table></div>"
    [ ! "$REPORTED" ] || { echo "<h2>The report's own numbers</h2><pre>"; html <"$REPORTED"; echo "</pre>"; }
    figure "1. Training at the attention's output" curves-attn
    figure "2. Training at the MLP's output" curves-mlp
    figure "3. Latents: how often and how strongly they fire, training beside validation" \
        $(for name in $names; do echo "latents-$name"; done)
    figure "4. Active values" activations
    figure "5. Images on which latents fire" counts
    figure "6. Where latents fire on photos of class $CLASS, on average" mask-mlp-relu mask-mlp-topk
}

mkdir -p "$OUT"
options="$MODEL, trained on $TRAIN, validated on $VAL: --layer $LAYER --square $SQUARE --expansion $EXPANSION"
options="$options --epochs $EPOCHS --batch $BATCH --lr $LR --warmup $WARMUP --l1 $L1 --k $K"
[ -f "$OUT/options.txt" ] || printf '%s\n' "$options" >"$OUT/options.txt"
if [ "$(cat "$OUT/options.txt")" != "$options" ]; then
    printf 'make report: %s holds another report: %s\n' "$OUT" "$(cat "$OUT/options.txt")" >&2
    exit 1
fi
for hook in attn mlp; do
    for part in train val; do
        acts="$OUT/$hook.$part.acts.safetensors"
        [ ! "$KEEP" ] || [ -f "$acts" ] || (KEEP='' && from $hook $part extract -o "$acts")
    done
done
for name in $names; do
    [ -f "$OUT/$name.safetensors" ] || train "$name"
    for part in train val; do
        stats="$OUT/$name.$part.stats"
        [ -f "$stats" ] || from "${name%-*}" $part stats -s "$OUT/$name.safetensors" -o "$stats"
    done
done
for hook in attn mlp; do [ -f "$OUT/table-$hook.csv" ] || evaluate $hook; done
{
    echo "| data | output | activation | geometric bias | MSE | explained variance | mean activation | L0 per token |" \
        "L0 / latents | entropy | dead | on every image | on 1 image | on 2 images |"
    echo "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    rows 1
    rows 2
    echo
    if [ "$REPORTED" ]; then printf 'The report'"'"'s own numbers:\n\n' && cat "$REPORTED"
    else echo "The report's own numbers are not part of saeclip: REPORTED=FILE, a Markdown table, adds them here."; fi
} >"$OUT/table.md"

for hook in attn mlp; do
    set --
    for name in $names; do [ "${name%-*}" != $hook ] || set -- "$@" $name.csv; done
    plot curves "$@" -o curves-$hook.svg
done
set --
for name in $names; do
    plot latents $name.train.stats $name.val.stats -o latents-$name.svg
    set -- "$@" $name.train.stats
done
plot activations "$@" -o activations.svg
plot counts "$@" -o counts.svg
masks mlp-relu
masks mlp-topk
page >"$OUT/report.html"
cat "$OUT/table.md"
echo
printf 'All figures: %s\n' "$OUT/report.html"
