# Lines of saeclip.c that ran, from gcov's text (gcov -t) of every program it is part of: a line counts as run
# if it ran in one of them, and in one of the instruction sets it is compiled for. Those that never ran come
# out with their numbers; then the share. Less than `least` per cent ends with status 1.
BEGIN { FS = ":" }
$2 + 0 == 0 && $3 == "Source" { inside = $4 ~ /(^|\/)saeclip\.c$/ }
inside && $2 + 0 > 0 && $1 !~ /-/ {
    line = $2 + 0
    code[line] = 1
    if ($1 ~ /[0-9]/) ran[line] = 1
    text[line] = $0
    sub(/^[^:]*:[^:]*:/, "", text[line])
    if (line > last) last = line
}
END {
    for (line = 1; line <= last; line++)
        if (line in code) {
            lines++
            if (line in ran) run++
            else printf "%6d:%s\n", line, text[line]
        }
    if (lines == 0) exit 1
    share = 100 * run / lines
    printf "%d of %d lines of saeclip.c ran, %.2f %%\n", run, lines, share
    exit share < least
}
