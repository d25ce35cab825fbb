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
    works(STATS_OF("encode", "exact") "--dense --reconstruction --mean -o %s", in_folder("codes_exact"));
    works(STATS_OF("encode", "small") "--dense --reconstruction --mean -o %s", in_folder("codes_small"));
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
    static const char *const stats_formats[] = { "text", "markdown", "json" };
    for (size_t i = 0; i < 3; i++) {
        works(STATS_OF("eval", "exact") "--format %s", stats_formats[i]);
        check(strstr(ran.out, "0.0838"), "eval --format %s does not tell the mse:\n%s", stats_formats[i], ran.out);
    }
}

static void test_stats(void)
{
    stats_golden();
    stats_histogram();
    stats_encode();
    stats_eval();
}
