#!/bin/sh
# `make report MODEL=FILE TRAIN=IMAGES VAL=IMAGES OUT=DIR`: all that the report shows. Five SAEs at a block's attention
# and MLP (ReLU, TopK, and at the MLP ReLU with geometric bias), the table, all figures, and report.html that
# holds them. What OUT has is not made again, and a training that was stopped goes on. The other variables
# are the Makefile's, with the report's values.
set -eu
for given in "MODEL=$MODEL" "TRAIN=$TRAIN" "VAL=$VAL" "OUT=$OUT"; do
    [ "${given#*=}" ] || { echo "make report: ${given}... is missing" >&2; exit 2; }
done
program=$PWD/saeclip
names='attn-relu attn-topk mlp-relu mlp-topk mlp-geometric'

saeclip() {                                      # shows what it does
    {
        printf 'saeclip'
        for word; do
            case $word in *' '*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
        done
        echo
    } >&2
    "$program" "$@"
}
plot() { (cd "$OUT" && saeclip plot "$@"); }     # whose legends have the files' names
# from HOOK PART COMMAND...: runs it on the kept activations of a part, or on the photos themselves
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
evaluate() {                                     # HOOK: a row an SAE, first on TRAIN, then on VAL
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
# The class's first photo in VAL; nothing where VAL is a packed set or has no classes.
photo() {
    case $VAL in
    *.txt) awk -F'\t' -v class="$CLASS" '$2 == class { print $1; exit }' "$VAL" |
        sed "s|^[^/]|$(dirname "$VAL")/&|" ;;
    *.safetensors) ;;
    *) (LC_ALL=C && for folder in "$VAL"/*/; do echo "$folder"; done) | sed -n "$((CLASS + 1))p" |
        while read -r folder; do (LC_ALL=C && for file in "$folder"*; do echo "$file"; done) | head -n 1; done ;;
    esac
}
masks() {
    sae=$1 latents=$LATENTS image=$(photo)
    if [ ! "$latents" ] && [ "$image" ]; then
        latents=$(saeclip explain -s "$OUT/$sae.safetensors" -t "$OUT/$sae.train.stats" -m "$MODEL" \
            --square "$SQUARE" --max-frequency 0.5 --format csv "$image" | sed -n 's/^\([0-9]*\),.*/\1/p' |
            head -n 4 | paste -s -d , -)
    fi
    [ "$latents" ] || { echo "no masks of $sae: LATENTS=J,J,... is missing" >&2; return; }
    rm -rf "$OUT/masks-$sae"
    saeclip mask -s "$OUT/$sae.safetensors" -m "$MODEL" --square "$SQUARE" "$VAL" -l "$latents" --class "$CLASS" \
        -o "$OUT/masks-$sae"
    (cd "$OUT/masks-$sae" && saeclip plot mask ./*.pgm -o "../mask-$sae.svg")
}
html() { sed 's/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g'; }
figure() {                                       # CAPTION NAME...: those that are there
    echo "<h2>$1</h2>"
    shift
    for name; do
        [ ! -f "$OUT/$name.svg" ] || { echo "<figure>"; cat "$OUT/$name.svg"; echo "</figure>"; }
    done
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
    echo "<p>$(html <"$OUT/options.txt")</p><div class=wide><table>"
    sed -n '/^| *---/d; /^|/{s/^| /<tr><td>/; s/ | /<td>/g; s/ |$//; p;}' "$OUT/table.md"
    echo "</table></div>"
    [ ! "$REPORTED" ] || { echo "<h2>The report's own figures</h2><pre>"; html <"$REPORTED"; echo "</pre>"; }
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
[ -f "$OUT/options.txt" ] || echo "$options" >"$OUT/options.txt"
if [ "$(cat "$OUT/options.txt")" != "$options" ]; then
    echo "make report: $OUT holds another report: $(cat "$OUT/options.txt")" >&2
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
    echo "| data | output | activation | geometric bias | MSE | explained variance | mean activation | L0 a token |" \
        "L0 / latents | entropy | dead | on every image | on 1 image | on 2 images |"
    echo "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    rows 1
    rows 2
    echo
    if [ "$REPORTED" ]; then printf 'The report'"'"'s own figures:\n\n' && cat "$REPORTED"
    else echo "The report's own figures are not part of saeclip: REPORTED=FILE, a Markdown table, puts them here."; fi
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
echo "All figures: $OUT/report.html"
