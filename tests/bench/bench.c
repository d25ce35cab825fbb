/* How fast saeclip works on this machine, at the sizes of ViT-B/16 (batches of 8 images, blocks of
 * width 768) and of an SAE with 49,152 latents, on random numbers. `make bench` runs it and then
 * compare.py, which sets the same figures beside those of other programs.
 *
 *     build/bench [--json] [--threads N] [LINE ...]      without a LINE: all of them
 *
 * Each line is measured with one thread, then with all. A figure that does not apply is left out:
 *   ms          time per image, or per run where there are no images: the median of three
 *   GFLOP/s     floating-point operations per second; a multiply-add counts as two
 *   % of peak   share of the GFLOP/s that multiply-adds in registers reach, the line "peak"
 *   MB moved    bytes that must come from memory or go there
 *   speedup     time with one thread over time with all
 *   of vit-8    time over that of the vision transformer alone, the line "vit-8"
 *   MB taken    the most memory that the process has had so far: name one line to know its own
 *
 * One translation unit with the program, so that it can measure parts that are static there. */
#define SAECLIP_NO_MAIN
#include "../../saeclip.c"

#include <sys/resource.h>

enum {
    D = 768, HEADS_OF_VIT = 12, HIDDEN_OF_VIT = 3072, BLOCKS = 12, SIDE = 224,
    T = 197,                         /* tokens per image: the class token and 14 x 14 patches */
    LATENTS_OF_SAE = 49152,
    PRODUCT_ROWS = 8 * T,            /* tokens of a batch of 8 images */
    STEP_TOKENS = 12 * T,            /* tokens of a training step */
    PEAK_TASKS = 2048, PEAK_ROUNDS = 5000,
    READ_TASKS = 512, READ_FLOATS = 1 << 18
};

/* --- The machine's peak: as many chains of multiply-adds as a tile has, all in registers. Each
 * round adds a link to each chain. The result is returned so that the compiler keeps the work;
 * a factor below 1 keeps it finite. --- */

#define DEFINE_PEAK(isa, target, vector, lanes, chains, set, fma, add, store)                      \
    target static float peak_##isa(size_t rounds, float factor) {                                  \
        vector chain[chains], f = set(factor), one = set(1.0f);                                    \
        float lane[lanes];                                                                         \
        SC_UNROLL for (int i = 0; i < chains; i++) {                                               \
            chain[i] = set((float)i);                                                              \
        }                                                                                          \
        for (size_t round = 0; round < rounds; round++) {                                          \
            SC_UNROLL for (int i = 0; i < chains; i++) {                                           \
                chain[i] = fma(chain[i], f, one);                                                  \
            }                                                                                      \
        }                                                                                          \
        SC_UNROLL for (int i = 1; i < chains; i++) {                                               \
            chain[0] = add(chain[0], chain[i]);                                                    \
        }                                                                                          \
        store(lane, chain[0]);                                                                     \
        return lane[0];                                                                            \
    }

#define SET_ONE(x) (x)
#define ADD_ONE(a, b) ((a) + (b))
#define STORE_ONE(p, v) (*(p) = (v))
DEFINE_PEAK(scalar, , float, 1, 16, SET_ONE, fma32, ADD_ONE, STORE_ONE)
#if defined(__x86_64__) && defined(__GNUC__)
DEFINE_PEAK(avx2, __attribute__((target("avx2,fma"))), __m256, 8, 12, _mm256_set1_ps,
            _mm256_fmadd_ps, _mm256_add_ps, _mm256_storeu_ps)
DEFINE_PEAK(avx512, __attribute__((target("avx512f,fma"))), __m512, 16, 28, _mm512_set1_ps,
            _mm512_fmadd_ps, _mm512_add_ps, _mm512_storeu_ps)
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define FMA_NEON(a, b, c) vfmaq_f32(c, a, b)
DEFINE_PEAK(neon, , float32x4_t, 4, 24, vdupq_n_f32, FMA_NEON, vaddq_f32, vst1q_f32)
#endif

typedef float peak_function(size_t rounds, float factor);

static peak_function *peak_of(const kernel_set *set) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (set == &kernels_avx512) return peak_avx512;
    if (set == &kernels_avx2) return peak_avx2;
#elif defined(__aarch64__) && defined(__ARM_NEON)
    if (set == &kernels_neon) return peak_neon;
#endif
    return set == &kernels_scalar ? peak_scalar : NULL;
}

/* --- The lines --- */

typedef struct line {
    const char *name, *what;
    int (*prepare)(void);
    int (*run)(void);
    size_t images;                   /* of a batch, 0: the time is per run */
    size_t blocks;                   /* of the vision transformer */
    size_t inputs, outputs;          /* of a product */
    size_t k;                        /* TopK's k, 0: ReLU */
    double shift;                    /* b_enc = -shift deviations of h: how many latents fire */
} line;

/* What the line at hand works on. */
static struct {
    const line *line;
    const kernel_set *set;           /* whose peak is measured */
    double flops, bytes;             /* of a run */
    float *input;                    /* [rows, inputs] */
    float *bias;                     /* [outputs] */
    float *output;                   /* [rows, outputs] */
    packed_matrix matrix;            /* [inputs, outputs] */
    feed data;                       /* images, the model, its hook point */
    sc_sae sae;
    sc_trainer *trainer;             /* of the lines that train */
    sae_batch batch;                 /* of those that only encode */
    statistics stats;
    size_t image[16];                /* of stats: */
    int64_t label[16];
    memory_list memory;
} at;

static char folder[] = "/tmp/saeclip-bench-XXXXXX";
static char model_path[sizeof folder + 20];

/* Numbers from -scale to scale, repeated after a while. out: [count] */
static void fill(float *out, size_t count, float scale) {
    enum { PERIOD = 65521 };
    for (size_t i = 0; i < count; i++) {
        if (i < PERIOD) {
            out[i] = scale * uniform(0, 0, i);
        } else {
            out[i] = out[i - PERIOD];
        }
    }
}

static int peak_task(void *context, size_t task) {
    (void)context;
    (void)task;
    float sum = peak_of(at.set)(PEAK_ROUNDS, 0.5f);
    return isfinite(sum) ? SC_OK : fail("peak: the result is not finite");
}

static int run_peak(void) {
    at.flops = 2.0 * PEAK_TASKS * PEAK_ROUNDS * (double)(at.set->rows * at.set->columns);
    return parallel_for(PEAK_TASKS, peak_task, NULL);
}

static int prepare_memory(void) {
    size_t count = (size_t)READ_TASKS * READ_FLOATS;
    SC_TRY(allocate(&at.memory, &at.input, count, sizeof *at.input));
    fill(at.input, count, 1);
    return SC_OK;
}

static int read_task(void *context, size_t task) {
    const float *part = at.input + task * READ_FLOATS;
    (void)context;
    float sum = kernels->dot(part, part, READ_FLOATS);
    return isfinite(sum) ? SC_OK : fail("memory: the result is not finite");
}

static int run_memory(void) {
    at.bytes = 4.0 * READ_TASKS * READ_FLOATS;
    return parallel_for(READ_TASKS, read_task, NULL);
}

static int prepare_product(void) {
    size_t K = at.line->inputs;
    size_t N = at.line->outputs;
    float *weight;
    const array_spec arrays[] = {
        ARRAY(at.input, PRODUCT_ROWS, K),
        ARRAY(at.output, PRODUCT_ROWS, N),
        ARRAY(at.bias, N, 1),
        ARRAY(at.matrix.data, panels_of(N) * kernels->columns, K),
        ARRAY(weight, N, K) };
    SC_TRY(new_arrays(&at.memory, arrays, COUNT(arrays)));
    fill(at.input, PRODUCT_ROWS * K, 1);
    fill(at.bias, N, 1);
    fill(weight, N * K, sqrtf(3 / (float)K));
    at.matrix.K = K;
    at.matrix.N = N;
    at.matrix.panels = panels_of(N);
    pack_panels(&at.matrix, 0, at.matrix.panels, weight, 1, K);
    return SC_OK;
}

static int run_product(void) {
    size_t K = at.line->inputs;
    size_t N = at.line->outputs;
    tile_target to = { .c = at.output, .c_stride = N, .bias = at.bias };
    at.flops = 2.0 * PRODUCT_ROWS * (double)K * (double)N;
    return multiply(at.input, PRODUCT_ROWS, K, &at.matrix, to);
}

/* Writes a tensor of random numbers of variance 1 / inputs, i.e. of the last dimensions. */
static int write_tensor(sc_writer *w, const char *name, int rank, const size_t *shape) {
    size_t count = 1;
    for (int d = 0; d < rank; d++) {
        count *= shape[d];
    }
    float *values = new_array(count, sizeof *values);
    if (!values) return SC_FAILED;
    fill(values, count, sqrtf(3.0f * (float)shape[0] / (float)count));
    int status = sc_writer_tensor(w, name, SC_F16, rank, shape);
    if (status == SC_OK) {
        status = sc_writer_floats(w, values, count);
    }
    free(values);
    return status;
}

/* Writes a ViT-B/16 with random weights under timm's names. */
static int write_model(sc_writer *w) {
    static const struct { const char *name; int rank; size_t shape[4]; } once[] = {
        { "cls_token", 3, { 1, 1, D } },
        { "pos_embed", 3, { 1, T, D } },
        { "patch_embed.proj.weight", 4, { D, 3, 16, 16 } } };
    static const struct { const char *name; int rank; size_t shape[2]; } block[] = {
        { "norm1.weight", 1, { D } }, { "norm1.bias", 1, { D } },
        { "attn.qkv.weight", 2, { 3 * D, D } }, { "attn.qkv.bias", 1, { 3 * D } },
        { "attn.proj.weight", 2, { D, D } }, { "attn.proj.bias", 1, { D } },
        { "norm2.weight", 1, { D } }, { "norm2.bias", 1, { D } },
        { "mlp.fc1.weight", 2, { HIDDEN_OF_VIT, D } }, { "mlp.fc1.bias", 1, { HIDDEN_OF_VIT } },
        { "mlp.fc2.weight", 2, { D, HIDDEN_OF_VIT } }, { "mlp.fc2.bias", 1, { D } } };
    static const char *const metadata[][2] = {
        { "hidden_act", "quick_gelu" }, { "layer_norm_eps", "1e-5" },
        { "num_attention_heads", "12" }, { "image_mean", "0.5,0.5,0.5" },
        { "image_std", "0.5,0.5,0.5" } };
    for (size_t i = 0; i < COUNT(metadata); i++) {
        SC_TRY(sc_writer_metadata(w, metadata[i][0], metadata[i][1]));
    }
    for (size_t i = 0; i < COUNT(once); i++) {
        SC_TRY(write_tensor(w, once[i].name, once[i].rank, once[i].shape));
    }
    for (size_t b = 0; b < BLOCKS; b++) {
        for (size_t i = 0; i < COUNT(block); i++) {
            char name[64];
            snprintf(name, sizeof name, "blocks.%zu.%s", b, block[i].name);
            SC_TRY(write_tensor(w, name, block[i].rank, block[i].shape));
        }
    }
    return sc_writer_close(w, SC_OK);
}

/* Makes the model's file, once. */
static int make_model(void) {
    sc_writer w;
    if (*model_path) return SC_OK;
    if (!mkdtemp(folder)) return fail("%s: cannot be made: %s", folder, strerror(errno));
    sprintf(model_path, "%s/model.safetensors", folder);
    SC_TRY(sc_writer_open(&w, model_path));
    w.room = 1 << 16;
    int status = write_model(&w);
    if (status != SC_OK) {
        sc_writer_close(&w, SC_FAILED);
    }
    return status;
}

static void remove_model(void) {
    if (*model_path) {
        remove(model_path);
        remove(folder);
    }
}

/* The model, black images, and a hook point in the last block that is used. */
static int prepare_vit(void) {
    feed *f = &at.data;
    size_t images = at.line->images;
    size_t blocks = at.line->blocks;
    SC_TRY(make_model());
    SC_TRY(sc_model_open(&f->model, model_path, NULL));
    SC_TRY(sc_model_load(&f->model, blocks, 0));
    f->T = T;
    f->D = f->stride = D;
    f->first_patch = 1;
    f->count = images;
    f->taps = 1;
    f->tap[0] = (sc_tap){ .layer = blocks, .hook = SC_RESID, .stride = D };
    if (blocks < BLOCKS) {
        f->tap[0].hook = SC_MLP;
    }
    const array_spec arrays[] = {
        ARRAY(f->pixels, images, SIDE * SIDE * 3),
        ARRAY(f->image, images, 1),
        ARRAY(f->label, images, 1),
        ARRAY(f->tap[0].out, images * T, D) };
    return new_arrays(&f->memory, arrays, COUNT(arrays));
}

static int run_vit(void) {
    feed *f = &at.data;
    double blocks = (double)at.line->blocks;
    double tokens = (double)at.line->images * T;
    double per_token = 2.0 * D * D + blocks * (24.0 * D * D + 4.0 * T * D);
    at.flops = tokens * per_token;
    return sc_model_forward(&f->model, f->pixels, f->count, f->tap, 1, NULL);
}

/* An SAE whose h has variance 2 D / n, since x has variance 1 and W_enc 2 / n. It stays as it is,
 * for the learning rate is 0. */
static int prepare_sae(void) {
    sc_sae *sae = &at.sae;
    double deviation = sqrt(2.0 * D / LATENTS_OF_SAE);
    SC_TRY(sc_sae_init(sae, D, LATENTS_OF_SAE, 1));
    sae->topk = at.line->k > 0;
    sae->k = at.line->k;
    for (size_t j = 0; j < LATENTS_OF_SAE; j++) {
        sae->b_enc[j] = (float)(-at.line->shift * deviation);
    }
    SC_TRY(allocate(&at.memory, &at.input, STEP_TOKENS * D, sizeof *at.input));
    fill(at.input, STEP_TOKENS * D, sqrtf(3));
    return SC_OK;
}

static int prepare_encoder(void) {
    SC_TRY(prepare_sae());
    SC_TRY(new_batch(&at.batch, &at.sae, STEP_TOKENS));
    at.batch.reconstruct = 0;
    return SC_OK;
}

static int run_encoder(void) {
    at.flops = 2.0 * STEP_TOKENS * D * LATENTS_OF_SAE;
    return run_sae(&at.batch, at.input, D, STEP_TOKENS);
}

static int prepare_step(void) {
    const sc_train_options settings = { .l1 = 8e-5, .dead_window = INT_MAX };
    SC_TRY(prepare_sae());
    at.trainer = sc_trainer_new(&at.sae, &settings, STEP_TOKENS);
    return at.trainer ? SC_OK : SC_FAILED;
}

/* All latents are encoded; those that fire are decoded and have df and two gradients. Two matrices
 * and their moments are read and written. */
static int run_step(void) {
    sc_step result;
    SC_TRY(sc_train_step(at.trainer, at.input, &result));
    at.flops = 2.0 * STEP_TOKENS * D * (LATENTS_OF_SAE + 4 * result.l0);
    at.bytes = 2 * 2 * 3 * 4.0 * LATENTS_OF_SAE * D;
    return SC_OK;
}

static int prepare_stats(void) {
    sae_batch *batch = &at.batch;
    SC_TRY(prepare_vit());
    SC_TRY(prepare_sae());
    SC_TRY(new_batch(batch, &at.sae, at.line->images * T));
    batch->reconstruct = strcmp(at.line->name, "eval") == 0;
    at.stats = (statistics){ .n = LATENTS_OF_SAE, .D = D, .T = T, .K = 16, .P = 64,
                             .threshold = -1, .batch = batch, .count = at.line->images,
                             .image = at.image, .label = at.label };
    for (size_t i = 0; i < COUNT(at.image); i++) {
        at.image[i] = i;
        at.label[i] = -1;
    }
    return new_statistics(&at.stats, &at.memory, 0);
}

static int run_stats(void) {
    sae_batch *batch = &at.batch;
    size_t tokens = at.line->images * T;
    double latents = LATENTS_OF_SAE;
    if (batch->reconstruct) {
        latents += (double)at.line->k;
    }
    size_t bad;
    SC_TRY(run_vit());
    SC_TRY(run_sae(batch, at.data.tap[0].out, D, tokens));
    at.flops += 2.0 * (double)tokens * D * latents;
    return count_batch(&at.stats, &bad);
}

/* peak comes first: it is what the others are measured by. */
static const line lines[] = {
    { .name = "peak", .what = "multiply-adds in registers", .run = run_peak },
    { .name = "memory", .what = "reading 512 MiB", .prepare = prepare_memory, .run = run_memory },
    { .name = "qkv", .what = "1,576 x 768 -> 2,304", .prepare = prepare_product,
      .run = run_product, .inputs = D, .outputs = 3 * D },
    { .name = "out", .what = "1,576 x 768 -> 768", .prepare = prepare_product,
      .run = run_product, .inputs = D, .outputs = D },
    { .name = "fc1", .what = "1,576 x 768 -> 3,072", .prepare = prepare_product,
      .run = run_product, .inputs = D, .outputs = 4 * D },
    { .name = "fc2", .what = "1,576 x 3,072 -> 768", .prepare = prepare_product,
      .run = run_product, .inputs = 4 * D, .outputs = D },
    { .name = "encoder", .what = "2,364 x 768 -> 49,152", .prepare = prepare_encoder,
      .run = run_encoder, .shift = 9 },
    { .name = "encoder-topk", .what = "the same, TopK 32", .prepare = prepare_encoder,
      .run = run_encoder, .k = 32 },
    { .name = "vit-8", .what = "ViT-B/16, per image, 8 at once", .prepare = prepare_vit,
      .run = run_vit, .images = 8, .blocks = BLOCKS },
    { .name = "vit-1", .what = "ViT-B/16, one image", .prepare = prepare_vit,
      .run = run_vit, .images = 1, .blocks = BLOCKS },
    { .name = "step-topk", .what = "2,364 tokens, TopK 32", .prepare = prepare_step,
      .run = run_step, .k = 32 },
    { .name = "step-relu", .what = "the same, ReLU, 300 active", .prepare = prepare_step,
      .run = run_step, .shift = 2.505 },
    { .name = "step-half", .what = "the same, ReLU, half active", .prepare = prepare_step,
      .run = run_step },
    { .name = "stats", .what = "per image, TopK 32, block 11", .prepare = prepare_stats,
      .run = run_stats, .images = 16, .blocks = BLOCKS - 1, .k = 32 },
    { .name = "eval", .what = "per image, TopK 32, block 11", .prepare = prepare_stats,
      .run = run_stats, .images = 16, .blocks = BLOCKS - 1, .k = 32 } };

/* --- Measuring and printing --- */

enum figure { MILLISECONDS, GFLOPS, SHARE, MOVED, RATE, SPEEDUP, OF_VIT, TAKEN, FIGURES };

/* A figure's key in JSON; its title in the table, and what it is divided by there. */
static const struct { const char *key, *title; double unit; } figures[FIGURES] = {
    { "seconds", "ms", 1e-3 },
    { "gflops", "GFLOP/s", 1 },
    { "share", "% of peak", 0.01 },
    { "bytes", "MB moved", 1e6 },
    { "gigabytes_per_second", "GB/s", 1 },
    { "speedup", "speedup", 1 },
    { "of_vit", "of vit-8", 1 },
    { "peak_memory", "MB taken", 1e6 } };

static struct {
    int threads, as_json;
    int rows;                        /* printed so far */
    double peak[2];                  /* GFLOP/s with one thread, with all */
    double vit[2];                   /* seconds per image of vit-8 */
} bench;

/* Median seconds of three runs after one that is not counted; short ones are repeated. */
static int time_runs(double *seconds) {
    double t[3];
    double start = seconds_now();
    SC_TRY(at.line->run());
    size_t repeat = (size_t)(0.3 / (seconds_now() - start + 1e-6)) + 1;
    for (int i = 0; i < 3; i++) {
        start = seconds_now();
        for (size_t r = 0; r < repeat; r++) {
            SC_TRY(at.line->run());
        }
        t[i] = (seconds_now() - start) / (double)repeat;
    }
    *seconds = fmax(fmin(t[0], t[1]), fmin(fmax(t[0], t[1]), t[2]));
    return SC_OK;
}

/* The figures of the line at hand. many: 1 with all threads, 0 with one thread, whose figures are
 * in `figure` when the line is measured with all. figure: [FIGURES] */
static int measure_line(int many, double *figure) {
    double seconds, single = figure[MILLISECONDS];
    if (at.line->prepare) {
        SC_TRY(at.line->prepare());
    }
    SC_TRY(time_runs(&seconds));
    figure[GFLOPS] = 1e-9 * at.flops / seconds;
    figure[MOVED] = at.bytes;
    figure[RATE] = 1e-9 * at.bytes / seconds;
    if (at.line->images) {
        seconds /= (double)at.line->images;
    }
    if (at.set == kernels) {
        bench.peak[many] = figure[GFLOPS];
    }
    if (!at.set) {
        figure[SHARE] = figure[GFLOPS] / bench.peak[many];
    }
    if (strcmp(at.line->name, "vit-8") == 0) {
        bench.vit[many] = seconds;
    }
    if (at.line->run == run_stats && bench.vit[many] > 0) {
        figure[OF_VIT] = seconds / bench.vit[many];
    }
    if (many) {
        figure[SPEEDUP] = single / seconds;
    }
    figure[MILLISECONDS] = seconds;
#ifdef __linux__
    struct rusage used;
    if (getrusage(RUSAGE_SELF, &used) == 0) {
        figure[TAKEN] = 1024.0 * (double)used.ru_maxrss;
    }
#endif
    return SC_OK;
}

/* One row of the table, or one object; a figure of 0 does not apply. */
static void print_row(const double *figure) {
    char name[32];
    if (at.set) {
        snprintf(name, sizeof name, "%s-%s", at.line->name, at.set->name);
    } else {
        snprintf(name, sizeof name, "%s", at.line->name);
    }
    if (bench.as_json) {
        printf("%s  {\"name\": \"%s\", \"threads\": %d", bench.rows++ ? ",\n" : "[\n", name,
               thread_count());
        for (int i = 0; i < FIGURES; i++) {
            if (figure[i] > 0) {
                printf(", \"%s\": %.9g", figures[i].key, figure[i]);
            }
        }
        printf("}");
        return;
    }
    printf("%-13s%7d", name, thread_count());
    for (int i = 0; i < FIGURES; i++) {
        if (figure[i] > 0) {
            printf("%10.4g", figure[i] / figures[i].unit);
        } else {
            printf("%10s", "");
        }
    }
    printf("  %s\n", at.line->what);
    fflush(stdout);
}

/* Measures a line with one thread, then with all. */
static int run_line(const line *l, const kernel_set *set, int shown) {
    double figure[FIGURES] = { 0 };
    for (int many = 0; many <= (bench.threads > 1); many++) {
        SC_TRY(sc_threads_start(many ? bench.threads : 1));
        at.line = l;
        at.set = set;
        int status = measure_line(many, figure);
        if (status == SC_OK && shown) {
            print_row(figure);
        }
        sc_trainer_free(at.trainer);
        free_batch(&at.batch);
        sc_sae_close(&at.sae);
        close_feed(&at.data);
        release(&at.memory);
        memset(&at, 0, sizeof at);
        SC_TRY(status);
    }
    return SC_OK;
}

static int wanted(const char *name, char **names, int count) {
    for (int i = 0; i < count; i++) {
        if (strcmp(names[i], name) == 0) return 1;
    }
    return count == 0;
}

/* names: [count], the lines to run; none: all */
static int run_lines(char **names, int count) {
    int peak_wanted = wanted("peak", names, count);
    if (!bench.as_json) {
        printf("%-13s%7s", "line", "threads");
        for (int i = 0; i < FIGURES; i++) {
            printf("%10s", figures[i].title);
        }
        puts("");
    }
    for (size_t i = 0; i < COUNT(kernel_sets); i++) {
        const kernel_set *set = kernel_sets[i];
        if (is_usable(set) && (peak_wanted || set == kernels)) {
            SC_TRY(run_line(&lines[0], set, peak_wanted));
        }
    }
    for (size_t i = 1; i < COUNT(lines); i++) {
        if (wanted(lines[i].name, names, count)) {
            SC_TRY(run_line(&lines[i], NULL, 1));
        }
    }
    if (bench.as_json) {
        puts("\n]");
    }
    return SC_OK;
}

static int check_names(char **names, int count) {
    for (int i = 0; i < count; i++) {
        size_t l = 0;
        while (l < COUNT(lines) && strcmp(lines[l].name, names[i]) != 0) {
            l++;
        }
        if (l == COUNT(lines)) {
            return usage("unknown line '%s' (expected peak, vit-8, step-topk, ...)", names[i]);
        }
    }
    return SC_OK;
}

static int run_bench(int argc, char **argv) {
    int first = 1;
    double threads = 0;
    for (; first < argc && argv[first][0] == '-'; first++) {
        if (strcmp(argv[first], "--json") == 0) {
            bench.as_json = 1;
        } else if (strcmp(argv[first], "--threads") == 0 && argv[first + 1]) {
            SC_TRY(parse_number(argv[++first], "--threads", 1, SC_MAX_THREADS, &threads));
        } else {
            return usage("usage: bench [--json] [--threads N] [LINE ...]");
        }
    }
    SC_TRY(check_names(argv + first, argc - first));
    SC_TRY(sc_instruction_set(getenv("SAECLIP_ISA")));
    SC_TRY(sc_threads_start((int)threads));
    bench.threads = thread_count();
    int status = run_lines(argv + first, argc - first);
    sc_threads_stop();
    remove_model();
    return status;
}

int main(int argc, char **argv) {
    int status = run_bench(argc, argv);
    if (status != SC_OK) {
        fprintf(stderr, "bench: %s\n", sc_error());
    }
    return status;
}
