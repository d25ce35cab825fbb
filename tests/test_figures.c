/* Tests of plot: the points, ticks and texts of each figure, worked out by hand from tiny files made here.
 * Coordinates are relative to a panel or mask, whose place is the transform of its group. */

/* Whether a text is well-formed XML as far as figures use it: tags that nest, attributes in quotes, numbered
 * characters, valid UTF-8 of characters that XML has. */
static int figures_well_formed(const char *text)
{
    const char *open[16];
    size_t length[16], depth = 0;
    for (const char *c = text; *c;) {
        uint32_t point;
        size_t bytes = utf8_length(c, &point);
        if (bytes == 0 || (point < ' ' && point != '\n') || point == 0xfffe || point == 0xffff) return 0;
        if (*c == '&' && (c[1] != '#' || !isdigit((unsigned char)c[2]) || c[2 + strspn(c + 2, "0123456789")] != ';'))
            return 0;
        if (*c == '>') return 0;
        if (*c != '<') {
            c += bytes;
            continue;
        }
        int closing = c[1] == '/';
        const char *name = c + 1 + closing;
        size_t letters = strspn(name, "abcdefghijklmnopqrstuvwxyz");
        for (c = name + letters; *c == ' ';) {
            c += 1 + strspn(c + 1, "abcdefghijklmnopqrstuvwxyzB-0123456789");
            if (c[0] != '=' || c[1] != '"') return 0;
            c += 2 + strcspn(c + 2, "\"<");
            if (*c++ != '"') return 0;
        }
        int empty = *c == '/';
        if (c[empty] != '>' || letters == 0 || (!closing && depth == 16)) return 0;
        c += empty + 1;
        if (!closing && !empty) {
            open[depth] = name;
            length[depth++] = letters;
        }
        if (closing && (depth-- == 0 || letters != length[depth] || memcmp(open[depth], name, letters) != 0)) return 0;
    }
    return depth == 0;
}

static size_t figures_count(const char *text, const char *what)
{
    size_t count = 0;
    for (; text && (text = strstr(text, what)) != NULL; text += strlen(what)) count++;
    return count;
}

/* The figure that `plot` makes of this, which must be well-formed; "" where there is none. */
SC_PRINTF(1, 2) static const char *figures_plot(const char *format, ...)
{
    char arguments[4096];
    const char *path = in_folder("figure.svg");
    va_list list;
    va_start(list, format);
    vsnprintf(arguments, sizeof arguments, format, list);
    va_end(list);
    remove(path);
    works("plot %s -o %s", arguments, path);
    const char *svg = get_file(path, NULL);
    check(svg && strncmp(svg, "<svg ", 5) == 0 && figures_well_formed(svg), "plot %s is no XML", arguments);
    return svg ? svg : "";
}

static void figures_has(const char *svg, size_t times, const char *what)
{
    size_t count = figures_count(svg, what);
    check(count == times, "a figure has '%s' %zu times, expected %zu", what, count, times);
}

/* The nth (from 0) path: a line or the dots of one colour. */
static const char *figures_path(const char *svg, size_t n)
{
    static char path[1 << 17];
    path[0] = '\0';
    for (const char *at = svg; (at = strstr(at, "<path fill")) != NULL; at++) {
        if (n-- > 0) continue;
        at = strstr(at, " d=\"") + 4;
        snprintf(path, sizeof path, "%.*s", (int)strcspn(at, "\""), at);
        break;
    }
    return path;
}

#define FIGURES_HEADER "step,images,tokens,lr,loss,mse,l1,ghost,l0,explained_variance,explained_variance_uncentred,dead,seconds\n"
#define FIGURES_ROW(step, loss, mse, l0) step ",1,1,1," loss "," mse ",1,1," l0 ",1,1,1,1\n"

/* Steps 0 to 5 on 260 pixels, 52 each. Loss 100 to 0.01, 65 pixels per power of ten from 0 down to 260; MSE 1 to 5
 * between 1 and 10, 260 (1 - log10 MSE); L0 always 3. */
static void figures_curves(void)
{
    const char *a = in_folder("a.csv"), *b = in_folder("b.csv");
    put_text(a, FIGURES_HEADER FIGURES_ROW("1", "100", "1", "3") FIGURES_ROW("2", "10", "2", "3")
             FIGURES_ROW("3", "1", "3", "3") FIGURES_ROW("4", "0.1", "4", "3") FIGURES_ROW("5", "0.01", "5", "3"));
    put_text(b, FIGURES_HEADER FIGURES_ROW("2", "1e1", "2", "3"));
    const char *svg = figures_plot("curves %s %s", a, b);
    figures_has(svg, 6, "<path fill");
    check(strcmp(figures_path(svg, 0), "M52.0 0.0h0L104.0 65.0L156.0 130.0L208.0 195.0L260.0 260.0") == 0,
          "the loss runs through %s", figures_path(svg, 0));
    check(strcmp(figures_path(svg, 2), "M52.0 260.0h0L104.0 181.7L156.0 135.9L208.0 103.5L260.0 78.3") == 0,
          "the MSE runs through %s", figures_path(svg, 2));
    check(strcmp(figures_path(svg, 1), "M104.0 65.0h0") == 0, "a log of one step is not a dot but %s",
          figures_path(svg, 1));
    const char *const texts[] = { ">0.01<", ">0.1<", ">100<", ">loss<", ">MSE<", ">L0 (active latents per token)<",
        "a.csv<", "b.csv<" };
    for (size_t i = 0; i < COUNT(texts); i++) figures_has(svg, 1, texts[i]);
    figures_has(svg, 3, ">step<");
    figures_has(svg, 3, ">5<");                              /* steps */
    figures_has(svg, 3 + 3, ">1<");                          /* steps, and the other axes */
    figures_has(svg, 3, ">10<");
    figures_has(svg, 1, "translate(364,0)");                 /* 260 + 104 */
    svg = figures_plot("curves %s %s %s %s %s %s %s %s %s", b, a, a, a, a, a, a, a, b);
    figures_has(svg, 4 * 2, " stroke=\"#2f8fd8\"");          /* the ninth has the first one's colour */
    figures_has(svg, 3 + 1, " stroke=\"#7d8794\"");          /* in the panels and in the legend */
    figures_plot("curves %s", b);                            /* where all axes have one value */
    put_text(b, FIGURES_HEADER);
    figures_has(figures_plot("curves %s", b), 3, " d=\"\"");
}

/* The numbers at the ticks of a linear axis up to its largest value: 0 and `last` are there, `after` is not. */
static void figures_ticks(void)
{
    static const struct { const char *steps, *last, *after; } axes[] = {
        { "3", "3", "3.5" }, { "4", "4", "5" }, { "7", "7", "8" }, { "8", "8", "9" }, { "9", "8", "9" },
        { "10", "10", "12.5" }, { "12", "10", "12.5" }, { "15", "15", "17.5" }, { "20", "20", "25" },
        { "300", "300", "350" }, { "12345", "10000", "12500" }, { "80000", "80000", "90000" } };
    char row[200], wanted[40];
    for (size_t i = 0; i < COUNT(axes); i++) {
        snprintf(row, sizeof row, FIGURES_HEADER "%s,1,1,1,200,200,1,1,200,1,1,1,1\n", axes[i].steps);
        put_text(in_folder("ticks.csv"), row);
        const char *svg = figures_plot("curves %s", in_folder("ticks.csv"));
        size_t ticks = figures_count(svg, " 0v260\"") / 3;
        check(ticks >= 5 && ticks <= 9, "%s steps have %zu ticks", axes[i].steps, ticks);
        figures_has(svg, 3, ">0<");
        snprintf(wanted, sizeof wanted, ">%s<", axes[i].last);
        figures_has(svg, 3, wanted);
        snprintf(wanted, sizeof wanted, ">%s<", axes[i].after);
        figures_has(svg, 0, wanted);
    }
}

static void figures_bad_logs(void)
{
    static const struct { const char *text, *says; } logs[] = {
        { "", "expected the first line step,images,tokens,lr,loss" },
        { "step,loss,mse,l0\n1,1,1,1\n", "expected the first line" },
        { FIGURES_HEADER FIGURES_ROW("1", "1", "1", "1") "2,1,1,1,0.5,0.", "line 3" },
        { FIGURES_HEADER "1,1,1,1,1,1,1,1,1,1,1,1,1", "line 2" },
        { FIGURES_HEADER "1,1,1,1,1,1,1,1,1,1,1,1,1,1\n", "line 2" },
        { FIGURES_HEADER FIGURES_ROW("1", "nan", "1", "1"), "line 2: expected 13 finite numbers" },
        { FIGURES_HEADER FIGURES_ROW("1", "1", "inf", "1"), "line 2" },
        { FIGURES_HEADER FIGURES_ROW("1", "1", "1", "1e300"), "line 2" },
        { FIGURES_HEADER FIGURES_ROW("x", "1", "1", "1"), "line 2" } };
    for (size_t i = 0; i < COUNT(logs); i++) {
        put_text(in_folder("bad.csv"), logs[i].text);
        refuses(1, logs[i].says, "plot curves %s -o %s", in_folder("bad.csv"), in_folder("none.svg"));
    }
    put_text(in_folder("bad.csv"), FIGURES_HEADER FIGURES_ROW("1", "1e30", "-1e30", "0")
             FIGURES_ROW("2", "1e-300", "1e30", "0"));
    const char *svg = figures_plot("curves %s", in_folder("bad.csv"));
    check(strcmp(figures_path(svg, 0), "M130.0 260.0h0") == 0, "a loss of 1e-300: %s", figures_path(svg, 0));
    check(strcmp(figures_path(svg, 1), "M260.0 260.0h0") == 0, "a negative value: %s", figures_path(svg, 1));
    check(strcmp(figures_path(svg, 2), "") == 0, "a value of 0: %s", figures_path(svg, 2));
    refuses(1, "cannot be opened", "plot curves %s -o %s", in_folder("not_there.csv"), in_folder("none.svg"));
    refuses(1, "cannot be read", "plot curves %s -o %s", folder, in_folder("none.svg"));
    refuses(1, "safetensors", "plot latents %s -o %s", in_folder("bad.csv"), in_folder("none.svg"));
    refuses(2, "expected curves, latents", "plot pie %s -o %s", in_folder("a.csv"), in_folder("none.svg"));
    refuses(2, "-o is missing", "plot curves %s", in_folder("a.csv"));
    refuses(2, "KIND FILE", "plot curves -o %s", in_folder("none.svg"));
    check(!exists(in_folder("none.svg")) && !exists(in_folder("none.svg.tmp")), "a failed plot leaves a file");
    if (device("full")) refuses(1, "cannot be written", "plot curves %s -o %s", in_folder("a.csv"), device("full"));
    else skip("plot on a full disk: no such device can be made here");
}

/* A name is text: neither XML nor a terminal sees more in it. */
static void figures_names(void)
{
    static const struct { const char *name, *text; } names[] = {
        { "<b>&\"'\n.csv", "/&#60;b&#62;&#38;\"'\\x0a.csv<" },
        { "\x1b[31m\xff\xc2\x9b.csv", "/\\x1b[31m\\xff\\xc2\\x9b.csv<" },
        { "o\xef\xbf\xbd\xef\xac\x81 \xc3\xa9.csv", "/o\xef\xbf\xbd\xef\xac\x81 \xc3\xa9.csv<" } };
    size_t count;
    char *log = read_whole(in_folder("a.csv"), &count), path[2000];
    for (size_t i = 0; i < COUNT(names); i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i].name);
        FILE *file = fopen(path, "wb");
        if (!file || fclose(file) != 0) {
            skip("a file's name cannot be %s here", shown(names[i].name));
            continue;
        }
        put_file(path, log, count);
        const char *svg = in_folder("names.svg");
        char *list[] = { (char *)(uintptr_t)program(), "plot", "curves", path, "-o", (char *)(uintptr_t)svg, NULL };
        check(run_list(list) == 0, "a name of any bytes cannot be plotted: %s", ran.err);
        const char *text = get_file(svg, NULL);
        check(text && figures_well_formed(text), "name %zu breaks the XML", i);
        figures_has(text, 1, names[i].text);
        remove(path);
    }
    free(log);
}

/* A statistics file of n latents with these numbers; NULL: zeros. bins: [HISTOGRAM_BINS] */
static void figures_stats(const char *path, size_t n, const float *frequency, const float *mean, const float *entropy,
                          const int64_t *images_of, uint64_t images, const int64_t *bins)
{
    statistics s = { .n = n, .T = 2, .K = 1, .P = 1, .first_patch = 1, .threshold = -1, .images = images };
    memory_list memory = NULL;
    sc_writer w;
    int status = new_statistics(&s, &memory, 0);
    for (size_t j = 0; j < n && status == SC_OK; j++) {
        if (frequency) s.latent[j].sparsity = frequency[j];
        if (mean) s.latent[j].mean = mean[j];
        if (entropy) s.latent[j].entropy = entropy[j];
        if (images_of) s.latent[j].images = images_of[j];
    }
    if (bins) memcpy(s.histogram[0], bins, sizeof s.histogram[0]);
    if (status == SC_OK) status = sc_writer_open(&w, path);
    if (status == SC_OK) status = write_statistics(&w, &s);
    if (status == SC_OK) status = sc_writer_close(&w, SC_OK);
    release(&memory);
    if (status != SC_OK) need("%s: %s", path, sc_error());
}

/* log10 frequency -3 to 0 on 300 pixels, log10 mean -2 to 2 on 300 pixels from below. Entropy 0 to 2 from viridis's
 * first colour to its last. */
static void figures_latents(void)
{
    const float frequency[] = { 0.001f, 0.1f, 0, 1 }, mean[] = { 0.01f, 1, 0, 100 }, entropy[] = { -1, 0, 0, 2 };
    const float zero[4] = { 0 }, silent[] = { -1, -1, -1, -1 };
    const char *one = in_folder("one.st");
    figures_stats(one, 4, frequency, mean, entropy, NULL, 1, NULL);
    const char *svg = figures_plot("latents %s", one);
    check(strcmp(figures_path(svg, 0), "M0.0 300.0h0") == 0, "no entropy: %s", figures_path(svg, 0));
    check(strcmp(figures_path(svg, 1), "M200.0 150.0h0") == 0, "entropy 0: %s", figures_path(svg, 1));
    check(strcmp(figures_path(svg, COLOURS), "M300.0 0.0h0") == 0, "entropy 2: %s", figures_path(svg, COLOURS));
    figures_has(svg, 1, "stroke=\"#888\" stroke-width=\"3.0\"");
    figures_has(svg, 1, "stroke=\"#440154\" stroke-width=\"3.0\"");
    figures_has(svg, 1, "stroke=\"#fde725\" stroke-width=\"3.0\"");
    figures_has(svg, 1, ">one.st<");
    figures_has(svg, 1, ">entropy of the top images (nats); grey: undefined<");
    const char *const texts[] = { ">0.001<", ">0.01<", ">0.1<", ">1<", ">10<", ">100<" };
    const size_t times[] = { 1, 2, 2, 3, 1, 1 };             /* on both axes and the colours' */
    for (size_t i = 0; i < COUNT(texts); i++) figures_has(svg, times[i], texts[i]);
    svg = figures_plot("latents %s %s", one, one);           /* the same, 404 pixels further */
    figures_has(svg, 2, "d=\"M200.0 150.0h0\"");
    figures_has(svg, 1, "translate(0,0)");
    figures_has(svg, 1, "translate(404,0)");

    figures_stats(one, 4, zero, zero, silent, NULL, 1, NULL);
    svg = figures_plot("latents %s", one);
    figures_has(svg, 0, "h0");
    figures_stats(one, 4, frequency, mean, silent, NULL, 1, NULL);
    figures_has(figures_plot("latents %s", one), 3, "h0");
}

/* 5000 latents: each is a dot, of 15 bytes or less. */
static void figures_many(void)
{
    enum { N = 5000 };
    static float frequency[N], mean[N], entropy[N];
    size_t count;
    for (size_t j = 0; j < N; j++) {
        frequency[j] = exp32(-4 + 3.99f * uniform(1, 1, j));
        mean[j] = exp32(3 * uniform(1, 2, j));
        entropy[j] = frequency[j];
    }
    figures_stats(in_folder("many.st"), N, frequency, mean, entropy, NULL, 1, NULL);
    figures_plot("latents %s %s", in_folder("many.st"), in_folder("many.st"));
    const char *svg = get_file(in_folder("figure.svg"), &count);
    size_t points = figures_count(svg, "h0");
    check(points == 2 * N && count < 15 * points, "%zu points, %zu bytes", points, count);
}

static void figures_bad_statistics(void)
{
    const char *path = in_folder("bad.st"), *refused = in_folder("none.svg");
    refuses(1, "not statistics", "plot latents %s -o %s", GOLDEN "acts.safetensors", refused);
    put_file(path, "", 0);
    refuses(1, "safetensors", "plot latents %s -o %s", path, refused);
    check(!exists(refused), "a failed plot leaves a file");
}

/* Ranks 0 to 6 on 620 pixels, 103 1/3 each, of which the last does not fire; images 1 to 5 between 1 and 10,
 * 260 (1 - log10 images). */
static void figures_counts(void)
{
    const int64_t count[] = { 5, 0, 1, 2, 5, 3 }, one[] = { 1 }, silent[] = { 0, 0 };
    const char *path = in_folder("counts.st"), *other = in_folder("others.st");
    figures_stats(path, 6, NULL, NULL, NULL, count, 5, NULL);
    figures_stats(other, 1, NULL, NULL, NULL, one, 1, NULL);
    const char *svg = figures_plot("counts %s %s", path, other);
    check(strcmp(figures_path(svg, 0), "M103.3 78.3h0L206.7 78.3L310.0 135.9L413.3 181.7L516.7 260.0") == 0,
          "images by latent run through %s", figures_path(svg, 0));
    check(strcmp(figures_path(svg, 1), "M103.3 260.0h0") == 0, "one latent is not a dot");
    figures_has(svg, 1, "counts.st<");
    figures_has(svg, 1, "others.st<");
    figures_has(svg, 1, ">6<");
    figures_has(svg, 1, ">images on which a latent fires<");
    figures_stats(other, 2, NULL, NULL, NULL, silent, 9, NULL);
    figures_has(figures_plot("counts %s", other), 1, " d=\"\"");
}

/* 3 values in bin 160, whose middle is 2^(1/8) or 1.0905, 1 in bin 168, 4 times as large: 0.03763 and 0.63969 in
 * log10, of which 0 to 1 lie on 620 pixels; 75 % is the top, at 0, and the bottom at 260. */
static void figures_activations(void)
{
    int64_t bins[HISTOGRAM_BINS] = { 0 };
    const char *path = in_folder("bins.st");
    figures_stats(path, 1, NULL, NULL, NULL, NULL, 1, bins);
    figures_has(figures_plot("activations %s", path), 1, " d=\"\"");
    bins[160] = 3;
    bins[168] = 1;
    figures_stats(path, 1, NULL, NULL, NULL, NULL, 1, bins);
    const char *svg = figures_plot("activations %s", path), *line = figures_path(svg, 0);
    check(strncmp(line, "M23.3 0.0h0L", 12) == 0 && strstr(line, "L396.6 173.3") && figures_count(line, " 260.0L") == 7,
          "active values run through %s", line);
    figures_has(svg, 1, "bins.st<");
    figures_has(svg, 1, ">70<");                             /* every 10 % */
    figures_has(svg, 1, ">active values in a bin (%)<");
    bins[161] = -1;
    figures_stats(path, 1, NULL, NULL, NULL, NULL, 1, bins);
    refuses(1, "negative counts", "plot activations %s -o %s", path, in_folder("none.svg"));
}

/* 4 cells of 100 pixels, drawn half a pixel larger, the brightest of viridis's last colour. */
static void figures_mask(void)
{
    const char *path = in_folder("mask.pgm"), *refused = in_folder("none.svg");
    char big[66 * 66 * 2 + 20] = "P2 65 65 255";
    static const struct { const char *text, *says; } bad[] = {
        { "P2 2 1 255 0 0 ", "square PGM" },
        { "P2 2 2 255 0 0 ", "missing or invalid" }, { "P2 0 0 255 ", "at least 1 of each" }, { "step,loss\n", "not an image" } };
    put_text(path, "P2 2 2 255 0 255 128 0 ");
    const char *svg = figures_plot("mask %s", path);
    figures_has(svg, 1 + COLOURS, " stroke-width=\"100.5\"");
    figures_has(svg, 1, "\"#fde725\" stroke-width=\"100.5\" stroke-linecap=\"square\" d=\"M150.0 50.0h0\"");
    figures_has(svg, 1, "\"#21908d\" stroke-width=\"100.5\" stroke-linecap=\"square\" d=\"M50.0 150.0h0\"");
    figures_has(svg, 1, "\"#440154\" stroke-width=\"100.5\" stroke-linecap=\"square\" d=\"M50.0 50.0h0M150.0 150.0h0\"");
    figures_has(svg, 1, ">mask.pgm<");
    figures_has(svg, 1, ">0<");
    figures_has(svg, 1, ">0.25<");
    figures_has(svg, 1, ">1<");                              /* a scale ends with its largest value */
    svg = figures_plot("mask %s %s %s %s %s", path, path, path, path, path);
    figures_has(svg, 5, ">mask.pgm<");
    figures_has(svg, 1, "translate(0,0)");
    figures_has(svg, 1, "translate(912,0)");                 /* three times 200 + 104 pixels further */
    figures_has(svg, 1, "translate(0,304)");                 /* the next row */
    put_text(path, "P2 1 1 255 0 ");
    figures_has(figures_plot("mask %s", path), 1,
                "\"#440154\" stroke-width=\"200.5\" stroke-linecap=\"square\" d=\"M100.0 100.0h0\"");
    for (size_t i = 0; i < COUNT(bad); i++) {
        put_text(path, bad[i].text);
        refuses(1, bad[i].says, "plot mask %s -o %s", path, refused);
    }
    for (int i = 0; i < 65 * 65; i++) strcat(big, " 1");
    put_text(path, strcat(big, " "));
    refuses(1, "at most 64 x 64", "plot mask %s -o %s", path, refused);
    check(!exists(refused), "a failed plot leaves a file");
}

/* What the other commands write is what plot reads. */
static void figures_of_commands(void)
{
    works("stats --quiet -s " GOLDEN "stats_exact_sae.safetensors --acts " GOLDEN "stats_exact_acts.safetensors -o %s",
          in_folder("exact.st"));
    figures_plot("latents %s", in_folder("exact.st"));
    figures_plot("activations %s", in_folder("exact.st"));
    figures_plot("counts %s", in_folder("exact.st"));
    works("train --quiet --acts " GOLDEN "stats_exact_acts.safetensors --latents 16 --steps 3 --batch 2 --log %s -o %s",
          in_folder("new.csv"), in_folder("new.st"));
    figures_has(figures_plot("curves %s", in_folder("new.csv")), 1, "new.csv<");
}

static void test_figures(void)
{
    figures_curves();
    figures_ticks();
    figures_bad_logs();
    figures_names();
    figures_latents();
    figures_many();
    figures_bad_statistics();
    figures_counts();
    figures_activations();
    figures_mask();
    figures_of_commands();
}
