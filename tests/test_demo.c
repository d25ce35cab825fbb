/* Tests of the demo: what tests/synth draws, whether the small model names it, and the scores that say
 * which latent knows what, against the definitions worked out pair by pair and threshold by threshold. */

enum {
    DEMO_PATCHES = 196, DEMO_TOKENS = 197, DEMO_VALUES = 18, DEMO_LATENTS = 6,
    DEMO_COVER = 3 + 6 * 3, DEMO_PIXELS = DEMO_COVER + 3 * DEMO_PATCHES,
    DEMO_RECORD = DEMO_PIXELS + 112 * 112 * 3,   /* bytes, as synth.c's command_stream has them */
    DEMO_SEEN = 40, DEMO_ALL = 64
};

static const char *const demo_values[DEMO_VALUES] = {
    "cross", "disc", "ring", "square", "star", "triangle", "blue", "cyan", "green", "orange", "purple", "red",
    "white", "yellow", "checked", "dotted", "plain", "striped"
};

static const char *demo_synth(void)
{
    const char *name = getenv("SYNTH");
    return name && *name ? name : "tests/synth";
}

/* A set of pictures in the order of their files, and the codes made up for it. */
typedef struct {
    size_t pictures;
    const unsigned char *record[DEMO_ALL];
    float f[DEMO_ALL][DEMO_TOKENS][DEMO_LATENTS];
    double strongest[DEMO_ALL][DEMO_LATENTS];    /* of patches */
    int has[DEMO_ALL][DEMO_VALUES];
} demo_set;

static demo_set demo_seen, demo_unseen;

/* How many pixels of a patch are of objects with a value. */
static int demo_cover(const unsigned char *record, int v, int patch)
{
    int cover = 0;
    for (int k = 0; k < record[2]; k++) {
        const unsigned char *facts = record + 3 + 6 * k;
        if (facts[0] == v || facts[1] + 6 == v || facts[2] + 14 == v)
            cover += record[DEMO_COVER + k * DEMO_PATCHES + patch];
    }
    return cover;
}

/* The files' order is that of classes, then of numbers. */
static void demo_sort(demo_set *set, const unsigned char *first, size_t count)
{
    set->pictures = 0;
    for (int class = 0; class < 48; class++)
        for (size_t i = 0; i < count; i++)
            if (first[i * DEMO_RECORD] == class) set->record[set->pictures++] = first + i * DEMO_RECORD;
}

/* Codes of few values, so that ties are many. Latent 1 is red's own. Latent 2 is at 1 on blue in the first
 * half and at 1/2 on blue in the second, but where it is noisy at 1/2 all over the first half too: a threshold
 * of 1/2 is best where nothing is noisy, or where only a part of those that tie is looked at, else 1. The
 * class token, which is nowhere, would spoil every score if it counted. */
static void demo_invent_codes(demo_set *set, int noisy)
{
    for (size_t i = 0; i < set->pictures; i++)
        for (int t = 0; t < DEMO_TOKENS; t++)
            for (int j = 0; j < DEMO_LATENTS; j++) {
                int v = (int)(random64() % DEMO_VALUES), red = t > 0 && demo_cover(set->record[i], 11, t - 1);
                float value = random64() % 200 ? 0 : (float)(random64() % 4) / 4;
                if (t > 0 && j > 1 && demo_cover(set->record[i], v, t - 1) && v % DEMO_LATENTS == j) value += 0.25f;
                if (j == 1) value = red ? 2 : 0;
                if (j == 2) value = i < set->pictures / 2 && noisy && random64() % 2 ? 0.5f : 0;
                if (j == 2 && t > 0 && demo_cover(set->record[i], 6, t - 1)) value = i < set->pictures / 2 ? 1 : 0.5f;
                set->f[i][t][j] = t == 0 ? 9 : value;
            }
}

static int demo_write_codes(sc_writer *w, void *context)
{
    const demo_set *set = context;
    static const char *const names[] = { "row", "index", "value" };
    static const sc_dtype kinds[] = { SC_I64, SC_I32, SC_F32 };
    float mean[DEMO_LATENTS] = { 0 };
    for (int n = 0; n < 3; n++) {
        SC_TRY(sc_writer_tensor(w, names[n], kinds[n], 1, (size_t[]){ SC_ROWS }));
        for (size_t row = 0; row < set->pictures * DEMO_TOKENS; row++)
            for (int64_t j = 0; j < DEMO_LATENTS; j++) {
                int64_t wide = (int64_t)row;
                int32_t narrow = (int32_t)j;
                const float *value = &set->f[row / DEMO_TOKENS][row % DEMO_TOKENS][j];
                const void *const numbers[] = { &wide, &narrow, value };
                if (*value > 0) SC_TRY(sc_writer_values(w, numbers[n], 1, kinds[n]));
            }
    }
    SC_TRY(sc_writer_tensor(w, "image_means", SC_F32, 2, (size_t[]){ set->pictures, DEMO_LATENTS }));
    for (size_t i = 0; i < set->pictures; i++) SC_TRY(sc_writer_floats(w, mean, DEMO_LATENTS));
    return SC_OK;
}

static void demo_sum_up(demo_set *set)
{
    for (size_t i = 0; i < set->pictures; i++)
        for (int p = 0; p < DEMO_PATCHES; p++) {
            for (int j = 0; j < DEMO_LATENTS; j++)
                set->strongest[i][j] = fmax(set->strongest[i][j], (double)set->f[i][p + 1][j]);
            for (int v = 0; v < DEMO_VALUES; v++) set->has[i][v] |= demo_cover(set->record[i], v, p) > 0;
        }
}

/* Area under the ROC curve: over all pairs, of which one picture holds the value. */
static double demo_area(const demo_set *set, int v, int j)
{
    double right = 0, pairs = 0;
    for (size_t a = 0; a < set->pictures; a++)
        for (size_t b = 0; b < set->pictures; b++) {
            if (!set->has[a][v] || set->has[b][v]) continue;
            double here = set->strongest[a][j], there = set->strongest[b][j];
            right += here > there ? 1 : here == there ? 0.5 : 0;
            pairs++;
        }
    return pairs > 0 ? right / pairs : 0.5;
}

/* Pixels of patches where the latent reaches the threshold against pixels of the value. */
static double demo_overlap(const demo_set *set, int v, int j, double threshold)
{
    double both = 0, either = 0;
    for (size_t i = 0; i < set->pictures; i++)
        for (int p = 0; p < DEMO_PATCHES; p++) {
            int lit = set->f[i][p + 1][j] > 0 && (double)set->f[i][p + 1][j] >= threshold;
            int cover = demo_cover(set->record[i], v, p);
            both += lit ? cover : 0;
            either += lit ? 64 : cover;
        }
    return both / either;
}

static void demo_score(const char *output)
{
    for (int v = 0; v < DEMO_VALUES; v++) {
        int best = 0;
        double threshold = 0, most = 0, latent, area, unseen, overlap;
        char name[32];
        for (int j = 1; j < DEMO_LATENTS; j++)
            if (demo_area(&demo_seen, v, j) > demo_area(&demo_seen, v, best)) best = j;
        for (int step = 8; step > 0; step--) {       /* all values are quarters */
            double now = demo_overlap(&demo_seen, v, best, step / 4.0);
            if (now > most) threshold = step / 4.0;
            if (now > most) most = now;
        }
        snprintf(name, sizeof name, " %s ", demo_values[v]);
        const char *row = strstr(output, name);
        if (!check(row && sscanf(row + strlen(name), "%lf %lf %lf %lf", &latent, &area, &unseen, &overlap) == 4,
                   "score says nothing of %s: %s", demo_values[v], output)) continue;
        check((int)latent == best && fabs(area - demo_area(&demo_seen, v, best)) <= 0.000501
              && fabs(unseen - demo_area(&demo_unseen, v, best)) <= 0.000501
              && fabs(overlap - demo_overlap(&demo_unseen, v, best, threshold)) <= 0.000501,
              "%s: score gives latent %g, areas %g and %g, overlap %g; expected %d, %g, %g, %g", demo_values[v],
              latent, area, unseen, overlap, best, demo_area(&demo_seen, v, best),
              demo_area(&demo_unseen, v, best), demo_overlap(&demo_unseen, v, best, threshold));
        if (v == 6) check(best == 2 && threshold == 1, "the test of thresholds tests nothing");
        if (v == 11) check(best == 1 && area == 1 && unseen == 1, "red's own latent is not found");
    }
}

/* FNV-1a, 64 bits. */
static uint64_t demo_checksum(const char *bytes, size_t count)
{
    uint64_t sum = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++) sum = (sum ^ (unsigned char)bytes[i]) * 0x100000001b3u;
    return sum;
}

/* Every machine draws the same pictures, from any number on. */
static void demo_pictures(void)
{
    run("stream --count 200");
    check(ran.status == 0 && ran.out_count == (size_t)200 * DEMO_RECORD, "synth stream ends with status %d, %zu bytes",
          ran.status, ran.out_count);
    uint64_t sum = demo_checksum(ran.out, ran.out_count);
    check(sum == 0x95d6e00659228800, "synth draws other pictures than elsewhere: checksum 0x%016llx",
          (unsigned long long)sum);
    char *last = malloc(DEMO_RECORD);
    if (!last) need("memory");
    memcpy(last, ran.out + (size_t)199 * DEMO_RECORD, DEMO_RECORD);
    run("stream --first 199 --count 1");
    check(ran.out_count == DEMO_RECORD && memcmp(ran.out, last, DEMO_RECORD) == 0, "picture 199 alone is another one");
    free(last);
}

static void demo_scores(void)
{
    size_t count;
    test_random_state = 5;
    run("stream --seed 3 --count %d", DEMO_ALL);
    if (!check(ran.out_count == (size_t)DEMO_ALL * DEMO_RECORD, "synth stream gives %zu bytes", ran.out_count)) return;
    put_file(in_folder("records"), ran.out, ran.out_count);
    const unsigned char *records = (const unsigned char *)get_file(in_folder("records"), &count);
    demo_sort(&demo_seen, records, DEMO_SEEN);
    demo_sort(&demo_unseen, records + (size_t)DEMO_SEEN * DEMO_RECORD, DEMO_ALL - DEMO_SEEN);
    demo_invent_codes(&demo_seen, 1);
    demo_invent_codes(&demo_unseen, 0);
    demo_sum_up(&demo_seen);
    demo_sum_up(&demo_unseen);
    if (!check(save_tensors(in_folder("seen"), demo_write_codes, &demo_seen) == SC_OK
               && save_tensors(in_folder("unseen"), demo_write_codes, &demo_unseen) == SC_OK,
               "codes cannot be written")) return;
    run("score --seed 3 --codes %s --unseen %s", in_folder("seen"), in_folder("unseen"));
    if (check(ran.status == 0, "synth score: %s", ran.err)) demo_score(ran.out);
    run("score --seed 3 --codes %s --unseen " GOLDEN "images.safetensors", in_folder("seen"));
    check(ran.status == 1 && strstr(ran.err, "not what"), "synth score takes what are no codes: %s", ran.err);
    run("score --seed 3 --codes %s", in_folder("seen"));
    check(ran.status == 2 && strstr(ran.err, "usage"), "synth score does not miss --unseen");
}

/* Colour and shape of one object on pictures that no training saw (its worlds are of other seeds). */
static void demo_model(void)
{
    int images = 0, top1 = 0;
    other_program = demo_synth();
    run("draw -o %s --seed 7 --count 200 --objects 1", in_folder("world"));
    check(ran.status == 0, "synth draw: %s", ran.err);
    other_program = NULL;
    works("zeroshot --quiet -m weights/demo.safetensors %s --format json", in_folder("world/pictures"));
    check(sscanf(ran.out, "{\"images\": %d, \"top1\": %d", &images, &top1) == 2 && images == 200 && top1 >= 180,
          "the demo model names %d of %d", top1, images);
}

/* A part of the classes, and one that the prompts do not name. zeroshot's error has names as they are. */
static void demo_some_classes(void)
{
    int images = 0, all = 0, some = 0, top1 = 0;
    char from[600], to[600];
    if (mkdir(in_folder("some"), 0777) != 0) need("a folder");
    works("zeroshot --quiet -m weights/demo.safetensors %s --format json", in_folder("world/pictures"));
    sscanf(ran.out, "{\"images\": %d, \"top1\": %d", &all, &top1);
    for (int c = 0; c < 2; c++) {
        snprintf(from, sizeof from, "%s", in_folder("world/pictures/%s", c ? "red disc" : "yellow star"));
        snprintf(to, sizeof to, "%s", in_folder("some/%s", c ? "red disc" : "yellow star"));
        if (!check(rename(from, to) == 0, "%s cannot become %s", from, to)) return;
    }
    works("zeroshot --quiet -m weights/demo.safetensors %s --format json", in_folder("some"));
    sscanf(ran.out, "{\"images\": %d, \"top1\": %d", &some, &top1);
    check(some > 3 && top1 * 10 >= some * 9, "of two classes alone the demo model names %d of %d", top1, some);
    works("pack --quiet %s -o %s", in_folder("some"), in_folder("some.safetensors"));
    int packed = 0, again = 0;
    works("zeroshot --quiet -m weights/demo.safetensors %s --format json", in_folder("some.safetensors"));
    sscanf(ran.out, "{\"images\": %d, \"top1\": %d", &packed, &again);
    check(packed == some && again * 10 >= some * 9, "the same, packed: %d of %d", again, packed);
    works("zeroshot --quiet -m weights/demo.safetensors %s --format json", in_folder("world/pictures"));
    sscanf(ran.out, "{\"images\": %d, \"top1\": %d", &images, &top1);
    check(images + some == all && top1 * 10 >= images * 9, "of 46 classes the demo model names %d of %d", top1,
          images);
    snprintf(from, sizeof from, "%s", in_folder("some/red disc"));
    snprintf(to, sizeof to, "%s", in_folder("some/pink disc"));
    check(rename(from, to) == 0, "%s cannot become %s", from, to);
    refuses(1, "not in one of the model's 48 classes",
            "zeroshot --quiet -m weights/demo.safetensors %s", in_folder("some"));
    check(rename(to, in_folder("unlabelled")) == 0, "%s cannot become unlabelled", to);
    refuses(1, "not in one of the model's 48 classes", "zeroshot --quiet -m weights/demo.safetensors %s", in_folder("unlabelled"));
}

static void test_demo(void)
{
    if (!exists(demo_synth())) {
        skip("the demo: %s is not there (make tests/synth)", demo_synth());
        return;
    }
    other_program = demo_synth();
    demo_pictures();
    demo_scores();
    other_program = NULL;
    demo_model();
    demo_some_classes();
}
