/* Tests of codes, statistics and eval against PyTorch in float64 (tests/golden/make_golden.py). "exact" has
 * activations on a coarse grid, with many ties; "small" is a TopK SAE on any floats, without labels. */

#define STATS_OF(command, which) command " --quiet -s " GOLDEN "stats_" which "_sae.safetensors --acts "  \
                                 GOLDEN "stats_" which "_acts.safetensors "

static const char *const stats_tensors[] = {
    "image_count", "sae_sparsity", "sae_mean_acts", "token_count", "activation_sum",
    "max_activating_image_values", "max_activating_image_indices", "max_activating_image_label_indices",
    "top_entropy", "max_activating_patch_values", "max_activating_patch_indices",
};

static int stats_whole(const char *name) { return strstr(name, "count") || strstr(name, "indices"); }

static void stats_golden(void)
{
    works(STATS_OF("stats", "exact") "-o %s", in_folder("exact"));
    works(STATS_OF("stats", "small") "-o %s", in_folder("small"));
    works(STATS_OF("stats", "exact") "--class-counts -o %s", in_folder("exact_classes"));
    works(STATS_OF("stats", "exact") "--class-counts --threshold 0.2 -o %s", in_folder("exact_above"));
    works(STATS_OF("stats", "exact") "--top 4 --top-patches 3 -o %s", in_folder("exact_top4"));
    for (size_t i = 0; i < sizeof stats_tensors / sizeof *stats_tensors; i++) {
        const char *name = stats_tensors[i];
        double tolerance = stats_whole(name) ? 0 : 2e-6;
        check_tensor(in_folder("exact"), name, GOLDEN "stats_exact.safetensors", name, tolerance);
        check_tensor(in_folder("exact_classes"), name, GOLDEN "stats_exact.safetensors", name, tolerance);
        check_tensor(in_folder("small"), name, GOLDEN "stats_small.safetensors", name, tolerance);
        if (strncmp(name, "max", 3) == 0 || strncmp(name, "top", 3) == 0)
            check_tensor(in_folder("exact_top4"), name, GOLDEN "stats_exact_top4.safetensors", name, tolerance);
    }
    check_tensor(in_folder("exact_classes"), "class_counts", GOLDEN "stats_exact.safetensors", "class_counts", 0);
    check_tensor(in_folder("exact_above"), "class_counts", GOLDEN "stats_exact.safetensors",
                 "class_counts_threshold", 0);
}

/* The histogram counts what is active, in the bins that its metadata describe: at least their sum. */
static void stats_histogram(void)
{
    size_t count, n;
    double sum = 0, active = 0;
    const double *bin = numbers_of(in_folder("exact"), "activation_histogram", &count);
    for (size_t i = 0; bin && i < count; i++) sum += bin[i];
    const double *tokens = numbers_of(GOLDEN "stats_exact.safetensors", "token_count", &n);
    for (size_t j = 0; tokens && j < n; j++) active += tokens[j];
    check(count == 256 && sum == active, "the histogram holds %g of %g active values", sum, active);
}

static void stats_codes(const char *which, const char *codes, const char *golden)
{
    size_t count, n_count, values, rows, indices;
    check_tensor(codes, "f", golden, "f", 2e-6);
    check_tensor(codes, "reconstruction", golden, "reconstruction", 2e-6);
    check_tensor(codes, "image_means", golden, "image_means", 2e-6);
    const double *f = numbers_of(codes, "f", &count), *n = numbers_of(golden, "image_means", &n_count);
    const double *row = numbers_of(codes, "row", &rows), *index = numbers_of(codes, "index", &indices);
    const double *value = numbers_of(codes, "value", &values);
    if (!f || !n || !row || !index || !value) return;
    size_t next = 0, wrong = 0;
    for (size_t i = 0; i < count; i++) {
        if (!(f[i] > 0)) continue;
        if (next < values && next < rows && next < indices)
            wrong += row[next] * 40 + index[next] != (double)i || value[next] != f[i];
        next++;
    }
    check(wrong == 0 && next == values && rows == values && indices == values,
          "%s: lists of %zu codes are not f's %zu active entries in order (%zu differ)", which, values, next, wrong);
}

static void stats_encode(void)
{
    works(STATS_OF("encode", "exact") "--dense --reconstruction --image-means -o %s", in_folder("codes_exact"));
    works(STATS_OF("encode", "small") "--dense --reconstruction --image-means -o %s", in_folder("codes_small"));
    stats_codes("exact", in_folder("codes_exact"), GOLDEN "stats_exact_codes.safetensors");
    stats_codes("small", in_folder("codes_small"), GOLDEN "stats_small_codes.safetensors");
}

static void stats_eval(void)
{
    static const char *const columns[] = {
        "mse", "mse_raw", "explained_variance", "explained_variance_uncentred", "l0", "l0_fraction", "l1",
        "mean_activation", "mean_sae_mean_acts", "entropy_mean", "entropy_sum", "entropy_latents", "dead",
        "every_image", "one_image", "two_images",
    };
    const char *golden = get_file(GOLDEN "eval.csv", NULL);
    for (size_t row = 0; row < 2; row++) {
        if (row == 0) works(STATS_OF("eval", "exact") "--format csv");
        else works(STATS_OF("eval", "small") "--format csv");
        for (size_t c = 0; c < sizeof columns / sizeof *columns; c++) {
            double got = csv_number(ran.out, 0, columns[c]), expected = csv_number(golden, row, columns[c]);
            check(fabs(got - expected) <= 1e-5 * fabs(expected), "eval's %s of case %zu is %.9g, expected %.9g",
                  columns[c], row, got, expected);
        }
    }
    /* A row an SAE and data set, in one pass, each as if alone. */
    works("eval --quiet -s " GOLDEN "stats_exact_sae.safetensors -s " GOLDEN "stats_small_sae.safetensors "
          "--acts " GOLDEN "stats_exact_acts.safetensors --also " GOLDEN "stats_small_acts.safetensors "
          "--format csv");
    size_t rows = 0;
    for (const char *c = ran.out; *c; c++) rows += *c == '\n';
    check(rows == 5, "two SAEs on two data sets have %zu rows with the header, expected 5:\n%s", rows, ran.out);
    size_t found = 0;
    for (size_t row = 0; row < 4; row++)
        for (size_t g = 0; g < 2; g++)
            found += fabs(csv_number(ran.out, row, "mse") - csv_number(golden, g, "mse")) < 1e-6;
    check(found == 2, "of two SAEs on two data sets %zu rows are those of the golden file, expected 2", found);
    static const char *const stats_formats[] = { "text", "csv", "json" };
    for (size_t i = 0; i < 3; i++) {
        works(STATS_OF("eval", "exact") "--format %s", stats_formats[i]);
        check(strstr(ran.out, "0.0838"), "eval --format %s does not tell the mse:\n%s", stats_formats[i], ran.out);
    }
}

/* --- Shards --- */

/* The names of the shards' files, in an order that is not theirs. */
static const char *stats_shards(size_t shards, const char *prefix)
{
    static char line[4000];
    size_t used = 0;
    for (size_t i = 0; i < shards; i++)                      /* 5 shares no factor with 1, 2, 3, 7, 31 */
        used += (size_t)sprintf(line + used, "%s ", in_folder("%s%zu_%zu", prefix, i * 5 % shards + 1, shards));
    return line;
}

/* One run over all in `whole`, then in 1, 2, 3, 7 and 31 shards: merged in another order they must give
 * the same bytes, with any number of threads. Some of 31 shards have no image. */
static void stats_merged(const char *command)
{
    static const size_t counts[] = { 1, 2, 3, 7, 31 };
    works("%s -o %s", command, in_folder("whole"));
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
        for (size_t i = 1; i <= counts[c]; i++)
            works("%s --threads %zu --shard %zu/%zu -o %s", command, i % 3 + 1, i, counts[c],
                  in_folder("part%zu_%zu", i, counts[c]));
        works("merge %s -o %s", stats_shards(counts[c], "part"), in_folder("merged"));
        check(same_files(in_folder("merged"), in_folder("whole")), "%s: %zu shards merged are not the whole",
              command, counts[c]);
    }
    check(same_files(in_folder("part1_1"), in_folder("whole")), "%s: shard 1 of 1 is not the whole", command);
}

static double stats_sum(const char *path, const char *name)
{
    size_t count;
    double sum = 0;
    const double *value = numbers_of(path, name, &count);
    for (size_t i = 0; value && i < count; i++) sum += value[i];
    return sum;
}

/* A shard by itself counts its images alone: those of shard 2 of 3 of 30 images are 10 to 19. */
static void stats_shard_alone(void)
{
    size_t count, outside = 0;
    double parts = 0;
    works(STATS_OF("stats", "exact") "-o %s", in_folder("whole"));
    for (size_t i = 1; i <= 3; i++) {
        works(STATS_OF("stats", "exact") "--shard %zu/3 -o %s", i, in_folder("shard%zu", i));
        parts += stats_sum(in_folder("shard%zu", i), "image_count");
    }
    check(parts == stats_sum(in_folder("whole"), "image_count"), "shards count %g images", parts);
    const double *image = numbers_of(in_folder("shard2"), "max_activating_image_indices", &count);
    sc_safetensors file;
    if (!image || sc_safetensors_open(&file, in_folder("shard2")) != SC_OK) return;
    unsigned all = 0, mine = (unsigned)strtoul(sc_metadata_find(&file, "images"), NULL, 10);
    check(strcmp(sc_metadata_find(&file, "shard"), "2/3") == 0, "a shard does not name itself");
    sc_safetensors_close(&file);
    if (sc_safetensors_open(&file, GOLDEN "stats_exact_acts.safetensors") != SC_OK) return;
    all = (unsigned)sc_tensor_find(&file, "activations")->shape[0];
    sc_safetensors_close(&file);
    unsigned first = (all + 2) / 3, end = (2 * all + 2) / 3;
    for (size_t i = 0; i < count; i++) outside += image[i] >= 0 && (image[i] < first || image[i] >= end);
    check(mine == end - first && outside == 0, "shard 2 of 3 has %u images, %zu entries are not its own", mine,
          outside);
}

/* What does not belong together. */
static void stats_merge_refuses(void)
{
    static const struct { const char *options, *text; } others[] = {
        { "--limit 8", "in its data set" }, { "--arch topk --k 3", "in its SAE" },
        { "--class-counts", "--class-counts or --threshold" }, { "--top 5", "in its --top" },
        { "--top-patches 5", "in its --top" } };
    char out[400], one[400];
    snprintf(out, sizeof out, "%s", in_folder("refused"));
    snprintf(one, sizeof one, "%s", in_folder("one"));
    works(STATS_OF("stats", "exact") "--shard 1/2 -o %s", one);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        works(STATS_OF("stats", "exact") "--shard 2/2 %s -o %s", others[i].options, in_folder("two"));
        refuses(1, others[i].text, "merge %s %s -o %s", one, in_folder("two"), out);
        refuses(1, others[i].text, "merge %s %s -o %s", in_folder("two"), one, out);
    }
    works(STATS_OF("stats", "exact") "--class-counts --threshold 0.2 --shard 1/2 -o %s", in_folder("a"));
    works(STATS_OF("stats", "exact") "--class-counts --threshold 0.3 --shard 2/2 -o %s", in_folder("b"));
    works(STATS_OF("stats", "exact") "--class-counts --shard 2/2 -o %s", in_folder("c"));
    refuses(1, "--class-counts or --threshold", "merge %s %s -o %s", in_folder("a"), in_folder("b"), out);
    refuses(1, "--class-counts or --threshold", "merge %s %s -o %s", in_folder("a"), in_folder("c"), out);
    refuses(1, "one of 2 shards (expected all of them)", "merge %s -o %s", one, out);
    refuses(1, "shard 1 of 2 is given twice", "merge %s %s -o %s", one, one, out);
    works(STATS_OF("stats", "exact") "-o %s", in_folder("whole"));
    refuses(1, "shard 1 of 1 is given twice", "merge %s %s -o %s", in_folder("whole"), in_folder("whole"), out);
    refuses(1, "in its number of shards", "merge %s %s -o %s", one, in_folder("whole"), out);
    refuses(1, "not statistics", "merge " GOLDEN "acts.safetensors -o %s", out);
    /* A value that is not finite is named where it comes from. */
    sc_safetensors file;
    size_t count;
    if (sc_safetensors_open(&file, one) != SC_OK) need("%s", sc_error());
    size_t place = (size_t)(sc_tensor_find(&file, "sae_mean_acts")->data - file.map) + 4;
    sc_safetensors_close(&file);
    char *bytes = get_file(one, &count);
    memcpy(bytes + place, (unsigned char[]){ 0, 0, 0x80, 0x7f }, 4);
    put_file(in_folder("infinite"), bytes, count);
    refuses(1, "infinite: tensor 'sae_mean_acts', element 1 is inf", "merge %s -o %s", in_folder("infinite"), out);
    /* Lists that are no matrices: K = 0, and nowhere to put their values. */
    static const char *const flat[] = { "max_activating_image_values", "max_activating_patch_values", "sae_sparsity",
                                        "sae_mean_acts", "top_entropy" };
    const float value = 0;
    sc_writer w;
    int status = sc_writer_open(&w, in_folder("flat"));
    for (size_t i = 0; i < sizeof flat / sizeof *flat && status == SC_OK; i++) {
        status = sc_writer_tensor(&w, flat[i], SC_F32, 1, (size_t[]){ 1 });
        if (status == SC_OK) status = sc_writer_floats(&w, &value, 1);
    }
    check(status == SC_OK && sc_writer_close(&w, SC_OK) == SC_OK, "%s", sc_error());
    refuses(1, "not statistics", "merge %s -o %s", in_folder("flat"), out);
    refuses(1, "cannot be opened", "merge %s %s -o %s", one, in_folder("nowhere"), out);
    static const char *const wrong[] = { "0/2", "3/2", "1", "1/0", "1/2x", "1/1025", "-1/2", "a/b", "99999/99999" };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        refuses(2, "expected I/N", STATS_OF("stats", "exact") "--shard %s -o %s", wrong[i], out);
    check(!exists(out), "a merge that was refused wrote");
}

/* The same entry put in first or last. */
static void stats_ties(void)
{
    static const sc_top sorted[] = { { 2, 5, 1 }, { 1, 3, 7 }, { 1, 4, 2 }, { 1, 4, 3 } };
    for (size_t order = 0; order < 24; order++) {
        sc_top list[3] = { nothing, nothing, nothing };
        size_t left[] = { 0, 1, 2, 3 }, number = order;
        for (size_t n = 4; n > 0; number /= n--) {
            size_t taken = number % n;
            keep_largest(list, 3, sorted[left[taken]]);
            memmove(left + taken, left + taken + 1, (n - taken - 1) * sizeof *left);
        }
        for (size_t i = 0; i < 3; i++)
            check(list[i].value == sorted[i].value && list[i].image == sorted[i].image
                  && list[i].other == sorted[i].other, "order %zu leaves entry %zu in another place", order, i);
    }
}

/* --- Inputs made here: every latent is one of the inputs --- */

/* Activations of N images with T tokens of width 2. x: [N, T, 2]; label: [N], or NULL for none */
static void stats_make_acts(const char *path, const float *x, size_t N, size_t T, const int64_t *label)
{
    sc_writer w;
    int status = sc_writer_open(&w, path);
    if (status == SC_OK) status = sc_writer_tensor(&w, "activations", SC_F32, 3, (size_t[]){ N, T, 2 });
    if (status == SC_OK) status = sc_writer_floats(&w, x, N * T * 2);
    if (status == SC_OK && label) status = sc_writer_tensor(&w, "labels", SC_I64, 1, &N);
    if (status == SC_OK && label) status = sc_writer_integers(&w, label, N);
    if (status == SC_OK) status = sc_writer_close(&w, SC_OK);
    if (status != SC_OK) need("%s: %s", path, sc_error());
}

/* f = relu(x) */
static void stats_make_sae(const char *path)
{
    static const float one[] = { 1, 0, 0, 1 }, zero[2] = { 0 };
    static const char *const names[] = { "W_enc", "W_dec", "b_enc", "b_dec" };
    sc_writer w;
    int status = sc_writer_open(&w, path);
    for (int i = 0; i < 4 && status == SC_OK; i++) {
        status = sc_writer_tensor(&w, names[i], SC_F32, i < 2 ? 2 : 1, (size_t[]){ 2, 2 });
        if (status == SC_OK) status = i < 2 ? sc_writer_floats(&w, one, 4) : sc_writer_floats(&w, zero, 2);
    }
    if (status == SC_OK) status = sc_writer_close(&w, SC_OK);
    if (status != SC_OK) need("%s: %s", path, sc_error());
}

/* top_entropy where image 11 of 12 has no label. Latent 0 has 12 to 1 on images 0 to 11, latent 1 the reverse;
 * labels alternate. Latent 0's top 10 all have labels: shares (12 + 10 + 8 + 6 + 4) / 75 and 35 / 75, entropy
 * 0.6909233. Latent 1's begin with the image that has none; so do latent 0's top 12 end. */
static void stats_labels(void)
{
    enum { N = 12 };
    float x[2 * N];
    int64_t label[N];
    size_t count;
    const char *sae = in_folder("unit_sae"), *acts = in_folder("labels_acts"), *out = in_folder("labels_stats");
    for (int i = 0; i < N; i++) {
        x[2 * i] = (float)(N - i);
        x[2 * i + 1] = (float)(i + 1);
        label[i] = i % 2;
    }
    label[N - 1] = -1;
    stats_make_sae(sae);
    stats_make_acts(acts, x, N, 1, label);
    works("stats --quiet -s %s --acts %s --top 10 --class-counts -o %s", sae, acts, out);
    const double *entropy = numbers_of(out, "top_entropy", &count);
    check(entropy && count == 2 && fabs(entropy[0] - 0.6909233) < 1e-6, "the entropy of labelled images is %g",
          entropy ? entropy[0] : 0);
    check(entropy && entropy[1] == -1, "with an image without a label the entropy is %g", entropy ? entropy[1] : 0);
    const double *classes = numbers_of(out, "class_counts", &count);
    check(classes && count == 4 && classes[0] == 6 && classes[2] == 5, "the image without a label is of a class");
    works("eval --quiet -s %s --acts %s --format csv", sae, acts);
    check(csv_number(ran.out, 0, "entropy_mean") == -1 && csv_number(ran.out, 0, "entropy_latents") == 0,
          "top 16 with an image without a label have an entropy: %s", ran.out);
    for (size_t K = 10; K <= N; K += 2) {                    /* Part I says the same */
        sc_top top[N], patch[1];
        sc_latent latent[2];
        for (size_t j = 0; j < 2; j++) sc_latent_measure_plain(&latent[j], top, K, patch, 1, x, label, N, 1, 2, j, 1);
        check((fabsf(latent[0].top_entropy - 0.6909233f) < 1e-6f) == (K == 10) && latent[1].top_entropy == -1,
              "by the definition, entropies of the top %zu are %g and %g", K, (double)latent[0].top_entropy,
              (double)latent[1].top_entropy);
    }
    stats_make_acts(acts, x, N, 1, NULL);
    works("stats --quiet -s %s --acts %s --top 10 -o %s", sae, acts, out);
    entropy = numbers_of(out, "top_entropy", &count);
    check(entropy && entropy[0] == -1 && entropy[1] == -1, "without labels there is an entropy");
}

/* PyTorch compares float32 activations with a threshold of 0.2 as float32: 0.2f, which is above 0.2, is not above
 * it, the next float is. Two images of two tokens; classes 0 and 1. */
static void stats_threshold(void)
{
    const float at = 0.2f, above = nextafterf(at, 1), below = nextafterf(at, 0);
    const float x[] = { at, above, below, at, above, 1, at, below };
    const int64_t label[] = { 0, 1 };
    size_t count;
    const char *sae = in_folder("unit_sae"), *acts = in_folder("threshold_acts"), *out = in_folder("threshold_stats");
    stats_make_sae(sae);
    stats_make_acts(acts, x, 2, 2, label);
    works("stats --quiet -s %s --acts %s --class-counts --threshold 0.2 -o %s", sae, acts, out);
    const double *counts = numbers_of(out, "class_counts", &count);
    check(counts && count == 4 && counts[0] == 0 && counts[1] == 1 && counts[2] == 1 && counts[3] == 1,
          "tokens above 0.2 are %g %g, %g %g", counts[0], counts[1], counts[2], counts[3]);
}

/* Exact sums end at 2^-64: a latent whose means are below fires and has mean 0. */
static void stats_lost(void)
{
    const float small[] = { 1e-25f, 1, 1e-25f, 1 }, large[] = { 1e-19f, 1, 1e-19f, 1 };
    size_t count;
    const char *sae = in_folder("unit_sae"), *acts = in_folder("lost_acts"), *out = in_folder("lost_stats");
    stats_make_sae(sae);
    stats_make_acts(acts, large, 2, 1, NULL);
    works("stats -s %s --acts %s -o %s", sae, acts, out);
    const double *mean = numbers_of(out, "sae_mean_acts", &count);
    check(mean && fabs(mean[0] - 1e-19) < 1e-19, "a mean of 1e-19 is %g", mean ? mean[0] : 0);
    stats_make_acts(acts, small, 2, 1, NULL);
    works("stats -s %s --acts %s -o %s", sae, acts, out);
    mean = numbers_of(out, "sae_mean_acts", &count);
    const double *images = numbers_of(out, "image_count", &count);
    check(mean && images && mean[0] == 0 && images[0] == 2, "a lost mean is not 0");
}

static void test_stats(void)
{
    stats_golden();
    stats_histogram();
    stats_encode();
    stats_eval();
    stats_merged(STATS_OF("stats", "exact"));
    stats_merged(STATS_OF("stats", "exact") "--class-counts --top 4 --top-patches 3");
    stats_merged(STATS_OF("stats", "exact") "--class-counts --threshold 0.2 --limit 11");
    stats_merged(STATS_OF("stats", "small"));
    stats_shard_alone();
    stats_merge_refuses();
    stats_ties();
    stats_labels();
    stats_threshold();
    stats_lost();
}
