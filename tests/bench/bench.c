/* How fast this machine is, and which share of that saeclip's kernels and pipeline reach, at ViT-B/16's
 * sizes, on random numbers. `make bench` builds and runs it, beside the peers that are installed.
 *
 *     build/bench [--json] [--threads N] [LINE...]
 *
 * Floating-point operations of sparse codes: those of the active ones. Like saeclip.c, this file includes
 * itself once for each instruction set, for the kernel that measures the peak. */
#ifdef SC_ISA

/* As many chains as a product's tile has, in registers, one link of each per round. The sum is returned
 * so that the compiler cannot leave the work out; factor: below 1, so that it stays finite. */
SC_TARGET static float KERNEL(peak)(size_t rounds, float factor) {
    SC_V chain[SC_TILE_ROWS * SC_VECTORS], f = SC_SET(factor), one = SC_SET(1.0f);
    float lane[SC_LANES];
    SC_UNROLL for (int i = 0; i < SC_TILE_ROWS * SC_VECTORS; i++) chain[i] = SC_SET((float)i);
    for (size_t round = 0; round < rounds; round++)
        SC_UNROLL for (int i = 0; i < SC_TILE_ROWS * SC_VECTORS; i++)
            chain[i] = SC_FMA(chain[i], f, one);
    SC_UNROLL for (int i = 1; i < SC_TILE_ROWS * SC_VECTORS; i++)
        chain[0] = SC_ADD(chain[0], chain[i]);
    SC_STORE(lane, chain[0]);
    return lane[0];
}

#else
#define SAECLIP_NO_MAIN
#include "../../saeclip.c"

#include <sys/resource.h>

#define SC_ISA scalar
#include "bench.c"
#undef SC_ISA
#if defined(__x86_64__) && defined(__GNUC__)
#define SC_ISA avx2
#include "bench.c"
#undef SC_ISA
#define SC_ISA avx512
#include "bench.c"
#undef SC_ISA
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define SC_ISA neon
#include "bench.c"
#undef SC_ISA
#endif

enum {
    BENCH_D = 768, BENCH_T = 197, BENCH_LATENTS = 49152, PRODUCT_ROWS = 8 * BENCH_T,
    PRODUCT_FLOATS = PRODUCT_ROWS * 4 * BENCH_D,     /* at most, of an input or output */
    STEP_TOKENS = 12 * BENCH_T, SAE_INPUTS = STEP_TOKENS * BENCH_D,
    READ_TASKS = 512, READ_FLOATS = 1 << 18, PEAK_TASKS = 2048, PEAK_ROUNDS = 5000
};

enum figure { SECONDS, GFLOPS, SHARE, MOVED, RATE, SPEEDUP, OF_VIT, MEMORY, FIGURES };
/* A figure's key in JSON; its title and unit in the table. */
static const struct { const char *key, *title; double unit; } bench_figures[FIGURES] = {
    { "seconds", "ms", 1e-3 }, { "gflops", "GFLOP/s", 1 }, { "share", "% of peak", 0.01 },
    { "bytes", "MB moved", 1e6 }, { "gigabytes_per_second", "GB/s", 1 },
    { "speedup", "speedup", 1 }, { "of_vit", "of vit-8", 1 }, { "peak_memory", "MB taken", 1e6 } };

typedef struct bench {
    const struct bench_line *line;
    const kernel_set *set;           /* whose peak is measured, else NULL */
    int threads, as_json, rows;      /* in all; whether JSON is wanted; printed so far */
    double images, flops, bytes;     /* of a run; bytes: that come from and go to memory */
    float *input;
    feed data;                       /* pictures, a model, a hook point */
    sc_sae sae;
    sc_trainer *trainer;             /* of the lines that train */
    sae_batch batch;                 /* of the others that use the SAE */
    statistics stats;
    double peak[2], vit[2];          /* GFLOP/s, vit-8's seconds; with one thread, with all */
} bench;

typedef struct bench_line {
    const char *name, *what;
    int (*run)(bench *b);
    size_t inputs;                   /* floats; a product's output lies behind its input */
    size_t images, blocks;           /* of a model, where there is one */
    enum role role;                  /* of a product */
    size_t k;                        /* TopK's, 0: ReLU */
    double shift;                    /* how far below 0 b_enc lies, in deviations of h */
} bench_line;

static float peak_of(const kernel_set *set) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (set == &kernels_avx512) return peak_avx512(PEAK_ROUNDS, 0.5f);
    if (set == &kernels_avx2) return peak_avx2(PEAK_ROUNDS, 0.5f);
#elif defined(__aarch64__) && defined(__ARM_NEON)
    if (set == &kernels_neon) return peak_neon(PEAK_ROUNDS, 0.5f);
#endif
    (void)set;
    return peak_scalar(PEAK_ROUNDS, 0.5f);
}

/* count numbers from -scale to scale, which repeat after a while. out: [count] */
static void random_floats(float *out, size_t count, float scale) {
    enum { PERIOD = 65521 };
    for (size_t i = 0; i < count; i++)
        out[i] = i < PERIOD ? scale * uniform(0, 0, i) : out[i - PERIOD];
}

/* Weights for a model whose sizes are set, as sc_model_load() would read them from a file. */
static int random_model(sc_model *m) {
    const size_t sizes[] = { 1, m->width, 3 * m->width, m->hidden, m->tokens, 3 * m->patch * m->patch, 1 };
    m->loaded = m->blocks;
    m->layer = new_array(m->blocks, ROLES * sizeof *m->layer);
    if (!m->layer) return SC_FAILED;
    for (size_t i = 0; i < m->blocks * ROLES; i++) {
        enum role role = (enum role)(i % ROLES);
        size_t N = sizes[layers[role].rows], K = sizes[layers[role].columns];
        sc_layer *layer = &m->layer[i];
        if (role >= POST || (i >= ROLES && role < NORM1)) continue;
        layer->weight = new_array(N, K * sizeof(float));
        layer->bias = new_array(padded(N == 1 ? K : N), sizeof(float));
        if (!layer->weight || !layer->bias) return SC_FAILED;
        random_floats(layer->weight, N * K, sqrtf(3 / (float)K));
        if (!layers[role].linear) continue;
        SC_TRY(new_packed(&layer->matrix, K, N));
        pack_panels(&layer->matrix, 0, layer->matrix.panels, layer->weight, 1, K);
        free(layer->weight);
        layer->weight = NULL;
    }
    return SC_OK;
}

/* Computes in registers, or reads a part of what caches cannot hold. */
static int machine_task(void *context, size_t task) {
    const bench *b = context;
    const float *part = b->input + (b->set ? 0 : task * READ_FLOATS);
    float sum = b->set ? peak_of(b->set) : kernels->dot(part, part, READ_FLOATS);
    return isfinite(sum) ? SC_OK : fail("bench: a sum is not finite");
}

static int run_machine(bench *b) {
    if (b->set) b->flops = 2.0 * PEAK_TASKS * PEAK_ROUNDS * b->set->rows * b->set->columns;
    else b->bytes = (double)b->line->inputs * sizeof *b->input;
    return parallel_for(b->set ? PEAK_TASKS : READ_TASKS, machine_task, b);
}

static int run_product(bench *b) {
    const sc_layer *layer = &b->data.model.layer[b->line->role];
    size_t K = layer->matrix.K, N = layer->matrix.N;
    b->flops = 2.0 * PRODUCT_ROWS * (double)(K * N);
    tile_target to = { .c = b->input + PRODUCT_FLOATS, .c_stride = N, .bias = layer->bias };
    return multiply(b->input, PRODUCT_ROWS, K, &layer->matrix, to);
}

static int run_vit(bench *b) {
    const feed *f = &b->data;
    double D = BENCH_D, T = BENCH_T, blocks = (double)f->model.blocks;
    b->images = (double)f->count;
    b->flops = b->images * (2 * (T - 1) * D * D + blocks * T * (24 * D * D + 4 * T * D));
    return sc_model_forward(&f->model, f->pixels, f->count, f->tap, 1, NULL);
}

static int run_encoder(bench *b) {
    b->batch.reconstruct = 0;
    b->flops = 2.0 * SAE_INPUTS * BENCH_LATENTS;
    return run_sae(&b->batch, b->input, STEP_TOKENS);
}

/* Active codes are decoded and have df and two gradients; bytes: two matrices and their moments. */
static int run_step(bench *b) {
    sc_step result;
    size_t bad;
    SC_TRY(train_step(b->trainer, b->input, &result, &bad));
    b->flops = 2.0 * SAE_INPUTS * (BENCH_LATENTS + 4 * result.l0);
    b->bytes = 2 * 2 * 3 * sizeof(float) * (double)BENCH_LATENTS * BENCH_D;
    return SC_OK;
}

static int run_stats(bench *b) {
    sae_batch *batch = &b->batch;
    int decode = batch->reconstruct = strcmp(b->line->name, "eval") == 0;
    SC_TRY(run_vit(b));
    b->flops += 2 * b->images * BENCH_T * BENCH_D * (BENCH_LATENTS + (decode ? b->line->k : 0));
    SC_TRY(run_sae(batch, b->data.tap[0].out, b->data.count * BENCH_T));
    return count_batch(&b->stats);
}

static const bench_line bench_lines[] = {
    { "peak", "multiply-adds in registers", run_machine, 0, 0, 0, 0, 0, 0 },
    { "memory", "reading 512 MiB", run_machine, READ_TASKS * READ_FLOATS, 0, 0, 0, 0, 0 },
    { "qkv", "1,576 x 768 -> 2,304", run_product, 2 * PRODUCT_FLOATS, 1, 1, QKV, 0, 0 },
    { "out", "1,576 x 768 -> 768", run_product, 2 * PRODUCT_FLOATS, 1, 1, OUT, 0, 0 },
    { "fc1", "1,576 x 768 -> 3,072", run_product, 2 * PRODUCT_FLOATS, 1, 1, FC1, 0, 0 },
    { "fc2", "1,576 x 3,072 -> 768", run_product, 2 * PRODUCT_FLOATS, 1, 1, FC2, 0, 0 },
    { "encoder", "2,364 x 768 -> 49,152", run_encoder, SAE_INPUTS, 0, 0, 0, 0, 9 },
    { "encoder-topk", "the same, TopK 32", run_encoder, SAE_INPUTS, 0, 0, 0, 32, 0 },
    { "vit-8", "ViT-B/16, an image of 8", run_vit, 0, 8, 12, 0, 0, 0 },
    { "vit-1", "ViT-B/16, an image alone", run_vit, 0, 1, 12, 0, 0, 0 },
    { "step-topk", "2,364 tokens, TopK 32", run_step, SAE_INPUTS, 0, 0, 0, 32, 0 },
    { "step-relu", "the same, ReLU, 300 active", run_step, SAE_INPUTS, 0, 0, 0, 0, 2.505 },
    { "step-half", "the same, ReLU, half active", run_step, SAE_INPUTS, 0, 0, 0, 0, 0 },
    { "stats", "an image, TopK 32, block 11", run_stats, 0, 16, 11, 0, 32, 0 },
    { "eval", "an image, TopK 32, block 11", run_stats, 0, 16, 11, 0, 32, 0 } };

/* A ViT-B/16 with random weights, black pictures, and a hook point after its last block. */
static int prepare_model(bench *b, size_t images, size_t blocks) {
    feed *f = &b->data;
    *f = (feed){ .T = BENCH_T, .first_patch = 1, .count = images, .memory = f->memory, .taps = 1,
                 .tap = { { .layer = blocks, .hook = blocks == 12 ? SC_RESID : SC_MLP,
                            .stride = BENCH_D } } };
    f->model = (sc_model){ .width = BENCH_D, .heads = 12, .hidden = 4 * BENCH_D, .patch = 16,
                           .grid = 14, .tokens = BENCH_T, .image_size = 224, .blocks = blocks,
                           .activation = QUICK_GELU, .epsilon = 1e-5f, .std = { 1, 1, 1 } };
    const array_spec arrays[] = {
        ARRAY(f->pixels, images, 224 * 224 * 3), ARRAY(f->image, images, 1),
        ARRAY(f->label, images, 1), ARRAY(f->tap[0].out, images * BENCH_T, BENCH_D) };
    SC_TRY(new_arrays(&f->memory, arrays, COUNT(arrays)));
    return random_model(&f->model);
}

/* Tokens of variance 1, W_enc's 2 / n: h's is 2 D / n, and stays, as the learning rate is 0. */
static int prepare_line(bench *b) {
    const bench_line *line = b->line;
    sc_sae *sae = &b->sae;
    b->images = 1;
    b->flops = b->bytes = 0;
    SC_TRY(allocate(&b->data.memory, &b->input, line->inputs, sizeof *b->input));
    random_floats(b->input, line->inputs, sqrtf(3));
    if (line->images) SC_TRY(prepare_model(b, line->images, line->blocks));
    if (line->inputs != SAE_INPUTS && line->run != run_stats) return SC_OK;
    SC_TRY(sc_sae_init(sae, BENCH_D, BENCH_LATENTS, 1));
    sae->topk = line->k > 0;
    sae->k = line->k;
    for (size_t j = 0; j < BENCH_LATENTS; j++)
        sae->b_enc[j] = (float)(-line->shift * sqrt(2.0 * BENCH_D / BENCH_LATENTS));
    if (line->run == run_step) {
        sc_train_options options = { .l1 = 8e-5, .dead_window = INT_MAX };
        b->trainer = sc_trainer_new(sae, &options, STEP_TOKENS);
        return b->trainer ? SC_OK : SC_FAILED;
    }
    b->stats = (statistics){ .batch = &b->batch, .sae = sae, .data = &b->data, .K = 16,
                             .P = 64, .threshold = -1 };
    SC_TRY(new_statistics(&b->stats, &b->data.memory, 0));
    return new_batch(&b->batch, sae, line->images ? line->images * BENCH_T : STEP_TOKENS);
}

/* One line with the threads at hand: the median of three runs after one that does not count, short
 * ones repeated. many: all threads, not one, whose figures still lie in figure: [FIGURES] */
static int measure_line(bench *b, int many, double *figure) {
    int status = prepare_line(b);
    double t[3] = { 0 }, start = seconds_now();
    if (status == SC_OK) status = b->line->run(b);
    size_t repeat = (size_t)(0.3 / (seconds_now() - start + 1e-6)) + 1;
    for (int i = 0; i < 3 && status == SC_OK; i++) {
        start = seconds_now();
        for (size_t k = 0; k < repeat && status == SC_OK; k++) status = b->line->run(b);
        t[i] = (seconds_now() - start) / (double)repeat;
    }
    double seconds = fmax(fmin(t[0], t[1]), fmin(fmax(t[0], t[1]), t[2]));
    figure[GFLOPS] = 1e-9 * b->flops / seconds;
    figure[MOVED] = b->bytes;
    figure[RATE] = 1e-9 * b->bytes / seconds;
    seconds /= b->images;
    if (b->set == kernels) b->peak[many] = figure[GFLOPS];
    if (!b->set) figure[SHARE] = figure[GFLOPS] / b->peak[many];
    if (b->line->images == 8) b->vit[many] = seconds;
    if (b->line->run == run_stats && b->vit[many] > 0) figure[OF_VIT] = seconds / b->vit[many];
    if (many) figure[SPEEDUP] = figure[SECONDS] / seconds;
    figure[SECONDS] = seconds;
#ifdef __linux__
    struct rusage used;
    if (getrusage(RUSAGE_SELF, &used) == 0) figure[MEMORY] = 1024.0 * (double)used.ru_maxrss;
#endif
    return status;
}

/* A row; a figure of 0 does not apply. */
static void print_figures(bench *b, const double *figure) {
    char name[32];
    snprintf(name, sizeof name, "%s%s%s", b->line->name, b->set ? "-" : "",
             b->set ? b->set->name : "");
    if (!b->as_json) printf("%-13s%7d", name, thread_count());
    else printf("%s  {\"name\": \"%s\", \"threads\": %d", b->rows++ ? ",\n" : "[\n", name,
                thread_count());
    for (enum figure i = 0; i < FIGURES; i++)
        if (b->as_json && figure[i] > 0) printf(", \"%s\": %.9g", bench_figures[i].key, figure[i]);
        else if (figure[i] > 0) printf("%10.4g", figure[i] / bench_figures[i].unit);
        else if (!b->as_json) printf("%10s", "");
    if (b->as_json) putchar('}');
    else printf("  %s\n", b->line->what);
}

/* A line with one thread, then with all. Not shown is what others are measured by. */
static int bench_line_rows(bench *b, int shown) {
    double figure[FIGURES] = { 0 };
    int status = SC_OK;
    for (int many = 0; many <= (b->threads > 1) && status == SC_OK; many++) {
        SC_TRY(sc_threads_start(many ? b->threads : 1));
        status = measure_line(b, many, figure);
        if (status == SC_OK && shown) print_figures(b, figure);
        sc_trainer_free(b->trainer);
        b->trainer = NULL;
        free_batch(&b->batch);
        sc_sae_close(&b->sae);
        close_feed(&b->data);
    }
    return status;
}

static int run_bench(bench *b, unsigned wanted) {
    if (!b->as_json) {
        printf("%-13s%7s", "line", "threads");
        for (enum figure i = 0; i < FIGURES; i++) printf("%10s", bench_figures[i].title);
        puts("");
    }
    for (size_t i = 0; i < COUNT(instruction_sets); i++) {
        b->set = instruction_sets[i].set;
        if (instruction_sets[i].usable() && (wanted & 1 || b->set == kernels))
            SC_TRY(bench_line_rows(b, wanted & 1));
    }
    b->set = NULL;
    while (++b->line < bench_lines + COUNT(bench_lines))
        if (wanted >> (b->line - bench_lines) & 1) SC_TRY(bench_line_rows(b, 1));
    if (b->as_json) puts("\n]");
    return SC_OK;
}

int main(int count, char **argument) {
    bench b = { .line = bench_lines };
    unsigned wanted = 0;
    for (int a = 1; a < count; a++) {
        size_t i = 0;
        if (strcmp(argument[a], "--json") == 0) {
            b.as_json = 1;
            continue;
        }
        if (strcmp(argument[a], "--threads") == 0 && a + 1 < count) {
            b.threads = atoi(argument[++a]);
            continue;
        }
        while (i < COUNT(bench_lines) && strcmp(bench_lines[i].name, argument[a]) != 0) i++;
        if (i == COUNT(bench_lines)) {
            fprintf(stderr, "usage: bench [--json] [--threads N] [LINE...], LINE one of");
            for (i = 0; i < COUNT(bench_lines); i++) fprintf(stderr, " %s", bench_lines[i].name);
            fputs("\n", stderr);
            return SC_USAGE;
        }
        wanted |= 1u << i;
    }
    if (wanted == 0) wanted = ~0u;
    int status = sc_instruction_set(getenv("SAECLIP_ISA"));
    if (status == SC_OK) status = sc_threads_start(b.threads);
    b.threads = thread_count();
    if (status == SC_OK) status = run_bench(&b, wanted);
    sc_threads_stop();
    if (status != SC_OK) fprintf(stderr, "bench: %s\n", sc_error());
    return status;
}

#endif /* !SC_ISA */
