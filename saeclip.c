/* saeclip: sparse autoencoders on a vision transformer's activations, in one C file. */
#ifndef SC_ISA
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif

#include "saeclip.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

#if defined(__GNUC__)
#define SC_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define SC_PRINTF(text, first)
#endif

#define SC_TRY(call)                                                                               \
    do {                                                                                           \
        int status_ = (call);                                                                      \
        if (status_ != SC_OK) return status_;                                                      \
    } while (0)

/* Huge pages where the system offers them; the program is right without. */
static void advise_huge_pages(void *memory, size_t bytes)
{
#ifdef MADV_HUGEPAGE
    if (bytes >= (size_t)4 << 20) {
        uintptr_t start = ((uintptr_t)memory + 4095) & ~(uintptr_t)4095;
        madvise((void *)start, bytes - 4096, MADV_HUGEPAGE);
    }
#else
    (void)memory;
    (void)bytes;
#endif
}
/* ============================================================================================
 * 1. Errors and memory
 *
 * A function that can fail returns SC_OK, SC_FAILED or SC_USAGE (which are also the program's exit
 * statuses) and leaves one line of reason in a buffer of its thread; only main() prints it.
 * ============================================================================================ */

static _Thread_local char error_text[1024];

const char *sc_error(void) { return error_text; }

static int fail_v(int status, const char *format, va_list arguments)
{
    vsnprintf(error_text, sizeof error_text, format, arguments);
    return status;
}

/* The input or the machine failed: "FILE: what is wrong and what was expected". */
SC_PRINTF(1, 2) static int fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fail_v(SC_FAILED, format, arguments);
    va_end(arguments);
    return SC_FAILED;
}

/* The caller asked for something that makes no sense. */
SC_PRINTF(1, 2) static int usage(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fail_v(SC_USAGE, format, arguments);
    va_end(arguments);
    return SC_USAGE;
}

/* count x size bytes, zeroed, on a cache line's boundary; NULL and a reason where that fails.
 * Never asks for 0 bytes, so NULL always means failure. Freed with free(). */
static void *new_array(size_t count, size_t size)
{
    void *memory = NULL;
    if (size != 0 && count > (SIZE_MAX - 64) / size) {
        fail("out of memory: %zu x %zu bytes cannot be addressed", count, size);
        return NULL;
    }
    size_t bytes = count * size + (count * size == 0);
    if (posix_memalign(&memory, 64, bytes) != 0) {
        fail("out of memory: %zu bytes are not to be had", bytes);
        return NULL;
    }
    advise_huge_pages(memory, bytes);
    memset(memory, 0, bytes);
    return memory;
}

/* A copy of a string, or NULL and a reason. */
static char *copy_string(const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = new_array(bytes, 1);
    if (copy) memcpy(copy, text, bytes);
    return copy;
}

/* Makes room for one more element in a list that doubles; list points to the list's pointer. */
static int grow(void *list, size_t *capacity, size_t count, size_t size)
{
    if (count < *capacity) return SC_OK;
    size_t larger = *capacity ? 2 * *capacity : 64;
    void *old, *memory = new_array(larger, size);
    if (!memory) return SC_FAILED;
    memcpy(&old, list, sizeof old);
    if (count) memcpy(memory, old, count * size);
    free(old);
    memcpy(list, &memory, sizeof memory);
    *capacity = larger;
    return SC_OK;
}

/* The arrays that something owns, to be freed together. Starts as { 0 }. */
typedef struct { void **block; size_t blocks, capacity; } memory_list;

/* *pointer (the address of a typed pointer) becomes a new array on the list. */
static int allocate(memory_list *list, void *pointer, size_t count, size_t size)
{
    SC_TRY(grow(&list->block, &list->capacity, list->blocks, sizeof *list->block));
    void *memory = list->block[list->blocks] = new_array(count, size);
    memcpy(pointer, &memory, sizeof memory);
    if (memory) list->blocks++;
    return memory ? SC_OK : SC_FAILED;
}

static void release(memory_list *list)
{
    for (size_t i = 0; i < list->blocks; i++) free(list->block[i]);
    free(list->block);
    *list = (memory_list){ 0 };
}

/* A table of arrays: where a pointer goes, and rows x the bytes of a row. */
typedef struct { void *pointer; size_t rows, row_bytes; } array_spec;

#define ARRAY(pointer, rows, columns) { &(pointer), rows, (columns) * sizeof *(pointer) }
#define COUNT(list) (sizeof(list) / sizeof *(list))

static int new_arrays(memory_list *list, const array_spec *array, size_t count)
{
    for (size_t i = 0; i < count; i++)
        SC_TRY(allocate(list, array[i].pointer, array[i].rows, array[i].row_bytes));
    return SC_OK;
}

/* Lays arrays out from `memory` on, each on a cache line's boundary, or only measures them where
 * that is NULL. Returns the bytes they take, SIZE_MAX if so many cannot be addressed. */
static size_t lay_out(const array_spec *array, size_t count, void *memory)
{
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        void *place = memory ? (unsigned char *)memory + used : NULL;
        memcpy(array[i].pointer, &place, sizeof place);
        if (array[i].row_bytes && array[i].rows > (SIZE_MAX - 63 - used) / array[i].row_bytes)
            return SIZE_MAX;
        used += (array[i].rows * array[i].row_bytes + 63) / 64 * 64;
    }
    return used;
}

/* What the command line says. Texts are NULL, numbers 0 where not given, unless options have a
 * default (see the table of options at the end). */
typedef struct {
    const char *output, *model, *acts, *stats, *also, *latents, *format, *dtype, *tokens, *hook;
    const char *gelu, *epsilon, *heads, *mean, *std, *crop, *order, *log, *checkpoint, *init;
    const char *b_dec, *arch, *mask;
    const char *sae[SC_MAX_TAPS];
    size_t saes;
    long layer, threads, size, square, limit, k, expansion, d_sae, batch, steps, warmup;
    long b_dec_images, dead_window, checkpoint_every, top, top_patches, class_index;
    double l1, lr, epochs, threshold, rtol, atol, seed;
    int quiet, skip_bad, ghost, resume, class_counts, dense, reconstruction, image_means;
    uint64_t given;                          /* bit i: row i of the table was given */
} options;

static int quiet;

static const char *printable(const char *text, char *out, size_t room);

/* One line on standard error. */
static void print_line(const char *line)
{
    char safe[4 * sizeof error_text];
    fprintf(stderr, "saeclip: %s\n", printable(line, safe, sizeof safe));
}

/* A line on standard error that is no failure. */
SC_PRINTF(1, 2) static void note(const char *format, ...)
{
    char line[sizeof error_text];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (!quiet) print_line(line);
}

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Progress on standard error: redrawn on a terminal, else a line now and then. total may be
 * SIZE_MAX: not known. */
SC_PRINTF(6, 7) static void show_progress(const char *what, uint64_t done, uint64_t total,
                                          uint64_t items, const char *unit, const char *format, ...)
{
    static double first, last;
    static uint64_t begin, begin_items;
    double now = seconds_now();
    int terminal = isatty(STDERR_FILENO);
    if (first == 0 || done <= begin) {
        first = last = now;
        begin = done;
        begin_items = items;
        return;
    }
    if (quiet || (done != total && now - last < (terminal ? 0.2 : 20))) return;
    if (done == total && !terminal && now - first < 20) return;
    char words[160], left[48] = "";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof words, format, arguments);
    va_end(arguments);
    last = now;
    double rate = (double)(items - begin_items) / (now - first);
    double remaining = (now - first) / (double)(done - begin) * (double)(total - done);
    if (total != SIZE_MAX && done < total) snprintf(left, sizeof left, ", %.0f s left", remaining);
    fprintf(stderr, "%s%s %llu", terminal ? "\r\033[K" : "saeclip: ", what, (unsigned long long)done);
    if (total != SIZE_MAX) fprintf(stderr, " of %llu", (unsigned long long)total);
    fprintf(stderr, ", %.1f %s/s%s%s%s%s", rate, unit, left, *words ? ", " : "", words,
            terminal && done != total ? "" : "\n");
}

/* Whether all that was printed reached standard output. */
static int end_of_output(void)
{
    if (fflush(stdout) == 0 && !ferror(stdout)) return SC_OK;
    return fail("standard output: cannot be written: %s", strerror(errno));
}

/* The whole text as a finite number from least to most. */
static int parse_number(const char *text, const char *what, double least, double most,
                        double *value)
{
    char *end;
    *value = strtod(text, &end);
    if (end == text || *end != '\0' || !(*value >= least && *value <= most))
        return usage("%s: '%s' is no number from %g to %g", what, text, least, most);
    return SC_OK;
}

/* "r,g,b" */
static int parse_triple(const char *text, const char *what, float *value)
{
    char *end;
    for (int c = 0; c < 3; c++) {
        value[c] = (float)strtod(text, &end);
        if (end == text || *end != (c < 2 ? ',' : '\0') || !isfinite(value[c]))
            return usage("%s: 'R,G,B' was expected, three numbers", what);
        text = end + 1;
    }
    return SC_OK;
}

/* ============================================================================================
 * 2. Threads
 *
 * parallel_for(tasks, work, context) runs work(context, task, worker) once for every task; tasks
 * are handed out in ascending order, so which worker gets which is chance, and no result may depend
 * on it: a task writes only what is its own. worker is 0 .. thread_count() - 1, for scratch memory.
 * If tasks fail, the one of lowest number is reported: all below it had been started, so that one
 * is always the same.
 * ============================================================================================ */

typedef int task_function(void *context, size_t task, int worker);

static struct {
    int workers;                     /* the caller counts as worker 0 */
    pthread_t *thread;               /* [workers - 1] */
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    task_function *work;
    void *context;
    size_t tasks, round;             /* round: how many parallel_for calls there were */
    int busy, stop;                  /* busy: threads that have not finished this round */
    atomic_size_t next;              /* the next task to hand out */
    size_t failed_task;              /* SIZE_MAX: none failed */
    int failed_status;
    char failed_text[sizeof error_text];
} pool = { .workers = 1, .lock = PTHREAD_MUTEX_INITIALIZER,
           .start = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER };

static int thread_count(void) { return pool.workers; }

static void run_tasks(int worker)
{
    for (;;) {
        size_t task = atomic_fetch_add(&pool.next, 1);
        if (task >= pool.tasks) return;
        int status = pool.work(pool.context, task, worker);
        if (status == SC_OK) continue;
        pthread_mutex_lock(&pool.lock);
        if (task < pool.failed_task) {
            pool.failed_task = task;
            pool.failed_status = status;
            memcpy(pool.failed_text, error_text, sizeof error_text);
        }
        pthread_mutex_unlock(&pool.lock);
        atomic_store(&pool.next, pool.tasks);
    }
}

static void *worker_main(void *argument)
{
    int worker = (int)(intptr_t)argument;
    size_t seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.round == seen && !pool.stop) pthread_cond_wait(&pool.start, &pool.lock);
        if (pool.stop) break;
        seen = pool.round;
        pthread_mutex_unlock(&pool.lock);
        run_tasks(worker);
        pthread_mutex_lock(&pool.lock);
        if (--pool.busy == 0) pthread_cond_signal(&pool.done);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

static int parallel_for(size_t tasks, task_function *work, void *context)
{
    pthread_mutex_lock(&pool.lock);
    pool.work = work;
    pool.context = context;
    pool.tasks = tasks;
    pool.failed_task = SIZE_MAX;
    atomic_store(&pool.next, 0);
    int helpers = tasks > 1 && pool.workers > 1;
    if (helpers) {
        pool.busy = pool.workers - 1;
        pool.round++;
        pthread_cond_broadcast(&pool.start);
    }
    pthread_mutex_unlock(&pool.lock);
    run_tasks(0);
    pthread_mutex_lock(&pool.lock);
    while (helpers && pool.busy > 0) pthread_cond_wait(&pool.done, &pool.lock);
    int status = pool.failed_task == SIZE_MAX ? SC_OK : pool.failed_status;
    if (status != SC_OK) memcpy(error_text, pool.failed_text, sizeof error_text);
    pthread_mutex_unlock(&pool.lock);
    return status;
}

void sc_threads_stop(void)
{
    pthread_mutex_lock(&pool.lock);
    pool.stop = 1;
    pthread_cond_broadcast(&pool.start);
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; i + 1 < pool.workers; i++) pthread_join(pool.thread[i], NULL);
    free(pool.thread);
    pool.thread = NULL;
    pool.workers = 1;
    pool.stop = 0;
    pool.round = 0;
}

int sc_threads_start(int threads)
{
    sc_threads_stop();
    if (threads <= 0) threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (threads < 1) threads = 1;
    if (threads > SC_MAX_THREADS) threads = SC_MAX_THREADS;
    pool.thread = new_array((size_t)threads, sizeof *pool.thread);
    if (!pool.thread) return SC_FAILED;
    for (int i = 1; i < threads; i++) {
        int error = pthread_create(&pool.thread[i - 1], NULL, worker_main, (void *)(intptr_t)i);
        if (error) {
            sc_threads_stop();
            return fail("thread %d of %d could not be started: %s", i + 1, threads,
                        strerror(error));
        }
        pool.workers = i + 1;
    }
    return SC_OK;
}
/* ============================================================================================
 * 3. Numbers
 *
 * Everything that decides a bit of a result: the fused multiply-add, the order of every sum, exp,
 * log, GELU and the random numbers. Built from IEEE operations alone, so that every machine,
 * compiler and C library gives the same bits. The loops here are the definitions; the kernels of
 * section 4 are the same sums done faster, and the tests hold them to these bit for bit.
 * ============================================================================================ */

#if defined(__FAST_MATH__) || !defined(FLT_EVAL_METHOD) || FLT_EVAL_METHOD != 0
#error "saeclip needs IEEE arithmetic: no -ffast-math; 32-bit x86: -msse2 -mfpmath=sse"
#endif

enum {
    CHAIN = 256,                     /* terms of a matrix product that one chain of fma adds up */
    PARTIALS = 16                    /* interleaved partial sums of a dot product */
};

/* Rows in memory are padded with zeros to whole groups of 16 floats. */
static size_t padded(size_t n) { return (n + PARTIALS - 1) / PARTIALS * PARTIALS; }

/* a * b + c, rounded once. Where the hardware cannot, in double: the product is exact there, and
 * the sum is rounded to odd, so that rounding it again to float errs nowhere (Boldo and Melquiond,
 * "Emulation of FMA and correctly rounded sums", 2008). */
static inline float fma32(float a, float b, float c)
{
#ifdef __FP_FAST_FMAF
    return fmaf(a, b, c);
#else
    double product = (double)a * b, sum = product + c;
    double back = sum - product;
    double error = (product - (sum - back)) + (c - back);
    if (error > 0 || error < 0) {
        uint64_t bits;
        memcpy(&bits, &sum, sizeof bits);
        if (!(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : (uint64_t)-1;
        memcpy(&sum, &bits, sizeof sum);
    }
    return (float)sum;
#endif
}

/* Joins 16 partial sums. p: [16], overwritten. */
static inline float join(float *p)
{
    for (int h = 8; h > 0; h /= 2)
        for (int i = 0; i < h; i++) p[i] += p[i + h];
    return p[0];
}

/* sum_e a[e] b[e]: element e goes to partial sum e mod 16. a, b: [n] */
float sc_dot_plain(const float *a, const float *b, size_t n)
{
    float p[PARTIALS] = { 0 };
    for (size_t e = 0; e < n; e++) p[e % PARTIALS] = fma32(a[e], b[e], p[e % PARTIALS]);
    return join(p);
}

/* c = a b + bias + residual. a: [M, K]; b: [K, N]; bias: [N] or NULL; residual, c: [M, N] or NULL */
void sc_matmul_plain(size_t M, size_t N, size_t K, const float *a, const float *b,
                     const float *bias, const float *residual, float *c)
{
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            float sum = 0;
            for (size_t block = 0; block < K; block += CHAIN) {
                float chain = 0;
                for (size_t k = block; k < K && k < block + CHAIN; k++)
                    chain = fma32(a[i * K + k], b[k * N + j], chain);
                sum += chain;
            }
            if (bias) sum += bias[j];
            if (residual) sum += residual[i * N + j];
            c[i * N + j] = sum + 0.0f;
        }
}

/* e^x within 1 unit in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts of
 * which the first has 9 bits so that n times it is exact; e^r by its Taylor polynomial of degree
 * 7; 2^n in two factors so that results below the normal range are rounded once. */
static inline float exp32(float x)
{
    const float magic = 12582912.0f;                    /* 1.5 * 2^23: adding it rounds */
    float clipped = x > -104.0f ? x : -104.0f;          /* also NaN, which no integer can hold */
    clipped = clipped > 89.0f ? 89.0f : clipped;
    float n = (clipped * 1.44269504f + magic) - magic;
    float r = (clipped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    int32_t whole = (int32_t)n, half = whole >> 1;
    int32_t bits1 = (half + 127) << 23, bits2 = (whole - half + 127) << 23;
    float scale1, scale2;
    memcpy(&scale1, &bits1, sizeof scale1);
    memcpy(&scale2, &bits2, sizeof scale2);
    return x != x ? x : p * scale1 * scale2;
}

/* x sigmoid(1.702 x), CLIP's activation (Radford et al., 2021). */
static inline float quick_gelu(float x) { return x / (1.0f + exp32(-1.702f * x)); }

/* x Phi(x), Phi the normal distribution (Hendrycks and Gimpel, 2016). With z = |x| / sqrt 2 and
 * t = 1 / (1 + z / 2): erfc(z) / 2 = t exp(-z^2) P(t), P fitted (tests/golden/fit_gelu.py) with a
 * relative error below 5e-8 for z in [0, 10]; so the left tail keeps its relative precision. */
static inline float gelu(float x)
{
    float a = x < 0 ? -x : x;
    float t = 1.0f / (1.0f + 0.353553391f * a);
    float p = -0.0295332961f;
    p = p * t + 0.142282099f;
    p = p * t - 0.243589566f;
    p = p * t + 0.139022511f;
    p = p * t - 0.0133057167f;
    p = p * t + 0.101340618f;
    p = p * t + 0.12155255f;
    p = p * t + 0.141187568f;
    p = p * t + 0.141043214f;
    float tail = t * exp32(-0.5f * a * a) * p;
    return x * (x < 0 ? tail : 1.0f - tail);
}

/* ln x for finite x > 0: x = 2^e m with m in [1/sqrt 2, sqrt 2), ln m = 2 atanh s by its series,
 * s = (m - 1) / (m + 1). */
static double log64(double x)
{
    int exponent;
    double m = frexp(x, &exponent);                     /* exact: m in [1/2, 1) */
    if (m < 0.70710678118654752) {
        m *= 2;
        exponent--;
    }
    double s = (m - 1) / (m + 1), s2 = s * s, sum = 0;
    for (int k = 25; k >= 3; k -= 2) sum = (sum + 1.0 / k) * s2;
    return exponent * 0.69314718055994531 + 2 * (s + s * sum);
}

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random
 * words from a key (the seed) and a counter; the counter's upper half names the stream. */
enum { STREAM_W_ENC = 1, STREAM_W_DEC, STREAM_ORDER };

static void philox(uint64_t seed, uint64_t stream, uint64_t position, uint32_t out[4])
{
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32);
    uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
        c3 = (uint32_t)p0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Number `index` of a stream, uniform in [-1, 1): 2 u - 1 with u = (r >> 8) 2^-24. */
static float uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t r[4];
    philox(seed, stream, index / 4, r);
    return (float)(r[index % 4] >> 8) * 0x1p-23f - 1.0f;
}

/* A permutation of 0 .. n - 1 (Fisher and Yates), number `epoch` of the seed's. order: [n] */
static void permutation(uint64_t seed, uint64_t epoch, uint64_t *order, size_t n)
{
    uint32_t r[4];
    for (size_t i = 0; i < n; i++) order[i] = i;
    for (size_t i = n; i > 1; i--) {
        philox(seed, STREAM_ORDER + (epoch << 8), i, r);
        size_t j = (size_t)((((uint64_t)r[1] << 32) | r[0]) % i);
        uint64_t swap = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swap;
    }
}

/* Sums over images are exact, so that shards merge in any order: 128 bits in units of 2^-64. What
 * of a term lies below the unit is cut off. */
typedef struct { uint64_t high, low; } exact_sum;

static void exact_add(exact_sum *sum, exact_sum term)
{
    sum->low += term.low;
    sum->high += term.high + (sum->low < term.low);
}

static void exact_add_float(exact_sum *sum, float value)  /* 0 <= value < 2^63 */
{
    int exponent;
    uint64_t digits = (uint64_t)(frexp(value, &exponent) * 0x1p53);
    int shift = exponent + 11;                             /* value 2^64 = digits 2^shift */
    exact_sum term = { 0, 0 };
    if (shift >= 64) term.high = digits << (shift - 64);
    else if (shift > 0) term = (exact_sum){ digits >> (64 - shift), digits << shift };
    else if (shift > -64) term.low = digits >> -shift;
    exact_add(sum, term);
}

static double exact_value(exact_sum sum)
{
    return (double)sum.high + (double)sum.low * 0x1p-64;
}
/* ============================================================================================
 * 4. Kernels, one set for each instruction set
 *
 * The inner loops, written once over a vector type and compiled once for each instruction set: this
 * file includes itself below with SC_ISA defined, and then only this section is read. Vector lanes
 * run over the columns of a product or over the 16 partial sums, never along a chain, so the lane
 * count changes no bit. Loops without explicit vectors are left to the compiler: they hold only
 * operations that IEEE rounds the same way in every lane.
 * ============================================================================================ */

enum {
    CHAIN_STRIDE = CHAIN + 16,       /* floats between rows of a block of A, off the cache's period */
    MAX_ROWS = 14, MAX_COLUMNS = 32, /* the largest tile of a product */
    MASK_BITS = 64
};

typedef enum { NO_ACTIVATION, QUICK_GELU, ERF_GELU } activation_kind;

/* Where a tile of a product goes, and what is added on the way. Pointers at the tile's corner. */
typedef struct {
    float *c;                        /* [rows, columns], c_stride floats from row to row */
    size_t c_stride;
    const float *bias;               /* [columns], or NULL */
    const float *residual;           /* [rows, columns] at residual_stride, or NULL; may be c */
    size_t residual_stride;
    activation_kind activation;
} tile_target;

/* Adam's scalars of one step (Kingma and Ba, 2015): step_size = lr / (1 - beta1^t),
 * root_scale = 1 / sqrt(1 - beta2^t). */
typedef struct { float step_size, root_scale; } adam_step;

typedef struct {
    const char *name;
    int rows, columns;               /* of a product's tile */
    void (*tile)(size_t K, const float *a, const float *b, float *tile);
    void (*finish)(const float *tile, size_t rows, size_t columns, const tile_target *to);
    float (*dot)(const float *a, const float *b, size_t n);
    void (*dots)(const float *a, size_t n, const float *rows, size_t stride, const uint32_t *index,
                 size_t count, float *out);
    void (*add_scaled)(float factor, const float *x, float *sum, size_t n);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float epsilon,
                       float *out, size_t n);
    void (*softmax)(float *row, size_t n, float scale);
    void (*exponentials)(float *row, size_t n);
    size_t (*pack_positive)(const float *row, size_t n, uint64_t *mask, float *out);
    int (*find_above)(const float *row, const float *limit, size_t n, uint64_t *mask);
    void (*unit_row)(float *row, size_t n);
    void (*adam)(float *w, float *m, float *v, const float *gradient, size_t n, adam_step step);
} kernel_set;

#endif /* !SC_ISA */

#ifdef SC_ISA
static const float KERNEL(zeros)[PARTIALS] = { 0 };

/* One tile of a product. a: [ceil(K / CHAIN)][ROWS][CHAIN_STRIDE]; b: [K][COLUMNS];
 * tile: [ROWS][COLUMNS], the chains' sum */
SC_TARGET static void KERNEL(tile)(size_t K, const float *a, const float *b, float *tile)
{
    for (size_t block = 0; block < K; block += CHAIN, a += SC_TILE_ROWS * CHAIN_STRIDE) {
        size_t terms = K - block < CHAIN ? K - block : CHAIN;
        SC_V chain[SC_TILE_ROWS][SC_VECTORS];
        SC_UNROLL for (int r = 0; r < SC_TILE_ROWS; r++)
            SC_UNROLL for (int v = 0; v < SC_VECTORS; v++) chain[r][v] = SC_SET(0.0f);
        for (size_t k = 0; k < terms; k++, b += SC_VECTORS * SC_LANES) {
            SC_V column[SC_VECTORS];
            SC_UNROLL for (int v = 0; v < SC_VECTORS; v++) column[v] = SC_LOAD(b + v * SC_LANES);
            SC_UNROLL for (int r = 0; r < SC_TILE_ROWS; r++) {
                SC_V factor = SC_SET(a[r * CHAIN_STRIDE + k]);
                SC_UNROLL for (int v = 0; v < SC_VECTORS; v++)
                    chain[r][v] = SC_FMA(factor, column[v], chain[r][v]);
            }
        }
        SC_UNROLL for (int r = 0; r < SC_TILE_ROWS; r++)
            SC_UNROLL for (int v = 0; v < SC_VECTORS; v++) {
                float *sum = tile + (r * SC_VECTORS + v) * SC_LANES;
                SC_STORE(sum, block ? SC_ADD(SC_LOAD(sum), chain[r][v]) : chain[r][v]);
            }
    }
}

/* c = activation(tile + bias + residual + 0). tile: [rows][COLUMNS] */
SC_TARGET static inline void KERNEL(finish_rows)(const float *tile, size_t rows, size_t columns,
                                                 const tile_target *to)
{
    for (size_t r = 0; r < rows; r++) {
        float sum[SC_VECTORS * SC_LANES];
        const float *residual = to->residual ? to->residual + r * to->residual_stride : NULL;
        for (size_t j = 0; j < columns; j++) sum[j] = tile[r * SC_VECTORS * SC_LANES + j];
        for (size_t j = 0; to->bias && j < columns; j++) sum[j] += to->bias[j];
        for (size_t j = 0; residual && j < columns; j++) sum[j] += residual[j];
        for (size_t j = 0; j < columns; j++) sum[j] += 0.0f;
        if (to->activation == QUICK_GELU)
            for (size_t j = 0; j < columns; j++) sum[j] = quick_gelu(sum[j]);
        if (to->activation == ERF_GELU)
            for (size_t j = 0; j < columns; j++) sum[j] = gelu(sum[j]);
        memcpy(to->c + r * to->c_stride, sum, columns * sizeof *sum);
    }
}

/* The full width is a constant, so that its loops are all vectors. */
SC_TARGET static void KERNEL(finish)(const float *tile, size_t rows, size_t columns,
                                     const tile_target *to)
{
    if (columns == SC_VECTORS * SC_LANES)
        KERNEL(finish_rows)(tile, rows, SC_VECTORS * SC_LANES, to);
    else KERNEL(finish_rows)(tile, rows, columns, to);
}

/* sum_e a[e] b[e] by 16 partial sums. a, b: [n], n a multiple of 16 */
SC_TARGET static float KERNEL(dot)(const float *a, const float *b, size_t n)
{
    SC_V partial[PARTIALS / SC_LANES];
    float p[PARTIALS];
    SC_UNROLL for (int v = 0; v < PARTIALS / SC_LANES; v++) partial[v] = SC_SET(0.0f);
    for (size_t e = 0; e < n; e += PARTIALS)
        SC_UNROLL for (int v = 0; v < PARTIALS / SC_LANES; v++)
            partial[v] = SC_FMA(SC_LOAD(a + e + v * SC_LANES), SC_LOAD(b + e + v * SC_LANES),
                                partial[v]);
    SC_UNROLL for (int v = 0; v < PARTIALS / SC_LANES; v++) SC_STORE(p + v * SC_LANES, partial[v]);
    return join(p);
}

/* out[i] = the dot product of a with row index[i]: four at a time, so that the sums overlap.
 * a: [n]; rows: [.., stride]; index, out: [count] */
SC_TARGET static void KERNEL(dots)(const float *a, size_t n, const float *rows, size_t stride,
                                   const uint32_t *index, size_t count, float *out)
{
    enum { TOGETHER = 4 };
    size_t i = 0;
    for (; i + TOGETHER <= count; i += TOGETHER) {
        SC_V partial[TOGETHER][PARTIALS / SC_LANES];
        float p[PARTIALS];
        SC_UNROLL for (int r = 0; r < TOGETHER; r++)
            SC_UNROLL for (int v = 0; v < PARTIALS / SC_LANES; v++) partial[r][v] = SC_SET(0.0f);
        for (size_t e = 0; e < n; e += PARTIALS)
            SC_UNROLL for (int v = 0; v < PARTIALS / SC_LANES; v++) {
                SC_V factor = SC_LOAD(a + e + v * SC_LANES);
                SC_UNROLL for (int r = 0; r < TOGETHER; r++)
                    partial[r][v] = SC_FMA(
                        factor, SC_LOAD(rows + index[i + r] * stride + e + v * SC_LANES),
                        partial[r][v]);
            }
        SC_UNROLL for (int r = 0; r < TOGETHER; r++) {
            SC_UNROLL for (int v = 0; v < PARTIALS / SC_LANES; v++)
                SC_STORE(p + v * SC_LANES, partial[r][v]);
            out[i + r] = join(p);
        }
    }
    for (; i < count; i++) out[i] = KERNEL(dot)(a, rows + index[i] * stride, n);
}

/* sum = fma(factor, x, sum), one link of n chains. x, sum: [n], n a multiple of 16 */
SC_TARGET static void KERNEL(add_scaled)(float factor, const float *x, float *sum, size_t n)
{
    SC_V f = SC_SET(factor);
    for (size_t e = 0; e < n; e += SC_LANES)
        SC_STORE(sum + e, SC_FMA(f, SC_LOAD(x + e), SC_LOAD(sum + e)));
}

/* Sum of a row by 16 partial sums. row: [n] */
SC_TARGET static float KERNEL(row_sum)(const float *row, size_t n)
{
    float p[PARTIALS] = { 0 };
    size_t whole = n / PARTIALS * PARTIALS;
    for (size_t e = 0; e < whole; e += PARTIALS)
        for (int i = 0; i < PARTIALS; i++) p[i] += row[e + i];
    for (size_t e = whole; e < n; e++) p[e - whole] += row[e];
    return join(p);
}

/* out = (x - mean) / sqrt(variance + epsilon) * weight + bias (Ba, Kiros and Hinton, 2016).
 * x, weight, bias: [n]; out: [n], padded with zeros */
SC_TARGET static void KERNEL(layer_norm)(const float *x, const float *weight, const float *bias,
                                         float epsilon, float *out, size_t n)
{
    float mean = KERNEL(row_sum)(x, n) / (float)n;
    for (size_t e = 0; e < n; e++) out[e] = x[e] - mean;
    for (size_t e = n; e < padded(n); e++) out[e] = 0;
    float variance = KERNEL(dot)(out, out, padded(n)) / (float)n;
    float scale = 1.0f / sqrtf(variance + epsilon);
    for (size_t e = 0; e < n; e++) out[e] = out[e] * scale * weight[e] + bias[e];
}

/* row = exp(scale (row - max)) / sum of these. row: [n] */
SC_TARGET static void KERNEL(softmax)(float *row, size_t n, float scale)
{
    float largest = row[0];
    for (size_t e = 1; e < n; e++) largest = row[e] > largest ? row[e] : largest;
    for (size_t e = 0; e < n; e++) row[e] = exp32(scale * (row[e] - largest));
    float sum = KERNEL(row_sum)(row, n);
    for (size_t e = 0; e < n; e++) row[e] /= sum;
}

SC_TARGET static void KERNEL(exponentials)(float *row, size_t n)
{
    for (size_t e = 0; e < n; e++) row[e] = exp32(row[e]);
}

/* ReLU into sparse form: bit e of mask says whether row[e] > 0, out gets those values in order.
 * row: [n], n a multiple of 64; returns how many there are; out has room for n */
SC_TARGET static size_t KERNEL(pack_positive)(const float *row, size_t n, uint64_t *mask, float *out)
{
    size_t count = 0;
    for (size_t e = 0; e < n; e += SC_GROUP) {
        uint64_t bits = SC_ABOVE(row + e, KERNEL(zeros));
        if (e % MASK_BITS == 0) mask[e / MASK_BITS] = 0;
        mask[e / MASK_BITS] |= bits << (e % MASK_BITS);
        SC_COMPRESS(out + count, row + e, bits);
        count += (size_t)SC_POPCOUNT(bits);
    }
    return count;
}

/* Bit e of mask says whether row[e] > limit[e]; returns whether any is. row, limit: [n], n a
 * multiple of 64 */
SC_TARGET static int KERNEL(find_above)(const float *row, const float *limit, size_t n,
                                        uint64_t *mask)
{
    uint64_t any = 0;
    for (size_t e = 0; e < n; e += MASK_BITS) {
        uint64_t bits = 0;
        for (int i = 0; i < MASK_BITS; i += SC_GROUP)
            bits |= (uint64_t)SC_ABOVE(row + e + i, limit + e + i) << i;
        mask[e / MASK_BITS] = bits;
        any |= bits;
    }
    return any != 0;
}

/* row /= ||row||, a row of zeros stays. row: [n], n a multiple of 16 */
SC_TARGET static void KERNEL(unit_row)(float *row, size_t n)
{
    float norm = sqrtf(KERNEL(dot)(row, row, n));
    if (norm > 0)
        for (size_t e = 0; e < n; e++) row[e] /= norm;
}

/* m = 0.9 m + 0.1 g;  v = 0.999 v + 0.001 g^2;  w -= step_size m / (sqrt(v) root_scale + 1e-8).
 * w, m, v, gradient: [n] */
SC_TARGET static void KERNEL(adam)(float *w, float *m, float *v, const float *gradient, size_t n,
                                   adam_step step)
{
    for (size_t e = 0; e < n; e++) {
        float g = gradient[e];
        m[e] = 0.9f * m[e] + 0.1f * g;
        v[e] = 0.999f * v[e] + 0.001f * (g * g);
        w[e] -= step.step_size * (m[e] / (sqrtf(v[e]) * step.root_scale + 1e-8f));
    }
}

static const kernel_set KERNEL(kernels) = {
    TEXT_OF(SC_ISA), SC_TILE_ROWS, SC_VECTORS * SC_LANES, KERNEL(tile), KERNEL(finish), KERNEL(dot),
    KERNEL(dots), KERNEL(add_scaled), KERNEL(layer_norm), KERNEL(softmax), KERNEL(exponentials),
    KERNEL(pack_positive), KERNEL(find_above), KERNEL(unit_row), KERNEL(adam)
};

#else /* !SC_ISA */

#if defined(__clang__)
#define SC_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define SC_UNROLL _Pragma("GCC unroll 32")
#else
#define SC_UNROLL
#endif

/* What the kernels are written in: each word stands for that of the instruction set at hand. */
#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)
#define TEXT_OF2(a) #a
#define TEXT_OF(a) TEXT_OF2(a)
#define KERNEL(name) PASTE(name, SC_ISA)
#define SC_TARGET PASTE(TARGET, SC_ISA)
#define SC_TILE_ROWS PASTE(TILE_ROWS, SC_ISA)    /* rows of a product's tile */
#define SC_VECTORS PASTE(VECTORS, SC_ISA)        /* vectors side by side in a tile's row */
#define SC_LANES PASTE(LANES, SC_ISA)            /* floats in a vector */
#define SC_GROUP PASTE(GROUP, SC_ISA)            /* floats that ABOVE compares at once */
#define SC_V PASTE(V, SC_ISA)
#define SC_SET PASTE(SET, SC_ISA)
#define SC_LOAD PASTE(LOAD, SC_ISA)
#define SC_STORE PASTE(STORE, SC_ISA)
#define SC_ADD PASTE(ADD, SC_ISA)
#define SC_FMA PASTE(FMA, SC_ISA)
#define SC_ABOVE PASTE(ABOVE, SC_ISA)            /* bit i: p[i] > q[i] */
#define SC_COMPRESS PASTE(COMPRESS, SC_ISA)      /* the floats of p whose bits are set, together */
#define SC_POPCOUNT PASTE(POPCOUNT, SC_ISA)

/* Plain C: a vector of one. */
#define TILE_ROWS_scalar 4
#define VECTORS_scalar 4
#define LANES_scalar 1
#define GROUP_scalar 1
#define TARGET_scalar
#define V_scalar float
#define SET_scalar(x) (x)
#define LOAD_scalar(p) (*(p))
#define STORE_scalar(p, v) (*(p) = (v))
#define ADD_scalar(a, b) ((a) + (b))
#define FMA_scalar(a, b, c) fma32(a, b, c)
#define ABOVE_scalar(p, q) (*(p) > *(q))
#define COMPRESS_scalar(out, p, bits) (*(out) = *(p))
#define POPCOUNT_scalar(bits) (bits)
#define SC_ISA scalar
#include "saeclip.c"
#undef SC_ISA

/* The instruction sets that need extensions of the language: intrinsics, nowhere else. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* The floats of p whose bits are set, moved together. */
#define TARGET_AVX2 __attribute__((target("avx2,fma,bmi2,popcnt")))
TARGET_AVX2 static inline void compress8(float *out, const float *p, unsigned bits)
{
    uint64_t bytes = _pdep_u64(bits, 0x0101010101010101u) * 0xFF;
    uint64_t from = _pext_u64(0x0706050403020100u, bytes);
    __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)from));
    _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index));
}

#define TILE_ROWS_avx2 6
#define VECTORS_avx2 2
#define LANES_avx2 8
#define GROUP_avx2 8
#define TARGET_avx2 TARGET_AVX2
#define V_avx2 __m256
#define SET_avx2(x) _mm256_set1_ps(x)
#define LOAD_avx2(p) _mm256_loadu_ps(p)
#define STORE_avx2(p, v) _mm256_storeu_ps(p, v)
#define ADD_avx2(a, b) _mm256_add_ps(a, b)
#define FMA_avx2(a, b, c) _mm256_fmadd_ps(a, b, c)
#define ABOVE_avx2(p, q)                                                                             \
    (unsigned)_mm256_movemask_ps(                                                                  \
        _mm256_cmp_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(q), _CMP_GT_OQ))
#define COMPRESS_avx2(out, p, bits) compress8(out, p, (unsigned)(bits))
#define POPCOUNT_avx2(bits) _mm_popcnt_u32((unsigned)(bits))
#define SC_ISA avx2
#include "saeclip.c"
#undef SC_ISA

#define TILE_ROWS_avx512 14
#define VECTORS_avx512 2
#define LANES_avx512 16
#define GROUP_avx512 16
#define TARGET_avx512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")))
#define V_avx512 __m512
#define SET_avx512(x) _mm512_set1_ps(x)
#define LOAD_avx512(p) _mm512_loadu_ps(p)
#define STORE_avx512(p, v) _mm512_storeu_ps(p, v)
#define ADD_avx512(a, b) _mm512_add_ps(a, b)
#define FMA_avx512(a, b, c) _mm512_fmadd_ps(a, b, c)
#define ABOVE_avx512(p, q)                                                                             \
    (unsigned)_mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_loadu_ps(q), _CMP_GT_OQ)
#define COMPRESS_avx512(out, p, bits)                                                                  \
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps((__mmask16)(bits), _mm512_loadu_ps(p)))
#define POPCOUNT_avx512(bits) _mm_popcnt_u32((unsigned)(bits))
#define SC_ISA avx512
#include "saeclip.c"
#undef SC_ISA

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
           && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

static int has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

#define TILE_ROWS_neon 8
#define VECTORS_neon 3
#define LANES_neon 4
#define GROUP_neon 1
#define TARGET_neon
#define V_neon float32x4_t
#define SET_neon(x) vdupq_n_f32(x)
#define LOAD_neon(p) vld1q_f32(p)
#define STORE_neon(p, v) vst1q_f32(p, v)
#define ADD_neon(a, b) vaddq_f32(a, b)
#define FMA_neon(a, b, c) vfmaq_f32(c, a, b)
#define ABOVE_neon(p, q) (*(p) > *(q))
#define COMPRESS_neon(out, p, bits) (*(out) = *(p))
#define POPCOUNT_neon(bits) (bits)
#define SC_ISA neon
#include "saeclip.c"
#undef SC_ISA

static int has_neon(void) { return 1; }
#endif

static int has_plain_c(void) { return 1; }

/* What this build holds, the fastest first. */
static const struct { const kernel_set *set; int (*usable)(void); } instruction_sets[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    { &kernels_avx512, has_avx512 },
    { &kernels_avx2, has_avx2 },
#elif defined(__aarch64__) && defined(__ARM_NEON)
    { &kernels_neon, has_neon },
#endif
    { &kernels_scalar, has_plain_c },
};

static const kernel_set *kernels = &kernels_scalar;

/* Refuses a build that fuses a multiplication and an addition where the source does not. */
static int check_arithmetic(void)
{
    volatile float a = 1.0f + 0x1p-12f, b = -(1.0f + 0x1p-11f), one = a;
    volatile double c = 1.0 + 0x1p-27, d = -(1.0 + 0x1p-26), two = c;
    if (a * one + b != 0 || c * two + d != 0)
        return fail("this build contracts a * b + c: compile with -ffp-contract=off");
    return SC_OK;
}

int sc_instruction_set(const char *name)
{
    size_t count = sizeof instruction_sets / sizeof *instruction_sets;
    SC_TRY(check_arithmetic());
    for (size_t i = 0; i < count; i++)
        if ((!name || strcmp(name, instruction_sets[i].set->name) == 0)
            && instruction_sets[i].usable()) {
            kernels = instruction_sets[i].set;
            return SC_OK;
        }
    return usage("SAECLIP_ISA=%s: this machine or build has not got it (avx512, avx2, neon, "
                 "scalar are known)", name);
}

/* --------------------------------------------------------------------------------------------
 * Matrix products. B is packed once into panels as wide as the kernel's tile, [panels][K][columns];
 * A is copied, a tile's rows at a time, into a buffer with fixed strides; threads share out blocks
 * of rows and panels.
 * -------------------------------------------------------------------------------------------- */

typedef sc_matrix packed_matrix;     /* data: [panels][K][kernels->columns], 0 past column N */

static size_t panels_of(size_t N)
{
    return (N + (size_t)kernels->columns - 1) / (size_t)kernels->columns;
}

/* Room for a [K, N] matrix, all 0. */
static int new_packed(packed_matrix *b, size_t K, size_t N)
{
    *b = (packed_matrix){ .K = K, .N = N, .panels = panels_of(N) };
    if (K != 0 && b->panels > SIZE_MAX / sizeof(float) / (size_t)kernels->columns / K)
        return fail("out of memory: a matrix of %zu x %zu cannot be addressed", K, N);
    b->data = new_array(b->panels * K * (size_t)kernels->columns, sizeof *b->data);
    return b->data ? SC_OK : SC_FAILED;
}

/* Packs panels first .. last - 1 of the matrix whose element (k, j) is w[k * k_stride + j * j_stride]. */
static void pack_panels(packed_matrix *b, size_t first, size_t last, const float *w,
                        size_t k_stride, size_t j_stride)
{
    size_t columns = (size_t)kernels->columns;
    for (size_t panel = first; panel < last; panel++) {
        size_t j0 = panel * columns, width = b->N - j0 < columns ? b->N - j0 : columns;
        float *out = b->data + panel * b->K * columns;
        if (j_stride == 1)
            for (size_t k = 0; k < b->K; k++)
                memcpy(out + k * columns, w + k * k_stride + j0, width * sizeof *w);
        else
            for (size_t j = 0; j < width; j++)
                for (size_t k = 0; k < b->K; k++)
                    out[k * columns + j] = w[k * k_stride + (j0 + j) * j_stride];
    }
}

static size_t chains_of(size_t K) { return (K + CHAIN - 1) / CHAIN; }

/* Floats in a buffer for a tile's rows of A. */
static size_t row_buffer_size(size_t K)
{
    return chains_of(K) * (size_t)kernels->rows * CHAIN_STRIDE;
}

/* Copies rows of A for the kernel: the first ones, or those in `index`. a: [rows, K] at a_stride;
 * index: [rows] or NULL; buffer: [chains][ROWS][CHAIN_STRIDE] */
static void load_rows(float *buffer, const float *a, size_t a_stride, const size_t *index,
                      size_t rows, size_t K)
{
    size_t tile_rows = (size_t)kernels->rows;
    for (size_t block = 0; block < K; block += CHAIN, buffer += tile_rows * CHAIN_STRIDE) {
        size_t terms = K - block < CHAIN ? K - block : CHAIN;
        for (size_t r = 0; r < rows; r++)
            memcpy(buffer + r * CHAIN_STRIDE, a + (index ? index[r] : r) * a_stride + block,
                   terms * sizeof *a);
        for (size_t r = rows; r < tile_rows; r++)
            memset(buffer + r * CHAIN_STRIDE, 0, terms * sizeof *a);
    }
}

/* Rows of c = a b: one thread's share. a: [rows, K]; to: rows and all columns of the panels
 * first .. last - 1, its pointers at column 0 of the whole product */
static void product_rows(const float *a, size_t a_stride, size_t rows, const packed_matrix *b,
                         size_t first, size_t last, const tile_target *to, float *buffer)
{
    size_t tile_rows = (size_t)kernels->rows, columns = (size_t)kernels->columns;
    float tile[MAX_ROWS * MAX_COLUMNS];
    for (size_t i = 0; i < rows; i += tile_rows) {
        size_t height = rows - i < tile_rows ? rows - i : tile_rows;
        load_rows(buffer, a + i * a_stride, a_stride, NULL, height, b->K);
        for (size_t panel = first; panel < last; panel++) {
            size_t j = panel * columns, width = b->N - j < columns ? b->N - j : columns;
            tile_target corner = *to;
            corner.c += i * to->c_stride + j;
            if (to->bias) corner.bias += j;
            if (to->residual) corner.residual += i * to->residual_stride + j;
            kernels->tile(b->K, buffer, b->data + panel * b->K * columns, tile);
            kernels->finish(tile, height, width, &corner);
        }
    }
}

typedef struct {
    const float *a;                  /* [M, K], a_stride floats from row to row */
    size_t M, a_stride;
    const packed_matrix *b;          /* [K, N] */
    tile_target to;                  /* [M, N] */
    size_t row_step, panel_step;     /* a task's share */
    float *buffer;                   /* [workers][row_buffer_size(K)] */
} product;

static int product_task(void *context, size_t task, int worker)
{
    const product *p = context;
    size_t row_tasks = (p->M + p->row_step - 1) / p->row_step;
    size_t row = task % row_tasks * p->row_step, panel = task / row_tasks * p->panel_step;
    size_t rows = p->M - row < p->row_step ? p->M - row : p->row_step;
    size_t last = panel + p->panel_step < p->b->panels ? panel + p->panel_step : p->b->panels;
    tile_target to = p->to;
    to.c += row * to.c_stride;
    if (to.residual) to.residual += row * to.residual_stride;
    product_rows(p->a + row * p->a_stride, p->a_stride, rows, p->b, panel, last, &to,
                 p->buffer + (size_t)worker * row_buffer_size(p->b->K));
    return SC_OK;
}

/* c = activation(a b + bias + residual), over all threads. A share's panels fit half of a common
 * second-level cache; there are at least four shares a thread where the shape allows. */
static int multiply(const float *a, size_t M, size_t a_stride, const packed_matrix *b,
                    tile_target to)
{
    size_t panel_bytes = b->K * (size_t)kernels->columns * sizeof(float);
    size_t tile_rows = (size_t)kernels->rows, wanted = 4 * (size_t)thread_count();
    product p = { .a = a, .M = M, .a_stride = a_stride, .b = b, .to = to };
    if (M == 0 || b->N == 0) return SC_OK;
    p.panel_step = ((size_t)384 << 10) / (panel_bytes + 1) + 1;
    if (p.panel_step > b->panels) p.panel_step = b->panels;
    size_t panel_tasks = (b->panels + p.panel_step - 1) / p.panel_step;
    size_t row_tasks = (wanted + panel_tasks - 1) / panel_tasks;
    size_t groups = (M + tile_rows - 1) / tile_rows;
    p.row_step = (groups + row_tasks - 1) / row_tasks * tile_rows;
    row_tasks = (M + p.row_step - 1) / p.row_step;
    p.buffer = new_array((size_t)thread_count() * row_buffer_size(b->K), sizeof *p.buffer);
    if (!p.buffer) return SC_FAILED;
    int status = parallel_for(row_tasks * panel_tasks, product_task, &p);
    free(p.buffer);
    return status;
}
/* ============================================================================================
 * 4. Files
 *
 * Bytes and digests, JSON, safetensors in, atomic output, safetensors out.
 *
 * A safetensors file is 8 bytes with the size of the header, the header, and the tensors' data
 * without gaps, all little-endian. The header is a JSON object of three levels:
 *     {"__metadata__": {"key": "value", ...},
 *      "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
 * (github.com/huggingface/safetensors). Files come from strangers: nothing in them is believed
 * before it is checked, and memory is bounded by the header that is really there.
 * ============================================================================================ */

/* --- Numbers as bytes, little-endian --- */

static uint32_t load16(const unsigned char *from) { return from[0] | (uint32_t)from[1] << 8; }

static uint32_t load32(const unsigned char *from) { return load16(from) | load16(from + 2) << 16; }

static uint64_t load64(const unsigned char *from)
{
    return load32(from) | (uint64_t)load32(from + 4) << 32;
}

/* Copies count numbers of size bytes from the machine's byte order to the files', or back. */
static void copy_numbers(void *to, const void *from, size_t count, size_t size)
{
    const uint32_t one = 1;
    unsigned char lowest, *out = to;
    const unsigned char *in = from;
    memcpy(&lowest, &one, 1);
    if (lowest == 1 && count > 0) memcpy(out, in, count * size);
    if (lowest == 1) return;
    for (size_t i = 0; i < count * size; i += size)
        for (size_t b = 0; b < size; b++) out[i + b] = in[i + size - 1 - b];
}

static uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* IEEE 754 binary16: sign, 5 bits of exponent (bias 15), 10 of fraction. Exact. */
static float float_of_half(uint32_t half)
{
    uint32_t sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
    float small = float_of_bits(rest + (113u << 23)) - float_of_bits(113u << 23);
    uint32_t bits = rest + ((half & 0x7c00) == 0x7c00 ? 224u << 23 : 112u << 23);
    return float_of_bits(sign | ((half & 0x7c00) == 0 ? bits_of_float(small) : bits));
}

/* Rounds to nearest, ties to even; from 65520 on that is infinity. */
static uint16_t half_of_float(float value)
{
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) rest = 0x7e00;                                 /* not a number */
    else if (rest >= 0x47800000) rest = 0x7c00;                           /* 65536 and beyond */
    else if (rest >= 0x38800000) rest = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
    else rest = bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f);
    return (uint16_t)(sign | rest);    /* the addition just above rounds to units of 2^-24 */
}

enum { LARGEST_FLOAT = 0x7f7fffff, LARGEST_HALF = 0x477fefff };   /* bits; below 65520 */

/* The index of the first value whose magnitude has bits above `largest`, or count if there is none.
 * Infinity and not-a-number are above every number. */
static size_t first_beyond(const float *values, size_t count, uint32_t largest)
{
    uint32_t beyond = 0;
    for (size_t i = 0; i < count; i++)
        beyond |= largest - (bits_of_float(values[i]) & 0x7fffffff);
    if (beyond >> 31 == 0) return count;
    size_t i = 0;
    while ((bits_of_float(values[i]) & 0x7fffffff) <= largest) i++;
    return i;
}

/* A running digest of bytes, against accidents, not against malice: every step is one-to-one in
 * the word it takes in, so a change within one word always shows. Starts as { 0 }. */
typedef struct {
    uint64_t state, length;
    unsigned char tail[8];           /* length % 8 bytes that wait for their word to fill up */
} digest64;

static uint64_t digest64_step(uint64_t state, uint64_t word)
{
    state = (state ^ word) * 0x9e3779b97f4a7c15u;
    return state ^ state >> 32;
}

static void digest64_add(digest64 *digest, const void *bytes, size_t count)
{
    const unsigned char *from = bytes;
    size_t filled = digest->length % 8;
    digest->length += count;
    for (; filled > 0 && count > 0; count--) {
        digest->tail[filled] = *from++;
        filled = (filled + 1) % 8;
        if (filled == 0) digest->state = digest64_step(digest->state, load64(digest->tail));
    }
    for (; count >= 8; count -= 8, from += 8)
        digest->state = digest64_step(digest->state, load64(from));
    if (count > 0) memcpy(digest->tail, from, count);
}

static void digest64_number(digest64 *digest, uint64_t number)
{
    unsigned char bytes[8];
    copy_numbers(bytes, &number, 1, 8);
    digest64_add(digest, bytes, sizeof bytes);
}

/* The digest of all that was added so far; more may follow. */
static uint64_t digest64_value(const digest64 *digest)
{
    unsigned char last[8] = { 0 };
    memcpy(last, digest->tail, digest->length % 8);
    uint64_t state = digest64_step(digest->state, load64(last));
    return digest64_step(digest64_step(state, digest->length), 0);
}

/* --- JSON (RFC 8259), strict; only what safetensors headers and lists of names are made of ---
 *
 * The text is ours and ends with a NUL, which no rule accepts, so it needs no other bound. Strings
 * are decoded in place: that never lengthens them, and the closing quote makes room for a NUL. */

typedef struct {
    const char *what;                /* for errors: whose JSON this is */
    char *text;
    size_t at;
} json;

static int json_expected(const json *j, const char *expected)
{
    return fail("%s: JSON byte %zu: expected %s", j->what, j->at, expected);
}

/* Passes over blanks and then over c, if it comes next. */
static int json_take(json *j, char c)
{
    j->at += strspn(j->text + j->at, " \t\n\r");
    if (j->text[j->at] != c) return 0;
    j->at++;
    return 1;
}

/* Before element `index` of a list that `close` ends: 1 it follows, 0 the list ends, -1 error. */
static int json_next(json *j, size_t index, char close)
{
    if (json_take(j, close)) return 0;
    if (index == 0 || json_take(j, ',')) return 1;
    json_expected(j, close == '}' ? "',' or '}'" : "',' or ']'");
    return -1;
}

/* The length of the UTF-8 character at text, 0 if there is none (Unicode 15, table 3-7). */
static size_t utf8_length(const char *text)
{
    static const struct { unsigned char first, last, second_low, second_high, length; } form[] = {
        { 0x00, 0x7f, 0x00, 0xff, 1 }, { 0xc2, 0xdf, 0x80, 0xbf, 2 },
        { 0xe0, 0xe0, 0xa0, 0xbf, 3 }, { 0xe1, 0xec, 0x80, 0xbf, 3 },
        { 0xed, 0xed, 0x80, 0x9f, 3 }, { 0xee, 0xef, 0x80, 0xbf, 3 },
        { 0xf0, 0xf0, 0x90, 0xbf, 4 }, { 0xf1, 0xf3, 0x80, 0xbf, 4 },
        { 0xf4, 0xf4, 0x80, 0x8f, 4 },
    };
    const unsigned char *byte = (const unsigned char *)text;
    for (size_t f = 0; f < sizeof form / sizeof *form; f++) {
        if (byte[0] < form[f].first || byte[0] > form[f].last) continue;
        if (form[f].length == 1) return 1;
        if (byte[1] < form[f].second_low || byte[1] > form[f].second_high) return 0;
        for (size_t i = 2; i < form[f].length; i++)
            if (byte[i] >> 6 != 2) return 0;
        return form[f].length;
    }
    return 0;
}

/* The value of "\uXXXX" at text, -1 if that is not what stands there. */
static int32_t json_unit(const char *text)
{
    const char *digits = "0123456789abcdef0123456789ABCDEF";
    int32_t value = 0;
    if (text[0] != '\\' || text[1] != 'u') return -1;
    for (int i = 2; i < 6; i++) {
        const char *digit = text[i] ? strchr(digits, text[i]) : NULL;
        if (!digit) return -1;
        value = 16 * value + (int32_t)((digit - digits) % 16);
    }
    return value;
}

/* Decodes the escape at j->at to `to`; returns where the next character goes, or NULL. */
static char *json_escape(json *j, char *to)
{
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    const char *from = j->text + j->at;
    const char *letter = from[1] ? strchr(letters, from[1]) : NULL;
    if (letter) {
        j->at += 2;
        *to++ = meanings[letter - letters];
        return to;
    }
    int32_t code = json_unit(from);
    size_t length = 6;
    if (code >= 0xd800 && code <= 0xdbff) {
        int32_t low = json_unit(from + 6);
        int paired = low >= 0xdc00 && low <= 0xdfff;
        code = paired ? 0x10000 + ((code - 0xd800) << 10) + low - 0xdc00 : -1;
        length = 12;
    }
    if (code <= 0 || (code >= 0xdc00 && code <= 0xdfff)) {
        json_expected(j, "a valid escape (of no NUL and no half of a surrogate pair)");
        return NULL;
    }
    j->at += length;
    int shift = code < 0x80 ? 0 : code < 0x800 ? 6 : code < 0x10000 ? 12 : 18;
    static const unsigned char lead[] = { 0x00, 0xc0, 0xe0, 0xf0 };
    *to++ = (char)(lead[shift / 6] | code >> shift);
    while ((shift -= 6) >= 0) *to++ = (char)(0x80 | (code >> shift & 0x3f));
    return to;
}

static char *json_string(json *j)
{
    if (!json_take(j, '"')) {
        json_expected(j, "a string");
        return NULL;
    }
    char *start = j->text + j->at, *to = start;
    while (to) {
        const char *from = j->text + j->at;
        size_t length = utf8_length(from);
        if (*from == '"') {
            j->at++;
            *to = '\0';
            return start;
        }
        if (*from == '\\') {
            to = json_escape(j, to);
        } else if (length == 0 || (unsigned char)*from < 0x20) {
            json_expected(j, "valid UTF-8 without control characters, then '\"'");
            return NULL;
        } else {
            memmove(to, from, length);
            to += length;
            j->at += length;
        }
    }
    return NULL;
}

/* The key of an object's next member and the colon behind it. */
static char *json_key(json *j)
{
    char *key = json_string(j);
    if (!key || json_take(j, ':')) return key;
    json_expected(j, "':'");
    return NULL;
}

static int json_size(json *j, size_t *value)
{
    j->at += strspn(j->text + j->at, " \t\n\r");
    const char *digits = j->text + j->at;
    size_t length = strspn(digits, "0123456789");
    *value = 0;
    if (length == 0 || (digits[0] == '0' && length > 1))
        return json_expected(j, "a whole number of 0 or more");
    for (size_t i = 0; i < length; i++) {
        size_t digit = (size_t)(digits[i] - '0');
        if (*value > (SIZE_MAX - digit) / 10)
            return json_expected(j, "a number that this machine can address");
        *value = 10 * *value + digit;
    }
    j->at += length;
    return SC_OK;
}

/* text: a JSON array of strings, as metadata hold lists of names. The strings follow the pointers
 * in one block, which free(*out) gives back. */
static int json_string_array(const char *text, const char *what, char ***out, size_t *count)
{
    size_t length = strlen(text), most = 1;
    for (const char *c = text; *c; c++) most += *c == ',';
    char **list = new_array(most * sizeof *list + length + 1, 1);
    if (!list) return SC_FAILED;
    json j = { .what = what, .text = (char *)(list + most) };
    memcpy(j.text, text, length + 1);
    size_t n = 0;
    int more = json_take(&j, '[') ? 1 : -1;
    if (more < 0) json_expected(&j, "'['");
    while (more > 0 && (more = json_next(&j, n, ']')) > 0) {
        list[n] = json_string(&j);
        if (!list[n++]) more = -1;
    }
    if (more == 0 && !json_take(&j, '\0')) more = json_expected(&j, "nothing behind the list");
    if (more != 0) {
        free(list);
        return SC_FAILED;
    }
    *out = list;
    *count = n;
    return SC_OK;
}

/* --- Reading safetensors --- */

enum { MAX_HEADER = 100000000 };     /* the reference implementation's limit */

static const struct { const char *name; size_t size; } dtypes[] = {
    [SC_F32] = { "F32", 4 }, [SC_F16] = { "F16", 2 }, [SC_BF16] = { "BF16", 2 },
    [SC_F64] = { "F64", 8 }, [SC_I64] = { "I64", 8 }, [SC_I32] = { "I32", 4 },
    [SC_U8] = { "U8", 1 }, [SC_BOOL] = { "BOOL", 1 }, [SC_I8] = { "I8", 1 },
    [SC_I16] = { "I16", 2 }, [SC_U16] = { "U16", 2 }, [SC_U32] = { "U32", 4 },
    [SC_U64] = { "U64", 8 }, [SC_C64] = { "C64", 8 }, [SC_F8_E4M3] = { "F8_E4M3", 1 },
    [SC_F8_E5M2] = { "F8_E5M2", 1 }, [SC_F8_E8M0] = { "F8_E8M0", 1 },
    [SC_F8_E4M3FNUZ] = { "F8_E4M3FNUZ", 1 }, [SC_F8_E5M2FNUZ] = { "F8_E5M2FNUZ", 1 },
};

const char *sc_dtype_name(sc_dtype dtype) { return dtypes[dtype].name; }

size_t sc_dtype_size(sc_dtype dtype) { return dtypes[dtype].size; }

/* Sets count and bytes from dtype and shape. A dimension of 0 must not hide that the others cannot
 * be multiplied: whoever reads the shape will. */
static int measure_tensor(sc_tensor *tensor, const char *path)
{
    size_t bytes = dtypes[tensor->dtype].size;
    int empty = 0;
    for (int d = 0; d < tensor->rank; d++) {
        size_t n = tensor->shape[d];
        if (n == 0) empty = 1;
        else if (bytes <= SIZE_MAX / n) bytes *= n;
        else return fail("%s: tensor '%.100s' is too large for any machine", path, tensor->name);
    }
    tensor->bytes = empty ? 0 : bytes;
    tensor->count = tensor->bytes / dtypes[tensor->dtype].size;
    return SC_OK;
}

static int read_dtype(json *j, sc_tensor *tensor)
{
    size_t i = 0;
    const char *name = json_string(j);
    if (!name) return SC_FAILED;
    while (i < sizeof dtypes / sizeof *dtypes && strcmp(dtypes[i].name, name) != 0) i++;
    tensor->dtype = (sc_dtype)i;
    if (i < sizeof dtypes / sizeof *dtypes) return SC_OK;
    return fail("%s: tensor '%.100s' has the unknown dtype '%.100s', expected F32, F16 or the like",
                j->what, tensor->name, name);
}

/* An array of at most `most` sizes. */
static int read_sizes(json *j, size_t *sizes, size_t most, size_t *count)
{
    int more;
    if (!json_take(j, '[')) return json_expected(j, "'['");
    for (*count = 0; (more = json_next(j, *count, ']')) > 0; ++*count) {
        if (*count == most) return json_expected(j, most == 2 ? "2 numbers" : "at most 8 numbers");
        SC_TRY(json_size(j, &sizes[*count]));
    }
    return more == 0 ? SC_OK : SC_FAILED;
}

/* {"dtype": ..., "shape": ..., "data_offsets": ...}, each once, in any order. */
static int read_tensor_fields(json *j, sc_tensor *tensor, size_t offsets[2])
{
    static const char *const names[] = { "dtype", "shape", "data_offsets" };
    size_t rank = 0, ends = 2;
    int more, seen = 0;
    if (!json_take(j, '{')) return json_expected(j, "'{'");
    for (size_t i = 0; (more = json_next(j, i, '}')) > 0; i++) {
        int field = 0;
        const char *key = json_key(j);
        if (!key) return SC_FAILED;
        while (field < 3 && strcmp(names[field], key) != 0) field++;
        if (field == 3 || seen >> field & 1)
            return fail("%s: tensor '%.100s' has '%.100s' as an unknown or second field, "
                        "expected dtype, shape, data_offsets", j->what, tensor->name, key);
        seen |= 1 << field;
        if (field == 0) SC_TRY(read_dtype(j, tensor));
        if (field == 1) SC_TRY(read_sizes(j, tensor->shape, SC_MAX_RANK, &rank));
        if (field == 2) SC_TRY(read_sizes(j, offsets, 2, &ends));
    }
    if (more < 0) return SC_FAILED;
    tensor->rank = (int)rank;
    if (seen == 7 && ends == 2) return SC_OK;
    return fail("%s: tensor '%.100s' is incomplete, expected dtype, shape and two data_offsets",
                j->what, tensor->name);
}

static int read_tensor(json *j, sc_safetensors *file, const char *name)
{
    size_t offsets[2], room = (size_t)(file->map + file->size - file->data);
    sc_tensor tensor = { .name = name };
    SC_TRY(read_tensor_fields(j, &tensor, offsets));
    SC_TRY(measure_tensor(&tensor, file->path));
    if (offsets[0] > offsets[1] || offsets[1] > room)
        return fail("%s: tensor '%.100s' lies at bytes %zu to %zu of the data, but there are %zu",
                    file->path, name, offsets[0], offsets[1], room);
    if (offsets[1] - offsets[0] != tensor.bytes)
        return fail("%s: tensor '%.100s' has %zu bytes, expected %zu from its dtype and shape",
                    file->path, name, offsets[1] - offsets[0], tensor.bytes);
    tensor.data = file->data + offsets[0];
    SC_TRY(grow(&file->tensor, &file->tensor_capacity, file->tensors, sizeof tensor));
    file->tensor[file->tensors++] = tensor;
    return SC_OK;
}

static int read_metadata(json *j, sc_safetensors *file)
{
    int more;
    if (!json_take(j, '{')) return json_expected(j, "'{'");
    while ((more = json_next(j, file->entries, '}')) > 0) {
        sc_entry entry = { .key = json_key(j) };
        if (entry.key) entry.value = json_string(j);
        if (!entry.value) return SC_FAILED;
        SC_TRY(grow(&file->metadata, &file->entry_capacity, file->entries, sizeof entry));
        file->metadata[file->entries++] = entry;
    }
    return more == 0 ? SC_OK : SC_FAILED;
}

static int read_header(sc_safetensors *file)
{
    uint64_t size = load64(file->map);
    size_t most = file->size - 8 < MAX_HEADER ? file->size - 8 : MAX_HEADER;
    if (size < 2 || size > most)
        return fail("%s: not a safetensors file: its first 8 bytes announce a header of %ju bytes, "
                    "expected 2 to %zu", file->path, (uintmax_t)size, most);
    file->data = file->map + 8 + size;
    file->text = new_array((size_t)size + 1, 1);
    if (!file->text) return SC_FAILED;
    memcpy(file->text, file->map + 8, (size_t)size);
    json j = { .what = file->path, .text = file->text, .at = 1 };
    int more, described = 0;
    if (file->text[0] != '{') return json_expected(&j, "'{' as the header's first byte");
    for (size_t i = 0; (more = json_next(&j, i, '}')) > 0; i++) {
        const char *key = json_key(&j);
        if (!key) return SC_FAILED;
        int metadata = strcmp(key, "__metadata__") == 0;
        if (metadata && described++) return json_expected(&j, "__metadata__ only once");
        SC_TRY(metadata ? read_metadata(&j, file) : read_tensor(&j, file, key));
    }
    if (more < 0) return SC_FAILED;
    if (json_take(&j, '\0') && j.at == size + 1) return SC_OK;
    return json_expected(&j, "nothing but spaces behind the header's object");
}

static int by_position(const void *a, const void *b)
{
    const sc_tensor *left = a, *right = b;
    if (left->data != right->data) return left->data < right->data ? -1 : 1;
    return (left->bytes > right->bytes) - (left->bytes < right->bytes);
}

/* Every byte of the data must belong to exactly one tensor. */
static int check_positions(sc_safetensors *file)
{
    const unsigned char *at = file->data;
    if (file->tensors) qsort(file->tensor, file->tensors, sizeof *file->tensor, by_position);
    for (size_t i = 0; i < file->tensors; i++) {
        const sc_tensor *tensor = &file->tensor[i];
        if (tensor->data != at)
            return fail("%s: tensor '%.100s' begins at byte %td of the data, expected %td, where "
                        "the one before it ends", file->path, tensor->name,
                        tensor->data - file->data, at - file->data);
        at += tensor->bytes;
    }
    if (at == file->map + file->size) return SC_OK;
    return fail("%s: %td bytes of data belong to no tensor, expected none", file->path,
                file->map + file->size - at);
}

/* Tensors and metadata entries both begin with the pointer to their name. */
static int by_name(const void *a, const void *b)
{
    const char *left, *right;
    memcpy(&left, a, sizeof left);
    memcpy(&right, b, sizeof right);
    return strcmp(left, right);
}

static int sort_by_name(const char *path, void *list, size_t count, size_t size)
{
    if (count > 0) qsort(list, count, size, by_name);
    for (size_t i = 1; i < count; i++) {
        const char *element = (const char *)list + i * size, *name;
        memcpy(&name, element, sizeof name);
        if (by_name(element - size, element) == 0)
            return fail("%s: '%.100s' is there twice, expected once", path, name);
    }
    return SC_OK;
}

static int map_file(sc_safetensors *file)
{
    struct stat about;
    /* O_NONBLOCK: a pipe must be refused, not waited for. */
    int fd = open(file->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC), status = SC_OK;
    if (fd < 0 || fstat(fd, &about) != 0) {
        status = fail("%s: cannot be opened: %s", file->path, strerror(errno));
    } else if (!S_ISREG(about.st_mode)) {
        status = fail("%s: is %s, expected a safetensors file", file->path,
                      S_ISDIR(about.st_mode) ? "a directory" : "not a regular file");
    } else if (about.st_size < 8) {
        status = fail("%s: not a safetensors file: %d bytes long, expected at least 8", file->path,
                      (int)about.st_size);
    } else if ((off_t)(size_t)about.st_size != about.st_size) {
        status = fail("%s: larger than this machine can address", file->path);
    } else {
        void *map = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED)
            status = fail("%s: cannot be mapped: %s", file->path, strerror(errno));
        else file->map = map;
        file->size = (size_t)about.st_size;
    }
    if (fd >= 0) close(fd);
    return status;
}

int sc_safetensors_open(sc_safetensors *file, const char *path)
{
    memset(file, 0, sizeof *file);
    file->path = copy_string(path);
    int status = file->path ? map_file(file) : SC_FAILED;
    if (status == SC_OK) status = read_header(file);
    if (status == SC_OK) status = check_positions(file);
    if (status == SC_OK)
        status = sort_by_name(path, file->tensor, file->tensors, sizeof *file->tensor);
    if (status == SC_OK)
        status = sort_by_name(path, file->metadata, file->entries, sizeof *file->metadata);
    if (status != SC_OK) sc_safetensors_close(file);
    return status;
}

void sc_safetensors_close(sc_safetensors *file)
{
    if (file->map) munmap((void *)file->map, file->size);
    free(file->path);
    free(file->text);
    free(file->tensor);
    free(file->metadata);
    memset(file, 0, sizeof *file);
}

const sc_tensor *sc_tensor_find(const sc_safetensors *file, const char *name)
{
    if (file->tensors == 0) return NULL;
    return bsearch(&name, file->tensor, file->tensors, sizeof *file->tensor, by_name);
}

const char *sc_metadata_find(const sc_safetensors *file, const char *key)
{
    if (file->entries == 0) return NULL;
    const sc_entry *entry = bsearch(&key, file->metadata, file->entries, sizeof *entry, by_name);
    return entry ? entry->value : NULL;
}

/* Where value `first` lies, if `count` values from there on exist; else NULL and a reason. */
static const unsigned char *tensor_values(const sc_safetensors *file, const sc_tensor *tensor,
                                          size_t first, size_t count)
{
    if (first <= tensor->count && count <= tensor->count - first)
        return tensor->data + first * dtypes[tensor->dtype].size;
    fail("%s: tensor '%.100s' has %zu values, expected %zu from number %zu on", file->path,
         tensor->name, tensor->count, count, first);
    return NULL;
}

static void floats_of_bytes(float *out, const unsigned char *from, size_t count, sc_dtype dtype)
{
    if (dtype == SC_F32) copy_numbers(out, from, count, 4);
    for (size_t i = 0; dtype == SC_F16 && i < count; i++)
        out[i] = float_of_half(load16(from + 2 * i));
    for (size_t i = 0; dtype == SC_BF16 && i < count; i++)
        out[i] = float_of_bits(load16(from + 2 * i) << 16);
    for (size_t i = 0; dtype == SC_F64 && i < count; i++) {
        double value;
        copy_numbers(&value, from + 8 * i, 1, 8);
        out[i] = (float)value;
    }
}

/* Values first .. first + count - 1 of an F32, F16, BF16 or F64 tensor, which must be finite. */
int sc_tensor_floats(const sc_safetensors *file, const sc_tensor *tensor, size_t first,
                     size_t count, float *out)
{
    enum { BLOCK = 4096 };           /* is checked while it is still in the cache */
    const unsigned char *from = tensor_values(file, tensor, first, count);
    if (!from) return SC_FAILED;
    if (tensor->dtype > SC_F64)
        return fail("%s: tensor '%.100s' is %s, expected F32, F16, BF16 or F64", file->path,
                    tensor->name, sc_dtype_name(tensor->dtype));
    for (size_t done = 0; done < count; done += BLOCK) {
        size_t n = count - done < BLOCK ? count - done : BLOCK;
        floats_of_bytes(out + done, from + done * sc_dtype_size(tensor->dtype), n, tensor->dtype);
        size_t bad = first_beyond(out + done, n, LARGEST_FLOAT);
        if (bad < n)
            return fail("%s: tensor '%.100s', element %zu is %g, expected a finite number",
                        file->path, tensor->name, first + done + bad, (double)out[done + bad]);
    }
    return SC_OK;
}

/* The same of an I64, I32 or U8 tensor. */
int sc_tensor_integers(const sc_safetensors *file, const sc_tensor *tensor, size_t first,
                       size_t count, int64_t *out)
{
    sc_dtype dtype = tensor->dtype;
    const unsigned char *from = tensor_values(file, tensor, first, count);
    if (!from) return SC_FAILED;
    if (dtype != SC_I64 && dtype != SC_I32 && dtype != SC_U8)
        return fail("%s: tensor '%.100s' is %s, expected I64, I32 or U8", file->path, tensor->name,
                    sc_dtype_name(dtype));
    if (dtype == SC_I64) copy_numbers(out, from, count, 8);
    for (size_t i = 0; dtype == SC_I32 && i < count; i++) {
        int64_t bits = load32(from + 4 * i);
        out[i] = bits - (bits >> 31) * ((int64_t)1 << 32);
    }
    for (size_t i = 0; dtype == SC_U8 && i < count; i++) out[i] = from[i];
    return SC_OK;
}

/* --- Atomic output ---
 *
 * NAME is written as NAME.tmp, flushed to disk and renamed. What exists and is not a regular file
 * (/dev/full, a pipe) is written as it is. The first failure sticks: a caller may write on without
 * looking and ask output_commit how it went. A zeroed output has no file and gathers in memory: its
 * buffer then is a string. */

enum { OUTPUT_BUFFER = 1 << 20 };

static int output_failed(sc_output *out, int error)
{
    out->error = error;
    return fail("%s: cannot be written: %s", out->path ? out->path : "text", strerror(error));
}

/* The first `length` bytes of head, then tail. */
static char *join_text(const char *head, size_t length, const char *tail)
{
    char *joined = new_array(length + strlen(tail) + 1, 1);
    if (!joined) return NULL;
    memcpy(joined, head, length);
    strcpy(joined + length, tail);
    return joined;
}

/* Where path leads, so that the file is replaced and not the link to it. */
static char *follow_links(const char *path)
{
    char *name = copy_string(path), target[4096];
    for (int links = 0; name && links < 40; links++) {
        ssize_t length = readlink(name, target, sizeof target - 1);
        if (length <= 0) break;
        target[length] = '\0';
        const char *slash = target[0] == '/' ? NULL : strrchr(name, '/');
        char *next = join_text(name, slash ? (size_t)(slash + 1 - name) : 0, target);
        free(name);
        name = next;
    }
    return name;
}

/* Opens and locks NAME.tmp. Between the two another process may have renamed or removed the file
 * that we opened, so the lock counts only if the name still means that file. */
static int open_temporary(sc_output *out)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct stat locked, named;
    out->temporary = join_text(out->path, strlen(out->path), ".tmp");
    for (int tries = 0; out->temporary && tries < 1000; tries++) {
        int fd = open(out->temporary, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
        if (fd < 0) return output_failed(out, errno);
        if (fcntl(fd, F_SETLK, &lock) != 0) {
            int error = errno;
            close(fd);
            if (error != EACCES && error != EAGAIN) return output_failed(out, error);
            return fail("%s: another process is writing it and holds %s", out->path,
                        out->temporary);
        }
        if (fstat(fd, &locked) == 0 && stat(out->temporary, &named) == 0 &&
            locked.st_dev == named.st_dev && locked.st_ino == named.st_ino) {
            out->fd = fd;
            return ftruncate(fd, 0) == 0 ? SC_OK : output_failed(out, errno);
        }
        close(fd);
    }
    return out->temporary ? output_failed(out, EAGAIN) : SC_FAILED;
}

/* Removes what was written, unless it was committed; never a temporary file that is not ours. */
static void output_discard(sc_output *out)
{
    if (out->path && out->temporary && out->fd >= 0) unlink(out->temporary);
    if (out->path && out->fd >= 0) close(out->fd);
    free(out->path);
    free(out->temporary);
    free(out->buffer);
    memset(out, 0, sizeof *out);
}

static int output_open(sc_output *out, const char *path)
{
    struct stat there;
    int direct = stat(path, &there) == 0 && !S_ISREG(there.st_mode), status = SC_FAILED;
    memset(out, 0, sizeof *out);
    out->fd = -1;
    out->path = direct ? copy_string(path) : follow_links(path);
    out->capacity = OUTPUT_BUFFER;
    out->buffer = new_array(out->capacity, 1);
    if (out->path && out->buffer && direct) {
        out->fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
        status = out->fd >= 0 ? SC_OK : output_failed(out, errno);
    } else if (out->path && out->buffer) {
        status = open_temporary(out);
    }
    out->seekable = status == SC_OK && lseek(out->fd, 0, SEEK_CUR) >= 0;
    if (status != SC_OK) output_discard(out);
    return status;
}

static int write_at(sc_output *out, uint64_t offset, const void *bytes, size_t count)
{
    const unsigned char *from = bytes;
    while (count > 0) {
        ssize_t n = out->seekable ? pwrite(out->fd, from, count, (off_t)offset)
                                  : write(out->fd, from, count);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return output_failed(out, errno);
        from += n;
        offset += (uint64_t)n;
        count -= (size_t)n;
    }
    return SC_OK;
}

static int output_flush(sc_output *out)
{
    if (out->error) return output_failed(out, out->error);
    SC_TRY(write_at(out, out->written, out->buffer, out->used));
    out->written += out->used;
    out->used = 0;
    return SC_OK;
}

/* Makes room in the buffer for count bytes and a NUL. */
static int output_reserve(sc_output *out, size_t count)
{
    if (out->error) return output_failed(out, out->error);
    if (count < out->capacity - out->used) return SC_OK;
    if (out->path) SC_TRY(output_flush(out));
    if (count < out->capacity - out->used) return SC_OK;
    size_t needed = out->used + count + 1, twice = 2 * out->capacity;
    unsigned char *buffer = new_array(needed > twice ? needed : twice, 1);
    if (!buffer) return output_failed(out, ENOMEM);
    if (out->used > 0) memcpy(buffer, out->buffer, out->used);
    free(out->buffer);
    out->buffer = buffer;
    out->capacity = needed > twice ? needed : twice;
    return SC_OK;
}

static int output_write(sc_output *out, const void *bytes, size_t count)
{
    if (out->path && count >= OUTPUT_BUFFER) {              /* too much to be worth a copy */
        SC_TRY(output_flush(out));
        SC_TRY(write_at(out, out->written, bytes, count));
        out->written += count;
        return SC_OK;
    }
    SC_TRY(output_reserve(out, count));
    if (count > 0) memcpy(out->buffer + out->used, bytes, count);
    out->used += count;
    return SC_OK;
}

SC_PRINTF(2, 3) static int output_printf(sc_output *out, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (length < 0) return output_failed(out, errno);
    SC_TRY(output_reserve(out, (size_t)length));
    va_start(arguments, format);
    vsnprintf((char *)out->buffer + out->used, (size_t)length + 1, format, arguments);
    va_end(arguments);
    out->used += (size_t)length;
    return SC_OK;
}

/* text as a JSON string; a byte that is not part of valid UTF-8 becomes U+FFFD. */
static int output_json(sc_output *out, const char *text)
{
    output_write(out, "\"", 1);
    while (*text) {
        size_t length = utf8_length(text);
        if (length == 0) output_write(out, "\xef\xbf\xbd", 3);
        else if ((unsigned char)*text < 0x20) output_printf(out, "\\u%04x", (unsigned)*text);
        else if (*text == '"' || *text == '\\') output_printf(out, "\\%c", *text);
        else output_write(out, text, length);
        text += length ? length : 1;
    }
    return output_write(out, "\"", 1);
}

/* Overwrites what was written earlier; a pipe refuses. */
static int output_patch(sc_output *out, uint64_t offset, const void *bytes, size_t count)
{
    SC_TRY(output_flush(out));
    if (!out->seekable) return output_failed(out, ESPIPE);
    return write_at(out, offset, bytes, count);
}

/* Moves all that stands at offset and behind up by distance bytes, the last block first. */
static int output_shift(sc_output *out, uint64_t offset, uint64_t distance)
{
    SC_TRY(output_flush(out));
    for (uint64_t end = out->written; end > offset;) {
        size_t n = end - offset < out->capacity ? (size_t)(end - offset) : out->capacity, got = 0;
        end -= n;
        while (got < n) {
            ssize_t more = pread(out->fd, out->buffer + got, n - got, (off_t)(end + got));
            if (more < 0 && errno == EINTR) continue;
            if (more <= 0) return output_failed(out, more < 0 ? errno : EIO);
            got += (size_t)more;
        }
        SC_TRY(write_at(out, end + distance, out->buffer, n));
    }
    out->written += distance;
    return SC_OK;
}

/* Makes the rename itself last. The file is whole either way, and not every file system can. */
static void sync_folder(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *folder = slash ? join_text(path, (size_t)(slash + 1 - path), "") : copy_string(".");
    int fd = folder ? open(folder, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(folder);
}

/* Ends the output in either case: the whole file stands under its name, or nothing does. */
static int output_commit(sc_output *out)
{
    int status = output_flush(out);
    if (status == SC_OK && out->temporary) {
        if (fsync(out->fd) != 0 || rename(out->temporary, out->path) != 0) {
            status = output_failed(out, errno);
        } else {
            free(out->temporary);
            out->temporary = NULL;
            sync_folder(out->path);
        }
    }
    output_discard(out);
    return status;
}

/* --- Writing safetensors ---
 *
 * The header comes last, when all is known, into a hole left for it at the file's front; blanks
 * fill it up. If it has outgrown the hole, the data move. Then the whole is committed. */

int sc_writer_open(sc_writer *w, const char *path, size_t header_room)
{
    memset(w, 0, sizeof *w);
    if (header_room > MAX_HEADER - 64) header_room = MAX_HEADER - 64;
    SC_TRY(output_open(&w->out, path));
    w->data = (8 + (uint64_t)header_room + 63) / 64 * 64;
    w->out.written = w->data;
    if (w->out.seekable) return SC_OK;
    sc_writer_discard(w);
    return fail("%s: is a pipe or the like, expected a file: a safetensors header is written last",
                path);
}

void sc_writer_discard(sc_writer *w)
{
    output_discard(&w->out);
    for (size_t i = 0; i < w->tensors; i++) free((char *)w->tensor[i].name);
    for (size_t i = 0; i < w->entries; i++) {
        free((char *)w->metadata[i].key);
        free((char *)w->metadata[i].value);
    }
    free(w->tensor);
    free(w->metadata);
    memset(w, 0, sizeof *w);
}

/* At any time before the end; the order is kept. */
int sc_writer_metadata(sc_writer *w, const char *key, const char *value)
{
    for (size_t i = 0; i < w->entries; i++)
        if (strcmp(w->metadata[i].key, key) == 0)
            return fail("%s: metadata '%s' was written already", w->out.path, key);
    SC_TRY(grow(&w->metadata, &w->entry_capacity, w->entries, sizeof *w->metadata));
    sc_entry *entry = &w->metadata[w->entries++];
    entry->key = copy_string(key);
    entry->value = copy_string(value);
    return entry->key && entry->value ? SC_OK : SC_FAILED;
}

/* The tensor being written must be complete. */
static int end_tensor(sc_writer *w)
{
    if (w->tensors == 0) return SC_OK;
    sc_tensor *tensor = &w->tensor[w->tensors - 1];
    if (w->rows_open) {
        tensor->shape[0] = w->values / tensor->count;        /* count so far is that of one row */
        SC_TRY(measure_tensor(tensor, w->out.path));
        w->rows_open = 0;
    }
    if (w->values == tensor->count) return SC_OK;
    return fail("%s: tensor '%s' got %zu values, expected %zu from its shape", w->out.path,
                tensor->name, w->values, tensor->count);
}

/* Begins the next tensor; shape[0] may be SC_ROWS. */
int sc_writer_tensor(sc_writer *w, const char *name, sc_dtype dtype, int rank,
                     const size_t *shape)
{
    sc_tensor tensor = { .name = name, .dtype = dtype, .rank = rank };
    SC_TRY(end_tensor(w));
    if (rank < 0 || rank > SC_MAX_RANK || strcmp(name, "__metadata__") == 0)
        return fail("%s: there can be no tensor '%s' of rank %d", w->out.path, name, rank);
    for (size_t i = 0; i < w->tensors; i++)
        if (strcmp(w->tensor[i].name, name) == 0)
            return fail("%s: tensor '%s' was written already", w->out.path, name);
    for (int d = 0; d < rank; d++) tensor.shape[d] = shape[d];
    int rows_open = rank > 0 && shape[0] == SC_ROWS;
    if (rows_open) tensor.shape[0] = 1;
    SC_TRY(measure_tensor(&tensor, w->out.path));
    if (rows_open && tensor.count == 0)
        return fail("%s: tensor '%s' cannot have rows of no values", w->out.path, name);
    SC_TRY(grow(&w->tensor, &w->tensor_capacity, w->tensors, sizeof tensor));
    tensor.name = copy_string(name);
    if (!tensor.name) return SC_FAILED;
    w->tensor[w->tensors++] = tensor;
    w->values = 0;
    w->rows_open = rows_open;
    return SC_OK;
}

/* Fails unless the tensor being written has one of two dtypes. */
static int writer_takes(const sc_writer *w, sc_dtype one, sc_dtype other)
{
    const sc_tensor *tensor = w->tensors ? &w->tensor[w->tensors - 1] : NULL;
    if (tensor && (tensor->dtype == one || tensor->dtype == other)) return SC_OK;
    return fail("%s: %s or %s values for '%s', which is %s", w->out.path, sc_dtype_name(one),
                sc_dtype_name(other), tensor ? tensor->name : "no tensor",
                tensor ? sc_dtype_name(tensor->dtype) : "not begun");
}

/* A value that the dtype cannot hold ends the writing: the file can no longer be complete. */
static int writer_refuses(sc_writer *w, double value)
{
    const sc_tensor *tensor = &w->tensor[w->tensors - 1];
    w->out.error = ERANGE;
    return fail("%s: tensor '%s', element %zu is %g, expected what %s can hold", w->out.path,
                tensor->name, w->values, value, sc_dtype_name(tensor->dtype));
}

/* Writes count numbers of size bytes in the machine's byte order. */
static int write_numbers(sc_writer *w, const void *numbers, size_t count, size_t size)
{
    SC_TRY(output_reserve(&w->out, count * size));
    copy_numbers(w->out.buffer + w->out.used, numbers, count, size);
    w->out.used += count * size;
    w->values += count;
    return SC_OK;
}

int sc_writer_floats(sc_writer *w, const float *values, size_t count)
{
    enum { BLOCK = 4096 };
    uint16_t halves[BLOCK];
    SC_TRY(writer_takes(w, SC_F32, SC_F16));
    int half = w->tensor[w->tensors - 1].dtype == SC_F16;
    for (size_t done = 0; done < count; done += BLOCK) {
        const float *block = values + done;
        size_t n = count - done < BLOCK ? count - done : BLOCK;
        size_t good = first_beyond(block, n, half ? LARGEST_HALF : LARGEST_FLOAT);
        for (size_t i = 0; half && i < good; i++) halves[i] = half_of_float(block[i]);
        SC_TRY(half ? write_numbers(w, halves, good, 2) : write_numbers(w, block, good, 4));
        if (good < n) return writer_refuses(w, (double)block[good]);
    }
    return SC_OK;
}

int sc_writer_doubles(sc_writer *w, const double *values, size_t count)
{
    SC_TRY(writer_takes(w, SC_F64, SC_F64));
    for (size_t i = 0; i < count; i++) {
        if (!(fabs(values[i]) <= DBL_MAX)) return writer_refuses(w, values[i]);
        SC_TRY(write_numbers(w, &values[i], 1, 8));
    }
    return SC_OK;
}

int sc_writer_integers(sc_writer *w, const int64_t *values, size_t count)
{
    SC_TRY(writer_takes(w, SC_I64, SC_I32));
    int narrow = w->tensor[w->tensors - 1].dtype == SC_I32;
    for (size_t i = 0; i < count; i++) {
        int32_t low = (int32_t)values[i];
        if (narrow && low != values[i]) return writer_refuses(w, (double)values[i]);
        SC_TRY(narrow ? write_numbers(w, &low, 1, 4) : write_numbers(w, &values[i], 1, 8));
    }
    return SC_OK;
}

int sc_writer_bytes(sc_writer *w, const unsigned char *values, size_t count)
{
    SC_TRY(writer_takes(w, SC_U8, SC_U8));
    SC_TRY(output_write(&w->out, values, count));
    w->values += count;
    return SC_OK;
}

static int print_header(sc_output *text, const sc_writer *w)
{
    size_t offset = 0;
    const char *before = "{\"__metadata__\":{";
    for (size_t i = 0; i < w->entries; i++, before = ",") {
        output_printf(text, "%s", before);
        output_json(text, w->metadata[i].key);
        output_write(text, ":", 1);
        output_json(text, w->metadata[i].value);
    }
    before = w->entries ? "}," : "{";
    for (size_t i = 0; i < w->tensors; i++, before = ",") {
        const sc_tensor *tensor = &w->tensor[i];
        output_printf(text, "%s", before);
        output_json(text, tensor->name);
        output_printf(text, ":{\"dtype\":\"%s\",\"shape\":[", sc_dtype_name(tensor->dtype));
        for (int d = 0; d < tensor->rank; d++)
            output_printf(text, "%s%zu", d ? "," : "", tensor->shape[d]);
        output_printf(text, "],\"data_offsets\":[%zu,%zu]}", offset, offset + tensor->bytes);
        offset += tensor->bytes;
    }
    if (w->tensors == 0) output_printf(text, "%s", w->entries ? "}" : "{");
    return output_write(text, "}", 1);
}

/* Ends the writer in either case: the whole file stands under its name, or nothing does. */
int sc_writer_finish(sc_writer *w)
{
    sc_output header = { 0 };
    int status = end_tensor(w);
    if (status == SC_OK) status = print_header(&header, w);
    uint64_t data = (8 + (uint64_t)header.used + 63) / 64 * 64;
    if (status == SC_OK && data > MAX_HEADER)
        status = fail("%s: its header of %zu bytes is larger than safetensors allows, expected at "
                      "most %d", w->out.path, header.used, MAX_HEADER);
    if (status == SC_OK && data > w->data) {
        status = output_shift(&w->out, w->data, data - w->data);
        w->data = data;
    }
    if (status == SC_OK)
        status = output_printf(&header, "%*s", (int)(w->data - 8 - header.used), "");
    uint64_t size = header.used;
    unsigned char bytes[8];
    copy_numbers(bytes, &size, 1, 8);
    if (status == SC_OK) status = output_patch(&w->out, 0, bytes, 8);
    if (status == SC_OK) status = output_patch(&w->out, 8, header.buffer, header.used);
    if (status == SC_OK) status = output_commit(&w->out);
    output_discard(&header);
    sc_writer_discard(w);
    return status;
}

/* Writes a safetensors file by `write`: the whole file stands under its name, or nothing does. */
static int save_tensors(const char *path, size_t header_room,
                        int (*write)(sc_writer *w, void *context), void *context)
{
    sc_writer w;
    int status = sc_writer_open(&w, path, header_room);
    if (status == SC_OK) status = write(&w, context);
    if (status == SC_OK) return sc_writer_finish(&w);
    sc_writer_discard(&w);
    return status;
}

/* --- Names as text: they come from anywhere --- */

/* text as a terminal may show it, cut short where there is no room. What a terminal might obey
 * comes out as \xNN: control bytes, Latin-1's too (in UTF-8 C2 80 to C2 9F), what is no UTF-8. */
static const char *printable(const char *text, char *out, size_t room)
{
    size_t used = 0;
    while (*text) {
        const unsigned char *byte = (const unsigned char *)text;
        size_t length = utf8_length(text), n = length ? length : 1;
        int harmless = length && byte[0] >= ' ' && byte[0] != 127
                       && !(byte[0] == 0xc2 && byte[1] < 0xa0);
        if (used + 8 + sizeof "..." > room) return strcpy(out + used, "..."), out;
        for (; n > 0; n--, text++) {
            if (harmless) out[used++] = *text;
            else used += (size_t)sprintf(out + used, "\\x%02x", (unsigned char)*text);
        }
    }
    out[used] = '\0';
    return out;
}

/* A list of names as metadata, a JSON array in a string. */
static int write_name_list(sc_writer *w, const char *key, char **name, size_t count)
{
    sc_output text = { 0 };
    output_write(&text, "[", 1);
    for (size_t i = 0; i < count; i++) {
        if (i) output_write(&text, ",", 1);
        output_json(&text, name[i]);
    }
    int status = output_write(&text, "]", 2);            /* its terminating 0 too */
    if (status == SC_OK) status = sc_writer_metadata(w, key, (const char *)text.buffer);
    output_discard(&text);
    return status;
}

static void print_json_text(const char *name)
{
    sc_output text = { 0 };
    if (output_json(&text, name) == SC_OK) fwrite(text.buffer, 1, text.used, stdout);
    output_discard(&text);
}

/* A CSV field: quoted, what a terminal might obey shown as ?. */
static void print_csv_text(const char *name)
{
    putchar('"');
    for (; *name; name++) {
        if (*name == '"') putchar('"');
        putchar((unsigned char)*name < ' ' || *name == 127 ? '?' : *name);
    }
    putchar('"');
}
/* ============================================================================================
 * 5. Images
 *
 * From a file's bytes to the pixels a model sees, in the order of the data's flow: bytes, PNM
 * pictures, other formats by way of a decoder program, data sets, Pillow's resize, and a reader
 * whose threads keep ahead of the computation. Pictures are RGB, 8 bits, [height, width, 3].
 * ============================================================================================ */

/* Beside SC_OK and SC_FAILED; MACHINE_FAILED is no image's fault, so that --skip-bad is no help. */
enum { SC_END = -1, MACHINE_FAILED = -2 };

#define MAX_PIXELS ((size_t)1 << 28)           /* of one picture: 16,384 x 16,384 */

/* Bytes that grow with the data that really arrives; kept from one image to the next. */
typedef struct { unsigned char *bytes; size_t size, capacity; } byte_buffer;

/* What one thread needs to load images; zeroed at first. */
typedef struct {
    const atomic_int *stop;                    /* NULL or a flag that ends every wait */
    byte_buffer block, output, picture, square, middle;
} image_workspace;

static void workspace_free(image_workspace *work)
{
    free(work->block.bytes);
    free(work->output.bytes);
    free(work->picture.bytes);
    free(work->square.bytes);
    free(work->middle.bytes);
}

/* Room for `capacity` bytes in all; the bytes already there stay. */
static int reserve(byte_buffer *buffer, size_t capacity)
{
    if (capacity <= buffer->capacity) return SC_OK;
    if (capacity < 2 * buffer->capacity) capacity = 2 * buffer->capacity;
    unsigned char *bytes = new_array(capacity, 1);
    if (!bytes) return SC_FAILED;
    if (buffer->size) memcpy(bytes, buffer->bytes, buffer->size);
    free(buffer->bytes);
    buffer->bytes = bytes;
    buffer->capacity = capacity;
    return SC_OK;
}

/* -------------------------------------------------------------------------------------------
 * Bytes in: from memory, or from a file or pipe in blocks
 * ------------------------------------------------------------------------------------------- */

enum { READ_BLOCK = 1 << 16 };

typedef struct {
    const char *name;                          /* for messages */
    const unsigned char *next, *end;
    unsigned char *block;                      /* [READ_BLOCK]; NULL: next .. end is all */
    int file, error;                           /* error: an errno, ECANCELED if told to stop */
    const atomic_int *stop;
} byte_source;

static int told_to_stop(const atomic_int *stop) { return stop && atomic_load(stop); }

/* A pipe may be silent for long: the flag is looked at ten times a second. */
static int fill_block(byte_source *source)
{
    if (!source->block || source->error) return 0;
    for (;;) {
        struct pollfd ready = { .fd = source->file, .events = POLLIN };
        int count = poll(&ready, 1, 100);
        if (told_to_stop(source->stop)) {
            source->error = ECANCELED;
            return 0;
        }
        if (count <= 0) continue;
        ssize_t got = read(source->file, source->block, READ_BLOCK);
        if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (got < 0) source->error = errno;
        if (got <= 0) return 0;
        source->next = source->block;
        source->end = source->block + got;
        return 1;
    }
}

/* The next byte, or -1 at the end. */
static int next_byte(byte_source *source)
{
    if (source->next == source->end && !fill_block(source)) return -1;
    return *source->next++;
}

/* Up to `count` bytes; fewer only at the end. */
static size_t read_bytes(byte_source *source, unsigned char *to, size_t count)
{
    size_t done = 0;
    while (done < count && (source->next < source->end || fill_block(source))) {
        size_t here = (size_t)(source->end - source->next);
        if (here > count - done) here = count - done;
        memcpy(to + done, source->next, here);
        source->next += here;
        done += here;
    }
    return done;
}

/* -------------------------------------------------------------------------------------------
 * PNM (netpbm.sourceforge.net/doc/pnm.html). P2, P3, P5, P6, and P4, which is what pngtopnm
 * makes of a PNG of one bit.
 * ------------------------------------------------------------------------------------------- */

typedef struct {
    size_t width, height, stride;              /* stride: bytes from row to row */
    const unsigned char *rgb;                  /* [height, width, 3] */
} picture;

typedef struct { int kind; size_t maxval, width, height, channels; } pnm_header;

enum { SAMPLES = 3 * 1024 };                   /* read at a time; a multiple of 8 and of 3 */

static int is_blank(int byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

/* The next byte of a text part; a comment reads as the newline that ends it. */
static int text_byte(byte_source *source)
{
    int byte = next_byte(source);
    if (byte == '#')
        while (byte != '\n' && byte != '\r' && byte >= 0) byte = next_byte(source);
    return byte;
}

static int pnm_ended(const byte_source *source, const char *what)
{
    if (source->error == ECANCELED) return fail("%s: stopped", source->name);
    if (source->error) return fail("%s: cannot be read: %s", source->name, strerror(source->error));
    return fail("%s: the file ends before the PNM picture's %s", source->name, what);
}

/* One number and the single blank after it. */
static int pnm_number(byte_source *source, const char *what, size_t largest, size_t *value)
{
    int byte = text_byte(source);
    while (is_blank(byte)) byte = text_byte(source);
    if (byte < 0) return pnm_ended(source, what);
    size_t number = 0;
    for (; byte >= '0' && byte <= '9'; byte = text_byte(source)) {
        number = 10 * number + (size_t)(byte - '0');
        if (number > largest)
            return fail("%s: a PNM %s of more than %zu", source->name, what, largest);
    }
    if (byte >= 0 && !is_blank(byte))
        return fail("%s: byte 0x%02x where a PNM %s was expected", source->name, byte, what);
    *value = number;
    return SC_OK;
}

/* SC_END where only blanks are left. */
static int pnm_header_read(byte_source *source, pnm_header *header)
{
    size_t width = 0, height = 0, maxval = 1;
    int byte = next_byte(source);
    while (is_blank(byte)) byte = next_byte(source);
    if (byte < 0 && !source->error) return SC_END;
    int kind = byte == 'P' ? next_byte(source) : -1;
    if (source->error) return pnm_ended(source, "first bytes");
    if (kind < '2' || kind > '6')
        return fail("%s: not a PNM picture, which begins with P2, P3, P5 or P6", source->name);
    SC_TRY(pnm_number(source, "width", MAX_PIXELS, &width));
    SC_TRY(pnm_number(source, "height", MAX_PIXELS, &height));
    if (kind != '4') SC_TRY(pnm_number(source, "maxval", 65535, &maxval));
    if (width == 0 || height == 0 || maxval == 0)
        return fail("%s: a PNM picture of %zu x %zu, maxval %zu: all three must be at least 1",
                    source->name, width, height, maxval);
    if (height > MAX_PIXELS / width)
        return fail("%s: a picture of %zu x %zu; at most %zu pixels are read", source->name,
                    width, height, MAX_PIXELS);
    *header = (pnm_header){ kind - '0', maxval, width, height, kind == '3' || kind == '6' ? 3 : 1 };
    return SC_OK;
}

/* round-half-even(255 v / maxval) */
static unsigned char to_8_bits(size_t v, size_t maxval)
{
    size_t rounded = (510 * v + maxval) / (2 * maxval);
    int tie = (510 * v + maxval) % (2 * maxval) == 0;
    return (unsigned char)(rounded - (tie && rounded % 2));
}

/* The next samples; done: how many the picture has so far, for the message. */
static int pnm_samples(byte_source *source, const pnm_header *header, unsigned char *sample,
                       size_t count, size_t done)
{
    unsigned char raw[2 * SAMPLES];
    size_t bits = header->kind == 4 ? 1 : header->maxval > 255 ? 16 : 8;
    size_t bytes = header->kind <= 3 ? 0 : (count * bits + 7) / 8;
    size_t got = read_bytes(source, raw, bytes);
    if (got < bytes && source->error) return pnm_ended(source, "last sample");
    if (got < bytes)
        return fail("%s: the picture's data ends after %zu of %zu samples", source->name,
                    done + got * 8 / bits, header->width * header->height * header->channels);
    if (bits == 8 && bytes && header->maxval == 255) {
        memcpy(sample, raw, count);
        return SC_OK;
    }
    for (size_t i = 0; i < count; i++) {
        size_t value = 0;
        if (header->kind <= 3) SC_TRY(pnm_number(source, "sample", header->maxval, &value));
        else if (bits == 1) value = !(raw[i / 8] >> (7 - i % 8) & 1);
        else if (bits == 8) value = raw[i];
        else value = (size_t)raw[2 * i] << 8 | raw[2 * i + 1];
        if (value > header->maxval)
            return fail("%s: sample %zu is %zu, above the picture's maxval %zu", source->name,
                        done + i, value, header->maxval);
        sample[i] = to_8_bits(value, header->maxval);
    }
    return SC_OK;
}

/* Reads one picture; its pixels lie in `buffer`, which grows as they come: a header alone, whatever
 * it claims, costs nothing. SC_END where there is none any more. */
static int pnm_read(byte_source *source, byte_buffer *buffer, picture *result)
{
    unsigned char sample[SAMPLES];
    pnm_header header = { 0 };
    SC_TRY(pnm_header_read(source, &header));
    size_t row = header.width * header.channels, total = row * header.height;
    size_t repeat = 3 / header.channels;       /* a grey sample stands for red, green and blue */
    buffer->size = 0;
    for (size_t done = 0; done < total;) {
        size_t count = row - done % row;       /* P4 rows end on a whole byte */
        if (count > SAMPLES) count = SAMPLES;
        SC_TRY(pnm_samples(source, &header, sample, count, done));
        SC_TRY(reserve(buffer, buffer->size + count * repeat));
        unsigned char *to = buffer->bytes + buffer->size;
        if (repeat == 1) memcpy(to, sample, count);
        else for (size_t i = 0; i < count; i++) memset(to + 3 * i, sample[i], 3);
        buffer->size += count * repeat;
        done += count;
    }
    *result = (picture){ header.width, header.height, 3 * header.width, buffer->bytes };
    return SC_OK;
}

/* -------------------------------------------------------------------------------------------
 * Other formats: a decoder program turns them into PNM
 * ------------------------------------------------------------------------------------------- */

enum { MAX_ARGUMENTS = 32, COMMAND_BYTES = 1024, MAGIC_BYTES = 16 };

/* What counts as an image is decided by its first bytes; '?' in the magic stands for any. */
typedef struct {
    const char *name, *magic;
    size_t length;
    const char *decoder, *package;             /* NULL: no decoder but ImageMagick */
} image_format;

static const image_format pnm_format = { "PNM", NULL, 0, NULL, NULL };

static const image_format other_formats[] = {
    { "JPEG", "\xff\xd8\xff", 3, "djpeg -dct int -pnm", "libjpeg-turbo-progs" },
    { "PNG", "\x89PNG\r\n\x1a\n", 8, "pngtopnm", "netpbm" },
    { "GIF", "GIF8?a", 6, NULL, "imagemagick" },
    { "WebP", "RIFF????WEBP", 12, NULL, "imagemagick" },
    { "TIFF", "II*\0", 4, NULL, "imagemagick" },
    { "TIFF", "MM\0*", 4, NULL, "imagemagick" },
    { "BMP", "BM????\0\0\0\0", 10, NULL, "imagemagick" },
};

/* NULL: not an image. */
static const image_format *format_of(const unsigned char *start, size_t size)
{
    if (size >= 3 && start[0] == 'P' && start[1] >= '2' && start[1] <= '6' &&
        (is_blank(start[2]) || start[2] == '#'))
        return &pnm_format;
    for (size_t i = 0; i < sizeof other_formats / sizeof *other_formats; i++) {
        const image_format *format = &other_formats[i];
        size_t same = 0;
        while (same < format->length && same < size &&
               (format->magic[same] == '?' || (unsigned char)format->magic[same] == start[same]))
            same++;
        if (same == format->length) return format;
    }
    return NULL;
}

/* posix_spawn and not fork: a fork copies the page tables of all our weights. The child gets a
 * process group of its own, so that Ctrl-C at a terminal, upon which training writes a checkpoint,
 * does not look like a broken image; it ends by SIGPIPE should we end first. */
static int spawn(char **argument, int in, int out, int err, pid_t *child)
{
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    sigset_t none, normal;
    int error = posix_spawn_file_actions_init(&files);
    if (error) return error;
    error = posix_spawnattr_init(&attributes);
    if (!error) {
        sigemptyset(&none);
        sigemptyset(&normal);
        sigaddset(&normal, SIGPIPE);
        posix_spawnattr_setsigmask(&attributes, &none);
        posix_spawnattr_setsigdefault(&attributes, &normal);
        posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK |
                                                  POSIX_SPAWN_SETSIGDEF);
        error = posix_spawn_file_actions_adddup2(&files, in, 0);
        if (!error) error = posix_spawn_file_actions_adddup2(&files, out, 1);
        if (!error) error = posix_spawn_file_actions_adddup2(&files, err, 2);
        if (!error) error = posix_spawnp(child, *argument, &files, &attributes, argument, environ);
        posix_spawnattr_destroy(&attributes);
    }
    posix_spawn_file_actions_destroy(&files);
    return error;
}

/* Starts a decoder on `file`; from[0] and from[1] are what it writes on stdout and stderr. The lock
 * is there because no other child may inherit a pipe between its making and its FD_CLOEXEC. */
static int start_decoder(char **argument, int file, int from[2], pid_t *child)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    int end[4] = { -1, -1, -1, -1 }, status = SC_OK;      /* out: read, write; err: read, write */
    pthread_mutex_lock(&lock);
    if (pipe(end) != 0 || pipe(end + 2) != 0)
        status = fail("%s: no pipe to it could be made: %s", argument[0], strerror(errno));
    for (int i = 0; i < 4 && status == SC_OK; i++) fcntl(end[i], F_SETFD, FD_CLOEXEC);
    int error = status == SC_OK ? spawn(argument, file, end[1], end[3], child) : 0;
    pthread_mutex_unlock(&lock);
    if (error) status = fail("%s could not be started: %s", argument[0], strerror(error));
    for (int i = 0; i < 4; i++)
        if (end[i] >= 0 && (i % 2 == 1 || status != SC_OK)) close(end[i]);
    from[0] = end[0];
    from[1] = end[2];
    return error == ENOENT || error == EACCES ? MACHINE_FAILED : status;
}

/* Reads both ends until the decoder closes them: its picture into work->output, the start of what
 * it said into `words`. */
static int gather(const int from[2], image_workspace *work, char *words, size_t room)
{
    struct pollfd end[2] = { { from[0], POLLIN, 0 }, { from[1], POLLIN, 0 } };
    byte_buffer *output = &work->output;
    size_t said = 0;
    output->size = 0;
    for (int open_ends = 2; open_ends > 0;) {
        if (told_to_stop(work->stop)) return fail("stopped");
        if (poll(end, 2, 100) <= 0) continue;
        for (int i = 0; i < 2; i++) {
            char block[512];
            ssize_t got;
            if (!end[i].revents) continue;
            if (i == 0) {
                if (output->size > 6 * MAX_PIXELS + READ_BLOCK) return fail("too much output");
                if (reserve(output, output->size + READ_BLOCK) != SC_OK) return SC_FAILED;
                got = read(from[0], output->bytes + output->size, output->capacity - output->size);
                if (got > 0) output->size += (size_t)got;
            } else {
                got = read(from[1], block, sizeof block);
                for (ssize_t j = 0; j < got && said + 1 < room; j++) words[said++] = block[j];
            }
            if (got > 0 || (got < 0 && errno == EINTR)) continue;
            end[i].fd = -1;
            open_ends--;
        }
    }
    words[said] = 0;
    return SC_OK;
}

/* Leaves the first line that says something, without control characters. */
static void first_line(char *words)
{
    char *start = words + strspn(words, " \t\r\n");
    size_t length = strcspn(start, "\r\n");
    memmove(words, start, length);
    words[length] = 0;
    for (char *c = words; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
}

/* What is to be said of a decoder that has ended; a picture counts only if it had no complaint. */
static int judge_decoder(int ended, const char *program, const char *name, char *words, size_t size)
{
    int code = WIFSIGNALED(ended) ? WTERMSIG(ended) : WEXITSTATUS(ended);
    first_line(words);
    if (WIFEXITED(ended) && code == 127 && !*words && size == 0) return MACHINE_FAILED;
    if (WIFEXITED(ended) && code == 0 && size > 0) return SC_OK;
    return fail("%s: %s ended with %s %d: %s", name, program,
                WIFSIGNALED(ended) ? "signal" : "status", code, *words ? words : "it said nothing");
}

/* Runs one decoder to its end. */
static int run_decoder(const char *command, int file, const char *name, image_workspace *work)
{
    char text[COMMAND_BYTES], words[256] = "", *rest = NULL;
    char *argument[MAX_ARGUMENTS + 1] = { NULL };
    int from[2], ended = 0, length = snprintf(text, sizeof text, "%s", command);
    pid_t child;
    char *word = strtok_r(text, " \t", &rest);
    for (int i = 0; word && i < MAX_ARGUMENTS; word = strtok_r(NULL, " \t", &rest))
        argument[i++] = word;
    if (!argument[0] || word || (size_t)length >= sizeof text)
        return fail("%s: SAECLIP_DECODER is not a program and at most %d arguments", name,
                    MAX_ARGUMENTS - 1);
    work->output.size = 0;
    if (lseek(file, 0, SEEK_SET) != 0) return fail("%s: %s", name, strerror(errno));
    SC_TRY(start_decoder(argument, file, from, &child));
    int status = gather(from, work, words, sizeof words);
    if (status != SC_OK) kill(child, SIGKILL);
    close(from[0]);
    close(from[1]);
    while (waitpid(child, &ended, 0) < 0 && errno == EINTR) {}
    if (status == SC_OK) return judge_decoder(ended, argument[0], name, words, work->output.size);
    snprintf(words, sizeof words, "%.200s", error_text);
    return fail("%s: %s was ended: %s", name, argument[0], words);
}

/* Tries a format's decoders in turn. The next one's turn comes if one is missing or has failed
 * without a byte (some djpegs refuse CMYK); the words of the first that ran are the ones quoted. */
static int decode(const image_format *format, int file, const char *name, image_workspace *work)
{
    const char *own = getenv("SAECLIP_DECODER");
    const char *command[] = { own ? own : format->decoder,
                              own ? NULL : "magick -[0] -alpha off -depth 8 ppm:-",
                              own ? NULL : "convert -[0] -alpha off -depth 8 ppm:-" };
    char words[sizeof error_text] = "";
    for (int i = 0; i < 3; i++) {
        if (!command[i]) continue;
        int status = run_decoder(command[i], file, name, work);
        if (status == SC_OK) return SC_OK;
        if (status == SC_FAILED && !*words) strcpy(words, error_text);
        if (work->output.size || told_to_stop(work->stop)) break;
    }
    if (*words) return fail("%s", words);
    if (own) fail("%s: the decoder '%s' that SAECLIP_DECODER names is not there", name, own);
    else fail("%s: there is no program to decode %s; Debian's package %s has one", name,
              format->name, format->package);
    return MACHINE_FAILED;
}

/* Reads and decodes one file. O_NONBLOCK: a pipe must be refused, not waited for. */
static int picture_read(const char *path, image_workspace *work, picture *result)
{
    unsigned char start[MAGIC_BYTES];
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC), status = SC_FAILED;
    if (file < 0) return fail("%s: cannot be opened: %s", path, strerror(errno));
    ssize_t got = pread(file, start, sizeof start, 0);
    const image_format *format = got > 0 ? format_of(start, (size_t)got) : NULL;
    byte_source source = { .name = path, .file = file, .stop = work->stop };
    if (got < 0) fail("%s: cannot be read: %s", path, strerror(errno));
    else if (!format) fail("%s: %s; a JPEG, PNG or PNM file was expected", path,
                           got == 0 ? "an empty file" : "not an image");
    else if (format == &pnm_format) {
        status = reserve(&work->block, READ_BLOCK);
        source.block = work->block.bytes;
    } else {
        status = decode(format, file, path, work);
        source.next = work->output.bytes;
        source.end = source.next + work->output.size;
    }
    if (status == SC_OK) status = pnm_read(&source, &work->picture, result);
    close(file);
    return status == SC_END ? fail("%s: the decoder wrote no picture", path) : status;
}

/* -------------------------------------------------------------------------------------------
 * Pillow's resize: bicubic (a = -0.5) stretched by the scale where it shrinks, weights in fixed
 * point of 22 bits, columns first, 8 bits in between (Pillow's src/libImaging/Resample.c describes
 * the arithmetic). Only what the crop keeps is computed: each pixel depends on its own window.
 * ------------------------------------------------------------------------------------------- */

enum { WEIGHT_BITS = 22 };

/* One axis: `from` pixels become `full`, of which `count` from `first` on are kept. Kept pixel i is
 * the sum of weight[i * most + t] times the source pixel start[i] + t, for t < taps[i]. */
typedef struct {
    uint64_t full, first;
    size_t from, count, most;
    size_t *start, *taps;                      /* [count] */
    int32_t *weight;                           /* [count, most]; NULL: no resampling */
} resize_axis;

static double bicubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

static void axis_free(resize_axis *axis)
{
    free(axis->start);
    free(axis->taps);
    free(axis->weight);
}

static int axis_open(resize_axis *axis, size_t from, uint64_t full, uint64_t first, size_t count)
{
    *axis = (resize_axis){ .from = from, .full = full, .first = first, .count = count };
    if (from == full) return SC_OK;
    double scale = (double)from / (double)full, stretch = scale < 1 ? 1 : scale;
    double support = 2 * stretch, step = 1 / stretch;
    axis->most = (size_t)ceil(support) * 2 + 1;
    if (axis->most > from) axis->most = from;
    double *exact = new_array(axis->most, sizeof *exact);
    axis->start = new_array(count, sizeof *axis->start);
    axis->taps = new_array(count, sizeof *axis->taps);
    axis->weight = new_array(count, axis->most * sizeof *axis->weight);
    int status = exact && axis->start && axis->taps && axis->weight ? SC_OK : SC_FAILED;
    for (size_t i = 0; i < count && status == SC_OK; i++) {
        double centre = ((double)(first + i) + 0.5) * scale, total = 0;
        double low = centre - support + 0.5, high = centre + support + 0.5;
        size_t start = low < 0 ? 0 : (size_t)low, end = high > (double)from ? from : (size_t)high;
        for (size_t x = start; x < end; x++) {
            exact[x - start] = bicubic(((double)x - centre + 0.5) * step);
            total += exact[x - start];
        }
        axis->start[i] = start;
        axis->taps[i] = end - start;
        for (size_t t = 0; t < end - start; t++) {
            double weight = (total != 0 ? exact[t] / total : exact[t]) * (1 << WEIGHT_BITS);
            axis->weight[i * axis->most + t] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
    }
    free(exact);
    if (status != SC_OK) axis_free(axis);
    return status;
}

/* A sum of weighted pixels, to which half a unit was added, as 8 bits. */
static unsigned char clip8(int32_t sum)
{
    int32_t value = sum < 0 ? 0 : sum >> WEIGHT_BITS;
    return (unsigned char)(value > 255 ? 255 : value);
}

/* row: [from, 3] to out: [count, 3] */
static void resize_row(const resize_axis *axis, const unsigned char *row, unsigned char *out)
{
    if (!axis->weight) {
        memcpy(out, row + 3 * axis->first, 3 * axis->count);
        return;
    }
    for (size_t i = 0; i < axis->count; i++) {
        const unsigned char *pixel = row + 3 * axis->start[i];
        const int32_t *weight = axis->weight + i * axis->most;
        int32_t r = 1 << (WEIGHT_BITS - 1), g = r, b = r;
        for (size_t t = 0; t < axis->taps[i]; t++) {
            r += weight[t] * pixel[3 * t];
            g += weight[t] * pixel[3 * t + 1];
            b += weight[t] * pixel[3 * t + 2];
        }
        out[3 * i] = clip8(r);
        out[3 * i + 1] = clip8(g);
        out[3 * i + 2] = clip8(b);
    }
}

/* Kept row i of the vertical axis; rows: [.., values], its first row being source row `top`. */
static void resize_column(const resize_axis *axis, size_t i, const unsigned char *rows, size_t top,
                          size_t values, unsigned char *out)
{
    enum { STRIP = 64 };                       /* sums that stay in registers */
    if (!axis->weight) {
        memcpy(out, rows + (axis->first + i - top) * values, values);
        return;
    }
    const int32_t *weight = axis->weight + i * axis->most;
    const unsigned char *window = rows + (axis->start[i] - top) * values;
    for (size_t x = 0; x < values; x += STRIP) {
        int32_t sum[STRIP];
        size_t width = values - x < STRIP ? values - x : STRIP;
        for (size_t j = 0; j < STRIP; j++) sum[j] = 1 << (WEIGHT_BITS - 1);
        for (size_t t = 0; t < axis->taps[i]; t++) {
            const unsigned char *value = window + t * values + x;
            if (width == STRIP)
                for (size_t j = 0; j < STRIP; j++) sum[j] += weight[t] * value[j];
            else
                for (size_t j = 0; j < width; j++) sum[j] += weight[t] * value[j];
        }
        for (size_t j = 0; j < width; j++) out[x + j] = clip8(sum[j]);
    }
}

/* Where the crop to `keep` of `from` pixels begins: torchvision rounds half to even. */
static uint64_t crop_start(uint64_t from, uint64_t keep, int crop_hf)
{
    uint64_t rest = from - keep, half = rest / 2;
    return half + (!crop_hf && rest % 2 && half % 2);
}

/* Resizes to width x height and keeps the centre: pixels [side, side, 3]. */
static int resize_and_crop(image_workspace *work, const picture *from, uint64_t width,
                           uint64_t height, size_t side, int crop_hf, unsigned char *pixels)
{
    resize_axis across, down;
    size_t values = 3 * side;
    SC_TRY(axis_open(&across, from->width, width, crop_start(width, side, crop_hf), side));
    int status = axis_open(&down, from->height, height, crop_start(height, side, crop_hf), side);
    if (status == SC_OK) {                     /* the rows that the kept ones are made of */
        size_t top = down.weight ? down.start[0] : (size_t)down.first;
        size_t end = down.weight ? down.start[side - 1] + down.taps[side - 1] : top + side;
        status = reserve(&work->middle, (end - top) * values);
        for (size_t y = top; y < end && status == SC_OK; y++)
            resize_row(&across, from->rgb + y * from->stride,
                       work->middle.bytes + (y - top) * values);
        for (size_t y = 0; y < side && status == SC_OK; y++)
            resize_column(&down, y, work->middle.bytes, top, values, pixels + y * values);
        axis_free(&down);
    }
    axis_free(&across);
    return status;
}

/* A picture of any size to the model's: pixels [size, size, 3]. */
static int preprocess(image_workspace *work, const picture *from, const sc_preprocess *prep,
                      unsigned char *pixels)
{
    picture now = *from;
    if (prep->square) {
        size_t side = now.width < now.height ? now.width : now.height, to = (size_t)prep->square;
        now.rgb += crop_start(now.height, side, prep->crop_hf) * now.stride +
                   crop_start(now.width, side, prep->crop_hf) * 3;
        now.width = now.height = side;
        SC_TRY(reserve(&work->square, 3 * to * to));
        SC_TRY(resize_and_crop(work, &now, to, to, to, prep->crop_hf, work->square.bytes));
        now = (picture){ to, to, 3 * to, work->square.bytes };
    }
    uint64_t size = (uint64_t)prep->size, width = size, height = size;
    if (now.width < now.height) height = size * now.height / now.width;
    else width = size * now.width / now.height;
    return resize_and_crop(work, &now, width, height, (size_t)size, prep->crop_hf, pixels);
}

/* pixels: [S, S, 3], chw: [3, S, S] = (v / 255 - mean) / std, each step rounded to float32, as
 * torchvision's ToTensor and Normalize do. */
void sc_normalise(const sc_preprocess *prep, const unsigned char *pixels, float *chw)
{
    size_t area = (size_t)prep->size * (size_t)prep->size;
    float value[3][256];
    for (int c = 0; c < 3; c++)
        for (int v = 0; v < 256; v++) {
            float scaled = (float)v / 255.0f, shifted = scaled - prep->mean[c];
            value[c][v] = shifted / prep->std[c];
        }
    for (size_t i = 0; i < area; i++)
        for (size_t c = 0; c < 3; c++) chw[c * area + i] = value[c][pixels[3 * i + c]];
}

/* -------------------------------------------------------------------------------------------
 * Data sets
 * ------------------------------------------------------------------------------------------- */

enum { MAX_PATH = 4096, MAX_DEPTH = 16, NAME_BLOCK = 1 << 16 };

/* Names lie packed in blocks: an image costs its name and 16 bytes (48 while the list grows). */
struct sc_names { struct sc_names *next; size_t used, room; char text[]; };

static char *keep_name(sc_images *set, const char *name)
{
    size_t bytes = strlen(name) + 1;
    struct sc_names *block = set->names;
    if (!block || block->room - block->used < bytes) {
        size_t room = bytes > NAME_BLOCK ? bytes : NAME_BLOCK;
        block = new_array(sizeof *block + room, 1);
        if (!block) return NULL;
        block->room = room;
        block->next = set->names;
        set->names = block;
    }
    char *copy = block->text + block->used;
    memcpy(copy, name, bytes);
    block->used += bytes;
    return copy;
}

static int add_image(sc_images *set, size_t *capacity, const char *name, int64_t label)
{
    SC_TRY(grow(&set->image, capacity, set->count, sizeof *set->image));
    set->image[set->count] = (sc_image){ keep_name(set, name), label };
    return set->image[set->count++].name ? SC_OK : SC_FAILED;
}

/* The folder a path lies in, which names are relative to; the name is what follows. */
static int set_root(sc_images *set, const char *path, const char **name)
{
    const char *slash = strrchr(path, '/');
    *name = slash ? slash + 1 : path;
    set->root = copy_string(slash ? path : ".");
    if (!set->root) return SC_FAILED;
    if (slash) set->root[slash == path ? 1 : slash - path] = 0;
    return SC_OK;
}

static int image_path(const sc_images *set, size_t index, char path[MAX_PATH])
{
    const char *name = set->image[index].name;
    int whole = *name == '/' || strcmp(set->root, ".") == 0;
    int length = snprintf(path, MAX_PATH, "%s%s%s", whole ? "" : set->root, whole ? "" : "/", name);
    return length < MAX_PATH ? SC_OK : fail("%s: the path is too long", name);
}

/* A folder's walk: path is root/name, `inside` where the name begins. */
typedef struct {
    sc_images *set;
    size_t capacity, class_capacity, others, inside;
    char path[MAX_PATH];
} folder_walk;

static int walk_folder(folder_walk *walk, int64_t label, int depth);

/* Makes walk->path go on with /name from `length` on. */
static int extend_path(folder_walk *walk, size_t length, const char *name)
{
    int more = snprintf(walk->path + length, MAX_PATH - length, "/%s", name);
    if ((size_t)more < MAX_PATH - length) return SC_OK;
    return fail("%s: the path is longer than %d bytes", walk->path, MAX_PATH - 1);
}

/* One entry of a folder. At the top, folders are classes, to be walked when all are known. */
static int walk_entry(folder_walk *walk, int64_t label, int depth)
{
    struct stat about;
    sc_images *set = walk->set;
    int there = stat(walk->path, &about) == 0; /* a link may lead nowhere */
    if (there && S_ISDIR(about.st_mode)) {
        if (depth > 0) return walk_folder(walk, label, depth + 1);
        SC_TRY(grow(&set->class_name, &walk->class_capacity, set->classes, sizeof(char *)));
        char *name = keep_name(set, walk->path + walk->inside);
        set->class_name[set->classes] = name;
        set->classes += name != NULL;
        return name ? SC_OK : SC_FAILED;
    }
    if (!there || !S_ISREG(about.st_mode)) {
        walk->others++;
        return SC_OK;
    }
    return add_image(set, &walk->capacity, walk->path + walk->inside, label);
}

/* Lists the regular files below walk->path; hidden ones are not data. A link that leads back to a
 * folder above makes an endless depth. */
static int walk_folder(folder_walk *walk, int64_t label, int depth)
{
    size_t length = strlen(walk->path);
    int status = SC_OK;
    if (depth > MAX_DEPTH)
        return fail("%s: folders lie more than %d deep in each other", walk->path, MAX_DEPTH);
    DIR *folder = opendir(walk->path);
    if (!folder) return fail("%s: cannot be opened: %s", walk->path, strerror(errno));
    while (status == SC_OK) {
        errno = 0;
        const struct dirent *entry = readdir(folder);
        if (!entry) {
            if (errno) status = fail("%s: cannot be read: %s", walk->path, strerror(errno));
            break;
        }
        if (entry->d_name[0] == '.') continue;
        status = extend_path(walk, length, entry->d_name);
        if (status == SC_OK) status = walk_entry(walk, label, depth);
        walk->path[length] = 0;
    }
    closedir(folder);
    return status;
}

/* A file that cannot be opened counts as an image: it is an error when its turn comes. */
static int is_image(const char *path)
{
    unsigned char start[MAGIC_BYTES];
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return 1;
    ssize_t got = pread(file, start, sizeof start, 0);
    close(file);
    return got < 0 || format_of(start, (size_t)got);
}

/* Keeps the images among the files listed, in their order: those in class folders or the loose
 * ones. Returns how many; where there is none the list stays as it is. */
static size_t keep_images(folder_walk *walk, size_t limit, int in_classes)
{
    sc_images *set = walk->set;
    char path[MAX_PATH];
    size_t kept = 0, others = walk->others;
    for (size_t i = 0; i < set->count && kept < limit; i++) {
        int candidate = (set->image[i].label >= 0) == in_classes;
        if (candidate && image_path(set, i, path) == SC_OK && is_image(path))
            set->image[kept++] = set->image[i];
        else others++;
    }
    if (kept == 0) return 0;
    set->count = kept;
    set->labelled = in_classes;
    if (others)
        note("%s: %zu files passed over that are not images%s", set->root, others,
             in_classes ? " in a class folder" : "");
    return kept;
}

/* DIR/<class>/<file>, or a flat DIR without labels where no class folder holds an image. */
static int open_folder(sc_images *set, const char *path, size_t limit)
{
    folder_walk walk = { .set = set };
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') length--;
    if (length >= MAX_PATH) return fail("%s: the path is too long", path);
    memcpy(walk.path, path, length);
    walk.inside = length + 1;
    set->root = copy_string(walk.path);
    if (!set->root) return SC_FAILED;
    SC_TRY(walk_folder(&walk, -1, 0));
    if (set->classes) qsort(set->class_name, set->classes, sizeof(char *), by_name);
    for (size_t c = 0; c < set->classes; c++) {
        SC_TRY(extend_path(&walk, length, set->class_name[c]));
        SC_TRY(walk_folder(&walk, (int64_t)c, 1));
    }
    size_t files = set->count;
    if (files) qsort(set->image, files, sizeof *set->image, by_name);
    if (keep_images(&walk, limit, 1)) return SC_OK;
    set->classes = 0;
    if (keep_images(&walk, limit, 0)) return SC_OK;
    return fail("%s: no image among the %zu files of this folder; FOLDER/<class>/<image> or"
                " FOLDER/<image> was expected", set->root, files);
}

/* A class index, as a list or a packed set gives it. */
static int check_label(const char *path, const char *what, size_t number, int64_t label)
{
    if (label >= 0 && label < INT32_MAX) return SC_OK;
    return fail("%s: the label of %s %zu is not a class index of 0 or more", path, what, number);
}

/* "path" or "path<TAB>label", with or without a comment; a # begins one at the line's start or
 * after a blank. Leaves *line at the path, or at "" if there is none. */
static int parse_list_line(const char *path, size_t number, char **line, int64_t *label)
{
    char *start = *line + strspn(*line, " \t\r\n"), *end;
    *label = -1;
    for (end = start; *end; end++)
        if (*end == '#' && (end == start || end[-1] == ' ' || end[-1] == '\t')) break;
    while (end > start && is_blank((unsigned char)end[-1])) end--;
    *end = 0;
    *line = start;
    char *tab = strchr(start, '\t');
    if (!tab) return SC_OK;
    *tab++ = 0;
    errno = 0;
    long long value = strtoll(tab, &end, 10);
    if (end == tab || *end || errno) value = -1;
    *label = (int64_t)value;
    return check_label(path, "line", number, *label);
}

static int open_list(sc_images *set, const char *path, size_t limit)
{
    char text[MAX_PATH + 64];
    const char *ignored;
    size_t capacity = 0, number = 0;
    int status = set_root(set, path, &ignored), file = open(path, O_RDONLY | O_CLOEXEC);
    FILE *list = file < 0 ? NULL : fdopen(file, "r");
    if (!list) {
        if (file >= 0) close(file);
        return fail("%s: cannot be opened: %s", path, strerror(errno));
    }
    while (status == SC_OK && set->count < limit && fgets(text, sizeof text, list)) {
        char *line = text;
        int64_t label;
        number++;
        if (strlen(text) + 1 == sizeof text)
            status = fail("%s: line %zu is longer than a path can be", path, number);
        if (status == SC_OK) status = parse_list_line(path, number, &line, &label);
        if (status != SC_OK || !*line) continue;
        if (set->count == 0) set->labelled = label >= 0;
        if (set->labelled != (label >= 0))
            status = fail("%s: line %zu has %s label, unlike the lines before it", path, number,
                          label < 0 ? "no" : "a");
        else status = add_image(set, &capacity, line, label);
    }
    if (status == SC_OK && ferror(list))
        status = fail("%s: cannot be read: %s", path, strerror(errno));
    fclose(list);
    if (status == SC_OK && set->count == 0) status = fail("%s: a list without an image", path);
    return status;
}

/* A list of names in a packed set's metadata; NULL if it is not there. */
static int packed_names(const sc_images *set, const char *key, char ***names, size_t *count)
{
    const char *text = sc_metadata_find(set->packed, key);
    char what[64];
    *names = NULL;
    *count = 0;
    snprintf(what, sizeof what, "metadata %s", key);
    return text ? json_string_array(text, what, names, count) : SC_OK;
}

/* images U8 [N, H, W, 3], labels I64 [N], metadata class_names and file_names. */
static int open_packed(sc_images *set, const char *path, size_t limit)
{
    set->packed = new_array(1, sizeof *set->packed);
    if (!set->packed) return SC_FAILED;
    SC_TRY(sc_safetensors_open(set->packed, path));
    const sc_tensor *images = sc_tensor_find(set->packed, "images");
    const sc_tensor *labels = sc_tensor_find(set->packed, "labels");
    if (!images || images->dtype != SC_U8 || images->rank != 4 || images->shape[3] != 3)
        return fail("%s: not a packed set: a tensor 'images' U8 [N, H, W, 3] was expected", path);
    if (images->bytes == 0 || images->shape[1] > MAX_PIXELS / images->shape[2])
        return fail("%s: packed images %zu x %zu x %zu: none, or too large", path, images->shape[0],
                    images->shape[1], images->shape[2]);
    size_t count = images->shape[0], names = 0;
    if (labels && (labels->dtype != SC_I64 || labels->rank != 1 || labels->count != count))
        return fail("%s: 'labels' must be I64 [%zu], a label an image", path, count);
    SC_TRY(packed_names(set, "class_names", &set->class_name, &set->classes));
    SC_TRY(packed_names(set, "file_names", &set->file_name, &names));
    if (set->file_name && names != count)
        return fail("%s: %zu file_names for %zu images", path, names, count);
    set->root = copy_string(path);
    set->count = count < limit ? count : limit;
    set->image = new_array(set->count, sizeof *set->image);
    set->labelled = labels != NULL;
    if (!set->root || !set->image) return SC_FAILED;
    for (size_t i = 0; i < set->count; i++) {
        set->image[i] = (sc_image){ set->file_name ? set->file_name[i] : "", -1 };
        if (!labels) continue;
        SC_TRY(sc_tensor_integers(set->packed, labels, i, 1, &set->image[i].label));
        SC_TRY(check_label(path, "image", i, set->image[i].label));
        if (set->class_name && (uint64_t)set->image[i].label >= set->classes)
            return fail("%s: image %zu has label %jd, but there are %zu class_names", path, i,
                        (intmax_t)set->image[i].label, set->classes);
    }
    return SC_OK;
}

static int has_suffix(const char *path, const char *suffix)
{
    size_t length = strlen(path), end = strlen(suffix);
    return length > end && strcmp(path + length - end, suffix) == 0;
}

static int open_set(sc_images *set, const char *path, size_t limit)
{
    struct stat about;
    size_t capacity = 0;
    const char *name;
    if (strcmp(path, "-") == 0) {
        set->count = SC_UNKNOWN;
        return SC_OK;
    }
    if (stat(path, &about) != 0) return fail("%s: cannot be opened: %s", path, strerror(errno));
    if (S_ISDIR(about.st_mode)) return open_folder(set, path, limit);
    if (!S_ISREG(about.st_mode))
        return fail("%s: not a file or folder; a stream of PNM pictures is read from -", path);
    if (has_suffix(path, ".txt")) return open_list(set, path, limit);
    if (has_suffix(path, ".safetensors")) return open_packed(set, path, limit);
    if (!is_image(path))
        return fail("%s: not an image; expected one, a folder, a list (*.txt), a packed set"
                    " (*.safetensors) or -", path);
    SC_TRY(set_root(set, path, &name));
    return add_image(set, &capacity, name, -1);
}

/* Names relative to the root, labels, class names, N: a folder moved or packed keeps its digest. */
static uint64_t digest_of_set(const sc_images *set)
{
    digest64 digest = { 0 };
    digest64_number(&digest, set->count);
    digest64_number(&digest, set->class_name ? set->classes : 0);
    for (size_t c = 0; set->class_name && c < set->classes; c++)
        digest64_add(&digest, set->class_name[c], strlen(set->class_name[c]) + 1);
    for (size_t i = 0; i < set->count; i++) {
        digest64_add(&digest, set->image[i].name, strlen(set->image[i].name) + 1);
        digest64_number(&digest, (uint64_t)set->image[i].label);
    }
    return digest64_value(&digest);
}

/* limit: how many images to take, 0 for all. */
int sc_images_open(sc_images *set, const char *path, size_t limit)
{
    *set = (sc_images){ .limit = limit ? limit : SIZE_MAX };
    int status = open_set(set, path, set->limit);
    if (status != SC_OK) {
        sc_images_close(set);
        return status;
    }
    if (set->count == SC_UNKNOWN) return SC_OK;
    if (set->classes == 0) {                   /* no labels, or a list's, which are numbers */
        free(set->class_name);
        set->class_name = NULL;
    }
    if (!set->class_name)
        for (size_t i = 0; i < set->count; i++)
            if (set->image[i].label >= (int64_t)set->classes)
                set->classes = (size_t)set->image[i].label + 1;
    set->digest = digest_of_set(set);
    return SC_OK;
}

void sc_images_close(sc_images *set)
{
    for (struct sc_names *block = set->names, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    if (set->packed) sc_safetensors_close(set->packed);
    free(set->packed);
    free(set->file_name);
    free(set->class_name);
    free(set->image);
    free(set->root);
    *set = (sc_images){ 0 };
}

/* pixels: [S, S, 3] of one image of the set. */
static int load_image(image_workspace *work, const sc_images *set, size_t index,
                      const sc_preprocess *prep, unsigned char *pixels)
{
    picture found;
    char path[MAX_PATH];
    if (set->packed) {
        const sc_tensor *images = sc_tensor_find(set->packed, "images");
        size_t height = images->shape[1], width = images->shape[2];
        found = (picture){ width, height, 3 * width, images->data + index * height * width * 3 };
    } else {
        SC_TRY(image_path(set, index, path));
        SC_TRY(picture_read(path, work, &found));
    }
    return preprocess(work, &found, prep, pixels);
}

int sc_image_load(const sc_images *set, size_t index, const sc_preprocess *prep,
                  unsigned char *pixels)
{
    image_workspace work = { 0 };
    if (set->count == SC_UNKNOWN || index >= set->count)
        return usage("image %zu of a set of %zu was asked for", index, set->count);
    int status = load_image(&work, set, index, prep, pixels);
    workspace_free(&work);
    return status == SC_OK ? SC_OK : SC_FAILED;
}

/* -------------------------------------------------------------------------------------------
 * A reader that keeps ahead: its threads fill a ring of slots, the consumer empties it in order
 * ------------------------------------------------------------------------------------------- */

/* The image of draw 0, 1, ...; SC_END when there are no more. Called in order and one at a time,
 * but by the reader's threads. */
typedef int draw_function(void *context, size_t draw, size_t *image);

typedef struct {
    size_t draw, image;                        /* image: index in the set; a stream counts */
    unsigned char *pixels;                     /* [S, S, 3] */
    int ready, status;
    char reason[sizeof error_text];
} image_slot;

typedef struct {
    const sc_images *set;
    sc_preprocess prep;
    draw_function *order;
    void *context;
    int skip_bad, threads, open;
    int held, ended;                           /* the consumer has a slot; no more draws */
    size_t slots, drawn, taken;                /* taken: slots that the consumer gave back */
    size_t bad_in_a_row;
    image_slot *slot;                          /* [slots]; draw d is in slot d % slots */
    pthread_t *thread;                         /* [threads] */
    unsigned char *named;                      /* [count]: bad images named already */
    byte_source stream;
    atomic_int stop;
    pthread_mutex_t lock;
    pthread_cond_t filled, emptied;
} image_reader;

static int next_draw(image_reader *reader, image_slot *slot)
{
    slot->draw = slot->image = reader->drawn;
    if (reader->order && reader->set->count != SC_UNKNOWN) {
        int status = reader->order(reader->context, slot->draw, &slot->image);
        return status == SC_OK || status == SC_END ? status : MACHINE_FAILED;
    }
    size_t end = reader->set->count == SC_UNKNOWN ? reader->set->limit : reader->set->count;
    return slot->draw < end ? SC_OK : SC_END;
}

static int load_slot(image_reader *reader, image_workspace *work, image_slot *slot)
{
    picture found;
    if (reader->set->count != SC_UNKNOWN)
        return load_image(work, reader->set, slot->image, &reader->prep, slot->pixels);
    SC_TRY(reserve(&work->block, READ_BLOCK));
    reader->stream.block = work->block.bytes;
    SC_TRY(pnm_read(&reader->stream, &work->picture, &found));
    return preprocess(work, &found, &reader->prep, slot->pixels);
}

static void *reader_main(void *argument)
{
    image_reader *reader = argument;
    image_workspace work = { .stop = &reader->stop };
    pthread_mutex_lock(&reader->lock);
    for (;;) {
        while (!reader->ended && !reader->stop && reader->drawn - reader->taken == reader->slots)
            pthread_cond_wait(&reader->emptied, &reader->lock);
        if (reader->ended || reader->stop) break;
        image_slot *slot = &reader->slot[reader->drawn % reader->slots];
        slot->ready = 0;
        slot->status = next_draw(reader, slot);
        reader->drawn++;
        if (slot->status == SC_OK) {
            pthread_mutex_unlock(&reader->lock);
            slot->status = load_slot(reader, &work, slot);
            pthread_mutex_lock(&reader->lock);
            if (slot->status != SC_OK && reader->set->count == SC_UNKNOWN) reader->ended = 1;
        } else {
            reader->ended = 1;
        }
        if (slot->status != SC_OK) strcpy(slot->reason, error_text);
        slot->ready = 1;
        pthread_cond_broadcast(&reader->filled);
        pthread_cond_broadcast(&reader->emptied);
    }
    pthread_mutex_unlock(&reader->lock);
    workspace_free(&work);
    return NULL;
}

static void reader_close(image_reader *reader)
{
    if (!reader->open) return;
    pthread_mutex_lock(&reader->lock);
    atomic_store(&reader->stop, 1);
    pthread_cond_broadcast(&reader->emptied);
    pthread_mutex_unlock(&reader->lock);
    for (int i = 0; i < reader->threads; i++) pthread_join(reader->thread[i], NULL);
    for (size_t i = 0; reader->slot && i < reader->slots; i++) free(reader->slot[i].pixels);
    free(reader->slot);
    free(reader->thread);
    free(reader->named);
    pthread_mutex_destroy(&reader->lock);
    pthread_cond_destroy(&reader->filled);
    pthread_cond_destroy(&reader->emptied);
    reader->open = 0;
}

/* Signals are the main thread's to take. */
static int start_readers(image_reader *reader, int threads)
{
    sigset_t all, before;
    int error = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (reader->threads < threads && !error) {
        error = pthread_create(&reader->thread[reader->threads], NULL, reader_main, reader);
        reader->threads += !error;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error ? fail("a reading thread could not be started: %s", strerror(error)) : SC_OK;
}

/* order NULL: every image once, in the set's order. A stream has one thread and no other order. */
static int reader_open(image_reader *reader, const sc_images *set, const sc_preprocess *prep,
                       draw_function *order, void *context, int threads, int skip_bad)
{
    int stream = set->count == SC_UNKNOWN, status = SC_OK;
    if (threads < 1 || stream) threads = 1;
    memset(reader, 0, sizeof *reader);
    reader->set = set;
    reader->prep = *prep;
    reader->order = order;
    reader->context = context;
    reader->skip_bad = skip_bad && !stream;
    reader->bad_in_a_row = set->count;
    reader->slots = 2 * (size_t)threads + 2;
    reader->stream = (byte_source){ .name = "standard input", .stop = &reader->stop };
    pthread_mutex_init(&reader->lock, NULL);
    pthread_cond_init(&reader->filled, NULL);
    pthread_cond_init(&reader->emptied, NULL);
    reader->open = 1;
    reader->slot = new_array(reader->slots, sizeof *reader->slot);
    reader->thread = new_array((size_t)threads, sizeof *reader->thread);
    reader->named = new_array(reader->skip_bad ? set->count : 0, 1);
    if (!reader->slot || !reader->thread || !reader->named) status = SC_FAILED;
    for (size_t i = 0; i < reader->slots && status == SC_OK; i++) {
        reader->slot[i].pixels = new_array((size_t)prep->size * (size_t)prep->size, 3);
        if (!reader->slot[i].pixels) status = SC_FAILED;
    }
    if (status == SC_OK) status = start_readers(reader, threads);
    if (status != SC_OK) reader_close(reader);
    return status;
}

static void give_back(image_reader *reader)
{
    reader->taken++;
    pthread_cond_broadcast(&reader->emptied);
}

/* Names a bad image, the first time. An endless order of nothing but bad ones must end: after two
 * rounds, or one if there was no good one before (the count starts at one round). */
static int pass_over(image_reader *reader, const image_slot *slot)
{
    if (!reader->named[slot->image]) note("%s; passed over", slot->reason);
    reader->named[slot->image] = 1;
    if (++reader->bad_in_a_row >= 2 * reader->set->count)
        return fail("%s: none of %zu images could be read", reader->set->root, reader->set->count);
    return SC_OK;
}

/* The next picture in order, or SC_END; *slot is the caller's until the next call. A bad image's
 * error comes when its turn does. */
static int reader_next(image_reader *reader, const image_slot **slot)
{
    int status;
    pthread_mutex_lock(&reader->lock);
    if (reader->held) give_back(reader);
    for (;;) {
        *slot = &reader->slot[reader->taken % reader->slots];
        while (reader->drawn == reader->taken || !(*slot)->ready)
            pthread_cond_wait(&reader->filled, &reader->lock);
        status = (*slot)->status;
        if (status != SC_OK) strcpy(error_text, (*slot)->reason);
        if (status != SC_FAILED || !reader->skip_bad) break;
        status = pass_over(reader, *slot);
        if (status != SC_OK) break;
        give_back(reader);
    }
    reader->held = status == SC_OK;
    if (reader->held) reader->bad_in_a_row = 0;
    pthread_mutex_unlock(&reader->lock);
    return status == MACHINE_FAILED ? SC_FAILED : status;
}

/* ============================================================================================
 * 7. The vision transformer
 *
 * Dosovitskiy et al., 2021, as CLIP has it (Radford et al., 2021): patches and a class token, L
 * blocks of x += attention(norm(x)); x += mlp(norm(x)). Sizes come from the tensors' shapes. The
 * forward pass hands out what it is asked for at the hook points and stops where nothing later is
 * needed.
 * ============================================================================================ */

/* The layers of a model; NORM1 to FC2 are each block's, the others lie with the first block's. */
enum role {
    CLASS_TOKEN, POSITIONS, PATCHES, PRE, NORM1, QKV, OUT, NORM2, FC1, FC2, POST, HEAD, ROLES
};

enum { HUGGING_FACE, OPENAI, TIMM, NAMINGS };

static const char *const naming_names[] = { "Hugging Face CLIP", "OpenAI / OpenCLIP", "timm" };
static const char *const name_begins[] = { "vision_model.", "visual.", "" };
static const char *const block_begins[] = { "encoder.layers.", "transformer.resblocks.",
                                            "blocks." };

enum size { ONE, WIDTH, WIDTH3, HIDDEN, TOKENS, PIXELS, OUTPUTS };

/* What a layer's tensors are called under the three namings (* stands for weight or bias, # for the
 * block, ? for q, k or v, and ~ for what the naming's names begin with), the weight's shape in the
 * file, and whether it is a matrix to multiply by. */
static const struct {
    const char *name[NAMINGS];
    enum size rows, columns;
    int linear;
} layers[ROLES] = {
    { { "~embeddings.class_embedding", "~class_embedding", "cls_token" }, ONE, WIDTH, 0 },
    { { "~embeddings.position_embedding.weight", "~positional_embedding", "pos_embed" },
      TOKENS, WIDTH, 0 },
    { { "~embeddings.patch_embedding.*", "~conv1.*", "patch_embed.proj.*" }, WIDTH, PIXELS, 1 },
    { { "~pre_layrnorm.*", "~ln_pre.*", "norm_pre.*" }, ONE, WIDTH, 0 },
    { { "~#layer_norm1.*", "~#ln_1.*", "#norm1.*" }, ONE, WIDTH, 0 },
    { { "~#self_attn.?_proj.*", "~#attn.in_proj_*", "#attn.qkv.*" }, WIDTH3, WIDTH, 1 },
    { { "~#self_attn.out_proj.*", "~#attn.out_proj.*", "#attn.proj.*" }, WIDTH, WIDTH, 1 },
    { { "~#layer_norm2.*", "~#ln_2.*", "#norm2.*" }, ONE, WIDTH, 0 },
    { { "~#mlp.fc1.*", "~#mlp.c_fc.*", "#mlp.fc1.*" }, HIDDEN, WIDTH, 1 },
    { { "~#mlp.fc2.*", "~#mlp.c_proj.*", "#mlp.fc2.*" }, WIDTH, HIDDEN, 1 },
    { { "~post_layernorm.*", "~ln_post.*", "norm.*" }, ONE, WIDTH, 0 },
    { { "visual_projection.*", "~proj", "head.*" }, OUTPUTS, WIDTH, 1 },
};

enum { NAME_LENGTH = 128 };

/* Spells a tensor's name out. name: [NAME_LENGTH] */
static void spell_name(char *name, int naming, enum role role, size_t block, int bias, char part)
{
    size_t used = 0;
    *name = '\0';
    for (const char *c = layers[role].name[naming]; *c; c++) {
        size_t room = NAME_LENGTH - used;
        if (*c == '~') snprintf(name + used, room, "%s", name_begins[naming]);
        else if (*c == '#') snprintf(name + used, room, "%s%zu.", block_begins[naming], block);
        else if (*c == '*') snprintf(name + used, room, "%s", bias ? "bias" : "weight");
        else snprintf(name + used, room, "%c", *c == '?' ? part : *c);
        used += strlen(name + used);
    }
}

static const sc_tensor *find_layer(const sc_model *model, enum role role, size_t block, int bias)
{
    char name[NAME_LENGTH];
    spell_name(name, model->naming, role, block, bias, 'q');
    return sc_tensor_find(&model->file, name);
}

/* Reads a layer's weight or bias of rows x columns numbers (leading dimensions of 1 do not count),
 * or says what is missing or misshapen. Hugging Face has q, k and v apart. */
static int read_layer_tensor(const sc_model *model, enum role role, size_t block, int bias,
                             size_t rows, size_t columns, float *out)
{
    char name[NAME_LENGTH];
    const char *path = model->file.path;
    size_t parts = role == QKV && model->naming == HUGGING_FACE ? 3 : 1;
    if (bias) columns /= parts;
    else rows /= parts;
    for (size_t i = 0; i < parts; i++) {
        int first = 0;
        spell_name(name, model->naming, role, block, bias, "qkv"[i]);
        const sc_tensor *tensor = sc_tensor_find(&model->file, name);
        if (!tensor) return fail("%s: there is no tensor %s", path, name);
        if (rows != 0 && columns > SIZE_MAX / rows)
            return fail("%s: tensor %s would be too large", path, name);
        while (first < tensor->rank && tensor->shape[first] == 1 && rows != 1) first++;
        if (tensor->count != rows * columns || (rows > 1 && tensor->shape[first] != rows))
            return fail("%s: tensor %s has %zu numbers where %zu x %zu were expected", path, name,
                        tensor->count, rows, columns);
        SC_TRY(sc_tensor_floats(&model->file, tensor, 0, tensor->count, out + i * rows * columns));
    }
    return SC_OK;
}

/* Reads a layer. A linear layer's weight lies [N, K] in the file, as PyTorch has it (OpenAI's
 * projection [K, N]), and is packed. */
static int read_layer(const sc_model *model, enum role role, size_t block)
{
    const size_t sizes[] = { 1, model->width, 3 * model->width, model->hidden, model->tokens,
                             3 * model->patch * model->patch, model->outputs };
    size_t N = sizes[layers[role].rows], K = sizes[layers[role].columns], biases = N == 1 ? K : N;
    int swapped = role == HEAD && model->naming == OPENAI;
    int has_bias = strchr(layers[role].name[model->naming], '*') != NULL;
    int may_lack = role == PATCHES || role == HEAD || (role == QKV && model->naming == TIMM);
    sc_layer *layer = &model->layer[block * ROLES + role];
    if (!(layer->weight = new_array(N, padded(K) * sizeof(float)))) return SC_FAILED;
    SC_TRY(read_layer_tensor(model, role, block, 0, swapped ? K : N, swapped ? N : K,
                             layer->weight));
    if (layers[role].linear) {
        SC_TRY(new_packed(&layer->matrix, K, N));
        pack_panels(&layer->matrix, 0, layer->matrix.panels, layer->weight, swapped ? N : 1,
                    swapped ? 1 : K);
        free(layer->weight);
        layer->weight = NULL;
    }
    if (!has_bias || (may_lack && !find_layer(model, role, block, 1))) return SC_OK;
    if (!(layer->bias = new_array(padded(biases), sizeof(float)))) return SC_FAILED;
    return read_layer_tensor(model, role, block, 1, 1, biases, layer->bias);
}

static int load_block(void *context, size_t block, int worker)
{
    (void)worker;
    for (enum role role = NORM1; role <= FC2; role++) SC_TRY(read_layer(context, role, block));
    return SC_OK;
}

/* text_embeds [C, P], rows to unit length: what images' embeddings are compared with. */
static int load_text(sc_model *model)
{
    const sc_tensor *text = sc_tensor_find(&model->file, "text_embeds");
    if (!text) return SC_OK;
    if (text->rank != 2 || text->shape[1] != model->outputs || text->shape[0] == 0)
        return fail("%s: text_embeds should be [classes, %zu], the width of the projection",
                    model->file.path, model->outputs);
    size_t P = padded(model->outputs);
    model->classes = text->shape[0];
    model->text = new_array(model->classes, P * sizeof *model->text);
    if (!model->text) return SC_FAILED;
    for (size_t c = 0; c < model->classes; c++) {
        SC_TRY(sc_tensor_floats(&model->file, text, c * model->outputs, model->outputs,
                                model->text + c * P));
        kernels->unit_row(model->text + c * P, P);
    }
    return SC_OK;
}

/* The final norm, the projection or classifier, the class prompts' embeddings. */
static int load_head(sc_model *model)
{
    const sc_tensor *head = find_layer(model, HEAD, 0, 0);
    if (!head || head->rank != 2)
        return fail("%s: this model has no head (%s [outputs, width] was expected)",
                    model->file.path, layers[HEAD].name[model->naming]);
    model->outputs = model->classes = head->shape[model->naming == OPENAI ? 1 : 0];
    SC_TRY(read_layer(model, POST, 0));
    SC_TRY(read_layer(model, HEAD, 0));
    return load_text(model);
}

/* Sizes from shapes. */
static int measure_model(sc_model *model)
{
    const char *path = model->file.path;
    const sc_tensor *patch = find_layer(model, PATCHES, 0, 0), *fc1 = find_layer(model, FC1, 0, 0);
    const sc_tensor *positions = find_layer(model, POSITIONS, 0, 0);
    if (!patch || patch->rank != 4 || patch->shape[1] != 3 || patch->shape[2] != patch->shape[3]
        || patch->shape[2] == 0 || patch->shape[2] > 1024 || patch->shape[0] == 0
        || patch->shape[0] > SC_MAX_WIDTH)
        return fail("%s: the patch embedding's weight should be [width, 3, patch, patch]", path);
    model->width = patch->shape[0];
    model->patch = patch->shape[2];
    if (!positions || positions->rank < 2 || positions->shape[positions->rank - 1] != model->width)
        return fail("%s: the position embedding should be [tokens, %zu]", path, model->width);
    model->tokens = positions->count / model->width;
    while ((model->grid + 1) * (model->grid + 1) < model->tokens) model->grid++;
    if (model->tokens < 2 || model->tokens > SC_MAX_TOKENS
        || model->grid * model->grid + 1 != model->tokens)
        return fail("%s: %zu positions are not a class token and a square of patches", path,
                    model->tokens);
    if (!fc1 || fc1->rank != 2 || fc1->shape[1] != model->width || fc1->shape[0] > SC_MAX_WIDTH)
        return fail("%s: the first layer of block 0's MLP should be [hidden, %zu]", path,
                    model->width);
    model->hidden = fc1->shape[0];
    model->image_size = model->grid * model->patch;
    while (find_layer(model, NORM1, model->blocks, 0)) model->blocks++;
    return model->blocks ? SC_OK : fail("%s: the model has no blocks", path);
}

enum setting { GELU, EPSILON, HEADS, MEAN, STD, SETTINGS };

/* Takes a setting from its text; what: how errors name it. */
static int apply_setting(sc_model *model, enum setting setting, const char *what, const char *text)
{
    double number = 0;
    if (setting == MEAN) return parse_triple(text, what, model->mean);
    if (setting == STD) {
        SC_TRY(parse_triple(text, what, model->std));
        for (int c = 0; c < 3; c++)
            if (!(model->std[c] > 0)) return usage("%s: a deviation is not positive", what);
    } else if (setting == EPSILON) {
        SC_TRY(parse_number(text, what, 0, 1, &number));
        model->epsilon = (float)number;
    } else if (setting == HEADS) {
        SC_TRY(parse_number(text, what, 1, 1 << 20, &number));
        model->heads = (size_t)number;
        if ((double)model->heads != number || model->width % model->heads != 0)
            return usage("%s: width %zu cannot be split into %g heads", what, model->width, number);
    } else {
        int quick = strcmp(text, "quick_gelu") == 0 || strcmp(text, "quick") == 0;
        model->activation = quick ? QUICK_GELU : ERF_GELU;
        if (!quick && strcmp(text, "gelu") != 0 && strcmp(text, "erf") != 0)
            return usage("%s: '%s' is neither quick_gelu nor gelu", what, text);
    }
    return SC_OK;
}

/* What the tensors' shapes do not tell: an option, else the metadata, else what is usual. A bad
 * setting is the caller's fault if it is an option, else the file's. */
static int read_settings(sc_model *model, const sc_model_options *given)
{
    int plain = model->naming == TIMM && !find_layer(model, PRE, 0, 0);
    char heads[24], assumed[256] = "", reason[sizeof error_text];
    const struct { const char *text, *option, *key, *usual; } settings[SETTINGS] = {
        { given->gelu, "--gelu", "hidden_act", plain ? "gelu" : "quick_gelu" },
        { given->epsilon, "--eps", "layer_norm_eps", plain ? "1e-6" : "1e-5" },
        { given->heads, "--heads", "num_attention_heads", heads },
        { given->mean, "--mean", "image_mean", "0.48145466,0.4578275,0.40821073" },
        { given->std, "--std", "image_std", "0.26862954,0.26130258,0.27577711" } };
    snprintf(heads, sizeof heads, "%zu", model->width / 64);
    for (enum setting i = 0; i < SETTINGS; i++) {
        const char *text = settings[i].text, *what = text ? settings[i].option : settings[i].key;
        const char *saved = sc_metadata_find(&model->file, settings[i].key);
        size_t used = strlen(assumed);
        if (!text) text = saved ? saved : settings[i].usual;
        if (text == settings[i].usual)
            snprintf(assumed + used, sizeof assumed - used, ", %s %s", settings[i].key, text);
        int status = apply_setting(model, i, what, text);
        if (settings[i].text) SC_TRY(status);
        memcpy(reason, error_text, sizeof reason);
        if (status != SC_OK)
            return fail("%s: %s %.900s", model->file.path, saved ? "metadata" : "assumed", reason);
    }
    if (*assumed) note("%s does not say, assumed: %s", model->file.path, assumed + 2);
    return SC_OK;
}

/* Which naming a file's tensors have, NAMINGS for none. */
static int naming_of(const sc_safetensors *file)
{
    char name[NAME_LENGTH];
    int naming = 0;
    for (; naming < NAMINGS; naming++) {
        spell_name(name, naming, CLASS_TOKEN, 0, 0, 'q');
        if (sc_tensor_find(file, name)) break;
    }
    return naming;
}

int sc_model_open(sc_model *model, const char *path, const sc_model_options *given)
{
    static const sc_model_options none = { 0 };
    *model = (sc_model){ 0 };
    SC_TRY(sc_safetensors_open(&model->file, path));
    model->naming = naming_of(&model->file);
    int status = model->naming < NAMINGS ? measure_model(model)
        : fail("%s: this is no vision transformer under Hugging Face's, OpenAI's or timm's names "
               "(a tensor visual.class_embedding or the like was expected)", path);
    if (status == SC_OK) status = read_settings(model, given ? given : &none);
    if (status != SC_OK) sc_model_close(model);
    return status;
}

/* Reads and packs the weights of the first `blocks` blocks, and of the head if asked. */
int sc_model_load(sc_model *model, size_t blocks, int head)
{
    if (blocks > model->blocks) blocks = model->blocks;
    model->loaded = blocks;
    model->layer = new_array(blocks ? blocks : 1, ROLES * sizeof *model->layer);
    if (!model->layer) return SC_FAILED;
    for (enum role role = CLASS_TOKEN; role <= PATCHES; role++) SC_TRY(read_layer(model, role, 0));
    if (find_layer(model, PRE, 0, 0)) SC_TRY(read_layer(model, PRE, 0));
    SC_TRY(parallel_for(blocks, load_block, model));
    return head ? load_head(model) : SC_OK;
}

void sc_model_close(sc_model *model)
{
    size_t count = (model->loaded ? model->loaded : 1) * ROLES;
    for (size_t i = 0; model->layer && i < count; i++) {
        free(model->layer[i].matrix.data);
        free(model->layer[i].weight);
        free(model->layer[i].bias);
    }
    free(model->text);
    free(model->layer);
    sc_safetensors_close(&model->file);
    *model = (sc_model){ 0 };
}

/* A hook point by its name. */
static const char *const hook_names[] = { "attn", "mlp", "resid" };

static int parse_hook(const char *text, sc_hook *hook)
{
    for (int i = 0; i < 3; i++)
        if (strcmp(text, hook_names[i]) == 0) {
            *hook = (sc_hook)i;
            return SC_OK;
        }
    return usage("hook '%s' is none of attn, mlp, resid", text);
}

/* What one forward pass works on. B images, T tokens, D width, H hidden; M = B T. */
typedef struct {
    const sc_model *model;
    size_t images, rows;             /* B, M */
    const unsigned char *pixels;     /* [B, S, S, 3] */
    const sc_tap *taps;              /* [count] */
    size_t count, last;              /* last: the block after which nothing is needed, */
    int stops_at_attn;               /* and whether its MLP is not needed either */
    float *x;                        /* [M, D], the residual stream */
    float *normed;                   /* [M, padded D], a norm's or the attention's output */
    float *wide;                     /* [M, max(3 D, H, 3 patch^2)], qkv, hidden or patches */
    float *head_scratch;             /* [workers][head_scratch_size] */
    size_t head_scratch_size, wide_stride, normed_stride;
    memory_list memory;
    const sc_layer *norm;            /* what norm_task applies */
} forward_pass;

enum { ROWS_A_TASK = 32 };

/* normed = layer_norm(x), a few rows a task. */
static int norm_task(void *context, size_t task, int worker)
{
    forward_pass *pass = context;
    size_t D = pass->model->width, first = task * ROWS_A_TASK;
    (void)worker;
    for (size_t i = first; i < pass->rows && i < first + ROWS_A_TASK; i++)
        kernels->layer_norm(pass->x + i * D, pass->norm->weight, pass->norm->bias,
                            pass->model->epsilon, pass->normed + i * pass->normed_stride, D);
    return SC_OK;
}

static int norm_rows(forward_pass *pass, const sc_layer *norm)
{
    pass->norm = norm;
    return parallel_for((pass->rows + ROWS_A_TASK - 1) / ROWS_A_TASK, norm_task, pass);
}

/* Lays an image's patches out as rows of 3 patch^2 normalised pixels, channel by channel. */
static int patch_task(void *context, size_t image, int worker)
{
    forward_pass *pass = context;
    const sc_model *model = pass->model;
    size_t p = model->patch, S = model->image_size;
    const unsigned char *pixels = pass->pixels + image * S * S * 3;
    float normal[3][256];
    (void)worker;
    for (int c = 0; c < 3; c++)
        for (int v = 0; v < 256; v++)
            normal[c][v] = ((float)v / 255.0f - model->mean[c]) / model->std[c];
    for (size_t i = 0; i < model->tokens - 1; i++) {
        const unsigned char *corner = pixels + (i / model->grid * S + i % model->grid) * p * 3;
        float *out = pass->wide + (image * (model->tokens - 1) + i) * pass->wide_stride;
        for (size_t c = 0; c < 3; c++)
            for (size_t y = 0; y < p; y++)
                for (size_t x = 0; x < p; x++) *out++ = normal[c][corner[(y * S + x) * 3 + c]];
    }
    return SC_OK;
}

/* x = [class token; patches] + positions, then the pre-norm where the model has one. */
static int embed(forward_pass *pass)
{
    const sc_model *model = pass->model;
    size_t D = model->width, T = model->tokens;
    const float *class_token = model->layer[CLASS_TOKEN].weight;
    const float *positions = model->layer[POSITIONS].weight;
    SC_TRY(parallel_for(pass->images, patch_task, pass));
    for (size_t image = 0; image < pass->images; image++) {
        float *x = pass->x + image * T * D;
        tile_target to = { .c = x + D, .c_stride = D, .bias = model->layer[PATCHES].bias,
                           .residual = positions + D, .residual_stride = D };
        for (size_t d = 0; d < D; d++) x[d] = class_token[d] + positions[d] + 0.0f;
        SC_TRY(multiply(pass->wide + image * (T - 1) * pass->wide_stride, T - 1, pass->wide_stride,
                        &model->layer[PATCHES].matrix, to));
    }
    if (!model->layer[PRE].weight) return SC_OK;
    SC_TRY(norm_rows(pass, &model->layer[PRE]));
    for (size_t i = 0; i < pass->rows; i++)
        memcpy(pass->x + i * D, pass->normed + i * pass->normed_stride, D * sizeof(float));
    return SC_OK;
}

/* One head of one image: out = softmax(q k^T / sqrt d) v. q, k, v: [T, d] within qkv [T, 3 D] */
static int head_task(void *context, size_t task, int worker)
{
    forward_pass *pass = context;
    const sc_model *model = pass->model;
    size_t D = model->width, T = model->tokens, d = D / model->heads, stride = pass->wide_stride;
    size_t image = task / model->heads, head = task % model->heads;
    const float *q = pass->wide + image * T * stride + head * d, *k = q + D, *v = k + D;
    packed_matrix keys = { .K = d, .N = T, .panels = panels_of(T) };
    packed_matrix values = { .K = T, .N = d, .panels = panels_of(d) };
    size_t columns = (size_t)kernels->columns;
    keys.data = pass->head_scratch + (size_t)worker * pass->head_scratch_size;
    values.data = keys.data + keys.panels * columns * d;
    float *scores = values.data + values.panels * columns * T;
    float *buffer = scores + T * padded(T);
    tile_target to_scores = { .c = scores, .c_stride = padded(T) };
    tile_target to_out = { .c = pass->normed + image * T * pass->normed_stride + head * d,
                           .c_stride = pass->normed_stride };
    pack_panels(&keys, 0, keys.panels, k, 1, stride);
    pack_panels(&values, 0, values.panels, v, stride, 1);
    product_rows(q, stride, T, &keys, 0, keys.panels, &to_scores, buffer);
    for (size_t t = 0; t < T; t++)
        kernels->softmax(scores + t * padded(T), T, 1.0f / sqrtf((float)d));
    product_rows(scores, padded(T), T, &values, 0, values.panels, &to_out, buffer);
    return SC_OK;
}

static int taps_at(const sc_tap *tap, size_t layer, sc_hook hook)
{
    return tap->layer == layer && tap->hook == hook;
}

/* Gives an output to whoever taps it. output: [M, D] at stride */
static void tap_output(const forward_pass *pass, size_t layer, sc_hook hook, const float *output,
                       size_t stride)
{
    for (const sc_tap *tap = pass->taps; tap < pass->taps + pass->count; tap++)
        for (size_t row = 0; taps_at(tap, layer, hook) && row < pass->rows; row++)
            memcpy(tap->out + row * tap->stride, output + row * stride,
                   pass->model->width * sizeof *output);
}

/* x += a W + bias, by way of normed or wide, whichever is not a, if somebody taps it. */
static int add_layer(forward_pass *pass, const float *a, const sc_layer *layer, size_t number,
                     sc_hook hook)
{
    size_t D = pass->model->width, wide = pass->wide_stride, normed = pass->normed_stride;
    size_t a_stride = a == pass->wide ? wide : normed, stride = a == pass->wide ? normed : wide;
    float *output = a == pass->wide ? pass->normed : pass->wide;
    int tapped = 0;
    for (size_t i = 0; i < pass->count; i++) tapped |= taps_at(&pass->taps[i], number, hook);
    tile_target to = { .c = tapped ? output : pass->x, .c_stride = tapped ? stride : D,
                       .bias = layer->bias, .residual = tapped ? NULL : pass->x,
                       .residual_stride = D };
    SC_TRY(multiply(a, pass->rows, a_stride, &layer->matrix, to));
    tap_output(pass, number, hook, output, stride);
    for (size_t i = 0; tapped && i < pass->rows; i++)
        for (size_t d = 0; d < D; d++)
            pass->x[i * D + d] = output[i * stride + d] + pass->x[i * D + d] + 0.0f;
    return SC_OK;
}

/* One block. x: [M, D] */
static int forward_block(forward_pass *pass, size_t number)
{
    const sc_model *model = pass->model;
    const sc_layer *block = &model->layer[(number - 1) * ROLES];
    tile_target wide = { .c = pass->wide, .c_stride = pass->wide_stride, .bias = block[QKV].bias };
    SC_TRY(norm_rows(pass, &block[NORM1]));
    SC_TRY(multiply(pass->normed, pass->rows, pass->normed_stride, &block[QKV].matrix, wide));
    SC_TRY(parallel_for(pass->images * model->heads, head_task, pass));
    SC_TRY(add_layer(pass, pass->normed, &block[OUT], number, SC_ATTN));
    if (number == pass->last && pass->stops_at_attn) return SC_OK;
    wide.bias = block[FC1].bias;
    wide.activation = (activation_kind)model->activation;
    SC_TRY(norm_rows(pass, &block[NORM2]));
    SC_TRY(multiply(pass->normed, pass->rows, pass->normed_stride, &block[FC1].matrix, wide));
    SC_TRY(add_layer(pass, pass->wide, &block[FC2], number, SC_MLP));
    tap_output(pass, number, SC_RESID, pass->x, model->width);
    return SC_OK;
}

/* head(norm(class token)); with class prompts, the cosine with each. out: [B, outputs] or
 * [B, classes] */
static int forward_head(forward_pass *pass, float *out)
{
    const sc_model *model = pass->model;
    const sc_layer *post = &model->layer[POST], *projection = &model->layer[HEAD];
    size_t D = model->width, P = padded(model->outputs);
    float *embedding = new_array(pass->images, P * sizeof *embedding);
    if (!embedding) return SC_FAILED;
    for (size_t b = 0; b < pass->images; b++)
        kernels->layer_norm(pass->x + b * model->tokens * D, post->weight, post->bias,
                            model->epsilon, pass->normed + b * pass->normed_stride, D);
    tile_target to = { .c = model->text ? embedding : out,
                       .c_stride = model->text ? P : model->outputs, .bias = projection->bias };
    int status = multiply(pass->normed, pass->images, pass->normed_stride, &projection->matrix, to);
    for (size_t b = 0; b < pass->images && model->text && status == SC_OK; b++) {
        kernels->unit_row(embedding + b * P, P);
        for (size_t c = 0; c < model->classes; c++)
            out[b * model->classes + c] = kernels->dot(embedding + b * P, model->text + c * P, P);
    }
    free(embedding);
    return status;
}

static int new_forward_pass(forward_pass *pass, const sc_model *model)
{
    size_t D = model->width, T = model->tokens, d = D / model->heads, longest = T > d ? T : d;
    size_t pixels = 3 * model->patch * model->patch, columns = (size_t)kernels->columns;
    size_t widest = 3 * D > model->hidden ? 3 * D : model->hidden;
    pass->model = model;
    pass->rows = pass->images * T;
    pass->wide_stride = padded(widest > pixels ? widest : pixels);
    pass->normed_stride = padded(D);
    pass->head_scratch_size = padded(panels_of(T) * columns * d + panels_of(d) * columns * T
                                     + T * padded(T) + row_buffer_size(longest));
    const array_spec arrays[] = {
        ARRAY(pass->x, pass->rows, D), ARRAY(pass->normed, pass->rows, pass->normed_stride),
        ARRAY(pass->wide, pass->rows, pass->wide_stride),
        ARRAY(pass->head_scratch, (size_t)thread_count(), pass->head_scratch_size) };
    return new_arrays(&pass->memory, arrays, COUNT(arrays));
}

int sc_model_forward(const sc_model *model, const unsigned char *pixels, size_t images,
                     const sc_tap *taps, size_t count, float *head)
{
    forward_pass pass = { .images = images, .pixels = pixels, .taps = taps, .count = count,
                          .last = head ? model->blocks : 0, .stops_at_attn = !head };
    for (size_t i = 0; i < count; i++)
        pass.last = taps[i].layer > pass.last ? taps[i].layer : pass.last;
    for (size_t i = 0; i < count; i++)
        if (taps[i].layer == pass.last && taps[i].hook != SC_ATTN) pass.stops_at_attn = 0;
    if (pass.last > model->loaded)
        return fail("%s: block %zu is not loaded", model->file.path, pass.last);
    int status = new_forward_pass(&pass, model);
    if (status == SC_OK) status = embed(&pass);
    for (size_t number = 1; number <= pass.last && status == SC_OK; number++)
        status = forward_block(&pass, number);
    if (status == SC_OK && head) status = forward_head(&pass, head);
    release(&pass.memory);
    return status;
}

/* ============================================================================================
 * 8. Activations
 *
 * One stream of activations for training and measuring, image by image: read from a file that
 * `extract` wrote, or computed from photos as they are read. Several hook points share one pass.
 * ============================================================================================ */

typedef struct {
    size_t images;                   /* N, or SC_UNKNOWN for a stream */
    size_t T, D, stride;             /* tokens an image, width, width padded */
    size_t grid;                     /* patches a side, 0 where the tokens are no grid */
    size_t first_patch;              /* 1 where token 0 is the class token */
    size_t classes;                  /* 0 without labels */
    char **class_name;               /* [classes] or NULL */
    uint64_t digest;                 /* of the data set */
    size_t taps;
    sc_tap tap[SC_MAX_TAPS];         /* hook points; out: [room T, stride] of the batch at hand */
    size_t count, begin;             /* images in the batch at hand; the new ones begin there */
    uint64_t *image, *draw;          /* [room], their indices in the data set and in the order */
    int64_t *label;                  /* [room], -1 without */
    unsigned char *pixels;           /* [room, S, S, 3] */
    float *logits;                   /* [room, classes], where asked for */
    size_t drawn;
    size_t kept, kept_at;            /* images read ahead: how many, and where they begin */
    memory_list memory;
    int is_file, skip_bad;
    sc_safetensors file;             /* activations, where is_file */
    const sc_tensor *activations, *labels;
    sc_images set;                   /* photos otherwise */
    sc_model model;
    sc_preprocess preprocess;
    image_reader reader;
    draw_function *order;
    void *order_context;
} feed;

enum {
    FORWARD_IMAGES = 16,             /* images a forward pass takes at once */
    MEASURE_IMAGES = 16              /* images a batch, where nobody asks for a size */
};

/* What an image is called in messages and tables. */
static const char *image_name(const feed *f, size_t image)
{
    if (f->is_file || !f->set.image || image >= f->set.count) return "";
    return f->set.image[image].name;
}

/* Adds to an error the image and token at fault; token: of the batch at hand. */
static int blame_token(const feed *f, size_t token)
{
    char reason[sizeof error_text];
    size_t image = (size_t)f->image[token / f->T];
    const char *name = image_name(f, image);
    memcpy(reason, error_text, sizeof reason);
    return fail("image %zu%s%.300s, token %zu: %.600s", image, *name ? " " : "", name, token % f->T,
                reason);
}

static int64_t feed_label(const feed *f, size_t image)
{
    int64_t label = -1;
    if (!f->is_file) return image < f->set.count && f->set.image ? f->set.image[image].label : -1;
    if (f->labels) sc_tensor_integers(&f->file, f->labels, image, 1, &label);
    return label;
}

/* Labels of saved activations: what classes there are, and a digest if the file has none. */
static int read_feed_labels(feed *f)
{
    const char *names = sc_metadata_find(&f->file, "class_names");
    const char *digest = sc_metadata_find(&f->file, "data_digest");
    digest64 sum = { 0 };
    f->labels = sc_tensor_find(&f->file, "labels");
    if (f->labels && f->labels->count != f->images)
        return fail("%s: %zu labels for %zu images", f->file.path, f->labels->count, f->images);
    if (names && f->labels)
        SC_TRY(json_string_array(names, f->file.path, &f->class_name, &f->classes));
    int64_t label = -1, largest = f->class_name ? (int64_t)f->classes - 1 : SC_MAX_CLASSES - 1;
    for (size_t i = 0; i < f->images; i++) {
        if (f->labels) SC_TRY(sc_tensor_integers(&f->file, f->labels, i, 1, &label));
        if (label < -1 || label > largest)
            return fail("%s: label %lld of image %zu is out of range", f->file.path,
                        (long long)label, i);
        if (label >= (int64_t)f->classes) f->classes = (size_t)label + 1;
        digest64_number(&sum, (uint64_t)label);
    }
    f->digest = digest ? (uint64_t)strtoull(digest, NULL, 16) : digest64_value(&sum);
    return SC_OK;
}

static int open_activations(feed *f, const char *path, size_t limit)
{
    SC_TRY(sc_safetensors_open(&f->file, path));
    const sc_tensor *a = sc_tensor_find(&f->file, "activations");
    const char *tokens = sc_metadata_find(&f->file, "tokens");
    if (!a || a->rank != 3 || a->count == 0)
        return fail("%s: a tensor activations [images, tokens, width] was expected", path);
    f->activations = a;
    f->is_file = 1;
    f->images = a->shape[0];
    f->T = a->shape[1];
    f->D = a->shape[2];
    f->first_patch = tokens && strcmp(tokens, "all") != 0 ? 0 : 1;
    if (f->D > SC_MAX_WIDTH || f->T > SC_MAX_TOKENS)
        return fail("%s: activations of %zu tokens x %zu are too large", path, f->T, f->D);
    SC_TRY(read_feed_labels(f));
    if (limit && limit < f->images) f->images = limit;
    return SC_OK;
}

static int open_photos(feed *f, const options *o, const char *images)
{
    const sc_model_options settings = { .gelu = o->gelu, .epsilon = o->epsilon, .heads = o->heads,
                                        .mean = o->mean, .std = o->std };
    SC_TRY(sc_images_open(&f->set, images, o->limit));
    SC_TRY(sc_model_open(&f->model, o->model, &settings));
    f->images = f->set.count;
    f->T = f->model.tokens;
    f->D = f->model.width;
    f->first_patch = 1;
    f->classes = f->set.classes;
    f->class_name = f->set.class_name;
    f->digest = f->set.digest;
    f->skip_bad = o->skip_bad;
    f->preprocess = (sc_preprocess){ .size = (int)f->model.image_size, .square = o->square,
                                     .crop_hf = o->crop && strcmp(o->crop, "hf") == 0 };
    return SC_OK;
}

/* Opens DATA: saved activations (--acts), or images through a model. */
static int open_feed(feed *f, const options *o, const char *images)
{
    *f = (feed){ 0 };
    if (o->acts && !images) SC_TRY(open_activations(f, o->acts, o->limit));
    else if (images && o->model) SC_TRY(open_photos(f, o, images));
    else return usage("no data: give --acts FILE, or -m MODEL and IMAGES");
    f->stride = padded(f->D);
    while ((f->grid + 1) * (f->grid + 1) <= f->T - f->first_patch) f->grid++;
    if (f->grid * f->grid != f->T - f->first_patch) f->grid = 0;
    return SC_OK;
}

/* Asks for a hook point; layer -1 is the last. Returns its place among the taps in *place. Saved
 * activations have one, wherever it is (layer 0: not known). */
static int add_tap(feed *f, long layer, sc_hook hook, size_t *place)
{
    long blocks = (long)f->model.blocks;
    if (!f->is_file && (layer == 0 || layer > blocks || -layer > blocks))
        return fail("%s: layer %ld of %ld: 1 to %ld or -1 to -%ld was expected", f->model.file.path,
                    layer, blocks, blocks, blocks);
    size_t number = layer > 0 ? (size_t)layer : f->is_file ? 0 : (size_t)(blocks + 1 + layer);
    for (*place = 0; *place < f->taps; ++*place)
        if (f->is_file || (f->tap[*place].layer == number && f->tap[*place].hook == hook))
            return SC_OK;
    if (f->taps == SC_MAX_TAPS) return usage("more than %d hook points", SC_MAX_TAPS);
    f->tap[f->taps++] = (sc_tap){ .layer = number, .hook = hook, .stride = f->stride };
    return SC_OK;
}

/* Options overrule what an SAE's file says. */
static int overrule_sae(sc_sae *sae, const options *o)
{
    if (o->arch) sae->topk = strcmp(o->arch, "topk") == 0;
    if (o->k) sae->k = (size_t)o->k;
    if (sae->topk && sae->k > sae->d_sae && !sae->path)
        return fail("--k %zu is more than the %zu latents", sae->k, sae->d_sae);
    if (sae->topk && (sae->k == 0 || sae->k > sae->d_sae))
        return fail("%s: a TopK SAE whose k is not from 1 to %zu (--k)", sae->path, sae->d_sae);
    if (o->hook)
        for (sae->hook = 0; strcmp(o->hook, hook_names[sae->hook]) != 0;) sae->hook++;
    return SC_OK;
}

/* An SAE takes activations of its width; saved ones that say where they come from must come from
 * where it listens, unless options overrule that. */
static int check_origin(const feed *f, const sc_sae *sae, const options *o)
{
    const char *layer = sc_metadata_find(&f->file, "layer");
    const char *hook = sc_metadata_find(&f->file, "hook");
    if (sae->d_in != f->D)
        return fail("%s: an SAE of width %zu, but the activations have %zu", sae->path, sae->d_in,
                    f->D);
    if (layer && sae->layer && !o->layer && strtoul(layer, NULL, 10) != sae->layer)
        return fail("%s: activations of layer %s where layer %zu was expected", f->file.path, layer,
                    sae->layer);
    if (hook && sae->hook >= 0 && !o->hook && strcmp(hook, hook_names[sae->hook]) != 0)
        return fail("%s: activations of hook %s where %s was expected", f->file.path, hook,
                    hook_names[sae->hook]);
    return SC_OK;
}

/* Where an SAE listens: its metadata say, or the options. */
static int tap_for(feed *f, const sc_sae *sae, const options *o, size_t *place)
{
    long layer = o->layer ? o->layer : (long)sae->layer;
    SC_TRY(check_origin(f, sae, o));
    if (!f->is_file && (!layer || sae->hook < 0))
        return usage("%s does not say where it listens: --layer and --hook", sae->path);
    return add_tap(f, layer, sae->hook < 0 ? SC_MLP : (sc_hook)sae->hook, place);
}

/* Starts handing out batches of up to `room` images, in the order given (NULL: first to last),
 * from draw number `from` on. */
static int start_feed(feed *f, size_t room, draw_function *order, void *context,
                      int with_logits)
{
    size_t S = f->model.image_size, deepest = 0;
    const array_spec arrays[] = {
        ARRAY(f->image, room, 1), ARRAY(f->draw, room, 1), ARRAY(f->label, room, 1),
        ARRAY(f->pixels, room, S * S * 3) };
    f->order = order;
    f->order_context = context;
    if (f->T > SIZE_MAX / room) return fail("a batch of %zu images is too large", room);
    SC_TRY(new_arrays(&f->memory, arrays, COUNT(arrays)));
    for (size_t i = 0; i < f->taps; i++) {
        SC_TRY(allocate(&f->memory, &f->tap[i].out, room * f->T, f->stride * sizeof(float)));
        deepest = f->tap[i].layer > deepest ? f->tap[i].layer : deepest;
    }
    if (f->is_file) return SC_OK;
    SC_TRY(sc_model_load(&f->model, with_logits ? f->model.blocks : deepest, with_logits));
    if (with_logits)
        SC_TRY(allocate(&f->memory, &f->logits, room, f->model.classes * sizeof *f->logits));
    return reader_open(&f->reader, &f->set, &f->preprocess, order, context, thread_count(),
                       f->skip_bad);
}

static int read_activations_task(void *context, size_t i, int worker)
{
    feed *f = context;
    (void)worker;
    i += f->begin;
    f->label[i] = feed_label(f, f->image[i]);
    for (size_t t = 0; t < f->T; t++) {
        size_t row = (size_t)f->image[i] * f->T + t;
        if (sc_tensor_floats(&f->file, f->activations, row * f->D, f->D,
                             f->tap[0].out + (i * f->T + t) * f->stride) != SC_OK)
            return blame_token(f, i * f->T + t);
    }
    return SC_OK;
}

static int next_from_file(feed *f, size_t want)
{
    for (; f->count < want; f->count++, f->drawn++) {
        size_t image = f->drawn;
        int status = f->order ? f->order(f->order_context, f->drawn, &image)
                              : image < f->images ? SC_OK : SC_END;
        if (status == SC_END) break;
        SC_TRY(status);
        f->image[f->count] = image;
        f->draw[f->count] = f->drawn;
    }
    return parallel_for(f->count - f->begin, read_activations_task, f);
}

/* Finite weights may still give numbers that are not. rows: [images, count, stride] of the batch */
static int check_finite(const feed *f, const float *rows, size_t count, size_t stride)
{
    size_t first = f->begin * count * stride, end = f->count * count * stride;
    size_t bad = first + first_beyond(rows + first, end - first, LARGEST_FLOAT);
    if (bad == end) return SC_OK;
    fail("%s gives %g where a finite number was expected", f->model.file.path, (double)rows[bad]);
    return blame_token(f, bad / stride * (f->T / count));
}

static int next_from_photos(feed *f, size_t want)
{
    size_t S = f->model.image_size, bytes = S * S * 3;
    const image_slot *slot;
    while (f->count < want) {
        int status = reader_next(&f->reader, &slot);
        if (status == SC_END && f->drawn == 0) return fail("standard input: no picture came");
        if (status == SC_END) break;
        SC_TRY(status);
        f->drawn++;
        memcpy(f->pixels + f->count * bytes, slot->pixels, bytes);
        f->image[f->count] = slot->image;
        f->draw[f->count] = slot->draw;
        f->label[f->count++] = feed_label(f, slot->image);
    }
    for (size_t first = f->begin; first < f->count; first += FORWARD_IMAGES) {
        size_t images = f->count - first < FORWARD_IMAGES ? f->count - first : FORWARD_IMAGES;
        sc_tap tap[SC_MAX_TAPS];
        memcpy(tap, f->tap, sizeof tap);
        for (size_t i = 0; i < f->taps; i++) tap[i].out += first * f->T * f->stride;
        SC_TRY(sc_model_forward(&f->model, f->pixels + first * bytes, images, tap, f->taps,
                                f->logits ? f->logits + first * f->model.classes : NULL));
    }
    for (size_t i = 0; i < f->taps; i++) SC_TRY(check_finite(f, f->tap[i].out, f->T, f->stride));
    return f->logits ? check_finite(f, f->logits, 1, f->model.classes) : SC_OK;
}

/* Images that were read ahead come first: they move to the front of the arrays. */
static void next_from_kept(feed *f, size_t want)
{
    size_t row = f->T * f->stride, some = f->kept < want ? f->kept : want;
    for (; f->count < some; f->count++, f->kept_at++) {
        f->image[f->count] = f->image[f->kept_at];
        f->draw[f->count] = f->draw[f->kept_at];
        memmove(f->tap[0].out + f->count * row, f->tap[0].out + f->kept_at * row,
                row * sizeof(float));
    }
    f->kept -= some;
}

/* The next batch: f->count images, 0 at the end. */
static int next_batch(feed *f, size_t want)
{
    f->count = 0;
    next_from_kept(f, want);
    f->begin = f->count;
    if (f->count == want) return SC_OK;
    return f->is_file ? next_from_file(f, want) : next_from_photos(f, want);
}

/* Hands every batch of a data set to `take`. */
static int for_each_batch(feed *f, int with_logits, int (*take)(void *context), void *context)
{
    uint64_t done = 0;
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, with_logits));
    for (;; done += f->count) {
        SC_TRY(next_batch(f, MEASURE_IMAGES));
        if (f->count == 0) return SC_OK;
        SC_TRY(take(context));
        show_progress("image", done + f->count, f->images, done + f->count, "images", "%s", "");
    }
}

/* A path without its folders. */
static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static void close_feed(feed *f)
{
    release(&f->memory);
    if (f->is_file) free(f->class_name);
    else reader_close(&f->reader);
    sc_safetensors_close(&f->file);
    sc_images_close(&f->set);
    sc_model_close(&f->model);
    *f = (feed){ 0 };
}

/* ============================================================================================
 * 8. The sparse autoencoder
 *
 *     h = W_enc^T (x - b_dec) + b_enc       f = relu(h), or relu of the k largest of h
 *     x' = W_dec^T f + b_dec                 (Bricken et al., 2023; Gao et al., 2024)
 *
 * Weights lie latent by latent. A batch's tokens are cut into tiles of at most 256; a tile's
 * pre-activations become sparse codes while in cache, so there is no tokens x latents matrix.
 * ============================================================================================ */

static const char *const architecture_names[] = { "standard", "topk" };

static int new_sae(sc_sae *sae, size_t d_in, size_t d_sae)
{
    *sae = (sc_sae){ .d_in = d_in, .d_sae = d_sae, .stride = padded(d_in), .hook = -1 };
    if (d_in == 0 || d_sae == 0 || d_in > SC_MAX_WIDTH || d_sae > SC_MAX_LATENTS)
        return fail("an SAE of %zu inputs and %zu latents is not possible", d_in, d_sae);
    sae->W_enc = new_array(d_sae, sae->stride * sizeof *sae->W_enc);
    sae->W_dec = new_array(d_sae, sae->stride * sizeof *sae->W_dec);
    sae->b_enc = new_array(padded(d_sae), sizeof *sae->b_enc);
    sae->b_dec = new_array(sae->stride, sizeof *sae->b_dec);
    return sae->W_enc && sae->W_dec && sae->b_enc && sae->b_dec ? SC_OK : SC_FAILED;
}

void sc_sae_close(sc_sae *sae)
{
    free(sae->W_enc);
    free(sae->W_dec);
    free(sae->b_enc);
    free(sae->b_dec);
    free(sae->path);
    free(sae->model);
    free(sae->b_dec_start);
    *sae = (sc_sae){ 0 };
}

typedef struct { sc_sae *sae; uint64_t seed; } initialisation;

/* Kaiming's bound for the encoder, unit rows for the decoder. */
static int initial_row(void *context, size_t j, int worker)
{
    const initialisation *start = context;
    const sc_sae *sae = start->sae;
    float *encoder = sae->W_enc + j * sae->stride, *decoder = sae->W_dec + j * sae->stride;
    float bound = sqrtf(6.0f / (float)sae->d_sae);
    (void)worker;
    for (size_t d = 0; d < sae->d_in; d++) {
        uint64_t index = (uint64_t)j * sae->d_in + d;
        encoder[d] = bound * uniform(start->seed, STREAM_W_ENC, index);
        decoder[d] = uniform(start->seed, STREAM_W_DEC, index);
    }
    kernels->unit_row(decoder, sae->stride);
    return SC_OK;
}

int sc_sae_init(sc_sae *sae, size_t d_in, size_t d_sae, uint64_t seed)
{
    initialisation start = { sae, seed };
    int status = new_sae(sae, d_in, d_sae);
    if (status == SC_OK) status = parallel_for(d_sae, initial_row, &start);
    if (status != SC_OK) sc_sae_close(sae);
    return status;
}

enum { TRANSPOSE_ROWS = 16 };

/* W_enc lies [D, n] in files and latent by latent in memory: some rows at a time are read from the
 * tensor, or go to the writer where there is one. */
static int move_encoder(const sc_sae *sae, const sc_safetensors *file, const sc_tensor *tensor,
                        sc_writer *writer)
{
    size_t n = sae->d_sae;
    float *rows = new_array(n, TRANSPOSE_ROWS * sizeof *rows);
    int status = rows ? SC_OK : SC_FAILED;
    for (size_t d = 0; d < sae->d_in && status == SC_OK; d += TRANSPOSE_ROWS) {
        size_t height = sae->d_in - d < TRANSPOSE_ROWS ? sae->d_in - d : TRANSPOSE_ROWS;
        if (!writer) status = sc_tensor_floats(file, tensor, d * n, height * n, rows);
        for (size_t j = 0; j < n; j++)
            for (size_t i = 0; i < height; i++) {
                float *here = sae->W_enc + j * sae->stride + d + i, *there = rows + i * n + j;
                if (writer) *there = *here;
                else *here = *there;
            }
        if (writer) status = sc_writer_floats(writer, rows, height * n);
    }
    free(rows);
    return status;
}

/* Better to fail now than when the work is done. */
static int try_output(const char *path)
{
    sc_writer w;
    SC_TRY(sc_writer_open(&w, path, 0));
    sc_writer_discard(&w);
    return SC_OK;
}

/* A [n, D] tensor to and from rows with padding. */
static int read_rows(const sc_safetensors *file, const char *name, size_t n, size_t D,
                     size_t stride, float *rows)
{
    const sc_tensor *tensor = sc_tensor_find(file, name);
    if (!tensor || tensor->rank == 0 || tensor->count != n * D
        || tensor->shape[tensor->rank - 1] != D)
        return fail("%s: a tensor %s of %zu x %zu was expected", file->path, name, n, D);
    for (size_t j = 0; j < n; j++)
        SC_TRY(sc_tensor_floats(file, tensor, j * D, D, rows + j * stride));
    return SC_OK;
}

static int write_rows(sc_writer *writer, const char *name, size_t n, size_t D, size_t stride,
                      const float *rows)
{
    SC_TRY(sc_writer_tensor(writer, name, SC_F32, 2, (size_t[]){ n, D }));
    for (size_t j = 0; j < n; j++) SC_TRY(sc_writer_floats(writer, rows + j * stride, D));
    return SC_OK;
}

static int write_vector(sc_writer *writer, const char *name, size_t n, const float *vector)
{
    SC_TRY(sc_writer_tensor(writer, name, SC_F32, 1, &n));
    return sc_writer_floats(writer, vector, n);
}

/* A whole number from 1 on in the metadata; absent leaves *value. */
static int metadata_number(const sc_safetensors *file, const char *key, double most, size_t *value)
{
    const char *text = sc_metadata_find(file, key);
    double number = 0;
    if (!text) return SC_OK;
    if (parse_number(text, key, 1, most, &number) != SC_OK || number != floor(number))
        return fail("%s: metadata %s = '%s' is no whole number from 1 to %g", file->path, key, text,
                    most);
    *value = (size_t)number;
    return SC_OK;
}

static int read_sae_metadata(sc_sae *sae, const sc_safetensors *file)
{
    const char *architecture = sc_metadata_find(file, "architecture");
    const char *hook = sc_metadata_find(file, "hook"), *model = sc_metadata_find(file, "model");
    const char *start = sc_metadata_find(file, "b_dec_start");
    sc_hook found = SC_MLP;
    sae->topk = architecture && strcmp(architecture, architecture_names[1]) == 0;
    if (architecture && strcmp(architecture, architecture_names[sae->topk]) != 0)
        return fail("%s: architecture '%s' is neither standard nor topk", file->path, architecture);
    SC_TRY(metadata_number(file, "k", (double)sae->d_sae, &sae->k));
    SC_TRY(metadata_number(file, "layer", 1e6, &sae->layer));
    if (hook && parse_hook(hook, &found) != SC_OK)
        return fail("%s: metadata hook = '%s' is none of attn, mlp, resid", file->path, hook);
    if (hook) sae->hook = (int)found;
    if (model && !(sae->model = copy_string(model))) return SC_FAILED;
    if (start && !(sae->b_dec_start = copy_string(start))) return SC_FAILED;
    return SC_OK;
}

static int read_sae(sc_sae *sae, const sc_safetensors *file)
{
    const sc_tensor *encoder = sc_tensor_find(file, "W_enc");
    if (!encoder || encoder->rank != 2 || encoder->count == 0)
        return fail("%s: this is no SAE: a tensor W_enc [d_in, d_sae] was expected", file->path);
    SC_TRY(new_sae(sae, encoder->shape[0], encoder->shape[1]));
    if (!(sae->path = copy_string(file->path))) return SC_FAILED;
    SC_TRY(move_encoder(sae, file, encoder, NULL));
    SC_TRY(read_rows(file, "W_dec", sae->d_sae, sae->d_in, sae->stride, sae->W_dec));
    SC_TRY(read_rows(file, "b_enc", 1, sae->d_sae, sae->d_sae, sae->b_enc));
    SC_TRY(read_rows(file, "b_dec", 1, sae->d_in, sae->stride, sae->b_dec));
    return read_sae_metadata(sae, file);
}

int sc_sae_open(sc_sae *sae, const char *path)
{
    sc_safetensors file;
    *sae = (sc_sae){ 0 };
    SC_TRY(sc_safetensors_open(&file, path));
    int status = read_sae(sae, &file);
    sc_safetensors_close(&file);
    if (status != SC_OK) sc_sae_close(sae);
    return status;
}

/* The tensors and what an SAE is; the caller adds how it was trained. */
static int write_sae(sc_writer *writer, const sc_sae *sae)
{
    const struct { const char *key; size_t value; } numbers[] = {
        { "k", sae->topk ? sae->k : 0 }, { "d_in", sae->d_in }, { "d_sae", sae->d_sae },
        { "layer", sae->layer } };
    SC_TRY(sc_writer_metadata(writer, "architecture", architecture_names[sae->topk]));
    for (size_t i = 0; i < COUNT(numbers); i++) {
        char text[32];
        snprintf(text, sizeof text, "%zu", numbers[i].value);
        if (numbers[i].value) SC_TRY(sc_writer_metadata(writer, numbers[i].key, text));
    }
    if (sae->hook >= 0) SC_TRY(sc_writer_metadata(writer, "hook", hook_names[sae->hook]));
    if (sae->model) SC_TRY(sc_writer_metadata(writer, "model", sae->model));
    SC_TRY(sc_writer_tensor(writer, "W_enc", SC_F32, 2, (size_t[]){ sae->d_in, sae->d_sae }));
    SC_TRY(move_encoder(sae, NULL, NULL, writer));
    SC_TRY(write_vector(writer, "b_enc", sae->d_sae, sae->b_enc));
    SC_TRY(write_rows(writer, "W_dec", sae->d_sae, sae->d_in, sae->stride, sae->W_dec));
    return write_vector(writer, "b_dec", sae->d_in, sae->b_dec);
}

/* --------------------------------------------------------------------------------------------
 * Sparse codes. For each latent of a tile, a bit a token says where it fires; the values follow in
 * the order of latents, then tokens.
 * -------------------------------------------------------------------------------------------- */

enum { TILE_TOKENS = 256, TILE_WORDS = TILE_TOKENS / MASK_BITS };

typedef struct {
    size_t first, tokens;            /* where the tile begins in the batch, how long it is */
    uint64_t (*mask)[TILE_WORDS];    /* [n] */
    size_t *start;                   /* [n + 1], where latent j's values begin */
    float *value;                    /* [start[n]] */
    size_t capacity;
} tile_codes;

static inline int low_bit(uint64_t bits)
{
#if defined(__GNUC__)
    return __builtin_ctzll(bits);
#else
    int i = 0;
    while (!(bits >> i & 1)) i++;
    return i;
#endif
}

/* Visits the tokens where latent j of a tile fires, in order: token is within the tile, value its
 * activation. */
typedef struct {
    const tile_codes *tile;
    size_t j, next;
    int word;
    uint64_t bits;
    size_t token;
    float value;
} code_walk;

static code_walk walk_codes(const tile_codes *tile, size_t j)
{
    return (code_walk){ .tile = tile, .j = j, .next = tile->start[j], .bits = tile->mask[j][0] };
}

static inline int next_code(code_walk *w)
{
    if (w->next == w->tile->start[w->j + 1]) return 0;
    while (!w->bits) w->bits = w->tile->mask[w->j][++w->word];
    w->token = (size_t)(w->word * MASK_BITS + low_bit(w->bits));
    w->bits &= w->bits - 1;
    w->value = w->tile->value[w->next++];
    return 1;
}

/* A batch of T tokens on its way through the SAE. D is padded to `stride` in every array. */
typedef struct {
    const sc_sae *sae;
    size_t T, room;                  /* tokens, tokens there is room for */
    int reconstruct;                 /* whether x' is wanted */
    const float *x;                  /* [T, D], the caller's */
    float *centred;                  /* [T, D], x - b_dec */
    packed_matrix panels;            /* the same as columns, [D, T] */
    float *output;                   /* [T, D], x', later its gradient */
    double *norm;                    /* [T], ||x|| */
    double *squared_error;           /* [T], ||x' - x||^2 */
    double *sum_f;                   /* [T], sum of f */
    double *active;                  /* [T], latents that fire */
    tile_codes *tile;                /* [tiles] */
    size_t tiles, tile_room;
    unsigned char *scratch;          /* [workers][scratch_bytes] */
    size_t scratch_bytes;
    memory_list memory;
} sae_batch;

/* What a worker needs for a tile; the arrays lie in the batch's scratch. */
typedef struct {
    float *h;                        /* [MAX_ROWS][TILE_TOKENS] */
    float *buffer;                   /* for load_rows */
    float *dense;                    /* [TILE_TOKENS][CHAIN], a block's codes in full */
    packed_matrix weights;           /* [CHAIN, D], a block of W_dec */
    float *value;                    /* [CHAIN], a token's codes in a block */
    float *sum;                      /* [stride] */
    uint64_t *heap;                  /* [TILE_TOKENS][k], TopK's best so far */
    float *limit;                    /* [TILE_TOKENS], what a candidate must exceed */
} tile_scratch;

/* Lays a worker's arrays out from `memory`, or only measures them where that is NULL. */
static size_t lay_out_scratch(tile_scratch *s, const sc_sae *sae, void *memory)
{
    size_t deepest = sae->d_in > CHAIN ? sae->d_in : CHAIN, columns = (size_t)kernels->columns;
    s->weights = (packed_matrix){ .K = CHAIN, .N = sae->d_in, .panels = panels_of(sae->d_in) };
    const array_spec arrays[] = {
        ARRAY(s->h, MAX_ROWS, TILE_TOKENS), ARRAY(s->buffer, row_buffer_size(deepest), 1),
        ARRAY(s->dense, TILE_TOKENS, CHAIN),
        ARRAY(s->weights.data, s->weights.panels * columns, CHAIN), ARRAY(s->value, CHAIN, 1),
        ARRAY(s->sum, sae->stride, 1), ARRAY(s->heap, sae->topk ? sae->k : 0, TILE_TOKENS),
        ARRAY(s->limit, TILE_TOKENS, 1) };
    return lay_out(arrays, COUNT(arrays), memory);
}

static tile_scratch worker_scratch(const sae_batch *batch, int worker)
{
    tile_scratch s;
    lay_out_scratch(&s, batch->sae, batch->scratch + (size_t)worker * batch->scratch_bytes);
    return s;
}

static void free_batch(sae_batch *batch)
{
    for (size_t i = 0; batch->tile && i < batch->tile_room; i++) free(batch->tile[i].value);
    release(&batch->memory);
    *batch = (sae_batch){ 0 };
}

/* How many tiles T tokens are cut into: as many for each thread, none longer than 256. */
static size_t tile_count(size_t T)
{
    size_t share = (size_t)thread_count() * (TILE_TOKENS / (size_t)kernels->columns);
    return (size_t)thread_count() * ((panels_of(T) + share - 1) / share);
}

/* Room for batches of up to `room` tokens. */
static int new_batch(sae_batch *batch, const sc_sae *sae, size_t room)
{
    tile_scratch s;
    uint64_t (*masks)[TILE_WORDS] = NULL;
    size_t n = sae->d_sae, tiles = tile_count(room), *starts = NULL;
    size_t columns = panels_of(room) * (size_t)kernels->columns;
    *batch = (sae_batch){ .sae = sae, .room = room, .reconstruct = 1, .tile_room = tiles,
                          .scratch_bytes = lay_out_scratch(&s, sae, NULL) };
    batch->panels.K = sae->d_in;
    const array_spec arrays[] = {
        ARRAY(batch->centred, room, sae->stride), ARRAY(batch->output, room, sae->stride),
        ARRAY(batch->panels.data, columns, sae->d_in), ARRAY(batch->norm, room, 1),
        ARRAY(batch->squared_error, room, 1), ARRAY(batch->sum_f, room, 1),
        ARRAY(batch->active, room, 1), ARRAY(batch->tile, tiles, 1), ARRAY(masks, n, tiles),
        ARRAY(starts, n + 1, tiles),
        ARRAY(batch->scratch, (size_t)thread_count(), batch->scratch_bytes) };
    SC_TRY(new_arrays(&batch->memory, arrays, COUNT(arrays)));
    for (size_t i = 0; i < tiles; i++) {
        batch->tile[i].mask = masks + i * n;
        batch->tile[i].start = starts + i * (n + 1);
    }
    return SC_OK;
}

/* h[i][t] = (W_enc^T (x - b_dec) + b_enc) of some latents on panels first .. last - 1. latent:
 * [count]; rows of h are h_stride long; what lies past the last token is not meant for anyone. */
static void pre_activations(const sae_batch *batch, const size_t *latent, size_t count,
                            size_t first, size_t last, float *h, size_t h_stride, float *buffer)
{
    const sc_sae *sae = batch->sae;
    size_t columns = (size_t)kernels->columns, D = sae->d_in;
    float tile[MAX_ROWS * MAX_COLUMNS];
    load_rows(buffer, sae->W_enc, sae->stride, latent, count, D);
    for (size_t panel = first; panel < last; panel++) {
        kernels->tile(D, buffer, batch->panels.data + panel * D * columns, tile);
        for (size_t i = 0; i < count; i++) {
            float *out = h + i * h_stride + (panel - first) * columns, b = sae->b_enc[latent[i]];
            for (size_t c = 0; c < columns; c++) out[c] = tile[i * columns + c] + b + 0.0f;
        }
    }
}

/* Room for `more` values behind the first `used`. */
static int reserve_values(tile_codes *tile, size_t used, size_t more)
{
    if (used + more <= tile->capacity) return SC_OK;
    size_t capacity = (used + more) / 8 * 9 + 1024;
    float *value = new_array(capacity, sizeof *value);
    if (!value) return SC_FAILED;
    if (used) memcpy(value, tile->value, used * sizeof *value);
    free(tile->value);
    tile->value = value;
    tile->capacity = capacity;
    return SC_OK;
}

/* TopK: a token's k best are a heap of numbers that sort: positive floats order as their bits do,
 * and of equal ones the lower latent is the larger number; 0 is nobody. */
static uint64_t candidate_of(float h, size_t latent)
{
    return (uint64_t)bits_of_float(h) << 32 | (uint32_t)~(uint32_t)latent;
}

static float candidate_value(uint64_t c) { return float_of_bits((uint32_t)(c >> 32)); }
static size_t candidate_latent(uint64_t c) { return (uint32_t)~(uint32_t)c; }

/* Replaces the least number of a heap, its first, by a larger one. heap: [k] */
static void replace_least(uint64_t *heap, size_t k, uint64_t number)
{
    size_t place = 0;
    for (size_t child = 1; child < k; child = 2 * place + 1) {
        if (child + 1 < k && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= number) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = number;
}

/* Takes latent j's pre-activations into the heaps of its tile's tokens. h: [TILE_TOKENS] */
static void offer_candidates(const sc_sae *sae, size_t j, const float *h, size_t words,
                             tile_scratch *s)
{
    uint64_t mask[TILE_WORDS];
    if (!kernels->find_above(h, s->limit, words * MASK_BITS, mask)) return;
    for (size_t w = 0; w < words; w++)
        for (uint64_t bits = mask[w]; bits; bits &= bits - 1) {
            size_t t = w * MASK_BITS + (size_t)low_bit(bits);
            replace_least(s->heap + t * sae->k, sae->k, candidate_of(h[t], j));
            s->limit[t] = candidate_value(s->heap[t * sae->k]);
        }
}

/* The k best of each token become the tile's codes, ordered by counting. */
static int select_codes(const sc_sae *sae, tile_codes *tile, const tile_scratch *s)
{
    size_t n = sae->d_sae, k = sae->k, *start = tile->start;
    memset(tile->mask, 0, n * sizeof *tile->mask);
    memset(start, 0, (n + 1) * sizeof *start);
    for (size_t i = 0; i < tile->tokens * k; i++) {
        size_t j = candidate_latent(s->heap[i]), t = i / k;
        if (!s->heap[i]) continue;
        tile->mask[j][t / MASK_BITS] |= (uint64_t)1 << (t % MASK_BITS);
        start[j + 1]++;
    }
    for (size_t j = 0; j < n; j++) start[j + 1] += start[j];
    SC_TRY(reserve_values(tile, 0, start[n]));
    for (size_t i = 0; i < tile->tokens * k; i++)            /* moves each start to its end, */
        if (s->heap[i])
            tile->value[start[candidate_latent(s->heap[i])]++] = candidate_value(s->heap[i]);
    memmove(start + 1, start, n * sizeof *start);            /* which is where the next begins */
    start[0] = 0;
    return SC_OK;
}

/* f of a tile's tokens, all latents. */
static int encode_tile(const sae_batch *batch, tile_codes *tile, tile_scratch *s)
{
    const sc_sae *sae = batch->sae;
    size_t columns = (size_t)kernels->columns, rows = (size_t)kernels->rows, used = 0;
    size_t first = tile->first / columns, last = first + panels_of(tile->tokens);
    size_t words = (tile->tokens + MASK_BITS - 1) / MASK_BITS, latent[MAX_ROWS];
    if (sae->topk) memset(s->heap, 0, TILE_TOKENS * sae->k * sizeof *s->heap);
    memset(s->limit, 0, TILE_TOKENS * sizeof *s->limit);
    for (size_t group = 0; group < sae->d_sae; group += rows) {
        size_t count = sae->d_sae - group < rows ? sae->d_sae - group : rows;
        for (size_t i = 0; i < count; i++) latent[i] = group + i;
        pre_activations(batch, latent, count, first, last, s->h, TILE_TOKENS, s->buffer);
        if (!sae->topk) SC_TRY(reserve_values(tile, used, count * TILE_TOKENS));
        for (size_t i = 0; i < count; i++) {
            float *h = s->h + i * TILE_TOKENS;
            for (size_t t = tile->tokens; t < words * MASK_BITS; t++) h[t] = 0;
            tile->start[group + i] = used;
            if (sae->topk) offer_candidates(sae, group + i, h, words, s);
            else used += kernels->pack_positive(h, words * MASK_BITS, tile->mask[group + i],
                                                tile->value + used);
        }
    }
    tile->start[sae->d_sae] = used;
    return sae->topk ? select_codes(sae, tile, s) : SC_OK;
}

/* --------------------------------------------------------------------------------------------
 * Decoding: x' = W_dec^T f + b_dec, in blocks of 256 latents, each a chain. A block with few codes
 * adds up their rows; one with many is multiplied out in full. Both are the same chains.
 * -------------------------------------------------------------------------------------------- */

enum { DENSE_SHARE = 8 };            /* in full where more than one code in 8 is active */

/* out[t] += the chain of s->dense's row t, from the latents that fire. out: [tokens, stride] */
static void decode_sparse(const sc_sae *sae, size_t tokens, size_t block, float *out,
                          tile_scratch *s)
{
    uint64_t mask[CHAIN / MASK_BITS];
    for (size_t t = 0; t < tokens; t++) {
        const float *value = s->value;
        if (!kernels->pack_positive(s->dense + t * CHAIN, CHAIN, mask, s->value)) continue;
        memset(s->sum, 0, sae->stride * sizeof *s->sum);
        for (size_t w = 0; w < CHAIN / MASK_BITS; w++)
            for (uint64_t bits = mask[w]; bits; bits &= bits - 1) {
                size_t j = block + w * MASK_BITS + (size_t)low_bit(bits);
                kernels->add_scaled(*value++, sae->W_dec + j * sae->stride, s->sum, sae->stride);
            }
        kernels->add_scaled(1.0f, s->sum, out + t * sae->stride, sae->stride);
    }
}

/* The same as a product over all the block's latents. */
static void decode_dense(const sc_sae *sae, size_t tokens, size_t block, size_t latents,
                         float *out, tile_scratch *s)
{
    tile_target to = { .c = out, .c_stride = sae->stride,
                       .residual = out, .residual_stride = sae->stride };
    s->weights.K = latents;
    pack_panels(&s->weights, 0, s->weights.panels, sae->W_dec + block * sae->stride, sae->stride,
                1);
    product_rows(s->dense, CHAIN, tokens, &s->weights, 0, s->weights.panels, &to, s->buffer);
}

static void decode_tile(const sae_batch *batch, const tile_codes *tile, tile_scratch *s)
{
    const sc_sae *sae = batch->sae;
    float *out = batch->output + tile->first * sae->stride;
    memset(out, 0, tile->tokens * sae->stride * sizeof *out);
    for (size_t block = 0; block < sae->d_sae; block += CHAIN) {
        size_t latents = sae->d_sae - block < CHAIN ? sae->d_sae - block : CHAIN;
        size_t active = tile->start[block + latents] - tile->start[block];
        if (active == 0) continue;
        memset(s->dense, 0, TILE_TOKENS * CHAIN * sizeof *s->dense);
        for (size_t i = 0; i < latents; i++)
            for (code_walk w = walk_codes(tile, block + i); next_code(&w);)
                s->dense[w.token * CHAIN + i] = w.value;
        if (active * DENSE_SHARE > tile->tokens * latents)
            decode_dense(sae, tile->tokens, block, latents, out, s);
        else decode_sparse(sae, tile->tokens, block, out, s);
    }
    for (size_t t = 0; t < tile->tokens; t++)
        for (size_t d = 0; d < sae->d_in; d++)
            out[t * sae->stride + d] = out[t * sae->stride + d] + sae->b_dec[d] + 0.0f;
}

/* What the losses need of each token. */
static void measure_tile(const sae_batch *batch, const tile_codes *tile, tile_scratch *s)
{
    size_t stride = batch->sae->stride;
    for (size_t t = tile->first; t < tile->first + tile->tokens; t++) {
        const float *x = batch->x + t * stride, *output = batch->output + t * stride;
        for (size_t d = 0; d < stride; d++) s->sum[d] = output[d] - x[d];
        batch->norm[t] = sqrtf(kernels->dot(x, x, stride));
        batch->squared_error[t] = batch->reconstruct ? kernels->dot(s->sum, s->sum, stride) : 0;
        batch->sum_f[t] = batch->active[t] = 0;
    }
    for (size_t j = 0; j < batch->sae->d_sae; j++)
        for (code_walk w = walk_codes(tile, j); next_code(&w);) {
            batch->sum_f[tile->first + w.token] += w.value;
            batch->active[tile->first + w.token]++;
        }
}

static int centre_task(void *context, size_t panel, int worker)
{
    sae_batch *batch = context;
    const sc_sae *sae = batch->sae;
    size_t columns = (size_t)kernels->columns, stride = sae->stride;
    (void)worker;
    for (size_t t = panel * columns; t < batch->T && t < (panel + 1) * columns; t++)
        for (size_t d = 0; d < stride; d++)
            batch->centred[t * stride + d] = batch->x[t * stride + d] - sae->b_dec[d];
    pack_panels(&batch->panels, panel, panel + 1, batch->centred, 1, stride);
    return SC_OK;
}

static int tile_task(void *context, size_t task, int worker)
{
    sae_batch *batch = context;
    tile_codes *tile = &batch->tile[task];
    tile_scratch s = worker_scratch(batch, worker);
    SC_TRY(encode_tile(batch, tile, &s));
    if (batch->reconstruct) decode_tile(batch, tile, &s);
    measure_tile(batch, tile, &s);
    return SC_OK;
}

/* Encodes and decodes T tokens. x: [T, stride] */
static int run_sae(sae_batch *batch, const float *x, size_t T)
{
    size_t columns = (size_t)kernels->columns, panels = panels_of(T);
    batch->x = x;
    batch->T = batch->panels.N = T;
    batch->panels.panels = panels;
    batch->tiles = tile_count(T);
    if (batch->tiles > panels) batch->tiles = panels;
    for (size_t i = 0; i < batch->tiles; i++) {
        size_t first = i * panels / batch->tiles * columns;
        size_t end = (i + 1) * panels / batch->tiles * columns;
        batch->tile[i].first = first;
        batch->tile[i].tokens = (end < T ? end : T) - first;
    }
    SC_TRY(parallel_for(panels, centre_task, batch));
    return parallel_for(batch->tiles, tile_task, batch);
}

/* Sum of n numbers in float64: blocks of 256 in order, then the blocks in order. */
static double sum_of(const double *value, size_t n)
{
    double sum = 0;
    for (size_t block = 0; block < n; block += CHAIN) {
        double part = 0;
        for (size_t i = block; i < n && i < block + CHAIN; i++) part += value[i];
        sum += part;
    }
    return sum;
}

/* ============================================================================================
 * 9. Training
 *
 * One step (interface: mse + l1 + ghost; Lim et al., 2025; ghost gradients after Jermyn and
 * Templeton, 2024):
 *   rows of W_dec to unit norm; encode and decode all tokens, tile by tile;
 *   g = d loss / d x' = 2 (x' - x) / (||x|| T D)
 *   latent by latent:   df = W_dec g + lambda / T,  dh = df where f > 0
 *                       dW_dec = sum_t f g,         dW_enc = sum_t dh (x - b_dec)
 *     less dW_dec's component along the row, then Adam, while the rows are in cache;
 *   db_dec = sum_t g - W_enc sum_t dh.
 * ============================================================================================ */

typedef struct {
    double loss, mse, l1, ghost, l0, explained_variance, lr;
    size_t dead;
} step_result;

typedef struct { float *m, *v; } moments;

typedef struct {
    sc_train_options options;
    sc_sae sae;
    moments W_enc, W_dec, b_enc, b_dec;      /* Adam's, shaped as what they belong to */
    uint32_t *silent;                        /* [n], steps since the latent fired */
    uint64_t step;                           /* steps done */
    double beta1_power, beta2_power;         /* 0.9^step, 0.999^step */
    sae_batch batch;
    adam_step adam;
    int ghosts;                              /* whether this step has dead latents to revive */
    float *ghost;                            /* [T, D], W_dec^T exp(h), later its gradient */
    double *token_loss;                      /* [T], a token's part of the ghost loss */
    packed_matrix x_rows, g_rows, ghost_rows;/* [T, D]: centred, output and ghost for products */
    float *db_enc;                           /* [n] */
    float *W_enc_db;                         /* [chains of n][stride], chains of W_enc db_enc */
    double *deviation;                       /* [stride], sum over tokens of (x - mean)^2 */
    unsigned char *scratch;                  /* [workers][scratch_bytes] */
    size_t scratch_bytes;
    memory_list memory;
} trainer;

/* One worker's memory for a group of latents in the backward pass. R: the kernel's rows; Tp: T
 * padded to whole panels. */
typedef struct {
    float *f, *dh, *e;                       /* [R, Tp], e = exp(h) of dead latents */
    uint32_t *token;                         /* [T], where a latent fires */
    float *code_f, *code_dh;                 /* [T], its f and dh there */
    float *dW_enc, *dW_dec, *extra;          /* [R, stride] */
    float *chain;                            /* [2, stride] */
    float *buffer;                           /* for load_rows */
} backward_scratch;

static size_t padded_tokens(const trainer *t) { return padded(t->batch.room) + MAX_COLUMNS; }

static size_t lay_out_backward(backward_scratch *s, const trainer *t, void *memory)
{
    size_t R = (size_t)kernels->rows, T = padded_tokens(t), stride = t->sae.stride;
    size_t deepest = T > stride ? T : stride;        /* of a product: over tokens, or W_enc^T x */
    const array_spec arrays[] = {
        ARRAY(s->f, T, R), ARRAY(s->dh, T, R), ARRAY(s->e, t->options.ghost ? T : 0, R),
        ARRAY(s->token, T, 1), ARRAY(s->code_f, T, 1), ARRAY(s->code_dh, T, 1),
        ARRAY(s->dW_enc, R, stride), ARRAY(s->dW_dec, R, stride), ARRAY(s->extra, R, stride),
        ARRAY(s->chain, 2, stride), ARRAY(s->buffer, row_buffer_size(deepest), 1) };
    return lay_out(arrays, COUNT(arrays), memory);
}

static int is_dead(const trainer *t, size_t j) { return t->silent[j] > t->options.dead_window; }

static void free_trainer(trainer *t)
{
    free_batch(&t->batch);
    release(&t->memory);
    sc_sae_close(&t->sae);
    *t = (trainer){ 0 };
}

/* Everything a training run of batches of T tokens needs; t->sae and t->options are set. */
static int prepare_trainer(trainer *t, size_t T)
{
    size_t n = t->sae.d_sae, D = t->sae.d_in, stride = t->sae.stride, N = padded(n);
    size_t ghosts = t->options.ghost ? T : 0, columns = panels_of(D) * (size_t)kernels->columns;
    backward_scratch s;
    SC_TRY(new_batch(&t->batch, &t->sae, T));
    t->scratch_bytes = lay_out_backward(&s, t, NULL);
    t->x_rows = (packed_matrix){ .K = T, .N = D, .panels = panels_of(D) };
    t->g_rows = t->ghost_rows = t->x_rows;
    t->beta1_power = t->beta2_power = 1;
    const array_spec arrays[] = {
        ARRAY(t->W_enc.m, n, stride), ARRAY(t->W_enc.v, n, stride), ARRAY(t->W_dec.m, n, stride),
        ARRAY(t->W_dec.v, n, stride), ARRAY(t->b_enc.m, N, 1), ARRAY(t->b_enc.v, N, 1),
        ARRAY(t->b_dec.m, stride, 1), ARRAY(t->b_dec.v, stride, 1), ARRAY(t->silent, n, 1),
        ARRAY(t->x_rows.data, T, columns), ARRAY(t->g_rows.data, T, columns),
        ARRAY(t->ghost_rows.data, ghosts, columns), ARRAY(t->ghost, ghosts, stride),
        ARRAY(t->token_loss, T, 1), ARRAY(t->deviation, stride, 1), ARRAY(t->db_enc, N, 1),
        ARRAY(t->W_enc_db, chains_of(n), stride),
        ARRAY(t->scratch, (size_t)thread_count(), t->scratch_bytes) };
    return new_arrays(&t->memory, arrays, COUNT(arrays));
}

static int unit_task(void *context, size_t block, int worker)
{
    const sc_sae *sae = context;
    (void)worker;
    for (size_t j = block * CHAIN; j < sae->d_sae && j < (block + 1) * CHAIN; j++)
        kernels->unit_row(sae->W_dec + j * sae->stride, sae->stride);
    return SC_OK;
}

/* W_dec^T exp(h) over the dead latents, for a tile. */
static void ghost_decode(trainer *t, const tile_codes *tile, tile_scratch *s)
{
    const sc_sae *sae = &t->sae;
    size_t columns = (size_t)kernels->columns, rows = (size_t)kernels->rows;
    size_t first = tile->first / columns, last = first + panels_of(tile->tokens);
    float *out = t->ghost + tile->first * sae->stride;
    memset(out, 0, tile->tokens * sae->stride * sizeof *out);
    for (size_t block = 0; block < sae->d_sae; block += CHAIN) {
        size_t latents = sae->d_sae - block < CHAIN ? sae->d_sae - block : CHAIN;
        size_t dead[CHAIN], count = 0;
        for (size_t j = block; j < block + latents; j++)
            if (is_dead(t, j)) dead[count++] = j;
        if (count == 0) continue;
        memset(s->dense, 0, TILE_TOKENS * CHAIN * sizeof *s->dense);
        for (size_t i = 0; i < count; i++) {
            float *h = s->h + i % rows * TILE_TOKENS;
            if (i % rows == 0)
                pre_activations(&t->batch, dead + i, count - i < rows ? count - i : rows, first,
                                last, s->h, TILE_TOKENS, s->buffer);
            kernels->exponentials(h, tile->tokens);
            for (size_t k = 0; k < tile->tokens; k++) s->dense[k * CHAIN + dead[i] - block] = h[k];
        }
        decode_dense(sae, tile->tokens, block, latents, out, s);
    }
}

/* A token's ghost loss times T D, and its gradient with respect to W_dec^T exp(h). x, output:
 * [D]; ghost: [D], overwritten by the gradient */
static double ghost_token(const sc_sae *sae, const float *x, const float *output, double norm,
                          float *ghost, float *residual, double scale)
{
    double loss = 0;
    for (size_t d = 0; d < sae->stride; d++) residual[d] = x[d] - output[d];
    float norm_x = (float)norm, norm_r = sqrtf(kernels->dot(residual, residual, sae->stride));
    float norm_g = sqrtf(kernels->dot(ghost, ghost, sae->stride));
    float match = norm_r / (1e-6f + 2 * norm_g);
    for (size_t d = 0; d < sae->d_in; d++) {
        float r = residual[d], apart = ghost[d] * match - r;
        if (norm_r == 0) {
            ghost[d] = 0;
            continue;
        }
        float m = apart * apart / norm_r, factor = r * r / norm_x / (m + 1e-6f);
        loss += (double)(m * factor);
        ghost[d] = 2 * apart / norm_r * factor * match * (float)scale;
    }
    return loss;
}

/* Ghost loss of a tile, then its x' becomes the gradient with respect to x'. */
static int output_gradient_task(void *context, size_t task, int worker)
{
    trainer *t = context;
    const sc_sae *sae = &t->sae;
    sae_batch *batch = &t->batch;
    const tile_codes *tile = &batch->tile[task];
    tile_scratch s = worker_scratch(batch, worker);
    double scale = 1.0 / ((double)batch->T * (double)sae->d_in);
    if (t->ghosts) ghost_decode(t, tile, &s);
    for (size_t i = tile->first; i < tile->first + tile->tokens; i++) {
        const float *x = batch->x + i * sae->stride;
        float *output = batch->output + i * sae->stride;
        float factor = (float)(2 * scale / batch->norm[i]);
        t->token_loss[i] = !t->ghosts ? 0
            : ghost_token(sae, x, output, batch->norm[i], t->ghost + i * sae->stride, s.sum, scale);
        for (size_t d = 0; d < sae->stride; d++) output[d] = (output[d] - x[d]) * factor;
    }
    return SC_OK;
}

static int pack_rows_task(void *context, size_t panel, int worker)
{
    trainer *t = context;
    size_t stride = t->sae.stride;
    (void)worker;
    pack_panels(&t->x_rows, panel, panel + 1, t->batch.centred, stride, 1);
    pack_panels(&t->g_rows, panel, panel + 1, t->batch.output, stride, 1);
    if (t->ghosts) pack_panels(&t->ghost_rows, panel, panel + 1, t->ghost, stride, 1);
    return SC_OK;
}

static size_t count_codes(const sae_batch *batch, size_t j)
{
    size_t count = 0;
    for (size_t i = 0; i < batch->tiles; i++)
        count += batch->tile[i].start[j + 1] - batch->tile[i].start[j];
    return count;
}

/* sum over tokens of dh in float64, in blocks of 256. dh: [count], of the tokens listed, or all */
static double sum_by_blocks(const uint32_t *token, const float *dh, size_t count)
{
    double sum = 0;
    for (size_t i = 0; i < count;) {
        size_t end = ((token ? token[i] : i) / CHAIN + 1) * CHAIN;
        double part = 0;
        for (; i < count && (token ? token[i] : i) < end; i++) part += dh[i];
        sum += part;
    }
    return sum;
}

/* Where latent j fires: the tokens in order, f and dh there. Returns how many they are. */
static size_t gather_codes(const trainer *t, size_t j, backward_scratch *s)
{
    const sae_batch *batch = &t->batch;
    const sc_sae *sae = &t->sae;
    float l1 = sae->topk ? 0 : (float)(t->options.l1 / (double)batch->T);
    size_t count = 0;
    for (size_t i = 0; i < batch->tiles; i++)
        for (code_walk w = walk_codes(&batch->tile[i], j); next_code(&w); count++) {
            s->token[count] = (uint32_t)(batch->tile[i].first + w.token);
            s->code_f[count] = w.value;
        }
    kernels->dots(sae->W_dec + j * sae->stride, sae->stride, batch->output, sae->stride, s->token,
                  count, s->code_dh);
    for (size_t i = 0; i < count; i++) s->code_dh[i] += l1;
    return count;
}

/* Gradients of latents j .. j + count - 1 from where they fire: a chain for every 256 tokens. */
static void sparse_gradients(trainer *t, size_t j, size_t count, backward_scratch *s)
{
    size_t stride = t->sae.stride;
    float *dec_chain = s->chain, *enc_chain = s->chain + stride;
    memset(s->dW_dec, 0, count * stride * sizeof *s->dW_dec);
    memset(s->dW_enc, 0, count * stride * sizeof *s->dW_enc);
    for (size_t i = 0; i < count; i++) {
        size_t terms = gather_codes(t, j + i, s);
        for (size_t k = 0; k < terms;) {
            size_t end = (s->token[k] / CHAIN + 1) * CHAIN;
            memset(s->chain, 0, 2 * stride * sizeof *s->chain);
            for (; k < terms && s->token[k] < end; k++) {
                size_t row = s->token[k] * stride;
                kernels->add_scaled(s->code_f[k], t->batch.output + row, dec_chain, stride);
                kernels->add_scaled(s->code_dh[k], t->batch.centred + row, enc_chain, stride);
            }
            kernels->add_scaled(1.0f, dec_chain, s->dW_dec + i * stride, stride);
            kernels->add_scaled(1.0f, enc_chain, s->dW_enc + i * stride, stride);
        }
        t->db_enc[j + i] = (float)sum_by_blocks(s->token, s->code_dh, terms);
    }
}

/* What the ghost loss adds to dW_dec, and to dh of the dead among latents j .. j + count - 1. */
static void ghost_gradients(const trainer *t, size_t j, size_t count, backward_scratch *s)
{
    const sae_batch *batch = &t->batch;
    size_t row = padded_tokens(t), stride = t->sae.stride, latent[MAX_ROWS];
    tile_target to = { .c = s->extra, .c_stride = stride };
    for (size_t i = 0; i < count; i++) latent[i] = j + i;
    pre_activations(batch, latent, count, 0, batch->panels.panels, s->e, row, s->buffer);
    for (size_t i = 0; i < count; i++) {
        float *e = s->e + i * row;
        if (is_dead(t, j + i)) kernels->exponentials(e, batch->T);
        else memset(e, 0, batch->T * sizeof *e);
        for (size_t k = 0; is_dead(t, j + i) && k < batch->T; k++)
            s->dh[i * row + k] += e[k] * kernels->dot(t->sae.W_dec + (j + i) * stride,
                                                      t->ghost + k * stride, stride);
    }
    product_rows(s->e, row, count, &t->ghost_rows, 0, t->ghost_rows.panels, &to, s->buffer);
    for (size_t e = 0; e < count * stride; e++) s->dW_dec[e] += s->extra[e];
}

/* The same gradients as products over all tokens; also where dead latents take part. */
static void dense_gradients(trainer *t, size_t j, size_t count, int ghosts, backward_scratch *s)
{
    size_t row = padded_tokens(t), stride = t->sae.stride;
    tile_target to_dec = { .c = s->dW_dec, .c_stride = stride };
    tile_target to_enc = { .c = s->dW_enc, .c_stride = stride };
    memset(s->f, 0, count * row * sizeof *s->f);
    memset(s->dh, 0, count * row * sizeof *s->dh);
    for (size_t i = 0; i < count; i++) {
        size_t terms = gather_codes(t, j + i, s);
        for (size_t k = 0; k < terms; k++) {
            s->f[i * row + s->token[k]] = s->code_f[k];
            s->dh[i * row + s->token[k]] = s->code_dh[k];
        }
    }
    product_rows(s->f, row, count, &t->g_rows, 0, t->g_rows.panels, &to_dec, s->buffer);
    if (ghosts) ghost_gradients(t, j, count, s);
    product_rows(s->dh, row, count, &t->x_rows, 0, t->x_rows.panels, &to_enc, s->buffer);
    for (size_t i = 0; i < count; i++)
        t->db_enc[j + i] = (float)sum_by_blocks(NULL, s->dh + i * row, t->batch.T);
}

/* Gradients and Adam for a group of latents, which must not be many more than a tile's rows. */
static void update_latents(trainer *t, size_t j, size_t count, float *W_enc_db, backward_scratch *s)
{
    const sc_sae *sae = &t->sae;
    size_t stride = sae->stride, terms = 0;
    int ghosts = 0;
    for (size_t i = 0; i < count; i++) {
        terms += count_codes(&t->batch, j + i);
        ghosts |= t->ghosts && is_dead(t, j + i);
    }
    if (ghosts || terms * DENSE_SHARE > count * t->batch.T) dense_gradients(t, j, count, ghosts, s);
    else sparse_gradients(t, j, count, s);
    for (size_t i = 0; i < count; i++) {
        size_t row = (j + i) * stride;
        float *W_dec = sae->W_dec + row, *dW_dec = s->dW_dec + i * stride;
        float *W_enc = sae->W_enc + row, *dW_enc = s->dW_enc + i * stride;
        kernels->add_scaled(-kernels->dot(dW_dec, W_dec, stride), W_dec, dW_dec, stride);
        kernels->add_scaled(t->db_enc[j + i], W_enc, W_enc_db, stride);
        kernels->adam(W_dec, t->W_dec.m + row, t->W_dec.v + row, dW_dec, stride, t->adam);
        kernels->adam(W_enc, t->W_enc.m + row, t->W_enc.v + row, dW_enc, stride, t->adam);
        t->silent[j + i] = count_codes(&t->batch, j + i) ? 0 : t->silent[j + i] + 1;
    }
}

static int update_task(void *context, size_t block, int worker)
{
    trainer *t = context;
    size_t rows = (size_t)kernels->rows, end = (block + 1) * CHAIN;
    float *W_enc_db = t->W_enc_db + block * t->sae.stride;
    backward_scratch s;
    lay_out_backward(&s, t, t->scratch + (size_t)worker * t->scratch_bytes);
    memset(W_enc_db, 0, t->sae.stride * sizeof *W_enc_db);
    if (end > t->sae.d_sae) end = t->sae.d_sae;
    for (size_t j = block * CHAIN; j < end; j += rows)
        update_latents(t, j, end - j < rows ? end - j : rows, W_enc_db, &s);
    return SC_OK;
}

/* Sums over T tokens of 16 dimensions, in float64, in blocks of 256 tokens: of x, or of
 * (x - centre)^2 where there is a centre. x: [T, stride]; centre, sum: [16] */
static void column_sums(const float *x, size_t T, size_t stride, const double *centre, double *sum)
{
    memset(sum, 0, PARTIALS * sizeof *sum);
    for (size_t block = 0; block < T; block += CHAIN) {
        double part[PARTIALS] = { 0 };
        for (size_t t = block; t < T && t < block + CHAIN; t++)
            for (int d = 0; d < PARTIALS; d++) {
                double apart = x[t * stride + d] - (centre ? centre[d] : 0);
                part[d] += centre ? apart * apart : apart;
            }
        for (int d = 0; d < PARTIALS; d++) sum[d] += part[d];
    }
}

/* b_dec's gradient, the sum over tokens of x' gradient less W_enc db_enc: 16 dimensions a task. */
static int b_dec_task(void *context, size_t task, int worker)
{
    trainer *t = context;
    size_t stride = t->sae.stride, first = task * PARTIALS;
    double sum[PARTIALS];
    float gradient[PARTIALS], along[PARTIALS] = { 0 };
    (void)worker;
    column_sums(t->batch.output + first, t->batch.T, stride, NULL, sum);
    for (size_t block = 0; block < chains_of(t->sae.d_sae); block++)
        for (int d = 0; d < PARTIALS; d++) along[d] += t->W_enc_db[block * stride + first + d];
    for (int d = 0; d < PARTIALS; d++) gradient[d] = (float)sum[d] - along[d];
    kernels->adam(t->sae.b_dec + first, t->b_dec.m + first, t->b_dec.v + first, gradient, PARTIALS,
                  t->adam);
    return SC_OK;
}

/* sum over tokens of (x - mean)^2; mean as it is with a data set of one batch. */
static int variance_task(void *context, size_t task, int worker)
{
    trainer *t = context;
    const float *x = t->batch.x + task * PARTIALS;
    double mean[PARTIALS];
    (void)worker;
    column_sums(x, t->batch.T, t->sae.stride, NULL, mean);
    for (int d = 0; d < PARTIALS; d++) mean[d] /= (double)t->batch.T;
    column_sums(x, t->batch.T, t->sae.stride, mean, t->deviation + task * PARTIALS);
    return SC_OK;
}

/* Refuses what is not finite, naming the token (of the batch) where there is one. */
static int check_tokens(const sae_batch *batch, size_t *bad)
{
    for (size_t t = 0; t < batch->T; t++) {
        *bad = t;
        if (!(batch->norm[t] > 0)) return fail("||x|| is 0 where a direction was expected");
        if (!isfinite(batch->norm[t]) || !isfinite(batch->squared_error[t])
            || !isfinite(batch->sum_f[t]))
            return fail("the loss is not finite");
    }
    *bad = SIZE_MAX;
    return SC_OK;
}

static int measure_losses(trainer *t, step_result *result, size_t *bad)
{
    sae_batch *batch = &t->batch;
    size_t T = batch->T;
    double tokens = (double)T, numbers = tokens * (double)t->sae.d_in;
    SC_TRY(check_tokens(batch, bad));
    SC_TRY(parallel_for(t->sae.stride / PARTIALS, variance_task, t));
    double deviation = sum_of(t->deviation, t->sae.d_in);
    result->explained_variance = deviation > 0
        ? 1 - sum_of(batch->squared_error, T) / deviation : 0;
    for (size_t i = 0; i < T; i++) t->token_loss[i] = batch->squared_error[i] / batch->norm[i];
    result->mse = sum_of(t->token_loss, T) / numbers;
    result->l1 = t->sae.topk ? 0 : t->options.l1 * (sum_of(batch->sum_f, T) / tokens);
    result->l0 = sum_of(batch->active, T) / tokens;
    SC_TRY(parallel_for(batch->tiles, output_gradient_task, t));
    result->ghost = sum_of(t->token_loss, T) / numbers;
    result->loss = result->mse + result->l1 + result->ghost;
    return isfinite(result->loss) ? SC_OK : fail("the loss is not finite");
}

/* One training step on T tokens. x: [T, stride]; bad: the token at fault, or SIZE_MAX */
static int train_step(trainer *t, const float *x, size_t T, step_result *result, size_t *bad)
{
    size_t blocks = chains_of(t->sae.d_sae);
    double warm = (double)(t->step + 1) / (double)t->options.warmup;
    *bad = SIZE_MAX;
    *result = (step_result){ .lr = t->options.lr * (t->options.warmup && warm < 1 ? warm : 1) };
    for (size_t j = 0; j < t->sae.d_sae; j++) result->dead += (size_t)is_dead(t, j);
    t->ghosts = t->options.ghost && result->dead > 0;
    t->beta1_power *= 0.9;
    t->beta2_power *= 0.999;
    t->adam.step_size = (float)(result->lr / (1 - t->beta1_power));
    t->adam.root_scale = (float)(1 / sqrt(1 - t->beta2_power));
    SC_TRY(parallel_for(blocks, unit_task, &t->sae));
    SC_TRY(run_sae(&t->batch, x, T));
    SC_TRY(measure_losses(t, result, bad));
    t->x_rows.K = t->g_rows.K = t->ghost_rows.K = T;
    SC_TRY(parallel_for(t->x_rows.panels, pack_rows_task, t));
    SC_TRY(parallel_for(blocks, update_task, t));
    SC_TRY(parallel_for(t->sae.stride / PARTIALS, b_dec_task, t));
    kernels->adam(t->sae.b_enc, t->b_enc.m, t->b_enc.v, t->db_enc, padded(t->sae.d_sae), t->adam);
    t->step++;
    return SC_OK;
}

/* --------------------------------------------------------------------------------------------
 * Where b_dec starts: zeros, the mean, or a geometric median (Weiszfeld, 1937) of the tokens, or of
 * whole images [T, D], averaged over the tokens, as PatchSAE does.
 * -------------------------------------------------------------------------------------------- */

typedef struct {
    const float *points;             /* [count, dim] */
    size_t count, dim;
    double *centre, *before;         /* [dim] */
    double *weight;                  /* [count] */
    double total;                    /* of the weights */
    memory_list memory;
} weighted_mean;

enum { MEAN_DIMS = 64 };

static int weighted_mean_task(void *context, size_t task, int worker)
{
    weighted_mean *m = context;
    size_t first = task * MEAN_DIMS, dims = m->dim - first < MEAN_DIMS ? m->dim - first : MEAN_DIMS;
    double sum[MEAN_DIMS] = { 0 };
    (void)worker;
    for (size_t block = 0; block < m->count; block += CHAIN) {
        double part[MEAN_DIMS] = { 0 };
        for (size_t i = block; i < m->count && i < block + CHAIN; i++)
            for (size_t d = 0; d < dims; d++)
                part[d] += m->weight[i] * m->points[i * m->dim + first + d];
        for (size_t d = 0; d < dims; d++) sum[d] += part[d];
    }
    for (size_t d = 0; d < dims; d++) m->centre[first + d] = sum[d] / m->total;
    return SC_OK;
}

static int distance_task(void *context, size_t i, int worker)
{
    weighted_mean *m = context;
    double p[PARTIALS] = { 0 }, sum = 0;
    (void)worker;
    for (size_t d = 0; d < m->dim; d++) {
        double apart = m->points[i * m->dim + d] - m->centre[d];
        p[d % PARTIALS] += apart * apart;
    }
    for (int k = 0; k < PARTIALS; k++) sum += p[k];
    double distance = sqrt(sum);
    m->weight[i] = 1 / (distance > 1e-6 ? distance : 1e-6);
    return SC_OK;
}

/* m->centre: the point of least summed distance, or the mean where iterations is 0. */
static int geometric_median(weighted_mean *m, int iterations)
{
    size_t tasks = (m->dim + MEAN_DIMS - 1) / MEAN_DIMS, bytes = m->dim * sizeof *m->centre;
    const array_spec arrays[] = {
        ARRAY(m->centre, m->dim, 1), ARRAY(m->before, m->dim, 1), ARRAY(m->weight, m->count, 1) };
    SC_TRY(new_arrays(&m->memory, arrays, COUNT(arrays)));
    for (size_t i = 0; i < m->count; i++) m->weight[i] = 1;
    for (int round = 0;; round++) {
        m->total = sum_of(m->weight, m->count);
        SC_TRY(parallel_for(tasks, weighted_mean_task, m));
        if (round == iterations || (round && memcmp(m->before, m->centre, bytes) == 0)) return SC_OK;
        memcpy(m->before, m->centre, bytes);
        SC_TRY(parallel_for(m->count, distance_task, m));
    }
}

/* b_dec from `images` images. x: [images T, stride] */
static int start_b_dec(sc_sae *sae, const char *kind, const float *x, size_t images, size_t T)
{
    size_t parts = strcmp(kind, "geomedian-images") == 0 ? T : 1;
    weighted_mean m = { .points = x, .count = images * T / parts, .dim = parts * sae->stride };
    int status = geometric_median(&m, strcmp(kind, "mean") == 0 ? 0 : 100);
    for (size_t d = 0; d < sae->d_in && status == SC_OK; d++) {
        double sum = 0;
        for (size_t i = 0; i < parts; i++) sum += m.centre[i * sae->stride + d];
        sae->b_dec[d] = (float)(sum / (double)parts);
        if (!isfinite(sae->b_dec[d])) status = fail("b_dec's start is not finite");
    }
    release(&m.memory);
    return status;
}

/* --------------------------------------------------------------------------------------------
 * A training run: the order of images, the log, checkpoints, signals.
 * -------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t seed, N, epoch;         /* epoch: whose order this is */
    uint64_t from;                   /* the draw a resumed run begins with */
    uint64_t *order;                 /* [N], NULL: first to last */
} training_order;

static int training_draw(void *context, size_t draw, size_t *image)
{
    training_order *t = context;
    uint64_t position = draw + t->from;
    if (t->order && position / t->N != t->epoch) {
        t->epoch = position / t->N;
        permutation(t->seed, t->epoch, t->order, (size_t)t->N);
    }
    *image = (size_t)(t->order ? t->order[position % t->N] : position % t->N);
    return SC_OK;
}

typedef struct {
    const options *o;
    feed data;
    trainer trainer;
    training_order order;
    size_t batch;                    /* images a step */
    uint64_t steps, images, next_draw;
    uint64_t digest;                 /* of what a resumed run must agree in */
    FILE *log;
    double started;
    char *checkpoint, *previous;     /* where to, and where the one before stays */
    int checkpoints;                 /* asked for, not only on a signal */
} training_run;

static volatile sig_atomic_t stop_signal;

static void on_signal(int number) { stop_signal = number; }

/* What changes the numbers of a run, as metadata, or into a digest (less the steps, which a resumed
 * run may have more of). */
static int take_recipe(const training_run *run, sc_writer *w, digest64 *digest)
{
    const options *o = run->o;
    const struct { const char *key; double value; const char *text; } rows[] = {
        { "l1", o->l1, NULL }, { "lr", o->lr, NULL }, { "warmup", (double)o->warmup, NULL },
        { "batch", (double)o->batch, NULL }, { "steps", (double)run->trainer.step, NULL },
        { "seed", o->seed, NULL }, { "ghost", o->ghost, NULL },
        { "dead_window", (double)o->dead_window, NULL },
        { "b_dec_images", (double)o->b_dec_images, NULL },
        { "b_dec_start", 0, o->init ? "file" : o->b_dec }, { "order", 0, o->order },
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        char text[32];
        if (run->trainer.sae.topk && strcmp(rows[i].key, "l1") == 0) continue;
        snprintf(text, sizeof text, "%.17g", rows[i].value);
        const char *value = rows[i].text ? rows[i].text : text;
        if (w) SC_TRY(sc_writer_metadata(w, rows[i].key, value));
        else if (strcmp(rows[i].key, "steps") != 0) digest64_add(digest, value, strlen(value) + 1);
    }
    return SC_OK;
}

static uint64_t recipe_digest(const training_run *run)
{
    const sc_sae *sae = &run->trainer.sae;
    const sc_model *m = &run->data.model;
    const uint64_t numbers[] = {
        run->data.digest, run->data.T, run->order.N, sae->d_in, sae->d_sae, (uint64_t)sae->topk,
        sae->k, sae->layer, (uint64_t)sae->hook, m->heads, (uint64_t)m->activation,
        bits_of_float(m->epsilon), (uint64_t)run->o->square, (uint64_t)run->data.preprocess.crop_hf };
    digest64 d = { 0 };
    for (size_t i = 0; i < COUNT(numbers); i++) digest64_number(&d, numbers[i]);
    for (int c = 0; c < 3; c++)
        digest64_number(&d, (uint64_t)bits_of_float(m->mean[c]) << 32 | bits_of_float(m->std[c]));
    if (sae->model) digest64_add(&d, sae->model, strlen(sae->model));
    take_recipe(run, NULL, &d);
    return digest64_value(&d);
}

/* The floats that training goes on from: of each a matrix [n, D] (rank 2) or a vector. The SAE's
 * come first and are written by write_sae; W_enc is the only one that lies otherwise in files. */
enum { SAE_TENSORS = 4, STATE_TENSORS = 12, POSITION_NUMBERS = 4 };

typedef struct { const char *name; float *values; int rank; size_t columns, stride; } state_tensor;

static void list_state(const trainer *t, state_tensor *list)
{
    size_t n = t->sae.d_sae, D = t->sae.d_in, stride = t->sae.stride;
    const state_tensor all[STATE_TENSORS] = {
        { "W_enc", t->sae.W_enc, 2, D, stride }, { "W_dec", t->sae.W_dec, 2, D, stride },
        { "b_enc", t->sae.b_enc, 1, n, n }, { "b_dec", t->sae.b_dec, 1, D, stride },
        { "W_enc_m", t->W_enc.m, 2, D, stride }, { "W_enc_v", t->W_enc.v, 2, D, stride },
        { "W_dec_m", t->W_dec.m, 2, D, stride }, { "W_dec_v", t->W_dec.v, 2, D, stride },
        { "b_enc_m", t->b_enc.m, 1, n, n }, { "b_enc_v", t->b_enc.v, 1, n, n },
        { "b_dec_m", t->b_dec.m, 1, D, stride }, { "b_dec_v", t->b_dec.v, 1, D, stride },
    };
    memcpy(list, all, sizeof all);
}

/* Of everything in a checkpoint. position: step, next draw, images so far, digest of the recipe */
static uint64_t state_digest(const trainer *t, const uint64_t *position)
{
    state_tensor list[STATE_TENSORS];
    digest64 d = { 0 };
    list_state(t, list);
    for (size_t i = 0; i < STATE_TENSORS; i++)
        for (size_t e = 0; e < (list[i].rank == 2 ? t->sae.d_sae : 1) * list[i].stride; e++)
            digest64_number(&d, bits_of_float(list[i].values[e]));
    for (size_t j = 0; j < t->sae.d_sae; j++) digest64_number(&d, t->silent[j]);
    for (size_t i = 0; i < POSITION_NUMBERS; i++) digest64_number(&d, position[i]);
    return digest64_value(&d);
}

static int write_state(sc_writer *w, const training_run *run)
{
    const trainer *t = &run->trainer;
    const uint64_t position[] = { t->step, run->next_draw, run->images, run->digest };
    size_t n = t->sae.d_sae;
    state_tensor list[STATE_TENSORS];
    char text[32 * POSITION_NUMBERS];
    SC_TRY(write_sae(w, &t->sae));
    SC_TRY(take_recipe(run, w, NULL));
    list_state(t, list);
    for (const state_tensor *s = list + SAE_TENSORS; s < list + STATE_TENSORS; s++)
        SC_TRY(s->rank == 2 ? write_rows(w, s->name, n, s->columns, s->stride, s->values)
                            : write_vector(w, s->name, s->columns, s->values));
    SC_TRY(sc_writer_tensor(w, "silent", SC_I64, 1, &n));
    for (size_t j = 0; j < n; j++) SC_TRY(sc_writer_integers(w, &(int64_t){ t->silent[j] }, 1));
    for (int i = 0, used = 0; i < POSITION_NUMBERS; i++)
        used += sprintf(text + used, i ? " %llx" : "%llx", (unsigned long long)position[i]);
    SC_TRY(sc_writer_metadata(w, "position", text));
    sprintf(text, "%016llx", (unsigned long long)state_digest(t, position));
    return sc_writer_metadata(w, "checksum", text);
}

/* What a checkpoint holds; then the one before, which it is to replace, becomes FILE.prev. */
static int write_checkpoint(sc_writer *w, void *context)
{
    const training_run *run = context;
    SC_TRY(write_state(w, run));
    if (access(run->checkpoint, F_OK) != 0) return SC_OK;
    unlink(run->previous);
    if (link(run->checkpoint, run->previous) == 0
        || rename(run->checkpoint, run->previous) == 0) return SC_OK;
    return fail("%s: cannot be kept as %s: %s", run->checkpoint, run->previous, strerror(errno));
}

static int save_checkpoint(training_run *run)
{
    return save_tensors(run->checkpoint, 4096, write_checkpoint, run);
}

static int read_state(trainer *t, const sc_safetensors *file)
{
    size_t n = t->sae.d_sae, D = t->sae.d_in;
    const sc_tensor *encoder = sc_tensor_find(file, "W_enc"), *silent = sc_tensor_find(file, "silent");
    state_tensor list[STATE_TENSORS];
    if (!encoder || encoder->rank != 2 || encoder->shape[0] != D || encoder->shape[1] != n)
        return fail("%s: a tensor W_enc of %zu x %zu was expected", file->path, D, n);
    SC_TRY(move_encoder(&t->sae, file, encoder, NULL));
    list_state(t, list);
    for (const state_tensor *s = list + 1; s < list + STATE_TENSORS; s++)
        SC_TRY(read_rows(file, s->name, s->rank == 2 ? n : 1, s->columns, s->stride, s->values));
    if (!silent || silent->count != n) return fail("%s: no tensor silent [%zu]", file->path, n);
    for (size_t j = 0; j < n; j++) {
        int64_t steps;
        SC_TRY(sc_tensor_integers(file, silent, j, 1, &steps));
        t->silent[j] = (uint32_t)steps;
    }
    return SC_OK;
}

static int take_checkpoint(training_run *run, const sc_safetensors *file)
{
    trainer *t = &run->trainer;
    const char *text = sc_metadata_find(file, "position"), *sum = sc_metadata_find(file, "checksum");
    uint64_t position[POSITION_NUMBERS];
    for (int i = 0; i < POSITION_NUMBERS; i++) {
        char *end = NULL;
        if (text) position[i] = strtoull(text, &end, 16);
        if (!sum || end == text) return fail("%s: this is no checkpoint", file->path);
        text = end;
    }
    if (position[3] != run->digest)
        return fail("%s: the checkpoint is of other options or data than this run", file->path);
    SC_TRY(read_state(t, file));
    if (state_digest(t, position) != strtoull(sum, NULL, 16))
        return fail("%s: the checksum does not match the contents", file->path);
    run->next_draw = run->order.from = position[1];
    run->images = position[2];
    for (; t->step < position[0]; t->step++) {
        t->beta1_power *= 0.9;
        t->beta2_power *= 0.999;
    }
    return SC_OK;
}

/* Goes on from a checkpoint if there is one; a damaged one names the one before. */
static int resume_training(training_run *run)
{
    char reason[sizeof error_text];
    sc_safetensors file;
    int there = access(run->checkpoint, F_OK) == 0, before = access(run->previous, F_OK) == 0;
    if (!there && before)
        return fail("%s: there is none, but the one before it is %s", run->checkpoint,
                    run->previous);
    if (!there) {
        note("%s: there is no checkpoint yet, starting afresh", run->checkpoint);
        return SC_OK;
    }
    int status = sc_safetensors_open(&file, run->checkpoint);
    if (status == SC_OK) {
        status = take_checkpoint(run, &file);
        sc_safetensors_close(&file);
    }
    if (status == SC_OK || !before) return status;
    memcpy(reason, error_text, sizeof reason);
    return fail("%.600s; the checkpoint before it is %.300s", reason, run->previous);
}

/* Opens the log; of a resumed run, cut back to the step it goes on from. */
static int open_log(training_run *run)
{
    static const char header[] = "step,images,tokens,lr,loss,mse,l1,ghost,l0,explained_variance,"
                                 "dead,seconds\n";
    const char *path = run->o->log;
    int resumed = run->trainer.step > 0;
    off_t end = 0;
    char line[512];
    if (!path) return SC_OK;
    run->log = fopen(path, resumed ? "a+" : "w");
    if (!run->log) return fail("%s: cannot be written: %s", path, strerror(errno));
    rewind(run->log);
    while (resumed && fgets(line, sizeof line, run->log) && strchr(line, '\n')
           && (end == 0 || strtoull(line, NULL, 10) <= run->trainer.step))
        end = ftello(run->log);
    if (resumed && (fseeko(run->log, end, SEEK_SET) != 0 || ftruncate(fileno(run->log), end) != 0)
        && errno != EINVAL && errno != ESPIPE)               /* a pipe cannot and need not be cut */
        return fail("%s: cannot be cut: %s", path, strerror(errno));
    if (end == 0 && (fputs(header, run->log) < 0 || fflush(run->log) != 0))
        return fail("%s: cannot be written: %s", path, strerror(errno));
    return SC_OK;
}

static int log_step(training_run *run, const step_result *r)
{
    unsigned long long step = run->trainer.step, tokens = run->images * run->data.T;
    if (run->log && (fprintf(run->log, "%llu,%llu,%llu,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%zu,%.3f\n",
                             step, (unsigned long long)run->images, tokens, r->lr, r->loss, r->mse,
                             r->l1, r->ghost, r->l0, r->explained_variance, r->dead,
                             seconds_now() - run->started) < 0
                     || fflush(run->log) != 0))
        return fail("%s: cannot be written: %s", run->o->log, strerror(errno));
    show_progress("step", step, run->steps, run->images, "images",
                  "loss %.5g, L0 %.4g, explained %.3f", r->loss, r->l0, r->explained_variance);
    return SC_OK;
}

/* A new SAE, or one from a file. It listens where the command line says, else the file of activations,
 * else the SAE to start from, else where the report did: the penultimate block's MLP. */
static int choose_sae(training_run *run)
{
    const options *o = run->o;
    sc_sae *sae = &run->trainer.sae;
    feed *f = &run->data;
    size_t n = o->d_sae ? (size_t)o->d_sae : (size_t)o->expansion * f->D, place;
    const char *hook = sc_metadata_find(&f->file, "hook");
    const char *model = f->is_file ? sc_metadata_find(&f->file, "model") : o->model;
    if (o->init) SC_TRY(sc_sae_open(sae, o->init));
    else SC_TRY(sc_sae_init(sae, f->D, n, (uint64_t)o->seed));
    if (!sae->k) sae->k = 32;
    SC_TRY(overrule_sae(sae, o));
    SC_TRY(check_origin(f, sae, o));
    if (!sae->layer) SC_TRY(metadata_number(&f->file, "layer", 1e6, &sae->layer));
    sc_hook kind = sae->hook < 0 ? SC_MLP : (sc_hook)sae->hook;
    if (sae->hook < 0 && hook && parse_hook(hook, &kind) != SC_OK)
        return fail("%s: metadata hook = '%s' is none of attn, mlp, resid", f->file.path, hook);
    SC_TRY(add_tap(f, o->layer ? o->layer : sae->layer || f->is_file ? (long)sae->layer : -2, kind,
                   &place));
    sae->layer = f->tap[0].layer;
    if (!f->is_file || hook) sae->hook = (int)kind;
    if (!model || sae->model) return SC_OK;
    sae->model = copy_string(base_name(model));
    return sae->model ? SC_OK : SC_FAILED;
}

static int prepare_run(training_run *run, const char *images)
{
    const options *o = run->o;
    feed *f = &run->data;
    SC_TRY(open_feed(f, o, images));
    SC_TRY(choose_sae(run));
    run->batch = (size_t)o->batch;
    if (run->batch > SC_MAX_BATCH_TOKENS / f->T)
        return usage("--batch %zu: %zu tokens an image are too many", run->batch, f->T);
    int shuffle = strcmp(o->order, "shuffle") == 0;
    if (f->images == SC_UNKNOWN && shuffle)
        return usage("a stream has one order: --order sequential was expected");
    run->order = (training_order){ .seed = (uint64_t)o->seed, .N = f->images, .epoch = UINT64_MAX };
    if (shuffle && !(run->order.order = new_array(f->images, sizeof *run->order.order)))
        return SC_FAILED;
    double images_wanted = f->images == SC_UNKNOWN ? 1e18 : o->epochs * (double)f->images;
    run->steps = o->steps >= 0 ? (uint64_t)o->steps
                               : (uint64_t)ceil(images_wanted / (double)run->batch);
    run->trainer.options = (sc_train_options){
        .l1 = o->l1, .lr = o->lr, .warmup = (size_t)o->warmup, .ghost = o->ghost,
        .dead_window = (size_t)o->dead_window };
    run->digest = recipe_digest(run);
    SC_TRY(prepare_trainer(&run->trainer, run->batch * f->T));
    return o->resume ? resume_training(run) : SC_OK;
}

/* An error names the step, and the image and token where there is one. */
static int blame_step(const training_run *run, size_t token)
{
    char reason[sizeof error_text];
    if (token != SIZE_MAX) blame_token(&run->data, token);
    memcpy(reason, error_text, sizeof reason);
    return fail("step %llu%s %.980s", (unsigned long long)run->trainer.step + 1,
                token == SIZE_MAX ? ":" : ",", reason);
}

static int stop_training(training_run *run)
{
    SC_TRY(save_checkpoint(run));
    return fail("stopped by signal %d after step %llu; %s goes on with --resume", (int)stop_signal,
                (unsigned long long)run->trainer.step, run->checkpoint);
}

static int train_steps(training_run *run)
{
    trainer *t = &run->trainer;
    feed *f = &run->data;
    uint64_t every = (uint64_t)run->o->checkpoint_every, saved = t->step;
    while (t->step < run->steps) {
        step_result result;
        size_t token;
        if (next_batch(f, run->batch) != SC_OK) return blame_step(run, SIZE_MAX);
        if (f->count < run->batch && t->step == 0)
            return fail("standard input: %zu images are no full batch of %zu", f->count, run->batch);
        if (f->count < run->batch) {
            note("the stream ended: %zu images are no full batch and were left out", f->count);
            break;
        }
        int status = train_step(t, f->tap[0].out, run->batch * f->T, &result, &token);
        if (status != SC_OK) return blame_step(run, token);
        run->images += run->batch;
        run->next_draw = f->draw[run->batch - 1] + run->order.from + 1;
        SC_TRY(log_step(run, &result));
        if (run->checkpoints && t->step % every == 0) {
            SC_TRY(save_checkpoint(run));
            saved = t->step;
        }
        if (stop_signal) return stop_training(run);
    }
    return run->checkpoints && saved != t->step ? save_checkpoint(run) : SC_OK;
}

static int write_trained(sc_writer *w, void *context)
{
    const training_run *run = context;
    SC_TRY(write_sae(w, &run->trainer.sae));
    return take_recipe(run, w, NULL);
}

/* A stream's pictures that a resumed run was trained on already. */
static int skip_stream(training_run *run)
{
    const image_slot *slot;
    for (; run->order.from > 0; run->order.from--, run->data.drawn++) {
        int status = reader_next(&run->data.reader, &slot);
        if (status == SC_END) return fail("standard input: ended before where the checkpoint was");
        SC_TRY(status);
    }
    return SC_OK;
}

static int run_training(training_run *run, const char *images)
{
    const options *o = run->o;
    feed *f = &run->data;
    SC_TRY(try_output(o->output));
    if (run->checkpoints) SC_TRY(try_output(run->checkpoint));
    SC_TRY(prepare_run(run, images));
    int start = !o->init && strcmp(o->b_dec, "zeros") != 0 && run->trainer.step == 0;
    size_t keep = !start ? 0 : o->b_dec_images ? (size_t)o->b_dec_images : run->batch;
    if (keep > f->images) keep = f->images;
    if (start || run->trainer.step < run->steps)
        SC_TRY(start_feed(f, keep > run->batch ? keep : run->batch, training_draw, &run->order, 0));
    if (f->images == SC_UNKNOWN) SC_TRY(skip_stream(run));
    if (start) {
        SC_TRY(next_batch(f, keep));
        if (f->count < keep) return fail("there are fewer than %zu images", keep);
        SC_TRY(start_b_dec(&run->trainer.sae, o->b_dec, f->tap[0].out, keep, f->T));
        f->kept = keep;                      /* to be trained on too */
    }
    SC_TRY(open_log(run));
    SC_TRY(train_steps(run));
    return save_tensors(o->output, 4096, write_trained, run);
}

static int command_train(const options *o, int count, char **names)
{
    training_run run = { .o = o, .started = seconds_now(),
                         .checkpoints = o->checkpoint || o->resume };
    struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_RESTART | SA_RESETHAND };
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    run.checkpoint = o->checkpoint ? copy_string(o->checkpoint)
                                   : join_text(o->output, strlen(o->output), ".ckpt");
    if (run.checkpoint) run.previous = join_text(run.checkpoint, strlen(run.checkpoint), ".prev");
    int status = run.previous ? run_training(&run, count ? names[0] : NULL) : SC_FAILED;
    if (run.log && fclose(run.log) != 0 && status == SC_OK)
        status = fail("%s: cannot be written: %s", o->log, strerror(errno));
    close_feed(&run.data);
    free_trainer(&run.trainer);
    free(run.order.order);
    free(run.checkpoint);
    free(run.previous);
    return status;
}

/* ============================================================================================
 * 10. Measuring
 *
 * What each latent does over a data set (interface, section 6; after PatchSAE): how often it fires,
 * how strongly, on which images, patches and classes. Sums over images are exact and ties go to the
 * lower index, so no order of work shows in the result.
 * ============================================================================================ */

enum { HISTOGRAM_BINS = 256, BINS_AN_OCTAVE = 4, LOWEST_OCTAVE = -40 };

/* A sum over a data set's tokens in float64, in blocks of 256, however they come. */
typedef struct { double total, part; size_t terms; } running_sum;

static void add_running(running_sum *sum, double value)
{
    sum->part += value;
    if (++sum->terms % CHAIN) return;
    sum->total += sum->part;
    sum->part = 0;
}

static double running_total(const running_sum *sum) { return sum->total + sum->part; }

typedef struct {
    const sc_sae *sae;
    const feed *data;
    size_t tap, K, P;
    double threshold;                /* of class_counts; negative: count images */
    uint64_t images, tokens;
    sae_batch batch;
    memory_list memory;
    uint64_t *image_count, *token_count;         /* [n] */
    exact_sum *mean_sum, *activation_sum;        /* [n], of a_j over images, of f_j over tokens */
    float *top_value;                            /* [n, K], descending */
    int64_t *top_image, *top_label;              /* [n, K] */
    float *patch_value;                          /* [n, P], descending */
    int64_t *patch;                              /* [n, P, 2], image and token */
    int64_t *class_counts;                       /* [C, n], NULL if not asked for */
    uint64_t *histogram;                         /* [workers, HISTOGRAM_BINS] */
    running_sum mse, squared_error, l0, l1;
    running_sum (*x)[2];                         /* [D], of x and x^2 */
    float *sparsity, *mean_act, *entropy;        /* [n], worked out at the end, as is */
    double *sum;                                 /* [n], activation_sum rounded */
} statistics;

static void free_statistics(statistics *s)
{
    free_batch(&s->batch);
    release(&s->memory);
    *s = (statistics){ 0 };
}

/* sae, data, tap, K, P, threshold are set; room: images a batch. */
static int new_statistics(statistics *s, size_t room, int class_counts)
{
    size_t n = s->sae->d_sae, K = s->K, P = s->P, C = s->data->classes;
    const array_spec arrays[] = {
        ARRAY(s->image_count, n, 1), ARRAY(s->token_count, n, 1), ARRAY(s->mean_sum, n, 1),
        ARRAY(s->activation_sum, n, 1), ARRAY(s->top_value, n, K), ARRAY(s->top_image, n, K),
        ARRAY(s->top_label, n, K), ARRAY(s->patch_value, n, P), ARRAY(s->patch, n, 2 * P),
        ARRAY(s->histogram, (size_t)thread_count(), HISTOGRAM_BINS), ARRAY(s->x, s->sae->d_in, 1),
        ARRAY(s->sparsity, n, 1), ARRAY(s->mean_act, n, 1), ARRAY(s->entropy, n, 1),
        ARRAY(s->sum, n, 1), ARRAY(s->class_counts, n, C) };
    if (class_counts && C == 0) return fail("--class-counts: the data have no labels");
    SC_TRY(new_batch(&s->batch, s->sae, room * s->data->T));
    SC_TRY(new_arrays(&s->memory, arrays, COUNT(arrays) - !class_counts));
    for (size_t i = 0; i < n * K; i++) s->top_image[i] = s->top_label[i] = -1;
    for (size_t i = 0; i < n * P * 2; i++) s->patch[i] = -1;
    return SC_OK;
}

static const double quarter_octave[] = { 1, 1.18920712, 1.41421356, 1.68179283 };

/* The bin of an active value: quarters of an octave from 2^-40 to 2^24; what lies outside goes into
 * the first or last. */
static size_t histogram_bin(float f)
{
    int exponent, quarter = 3, last = HISTOGRAM_BINS - 1;
    float m = 2 * frexpf(f, &exponent);                     /* f = m 2^(exponent - 1) */
    while (m < (float)quarter_octave[quarter]) quarter--;
    int bin = (exponent - 1 - LOWEST_OCTAVE) * BINS_AN_OCTAVE + quarter;
    return (size_t)(bin < 0 ? 0 : bin > last ? last : bin);
}

/* Puts a value into a descending list; returns its place, or size if it is not among the largest.
 * What comes later loses a tie. */
static size_t rank_value(float *list, size_t size, float value)
{
    if (size == 0 || !(value > list[size - 1])) return size;
    size_t place = size - 1;
    while (place > 0 && value > list[place - 1]) place--;
    memmove(list + place + 1, list + place, (size - 1 - place) * sizeof *list);
    list[place] = value;
    return place;
}

/* The same in a list of `width` numbers a place. */
static void insert_at(int64_t *list, size_t width, size_t size, size_t place, const int64_t *value)
{
    memmove(list + (place + 1) * width, list + place * width,
            (size - 1 - place) * width * sizeof *list);
    memcpy(list + place * width, value, width * sizeof *list);
}

/* Latent j's mean over the batch's image i. */
static void count_image(statistics *s, size_t j, size_t i, double sum)
{
    float mean = (float)(sum / (double)s->data->T);
    int64_t image = (int64_t)s->data->image[i], label = s->data->label[i];
    if (!(mean > 0)) return;
    s->image_count[j]++;
    exact_add_float(&s->mean_sum[j], mean);
    if (s->class_counts && label >= 0 && s->threshold < 0)
        s->class_counts[(size_t)label * s->sae->d_sae + j]++;
    size_t place = rank_value(s->top_value + j * s->K, s->K, mean);
    if (place == s->K) return;
    insert_at(s->top_image + j * s->K, 1, s->K, place, &image);
    insert_at(s->top_label + j * s->K, 1, s->K, place, &label);
}

/* Activation f of latent j on a token of the batch's image i. */
static void count_token(statistics *s, size_t j, size_t i, size_t token, float f, uint64_t *histogram)
{
    int64_t label = s->data->label[i];
    s->token_count[j]++;
    exact_add_float(&s->activation_sum[j], f);
    histogram[histogram_bin(f)]++;
    if (s->class_counts && label >= 0 && s->threshold >= 0 && (double)f > s->threshold)
        s->class_counts[(size_t)label * s->sae->d_sae + j]++;
    if (token < s->data->first_patch) return;
    size_t place = rank_value(s->patch_value + j * s->P, s->P, f);
    if (place < s->P)
        insert_at(s->patch + j * s->P * 2, 2, s->P, place,
                  (int64_t[]){ (int64_t)s->data->image[i], (int64_t)token });
}

static int count_task(void *context, size_t block, int worker)
{
    statistics *s = context;
    uint64_t *histogram = s->histogram + (size_t)worker * HISTOGRAM_BINS;
    for (size_t j = block * CHAIN; j < s->sae->d_sae && j < (block + 1) * CHAIN; j++) {
        size_t at = 0;                                       /* the image being summed */
        double sum = 0;
        for (size_t i = 0; i < s->batch.tiles; i++)
            for (code_walk w = walk_codes(&s->batch.tile[i], j); next_code(&w);) {
                size_t t = s->batch.tile[i].first + w.token, image = t / s->data->T;
                if (image != at) {
                    count_image(s, j, at, sum);
                    sum = 0;
                }
                at = image;
                sum += w.value;
                count_token(s, j, image, t % s->data->T, w.value, histogram);
            }
        count_image(s, j, at, sum);
    }
    return SC_OK;
}

/* Sums over tokens of one dimension, for the variance. */
static int sum_x_task(void *context, size_t d, int worker)
{
    statistics *s = context;
    (void)worker;
    for (size_t t = 0; t < s->batch.T; t++) {
        double x = s->batch.x[t * s->sae->stride + d];
        add_running(&s->x[d][0], x);
        add_running(&s->x[d][1], x * x);
    }
    return SC_OK;
}

/* Takes the batch at hand into the statistics. */
static int count_batch(statistics *s)
{
    const feed *f = s->data;
    const sae_batch *b = &s->batch;
    size_t bad;
    SC_TRY(run_sae(&s->batch, f->tap[s->tap].out, f->count * f->T));
    if (check_tokens(b, &bad) != SC_OK) return blame_token(f, bad);
    SC_TRY(parallel_for(chains_of(s->sae->d_sae), count_task, s));
    if (b->reconstruct) SC_TRY(parallel_for(s->sae->d_in, sum_x_task, s));
    for (size_t t = 0; b->reconstruct && t < b->T; t++) {
        add_running(&s->mse, b->squared_error[t] / b->norm[t]);
        add_running(&s->squared_error, b->squared_error[t]);
        add_running(&s->l0, b->active[t]);
        add_running(&s->l1, b->sum_f[t]);
    }
    s->images += f->count;
    s->tokens += b->T;
    return SC_OK;
}

/* Entropy of the classes of latent j's top images, weighted by activation; -1: not defined. */
static double top_entropy(const statistics *s, size_t j)
{
    const float *value = s->top_value + j * s->K;
    const int64_t *label = s->top_label + j * s->K;
    size_t active = 0, needed = s->K < 10 ? s->K : 10;
    double total = 0, entropy = 0;
    while (active < s->K && value[active] > 0) total += value[active++];
    if (active < needed || active == 0) return -1;
    for (size_t i = 0; i < active; i++) {
        double share = 0;
        size_t seen = 0;
        if (label[i] < 0) return -1;
        while (seen < i && label[seen] != label[i]) seen++;
        if (seen < i) continue;                              /* its class was counted */
        for (size_t k = i; k < active; k++) share += label[k] == label[i] ? value[k] : 0;
        entropy -= share / total * log64(share / total);
    }
    return entropy > 0 ? entropy : 0;
}

static double mean_activation(const statistics *s, size_t j)
{
    return s->image_count[j] ? exact_value(s->mean_sum[j]) / (double)s->image_count[j] : 0;
}

/* A digest of what an SAE computes, so that statistics are not taken for another's. */
static uint64_t sae_digest(const sc_sae *sae)
{
    digest64 d = { 0 };
    const uint64_t numbers[] = { sae->d_in, sae->d_sae, (uint64_t)sae->topk, sae->topk ? sae->k : 0 };
    for (int i = 0; i < 4; i++) digest64_number(&d, numbers[i]);
    for (size_t j = 0; j < sae->d_sae; j++) digest64_number(&d, bits_of_float(sae->b_enc[j]));
    for (size_t i = 0; i < sae->d_in; i++) digest64_number(&d, bits_of_float(sae->b_dec[i]));
    for (size_t j = 0; j < sae->d_sae; j++)
        for (size_t i = 0; i < sae->d_in; i++) {
            uint64_t encoder = bits_of_float(sae->W_enc[j * sae->stride + i]);
            digest64_number(&d, encoder << 32 | bits_of_float(sae->W_dec[j * sae->stride + i]));
        }
    return digest64_value(&d);
}

static int write_statistics_metadata(sc_writer *w, const statistics *s)
{
    const struct { const char *key; unsigned long long value; int hex; } numbers[] = {
        { "images", s->images, 0 }, { "tokens", s->tokens, 0 }, { "tokens_per_image", s->data->T, 0 },
        { "first_patch", s->data->first_patch, 0 }, { "data_digest", s->data->digest, 1 },
        { "sae_digest", sae_digest(s->sae), 1 } };
    char text[32], edges[HISTOGRAM_BINS * 20 + 32];
    size_t used = 0;
    for (size_t i = 0; i < COUNT(numbers); i++) {
        snprintf(text, sizeof text, numbers[i].hex ? "%016llx" : "%llu", numbers[i].value);
        SC_TRY(sc_writer_metadata(w, numbers[i].key, text));
    }
    for (int i = 0; i <= HISTOGRAM_BINS; i++)
        used += (size_t)sprintf(edges + used, "%c%.9g", i ? ',' : '[',
                                ldexp(quarter_octave[i % BINS_AN_OCTAVE],
                                      LOWEST_OCTAVE + i / BINS_AN_OCTAVE));
    memcpy(edges + used, "]", 2);
    SC_TRY(sc_writer_metadata(w, "histogram_edges", edges));
    snprintf(text, sizeof text, "%.17g", s->threshold);
    return s->threshold >= 0 ? sc_writer_metadata(w, "threshold", text) : SC_OK;
}

/* What is worked out from the counts, latent by latent; the workers' histograms joined. */
static void derive_statistics(statistics *s)
{
    for (size_t j = 0; j < s->sae->d_sae; j++) {
        s->sparsity[j] = (float)((double)s->image_count[j] / (double)(s->images ? s->images : 1));
        s->mean_act[j] = (float)mean_activation(s, j);
        s->entropy[j] = (float)top_entropy(s, j);
        s->sum[j] = exact_value(s->activation_sum[j]);
    }
    for (size_t i = HISTOGRAM_BINS; i < (size_t)thread_count() * HISTOGRAM_BINS; i++)
        s->histogram[i % HISTOGRAM_BINS] += s->histogram[i];
}

static int write_statistics(sc_writer *w, void *context)
{
    statistics *s = context;
    size_t n = s->sae->d_sae, K = s->K, P = s->P;
    const struct { const char *name; const void *values; sc_dtype dtype; int rank; size_t shape[3]; }
    tensors[] = {
        { "sae_sparsity", s->sparsity, SC_F32, 1, { n } },
        { "sae_mean_acts", s->mean_act, SC_F32, 1, { n } },
        { "top_entropy", s->entropy, SC_F32, 1, { n } },
        { "max_activating_image_values", s->top_value, SC_F32, 2, { n, K } },
        { "max_activating_patch_values", s->patch_value, SC_F32, 2, { n, P } },
        { "max_activating_image_indices", s->top_image, SC_I64, 2, { n, K } },
        { "max_activating_image_label_indices", s->top_label, SC_I64, 2, { n, K } },
        { "max_activating_patch_indices", s->patch, SC_I64, 3, { n, P, 2 } },
        { "image_count", s->image_count, SC_I64, 1, { n } },
        { "token_count", s->token_count, SC_I64, 1, { n } },
        { "activation_sum", s->sum, SC_F64, 1, { n } },
        { "mean_sum_exact", s->mean_sum, SC_I64, 2, { n, 2 } },          /* high and low halves */
        { "activation_sum_exact", s->activation_sum, SC_I64, 2, { n, 2 } },
        { "activation_histogram", s->histogram, SC_I64, 1, { HISTOGRAM_BINS } },
        { "class_counts", s->class_counts, SC_I64, 2, { s->data->classes, n } },
    };
    SC_TRY(write_statistics_metadata(w, s));
    derive_statistics(s);
    for (size_t i = 0; i < COUNT(tensors) && tensors[i].values; i++) {
        size_t count = 1;
        for (int d = 0; d < tensors[i].rank; d++) count *= tensors[i].shape[d];
        SC_TRY(sc_writer_tensor(w, tensors[i].name, tensors[i].dtype, tensors[i].rank,
                                tensors[i].shape));
        if (tensors[i].dtype == SC_F32) SC_TRY(sc_writer_floats(w, tensors[i].values, count));
        else if (tensors[i].dtype == SC_F64) SC_TRY(sc_writer_doubles(w, tensors[i].values, count));
        else SC_TRY(sc_writer_integers(w, tensors[i].values, count));
    }
    return SC_OK;
}

/* --------------------------------------------------------------------------------------------
 * Several SAEs over one data set, in one forward pass
 * -------------------------------------------------------------------------------------------- */

typedef struct {
    const options *o;
    size_t saes;
    sc_sae sae[SC_MAX_TAPS];
    statistics s[SC_MAX_TAPS];       /* of the data set at hand */
    feed data;
} measurement;

static int open_saes(measurement *m)
{
    for (; m->saes < m->o->saes; m->saes++) {
        SC_TRY(sc_sae_open(&m->sae[m->saes], m->o->sae[m->saes]));
        SC_TRY(overrule_sae(&m->sae[m->saes], m->o));
        if (m->o->layer) m->sae[m->saes].layer = (size_t)m->o->layer;
    }
    return SC_OK;
}

static void close_measurement(measurement *m)
{
    for (size_t i = 0; i < SC_MAX_TAPS; i++) {
        free_statistics(&m->s[i]);
        sc_sae_close(&m->sae[i]);
    }
    close_feed(&m->data);
}

static int measure_batch(void *context)
{
    measurement *m = context;
    for (size_t i = 0; i < m->saes; i++) SC_TRY(count_batch(&m->s[i]));
    return SC_OK;
}

/* One pass over a data set for all SAEs. */
static int measure(measurement *m, const char *images, int reconstruct)
{
    const options *o = m->o;
    SC_TRY(open_feed(&m->data, o, images));
    for (size_t i = 0; i < m->saes; i++) {
        m->s[i] = (statistics){ .sae = &m->sae[i], .data = &m->data, .K = (size_t)o->top,
                                .P = (size_t)o->top_patches, .threshold = o->threshold };
        SC_TRY(tap_for(&m->data, &m->sae[i], o, &m->s[i].tap));
        SC_TRY(new_statistics(&m->s[i], MEASURE_IMAGES, o->class_counts));
        m->s[i].batch.reconstruct = reconstruct;
    }
    return for_each_batch(&m->data, 0, measure_batch, m);
}

static int command_stats(const options *o, int count, char **names)
{
    measurement m = { .o = o };
    int status = o->saes == 1 ? open_saes(&m) : usage("stats takes one SAE: -s FILE");
    if (status == SC_OK) status = try_output(o->output);
    if (status == SC_OK) status = measure(&m, count ? names[0] : NULL, 0);
    if (status == SC_OK) status = save_tensors(o->output, 16384, write_statistics, &m.s[0]);
    close_measurement(&m);
    return status;
}

/* A row of the report's table and the further figures. */
enum { EVAL_LABELS = 5, EVAL_FIGURES = 17, EVAL_COLUMNS = EVAL_LABELS + EVAL_FIGURES };

typedef struct { const char *label[EVAL_LABELS]; double figure[EVAL_FIGURES]; } eval_row;

static const struct { const char *name, *title; } eval_columns[EVAL_COLUMNS] = {
    { "sae", "SAE" }, { "data", "data" }, { "output", "CLIP output" },
    { "activation", "activation" }, { "geometric_bias", "geometric bias" }, { "mse", "MSE" },
    { "mse_raw", "MSE raw" }, { "explained_variance", "explained variance" },
    { "explained_variance_uncentred", "uncentred" }, { "mean_activation", "mean activation" },
    { "mean_sae_mean_acts", "mean of latents' means" }, { "l0", "L0 a token" },
    { "l0_fraction", "L0 / latents" }, { "l1", "L1 a token" }, { "entropy_mean", "entropy" },
    { "entropy_sum", "entropy sum" }, { "entropy_latents", "latents with entropy" },
    { "dead", "dead" }, { "every_image", "on every image" }, { "one_image", "on 1 image" },
    { "two_images", "on 2 images" }, { "images", "images" },
};

static void evaluate(const statistics *s, double figure[EVAL_FIGURES])
{
    double tokens = (double)s->tokens, n = (double)s->sae->d_sae, D = (double)s->sae->d_in;
    double error = running_total(&s->squared_error), x2 = 0, mean2 = 0;
    double entropy = 0, entropies = 0, means = 0, firing = 0, on[4] = { 0 };
    for (size_t d = 0; d < s->sae->d_in; d++) {
        double mean = running_total(&s->x[d][0]) / tokens;
        mean2 += mean * mean;
        x2 += running_total(&s->x[d][1]);
    }
    for (size_t j = 0; j < s->sae->d_sae; j++) {
        double e = top_entropy(s, j);
        if (e >= 0) entropy += e;
        entropies += e >= 0;
        firing += s->image_count[j] > 0;
        means += mean_activation(s, j);
        on[0] += s->image_count[j] == 0;
        on[1] += s->image_count[j] == 1;
        on[2] += s->image_count[j] == 2;
        on[3] += s->image_count[j] == s->images;
    }
    double variance = x2 - tokens * mean2, active = running_total(&s->l0);
    const double all[EVAL_FIGURES] = {
        running_total(&s->mse) / (tokens * D), error / (tokens * D),
        variance > 0 ? 1 - error / variance : 0, 1 - error / x2,
        active > 0 ? running_total(&s->l1) / active : 0, firing > 0 ? means / firing : 0,
        active / tokens, active / tokens / n, running_total(&s->l1) / tokens,
        entropies > 0 ? entropy / entropies : -1, entropy, entropies, on[0], on[3], on[1], on[2],
        (double)s->images };
    memcpy(figure, all, sizeof all);
}

/* How a table is printed: what stands around rows and between cells; align: 1 right, -1 left. */
typedef struct {
    const char *name, *begin, *before, *between, *after, *after_last, *end;
    const char *digits;              /* figures in full for programs, four digits for people */
    int align, titles;               /* titles: 1 for people, 2 names, 0 a name before each cell */
} table_format;

static const table_format table_formats[] = {
    { "text", "", "", "  ", "\n", "\n", "", "%.4g", 1, 1 },
    { "markdown", "", "| ", " | ", " |\n", " |\n", "", "%.4g", -1, 1 },
    { "csv", "", "", ",", "\n", "\n", "", "%.9g", 0, 2 },
    { "json", "[\n", "  {", ", ", "},\n", "}\n", "]\n", "%.9g", 0, 0 },
};

enum { CELL_ROOM = 600 };

/* row NULL: the titles. room: [CELL_ROOM], where a text may be put together */
static const char *cell_text(const table_format *f, const eval_row *row, size_t column, char *room)
{
    if (!row) return f->titles == 1 ? eval_columns[column].title : eval_columns[column].name;
    if (column < EVAL_LABELS && !f->align) return row->label[column];
    if (column < EVAL_LABELS) return printable(row->label[column], room, CELL_ROOM);
    snprintf(room, CELL_ROOM, f->digits, row->figure[column - EVAL_LABELS]);
    return room;
}

static void print_row(const table_format *f, const eval_row *row, const int *width)
{
    char room[CELL_ROOM];
    fputs(f->before, stdout);
    for (size_t c = 0; c < EVAL_COLUMNS; c++) {
        const char *text = cell_text(f, row, c, room);
        if (c) fputs(f->between, stdout);
        if (!f->titles) printf("\"%s\": ", eval_columns[c].name);
        if (f->align || !row || c >= EVAL_LABELS) printf("%*s", f->align * width[c], text);
        else if (f->titles) print_csv_text(text);
        else print_json_text(text);
    }
}

static int print_table(const char *format, const eval_row *row, size_t rows)
{
    const table_format *f = table_formats;
    int width[EVAL_COLUMNS] = { 0 };
    char room[CELL_ROOM];
    while (strcmp(f->name, format) != 0) f++;
    for (size_t c = 0; c < EVAL_COLUMNS; c++)
        for (size_t r = 0; r <= rows; r++) {
            int length = (int)strlen(cell_text(f, r ? &row[r - 1] : NULL, c, room));
            if (length > width[c]) width[c] = length;
        }
    fputs(f->begin, stdout);
    for (size_t r = f->titles ? 0 : 1; r <= rows; r++) {
        print_row(f, r ? &row[r - 1] : NULL, width);
        fputs(r < rows ? f->after : f->after_last, stdout);
        for (int c = 0; r == 0 && f->align < 0 && c <= EVAL_COLUMNS; c++)
            fputs(c < EVAL_COLUMNS ? "|---" : "|\n", stdout);
    }
    fputs(f->end, stdout);
    return end_of_output();
}

static eval_row row_of(const statistics *s, const char *data)
{
    const sc_sae *sae = s->sae;
    const char *start = sae->b_dec_start;
    eval_row row = { .label = {
        sae->path, data, sae->hook < 0 ? "?" : hook_names[sae->hook], sae->topk ? "TopK" : "ReLU",
        !start ? "?" : strstr(start, "geomedian") ? "yes" : "no" } };
    evaluate(s, row.figure);
    return row;
}

static int command_eval(const options *o, int count, char **names)
{
    const char *data[2] = { count ? names[0] : o->acts, o->also };
    eval_row row[2 * SC_MAX_TAPS];
    size_t rows = 0;
    options one = *o;
    measurement m = { .o = &one };
    int status = open_saes(&m);
    for (int i = 0; i < 2 && (i == 0 || data[i]) && status == SC_OK; i++) {
        one.acts = count ? NULL : data[i];
        status = measure(&m, count ? data[i] : NULL, 1);
        for (size_t k = 0; k < m.saes; k++) {
            if (status == SC_OK) row[rows++] = row_of(&m.s[k], data[i]);
            free_statistics(&m.s[k]);
        }
        close_feed(&m.data);
    }
    if (status == SC_OK) status = print_table(o->format, row, rows);
    close_measurement(&m);
    return status;
}

/* --------------------------------------------------------------------------------------------
 * Writing activations, codes and packed images, as they come
 * -------------------------------------------------------------------------------------------- */

/* Labels, class names and the data set's digest, beside what has been written image by image. */
typedef struct { int64_t *label; size_t count, capacity; } label_list;

static int keep_label(label_list *list, int64_t label)
{
    SC_TRY(grow(&list->label, &list->capacity, list->count, sizeof *list->label));
    list->label[list->count++] = label;
    return SC_OK;
}

static int write_labels(sc_writer *w, const label_list *list, char **class_name, size_t classes)
{
    for (size_t i = 0; i < list->count; i++)
        if (list->label[i] < 0) return SC_OK;
    SC_TRY(sc_writer_tensor(w, "labels", SC_I64, 1, &list->count));
    SC_TRY(sc_writer_integers(w, list->label, list->count));
    return class_name ? write_name_list(w, "class_names", class_name, classes) : SC_OK;
}

/* How much of a header these names take, at most: each its letters, escaped, and `more` bytes. */
static size_t names_room(char **name, size_t count, size_t more)
{
    size_t room = 0;
    for (size_t i = 0; name && i < count; i++) room += 6 * strlen(name[i]) + more;
    return room;
}

/* --- extract --- */

typedef struct {
    const options *o;
    feed data;
    sc_writer *writer;
    size_t first, tokens;            /* which of an image's T are written */
    label_list labels;
} extraction;

static int extract_batch(void *context)
{
    extraction *e = context;
    const feed *f = &e->data;
    for (size_t i = 0; i < f->count; i++) {
        SC_TRY(keep_label(&e->labels, f->label[i]));
        for (size_t t = e->first; t < e->first + e->tokens; t++)
            SC_TRY(sc_writer_floats(e->writer, f->tap[0].out + (i * f->T + t) * f->stride, f->D));
    }
    return SC_OK;
}

static int write_activations(sc_writer *w, void *context)
{
    extraction *e = context;
    const options *o = e->o;
    feed *f = &e->data;
    char layer[32], digest[32];
    e->writer = w;
    e->first = strcmp(o->tokens, "patches") == 0;
    e->tokens = strcmp(o->tokens, "cls") == 0 ? 1 : f->T - e->first;
    SC_TRY(sc_writer_tensor(w, "activations", strcmp(o->dtype, "f16") ? SC_F32 : SC_F16, 3,
                            (size_t[]){ SC_ROWS, e->tokens, f->D }));
    SC_TRY(for_each_batch(f, 0, extract_batch, e));
    /* a file that lacks images of the data set is not the data set: another digest */
    uint64_t missing = f->images == SC_UNKNOWN ? 0 : f->images - e->labels.count;
    snprintf(layer, sizeof layer, "%zu", f->tap[0].layer);
    snprintf(digest, sizeof digest, "%016llx", (unsigned long long)(f->digest + missing));
    SC_TRY(sc_writer_metadata(w, "model", base_name(o->model)));
    SC_TRY(sc_writer_metadata(w, "layer", layer));
    SC_TRY(sc_writer_metadata(w, "hook", hook_names[f->tap[0].hook]));
    SC_TRY(sc_writer_metadata(w, "tokens", o->tokens));
    if (f->images != SC_UNKNOWN) SC_TRY(sc_writer_metadata(w, "data_digest", digest));
    return write_labels(w, &e->labels, f->class_name, f->classes);
}

static int command_extract(const options *o, int count, char **names)
{
    extraction e = { .o = o };
    feed *f = &e.data;
    sc_hook hook = SC_MLP;
    size_t place;
    int status = open_feed(f, o, count ? names[0] : NULL);
    if (status == SC_OK && o->hook) status = parse_hook(o->hook, &hook);
    if (status == SC_OK) status = add_tap(f, o->layer ? o->layer : -2, hook, &place);
    if (status == SC_OK)
        status = save_tensors(o->output, 4096 + names_room(f->class_name, f->classes, 8),
                              write_activations, &e);
    free(e.labels.label);
    close_feed(f);
    return status;
}

/* --- pack --- */

typedef struct { sc_images set; image_reader reader; size_t S; label_list labels; char **name; } packing;

static int write_pictures(sc_writer *w, void *context)
{
    packing *p = context;
    const image_slot *slot;
    size_t capacity = 0, S = p->S, *count = &p->labels.count;
    int status, stream = p->set.count == SC_UNKNOWN;
    SC_TRY(sc_writer_tensor(w, "images", SC_U8, 4, (size_t[]){ SC_ROWS, S, S, 3 }));
    while ((status = reader_next(&p->reader, &slot)) == SC_OK) {
        const sc_image *image = stream ? NULL : &p->set.image[slot->image];
        SC_TRY(grow(&p->name, &capacity, *count, sizeof *p->name));
        if (image) p->name[*count] = (char *)(uintptr_t)image->name;
        SC_TRY(sc_writer_bytes(w, slot->pixels, S * S * 3));
        SC_TRY(keep_label(&p->labels, image ? image->label : -1));
        show_progress("image", *count, p->set.count, *count, "images", "%s", "");
    }
    if (status != SC_END) return status;
    if (*count == 0) return fail("standard input: no picture came");
    SC_TRY(write_labels(w, &p->labels, p->set.class_name, p->set.classes));
    return stream || !*p->name[0] ? SC_OK : write_name_list(w, "file_names", p->name, *count);
}

static int command_pack(const options *o, int count, char **names)
{
    packing p = { .S = (size_t)(o->square ? o->square : o->size) };
    const sc_preprocess prep = { .size = (int)p.S, .square = (int)o->square,
                                 .crop_hf = o->crop && strcmp(o->crop, "hf") == 0 };
    (void)count;
    SC_TRY(sc_images_open(&p.set, names[0], (size_t)o->limit));
    size_t room = 4096 + names_room(p.set.class_name, p.set.classes, 4);
    for (size_t i = 0; i < p.set.count && p.set.count != SC_UNKNOWN; i++)
        room += 6 * strlen(p.set.image[i].name) + 4;
    int status = reader_open(&p.reader, &p.set, &prep, NULL, NULL, thread_count(), o->skip_bad);
    if (status == SC_OK) status = save_tensors(o->output, room, write_pictures, &p);
    reader_close(&p.reader);
    sc_images_close(&p.set);
    free(p.labels.label);
    free(p.name);
    return status;
}

/* --- encode: tensors of unknown length are gathered in temporary files side by side --- */

enum { CODE_ROW, CODE_INDEX, CODE_VALUE, CODE_DENSE, CODE_RECONSTRUCTION, CODE_MEAN, SPOOLS };

/* A value is a float or, of rows and indices, an int64_t; a code tensor has rank 1. */
static const struct { const char *name; sc_dtype dtype; } spool_tensors[SPOOLS] = {
    { "row", SC_I64 }, { "index", SC_I32 }, { "value", SC_F32 }, { "f", SC_F32 },
    { "reconstruction", SC_F32 }, { "image_means", SC_F32 } };

typedef struct {
    measurement m;                   /* one SAE and the data */
    sae_batch batch;
    FILE *file[SPOOLS];              /* NULL where not asked for */
    size_t count[SPOOLS], rows;      /* values in a file; tokens so far */
    float *row;                      /* [n], a token's f */
    size_t *next;                    /* [n], where a latent's next value of the tile lies */
    double *sum;                     /* [MEASURE_IMAGES, n], over each image's tokens */
    memory_list memory;
} encoding;

static int spool(encoding *e, int which, const void *values, size_t count)
{
    size_t size = which < CODE_VALUE ? sizeof(int64_t) : sizeof(float);
    if (e->file[which] && fwrite(values, size, count, e->file[which]) != count)
        return fail("a temporary file cannot be written: %s", strerror(errno));
    e->count[which] += count;
    return SC_OK;
}

/* The codes of a tile, token by token; latents ascending. */
static int spool_tile(encoding *e, const tile_codes *tile)
{
    const sc_sae *sae = &e->m.sae[0];
    size_t n = sae->d_sae;
    memcpy(e->next, tile->start, n * sizeof *e->next);
    for (size_t t = 0; t < tile->tokens; t++) {
        size_t at = tile->first + t;
        memset(e->row, 0, n * sizeof *e->row);
        for (size_t j = 0; j < n; j++) {
            if (!(tile->mask[j][t / MASK_BITS] >> (t % MASK_BITS) & 1)) continue;
            e->row[j] = tile->value[e->next[j]++];
            e->sum[at / e->m.data.T * n + j] += e->row[j];
            SC_TRY(spool(e, CODE_ROW, &(int64_t){ (int64_t)(e->rows + at) }, 1));
            SC_TRY(spool(e, CODE_INDEX, &(int64_t){ (int64_t)j }, 1));
            SC_TRY(spool(e, CODE_VALUE, &e->row[j], 1));
        }
        SC_TRY(spool(e, CODE_DENSE, e->row, n));
        SC_TRY(spool(e, CODE_RECONSTRUCTION, e->batch.output + at * sae->stride, sae->d_in));
    }
    return SC_OK;
}

static int encode_batch(void *context)
{
    encoding *e = context;
    const feed *f = &e->m.data;
    size_t bad, n = e->m.sae[0].d_sae;
    SC_TRY(run_sae(&e->batch, f->tap[0].out, f->count * f->T));
    if (check_tokens(&e->batch, &bad) != SC_OK) return blame_token(f, bad);
    memset(e->sum, 0, f->count * n * sizeof *e->sum);
    for (size_t i = 0; i < e->batch.tiles; i++) SC_TRY(spool_tile(e, &e->batch.tile[i]));
    for (size_t i = 0; i < f->count; i++) {
        for (size_t j = 0; j < n; j++) e->row[j] = (float)(e->sum[i * n + j] / (double)f->T);
        SC_TRY(spool(e, CODE_MEAN, e->row, n));
    }
    e->rows += e->batch.T;
    return SC_OK;
}

static int write_codes(sc_writer *w, void *context)
{
    enum { BLOCK = 4096 };
    encoding *e = context;
    const sc_sae *sae = &e->m.sae[0];
    int64_t whole[BLOCK];
    float value[BLOCK];
    for (int i = 0; i < SPOOLS; i++) {
        size_t width = i < CODE_DENSE ? 1 : i == CODE_RECONSTRUCTION ? sae->d_in : sae->d_sae, some;
        if (!e->file[i]) continue;
        SC_TRY(sc_writer_tensor(w, spool_tensors[i].name, spool_tensors[i].dtype,
                                i < CODE_DENSE ? 1 : 2, (size_t[]){ e->count[i] / width, width }));
        if (fseeko(e->file[i], 0, SEEK_SET) != 0) return fail("a temporary file: %s", strerror(errno));
        do {
            if (i < CODE_VALUE) some = fread(whole, sizeof *whole, BLOCK, e->file[i]);
            else some = fread(value, sizeof *value, BLOCK, e->file[i]);
            SC_TRY(i < CODE_VALUE ? sc_writer_integers(w, whole, some)
                                  : sc_writer_floats(w, value, some));
        } while (some > 0);
        if (ferror(e->file[i])) return fail("a temporary file cannot be read back");
    }
    return SC_OK;
}

static int encode(encoding *e, const char *images)
{
    const options *o = e->m.o;
    const int wanted[SPOOLS] = { 1, 1, 1, o->dense, o->reconstruction, o->image_means };
    feed *f = &e->m.data;
    sc_sae *sae = &e->m.sae[0];
    size_t tap;
    if (o->saes != 1) return usage("encode takes one SAE: -s FILE");
    SC_TRY(open_saes(&e->m));
    SC_TRY(try_output(o->output));
    SC_TRY(open_feed(f, o, images));
    SC_TRY(tap_for(f, sae, o, &tap));
    SC_TRY(new_batch(&e->batch, sae, MEASURE_IMAGES * f->T));
    const array_spec arrays[] = { ARRAY(e->row, sae->d_sae, 1), ARRAY(e->next, sae->d_sae, 1),
                                  ARRAY(e->sum, sae->d_sae, MEASURE_IMAGES) };
    SC_TRY(new_arrays(&e->memory, arrays, COUNT(arrays)));
    for (int i = 0; i < SPOOLS; i++)
        if (wanted[i] && !(e->file[i] = tmpfile()))
            return fail("no temporary file can be made: %s", strerror(errno));
    SC_TRY(for_each_batch(f, 0, encode_batch, e));
    return save_tensors(o->output, 4096, write_codes, e);
}

static int command_encode(const options *o, int count, char **names)
{
    encoding e = { .m = { .o = o } };
    int status = encode(&e, count ? names[0] : NULL);
    for (int i = 0; i < SPOOLS; i++)
        if (e.file[i]) fclose(e.file[i]);
    free_batch(&e.batch);
    release(&e.memory);
    close_measurement(&e.m);
    return status;
}

/* --- zeroshot --- */

typedef struct { feed data; size_t images, top1, top5; } hits;

/* Where each image's class stands among the logits; ties go to the lower index. */
static int count_hits(void *context)
{
    hits *h = context;
    const feed *f = &h->data;
    size_t classes = f->model.classes;
    for (size_t i = 0; i < f->count; i++) {
        const float *logit = f->logits + i * classes;
        size_t rank = 0, label = (size_t)f->label[i];        /* -1 is beyond all classes */
        if (label >= classes)
            return fail("image %zu %s: label %lld, but the head has %zu classes", (size_t)f->image[i],
                        image_name(f, (size_t)f->image[i]), (long long)f->label[i], classes);
        for (size_t c = 0; c < classes; c++)
            rank += logit[c] > logit[label] || (logit[c] == logit[label] && c < label);
        h->images++;
        h->top1 += rank < 1;
        h->top5 += rank < 5;
    }
    return SC_OK;
}

static int command_zeroshot(const options *o, int count, char **names)
{
    hits h = { .images = 0 };
    int status = open_feed(&h.data, o, count ? names[0] : NULL);
    if (status == SC_OK) status = for_each_batch(&h.data, 1, count_hits, &h);
    if (status == SC_OK) {
        double images = (double)h.images;
        if (strcmp(o->format, "json") == 0)
            printf("{\"images\": %zu, \"top1\": %zu, \"top5\": %zu}\n", h.images, h.top1, h.top5);
        else if (strcmp(o->format, "csv") == 0)
            printf("images,top1,top5\n%zu,%zu,%zu\n", h.images, h.top1, h.top5);
        else printf("%zu images: top-1 %zu (%.2f %%), top-5 %zu (%.2f %%)\n", h.images, h.top1,
                    100.0 * (double)h.top1 / images, h.top5, 100.0 * (double)h.top5 / images);
        status = end_of_output();
    }
    close_feed(&h.data);
    return status;
}

/* ============================================================================================
 * 11. Looking
 *
 * What a latent responds to, as pictures: a sheet of the images that excite it most, and masks of
 * the patches on which it fires. Silent patches keep 30 / 255 of their brightness, rounded down, as
 * PatchSAE shows them.
 * ============================================================================================ */

enum { LOOK_IMAGES = 16, MOST_LATENTS = 1024, SHEET_GAP = 2, SILENT = 30 };

typedef struct {
    measurement m;                   /* one SAE and the data */
    sc_safetensors stats;
    sae_batch batch;
    enum { NO_MASK, VALUE_MASK, TOP_MASK } kind;
    size_t latent[MOST_LATENTS], latents;        /* asked for */
    size_t *image, images;           /* [images], the only ones to look at, where not NULL */
    size_t patches;                  /* of an image */
    double *mask;                    /* [LOOK_IMAGES, patches], one latent's on the batch at hand */
    double *sum;                     /* [latents, patches], of a class */
    unsigned char *picture;          /* [S, S, 3], room for a mask or an overlay */
    int made;                        /* the folder, by us */
} viewer;

static void close_viewer(viewer *v)
{
    close_measurement(&v->m);
    sc_safetensors_close(&v->stats);
    free_batch(&v->batch);
    free(v->image);
    free(v->mask);
    free(v->sum);
    free(v->picture);
}

/* "J[,J...]" */
static int parse_latents(viewer *v, const char *text)
{
    const sc_sae *sae = &v->m.sae[0];
    for (char *end;; text = end + 1) {
        unsigned long long j = strtoull(text, &end, 10);
        if (!isdigit((unsigned char)*text) || (*end && *end != ',') || v->latents == MOST_LATENTS)
            return usage("-l: at '%s' a latent was expected, as in 7 or 7,11 (at most %d)", text,
                         MOST_LATENTS);
        if (j >= sae->d_sae)
            return fail("%s: there is no latent %llu, 0 to %zu were expected", sae->path, j,
                        sae->d_sae - 1);
        v->latent[v->latents++] = (size_t)j;
        if (!*end) return SC_OK;
    }
}

/* Statistics tell of one data set and one SAE. */
static int check_stats_origin(const sc_safetensors *stats, const char *path, uint64_t data,
                              uint64_t sae)
{
    const char *of_data = sc_metadata_find(stats, "data_digest");
    const char *of_sae = sc_metadata_find(stats, "sae_digest");
    if (!of_data || !of_sae) return fail("%s: these are no statistics: a digest is missing", path);
    if (strtoull(of_data, NULL, 16) != data) return fail("%s: statistics of other data", path);
    return strtoull(of_sae, NULL, 16) == sae ? SC_OK : fail("%s: statistics of another SAE", path);
}

/* A tensor of the statistics: for each latent a row of numbers (size 1) or of pairs (2). */
static int stats_tensor(const viewer *v, const char *name, size_t size, const sc_tensor **tensor)
{
    size_t n = v->m.sae[0].d_sae;
    const sc_tensor *t = *tensor = sc_tensor_find(&v->stats, name);
    if (t && t->rank > 1 && t->shape[1] > 0 && t->count / size / t->shape[1] == n) return SC_OK;
    return fail("%s: a tensor %s [%zu, ...] was expected", v->stats.path, name, n);
}

static int open_viewer(viewer *v, const char *images, int with_stats)
{
    const options *o = v->m.o;
    const sc_sae *sae = &v->m.sae[0];
    feed *f = &v->m.data;
    size_t tap, S;
    if (o->saes != 1) return usage("one SAE was expected: -s FILE");
    if (with_stats && !o->stats) return usage("--mask top needs the SAE's statistics: -t FILE");
    if (o->mask) v->kind = strcmp(o->mask, "top") == 0 ? TOP_MASK : VALUE_MASK;
    SC_TRY(open_saes(&v->m));
    SC_TRY(parse_latents(v, o->latents));
    SC_TRY(open_feed(f, o, images));
    SC_TRY(tap_for(f, sae, o, &tap));
    if (f->grid == 0 || f->T == 1) return fail("tokens were expected that are a square of patches");
    if (with_stats) {
        SC_TRY(sc_safetensors_open(&v->stats, o->stats));
        SC_TRY(check_stats_origin(&v->stats, o->stats, f->digest, sae_digest(sae)));
    }
    if (v->kind == VALUE_MASK) SC_TRY(new_batch(&v->batch, sae, LOOK_IMAGES * f->T));
    else if (!f->is_file) f->taps = 0;           /* spares the forward pass */
    v->patches = f->grid * f->grid;
    S = f->is_file ? f->grid : f->model.image_size;
    v->mask = new_array(LOOK_IMAGES, v->patches * sizeof *v->mask);
    v->picture = new_array(S * S, 3);
    if (!v->mask || !v->picture) return SC_FAILED;
    v->made = mkdir(o->output, 0777) == 0;
    if (!v->made && errno != EEXIST)
        return fail("%s: the folder cannot be made: %s", o->output, strerror(errno));
    return SC_OK;
}

static int listed_draw(void *context, size_t draw, size_t *image)
{
    const viewer *v = context;
    if (draw < v->images) *image = v->image[draw];
    return draw < v->images ? SC_OK : SC_END;
}

/* The next batch, encoded where latents' values are wanted. */
static int next_images(viewer *v, size_t want)
{
    feed *f = &v->m.data;
    SC_TRY(next_batch(f, want));
    if (v->kind != VALUE_MASK || f->count == 0) return SC_OK;
    return run_sae(&v->batch, f->tap[0].out, f->count * f->T);
}

/* v->mask of latent j: its values on the batch's patches, or 1 on those that are among its top
 * patches of the whole data set. */
static int find_masks(viewer *v, size_t j)
{
    const feed *f = &v->m.data;
    const sc_tensor *top;
    const char *text = sc_metadata_find(&v->stats, "first_patch");
    const int64_t first_patch = text ? strtoll(text, NULL, 10) : 1;
    memset(v->mask, 0, LOOK_IMAGES * v->patches * sizeof *v->mask);
    for (size_t i = 0; i < v->batch.tiles; i++)
        for (code_walk w = walk_codes(&v->batch.tile[i], j); next_code(&w);) {
            size_t row = v->batch.tile[i].first + w.token, token = row % f->T;
            if (token >= f->first_patch)
                v->mask[row / f->T * v->patches + token - f->first_patch] = w.value;
        }
    if (v->kind != TOP_MASK) return SC_OK;
    SC_TRY(stats_tensor(v, "max_activating_patch_indices", 2, &top));
    for (size_t p = 0; p < top->shape[1]; p++) {
        int64_t at[2];                           /* image and token, -1 where there is none */
        SC_TRY(sc_tensor_integers(&v->stats, top, (j * top->shape[1] + p) * 2, 2, at));
        uint64_t patch = (uint64_t)at[1] - (uint64_t)first_patch;
        for (size_t i = 0; i < f->count && patch < v->patches; i++)
            if (f->image[i] == (uint64_t)at[0]) v->mask[i * v->patches + patch] = 1;
    }
    return SC_OK;
}

/* Draws a crop into a picture with rows of `stride` bytes.
 * crop: [S, S, 3], mask: [grid, grid], silent patches are 0; NULL: none is */
static void draw_crop(unsigned char *to, size_t stride, const unsigned char *crop, size_t S,
                      const double *mask, size_t grid)
{
    for (size_t y = 0; y < S; y++)
        for (size_t x = 0; x < S; x++) {
            int silent = mask && !(mask[y * grid / S * grid + x * grid / S] > 0);
            for (size_t c = 0; c < 3; c++) {
                int v = crop[(y * S + x) * 3 + c];
                to[y * stride + x * 3 + c] = (unsigned char)(silent ? v * SILENT / 255 : v);
            }
        }
}

/* FOLDER/NAME as a PGM (1 channel) or PPM (3). */
static int write_picture(const char *folder, const char *name, size_t channels, size_t width,
                         size_t height, const unsigned char *pixels)
{
    sc_output out;
    char path[MAX_PATH];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= MAX_PATH)
        return fail("%s: the path is too long", folder);
    SC_TRY(output_open(&out, path));
    output_printf(&out, "P%d\n%zu %zu\n255\n", channels == 3 ? 6 : 5, width, height);
    output_write(&out, pixels, width * height * channels);
    return output_commit(&out);
}

/* round(255 f / largest) */
static int write_mask(const viewer *v, const char *name, const double *mask)
{
    size_t grid = v->m.data.grid;
    double largest = 0;
    memset(v->picture, 0, v->patches);
    for (size_t p = 0; p < v->patches; p++) largest = mask[p] > largest ? mask[p] : largest;
    for (size_t p = 0; p < v->patches && largest > 0; p++)
        v->picture[p] = (unsigned char)floor(255 * mask[p] / largest + 0.5);
    return write_picture(v->m.o->output, name, 1, grid, grid, v->picture);
}

/* Latent j on the batch's image i: the mask, and the picture under it where there is one. Files are
 * called after the image's index and what is safe of its own name. */
static int show_mask(const viewer *v, size_t j, size_t i)
{
    const feed *f = &v->m.data;
    const double *mask = v->mask + i * v->patches;
    const char *own = image_name(f, (size_t)f->image[i]), *slash = strrchr(own, '/');
    size_t S = f->model.image_size, room = 128, used;
    char name[192];
    if (slash) own = slash + 1;
    used = (size_t)snprintf(name, room, "latent_%zu_%zu_", j, (size_t)f->image[i]);
    for (; *own && used < room; own++)
        name[used++] = isalnum((unsigned char)*own) || strchr(".-", *own) ? *own : '_';
    strcpy(name + used, ".pgm");
    SC_TRY(write_mask(v, name, mask));
    if (f->is_file) return SC_OK;
    draw_crop(v->picture, 3 * S, f->pixels + i * S * S * 3, S, mask, f->grid);
    strcpy(name + used, ".ppm");
    return write_picture(v->m.o->output, name, 3, S, S, v->picture);
}

/* Only the images of a class, for the mean of their masks (the report's figure 6). */
static int choose_class(viewer *v, long class)
{
    const feed *f = &v->m.data;
    size_t capacity = 0;
    for (size_t i = 0; f->classes && i < f->images; i++) {
        if (feed_label(f, i) != class) continue;
        SC_TRY(grow(&v->image, &capacity, v->images, sizeof *v->image));
        v->image[v->images++] = i;
    }
    if (v->images == 0)
        return fail("--class %ld: no image is of this class (there are %zu classes)", class,
                    f->classes);
    v->sum = new_array(v->latents, v->patches * sizeof *v->sum);
    return v->sum ? SC_OK : SC_FAILED;
}

static int show_masks(viewer *v, const char *images)
{
    long class = v->m.o->class_index;
    feed *f = &v->m.data;
    size_t done = 0;
    SC_TRY(open_viewer(v, images, v->m.o->mask && strcmp(v->m.o->mask, "top") == 0));
    if (class >= 0) SC_TRY(choose_class(v, class));
    SC_TRY(start_feed(f, LOOK_IMAGES, v->image ? listed_draw : NULL, v, 0));
    for (;; done += f->count) {
        SC_TRY(next_images(v, LOOK_IMAGES));
        if (f->count == 0) break;
        show_progress("image", done, v->image ? v->images : f->images, done, "images", "%s", "");
        for (size_t l = 0; l < v->latents; l++) {
            SC_TRY(find_masks(v, v->latent[l]));
            for (size_t i = 0; i < f->count && !v->sum; i++)
                SC_TRY(show_mask(v, v->latent[l], i));
            for (size_t e = 0; e < f->count * v->patches && v->sum; e++)
                v->sum[l * v->patches + e % v->patches] += v->mask[e];
        }
    }
    for (size_t l = 0; l < v->latents && v->sum; l++) {
        char name[96];
        snprintf(name, sizeof name, "latent_%zu_class_%ld.pgm", v->latent[l], class);
        for (size_t p = 0; p < v->patches; p++) v->sum[l * v->patches + p] /= (double)done;
        SC_TRY(write_mask(v, name, v->sum + l * v->patches));
    }
    return SC_OK;
}

static int command_mask(const options *o, int count, char **names)
{
    viewer v = { .m = { .o = o }, .kind = VALUE_MASK };
    int status = show_masks(&v, count ? names[0] : NULL);
    if (status != SC_OK && v.made) rmdir(o->output);         /* goes only if it is empty */
    close_viewer(&v);
    return status;
}

/* The sheet of latent j's next `count` images: cells row by row, the strongest image first. */
static int show_sheet(viewer *v, size_t j, size_t count, size_t K)
{
    feed *f = &v->m.data;
    size_t S = f->model.image_size, step = S + SHEET_GAP, columns = 1;
    while (columns * columns < K) columns++;
    size_t width = columns * step - SHEET_GAP, height = (K - 1) / columns * step + S;
    unsigned char *sheet = new_array(height, width * 3);
    int status = sheet ? SC_OK : SC_FAILED;
    for (size_t done = 0; done < count && status == SC_OK; done += f->count) {
        status = next_images(v, count - done < LOOK_IMAGES ? count - done : LOOK_IMAGES);
        if (status == SC_OK && v->kind) status = find_masks(v, j);
        for (size_t i = 0; i < f->count && status == SC_OK; i++) {
            size_t row = (done + i) / columns, column = (done + i) % columns;
            draw_crop(sheet + (row * width + column) * step * 3, width * 3,
                      f->pixels + i * S * S * 3, S, v->kind ? v->mask + i * v->patches : NULL,
                      f->grid);
        }
    }
    char name[64];
    snprintf(name, sizeof name, "latent_%zu.ppm", j);
    if (count == 0) note("latent %zu fires on no image: its sheet is empty", j);
    if (status == SC_OK) status = write_picture(v->m.o->output, name, 3, width, height, sheet);
    free(sheet);
    return status;
}

/* The images to look at are each latent's top images, as the statistics have them, in turn. */
static int show_sheets(viewer *v, const char *images)
{
    size_t count[MOST_LATENTS] = { 0 };
    const sc_tensor *top;
    if (strcmp(images, "-") == 0) return usage("top picks images: a stream has no choice of them");
    SC_TRY(open_viewer(v, images, 1));
    SC_TRY(stats_tensor(v, "max_activating_image_indices", 1, &top));
    size_t K = top->shape[1];
    v->image = new_array(v->latents, K * sizeof *v->image);
    if (!v->image) return SC_FAILED;
    for (size_t l = 0; l < v->latents; l++)
        for (int64_t image = 0; count[l] < K && image >= 0;) {
            SC_TRY(sc_tensor_integers(&v->stats, top, v->latent[l] * K + count[l], 1, &image));
            if (image >= (int64_t)v->m.data.images)
                return fail("%s: there is no image %lld", v->stats.path, (long long)image);
            if (image >= 0) v->image[v->images++] = (size_t)image;
            count[l] += image >= 0;
        }
    v->m.data.skip_bad = 0;                      /* a cell is for one image and no other */
    SC_TRY(start_feed(&v->m.data, LOOK_IMAGES, listed_draw, v, 0));
    for (size_t l = 0; l < v->latents; l++) SC_TRY(show_sheet(v, v->latent[l], count[l], K));
    return SC_OK;
}

static int command_top(const options *o, int count, char **names)
{
    viewer v = { .m = { .o = o } };
    int status = count ? show_sheets(&v, names[0]) : usage("top takes -m MODEL and IMAGES");
    if (status != SC_OK && v.made) rmdir(o->output);
    close_viewer(&v);
    return status;
}

/* ============================================================================================
 * 12. Tools
 *
 * `info` says what a file or this machine is, `compare` how far apart two files are.
 * ============================================================================================ */

/* Sizes or an index, "192 x 12288" or "3, 4". out: [SC_MAX_RANK * 24] */
static const char *join_sizes(const size_t *sizes, int count, const char *between, char *out)
{
    size_t used = 0;
    strcpy(out, between[1] == 'x' ? "scalar" : "");
    for (int d = 0; d < count; d++)
        used += (size_t)sprintf(out + used, "%s%zu", d ? between : "", sizes[d]);
    return out;
}

/* --- info --- */

/* A file is of the first kind whose tensor it has, of that rank. */
static const struct { const char *tensor; int rank; const char *title, *dimensions[4]; }
file_kinds[] = {
    { "W_enc_m", 2, "checkpoint of a training", { "latents", "inputs" } },
    { "W_enc", 2, "sparse autoencoder", { "inputs", "latents" } },
    { "max_activating_image_indices", 2, "statistics", { "latents", "top images each" } },
    { "activations", 3, "activations", { "images", "tokens each", "numbers each" } },
    { "images", 4, "packed images", { "images", "high", "wide", "colours" } },
    { "value", 1, "codes", { "activations that are not 0" } },
};

static void describe_kind(const sc_safetensors *file, size_t kind, const sc_tensor *tensor)
{
    static const char *const keys[] = { "architecture", "k", "layer", "hook", "model", "tokens",
                                        "images" };
    const char *position = sc_metadata_find(file, "position");
    char text[200];
    printf("%s", file_kinds[kind].title);
    for (int d = 0; d < tensor->rank; d++)
        printf("%s %zu %s", d ? "," : ":", tensor->shape[d], file_kinds[kind].dimensions[d]);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const char *value = sc_metadata_find(file, keys[i]);
        if (!value && i == 0 && sc_tensor_find(file, "W_enc")) value = "standard";
        if (value) printf(", %s %s", keys[i], printable(value, text, sizeof text));
    }
    if (position) printf(", step %llu", strtoull(position, NULL, 16));
    puts(sc_tensor_find(file, "labels") ? ", with labels" : "");
}

static void describe_model(const sc_safetensors *file, const char *naming)
{
    sc_model m;
    printf("vision transformer, %s's names", naming);
    if (sc_model_open(&m, file->path, NULL) != SC_OK) {
        char text[sizeof error_text];
        printf(", not to be used: %s\n", printable(sc_error(), text, sizeof text));
        return;
    }
    printf(": %zu blocks, width %zu, %zu heads, hidden %zu, images of %zu x %zu in %zu x %zu "
           "patches of %zu x %zu, %zu tokens with the class token, %s GELU, epsilon %g%s\n",
           m.blocks, m.width, m.heads, m.hidden, m.image_size, m.image_size, m.grid, m.grid,
           m.patch, m.patch, m.tokens, m.activation == QUICK_GELU ? "quick" : "exact", (double)m.epsilon,
           find_layer(&m, HEAD, 0, 0) ? ", with a head" : "");
    sc_model_close(&m);
}

static void describe(const sc_safetensors *file)
{
    for (size_t i = 0; i < sizeof file_kinds / sizeof *file_kinds; i++) {
        const sc_tensor *tensor = sc_tensor_find(file, file_kinds[i].tensor);
        if (tensor && tensor->rank == file_kinds[i].rank) {
            describe_kind(file, i, tensor);
            return;
        }
    }
    int naming = naming_of(file);
    if (naming < NAMINGS) describe_model(file, naming_names[naming]);
    else puts("a safetensors file of a kind that is not known");
}

static int describe_file(const char *path)
{
    sc_safetensors file;
    char name[300], sizes[SC_MAX_RANK * 24];
    size_t count = 0;
    SC_TRY(sc_safetensors_open(&file, path));
    printf("%s: ", printable(path, name, sizeof name));
    describe(&file);
    for (size_t i = 0; i < file.tensors; i++) count += file.tensor[i].count;
    printf("%zu tensors, %zu numbers, %zu bytes\n", file.tensors, count, file.size);
    for (size_t i = 0; i < file.tensors; i++) {
        const sc_tensor *t = &file.tensor[i];
        printf("    %-48s %-5s %-20s %12zu bytes\n", printable(t->name, name, sizeof name),
               sc_dtype_name(t->dtype), join_sizes(t->shape, t->rank, " x ", sizes), t->bytes);
    }
    printf("%zu entries of metadata\n", file.entries);
    for (size_t i = 0; i < file.entries; i++) {
        printf("    %s = ", printable(file.metadata[i].key, name, sizeof name));
        puts(printable(file.metadata[i].value, name, sizeof name));
    }
    sc_safetensors_close(&file);
    return end_of_output();
}

static int describe_machine(void)
{
    static const struct { const char *name; int number; } sizes[] = {
#ifdef _SC_LEVEL1_DCACHE_SIZE
        { "L1 data cache", _SC_LEVEL1_DCACHE_SIZE }, { "L2 cache", _SC_LEVEL2_CACHE_SIZE },
        { "L3 cache", _SC_LEVEL3_CACHE_SIZE },
#endif
        { "pages", _SC_PAGESIZE },
    };
    printf("saeclip %s\ninstruction sets:", SC_VERSION);
    for (size_t i = 0; i < sizeof instruction_sets / sizeof *instruction_sets; i++)
        if (instruction_sets[i].usable())
            printf(" %s%s", instruction_sets[i].set->name,
                   instruction_sets[i].set == kernels ? " (in use)" : "");
    printf("\nthreads: %d of %ld processors\n", thread_count(), sysconf(_SC_NPROCESSORS_ONLN));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sysconf(sizes[i].number) > 0)
            printf("%s: %ld KiB\n", sizes[i].name, sysconf(sizes[i].number) / 1024);
    return end_of_output();
}

static int command_info(const options *o, int count, char **names)
{
    (void)o;
    return count ? describe_file(names[0]) : describe_machine();
}

/* --- compare --- */

enum { COMPARE_BLOCK = 4096 };

typedef struct {
    double absolute, relative;       /* the largest |a - b| and, where b is not 0, |a - b| / |b| */
    size_t absolute_at, relative_at;
    size_t beyond;                   /* elements beyond the tolerance */
    int other_bits;
} difference;

/* Numbers as they are, also infinite ones and NaN. whole: the same exactly, of whole numbers. */
static int read_numbers(const sc_safetensors *file, const sc_tensor *t, size_t first, size_t count,
                        double *number, int64_t *whole)
{
    const unsigned char *from = t->data + first * sc_dtype_size(t->dtype);
    float some[COMPARE_BLOCK];
    if (t->dtype > SC_F64) SC_TRY(sc_tensor_integers(file, t, first, count, whole));
    if (t->dtype == SC_F64) copy_numbers(number, from, count, 8);
    if (t->dtype < SC_F64) floats_of_bytes(some, from, count, t->dtype);
    for (size_t i = 0; i < count && t->dtype != SC_F64; i++)
        number[i] = t->dtype < SC_F64 ? (double)some[i] : (double)whole[i];
    return SC_OK;
}

static double whole_apart(int64_t a, int64_t b)
{
    return (double)(a > b ? (uint64_t)a - (uint64_t)b : (uint64_t)b - (uint64_t)a);
}

static void count_difference(difference *d, const options *o, size_t at, double apart, double b)
{
    if (!(apart <= DBL_MAX)) apart = INFINITY;               /* one of the two is not finite */
    double relative = apart == INFINITY ? apart : b != 0 ? apart / fabs(b) : 0;
    if (apart == INFINITY || !(apart <= o->atol + o->rtol * fabs(b))) d->beyond++;
    if (apart > d->absolute) d->absolute_at = at;
    if (apart > d->absolute) d->absolute = apart;
    if (relative > d->relative) d->relative_at = at;
    if (relative > d->relative) d->relative = relative;
}

/* Two tensors of one shape, block by block. */
static int compare_numbers(const sc_safetensors *fa, const sc_tensor *a, const sc_safetensors *fb,
                           const sc_tensor *b, const options *o, difference *d)
{
    double x[COMPARE_BLOCK], y[COMPARE_BLOCK];
    int64_t p[COMPARE_BLOCK], q[COMPARE_BLOCK];
    size_t size = sc_dtype_size(a->dtype);
    int whole = a->dtype > SC_F64 && b->dtype > SC_F64;
    *d = (difference){ .other_bits = a->dtype != b->dtype };
    for (size_t first = 0; first < a->count; first += COMPARE_BLOCK) {
        size_t n = a->count - first < COMPARE_BLOCK ? a->count - first : COMPARE_BLOCK;
        const unsigned char *left = a->data + first * size, *right = b->data + first * size;
        if (a->dtype == b->dtype && memcmp(left, right, n * size) == 0) continue;
        d->other_bits = 1;
        if (a->dtype > SC_U8 || b->dtype > SC_U8) {          /* types not read as numbers */
            count_difference(d, o, first, INFINITY, 0);
            continue;
        }
        SC_TRY(read_numbers(fa, a, first, n, x, p));
        SC_TRY(read_numbers(fb, b, first, n, y, q));
        for (size_t i = 0; i < n; i++) {
            if (whole ? p[i] == q[i] : x[i] == y[i] || (isnan(x[i]) && isnan(y[i]))) continue;
            double apart = fabs(x[i] - y[i]);
            if (whole) apart = whole_apart(p[i], q[i]);
            count_difference(d, o, first + i, apart, y[i]);
        }
    }
    return SC_OK;
}

/* at: an element's number in the tensor. out: [SC_MAX_RANK * 24] */
static const char *index_text(const sc_tensor *t, size_t at, char *out)
{
    size_t index[SC_MAX_RANK] = { 0 };
    for (int d = t->rank - 1; d >= 0; at /= t->shape[d--]) index[d] = at % t->shape[d];
    return join_sizes(index, t->rank, ", ", out);
}

/* One row of the table; *differs: beyond the tolerance. */
static int compare_pair(const sc_safetensors *fa, const sc_tensor *a, const sc_safetensors *fb,
                        const sc_tensor *b, const options *o, int *differs)
{
    char name[300], one[SC_MAX_RANK * 24], two[SC_MAX_RANK * 24];
    difference d;
    printf("%-40s %s", printable(a->name, name, sizeof name), sc_dtype_name(a->dtype));
    if (a->dtype != b->dtype) printf(" and %s", sc_dtype_name(b->dtype));
    printf(", %s: ", join_sizes(a->shape, a->rank, " x ", one));
    *differs = a->rank != b->rank || memcmp(a->shape, b->shape, sizeof a->shape) != 0;
    if (*differs) {
        printf("the other is %s\n", join_sizes(b->shape, b->rank, " x ", two));
        return SC_OK;
    }
    SC_TRY(compare_numbers(fa, a, fb, b, o, &d));
    *differs = d.beyond > 0;
    if (!d.other_bits) puts("the same bits");
    else if (d.absolute == 0) puts("equal, in other bits");
    else printf("%zu of %zu beyond the tolerance, |a - b| up to %.9g at [%s], |a - b| / |b| up to "
                "%.9g at [%s]\n", d.beyond, a->count, d.absolute, index_text(a, d.absolute_at, one),
                d.relative, index_text(a, d.relative_at, two));
    return SC_OK;
}

/* Metadata are named where they differ, but differences of theirs are not counted. */
static void compare_metadata(const sc_safetensors *a, const sc_safetensors *b)
{
    char key[100], one[100], two[100];
    for (size_t i = 0, j = 0; i < a->entries || j < b->entries;) {
        int order = i == a->entries ? 1 : j == b->entries ? -1
                    : strcmp(a->metadata[i].key, b->metadata[j].key);
        const char *left = order <= 0 ? a->metadata[i].value : "nothing";
        const char *right = order >= 0 ? b->metadata[j].value : "nothing";
        if (order != 0 || strcmp(left, right) != 0)
            printf("metadata %s: %s and %s\n",
                   printable(order <= 0 ? a->metadata[i].key : b->metadata[j].key, key, sizeof key),
                   printable(left, one, sizeof one), printable(right, two, sizeof two));
        i += order <= 0;
        j += order >= 0;
    }
}

static int compare_files(const sc_safetensors *a, const sc_safetensors *b, const options *o)
{
    size_t total = 0, differing = 0;
    for (size_t i = 0, j = 0; i < a->tensors || j < b->tensors; total++) {
        int order = i == a->tensors ? 1 : j == b->tensors ? -1
                    : strcmp(a->tensor[i].name, b->tensor[j].name), differs = 1;
        char name[300], path[300];
        if (order == 0)
            SC_TRY(compare_pair(a, &a->tensor[i], b, &b->tensor[j], o, &differs));
        else
            printf("%-40s only in %s\n",
                   printable(order < 0 ? a->tensor[i].name : b->tensor[j].name, name, sizeof name),
                   printable(order < 0 ? a->path : b->path, path, sizeof path));
        differing += differs != 0;
        i += order <= 0;
        j += order >= 0;
    }
    compare_metadata(a, b);
    SC_TRY(end_of_output());
    return differing == 0 ? SC_OK : fail("%s: differs from %s in %zu of %zu tensors", a->path,
                                         b->path, differing, total);
}

static int command_compare(const options *o, int count, char **names)
{
    sc_safetensors a, b;
    (void)count;
    SC_TRY(sc_safetensors_open(&a, names[0]));
    int status = sc_safetensors_open(&b, names[1]);
    if (status == SC_OK) {
        status = compare_files(&a, &b, o);
        sc_safetensors_close(&b);
    }
    sc_safetensors_close(&a);
    return status;
}

/* ============================================================================================
 * 13. The command line
 *
 * One table of options, one of commands. An option's row says which commands take it.
 * ============================================================================================ */
#ifndef SAECLIP_NO_MAIN

enum command {
    INFO, PACK, EXTRACT, TRAIN, ENCODE, EVAL, STATS, TOP, MASK, ZEROSHOT, COMPARE, COMMANDS
};

#define FOR(command) (1u << (command))
#define WITH_DATA (FOR(TRAIN) | FOR(ENCODE) | FOR(EVAL) | FOR(STATS))
#define WITH_PHOTOS (WITH_DATA | FOR(EXTRACT) | FOR(TOP) | FOR(MASK) | FOR(ZEROSHOT))
#define WITH_SAES (FOR(ENCODE) | FOR(EVAL) | FOR(STATS) | FOR(TOP) | FOR(MASK))
#define EVERY (FOR(COMMANDS) - 1)

/* A WHOLE number is kept as a long, a LARGE one, which may need more than 32 bits, as a double. */
typedef enum { FLAG, TEXT, TEXTS, WHOLE, LARGE, NUMBER } option_kind;

/* choices: what a text may be, "a|b|c"; least, most: what a number may be. */
static const struct option_row {
    const char *name, *value;
    option_kind kind;
    size_t place;
    unsigned commands;
    const char *fallback, *choices;
    double least, most;
    const char *help;
} option_table[] = {
#define PLACE(field) offsetof(options, field)
    { "-m", "FILE", TEXT, PLACE(model), WITH_PHOTOS, NULL, NULL, 0, 0, "the vision transformer" },
    { "-s", "FILE", TEXTS, PLACE(sae), WITH_SAES, NULL, NULL, 0, 0,
      "the SAE (eval: as many as wanted)" },
    { "-t", "FILE", TEXT, PLACE(stats), FOR(TOP) | FOR(MASK), NULL, NULL, 0, 0,
      "the SAE's statistics (mask: with --mask top only)" },
    { "-o", "PATH", TEXT, PLACE(output),
      FOR(PACK) | FOR(EXTRACT) | FOR(TRAIN) | FOR(ENCODE) | FOR(STATS) | FOR(TOP) | FOR(MASK),
      NULL, NULL, 0, 0, "where to write" },
    { "-l", "J[,J...]", TEXT, PLACE(latents), FOR(TOP) | FOR(MASK), NULL, NULL, 0, 0, "latents" },
    { "--acts", "FILE", TEXT, PLACE(acts), WITH_DATA | FOR(MASK), NULL, NULL, 0, 0,
      "saved activations, instead of -m MODEL IMAGES" },
    { "--also", "DATA", TEXT, PLACE(also), FOR(EVAL), NULL, NULL, 0, 0,
      "a second data set of the same kind: images, or activations" },
    { "--layer", "L", WHOLE, PLACE(layer), WITH_PHOTOS & ~FOR(ZEROSHOT), NULL, NULL, -100000, 100000,
      "block, from 1; -1 is the last (default: the SAE's, else -2)" },
    { "--hook", "H", TEXT, PLACE(hook), WITH_PHOTOS & ~FOR(ZEROSHOT), NULL, "attn|mlp|resid", 0, 0,
      "where to listen (default: the SAE's, else mlp)" },
    { "--tokens", "WHICH", TEXT, PLACE(tokens), FOR(EXTRACT), "all", "all|cls|patches", 0, 0,
      "which tokens to write" },
    { "--dtype", "TYPE", TEXT, PLACE(dtype), FOR(EXTRACT), "f32", "f32|f16", 0, 0, "number type" },
    { "--size", "S", WHOLE, PLACE(size), FOR(PACK), "224", NULL, 1, 16384,
      "the pictures' side; no effect with --square" },
    { "--square", "N", WHOLE, PLACE(square), WITH_PHOTOS | FOR(PACK), NULL, NULL, 1, 16384,
      "first resize the centre square to N x N" },
    { "--crop", "KIND", TEXT, PLACE(crop), WITH_PHOTOS | FOR(PACK), "torchvision", "torchvision|hf",
      0, 0, "whose rounding the centre crop has" },
    { "--limit", "N", WHOLE, PLACE(limit), WITH_PHOTOS | FOR(PACK), NULL, NULL, 1, 1e15,
      "only the first N images" },
    { "--skip-bad", NULL, FLAG, PLACE(skip_bad), WITH_PHOTOS | FOR(PACK), NULL, NULL, 0, 0,
      "name unreadable images and go on" },
    { "--mean", "R,G,B", TEXT, PLACE(mean), WITH_PHOTOS & ~FOR(ENCODE), NULL, NULL, 0, 0,
      "overrules the model's image_mean" },
    { "--std", "R,G,B", TEXT, PLACE(std), WITH_PHOTOS, NULL, NULL, 0, 0,
      "overrules the model's image_std" },
    { "--gelu", "KIND", TEXT, PLACE(gelu), WITH_PHOTOS, NULL, "quick|erf", 0, 0,
      "overrules the model's activation" },
    { "--eps", "X", TEXT, PLACE(epsilon), WITH_PHOTOS, NULL, NULL, 0, 0,
      "overrules the model's layer norm epsilon" },
    { "--heads", "N", TEXT, PLACE(heads), WITH_PHOTOS, NULL, NULL, 0, 0,
      "overrules the model's attention heads" },
    { "--arch", "KIND", TEXT, PLACE(arch), FOR(TRAIN) | WITH_SAES, NULL, "relu|topk", 0, 0,
      "architecture (default: relu, or the file's)" },
    { "--k", "K", WHOLE, PLACE(k), FOR(TRAIN) | WITH_SAES, NULL, NULL, 1, 1e9,
      "TopK's k (default: 32, or the file's)" },
    { "--expansion", "E", WHOLE, PLACE(expansion), FOR(TRAIN), "64", NULL, 1, 65536,
      "latents a dimension; no effect with --latents" },
    { "--latents", "N", WHOLE, PLACE(d_sae), FOR(TRAIN), NULL, NULL, 1, SC_MAX_LATENTS, "latents" },
    { "--l1", "X", NUMBER, PLACE(l1), FOR(TRAIN), "8e-5", NULL, 0, 1e9,
      "weight of the L1 loss; no effect with TopK" },
    { "--lr", "X", NUMBER, PLACE(lr), FOR(TRAIN), "4e-4", NULL, 0, 1e9, "learning rate" },
    { "--warmup", "STEPS", WHOLE, PLACE(warmup), FOR(TRAIN), "500", NULL, 0, 1e9,
      "steps over which the rate rises" },
    { "--batch", "IMAGES", WHOLE, PLACE(batch), FOR(TRAIN), "16", NULL, 1, 1e9, "images a step" },
    { "--epochs", "E", NUMBER, PLACE(epochs), FOR(TRAIN), "1", NULL, 0, 1e9,
      "rounds over the data; no effect with --steps" },
    { "--steps", "N", WHOLE, PLACE(steps), FOR(TRAIN), "-1", NULL, 0, 1e15,
      "steps; 0 writes the initial SAE" },
    { "--b-dec", "KIND", TEXT, PLACE(b_dec), FOR(TRAIN), "zeros",
      "zeros|mean|geomedian|geomedian-images", 0, 0, "where the decoder's bias starts" },
    { "--b-dec-images", "M", WHOLE, PLACE(b_dec_images), FOR(TRAIN), NULL, NULL, 1, 1e9,
      "images for that (default: a batch); no effect with zeros" },
    { "--ghost", NULL, FLAG, PLACE(ghost), FOR(TRAIN), NULL, NULL, 0, 0,
      "ghost gradients for dead latents" },
    { "--dead-window", "STEPS", WHOLE, PLACE(dead_window), FOR(TRAIN), "64", NULL, 0, 1e9,
      "silent steps after which a latent is dead" },
    { "--init", "SAE", TEXT, PLACE(init), FOR(TRAIN), NULL, NULL, 0, 0, "start from this SAE" },
    { "--order", "KIND", TEXT, PLACE(order), FOR(TRAIN), "shuffle", "shuffle|sequential", 0, 0,
      "the order of images" },
    { "--log", "CSV", TEXT, PLACE(log), FOR(TRAIN), NULL, NULL, 0, 0, "a row a step" },
    { "--checkpoint", "FILE", TEXT, PLACE(checkpoint), FOR(TRAIN), NULL, NULL, 0, 0,
      "where to keep the state (default: OUT.ckpt, on a signal)" },
    { "--checkpoint-every", "STEPS", WHOLE, PLACE(checkpoint_every), FOR(TRAIN), "1000", NULL, 1,
      1e15, "no effect without --checkpoint or --resume" },
    { "--resume", NULL, FLAG, PLACE(resume), FOR(TRAIN), NULL, NULL, 0, 0,
      "go on from the checkpoint" },
    { "--dense", NULL, FLAG, PLACE(dense), FOR(ENCODE), NULL, NULL, 0, 0, "also f in full" },
    { "--reconstruction", NULL, FLAG, PLACE(reconstruction), FOR(ENCODE), NULL, NULL, 0, 0,
      "also x'" },
    { "--mean", NULL, FLAG, PLACE(image_means), FOR(ENCODE), NULL, NULL, 0, 0,
      "also each image's mean activations" },
    { "--top", "K", WHOLE, PLACE(top), FOR(STATS), "16", NULL, 1, 4096,
      "top images a latent" },
    { "--top-patches", "P", WHOLE, PLACE(top_patches), FOR(STATS), "64", NULL, 1, 65536,
      "top patch tokens a latent" },
    { "--class-counts", NULL, FLAG, PLACE(class_counts), FOR(STATS), NULL, NULL, 0, 0,
      "also count firing images by class" },
    { "--threshold", "T", NUMBER, PLACE(threshold), FOR(STATS), "-1", NULL, 0, 1e30,
      "count tokens above T instead; no effect without --class-counts" },
    { "--mask", "KIND", TEXT, PLACE(mask), FOR(TOP) | FOR(MASK), NULL, "value|top", 0, 0,
      "value: where the latent fires; top: its top patch tokens" },
    { "--class", "C", WHOLE, PLACE(class_index), FOR(MASK), "-1", NULL, 0, 1e9,
      "the mean mask of this class's images" },
    { "--rtol", "X", NUMBER, PLACE(rtol), FOR(COMPARE), "0", NULL, 0, 1e30, "relative tolerance" },
    { "--atol", "X", NUMBER, PLACE(atol), FOR(COMPARE), "0", NULL, 0, 1e30, "absolute tolerance" },
    { "--format", "KIND", TEXT, PLACE(format), FOR(EVAL) | FOR(ZEROSHOT), "text",
      "text|markdown|csv|json", 0, 0, "how to print (zeroshot: text, csv or json)" },
    { "--seed", "N", LARGE, PLACE(seed), EVERY, "42", NULL, 0, 9007199254740991, "random seed" },
    { "--threads", "N", WHOLE, PLACE(threads), EVERY, NULL, NULL, 1, SC_MAX_THREADS,
      "threads (default: all cores)" },
    { "--quiet", NULL, FLAG, PLACE(quiet), EVERY, NULL, NULL, 0, 0, "no progress, no remarks" },
};

enum { OPTIONS = sizeof option_table / sizeof *option_table };

/* operands: least and most positional arguments; needs: options that must be given. */
static const struct {
    const char *name, *synopsis, *help, *example;
    int (*run)(const options *o, int count, char **names);
    int least, most;
    const char *needs[4];
} command_table[COMMANDS] = {
    [INFO] = { "info", "[FILE]", "what a file is, its tensors and metadata; without a file: the machine",
      "saeclip info", command_info, 0, 1, { NULL } },
    [PACK] = { "pack", "IMAGES -o SET", "decodes and resizes images once",
      "saeclip pack --square 256 photos -o photos.safetensors", command_pack, 1, 1, { "-o" } },
    [EXTRACT] = { "extract", "-m MODEL IMAGES -o ACTS", "activations at a hook point",
      "saeclip extract -m clip.safetensors --layer 11 --hook mlp photos -o acts.safetensors",
      command_extract, 1, 1, { "-m", "-o" } },
    [TRAIN] = { "train", "DATA -o SAE", "trains a sparse autoencoder",
      "saeclip train -m clip.safetensors --layer 11 --hook mlp photos --arch topk --log topk.csv "
      "-o topk.safetensors", command_train, 0, 1, { "-o" } },
    [ENCODE] = { "encode", "-s SAE DATA -o CODES", "codes as (row, index, value) lists",
      "saeclip encode -s sae.safetensors -m clip.safetensors photos -o codes.safetensors",
      command_encode, 0, 1, { "-s", "-o" } },
    [EVAL] = { "eval", "-s SAE ... DATA [--also DATA]", "the table of figures, a row an SAE and data set",
      "saeclip eval -s relu.safetensors -s topk.safetensors -m clip.safetensors photos",
      command_eval, 0, 1, { "-s" } },
    [STATS] = { "stats", "-s SAE DATA -o STATS", "what every latent does over a data set",
      "saeclip stats -s sae.safetensors -m clip.safetensors photos -o stats.safetensors",
      command_stats, 0, 1, { "-s", "-o" } },
    [TOP] = { "top", "-s SAE -t STATS -m MODEL IMAGES -l J -o DIR",
      "the top images of latents, a PPM sheet each",
      "saeclip top -s sae.safetensors -t stats.safetensors -m clip.safetensors photos -l 7,12 "
      "--mask value -o sheets", command_top, 1, 1, { "-s", "-t", "-l", "-o" } },
    [MASK] = { "mask", "-s SAE DATA -l J -o DIR",
      "where a latent fires: PGM masks, PPM overlays",
      "saeclip mask -s sae.safetensors -m clip.safetensors photo.jpg -l 7 -o masks",
      command_mask, 0, 1, { "-s", "-l", "-o" } },
    [ZEROSHOT] = { "zeroshot", "-m MODEL IMAGES",
      "top-1 and top-5 by the model's head or its text embeddings",
      "saeclip zeroshot -m vit.safetensors photos.txt", command_zeroshot, 1, 1, { "-m" } },
    [COMPARE] = { "compare", "A B", "two safetensors files, tensor by tensor",
      "saeclip compare --rtol 1e-5 mine.safetensors theirs.safetensors", command_compare, 2, 2,
      { NULL } },
};

static int print_help(void)
{
    puts("saeclip: sparse autoencoders on a vision transformer's activations\n\n"
         "    saeclip COMMAND [options] [IMAGES or FILE ...]\n");
    for (int i = 0; i < COMMANDS; i++)
        printf("    %-9s %s\n", command_table[i].name, command_table[i].help);
    puts("\nIMAGES: a folder (of folders, one a class), a list (.txt), a packed set (.safetensors),"
         "\none image, or - for PNM pictures on standard input.\n"
         "saeclip COMMAND --help tells more. SAECLIP_ISA and SAECLIP_DECODER are in the README.");
    return end_of_output();
}

static int print_command_help(enum command command)
{
    printf("saeclip %s %s\n\n%s\n\n", command_table[command].name, command_table[command].synopsis,
           command_table[command].help);
    for (size_t i = 0; i < OPTIONS; i++) {
        const struct option_row *row = &option_table[i];
        char left[48];
        if (!(row->commands & FOR(command))) continue;
        snprintf(left, sizeof left, "%s %s", row->name, row->value ? row->value : "");
        printf("    %-24s %s", left, row->help);
        if (row->choices) printf(": %s", row->choices);
        if (row->fallback && *row->fallback != '-') printf(" (default %s)", row->fallback);
        puts("");
    }
    printf("\nexample: %s\n", command_table[command].example);
    return end_of_output();
}

static int is_choice(const char *choices, const char *text)
{
    size_t length = strlen(text);
    for (const char *c = choices; c; c = strchr(c, '|') ? strchr(c, '|') + 1 : NULL)
        if (strncmp(c, text, length) == 0 && (c[length] == '|' || c[length] == '\0')) return 1;
    return 0;
}

static int set_option(options *o, const struct option_row *row, const char *text)
{
    char *place = (char *)o + row->place;
    double number = 0;
    if (row->kind == FLAG) {
        memcpy(place, &(int){ 1 }, sizeof(int));
        return SC_OK;
    }
    if (row->kind == TEXT || row->kind == TEXTS) {
        if (!*text) return usage("%s: a value %s was expected", row->name, row->value);
        if (row->choices && !is_choice(row->choices, text))
            return usage("%s: '%s' is none of %s", row->name, text, row->choices);
        if (row->kind == TEXTS && o->saes == SC_MAX_TAPS)
            return usage("%s: more than %d were given", row->name, SC_MAX_TAPS);
        if (row->kind == TEXTS) place += o->saes++ * sizeof text;
        memcpy(place, &text, sizeof text);
        return SC_OK;
    }
    SC_TRY(parse_number(text, row->name, row->least, row->most, &number));
    if (row->kind == WHOLE && number > (double)LONG_MAX)
        return usage("%s: '%s' is more than this machine can count", row->name, text);
    if (row->kind != NUMBER && number != floor(number))
        return usage("%s: '%s' is no whole number", row->name, text);
    long whole = row->kind == WHOLE ? (long)number : 0;
    if (row->kind == WHOLE) memcpy(place, &whole, sizeof whole);
    else memcpy(place, &number, sizeof number);
    return SC_OK;
}

static void set_defaults(options *o)
{
    memset(o, 0, sizeof *o);
    for (size_t i = 0; i < OPTIONS; i++) {
        const struct option_row *row = &option_table[i];
        char *place = (char *)o + row->place;
        if (!row->fallback) continue;
        double number = row->kind == TEXT ? 0 : strtod(row->fallback, NULL);
        long whole = (long)number;
        if (row->kind == TEXT) memcpy(place, &row->fallback, sizeof row->fallback);
        else if (row->kind == WHOLE) memcpy(place, &whole, sizeof whole);
        else memcpy(place, &number, sizeof number);
    }
}

static int was_given(const options *o, const char *name)
{
    for (size_t i = 0; i < OPTIONS; i++)
        if (strcmp(option_table[i].name, name) == 0 && (o->given >> i & 1)) return 1;
    return 0;
}

/* One argument that begins with -, and its value. */
static int parse_option(options *o, enum command command, int argc, char **argv, int *at)
{
    const char *name = argv[*at], *equals = name[1] == '-' ? strchr(name, '=') : NULL;
    size_t length = equals ? (size_t)(equals - name) : strlen(name), i = 0;
    while (i < OPTIONS && (strncmp(option_table[i].name, name, length) != 0
                           || option_table[i].name[length] != '\0'
                           || !(option_table[i].commands & FOR(command)))) i++;
    const char *own = command_table[command].name;
    if (i == OPTIONS)
        return usage("%s takes no option %s (saeclip %s --help)", own, name, own);
    const struct option_row *row = &option_table[i];
    if (row->kind == FLAG && equals) return usage("%s takes no value", row->name);
    if (row->kind != FLAG && !equals && *at + 1 >= argc)
        return usage("%s: a value %s was expected", row->name, row->value);
    if ((o->given >> i & 1) && row->kind != TEXTS) return usage("%s was given twice", row->name);
    o->given |= (uint64_t)1 << i;
    return set_option(o, row, row->kind == FLAG ? NULL : equals ? equals + 1 : argv[++*at]);
}

/* What options and operands a command cannot do without, or not together. */
static int check_options(const options *o, enum command command, int operands)
{
    static const char *const apart[][2] = {
        { "--init", "--expansion" }, { "--init", "--latents" }, { "--init", "--b-dec" },
        { "--steps", "--epochs" }, { "--square", "--size" } };
    const char *name = command_table[command].name;
    for (size_t i = 0; i < 4 && command_table[command].needs[i]; i++)
        if (!was_given(o, command_table[command].needs[i]))
            return usage("%s: %s is missing (saeclip %s --help)", name,
                         command_table[command].needs[i], name);
    for (size_t i = 0; i < sizeof apart / sizeof *apart; i++)
        if (was_given(o, apart[i][0]) && was_given(o, apart[i][1]))
            return usage("%s and %s exclude each other", apart[i][0], apart[i][1]);
    if (operands < command_table[command].least || operands > command_table[command].most)
        return usage("%s: %s was expected", name, command_table[command].synopsis);
    if (o->acts && operands) return usage("--acts and IMAGES exclude each other");
    if (was_given(o, "--layer") && o->layer == 0)
        return usage("--layer: '0': blocks count from 1, or from -1 back from the last");
    if (command == ZEROSHOT && strcmp(o->format, "markdown") == 0)
        return usage("--format: '%s' is none of text|csv|json", o->format);
    return SC_OK;
}

static int run_command(enum command command, int argc, char **argv)
{
    options o;
    int operands = 0, plain = 0;
    set_defaults(&o);
    for (int i = 0; i < argc; i++) {
        if (!plain && strcmp(argv[i], "--help") == 0) return print_command_help(command);
        if (!plain && strcmp(argv[i], "--") == 0) plain = 1;
        else if (!plain && argv[i][0] == '-' && argv[i][1])
            SC_TRY(parse_option(&o, command, argc, argv, &i));
        else argv[operands++] = argv[i];
    }
    SC_TRY(check_options(&o, command, operands));
    quiet = o.quiet;
    SC_TRY(sc_instruction_set(getenv("SAECLIP_ISA")));
    SC_TRY(sc_threads_start((int)o.threads));
    int status = command_table[command].run(&o, operands, argv);
    sc_threads_stop();
    return status;
}

static int run_saeclip(int argc, char **argv)
{
    if (argc < 2) return usage("a command was expected (saeclip --help)");
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) return print_help();
    if (strcmp(argv[1], "--version") == 0) {
        puts("saeclip " SC_VERSION);
        return end_of_output();
    }
    for (int i = 0; i < COMMANDS; i++)
        if (strcmp(argv[1], command_table[i].name) == 0)
            return run_command((enum command)i, argc - 2, argv + 2);
    return usage("'%s' is no command (saeclip --help)", argv[1]);
}

/* A standard stream that is closed stays unusable, instead of being the next file that is opened. */
static void hold_streams(void)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);                    /* writing fails instead, and says why */
    signal(SIGXFSZ, SIG_IGN);
    hold_streams();
    int status = run_saeclip(argc, argv);
    if (status != SC_OK) print_line(sc_error());
    return status;
}

#endif /* !SAECLIP_NO_MAIN */
#endif /* !SC_ISA */
