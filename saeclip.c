/* saeclip: sparse autoencoders on a vision transformer's activations, in one C file.
 *
 * A vision transformer (CLIP ViT-B/16 and its kin) runs on images up to a hook point. A sparse
 * autoencoder (SAE) is trained on the activations of every token there. Then each of its latents is
 * measured and shown: how often it fires, how strongly, on which images, patches and classes. The
 * method is PatchSAE's (Lim et al., ICLR 2025). There are no dependencies. The order of each sum is
 * defined (section 1), so that every machine, compiler and number of threads gives the same bits.
 *
 *  Part I: the method                        line 87: read this; about 1570 lines
 *    1. Numbers                           2. The vision transformer
 *    3. The sparse autoencoder            4. Training
 *    5. Measuring
 *  Part II: the same, fast                   line 1655
 *    6. Errors and memory                 7. Threads
 *    8. Kernels and matrix products       9. The vision transformer, fast
 *   10. Sparse codes                     11. Training steps
 *   12. Counting
 *  Part III: data in and out                 line 3800
 *   13. Options and messages             14. Files
 *   15. Images and data sets             16. Models' files
 *   17. SAEs' files                      18. Activations
 *  Part IV: the program                      line 6467
 *   19. Training runs                    20. Data sets through SAEs
 *   21. Looking                          22. Figures
 *   23. The atlas                        24. Info and compare
 *   25. The command line
 *
 * For the algorithm alone read Part I. It needs nothing from the other parts but memory and error
 * messages. Parts II to IV do the same work fast, read and write files, and make up the program. */
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
#include <sched.h>
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
/* Part of each caller, so that those of section 8 compile it for their instruction set. */
#define SC_INLINE __attribute__((always_inline)) inline
#define SC_APART __attribute__((noinline))
#else
#define SC_PRINTF(text, first)
#define SC_INLINE inline
#define SC_APART
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
 * same bits faster, and the tests compare the two bit for bit (tests/test_plain.c).
 *
 * In short. A vision transformer turns an image into T tokens (a class token and the patches) and
 * passes them through blocks of attention and MLP. At a hook point, e.g. the output of the MLP of
 * block 11 (of 12, counted from 1), each token is a vector x of D numbers. An SAE has n >> D
 * latents. Only a few are active for a token, and x is rebuilt from these:
 *
 *     h  = W_enc^T (x - b_dec) + b_enc                           pre-activations, n numbers
 *     f  = relu(h)   or   relu of the k largest of h             activations (codes)
 *     x' = W_dec^T f + b_dec                                     reconstruction
 *
 * Training changes the four weights to minimise, on average over tokens,
 *
 *     loss = mean over d of (x'[d] - x[d])^2 / ||x||  +  lambda * sum_j f[j]  (+ the ghost loss)
 *
 * without the lambda term for TopK. Then each latent is described by the images and patches that
 * activate it most.
 *
 * Where these definitions differ from what you may expect:
 *   - "mse" is the mean of (x' - x)^2 / ||x||, as in PatchSAE. Divided by ||x||, not by its square,
 *     it grows with the scale of x. The plain mean of (x' - x)^2 is mse_raw, in eval.
 *   - "dead": in training, a latent that has been silent for more than dead_window steps; in
 *     evaluation, one that fires on no image of the data set.
 *   - TopK has at most k active latents per token: those of the k largest h that are positive.
 *   - rows of W_dec have norm 1 when a step begins, but not exactly when it ends, nor in a saved
 *     SAE. L1 is the sum of f alone, not of f times those norms.
 *   - explained variance is about the mean token; PatchSAE's does not subtract it ("uncentred").
 *   - a latent's mean activation is over the images on which it fires, not over all images.
 *   - the class token is trained on like the patches.
 *
 * Sources: Bricken et al., "Towards monosemanticity", 2023 (ReLU SAE); Gao et al., "Scaling and
 * evaluating sparse autoencoders", 2024 (TopK); Lim et al., "Sparse autoencoders reveal selective
 * remapping of visual concepts during adaptation", ICLR 2025 (PatchSAE), whose code is named by
 * file and function.
 * ******************************************************************************************** */

/* From section 6. A function that can fail returns SC_OK, or the status of fail() or usage(), which
 * keep the message; SC_TRY() passes it on. new_arrays() allocates arrays, all zero, that release()
 * frees together; first_not_finite() is `count` if all values are finite. */
SC_PRINTF(2, 3) static int set_error(int status, const char *format, ...);
#define fail(...) set_error(SC_FAILED, __VA_ARGS__)
#define usage(...) set_error(SC_USAGE, __VA_ARGS__)

typedef void *memory_list;
typedef struct {
    void *pointer;
    size_t rows, row_bytes;
} array_spec;
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
 * Melquiond, "Emulation of FMA and correctly rounded sums", 2008). `error` is exactly what `sum`
 * lacks; if it is not 0 and the last bit of `sum` is even, `sum` moves one unit towards it. */
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
            if ((error > 0) == (sum > 0)) bits++;
            else bits--;
        }
        memcpy(&sum, &bits, sizeof sum);
    }
    return (float)sum;
#endif
}

/* a, b: K values, a_step and b_step floats apart.
 * sum over k of a[k] b[k], in the order in which every element of a matrix product is summed: in
 * blocks of 256 terms, each a chain of fused multiply-adds that begins at 0; the chains are added
 * in order. With K = 600:
 *     ((0 + chain of terms 0 .. 255) + chain of 256 .. 511) + chain of 512 .. 599
 *
 * Why chains of 256? One long chain would round more, and the fast code can keep 256 rows of a
 * matrix in the nearest cache. Lanes of a vector and threads compute different elements and never
 * divide a chain, so vectors of any width give the same bits. A term with a factor 0 may be left
 * out (all values are finite): so code that skips inactive latents gives the same bits. */
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

/* a: [M, K]; b: [K, N]; bias: [N] and residual: [M, N], or NULL; c: [M, N].
 * c = a b + bias + residual + 0. Adding 0 at the end turns -0 into +0: whether a sum of zeros is -0
 * can depend on terms that were left out. Part I adds this 0 to all products of forward passes. */
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

/* p: [16]. Adds partial sums by halves: p[i] + p[i + 8], of these [i] + [i + 4], and so on. */
static SC_INLINE float join(const float *p) {
    float eight[8];
    float four[4];
    for (int i = 0; i < 8; i++) {
        eight[i] = p[i] + p[i + 8];
    }
    for (int i = 0; i < 4; i++) {
        four[i] = eight[i] + eight[i + 4];
    }
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* a, b: [n]. sum_e a[e] b[e] along a row: element e goes to partial sum e mod 16. 16 floats fill
 * one vector of AVX-512, two of AVX2 or four of NEON, so all of them compute the same 16 sums. */
float sc_dot_plain(const float *a, const float *b, size_t n) {
    float p[PARTIALS] = { 0 };
    for (size_t e = 0; e < n; e++) {
        p[e % PARTIALS] = fma32(a[e], b[e], p[e % PARTIALS]);
    }
    return join(p);
}

/* a: [n]. sum_e a[e], in the same order: groups of 16, then the rest. */
static SC_INLINE float row_sum(const float *a, size_t n) {
    float p[PARTIALS] = { 0 };
    size_t whole = n - n % PARTIALS;
    for (size_t e = 0; e < whole; e += PARTIALS) {
        for (size_t i = 0; i < PARTIALS; i++) {
            p[i] += a[e + i];
        }
    }
    for (size_t e = whole; e < n; e++) {
        p[e - whole] += a[e];
    }
    return join(p);
}

static SC_INLINE float larger(float a, float b) { return a > b ? a : b; }

/* a: [n]. The largest number of a row: of 16 interleaved ones, then of these and the rest. */
static SC_INLINE float row_max(const float *a, size_t n) {
    float most[PARTIALS];
    size_t whole = n - n % PARTIALS;
    for (size_t i = 0; i < PARTIALS; i++) {
        most[i] = a[0];
    }
    for (size_t e = 0; e < whole; e += PARTIALS) {
        for (size_t i = 0; i < PARTIALS; i++) {
            most[i] = larger(most[i], a[e + i]);
        }
    }
    for (size_t e = whole; e < n; e++) {
        most[0] = larger(most[0], a[e]);
    }
    for (size_t i = 1; i < PARTIALS; i++) {
        most[0] = larger(most[0], most[i]);
    }
    return most[0];
}

/* row: [n]. row / ||row||; a row of zeros is left as it is. */
static void unit_row(float *row, size_t n) {
    float norm = sqrtf(sc_dot_plain(row, row, n));
    if (norm > 0) {
        for (size_t e = 0; e < n; e++) {
            row[e] /= norm;
        }
    }
}

/* value: [n]. A sum over tokens in float64: each block of 256 in order, then the blocks' sums in
 * order. */
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

/* e^x within 1 unit in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, so e^x = 2^n e^r.
 * x is clipped to -104 .. 89 first, NaN too, which could not be converted to an integer; beyond,
 * e^x is 0 or infinity anyway. Floats order like their bits as integers, negative ones backwards.
 * n is rounded to an integer by adding 1.5 * 2^23. ln 2 is split into two parts, the first with 9
 * bits, so that n times it is exact. e^r is its Taylor polynomial of degree 7. 2^n is applied in
 * two factors, so that results below the normal range are rounded once. */
static SC_INLINE float exp32(float x) {
    const float magic = 12582912.0f;
    uint32_t low;
    memcpy(&low, &x, sizeof low);
    if (low > 0xc2d00000u) {
        low = 0xc2d00000u;                              /* -104 */
    }
    int32_t high = (int32_t)low;
    if (high > 0x42b20000) {
        high = 0x42b20000;                              /* 89 */
    }
    float clipped;
    memcpy(&clipped, &high, sizeof clipped);
    float n = (clipped * 1.44269504f + magic) - magic;  /* x / ln 2 */
    float r = (clipped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.98412698e-4f;                           /* 1 / 7! */
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
    float scale1, scale2;                               /* 2^half, 2^(n - half) */
    memcpy(&scale1, &bits1, sizeof scale1);
    memcpy(&scale2, &bits2, sizeof scale2);
    return x != x ? x : p * scale1 * scale2;
}

/* x sigmoid(1.702 x): the activation of OpenAI's CLIP (Radford et al., 2021). */
static SC_INLINE float quick_gelu(float x) { return x / (1.0f + exp32(-1.702f * x)); }

/* x Phi(x), Phi the normal distribution (Hendrycks and Gimpel, "Gaussian error linear units",
 * 2016). With z = |x| / sqrt 2 and t = 1 / (1 + z / 2): Phi(-|x|) = erfc(z) / 2 = t exp(-z^2) P(t).
 * P is fitted (tests/golden/fit_gelu.py) with a relative error below 5e-8 for z in [0, 10], so the
 * left tail keeps its relative precision. */
static SC_INLINE float gelu(float x) {
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
    float tail = t * exp32(-0.5f * a * a) * p;          /* Phi(-|x|) */
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
    double sum = 0;                                     /* s^2 / 3 + s^4 / 5 + ... + s^24 / 25 */
    for (int k = 25; k >= 3; k -= 2) {
        sum = (sum + 1.0 / k) * s2;
    }
    return exponent * 0.69314718055994531 + 2 * (s + s * sum);
}

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random
 * words from a key (the seed) and a counter of 128 bits: the position, and the stream in its upper
 * half. Any number of any stream can be computed directly. The constants are the paper's. */
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

/* order: [n]. The order of the images in one epoch: a permutation of 0 .. n - 1 (Fisher and Yates):
 * from the last place down, each entry is exchanged with one at or before it, drawn at random. */
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

/* Sums over images are exact, so that the shards of a data set can be merged in any order: integers
 * of 128 bits in units of 2^-64. The part of a term below one unit is cut off. */
typedef struct { uint64_t high, low; } exact_sum;

static void exact_add(exact_sum *sum, exact_sum term) {
    sum->low += term.low;
    sum->high += term.high + (sum->low < term.low);
}

/* value: 0 <= value < 2^63 */
static void exact_add_float(exact_sum *sum, float value) {
    int exponent;
    uint64_t digits = (uint64_t)(frexp(value, &exponent) * 0x1p53);
    int shift = exponent + 11;                          /* value * 2^64 = digits * 2^shift */
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
 * Dosovitskiy et al., "An image is worth 16x16 words", 2021, equations 1 to 4, as CLIP uses it
 * (Radford et al., "Learning transferable visual models from natural language supervision", 2021),
 * up to a hook point:
 *
 *     x = [class token; patches W + bias] + positions            then a norm where CLIP has one
 *     a = attention(norm1(x)),  x = x + a;   m = mlp(norm2(x)),  x = x + m        for each block
 *     logits = head(norm(x of the class token))
 *
 * Blocks count from 1. The hook points of a block: "attn" is a, "mlp" is m (both before they are
 * added), and "resid" is x at the block's end. So "mlp" of layer 11 is the output of FC2 in the
 * 11th block, bias included, without the residual.
 *
 * One image. T tokens (1 + grid^2), D width, d = D / heads, H hidden, p patch size, S image size in
 * pixels. The weights are those of PyTorch: a linear layer y = W x + bias has W [outputs, inputs].
 * ============================================================================================ */

/* The layers of a model: NORM1 to FC2 exist in every block, the others once. layer[b * ROLES + r]
 * is the layer with role r of block b + 1; those that exist once stand with the first block. QKV
 * has the projections to queries, keys and values one below the other, [3 D, D]. PRE is CLIP's norm
 * before the first block, POST the norm before the head. */
enum role {
    CLASS_TOKEN, POSITIONS, PATCHES, PRE, NORM1, QKV, OUT, NORM2, FC1, FC2, POST, HEAD, ROLES
};

typedef enum { NO_ACTIVATION, QUICK_GELU, ERF_GELU } activation_kind;

/* x, out: [rows, D]; weight, bias: [D].
 * out = (x - mean) / sqrt(variance + epsilon) * weight + bias for each row (Ba, Kiros and Hinton,
 * "Layer normalization", 2016; torch.nn.LayerNorm). */
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

/* x: [rows, K]; W: [N, K]; bias: [N] or NULL; out: [rows, N].
 * out = x W^T + bias (torch.nn.Linear) */
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

/* row: [n]. row = exp(scale * row) / the sum of these over the row. Subtracting the largest entry
 * first changes nothing mathematically and avoids overflow. */
static void softmax_forward(float *row, size_t n, float scale) {
    float largest = row_max(row, n);
    for (size_t e = 0; e < n; e++) {
        row[e] = exp32(scale * (row[e] - largest));
    }
    float sum = row_sum(row, n);
    for (size_t e = 0; e < n; e++) {
        row[e] /= sum;
    }
}

/* qkv: [T, 3 D], the queries, keys and values of all heads side by side; out: [T, D]; scores: [T],
 * of one query. out = softmax(q k^T / sqrt d) v for each head, which has d columns of each D
 * (Vaswani et al., "Attention is all you need", 2017, equation 1). */
static void attention_forward(float *out, const float *qkv, float *scores, size_t T, size_t D,
                              size_t heads) {
    size_t d = D / heads;
    size_t row = 3 * D;
    float scale = 1.0f / sqrtf((float)d);
    for (size_t head = 0; head < heads; head++) {
        const float *q = qkv + head * d;                 /* [T, d], rows 3 D apart */
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

/* x: [count]. The activation function between the two layers of the MLP. */
static SC_INLINE void gelu_forward(float *x, size_t count, activation_kind kind) {
    if (kind == QUICK_GELU) {
        for (size_t i = 0; i < count; i++) {
            x[i] = quick_gelu(x[i]);
        }
    } else {
        for (size_t i = 0; i < count; i++) {
            x[i] = gelu(x[i]);
        }
    }
}

/* x, branch: [count]. x += branch */
static void residual_forward(float *x, const float *branch, size_t count) {
    for (size_t i = 0; i < count; i++) {
        x[i] = branch[i] + x[i] + 0.0f;
    }
}

/* pixels: [S, S, 3], 8 bits; patch: [3 p^2].
 * Patch i of an image; patches go from left to right, then down. It becomes a row of 3 p^2 numbers,
 * channel by channel, each (v / 255 - mean) / std with the mean and std of its channel. */
static void patch_forward(float *patch, const sc_model *m, const unsigned char *pixels, size_t i) {
    size_t p = m->patch;
    size_t top = i / m->grid * p;                        /* the patch's first row of pixels */
    size_t left = i % m->grid * p;
    for (size_t c = 0; c < 3; c++) {
        for (size_t y = top; y < top + p; y++) {
            for (size_t x = left; x < left + p; x++) {
                float v = pixels[3 * (y * m->image_size + x) + c];
                *patch++ = (v / 255.0f - m->mean[c]) / m->std[c];
            }
        }
    }
}

/* pixels: [S, S, 3]; patch: [3 p^2], scratch; x: [T, D].
 * The tokens of an image before the first block (Dosovitskiy et al., equation 1). */
static void embed_forward(float *x, const sc_model *m, const unsigned char *pixels, float *patch) {
    size_t D = m->width;
    const float *positions = m->layer[POSITIONS].weight;
    for (size_t d = 0; d < D; d++) {
        x[d] = m->layer[CLASS_TOKEN].weight[d] + positions[d] + 0.0f;
    }
    for (size_t i = 0; i < m->grid * m->grid; i++) {
        float *token = x + (i + 1) * D;                  /* token 0 is the class token */
        patch_forward(patch, m, pixels, i);
        linear_forward(token, patch, &m->layer[PATCHES], 1, 3 * m->patch * m->patch, D);
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
    float *embedding;                /* [outputs], the projected class token */
} vit_arrays;

/* a->x: [T, D], updated in place; out: [T, D], the values at a hook point, or NULL.
 * Block `number`, from 1 (Dosovitskiy et al., equations 2 and 3). */
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

/* a->x: [T, D]; logits: [classes].
 * head(norm(class token)) for a classifier (Dosovitskiy et al., equation 4). For CLIP with the
 * embeddings of the class prompts (m->text, rows of norm 1), the head is the projection into the
 * space of the texts, and a logit is the cosine of the projected image with a text. */
static void head_forward(float *logits, vit_arrays *a, const sc_model *m) {
    size_t P = m->outputs;
    const sc_layer *head = &m->layer[HEAD];
    layer_norm_forward(a->normed, a->x, &m->layer[POST], m->epsilon, 1, m->width);
    if (!m->text) {
        linear_forward(logits, a->normed, head, 1, m->width, P);
        return;
    }
    linear_forward(a->embedding, a->normed, head, 1, m->width, P);
    unit_row(a->embedding, P);
    for (size_t c = 0; c < m->classes; c++) {
        logits[c] = sc_dot_plain(a->embedding, m->text + c * P, P);
    }
}

/* m: its layers hold weights as PyTorch has them; pixels: [S, S, 3]; layer: from 1;
 * out: [T, D] or NULL; logits: [classes] or NULL.
 * The activations of one image at a hook point, and the logits if requested. Without logits, no
 * block after `layer` is run. */
static int vit_forward(const sc_model *m, const unsigned char *pixels, size_t layer, sc_hook hook,
                       float *out, float *logits) {
    size_t T = m->tokens;
    size_t D = m->width;
    size_t last = logits ? m->blocks : layer;
    vit_arrays a;
    memory_list memory = NULL;
    const array_spec arrays[] = {
        ARRAY(a.x, T, D),
        ARRAY(a.normed, T, D),
        ARRAY(a.qkv, T, 3 * D),
        ARRAY(a.mixed, T, D),
        ARRAY(a.branch, T, D),
        ARRAY(a.hidden, T, m->hidden),
        ARRAY(a.scores, T, 1),
        ARRAY(a.patch, 3 * m->patch, m->patch),
        ARRAY(a.embedding, m->outputs, 1) };
    SC_TRY(new_arrays(&memory, arrays, COUNT(arrays)));
    embed_forward(a.x, m, pixels, a.patch);
    if (m->layer[PRE].weight) {
        layer_norm_forward(a.normed, a.x, &m->layer[PRE], m->epsilon, T, D);
        memcpy(a.x, a.normed, T * D * sizeof *a.x);
    }
    for (size_t number = 1; number <= last; number++) {
        float *tap = number == layer ? out : NULL;
        block_forward(&a, m, number, hook, tap);
    }
    if (logits) {
        head_forward(logits, &a, m);
    }
    release(&memory);
    return SC_OK;
}

/* ============================================================================================
 * 3. The sparse autoencoder
 *
 *     h = W_enc^T (x - b_dec) + b_enc       f = relu(h), or relu of the k largest of h (TopK)
 *     x' = W_dec^T f + b_dec
 *
 * T tokens, D inputs, n latents. In memory W_enc and W_dec are both [n, D], latent by latent:
 * row j of W_enc is the direction that latent j looks for, row j of W_dec the one that it writes.
 * Rows are `stride` floats apart: D padded to a multiple of 16 with zeros, which stay zero in
 * training. b_enc: [n]; b_dec: [D]. dv stands for the gradient of the loss with respect to v.
 * Bricken et al., 2023; Gao et al., 2024, section 2; PatchSAE:
 * src/sae_training/sparse_autoencoder.py, forward_standard().
 * ============================================================================================ */

/* x, centred: [T, D]; h: [T, n]. centred = x - b_dec; h = W_enc^T centred + b_enc */
static void pre_activation_forward(float *h, float *centred, const sc_sae *sae, const float *x,
                                   size_t T) {
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    for (size_t t = 0; t < T; t++, x += D, centred += D, h += n) {
        for (size_t d = 0; d < D; d++) {
            centred[d] = x[d] - sae->b_dec[d];
        }
        for (size_t j = 0; j < n; j++) {
            const float *W_enc = sae->W_enc + j * sae->stride;
            float sum = chained_sum(W_enc, 1, centred, 1, D);
            h[j] = sum + sae->b_enc[j] + 0.0f;
        }
    }
}

/* threshold: [n], at least 0, or NULL for 0; h, f: [n], of one token.
 * f = h where h > threshold, else 0; without thresholds this is max(h, 0). Thresholds are read from
 * SAEs of others (JumpReLU: Rajamanoharan et al., "Jumping ahead", 2024, section 3). */
static void relu_forward(float *f, const float *h, const float *threshold, size_t n) {
    for (size_t j = 0; j < n; j++) {
        float least = threshold ? threshold[j] : 0;
        f[j] = h[j] > least ? h[j] : 0;
    }
}

/* h, f: [n], of one token.
 * f = h for the k largest of h, as far as they are positive, else 0 (Gao et al., 2024, section
 * 2.3). The largest one left is taken, k times. Of equal ones the latent with the lower index is
 * taken first: ties go to the lower index everywhere in this file, so that results do not depend
 * on the order of work. */
static void topk_forward(float *f, const float *h, size_t n, size_t k) {
    for (size_t j = 0; j < n; j++) {
        f[j] = 0;
    }
    for (size_t taken = 0; taken < k; taken++) {
        size_t best = n;
        float largest = 0;
        for (size_t j = 0; j < n; j++) {
            if (f[j] == 0 && h[j] > largest) {           /* f[j] is not 0: taken before */
                best = j;
                largest = h[j];
            }
        }
        if (best == n) return;                           /* no positive one is left */
        f[best] = largest;
    }
}

/* x, centred: [T, D]; h, f: [T, n]. centred and h as above; f = relu(h), or TopK of h */
static void encode_forward(float *f, float *h, float *centred, const sc_sae *sae, const float *x,
                           size_t T) {
    size_t n = sae->d_sae;
    pre_activation_forward(h, centred, sae, x, T);
    for (size_t t = 0; t < T; t++, f += n, h += n) {
        if (sae->topk) topk_forward(f, h, n, sae->k);
        else relu_forward(f, h, sae->threshold, n);
    }
}

/* centred: [T, D]; dh: [T, n]; dW_enc: [n, stride]; db_enc: [n]; term: [T], scratch.
 * h[t][j] = W_enc[j] . (x[t] - b_dec) + b_enc[j] is linear in row j of W_enc, with the factor
 * x[t] - b_dec, and in b_enc[j], with the factor 1. Summed over the tokens (chain rule):
 *     dW_enc[j] = sum_t dh[t][j] (x[t] - b_dec)         db_enc[j] = sum_t dh[t][j]
 * For the gradient with respect to b_dec see b_dec_backward(). */
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

/* f: [T, n]; reconstruction: [T, D]. x' = W_dec^T f + b_dec, a sum of f times rows of W_dec */
static void decode_forward(float *reconstruction, const sc_sae *sae, const float *f, size_t T) {
    size_t D = sae->d_in;
    size_t n = sae->d_sae;
    for (size_t t = 0; t < T; t++) {
        const float *f_t = f + t * n;
        for (size_t d = 0; d < D; d++) {
            const float *column = sae->W_dec + d;        /* [n], `stride` floats apart */
            float sum = chained_sum(f_t, 1, column, sae->stride, n);
            reconstruction[t * D + d] = sum + sae->b_dec[d] + 0.0f;
        }
    }
}

/* f, dh: [T, n]; dx: [T, D], the gradient dx' of the reconstruction; dW_dec: [n, stride].
 * x'[t] = sum_j f[t][j] W_dec[j] + b_dec is linear in W_dec and in f:
 *     dW_dec[j] = sum_t f[t][j] dx'[t]                  df[t][j] = W_dec[j] . dx'[t]
 * f = h where f > 0, so dh = df there. Elsewhere f stays 0 if h changes a little, so dh = 0: relu
 * has cut h off, or TopK has not taken the latent. So dh is computed only where f > 0. */
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

/* dx: [T, D], the gradient dx' of the reconstruction; db_enc: [n]; db_dec: [D]; term: [T], scratch.
 * b_dec is added to x', with the factor 1, and subtracted from x in h, which gives h[j] the factor
 * -W_enc[j]. Since db_enc[j] = sum_t dh[t][j], the second part needs no sum over tokens:
 *     db_dec = sum_t dx'[t] - sum_t sum_j dh[t][j] W_enc[j]
 *            = sum_t dx'[t] - sum_j db_enc[j] W_enc[j] */
static void b_dec_backward(float *db_dec, const sc_sae *sae, const float *dx, const float *db_enc,
                           double *term, size_t T) {
    size_t D = sae->d_in;
    for (size_t d = 0; d < D; d++) {
        const float *column = sae->W_enc + d;            /* [n], `stride` floats apart */
        float through_h = chained_sum(db_enc, 1, column, sae->stride, sae->d_sae);
        for (size_t t = 0; t < T; t++) {
            term[t] = dx[t * D + d];
        }
        db_dec[d] = (float)sum_in_blocks(term, T) - through_h;
    }
}

/* rows: [count, width]. Refuses infinities and NaN, which would spread to every weight. */
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

/* Encoding and decoding for callers of the library: see saeclip.h. */
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

/* Row j of W_enc and W_dec when training starts: W_enc uniform in +-sqrt(6 / n), the bound that
 * PyTorch's kaiming_uniform_() computes for a [D, n] matrix; W_dec uniform, then scaled to norm 1.
 * The biases start at 0, or b_dec as in start_b_dec().
 * PatchSAE: sparse_autoencoder.py, __init__(). */
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

/* points: [count, dim]; weight: [count]; sum: [dim]; part: [dim], scratch.
 * sum = the sum over points of weight * point, in float64, in blocks of 256 points. */
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

/* point, centre: [dim]. Their distance, by 16 partial sums in float64, which are added in order. */
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

/* points: [count, dim]; median: [dim].
 * The geometric median is the point with the least sum of distances to all points. That sum's
 * gradient, sum_i (median - point_i) / distance_i, is 0 where the median is the mean of the points
 * weighted by 1 / distance_i. Weiszfeld's iteration (1937) begins at the mean of the points and
 * takes this weighted mean again and again; distances below 1e-6 count as 1e-6. It stops after
 * `steps` steps (100 in training), or earlier when a step changes no bit of the median; steps = 0
 * gives the mean. (PatchSAE: compute_geometric_median() of geom_median, with a tolerance.) */
static int geometric_median(double *median, const float *points, size_t count, size_t dim,
                            int steps) {
    double *before = NULL;
    double *part = NULL;
    double *weight = NULL;
    memory_list memory = NULL;
    const array_spec arrays[] = {
        ARRAY(before, dim, 1),
        ARRAY(part, dim, 1),
        ARRAY(weight, count, 1) };
    SC_TRY(new_arrays(&memory, arrays, COUNT(arrays)));
    for (size_t i = 0; i < count; i++) {
        weight[i] = 1;
    }
    for (int step = 0; step <= steps; step++) {
        double total = sum_in_blocks(weight, count);
        weighted_sum(median, part, weight, points, count, dim);
        for (size_t d = 0; d < dim; d++) {
            median[d] /= total;
        }
        if (step > 0 && memcmp(before, median, dim * sizeof *median) == 0) break;
        memcpy(before, median, dim * sizeof *median);
        for (size_t i = 0; i < count; i++) {
            double apart = distance(points + i * dim, median, dim);
            if (!(apart > 1e-6)) {
                apart = 1e-6;
            }
            weight[i] = 1 / apart;
        }
    }
    release(&memory);
    return SC_OK;
}

/* x: [images T, stride], activations of some images; T: tokens per image.
 * Where b_dec starts: the mean token (steps 0), the geometric median of all tokens, or with
 * images_as_points that of whole images as points of T D numbers, and then the mean over its T
 * tokens (PatchSAE: sparse_autoencoder.py, initialize_b_dec_with_geometric_median()). */
static int start_b_dec(sc_sae *sae, const float *x, size_t images, size_t T, int images_as_points,
                       int steps) {
    size_t parts = images_as_points ? T : 1;             /* tokens in a point */
    size_t count = images * T / parts;                   /* points */
    size_t dim = parts * sae->stride;                    /* numbers in a point */
    double *median = new_array(dim, sizeof *median);
    if (!median) return SC_FAILED;
    int status = geometric_median(median, x, count, dim, steps);
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
    free(median);
    return status;
}

/* ============================================================================================
 * 4. Training
 *
 * One step on T tokens x: rows of W_dec to unit norm; encode and decode; the loss; its gradient,
 * less the component of dW_dec along the rows of W_dec; Adam.
 *
 *     loss = mse + l1 + ghost
 *     mse  = mean over t and d of (x'[t][d] - x[t][d])^2 / ||x[t]||      PatchSAE's
 *     l1   = lambda * mean over t of sum_j f[t][j]                       ReLU only; f is never < 0
 *     ghost: see ghost_token()
 *
 * The loss is minimised over W_enc, b_enc, W_dec and b_dec. dW_dec is d loss / d W_dec, and so on.
 * Lim et al., 2025; PatchSAE: src/sae_training/sae_trainer.py, _train_step(), and
 * sparse_autoencoder.py, forward_standard().
 * ============================================================================================ */

/* Adam's running means of a weight's gradient and of its square, with the weight's shape. */
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
    double *term, *deviation;        /* [T], the terms of a sum; [D], of sum (x - mean)^2 */
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
        ARRAY(s->term, T, 1),
        ARRAY(s->deviation, D, 1) };
    s->memory = NULL;
    return new_arrays(&s->memory, arrays, COUNT(arrays));
}

/* In training a latent is dead if it has fired on no token for more than dead_window steps
 * (PatchSAE: _train_step(), ghost_grad_neuron_mask). */
static int is_dead(const sc_trainer *t, size_t j) {
    return t->silent[j] > (int64_t)t->options.dead_window;
}

/* x, reconstruction: [T, D]; norm, error: [T]; apart: [D], scratch.
 * norm = ||x|| and error = ||x' - x||^2 of each token, in float32. */
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

/* norm, error: [T]; term: [T], scratch. The mean over t and d of (x' - x)^2 / ||x|| */
static double mse_forward(double *term, const double *norm, const double *error, size_t T,
                          size_t D) {
    for (size_t t = 0; t < T; t++) {
        term[t] = error[t] / norm[t];
    }
    return sum_in_blocks(term, T) / ((double)T * (double)D);
}

/* x: [T, D]; s->norm: [T]; s->dreconstruction: [T, D].
 * mse = sum over t and d of (x' - x)^2 / (||x|| T D). ||x|| does not depend on the weights, so
 *     d mse / d x' = 2 (x' - x) / (||x|| T D) */
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

/* f: [T, n]; term: [T], scratch. The sum over t and j of f[t][j], or with `count` the number of
 * active f. Divided by T, these are L1 and L0. */
static double activity_sum(double *term, const float *f, size_t T, size_t n, int count) {
    for (size_t t = 0; t < T; t++) {
        term[t] = 0;
        for (size_t j = 0; j < n; j++) {
            float value = f[t * n + j];
            if (!(value > 0)) continue;
            if (count) {
                value = 1;
            }
            term[t] += value;
        }
    }
    return sum_in_blocks(term, T);
}

/* f, dh: [count], count = T n.
 * l1 = lambda / T * sum over t and j of f[t][j], so d l1 / d f[t][j] = lambda / T. It is added to
 * dh where f > 0, as in decode_backward(). */
static void l1_backward(float *dh, const float *f, size_t count, double lambda, size_t T) {
    float df = (float)(lambda / (double)T);
    for (size_t i = 0; i < count; i++) {
        if (f[i] > 0) {
            dh[i] += df;
        }
    }
}

/* x: [T, D]; s->error: [T].
 * 1 - sum ||x' - x||^2 / sum ||x - mean||^2: the share of the variance of these T tokens that the
 * reconstruction explains. With `centred` 0 the mean is not subtracted: PatchSAE logs that one
 * (_calculate_metrics()), which is closer to 1. */
static double explained_variance(step_arrays *s, const float *x, size_t T, size_t D, int centred) {
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
        s->deviation[d] = sum_in_blocks(term, T);
    }
    double deviation = sum_in_blocks(s->deviation, D);
    if (!(deviation > 0)) return 0;
    return 1 - sum_in_blocks(s->error, T) / deviation;
}

/* Ghost gradients revive dead latents (Jermyn and Templeton, "Ghost grads", 2024; PatchSAE:
 * forward_standard()). A dead latent has f = 0 and so gets no gradient. Instead, exp(h), which is
 * never 0, stands in for its activation, and a second reconstruction g from the dead latents alone
 * learns to rebuild what the others leave over, r = x - x':
 *
 *     e = exp(h) of dead latents, 0 of others            g = W_dec^T e
 *     g <- g * ||r|| / (1e-6 + 2 ||g||)                   half as long as r
 *     m  = (g - r)^2 / ||r||                              elementwise; 0 where ||r|| = 0
 *     m <- m * ((x' - x)^2 / ||x||) / (m + 1e-6)          about as large as the mse
 *     ghost = mean of m over tokens and dimensions
 *
 * The two factors on the right, and r, count as constants: no gradient passes through them. */

/* x, reconstruction, ghost, dghost: [D], where dghost may be ghost; r: [D], scratch; norm: ||x||;
 * scale: 1 / (T D). Returns one token's sum of m over dimensions; dghost = d ghost loss / d g.
 * With the constants a = ||r|| / (1e-6 + 2 ||g||) and b = ((x' - x)^2 / ||x||) / (m + 1e-6), where
 * this m is the one before its factor, the loss is the mean of b (a g - r)^2 / ||r||, and
 *     dg = 2 b a (a g - r) / ||r|| / (T D) */
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
        float apart = ghost[d] * a - r[d];               /* a g - r */
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

/* x: [T, D]; s->e: [T, n], 0 before; s->ghost, s->dghost: [T, D]. Returns the ghost loss; computes
 * e, g before it is scaled, and dg. */
static double ghost_forward(step_arrays *s, const sc_trainer *t, const float *x) {
    size_t T = t->tokens;
    size_t D = t->sae->d_in;
    size_t n = t->sae->d_sae;
    double numbers = (double)T * (double)D;
    float *r = s->db_dec;                                /* as scratch */
    for (size_t i = 0; i < T; i++) {
        float *e = s->e + i * n;                         /* [n], of token i */
        float *g = s->ghost + i * D;                     /* [D] */
        const float *to = s->reconstruction + i * D;     /* [D], x' */
        for (size_t j = 0; j < n; j++) {
            if (is_dead(t, j)) {
                e[j] = exp32(s->h[i * n + j]);
            }
        }
        for (size_t d = 0; d < D; d++) {
            const float *column = t->sae->W_dec + d;
            float sum = chained_sum(e, 1, column, t->sae->stride, n);
            g[d] = sum + 0.0f;
        }
        double norm = s->norm[i];
        s->term[i] = ghost_token(s->dghost + i * D, g, x + i * D, to, r, norm, D, 1 / numbers);
    }
    return sum_in_blocks(s->term, T) / numbers;
}

/* s->e, s->dh: [T, n]; s->dghost: [T, D]; s->dW_dec: [n, stride].
 * g[t] = sum_j e[t][j] W_dec[j] is linear, as in decode_backward(), and e = exp(h) is its own
 * derivative. So for dead latents j
 *     dW_dec[j] += sum_t e[t][j] dg[t]         dh[t][j] += e[t][j] (W_dec[j] . dg[t])
 * encode_backward() does the rest. */
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

/* dW_dec, W_dec: [D], of one latent.
 * Rows of W_dec have norm 1 when a step begins (PatchSAE: set_decoder_norm_to_unit_norm()).
 * Otherwise f could shrink, and l1 with it, while W_dec grows and x' stays the same. The component
 * of the gradient along a row would only change the row's norm, which the next step undoes. It is
 * removed, so that it does not fill Adam's moments either. With ||W_dec[j]|| = 1:
 *     dW_dec[j] -= (dW_dec[j] . W_dec[j]) W_dec[j]
 * (PatchSAE: remove_gradient_parallel_to_decoder_directions(); Bricken et al., 2023). */
static void project_gradient(float *dW_dec, const float *W_dec, size_t D) {
    float along = sc_dot_plain(dW_dec, W_dec, D);
    for (size_t d = 0; d < D; d++) {
        dW_dec[d] = fma32(-along, W_dec[d], dW_dec[d]);
    }
}

/* The learning rate of a step (from 0): lr * min(1, (step + 1) / warmup); lr without a warm-up. */
static double learning_rate(const sc_train_options *options, uint64_t step) {
    if (step + 1 >= options->warmup) return options->lr;
    return options->lr * ((double)(step + 1) / (double)options->warmup);
}

/* Adam's two scalars of step t (from 1; Kingma and Ba, "Adam", 2015, algorithm 1, with beta1 0.9,
 * beta2 0.999, epsilon 1e-8). The moments start at 0; what they lack of a mean is made up by
 *     step_size = lr / (1 - beta1^t)          root_scale = 1 / sqrt(1 - beta2^t) */
typedef struct { float step_size, root_scale; } adam_step;

static adam_step next_adam_step(sc_trainer *t, double lr) {
    t->beta1_power *= 0.9;
    t->beta2_power *= 0.999;
    return (adam_step){ (float)(lr / (1 - t->beta1_power)),
                        (float)(1 / sqrt(1 - t->beta2_power)) };
}

/* w, dw and the moments m, v: [count].
 *     m = 0.9 m + 0.1 dw          v = 0.999 v + 0.001 dw^2
 *     w -= step_size m / (sqrt(v) root_scale + 1e-8) */
static SC_INLINE void adam_update(float *w, adam_moments a, const float *dw, size_t count,
                                  adam_step step) {
    for (size_t i = 0; i < count; i++) {
        float square = dw[i] * dw[i];
        a.m[i] = 0.9f * a.m[i] + 0.1f * dw[i];
        a.v[i] = 0.999f * a.v[i] + 0.001f * square;
        float root = sqrtf(a.v[i]) * step.root_scale;
        w[i] -= step.step_size * (a.m[i] / (root + 1e-8f));
    }
}

/* x: [T, D]. The losses, and their gradients with respect to x' and g. */
static int losses(sc_step *result, step_arrays *s, const sc_trainer *t, const float *x) {
    size_t T = t->tokens;
    size_t D = t->sae->d_in;
    size_t n = t->sae->d_sae;
    /* mse, with s->db_dec as scratch */
    token_errors(s->norm, s->error, s->db_dec, x, s->reconstruction, T, D);
    result->mse = mse_forward(s->term, s->norm, s->error, T, D);
    mse_backward(s, x, T, D);
    /* l1, and what is only reported */
    result->l0 = activity_sum(s->term, s->f, T, n, 1) / (double)T;
    if (!t->sae->topk) {
        double l1 = activity_sum(s->term, s->f, T, n, 0) / (double)T;
        result->l1 = t->options.l1 * l1;
    }
    if (t->options.ghost && result->dead > 0) {
        result->ghost = ghost_forward(s, t, x);
    }
    result->explained_variance = explained_variance(s, x, T, D, 1);
    result->explained_variance_uncentred = explained_variance(s, x, T, D, 0);
    result->loss = result->mse + result->l1 + result->ghost;
    if (isfinite(result->loss)) return SC_OK;
    return fail("the loss is not finite");
}

/* The gradients of all weights, from those of x' and g. ghosts: whether there is a ghost loss */
static void gradients(step_arrays *s, const sc_trainer *t, int ghosts) {
    const sc_sae *sae = t->sae;
    size_t T = t->tokens;
    /* through the decoder: dW_dec and dh, from each part of the loss */
    decode_backward(s->dW_dec, s->dh, sae, s->f, s->dreconstruction, T);
    if (!sae->topk) {
        l1_backward(s->dh, s->f, T * sae->d_sae, t->options.l1, T);
    }
    if (ghosts) {
        ghost_backward(s, t);
    }
    /* through the encoder, then b_dec, which is in both */
    encode_backward(s->dW_enc, s->db_enc, sae, s->centred, s->dh, s->term, T);
    b_dec_backward(s->db_dec, sae, s->dreconstruction, s->db_enc, s->term, T);
    for (size_t j = 0; j < sae->d_sae; j++) {
        size_t row = j * sae->stride;
        project_gradient(s->dW_dec + row, sae->W_dec + row, sae->d_in);
    }
}

/* f: [T, n]. Counts for each latent the steps since it fired on any token. */
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

/* x: [T, D]. The mse divides by ||x||, so a token of zeros is refused. */
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

/* Adam on all weights. s: their gradients. Padding has a gradient of 0 and stays 0. */
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

/* x: [T, D]. One training step. */
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
    int status = losses(result, &s, t, x);               /* and dx', dg */
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
 * well the SAE rebuilds the activations. For one latent j:
 *
 *     a(i) = mean over all T tokens of image i of f[i][t][j]     it fires on image i where a(i) > 0
 *     frequency (sparsity)  = images on which it fires / N       0: dead on this data set
 *     mean activation       = sum_i a(i) / images on which it fires
 *
 * PatchSAE: tasks/compute_sae_feature_data.py, compute_sae_statistics() and main(), and
 * tasks/compute_class_wise_sae_activation.py.
 * ============================================================================================ */

static const sc_top nothing = { 0, -1, -1 };

/* Whether an entry comes before another: the larger value first, of equal ones the lower index (of
 * the image, then of the token). */
static int goes_before(const sc_top *a, const sc_top *b) {
    if (a->value != b->value) return a->value > b->value;
    if (a->image != b->image) return a->image < b->image;
    return a->other < b->other;
}

/* list: [size], in that order. Puts an entry in its place; the last one drops out. */
static void keep_largest(sc_top *list, size_t size, sc_top entry) {
    size_t i = size;
    while (i > 0 && goes_before(&entry, &list[i - 1])) {
        i--;
    }
    if (i == size) return;
    memmove(list + i + 1, list + i, (size - i - 1) * sizeof *list);
    list[i] = entry;
}

/* top: [active]. The sum of activations of all top images of entry i's class, or 0 if an earlier
 * entry has that class, so that each class counts once. */
static double class_activation(const sc_top *top, size_t active, size_t i) {
    double sum = 0;
    for (size_t k = 0; k < active; k++) {
        if (top[k].other != top[i].other) continue;
        if (k < i) return 0;
        sum += top[k].value;
    }
    return sum;
}

/* top: [K]; other: the label. The entropy of the classes of a latent's top images, in nats:
 * -sum_c p_c ln p_c, where p_c is the share of class c in the sum of their activations. 0: all are
 * of one class; ln 16 = 2.77: 16 classes have equal shares. -1 (not defined): fewer than min(10, K)
 * images are active, or one of them has no label. PatchSAE also counts entries that are not active,
 * and adds 1e-9 within the logarithm. */
static double top_entropy(const sc_top *top, size_t K) {
    size_t active = 0;
    double total = 0;
    double entropy = 0;
    while (active < K && top[active].value > 0) {
        total += top[active++].value;
    }
    if (active < K && active < 10) return -1;
    for (size_t i = 0; i < active; i++) {
        double share = class_activation(top, active, i) / total;
        if (top[i].other < 0) return -1;
        if (share > 0) {
            entropy -= share * log64(share);
        }
    }
    return entropy > 0 ? entropy : 0;
}

/* f: [N, T, n]; label: [N], -1 for none, or NULL; first_patch: the first token that is a patch, 1
 * where token 0 is the class token. Everything about latent j, and its lists in descending order:
 * top: [K], the images with the largest a(i), other: the label;
 * patch: [P], the patch tokens with the largest f, other: the token.
 * Entries that are left over are (0, -1, -1). */
void sc_latent_measure_plain(sc_latent *l, sc_top *top, size_t K, sc_top *patch, size_t P,
                             const float *f, const int64_t *label, size_t N, size_t T, size_t n,
                             size_t j, size_t first_patch) {
    exact_sum means = { 0, 0 };      /* of a(i), over images */
    exact_sum activations = { 0, 0 };
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
        float mean = (float)(sum / (double)T);           /* a(i) */
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

/* x, reconstruction: [tokens, D]; f: [tokens, n].
 * How well an SAE rebuilds the tokens of a data set, and how sparsely. The variance is about the
 * mean token of the whole set, in one pass over the tokens: since sum_t (x - mean)^2 =
 * sum_t x^2 - tokens mean^2, it is the sum over d of that. mean_activation is over active f. */
int sc_metrics_plain(sc_metrics *m, const float *x, const float *reconstruction, const float *f,
                     size_t tokens, size_t D, size_t n) {
    double numbers = (double)tokens * (double)D;
    double square = 0;               /* sum over t and d of x^2 */
    double mean_square = 0;          /* sum over d of mean^2 */
    memory_list memory = NULL;
    double *norm = NULL;
    double *error = NULL;
    double *term = NULL;
    float *apart = NULL;
    const array_spec arrays[] = {
        ARRAY(norm, tokens, 1),
        ARRAY(error, tokens, 1),
        ARRAY(term, tokens, 1),
        ARRAY(apart, D, 1) };
    SC_TRY(new_arrays(&memory, arrays, COUNT(arrays)));
    token_errors(norm, error, apart, x, reconstruction, tokens, D);
    /* errors */
    double squared_error = sum_in_blocks(error, tokens);
    m->mse = mse_forward(term, norm, error, tokens, D);
    m->mse_raw = squared_error / numbers;
    /* variance */
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
    /* sparsity */
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
 * A function that can fail returns SC_OK, SC_FAILED or SC_USAGE, which are also the program's exit
 * statuses, and leaves one line of reason in a buffer of its thread. Only main() prints it.
 * fail("FILE: what is wrong (expected ...)") is for bad input and for a machine that fails;
 * usage(...) is for an impossible request.
 * ============================================================================================ */

static _Thread_local char error_text[8192];          /* room for two paths */

const char *sc_error(void) { return error_text; }

/* Sets the reason and returns the status. The arguments may include the reason before. */
SC_PRINTF(2, 3) static int set_error(int status, const char *format, ...) {
    char line[sizeof error_text];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    strcpy(error_text, line);
    return status;
}

/* count x size bytes, aligned to a cache line; NULL and a reason on failure. Not zeroed, so that
 * pages that are never written take no memory. At least 1 byte is requested, so that NULL always
 * means failure. Freed with free(). */
static void *reserve_array(size_t count, size_t size) {
    void *memory = NULL;
    size_t bytes = count * size;
    int addressable = size == 0 || count <= (SIZE_MAX - 64) / size;
    if (bytes == 0) bytes = 1;
    if (addressable && posix_memalign(&memory, 64, bytes) == 0) return memory;
    fail("out of memory: cannot allocate %zu x %zu bytes", count, size);
    return NULL;
}

/* The same, zeroed. */
static void *new_array(size_t count, size_t size) {
    void *memory = reserve_array(count, size);
    if (memory) memset(memory, 0, count * size);
    return memory;
}

/* Two texts as a new string; NULL and a reason on failure. */
static char *join_text(const char *head, const char *tail) {
    char *joined = new_array(strlen(head) + strlen(tail) + 1, 1);
    if (!joined) return NULL;
    return strcat(strcpy(joined, head), tail);
}

/* Makes room for one more element; the room doubles when it is used up. list: the address of the
 * pointer to the elements. */
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

/* Sets the pointers of arrays that share a block. The block's first cache line is its owner's, and
 * each array begins on a line of its own. If block is NULL, the arrays are only measured. Returns
 * the bytes of the block, SIZE_MAX if so many cannot be addressed. */
static size_t lay_out(const array_spec *array, size_t count, void *block) {
    size_t used = 64;
    for (size_t i = 0; i < count; i++) {
        void *place = block ? (unsigned char *)block + used : NULL;
        memcpy(array[i].pointer, &place, sizeof place);
        size_t rows = array[i].rows, row_bytes = array[i].row_bytes;
        if (row_bytes > 0 && rows > (SIZE_MAX - 63 - used) / row_bytes) return SIZE_MAX;
        used += (rows * row_bytes + 63) / 64 * 64;
    }
    return used;
}

/* Allocates zeroed arrays in one block that a list owns. A memory_list points to its newest block,
 * and each block begins with a pointer to the one before it. An empty list is NULL. */
static int new_arrays(memory_list *list, const array_spec *array, size_t count) {
    void *block = new_array(lay_out(array, count, NULL), 1);
    if (!block) return SC_FAILED;
    lay_out(array, count, block);
    memcpy(block, list, sizeof *list);
    *list = block;
    return SC_OK;
}

/* One array; pointer: the address of a typed pointer, which is set to it. */
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

/* The index of the first value that is not finite, or count. */
static size_t first_not_finite(const float *values, size_t count) {
    size_t i = 0;
    while (i < count && isfinite(values[i])) i++;
    return i;
}

/* ============================================================================================
 * 7. Threads
 *
 * parallel_for(tasks, work, context) calls work(context, task) once for every task. Tasks are
 * handed out in ascending order. Which thread gets which task is left to chance, and no result may
 * depend on it: a task writes only its part of the output and the scratch memory of its `worker`.
 * If tasks fail, the one with the lowest number is reported. All tasks below it had been started,
 * so it is the same one in every run.
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
    size_t tasks;
    atomic_size_t round;             /* the number of the parallel_for call, or STOP */
    atomic_int busy;                 /* threads that have not finished this round */
    atomic_size_t next;              /* the next task to hand out */
    size_t failed_task;
    int status;                      /* of failed_task, if any failed */
    char reason[sizeof error_text];
} pool = { .workers = 1, .lock = PTHREAD_MUTEX_INITIALIZER,
           .start = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER };

#define STOP SIZE_MAX                /* the round in which threads end */

static int thread_count(void) { return pool.workers; }

/* Takes tasks until none is left. */
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
        atomic_store(&pool.next, pool.tasks);            /* no further task is started */
    }
}

/* Waits briefly while a condition holds. Most rounds begin within microseconds of the one before,
 * and a thread that sleeps takes 100 of them to wake up. */
#define WAIT_WHILE(condition)                                                                      \
    for (int tries = 0; tries < 200 && (condition); tries++) sched_yield()

/* A thread waits for a round, helps with its tasks, and waits for the next. */
static void *worker_main(void *argument) {
    size_t seen = 0;
    worker = (size_t)(intptr_t)argument;
    for (;;) {
        WAIT_WHILE(pool.round == seen);
        pthread_mutex_lock(&pool.lock);
        while (pool.round == seen) pthread_cond_wait(&pool.start, &pool.lock);
        seen = pool.round;
        pthread_mutex_unlock(&pool.lock);
        if (seen == STOP) return NULL;
        run_tasks();
        pthread_mutex_lock(&pool.lock);
        if (--pool.busy == 0) pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
    }
}

/* Returns SC_OK, or the status and reason of the failed task with the lowest number. */
static int parallel_for(size_t tasks, task_function *work, void *context) {
    pthread_mutex_lock(&pool.lock);
    pool.work = work;
    pool.context = context;
    pool.tasks = tasks;
    pool.status = SC_OK;
    atomic_store(&pool.next, 0);
    if (tasks > 1) {                                     /* one task needs no other thread */
        pool.busy = pool.workers - 1;
        pool.round++;
        pthread_cond_broadcast(&pool.start);
    }
    pthread_mutex_unlock(&pool.lock);
    run_tasks();
    WAIT_WHILE(pool.busy > 0);
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

/* threads: 0 or less for one per processor. Either all of them start or none. */
int sc_threads_start(int threads) {
    sc_threads_stop();
    if (threads <= 0) threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (threads > SC_MAX_THREADS) threads = SC_MAX_THREADS;
    for (; pool.workers < threads; pool.workers++) {
        intptr_t number = pool.workers;
        int error = pthread_create(&pool.thread[number], NULL, worker_main, (void *)number);
        if (error == 0) continue;
        sc_threads_stop();
        return fail("thread %d of %d cannot be started: %s", (int)number + 1, threads,
                    strerror(error));
    }
    return SC_OK;
}

/* ============================================================================================
 * 8. Kernels and matrix products
 *
 * The sums of section 1 and the work along rows, in vectors. Each kernel is written once, in words
 * such as SC_FMA, and compiled once for each instruction set: this file includes itself with SC_ISA
 * defined, and then only the part between #ifdef SC_ISA and #else is read.
 *
 * The width of a vector changes no bit of a result. Its lanes hold neighbouring columns of a
 * product, or neighbouring partial sums of a row, never successive terms of one sum. Loops without
 * explicit vectors, those of Part I too, are left to the compiler: IEEE 754 rounds their operations
 * in the same way in every lane.
 * ============================================================================================ */

enum {
    CHAIN_STRIDE = CHAIN + 16,       /* floats between the rows of a copied block of A */
    MAX_ROWS = 14,                   /* of the largest tile */
    TILES_AT_ONCE = 8,               /* tiles that use a block of B while it is in the cache */
    COLUMNS_AT_ONCE = 1536,          /* columns whose sums are kept from block to block */
    SHARES = 4                       /* tasks per thread into which a product is divided */
};

/* Where a part of a product is stored, and what is added to it first: the sum, row_bias, bias and
 * residual are added in this order, then +0. All pointers are to the part's first row or column. */
typedef struct {
    float *c;                        /* [rows, columns], rows c_stride floats apart */
    size_t c_stride;
    const float *bias;               /* [columns], or NULL */
    const float *row_bias;           /* [rows], or NULL */
    const float *residual;           /* like c, or NULL; may be the same */
    activation_kind activation;      /* applied last */
} tile_target;

/* The kernels of one instruction set; shapes and formulas are given where they are defined. */
typedef struct {
    const char *name;
    size_t rows, columns;            /* of a tile */
    /* matrix products: the chains of a tile, and what is added to them */
    void (*tile)(size_t rows, size_t terms, const float *a, const float *b, float *sum);
    void (*finish)(const float *sum, size_t rows, size_t columns, const tile_target *to);
    /* dot products: of two rows, of a row with listed rows */
    float (*dot)(const float *a, const float *b, size_t n);
    void (*dots)(const float *a, const float *rows, size_t n, const uint32_t *index, size_t count,
                 float *out);
    /* sums of rows: of one with a factor, of listed ones with a factor each */
    void (*add_scaled)(float factor, const float *x, float *sum, size_t n);
    void (*add_chain)(const float *factor, const uint32_t *index, size_t count, const float *rows,
                      float *sum, size_t n);
    /* work on a row */
    void (*softmax)(float *row, size_t n, float scale);
    size_t (*find_above)(const float *row, const float *limit, size_t n, uint32_t *index);
    void (*adam)(float *w, adam_moments moments, const float *dw, size_t n, adam_step step);
    /* whether this build fuses operations that are separate in the source */
    int (*contracts)(void);
} kernel_set;

#endif /* !SC_ISA */

#ifdef SC_ISA

#define SC_COLUMNS (SC_VECTORS * SC_LANES)        /* columns of a tile */
#define SC_PARTIAL_VECTORS (PARTIALS / SC_LANES)  /* vectors of 16 partial sums */

/* The innermost loop of every product: adds one chain, up to 256 terms, to each element of a tile.
 * The chains are in registers; a row of b is loaded once for all rows of a. An addition waits 4
 * cycles for the one before it in its chain, and the processor starts one or two per cycle: a tile
 * has enough chains to keep it busy.
 * a: [rows][CHAIN_STRIDE]; b: [terms][COLUMNS]; sum: [rows][COLUMNS] */
SC_TARGET static SC_INLINE void KERNEL(tile_rows)(int rows, size_t terms, const float *a,
                                                  const float *b, float *sum) {
    SC_V chain[SC_TILE_ROWS][SC_VECTORS];
    SC_UNROLL for (int r = 0; r < rows; r++) {
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++) chain[r][v] = SC_SET(0.0f);
    }
    for (size_t k = 0; k < terms; k++, b += SC_COLUMNS) {
        SC_V column[SC_VECTORS];
        SC_UNROLL for (int v = 0; v < SC_COLUMNS; v += 16)
            SC_PREFETCH((uintptr_t)b + (CHAIN * SC_COLUMNS + v) * sizeof *b);  /* the next block */
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++)
            column[v] = SC_LOAD(b + v * SC_LANES);
        SC_UNROLL for (int r = 0; r < rows; r++) {
            SC_V factor = SC_SET(a[r * CHAIN_STRIDE + k]);
            SC_UNROLL for (int v = 0; v < SC_VECTORS; v++)
                chain[r][v] = SC_FMA(factor, column[v], chain[r][v]);
        }
    }
    SC_UNROLL for (int r = 0; r < rows; r++) {
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++, sum += SC_LANES)
            SC_STORE(sum, SC_LOAD(sum) + chain[r][v]);
    }
}

/* A tile, or the upper half of it if no more rows are left. */
SC_TARGET static void KERNEL(tile)(size_t rows, size_t terms, const float *a, const float *b,
                                   float *sum) {
    if (rows <= SC_TILE_ROWS / 2) KERNEL(tile_rows)(SC_TILE_ROWS / 2, terms, a, b, sum);
    else KERNEL(tile_rows)(SC_TILE_ROWS, terms, a, b, sum);
}

/* Part I's functions, compiled into vectors of this instruction set. Within larger functions clang
 * does not find the vectors. */
SC_TARGET static SC_APART void KERNEL(exponentials)(float *row, size_t n) {
    for (size_t e = 0; e < n; e++) row[e] = exp32(row[e]);
}

SC_TARGET static SC_APART void KERNEL(gelu)(float *x, size_t n, activation_kind kind) {
    gelu_forward(x, n, kind);
}

/* c = activation(sum + row_bias + bias + residual + 0) for some rows of a tile.
 * sum: [rows][COLUMNS], of which `columns` are used */
SC_TARGET static SC_INLINE void KERNEL(finish_rows)(const float *sum, size_t rows, size_t columns,
                                                    const tile_target *to) {
    static const float none[SC_COLUMNS];
    for (size_t r = 0; r < rows; r++, sum += SC_COLUMNS) {
        const float *bias = to->bias ? to->bias : none;
        const float *residual = to->residual ? to->residual + r * to->c_stride : none;
        float row_bias = to->row_bias ? to->row_bias[r] : 0;
        float x[SC_COLUMNS];
        for (size_t j = 0; j < columns; j++)
            x[j] = sum[j] + row_bias + bias[j] + residual[j] + 0.0f;
        if (to->activation != NO_ACTIVATION) KERNEL(gelu)(x, columns, to->activation);
        memcpy(to->c + r * to->c_stride, x, columns * sizeof *x);
    }
}

/* The same; the compiler knows how many columns there are, except at the edge of the matrix. */
SC_TARGET static void KERNEL(finish)(const float *sum, size_t rows, size_t columns,
                                     const tile_target *to) {
    if (columns == SC_COLUMNS) {
        KERNEL(finish_rows)(sum, rows, SC_COLUMNS, to);
    } else {
        KERNEL(finish_rows)(sum, rows, columns, to);
    }
}

/* out[i] = sum_e a[e] b[i][e], the bits of sc_dot_plain(), for 1 or 4 rows: sums of several rows
 * overlap, instead of waiting for their own additions, and share the loads of a. */
SC_TARGET static SC_INLINE void KERNEL(dot_rows)(int rows, const float *a, const float *const *b,
                                                 size_t n, float *out) {
    SC_V partial[4][SC_PARTIAL_VECTORS];
    float p[PARTIALS];
    SC_UNROLL for (int r = 0; r < rows; r++) {
        SC_UNROLL for (int v = 0; v < SC_PARTIAL_VECTORS; v++) partial[r][v] = SC_SET(0.0f);
    }
    for (size_t e = 0; e < n; e += PARTIALS) {
        SC_UNROLL for (int v = 0; v < SC_PARTIAL_VECTORS; v++) {
            SC_V x = SC_LOAD(a + e + v * SC_LANES);
            SC_UNROLL for (int r = 0; r < rows; r++) {
                SC_V y = SC_LOAD(b[r] + e + v * SC_LANES);
                partial[r][v] = SC_FMA(x, y, partial[r][v]);
            }
        }
    }
    SC_UNROLL for (int r = 0; r < rows; r++) {
        SC_UNROLL for (int v = 0; v < SC_PARTIAL_VECTORS; v++)
            SC_STORE(p + v * SC_LANES, partial[r][v]);
        out[r] = join(p);
    }
}

/* a, b: [n], n a multiple of 16 */
SC_TARGET static float KERNEL(dot)(const float *a, const float *b, size_t n) {
    float sum;
    KERNEL(dot_rows)(1, a, &b, n, &sum);
    return sum;
}

/* out[i] = the dot product of a and row index[i].
 * a: [n]; rows: [any number, n]; index, out: [count] */
SC_TARGET static void KERNEL(dots)(const float *a, const float *rows, size_t n,
                                   const uint32_t *index, size_t count, float *out) {
    size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float *const b[4] = { rows + index[i] * n, rows + index[i + 1] * n,
                                    rows + index[i + 2] * n, rows + index[i + 3] * n };
        KERNEL(dot_rows)(4, a, b, n, out + i);
    }
    for (; i < count; i++)
        out[i] = KERNEL(dot)(a, rows + index[i] * n, n);
}

/* sum = fma(factor, x, sum): the next term of n chains. x, sum: [n], n a multiple of 16 */
SC_TARGET static void KERNEL(add_scaled)(float factor, const float *x, float *sum, size_t n) {
    SC_V f = SC_SET(factor);
    for (size_t e = 0; e < n; e += SC_LANES)
        SC_STORE(sum + e, SC_FMA(f, SC_LOAD(x + e), SC_LOAD(sum + e)));
}

/* add_chain, below, for some neighbouring vectors, whose chains are in registers from the first row
 * to the last. rows, sum: at the first of these vectors */
SC_TARGET static SC_INLINE void KERNEL(add_strip)(int vectors, const float *factor,
                                                  const uint32_t *index, size_t count,
                                                  const float *rows, float *sum, size_t n) {
    SC_V chain[PARTIALS];
    SC_UNROLL for (int v = 0; v < vectors; v++) chain[v] = SC_SET(0.0f);
    for (size_t i = 0; i < count; i++) {
        const float *x = rows + index[i] * n;
        SC_V f = SC_SET(factor[i]);
        SC_UNROLL for (int v = 0; v < vectors; v++)
            chain[v] = SC_FMA(f, SC_LOAD(x + v * SC_LANES), chain[v]);
    }
    SC_UNROLL for (int v = 0; v < vectors; v++, sum += SC_LANES)
        SC_STORE(sum, SC_LOAD(sum) + chain[v]);
}

/* sum += sum_i factor[i] rows[index[i]], one chain: a product in which only the rows of b with a
 * factor other than 0 are visited. factor, index: [count]; rows: [any number, n]; sum: [n], n a
 * multiple of 16 */
SC_TARGET static void KERNEL(add_chain)(const float *factor, const uint32_t *index, size_t count,
                                        const float *rows, float *sum, size_t n) {
    enum { STRIP = 8, WIDTH = STRIP * SC_LANES };      /* enough chains to keep it busy */
    const float *end = sum + n;
    for (; sum + WIDTH <= end; sum += WIDTH, rows += WIDTH)
        KERNEL(add_strip)(STRIP, factor, index, count, rows, sum, n);
    for (; sum < end; sum += PARTIALS, rows += PARTIALS)
        KERNEL(add_strip)(SC_PARTIAL_VECTORS, factor, index, count, rows, sum, n);
}

/* The bits of softmax_forward(). */
SC_TARGET static void KERNEL(softmax)(float *row, size_t n, float scale) {
    float largest = row_max(row, n);
    for (size_t e = 0; e < n; e++) row[e] = scale * (row[e] - largest);
    KERNEL(exponentials)(row, n);
    float sum = row_sum(row, n);
    for (size_t e = 0; e < n; e++) row[e] /= sum;
}

SC_TARGET static void KERNEL(adam)(float *w, adam_moments moments, const float *dw, size_t n,
                                   adam_step step) {
    adam_update(w, moments, dw, n, step);
}

/* Lists in index the places where row[e] > limit[e]; returns how many there are. They are few, so
 * 32 places are looked at one by one only if a loop in vectors finds that there is one among them.
 * row, limit: [n], n a multiple of 32; index: [n] */
SC_TARGET static size_t KERNEL(find_above)(const float *row, const float *limit, size_t n,
                                           uint32_t *index) {
    size_t count = 0;
    for (size_t e = 0; e < n; e += 32) {
        int any = 0;
        for (size_t i = 0; i < 32; i++) any |= row[e + i] > limit[e + i];
        if (!any) continue;
        for (size_t i = e; i < e + 32; i++) {
            index[count] = (uint32_t)i;
            count += row[i] > limit[i];          /* otherwise the next one takes this place */
        }
    }
    return count;
}

/* Whether the compiler fuses a multiplication and an addition that are separate in the source. For
 * a = 1 + 2^-12, a * a is 1 + 2^-11 + 2^-24, which rounds to 1 + 2^-11: only a fused operation
 * leaves a rest. */
SC_TARGET static int KERNEL(contracts)(void) {
    volatile float a = 1.0f + 0x1p-12f, b = -(1.0f + 0x1p-11f), one = a;
    volatile double c = 1.0 + 0x1p-27, d = -(1.0 + 0x1p-26), two = c;
    return a * one + b != 0 || c * two + d != 0;
}

static const kernel_set KERNEL(kernels) = {
    .name = TEXT_OF(SC_ISA),
    .rows = SC_TILE_ROWS,
    .columns = SC_COLUMNS,
    .tile = KERNEL(tile),
    .finish = KERNEL(finish),
    .dot = KERNEL(dot),
    .dots = KERNEL(dots),
    .add_scaled = KERNEL(add_scaled),
    .add_chain = KERNEL(add_chain),
    .softmax = KERNEL(softmax),
    .find_above = KERNEL(find_above),
    .adam = KERNEL(adam),
    .contracts = KERNEL(contracts)
};

/* The next instruction set defines its own. */
#undef SC_ISA
#undef SC_TARGET
#undef SC_V
#undef SC_LANES
#undef SC_TILE_ROWS
#undef SC_VECTORS
#undef SC_SET
#undef SC_LOAD
#undef SC_STORE
#undef SC_FMA

#else /* !SC_ISA */

#if defined(__clang__)
#define SC_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define SC_UNROLL _Pragma("GCC unroll 32")
#else
#define SC_UNROLL
#endif
#if defined(__GNUC__)
#define SC_PREFETCH(address) __builtin_prefetch((const void *)(address), 0, 2)
#else
#define SC_PREFETCH(address) ((void)0)
#endif

#define PASTE2(a, b) a##_##b
#define PASTE(a, b) PASTE2(a, b)
#define TEXT_OF2(a) #a
#define TEXT_OF(a) TEXT_OF2(a)
#define KERNEL(name) PASTE(name, SC_ISA)         /* the kernel's name, as in dot_avx2 */

/* Plain C: vectors of one float. Here are all the words that an instruction set must define. */
#define SC_ISA scalar
#define SC_TARGET                                /* lets a function use the instructions */
#define SC_V float                               /* the vector type, which + adds */
#define SC_LANES 1                               /* floats in a vector */
#define SC_TILE_ROWS 4                           /* rows of a tile of a product */
#define SC_VECTORS 4                             /* vectors in a row of it */
#define SC_SET(x) (x)                            /* the same number in all lanes */
#define SC_LOAD(p) (*(p))
#define SC_STORE(p, v) (*(p) = (v))
#define SC_FMA(a, b, c) fma32(a, b, c)           /* a * b + c, rounded once */
#include "saeclip.c"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* AVX2 has 16 registers: 12 for the chains of a tile, 2 for a row of b, 1 for a number of a. */
#define SC_ISA avx2
#define SC_TARGET __attribute__((target("avx2,fma")))
#define SC_V __m256
#define SC_LANES 8
#define SC_TILE_ROWS 6
#define SC_VECTORS 2
#define SC_SET(x) _mm256_set1_ps(x)
#define SC_LOAD(p) _mm256_loadu_ps(p)
#define SC_STORE(p, v) _mm256_storeu_ps(p, v)
#define SC_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#include "saeclip.c"

/* AVX-512 has 32 registers: 28 for the chains of a tile. */
#define SC_ISA avx512
#define SC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define SC_V __m512
#define SC_LANES 16
#define SC_TILE_ROWS 14
#define SC_VECTORS 2
#define SC_SET(x) _mm512_set1_ps(x)
#define SC_LOAD(p) _mm512_loadu_ps(p)
#define SC_STORE(p, v) _mm512_storeu_ps(p, v)
#define SC_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#include "saeclip.c"

#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

/* NEON has 32 registers: 24 for the chains of a tile. */
#define SC_ISA neon
#define SC_TARGET
#define SC_V float32x4_t
#define SC_LANES 4
#define SC_TILE_ROWS 8
#define SC_VECTORS 3
#define SC_SET(x) vdupq_n_f32(x)
#define SC_LOAD(p) vld1q_f32(p)
#define SC_STORE(p, v) vst1q_f32(p, v)
#define SC_FMA(a, b, c) vfmaq_f32(c, a, b)
#include "saeclip.c"
#endif

/* What this build contains, the fastest first. */
static const kernel_set *const kernel_sets[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    &kernels_avx512,
    &kernels_avx2,
#elif defined(__aarch64__) && defined(__ARM_NEON)
    &kernels_neon,
#endif
    &kernels_scalar
};

static const kernel_set *kernels;    /* in use; NULL: none is chosen yet */

/* Whether this machine has the instructions. */
static int is_usable(const kernel_set *set) {
#if defined(__x86_64__) && defined(__GNUC__)
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (set == &kernels_avx2) return avx2;
    if (set == &kernels_avx512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
               && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return set != NULL;
}

int sc_instruction_set(const char *name) {
    for (size_t i = 0; i < COUNT(kernel_sets); i++) {
        const kernel_set *set = kernel_sets[i];
        if ((name && strcmp(name, set->name) != 0) || !is_usable(set)) continue;
        if (set->contracts() || kernels_scalar.contracts())
            return fail("this build contracts a * b + c (expected the option -ffp-contract=off)");
        kernels = set;
        return SC_OK;
    }
    return usage("SAECLIP_ISA=%s: not available in this machine or build (expected avx512, avx2, "
                 "neon or scalar)", name);
}

/* Chooses the fastest kernels if the caller of the library has not chosen any. */
static int choose_kernels(void) {
    return kernels ? SC_OK : sc_instruction_set(NULL);
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* How many parts of this size n things make; the last one may be smaller. */
static size_t parts_of(size_t n, size_t size) { return (n + size - 1) / size; }

/* --------------------------------------------------------------------------------------------
 * Matrix products, c = a b: the bits of sc_matmul_plain().
 *
 * A processor multiplies faster than it loads, so a number must be used many times once it has been
 * loaded. A product is computed in pieces that fit the registers and the caches (Goto and van de
 * Geijn, "Anatomy of high-performance matrix multiplication", 2008); sizes are AVX-512's:
 *
 *                       b: panels of 32 columns           registers: a tile of c, 14 x 32
 *                       +----+----+----+                  first-level cache: a block of b, 256 x
 *                       |////|    |    |                      32 numbers, contiguous since b is
 *                       |----|    |    | 256 rows             packed as [blocks][panels][256][32]
 *                       |    |    |    |                  second-level cache: a copied block of a,
 *       256 columns     +----+----+----+                      8 x 14 rows of 256 terms, and the
 *       +-----+-----+   +----+----+----+                      sums of its rows of c
 *       |/////|     |   |////|    |    | tile
 *       |-----|     |   |----|    |    |
 *       +-----+-----+   +----+----+----+
 *          a: [M, K]       c: [M, N]
 *
 * Some rows of a are multiplied with some panels at a time. For each 256 terms, one chain of each
 * element, the rows are copied, and for each panel the 8 tiles take turns with its block of b. The
 * copied rows are 272 floats apart: at 256 floats, a power of two, they would compete for the same
 * few places of the cache. Panels are padded with zeros after column N; rows of a tile after row M
 * are computed and not stored. Threads take different rows and panels, so no sum is divided.
 * -------------------------------------------------------------------------------------------- */

typedef sc_matrix packed_matrix;     /* data: [blocks][panels][256 or the rest][kernels->columns] */

static size_t panels_of(size_t N) { return parts_of(N, kernels->columns); }

/* Rows of A that are copied at once. */
static size_t rows_at_once(void) { return TILES_AT_ONCE * kernels->rows; }

/* Allocates a [K, N] matrix of zeros. */
static int new_packed(packed_matrix *b, size_t K, size_t N) {
    *b = (packed_matrix){ .K = K, .N = N, .panels = panels_of(N) };
    b->data = new_array(b->panels * kernels->columns, K * sizeof *b->data);
    return b->data ? SC_OK : SC_FAILED;
}

/* Where rows k to k + 255 of a panel begin; k: a multiple of 256 */
static float *block_of(const packed_matrix *b, size_t panel, size_t k) {
    return b->data + (k * b->panels + panel * smaller(b->K - k, CHAIN)) * kernels->columns;
}

/* Packs panels first .. last - 1 of the matrix whose element (k, j) is
 * w[k * k_stride + j * j_stride]; so a transposed matrix is packed as easily. */
static void pack_panels(packed_matrix *b, size_t first, size_t last, const float *w,
                        size_t k_stride, size_t j_stride) {
    size_t columns = kernels->columns;
    for (size_t panel = first; panel < last; panel++) {
        size_t width = smaller(b->N - panel * columns, columns);
        for (size_t block = 0; block < b->K; block += CHAIN) {
            size_t terms = smaller(b->K - block, CHAIN);
            const float *from = w + panel * columns * j_stride + block * k_stride;
            float *to = block_of(b, panel, block);
            if (j_stride == 1) {
                for (size_t k = 0; k < terms; k++)
                    memcpy(to + k * columns, from + k * k_stride, width * sizeof *to);
                continue;
            }
            for (size_t j = 0; j < width; j++) {
                for (size_t k = 0; k < terms; k++)
                    to[k * columns + j] = from[k * k_stride + j * j_stride];
            }
        }
    }
}

/* Each thread's copied block of A, [rows_at_once()][CHAIN_STRIDE], and the sums of its part of C,
 * panel by panel, [panels][rows_at_once()][columns]. */
static _Thread_local float copied[TILES_AT_ONCE * MAX_ROWS * CHAIN_STRIDE];
static _Thread_local float part_sums[TILES_AT_ONCE * MAX_ROWS * COLUMNS_AT_ONCE];

/* The target of the part that begins at this row and column. */
static tile_target part_of(const tile_target *whole, size_t row, size_t column) {
    tile_target part = *whole;
    part.c += row * whole->c_stride + column;
    if (whole->bias) part.bias += column;
    if (whole->row_bias) part.row_bias += row;
    if (whole->residual) part.residual += row * whole->c_stride + column;
    return part;
}

/* The product of M rows of a and panels first .. last - 1 of b, in parts: up to rows_at_once() rows
 * and panel_step panels, of COLUMNS_AT_ONCE columns at most. */
typedef struct {
    const float *a;                  /* [M, K], rows a_stride floats apart */
    size_t a_stride, M;
    const packed_matrix *b;          /* [K, N] */
    size_t first, last;
    const tile_target *to;           /* of these rows and panels */
    size_t row_parts, panel_step;
} product;

static int product_part(void *context, size_t part) {
    const product *p = context;
    const packed_matrix *b = p->b;
    size_t columns = kernels->columns;
    size_t row = part % p->row_parts * rows_at_once();
    size_t rows = smaller(p->M - row, rows_at_once());
    size_t first = p->first + part / p->row_parts * p->panel_step;
    const float *a = p->a + row * p->a_stride;
    for (size_t block = 0; block < b->K; block += CHAIN) {
        size_t terms = smaller(b->K - block, CHAIN);
        float *sum = part_sums;
        for (size_t r = 0; r < rows; r++)
            memcpy(copied + r * CHAIN_STRIDE, a + r * p->a_stride + block, terms * sizeof *a);
        for (size_t panel = first; panel < smaller(first + p->panel_step, p->last); panel++) {
            const float *b_block = block_of(b, panel, block);
            for (size_t r = 0; r < rows; r += kernels->rows, sum += kernels->rows * columns) {
                if (block == 0) memset(sum, 0, kernels->rows * columns * sizeof *sum);
                kernels->tile(rows - r, terms, copied + r * CHAIN_STRIDE, b_block, sum);
                if (block + terms < b->K) continue;
                /* the last terms: the tile is stored while it is in the cache */
                tile_target tile = part_of(p->to, row + r, (panel - p->first) * columns);
                kernels->finish(sum, smaller(rows - r, kernels->rows),
                                smaller(b->N - panel * columns, columns), &tile);
            }
        }
    }
    return SC_OK;
}

/* All parts of a product, by one thread. */
static void product_rows(const float *a, size_t a_stride, size_t M, const packed_matrix *b,
                         size_t first, size_t last, const tile_target *to) {
    product p = { a, a_stride, M, b, first, last, to, parts_of(M, rows_at_once()),
                  COLUMNS_AT_ONCE / kernels->columns };
    size_t parts = p.row_parts * parts_of(last - first, p.panel_step);
    for (size_t part = 0; part < parts; part++)
        product_part(&p, part);
}

/* c = activation(a b + bias + residual), on all threads: the bits of sc_matmul_plain(). Each part
 * is a task; parts have fewer panels if there would be too few tasks to keep all threads busy until
 * the end. a: [M, K], rows a_stride floats apart */
static int multiply(const float *a, size_t M, size_t a_stride, const packed_matrix *b,
                    tile_target to) {
    product p = { a, a_stride, M, b, 0, b->panels, &to, parts_of(M, rows_at_once()), 0 };
    if (M == 0 || b->N == 0) return SC_OK;
    size_t panel_parts = parts_of(SHARES * (size_t)thread_count(), p.row_parts);
    p.panel_step = smaller(parts_of(b->panels, panel_parts), COLUMNS_AT_ONCE / kernels->columns);
    return parallel_for(p.row_parts * parts_of(b->panels, p.panel_step), product_part, &p);
}

/* ============================================================================================
 * 9. The vision transformer, fast
 *
 * The forward pass of section 2 for a batch of images: the tokens of all images are the rows of
 * each product. It writes the activations at several hook points, can continue with others in
 * their place (an SAE's reconstruction), and stops where nothing later is needed.
 * ============================================================================================ */

/* One worker's memory for one head of one image, d = D / heads. */
typedef struct {
    packed_matrix keys;              /* [d, T], k transposed */
    packed_matrix values;            /* [T, d] */
    float *scores;                   /* [rows_at_once(), T padded], of some queries */
} head_scratch;

/* A forward pass. B images, T tokens, D width, H hidden, p patch; M = B T. It stays with the model
 * for the next call, as its arrays, 58 MB for 16 images of ViT-B/16, would otherwise be mapped and
 * cleared each time. Numbers between the end of a row of normed or wide and its stride are
 * undefined. */
typedef struct sc_forward_pass {
    const sc_model *model;
    size_t images, rows;             /* B, M */
    const unsigned char *pixels;     /* [B, S, S, 3], 8 bits, S pixels per side */
    const sc_tap *taps;              /* [count], the hook points */
    size_t count;
    size_t last;                     /* the last block that is needed, from 1 */
    const sc_layer *norm;            /* what norm_task applies */
    float *logits;                   /* [B, classes], or NULL */
    float *x;                        /* [M, D], the residual stream */
    float *normed;                   /* [M, D], a norm's output, or the attention's */
    float *wide;                     /* [M, the largest of 3 D, H, 3 p^2 and outputs] */
    size_t normed_stride, wide_stride;
    head_scratch *scratch;           /* [workers] */
    size_t room, workers;            /* rows and workers that there is memory for */
    memory_list memory;
} forward_pass;

enum { ROWS_PER_TASK = 32 };

/* layer_norm_forward() of one row. x: [n]; out: [n], padded with zeros to a multiple of 16 */
static void norm_row(float *out, const float *x, const sc_layer *norm, float epsilon, size_t n) {
    float mean = row_sum(x, n) / (float)n;
    for (size_t e = 0; e < n; e++)
        out[e] = x[e] - mean;
    for (size_t e = n; e < padded(n); e++)
        out[e] = 0;
    float variance = kernels->dot(out, out, padded(n)) / (float)n;
    float scale = 1.0f / sqrtf(variance + epsilon);
    for (size_t e = 0; e < n; e++)
        out[e] = out[e] * scale * norm->weight[e] + norm->bias[e];
}

/* Some rows of norm_rows(), below. */
static int norm_task(void *context, size_t task) {
    const forward_pass *pass = context;
    size_t D = pass->model->width;
    size_t first = task * ROWS_PER_TASK;
    for (size_t i = first; i < smaller(first + ROWS_PER_TASK, pass->rows); i++) {
        norm_row(pass->normed + i * pass->normed_stride, pass->x + i * D, pass->norm,
                 pass->model->epsilon, D);
    }
    return SC_OK;
}

/* normed = layer_norm(x) for all rows, on all threads. */
static int norm_rows(forward_pass *pass, const sc_layer *norm) {
    pass->norm = norm;
    return parallel_for(parts_of(pass->rows, ROWS_PER_TASK), norm_task, pass);
}

/* The patches of an image as rows of wide: [B (T - 1), 3 p^2]. */
static int patch_task(void *context, size_t image) {
    const forward_pass *pass = context;
    const sc_model *model = pass->model;
    size_t S = model->image_size;
    size_t patches = model->tokens - 1;
    for (size_t i = 0; i < patches; i++) {
        float *patch = pass->wide + (image * patches + i) * pass->wide_stride;
        patch_forward(patch, model, pass->pixels + image * S * S * 3, i);
    }
    return SC_OK;
}

/* embed_forward(): x = [class token; patches W + bias] + positions, then the first norm if the
 * model has one. */
static int embed(forward_pass *pass) {
    const sc_model *model = pass->model;
    const sc_layer *linear = &model->layer[PATCHES];
    const float *class_token = model->layer[CLASS_TOKEN].weight;
    const float *positions = model->layer[POSITIONS].weight;
    size_t D = model->width;
    size_t T = model->tokens;
    /* the class token, then the patches, in one product per image, to which positions are added */
    SC_TRY(parallel_for(pass->images, patch_task, pass));
    for (size_t image = 0; image < pass->images; image++) {
        float *x = pass->x + image * T * D;
        const float *patches = pass->wide + image * (T - 1) * pass->wide_stride;
        tile_target to = { .c = x + D, .c_stride = D, .bias = linear->bias,
                           .residual = positions + D };
        for (size_t d = 0; d < D; d++)
            x[d] = class_token[d] + positions[d] + 0.0f;
        SC_TRY(multiply(patches, T - 1, pass->wide_stride, &linear->matrix, to));
    }
    /* CLIP's norm */
    if (!model->layer[PRE].weight) return SC_OK;
    SC_TRY(norm_rows(pass, &model->layer[PRE]));
    for (size_t i = 0; i < pass->rows; i++)
        memcpy(pass->x + i * D, pass->normed + i * pass->normed_stride, D * sizeof *pass->x);
    return SC_OK;
}

/* attention_forward() for one head of one image, normed = softmax(q k^T / sqrt d) v, for some
 * queries at a time, so that their scores stay in a near cache.
 * q, k, v: [T, d], columns of qkv: [T, 3 D] */
static int head_task(void *context, size_t task) {
    const forward_pass *pass = context;
    const sc_model *model = pass->model;
    size_t D = model->width;
    size_t T = model->tokens;
    size_t d = D / model->heads;
    size_t image = task / model->heads;
    size_t head = task % model->heads;
    size_t stride = pass->wide_stride;
    size_t row = padded(T);
    const float *q = pass->wide + image * T * stride + head * d;
    const float *k = q + D;
    const float *v = k + D;
    float scale = 1.0f / sqrtf((float)d);
    head_scratch *s = &pass->scratch[worker];
    tile_target to_scores = { .c = s->scores, .c_stride = row };
    tile_target to_out = { .c = pass->normed + image * T * pass->normed_stride + head * d,
                           .c_stride = pass->normed_stride };
    /* all queries of the head share its keys and values, packed once */
    pack_panels(&s->keys, 0, s->keys.panels, k, 1, stride);
    pack_panels(&s->values, 0, s->values.panels, v, stride, 1);
    for (size_t first = 0; first < T; first += rows_at_once()) {
        size_t rows = smaller(T - first, rows_at_once());
        product_rows(q + first * stride, stride, rows, &s->keys, 0, s->keys.panels, &to_scores);
        /* how much each query attends to each token, then the values weighted by that */
        for (size_t t = 0; t < rows; t++)
            kernels->softmax(s->scores + t * row, T, scale);
        product_rows(s->scores, row, rows, &s->values, 0, s->values.panels, &to_out);
        to_out.c += rows * to_out.c_stride;
    }
    return SC_OK;
}

/* Whether anything is to be done with the output at a hook point. */
static int is_tapped(const forward_pass *pass, size_t layer, sc_hook hook) {
    for (size_t i = 0; i < pass->count; i++) {
        if (pass->taps[i].layer == layer && pass->taps[i].hook == hook) return 1;
    }
    return 0;
}

/* Copies an output to the taps at this hook point. A tap that replaces it changes the copy, which
 * is then copied back. output: [M, D], rows `stride` floats apart */
static int tap_output(const forward_pass *pass, size_t layer, sc_hook hook, float *output,
                      size_t stride) {
    size_t bytes = pass->model->width * sizeof *output;
    for (size_t i = 0; i < pass->count; i++) {
        const sc_tap *tap = &pass->taps[i];
        if (tap->layer != layer || tap->hook != hook) continue;
        for (size_t row = 0; row < pass->rows; row++)
            memcpy(tap->out + row * tap->stride, output + row * stride, bytes);
        if (!tap->replace) continue;
        SC_TRY(tap->replace(tap->context, tap->out, pass->rows));
        for (size_t row = 0; row < pass->rows; row++)
            memcpy(output + row * stride, tap->out + row * tap->stride, bytes);
    }
    return SC_OK;
}

/* x += a W + bias, the end of the attention or the MLP. Without a tap the product is added to x as
 * it is computed; with one it is first stored in `output`.
 * a, output: [M, any number], normed and wide or the other way round, with their strides */
static int add_layer(forward_pass *pass, const float *a, size_t a_stride, float *output,
                     size_t stride, const sc_layer *layer, size_t number, sc_hook hook) {
    size_t D = pass->model->width;
    tile_target to = { .c = pass->x, .c_stride = D, .bias = layer->bias,
                       .residual = pass->x };
    if (!is_tapped(pass, number, hook))
        return multiply(a, pass->rows, a_stride, &layer->matrix, to);
    to = (tile_target){ .c = output, .c_stride = stride, .bias = layer->bias };
    SC_TRY(multiply(a, pass->rows, a_stride, &layer->matrix, to));
    SC_TRY(tap_output(pass, number, hook, output, stride));
    for (size_t i = 0; i < pass->rows; i++)
        residual_forward(pass->x + i * D, output + i * stride, D);
    return SC_OK;
}

/* block_forward(): x = x + attention(norm1(x)); x = x + mlp(norm2(x)). number: of the block, from
 * 1; attn_only: whether the MLP is not needed */
static int forward_block(forward_pass *pass, size_t number, int attn_only) {
    const sc_model *model = pass->model;
    const sc_layer *block = &model->layer[(number - 1) * ROLES];
    float *normed = pass->normed;
    float *wide = pass->wide;
    size_t normed_stride = pass->normed_stride;
    size_t wide_stride = pass->wide_stride;
    tile_target to_qkv = { .c = wide, .c_stride = wide_stride, .bias = block[QKV].bias };
    tile_target to_hidden = { .c = wide, .c_stride = wide_stride, .bias = block[FC1].bias,
                              .activation = (activation_kind)model->activation };
    /* attention: normed = norm1(x); wide = qkv; normed = all heads side by side */
    SC_TRY(norm_rows(pass, &block[NORM1]));
    SC_TRY(multiply(normed, pass->rows, normed_stride, &block[QKV].matrix, to_qkv));
    SC_TRY(parallel_for(pass->images * model->heads, head_task, pass));
    SC_TRY(add_layer(pass, normed, normed_stride, wide, wide_stride, &block[OUT], number,
                     SC_ATTN));
    if (attn_only) return SC_OK;
    /* MLP: normed = norm2(x); wide = gelu(hidden) */
    SC_TRY(norm_rows(pass, &block[NORM2]));
    SC_TRY(multiply(normed, pass->rows, normed_stride, &block[FC1].matrix, to_hidden));
    SC_TRY(add_layer(pass, wide, wide_stride, normed, normed_stride, &block[FC2], number, SC_MLP));
    return tap_output(pass, number, SC_RESID, pass->x, model->width);
}

/* head_forward() of one image. It is a small part of the work, and takes the plain loops. */
static int logits_task(void *context, size_t image) {
    const forward_pass *pass = context;
    const sc_model *model = pass->model;
    vit_arrays a = { .x = pass->x + image * model->tokens * model->width,
                     .normed = pass->normed + image * pass->normed_stride,
                     .embedding = pass->wide + image * pass->wide_stride };
    head_forward(pass->logits + image * model->classes, &a, model);
    return SC_OK;
}

/* Allocates the arrays of a pass, unless those of an earlier one are large enough. */
static int prepare_pass(forward_pass *pass) {
    const sc_model *model = pass->model;
    const size_t widths[] = { 3 * model->width, model->hidden, model->outputs,
                              3 * model->patch * model->patch };
    size_t T = model->tokens;
    size_t d = model->width / model->heads;
    size_t workers = (size_t)thread_count();
    size_t widest = 0;
    if (pass->room >= pass->rows && pass->workers >= workers) return SC_OK;
    release(&pass->memory);
    pass->room = 0;
    for (size_t i = 0; i < COUNT(widths); i++) {
        if (widths[i] > widest) widest = widths[i];
    }
    pass->normed_stride = padded(model->width);
    pass->wide_stride = padded(widest);
    /* the batch's arrays, then each worker's own */
    const array_spec arrays[] = {
        ARRAY(pass->x, pass->rows, model->width),
        ARRAY(pass->normed, pass->rows, pass->normed_stride),
        ARRAY(pass->wide, pass->rows, pass->wide_stride),
        ARRAY(pass->scratch, workers, 1) };
    SC_TRY(new_arrays(&pass->memory, arrays, COUNT(arrays)));
    for (size_t w = 0; w < workers; w++) {
        head_scratch *s = &pass->scratch[w];
        s->keys = (packed_matrix){ .K = d, .N = T, .panels = panels_of(T) };
        s->values = (packed_matrix){ .K = T, .N = d, .panels = panels_of(d) };
        const array_spec own[] = {
            ARRAY(s->keys.data, s->keys.panels * kernels->columns, d),
            ARRAY(s->values.data, s->values.panels * kernels->columns, T),
            ARRAY(s->scores, rows_at_once(), padded(T)) };
        SC_TRY(new_arrays(&pass->memory, own, COUNT(own)));
    }
    pass->room = pass->rows;
    pass->workers = workers;
    return SC_OK;
}

/* The bits of vit_forward() for each image, at any number of hook points. */
int sc_model_forward(const sc_model *model, const unsigned char *pixels, size_t images,
                     const sc_tap *taps, size_t count, float *head) {
    forward_pass *pass = model->pass;
    size_t last = head ? model->blocks : 0;
    for (size_t i = 0; i < count; i++) {
        if (taps[i].layer > last) last = taps[i].layer;
    }
    if (last > model->loaded || !pass || (head && !model->outputs))
        return fail("%s: block %zu or the head is not loaded", model->file.path, last);
    pass->model = model;
    pass->images = images;
    pass->rows = images * model->tokens;
    pass->pixels = pixels;
    pass->taps = taps;
    pass->count = count;
    pass->logits = head;
    /* the forward pass, up to the last block that is needed */
    SC_TRY(prepare_pass(pass));
    SC_TRY(embed(pass));
    for (size_t number = 1; number <= last; number++) {
        /* a hook point at "attn" of the last block does not need the block's MLP */
        int needs_mlp = number < last || head || is_tapped(pass, last, SC_MLP)
                        || is_tapped(pass, last, SC_RESID);
        SC_TRY(forward_block(pass, number, !needs_mlp));
    }
    return head ? parallel_for(images, logits_task, pass) : SC_OK;
}

/* ============================================================================================
 * 10. Sparse codes
 *
 * Section 3 for a batch of tokens. Instead of a matrix f: [T, n], which would be mostly zeros, it
 * keeps codes: for each latent the tokens on which it fires, and its activations there.
 *
 * Encoding takes some latents at a time, each group the task of one thread: their rows of W_enc are
 * multiplied with all tokens, and the products become codes while they are in the cache. So W_enc
 * is read from memory once per batch. Decoding takes a tile of tokens at a time.
 * ============================================================================================ */

static int new_sae(sc_sae *sae, size_t d_in, size_t d_sae) {
    *sae = (sc_sae){ .d_in = d_in, .d_sae = d_sae, .stride = padded(d_in) };
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
    free(sae->threshold);
    free(sae->path);
    *sae = (sc_sae){ 0 };
}

typedef struct { sc_sae *sae; uint64_t seed; } initialisation;

static int initialise_task(void *context, size_t j) {
    const initialisation *start = context;
    initialise_latent(start->sae, j, start->seed);
    return SC_OK;
}

int sc_sae_init(sc_sae *sae, size_t d_in, size_t d_sae, uint64_t seed) {
    initialisation start = { sae, seed };
    int status = new_sae(sae, d_in, d_sae);
    if (status == SC_OK) status = parallel_for(d_sae, initialise_task, &start);
    if (status != SC_OK) sc_sae_close(sae);
    return status;
}

enum {
    TILE_TOKENS = 512,               /* the most tokens that are decoded at once */
    DENSE_SHARE = 8                  /* as a matrix if more than 1/8 of the codes are active */
};

/* One worker's memory. */
typedef struct {
    /* for encoding some latents */
    float *h;                        /* [rows_at_once(), h_stride], pre-activations */
    uint32_t *index;                 /* [h_stride + CHAIN], from find_above() */
    float *limit;                    /* [h_stride], of each token: above it h can be active */
    uint64_t *heap;                  /* [T, k], see offer_candidate() */
    /* for decoding a tile */
    float *dense;                    /* [TILE_TOKENS, CHAIN], codes of 256 latents as a matrix */
    packed_matrix weights;           /* [CHAIN, D], the rows of W_dec of 256 latents */
    float *apart;                    /* [stride], x' - x of a token */
} sae_scratch;

/* A batch of T tokens on its way through the SAE. Rows of D numbers are `stride` floats apart. */
typedef struct {
    const sc_sae *sae;
    size_t T;
    int reconstruct;                 /* whether x' is wanted */
    const float *given;              /* [T, D], the caller's, rows given_stride floats apart */
    size_t given_stride;
    float *x;                        /* [T, D], the same, padded with zeros */
    float *centred;                  /* [T, D], x - b_dec */
    packed_matrix columns;           /* [D, T], the same, a column per token */
    size_t h_stride;                 /* of h: room in groups of 32 for find_above(), and 16 more */
    size_t *start, *end;             /* [n]: latent j has codes start[j] .. end[j] - 1 */
    uint32_t *token;                 /* of each code, ascending for each latent */
    float *value;                    /* its activation */
    float *output;                   /* [T, D], x'; in training later its gradient */
    double *norm;                    /* [T], ||x|| */
    double *squared_error;           /* [T], ||x' - x||^2 */
    double *sum_f;                   /* [T], sum of f */
    double *active;                  /* [T], how many latents fire */
    size_t tiles;
    sae_scratch *scratch;            /* [workers] */
    memory_list memory;
} sae_batch;

static void free_batch(sae_batch *batch) {
    free(batch->token);
    free(batch->value);
    release(&batch->memory);
    *batch = (sae_batch){ 0 };
}

/* Allocates a batch of up to `room` tokens. Only those pages of the codes' room that are used take
 * memory. */
static int new_batch(sae_batch *batch, const sc_sae *sae, size_t room) {
    size_t workers = (size_t)thread_count();
    size_t k = sae->topk ? sae->k : 0;
    size_t codes = sae->topk ? k : sae->d_sae;           /* that a token can have */
    /* 16 more, so that rows of h are not a power of two apart (section 8) */
    size_t h_stride = parts_of(room, 32) * 32 + 16;
    *batch = (sae_batch){ .sae = sae, .reconstruct = 1, .columns = { .K = sae->d_in },
                          .h_stride = h_stride };
    const array_spec arrays[] = {
        ARRAY(batch->x, room, sae->stride),
        ARRAY(batch->centred, room, sae->stride),
        ARRAY(batch->output, room, sae->stride),
        ARRAY(batch->columns.data, panels_of(room) * kernels->columns, sae->d_in),
        ARRAY(batch->start, sae->d_sae, 1),
        ARRAY(batch->end, sae->d_sae, 1),
        ARRAY(batch->norm, room, 1),
        ARRAY(batch->squared_error, room, 1),
        ARRAY(batch->sum_f, room, 1),
        ARRAY(batch->active, room, 1),
        ARRAY(batch->scratch, workers, 1) };
    SC_TRY(new_arrays(&batch->memory, arrays, COUNT(arrays)));
    for (size_t w = 0; w < workers; w++) {
        sae_scratch *s = &batch->scratch[w];
        s->weights = (packed_matrix){ .N = sae->d_in, .panels = panels_of(sae->d_in) };
        const array_spec own[] = {
            ARRAY(s->h, rows_at_once(), h_stride),
            ARRAY(s->index, h_stride + CHAIN, 1),
            ARRAY(s->limit, h_stride, 1),
            ARRAY(s->heap, room, k),
            ARRAY(s->dense, TILE_TOKENS, CHAIN),
            ARRAY(s->weights.data, s->weights.panels * kernels->columns, CHAIN),
            ARRAY(s->apart, sae->stride, 1) };
        SC_TRY(new_arrays(&batch->memory, own, COUNT(own)));
    }
    batch->token = reserve_array(room, codes * sizeof *batch->token);
    batch->value = reserve_array(room, codes * sizeof *batch->value);
    return batch->token && batch->value ? SC_OK : SC_FAILED;
}

/* The first token of a tile, or the end of the tile before it. Tiles have about the same length,
 * of whole panels; only the last one may end within a panel. */
static size_t tile_start(const sae_batch *batch, size_t tile) {
    size_t panels = tile * batch->columns.panels / batch->tiles;
    return smaller(panels * kernels->columns, batch->T);
}

/* The first code of latent j on this token or a later one. */
static size_t code_from(const sae_batch *batch, size_t j, size_t token) {
    size_t first = batch->start[j];
    size_t end = batch->end[j];
    while (first < end) {
        size_t middle = (first + end) / 2;
        if (batch->token[middle] < token) first = middle + 1;
        else end = middle;
    }
    return first;
}

/* h = W_enc^T (x - b_dec) + b_enc of latents j .. j + count - 1: pre_activation_forward() with one
 * row per latent. first, end: panels of tokens; h: [count, their tokens], rows h_stride floats
 * apart */
static void pre_activations(const sae_batch *batch, size_t j, size_t count, size_t first,
                            size_t end, float *h, size_t h_stride) {
    const sc_sae *sae = batch->sae;
    const float *W_enc = sae->W_enc + j * sae->stride;
    tile_target to = { .c = h, .c_stride = h_stride, .row_bias = sae->b_enc + j };
    product_rows(W_enc, sae->stride, count, &batch->columns, first, end, &to);
}

/* topk_forward(), which keeps the k best latents of each token in a heap: no number in it is larger
 * than its children, those at 2 i + 1 and 2 i + 2. A candidate is the number h 2^32 + (2^32 - 1 -
 * j), with the bits of h, which order as integers since h > 0; so of equal ones the lower latent is
 * the better one. 0: no candidate yet. The new one takes the place of the least, the first. */
static void offer_candidate(uint64_t *heap, size_t k, uint64_t candidate) {
    size_t place = 0;
    for (size_t child = 1; child < k; child = 2 * place + 1) {
        if (child + 1 < k && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= candidate) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = candidate;
}

static uint64_t candidate_of(float h, size_t j) {
    return (uint64_t)bits_of_float(h) << 32 | (UINT32_MAX - j);
}

static float candidate_h(uint64_t candidate) {
    return float_of_bits((uint32_t)(candidate >> 32));
}

static size_t candidate_latent(uint64_t candidate) { return UINT32_MAX - (uint32_t)candidate; }

/* Copies, centres and packs the tokens of one panel. */
static int column_pack_task(void *context, size_t panel) {
    sae_batch *batch = context;
    const sc_sae *sae = batch->sae;
    size_t stride = sae->stride;
    size_t end = smaller((panel + 1) * kernels->columns, batch->T);
    for (size_t t = panel * kernels->columns; t < end; t++) {
        float *x = batch->x + t * stride;
        memcpy(x, batch->given + t * batch->given_stride, sae->d_in * sizeof *x);
        for (size_t d = 0; d < stride; d++)
            batch->centred[t * stride + d] = x[d] - sae->b_dec[d];
    }
    pack_panels(&batch->columns, panel, panel + 1, batch->centred, 1, stride);
    return SC_OK;
}

/* encode_forward() for a group of latents: relu_forward() gives codes, topk_forward() candidates in
 * the worker's heaps. Each worker takes groups in ascending order, as ties need it. */
static int encode_task(void *context, size_t group) {
    sae_batch *batch = context;
    const sc_sae *sae = batch->sae;
    sae_scratch *s = &batch->scratch[worker];
    size_t first = group * rows_at_once();
    size_t latents = smaller(sae->d_sae - first, rows_at_once());
    size_t used = first * batch->T;                      /* room for all tokens */
    pre_activations(batch, first, latents, 0, batch->columns.panels, s->h, batch->h_stride);
    for (size_t j = first; j < first + latents; j++) {
        const float *h = s->h + (j - first) * batch->h_stride;
        float threshold = sae->threshold ? sae->threshold[j] : 0;
        size_t found = kernels->find_above(h, s->limit, parts_of(batch->T, 32) * 32, s->index);
        batch->start[j] = used;
        for (size_t i = 0; i < found; i++) {
            size_t t = s->index[i];
            if (sae->topk) {
                uint64_t *heap = s->heap + t * sae->k;
                offer_candidate(heap, sae->k, candidate_of(h[t], j));
                s->limit[t] = candidate_h(*heap);
            } else {
                batch->token[used] = (uint32_t)t;
                batch->value[used] = h[t];
                used += h[t] > threshold;    /* otherwise the next one takes this place */
            }
        }
        batch->end[j] = used;
    }
    return SC_OK;
}

/* Joins the workers' candidates for the tokens of one panel, in the heaps of worker 0. */
static int join_task(void *context, size_t panel) {
    const sae_batch *batch = context;
    size_t k = batch->sae->k;
    size_t end = smaller((panel + 1) * kernels->columns, batch->T) * k;
    for (size_t i = panel * kernels->columns * k; i < end; i++) {
        uint64_t *heap = batch->scratch[0].heap + i / k * k;
        for (int w = 1; w < thread_count(); w++) {
            uint64_t candidate = batch->scratch[w].heap[i];
            if (candidate > *heap) offer_candidate(heap, k, candidate);
        }
    }
    return SC_OK;
}

/* The k best of each token become codes, sorted by latent: count, add up, place. */
static void select_codes(sae_batch *batch) {
    const uint64_t *heap = batch->scratch[0].heap;
    size_t k = batch->sae->k;
    size_t n = batch->sae->d_sae;
    memset(batch->end, 0, n * sizeof *batch->end);
    for (size_t i = 0; i < batch->T * k; i++) {
        if (heap[i]) batch->end[candidate_latent(heap[i])]++;
    }
    for (size_t j = 0, sum = 0; j < n; j++) {
        size_t codes = batch->end[j];
        batch->start[j] = batch->end[j] = sum;
        sum += codes;
    }
    for (size_t i = 0; i < batch->T * k; i++) {
        if (!heap[i]) continue;
        size_t place = batch->end[candidate_latent(heap[i])]++;
        batch->token[place] = (uint32_t)(i / k);
        batch->value[place] = candidate_h(heap[i]);
    }
}

/* out += f W_dec for latents block .. block + latents - 1, at most 256, so one chain of each sum.
 * f: s->dense; out: [tokens, stride] */
static void decode_dense(const sc_sae *sae, size_t tokens, size_t block, size_t latents, float *out,
                         sae_scratch *s) {
    tile_target to = { .c = out, .c_stride = sae->stride, .residual = out };
    const float *W_dec = sae->W_dec + block * sae->stride;
    s->weights.K = latents;
    pack_panels(&s->weights, 0, s->weights.panels, W_dec, sae->stride, 1);
    product_rows(s->dense, CHAIN, tokens, &s->weights, 0, s->weights.panels, &to);
}

/* decode_forward() for a tile of tokens, 256 latents, i.e. one chain, at a time, if x' is wanted.
 * In any case adds up the codes of each token: the terms of activity_sum(). */
static void decode_tile(const sae_batch *batch, size_t first, size_t tokens, sae_scratch *s) {
    static const float zero[CHAIN];
    const sc_sae *sae = batch->sae;
    size_t stride = sae->stride;
    float *out = batch->output + first * stride;
    float value[CHAIN];
    memset(out, 0, tokens * stride * sizeof *out);
    memset(batch->sum_f + first, 0, tokens * sizeof *batch->sum_f);
    memset(batch->active + first, 0, tokens * sizeof *batch->active);
    for (size_t block = 0; block < sae->d_sae; block += CHAIN) {
        size_t latents = smaller(sae->d_sae - block, CHAIN);
        size_t codes = 0;
        if (batch->reconstruct) memset(s->dense, 0, tokens * CHAIN * sizeof *s->dense);
        for (size_t i = 0; i < latents; i++) {
            size_t c = code_from(batch, block + i, first);
            for (; c < batch->end[block + i] && batch->token[c] < first + tokens; c++, codes++) {
                size_t t = batch->token[c];
                s->dense[(t - first) * CHAIN + i] = batch->value[c];
                batch->sum_f[t] += batch->value[c];
                batch->active[t]++;
            }
        }
        if (!batch->reconstruct) continue;
        if (codes * DENSE_SHARE > tokens * latents) {
            decode_dense(sae, tokens, block, latents, out, s);
            continue;
        }
        /* only rows of W_dec with f > 0 are visited */
        for (size_t t = 0; t < tokens; t++) {
            const float *f = s->dense + t * CHAIN;
            size_t count = kernels->find_above(f, zero, CHAIN, s->index);
            for (size_t i = 0; i < count; i++)
                value[i] = f[s->index[i]];
            kernels->add_chain(value, s->index, count, sae->W_dec + block * stride,
                               out + t * stride, stride);
        }
    }
    for (size_t t = 0; t < tokens; t++, out += stride) {
        for (size_t d = 0; d < sae->d_in; d++)
            out[d] = out[d] + sae->b_dec[d] + 0.0f;
    }
}

/* Decodes a tile; then the figures of each token that losses and statistics are made of, those of
 * token_errors(). */
static int tile_task(void *context, size_t tile) {
    sae_batch *batch = context;
    sae_scratch *s = &batch->scratch[worker];
    size_t stride = batch->sae->stride;
    size_t first = tile_start(batch, tile);
    size_t end = tile_start(batch, tile + 1);
    decode_tile(batch, first, end - first, s);
    for (size_t t = first; t < end; t++) {
        const float *x = batch->x + t * stride;
        const float *output = batch->output + t * stride;
        for (size_t d = 0; d < stride; d++)
            s->apart[d] = output[d] - x[d];
        batch->norm[t] = sqrtf(kernels->dot(x, x, stride));
        batch->squared_error[t] = 0;
        if (batch->reconstruct)
            batch->squared_error[t] = kernels->dot(s->apart, s->apart, stride);
    }
    return SC_OK;
}

/* Encodes and decodes T tokens, from 1 to as many as there is room for.
 * x: [T, D], rows x_stride floats apart */
static int run_sae(sae_batch *batch, const float *x, size_t x_stride, size_t T) {
    const sc_sae *sae = batch->sae;
    size_t threads = (size_t)thread_count();
    size_t panels = panels_of(T);
    batch->given = x;
    batch->given_stride = x_stride;
    batch->T = batch->columns.N = T;
    batch->columns.panels = panels;
    /* the same number of tiles for each thread */
    batch->tiles = threads * parts_of(panels, threads * (TILE_TOKENS / kernels->columns));
    batch->tiles = smaller(batch->tiles, panels);
    for (size_t w = 0; w < threads; w++) {
        sae_scratch *s = &batch->scratch[w];
        for (size_t t = 0; t < batch->h_stride; t++)
            s->limit[t] = t < T ? 0 : INFINITY;
        if (sae->topk) memset(s->heap, 0, T * sae->k * sizeof *s->heap);
    }
    SC_TRY(parallel_for(panels, column_pack_task, batch));
    SC_TRY(parallel_for(parts_of(sae->d_sae, rows_at_once()), encode_task, batch));
    if (sae->topk) {
        SC_TRY(parallel_for(panels, join_task, batch));
        select_codes(batch);
    }
    return parallel_for(batch->tiles, tile_task, batch);
}

/* The bits of sc_sae_encode_plain(): one batch, whose codes are written into a matrix of zeros. */
int sc_sae_encode(const sc_sae *sae, const float *x, size_t tokens, float *f) {
    size_t n = sae->d_sae;
    sae_batch batch;
    SC_TRY(check_k(sae));
    SC_TRY(check_rows(x, tokens, sae->d_in, "x"));
    SC_TRY(choose_kernels());
    if (tokens == 0) return SC_OK;
    int status = new_batch(&batch, sae, tokens);
    batch.reconstruct = 0;
    if (status == SC_OK) status = run_sae(&batch, x, sae->d_in, tokens);
    memset(f, 0, tokens * n * sizeof *f);
    for (size_t j = 0; j < n && status == SC_OK; j++) {
        for (size_t c = batch.start[j]; c < batch.end[j]; c++)
            f[batch.token[c] * n + j] = batch.value[c];
    }
    free_batch(&batch);
    return status;
}

/* The bits of sc_sae_decode_plain(), as one matrix product. */
int sc_sae_decode(const sc_sae *sae, const float *f, size_t tokens, float *reconstruction) {
    size_t n = sae->d_sae;
    tile_target to = { .c = reconstruction, .c_stride = sae->d_in, .bias = sae->b_dec };
    packed_matrix W_dec = { 0 };
    SC_TRY(check_rows(f, tokens, n, "f"));
    SC_TRY(choose_kernels());
    SC_TRY(new_packed(&W_dec, n, sae->d_in));
    pack_panels(&W_dec, 0, W_dec.panels, sae->W_dec, sae->stride, 1);
    int status = multiply(f, tokens, n, &W_dec, to);
    free(W_dec.data);
    return status;
}

/* ============================================================================================
 * 11. Training steps
 *
 * sc_train_step_plain() from sparse codes; section 4 has the formulas. A step on T tokens:
 *   rows of W_dec to unit norm                                unit_task(), 256 latents
 *   encode and decode                                         run_sae(), section 10
 *   losses; x' becomes its gradient, g that of the ghost loss gradient_task(), a tile
 *   sums over tokens                                          column_task(), 16 dimensions
 *   gradients of W_dec, W_enc and b_enc, projection, Adam     update_task(), 256 latents
 *   gradient of b_dec, Adam of the biases                     update_biases()
 *
 * A latent's gradients are sums over the tokens where it fires, usually few: the other tokens have
 * a factor 0, which changes no bit of a sum.
 * ============================================================================================ */

enum { LATENTS_AT_ONCE = 64 };       /* they share 256 tokens while these are in the cache */

/* The gradients of a latent so far, and what is needed for those of the next 256 tokens. */
typedef struct {
    size_t next;                     /* its next code */
    const uint32_t *token;           /* [count], those on which it fires, */
    float dh[CHAIN];                 /* and its dh there */
    size_t count;
    double db_enc;
} latent_gradient;

/* One worker's memory for the gradients of 64 latents. */
typedef struct {
    latent_gradient latent[LATENTS_AT_ONCE];
    uint32_t every[CHAIN];           /* all of the 256 tokens */
    float *e;                        /* [64, T], exp(h) of dead latents, else 0 */
    float *dW_enc, *dW_dec;          /* [64, stride] */
    float *dW_ghost;                 /* [64, stride], the part of dW_dec from the ghost loss */
} update_scratch;

/* The arrays of fast steps. W_dec and W_enc are updated latent by latent, so their gradients exist
 * only for the few latents at hand. */
typedef struct fast_trainer {
    sc_trainer *state;
    sc_sae *sae;                     /* the state's */
    sae_batch batch;
    int ghosts;                      /* whether this step has dead latents to revive */
    float *ghost;                    /* [T, stride], g, later its gradient dg */
    double *token_loss;              /* [T], the terms of a loss */
    double *deviation, *square;      /* [stride], sums over tokens of (x - mean)^2 and x^2 */
    double *sum_dx;                  /* [stride], the sum over tokens of dx' */
    float *db_enc, *db_dec;          /* [n], [stride] */
    float *W_enc_db;                 /* [blocks of 256 latents, stride], chains of W_enc db_enc */
    float l1;                        /* the gradient of the L1 loss where f > 0 */
    adam_step adam;
    update_scratch *scratch;         /* [workers] */
} fast_trainer;

/* Allocates the arrays of a trainer, of plain steps and of fast ones. */
static int prepare_trainer(sc_trainer *trainer) {
    size_t n = trainer->sae->d_sae;
    size_t stride = trainer->sae->stride;
    size_t T = trainer->tokens;
    size_t ghosts = trainer->options.ghost ? T : 0;
    size_t workers = (size_t)thread_count();
    memory_list *memory = &trainer->memory;
    SC_TRY(allocate(memory, &trainer->fast, 1, sizeof *trainer->fast));
    fast_trainer *t = trainer->fast;
    t->state = trainer;
    t->sae = trainer->sae;
    /* the state that checkpoints hold, then what a step computes, then each worker's own arrays;
     * biases are padded as rows are, so that Adam takes whole vectors */
    const array_spec arrays[] = {
        ARRAY(trainer->silent, n, 1),
        ARRAY(trainer->W_enc.m, n, stride),
        ARRAY(trainer->W_enc.v, n, stride),
        ARRAY(trainer->W_dec.m, n, stride),
        ARRAY(trainer->W_dec.v, n, stride),
        ARRAY(trainer->b_enc.m, padded(n), 1),
        ARRAY(trainer->b_enc.v, padded(n), 1),
        ARRAY(trainer->b_dec.m, stride, 1),
        ARRAY(trainer->b_dec.v, stride, 1),
        ARRAY(t->ghost, ghosts, stride),
        ARRAY(t->token_loss, T, 1),
        ARRAY(t->deviation, stride, 1),
        ARRAY(t->square, stride, 1),
        ARRAY(t->sum_dx, stride, 1),
        ARRAY(t->db_enc, padded(n), 1),
        ARRAY(t->db_dec, stride, 1),
        ARRAY(t->W_enc_db, parts_of(n, CHAIN), stride),
        ARRAY(t->scratch, workers, 1) };
    SC_TRY(new_arrays(memory, arrays, COUNT(arrays)));
    for (size_t w = 0; w < workers; w++) {
        update_scratch *s = &t->scratch[w];
        const array_spec own[] = {
            ARRAY(s->e, LATENTS_AT_ONCE, ghosts),
            ARRAY(s->dW_enc, LATENTS_AT_ONCE, stride),
            ARRAY(s->dW_dec, LATENTS_AT_ONCE, stride),
            ARRAY(s->dW_ghost, LATENTS_AT_ONCE, ghosts ? stride : 0) };
        SC_TRY(new_arrays(memory, own, COUNT(own)));
    }
    return new_batch(&t->batch, t->sae, T);
}

/* A trainer before its first step: see saeclip.h. */
sc_trainer *sc_trainer_new(sc_sae *sae, const sc_train_options *options, size_t tokens) {
    if (check_k(sae) != SC_OK || choose_kernels() != SC_OK) return NULL;
    if (sae->threshold) {
        fail("%s: a JumpReLU SAE cannot be trained (expected standard or topk)",
             sae->path ? sae->path : "the SAE");
        return NULL;
    }
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

void sc_trainer_free(sc_trainer *t) {
    if (!t) return;
    if (t->fast) free_batch(&t->fast->batch);
    release(&t->memory);
    free(t);
}

/* unit_row() for 256 latents. */
static int unit_task(void *context, size_t block) {
    const sc_sae *sae = context;
    size_t end = smaller(sae->d_sae, (block + 1) * CHAIN);
    for (size_t j = block * CHAIN; j < end; j++) {
        float *row = sae->W_dec + j * sae->stride;
        float norm = sqrtf(kernels->dot(row, row, sae->stride));
        if (!(norm > 0)) continue;                       /* a row of zeros stays as it is */
        for (size_t d = 0; d < sae->stride; d++)
            row[d] /= norm;
    }
    return SC_OK;
}

/* How many of latents first .. end - 1 are dead. */
static size_t count_dead(const sc_trainer *t, size_t first, size_t end) {
    size_t dead = 0;
    for (size_t j = first; j < end; j++)
        dead += (size_t)is_dead(t, j);
    return dead;
}

/* exp(h) of the dead ones among latents j .. j + count - 1, 0 for the others, as ghost_forward()
 * has them. first, end: panels of tokens; e: [count, tokens], rows e_stride floats apart */
static void dead_exponentials(const fast_trainer *t, size_t j, size_t count, size_t first,
                              size_t end, float *e, size_t e_stride) {
    size_t columns = kernels->columns;
    size_t tokens = smaller(end * columns, t->batch.T) - first * columns;
    pre_activations(&t->batch, j, count, first, end, e, e_stride);
    for (size_t i = 0; i < count; i++, e += e_stride) {
        int dead = is_dead(t->state, j + i);
        for (size_t k = 0; k < tokens; k++)
            e[k] = dead ? exp32(e[k]) : 0;
    }
}

/* g = W_dec^T exp(h) over the dead latents, for a tile: ghost_forward(), 256 latents at a time. */
static void ghost_decode(fast_trainer *t, size_t first, size_t tokens, sae_scratch *s) {
    const sc_sae *sae = t->sae;
    size_t panel = first / kernels->columns;
    size_t end_panel = panels_of(first + tokens);
    size_t row = t->batch.h_stride;
    float *out = t->ghost + first * sae->stride;
    memset(out, 0, tokens * sae->stride * sizeof *out);
    for (size_t block = 0; block < sae->d_sae; block += CHAIN) {
        size_t end = smaller(block + CHAIN, sae->d_sae);
        if (count_dead(t->state, block, end) == 0) continue;
        /* s->h has room for some latents; their rows become columns of s->dense */
        for (size_t j = block; j < end; j += rows_at_once()) {
            size_t count = smaller(end - j, rows_at_once());
            float *dense = s->dense + j - block;
            dead_exponentials(t, j, count, panel, end_panel, s->h, row);
            for (size_t i = 0; i < count; i++) {
                for (size_t k = 0; k < tokens; k++)
                    dense[k * CHAIN + i] = s->h[i * row + k];
            }
        }
        decode_dense(sae, tokens, block, end - block, out, s);
    }
}

/* mse_backward() and ghost_token() for a tile: x' becomes dx', and g becomes dg. */
static int gradient_task(void *context, size_t tile) {
    fast_trainer *t = context;
    const sc_sae *sae = t->sae;
    sae_batch *batch = &t->batch;
    sae_scratch *s = &batch->scratch[worker];
    size_t stride = sae->stride;
    size_t first = tile_start(batch, tile);
    size_t end = tile_start(batch, tile + 1);
    double scale = 1.0 / ((double)batch->T * (double)sae->d_in);
    if (t->ghosts) ghost_decode(t, first, end - first, s);
    for (size_t i = first; i < end; i++) {
        const float *x = batch->x + i * stride;
        float *output = batch->output + i * stride;
        float *g = t->ghost + i * stride;
        float factor = (float)(2 * scale / batch->norm[i]);
        t->token_loss[i] = 0;
        /* the ghost loss first, since it needs x' */
        if (t->ghosts)
            t->token_loss[i] = ghost_token(g, g, x, output, s->apart, batch->norm[i], sae->d_in,
                                           scale);
        for (size_t d = 0; d < stride; d++)
            output[d] = (output[d] - x[d]) * factor;
    }
    return SC_OK;
}

/* Sums over T rows of 16 columns, in the order of sum_in_blocks(): of x, or of (x - centre)^2 if
 * there is a centre. x: [T, stride]; centre, sum: [16] */
static void column_sums(const float *x, size_t T, size_t stride, const double *centre,
                        double *sum) {
    memset(sum, 0, PARTIALS * sizeof *sum);
    for (size_t block = 0; block < T; block += CHAIN) {
        double part[PARTIALS] = { 0 };
        for (size_t t = block; t < smaller(block + CHAIN, T); t++) {
            for (int d = 0; d < PARTIALS; d++) {
                double value = x[t * stride + d];
                if (centre) value = (value - centre[d]) * (value - centre[d]);
                part[d] += value;
            }
        }
        for (int d = 0; d < PARTIALS; d++) sum[d] += part[d];
    }
}

/* For 16 dimensions: what explained_variance() adds up, and the sum of dx' for b_dec_backward(). */
static int column_task(void *context, size_t task) {
    static const double zero[PARTIALS];
    fast_trainer *t = context;
    size_t T = t->batch.T;
    size_t stride = t->sae->stride;
    size_t first = task * PARTIALS;
    const float *x = t->batch.x + first;
    double mean[PARTIALS];
    /* sum of (x - mean)^2 and of x^2 */
    column_sums(x, T, stride, NULL, mean);
    for (int d = 0; d < PARTIALS; d++) mean[d] /= (double)T;
    column_sums(x, T, stride, mean, t->deviation + first);
    column_sums(x, T, stride, zero, t->square + first);
    /* by now the output is dx' */
    column_sums(t->batch.output + first, T, stride, NULL, t->sum_dx + first);
    return SC_OK;
}

/* decode_backward() and l1_backward() of latent j on 256 tokens. dW_dec: [stride], added to */
static void decoder_gradients(const fast_trainer *t, size_t j, size_t block, float *dW_dec,
                              latent_gradient *l) {
    const sae_batch *batch = &t->batch;
    const float *f = batch->value + l->next;
    size_t stride = t->sae->stride;
    size_t first = l->next;
    while (l->next < batch->end[j] && batch->token[l->next] < block + CHAIN) l->next++;
    l->token = batch->token + first;
    l->count = l->next - first;
    if (l->count == 0) return;
    /* df = W_dec . dx', and dh = df where f > 0; dW_dec += f dx', one chain */
    kernels->dots(t->sae->W_dec + j * stride, batch->output, stride, l->token, l->count, l->dh);
    for (size_t c = 0; c < l->count; c++)
        l->dh[c] += t->l1;
    kernels->add_chain(f, l->token, l->count, batch->output, dW_dec, stride);
}

/* ghost_backward() of latent j on 256 tokens or fewer: adds to dW_ghost, and to dh of every token,
 * so that l lists all of them. e: [256]; dW_ghost: [stride] */
static void ghost_gradients(const fast_trainer *t, size_t j, size_t block, const float *e,
                            float *dW_ghost, latent_gradient *l, update_scratch *s) {
    size_t stride = t->sae->stride;
    size_t tokens = smaller(t->batch.T - block, CHAIN);
    size_t listed = l->count;
    float de[CHAIN];
    /* from the end, so that nothing is overwritten before it is moved */
    for (size_t k = tokens; k-- > 0;) {
        float dh = 0;
        if (listed > 0 && l->token[listed - 1] == block + k) dh = l->dh[--listed];
        l->dh[k] = dh;
        s->every[k] = (uint32_t)(block + k);
    }
    kernels->dots(t->sae->W_dec + j * stride, t->ghost, stride, s->every, tokens, de);
    kernels->add_chain(e, s->every, tokens, t->ghost, dW_ghost, stride);
    for (size_t k = 0; k < tokens; k++)
        l->dh[k] += e[k] * de[k];
    l->token = s->every;
    l->count = tokens;
}

/* The gradients of latents first .. first + count - 1, in s. For all of them 256 tokens at a time,
 * one chain of each sum: in a near cache these serve all the latents. */
static void find_gradients(const fast_trainer *t, size_t first, size_t count, update_scratch *s) {
    const sae_batch *batch = &t->batch;
    size_t stride = t->sae->stride;
    int ghosts = t->ghosts && count_dead(t->state, first, first + count) > 0;
    /* all sums begin at 0 */
    for (size_t i = 0; i < count; i++) {
        s->latent[i].next = batch->start[first + i];
        s->latent[i].db_enc = 0;
    }
    memset(s->dW_dec, 0, count * stride * sizeof *s->dW_dec);
    memset(s->dW_enc, 0, count * stride * sizeof *s->dW_enc);
    if (ghosts) {
        memset(s->dW_ghost, 0, count * stride * sizeof *s->dW_ghost);
        dead_exponentials(t, first, count, 0, batch->columns.panels, s->e, batch->T);
    }
    for (size_t block = 0; block < batch->T; block += CHAIN) {
        /* decode_backward(), l1_backward() and ghost_backward() read rows of dx' and dg; then
         * encode_backward() reads those of x - b_dec */
        for (size_t i = 0; i < count; i++) {
            decoder_gradients(t, first + i, block, s->dW_dec + i * stride, &s->latent[i]);
            if (ghosts && is_dead(t->state, first + i))
                ghost_gradients(t, first + i, block, s->e + i * batch->T + block,
                                s->dW_ghost + i * stride, &s->latent[i], s);
        }
        /* dW_enc += dh (x - b_dec), one chain, and db_enc += dh */
        for (size_t i = 0; i < count; i++) {
            latent_gradient *l = &s->latent[i];
            double db_enc = 0;
            if (l->count == 0) continue;
            kernels->add_chain(l->dh, l->token, l->count, batch->centred, s->dW_enc + i * stride,
                               stride);
            for (size_t c = 0; c < l->count; c++)
                db_enc += l->dh[c];
            l->db_enc += db_enc;
        }
    }
    if (ghosts) kernels->add_scaled(1, s->dW_ghost, s->dW_dec, count * stride);
}

/* Gradients, project_gradient() and Adam of 256 latents; counts the steps since they fired. */
static int update_task(void *context, size_t block) {
    fast_trainer *t = context;
    sc_trainer *state = t->state;
    update_scratch *s = &t->scratch[worker];
    size_t stride = t->sae->stride;
    size_t end = smaller((block + 1) * CHAIN, t->sae->d_sae);
    float *W_enc_db = t->W_enc_db + block * stride;
    memset(W_enc_db, 0, stride * sizeof *W_enc_db);
    for (size_t j = block * CHAIN; j < end; j++) {
        size_t i = j % LATENTS_AT_ONCE;
        size_t row = j * stride;
        float *W_dec = t->sae->W_dec + row;
        float *W_enc = t->sae->W_enc + row;
        float *dW_dec = s->dW_dec + i * stride;
        float *dW_enc = s->dW_enc + i * stride;
        const adam_moments dec = { state->W_dec.m + row, state->W_dec.v + row };
        const adam_moments enc = { state->W_enc.m + row, state->W_enc.v + row };
        /* the gradients of this latent and those after it, less their component along W_dec */
        if (i == 0) find_gradients(t, j, smaller(end - j, LATENTS_AT_ONCE), s);
        float along = kernels->dot(dW_dec, W_dec, stride);
        kernels->add_scaled(-along, W_dec, dW_dec, stride);
        t->db_enc[j] = (float)s->latent[i].db_enc;
        /* the next term of this block's chain, with W_enc before its update */
        kernels->add_scaled(t->db_enc[j], W_enc, W_enc_db, stride);
        kernels->adam(W_dec, dec, dW_dec, stride, t->adam);
        kernels->adam(W_enc, enc, dW_enc, stride, t->adam);
        /* as count_silent_steps() */
        state->silent[j]++;
        if (t->batch.start[j] < t->batch.end[j]) state->silent[j] = 0;
        SC_TRY(check_latent(state, j));
    }
    return SC_OK;
}

/* b_dec_backward(), from its two sums, and Adam of the biases. W_enc^T db_enc is a product over the
 * latents, so each block of 256 has made one chain of it. */
static int update_biases(fast_trainer *t) {
    sc_trainer *state = t->state;
    sc_sae *sae = t->sae;
    for (size_t d = 0; d < sae->stride; d++) {
        float through_h = 0;
        for (size_t block = 0; block < parts_of(sae->d_sae, CHAIN); block++)
            through_h += t->W_enc_db[block * sae->stride + d];
        t->db_dec[d] = (float)t->sum_dx[d] - through_h;
    }
    kernels->adam(sae->b_dec, state->b_dec, t->db_dec, sae->stride, t->adam);
    kernels->adam(sae->b_enc, state->b_enc, t->db_enc, padded(sae->d_sae), t->adam);
    return check_biases(state);
}

/* Refuses a batch whose figures are not finite; *bad: the token at fault, or SIZE_MAX. */
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

/* One training step. x: [T, D], rows x_stride floats apart; bad: the token at fault, or SIZE_MAX */
static int train_step(sc_trainer *state, const float *x, size_t x_stride, sc_step *result,
                      size_t *bad) {
    fast_trainer *t = state->fast;
    const sae_batch *batch = &t->batch;
    size_t T = state->tokens;
    size_t D = t->sae->d_in;
    size_t n = t->sae->d_sae;
    *bad = SIZE_MAX;
    *result = (sc_step){ .lr = learning_rate(&state->options, state->step),
                         .dead = count_dead(state, 0, n) };
    t->ghosts = state->options.ghost && result->dead > 0;
    /* encode_forward() and decode_forward() */
    SC_TRY(parallel_for(parts_of(n, CHAIN), unit_task, t->sae));
    SC_TRY(run_sae(&t->batch, x, x_stride, T));
    SC_TRY(check_batch(batch, bad));
    /* losses(), and the gradients of x' and g */
    result->mse = mse_forward(t->token_loss, batch->norm, batch->squared_error, T, D);
    result->l0 = sum_in_blocks(batch->active, T) / (double)T;
    if (!t->sae->topk) {
        result->l1 = state->options.l1 * (sum_in_blocks(batch->sum_f, T) / (double)T);
        t->l1 = (float)(state->options.l1 / (double)T);
    }
    SC_TRY(parallel_for(batch->tiles, gradient_task, t));
    SC_TRY(parallel_for(t->sae->stride / PARTIALS, column_task, t));
    double error = sum_in_blocks(batch->squared_error, T);
    double deviation = sum_in_blocks(t->deviation, D);
    double square = sum_in_blocks(t->square, D);
    if (deviation > 0) result->explained_variance = 1 - error / deviation;
    if (square > 0) result->explained_variance_uncentred = 1 - error / square;
    result->ghost = sum_in_blocks(t->token_loss, T) / ((double)T * (double)D);
    result->loss = result->mse + result->l1 + result->ghost;
    if (!isfinite(result->loss)) return fail("the loss is not finite");
    /* gradients(), and the update of a latent as soon as its gradients are known */
    t->adam = next_adam_step(state, result->lr);
    SC_TRY(parallel_for(parts_of(n, CHAIN), update_task, t));
    state->step++;
    return update_biases(t);
}

/* The bits of sc_train_step_plain(). */
int sc_train_step(sc_trainer *t, const float *x, sc_step *result) {
    size_t bad;
    SC_TRY(check_tokens(x, t->tokens, t->sae->d_in));
    return train_step(t, x, t->sae->d_in, result, &bad);
}

/* ============================================================================================
 * 12. Counting
 *
 * sc_latent_measure_plain() for all latents at once, batch after batch, from sparse codes; and the
 * sums that sc_metrics_plain() is made of. Sums over images are exact and ties go to the lower
 * index, so that neither threads nor shards show in the result.
 * ============================================================================================ */

enum { HISTOGRAM_BINS = 256, BINS_PER_OCTAVE = 4, LOWEST_OCTAVE = -40, COUNTED_IMAGES = 16 };

/* A sum over a data set's tokens in float64, in blocks of 256, however they are divided into
 * batches: sum_in_blocks(), term by term. */
typedef struct { double total, part; size_t terms; } running_sum;

static void add_running(running_sum *sum, double value) {
    sum->part += value;
    sum->terms++;
    if (sum->terms % CHAIN != 0) return;
    sum->total += sum->part;
    sum->part = 0;
}

static double running_total(const running_sum *sum) { return sum->total + sum->part; }

typedef struct {
    int64_t images, tokens;          /* on which it fires */
    exact_sum means, activations;    /* of a(i) over images, of f over tokens */
    float sparsity, mean, entropy;   /* derived at the end, like */
    double sum;                      /* activations, rounded */
} latent_record;

/* What is measured over a data set or a shard of it, for n latents of width D and T tokens per
 * image. */
typedef struct {
    size_t n, D, T, K, P, classes, first_patch;
    double threshold;                /* of class_counts; if negative, images are counted */
    uint64_t images;                 /* so far */
    uint64_t data_digest, sae_digest;
    sc_origin origin;                /* of the activations */
    size_t shard, shards;            /* which part of the data set, from 1; 1 of 1: all of it */
    char **class_name;               /* [classes], or NULL */
    latent_record *latent;           /* [n] */
    sc_top *top, *patch;             /* [n, K], [n, P], descending; other: the label, the token */
    int64_t *class_counts;           /* [classes, n], NULL if not asked for */
    int64_t (*histogram)[HISTOGRAM_BINS];        /* [workers], of active values */
    running_sum mse, squared_error, l0, l1;
    running_sum (*x)[2];             /* [D], of x and x^2 */
    const sae_batch *batch;          /* the current images, encoded: */
    size_t count;                    /* how many, at most COUNTED_IMAGES */
    const size_t *image;             /* [count], their indices in the data set */
    const int64_t *label;            /* [count], -1 for none */
} statistics;

/* The arrays of statistics whose sizes are set. */
static int new_statistics(statistics *s, memory_list *memory, int class_counts) {
    const array_spec arrays[] = {
        ARRAY(s->latent, s->n, 1),
        ARRAY(s->top, s->n, s->K),
        ARRAY(s->patch, s->n, s->P),
        ARRAY(s->histogram, (size_t)thread_count(), 1),
        ARRAY(s->x, s->D, 1),
        ARRAY(s->class_counts, s->n, s->classes) };
    size_t count = COUNT(arrays);
    if (!class_counts) count--;
    SC_TRY(new_arrays(memory, arrays, count));
    for (size_t i = 0; i < s->n * s->K; i++) s->top[i] = nothing;
    for (size_t i = 0; i < s->n * s->P; i++) s->patch[i] = nothing;
    return SC_OK;
}

static const double quarter_octave[] = { 1, 1.18920712, 1.41421356, 1.68179283 };

/* The lower edge of a bin: quarters of an octave from 2^-40 to 2^24. */
static double bin_edge(int bin) {
    return ldexp(quarter_octave[bin % BINS_PER_OCTAVE], LOWEST_OCTAVE + bin / BINS_PER_OCTAVE);
}

/* The bin of an active value; values outside go into the first or last bin. */
static size_t histogram_bin(float f) {
    int exponent, quarter = BINS_PER_OCTAVE - 1;
    float m = 2 * frexpf(f, &exponent);                     /* f = m 2^(exponent - 1) */
    while (m < (float)quarter_octave[quarter]) quarter--;
    int bin = (exponent - 1 - LOWEST_OCTAVE) * BINS_PER_OCTAVE + quarter;
    if (bin < 0) return 0;
    return bin < HISTOGRAM_BINS ? (size_t)bin : HISTOGRAM_BINS - 1;
}

static void count_class(statistics *s, size_t j, int64_t label) {
    if (s->class_counts && label >= 0) s->class_counts[(size_t)label * s->n + j]++;
}

/* sc_latent_measure_plain() for 256 latents, of the current images. */
static int count_task(void *context, size_t block) {
    statistics *s = context;
    for (size_t j = block * CHAIN; j < smaller(s->n, (block + 1) * CHAIN); j++) {
        latent_record *l = &s->latent[j];
        double sum[COUNTED_IMAGES] = { 0 };
        for (size_t c = s->batch->start[j]; c < s->batch->end[j]; c++) {
            float f = s->batch->value[c];
            size_t i = s->batch->token[c] / s->T;
            size_t token = s->batch->token[c] % s->T;
            const sc_top patch = { f, (int64_t)s->image[i], (int64_t)token };
            sum[i] += f;
            l->tokens++;
            exact_add_float(&l->activations, f);
            s->histogram[worker][histogram_bin(f)]++;
            /* compared as float32, as PyTorch does */
            if (s->threshold >= 0 && f > (float)s->threshold) count_class(s, j, s->label[i]);
            if (token >= s->first_patch) keep_largest(s->patch + j * s->P, s->P, patch);
        }
        for (size_t i = 0; i < s->count; i++) {
            float mean = (float)(sum[i] / (double)s->T);
            const sc_top image = { mean, (int64_t)s->image[i], s->label[i] };
            if (!(mean > 0)) continue;
            l->images++;
            exact_add_float(&l->means, mean);
            if (s->threshold < 0) count_class(s, j, s->label[i]);
            keep_largest(s->top + j * s->K, s->K, image);
        }
    }
    return SC_OK;
}

/* Sums over tokens of one dimension, for the variance. */
static int sum_x_task(void *context, size_t d) {
    statistics *s = context;
    for (size_t t = 0; t < s->batch->T; t++) {
        double x = s->batch->x[t * s->batch->sae->stride + d];
        add_running(&s->x[d][0], x);
        add_running(&s->x[d][1], x * x);
    }
    return SC_OK;
}

/* Counts the current batch. *bad: the token whose activations are too large for exact sums,
 * which end at 2^63. */
static int count_batch(statistics *s, size_t *bad) {
    const sae_batch *b = s->batch;
    for (size_t t = 0; t < b->T; t++) {
        add_running(&s->mse, b->squared_error[t] / b->norm[t]);
        add_running(&s->squared_error, b->squared_error[t]);
        add_running(&s->l0, b->active[t]);
        add_running(&s->l1, b->sum_f[t]);
        *bad = t;
        if (!(b->sum_f[t] < 0x1p40))
            return fail("activations of %g are too large for exact sums", b->sum_f[t]);
    }
    if (b->reconstruct) SC_TRY(parallel_for(s->D, sum_x_task, s));
    s->images += s->count;
    return parallel_for(parts_of(s->n, CHAIN), count_task, s);
}

static double mean_activation(const latent_record *l) {
    return l->images ? exact_value(l->means) / (double)l->images : 0;
}

/* Derives the rest from the counts and joins the workers' histograms. */
static void derive_statistics(statistics *s) {
    for (size_t j = 0; j < s->n; j++) {
        latent_record *l = &s->latent[j];
        l->sparsity = s->images ? (float)((double)l->images / (double)s->images) : 0;
        l->mean = (float)mean_activation(l);
        l->entropy = (float)top_entropy(s->top + j * s->K, s->K);
        l->sum = exact_value(l->activations);
    }
    for (int w = 1; w < thread_count(); w++) {
        for (size_t b = 0; b < HISTOGRAM_BINS; b++) {
            s->histogram[0][b] += s->histogram[w][b];
            s->histogram[w][b] = 0;
        }
    }
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

enum { MAX_OPERANDS = 1024 };        /* also the most shards */

/* What the command line says. Texts are NULL and numbers 0 where they are not given, unless the
 * option has a default (see the table of options in section 25). */
typedef struct {
    const char *output, *model, *acts, *stats, *also, *latents, *format, *dtype;
    const char *order, *log, *checkpoint, *init, *b_dec, *arch, *mask, *patch, *shard;
    const char *operand[MAX_OPERANDS + 1];   /* IMAGES or files; NULL ends them */
    const char *origin[SC_ORIGIN_KEYS];      /* without model, layer and square */
    const char *sae[SC_MAX_TAPS];
    size_t saes;
    long layer, threads, size, square, limit, k, expansion, d_sae, batch, steps, warmup;
    long b_dec_images, dead_window, checkpoint_every, top, top_patches, class_index, seed;
    double l1, lr, epochs, threshold, max_frequency, rtol, atol;
    int quiet, skip_bad, ghost, resume, class_counts, dense, reconstruction, image_means, common;
} options;

static int quiet, line_open;         /* line_open: a line of progress stands on the terminal */

/* The length of the UTF-8 character at text, and its code point. Where a byte is invalid (stray, of
 * an overlong form or a surrogate, or above U+10FFFF; RFC 3629), 0 and the byte. */
static size_t utf8_length(const char *text, uint32_t *code) {
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    const unsigned char *byte = (const unsigned char *)text;
    uint32_t value = *code = byte[0];
    size_t length = 0;
    if (value < 0x80) return 1;
    while (value << length & 0x80) length++;             /* its leading one bits */
    if (length < 2 || length > 4) return 0;
    value &= 0x7fu >> length;
    for (size_t i = 1; i < length; i++) {
        if (byte[i] >> 6 != 2) return 0;
        value = value << 6 | (byte[i] & 0x3f);
    }
    if (value < least[length]) return 0;
    if (value >> 11 == 0x1b || value > 0x10ffff) return 0;
    *code = value;
    return length;
}

/* Whether a terminal may obey a character: ASCII's and Latin-1's control characters, and those that
 * end lines or reverse text. */
static int is_control(uint32_t code) {
    return code < ' ' || (code >= 0x7f && code < 0xa0) || (code >= 0x2028 && code <= 0x202e)
        || (code >= 0x2066 && code <= 0x2069);
}

/* A text that is safe to show: bytes of control characters and of invalid UTF-8 become \xNN. Every
 * message, table, figure and log prints foreign texts through this; CSV, XML and so on escape only
 * their own marks. out: [room], of which the last 17 bytes may stay unused */
static const char *printable(const char *text, char *out, size_t room) {
    size_t used = 0;
    while (*text && used + 4 * 4 < room) {               /* a character takes at most 4 x \xNN */
        uint32_t code;
        size_t length = utf8_length(text, &code);
        int harmless = length > 0 && !is_control(code);
        if (length == 0) length = 1;
        for (; length > 0; length--, text++)
            used += (size_t)sprintf(out + used, harmless ? "%c" : "\\x%02x", (unsigned char)*text);
    }
    out[used] = '\0';
    return out;
}

enum { TEXT_ROOM = 600 };            /* bytes of a text that is shown */

/* The same in one of 8 buffers in turn, since a line may show several texts. For the main thread
 * only. */
static const char *shown(const char *text) {
    static char room[8][TEXT_ROOM];
    static unsigned next;
    return printable(text, room[next++ % 8], TEXT_ROOM);
}

/* Prints a line on standard error, unless --quiet was given. */
SC_PRINTF(1, 2) static void note(const char *format, ...) {
    char line[sizeof error_text], safe[4 * sizeof line];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (quiet) return;
    if (line_open) putc('\n', stderr);
    fprintf(stderr, "saeclip: %s\n", printable(line, safe, sizeof safe));
    line_open = 0;
}

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Progress on standard error: redrawn every 0.2 s on a terminal, otherwise one line every 20 s. The
 * first call only takes the time, and a run shorter than that shows nothing. what: "step" or
 * "image"; done, total: how many of them; words: printed at the end of the line */
static void show_progress(const char *what, uint64_t done, uint64_t total, const char *words) {
    static double first, last;
    static uint64_t begin;
    double now = seconds_now(), since = now - last, pause = 20;
    int terminal = isatty(STDERR_FILENO);
    if (terminal) pause = 0.2;
    if (first == 0 || done <= begin) {                   /* a pass begins */
        first = last = now;
        begin = done;
        return;
    }
    if (done == total) since = now - first;              /* the end is always shown */
    if (quiet || since < pause) return;
    last = now;
    line_open = terminal && done < total;
    double rate = (double)(done - begin) / (now - first);
    fprintf(stderr, "%s%s %ju of %ju, %.1f %ss/s, %.0f s left%s",
            terminal ? "\r\033[K" : "saeclip: ", what, (uintmax_t)done, (uintmax_t)total, rate,
            what, (double)(total - done) / rate, words);
    if (!line_open) putc('\n', stderr);
}

/* Whether a text is one of the words in "one|another". */
static int is_choice(const char *words, const char *text) {
    char one[100], all[100];
    snprintf(one, sizeof one, "|%.90s|", text);
    snprintf(all, sizeof all, "|%s|", words);
    return !strchr(text, '|') && strstr(all, one) != NULL;
}

/* The whole text as a number from least to most. what: the option or the metadata's key */
static int parse_number(const char *text, const char *what, double least, double most,
                        double *value) {
    char *end;
    *value = strtod(text, &end);
    if (end > text && *end == '\0' && *value >= least && *value <= most) return SC_OK;
    return usage("%s: invalid value '%s' (expected a number from %g to %g)", what, text, least,
                 most);
}

/* "R,G,B" */
static int parse_triple(const char *text, const char *what, float *value) {
    char more;
    int numbers = sscanf(text, "%f,%f,%f%c", &value[0], &value[1], &value[2], &more);
    if (numbers == 3 && first_not_finite(value, 3) == 3) return SC_OK;
    return usage("%s: invalid value '%s' (expected R,G,B, three numbers)", what, text);
}

/* ============================================================================================
 * 14. Files
 *
 * Numbers as bytes, digests, JSON, safetensors in, atomic output, safetensors out.
 *
 * A safetensors file (github.com/huggingface/safetensors) is 8 bytes with the size of the header,
 * the header, and the tensors' data without gaps, all little-endian. The header is JSON:
 *     {"__metadata__": {"key": "value", ...},
 *      "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
 * Files may be damaged or hostile: every claim of a header is checked before it is used, and memory
 * is taken only in proportion to the header's size in the file.
 * ============================================================================================ */

/* Copies count numbers of `size` bytes between memory and file, either way. On a big-endian machine
 * byte b of a number changes places with byte b ^ (size - 1). */
static void copy_numbers(void *restrict to, const void *restrict from, size_t count,
                         size_t size) {
    const union { uint16_t number; unsigned char first; } one = { 1 };
    const size_t swap = one.first ? 0 : size - 1;
    unsigned char *restrict out = to;
    const unsigned char *restrict in = from;
    for (size_t i = 0; i < count * size; i++)
        out[i ^ swap] = in[i];
}

/* IEEE 754 binary16: sign, 5 bits of exponent (bias 15), 10 bits of fraction. Exact. */
static float float_of_half(uint32_t half) {
    uint32_t sign = (half & 0x8000) << 16;
    uint32_t rest = (half & 0x7fff) << 13;
    float value = float_of_bits(rest) * 0x1p112f;        /* float's bias is 127 = 15 + 112 */
    if (rest >= 0x7c00 << 13) value = float_of_bits(rest | 0x7f800000);    /* infinity, NaN */
    return float_of_bits(sign | bits_of_float(value));
}

/* Rounds to nearest, ties to even. value: below 65520, from where on it would be infinity */
static uint16_t half_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t rest = bits & 0x7fffffff;
    if (rest >= 0x38800000) {                            /* 2^-14, the smallest normal half */
        uint32_t half_unit = 0xfff + (rest >> 13 & 1);
        rest = (rest - (112u << 23) + half_unit) >> 13;
    } else {                                             /* the sum is rounded to units of 2^-24 */
        rest = bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f);
    }
    return (uint16_t)(sign | rest);
}

/* Adds a number to a digest, which begins as 0. Against accidents, not attacks. The factor, 2^64
 * over the golden ratio, is odd, so that a step is one-to-one: a single change always shows. */
static void digest64_number(uint64_t *digest, uint64_t number) {
    *digest = (*digest ^ number) * 0x9e3779b97f4a7c15u + 1;
    *digest ^= *digest >> 32;
}

/* Adds a name as print_json() writes it, so that packing keeps a data set's digest. */
static void digest64_name(uint64_t *digest, const char *name) {
    uint32_t code;
    for (size_t length; *name; name += length) {
        length = utf8_length(name, &code);
        digest64_number(digest, code);
        if (length == 0) length = 1;
    }
    digest64_number(digest, 0);                          /* its end */
}

/* --- JSON (RFC 8259): safetensors headers, lists of names, SAELens's configurations ---
 *
 * The text is a copy that ends with a NUL, which no rule accepts: no other bound is needed. Strings
 * are decoded in place, which never lengthens them; the closing quote makes room for a NUL. The
 * first error moves to the text's end, where nothing more is accepted and lists end, so that
 * callers may check at the end. */

typedef struct {
    const char *what;                /* whose JSON this is, for errors */
    char *text, *end;                /* where it begins, and its NUL */
    char *at;                        /* what comes next; never a blank */
    int failed;                      /* the status of the first error */
} json;

/* Fails unless a condition is met. */
static void json_expect(json *j, int met, const char *expected) {
    if (met || j->failed) return;
    j->failed = fail("%s: JSON byte %td: expected %s", j->what, j->at - j->text, expected);
    j->at = j->end;
}

/* Skips these bytes and the blanks after them. */
static void json_skip(json *j, size_t bytes) {
    j->at += bytes;
    j->at += strspn(j->at, " \t\n\r");
}

/* text: [length + 1], ends with a NUL and is changed; what: for errors */
static json json_begin(const char *what, char *text, size_t length) {
    json j = { .what = what, .text = text, .end = text + length, .at = text };
    json_skip(&j, 0);
    return j;
}

static int json_end(json *j) {
    json_expect(j, j->at == j->end, "nothing more");
    return j->failed;
}

/* Whether c comes next; if so it is skipped. */
static int json_take(json *j, char c) {
    int next = *j->at == c;
    if (next) json_skip(j, 1);
    return next;
}

/* The value of "\uXXXX" at text; 0, which no string may hold, if it is not there. */
static uint32_t json_unit(const char *text) {
    char digits[5] = "";
    if (strncmp(text, "\\u", 2) != 0) return 0;
    if (strspn(text + 2, "0123456789abcdefABCDEF") < 4) return 0;
    memcpy(digits, text + 2, 4);
    return (uint32_t)strtoul(digits, NULL, 16);
}

/* Reads a string and decodes it: `to` follows j->at and never overtakes it. */
static char *json_string(json *j) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    static const unsigned char leads[] = { 0, 0xc0, 0xe0, 0xf0 };
    json_expect(j, *j->at == '"', "a string");
    if (j->failed) return j->end;
    char *start = ++j->at, *to = start;
    while (*j->at != '"') {
        uint32_t point, low = 0;
        size_t length = utf8_length(j->at, &point);
        if (point < ' ') length = 0;                     /* the NUL at the end, too */
        if (point == '\\') {                             /* an escape */
            const char *letter = strchr(letters, j->at[1]);
            point = json_unit(j->at);
            if (point >> 10 == 0x36) low = json_unit(j->at + 6);         /* of a surrogate pair */
            if (low >> 10 == 0x37) point = 0x10000 + ((point & 0x3ff) << 10 | (low & 0x3ff));
            length = point < 0x10000 ? 6 : 12;
            if (point == 0 || point >> 11 == 0x1b) length = 0;           /* or half a pair */
            if (letter && *letter) {
                point = (unsigned char)meanings[letter - letters];
                length = 2;
            }
        }
        json_expect(j, length > 0, "valid UTF-8, a valid escape or the string's end");
        if (j->failed) return j->end;
        j->at += length;
        int more = (point >= 0x80) + (point >= 0x800) + (point >= 0x10000);
        *to++ = (char)(leads[more] | point >> 6 * more); /* UTF-8: a lead byte, 0 to 3 more */
        for (int i = more - 1; i >= 0; i--)
            *to++ = (char)(0x80 | (point >> 6 * i & 0x3f));
    }
    json_skip(j, 1);
    *to = '\0';
    return start;
}

/* Where element `index` of a list in these brackets begins, NULL at the end. Of an object this is
 * the key, and the value comes next. */
static char *json_next(json *j, size_t index, const char *brackets) {
    if (index == 0) json_expect(j, json_take(j, brackets[0]), brackets);
    if (json_take(j, brackets[1])) return NULL;
    if (index > 0) json_expect(j, json_take(j, ','), "a comma or the end of the list");
    char *element = j->at;
    if (*brackets == '{') {
        element = json_string(j);
        json_expect(j, json_take(j, ':'), "':'");
    }
    if (j->failed) return NULL;
    return element;
}

/* An array of at most `most` sizes; returns how many. */
static size_t json_sizes(json *j, size_t *sizes, size_t most) {
    size_t n = 0;
    for (const char *text; (text = json_next(j, n, "[]")) != NULL; n++) {
        size_t digits = strspn(text, "0123456789");
        int whole = digits > 0 && (*text != '0' || digits == 1);     /* JSON forbids 01 */
        errno = 0;                                                   /* set on overflow */
        unsigned long long value = strtoull(text, NULL, 10);
        json_skip(j, digits);
        json_expect(j, whole && errno == 0 && value <= SIZE_MAX,
                    "a whole number that this machine can address");
        json_expect(j, n < most, "no more numbers");
        if (n < most) sizes[n] = (size_t)value;
    }
    return n;
}

/* Called with a scalar's innermost key, "b" for both in {"a": {"b": [1, 2]}}, and its text. */
typedef int scalar_function(void *context, const char *key, const char *text);

/* Passes on every scalar in a value, in order. key: the value's own */
static int json_scalars(json *j, const char *key, int depth, scalar_function *take,
                        void *context) {
    char scalar[64] = "", *text = j->at, *name;
    const char *brackets = *text == '{' ? "{}" : "[]";
    json_expect(j, depth < 32, "less nesting");
    /* A list; the elements of an array have the array's key. */
    if (*text == *brackets) {
        for (size_t i = 0; (name = json_next(j, i, brackets)) != NULL; i++) {
            if (*brackets == '[') name = (char *)(uintptr_t)key;
            SC_TRY(json_scalars(j, name, depth + 1, take, context));
        }
        return j->failed;
    }
    /* A string, or a word or number, copied to end with a NUL. */
    if (*text == '"') {
        text = json_string(j);
    } else {
        size_t length = strcspn(text, ",]} \t\r\n");
        json_expect(j, length > 0 && length < sizeof scalar, "a value");
        if (j->failed) return j->failed;
        text = memcpy(scalar, text, length);
        json_skip(j, length);
    }
    if (j->failed) return j->failed;
    return take(context, key, text);
}

/* Reads a JSON array of strings, the form that lists of names have in metadata. *out: the pointers
 * and behind them the strings, in one block that free() releases. */
static int json_string_array(const char *text, const char *what, char ***out, size_t *count) {
    size_t length = strlen(text), most = 1;              /* most: strings there can be */
    for (const char *c = text; *c; c++)
        most += *c == ',';
    char **list = new_array(most * sizeof *list + length + 1, 1);
    if (!list) return SC_FAILED;
    char *copy = memcpy(list + most, text, length + 1);
    json j = json_begin(what, copy, length);
    for (*count = 0; json_next(&j, *count, "[]"); ++*count)
        list[*count] = json_string(&j);
    if (json_end(&j) == SC_OK) *out = list;
    else free(list);
    return j.failed;
}

/* Prints text as a JSON string between quotes; slash begins an escape. A byte that is not part of
 * valid UTF-8 becomes the character of its value, as in Latin-1. '<' is escaped too: in a web page
 * it could end the script that holds the string. */
static void print_quoted(FILE *out, const char *text, const char *slash, const char *quote) {
    uint32_t code;
    fputs(quote, out);
    for (size_t length; *text; text += length) {
        length = utf8_length(text, &code);
        int plain = length > 0 && !is_control(code) && !strchr("\\\"<", *text);
        if (plain) fwrite(text, 1, length, out);
        else fprintf(out, "%su%04x", slash, (unsigned)code);
        if (length == 0) length = 1;
    }
    fputs(quote, out);
}

static void print_json(FILE *out, const char *text) {
    print_quoted(out, text, "\\", "\"");
}

/* --- Reading safetensors --- */

enum { MAX_HEADER = 100000000 };     /* the reference implementation's limit */

/* In the order of sc_dtype. */
static const struct { const char *name; size_t size; } dtypes[] = {
    { "F32", 4 }, { "F16", 2 }, { "BF16", 2 }, { "F64", 8 }, { "I64", 8 }, { "I32", 4 },
    { "U8", 1 }, { "BOOL", 1 }, { "I8", 1 }, { "I16", 2 }, { "U16", 2 }, { "U32", 4 },
    { "U64", 8 }, { "C64", 8 }, { "F8_E4M3", 1 }, { "F8_E5M2", 1 }, { "F8_E8M0", 1 },
    { "F8_E4M3FNUZ", 1 }, { "F8_E5M2FNUZ", 1 } };

const char *sc_dtype_name(sc_dtype dtype) { return dtypes[dtype].name; }

size_t sc_dtype_size(sc_dtype dtype) { return dtypes[dtype].size; }

/* Sets count and bytes from dtype and shape. Where a dimension is 0, the product of the others must
 * not overflow either: a caller may multiply them. */
static int measure_tensor(sc_tensor *t, const char *path) {
    size_t size = sc_dtype_size(t->dtype), nonzero = 1;
    t->count = 1;
    for (int d = 0; d < t->rank; d++) {
        size_t n = t->shape[d];
        if (n > 0 && nonzero > SIZE_MAX / size / n)
            return fail("%s: tensor '%.100s' is too large for this machine", path, t->name);
        if (n > 0) nonzero *= n;
        t->count *= n;
    }
    t->bytes = t->count * size;
    return SC_OK;
}

/* {"dtype": ..., "shape": ..., "data_offsets": ...}, each once, in any order. */
static int read_tensor(json *j, sc_safetensors *file, const char *name) {
    const char *members = "dtype, shape and two data_offsets, each once";
    const size_t room = (size_t)(file->map + file->size - file->data);   /* bytes of data */
    size_t n = 0, d = 0;                     /* members so far; the dtype's row in the table */
    size_t at[2] = { 0 }, offsets = 0;       /* where the tensor's data begin and end */
    size_t rank = SIZE_MAX;                  /* no shape yet; it may be [] */
    const char *dtype = NULL;
    sc_tensor t = { .name = name };
    /* Read the members. */
    for (const char *key; (key = json_next(j, n, "{}")) != NULL; n++) {
        if (strcmp(key, "dtype") == 0) dtype = json_string(j);
        else if (strcmp(key, "shape") == 0) rank = json_sizes(j, t.shape, SC_MAX_RANK);
        else if (strcmp(key, "data_offsets") == 0) offsets = json_sizes(j, at, 2);
        else json_expect(j, 0, members);
    }
    json_expect(j, n == 3 && dtype && rank != SIZE_MAX && offsets == 2, members);
    if (j->failed) return SC_FAILED;
    /* Check them. */
    while (d < COUNT(dtypes) && strcmp(dtypes[d].name, dtype) != 0) d++;
    if (d == COUNT(dtypes))
        return fail("%s: tensor '%.100s': unknown dtype '%.100s' (expected F32 or the like)",
                    file->path, name, dtype);
    t.dtype = (sc_dtype)d;
    t.rank = (int)rank;
    SC_TRY(measure_tensor(&t, file->path));
    if (at[0] > at[1] || at[1] > room || at[1] - at[0] != t.bytes)
        return fail("%s: tensor '%.100s' needs %zu bytes by its dtype and shape, but lies at %zu "
                    "to %zu of %zu", file->path, name, t.bytes, at[0], at[1], room);
    t.data = file->data + at[0];
    SC_TRY(grow(&file->tensor, &file->tensor_capacity, file->tensors, sizeof t));
    file->tensor[file->tensors++] = t;
    return SC_OK;
}

/* Reads a copy of the header, in which names and values are decoded and stay. Says what a file is
 * that is not safetensors, if its first bytes tell. */
static int read_header(sc_safetensors *file) {
    static const struct { const char *begin, *name; } others[] = {
        { "version https://git-lfs", "a Git LFS pointer; git lfs pull fetches the file itself" },
        { "PK\003\004", "a PyTorch file; weights/convert.py converts it" },
        { "\x80\002", "a PyTorch pickle; weights/convert.py converts it" },
        { "<", "a web page" },
        { "{", "JSON, perhaps an index of shards" } };
    uint64_t size, most = file->size - 8;
    if (most > MAX_HEADER) most = MAX_HEADER;
    copy_numbers(&size, file->map, 1, 8);
    if (size < 2 || size > most) {
        for (size_t i = 0; i < COUNT(others); i++) {
            size_t length = strlen(others[i].begin);
            if (file->size > length && memcmp(file->map, others[i].begin, length) == 0)
                return fail("%s: not a safetensors file but %s", file->path, others[i].name);
        }
        return fail("%s: not a safetensors file: a header of %ju bytes (expected 2 to %ju)",
                    file->path, (uintmax_t)size, (uintmax_t)most);
    }
    /* Copy the header; the copy ends with a NUL. */
    file->data = file->map + 8 + size;
    file->text = new_array((size_t)size + 1, 1);
    if (!file->text) return SC_FAILED;
    memcpy(file->text, file->map + 8, (size_t)size);
    json j = json_begin(file->path, file->text, (size_t)size);
    json_expect(&j, j.at == j.text, "{}");               /* no blank before it */
    size_t members = 0;
    for (const char *name, *key; (name = json_next(&j, members, "{}")) != NULL; members++) {
        if (strcmp(name, "__metadata__") != 0) {
            SC_TRY(read_tensor(&j, file, name));
            continue;
        }
        json_expect(&j, file->entries == 0, "__metadata__ only once");
        for (size_t n = 0; (key = json_next(&j, n, "{}")) != NULL; n++) {
            SC_TRY(grow(&file->metadata, &file->entry_capacity, file->entries, sizeof(sc_entry)));
            file->metadata[file->entries++] = (sc_entry){ key, json_string(&j) };
        }
    }
    return json_end(&j);
}

/* By where the data begin. */
static int by_position(const void *a, const void *b) {
    const sc_tensor *left = a, *right = b;
    return (left->data > right->data) - (left->data < right->data);
}

/* Tensors, metadata entries and images all begin with the pointer to their name. */
static int by_name(const void *a, const void *b) {
    const char *const *left = a, *const *right = b;
    return strcmp(*left, *right);
}

/* Sorts entries for bsearch() and refuses equal names. size: bytes of an entry */
static int sort_by_name(const char *path, void *list, size_t count, size_t size) {
    if (count > 0) qsort(list, count, size, by_name);
    for (char *at = list; count > 1; count--, at += size) {
        if (by_name(at, at + size) == 0)
            return fail("%s: '%.100s' appears twice", path, *(char **)(void *)at);
    }
    return SC_OK;
}

/* Maps and checks a file. If it is cut short later, the program ends when it reads there. */
static int read_safetensors(sc_safetensors *file) {
    struct stat about;
    void *map = MAP_FAILED;
    /* O_NONBLOCK: a named pipe is refused, not waited for. */
    int fd = open(file->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return fail("%s: cannot be opened: %s", file->path, strerror(errno));
    if (fstat(fd, &about) == 0 && S_ISREG(about.st_mode) && about.st_size >= 8
        && (uintmax_t)about.st_size <= SIZE_MAX)
        map = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return fail("%s: cannot be read (expected a safetensors file of at least 8 bytes)",
                    file->path);
    file->map = map;
    file->size = (size_t)about.st_size;
    SC_TRY(read_header(file));
    /* Every byte of the data must belong to exactly one tensor. */
    const unsigned char *at = file->data, *end = file->map + file->size;
    if (file->tensors) qsort(file->tensor, file->tensors, sizeof *file->tensor, by_position);
    for (size_t i = 0; i < file->tensors; i++) {
        const sc_tensor *t = &file->tensor[i];
        if (t->bytes > 0 && t->data != at)
            return fail("%s: tensor '%.100s' begins at byte %td of the data (expected %td)",
                        file->path, t->name, t->data - file->data, at - file->data);
        at += t->bytes;
    }
    if (at != end)
        return fail("%s: %td bytes of data belong to no tensor (expected none)", file->path,
                    end - at);
    /* Sort for sc_tensor_find() and sc_metadata_find(). */
    SC_TRY(sort_by_name(file->path, file->tensor, file->tensors, sizeof *file->tensor));
    return sort_by_name(file->path, file->metadata, file->entries, sizeof *file->metadata);
}

int sc_safetensors_open(sc_safetensors *file, const char *path) {
    *file = (sc_safetensors){ .path = join_text(path, "") };
    int status = file->path ? read_safetensors(file) : SC_FAILED;
    if (status != SC_OK) sc_safetensors_close(file);
    return status;
}

void sc_safetensors_close(sc_safetensors *file) {
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
    if (!entry) return NULL;
    return entry->value;
}

/* Element i of a tensor, also infinities and NaN; of I64, I32 and U8 *whole is the exact value. The
 * other types cannot be read. */
static double number_at(const sc_tensor *t, size_t i, int64_t *whole) {
    uint64_t bits = 0;
    double wide;
    size_t size = sc_dtype_size(t->dtype);
    const unsigned char *byte = t->data + i * size;
    for (size_t b = 0; b < size; b++)
        bits |= (uint64_t)byte[b] << 8 * b;
    switch (t->dtype) {
    case SC_F32: return (double)float_of_bits((uint32_t)bits);
    case SC_F16: return (double)float_of_half((uint32_t)bits);
    case SC_BF16: return (double)float_of_bits((uint32_t)bits << 16);    /* F32's upper half */
    case SC_F64:
        memcpy(&wide, &bits, sizeof wide);
        return wide;
    case SC_I32: *whole = (int32_t)(uint32_t)bits; break;
    default: *whole = (int64_t)bits;                     /* of I64 and U8 */
    }
    return (double)*whole;
}

/* Whether a tensor is of floats (else of integers) and has values first .. first + count - 1. */
static int check_range(const sc_safetensors *file, const sc_tensor *t, size_t first, size_t count,
                       int floats) {
    /* By the order of sc_dtype. */
    int of_kind = floats ? t->dtype <= SC_F64 : t->dtype >= SC_I64 && t->dtype <= SC_U8;
    if (of_kind && first <= t->count && count <= t->count - first) return SC_OK;
    return fail("%s: tensor '%.100s' has %zu values of type %s (expected %zu from number %zu on, "
                "of type %s)", file->path, t->name, t->count, sc_dtype_name(t->dtype), count, first,
                floats ? "F32, F16, BF16 or F64" : "I64, I32 or U8");
}

int sc_tensor_floats(const sc_safetensors *file, const sc_tensor *tensor, size_t first,
                     size_t count, float *out) {
    int64_t whole;
    SC_TRY(check_range(file, tensor, first, count, 1));
    if (tensor->dtype == SC_F32) {                       /* at the speed of memory */
        copy_numbers(out, tensor->data + 4 * first, count, 4);
    } else {
        for (size_t i = 0; i < count; i++)
            out[i] = (float)number_at(tensor, first + i, &whole);
    }
    size_t bad = first_not_finite(out, count);
    if (bad == count) return SC_OK;
    return fail("%s: tensor '%.100s', element %zu is %g (expected a finite number)", file->path,
                tensor->name, first + bad, (double)out[bad]);
}

int sc_tensor_integers(const sc_safetensors *file, const sc_tensor *tensor, size_t first,
                       size_t count, int64_t *out) {
    SC_TRY(check_range(file, tensor, first, count, 0));
    for (size_t i = 0; i < count; i++)
        number_at(tensor, first + i, &out[i]);
    return SC_OK;
}

/* --- Atomic output ---
 *
 * NAME is written as NAME.tmp, flushed to disk and renamed, so that NAME is always a whole file. A
 * killed process leaves NAME.tmp, which the next run overwrites; a lock keeps two processes apart.
 */

/* error: an errno */
static int write_failed(const char *path, int error) {
    const char *reason = strerror(error);
    if (error == EBUSY) reason = "another process is writing it";
    return fail("%s: cannot be written: %s", path, reason);
}

/* Hands everything printed to the system; an earlier failure counts too. */
static int flush_output(FILE *file, const char *name) {
    errno = EIO;                                     /* for an earlier failure */
    if (fflush(file) == 0 && !ferror(file)) return SC_OK;
    return write_failed(name, errno);
}

/* Whether everything printed has reached standard output; a disk may be full. */
static int end_of_output(void) { return flush_output(stdout, "standard output"); }

/* Ends the output. If status is SC_OK the whole file appears under its name, and the file that it
 * replaces stays as out->previous if that is set; otherwise nothing changes. Returns the status. */
static int output_close(sc_output *out, int status) {
    if (status == SC_OK) status = flush_output(out->file, out->path);
    if (status == SC_OK && out->temporary && fsync(fileno(out->file)) != 0)
        status = write_failed(out->path, errno);
    if (status == SC_OK && out->temporary && out->previous && access(out->path, F_OK) == 0) {
        /* With a link NAME is never missing; some file systems have none. */
        unlink(out->previous);
        if (link(out->path, out->previous) != 0 && rename(out->path, out->previous) != 0)
            status = write_failed(out->previous, errno);
    }
    if (status == SC_OK && out->temporary && rename(out->temporary, out->path) != 0)
        status = write_failed(out->path, errno);
    if (status != SC_OK && out->file && out->temporary) unlink(out->temporary);
    if (out->file) fclose(out->file);                    /* unlocks it */
    free(out->temporary);
    *out = (sc_output){ 0 };
    return status;
}

/* Opens and locks NAME.tmp. A link in its place is refused (O_NOFOLLOW). A device or a pipe under
 * NAME is written directly. path: must last until the output is closed */
static int output_open(sc_output *out, const char *path) {
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct stat there, locked, named;
    *out = (sc_output){ .path = path };
    if (stat(path, &there) == 0 && !S_ISREG(there.st_mode)) {
        out->file = fopen(path, "w");
        return out->file ? SC_OK : write_failed(path, errno);
    }
    out->temporary = join_text(path, ".tmp");
    if (!out->temporary) return SC_FAILED;
    int fd = open(out->temporary, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (fd < 0) return output_close(out, write_failed(path, errno));
    /* Another process may have renamed the file before we got the lock: then what we opened is its
     * finished output. */
    int ours = fcntl(fd, F_SETLK, &lock) == 0 && fstat(fd, &locked) == 0
            && stat(out->temporary, &named) == 0 && locked.st_ino == named.st_ino;
    if (!ours) errno = EBUSY;
    if (ours && ftruncate(fd, 0) == 0) out->file = fdopen(fd, "w");
    if (out->file) return SC_OK;
    int status = write_failed(path, errno);
    if (ours) unlink(out->temporary);
    close(fd);
    return output_close(out, status);
}

/* --- Writing safetensors ---
 *
 * The data are written as they come, after a gap. Two parts of the header, metadata and tensors,
 * grow in memory and fill the gap at the end; blanks pad it. Each entry begins with a comma. */

int sc_writer_open(sc_writer *w, const char *path) {
    *w = (sc_writer){ .room = 16384 };
    SC_TRY(output_open(&w->out, path));
    w->metadata = open_memstream(&w->text[0], &w->length[0]);
    w->tensors = open_memstream(&w->text[1], &w->length[1]);
    if (w->metadata && w->tensors) return SC_OK;
    return sc_writer_close(w, write_failed(path, errno));
}

/* At any time before the end; the order is kept. Lack of memory is reported later. */
int sc_writer_metadata(sc_writer *w, const char *key, const char *value) {
    putc(',', w->metadata);
    print_json(w->metadata, key);
    putc(':', w->metadata);
    print_json(w->metadata, value);
    return SC_OK;
}

/* Numbers and short words as metadata. */
SC_PRINTF(3, 4) static int put_metadata(sc_writer *w, const char *key, const char *format, ...) {
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return sc_writer_metadata(w, key, text);
}

/* A list of names as metadata: a JSON array in a JSON string, so that names are escaped twice. A
 * name takes at most 7 bytes per byte, for a control character, and 5. */
static int write_name_list(sc_writer *w, const char *key, char **name, size_t count) {
    fprintf(w->metadata, ",\"%s\":\"[", key);
    for (size_t i = 0; i < count; i++) {
        if (i > 0) putc(',', w->metadata);
        print_quoted(w->metadata, name[i], "\\\\", "\\\"");
    }
    fputs("]\"", w->metadata);
    return SC_OK;
}

/* Ends the tensor being written, which must be complete, with its entry in the header. */
static int end_tensor(sc_writer *w) {
    sc_tensor *t = &w->tensor;
    if (!t->name) return SC_OK;
    /* Of SC_ROWS rows, measure one first. */
    int open = t->rank > 0 && t->shape[0] == SC_ROWS;
    if (open) t->shape[0] = 1;
    SC_TRY(measure_tensor(t, w->out.path));
    if (open && t->count > 0) t->shape[0] = w->values / t->count;
    SC_TRY(measure_tensor(t, w->out.path));
    if (w->values != t->count)
        return fail("%s: tensor '%.100s' got %zu values (expected %zu from its shape)", w->out.path,
                    t->name, w->values, t->count);
    for (int d = 0; d < t->rank; d++)
        fprintf(w->tensors, "%s%zu", d ? "," : "", t->shape[d]);
    fprintf(w->tensors, "],\"data_offsets\":[%zu,%zu]}", w->end, w->end + t->bytes);
    w->end += t->bytes;
    t->name = NULL;
    return SC_OK;
}

/* Begins the next tensor; shape[0] may be SC_ROWS. */
int sc_writer_tensor(sc_writer *w, const char *name, sc_dtype dtype, int rank,
                     const size_t *shape) {
    SC_TRY(end_tensor(w));
    if (rank > SC_MAX_RANK)
        return fail("%s: tensor '%.100s' has more than %d dimensions", w->out.path, name,
                    SC_MAX_RANK);
    /* Leave a gap for the metadata so far and for w->room bytes more. */
    if (w->data == 0) {
        SC_TRY(flush_output(w->metadata, w->out.path));
        w->data = (w->length[0] + w->room + 63) / 64 * 64;
        if (w->data > MAX_HEADER) w->data = MAX_HEADER;
        if (fseeko(w->out.file, (off_t)w->data, SEEK_SET) != 0)
            return write_failed(w->out.path, errno);
    }
    /* The beginning of its entry; end_tensor() completes it. */
    w->tensor = (sc_tensor){ .name = name, .dtype = dtype, .rank = rank };
    for (int d = 0; d < rank; d++)
        w->tensor.shape[d] = shape[d];
    w->values = 0;
    putc(',', w->tensors);
    print_json(w->tensors, name);
    fprintf(w->tensors, ":{\"dtype\":\"%s\",\"shape\":[", sc_dtype_name(dtype));
    return SC_OK;
}

/* kind: the type of the values in memory, that of the tensor, but F32 for a tensor of F16. Values
 * that would be infinite or NaN in the file are refused. */
int sc_writer_values(sc_writer *w, const void *values, size_t count, sc_dtype kind) {
    enum { BLOCK = 4096 };
    const float *single = values;
    const double *wide = values;
    uint16_t half[BLOCK];
    unsigned char bytes[BLOCK * sizeof *wide];
    sc_dtype dtype = w->tensor.dtype;
    size_t size = sc_dtype_size(dtype);
    int halves = dtype == SC_F16;
    double most = halves ? 65520 : (double)INFINITY;     /* beyond it, infinite in the file */
    if (!w->tensor.name || kind != (halves ? SC_F32 : dtype))
        return fail("%s: %s values without a tensor of theirs", w->out.path, sc_dtype_name(kind));
    for (size_t i = 0; i < count && (kind == SC_F32 || kind == SC_F64); i++) {
        double value = kind == SC_F64 ? wide[i] : (double)single[i];
        if (!(fabs(value) < most))
            return fail("%s: tensor '%.100s', element %zu cannot be held by %s", w->out.path,
                        w->tensor.name, w->values + i, sc_dtype_name(dtype));
    }
    /* In blocks, as little-endian numbers of the tensor's type. */
    for (size_t at = 0, n; at < count; at += n) {
        const void *from = (const char *)values + at * size;
        n = smaller(count - at, BLOCK);
        if (halves) {
            for (size_t i = 0; i < n; i++)
                half[i] = half_of_float(single[at + i]);
            from = half;
        }
        copy_numbers(bytes, from, n, size);
        if (fwrite(bytes, size, n, w->out.file) < n)
            return write_failed(w->out.path, errno);
    }
    w->values += count;
    return SC_OK;
}

/* Writes the header into its gap. Errors of the file itself show when the output is closed. */
static int write_header(sc_writer *w) {
    FILE *f = w->out.file;
    SC_TRY(end_tensor(w));
    SC_TRY(flush_output(w->metadata, w->out.path));
    SC_TRY(flush_output(w->tensors, w->out.path));
    const char *metadata = w->text[0], *tensors = w->text[1];
    uint64_t size = w->data - 8, bytes;
    if (8 + w->length[0] + w->length[1] + strlen("{\"__metadata__\":{}}") > w->data)
        return fail("%s: the header needs more than %ju bytes: too many or too long names",
                    w->out.path, (uintmax_t)w->data);
    /* Its size, its two parts, blanks. */
    if (fseeko(f, 0, SEEK_SET) != 0)
        return write_failed(w->out.path, errno);
    copy_numbers(&bytes, &size, 1, 8);
    fwrite(&bytes, 8, 1, f);
    if (*metadata) metadata++;                           /* its comma */
    int used = fprintf(f, "{\"__metadata__\":{%s}%s}", metadata, tensors);
    fprintf(f, "%*s", (int)size - used, "");
    return SC_OK;
}

/* Ends the writer. If status is SC_OK the whole file appears under its name, otherwise nothing
 * changes. Returns the status, or that of a failure. */
int sc_writer_close(sc_writer *w, int status) {
    if (status == SC_OK) status = write_header(w);
    status = output_close(&w->out, status);
    if (w->metadata) fclose(w->metadata);
    if (w->tensors) fclose(w->tensors);
    free(w->text[0]);
    free(w->text[1]);
    memset(w, 0, sizeof *w);
    return status;
}

/* Writes a whole safetensors file by `write`, or nothing. */
static int save_tensors(const char *path, int (*write)(sc_writer *w, void *context),
                        void *context) {
    sc_writer w;
    SC_TRY(sc_writer_open(&w, path));
    return sc_writer_close(&w, write(&w, context));
}

/* ============================================================================================
 * 15. Images and data sets
 *
 * From a file's bytes to the pixels that a model sees, in the order of the data: PNM images, other
 * formats through a decoder program, Pillow's resize, data sets.
 * ============================================================================================ */

/* Further results beside SC_OK and SC_FAILED. SC_END: there is no more. MACHINE_FAILED: the machine
 * failed, not the image, so --skip-bad does not apply. */
enum { SC_END = -1, MACHINE_FAILED = -2 };
enum { MAX_PATH = 4096, MAX_DEPTH = 16, MAX_COMMAND = 1024, CHUNK = 1024, WEIGHT_BITS = 22 };
#define MAX_PIXELS ((size_t)1 << 28)           /* of one image: 16,384 x 16,384 */

typedef struct {
    size_t width, height, stride;    /* stride: bytes from row to row */
    const unsigned char *rgb;        /* [height, width, 3], 8 bits */
    unsigned char *memory;           /* to be freed; NULL where rgb lies in a mapped file */
} picture;

/* --- PNM (netpbm.sourceforge.net/doc/pnm.html); P4 is what pngtopnm makes of one-bit PNGs --- */

/* Reads a number and the single blank after it. A comment counts as the newline that ends it. */
static int pnm_number(const char *path, FILE *file, const char *what, size_t largest,
                      size_t *value) {
    int begun = 0;                                       /* whether a digit was read */
    *value = 0;
    for (;;) {
        int byte = getc(file);
        if (byte == '#') {
            while (byte != '\n' && byte != '\r' && byte != EOF) byte = getc(file);
        }
        if (isdigit(byte)) {
            begun = 1;
            *value = 10 * *value + (size_t)(byte - '0');
            if (*value <= largest) continue;
        }
        if (isspace(byte) && !begun) continue;
        if (begun && (isspace(byte) || byte == EOF)) return SC_OK;
        return fail("%s: its %s is missing or invalid (expected a PNM number of at most %zu)", path,
                    what, largest);
    }
}

/* Reads one image; SC_END where the file is empty. Memory grows as pixels arrive, so that a header
 * with a wrong size does not allocate any. */
static int pnm_read(const char *path, FILE *file, picture *result) {
    size_t width, height, maxval = 1, chunks = 0;
    int byte = getc(file), kind = getc(file) - '0';
    if (byte == EOF) {
        fail("%s: the file is empty", path);
        return SC_END;
    }
    if (byte != 'P' || kind < 2 || kind > 6)
        return fail("%s: not a PNM image (expected P2, P3, P5 or P6)", path);
    /* the header, of which every claim is checked */
    SC_TRY(pnm_number(path, file, "width", MAX_PIXELS, &width));
    SC_TRY(pnm_number(path, file, "height", MAX_PIXELS, &height));
    if (kind != 4) SC_TRY(pnm_number(path, file, "maxval", 65535, &maxval));
    if (!width || !height || !maxval || height > MAX_PIXELS / width)
        return fail("%s: a PNM image of %zu x %zu, maxval %zu (expected at least 1 of each and at "
                    "most %zu pixels)", path, width, height, maxval, MAX_PIXELS);
    size_t pixels = width * height;
    size_t channels = kind % 3 == 0 ? 3 : 1;             /* P3 and P6: RGB */
    /* the pixels; where one is not read, the file has ended or is damaged */
    for (size_t i = 0; i < pixels; i++) {
        if (grow(&result->memory, &chunks, i / CHUNK, 3 * CHUNK) != SC_OK) return MACHINE_FAILED;
        unsigned char *rgb = result->memory + 3 * i;
        if (kind == 6 && maxval == 255) {                /* the usual case, read in blocks */
            size_t block = smaller(pixels - i, CHUNK);   /* i is a multiple of CHUNK */
            if (fread(rgb, 3, block, file) != block)
                return fail("%s: the file ends before its last sample", path);
            i += block - 1;
            continue;
        }
        for (size_t c = 0; c < channels; c++) {
            size_t v;
            if (kind <= 3) {                             /* text */
                SC_TRY(pnm_number(path, file, "last sample", maxval, &v));
            } else {
                int high = maxval > 255 ? getc(file) : 0;        /* the high byte comes first */
                if (kind == 4 && i % width % 8 > 0) byte <<= 1;  /* each row begins a new byte */
                else byte = getc(file);
                if (byte == EOF) return fail("%s: the file ends before its last sample", path);
                v = (size_t)high << 8 | (size_t)byte;
                if (kind == 4) v = !(byte & 0x80);               /* a bit of 1 is black */
            }
            if (v > maxval)
                return fail("%s: a sample of %zu above maxval %zu", path, v, maxval);
            /* half to even; the double quotient is a half only where the exact one is */
            rgb[c] = (unsigned char)rint(255.0 * (double)v / (double)maxval);
        }
        if (channels == 1) rgb[1] = rgb[2] = rgb[0];     /* grey */
    }
    *result = (picture){ width, height, 3 * width, result->memory, result->memory };
    return SC_OK;
}

/* --- Other programs: decoders, and the encoder of the atlas's images --- */

/* output: a pipe from its standard output; errors: a temporary file with its standard error */
typedef struct { pid_t pid; FILE *output, *errors; } child_process;

/* Starts a program found in PATH, never through a shell, with `input` as its standard input.
 * Returns 0 or an errno value. posix_spawn() is used because fork() would copy the page tables
 * of all weights. The program has its own process group, so that Ctrl-C, at which training saves
 * its state, does not end it and look like a bad image. The lock keeps another child from
 * inheriting a pipe before it is FD_CLOEXEC. */
static int start_child(child_process *c, char **argument, int input) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    int end[2] = { -1, -1 };
    if (posix_spawnattr_init(&attributes) != 0) return ENOMEM;
    if (posix_spawn_file_actions_init(&files) != 0) return ENOMEM;
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);    /* its own process group */
    pthread_mutex_lock(&lock);
    *c = (child_process){ .errors = tmpfile() };
    if (c->errors && pipe(end) == 0) c->output = fdopen(end[0], "r");
    int error = errno;                                   /* if there is no output */
    if (c->output) {
        fcntl(end[0], F_SETFD, FD_CLOEXEC);
        fcntl(end[1], F_SETFD, FD_CLOEXEC);
        error = posix_spawn_file_actions_adddup2(&files, input, 0);  /* 0 is standard input */
        if (!error) error = posix_spawn_file_actions_adddup2(&files, end[1], 1);
        if (!error) error = posix_spawn_file_actions_adddup2(&files, fileno(c->errors), 2);
        if (!error)
            error = posix_spawnp(&c->pid, *argument, &files, &attributes, argument, environ);
    }
    pthread_mutex_unlock(&lock);
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&attributes);
    if (end[1] >= 0) close(end[1]);                      /* so that its output ends when it does */
    if (!error) return 0;
    if (c->output) fclose(c->output);
    else if (end[0] >= 0) close(end[0]);
    if (c->errors) fclose(c->errors);
    return error;
}

/* Reads the rest of a program's output and waits for its end; returns its wait status. words:
 * [room], the line of its messages that contains `wanted` (if not NULL), else the first line about
 * an error, else the last line. */
static int end_child(child_process *c, const char *wanted, char *words, size_t room) {
    char rest[4096], line[256];
    int ended = 0, found = 0;
    while (fread(rest, 1, sizeof rest, c->output) > 0) {}    /* else it could wait for a reader */
    fclose(c->output);
    while (waitpid(c->pid, &ended, 0) < 0 && errno == EINTR) {}
    /* its messages, line by line, without the blanks at their start */
    rewind(c->errors);
    *words = '\0';
    while (!found && fscanf(c->errors, " %255[^\r\n]", line) == 1) {
        found = wanted && strstr(line, wanted);
        if (found || !strstr(words, " error")) snprintf(words, room, "%s", line);
    }
    fclose(c->errors);
    return ended;
}

/* A file format, recognised by its first bytes. In magic, ? is any byte, _ a blank, 0 a byte 0. */
typedef struct {
    const char *name, *magic;
    const char *package;             /* Debian's, with a decoder; NULL for what is decoded here */
    const char *decoders;            /* commands, one per line; the first that does it is taken */
    const char *refuse;              /* what a decoder says of an image that it does not keep */
} image_format;

#define IMAGEMAGICK(option) "magick -[0] " option "-alpha off -depth 8 ppm:-\n"                    \
                            "convert -[0] " option "-alpha off -depth 8 ppm:-"

/* djpeg prints only its first warning, and pngtopnm may not say that it rescales samples by the
 * chunk sBIT, unless they are verbose. */
static const image_format formats[] = {
    { "PNM", .magic = "P2_" },       /* text, grey */
    { "PNM", .magic = "P3_" },       /* text, RGB */
    { "PNM", .magic = "P5_" },       /* binary, grey */
    { "PNM", .magic = "P6_" },       /* binary, RGB */
    { "JPEG", "\xff\xd8\xff", "libjpeg-turbo-progs",
      "djpeg -verbose -verbose -verbose -dct int -pnm\n" IMAGEMAGICK(""),
      "Premature end of JPEG file" },
    { "PNG", "\x89PNG\r\n\x1a\n", "netpbm", "pngtopnm -verbose\n" IMAGEMAGICK(""),
      "fewer significant bits" },
    { "TIFF", "II*0", "imagemagick", .decoders = IMAGEMAGICK("") },      /* little-endian */
    { "TIFF", "MM0*", "imagemagick", .decoders = IMAGEMAGICK("") },      /* big-endian */
    { "GIF", "GIF8?a", "imagemagick", .decoders = IMAGEMAGICK("") },
    { "BMP", "BM????0000", "imagemagick", .decoders = IMAGEMAGICK("") },
    { "WebP", "RIFF????WEBP", "imagemagick", .decoders = IMAGEMAGICK("-coalesce ") },
};

/* Opens a file; NULL if it cannot be read. *format: NULL, and a reason, if it is not an image. With
 * O_NONBLOCK a named pipe is refused instead of waited for. */
static FILE *open_image(const char *path, const image_format **format) {
    char start[16] = "";
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "r");
    *format = NULL;
    if (!file || read(fd, start, sizeof start) < 0) {
        fail("%s: cannot be opened: %s", path, strerror(errno));
        if (file) fclose(file);
        else if (fd >= 0) close(fd);
        return NULL;
    }
    lseek(fd, 0, SEEK_SET);
    for (size_t f = 0; f < COUNT(formats) && !*format; f++) {
        const char *magic = formats[f].magic;
        int same = 1;
        for (size_t i = 0; magic[i] && same; i++) {
            same = magic[i] == '?' || magic[i] == start[i];
            if (magic[i] == '_') same = isspace((unsigned char)start[i]);
            if (magic[i] == '0') same = start[i] == '\0';
        }
        if (same) *format = &formats[f];
    }
    if (!*format)
        fail("%s: not an image (expected an image such as a JPEG, PNG or PNM file, a folder, a "
             "list named *.txt or a packed set named *.safetensors)", path);
    return file;
}

/* Runs a decoder on a file. The image is accepted if the decoder ends with status 0 and does not
 * say that it lost something. djpeg ends with 2 after warnings: as in Pillow, a damaged image is
 * accepted, but not one that ends early. Returns SC_END if another decoder may do better: this one
 * wrote nothing, or, without a message, could not be started. */
static int run_decoder(char *command, const char *path, FILE *file, const char *refuse,
                       picture *result) {
    char words[256], *rest = command;
    char *argument[MAX_COMMAND / 2 + 1] = { NULL };      /* ends with a NULL */
    child_process child;
    for (int i = 0; i < MAX_COMMAND / 2; i++) argument[i] = strtok_r(rest, " \t", &rest);
    lseek(fileno(file), 0, SEEK_SET);                    /* a decoder before it may have read */
    int error = *argument ? start_child(&child, argument, fileno(file)) : ENOENT;
    if (error == ENOENT || error == EACCES) return SC_END;       /* it is not there */
    if (error) {
        fail("%s: cannot start '%s': %s", path, *argument, strerror(error));
        return MACHINE_FAILED;
    }
    int status = pnm_read(path, child.output, result);
    int ended = end_child(&child, refuse, words, sizeof words);
    int warned = WIFEXITED(ended) && WEXITSTATUS(ended) == 2 && strstr(*argument, "djpeg");
    int refused = refuse && strstr(words, refuse);
    if ((ended == 0 || warned) && !refused && status != SC_END) return status;
    /* status 127 alone: some systems notice only in the child that there is no such program */
    *error_text = '\0';
    int missing = WIFEXITED(ended) && WEXITSTATUS(ended) == 127;
    if (status == SC_END && missing && !*words) return SC_END;
    if (!*words) strcpy(words, "no message");
    if (refused) fail("%s: %s lost or changed samples: %s", path, *argument, words);
    else if (WIFEXITED(ended))
        fail("%s: %s ended with status %d: %s", path, *argument, WEXITSTATUS(ended), words);
    else fail("%s: %s ended with signal %d: %s", path, *argument, WTERMSIG(ended), words);
    if (status != SC_END) status = SC_FAILED;
    return status;
}

/* Decodes an image with a program. Those for its format are tried in turn: the next one if one is
 * missing or failed without writing a byte (some builds of djpeg refuse CMYK). */
static int decode_image(const char *path, FILE *file, const image_format *format,
                        picture *result) {
    const char *text = getenv("SAECLIP_DECODER");
    char commands[MAX_COMMAND] = "", *rest = commands, *command;
    char reason[sizeof error_text] = "";                 /* of the first one that ran */
    unsigned char b[10] = { 0 };
    int status = SC_END;
    if (!text) text = format->decoders;
    if (strlen(text) < sizeof commands) strcpy(commands, text);      /* else it cannot be started */
    while (status == SC_END && (command = strtok_r(rest, "\n", &rest)) != NULL) {
        *error_text = '\0';
        status = run_decoder(command, path, file, format->refuse, result);
        if (!*reason || status == MACHINE_FAILED) memcpy(reason, error_text, sizeof reason);
    }
    if (status == SC_END && !*reason) {
        fail("%s: cannot start '%.*s' (expected a decoder of %s: Debian's package %s has one)",
             path, (int)strcspn(text, " "), text, format->name, format->package);
        return MACHINE_FAILED;
    }
    if (status != SC_OK) memcpy(error_text, reason, sizeof reason);
    if (status == SC_END) status = SC_FAILED;
    if (status != SC_OK || strcmp(format->name, "GIF") != 0) return status;
    /* Decoders fill what the first frame of a GIF leaves of the canvas with different colours. The
     * header has the canvas's width and height, 16 bits each, from byte 6 on. */
    fseeko(file, 0, SEEK_SET);
    size_t count = fread(b, 1, sizeof b, file);
    size_t width = b[6] + 256u * b[7];
    size_t height = b[8] + 256u * b[9];
    if (count == sizeof b && result->width == width && result->height == height) return SC_OK;
    return fail("%s: a GIF whose first frame does not cover the canvas (expected a frame of %zu x "
                "%zu)", path, width, height);
}

/* Reads a file's image; result->memory is to be freed even after a failure. */
static int read_picture(const char *path, picture *result) {
    const image_format *format;
    FILE *file = open_image(path, &format);
    int status = SC_FAILED;
    *result = (picture){ 0 };
    if (format && format->package) status = decode_image(path, file, format, result);
    else if (format) status = pnm_read(path, file, result);
    if (file) fclose(file);
    return status;
}

/* --- Pillow's resize (src/libImaging/Resample.c): bicubic, a = -0.5, stretched by the scale when
 * shrinking, weights of 22 bits, rows first, 8 bits in between; only what the crop keeps --- */

/* Where the crop to `keep` of `from` pixels begins: torchvision rounds half to even. */
static uint64_t crop_start(uint64_t from, uint64_t keep, int crop_hf) {
    uint64_t start = (from - keep) / 2;
    if (!crop_hf && (from - keep) % 4 == 3) start++;
    return start;
}

/* The filter's weight at distance x. */
static double bicubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0;
}

/* Resizes the rows of an image whose shorter side becomes `side`, of which the middle `side` pixels
 * are kept, and transposes it: a second call then resizes the columns. Rows lack their first
 * `skipped` pixels, which the crop does not need. out: [side, height, 3] */
static int resize_rows(const picture *in, size_t skipped, size_t shorter, size_t side, int crop_hf,
                       unsigned char *out) {
    uint64_t full = (uint64_t)side * in->width / shorter;
    uint64_t first = crop_start(full, side, crop_hf);
    double scale = (double)in->width / (double)full;
    double stretch = fmax(scale, 1);
    /* support: 2 pixels to either side, times the stretch */
    int32_t *weight = new_array((size_t)ceil(2 * stretch) * 2 + 1, sizeof *weight);
    if (!weight) return MACHINE_FAILED;
    for (size_t i = 0; i < side; i++) {
        /* the weights of output pixel i: weight[x - start] is that of input pixel x */
        double centre = ((double)(first + i) + 0.5) * scale;
        double step = 1 / stretch, total = 0;
        size_t start = (size_t)fmax(centre - 2 * stretch + 0.5, 0);
        size_t end = (size_t)fmin(centre + 2 * stretch + 0.5, (double)in->width);
        for (size_t x = start; x < end; x++)
            total += bicubic(((double)x - centre + 0.5) * step);
        for (size_t x = start; x < end; x++) {
            double exact = bicubic(((double)x - centre + 0.5) * step);
            if (total != 0) exact /= total;
            exact *= 1 << WEIGHT_BITS;
            weight[x - start] = (int32_t)(exact + copysign(0.5, exact));
        }
        /* output pixel i of every row, in fixed point */
        for (size_t y = 0; y < in->height; y++) {
            const unsigned char *pixel = in->rgb + y * in->stride + (start - skipped) * 3;
            int32_t half = 1 << (WEIGHT_BITS - 1);       /* rounds */
            int32_t sum[3] = { half, half, half };
            for (size_t x = 0; x < end - start; x++) {
                for (size_t c = 0; c < 3; c++) sum[c] += weight[x] * pixel[3 * x + c];
            }
            for (size_t c = 0; c < 3; c++) {
                if (sum[c] < 0) sum[c] = 0;
                int32_t level = sum[c] >> WEIGHT_BITS;
                *out++ = (unsigned char)(level > 255 ? 255 : level);
            }
        }
    }
    free(weight);
    return SC_OK;
}

/* Resizes the shorter side to `side` and crops the centre. pixels: [side, side, 3] */
static int resize_and_crop(const picture *from, size_t side, int crop_hf, unsigned char *pixels) {
    size_t shorter = smaller(from->width, from->height);
    /* the crop and the filter need fewer than 20 x `shorter` rows, those in the middle */
    picture rows = *from;
    rows.height = smaller(from->height, 20 * shorter);
    size_t top = (from->height - rows.height) / 2;
    rows.rgb += top * from->stride;
    unsigned char *turned = new_array(rows.height, 3 * side);    /* [side, height, 3] */
    if (!turned) return MACHINE_FAILED;
    picture columns = { from->height, side, 3 * rows.height, turned, NULL };
    int status = resize_rows(&rows, 0, shorter, side, crop_hf, turned);
    if (status == SC_OK) status = resize_rows(&columns, top, shorter, side, crop_hf, pixels);
    free(turned);
    return status;
}

/* --- Data sets --- */

/* A name takes 8 bytes more than its letters with strdup(), 64 more in set->memory. */
static int add_image(sc_images *set, const char *name, int64_t label) {
    SC_TRY(grow(&set->image, &set->capacity, set->count, sizeof *set->image));
    char *copy = strdup(name);
    if (!copy) return fail("out of memory: cannot allocate the name of image %zu", set->count);
    set->image[set->count++] = (sc_image){ copy, label };
    if (label >= (int64_t)set->classes) set->classes = (size_t)label + 1;
    return SC_OK;
}

static int add_class(sc_images *set, const char *name) {
    SC_TRY(grow(&set->class_name, &set->class_capacity, set->classes, sizeof *set->class_name));
    SC_TRY(allocate(&set->memory, &set->class_name[set->classes], strlen(name) + 1, 1));
    strcpy(set->class_name[set->classes++], name);
    return SC_OK;
}

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    if (!slash) return path;
    return slash + 1;
}

/* folder: may end with a slash; "" is the current folder */
static int join_path(const char *folder, const char *name, char path[MAX_PATH]) {
    size_t end = strlen(folder);
    const char *slash = end > 0 && folder[end - 1] != '/' ? "/" : "";
    if (*name == '/') folder = slash = "";
    int length = snprintf(path, MAX_PATH, "%s%s%s", folder, slash, name);
    if (length < MAX_PATH) return SC_OK;
    return fail("%s%s%s: the path is too long", folder, slash, name);
}

static int is_folder(const char *path) {
    struct stat about;
    return stat(path, &about) == 0 && S_ISDIR(about.st_mode);
}

/* Names of helper folders, such as .thumbs and @eaDir, are left out. */
static int is_visible(const struct dirent *entry) { return !strchr(".@", entry->d_name[0]); }

/* For scandir(): byte order. */
static int by_entry(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* Adds all images below a folder to `set` and other files to `others`; the folders at the top are
 * the classes. What cannot be opened counts as an image: the error is reported when it is read. A
 * link to a folder above it ends at MAX_DEPTH. */
static int walk_folder(sc_images *set, sc_images *others, const char *folder, int depth) {
    char path[MAX_PATH];
    struct dirent **entry;
    if (depth > MAX_DEPTH)
        return fail("%s: lies too deep (expected at most %d folders)", folder, MAX_DEPTH);
    int entries = scandir(folder, &entry, is_visible, by_entry), status = SC_OK;
    if (entries < 0) return fail("%s: cannot be opened: %s", folder, strerror(errno));
    for (int i = 0; i < entries && status == SC_OK; i++) {
        status = join_path(folder, entry[i]->d_name, path);
        if (status == SC_OK && is_folder(path)) {
            if (depth == 0) status = add_class(set, entry[i]->d_name);
            if (status == SC_OK) status = walk_folder(set, others, path, depth + 1);
        } else if (status == SC_OK) {                /* its first bytes say what it is */
            const image_format *format;
            int64_t label = -1;
            FILE *file = open_image(path, &format);
            sc_images *kind = file && !format ? others : set;
            if (file) fclose(file);
            if (depth > 0) label = (int64_t)set->classes - 1;        /* the last class so far */
            status = add_image(kind, path + strlen(set->root), label);
        }
    }
    for (int i = 0; i < entries; i++) free(entry[i]);
    free(entry);
    return status;
}

/* DIR/<class>/<file>, or a flat DIR without labels where no class folder holds an image. */
static int open_folder(sc_images *set, const char *folder) {
    sc_images others = { 0 };
    char names[160] = "";
    size_t loose = 0, used = 0;                      /* loose: images beside the class folders */
    int status = walk_folder(set, &others, folder, 0);
    /* in byte order of whole paths: a-1/x comes before a/x */
    if (set->count) qsort(set->image, set->count, sizeof *set->image, by_name);
    for (size_t i = 0; i < set->count; i++) loose += set->image[i].label < 0;
    /* images must be there, all in class folders or all beside them */
    if (status == SC_OK && set->count == 0)
        status = fail("%s: no image among the %zu files of this folder (expected FOLDER/<class>/"
                      "<image> or FOLDER/<image>)", folder, others.count);
    if (status == SC_OK && loose > 0 && loose < set->count)
        status = fail("%s: %zu images in class folders and %zu beside them (expected FOLDER/"
                      "<class>/<image> or FOLDER/<image> alone)", folder, set->count - loose,
                      loose);
    if (loose > 0) {                                 /* a flat folder: no labels */
        free(set->class_name);
        set->class_name = NULL;
        set->classes = 0;
    }
    /* the first names of what was passed over */
    for (size_t i = 0; i < others.count && i < 3; i++)
        used += (size_t)sprintf(names + used, " %.48s", others.image[i].name);
    if (status == SC_OK && others.count > 0)
        note("%s: %zu files passed over, which are not images:%s%s", folder, others.count, names,
             others.count > 3 ? " ..." : "");
    set->count = smaller(set->count, set->limit);    /* the others are freed with the set */
    sc_images_close(&others);
    return status;
}

/* A list: one image per line, "path" or "path<TAB>label"; a # at a line's start is a comment. */
static int open_list(sc_images *set, const char *path) {
    char text[MAX_PATH + 64], file[MAX_PATH], *end;
    FILE *list = fopen(path, "r");
    int status = SC_OK;
    if (!list) return fail("%s: cannot be opened: %s", path, strerror(errno));
    for (size_t number = 1; status == SC_OK && set->count < set->limit; number++) {
        const char *wrong = NULL;
        char *line = text;
        int64_t label = -1;
        if (!fgets(text, sizeof text, list)) break;
        if (!strchr(text, '\n') && !feof(list))
            wrong = "too long, or with a byte 0 (expected text in UTF-8)";
        if (number == 1 && strncmp(line, "\xef\xbb\xbf", 3) == 0) line += 3; /* byte order mark */
        end = line + strcspn(line, "\r\n");
        if (*end == '\r' && end[1] && end[1] != '\n') wrong = "a carriage return within it";
        *end = '\0';
        if (!wrong && (!*line || *line == '#')) continue;
        char *tab = strchr(line, '\t');
        char *blank = strrchr(line, ' ');
        if (tab) {                                   /* what follows is the label */
            *tab = '\0';
            label = (int64_t)strtoll(tab + 1, &end, 10);
            if (*end || end == tab + 1 || label < 0 || label >= SC_MAX_CLASSES)
                wrong = "invalid label (expected a whole number from 0 to 16777215)";
        } else if (blank && !blank[1 + strspn(blank + 1, "0123456789")]) {
            /* "path 3" may be the name of a file */
            if (join_path(set->root, line, file) != SC_OK || access(file, F_OK) != 0)
                wrong = "a blank before the label (expected path<TAB>label)";
        }
        if (!wrong && set->count > 0 && (set->image[0].label < 0) != !tab)
            wrong = "labels on some lines only (expected on all or none)";
        if (wrong) status = fail("%s: line %zu: %s", path, number, wrong);
        else status = add_image(set, line, label);
    }
    if (status == SC_OK && ferror(list)) status = fail("%s: cannot be read", path);
    if (status == SC_OK && set->count == 0) status = fail("%s: a list without an image", path);
    fclose(list);
    return status;
}

/* Adds the images of a file that may hold labels (I64 [count], at least `least`) and, in its
 * metadata, their names and those of the classes. */
static int add_images(sc_images *set, const sc_safetensors *file, size_t count, int64_t least) {
    const sc_tensor *labels = sc_tensor_find(file, "labels");
    const char *classes = sc_metadata_find(file, "class_names");
    const char *names = sc_metadata_find(file, "file_names");
    int64_t label = -1, most = SC_MAX_CLASSES;
    size_t named = count;
    char **name = NULL;
    int status = SC_OK;
    if (labels && (labels->dtype != SC_I64 || labels->rank != 1 || labels->count != count))
        return fail("%s: tensor labels (expected I64 [%zu])", file->path, count);
    if (labels && classes) {                             /* classes with names */
        SC_TRY(json_string_array(classes, file->path, &set->class_name, &set->classes));
        most = (int64_t)set->classes;
    }
    /* as many names as images, or none */
    if (names) SC_TRY(json_string_array(names, file->path, &name, &named));
    if (named != count)
        status = fail("%s: %zu file_names for %zu images", file->path, named, count);
    for (size_t i = 0; i < count && i < set->limit && status == SC_OK; i++) {
        if (labels) status = sc_tensor_integers(file, labels, i, 1, &label);
        if (labels && status == SC_OK && (label < least || label >= most))
            status = fail("%s: image %zu: label %lld (expected one of %lld classes)", file->path,
                          i, (long long)label, (long long)most);
        if (status == SC_OK) status = add_image(set, name ? name[i] : "", label);
    }
    free(name);
    return status;
}

/* A packed set: images U8 [N, H, W, 3], labels and names. */
static int open_packed(sc_images *set, const char *path) {
    SC_TRY(sc_safetensors_open(&set->packed, path));
    const sc_tensor *images = sc_tensor_find(&set->packed, "images");
    if (!images || images->dtype != SC_U8 || images->rank != 4 || images->bytes == 0 ||
        images->shape[1] > MAX_PIXELS / images->shape[2] || images->shape[3] != 3)
        return fail("%s: not a packed set (expected a tensor images U8 [N, H, W, 3])", path);
    return add_images(set, &set->packed, images->shape[0], 0);
}

/* A digest of N, the classes, the labels and the names below the root. Moving or packing a data
 * set does not change it. */
static uint64_t images_digest(const sc_images *set) {
    uint64_t digest = 0;
    size_t named = 0;
    if (set->class_name) named = set->classes;
    digest64_number(&digest, set->count);
    digest64_number(&digest, named);
    for (size_t c = 0; c < named; c++) digest64_name(&digest, set->class_name[c]);
    for (size_t i = 0; i < set->count; i++) {
        digest64_name(&digest, set->image[i].name);
        digest64_number(&digest, (uint64_t)set->image[i].label);
    }
    return digest;
}

int sc_images_open(sc_images *set, const char *path, size_t limit) {
    const char *suffix = strrchr(path, '.');
    int folder = is_folder(path), status = SC_FAILED;
    if (!suffix) suffix = "";
    *set = (sc_images){ .limit = limit ? limit : SIZE_MAX };
    /* names are relative to the folder, or to that of the file */
    set->root = join_text(path, folder && *base_name(path) ? "/" : "");
    if (!set->root) return SC_FAILED;
    if (!folder) set->root[base_name(path) - path] = '\0';
    if (folder) {
        status = open_folder(set, path);
    } else if (strcmp(suffix, ".txt") == 0) {
        status = open_list(set, path);
    } else if (strcmp(suffix, ".safetensors") == 0) {
        status = open_packed(set, path);
    } else {
        const image_format *format;
        FILE *file = open_image(path, &format);
        if (format) status = add_image(set, base_name(path), -1);
        if (file) fclose(file);
    }
    if (status != SC_OK) {
        sc_images_close(set);
        return SC_FAILED;
    }
    set->digest = images_digest(set);
    return SC_OK;
}

void sc_images_close(sc_images *set) {
    for (size_t i = 0; i < set->capacity; i++) free(set->image[i].name);     /* NULL: unused */
    release(&set->memory);
    sc_safetensors_close(&set->packed);
    free(set->class_name);
    free(set->image);
    free(set->root);
    *set = (sc_images){ 0 };
}

/* Reads image `index`, resizes it and crops it to the model's size. pixels: [S, S, 3] */
static int load_image(const sc_images *set, size_t index, const sc_preprocess *prep,
                      unsigned char *pixels) {
    size_t square = (size_t)prep->square;
    int crop_hf = prep->crop_hf, status = SC_OK;
    picture from = { 0 };
    char path[MAX_PATH];
    unsigned char *middle = NULL;
    /* the image: in the mapped file, or read into from.memory */
    if (set->packed.path) {
        const sc_tensor *images = sc_tensor_find(&set->packed, "images");
        from.height = images->shape[1];
        from.width = images->shape[2];
        from.stride = 3 * from.width;
        from.rgb = images->data + index * from.height * from.stride;
    } else {
        status = join_path(set->root, set->image[index].name, path);
        if (status == SC_OK) status = read_picture(path, &from);
    }
    if (status == SC_OK && square > 0 && (from.width != square || from.height != square)) {
        /* first the square in the middle is resized; in a packed set this may have been done */
        size_t side = smaller(from.width, from.height);
        from.rgb += crop_start(from.height, side, crop_hf) * from.stride
                    + crop_start(from.width, side, crop_hf) * 3;
        from.width = from.height = side;
        middle = new_array(square, 3 * square);
        if (!middle) status = MACHINE_FAILED;
        else status = resize_and_crop(&from, square, crop_hf, middle);
        from = (picture){ square, square, 3 * square, middle, from.memory };
    }
    if (status == SC_OK)
        status = resize_and_crop(&from, (size_t)prep->size, crop_hf, pixels);
    free(middle);
    free(from.memory);
    return status;
}

int sc_image_load(const sc_images *set, size_t index, const sc_preprocess *prep,
                  unsigned char *pixels) {
    if (index >= set->count)
        return usage("image %zu (expected 0 to %zu)", index, set->count - 1);
    return load_image(set, index, prep, pixels) == SC_OK ? SC_OK : SC_FAILED;
}

/* ============================================================================================
 * 16. Models' files
 *
 * Which file is which model: the names of its tensors, sizes from their shapes, settings from the
 * metadata. A file is the whole model and all of its vision tower is used, or it is refused: a
 * tensor that has no place here belongs to a transformer that computes something else.
 * ============================================================================================ */

enum { HUGGING_FACE, OPENAI, TIMM, NAMINGS };

/* Of each naming: what it is called, and how names begin in the vision tower and in its blocks. */
static const char *const naming_names[] = { "Hugging Face CLIP", "OpenAI / OpenCLIP", "timm" };
static const char *const towers[] = { "vision_model.", "visual.", "" };
static const char *const stacks[] = {
    "vision_model.encoder.layers.", "visual.transformer.resblocks.", "blocks." };

enum size { ONE, WIDTH, WIDTH3, HIDDEN, TOKENS, PIXELS, OUTPUTS };       /* see read_layer() */

/* The names of each layer's tensors in the three namings, the shape of the weight in the file, and
 * whether it is the matrix of a product. In a name ~ stands for the vision tower's prefix, # for
 * the block's, * for weight or bias, ? for q, k or v. */
static const struct {
    const char *name[NAMINGS];
    enum size rows, columns;
    int linear;
} layers[ROLES] = {
    /* before the blocks: class token, positions, patches, the norm that CLIP has there */
    { { "~embeddings.class_embedding", "~class_embedding", "cls_token" }, ONE, WIDTH, 0 },
    { { "~embeddings.position_embedding.weight", "~positional_embedding", "pos_embed" },
      TOKENS, WIDTH, 0 },
    { { "~embeddings.patch_embedding.*", "~conv1.*", "patch_embed.proj.*" }, WIDTH, PIXELS, 1 },
    { { "~pre_layrnorm.*", "~ln_pre.*", "norm_pre.*" }, ONE, WIDTH, 0 },
    /* in each block: norm, attention in and out, norm, MLP */
    { { "#layer_norm1.*", "#ln_1.*", "#norm1.*" }, ONE, WIDTH, 0 },
    { { "#self_attn.?_proj.*", "#attn.in_proj_*", "#attn.qkv.*" }, WIDTH3, WIDTH, 1 },
    { { "#self_attn.out_proj.*", "#attn.out_proj.*", "#attn.proj.*" }, WIDTH, WIDTH, 1 },
    { { "#layer_norm2.*", "#ln_2.*", "#norm2.*" }, ONE, WIDTH, 0 },
    { { "#mlp.fc1.*", "#mlp.c_fc.*", "#mlp.fc1.*" }, HIDDEN, WIDTH, 1 },
    { { "#mlp.fc2.*", "#mlp.c_proj.*", "#mlp.fc2.*" }, WIDTH, HIDDEN, 1 },
    /* after the blocks: norm, projection or classifier */
    { { "~post_layernorm.*", "~ln_post.*", "norm.*" }, ONE, WIDTH, 0 },
    { { "visual_projection.*", "~proj", "head.*" }, OUTPUTS, WIDTH, 1 },
};

enum { NAME_LENGTH = 128 };

/* Writes out the name of a tensor. name: [NAME_LENGTH]; part: q, k or v */
static void spell_name(char *name, int naming, enum role role, size_t block, int bias, char part) {
    for (const char *c = layers[role].name[naming]; *c; c++) {
        if (*c == '~') name += sprintf(name, "%s", towers[naming]);
        else if (*c == '#') name += sprintf(name, "%s%zu.", stacks[naming], block);
        else if (*c == '*') name += sprintf(name, "%s", bias ? "bias" : "weight");
        else *name++ = *c == '?' ? part : *c;
    }
    *name = '\0';
}

/* A layer's weight or bias in the file (of q, k and v that of q); NULL if it is not there. */
static const sc_tensor *find_layer(const sc_model *model, enum role role, size_t block, int bias) {
    char name[NAME_LENGTH];
    spell_name(name, model->naming, role, block, bias, 'q');
    return sc_tensor_find(&model->file, name);
}

/* Reads a layer. The weight of a linear layer is [N, K] in the file, as in PyTorch (OpenAI's
 * projection is [K, N]). It is packed for the products, unless it is the head, or the model is for
 * Part I and has no pass. A tensor that is missing or of another shape is refused. */
static int read_layer(const sc_model *model, enum role role, size_t block) {
    const size_t sizes[] = { 1, model->width, 3 * model->width, model->hidden, model->tokens,
                             3 * model->patch * model->patch, model->outputs };
    const size_t N = sizes[layers[role].rows];
    const size_t K = sizes[layers[role].columns];
    const char *path = model->file.path;
    const char *names = layers[role].name[model->naming];
    const int linear = layers[role].linear;
    const int swapped = role == HEAD && model->naming == OPENAI;
    /* layers that have no bias in some models */
    const int may_lack = role == PATCHES || role == HEAD || (role == QKV && model->naming == TIMM);
    const size_t parts = strchr(names, '?') ? 3 : 1;     /* q, k and v, one below the other */
    sc_layer *layer = &model->layer[block * ROLES + role];
    for (int bias = 0; bias <= 1; bias++) {
        char name[NAME_LENGTH];
        size_t rows = N / parts, columns = K;            /* of one part */
        if (bias && !strchr(names, '*')) break;          /* an embedding */
        if (bias && may_lack && !find_layer(model, role, block, 1)) break;
        if (bias) rows = 1;
        if (bias && linear) columns = N / parts;
        if (swapped) {                                   /* as it is in the file */
            rows = K;
            columns = N;
        }
        float *out = NULL;
        for (size_t i = 0; i < parts; i++, out += rows * columns) {
            spell_name(name, model->naming, role, block, bias, "qkv"[i]);
            const sc_tensor *tensor = sc_tensor_find(&model->file, name);
            if (!tensor) return fail("%s: tensor %s is missing", path, name);
            int first = 0;                               /* leading dimensions of 1 are ignored */
            while (first < tensor->rank && tensor->shape[first] == 1) first++;
            if (tensor->count != rows * columns || (rows > 1 && tensor->shape[first] != rows))
                return fail("%s: tensor %s has %zu numbers (expected %zu x %zu)", path, name,
                            tensor->count, rows, columns);
            if (i == 0) {                                /* memory for what the file has */
                out = new_array(rows * parts, padded(columns) * sizeof *out);
                if (!out) return SC_FAILED;
                if (bias) layer->bias = out;
                else layer->weight = out;
            }
            if (!swapped) SC_TRY(sc_tensor_floats(&model->file, tensor, 0, tensor->count, out));
            for (size_t e = 0; swapped && e < tensor->count; e++)
                SC_TRY(sc_tensor_floats(&model->file, tensor, e % K * N + e / K, 1, out + e));
        }
    }
    if (!linear || role == HEAD || !model->pass) return SC_OK;
    SC_TRY(new_packed(&layer->matrix, K, N));
    pack_panels(&layer->matrix, 0, layer->matrix.panels, layer->weight, 1, K);
    free(layer->weight);
    layer->weight = NULL;
    return SC_OK;
}

/* Whether every block has a layer with this role; else it exists once. */
static int is_in_block(enum role role) { return role >= NORM1 && role <= FC2; }

/* Reads the layers of a block, and with the first one those that exist once: the norm before the
 * blocks if there is one, and the head if its size was taken. */
static int load_block(void *context, size_t block) {
    const sc_model *model = context;
    for (enum role role = CLASS_TOKEN; role < ROLES; role++) {
        if (block > 0 && !is_in_block(role)) continue;
        /* these are not in every model, or not asked for */
        int norm = find_layer(model, PRE, 0, 0) || find_layer(model, PRE, 0, 1);
        if (role == PRE && !norm) continue;
        if (role >= POST && !model->outputs) continue;
        SC_TRY(read_layer(model, role, block));
    }
    return SC_OK;
}

/* Reads the weights of the first `blocks` blocks, on all threads. */
static int load_layers(sc_model *model, size_t blocks) {
    model->loaded = blocks;
    model->layer = new_array(blocks, ROLES * sizeof *model->layer);
    if (!model->layer) return SC_FAILED;
    return parallel_for(blocks, load_block, model);          /* one task per block */
}

/* Frees what load_layers() allocated, also where it failed. */
static void free_layers(sc_model *model) {
    for (size_t i = 0; model->layer && i < model->loaded * ROLES; i++) {
        free(model->layer[i].matrix.data);
        free(model->layer[i].weight);
        free(model->layer[i].bias);
    }
    free(model->layer);
    model->layer = NULL;
}

/* Takes the size of the projection or classifier, and reads text_embeds [C, P], the embeddings of
 * the class prompts, with which those of images are compared; their rows are scaled to unit
 * length. */
static int open_head(sc_model *model) {
    const sc_tensor *head = find_layer(model, HEAD, 0, 0);
    const sc_tensor *text = sc_tensor_find(&model->file, "text_embeds");
    if (!head || head->rank != 2)
        return fail("%s: no head (expected %s [outputs, width])", model->file.path,
                    layers[HEAD].name[model->naming]);
    size_t outputs = head->shape[model->naming == OPENAI];   /* [width, outputs] there */
    model->outputs = model->classes = outputs;           /* a classifier's outputs are classes */
    if (!text) return SC_OK;
    /* the classes are those of the text embeddings */
    if (text->rank != 2 || text->shape[1] != outputs || text->shape[0] == 0)
        return fail("%s: tensor text_embeds (expected [classes, %zu], the projection's width)",
                    model->file.path, outputs);
    model->classes = text->shape[0];
    model->text = new_array(model->classes, outputs * sizeof *model->text);
    if (!model->text) return SC_FAILED;
    SC_TRY(sc_tensor_floats(&model->file, text, 0, text->count, model->text));
    for (size_t c = 0; c < model->classes; c++)
        unit_row(model->text + c * outputs, outputs);
    return SC_OK;
}

/* Reads the weights of the first `blocks` blocks, packed, and of the head if asked, not packed. */
int sc_model_load(sc_model *model, size_t blocks, int head) {
    SC_TRY(choose_kernels());
    model->pass = new_array(1, sizeof *model->pass);
    if (!model->pass) return SC_FAILED;
    if (head) SC_TRY(open_head(model));
    if (blocks < 1) blocks = 1;              /* the first one is read with the embeddings */
    return load_layers(model, smaller(blocks, model->blocks));
}

/* Every tensor of the vision tower must have its place: blocks are numbered without a gap, and
 * there is no LayerScale, no register tokens, no norms of q and k, and so on. Not part of the
 * vision tower are a text tower, text_embeds, and the position numbers that Hugging Face saves. */
static int check_tensors(const sc_model *model) {
    const sc_safetensors *file = &model->file;
    const char *tower = towers[model->naming];
    char name[NAME_LENGTH];
    size_t t = 0;
    unsigned char *known = new_array(file->tensors, 1);
    if (!known) return SC_FAILED;
    /* look up every name that the table can give */
    for (enum role role = CLASS_TOKEN; role < ROLES; role++) {
        size_t blocks = 1;
        if (is_in_block(role)) blocks = model->blocks;
        for (size_t i = 0; i < 6 * blocks; i++) {        /* weight and bias; of q, k and v */
            spell_name(name, model->naming, role, i / 6, i % 2, "qkv"[i / 2 % 3]);
            const sc_tensor *tensor = sc_tensor_find(file, name);
            if (tensor) known[tensor - file->tensor] = 1;
        }
    }
    /* the first tensor that was not looked up */
    for (; t < file->tensors; t++) {
        const char *found = file->tensor[t].name;
        int in_tower = strncmp(found, tower, strlen(tower)) == 0
                       && strcmp(found, "text_embeds") != 0
                       && strcmp(found, "vision_model.embeddings.position_ids") != 0;
        if (in_tower && !known[t]) break;
    }
    free(known);
    if (t == file->tensors) return SC_OK;
    return fail("%s: tensor %.100s has no place in the transformers known here (expected %zu "
                "blocks, without a gap)", file->path, file->tensor[t].name, model->blocks);
}

/* Takes all sizes from the shapes of tensors; read_layer() compares the others with them. */
static int measure_model(sc_model *model) {
    const char *path = model->file.path;
    const sc_tensor *patch = find_layer(model, PATCHES, 0, 0);
    const sc_tensor *fc1 = find_layer(model, FC1, 0, 0);
    const sc_tensor *positions = find_layer(model, POSITIONS, 0, 0);
    if (!patch || patch->rank != 4 || patch->shape[1] != 3 || patch->shape[2] != patch->shape[3]
        || patch->count == 0)
        return fail("%s: the patch embedding's weight (expected [width, 3, patch, patch])", path);
    /* width and patch size: the convolution that embeds the patches */
    size_t D = model->width = patch->shape[0];
    model->patch = patch->shape[2];
    /* tokens: a class token and grid x grid patches */
    if (!positions || positions->rank < 2 || positions->shape[positions->rank - 1] != D)
        return fail("%s: the position embedding (expected [tokens, %zu])", path, D);
    size_t T = model->tokens = positions->count / D;
    while ((model->grid + 1) * (model->grid + 1) < T) model->grid++;
    size_t S = model->image_size = model->grid * model->patch;
    if (S < 1 || S > MAX_PIXELS / S || model->grid * model->grid + 1 != T)
        return fail("%s: %zu positions (expected a class token and a square of patches, of at most "
                    "%zu pixels)", path, T, MAX_PIXELS);
    /* the MLP's hidden width; blocks as far as they are numbered without a gap */
    if (!fc1 || fc1->rank != 2)
        return fail("%s: the first layer of block 0's MLP (expected [hidden, %zu])", path, D);
    model->hidden = fc1->shape[0];
    while (find_layer(model, NORM1, model->blocks, 0)) model->blocks++;
    if (model->blocks == 0) return fail("%s: the model has no block 0", path);
    return check_tensors(model);
}

enum setting { GELU, EPSILON, HEADS, MEAN, STD, SETTINGS };

/* Sets a setting from its text. what: its name in errors */
static int apply_setting(sc_model *model, enum setting setting, const char *what,
                         const char *text) {
    float *triple = setting == MEAN ? model->mean : model->std;
    double number = 0;
    switch (setting) {
    case GELU:
        model->activation = ERF_GELU;
        if (is_choice("gelu|erf", text)) return SC_OK;
        model->activation = QUICK_GELU;
        if (is_choice("quick_gelu|quick", text)) return SC_OK;
        return usage("%s: invalid value '%s' (expected quick_gelu or gelu)", what, text);
    case EPSILON:
        SC_TRY(parse_number(text, what, 0, 1, &number));
        model->epsilon = (float)number;
        return SC_OK;
    case HEADS:                              /* a whole number that divides the width */
        SC_TRY(parse_number(text, what, 1, 1 << 20, &number));
        model->heads = (size_t)number;
        if ((double)model->heads == number && model->width % model->heads == 0) return SC_OK;
        return usage("%s: width %zu cannot be split into %g heads", what, model->width, number);
    default:                                 /* MEAN, STD */
        SC_TRY(parse_triple(text, what, triple));
        if (setting == MEAN || (triple[0] > 0 && triple[1] > 0 && triple[2] > 0)) return SC_OK;
        return usage("%s: invalid value '%s' (expected three numbers above 0)", what, text);
    }
}

/* The settings that shapes do not show come from an option, else from the metadata, else from
 * the usual value. An invalid option is a usage error, an invalid value in the file is an error
 * of the file. */
static int read_settings(sc_model *model, const sc_origin *given) {
    int plain = model->naming == TIMM && !find_layer(model, PRE, 0, 0);
    size_t D = model->width, used = 0;
    char heads[64] = "not known: give --heads", assumed[256] = "";
    const struct { const char *option, *given, *key, *usual; } settings[SETTINGS] = {
        { "--gelu", given->text[SC_GELU], "hidden_act", plain ? "gelu" : "quick_gelu" },
        { "--eps", given->text[SC_EPSILON], "layer_norm_eps", plain ? "1e-6" : "1e-5" },
        { "--heads", given->text[SC_HEADS], "num_attention_heads", heads },
        { "--mean", given->text[SC_MEAN], "image_mean", "0.48145466,0.4578275,0.40821073" },
        { "--std", given->text[SC_STD], "image_std", "0.26862954,0.26130258,0.27577711" } };
    /* heads are 64 wide, except in the large models that were published */
    if (D < 1280) snprintf(heads, sizeof heads, "%zu", D / 64);
    if (D == 1280 || D == 1408 || D == 1664) strcpy(heads, "16");
    for (enum setting i = 0; i < SETTINGS; i++) {
        const char *key = settings[i].key;
        const char *text = sc_metadata_find(&model->file, key);
        const char *source = "metadata";     /* for errors */
        if (*settings[i].given) {
            SC_TRY(apply_setting(model, i, settings[i].option, settings[i].given));
            continue;
        }
        if (!text) {                         /* the file does not say */
            source = "assumed";
            text = settings[i].usual;
            used += (size_t)sprintf(assumed + used, ", %s %s", key, text);
        }
        if (apply_setting(model, i, key, text) != SC_OK)
            return fail("%s: %s %s", model->file.path, source, error_text);
    }
    if (*assumed) note("%s: not in the file, assumed: %s", model->file.path, assumed + 2);
    return SC_OK;
}

/* The naming of a file's tensors, NAMINGS if it has none of them. */
static int naming_of(const sc_safetensors *file) {
    char name[NAME_LENGTH];
    for (int naming = 0; naming < NAMINGS; naming++) {
        spell_name(name, naming, CLASS_TOKEN, 0, 0, 'q');
        if (sc_tensor_find(file, name)) return naming;
    }
    return NAMINGS;
}

int sc_model_open(sc_model *model, const char *path, const sc_origin *given) {
    static const sc_origin none = { 0 };
    const char *of = strstr(base_name(path), "-of-000");     /* NAME-00001-of-00002.safetensors */
    *model = (sc_model){ 0 };
    if (of && strtoul(of + 4, NULL, 10) > 1)
        return fail("%s: one of several shards of a model (expected all of it in one file: save it "
                    "with max_shard_size=\"100GB\")", path);
    SC_TRY(sc_safetensors_open(&model->file, path));
    model->naming = naming_of(&model->file);
    int status = SC_OK;
    if (model->naming == NAMINGS)
        status = fail("%s: not a vision transformer (expected Hugging Face's, OpenAI's or timm's "
                      "names; weights/convert.py cuts prefixes such as module.)", path);
    if (status == SC_OK) status = measure_model(model);
    if (status == SC_OK) status = read_settings(model, given ? given : &none);
    if (status != SC_OK) sc_model_close(model);
    return status;
}

/* Also a model that was opened or loaded in part. */
void sc_model_close(sc_model *model) {
    free_layers(model);
    if (model->pass) release(&model->pass->memory);
    free(model->pass);
    free(model->text);
    sc_safetensors_close(&model->file);
    *model = (sc_model){ 0 };
}

int sc_model_forward_plain(const sc_model *model, const unsigned char *pixels, size_t layer,
                           sc_hook hook, float *out) {
    sc_model plain = *model;                 /* with layers of its own */
    if (layer < 1 || layer > model->blocks)
        return usage("%s: layer %zu (expected 1 to %zu)", model->file.path, layer, model->blocks);
    plain.pass = NULL;                       /* read_layer() then keeps the weights as they are */
    int status = load_layers(&plain, layer);
    if (status == SC_OK) status = vit_forward(&plain, pixels, layer, hook, out, NULL);
    free_layers(&plain);
    return status;
}

/* ============================================================================================
 * 17. SAEs' files
 *
 * The tensors of an SAE, and of a training's state, in and out by one table; where activations come
 * from; the settings of an SAE in its metadata, or in SAELens's cfg.json.
 * ============================================================================================ */

/* Opens an output and discards it, so that a wrong path fails before the work is done. */
static int try_output(const char *path) {
    sc_writer w;
    SC_TRY(sc_writer_open(&w, path));
    sc_writer_close(&w, SC_FAILED);
    return SC_OK;
}

/* A tensor of floats. In memory its rows are padded to 16 numbers, but a vector is not. */
typedef struct {
    const char *name;
    float *values;                   /* NULL: it is not read or written */
    int rank;
    size_t shape[SC_MAX_RANK];       /* in files */
    int transposed;                  /* whether its rows are columns in memory */
} float_tensor;

enum { MOVED_ROWS = 16 };            /* rows in one go: a cache line of a transposed tensor */

/* Writes a tensor or, if there is no writer, reads it from a file. Adds it to a digest if there is
 * one. some: [MOVED_ROWS, columns], scratch memory */
static int move_tensor(const float_tensor *t, const sc_safetensors *file, sc_writer *w,
                       uint64_t *digest, float *some) {
    size_t rows = 1;
    size_t columns = t->shape[t->rank - 1];
    size_t down = padded(columns);               /* in memory, to the next row */
    size_t across = 1;                           /* and to the next column */
    const sc_tensor *source = NULL;
    if (t->rank == 2) rows = t->shape[0];
    if (t->transposed) {
        down = 1;
        across = padded(rows);
    }
    if (w) SC_TRY(sc_writer_tensor(w, t->name, SC_F32, t->rank, t->shape));
    else source = sc_tensor_find(file, t->name);
    if (!w && (!source || memcmp(source->shape, t->shape, sizeof t->shape) != 0))
        return fail("%s: missing or of another shape: tensor %s (expected %zu x %zu)", file->path,
                    t->name, rows, columns);
    for (size_t r = 0; r < rows; r += MOVED_ROWS) {
        size_t height = smaller(rows - r, MOVED_ROWS);
        size_t count = height * columns;
        if (!w) SC_TRY(sc_tensor_floats(file, source, r * columns, count, some));
        for (size_t c = 0; c < columns; c++) {
            for (size_t i = 0; i < height; i++) {
                float *in_memory = t->values + (r + i) * down + c * across;
                float *in_file = some + i * columns + c;
                if (w) *in_file = *in_memory;
                else *in_memory = *in_file;
            }
        }
        for (size_t e = 0; e < count && digest; e++)
            digest64_number(digest, bits_of_float(some[e]));
        if (w) SC_TRY(sc_writer_floats(w, some, count));
    }
    return SC_OK;
}

/* Writes or reads the tensors of an SAE and, with a trainer, of Adam. A file that is read may have
 * no others: they might change what the SAE computes. */
static int move_tensors(const sc_sae *sae, const sc_trainer *t, const sc_safetensors *file,
                        sc_writer *w, uint64_t *digest) {
    static const sc_trainer none;
    size_t n = sae->d_sae;
    size_t D = sae->d_in;
    size_t found = 0;                            /* tensors in the file */
    if (!w) found = file->tensors;
    if (!t) t = &none;
    const float_tensor list[] = {
        { "W_enc", sae->W_enc, 2, { D, n }, 1 },             /* the SAE */
        { "b_enc", sae->b_enc, 1, { n }, 0 },
        { "W_dec", sae->W_dec, 2, { n, D }, 0 },
        { "b_dec", sae->b_dec, 1, { D }, 0 },
        { sae->threshold ? "threshold" : "", sae->threshold, 1, { n }, 0 },
        { "W_enc_m", t->W_enc.m, 2, { n, D }, 0 },           /* Adam's moments, in checkpoints */
        { "W_enc_v", t->W_enc.v, 2, { n, D }, 0 },
        { "W_dec_m", t->W_dec.m, 2, { n, D }, 0 },
        { "W_dec_v", t->W_dec.v, 2, { n, D }, 0 },
        { "b_enc_m", t->b_enc.m, 1, { n }, 0 },
        { "b_enc_v", t->b_enc.v, 1, { n }, 0 },
        { "b_dec_m", t->b_dec.m, 1, { D }, 0 },
        { "b_dec_v", t->b_dec.v, 1, { D }, 0 },
        { "silent", NULL, 1, { n }, 0 } };                   /* there too, but not of floats */
    for (size_t i = 0; i < found; i++) {
        const char *name = file->tensor[i].name;
        size_t k = 0;
        while (k < COUNT(list) && strcmp(name, list[k].name) != 0) k++;
        if (k == COUNT(list))
            return fail("%s: tensor %.100s may change what the SAE computes (expected W_enc, "
                        "b_enc, W_dec, b_dec, and threshold with architecture jumprelu)",
                        file->path, name);
    }
    float *some = new_array(n + D, MOVED_ROWS * sizeof *some);       /* enough for each */
    int status = some ? SC_OK : SC_FAILED;
    for (size_t i = 0; i < COUNT(list) && status == SC_OK; i++)
        if (list[i].values) status = move_tensor(&list[i], file, w, digest, some);
    free(some);
    return status;
}

/* --- The origin of activations (saeclip.h) ---
 *
 * The value of a key is that of the first source which gives one: an option, the data, the SAEs in
 * turn, the model's metadata, the usual value. It is parsed, and printed in one form. A source that
 * says something else is then refused by the key; an option overrules it with a remark instead. */

static const char *const origin_keys[SC_ORIGIN_KEYS] = {     /* in the order of saeclip.h */
    "model", "layer", "hook", "tokens",
    "mean", "std", "gelu", "epsilon", "heads",               /* settings of the model */
    "square", "crop" };                                      /* and of its images */

/* Prints floats with the fewest digits that give the same floats again; %g cuts trailing zeros, and
 * six digits are never too many. text: [256] */
static void print_floats(char *text, const float *value, int count) {
    for (int i = 0; i < count; i++) {
        int digits = 6;
        if (i > 0) *text++ = ',';
        do {
            sprintf(text, "%.*g", digits, (double)value[i]);
        } while (strtof(text, NULL) != value[i] && digits++ < 9);
        text += strlen(text);
    }
}

/* What the metadata say. */
static sc_origin read_origin(const sc_safetensors *file) {
    sc_origin origin = { 0 };
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) {
        const char *text = sc_metadata_find(file, origin_keys[k]);
        if (text) snprintf(origin.text[k], sizeof *origin.text, "%s", base_name(text));
    }
    return origin;
}

static int put_origin(sc_writer *w, const sc_origin *origin) {
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) {
        const char *text = origin->text[k];
        if (*text) SC_TRY(sc_writer_metadata(w, origin_keys[k], text));
    }
    return SC_OK;
}

/* Takes from another origin what this one does not say. */
static void fill_origin(sc_origin *origin, const sc_origin *other) {
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++)
        if (!*origin->text[k]) strcpy(origin->text[k], other->text[k]);
}

/* Refuses a file whose origin contradicts the one in force. What options say (NULL: nothing)
 * overrules the file. */
static int check_origin(const char *path, const sc_origin *origin, const sc_origin *in_force,
                        const sc_origin *said) {
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) {
        const char *key = origin_keys[k];
        const char *found = origin->text[k];
        const char *now = in_force->text[k];
        if (!*found || !*now || strcmp(found, now) == 0) continue;
        if (!said || !*said->text[k])
            return fail("%s: %s is %s (expected %s, the value in force)", path, key, found, now);
        note("%s: %s is %s, overruled by %s", path, key, found, now);
    }
    return SC_OK;
}

static const char *const hook_names[] = { "attn", "mlp", "resid" };      /* as in sc_hook */

int sc_hook_point(const sc_origin *origin, sc_tap *tap) {
    int hook = SC_ATTN;
    while (hook <= SC_RESID && strcmp(origin->text[SC_HOOK], hook_names[hook]) != 0) hook++;
    tap->hook = (sc_hook)hook;
    tap->layer = (size_t)strtoul(origin->text[SC_LAYER], NULL, 10);
    if (hook <= SC_RESID && tap->layer > 0) return SC_OK;
    return fail("no hook point (expected a layer, and attn, mlp or resid)");
}

/* --- SAEs out --- */

/* SAELens's name for the kind of an SAE. */
static const char *architecture_of(const sc_sae *sae) {
    if (sae->topk) return "topk";
    if (sae->threshold) return "jumprelu";
    return "standard";                           /* ReLU */
}

static int write_sae(sc_writer *w, void *context) {
    const sc_sae *sae = context;
    SC_TRY(sc_writer_metadata(w, "architecture", architecture_of(sae)));
    if (sae->topk) SC_TRY(put_metadata(w, "k", "%zu", sae->k));
    SC_TRY(put_metadata(w, "d_in", "%zu", sae->d_in));
    SC_TRY(put_metadata(w, "d_sae", "%zu", sae->d_sae));
    SC_TRY(put_origin(w, &sae->origin));
    return move_tensors(sae, NULL, NULL, w, NULL);
}

/* The API's: train writes more metadata. */
int sc_sae_save(const sc_sae *sae, const char *path) {
    sc_sae copy = *sae;
    SC_TRY(check_k(sae));
    return save_tensors(path, write_sae, &copy);
}

/* Writes the cfg.json of a folder, with the keys that SAELens 3 to 6 need. Hook points have
 * TransformerLens's names, which count blocks from 0. */
static int write_saelens(const sc_sae *sae, const char *path) {
    static const char *const places[] = { "attn_out", "mlp_out", "resid_post" };
    const char *model = sae->origin.text[SC_MODEL];
    const char *activation = "relu";
    char k[32] = "";                             /* an argument of the activation function */
    char hook[64] = "unknown";
    size_t layer = 0;
    sc_tap tap;
    sc_output out;
    if (!*model) model = "unknown";
    if (sc_hook_point(&sae->origin, &tap) == SC_OK) {
        layer = tap.layer - 1;
        snprintf(hook, sizeof hook, "blocks.%zu.hook_%s", layer, places[tap.hook]);
    }
    if (sae->topk) {
        activation = "topk";
        snprintf(k, sizeof k, "\"k\": %zu", sae->k);
    }
    SC_TRY(output_open(&out, path));
    fprintf(out.file, "{\n  \"architecture\": \"%s\",\n  \"d_in\": %zu,\n  \"d_sae\": %zu,\n"
            "  \"activation_fn_str\": \"%s\",\n  \"activation_fn_kwargs\": {%s},\n"
            "  \"apply_b_dec_to_input\": true,\n  \"normalize_activations\": \"none\",\n"
            "  \"hook_name\": \"%s\",\n  \"hook_layer\": %zu,\n  \"hook_head_index\": null,\n"
            "  \"dtype\": \"float32\",\n  \"device\": \"cpu\",\n"
            "  \"context_size\": 1,\n  \"dataset_path\": \"\",\n  \"model_name\": ",
            architecture_of(sae), sae->d_in, sae->d_sae, activation, k, hook, layer);
    print_json(out.file, model);
    fputs("\n}\n", out.file);
    return output_close(&out, SC_OK);
}

/* --- SAEs in ---
 *
 * Our own SAEs have their settings in the metadata. Those of SAELens (jbloomAus/SAELens, versions 2
 * to 6) have them in a file cfg.json beside the weights. Both are read, and must agree. */

static const char saelens_weights[] = "sae_weights.safetensors";

enum { ARCHITECTURE, TOP_K, D_IN, D_SAE, SAE_KEYS };

/* The keys that are used or change what an SAE computes, and their values for what is computed
 * here; NULL: a whole number. */
static const char *const sae_rules[][2] = {
    { "architecture", "standard|topk|jumprelu" },            /* the first SAE_KEYS are used */
    { "k", NULL },
    { "d_in", NULL },
    { "d_sae", NULL },
    { "activation_fn", "relu|topk" },                        /* until version 2 */
    { "activation_fn_str", "relu|topk" },
    { "apply_b_dec_to_input", "true" },
    { "normalize_activations", "none|false|null" },
    { "reshape_activations", "none|null" },
    { "finetuning_scaling_factor", "false|null" },
    { "rescale_acts_by_decoder_norm", "false|null" },
    { "hook_head_index", "null" } };

/* What was read so far. */
typedef struct {
    const char *path;                /* the file that is being read */
    char text[SAE_KEYS][16];         /* the values, "" where nothing is said */
    int topk;                        /* the activation function is TopK, also of "standard" SAEs */
} sae_settings;

/* Takes a setting, which may be nested in cfg.json. */
static int take_setting(void *context, const char *key, const char *value) {
    sae_settings *s = context;
    size_t i = 0;
    while (i < COUNT(sae_rules) && strcmp(key, sae_rules[i][0]) != 0) i++;
    if (i == COUNT(sae_rules)) return SC_OK;
    const char *allowed = sae_rules[i][1];
    if (!allowed && strcmp(value, "null") == 0) return SC_OK;
    if (!allowed && value[strspn(value, "0123456789")])
        return fail("%s: %s is %s (expected a whole number)", s->path, key, value);
    if (allowed && !is_choice(allowed, value))
        return fail("%s: %s is %s (expected %s)", s->path, key, value, allowed);
    if (i >= SAE_KEYS) {
        if (strcmp(value, "topk") == 0) s->topk = 1;
        return SC_OK;
    }
    char *text = s->text[i];
    if (*text && strcmp(text, value) != 0)
        return fail("%s: %s is %s (expected %s, as read before)", s->path, key, value, text);
    snprintf(text, sizeof *s->text, "%s", value);
    return SC_OK;
}

/* config: the path of cfg.json */
static int read_sae(sc_sae *sae, const sc_safetensors *file, const char *config) {
    const sc_tensor *encoder = sc_tensor_find(file, "W_enc");
    const char *start = sc_metadata_find(file, "b_dec_start");
    sae_settings s = { .path = file->path };
    char text[1 << 16] = "";                     /* of cfg.json; JSON that is cut is refused */
    if (!encoder || encoder->rank != 2 || encoder->count == 0)
        return fail("%s: not an SAE (expected a tensor W_enc [d_in, d_sae])", file->path);
    SC_TRY(new_sae(sae, encoder->shape[0], encoder->shape[1]));
    /* The settings: the sizes, then the metadata, then cfg.json if there is one. */
    snprintf(s.text[D_IN], sizeof *s.text, "%zu", sae->d_in);
    snprintf(s.text[D_SAE], sizeof *s.text, "%zu", sae->d_sae);
    for (size_t i = 0; i < file->entries; i++)
        SC_TRY(take_setting(&s, file->metadata[i].key, file->metadata[i].value));
    FILE *cfg = fopen(config, "r");
    if (!cfg && errno != ENOENT)
        return fail("%s: cannot be opened: %s", config, strerror(errno));
    if (cfg) {
        size_t length = fread(text, 1, sizeof text - 1, cfg);
        fclose(cfg);
        s.path = config;
        json j = json_begin(config, text, length);
        SC_TRY(json_scalars(&j, "", 0, take_setting, &s));
        SC_TRY(json_end(&j));
    }
    /* A k without an architecture means TopK. */
    const char *architecture = s.text[ARCHITECTURE];
    const char *k = s.text[TOP_K];
    sae->k = (size_t)strtoul(k, NULL, 10);
    sae->topk = s.topk || strcmp(architecture, "topk") == 0 || (!*architecture && *k);
    if (!sae->topk && strcmp(architecture, "jumprelu") == 0) {
        sae->threshold = new_array(sae->d_sae, sizeof *sae->threshold);
        if (!sae->threshold) return SC_FAILED;
    }
    SC_TRY(move_tensors(sae, NULL, file, NULL, &sae->digest));
    for (size_t j = 0; j < sae->d_sae && sae->threshold; j++)
        if (sae->threshold[j] < 0)
            return fail("%s: threshold[%zu] is %g (expected at least 0)", file->path, j,
                        (double)sae->threshold[j]);
    sae->origin = read_origin(file);
    if (start) snprintf(sae->b_dec_start, sizeof sae->b_dec_start, "%s", start);
    sae->path = join_text(file->path, "");
    return sae->path ? SC_OK : SC_FAILED;
}

/* Opens a file, with the cfg.json beside it if there is one, or a folder of SAELens. */
int sc_sae_open(sc_sae *sae, const char *path) {
    char weights[MAX_PATH], config[MAX_PATH];
    sc_safetensors file;
    *sae = (sc_sae){ 0 };
    if (is_folder(path)) SC_TRY(join_path(path, saelens_weights, weights));
    else SC_TRY(join_path("", path, weights));
    int folder = (int)(base_name(weights) - weights);        /* its length */
    snprintf(config, sizeof config, "%.*scfg.json", folder, weights);
    SC_TRY(sc_safetensors_open(&file, weights));
    int status = read_sae(sae, &file, config);
    sc_safetensors_close(&file);
    if (status != SC_OK) sc_sae_close(sae);
    return status;
}

/* By this digest statistics of another SAE are refused. Options may have changed the settings. */
static uint64_t sae_digest(const sc_sae *sae) {
    uint64_t digest = sae->digest;
    digest64_number(&digest, sae->threshold != NULL);
    if (sae->topk) digest64_number(&digest, sae->k);
    return digest;
}

/* ============================================================================================
 * 18. Activations
 *
 * One source of activations for training and measuring, batch by batch: read from a file that
 * `extract` wrote, or computed from images as they are read. Several hook points share one pass.
 * ============================================================================================ */

/* Sets the image of draw 0, 1, ...; SC_OK, or SC_END when there are no more. */
typedef int draw_function(void *context, size_t draw, size_t *image);

typedef struct {
    size_t T;                        /* tokens per image */
    size_t D;                        /* width */
    size_t stride;                   /* from row to row: the width padded to 16 */
    size_t grid;                     /* patches per side, 0 where the tokens are not a grid */
    size_t first_patch;              /* 1 where token 0 is the class token */
    sc_origin said;                  /* as options say it; a layer from the end is negative */
    sc_origin origin;                /* in force; without the hook points of SAEs */
    size_t taps;
    sc_tap tap[SC_MAX_TAPS];         /* a hook point per SAE; out: [room, T, stride] */
    size_t *image;                   /* [room], the batch's images in the data set */
    int64_t *label;                  /* [room], -1 without */
    unsigned char *pixels;           /* [room, S, S, 3] */
    float *logits;                   /* [room, classes], where they are asked for */
    size_t count;                    /* images in the current batch */
    size_t used;                     /* images in the batches before it */
    size_t drawn;                    /* the next draw */
    size_t bad;                      /* images passed over as bad */
    int skip_bad;                    /* whether they are passed over */
    memory_list memory;
    int is_file;                     /* whether activations were saved */
    sc_safetensors file;             /* in this file */
    const sc_tensor *activations;    /* [images, T, D] */
    sc_images set;                   /* the images; of saved activations only their labels */
    sc_model model;
    sc_preprocess preprocess;
    draw_function *order;            /* NULL: first to last */
    void *order_context;
} feed;

enum {
    FORWARD_IMAGES = 16,             /* images in one forward pass */
    MEASURE_IMAGES = 16              /* images in a batch, except in training */
};

/* The name of an image in messages and tables. */
static const char *image_name(const feed *f, size_t image) { return f->set.image[image].name; }

/* Adds the image and the token to an error. token: in the current batch */
static int blame_token(const feed *f, size_t token) {
    size_t image = f->image[token / f->T];
    const char *name = image_name(f, image);
    const char *blank = *name ? " " : "";
    return fail("image %zu%s%s, token %zu: %s", image, blank, name, token % f->T, sc_error());
}

/* --- Opening --- */

/* Opens saved activations. A file without the digest of its data set gets that of its labels. */
static int open_activations(feed *f, const options *o) {
    SC_TRY(sc_safetensors_open(&f->file, o->acts));
    const sc_tensor *a = sc_tensor_find(&f->file, "activations");
    const char *digest = sc_metadata_find(&f->file, "data_digest");
    const sc_origin saved = read_origin(&f->file);
    if (!a || a->rank != 3 || a->count == 0)
        return fail("%s: not saved activations (expected a tensor activations [images, tokens, "
                    "width])", o->acts);
    if (o->layer < 0)
        return usage("--layer: %ld (expected 1 or more for saved activations)", o->layer);
    f->is_file = 1;
    f->activations = a;
    f->T = a->shape[1];
    f->D = a->shape[2];
    fill_origin(&f->origin, &saved);
    SC_TRY(check_origin(o->acts, &saved, &f->origin, &f->said));
    f->first_patch = strcmp(f->origin.text[SC_TOKENS], "patches") != 0;
    f->set.limit = SIZE_MAX;
    if (o->limit) f->set.limit = (size_t)o->limit;
    SC_TRY(add_images(&f->set, &f->file, a->shape[0], -1));
    f->set.digest = images_digest(&f->set);
    if (digest) f->set.digest = strtoull(digest, NULL, 16);
    if (f->set.count < a->shape[0])              /* --limit makes it another data set */
        digest64_number(&f->set.digest, f->set.count);
    return SC_OK;
}

/* Opens images and a model. The origin is filled, parsed, and printed. */
static int open_model(feed *f, const options *o, const sc_sae *sae, size_t saes) {
    static const sc_origin usual = {
        .text = { [SC_TOKENS] = "all", [SC_SQUARE] = "0", [SC_CROP] = "torchvision" } };
    const size_t room = sizeof *usual.text;
    sc_origin *now = &f->origin;
    sc_model *m = &f->model;
    f->skip_bad = o->skip_bad;
    SC_TRY(sc_images_open(&f->set, o->operand[0], (size_t)o->limit));
    /* What the options leave open, a packed set says, else an SAE, else the model's file. */
    const sc_origin packed = read_origin(&f->set.packed);
    fill_origin(now, &packed);
    for (size_t i = 0; i < saes; i++)
        fill_origin(now, &sae[i].origin);
    fill_origin(now, &usual);
    int status = sc_model_open(m, o->model, now);
    /* an invalid setting of the model is an option's, or else an SAE's */
    int from_options = 0;
    for (size_t k = SC_MEAN; k <= SC_HEADS; k++)
        from_options |= *f->said.text[k] != '\0';
    if (status == SC_USAGE && saes > 0 && !from_options)
        return fail("%s: %s", sae->path, sc_error());
    SC_TRY(status);
    /* Which tokens are kept, and how images are made. */
    size_t square = strtoul(now->text[SC_SQUARE], NULL, 10);
    int patches = strcmp(now->text[SC_TOKENS], "patches") == 0;
    int class = strcmp(now->text[SC_TOKENS], "cls") == 0;
    f->D = m->width;
    f->T = m->tokens;
    if (patches) f->T--;
    if (class) f->T = 1;
    f->first_patch = !patches;
    f->preprocess.size = (int)m->image_size;
    f->preprocess.square = (int)smaller(square, 16384);
    f->preprocess.crop_hf = strcmp(now->text[SC_CROP], "hf") == 0;
    /* What is in force. Each SAE has its own hook point. */
    strcpy(now->text[SC_LAYER], f->said.text[SC_LAYER]);
    strcpy(now->text[SC_HOOK], f->said.text[SC_HOOK]);
    if (!patches && !class) strcpy(now->text[SC_TOKENS], "all");
    print_floats(now->text[SC_MEAN], m->mean, 3);
    print_floats(now->text[SC_STD], m->std, 3);
    print_floats(now->text[SC_EPSILON], &m->epsilon, 1);
    strcpy(now->text[SC_GELU], "gelu");
    if (m->activation == QUICK_GELU) strcpy(now->text[SC_GELU], "quick_gelu");
    snprintf(now->text[SC_HEADS], room, "%zu", m->heads);
    snprintf(now->text[SC_SQUARE], room, "%d", f->preprocess.square);
    if (!f->preprocess.crop_hf) strcpy(now->text[SC_CROP], "torchvision");
    return check_origin(f->set.packed.path, &packed, now, &f->said);
}

/* Opens DATA: saved activations (--acts), or images through a model, with the settings of SAEs. */
static int open_feed(feed *f, const options *o, const sc_sae *sae, size_t saes) {
    *f = (feed){ 0 };
    sc_origin *said = &f->said;
    const size_t room = sizeof *said->text;
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) {
        const char *text = o->origin[k];
        if (text) snprintf(said->text[k], room, "%s", text);
    }
    if (o->model) snprintf(said->text[SC_MODEL], room, "%s", base_name(o->model));
    if (o->layer) snprintf(said->text[SC_LAYER], room, "%ld", o->layer);
    if (o->square >= 0) snprintf(said->text[SC_SQUARE], room, "%ld", o->square);
    f->origin = *said;
    if (o->acts && !o->operand[0]) SC_TRY(open_activations(f, o));
    else if (o->operand[0] && o->model) SC_TRY(open_model(f, o, sae, saes));
    else return usage("no data (expected --acts FILE, or -m MODEL and IMAGES)");
    f->stride = padded(f->D);
    size_t most = smaller(SC_MAX_TOKENS, SIZE_MAX / sizeof(float) / f->stride);
    if (f->D > SC_MAX_WIDTH || f->T > most)
        return fail("%s: activations of %zu tokens x %zu are too large",
                    f->is_file ? o->acts : o->model, f->T, f->D);
    size_t patches = f->T - f->first_patch;
    while ((f->grid + 1) * (f->grid + 1) <= patches) f->grid++;
    if (f->grid * f->grid != patches) f->grid = 0;
    return SC_OK;
}

/* Adds the hook point of an origin, the MLP of the last block but one if it has none. A layer from
 * the end gets its number. Saved activations have one hook point, which may be unknown. */
static int add_tap(feed *f, sc_origin *origin) {
    static const sc_origin usual = { .text = { [SC_LAYER] = "-2", [SC_HOOK] = "mlp" } };
    long blocks = (long)f->model.blocks;
    sc_tap *tap = &f->tap[f->taps++];            /* there is room for one per SAE */
    tap->stride = f->stride;
    if (f->is_file) return SC_OK;
    fill_origin(origin, &usual);
    long layer = strtol(origin->text[SC_LAYER], NULL, 10);
    if (layer == 0 || layer > blocks || layer < -blocks)
        return fail("%s: layer %ld (expected 1 to %ld, or -1 to -%ld)", f->model.file.path, layer,
                    blocks, blocks);
    if (layer < 0) layer += blocks + 1;
    snprintf(origin->text[SC_LAYER], sizeof *origin->text, "%ld", layer);
    return sc_hook_point(origin, tap);
}

/* Connects an SAE to a hook point of its own. Options overrule its architecture and k. Its origin
 * must agree with that of the data, and then is the one in force. */
static int connect_sae(feed *f, sc_sae *sae, const options *o) {
    const char *path = sae->path;                /* NULL: it is new */
    sc_origin now = f->origin;
    sc_tap tap;
    if (o->k) sae->k = (size_t)o->k;
    if (o->arch) {
        sae->topk = strcmp(o->arch, "topk") == 0;
        free(sae->threshold);
        sae->threshold = NULL;
    }
    int bad_k = check_k(sae) != SC_OK;
    if (bad_k && o->k) return usage("--k: %s", sc_error());
    if (bad_k) return fail("%s: %s: see --k", path ? path : o->output, sc_error());
    if (sae->d_in != f->D)
        return fail("%s: the SAE has width %zu, the activations have %zu", path, sae->d_in, f->D);
    fill_origin(&now, &sae->origin);
    if (path && !f->is_file && sc_hook_point(&now, &tap) != SC_OK)
        return usage("%s: does not name its hook point (expected --layer and --hook)", path);
    SC_TRY(add_tap(f, &now));
    SC_TRY(check_origin(path, &sae->origin, &now, &f->said));
    sae->origin = now;
    return SC_OK;
}

/* Prepares batches of up to `room` images, in an order (NULL: first to last). */
static int start_feed(feed *f, size_t room, draw_function *order, void *context, int with_logits) {
    size_t S = (size_t)f->preprocess.size;
    size_t row = f->stride * sizeof(float);
    size_t deepest = 0;                          /* the last block that is needed */
    size_t T = f->T;
    if (!f->is_file) T = f->model.tokens;        /* not all are kept */
    for (size_t i = 0; i < f->taps; i++) {
        if (f->tap[i].layer > deepest) deepest = f->tap[i].layer;
    }
    if (with_logits) deepest = f->model.blocks;
    if (f->model.blocks) SC_TRY(sc_model_load(&f->model, deepest, with_logits));
    f->order = order;
    f->order_context = context;
    const array_spec arrays[] = {
        ARRAY(f->image, room, 1),
        ARRAY(f->label, room, 1),
        ARRAY(f->pixels, room, S * S * 3) };
    SC_TRY(new_arrays(&f->memory, arrays, COUNT(arrays)));
    for (size_t i = 0; i < f->taps; i++) {
        float **out = &f->tap[i].out;
        if (f->is_file && i > 0) {
            *out = f->tap[0].out;                /* the same for all SAEs */
            continue;
        }
        SC_TRY(allocate(&f->memory, out, room, T * row));
    }
    if (!with_logits) return SC_OK;
    return allocate(&f->memory, &f->logits, room, f->model.classes * sizeof *f->logits);
}

/* --- Reading --- */

/* Reads the image in slot f->count + task: its pixels, or its saved activations. */
static int load_task(void *context, size_t task) {
    feed *f = context;
    size_t S = (size_t)f->preprocess.size;
    size_t slot = f->count + task;
    size_t image = f->image[slot];
    unsigned char *pixels = f->pixels + slot * S * S * 3;
    f->label[slot] = f->set.image[image].label;
    if (!f->is_file) return load_image(&f->set, image, &f->preprocess, pixels);
    for (size_t t = 0; t < f->T; t++) {
        size_t token = slot * f->T + t;          /* in the batch */
        size_t first = (image * f->T + t) * f->D;
        float *out = f->tap[0].out + token * f->stride;
        if (sc_tensor_floats(&f->file, f->activations, first, f->D, out) != SC_OK)
            return blame_token(f, token);
    }
    return SC_OK;
}

/* Fills the batch with `want` images, or fewer at the end; all threads decode at once. With
 * skip_bad a bad image is reported once, and loses its name. If all are bad this fails, since the
 * order may be endless. */
static int load_images(feed *f, size_t want) {
    const size_t last = smaller(f->set.count, f->set.limit);
    for (;;) {
        /* Draw the batch, without bad images. */
        size_t draw = f->drawn;
        size_t end = 0;
        for (; end < want; draw++) {
            size_t chosen = draw;
            int ends = draw >= last;
            if (f->order) ends = f->order(f->order_context, draw, &chosen) == SC_END;
            if (ends) break;
            if (f->set.image[chosen].name) f->image[end++] = chosen;
        }
        int status = parallel_for(end - f->count, load_task, f);
        if (status == SC_OK) {
            f->drawn = draw;
            f->count = end;
            return SC_OK;
        }
        /* Images before a bad one stay. */
        f->count += pool.failed_task;
        if (status != SC_FAILED || !f->skip_bad) return SC_FAILED;
        size_t image = f->image[f->count];
        note("%s; passed over", sc_error());
        free(f->set.image[image].name);
        f->set.image[image].name = NULL;
        f->bad++;
        if (f->bad == f->set.count)
            return fail("%s; none of %zu images can be read", sc_error(), f->bad);
    }
}

/* Finite weights may still give numbers that are not finite. rows: [images, count, stride] */
static int check_finite(const feed *f, const float *rows, size_t count, size_t stride) {
    size_t numbers = f->count * count * stride;
    size_t bad = first_not_finite(rows, numbers);
    size_t per_row = f->T / count;               /* tokens */
    if (bad == numbers) return SC_OK;
    fail("%s gives %g (expected a finite number)", f->model.file.path, (double)rows[bad]);
    return blame_token(f, bad / stride * per_row);
}

/* Reads the next batch and computes its activations: f->count images, 0 at the end. */
static int next_batch(feed *f, size_t want) {
    size_t S = f->model.image_size;
    size_t T = f->model.tokens;
    size_t classes = f->model.classes;
    size_t all = T * f->stride;                  /* numbers of an image */
    size_t kept = f->T * f->stride;              /* those of the tokens that are kept */
    size_t images;
    f->used += f->count;
    f->count = 0;
    SC_TRY(load_images(f, want));
    if (f->is_file || (f->taps == 0 && !f->logits)) return SC_OK;
    /* Forward passes; out: [count, model's tokens, stride] */
    for (size_t first = 0; first < f->count; first += images) {
        const unsigned char *pixels = f->pixels + first * S * S * 3;
        sc_tap tap[SC_MAX_TAPS];
        float *head = f->logits;
        images = smaller(f->count - first, FORWARD_IMAGES);
        memcpy(tap, f->tap, sizeof tap);
        for (size_t i = 0; i < f->taps; i++) {
            tap[i].out += first * all;
        }
        if (head) head += first * classes;
        SC_TRY(sc_model_forward(&f->model, pixels, images, tap, f->taps, head));
    }
    /* Move the tokens that are kept together. */
    for (size_t i = 0; i < f->taps; i++) {
        float *out = f->tap[i].out;
        const float *from = f->first_patch ? out : out + f->stride;
        for (size_t image = 0; image < f->count; image++) {
            memmove(out + image * kept, from + image * all, kept * sizeof *out);
        }
        SC_TRY(check_finite(f, out, f->T, f->stride));
    }
    if (!f->logits) return SC_OK;
    return check_finite(f, f->logits, 1, classes);
}

static void close_feed(feed *f) {
    release(&f->memory);
    sc_safetensors_close(&f->file);
    sc_images_close(&f->set);
    sc_model_close(&f->model);
    *f = (feed){ 0 };
}

/* ********************************************************************************************
 * Part IV: the program
 *
 * Training runs, statistics, tables, sheets, figures, the atlas, the command line.
 * ******************************************************************************************** */

/* ============================================================================================
 * 19. Training runs
 *
 * Training steps over a data set: the order of the images, the log, checkpoints, signals. A run
 * that was stopped continues from its checkpoint to the same bytes.
 * ============================================================================================ */

typedef struct {
    const options *o;
    feed data;
    sc_sae sae;
    sc_trainer *trainer;             /* trains `sae`; counts the steps done */
    size_t batch;                    /* images per step */
    uint64_t *order, epoch;          /* [N], and the epoch it is of; NULL: first to last */
    uint64_t steps;                  /* the step after which the run ends */
    uint64_t next_draw;              /* the place in the order where the next step begins */
    FILE *log;                       /* NULL: none */
    double started;                  /* when; for the log */
    char output[MAX_PATH];           /* the SAE's file */
    char config[MAX_PATH];           /* cfg.json of a folder for SAELens, "": none */
    char checkpoint[MAX_PATH + sizeof ".ckpt"];
    char previous[MAX_PATH + sizeof ".ckpt.prev"];   /* the checkpoint before it */
    int checkpoints;                 /* requested, not only after a signal */
} training_run;

static atomic_int stop_signal;       /* SIGINT or SIGTERM; 0: training goes on */

static void ask_to_stop(int number) { atomic_store(&stop_signal, number); }

/* The image at place `draw` of the order, which goes on without end: epoch after epoch, each with a
 * permutation of its own. */
static int training_draw(void *context, size_t draw, size_t *image) {
    training_run *run = context;
    size_t N = run->data.set.count, epoch = draw / N;
    if (run->order && epoch != run->epoch)           /* the first draw of an epoch */
        permutation((uint64_t)run->o->seed, epoch, run->order, N);
    run->epoch = epoch;
    *image = draw % N;
    if (run->order) *image = (size_t)run->order[draw % N];
    return SC_OK;
}

/* --- The recipe: the settings that determine the numbers of a run, as metadata --- */

/* Where settings and state go to, or where they come from: one function writes and reads. */
typedef struct {
    sc_writer *w;                    /* NULL: read */
    const sc_safetensors *file;
    int failed;                      /* the status of the first error */
} transfer;

/* "" is a setting that the run does not have. A checkpoint with another value is refused. */
SC_PRINTF(3, 4) static void move_setting(transfer *to, const char *key, const char *format, ...) {
    char value[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(value, sizeof value, format, arguments);
    va_end(arguments);
    if (to->w) {
        if (*value) sc_writer_metadata(to->w, key, value);
        return;
    }
    const char *found = sc_metadata_find(to->file, key);
    if (!found) found = "";
    if (to->failed || strcmp(found, value) == 0) return;
    to->failed = fail("%s: a checkpoint of another run: %s is '%s' there and '%s' here",
                      to->file->path, key, found, value);
}

/* Not in the recipe: paths, threads, and the number of steps, so that a run can be made longer. k
 * and l1 need no "": which of them there is follows from the architecture. */
static void move_recipe(const training_run *run, transfer *to) {
    const options *o = run->o;
    const sc_sae *sae = &run->sae;
    /* What the SAE is, and of which activations. */
    move_setting(to, "architecture", "%s", architecture_of(sae));
    if (sae->topk) move_setting(to, "k", "%zu", sae->k);
    move_setting(to, "d_in", "%zu", sae->d_in);
    move_setting(to, "d_sae", "%zu", sae->d_sae);
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++)
        move_setting(to, origin_keys[k], "%s", sae->origin.text[k]);
    if (!sae->topk) move_setting(to, "l1", "%.17g", o->l1);
    move_setting(to, "lr", "%.17g", o->lr);
    move_setting(to, "warmup", "%ld", o->warmup);
    move_setting(to, "batch", "%ld", o->batch);
    move_setting(to, "seed", "%ld", o->seed);
    move_setting(to, "ghost", "%d", o->ghost);
    move_setting(to, "dead_window", "%ld", o->dead_window);
    move_setting(to, "b_dec_images", "%ld", o->b_dec_images);
    move_setting(to, "b_dec_start", "%s", o->init ? "file" : o->b_dec);
    move_setting(to, "order", "%s", o->order);
}

static int write_trained(sc_writer *w, void *context) {
    const training_run *run = context;
    transfer to = { .w = w };
    move_recipe(run, &to);
    SC_TRY(put_metadata(w, "steps", "%ju", (uintmax_t)run->trainer->step));
    return move_tensors(&run->sae, NULL, NULL, w, NULL);
}

/* --- Checkpoints: the SAE, and everything else that training goes on from --- */

static int move_counter(const transfer *to, const char *key, uint64_t *counter) {
    if (to->w) return put_metadata(to->w, key, "%ju", (uintmax_t)*counter);
    const char *text = sc_metadata_find(to->file, key);
    if (!text) return fail("%s: not a checkpoint: metadata %s is missing", to->file->path, key);
    *counter = (uint64_t)strtoull(text, NULL, 10);
    return SC_OK;
}

/* After a failure to read, the run's state is undefined. */
static int move_checkpoint(training_run *run, transfer *to) {
    const feed *f = &run->data;
    const sc_safetensors *source = f->is_file ? &f->file : &f->model.file;
    sc_trainer *t = run->trainer;
    size_t n = run->sae.d_sae;
    uint64_t data = 0, state = 0;            /* digests */
    SC_TRY(move_counter(to, "steps", &t->step));
    SC_TRY(move_counter(to, "next_draw", &run->next_draw));
    move_recipe(run, to);
    /* The images' names and labels, and the first MiB of the weights or saved activations. */
    size_t bytes = (size_t)(source->data - source->map) + ((size_t)1 << 20);
    digest64_number(&data, f->set.digest);
    for (size_t i = 0; i < smaller(bytes, source->size); i++)
        digest64_number(&data, source->map[i]);
    move_setting(to, "data_digest", "%ju", (uintmax_t)data);
    if (to->failed) return to->failed;
    /* The SAE, Adam's moments, and for how many steps each latent has been silent. */
    SC_TRY(move_tensors(&run->sae, t, to->file, to->w, &state));
    if (to->w) {
        SC_TRY(sc_writer_tensor(to->w, "silent", SC_I64, 1, &n));
        SC_TRY(sc_writer_integers(to->w, t->silent, n));
    } else {
        const sc_tensor *silent = sc_tensor_find(to->file, "silent");
        if (!silent || silent->count != n)
            return fail("%s: missing tensor silent [%zu]", to->file->path, n);
        SC_TRY(sc_tensor_integers(to->file, silent, 0, n, t->silent));
    }
    /* A checksum of the tensors and counters. */
    for (size_t j = 0; j < n; j++)
        digest64_number(&state, (uint64_t)t->silent[j]);
    digest64_number(&state, t->step);
    digest64_number(&state, run->next_draw);
    uint64_t checksum = state;
    SC_TRY(move_counter(to, "checksum", &checksum));
    if (checksum == state) return SC_OK;
    return fail("%s: damaged: its checksum does not match", to->file->path);
}

static int write_checkpoint(sc_writer *w, void *context) {
    training_run *run = context;
    transfer to = { .w = w };
    w->out.previous = run->previous;     /* the file that is replaced keeps this name */
    return move_checkpoint(run, &to);
}

static int save_checkpoint(training_run *run) {
    return save_tensors(run->checkpoint, write_checkpoint, run);
}

/* Continues from a checkpoint if there is one. The error that refuses a damaged one names the
 * checkpoint before it. */
static int resume_training(training_run *run) {
    sc_trainer *t = run->trainer;
    sc_safetensors file;
    int before = access(run->previous, F_OK) == 0;
    if (!before && access(run->checkpoint, F_OK) != 0) {
        note("%s: no checkpoint yet, starting from the beginning", run->checkpoint);
        return SC_OK;
    }
    int status = sc_safetensors_open(&file, run->checkpoint);
    if (status == SC_OK) {
        status = move_checkpoint(run, &(transfer){ .file = &file });
        sc_safetensors_close(&file);
    }
    if (status != SC_OK && before)
        return fail("%s; the checkpoint before it is %s", error_text, run->previous);
    if (status != SC_OK) return status;
    /* A longer run cannot become a shorter one. */
    if (t->step > run->steps)
        return usage("%s: a checkpoint of step %ju, but this run ends at step %ju", run->checkpoint,
                     (uintmax_t)t->step, (uintmax_t)run->steps);
    /* 0.9^step and 0.999^step, rounded as in the steps themselves. */
    for (uint64_t step = 0; step < t->step; step++) {
        t->beta1_power *= 0.9;
        t->beta2_power *= 0.999;
    }
    return SC_OK;
}

/* --- The log: one row per step, appended and flushed --- */

static const char log_header[] = "step,images,tokens,lr,loss,mse,l1,ghost,l0,explained_variance,"
                                 "explained_variance_uncentred,dead,seconds\n";

/* Opens the log and locks it, so that two runs do not mix their rows. What an older log held goes
 * but, in a resumed run, the rows up to the step at which it continues; any other file is refused.
 * A pipe or a device, which cannot be read or cut, is only written. */
static int open_log(training_run *run) {
    const char *path = run->o->log;
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct stat about;
    uint64_t step = run->trainer->step;
    char line[512];
    off_t end = 0;                                   /* of the rows that stay */
    if (strcmp(path, run->output) == 0 || strcmp(path, run->checkpoint) == 0)
        return usage("--log: %s is another output", path);
    int regular = stat(path, &about) != 0 || S_ISREG(about.st_mode);
    run->log = fopen(path, regular ? "a+" : "w");
    if (!run->log) return write_failed(path, errno);
    if (regular) {
        int fd = fileno(run->log);
        if (fcntl(fd, F_SETLK, &lock) != 0) return write_failed(path, EBUSY);
        rewind(run->log);
        for (int row = 0; fgets(line, sizeof line, run->log); row++) {
            if (row == 0 && strncmp(line, log_header, strlen("step,")) != 0)
                return fail("%s: not a training log (expected one, or a new file)", path);
            if (step == 0 || !strchr(line, '\n') || strtoull(line, NULL, 10) > step) break;
            end = ftello(run->log);
        }
        if (ferror(run->log) || fseeko(run->log, end, SEEK_SET) != 0 || ftruncate(fd, end) != 0)
            return write_failed(path, errno);
    }
    if (end == 0 && fputs(log_header, run->log) == EOF) return write_failed(path, errno);
    return SC_OK;
}

/* Writes a step's row and shows the progress. */
static int log_step(training_run *run, const sc_step *r) {
    uint64_t step = run->trainer->step, images = step * run->batch;
    char words[100];                                 /* for the line of progress */
    if (run->log) {
        if (fprintf(run->log, "%ju,%ju,%ju,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%zu,%.3f\n",
                    (uintmax_t)step, (uintmax_t)images, (uintmax_t)(images * run->data.T), r->lr,
                    r->loss, r->mse, r->l1, r->ghost, r->l0, r->explained_variance,
                    r->explained_variance_uncentred, r->dead, seconds_now() - run->started) < 0)
            return write_failed(run->o->log, errno);
        SC_TRY(flush_output(run->log, run->o->log));
    }
    snprintf(words, sizeof words, ", loss %.5g, L0 %.4g, explained %.3f", r->loss, r->l0,
             r->explained_variance);
    show_progress("step", step, run->steps, words);
    return SC_OK;
}

/* --- A run --- */

/* Opens the SAE to start from, whose file may also give the origin, and the data. Determines the
 * batch, the number of steps and the order of the images. */
static int open_run(training_run *run) {
    const options *o = run->o;
    sc_sae *sae = &run->sae;
    feed *f = &run->data;
    if (o->init) SC_TRY(sc_sae_open(sae, o->init));
    SC_TRY(open_feed(f, o, sae, o->init != NULL));
    /* A new SAE, now that its number of inputs is known. */
    size_t n = (size_t)o->expansion * f->D;
    if (o->d_sae) n = (size_t)o->d_sae;
    if (!o->init) SC_TRY(sc_sae_init(sae, f->D, n, (uint64_t)o->seed));
    if (!sae->k) sae->k = 32;
    SC_TRY(connect_sae(f, sae, o));
    run->batch = (size_t)o->batch;
    if (run->batch > SC_MAX_BATCH_TOKENS / f->T)
        return usage("--batch: %zu images of %zu tokens are too many", run->batch, f->T);
    run->steps = (uint64_t)o->steps;
    if (o->steps < 0)                                /* not given: all epochs, in full batches */
        run->steps = (uint64_t)ceil(o->epochs * (double)f->set.count / (double)run->batch);
    if (strcmp(o->order, "shuffle") != 0) return SC_OK;
    run->epoch = UINT64_MAX;                         /* no permutation yet */
    return allocate(&f->memory, &run->order, f->set.count, sizeof *run->order);
}

/* Prepares the batches. If b_dec starts from images, they are read first, and training begins
 * with the same images. */
static int start_run(training_run *run) {
    const options *o = run->o;
    feed *f = &run->data;
    size_t images = (size_t)o->b_dec_images, room = run->batch;
    int as_points = strcmp(o->b_dec, "geomedian-images") == 0;
    int steps = 100;                                 /* of the geometric median; 0: the mean */
    if (strcmp(o->b_dec, "mean") == 0) steps = 0;
    if (images == 0) images = run->batch;
    images = smaller(images, f->set.count);
    if (o->init || strcmp(o->b_dec, "zeros") == 0 || run->trainer->step > 0) images = 0;
    if (images > room) room = images;
    SC_TRY(start_feed(f, room, training_draw, run, 0));
    f->drawn = (size_t)run->next_draw;
    if (images == 0) return SC_OK;
    SC_TRY(next_batch(f, images));
    f->drawn = f->count = 0;                         /* back to the first image */
    return start_b_dec(&run->sae, f->tap[0].out, images, f->T, as_points, steps);
}

/* Trains to the last step. A signal ends the run with a checkpoint, and so do images that cannot
 * be read if checkpoints are kept; after a step that failed the weights are undefined. */
static int train_steps(training_run *run) {
    sc_trainer *t = run->trainer;
    feed *f = &run->data;
    for (uint64_t step = t->step + 1; step <= run->steps; step++) {
        sc_step result;
        size_t token = SIZE_MAX;
        int status = next_batch(f, run->batch), number = atomic_load(&stop_signal);
        /* First the signal: it may be why the images could not be read. */
        if (number != 0) {
            SC_TRY(save_checkpoint(run));
            return fail("stopped by signal %d after step %ju; --resume goes on from %s", number,
                        (uintmax_t)step - 1, run->checkpoint);
        }
        if (status == SC_OK) {
            status = train_step(t, f->tap[0].out, f->stride, &result, &token);
            if (token != SIZE_MAX) blame_token(f, token);
        } else if (run->checkpoints) {
            SC_TRY(save_checkpoint(run));            /* a success leaves the reason as it is */
        }
        if (status != SC_OK) return fail("step %ju: %s", (uintmax_t)step, error_text);
        run->next_draw = f->drawn;
        SC_TRY(log_step(run, &result));
        int due = step % (uint64_t)run->o->checkpoint_every == 0 || step == run->steps;
        if (run->checkpoints && due) SC_TRY(save_checkpoint(run));
    }
    return SC_OK;
}

/* A run from its start, or its checkpoint, to the SAE's file. */
static int run_training(training_run *run) {
    const options *o = run->o;
    sc_train_options settings = { .l1 = o->l1, .lr = o->lr, .warmup = (size_t)o->warmup,
                                  .dead_window = (size_t)o->dead_window, .ghost = o->ghost };
    SC_TRY(try_output(run->output));
    if (run->checkpoints) SC_TRY(try_output(run->checkpoint));
    SC_TRY(open_run(run));
    run->trainer = sc_trainer_new(&run->sae, &settings, run->batch * run->data.T);
    if (!run->trainer) return SC_FAILED;
    if (o->resume) SC_TRY(resume_training(run));
    SC_TRY(start_run(run));
    if (o->log) SC_TRY(open_log(run));
    SC_TRY(train_steps(run));
    SC_TRY(save_tensors(run->output, write_trained, run));
    if (*run->config) SC_TRY(write_saelens(&run->sae, run->config));
    if (run->steps > 0 && run->steps < (uint64_t)o->warmup)
        note("all %ju steps lay within the warm-up of %ld: the learning rate never reached --lr "
             "(see --warmup, --epochs)", (uintmax_t)run->steps, o->warmup);
    return SC_OK;
}

/* Trains an SAE. An output that ends with a slash is a folder for SAELens. */
static int train(const options *o) {
    training_run run = { .o = o, .started = seconds_now(),
                         .checkpoints = o->checkpoint || o->resume };
    const struct sigaction ask = { .sa_handler = ask_to_stop,
                                   .sa_flags = SA_RESTART | (int)SA_RESETHAND };
    const char *folder = "", *file = o->output;
    if (file[strlen(file) - 1] == '/') {
        folder = o->output;
        file = saelens_weights;
        SC_TRY(join_path(folder, "cfg.json", run.config));
        if (mkdir(folder, 0777) != 0 && errno != EEXIST)
            return fail("%s: the folder cannot be made: %s", folder, strerror(errno));
    }
    SC_TRY(join_path(folder, file, run.output));
    /* After a signal there is a checkpoint even where none was requested. */
    if (o->checkpoint) SC_TRY(join_path("", o->checkpoint, run.checkpoint));
    else sprintf(run.checkpoint, "%s.ckpt", run.output);
    sprintf(run.previous, "%s.prev", run.checkpoint);
    /* A signal is heeded between steps; a second one of its kind ends the program at once. */
    sigaction(SIGINT, &ask, NULL);
    sigaction(SIGTERM, &ask, NULL);
    int status = run_training(&run), written = 1;
    /* Whatever came of it, all is closed; the last rows of the log may not fit on the disk. */
    if (run.log) written = fclose(run.log) == 0;
    if (status == SC_OK && !written) status = write_failed(o->log, errno);
    close_feed(&run.data);
    sc_trainer_free(run.trainer);
    sc_sae_close(&run.sae);
    return status;
}

/* ============================================================================================
 * 20. Data sets through SAEs
 *
 * The commands that send a data set through the model and through one or several SAEs, in one
 * forward pass: stats and merge, eval, extract, pack, encode, zeroshot. Section 5 defines what they
 * measure. Statistics have the names of PatchSAE (Lim et al., 2025):
 * tasks/compute_sae_feature_data.py.
 * ============================================================================================ */

enum { SPOOLS = 6 };                 /* temporary files: one per tensor of `encode` */

/* The state of a command: run_saeclip() makes it, close_session() frees it. */
typedef struct {
    options *o;
    size_t saes;                     /* open SAEs */
    sc_sae sae[SC_MAX_TAPS];         /* [saes], as all that follow */
    sae_batch batch[SC_MAX_TAPS];    /* its codes of the current images */
    statistics stats[SC_MAX_TAPS];   /* its statistics over the current data set */
    feed data;
    FILE *spool[SPOOLS];             /* temporary files, NULL: not open */
    memory_list memory;
} session;

/* Opens the SAEs and the data; connects each SAE to its hook point. */
static int open_session(session *s) {
    const options *o = s->o;
    feed *f = &s->data;
    for (s->saes = 0; s->saes < o->saes; s->saes++)
        SC_TRY(sc_sae_open(&s->sae[s->saes], o->sae[s->saes]));
    SC_TRY(open_feed(f, o, s->sae, s->saes));
    for (size_t i = 0; i < s->saes; i++) {
        SC_TRY(connect_sae(f, &s->sae[i], o));
        SC_TRY(new_batch(&s->batch[i], &s->sae[i], MEASURE_IMAGES * f->T));
    }
    return SC_OK;
}

/* Frees everything; the session may be opened again. */
static void close_session(session *s) {
    for (size_t i = 0; i < SC_MAX_TAPS; i++) {
        free_batch(&s->batch[i]);
        sc_sae_close(&s->sae[i]);
    }
    for (size_t i = 0; i < SPOOLS; i++)
        if (s->spool[i]) fclose(s->spool[i]);
    close_feed(&s->data);
    release(&s->memory);
}

/* Sends the next batch through every SAE; SC_END after the last image. total: of images, for the
 * progress line */
static int next_encoded(session *s, size_t total) {
    feed *f = &s->data;
    size_t bad;
    SC_TRY(next_batch(f, MEASURE_IMAGES));
    show_progress("image", f->used, total, "");
    if (f->count == 0) return SC_END;
    for (size_t i = 0; i < s->saes; i++) {
        const sc_tap *tap = &f->tap[i];              /* out: [count T, stride] */
        if (tap->replace) continue;                  /* the forward pass has run the SAE */
        SC_TRY(run_sae(&s->batch[i], tap->out, f->stride, f->count * f->T));
        if (check_batch(&s->batch[i], &bad) != SC_OK) return blame_token(f, bad);
    }
    return SC_OK;
}

static int command_train(session *s) { return train(s->o); }

/* Whether text is "I/N": part I, from 1, of N. */
static int parse_shard(const char *text, size_t *shard, size_t *shards) {
    char more;
    if (sscanf(text, "%4zu/%4zu%c", shard, shards, &more) != 2) return 0;
    return *shard > 0 && *shard <= *shards && *shards <= MAX_OPERANDS;
}

/* Fills s->stats in one pass over a data set, or over shard I of N of it: the images from
 * ceil((I - 1) count / N) up to, but without, ceil(I count / N). Consecutive images are read
 * fastest; the first shard is never empty. */
static int measure(session *s, int reconstruct) {
    const options *o = s->o;
    feed *f = &s->data;
    size_t shard = 1, shards = 1, bad = 0;           /* 1 of 1: all images */
    int status;
    if (o->shard && !parse_shard(o->shard, &shard, &shards))
        return usage("--shard: invalid value '%s' (expected I/N, I from 1 to N, N at most %d)",
                     o->shard, MAX_OPERANDS);
    SC_TRY(open_session(s));
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    if (o->class_counts && f->set.classes == 0)
        return fail("--class-counts: the data have no labels");

    /* The images of the shard. */
    uint64_t count = f->set.count, round_up = shards - 1;
    f->drawn = (size_t)(((shard - 1) * count + round_up) / shards);
    f->set.limit = (size_t)((shard * count + round_up) / shards);
    size_t total = f->set.limit - f->drawn;

    /* One set of statistics per SAE; all look at the same batch. */
    for (size_t i = 0; i < s->saes; i++) {
        s->batch[i].reconstruct = reconstruct;
        s->stats[i] = (statistics){
            .n = s->sae[i].d_sae, .D = f->D, .T = f->T,
            .K = (size_t)o->top, .P = (size_t)o->top_patches,
            .classes = f->set.classes, .class_name = f->set.class_name,
            .first_patch = f->first_patch, .threshold = o->threshold,
            .data_digest = f->set.digest, .origin = s->sae[i].origin,
            .shard = shard, .shards = shards,
            .batch = &s->batch[i], .image = f->image, .label = f->label };
        SC_TRY(new_statistics(&s->stats[i], &f->memory, o->class_counts));
    }

    /* The pass. */
    while ((status = next_encoded(s, total)) == SC_OK) {
        for (size_t i = 0; i < s->saes; i++) {
            s->stats[i].count = f->count;
            if (count_batch(&s->stats[i], &bad) != SC_OK) return blame_token(f, bad);
        }
    }
    return status == SC_END ? SC_OK : status;
}

/* --- stats and merge --- */

/* Writes the tensors of statistics to w or, where that is NULL, reads them from a file.
 * A latent fires on image i where a(i), the mean of its f over the image's tokens, is above 0.
 *     sae_sparsity             share of images on which it fires
 *     sae_mean_acts            mean of a(i) over these; 0 if there are none (PatchSAE: NaN)
 *     max_activating_image_*   the K images with the largest a(i); unused entries are 0, -1, -1
 *     max_activating_patch_*   the P patches with the largest f: image and token
 *     top_entropy              see top_entropy() in section 5
 *     class_counts             images on which it fires, or tokens with f above --threshold
 *     *_exact                  128-bit sums of a(i), of f: high and low half */
static int move_statistics(const statistics *s, const sc_safetensors *file, sc_writer *w) {
    latent_record *l = s->latent;                            /* [n] */
    sc_top *top = s->top, *patch = s->patch;                 /* [n, K], [n, P] */
    int64_t *bin = s->histogram[0], *class = s->class_counts;
    const size_t n = s->n, L = sizeof *l, E = sizeof *top, I = sizeof *bin;
    const struct {
        const char *name;
        void *first;                 /* its first element in memory */
        size_t step;                 /* bytes from one element to the next */
        sc_dtype dtype;
        size_t numbers;              /* per element: one, or two adjacent ones */
        size_t shape[4];             /* in the file; 0 ends it */
    } tensor[] = {
        { "sae_sparsity", &l->sparsity, L, SC_F32, 1, { n } },
        { "sae_mean_acts", &l->mean, L, SC_F32, 1, { n } },
        { "top_entropy", &l->entropy, L, SC_F32, 1, { n } },
        { "max_activating_image_values", &top->value, E, SC_F32, 1, { n, s->K } },
        { "max_activating_patch_values", &patch->value, E, SC_F32, 1, { n, s->P } },
        { "max_activating_image_indices", &top->image, E, SC_I64, 1, { n, s->K } },
        { "max_activating_image_label_indices", &top->other, E, SC_I64, 1, { n, s->K } },
        { "max_activating_patch_indices", &patch->image, E, SC_I64, 2, { n, s->P, 2 } },
        { "image_count", &l->images, L, SC_I64, 1, { n } },
        { "token_count", &l->tokens, L, SC_I64, 1, { n } },
        { "activation_sum", &l->sum, L, SC_F64, 1, { n } },
        { "mean_sum_exact", &l->means, L, SC_I64, 2, { n, 2 } },
        { "activation_sum_exact", &l->activations, L, SC_I64, 2, { n, 2 } },
        { "activation_histogram", bin, I, SC_I64, 1, { HISTOGRAM_BINS } },
        { "class_counts", class, I, SC_I64, 1, { s->classes, n } } };
    for (size_t i = 0; i < COUNT(tensor); i++) {
        const sc_dtype dtype = tensor[i].dtype;
        const size_t *shape = tensor[i].shape, numbers = tensor[i].numbers;
        const sc_tensor *from = NULL;
        char *place = tensor[i].first;
        size_t count = 1;
        int rank = 0;
        if (!place) continue;                            /* class_counts: not asked for */
        for (; shape[rank] > 0; rank++) count *= shape[rank];

        /* Its entry in the header. */
        if (w) SC_TRY(sc_writer_tensor(w, tensor[i].name, dtype, rank, shape));
        else from = sc_tensor_find(file, tensor[i].name);
        if (!w && (!from || from->dtype != dtype || from->count != count
                   || memcmp(from->shape, shape, sizeof tensor->shape) != 0))
            return fail("%s: tensor %s is missing or does not fit the others", file->path,
                        tensor[i].name);

        /* Its elements; floats must be finite. */
        for (size_t at = 0; at < count; at += numbers, place += tensor[i].step) {
            void *to = place;
            if (w) SC_TRY(sc_writer_values(w, place, numbers, dtype));
            else if (dtype == SC_F32) SC_TRY(sc_tensor_floats(file, from, at, 1, to));
            else copy_numbers(to, from->data + at * sizeof(int64_t), numbers, sizeof(int64_t));
        }
    }
    return SC_OK;
}

/* Writes the metadata, then the tensors. */
static int write_statistics(sc_writer *w, void *context) {
    const statistics *s = context;
    fputs(",\"histogram_edges\":\"[", w->metadata);
    for (int i = 0; i <= HISTOGRAM_BINS; i++)
        fprintf(w->metadata, "%s%.9g", i > 0 ? "," : "", bin_edge(i));
    fputs("]\"", w->metadata);
    SC_TRY(put_metadata(w, "images", "%ju", (uintmax_t)s->images));
    SC_TRY(put_metadata(w, "data_digest", "%016jx", (uintmax_t)s->data_digest));
    SC_TRY(put_metadata(w, "sae_digest", "%016jx", (uintmax_t)s->sae_digest));
    SC_TRY(put_origin(w, &s->origin));
    if (s->shards > 1) SC_TRY(put_metadata(w, "shard", "%zu/%zu", s->shard, s->shards));
    if (s->class_name) SC_TRY(write_name_list(w, "class_names", s->class_name, s->classes));
    if (s->threshold >= 0) SC_TRY(put_metadata(w, "threshold", "%.17g", s->threshold));
    return move_statistics(s, NULL, w);
}

/* Derives the rest from the counts and writes all. */
static int save_statistics(statistics *s, const char *path) {
    derive_statistics(s);
    return save_tensors(path, write_statistics, s);
}

static int command_stats(session *s) {
    SC_TRY(try_output(s->o->output));
    SC_TRY(measure(s, 0));
    s->stats[0].sae_digest = sae_digest(&s->sae[0]);
    return save_statistics(&s->stats[0], s->o->output);
}

/* Reads statistics from an open file into new arrays. */
static int load_statistics(statistics *s, const sc_safetensors *file, memory_list *memory) {
    const sc_tensor *top = sc_tensor_find(file, "max_activating_image_values");
    const sc_tensor *patch = sc_tensor_find(file, "max_activating_patch_values");
    const sc_tensor *counts = sc_tensor_find(file, "class_counts");
    const char *images = sc_metadata_find(file, "images");
    const char *data = sc_metadata_find(file, "data_digest");
    const char *sae = sc_metadata_find(file, "sae_digest");
    const char *shard = sc_metadata_find(file, "shard");
    const char *threshold = sc_metadata_find(file, "threshold");
    const char *classes = sc_metadata_find(file, "class_names");
    size_t part = 1, parts = 1;
    int valid = top && top->rank == 2 && patch && patch->rank == 2 && images && data && sae;
    if (shard) valid &= parse_shard(shard, &part, &parts);
    if (!valid) return fail("%s: not statistics (expected a file that stats wrote)", file->path);

    /* Sizes and settings. The other shapes are checked when the tensors are read. */
    *s = (statistics){
        .n = top->shape[0], .K = top->shape[1], .P = patch->shape[1],
        .images = strtoull(images, NULL, 10), .data_digest = strtoull(data, NULL, 16),
        .sae_digest = strtoull(sae, NULL, 16), .threshold = -1, .shard = part, .shards = parts };
    if (threshold) s->threshold = atof(threshold);           /* else images were counted */
    if (counts) s->classes = counts->shape[0];
    s->origin = read_origin(file);
    s->first_patch = strcmp(s->origin.text[SC_TOKENS], "patches") != 0;

    /* The names of the classes: no more bytes, and no more names, than the list has bytes. */
    if (classes) {
        size_t length = strlen(classes);
        char **name, *text;
        const array_spec arrays[] = { ARRAY(s->class_name, length, 1), ARRAY(text, length, 1) };
        SC_TRY(new_arrays(memory, arrays, COUNT(arrays)));
        SC_TRY(json_string_array(classes, file->path, &name, &s->classes));
        for (size_t c = 0; c < s->classes; c++) {
            s->class_name[c] = strcpy(text, name[c]);
            text += strlen(text) + 1;
        }
        free(name);
    }
    SC_TRY(new_statistics(s, memory, counts != NULL));
    return move_statistics(s, file, NULL);
}

/* Reads statistics into new arrays, which are freed with `memory`. */
static int read_statistics(statistics *s, const char *path, memory_list *memory) {
    sc_safetensors file;
    SC_TRY(sc_safetensors_open(&file, path));
    int status = load_statistics(s, &file, memory);
    sc_safetensors_close(&file);
    return status;
}

/* Reads a shard and adds it to `all`, the shards before it. Sums are exact and lists keep the
 * largest in one order, so that the shards may come in any order. seen: [shards + 1] */
static int add_shard(statistics *all, const char *path, unsigned char *seen,
                     memory_list *memory) {
    statistics part;
    const char *differs = NULL;                              /* the first of the reasons below */
    size_t n = all->n, K = all->K, P = all->P;
    SC_TRY(read_statistics(&part, path, memory));

    /* It must be of the same run as the first one. */
    int same = part.n == n && part.K == K && part.P == P && part.threshold == all->threshold
            && !part.class_counts == !all->class_counts && part.classes == all->classes;
    if (part.sae_digest != all->sae_digest) differs = "SAE";
    else if (part.data_digest != all->data_digest) differs = "data set";
    else if (!same) differs = "--top, --top-patches, --class-counts or --threshold";
    else if (part.shards != all->shards) differs = "number of shards";
    if (differs) return fail("%s: differs from the first shard in its %s", path, differs);
    SC_TRY(check_origin(path, &part.origin, &all->origin, NULL));
    if (seen[part.shard]++)
        return fail("%s: shard %zu of %zu is given twice", path, part.shard, part.shards);

    /* Sums, lists and counts. */
    all->images += part.images;
    for (size_t j = 0; j < n; j++) {
        latent_record *to = &all->latent[j];
        const latent_record *from = &part.latent[j];
        to->images += from->images;
        to->tokens += from->tokens;
        exact_add(&to->means, from->means);
        exact_add(&to->activations, from->activations);
    }
    for (size_t i = 0; i < n * K; i++) keep_largest(all->top + i - i % K, K, part.top[i]);
    for (size_t i = 0; i < n * P; i++) keep_largest(all->patch + i - i % P, P, part.patch[i]);
    for (size_t b = 0; b < HISTOGRAM_BINS; b++) all->histogram[0][b] += part.histogram[0][b];
    if (!all->class_counts) return SC_OK;
    for (size_t i = 0; i < all->classes * n; i++) all->class_counts[i] += part.class_counts[i];
    return SC_OK;
}

/* Joins the shards of a data set to the bytes that one run over all of it writes. */
static int command_merge(session *s) {
    const char *const *path = s->o->operand;
    unsigned char seen[MAX_OPERANDS + 1] = { 0 };            /* [shards + 1] */
    statistics all;
    SC_TRY(read_statistics(&all, path[0], &s->memory));
    seen[all.shard] = 1;
    size_t files = 1;
    for (; path[files]; files++) {
        memory_list memory = NULL;
        int status = add_shard(&all, path[files], seen, &memory);
        release(&memory);
        SC_TRY(status);
    }
    if (files < all.shards)
        return fail("%s: one of %zu shards (expected all of them)", path[0], all.shards);
    all.shards = 1;                                          /* now complete */
    return save_statistics(&all, s->o->output);
}

/* --- eval --- */

enum { EVAL_COLUMNS = 22 };

/* A cell of eval's table: a text or, where that is NULL, a number. What is not defined is 0, an
 * entropy -1. */
typedef struct {
    const char *name, *text;         /* name: of the column */
    double number;
} metric;

/* One line per column, the rows side by side. */
static void print_text(metric (*row)[EVAL_COLUMNS], size_t rows) {
    for (size_t c = 0; c < EVAL_COLUMNS; c++) {
        printf("%-28s", row[0][c].name);                     /* the longest name */
        for (size_t r = 0; r < rows; r++) {
            const metric *m = &row[r][c];
            size_t length = m->text ? strlen(m->text) : 0, cut = length > 22 ? length - 22 : 0;
            if (m->text) printf("  %22s", shown(m->text + cut));         /* the end of a path */
            else printf("  %22.9g", m->number);
        }
        puts("");
    }
}

/* A line of names, then one line per row; texts in quotes, where a quote is doubled. */
static void print_csv(metric (*row)[EVAL_COLUMNS], size_t rows) {
    for (size_t c = 0; c < EVAL_COLUMNS; c++) printf("%s%s", c ? "," : "", row[0][c].name);
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < EVAL_COLUMNS; c++) {
            const metric *m = &row[r][c];
            putchar(c ? ',' : '\n');
            if (!m->text) {
                printf("%.9g", m->number);
                continue;
            }
            putchar('"');
            for (const char *t = shown(m->text); *t; t++) {
                if (*t == '"') putchar('"');
                putchar(*t);
            }
            putchar('"');
        }
    }
    puts("");
}

/* A list of objects, one per row. */
static void print_json_list(metric (*row)[EVAL_COLUMNS], size_t rows) {
    for (size_t r = 0; r < rows; r++) {
        const char *mark = r ? "},\n  {" : "[\n  {";
        for (size_t c = 0; c < EVAL_COLUMNS; c++, mark = ", ") {
            const metric *m = &row[r][c];
            printf("%s\"%s\": ", mark, m->name);
            if (m->text) print_json(stdout, m->text);
            else printf("%.9g", m->number);
        }
    }
    puts("}\n]");
}

/* A row of eval's table: the metrics of sc_metrics_plain() in section 5, from sums over tokens,
 * and what the statistics say of the latents. */
static void evaluate(const statistics *s, const sc_sae *sae, const char *path, const char *data,
                     metric row[EVAL_COLUMNS]) {
    const char *kind = "ReLU", *hook = "?", *bias = "?";
    sc_tap tap;
    double n = (double)s->n, tokens = (double)(s->images * s->T), numbers = tokens * (double)s->D;
    double error = running_total(&s->squared_error);         /* sum of ||x' - x||^2 */
    double active = running_total(&s->l0);                   /* how many f are above 0 */
    double sum_f = running_total(&s->l1);
    double x2 = 0, mean2 = 0, explained = 0, activation = 0;
    double means = 0, entropy = 0, mean_entropy = -1;
    double entropies = 0, always = 0, on[3] = { 0 };         /* latents; on 0, 1, 2 images */
    for (size_t d = 0; d < s->D; d++) {                      /* the variance about the mean token */
        double mean = running_total(&s->x[d][0]) / tokens;
        mean2 += mean * mean;
        x2 += running_total(&s->x[d][1]);
    }
    double variance = x2 - tokens * mean2;
    if (variance > 0) explained = 1 - error / variance;
    if (active > 0) activation = sum_f / active;
    for (size_t j = 0; j < s->n; j++) {
        int64_t images = s->latent[j].images;
        double e = top_entropy(s->top + j * s->K, s->K);
        means += mean_activation(&s->latent[j]);
        always += images == (int64_t)s->images;
        if (images < 3) on[images]++;
        if (e < 0) continue;                                 /* not defined */
        entropy += e;
        entropies++;
    }
    if (on[0] < n) means /= n - on[0];                       /* over latents that fire */
    if (entropies > 0) mean_entropy = entropy / entropies;
    if (sae->threshold) kind = "JumpReLU";
    if (sae->topk) kind = "TopK";
    if (sc_hook_point(&sae->origin, &tap) == SC_OK) hook = hook_names[tap.hook];
    if (*sae->b_dec_start) bias = strstr(sae->b_dec_start, "geomedian") ? "yes" : "no";
    const metric cells[EVAL_COLUMNS] = {
        { "sae", path, 0 },
        { "data", data, 0 },
        { "output", hook, 0 },
        { "activation", kind, 0 },
        { "geometric_bias", bias, 0 },                       /* where b_dec started */
        { "mse", NULL, running_total(&s->mse) / numbers },   /* over ||x||, PatchSAE's */
        { "mse_raw", NULL, error / numbers },
        { "explained_variance", NULL, explained },
        { "explained_variance_uncentred", NULL, 1 - error / x2 },
        { "mean_activation", NULL, activation },             /* of active latents */
        { "mean_sae_mean_acts", NULL, means },               /* of latents that fire */
        { "l0", NULL, active / tokens },
        { "l0_fraction", NULL, active / tokens / n },
        { "l1", NULL, sum_f / tokens },                      /* without lambda */
        { "entropy_mean", NULL, mean_entropy },              /* where it is defined */
        { "entropy_sum", NULL, entropy },
        { "entropy_latents", NULL, entropies },
        { "dead", NULL, on[0] },                             /* numbers of latents */
        { "every_image", NULL, always },
        { "one_image", NULL, on[1] },
        { "two_images", NULL, on[2] },
        { "images", NULL, (double)s->images } };
    memcpy(row, cells, sizeof cells);
}

/* One row per SAE and data set; --also names a second data set. */
static int command_eval(session *s) {
    options *o = s->o;
    const char **data = o->acts ? &o->acts : &o->operand[0];
    metric row[2 * SC_MAX_TAPS][EVAL_COLUMNS];               /* of at most two data sets */
    size_t rows = 0;
    do {
        SC_TRY(measure(s, 1));
        for (size_t i = 0; i < s->saes; i++)
            evaluate(&s->stats[i], &s->sae[i], o->sae[i], *data, row[rows++]);
        close_session(s);
        *data = o->also;
        o->also = NULL;
    } while (*data);
    if (strcmp(o->format, "json") == 0) print_json_list(row, rows);
    else if (strcmp(o->format, "csv") == 0) print_csv(row, rows);
    else print_text(row, rows);
    return end_of_output();
}

/* --- extract and pack --- */

/* Writes images, [N, S, S, 3], or activations at a hook point, [N, T, D]; with them the labels,
 * where there are any, and names. */
static int write_data_set(sc_writer *w, void *context) {
    session *s = context;
    feed *f = &s->data;
    const sc_images *set = &f->set;
    const sc_preprocess *prep = &f->preprocess;
    const sc_tap *tap = &f->tap[0];
    const int pack = f->taps == 0;
    sc_dtype dtype = strcmp(s->o->dtype, "f16") == 0 ? SC_F16 : SC_F32;
    size_t S = (size_t)prep->size, images = 0;               /* images: in the file */
    const size_t pixels[] = { SC_ROWS, S, S, 3 }, rows[] = { SC_ROWS, f->T, f->D };
    char **name;                                             /* [images] */
    int status;
    if (set->class_name) SC_TRY(write_name_list(w, "class_names", set->class_name, set->classes));
    /* A packed set's file names come last, since images that are passed over lose theirs. */
    for (size_t i = 0; pack && i < set->count; i++) w->room += 7 * strlen(set->image[i].name) + 5;

    /* Pixels or activations, batch by batch. */
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    if (pack) SC_TRY(sc_writer_tensor(w, "images", SC_U8, 4, pixels));
    else SC_TRY(sc_writer_tensor(w, "activations", dtype, 3, rows));
    while ((status = next_encoded(s, set->count)) == SC_OK) {
        if (pack) SC_TRY(sc_writer_bytes(w, f->pixels, f->count * S * S * 3));
        for (size_t t = 0; t < f->count * f->T; t++)         /* pack: T is 0 */
            SC_TRY(sc_writer_floats(w, tap->out + t * f->stride, f->D));
    }
    if (status != SC_END) return status;

    /* Labels. An image that was passed over as bad has lost its name and is not in the file. */
    SC_TRY(allocate(&s->memory, &name, set->count, sizeof *name));
    if (set->classes > 0) SC_TRY(sc_writer_tensor(w, "labels", SC_I64, 1, rows));
    for (size_t i = 0; i < set->count; i++) {
        const sc_image *image = &set->image[i];
        if (!image->name) continue;
        name[images++] = (char *)(uintptr_t)image->name;
        if (set->classes > 0) SC_TRY(sc_writer_integers(w, &image->label, 1));
    }

    /* Activations name their origin. If images are missing it is another data set. */
    if (!pack) {
        SC_TRY(put_origin(w, &f->origin));
        uintmax_t digest = set->digest + set->count - images;
        return put_metadata(w, "data_digest", "%016jx", digest);
    }

    /* A packed set tells how it was cropped. */
    if (prep->square > 0) {
        SC_TRY(put_metadata(w, "square", "%d", prep->square));
        SC_TRY(sc_writer_metadata(w, "crop", prep->crop_hf ? "hf" : "torchvision"));
    }
    return *name[0] ? write_name_list(w, "file_names", name, images) : SC_OK;
}

static int command_extract(session *s) {
    SC_TRY(open_session(s));
    SC_TRY(add_tap(&s->data, &s->data.origin));
    return save_tensors(s->o->output, write_data_set, s);
}

static int command_pack(session *s) {
    const options *o = s->o;
    feed *f = &s->data;
    const char *crop = o->origin[SC_CROP];
    f->skip_bad = o->skip_bad;
    f->preprocess.size = (int)o->size;
    f->preprocess.crop_hf = crop && strcmp(crop, "hf") == 0;
    if (o->square > 0)                                       /* the whole square is kept */
        f->preprocess.size = f->preprocess.square = (int)o->square;
    SC_TRY(sc_images_open(&f->set, o->operand[0], (size_t)o->limit));
    return save_tensors(o->output, write_data_set, s);
}

/* --- encode ---
 *
 * A safetensors file has one tensor after the other, but codes come image by image, and how many
 * there are is known only at the end. So each tensor grows in a temporary file, which is then
 * copied. */

static int spool_failed(void) {
    return fail("a temporary file cannot be written or read: %s", strerror(errno));
}

/* The sum of f_j over the batch's tokens from `first` up to, but without, `end`. */
static double sum_codes(const sae_batch *b, size_t j, size_t first, size_t end) {
    double sum = 0;
    for (size_t c = code_from(b, j, first); c < b->end[j] && b->token[c] < end; c++)
        sum += b->value[c];
    return sum;
}

/* Appends the current batch to the temporary files. f: [T, n], an image's codes */
static int spool_batch(const session *s, float *f) {
    const sae_batch *b = &s->batch[0];
    FILE *const *spool = s->spool;                           /* in the order of write_codes() */
    size_t T = s->data.T, n = b->sae->d_sae;
    for (size_t i = 0; i < s->data.count; i++) {
        size_t first = i * T, row = (s->data.used + i) * T;  /* in the batch, in the data set */

        /* Latent by latent becomes token by token. */
        memset(f, 0, T * n * sizeof *f);
        for (size_t j = 0; j < n; j++) {
            size_t c = code_from(b, j, first);
            for (; c < b->end[j] && b->token[c] < first + T; c++)
                f[(b->token[c] - first) * n + j] = b->value[c];
        }

        /* The lists and f itself. */
        for (size_t e = 0; e < T * n; e++) {
            int64_t token = (int64_t)(row + e / n);
            int32_t index = (int32_t)(e % n);
            if (!(f[e] > 0)) continue;
            fwrite(&token, sizeof token, 1, spool[0]);
            fwrite(&index, sizeof index, 1, spool[1]);
            fwrite(&f[e], sizeof *f, 1, spool[2]);
        }
        if (spool[3]) fwrite(f, sizeof *f, T * n, spool[3]);

        /* The image's means. */
        for (size_t j = 0; j < n && spool[5]; j++) {
            float mean = (float)(sum_codes(b, j, first, first + T) / (double)T);
            fwrite(&mean, sizeof mean, 1, spool[5]);
        }
    }
    for (size_t t = 0; t < b->T && spool[4]; t++)
        fwrite(b->output + t * b->sae->stride, sizeof *b->output, b->sae->d_in, spool[4]);

    /* A full disk ends the run at once. */
    errno = EIO;                                             /* where an earlier write failed */
    for (size_t i = 0; i < SPOOLS; i++)
        if (spool[i] && (fflush(spool[i]) != 0 || ferror(spool[i]))) return spool_failed();
    return SC_OK;
}

/* Copies the temporary files to tensors. */
static int write_codes(sc_writer *w, void *context) {
    session *s = context;
    size_t n = s->sae[0].d_sae, D = s->sae[0].d_in, count;
    const struct { const char *name; sc_dtype dtype; size_t columns; } tensor[SPOOLS] = {
        { "row", SC_I64, 0 },                                /* [codes] */
        { "index", SC_I32, 0 },
        { "value", SC_F32, 0 },
        { "f", SC_F32, n },                                  /* [tokens, n] */
        { "reconstruction", SC_F32, D },
        { "image_means", SC_F32, n } };                      /* [images, n] */
    int64_t block[512];                                      /* or twice as many floats */
    for (size_t i = 0; i < SPOOLS; i++) {
        FILE *spool = s->spool[i];
        sc_dtype dtype = tensor[i].dtype;
        size_t size = sc_dtype_size(dtype), shape[] = { SC_ROWS, tensor[i].columns };
        int rank = 1 + (shape[1] > 0);                       /* a list has no columns */
        if (!spool) continue;
        if (fseeko(spool, 0, SEEK_SET) != 0) return spool_failed();
        SC_TRY(sc_writer_tensor(w, tensor[i].name, dtype, rank, shape));
        while ((count = fread(block, size, sizeof block / size, spool)) > 0)
            SC_TRY(sc_writer_values(w, block, count, dtype));
        if (ferror(spool)) return spool_failed();
    }
    return SC_OK;
}

static int command_encode(session *s) {
    const options *o = s->o;
    /* In the order of write_codes(). */
    const int wanted[SPOOLS] = { 1, 1, 1, o->dense, o->reconstruction, o->image_means };
    float *f;
    int status;
    SC_TRY(try_output(o->output));
    SC_TRY(open_session(s));
    for (size_t i = 0; i < SPOOLS; i++) {
        if (wanted[i]) s->spool[i] = tmpfile();
        if (wanted[i] && !s->spool[i]) return spool_failed();
    }
    s->batch[0].reconstruct = o->reconstruction;
    SC_TRY(allocate(&s->memory, &f, s->data.T, s->sae[0].d_sae * sizeof *f));
    SC_TRY(start_feed(&s->data, MEASURE_IMAGES, NULL, NULL, 0));
    while ((status = next_encoded(s, s->data.set.count)) == SC_OK)
        SC_TRY(spool_batch(s, f));
    if (status != SC_END) return status;
    return save_tensors(o->output, write_codes, s);
}

/* --- zeroshot --- */

/* The SAE in the loop: x' takes the place of x. x: [tokens, stride] */
static int replace_by_output(void *context, float *x, size_t tokens) {
    session *s = context;
    sae_batch *b = &s->batch[0];
    size_t bad;
    SC_TRY(run_sae(b, x, b->sae->stride, tokens));
    if (check_batch(b, &bad) != SC_OK) return blame_token(&s->data, bad);
    memcpy(x, b->output, tokens * b->sae->stride * sizeof *x);
    return SC_OK;
}

/* Turns labels into classes of the model. The labels of a list are classes already. A class folder
 * is found by its name where the model names its classes; else the folders' names are the classes
 * where all are whole numbers; else their ranks are, if there are as many folders as classes. */
static int match_classes(sc_images *set, const sc_model *model) {
    const char *list = sc_metadata_find(&model->file, "class_names");
    const size_t folders = set->class_name ? set->classes : 0;
    char **name = NULL;                              /* [names], of the model's classes */
    size_t names = 0, numbers = 0;
    int status = SC_OK;

    /* The names of folders and classes. */
    for (size_t c = 0; c < folders; c++) {
        const char *folder = set->class_name[c];
        if (folder[strspn(folder, "0123456789")] == '\0') numbers++;
    }
    if (list) SC_TRY(json_string_array(list, model->file.path, &name, &names));

    /* The images' labels. */
    for (size_t i = 0; i < set->count && status == SC_OK; i++) {
        int64_t *label = &set->image[i].label;
        if (folders > 0) {
            const char *folder = set->class_name[*label];
            size_t c = 0;
            while (c < names && strcmp(name[c], folder) != 0) c++;
            if (c < names) *label = (int64_t)c;                      /* by name */
            else if (!list && numbers == folders) *label = strtoll(folder, NULL, 10);
            else if (list || folders != model->classes) *label = -1; /* not even by rank */
        }
        if (*label < 0 || *label >= (int64_t)model->classes)
            status = fail("image %zu %s: not in one of the model's %zu classes (expected a folder "
                          "with a class's name or number, or a list with path<TAB>class)", i,
                          set->image[i].name, model->classes);
    }
    free(name);
    return status;
}

/* Opens the model with the SAE in the loop, if there is one. */
static int start_zeroshot(session *s) {
    feed *f = &s->data;
    const sc_safetensors *file = &f->model.file;
    SC_TRY(open_session(s));                         /* timm's head may be a classifier */
    if (!sc_tensor_find(file, "text_embeds") && f->model.naming != TIMM)
        return fail("%s: no tensor text_embeds [classes, width of the projection]", file->path);
    if (f->T != f->model.tokens)
        return fail("%s: trained on tokens %s (expected all, which the model needs to go on)",
                    s->sae[0].path, f->origin.text[SC_TOKENS]);
    if (s->saes > 0) {
        f->tap[0].replace = replace_by_output;
        f->tap[0].context = s;
    }
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 1));
    return match_classes(&f->set, &f->model);
}

static int command_zeroshot(session *s) {
    const char *format = s->o->format;
    const feed *f = &s->data;
    size_t top1 = 0, top5 = 0;
    int status;
    SC_TRY(start_zeroshot(s));
    const size_t classes = f->model.classes;

    /* The rank of the label among the logits; of equal logits the lower class comes first. */
    while ((status = next_encoded(s, f->set.count)) == SC_OK) {
        for (size_t i = 0; i < f->count; i++) {
            const float *logit = f->logits + i * classes;
            size_t label = (size_t)f->label[i], rank = 0;
            for (size_t c = 0; c < classes; c++) {
                rank += logit[c] > logit[label];
                rank += c < label && logit[c] == logit[label];
            }
            top1 += rank < 1;
            top5 += rank < 5;
        }
    }
    if (status != SC_END) return status;
    double images = (double)f->used;
    if (strcmp(format, "csv") == 0)
        printf("images,top1,top5\n%zu,%zu,%zu\n", f->used, top1, top5);
    else if (strcmp(format, "json") == 0)
        printf("{\"images\": %zu, \"top1\": %zu, \"top5\": %zu}\n", f->used, top1, top5);
    else
        printf("%zu images: top-1 %zu (%.2f %%), top-5 %zu (%.2f %%)\n", f->used, top1,
               100 * (double)top1 / images, top5, 100 * (double)top5 / images);
    return end_of_output();
}

/* ============================================================================================
 * 21. Looking
 *
 * What a latent responds to, as images: a sheet of the images that activate it most (top), and
 * masks of the patches on which it fires (mask); and the strongest latents of one image (explain).
 * The other way to find out is the atlas, section 23.
 * ============================================================================================ */

enum {
    MAX_SHOWN = 1024,                /* latents in one run */
    SHEET_GAP = 2,                   /* pixels between the images of a sheet */
    SILENT = 30                      /* of 255: brightness of silent patches, as in PatchSAE */
};

typedef struct {
    session *s;
    statistics stats;                /* the file that -t names */
    enum { VALUE_MASK, TOP_MASK, NO_MASK } kind; /* what --mask says */
    size_t latent[MAX_SHOWN], latents;           /* the latents to show */
    int64_t *image;                  /* [images], the images to show, for listed_draw() */
    size_t images;
    size_t patches;                  /* per image */
    double *mask;                    /* [MEASURE_IMAGES, patches], of one latent on the batch */
    unsigned char *picture;          /* the file that is being drawn, rows of RGB or grey */
} viewer;

/* "N[,N...]": at most `room` whole numbers below `end`. */
static int parse_list(const char *option, const char *text, size_t end, size_t *list, size_t room,
                      size_t *count) {
    for (char *next;; text = next + 1) {
        unsigned long long number = strtoull(text, &next, 10);
        int good = isdigit((unsigned char)*text) && (*next == '\0' || *next == ',');
        if (!good || number >= end || *count == room)
            return usage("%s: invalid value at '%s' (expected at most %zu numbers from 0 to %zu, "
                         "with commas between them)", option, text, room, end - 1);
        list[(*count)++] = (size_t)number;
        if (!*next) return SC_OK;
    }
}

/* Opens the SAE, the data and, where they are given, the statistics, which must be of this SAE and,
 * with same_data, of this data set. */
static int open_viewer(viewer *v, int same_data) {
    session *s = v->s;
    const options *o = s->o;
    const sc_sae *sae = &s->sae[0];
    feed *f = &s->data;
    SC_TRY(open_session(s));
    if (o->latents)
        SC_TRY(parse_list("-l", o->latents, sae->d_sae, v->latent, MAX_SHOWN, &v->latents));
    if (f->grid == 0 || f->T == 1)
        return fail("the tokens are not a square of patches (expected --tokens all or patches)");
    if (o->stats) {
        statistics *stats = &v->stats;
        const char *differs = NULL;
        SC_TRY(read_statistics(stats, o->stats, &s->memory));
        if (stats->sae_digest != sae_digest(sae) || stats->n != sae->d_sae) differs = "SAE";
        int other_data = stats->data_digest != f->set.digest;
        for (size_t i = 0; i < stats->n * stats->K; i++)     /* damaged, if only this is so */
            other_data |= stats->top[i].image >= (int64_t)f->set.count;
        if (same_data && other_data) differs = "data set";
        if (differs) return fail("%s: statistics of another %s", o->stats, differs);
        SC_TRY(check_origin(o->stats, &stats->origin, &sae->origin, NULL));
        if (stats->shards > 1)
            return fail("%s: statistics of one shard (expected the output of merge)", o->stats);
    }
    /* Only the values of masks need the model and the SAE. */
    if (o->mask && strcmp(o->mask, "top") == 0) v->kind = TOP_MASK;
    if (v->kind != VALUE_MASK) {
        s->saes = 0;
        if (!f->is_file) f->taps = 0;
    }
    s->batch[0].reconstruct = 0;
    /* Room for a mask and, where there are images, for one of them. */
    v->patches = f->grid * f->grid;
    size_t side = f->is_file ? f->grid : f->model.image_size;
    const array_spec arrays[] = { ARRAY(v->mask, MEASURE_IMAGES, v->patches),
                                  ARRAY(v->picture, side * side, 3) };
    return new_arrays(&s->memory, arrays, COUNT(arrays));
}

/* The order of v->image, for start_feed(). */
static int listed_draw(void *context, size_t draw, size_t *image) {
    const viewer *v = context;
    if (draw >= v->images) return SC_END;
    *image = (size_t)v->image[draw];
    return SC_OK;
}

/* v->mask becomes that of latent j on the batch: f_j of each patch, or 1 for those that are among
 * its top patches over the whole data set. */
static void find_masks(viewer *v, size_t j) {
    const feed *f = &v->s->data;
    const sae_batch *b = &v->s->batch[0];
    memset(v->mask, 0, MEASURE_IMAGES * v->patches * sizeof *v->mask);
    for (size_t c = b->start[j]; c < b->end[j]; c++) {
        size_t image = b->token[c] / f->T;
        size_t token = b->token[c] % f->T;
        if (token < f->first_patch) continue;                /* the class token */
        v->mask[image * v->patches + token - f->first_patch] = b->value[c];
    }
    if (v->kind != TOP_MASK) return;
    /* The SAE was not run: all values are 0. */
    for (size_t p = 0; p < v->stats.P; p++) {
        const sc_top *patch = &v->stats.patch[j * v->stats.P + p];
        uint64_t at = (uint64_t)patch->other - v->stats.first_patch;
        if (at >= v->patches) continue;                      /* no patch, or no entry */
        for (size_t i = 0; i < f->count; i++) {
            int64_t image = (int64_t)f->image[i];
            if (image == patch->image)
                v->mask[i * v->patches + at] = 1;
        }
    }
}

/* The pixels of the batch's image i: [S, S, 3]. */
static const unsigned char *crop_of(const feed *f, size_t i) {
    size_t S = f->model.image_size;
    return f->pixels + i * S * S * 3;
}

/* Draws the batch's image i from the pixel `corner` of v->picture on, which is `width` pixels wide.
 * Patches on which the mask is 0 are darkened. */
static void draw_image(const viewer *v, size_t i, size_t corner, size_t width) {
    const feed *f = &v->s->data;
    size_t S = f->model.image_size;
    const unsigned char *crop = crop_of(f, i);
    const double *mask = v->mask + i * v->patches;           /* [grid, grid] */
    for (size_t y = 0; y < S; y++) {
        unsigned char *row = v->picture + (corner + y * width) * 3;
        for (size_t e = 0; e < S * 3; e++) {     /* red, green, blue, red, ... */
            size_t patch = y * f->grid / S * f->grid + e / 3 * f->grid / S;
            int value = *crop++;
            if (v->kind != NO_MASK && mask[patch] == 0)
                value = value * SILENT / 255;
            row[e] = (unsigned char)value;
        }
    }
}

/* Writes v->picture to NAME.pgm (1 channel) or NAME.ppm (3) in the output folder. */
static int write_picture(const viewer *v, const char *name, size_t channels, size_t width,
                         size_t height) {
    sc_output out;
    char path[MAX_PATH], file[160];
    int rgb = channels == 3;                     /* else grey */
    mkdir(v->s->o->output, 0777);                /* if it fails, so does output_open() */
    snprintf(file, sizeof file, rgb ? "%s.ppm" : "%s.pgm", name);
    SC_TRY(join_path(v->s->o->output, file, path));
    SC_TRY(output_open(&out, path));
    fprintf(out.file, "P%d\n%zu %zu\n255\n", 5 + rgb, width, height);
    fwrite(v->picture, channels, width * height, out.file);
    return output_close(&out, SC_OK);
}

/* Writes the mask of latent j on the batch's image i: as a PGM, round(255 f / largest) per patch,
 * and as a PPM over the image, which saved activations do not have. With --class the mask is that
 * of the class, and there is no image either. */
static int write_mask(const viewer *v, size_t j, size_t i) {
    const feed *f = &v->s->data;
    const double *mask = v->mask + i * v->patches;
    long class = v->s->o->class_index;                       /* -1: not given */
    size_t S = f->model.image_size;
    double largest = 0;
    /* The image's index and, as far as it is harmless, its name; a long one loses its end. */
    char name[129];
    if (class >= 0) snprintf(name, sizeof name, "latent_%zu_class_%ld", j, class);
    else snprintf(name, sizeof name, "latent_%zu_%zu_%s", j, f->image[i],
                  base_name(image_name(f, f->image[i])));
    for (char *c = name; *c; c++) {
        int harmless = isalnum((unsigned char)*c) || *c == '.' || *c == '-';
        if (!harmless) *c = '_';
    }
    /* The mask, brightest where it is largest. */
    for (size_t p = 0; p < v->patches; p++)
        largest = fmax(largest, mask[p]);
    for (size_t p = 0; p < v->patches; p++) {
        double grey = 0;
        if (largest > 0) grey = floor(255 * mask[p] / largest + 0.5);
        v->picture[p] = (unsigned char)grey;
    }
    SC_TRY(write_picture(v, name, 1, f->grid, f->grid));
    if (f->is_file || class >= 0) return SC_OK;
    draw_image(v, i, 0, S);
    return write_picture(v, name, 3, S, S);
}

/* The masks of latents on each image or, with --class, their means over the images of a class. */
static int command_mask(session *s) {
    viewer v = { .s = s };
    feed *f = &s->data;
    long class = s->o->class_index;
    double *sum;                             /* of the masks: [latents, patches] */
    int status;
    SC_TRY(open_viewer(&v, 1));
    const array_spec arrays[] = { ARRAY(sum, v.latents, v.patches),
                                  ARRAY(v.image, f->set.count, 1) };
    SC_TRY(new_arrays(&s->memory, arrays, COUNT(arrays)));
    /* All images, or those of the class. */
    for (size_t i = 0; i < f->set.count; i++) {
        if (class >= 0 && f->set.image[i].label != class) continue;
        v.image[v.images++] = (int64_t)i;
    }
    if (v.images == 0)
        return fail("--class %ld: no image is of this class (of %zu classes)", class,
                    f->set.classes);
    SC_TRY(start_feed(f, MEASURE_IMAGES, listed_draw, &v, 0));
    while ((status = next_encoded(s, v.images)) == SC_OK) {
        for (size_t l = 0; l < v.latents; l++) {
            find_masks(&v, v.latent[l]);
            for (size_t i = 0; i < f->count; i++) {
                if (class < 0)
                    SC_TRY(write_mask(&v, v.latent[l], i));
                for (size_t p = 0; p < v.patches; p++)
                    sum[l * v.patches + p] += v.mask[i * v.patches + p];
            }
        }
    }
    if (status != SC_END) return status;
    if (class < 0) return SC_OK;
    if (f->used == 0) return fail("--class %ld: none of %zu images can be read", class, v.images);
    /* The means, one after the other, in the place of the batch's first mask. */
    for (size_t l = 0; l < v.latents; l++) {
        for (size_t p = 0; p < v.patches; p++)
            v.mask[p] = sum[l * v.patches + p] / (double)f->used;
        SC_TRY(write_mask(&v, v.latent[l], 0));
    }
    return SC_OK;
}

/* How many images latent j fires on, at most K: its top images. */
static size_t top_images(const statistics *s, size_t j) {
    size_t count = 0;
    while (count < s->K && s->top[j * s->K + count].image >= 0)
        count++;
    return count;
}

/* A sheet per latent: its top images in a square, row by row, the strongest first. */
static int command_top(session *s) {
    viewer v = { .s = s, .kind = s->o->mask ? VALUE_MASK : NO_MASK };
    feed *f = &s->data;
    size_t columns = 1;
    char name[64];
    int status;
    SC_TRY(open_viewer(&v, 1));
    size_t K = v.stats.K, S = f->model.image_size;
    size_t step = S + SHEET_GAP;             /* from cell to cell */
    while (columns * columns < K) columns++;
    size_t width = columns * step - SHEET_GAP;
    size_t height = (K - 1) / columns * step + S;            /* no gap after the last row */
    const array_spec arrays[] = { ARRAY(v.image, v.latents, K),
                                  ARRAY(v.picture, height, 3 * width) };
    SC_TRY(new_arrays(&s->memory, arrays, COUNT(arrays)));
    f->skip_bad = 0;                         /* a cell is for one image and no other */
    SC_TRY(start_feed(f, MEASURE_IMAGES, listed_draw, &v, 0));
    for (size_t l = 0; l < v.latents; l++) {
        size_t j = v.latent[l];
        size_t cell = 0;                     /* of the sheet, row by row */
        memset(v.picture, 0, height * width * 3);
        for (size_t k = 0; k < top_images(&v.stats, j); k++)
            v.image[v.images++] = v.stats.top[j * K + k].image;
        /* The feed has come to these images, and ends after them until there are more. */
        while ((status = next_encoded(s, v.images)) == SC_OK) {
            find_masks(&v, j);
            for (size_t i = 0; i < f->count; i++, cell++) {
                size_t row = cell / columns;
                size_t column = cell % columns;
                draw_image(&v, i, (row * width + column) * step, width);
            }
        }
        if (status != SC_END) return status;
        snprintf(name, sizeof name, "latent_%zu", j);
        SC_TRY(write_picture(&v, name, 3, width, height));
    }
    return SC_OK;
}

/* --- explain --- */

enum { EXPLAINED = 16, CLASSES_SHOWN = 3 };      /* latents per image; classes per latent */

/* The classes (other) with the largest shares (value) in the activation of latent j's top images,
 * in descending order; returns how many there are. The whole includes images without a label.
 * largest: [room] */
static size_t top_classes(const statistics *s, size_t j, sc_top *largest, size_t room) {
    const sc_top *top = s->top + j * s->K;
    size_t found = 0;
    double total = 0;
    for (size_t i = 0; i < s->K; i++)
        total += top[i].value;
    for (size_t i = 0; i < room; i++)
        largest[i] = nothing;
    for (size_t i = 0; i < s->K; i++) {
        double share = class_activation(top, s->K, i) / total;
        if (top[i].other >= 0)
            keep_largest(largest, room, (sc_top){ (float)share, 0, top[i].other });
    }
    while (found < room && largest[found].value > 0)
        found++;
    return found;
}

/* Prints the table's row of a latent; what is not defined is "-". */
static void print_latent(const statistics *s, size_t j, float activation) {
    const latent_record *l = &s->latent[j];
    sc_top class[CLASSES_SHOWN];
    size_t found = top_classes(s, j, class, CLASSES_SHOWN);
    printf("%-12zu%-12.4g%-12.4g", j, (double)activation, (double)l->sparsity);
    if (l->entropy < 0)
        printf("%-12s", "-");
    else
        printf("%-12.4g", (double)l->entropy);
    for (size_t i = 0; i < found; i++) {
        size_t c = (size_t)class[i].other;
        if (i > 0) printf(", ");
        if (s->class_name && c < s->classes)
            printf("%s", shown(s->class_name[c]));
        else
            printf("class %zu", c);
        printf(" %.0f %%", 100 * (double)class[i].value);
    }
    puts(found > 0 ? "" : "-");
}

/* The latents that are strongest on an image, or on one of its patches, and with -o their masks. */
static int command_explain(session *s) {
    const options *o = s->o;
    viewer v = { .s = s };
    feed *f = &s->data;
    sc_top strongest[EXPLAINED];                 /* image: the latent */
    SC_TRY(open_viewer(&v, 0));
    size_t first = 0, end = f->T;                /* tokens */
    if (o->patch) {
        size_t at[2], count = 0;                 /* row, column */
        SC_TRY(parse_list("--patch", o->patch, f->grid, at, 2, &count));
        if (count < 2) return usage("--patch: one number (expected R,C: row and column)");
        first = f->first_patch + at[0] * f->grid + at[1];
        end = first + 1;
    }
    /* One image, and each latent's mean over its tokens. */
    if (f->set.count != 1) return fail("%s: more than one image (expected one)", o->operand[0]);
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    SC_TRY(next_encoded(s, 1));
    for (size_t i = 0; i < EXPLAINED; i++)
        strongest[i] = nothing;
    for (size_t j = 0; j < v.stats.n; j++) {
        if ((double)v.stats.latent[j].sparsity > o->max_frequency) continue;
        double mean = sum_codes(&s->batch[0], j, first, end) / (double)(end - first);
        keep_largest(strongest, EXPLAINED, (sc_top){ (float)mean, (int64_t)j, 0 });
    }
    /* The table, and the masks in the same order. */
    puts("latent      activation  frequency   entropy     classes of its top images");
    for (size_t i = 0; i < EXPLAINED && strongest[i].value > 0; i++) {
        size_t j = (size_t)strongest[i].image;
        print_latent(&v.stats, j, strongest[i].value);
        if (!o->output) continue;
        find_masks(&v, j);
        SC_TRY(write_mask(&v, j, 0));
    }
    return end_of_output();
}

/* ============================================================================================
 * 22. Figures
 *
 * `plot` draws figures as SVG (w3.org/TR/SVG11) from files that other commands wrote. Each file
 * becomes rows of numbers. A figure shows them in panels: as lines, one per file in each panel, or
 * as dots, one panel per file. Coordinates come from IEEE operations and log64(), so the same files
 * give the same bytes everywhere.
 * ============================================================================================ */

enum { COLOURS = 9, PER_ROW = 4, GAP = 104 };    /* of dots; panels; pixels between these */
#define FAINT 1e-30                  /* what is smaller has no place on a logarithmic axis */

/* The numbers of one file. Column 0 lies along the x axis.
 * Lines: column i + 1 lies along the y axis of panel i.
 * Dots: column 1 lies along the y axis, column 2 is the colour, -1 if not defined. */
typedef struct {
    const char *path;
    double (*row)[4];                /* [rows] */
    size_t rows, capacity;
} plot_series;

/* The first tick is at low; the others are `step` apart or, on a logarithmic axis, ten times the
 * one before. */
typedef struct {
    int is_log;
    double from, to;                 /* pixels */
    double low, high, step;          /* values; the first two lie at these pixels */
} plot_axis;

typedef struct {
    const struct plot_kind *kind;
    plot_series series[MAX_OPERANDS];
    int count;                       /* of files */
    plot_axis x, y, colour;          /* y: of the panel that is being drawn */
    FILE *out;
} plot;

/* Rows come from a file directly (read) or from statistics (convert). */
struct plot_kind {
    const char *name;
    int (*read)(plot_series *s);
    int (*convert)(plot_series *s, const statistics *stats);
    int panels;                      /* of lines; 0: dots */
    int width, height;               /* of a panel, in pixels */
    int x_log, y_log;                /* whether the axes are logarithmic */
    const char *x, *y[3], *colour;   /* labels; no x: a mask, whose axes are not drawn */
};

/* Appends a row; columns that a kind of figure does not have are 0. */
static int add_row(plot_series *s, double a, double b, double c, double d) {
    SC_TRY(grow(&s->row, &s->capacity, s->rows, sizeof *s->row));
    const double row[4] = { a, b, c, d };
    memcpy(s->row[s->rows++], row, sizeof row);
    return SC_OK;
}

/* --- Reading --- */

/* The log that `train --log` writes. Columns: step, loss, mse, l0. */
static int read_log(plot_series *s) {
    char line[512];
    double v[4] = { 0 };
    int status = SC_OK;
    FILE *file = fopen(s->path, "r");
    if (!file) return fail("%s: cannot be opened: %s", s->path, strerror(errno));
    if (!fgets(line, sizeof line, file) || strcmp(line, log_header) != 0)
        status = fail("%s: not a training log (expected the first line %.*s)", s->path,
                      (int)sizeof log_header - 2, log_header);
    while (status == SC_OK && fgets(line, sizeof line, file)) {
        int end = 0;                                     /* stays 0 where a number is missing */
        sscanf(line, "%lf,%*f,%*f,%*f,%lf,%lf,%*f,%*f,%lf,%*f,%*f,%*f,%*f%n", &v[0], &v[1], &v[2],
               &v[3], &end);
        for (int c = 0; c < 4; c++)
            if (!(fabs(v[c]) <= 1e30)) end = 0;
        status = add_row(s, v[0], v[1], v[2], v[3]);
        if (end == 0 || line[end] != '\n')
            status = fail("%s: line %zu: expected 13 finite numbers", s->path, s->rows + 1);
    }
    if (ferror(file)) status = fail("%s: cannot be read", s->path);
    fclose(file);
    return status;
}

/* Columns: frequency, mean activation, entropy. */
static int latent_rows(plot_series *s, const statistics *stats) {
    for (size_t j = 0; j < stats->n; j++) {
        const latent_record *l = &stats->latent[j];
        SC_TRY(add_row(s, l->sparsity, l->mean, l->entropy, 0));
    }
    return SC_OK;
}

/* Columns: middle of a bin, its share in percent; from the first to the last bin in use. */
static int histogram_rows(plot_series *s, const statistics *stats) {
    const int64_t *count = stats->histogram[0];
    double total = 0;
    int last = -1;
    /* The last bin in use, and the number of active values. */
    for (int b = 0; b < HISTOGRAM_BINS; b++) {
        if (count[b] < 0) return fail("%s: activation_histogram: negative counts", s->path);
        if (count[b] > 0) last = b;
        total += (double)count[b];
    }
    for (int b = 0; b <= last; b++) {
        double middle = sqrt(bin_edge(b) * bin_edge(b + 1));
        double percent = 100 * (double)count[b] / total;
        if (s->rows > 0 || percent > 0) SC_TRY(add_row(s, middle, percent, 0, 0));
    }
    return SC_OK;
}

/* For qsort: more images first. */
static int by_images(const void *a, const void *b) {
    const double *left = a, *right = b;
    return (left[1] < right[1]) - (left[1] > right[1]);
}

/* Columns: rank, number of images on which the latent fires. */
static int count_rows(plot_series *s, const statistics *stats) {
    for (size_t j = 0; j < stats->n; j++)
        SC_TRY(add_row(s, 0, (double)stats->latent[j].images, 0, 0));
    qsort(s->row, s->rows, sizeof *s->row, by_images);
    for (size_t r = 0; r < s->rows; r++)
        s->row[r][0] = (double)(r + 1);
    return SC_OK;
}

/* Columns: x, y and value of a patch, each from 0 to 1. A mask is an image with one pixel per
 * patch; grey has the same value in all channels. */
static int read_mask(plot_series *s) {
    picture mask;
    int status = read_picture(s->path, &mask) == SC_OK ? SC_OK : SC_FAILED;
    size_t side = mask.width;
    if (status == SC_OK && (side != mask.height || side > 64))
        status = fail("%s: not a mask (expected a square PGM of at most 64 x 64)", s->path);
    for (size_t i = 0; i < side * side && status == SC_OK; i++) {
        double x = ((double)(i % side) + 0.5) / (double)side;
        double y = ((double)(i / side) + 0.5) / (double)side;
        status = add_row(s, x, 1 - y, mask.rgb[3 * i] / 255.0, 0);
    }
    free(mask.memory);
    return status;
}

/* How each kind reads a file; panels, sizes, scales and labels. */
static const struct plot_kind plot_kinds[] = {
    { "curves", read_log, NULL, 3, 260, 260, 0, 1, "step",
      { "loss", "MSE", "L0 (active latents per token)" }, NULL },
    { "latents", NULL, latent_rows, 0, 300, 300, 1, 1, "frequency (share of the images)",
      { "mean activation where it fires" }, "entropy of the top images (nats); grey: undefined" },
    { "activations", NULL, histogram_rows, 1, 620, 260, 1, 0, "activation of an active latent",
      { "active values in a bin (%)" }, NULL },
    { "counts", NULL, count_rows, 1, 620, 260, 0, 1, "latents, the most frequent first",
      { "images on which a latent fires" }, NULL },
    { "mask", read_mask, NULL, 0, 200, 200, 0, 0, NULL, { NULL },
      "activation (share of the largest)" } };

/* --- Axes --- */

/* The largest power of ten that is not above a value; 0.01f, just below 0.01, counts as 0.01. */
static double power_of_ten(double value) {
    double power = 1;
    value *= 1 + 1e-6;
    while (power > value) power /= 10;
    while (power * 10 <= value) power *= 10;
    return power;
}

/* The axis for a column of all files. A logarithmic one covers whole powers of ten; a linear one
 * goes from 0 to the largest value and has 4 to 8 ticks. */
static plot_axis fit_axis(const plot *p, int column, int is_log, double from, double to) {
    double low = 1e30, high = FAINT;
    for (int n = 0; n < p->count; n++) {
        const plot_series *s = &p->series[n];
        for (size_t r = 0; r < s->rows; r++) {
            double value = s->row[r][column];
            if (value >= FAINT) low = fmin(low, value);
            high = fmax(high, value);
        }
    }
    if (high < low || !p->kind->x) low = high = 1;       /* no values, or shares of 1 */
    /* A power of ten, halved or doubled. */
    plot_axis a = { is_log, from, to, 0, high, power_of_ten(high) };
    while (a.step * 4 > high) a.step /= 2;
    while (a.step * 8 < high) a.step *= 2;
    if (!is_log) return a;
    a.low = power_of_ten(low);
    a.high = a.low * 10;
    while (a.high < high * (1 - 1e-6)) a.high *= 10;
    return a;
}

/* The pixel of a value. */
static double axis_place(const plot_axis *a, double value) {
    double share = (value - a->low) / (a->high - a->low);
    if (a->is_log)
        share = log64(value / a->low) / log64(a->high / a->low);
    return a->from + (a->to - a->from) * share;
}

/* --- Drawing --- */

/* anchor: which end of the text is at x. Characters that XML reserves are escaped. */
static void draw_text(const plot *p, double x, double y, const char *anchor, const char *text) {
    fprintf(p->out, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    for (const char *c = shown(text); *c; c++) {
        if (strchr("&<>", *c))
            fprintf(p->out, "&#%d;", *c);
        else
            putc(*c, p->out);
    }
    fputs("</text>\n", p->out);
}

/* Grid lines, numbers and label of an axis: of the y axis, at the left of a panel that is `size`
 * wide, with its label above, or of another, below a panel that is `size` high. */
static void draw_axis(const plot *p, const plot_axis *a, int size, const char *label) {
    int is_y = a == &p->y;
    double tick = a->low;
    while (tick <= a->high * (1 + 1e-6)) {
        double at = axis_place(a, tick);
        char number[32];
        snprintf(number, sizeof number, "%g", tick);
        /* The number, then the line. */
        if (is_y) draw_text(p, -6, at + 4, "end", number);
        else draw_text(p, at, size + 16, "middle", number);
        if (is_y) fprintf(p->out, "<path stroke=\"#ddd\" d=\"M0 %.1fh%d\"/>\n", at, size);
        else fprintf(p->out, "<path stroke=\"#ddd\" d=\"M%.1f 0v%d\"/>\n", at, size);
        if (a->is_log) tick *= 10;
        else tick += a->step;
    }
    if (is_y) draw_text(p, -40, -10, "start", label);
    else draw_text(p, a->to / 2, size + 36, "middle", label);
}

/* A column over column 0, as one path: a line that begins with a dot or, where shade is not -1, the
 * dots of that shade. */
static void draw_path(const plot *p, const plot_series *s, int column, int shade,
                      const char *colour) {
    double width = 3;
    int line = 0;                                        /* whether it has begun */
    /* a mask's patches overlap a little, so that no gap shows */
    if (!p->kind->x) width = 0.5 + p->kind->width / sqrt((double)s->rows);
    if (shade < 0) width = 1.5;
    fprintf(p->out, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"%.1f\" "
            "stroke-linecap=\"square\" d=\"", colour, width);
    for (size_t r = 0; r < s->rows; r++) {
        const double *row = s->row[r];
        int own = 0;                                     /* not defined */
        double share = row[2] / p->colour.high;
        if (row[2] >= 0) own = (int)(share * (COLOURS - 1) + 1.5);
        if (shade >= 0 && own != shade) continue;
        if (p->x.is_log && row[0] < FAINT) continue;
        if (p->y.is_log && row[column] < FAINT) continue;
        double x = axis_place(&p->x, row[0]);
        double y = axis_place(&p->y, row[column]);
        if (line) fprintf(p->out, "L%.1f %.1f", x, y);
        else fprintf(p->out, "M%.1f %.1fh0", x, y);      /* h0: a dot */
        line = shade < 0;
    }
    fputs("\"/>\n", p->out);
}

/* The panels, up to four per row, and below them the legend. */
static void draw_figure(plot *p) {
    static const char *const line_colour[8] = { "#2f8fd8", "#e0851b", "#1fa67a", "#d4569a",
                                                "#8b6fe8", "#c9a400", "#d5492e", "#7d8794" };
    static const char *const shade[COLOURS + 1] = {          /* grey, then viridis */
        "#888", "#440154", "#472c7a", "#3b518b", "#2c718e", "#21908d", "#27ad81", "#5cc863",
        "#aadc32", "#fde725" };
    const struct plot_kind *k = p->kind;
    int lines = k->panels > 0;
    int panels = lines ? k->panels : p->count;
    int columns = panels < PER_ROW ? panels : PER_ROW;
    int across = k->width + GAP, down = k->height + GAP;     /* from panel to panel */
    int legend = (panels + PER_ROW - 1) / PER_ROW * down;    /* where it begins */
    double strip = (double)k->width / COLOURS;               /* of its colours */
    fprintf(p->out, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" "
            "font-family=\"sans-serif\" font-size=\"12\">\n"
            "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n"
            "<g transform=\"translate(82,40)\">\n", columns * across, legend + 80 + 20 * p->count,
            columns * across);
    p->x = fit_axis(p, 0, k->x_log, 0, k->width);
    p->colour = fit_axis(p, 2, 0, 0, k->width);
    for (int i = 0; i < panels; i++) {
        int column = lines ? i + 1 : 1;
        fprintf(p->out, "<g transform=\"translate(%d,%d)\">\n", i % PER_ROW * across,
                i / PER_ROW * down);
        p->y = fit_axis(p, column, k->y_log, k->height, 0);
        if (k->x) {
            draw_axis(p, &p->x, k->height, k->x);
            draw_axis(p, &p->y, k->width, k->y[column - 1]);
        }
        /* A line per file, or the file's dots, one colour after the other. */
        if (lines) {
            for (int n = 0; n < p->count; n++)
                draw_path(p, &p->series[n], column, -1, line_colour[n % 8]);
        } else {
            draw_text(p, 0, -26, "start", base_name(p->series[i].path));
            for (int c = 0; c <= COLOURS; c++)
                draw_path(p, &p->series[i], column, c, shade[c]);
        }
        fputs("</g>\n", p->out);
    }
    fprintf(p->out, "<g transform=\"translate(0,%d)\">\n", legend);
    /* The files' names, or the colours on an axis. */
    if (lines) {
        for (int n = 0; n < p->count; n++) {
            fprintf(p->out, "<path stroke=\"%s\" stroke-width=\"2\" d=\"M0 %dh22\"/>\n",
                    line_colour[n % 8], 20 * n - 4);
            draw_text(p, 30, 20 * n, "start", p->series[n].path);
        }
    } else {
        for (int c = 0; c < COLOURS; c++)
            fprintf(p->out, "<path stroke=\"%s\" stroke-width=\"14\" d=\"M%.1f 7h%.1f\"/>\n",
                    shade[c + 1], strip * c, strip);
        draw_axis(p, &p->colour, 14, k->colour);
    }
    fputs("</g>\n</g>\n</svg>\n", p->out);
}

static int command_plot(session *s) {
    const char *const *operand = s->o->operand;
    plot p = { .kind = NULL };
    sc_output out;
    int status = SC_OK;
    for (size_t i = 0; i < COUNT(plot_kinds); i++)
        if (strcmp(plot_kinds[i].name, operand[0]) == 0) p.kind = &plot_kinds[i];
    if (!p.kind)
        return usage("plot: invalid value '%s' (expected curves, latents, activations, counts or "
                     "mask)", operand[0]);
    for (; operand[p.count + 1] && status == SC_OK; p.count++) {
        plot_series *series = &p.series[p.count];
        memory_list memory = NULL;
        statistics stats;
        series->path = operand[p.count + 1];
        if (p.kind->read) {
            status = p.kind->read(series);
        } else {
            status = read_statistics(&stats, series->path, &memory);
            if (status == SC_OK) status = p.kind->convert(series, &stats);
            release(&memory);
        }
    }
    if (status == SC_OK) status = output_open(&out, s->o->output);
    if (status == SC_OK) {
        p.out = out.file;
        draw_figure(&p);
        status = output_close(&out, SC_OK);
    }
    for (int n = 0; n < p.count; n++)
        free(p.series[n].row);
    return status;
}

/* ============================================================================================
 * 23. The atlas
 *
 * A folder that a browser opens without a server. index.html is the page with the
 * numbers of all latents. data/N.js: the top images of 64 latents, with their masks. data/I.jpg:
 * image I, once, however many latents show it. A page that comes from a file may not read files,
 * but it may run scripts: N.js sets a variable of the page.
 * ============================================================================================ */

/* index.html, after the numbers, line by line: style, elements, script. It shows a list of latents,
 * which can be sorted by column and filtered by class, and the top images of one latent. */
static const char *const atlas_page[] = {
    "<meta name='viewport' content='width=device-width, initial-scale=1'>",
    "<title>Atlas</title>",
    "<style>",
    ":root { color-scheme: light dark; }",
    "body { margin: 14px auto; max-width: 1200px; padding: 0 14px; overflow-wrap: anywhere;",
    "    font: 15px/1.4 system-ui, sans-serif; }",
    "h1 { font-size: 17px; }",
    "table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }",
    "th { font-weight: normal; color: LinkText; }",
    "th, td { padding: 2px 4px; text-align: right; white-space: nowrap; cursor: pointer; }",
    "th:last-child, td:last-child { text-align: left; white-space: normal; width: 99%; }",
    ".chosen { background: Highlight; color: HighlightText; }",
    "#filter { width: 100%; box-sizing: border-box; }",
    "#rows { height: 30vh; margin: 10px 0; overflow-y: auto; }",
    /* three images per row on a phone, at most eight */
    "#figures { display: grid; gap: 10px; margin-top: 10px; align-items: start;",
    "    grid-template-columns: repeat(auto-fill, minmax(max(100px, 11%), 1fr)); }",
    /* the mask lies on the image */
    "figure { display: grid; grid-template-columns: 100%; margin: 0; }",
    "img, canvas { grid-area: 1 / 1; width: 100%; aspect-ratio: 1; }",
    "canvas { image-rendering: pixelated; }",
    "#masked:not(:checked) ~ #figures canvas { display: none; }",
    "</style>",
    /* The list of latents, then one latent with its images. */
    "<body>",
    "<h1>needs JavaScript</h1>",
    "<input id='filter' type='search' placeholder='class or latent'>",
    "<div id='rows'><table><thead><tr><th>latent</th>",
    "<th title='share of the images on which it fires'>images</th>",
    "<th title='mean activation over these images'>mean</th>",
    "<th title='of the classes of its top images, in nats'>entropy</th>",
    "<th title='with the largest share of its top images'>class</th>",
    "</tr></thead><tbody></tbody></table></div>",
    "<p id='facts'></p>",
    "<button id='before'>&#8592; previous</button> <button id='after'>next &#8594;</button>",
    "<input id='masked' type='checkbox' checked><label for='masked'>where it fires</label>",
    "<div id='figures'></div>",
    /* data: see write_index(). parts: the N.js read so far, one list of images per latent. order:
     * the listed rows of data.latents, sorted by column `key`, ascending if `way` is 1. */
    "<script>",
    "'use strict';",
    "const $ = id => document.getElementById(id);",
    "const parts = {};",
    "let latent = 0, order = [], key = 3, way = 1;",
    "function make(tag, parent, properties) {",
    "    return parent.appendChild(Object.assign(document.createElement(tag), properties));",
    "}",
    /* The texts of a row; "-" where a value is not defined. */
    "function digits(x) {",
    "    return x > 0 && x < 1e-3 ? x.toExponential(1) : Number(x.toPrecision(3));",
    "}",
    "function nameOf(label) { return label < 0 ? '-' : data.classes[label] ?? 'class ' + label; }",
    "function texts([j, frequency, mean, entropy, label]) {",
    "    return [j, digits(100 * frequency) + ' %', frequency > 0 ? digits(mean) : '-',",
    "        entropy < 0 ? '-' : digits(entropy), nameOf(label)];",
    "}",
    /* The latents that match the filter, sorted; undefined values come last. */
    "function arrange() {",
    "    const wanted = $('filter').value.trim().toLowerCase();",
    "    const last = row => row[1] === 0 || row[key] < 0;",
    "    order = data.latents.filter(row => wanted === '' || String(row[0]) === wanted ||",
    "                                       nameOf(row[4]).toLowerCase().includes(wanted));",
    "    order.sort((a, b) => last(a) - last(b) || way * (a[key] - b[key]) || a[0] - b[0]);",
    "    list();",
    "}",
    /* The first 500 rows of the list. */
    "function list() {",
    "    const body = document.querySelector('tbody');",
    "    body.replaceChildren();",
    "    for (const row of order.slice(0, 500)) {",
    "        const tr = make('tr', body, { onclick: () => location.hash = 'latent=' + row[0] });",
    "        tr.className = row[0] === latent ? 'chosen' : '';",
    "        for (const textContent of texts(row)) make('td', tr, { textContent });",
    "    }",
    "    const more = order.length - 500;",
    "    if (more > 0) make('td', make('tr', body), { textContent: more + ' more', colSpan: 5 });",
    "}",
    /* Shows the latent that the address names, else the first of the list. */
    "function follow() {",
    "    const row = location.hash ? data.latents[location.hash.slice(8)] : order[0];",
    "    if (!row) return tell('There is no such latent.');",
    "    const [j, frequency, mean, entropy] = texts(row);",
    "    latent = j;",
    "    document.title = 'Latent ' + j;",
    "    tell(document.title + ' fires on ' + frequency + ' of the images, mean activation ' +",
    "        mean + ', entropy ' + entropy);",
    "    list();",
    "    const number = Math.floor(j / data.part), src = 'data/' + number + '.js';",
    "    const onerror = () => tell(src + ' cannot be read.');",
    "    if (parts[number]) show();",
    "    else make('script', document.head, { src, onload: show, onerror });",
    "}",
    "function tell(text) {",
    "    $('facts').textContent = text;",
    "    $('figures').replaceChildren();",
    "}",
    /* The images of the latent, each under a veil of grey, through which it stays visible: thick
     * over silent patches, thin over weak ones, none where the latent is strongest. */
    "function show() {",
    "    const images = parts[Math.floor(latent / data.part)]?.[latent % data.part] ?? [];",
    "    $('figures').replaceChildren();",
    "    for (const [number, activation, label, title, mask] of images) {",
    "        const figure = make('figure', $('figures'), { title });",
    "        make('img', figure, { src: 'data/' + number + '.jpg', alt: title });",
    "        const veil = make('canvas', figure, { width: data.grid, height: data.grid });",
    "        const g = veil.getContext('2d');",
    "        g.fillStyle = 'gray';",
    "        for (let p = 0; p < mask.length; p++) {",
    "            const level = parseInt(mask[p], 16);",
    "            g.globalAlpha = level ? 0.35 * (1 - level / 15) : 0.65;",
    "            g.fillRect(p % data.grid, Math.floor(p / data.grid), 1, 1);",
    "        }",
    "        const textContent = digits(activation) + ' ' + nameOf(label);",
    "        make('figcaption', figure, { textContent });",
    "    }",
    "}",
    /* The neighbour in the list. */
    "function step(by) {",
    "    const next = order[order.findIndex(row => row[0] === latent) + by];",
    "    if (next) location.replace('#latent=' + next[0]);",
    "}",
    "document.querySelectorAll('th').forEach((head, column) => head.onclick = () => {",
    "    way = key === column ? -way : 1;",
    "    key = column;",
    "    arrange();",
    "});",
    "$('filter').oninput = arrange;",
    "$('before').onclick = () => step(-1);",
    "$('after').onclick = () => step(1);",
    "onhashchange = follow;",
    "document.querySelector('h1').textContent = data.name + ': ' + data.latents.length +",
    "    ' latents, ' + data.images + ' images';",
    "arrange();",
    "follow();",
    "</script>",
    "</body>",
    "</html>"
};

enum { PART = 64 };                  /* latents per N.js */

/* Opens data/NUMBER.SUFFIX for writing. path: its name, which must last until it is closed */
static int open_part(sc_output *out, const viewer *v, size_t number, const char *suffix,
                     char path[MAX_PATH]) {
    const char *folder = v->s->o->output;
    char name[64];
    SC_TRY(join_path(folder, "data", path));
    mkdir(path, 0777);                                   /* output_open() reports a failure */
    snprintf(name, sizeof name, "data/%zu.%s", number, suffix);
    SC_TRY(join_path(folder, name, path));
    return output_open(out, path);
}

/* An image as JPEG, by the program cjpeg, which writes the open file itself; SC_END if it is not
 * installed. pixels: [S, S, 3] */
static int write_jpeg(const sc_output *out, const unsigned char *pixels, size_t S) {
    char *argument[] = { "cjpeg", "-quality", "85", "-outfile", out->temporary, NULL };
    char words[256];
    child_process child;
    /* the image as PPM is its standard input */
    FILE *ppm = tmpfile();
    if (!ppm) return fail("a temporary file cannot be made: %s", strerror(errno));
    fprintf(ppm, "P6\n%zu %zu\n255\n", S, S);
    fwrite(pixels, 3 * S, S, ppm);
    fflush(ppm);                                         /* cjpeg refuses an image cut short */
    lseek(fileno(ppm), 0, SEEK_SET);
    int error = start_child(&child, argument, fileno(ppm));
    fclose(ppm);
    if (error == ENOENT || error == EACCES) return SC_END;
    if (error) return fail("cjpeg cannot be started: %s", strerror(error));
    /* 127 is how some systems report that there is no such program */
    int ended = end_child(&child, NULL, words, sizeof words);
    if (ended == 0) return SC_OK;
    if (WIFEXITED(ended) && WEXITSTATUS(ended) == 127) return SC_END;
    return fail("%s: cjpeg failed: %s", out->path, words);
}

/* An image as BMP of at most 128 x 128: two headers, then per pixel blue, green, red, 0. With 32
 * bits per pixel rows need no padding; the negative height says that the top row comes first. */
static void write_bitmap(FILE *out, const unsigned char *pixels, size_t S) {
    uint32_t side = S < 128 ? (uint32_t)S : 128;
    uint32_t bytes = 4 * side * side;
    const uint32_t fields[] = {
        54 + bytes, 0, 54,                               /* bytes of the file, of the headers */
        40, side, 0 - side,                              /* of the second header; width, height */
        1 | 32 << 16, 0, bytes, 0, 0, 0, 0 };            /* 1 plane, 32 bits, not compressed */
    unsigned char header[sizeof fields];
    copy_numbers(header, fields, COUNT(fields), 4);      /* little-endian */
    fputs("BM", out);
    fwrite(header, sizeof header, 1, out);
    for (size_t i = 0; i < (size_t)side * side; i++) {
        size_t y = i / side * S / side;                  /* nearest neighbour */
        size_t x = i % side * S / side;
        const unsigned char *rgb = pixels + (y * S + x) * 3;
        const unsigned char pixel[] = { rgb[2], rgb[1], rgb[0], 0 };
        fwrite(pixel, sizeof pixel, 1, out);
    }
}

/* Image i of the batch. A bitmap has the name of a JPEG too: browsers go by the first bytes. */
static int write_image(const viewer *v, size_t i) {
    const feed *f = &v->s->data;
    const unsigned char *pixels = crop_of(f, i);
    size_t S = f->model.image_size;
    char path[MAX_PATH];
    sc_output out;
    SC_TRY(open_part(&out, v, f->image[i], "jpg", path));
    int status = write_jpeg(&out, pixels, S);
    if (status == SC_END) {
        if (f->used + i == 0) note("cjpeg is not installed: images are bitmaps, which are larger");
        write_bitmap(out.file, pixels, S);
        status = SC_OK;
    }
    return output_close(&out, status);
}

/* masks: [n, K, patches]. Keeps the masks of the batch's images, for all latents that show them.
 * A digit per patch, from 0, silent, to f (15), the latent's largest activation on any patch of the
 * whole data set: so the masks of a latent can be compared. */
static void keep_masks(viewer *v, char *masks) {
    const feed *f = &v->s->data;
    const statistics *stats = &v->stats;
    int64_t first = (int64_t)f->image[0];                /* images come in ascending order */
    int64_t last = (int64_t)f->image[f->count - 1];
    size_t found = SIZE_MAX;                             /* the latent whose masks are in v->mask */
    for (size_t slot = 0; slot < stats->n * stats->K; slot++) {
        int64_t image = stats->top[slot].image;
        if (image < first || image > last) continue;
        /* the masks of this latent, and the image's place in the batch */
        size_t j = slot / stats->K;
        size_t i = 0;
        if (j != found) find_masks(v, j);
        found = j;
        while ((int64_t)f->image[i] != image) i++;
        /* as digits */
        double largest = stats->patch[j * stats->P].value;
        for (size_t p = 0; p < v->patches; p++) {
            double value = v->mask[i * v->patches + p];
            int level = 0;
            if (value > 0 && largest > 0) level = (int)ceil(15 * fmin(value / largest, 1));
            masks[slot * v->patches + p] = "0123456789abcdef"[level];
        }
    }
}

/* N.js: per latent its top images, each [image, activation, class, name, mask]. JavaScript allows a
 * comma after the last element of a list. */
static int write_top_images(const viewer *v, const char *masks, size_t part) {
    const statistics *stats = &v->stats;
    char path[MAX_PATH];
    sc_output out;
    SC_TRY(open_part(&out, v, part, "js", path));
    fprintf(out.file, "parts[%zu] = [\n", part);
    for (size_t j = part * PART; j < (part + 1) * PART && j < stats->n; j++) {
        putc('[', out.file);
        for (size_t k = 0; k < top_images(stats, j); k++) {
            size_t slot = j * stats->K + k;
            const sc_top *top = &stats->top[slot];
            fprintf(out.file, "[%lld,%.6g,%lld,", (long long)top->image, (double)top->value,
                    (long long)top->other);
            print_json(out.file, image_name(&v->s->data, (size_t)top->image));
            fprintf(out.file, ",\"%.*s\"],\n", (int)v->patches, masks + slot * v->patches);
        }
        fputs("],\n", out.file);
    }
    fputs("];\n", out.file);
    return output_close(&out, SC_OK);
}

/* Everything in data/. index: the path of index.html */
static int write_data(viewer *v, const char *index) {
    feed *f = &v->s->data;
    size_t slots = v->stats.n * v->stats.K;
    char *masks = NULL;
    int status;
    const array_spec arrays[] = {
        ARRAY(v->image, f->set.count, 1),
        ARRAY(masks, slots, v->patches) };
    SC_TRY(new_arrays(&v->s->memory, arrays, COUNT(arrays)));
    /* the page of an earlier atlas goes first */
    if (unlink(index) != 0 && errno != ENOENT) return write_failed(index, errno);
    /* v->image: first 1 for each image that a latent shows, then these images, in order */
    for (size_t slot = 0; slot < slots; slot++) {
        int64_t image = v->stats.top[slot].image;
        if (image >= 0) v->image[image] = 1;             /* -1: fewer than K images */
    }
    for (size_t i = 0; i < f->set.count; i++)
        if (v->image[i]) v->image[v->images++] = (int64_t)i;
    /* one pass over them, for the images and the masks */
    SC_TRY(start_feed(f, MEASURE_IMAGES, listed_draw, v, 0));
    while ((status = next_encoded(v->s, v->images)) == SC_OK) {
        for (size_t i = 0; i < f->count; i++) SC_TRY(write_image(v, i));
        keep_masks(v, masks);
    }
    if (status != SC_END) return status;
    for (size_t part = 0; part * PART < v->stats.n; part++)
        SC_TRY(write_top_images(v, masks, part));
    return SC_OK;
}

/* The numbers, then the rest of the page. Per latent: [latent, frequency, mean, entropy, class with
 * the largest share]. */
static void write_index(const viewer *v, FILE *out) {
    const statistics *stats = &v->stats;
    const sc_images *set = &v->s->data.set;
    fputs("<!DOCTYPE html>\n<html lang='en'>\n<meta charset='utf-8'>\n"
          "<script>\nconst data = { name: ", out);
    print_json(out, base_name(v->s->sae[0].path));
    fprintf(out, ", images: %zu, part: %d, grid: %zu,\nclasses: [\n", set->count, PART,
            v->s->data.grid);
    for (size_t c = 0; c < set->classes && set->class_name; c++) {
        print_json(out, set->class_name[c]);
        fputs(",\n", out);
    }
    fputs("], latents: [\n", out);
    for (size_t j = 0; j < stats->n; j++) {
        const latent_record *l = &stats->latent[j];
        sc_top class;
        top_classes(stats, j, &class, 1);
        fprintf(out, "[%zu,%.6g,%.6g,%.6g,%lld],\n", j, (double)l->sparsity, (double)l->mean,
                (double)l->entropy, (long long)class.other);
    }
    fputs("] };\n</script>\n", out);
    for (size_t i = 0; i < COUNT(atlas_page); i++) fprintf(out, "%s\n", atlas_page[i]);
}

/* index.html is written last: a folder that has one is complete. It is open, and locked, from the
 * beginning, so that two processes cannot write into one folder. */
static int command_atlas(session *s) {
    viewer v = { .s = s };
    const char *folder = s->o->output;
    char index[MAX_PATH];
    sc_output out;
    SC_TRY(open_viewer(&v, 1));
    SC_TRY(join_path(folder, "index.html", index));
    mkdir(folder, 0777);                         /* if it fails, so does output_open() */
    SC_TRY(output_open(&out, index));
    int status = write_data(&v, index);
    if (status == SC_OK) write_index(&v, out.file);
    status = output_close(&out, status);
    if (status != SC_OK) rmdir(folder);          /* only if it is empty */
    return status;
}

/* ============================================================================================
 * 24. Info and compare
 *
 * `info` says what a file or this machine is, `compare` how far apart two files are.
 * ============================================================================================ */

/* The sizes of a tensor, "192 x 12288", or an index into it, "3, 4". */
static const char *join_sizes(const size_t *sizes, int count, const char *between) {
    char out[SC_MAX_RANK * 24] = "scalar";               /* a tensor without sizes */
    for (int d = 0, used = 0; d < count; d++) {
        if (d > 0) used += sprintf(out + used, "%s", between);
        used += sprintf(out + used, "%zu", sizes[d]);
    }
    return shown(out);
}

/* A model's sizes, and the settings that its numbers depend on. */
static void describe_model(const char *path) {
    sc_model m;
    if (sc_model_open(&m, path, NULL) != SC_OK) {
        printf("vision transformer that cannot be used: %s\n", shown(sc_error()));
        return;
    }
    printf("vision transformer, %s's names: %zu blocks, width %zu, %zu heads, hidden %zu, "
           "images of %zu x %zu in %zu x %zu patches of %zu x %zu, %s GELU, epsilon %g%s\n",
           naming_names[m.naming], m.blocks, m.width, m.heads, m.hidden, m.image_size,
           m.image_size, m.grid, m.grid, m.patch, m.patch,
           m.activation == QUICK_GELU ? "quick" : "exact", (double)m.epsilon,
           find_layer(&m, HEAD, 0, 0) ? ", with a head" : "");
    sc_model_close(&m);
}

/* A file's tensors, its metadata, and in the last line what it is. */
static int command_info(session *s) {
    static const char *const kinds[][2] = {      /* the first kind whose tensor the file has */
        { "W_enc_m", "checkpoint of a training" },
        { "W_enc", "sparse autoencoder" },
        { "max_activating_image_indices", "statistics" },
        { "activations", "activations" },
        { "images", "packed images" },
        { "value", "codes" } };
    const char *path = s->o->operand[0];
    sc_safetensors file;
    size_t kind = 0;
    if (!path) {                                 /* this machine, and what of it is used */
        printf("saeclip %s\ninstruction sets:", SC_VERSION);
        for (size_t i = 0; i < COUNT(kernel_sets); i++) {
            const kernel_set *set = kernel_sets[i];
            if (is_usable(set)) printf(" %s", set->name);
            if (set == kernels) printf(" (in use)");
        }
        printf("\nthreads: %d of %ld processors\n", thread_count(),
               sysconf(_SC_NPROCESSORS_ONLN));
        return end_of_output();
    }
    SC_TRY(sc_safetensors_open(&file, path));
    printf("%zu tensors in %zu bytes\n", file.tensors, file.size);
    for (size_t i = 0; i < file.tensors; i++) {
        const sc_tensor *t = &file.tensor[i];
        printf("    %-48s %-5s %-20s %12zu bytes\n", shown(t->name), sc_dtype_name(t->dtype),
               join_sizes(t->shape, t->rank, " x "), t->bytes);
    }
    printf("%zu entries of metadata\n", file.entries);
    for (size_t i = 0; i < file.entries; i++)
        printf("    %s = %s\n", shown(file.metadata[i].key), shown(file.metadata[i].value));
    /* What it is; the name comes first, as in messages. */
    printf("%s: ", shown(path));
    while (kind < COUNT(kinds) && !sc_tensor_find(&file, kinds[kind][0])) kind++;
    if (kind < COUNT(kinds)) puts(kinds[kind][1]);
    else if (naming_of(&file) != NAMINGS) describe_model(path);
    else puts("a safetensors file of an unknown kind");
    sc_safetensors_close(&file);
    return end_of_output();
}

/* --- compare --- */

/* |a - b| of element i, exact for integers, which float64 may not be able to tell apart. Infinite
 * where one is not finite, unless they are equal or both NaN, and where the bits of types differ
 * that are not read as numbers. *b_value: b, or 0 */
static double distance_at(const sc_tensor *a, const sc_tensor *b, size_t i, double *b_value) {
    size_t size = sc_dtype_size(a->dtype);
    int64_t p = 0, q = 0;
    *b_value = 0;
    if (a->dtype == b->dtype && memcmp(a->data + i * size, b->data + i * size, size) == 0) return 0;
    if (a->dtype > SC_U8 || b->dtype > SC_U8) return INFINITY;
    double x = number_at(a, i, &p), y = number_at(b, i, &q);
    *b_value = y;
    if (a->dtype > SC_F64 && b->dtype > SC_F64) {                /* I64, I32 or U8 */
        uint64_t apart = (uint64_t)p - (uint64_t)q;              /* modulo 2^64 */
        return (double)(p < q ? 0 - apart : apart);
    }
    if (x == y || (isnan(x) && isnan(y))) return 0;
    if (!isfinite(x - y)) return INFINITY;
    return fabs(x - y);
}

/* Prints one line, with the largest |a - b|. Returns whether shapes differ, or elements beyond the
 * tolerance, |a - b| <= atol + rtol |b|. */
static int compare_tensors(const sc_tensor *a, const sc_tensor *b, const options *o) {
    size_t beyond = 0, at = 0, index[SC_MAX_RANK];
    double largest = 0;                              /* |a - b|, and `at` its place */
    printf("%-40s %s", shown(a->name), sc_dtype_name(a->dtype));
    if (a->dtype != b->dtype) printf(" and %s", sc_dtype_name(b->dtype));
    printf(", %s: ", join_sizes(a->shape, a->rank, " x "));
    if (a->rank != b->rank || memcmp(a->shape, b->shape, sizeof a->shape) != 0) {
        printf("the other is %s\n", join_sizes(b->shape, b->rank, " x "));
        return 1;
    }
    if (a->dtype == b->dtype && memcmp(a->data, b->data, a->bytes) == 0) {
        puts("the same bits");
        return 0;
    }
    for (size_t i = 0; i < a->count; i++) {
        double y, apart = distance_at(a, b, i, &y);
        if (apart == INFINITY || apart > o->atol + o->rtol * fabs(y)) beyond++;
        if (apart > largest) at = i;
        largest = fmax(largest, apart);
    }
    if (largest == 0) {
        puts("equal, in other bits");                    /* as 0 and -0, or F16 and F32 */
        return 0;
    }
    for (int d = a->rank - 1; d >= 0; d--) {             /* the place of the largest */
        index[d] = at % a->shape[d];
        at /= a->shape[d];
    }
    printf("%zu of %zu beyond the tolerance, |a - b| up to %.9g at [%s]\n", beyond, a->count,
           largest, join_sizes(index, a->rank, ", "));
    return beyond > 0;
}

/* The tensors of the first file, then those that only the second one has. */
static int compare_files(const sc_safetensors *file, const options *o) {
    int differing = 0, lines = 0;        /* tensors */
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < file[k].tensors; i++) {
            const sc_tensor *t = &file[k].tensor[i];
            const sc_tensor *other = sc_tensor_find(&file[!k], t->name);
            if (other && k == 1) continue;               /* compared in the first round */
            if (!other && o->common) continue;
            lines++;
            if (!other) printf("%-40s only in %s\n", shown(t->name), shown(file[k].path));
            if (!other || compare_tensors(t, other, o)) differing++;
        }
    }
    SC_TRY(end_of_output());
    if (o->common && lines == 0)
        return fail("%s: has no tensor in common with %s", file[0].path, file[1].path);
    if (differing == 0) return SC_OK;
    return fail("%s: differs from %s in %d of %d tensors", file[0].path, file[1].path, differing,
                lines);
}

/* Status 1 if the files differ. */
static int command_compare(session *s) {
    sc_safetensors file[2];
    SC_TRY(sc_safetensors_open(&file[0], s->o->operand[0]));
    int status = sc_safetensors_open(&file[1], s->o->operand[1]);
    if (status == SC_OK) status = compare_files(file, s->o);
    sc_safetensors_close(&file[0]);
    sc_safetensors_close(&file[1]);
    return status;
}

/* ============================================================================================
 * 25. The command line
 *
 * Three tables: options, and which commands take them; rules between options; commands. The parser,
 * the checks and the help follow them.
 * ============================================================================================ */
#ifndef SAECLIP_NO_MAIN

/* Commands, one bit each, and sets of commands that take the same options. */
enum {
    INFO = 1, PACK = 2, EXTRACT = 4, TRAIN = 8, ENCODE = 16, EVAL = 32, STATS = 64, TOP = 128,
    MASK = 256, ZEROSHOT = 512, COMPARE = 1024, MERGE = 2048, EXPLAIN = 4096, PLOT = 8192,
    ATLAS = 16384, EVERY = 32767,
    LATENTS = TOP | MASK,                        /* of chosen latents */
    LOOKS = LATENTS | EXPLAIN | ATLAS,           /* show latents on images */
    SAES = ENCODE | EVAL | STATS | LOOKS | ZEROSHOT,     /* take an SAE */
    DATA = TRAIN | ENCODE | EVAL | STATS,        /* need activations alone */
    ACTS = DATA | MASK,                          /* run on saved activations as well */
    PHOTOS = DATA | EXTRACT | LOOKS | ZEROSHOT,  /* run a model on images */
    IMAGES = PHOTOS | PACK,                      /* read images */
    OUTPUT = LOOKS | PACK | EXTRACT | TRAIN | ENCODE | STATS | PLOT | MERGE      /* write files */
};

/* An option's value, and the type of the member of options that it goes to:
 *     FLAG    no value           int, which becomes 1
 *     TEXT    any                const char *
 *     TEXTS   any, several times const char *[], options.sae; only -s
 *     CHOICE  one of some words  const char *
 *     WHOLE   an integer         long, which may have 32 bits
 *     NUMBER  a number           double */
typedef enum { FLAG, TEXT, TEXTS, CHOICE, WHOLE, NUMBER } option_kind;

/* An option has one row, whichever commands take it. A default that is not fixed stands in the
 * help text; the member of options then is NULL, 0 or, where 0 is a value, -1. */
static const struct option_row {
    const char *name;
    const char *value;                           /* its name in the help; the words of a CHOICE */
    option_kind kind;
    size_t place;                                /* of the member in options */
    int commands;                                /* those that take it */
    const char *help;
    const char *fallback;                        /* the default, as it would be typed; or NULL */
    double least, most;                          /* the limits of a number */
} option_table[] = {
#define AT(field) .place = offsetof(options, field)
    /* Files */
    { "-m", "FILE", TEXT, AT(model), PHOTOS,
      "the vision transformer" },
    { "-s", "FILE", TEXTS, AT(sae), SAES,
      "the SAE (eval: may be repeated; zeroshot: x' replaces x)" },
    { "-t", "FILE", TEXT, AT(stats), LOOKS,
      "the SAE's statistics" },
    { "-o", "PATH", TEXT, AT(output), OUTPUT,
      "where to write" },
    { "-l", "J[,J...]", TEXT, AT(latents), LATENTS,
      "latents" },
    { "--acts", "FILE", TEXT, AT(acts), ACTS,
      "saved activations, in place of -m and IMAGES" },
    { "--also", "DATA", TEXT, AT(also), EVAL,
      "a second data set of the same kind" },
    /* Hook point */
    { "--layer", "L", WHOLE, AT(layer), PHOTOS,
      "block, from 1; -1 is the last (default: the SAE's, else -2)", NULL, -100000, 100000 },
    { "--hook", "attn|mlp|resid", CHOICE, AT(origin[SC_HOOK]), PHOTOS,
      "hook point (default: the SAE's, else mlp)" },
    { "--tokens", "all|cls|patches", CHOICE, AT(origin[SC_TOKENS]), EXTRACT,
      "tokens to write (default: all)" },
    { "--dtype", "f32|f16", CHOICE, AT(dtype), EXTRACT,
      "number type", "f32" },
    /* Images and preprocessing */
    { "--size", "S", WHOLE, AT(size), PACK,
      "side of the images in pixels", "224", 1, 16384 },
    { "--square", "N", WHOLE, AT(square), IMAGES,
      "first resize the centre square to N x N", NULL, 0, 16384 },
    { "--crop", "torchvision|hf", CHOICE, AT(origin[SC_CROP]), IMAGES,
      "rounding of the centre crop (default: the SAE's, else torchvision)" },
    { "--limit", "N", WHOLE, AT(limit), IMAGES,
      "only the first N images", NULL, 1, 2e9 },
    { "--skip-bad", NULL, FLAG, AT(skip_bad), IMAGES & ~(TOP | EXPLAIN | ATLAS),
      "name unreadable images and go on" },
    /* What the model file may not say */
    { "--mean", "R,G,B", TEXT, AT(origin[SC_MEAN]), PHOTOS,
      "overrules the model's image_mean" },
    { "--std", "R,G,B", TEXT, AT(origin[SC_STD]), PHOTOS,
      "overrules the model's image_std" },
    { "--gelu", "quick|erf", CHOICE, AT(origin[SC_GELU]), PHOTOS,
      "overrules the model's activation function" },
    { "--eps", "X", TEXT, AT(origin[SC_EPSILON]), PHOTOS,
      "overrules the layer norms' epsilon" },
    { "--heads", "N", TEXT, AT(origin[SC_HEADS]), PHOTOS,
      "overrules the number of heads" },
    /* The SAE and its training */
    { "--arch", "relu|topk", CHOICE, AT(arch), TRAIN | SAES,
      "default: relu, or the file's" },
    { "--k", "K", WHOLE, AT(k), TRAIN | SAES,
      "of TopK (default: 32, or the file's)", NULL, 1, 1e9 },
    { "--expansion", "E", WHOLE, AT(expansion), TRAIN,
      "latents per input", "64", 1, 4095 },      /* x SC_MAX_WIDTH inputs: below 2^32 */
    { "--latents", "N", WHOLE, AT(d_sae), TRAIN,
      "latents", NULL, 1, SC_MAX_LATENTS },
    { "--l1", "X", NUMBER, AT(l1), TRAIN,
      "weight of the L1 loss (ReLU)", "8e-5", 0, 1e9 },
    { "--lr", "X", NUMBER, AT(lr), TRAIN,
      "learning rate", "4e-4", 0, 1e9 },
    { "--warmup", "STEPS", WHOLE, AT(warmup), TRAIN,
      "steps over which the rate rises", "500", 0, 1e9 },
    { "--batch", "IMAGES", WHOLE, AT(batch), TRAIN,
      "images per step", "16", 1, 1e9 },
    { "--epochs", "E", NUMBER, AT(epochs), TRAIN,
      "passes over the data", "1", 0, 1e9 },
    { "--steps", "N", WHOLE, AT(steps), TRAIN,
      "steps (0: the initial SAE)", NULL, 0, 2e9 },
    { "--b-dec", "zeros|mean|geomedian|geomedian-images", CHOICE, AT(b_dec), TRAIN,
      "where the decoder's bias starts", "zeros" },
    { "--b-dec-images", "M", WHOLE, AT(b_dec_images), TRAIN,
      "images for that (default: one step's)", NULL, 1, 1e9 },
    { "--ghost", NULL, FLAG, AT(ghost), TRAIN,
      "ghost gradients for dead latents" },
    { "--dead-window", "STEPS", WHOLE, AT(dead_window), TRAIN,
      "silent steps after which a latent is dead", "64", 0, 1e9 },
    { "--init", "SAE", TEXT, AT(init), TRAIN,
      "start from this SAE" },
    { "--order", "shuffle|sequential", CHOICE, AT(order), TRAIN,
      "of the images", "shuffle" },
    { "--log", "CSV", TEXT, AT(log), TRAIN,
      "one row per step" },
    { "--checkpoint", "FILE", TEXT, AT(checkpoint), TRAIN,
      "state to keep (default: OUT.ckpt)" },
    { "--checkpoint-every", "STEPS", WHOLE, AT(checkpoint_every), TRAIN,
      "how often", "1000", 1, 2e9 },
    { "--resume", NULL, FLAG, AT(resume), TRAIN,
      "go on from the checkpoint" },
    { "--seed", "N", WHOLE, AT(seed), TRAIN,
      "of all random numbers", "42", 0, INT32_MAX },
    /* encode */
    { "--dense", NULL, FLAG, AT(dense), ENCODE,
      "also f as a matrix" },
    { "--reconstruction", NULL, FLAG, AT(reconstruction), ENCODE,
      "also x'" },
    { "--image-means", NULL, FLAG, AT(image_means), ENCODE,
      "also mean activations per image" },
    /* stats */
    { "--top", "K", WHOLE, AT(top), STATS,
      "top images per latent", "16", 1, 4096 },
    { "--top-patches", "P", WHOLE, AT(top_patches), STATS,
      "top patches per latent", "64", 1, 4096 },
    { "--class-counts", NULL, FLAG, AT(class_counts), STATS,
      "also count images per class" },
    { "--threshold", "T", NUMBER, AT(threshold), STATS,
      "count tokens above T instead", NULL, 0, 1e30 },
    { "--shard", "I/N", TEXT, AT(shard), STATS,
      "only part I, from 1, of N, for merge" },
    /* Looking at latents */
    { "--mask", "value|top", CHOICE, AT(mask), LATENTS,
      "where it fires, or its top patches" },
    { "--class", "C", WHOLE, AT(class_index), MASK,
      "the mean mask of a class", NULL, 0, 1e9 },
    { "--patch", "R,C", TEXT, AT(patch), EXPLAIN,
      "only this patch; row and column from 0" },
    { "--max-frequency", "F", NUMBER, AT(max_frequency), EXPLAIN,
      "leave out latents that fire on a larger share of the images", "1", 0, 1 },
    /* Printing */
    { "--common", NULL, FLAG, AT(common), COMPARE,
      "only tensors that both have" },
    { "--rtol", "X", NUMBER, AT(rtol), COMPARE,
      "relative tolerance", "0", 0, 1e30 },
    { "--atol", "X", NUMBER, AT(atol), COMPARE,
      "absolute tolerance", "0", 0, 1e30 },
    { "--format", "text|csv|json", CHOICE, AT(format), EVAL | ZEROSHOT,
      "of the output", "text" },
    /* All commands */
    { "--threads", "N", WHOLE, AT(threads), EVERY,
      "default: all cores", NULL, 1, SC_MAX_THREADS },
    { "--quiet", NULL, FLAG, AT(quiet), EVERY,
      "no progress, no remarks" } };

/* What the command line gives each option, "" to a flag; NULL: it was not given. */
static const char *given[COUNT(option_table) + 1];   /* the last: no option has this name */

/* No option is parsed and then ignored: if one of `options` is given, it excludes or needs the
 * other one, which may have a value. */
enum { EXCLUDES, NEEDS };
static const struct { int commands; const char *options; int kind; const char *other; } rules[] = {
    /* The SAE to start from has its width and its decoder bias. */
    { TRAIN, "--expansion --latents --b-dec", EXCLUDES, "--init" },
    /* Two ways to say how many steps, how many latents, how large images. */
    { TRAIN, "--epochs", EXCLUDES, "--steps" },
    { TRAIN, "--expansion", EXCLUDES, "--latents" },
    { PACK, "--size", EXCLUDES, "--square" },
    /* Saved activations need neither a model nor images. */
    { ACTS, "-m --square --crop --mean --std --gelu --eps --heads --skip-bad", EXCLUDES, "--acts" },
    /* TopK has k in place of the L1 loss. In training ReLU is the default. */
    { TRAIN, "--k", NEEDS, "--arch=topk" },
    { SAES, "--k", EXCLUDES, "--arch=relu" },
    { TRAIN, "--l1", EXCLUDES, "--arch=topk" },
    /* Details of what another option asks for. */
    { TRAIN, "--b-dec-images", NEEDS, "--b-dec" },
    { TRAIN, "--dead-window", NEEDS, "--ghost" },
    { TRAIN, "--checkpoint-every", NEEDS, "--checkpoint" },
    { STATS, "--threshold", NEEDS, "--class-counts" },
    { LATENTS, "--mask=top", NEEDS, "-t" },
    { MASK, "-t", NEEDS, "--mask=top" },
    /* Without an SAE the whole model is run as it is. */
    { ZEROSHOT, "--layer --hook --arch --k", NEEDS, "-s" } };

/* The commands, in the order of the help. */
static const struct command_row {
    int bit;
    const char *name;
    const char *synopsis;                        /* options with one letter in it must be given */
    const char *help, *example;
    int (*run)(session *s);
    int least, most;                             /* how many operands it takes */
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
    { EVAL, "eval", "-s SAE ... DATA [--also DATA]", "metrics of SAEs on data sets, side by side",
      "-s relu.safetensors -s topk.safetensors -m clip.safetensors photos", command_eval, 0, 1 },
    { STATS, "stats", "-s SAE DATA -o STATS", "what every latent does over a data set",
      "-s sae.safetensors -m clip.safetensors photos -o stats.safetensors", command_stats, 0, 1 },
    { MERGE, "merge", "STATS ... -o STATS", "joins the statistics of all shards of a data set",
      "first.safetensors second.safetensors -o both.safetensors", command_merge, 1, MAX_OPERANDS },
    { TOP, "top", "-s SAE -t STATS -m MODEL IMAGES -l J -o DIR", "sheets of latents' top images",
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

/* --- Help --- */

/* saeclip --help */
static int print_help(void) {
    puts("saeclip: sparse autoencoders on a vision transformer's activations\n\n"
         "    saeclip COMMAND [options] [IMAGES or FILE ...]\n");
    for (size_t i = 0; i < COUNT(command_table); i++)
        printf("    %-9s %s\n", command_table[i].name, command_table[i].help);
    puts("\nIMAGES: a folder (or a folder of folders, one per class), a list (.txt), a packed set\n"
         "(.safetensors) or one image. `saeclip COMMAND --help` lists the options of a command.\n"
         "Environment: SAECLIP_ISA=avx512|avx2|neon|scalar; SAECLIP_DECODER, a program from an\n"
         "image in any format to PNM.");
    return end_of_output();
}

/* saeclip COMMAND --help */
static int print_command_help(const struct command_row *command) {
    printf("saeclip %s %s\n\n%s\n\n", command->name, command->synopsis, command->help);
    for (size_t i = 0; i < COUNT(option_table); i++) {
        const struct option_row *row = &option_table[i];
        int rest = 23 - (int)strlen(row->name);      /* of the columns before the help */
        if (!(row->commands & command->bit)) continue;
        printf("    %s %-*s %s", row->name, rest, row->value ? row->value : "", row->help);
        if (row->fallback) printf(" (default %s)", row->fallback);
        puts("");
    }
    printf("\nexample: saeclip %s %s\n", command->name, command->example);
    return end_of_output();
}

/* --- Parsing --- */

/* Checks and stores the value of an option; text: NULL where it is missing. */
static int set_option(options *o, const struct option_row *row, const char *text) {
    void *place = (char *)o + row->place;
    double number = 0;
    if (row->kind != FLAG && (!text || !*text))
        return usage("%s: no value (expected %s)", row->name, row->value);
    if (row->kind == CHOICE && !is_choice(row->value, text))
        return usage("%s: invalid value '%s' (expected one of %s)", row->name, text, row->value);
    if (row->kind == TEXTS && o->saes == SC_MAX_TAPS)
        return usage("%s: given more than %d times", row->name, SC_MAX_TAPS);
    if (row->kind == WHOLE || row->kind == NUMBER)
        SC_TRY(parse_number(text, row->name, row->least, row->most, &number));
    if (row->kind == WHOLE && number != floor(number))
        return usage("%s: invalid value '%s' (expected a whole number)", row->name, text);
    switch (row->kind) {
    case FLAG: *(int *)place = 1; break;
    case TEXT:
    case CHOICE: *(const char **)place = text; break;
    case TEXTS: o->sae[o->saes++] = text; break;
    case WHOLE: *(long *)place = (long)number; break;
    case NUMBER: *(double *)place = number; break;
    }
    return SC_OK;
}

/* The row of an option with a name of `length` bytes, or their number. */
static size_t find_option(const char *name, size_t length) {
    size_t i = 0;
    for (; i < COUNT(option_table); i++) {
        const char *known = option_table[i].name;
        if (strncmp(known, name, length) == 0 && known[length] == '\0') break;
    }
    return i;
}

/* One argument that begins with "-", and its value: "-o FILE", "--lr 1" or "--lr=1". */
static int parse_option(options *o, const struct command_row *command, char **argv, int *at) {
    const char *name = argv[*at], *text = NULL;
    size_t length = strlen(name);
    if (name[1] == '-' && strchr(name, '=')) {   /* the value is part of the argument */
        length = strcspn(name, "=");
        text = name + length + 1;
    }
    size_t i = find_option(name, length);
    const struct option_row *row = &option_table[i];
    int known = i < COUNT(option_table) && (row->commands & command->bit);
    if (!known || (row->kind == FLAG && text))
        return usage("%s: unknown option %s (see saeclip %s --help)", command->name, name,
                     command->name);
    if (given[i] && row->kind != TEXTS) return usage("%s: given twice", row->name);
    if (row->kind != FLAG && !text && argv[*at + 1]) text = argv[++*at];     /* the next one */
    given[i] = text ? text : "";
    return set_option(o, row, text);
}

/* --- Checking --- */

/* Whether an option was given, or has this value: "--mask" or "--mask=top", up to a blank. */
static int was_given(const char *text) {
    size_t length = strcspn(text, " ="), i = find_option(text, length);
    if (!given[i] || text[length] != '=') return given[i] != NULL;
    text += length + 1;
    length = strlen(given[i]);
    return strcspn(text, " ") == length && strncmp(text, given[i], length) == 0;
}

/* Whether a command has the options and operands that it needs, and none that contradict. */
static int check_options(const options *o, const struct command_row *command, int operands) {
    const char *name = command->name;
    /* Options that the synopsis names. */
    for (const char *c = strchr(command->synopsis, '-'); c; c = strchr(c + 1, '-'))
        if (c[2] == ' ' && !was_given(c))
            return usage("%s: %.2s is missing (see saeclip %s --help)", name, c, name);
    /* Rules that are broken if one of their options is given. */
    for (size_t i = 0; i < COUNT(rules); i++) {
        const char *other = rules[i].other;
        if (!(rules[i].commands & command->bit)) continue;
        if (was_given(other) == (rules[i].kind == NEEDS)) continue;
        const char *option = rules[i].options;
        while (*option && !was_given(option)) {
            option += strcspn(option, " ");
            option += strspn(option, " ");
        }
        if (!*option) continue;
        int length = (int)strcspn(option, " ");
        if (rules[i].kind == NEEDS) return usage("%.*s needs %s", length, option, other);
        return usage("%s and %.*s exclude each other", other, length, option);
    }
    /* What no table says. */
    if (o->acts && operands) return usage("--acts and IMAGES exclude each other");
    if (operands < command->least || operands > command->most)
        return usage("%s: %d operands (expected %s)", name, operands, command->synopsis);
    if (o->saes > 1 && command->bit != EVAL) return usage("%s: takes one SAE (-s FILE)", name);
    if (was_given("--layer") && o->layer == 0)
        return usage("--layer: invalid value '0' (expected 1 for the first, -1 for the last)");
    return SC_OK;
}

/* Runs one command of the program. argv ends with NULL. */
static int run_saeclip(int argc, char **argv) {
    const struct command_row *command = NULL;
    options o = { .square = -1, .steps = -1, .threshold = -1, .class_index = -1 };   /* not given */
    session s = { .o = &o };
    int operands = 0;
    /* The command, or what the program does without one. */
    if (argc < 2) return usage("no command (see saeclip --help)");
    if (strcmp(argv[1], "--help") == 0) return print_help();
    if (strcmp(argv[1], "--version") == 0) {
        puts("saeclip " SC_VERSION);
        return end_of_output();
    }
    for (size_t i = 0; i < COUNT(command_table); i++)
        if (strcmp(argv[1], command_table[i].name) == 0) command = &command_table[i];
    if (!command) return usage("unknown command '%s' (see saeclip --help)", argv[1]);
    /* The defaults, then what is given. */
    memset(given, 0, sizeof given);
    for (size_t i = 0; i < COUNT(option_table); i++) {
        const struct option_row *row = &option_table[i];
        if (row->fallback) SC_TRY(set_option(&o, row, row->fallback));
    }
    for (int i = 2; argv[i]; i++) {
        if (strcmp(argv[i], "--help") == 0) return print_command_help(command);
        if (argv[i][0] == '-' && argv[i][1]) SC_TRY(parse_option(&o, command, argv, &i));
        else if (operands++ < MAX_OPERANDS) o.operand[operands - 1] = argv[i];
    }
    SC_TRY(check_options(&o, command, operands));
    /* Nothing is wrong with the command line. */
    quiet = o.quiet;
    SC_TRY(sc_instruction_set(getenv("SAECLIP_ISA")));
    SC_TRY(sc_threads_start((int)o.threads));
    int status = command->run(&s);
    close_session(&s);
    sc_threads_stop();
    return status;
}

int main(int argc, char **argv) {
    signal(SIGXFSZ, SIG_IGN);                    /* a write beyond a limit fails, and says so */
    for (int fd = 0; fd < 3; fd++)               /* a closed stream must not become our next file */
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
    int status = run_saeclip(argc, argv);
    quiet = 0;                                   /* errors are always printed */
    if (status != SC_OK) note("%s", sc_error());
    return status;
}
#endif /* !SAECLIP_NO_MAIN */

#endif /* !SC_ISA */
