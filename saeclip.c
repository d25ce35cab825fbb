/* saeclip: sparse autoencoders on a vision transformer's activations, in one C file.
 *
 * From photos to what each latent sees: a vision transformer (CLIP ViT-B/16 and its kin) runs up to
 * a hook point, a sparse autoencoder is trained on the activations of every token, and every latent
 * is measured and shown: how often it fires, how strongly, on which images, patches and classes.
 * The method is PatchSAE's (Lim et al., ICLR 2025). The sections stand in the order data flows.
 * There is no dependency, no build option that changes a result, and no order of work that could:
 * each sum's order is defined (section 3), so every machine gives the same bits.
 *
 *  Part I: the method
 *    1. Numbers
 *    2. The vision transformer            3. The sparse autoencoder
 *    4. Training                          5. Measuring
 *  Part II: the same, fast
 *    6. Errors and memory                 7. Threads
 *    8. Kernels and matrix products       9. The vision transformer, fast
 *   10. Sparse codes                     11. Training steps
 *   12. Counting
 *  Part III: data in and out
 *   13. Options and messages             14. Files
 *   15. Images and data sets             16. Models' files
 *   17. SAEs' files                      18. Activations
 *  Part IV: the program
 *   19. Training runs                    20. Data sets through SAEs
 *   21. Looking                          22. Figures
 *   23. The atlas                        24. Tools
 *   25. The command line                 26. The atlas's page
 *
 * Who wants the algorithm alone reads 3, 7, 9, 10 and 12; the rest is getting data in and out. */
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
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
/* POSIX.1-2008's stdlib.h has it; glibc's shows it only where more is asked for. */
char *(realpath)(const char *restrict path, char *restrict resolved);

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

/* ********************************************************************************************
 * Part I: the method
 *
 * Everything that saeclip computes, as plain loops on one thread: no tiles, no lists of codes, no
 * packed matrices, no options, no files. These functions define the numbers. Part II computes the
 * same bits faster, and the tests hold it to them.
 *
 * In short. A vision transformer turns an image into T tokens (a class token and the patches) and
 * passes them through blocks of attention and MLP. At a hook point, e.g. the output of block 11's
 * MLP, each token is a vector x of D numbers. A sparse autoencoder (SAE) learns n >> D latents, of
 * which only a few are active for a token, and from which x can be rebuilt:
 *
 *     h  = W_enc^T (x - b_dec) + b_enc                           pre-activations, n numbers
 *     f  = relu(h)   or   relu of the k largest of h             activations (codes)
 *     x' = W_dec^T f + b_dec                                     reconstruction
 *
 * Training minimises, over tokens x,
 *
 *     loss = mean of (x' - x)^2 / ||x||  +  lambda * sum of |f|  (+ the ghost loss)
 *
 * and then each latent is described by the images and patches that activate it most.
 *
 * Where these definitions differ from what you may expect:
 *   - "mse" is divided by the token's norm ||x||, not by its square: it grows with the scale of x.
 *     PatchSAE does so; eval reports the plain mean square beside it (mse_raw).
 *   - "dead" in training is a latent silent for more than dead_window steps; in the evaluation of
 *     a data set it is a latent that fires on none of its images.
 *   - a latent's mean activation is over the images on which it fires, not over all images.
 *   - all tokens are trained on, the class token too.
 *   - rows of W_dec have unit norm at the start of a step, not necessarily at its end.
 *
 * Sources: Bricken et al., "Towards monosemanticity", 2023 (ReLU SAE); Gao et al., "Scaling and
 * evaluating sparse autoencoders", 2024 (TopK); Lim et al., "Sparse autoencoders reveal selective
 * remapping of visual concepts during adaptation", ICLR 2025 (PatchSAE), whose code is named by
 * file and function.
 * ******************************************************************************************** */

/* From section 6, where they are explained: errors are values, memory comes in blocks that are
 * released together. */
SC_PRINTF(2, 3) static int set_error(int status, const char *format, ...);
#define fail(...) set_error(SC_FAILED, __VA_ARGS__)
#define usage(...) set_error(SC_USAGE, __VA_ARGS__)

typedef void *memory_list;
typedef struct { void *pointer; size_t rows, row_bytes; } array_spec;
#define ARRAY(pointer, rows, columns) { &(pointer), rows, (columns) * sizeof *(pointer) }
#define COUNT(list) (sizeof(list) / sizeof *(list))
static void *new_array(size_t count, size_t size);
static int new_arrays(memory_list *list, const array_spec *array, size_t count);
static void release(memory_list *list);
static size_t first_not_finite(const float *values, size_t count);

/* ============================================================================================
 * 1. Numbers
 *
 * What decides every bit of a result: the fused multiply-add, the order of each sum, exp, log, GELU
 * and the random numbers. All are built from IEEE 754 operations, so that every machine, compiler
 * and C library gives the same bits. There are four kinds of sums:
 *   - an element of a matrix product: chains of 256 terms        chained_sum()
 *   - a sum along a row (norm, mean, softmax): 16 partial sums   sc_dot_plain(), row_sum()
 *   - a sum over tokens: float64, in blocks of 256               sum_in_blocks()
 *   - a sum over images: exact, in 128 bits                      exact_add()
 * ============================================================================================ */

#if defined(__FAST_MATH__) || !defined(FLT_EVAL_METHOD) || FLT_EVAL_METHOD != 0
#error "saeclip needs IEEE arithmetic: no -ffast-math; 32-bit x86: -msse2 -mfpmath=sse"
#endif

enum {
    CHAIN = 256,                     /* terms in one chain of a matrix product; tokens in a block */
    PARTIALS = 16                    /* interleaved partial sums along a row */
};

/* Rows in memory are padded with zeros to whole groups of 16 floats. */
static size_t padded(size_t n) { return (n + PARTIALS - 1) / PARTIALS * PARTIALS; }

/* a * b + c, rounded once. Without hardware support it is computed in double: the product is exact
 * there, and the sum is rounded to odd, so that rounding it again to float is correct (Boldo and
 * Melquiond, "Emulation of FMA and correctly rounded sums", 2008). */
static inline float fma32(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return fmaf(a, b, c);
#else
    double product = (double)a * b;
    double sum = product + c;
    double back = sum - product;
    double error = (product - (sum - back)) + (c - back);
    if (error > 0 || error < 0) {
        uint64_t bits;
        memcpy(&bits, &sum, sizeof bits);
        if (!(bits & 1)) {
            bits += (error > 0) == (sum > 0) ? 1 : (uint64_t)-1;
        }
        memcpy(&sum, &bits, sizeof sum);
    }
    return (float)sum;
#endif
}

/* sum over k of a[k] b[k], the order in which every matrix product adds up its elements: blocks of
 * 256 terms, each one chain of fused multiply-adds that begins at 0; the chains are added in order.
 *
 * Why chains of 256? One long chain would round more (the error grows with its length), and the
 * fast code can keep 256 rows of a matrix in the nearest cache. Since lanes and threads never
 * divide a chain, vectors of any width give the same bits. A term with a factor 0 may be left out:
 * it changes no bit, since every value here is finite. So sparse and dense code agree.
 * a, b: K values, a_step and b_step floats apart */
static float chained_sum(const float *a, size_t a_step, const float *b, size_t b_step, size_t K) {
    float sum = 0;
    for (size_t block = 0; block < K; block += CHAIN) {
        float chain = 0;
        for (size_t k = block; k < K && k < block + CHAIN; k++) {
            chain = fma32(a[k * a_step], b[k * b_step], chain);
        }
        sum += chain;
    }
    return sum;
}

/* c = a b + bias + residual. Adding 0 at the end turns -0 into +0: whether a sum of zeros is -0 can
 * depend on terms that were left out.
 * a: [M, K]; b: [K, N]; bias: [N] and residual: [M, N], or NULL; c: [M, N] */
void sc_matmul_plain(size_t M, size_t N, size_t K, const float *a, const float *b,
                     const float *bias, const float *residual, float *c) {
    for (size_t i = 0; i < M; i++) {
        for (size_t j = 0; j < N; j++) {
            float sum = chained_sum(a + i * K, 1, b + j, N, K);
            if (bias) {
                sum += bias[j];
            }
            if (residual) {
                sum += residual[i * N + j];
            }
            c[i * N + j] = sum + 0.0f;
        }
    }
}

/* Joins n = 16, 8, 4, 2 or 1 partial sums by halves. p: [n], overwritten */
static inline float join(float *p, int n) {
    for (int half = n / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            p[i] += p[i + half];
        }
    }
    return p[0];
}

/* sum_e a[e] b[e] along a row: element e goes to partial sum e mod 16. 16 floats fill one vector of
 * AVX-512, two of AVX2 or four of NEON; all of them add up the same 16 sums. a, b: [n] */
float sc_dot_plain(const float *a, const float *b, size_t n) {
    float p[PARTIALS] = { 0 };
    for (size_t e = 0; e < n; e++) {
        p[e % PARTIALS] = fma32(a[e], b[e], p[e % PARTIALS]);
    }
    return join(p, PARTIALS);
}

/* sum_e a[e], in the same order. a: [n] */
static float row_sum(const float *a, size_t n) {
    float p[PARTIALS] = { 0 };
    for (size_t e = 0; e < n; e++) {
        p[e % PARTIALS] += a[e];
    }
    return join(p, PARTIALS);
}

/* row / ||row||; a row of zeros stays. row: [n] */
static void unit_row(float *row, size_t n) {
    float norm = sqrtf(sc_dot_plain(row, row, n));
    if (norm > 0) {
        for (size_t e = 0; e < n; e++) {
            row[e] /= norm;
        }
    }
}

/* Sum over tokens in float64: blocks of 256 in order, then the blocks in order. value: [n] */
static double sum_in_blocks(const double *value, size_t n) {
    double sum = 0;
    for (size_t block = 0; block < n; block += CHAIN) {
        double part = 0;
        for (size_t i = block; i < n && i < block + CHAIN; i++) {
            part += value[i];
        }
        sum += part;
    }
    return sum;
}

/* e^x within 1 unit in the last place. x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 is split into two
 * parts, the first with 9 bits so that n times it is exact; e^r is its Taylor polynomial of degree
 * 7; 2^n is applied in two factors so that results below the normal range are rounded once. */
static inline float exp32(float x) {
    const float magic = 12582912.0f;                    /* 1.5 * 2^23: adding it rounds to */
    uint32_t low;                                       /* an integer */
    memcpy(&low, &x, sizeof low);                       /* The bits of floats order as integers, */
    if (low > 0xc2d00000u) {
        low = 0xc2d00000u;           /* negative ones backwards: clip x to */
    }
    int32_t high = (int32_t)low;                        /* -104 .. 89, NaN too, which could not */
    if (high > 0x42b20000) {
        high = 0x42b20000;           /* be converted to an integer below. */
    }
    float clipped;
    memcpy(&clipped, &high, sizeof clipped);
    float n = (clipped * 1.44269504f + magic) - magic;
    float r = (clipped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    int32_t whole = (int32_t)n;
    int32_t half = whole >> 1;
    int32_t bits1 = (half + 127) << 23;
    int32_t bits2 = (whole - half + 127) << 23;
    float scale1, scale2;
    memcpy(&scale1, &bits1, sizeof scale1);
    memcpy(&scale2, &bits2, sizeof scale2);
    return x != x ? x : p * scale1 * scale2;
}

/* x sigmoid(1.702 x): the activation of OpenAI's CLIP (Radford et al., 2021). */
static inline float quick_gelu(float x) { return x / (1.0f + exp32(-1.702f * x)); }

/* x Phi(x), Phi the normal distribution (Hendrycks and Gimpel, 2016). With z = |x| / sqrt 2 and
 * t = 1 / (1 + z / 2): erfc(z) / 2 = t exp(-z^2) P(t). P is fitted (tests/golden/fit_gelu.py) with
 * a relative error below 5e-8 for z in [0, 10], so the left tail keeps its relative precision. */
static inline float gelu(float x) {
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

/* ln x for finite x > 0: x = 2^e m with m in [1/sqrt 2, sqrt 2); ln m = 2 atanh s by its series,
 * s = (m - 1) / (m + 1). */
static double log64(double x) {
    int exponent;
    double m = frexp(x, &exponent);                     /* exact: m in [1/2, 1) */
    if (m < 0.70710678118654752) {
        m *= 2;
        exponent--;
    }
    double s = (m - 1) / (m + 1);
    double s2 = s * s;
    double sum = 0;
    for (int k = 25; k >= 3; k -= 2) {
        sum = (sum + 1.0 / k) * s2;
    }
    return exponent * 0.69314718055994531 + 2 * (s + s * sum);
}

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random
 * words from a key (the seed) and a counter, whose upper half names a stream. Any number of any
 * stream can be computed directly, so threads can share the work. */
enum { STREAM_W_ENC = 1, STREAM_W_DEC, STREAM_ORDER };

static void philox(uint64_t seed, uint64_t stream, uint64_t position, uint32_t out[4]) {
    uint32_t key0 = (uint32_t)seed;
    uint32_t key1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)position;
    uint32_t c1 = (uint32_t)(position >> 32);
    uint32_t c2 = (uint32_t)stream;
    uint32_t c3 = (uint32_t)(stream >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0;
        uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
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
static float uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t r[4];
    philox(seed, stream, index / 4, r);
    return (float)(r[index % 4] >> 8) * 0x1p-23f - 1.0f;
}

/* The order of the images in one epoch: a permutation of 0 .. n - 1 (Fisher and Yates).
 * order: [n] */
static void permutation(uint64_t seed, uint64_t epoch, uint64_t *order, size_t n) {
    uint32_t r[4];
    for (size_t i = 0; i < n; i++) {
        order[i] = i;
    }
    for (size_t i = n; i > 1; i--) {
        philox(seed, STREAM_ORDER + (epoch << 8), i, r);
        size_t j = (size_t)((((uint64_t)r[1] << 32) | r[0]) % i);
        uint64_t swap = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swap;
    }
}

/* Sums over images are exact, so that the shards of a data set can be merged in any order: 128 bits
 * in units of 2^-64. The part of a term below one unit is cut off. */
typedef struct { uint64_t high, low; } exact_sum;

static void exact_add(exact_sum *sum, exact_sum term) {
    sum->low += term.low;
    sum->high += term.high + (sum->low < term.low);
}

/* value: 0 <= value < 2^63 */
static void exact_add_float(exact_sum *sum, float value) {
    int exponent;
    uint64_t digits = (uint64_t)(frexp(value, &exponent) * 0x1p53);
    int shift = exponent + 11;                          /* value 2^64 = digits 2^shift */
    exact_sum term = { 0, 0 };
    if (shift >= 64) {
        term.high = digits << (shift - 64);
    } else if (shift > 0) {
        term.high = digits >> (64 - shift);
        term.low = digits << shift;
    } else if (shift > -64) {
        term.low = digits >> -shift;
    }
    exact_add(sum, term);
}

static double exact_value(exact_sum sum) {
    return (double)sum.high + (double)sum.low * 0x1p-64;
}

/* ============================================================================================
 * 2. The vision transformer
 *
 * Dosovitskiy et al., "An image is worth 16x16 words", 2021, as CLIP uses it (Radford et al.,
 * 2021), up to a hook point:
 *
 *     x = [class token; patches W + bias] + positions            then a norm where CLIP has one
 *     x = x + attention(norm1(x));   x = x + mlp(norm2(x))       for each block
 *     logits = head(norm(x of the class token))
 *
 * One image. T tokens (1 + grid^2), D width, d = D / heads, H hidden. The weights are those of
 * PyTorch: a linear layer y = W x + bias has W [outputs, inputs].
 * ============================================================================================ */

/* The layers of a model: NORM1 to FC2 exist in every block, the others once. layer[b * ROLES + r]
 * is the layer with role r of block b, from 0; those that exist once stand with block 0. */
enum role {
    CLASS_TOKEN, POSITIONS, PATCHES, PRE, NORM1, QKV, OUT, NORM2, FC1, FC2, POST, HEAD, ROLES
};

typedef enum { NO_ACTIVATION, QUICK_GELU, ERF_GELU } activation_kind;

/* out = (x - mean) / sqrt(variance + epsilon) * weight + bias for each row (Ba, Kiros and Hinton,
 * "Layer normalization", 2016; torch.nn.LayerNorm). x, out: [rows, D]; weight, bias: [D] */
static void layer_norm_forward(float *out, const float *x, const sc_layer *norm, float epsilon,
                               size_t rows, size_t D) {
    for (size_t i = 0; i < rows; i++, x += D, out += D) {
        float mean = row_sum(x, D) / (float)D;
        for (size_t d = 0; d < D; d++) {
            out[d] = x[d] - mean;
        }
        float variance = sc_dot_plain(out, out, D) / (float)D;
        float scale = 1.0f / sqrtf(variance + epsilon);
        for (size_t d = 0; d < D; d++) {
            out[d] = out[d] * scale * norm->weight[d] + norm->bias[d];
        }
    }
}

/* out = x W^T + bias (torch.nn.Linear); the 0 as in sc_matmul_plain().
 * x: [rows, K]; W: [N, K]; bias: [N] or NULL; out: [rows, N] */
static void linear_forward(float *out, const float *x, const sc_layer *linear, size_t rows,
                           size_t K, size_t N) {
    for (size_t i = 0; i < rows; i++) {
        const float *x_i = x + i * K;
        for (size_t j = 0; j < N; j++) {
            const float *W_j = linear->weight + j * K;
            float sum = chained_sum(x_i, 1, W_j, 1, K);
            if (linear->bias) {
                sum += linear->bias[j];
            }
            out[i * N + j] = sum + 0.0f;
        }
    }
}

/* row = exp(scale (row - max)) / sum of these; subtracting the largest avoids overflow. row: [n] */
static void softmax_forward(float *row, size_t n, float scale) {
    float largest = row[0];
    for (size_t e = 1; e < n; e++) {
        if (row[e] > largest) {
            largest = row[e];
        }
    }
    for (size_t e = 0; e < n; e++) {
        row[e] = exp32(scale * (row[e] - largest));
    }
    float sum = row_sum(row, n);
    for (size_t e = 0; e < n; e++) {
        row[e] /= sum;
    }
}

/* out = softmax(q k^T / sqrt d) v for each head (Vaswani et al., "Attention is all you need", 2017,
 * equation 1). qkv: [T, 3 D], the queries, keys and values of all heads side by side; out: [T, D];
 * scores: [T], of one query */
static void attention_forward(float *out, const float *qkv, float *scores, size_t T, size_t D,
                              size_t heads) {
    size_t d = D / heads;
    size_t row = 3 * D;
    float scale = 1.0f / sqrtf((float)d);
    for (size_t head = 0; head < heads; head++) {
        const float *q = qkv + head * d;
        const float *k = q + D;
        const float *v = k + D;
        for (size_t t = 0; t < T; t++) {
            const float *q_t = q + t * row;
            float *out_t = out + t * D + head * d;
            /* how much token t attends to each token s */
            for (size_t s = 0; s < T; s++) {
                const float *k_s = k + s * row;
                scores[s] = chained_sum(q_t, 1, k_s, 1, d) + 0.0f;
            }
            softmax_forward(scores, T, scale);
            /* the mean of the values, weighted by that */
            for (size_t i = 0; i < d; i++) {
                out_t[i] = chained_sum(scores, 1, v + i, row, T) + 0.0f;
            }
        }
    }
}

/* The MLP's activation function, elementwise. x: [count] */
static void gelu_forward(float *x, size_t count, activation_kind kind) {
    for (size_t i = 0; i < count; i++) {
        if (kind == QUICK_GELU) {
            x[i] = quick_gelu(x[i]);
        } else {
            x[i] = gelu(x[i]);
        }
    }
}

/* x += branch; the 0 as in sc_matmul_plain(). x, branch: [count] */
static void residual_forward(float *x, const float *branch, size_t count) {
    for (size_t i = 0; i < count; i++) {
        x[i] = branch[i] + x[i] + 0.0f;
    }
}

/* The tokens of an image before the first block. A patch is a row of 3 p^2 numbers, channel by
 * channel, each ((v / 255) - mean) / std of its channel.
 * pixels: [S, S, 3], 8 bits; patch: [3 p^2], room for one; x: [T, D] */
static void embed_forward(float *x, const sc_model *m, const unsigned char *pixels, float *patch) {
    size_t D = m->width;
    size_t p = m->patch;
    size_t S = m->image_size;
    const float *positions = m->layer[POSITIONS].weight;
    for (size_t d = 0; d < D; d++) {
        x[d] = m->layer[CLASS_TOKEN].weight[d] + positions[d] + 0.0f;
    }
    for (size_t i = 0; i < m->grid * m->grid; i++) {
        size_t top = i / m->grid * p;                    /* the patch's first row of pixels */
        size_t left = i % m->grid * p;
        float *to = patch;
        for (size_t c = 0; c < 3; c++) {
            for (size_t e = 0; e < p * p; e++) {
                size_t pixel = (top + e / p) * S + left + e % p;
                float v = pixels[3 * pixel + c];
                *to++ = (v / 255.0f - m->mean[c]) / m->std[c];
            }
        }
        float *token = x + (i + 1) * D;                  /* token 0 is the class token */
        linear_forward(token, patch, &m->layer[PATCHES], 1, 3 * p * p, D);
        residual_forward(token, positions + (i + 1) * D, D);
    }
}

/* The values of one image's forward pass. */
typedef struct {
    float *x;                        /* [T, D], the residual stream */
    float *normed;                   /* [T, D], the output of a norm */
    float *qkv;                      /* [T, 3 D] */
    float *mixed;                    /* [T, D], attention before its output projection */
    float *branch;                   /* [T, D], what is added to x */
    float *hidden;                   /* [T, H] */
    float *scores;                   /* [T] */
    float *patch;                    /* [3 p^2], one patch's pixels */
    memory_list memory;
} vit_arrays;

static int new_vit_arrays(vit_arrays *a, const sc_model *m) {
    size_t T = m->tokens;
    size_t D = m->width;
    const array_spec arrays[] = {
        ARRAY(a->x, T, D),
        ARRAY(a->normed, T, D),
        ARRAY(a->qkv, T, 3 * D),
        ARRAY(a->mixed, T, D),
        ARRAY(a->branch, T, D),
        ARRAY(a->hidden, T, m->hidden),
        ARRAY(a->scores, T, 1),
        ARRAY(a->patch, 3 * m->patch, m->patch) };
    a->memory = NULL;
    return new_arrays(&a->memory, arrays, COUNT(arrays));
}

/* Runs block `number`, from 1, on a->x: [T, D]. out: [T, D], the block's output at a hook point, or
 * NULL. The hook points: "attn" is the output of the attention module after its output projection
 * and "mlp" that of the MLP, both before they are added to x; "resid" is x after both. */
static void block_forward(vit_arrays *a, const sc_model *m, size_t number, sc_hook hook,
                          float *out) {
    const sc_layer *w = m->layer + (number - 1) * ROLES;
    size_t T = m->tokens;
    size_t D = m->width;
    size_t H = m->hidden;
    size_t bytes = T * D * sizeof *out;

    /* x += attention(norm1(x)) */
    layer_norm_forward(a->normed, a->x, &w[NORM1], m->epsilon, T, D);
    linear_forward(a->qkv, a->normed, &w[QKV], T, D, 3 * D);
    attention_forward(a->mixed, a->qkv, a->scores, T, D, m->heads);
    linear_forward(a->branch, a->mixed, &w[OUT], T, D, D);
    if (out && hook == SC_ATTN) {
        memcpy(out, a->branch, bytes);
    }
    residual_forward(a->x, a->branch, T * D);

    /* x += mlp(norm2(x)) */
    layer_norm_forward(a->normed, a->x, &w[NORM2], m->epsilon, T, D);
    linear_forward(a->hidden, a->normed, &w[FC1], T, D, H);
    gelu_forward(a->hidden, T * H, (activation_kind)m->activation);
    linear_forward(a->branch, a->hidden, &w[FC2], T, H, D);
    if (out && hook == SC_MLP) {
        memcpy(out, a->branch, bytes);
    }
    residual_forward(a->x, a->branch, T * D);
    if (out && hook == SC_RESID) {
        memcpy(out, a->x, bytes);
    }
}

/* The logits: head(norm(class token)) for a classifier; for CLIP with the class prompts' embeddings
 * (m->text, unit rows), the cosine of the projection with each. x: [T, D]; normed: [D];
 * logits: [classes] */
static int head_forward(float *logits, const sc_model *m, const float *x, float *normed) {
    size_t P = m->outputs;
    size_t row = padded(P);
    layer_norm_forward(normed, x, &m->layer[POST], m->epsilon, 1, m->width);
    if (!m->text) {
        linear_forward(logits, normed, &m->layer[HEAD], 1, m->width, P);
        return SC_OK;
    }
    float *embedding = new_array(P, sizeof *embedding);
    if (!embedding) return SC_FAILED;
    linear_forward(embedding, normed, &m->layer[HEAD], 1, m->width, P);
    unit_row(embedding, P);
    for (size_t c = 0; c < m->classes; c++) {
        logits[c] = sc_dot_plain(embedding, m->text + c * row, P);
    }
    free(embedding);
    return SC_OK;
}

/* The activations of one image at a hook point, and the logits where they are asked for.
 * m: its layers hold weights as PyTorch has them; pixels: [S, S, 3]; layer: from 1;
 * out: [T, D] or NULL; logits: [classes] or NULL */
static int vit_forward(const sc_model *m, const unsigned char *pixels, size_t layer, sc_hook hook,
                       float *out, float *logits) {
    size_t T = m->tokens;
    size_t D = m->width;
    size_t last = logits ? m->blocks : layer;
    vit_arrays a;
    SC_TRY(new_vit_arrays(&a, m));
    embed_forward(a.x, m, pixels, a.patch);
    if (m->layer[PRE].weight) {
        layer_norm_forward(a.normed, a.x, &m->layer[PRE], m->epsilon, T, D);
        memcpy(a.x, a.normed, T * D * sizeof *a.x);
    }
    int status = SC_OK;
    for (size_t number = 1; number <= last; number++) {
        float *tap = number == layer ? out : NULL;
        block_forward(&a, m, number, hook, tap);
    }
    if (logits) {
        status = head_forward(logits, m, a.x, a.normed);
    }
    release(&a.memory);
    return status;
}

/* ============================================================================================
 * 3. The sparse autoencoder
 *
 *     h = W_enc^T (x - b_dec) + b_enc       f = relu(h), or relu of the k largest of h
 *     x' = W_dec^T f + b_dec
 *
 * T tokens, D inputs, n latents. In memory W_enc and W_dec are both [n, D], latent by latent:
 * row j of W_enc is the direction that latent j looks for, row j of W_dec the one that it writes.
 * Rows are `stride` floats apart, D padded to a multiple of 16 with zeros.
 * PatchSAE: src/sae_training/sparse_autoencoder.py, forward_standard().
 * ============================================================================================ */

/* h = W_enc^T (x - b_dec) + b_enc. centred: [T, D], x - b_dec; h: [T, n] */
static void pre_activation_forward(float *h, const sc_sae *sae, const float *centred, size_t T) {
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    for (size_t t = 0; t < T; t++) {
        const float *centred_t = centred + t * D;
        for (size_t j = 0; j < n; j++) {
            const float *W_enc = sae->W_enc + j * sae->stride;
            float sum = chained_sum(W_enc, 1, centred_t, 1, D);
            h[t * n + j] = sum + sae->b_enc[j] + 0.0f;
        }
    }
}

/* f = max(h, 0). h, f: [n], of one token */
static void relu_forward(float *f, const float *h, size_t n) {
    for (size_t j = 0; j < n; j++) {
        f[j] = h[j] > 0 ? h[j] : 0;
    }
}

/* f = the k largest of h where they are positive, else 0 (Gao et al., 2024, section 2.3). The
 * largest is taken k times; of equal ones the latent with the lower index is taken first, as
 * everywhere in this file, so that the result does not depend on the order of work.
 * h, f: [n], of one token */
static void topk_forward(float *f, const float *h, size_t n, size_t k) {
    for (size_t j = 0; j < n; j++) {
        f[j] = 0;
    }
    for (size_t taken = 0; taken < k; taken++) {
        size_t best = n;
        for (size_t j = 0; j < n; j++) {
            float least = best < n ? h[best] : 0;
            if (f[j] == 0 && h[j] > least) {
                best = j;
            }
        }
        if (best == n) {
            return;                           /* no positive one is left */
        }
        f[best] = h[best];
    }
}

/* centred = x - b_dec; h as above; f = relu(h) or TopK. x, centred: [T, D]; h, f: [T, n] */
static void encode_forward(float *f, float *h, float *centred, const sc_sae *sae, const float *x,
                           size_t T) {
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    for (size_t t = 0; t < T; t++) {
        for (size_t d = 0; d < D; d++) {
            centred[t * D + d] = x[t * D + d] - sae->b_dec[d];
        }
    }
    pre_activation_forward(h, sae, centred, T);
    for (size_t t = 0; t < T; t++) {
        if (sae->topk) topk_forward(f + t * n, h + t * n, n, sae->k);
        else relu_forward(f + t * n, h + t * n, n);
    }
}

/* The gradients of h = W_enc^T (x - b_dec) + b_enc:
 *     dW_enc[j] = sum_t dh[t][j] (x[t] - b_dec)         db_enc[j] = sum_t dh[t][j]
 * centred: [T, D]; dh: [T, n]; dW_enc: [n, stride]; db_enc: [n]; term: [T], room */
static void encode_backward(float *dW_enc, float *db_enc, const sc_sae *sae, const float *centred,
                            const float *dh, double *term, size_t T) {
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    for (size_t j = 0; j < n; j++) {
        const float *dh_j = dh + j;                      /* dh_j[t * n]: on token t */
        float *dW_enc_j = dW_enc + j * sae->stride;
        for (size_t d = 0; d < D; d++) {
            dW_enc_j[d] = chained_sum(dh_j, n, centred + d, D, T);
        }
        for (size_t t = 0; t < T; t++) {
            term[t] = dh_j[t * n];
        }
        db_enc[j] = (float)sum_in_blocks(term, T);
    }
}

/* x' = W_dec^T f + b_dec. f: [T, n]; reconstruction: [T, D] */
static void decode_forward(float *reconstruction, const sc_sae *sae, const float *f, size_t T) {
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    for (size_t t = 0; t < T; t++) {
        const float *f_t = f + t * n;
        for (size_t d = 0; d < D; d++) {
            const float *column = sae->W_dec + d;
            float sum = chained_sum(f_t, 1, column, sae->stride, n);
            reconstruction[t * D + d] = sum + sae->b_dec[d] + 0.0f;
        }
    }
}

/* The gradients of x' = W_dec^T f + b_dec, given that of x':
 *     dW_dec[j] = sum_t f[t][j] dx'[t]                  df[t][j] = W_dec[j] . dx'[t]
 * relu passes df on where f > 0 and stops it elsewhere, and so does TopK, since a latent that was
 * not taken has f = 0: dh = df where f > 0, else 0; only there it is computed.
 * f, dh: [T, n]; dx: [T, D], of x'; dW_dec: [n, stride] */
static void decode_backward(float *dW_dec, float *dh, const sc_sae *sae, const float *f,
                            const float *dx, size_t T) {
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    for (size_t j = 0; j < n; j++) {
        const float *W_dec_j = sae->W_dec + j * sae->stride;
        const float *f_j = f + j;                        /* f_j[t * n]: on token t */
        float *dW_dec_j = dW_dec + j * sae->stride;
        for (size_t d = 0; d < D; d++) {
            dW_dec_j[d] = chained_sum(f_j, n, dx + d, D, T);
        }
        for (size_t t = 0; t < T; t++) {
            dh[t * n + j] = 0;
            if (f_j[t * n] > 0) {
                dh[t * n + j] = sc_dot_plain(W_dec_j, dx + t * D, D);
            }
        }
    }
}

/* b_dec is added to x' and, in h, subtracted from x. The latter's gradient passes through W_enc:
 *     db_dec = sum_t dx'[t] - sum_t W_enc dh[t] = sum_t dx'[t] - W_enc db_enc
 * dx: [T, D], of x'; db_enc: [n]; db_dec: [D]; term: [T], room */
static void b_dec_backward(float *db_dec, const sc_sae *sae, const float *dx, const float *db_enc,
                           double *term, size_t T) {
    size_t D = sae->d_in;
    for (size_t d = 0; d < D; d++) {
        const float *column = sae->W_enc + d;
        float through_h = chained_sum(db_enc, 1, column, sae->stride, sae->d_sae);
        for (size_t t = 0; t < T; t++) {
            term[t] = dx[t * D + d];
        }
        db_dec[d] = (float)sum_in_blocks(term, T) - through_h;
    }
}

/* Refuses rows that hold infinities or NaN, which would spread. rows: [count, width] */
static int check_rows(const float *rows, size_t count, size_t width, const char *name) {
    size_t bad = first_not_finite(rows, count * width);
    if (bad == count * width) return SC_OK;
    return fail("token %zu: %s[%zu] is %g (expected a finite number)", bad / width, name,
                bad % width, (double)rows[bad]);
}

/* TopK needs a k from 1 to n. */
static int check_k(const sc_sae *sae) {
    if (!sae->topk || (sae->k >= 1 && sae->k <= sae->d_sae)) return SC_OK;
    return usage("k is %zu (expected 1 to %zu, the number of latents)", sae->k, sae->d_sae);
}

int sc_sae_encode_plain(const sc_sae *sae, const float *x, size_t tokens, float *f) {
    memory_list memory = NULL;
    float *centred = NULL;
    float *h = NULL;
    const array_spec arrays[] = {
        ARRAY(centred, tokens, sae->d_in),
        ARRAY(h, tokens, sae->d_sae) };
    SC_TRY(check_k(sae));
    SC_TRY(check_rows(x, tokens, sae->d_in, "x"));
    SC_TRY(new_arrays(&memory, arrays, COUNT(arrays)));
    encode_forward(f, h, centred, sae, x, tokens);
    release(&memory);
    return SC_OK;
}

int sc_sae_decode_plain(const sc_sae *sae, const float *f, size_t tokens, float *reconstruction) {
    SC_TRY(check_rows(f, tokens, sae->d_sae, "f"));
    decode_forward(reconstruction, sae, f, tokens);
    return SC_OK;
}

/* How an SAE starts: W_enc uniform in +-sqrt(6 / n) (Kaiming's bound as PyTorch's kaiming_uniform_
 * computes it for a [D, n] matrix), W_dec uniform, then rows of unit norm, b_enc 0; for b_dec see
 * b_dec_start(). Row j of both: */
static void initialise_latent(sc_sae *sae, size_t j, uint64_t seed) {
    float *W_enc = sae->W_enc + j * sae->stride;
    float *W_dec = sae->W_dec + j * sae->stride;
    float bound = sqrtf(6.0f / (float)sae->d_sae);
    for (size_t d = 0; d < sae->d_in; d++) {
        uint64_t index = (uint64_t)j * sae->d_in + d;
        W_enc[d] = bound * uniform(seed, STREAM_W_ENC, index);
        W_dec[d] = uniform(seed, STREAM_W_DEC, index);
    }
    unit_row(W_dec, sae->d_in);
}

/* sum = the sum over points of weight * point, in float64, in blocks of 256 points.
 * points: [count, dim]; weight: [count]; part, sum: [dim] */
static void weighted_sum(double *sum, double *part, const double *weight, const float *points,
                         size_t count, size_t dim) {
    memset(sum, 0, dim * sizeof *sum);
    for (size_t block = 0; block < count; block += CHAIN) {
        memset(part, 0, dim * sizeof *part);
        for (size_t i = block; i < count && i < block + CHAIN; i++) {
            const float *point = points + i * dim;
            for (size_t d = 0; d < dim; d++) {
                part[d] += weight[i] * point[d];
            }
        }
        for (size_t d = 0; d < dim; d++) {
            sum[d] += part[d];
        }
    }
}

/* The distance of a point from the centre, by 16 partial sums in float64. point, centre: [dim] */
static double distance(const float *point, const double *centre, size_t dim) {
    double p[PARTIALS] = { 0 };
    double sum = 0;
    for (size_t d = 0; d < dim; d++) {
        double apart = point[d] - centre[d];
        p[d % PARTIALS] += apart * apart;
    }
    for (int i = 0; i < PARTIALS; i++) {
        sum += p[i];
    }
    return sqrt(sum);
}

/* The geometric median, the point with the least sum of distances to all points, by Weiszfeld's
 * iteration (1937): each step is the mean weighted by 1 / distance, where distances count as at
 * least 1e-6; it begins at the mean. It stops after `steps` steps, or when a step changes no bit;
 * steps = 0 gives the mean. (PatchSAE: compute_geometric_median() of the package geom_median.)
 * points: [count, dim]; weight: [count]; median, before, part: [dim], the last two as room */
static void geometric_median(double *median, double *before, double *part, double *weight,
                             const float *points, size_t count, size_t dim, int steps) {
    for (size_t i = 0; i < count; i++) {
        weight[i] = 1;
    }
    for (int step = 0; step <= steps; step++) {
        double total = sum_in_blocks(weight, count);
        weighted_sum(median, part, weight, points, count, dim);
        for (size_t d = 0; d < dim; d++) {
            median[d] /= total;
        }
        if (step > 0 && memcmp(before, median, dim * sizeof *median) == 0) return;
        memcpy(before, median, dim * sizeof *median);
        for (size_t i = 0; i < count; i++) {
            double apart = distance(points + i * dim, median, dim);
            weight[i] = 1 / (apart > 1e-6 ? apart : 1e-6);
        }
    }
}

/* Where b_dec starts, from the activations x of some images: their mean (steps 0), the geometric
 * median of all tokens, or with images_as_points that of whole images, points with T D numbers,
 * and then the mean of its T tokens (PatchSAE: initialize_b_dec_with_geometric_median).
 * x: [images T, stride]; T: tokens per image */
static int start_b_dec(sc_sae *sae, const float *x, size_t images, size_t T, int images_as_points,
                       int steps) {
    size_t parts = images_as_points ? T : 1;
    size_t count = images * T / parts;
    size_t dim = parts * sae->stride;
    double *median = NULL;
    double *before = NULL;
    double *part = NULL;
    double *weight = NULL;
    memory_list memory = NULL;
    const array_spec arrays[] = {
        ARRAY(median, dim, 1),
        ARRAY(before, dim, 1),
        ARRAY(part, dim, 1),
        ARRAY(weight, count, 1) };
    SC_TRY(new_arrays(&memory, arrays, COUNT(arrays)));
    geometric_median(median, before, part, weight, x, count, dim, steps);
    int status = SC_OK;
    for (size_t d = 0; d < sae->d_in; d++) {
        double sum = 0;
        for (size_t i = 0; i < parts; i++) {
            sum += median[i * sae->stride + d];
        }
        sae->b_dec[d] = (float)(sum / (double)parts);
        if (!isfinite(sae->b_dec[d])) {
            status = fail("the start of b_dec is not finite");
        }
    }
    release(&memory);
    return status;
}

/* ============================================================================================
 * 4. Training
 *
 * One step on T tokens x: rows of W_dec to unit norm; encode and decode; the loss; its gradient,
 * less the part of W_dec's that lies along W_dec; Adam.
 *
 *     loss = mse + l1 + ghost
 *     mse  = mean over t and d of (x'[t][d] - x[t][d])^2 / ||x[t]||      PatchSAE's
 *     l1   = lambda * mean over t of sum_j f[t][j]                       ReLU only; f is never < 0
 *     ghost: see ghost_forward()
 *
 * PatchSAE: src/sae_training/sae_trainer.py, _train_step(), and sparse_autoencoder.py.
 * A gradient has the name of its value with a d before it: dW_dec is d loss / d W_dec.
 * ============================================================================================ */

/* Adam's running means of a weight's gradient and of its square, shaped as the weight. */
typedef struct { float *m, *v; } adam_moments;

struct sc_trainer {
    sc_train_options options;
    sc_sae *sae;                     /* the caller's, trained in place */
    size_t tokens;                   /* T, in each step */
    uint64_t step;                   /* steps done */
    double beta1_power, beta2_power; /* 0.9^step, 0.999^step */
    int64_t *silent;                 /* [n], steps since the latent fired on any token */
    adam_moments W_enc, W_dec, b_enc, b_dec;
    struct fast_trainer *fast;       /* the arrays of Part II */
    memory_list memory;
};

/* The values and gradients of one step. */
typedef struct {
    float *centred;                  /* [T, D], x - b_dec */
    float *h, *f;                    /* [T, n] */
    float *reconstruction;           /* [T, D], x' */
    float *e, *ghost;                /* [T, n], exp(h) of dead latents, else 0; [T, D], W_dec^T e */
    float *dreconstruction, *dghost; /* [T, D] */
    float *dh;                       /* [T, n] */
    float *dW_enc, *dW_dec;          /* [n, stride] */
    float *db_enc, *db_dec;          /* [n], [D] */
    double *norm, *error;            /* [T], ||x|| and ||x' - x||^2 */
    double *term;                    /* [max(T, D)], the terms of a sum */
    memory_list memory;
} step_arrays;

static int new_step_arrays(step_arrays *s, const sc_sae *sae, size_t T) {
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    size_t row = sae->stride;
    const array_spec arrays[] = {
        ARRAY(s->centred, T, D),
        ARRAY(s->h, T, n),
        ARRAY(s->f, T, n),
        ARRAY(s->reconstruction, T, D),
        ARRAY(s->e, T, n),
        ARRAY(s->ghost, T, D),
        ARRAY(s->dreconstruction, T, D),
        ARRAY(s->dghost, T, D),
        ARRAY(s->dh, T, n),
        ARRAY(s->dW_enc, n, row),
        ARRAY(s->dW_dec, n, row),
        ARRAY(s->db_enc, n, 1),
        ARRAY(s->db_dec, D, 1),
        ARRAY(s->norm, T, 1),
        ARRAY(s->error, T, 1),
        ARRAY(s->term, T > D ? T : D, 1) };
    s->memory = NULL;
    return new_arrays(&s->memory, arrays, COUNT(arrays));
}

/* A latent is dead, to training, if it has been silent for more than dead_window steps. */
static int is_dead(const sc_trainer *t, size_t j) {
    return t->silent[j] > (int64_t)t->options.dead_window;
}

/* norm = ||x|| and error = ||x' - x||^2 of each token. x, reconstruction: [T, D]; norm, error: [T];
 * apart: [D], room */
static void token_errors(double *norm, double *error, float *apart, const float *x,
                         const float *reconstruction, size_t T, size_t D) {
    for (size_t t = 0; t < T; t++, x += D, reconstruction += D) {
        for (size_t d = 0; d < D; d++) {
            apart[d] = reconstruction[d] - x[d];
        }
        norm[t] = sqrtf(sc_dot_plain(x, x, D));
        error[t] = sc_dot_plain(apart, apart, D);
    }
}

/* The mean over tokens and dimensions of (x' - x)^2 / ||x||. term: [T], room */
static double mse_forward(double *term, const double *norm, const double *error, size_t T,
                          size_t D) {
    for (size_t t = 0; t < T; t++) {
        term[t] = error[t] / norm[t];
    }
    return sum_in_blocks(term, T) / ((double)T * (double)D);
}

/* d mse / d x' = 2 (x' - x) / (||x|| T D); ||x|| does not depend on the weights. x: [T, D] */
static void mse_backward(step_arrays *s, const float *x, size_t T, size_t D) {
    double scale = 1.0 / ((double)T * (double)D);
    for (size_t t = 0; t < T; t++) {
        float factor = (float)(2 * scale / s->norm[t]);
        for (size_t d = 0; d < D; d++) {
            size_t i = t * D + d;
            float apart = s->reconstruction[i] - x[i];
            s->dreconstruction[i] = apart * factor;
        }
    }
}

/* L1, the sum over tokens of sum_j f[t][j]; or, with `count`, the number of active latents instead,
 * which divided by T is L0. f: [T, n]; term: [T], room */
static double activity_sum(double *term, const float *f, size_t T, size_t n, int count) {
    for (size_t t = 0; t < T; t++) {
        term[t] = 0;
        for (size_t j = 0; j < n; j++) {
            float value = f[t * n + j];
            if (value > 0) {
                term[t] += count ? 1 : (double)value;
            }
        }
    }
    return sum_in_blocks(term, T);
}

/* l1 = lambda * mean over tokens of sum_j f[t][j] has the gradient lambda / T with respect to each
 * f that is active. Added to dh, see decode_backward(). f, dh: [count] */
static void l1_backward(float *dh, const float *f, size_t count, double lambda, size_t T) {
    float df = (float)(lambda / (double)T);
    for (size_t i = 0; i < count; i++) {
        if (f[i] > 0) {
            dh[i] += df;
        }
    }
}

/* 1 - sum ||x' - x||^2 / sum ||x - mean||^2: the share of the variance of these T tokens that the
 * reconstruction explains. With `centred` 0 the mean is not subtracted: PatchSAE logs that one,
 * which is closer to 1. */
static double explained_variance(step_arrays *s, const float *x, size_t T, size_t D, int centred) {
    double deviation = 0;
    double part = 0;
    double *term = s->term;
    for (size_t d = 0; d < D; d++) {
        double mean = 0;
        for (size_t t = 0; t < T; t++) {
            term[t] = x[t * D + d];
        }
        if (centred) {
            mean = sum_in_blocks(term, T) / (double)T;
        }
        for (size_t t = 0; t < T; t++) {
            term[t] = (term[t] - mean) * (term[t] - mean);
        }
        part += sum_in_blocks(term, T);
        if ((d + 1) % CHAIN != 0 && d + 1 < D) continue;
        deviation += part;                               /* dimensions in blocks of 256, too */
        part = 0;
    }
    return deviation > 0 ? 1 - sum_in_blocks(s->error, T) / deviation : 0;
}

/* Ghost gradients revive dead latents (Jermyn and Templeton, "Ghost grads", 2024; PatchSAE): a dead
 * latent has f = 0 and gets no gradient, so exp(h), which is never 0, stands in for its activation,
 * and learns to rebuild what the living latents leave over, r = x - x':
 *
 *     e = exp(h) of dead latents, 0 of others            g = W_dec^T e
 *     g <- g * ||r|| / (1e-6 + 2 ||g||)                   half as long as r
 *     m  = (g - r)^2 / ||r||                              elementwise; 0 where ||r|| = 0
 *     m <- m * ((x' - x)^2 / ||x||) / (m + 1e-6)          about as large as the mse
 *     ghost = mean of m over tokens and dimensions
 *
 * Both factors, and r, count as constants: no gradient passes through them.
 * Here e: [T, n], which is 0 so far, and ghost: [T, D], g before it is scaled. */
static void ghost_forward(step_arrays *s, const sc_trainer *t) {
    size_t T = t->tokens;
    size_t D = t->sae->d_in;
    size_t n = t->sae->d_sae;
    for (size_t i = 0; i < T * n; i++) {
        if (is_dead(t, i % n)) {
            s->e[i] = exp32(s->h[i]);
        }
    }
    for (size_t i = 0; i < T; i++) {
        const float *e = s->e + i * n;
        for (size_t d = 0; d < D; d++) {
            const float *column = t->sae->W_dec + d;
            float g = chained_sum(e, 1, column, t->sae->stride, n);
            s->ghost[i * D + d] = g + 0.0f;
        }
    }
}

/* One token's sum of m over dimensions, and d ghost / d g:  with a = ||r|| / (1e-6 + 2 ||g||) and
 * b = ((x' - x)^2 / ||x||) / (m + 1e-6) constant, m = b (a g - r)^2 / ||r||, so
 * dm / dg = 2 b a (a g - r) / ||r||, divided by T D for the mean: `scale`.
 * x, reconstruction, ghost, dghost: [D], dghost may be ghost; r: [D], room */
static double ghost_token(float *dghost, const float *ghost, const float *x,
                          const float *reconstruction, float *r, double norm, size_t D,
                          double scale) {
    double loss = 0;
    for (size_t d = 0; d < D; d++) {
        r[d] = x[d] - reconstruction[d];
    }
    float norm_x = (float)norm;
    float norm_r = sqrtf(sc_dot_plain(r, r, D));
    float norm_g = sqrtf(sc_dot_plain(ghost, ghost, D));
    float a = norm_r / (1e-6f + 2 * norm_g);
    for (size_t d = 0; d < D; d++) {
        float apart = ghost[d] * a - r[d];
        if (norm_r == 0) {
            dghost[d] = 0;
            continue;
        }
        float m = apart * apart / norm_r;
        float b = r[d] * r[d] / norm_x / (m + 1e-6f);
        loss += (double)(m * b);
        dghost[d] = 2 * apart / norm_r * b * a * (float)scale;
    }
    return loss;
}

/* Through g = W_dec^T e and e = exp(h) of dead latents j: e is its own derivative, so
 *     dW_dec[j] += sum_t e[t][j] dg[t]         dh[t][j] += e[t][j] (W_dec[j] . dg[t]) */
static void ghost_backward(step_arrays *s, const sc_trainer *t) {
    const sc_sae *sae = t->sae;
    size_t T = t->tokens;
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    for (size_t j = 0; j < n; j++) {
        if (!is_dead(t, j)) continue;
        const float *e = s->e + j;                       /* e[i * n]: on token i */
        const float *W_dec = sae->W_dec + j * sae->stride;
        float *dW_dec = s->dW_dec + j * sae->stride;
        float *dh = s->dh + j;
        for (size_t i = 0; i < T; i++) {
            float de = sc_dot_plain(W_dec, s->dghost + i * D, D);
            dh[i * n] += e[i * n] * de;
        }
        for (size_t d = 0; d < D; d++) {
            dW_dec[d] += chained_sum(e, n, s->dghost + d, D, T);
        }
    }
}

/* Rows of W_dec have unit norm when a step begins, since otherwise f could shrink, and l1 with it,
 * while W_dec grows (PatchSAE: set_decoder_norm_to_unit_norm). The gradient's component along a row
 * would only change its norm, which the next step undoes; it is removed, so that it does not fill
 * Adam's moments either: dW_dec[j] -= (dW_dec[j] . W_dec[j]) W_dec[j]
 * (PatchSAE: remove_gradient_parallel_to_decoder_directions). */
static void project_gradient(float *dW_dec, const float *W_dec, size_t D) {
    float along = sc_dot_plain(dW_dec, W_dec, D);
    for (size_t d = 0; d < D; d++) {
        dW_dec[d] = fma32(-along, W_dec[d], dW_dec[d]);
    }
}

/* The learning rate of a step, from 0: it rises linearly over `warmup` steps, 0 for none. */
static double learning_rate(const sc_train_options *options, uint64_t step) {
    double warm = 1;
    if (options->warmup > 0) {
        warm = (double)(step + 1) / (double)options->warmup;
    }
    return warm < 1 ? options->lr * warm : options->lr;
}

/* Adam's two scalars of a step (Kingma and Ba, "Adam", 2015, algorithm 1 with beta1 0.9, beta2
 * 0.999, epsilon 1e-8): step_size = lr / (1 - beta1^t), root_scale = 1 / sqrt(1 - beta2^t). */
typedef struct { float step_size, root_scale; } adam_step;

static adam_step next_adam_step(sc_trainer *t, double lr) {
    t->beta1_power *= 0.9;
    t->beta2_power *= 0.999;
    return (adam_step){ (float)(lr / (1 - t->beta1_power)),
                        (float)(1 / sqrt(1 - t->beta2_power)) };
}

/* m = 0.9 m + 0.1 g;  v = 0.999 v + 0.001 g^2;  w -= step_size m / (sqrt(v) root_scale + 1e-8).
 * w, dw and the moments: [count] */
static void adam_update(float *w, adam_moments a, const float *dw, size_t count, adam_step step) {
    for (size_t i = 0; i < count; i++) {
        a.m[i] = 0.9f * a.m[i] + 0.1f * dw[i];
        a.v[i] = 0.999f * a.v[i] + 0.001f * (dw[i] * dw[i]);
        w[i] -= step.step_size * (a.m[i] / (sqrtf(a.v[i]) * step.root_scale + 1e-8f));
    }
}

/* The ghost loss, and dghost. x: [T, D] */
static double ghost_loss_forward(step_arrays *s, const sc_trainer *t, const float *x) {
    size_t T = t->tokens;
    size_t D = t->sae->d_in;
    double scale = 1.0 / ((double)T * (double)D);
    float *residual = s->db_dec;                         /* as room for one token */
    ghost_forward(s, t);
    for (size_t i = 0; i < T; i++) {
        const float *x_i = x + i * D;
        const float *to = s->reconstruction + i * D;
        const float *g = s->ghost + i * D;
        float *dg = s->dghost + i * D;
        s->term[i] = ghost_token(dg, g, x_i, to, residual, s->norm[i], D, scale);
    }
    return sum_in_blocks(s->term, T) / ((double)T * (double)D);
}

/* The losses, and the gradients of x' and g. x: [T, D] */
static int losses(sc_step *result, step_arrays *s, const sc_trainer *t, const float *x) {
    size_t T = t->tokens;
    size_t D = t->sae->d_in;
    size_t n = t->sae->d_sae;
    token_errors(s->norm, s->error, s->db_dec, x, s->reconstruction, T, D);
    result->mse = mse_forward(s->term, s->norm, s->error, T, D);
    mse_backward(s, x, T, D);
    result->l0 = activity_sum(s->term, s->f, T, n, 1) / (double)T;
    if (!t->sae->topk) {
        double l1 = activity_sum(s->term, s->f, T, n, 0) / (double)T;
        result->l1 = t->options.l1 * l1;
    }
    if (t->options.ghost && result->dead > 0) {
        result->ghost = ghost_loss_forward(s, t, x);
    }
    result->explained_variance = explained_variance(s, x, T, D, 1);
    result->explained_variance_uncentred = explained_variance(s, x, T, D, 0);
    result->loss = result->mse + result->l1 + result->ghost;
    if (isfinite(result->loss)) return SC_OK;
    return fail("the loss is not finite");
}

/* The gradients of all weights, from those of x' and g. */
static void gradients(step_arrays *s, const sc_trainer *t, int ghosts) {
    const sc_sae *sae = t->sae;
    size_t T = t->tokens;
    decode_backward(s->dW_dec, s->dh, sae, s->f, s->dreconstruction, T);
    if (!sae->topk) {
        l1_backward(s->dh, s->f, T * sae->d_sae, t->options.l1, T);
    }
    if (ghosts) {
        ghost_backward(s, t);
    }
    encode_backward(s->dW_enc, s->db_enc, sae, s->centred, s->dh, s->term, T);
    b_dec_backward(s->db_dec, sae, s->dreconstruction, s->db_enc, s->term, T);
    for (size_t j = 0; j < sae->d_sae; j++) {
        size_t row = j * sae->stride;
        project_gradient(s->dW_dec + row, sae->W_dec + row, sae->d_in);
    }
}

/* Counts for each latent the steps since it fired. */
static void count_silent_steps(sc_trainer *t, const float *f) {
    size_t n = t->sae->d_sae;
    for (size_t j = 0; j < n; j++) {
        t->silent[j]++;
        for (size_t i = 0; i < t->tokens; i++) {
            if (f[i * n + j] > 0) {
                t->silent[j] = 0;
            }
        }
    }
}

/* Training divides by ||x||, so a token of zeros is refused. x: [T, D] */
static int check_tokens(const float *x, size_t T, size_t D) {
    SC_TRY(check_rows(x, T, D, "x"));
    for (size_t t = 0; t < T; t++) {
        float norm = sqrtf(sc_dot_plain(x + t * D, x + t * D, D));
        if (!(norm > 0)) return fail("token %zu: ||x|| is 0 (expected a direction)", t);
        if (!isfinite(norm)) return fail("token %zu: ||x|| is too large for float32", t);
    }
    return SC_OK;
}

/* Refuses to go on with a latent whose weights or moments are no longer finite. */
static int check_latent(const sc_trainer *t, size_t j) {
    size_t row = j * t->sae->stride;
    size_t D = t->sae->d_in;
    const float *made[] = { t->sae->W_enc, t->sae->W_dec, t->W_enc.v, t->W_dec.v };
    for (size_t i = 0; i < COUNT(made); i++) {
        if (first_not_finite(made[i] + row, D) < D)
            return fail("latent %zu: a weight or moment is not finite", j);
    }
    return SC_OK;
}

static int check_biases(const sc_trainer *t) {
    size_t n = t->sae->d_sae;
    size_t D = t->sae->d_in;
    if (first_not_finite(t->sae->b_enc, n) < n) return fail("b_enc is not finite");
    if (first_not_finite(t->sae->b_dec, D) < D) return fail("b_dec is not finite");
    return SC_OK;
}

/* Adam on all weights. s: their gradients */
static int update_weights(sc_trainer *t, const step_arrays *s, adam_step step) {
    sc_sae *sae = t->sae;
    size_t n = sae->d_sae;
    adam_update(sae->W_enc, t->W_enc, s->dW_enc, n * sae->stride, step);
    adam_update(sae->W_dec, t->W_dec, s->dW_dec, n * sae->stride, step);
    adam_update(sae->b_enc, t->b_enc, s->db_enc, n, step);
    adam_update(sae->b_dec, t->b_dec, s->db_dec, sae->d_in, step);
    for (size_t j = 0; j < n; j++) {
        SC_TRY(check_latent(t, j));
    }
    return check_biases(t);
}

/* One training step. x: [T, D] */
int sc_train_step_plain(sc_trainer *t, const float *x, sc_step *result) {
    sc_sae *sae = t->sae;
    size_t T = t->tokens;
    step_arrays s;
    SC_TRY(check_tokens(x, T, sae->d_in));
    SC_TRY(new_step_arrays(&s, sae, T));
    *result = (sc_step){ .lr = learning_rate(&t->options, t->step) };
    for (size_t j = 0; j < sae->d_sae; j++) {
        result->dead += (size_t)is_dead(t, j);
        unit_row(sae->W_dec + j * sae->stride, sae->d_in);
    }

    encode_forward(s.f, s.h, s.centred, sae, x, T);
    decode_forward(s.reconstruction, sae, s.f, T);
    int status = losses(result, &s, t, x);
    if (status == SC_OK) {
        gradients(&s, t, t->options.ghost && result->dead > 0);
        count_silent_steps(t, s.f);
        status = update_weights(t, &s, next_adam_step(t, result->lr));
        t->step++;
    }
    release(&s.memory);
    return status;
}

/* ============================================================================================
 * 5. Measuring
 *
 * What each latent does over a data set of N images with T tokens each, from f: [N, T, n], and how
 * well the SAE rebuilds the activations. a(i) below is a latent's mean activation over all tokens
 * of image i; it fires on the image where a(i) > 0.
 * PatchSAE: tasks/compute_sae_feature_data.py and tasks/compute_class_wise_sae_activation.py.
 * ============================================================================================ */

static const sc_top nothing = { 0, -1, -1 };

/* Whether an entry comes before another: the larger value first, of equal ones the lower index. */
static int goes_before(const sc_top *a, const sc_top *b) {
    if (a->value != b->value) return a->value > b->value;
    if (a->image != b->image) return a->image < b->image;
    return a->other < b->other;
}

/* Puts an entry into a list of the largest, which keeps that order. list: [size] */
static void keep_largest(sc_top *list, size_t size, sc_top entry) {
    size_t i = size;
    while (i > 0 && goes_before(&entry, &list[i - 1])) {
        i--;
    }
    if (i == size) return;
    memmove(list + i + 1, list + i, (size - i - 1) * sizeof *list);
    list[i] = entry;
}

/* The activation of all top images that are of entry i's class, or 0 where an earlier entry is of
 * that class: so that each class counts once. top: [active] */
static double class_activation(const sc_top *top, size_t active, size_t i) {
    double sum = 0;
    for (size_t k = 0; k < active; k++) {
        if (top[k].other != top[i].other) continue;
        if (k < i) return 0;
        sum += top[k].value;
    }
    return sum;
}

/* How many classes a latent's top images mix: -sum_c p_c ln p_c, with p_c the share of class c in
 * their activation; 0 means one class, ln 16 = 2.77 sixteen. Not defined (-1) where fewer than
 * min(10, K) images are active, or one of them has no label. PatchSAE also counts the entries that
 * are not active, and adds 1e-9 within the logarithm. top: [K]; other: the label */
static double top_entropy(const sc_top *top, size_t K) {
    size_t active = 0;
    size_t needed = K < 10 ? K : 10;
    double total = 0;
    double entropy = 0;
    while (active < K && top[active].value > 0) {
        total += top[active++].value;
    }
    if (active < needed) return -1;
    for (size_t i = 0; i < active; i++) {
        double share = class_activation(top, active, i) / total;
        if (top[i].other < 0) return -1;
        if (share > 0) {
            entropy -= share * log64(share);
        }
    }
    return entropy > 0 ? entropy : 0;
}

/* Everything about latent j. f: [N, T, n]; label: [N], -1 for none, or NULL; tokens from
 * first_patch on are patches (1 where token 0 is the class token). top: [K], the images with the largest a(i);
 * patch: [P], the patch tokens with the largest f, other: the token. Both in descending order,
 * entries that no image fills are (0, -1, -1). */
void sc_latent_measure_plain(sc_latent *l, sc_top *top, size_t K, sc_top *patch, size_t P,
                             const float *f, const int64_t *label, size_t N, size_t T, size_t n,
                             size_t j, size_t first_patch) {
    exact_sum means = { 0, 0 }, activations = { 0, 0 };
    *l = (sc_latent){ .image_count = 0 };
    for (size_t k = 0; k < K; k++) {
        top[k] = nothing;
    }
    for (size_t p = 0; p < P; p++) {
        patch[p] = nothing;
    }
    for (size_t i = 0; i < N; i++) {
        double sum = 0;
        for (size_t t = 0; t < T; t++) {
            float value = f[(i * T + t) * n + j];
            if (!(value > 0)) continue;
            sum += value;
            l->token_count++;
            exact_add_float(&activations, value);
            if (t >= first_patch) {
                keep_largest(patch, P, (sc_top){ value, (int64_t)i, (int64_t)t });
            }
        }
        float mean = (float)(sum / (double)T);
        if (!(mean > 0)) continue;
        l->image_count++;
        exact_add_float(&means, mean);
        keep_largest(top, K, (sc_top){ mean, (int64_t)i, label ? label[i] : -1 });
    }
    l->activation_sum = exact_value(activations);
    l->sparsity = (float)((double)l->image_count / (double)N);
    if (l->image_count > 0) {
        l->mean_act = (float)(exact_value(means) / (double)l->image_count);
    }
    l->top_entropy = (float)top_entropy(top, K);
}

/* How well an SAE rebuilds the tokens of a data set, and how sparsely. The variance is that about
 * the mean token of the whole set: sum over d of (sum_t x^2 - tokens mean^2).
 * x, reconstruction: [tokens, D]; f: [tokens, n] */
int sc_metrics_plain(sc_metrics *m, const float *x, const float *reconstruction, const float *f,
                     size_t tokens, size_t D, size_t n) {
    double numbers = (double)tokens * (double)D;
    double square = 0;
    double mean_square = 0;
    memory_list memory = NULL;
    double *norm = NULL;
    double *error = NULL;
    double *term = NULL;
    float *apart = NULL;
    const array_spec arrays[] = { ARRAY(norm, tokens, 1), ARRAY(error, tokens, 1),
                                  ARRAY(term, tokens, 1),
                                  ARRAY(apart, D, 1) };
    SC_TRY(new_arrays(&memory, arrays, COUNT(arrays)));
    token_errors(norm, error, apart, x, reconstruction, tokens, D);
    double squared_error = sum_in_blocks(error, tokens);
    m->mse = mse_forward(term, norm, error, tokens, D);
    m->mse_raw = squared_error / numbers;
    for (size_t d = 0; d < D; d++) {
        for (size_t t = 0; t < tokens; t++) {
            term[t] = x[t * D + d];
        }
        double mean = sum_in_blocks(term, tokens) / (double)tokens;
        for (size_t t = 0; t < tokens; t++) {
            term[t] *= term[t];
        }
        square += sum_in_blocks(term, tokens);
        mean_square += mean * mean;
    }
    double variance = square - (double)tokens * mean_square;
    m->explained_variance = variance > 0 ? 1 - squared_error / variance : 0;
    m->explained_variance_uncentred = 1 - squared_error / square;
    double active = activity_sum(term, f, tokens, n, 1);
    double sum = activity_sum(term, f, tokens, n, 0);
    m->l0 = active / (double)tokens;
    m->l1 = sum / (double)tokens;
    m->mean_activation = active > 0 ? sum / active : 0;
    release(&memory);
    return SC_OK;
}

/* ********************************************************************************************
 * Part II: the same, fast
 *
 * Threads, kernels for each instruction set, tiles and sparse codes. Same bits as Part I.
 * ******************************************************************************************** */

/* ============================================================================================
 * 6. Errors and memory
 *
 * A function that can fail returns SC_OK, SC_FAILED or SC_USAGE (which are also the program's exit
 * statuses) and leaves one line of reason in a buffer of its thread; only main() prints it.
 * ============================================================================================ */

static _Thread_local char error_text[1024];

const char *sc_error(void) { return error_text; }

/* A line with a long path in it loses its middle. */
SC_PRINTF(2, 3) static int set_error(int status, const char *format, ...) {
    enum { HALF = sizeof error_text / 2 - 2 };
    char line[16 * sizeof error_text];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    size_t length = strlen(line);
    if (length < sizeof error_text) memcpy(error_text, line, length + 1);
    else sprintf(error_text, "%.*s...%s", HALF, line, line + length - HALF);
    return status;
}

/* The input or the machine failed: "FILE: what is wrong and what was expected"; or the caller asked
 * for something that makes no sense. */

/* count x size bytes on a cache line's boundary; NULL and a reason where that fails. Not zeroed, so
 * what is never written costs nothing where memory comes as it is first written. Never asks for 0
 * bytes, so NULL always means failure. Freed with free(). */
static void *reserve_array(size_t count, size_t size) {
    void *memory = NULL;
    if ((size && count > (SIZE_MAX - 64) / size)
        || posix_memalign(&memory, 64, count && size ? count * size : 1) != 0) {
        fail("out of memory: %zu x %zu bytes are not to be had", count, size);
        return NULL;
    }
    return memory;
}

/* The same, zeroed. */
static void *new_array(size_t count, size_t size) {
    void *memory = reserve_array(count, size);
    return memory ? memset(memory, 0, count * size) : NULL;
}

/* NULL and a reason where there is no memory. */
static char *join_text(const char *head, const char *tail) {
    char *joined = new_array(strlen(head) + strlen(tail) + 1, 1);
    return joined ? strcat(strcpy(joined, head), tail) : NULL;
}

static char *copy_string(const char *text) { return join_text(text, ""); }

/* Makes room for one more element in a list that doubles; list points to the list's pointer. */
static int grow(void *list, size_t *capacity, size_t count, size_t size) {
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

/* A table of arrays: where a pointer goes, and rows x the bytes of a row. */


/* Lays arrays out in a block, each on a cache line's boundary behind a first line for the block's
 * owner, or only measures them where `block` is NULL. Returns the bytes they take, SIZE_MAX if so
 * many cannot be addressed. */
static size_t lay_out(const array_spec *array, size_t count, void *block) {
    size_t used = 64;
    for (size_t i = 0; i < count; i++) {
        void *place = block ? (unsigned char *)block + used : NULL;
        memcpy(array[i].pointer, &place, sizeof place);
        if (array[i].row_bytes && array[i].rows > (SIZE_MAX - 63 - used) / array[i].row_bytes)
            return SIZE_MAX;
        used += (array[i].rows * array[i].row_bytes + 63) / 64 * 64;
    }
    return used;
}

/* The blocks that something owns, to be freed together: each begins with a pointer to the one
 * before. Starts as NULL. */
static int new_arrays(memory_list *list, const array_spec *array, size_t count) {
    void *block = new_array(lay_out(array, count, NULL), 1);
    if (!block) return SC_FAILED;
    lay_out(array, count, block);
    memcpy(block, list, sizeof *list);
    *list = block;
    return SC_OK;
}

/* *pointer (the address of a typed pointer) becomes a new array on the list. */
static int allocate(memory_list *list, void *pointer, size_t count, size_t size) {
    return new_arrays(list, &(array_spec){ pointer, count, size }, 1);
}

static void release(memory_list *list) {
    for (void *block = *list; block; block = *list) {
        memcpy(list, block, sizeof *list);
        free(block);
    }
}

static uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The index of the first value that is not finite, or count if there is none. */
static size_t first_not_finite(const float *values, size_t count) {
    size_t i = 0;
    for (uint32_t most = 0; i + 64 <= count; i += 64) {      /* 64 at a time can be vectors */
        for (size_t k = i; k < i + 64; k++)
            most |= (bits_of_float(values[k]) & 0x7f800000) + 0x800000;
        if (most >> 31) break;
    }
    while (i < count && isfinite(values[i])) i++;
    return i;
}

/* ============================================================================================
 * 7. Threads
 *
 * parallel_for(tasks, work, context) runs work(context, task) once for every task; tasks are handed
 * out in ascending order, so which thread gets which is chance, and no result may depend on it: a
 * task writes only what is its own, and the scratch memory of its `worker`.
 * If tasks fail, the one of lowest number is reported: all below it had been started, so that one
 * is always the same.
 * ============================================================================================ */

typedef int task_function(void *context, size_t task);

static _Thread_local size_t worker;  /* this thread's number, 0 .. thread_count() - 1 */

static struct {
    int workers;                     /* the caller counts as worker 0 */
    pthread_t thread[SC_MAX_THREADS];/* of workers 1 .. workers - 1 */
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    task_function *work;
    void *context;
    size_t tasks, round;             /* round: how many parallel_for calls there were, or STOP */
    int busy;                        /* threads that have not finished this round */
    atomic_size_t next;              /* the next task to hand out */
    size_t failed_task;
    int status;                      /* of failed_task, if any failed */
    char reason[sizeof error_text];
} pool = { .workers = 1, .lock = PTHREAD_MUTEX_INITIALIZER,
           .start = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER };

#define STOP SIZE_MAX                /* the round in which threads end */

static int thread_count(void) { return pool.workers; }

static void run_tasks(void) {
    for (size_t task; (task = atomic_fetch_add(&pool.next, 1)) < pool.tasks;) {
        int status = pool.work(pool.context, task);
        if (status == SC_OK) continue;
        pthread_mutex_lock(&pool.lock);
        if (pool.status == SC_OK || task < pool.failed_task) {
            pool.failed_task = task;
            pool.status = status;
            memcpy(pool.reason, error_text, sizeof error_text);
        }
        pthread_mutex_unlock(&pool.lock);
        atomic_store(&pool.next, pool.tasks);
    }
}

static void *worker_main(void *argument) {
    size_t seen = 0;
    worker = (size_t)(intptr_t)argument;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.round == seen) pthread_cond_wait(&pool.start, &pool.lock);
        seen = pool.round;
        pthread_mutex_unlock(&pool.lock);
        if (seen == STOP) return NULL;
        run_tasks();
        pthread_mutex_lock(&pool.lock);
        if (--pool.busy == 0) pthread_cond_signal(&pool.done);
    }
}

static int parallel_for(size_t tasks, task_function *work, void *context) {
    pthread_mutex_lock(&pool.lock);
    pool.work = work;
    pool.context = context;
    pool.tasks = tasks;
    pool.status = SC_OK;
    atomic_store(&pool.next, 0);
    pool.busy = tasks > 1 ? pool.workers - 1 : 0;
    if (pool.busy > 0) {
        pool.round++;
        pthread_cond_broadcast(&pool.start);
    }
    pthread_mutex_unlock(&pool.lock);
    run_tasks();
    pthread_mutex_lock(&pool.lock);
    while (pool.busy > 0) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    if (pool.status != SC_OK) memcpy(error_text, pool.reason, sizeof error_text);
    return pool.status;
}

void sc_threads_stop(void) {
    pthread_mutex_lock(&pool.lock);
    pool.round = STOP;
    pthread_cond_broadcast(&pool.start);
    pthread_mutex_unlock(&pool.lock);
    for (; pool.workers > 1; pool.workers--) pthread_join(pool.thread[pool.workers - 1], NULL);
    pool.round = 0;
}

/* --- Signals that end us. What must end with us is found here; only the first thread takes them,
 * and not while something is begun that is not found here yet --- */

static const int end_signals[] = { SIGHUP, SIGINT, SIGTERM };
static _Atomic(const char *) unfinished[2];      /* outputs' temporary names */
static _Atomic(pid_t) children[SC_MAX_THREADS];  /* each thread's decoder, which leads a group */
static atomic_int may_stop, stop_signal;         /* training: is asked to stop, once; by which */

/* Holds these signals back; returns the mask to set again. */
static sigset_t hold_signals(void) {
    sigset_t held, before;
    sigemptyset(&held);
    for (size_t i = 0; i < COUNT(end_signals); i++) sigaddset(&held, end_signals[i]);
    pthread_sigmask(SIG_BLOCK, &held, &before);
    return before;
}

static void take_signals(sigset_t mask) { pthread_sigmask(SIG_SETMASK, &mask, NULL); }

int sc_threads_start(int threads) {
    int error = 0;
    sc_threads_stop();
    if (threads <= 0) threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (threads > SC_MAX_THREADS) threads = SC_MAX_THREADS;
    sigset_t mask = hold_signals();              /* which threads inherit */
    for (int i = 1; i < threads && !error; i++) {
        error = pthread_create(&pool.thread[i], NULL, worker_main, (void *)(intptr_t)i);
        pool.workers = i + !error;
    }
    take_signals(mask);
    if (!error) return SC_OK;
    int started = pool.workers;
    sc_threads_stop();
    return fail("thread %d of %d cannot be started: %s", started + 1, threads, strerror(error));
}

/* ============================================================================================
 * 8. Kernels, one set for each instruction set
 *
 * The inner loops, written once over a vector type and compiled once for each instruction set: this
 * file includes itself below with SC_ISA defined, and then only this section is read. Vector lanes
 * run over the columns of a product or over the 16 partial sums, never along a chain, so the lane
 * count changes no bit. Loops without explicit vectors are left to the compiler: they hold only
 * operations that IEEE rounds the same way in every lane.
 * ============================================================================================ */

enum {
    CHAIN_STRIDE = CHAIN + 16,       /* from row to row of a block of A, off the cache's period */
    MAX_ROWS = 14, MAX_COLUMNS = 32, /* the largest tile of a product */
    TILES_AT_ONCE = 8,               /* that take turns with a block of B, in the nearest cache */
    SHARES = 16,                     /* of a product, for each thread */
    MASK_BITS = 64
};

/* Where rows of a product go, and what is added on the way. Pointers at the rows' corner. */
typedef struct {
    float *c;                        /* [rows, columns], c_stride floats from row to row */
    size_t c_stride;
    const float *bias;               /* [columns], or NULL */
    const float *row_bias;           /* of each row of A, or NULL */
    const float *residual;           /* [rows, columns] at residual_stride, or NULL; may be c */
    size_t residual_stride;
    activation_kind activation;
} tile_target;

typedef struct {
    const char *name;
    int rows, columns;               /* of a product's tile */
    void (*tile)(size_t rows, size_t terms, const float *a, const float *b, float *sum, int add);
    void (*finish)(const float *tile, size_t rows, size_t columns, const tile_target *to);
    float (*dot)(const float *a, const float *b, size_t n);
    void (*dots)(const float *a, size_t n, const float *rows, size_t stride, const uint32_t *index,
                 size_t count, float *out);
    void (*dot_table)(const float *a, size_t count, const float *b, size_t columns, size_t n,
                      float *out, size_t out_stride);
    void (*add_scaled)(float factor, const float *x, float *sum, size_t n);
    void (*add_chain)(const float *factor, const uint32_t *index, size_t count, const float *rows,
                      float *sum, size_t n);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float epsilon,
                       float *out, size_t n);
    void (*softmax)(float *row, size_t n, float scale);
    void (*exponentials)(float *row, size_t n);
    int (*find_above)(const float *row, const float *limit, size_t n, uint64_t *mask);
    void (*unit_row)(float *row, size_t n);
    void (*adam)(float *w, float *m, float *v, const float *gradient, size_t n, adam_step step);
    int (*contracts)(void);
} kernel_set;

#endif /* !SC_ISA */

#ifdef SC_ISA

/* One chain of each element of a tile, stored in sum or added to it. a: [rows][CHAIN_STRIDE];
 * b: [terms][COLUMNS]; sum: [rows][COLUMNS] */
SC_TARGET static SC_INLINE void KERNEL(chains)(int rows, size_t terms, const float *a,
                                               const float *b, float *sum, int add) {
    SC_V chain[SC_TILE_ROWS][SC_VECTORS];
    SC_UNROLL for (int r = 0; r < rows; r++)
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++) chain[r][v] = SC_SET(0.0f);
    SC_UNROLL_SOME for (size_t k = 0; k < terms; k++, b += SC_COLUMNS) {
        SC_V column[SC_VECTORS];
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++) column[v] = SC_LOAD(b + v * SC_LANES);
        SC_UNROLL for (int r = 0; r < rows; r++) {
            SC_V factor = SC_SET(a[r * CHAIN_STRIDE + k]);
            SC_UNROLL for (int v = 0; v < SC_VECTORS; v++)
                chain[r][v] = SC_FMA(factor, column[v], chain[r][v]);
        }
    }
    SC_UNROLL for (int r = 0; r < rows; r++)
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++) {
            float *out = sum + r * SC_COLUMNS + v * SC_LANES;
            SC_STORE(out, add ? SC_ADD(SC_LOAD(out), chain[r][v]) : chain[r][v]);
        }
}

/* The last rows of a matrix may need half a tile only. */
SC_TARGET static void KERNEL(tile)(size_t rows, size_t terms, const float *a, const float *b,
                                   float *sum, int add) {
    if (rows > SC_TILE_ROWS / 2) KERNEL(chains)(SC_TILE_ROWS, terms, a, b, sum, add);
    else KERNEL(chains)(SC_TILE_ROWS / 2, terms, a, b, sum, add);
}

/* A row of a whole tile: c = sum + row_bias + bias + residual + 0; the latter two may be NULL. */
SC_TARGET static SC_INLINE void KERNEL(add_row)(const float *sum, float row_bias, const float *bias,
                                                const float *residual, float *c) {
    SC_UNROLL for (int v = 0; v < SC_COLUMNS; v += SC_LANES) {
        SC_V x = SC_ADD(SC_LOAD(sum + v), SC_SET(row_bias));
        if (bias) x = SC_ADD(x, SC_LOAD(bias + v));
        if (residual) x = SC_ADD(x, SC_LOAD(residual + v));
        SC_STORE(c + v, SC_ADD(x, SC_SET(0.0f)));
    }
}

/* c = activation(sum + row_bias + bias + residual + 0). sum: [rows][COLUMNS] */
SC_TARGET static void KERNEL(finish)(const float *sum, size_t rows, size_t columns,
                                     const tile_target *to) {
    for (size_t r = 0; r < rows; r++, sum += SC_COLUMNS) {
        const float *residual = to->residual ? to->residual + r * to->residual_stride : NULL;
        float row_bias = to->row_bias ? to->row_bias[r] : 0, *c = to->c + r * to->c_stride;
        if (columns == SC_COLUMNS) KERNEL(add_row)(sum, row_bias, to->bias, residual, c);
        for (size_t j = 0; columns < SC_COLUMNS && j < columns; j++) {
            float x = sum[j] + row_bias;
            if (to->bias) x += to->bias[j];
            if (residual) x += residual[j];
            c[j] = x + 0.0f;
        }
        if (to->activation == QUICK_GELU)
            for (size_t j = 0; j < columns; j++) c[j] = quick_gelu(c[j]);
        if (to->activation == ERF_GELU)
            for (size_t j = 0; j < columns; j++) c[j] = gelu(c[j]);
    }
}

/* Joins 16 partial sums in vectors, which are overwritten. */
SC_TARGET static SC_INLINE float KERNEL(join)(SC_V *partial) {
    float p[SC_LANES];
    SC_UNROLL for (int half = PARTIALS / SC_LANES / 2; half > 0; half /= 2)
        SC_UNROLL for (int v = 0; v < half; v++)
            partial[v] = SC_ADD(partial[v], partial[v + half]);
    SC_STORE(p, partial[0]);
    return join(p, SC_LANES);
}

/* sum_e a[e] b[e] by 16 partial sums. a, b: [n], n a multiple of 16 */
SC_TARGET static float KERNEL(dot)(const float *a, const float *b, size_t n) {
    SC_V partial[PARTIALS / SC_LANES];
    SC_UNROLL for (int v = 0; v < PARTIALS / SC_LANES; v++) partial[v] = SC_SET(0.0f);
    for (size_t e = 0; e < n; e += PARTIALS)
        SC_UNROLL for (int v = 0; v < PARTIALS / SC_LANES; v++)
            partial[v] = SC_FMA(SC_LOAD(a + e + v * SC_LANES), SC_LOAD(b + e + v * SC_LANES),
                                partial[v]);
    return KERNEL(join)(partial);
}

/* out[i] = the dot product of a with row index[i]: four at a time, so that the sums overlap.
 * a: [n]; rows: [.., stride]; index, out: [count] */
SC_TARGET static void KERNEL(dots)(const float *a, size_t n, const float *rows, size_t stride,
                                   const uint32_t *index, size_t count, float *out) {
    enum { TOGETHER = 4 };
    size_t i = 0;
    for (; i + TOGETHER <= count; i += TOGETHER) {
        SC_V partial[TOGETHER][PARTIALS / SC_LANES];
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
        SC_UNROLL for (int r = 0; r < TOGETHER; r++) out[i + r] = KERNEL(join)(partial[r]);
    }
    for (; i < count; i++) out[i] = KERNEL(dot)(a, rows + index[i] * stride, n);
}

/* out[i][j] = the dot product of a's row i with b's row j, for a few of each. a: [DOT_ROWS, n];
 * b: [DOT_COLUMNS, n]; n a multiple of 16 */
SC_TARGET static SC_INLINE void KERNEL(dot_tile)(const float *a, const float *b, size_t n,
                                                 float *out, size_t out_stride) {
    enum { VECTORS = PARTIALS / SC_LANES };
    SC_V partial[SC_DOT_ROWS][SC_DOT_COLUMNS][VECTORS];
    SC_UNROLL for (int i = 0; i < SC_DOT_ROWS; i++)
        SC_UNROLL for (int j = 0; j < SC_DOT_COLUMNS; j++)
            SC_UNROLL for (int v = 0; v < VECTORS; v++) partial[i][j][v] = SC_SET(0.0f);
    for (size_t e = 0; e < n; e += PARTIALS)
        SC_UNROLL for (int v = 0; v < VECTORS; v++) {
            SC_V x[SC_DOT_COLUMNS];
            SC_UNROLL for (int j = 0; j < SC_DOT_COLUMNS; j++)
                x[j] = SC_LOAD(b + j * n + e + v * SC_LANES);
            SC_UNROLL for (int i = 0; i < SC_DOT_ROWS; i++) {
                SC_V y = SC_LOAD(a + i * n + e + v * SC_LANES);
                SC_KEEP(y);
                SC_UNROLL for (int j = 0; j < SC_DOT_COLUMNS; j++)
                    partial[i][j][v] = SC_FMA(y, x[j], partial[i][j][v]);
            }
        }
    SC_UNROLL for (int i = 0; i < SC_DOT_ROWS; i++)
        SC_UNROLL for (int j = 0; j < SC_DOT_COLUMNS; j++)
            out[i * out_stride + j] = KERNEL(join)(partial[i][j]);
}

/* The same for any number of rows; some rows of b stay in the first-level cache while all of a's
 * pass. a: [count, n]; b: [columns, n]; out: [count, out_stride] */
SC_TARGET static void KERNEL(dot_table)(const float *a, size_t count, const float *b,
                                        size_t columns, size_t n, float *out, size_t out_stride) {
    enum { NEAR = 3 * SC_DOT_COLUMNS };
    for (size_t near = 0; near < columns; near += NEAR)
        for (size_t i = 0; i < count; i += SC_DOT_ROWS)
            for (size_t j = near; j < columns && j < near + NEAR; j += SC_DOT_COLUMNS) {
                int whole = i + SC_DOT_ROWS <= count && j + SC_DOT_COLUMNS <= columns;
                if (whole)
                    KERNEL(dot_tile)(a + i * n, b + j * n, n, out + i * out_stride + j, out_stride);
                for (size_t r = i; !whole && r < count && r < i + SC_DOT_ROWS; r++)
                    for (size_t c = j; c < columns && c < j + SC_DOT_COLUMNS; c++)
                        out[r * out_stride + c] = KERNEL(dot)(a + r * n, b + c * n, n);
            }
}

/* sum = fma(factor, x, sum), one link of n chains. x, sum: [n], n a multiple of 16 */
SC_TARGET static void KERNEL(add_scaled)(float factor, const float *x, float *sum, size_t n) {
    SC_V f = SC_SET(factor);
    for (size_t e = 0; e < n; e += SC_LANES)
        SC_STORE(sum + e, SC_FMA(f, SC_LOAD(x + e), SC_LOAD(sum + e)));
}

/* Adds a chain over the rows listed to some vectors of sum, which stay in registers on the way. */
SC_TARGET static SC_INLINE void KERNEL(add_strip)(int vectors, const float *factor,
                                                  const uint32_t *index, size_t count,
                                                  const float *rows, float *sum, size_t n) {
    SC_V chain[SC_STRIP];
    SC_UNROLL for (int v = 0; v < vectors; v++) chain[v] = SC_SET(0.0f);
    for (size_t i = 0; i < count; i++) {
        const float *x = rows + index[i] * n;
        SC_V f = SC_SET(factor[i]);
        SC_UNROLL for (int v = 0; v < vectors; v++)
            chain[v] = SC_FMA(f, SC_LOAD(x + v * SC_LANES), chain[v]);
    }
    SC_UNROLL for (int v = 0; v < vectors; v++)
        SC_STORE(sum + v * SC_LANES, SC_ADD(SC_LOAD(sum + v * SC_LANES), chain[v]));
}

/* sum += sum_i factor[i] rows[index[i]], one chain. rows: [.., n]; sum: [n], n a multiple of 16 */
SC_TARGET static void KERNEL(add_chain)(const float *factor, const uint32_t *index, size_t count,
                                        const float *rows, float *sum, size_t n) {
    enum { WIDTH = SC_STRIP * SC_LANES };
    size_t e = 0;
    for (; e + WIDTH <= n; e += WIDTH)
        KERNEL(add_strip)(SC_STRIP, factor, index, count, rows + e, sum + e, n);
    for (; e < n; e += PARTIALS)
        KERNEL(add_strip)(PARTIALS / SC_LANES, factor, index, count, rows + e, sum + e, n);
}

/* Sum of a row by 16 partial sums. row: [n] */
SC_TARGET static float KERNEL(row_sum)(const float *row, size_t n) {
    float p[PARTIALS] = { 0 };
    size_t whole = n / PARTIALS * PARTIALS;
    for (size_t e = 0; e < whole; e += PARTIALS)
        for (int i = 0; i < PARTIALS; i++) p[i] += row[e + i];
    for (size_t e = whole; e < n; e++) p[e - whole] += row[e];
    return join(p, PARTIALS);
}

/* out = (x - mean) / sqrt(variance + epsilon) * weight + bias (Ba, Kiros and Hinton, 2016).
 * x, weight, bias: [n]; out: [n], padded with zeros */
SC_TARGET static void KERNEL(layer_norm)(const float *x, const float *weight, const float *bias,
                                         float epsilon, float *out, size_t n) {
    float mean = KERNEL(row_sum)(x, n) / (float)n;
    for (size_t e = 0; e < n; e++) out[e] = x[e] - mean;
    for (size_t e = n; e < padded(n); e++) out[e] = 0;
    float variance = KERNEL(dot)(out, out, padded(n)) / (float)n;
    float scale = 1.0f / sqrtf(variance + epsilon);
    for (size_t e = 0; e < n; e++) out[e] = out[e] * scale * weight[e] + bias[e];
}

/* row = exp(scale (row - max)) / sum of these. row: [n] */
SC_TARGET static void KERNEL(softmax)(float *row, size_t n, float scale) {
    float largest = row[0];
    for (size_t e = 1; e < n; e++) largest = row[e] > largest ? row[e] : largest;
    for (size_t e = 0; e < n; e++) row[e] = exp32(scale * (row[e] - largest));
    float sum = KERNEL(row_sum)(row, n);
    for (size_t e = 0; e < n; e++) row[e] /= sum;
}

SC_TARGET static void KERNEL(exponentials)(float *row, size_t n) {
    for (size_t e = 0; e < n; e++) row[e] = exp32(row[e]);
}

/* Bit e of mask says whether row[e] > limit[e]; returns whether any is. row, limit: [n], n a
 * multiple of 64 */
SC_TARGET static int KERNEL(find_above)(const float *row, const float *limit, size_t n,
                                        uint64_t *mask) {
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
SC_TARGET static void KERNEL(unit_row)(float *row, size_t n) {
    float norm = sqrtf(KERNEL(dot)(row, row, n));
    if (norm > 0)
        for (size_t e = 0; e < n; e++) row[e] /= norm;
}

/* Whether the compiler fuses a multiplication and an addition that the source does not: it may do
 * so here though not in the rest of the file, whose target may lack the instruction. */
SC_TARGET static int KERNEL(contracts)(void) {
    volatile float a = 1.0f + 0x1p-12f, b = -(1.0f + 0x1p-11f), one = a;
    volatile double c = 1.0 + 0x1p-27, d = -(1.0 + 0x1p-26), two = c;
    return a * one + b != 0 || c * two + d != 0;
}

/* m = 0.9 m + 0.1 g;  v = 0.999 v + 0.001 g^2;  w -= step_size m / (sqrt(v) root_scale + 1e-8).
 * w, m, v, gradient: [n] */
SC_TARGET static void KERNEL(adam)(float *w, float *m, float *v, const float *gradient, size_t n,
                                   adam_step step) {
    for (size_t e = 0; e < n; e++) {
        float g = gradient[e];
        m[e] = 0.9f * m[e] + 0.1f * g;
        v[e] = 0.999f * v[e] + 0.001f * (g * g);
        w[e] -= step.step_size * (m[e] / (sqrtf(v[e]) * step.root_scale + 1e-8f));
    }
}

static const kernel_set KERNEL(kernels) = {
    TEXT_OF(SC_ISA), SC_TILE_ROWS, SC_COLUMNS, KERNEL(tile), KERNEL(finish), KERNEL(dot),
    KERNEL(dots), KERNEL(dot_table), KERNEL(add_scaled), KERNEL(add_chain), KERNEL(layer_norm),
    KERNEL(softmax), KERNEL(exponentials), KERNEL(find_above), KERNEL(unit_row), KERNEL(adam),
    KERNEL(contracts)
};

#else /* !SC_ISA */

#if defined(__clang__)
#define SC_UNROLL _Pragma("unroll")
#define SC_UNROLL_SOME _Pragma("unroll 4")
#elif defined(__GNUC__)
#define SC_UNROLL _Pragma("GCC unroll 32")
#define SC_UNROLL_SOME _Pragma("GCC unroll 4")
#else
#define SC_UNROLL
#define SC_UNROLL_SOME
#endif
#if defined(__GNUC__)
#define SC_INLINE __attribute__((always_inline)) inline
#else
#define SC_INLINE inline
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
#define SC_DOT_ROWS PASTE(DOT_ROWS, SC_ISA)      /* dot products at once: rows of a times */
#define SC_DOT_COLUMNS PASTE(DOT_COLUMNS, SC_ISA) /* rows of b */
#define SC_STRIP PASTE(STRIP, SC_ISA)            /* vectors of a sum that stay in registers */
#define SC_GROUP PASTE(GROUP, SC_ISA)            /* floats that ABOVE compares at once */
#define SC_COLUMNS (SC_VECTORS * SC_LANES)       /* of a product's tile */
#define SC_V PASTE(V, SC_ISA)
#define SC_SET PASTE(SET, SC_ISA)
#define SC_LOAD PASTE(LOAD, SC_ISA)
#define SC_STORE PASTE(STORE, SC_ISA)
#define SC_ADD PASTE(ADD, SC_ISA)
#define SC_FMA PASTE(FMA, SC_ISA)
#define SC_ABOVE PASTE(ABOVE, SC_ISA)            /* bit i: p[i] > q[i] */
#define SC_KEEP PASTE(KEEP, SC_ISA)              /* in a register: not to be loaded again */

/* Plain C: a vector of one. */
#define TILE_ROWS_scalar 4
#define VECTORS_scalar 4
#define LANES_scalar 1
#define DOT_ROWS_scalar 1
#define DOT_COLUMNS_scalar 1
#define STRIP_scalar 16
#define GROUP_scalar 1
#define TARGET_scalar
#define V_scalar float
#define SET_scalar(x) (x)
#define LOAD_scalar(p) (*(p))
#define STORE_scalar(p, v) (*(p) = (v))
#define ADD_scalar(a, b) ((a) + (b))
#define FMA_scalar(a, b, c) fma32(a, b, c)
#define ABOVE_scalar(p, q) (*(p) > *(q))
#define KEEP_scalar(v) (void)(v)
#define SC_ISA scalar
#include "saeclip.c"
#undef SC_ISA

/* The instruction sets that need extensions of the language: intrinsics, nowhere else. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TILE_ROWS_avx2 6
#define VECTORS_avx2 2
#define LANES_avx2 8
#define DOT_ROWS_avx2 3
#define DOT_COLUMNS_avx2 2
#define STRIP_avx2 12
#define GROUP_avx2 8
#define TARGET_avx2 __attribute__((target("avx2,fma")))
#define V_avx2 __m256
#define SET_avx2(x) _mm256_set1_ps(x)
#define LOAD_avx2(p) _mm256_loadu_ps(p)
#define STORE_avx2(p, v) _mm256_storeu_ps(p, v)
#define ADD_avx2(a, b) _mm256_add_ps(a, b)
#define FMA_avx2(a, b, c) _mm256_fmadd_ps(a, b, c)
#define ABOVE_avx2(p, q)                                                                           \
    (unsigned)_mm256_movemask_ps(                                                                  \
        _mm256_cmp_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(q), _CMP_GT_OQ))
#define KEEP_avx2(v) __asm__("" : "+x"(v))
#define SC_ISA avx2
#include "saeclip.c"
#undef SC_ISA

#define TILE_ROWS_avx512 14
#define VECTORS_avx512 2
#define LANES_avx512 16
#define DOT_ROWS_avx512 4
#define DOT_COLUMNS_avx512 5
#define STRIP_avx512 12
#define GROUP_avx512 16
#define TARGET_avx512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define V_avx512 __m512
#define SET_avx512(x) _mm512_set1_ps(x)
#define LOAD_avx512(p) _mm512_loadu_ps(p)
#define STORE_avx512(p, v) _mm512_storeu_ps(p, v)
#define ADD_avx512(a, b) _mm512_add_ps(a, b)
#define FMA_avx512(a, b, c) _mm512_fmadd_ps(a, b, c)
#define ABOVE_avx512(p, q)                                                                         \
    (unsigned)_mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_loadu_ps(q), _CMP_GT_OQ)
#define KEEP_avx512(v) __asm__("" : "+v"(v))
#define SC_ISA avx512
#include "saeclip.c"
#undef SC_ISA

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

#define TILE_ROWS_neon 8
#define VECTORS_neon 3
#define LANES_neon 4
#define DOT_ROWS_neon 2
#define DOT_COLUMNS_neon 3
#define STRIP_neon 12
#define GROUP_neon 1
#define TARGET_neon
#define V_neon float32x4_t
#define SET_neon(x) vdupq_n_f32(x)
#define LOAD_neon(p) vld1q_f32(p)
#define STORE_neon(p, v) vst1q_f32(p, v)
#define ADD_neon(a, b) vaddq_f32(a, b)
#define FMA_neon(a, b, c) vfmaq_f32(c, a, b)
#define ABOVE_neon(p, q) (*(p) > *(q))
#define KEEP_neon(v) __asm__("" : "+w"(v))
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
static int kernels_chosen;

/* Floats of a product's A that are kept together: 9 / 16 of a second-level cache, which has half a
 * megabyte if the system does not say. */
static size_t buffer_floats = 72 << 10;

static void measure_cache(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes >= 1 << 18) buffer_floats = (size_t)bytes / 16 * 9 / sizeof(float);
#endif
}

int sc_instruction_set(const char *name) {
    size_t count = sizeof instruction_sets / sizeof *instruction_sets;
    for (size_t i = 0; i < count; i++)
        if ((!name || strcmp(name, instruction_sets[i].set->name) == 0)
            && instruction_sets[i].usable()) {
            kernels = instruction_sets[i].set;
            kernels_chosen = 1;
            measure_cache();
            if (!kernels->contracts() && !kernels_scalar.contracts()) return SC_OK;
            return fail("this build contracts a * b + c: compile with -ffp-contract=off");
        }
    return usage("SAECLIP_ISA=%s: this machine or build has not got it (avx512, avx2, neon, "
                 "scalar are known)", name);
}

/* The fastest kernels, where the caller has not chosen any. */
static int choose_kernels(void) {
    if (kernels_chosen) return SC_OK;
    return sc_instruction_set(NULL);
}

/* --------------------------------------------------------------------------------------------
 * Matrix products. B is packed once into panels as wide as the kernel's tile, [panels][K][columns];
 * A is copied, some tiles' rows at a time, into a buffer with fixed strides; threads share out
 * blocks of rows and panels.
 * -------------------------------------------------------------------------------------------- */

typedef sc_matrix packed_matrix;     /* data: [panels][K][kernels->columns], 0 past column N */

static size_t panels_of(size_t N) {
    return (N + (size_t)kernels->columns - 1) / (size_t)kernels->columns;
}

/* Room for a [K, N] matrix, all 0. */
static int new_packed(packed_matrix *b, size_t K, size_t N) {
    *b = (packed_matrix){ .K = K, .N = N, .panels = panels_of(N) };
    if (K != 0 && b->panels > SIZE_MAX / sizeof(float) / (size_t)kernels->columns / K)
        return fail("out of memory: a matrix of %zu x %zu cannot be addressed", K, N);
    b->data = new_array(b->panels * K * (size_t)kernels->columns, sizeof *b->data);
    return b->data ? SC_OK : SC_FAILED;
}

/* Packs panels first .. last - 1 of the matrix whose element (k, j) is
 * w[k * k_stride + j * j_stride]. */
static void pack_panels(packed_matrix *b, size_t first, size_t last, const float *w,
                        size_t k_stride, size_t j_stride) {
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

/* How many rows of A a buffer holds: of several tiles if there is room. */
static size_t rows_at_once(size_t K) {
    size_t tile = (chains_of(K) + 1) * (size_t)kernels->rows * CHAIN_STRIDE;
    size_t tiles = buffer_floats / tile;
    tiles = tiles < 1 ? 1 : tiles > TILES_AT_ONCE ? TILES_AT_ONCE : tiles;
    return tiles * (size_t)kernels->rows;
}

/* Floats in such a buffer, for products of this K or a smaller one. */
static size_t row_buffer_size(size_t K) {
    size_t tile = chains_of(K) * (size_t)kernels->rows * CHAIN_STRIDE;
    return tile > buffer_floats ? tile : buffer_floats;
}

/* Copies rows of A for the kernel: the first ones, or those in `index`; zeros fill the last tile.
 * a: [rows, K] at a_stride; index: [rows] or NULL; buffer: [chains][room][CHAIN_STRIDE] */
static void load_rows(float *buffer, const float *a, size_t a_stride, const size_t *index,
                      size_t rows, size_t K, size_t room) {
    size_t tile_rows = (size_t)kernels->rows, end = (rows + tile_rows - 1) / tile_rows * tile_rows;
    for (size_t block = 0; block < K; block += CHAIN, buffer += room * CHAIN_STRIDE) {
        size_t terms = K - block < CHAIN ? K - block : CHAIN;
        for (size_t r = 0; r < rows; r++)
            memcpy(buffer + r * CHAIN_STRIDE, a + (index ? index[r] : r) * a_stride + block,
                   terms * sizeof *a);
        for (size_t r = rows; r < end; r++)
            memset(buffer + r * CHAIN_STRIDE, 0, terms * sizeof *a);
    }
}

/* A panel of the rows in a buffer: block after block of B, which stays in the first-level cache
 * while the tiles take their turns. */
static void product_panel(const float *buffer, size_t rows, size_t room, const packed_matrix *b,
                          size_t panel, const tile_target *to) {
    size_t tile_rows = (size_t)kernels->rows, columns = (size_t)kernels->columns;
    size_t j = panel * columns, width = b->N - j < columns ? b->N - j : columns;
    const float *from = b->data + panel * b->K * columns;
    float sum[TILES_AT_ONCE * MAX_ROWS * MAX_COLUMNS];
    tile_target corner = *to;
    for (size_t block = 0; block < b->K; block += CHAIN, buffer += room * CHAIN_STRIDE)
        for (size_t r = 0; r < rows; r += tile_rows)
            kernels->tile(rows - r, b->K - block < CHAIN ? b->K - block : CHAIN,
                          buffer + r * CHAIN_STRIDE, from + block * columns, sum + r * columns,
                          block > 0);
    corner.c += j;
    if (to->bias) corner.bias += j;
    if (to->residual) corner.residual += j;
    kernels->finish(sum, rows, width, &corner);
}

/* Rows of c = a b: one thread's share. a: [rows, K], or those rows that `index` lists; to: the
 * rows in the columns of panels first .. last - 1, its pointers at column 0 of the whole product */
static void product_rows(const float *a, size_t a_stride, const size_t *index, size_t rows,
                         const packed_matrix *b, size_t first, size_t last, const tile_target *to,
                         float *buffer) {
    size_t room = rows_at_once(b->K);
    float row_bias[TILES_AT_ONCE * MAX_ROWS];
    tile_target corner = *to;
    if (to->row_bias) corner.row_bias = row_bias;
    for (size_t i = 0; i < rows; i += room) {
        size_t some = rows - i < room ? rows - i : room;
        for (size_t r = 0; to->row_bias && r < some; r++)
            row_bias[r] = to->row_bias[index ? index[i + r] : i + r];
        load_rows(buffer, index ? a : a + i * a_stride, a_stride, index ? index + i : NULL, some,
                  b->K, room);
        for (size_t panel = first; panel < last; panel++)
            product_panel(buffer, some, room, b, panel, &corner);
        corner.c += some * to->c_stride;
        if (to->residual) corner.residual += some * to->residual_stride;
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

static int product_task(void *context, size_t task) {
    const product *p = context;
    size_t row_tasks = (p->M + p->row_step - 1) / p->row_step;
    size_t row = task % row_tasks * p->row_step, panel = task / row_tasks * p->panel_step;
    size_t rows = p->M - row < p->row_step ? p->M - row : p->row_step;
    size_t last = panel + p->panel_step < p->b->panels ? panel + p->panel_step : p->b->panels;
    tile_target to = p->to;
    to.c += row * to.c_stride;
    if (to.residual) to.residual += row * to.residual_stride;
    product_rows(p->a + row * p->a_stride, p->a_stride, NULL, rows, p->b, panel, last, &to,
                 p->buffer + worker * row_buffer_size(p->b->K));
    return SC_OK;
}

/* c = activation(a b + bias + residual), over all threads. A share is the rows that a buffer holds,
 * and a part of the panels if that makes too few shares for an even end. */
static int multiply(const float *a, size_t M, size_t a_stride, const packed_matrix *b,
                    tile_target to) {
    size_t wanted = SHARES * (size_t)thread_count();
    product p = { .a = a, .M = M, .a_stride = a_stride, .b = b, .to = to };
    if (M == 0 || b->N == 0) return SC_OK;
    p.row_step = rows_at_once(b->K);
    size_t row_tasks = (M + p.row_step - 1) / p.row_step;
    size_t panel_tasks = (wanted + row_tasks - 1) / row_tasks;
    p.panel_step = (b->panels + panel_tasks - 1) / panel_tasks;
    panel_tasks = (b->panels + p.panel_step - 1) / p.panel_step;
    p.buffer = reserve_array((size_t)thread_count() * row_buffer_size(b->K), sizeof *p.buffer);
    if (!p.buffer) return SC_FAILED;
    int status = parallel_for(row_tasks * panel_tasks, product_task, &p);
    free(p.buffer);
    return status;
}

/* ============================================================================================
 * 9. The vision transformer, fast
 *
 * The forward pass hands out what it is asked for at the hook points and stops where nothing later is
 * needed.
 * ============================================================================================ */

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
static int norm_task(void *context, size_t task) {
    forward_pass *pass = context;
    size_t D = pass->model->width, first = task * ROWS_A_TASK;
    for (size_t i = first; i < pass->rows && i < first + ROWS_A_TASK; i++)
        kernels->layer_norm(pass->x + i * D, pass->norm->weight, pass->norm->bias,
                            pass->model->epsilon, pass->normed + i * pass->normed_stride, D);
    return SC_OK;
}

static int norm_rows(forward_pass *pass, const sc_layer *norm) {
    pass->norm = norm;
    return parallel_for((pass->rows + ROWS_A_TASK - 1) / ROWS_A_TASK, norm_task, pass);
}

/* Lays an image's patches out as rows of 3 patch^2 normalised pixels, channel by channel. */
static int patch_task(void *context, size_t image) {
    forward_pass *pass = context;
    const sc_model *model = pass->model;
    size_t p = model->patch, S = model->image_size;
    const unsigned char *pixels = pass->pixels + image * S * S * 3;
    float normal[3][256];
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
static int embed(forward_pass *pass) {
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

/* One head of one image, some queries at a time so that their scores stay in a near cache:
 * out = softmax(q k^T / sqrt d) v. q, k, v: [T, d] within qkv [T, 3 D]; scores: [rows, padded T] */
static int head_task(void *context, size_t task) {
    forward_pass *pass = context;
    const sc_model *model = pass->model;
    size_t D = model->width, T = model->tokens, d = D / model->heads, stride = pass->wide_stride;
    size_t image = task / model->heads, head = task % model->heads;
    const float *q = pass->wide + image * T * stride + head * d, *k = q + D, *v = k + D;
    packed_matrix keys = { .K = d, .N = T, .panels = panels_of(T) };
    packed_matrix values = { .K = T, .N = d, .panels = panels_of(d) };
    size_t columns = (size_t)kernels->columns;
    keys.data = pass->head_scratch + worker * pass->head_scratch_size;
    values.data = keys.data + keys.panels * columns * d;
    float *scores = values.data + values.panels * columns * T;
    float *buffer = scores + rows_at_once(d) * padded(T);
    tile_target to_scores = { .c = scores, .c_stride = padded(T) };
    tile_target to_out = { .c = pass->normed + image * T * pass->normed_stride + head * d,
                           .c_stride = pass->normed_stride };
    pack_panels(&keys, 0, keys.panels, k, 1, stride);
    pack_panels(&values, 0, values.panels, v, stride, 1);
    for (size_t first = 0; first < T; first += rows_at_once(d)) {
        size_t rows = T - first < rows_at_once(d) ? T - first : rows_at_once(d);
        product_rows(q + first * stride, stride, NULL, rows, &keys, 0, keys.panels, &to_scores,
                     buffer);
        for (size_t t = 0; t < rows; t++)
            kernels->softmax(scores + t * padded(T), T, 1.0f / sqrtf((float)d));
        product_rows(scores, padded(T), NULL, rows, &values, 0, values.panels, &to_out, buffer);
        to_out.c += rows * to_out.c_stride;
    }
    return SC_OK;
}

static int taps_at(const sc_tap *tap, size_t layer, sc_hook hook) {
    return tap->layer == layer && tap->hook == hook;
}

/* Gives an output to whoever taps it, and takes back what is to stand in its place.
 * output: [M, D] at stride */
static int tap_output(const forward_pass *pass, size_t layer, sc_hook hook, float *output,
                      size_t stride) {
    size_t bytes = pass->model->width * sizeof *output;
    for (const sc_tap *tap = pass->taps; tap < pass->taps + pass->count; tap++) {
        if (!taps_at(tap, layer, hook)) continue;
        for (size_t row = 0; row < pass->rows; row++)
            memcpy(tap->out + row * tap->stride, output + row * stride, bytes);
        if (!tap->replace) continue;
        SC_TRY(tap->replace(tap->context, tap->out, pass->rows));
        for (size_t row = 0; row < pass->rows; row++)
            memcpy(output + row * stride, tap->out + row * tap->stride, bytes);
    }
    return SC_OK;
}

/* x += a W + bias, by way of normed or wide, whichever is not a, if somebody taps it. */
static int add_layer(forward_pass *pass, const float *a, const sc_layer *layer, size_t number,
                     sc_hook hook) {
    size_t D = pass->model->width, wide = pass->wide_stride, normed = pass->normed_stride;
    size_t a_stride = a == pass->wide ? wide : normed, stride = a == pass->wide ? normed : wide;
    float *output = a == pass->wide ? pass->normed : pass->wide;
    int tapped = 0;
    for (size_t i = 0; i < pass->count; i++) tapped |= taps_at(&pass->taps[i], number, hook);
    tile_target to = { .c = tapped ? output : pass->x, .c_stride = tapped ? stride : D,
                       .bias = layer->bias, .residual = tapped ? NULL : pass->x,
                       .residual_stride = D };
    SC_TRY(multiply(a, pass->rows, a_stride, &layer->matrix, to));
    SC_TRY(tap_output(pass, number, hook, output, stride));
    for (size_t i = 0; tapped && i < pass->rows; i++)
        for (size_t d = 0; d < D; d++)
            pass->x[i * D + d] = output[i * stride + d] + pass->x[i * D + d] + 0.0f;
    return SC_OK;
}

/* One block. x: [M, D] */
static int forward_block(forward_pass *pass, size_t number) {
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
    return tap_output(pass, number, SC_RESID, pass->x, model->width);
}

/* head(norm(class token)); with class prompts, the cosine with each. out: [B, outputs] or
 * [B, classes] */
static int forward_head(forward_pass *pass, float *out) {
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

static int new_forward_pass(forward_pass *pass, const sc_model *model) {
    size_t D = model->width, T = model->tokens, d = D / model->heads, longest = T > d ? T : d;
    size_t pixels = 3 * model->patch * model->patch, columns = (size_t)kernels->columns;
    size_t widest = 3 * D > model->hidden ? 3 * D : model->hidden;
    pass->model = model;
    pass->rows = pass->images * T;
    pass->wide_stride = padded(widest > pixels ? widest : pixels);
    pass->normed_stride = padded(D);
    pass->head_scratch_size = padded(panels_of(T) * columns * d + panels_of(d) * columns * T
                                     + rows_at_once(d) * padded(T) + row_buffer_size(longest));
    const array_spec arrays[] = {
        ARRAY(pass->x, pass->rows, D), ARRAY(pass->normed, pass->rows, pass->normed_stride),
        ARRAY(pass->wide, pass->rows, pass->wide_stride),
        ARRAY(pass->head_scratch, (size_t)thread_count(), pass->head_scratch_size) };
    return new_arrays(&pass->memory, arrays, COUNT(arrays));
}

int sc_model_forward(const sc_model *model, const unsigned char *pixels, size_t images,
                     const sc_tap *taps, size_t count, float *head) {
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
 * 10. The sparse autoencoder
 *
 *     h = W_enc^T (x - b_dec) + b_enc       f = relu(h), or relu of the k largest of h
 *     x' = W_dec^T f + b_dec                 (Bricken et al., 2023; Gao et al., 2024)
 *
 * Weights lie latent by latent. A batch's tokens are cut into tiles of at most 256; a tile's
 * pre-activations become sparse codes while in cache, so there is no tokens x latents matrix.
 * ============================================================================================ */


static int new_sae(sc_sae *sae, size_t d_in, size_t d_sae) {
    *sae = (sc_sae){ .d_in = d_in, .d_sae = d_sae, .stride = padded(d_in), .hook = -1 };
    if (d_in == 0 || d_sae == 0 || d_in > SC_MAX_WIDTH || d_sae > SC_MAX_LATENTS)
        return fail("an SAE of %zu inputs and %zu latents is not possible", d_in, d_sae);
    sae->W_enc = new_array(d_sae, sae->stride * sizeof *sae->W_enc);
    sae->W_dec = new_array(d_sae, sae->stride * sizeof *sae->W_dec);
    sae->b_enc = new_array(padded(d_sae), sizeof *sae->b_enc);
    sae->b_dec = new_array(sae->stride, sizeof *sae->b_dec);
    return sae->W_enc && sae->W_dec && sae->b_enc && sae->b_dec ? SC_OK : SC_FAILED;
}

void sc_sae_close(sc_sae *sae) {
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

static int initial_row(void *context, size_t j) {
    const initialisation *start = context;
    initialise_latent(start->sae, j, start->seed);
    return SC_OK;
}

int sc_sae_init(sc_sae *sae, size_t d_in, size_t d_sae, uint64_t seed) {
    initialisation start = { sae, seed };
    int status = new_sae(sae, d_in, d_sae);
    if (status == SC_OK) status = parallel_for(d_sae, initial_row, &start);
    if (status != SC_OK) sc_sae_close(sae);
    return status;
}

/* --------------------------------------------------------------------------------------------
 * Sparse codes: latent by latent, the tokens of a tile where it fires, and its activations there.
 * -------------------------------------------------------------------------------------------- */

enum {
    TILE_TOKENS = 256,               /* a token of a tile is a byte */
    TILES_A_TASK = 4                 /* at most */
};

typedef struct {
    size_t first, tokens;            /* where the tile begins in the batch, how long it is */
    size_t *start;                   /* [n + 1], where latent j's codes begin */
    uint8_t *token;                  /* [start[n]], ascending within a latent */
    float *value;                    /* [start[n]] */
} tile_codes;

/* Visits the tokens where a latent of a tile fires, in order: token is within the tile, value its
 * activation. */
typedef struct { const tile_codes *tile; size_t next, end, token; float value; } code_walk;

static code_walk walk_codes(const tile_codes *tile, size_t j) {
    return (code_walk){ .tile = tile, .next = tile->start[j], .end = tile->start[j + 1] };
}

static inline int next_code(code_walk *w) {
    if (w->next == w->end) return 0;
    w->token = w->tile->token[w->next];
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
    size_t tiles, tiles_a_task, tile_room;
    unsigned char *scratch;          /* [workers][scratch_bytes] */
    size_t scratch_bytes;
    memory_list memory;
} sae_batch;

/* What a worker needs for a tile; the arrays lie in the batch's scratch. */
typedef struct {
    float *h;                        /* [rows_at_once(D)][TILE_TOKENS] */
    float *buffer;                   /* for load_rows */
    float *dense;                    /* [TILE_TOKENS][CHAIN], a block's codes in full */
    packed_matrix weights;           /* [CHAIN, D], a block of W_dec */
    float *sum;                      /* [stride] */
    uint64_t *heap;                  /* [TILES_A_TASK][TILE_TOKENS][k], TopK's best so far */
    float *limit;                    /* [TILES_A_TASK][TILE_TOKENS], what a candidate must exceed */
} tile_scratch;

/* Lays a worker's arrays out in `memory`, or only measures them where that is NULL. */
static size_t lay_out_scratch(tile_scratch *s, const sc_sae *sae, void *memory) {
    size_t deepest = sae->d_in > CHAIN ? sae->d_in : CHAIN, columns = (size_t)kernels->columns;
    s->weights = (packed_matrix){ .K = CHAIN, .N = sae->d_in, .panels = panels_of(sae->d_in) };
    const array_spec arrays[] = {
        ARRAY(s->h, rows_at_once(sae->d_in), TILE_TOKENS),
        ARRAY(s->buffer, row_buffer_size(deepest), 1),
        ARRAY(s->dense, TILE_TOKENS, CHAIN), ARRAY(s->sum, sae->stride, 1),
        ARRAY(s->weights.data, s->weights.panels * columns, CHAIN),
        ARRAY(s->heap, sae->topk ? sae->k : 0, TILES_A_TASK * TILE_TOKENS),
        ARRAY(s->limit, TILES_A_TASK, TILE_TOKENS) };
    return lay_out(arrays, COUNT(arrays), memory);
}

static tile_scratch worker_scratch(const sae_batch *batch) {
    tile_scratch s;
    lay_out_scratch(&s, batch->sae, batch->scratch + worker * batch->scratch_bytes);
    return s;
}

static void free_batch(sae_batch *batch) {
    for (size_t i = 0; batch->tile && i < batch->tile_room; i++) {
        free(batch->tile[i].value);
        free(batch->tile[i].token);
    }
    release(&batch->memory);
    *batch = (sae_batch){ 0 };
}

/* Cuts T tokens into tiles of about the same length: as many tasks for each thread, each of as many
 * tiles. */
static void cut_tiles(sae_batch *batch, size_t T) {
    size_t columns = (size_t)kernels->columns, panels = panels_of(T), most = TILE_TOKENS / columns;
    size_t share = (size_t)thread_count() * TILES_A_TASK * most;
    size_t tasks = (size_t)thread_count() * ((panels + share - 1) / share);
    if (tasks > panels) tasks = panels;
    batch->tiles_a_task = ((panels + tasks - 1) / tasks + most - 1) / most;
    batch->tiles = tasks * batch->tiles_a_task;
    for (size_t i = 0; batch->tile && i < batch->tiles; i++) {
        size_t first = i * panels / batch->tiles * columns;
        size_t end = (i + 1) * panels / batch->tiles * columns;
        batch->tile[i].first = first;
        batch->tile[i].tokens = (end < T ? end : T) - first;
    }
}

/* Room for batches of up to `room` tokens. */
static int new_batch(sae_batch *batch, const sc_sae *sae, size_t room) {
    tile_scratch s;
    size_t n = sae->d_sae, columns = panels_of(room) * (size_t)kernels->columns, *starts = NULL;
    *batch = (sae_batch){ .sae = sae, .room = room, .reconstruct = 1,
                          .scratch_bytes = lay_out_scratch(&s, sae, NULL) };
    batch->panels.K = sae->d_in;
    cut_tiles(batch, room);
    size_t tiles = batch->tile_room = batch->tiles;
    const array_spec arrays[] = {
        ARRAY(batch->centred, room, sae->stride), ARRAY(batch->output, room, sae->stride),
        ARRAY(batch->panels.data, columns, sae->d_in), ARRAY(batch->norm, room, 1),
        ARRAY(batch->squared_error, room, 1), ARRAY(batch->sum_f, room, 1),
        ARRAY(batch->active, room, 1), ARRAY(batch->tile, tiles, 1), ARRAY(starts, n + 1, tiles),
        ARRAY(batch->scratch, (size_t)thread_count(), batch->scratch_bytes) };
    SC_TRY(new_arrays(&batch->memory, arrays, COUNT(arrays)));
    for (size_t i = 0; i < tiles; i++) {                     /* codes: as many as there can be */
        size_t most = sae->topk ? sae->k : n;
        batch->tile[i].start = starts + i * (n + 1);
        batch->tile[i].token = reserve_array(most, TILE_TOKENS * sizeof(uint8_t));
        batch->tile[i].value = reserve_array(most, TILE_TOKENS * sizeof(float));
        if (!batch->tile[i].token || !batch->tile[i].value) return SC_FAILED;
    }
    return SC_OK;
}

/* The panels of a tile's tokens. */
static packed_matrix tile_panels(const sae_batch *batch, const tile_codes *tile) {
    packed_matrix panels = batch->panels;
    panels.data += tile->first * panels.K;
    panels.panels = panels_of(tile->tokens);
    panels.N = panels.panels * (size_t)kernels->columns;
    return panels;
}

/* h[i][t] = (W_enc^T (x - b_dec) + b_enc) of latents j .. j + count - 1 on panels of tokens, or of
 * those that `latent` lists (j 0). latent: [count] or NULL; rows of h are h_stride long, and what
 * lies past the last token is not meant for anyone. */
static void pre_activations(const sc_sae *sae, size_t j, const size_t *latent, size_t count,
                            const packed_matrix *panels, float *h, size_t h_stride, float *buffer) {
    tile_target to = { .c = h, .c_stride = h_stride, .row_bias = sae->b_enc + j };
    product_rows(sae->W_enc + j * sae->stride, sae->stride, latent, count, panels, 0,
                 panels->panels, &to, buffer);
}

/* Appends latent j's codes to a tile's, of which there are `used`; returns how many there are now.
 * h: [TILE_TOKENS] */
static size_t append_codes(tile_codes *tile, size_t used, const float *h, const float *limit) {
    uint64_t mask[TILE_TOKENS / MASK_BITS];
    kernels->find_above(h, limit, TILE_TOKENS, mask);
    for (size_t first = 0; first < tile->tokens; first += MASK_BITS) {
        size_t end = first + MASK_BITS < tile->tokens ? first + MASK_BITS : tile->tokens;
        for (size_t t = first; mask[first / MASK_BITS] && t < end; t++) {
            tile->token[used] = (uint8_t)t;                  /* stays if h > 0 */
            tile->value[used] = h[t];
            used += h[t] > 0;
        }
    }
    return used;
}

/* TopK: a token's k best are a heap of numbers that sort: positive floats order as their bits do,
 * and of equal ones the lower latent is the larger number; 0 is nobody. */
static uint64_t candidate_of(float h, size_t latent) {
    return (uint64_t)bits_of_float(h) << 32 | (uint32_t)~(uint32_t)latent;
}

static float candidate_value(uint64_t c) { return float_of_bits((uint32_t)(c >> 32)); }
static size_t candidate_latent(uint64_t c) { return (uint32_t)~(uint32_t)c; }

/* Replaces the least number of a heap, its first, by a larger one. heap: [k] */
static void replace_least(uint64_t *heap, size_t k, uint64_t number) {
    size_t place = 0;
    for (size_t child = 1; child < k; child = 2 * place + 1) {
        if (child + 1 < k && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= number) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = number;
}

/* Takes latent j's pre-activations into the heaps of its tile's tokens. h, limit: [TILE_TOKENS];
 * heap: [TILE_TOKENS][k] */
static void offer_candidates(const sc_sae *sae, size_t j, const float *h, size_t tokens,
                             uint64_t *heap, float *limit) {
    uint64_t mask[TILE_TOKENS / MASK_BITS];
    if (!kernels->find_above(h, limit, TILE_TOKENS, mask)) return;
    for (size_t t = 0; t < tokens; t++) {
        uint64_t bits = mask[t / MASK_BITS] >> t % MASK_BITS;
        if (bits == 0) t |= MASK_BITS - 1;                   /* on to the mask's next word */
        if (!(bits & 1)) continue;
        replace_least(heap + t * sae->k, sae->k, candidate_of(h[t], j));
        limit[t] = candidate_value(heap[t * sae->k]);
    }
}

/* The k best of each token become the tile's codes, ordered by counting. heap: [TILE_TOKENS][k] */
static void select_codes(const sc_sae *sae, tile_codes *tile, const uint64_t *heap) {
    size_t n = sae->d_sae, k = sae->k, *start = tile->start;
    memset(start, 0, (n + 1) * sizeof *start);
    for (size_t i = 0; i < tile->tokens * k; i++)
        if (heap[i]) start[candidate_latent(heap[i]) + 1]++;
    for (size_t j = 0; j < n; j++) start[j + 1] += start[j];
    for (size_t i = 0; i < tile->tokens * k; i++) {          /* moves each start to its end, */
        if (!heap[i]) continue;
        size_t at = start[candidate_latent(heap[i])]++;
        tile->token[at] = (uint8_t)(i / k);
        tile->value[at] = candidate_value(heap[i]);
    }
    memmove(start + 1, start, n * sizeof *start);            /* which is where the next begins */
    start[0] = 0;
}

/* f of a task's tiles, all latents; rows of W_enc are loaded once for all of them. */
static void encode_tiles(const sae_batch *batch, tile_codes *tile, const tile_scratch *s) {
    const sc_sae *sae = batch->sae;
    size_t D = sae->d_in, rows = rows_at_once(D), tiles = batch->tiles_a_task;
    size_t heap_size = sae->topk ? TILE_TOKENS * sae->k : 0, used[TILES_A_TASK] = { 0 };
    tile_target to = { .c = s->h, .c_stride = TILE_TOKENS };
    memset(s->heap, 0, tiles * heap_size * sizeof *s->heap);
    memset(s->limit, 0, tiles * TILE_TOKENS * sizeof *s->limit);
    for (size_t group = 0; group < sae->d_sae; group += rows) {
        size_t count = sae->d_sae - group < rows ? sae->d_sae - group : rows;
        load_rows(s->buffer, sae->W_enc + group * sae->stride, sae->stride, NULL, count, D, rows);
        to.row_bias = sae->b_enc + group;
        for (size_t i = 0; i < tiles; i++) {
            packed_matrix panels = tile_panels(batch, &tile[i]);
            float *limit = s->limit + i * TILE_TOKENS;
            for (size_t panel = 0; panel < panels.panels; panel++)
                product_panel(s->buffer, count, rows, &panels, panel, &to);
            for (size_t r = 0; r < count; r++) {
                const float *h = s->h + r * TILE_TOKENS;
                tile[i].start[group + r] = used[i];
                if (sae->topk)
                    offer_candidates(sae, group + r, h, tile[i].tokens, s->heap + i * heap_size,
                                     limit);
                else used[i] = append_codes(&tile[i], used[i], h, limit);
            }
        }
    }
    for (size_t i = 0; i < tiles; i++) {
        tile[i].start[sae->d_sae] = used[i];
        if (sae->topk) select_codes(sae, &tile[i], s->heap + i * heap_size);
    }
}

/* --------------------------------------------------------------------------------------------
 * Decoding: x' = W_dec^T f + b_dec, in blocks of 256 latents, each a chain. A block with few codes
 * adds up their rows; one with many is multiplied out in full. Both are the same chains.
 * -------------------------------------------------------------------------------------------- */

enum { DENSE_SHARE = 8 };            /* in full where more than one code in 8 is active */

/* out[t] += token t's chain over the block's latents that fire. The codes are first sorted by
 * token, by counting, which keeps their order. out: [tokens, stride] */
static void decode_sparse(const sc_sae *sae, const tile_codes *tile, size_t block, size_t latents,
                          float *out) {
    size_t place[TILE_TOKENS + 1] = { 0 }, stride = sae->stride;
    float value[TILE_TOKENS * CHAIN / DENSE_SHARE];
    uint32_t latent[TILE_TOKENS * CHAIN / DENSE_SHARE];
    for (size_t i = tile->start[block]; i < tile->start[block + latents]; i++)
        place[tile->token[i] + 1]++;
    for (size_t t = 0; t < tile->tokens; t++) place[t + 1] += place[t];
    for (size_t j = 0; j < latents; j++)
        for (code_walk w = walk_codes(tile, block + j); next_code(&w); place[w.token]++) {
            value[place[w.token]] = w.value;
            latent[place[w.token]] = (uint32_t)j;
        }
    for (size_t t = 0, i = 0; t < tile->tokens; i = place[t++])  /* places are now tokens' ends */
        kernels->add_chain(value + i, latent + i, place[t] - i, sae->W_dec + block * stride,
                           out + t * stride, stride);
}

/* The same as a product over all the block's latents. */
static void decode_dense(const sc_sae *sae, size_t tokens, size_t block, size_t latents,
                         float *out, tile_scratch *s) {
    tile_target to = { .c = out, .c_stride = sae->stride,
                       .residual = out, .residual_stride = sae->stride };
    s->weights.K = latents;
    pack_panels(&s->weights, 0, s->weights.panels, sae->W_dec + block * sae->stride, sae->stride,
                1);
    product_rows(s->dense, CHAIN, NULL, tokens, &s->weights, 0, s->weights.panels, &to, s->buffer);
}

static void decode_tile(const sae_batch *batch, const tile_codes *tile, tile_scratch *s) {
    const sc_sae *sae = batch->sae;
    float *out = batch->output + tile->first * sae->stride;
    memset(out, 0, tile->tokens * sae->stride * sizeof *out);
    for (size_t block = 0; block < sae->d_sae; block += CHAIN) {
        size_t latents = sae->d_sae - block < CHAIN ? sae->d_sae - block : CHAIN;
        size_t active = tile->start[block + latents] - tile->start[block];
        if (active * DENSE_SHARE <= tile->tokens * latents) {
            decode_sparse(sae, tile, block, latents, out);
            continue;
        }
        memset(s->dense, 0, TILE_TOKENS * CHAIN * sizeof *s->dense);
        for (size_t i = 0; i < latents; i++)
            for (code_walk w = walk_codes(tile, block + i); next_code(&w);)
                s->dense[w.token * CHAIN + i] = w.value;
        decode_dense(sae, tile->tokens, block, latents, out, s);
    }
    for (size_t t = 0; t < tile->tokens; t++)
        for (size_t d = 0; d < sae->d_in; d++)
            out[t * sae->stride + d] = out[t * sae->stride + d] + sae->b_dec[d] + 0.0f;
}

/* What the losses need of each token. */
static void measure_tile(const sae_batch *batch, const tile_codes *tile, tile_scratch *s) {
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

static int centre_task(void *context, size_t panel) {
    sae_batch *batch = context;
    const sc_sae *sae = batch->sae;
    size_t columns = (size_t)kernels->columns, stride = sae->stride;
    for (size_t t = panel * columns; t < batch->T && t < (panel + 1) * columns; t++)
        for (size_t d = 0; d < stride; d++)
            batch->centred[t * stride + d] = batch->x[t * stride + d] - sae->b_dec[d];
    pack_panels(&batch->panels, panel, panel + 1, batch->centred, 1, stride);
    return SC_OK;
}

static int tile_task(void *context, size_t task) {
    sae_batch *batch = context;
    tile_codes *tile = &batch->tile[task * batch->tiles_a_task];
    tile_scratch s = worker_scratch(batch);
    encode_tiles(batch, tile, &s);
    for (size_t i = 0; i < batch->tiles_a_task; i++) {
        if (batch->reconstruct) decode_tile(batch, &tile[i], &s);
        measure_tile(batch, &tile[i], &s);
    }
    return SC_OK;
}

/* Encodes and decodes T tokens, at least 1. x: [T, stride] */
static int run_sae(sae_batch *batch, const float *x, size_t T) {
    batch->x = x;
    batch->T = batch->panels.N = T;
    batch->panels.panels = panels_of(T);
    cut_tiles(batch, T);
    SC_TRY(parallel_for(batch->panels.panels, centre_task, batch));
    return parallel_for(batch->tiles / batch->tiles_a_task, tile_task, batch);
}

/* to: [rows, stride], padded with zeros; from: [rows, width] */
static const float *pad_rows(float *to, const float *from, size_t rows, size_t width,
                             size_t stride) {
    for (size_t i = 0; i < rows; i++) {
        memcpy(to + i * stride, from + i * width, width * sizeof *to);
        memset(to + i * stride + width, 0, (stride - width) * sizeof *to);
    }
    return to;
}

/* The codes of a batch as a matrix. f: [batch->T, n], 0 so far */
static void spread_batch(const sae_batch *batch, float *f) {
    size_t n = batch->sae->d_sae;
    for (size_t i = 0; i < batch->tiles; i++) {
        const tile_codes *tile = &batch->tile[i];
        for (size_t j = 0; j < n; j++) {
            for (code_walk w = walk_codes(tile, j); next_code(&w);)
                f[(tile->first + w.token) * n + j] = w.value;
        }
    }
}

/* sc_sae_encode_plain(), some tokens at a time. */
int sc_sae_encode(const sc_sae *sae, const float *x, size_t tokens, float *f) {
    enum { TOGETHER = 2048 };
    size_t room = tokens < TOGETHER ? tokens : TOGETHER;
    sae_batch batch = { 0 };
    SC_TRY(check_k(sae));
    SC_TRY(check_rows(x, tokens, sae->d_in, "x"));
    SC_TRY(choose_kernels());
    if (tokens == 0) return SC_OK;
    memset(f, 0, tokens * sae->d_sae * sizeof *f);
    float *rows = new_array(room, sae->stride * sizeof *rows);
    int status = rows ? new_batch(&batch, sae, room) : SC_FAILED;
    batch.reconstruct = 0;
    for (size_t first = 0; first < tokens && status == SC_OK; first += room) {
        size_t some = tokens - first < room ? tokens - first : room;
        pad_rows(rows, x + first * sae->d_in, some, sae->d_in, sae->stride);
        status = run_sae(&batch, rows, some);
        if (status == SC_OK) spread_batch(&batch, f + first * sae->d_sae);
    }
    free_batch(&batch);
    free(rows);
    return status;
}

/* sc_sae_decode_plain() as one matrix product. */
int sc_sae_decode(const sc_sae *sae, const float *f, size_t tokens, float *reconstruction) {
    size_t n = sae->d_sae, D = sae->d_in;
    tile_target to = { .c = reconstruction, .c_stride = D, .bias = sae->b_dec };
    packed_matrix W_dec = { 0 };
    SC_TRY(check_rows(f, tokens, n, "f"));
    SC_TRY(choose_kernels());
    SC_TRY(new_packed(&W_dec, n, D));
    pack_panels(&W_dec, 0, W_dec.panels, sae->W_dec, sae->stride, 1);
    int status = multiply(f, tokens, n, &W_dec, to);
    free(W_dec.data);
    return status;
}

/* ============================================================================================
 * 11. Training steps
 *
 * sc_train_step() gives the bits of sc_train_step_plain(), see section 4 for the formulas, but with
 * sparse codes, in tiles of tokens and groups of latents:
 *   rows of W_dec to unit norm                                unit_task
 *   encode and decode, tile by tile                           run_sae (section 10)
 *   losses; dx' in the place of x'; the ghost loss and dg     output_gradient_task
 *   for each group of latents, whose rows stay in cache: dW_dec, dW_enc and db_enc, from the codes
 *   where they are few, else as products; projection; Adam    update_task
 *   db_dec and Adam                                           b_dec_task
 * ============================================================================================ */

/* The workspace of fast steps. T: tokens in a step; stride: D padded to 16 */
typedef struct fast_trainer {
    sc_trainer *state;
    sc_sae *sae;                             /* the state's */
    sae_batch batch;
    float *x;                                /* [T, stride], for a caller whose rows are not padded */
    adam_step adam;
    int ghosts;                              /* whether this step has dead latents to revive */
    float *ghost;                            /* [T, stride], g = W_dec^T exp(h), later its gradient */
    double *token_loss;                      /* [T], a token's part of a loss */
    packed_matrix x_rows, g_rows, ghost_rows;/* [T, D]: centred, dx' and dg for products */
    float *db_enc;                           /* [n] */
    float *W_enc_db;                         /* [chains of n][stride], chains of W_enc db_enc */
    double *deviation, *square;              /* [stride], sum over tokens of (x - mean)^2, of x^2 */
    unsigned char *scratch;                  /* [workers][scratch_bytes] */
    size_t scratch_bytes;
    memory_list memory;
} fast_trainer;

/* One worker's memory for a group of latents in the backward pass. R: rows_at_once(T); Tp: T padded
 * to whole panels. */
typedef struct {
    float *f, *dh, *e;                       /* [R, Tp], e = exp(h) of dead latents */
    uint32_t *token;                         /* [T], where a latent fires */
    float *code_f, *code_dh;                 /* [T], its f and dh there */
    float *dW_enc, *dW_dec, *extra;          /* [R, stride] */
    float *buffer;                           /* for load_rows */
} backward_scratch;

static size_t padded_tokens(const fast_trainer *t) { return padded(t->batch.room) + MAX_COLUMNS; }

static size_t lay_out_backward(backward_scratch *s, const fast_trainer *t, void *memory) {
    size_t R = rows_at_once(t->batch.room), T = padded_tokens(t), stride = t->sae->stride;
    size_t deepest = T > stride ? T : stride;        /* of a product: over tokens, or W_enc^T x */
    const array_spec arrays[] = {
        ARRAY(s->f, T, R), ARRAY(s->dh, T, R), ARRAY(s->e, t->state->options.ghost ? T : 0, R),
        ARRAY(s->token, T, 1), ARRAY(s->code_f, T, 1), ARRAY(s->code_dh, T, 1),
        ARRAY(s->dW_enc, R, stride), ARRAY(s->dW_dec, R, stride), ARRAY(s->extra, R, stride),
        ARRAY(s->buffer, row_buffer_size(deepest), 1) };
    return lay_out(arrays, COUNT(arrays), memory);
}

static int prepare_fast_trainer(fast_trainer *t, size_t T) {
    size_t n = t->sae->d_sae, D = t->sae->d_in, stride = t->sae->stride, N = padded(n);
    size_t ghosts = 0, columns = panels_of(D) * (size_t)kernels->columns;
    backward_scratch s;
    if (t->state->options.ghost) ghosts = T;
    SC_TRY(new_batch(&t->batch, t->sae, T));
    t->scratch_bytes = lay_out_backward(&s, t, NULL);
    t->x_rows = (packed_matrix){ .K = T, .N = D, .panels = panels_of(D) };
    t->g_rows = t->ghost_rows = t->x_rows;
    const array_spec arrays[] = {
        ARRAY(t->x, D == stride ? 0 : T, stride), ARRAY(t->x_rows.data, T, columns),
        ARRAY(t->g_rows.data, T, columns), ARRAY(t->ghost_rows.data, ghosts, columns),
        ARRAY(t->ghost, ghosts, stride), ARRAY(t->token_loss, T, 1),
        ARRAY(t->deviation, stride, 1), ARRAY(t->square, stride, 1), ARRAY(t->db_enc, N, 1),
        ARRAY(t->W_enc_db, chains_of(n), stride),
        ARRAY(t->scratch, (size_t)thread_count(), t->scratch_bytes) };
    return new_arrays(&t->memory, arrays, COUNT(arrays));
}

void sc_trainer_free(sc_trainer *t) {
    if (!t) return;
    if (t->fast) {
        free_batch(&t->fast->batch);
        release(&t->fast->memory);
        free(t->fast);
    }
    release(&t->memory);
    free(t);
}

static int prepare_trainer(sc_trainer *t) {
    size_t n = t->sae->d_sae, stride = t->sae->stride, N = padded(n);
    const array_spec arrays[] = {
        ARRAY(t->silent, n, 1), ARRAY(t->W_enc.m, n, stride), ARRAY(t->W_enc.v, n, stride),
        ARRAY(t->W_dec.m, n, stride), ARRAY(t->W_dec.v, n, stride), ARRAY(t->b_enc.m, N, 1),
        ARRAY(t->b_enc.v, N, 1), ARRAY(t->b_dec.m, stride, 1), ARRAY(t->b_dec.v, stride, 1) };
    SC_TRY(new_arrays(&t->memory, arrays, COUNT(arrays)));
    t->fast = new_array(1, sizeof *t->fast);
    if (!t->fast) return SC_FAILED;
    t->fast->state = t;
    t->fast->sae = t->sae;
    return prepare_fast_trainer(t->fast, t->tokens);
}

sc_trainer *sc_trainer_new(sc_sae *sae, const sc_train_options *options, size_t tokens) {
    if (check_k(sae) != SC_OK || choose_kernels() != SC_OK) return NULL;
    if (tokens == 0 || tokens > SC_MAX_BATCH_TOKENS) {
        usage("a training step of %zu tokens (expected 1 to %d)", tokens, SC_MAX_BATCH_TOKENS);
        return NULL;
    }
    sc_trainer *t = new_array(1, sizeof *t);
    if (!t) return NULL;
    *t = (sc_trainer){ .options = *options, .sae = sae, .tokens = tokens, .beta1_power = 1,
                       .beta2_power = 1 };
    if (prepare_trainer(t) == SC_OK) return t;
    sc_trainer_free(t);
    return NULL;
}

static int unit_task(void *context, size_t block) {
    const sc_sae *sae = context;
    for (size_t j = block * CHAIN; j < sae->d_sae && j < (block + 1) * CHAIN; j++)
        kernels->unit_row(sae->W_dec + j * sae->stride, sae->stride);
    return SC_OK;
}

/* W_dec^T exp(h) over the dead latents, for a tile. */
static void ghost_decode(fast_trainer *t, const tile_codes *tile, tile_scratch *s) {
    const sc_sae *sae = t->sae;
    size_t rows = rows_at_once(sae->d_in);
    packed_matrix panels = tile_panels(&t->batch, tile);
    float *out = t->ghost + tile->first * sae->stride;
    memset(out, 0, tile->tokens * sae->stride * sizeof *out);
    for (size_t block = 0; block < sae->d_sae; block += CHAIN) {
        size_t latents = sae->d_sae - block < CHAIN ? sae->d_sae - block : CHAIN;
        size_t dead[CHAIN], count = 0;
        for (size_t j = block; j < block + latents; j++)
            if (is_dead(t->state, j)) dead[count++] = j;
        if (count == 0) continue;
        memset(s->dense, 0, TILE_TOKENS * CHAIN * sizeof *s->dense);
        for (size_t i = 0; i < count; i++) {
            float *h = s->h + i % rows * TILE_TOKENS;
            if (i % rows == 0)
                pre_activations(sae, 0, dead + i, count - i < rows ? count - i : rows, &panels,
                                s->h, TILE_TOKENS, s->buffer);
            kernels->exponentials(h, tile->tokens);
            for (size_t k = 0; k < tile->tokens; k++) s->dense[k * CHAIN + dead[i] - block] = h[k];
        }
        decode_dense(sae, tile->tokens, block, latents, out, s);
    }
}

/* Ghost loss of a tile, then its x' becomes the gradient with respect to x'. */
static int output_gradient_task(void *context, size_t task) {
    fast_trainer *t = context;
    const sc_sae *sae = t->sae;
    sae_batch *batch = &t->batch;
    const tile_codes *tile = &batch->tile[task];
    tile_scratch s = worker_scratch(batch);
    double scale = 1.0 / ((double)batch->T * (double)sae->d_in);
    if (t->ghosts) ghost_decode(t, tile, &s);
    for (size_t i = tile->first; i < tile->first + tile->tokens; i++) {
        const float *x = batch->x + i * sae->stride;
        float *output = batch->output + i * sae->stride;
        float factor = (float)(2 * scale / batch->norm[i]);
        t->token_loss[i] = !t->ghosts ? 0
            : ghost_token(t->ghost + i * sae->stride, t->ghost + i * sae->stride, x, output, s.sum,
                          batch->norm[i], sae->d_in, scale);
        for (size_t d = 0; d < sae->stride; d++) output[d] = (output[d] - x[d]) * factor;
    }
    return SC_OK;
}

static int pack_rows_task(void *context, size_t panel) {
    fast_trainer *t = context;
    size_t stride = t->sae->stride;
    pack_panels(&t->x_rows, panel, panel + 1, t->batch.centred, stride, 1);
    pack_panels(&t->g_rows, panel, panel + 1, t->batch.output, stride, 1);
    if (t->ghosts) pack_panels(&t->ghost_rows, panel, panel + 1, t->ghost, stride, 1);
    return SC_OK;
}

static size_t count_codes(const sae_batch *batch, size_t j) {
    size_t count = 0;
    for (size_t i = 0; i < batch->tiles; i++)
        count += batch->tile[i].start[j + 1] - batch->tile[i].start[j];
    return count;
}

/* sum over tokens of dh in float64, in blocks of 256. dh: [count], of the tokens listed, or all */
static double sum_by_blocks(const uint32_t *token, const float *dh, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count;) {
        size_t end = ((token ? token[i] : i) / CHAIN + 1) * CHAIN;
        double part = 0;
        for (; i < count && (token ? token[i] : i) < end; i++) part += dh[i];
        sum += part;
    }
    return sum;
}

/* Of the L1 loss with respect to any f above 0. */
static float l1_gradient(const fast_trainer *t) {
    return t->sae->topk ? 0 : (float)(t->state->options.l1 / (double)t->batch.T);
}

/* Where latent j fires: the tokens in order, f and dh there. Returns how many they are. */
static size_t gather_codes(const fast_trainer *t, size_t j, backward_scratch *s) {
    const sae_batch *batch = &t->batch;
    const sc_sae *sae = t->sae;
    float l1 = l1_gradient(t);
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
static void sparse_gradients(fast_trainer *t, size_t j, size_t count, backward_scratch *s) {
    size_t stride = t->sae->stride;
    memset(s->dW_dec, 0, count * stride * sizeof *s->dW_dec);
    memset(s->dW_enc, 0, count * stride * sizeof *s->dW_enc);
    for (size_t i = 0; i < count; i++) {
        size_t codes = gather_codes(t, j + i, s);
        for (size_t k = 0, next; k < codes; k = next) {
            size_t end = (s->token[k] / CHAIN + 1) * CHAIN;
            for (next = k; next < codes && s->token[next] < end;) next++;
            kernels->add_chain(s->code_f + k, s->token + k, next - k, t->batch.output,
                               s->dW_dec + i * stride, stride);
            kernels->add_chain(s->code_dh + k, s->token + k, next - k, t->batch.centred,
                               s->dW_enc + i * stride, stride);
        }
        t->db_enc[j + i] = (float)sum_by_blocks(s->token, s->code_dh, codes);
    }
}

/* What the ghost loss adds to dW_dec, and to dh of the dead among latents j .. j + count - 1; f is
 * overwritten. */
static void ghost_gradients(const fast_trainer *t, size_t j, size_t count, backward_scratch *s) {
    const sae_batch *batch = &t->batch;
    size_t row = padded_tokens(t), stride = t->sae->stride;
    tile_target to = { .c = s->extra, .c_stride = stride };
    pre_activations(t->sae, j, NULL, count, &batch->panels, s->e, row, s->buffer);
    kernels->dot_table(t->sae->W_dec + j * stride, count, t->ghost, batch->T, stride, s->f, row);
    for (size_t i = 0; i < count; i++) {
        float *e = s->e + i * row;
        if (is_dead(t->state, j + i)) kernels->exponentials(e, batch->T);
        else memset(e, 0, batch->T * sizeof *e);
        for (size_t k = 0; is_dead(t->state, j + i) && k < batch->T; k++)
            s->dh[i * row + k] += e[k] * s->f[i * row + k];
    }
    product_rows(s->e, row, NULL, count, &t->ghost_rows, 0, t->ghost_rows.panels, &to, s->buffer);
    for (size_t e = 0; e < count * stride; e++) s->dW_dec[e] += s->extra[e];
}

/* f and dh of latent j over all tokens: dh, which holds df, keeps it where the latent fires.
 * f, dh: [T] */
static void spread_codes(const fast_trainer *t, size_t j, float *f, float *dh) {
    const sae_batch *batch = &t->batch;
    float l1 = l1_gradient(t);
    size_t at = 0;
    for (size_t i = 0; i < batch->tiles; i++)
        for (code_walk w = walk_codes(&batch->tile[i], j); next_code(&w); at++) {
            for (; at < batch->tile[i].first + w.token; at++) f[at] = dh[at] = 0;
            f[at] = w.value;
            dh[at] += l1;
        }
    for (; at < batch->T; at++) f[at] = dh[at] = 0;
}

/* The same gradients as products over all tokens; also where dead latents take part. */
static void dense_gradients(fast_trainer *t, size_t j, size_t count, int ghosts, backward_scratch *s) {
    size_t row = padded_tokens(t), stride = t->sae->stride;
    tile_target to_dec = { .c = s->dW_dec, .c_stride = stride };
    tile_target to_enc = { .c = s->dW_enc, .c_stride = stride };
    kernels->dot_table(t->sae->W_dec + j * stride, count, t->batch.output, t->batch.T, stride, s->dh,
                       row);
    for (size_t i = 0; i < count; i++) spread_codes(t, j + i, s->f + i * row, s->dh + i * row);
    product_rows(s->f, row, NULL, count, &t->g_rows, 0, t->g_rows.panels, &to_dec, s->buffer);
    if (ghosts) ghost_gradients(t, j, count, s);
    product_rows(s->dh, row, NULL, count, &t->x_rows, 0, t->x_rows.panels, &to_enc, s->buffer);
    for (size_t i = 0; i < count; i++)
        t->db_enc[j + i] = (float)sum_by_blocks(NULL, s->dh + i * row, t->batch.T);
}

/* Gradients and Adam for a group of latents. */
static int update_latents(fast_trainer *t, size_t j, size_t count, float *W_enc_db,
                          backward_scratch *s) {
    const sc_sae *sae = t->sae;
    const adam_moments m_dec = t->state->W_dec, m_enc = t->state->W_enc;
    size_t stride = sae->stride, terms = 0;
    int ghosts = 0;
    for (size_t i = 0; i < count; i++) {
        terms += count_codes(&t->batch, j + i);
        ghosts |= t->ghosts && is_dead(t->state, j + i);
    }
    if (ghosts || terms * DENSE_SHARE > count * t->batch.T) dense_gradients(t, j, count, ghosts, s);
    else sparse_gradients(t, j, count, s);
    for (size_t i = 0; i < count; i++) {
        size_t row = (j + i) * stride;
        float *W_dec = sae->W_dec + row, *dW_dec = s->dW_dec + i * stride;
        float *W_enc = sae->W_enc + row, *dW_enc = s->dW_enc + i * stride;
        kernels->add_scaled(-kernels->dot(dW_dec, W_dec, stride), W_dec, dW_dec, stride);
        kernels->add_scaled(t->db_enc[j + i], W_enc, W_enc_db, stride);
        kernels->adam(W_dec, m_dec.m + row, m_dec.v + row, dW_dec, stride, t->adam);
        kernels->adam(W_enc, m_enc.m + row, m_enc.v + row, dW_enc, stride, t->adam);
        t->state->silent[j + i]++;
        if (count_codes(&t->batch, j + i) > 0) t->state->silent[j + i] = 0;
        SC_TRY(check_latent(t->state, j + i));
    }
    return SC_OK;
}

static int update_task(void *context, size_t block) {
    fast_trainer *t = context;
    size_t rows = rows_at_once(t->batch.room), end = (block + 1) * CHAIN;
    float *W_enc_db = t->W_enc_db + block * t->sae->stride;
    backward_scratch s;
    lay_out_backward(&s, t, t->scratch + worker * t->scratch_bytes);
    memset(W_enc_db, 0, t->sae->stride * sizeof *W_enc_db);
    if (end > t->sae->d_sae) end = t->sae->d_sae;
    for (size_t j = block * CHAIN; j < end; j += rows)
        SC_TRY(update_latents(t, j, end - j < rows ? end - j : rows, W_enc_db, &s));
    return SC_OK;
}

/* Sums over T rows of 16 dimensions, in float64, in blocks of 256 rows: of x, or where there is a
 * centre of (x - centre)^2. x: [T, stride]; centre, sum: [16] */
static void column_sums(const float *x, size_t T, size_t stride, const double *centre,
                        double *sum) {
    memset(sum, 0, PARTIALS * sizeof *sum);
    for (size_t block = 0; block < T; block += CHAIN) {
        double part[PARTIALS] = { 0 };
        for (size_t t = block; t < T && t < block + CHAIN; t++) {
            for (int d = 0; d < PARTIALS; d++) {
                double value = x[t * stride + d];
                if (centre) value = (value - centre[d]) * (value - centre[d]);
                part[d] += value;
            }
        }
        for (int d = 0; d < PARTIALS; d++) sum[d] += part[d];
    }
}

/* b_dec's gradient, the sum over tokens of x' gradient less W_enc db_enc: 16 dimensions a task. */
static int b_dec_task(void *context, size_t task) {
    fast_trainer *t = context;
    size_t stride = t->sae->stride, first = task * PARTIALS;
    double sum[PARTIALS];
    float gradient[PARTIALS], along[PARTIALS] = { 0 };
    column_sums(t->batch.output + first, t->batch.T, stride, NULL, sum);
    for (size_t block = 0; block < chains_of(t->sae->d_sae); block++)
        for (int d = 0; d < PARTIALS; d++) along[d] += t->W_enc_db[block * stride + first + d];
    for (int d = 0; d < PARTIALS; d++) gradient[d] = (float)sum[d] - along[d];
    kernels->adam(t->sae->b_dec + first, t->state->b_dec.m + first, t->state->b_dec.v + first, gradient, PARTIALS,
                  t->adam);
    return SC_OK;
}

/* The sums over tokens of (x - mean)^2 and of x^2, 16 dimensions per task. */
static int variance_task(void *context, size_t task) {
    fast_trainer *t = context;
    const float *x = t->batch.x + task * PARTIALS;
    const double zero[PARTIALS] = { 0 };
    double mean[PARTIALS];
    column_sums(x, t->batch.T, t->sae->stride, NULL, mean);
    for (int d = 0; d < PARTIALS; d++) mean[d] /= (double)t->batch.T;
    column_sums(x, t->batch.T, t->sae->stride, mean, t->deviation + task * PARTIALS);
    column_sums(x, t->batch.T, t->sae->stride, zero, t->square + task * PARTIALS);
    return SC_OK;
}

/* Refuses what is not finite, naming the token (of the batch) where there is one. */
static int check_batch(const sae_batch *batch, size_t *bad) {
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

static int measure_losses(fast_trainer *t, sc_step *result, size_t *bad) {
    const sae_batch *batch = &t->batch;
    size_t T = batch->T, D = t->sae->d_in;
    double tokens = (double)T, numbers = tokens * (double)D;
    SC_TRY(check_batch(batch, bad));
    SC_TRY(parallel_for(t->sae->stride / PARTIALS, variance_task, t));
    double error = sum_in_blocks(batch->squared_error, T);
    double deviation = sum_in_blocks(t->deviation, D), square = sum_in_blocks(t->square, D);
    if (deviation > 0) result->explained_variance = 1 - error / deviation;
    if (square > 0) result->explained_variance_uncentred = 1 - error / square;
    for (size_t i = 0; i < T; i++) t->token_loss[i] = batch->squared_error[i] / batch->norm[i];
    result->mse = sum_in_blocks(t->token_loss, T) / numbers;
    result->l0 = sum_in_blocks(batch->active, T) / tokens;
    if (!t->sae->topk) {
        double l1 = sum_in_blocks(batch->sum_f, T) / tokens;
        result->l1 = t->state->options.l1 * l1;
    }
    SC_TRY(parallel_for(batch->tiles, output_gradient_task, t));
    result->ghost = sum_in_blocks(t->token_loss, T) / numbers;
    result->loss = result->mse + result->l1 + result->ghost;
    if (isfinite(result->loss)) return SC_OK;
    return fail("the loss is not finite");
}

/* One training step. x: [T, stride], padded rows; bad: the token at fault, or SIZE_MAX */
static int train_step(sc_trainer *state, const float *x, sc_step *result, size_t *bad) {
    fast_trainer *t = state->fast;
    sc_sae *sae = t->sae;
    size_t n = sae->d_sae, T = state->tokens, blocks = chains_of(n);
    *bad = SIZE_MAX;
    *result = (sc_step){ .lr = learning_rate(&state->options, state->step) };
    for (size_t j = 0; j < n; j++) result->dead += (size_t)is_dead(state, j);
    t->ghosts = state->options.ghost && result->dead > 0;
    SC_TRY(parallel_for(blocks, unit_task, sae));
    SC_TRY(run_sae(&t->batch, x, T));
    SC_TRY(measure_losses(t, result, bad));
    t->adam = next_adam_step(state, result->lr);
    t->x_rows.K = t->g_rows.K = t->ghost_rows.K = T;
    SC_TRY(parallel_for(t->x_rows.panels, pack_rows_task, t));
    SC_TRY(parallel_for(blocks, update_task, t));
    SC_TRY(parallel_for(sae->stride / PARTIALS, b_dec_task, t));
    kernels->adam(sae->b_enc, state->b_enc.m, state->b_enc.v, t->db_enc, padded(n), t->adam);
    state->step++;
    return check_biases(state);
}

int sc_train_step(sc_trainer *t, const float *x, sc_step *result) {
    const sc_sae *sae = t->sae;
    size_t bad;
    SC_TRY(check_tokens(x, t->tokens, sae->d_in));
    if (sae->stride != sae->d_in) x = pad_rows(t->fast->x, x, t->tokens, sae->d_in, sae->stride);
    return train_step(t, x, result, &bad);
}


/* ********************************************************************************************
 * Part III: data in and out
 *
 * Options and messages, files, images, data sets, the files of models and SAEs, activations.
 * ******************************************************************************************** */

/* ============================================================================================
 * 13. Options and messages
 *
 * What the command line says, and what the program says on standard error.
 * ============================================================================================ */

enum { MAX_OPERANDS = 1024 };        /* also the most shards of a data set */

/* What the command line says. Texts are NULL, numbers 0 where not given, unless options have a
 * default (see the table of options at the end). */
typedef struct {
    const char *output, *model, *acts, *stats, *also, *latents, *format, *dtype, *tokens, *hook;
    const char *crop, *order, *log, *checkpoint, *init, *b_dec, *arch, *mask, *patch, *shard;
    const char *operand[MAX_OPERANDS + 1];   /* IMAGES, files or lines of bench; NULL ends them */
    sc_model_options settings;
    const char *sae[SC_MAX_TAPS];
    size_t saes;
    long layer, threads, size, square, limit, k, expansion, d_sae, batch, steps, warmup;
    long b_dec_images, dead_window, checkpoint_every, top, top_patches, class_index;
    double l1, lr, epochs, threshold, max_frequency, rtol, atol, seed;
    int quiet, skip_bad, ghost, resume, class_counts, dense, reconstruction, image_means;
    uint64_t given;                          /* bit i: row i of the table was given */
} options;

static int quiet, line_open;         /* line_open: progress stands on the terminal */

enum { TEXT_ROOM = 600 };            /* of a text that is shown */

static const char *printable(const char *text, char *out, size_t room);
static int check_maps(void);

/* A line on standard error. */
SC_PRINTF(1, 2) static void note(const char *format, ...) {
    char line[sizeof error_text], safe[4 * sizeof line];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (quiet) return;
    fprintf(stderr, "%ssaeclip: %s\n", line_open ? "\n" : "", printable(line, safe, sizeof safe));
    line_open = 0;
}

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Progress on standard error: redrawn on a terminal, else a line now and then; words end it. The
 * first call only takes the time. total may be SIZE_MAX: not known. */
static void show_progress(const char *what, uint64_t done, uint64_t total, uint64_t images,
                          const char *words) {
    static double first, last;
    static uint64_t begin, begin_images;
    double now = seconds_now(), passed = now - first;
    int terminal = isatty(STDERR_FILENO), ends = done == total;
    if (first == 0 || done <= begin) {
        first = last = now;
        begin = done;
        begin_images = images;
        return;
    }
    if (quiet || (ends ? !terminal && passed < 20 : now - last < (terminal ? 0.2 : 20))) return;
    last = now;
    line_open = terminal && !ends;
    fprintf(stderr, "%s%s %ju", terminal ? "\r\033[K" : "saeclip: ", what, (uintmax_t)done);
    if (total != SIZE_MAX) fprintf(stderr, " of %ju", (uintmax_t)total);
    fprintf(stderr, ", %.1f images/s", (double)(images - begin_images) / passed);
    if (total != SIZE_MAX && !ends)
        fprintf(stderr, ", %.0f s left", passed / (double)(done - begin) * (double)(total - done));
    fprintf(stderr, "%s%s", words, line_open ? "" : "\n");
}

/* Whether all that was printed reached standard output. A reader that went away is told nothing. */
static int end_of_output(void) {
    int lost = fflush(stdout) != 0;
    if (!lost && !ferror(stdout)) return check_maps();
    /* It may have failed long ago, and musl then forgets the rest: another byte tells why. */
    if (!lost && write(STDOUT_FILENO, "\n", 1) == 1) errno = EIO;
    if (errno == EPIPE) return fail("%s", "");
    return fail("standard output: cannot be written: %s", strerror(errno));
}

/* The whole text as a finite number from least to most. */
static int parse_number(const char *text, const char *what, double least, double most,
                        double *value) {
    char *end;
    *value = strtod(text, &end);
    if (end == text || *end != '\0' || !(*value >= least && *value <= most))
        return usage("%s: '%s' is no number from %g to %g", what, text, least, most);
    return SC_OK;
}

/* "r,g,b" */
static int parse_triple(const char *text, const char *what, float *value) {
    double rgb[3];
    char more;
    int good = sscanf(text, "%lf,%lf,%lf%c", &rgb[0], &rgb[1], &rgb[2], &more) == 3;
    for (int c = 0; c < 3 && good; c++) good = isfinite(value[c] = (float)rgb[c]);
    return good ? SC_OK : usage("%s: 'R,G,B' was expected, three numbers", what);
}

/* ============================================================================================
 * 14. Files
 *
 * Numbers as bytes, digests, JSON, safetensors in, atomic output, safetensors out.
 *
 * A safetensors file is 8 bytes with the size of the header, the header, and the tensors' data
 * without gaps, all little-endian. The header is a JSON object of three levels:
 *     {"__metadata__": {"key": "value", ...},
 *      "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
 * (github.com/huggingface/safetensors). Files come from strangers: nothing in them is believed
 * before it is checked, and memory is bounded by the header that is really there.
 * ============================================================================================ */

/* Copies count numbers of size bytes between memory and file, either way. On a big-endian machine
 * byte b of a number changes place with byte b ^ (size - 1). */
static void copy_numbers(void *to, const void *from, size_t count, size_t size) {
    const uint16_t one = 1;
    const unsigned char *in = from;
    unsigned char *out = to, little;
    memcpy(&little, &one, 1);
    if (little && count > 0) memcpy(out, in, count * size);
    for (size_t i = 0; !little && i < count * size; i++) out[i ^ (size - 1)] = in[i];
}

/* IEEE 754 binary16: sign, 5 bits of exponent (bias 15), 10 of fraction. Exact. */
static float float_of_half(uint32_t half) {
    uint32_t sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
    float small = float_of_bits(rest + (113u << 23)) - float_of_bits(113u << 23);
    uint32_t bits = rest + ((half & 0x7c00) == 0x7c00 ? 224u << 23 : 112u << 23);
    return float_of_bits(sign | ((half & 0x7c00) == 0 ? bits_of_float(small) : bits));
}

/* Rounds to nearest, ties to even; from 65520 on that is infinity. */
static uint16_t half_of_float(float value) {
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) rest = 0x7e00;                                 /* not a number */
    else if (rest >= 0x47800000) rest = 0x7c00;                           /* 65536 and beyond */
    else if (rest >= 0x38800000) rest = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
    else rest = bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f);
    return (uint16_t)(sign | rest);    /* the addition just above rounds to units of 2^-24 */
}

/* A running digest of bytes, against accidents, not against malice: every step is one-to-one in
 * the word it takes in, so a change within one word always shows. Starts as { 0 }. */
typedef struct { uint64_t state, length, word; } digest64;   /* word: the last length % 8 bytes */

static uint64_t digest64_step(uint64_t state, uint64_t word) {
    state = (state ^ word) * 0x9e3779b97f4a7c15u;
    return state ^ state >> 32;
}

/* Adds a little-endian number of so many bytes, 1 to 8. */
static void digest64_take(digest64 *digest, uint64_t number, unsigned bytes) {
    unsigned held = digest->length % 8;
    digest->word |= number << 8 * held;
    digest->length += bytes;
    if (held + bytes < 8) return;
    digest->state = digest64_step(digest->state, digest->word);
    digest->word = held ? number >> (64 - 8 * held) : 0;
}

static void digest64_number(digest64 *digest, uint64_t n) { digest64_take(digest, n, 8); }

static void digest64_add(digest64 *digest, const void *bytes, size_t count) {
    for (const unsigned char *byte = bytes; count > 0; count--) digest64_take(digest, *byte++, 1);
}

/* The digest of all that was added so far; more may follow. */
static uint64_t digest64_value(const digest64 *digest) {
    uint64_t state = digest64_step(digest->state, digest->word);
    return digest64_step(digest64_step(state, digest->length), 0);
}

/* --- JSON (RFC 8259), strict; only what safetensors headers and lists of names are made of ---
 *
 * The text is ours and ends with a NUL, which no rule accepts, so it needs no other bound. Strings
 * are decoded in place: that never lengthens them, and the closing quote makes room for a NUL.
 * After the first error nothing is taken any more and lists end: only the end need look. */

static const char json_blanks[] = " \t\n\r";

/* what: whose JSON this is, for errors; at: never at blanks */
typedef struct { const char *what; char *text; size_t at; int failed; } json;

static void json_expect(json *j, int met, const char *expected) {
    if (!met && !j->failed)
        j->failed = fail("%s: JSON byte %zu: expected %s", j->what, j->at, expected);
}

/* Whether c comes next; it is taken, and the blanks behind it. */
static int json_take(json *j, char c) {
    if (j->failed || j->text[j->at] != c) return 0;
    j->at++;
    j->at += strspn(j->text + j->at, json_blanks);
    return 1;
}

/* The length of the UTF-8 character at text, 0 if there is none: a control byte, a stray byte, an
 * overlong form, a surrogate or beyond U+10FFFF (RFC 3629). */
static size_t utf8_length(const char *text) {
    static const uint32_t least[] = { 0, ' ', 0x80, 0x800, 0x10000 };
    const unsigned char *byte = (const unsigned char *)text;
    size_t length = byte[0] < 0x80 ? 1 : byte[0] >> 5 == 0x06 ? 2 : byte[0] >> 4 == 0x0e ? 3
                  : byte[0] >> 3 == 0x1e ? 4 : 0;
    uint32_t code = length == 1 ? byte[0] : byte[0] & 0x7fu >> length;
    for (size_t i = 1; i < length; i++) {
        if (byte[i] >> 6 != 2) return 0;
        code = code << 6 | (byte[i] & 0x3f);
    }
    return code < least[length] || code >> 11 == 0x1b || code > 0x10ffff ? 0 : length;
}

/* The value of "\uXXXX" at text; 0, which no string may hold, also if that is not there. */
static uint32_t json_unit(const char *text) {
    char digits[5] = "";
    if (strncmp(text, "\\u", 2) != 0 || strspn(text + 2, "0123456789abcdefABCDEF") < 4) return 0;
    memcpy(digits, text + 2, 4);
    return (uint32_t)strtoul(digits, NULL, 16);
}

/* Decodes the escape at text to *to, which moves on. The escape's length; 0 if it is invalid. */
static size_t json_escape(const char *text, char **to) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    static const unsigned char lead[] = { 0x00, 0xc0, 0xe0, 0xf0 };
    const char *letter = text[1] ? strchr(letters, text[1]) : NULL;
    uint32_t code = letter ? (uint32_t)meanings[letter - letters] : json_unit(text);
    uint32_t low = code >> 10 == 0x36 ? json_unit(text + 6) : 0;       /* of a surrogate pair */
    if (low >> 10 == 0x37) code = 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff));
    if (code == 0 || code >> 11 == 0x1b) return 0;
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *(*to)++ = (char)(lead[more] | code >> 6 * more);
    for (int i = more; i-- > 0;) *(*to)++ = (char)(0x80 | (code >> 6 * i & 0x3f));
    return letter ? 2 : more == 3 ? 12 : 6;
}

static char *json_string(json *j) {
    char *start = j->text + j->at + 1, *to = start;
    json_expect(j, start[-1] == '"', "a string");
    j->at += !j->failed;
    for (size_t length; !j->failed && j->text[j->at] != '"'; j->at += length) {
        const char *from = j->text + j->at;
        int escaped = *from == '\\';
        length = escaped ? json_escape(from, &to) : utf8_length(from);
        json_expect(j, length > 0, escaped ? "a valid escape" : "valid UTF-8 and no control byte");
        if (!escaped) to = (char *)memmove(to, from, length) + length;
    }
    if (json_take(j, '"')) *to = '\0';
    return start;
}

/* Where element `index` of a list in these brackets begins, of an object its key, behind which the
 * value comes next; NULL behind the list's end. */
static char *json_next(json *j, size_t index, const char *brackets) {
    int object = *brackets == '{';
    if (index == 0) json_expect(j, json_take(j, *brackets), object ? "'{'" : "'['");
    if (json_take(j, brackets[1])) return NULL;
    if (index > 0) json_expect(j, json_take(j, ','), object ? "',' or '}'" : "',' or ']'");
    char *element = object ? json_string(j) : j->text + j->at;
    if (object) json_expect(j, json_take(j, ':'), "':'");
    return j->failed ? NULL : element;
}

/* An array of at most `most` sizes; returns how many. */
static size_t json_sizes(json *j, size_t *sizes, size_t most) {
    size_t n = 0;
    for (const char *text; (text = json_next(j, n, "[]")) != NULL; n++) {
        size_t digits = strspn(text, "0123456789");
        errno = 0;
        unsigned long long value = strtoull(text, NULL, 10);
        json_expect(j, digits && (*text != '0' || digits == 1) && !errno && (size_t)value == value,
                    "a whole number that this machine can address");
        json_expect(j, n < most, most == 2 ? "2 numbers" : "at most 8 numbers");
        if (n < most) sizes[n] = (size_t)value;
        j->at += digits + strspn(text + digits, json_blanks);
    }
    return n;
}

/* text: a JSON array of strings, as metadata hold lists of names. The strings follow the pointers
 * in one block, which free(*out) gives back. */
static int json_string_array(const char *text, const char *what, char ***out, size_t *count) {
    size_t length = strlen(text), most = 1;
    for (const char *c = text; *c; c++) most += *c == ',';
    char **list = new_array(most * sizeof *list + length + 1, 1);
    if (!list) return SC_FAILED;
    json j = { .what = what, .text = memcpy(list + most, text, length + 1) };
    j.at = strspn(text, json_blanks);
    for (*count = 0; json_next(&j, *count, "[]"); ++*count) list[*count] = json_string(&j);
    json_expect(&j, j.at == length, "nothing behind the list");
    if (j.failed) free(list);
    else *out = list;
    return j.failed;
}

/* The control character at text, 0 if there is none; Latin-1's too (in UTF-8 C2 80 to C2 9F), and
 * what ends lines or turns text around (U+2028 to 202E, 2066 to 2069). */
static unsigned control_at(const char *text) {
    const unsigned char *byte = (const unsigned char *)text;
    if (*byte == 0xc2) return byte[1] >= 0x80 && byte[1] < 0xa0 ? byte[1] : 0;
    if (*byte == 0xe2 && byte[1] == 0x80 && byte[2] >= 0xa8 && byte[2] <= 0xae)
        return 0x1f80u + byte[2];
    if (*byte == 0xe2 && byte[1] == 0x81 && byte[2] >= 0xa6 && byte[2] <= 0xa9)
        return 0x1fc0u + byte[2];
    return *byte < ' ' || *byte == 127 ? *byte : 0;
}

/* text as a JSON string; a byte that is not part of valid UTF-8 becomes U+FFFD. < is escaped, too:
 * it could end a script that this stands in. */
static void print_json(FILE *out, const char *text) {
    putc('"', out);
    for (size_t length; *text; text += length ? length : 1) {
        length = utf8_length(text);
        unsigned code = *text == '<' ? '<' : control_at(text);
        if (code) fprintf(out, "\\u%04x", code);
        else if (length == 0) fputs("\xef\xbf\xbd", out);
        else if (*text == '"' || *text == '\\') fprintf(out, "\\%c", *text);
        else fwrite(text, 1, length, out);
    }
    putc('"', out);
}

/* --- Reading safetensors --- */

enum { MAX_HEADER = 100000000 };     /* the reference implementation's limit */

/* As sc_dtype has them. */
static const struct { const char *name; size_t size; } dtypes[] = {
    { "F32", 4 }, { "F16", 2 }, { "BF16", 2 }, { "F64", 8 }, { "I64", 8 }, { "I32", 4 },
    { "U8", 1 }, { "BOOL", 1 }, { "I8", 1 }, { "I16", 2 }, { "U16", 2 }, { "U32", 4 },
    { "U64", 8 }, { "C64", 8 }, { "F8_E4M3", 1 }, { "F8_E5M2", 1 }, { "F8_E8M0", 1 },
    { "F8_E4M3FNUZ", 1 }, { "F8_E5M2FNUZ", 1 } };

const char *sc_dtype_name(sc_dtype dtype) { return dtypes[dtype].name; }

size_t sc_dtype_size(sc_dtype dtype) { return dtypes[dtype].size; }

/* Sets count and bytes from dtype and shape. A dimension of 0 must not hide that the others cannot
 * be multiplied: whoever reads the shape will. */
static int measure_tensor(sc_tensor *t, const char *path) {
    size_t size = sc_dtype_size(t->dtype), bytes = size;
    int empty = 0;
    for (int d = 0; d < t->rank; d++) {
        size_t n = t->shape[d] ? t->shape[d] : 1;
        empty |= t->shape[d] == 0;
        if (bytes > SIZE_MAX / n)
            return fail("%s: tensor '%.100s' is too large for any machine", path, t->name);
        bytes *= n;
    }
    t->bytes = empty ? 0 : bytes;
    t->count = t->bytes / size;
    return SC_OK;
}

/* {"dtype": ..., "shape": ..., "data_offsets": ...} each once, in any order. */
static int read_tensor(json *j, sc_safetensors *file, const char *name) {
    const char *members = "dtype, shape and two data_offsets, each once";
    const size_t room = (size_t)(file->map + file->size - file->data);
    size_t at[2] = { 0 }, offsets = 0, rank = SIZE_MAX, n = 0, d = 0;
    const char *dtype = NULL;
    sc_tensor t = { .name = name };
    for (const char *key; (key = json_next(j, n, "{}")) != NULL; n++)
        if (strcmp(key, "dtype") == 0) dtype = json_string(j);
        else if (strcmp(key, "shape") == 0) rank = json_sizes(j, t.shape, SC_MAX_RANK);
        else if (strcmp(key, "data_offsets") == 0) offsets = json_sizes(j, at, 2);
        else json_expect(j, 0, members);
    json_expect(j, n == 3 && dtype && rank != SIZE_MAX && offsets == 2, members);
    if (j->failed) return SC_FAILED;
    while (d < COUNT(dtypes) && strcmp(dtypes[d].name, dtype) != 0) d++;
    if (d == COUNT(dtypes))
        return fail("%s: tensor '%.100s' has the unknown dtype '%.100s', expected F32 or alike",
                    file->path, name, dtype);
    t.dtype = (sc_dtype)d;
    t.rank = (int)rank;
    SC_TRY(measure_tensor(&t, file->path));
    if (at[0] > at[1] || at[1] > room || at[1] - at[0] != t.bytes)
        return fail("%s: tensor '%.100s' has %zu bytes by dtype and shape, but lies at %zu to %zu "
                    "of %zu", file->path, name, t.bytes, at[0], at[1], room);
    t.data = file->data + at[0];
    SC_TRY(grow(&file->tensor, &file->tensor_capacity, file->tensors, sizeof t));
    file->tensor[file->tensors++] = t;
    return SC_OK;
}

static int read_metadata(json *j, sc_safetensors *file) {
    for (const char *key; (key = json_next(j, file->entries, "{}")) != NULL; file->entries++) {
        SC_TRY(grow(&file->metadata, &file->entry_capacity, file->entries, sizeof(sc_entry)));
        file->metadata[file->entries] = (sc_entry){ key, json_string(j) };
    }
    return j->failed;
}

static int read_header(sc_safetensors *file) {
    uint64_t size;
    size_t most = file->size - 8 < MAX_HEADER ? file->size - 8 : MAX_HEADER, members = 0;
    copy_numbers(&size, file->map, 1, 8);
    if (size < 2 || size > most)
        return fail("%s: not a safetensors file: it announces a header of %ju bytes, expected 2 to "
                    "%zu", file->path, (uintmax_t)size, most);
    file->data = file->map + 8 + size;
    file->text = new_array((size_t)size + 1, 1);
    if (!file->text) return SC_FAILED;
    memcpy(file->text, file->map + 8, (size_t)size);
    json j = { .what = file->path, .text = file->text };
    int described = 0;
    for (const char *key; (key = json_next(&j, members, "{}")) != NULL; members++) {
        int metadata = strcmp(key, "__metadata__") == 0;
        json_expect(&j, !metadata || !described++, "__metadata__ only once");
        if (!j.failed) j.failed = metadata ? read_metadata(&j, file) : read_tensor(&j, file, key);
    }
    json_expect(&j, j.at == size, "nothing but spaces behind the header's object");
    return j.failed;
}

static int by_position(const void *a, const void *b) {
    const sc_tensor *left = a, *right = b;
    if (left->data != right->data) return left->data < right->data ? -1 : 1;
    return (left->bytes > right->bytes) - (left->bytes < right->bytes);
}

/* Every byte of the data must belong to exactly one tensor. */
static int check_positions(sc_safetensors *file) {
    const unsigned char *at = file->data, *end = file->map + file->size;
    if (file->tensors) qsort(file->tensor, file->tensors, sizeof *file->tensor, by_position);
    for (size_t i = 0; i < file->tensors; at += file->tensor[i++].bytes) {
        const sc_tensor *t = &file->tensor[i];
        if (t->data != at)
            return fail("%s: tensor '%.100s' begins at byte %td of the data, expected %td",
                        file->path, t->name, t->data - file->data, at - file->data);
    }
    if (at == end) return SC_OK;
    return fail("%s: %td bytes of data belong to no tensor, expected none", file->path, end - at);
}

/* Tensors, metadata entries and images all begin with the pointer to their name. */
static int by_name(const void *a, const void *b) {
    const char *const *left = a, *const *right = b;
    return strcmp(*left, *right);
}

static int sort_by_name(const char *path, void *list, size_t count, size_t size) {
    if (count > 0) qsort(list, count, size, by_name);
    for (char *at = list; count > 1; count--, at += size)
        if (by_name(at, at + size) == 0)
            return fail("%s: '%.100s' is there twice", path, *(char **)(void *)at);
    return SC_OK;
}

/* A mapped file that someone cuts short raises SIGBUS where it is read, in any thread. What main()
 * has a handler say then lies ready: handlers may not even format a line. */
static struct {
    atomic_uintptr_t begin, size;
    const char *path;
    dev_t device;
    ino_t inode;
    char line[TEXT_ROOM + 100];
} maps[64];

static int map_file(sc_safetensors *file) {
    char safe[TEXT_ROOM];
    struct stat about;
    size_t i = 0;
    void *map = MAP_FAILED;
    /* O_NONBLOCK: a pipe must be refused, not waited for. */
    int fd = open(file->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &about) != 0)
        fail("%s: cannot be opened: %s", file->path, strerror(errno));
    else if (!S_ISREG(about.st_mode) || about.st_size < 8 || (uintmax_t)about.st_size > SIZE_MAX)
        fail("%s: is no regular file of 8 bytes or more, expected a safetensors file", file->path);
    else if ((map = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED)
        fail("%s: cannot be mapped: %s", file->path, strerror(errno));
    if (fd >= 0) close(fd);
    if (map == MAP_FAILED) return SC_FAILED;
    file->map = map;
    file->size = (size_t)about.st_size;
    while (maps[i].size && i < COUNT(maps) - 1) i++;
    snprintf(maps[i].line, sizeof maps[i].line, "\nsaeclip: %s: became shorter while it was read, "
             "expected a file that stays\n", printable(file->path, safe, sizeof safe));
    maps[i].path = file->path;
    maps[i].device = about.st_dev;
    maps[i].inode = about.st_ino;
    maps[i].begin = (uintptr_t)map;
    maps[i].size = file->size;
    return SC_OK;
}

/* What is cut off within a file's last page reads as zeros: no signal tells, so we look before a
 * result counts. One that was replaced or removed is still whole in our map. */
static int check_maps(void) {
    struct stat now;
    for (size_t i = 0; i < COUNT(maps); i++)
        if (maps[i].size && stat(maps[i].path, &now) == 0 && now.st_dev == maps[i].device
            && now.st_ino == maps[i].inode && (uintmax_t)now.st_size < maps[i].size)
            return fail("%s: became shorter while it was read, expected a file that stays",
                        maps[i].path);
    return SC_OK;
}

int sc_safetensors_open(sc_safetensors *file, const char *path) {
    *file = (sc_safetensors){ .path = copy_string(path) };
    if (file->path && map_file(file) == SC_OK && read_header(file) == SC_OK &&
        check_positions(file) == SC_OK &&
        sort_by_name(path, file->tensor, file->tensors, sizeof *file->tensor) == SC_OK &&
        sort_by_name(path, file->metadata, file->entries, sizeof *file->metadata) == SC_OK)
        return SC_OK;
    sc_safetensors_close(file);
    return SC_FAILED;
}

void sc_safetensors_close(sc_safetensors *file) {
    for (size_t i = 0; i < COUNT(maps) && file->map; i++)
        if (maps[i].begin == (uintptr_t)file->map) maps[i].size = 0;
    if (file->map) munmap((void *)file->map, file->size);
    free(file->path);
    free(file->text);
    free(file->tensor);
    free(file->metadata);
    memset(file, 0, sizeof *file);
}

const sc_tensor *sc_tensor_find(const sc_safetensors *file, const char *name) {
    if (file->tensors == 0) return NULL;
    return bsearch(&name, file->tensor, file->tensors, sizeof *file->tensor, by_name);
}

const char *sc_metadata_find(const sc_safetensors *file, const char *key) {
    if (file->entries == 0) return NULL;
    const sc_entry *entry = bsearch(&key, file->metadata, file->entries, sizeof *entry, by_name);
    return entry ? entry->value : NULL;
}

/* Where the values asked for lie; NULL if they are not there or of no dtype from least to most. */
static const unsigned char *find_values(const sc_safetensors *file, const sc_tensor *t,
                                        size_t first, size_t count, sc_dtype least, sc_dtype most) {
    if (t->dtype < least || t->dtype > most)
        fail("%s: tensor '%.100s' is %s, expected %s", file->path, t->name,
             sc_dtype_name(t->dtype), least ? "I64, I32 or U8" : "F32, F16, BF16 or F64");
    else if (first > t->count || count > t->count - first)
        fail("%s: tensor '%.100s' has %zu values, expected %zu from number %zu on", file->path,
             t->name, t->count, count, first);
    else return t->data + first * sc_dtype_size(t->dtype);
    return NULL;
}

static void floats_of_bytes(float *out, const unsigned char *from, size_t count, sc_dtype dtype) {
    if (dtype == SC_F32) copy_numbers(out, from, count, 4);
    for (size_t i = 0; dtype != SC_F32 && i < count; i++) {
        uint16_t half = 0;
        double wide = 0;
        if (dtype == SC_F64) copy_numbers(&wide, from + 8 * i, 1, 8);
        else copy_numbers(&half, from + 2 * i, 1, 2);
        out[i] = dtype == SC_F16 ? float_of_half(half) : dtype == SC_F64 ? (float)wide
               : float_of_bits((uint32_t)half << 16);
    }
}

int sc_tensor_floats(const sc_safetensors *file, const sc_tensor *tensor, size_t first,
                     size_t count, float *out) {
    const unsigned char *from = find_values(file, tensor, first, count, SC_F32, SC_F64);
    if (!from) return SC_FAILED;
    floats_of_bytes(out, from, count, tensor->dtype);
    size_t bad = first_not_finite(out, count);
    if (bad == count) return SC_OK;
    return fail("%s: tensor '%.100s', element %zu is %g, expected a finite number", file->path,
                tensor->name, first + bad, (double)out[bad]);
}

int sc_tensor_integers(const sc_safetensors *file, const sc_tensor *tensor, size_t first,
                       size_t count, int64_t *out) {
    const unsigned char *from = find_values(file, tensor, first, count, SC_I64, SC_U8);
    if (!from) return SC_FAILED;
    if (tensor->dtype == SC_I64) copy_numbers(out, from, count, 8);
    for (size_t i = 0; tensor->dtype != SC_I64 && i < count; i++) {
        int32_t narrow = from[i];
        if (tensor->dtype == SC_I32) copy_numbers(&narrow, from + 4 * i, 1, 4);
        out[i] = narrow;
    }
    return SC_OK;
}

/* --- Atomic output ---
 *
 * NAME is written as NAME.tmp, flushed to disk and renamed. What exists and is not a regular file
 * (/dev/full, a pipe) is written as it is. The first failure sticks, and stdio's do: a caller may
 * write on without looking, by fprintf(out.file, ...) too, and ask output_commit how it went. */

static int write_failed(const char *path, int error) {
    return fail("%s: cannot be written: %s", path,
                error == EBUSY ? "another process is writing it" : strerror(error));
}

static int output_failed(sc_output *out, int error) {
    out->error = error ? error : EIO;
    return write_failed(out->path, out->error);
}

static int output_write(sc_output *out, const void *bytes, size_t count) {
    if (out->error) return output_failed(out, out->error);
    if (count == 0 || fwrite(bytes, 1, count, out->file) == count) return SC_OK;
    return output_failed(out, errno);
}

/* Opens, locks and empties NAME.tmp; -1 and errno if it cannot, EBUSY if another process does. That
 * one may have renamed or removed the file before we had the lock: it must still have the name. */
static int open_temporary(const char *name) {
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct stat locked, named;
    int fd;
    while ((fd = open(name, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666)) >= 0) {
        int error = fcntl(fd, F_SETLK, &lock) == 0 && fstat(fd, &locked) == 0 ? 0 : errno;
        int ours = error == 0 && stat(name, &named) == 0 && locked.st_ino == named.st_ino &&
                   locked.st_dev == named.st_dev;
        if (ours && ftruncate(fd, 0) == 0) break;
        if (ours) error = errno;
        if (ours) unlink(name);
        close(fd);
        errno = error == EACCES || error == EAGAIN ? EBUSY : error;
        if (error) return -1;
    }
    return fd;
}

/* Ends the output. Removes what was written, unless it was committed. */
static void output_discard(sc_output *out) {
    if (out->file && out->temporary) unlink(out->temporary);
    for (size_t i = 0; i < COUNT(unfinished); i++)
        if (unfinished[i] == out->temporary) unfinished[i] = NULL;
    if (out->file) fclose(out->file);
    free(out->path);
    free(out->target);
    free(out->temporary);
    memset(out, 0, sizeof *out);
}

static int output_open(sc_output *out, const char *path) {
    struct stat there;
    int direct = stat(path, &there) == 0 && !S_ISREG(there.st_mode);
    *out = (sc_output){ .path = copy_string(path) };
    /* A link stays, and what it leads to is replaced. */
    if (out->path && !direct && !(out->target = realpath(path, NULL))) {
        if (errno == ENOENT) out->target = copy_string(path);
        else output_failed(out, errno);
    }
    if (out->target) out->temporary = join_text(out->target, ".tmp");
    if (out->path && (direct || out->temporary)) {
        int fd = direct ? open(path, O_WRONLY | O_CLOEXEC) : -1;     /* a pipe may let us wait */
        sigset_t mask = hold_signals();
        if (!direct) fd = open_temporary(out->temporary);
        out->file = fd >= 0 ? fdopen(fd, "w") : NULL;
        if (!out->file) output_failed(out, errno);
        if (!out->file && fd >= 0 && !direct) unlink(out->temporary);
        if (!out->file && fd >= 0) close(fd);
        if (out->file) unfinished[unfinished[0] != NULL] = out->temporary;
        take_signals(mask);
        if (out->file) return SC_OK;
    }
    output_discard(out);
    return SC_FAILED;
}

/* What the output is to replace becomes out->previous. */
static int keep_previous(const sc_output *out) {
    if (!out->previous || access(out->target, F_OK) != 0) return SC_OK;
    unlink(out->previous);
    if (link(out->target, out->previous) == 0 || rename(out->target, out->previous) == 0)
        return SC_OK;
    return fail("%s: cannot be kept as %s: %s", out->path, out->previous, strerror(errno));
}

/* Ends the output in either case: the whole file stands under its name, or nothing does. */
static int output_commit(sc_output *out) {
    int status = output_write(out, "", 0);                   /* whether all went well so far */
    if (status == SC_OK) status = check_maps();
    errno = EIO;                                             /* as in end_of_output() */
    if (status == SC_OK && (fflush(out->file) != 0 || ferror(out->file) ||
                            (out->temporary && fsync(fileno(out->file)) != 0)))
        status = output_failed(out, errno);
    if (status == SC_OK) status = keep_previous(out);
    if (status == SC_OK && out->temporary && rename(out->temporary, out->target) != 0)
        status = output_failed(out, errno);
    if (status == SC_OK && out->temporary) *out->temporary = '\0';   /* nothing is left to remove */
    output_discard(out);
    return status;
}

/* --- Writing safetensors ---
 *
 * The data are written as they come, behind a hole into which the header goes at the end; blanks
 * fill it up. */

int sc_writer_open(sc_writer *w, const char *path, size_t header_room) {
    memset(w, 0, sizeof *w);
    SC_TRY(output_open(&w->out, path));
    const size_t least = 1000, most = MAX_HEADER - 64;
    size_t room = header_room < least ? least : header_room < most ? header_room : most;
    w->data = (8 + room + 63) / 64 * 64;                     /* on a cache line's boundary */
    if (fseeko(w->out.file, (off_t)w->data, SEEK_SET) == 0) return SC_OK;
    fail("%s: cannot be written out of order: %s; expected a file", path, strerror(errno));
    sc_writer_discard(w);
    return SC_FAILED;
}

void sc_writer_discard(sc_writer *w) {
    output_discard(&w->out);
    release(&w->texts);
    free(w->tensor);
    free(w->metadata);
    memset(w, 0, sizeof *w);
}

static const char *keep_text(sc_writer *w, const char *text) {
    char *copy;
    int status = allocate(&w->texts, &copy, strlen(text) + 1, 1);
    return status == SC_OK ? strcpy(copy, text) : NULL;
}

/* At any time before the end; the order is kept. */
int sc_writer_metadata(sc_writer *w, const char *key, const char *value) {
    sc_entry entry = { keep_text(w, key), keep_text(w, value) };
    if (!entry.key || !entry.value) return SC_FAILED;
    SC_TRY(grow(&w->metadata, &w->entry_capacity, w->entries, sizeof entry));
    w->metadata[w->entries++] = entry;
    return SC_OK;
}

/* The tensor being written must be complete. */
static int end_tensor(sc_writer *w) {
    if (w->tensors == 0) return SC_OK;
    sc_tensor *t = &w->tensor[w->tensors - 1];
    if (w->rows_open) t->shape[0] = w->values / t->count;    /* count so far is that of one row */
    w->rows_open = 0;
    SC_TRY(measure_tensor(t, w->out.path));
    if (w->values == t->count) return SC_OK;
    return fail("%s: tensor '%.100s' got %zu values, expected %zu from its shape", w->out.path,
                t->name, w->values, t->count);
}

/* Begins the next tensor; shape[0] may be SC_ROWS. */
int sc_writer_tensor(sc_writer *w, const char *name, sc_dtype dtype, int rank,
                     const size_t *shape) {
    sc_tensor t = { .name = keep_text(w, name), .dtype = dtype };
    SC_TRY(end_tensor(w));
    for (; t.rank < rank && t.rank < SC_MAX_RANK; t.rank++) t.shape[t.rank] = shape[t.rank];
    int rows_open = rank > 0 && shape[0] == SC_ROWS;
    if (rows_open) t.shape[0] = 1;
    if (!t.name) return SC_FAILED;
    SC_TRY(measure_tensor(&t, w->out.path));
    if (t.rank != rank || (rows_open && t.count == 0) || strcmp(name, "__metadata__") == 0)
        return fail("%s: there can be no tensor '%.100s' of this shape", w->out.path, name);
    SC_TRY(grow(&w->tensor, &w->tensor_capacity, w->tensors, sizeof t));
    w->tensor[w->tensors++] = t;
    w->values = 0;
    w->rows_open = rows_open;
    return SC_OK;
}

/* Writes values that are of type `kind` in memory: F32, also as F16, F64, I64, also as I32, or U8.
 * One that cannot be held ends the writing: the file can no longer be complete. */
int sc_writer_values(sc_writer *w, const void *values, size_t count, sc_dtype kind) {
    enum { BLOCK = 4096 };
    unsigned char bytes[BLOCK * 8];
    const float *f = values;
    const double *d = values;
    const int64_t *l = values;
    if (w->tensors == 0) return fail("%s: no tensor to write values of", w->out.path);
    const sc_tensor *t = &w->tensor[w->tensors - 1];
    size_t size = sc_dtype_size(t->dtype), from = sc_dtype_size(kind);
    int half = kind == SC_F32 && t->dtype == SC_F16, narrow = kind == SC_I64 && t->dtype == SC_I32;
    if (t->dtype != kind && !half && !narrow)
        return fail("%s: tensor '%.100s' is %s and got %s values", w->out.path, t->name,
                    sc_dtype_name(t->dtype), sc_dtype_name(kind));
    for (size_t at = 0, n; at < count; at += n, w->values += n) {
        n = count - at < BLOCK ? count - at : BLOCK;
        if (t->dtype == kind) copy_numbers(bytes, (const char *)values + at * from, n, size);
        for (size_t i = 0; i < n; i++) {
            double value = kind == SC_F32 ? (double)f[at + i] : kind == SC_F64 ? d[at + i]
                         : kind == SC_I64 ? (double)l[at + i] : 0;
            int held = narrow ? value >= INT32_MIN && value <= INT32_MAX
                     : kind == SC_I64 || fabs(value) < (half ? 65520 : (double)INFINITY);
            if (!held) w->out.error = ERANGE;
            if (!held)
                return fail("%s: tensor '%.100s', element %zu is %g, expected what %s can hold",
                            w->out.path, t->name, w->values + i, value, sc_dtype_name(t->dtype));
            if (half) copy_numbers(bytes + 2 * i, &(uint16_t){ half_of_float((float)value) }, 1, 2);
            if (narrow) copy_numbers(bytes + 4 * i, &(int32_t){ (int32_t)value }, 1, 4);
        }
        SC_TRY(output_write(&w->out, bytes, n * size));
    }
    return SC_OK;
}

/* Into the hole; the file's own error tells at the end whether that went well. */
static int write_header(sc_writer *w) {
    FILE *f = w->out.file;
    uint64_t bytes, size = w->data - 8;
    size_t begin = 0;
    SC_TRY(end_tensor(w));
    if (fseeko(f, 0, SEEK_SET) != 0) return output_failed(&w->out, errno);
    copy_numbers(&bytes, &size, 1, 8);
    fwrite(&bytes, 8, 1, f);
    putc('{', f);
    for (size_t i = 0; i < w->entries; i++) {
        fputs(i ? "," : "\"__metadata__\":{", f);
        print_json(f, w->metadata[i].key);
        putc(':', f);
        print_json(f, w->metadata[i].value);
    }
    if (w->entries) fputs(w->tensors ? "}," : "}", f);
    for (size_t i = 0; i < w->tensors; begin += w->tensor[i++].bytes) {
        const sc_tensor *t = &w->tensor[i];
        if (i > 0) putc(',', f);
        print_json(f, t->name);
        fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", sc_dtype_name(t->dtype));
        for (int d = 0; d < t->rank; d++) fprintf(f, "%s%zu", d ? "," : "", t->shape[d]);
        fprintf(f, "],\"data_offsets\":[%zu,%zu]}", begin, begin + t->bytes);
    }
    putc('}', f);
    uint64_t end = (uint64_t)ftello(f);
    if (end > w->data)
        return fail("%s: its header is larger than safetensors allows or its writer foresaw, "
                    "expected at most %ju bytes", w->out.path, (uintmax_t)size);
    fprintf(f, "%*s", (int)(w->data - end), "");
    return SC_OK;
}

/* Ends the writer in either case: the whole file stands under its name, or nothing does. */
int sc_writer_finish(sc_writer *w) {
    int status = write_header(w);
    if (status == SC_OK) status = output_commit(&w->out);
    sc_writer_discard(w);
    return status;
}

/* Writes a safetensors file by `write`: the whole file stands under its name, or nothing does. */
static int save_tensors(const char *path, size_t header_room,
                        int (*write)(sc_writer *w, void *context), void *context) {
    sc_writer w;
    int status = sc_writer_open(&w, path, header_room);
    if (status == SC_OK) status = write(&w, context);
    if (status == SC_OK) return sc_writer_finish(&w);
    sc_writer_discard(&w);
    return status;
}

/* --- Names as text: they come from anywhere --- */

/* text as a terminal may show it, cut short where there is no room. What a terminal might obey
 * comes out as \xNN: control characters, what is no UTF-8. */
static const char *printable(const char *text, char *out, size_t room) {
    size_t used = 0;
    while (*text) {
        size_t length = utf8_length(text), n = length ? length : 1;
        int harmless = length && !control_at(text);
        if (used + 8 + sizeof "..." > room) return strcpy(out + used, "..."), out;
        for (; n > 0; n--, text++)
            used += (size_t)sprintf(out + used, harmless ? "%c" : "\\x%02x", (unsigned char)*text);
    }
    out[used] = '\0';
    return out;
}

/* One of 8 rooms in turn: a line may show several texts. For the main thread. */
static char *text_room(void) {
    static char room[8][TEXT_ROOM];
    static unsigned next;
    return room[next++ % 8];
}

static const char *shown(const char *text) { return printable(text, text_room(), TEXT_ROOM); }

/* Numbers and short words as metadata. */
SC_PRINTF(3, 4) static int put_metadata(sc_writer *w, const char *key, const char *format, ...) {
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return sc_writer_metadata(w, key, text);
}

/* How much of a header these names take, at most: each its letters, escaped, and `more` bytes. */
static size_t names_room(char **name, size_t count, size_t more) {
    size_t room = 0;
    for (size_t i = 0; name && i < count; i++) room += 7 * strlen(name[i]) + more;
    return room;
}

/* A list of names as metadata, a JSON array in a string. */
static int write_name_list(sc_writer *w, const char *key, char **name, size_t count) {
    char *list = NULL;
    size_t length = 0;
    FILE *text = open_memstream(&list, &length);
    if (!text) return fail("out of memory: a list of %zu names", count);
    for (size_t i = 0; i < count; i++) {
        putc(i ? ',' : '[', text);
        print_json(text, name[i]);
    }
    fputs(count ? "]" : "[]", text);
    int lost = ferror(text);
    lost |= fclose(text);
    int status = lost ? fail("out of memory: a list of %zu names", count)
                      : sc_writer_metadata(w, key, list);
    free(list);
    return status;
}

/* ============================================================================================
 * 15. Images
 *
 * From a file's bytes to the pixels a model sees, as the data flow: PNM pictures, other formats by
 * way of a decoder program, Pillow's resize, data sets.
 * ============================================================================================ */

/* Beside SC_OK and SC_FAILED; MACHINE_FAILED is no image's fault, so that --skip-bad is no help. */
enum { SC_END = -1, MACHINE_FAILED = -2 };
enum { MAX_PATH = 4096, MAX_DEPTH = 16, CHUNK = 1024, WEIGHT_BITS = 22 };
#define MAX_PIXELS ((size_t)1 << 28)           /* of one picture: 16,384 x 16,384 */

/* rgb: [height, width, 3], 8 bits, `stride` bytes from row to row */
typedef struct { size_t width, height, stride; const unsigned char *rgb; } picture;

/* A file's format, told by its first bytes, and the Debian package that decodes it, if that needs
 * one. In magic, ? is any byte and _ a blank. */
typedef struct { const char *name, *magic, *decoder, *package; size_t length; } image_format;

/* Where pictures are read from: a file, standard input, a decoder's pipe. rgb: [capacity, CHUNK,
 * 3], for the last picture's pixels; at, end: of the bytes at hand */
typedef struct {
    const char *name; const image_format *format;
    unsigned char *rgb; size_t capacity;
    int fd, decoder, error;          /* error: an errno */
    const char *stopped;             /* why nothing more is taken of a decoder */
    double waited;                   /* seconds */
    size_t taken, at, end;           /* taken: bytes in all */
    unsigned char bytes[16384];
} image_source;

/* What a decoder may take for a picture; the largest one has so many bytes, at 16 bits. */
static double decoder_seconds = 120;
static size_t decoder_bytes = 6 * MAX_PIXELS;

/* Whether nothing more is taken of a decoder. */
static int decoder_is_late(image_source *s) {
    if (s->decoder && s->waited > decoder_seconds) s->stopped = "took too long";
    if (s->decoder && stop_signal) s->stopped = "was not waited for";
    return s->stopped != NULL;
}

/* The next byte, or EOF. We wait in steps of 0.2 seconds: for a decoder only so often (a time in
 * which we were stopped ourselves counts as one), for it and a stream until training is to stop. */
static int next_byte(image_source *s) {
    struct pollfd pipe = { .fd = s->fd, .events = POLLIN };
    int stream = s->fd == STDIN_FILENO;
    ssize_t got = -1;
    if (s->at < s->end) return s->bytes[s->at++];
    do {
        double before = seconds_now();
        if (s->decoder && s->taken > decoder_bytes) s->stopped = "wrote too much";
        if (decoder_is_late(s)) return EOF;
        errno = EINTR;                         /* stays where nothing came */
        if (stream && stop_signal) break;
        if (!(s->decoder || stream) || poll(&pipe, 1, 200) > 0)
            got = read(s->fd, s->bytes, sizeof s->bytes);
        s->waited += fmin(seconds_now() - before, 0.2);
    } while (got < 0 && errno == EINTR);
    if (got < 0) s->error = errno;
    s->at = got > 0;
    s->end = got > 0 ? (size_t)got : 0;
    s->taken += s->end;
    return got > 0 ? s->bytes[0] : EOF;
}

/* Returns whether so many bytes came. */
static int take_bytes(image_source *s, unsigned char *to, size_t count) {
    for (size_t n; count > 0; count -= n, to += n, s->at += n) {
        if (next_byte(s) == EOF) return 0;
        n = s->end - --s->at < count ? s->end - s->at : count;
        memcpy(to, s->bytes + s->at, n);
    }
    return 1;
}

/* --- PNM (netpbm.sourceforge.net/doc/pnm.html); P4 is what pngtopnm makes of one-bit PNGs --- */

typedef struct { int kind, byte; size_t maxval, width, height, channels; } pnm_header;

static int is_blank(int byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

/* The next byte of a text part; a comment reads as the newline that ends it. */
static int text_byte(image_source *source) {
    int byte = next_byte(source);
    if (byte == '#')
        while (byte != '\n' && byte != '\r' && byte != EOF) byte = next_byte(source);
    return byte;
}

static int source_ended(const image_source *source, const char *before) {
    if (!source->error)
        return fail("%s: the picture's data end before its %s", source->name, before);
    return fail("%s: cannot be read: %s", source->name, strerror(source->error));
}

/* One number and the single blank after it. */
static int pnm_number(image_source *source, const char *what, size_t largest, size_t *value) {
    int byte = text_byte(source);
    while (is_blank(byte)) byte = text_byte(source);
    if (byte == EOF) return source_ended(source, what);
    for (*value = 0; byte >= '0' && byte <= '9'; byte = text_byte(source)) {
        *value = 10 * *value + (size_t)(byte - '0');
        if (*value > largest)
            return fail("%s: a PNM %s of more than %zu", source->name, what, largest);
    }
    if (byte == EOF || is_blank(byte)) return SC_OK;
    return fail("%s: byte 0x%02x where a PNM %s was expected", source->name, (unsigned)byte, what);
}

/* Sample `index`: text, a bit (1 is black, a row begins with a new byte), or one or two bytes. */
static int pnm_sample(image_source *source, pnm_header *header, size_t index, size_t *value) {
    if (header->kind <= 3) return pnm_number(source, "last sample", header->maxval, value);
    size_t bit = header->kind == 4 ? index % header->width % 8 : 0;
    int high = header->maxval > 255 ? next_byte(source) : 0;
    if (bit == 0) header->byte = next_byte(source);
    if (header->byte == EOF) return source_ended(source, "last sample");
    *value = (size_t)high << 8 | (size_t)header->byte;
    if (header->kind == 4) *value = ~*value >> (7 - bit) & 1;
    if (*value <= header->maxval) return SC_OK;
    return fail("%s: a sample of %zu, above maxval %zu", source->name, *value, header->maxval);
}

/* round-half-even(255 v / maxval); the quotient is never rounded to a half that it is not. */
static unsigned char to_8_bits(size_t v, size_t maxval) {
    return (unsigned char)(maxval == 255 ? (double)v : rint(255.0 * (double)v / (double)maxval));
}

/* Reads one picture; SC_END where only blanks are left. The memory grows as the pixels come: a
 * header alone, whatever it claims, costs nothing. */
static int pnm_read(image_source *source, picture *result) {
    int byte = next_byte(source);
    while (is_blank(byte)) byte = next_byte(source);
    if (byte == EOF && !source->error) return SC_END;
    int kind = byte == 'P' ? next_byte(source) : 0;
    if (byte == EOF || kind == EOF) return source_ended(source, "header");
    if (kind < '2' || kind > '6')
        return fail("%s: not a PNM picture, which begins with P2, P3, P5 or P6", source->name);
    pnm_header h = { .kind = kind - '0', .maxval = 1, .channels = kind % 3 == 0 ? 3 : 1 };
    SC_TRY(pnm_number(source, "width", MAX_PIXELS, &h.width));
    SC_TRY(pnm_number(source, "height", MAX_PIXELS, &h.height));
    if (kind != '4') SC_TRY(pnm_number(source, "maxval", 65535, &h.maxval));
    if (!h.width || !h.height || !h.maxval || h.height > MAX_PIXELS / h.width)
        return fail("%s: a PNM picture of %zu x %zu, maxval %zu; at least 1 of each and at most %zu"
                    " pixels were expected", source->name, h.width, h.height, h.maxval, MAX_PIXELS);
    for (size_t i = 0, pixels = h.width * h.height; i < pixels; i++) {
        if (grow(&source->rgb, &source->capacity, i / CHUNK, 3 * CHUNK)) return MACHINE_FAILED;
        unsigned char *rgb = source->rgb + 3 * i;
        if (kind == '6' && h.maxval == 255) {                    /* by far the most usual */
            size_t many = pixels - i < CHUNK ? pixels - i : CHUNK;
            i += many - 1;
            if (take_bytes(source, rgb, 3 * many)) continue;
            return source_ended(source, "last sample");
        }
        for (size_t c = 0; c < h.channels; c++) {
            size_t v = 0;
            SC_TRY(pnm_sample(source, &h, i * h.channels + c, &v));
            rgb[c] = to_8_bits(v, h.maxval);
        }
        if (h.channels == 1) rgb[1] = rgb[2] = rgb[0];
    }
    *result = (picture){ h.width, h.height, 3 * h.width, source->rgb };
    return SC_OK;
}

/* --- Other formats: a decoder program turns them into PNM --- */

static const image_format formats[] = {
    { "PNM", "P2_", NULL, NULL, 3 }, { "PNM", "P3_", NULL, NULL, 3 },
    { "PNM", "P5_", NULL, NULL, 3 }, { "PNM", "P6_", NULL, NULL, 3 },
    { "JPEG", "\xff\xd8\xff", "djpeg -dct int -pnm", "libjpeg-turbo-progs", 3 },
    { "PNG", "\x89PNG\r\n\x1a\n", "pngtopnm", "netpbm", 8 },
    { "TIFF", "II*\0", NULL, "imagemagick", 4 }, { "TIFF", "MM\0*", NULL, "imagemagick", 4 },
    { "GIF", "GIF8?a", NULL, "imagemagick", 6 },
    { "BMP", "BM????\0\0\0\0", NULL, "imagemagick", 10 },
    { "WebP", "RIFF????WEBP", NULL, "imagemagick", 12 },
};

/* Opens an image at its first byte, or only looks at it (source NULL). SC_END: it is none.
 * O_NONBLOCK: a named pipe must be refused, not waited for. */
static int open_image(const char *path, image_source *source) {
    char start[16];
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return fail("%s: cannot be opened: %s", path, strerror(errno));
    ssize_t got = read(file, start, sizeof start);
    size_t size = got > 0 ? (size_t)got : 0, same = 0, f = 0;
    int status = got < 0 ? fail("%s: cannot be read: %s", path, strerror(errno)) : SC_END;
    for (; f < COUNT(formats) && status == SC_END; f++) {
        const char *magic = formats[f].magic;
        for (same = 0; same < size && same < formats[f].length && (magic[same] == '?' ||
             magic[same] == start[same] || (magic[same] == '_' && is_blank(start[same])));) same++;
        if (same == formats[f].length) status = SC_OK;
    }
    lseek(file, 0, SEEK_SET);
    if (status == SC_END) fail("%s: not an image; a JPEG, PNG or PNM file was expected", path);
    if (status == SC_OK && source)
        *source = (image_source){ .name = path, .format = &formats[f - 1], .fd = file };
    else close(file);
    return status;
}

/* A child's own process group: Ctrl-C, upon which training saves its state, must not look like a
 * bad image. And signals as they usually are, not as we have them. */
static void set_attributes(posix_spawnattr_t *attributes) {
    sigset_t none, usual;
    sigemptyset(&none);
    sigemptyset(&usual);
    sigaddset(&usual, SIGPIPE);
    sigaddset(&usual, SIGXFSZ);
    posix_spawnattr_setsigmask(attributes, &none);
    posix_spawnattr_setsigdefault(attributes, &usual);
    posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK
                                         | POSIX_SPAWN_SETSIGDEF);
}

/* Starts this thread's decoder on a file; returns an errno. posix_spawn and not fork, which copies
 * the page tables of all our weights. The lock: no other child may inherit a pipe that has no
 * FD_CLOEXEC yet. Its stderr is read at last, from end[2]; O_NONBLOCK, lest a decoder that says too
 * much should wait for us forever. */
static int start_decoder(char **argument, int file, int end[4]) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    pid_t child = 0;
    sigset_t mask = hold_signals();
    pthread_mutex_lock(&lock);
    int error = pipe(end) != 0 || pipe(end + 2) != 0 ? errno : 0;
    for (int i = 0; i < 4 && !error; i++) fcntl(end[i], F_SETFD, FD_CLOEXEC);
    for (int i = 2; i < 4 && !error; i++) fcntl(end[i], F_SETFL, O_NONBLOCK);
    if (!error) error = posix_spawnattr_init(&attributes);
    if (!error && (error = posix_spawn_file_actions_init(&files)) == 0) {
        set_attributes(&attributes);
        const int from[3] = { file, end[1], end[3] };
        for (int i = 0; i < 3 && !error; i++)
            error = posix_spawn_file_actions_adddup2(&files, from[i], i);
        if (!error) error = posix_spawnp(&child, *argument, &files, &attributes, argument, environ);
        children[worker] = error ? 0 : child;
        posix_spawn_file_actions_destroy(&files);
        posix_spawnattr_destroy(&attributes);
    }
    pthread_mutex_unlock(&lock);
    take_signals(mask);
    for (int i = 0; i < 4; i++)
        if (end[i] >= 0 && (i % 2 == 1 || error)) close(end[i]);
    return error;
}

/* Waits for this thread's decoder, which has written all it will; returns how it ended. It may live
 * on without its pipes, but not for long. */
static int end_decoder(image_source *source) {
    pid_t child = children[worker], over = 0;
    int ended = 0;
    for (long pause = 20000; over != child && (over >= 0 || errno == EINTR); pause += pause / 4) {
        if (decoder_is_late(source)) kill(-child, SIGKILL);  /* with all that it started */
        if ((over = waitpid(child, &ended, source->stopped ? 0 : WNOHANG)) != 0) continue;
        if (pause > 100000000) pause = 100000000;
        nanosleep(&(struct timespec){ 0, pause }, NULL);
        source->waited += 1e-9 * (double)pause;
    }
    children[worker] = 0;
    return ended;
}

/* Runs one decoder to its end. A picture counts if there was no complaint; djpeg's status 2 stands
 * for warnings: like Pillow we take damaged pictures, but no half ones. SC_END: not a byte of one
 * was written; MACHINE_FAILED: it could not be started, without a word if it is not there. */
static int run_decoder(const char *command, int file, image_source *source, picture *result) {
    char text[512], words[256] = "", *argument[sizeof text / 2 + 1] = { NULL }, *rest = NULL;
    int end[4] = { -1, -1, -1, -1 };           /* stdout: read, write; stderr: read, write */
    int length = snprintf(text, sizeof text, "%s", command), count = 0;
    size_t said = 0;
    for (char *word = strtok_r(text, " \t", &rest); word; word = strtok_r(NULL, " \t", &rest))
        argument[count++] = word;
    if (count == 0 || (size_t)length >= sizeof text) {
        fail("%s: SAECLIP_DECODER is not a program with its arguments", source->name);
        return MACHINE_FAILED;
    }
    int error = lseek(file, 0, SEEK_SET) != 0 ? errno : start_decoder(argument, file, end);
    if (error && error != ENOENT && error != EACCES)
        fail("%s: %s could not be started: %s", source->name, argument[0], strerror(error));
    if (error) return MACHINE_FAILED;
    *source = (image_source){ .name = source->name, .rgb = source->rgb, .fd = end[0],
                              .capacity = source->capacity, .decoder = 1 };
    int status = pnm_read(source, result), refused = status == SC_FAILED && !source->stopped;
    while (next_byte(source) != EOF) {}        /* it may write more */
    source->fd = end[2];
    for (int c; (c = next_byte(source)) != EOF;)
        if (said < sizeof words - 1) words[said++] = (char)c;
    close(end[0]);
    close(end[2]);
    int ended = end_decoder(source);
    if (source->stopped && !refused)
        fail("%s: %s %s and was stopped, expected a picture in %g seconds and %zu bytes",
             source->name, argument[0], source->stopped, decoder_seconds, decoder_bytes);
    if (source->stopped) return stop_signal ? MACHINE_FAILED : SC_FAILED;
    int killed = WIFSIGNALED(ended), code = killed ? WTERMSIG(ended) : WEXITSTATUS(ended);
    int warned = code == 2 && strstr(argument[0], "djpeg") && !strstr(words, "Premature end of");
    if (!killed && (code == 0 || warned) && status != SC_END) return status;
    if (!killed && code == 127 && status == SC_END && !*words) return MACHINE_FAILED;
    const char *line = *words ? words + strspn(words, " \t\r\n") : "it said nothing";
    fail("%s: %s ended with %s %d: %.*s", source->name, argument[0], killed ? "signal" : "status",
         code, (int)strcspn(line, "\r\n"), line);
    return status == SC_END ? SC_END : SC_FAILED;
}

/* Reads a file's picture into source->rgb, which the caller frees. A format's decoders are tried in
 * turn: the next one if one is missing or has failed without a byte (some djpegs refuse CMYK). */
static int read_picture(const char *path, image_source *source, picture *result) {
    if (open_image(path, source) != SC_OK) return SC_FAILED;
    int file = source->fd;
    const image_format *format = source->format;
    const char *own = getenv("SAECLIP_DECODER"), *command[] = { own ? own : format->decoder,
        "magick -[0] -alpha off -depth 8 ppm:-", "convert -[0] -alpha off -depth 8 ppm:-" };
    int tries = !format->package ? 0 : own ? 1 : 3, now = MACHINE_FAILED, status = now;
    if (tries == 0) status = pnm_read(source, result);
    else if (own) fail("%s: SAECLIP_DECODER names '%s', which cannot be started", path, own);
    else fail("%s: there is no program to decode %s; Debian's package %s has one", path,
              format->name, format->package);
    for (int i = 0; i < tries && now != SC_OK && now != SC_FAILED; i++) {
        if (command[i]) now = run_decoder(command[i], file, source, result);
        if (now != MACHINE_FAILED) status = now;
    }
    close(file);
    return status == SC_END ? SC_FAILED : status;
}

/* --- Pillow's resize (src/libImaging/Resample.c): bicubic, a = -0.5, stretched by the scale if it
 * shrinks, weights of 22 bits, rows first, 8 bits in between; only what the crop keeps --- */

/* `from` pixels become from / scale: `count` from `first` on are kept, made without `skipped`. */
typedef struct { size_t from, skipped, count; uint64_t first; double scale, stretch; } resize_axis;

/* Where the crop to `keep` of `from` pixels begins: torchvision rounds half to even. */
static uint64_t crop_start(uint64_t from, uint64_t keep, int crop_hf) {
    return (from - keep) / 2 + (!crop_hf && (from - keep) % 4 == 3);
}

static double bicubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/* An axis of a picture whose shorter side becomes `side`, as the crop does. */
static resize_axis make_axis(size_t from, size_t shorter, size_t side, int crop_hf) {
    uint64_t full = (uint64_t)side * from / shorter;
    double scale = (double)from / (double)full;
    return (resize_axis){ from, 0, side, crop_start(full, side, crop_hf), scale, fmax(scale, 1) };
}

/* Resamples the rows of `in` and turns the picture, so that the same again does its columns.
 * out: [axis.count, in.height, 3] */
static int resample(const resize_axis *axis, const picture *in, unsigned char *out) {
    double support = 2 * axis->stretch, step = 1 / axis->stretch;
    int32_t *weight = new_array((size_t)ceil(support) * 2 + 1, sizeof *weight);
    if (!weight) return SC_FAILED;
    for (size_t i = 0; i < axis->count; i++) {
        double centre = ((double)(axis->first + i) + 0.5) * axis->scale, total = 0;
        double low = centre - support + 0.5, high = centre + support + 0.5;
        size_t start = low < 0 ? 0 : (size_t)low;
        size_t end = high > (double)axis->from ? axis->from : (size_t)high;
        for (size_t x = start; x < end; x++) total += bicubic(((double)x - centre + 0.5) * step);
        for (size_t x = start; x < end; x++) {
            double exact = bicubic(((double)x - centre + 0.5) * step) / (total != 0 ? total : 1);
            exact *= 1 << WEIGHT_BITS;
            weight[x - start] = (int32_t)(exact + (exact < 0 ? -0.5 : 0.5));
        }
        for (size_t y = 0; y < in->height; y++) {
            const unsigned char *pixel = in->rgb + y * in->stride + (start - axis->skipped) * 3;
            int32_t half = 1 << (WEIGHT_BITS - 1), sum[3] = { half, half, half };
            for (size_t t = 0; t < end - start; t++)
                for (size_t c = 0; c < 3; c++) sum[c] += weight[t] * pixel[3 * t + c];
            for (size_t c = 0; c < 3; c++) {
                int32_t value = sum[c] < 0 ? 0 : sum[c] >> WEIGHT_BITS;
                *out++ = (unsigned char)(value > 255 ? 255 : value);
            }
        }
    }
    free(weight);
    return SC_OK;
}

/* The shorter side becomes `side`, the centre is kept: pixels [side, side, 3]. */
static int resize_and_crop(const picture *from, size_t side, int crop_hf, unsigned char *pixels) {
    size_t shorter = from->width < from->height ? from->width : from->height;
    resize_axis across = make_axis(from->width, shorter, side, crop_hf);
    resize_axis down = make_axis(from->height, shorter, side, crop_hf);
    double top = (double)down.first * down.scale - 2 * down.stretch;
    double end = (double)(down.first + side) * down.scale + 2 * down.stretch + 1;
    down.skipped = top > 0 ? (size_t)top : 0;  /* a long picture has many rows that do not matter */
    size_t count = (size_t)fmin(end, (double)from->height) - down.skipped;
    picture rows = { from->width, count, from->stride, from->rgb + down.skipped * from->stride };
    unsigned char *turned = new_array(count, 3 * side);
    int status = turned ? resample(&across, &rows, turned) : SC_FAILED;
    if (status == SC_OK)
        status = resample(&down, &(picture){ count, side, 3 * count, turned }, pixels);
    free(turned);
    return status;
}

/* A picture of any size to the model's: pixels [size, size, 3]. */
static int preprocess(picture from, const sc_preprocess *prep, unsigned char *pixels) {
    size_t square = (size_t)prep->square, size = (size_t)prep->size;
    if (square == 0) return resize_and_crop(&from, size, prep->crop_hf, pixels);
    size_t side = from.width < from.height ? from.width : from.height;
    from.rgb += crop_start(from.height, side, prep->crop_hf) * from.stride +
                crop_start(from.width, side, prep->crop_hf) * 3;
    from.width = from.height = side;
    unsigned char *middle = new_array(square, 3 * square);
    int status = middle ? resize_and_crop(&from, square, prep->crop_hf, middle) : SC_FAILED;
    from = (picture){ square, square, 3 * square, middle };
    if (status == SC_OK) status = resize_and_crop(&from, size, prep->crop_hf, pixels);
    free(middle);
    return status;
}

/* --- Data sets --- */

/* Names lie packed in blocks: an image costs its name and 16 bytes. */
static char *keep_name(sc_images *set, const char *name) {
    size_t bytes = strlen(name) + 1, block = bytes > 1 << 16 ? bytes : 1 << 16;
    if (set->room < bytes) {
        if (allocate(&set->memory, &set->text, block, 1) != SC_OK) return NULL;
        set->room = block;
    }
    char *copy = memcpy(set->text, name, bytes);
    set->text += bytes;
    set->room -= bytes;
    return copy;
}

static int add_image(sc_images *set, const char *name, int64_t label) {
    char *copy = keep_name(set, name);
    if (!copy) return SC_FAILED;
    SC_TRY(grow(&set->image, &set->capacity, set->count, sizeof *set->image));
    set->image[set->count++] = (sc_image){ copy, label };
    if (label >= (int64_t)set->classes) set->classes = (size_t)label + 1;
    return SC_OK;
}

static int add_class(sc_images *set, const char *name) {
    SC_TRY(grow(&set->class_name, &set->class_capacity, set->classes, sizeof *set->class_name));
    set->class_name[set->classes] = keep_name(set, name);
    return set->class_name[set->classes++] ? SC_OK : SC_FAILED;
}

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* A folder may end with a slash, or be "" where names are the current folder's. */
static int join_path(const char *folder, const char *name, char path[MAX_PATH]) {
    size_t end = strlen(folder);
    const char *slash = end > 0 && folder[end - 1] != '/' ? "/" : "";
    if (*name == '/') folder = slash = "";
    int length = snprintf(path, MAX_PATH, "%s%s%s", folder, slash, name);
    return length < MAX_PATH ? SC_OK : fail("%s%s%s: the path is too long", folder, slash, name);
}

static int is_visible(const struct dirent *entry) { return entry->d_name[0] != '.'; }

static int by_entry(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* Lists the files below a folder, and the classes: the folders at the top. A link to nowhere is a
 * file; one that leads up ends too deep. */
static int walk_folder(sc_images *set, const char *folder, int64_t label, int depth) {
    char path[MAX_PATH];
    struct stat about;
    struct dirent **entry;
    if (depth > MAX_DEPTH) return fail("%s: lies more than %d deep", folder, MAX_DEPTH);
    int entries = scandir(folder, &entry, is_visible, by_entry), status = SC_OK;
    if (entries < 0) return fail("%s: cannot be opened: %s", folder, strerror(errno));
    for (int i = 0; i < entries && status == SC_OK; i++) {
        if ((status = join_path(folder, entry[i]->d_name, path)) != SC_OK) break;
        int found = stat(path, &about) == 0, is_folder = found && S_ISDIR(about.st_mode);
        if (!found || S_ISREG(about.st_mode))
            status = add_image(set, path + strlen(set->root), label);
        if (is_folder && depth == 0) status = add_class(set, entry[i]->d_name);
        if (is_folder && status == SC_OK)
            status = walk_folder(set, path, depth ? label : (int64_t)set->classes - 1, depth + 1);
    }
    for (int i = 0; i < entries; i++) free(entry[i]);
    free(entry);
    return status;
}

/* DIR/<class>/<file>, or a flat DIR without labels where no class folder holds an image. What
 * cannot be opened counts as an image: its turn to be an error will come. */
static int open_folder(sc_images *set, const char *folder) {
    char path[MAX_PATH];
    size_t kept = 0;
    SC_TRY(walk_folder(set, folder, -1, 0));
    if (set->count) qsort(set->image, set->count, sizeof *set->image, by_name);
    for (int loose = 0; loose < 2 && kept == 0; loose++) {
        size_t others = 0;
        if (loose) {
            free(set->class_name);
            set->class_name = NULL;
            set->classes = 0;
        }
        for (size_t i = 0; i < set->count && kept < set->limit; i++) {
            int status = (set->image[i].label < 0) != loose ? SC_END
                       : join_path(set->root, set->image[i].name, path);
            if (status == SC_OK) status = open_image(path, NULL);
            if (status == SC_END) others++;
            else set->image[kept++] = set->image[i];
        }
        if (kept > 0 && others > 0)
            note("%s: %zu files passed over: not images, or beside class folders", folder, others);
    }
    if (kept == 0)
        return fail("%s: no image among the %zu files of this folder; FOLDER/<class>/<image> or "
                    "FOLDER/<image> was expected", folder, set->count);
    set->count = kept;
    return SC_OK;
}

/* Lines "path" or "path<TAB>label"; a # begins a comment at a line's start or after a blank. */
static int open_list(sc_images *set, const char *path) {
    char text[MAX_PATH + 64], *line, *end, *tab;
    FILE *list = fopen(path, "r");
    if (!list) return fail("%s: cannot be opened: %s", path, strerror(errno));
    int status = SC_OK;
    for (size_t number = 1; status == SC_OK && set->count < set->limit &&
                            fgets(text, sizeof text, list); number++) {
        if (!strchr(text, '\n') && !feof(list))
            status = fail("%s: line %zu: too long, or with a byte 0", path, number);
        end = line = text + strspn(text, " \t\r\n");
        while (*end && !(*end == '#' && (end == line || is_blank(end[-1])))) end++;
        while (end > line && is_blank(end[-1])) end--;
        *end = '\0';
        tab = strchr(line, '\t');
        int64_t label = tab ? (int64_t)strtoll(tab + 1, &end, 10) : -1;
        if (tab) *tab = '\0';
        if (tab && (*end || end == tab + 1 || label < 0 || label >= SC_MAX_CLASSES))
            status = fail("%s: line %zu: the label must be an integer from 0 to %d", path, number,
                          SC_MAX_CLASSES - 1);
        if (status != SC_OK || !*line) continue;
        if (set->count > 0 && (set->image[0].label < 0) != (label < 0))
            status = fail("%s: line %zu: expected labels on every line or on none", path, number);
        else status = add_image(set, line, label);
    }
    if (status == SC_OK && (ferror(list) || set->count == 0))
        status = fail("%s: %s", path, ferror(list) ? "cannot be read" : "a list without an image");
    fclose(list);
    return status;
}

/* Adds the images that a file has, which may say their labels (I64 [count], from `least` on) and
 * then, in its metadata, the classes' names. name: [count], or NULL */
static int add_images(sc_images *set, const sc_safetensors *file, size_t count, int64_t least,
                      char **name) {
    const sc_tensor *labels = sc_tensor_find(file, "labels");
    const char *classes = labels ? sc_metadata_find(file, "class_names") : NULL;
    int64_t label = -1;
    if (labels && (labels->dtype != SC_I64 || labels->rank != 1 || labels->count != count))
        return fail("%s: a tensor labels I64 [%zu] was expected", file->path, count);
    if (classes) SC_TRY(json_string_array(classes, file->path, &set->class_name, &set->classes));
    size_t most = classes ? set->classes : SC_MAX_CLASSES;
    for (size_t i = 0; i < count && i < set->limit; i++) {
        if (labels) SC_TRY(sc_tensor_integers(file, labels, i, 1, &label));
        if (labels && (label < least || label >= (int64_t)most))
            return fail("%s: the label of image %zu is none of the %zu classes", file->path, i,
                        most);
        SC_TRY(add_image(set, name ? name[i] : "", label));
    }
    return SC_OK;
}

/* images U8 [N, H, W, 3], labels and names. */
static int open_packed(sc_images *set, const char *path) {
    SC_TRY(sc_safetensors_open(&set->packed, path));
    const sc_tensor *images = sc_tensor_find(&set->packed, "images");
    const char *file_names = sc_metadata_find(&set->packed, "file_names");
    if (!images || images->dtype != SC_U8 || images->rank != 4 || images->bytes == 0 ||
        images->shape[1] > MAX_PIXELS / images->shape[2] || images->shape[3] != 3)
        return fail("%s: a tensor images U8 [N, H, W, 3], not empty nor huge, was expected", path);
    size_t count = images->shape[0], names = count;
    char **name = NULL;
    if (file_names) SC_TRY(json_string_array(file_names, path, &name, &names));
    int status = names == count ? add_images(set, &set->packed, count, 0, name)
               : fail("%s: %zu file_names for %zu images", path, names, count);
    free(name);
    return status;
}

/* The digest is of N, classes, labels, and names below the root: moving or packing keeps it. */
int sc_images_open(sc_images *set, const char *path, size_t limit) {
    const char *suffix = strrchr(path, '.') ? strrchr(path, '.') : "";
    struct stat about;
    digest64 digest = { 0 };
    *set = (sc_images){ .limit = limit ? limit : SIZE_MAX };
    if (strcmp(path, "-") == 0) set->count = SC_UNKNOWN;
    if (set->count == SC_UNKNOWN) return SC_OK;
    int folder = stat(path, &about) == 0 && S_ISDIR(about.st_mode);
    set->root = join_text(path, folder && *base_name(path) ? "/" : "");
    if (set->root && !folder) set->root[base_name(path) - path] = '\0';
    int status = !set->root ? SC_FAILED : folder ? open_folder(set, path)
               : strcmp(suffix, ".txt") == 0 ? open_list(set, path)
               : strcmp(suffix, ".safetensors") == 0 ? open_packed(set, path)
               : open_image(path, NULL) == SC_OK ? add_image(set, base_name(path), -1) : SC_FAILED;
    if (status != SC_OK) sc_images_close(set);
    if (status != SC_OK) return SC_FAILED;
    digest64_number(&digest, set->count);
    digest64_number(&digest, set->class_name ? set->classes : 0);
    for (size_t c = 0; c < set->classes && set->class_name; c++)
        digest64_add(&digest, set->class_name[c], strlen(set->class_name[c]) + 1);
    for (size_t i = 0; i < set->count; i++) {
        digest64_add(&digest, set->image[i].name, strlen(set->image[i].name) + 1);
        digest64_number(&digest, (uint64_t)set->image[i].label);
    }
    set->digest = digest64_value(&digest);
    return SC_OK;
}

void sc_images_close(sc_images *set) {
    release(&set->memory);
    sc_safetensors_close(&set->packed);
    free(set->class_name);
    free(set->image);
    free(set->root);
    *set = (sc_images){ 0 };
}

/* pixels: [S, S, 3] of image `index`, or of a stream's next */
static int load_image(const sc_images *set, size_t index, image_source *stream,
                      const sc_preprocess *prep, unsigned char *pixels) {
    image_source source = { 0 };
    picture found;
    char path[MAX_PATH];
    int status = SC_OK;
    if (set->packed.path) {
        const sc_tensor *images = sc_tensor_find(&set->packed, "images");
        size_t height = images->shape[1], width = images->shape[2];
        found = (picture){ width, height, 3 * width, images->data + index * height * width * 3 };
    } else if (set->count == SC_UNKNOWN) {
        status = pnm_read(stream, &found);
    } else {
        status = join_path(set->root, set->image[index].name, path);
        if (status == SC_OK) status = read_picture(path, &source, &found);
    }
    if (status == SC_OK && preprocess(found, prep, pixels) != SC_OK) status = MACHINE_FAILED;
    free(source.rgb);
    return status;
}

int sc_image_load(const sc_images *set, size_t index, const sc_preprocess *prep,
                  unsigned char *pixels) {
    if (set->count == SC_UNKNOWN || index >= set->count)
        return usage("image %zu of a set of %zu was asked for", index, set->count);
    return load_image(set, index, NULL, prep, pixels) == SC_OK ? SC_OK : SC_FAILED;
}

/* ============================================================================================
 * 16. Models' files
 *
 * Which file is which model: tensor names, sizes from shapes, settings from metadata.
 * ============================================================================================ */

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
static void spell_name(char *name, int naming, enum role role, size_t block, int bias, char part) {
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

static const sc_tensor *find_layer(const sc_model *model, enum role role, size_t block, int bias) {
    char name[NAME_LENGTH];
    spell_name(name, model->naming, role, block, bias, 'q');
    return sc_tensor_find(&model->file, name);
}

/* Reads a layer's weight or bias of rows x columns numbers (leading dimensions of 1 do not count),
 * or says what is missing or misshapen. Hugging Face has q, k and v apart. */
static int read_layer_tensor(const sc_model *model, enum role role, size_t block, int bias,
                             size_t rows, size_t columns, float *out) {
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
static int read_layer(const sc_model *model, enum role role, size_t block, int plain) {
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
    if (plain && swapped) {
        float *turned = new_array(N, K * sizeof *turned);
        if (!turned) return SC_FAILED;
        for (size_t e = 0; e < N * K; e++) turned[e] = layer->weight[e % K * N + e / K];
        free(layer->weight);
        layer->weight = turned;
    }
    if (layers[role].linear && !plain) {
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

static int load_block(void *context, size_t block) {
    for (enum role role = NORM1; role <= FC2; role++) SC_TRY(read_layer(context, role, block, 0));
    return SC_OK;
}

/* The final norm, the projection or classifier, and the class prompts' embeddings text_embeds
 * [C, P], rows to unit length: what images' embeddings are compared with. */
static int load_head(sc_model *model) {
    const sc_tensor *head = find_layer(model, HEAD, 0, 0);
    const sc_tensor *text = sc_tensor_find(&model->file, "text_embeds");
    if (!head || head->rank != 2)
        return fail("%s: this model has no head (%s [outputs, width] was expected)",
                    model->file.path, layers[HEAD].name[model->naming]);
    size_t outputs = head->shape[model->naming == OPENAI ? 1 : 0], P = padded(outputs);
    model->outputs = model->classes = outputs;
    SC_TRY(read_layer(model, POST, 0, 0));
    SC_TRY(read_layer(model, HEAD, 0, 0));
    if (!text) return SC_OK;
    if (text->rank != 2 || text->shape[1] != outputs || text->shape[0] == 0)
        return fail("%s: text_embeds should be [classes, %zu], the width of the projection",
                    model->file.path, outputs);
    model->classes = text->shape[0];
    if (!(model->text = new_array(model->classes, P * sizeof *model->text))) return SC_FAILED;
    for (size_t c = 0; c < model->classes; c++) {
        float *row = model->text + c * P;
        SC_TRY(sc_tensor_floats(&model->file, text, c * outputs, outputs, row));
        kernels->unit_row(row, P);
    }
    return SC_OK;
}

/* A block with tensors that the table does not name (LayerScale, norms of q and k) is another
 * model: computed without them, its numbers would be wrong. */
static int check_block(const sc_model *model) {
    char begin[NAME_LENGTH], name[NAME_LENGTH];
    snprintf(begin, sizeof begin, "%s%s0.", name_begins[model->naming],
             block_begins[model->naming]);
    for (size_t t = 0; t < model->file.tensors; t++) {
        const char *found = model->file.tensor[t].name;
        int known = strncmp(found, begin, strlen(begin)) != 0;
        for (int i = 0; i < 6 * (FC2 + 1) && !known; i++) {
            spell_name(name, model->naming, (enum role)(i / 6), 0, i % 2, "qkv"[i % 6 / 2]);
            known = strcmp(name, found) == 0;
        }
        if (!known)
            return fail("%s: tensor %.100s has no place in the transformers known here",
                        model->file.path, found);
    }
    return SC_OK;
}

/* Sizes from shapes. */
static int measure_model(sc_model *model) {
    const char *path = model->file.path;
    const sc_tensor *patch = find_layer(model, PATCHES, 0, 0), *fc1 = find_layer(model, FC1, 0, 0);
    const sc_tensor *positions = find_layer(model, POSITIONS, 0, 0);
    if (!patch || patch->rank != 4 || patch->shape[1] != 3 || patch->shape[2] != patch->shape[3]
        || patch->shape[2] == 0 || patch->shape[2] > 1024 || patch->shape[0] == 0
        || patch->shape[0] > SC_MAX_WIDTH)
        return fail("%s: the patch embedding's weight should be [width, 3, patch, patch]", path);
    size_t D = model->width = patch->shape[0];
    model->patch = patch->shape[2];
    if (!positions || positions->rank < 2 || positions->shape[positions->rank - 1] != D)
        return fail("%s: the position embedding should be [tokens, %zu]", path, D);
    size_t T = model->tokens = positions->count / D;
    while ((model->grid + 1) * (model->grid + 1) < T) model->grid++;
    if (T < 2 || T > SC_MAX_TOKENS || model->grid * model->grid + 1 != T)
        return fail("%s: %zu positions are not a class token and a square of patches", path, T);
    if (!fc1 || fc1->rank != 2 || fc1->shape[1] != D || fc1->shape[0] > SC_MAX_WIDTH)
        return fail("%s: the first layer of block 0's MLP should be [hidden, %zu]", path, D);
    model->hidden = fc1->shape[0];
    size_t S = model->image_size = model->grid * model->patch;
    if (S > MAX_PIXELS / S) return fail("%s: pictures of %zu x %zu are too large", path, S, S);
    while (find_layer(model, NORM1, model->blocks, 0)) model->blocks++;
    return model->blocks ? check_block(model) : fail("%s: the model has no blocks", path);
}

enum setting { GELU, EPSILON, HEADS, MEAN, STD, SETTINGS };

/* Takes a setting from its text; what: how errors name it. */
static int apply_setting(sc_model *model, enum setting setting, const char *what, const char *text)
{
    double number = 0;
    if (setting == MEAN || setting == STD) {
        float *value = setting == MEAN ? model->mean : model->std;
        SC_TRY(parse_triple(text, what, value));
        if (setting == STD && !(value[0] > 0 && value[1] > 0 && value[2] > 0))
            return usage("%s: a deviation is not positive", what);
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
static int read_settings(sc_model *model, const sc_model_options *given) {
    int plain = model->naming == TIMM && !find_layer(model, PRE, 0, 0);
    char heads[24], assumed[256] = "", reason[sizeof error_text];
    const struct { const char *option, *given, *key, *usual; } settings[SETTINGS] = {
        { "--gelu", given->gelu, "hidden_act", plain ? "gelu" : "quick_gelu" },
        { "--eps", given->epsilon, "layer_norm_eps", plain ? "1e-6" : "1e-5" },
        { "--heads", given->heads, "num_attention_heads", heads },
        { "--mean", given->mean, "image_mean", "0.48145466,0.4578275,0.40821073" },
        { "--std", given->std, "image_std", "0.26862954,0.26130258,0.27577711" } };
    snprintf(heads, sizeof heads, "%zu", model->width / 64);
    for (enum setting i = 0; i < SETTINGS; i++) {
        const char *key = settings[i].key, *saved = sc_metadata_find(&model->file, key);
        const char *text = saved ? saved : settings[i].usual;
        size_t used = strlen(assumed);
        if (settings[i].given) {
            SC_TRY(apply_setting(model, i, settings[i].option, settings[i].given));
            continue;
        }
        if (!saved) snprintf(assumed + used, sizeof assumed - used, ", %s %s", key, text);
        if (apply_setting(model, i, key, text) == SC_OK) continue;
        memcpy(reason, error_text, sizeof reason);
        return fail("%s: %s %s", model->file.path, saved ? "metadata" : "assumed", reason);
    }
    if (*assumed) note("%s does not say, assumed: %s", model->file.path, assumed + 2);
    return SC_OK;
}

/* Which naming a file's tensors have, NAMINGS for none. */
static int naming_of(const sc_safetensors *file) {
    char name[NAME_LENGTH];
    for (int naming = 0; naming < NAMINGS; naming++) {
        spell_name(name, naming, CLASS_TOKEN, 0, 0, 'q');
        if (sc_tensor_find(file, name)) return naming;
    }
    return NAMINGS;
}

int sc_model_open(sc_model *model, const char *path, const sc_model_options *given) {
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
int sc_model_load(sc_model *model, size_t blocks, int head) {
    SC_TRY(choose_kernels());
    if (blocks > model->blocks) blocks = model->blocks;
    model->loaded = blocks;
    model->layer = new_array(blocks ? blocks : 1, ROLES * sizeof *model->layer);
    if (!model->layer) return SC_FAILED;
    for (enum role role = CLASS_TOKEN; role <= PATCHES; role++) SC_TRY(read_layer(model, role, 0, 0));
    if (find_layer(model, PRE, 0, 0)) SC_TRY(read_layer(model, PRE, 0, 0));
    SC_TRY(parallel_for(blocks, load_block, model));
    return head ? load_head(model) : SC_OK;
}

static void free_layers(sc_model *model) {
    size_t count = (model->loaded ? model->loaded : 1) * ROLES;
    for (size_t i = 0; model->layer && i < count; i++) {
        free(model->layer[i].matrix.data);
        free(model->layer[i].weight);
        free(model->layer[i].bias);
    }
    free(model->layer);
    model->layer = NULL;
}

/* A model for Part I: the same, but its layers hold the weights as PyTorch has them, those of the
 * first `blocks` blocks and of the head if asked. Closed by free_layers(). */
static int open_plain_model(sc_model *plain, const sc_model *model, size_t blocks, int head) {
    int status = SC_OK;
    *plain = *model;
    plain->loaded = blocks;
    plain->layer = new_array(blocks ? blocks : 1, ROLES * sizeof *plain->layer);
    if (!plain->layer) return SC_FAILED;
    for (enum role role = CLASS_TOKEN; role < ROLES && status == SC_OK; role++) {
        int in_blocks = role >= NORM1 && role <= FC2;
        if (role == PRE && !find_layer(model, PRE, 0, 0)) continue;
        if (role >= POST && !head) continue;
        for (size_t block = 0; block < (in_blocks ? blocks : 1) && status == SC_OK; block++)
            status = read_layer(plain, role, block, 1);
    }
    if (status != SC_OK) free_layers(plain);
    return status;
}

int sc_model_forward_plain(const sc_model *model, const unsigned char *pixels, size_t layer,
                           sc_hook hook, float *out) {
    sc_model plain;
    if (layer < 1 || layer > model->blocks)
        return usage("%s: layer %zu (expected 1 to %zu)", model->file.path, layer, model->blocks);
    SC_TRY(open_plain_model(&plain, model, layer, 0));
    int status = vit_forward(&plain, pixels, layer, hook, out, NULL);
    free_layers(&plain);
    return status;
}

void sc_model_close(sc_model *model) {
    free_layers(model);
    free(model->text);
    sc_safetensors_close(&model->file);
    *model = (sc_model){ 0 };
}

/* A hook point by its name. */
static const char *const hook_names[] = { "attn", "mlp", "resid" };

static int parse_hook(const char *text, sc_hook *hook) {
    for (*hook = SC_ATTN; *hook <= SC_RESID; ++*hook)
        if (strcmp(text, hook_names[*hook]) == 0) return SC_OK;
    return usage("hook '%s' is none of attn, mlp, resid", text);
}

/* ============================================================================================
 * 17. SAEs' files
 *
 * The tensors of an SAE, in and out, and where it listens.
 * ============================================================================================ */

static const char *const architecture_names[] = { "standard", "topk" };

/* Better to fail now than when the work is done. */
static int try_output(const char *path) {
    sc_writer w;
    SC_TRY(sc_writer_open(&w, path, 0));
    sc_writer_discard(&w);
    return SC_OK;
}

/* A tensor by its shape in files, a vector (rank 1) having one row, and by where its element [r, c]
 * lies in memory: values[r * down + c * across]. */
typedef struct {
    const char *name;
    float *values;
    int rank;
    size_t rows, columns, down, across;
} float_tensor;

/* Writes a tensor or, where there is no writer, reads it from a file, some rows at a time. Adds it
 * to a digest, if there is one. */
static int move_tensor(const float_tensor *t, const sc_safetensors *file, sc_writer *w,
                       digest64 *digest) {
    enum { ROWS = 16 };
    const sc_tensor *source = w ? NULL : sc_tensor_find(file, t->name);
    size_t shape[2] = { t->rows, t->columns };
    if (w) SC_TRY(sc_writer_tensor(w, t->name, SC_F32, t->rank, shape + 2 - t->rank));
    else if (!source || source->rank == 0 || source->count != t->rows * t->columns
             || source->shape[source->rank - 1] != t->columns)
        return fail("%s: a tensor %s of %zu x %zu was expected", file->path, t->name, t->rows,
                    t->columns);
    float *some = new_array(t->columns, ROWS * sizeof *some);
    int status = some ? SC_OK : SC_FAILED;
    for (size_t r = 0; r < t->rows && status == SC_OK; r += ROWS) {
        size_t height = t->rows - r < ROWS ? t->rows - r : ROWS, count = height * t->columns;
        if (!w) status = sc_tensor_floats(file, source, r * t->columns, count, some);
        for (size_t c = 0; c < t->columns; c++)
            for (size_t i = 0; i < height; i++) {
                float *here = t->values + (r + i) * t->down + c * t->across;
                float *there = some + i * t->columns + c;
                if (w) *there = *here;
                else *here = *there;
            }
        if (w) status = sc_writer_floats(w, some, count);
        for (size_t i = 0; digest && i < count; i++)
            digest64_number(digest, bits_of_float(some[i]));
    }
    free(some);
    return status;
}

/* An SAE's tensors, each latent by latent in memory, W_enc too. */
static int move_sae(const sc_sae *sae, const sc_safetensors *file, sc_writer *w, digest64 *digest) {
    size_t n = sae->d_sae, D = sae->d_in, stride = sae->stride;
    const float_tensor tensors[] = {
        { "W_enc", sae->W_enc, 2, D, n, 1, stride }, { "b_enc", sae->b_enc, 1, 1, n, 0, 1 },
        { "W_dec", sae->W_dec, 2, n, D, stride, 1 }, { "b_dec", sae->b_dec, 1, 1, D, 0, 1 } };
    for (size_t i = 0; i < COUNT(tensors); i++) SC_TRY(move_tensor(&tensors[i], file, w, digest));
    return SC_OK;
}

static int write_sae(sc_writer *w, void *context) {
    const sc_sae *sae = context;
    SC_TRY(sc_writer_metadata(w, "architecture", architecture_names[sae->topk]));
    if (sae->topk) SC_TRY(put_metadata(w, "k", "%zu", sae->k));
    SC_TRY(put_metadata(w, "d_in", "%zu", sae->d_in));
    SC_TRY(put_metadata(w, "d_sae", "%zu", sae->d_sae));
    if (sae->layer) SC_TRY(put_metadata(w, "layer", "%zu", sae->layer));
    if (sae->hook >= 0) SC_TRY(sc_writer_metadata(w, "hook", hook_names[sae->hook]));
    if (sae->model) SC_TRY(sc_writer_metadata(w, "model", sae->model));
    return move_sae(sae, NULL, w, NULL);
}

int sc_sae_save(const sc_sae *sae, const char *path) {
    sc_sae copy = *sae;
    SC_TRY(check_k(sae));
    return save_tensors(path, 4096, write_sae, &copy);
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

/* Where activations come from, where that is not known yet: an SAE's metadata and those of saved
 * activations say it in the same words. */
static int read_origin(sc_sae *sae, const sc_safetensors *file) {
    const char *hook = sc_metadata_find(file, "hook"), *model = sc_metadata_find(file, "model");
    sc_hook found = SC_MLP;
    if (!sae->layer) SC_TRY(metadata_number(file, "layer", 1e6, &sae->layer));
    if (hook && sae->hook < 0 && parse_hook(hook, &found) != SC_OK)
        return fail("%s: metadata hook = '%s' is none of attn, mlp, resid", file->path, hook);
    if (hook && sae->hook < 0) sae->hook = (int)found;
    if (!model || sae->model) return SC_OK;
    sae->model = copy_string(base_name(model));
    return sae->model ? SC_OK : SC_FAILED;
}

static int read_sae(sc_sae *sae, const sc_safetensors *file) {
    const sc_tensor *encoder = sc_tensor_find(file, "W_enc");
    const char *architecture = sc_metadata_find(file, "architecture");
    const char *start = sc_metadata_find(file, "b_dec_start");
    if (!encoder || encoder->rank != 2 || encoder->count == 0)
        return fail("%s: this is no SAE: a tensor W_enc [d_in, d_sae] was expected", file->path);
    if (sc_tensor_find(file, "threshold") || sc_tensor_find(file, "log_threshold"))
        return fail("%s: a JumpReLU SAE (tensor threshold), expected standard or topk", file->path);
    SC_TRY(new_sae(sae, encoder->shape[0], encoder->shape[1]));
    SC_TRY(move_sae(sae, file, NULL, NULL));
    sae->topk = architecture && strcmp(architecture, architecture_names[1]) == 0;
    if (architecture && strcmp(architecture, architecture_names[sae->topk]) != 0)
        return fail("%s: architecture '%s' is neither standard nor topk", file->path, architecture);
    SC_TRY(metadata_number(file, "k", (double)sae->d_sae, &sae->k));
    SC_TRY(read_origin(sae, file));
    if (!(sae->path = copy_string(file->path))) return SC_FAILED;
    if (start && !(sae->b_dec_start = copy_string(start))) return SC_FAILED;
    return SC_OK;
}

int sc_sae_open(sc_sae *sae, const char *path) {
    sc_safetensors file;
    *sae = (sc_sae){ 0 };
    SC_TRY(sc_safetensors_open(&file, path));
    int status = read_sae(sae, &file);
    sc_safetensors_close(&file);
    if (status != SC_OK) sc_sae_close(sae);
    return status;
}

/* ============================================================================================
 * 18. Activations
 *
 * One stream of activations for training and measuring, image by image: read from a file that
 * `extract` wrote, or computed from photos as they are read. Several hook points share one pass.
 * ============================================================================================ */

/* The image of draw 0, 1, ...; SC_OK, or SC_END when there are no more. */
typedef int draw_function(void *context, size_t draw, size_t *image);

typedef struct {
    size_t T, D, stride;             /* tokens an image, width, width padded */
    size_t grid;                     /* patches a side, 0 where the tokens are no grid */
    size_t first_patch;              /* 1 where token 0 is the class token */
    size_t taps;
    sc_tap tap[SC_MAX_TAPS];         /* hook points; out: [room, T, stride] */
    size_t *image, *draw;            /* [ahead], their indices in the data set and in the order */
    int64_t *label;                  /* [ahead], -1 without */
    unsigned char *pixels;           /* [ahead, S, S, 3] */
    float *logits;                   /* [room, classes], where asked for */
    size_t count;                    /* images in the batch at hand: the first in the arrays */
    size_t computed, loaded, ahead;  /* so many have activations; are there; may be there */
    size_t used;                     /* images of the batches before */
    size_t drawn, bad;               /* draws that were loaded; images named as bad */
    array_spec array[5 + SC_MAX_TAPS];           /* all of the above arrays, a row an image */
    size_t arrays;
    memory_list memory;
    int is_file, skip_bad;
    sc_safetensors file;             /* activations, where is_file */
    const sc_tensor *activations;
    sc_images set;                   /* photos; of a file the labels alone */
    sc_model model;
    sc_preprocess preprocess;
    image_source stream;             /* standard input */
    draw_function *order;
    void *order_context;
} feed;

enum {
    FORWARD_IMAGES = 16,             /* images a forward pass takes at once */
    MEASURE_IMAGES = 16              /* images a batch, where nobody asks for a size */
};

/* What an image is called in messages and tables. */
static const char *image_name(const feed *f, size_t image) {
    return f->set.count == SC_UNKNOWN ? "" : f->set.image[image].name;
}

/* Adds to an error the image and token at fault; token: of the batch at hand. */
static int blame_token(const feed *f, size_t token) {
    char reason[sizeof error_text];
    size_t image = f->image[token / f->T];
    const char *name = image_name(f, image);
    memcpy(reason, error_text, sizeof reason);
    return fail("image %zu%s%s, token %zu: %s", image, *name ? " " : "", name, token % f->T,
                reason);
}

/* A file that does not say of which data set it is has a digest of its labels. */
static int open_activations(feed *f, const options *o) {
    SC_TRY(sc_safetensors_open(&f->file, o->acts));
    const sc_tensor *a = f->activations = sc_tensor_find(&f->file, "activations");
    const char *tokens = sc_metadata_find(&f->file, "tokens");
    const char *digest = sc_metadata_find(&f->file, "data_digest");
    digest64 labels = { 0 };
    if (!a || a->rank != 3 || a->count == 0)
        return fail("%s: a tensor activations [images, tokens, width] was expected", o->acts);
    f->is_file = 1;
    f->T = a->shape[1];
    f->D = a->shape[2];
    f->first_patch = !tokens || strcmp(tokens, "patches") != 0;  /* of "cls" no token is a patch */
    f->set.limit = SIZE_MAX;
    SC_TRY(add_images(&f->set, &f->file, a->shape[0], -1, NULL));
    for (size_t i = 0; i < f->set.count && !digest; i++)
        digest64_number(&labels, (uint64_t)f->set.image[i].label);
    f->set.digest = digest ? (uint64_t)strtoull(digest, NULL, 16) : digest64_value(&labels);
    if (o->limit && (size_t)o->limit < f->set.count) {
        f->set.count = (size_t)o->limit;
        f->set.digest = digest64_step(f->set.digest, f->set.count);  /* not the whole data set */
    }
    return SC_OK;
}

/* Images as a model, or a packed set, of pictures of `side` wants them. */
static int open_photos(feed *f, const options *o, size_t side) {
    f->preprocess = (sc_preprocess){ .size = (int)side, .square = (int)o->square,
                                     .crop_hf = strcmp(o->crop, "hf") == 0 };
    SC_TRY(sc_images_open(&f->set, o->operand[0], (size_t)o->limit));
    f->stream = (image_source){ .name = "standard input" };
    f->skip_bad = o->skip_bad && f->set.count != SC_UNKNOWN;
    return SC_OK;
}

/* Opens DATA: saved activations (--acts), or images through a model. */
static int open_feed(feed *f, const options *o) {
    *f = (feed){ 0 };
    if (o->acts && !o->operand[0]) SC_TRY(open_activations(f, o));
    else if (o->operand[0] && o->model) {
        SC_TRY(sc_model_open(&f->model, o->model, &o->settings));
        f->T = f->model.tokens;
        f->D = f->model.width;
        f->first_patch = 1;
        SC_TRY(open_photos(f, o, f->model.image_size));
    } else return usage("no data: give --acts FILE, or -m MODEL and IMAGES");
    f->stride = padded(f->D);
    if (f->D > SC_MAX_WIDTH || f->T > SC_MAX_TOKENS || f->T > SIZE_MAX / sizeof(float) / f->stride)
        return fail("%s: activations of %zu tokens x %zu are too large",
                    f->is_file ? f->file.path : f->model.file.path, f->T, f->D);
    while ((f->grid + 1) * (f->grid + 1) <= f->T - f->first_patch) f->grid++;
    if (f->grid * f->grid != f->T - f->first_patch) f->grid = 0;
    return SC_OK;
}

/* Asks for a hook point; layer -1 is the last. Returns its place among the taps in *place. Saved
 * activations have one, wherever it is (layer 0: not known). */
static int add_tap(feed *f, long layer, sc_hook hook, size_t *place) {
    long blocks = (long)f->model.blocks;
    if (!f->is_file && (layer == 0 || layer > blocks || -layer > blocks))
        return fail("%s: layer %ld of %ld: 1 to %ld or -1 to -%ld was expected", f->model.file.path,
                    layer, blocks, blocks, blocks);
    sc_tap tap = { .hook = hook, .stride = f->stride };
    tap.layer = layer > 0 ? (size_t)layer : f->is_file ? 0 : (size_t)(blocks + 1 + layer);
    for (*place = 0; *place < f->taps; ++*place)
        if (f->is_file || (f->tap[*place].layer == tap.layer && f->tap[*place].hook == hook))
            return SC_OK;
    f->tap[f->taps++] = tap;                     /* there are no more SAEs than room for taps */
    return SC_OK;
}

/* Starts handing out batches of up to `room` images, in the order given (NULL: first to last; a
 * stream has no other). Pictures are loaded ahead, so that every thread can decode some. */
static int start_feed(feed *f, size_t room, draw_function *order, void *context, int with_logits) {
    size_t S = (size_t)f->preprocess.size, many = 4 * (size_t)thread_count(), deepest = 0;
    int stream = f->set.count == SC_UNKNOWN;
    for (size_t i = 0; i < f->taps; i++)
        if (f->tap[i].layer > deepest) deepest = f->tap[i].layer;
    if (f->model.blocks)
        SC_TRY(sc_model_load(&f->model, with_logits ? f->model.blocks : deepest, with_logits));
    f->order = stream ? NULL : order;
    f->order_context = context;
    f->ahead = f->is_file || stream || room > many ? room : many;
    const array_spec images[] = {
        ARRAY(f->image, f->ahead, 1), ARRAY(f->draw, f->ahead, 1), ARRAY(f->label, f->ahead, 1),
        ARRAY(f->pixels, f->ahead, S * S * 3) };
    memcpy(f->array, images, sizeof images);
    f->arrays = COUNT(images);
    for (size_t i = 0; i < f->taps; i++)
        f->array[f->arrays++] = (array_spec)ARRAY(f->tap[i].out, room, f->T * f->stride);
    if (with_logits) f->array[f->arrays++] = (array_spec)ARRAY(f->logits, room, f->model.classes);
    return new_arrays(&f->memory, f->array, f->arrays);
}

static int load_task(void *context, size_t task) {
    feed *f = context;
    size_t i = f->loaded + task, image = f->image[i], S = (size_t)f->preprocess.size;
    f->label[i] = f->set.count == SC_UNKNOWN ? -1 : f->set.image[image].label;
    if (!f->is_file)
        return load_image(&f->set, image, &f->stream, &f->preprocess, f->pixels + i * S * S * 3);
    for (size_t t = 0; t < f->T; t++)
        if (sc_tensor_floats(&f->file, f->activations, (image * f->T + t) * f->D, f->D,
                             f->tap[0].out + (i * f->T + t) * f->stride) != SC_OK)
            return blame_token(f, i * f->T + t);
    return SC_OK;
}

/* The images that were loaded ahead move to the front, where the last batch was. */
static void drop_batch(feed *f) {
    for (size_t a = 0; a < f->arrays; a++) {
        size_t rows = f->loaded < f->array[a].rows ? f->loaded : f->array[a].rows;
        size_t bytes = f->array[a].row_bytes;
        unsigned char *front;
        memcpy(&front, f->array[a].pointer, sizeof front);
        if (rows > f->count) memmove(front, front + f->count * bytes, (rows - f->count) * bytes);
    }
    f->used += f->count;
    f->loaded -= f->count;
    f->computed -= f->count;
    f->count = 0;
}

/* Has `want` images loaded, fewer only at the end. One that fails is met again, and an error, when
 * all before it are used up. With skip_bad a bad image is named, loses its name and is passed over
 * from then on; where all are bad we fail: the order may be endless. */
static int load_images(feed *f, size_t want) {
    int stream = f->set.count == SC_UNKNOWN;
    size_t last = f->set.count < f->set.limit ? f->set.count : f->set.limit;
    while (f->loaded < want) {
        size_t end = f->loaded, most = stream ? end + 1 : f->is_file ? want : f->ahead;
        for (size_t draw = f->drawn, image = draw; end < most; image = ++draw) {
            if (f->order ? f->order(f->order_context, draw, &image) == SC_END : draw >= last) break;
            f->draw[end] = draw;
            f->image[end] = image;
            end += stream || f->set.image[image].name;
        }
        if (end == f->loaded) return SC_OK;
        int status = parallel_for(end - f->loaded, load_task, f);
        if (status != SC_OK) end = f->loaded + pool.failed_task;     /* all before it are there */
        if (status != SC_OK && end == f->loaded) {
            if (status == SC_END) return SC_OK;
            if (status != SC_FAILED || !f->skip_bad) return SC_FAILED;
            char reason[sizeof error_text];
            note("%s; passed over", strcpy(reason, error_text));
            f->set.image[f->image[end]].name = NULL;
            if (++f->bad == f->set.count)
                return fail("%s; none of %zu images could be read", reason, f->bad);
        } else f->drawn = f->draw[end - 1] + 1;
        f->loaded = end;
    }
    return SC_OK;
}

/* Finite weights may still give numbers that are not. rows: [images, count, stride] of the batch */
static int check_finite(const feed *f, const float *rows, size_t count, size_t stride) {
    size_t first = f->computed * count * stride, end = f->count * count * stride;
    size_t bad = first + first_not_finite(rows + first, end - first);
    if (bad == end) return SC_OK;
    fail("%s gives %g where a finite number was expected", f->model.file.path, (double)rows[bad]);
    return blame_token(f, bad / stride * (f->T / count));
}

static int compute_activations(feed *f) {
    size_t S = f->model.image_size, images;
    for (size_t first = f->computed; first < f->count; first += images) {
        sc_tap tap[SC_MAX_TAPS];
        images = f->count - first < FORWARD_IMAGES ? f->count - first : FORWARD_IMAGES;
        memcpy(tap, f->tap, sizeof tap);
        for (size_t i = 0; i < f->taps; i++) tap[i].out += first * f->T * f->stride;
        SC_TRY(sc_model_forward(&f->model, f->pixels + first * S * S * 3, images, tap, f->taps,
                                f->logits ? f->logits + first * f->model.classes : NULL));
    }
    for (size_t i = 0; i < f->taps; i++) SC_TRY(check_finite(f, f->tap[i].out, f->T, f->stride));
    return f->logits ? check_finite(f, f->logits, 1, f->model.classes) : SC_OK;
}

/* The next batch: f->count images, 0 at the end. */
static int next_batch(feed *f, size_t want) {
    drop_batch(f);
    SC_TRY(load_images(f, want));
    if (f->drawn == 0 && f->bad == 0)                        /* all of a shard may be bad */
        return fail("%s: no picture came", f->set.root ? f->set.root : "standard input");
    f->count = f->loaded < want ? f->loaded : want;
    if (f->computed >= f->count) return SC_OK;
    if (f->model.blocks && (f->taps || f->logits)) SC_TRY(compute_activations(f));
    f->computed = f->count;
    return SC_OK;
}

static void close_feed(feed *f) {
    release(&f->memory);
    free(f->stream.rgb);
    sc_safetensors_close(&f->file);
    sc_images_close(&f->set);
    sc_model_close(&f->model);
    *f = (feed){ 0 };
}

/* Options overrule what an SAE's file says. It must agree with the activations, and listens to the
 * tap at *place. What training does not know it takes from saved activations; of a model it listens
 * to the MLP of the last block but one. */
static int connect_sae(feed *f, sc_sae *sae, const options *o, int training, size_t *place) {
    const char *layer = sc_metadata_find(&f->file, "layer");
    const char *hook = sc_metadata_find(&f->file, "hook");
    sc_hook kind = SC_MLP;
    if (o->arch) sae->topk = strcmp(o->arch, "topk") == 0;
    if (o->k) sae->k = (size_t)o->k;
    if (o->hook && parse_hook(o->hook, &kind) == SC_OK) sae->hook = (int)kind;
    if (sae->topk && (sae->k == 0 || sae->k > sae->d_sae))
        return fail("%s: a TopK SAE whose k is not from 1 to %zu (--k)",
                    sae->path ? sae->path : o->output, sae->d_sae);
    if (sae->d_in != f->D)
        return fail("%s: an SAE of width %zu, but activations of %zu", sae->path, sae->d_in, f->D);
    if (layer && sae->layer && !o->layer && strtoul(layer, NULL, 10) != sae->layer)
        return fail("%s: activations of layer %s where layer %zu was expected", f->file.path, layer,
                    sae->layer);
    if (hook && sae->hook >= 0 && !o->hook && strcmp(hook, hook_names[sae->hook]) != 0)
        return fail("%s: activations of hook %s where %s was expected", f->file.path, hook,
                    hook_names[sae->hook]);
    if (training && f->is_file) SC_TRY(read_origin(sae, &f->file));
    else if (training && sae->hook < 0) sae->hook = SC_MLP;
    long usual = training && !f->is_file ? -2 : 0;
    long at = o->layer ? o->layer : sae->layer ? (long)sae->layer : usual;
    if (!f->is_file && (!at || sae->hook < 0))
        return usage("%s does not say where it listens: --layer and --hook", sae->path);
    SC_TRY(add_tap(f, at, sae->hook < 0 ? SC_MLP : (sc_hook)sae->hook, place));
    if (training) sae->layer = f->tap[*place].layer;
    return SC_OK;
}

/* ********************************************************************************************
 * Part IV: the program
 *
 * Training runs, statistics, tables, pictures, figures, the atlas, the command line.
 * ******************************************************************************************** */

/* ============================================================================================
 * 19. Training runs
 *
 * Step after step over a data set: the order of images, the log, checkpoints, signals. A run that
 * was stopped goes on from its checkpoint to the same bytes.
 * ============================================================================================ */

typedef struct {
    const options *o;
    feed data;
    sc_sae sae;
    sc_trainer *trainer;
    size_t batch;                    /* images a step */
    uint64_t *order, epoch;          /* [N], and whose it is; NULL: first to last */
    uint64_t steps, next_draw;
    uint64_t recipe;                 /* digest of what a resumed run must agree in */
    FILE *log;
    double started;
    char *checkpoint, *previous;     /* where to, and where the one before stays */
    uint64_t saved;                  /* the step of the last checkpoint */
    int checkpoints;                 /* asked for, not only on a signal */
} training_run;

/* Every epoch is a permutation of its own. */
static int training_draw(void *context, size_t draw, size_t *image) {
    training_run *run = context;
    size_t N = run->data.set.count, epoch = draw / N;
    if (run->order && epoch != run->epoch)
        permutation((uint64_t)run->o->seed, epoch, run->order, N);
    run->epoch = epoch;
    *image = run->order ? (size_t)run->order[draw % N] : draw % N;
    return SC_OK;
}

/* All that decides a run's numbers and can be told in words, as metadata of the SAE or, where there
 * is no writer, into a digest. What is neither a text nor a number from 0 on is left out: the
 * model's file says how it wants photos, unless options do. */
static int put_recipe(const training_run *run, sc_writer *w, digest64 *digest) {
    static const sc_model_options none = { 0 };
    const options *o = run->o;
    const sc_sae *sae = &run->sae;
    int photos = !run->data.is_file;
    const sc_model_options *seen = photos ? &o->settings : &none;
    const struct { const char *key, *text; double number; } rows[] = {
        { "architecture", architecture_names[sae->topk], -1 },
        { "k", NULL, sae->topk ? (double)sae->k : -1 }, { "d_in", NULL, (double)sae->d_in },
        { "d_sae", NULL, (double)sae->d_sae },
        { "layer", NULL, sae->layer ? (double)sae->layer : -1 },
        { "hook", sae->hook < 0 ? NULL : hook_names[sae->hook], -1 }, { "model", sae->model, -1 },
        { "square", NULL, photos && o->square ? (double)o->square : -1 },
        { "crop", photos && strcmp(o->crop, "hf") == 0 ? "hf" : NULL, -1 },
        { "gelu", seen->gelu, -1 }, { "epsilon", seen->epsilon, -1 }, { "heads", seen->heads, -1 },
        { "mean", seen->mean, -1 }, { "std", seen->std, -1 },
        { "l1", NULL, sae->topk ? -1 : o->l1 }, { "lr", NULL, o->lr },
        { "warmup", NULL, (double)o->warmup }, { "batch", NULL, (double)o->batch },
        { "steps", NULL, (double)run->trainer->step }, { "seed", NULL, o->seed },
        { "ghost", NULL, o->ghost }, { "dead_window", NULL, (double)o->dead_window },
        { "b_dec_images", NULL, (double)o->b_dec_images },
        { "b_dec_start", o->init ? "file" : o->b_dec, -1 }, { "order", o->order, -1 } };
    for (size_t i = 0; i < COUNT(rows); i++) {
        char number[32];
        const char *value = rows[i].text ? rows[i].text : number;
        if (value == number && rows[i].number < 0) continue;
        snprintf(number, sizeof number, "%.17g", rows[i].number);
        if (w) SC_TRY(sc_writer_metadata(w, rows[i].key, value));
        else {
            digest64_add(digest, rows[i].key, strlen(rows[i].key) + 1);
            digest64_add(digest, value, strlen(value) + 1);
        }
    }
    return SC_OK;
}

/* Of the recipe, the data set, and the first MiB of the weights or saved activations. Taken before
 * the first step: a resumed run may have more of them. */
static uint64_t recipe_digest(const training_run *run) {
    const sc_safetensors *source = run->data.is_file ? &run->data.file : &run->data.model.file;
    size_t sample = (size_t)(source->data - source->map) + ((size_t)1 << 20);
    digest64 d = { 0 };
    digest64_number(&d, run->data.set.digest);
    digest64_add(&d, source->map, sample < source->size ? sample : source->size);
    put_recipe(run, NULL, &d);
    return digest64_value(&d);
}

static int write_trained(sc_writer *w, void *context) {
    const training_run *run = context;
    SC_TRY(put_recipe(run, w, NULL));
    return move_sae(&run->sae, NULL, w, NULL);
}

/* --- Checkpoints: the SAE, and what else training goes on from --- */

/* The metadata "position": step, next draw, the recipe's digest, the checksum of it all. */
typedef unsigned long long run_position[4];

/* Writes the state, or reads it where there is no writer. Returns the checksum in *sum. */
static int move_state(sc_trainer *t, const run_position at, const sc_safetensors *file, sc_writer *w,
                      unsigned long long *sum) {
    size_t n = t->sae->d_sae, D = t->sae->d_in, row = t->sae->stride;
    const sc_tensor *silent = w ? NULL : sc_tensor_find(file, "silent");
    const float_tensor adam[] = {
        { "W_enc_m", t->W_enc.m, 2, n, D, row, 1 }, { "W_enc_v", t->W_enc.v, 2, n, D, row, 1 },
        { "W_dec_m", t->W_dec.m, 2, n, D, row, 1 }, { "W_dec_v", t->W_dec.v, 2, n, D, row, 1 },
        { "b_enc_m", t->b_enc.m, 1, 1, n, 0, 1 }, { "b_enc_v", t->b_enc.v, 1, 1, n, 0, 1 },
        { "b_dec_m", t->b_dec.m, 1, 1, D, 0, 1 }, { "b_dec_v", t->b_dec.v, 1, 1, D, 0, 1 } };
    digest64 digest = { 0 };
    SC_TRY(move_sae(t->sae, file, w, &digest));
    for (size_t i = 0; i < COUNT(adam); i++) SC_TRY(move_tensor(&adam[i], file, w, &digest));
    if (w) SC_TRY(sc_writer_tensor(w, "silent", SC_I64, 1, &n));
    if (w) SC_TRY(sc_writer_integers(w, t->silent, n));
    else if (!silent || silent->count != n)
        return fail("%s: a tensor silent of %zu was expected", file->path, n);
    else SC_TRY(sc_tensor_integers(file, silent, 0, n, t->silent));
    for (size_t j = 0; j < n; j++) digest64_number(&digest, (uint64_t)t->silent[j]);
    for (int i = 0; i < 3; i++) digest64_number(&digest, at[i]);
    *sum = digest64_value(&digest);
    return SC_OK;
}

static int write_checkpoint(sc_writer *w, void *context) {
    training_run *run = context;
    run_position at = { run->trainer->step, run->next_draw, run->recipe };
    SC_TRY(put_recipe(run, w, NULL));
    SC_TRY(move_state(run->trainer, at, NULL, w, &at[3]));
    w->out.previous = run->previous;
    return put_metadata(w, "position", "%llx %llx %llx %llx", at[0], at[1], at[2], at[3]);
}

static int save_checkpoint(training_run *run) {
    if (run->saved == run->trainer->step) return SC_OK;
    run->saved = run->trainer->step;
    return save_tensors(run->checkpoint, 4096, write_checkpoint, run);
}

static int read_checkpoint(training_run *run, const sc_safetensors *file) {
    sc_trainer *t = run->trainer;
    const char *position = sc_metadata_find(file, "position");
    unsigned long long sum = 0;
    run_position at;
    if (!position || sscanf(position, "%16llx %16llx %16llx %16llx", &at[0], &at[1], &at[2],
                            &at[3]) != 4)
        return fail("%s: this is no checkpoint", file->path);
    if (at[2] != run->recipe)
        return fail("%s: the checkpoint is of other options or data than this run", file->path);
    SC_TRY(move_state(t, at, file, NULL, &sum));
    if (at[3] != sum) return fail("%s: the checksum does not match the contents", file->path);
    if (at[0] > run->steps)
        return usage("%s: is of step %llu, this run ends before", file->path, at[0]);
    run->next_draw = at[1];
    for (; t->step < at[0]; t->step++) {
        t->beta1_power *= 0.9;
        t->beta2_power *= 0.999;
    }
    run->saved = t->step;
    return SC_OK;
}

/* Goes on from a checkpoint if there is one; an error names the one before. */
static int resume_training(training_run *run) {
    char reason[sizeof error_text];
    sc_safetensors file;
    int before = access(run->previous, F_OK) == 0;
    if (!before && access(run->checkpoint, F_OK) != 0) {
        note("%s: there is no checkpoint yet, starting afresh", run->checkpoint);
        return SC_OK;
    }
    int status = sc_safetensors_open(&file, run->checkpoint);
    if (status == SC_OK) status = read_checkpoint(run, &file);
    sc_safetensors_close(&file);
    if (status == SC_OK || !before) return status;
    memcpy(reason, error_text, sizeof reason);
    return fail("%s; the checkpoint before it is %s", reason, run->previous);
}

static const char log_header[] = "step,images,tokens,lr,loss,mse,l1,ghost,l0,explained_variance,"
                                 "dead,seconds\n";

/* Opens and locks the log; of a resumed run, cut back to the step it goes on from. */
static int open_log(training_run *run) {
    const char *path = run->o->log;
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct stat about;
    off_t end = 0;
    char line[512];
    if (!path) return SC_OK;
    int there = stat(path, &about) == 0, regular = !there || S_ISREG(about.st_mode);
    int resumed = run->trainer->step > 0 && there && regular;
    run->log = fopen(path, resumed ? "r+" : regular ? "a" : "w");    /* "w" empties: another's? */
    if (!run->log) return write_failed(path, errno);
    if (regular && fcntl(fileno(run->log), F_SETLK, &lock) != 0) {
        if (errno == EACCES || errno == EAGAIN) errno = EBUSY;
        return write_failed(path, errno);
    }
    while (resumed && fgets(line, sizeof line, run->log) && strchr(line, '\n')
           && (end == 0 || strtoull(line, NULL, 10) <= run->trainer->step))
        end = ftello(run->log);
    if (ferror(run->log)) return write_failed(path, errno);
    if ((resumed && fseeko(run->log, end, SEEK_SET) != 0)
        || (regular && ftruncate(fileno(run->log), end) != 0)) return write_failed(path, errno);
    if (end > 0 || (fputs(log_header, run->log) >= 0 && fflush(run->log) == 0)) return SC_OK;
    return write_failed(path, errno);
}

static int log_step(training_run *run, const sc_step *r) {
    uint64_t step = run->trainer->step, images = step * run->batch;
    if (run->log && (fprintf(run->log, "%ju,%ju,%ju,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%zu,%.3f\n",
                             (uintmax_t)step, (uintmax_t)images, (uintmax_t)(images * run->data.T),
                             r->lr, r->loss, r->mse, r->l1, r->ghost, r->l0, r->explained_variance,
                             r->dead, seconds_now() - run->started) < 0 || fflush(run->log) != 0))
        return write_failed(run->o->log, errno);
    char words[100];
    snprintf(words, sizeof words, ", loss %.5g, L0 %.4g, explained %.3f", r->loss, r->l0,
             r->explained_variance);
    show_progress("step", step, run->steps, images, words);
    return SC_OK;
}

/* A new SAE, or one from a file. It listens where the command line says, else where that SAE did,
 * else where the activations are from, else where the report's did: the penultimate block's MLP. */
static int choose_sae(training_run *run) {
    const options *o = run->o;
    sc_sae *sae = &run->sae;
    feed *f = &run->data;
    size_t n = o->d_sae ? (size_t)o->d_sae : (size_t)o->expansion * f->D, place;
    if (!o->d_sae && (size_t)o->expansion > SC_MAX_LATENTS / f->D)
        return usage("--expansion %ld: %zu inputs times that are more than %d latents",
                     o->expansion, f->D, SC_MAX_LATENTS);
    SC_TRY(o->init ? sc_sae_open(sae, o->init) : sc_sae_init(sae, f->D, n, (uint64_t)o->seed));
    if (!sae->k) sae->k = 32;
    SC_TRY(connect_sae(f, sae, o, 1, &place));
    if (f->is_file || sae->model) return SC_OK;
    sae->model = copy_string(base_name(o->model));
    return sae->model ? SC_OK : SC_FAILED;
}

/* How many steps, of which images, in which order. */
static int plan_run(training_run *run) {
    const options *o = run->o;
    const feed *f = &run->data;
    int stream = f->set.count == SC_UNKNOWN, shuffle = strcmp(o->order, "shuffle") == 0;
    double images = stream ? 1e18 : o->epochs * (double)f->set.count;
    run->batch = (size_t)o->batch;
    run->steps = (uint64_t)(o->steps < 0 ? ceil(images / (double)run->batch) : o->steps);
    if (run->batch > SC_MAX_BATCH_TOKENS / f->T)
        return usage("--batch %zu: %zu tokens an image are too many", run->batch, f->T);
    if (stream && shuffle)
        return usage("a stream has one order: --order sequential was expected");
    if (!shuffle) return SC_OK;
    run->epoch = UINT64_MAX;
    return allocate(&run->data.memory, &run->order, f->set.count, sizeof *run->order);
}

/* Hands out batches from where training begins. Where b_dec starts from images, those are
 * read ahead. */
static int start_run(training_run *run) {
    const options *o = run->o;
    feed *f = &run->data;
    int start = !o->init && strcmp(o->b_dec, "zeros") != 0 && run->trainer->step == 0;
    size_t keep = !start ? 0 : o->b_dec_images ? (size_t)o->b_dec_images : run->batch;
    if (keep > f->set.count) keep = f->set.count;
    if (!start && run->trainer->step == run->steps) return SC_OK;
    SC_TRY(start_feed(f, keep > run->batch ? keep : run->batch, training_draw, run, 0));
    if (f->set.count != SC_UNKNOWN) f->drawn = (size_t)run->next_draw;
    while (f->drawn < run->next_draw) {                      /* a stream can only be read again */
        SC_TRY(load_images(f, 1));
        if (f->loaded == 0) return fail("standard input: ended before where the checkpoint was");
        f->loaded = 0;
    }
    if (!start) return SC_OK;
    SC_TRY(next_batch(f, keep));
    if (f->count < keep) return fail("there are fewer than %zu images", keep);
    f->count = 0;                            /* not used up: to be trained on too */
    return start_b_dec(&run->sae, f->tap[0].out, keep, f->T,
                       strcmp(o->b_dec, "geomedian-images") == 0, strcmp(o->b_dec, "mean") ? 100 : 0);
}

/* An error names the step, and the image and token where there is one. */
static int blame_step(const training_run *run, size_t token) {
    char reason[sizeof error_text];
    if (token != SIZE_MAX) blame_token(&run->data, token);
    memcpy(reason, error_text, sizeof reason);
    return fail("step %ju%s %s", (uintmax_t)run->trainer->step + 1,
                token == SIZE_MAX ? ":" : ",", reason);
}

static int stop_training(training_run *run) {
    SC_TRY(save_checkpoint(run));
    return fail("stopped by signal %d after step %ju; %s goes on with --resume", stop_signal,
                (uintmax_t)run->trainer->step, run->checkpoint);
}

/* No batch came: what was trained so far is kept, the reason is told. */
static int keep_state(training_run *run) {
    char reason[sizeof error_text];
    if (stop_signal) return stop_training(run);
    memcpy(reason, error_text, sizeof reason);
    if (run->checkpoints) SC_TRY(save_checkpoint(run));
    memcpy(error_text, reason, sizeof reason);
    return blame_step(run, SIZE_MAX);
}

static int train_steps(training_run *run) {
    sc_trainer *t = run->trainer;
    feed *f = &run->data;
    while (t->step < run->steps) {
        sc_step result;
        size_t token = SIZE_MAX, batch = run->batch;
        int status = next_batch(f, batch);
        if (status != SC_OK) return keep_state(run);
        if (f->count < batch && t->step == 0)
            return fail("standard input: %zu images are no full batch of %zu", f->count, batch);
        if (f->count < batch) {
            note("the stream ended: %zu images are no full batch and were left out", f->count);
            break;
        }
        status = train_step(t, f->tap[0].out, &result, &token);
        if (status != SC_OK) return blame_step(run, token);
        run->next_draw = f->draw[batch - 1] + 1;
        SC_TRY(log_step(run, &result));
        if (stop_signal) return stop_training(run);
        if (run->checkpoints && t->step % (uint64_t)run->o->checkpoint_every == 0)
            SC_TRY(save_checkpoint(run));
    }
    return run->checkpoints ? save_checkpoint(run) : SC_OK;
}

static int run_training(training_run *run) {
    const options *o = run->o;
    SC_TRY(try_output(o->output));
    if (run->checkpoints) SC_TRY(try_output(run->checkpoint));
    SC_TRY(open_feed(&run->data, o));
    SC_TRY(choose_sae(run));
    SC_TRY(plan_run(run));
    sc_train_options settings = { .l1 = o->l1, .lr = o->lr, .warmup = (size_t)o->warmup,
                                  .dead_window = (size_t)o->dead_window, .ghost = o->ghost };
    run->trainer = sc_trainer_new(&run->sae, &settings, run->batch * run->data.T);
    if (!run->trainer) return SC_FAILED;
    run->recipe = recipe_digest(run);
    if (o->resume) SC_TRY(resume_training(run));
    int status = start_run(run);
    if (status != SC_OK) return stop_signal ? stop_training(run) : status;
    SC_TRY(open_log(run));
    SC_TRY(train_steps(run));
    return save_tensors(o->output, 4096, write_trained, run);
}

static int train(const options *o) {
    const char *name = o->checkpoint ? o->checkpoint : o->output;
    training_run run = { .o = o, .started = seconds_now(),
                         .checkpoints = o->checkpoint || o->resume };
    may_stop = 1;
    run.checkpoint = join_text(name, o->checkpoint ? "" : ".ckpt");
    if (run.checkpoint) run.previous = join_text(run.checkpoint, ".prev");
    int status = run.previous ? run_training(&run) : SC_FAILED;
    if (run.log && fclose(run.log) != 0 && status == SC_OK) status = write_failed(o->log, errno);
    close_feed(&run.data);
    sc_trainer_free(run.trainer);
    sc_sae_close(&run.sae);
    free(run.checkpoint);
    free(run.previous);
    return status;
}

/* ============================================================================================
 * 12. Measuring
 *
 * What each latent does over a data set (interface, section 6; after PatchSAE): how often it fires,
 * how strongly, on which images, patches and classes. Sums over images are exact and ties go to the
 * lower index, so no order of work shows in the result.
 * ============================================================================================ */

enum { HISTOGRAM_BINS = 256, BINS_AN_OCTAVE = 4, LOWEST_OCTAVE = -40 };

/* A sum over a data set's tokens in float64, in blocks of 256, however they come. */
typedef struct { double total, part; size_t terms; } running_sum;

static void add_running(running_sum *sum, double value) {
    sum->part += value;
    if (++sum->terms % CHAIN) return;
    sum->total += sum->part;
    sum->part = 0;
}

static double running_total(const running_sum *sum) { return sum->total + sum->part; }

typedef struct {
    int64_t images, tokens;          /* on which it fires */
    exact_sum means, activations;    /* of a_j over images, of f_j over tokens */
    float sparsity, mean, entropy;   /* worked out at the end, as is */
    double sum;                      /* activations, rounded */
} latent_record;

typedef struct {
    const sae_batch *batch;          /* the images at hand, encoded */
    const sc_sae *sae;
    const feed *data;
    size_t K, P;
    double threshold;                /* of class_counts; negative: count images */
    uint64_t images;                 /* so far */
    uint64_t sae_digest;
    size_t shard, shards;            /* which part of the data set, from 1; 1 of 1 is all of it */
    latent_record *latent;           /* [n] */
    sc_top *top, *patch;          /* [n, K], [n, P], descending; other: the label, the token */
    int64_t *class_counts;           /* [C, n], NULL if not asked for */
    int64_t (*histogram)[HISTOGRAM_BINS];        /* [workers] */
    running_sum mse, squared_error, l0, l1;
    running_sum (*x)[2];             /* [D], of x and x^2 */
} statistics;

/* All but the arrays is set. */
static int new_statistics(statistics *s, memory_list *memory, int class_counts) {
    size_t n = s->sae->d_sae;
    const array_spec arrays[] = {
        ARRAY(s->latent, n, 1), ARRAY(s->top, n, s->K), ARRAY(s->patch, n, s->P),
        ARRAY(s->histogram, (size_t)thread_count(), 1), ARRAY(s->x, s->sae->d_in, 1),
        ARRAY(s->class_counts, n, s->data->set.classes) };
    if (class_counts && s->data->set.classes == 0)
        return fail("--class-counts: the data have no labels");
    SC_TRY(new_arrays(memory, arrays, COUNT(arrays) - !class_counts));
    for (size_t i = 0; i < n * s->K; i++) s->top[i] = nothing;
    for (size_t i = 0; i < n * s->P; i++) s->patch[i] = nothing;
    return SC_OK;
}

static const double quarter_octave[] = { 1, 1.18920712, 1.41421356, 1.68179283 };

/* The bin of an active value: quarters of an octave from 2^-40 to 2^24; what lies outside goes into
 * the first or last. */
static size_t histogram_bin(float f) {
    int exponent, quarter = 3, last = HISTOGRAM_BINS - 1;
    float m = 2 * frexpf(f, &exponent);                     /* f = m 2^(exponent - 1) */
    while (m < (float)quarter_octave[quarter]) quarter--;
    int bin = (exponent - 1 - LOWEST_OCTAVE) * BINS_AN_OCTAVE + quarter;
    return (size_t)(bin < 0 ? 0 : bin > last ? last : bin);
}

static void count_class(statistics *s, size_t j, int64_t label) {
    if (s->class_counts && label >= 0) s->class_counts[(size_t)label * s->sae->d_sae + j]++;
}

/* Latent j's mean over the batch's image i. */
static void count_image(statistics *s, size_t j, size_t i, double sum) {
    float mean = (float)(sum / (double)s->data->T);
    int64_t image = (int64_t)s->data->image[i], label = s->data->label[i];
    if (!(mean > 0)) return;
    s->latent[j].images++;
    exact_add_float(&s->latent[j].means, mean);
    if (s->threshold < 0) count_class(s, j, label);
    keep_largest(s->top + j * s->K, s->K, (sc_top){ mean, image, label });
}

/* Activation f of latent j on a token of the batch's image i. */
static void count_token(statistics *s, size_t j, size_t i, size_t token, float f) {
    int64_t image = (int64_t)s->data->image[i];
    s->latent[j].tokens++;
    exact_add_float(&s->latent[j].activations, f);
    s->histogram[worker][histogram_bin(f)]++;
    if (s->threshold >= 0 && (double)f > s->threshold) count_class(s, j, s->data->label[i]);
    if (token >= s->data->first_patch)
        keep_largest(s->patch + j * s->P, s->P, (sc_top){ f, image, (int64_t)token });
}

static int count_task(void *context, size_t block) {
    statistics *s = context;
    size_t n = s->sae->d_sae, T = s->data->T;
    for (size_t j = block * CHAIN; j < n && j < (block + 1) * CHAIN; j++) {
        double sum[MEASURE_IMAGES] = { 0 };
        for (size_t i = 0; i < s->batch->tiles; i++)
            for (code_walk w = walk_codes(&s->batch->tile[i], j); next_code(&w);) {
                size_t t = s->batch->tile[i].first + w.token;
                sum[t / T] += w.value;
                count_token(s, j, t / T, t % T, w.value);
            }
        for (size_t i = 0; i < s->data->count; i++) count_image(s, j, i, sum[i]);
    }
    return SC_OK;
}

/* Sums over tokens of one dimension, for the variance. */
static int sum_x_task(void *context, size_t d) {
    statistics *s = context;
    for (size_t t = 0; t < s->batch->T; t++) {
        double x = s->batch->x[t * s->sae->stride + d];
        add_running(&s->x[d][0], x);
        add_running(&s->x[d][1], x * x);
    }
    return SC_OK;
}

static int count_batch(statistics *s) {
    const sae_batch *b = s->batch;
    for (size_t t = 0; t < b->T; t++) {
        add_running(&s->mse, b->squared_error[t] / b->norm[t]);
        add_running(&s->squared_error, b->squared_error[t]);
        add_running(&s->l0, b->active[t]);
        add_running(&s->l1, b->sum_f[t]);
        if (b->sum_f[t] < 0x1p40) continue;                  /* exact sums end at 2^63 */
        fail("activations of %g are too large to be summed exactly", b->sum_f[t]);
        return blame_token(s->data, t);
    }
    if (b->reconstruct) SC_TRY(parallel_for(s->sae->d_in, sum_x_task, s));
    s->images += s->data->count;
    return parallel_for(chains_of(s->sae->d_sae), count_task, s);
}

static double mean_activation(const latent_record *l) {
    return l->images ? exact_value(l->means) / (double)l->images : 0;
}

/* Of what an SAE computes, so that statistics are not taken for another's. */
static uint64_t sae_digest(const sc_sae *sae) {
    digest64 d = { 0 };
    const uint64_t numbers[] = { sae->d_in, sae->d_sae, (uint64_t)sae->topk,
                                 sae->topk ? sae->k : 0 };
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

static int write_statistics_metadata(sc_writer *w, const statistics *s) {
    char edges[HISTOGRAM_BINS * 20 + 32];
    size_t used = 0;
    SC_TRY(put_metadata(w, "images", "%zu", (size_t)s->images));
    SC_TRY(put_metadata(w, "tokens", "%llu", (unsigned long long)s->images * s->data->T));
    SC_TRY(put_metadata(w, "tokens_per_image", "%zu", s->data->T));
    SC_TRY(put_metadata(w, "first_patch", "%zu", s->data->first_patch));
    SC_TRY(put_metadata(w, "data_digest", "%016llx", (unsigned long long)s->data->set.digest));
    SC_TRY(put_metadata(w, "sae_digest", "%016llx", (unsigned long long)s->sae_digest));
    if (s->shards > 1) SC_TRY(put_metadata(w, "shard", "%zu/%zu", s->shard, s->shards));
    for (int i = 0; i <= HISTOGRAM_BINS; i++)
        used += (size_t)sprintf(edges + used, "%c%.9g", i ? ',' : '[',
                                ldexp(quarter_octave[i % BINS_AN_OCTAVE],
                                      LOWEST_OCTAVE + i / BINS_AN_OCTAVE));
    memcpy(edges + used, "]", 2);
    SC_TRY(sc_writer_metadata(w, "histogram_edges", edges));
    if (s->data->set.class_name)
        SC_TRY(write_name_list(w, "class_names", s->data->set.class_name, s->data->set.classes));
    return s->threshold < 0 ? SC_OK : put_metadata(w, "threshold", "%.17g", s->threshold);
}

/* What is worked out from the counts, latent by latent; the workers' histograms joined. */
static void derive_statistics(statistics *s) {
    for (size_t j = 0; j < s->sae->d_sae; j++) {
        latent_record *l = &s->latent[j];
        l->sparsity = s->images ? (float)((double)l->images / (double)s->images) : 0;
        l->mean = (float)mean_activation(l);
        l->entropy = (float)top_entropy(s->top + j * s->K, s->K);
        l->sum = exact_value(l->activations);
    }
    for (size_t i = HISTOGRAM_BINS; i < (size_t)thread_count() * HISTOGRAM_BINS; i++)
        s->histogram[0][i % HISTOGRAM_BINS] += s->histogram[i / HISTOGRAM_BINS][i % HISTOGRAM_BINS];
}

/* A tensor of the file: its elements, each of one number or of two side by side, lie `step` bytes
 * apart in memory. Of shards those `summed` are added up, two numbers as an exact sum. */
typedef struct {
    const char *name;
    void *first;
    size_t step;
    int summed;
    sc_dtype dtype;
    size_t numbers, shape[4];
} statistics_tensor;

enum { STATISTICS_TENSORS = 15 };

/* Sets tensor: [STATISTICS_TENSORS] and returns how many there are: the last one is optional. */
static size_t list_statistics(const statistics *s, statistics_tensor *tensor) {
    latent_record *l = s->latent;
    sc_top *top = s->top, *patch = s->patch;
    int64_t *bin = s->histogram[0], *class = s->class_counts;
    size_t n = s->sae->d_sae, K = s->K, P = s->P, C = s->data->set.classes;
    size_t L = sizeof *l, E = sizeof *top, I = sizeof *bin;
    const statistics_tensor all[STATISTICS_TENSORS] = {
        { "sae_sparsity", &l->sparsity, L, 0, SC_F32, 1, { n } },
        { "sae_mean_acts", &l->mean, L, 0, SC_F32, 1, { n } },
        { "top_entropy", &l->entropy, L, 0, SC_F32, 1, { n } },
        { "max_activating_image_values", &top->value, E, 0, SC_F32, 1, { n, K } },
        { "max_activating_patch_values", &patch->value, E, 0, SC_F32, 1, { n, P } },
        { "max_activating_image_indices", &top->image, E, 0, SC_I64, 1, { n, K } },
        { "max_activating_image_label_indices", &top->other, E, 0, SC_I64, 1, { n, K } },
        { "max_activating_patch_indices", &patch->image, E, 0, SC_I64, 2, { n, P, 2 } },
        { "image_count", &l->images, L, 1, SC_I64, 1, { n } },
        { "token_count", &l->tokens, L, 1, SC_I64, 1, { n } },
        { "activation_sum", &l->sum, L, 0, SC_F64, 1, { n } },
        { "mean_sum_exact", &l->means, L, 1, SC_I64, 2, { n, 2 } },   /* high, low half */
        { "activation_sum_exact", &l->activations, L, 1, SC_I64, 2, { n, 2 } },
        { "activation_histogram", bin, I, 1, SC_I64, 1, { HISTOGRAM_BINS } },
        { "class_counts", class, I, 1, SC_I64, 1, { C, n } } };
    memcpy(tensor, all, sizeof all);
    return STATISTICS_TENSORS - !class;
}

static int write_statistics(sc_writer *w, void *context) {
    statistics *s = context;
    statistics_tensor tensor[STATISTICS_TENSORS];
    size_t tensors = list_statistics(s, tensor);
    SC_TRY(write_statistics_metadata(w, s));
    derive_statistics(s);
    for (const statistics_tensor *t = tensor; t < tensor + tensors; t++) {
        size_t count = 1;
        int rank = 0;
        while (t->shape[rank] > 0) count *= t->shape[rank++];
        SC_TRY(sc_writer_tensor(w, t->name, t->dtype, rank, t->shape));
        for (size_t e = 0; e < count / t->numbers; e++)
            SC_TRY(sc_writer_values(w, (char *)t->first + e * t->step, t->numbers, t->dtype));
    }
    return SC_OK;
}

/* ============================================================================================
 * 20. Data sets through SAEs
 *
 * The commands that send a data set through the model and through one or several SAEs, in one
 * forward pass: stats and merge, eval, extract, pack, encode, zeroshot.
 * ============================================================================================ */

/* An activation as `encode` writes it. */
typedef struct { int64_t row, index; float value; } code;

/* What commands work on. Starts as { .o = ... } and is closed by who made it. */
typedef struct {
    options *o;
    size_t saes, tap[SC_MAX_TAPS];   /* tap: an SAE's place among the data's hook points */
    sc_sae sae[SC_MAX_TAPS];
    feed data;
    sae_batch batch[SC_MAX_TAPS];    /* what each SAE makes of the data's batch at hand */
    statistics stats[SC_MAX_TAPS];   /* of the data set at hand */
    int64_t *label;                  /* [labels], of the images that came */
    code *code;                      /* [code_room], of a tile */
    size_t labels, label_room, code_room;
    FILE *spool[2];                  /* of codes, of x' */
    memory_list memory;
} session;

static int open_session(session *s) {
    for (; s->saes < s->o->saes; s->saes++)
        SC_TRY(sc_sae_open(&s->sae[s->saes], s->o->sae[s->saes]));
    SC_TRY(open_feed(&s->data, s->o));
    for (size_t i = 0; i < s->saes; i++) {
        SC_TRY(connect_sae(&s->data, &s->sae[i], s->o, 0, &s->tap[i]));
        SC_TRY(new_batch(&s->batch[i], &s->sae[i], MEASURE_IMAGES * s->data.T));
    }
    return SC_OK;
}

/* The data and what was found out about them; the SAEs stay. */
static void close_data(session *s) {
    for (size_t i = 0; i < SC_MAX_TAPS; i++) free_batch(&s->batch[i]);
    close_feed(&s->data);
}

static void close_session(session *s) {
    close_data(s);
    for (size_t i = 0; i < SC_MAX_TAPS; i++) sc_sae_close(&s->sae[i]);
    for (int i = 0; i < 2; i++)
        if (s->spool[i]) fclose(s->spool[i]);
    free(s->label);
    free(s->code);
    release(&s->memory);
}

/* The next batch of `total` images, through every SAE; SC_END behind the last. */
static int next_encoded(session *s, size_t total) {
    feed *f = &s->data;
    size_t bad;
    SC_TRY(next_batch(f, MEASURE_IMAGES));
    show_progress("image", f->used, total, f->used, "");
    for (size_t i = 0; i < s->saes && f->count > 0 && !f->tap[s->tap[i]].replace; i++) {
        SC_TRY(run_sae(&s->batch[i], f->tap[s->tap[i]].out, f->count * f->T));
        if (check_batch(&s->batch[i], &bad) != SC_OK) return blame_token(f, bad);
    }
    return f->count > 0 ? SC_OK : SC_END;
}

static int command_train(session *s) { return train(s->o); }

/* Whether text is "I/N": part I, from 1, of N. */
static int parse_shard(const char *text, size_t *shard, size_t *shards) {
    int end = 0, read = sscanf(text, "%4zu/%4zu%n", shard, shards, &end);
    return read == 2 && !text[end] && *shard > 0 && *shard <= *shards && *shards <= MAX_OPERANDS;
}

/* Shard I of N: images ceil((I - 1) count / N) up to, not with, ceil(I count / N). Neighbours, as
 * they are read fastest; the first shard is never empty. */
static int take_shard(feed *f, statistics *s, const char *shard) {
    uint64_t count = f->set.count;
    if (!parse_shard(shard, &s->shard, &s->shards))
        return usage("--shard: '%s': I/N was expected, I from 1 to N, N at most %d", shard,
                     MAX_OPERANDS);
    if (count == SC_UNKNOWN) return usage("--shard: nobody knows how many images a stream has");
    f->drawn = (size_t)(((s->shard - 1) * count + s->shards - 1) / s->shards);
    f->set.limit = (size_t)((s->shard * count + s->shards - 1) / s->shards);
    return SC_OK;
}

/* One pass over a data set, or a shard of it, for all SAEs. */
static int measure(session *s, int reconstruct) {
    const options *o = s->o;
    feed *f = &s->data;
    int status;
    SC_TRY(open_session(s));
    for (size_t i = 0; i < s->saes; i++) {
        s->stats[i] = (statistics){ .batch = &s->batch[i], .sae = &s->sae[i], .data = f,
                                    .K = (size_t)o->top, .P = (size_t)o->top_patches,
                                    .threshold = o->threshold };
        s->batch[i].reconstruct = reconstruct;
        SC_TRY(new_statistics(&s->stats[i], &f->memory, o->class_counts));
    }
    if (o->shard) SC_TRY(take_shard(f, &s->stats[0], o->shard));
    size_t total = o->shard ? f->set.limit - f->drawn : f->set.count;
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    while ((status = next_encoded(s, total)) == SC_OK)
        for (size_t i = 0; i < s->saes; i++) SC_TRY(count_batch(&s->stats[i]));
    return status == SC_END ? SC_OK : status;
}

static int save_statistics(session *s) {
    size_t room = 16384 + names_room(s->data.set.class_name, s->data.set.classes, 8);
    return save_tensors(s->o->output, room, write_statistics, &s->stats[0]);
}

static int command_stats(session *s) {
    SC_TRY(try_output(s->o->output));
    SC_TRY(measure(s, 0));
    s->stats[0].sae_digest = sae_digest(&s->sae[0]);
    return save_statistics(s);
}

/* --- merge: one shard after the other, in any order, to the bytes of one run over all --- */

static uint64_t number_in(const sc_safetensors *file, const char *key, int base) {
    const char *text = sc_metadata_find(file, key);
    return text ? strtoull(text, NULL, base) : 0;
}

/* What all shards have in common, from the first one's file. */
static int begin_merge(session *s, const sc_safetensors *file) {
    const sc_tensor *top = sc_tensor_find(file, "max_activating_image_values");
    const sc_tensor *patch = sc_tensor_find(file, "max_activating_patch_values");
    const sc_tensor *class = sc_tensor_find(file, "class_counts");
    const char *threshold = sc_metadata_find(file, "threshold");
    const char *names = sc_metadata_find(file, "class_names");
    if (!top || top->rank != 2 || top->count == 0 || !patch || patch->rank != 2 || patch->count == 0
        || patch->shape[0] != top->shape[0] || (class && class->shape[1] != top->shape[0]))
        return fail("%s: these are no statistics", file->path);
    s->sae[0].d_sae = top->shape[0];
    s->data.T = (size_t)number_in(file, "tokens_per_image", 10);
    s->data.first_patch = (size_t)number_in(file, "first_patch", 10);
    s->data.set.digest = number_in(file, "data_digest", 16);
    s->data.set.classes = class ? class->shape[0] : 0;
    if (names) SC_TRY(json_string_array(names, file->path, &s->data.set.class_name,
                                        &s->data.set.classes));
    s->stats[0] = (statistics){ .sae = &s->sae[0], .data = &s->data, .K = top->shape[1],
                                .P = patch->shape[1], .threshold = threshold ? atof(threshold) : -1,
                                .sae_digest = number_in(file, "sae_digest", 16) };
    return new_statistics(&s->stats[0], &s->memory, class != NULL);
}

/* Puts a tensor where it belongs, added to what is there if it is one of those. */
static int read_statistics(const sc_safetensors *file, const statistics_tensor *t) {
    const sc_tensor *from = sc_tensor_find(file, t->name);
    size_t size = sc_dtype_size(t->dtype), bytes = t->numbers * size;
    if (!from || from->count == 0 || from->dtype != t->dtype
        || memcmp(from->shape, t->shape, sizeof t->shape) != 0)
        return fail("%s: a tensor %s of the first file's shape was expected", file->path, t->name);
    for (size_t e = 0; e < from->count / t->numbers; e++) {
        float finite[2];                         /* what is not is refused, by the file's name */
        if (t->dtype == SC_F32)
            SC_TRY(sc_tensor_floats(file, from, e * t->numbers, t->numbers, finite));
        exact_sum sum = { 0, 0 }, more = { 0, 0 };           /* one number lies in the high half */
        char *place = (char *)t->first + e * t->step;
        copy_numbers(&more, from->data + e * bytes, t->numbers, size);
        if (t->summed) memcpy(&sum, place, bytes);
        exact_add(&sum, more);
        memcpy(place, &sum, bytes);
    }
    return SC_OK;
}

/* Refuses a file that is not of the first one's run, or whose shard, which it finds out, does not
 * fit: shards 0 means that none was there before. there: [MAX_OPERANDS + 1] */
static int check_shard(const sc_safetensors *file, const sc_safetensors *first, size_t *shards,
                       unsigned char *there) {
    static const char *const same[][2] = {
        { "sae_digest", "another SAE" }, { "data_digest", "other data" },
        { "threshold", "another --threshold" }, { "tokens_per_image", "other tokens" },
        { "first_patch", "other tokens" }, { "histogram_edges", "another histogram" } };
    const char *text = sc_metadata_find(file, "shard");
    size_t shard = 1, of = 1;
    for (size_t i = 0; i < COUNT(same); i++) {
        const char *a = sc_metadata_find(file, same[i][0]);
        const char *b = sc_metadata_find(first, same[i][0]);
        if (a ? !b || strcmp(a, b) != 0 : b != NULL)
            return fail("%s: statistics of %s than %s", file->path, same[i][1], first->path);
    }
    if (file->tensors != first->tensors)
        return fail("%s: --class-counts was given for this or for %s, expected for all or none",
                    file->path, first->path);
    if (text && !parse_shard(text, &shard, &of))
        return fail("%s: shard '%.50s' where I/N was expected", file->path, text);
    if (*shards && *shards != of)
        return fail("%s: a shard of %zu, but %s is one of %zu", file->path, of, first->path,
                    *shards);
    if (there[shard]++) return fail("%s: shard %zu of %zu was there before", file->path, shard, of);
    *shards = of;
    return SC_OK;
}

/* Joins a shard to `all`; its lists of the largest come by way of part's. */
static int merge_shard(statistics *all, const statistics *part, const sc_safetensors *file) {
    statistics_tensor tensor[STATISTICS_TENSORS];
    size_t tensors = list_statistics(part, tensor), n = all->sae->d_sae;
    for (size_t i = 0; i < tensors; i++) SC_TRY(read_statistics(file, &tensor[i]));
    for (size_t i = 0; i < n * all->K; i++)
        keep_largest(all->top + i / all->K * all->K, all->K, part->top[i]);
    for (size_t i = 0; i < n * all->P; i++)
        keep_largest(all->patch + i / all->P * all->P, all->P, part->patch[i]);
    all->images += number_in(file, "images", 10);
    return SC_OK;
}

static int merge_files(session *s, const sc_safetensors *first) {
    unsigned char there[MAX_OPERANDS + 1] = { 0 };
    size_t shards = 0;
    SC_TRY(begin_merge(s, first));
    statistics *all = &s->stats[0], part = *all;
    const array_spec lists[] = { ARRAY(part.top, all->sae->d_sae, all->K),
                                 ARRAY(part.patch, all->sae->d_sae, all->P) };
    SC_TRY(new_arrays(&s->memory, lists, COUNT(lists)));
    for (const char **path = s->o->operand; *path; path++) {
        sc_safetensors file;
        SC_TRY(sc_safetensors_open(&file, *path));
        int status = check_shard(&file, first, &shards, there);
        if (status == SC_OK) status = merge_shard(all, &part, &file);
        sc_safetensors_close(&file);
        SC_TRY(status);
    }
    for (size_t i = 1; i <= shards; i++)
        if (!there[i])
            return fail("%s: one of %zu shards, of which shard %zu is missing", first->path, shards,
                        i);
    return SC_OK;
}

static int command_merge(session *s) {
    sc_safetensors first;
    SC_TRY(try_output(s->o->output));
    SC_TRY(sc_safetensors_open(&first, s->o->operand[0]));
    int status = merge_files(s, &first);
    sc_safetensors_close(&first);
    return status == SC_OK ? save_statistics(s) : status;
}

/* --- Tables --- */

/* A cell, and what its column is called by programs and for people; text NULL: a number. */
typedef struct { const char *name, *title, *text; double number; } table_cell;

/* A cell as people see it, in Markdown what would be markup behind a backslash; row 0 are the
 * titles. cells: [rows, columns] */
static const char *cell_text(int markdown, const table_cell *cells, size_t columns, size_t row,
                             size_t column) {
    const table_cell *c = &cells[(row ? row - 1 : 0) * columns + column];
    char *out = text_room(), *to = out;
    int whole = c->number == floor(c->number) && fabs(c->number) < 1e9;
    if (row == 0 || (c->text && !markdown)) return row ? shown(c->text) : c->title;
    if (!c->text) snprintf(out, TEXT_ROOM, whole ? "%.0f" : "%.4g", c->number);
    if (!c->text) return out;
    for (const char *text = shown(c->text); *text && to - out < TEXT_ROOM - 2; *to++ = *text++)
        if (strchr("\\|<&`[*", *text)) *to++ = '\\';
    *to = '\0';
    return out;
}

static void print_for_people(int markdown, const table_cell *cells, size_t columns, size_t rows) {
    for (size_t r = 0; r <= rows; r++) {
        for (size_t c = 0; c < columns; c++) {
            int width = 0;
            for (size_t i = 0; i <= rows; i++) {
                int length = (int)strlen(cell_text(markdown, cells, columns, i, c));
                if (length > width) width = length;
            }
            printf(markdown ? "| %-*s " : c ? "  %*s" : "%*s", width,
                   cell_text(markdown, cells, columns, r, c));
        }
        puts(markdown ? "|" : "");
        for (size_t c = 0; markdown && r == 0 && c <= columns; c++)
            fputs(c < columns ? "|---" : "|\n", stdout);
    }
}

/* A CSV field: quoted, what a terminal might obey shown as ?, what a spreadsheet might take for a
 * formula behind a '. */
static void print_csv_text(const char *name) {
    putchar('"');
    if (*name && name[1] && strchr("=+-@", *name)) putchar('\'');
    for (size_t length; *name; name += length ? length : 1) {
        length = utf8_length(name);
        if (length == 0 || control_at(name)) putchar('?');
        else printf(*name == '"' ? "\"\"" : "%.*s", (int)length, name);
    }
    putchar('"');
}

/* CSV or JSON, numbers in full. */
static void print_for_programs(int as_json, const table_cell *cells, size_t columns, size_t rows) {
    if (as_json) puts("[");
    for (size_t r = as_json ? 1 : 0; r <= rows; r++) {
        for (size_t c = 0; c < columns; c++) {
            const table_cell *here = &cells[(r ? r - 1 : 0) * columns + c];
            fputs(as_json ? c ? ", " : "  {" : c ? "," : "", stdout);
            if (as_json) printf("\"%s\": ", here->name);
            if (r == 0) fputs(here->name, stdout);
            else if (!here->text) printf("%.9g", here->number);
            else if (as_json) print_json(stdout, here->text);
            else print_csv_text(here->text);
        }
        puts(!as_json ? "" : r < rows ? "}," : "}");
    }
    if (as_json) puts("]");
}

/* format: text, markdown, csv or json; a row or more */
static int print_table(const char *format, const table_cell *cells, size_t columns, size_t rows) {
    int as_json = strcmp(format, "json") == 0;
    if (as_json || strcmp(format, "csv") == 0) print_for_programs(as_json, cells, columns, rows);
    else print_for_people(strcmp(format, "markdown") == 0, cells, columns, rows);
    return end_of_output();
}

/* --- eval --- */

enum { EVAL_COLUMNS = 22 };

/* A row of the report's table, and the further figures. row: [EVAL_COLUMNS] */
static void evaluate(const statistics *s, const char *data, table_cell *row) {
    const sc_sae *sae = s->sae;
    const char *start = sae->b_dec_start, *geometric = start ? strstr(start, "geomedian") : NULL;
    double tokens = (double)(s->images * s->data->T), numbers = tokens * (double)sae->d_in;
    double n = (double)sae->d_sae, error = running_total(&s->squared_error);
    double active = running_total(&s->l0), sum_f = running_total(&s->l1), x2 = 0, mean2 = 0;
    double means = 0, entropy = 0, entropies = 0, always = 0, on[3] = { 0 };  /* 0, 1, 2 images */
    for (size_t d = 0; d < sae->d_in; d++) {
        double mean = running_total(&s->x[d][0]) / tokens;
        mean2 += mean * mean;
        x2 += running_total(&s->x[d][1]);
    }
    for (size_t j = 0; j < sae->d_sae; j++) {
        int64_t images = s->latent[j].images;
        double e = top_entropy(s->top + j * s->K, s->K);
        entropy += e >= 0 ? e : 0;
        entropies += e >= 0;
        means += mean_activation(&s->latent[j]);
        always += images == (int64_t)s->images;
        if (images < 3) on[images]++;
    }
    double variance = x2 - tokens * mean2;
    const table_cell cells[EVAL_COLUMNS] = {
        { "sae", "SAE", sae->path, 0 }, { "data", "data", data, 0 },
        { "output", "CLIP output", sae->hook < 0 ? "?" : hook_names[sae->hook], 0 },
        { "activation", "activation", sae->topk ? "TopK" : "ReLU", 0 },
        { "geometric_bias", "geometric bias", !start ? "?" : geometric ? "yes" : "no", 0 },
        { "mse", "MSE", NULL, running_total(&s->mse) / numbers },
        { "mse_raw", "MSE raw", NULL, error / numbers },
        { "explained_variance", "explained variance", NULL,
          variance > 0 ? 1 - error / variance : 0 },
        { "explained_variance_uncentred", "uncentred", NULL, 1 - error / x2 },
        { "mean_activation", "mean activation", NULL, active > 0 ? sum_f / active : 0 },
        { "mean_sae_mean_acts", "mean of latents' means", NULL,
          on[0] < n ? means / (n - on[0]) : 0 },
        { "l0", "L0 a token", NULL, active / tokens },
        { "l0_fraction", "L0 / latents", NULL, active / tokens / n },
        { "l1", "L1 a token", NULL, sum_f / tokens },
        { "entropy_mean", "entropy", NULL, entropies > 0 ? entropy / entropies : -1 },
        { "entropy_sum", "entropy sum", NULL, entropy },
        { "entropy_latents", "latents with entropy", NULL, entropies },
        { "dead", "dead", NULL, on[0] }, { "every_image", "on every image", NULL, always },
        { "one_image", "on 1 image", NULL, on[1] }, { "two_images", "on 2 images", NULL, on[2] },
        { "images", "images", NULL, (double)s->images } };
    memcpy(row, cells, sizeof cells);
}

static int command_eval(session *s) {
    options *o = s->o;
    const char **data = o->acts ? &o->acts : &o->operand[0];
    table_cell row[2 * SC_MAX_TAPS][EVAL_COLUMNS];
    size_t rows = 0;
    for (;; *data = o->also, o->also = NULL) {
        SC_TRY(measure(s, 1));
        for (size_t i = 0; i < s->saes; i++) evaluate(&s->stats[i], *data, row[rows++]);
        if (!o->also) return print_table(o->format, row[0], EVAL_COLUMNS, rows);
        close_data(s);
    }
}

/* --- What extract and pack have in common: labels and names --- */

static int keep_label(session *s, int64_t label) {
    SC_TRY(grow(&s->label, &s->label_room, s->labels, sizeof *s->label));
    s->label[s->labels++] = label;
    return SC_OK;
}

/* The labels kept, which all images have or none, and the classes' names. */
static int write_labels(sc_writer *w, const session *s) {
    if (s->labels > 0 && s->label[0] < 0) return SC_OK;
    SC_TRY(sc_writer_tensor(w, "labels", SC_I64, 1, &s->labels));
    SC_TRY(sc_writer_integers(w, s->label, s->labels));
    if (!s->data.set.class_name) return SC_OK;
    return write_name_list(w, "class_names", s->data.set.class_name, s->data.set.classes);
}

/* --- extract --- */

static int write_activations(sc_writer *w, void *context) {
    session *s = context;
    const options *o = s->o;
    feed *f = &s->data;
    size_t first = strcmp(o->tokens, "patches") == 0, end = strcmp(o->tokens, "cls") ? f->T : 1;
    int status;
    SC_TRY(sc_writer_tensor(w, "activations", strcmp(o->dtype, "f16") ? SC_F32 : SC_F16, 3,
                            (size_t[]){ SC_ROWS, end - first, f->D }));
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    while ((status = next_encoded(s, f->set.count)) == SC_OK)
        for (size_t i = 0; i < f->count; i++) {
            SC_TRY(keep_label(s, f->label[i]));
            for (size_t t = i * f->T + first; t < i * f->T + end; t++)
                SC_TRY(sc_writer_floats(w, f->tap[0].out + t * f->stride, f->D));
        }
    if (status != SC_END) return status;
    SC_TRY(sc_writer_metadata(w, "model", base_name(o->model)));
    SC_TRY(put_metadata(w, "layer", "%zu", f->tap[0].layer));
    SC_TRY(sc_writer_metadata(w, "hook", hook_names[f->tap[0].hook]));
    SC_TRY(sc_writer_metadata(w, "tokens", o->tokens));
    /* a file that lacks images of the data set is not the data set: another digest */
    unsigned long long digest = f->set.digest + (f->set.count - s->labels);
    if (f->set.count != SC_UNKNOWN) SC_TRY(put_metadata(w, "data_digest", "%016llx", digest));
    return write_labels(w, s);
}

static int command_extract(session *s) {
    feed *f = &s->data;
    sc_hook hook = SC_MLP;
    size_t place;
    SC_TRY(open_session(s));
    if (s->o->hook) SC_TRY(parse_hook(s->o->hook, &hook));
    SC_TRY(add_tap(f, s->o->layer ? s->o->layer : -2, hook, &place));
    return save_tensors(s->o->output, 4096 + names_room(f->set.class_name, f->set.classes, 8),
                        write_activations, s);
}

/* --- pack --- */

static int write_pictures(sc_writer *w, void *context) {
    session *s = context;
    feed *f = &s->data;
    size_t S = (size_t)f->preprocess.size, images = f->set.count == SC_UNKNOWN ? 0 : f->set.count;
    int status;
    char **name;
    SC_TRY(allocate(&s->memory, &name, images, sizeof *name));
    SC_TRY(sc_writer_tensor(w, "images", SC_U8, 4, (size_t[]){ SC_ROWS, S, S, 3 }));
    while ((status = next_encoded(s, f->set.count)) == SC_OK) {
        SC_TRY(sc_writer_bytes(w, f->pixels, f->count * S * S * 3));
        for (size_t i = 0; i < f->count; i++) {
            if (images) name[s->labels] = (char *)(uintptr_t)image_name(f, f->image[i]);
            SC_TRY(keep_label(s, f->label[i]));
        }
    }
    if (status != SC_END) return status;
    SC_TRY(write_labels(w, s));
    return images && *name[0] ? write_name_list(w, "file_names", name, s->labels) : SC_OK;
}

static int command_pack(session *s) {
    const options *o = s->o;
    feed *f = &s->data;
    SC_TRY(open_photos(f, o, (size_t)(o->square ? o->square : o->size)));
    size_t room = 4096 + names_room(f->set.class_name, f->set.classes, 4);
    for (size_t i = 0; f->set.image && i < f->set.count; i++)
        room += 7 * strlen(f->set.image[i].name) + 4;
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    return save_tensors(o->output, room, write_pictures, s);
}

/* --- encode: what comes waits in temporary files until all tensors can be written --- */

static int spool_failed(void) {
    return fail("a temporary file cannot be written, read or made: %s", strerror(errno));
}

/* Their first failure sticks: it is enough to ask now and then. */
static int check_spools(const session *s) {
    errno = EIO;                                             /* of a failure long ago */
    for (int i = 0; i < 2; i++)
        if (fflush(s->spool[i]) != 0 || ferror(s->spool[i])) return spool_failed();
    return SC_OK;
}

/* A tile's codes, sorted by token by counting, which keeps latents ascending. row: of token 0 */
static int spool_codes(session *s, const tile_codes *tile, size_t row) {
    size_t place[TILE_TOKENS + 1] = { 0 };                   /* of each token's next code */
    for (size_t t = 0; t < tile->tokens; t++)
        place[t + 1] = place[t] + (size_t)s->batch[0].active[tile->first + t];
    size_t codes = place[tile->tokens];
    while (s->code_room < codes)
        SC_TRY(grow(&s->code, &s->code_room, s->code_room, sizeof *s->code));
    for (size_t j = 0; j < s->sae[0].d_sae; j++)
        for (code_walk w = walk_codes(tile, j); next_code(&w);)
            s->code[place[w.token]++] = (code){ (int64_t)(row + w.token), (int64_t)j, w.value };
    if (codes > 0) fwrite(s->code, sizeof *s->code, codes, s->spool[0]);
    return SC_OK;
}

static int spool_batch(session *s) {
    const sae_batch *b = &s->batch[0];
    size_t row = s->data.used * s->data.T;
    for (size_t i = 0; i < b->tiles; i++)
        SC_TRY(spool_codes(s, &b->tile[i], row + b->tile[i].first));
    for (size_t t = 0; t < b->T && b->reconstruct; t++)
        fwrite(b->output + t * b->sae->stride, sizeof(float), b->sae->d_in, s->spool[1]);
    return check_spools(s);
}

/* A tensor that is a part of a spool's records: `columns` numbers at `offset`. */
static int write_part(sc_writer *w, session *s, int which, const char *name, sc_dtype dtype,
                      size_t offset, size_t columns) {
    enum { BLOCK = 64 };
    sc_dtype kind = dtype == SC_I32 ? SC_I64 : dtype;
    size_t part = columns * sc_dtype_size(kind), size = which ? part : sizeof(code);
    unsigned char *record;
    SC_TRY(allocate(&s->memory, &record, BLOCK, size));
    SC_TRY(sc_writer_tensor(w, name, dtype, columns > 1 ? 2 : 1, (size_t[]){ SC_ROWS, columns }));
    if (fseek(s->spool[which], 0, SEEK_SET) != 0) return spool_failed();
    for (size_t n; (n = fread(record, size, BLOCK, s->spool[which])) > 0;) {
        for (size_t i = 0; i < n; i++) memmove(record + i * part, record + i * size + offset, part);
        SC_TRY(sc_writer_values(w, record, n * columns, kind));
    }
    return check_spools(s);
}

/* The mean of f over every `group` tokens, from the codes. */
static int write_means(sc_writer *w, session *s, const char *name, size_t group) {
    size_t n = s->sae[0].d_sae, rows = s->data.used * s->data.T;
    float *mean = NULL;
    double *sum = NULL;
    code c;
    const array_spec arrays[] = { ARRAY(mean, n, 1), ARRAY(sum, n, 1) };
    SC_TRY(new_arrays(&s->memory, arrays, COUNT(arrays)));
    SC_TRY(sc_writer_tensor(w, name, SC_F32, n > 1 ? 2 : 1, (size_t[]){ SC_ROWS, n }));
    if (fseek(s->spool[0], 0, SEEK_SET) != 0) return spool_failed();
    int more = fread(&c, sizeof c, 1, s->spool[0]) == 1;
    for (size_t end = group; end <= rows; end += group) {
        memset(sum, 0, n * sizeof *sum);
        for (; more && (size_t)c.row < end; more = fread(&c, sizeof c, 1, s->spool[0]) == 1)
            sum[c.index] += c.value;
        for (size_t j = 0; j < n; j++) mean[j] = (float)(sum[j] / (double)group);
        SC_TRY(sc_writer_floats(w, mean, n));
    }
    return check_spools(s);
}

static int write_codes(sc_writer *w, void *context) {
    session *s = context;
    const options *o = s->o;
    SC_TRY(write_part(w, s, 0, "row", SC_I64, offsetof(code, row), 1));
    SC_TRY(write_part(w, s, 0, "index", SC_I32, offsetof(code, index), 1));
    SC_TRY(write_part(w, s, 0, "value", SC_F32, offsetof(code, value), 1));
    if (o->dense) SC_TRY(write_means(w, s, "f", 1));
    if (o->reconstruction)
        SC_TRY(write_part(w, s, 1, "reconstruction", SC_F32, 0, s->sae[0].d_in));
    return o->image_means ? write_means(w, s, "image_means", s->data.T) : SC_OK;
}

static int command_encode(session *s) {
    int status;
    SC_TRY(try_output(s->o->output));
    SC_TRY(open_session(s));
    for (int i = 0; i < 2; i++)
        if (!(s->spool[i] = tmpfile())) return spool_failed();
    s->batch[0].reconstruct = s->o->reconstruction;
    SC_TRY(start_feed(&s->data, MEASURE_IMAGES, NULL, NULL, 0));
    while ((status = next_encoded(s, s->data.set.count)) == SC_OK) SC_TRY(spool_batch(s));
    return status == SC_END ? save_tensors(s->o->output, 4096, write_codes, s) : status;
}

/* --- zeroshot --- */

/* The SAE in the loop: x' takes x's place. x: [tokens, stride] */
static int replace_by_output(void *context, float *x, size_t tokens) {
    session *s = context;
    size_t bad;
    SC_TRY(run_sae(&s->batch[0], x, tokens));
    if (check_batch(&s->batch[0], &bad) != SC_OK) return blame_token(&s->data, bad);
    memcpy(x, s->batch[0].output, tokens * s->sae[0].stride * sizeof *x);
    return SC_OK;
}

/* Labels become the model's: by name where both name their classes, else they stay as they are. */
static int match_classes(sc_images *set, const sc_model *model) {
    const char *text = sc_metadata_find(&model->file, "class_names");
    char **name;
    size_t names, c;
    int status = SC_OK;
    if (!text || !set->class_name) return SC_OK;
    SC_TRY(json_string_array(text, model->file.path, &name, &names));
    for (size_t i = 0; i < set->count && status == SC_OK; i++) {
        const char *class = set->class_name[set->image[i].label];
        for (c = 0; c < names && strcmp(name[c], class) != 0;) c++;
        set->image[i].label = (int64_t)c;
        if (c == names)
            status = fail("image %zu %s: class '%s' is none of the %zu that %s names", i,
                          set->image[i].name, class, names, model->file.path);
    }
    free(name);
    return status;
}

static int start_zeroshot(session *s) {
    const sc_model *model = &s->data.model;
    SC_TRY(open_session(s));                                 /* timm's head may be a classifier */
    if (!sc_tensor_find(&model->file, "text_embeds") && model->naming != TIMM)
        return fail("%s: a tensor text_embeds [classes, width of the projection] was expected",
                    model->file.path);
    if (s->saes) s->data.tap[0].replace = replace_by_output;
    s->data.tap[0].context = s;
    SC_TRY(start_feed(&s->data, MEASURE_IMAGES, NULL, NULL, 1));
    return match_classes(&s->data.set, model);
}

/* An image counts where its label is among the best 1 or 5 classes; ties go to the lower one. */
static int command_zeroshot(session *s) {
    size_t top1 = 0, top5 = 0;
    const sc_model *model = &s->data.model;
    feed *f = &s->data;
    int status;
    SC_TRY(start_zeroshot(s));
    while ((status = next_encoded(s, f->set.count)) == SC_OK)
        for (size_t i = 0; i < f->count; i++) {
            const float *logit = f->logits + i * model->classes;
            size_t rank = 0, label = (size_t)f->label[i], image = (size_t)f->image[i];
            if (f->label[i] < 0)
                return fail("image %zu %s: zeroshot needs labels, as FOLDER/<class>/<image> or a "
                            "list's path<TAB>class has them", image, image_name(f, image));
            if (label >= model->classes)
                return fail("image %zu %s: label %lld, but the head has %zu classes", image,
                            image_name(f, image), (long long)f->label[i], model->classes);
            for (size_t c = 0; c < model->classes; c++)
                rank += logit[c] > logit[label] || (logit[c] == logit[label] && c < label);
            top1 += rank < 1;
            top5 += rank < 5;
        }
    if (status != SC_END) return status;
    size_t images = f->used;
    if (strcmp(s->o->format, "json") == 0)
        printf("{\"images\": %zu, \"top1\": %zu, \"top5\": %zu}\n", images, top1, top5);
    else if (strcmp(s->o->format, "csv") == 0)
        printf("images,top1,top5\n%zu,%zu,%zu\n", images, top1, top5);
    else printf("%zu images: top-1 %zu (%.2f %%), top-5 %zu (%.2f %%)\n", images, top1,
                100.0 * (double)top1 / (double)images, top5, 100.0 * (double)top5 / (double)images);
    return end_of_output();
}

/* ============================================================================================
 * 21. Looking
 *
 * What a latent responds to, as pictures: a sheet of the images that excite it most, and masks of
 * the patches on which it fires. Silent patches keep 30 / 255 of their brightness, rounded down, as
 * PatchSAE shows them.
 * ============================================================================================ */

enum { MOST_LATENTS = 1024, SHEET_GAP = 2, SILENT = 30 };

/* Tensors of the statistics, a row a latent. */
enum {
    TOP_IMAGES, TOP_VALUES, TOP_LABELS, TOP_PATCHES, FREQUENCY, IMAGE_MEAN, ENTROPY, LOOKED_AT
};

typedef struct {
    session *s;
    sc_safetensors stats;
    const sc_tensor *of[LOOKED_AT];
    sc_top *entry;                /* [K], a latent's top images as the statistics have them */
    int any_data;                    /* the statistics need not be of the data at hand */
    uint64_t first_patch;            /* of the statistics' tokens */
    enum { NO_MASK, VALUE_MASK, TOP_MASK } kind;
    size_t latent[MOST_LATENTS], latents;        /* asked for */
    int64_t *image;                  /* [images], the only ones to look at, where not NULL */
    size_t images, patches;          /* patches: of an image */
    double *mask;                    /* [MEASURE_IMAGES, patches], one latent's on the batch */
    double *sum;                     /* [latents, patches], of a class */
    double *colour;                  /* [S, S, 3], the sum of a class's pictures */
    unsigned char *picture;          /* room for what is drawn */
    size_t width, height;            /* of a sheet */
    int made;                        /* the folder, by us */
} viewer;

/* "J[,J...]" */
static int parse_latents(viewer *v, const char *text) {
    const sc_sae *sae = &v->s->sae[0];
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
static int open_statistics(viewer *v, const char *path) {
    static const struct { const char *name; int rank; } tensors[LOOKED_AT] = {
        { "max_activating_image_indices", 2 }, { "max_activating_image_values", 2 },
        { "max_activating_image_label_indices", 2 }, { "max_activating_patch_indices", 3 },
        { "sae_sparsity", 1 }, { "sae_mean_acts", 1 }, { "top_entropy", 1 } };
    size_t n = v->s->sae[0].d_sae;
    SC_TRY(sc_safetensors_open(&v->stats, path));
    const char *data = sc_metadata_find(&v->stats, "data_digest");
    const char *sae = sc_metadata_find(&v->stats, "sae_digest");
    const char *first_patch = sc_metadata_find(&v->stats, "first_patch");
    if (!data || !sae) return fail("%s: these are no statistics: a digest is missing", path);
    if (sc_metadata_find(&v->stats, "shard"))
        return fail("%s: statistics of one shard, expected what merge makes of all", path);
    if (!v->any_data && strtoull(data, NULL, 16) != v->s->data.set.digest)
        return fail("%s: statistics of other data", path);
    if (strtoull(sae, NULL, 16) != sae_digest(&v->s->sae[0]))
        return fail("%s: statistics of another SAE", path);
    v->first_patch = first_patch ? strtoull(first_patch, NULL, 10) : 1;
    for (size_t i = 0; i < LOOKED_AT; i++) {
        const sc_tensor *t = v->of[i] = sc_tensor_find(&v->stats, tensors[i].name);
        if (!t || t->rank != tensors[i].rank || t->count == 0 || t->shape[0] != n ||
            (t->rank == 3 && t->shape[2] != 2) || (t->rank == 2 && t->count != v->of[0]->count))
            return fail("%s: a tensor %s [%zu%s] was expected", path, tensors[i].name, n,
                        tensors[i].rank == 1 ? "" : tensors[i].rank == 2 ? ", K" : ", P, 2");
    }
    return allocate(&v->s->memory, &v->entry, v->of[0]->shape[1], sizeof *v->entry);
}

/* The folder, the data and, where asked for, the statistics to look at them with. */
static int open_viewer(viewer *v, int with_stats) {
    session *s = v->s;
    const options *o = s->o;
    feed *f = &s->data;
    SC_TRY(open_session(s));
    if (o->latents) SC_TRY(parse_latents(v, o->latents));
    if (f->grid == 0 || f->T == 1) return fail("tokens were expected that are a square of patches");
    if (with_stats) SC_TRY(open_statistics(v, o->stats));
    if (v->kind != VALUE_MASK) s->saes = 0;      /* spares the SAE, and the forward pass */
    if (v->kind != VALUE_MASK && !f->is_file) f->taps = 0;
    s->batch[0].reconstruct = 0;
    v->patches = f->grid * f->grid;
    size_t side = f->is_file ? f->grid : f->model.image_size;
    const array_spec arrays[] = {
        ARRAY(v->mask, MEASURE_IMAGES, v->patches), ARRAY(v->picture, side * side, 3),
        ARRAY(v->sum, v->latents, v->patches) };
    SC_TRY(new_arrays(&s->memory, arrays, COUNT(arrays)));
    v->made = o->output && mkdir(o->output, 0777) == 0;
    if (v->made || !o->output || errno == EEXIST) return SC_OK;
    return fail("%s: the folder cannot be made: %s", o->output, strerror(errno));
}

static int listed_draw(void *context, size_t draw, size_t *image) {
    const viewer *v = context;
    if (draw < v->images) *image = (size_t)v->image[draw];
    return draw < v->images ? SC_OK : SC_END;
}

/* v->mask of latent j: its values on the batch's patches, or 1 on those that are among its top
 * patches of the whole data set. */
static int find_masks(viewer *v, size_t j) {
    const feed *f = &v->s->data;
    const sae_batch *b = &v->s->batch[0];
    size_t P = v->kind == TOP_MASK ? v->of[TOP_PATCHES]->shape[1] : 0;
    memset(v->mask, 0, MEASURE_IMAGES * v->patches * sizeof *v->mask);
    for (size_t i = 0; i < b->tiles; i++)
        for (code_walk w = walk_codes(&b->tile[i], j); next_code(&w);) {
            size_t row = b->tile[i].first + w.token, token = row % f->T;
            if (token >= f->first_patch)
                v->mask[row / f->T * v->patches + token - f->first_patch] = w.value;
        }
    for (size_t p = 0; p < P; p++) {
        int64_t at[2];                           /* image and token, -1 where there is none */
        SC_TRY(sc_tensor_integers(&v->stats, v->of[TOP_PATCHES], (j * P + p) * 2, 2, at));
        uint64_t patch = (uint64_t)at[1] - v->first_patch;
        for (size_t i = 0; i < f->count && patch < v->patches; i++)
            if (f->image[i] == (uint64_t)at[0]) v->mask[i * v->patches + patch] = 1;
    }
    return SC_OK;
}

/* Draws a crop into a picture with rows of `stride` bytes.
 * crop: [S, S, 3], mask: [grid, grid], silent patches are 0; NULL: none is */
static void draw_crop(unsigned char *to, size_t stride, const unsigned char *crop, size_t S,
                      const double *mask, size_t grid) {
    for (size_t y = 0; y < S; y++)
        for (size_t x = 0; x < S; x++) {
            int silent = mask && !(mask[y * grid / S * grid + x * grid / S] > 0);
            for (size_t c = 0; c < 3; c++) {
                int v = crop[(y * S + x) * 3 + c];
                to[y * stride + x * 3 + c] = (unsigned char)(silent ? v * SILENT / 255 : v);
            }
        }
}

/* v->picture as NAME.pgm (1 channel) or NAME.ppm (3) of the folder. */
static int write_picture(const viewer *v, const char *name, size_t channels, size_t width,
                         size_t height) {
    sc_output out;
    char path[MAX_PATH], file[160];
    snprintf(file, sizeof file, "%s.p%cm", name, channels == 3 ? 'p' : 'g');
    SC_TRY(join_path(v->s->o->output, file, path));
    SC_TRY(output_open(&out, path));
    fprintf(out.file, "P%d\n%zu %zu\n255\n", channels == 3 ? 6 : 5, width, height);
    output_write(&out, v->picture, width * height * channels);
    return output_commit(&out);
}

/* round(255 f / largest) */
static int write_mask(const viewer *v, const char *name, const double *mask) {
    double largest = 0;
    memset(v->picture, 0, v->patches);
    for (size_t p = 0; p < v->patches; p++) largest = mask[p] > largest ? mask[p] : largest;
    for (size_t p = 0; p < v->patches && largest > 0; p++)
        v->picture[p] = (unsigned char)floor(255 * mask[p] / largest + 0.5);
    return write_picture(v, name, 1, v->s->data.grid, v->s->data.grid);
}

/* Latent j on the batch's image i: the mask, and the picture under it where there is one. Files are
 * called after the image's index and what is safe of its own name. */
static int show_mask(const viewer *v, size_t j, size_t i) {
    const feed *f = &v->s->data;
    const double *mask = v->mask + i * v->patches;
    size_t S = f->model.image_size, image = (size_t)f->image[i];
    char name[129];
    snprintf(name, sizeof name, "latent_%zu_%zu_%s", j, image, base_name(image_name(f, image)));
    for (char *c = name; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr(".-", *c)) *c = '_';
    SC_TRY(write_mask(v, name, mask));
    if (f->is_file) return SC_OK;
    draw_crop(v->picture, 3 * S, f->pixels + i * S * S * 3, S, mask, f->grid);
    return write_picture(v, name, 3, S, S);
}

/* Only the images of a class, for the mean of their masks (the report's figure 6). */
static int choose_class(viewer *v, long class) {
    const feed *f = &v->s->data;
    size_t images = f->set.classes ? f->set.count : 0;
    SC_TRY(allocate(&v->s->memory, &v->image, images, sizeof *v->image));
    for (size_t i = 0; i < images; i++)
        if (f->set.image[i].label == class) v->image[v->images++] = (int64_t)i;
    if (v->images > 0) return SC_OK;
    return fail("--class %ld: no image is of this class (of %zu)", class, f->set.classes);
}

/* Latents' mean masks of a class, over the mean of its pictures. */
static int show_class(viewer *v, long class) {
    feed *f = &v->s->data;
    size_t S = f->model.image_size;
    char name[96];
    for (size_t e = 0; v->colour && e < S * S * 3; e++)
        f->pixels[e] = (unsigned char)floor(v->colour[e] / (double)f->used + 0.5);
    for (size_t l = 0; l < v->latents; l++) {
        double *mask = v->sum + l * v->patches;
        snprintf(name, sizeof name, "latent_%zu_class_%ld", v->latent[l], class);
        for (size_t p = 0; p < v->patches; p++) mask[p] /= (double)f->used;
        SC_TRY(write_mask(v, name, mask));
        if (!v->colour) continue;
        draw_crop(v->picture, 3 * S, f->pixels, S, mask, f->grid);
        SC_TRY(write_picture(v, name, 3, S, S));
    }
    return SC_OK;
}

static int show_masks(viewer *v) {
    long class = v->s->o->class_index;
    feed *f = &v->s->data;
    int status;
    if (!v->s->o->mask) v->kind = VALUE_MASK;
    SC_TRY(open_viewer(v, v->kind == TOP_MASK));
    v->images = class >= 0 ? 0 : f->set.count;
    if (class >= 0) SC_TRY(choose_class(v, class));
    size_t pixels = f->is_file ? 0 : 3 * f->model.image_size * f->model.image_size;
    if (class >= 0 && pixels)
        SC_TRY(allocate(&v->s->memory, &v->colour, pixels, sizeof *v->colour));
    SC_TRY(start_feed(f, MEASURE_IMAGES, v->image ? listed_draw : NULL, v, 0));
    while ((status = next_encoded(v->s, v->images)) == SC_OK)
        for (size_t l = 0; l < v->latents; l++) {
            SC_TRY(find_masks(v, v->latent[l]));
            for (size_t i = 0; i < f->count && class < 0; i++)
                SC_TRY(show_mask(v, v->latent[l], i));
            for (size_t e = 0; e < f->count * v->patches && class >= 0; e++)
                v->sum[l * v->patches + e % v->patches] += v->mask[e];
            for (size_t e = 0; v->colour && l == 0 && e < f->count * pixels; e++)
                v->colour[e % pixels] += f->pixels[e];
        }
    if (status != SC_END) return status;
    return class >= 0 ? show_class(v, class) : SC_OK;
}

/* The sheet of latent j is complete; the next one starts dark. */
static int finish_sheet(viewer *v, size_t j, size_t images) {
    char name[64];
    if (images == 0) note("latent %zu fires on no image: its sheet is empty", j);
    snprintf(name, sizeof name, "latent_%zu", j);
    SC_TRY(write_picture(v, name, 3, v->width, v->height));
    memset(v->picture, 0, v->height * v->width * 3);
    return SC_OK;
}

/* The images to look at are each latent's top images, as the statistics have them, in turn. */
static int list_images(viewer *v, size_t *count) {
    size_t K = v->of[TOP_IMAGES]->shape[1];
    SC_TRY(allocate(&v->s->memory, &v->image, v->latents, K * sizeof *v->image));
    for (size_t l = 0; l < v->latents; l++, v->images += count[l - 1]) {
        int64_t *image = v->image + v->images;
        SC_TRY(sc_tensor_integers(&v->stats, v->of[TOP_IMAGES], v->latent[l] * K, K, image));
        for (; count[l] < K && image[count[l]] >= 0; count[l]++)
            if (image[count[l]] >= (int64_t)v->s->data.set.count)
                return fail("%s: there is no image %lld", v->stats.path,
                            (long long)image[count[l]]);
    }
    return SC_OK;
}

/* Sheets have their images row by row, the strongest first. */
static int show_sheets(viewer *v) {
    size_t count[MOST_LATENTS] = { 0 }, columns = 1, l = 0, cell = 0;
    feed *f = &v->s->data;
    int status = SC_END;
    SC_TRY(open_viewer(v, 1));
    SC_TRY(list_images(v, count));
    size_t K = v->of[TOP_IMAGES]->shape[1], S = f->model.image_size, step = S + SHEET_GAP;
    while (columns * columns < K) columns++;
    v->width = columns * step - SHEET_GAP;
    v->height = (K - 1) / columns * step + S;
    SC_TRY(allocate(&v->s->memory, &v->picture, columns * columns * 3, step * step));
    f->skip_bad = 0;                             /* a cell is for one image and no other */
    SC_TRY(start_feed(f, MEASURE_IMAGES, listed_draw, v, 0));
    while (v->images > 0 && (status = next_encoded(v->s, v->images)) == SC_OK)
        for (size_t i = 0; i < f->count; i++, cell++) {
            for (; cell == count[l]; l++, cell = 0)
                SC_TRY(finish_sheet(v, v->latent[l], count[l]));
            if (v->kind && (i == 0 || cell == 0)) SC_TRY(find_masks(v, v->latent[l]));
            draw_crop(v->picture + (cell / columns * v->width + cell % columns) * step * 3,
                      v->width * 3, f->pixels + i * S * S * 3, S,
                      v->kind ? v->mask + i * v->patches : NULL, f->grid);
        }
    if (status != SC_END) return status;
    for (; l < v->latents; l++) SC_TRY(finish_sheet(v, v->latent[l], count[l]));
    return SC_OK;
}

/* --- explain --- */

enum { EXPLAINED = 16, EXPLAIN_COLUMNS = 5, CLASSES_SHOWN = 3 };

/* v->entry of latent j. */
static int read_top(viewer *v, size_t j) {
    size_t K = v->of[TOP_IMAGES]->shape[1];
    for (size_t k = 0; k < K; k++) {
        sc_top *e = &v->entry[k];
        SC_TRY(sc_tensor_floats(&v->stats, v->of[TOP_VALUES], j * K + k, 1, &e->value));
        SC_TRY(sc_tensor_integers(&v->stats, v->of[TOP_IMAGES], j * K + k, 1, &e->image));
        SC_TRY(sc_tensor_integers(&v->stats, v->of[TOP_LABELS], j * K + k, 1, &e->other));
    }
    return SC_OK;
}

/* The classes (other) with the largest shares (value) of the activation of v->entry, in descending
 * order; how many. largest: [room] */
static size_t top_classes(const viewer *v, sc_top *largest, size_t room) {
    size_t K = v->of[TOP_IMAGES]->shape[1], active = 0, found = 0;
    double total = 0;
    while (active < K && v->entry[active].value > 0) total += v->entry[active++].value;
    for (size_t i = 0; i < room; i++) largest[i] = nothing;
    for (size_t i = 0; i < active; i++) {
        double share = class_activation(v->entry, active, i) / total;
        if (v->entry[i].other >= 0)
            keep_largest(largest, room, (sc_top){ (float)share, 0, v->entry[i].other });
    }
    while (found < room && largest[found].value > 0) found++;
    return found;
}

/* f_j of one token of the batch's only image, or its mean over all tokens (token SIZE_MAX). */
static float activation_of(const viewer *v, size_t j, size_t token) {
    const sae_batch *b = &v->s->batch[0];
    double sum = 0;
    for (size_t i = 0; i < b->tiles; i++)
        for (code_walk w = walk_codes(&b->tile[i], j); next_code(&w);)
            if (token == SIZE_MAX || b->tile[i].first + w.token == token) sum += w.value;
    return (float)(token == SIZE_MAX ? sum / (double)v->s->data.T : sum);
}

/* A latent's row: row [EXPLAIN_COLUMNS], text [TEXT_ROOM] for its classes. */
static int explain_latent(viewer *v, sc_top latent, table_cell *row, char *text) {
    size_t j = (size_t)latent.image, used = 0;
    const sc_images *set = &v->s->data.set;
    float frequency, entropy;
    sc_top class[CLASSES_SHOWN];
    SC_TRY(sc_tensor_floats(&v->stats, v->of[FREQUENCY], j, 1, &frequency));
    SC_TRY(sc_tensor_floats(&v->stats, v->of[ENTROPY], j, 1, &entropy));
    SC_TRY(read_top(v, j));
    strcpy(text, "");
    for (size_t i = 0, found = top_classes(v, class, CLASSES_SHOWN); i < found; i++) {
        size_t c = (size_t)class[i].other;
        char number[32], name[100];
        snprintf(number, sizeof number, "class %zu", c);
        used += (size_t)snprintf(text + used, TEXT_ROOM - used, "%s%s %.0f %%", i ? ", " : "",
                                 c < set->classes && set->class_name ?
                                 printable(set->class_name[c], name, sizeof name) : number,
                                 100 * (double)class[i].value);
    }
    const table_cell cells[EXPLAIN_COLUMNS] = {
        { "latent", "latent", NULL, (double)j }, { "activation", "activation", NULL, latent.value },
        { "frequency", "frequency", NULL, frequency }, { "entropy", "entropy", NULL, entropy },
        { "classes", "classes of its top images", text, 0 } };
    memcpy(row, cells, sizeof cells);
    return SC_OK;
}

/* The statistics' class names, not those of wherever the image lies. */
static int name_classes(viewer *v) {
    sc_images *set = &v->s->data.set;
    const char *names = sc_metadata_find(&v->stats, "class_names");
    free(set->class_name);
    set->class_name = NULL;
    return names ? json_string_array(names, v->stats.path, &set->class_name, &set->classes) : SC_OK;
}

/* The latents that are strongest on an image, or on its patch R,C. */
static int explain(viewer *v) {
    const options *o = v->s->o;
    const feed *f = &v->s->data;
    sc_top strongest[EXPLAINED];
    table_cell cells[EXPLAINED][EXPLAIN_COLUMNS];
    char classes[EXPLAINED][TEXT_ROOM], more;
    size_t r = 0, c = 0, rows = 0;
    v->kind = VALUE_MASK;
    v->any_data = 1;
    SC_TRY(open_viewer(v, 1));
    if (o->patch && (sscanf(o->patch, "%9zu,%9zu%c", &r, &c, &more) != 2 || r >= f->grid ||
                     c >= f->grid))
        return usage("--patch: '%s' is not R,C, a row and a column from 0,0 to %zu,%zu", o->patch,
                     f->grid - 1, f->grid - 1);
    SC_TRY(start_feed(&v->s->data, MEASURE_IMAGES, NULL, NULL, 0));
    SC_TRY(next_encoded(v->s, 1));
    if (f->count != 1) return fail("%s: one image was expected, here are more", o->operand[0]);
    for (size_t i = 0; i < EXPLAINED; i++) strongest[i] = nothing;
    for (size_t j = 0; j < v->s->sae[0].d_sae; j++) {
        float frequency, a = activation_of(v, j, o->patch ? f->first_patch + r * f->grid + c
                                                          : SIZE_MAX);
        SC_TRY(sc_tensor_floats(&v->stats, v->of[FREQUENCY], j, 1, &frequency));
        if ((double)frequency <= o->max_frequency)
            keep_largest(strongest, EXPLAINED, (sc_top){ a, (int64_t)j, 0 });
    }
    SC_TRY(name_classes(v));
    for (; rows < EXPLAINED && strongest[rows].value > 0; rows++) {
        size_t j = (size_t)strongest[rows].image;
        SC_TRY(explain_latent(v, strongest[rows], cells[rows], classes[rows]));
        if (o->output) SC_TRY(find_masks(v, j));
        if (o->output) SC_TRY(show_mask(v, j, 0));
    }
    if (rows == 0) note("no latent fires there");
    if (rows == 0 && strcmp(o->format, "json") == 0) puts("[]");
    return rows > 0 ? print_table(o->format, cells[0], EXPLAIN_COLUMNS, rows) : SC_OK;
}

static int look(session *s, int (*show)(viewer *v)) {
    const char *mask = s->o->mask;
    viewer v = { .s = s, .kind = !mask ? NO_MASK : strcmp(mask, "top") ? VALUE_MASK : TOP_MASK };
    int status = show(&v);
    if (status != SC_OK && v.made) rmdir(s->o->output);      /* goes only if it is empty */
    sc_safetensors_close(&v.stats);
    return status;
}

static int command_top(session *s) { return look(s, show_sheets); }
static int command_mask(session *s) { return look(s, show_masks); }
static int command_explain(session *s) { return look(s, explain); }

/* ============================================================================================
 * 22. Figures
 *
 * `plot` draws the report's figures as SVG (w3.org/TR/SVG11) from files that other commands wrote.
 * A kind of figure is a row of a table: how a file becomes rows of numbers, how the rows of all
 * files are drawn. Places come from IEEE operations and our own logarithm, so the same files give
 * the same bytes everywhere. Paper and ink follow the reader's light or dark.
 * ============================================================================================ */

enum {
    LINE_POINTS = 1000,                          /* of a line, at most */
    PANEL = 330, CELL = 5, CELLS = PANEL / CELL, /* of latents, in pixels: cells of points */
    BAR_ROOM = 54,                               /* for the bars beside them */
    MASK_SIDE = 200, MASK_CELLS = 64, MASKS_A_ROW = 4
};

/* What a file holds, and what the figure says of it. row: [rows], of a kind's columns */
typedef struct {
    const char *path;
    sc_safetensors file;             /* statistics, while they are read */
    double (*row)[4];
    size_t rows, capacity;
    char words[160];
} plot_series;

typedef struct {
    const struct plot_kind *kind;
    plot_series series[MAX_OPERANDS];
    size_t count;
    FILE *out;
} plot;

/* Of lines also the panels' axes: column 0 of the rows along x, the others up. */
struct plot_kind {
    const char *name;
    int (*read)(plot_series *s);
    void (*draw)(plot *p);
    const char *x, *y[3];
    int x_scale, y_scale;
};

static int add_row(plot_series *s, double a, double b, double c, double d) {
    SC_TRY(grow(&s->row, &s->capacity, s->rows, sizeof *s->row));
    memcpy(s->row[s->rows++], (double[]){ a, b, c, d }, sizeof *s->row);
    return SC_OK;
}

/* --- Reading --- */

/* Columns: step, loss, mse, l0. */
static int read_log(plot_series *s) {
    char line[512];
    double v[4] = { 0 };
    FILE *file = fopen(s->path, "r");
    if (!file) return fail("%s: cannot be opened: %s", s->path, strerror(errno));
    int status = fgets(line, sizeof line, file) && strcmp(line, log_header) == 0 ? SC_OK
               : fail("%s: no training log: its first line should be %.*s", s->path,
                      (int)sizeof log_header - 2, log_header);
    for (size_t number = 2; status == SC_OK && fgets(line, sizeof line, file); number++) {
        int end = 0;
        sscanf(line, "%lf,%*f,%*f,%*f,%lf,%lf,%*f,%*f,%lf,%*f,%*f,%*f%n", &v[0], &v[1], &v[2],
               &v[3], &end);
        for (int c = 0; c < 4 && end > 0; c++) end = fabs(v[c]) <= 1e30 ? end : 0;
        if (end > 0 && line[end] == '\n') status = add_row(s, v[0], v[1], v[2], v[3]);
        else status = fail("%s: line %zu: expected 12 finite numbers", s->path, number);
    }
    if (status == SC_OK && (ferror(file) || s->rows == 0))
        status = fail("%s: %s", s->path, ferror(file) ? "cannot be read" : "a log without a step");
    fclose(file);
    snprintf(s->words, sizeof s->words, "%zu steps, MSE %.4g and L0 %.4g at the end", s->rows, v[2],
             v[3]);
    return status;
}

/* A tensor of statistics, each of its numbers from least to most, as a column. */
static int read_column(plot_series *s, size_t column, const char *name, double least,
                       double most) {
    if (!s->file.path) SC_TRY(sc_safetensors_open(&s->file, s->path));
    const sc_tensor *t = sc_tensor_find(&s->file, name);
    if (!t || t->rank != 1 || t->count == 0 || (s->rows > 0 && t->count != s->rows))
        return fail("%s: no statistics: a list %s was expected, as long as others", s->path, name);
    for (size_t i = 0; i < t->count; i++) {
        float real = 0;
        int64_t whole = 0;
        SC_TRY(t->dtype < SC_I64 ? sc_tensor_floats(&s->file, t, i, 1, &real)
                                 : sc_tensor_integers(&s->file, t, i, 1, &whole));
        double value = t->dtype < SC_I64 ? (double)real : (double)whole;
        if (!(value >= least && value <= most))
            return fail("%s: element %zu of %s is %g, expected %g to %g", s->path, i, name, value,
                        least, most);
        if (i == s->rows) SC_TRY(add_row(s, 0, 0, 0, 0));
        s->row[i][column] = value;
    }
    return SC_OK;
}

/* Columns: frequency, mean activation, entropy, of the latents that fire. */
static int read_latents(plot_series *s) {
    size_t fire = 0, latents;
    SC_TRY(read_column(s, 0, "sae_sparsity", 0, 1));
    SC_TRY(read_column(s, 1, "sae_mean_acts", 0, FLT_MAX));
    SC_TRY(read_column(s, 2, "top_entropy", -1, 100));
    for (latents = 0; latents < s->rows; latents++)
        if (s->row[latents][0] > 0 && s->row[latents][1] > 0)
            memmove(s->row[fire++], s->row[latents], sizeof *s->row);
    s->rows = fire;
    snprintf(s->words, sizeof s->words, "%zu latents, of which %zu never fire", latents,
             latents - fire);
    return SC_OK;
}

/* Columns: a bin's middle, its share. */
static int read_histogram(plot_series *s) {
    double total = 0, left = 0, right = 0;
    size_t first = 0;
    char *end = NULL;
    SC_TRY(read_column(s, 1, "activation_histogram", 0, 1e18));
    const char *text = sc_metadata_find(&s->file, "histogram_edges");
    for (size_t i = 0; i <= s->rows; i++, left = right, text = end) {
        right = text && *text ? strtod(text + 1, &end) : 0;
        if (!(right > left && right < 1e30) || *end != (i < s->rows ? ',' : ']'))
            return fail("%s: no statistics: metadata histogram_edges, ascending, were expected",
                        s->path);
        if (i > 0) s->row[i - 1][0] = sqrt(left * right);
        if (i > 0) total += s->row[i - 1][1];
    }
    snprintf(s->words, sizeof s->words, "%.0f active values", total);
    while (s->rows > 0 && s->row[s->rows - 1][1] == 0) s->rows--;
    while (first < s->rows && s->row[first][1] == 0) first++;
    if (s->rows > 0) memmove(s->row, s->row + first, (s->rows -= first) * sizeof *s->row);
    for (size_t r = 0; r < s->rows; r++) s->row[r][1] *= 100 / total;
    return SC_OK;
}

/* The larger second column first. */
static int by_images(const void *a, const void *b) {
    const double *left = a, *right = b;
    return (left[1] < right[1]) - (left[1] > right[1]);
}

/* Columns: rank, images on which the latent fires. */
static int read_counts(plot_series *s) {
    size_t all = 0, few = 0, none = 0;
    SC_TRY(read_column(s, 1, "image_count", 0, 1e15));
    const char *text = sc_metadata_find(&s->file, "images");
    double images = text ? strtod(text, NULL) : 0;
    qsort(s->row, s->rows, sizeof *s->row, by_images);
    if (!(images >= 1 && images <= 1e15 && s->row[0][1] <= images))
        return fail("%s: no statistics: metadata images was expected, %.0f or more", s->path,
                    fmax(1, s->row[0][1]));
    for (size_t r = 0; r < s->rows; r++) {
        double count = s->row[r][1];
        s->row[r][0] = (double)(r + 1);
        all += count == images;
        few += count == 1 || count == 2;
        none += count == 0;
    }
    snprintf(s->words, sizeof s->words, "%zu latents: %zu on all %.0f images, %zu on 1 or 2, "
             "%zu on none", s->rows, all, images, few, none);
    return SC_OK;
}

/* Column 2: the patches' values. */
static int read_mask(plot_series *s) {
    image_source source;
    picture mask = { 0, 0, 0, NULL };
    if (open_image(s->path, &source) != SC_OK) return SC_FAILED;
    int status = strchr("25", source.format->magic[1]) ? pnm_read(&source, &mask) : SC_OK;
    if (status == SC_OK && (mask.width != mask.height || mask.width - 1 >= MASK_CELLS))
        status = fail("%s: no mask: a square PGM of at most %d x %d was expected", s->path,
                      MASK_CELLS, MASK_CELLS);
    for (size_t i = 0; status == SC_OK && i < mask.width * mask.width; i++)
        status = add_row(s, 0, 0, mask.rgb[3 * i] / 255.0, 0);
    close(source.fd);
    free(source.rgb);
    snprintf(s->words, sizeof s->words, "%zu x %zu patches", mask.width, mask.width);
    return status == SC_OK ? SC_OK : SC_FAILED;
}

/* --- SVG --- */

static void start_plot(plot *p, double width, size_t height) {
    fprintf(p->out, "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 %.0f "
            "%zu\" width=\"%.0f\" height=\"%zu\">\n<title>saeclip: %s</title>\n<style>\n"
            ".plot{font:12px system-ui,sans-serif}.plot text{fill:#222}.paper{fill:#fff}\n"
            ".grid{fill:none;stroke:#ddd}.bar{fill:#8b95a1}.line{fill:none;stroke-width:1.5;"
            "stroke-linejoin:round;stroke-linecap:round}.plot circle{stroke:#999;stroke-width:.4}\n"
            "@media(prefers-color-scheme:dark){.plot text{fill:#ddd}.paper{fill:#16181c}"
            ".grid{stroke:#3b3f46}}\n</style>\n<rect class=\"paper\" width=\"100%%\" "
            "height=\"100%%\"/>\n", width, height, width, height, p->kind->name);
}

/* Text and nothing else, whatever names hold: printable() shows what XML cannot have, but U+FFFE
 * and U+FFFF. style: attributes */
SC_PRINTF(5, 6) static void draw_text(plot *p, double x, double y, const char *style,
                                      const char *format, ...) {
    char line[TEXT_ROOM];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fprintf(p->out, "<text x=\"%.1f\" y=\"%.1f\"%s>", x, y, style);
    for (const char *c = shown(line); *c; c++)
        if (strncmp(c, "\xef\xbf", 2) == 0 && (unsigned char)c[2] > 0xbd) c += 2;
        else if (strchr("&<>\"'", *c)) fprintf(p->out, "&#%d;", *c);
        else putc(*c, p->out);
    fputs("</text>\n", p->out);
}

static void draw_rect(plot *p, double x, double y, double width, double height, const char *style) {
    fprintf(p->out, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" %s/>\n", x, y,
            width, height, style);
}

/* The end of a name, which tells files apart. */
static const char *name_end(const char *name, size_t most) {
    size_t length = strlen(name);
    name += length > most ? length - most : 0;
    while ((*name & 0xc0) == 0x80) name++;       /* within a letter */
    return name;
}

/* viridis (Smith and van der Walt, 2015), interpolated. t: 0 .. 1; below 0: grey */
static const char *fill_colour(double t) {
    static const unsigned char map[][3] = {
        { 68, 1, 84 }, { 71, 44, 122 }, { 59, 81, 139 }, { 44, 113, 142 }, { 33, 144, 141 },
        { 39, 173, 129 }, { 92, 200, 99 }, { 170, 220, 50 }, { 253, 231, 37 } };
    int at = t < 1 ? (int)(8 * t) : 7, rgb[3] = { 136, 136, 136 };
    for (int c = 0; c < 3 && t >= 0; c++)
        rgb[c] = (int)(map[at][c] + (8 * t - at) * (map[at + 1][c] - map[at][c]) + 0.5);
    char *out = text_room();
    sprintf(out, "fill=\"#%02x%02x%02x\"", rgb[0], rgb[1], rgb[2]);
    return out;
}

/* --- Axes --- */

/* AUTO_SCALE: logarithmic where values span a factor of 30; ZERO_SCALE: linear from 0. In this and
 * in LOG_SCALE what is not above 0 has no say. */
enum { LINEAR_SCALE, AUTO_SCALE, ZERO_SCALE, LOG_SCALE };

/* low and high, numbers or their log10, lie at the pixels from and to; ticks `step` apart. */
typedef struct { int is_log; double low, high, from, to, step; } plot_axis;

/* factor 10^exponent, as near as a double comes */
static double decimal(int factor, int exponent) {
    char text[24];
    snprintf(text, sizeof text, "%de%d", factor, exponent);
    return strtod(text, NULL);
}

static double on_axis(const plot_axis *a, double value) {
    return a->is_log ? log64(value) * 0.43429448190325183 : value;
}

static double axis_place(const plot_axis *a, double value) {
    return a->from + (a->to - a->from) * (on_axis(a, value) - a->low) / (a->high - a->low);
}

/* An axis with room for a column of all series. */
static plot_axis fit_axis(const plot *p, int scale, size_t column, double from, double to) {
    plot_axis a = { .from = from, .to = to };
    double low = (double)INFINITY, high = -low;
    for (const plot_series *s = p->series; s < p->series + p->count; s++)
        for (size_t r = 0; r < s->rows; r++) {
            double value = s->row[r][column];
            if (scale >= ZERO_SCALE && !(value > 0)) continue;
            low = fmin(low, value);
            high = fmax(high, value);
        }
    if (low > high) low = high = 1;              /* there are no values */
    if (scale == ZERO_SCALE) low = 0;
    a.is_log = scale == LOG_SCALE || (scale == AUTO_SCALE && low > 0 && high / low >= 30);
    a.low = on_axis(&a, low);
    a.high = on_axis(&a, high);
    double span = a.high - a.low, more = scale == ZERO_SCALE ? 0 : 0.03 * span;
    if (a.is_log) more = fmax((2 - span) / 2, more);         /* two powers of ten, at least */
    else if (!(span > 1e-7 * fabs(high))) more = high == 0 ? 1 : fabs(high) / 2;
    a.low -= more;
    a.high += more;
    for (int i = a.is_log ? 900 : 0; a.step == 0 || (a.high - a.low) / a.step > 8; i++)
        a.step = decimal(i % 3 == 0 ? 1 : i % 3 == 1 ? 2 : 5, i / 3 - 300);
    return a;
}

/* Grid lines, numbers and label: upright, left of a panel from x `at` to `across`, or below one
 * from y `at` up to `across`. */
static void draw_axis(plot *p, const plot_axis *a, int upright, double at, double across,
                      const char *label) {
    static const char centre[] = " text-anchor=\"middle\"", end[] = " text-anchor=\"end\"";
    static const char turned[] = " text-anchor=\"middle\" transform=\"rotate(-90)\"";
    double middle = (a->from + a->to) / 2;
    for (double k = ceil(a->low / a->step); k <= floor(a->high / a->step); k++) {
        double value = a->is_log ? decimal(1, (int)(k * a->step)) : k * a->step + 0.0;
        double v = axis_place(a, value);
        fprintf(p->out, "<path class=\"grid\" d=\"M%.1f %.1f%c%.1f\"/>\n", upright ? at : v,
                upright ? v : at, upright ? 'H' : 'V', across);
        if (upright) draw_text(p, at - 6, v + 4, end, "%.10g", value);
        else draw_text(p, v, at + 16, centre, "%.10g", value);
    }
    if (upright) draw_text(p, -middle, at - 60, turned, "%s", label);
    else draw_text(p, middle, at + 36, centre, "%s", label);
}

/* --- Lines: curves, activations, counts --- */

/* Told apart on white and on black. */
static const char *const line_colours[] = { "#2f8fd8", "#e0851b", "#1fa67a", "#d4569a", "#8b6fe8",
                                            "#c9a400", "#d5492e", "#7d8794" };

static void start_line(plot *p, const char *tag, size_t index) {
    size_t colours = COUNT(line_colours);
    fprintf(p->out, "<%s class=\"line\" stroke=\"%s\"%s ", tag, line_colours[index % colours],
            index < colours ? "" : " stroke-dasharray=\"5 4\"");
}

/* A column over the first as a line of at most LINE_POINTS points: of each group of rows the
 * smallest and the largest, so that no spike is lost. */
static void draw_line(plot *p, size_t index, size_t column, const plot_axis *x,
                      const plot_axis *y) {
    const plot_series *s = &p->series[index];
    size_t rows = s->rows, groups = LINE_POINTS / 2;
    while (y->is_log && rows > 0 && !(s->row[rows - 1][column] > 0)) rows--;    /* of counts */
    size_t group = rows > LINE_POINTS ? (rows + groups - 1) / groups : 1;
    start_line(p, "polyline", index);
    fputs("points=\"", p->out);
    for (size_t first = 0; first < rows; first += group) {
        size_t least = first, most = first;
        for (size_t i = first; i < rows && i < first + group; i++) {
            if (s->row[i][column] < s->row[least][column]) least = i;
            if (s->row[i][column] > s->row[most][column]) most = i;
        }
        const size_t point[2] = { least < most ? least : most, least < most ? most : least };
        for (int i = least == most && rows > 1; i < 2; i++)  /* a single row: a dash */
            fprintf(p->out, "%.1f,%.1f ", axis_place(x, s->row[point[i]][0]) + (rows > 1 ? 0 :
                    8 * i - 4), axis_place(y, s->row[point[i]][column]));
    }
    fputs("\"/>\n", p->out);
}

static void draw_lines(plot *p) {
    const struct plot_kind *k = p->kind;
    size_t panels = k->y[1] ? 3 : 1;
    const double width = panels > 1 ? 260 : 620, step = width + 104, top = 20, bottom = 280;
    start_plot(p, step * (double)panels, 340 + 20 * p->count);
    for (size_t i = 0; i < panels; i++) {
        double left = 82 + step * (double)i;
        plot_axis x = fit_axis(p, k->x_scale, 0, left, left + width);
        plot_axis y = fit_axis(p, k->y_scale, i + 1, bottom, top);
        draw_axis(p, &x, 0, bottom, top, k->x);
        draw_axis(p, &y, 1, left, left + width, k->y[i]);
        for (size_t n = 0; n < p->count; n++) draw_line(p, n, i + 1, &x, &y);
    }
    for (size_t n = 0; n < p->count; n++) {
        double y = 346 + 20 * (double)n;
        start_line(p, "path", n);
        fprintf(p->out, "d=\"M82 %.1fh22\"/>\n", y - 4);
        draw_text(p, 112, y, "", "%s: %s", name_end(p->series[n].path, 44), p->series[n].words);
    }
}

/* --- Latents and masks --- */

/* A bar of colours, its axis on the left. */
static void draw_scale(plot *p, const plot_axis *a, double x, const char *label) {
    double height = (a->from - a->to) / 50;
    draw_axis(p, a, 1, x, x, label);
    for (int i = 0; i < 50; i++)
        draw_rect(p, x, a->from - (i + 1) * height, 14, height + (i > 0),
                  fill_colour((i + 0.5) / 50));
}

/* A point for each cell in which latents lie, at their mean place and of their mean entropy's
 * colour, the larger the more they are: 49,152 of them stay light, and one alone is exact. Above
 * and right of the panel, bars: how many there are in a row or column of cells. */
static void draw_cells(plot *p, const plot_series *s, const plot_axis *x, const plot_axis *y,
                       double entropy) {
    struct { double latents, x, y, known, entropy; } cell[CELLS * CELLS] = { { 0 } }, *c;
    double bar[2][CELLS] = { { 0 } }, most[2] = { 1, 1 };
    for (size_t r = 0; r < s->rows; r++) {
        double across = axis_place(x, s->row[r][0]), down = axis_place(y, s->row[r][1]);
        size_t i = (size_t)(across - x->from) / CELL, j = (size_t)(down - y->to) / CELL;
        most[0] = fmax(most[0], ++bar[0][i]);
        most[1] = fmax(most[1], ++bar[1][j]);
        c = &cell[j * CELLS + i];
        c->latents++;
        c->x += across;
        c->y += down;
        c->known += s->row[r][2] >= 0;
        c->entropy += fmax(s->row[r][2], 0);
    }
    for (c = cell; c < cell + CELLS * CELLS; c++)
        if (c->latents > 0)
            fprintf(p->out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" %s/>\n", c->x / c->latents,
                    c->y / c->latents, fmin(1.8 + 0.3 * log64(c->latents), 3.5),
                    fill_colour(c->known > 0 ? c->entropy / c->known / entropy : -1));
    for (int i = 0; i < CELLS; i++) {
        double up = BAR_ROOM * bar[0][i] / most[0], right = BAR_ROOM * bar[1][i] / most[1];
        if (up > 0) draw_rect(p, x->from + CELL * i, y->to - 4 - up, CELL - 1, up, "class=\"bar\"");
        if (right > 0)
            draw_rect(p, x->to + 4, y->to + CELL * i, right, CELL - 1, "class=\"bar\"");
    }
}

static void draw_latents(plot *p) {
    const double step = 82 + PANEL + BAR_ROOM + 16, top = 112, bottom = top + PANEL;
    const double end = step * (double)p->count;
    plot_axis entropy = fit_axis(p, ZERO_SCALE, 2, bottom, top);
    start_plot(p, end + 116, 524);
    for (size_t i = 0; i < p->count; i++) {
        const plot_series *s = &p->series[i];
        double left = 82 + step * (double)i, right = left + PANEL;
        plot_axis x = fit_axis(p, LOG_SCALE, 0, left, right);
        plot_axis y = fit_axis(p, LOG_SCALE, 1, bottom, top);
        draw_text(p, left, 22, " font-weight=\"bold\"", "%s", name_end(s->path, 50));
        draw_text(p, left, 40, "", "%s", s->words);
        draw_axis(p, &x, 0, bottom, top, "frequency (share of images, log scale)");
        draw_axis(p, &y, 1, left, right, "mean activation on the images it fires on (log scale)");
        draw_cells(p, s, &x, &y, entropy.high);
    }
    draw_scale(p, &entropy, end + 72, "entropy of the top images' classes (nats)");
    draw_text(p, 82, 506, "", "larger: several latents; grey: no entropy (too few images)");
}

static void draw_masks(plot *p) {
    const size_t across = p->count < MASKS_A_ROW ? p->count : MASKS_A_ROW, tall = MASK_SIDE + 64;
    const double wide = MASK_SIDE + 24, end = wide * (double)across, top = 52;
    plot_axis value = fit_axis(p, ZERO_SCALE, 2, top + MASK_SIDE, top);
    start_plot(p, end + 120, tall * ((p->count - 1) / across + 1) + 16);
    for (size_t i = 0; i < p->count; i++) {
        const plot_series *s = &p->series[i];
        double left = 20 + wide * (double)(i % across), y = top + (double)(i / across * tall);
        size_t grid = (size_t)sqrt((double)s->rows);
        double side = (double)MASK_SIDE / (double)grid;
        draw_text(p, left, y - 28, " font-weight=\"bold\"", "%s", name_end(s->path, 26));
        draw_text(p, left, y - 10, "", "%s", s->words);
        fputs("<g shape-rendering=\"crispEdges\">\n", p->out);
        for (size_t r = 0; r < s->rows; r++)
            draw_rect(p, left + side * (double)(r % grid), y + side * (double)(r / grid),
                      side, side, fill_colour(s->row[r][2] / value.high));
        fputs("</g>\n", p->out);
    }
    draw_scale(p, &value, end + 82, "activation (share of the largest)");
}

/* --- plot --- */

static const struct plot_kind plot_kinds[] = {
    { "curves", read_log, draw_lines, "step", { "loss", "MSE", "L0 (active latents a token)" },
      LINEAR_SCALE, AUTO_SCALE },
    { "latents", read_latents, draw_latents, NULL, { NULL }, 0, 0 },
    { "activations", read_histogram, draw_lines, "activation of an active latent (log scale)",
      { "active values in a bin (%)" }, LOG_SCALE, ZERO_SCALE },
    { "counts", read_counts, draw_lines, "latents, the most frequent first",
      { "images on which a latent fires (log scale)" }, LINEAR_SCALE, LOG_SCALE },
    { "mask", read_mask, draw_masks, NULL, { NULL }, 0, 0 } };

static int command_plot(session *s) {
    const char *const *operand = s->o->operand;
    plot p = { .kind = plot_kinds };
    sc_output out;
    int status = SC_OK;
    while (strcmp(p.kind->name, operand[0]) != 0)
        if (++p.kind == plot_kinds + COUNT(plot_kinds))
            return usage("plot: '%s' is none of curves, latents, activations, counts, mask",
                         operand[0]);
    if (p.kind->draw == draw_latents && operand[1 + 2])
        return usage("plot latents: at most 2 files were expected");
    for (; operand[p.count + 1] && status == SC_OK; p.count++) {
        plot_series *each = &p.series[p.count];
        each->path = operand[p.count + 1];
        status = p.kind->read(each);
        sc_safetensors_close(&each->file);
    }
    if (status == SC_OK) status = output_open(&out, s->o->output);
    if (status == SC_OK) {
        p.out = out.file;
        p.kind->draw(&p);
        fputs("</svg>\n", p.out);
        status = output_commit(&out);
    }
    while (p.count > 0) free(p.series[--p.count].row);
    return status;
}

/* ============================================================================================
 * 23. The atlas
 *
 * A folder that a browser opens without a server. index.html is the page (section 19), data/ holds
 * what it shows: latents.js the numbers of all latents, J.js the top images of the J-th PART of
 * them, with their masks, I.jpg image I, once, however many latents show it. A page from a file may
 * not read files, but it may have scripts: each is one call with JSON.
 * ============================================================================================ */

/* --- Pictures: baseline JPEG (ITU-T T.81), one table of steps and one pair of codes for all of Y,
 * Cb and Cr. A tenth of what stored PNGs take, which for thousands of pictures counts --- */

typedef struct {
    FILE *out;
    uint32_t bits;                   /* the last `held` wait for a whole byte */
    unsigned held;
    unsigned char symbol[2][162], length[2][256];        /* of DC, of AC: in order of their codes */
    uint16_t code[2][256];
    int last[3];                     /* DC of each component's block before */
} jpeg_writer;

static const unsigned char zigzag[64] = {
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63 };

/* The example of annex K for brightness, halved, in zigzag order. */
static const unsigned char quantiser[64] = {
    8, 6, 6, 7, 6, 5, 8, 7, 7, 7, 9, 9, 8, 10, 12, 20, 13, 12, 11, 11, 12, 25,
    18, 19, 15, 20, 29, 26, 31, 30, 29, 26, 28, 28, 32, 36, 46, 39, 32, 34, 44, 35, 28, 28,
    40, 55, 41, 44, 48, 49, 52, 52, 52, 31, 39, 57, 61, 56, 50, 60, 46, 51, 52, 50 };

/* Codes of each length, 1 to 16 bits, of annex K's tables K.3 and K.5. */
static const unsigned char jpeg_counts[2][16] = {
    { 0, 1, 5, 1, 1, 1, 1, 1, 1 }, { 0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125 } };

/* A symbol of AC is a run of zeros (high half) and a size; after these all others in order. */
static void make_codes(jpeg_writer *j) {
    static const unsigned char frequent[37] = {
        0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13,
        0x51, 0x61, 0x07, 0x22, 0x71, 0x14, 0x32, 0x81, 0x91, 0xa1, 0x08, 0x23, 0x42,
        0xb1, 0xc1, 0x15, 0x52, 0xd1, 0xf0, 0x24, 0x33, 0x62, 0x72, 0x82 };
    size_t used = sizeof frequent;
    memcpy(j->symbol[1], frequent, used);
    for (unsigned char i = 0; i < 12; i++) j->symbol[0][i] = i;
    for (int symbol = 1; symbol < 256; symbol++)
        if (symbol % 16 >= 1 && symbol % 16 <= 10 && !memchr(frequent, symbol, sizeof frequent))
            j->symbol[1][used++] = (unsigned char)symbol;
    for (int table = 0; table < 2; table++) {
        const unsigned char *symbol = j->symbol[table];
        unsigned next = 0;
        for (unsigned char length = 1; length <= 16; length++, next *= 2)
            for (int i = jpeg_counts[table][length - 1]; i > 0; i--, symbol++) {
                j->code[table][*symbol] = (uint16_t)next++;
                j->length[table][*symbol] = length;
            }
    }
}

static void put_bits(jpeg_writer *j, unsigned bits, unsigned count) {
    j->bits = j->bits << count | bits;
    for (j->held += count; j->held >= 8; j->held -= 8) {
        int byte = (int)(j->bits >> (j->held - 8) & 0xff);
        putc(byte, j->out);
        if (byte == 0xff) putc(0, j->out);               /* or it would be a marker */
    }
}

/* A value of DC, or of AC after a run of zeros: the code of its size, its low bits. */
static void put_value(jpeg_writer *j, int table, unsigned run, int value) {
    unsigned size = 0;
    while (abs(value) >> size) size++;
    put_bits(j, j->code[table][run << 4 | size], j->length[table][run << 4 | size]);
    put_bits(j, (unsigned)(value < 0 ? value - 1 : value) & ((1u << size) - 1), size);
}

/* The cosine transform of each row of 8, turned, so that the same again does the columns. */
static void transform_rows(const double *in, double *out) {
    static const double half_cosine[9] = {               /* cos(k pi / 16) / 2 */
        0.5, 0.49039264020161522, 0.46193976625564337, 0.41573480615127262, 0.35355339059327379,
        0.27778511650980114, 0.19134171618254492, 0.097545161008064133, 0 };
    for (size_t i = 0; i < 64; i++) {
        size_t row = i % 8, u = i / 8;
        out[i] = 0;
        for (size_t x = 0; x < 8; x++) {
            size_t angle = u ? (2 * x + 1) * u % 32 : 4, k = angle > 16 ? 32 - angle : angle;
            out[i] += in[row * 8 + x] * (k > 8 ? -half_cosine[16 - k] : half_cosine[k]);
        }
    }
}

/* block: [8, 8] of component c */
static void put_block(jpeg_writer *j, int c, const double *block) {
    double half[64], frequency[64];
    unsigned run = 0;
    transform_rows(block, half);
    transform_rows(half, frequency);
    for (size_t i = 0; i < 64; i++) {
        int value = (int)floor(frequency[zigzag[i]] / quantiser[i] + 0.5);
        if (i == 0) {
            put_value(j, 0, 0, value - j->last[c]);
            j->last[c] = value;
        } else if (value == 0) run++;
        else {
            for (; run > 15; run -= 16) put_bits(j, j->code[1][0xf0], j->length[1][0xf0]);
            put_value(j, 1, run, value);
            run = 0;
        }
    }
    if (run > 0) put_bits(j, j->code[1][0], j->length[1][0]);
}

/* pixels: [S, S, 3] */
static void put_jpeg(FILE *out, const unsigned char *pixels, size_t S) {
    static const double to_ycc[3][3] = {                 /* JFIF */
        { 0.299, 0.587, 0.114 }, { -0.168735892, -0.331264108, 0.5 },
        { 0.5, -0.418687589, -0.081312411 } };
    const unsigned char start[] = { 0xff, 0xd8, 0xff, 0xdb, 0, 67, 0 };
    const unsigned char frame[] = { 0xff, 0xc0, 0, 17, 8, (unsigned char)(S >> 8), (unsigned char)S,
        (unsigned char)(S >> 8), (unsigned char)S, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0 };
    const unsigned char scan[] = { 0xff, 0xda, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 63, 0 };
    jpeg_writer j = { .out = out };
    double block[64];
    make_codes(&j);
    fwrite(start, sizeof start, 1, out);
    fwrite(quantiser, sizeof quantiser, 1, out);
    fwrite(frame, sizeof frame, 1, out);
    for (int table = 0; table < 2; table++) {
        size_t symbols = table ? 162 : 12;
        fprintf(out, "\xff\xc4%c%c%c", 0, (int)symbols + 19, 16 * table);
        fwrite(jpeg_counts[table], 16, 1, out);
        fwrite(j.symbol[table], symbols, 1, out);
    }
    fwrite(scan, sizeof scan, 1, out);
    for (size_t b = 0, across = (S + 7) / 8; b < across * across; b++)
        for (int c = 0; c < 3; c++) {
            for (size_t i = 0; i < 64; i++) {            /* beyond the edge: the edge */
                size_t row = b / across * 8 + i / 8, column = b % across * 8 + i % 8;
                const unsigned char *rgb = pixels + ((row < S ? row : S - 1) * S
                                                     + (column < S ? column : S - 1)) * 3;
                block[i] = to_ycc[c][0] * rgb[0] + to_ycc[c][1] * rgb[1] + to_ycc[c][2] * rgb[2]
                         - (c == 0 ? 128 : 0);
            }
            put_block(&j, c, block);
        }
    put_bits(&j, 0x7f, 7);                               /* fills the last byte */
    fputs("\xff\xd9", out);
}

/* --- Scripts --- */

enum { PART = 64 };                  /* latents whose top images come in one script */

/* That an image is among a latent's top images: slot = latent K + rank. */
typedef struct { int64_t image; size_t slot; } atlas_use;

typedef struct {
    viewer *v;
    size_t n, K, P;                  /* latents, their top images, their top patches */
    atlas_use *use;                  /* [uses], by image */
    size_t uses;
    int64_t *patch;                  /* [P, 2], of one latent */
    char *digits;                    /* [patches], a mask */
    FILE *masks;                     /* [n, K, patches], digits; where a slot has an image */
} atlas;

/* What writes a file of the atlas; number: which of its kind. */
typedef int write_function(atlas *a, FILE *out, size_t number);

/* Writes DIR/NAME: the whole file stands there, or nothing does. */
static int save_file(atlas *a, const char *name, write_function *write, size_t number) {
    sc_output out;
    char path[MAX_PATH];
    SC_TRY(join_path(a->v->s->o->output, name, path));
    SC_TRY(output_open(&out, path));
    int status = write(a, out.file, number);
    if (status == SC_OK) return output_commit(&out);
    output_discard(&out);
    return status;
}

static int by_use(const void *left, const void *right) {
    const atlas_use *a = left, *b = right;
    if (a->image != b->image) return a->image < b->image ? -1 : 1;
    return a->slot < b->slot ? -1 : 1;
}

/* Who shows which image; v->image becomes each of them, once, in ascending order. */
static int list_uses(atlas *a) {
    viewer *v = a->v;
    size_t slots = a->n * a->K;
    const array_spec arrays[] = {
        ARRAY(a->use, slots, 1), ARRAY(v->image, slots, 1), ARRAY(a->patch, a->P, 2),
        ARRAY(a->digits, v->patches, 1) };
    SC_TRY(new_arrays(&v->s->memory, arrays, COUNT(arrays)));
    SC_TRY(sc_tensor_integers(&v->stats, v->of[TOP_IMAGES], 0, slots, v->image));
    for (size_t slot = 0; slot < slots; slot++) {
        if (v->image[slot] >= (int64_t)v->s->data.set.count)
            return fail("%s: there is no image %lld", v->stats.path, (long long)v->image[slot]);
        if (v->image[slot] >= 0) a->use[a->uses++] = (atlas_use){ v->image[slot], slot };
    }
    if (a->uses > 0) qsort(a->use, a->uses, sizeof *a->use, by_use);
    for (size_t i = 0; i < a->uses; i++)
        if (i == 0 || a->use[i].image != a->use[i - 1].image)
            v->image[v->images++] = a->use[i].image;
    return SC_OK;
}

/* A mask in 16 levels: 0 is silent, f the largest. */
static int keep_mask(atlas *a, size_t slot, const double *mask) {
    size_t patches = a->v->patches;
    double largest = 0;
    for (size_t p = 0; p < patches; p++) largest = mask[p] > largest ? mask[p] : largest;
    for (size_t p = 0; p < patches; p++)
        a->digits[p] = "0123456789abcdef"[mask[p] > 0 ? (int)ceil(15 * mask[p] / largest) : 0];
    if (fseeko(a->masks, (off_t)(slot * patches), SEEK_SET) == 0 &&
        fwrite(a->digits, patches, 1, a->masks) == 1) return SC_OK;
    return spool_failed();
}

static int write_jpeg(atlas *a, FILE *out, size_t i) {
    const feed *f = &a->v->s->data;
    size_t S = f->model.image_size;
    put_jpeg(out, f->pixels + i * S * S * 3, S);
    return SC_OK;
}

/* One pass over the images that any latent shows: the pictures, and the masks of who shows them. */
static int look_at_images(atlas *a) {
    viewer *v = a->v;
    feed *f = &v->s->data;
    size_t at = 0;
    int status = SC_END;
    f->skip_bad = 0;                             /* they were good when the statistics were made */
    SC_TRY(start_feed(f, MEASURE_IMAGES, listed_draw, v, 0));
    while (v->images > 0 && (status = next_encoded(v->s, v->images)) == SC_OK)
        for (size_t i = 0; i < f->count; i++) {
            char name[64];
            snprintf(name, sizeof name, "data/%zu.jpg", f->image[i]);
            SC_TRY(save_file(a, name, write_jpeg, i));
            for (; at < a->uses && a->use[at].image == (int64_t)f->image[i]; at++) {
                SC_TRY(find_masks(v, a->use[at].slot / a->K));
                SC_TRY(keep_mask(a, a->use[at].slot, v->mask + i * v->patches));
            }
        }
    return status == SC_END ? SC_OK : status;
}

/* The top images of latent j, each [image, activation, class, name, mask, top patches]. */
static int write_latent(atlas *a, FILE *out, size_t j) {
    viewer *v = a->v;
    SC_TRY(read_top(v, j));
    SC_TRY(sc_tensor_integers(&v->stats, v->of[TOP_PATCHES], j * a->P * 2, a->P * 2, a->patch));
    putc('[', out);
    for (size_t k = 0; k < a->K && v->entry[k].image >= 0; k++) {
        const sc_top *e = &v->entry[k];
        const char *comma = "";
        if (fseeko(a->masks, (off_t)((j * a->K + k) * v->patches), SEEK_SET) != 0 ||
            fread(a->digits, v->patches, 1, a->masks) != 1) return spool_failed();
        fprintf(out, "%s[%lld,%.6g,%lld,", k ? ",\n" : "", (long long)e->image, (double)e->value,
                (long long)e->other);
        print_json(out, image_name(&v->s->data, (size_t)e->image));
        fprintf(out, ",\"%.*s\",[", (int)v->patches, a->digits);
        for (size_t p = 0; p < a->P; p++) {
            uint64_t patch = (uint64_t)a->patch[2 * p + 1] - v->first_patch;
            if (a->patch[2 * p] != e->image || patch >= v->patches) continue;
            fprintf(out, "%s%zu", comma, (size_t)patch);
            comma = ",";
        }
        fputs("]]", out);
    }
    putc(']', out);
    return SC_OK;
}

static int write_latents(atlas *a, FILE *out, size_t part) {
    fprintf(out, "atlas.part(%zu,[\n", part);
    for (size_t j = part * PART; j < a->n && j < (part + 1) * PART; j++) {
        if (j % PART) fputs(",\n", out);
        SC_TRY(write_latent(a, out, j));
    }
    fputs("]);\n", out);
    return SC_OK;
}

/* What the list and the scatter show; the class is the one with the largest share. */
static int write_numbers(atlas *a, FILE *out, size_t ignored) {
    static const struct { const char *name; int tensor; } numbers[] = {
        { "frequency", FREQUENCY }, { "mean", IMAGE_MEAN }, { "entropy", ENTROPY } };
    viewer *v = a->v;
    const sc_images *set = &v->s->data.set;
    fputs("atlas.open({\"name\":", out);
    print_json(out, base_name(v->s->sae[0].path));
    fprintf(out, ",\"images\":%zu,\"part\":%d,\"grid\":%zu,\n\"classes\":[", set->count, PART,
            v->s->data.grid);
    for (size_t c = 0; c < set->classes && set->class_name; c++) {
        fputs(c ? ",\n" : "", out);
        print_json(out, set->class_name[c]);
    }
    for (size_t i = 0; i < COUNT(numbers); i++) {
        fprintf(out, "],\n\"%s\":[", numbers[i].name);
        for (size_t j = 0; j < a->n; j++) {
            float value;
            SC_TRY(sc_tensor_floats(&v->stats, v->of[numbers[i].tensor], j, 1, &value));
            fprintf(out, "%s%.6g", j ? "," : "", (double)value);
        }
    }
    fputs("],\n\"class\":[", out);
    for (size_t j = 0; j < a->n; j++) {
        sc_top class;
        SC_TRY(read_top(v, j));
        top_classes(v, &class, 1);
        fprintf(out, "%s%lld", j ? "," : "", (long long)class.other);
    }
    fputs("]});\n", out);
    (void)ignored;
    return SC_OK;
}

static void write_page(FILE *out);               /* with its lines, at the end */

static int write_atlas(atlas *a) {
    char name[64];
    SC_TRY(list_uses(a));
    SC_TRY(look_at_images(a));
    for (size_t part = 0; part * PART < a->n; part++) {
        snprintf(name, sizeof name, "data/%zu.js", part);
        SC_TRY(save_file(a, name, write_latents, part));
    }
    return save_file(a, "data/latents.js", write_numbers, 0);
}

/* The page comes last: a folder that has one is whole. It is open from the first, lest two of us
 * should write into one folder. */
static int replace_atlas(atlas *a, const char *page) {
    sc_output out;
    SC_TRY(output_open(&out, page));
    int status = unlink(page) == 0 || errno == ENOENT ? write_atlas(a)
               : fail("%s: cannot be replaced: %s", page, strerror(errno));
    if (status == SC_OK) write_page(out.file);
    if (status == SC_OK) return output_commit(&out);
    output_discard(&out);
    return status;
}

static int show_atlas(viewer *v) {
    char page[MAX_PATH], data[MAX_PATH];
    atlas a = { .v = v, .n = 0 };
    v->kind = VALUE_MASK;
    SC_TRY(open_viewer(v, 1));
    SC_TRY(join_path(v->s->o->output, "index.html", page));
    SC_TRY(join_path(v->s->o->output, "data", data));
    a.n = v->s->sae[0].d_sae;
    a.K = v->of[TOP_IMAGES]->shape[1];
    a.P = v->of[TOP_PATCHES]->shape[1];
    a.masks = v->s->spool[0] = tmpfile();
    if (!a.masks) return spool_failed();
    if (mkdir(data, 0777) != 0 && errno != EEXIST)
        return fail("%s: the folder cannot be made: %s", data, strerror(errno));
    int status = replace_atlas(&a, page);
    if (status != SC_OK) rmdir(data);                        /* goes only if it is empty */
    return status;
}

static int command_atlas(session *s) { return look(s, show_atlas); }

/* ============================================================================================
 * 24. Tools
 *
 * `info` says what a file or this machine is, `compare` how far apart two files are.
 * ============================================================================================ */

/* Sizes or an index, "192 x 12288" or "3, 4". */
static const char *join_sizes(const size_t *sizes, int count, const char *between) {
    char *out = strcpy(text_room(), count ? "" : "scalar");
    for (int d = 0, used = 0; d < count; d++)
        used += sprintf(out + used, "%s%zu", d ? between : "", sizes[d]);
    return out;
}

/* --- info --- */

/* A file is of the first kind whose tensor it has, of that rank; its shape says the rest. */
static const struct { const char *tensor; int rank; const char *text; } file_kinds[] = {
    { "W_enc_m", 2, "checkpoint of a training: %zu latents, %zu inputs\n" },
    { "W_enc", 2, "sparse autoencoder: %zu inputs, %zu latents\n" },
    { "max_activating_image_indices", 2, "statistics: %zu latents, %zu top images each\n" },
    { "activations", 3, "activations: %zu images, %zu tokens each, %zu numbers each\n" },
    { "images", 4, "packed images: %zu images, %zu high, %zu wide, %zu colours\n" },
    { "value", 1, "codes: %zu activations that are not 0\n" } };

static void describe(const sc_safetensors *file) {
    sc_model m;
    for (size_t i = 0; i < COUNT(file_kinds); i++) {
        const sc_tensor *t = sc_tensor_find(file, file_kinds[i].tensor);
        if (!t || t->rank != file_kinds[i].rank) continue;
        printf(file_kinds[i].text, t->shape[0], t->shape[1], t->shape[2], t->shape[3]);
        return;
    }
    if (naming_of(file) == NAMINGS) puts("a safetensors file of a kind that is not known");
    else if (sc_model_open(&m, file->path, NULL) != SC_OK)
        printf("vision transformer that cannot be used: %s\n", shown(sc_error()));
    else {
        printf("vision transformer, %s's names: %zu blocks, width %zu, %zu heads, hidden %zu, "
               "images of %zu x %zu in %zu x %zu patches of %zu x %zu, %s GELU, epsilon %g%s\n",
               naming_names[m.naming], m.blocks, m.width, m.heads, m.hidden, m.image_size,
               m.image_size, m.grid, m.grid, m.patch, m.patch,
               m.activation == QUICK_GELU ? "quick" : "exact", (double)m.epsilon,
               find_layer(&m, HEAD, 0, 0) ? ", with a head" : "");
        sc_model_close(&m);
    }
}

static int describe_file(const char *path) {
    sc_safetensors file;
    SC_TRY(sc_safetensors_open(&file, path));
    printf("%s: ", shown(path));
    describe(&file);
    printf("%zu tensors in %zu bytes\n", file.tensors, file.size);
    for (size_t i = 0; i < file.tensors; i++) {
        const sc_tensor *t = &file.tensor[i];
        printf("    %-48s %-5s %-20s %12zu bytes\n", shown(t->name), sc_dtype_name(t->dtype),
               join_sizes(t->shape, t->rank, " x "), t->bytes);
    }
    printf("%zu entries of metadata\n", file.entries);
    for (size_t i = 0; i < file.entries; i++)
        printf("    %s = %s\n", shown(file.metadata[i].key), shown(file.metadata[i].value));
    sc_safetensors_close(&file);
    return end_of_output();
}

static int command_info(session *s) {
    if (s->o->operand[0]) return describe_file(s->o->operand[0]);
    printf("saeclip %s\ninstruction sets:", SC_VERSION);
    for (size_t i = 0; i < COUNT(instruction_sets); i++)
        if (instruction_sets[i].usable())
            printf(" %s%s", instruction_sets[i].set->name,
                   instruction_sets[i].set == kernels ? " (in use)" : "");
    printf("\nthreads: %d of %ld processors\n", thread_count(), sysconf(_SC_NPROCESSORS_ONLN));
    return end_of_output();
}

/* --- compare --- */

/* Element i, also infinite ones and NaN; whole ones exactly in *whole. */
static double number_at(const sc_tensor *t, size_t i, int64_t *whole) {
    const unsigned char *bytes = t->data + i * sc_dtype_size(t->dtype);
    double number = 0;
    float single = 0;
    int32_t narrow = 0;
    switch (t->dtype) {
    case SC_F64: copy_numbers(&number, bytes, 1, 8); return number;
    case SC_I64: copy_numbers(whole, bytes, 1, 8); return (double)*whole;
    case SC_I32: copy_numbers(&narrow, bytes, 1, 4); return (double)(*whole = narrow);
    case SC_U8: return (double)(*whole = *bytes);
    default: floats_of_bytes(&single, bytes, 1, t->dtype); return (double)single;
    }
}

/* |a - b| of element i, infinite where that is no number; b in *y. */
static double distance_at(const sc_tensor *a, const sc_tensor *b, size_t i, double *y) {
    int64_t p = 0, q = 0;
    if (a->dtype > SC_U8 || b->dtype > SC_U8) return INFINITY;     /* types not read as numbers */
    double x = number_at(a, i, &p);
    *y = number_at(b, i, &q);
    if (a->dtype > SC_F64 && b->dtype > SC_F64)
        return (double)(p > q ? (uint64_t)p - (uint64_t)q : (uint64_t)q - (uint64_t)p);
    if (x == *y || (isnan(x) && isnan(*y))) return 0;
    return isfinite(x - *y) ? fabs(x - *y) : INFINITY;
}

/* at: an element's number in the tensor. */
static const char *index_text(const sc_tensor *t, size_t at) {
    size_t index[SC_MAX_RANK] = { 0 };
    for (int d = t->rank - 1; d >= 0; at /= t->shape[d--]) index[d] = at % t->shape[d];
    return join_sizes(index, t->rank, ", ");
}

/* The largest |a - b| and, where b is not 0, |a - b| / |b|, of two tensors of one shape. Returns
 * whether some are beyond the tolerance. */
static int compare_numbers(const sc_tensor *a, const sc_tensor *b, const options *o) {
    size_t size = sc_dtype_size(a->dtype), beyond = 0, at[2] = { 0 };
    double largest[2] = { 0 };
    int same_type = a->dtype == b->dtype, same_bits = same_type;
    for (size_t i = 0; i < a->count; i++) {
        double y = 0;
        if (same_type && memcmp(a->data + i * size, b->data + i * size, size) == 0) continue;
        double apart = distance_at(a, b, i, &y);
        double figure[] = { apart, apart == INFINITY ? apart : y != 0 ? apart / fabs(y) : 0 };
        same_bits = 0;
        beyond += apart == INFINITY || apart > o->atol + o->rtol * fabs(y);
        for (int k = 0; k < 2; k++) {
            if (figure[k] > largest[k]) at[k] = i;
            if (figure[k] > largest[k]) largest[k] = figure[k];
        }
    }
    if (largest[0] == 0) puts(same_bits ? "the same bits" : "equal, in other bits");
    else printf("%zu of %zu beyond the tolerance, |a - b| up to %.9g at [%s], |a - b| / |b| up to "
                "%.9g at [%s]\n", beyond, a->count, largest[0], index_text(a, at[0]), largest[1],
                index_text(a, at[1]));
    return beyond > 0;
}

/* A row of the table. Returns whether the tensors differ. */
static int compare_tensors(const sc_tensor *a, const sc_tensor *b, const options *o) {
    printf("%-40s %s", shown(a->name), sc_dtype_name(a->dtype));
    if (a->dtype != b->dtype) printf(" and %s", sc_dtype_name(b->dtype));
    printf(", %s: ", join_sizes(a->shape, a->rank, " x "));
    if (a->rank == b->rank && memcmp(a->shape, b->shape, sizeof a->shape) == 0)
        return compare_numbers(a, b, o);
    printf("the other is %s\n", join_sizes(b->shape, b->rank, " x "));
    return 1;
}

/* Metadata that differ are named, but not counted. */
static int compare_files(const sc_safetensors *file, const options *o) {
    int differing = 0, rows = 0;
    for (int k = 0; k < 2; k++)              /* of the second file, what the first has not got */
        for (size_t i = 0; i < file[k].tensors; i++) {
            const sc_tensor *t = &file[k].tensor[i], *other = sc_tensor_find(&file[!k], t->name);
            if (other && k == 1) continue;
            if (!other) printf("%-40s only in %s\n", shown(t->name), shown(file[k].path));
            differing += other ? compare_tensors(t, other, o) : 1;
            rows++;
        }
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < file[k].entries; i++) {
            const char *key = file[k].metadata[i].key, *value[2];
            for (int f = 0; f < 2; f++) value[f] = sc_metadata_find(&file[f], key);
            if (value[!k] && (k == 1 || strcmp(value[0], value[1]) == 0)) continue;
            printf("metadata %s: %s and %s\n", shown(key), value[0] ? shown(value[0]) : "nothing",
                   value[1] ? shown(value[1]) : "nothing");
        }
    SC_TRY(end_of_output());
    if (differing == 0) return SC_OK;
    return fail("%s: differs from %s in %d of %d tensors", file[0].path, file[1].path, differing,
                rows);
}

static int command_compare(session *s) {
    sc_safetensors file[2];
    SC_TRY(sc_safetensors_open(&file[0], s->o->operand[0]));
    int status = sc_safetensors_open(&file[1], s->o->operand[1]);
    if (status == SC_OK) status = compare_files(file, s->o);
    for (int k = 0; k < 2; k++) sc_safetensors_close(&file[k]);
    return status;
}

/* ============================================================================================
 * 25. The command line
 *
 * One table of options, one of commands. An option's row says which commands take it.
 * ============================================================================================ */
#ifndef SAECLIP_NO_MAIN

enum {                               /* commands, and what several of them have in common */
    INFO = 1, PACK = 2, EXTRACT = 4, TRAIN = 8, ENCODE = 16, EVAL = 32, STATS = 64, TOP = 128,
    MASK = 256, ZEROSHOT = 512, COMPARE = 1024,
    MERGE = 4096, EXPLAIN = 8192, PLOT = 16384, ATLAS = 32768, EVERY = 65535,
    LATENTS = TOP | MASK, LOOKS = LATENTS | EXPLAIN | ATLAS,
    SAES = ENCODE | EVAL | STATS | LOOKS | ZEROSHOT,
    DATA = TRAIN | ENCODE | EVAL | STATS, ACTS = DATA | MASK,
    PHOTOS = DATA | EXTRACT | LOOKS | ZEROSHOT, PICTURES = PHOTOS | PACK,
    OUTPUT = LOOKS | PACK | EXTRACT | TRAIN | ENCODE | STATS | PLOT | MERGE
};

/* A WHOLE number is kept as a long, a LARGE one, which may need more than 32 bits, as a double. */
typedef enum { FLAG, TEXT, TEXTS, CHOICE, WHOLE, LARGE, NUMBER } option_kind;

/* value: what it is called in help, of a CHOICE what it may be; least, most: of numbers. */
static const struct option_row {
    const char *name, *value;
    option_kind kind;
    size_t place;
    int commands;
    const char *help, *fallback;
    double least, most;
} option_table[] = {
#define AT(field) .place = offsetof(options, field)
#define OVER "overrules the model's "
#define LIVE "; no effect with --acts"       /* where there is such an option */
    { "-m", "FILE", TEXT, AT(model), PHOTOS, "the vision transformer" },
    { "-s", "FILE", TEXTS, AT(sae), SAES & ~(EVAL | ZEROSHOT), "the SAE" },
    { "-s", "FILE", TEXTS, AT(sae), EVAL, "an SAE; as many as wanted" },
    { "-s", "FILE", TEXTS, AT(sae), ZEROSHOT, "an SAE, whose x' takes x's place" },
    { "-t", "FILE", TEXT, AT(stats), LOOKS & ~MASK, "the SAE's statistics" },
    { "-t", "FILE", TEXT, AT(stats), MASK, "the SAE's statistics; no effect without --mask top" },
    { "-o", "PATH", TEXT, AT(output), OUTPUT, "where to write" },
    { "-l", "J[,J...]", TEXT, AT(latents), LATENTS, "latents" },
    { "--acts", "FILE", TEXT, AT(acts), ACTS, "saved activations, not -m and IMAGES" },
    { "--also", "DATA", TEXT, AT(also), EVAL, "a second data set of the same kind" },
    { "--layer", "L", WHOLE, AT(layer), PHOTOS,
      "block, from 1; -1 is the last (default: the SAE's, else -2)", NULL, -100000, 100000 },
    { "--hook", "attn|mlp|resid", CHOICE, AT(hook), PHOTOS,
      "where to listen (default: the SAE's, else mlp)" },
    { "--tokens", "all|cls|patches", CHOICE, AT(tokens), EXTRACT, "tokens to write", "all" },
    { "--dtype", "f32|f16", CHOICE, AT(dtype), EXTRACT, "number type", "f32" },
    { "--size", "S", WHOLE, AT(size), PACK, "the pictures' side", "224", 1, 16384 },
    { "--square", "N", WHOLE, AT(square), PICTURES, "first resize the centre square to N x N" LIVE,
      NULL, 1, 16384 },
    { "--crop", "torchvision|hf", CHOICE, AT(crop), PICTURES,
      "the centre crop's rounding" LIVE, "torchvision" },
    { "--limit", "N", WHOLE, AT(limit), PICTURES, "first N images", NULL, 1, 2e9 },
    { "--skip-bad", NULL, FLAG, AT(skip_bad), PICTURES & ~(TOP | EXPLAIN | ATLAS),
      "name bad images and go on" LIVE },
    { "--mean", "R,G,B", TEXT, AT(settings.mean), PHOTOS & ~ENCODE, OVER "image_mean" LIVE },
    { "--std", "R,G,B", TEXT, AT(settings.std), PHOTOS, OVER "image_std" LIVE },
    { "--gelu", "quick|erf", CHOICE, AT(settings.gelu), PHOTOS, OVER "activation" LIVE },
    { "--eps", "X", TEXT, AT(settings.epsilon), PHOTOS, OVER "layer norm epsilon" LIVE },
    { "--heads", "N", TEXT, AT(settings.heads), PHOTOS, OVER "attention heads" LIVE },
    { "--arch", "relu|topk", CHOICE, AT(arch), TRAIN | SAES, "by default relu, or the file's" },
    { "--k", "K", WHOLE, AT(k), TRAIN | SAES,
      "TopK's k (default: 32, or the file's); no effect with relu", NULL, 1, 1e9 },
    { "--expansion", "E", WHOLE, AT(expansion), TRAIN,
      "latents a dimension; no effect with --latents", "64", 1, 65536 },
    { "--latents", "N", WHOLE, AT(d_sae), TRAIN, "latents", NULL, 1, SC_MAX_LATENTS },
    { "--l1", "X", NUMBER, AT(l1), TRAIN, "weight of ReLU's L1 loss; no effect with topk", "8e-5",
      0, 1e9 },
    { "--lr", "X", NUMBER, AT(lr), TRAIN, "learning rate", "4e-4", 0, 1e9 },
    { "--warmup", "STEPS", WHOLE, AT(warmup), TRAIN, "steps of rising rate", "500", 0, 1e9 },
    { "--batch", "IMAGES", WHOLE, AT(batch), TRAIN, "images a step", "16", 1, 1e9 },
    { "--epochs", "E", NUMBER, AT(epochs), TRAIN, "rounds over the data; no effect with a stream",
      "1", 0, 1e9 },
    { "--steps", "N", WHOLE, AT(steps), TRAIN, "steps (0: the initial SAE)", NULL, 0, 2e9 },
    { "--b-dec", "zeros|mean|geomedian|geomedian-images", CHOICE, AT(b_dec), TRAIN,
      "where the decoder's bias starts", "zeros" },
    { "--b-dec-images", "M", WHOLE, AT(b_dec_images), TRAIN,
      "images for that (default: a batch); no effect with zeros", NULL, 1, 1e9 },
    { "--ghost", NULL, FLAG, AT(ghost), TRAIN, "ghost gradients for dead latents" },
    { "--dead-window", "STEPS", WHOLE, AT(dead_window), TRAIN,
      "silent steps after which a latent is dead; no effect without --ghost", "64", 0, 1e9 },
    { "--init", "SAE", TEXT, AT(init), TRAIN, "start from this SAE" },
    { "--order", "shuffle|sequential", CHOICE, AT(order), TRAIN, "of the images", "shuffle" },
    { "--log", "CSV", TEXT, AT(log), TRAIN, "a row a step" },
    { "--checkpoint", "FILE", TEXT, AT(checkpoint), TRAIN, "state to keep (default: OUT.ckpt)" },
    { "--checkpoint-every", "STEPS", WHOLE, AT(checkpoint_every), TRAIN,
      "no effect without --checkpoint or --resume", "1000", 1, 2e9 },
    { "--resume", NULL, FLAG, AT(resume), TRAIN, "go on from the checkpoint" },
    { "--dense", NULL, FLAG, AT(dense), ENCODE, "also f in full" },
    { "--reconstruction", NULL, FLAG, AT(reconstruction), ENCODE, "also x'" },
    { "--mean", NULL, FLAG, AT(image_means), ENCODE, "also images' mean activations" },
    { "--top", "K", WHOLE, AT(top), STATS, "top images a latent", "16", 1, 4096 },
    { "--top-patches", "P", WHOLE, AT(top_patches), STATS, "top patches", "64", 1, 65536 },
    { "--class-counts", NULL, FLAG, AT(class_counts), STATS, "firing images by class" },
    { "--threshold", "T", NUMBER, AT(threshold), STATS,
      "count tokens above T instead; no effect without --class-counts", NULL, 0, 1e30 },
    { "--shard", "I/N", TEXT, AT(shard), STATS, "only part I, from 1, of N, for merge" },
    { "--mask", "value|top", CHOICE, AT(mask), LATENTS, "where it fires, or its top patches" },
    { "--class", "C", WHOLE, AT(class_index), MASK, "the mean mask of a class", NULL, 0, 1e9 },
    { "--patch", "R,C", TEXT, AT(patch), EXPLAIN, "only this patch; row and column from 0" },
    { "--max-frequency", "F", NUMBER, AT(max_frequency), EXPLAIN,
      "leave out latents that fire on a larger share of the images", "1", 0, 1 },
    { "--rtol", "X", NUMBER, AT(rtol), COMPARE, "relative tolerance", "0", 0, 1e30 },
    { "--atol", "X", NUMBER, AT(atol), COMPARE, "absolute tolerance", "0", 0, 1e30 },
    { "--format", "text|markdown|csv|json", CHOICE, AT(format), EVAL | EXPLAIN, "how to print",
      "text" },
    { "--format", "text|csv|json", CHOICE, AT(format), ZEROSHOT, "how to print", "text" },
    { "--seed", "N", LARGE, AT(seed), EVERY, "train's; no effect elsewhere", "42", 0, 0x1p53 - 1 },
    { "--threads", "N", WHOLE, AT(threads), EVERY,
      "default: all cores; no effect with merge, plot, compare", NULL, 1, SC_MAX_THREADS },
    { "--quiet", NULL, FLAG, AT(quiet), EVERY, "no progress, no remarks" } };

enum { OPTIONS = COUNT(option_table) };
_Static_assert(OPTIONS <= 64, "options.given has a bit for each");

/* The options in a synopsis must be given; least, most: operands. */
static const struct command_row {
    int bit;
    const char *name, *synopsis, *help, *example;
    int (*run)(session *s), least, most;
} command_table[] = {
    { INFO, "info", "[FILE]", "what a file is; without one: the machine",
      "clip.safetensors", command_info, 0, 1 },
    { PACK, "pack", "IMAGES -o SET", "decodes and resizes images once",
      "--square 256 photos -o photos.safetensors", command_pack, 1, 1 },
    { EXTRACT, "extract", "-m MODEL IMAGES -o ACTS", "activations at a hook point",
      "-m clip.safetensors --layer 11 photos -o acts.safetensors", command_extract, 1, 1 },
    { TRAIN, "train", "DATA -o SAE", "trains a sparse autoencoder",
      "-m clip.safetensors photos --arch topk -o topk.safetensors", command_train, 0, 1 },
    { ENCODE, "encode", "-s SAE DATA -o CODES", "codes as (row, index, value) lists",
      "-s sae.safetensors -m clip.safetensors photos -o codes", command_encode, 0, 1 },
    { EVAL, "eval", "-s SAE ... DATA [--also DATA]", "figures, a row an SAE and data set",
      "-s relu.safetensors -s topk.safetensors -m clip.safetensors photos", command_eval, 0, 1 },
    { STATS, "stats", "-s SAE DATA -o STATS", "what every latent does over a data set",
      "-s sae.safetensors -m clip.safetensors photos -o stats.safetensors", command_stats, 0, 1 },
    { MERGE, "merge", "STATS ... -o STATS", "joins the statistics of all shards of a data set",
      "first.safetensors second.safetensors -o both.safetensors", command_merge, 1, MAX_OPERANDS },
    { TOP, "top", "-s SAE -t STATS -m MODEL IMAGES -l J -o DIR",
      "latents' top images; the model's options and --k: no effect without --mask value",
      "-s sae.safetensors -t stats.safetensors -m clip.safetensors photos -l 7,12 -o sheets",
      command_top, 1, 1 },
    { MASK, "mask", "-s SAE DATA -l J -o DIR", "where a latent fires: PGM masks, PPM overlays",
      "-s sae.safetensors -m clip.safetensors photo.jpg -l 7 -o masks", command_mask, 0, 1 },
    { PLOT, "plot", "KIND FILE ... -o SVG",
      "figures: curves of logs; latents, activations, counts of STATS; mask of PGMs",
      "latents stats.safetensors -o latents.svg", command_plot, 2, MAX_OPERANDS },
    { EXPLAIN, "explain", "-s SAE -m MODEL -t STATS IMAGE", "the strongest latents of an image",
      "-s sae.safetensors -m clip.safetensors -t stats.safetensors photo.jpg --patch 7,7 -o masks",
      command_explain, 1, 1 },
    { ATLAS, "atlas", "-s SAE -t STATS -m MODEL IMAGES -o DIR",
      "pages to browse the latents: DIR/index.html",
      "-s sae.safetensors -t stats.safetensors -m clip.safetensors photos -o atlas",
      command_atlas, 1, 1 },
    { ZEROSHOT, "zeroshot", "-m MODEL IMAGES", "top-1 and top-5, by head or text embeddings",
      "-m vit.safetensors photos.txt", command_zeroshot, 1, 1 },
    { COMPARE, "compare", "A B", "two safetensors files, tensor by tensor",
      "--rtol 1e-5 mine.safetensors theirs.safetensors", command_compare, 2, 2 } };

static int print_help(void) {
    puts("saeclip: sparse autoencoders on a vision transformer's activations\n\n"
         "    saeclip COMMAND [options] [IMAGES or FILE ...]\n");
    for (size_t i = 0; i < COUNT(command_table); i++)
        printf("    %-9s %s\n", command_table[i].name, command_table[i].help);
    puts("\nIMAGES: a folder (of folders, one a class), a list (.txt), a packed set (.safetensors),"
         "\none image, or - for PNM pictures on standard input.\n"
         "saeclip COMMAND --help tells more. SAECLIP_ISA and SAECLIP_DECODER are in the README.");
    return end_of_output();
}

static int print_command_help(const struct command_row *command) {
    printf("saeclip %s %s\n\n%s\n\n", command->name, command->synopsis, command->help);
    for (const struct option_row *row = option_table; row < option_table + OPTIONS; row++) {
        const char *value = row->kind == CHOICE ? "KIND" : row->value ? row->value : "";
        const char *live = command->bit & ACTS ? NULL : strstr(row->help, LIVE);
        int length = live ? (int)(live - row->help) : (int)strlen(row->help);
        if (!(row->commands & command->bit)) continue;
        printf("    %s %-*s %.*s", row->name, 23 - (int)strlen(row->name), value, length,
               row->help);
        if (row->kind == CHOICE) printf(": %s", row->value);
        if (row->fallback) printf(" (default %s)", row->fallback);
        puts("");
    }
    printf("\nexample: saeclip %s %s\n", command->name, command->example);
    return end_of_output();
}

static int is_choice(const char *choices, const char *text) {
    for (size_t n; *choices; choices += n + (choices[n] == '|')) {
        n = strcspn(choices, "|");
        if (n == strlen(text) && memcmp(choices, text, n) == 0) return 1;
    }
    return 0;
}

/* Puts an option's value where it belongs; text NULL: there is none. */
static int set_option(options *o, const struct option_row *row, const char *text) {
    void *place = (char *)o + row->place;
    double number;
    if (row->kind == FLAG) *(int *)place = 1;
    if (row->kind == FLAG) return SC_OK;
    if (!text || !*text) return usage("%s: a value %s was expected", row->name, row->value);
    if (row->kind == CHOICE && !is_choice(row->value, text))
        return usage("%s: '%s' is none of %s", row->name, text, row->value);
    if (row->kind == TEXTS && o->saes == SC_MAX_TAPS)
        return usage("%s: more than %d were given", row->name, SC_MAX_TAPS);
    if (row->kind == TEXTS) o->sae[o->saes++] = text;
    if (row->kind == TEXT || row->kind == CHOICE) *(const char **)place = text;
    if (row->kind <= CHOICE) return SC_OK;
    SC_TRY(parse_number(text, row->name, row->least, row->most, &number));
    if (row->kind != NUMBER && number != floor(number))
        return usage("%s: '%s' is no whole number", row->name, text);
    if (row->kind == WHOLE) *(long *)place = (long)number;
    else *(double *)place = number;
    return SC_OK;
}

static int was_given(const options *o, const char *name) {
    int given = 0;
    for (size_t i = 0; i < OPTIONS; i++)
        given |= strcmp(option_table[i].name, name) == 0 && (o->given >> i & 1);
    return given;
}

/* One argument that begins with -, and its value. */
static int parse_option(options *o, const struct command_row *command, char **argv, int *at) {
    const char *name = argv[*at], *equals = name[1] == '-' ? strchr(name, '=') : NULL;
    size_t length = equals ? (size_t)(equals - name) : strlen(name), i = 0;
    while (i < OPTIONS && (strncmp(option_table[i].name, name, length) != 0
                           || option_table[i].name[length] != '\0'
                           || !(option_table[i].commands & command->bit))) i++;
    if (i == OPTIONS)
        return usage("%s takes no option %s (saeclip %s --help)", command->name, name,
                     command->name);
    const struct option_row *row = &option_table[i];
    if (row->kind == FLAG && equals) return usage("%s takes no value", row->name);
    if ((o->given >> i & 1) && row->kind != TEXTS) return usage("%s was given twice", row->name);
    o->given |= (uint64_t)1 << i;
    if (row->kind == FLAG || equals) return set_option(o, row, equals ? equals + 1 : NULL);
    return set_option(o, row, argv[*at + 1] ? argv[++*at] : NULL);
}

/* Whether two paths lead to one regular file, or will when it is made. */
static int same_file(const char *a, const char *b) {
    char folder[2][MAX_PATH];
    struct stat at[2];
    int there = stat(a, &at[0]) == 0, other = stat(b, &at[1]) == 0;
    if (there != other || (there && !S_ISREG(at[0].st_mode))) return 0;
    for (int i = 0; i < 2 && !there; i++) {
        const char *path = i ? b : a, *name = base_name(path);
        snprintf(folder[i], MAX_PATH, "./%.*s.", (int)(name - path), path);
        if (stat(folder[i] + (*path == '/' ? 2 : 0), &at[i]) != 0) return 0;
    }
    return at[0].st_ino == at[1].st_ino && at[0].st_dev == at[1].st_dev &&
           (there || strcmp(base_name(a), base_name(b)) == 0);
}

/* Outputs of training must be files of their own; the log, which is not replaced but written over,
 * no input either. */
static int check_outputs(const options *o) {
    const char *outputs[] = { o->output, o->log, o->checkpoint };
    const char *inputs[] = { o->model, o->acts, o->init, o->operand[0] };
    for (int i = 0; i < 3; i++)
        if (outputs[i] && outputs[(i + 1) % 3] && same_file(outputs[i], outputs[(i + 1) % 3]))
            return usage("%s was given for two outputs", outputs[i]);
    for (size_t i = 0; i < COUNT(inputs) && o->log; i++)
        if (inputs[i] && same_file(o->log, inputs[i]))
            return usage("--log %s is an input, expected another file", o->log);
    return SC_OK;
}

/* What options and operands a command cannot do without, or not together. */
static int check_options(const options *o, const struct command_row *command, int operands) {
    static const char *const apart[][2] = {
        { "--init", "--expansion" }, { "--init", "--latents" }, { "--init", "--b-dec" },
        { "--steps", "--epochs" }, { "--square", "--size" } };
    const char *name = command->name;
    for (const char *c = command->synopsis; (c = strchr(c, '-')) != NULL; c++)
        if (c[2] == ' ' && !was_given(o, (char[]){ '-', c[1], '\0' }))
            return usage("%s: -%c is missing (saeclip %s --help)", name, c[1], name);
    for (size_t i = 0; i < COUNT(apart); i++)
        if (was_given(o, apart[i][0]) && was_given(o, apart[i][1]))
            return usage("%s and %s exclude each other", apart[i][0], apart[i][1]);
    if (operands < command->least || operands > command->most)
        return usage("%s: %s was expected", name, command->synopsis);
    if (o->acts && (operands || o->model))
        return usage("--acts and -m MODEL IMAGES exclude each other");
    if ((command->bit & (TOP | ATLAS)) && strcmp(o->operand[0], "-") == 0)
        return usage("%s picks images: a stream has no choice of them", name);
    if (o->saes > 1 && command->bit != EVAL) return usage("%s takes one SAE: -s FILE", name);
    if (command->bit == ZEROSHOT && !o->saes && (o->layer || o->hook || o->arch || o->k))
        return usage("zeroshot: --layer, --hook, --arch and --k are about an SAE: -s FILE");
    if (o->mask && strcmp(o->mask, "top") == 0 && !o->stats)
        return usage("--mask top needs the SAE's statistics: -t FILE");
    if (was_given(o, "--layer") && o->layer == 0)
        return usage("--layer: '0': blocks count from 1, or from -1 back from the last");
    return check_outputs(o);
}

/* argv ends with NULL. */
static int run_command(const struct command_row *command, char **argv) {
    options o = { .steps = -1, .threshold = -1, .class_index = -1 };     /* -1: not given */
    int operands = 0, plain = 0;
    for (const struct option_row *row = option_table; row < option_table + OPTIONS; row++)
        if (row->fallback) SC_TRY(set_option(&o, row, row->fallback));
    for (int i = 0; argv[i]; i++) {
        if (!plain && strcmp(argv[i], "--help") == 0) return print_command_help(command);
        if (!plain && strcmp(argv[i], "--") == 0) plain = 1;
        else if (!plain && argv[i][0] == '-' && argv[i][1])
            SC_TRY(parse_option(&o, command, argv, &i));
        else if (operands++ < MAX_OPERANDS) o.operand[operands - 1] = argv[i];
    }
    SC_TRY(check_options(&o, command, operands));
    quiet = o.quiet;
    SC_TRY(sc_instruction_set(getenv("SAECLIP_ISA")));
    SC_TRY(sc_threads_start((int)o.threads));
    session s = { .o = &o };
    int status = command->run(&s);
    close_session(&s);
    sc_threads_stop();
    return status;
}

static int run_saeclip(int argc, char **argv) {
    if (argc < 2) return usage("a command was expected (saeclip --help)");
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) return print_help();
    for (size_t i = 0; i < COUNT(command_table); i++)
        if (strcmp(argv[1], command_table[i].name) == 0)
            return run_command(&command_table[i], argv + 2);
    if (strcmp(argv[1], "--version") != 0)
        return usage("'%s' is no command (saeclip --help)", argv[1]);
    puts("saeclip " SC_VERSION);
    return end_of_output();
}

/* A standard stream that is closed stays unusable, instead of becoming the next file opened. */
static void hold_streams(void) {
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
}

/* For handlers: no half file stays, and no decoder. */
static void end_with_us(void) {
    for (size_t i = 0; i < COUNT(unfinished); i++) {
        const char *name = unfinished[i];
        if (name) unlink(name);
    }
    for (size_t i = 0; i < COUNT(children); i++) {
        pid_t child = children[i];
        if (child > 0) kill(-child, SIGKILL);
    }
}

/* The first of the threads that meet the end of a file says so; the others wait for the exit. */
static void on_bus_error(int number, siginfo_t *info, void *context) {
    static atomic_flag told = ATOMIC_FLAG_INIT;
    uintptr_t at = (uintptr_t)info->si_addr;
    (void)context;
    for (size_t i = 0; i < COUNT(maps); i++) {
        if (at - maps[i].begin >= maps[i].size) continue;
        while (atomic_flag_test_and_set(&told)) pause();
        const char *line = maps[i].line + !line_open;
        end_with_us();
        _exit(write(STDERR_FILENO, line, strlen(line)) < 0 ? SC_FAILED : SC_FAILED);
    }
    signal(number, SIG_DFL);         /* not in a file: it comes again, and ends us */
}

/* Asks training to stop, once; else ends us as it would have without us. */
static void on_end(int number) {
    if (may_stop && !stop_signal && number != SIGHUP) {
        stop_signal = number;
        return;
    }
    end_with_us();
    signal(number, SIG_DFL);
    raise(number);
}

int main(int argc, char **argv) {
    struct sigaction before, action = { .sa_handler = on_end, .sa_flags = SA_RESTART };
    for (size_t i = 0; i < COUNT(end_signals); i++)
        if (sigaction(end_signals[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(end_signals[i], &action, NULL);
    signal(SIGPIPE, SIG_IGN);                    /* writing fails instead, and says why */
    signal(SIGXFSZ, SIG_IGN);
    sigaction(SIGBUS, &(struct sigaction){ .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO },
              NULL);
    hold_streams();
    int status = run_saeclip(argc, argv);
    quiet = 0;                                   /* a failure is told in any case */
    if (status != SC_OK && *sc_error()) note("%s", sc_error());
    return status;
}

#endif /* !SAECLIP_NO_MAIN */

/* ============================================================================================
 * 26. The atlas's page
 *
 * HTML, CSS and JavaScript, line by line as index.html has them.
 * ============================================================================================ */

static const char *const atlas_page[] = {
    "<!DOCTYPE html>",
    "<html lang='en'>",
    "<head>",
    "<meta charset='utf-8'>",
    "<meta name='viewport' content='width=device-width, initial-scale=1'>",
    "<title>Atlas of latents</title>",
    "<style>",
    ":root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --soft: #666b73;",
    "        --line: #d9dce1; --mark: #0b57d0; --chosen: #e4edfb; }",
    "@media (prefers-color-scheme: dark) {",
    "    :root { --back: #15171a; --text: #e6e7e9; --soft: #9aa0a8; --line: #363a40;",
    "            --mark: #8ab4f8; --chosen: #22324c; }",
    "}",
    "* { box-sizing: border-box; }",
    "body { margin: 0; height: 100vh; display: grid; grid-template: auto 1fr / 440px 1fr;",
    "       font: 15px/1.4 system-ui, sans-serif; background: var(--back); color: var(--text); }",
    "header { grid-column: 1 / 3; padding: 10px 16px; border-bottom: 1px solid var(--line); }",
    "h1, h2 { display: inline; margin-right: 12px; font-size: 20px; }",
    "a { color: var(--mark); }",
    ".soft, figcaption span { color: var(--soft); }",
    "#choice { display: flex; flex-direction: column; min-height: 0; padding: 12px 16px;",
    "          border-right: 1px solid var(--line); }",
    "#scatter { width: 100%; height: 320px; flex: none; cursor: crosshair; }",
    ".row { display: grid; grid-template-columns: 54px 78px 66px 66px 1fr; gap: 6px; height: 28px;",
    "       padding: 3px 6px; color: inherit; text-decoration: none; text-align: right;",
    "       font-variant-numeric: tabular-nums; }",
    ".row > *, figcaption { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }",
    ".row > :last-child { text-align: left; }",
    "a.row:hover, .row.chosen { background: var(--chosen); }",
    ".row button { all: unset; cursor: pointer; color: var(--mark); }",
    ".row button.sorted { font-weight: bold; }",
    "#list { flex: 1; overflow-y: auto; position: relative; }",
    "#rows { position: absolute; width: 100%; }",
    "#view { overflow-y: auto; padding: 12px 16px; }",
    "#masks { display: flex; flex-wrap: wrap; gap: 6px 10px; padding: 8px 0; }",
    "#figures { display: grid; gap: 14px;",
    "           grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }",
    "figure { margin: 0; min-width: 0; }",
    ".picture { position: relative; aspect-ratio: 1; background: var(--line); }",
    ".picture > * { position: absolute; width: 100%; height: 100%; image-rendering: pixelated; }",
    ".picture > img { image-rendering: auto; }",
    "@media (max-width: 800px) {",
    "    body { display: block; }",
    "    #choice { border: 0; }",
    "    #scatter { height: 220px; }",
    "    .row { grid-template-columns: 42px 58px 62px 58px 1fr; font-size: 14px; }",
    "    #list { flex: none; height: 168px; }",
    "    #figures { grid-template-columns: repeat(3, 1fr); gap: 8px; }",
    "}",
    "</style>",
    "</head>",
    "<body>",
    "<header><h1>Atlas</h1><span id='about' class='soft'>needs JavaScript</span></header>",
    "<section id='choice'>",
    "<canvas id='scatter' role='img' aria-label='all latents'></canvas>",
    "<div class='row soft'><button value='index'>latent</button>",
    "<button value='frequency' title='share of the images on which it fires'>images</button>",
    "<button value='mean' title='mean activation over these images'>mean</button>",
    "<button value='entropy' title='of the classes of its top images'>entropy</button>",
    "<select id='class' aria-label='class'><option value=''>every class</option></select></div>",
    "<div id='list'><div id='space'></div><div id='rows'></div></div>",
    "</section>",
    "<main id='view'>",
    "<h2><a id='name'></a></h2><span id='facts' class='soft'></span>",
    "<div id='masks'>",
    "<button id='before' title='left arrow'>&#8592;</button>",
    "<button id='after' title='right arrow'>&#8594;</button>",
    "<label><input type='radio' name='mask' value='none'> pictures</label>",
    "<label><input type='radio' name='mask' value='value' checked> where it fires</label>",
    "<label><input type='radio' name='mask' value='top'> top patches</label>",
    "</div>",
    "<p id='classes'></p>",
    "<div id='figures'></div>",
    "</main>",
    "<script>",
    "'use strict';",
    "const ROW = 28, LEFT = 44, TOP = 34, RIGHT = 12, BOTTOM = 40;",
    "const $ = id => document.getElementById(id);",
    "let data, parts = {}, latent = -1, order = [], key = 'entropy', way = 1, x, y, highest;",
    "",
    "// What the scripts in data/ call: latents.js once, N.js when one of its latents is shown.",
    "const atlas = {",
    "    open(all) {",
    "        data = all;",
    "        data.index = data.frequency.map((f, j) => j);",
    "        $('about').textContent = data.name + ': ' + data.index.length.toLocaleString() +",
    "            ' latents, ' + data.images.toLocaleString() + ' images';",
    "        for (const [name, c] of [...new Set(data.class)].map(c => [nameOf(c), c]).sort())",
    "            if (c >= 0) make('option', $('class'), { textContent: name, value: c });",
    "        const live = data.index.filter(j => data.frequency[j] > 0);",
    "        [x, y] = [axis(live, data.frequency), axis(live, data.mean)];",
    "        highest = live.reduce((most, j) => Math.max(most, data.entropy[j]), 0.1);",
    "        arrange();",
    "        follow();",
    "    },",
    "    part(number, latents) {",
    "        parts[number] = latents;",
    "        load(number);",
    "    }",
    "};",
    "",
    "function make(tag, parent, properties) {",
    "    return parent.appendChild(Object.assign(document.createElement(tag), properties));",
    "}",
    "",
    "function nameOf(c) { return c < 0 ? '' : data.classes[c] ?? 'class ' + c; }",
    "function digits(value) {",
    "    return value > 0 && value < 1e-3 ? value.toExponential(1) : Number(value.toPrecision(3));",
    "}",
    "function entropyOf(j) { return data.entropy[j] < 0 ? '-' : data.entropy[j].toFixed(2); }",
    "function percent(share) { return digits(100 * share) + ' %'; }",
    "",
    "// --- The list: of its rows only those in sight are there ---",
    "",
    "function arrange() {",
    "    const only = $('class').value, value = data[key];",
    "    const silent = j => data.frequency[j] === 0 || value[j] < 0;",
    "    order = data.index.filter(j => only === '' || data.class[j] === Number(only));",
    "    order.sort((a, b) => silent(a) - silent(b) || way * (value[a] - value[b]) || a - b);",
    "    for (const head of heads) head.className = head.value === key ? 'sorted' : '';",
    "    $('space').style.height = order.length * ROW + 'px';",
    "    reveal();",
    "}",
    "",
    "function reveal() {",
    "    const list = $('list'), top = order.indexOf(latent) * ROW;",
    "    if (top < list.scrollTop || top > list.scrollTop + list.clientHeight - ROW)",
    "        list.scrollTop = top - list.clientHeight / 2;",
    "    fill();",
    "    draw();",
    "}",
    "",
    "function fill() {",
    "    const list = $('list'), first = Math.floor(list.scrollTop / ROW);",
    "    $('rows').replaceChildren();",
    "    $('rows').style.top = first * ROW + 'px';",
    "    for (const j of order.slice(first, first + list.clientHeight / ROW + 2)) {",
    "        const className = j === latent ? 'row chosen' : 'row';",
    "        const row = make('a', $('rows'), { className, href: '#latent=' + j });",
    "        for (const textContent of [j, percent(data.frequency[j]), digits(data.mean[j]),",
    "                                   entropyOf(j), nameOf(data.class[j])])",
    "            make('span', row, { textContent });",
    "    }",
    "}",
    "",
    "// --- The scatter ---",
    "",
    "function axis(latents, values) {",
    "    const logs = latents.map(j => Math.log10(values[j]));",
    "    const low = logs.reduce((a, b) => Math.min(a, b), 0) - 0.1;",
    "    return { low, span: logs.reduce((a, b) => Math.max(a, b), low) + 0.1 - low };",
    "}",
    "",
    "// Where a latent's point is, in the canvas.",
    "function place(j) {",
    "    const width = $('scatter').clientWidth, bottom = $('scatter').clientHeight - BOTTOM;",
    "    const across = (Math.log10(data.frequency[j]) - x.low) / x.span;",
    "    const up = (Math.log10(data.mean[j]) - y.low) / y.span;",
    "    return [LEFT + across * (width - LEFT - RIGHT), bottom - up * (bottom - TOP)];",
    "}",
    "",
    "function colour(entropy) {",
    "    return entropy < 0 ? '#8a8f98' : 'hsl(' + (215 + 190 * entropy / highest) + ' 75% 55%)';",
    "}",
    "",
    "function draw() {",
    "    const canvas = $('scatter'), g = canvas.getContext('2d'), size = order[5000] ? 2 : 4;",
    "    canvas.width = canvas.clientWidth * devicePixelRatio;",
    "    canvas.height = canvas.clientHeight * devicePixelRatio;",
    "    g.scale(devicePixelRatio, devicePixelRatio);",
    "    drawAxes(g, getComputedStyle(document.body).color);",
    "    for (const j of order) {",
    "        const [left, top] = place(j);",
    "        g.fillStyle = colour(data.entropy[j]);",
    "        g.fillRect(left - size / 2, top - size / 2, size, size);",
    "    }",
    "    g.lineWidth = 2;",
    "    g.beginPath();",
    "    if (latent >= 0) g.arc(...place(latent), 7, 0, 7);",
    "    g.stroke();",
    "}",
    "",
    "function drawAxes(g, ink) {",
    "    const right = g.canvas.clientWidth - RIGHT, bottom = g.canvas.clientHeight - BOTTOM;",
    "    g.font = '12px system-ui, sans-serif';",
    "    g.fillStyle = g.strokeStyle = ink;",
    "    g.lineWidth = 0.5;",
    "    g.strokeRect(LEFT, TOP, right - LEFT, bottom - TOP);",
    "    g.fillText('log10 mean activation', 0, 14);",
    "    g.textAlign = 'center';",
    "    g.fillText('log10 frequency', (LEFT + right) / 2, bottom + 34);",
    "    ticks(x, (t, at) => g.fillText(t, LEFT + at * (right - LEFT), bottom + 16));",
    "    g.textAlign = 'right';",
    "    ticks(y, (t, at) => g.fillText(t, LEFT - 6, bottom - at * (bottom - TOP) + 4));",
    "    g.fillText('entropy 0', right - 104, 14);",
    "    g.fillText(highest.toFixed(1), right, 14);",
    "    for (let i = 0; i < 70; i++) {",
    "        g.fillStyle = colour(highest * i / 70);",
    "        g.fillRect(right - 98 + i, 6, 1, 8);",
    "    }",
    "}",
    "",
    "function ticks(range, label) {",
    "    const step = range.span > 2 ? 1 : range.span > 0.8 ? 0.5 : 0.1;",
    "    for (let t = Math.ceil(range.low / step); t * step <= range.low + range.span; t++)",
    "        label(Number((t * step).toFixed(1)), (t * step - range.low) / range.span);",
    "}",
    "",
    "$('scatter').onclick = event => {",
    "    let best = -1, least = 20 ** 2;",
    "    for (const j of order) {",
    "        const [left, top] = place(j);",
    "        const distance = (left - event.offsetX) ** 2 + (top - event.offsetY) ** 2;",
    "        if (distance < least) [best, least] = [j, distance];",
    "    }",
    "    if (best >= 0) location.hash = 'latent=' + best;",
    "};",
    "",
    "// --- One latent: the address names it ---",
    "",
    "function follow() {",
    "    const named = new URLSearchParams(location.hash.slice(1)).get('latent') ?? order[0];",
    "    if (!(Number(named) in data.index)) return tell('There is no latent ' + named + '.');",
    "    latent = Number(named);",
    "    $('name').textContent = document.title = 'Latent ' + latent;",
    "    $('name').href = '#latent=' + latent;",
    "    $('facts').textContent = data.frequency[latent] === 0 ? 'fires on no image' :",
    "        'fires on ' + percent(data.frequency[latent]) + ' of the images, mean activation ' +",
    "        digits(data.mean[latent]) + ', entropy ' + entropyOf(latent);",
    "    reveal();",
    "    load(Math.floor(latent / data.part));",
    "}",
    "",
    "function tell(what) {",
    "    $('classes').textContent = what;",
    "    $('figures').replaceChildren();",
    "}",
    "",
    "// A page from a file may not read files, but it may have scripts.",
    "function load(number) {",
    "    if (number !== Math.floor(latent / data.part)) return;",
    "    if (parts[number]) return show(parts[number][latent % data.part]);",
    "    if (Object.keys(parts).length > 16) parts = {};",
    "    const src = 'data/' + number + '.js';",
    "    make('script', document.head, { src, onload() { this.remove(); },",
    "                                    onerror() { tell(src + ' cannot be read.'); } });",
    "}",
    "",
    "function show(images) {",
    "    const shares = new Map(), total = images.reduce((sum, image) => sum + image[1], 0);",
    "    for (const image of images) shares.set(image[2], (shares.get(image[2]) ?? 0) + image[1]);",
    "    tell([...shares].filter(([c]) => c >= 0).sort((a, b) => b[1] - a[1]).slice(0, 6)",
    "        .map(([c, sum]) => nameOf(c) + ' ' + percent(sum / total)).join(', '));",
    "    for (const [number, activation, label, title, values, patches] of images) {",
    "        const figure = make('figure', $('figures'));",
    "        const picture = make('div', figure, { className: 'picture' });",
    "        make('img', picture, { src: 'data/' + number + '.jpg', alt: title });",
    "        make('canvas', picture, { title, width: data.grid, height: data.grid, strength: {",
    "            none: () => 1,",
    "            value: p => parseInt(values[p], 16) / 15,",
    "            top: p => Number(patches.includes(p))",
    "        } });",
    "        make('figcaption', figure, { textContent: digits(activation) + ' ' })",
    "            .append(make('span', figure, { textContent: nameOf(label) }));",
    "    }",
    "    paint();",
    "}",
    "",
    "// Darkens patches: silent ones (0) nearly black, the strongest (1) not at all.",
    "function paint() {",
    "    const kind = document.querySelector('[name=mask]:checked').value;",
    "    for (const canvas of document.querySelectorAll('.picture canvas')) {",
    "        const g = canvas.getContext('2d'), pixels = g.createImageData(data.grid, data.grid);",
    "        for (let p = 0; p < data.grid ** 2; p++) {",
    "            const strength = canvas.strength[kind](p);",
    "            pixels.data[4 * p + 3] = strength ? 110 * (1 - strength) : 225;",
    "        }",
    "        g.putImageData(pixels, 0, 0);",
    "    }",
    "}",
    "",
    "function step(by) {",
    "    const next = order[order.indexOf(latent) + by];",
    "    if (next !== undefined) location.replace('#latent=' + next);",
    "}",
    "",
    "const heads = document.querySelectorAll('.row button');",
    "for (const head of heads) head.onclick = () => {",
    "    way = key === head.value ? -way : 1;",
    "    key = head.value;",
    "    arrange();",
    "};",
    "$('class').onchange = arrange;",
    "$('list').onscroll = fill;",
    "$('masks').onchange = paint;",
    "$('before').onclick = () => step(-1);",
    "$('after').onclick = () => step(1);",
    "onkeydown = event => {",
    "    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];",
    "    if (!by || event.altKey || event.metaKey || event.target.matches('select')) return;",
    "    event.preventDefault();",
    "    step(by);",
    "};",
    "onhashchange = follow;",
    "onresize = () => { fill(); draw(); };",
    "matchMedia('(prefers-color-scheme: dark)').onchange = draw;",
    "</script>",
    "<script src='data/latents.js'></script>",
    "</body>",
    "</html>",
};

static void write_page(FILE *out) {
    for (size_t i = 0; i < COUNT(atlas_page); i++) fprintf(out, "%s\n", atlas_page[i]);
}

#endif /* !SC_ISA */
