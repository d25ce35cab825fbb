/* saeclip: sparse autoencoders on a vision transformer's activations, in one C file.
 *
 * A vision transformer (CLIP ViT-B/16 and its kin) runs on images up to a hook point. A sparse
 * autoencoder (SAE) is trained on the activations of every token there. Then each of its latents is
 * measured and shown: how often it fires, how strongly, on which images, patches and classes. The
 * method is PatchSAE's (Lim et al., ICLR 2025). There are no dependencies. The order of each sum is
 * defined (section 1), so that every machine, compiler and number of threads gives the same bits.
 *
 *  Part I: the method                        line 84: read this; about 1580 lines
 *    1. Numbers                           2. The vision transformer
 *    3. The sparse autoencoder            4. Training
 *    5. Measuring
 *  Part II: the same, fast                   line 1666
 *    6. Errors and memory                 7. Threads
 *    8. Kernels and matrix products       9. The vision transformer, fast
 *   10. Sparse codes                     11. Training steps
 *   12. Counting
 *  Part III: data in and out                 line 3794
 *   13. Options and messages             14. Files
 *   15. Images and data sets             16. Models' files
 *   17. SAEs' files                      18. Activations
 *  Part IV: the program                      line 6861
 *   19. Training runs                    20. Data sets through SAEs
 *   21. Looking                          22. Figures
 *   23. The atlas                        24. Info and compare
 *   25. The command line                 26. The atlas's page
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
#else
#define SC_PRINTF(text, first)
#define SC_INLINE inline
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
static SC_INLINE void softmax_forward(float *row, size_t n, float scale) {
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
    for (size_t i = 0; i < count; i++) {
        if (kind == QUICK_GELU) {
            x[i] = quick_gelu(x[i]);
        } else {
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
        ARRAY(a->patch, 3 * m->patch, m->patch),
        ARRAY(a->embedding, m->outputs, 1) };
    a->memory = NULL;
    return new_arrays(&a->memory, arrays, COUNT(arrays));
}

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
        logits[c] = sc_dot_plain(a->embedding, m->text + c * padded(P), P);
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
    SC_TRY(new_vit_arrays(&a, m));
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
    release(&a.memory);
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

/* centred: [T, D], x - b_dec; h: [T, n]. h = W_enc^T (x - b_dec) + b_enc */
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

/* h, f: [n], of one token. f = max(h, 0) */
static void relu_forward(float *f, const float *h, size_t n) {
    for (size_t j = 0; j < n; j++) {
        f[j] = h[j] > 0 ? h[j] : 0;
    }
}

/* threshold: [n], at least 0; h, f: [n], of one token.
 * f = h where h > threshold, else 0 (Rajamanoharan et al., "Jumping ahead", 2024, section 3). SAEs
 * of others have it; it is not trained here. */
static void jumprelu_forward(float *f, const float *h, const float *threshold, size_t n) {
    for (size_t j = 0; j < n; j++) {
        f[j] = h[j] > threshold[j] ? h[j] : 0;
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

/* x, centred: [T, D]; h, f: [T, n]. centred = x - b_dec; h as above; f = relu(h) or TopK of h */
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
    for (size_t t = 0; t < T; t++, f += n, h += n) {
        if (sae->topk) topk_forward(f, h, n, sae->k);
        else if (sae->threshold) jumprelu_forward(f, h, sae->threshold, n);
        else relu_forward(f, h, n);
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

/* points: [count, dim]; median: [dim]; weight: [count], before, part: [dim], scratch.
 * The geometric median is the point with the least sum of distances to all points. That sum's
 * gradient, sum_i (median - point_i) / distance_i, is 0 where the median is the mean of the points
 * weighted by 1 / distance_i. Weiszfeld's iteration (1937) begins at the mean of the points and
 * takes this weighted mean again and again; distances below 1e-6 count as 1e-6. It stops after
 * `steps` steps (100 in training), or earlier when a step changes no bit of the median; steps = 0
 * gives the mean. (PatchSAE: compute_geometric_median() of geom_median, with a tolerance.) */
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
            if (!(apart > 1e-6)) {
                apart = 1e-6;
            }
            weight[i] = 1 / apart;
        }
    }
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

static _Thread_local char error_text[1024];

const char *sc_error(void) { return error_text; }

/* Sets the reason and returns the status. A line that is too long, because of a path, loses its
 * middle. */
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

/* count x size bytes, aligned to a cache line; NULL and a reason on failure. Not zeroed, so that
 * pages that are never written take no memory. At least 1 byte is requested, so that NULL always
 * means failure. Freed with free(). */
static void *reserve_array(size_t count, size_t size) {
    void *memory = NULL;
    int addressable = size == 0 || count <= (SIZE_MAX - 64) / size;
    size_t bytes = count * size;
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

/* A new string; NULL and a reason on failure. */
static char *join_text(const char *head, const char *tail) {
    char *joined = new_array(strlen(head) + strlen(tail) + 1, 1);
    if (!joined) return NULL;
    return strcat(strcpy(joined, head), tail);
}

static char *copy_string(const char *text) { return join_text(text, ""); }

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

/* The index of the first value that is not finite, or count. The first loop looks at 64 values at a
 * time, in vectors: an exponent of all ones carries into bit 31. */
static size_t first_not_finite(const float *values, size_t count) {
    size_t i = 0;
    for (uint32_t carry = 0; i + 64 <= count; i += 64) {
        for (size_t k = i; k < i + 64; k++)
            carry |= (bits_of_float(values[k]) & 0x7f800000) + 0x800000;
        if (carry >> 31) break;
    }
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
    size_t tasks, round;             /* round: the number of the parallel_for call, or STOP */
    int busy;                        /* threads that have not finished this round */
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

/* A thread waits for a round, helps with its tasks, and waits for the next. */
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

/* Returns SC_OK, or the status and reason of the failed task with the lowest number. */
static int parallel_for(size_t tasks, task_function *work, void *context) {
    pthread_mutex_lock(&pool.lock);
    pool.work = work;
    pool.context = context;
    pool.tasks = tasks;
    pool.status = SC_OK;
    atomic_store(&pool.next, 0);
    pool.busy = 0;
    if (tasks > 1 && pool.workers > 1) {                 /* one task needs no other thread */
        pool.busy = pool.workers - 1;
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

/* threads: 0 or less for one per processor. Either all of them start or none. */
int sc_threads_start(int threads) {
    int error = 0;
    sc_threads_stop();
    if (threads <= 0) threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (threads > SC_MAX_THREADS) threads = SC_MAX_THREADS;
    while (pool.workers < threads && !error) {
        intptr_t number = pool.workers;
        error = pthread_create(&pool.thread[number], NULL, worker_main, (void *)number);
        if (!error) pool.workers++;
    }
    if (!error) return SC_OK;
    int started = pool.workers;
    sc_threads_stop();
    return fail("thread %d of %d cannot be started: %s", started + 1, threads, strerror(error));
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
    MAX_ROWS = 14, MAX_COLUMNS = 32, /* size of the largest tile of any instruction set */
    TILES_AT_ONCE = 8,               /* tiles that use a block of B while it is in the cache */
    COLUMNS_AT_ONCE = 1536,          /* columns whose sums are kept from block to block */
    SHARES = 8                       /* tasks per thread into which a product is divided */
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
    void (*tile)(size_t terms, const float *a, const float *b, float *sum);
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
 * a: [TILE_ROWS][CHAIN_STRIDE]; b: [terms][COLUMNS]; sum: [TILE_ROWS][COLUMNS] */
SC_TARGET static void KERNEL(tile)(size_t terms, const float *a, const float *b, float *sum) {
    SC_V chain[SC_TILE_ROWS][SC_VECTORS];
    SC_UNROLL for (int r = 0; r < SC_TILE_ROWS; r++) {
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++) chain[r][v] = SC_SET(0.0f);
    }
    for (size_t k = 0; k < terms; k++, b += SC_COLUMNS) {
        SC_V column[SC_VECTORS];
        SC_UNROLL for (int v = 0; v < SC_COLUMNS; v += 16)
            SC_PREFETCH((uintptr_t)b + (CHAIN * SC_COLUMNS + v) * sizeof *b);  /* the next block */
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++)
            column[v] = SC_LOAD(b + v * SC_LANES);
        SC_UNROLL for (int r = 0; r < SC_TILE_ROWS; r++) {
            SC_V factor = SC_SET(a[r * CHAIN_STRIDE + k]);
            SC_UNROLL for (int v = 0; v < SC_VECTORS; v++)
                chain[r][v] = SC_FMA(factor, column[v], chain[r][v]);
        }
    }
    SC_UNROLL for (int r = 0; r < SC_TILE_ROWS; r++) {
        SC_UNROLL for (int v = 0; v < SC_VECTORS; v++, sum += SC_LANES)
            SC_STORE(sum, SC_LOAD(sum) + chain[r][v]);
    }
}

/* c = activation(sum + row_bias + bias + residual + 0) for some rows of a tile.
 * sum: [rows][COLUMNS], of which `columns` are used */
SC_TARGET static SC_INLINE void KERNEL(finish_rows)(const float *sum, size_t rows, size_t columns,
                                                    const tile_target *to) {
    for (size_t r = 0; r < rows; r++, sum += SC_COLUMNS) {
        const float *residual = to->residual;
        float row_bias = to->row_bias ? to->row_bias[r] : 0;
        float x[SC_COLUMNS];
        for (size_t j = 0; j < columns; j++) x[j] = sum[j] + row_bias;
        if (to->bias) {
            for (size_t j = 0; j < columns; j++) x[j] += to->bias[j];
        }
        if (to->residual) {
            residual += r * to->c_stride;
            for (size_t j = 0; j < columns; j++) x[j] += residual[j];
        }
        for (size_t j = 0; j < columns; j++) x[j] += 0.0f;
        if (to->activation != NO_ACTIVATION) gelu_forward(x, columns, to->activation);
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

/* Part I's loops, compiled into vectors of this instruction set. */
SC_TARGET static void KERNEL(softmax)(float *row, size_t n, float scale) {
    softmax_forward(row, n, scale);
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
        kernels = set;
        if (!set->contracts() && !kernels_scalar.contracts()) return SC_OK;
        return fail("this build contracts a * b + c (expected the option -ffp-contract=off)");
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
                kernels->tile(terms, copied + r * CHAIN_STRIDE, b_block, sum);
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

/* head_forward(): a classifier's logits, head(norm(class token)); for CLIP with class prompts,
 * whose embeddings are unit rows, the cosines with them. out: [B, classes] */
static int forward_head(forward_pass *pass, float *out) {
    const sc_model *model = pass->model;
    const sc_layer *head = &model->layer[HEAD];
    size_t P = model->outputs;
    tile_target to = { .c = out, .c_stride = P, .bias = head->bias };
    /* with prompts, the product is the projected class token, and goes into a row of wide */
    if (model->text) {
        to.c = pass->wide;
        to.c_stride = pass->wide_stride;
    }
    for (size_t b = 0; b < pass->images; b++) {
        const float *class_token = pass->x + b * model->tokens * model->width;
        norm_row(pass->normed + b * pass->normed_stride, class_token, &model->layer[POST],
                 model->epsilon, model->width);
    }
    SC_TRY(multiply(pass->normed, pass->images, pass->normed_stride, &head->matrix, to));
    if (!model->text) return SC_OK;
    /* the cosines with the prompts, rows of norm 1 */
    for (size_t b = 0; b < pass->images; b++) {
        float *row = pass->wide + b * pass->wide_stride;
        memset(row + P, 0, (padded(P) - P) * sizeof *row);
        unit_row(row, P);
        for (size_t c = 0; c < model->classes; c++)
            out[b * model->classes + c] = kernels->dot(row, model->text + c * padded(P), padded(P));
    }
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
    if (last > model->loaded || !pass)
        return fail("%s: block %zu is not loaded", model->file.path, last);
    pass->model = model;
    pass->images = images;
    pass->rows = images * model->tokens;
    pass->pixels = pixels;
    pass->taps = taps;
    pass->count = count;
    /* the forward pass, up to the last block that is needed */
    SC_TRY(prepare_pass(pass));
    SC_TRY(embed(pass));
    for (size_t number = 1; number <= last; number++) {
        /* a hook point at "attn" of the last block does not need the block's MLP */
        int needs_mlp = number < last || head || is_tapped(pass, last, SC_MLP)
                        || is_tapped(pass, last, SC_RESID);
        SC_TRY(forward_block(pass, number, !needs_mlp));
    }
    return head ? forward_head(pass, head) : SC_OK;
}

/* ============================================================================================
 * 10. Sparse codes
 *
 * Section 3 for a batch of tokens. Instead of a matrix f: [T, n], which would be mostly zeros, it
 * keeps codes: for each latent the tokens on which it fires, and its activations there.
 *
 * The batch is cut into tiles of up to 512 tokens, each the task of one thread. Some rows of
 * W_enc at a time are multiplied with all tokens of the tile, and the products become codes while
 * they are in the cache; then the codes are decoded.
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
    free(sae->threshold);
    free(sae->path);
    free(sae->b_dec_start);
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
    TILE_TOKENS = 512,               /* the most tokens in a tile */
    TILE_STRIDE = TILE_TOKENS + 16,  /* floats between rows of h, no power of two (section 8) */
    DENSE_SHARE = 8                  /* as a matrix if more than 1/8 of the codes are active */
};

/* The codes of a tile. */
typedef struct {
    size_t first, tokens;            /* where the tile begins in the batch, how long it is */
    size_t *start;                   /* [n + 1]: latent j has codes start[j] .. start[j + 1] - 1 */
    uint16_t *token;                 /* [start[n]], within the tile, ascending for each latent */
    float *value;                    /* [start[n]], the activations */
} tile_codes;

/* One worker's memory for a tile. */
typedef struct {
    float *h;                        /* [rows_at_once(), TILE_STRIDE], pre-activations */
    uint32_t index[TILE_TOKENS];     /* from find_above() */
    float limit[TILE_TOKENS];        /* of each token: above it h can be active */
    uint64_t *heap;                  /* [TILE_TOKENS, k], see offer_candidate() */
    float *dense;                    /* [TILE_TOKENS, CHAIN], codes of 256 latents as a matrix */
    packed_matrix weights;           /* [CHAIN, D], the rows of W_dec of 256 latents */
    float *apart;                    /* [stride], x' - x of a token */
} tile_scratch;

/* A batch of T tokens on its way through the SAE. Rows of D numbers are `stride` floats apart. */
typedef struct {
    const sc_sae *sae;
    size_t T;
    int reconstruct;                 /* whether x' is wanted */
    const float *given;              /* [T, D], the caller's, rows given_stride floats apart */
    size_t given_stride;
    float *x;                        /* [T, D], the same, padded with zeros */
    float *centred;                  /* [T, D], x - b_dec */
    packed_matrix columns;           /* [D, T], the same as columns */
    float *output;                   /* [T, D], x'; in training later its gradient */
    double *norm;                    /* [T], ||x|| */
    double *squared_error;           /* [T], ||x' - x||^2 */
    double *sum_f;                   /* [T], sum of f */
    double *active;                  /* [T], how many latents fire */
    tile_codes *tile;                /* [tiles] */
    size_t tiles;
    size_t *start;                   /* [tiles, n + 1], the tiles' start */
    uint16_t *token;                 /* of all tiles, and */
    float *value;                    /* the values: as many as there can be */
    tile_scratch *scratch;           /* [workers] */
    memory_list memory;
} sae_batch;

static void free_batch(sae_batch *batch) {
    free(batch->token);
    free(batch->value);
    release(&batch->memory);
    *batch = (sae_batch){ 0 };
}

/* How many tiles T tokens are cut into: the same number for each thread. */
static size_t tiles_of(size_t T) {
    size_t threads = (size_t)thread_count();
    size_t room = threads * (TILE_TOKENS / kernels->columns);
    return smaller(panels_of(T), threads * parts_of(panels_of(T), room));
}

/* The most codes that a token can have. */
static size_t most_codes(const sc_sae *sae) { return sae->topk ? sae->k : sae->d_sae; }

/* Allocates a batch of up to `room` tokens. The codes' room is not zeroed, so that only as much of
 * it as is used is taken from the system. */
static int new_batch(sae_batch *batch, const sc_sae *sae, size_t room) {
    size_t workers = (size_t)thread_count();
    *batch = (sae_batch){ .sae = sae, .reconstruct = 1, .columns = { .K = sae->d_in } };
    const array_spec arrays[] = {
        ARRAY(batch->x, room, sae->stride),
        ARRAY(batch->centred, room, sae->stride),
        ARRAY(batch->output, room, sae->stride),
        ARRAY(batch->columns.data, panels_of(room) * kernels->columns, sae->d_in),
        ARRAY(batch->norm, room, 1),
        ARRAY(batch->squared_error, room, 1),
        ARRAY(batch->sum_f, room, 1),
        ARRAY(batch->active, room, 1),
        ARRAY(batch->tile, tiles_of(room), 1),
        ARRAY(batch->start, tiles_of(room), sae->d_sae + 1),
        ARRAY(batch->scratch, workers, 1) };
    SC_TRY(new_arrays(&batch->memory, arrays, COUNT(arrays)));
    for (size_t w = 0; w < workers; w++) {
        tile_scratch *s = &batch->scratch[w];
        s->weights = (packed_matrix){ .N = sae->d_in, .panels = panels_of(sae->d_in) };
        const array_spec own[] = {
            ARRAY(s->h, rows_at_once(), TILE_STRIDE),
            ARRAY(s->heap, sae->topk ? sae->k : 0, TILE_TOKENS),
            ARRAY(s->dense, TILE_TOKENS, CHAIN),
            ARRAY(s->weights.data, s->weights.panels * kernels->columns, CHAIN),
            ARRAY(s->apart, sae->stride, 1) };
        SC_TRY(new_arrays(&batch->memory, own, COUNT(own)));
    }
    batch->token = reserve_array(room, most_codes(sae) * sizeof *batch->token);
    batch->value = reserve_array(room, most_codes(sae) * sizeof *batch->value);
    return batch->token && batch->value ? SC_OK : SC_FAILED;
}

/* The panels of batch->columns with a tile's tokens: from the first one up to, but without, the
 * end. Only the last tile may end within a panel. */
static size_t first_panel(const tile_codes *tile) { return tile->first / kernels->columns; }
static size_t end_panel(const tile_codes *tile) { return panels_of(tile->first + tile->tokens); }

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

/* topk_forward(), which takes the latents in order and keeps the k best of each token in a heap: no
 * number in it is larger than its children, those at 2 i + 1 and 2 i + 2. A candidate is the number
 * h 2^32 + (2^32 - 1 - j), with the bits of h, which order as integers since h > 0; so of equal
 * ones the lower latent is the better one. 0: no candidate yet. A new one takes the place of the
 * least, the first. Returns the h of the least then: below it there are no more candidates. */
static float offer_candidate(uint64_t *heap, size_t k, float h, size_t j) {
    uint64_t candidate = (uint64_t)bits_of_float(h) << 32 | (UINT32_MAX - j);
    size_t place = 0;
    for (size_t child = 1; child < k; child = 2 * place + 1) {
        if (child + 1 < k && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= candidate) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = candidate;
    return float_of_bits((uint32_t)(heap[0] >> 32));
}

static size_t candidate_latent(uint64_t candidate) { return UINT32_MAX - (uint32_t)candidate; }

/* The k best of each token become the tile's codes, sorted by latent: count, add up, place.
 * heap: [tokens, k] */
static void select_codes(const sc_sae *sae, tile_codes *tile, const uint64_t *heap) {
    size_t *start = tile->start;
    size_t *next = start + 1;
    size_t offers = tile->tokens * sae->k;
    memset(start, 0, (sae->d_sae + 1) * sizeof *start);
    for (size_t i = 0; i < offers; i++) {
        if (heap[i]) next[candidate_latent(heap[i])]++;
    }
    /* from counts to beginnings: those of latent j at next[j], which end as those of j + 1 */
    for (size_t j = 0, sum = 0; j < sae->d_sae; j++) {
        size_t codes = next[j];
        next[j] = sum;
        sum += codes;
    }
    for (size_t i = 0; i < offers; i++) {
        if (!heap[i]) continue;
        size_t place = next[candidate_latent(heap[i])]++;
        tile->token[place] = (uint16_t)(i / sae->k);
        tile->value[place] = float_of_bits((uint32_t)(heap[i] >> 32));
    }
}

/* The codes of a tile: encode_forward(), with relu_forward() or jumprelu_forward() in order of
 * latents, or topk_forward(). */
static void encode_tile(sae_batch *batch, tile_codes *tile, tile_scratch *s) {
    const sc_sae *sae = batch->sae;
    size_t stride = sae->stride;
    size_t rows = rows_at_once();
    size_t first = first_panel(tile);
    size_t end = end_panel(tile);
    size_t used = 0;
    for (size_t t = tile->first; t < tile->first + tile->tokens; t++) {
        float *x = batch->x + t * stride;
        memcpy(x, batch->given + t * batch->given_stride, sae->d_in * sizeof *x);
        for (size_t d = 0; d < stride; d++)
            batch->centred[t * stride + d] = x[d] - sae->b_dec[d];
    }
    pack_panels(&batch->columns, first, end, batch->centred, 1, stride);
    for (size_t t = 0; t < TILE_TOKENS; t++)
        s->limit[t] = t < tile->tokens ? 0 : INFINITY;
    if (sae->topk) memset(s->heap, 0, tile->tokens * sae->k * sizeof *s->heap);
    for (size_t j = 0; j < sae->d_sae; j++) {
        const float *h = s->h + j % rows * TILE_STRIDE;
        float threshold = sae->threshold ? sae->threshold[j] : 0;
        if (j % rows == 0)
            pre_activations(batch, j, smaller(sae->d_sae - j, rows), first, end, s->h,
                            TILE_STRIDE);
        tile->start[j] = used;
        size_t found = kernels->find_above(h, s->limit, TILE_TOKENS, s->index);
        for (size_t i = 0; i < found; i++) {
            size_t t = s->index[i];
            if (sae->topk) {
                s->limit[t] = offer_candidate(s->heap + t * sae->k, sae->k, h[t], j);
            } else {
                tile->token[used] = (uint16_t)t;
                tile->value[used] = h[t];
                used += h[t] > threshold;    /* otherwise the next one takes this place */
            }
        }
    }
    tile->start[sae->d_sae] = used;
    if (sae->topk) select_codes(sae, tile, s->heap);
}

/* out += f W_dec for latents block .. block + latents - 1, at most 256, so one chain of each sum.
 * f: s->dense; out: [tokens, stride] */
static void decode_dense(const sc_sae *sae, size_t tokens, size_t block, size_t latents, float *out,
                         tile_scratch *s) {
    tile_target to = { .c = out, .c_stride = sae->stride, .residual = out };
    const float *W_dec = sae->W_dec + block * sae->stride;
    s->weights.K = latents;
    pack_panels(&s->weights, 0, s->weights.panels, W_dec, sae->stride, 1);
    product_rows(s->dense, CHAIN, tokens, &s->weights, 0, s->weights.panels, &to);
}

/* x' of a tile: decode_forward(), 256 latents, i.e. one chain, at a time. */
static void decode_tile(const sae_batch *batch, const tile_codes *tile, tile_scratch *s) {
    static const float zero[CHAIN];
    const sc_sae *sae = batch->sae;
    size_t stride = sae->stride;
    float *out = batch->output + tile->first * stride;
    float value[CHAIN];
    memset(out, 0, tile->tokens * stride * sizeof *out);
    for (size_t block = 0; block < sae->d_sae; block += CHAIN) {
        size_t latents = smaller(sae->d_sae - block, CHAIN);
        size_t codes = tile->start[block + latents] - tile->start[block];
        memset(s->dense, 0, tile->tokens * CHAIN * sizeof *s->dense);
        for (size_t i = 0; i < latents; i++) {
            for (size_t c = tile->start[block + i]; c < tile->start[block + i + 1]; c++)
                s->dense[tile->token[c] * CHAIN + i] = tile->value[c];
        }
        if (codes * DENSE_SHARE > tile->tokens * latents) {
            decode_dense(sae, tile->tokens, block, latents, out, s);
            continue;
        }
        /* only rows of W_dec with f > 0 are visited */
        for (size_t t = 0; t < tile->tokens; t++) {
            const float *f = s->dense + t * CHAIN;
            size_t count = kernels->find_above(f, zero, CHAIN, s->index);
            for (size_t i = 0; i < count; i++)
                value[i] = f[s->index[i]];
            kernels->add_chain(value, s->index, count, sae->W_dec + block * stride,
                               out + t * stride, stride);
        }
    }
    for (size_t t = 0; t < tile->tokens; t++, out += stride) {
        for (size_t d = 0; d < sae->d_in; d++)
            out[d] = out[d] + sae->b_dec[d] + 0.0f;
    }
}

/* Encodes and decodes a tile; then the figures of each token that losses and statistics are made
 * of: those of token_errors(), and the terms of activity_sum(). */
static int tile_task(void *context, size_t i) {
    sae_batch *batch = context;
    tile_codes *tile = &batch->tile[i];
    tile_scratch *s = &batch->scratch[worker];
    size_t stride = batch->sae->stride;
    encode_tile(batch, tile, s);
    if (batch->reconstruct) decode_tile(batch, tile, s);
    for (size_t t = tile->first; t < tile->first + tile->tokens; t++) {
        const float *x = batch->x + t * stride;
        const float *output = batch->output + t * stride;
        for (size_t d = 0; d < stride; d++)
            s->apart[d] = output[d] - x[d];
        batch->norm[t] = sqrtf(kernels->dot(x, x, stride));
        batch->squared_error[t] = 0;
        if (batch->reconstruct)
            batch->squared_error[t] = kernels->dot(s->apart, s->apart, stride);
        batch->sum_f[t] = 0;
        batch->active[t] = 0;
    }
    for (size_t c = 0; c < tile->start[batch->sae->d_sae]; c++) {
        size_t t = tile->first + tile->token[c];
        batch->sum_f[t] += tile->value[c];
        batch->active[t]++;
    }
    return SC_OK;
}

/* Encodes and decodes T tokens, from 1 to as many as there is room for, in tiles of about the same
 * length, of whole panels. x: [T, D], rows x_stride floats apart */
static int run_sae(sae_batch *batch, const float *x, size_t x_stride, size_t T) {
    size_t panels = panels_of(T);
    size_t codes = most_codes(batch->sae);
    batch->given = x;
    batch->given_stride = x_stride;
    batch->T = batch->columns.N = T;
    batch->columns.panels = panels;
    batch->tiles = tiles_of(T);
    for (size_t i = 0; i < batch->tiles; i++) {
        size_t first = i * panels / batch->tiles * kernels->columns;
        size_t end = (i + 1) * panels / batch->tiles * kernels->columns;
        batch->tile[i] = (tile_codes){ .first = first,
                                       .tokens = smaller(end, T) - first,
                                       .start = batch->start + i * (batch->sae->d_sae + 1),
                                       .token = batch->token + first * codes,
                                       .value = batch->value + first * codes };
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
    for (size_t i = 0; i < batch.tiles; i++) {
        const tile_codes *tile = &batch.tile[i];
        for (size_t j = 0; j < n; j++) {
            for (size_t c = tile->start[j]; c < tile->start[j + 1]; c++)
                f[(tile->first + tile->token[c]) * n + j] = tile->value[c];
        }
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
    uint32_t token[CHAIN];           /* those on which it fires, */
    float f[CHAIN], dh[CHAIN];       /* and its f and dh there */
    size_t count;                    /* how many they are */
    size_t codes;                    /* of all tokens so far */
    double db_enc;
} latent_gradient;

/* One worker's memory for the gradients of 64 latents. */
typedef struct {
    latent_gradient latent[LATENTS_AT_ONCE];
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
static void ghost_decode(fast_trainer *t, const tile_codes *tile, tile_scratch *s) {
    const sc_sae *sae = t->sae;
    float *out = t->ghost + tile->first * sae->stride;
    memset(out, 0, tile->tokens * sae->stride * sizeof *out);
    for (size_t block = 0; block < sae->d_sae; block += CHAIN) {
        size_t end = smaller(block + CHAIN, sae->d_sae);
        if (count_dead(t->state, block, end) == 0) continue;
        /* s->h has room for some latents; their rows become columns of s->dense */
        for (size_t j = block; j < end; j += rows_at_once()) {
            size_t count = smaller(end - j, rows_at_once());
            float *dense = s->dense + j - block;
            dead_exponentials(t, j, count, first_panel(tile), end_panel(tile), s->h, TILE_STRIDE);
            for (size_t i = 0; i < count; i++) {
                for (size_t k = 0; k < tile->tokens; k++)
                    dense[k * CHAIN + i] = s->h[i * TILE_STRIDE + k];
            }
        }
        decode_dense(sae, tile->tokens, block, end - block, out, s);
    }
}

/* mse_backward() and ghost_token() for a tile: x' becomes dx', and g becomes dg. */
static int gradient_task(void *context, size_t task) {
    fast_trainer *t = context;
    const sc_sae *sae = t->sae;
    sae_batch *batch = &t->batch;
    const tile_codes *tile = &batch->tile[task];
    tile_scratch *s = &batch->scratch[worker];
    size_t stride = sae->stride;
    double scale = 1.0 / ((double)batch->T * (double)sae->d_in);
    if (t->ghosts) ghost_decode(t, tile, s);
    for (size_t i = tile->first; i < tile->first + tile->tokens; i++) {
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

/* ghost_backward() of latent j on 256 tokens or fewer: adds to dW_ghost, and to dh of every token,
 * so that l lists all of them. e: [256]; dW_ghost: [stride] */
static void ghost_gradients(const fast_trainer *t, size_t j, size_t block, const float *e,
                            float *dW_ghost, latent_gradient *l) {
    size_t stride = t->sae->stride;
    size_t tokens = smaller(t->batch.T - block, CHAIN);
    size_t listed = l->count;
    float *de = l->f;                                    /* f is not needed any more */
    /* from the end, so that nothing is overwritten before it is moved */
    for (size_t k = tokens; k-- > 0;) {
        float dh = 0;
        if (listed > 0 && l->token[listed - 1] == block + k) dh = l->dh[--listed];
        l->dh[k] = dh;
        l->token[k] = (uint32_t)(block + k);
    }
    kernels->dots(t->sae->W_dec + j * stride, t->ghost, stride, l->token, tokens, de);
    kernels->add_chain(e, l->token, tokens, t->ghost, dW_ghost, stride);
    for (size_t k = 0; k < tokens; k++)
        l->dh[k] += e[k] * de[k];
    l->count = tokens;
}

/* decode_backward() and l1_backward() of latent j on 256 tokens. tile: the first one with some of
 * them; dW_dec: [stride], added to */
static void decoder_gradients(const fast_trainer *t, size_t j, size_t block,
                              const tile_codes *tile, float *dW_dec, latent_gradient *l) {
    const sae_batch *batch = &t->batch;
    const tile_codes *end = batch->tile + batch->tiles;
    size_t stride = t->sae->stride;
    /* the codes: a tile may begin before the 256 tokens or end after them */
    l->count = 0;
    for (; tile < end && tile->first < block + CHAIN; tile++) {
        for (size_t c = tile->start[j]; c < tile->start[j + 1]; c++) {
            size_t token = tile->first + tile->token[c];
            if (token < block || token >= block + CHAIN) continue;
            l->token[l->count] = (uint32_t)token;
            l->f[l->count++] = tile->value[c];
        }
    }
    if (l->count == 0) return;
    /* df = W_dec . dx', and dh = df where f > 0; dW_dec += f dx', one chain */
    l->codes += l->count;
    kernels->dots(t->sae->W_dec + j * stride, batch->output, stride, l->token, l->count, l->dh);
    for (size_t c = 0; c < l->count; c++)
        l->dh[c] += t->l1;
    kernels->add_chain(l->f, l->token, l->count, batch->output, dW_dec, stride);
}

/* The gradients of latents first .. first + count - 1, in s. For all of them 256 tokens at a time,
 * one chain of each sum: in a near cache these serve all the latents. */
static void find_gradients(const fast_trainer *t, size_t first, size_t count, update_scratch *s) {
    const sae_batch *batch = &t->batch;
    size_t stride = t->sae->stride;
    const tile_codes *tile = batch->tile;
    int ghosts = t->ghosts && count_dead(t->state, first, first + count) > 0;
    /* all sums begin at 0 */
    for (size_t i = 0; i < count; i++) {
        s->latent[i].codes = 0;
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
        while (tile->first + tile->tokens <= block) tile++;
        for (size_t i = 0; i < count; i++) {
            decoder_gradients(t, first + i, block, tile, s->dW_dec + i * stride, &s->latent[i]);
            if (ghosts && is_dead(t->state, first + i))
                ghost_gradients(t, first + i, block, s->e + i * batch->T + block,
                                s->dW_ghost + i * stride, &s->latent[i]);
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
        if (s->latent[i].codes > 0) state->silent[j] = 0;
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
        for (size_t k = 0; k < s->batch->tiles; k++) {
            const tile_codes *tile = &s->batch->tile[k];
            for (size_t c = tile->start[j]; c < tile->start[j + 1]; c++) {
                float f = tile->value[c];
                size_t i = (tile->first + tile->token[c]) / s->T;
                size_t token = (tile->first + tile->token[c]) % s->T;
                const sc_top patch = { f, (int64_t)s->image[i], (int64_t)token };
                sum[i] += f;
                l->tokens++;
                exact_add_float(&l->activations, f);
                s->histogram[worker][histogram_bin(f)]++;
                /* compared as float32, as PyTorch does */
                if (s->threshold >= 0 && f > (float)s->threshold) count_class(s, j, s->label[i]);
                if (token >= s->first_patch) keep_largest(s->patch + j * s->P, s->P, patch);
            }
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

/* Derives the rest from the counts and joins the workers' histograms. Returns the number of
 * latents whose mean is below 2^-64, the unit of exact sums, so that it is 0 although they fire. */
static size_t derive_statistics(statistics *s) {
    size_t lost = 0;
    for (size_t j = 0; j < s->n; j++) {
        latent_record *l = &s->latent[j];
        l->sparsity = s->images ? (float)((double)l->images / (double)s->images) : 0;
        l->mean = (float)mean_activation(l);
        l->entropy = (float)top_entropy(s->top + j * s->K, s->K);
        l->sum = exact_value(l->activations);
        lost += l->tokens > 0 && (l->sum == 0 || (l->images > 0 && l->mean == 0));
    }
    for (int w = 1; w < thread_count(); w++) {
        for (size_t b = 0; b < HISTOGRAM_BINS; b++) {
            s->histogram[0][b] += s->histogram[w][b];
            s->histogram[w][b] = 0;
        }
    }
    return lost;
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

enum { MAX_OPERANDS = 1024, MAX_OPTIONS = 128 };    /* MAX_OPERANDS: also the most shards */

/* What the command line says. Texts are NULL and numbers 0 where they are not given, unless the
 * option has a default (see the table of options in section 25). */
typedef struct {
    const char *output, *model, *acts, *stats, *also, *latents, *format, *dtype, *tokens, *hook;
    const char *crop, *order, *log, *checkpoint, *init, *b_dec, *arch, *mask, *patch, *shard;
    const char *operand[MAX_OPERANDS + 1];   /* IMAGES or files; NULL ends them */
    sc_model_options settings;
    const char *sae[SC_MAX_TAPS];
    size_t saes;
    long layer, threads, size, square, limit, k, expansion, d_sae, batch, steps, warmup;
    long b_dec_images, dead_window, checkpoint_every, top, top_patches, class_index;
    double l1, lr, epochs, threshold, max_frequency, rtol, atol, seed;
    int quiet, skip_bad, ghost, resume, class_counts, dense, reconstruction, image_means, common;
    int tensors;
    unsigned char given[MAX_OPTIONS];        /* [i]: whether row i of the table was given */
} options;

static int quiet, line_open;         /* line_open: a line of progress stands on the terminal */

/* The length of the UTF-8 character at text, whose code point *code becomes; 0 if it is invalid: a
 * stray byte, an overlong form, a surrogate or above U+10FFFF (RFC 3629). */
static size_t utf8_length(const char *text, uint32_t *code) {
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    const unsigned char *byte = (const unsigned char *)text;
    size_t length = 0;
    if (byte[0] < 0x80) length = 1;
    else if (byte[0] >> 5 == 0x06) length = 2;
    else if (byte[0] >> 4 == 0x0e) length = 3;
    else if (byte[0] >> 3 == 0x1e) length = 4;
    *code = byte[0];
    if (length > 1) *code &= 0x7fu >> length;
    for (size_t i = 1; i < length; i++) {
        if (byte[i] >> 6 != 2) return 0;
        *code = *code << 6 | (byte[i] & 0x3f);
    }
    if (*code < least[length] || *code >> 11 == 0x1b || *code > 0x10ffff) return 0;
    return length;
}

/* Whether a terminal may obey a character: ASCII's and Latin-1's control characters, and those that
 * end lines or reverse text. */
static int is_control(uint32_t code) {
    return code < ' ' || (code >= 0x7f && code < 0xa0) || (code >= 0x2028 && code <= 0x202e)
        || (code >= 0x2066 && code <= 0x2069);
}

/* A text that is safe to show: bytes of control characters and of invalid UTF-8 become \xNN. What
 * does not fit is replaced by "...". Every message, table, figure and log prints foreign texts
 * through this; CSV, XML and so on escape only their own marks. out: [room] */
static const char *printable(const char *text, char *out, size_t room) {
    size_t used = 0;
    while (*text) {
        uint32_t code;
        size_t length = utf8_length(text, &code);
        int harmless = length > 0 && !is_control(code);
        if (length == 0) length = 1;
        if (used + 4 * length + sizeof "..." > room) {
            strcpy(out + used, "...");
            return out;
        }
        for (; length > 0; length--, text++)
            used += (size_t)sprintf(out + used, harmless ? "%c" : "\\x%02x", (unsigned char)*text);
    }
    out[used] = '\0';
    return out;
}

enum { TEXT_ROOM = 600 };            /* bytes of a text that is shown */

/* One of 8 buffers in turn, since a line may show several texts. For the main thread only. */
static char *text_room(void) {
    static char room[8][TEXT_ROOM];
    static unsigned next;
    return room[next++ % 8];
}

static const char *shown(const char *text) { return printable(text, text_room(), TEXT_ROOM); }

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
 * first call only takes the time, and a run shorter than that shows nothing. done, total: steps or
 * images; images: how many were done; words: printed at the end of the line */
static void show_progress(const char *what, uint64_t done, uint64_t total, uint64_t images,
                          const char *words) {
    static double first, last;
    static uint64_t begin, begin_images;
    double now = seconds_now(), passed = now - first, pause = 20;
    int terminal = isatty(STDERR_FILENO), ends = done == total;
    if (terminal) pause = 0.2;
    if (first == 0 || done <= begin) {
        first = last = now;
        begin = done;
        begin_images = images;
        return;
    }
    if (quiet || passed < pause || (!ends && now - last < pause)) return;
    last = now;
    line_open = terminal && !ends;
    fputs(terminal ? "\r\033[K" : "saeclip: ", stderr);
    fprintf(stderr, "%s %ju of %ju, %.1f images/s", what, (uintmax_t)done, (uintmax_t)total,
            (double)(images - begin_images) / passed);
    if (!ends)
        fprintf(stderr, ", %.0f s left",
                passed / (double)(done - begin) * (double)(total - done));
    fputs(words, stderr);
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
    double rgb[3];
    char more;
    int good = sscanf(text, "%lf,%lf,%lf%c", &rgb[0], &rgb[1], &rgb[2], &more) == 3;
    for (int c = 0; c < 3 && good; c++) {
        value[c] = (float)rgb[c];
        good = isfinite(value[c]);
    }
    if (good) return SC_OK;
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
    for (size_t i = 0; i < count * size; i++) out[i ^ swap] = in[i];
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

/* A digest of bytes, against accidents, not attacks. Each step is one-to-one in the word that it
 * takes in, so that a change within one word always shows. Starts as { 0 }. */
typedef struct { uint64_t state, length, word; } digest64;   /* word: the last length % 8 bytes */

/* Multiplies by an odd number (2^64 over the golden ratio); the high bits then mix into the low. */
static uint64_t digest64_step(uint64_t state, uint64_t word) {
    state = (state ^ word) * 0x9e3779b97f4a7c15u;
    return state ^ state >> 32;
}

/* Adds a little-endian number of 1 to 8 bytes. */
static void digest64_take(digest64 *digest, uint64_t number, unsigned bytes) {
    unsigned held = digest->length % 8;
    digest->word |= number << 8 * held;
    digest->length += bytes;
    if (held + bytes < 8) return;
    digest->state = digest64_step(digest->state, digest->word);
    digest->word = held ? number >> (64 - 8 * held) : 0;     /* the bytes that did not fit */
}

static void digest64_number(digest64 *digest, uint64_t n) { digest64_take(digest, n, 8); }

static void digest64_add(digest64 *digest, const void *bytes, size_t count) {
    const unsigned char *byte = bytes;
    for (size_t i = 0; i < count; i++) digest64_take(digest, byte[i], 1);
}

/* The digest of everything added so far; more may follow. */
static uint64_t digest64_value(const digest64 *digest) {
    uint64_t state = digest64_step(digest->state, digest->word);
    return digest64_step(digest64_step(state, digest->length), 0);
}

/* --- JSON (RFC 8259): what safetensors headers and lists of names consist of ---
 *
 * The text is a copy that ends with a NUL, which no rule accepts: no other bound is needed. Strings
 * are decoded in place, which never lengthens them; the closing quote makes room for a NUL. After
 * the first error nothing more is accepted and lists end, so that callers may check at the end. */

typedef struct {
    const char *what;                /* whose JSON this is, for errors */
    char *text;
    size_t at;                       /* what comes next; never a blank */
    int failed;                      /* the status of the first error */
} json;

/* Fails unless a condition is met. */
static void json_expect(json *j, int met, const char *expected) {
    if (met || j->failed) return;
    j->failed = fail("%s: JSON byte %zu: expected %s", j->what, j->at, expected);
}

/* Skips these bytes and the blanks after them. */
static void json_skip(json *j, size_t bytes) {
    j->at += bytes;
    j->at += strspn(j->text + j->at, " \t\n\r");
}

/* Whether c comes next; if so it is skipped. */
static int json_take(json *j, char c) {
    int next = !j->failed && j->text[j->at] == c;
    if (next) json_skip(j, 1);
    return next;
}

/* The value of "\uXXXX" at text; 0, which no string may hold, if it is not there. */
static uint32_t json_unit(const char *text) {
    char digits[5] = "";
    if (strncmp(text, "\\u", 2) != 0 || strspn(text + 2, "0123456789abcdefABCDEF") < 4) return 0;
    memcpy(digits, text + 2, 4);
    return (uint32_t)strtoul(digits, NULL, 16);
}

/* Decodes the escape at text to *to, which moves on. Returns the escape's length, 0 if invalid. */
static size_t json_escape(const char *text, char **to) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    static const unsigned char leads[] = { 0, 0xc0, 0xe0, 0xf0 };
    const char *letter = strchr(letters, text[1]);
    if (text[1] && letter) {
        *(*to)++ = meanings[letter - letters];
        return 2;
    }
    uint32_t point = json_unit(text), low = 0;
    if (point >> 10 == 0x36) low = json_unit(text + 6);  /* of a surrogate pair */
    if (low >> 10 == 0x37) point = 0x10000 + ((point & 0x3ff) << 10 | (low & 0x3ff));
    if (point == 0 || point >> 11 == 0x1b) return 0;     /* or half a pair */
    int more = (point >= 0x80) + (point >= 0x800) + (point >= 0x10000);
    *(*to)++ = (char)(leads[more] | point >> 6 * more);  /* UTF-8: a lead byte, 0 to 3 more */
    for (int i = more - 1; i >= 0; i--)
        *(*to)++ = (char)(0x80 | (point >> 6 * i & 0x3f));
    return more == 3 ? 12 : 6;
}

/* Reads a string and decodes it: `to` follows j->at and never overtakes it. */
static char *json_string(json *j) {
    char *start = j->text + j->at + 1, *to = start;
    json_expect(j, start[-1] == '"', "a string");
    if (!j->failed) j->at++;
    while (!j->failed && j->text[j->at] != '"') {
        const char *from = j->text + j->at;
        uint32_t code;
        size_t length;
        if (*from == '\\') {
            length = json_escape(from, &to);
            json_expect(j, length > 0, "a valid escape");
        } else {
            length = utf8_length(from, &code);
            json_expect(j, length > 0 && code >= ' ', "valid UTF-8 without control bytes");
            memmove(to, from, length);
            to += length;
        }
        if (!j->failed) j->at += length;             /* never beyond the NUL */
    }
    if (json_take(j, '"')) *to = '\0';
    return start;
}

/* Where element `index` of a list in these brackets begins, NULL at the end. Of an object this is
 * the key, and the value comes next. */
static char *json_next(json *j, size_t index, const char *brackets) {
    const int object = *brackets == '{';
    const char *begin = object ? "'{'" : "'['", *more = object ? "',' or '}'" : "',' or ']'";
    if (index == 0) json_expect(j, json_take(j, brackets[0]), begin);
    if (json_take(j, brackets[1])) return NULL;
    if (index > 0) json_expect(j, json_take(j, ','), more);
    char *element = j->text + j->at;
    if (object) {
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
        json_expect(j, whole && errno == 0 && value <= SIZE_MAX,
                    "a whole number that this machine can address");
        json_expect(j, n < most, "no more numbers");
        if (n < most) sizes[n] = (size_t)value;
        json_skip(j, digits);
    }
    return n;
}

/* Called with a scalar's key, e.g. "a.b" for the 1 in {"a": {"b": 1}}, and its text. */
typedef int scalar_function(void *context, const char *key, const char *text);

/* Passes on every scalar below a value, in order. key: the value's own; a long one is cut */
static int json_value(json *j, const char *key, int depth, scalar_function *take, void *context) {
    char below[256], scalar[64] = "", *text = scalar, *name;
    const char *start = j->text + j->at, *brackets = *start == '{' ? "{}" : "[]";
    json_expect(j, depth < 32, "less nesting");
    if (*start == *brackets) {
        for (size_t i = 0; (name = json_next(j, i, brackets)) != NULL; i++) {
            if (*start == '[') snprintf(below, sizeof below, "%.250s", key);
            else snprintf(below, sizeof below, "%.120s%s%.120s", key, *key ? "." : "", name);
            SC_TRY(json_value(j, below, depth + 1, take, context));
        }
        return j->failed;
    }
    if (*start == '"') {
        text = json_string(j);
    } else {
        size_t length = strcspn(start, ",]} \t\r\n");
        json_expect(j, length > 0 && length < sizeof scalar, "a value");
        if (j->failed) return SC_FAILED;
        memcpy(scalar, start, length);
        json_skip(j, length);
    }
    if (j->failed) return SC_FAILED;
    return take(context, key, text);
}

/* The scalars of an object. text: [length + 1], ends with a NUL and is changed; what: for errors */
static int json_scalars(char *text, size_t length, const char *what, scalar_function *take,
                        void *context) {
    json j = { .what = what, .text = text };
    json_skip(&j, 0);
    json_expect(&j, text[j.at] == '{', "'{'");
    if (!j.failed) SC_TRY(json_value(&j, "", 0, take, context));
    json_expect(&j, j.at == length, "nothing after the object");
    return j.failed;
}

/* Reads a JSON array of strings, the form that lists of names have in metadata. *out: the pointers
 * and behind them the strings, in one block that free() releases. */
static int json_string_array(const char *text, const char *what, char ***out, size_t *count) {
    size_t length = strlen(text), most = 1;                  /* most: strings there can be */
    for (const char *c = text; *c; c++) most += *c == ',';
    char **list = new_array(most * sizeof *list + length + 1, 1);
    if (!list) return SC_FAILED;
    json j = { .what = what, .text = memcpy(list + most, text, length + 1) };
    json_skip(&j, 0);
    for (*count = 0; json_next(&j, *count, "[]"); ++*count)
        list[*count] = json_string(&j);
    json_expect(&j, j.at == length, "nothing after the list");
    if (j.failed) free(list);
    else *out = list;
    return j.failed;
}

/* A byte that is not part of valid UTF-8, as files hold it: U+FFFD and its value. */
#define INVALID_BYTE "\xef\xbf\xbd%02x"

/* Adds a name and its end as print_json() writes them: packing keeps a data set's digest. */
static void digest64_name(digest64 *digest, const char *name) {
    char invalid[8];
    uint32_t point;
    for (size_t length; *name; name += length) {
        length = utf8_length(name, &point);
        if (length > 0) {
            digest64_add(digest, name, length);
        } else {
            length = 1;
            snprintf(invalid, sizeof invalid, INVALID_BYTE, (unsigned char)*name);
            digest64_add(digest, invalid, strlen(invalid));
        }
    }
    digest64_add(digest, "", 1);
}

/* Prints text as a JSON string between quotes; slash begins an escape. '<' is escaped too: in a web
 * page it could end the script that holds the string. */
static void print_quoted(FILE *out, const char *text, const char *slash, const char *quote) {
    uint32_t point;
    fputs(quote, out);
    for (size_t length; *text; text += length) {
        length = utf8_length(text, &point);
        if (length == 0) fprintf(out, INVALID_BYTE, (unsigned char)*text);
        else if (is_control(point) || point == '<') fprintf(out, "%su%04x", slash, (unsigned)point);
        else if (point == '\\') fprintf(out, "%s%s", slash, slash);
        else if (point == '"') fprintf(out, "%s%s", slash, quote);
        else fwrite(text, 1, length, out);
        if (length == 0) length = 1;
    }
    fputs(quote, out);
}

static void print_json(FILE *out, const char *text) { print_quoted(out, text, "\\", "\""); }

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
    size_t bytes = sc_dtype_size(t->dtype), empty = 0;
    for (int d = 0; d < t->rank; d++) {
        size_t n = t->shape[d];
        if (n == 0) n = empty = 1;
        if (bytes > SIZE_MAX / n)
            return fail("%s: tensor '%.100s' is too large for this machine", path, t->name);
        bytes *= n;
    }
    t->bytes = empty ? 0 : bytes;
    t->count = t->bytes / sc_dtype_size(t->dtype);
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
    for (const char *key; (key = json_next(j, n, "{}")) != NULL; n++) {
        if (strcmp(key, "dtype") == 0) dtype = json_string(j);
        else if (strcmp(key, "shape") == 0) rank = json_sizes(j, t.shape, SC_MAX_RANK);
        else if (strcmp(key, "data_offsets") == 0) offsets = json_sizes(j, at, 2);
        else json_expect(j, 0, members);
    }
    json_expect(j, n == 3 && dtype && rank != SIZE_MAX && offsets == 2, members);
    if (j->failed) return SC_FAILED;
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

/* {"key": "value", ...} */
static int read_metadata(json *j, sc_safetensors *file) {
    json_expect(j, !file->metadata, "__metadata__ only once");
    for (;; file->entries++) {
        SC_TRY(grow(&file->metadata, &file->entry_capacity, file->entries, sizeof(sc_entry)));
        const char *key = json_next(j, file->entries, "{}");
        if (!key) return j->failed;
        file->metadata[file->entries] = (sc_entry){ key, json_string(j) };
    }
}

/* Says what a file is that is not safetensors, if its first bytes tell. */
static int refuse_file(const sc_safetensors *file, uint64_t size, uint64_t most) {
    static const struct { const char *begin, *name; } others[] = {
        { "version https://git-lfs", "a Git LFS pointer; git lfs pull fetches the file itself" },
        { "PK\003\004", "a PyTorch file; weights/convert.py converts it" },
        { "\x80\002", "a PyTorch pickle; weights/convert.py converts it" },
        { "<", "a web page" },
        { "{", "JSON, perhaps an index of shards" } };
    for (size_t i = 0; i < COUNT(others); i++) {
        size_t length = strlen(others[i].begin);
        if (file->size > length && memcmp(file->map, others[i].begin, length) == 0)
            return fail("%s: not a safetensors file but %s", file->path, others[i].name);
    }
    return fail("%s: not a safetensors file: a header of %ju bytes (expected 2 to %ju)", file->path,
                (uintmax_t)size, (uintmax_t)most);
}

/* Reads a copy of the header, in which names and values are decoded and stay. */
static int read_header(sc_safetensors *file) {
    uint64_t size, most = file->size - 8;
    size_t members = 0;
    if (most > MAX_HEADER) most = MAX_HEADER;
    copy_numbers(&size, file->map, 1, 8);
    if (size < 2 || size > most) return refuse_file(file, size, most);
    file->data = file->map + 8 + size;
    file->text = new_array((size_t)size + 1, 1);
    if (!file->text) return SC_FAILED;
    memcpy(file->text, file->map + 8, (size_t)size);
    json j = { .what = file->path, .text = file->text };
    for (const char *key; (key = json_next(&j, members, "{}")) != NULL; members++) {
        if (strcmp(key, "__metadata__") == 0) SC_TRY(read_metadata(&j, file));
        else SC_TRY(read_tensor(&j, file, key));
    }
    json_expect(&j, j.at == size, "only spaces after the header's object");
    return j.failed;
}

/* By where the data begin; an empty tensor comes before one that begins there too. */
static int by_position(const void *a, const void *b) {
    const sc_tensor *left = a, *right = b;
    if (left->data > right->data) return 1;
    if (left->data < right->data) return -1;
    return (left->bytes > right->bytes) - (left->bytes < right->bytes);
}

/* Every byte of the data must belong to exactly one tensor. */
static int check_positions(sc_safetensors *file) {
    const unsigned char *at = file->data, *end = file->map + file->size;
    if (file->tensors) qsort(file->tensor, file->tensors, sizeof *file->tensor, by_position);
    for (size_t i = 0; i < file->tensors; i++) {
        const sc_tensor *t = &file->tensor[i];
        if (t->data != at)
            return fail("%s: tensor '%.100s' begins at byte %td of the data (expected %td)",
                        file->path, t->name, t->data - file->data, at - file->data);
        at += t->bytes;
    }
    if (at == end) return SC_OK;
    return fail("%s: %td bytes of data belong to no tensor (expected none)", file->path, end - at);
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

/* O_NONBLOCK: a named pipe is refused, not waited for. If a file is cut short while it is mapped,
 * the program ends when it reads there. */
static int map_file(sc_safetensors *file) {
    struct stat about;
    void *map = MAP_FAILED;
    int fd = open(file->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return fail("%s: cannot be opened: %s", file->path, strerror(errno));
    int fits = fstat(fd, &about) == 0 && S_ISREG(about.st_mode) && about.st_size >= 8
            && (uintmax_t)about.st_size <= SIZE_MAX;
    if (fits) map = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int error = errno;
    close(fd);
    if (!fits)
        return fail("%s: not a regular file of 8 bytes or more (expected a safetensors file)",
                    file->path);
    if (map == MAP_FAILED) return fail("%s: cannot be mapped: %s", file->path, strerror(error));
    file->map = map;
    file->size = (size_t)about.st_size;
    return SC_OK;
}

static int read_safetensors(sc_safetensors *file) {
    SC_TRY(map_file(file));
    SC_TRY(read_header(file));
    SC_TRY(check_positions(file));
    SC_TRY(sort_by_name(file->path, file->tensor, file->tensors, sizeof *file->tensor));
    return sort_by_name(file->path, file->metadata, file->entries, sizeof *file->metadata);
}

int sc_safetensors_open(sc_safetensors *file, const char *path) {
    *file = (sc_safetensors){ .path = copy_string(path) };
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

/* Element i of a tensor, also infinities and NaN; of I64, I32 and U8 *whole is the exact value. */
static double number_at(const sc_tensor *t, size_t i, int64_t *whole) {
    union {
        uint8_t byte;
        uint16_t half;
        int32_t narrow;
        int64_t whole;
        float single;
        double wide;
    } n;
    size_t size = sc_dtype_size(t->dtype);
    copy_numbers(&n, t->data + i * size, 1, size);
    switch (t->dtype) {
    case SC_F32: return (double)n.single;
    case SC_F16: return (double)float_of_half(n.half);
    case SC_BF16: return (double)float_of_bits((uint32_t)n.half << 16);  /* F32's upper half */
    case SC_F64: return n.wide;
    case SC_I64: *whole = n.whole; break;
    case SC_I32: *whole = n.narrow; break;
    default: *whole = n.byte;
    }
    return (double)*whole;
}

/* Whether a tensor is of floats (else of integers) and has values first .. first + count - 1. */
static int check_range(const sc_safetensors *file, const sc_tensor *t, size_t first, size_t count,
                       int floats) {
    const char *expected = floats ? "F32, F16, BF16 or F64" : "I64, I32 or U8";
    if (t->dtype > SC_U8 || floats != (t->dtype <= SC_F64))
        return fail("%s: tensor '%.100s' is %s (expected %s)", file->path, t->name,
                    sc_dtype_name(t->dtype), expected);
    if (first <= t->count && count <= t->count - first) return SC_OK;
    return fail("%s: tensor '%.100s' has %zu values (expected %zu from number %zu on)", file->path,
                t->name, t->count, count, first);
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
 * A device or a pipe (/dev/full) is written directly. */

/* error: an errno */
static int write_failed(const char *path, int error) {
    const char *reason = strerror(error);
    if (error == EBUSY) reason = "another process is writing it";
    if (error == ESPIPE) reason = "not a regular file";
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

static int output_write(sc_output *out, const void *bytes, size_t count) {
    if (fwrite(bytes, 1, count, out->file) == count) return SC_OK;
    return write_failed(out->path, errno);
}

/* Ends the output and removes what was written, unless it was committed. */
static void output_discard(sc_output *out) {
    if (out->file && out->temporary) unlink(out->temporary);
    if (out->file) fclose(out->file);
    free(out->path);
    free(out->temporary);
    memset(out, 0, sizeof *out);
}

/* Locks NAME.tmp; sets errno to EBUSY if another process has it. That process may have renamed the
 * file before we got the lock: then the file that we opened is its finished output. */
static int lock_temporary(int fd, const char *name) {
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct stat locked, named;
    int ours = fcntl(fd, F_SETLK, &lock) == 0 && fstat(fd, &locked) == 0
            && stat(name, &named) == 0 && locked.st_ino == named.st_ino;
    if (!ours) errno = EBUSY;
    return ours;
}

/* O_NOFOLLOW: a link under the name NAME.tmp is refused. */
static int output_open(sc_output *out, const char *path) {
    struct stat there;
    int direct = stat(path, &there) == 0 && !S_ISREG(there.st_mode);
    int flags = O_WRONLY, fd = -1;
    int ready = direct;                      /* whether the file may be written */
    *out = (sc_output){ .path = copy_string(path) };
    const char *name = out->path;
    if (name && !direct) {
        name = out->temporary = join_text(path, ".tmp");
        flags = O_RDWR | O_CREAT | O_NOFOLLOW;
    }
    if (name) fd = open(name, flags | O_CLOEXEC, 0666);
    int ours = fd >= 0 && !direct && lock_temporary(fd, name);   /* else it is left alone */
    if (ours) ready = ftruncate(fd, 0) == 0;
    if (fd >= 0 && ready) out->file = fdopen(fd, "w");
    if (out->file) return SC_OK;
    if (name) write_failed(path, errno);
    if (ours) unlink(name);
    if (fd >= 0) close(fd);
    output_discard(out);
    return SC_FAILED;
}

/* NAME.tmp becomes NAME. The file that it replaces stays as out->previous, if that is set; with a
 * link, NAME is never missing. */
static int rename_output(sc_output *out) {
    if (fsync(fileno(out->file)) != 0) return write_failed(out->path, errno);
    if (out->previous && access(out->path, F_OK) == 0) {
        unlink(out->previous);
        if (link(out->path, out->previous) != 0 && rename(out->path, out->previous) != 0)
            return fail("%s: cannot be kept as %s: %s", out->path, out->previous, strerror(errno));
    }
    if (rename(out->temporary, out->path) != 0) return write_failed(out->path, errno);
    free(out->temporary);
    out->temporary = NULL;                           /* nothing is left to remove */
    return SC_OK;
}

/* Ends the output in either case: the whole file stands under its name, or nothing changes. */
static int output_commit(sc_output *out) {
    int status = flush_output(out->file, out->path);
    if (status == SC_OK && out->temporary) status = rename_output(out);
    output_discard(out);
    return status;
}

/* --- Writing safetensors ---
 *
 * The data are written as they come, after a gap. Two parts of the header, metadata and tensors,
 * grow in memory and fill the gap at the end; blanks pad it. Each entry begins with a comma. */

/* header_room: bytes to leave for the header; no file may have a header above MAX_HEADER */
int sc_writer_open(sc_writer *w, const char *path, size_t header_room) {
    const size_t least = 1000, most = MAX_HEADER - 64;
    memset(w, 0, sizeof *w);
    SC_TRY(output_open(&w->out, path));
    if (header_room < least) header_room = least;
    if (header_room > most) header_room = most;
    w->data = (8 + header_room + 63) / 64 * 64;              /* aligned to 64 bytes */
    w->metadata = open_memstream(&w->text[0], &w->length[0]);
    if (w->metadata) w->tensors = open_memstream(&w->text[1], &w->length[1]);
    if (w->tensors && fseeko(w->out.file, (off_t)w->data, SEEK_SET) == 0) return SC_OK;
    write_failed(path, errno);
    sc_writer_discard(w);
    return SC_FAILED;
}

void sc_writer_discard(sc_writer *w) {
    output_discard(&w->out);
    if (w->metadata) fclose(w->metadata);
    if (w->tensors) fclose(w->tensors);
    free(w->text[0]);
    free(w->text[1]);
    free(w->name);
    memset(w, 0, sizeof *w);
}

/* At any time before the end; the order is kept. Lack of memory is reported at the end. */
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

/* A list of names as metadata: a JSON array in a JSON string, so that names are escaped twice. */
static int write_name_list(sc_writer *w, const char *key, char **name, size_t count) {
    fprintf(w->metadata, ",\"%s\":\"[", key);
    for (size_t i = 0; i < count; i++) {
        if (i > 0) putc(',', w->metadata);
        print_quoted(w->metadata, name[i], "\\\\", "\\\"");
    }
    fputs("]\"", w->metadata);
    return SC_OK;
}

/* The most bytes of a header that a list of names can take: 7 for a control character. */
static size_t names_room(char **name, size_t count, size_t more) {
    size_t room = 0;
    if (!name) return 0;
    for (size_t i = 0; i < count; i++) room += 7 * strlen(name[i]) + more;
    return room;
}

/* Ends the tensor being written, which must be complete, with its entry in the header. */
static int end_tensor(sc_writer *w) {
    sc_tensor *t = &w->tensor;
    if (!w->name) return SC_OK;
    if (w->rows_open) t->shape[0] = w->values / t->count;    /* count is that of one row so far */
    w->rows_open = 0;
    SC_TRY(measure_tensor(t, w->out.path));
    if (w->values != t->count)
        return fail("%s: tensor '%.100s' got %zu values (expected %zu from its shape)", w->out.path,
                    t->name, w->values, t->count);
    putc(',', w->tensors);
    print_json(w->tensors, w->name);
    fprintf(w->tensors, ":{\"dtype\":\"%s\",\"shape\":[", sc_dtype_name(t->dtype));
    for (int d = 0; d < t->rank; d++)
        fprintf(w->tensors, "%s%zu", d ? "," : "", t->shape[d]);
    fprintf(w->tensors, "],\"data_offsets\":[%zu,%zu]}", w->end, w->end + t->bytes);
    w->end += t->bytes;
    free(w->name);
    w->name = NULL;
    return SC_OK;
}

/* Begins the next tensor; shape[0] may be SC_ROWS. */
int sc_writer_tensor(sc_writer *w, const char *name, sc_dtype dtype, int rank,
                     const size_t *shape) {
    sc_tensor t = { .name = name, .dtype = dtype };
    SC_TRY(end_tensor(w));
    for (; t.rank < rank && t.rank < SC_MAX_RANK; t.rank++)
        t.shape[t.rank] = shape[t.rank];
    w->rows_open = rank > 0 && shape[0] == SC_ROWS;
    if (w->rows_open) t.shape[0] = 1;
    SC_TRY(measure_tensor(&t, w->out.path));
    if (t.rank != rank || (w->rows_open && t.count == 0) || strcmp(name, "__metadata__") == 0)
        return fail("%s: a tensor '%.100s' of this shape is not possible", w->out.path, name);
    t.name = w->name = copy_string(name);
    if (!w->name) return SC_FAILED;
    w->tensor = t;
    w->values = 0;
    return SC_OK;
}

/* Stores values as little-endian numbers of a dtype. Returns the index of the first value that the
 * dtype cannot hold, or count. values: of the dtype, but float for F16 and int64_t for I32 */
static size_t store_numbers(unsigned char *to, sc_dtype dtype, const void *values, size_t count) {
    const float *f = values;
    const double *d = values;
    const int64_t *n = values;
    size_t i = 0;
    if (dtype == SC_F16) {
        for (; i < count && fabsf(f[i]) < 65520; i++) {
            uint16_t half = half_of_float(f[i]);
            copy_numbers(to + 2 * i, &half, 1, 2);
        }
    } else if (dtype == SC_I32) {
        for (; i < count && n[i] >= INT32_MIN && n[i] <= INT32_MAX; i++) {
            int32_t narrow = (int32_t)n[i];
            copy_numbers(to + 4 * i, &narrow, 1, 4);
        }
    } else {
        copy_numbers(to, values, count, sc_dtype_size(dtype));
        if (dtype == SC_F32) return first_not_finite(f, count);
        while (i < count && (dtype != SC_F64 || isfinite(d[i]))) i++;
    }
    return i;
}

/* kind: the type of the values in memory, F32 (also for F16), F64, I64 (also for I32) or U8. Values
 * that the tensor's dtype cannot hold, infinities and NaN are refused. */
int sc_writer_values(sc_writer *w, const void *values, size_t count, sc_dtype kind) {
    enum { BLOCK = 4096 };
    unsigned char bytes[BLOCK * 8];
    sc_dtype dtype = w->tensor.dtype, expected = dtype;
    if (dtype == SC_F16) expected = SC_F32;
    if (dtype == SC_I32) expected = SC_I64;
    if (!w->name || kind != expected)
        return fail("%s: %s values without a tensor of theirs", w->out.path, sc_dtype_name(kind));
    for (size_t at = 0, n; at < count; at += n) {
        n = count - at;
        if (n > BLOCK) n = BLOCK;
        const char *from = (const char *)values + at * sc_dtype_size(kind);
        size_t held = store_numbers(bytes, dtype, from, n);
        if (held < n)
            return fail("%s: tensor '%.100s', element %zu cannot be held by %s", w->out.path,
                        w->name, w->values + held, sc_dtype_name(dtype));
        SC_TRY(output_write(&w->out, bytes, n * sc_dtype_size(dtype)));
        w->values += n;
    }
    return SC_OK;
}

/* Writes the header into its gap. Errors of the file itself show when the output is committed. */
static int write_header(sc_writer *w) {
    FILE *f = w->out.file;
    const size_t size = w->data - 8, braces = strlen("{\"__metadata__\":{}}");
    uint64_t number = size, bytes;
    int used;                                /* bytes of the header before the blanks */
    SC_TRY(end_tensor(w));
    SC_TRY(flush_output(w->metadata, w->out.path));
    SC_TRY(flush_output(w->tensors, w->out.path));
    if (braces + w->length[0] + w->length[1] > size)
        return fail("%s: the header needs more than %zu bytes: too many or too long names",
                    w->out.path, size);
    if (fseeko(f, 0, SEEK_SET) != 0) return write_failed(w->out.path, errno);
    copy_numbers(&bytes, &number, 1, 8);
    fwrite(&bytes, 8, 1, f);
    const char *metadata = w->text[0], *tensors = w->text[1];
    if (*metadata) used = fprintf(f, "{\"__metadata__\":{%s}%s}", metadata + 1, tensors);
    else used = fprintf(f, "{%s}", tensors + (*tensors == ','));
    fprintf(f, "%*s", (int)size - used, "");
    return SC_OK;
}

/* Ends the writer in either case: the whole file stands under its name, or nothing changes. */
int sc_writer_finish(sc_writer *w) {
    int status = write_header(w);
    if (status == SC_OK) status = output_commit(&w->out);
    sc_writer_discard(w);
    return status;
}

/* Writes a whole safetensors file by `write`, or nothing. */
static int save_tensors(const char *path, size_t header_room,
                        int (*write)(sc_writer *w, void *context), void *context) {
    sc_writer w;
    SC_TRY(sc_writer_open(&w, path, header_room));
    int status = write(&w, context);
    if (status == SC_OK) return sc_writer_finish(&w);
    sc_writer_discard(&w);
    return status;
}

/* ============================================================================================
 * 15. Images and data sets
 *
 * From a file's bytes to the pixels that a model sees, in the order of the data: PNM images, other
 * formats through a decoder program, Pillow's resize, data sets.
 * ============================================================================================ */

/* Further results beside SC_OK and SC_FAILED. MACHINE_FAILED: the machine failed, not the image,
 * so --skip-bad does not apply. */
enum { SC_END = -1, MACHINE_FAILED = -2 };
enum { MAX_PATH = 4096, MAX_DEPTH = 16, CHUNK = 1024, WEIGHT_BITS = 22 };
#define MAX_PIXELS ((size_t)1 << 28)           /* of one image: 16,384 x 16,384 */

/* rgb: [height, width, 3], 8 bits, `stride` bytes from row to row */
typedef struct { size_t width, height, stride; const unsigned char *rgb; } picture;

/* A file format, recognised by its first bytes (magic: ? is any byte, _ a blank), and the Debian
 * package that decodes it, or NULL for what is decoded here. */
typedef struct {
    const char *name, *magic, *decoder, *package;
    size_t length;
    const char *option;              /* for ImageMagick */
    int (*check)(const char *path, FILE *file);      /* refuses what decoders treat differently */
} image_format;

/* The source of an image: a file or the pipe of a decoder. rgb: [capacity, CHUNK, 3], its pixels */
typedef struct {
    const char *name;
    const image_format *format;
    FILE *file;
    unsigned char *rgb;
    size_t capacity;
} image_source;

/* --- PNM (netpbm.sourceforge.net/doc/pnm.html); P4 is what pngtopnm makes of one-bit PNGs --- */

typedef struct { int kind, byte; size_t maxval, width, height, channels; } pnm_header;

static int is_blank(int byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

/* The next byte of the header or of text samples. A comment is read as the newline that ends it. */
static int text_byte(FILE *file) {
    int byte = getc(file);
    if (byte != '#') return byte;
    while (byte != '\n' && byte != '\r' && byte != EOF) byte = getc(file);
    return byte;
}

static int source_ended(const image_source *source, const char *before) {
    if (!ferror(source->file)) return fail("%s: the file ends before its %s", source->name, before);
    return fail("%s: cannot be read: %s", source->name, strerror(errno));
}

/* Reads one number and the single blank after it. */
static int pnm_number(const image_source *source, const char *what, size_t largest,
                      size_t *value) {
    int byte = text_byte(source->file);
    while (is_blank(byte)) byte = text_byte(source->file);
    if (byte == EOF) return source_ended(source, what);
    for (*value = 0; byte >= '0' && byte <= '9'; byte = text_byte(source->file)) {
        *value = 10 * *value + (size_t)(byte - '0');
        if (*value > largest)
            return fail("%s: a PNM %s above %zu", source->name, what, largest);
    }
    if (byte == EOF || is_blank(byte)) return SC_OK;
    return fail("%s: byte 0x%02x (expected a PNM %s)", source->name, (unsigned)byte, what);
}

/* Reads sample `index`: text, a bit (1 is black; each row begins with a new byte), or one or two
 * bytes, the high byte first. */
static int pnm_sample(const image_source *source, pnm_header *header, size_t index,
                      size_t *value) {
    if (header->kind <= 3) return pnm_number(source, "last sample", header->maxval, value);
    size_t bit = header->kind == 4 ? index % header->width % 8 : 0;
    int high = header->maxval > 255 ? getc(source->file) : 0;
    if (bit == 0) header->byte = getc(source->file);
    if (header->byte == EOF) return source_ended(source, "last sample");
    *value = (size_t)high << 8 | (size_t)header->byte;
    if (header->kind == 4) *value = ~*value >> (7 - bit) & 1;
    if (*value <= header->maxval) return SC_OK;
    return fail("%s: a sample of %zu above maxval %zu", source->name, *value, header->maxval);
}

/* round-half-even(255 v / maxval). The double quotient is a half only where the exact one is. */
static unsigned char to_8_bits(size_t v, size_t maxval) {
    if (maxval == 255) return (unsigned char)v;
    return (unsigned char)rint(255.0 * (double)v / (double)maxval);
}

/* Reads the pixels into source->rgb, which grows as they arrive, so that a header with a wrong
 * size does not allocate memory. */
static int pnm_pixels(image_source *source, pnm_header *h) {
    size_t pixels = h->width * h->height;
    for (size_t i = 0; i < pixels; i++) {
        if (grow(&source->rgb, &source->capacity, i / CHUNK, 3 * CHUNK) != SC_OK)
            return MACHINE_FAILED;
        unsigned char *rgb = source->rgb + 3 * i;
        if (h->kind == 6 && h->maxval == 255) {          /* the usual case, read in blocks */
            size_t many = smaller(pixels - i, CHUNK);
            if (fread(rgb, 3, many, source->file) != many)
                return source_ended(source, "last sample");
            i += many - 1;
            continue;
        }
        for (size_t c = 0; c < h->channels; c++) {
            size_t v = 0;
            SC_TRY(pnm_sample(source, h, i * h->channels + c, &v));
            rgb[c] = to_8_bits(v, h->maxval);
        }
        if (h->channels == 1) rgb[1] = rgb[2] = rgb[0];
    }
    return SC_OK;
}

/* Reads one image; SC_END where the file is empty. */
static int pnm_read(image_source *source, picture *result) {
    int byte = getc(source->file);
    if (byte == EOF && !ferror(source->file)) return SC_END;
    int kind = byte == 'P' ? getc(source->file) : 0;
    if (byte == EOF || kind == EOF) return source_ended(source, "header");
    if (kind < '2' || kind > '6')
        return fail("%s: not a PNM image (expected P2, P3, P5 or P6)", source->name);
    pnm_header h = { .kind = kind - '0', .maxval = 1, .channels = kind % 3 == 0 ? 3 : 1 };
    SC_TRY(pnm_number(source, "width", MAX_PIXELS, &h.width));
    SC_TRY(pnm_number(source, "height", MAX_PIXELS, &h.height));
    if (kind != '4') SC_TRY(pnm_number(source, "maxval", 65535, &h.maxval));
    if (!h.width || !h.height || !h.maxval || h.height > MAX_PIXELS / h.width)
        return fail("%s: a PNM image of %zu x %zu, maxval %zu (expected at least 1 of each and at "
                    "most %zu pixels)", source->name, h.width, h.height, h.maxval, MAX_PIXELS);
    SC_TRY(pnm_pixels(source, &h));
    *result = (picture){ h.width, h.height, 3 * h.width, source->rgb };
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
    *c = (child_process){ .errors = tmpfile() };
    if (!c->errors) return errno;
    pthread_mutex_lock(&lock);
    int error = pipe(end) != 0 ? errno : 0;
    if (!error) {
        fcntl(end[0], F_SETFD, FD_CLOEXEC);
        fcntl(end[1], F_SETFD, FD_CLOEXEC);
        c->output = fdopen(end[0], "r");
        posix_spawnattr_init(&attributes);
        posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
        posix_spawn_file_actions_init(&files);
        error = posix_spawn_file_actions_adddup2(&files, input, 0);
        if (!error) error = posix_spawn_file_actions_adddup2(&files, end[1], 1);
        if (!error) error = posix_spawn_file_actions_adddup2(&files, fileno(c->errors), 2);
        if (!error && !c->output) error = ENOMEM;
        if (!error)
            error = posix_spawnp(&c->pid, *argument, &files, &attributes, argument, environ);
        posix_spawn_file_actions_destroy(&files);
        posix_spawnattr_destroy(&attributes);
        close(end[1]);
    }
    pthread_mutex_unlock(&lock);
    if (!error) return 0;
    if (c->output) fclose(c->output);
    else if (end[0] >= 0) close(end[0]);
    fclose(c->errors);
    return error;
}

/* Reads the rest of a program's output and waits for its end; returns its wait status. words:
 * [room], the first line of its messages; for a verbose program (wanted not NULL) the line that
 * contains `wanted`, else the last line. */
static int end_child(child_process *c, const char *wanted, char *words, size_t room) {
    char rest[4096], line[256];
    int ended = 0;
    while (fread(rest, 1, sizeof rest, c->output) > 0) {}
    fclose(c->output);
    while (waitpid(c->pid, &ended, 0) < 0 && errno == EINTR) {}
    rewind(c->errors);
    for (*words = '\0'; fgets(line, sizeof line, c->errors);) {
        const char *text = line + strspn(line, " \t\r\n");
        line[strcspn(text, "\r\n") + (size_t)(text - line)] = '\0';
        if (*text && (wanted || !*words)) snprintf(words, room, "%s", text);
        if (wanted && strstr(text, wanted)) break;
    }
    fclose(c->errors);
    return ended;
}

/* The chunk sBIT of a PNG gives the number of significant bits of its samples. pngtopnm rescales
 * the samples by it, other decoders do not, so a PNG with fewer significant bits than the bit
 * depth is refused. A chunk has a length, a name, data and a checksum. The first one is IHDR,
 * with the bit depth in byte 8 and the colour type in byte 9; sBIT comes before IDAT. */
static int check_png(const char *path, FILE *file) {
    unsigned char chunk[8], header[10], bits[4];
    if (fseeko(file, 8, SEEK_SET) != 0 || fread(chunk, 1, 8, file) != 8
        || fread(header, 1, 10, file) != 10 || fseeko(file, 8 + 8 + 13 + 4, SEEK_SET) != 0)
        return SC_OK;                                        /* the decoder reports the error */
    unsigned depth = header[9] == 3 ? 8 : header[8];         /* a palette's colours have 8 bits */
    while (fread(chunk, 1, 8, file) == 8 && memcmp(chunk + 4, "IDAT", 4) != 0) {
        uint32_t length = 0;
        for (int i = 0; i < 4; i++) length = length << 8 | chunk[i];
        if (memcmp(chunk + 4, "sBIT", 4) == 0) {
            size_t samples = length < 4 ? length : 4;
            if (fread(bits, 1, samples, file) != samples) return SC_OK;
            for (size_t i = 0; i < samples; i++) {
                if (bits[i] == depth) continue;
                return fail("%s: a PNG of %u bits with sBIT %d, which decoders treat differently "
                            "(expected none: rewrite it, as with pngcrush -rem sBIT)", path, depth,
                            bits[i]);
            }
            length -= (uint32_t)samples;
        }
        if (fseeko(file, (off_t)length + 4, SEEK_CUR) != 0) return SC_OK;
    }
    return SC_OK;
}

/* If the first frame of a GIF does not cover the canvas, Pillow fills the rest with the
 * transparent colour, or else with colour 0, and ImageMagick with the background colour. A GIF
 * for which these differ is refused. The header has the width and height (16 bits,
 * little-endian) from byte 6, flags in byte 10 and the background in byte 11; then follow the
 * palette, extensions (0x21, a label, blocks up to an empty one) and the frame (0x2c, x, y,
 * width, height). */
static int check_gif(const char *path, FILE *file) {
    unsigned char header[13], block[256];
    int transparent = 0, byte, label, size;
    if (fseeko(file, 0, SEEK_SET) != 0 || fread(header, 1, 13, file) != 13) return SC_OK;
    if (header[10] & 0x80 && fseeko(file, 6 << (header[10] & 7), SEEK_CUR) != 0) return SC_OK;
    while ((byte = getc(file)) == 0x21) {
        label = getc(file);
        while ((size = getc(file)) > 0) {
            if (fread(block, 1, (size_t)size, file) != (size_t)size) return SC_OK;
            if (label == 0xf9) transparent = block[0] & 1;
        }
    }
    if (byte != 0x2c || fread(block, 1, 8, file) != 8) return SC_OK;
    int covers = memcmp(block, "\0\0\0", 4) == 0 && memcmp(block + 4, header + 6, 4) == 0;
    if (covers || (!transparent && header[11] == 0)) return SC_OK;
    return fail("%s: a GIF whose frame leaves a part of the canvas open, which decoders fill "
                "differently (expected a frame of the canvas's size)", path);
}

static const image_format formats[] = {
    { "PNM", "P2_", NULL, NULL, 3, "", NULL },
    { "PNM", "P3_", NULL, NULL, 3, "", NULL },
    { "PNM", "P5_", NULL, NULL, 3, "", NULL },
    { "PNM", "P6_", NULL, NULL, 3, "", NULL },
    { "JPEG", "\xff\xd8\xff", "djpeg -verbose -verbose -verbose -dct int -pnm",
      "libjpeg-turbo-progs", 3, "", NULL },
    { "PNG", "\x89PNG\r\n\x1a\n", "pngtopnm", "netpbm", 8, "", check_png },
    { "TIFF", "II*\0", NULL, "imagemagick", 4, "", NULL },
    { "TIFF", "MM\0*", NULL, "imagemagick", 4, "", NULL },
    { "GIF", "GIF8?a", NULL, "imagemagick", 6, "-coalesce ", check_gif },  /* the canvas */
    { "BMP", "BM????\0\0\0\0", NULL, "imagemagick", 10, "", NULL },
    { "WebP", "RIFF????WEBP", NULL, "imagemagick", 12, "-coalesce ", NULL },
};

/* The format of a file that begins with these bytes; NULL if it is not an image. */
static const image_format *format_of(const char *start, size_t size) {
    for (size_t f = 0; f < COUNT(formats); f++) {
        const char *magic = formats[f].magic;
        size_t same = 0;
        while (same < size && same < formats[f].length) {
            int any = magic[same] == '?' || (magic[same] == '_' && is_blank(start[same]));
            if (!any && magic[same] != start[same]) break;
            same++;
        }
        if (same == formats[f].length) return &formats[f];
    }
    return NULL;
}

/* Opens an image; with source NULL only checks what it is. Returns SC_END if it is not an image.
 * With O_NONBLOCK a named pipe is refused instead of waited for. */
static int open_image(const char *path, image_source *source) {
    char start[16];
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return fail("%s: cannot be opened: %s", path, strerror(errno));
    ssize_t got = read(fd, start, sizeof start);
    int status = SC_OK;
    const image_format *format = NULL;
    if (got < 0) status = fail("%s: cannot be read: %s", path, strerror(errno));
    else format = format_of(start, (size_t)got);
    if (status == SC_OK && !format) {
        fail("%s: not an image (expected a JPEG, PNG or PNM file)", path);
        status = SC_END;
    }
    if (status != SC_OK || !source) {
        close(fd);
        return status;
    }
    lseek(fd, 0, SEEK_SET);
    *source = (image_source){ .name = path, .format = format, .file = fdopen(fd, "r") };
    if (source->file) return SC_OK;
    close(fd);
    return fail("%s: cannot be opened: %s", path, strerror(errno));
}

/* Runs one decoder on a file. The image is accepted if the decoder ends with status 0. djpeg
 * ends with 2 after warnings: as in Pillow, a damaged image is accepted, but not one that ends
 * early. djpeg prints only its first warning unless it is verbose. Returns SC_END if the decoder
 * failed without writing a byte, and MACHINE_FAILED if it could not be started; then there is no
 * message if it is not installed. */
static int run_decoder(const char *command, int file, image_source *source, picture *result) {
    static const char cut[] = "Premature end of JPEG file";
    char text[512], words[256], *argument[sizeof text / 2 + 1] = { NULL }, *rest = NULL;
    int length = snprintf(text, sizeof text, "%s", command), count = 0;
    child_process child;
    for (char *word = strtok_r(text, " \t", &rest); word; word = strtok_r(NULL, " \t", &rest))
        argument[count++] = word;
    if (count == 0 || (size_t)length >= sizeof text) {
        fail("%s: SAECLIP_DECODER is not a program with its arguments", source->name);
        return MACHINE_FAILED;
    }
    lseek(file, 0, SEEK_SET);
    int error = start_child(&child, argument, file);
    if (error) {
        if (error != ENOENT && error != EACCES)
            fail("%s: %s cannot be started: %s", source->name, argument[0], strerror(error));
        return MACHINE_FAILED;
    }
    source->file = child.output;
    int djpeg = strstr(argument[0], "djpeg") != NULL;
    int status = pnm_read(source, result);
    int ended = end_child(&child, djpeg ? cut : NULL, words, sizeof words);
    int killed = WIFSIGNALED(ended), code = killed ? WTERMSIG(ended) : WEXITSTATUS(ended);
    int warned = code == 2 && djpeg && !strstr(words, cut);
    if (!killed && (code == 0 || warned) && status != SC_END) return status;
    if (!killed && code == 127 && status == SC_END && !*words) return MACHINE_FAILED;
    fail("%s: %s ended with %s %d: %s", source->name, argument[0], killed ? "signal" : "status",
         code, *words ? words : "no message");
    return status == SC_END ? SC_END : SC_FAILED;
}

/* Decodes an image with a program. The decoders of its format are tried in turn: the next one if
 * one is missing or failed without writing a byte (some builds of djpeg refuse CMYK). The error
 * quotes the first one that ran. */
static int decode_image(image_source *source, picture *result) {
    const image_format *format = source->format;
    const char *own = getenv("SAECLIP_DECODER");
    char magick[64], convert[64], reason[sizeof error_text];
    const char *command[] = { own ? own : format->decoder, magick, convert };
    int tries = own ? 1 : 3, now = MACHINE_FAILED, status = MACHINE_FAILED;
    int file = fileno(source->file);
    snprintf(magick, sizeof magick, "magick -[0] %s-alpha off -depth 8 ppm:-", format->option);
    snprintf(convert, sizeof convert, "convert -[0] %s-alpha off -depth 8 ppm:-", format->option);
    if (!own && format->check) SC_TRY(format->check(source->name, source->file));
    if (own) fail("%s: cannot start '%s' (SAECLIP_DECODER)", source->name, own);
    else
        fail("%s: a program that decodes %s is missing; Debian's package %s has one",
             source->name, format->name, format->package);
    for (int i = 0; i < tries && (now == MACHINE_FAILED || now == SC_END); i++) {
        if (command[i]) now = run_decoder(command[i], file, source, result);
        if (status == MACHINE_FAILED) memcpy(reason, error_text, sizeof reason);
        if (now != MACHINE_FAILED) status = now;
    }
    memcpy(error_text, reason, sizeof reason);
    return status == SC_END ? SC_FAILED : status;
}

/* Reads a file's image into source->rgb, which the caller frees. */
static int read_picture(const char *path, image_source *source, picture *result) {
    int status = open_image(path, source);
    if (status != SC_OK) return SC_FAILED;
    FILE *file = source->file;
    if (source->format->package) status = decode_image(source, result);
    else status = pnm_read(source, result);
    fclose(file);
    return status;
}

/* --- Pillow's resize (src/libImaging/Resample.c): bicubic, a = -0.5, stretched by the scale when
 * shrinking, weights of 22 bits, rows first, 8 bits in between; only what the crop keeps --- */

/* `from` pixels become from / scale pixels, of which `count` from `first` on are kept. The input
 * lacks its first `skipped` pixels, which none of these need. */
typedef struct { size_t from, skipped, count; uint64_t first; double scale, stretch; } resize_axis;

/* Where the crop to `keep` of `from` pixels begins: torchvision rounds half to even. */
static uint64_t crop_start(uint64_t from, uint64_t keep, int crop_hf) {
    uint64_t start = (from - keep) / 2;
    if (!crop_hf && (from - keep) % 4 == 3) start++;
    return start;
}

static double bicubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0;
}

/* An axis of an image whose shorter side becomes `side`, as the crop does. */
static resize_axis make_axis(size_t from, size_t shorter, size_t side, int crop_hf) {
    uint64_t full = (uint64_t)side * from / shorter;
    double scale = (double)from / (double)full;
    return (resize_axis){ from, 0, side, crop_start(full, side, crop_hf), scale, fmax(scale, 1) };
}

/* The weights of output pixel i: weight[x - start] for input pixels x from *start on. Returns
 * their number. */
static size_t resize_weights(const resize_axis *axis, size_t i, int32_t *weight, size_t *start) {
    double support = 2 * axis->stretch, step = 1 / axis->stretch;
    double centre = ((double)(axis->first + i) + 0.5) * axis->scale, total = 0;
    double low = centre - support + 0.5, high = centre + support + 0.5;
    size_t end = high > (double)axis->from ? axis->from : (size_t)high;
    *start = low < 0 ? 0 : (size_t)low;
    for (size_t x = *start; x < end; x++)
        total += bicubic(((double)x - centre + 0.5) * step);
    for (size_t x = *start; x < end; x++) {
        double exact = bicubic(((double)x - centre + 0.5) * step);
        exact = exact / (total != 0 ? total : 1) * (1 << WEIGHT_BITS);
        weight[x - *start] = (int32_t)(exact + (exact < 0 ? -0.5 : 0.5));
    }
    return end - *start;
}

static unsigned char clip_to_8_bits(int32_t sum) {
    if (sum < 0) return 0;
    return (unsigned char)(sum >> WEIGHT_BITS > 255 ? 255 : sum >> WEIGHT_BITS);
}

/* Resamples the rows of `in` and transposes the image; a second call then resamples its columns.
 * out: [axis.count, in.height, 3] */
static int resample(const resize_axis *axis, const picture *in, unsigned char *out) {
    int32_t *weight = new_array((size_t)ceil(2 * axis->stretch) * 2 + 1, sizeof *weight);
    if (!weight) return SC_FAILED;
    for (size_t i = 0; i < axis->count; i++) {
        size_t start, terms = resize_weights(axis, i, weight, &start);
        for (size_t y = 0; y < in->height; y++) {
            const unsigned char *pixel = in->rgb + y * in->stride + (start - axis->skipped) * 3;
            int32_t half = 1 << (WEIGHT_BITS - 1), sum[3] = { half, half, half };
            for (size_t t = 0; t < terms; t++) {
                for (size_t c = 0; c < 3; c++) sum[c] += weight[t] * pixel[3 * t + c];
            }
            for (size_t c = 0; c < 3; c++) *out++ = clip_to_8_bits(sum[c]);
        }
    }
    free(weight);
    return SC_OK;
}

/* Resizes the shorter side to `side` and crops the centre. pixels: [side, side, 3] */
static int resize_and_crop(const picture *from, size_t side, int crop_hf, unsigned char *pixels) {
    size_t shorter = smaller(from->width, from->height);
    resize_axis across = make_axis(from->width, shorter, side, crop_hf);
    resize_axis down = make_axis(from->height, shorter, side, crop_hf);
    double top = (double)down.first * down.scale - 2 * down.stretch;
    double end = (double)(down.first + side) * down.scale + 2 * down.stretch + 1;
    if (top > 0) down.skipped = (size_t)top;   /* rows of a tall image that are not needed */
    size_t count = (size_t)fmin(end, (double)from->height) - down.skipped;
    picture rows = { from->width, count, from->stride, from->rgb + down.skipped * from->stride };
    unsigned char *turned = new_array(count, 3 * side);
    if (!turned) return SC_FAILED;
    int status = resample(&across, &rows, turned);
    picture columns = { count, side, 3 * count, turned };
    if (status == SC_OK) status = resample(&down, &columns, pixels);
    free(turned);
    return status;
}

/* Resizes and crops an image of any size to the size of the model. pixels: [size, size, 3] */
static int preprocess(picture from, const sc_preprocess *prep, unsigned char *pixels) {
    size_t square = (size_t)prep->square, size = (size_t)prep->size;
    int is_square = from.width == square && from.height == square;   /* as in a packed set */
    if (square == 0 || is_square) return resize_and_crop(&from, size, prep->crop_hf, pixels);
    size_t side = smaller(from.width, from.height);
    from.rgb += crop_start(from.height, side, prep->crop_hf) * from.stride;
    from.rgb += crop_start(from.width, side, prep->crop_hf) * 3;
    from.width = from.height = side;
    unsigned char *middle = new_array(square, 3 * square);
    if (!middle) return SC_FAILED;
    int status = resize_and_crop(&from, square, prep->crop_hf, middle);
    from = (picture){ square, square, 3 * square, middle };
    if (status == SC_OK) status = resize_and_crop(&from, size, prep->crop_hf, pixels);
    free(middle);
    return status;
}

/* --- Data sets --- */

/* Stores a name in blocks that many names share: an image takes 16 bytes and its name. */
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

/* folder: may end with a slash; "" is the current folder */
static int join_path(const char *folder, const char *name, char path[MAX_PATH]) {
    size_t end = strlen(folder);
    const char *slash = end > 0 && folder[end - 1] != '/' ? "/" : "";
    if (*name == '/') folder = slash = "";
    int length = snprintf(path, MAX_PATH, "%s%s%s", folder, slash, name);
    if (length < MAX_PATH) return SC_OK;
    return fail("%s%s%s: the path is too long", folder, slash, name);
}

/* Names of helper folders, such as .thumbs and @eaDir, are left out. */
static int is_visible(const struct dirent *entry) { return !strchr(".@", entry->d_name[0]); }

static int by_entry(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* Lists all files below a folder, and as classes the folders at the top. A dangling link counts
 * as a file; a link to a folder above it ends at MAX_DEPTH. */
static int walk_folder(sc_images *set, const char *folder, int64_t label, int depth) {
    char path[MAX_PATH];
    struct stat about;
    struct dirent **entry;
    if (depth > MAX_DEPTH)
        return fail("%s: lies too deep (expected at most %d folders)", folder, MAX_DEPTH);
    int entries = scandir(folder, &entry, is_visible, by_entry), status = SC_OK;
    if (entries < 0) return fail("%s: cannot be opened: %s", folder, strerror(errno));
    for (int i = 0; i < entries && status == SC_OK; i++) {
        status = join_path(folder, entry[i]->d_name, path);
        if (status != SC_OK) break;
        int found = stat(path, &about) == 0;
        if (found && S_ISDIR(about.st_mode)) {
            int64_t inside = label;
            if (depth == 0) {
                status = add_class(set, entry[i]->d_name);
                inside = (int64_t)set->classes - 1;
            }
            if (status == SC_OK) status = walk_folder(set, path, inside, depth + 1);
        } else if (!found || S_ISREG(about.st_mode)) {
            status = add_image(set, path + strlen(set->root), label);
        }
    }
    for (int i = 0; i < entries; i++) free(entry[i]);
    free(entry);
    return status;
}

/* Keeps the files that are images, and those that cannot be opened, which are reported when they
 * are read. in_classes[1] counts the images in class folders, in_classes[0] the others. A remark
 * names the first files that are not images. */
static int keep_images(sc_images *set, const char *folder, size_t in_classes[2]) {
    char path[MAX_PATH], names[160] = "";
    size_t kept = 0, others = 0;
    for (size_t i = 0; i < set->count; i++) {
        SC_TRY(join_path(set->root, set->image[i].name, path));
        if (open_image(path, NULL) != SC_END) {
            in_classes[set->image[i].label >= 0]++;
            set->image[kept++] = set->image[i];
        } else if (others++ < 3) {
            size_t used = strlen(names);
            snprintf(names + used, sizeof names - used, " %.48s", set->image[i].name);
        }
    }
    if (kept == 0)
        return fail("%s: no image among the %zu files of this folder (expected "
                    "FOLDER/<class>/<image> or FOLDER/<image>)", folder, set->count);
    if (others > 0)
        note("%s: %zu files passed over, which are not images:%s%s", folder, others, names,
             others > 3 ? " ..." : "");
    set->count = smaller(kept, set->limit);
    return SC_OK;
}

/* DIR/<class>/<file>, or a flat DIR without labels where no class folder holds an image. */
static int open_folder(sc_images *set, const char *folder) {
    size_t in_classes[2] = { 0 };
    SC_TRY(walk_folder(set, folder, -1, 0));
    if (set->count) qsort(set->image, set->count, sizeof *set->image, by_name);
    SC_TRY(keep_images(set, folder, in_classes));
    if (in_classes[0] && in_classes[1])
        return fail("%s: %zu images in class folders and %zu beside them (expected FOLDER/<class>/"
                    "<image> or FOLDER/<image> alone)", folder, in_classes[1], in_classes[0]);
    if (in_classes[1]) return SC_OK;
    free(set->class_name);
    set->class_name = NULL;
    set->classes = 0;
    return SC_OK;
}

/* Whether a line "path 3" without a TAB is not the name of a file, but "path" is. */
static int lacks_tab(const sc_images *set, const char *line) {
    char path[MAX_PATH];
    size_t end = strlen(line), digits = 0;
    while (digits < end && isdigit((unsigned char)line[end - digits - 1])) digits++;
    if (digits == 0 || digits == end || !is_blank(line[end - digits - 1])) return 0;
    if (join_path(set->root, line, path) != SC_OK || access(path, F_OK) == 0) return 0;
    end = strlen(path) - digits;
    while (end > 0 && is_blank(path[end - 1])) path[--end] = '\0';
    path[end] = '\0';
    return access(path, F_OK) == 0;
}

/* Reads one line "path" or "path<TAB>label". A # begins a comment at the start of a line or
 * after a label. */
static int read_line(sc_images *set, const char *list, size_t number, char *line) {
    line += strspn(line, " \t\r\n");
    char *end = line + strlen(line);
    while (end > line && is_blank(end[-1])) end--;
    *end = '\0';
    if (!*line || *line == '#') return SC_OK;
    int64_t label = -1;
    char *tab = strchr(line, '\t');
    if (tab) {
        label = (int64_t)strtoll(tab + 1, &end, 10);
        *tab = '\0';
        size_t blanks = strspn(end, " \t");
        if (blanks > 0 && end[blanks] == '#') end += strlen(end);        /* a comment */
        if (*end || end == tab + 1 || label < 0 || label >= SC_MAX_CLASSES)
            return fail("%s: line %zu: invalid label (expected a whole number from 0 to %d)", list,
                        number, SC_MAX_CLASSES - 1);
    }
    if (!tab && lacks_tab(set, line))
        return fail("%s: line %zu: a blank before the label (expected path<TAB>label)", list,
                    number);
    if (set->count > 0 && (set->image[0].label < 0) != (label < 0))
        return fail("%s: line %zu: labels on some lines only (expected on all or none)", list,
                    number);
    return add_image(set, line, label);
}

static int open_list(sc_images *set, const char *path) {
    char text[MAX_PATH + 64];
    FILE *list = fopen(path, "r");
    if (!list) return fail("%s: cannot be opened: %s", path, strerror(errno));
    int status = SC_OK;
    for (size_t number = 1; status == SC_OK && set->count < set->limit; number++) {
        if (!fgets(text, sizeof text, list)) break;
        int mark = number == 1 && memcmp(text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;    /* of UTF-8 */
        if (number == 1 && (!memcmp(text, "\xff\xfe", 2) || !memcmp(text, "\xfe\xff", 2)))
            status = fail("%s: UTF-16 text (expected UTF-8)", path);
        else if (!strchr(text, '\n') && !feof(list))
            status = fail("%s: line %zu: too long, or with a byte 0", path, number);
        else status = read_line(set, path, number, text + mark);
    }
    if (status == SC_OK && ferror(list)) status = fail("%s: cannot be read", path);
    if (status == SC_OK && set->count == 0) status = fail("%s: a list without an image", path);
    fclose(list);
    return status;
}

/* Adds the images of a file that may hold labels (I64 [count], at least `least`) and, in its
 * metadata, the class names. name: [count], or NULL */
static int add_images(sc_images *set, const sc_safetensors *file, size_t count, int64_t least,
                      char **name) {
    const sc_tensor *labels = sc_tensor_find(file, "labels");
    const char *classes = labels ? sc_metadata_find(file, "class_names") : NULL;
    int64_t label = -1;
    if (labels && (labels->dtype != SC_I64 || labels->rank != 1 || labels->count != count))
        return fail("%s: tensor labels (expected I64 [%zu])", file->path, count);
    if (classes) SC_TRY(json_string_array(classes, file->path, &set->class_name, &set->classes));
    size_t most = classes ? set->classes : SC_MAX_CLASSES;
    for (size_t i = 0; i < count && i < set->limit; i++) {
        if (labels) SC_TRY(sc_tensor_integers(file, labels, i, 1, &label));
        if (labels && (label < least || label >= (int64_t)most))
            return fail("%s: image %zu: label %lld (expected one of %zu classes)", file->path, i,
                        (long long)label, most);
        SC_TRY(add_image(set, name ? name[i] : "", label));
    }
    return SC_OK;
}

/* A packed set: images U8 [N, H, W, 3], labels and names. */
static int open_packed(sc_images *set, const char *path) {
    SC_TRY(sc_safetensors_open(&set->packed, path));
    const sc_tensor *images = sc_tensor_find(&set->packed, "images");
    const char *file_names = sc_metadata_find(&set->packed, "file_names");
    if (!images || images->dtype != SC_U8 || images->rank != 4 || images->bytes == 0 ||
        images->shape[1] > MAX_PIXELS / images->shape[2] || images->shape[3] != 3)
        return fail("%s: not a packed set (expected a tensor images U8 [N, H, W, 3])", path);
    size_t count = images->shape[0], names = count;
    char **name = NULL;
    if (file_names) SC_TRY(json_string_array(file_names, path, &name, &names));
    int status;
    if (names == count) status = add_images(set, &set->packed, count, 0, name);
    else status = fail("%s: %zu file_names for %zu images", path, names, count);
    free(name);
    return status;
}

/* A digest of N, the classes, the labels and the names below the root. Moving or packing a data
 * set does not change it. */
static uint64_t images_digest(const sc_images *set) {
    digest64 digest = { 0 };
    digest64_number(&digest, set->count);
    digest64_number(&digest, set->class_name ? set->classes : 0);
    for (size_t c = 0; c < set->classes && set->class_name; c++)
        digest64_name(&digest, set->class_name[c]);
    for (size_t i = 0; i < set->count; i++) {
        digest64_name(&digest, set->image[i].name);
        digest64_number(&digest, (uint64_t)set->image[i].label);
    }
    return digest64_value(&digest);
}

int sc_images_open(sc_images *set, const char *path, size_t limit) {
    const char *suffix = strrchr(path, '.');
    struct stat about;
    *set = (sc_images){ .limit = limit ? limit : SIZE_MAX };
    int folder = stat(path, &about) == 0 && S_ISDIR(about.st_mode), status;
    set->root = join_text(path, folder && *base_name(path) ? "/" : "");
    if (!set->root) return SC_FAILED;
    if (!folder) set->root[base_name(path) - path] = '\0';
    if (folder) {
        status = open_folder(set, path);
    } else if (suffix && strcmp(suffix, ".txt") == 0) {
        status = open_list(set, path);
    } else if (suffix && strcmp(suffix, ".safetensors") == 0) {
        status = open_packed(set, path);
    } else {
        status = open_image(path, NULL);
        if (status == SC_END)
            fail("%s: not an image (expected a folder, an image, a list named *.txt or a packed "
                 "set named *.safetensors)", path);
        if (status == SC_OK) status = add_image(set, base_name(path), -1);
    }
    if (status == SC_OK) {
        set->digest = images_digest(set);
        return SC_OK;
    }
    sc_images_close(set);
    return SC_FAILED;
}

void sc_images_close(sc_images *set) {
    release(&set->memory);
    sc_safetensors_close(&set->packed);
    free(set->class_name);
    free(set->image);
    free(set->root);
    *set = (sc_images){ 0 };
}

/* Reads and preprocesses image `index`. pixels: [S, S, 3] */
static int load_image(const sc_images *set, size_t index, const sc_preprocess *prep,
                      unsigned char *pixels) {
    image_source source = { 0 };
    picture found;
    char path[MAX_PATH];
    int status = SC_OK;
    if (set->packed.path) {
        const sc_tensor *images = sc_tensor_find(&set->packed, "images");
        size_t height = images->shape[1], width = images->shape[2];
        found = (picture){ width, height, 3 * width, images->data + index * height * width * 3 };
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

static const char *const naming_names[] = { "Hugging Face CLIP", "OpenAI / OpenCLIP", "timm" };
static const char *const name_begins[] = { "vision_model.", "visual.", "" };
static const char *const block_begins[] = { "encoder.layers.", "transformer.resblocks.",
                                            "blocks." };

enum size { ONE, WIDTH, WIDTH3, HIDDEN, TOKENS, PIXELS, OUTPUTS };

/* The names of each layer's tensors in the three namings (* stands for weight or bias, # for the
 * block, ? for q, k or v, ~ for the prefix of the naming), the shape of the weight in the file,
 * and whether it is the matrix of a product. */
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

/* Writes out the name of a tensor. name: [NAME_LENGTH] */
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

/* Reads a layer's weight or bias of rows x columns numbers; leading dimensions of 1 are ignored.
 * A tensor that is missing or has another shape is an error. Hugging Face stores q, k and v
 * separately. */
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
        if (!tensor) return fail("%s: tensor %s is missing", path, name);
        if (rows != 0 && columns > SIZE_MAX / rows)
            return fail("%s: tensor %s is too large", path, name);
        while (first < tensor->rank && tensor->shape[first] == 1 && rows != 1) first++;
        if (tensor->count != rows * columns || (rows > 1 && tensor->shape[first] != rows))
            return fail("%s: tensor %s has %zu numbers (expected %zu x %zu)", path, name,
                        tensor->count, rows, columns);
        SC_TRY(sc_tensor_floats(&model->file, tensor, 0, tensor->count, out + i * rows * columns));
    }
    return SC_OK;
}

/* Reads a layer. The weight of a linear layer is [N, K] in the file, as in PyTorch (OpenAI's
 * projection is [K, N]). It is packed for the products, except for Part I. */
static int read_layer(const sc_model *model, enum role role, size_t block, int plain) {
    const size_t sizes[] = { 1, model->width, 3 * model->width, model->hidden, model->tokens,
                             3 * model->patch * model->patch, model->outputs };
    size_t N = sizes[layers[role].rows], K = sizes[layers[role].columns], biases = N == 1 ? K : N;
    int swapped = role == HEAD && model->naming == OPENAI;
    int has_bias = strchr(layers[role].name[model->naming], '*') != NULL;
    int may_lack = role == PATCHES || role == HEAD || (role == QKV && model->naming == TIMM);
    sc_layer *layer = &model->layer[block * ROLES + role];
    size_t rows = swapped ? K : N, columns = swapped ? N : K;
    layer->weight = new_array(N, padded(K) * sizeof(float));
    if (!layer->weight) return SC_FAILED;
    SC_TRY(read_layer_tensor(model, role, block, 0, rows, columns, layer->weight));
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
    layer->bias = new_array(padded(biases), sizeof(float));
    if (!layer->bias) return SC_FAILED;
    return read_layer_tensor(model, role, block, 1, 1, biases, layer->bias);
}

static int load_block(void *context, size_t block) {
    for (enum role role = NORM1; role <= FC2; role++) SC_TRY(read_layer(context, role, block, 0));
    return SC_OK;
}

/* Reads the final norm, the projection or classifier, and text_embeds [C, P], the embeddings of
 * the class prompts, with which those of images are compared; their rows are scaled to unit
 * length. */
static int load_head(sc_model *model) {
    const sc_tensor *head = find_layer(model, HEAD, 0, 0);
    const sc_tensor *text = sc_tensor_find(&model->file, "text_embeds");
    if (!head || head->rank != 2)
        return fail("%s: no head (expected %s [outputs, width])",
                    model->file.path, layers[HEAD].name[model->naming]);
    size_t outputs = head->shape[model->naming == OPENAI ? 1 : 0], P = padded(outputs);
    model->outputs = model->classes = outputs;
    SC_TRY(read_layer(model, POST, 0, 0));
    SC_TRY(read_layer(model, HEAD, 0, 0));
    if (!text) return SC_OK;
    if (text->rank != 2 || text->shape[1] != outputs || text->shape[0] == 0)
        return fail("%s: tensor text_embeds (expected [classes, %zu], the projection's width)",
                    model->file.path, outputs);
    model->classes = text->shape[0];
    model->text = new_array(model->classes, P * sizeof *model->text);
    if (!model->text) return SC_FAILED;
    for (size_t c = 0; c < model->classes; c++) {
        float *row = model->text + c * P;
        SC_TRY(sc_tensor_floats(&model->file, text, c * outputs, outputs, row));
        unit_row(row, P);
    }
    return SC_OK;
}

/* Whether a tensor's name is in the table, for a block before `blocks`. */
static int is_known(int naming, size_t blocks, const char *found) {
    char name[NAME_LENGTH];
    for (enum role role = CLASS_TOKEN; role < ROLES; role++) {
        int in_blocks = role >= NORM1 && role <= FC2;
        for (size_t block = 0; block < (in_blocks ? blocks : 1); block++) {
            for (int i = 0; i < 6; i++) {                /* weight and bias; of q, k and v */
                spell_name(name, naming, role, block, i % 2, "qkv"[i / 2]);
                if (strcmp(name, found) == 0) return 1;
            }
        }
    }
    return 0;
}

/* Every tensor of the vision tower must be known: blocks are numbered without a gap, and there
 * is no LayerScale, no register tokens, no norms of q and k, and so on. Not part of the vision
 * tower are a text tower, text_embeds, and the position numbers that Hugging Face saves. */
static int check_tensors(const sc_model *model) {
    char blocks[NAME_LENGTH];
    const char *path = model->file.path, *tower = name_begins[model->naming];
    snprintf(blocks, sizeof blocks, "%s%s", tower, block_begins[model->naming]);
    for (size_t t = 0; t < model->file.tensors; t++) {
        const char *found = model->file.tensor[t].name;
        if (strncmp(found, tower, strlen(tower)) != 0 || strcmp(found, "text_embeds") == 0
            || strcmp(found, "vision_model.embeddings.position_ids") == 0) continue;
        if (strncmp(found, blocks, strlen(blocks)) == 0
            && strtoul(found + strlen(blocks), NULL, 10) >= model->blocks)
            return fail("%s: tensor %.100s, but block %zu is missing (expected blocks without a "
                        "gap)", path, found, model->blocks);
        if (!is_known(model->naming, model->blocks, found))
            return fail("%s: tensor %.100s has no place in the transformers known here", path,
                        found);
    }
    return SC_OK;
}

/* Takes all sizes from the shapes of tensors. */
static int measure_model(sc_model *model) {
    const char *path = model->file.path;
    const sc_tensor *patch = find_layer(model, PATCHES, 0, 0), *fc1 = find_layer(model, FC1, 0, 0);
    const sc_tensor *positions = find_layer(model, POSITIONS, 0, 0);
    if (!patch || patch->rank != 4 || patch->shape[1] != 3 || patch->shape[2] != patch->shape[3]
        || patch->shape[2] == 0 || patch->shape[2] > 1024 || patch->shape[0] == 0
        || patch->shape[0] > SC_MAX_WIDTH)
        return fail("%s: the patch embedding's weight (expected [width, 3, patch, patch])", path);
    size_t D = model->width = patch->shape[0];
    model->patch = patch->shape[2];
    if (!positions || positions->rank < 2 || positions->shape[positions->rank - 1] != D)
        return fail("%s: the position embedding (expected [tokens, %zu])", path, D);
    size_t T = model->tokens = positions->count / D;
    while ((model->grid + 1) * (model->grid + 1) < T) model->grid++;
    if (T < 2 || T > SC_MAX_TOKENS || model->grid * model->grid + 1 != T)
        return fail("%s: %zu positions (expected a class token and a square of patches)", path, T);
    if (!fc1 || fc1->rank != 2 || fc1->shape[1] != D || fc1->shape[0] > SC_MAX_WIDTH)
        return fail("%s: the first layer of block 0's MLP (expected [hidden, %zu])", path, D);
    model->hidden = fc1->shape[0];
    size_t S = model->image_size = model->grid * model->patch;
    if (S > MAX_PIXELS / S) return fail("%s: images of %zu x %zu are too large", path, S, S);
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
    int quick;
    switch (setting) {
    case EPSILON:
        SC_TRY(parse_number(text, what, 0, 1, &number));
        model->epsilon = (float)number;
        return SC_OK;
    case HEADS:
        SC_TRY(parse_number(text, what, 1, 1 << 20, &number));
        model->heads = (size_t)number;
        if ((double)model->heads == number && model->width % model->heads == 0) return SC_OK;
        return usage("%s: width %zu cannot be split into %g heads", what, model->width, number);
    case GELU:
        quick = strcmp(text, "quick_gelu") == 0 || strcmp(text, "quick") == 0;
        model->activation = quick ? QUICK_GELU : ERF_GELU;
        if (quick || strcmp(text, "gelu") == 0 || strcmp(text, "erf") == 0) return SC_OK;
        return usage("%s: invalid value '%s' (expected quick_gelu or gelu)", what, text);
    default:
        SC_TRY(parse_triple(text, what, triple));
        if (setting == MEAN || (triple[0] > 0 && triple[1] > 0 && triple[2] > 0)) return SC_OK;
        return usage("%s: invalid value '%s' (expected three numbers above 0)", what, text);
    }
}

/* The number of heads that published models of a width have; "" where none is known. */
static void usual_heads(size_t width, char heads[24]) {
    if (width == 1280 || width == 1408 || width == 1664) strcpy(heads, "16");
    else if (width < 1280) snprintf(heads, 24, "%zu", width / 64);
    else strcpy(heads, "");
}

/* The settings that shapes do not show come from an option, else from the metadata, else from
 * the usual value. An invalid option is a usage error, an invalid value in the file is an error
 * of the file. */
static int read_settings(sc_model *model, const sc_model_options *given) {
    int plain = model->naming == TIMM && !find_layer(model, PRE, 0, 0);
    char heads[24], assumed[256] = "", reason[sizeof error_text];
    const struct { const char *option, *given, *key, *usual; } settings[SETTINGS] = {
        { "--gelu", given->gelu, "hidden_act", plain ? "gelu" : "quick_gelu" },
        { "--eps", given->epsilon, "layer_norm_eps", plain ? "1e-6" : "1e-5" },
        { "--heads", given->heads, "num_attention_heads", heads },
        { "--mean", given->mean, "image_mean", "0.48145466,0.4578275,0.40821073" },
        { "--std", given->std, "image_std", "0.26862954,0.26130258,0.27577711" } };
    usual_heads(model->width, heads);
    for (enum setting i = 0; i < SETTINGS; i++) {
        const char *key = settings[i].key, *saved = sc_metadata_find(&model->file, key);
        const char *text = saved ? saved : settings[i].usual;
        size_t used = strlen(assumed);
        if (settings[i].given) {
            SC_TRY(apply_setting(model, i, settings[i].option, settings[i].given));
            continue;
        }
        if (!*text)
            return fail("%s: does not name its %s, and no published model has width %zu (expected "
                        "%s)", model->file.path, key, model->width, settings[i].option);
        if (!saved) snprintf(assumed + used, sizeof assumed - used, ", %s %s", key, text);
        if (apply_setting(model, i, key, text) == SC_OK) continue;
        memcpy(reason, error_text, sizeof reason);
        return fail("%s: %s %s", model->file.path, saved ? "metadata" : "assumed", reason);
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

/* Reports that a file is not a model: a prefix stands before its names, or they are unknown. */
static int refuse_names(const sc_safetensors *file) {
    static const char *const begins[] = { "module.", "model.", "visual.trunk.", "trunk." };
    for (size_t t = 0; t < file->tensors; t++) {
        for (size_t i = 0; i < COUNT(begins); i++) {
            const char *name = file->tensor[t].name;
            if (strncmp(name, begins[i], strlen(begins[i])) == 0)
                return fail("%s: tensor names begin with '%s' (expected without: python3 "
                            "weights/convert.py IN OUT %s cuts it)", file->path, begins[i],
                            begins[i]);
        }
    }
    return fail("%s: not a vision transformer under Hugging Face's, OpenAI's or timm's names "
                "(expected a tensor visual.class_embedding or the like)", file->path);
}

/* A shard is named NAME-00001-of-00002.safetensors. */
static int check_shards(const char *path) {
    const char *of = strstr(base_name(path), "-of-");
    if (!of || strtoul(of + 4, NULL, 10) < 2 || !isdigit((unsigned char)of[-1])) return SC_OK;
    return fail("%s: one of several shards of a model (expected all of it in one file: load it "
                "with its library and save it with max_shard_size=\"100GB\")", path);
}

int sc_model_open(sc_model *model, const char *path, const sc_model_options *given) {
    static const sc_model_options none = { 0 };
    *model = (sc_model){ 0 };
    SC_TRY(check_shards(path));
    SC_TRY(sc_safetensors_open(&model->file, path));
    model->naming = naming_of(&model->file);
    int status = SC_OK;
    if (model->naming == NAMINGS) status = refuse_names(&model->file);
    if (status == SC_OK) status = measure_model(model);
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
    model->pass = new_array(1, sizeof *model->pass);
    if (!model->layer || !model->pass) return SC_FAILED;
    for (enum role role = CLASS_TOKEN; role <= PATCHES; role++)
        SC_TRY(read_layer(model, role, 0, 0));
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

/* Makes a copy of a model for Part I, whose layers hold the weights as PyTorch has them: of the
 * first `blocks` blocks, and of the head if asked. It is closed by free_layers(). */
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
    if (model->pass) release(&model->pass->memory);
    free(model->pass);
    free(model->text);
    sc_safetensors_close(&model->file);
    *model = (sc_model){ 0 };
}

static const char *const hook_names[] = { "attn", "mlp", "resid" };

/* The hook point with this name, -1 if there is none. */
static int find_hook(const char *name) {
    for (int hook = SC_ATTN; hook <= SC_RESID; hook++)
        if (strcmp(name, hook_names[hook]) == 0) return hook;
    return -1;
}

/* ============================================================================================
 * 17. SAEs' files
 *
 * The tensors of an SAE, and of a training's state, in and out by one table; the metadata.
 * ============================================================================================ */

static const char *architecture_of(const sc_sae *sae) {
    if (sae->topk) return "topk";
    return sae->threshold ? "jumprelu" : "standard";
}

/* Opens the output and discards it, so that a wrong path fails before the work is done. */
static int try_output(const char *path) {
    sc_writer w;
    SC_TRY(sc_writer_open(&w, path, 0));
    sc_writer_discard(&w);
    return SC_OK;
}

/* A tensor, with its shape in files (a vector of rank 1 has one row). Its element [r, c] is at
 * values[r * down + c * across] in memory. */
typedef struct {
    const char *name;
    float *values;
    int rank;
    size_t rows, columns, down, across;
} float_tensor;

enum { SAE_TENSORS = 4, STATE_TENSORS = 12 };

/* Lists the tensors of an SAE and, with a trainer, of Adam; returns their number. W_enc is [D,
 * n] in files and [n, D] in memory. list: [STATE_TENSORS] */
static size_t list_tensors(const sc_sae *sae, const sc_trainer *t, float_tensor *list) {
    static const sc_trainer none;
    size_t n = sae->d_sae, D = sae->d_in, row = sae->stride;
    int with_adam = t != NULL;
    if (!t) t = &none;
    const float_tensor all[STATE_TENSORS] = {
        { "W_enc", sae->W_enc, 2, D, n, 1, row }, { "b_enc", sae->b_enc, 1, 1, n, 0, 1 },
        { "W_dec", sae->W_dec, 2, n, D, row, 1 }, { "b_dec", sae->b_dec, 1, 1, D, 0, 1 },
        { "W_enc_m", t->W_enc.m, 2, n, D, row, 1 }, { "W_enc_v", t->W_enc.v, 2, n, D, row, 1 },
        { "W_dec_m", t->W_dec.m, 2, n, D, row, 1 }, { "W_dec_v", t->W_dec.v, 2, n, D, row, 1 },
        { "b_enc_m", t->b_enc.m, 1, 1, n, 0, 1 }, { "b_enc_v", t->b_enc.v, 1, 1, n, 0, 1 },
        { "b_dec_m", t->b_dec.m, 1, 1, D, 0, 1 }, { "b_dec_v", t->b_dec.v, 1, 1, D, 0, 1 } };
    memcpy(list, all, sizeof all);
    return with_adam ? STATE_TENSORS : SAE_TENSORS;
}

/* Copies rows of a tensor between memory and `rows`. rows: [height, columns], as in the file */
static void copy_rows(const float_tensor *t, size_t first, size_t height, float *rows, int out) {
    for (size_t c = 0; c < t->columns; c++) {
        for (size_t i = 0; i < height; i++) {
            float *here = t->values + (first + i) * t->down + c * t->across;
            float *there = rows + i * t->columns + c;
            if (out) *there = *here;
            else *here = *there;
        }
    }
}

/* Writes a tensor or, if there is no writer, reads it from a file, some rows at a time. Adds it
 * to a digest if there is one. */
static int move_tensor(const float_tensor *t, const sc_safetensors *file, sc_writer *w,
                       digest64 *digest) {
    enum { ROWS = 16 };
    const sc_tensor *source = w ? NULL : sc_tensor_find(file, t->name);
    size_t shape[2] = { t->rows, t->columns };
    if (w) SC_TRY(sc_writer_tensor(w, t->name, SC_F32, t->rank, shape + 2 - t->rank));
    else if (!source || source->rank == 0 || source->count != t->rows * t->columns
             || source->shape[source->rank - 1] != t->columns)
        return fail("%s: missing or of another shape: tensor %s (expected %zu x %zu)", file->path,
                    t->name, t->rows, t->columns);
    float *some = new_array(t->columns, ROWS * sizeof *some);
    int status = some ? SC_OK : SC_FAILED;
    for (size_t r = 0; r < t->rows && status == SC_OK; r += ROWS) {
        size_t height = smaller(t->rows - r, ROWS), count = height * t->columns;
        if (w) {
            copy_rows(t, r, height, some, 1);
            status = sc_writer_floats(w, some, count);
        } else {
            status = sc_tensor_floats(file, source, r * t->columns, count, some);
            if (status == SC_OK) copy_rows(t, r, height, some, 0);
        }
        for (size_t i = 0; digest && i < count; i++)
            digest64_number(digest, bits_of_float(some[i]));
    }
    free(some);
    return status;
}

/* Writes or reads the tensors of an SAE and, with a trainer, of Adam. */
static int move_tensors(const sc_sae *sae, const sc_trainer *t, const sc_safetensors *file,
                        sc_writer *w, digest64 *digest) {
    const float_tensor threshold = { "threshold", sae->threshold, 1, 1, sae->d_sae, 0, 1 };
    float_tensor list[STATE_TENSORS];
    size_t count = list_tensors(sae, t, list);
    for (size_t i = 0; i < count; i++) SC_TRY(move_tensor(&list[i], file, w, digest));
    return sae->threshold ? move_tensor(&threshold, file, w, digest) : SC_OK;
}

/* Reads a whole number of at least 1 from the metadata. If it is missing, *value is unchanged. */
static int metadata_number(const sc_safetensors *file, const char *key, double most,
                           size_t *value) {
    const char *text = sc_metadata_find(file, key);
    double number = 0;
    if (!text) return SC_OK;
    if (parse_number(text, key, 1, most, &number) != SC_OK || number != floor(number))
        return fail("%s: metadata %s = '%s' (expected a whole number from 1 to %g)", file->path,
                    key, text, most);
    *value = (size_t)number;
    return SC_OK;
}

/* --- The origin of activations (see saeclip.h) --- */

static const char *const origin_keys[SC_ORIGIN_KEYS] = {
    "model", "layer", "hook", "tokens", "mean", "std", "gelu", "epsilon", "heads", "square", "crop"
};

/* The origin of an SAE, whose hook point is kept as numbers. */
static sc_origin origin_of(const sc_sae *sae) {
    sc_origin origin = sae->origin;
    char *layer = origin.text[SC_LAYER], *hook = origin.text[SC_HOOK];
    *layer = *hook = '\0';
    if (sae->layer) snprintf(layer, sizeof *origin.text, "%zu", sae->layer);
    if (sae->hook >= 0) strcpy(hook, hook_names[sae->hook]);
    return origin;
}

static int put_origin(sc_writer *w, const sc_origin *origin) {
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++)
        if (*origin->text[k]) SC_TRY(sc_writer_metadata(w, origin_keys[k], origin->text[k]));
    return SC_OK;
}

/* Refuses a value that a key of the origin cannot have. */
static int check_origin_value(const char *path, size_t key, const char *text) {
    static const char *const words[SC_ORIGIN_KEYS] = {
        [SC_HOOK] = "attn|mlp|resid", [SC_TOKENS] = "all|cls|patches",
        [SC_GELU] = "quick_gelu|gelu", [SC_CROP] = "torchvision|hf" };
    static const double most[SC_ORIGIN_KEYS] = {             /* of numbers */
        [SC_LAYER] = 1e6, [SC_EPSILON] = 1, [SC_HEADS] = 1e6, [SC_SQUARE] = 16384 };
    double least = key == SC_LAYER || key == SC_HEADS, number = 0;
    const char *name = origin_keys[key];
    float triple[3];
    if (words[key] && !is_choice(words[key], text))
        return fail("%s: metadata %s = '%s' (expected %s)", path, name, text, words[key]);
    if ((key == SC_MEAN || key == SC_STD) && parse_triple(text, name, triple) != SC_OK)
        return fail("%s: metadata %s = '%s' (expected three numbers)", path, name, text);
    if (most[key] == 0) return SC_OK;
    int is_number = parse_number(text, name, least, most[key], &number) == SC_OK;
    if (is_number && (key == SC_EPSILON || number == floor(number))) return SC_OK;
    return fail("%s: metadata %s = '%s' (expected a number from %g to %g)", path, name, text,
                least, most[key]);
}

static int read_origin(sc_origin *origin, const sc_safetensors *file) {
    *origin = (sc_origin){ 0 };
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) {
        const char *text = sc_metadata_find(file, origin_keys[k]);
        if (!text) continue;
        if (k == SC_MODEL) text = base_name(text);
        if (strlen(text) >= sizeof *origin->text)
            return fail("%s: metadata %s is too long", file->path, origin_keys[k]);
        SC_TRY(check_origin_value(file->path, k, text));
        strcpy(origin->text[k], text);
    }
    return SC_OK;
}

/* The first key with two different values, SC_ORIGIN_KEYS if there is none. */
static size_t origin_difference(const sc_origin *a, const sc_origin *b) {
    size_t k = 0;
    for (; k < SC_ORIGIN_KEYS; k++)
        if (*a->text[k] && *b->text[k] && strcmp(a->text[k], b->text[k]) != 0) break;
    return k;
}

static int write_sae(sc_writer *w, void *context) {
    const sc_sae *sae = context;
    SC_TRY(sc_writer_metadata(w, "architecture", architecture_of(sae)));
    if (sae->topk) SC_TRY(put_metadata(w, "k", "%zu", sae->k));
    SC_TRY(put_metadata(w, "d_in", "%zu", sae->d_in));
    SC_TRY(put_metadata(w, "d_sae", "%zu", sae->d_sae));
    const sc_origin origin = origin_of(sae);
    SC_TRY(put_origin(w, &origin));
    return move_tensors(sae, NULL, NULL, w, NULL);
}

int sc_sae_save(const sc_sae *sae, const char *path) {
    sc_sae copy = *sae;
    SC_TRY(check_k(sae));
    return save_tensors(path, 8192, write_sae, &copy);
}

/* --- SAELens's cfg.json, beside the weights (jbloomAus/SAELens, versions 2 to 6) --- */

/* The values of a configuration; "" and 0 if they are missing. */
typedef struct {
    const char *path;
    char architecture[32], activation[32];
    size_t k, d_in, d_sae;
} saelens;

/* The keys that change what an SAE computes, and their values for what is computed here. */
static const char *const saelens_rules[][2] = {
    { "architecture", "standard|topk|jumprelu" }, { "activation_fn", "relu|topk" },
    { "activation_fn_str", "relu|topk" }, { "apply_b_dec_to_input", "true" },
    { "normalize_activations", "none|false|null" }, { "reshape_activations", "none|null" },
    { "finetuning_scaling_factor", "false|null" },
    { "rescale_acts_by_decoder_norm", "false|null" }, { "hook_head_index", "null" },
    { "meta.hook_head_index", "null" }, { "metadata.hook_head_index", "null" } };

static int take_saelens(void *context, const char *key, const char *value) {
    saelens *c = context;
    size_t *number = NULL;
    double found;
    for (size_t i = 0; i < COUNT(saelens_rules); i++) {
        const char *allowed = saelens_rules[i][1];
        if (strcmp(key, saelens_rules[i][0]) == 0 && !is_choice(allowed, value))
            return fail("%s: %s is %s (expected %s)", c->path, key, value, allowed);
    }
    if (strcmp(key, "architecture") == 0) strcpy(c->architecture, value);
    if (strcmp(key, "activation_fn") == 0 || strcmp(key, "activation_fn_str") == 0)
        strcpy(c->activation, value);            /* one of the values above, which fit */
    if (strcmp(key, "k") == 0 || strcmp(key, "activation_fn_kwargs.k") == 0) number = &c->k;
    if (strcmp(key, "d_in") == 0) number = &c->d_in;
    if (strcmp(key, "d_sae") == 0) number = &c->d_sae;
    if (!number || strcmp(value, "null") == 0) return SC_OK;
    if (parse_number(value, key, 1, 1e9, &found) != SC_OK || found != floor(found))
        return fail("%s: %s is %s (expected a whole number from 1 on)", c->path, key, value);
    if (*number && *number != (size_t)found)
        return fail("%s: %s is %s (expected %zu, as the file says before)", c->path, key, value,
                    *number);
    *number = (size_t)found;
    return SC_OK;
}

/* Reads a cfg.json if there is one. */
static int read_saelens(saelens *c) {
    enum { MOST = 1 << 20 };
    FILE *file = fopen(c->path, "r");
    if (!file && errno == ENOENT) return SC_OK;
    if (!file) return fail("%s: cannot be opened: %s", c->path, strerror(errno));
    char *text = new_array(MOST + 1, 1);
    size_t length = text ? fread(text, 1, MOST, file) : 0;
    int status = text ? SC_OK : SC_FAILED;
    if (status == SC_OK && ferror(file)) status = fail("%s: cannot be read", c->path);
    fclose(file);
    if (status == SC_OK && length == MOST)
        status = fail("%s: too long for a configuration", c->path);
    if (status == SC_OK) status = json_scalars(text, length, c->path, take_saelens, c);
    free(text);
    return status;
}

/* Writes the cfg.json of a folder in the form that SAELens 3 to 6 read. Hook points have the
 * names of TransformerLens. */
static int write_saelens(const sc_sae *sae, const char *path) {
    static const char *const places[] = { "attn_out", "mlp_out", "resid_post" };
    const char *model = sae->origin.text[SC_MODEL];
    sc_output out;
    SC_TRY(output_open(&out, path));
    FILE *f = out.file;
    size_t layer = sae->layer ? sae->layer - 1 : 0;          /* SAELens counts from 0 */
    fprintf(f, "{\n  \"architecture\": \"%s\",\n  \"d_in\": %zu,\n  \"d_sae\": %zu,\n",
            architecture_of(sae), sae->d_in, sae->d_sae);
    if (sae->topk)
        fprintf(f, "  \"k\": %zu,\n  \"activation_fn_str\": \"topk\",\n"
                "  \"activation_fn_kwargs\": {\"k\": %zu},\n", sae->k, sae->k);
    else
        fputs("  \"activation_fn_str\": \"relu\",\n  \"activation_fn_kwargs\": {},\n", f);
    fputs("  \"dtype\": \"float32\",\n  \"device\": \"cpu\",\n  \"apply_b_dec_to_input\": true,\n"
          "  \"normalize_activations\": \"none\",\n  \"reshape_activations\": \"none\",\n"
          "  \"finetuning_scaling_factor\": false,\n  \"model_name\": ", f);
    print_json(f, *model ? model : "unknown");
    if (sae->hook >= 0)
        fprintf(f, ",\n  \"hook_name\": \"blocks.%zu.hook_%s\"", layer, places[sae->hook]);
    else fputs(",\n  \"hook_name\": \"unknown\"", f);
    fprintf(f, ",\n  \"hook_layer\": %zu,\n  \"hook_head_index\": null,\n"
            "  \"context_size\": 1,\n  \"prepend_bos\": false,\n  \"dataset_path\": \"\",\n"
            "  \"dataset_trust_remote_code\": false,\n  \"sae_lens_training_version\": null\n}\n",
            layer);
    return output_commit(&out);
}

/* Metadata and cfg.json must agree. A file with k and without architecture is a TopK SAE, and so is
 * SAELens's standard one whose activation function is topk. */
static int read_architecture(sc_sae *sae, const sc_safetensors *file, const saelens *config) {
    const char *other = config->path, *told = config->architecture;
    const char *said = sc_metadata_find(file, "architecture");
    int threshold = sc_tensor_find(file, "threshold") != NULL;
    size_t k = config->k;
    if (strcmp(config->activation, "topk") == 0) told = "topk";
    if (said && *told && strcmp(said, told) != 0)
        return fail("%s: architecture is %s (expected %s, as %s says)", file->path, said, told,
                    other);
    SC_TRY(metadata_number(file, "k", (double)sae->d_sae, &k));
    if (config->k && k != config->k)
        return fail("%s: k is %zu (expected %zu, as %s says)", file->path, k, config->k, other);
    if (k > sae->d_sae)
        return fail("%s: k is %zu (expected 1 to %zu, the number of latents)", other, k,
                    sae->d_sae);
    sae->k = k;
    if (*told) said = told;
    if (!said) said = k > 0 ? "topk" : "standard";
    sae->topk = strcmp(said, "topk") == 0;
    int jumprelu = strcmp(said, "jumprelu") == 0;
    if (!sae->topk && !jumprelu && strcmp(said, "standard") != 0)
        return fail("%s: architecture '%s' (expected standard, topk or jumprelu)", file->path,
                    said);
    if (threshold && !jumprelu)
        return fail("%s: tensor threshold without architecture jumprelu (expected that in its "
                    "metadata or in cfg.json)", file->path);
    if (!jumprelu) return SC_OK;
    sae->threshold = new_array(sae->d_sae, sizeof *sae->threshold);
    return sae->threshold ? SC_OK : SC_FAILED;
}

/* Refuses tensors beside those of the SAE, which may change what it computes. Harmless are the
 * tensors of checkpoints and counters of training. */
static int check_sae_tensors(const sc_sae *sae, const sc_safetensors *file) {
    static const sc_trainer none;
    static const char *const harmless[] = {
        "silent", "threshold", "sparsity", "log_sparsity", "act_freq_scores",
        "n_forward_passes_since_fired", "num_batches_not_active" };
    float_tensor list[STATE_TENSORS];
    size_t count = list_tensors(sae, &none, list);
    for (size_t t = 0; t < file->tensors; t++) {
        const char *name = file->tensor[t].name;
        int known = 0;
        for (size_t i = 0; i < count; i++) known |= strcmp(name, list[i].name) == 0;
        for (size_t i = 0; i < COUNT(harmless); i++) known |= strcmp(name, harmless[i]) == 0;
        if (!known)
            return fail("%s: tensor %.100s may change what the SAE computes (expected W_enc, "
                        "b_enc, W_dec, b_dec, and threshold of a JumpReLU SAE)", file->path, name);
    }
    return SC_OK;
}

static int check_thresholds(const sc_sae *sae, const char *path) {
    for (size_t j = 0; sae->threshold && j < sae->d_sae; j++)
        if (sae->threshold[j] < 0)
            return fail("%s: threshold[%zu] is %g (expected at least 0)", path, j,
                        (double)sae->threshold[j]);
    return SC_OK;
}

static int read_sae(sc_sae *sae, const sc_safetensors *file, const saelens *config) {
    const sc_tensor *encoder = sc_tensor_find(file, "W_enc");
    const char *start = sc_metadata_find(file, "b_dec_start");
    if (!encoder || encoder->rank != 2 || encoder->count == 0)
        return fail("%s: not an SAE (expected a tensor W_enc [d_in, d_sae])", file->path);
    SC_TRY(new_sae(sae, encoder->shape[0], encoder->shape[1]));
    if ((config->d_in && config->d_in != sae->d_in)
        || (config->d_sae && config->d_sae != sae->d_sae))
        return fail("%s: an SAE [%zu, %zu] (expected [%zu, %zu], as %s says)", file->path,
                    sae->d_in, sae->d_sae, config->d_in, config->d_sae, config->path);
    SC_TRY(check_sae_tensors(sae, file));
    SC_TRY(read_architecture(sae, file, config));
    SC_TRY(move_tensors(sae, NULL, file, NULL, NULL));
    SC_TRY(check_thresholds(sae, file->path));
    SC_TRY(read_origin(&sae->origin, file));
    sae->layer = (size_t)strtoul(sae->origin.text[SC_LAYER], NULL, 10);
    sae->hook = find_hook(sae->origin.text[SC_HOOK]);
    sae->path = copy_string(file->path);
    if (!sae->path) return SC_FAILED;
    if (start) sae->b_dec_start = copy_string(start);
    return start && !sae->b_dec_start ? SC_FAILED : SC_OK;
}

static const char saelens_weights[] = "sae_weights.safetensors";

/* Opens a file, with the cfg.json beside it if there is one, or a folder of SAELens. */
int sc_sae_open(sc_sae *sae, const char *path) {
    char weights[MAX_PATH], folder[MAX_PATH], cfg[MAX_PATH];
    saelens config = { .path = cfg };
    sc_safetensors file;
    struct stat about;
    int is_folder = stat(path, &about) == 0 && S_ISDIR(about.st_mode);
    *sae = (sc_sae){ 0 };
    SC_TRY(join_path(is_folder ? path : "", is_folder ? saelens_weights : path, weights));
    snprintf(folder, sizeof folder, "%.*s", (int)(base_name(weights) - weights), weights);
    SC_TRY(join_path(folder, "cfg.json", cfg));
    SC_TRY(sc_safetensors_open(&file, weights));
    int status = read_saelens(&config);
    if (status == SC_OK) status = read_sae(sae, &file, &config);
    sc_safetensors_close(&file);
    if (status != SC_OK) sc_sae_close(sae);
    return status;
}

/* A digest of the SAE's weights and settings, by which statistics of another SAE are refused. */
static uint64_t sae_digest(const sc_sae *sae) {
    digest64 d = { 0 };
    const uint64_t numbers[] = { sae->d_in, sae->d_sae, (uint64_t)sae->topk,
                                 sae->topk ? sae->k : 0 };
    for (size_t i = 0; i < COUNT(numbers); i++) digest64_number(&d, numbers[i]);
    for (size_t j = 0; j < sae->d_sae; j++) digest64_number(&d, bits_of_float(sae->b_enc[j]));
    for (size_t j = 0; sae->threshold && j < sae->d_sae; j++)
        digest64_number(&d, bits_of_float(sae->threshold[j]));
    for (size_t i = 0; i < sae->d_in; i++) digest64_number(&d, bits_of_float(sae->b_dec[i]));
    for (size_t j = 0; j < sae->d_sae; j++) {
        for (size_t i = 0; i < sae->d_in; i++) {
            uint64_t encoder = bits_of_float(sae->W_enc[j * sae->stride + i]);
            digest64_number(&d, encoder << 32 | bits_of_float(sae->W_dec[j * sae->stride + i]));
        }
    }
    return digest64_value(&d);
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
    size_t T, D, stride;             /* tokens per image, width, width padded to 16 */
    size_t grid;                     /* patches per side, 0 where the tokens are not a grid */
    size_t first_patch;              /* 1 where token 0 is the class token */
    size_t first_token;              /* of the model's tokens, the first that is kept */
    sc_origin origin;                /* without the hook point where a model runs */
    size_t taps;
    sc_tap tap[SC_MAX_TAPS];         /* hook points; out: [room, T, stride] */
    size_t *image, *draw;            /* [room], indices in the data set and in the order */
    int64_t *label;                  /* [room], -1 without */
    unsigned char *pixels;           /* [room, S, S, 3] */
    float *logits;                   /* [room, classes], where they are asked for */
    size_t count;                    /* images in the current batch */
    size_t used;                     /* images in the batches before it */
    size_t drawn, bad;               /* the next draw; images passed over as bad */
    memory_list memory;
    int is_file, skip_bad;
    sc_safetensors file;             /* saved activations, where is_file */
    const sc_tensor *activations;
    sc_images set;                   /* the images; of saved activations only their labels */
    sc_model model;
    sc_preprocess preprocess;
    draw_function *order;
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
    char reason[sizeof error_text];
    size_t image = f->image[token / f->T];
    const char *name = image_name(f, image);
    memcpy(reason, error_text, sizeof reason);
    return fail("image %zu%s%s, token %zu: %s", image, *name ? " " : "", name, token % f->T,
                reason);
}

/* Opens saved activations. A file without the digest of its data set gets that of its labels. */
static int open_activations(feed *f, const options *o) {
    SC_TRY(sc_safetensors_open(&f->file, o->acts));
    const sc_tensor *a = f->activations = sc_tensor_find(&f->file, "activations");
    const char *digest = sc_metadata_find(&f->file, "data_digest");
    digest64 labels = { 0 };
    if (!a || a->rank != 3 || a->count == 0)
        return fail("%s: not saved activations (expected a tensor activations [images, tokens, "
                    "width])", o->acts);
    f->is_file = 1;
    f->T = a->shape[1];
    f->D = a->shape[2];
    SC_TRY(read_origin(&f->origin, &f->file));
    f->first_patch = strcmp(f->origin.text[SC_TOKENS], "patches") != 0;
    f->set.limit = SIZE_MAX;
    SC_TRY(add_images(&f->set, &f->file, a->shape[0], -1, NULL));
    for (size_t i = 0; i < f->set.count; i++)
        digest64_number(&labels, (uint64_t)f->set.image[i].label);
    f->set.digest = digest ? (uint64_t)strtoull(digest, NULL, 16) : digest64_value(&labels);
    if (o->limit && (size_t)o->limit < f->set.count) {
        f->set.count = (size_t)o->limit;
        f->set.digest = digest64_step(f->set.digest, f->set.count);  /* another data set */
    }
    return SC_OK;
}

/* side: of the model's images; square: 0 for none; crop: "torchvision" or "hf" */
static void set_preprocessing(feed *f, size_t side, size_t square, const char *crop) {
    f->preprocess = (sc_preprocess){ .size = (int)side, .square = (int)square,
                                     .crop_hf = strcmp(crop, "hf") == 0 };
}

static int open_photos(feed *f, const options *o) {
    f->skip_bad = o->skip_bad;
    return sc_images_open(&f->set, o->operand[0], (size_t)o->limit);
}

/* The origin as far as options give it. */
static void options_origin(const options *o, sc_origin *said) {
    const char *text[SC_ORIGIN_KEYS] = {
        [SC_MODEL] = o->model ? base_name(o->model) : NULL, [SC_HOOK] = o->hook,
        [SC_TOKENS] = o->tokens, [SC_MEAN] = o->settings.mean, [SC_STD] = o->settings.std,
        [SC_GELU] = o->settings.gelu, [SC_EPSILON] = o->settings.epsilon,
        [SC_HEADS] = o->settings.heads, [SC_CROP] = o->crop };
    size_t room = sizeof *said->text;
    *said = (sc_origin){ 0 };
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++)
        if (text[k]) snprintf(said->text[k], room, "%s", text[k]);
    if (o->layer) snprintf(said->text[SC_LAYER], room, "%ld", o->layer);
    if (o->square >= 0) snprintf(said->text[SC_SQUARE], room, "%ld", o->square);
}

/* The origin as far as the SAEs give it, without the model and the hook points. They must agree,
 * except in what an option overrules. */
static int agree_on_origin(sc_origin *wanted, const sc_sae *sae, size_t saes,
                           const sc_origin *said) {
    *wanted = (sc_origin){ 0 };
    for (size_t i = 0; i < saes; i++) {
        for (size_t k = SC_TOKENS; k < SC_ORIGIN_KEYS; k++) {
            const char *here = sae[i].origin.text[k], *before = wanted->text[k];
            if (*here && *before && !*said->text[k] && strcmp(here, before) != 0)
                return fail("%s: trained with %s %s (expected %s, as the SAEs before it)",
                            sae[i].path, origin_keys[k], here, before);
            if (*here) strcpy(wanted->text[k], here);
        }
    }
    return SC_OK;
}

/* Prints floats with the fewest digits that give the same floats again. text: [256] */
static void print_floats(char *text, const float *value, size_t count) {
    for (size_t i = 0; i < count; i++) {
        int digits = 1;
        if (i > 0) *text++ = ',';
        do sprintf(text, "%.*g", digits, (double)value[i]);
        while (strtof(text, NULL) != value[i] && digits++ < 9);
        text += strlen(text);
    }
}

/* A packed set that was resized to a square says so, and how it was cropped. This must agree with
 * the SAEs, unless an option overrules it. */
static int use_packed_square(const feed *f, const sc_origin *said, const char **from) {
    for (size_t k = SC_SQUARE; k <= SC_CROP; k++) {
        const char *packed = sc_metadata_find(&f->set.packed, origin_keys[k]);
        if (!packed || *said->text[k]) continue;
        SC_TRY(check_origin_value(f->set.packed.path, k, packed));
        if (from[k] && strcmp(packed, from[k]) != 0)
            return fail("%s: packed with %s %s (expected %s, as the SAE)", f->set.packed.path,
                        origin_keys[k], packed, from[k]);
        from[k] = packed;
    }
    return SC_OK;
}

/* Opens images and a model. Settings come from the options, else from the SAEs, else from the
 * model's file, else they are the usual ones. */
static int open_model(feed *f, const options *o, const sc_sae *sae, size_t saes) {
    sc_origin said, wanted, *now = &f->origin;
    sc_model *m = &f->model;
    const char *from[SC_ORIGIN_KEYS] = { NULL };
    size_t room = sizeof *now->text;
    options_origin(o, &said);
    SC_TRY(agree_on_origin(&wanted, sae, saes, &said));
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) {
        if (*wanted.text[k]) from[k] = wanted.text[k];
        if (*said.text[k]) from[k] = said.text[k];
    }
    SC_TRY(open_photos(f, o));
    SC_TRY(use_packed_square(f, &said, from));
    if (!from[SC_TOKENS]) from[SC_TOKENS] = "all";
    if (!from[SC_SQUARE]) from[SC_SQUARE] = "0";
    if (!from[SC_CROP]) from[SC_CROP] = "torchvision";
    const sc_model_options settings = { .gelu = from[SC_GELU], .epsilon = from[SC_EPSILON],
        .heads = from[SC_HEADS], .mean = from[SC_MEAN], .std = from[SC_STD] };
    SC_TRY(sc_model_open(m, o->model, &settings));
    f->T = m->tokens;
    f->D = m->width;
    f->first_patch = 1;
    const char *tokens = from[SC_TOKENS], *crop = from[SC_CROP];
    size_t square = (size_t)strtoul(from[SC_SQUARE], NULL, 10);
    if (strcmp(tokens, "cls") == 0) f->T = 1;
    if (strcmp(tokens, "patches") == 0) {
        f->T--;
        f->first_token = 1;
        f->first_patch = 0;
    }
    snprintf(now->text[SC_MODEL], room, "%s", base_name(o->model));
    snprintf(now->text[SC_TOKENS], room, "%s", tokens);
    print_floats(now->text[SC_MEAN], m->mean, 3);
    print_floats(now->text[SC_STD], m->std, 3);
    print_floats(now->text[SC_EPSILON], &m->epsilon, 1);
    snprintf(now->text[SC_GELU], room, "%s", m->activation == QUICK_GELU ? "quick_gelu" : "gelu");
    snprintf(now->text[SC_HEADS], room, "%zu", m->heads);
    snprintf(now->text[SC_SQUARE], room, "%zu", square);
    snprintf(now->text[SC_CROP], room, "%s", crop);
    set_preprocessing(f, m->image_size, square, crop);
    return SC_OK;
}

/* Opens DATA: saved activations (--acts), or images through a model, with the settings of SAEs. */
static int open_feed(feed *f, const options *o, const sc_sae *sae, size_t saes) {
    *f = (feed){ 0 };
    if (o->acts && !o->operand[0]) SC_TRY(open_activations(f, o));
    else if (o->operand[0] && o->model) SC_TRY(open_model(f, o, sae, saes));
    else return usage("no data (expected --acts FILE, or -m MODEL and IMAGES)");
    f->stride = padded(f->D);
    if (f->D > SC_MAX_WIDTH || f->T > SC_MAX_TOKENS || f->T > SIZE_MAX / sizeof(float) / f->stride)
        return fail("%s: activations of %zu tokens x %zu are too large",
                    f->is_file ? f->file.path : f->model.file.path, f->T, f->D);
    size_t patches = f->T - f->first_patch;
    while ((f->grid + 1) * (f->grid + 1) <= patches) f->grid++;
    if (f->grid * f->grid != patches) f->grid = 0;
    return SC_OK;
}

/* Adds a hook point; layer -1 is the last. *place: its index among the taps. Saved activations
 * have a single hook point (layer 0: not known). */
static int add_tap(feed *f, long layer, sc_hook hook, size_t *place) {
    long blocks = (long)f->model.blocks;
    if (!f->is_file && (layer == 0 || layer > blocks || -layer > blocks))
        return fail("%s: layer %ld (expected 1 to %ld, or -1 to -%ld)", f->model.file.path, layer,
                    blocks, blocks);
    sc_tap tap = { .hook = hook, .stride = f->stride };
    if (layer > 0) tap.layer = (size_t)layer;
    else if (!f->is_file) tap.layer = (size_t)(blocks + 1 + layer);
    for (*place = 0; *place < f->taps; ++*place) {
        const sc_tap *there = &f->tap[*place];
        if (f->is_file || (there->layer == tap.layer && there->hook == hook)) return SC_OK;
    }
    f->tap[f->taps++] = tap;                     /* there is room for one tap per SAE */
    return SC_OK;
}

/* Prepares batches of up to `room` images, in an order (NULL: first to last). */
static int start_feed(feed *f, size_t room, draw_function *order, void *context, int with_logits) {
    size_t S = (size_t)f->preprocess.size, T = f->is_file ? f->T : f->model.tokens, deepest = 0;
    for (size_t i = 0; i < f->taps; i++)
        if (f->tap[i].layer > deepest) deepest = f->tap[i].layer;
    if (with_logits) deepest = f->model.blocks;
    if (f->model.blocks) SC_TRY(sc_model_load(&f->model, deepest, with_logits));
    f->order = order;
    f->order_context = context;
    const array_spec arrays[] = {
        ARRAY(f->image, room, 1), ARRAY(f->draw, room, 1), ARRAY(f->label, room, 1),
        ARRAY(f->pixels, room, S * S * 3) };
    SC_TRY(new_arrays(&f->memory, arrays, COUNT(arrays)));
    for (size_t i = 0; i < f->taps; i++) {
        const array_spec out = ARRAY(f->tap[i].out, room, T * f->stride);
        SC_TRY(new_arrays(&f->memory, &out, 1));
    }
    if (!with_logits) return SC_OK;
    return allocate(&f->memory, &f->logits, room, f->model.classes * sizeof *f->logits);
}

/* Reads the image in slot f->count + task: its pixels, or its saved activations. */
static int load_task(void *context, size_t task) {
    feed *f = context;
    size_t i = f->count + task, image = f->image[i], S = (size_t)f->preprocess.size;
    f->label[i] = f->set.image[image].label;
    if (!f->is_file) return load_image(&f->set, image, &f->preprocess, f->pixels + i * S * S * 3);
    for (size_t t = 0; t < f->T; t++) {
        size_t first = (image * f->T + t) * f->D;
        float *out = f->tap[0].out + (i * f->T + t) * f->stride;
        if (sc_tensor_floats(&f->file, f->activations, first, f->D, out) != SC_OK)
            return blame_token(f, i * f->T + t);
    }
    return SC_OK;
}

/* Chooses the next images for the free slots of a batch; returns the end of the slots used.
 * Images that were skipped as bad have no name any more. */
static size_t draw_images(feed *f, size_t want) {
    size_t last = smaller(f->set.count, f->set.limit), end = f->count;
    for (size_t draw = f->drawn; end < want; draw++) {
        size_t image = draw;
        if (f->order && f->order(f->order_context, draw, &image) == SC_END) break;
        if (!f->order && draw >= last) break;
        if (!f->set.image[image].name) continue;
        f->draw[end] = draw;
        f->image[end++] = image;
    }
    return end;
}

/* Fills the batch with `want` images, or fewer at the end; all threads decode at once. With
 * skip_bad a bad image is named once and then skipped. If all are bad this fails, since the
 * order may be endless. */
static int load_images(feed *f, size_t want) {
    while (f->count < want) {
        size_t end = draw_images(f, want);
        if (end == f->count) return SC_OK;
        int status = parallel_for(end - f->count, load_task, f);
        if (status == SC_OK) {
            f->drawn = f->draw[end - 1] + 1;
            f->count = end;
            continue;
        }
        size_t slot = f->count + pool.failed_task;       /* all images before it are loaded */
        f->drawn = f->draw[slot];
        f->count = slot;
        if (status != SC_FAILED || !f->skip_bad) return SC_FAILED;
        char reason[sizeof error_text];
        note("%s; passed over", strcpy(reason, error_text));
        f->set.image[f->image[slot]].name = NULL;
        f->bad++;
        if (f->bad == f->set.count)
            return fail("%s; none of %zu images can be read", reason, f->bad);
    }
    return SC_OK;
}

/* Finite weights may still give numbers that are not finite. rows: [images, count, stride] */
static int check_finite(const feed *f, const float *rows, size_t count, size_t stride) {
    size_t numbers = f->count * count * stride, bad = first_not_finite(rows, numbers);
    if (bad == numbers) return SC_OK;
    fail("%s gives %g (expected a finite number)", f->model.file.path, (double)rows[bad]);
    return blame_token(f, bad / stride * (f->T / count));
}

/* Moves the kept tokens of all images together. */
static void keep_tokens(const feed *f, float *out) {
    if (f->T == f->model.tokens) return;
    for (size_t i = 0; i < f->count; i++)
        memmove(out + i * f->T * f->stride,
                out + (i * f->model.tokens + f->first_token) * f->stride,
                f->T * f->stride * sizeof *out);
}

static int compute_activations(feed *f) {
    size_t S = f->model.image_size, T = f->model.tokens, images;
    for (size_t first = 0; first < f->count; first += images) {
        sc_tap tap[SC_MAX_TAPS];
        float *head = f->logits ? f->logits + first * f->model.classes : NULL;
        images = smaller(f->count - first, FORWARD_IMAGES);
        memcpy(tap, f->tap, sizeof tap);
        for (size_t i = 0; i < f->taps; i++) tap[i].out += first * T * f->stride;
        SC_TRY(sc_model_forward(&f->model, f->pixels + first * S * S * 3, images, tap, f->taps,
                                head));
    }
    for (size_t i = 0; i < f->taps; i++) {
        keep_tokens(f, f->tap[i].out);
        SC_TRY(check_finite(f, f->tap[i].out, f->T, f->stride));
    }
    return f->logits ? check_finite(f, f->logits, 1, f->model.classes) : SC_OK;
}

/* Reads the next batch: f->count images, 0 at the end. */
static int next_batch(feed *f, size_t want) {
    f->used += f->count;
    f->count = 0;
    SC_TRY(load_images(f, want));
    if (f->count > 0 && f->model.blocks && (f->taps || f->logits)) return compute_activations(f);
    return SC_OK;
}

static void close_feed(feed *f) {
    release(&f->memory);
    sc_safetensors_close(&f->file);
    sc_images_close(&f->set);
    sc_model_close(&f->model);
    *f = (feed){ 0 };
}

/* Compares the origin in an SAE's file with that of the data. An option overrules it with a
 * remark; saved activations that differ are refused. */
static int check_origin(const feed *f, const sc_sae *sae, const options *o) {
    sc_origin said, data = f->origin, own = origin_of(sae);
    options_origin(o, &said);
    long from_end = (long)f->model.blocks + 1 + o->layer;
    if (o->layer < 0 && !f->is_file)
        snprintf(said.text[SC_LAYER], sizeof *said.text, "%ld", from_end);
    for (size_t k = SC_LAYER; k <= SC_HOOK; k++)
        if (*said.text[k]) strcpy(data.text[k], said.text[k]);
    for (size_t k; (k = origin_difference(&data, &own)) < SC_ORIGIN_KEYS; *own.text[k] = '\0') {
        if (f->is_file && !*said.text[k])
            return fail("%s: activations of %s %s (expected %s, the SAE's)", f->file.path,
                        origin_keys[k], data.text[k], own.text[k]);
        note("%s: trained with %s %s; now %s", sae->path, origin_keys[k], own.text[k],
             data.text[k]);
    }
    return SC_OK;
}

/* Options overrule the architecture and k of an SAE. */
static int choose_architecture(sc_sae *sae, const options *o) {
    if (o->arch) {
        sae->topk = strcmp(o->arch, "topk") == 0;
        free(sae->threshold);
        sae->threshold = NULL;
    }
    if (o->k) sae->k = (size_t)o->k;
    if (!sae->topk || (sae->k > 0 && sae->k <= sae->d_sae)) return SC_OK;
    if (o->k)
        return usage("--k: %zu (expected 1 to %zu, the number of latents)", sae->k, sae->d_sae);
    return fail("%s: k is %zu (expected 1 to %zu: give --k)", sae->path ? sae->path : o->output,
                sae->k, sae->d_sae);
}

/* Connects an SAE to its hook point, the tap at *place. The hook point is that of the options,
 * else of the SAE, else of the saved activations, else, in training, the MLP of the last block
 * but one. The SAE then has the origin in force. */
static int connect_sae(feed *f, sc_sae *sae, const options *o, int training, size_t *place) {
    int hook = o->hook ? find_hook(o->hook) : sae->hook;
    long layer = o->layer ? o->layer : (long)sae->layer;
    SC_TRY(choose_architecture(sae, o));
    if (sae->d_in != f->D)
        return fail("%s: the SAE has width %zu, the activations have %zu", sae->path, sae->d_in,
                    f->D);
    SC_TRY(check_origin(f, sae, o));
    if (f->is_file) {
        if (o->layer < 0)
            return usage("--layer: %ld (expected a number from 1 for saved activations)", o->layer);
        if (!layer) layer = strtol(f->origin.text[SC_LAYER], NULL, 10);
        if (hook < 0) hook = find_hook(f->origin.text[SC_HOOK]);
    } else if (training) {
        if (!layer) layer = -2;
        if (hook < 0) hook = SC_MLP;
    }
    if (!f->is_file && (!layer || hook < 0))
        return usage("%s: does not name its hook point (expected --layer and --hook)", sae->path);
    SC_TRY(add_tap(f, layer, hook < 0 ? SC_MLP : (sc_hook)hook, place));
    sae->layer = f->tap[*place].layer;
    sae->hook = hook;
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++)
        if (*f->origin.text[k]) strcpy(sae->origin.text[k], f->origin.text[k]);
    return SC_OK;
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

/* A setting that determines the numbers of a run, as metadata of the SAE. */
typedef struct { const char *key; char value[256]; } recipe_row;

enum { RECIPE_ROWS = 32 };

typedef struct {
    const options *o;
    feed data;
    sc_sae sae;
    sc_trainer *trainer;
    size_t batch;                    /* images per step */
    uint64_t *order, epoch;          /* [N], and the epoch it is of; NULL: first to last */
    uint64_t steps, next_draw;
    recipe_row recipe[RECIPE_ROWS];
    size_t rows;
    FILE *log;
    double started;
    char *checkpoint, *previous;     /* the checkpoint's name, and that of the one before */
    const char *config;              /* cfg.json of a folder for SAELens, NULL: none */
    uint64_t saved;                  /* the step of the last checkpoint */
    int checkpoints;                 /* requested, not only after a signal */
} training_run;

/* Set by SIGINT and SIGTERM during training. A second signal ends the program at once. */
static atomic_int stop_signal;

static void ask_to_stop(int number) {
    atomic_store(&stop_signal, number);
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
}

/* A signal that is ignored, as under nohup, stays ignored. */
static void catch_signals(void) {
    static const int signals[] = { SIGINT, SIGTERM };
    struct sigaction ask = { .sa_handler = ask_to_stop, .sa_flags = SA_RESTART }, before;
    sigaddset(&ask.sa_mask, SIGINT);
    sigaddset(&ask.sa_mask, SIGTERM);
    for (size_t i = 0; i < COUNT(signals); i++) {
        sigaction(signals[i], NULL, &before);
        if (before.sa_handler != SIG_IGN) sigaction(signals[i], &ask, NULL);
    }
}

/* Each epoch is a permutation of its own. */
static int training_draw(void *context, size_t draw, size_t *image) {
    training_run *run = context;
    size_t N = run->data.set.count, epoch = draw / N;
    if (run->order && epoch != run->epoch)
        permutation((uint64_t)run->o->seed, epoch, run->order, N);
    run->epoch = epoch;
    *image = run->order ? (size_t)run->order[draw % N] : draw % N;
    return SC_OK;
}

/* --- The recipe: what a resumed run must agree in, and what the SAE's file says of its training */

static void add_text(training_run *run, const char *key, const char *text) {
    if (!text || run->rows == RECIPE_ROWS) return;
    recipe_row *row = &run->recipe[run->rows++];
    row->key = key;
    snprintf(row->value, sizeof row->value, "%s", text);
}

static void add_number(training_run *run, const char *key, double number) {
    char text[32];
    snprintf(text, sizeof text, "%.17g", number);
    add_text(run, key, text);
}

static void write_recipe(training_run *run) {
    const options *o = run->o;
    const sc_sae *sae = &run->sae;
    const sc_origin origin = origin_of(sae);
    add_text(run, "architecture", architecture_of(sae));
    if (sae->topk) add_number(run, "k", (double)sae->k);
    add_number(run, "d_in", (double)sae->d_in);
    add_number(run, "d_sae", (double)sae->d_sae);
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++)
        if (*origin.text[k]) add_text(run, origin_keys[k], origin.text[k]);
    if (!sae->topk) add_number(run, "l1", o->l1);
    add_number(run, "lr", o->lr);
    add_number(run, "warmup", (double)o->warmup);
    add_number(run, "batch", (double)o->batch);
    add_number(run, "seed", o->seed);
    add_number(run, "ghost", o->ghost);
    add_number(run, "dead_window", (double)o->dead_window);
    add_number(run, "b_dec_images", (double)o->b_dec_images);
    add_text(run, "b_dec_start", o->init ? "file" : o->b_dec);
    add_text(run, "order", o->order);
}

static int put_recipe(const training_run *run, sc_writer *w) {
    for (size_t i = 0; i < run->rows; i++)
        SC_TRY(sc_writer_metadata(w, run->recipe[i].key, run->recipe[i].value));
    return put_metadata(w, "steps", "%ju", (uintmax_t)run->trainer->step);
}

static int write_trained(sc_writer *w, void *context) {
    const training_run *run = context;
    SC_TRY(put_recipe(run, w));
    return move_tensors(&run->sae, NULL, NULL, w, NULL);
}

/* A digest of the first MiB of the weights or saved activations. */
static uint64_t source_digest(const training_run *run) {
    const sc_safetensors *source = run->data.is_file ? &run->data.file : &run->data.model.file;
    size_t sample = (size_t)(source->data - source->map) + ((size_t)1 << 20);
    digest64 d = { 0 };
    if (sample > source->size) sample = source->size;
    digest64_add(&d, source->map, sample);
    return digest64_value(&d);
}

/* --- Checkpoints: the SAE, and everything else that training goes on from --- */

/* Writes the state or, if there is no writer, reads it. *sum: a checksum over all tensors, the
 * step and next_draw. */
static int move_state(training_run *run, uint64_t step, uint64_t next_draw,
                      const sc_safetensors *file, sc_writer *w, uint64_t *sum) {
    sc_trainer *t = run->trainer;
    size_t n = run->sae.d_sae;
    digest64 digest = { 0 };
    SC_TRY(move_tensors(&run->sae, t, file, w, &digest));
    if (w) {
        SC_TRY(sc_writer_tensor(w, "silent", SC_I64, 1, &n));
        SC_TRY(sc_writer_integers(w, t->silent, n));
    } else {
        const sc_tensor *silent = sc_tensor_find(file, "silent");
        if (!silent || silent->count != n)
            return fail("%s: missing tensor silent [%zu]", file->path, n);
        SC_TRY(sc_tensor_integers(file, silent, 0, n, t->silent));
    }
    for (size_t j = 0; j < n; j++) digest64_number(&digest, (uint64_t)t->silent[j]);
    digest64_number(&digest, step);
    digest64_number(&digest, next_draw);
    *sum = digest64_value(&digest);
    return SC_OK;
}

static int write_checkpoint(sc_writer *w, void *context) {
    training_run *run = context;
    uint64_t step = run->trainer->step, sum;
    w->out.previous = run->previous;
    SC_TRY(put_recipe(run, w));
    SC_TRY(put_metadata(w, "data_digest", "%ju", (uintmax_t)run->data.set.digest));
    SC_TRY(put_metadata(w, "source_digest", "%ju", (uintmax_t)source_digest(run)));
    SC_TRY(put_metadata(w, "next_draw", "%ju", (uintmax_t)run->next_draw));
    SC_TRY(move_state(run, step, run->next_draw, NULL, w, &sum));
    return put_metadata(w, "checksum", "%ju", (uintmax_t)sum);
}

static int save_checkpoint(training_run *run) {
    if (run->saved == run->trainer->step) return SC_OK;
    run->saved = run->trainer->step;
    return save_tensors(run->checkpoint, 8192, write_checkpoint, run);
}

/* Checks that a key has the same value in a checkpoint and in this run, or is missing in both. */
static int check_key(const sc_safetensors *file, const char *key, const char *expected) {
    const char *found = sc_metadata_find(file, key);
    if (found ? expected && strcmp(found, expected) == 0 : !expected) return SC_OK;
    return fail("%s: a checkpoint of another run: %s is %s there and %s here", file->path, key,
                found ? found : "not given", expected ? expected : "not given");
}

/* Refuses a checkpoint with a key that this run does not have. */
static int check_missing(const training_run *run, const sc_safetensors *file, const char *key) {
    for (size_t i = 0; i < run->rows; i++)
        if (strcmp(run->recipe[i].key, key) == 0) return SC_OK;
    return check_key(file, key, NULL);
}

static int check_recipe(training_run *run, const sc_safetensors *file) {
    char digest[32];
    for (size_t i = 0; i < run->rows; i++)
        SC_TRY(check_key(file, run->recipe[i].key, run->recipe[i].value));
    SC_TRY(check_missing(run, file, "k"));
    SC_TRY(check_missing(run, file, "l1"));
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) SC_TRY(check_missing(run, file, origin_keys[k]));
    snprintf(digest, sizeof digest, "%ju", (uintmax_t)run->data.set.digest);
    SC_TRY(check_key(file, "data_digest", digest));
    snprintf(digest, sizeof digest, "%ju", (uintmax_t)source_digest(run));
    return check_key(file, "source_digest", digest);
}

static int read_checkpoint(training_run *run, const sc_safetensors *file) {
    sc_trainer *t = run->trainer;
    const char *keys[] = { "steps", "next_draw", "checksum" };
    uint64_t number[COUNT(keys)], sum;
    for (size_t i = 0; i < COUNT(keys); i++) {
        const char *text = sc_metadata_find(file, keys[i]);
        if (!text) return fail("%s: not a checkpoint: metadata %s is missing", file->path, keys[i]);
        number[i] = (uint64_t)strtoull(text, NULL, 10);
    }
    SC_TRY(check_recipe(run, file));
    SC_TRY(move_state(run, number[0], number[1], file, NULL, &sum));
    if (sum != number[2]) return fail("%s: damaged: its checksum does not match", file->path);
    if (number[0] > run->steps)
        return usage("%s: a checkpoint of step %ju, but this run ends at step %ju", file->path,
                     (uintmax_t)number[0], (uintmax_t)run->steps);
    run->next_draw = number[1];
    for (; t->step < number[0]; t->step++) {
        t->beta1_power *= 0.9;
        t->beta2_power *= 0.999;
    }
    run->saved = t->step;
    return SC_OK;
}

/* Continues from a checkpoint if there is one. The error that refuses a damaged one names the
 * checkpoint before it. */
static int resume_training(training_run *run) {
    char reason[sizeof error_text];
    sc_safetensors file;
    int before = access(run->previous, F_OK) == 0;
    if (!before && access(run->checkpoint, F_OK) != 0) {
        note("%s: no checkpoint yet, starting from the beginning", run->checkpoint);
        return SC_OK;
    }
    int status = sc_safetensors_open(&file, run->checkpoint);
    if (status == SC_OK) {
        status = read_checkpoint(run, &file);
        sc_safetensors_close(&file);
    }
    if (status == SC_OK || !before) return status;
    memcpy(reason, error_text, sizeof reason);
    return fail("%s; the checkpoint before it is %s", reason, run->previous);
}

/* --- The log: one row per step, appended and flushed --- */

static const char log_header[] = "step,images,tokens,lr,loss,mse,l1,ghost,l0,explained_variance,"
                                 "explained_variance_uncentred,dead,seconds\n";

/* The end of the last row that a resumed run does not write again. */
static off_t end_of_log(FILE *log, uint64_t step) {
    char line[512];
    off_t end = 0;
    while (fgets(line, sizeof line, log) && strchr(line, '\n')) {
        if (end > 0 && strtoull(line, NULL, 10) > step) break;
        end = ftello(log);
    }
    return end;
}

/* Opens and locks the log. The log of a resumed run is cut back to the step at which it
 * continues. */
static int open_log(training_run *run) {
    const char *path = run->o->log;
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    struct stat about;
    off_t end = 0;
    if (!path) return SC_OK;
    int there = stat(path, &about) == 0, regular = !there || S_ISREG(about.st_mode);
    int resumed = run->trainer->step > 0 && there && regular;
    run->log = fopen(path, resumed ? "r+" : regular ? "a" : "w");    /* "a": it may be locked */
    if (!run->log) return write_failed(path, errno);
    if (regular && fcntl(fileno(run->log), F_SETLK, &lock) != 0)
        return write_failed(path, errno == EACCES || errno == EAGAIN ? EBUSY : errno);
    if (resumed) end = end_of_log(run->log, run->trainer->step);
    if (ferror(run->log)) return write_failed(path, errno);
    if (resumed && fseeko(run->log, end, SEEK_SET) != 0) return write_failed(path, errno);
    if (regular && ftruncate(fileno(run->log), end) != 0) return write_failed(path, errno);
    if (end == 0 && (fputs(log_header, run->log) == EOF || fflush(run->log) != 0))
        return write_failed(path, errno);
    return SC_OK;
}

static int log_step(training_run *run, const sc_step *r) {
    uint64_t step = run->trainer->step, images = step * run->batch;
    char words[100];
    if (run->log) {
        if (fprintf(run->log, "%ju,%ju,%ju,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%zu,%.3f\n",
                    (uintmax_t)step, (uintmax_t)images, (uintmax_t)(images * run->data.T), r->lr,
                    r->loss, r->mse, r->l1, r->ghost, r->l0, r->explained_variance,
                    r->explained_variance_uncentred, r->dead, seconds_now() - run->started) < 0
            || fflush(run->log) != 0) return write_failed(run->o->log, errno);
    }
    snprintf(words, sizeof words, ", loss %.5g, L0 %.4g, explained %.3f", r->loss, r->l0,
             r->explained_variance);
    show_progress("step", step, run->steps, images, words);
    return SC_OK;
}

/* --- A run --- */

/* Opens the SAE to start from, whose file may also give the origin, and then the data. */
static int open_run(training_run *run) {
    const options *o = run->o;
    sc_sae *sae = &run->sae;
    feed *f = &run->data;
    size_t place;
    if (o->init) SC_TRY(sc_sae_open(sae, o->init));
    SC_TRY(open_feed(f, o, sae, o->init != NULL));
    size_t n = o->d_sae ? (size_t)o->d_sae : (size_t)o->expansion * f->D;
    if (!o->d_sae && (size_t)o->expansion > SC_MAX_LATENTS / f->D)
        return usage("--expansion: %ld x %zu inputs (expected at most %d latents)", o->expansion,
                     f->D, SC_MAX_LATENTS);
    if (!o->init) SC_TRY(sc_sae_init(sae, f->D, n, (uint64_t)o->seed));
    if (!sae->k) sae->k = 32;
    return connect_sae(f, sae, o, 1, &place);
}

/* Determines the number of steps, the batch and the order of the images. */
static int plan_run(training_run *run) {
    const options *o = run->o;
    const feed *f = &run->data;
    double images = o->epochs * (double)f->set.count;
    run->batch = (size_t)o->batch;
    run->steps = (uint64_t)(o->steps < 0 ? ceil(images / (double)run->batch) : o->steps);
    if (run->batch > SC_MAX_BATCH_TOKENS / f->T)
        return usage("--batch: %zu images of %zu tokens are too many", run->batch, f->T);
    if (strcmp(o->order, "shuffle") != 0) return SC_OK;
    run->epoch = UINT64_MAX;
    return allocate(&run->data.memory, &run->order, f->set.count, sizeof *run->order);
}

/* Prepares the batches. If b_dec starts from images, they are read first, and training begins
 * with the same images. */
static int start_run(training_run *run) {
    const options *o = run->o;
    feed *f = &run->data;
    int start = !o->init && strcmp(o->b_dec, "zeros") != 0 && run->trainer->step == 0, steps = 100;
    size_t images = 0;
    if (start) images = o->b_dec_images ? (size_t)o->b_dec_images : run->batch;
    if (images > f->set.count) images = f->set.count;
    if (!start && run->trainer->step == run->steps) return SC_OK;
    SC_TRY(start_feed(f, images > run->batch ? images : run->batch, training_draw, run, 0));
    f->drawn = (size_t)run->next_draw;
    if (!start) return SC_OK;
    SC_TRY(next_batch(f, images));
    if (f->count < images) return fail("b_dec: only %zu images (expected %zu)", f->count, images);
    if (strcmp(o->b_dec, "mean") == 0) steps = 0;
    SC_TRY(start_b_dec(&run->sae, f->tap[0].out, images, f->T,
                       strcmp(o->b_dec, "geomedian-images") == 0, steps));
    f->drawn = f->count = 0;
    return SC_OK;
}

/* Adds the step to an error, and the image and token if there is one. */
static int blame_step(const training_run *run, size_t token) {
    char reason[sizeof error_text];
    if (token != SIZE_MAX) blame_token(&run->data, token);
    memcpy(reason, error_text, sizeof reason);
    return fail("step %ju%s %s", (uintmax_t)run->trainer->step + 1,
                token == SIZE_MAX ? ":" : ",", reason);
}

static int stop_training(training_run *run) {
    SC_TRY(save_checkpoint(run));
    return fail("stopped by signal %d after step %ju; --resume goes on from %s",
                atomic_load(&stop_signal),
                (uintmax_t)run->trainer->step, run->checkpoint);
}

/* A batch could not be read: saves a checkpoint and reports the reason. */
static int keep_state(training_run *run) {
    char reason[sizeof error_text];
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
        size_t token = SIZE_MAX;
        if (atomic_load(&stop_signal)) return stop_training(run);
        if (next_batch(f, run->batch) != SC_OK) return keep_state(run);
        if (atomic_load(&stop_signal)) return stop_training(run);
        if (train_step(t, f->tap[0].out, f->stride, &result, &token) != SC_OK)
            return blame_step(run, token);
        run->next_draw = f->draw[run->batch - 1] + 1;
        SC_TRY(log_step(run, &result));
        if (run->checkpoints && t->step % (uint64_t)run->o->checkpoint_every == 0)
            SC_TRY(save_checkpoint(run));
    }
    return run->checkpoints ? save_checkpoint(run) : SC_OK;
}

static int run_training(training_run *run) {
    const options *o = run->o;
    SC_TRY(try_output(o->output));
    if (run->checkpoints) SC_TRY(try_output(run->checkpoint));
    SC_TRY(open_run(run));
    SC_TRY(plan_run(run));
    write_recipe(run);
    sc_train_options settings = { .l1 = o->l1, .lr = o->lr, .warmup = (size_t)o->warmup,
                                  .dead_window = (size_t)o->dead_window, .ghost = o->ghost };
    run->trainer = sc_trainer_new(&run->sae, &settings, run->batch * run->data.T);
    if (!run->trainer) return SC_FAILED;
    if (o->resume) SC_TRY(resume_training(run));
    SC_TRY(start_run(run));
    SC_TRY(open_log(run));
    SC_TRY(train_steps(run));
    SC_TRY(save_tensors(o->output, 8192, write_trained, run));
    if (run->config) SC_TRY(write_saelens(&run->sae, run->config));
    if (run->steps > 0 && run->steps < (uint64_t)o->warmup)
        note("all %ju steps lay within the warm-up of %ld: the learning rate never reached --lr "
             "(see --warmup, --epochs)", (uintmax_t)run->steps, o->warmup);
    return SC_OK;
}

/* Trains an SAE. An output that ends with a slash is a folder for SAELens. */
static int train(const options *given) {
    options own = *given;
    const options *o = &own;
    char weights[MAX_PATH], config[MAX_PATH];
    training_run run = { .o = o, .started = seconds_now(),
                         .checkpoints = o->checkpoint || o->resume };
    size_t end = strlen(o->output);
    if (end > 0 && o->output[end - 1] == '/') {
        SC_TRY(join_path(o->output, "cfg.json", config));
        SC_TRY(join_path(o->output, saelens_weights, weights));
        if (mkdir(o->output, 0777) != 0 && errno != EEXIST)
            return fail("%s: the folder cannot be made: %s", o->output, strerror(errno));
        run.config = config;
        own.output = weights;
    }
    const char *name = o->checkpoint ? o->checkpoint : o->output;
    catch_signals();
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
 * 20. Data sets through SAEs
 *
 * The commands that send a data set through the model and through one or several SAEs, in one
 * forward pass: stats and merge, eval, extract, pack, encode, zeroshot. Section 5 defines what they
 * measure. Statistics have the names of PatchSAE (Lim et al., 2025):
 * tasks/compute_sae_feature_data.py.
 * ============================================================================================ */

/* The temporary files of `encode`, one per tensor. */
enum { CODE_ROW, CODE_INDEX, CODE_VALUE, CODE_DENSE, CODE_OUTPUT, CODE_MEANS, SPOOLS };

/* The state of a command: run_command() makes it, close_session() frees it. */
typedef struct {
    options *o;
    size_t saes;                     /* open SAEs */
    sc_sae sae[SC_MAX_TAPS];         /* [saes], as all that follow */
    size_t tap[SC_MAX_TAPS];         /* its place among the hook points of the data */
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
    for (; s->saes < o->saes; s->saes++)
        SC_TRY(sc_sae_open(&s->sae[s->saes], o->sae[s->saes]));
    SC_TRY(open_feed(f, o, s->sae, s->saes));
    for (size_t i = 0; i < s->saes; i++) {
        sc_sae *sae = &s->sae[i];
        SC_TRY(connect_sae(f, sae, o, 0, &s->tap[i]));
        SC_TRY(new_batch(&s->batch[i], sae, MEASURE_IMAGES * f->T));
    }
    return SC_OK;
}

/* Closes the data and frees their statistics; the SAEs stay open. */
static void close_data(session *s) {
    for (size_t i = 0; i < SC_MAX_TAPS; i++) free_batch(&s->batch[i]);
    close_feed(&s->data);
}

static void close_session(session *s) {
    close_data(s);
    for (size_t i = 0; i < SC_MAX_TAPS; i++) sc_sae_close(&s->sae[i]);
    for (size_t i = 0; i < SPOOLS; i++)
        if (s->spool[i]) fclose(s->spool[i]);
    release(&s->memory);
}

/* Sends the next batch through every SAE; SC_END after the last image. total: of images, for the
 * progress line */
static int next_encoded(session *s, size_t total) {
    feed *f = &s->data;
    size_t bad;
    SC_TRY(next_batch(f, MEASURE_IMAGES));
    show_progress("image", f->used, total, f->used, "");
    if (f->count == 0) return SC_END;
    for (size_t i = 0; i < s->saes; i++) {
        const sc_tap *tap = &f->tap[s->tap[i]];
        if (tap->replace) continue;                  /* the forward pass has run the SAE */
        SC_TRY(run_sae(&s->batch[i], tap->out, f->stride, f->count * f->T));
        if (check_batch(&s->batch[i], &bad) != SC_OK) return blame_token(f, bad);
    }
    return SC_OK;
}

static int command_train(session *s) { return train(s->o); }

/* Whether text is "I/N": part I, from 1, of N. */
static int parse_shard(const char *text, size_t *shard, size_t *shards) {
    int end = 0;
    int read = sscanf(text, "%4zu/%4zu%n", shard, shards, &end);
    return read == 2 && !text[end] && *shard > 0 && *shard <= *shards && *shards <= MAX_OPERANDS;
}

/* Restricts the data to shard I of N: images from ceil((I - 1) count / N) up to, but without,
 * ceil(I count / N). Consecutive images are read fastest; the first shard is never empty. */
static int take_shard(feed *f, statistics *s, const char *shard) {
    uint64_t count = f->set.count;
    if (!parse_shard(shard, &s->shard, &s->shards))
        return usage("--shard: invalid value '%s' (expected I/N, I from 1 to N, N at most %d)",
                     shard, MAX_OPERANDS);
    uint64_t round_up = s->shards - 1;
    f->drawn = (size_t)(((s->shard - 1) * count + round_up) / s->shards);
    f->set.limit = (size_t)((s->shard * count + round_up) / s->shards);
    return SC_OK;
}

/* Derives the statistics that are quotients of counts. */
static void finish_statistics(statistics *s) {
    size_t lost = derive_statistics(s);
    if (lost > 0)
        note("means below 2^-64, the unit of exact sums, count as 0 (latents: %zu)", lost);
}

/* Fills s->stats in one pass over a data set, or over a shard of it. */
static int measure(session *s, int reconstruct) {
    const options *o = s->o;
    feed *f = &s->data;
    size_t bad = 0;
    int status;
    SC_TRY(open_session(s));
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    if (o->class_counts && f->set.classes == 0)
        return fail("--class-counts: the data have no labels");
    for (size_t i = 0; i < s->saes; i++) {
        s->batch[i].reconstruct = reconstruct;
        s->stats[i] = (statistics){
            .n = s->sae[i].d_sae, .D = f->D, .T = f->T,
            .K = (size_t)o->top, .P = (size_t)o->top_patches,
            .classes = f->set.classes, .class_name = f->set.class_name,
            .first_patch = f->first_patch, .threshold = o->threshold,
            .data_digest = f->set.digest, .origin = origin_of(&s->sae[i]),
            .batch = &s->batch[i], .image = f->image, .label = f->label };
        SC_TRY(new_statistics(&s->stats[i], &f->memory, o->class_counts));
    }
    size_t total = f->set.count;
    if (o->shard) {
        SC_TRY(take_shard(f, &s->stats[0], o->shard));
        total = f->set.limit - f->drawn;
    }
    while ((status = next_encoded(s, total)) == SC_OK) {
        for (size_t i = 0; i < s->saes; i++) {
            s->stats[i].count = f->count;
            if (count_batch(&s->stats[i], &bad) != SC_OK) return blame_token(f, bad);
        }
    }
    if (status != SC_END) return status;
    for (size_t i = 0; i < s->saes; i++) finish_statistics(&s->stats[i]);
    return SC_OK;
}

/* --- stats and merge --- */

/* A tensor of a statistics file. Its elements are one number or two adjacent ones; in memory they
 * lie `step` bytes apart, as members of a structure. */
typedef struct {
    const char *name;
    void *first;
    size_t step;
    sc_dtype dtype;
    size_t numbers, shape[4];        /* numbers: per element */
} statistics_tensor;

enum { STATISTICS_TENSORS = 15 };

/* Lists the tensors, for writing and reading; returns how many there are: class_counts is optional.
 * A latent fires on image i where a(i), the mean of its f over the image's tokens, is above 0.
 *     sae_sparsity             share of images on which it fires
 *     sae_mean_acts            mean of a(i) over these; 0 if there are none (PatchSAE: NaN)
 *     max_activating_image_*   the K images with the largest a(i); unused entries are 0, -1, -1
 *     max_activating_patch_*   the P patches with the largest f: image and token
 *     top_entropy              see top_entropy() in section 5
 *     class_counts             images on which it fires, or tokens with f above --threshold
 *     *_exact                  128-bit sums of a(i), of f: high and low half
 * tensor: [STATISTICS_TENSORS] */
static size_t list_statistics(const statistics *s, statistics_tensor *tensor) {
    latent_record *l = s->latent;                            /* [n] */
    sc_top *top = s->top, *patch = s->patch;                 /* [n, K], [n, P] */
    int64_t *bin = s->histogram[0], *class = s->class_counts;
    size_t n = s->n, L = sizeof *l, E = sizeof *top, I = sizeof *bin;
    const statistics_tensor all[STATISTICS_TENSORS] = {
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
    memcpy(tensor, all, sizeof all);
    return class ? STATISTICS_TENSORS : STATISTICS_TENSORS - 1;
}

static int write_statistics(sc_writer *w, void *context) {
    const statistics *s = context;
    statistics_tensor tensor[STATISTICS_TENSORS];
    size_t tensors = list_statistics(s, tensor);
    char edges[HISTOGRAM_BINS * 20 + 32], *end = edges;      /* of the histogram's bins */
    for (int i = 0; i <= HISTOGRAM_BINS; i++)
        end += sprintf(end, "%c%.9g", i ? ',' : '[', bin_edge(i));
    strcpy(end, "]");
    SC_TRY(put_metadata(w, "images", "%ju", (uintmax_t)s->images));
    SC_TRY(put_origin(w, &s->origin));
    SC_TRY(put_metadata(w, "tokens_per_image", "%zu", s->T));
    SC_TRY(put_metadata(w, "first_patch", "%zu", s->first_patch));
    SC_TRY(put_metadata(w, "data_digest", "%016jx", (uintmax_t)s->data_digest));
    SC_TRY(put_metadata(w, "sae_digest", "%016jx", (uintmax_t)s->sae_digest));
    if (s->shards > 1) SC_TRY(put_metadata(w, "shard", "%zu/%zu", s->shard, s->shards));
    SC_TRY(sc_writer_metadata(w, "histogram_edges", edges));
    if (s->class_name) SC_TRY(write_name_list(w, "class_names", s->class_name, s->classes));
    if (s->threshold >= 0) SC_TRY(put_metadata(w, "threshold", "%.17g", s->threshold));
    for (size_t i = 0; i < tensors; i++) {
        const statistics_tensor *t = &tensor[i];
        const char *place = t->first;
        size_t count = 1;
        int rank = 0;
        for (; t->shape[rank] > 0; rank++) count *= t->shape[rank];
        SC_TRY(sc_writer_tensor(w, t->name, t->dtype, rank, t->shape));
        for (; count > 0; count -= t->numbers, place += t->step)
            SC_TRY(sc_writer_values(w, place, t->numbers, t->dtype));
    }
    return SC_OK;
}

static int save_statistics(const session *s, statistics *stats) {
    size_t room = 16384 + names_room(stats->class_name, stats->classes, 8);
    return save_tensors(s->o->output, room, write_statistics, stats);
}

static int command_stats(session *s) {
    SC_TRY(try_output(s->o->output));
    SC_TRY(measure(s, 0));
    s->stats[0].sae_digest = sae_digest(&s->sae[0]);
    return save_statistics(s, &s->stats[0]);
}

/* 0 where the file does not say. */
static uint64_t number_in(const sc_safetensors *file, const char *key, int base) {
    const char *text = sc_metadata_find(file, key);
    return text ? strtoull(text, NULL, base) : 0;
}

/* Reads the sizes and the metadata of a statistics file. */
static int read_statistics_sizes(statistics *s, const sc_safetensors *file) {
    const sc_tensor *top = sc_tensor_find(file, "max_activating_image_values");
    const sc_tensor *patch = sc_tensor_find(file, "max_activating_patch_values");
    const sc_tensor *class = sc_tensor_find(file, "class_counts");
    const char *threshold = sc_metadata_find(file, "threshold");
    const char *shard = sc_metadata_find(file, "shard");
    int lists = top && top->rank == 2 && patch && patch->rank == 2;
    if (!lists || top->count == 0 || patch->count == 0 || !sc_metadata_find(file, "data_digest")
        || !sc_metadata_find(file, "sae_digest"))
        return fail("%s: not statistics (expected a file that stats wrote)", file->path);
    *s = (statistics){ .n = top->shape[0], .K = top->shape[1], .P = patch->shape[1],
                       .threshold = -1, .shard = 1, .shards = 1 };
    s->images = number_in(file, "images", 10);
    s->T = (size_t)number_in(file, "tokens_per_image", 10);
    s->first_patch = (size_t)number_in(file, "first_patch", 10);
    s->data_digest = number_in(file, "data_digest", 16);
    s->sae_digest = number_in(file, "sae_digest", 16);
    if (class) s->classes = class->shape[0];
    if (threshold) s->threshold = atof(threshold);
    if (shard && !parse_shard(shard, &s->shard, &s->shards))
        return fail("%s: shard '%.50s' (expected I/N)", file->path, shard);
    return read_origin(&s->origin, file);
}

/* Reads the names of the classes, where there are any, into new memory. */
static int read_class_names(statistics *s, const sc_safetensors *file, memory_list *memory) {
    const char *list = sc_metadata_find(file, "class_names");
    char **name;
    if (!list) return SC_OK;
    SC_TRY(json_string_array(list, file->path, &name, &s->classes));
    int status = allocate(memory, &s->class_name, s->classes, sizeof *name);
    for (size_t c = 0; c < s->classes && status == SC_OK; c++) {
        status = allocate(memory, &s->class_name[c], strlen(name[c]) + 1, 1);
        if (status == SC_OK) strcpy(s->class_name[c], name[c]);
    }
    free(name);
    return status;
}

static int read_statistics_tensor(const sc_safetensors *file, const statistics_tensor *t) {
    const sc_tensor *from = sc_tensor_find(file, t->name);
    char *place = t->first;
    size_t size = sc_dtype_size(t->dtype);
    if (!from || from->dtype != t->dtype || memcmp(from->shape, t->shape, sizeof t->shape) != 0)
        return fail("%s: tensor %s is missing or does not fit the others", file->path, t->name);
    for (size_t i = 0; i < from->count; i += t->numbers) {
        float finite[2];
        if (t->dtype == SC_F32)                      /* refuses a value that is not finite */
            SC_TRY(sc_tensor_floats(file, from, i, t->numbers, finite));
        copy_numbers(place, from->data + i * size, t->numbers, size);
        place += t->step;
    }
    return SC_OK;
}

/* Reads statistics into new arrays, which are freed with `memory`. */
static int read_statistics(statistics *s, const char *path, memory_list *memory) {
    statistics_tensor tensor[STATISTICS_TENSORS];
    sc_safetensors file;
    size_t tensors = 0;
    SC_TRY(sc_safetensors_open(&file, path));
    int counts = sc_tensor_find(&file, "class_counts") != NULL;
    int status = read_statistics_sizes(s, &file);
    if (status == SC_OK) status = read_class_names(s, &file, memory);
    if (status == SC_OK) status = new_statistics(s, memory, counts);
    if (status == SC_OK) tensors = list_statistics(s, tensor);
    for (size_t i = 0; i < tensors && status == SC_OK; i++)
        status = read_statistics_tensor(&file, &tensor[i]);
    for (size_t j = 0; j < s->n && status == SC_OK; j++) {
        const latent_record *l = &s->latent[j];
        int possible = l->images >= 0 && (uint64_t)l->images <= s->images && l->sparsity >= 0
                       && l->sparsity <= 1 && l->mean >= 0 && l->entropy <= 100;
        if (!possible) status = fail("%s: latent %zu: impossible statistics", path, j);
    }
    sc_safetensors_close(&file);
    return status;
}

/* Adds a shard to `all`. Sums are exact and lists keep the largest in one order, so that the shards
 * may come in any order. */
static void add_statistics(statistics *all, const statistics *part) {
    size_t n = all->n, K = all->K, P = all->P;
    all->images += part->images;
    for (size_t j = 0; j < n; j++) {
        latent_record *to = &all->latent[j];
        const latent_record *from = &part->latent[j];
        to->images += from->images;
        to->tokens += from->tokens;
        exact_add(&to->means, from->means);
        exact_add(&to->activations, from->activations);
    }
    for (size_t i = 0; i < n * K; i++) keep_largest(all->top + i - i % K, K, part->top[i]);
    for (size_t i = 0; i < n * P; i++) keep_largest(all->patch + i - i % P, P, part->patch[i]);
    for (size_t b = 0; b < HISTOGRAM_BINS; b++) all->histogram[0][b] += part->histogram[0][b];
    if (!all->class_counts) return;
    for (size_t i = 0; i < all->classes * n; i++) all->class_counts[i] += part->class_counts[i];
}

/* Refuses a shard that is not of the same run as the first one. */
static int check_shard(const char *path, const statistics *part, const char *first_path,
                       const statistics *first) {
    const char *differs = NULL;
    size_t key = origin_difference(&part->origin, &first->origin);
    if (part->sae_digest != first->sae_digest) differs = "SAE";
    else if (part->data_digest != first->data_digest) differs = "data set";
    else if (part->threshold != first->threshold) differs = "--threshold";
    else if (part->T != first->T || part->first_patch != first->first_patch) differs = "tokens";
    else if (part->n != first->n || part->K != first->K || part->P != first->P) differs = "--top";
    else if (!part->class_counts != !first->class_counts) differs = "--class-counts";
    else if (part->classes != first->classes) differs = "classes";
    else if (part->shards != first->shards) differs = "number of shards";
    else if (key < SC_ORIGIN_KEYS) differs = origin_keys[key];
    if (!differs) return SC_OK;
    return fail("%s: differs from %s in its %s", path, first_path, differs);
}

/* Joins the shards of a data set to the bytes that one run over all of it writes. */
static int command_merge(session *s) {
    const char *const *path = s->o->operand;
    unsigned char seen[MAX_OPERANDS + 1] = { 0 };            /* [shards + 1] */
    statistics all, part;
    SC_TRY(try_output(s->o->output));
    SC_TRY(read_statistics(&all, path[0], &s->memory));
    size_t shards = all.shards;
    seen[all.shard] = 1;
    for (size_t i = 1; path[i]; i++) {
        memory_list memory = NULL;
        int status = read_statistics(&part, path[i], &memory);
        if (status == SC_OK) status = check_shard(path[i], &part, path[0], &all);
        if (status == SC_OK && seen[part.shard]++)
            status = fail("%s: shard %zu of %zu is given twice", path[i], part.shard, shards);
        if (status == SC_OK) add_statistics(&all, &part);
        release(&memory);
        SC_TRY(status);
    }
    for (size_t i = 1; i <= shards; i++)
        if (!seen[i])
            return fail("%s: one of %zu shards, of which shard %zu is missing", path[0], shards, i);
    all.shards = 1;
    finish_statistics(&all);
    return save_statistics(s, &all);
}

/* --- Tables ---
 *
 * A table is an array of cells, [rows, columns]. A cell has its column's name, for CSV and JSON,
 * and its title, for text; it holds a text or, where that is NULL, a number. Text shows "-" for an
 * undefined cell; CSV and JSON give the number that stands for it: -1 for an entropy, else 0. */

typedef struct {
    const char *name, *title, *text;
    double number;
    int undefined;
} table_cell;

static const char *cell_text(const table_cell *cell) {
    if (cell->undefined) return "-";
    if (cell->text) return shown(cell->text);
    char *out = text_room();
    int whole = cell->number == floor(cell->number) && fabs(cell->number) < 1e9;
    snprintf(out, TEXT_ROOM, whole ? "%.0f" : "%.4g", cell->number);
    return out;
}

/* A line of titles, then one line per row. */
static void print_rows(const table_cell *cells, size_t columns, size_t rows) {
    for (size_t c = 0; c < columns; c++) printf("%-12s", cells[c].title);
    for (size_t i = 0; i < rows * columns; i++) {
        if (i % columns == 0) puts("");
        printf("%-12s", cell_text(&cells[i]));
    }
    puts("");
}

/* One line per column, the rows side by side. */
static void print_columns(const table_cell *cells, size_t columns, size_t rows) {
    for (size_t c = 0; c < columns; c++) {
        printf("%-24s", cells[c].title);
        for (size_t r = 0; r < rows; r++) {
            const char *text = cell_text(&cells[r * columns + c]);
            size_t length = strlen(text);
            if (length > 22) text += length - 22;    /* the end of a path says most */
            printf("  %22s", text);
        }
        puts("");
    }
}

/* A CSV field: quotes are doubled; a text that a spreadsheet could take for a formula gets a '. */
static void print_csv_text(const char *text) {
    putchar('"');
    if (*text && text[1] && strchr("=+-@", *text)) putchar('\'');
    for (const char *c = shown(text); *c; c++) {
        if (*c == '"') putchar('"');
        putchar(*c);
    }
    putchar('"');
}

static void print_csv(const table_cell *cells, size_t columns, size_t rows) {
    for (size_t c = 0; c < columns; c++) printf("%s%s", c ? "," : "", cells[c].name);
    for (size_t i = 0; i < rows * columns; i++) {
        putchar(i % columns ? ',' : '\n');
        if (cells[i].text) print_csv_text(cells[i].text);
        else printf("%.9g", cells[i].number);
    }
    puts("");
}

/* A list of objects, one per row. */
static void print_json_table(const table_cell *cells, size_t columns, size_t rows) {
    for (size_t i = 0; i < rows * columns; i++) {
        const char *mark = ", ";
        if (i % columns == 0) mark = "},\n  {";
        if (i == 0) mark = "[\n  {";
        printf("%s\"%s\": ", mark, cells[i].name);
        if (cells[i].text) print_json(stdout, cells[i].text);
        else printf("%.9g", cells[i].number);
    }
    puts("}\n]");
}

/* Prints a table of at least one row; format: text, csv or json. */
static int print_table(const char *format, const table_cell *cells, size_t columns, size_t rows,
                       void (*print)(const table_cell *cells, size_t columns, size_t rows)) {
    if (strcmp(format, "json") == 0) print = print_json_table;
    if (strcmp(format, "csv") == 0) print = print_csv;
    print(cells, columns, rows);
    return end_of_output();
}

/* --- eval --- */

enum { EVAL_COLUMNS = 22 };

/* The metrics of sc_metrics_plain(), from sums over tokens. */
static sc_metrics find_metrics(const statistics *s) {
    double tokens = (double)(s->images * s->T);
    double numbers = tokens * (double)s->D;
    double error = running_total(&s->squared_error);
    double active = running_total(&s->l0);
    double sum_f = running_total(&s->l1);
    double x2 = 0, mean2 = 0;
    sc_metrics m = { .mse = running_total(&s->mse) / numbers, .mse_raw = error / numbers,
                     .l0 = active / tokens, .l1 = sum_f / tokens };
    for (size_t d = 0; d < s->D; d++) {
        double mean = running_total(&s->x[d][0]) / tokens;
        mean2 += mean * mean;
        x2 += running_total(&s->x[d][1]);
    }
    double variance = x2 - tokens * mean2;
    if (variance > 0) m.explained_variance = 1 - error / variance;
    m.explained_variance_uncentred = 1 - error / x2;
    if (active > 0) m.mean_activation = sum_f / active;
    return m;
}

/* One row of eval's table: sc_metrics, defined in saeclip.h and section 5, and
 *     mean_sae_mean_acts   the mean of sae_mean_acts over the latents that fire
 *     l0_fraction          l0 / n
 *     entropy_mean         the mean of top_entropy over the latents where it is defined
 * row: [EVAL_COLUMNS] */
static void evaluate(const statistics *s, const sc_sae *sae, const char *data, table_cell *row) {
    const char *start = sae->b_dec_start, *kind = "ReLU", *hook = "?", *bias = "?";
    const sc_metrics m = find_metrics(s);
    double n = (double)s->n, means = 0, mean = 0;
    double entropy = -1, entropy_sum = 0, entropies = 0;     /* entropies: latents that have one */
    double always = 0, on[3] = { 0 };                        /* latents; on 0, 1, 2 images */
    for (size_t j = 0; j < s->n; j++) {
        int64_t images = s->latent[j].images;
        double e = top_entropy(s->top + j * s->K, s->K);
        means += mean_activation(&s->latent[j]);
        always += images == (int64_t)s->images;
        if (images < 3) on[images]++;
        if (e < 0) continue;
        entropy_sum += e;
        entropies++;
    }
    if (on[0] < n) mean = means / (n - on[0]);
    if (entropies > 0) entropy = entropy_sum / entropies;
    if (sae->threshold) kind = "JumpReLU";
    if (sae->topk) kind = "TopK";
    if (sae->hook >= 0) hook = hook_names[sae->hook];
    if (start) bias = strstr(start, "geomedian") ? "yes" : "no";
    const table_cell cells[EVAL_COLUMNS] = {
        { "sae", "SAE", sae->path, 0, 0 },
        { "data", "data", data, 0, 0 },
        { "output", "CLIP output", hook, 0, 0 },
        { "activation", "activation", kind, 0, 0 },
        { "geometric_bias", "geometric bias", bias, 0, 0 },
        { "mse", "MSE", NULL, m.mse, 0 },                    /* over ||x||, PatchSAE's */
        { "mse_raw", "MSE raw", NULL, m.mse_raw, 0 },
        { "explained_variance", "explained variance", NULL, m.explained_variance, 0 },
        { "explained_variance_uncentred", "  uncentred", NULL, m.explained_variance_uncentred, 0 },
        { "mean_activation", "mean activation", NULL, m.mean_activation, m.l0 == 0 },
        { "mean_sae_mean_acts", "mean of latents' means", NULL, mean, on[0] == n },
        { "l0", "L0 per token", NULL, m.l0, 0 },
        { "l0_fraction", "L0 / latents", NULL, m.l0 / n, 0 },
        { "l1", "L1 per token", NULL, m.l1, 0 },             /* without lambda */
        { "entropy_mean", "entropy", NULL, entropy, entropy < 0 },
        { "entropy_sum", "entropy sum", NULL, entropy_sum, entropy < 0 },
        { "entropy_latents", "latents with entropy", NULL, entropies, 0 },
        { "dead", "dead latents", NULL, on[0], 0 },
        { "every_image", "on every image", NULL, always, 0 },
        { "one_image", "on 1 image", NULL, on[1], 0 },
        { "two_images", "on 2 images", NULL, on[2], 0 },
        { "images", "images", NULL, (double)s->images, 0 } };
    memcpy(row, cells, sizeof cells);
}

/* One row per SAE and data set; --also names a second data set. */
static int command_eval(session *s) {
    options *o = s->o;
    const char **data = o->acts ? &o->acts : &o->operand[0];
    table_cell row[2 * SC_MAX_TAPS][EVAL_COLUMNS];
    size_t rows = 0;
    for (;;) {
        SC_TRY(measure(s, 1));
        for (size_t i = 0; i < s->saes; i++)
            evaluate(&s->stats[i], &s->sae[i], *data, row[rows++]);
        if (!o->also) return print_table(o->format, row[0], EVAL_COLUMNS, rows, print_columns);
        close_data(s);
        *data = o->also;
        o->also = NULL;
    }
}

/* --- extract and pack --- */

/* Writes the labels, if there are any, and the names of the classes. An image that was passed over
 * as bad has lost its name and is not in the file. */
static int write_labels(sc_writer *w, const sc_images *set) {
    const size_t shape = SC_ROWS;
    if (set->classes == 0) return SC_OK;
    SC_TRY(sc_writer_tensor(w, "labels", SC_I64, 1, &shape));
    for (size_t i = 0; i < set->count; i++) {
        const sc_image *image = &set->image[i];
        if (image->name) SC_TRY(sc_writer_integers(w, &image->label, 1));
    }
    if (!set->class_name) return SC_OK;
    return write_name_list(w, "class_names", set->class_name, set->classes);
}

/* activations: [images, T, D] */
static int write_activations(sc_writer *w, void *context) {
    session *s = context;
    feed *f = &s->data;
    const sc_tap *tap = &f->tap[0];
    const size_t shape[] = { SC_ROWS, f->T, f->D };
    sc_dtype dtype = strcmp(s->o->dtype, "f16") ? SC_F32 : SC_F16;
    int status;
    SC_TRY(sc_writer_tensor(w, "activations", dtype, 3, shape));
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    while ((status = next_encoded(s, f->set.count)) == SC_OK)
        for (size_t t = 0; t < f->count * f->T; t++)
            SC_TRY(sc_writer_floats(w, tap->out + t * f->stride, f->D));
    if (status != SC_END) return status;
    sc_origin origin = f->origin;
    snprintf(origin.text[SC_LAYER], sizeof *origin.text, "%zu", tap->layer);
    strcpy(origin.text[SC_HOOK], hook_names[tap->hook]);
    SC_TRY(put_origin(w, &origin));
    uintmax_t missing = f->set.count - f->used;              /* they make it another data set */
    uintmax_t digest = f->set.digest + missing;
    SC_TRY(put_metadata(w, "data_digest", "%016jx", digest));
    return write_labels(w, &f->set);
}

static int command_extract(session *s) {
    const char *hook = s->o->hook ? s->o->hook : "mlp";
    const sc_images *set = &s->data.set;
    long layer = s->o->layer ? s->o->layer : -2;
    size_t place;
    SC_TRY(open_session(s));
    SC_TRY(add_tap(&s->data, layer, (sc_hook)find_hook(hook), &place));
    size_t room = 8192 + names_room(set->class_name, set->classes, 8);
    return save_tensors(s->o->output, room, write_activations, s);
}

/* images: [images, S, S, 3] */
static int write_images(sc_writer *w, void *context) {
    session *s = context;
    feed *f = &s->data;
    size_t S = (size_t)f->preprocess.size, images = 0;
    const size_t shape[] = { SC_ROWS, S, S, 3 };
    char **name;
    int status;
    SC_TRY(allocate(&s->memory, &name, f->set.count, sizeof *name));
    SC_TRY(sc_writer_tensor(w, "images", SC_U8, 4, shape));
    while ((status = next_encoded(s, f->set.count)) == SC_OK) {
        for (size_t i = 0; i < f->count; i++)
            name[images++] = (char *)(uintptr_t)image_name(f, f->image[i]);
        SC_TRY(sc_writer_bytes(w, f->pixels, f->count * S * S * 3));
    }
    if (status != SC_END) return status;
    SC_TRY(write_labels(w, &f->set));
    if (s->o->square > 0) {
        SC_TRY(put_metadata(w, "square", "%ld", s->o->square));
        SC_TRY(sc_writer_metadata(w, "crop", s->o->crop ? s->o->crop : "torchvision"));
    }
    return *name[0] ? write_name_list(w, "file_names", name, images) : SC_OK;
}

static int command_pack(session *s) {
    const options *o = s->o;
    feed *f = &s->data;
    const char *crop = o->crop ? o->crop : "torchvision";
    size_t square = o->square > 0 ? (size_t)o->square : 0;
    size_t side = square ? square : (size_t)o->size;
    SC_TRY(open_photos(f, o));
    set_preprocessing(f, side, square, crop);
    size_t room = 4096 + names_room(f->set.class_name, f->set.classes, 4);
    for (size_t i = 0; i < f->set.count; i++) room += 7 * strlen(image_name(f, i)) + 4;
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    return save_tensors(o->output, room, write_images, s);
}

/* --- encode ---
 *
 * A safetensors file has one tensor after the other, but codes come image by image, and how many
 * there are is known at the end. So each tensor grows in a temporary file, which is then copied. */

static int spool_failed(void) {
    return fail("a temporary file cannot be written or read: %s", strerror(errno));
}

/* The sum of f_j over the batch's tokens from `first` up to, but without, `end`. */
static double sum_codes(const sae_batch *b, size_t j, size_t first, size_t end) {
    double sum = 0;
    for (size_t i = 0; i < b->tiles; i++) {
        const tile_codes *tile = &b->tile[i];
        for (size_t c = tile->start[j]; c < tile->start[j + 1]; c++) {
            size_t token = tile->first + tile->token[c];
            if (token >= first && token < end) sum += tile->value[c];
        }
    }
    return sum;
}

/* Writes a tile's codes, by token and then by latent. f: [TILE_TOKENS, n] */
static void spool_tile(const session *s, const tile_codes *tile, float *f) {
    FILE *const *spool = s->spool;
    size_t n = s->sae[0].d_sae, count = tile->tokens * n;
    size_t first = s->data.used * s->data.T + tile->first;   /* the row of the tile's token 0 */
    memset(f, 0, count * sizeof *f);
    for (size_t j = 0; j < n; j++) {
        for (size_t c = tile->start[j]; c < tile->start[j + 1]; c++)
            f[tile->token[c] * n + j] = tile->value[c];
    }
    for (size_t e = 0; e < count; e++) {
        if (!(f[e] > 0)) continue;
        int64_t row = (int64_t)(first + e / n), index = (int64_t)(e % n);
        fwrite(&row, sizeof row, 1, spool[CODE_ROW]);
        fwrite(&index, sizeof index, 1, spool[CODE_INDEX]);
        fwrite(&f[e], sizeof *f, 1, spool[CODE_VALUE]);
    }
    if (spool[CODE_DENSE]) fwrite(f, sizeof *f, count, spool[CODE_DENSE]);
}

/* Writes a batch's rows of every tensor. f: [TILE_TOKENS, n] */
static int spool_batch(const session *s, float *f) {
    const sae_batch *b = &s->batch[0];
    FILE *const *spool = s->spool;
    size_t T = s->data.T, n = b->sae->d_sae, D = b->sae->d_in;
    for (size_t i = 0; i < b->tiles; i++) spool_tile(s, &b->tile[i], f);
    for (size_t t = 0; t < b->T && b->reconstruct; t++)
        fwrite(b->output + t * b->sae->stride, sizeof *b->output, D, spool[CODE_OUTPUT]);
    for (size_t e = 0; e < s->data.count * n && spool[CODE_MEANS]; e++) {
        size_t first = e / n * T;                            /* token 0 of the image */
        float mean = (float)(sum_codes(b, e % n, first, first + T) / (double)T);
        fwrite(&mean, sizeof mean, 1, spool[CODE_MEANS]);
    }
    errno = EIO;                                     /* where an earlier write failed */
    for (size_t i = 0; i < SPOOLS; i++)
        if (spool[i] && (fflush(spool[i]) != 0 || ferror(spool[i]))) return spool_failed();
    return SC_OK;
}

/* Writes the tensors from the temporary files. columns: 0 for a list, [codes]; else the tensor is
 * [tokens or images, columns] */
static int write_codes(sc_writer *w, void *context) {
    session *s = context;
    size_t n = s->sae[0].d_sae, D = s->sae[0].d_in, count;
    int64_t block[512];
    const struct { const char *name; sc_dtype dtype, in_memory; size_t columns; } tensor[SPOOLS] = {
        { "row", SC_I64, SC_I64, 0 },
        { "index", SC_I32, SC_I64, 0 },
        { "value", SC_F32, SC_F32, 0 },
        { "f", SC_F32, SC_F32, n },
        { "reconstruction", SC_F32, SC_F32, D },
        { "image_means", SC_F32, SC_F32, n } };
    for (size_t i = 0; i < SPOOLS; i++) {
        FILE *spool = s->spool[i];
        sc_dtype kind = tensor[i].in_memory;
        size_t size = sc_dtype_size(kind);
        const size_t shape[] = { SC_ROWS, tensor[i].columns };
        if (!spool) continue;
        rewind(spool);
        SC_TRY(sc_writer_tensor(w, tensor[i].name, tensor[i].dtype, shape[1] ? 2 : 1, shape));
        while ((count = fread(block, size, sizeof block / size, spool)) > 0)
            SC_TRY(sc_writer_values(w, block, count, kind));
        if (ferror(spool)) return spool_failed();
    }
    return SC_OK;
}

static int command_encode(session *s) {
    const options *o = s->o;
    feed *f = &s->data;
    const int wanted[SPOOLS] = { 1, 1, 1, o->dense, o->reconstruction, o->image_means };
    float *codes;
    int status;
    SC_TRY(try_output(o->output));
    SC_TRY(open_session(s));
    for (size_t i = 0; i < SPOOLS; i++) {
        if (!wanted[i]) continue;
        s->spool[i] = tmpfile();
        if (!s->spool[i]) return spool_failed();
    }
    s->batch[0].reconstruct = o->reconstruction;
    SC_TRY(allocate(&s->memory, &codes, TILE_TOKENS, s->sae[0].d_sae * sizeof *codes));
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    while ((status = next_encoded(s, f->set.count)) == SC_OK) SC_TRY(spool_batch(s, codes));
    if (status != SC_END) return status;
    return save_tensors(o->output, 4096, write_codes, s);
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

/* Turns the labels of class folders into classes of the model: by name where the model names its
 * classes; else the folders' names are the classes where all are whole numbers; else their ranks
 * are, if there are as many folders as classes. The labels of a list are classes already. */
static int match_classes(sc_images *set, const sc_model *model) {
    const char *text = sc_metadata_find(&model->file, "class_names");
    char **name = NULL;                              /* [names], of the model's classes */
    size_t names = 0, numbers = 0;
    int status = SC_OK, zeros = 0, lengths = 0;
    if (!set->class_name) return SC_OK;
    for (size_t c = 0; c < set->classes; c++) {
        const char *class = set->class_name[c];
        if (class[strspn(class, "0123456789")] == '\0') numbers++;
        zeros |= class[0] == '0' && class[1];
        lengths |= strlen(class) != strlen(set->class_name[0]);
    }
    if (!text && numbers == set->classes && zeros && lengths)        /* 1 and 01 are one class */
        return fail("%s: class folders with and without leading zeros (expected one form)",
                    set->root);
    if (!text && numbers < set->classes && set->classes != model->classes)
        return fail("%s: %zu class folders, but the model has %zu classes without names (expected "
                    "folders named by class number, or a list with path<TAB>class)",
                    set->root, set->classes, model->classes);
    if (text) SC_TRY(json_string_array(text, model->file.path, &name, &names));
    for (size_t i = 0; i < set->count && status == SC_OK; i++) {
        sc_image *image = &set->image[i];
        const char *class = set->class_name[image->label];
        size_t c = 0;
        while (c < names && strcmp(name[c], class) != 0) c++;
        if (text) image->label = (int64_t)c;
        else if (numbers == set->classes) image->label = strtoll(class, NULL, 10);
        if (text && c == names)
            status = fail("image %zu %s: class '%s' is not among the %zu that %s names", i,
                          image->name, class, names, model->file.path);
    }
    free(name);
    return status;
}

static int start_zeroshot(session *s) {
    feed *f = &s->data;
    const sc_safetensors *file = &f->model.file;
    SC_TRY(open_session(s));                         /* timm's head may be a classifier */
    if (!sc_tensor_find(file, "text_embeds") && f->model.naming != TIMM)
        return fail("%s: no tensor text_embeds [classes, width of the projection]", file->path);
    if (f->T != f->model.tokens)
        return fail("%s: trained on tokens %s (expected all, which the model needs to go on)",
                    s->sae[0].path, f->origin.text[SC_TOKENS]);
    if (s->saes) {
        f->tap[0].replace = replace_by_output;
        f->tap[0].context = s;
    }
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 1));
    return match_classes(&f->set, &f->model);
}

/* Finds the rank, from 0, of the label of the batch's image i among the logits; of equal logits the
 * lower class comes first. */
static int rank_label(const feed *f, size_t i, size_t *rank) {
    size_t image = f->image[i], classes = f->model.classes;
    const float *logit = f->logits + i * classes;
    const char *name = image_name(f, image);
    int64_t label = f->label[i];
    if (label < 0)
        return fail("image %zu %s: no label (expected FOLDER/<class>/<image>, or a list with "
                    "path<TAB>class)", image, name);
    if (label >= (int64_t)classes)
        return fail("image %zu %s: label %lld, but the head has %zu classes", image, name,
                    (long long)label, classes);
    *rank = 0;
    for (size_t c = 0; c < classes; c++) {
        int before = (int64_t)c < label;
        if (logit[c] > logit[label] || (before && logit[c] == logit[label])) ++*rank;
    }
    return SC_OK;
}

static int command_zeroshot(session *s) {
    const char *format = s->o->format;
    const feed *f = &s->data;
    size_t top1 = 0, top5 = 0, rank = 0;
    int status;
    SC_TRY(start_zeroshot(s));
    while ((status = next_encoded(s, f->set.count)) == SC_OK) {
        for (size_t i = 0; i < f->count; i++) {
            SC_TRY(rank_label(f, i, &rank));
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
    int any_data;                    /* whether the statistics may be of other data */
    enum { NO_MASK, VALUE_MASK, TOP_MASK } kind;
    size_t latent[MAX_SHOWN], latents;           /* the latents to show */
    int64_t *image;                  /* [images], the images to show, if not all */
    size_t images, patches;          /* patches: per image */
    double *mask;                    /* [MEASURE_IMAGES, patches], of one latent on the batch */
    unsigned char *picture;          /* the image that is being drawn, rows of RGB or grey */
    int made;                        /* whether this run made the output folder */
} viewer;

/* "J[,J...]" */
static int parse_latents(viewer *v, const char *text) {
    const sc_sae *sae = &v->s->sae[0];
    for (char *end;; text = end + 1) {
        unsigned long long j = strtoull(text, &end, 10);
        if (!isdigit((unsigned char)*text) || (*end && *end != ',') || v->latents == MAX_SHOWN)
            return usage("-l: invalid value at '%s' (expected at most %d latents, as in 7 or 7,11)",
                         text, MAX_SHOWN);
        if (j >= sae->d_sae)
            return fail("%s: no latent %llu (expected 0 to %zu)", sae->path, j, sae->d_sae - 1);
        v->latent[v->latents++] = (size_t)j;
        if (!*end) return SC_OK;
    }
}

/* Reads the statistics, which must be of this SAE and, but for explain, of this data set. */
static int open_statistics(viewer *v, const char *path) {
    statistics *s = &v->stats;
    const sc_images *set = &v->s->data.set;
    const sc_origin now = origin_of(&v->s->sae[0]);
    SC_TRY(read_statistics(s, path, &v->s->memory));
    size_t key = origin_difference(&s->origin, &now);
    if (s->shards > 1)
        return fail("%s: statistics of one shard (expected the output of merge)", path);
    if (!v->any_data && s->data_digest != set->digest)
        return fail("%s: statistics of another data set", path);
    if (s->sae_digest != sae_digest(&v->s->sae[0]) || s->n != v->s->sae[0].d_sae)
        return fail("%s: statistics of another SAE", path);
    if (key < SC_ORIGIN_KEYS)
        return fail("%s: statistics of activations with %s %s (expected %s)", path,
                    origin_keys[key], s->origin.text[key], now.text[key]);
    for (size_t i = 0; i < s->n * s->K && !v->any_data; i++)
        if (s->top[i].image >= (int64_t)set->count)
            return fail("%s: damaged: image %lld of %zu", path, (long long)s->top[i].image,
                        set->count);
    return SC_OK;
}

/* Opens the SAE, the data, the statistics where they are asked for, and the output folder. */
static int open_viewer(viewer *v, int with_stats) {
    session *s = v->s;
    const options *o = s->o;
    feed *f = &s->data;
    SC_TRY(open_session(s));
    if (o->latents) SC_TRY(parse_latents(v, o->latents));
    if (f->grid == 0 || f->T == 1)
        return fail("the tokens are not a square of patches (expected --tokens all or patches)");
    if (with_stats) SC_TRY(open_statistics(v, o->stats));
    if (v->kind != VALUE_MASK) {                 /* neither the SAE nor the model is needed */
        s->saes = 0;
        if (!f->is_file) f->taps = 0;
    }
    s->batch[0].reconstruct = 0;
    v->patches = f->grid * f->grid;
    size_t side = f->is_file ? f->grid : f->model.image_size;
    SC_TRY(allocate(&s->memory, &v->mask, MEASURE_IMAGES, v->patches * sizeof *v->mask));
    SC_TRY(allocate(&s->memory, &v->picture, side * side, 3));
    if (!o->output) return SC_OK;
    v->made = mkdir(o->output, 0777) == 0;
    if (v->made || errno == EEXIST) return SC_OK;
    return fail("%s: the folder cannot be made: %s", o->output, strerror(errno));
}

/* The order of v->image. */
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
    for (size_t k = 0; k < b->tiles; k++) {
        const tile_codes *tile = &b->tile[k];
        for (size_t c = tile->start[j]; c < tile->start[j + 1]; c++) {
            size_t row = tile->first + tile->token[c];
            size_t image = row / f->T, token = row % f->T;
            if (token < f->first_patch) continue;            /* the class token */
            v->mask[image * v->patches + token - f->first_patch] = tile->value[c];
        }
    }
    if (v->kind != TOP_MASK) return;
    for (size_t p = 0; p < v->stats.P; p++) {
        const sc_top *patch = &v->stats.patch[j * v->stats.P + p];
        uint64_t at = (uint64_t)patch->other - v->stats.first_patch;
        if (at >= v->patches) continue;                      /* no patch, or no entry */
        for (size_t i = 0; i < f->count; i++) {
            int64_t image = (int64_t)f->image[i];
            if (image == patch->image) v->mask[i * v->patches + at] = 1;
        }
    }
}

/* Draws a crop into an image with rows of `stride` bytes. Patches whose mask is 0 are darkened.
 * crop: [S, S, 3]; mask: [grid, grid], or NULL for none */
static void draw_crop(unsigned char *to, size_t stride, const unsigned char *crop, size_t S,
                      const double *mask, size_t grid) {
    for (size_t y = 0; y < S; y++) {
        for (size_t x = 0; x < S; x++) {
            size_t patch = y * grid / S * grid + x * grid / S;
            int silent = mask && mask[patch] == 0;
            for (size_t c = 0; c < 3; c++) {
                int value = *crop++;
                if (silent) value = value * SILENT / 255;
                to[y * stride + x * 3 + c] = (unsigned char)value;
            }
        }
    }
}

/* Writes v->picture to NAME.pgm (1 channel) or NAME.ppm (3) in the output folder. */
static int write_picture(const viewer *v, const char *name, size_t channels, size_t width,
                         size_t height) {
    sc_output out;
    char path[MAX_PATH], file[160];
    int rgb = channels == 3;
    snprintf(file, sizeof file, rgb ? "%s.ppm" : "%s.pgm", name);
    SC_TRY(join_path(v->s->o->output, file, path));
    SC_TRY(output_open(&out, path));
    fprintf(out.file, "P%d\n%zu %zu\n255\n", 5 + rgb, width, height);
    output_write(&out, v->picture, width * height * channels);
    return output_commit(&out);
}

/* Writes a mask as NAME.pgm, round(255 f / largest) per patch, and over its image as NAME.ppm.
 * mask: [grid, grid]; crop: [S, S, 3], or NULL for saved activations, which have no image */
static int write_mask(const viewer *v, const char *name, const double *mask,
                      const unsigned char *crop) {
    size_t S = v->s->data.model.image_size, grid = v->s->data.grid;
    double largest = 0;
    for (size_t p = 0; p < v->patches; p++) largest = fmax(largest, mask[p]);
    for (size_t p = 0; p < v->patches; p++) {
        v->picture[p] = 0;
        if (largest > 0) v->picture[p] = (unsigned char)floor(255 * mask[p] / largest + 0.5);
    }
    SC_TRY(write_picture(v, name, 1, grid, grid));
    if (!crop) return SC_OK;
    draw_crop(v->picture, 3 * S, crop, S, mask, grid);
    return write_picture(v, name, 3, S, S);
}

/* The pixels of the batch's image i, NULL where the data are saved activations. */
static const unsigned char *crop_of(const feed *f, size_t i) {
    size_t S = f->model.image_size;
    return f->is_file ? NULL : f->pixels + i * S * S * 3;
}

/* Writes the mask of latent j, which is in v->mask, on the batch's image i. The files' name begins
 * with the latent and the image's index; the image's own name follows, as far as it is harmless. */
static int show_mask(const viewer *v, size_t j, size_t i) {
    const feed *f = &v->s->data;
    const char *image = base_name(image_name(f, f->image[i]));
    char name[129];                                          /* a longer name loses its end */
    snprintf(name, sizeof name, "latent_%zu_%zu_%s", j, f->image[i], image);
    for (char *c = name; *c; c++) {
        int harmless = isalnum((unsigned char)*c) || *c == '.' || *c == '-';
        if (!harmless) *c = '_';
    }
    return write_mask(v, name, v->mask + i * v->patches, crop_of(f, i));
}

/* Writes the latents' masks on each image. */
static int show_image_masks(viewer *v) {
    feed *f = &v->s->data;
    int status;
    SC_TRY(start_feed(f, MEASURE_IMAGES, NULL, NULL, 0));
    while ((status = next_encoded(v->s, f->set.count)) == SC_OK) {
        for (size_t l = 0; l < v->latents; l++) {
            find_masks(v, v->latent[l]);
            for (size_t i = 0; i < f->count; i++) SC_TRY(show_mask(v, v->latent[l], i));
        }
    }
    return status == SC_END ? SC_OK : status;
}

/* Writes the mean of each latent's masks on the images of a class, drawn over the mean image. */
static int show_class_masks(viewer *v, long class) {
    feed *f = &v->s->data;
    size_t S = f->model.image_size, patches = v->patches;    /* S: 0 for saved activations */
    size_t pixels = 3 * S * S;
    double *mask, *colour;                   /* sums, then means: [latents, patches], [S, S, 3] */
    int status;
    const array_spec arrays[] = { ARRAY(mask, v->latents, patches), ARRAY(colour, pixels, 1),
                                  ARRAY(v->image, f->set.count, 1) };
    SC_TRY(new_arrays(&v->s->memory, arrays, COUNT(arrays)));
    for (size_t i = 0; i < f->set.count; i++) {
        if (f->set.image[i].label != class) continue;
        v->image[v->images++] = (int64_t)i;
    }
    if (v->images == 0)
        return fail("--class %ld: no image is of this class (of %zu classes)", class,
                    f->set.classes);
    SC_TRY(start_feed(f, MEASURE_IMAGES, listed_draw, v, 0));
    while ((status = next_encoded(v->s, v->images)) == SC_OK) {
        for (size_t l = 0; l < v->latents; l++) {
            double *sum = mask + l * patches;
            find_masks(v, v->latent[l]);
            for (size_t e = 0; e < f->count * patches; e++) sum[e % patches] += v->mask[e];
        }
        for (size_t e = 0; e < f->count * pixels; e++) colour[e % pixels] += f->pixels[e];
    }
    if (status != SC_END) return status;
    double images = (double)f->used;
    for (size_t e = 0; e < v->latents * patches; e++) mask[e] /= images;
    for (size_t e = 0; e < pixels; e++)
        f->pixels[e] = (unsigned char)floor(colour[e] / images + 0.5);
    for (size_t l = 0; l < v->latents; l++) {
        char name[96];
        snprintf(name, sizeof name, "latent_%zu_class_%ld", v->latent[l], class);
        SC_TRY(write_mask(v, name, mask + l * patches, crop_of(f, 0)));
    }
    return SC_OK;
}

static int show_masks(viewer *v) {
    long class = v->s->o->class_index;
    if (!v->s->o->mask) v->kind = VALUE_MASK;
    SC_TRY(open_viewer(v, v->kind == TOP_MASK));
    if (class >= 0) return show_class_masks(v, class);
    return show_image_masks(v);
}

/* How many images latent j fires on, at most K: its top images. */
static size_t top_images(const statistics *s, size_t j) {
    size_t count = 0;
    while (count < s->K && s->top[j * s->K + count].image >= 0) count++;
    return count;
}

/* Writes the sheet of latent j: its top images in a square of `columns`, row by row, the strongest
 * first. v->image goes on with these images; total: those of all sheets */
static int show_sheet(viewer *v, size_t j, size_t columns, size_t total) {
    const feed *f = &v->s->data;
    const sc_top *top = v->stats.top + j * v->stats.K;
    size_t S = f->model.image_size, step = S + SHEET_GAP, cell = 0;
    size_t count = top_images(&v->stats, j);
    size_t width = columns * step - SHEET_GAP;
    size_t height = (v->stats.K - 1) / columns * step + S;
    char name[64];
    int status;
    memset(v->picture, 0, height * width * 3);
    for (size_t k = 0; k < count; k++) v->image[v->images++] = top[k].image;
    while ((status = next_encoded(v->s, total)) == SC_OK) {
        if (v->kind != NO_MASK) find_masks(v, j);
        for (size_t i = 0; i < f->count; i++, cell++) {
            size_t row = cell / columns, column = cell % columns;
            unsigned char *corner = v->picture + (row * width + column) * step * 3;
            const double *mask = NULL;
            if (v->kind != NO_MASK) mask = v->mask + i * v->patches;
            draw_crop(corner, width * 3, crop_of(f, i), S, mask, f->grid);
        }
    }
    if (status != SC_END) return status;
    if (count == 0) note("latent %zu fires on no image: its sheet is empty", j);
    snprintf(name, sizeof name, "latent_%zu", j);
    return write_picture(v, name, 3, width, height);
}

static int show_sheets(viewer *v) {
    size_t columns = 1, total = 0;
    feed *f = &v->s->data;
    SC_TRY(open_viewer(v, 1));
    size_t K = v->stats.K, step = f->model.image_size + SHEET_GAP;
    while (columns * columns < K) columns++;
    const array_spec arrays[] = { ARRAY(v->image, v->latents, K),
                                  ARRAY(v->picture, columns * step, 3 * columns * step) };
    SC_TRY(new_arrays(&v->s->memory, arrays, COUNT(arrays)));
    for (size_t l = 0; l < v->latents; l++) total += top_images(&v->stats, v->latent[l]);
    f->skip_bad = 0;                         /* a cell is for one image and no other */
    SC_TRY(start_feed(f, MEASURE_IMAGES, listed_draw, v, 0));
    for (size_t l = 0; l < v->latents; l++)
        SC_TRY(show_sheet(v, v->latent[l], columns, total));
    return SC_OK;
}

/* --- explain --- */

enum { EXPLAINED = 16, EXPLAIN_COLUMNS = 5, CLASSES_SHOWN = 3 };

/* The classes (other) with the largest shares (value) in the activation of latent j's top images,
 * in descending order; returns how many there are. The whole includes images without a label.
 * largest: [room] */
static size_t top_classes(const statistics *s, size_t j, sc_top *largest, size_t room) {
    const sc_top *top = s->top + j * s->K;
    size_t active = top_images(s, j), found = 0;
    double total = 0;
    for (size_t i = 0; i < active; i++) total += top[i].value;
    for (size_t i = 0; i < room; i++) largest[i] = nothing;
    for (size_t i = 0; i < active; i++) {
        double share = class_activation(top, active, i) / total;
        if (top[i].other >= 0)
            keep_largest(largest, room, (sc_top){ (float)share, 0, top[i].other });
    }
    while (found < room && largest[found].value > 0) found++;
    return found;
}

/* A latent's row: row [EXPLAIN_COLUMNS]; text [TEXT_ROOM], for its classes. */
static void explain_latent(const statistics *s, sc_top latent, table_cell *row, char *text) {
    size_t j = (size_t)latent.image, used = 0;
    const latent_record *l = &s->latent[j];
    sc_top class[CLASSES_SHOWN];
    size_t found = top_classes(s, j, class, CLASSES_SHOWN);
    strcpy(text, "");
    for (size_t i = 0; i < found; i++) {
        size_t c = (size_t)class[i].other;
        double percent = 100 * (double)class[i].value;
        char name[100];
        if (s->class_name && c < s->classes) printable(s->class_name[c], name, sizeof name);
        else snprintf(name, sizeof name, "class %zu", c);
        if (i > 0) used += (size_t)sprintf(text + used, ", ");
        used += (size_t)sprintf(text + used, "%s %.0f %%", name, percent);
    }
    const table_cell cells[EXPLAIN_COLUMNS] = {
        { "latent", "latent", NULL, (double)j, 0 },
        { "activation", "activation", NULL, latent.value, 0 },
        { "frequency", "frequency", NULL, l->sparsity, 0 },
        { "entropy", "entropy", NULL, l->entropy, l->entropy < 0 },
        { "classes", "classes of its top images", text, 0, found == 0 } };
    memcpy(row, cells, sizeof cells);
}

/* "R,C": the token of a patch; SIZE_MAX where the option is not given. */
static int parse_patch(const feed *f, const char *text, size_t *token) {
    size_t r = 0, c = 0;
    char more;
    *token = SIZE_MAX;
    if (!text) return SC_OK;
    if (sscanf(text, "%9zu,%9zu%c", &r, &c, &more) != 2 || r >= f->grid || c >= f->grid)
        return usage("--patch: invalid value '%s' (expected R,C, a row and a column from 0,0 to "
                     "%zu,%zu)", text, f->grid - 1, f->grid - 1);
    *token = f->first_patch + r * f->grid + c;
    return SC_OK;
}

/* Prints the latents that are strongest on an image, or on one of its patches. */
static int explain(viewer *v) {
    const options *o = v->s->o;
    const feed *f = &v->s->data;
    const sae_batch *b = &v->s->batch[0];
    sc_top strongest[EXPLAINED];                 /* image: the latent */
    table_cell cells[EXPLAINED][EXPLAIN_COLUMNS];
    char classes[EXPLAINED][TEXT_ROOM];
    size_t rows = 0, token;
    v->kind = VALUE_MASK;
    v->any_data = 1;
    SC_TRY(open_viewer(v, 1));
    SC_TRY(parse_patch(f, o->patch, &token));
    SC_TRY(start_feed(&v->s->data, MEASURE_IMAGES, NULL, NULL, 0));
    SC_TRY(next_encoded(v->s, 1));
    if (f->count != 1) return fail("%s: more than one image (expected one)", o->operand[0]);
    for (size_t i = 0; i < EXPLAINED; i++) strongest[i] = nothing;
    for (size_t j = 0; j < v->stats.n; j++) {
        if ((double)v->stats.latent[j].sparsity > o->max_frequency) continue;
        double a = 0;
        if (token < f->T) a = sum_codes(b, j, token, token + 1);
        else a = sum_codes(b, j, 0, f->T) / (double)f->T;
        keep_largest(strongest, EXPLAINED, (sc_top){ (float)a, (int64_t)j, 0 });
    }
    for (; rows < EXPLAINED && strongest[rows].value > 0; rows++) {
        size_t j = (size_t)strongest[rows].image;
        explain_latent(&v->stats, strongest[rows], cells[rows], classes[rows]);
        if (!o->output) continue;
        find_masks(v, j);
        SC_TRY(show_mask(v, j, 0));
    }
    if (rows > 0) return print_table(o->format, cells[0], EXPLAIN_COLUMNS, rows, print_rows);
    note("no latent fires there");
    if (strcmp(o->format, "json") == 0) puts("[]");
    return end_of_output();
}

static int look(session *s, int (*show)(viewer *v)) {
    const char *mask = s->o->mask;
    viewer v = { .s = s, .kind = NO_MASK };
    if (mask) v.kind = strcmp(mask, "top") == 0 ? TOP_MASK : VALUE_MASK;
    int status = show(&v);
    if (status != SC_OK && v.made) rmdir(s->o->output);      /* goes only if it is empty */
    return status;
}

static int command_top(session *s) { return look(s, show_sheets); }
static int command_mask(session *s) { return look(s, show_masks); }
static int command_explain(session *s) { return look(s, explain); }

/* ============================================================================================
 * 22. Figures
 *
 * `plot` draws figures as SVG (w3.org/TR/SVG11) from files that other commands wrote. Each kind of
 * figure reads every file into rows of numbers, then draws the rows of all files. Coordinates come
 * from IEEE operations and the project's own logarithm, so the same files give the same bytes
 * everywhere. Text and background follow the viewer's light or dark mode.
 * ============================================================================================ */

enum {
    MAX_FILES = 64,                  /* in one figure */
    LINE_POINTS = 1000,              /* longer series are thinned to at least this many points */
    CELLS = 100,                     /* of a scatter plot, per side: one point in each at most */
    COLOURS = 9,                     /* of the heat map */
    MASK_CELLS = 64                  /* side of a mask in patches, at most */
};

/* One file. row: [rows]; the columns depend on the kind of figure */
typedef struct {
    const char *path;
    double (*row)[4];
    size_t rows, capacity;
    char words[100];                 /* what the legend says, besides the path */
} plot_series;

/* A linear axis goes from 0 to the largest value, a logarithmic one covers whole powers of ten.
 * `low` lies at the pixel `from`, `high` at the pixel `to`, and ticks are `step` apart; on a
 * logarithmic axis low, high and step are log10 of values. */
typedef struct {
    int is_log;
    double from, to, low, high, step;
} plot_axis;

typedef struct {
    const struct plot_kind *kind;
    plot_series series[MAX_FILES];
    int count;
    FILE *out;
} plot;

/* Rows come from a file directly (read) or from statistics (convert). Column 0 lies along the x
 * axis of every panel, column i + 1 along the y axis of panel i. */
struct plot_kind {
    const char *name;
    int (*read)(plot_series *s);
    int (*convert)(plot_series *s, const statistics *stats);
    void (*draw)(const plot *p);
    int panels, width, height;       /* of a panel, in pixels */
    int x_log, y_log;                /* whether the axes are logarithmic */
    const char *x, *y[3];            /* labels of the axes */
};

/* Appends a row; columns that a kind of figure does not have are 0. */
static int add_row(plot_series *s, double a, double b, double c, double d) {
    SC_TRY(grow(&s->row, &s->capacity, s->rows, sizeof *s->row));
    const double row[4] = { a, b, c, d };
    memcpy(s->row[s->rows++], row, sizeof row);
    return SC_OK;
}

/* --- Reading --- */

/* Columns: step, loss, mse, l0. */
static int read_log_rows(plot_series *s, FILE *file) {
    char line[512];
    double v[4] = { 0 };
    if (!fgets(line, sizeof line, file) || strcmp(line, log_header) != 0)
        return fail("%s: not a training log (expected the first line %.*s)", s->path,
                    (int)sizeof log_header - 2, log_header);
    while (fgets(line, sizeof line, file)) {
        int end = 0;                                     /* stays 0 where a number is missing */
        sscanf(line, "%lf,%*f,%*f,%*f,%lf,%lf,%*f,%*f,%lf,%*f,%*f,%*f,%*f%n", &v[0], &v[1], &v[2],
               &v[3], &end);
        for (int c = 0; c < 4; c++)
            if (!(fabs(v[c]) <= 1e30)) end = 0;
        if (end == 0 || line[end] != '\n')
            return fail("%s: line %zu: expected 13 finite numbers", s->path, s->rows + 2);
        SC_TRY(add_row(s, v[0], v[1], v[2], v[3]));
    }
    if (ferror(file)) return fail("%s: cannot be read", s->path);
    if (s->rows == 0) return fail("%s: a log without steps", s->path);
    return SC_OK;
}

/* The log that `train --log` writes. */
static int read_log(plot_series *s) {
    FILE *file = fopen(s->path, "r");
    if (!file) return fail("%s: cannot be opened: %s", s->path, strerror(errno));
    int status = read_log_rows(s, file);
    fclose(file);
    return status;
}

/* Columns: frequency, mean activation, entropy, for the latents that fire. */
static int latent_rows(plot_series *s, const statistics *stats) {
    for (size_t j = 0; j < stats->n; j++) {
        const latent_record *l = &stats->latent[j];
        if (!(l->sparsity > 0 && l->mean > 0)) continue;
        SC_TRY(add_row(s, l->sparsity, l->mean, l->entropy, 0));
    }
    return SC_OK;
}

/* Columns: middle of a bin, its share in percent; from the first to the last bin in use. */
static int histogram_rows(plot_series *s, const statistics *stats) {
    const int64_t *count = stats->histogram[0];
    int first = 0, last = HISTOGRAM_BINS - 1;
    double total = 0;
    for (int b = 0; b < HISTOGRAM_BINS; b++) {
        if (count[b] < 0) return fail("%s: activation_histogram: negative counts", s->path);
        total += (double)count[b];
    }
    while (first <= last && count[first] == 0) first++;
    while (first <= last && count[last] == 0) last--;
    for (int b = first; b <= last; b++) {
        double middle = sqrt(bin_edge(b) * bin_edge(b + 1));
        double percent = 100 * (double)count[b] / total;
        SC_TRY(add_row(s, middle, percent, 0, 0));
    }
    return SC_OK;
}

/* For qsort: more images first. */
static int by_images(const void *a, const void *b) {
    const double *left = a, *right = b;
    return (left[1] < right[1]) - (left[1] > right[1]);
}

/* Columns: rank, number of images on which the latent fires, for the latents that fire. */
static int count_rows(plot_series *s, const statistics *stats) {
    size_t all = 0, few = 0;
    for (size_t j = 0; j < stats->n; j++) {
        double images = (double)stats->latent[j].images;
        if (images > 0) SC_TRY(add_row(s, 0, images, 0, 0));
        if (images == (double)stats->images) all++;
        if (images == 1 || images == 2) few++;
    }
    if (s->rows > 0)
        qsort(s->row, s->rows, sizeof *s->row, by_images);
    for (size_t r = 0; r < s->rows; r++)
        s->row[r][0] = (double)(r + 1);
    snprintf(s->words, sizeof s->words,
             ": %zu latents fire on all images, %zu on 1 or 2, %zu on none", all, few,
             stats->n - s->rows);
    return SC_OK;
}

/* Column 0: the patches' values from 0 to 1, row by row. A mask is an image with one pixel per
 * patch; grey has the same value in all channels. */
static int read_mask(plot_series *s) {
    image_source source = { 0 };
    picture mask = { 0, 0, 0, NULL };
    int status = read_picture(s->path, &source, &mask) == SC_OK ? SC_OK : SC_FAILED;
    if (status == SC_OK && (mask.width != mask.height || mask.width > MASK_CELLS))
        status = fail("%s: not a mask (expected a square PGM of at most %d x %d)", s->path,
                      MASK_CELLS, MASK_CELLS);
    size_t patches = mask.width * mask.width;
    for (size_t i = 0; i < patches && status == SC_OK; i++)
        status = add_row(s, mask.rgb[3 * i] / 255.0, 0, 0, 0);
    free(source.rgb);
    return status;
}

/* Reads a file, whatever the kind of figure. */
static int read_series(const struct plot_kind *kind, plot_series *s) {
    memory_list memory = NULL;
    statistics stats;
    if (kind->read) return kind->read(s);
    int status = read_statistics(&stats, s->path, &memory);
    if (status == SC_OK) status = kind->convert(s, &stats);
    release(&memory);
    return status;
}

/* --- Elements of SVG --- */

/* The head of the file, with the style sheet and the background. Elements name their own colours,
 * except for those that dark mode changes: text, background and grid lines (#ddd). */
static void start_plot(const plot *p, int width, int height) {
    fprintf(p->out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 %d %d\" "
            "width=\"%d\" height=\"%d\">\n<title>saeclip: %s</title>\n<style>\n"
            ".plot{font:12px system-ui,sans-serif}.plot text{fill:#222}.paper{fill:#fff}\n"
            ".plot path,.plot polyline{fill:none}.plot rect{shape-rendering:crispEdges}\n"
            "@media(prefers-color-scheme:dark){.plot text{fill:#ddd}.paper{fill:#16181c}\n"
            ".plot [fill=\"#ddd\"]{fill:#3b3f46}}\n"
            "</style>\n<rect class=\"paper\" width=\"100%%\" height=\"100%%\"/>\n",
            width, height, width, height, p->kind->name);
}

/* Coordinates up to the matching "</g>" are relative to (x, y). */
static void start_group(const plot *p, int x, int y) {
    fprintf(p->out, "<g transform=\"translate(%d,%d)\">\n", x, y);
}

/* style: attributes of the element. Characters that XML reserves are escaped; U+FFFE and U+FFFF,
 * which XML does not have, are left out. */
static void draw_text(const plot *p, double x, double y, const char *style, const char *text) {
    fprintf(p->out, "<text x=\"%.1f\" y=\"%.1f\"%s>", x, y, style);
    for (const char *c = shown(text); *c; c++) {
        if (memcmp(c, "\xef\xbf", 2) == 0 && (c[2] & 0xfe) == 0xbe) c += 2;
        else if (strchr("&<>\"'", *c)) fprintf(p->out, "&#%d;", *c);
        else putc(*c, p->out);
    }
    fputs("</text>\n", p->out);
}

static void draw_rect(const plot *p, double x, double y, double width, double height,
                      const char *colour) {
    fprintf(p->out, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>\n",
            x, y, width, height, colour);
}

/* The last `most` bytes of a path, since files are told apart by the ends of their names. */
static const char *path_end(const char *path, size_t most) {
    size_t length = strlen(path);
    if (length > most) path += length - most;
    while ((*path & 0xc0) == 0x80) path++;               /* a UTF-8 character is not cut */
    return path;
}

/* The colour map viridis (Smith and van der Walt, 2015), from 0 to 1; grey below 0. */
static const char *heat(double value) {
    static const char *const colours[COLOURS] = {
        "#440154", "#472c7a", "#3b518b", "#2c718e", "#21908d",
        "#27ad81", "#5cc863", "#aadc32", "#fde725" };
    if (value < 0) return "#888";
    return colours[(int)(value * (COLOURS - 1) + 0.5)];
}

/* Distinct on white and on black; they repeat from the ninth file on. */
static const char *line_colour(int series) {
    static const char *const colours[8] = { "#2f8fd8", "#e0851b", "#1fa67a", "#d4569a",
                                            "#8b6fe8", "#c9a400", "#d5492e", "#7d8794" };
    return colours[series % 8];
}

/* --- Axes --- */

/* A value in the units of the axis. */
static double on_axis(const plot_axis *a, double value) {
    if (a->is_log) return log64(value) * 0.43429448190325183;
    return value;
}

/* The pixel of a value; `at` is in the units of the axis. */
static double pixel_at(const plot_axis *a, double at) {
    return a->from + (a->to - a->from) * (at - a->low) / (a->high - a->low);
}

static double axis_place(const plot_axis *a, double value) {
    return pixel_at(a, on_axis(a, value));
}

/* The axis for a column of all files; at most 8 ticks. */
static plot_axis fit_axis(const plot *p, int column, int is_log, double from, double to) {
    double low = 1e300, high = 0;
    for (int n = 0; n < p->count; n++) {
        const plot_series *s = &p->series[n];
        for (size_t r = 0; r < s->rows; r++) {
            double value = s->row[r][column];
            if (value > 0) low = fmin(low, value);
            high = fmax(high, value);
        }
    }
    if (high == 0) low = high = 1;                       /* there are no values */
    plot_axis a = { is_log, from, to, 0, high, 0 };
    if (is_log) {
        a.low = floor(on_axis(&a, low) + 1e-6);          /* 0.01f is below 0.01 */
        a.high = ceil(on_axis(&a, high) - 1e-6);
        a.high = fmax(a.high, a.low + 1);
        a.step = ceil((a.high - a.low) / 8);
        return a;
    }
    double least = a.high / 8;
    for (double power = 1e-30; a.step < least; power *= 10) {
        a.step = power;                                  /* 1, 2 or 5 times a power of ten */
        if (a.step < least) a.step = 2 * power;
        if (a.step < least) a.step = 5 * power;
    }
    return a;
}

/* Grid lines, numbers and label of an axis: of the y axis, which stands at the left of a panel that
 * is `size` wide, or of the x axis, which lies below a panel that is `size` high. */
static void draw_axis(const plot *p, const plot_axis *a, int is_y, int size, const char *label) {
    double middle = (a->from + a->to) / 2;
    char number[32];
    int last = (int)(a->high / a->step + 1e-9);
    for (int k = (int)ceil(a->low / a->step); k <= last; k++) {
        double place = pixel_at(a, k * a->step);
        if (a->is_log) snprintf(number, sizeof number, "1e%.0f", k * a->step);
        else snprintf(number, sizeof number, "%.10g", k * a->step);
        snprintf(number, sizeof number, "%.10g", strtod(number, NULL));      /* 100, not 1e2 */
        if (is_y) {
            draw_rect(p, 0, place, size, 1, "#ddd");
            draw_text(p, -6, place + 4, " text-anchor=\"end\"", number);
        } else {
            draw_rect(p, place, 0, 1, size, "#ddd");
            draw_text(p, place, size + 16, " text-anchor=\"middle\"", number);
        }
    }
    const char *turned = " text-anchor=\"middle\" transform=\"rotate(-90)\"";
    if (is_y) draw_text(p, -middle, -58, turned, label);
    else draw_text(p, middle, size + 36, " text-anchor=\"middle\"", label);
}

/* Starts the group of a panel and draws its axes. */
static void start_panel(const plot *p, int panel, int left, int top, plot_axis *x,
                        plot_axis *y) {
    const struct plot_kind *k = p->kind;
    start_group(p, left, top);                           /* the caller ends it */
    *x = fit_axis(p, 0, k->x_log, 0, k->width);
    *y = fit_axis(p, panel + 1, k->y_log, k->height, 0);
    draw_axis(p, x, 0, k->height, k->x);
    draw_axis(p, y, 1, k->width, k->y[panel]);
}

/* A bar of the heat map's colours, with its axis at the left. The axis ends at pixel 0. */
static void draw_scale(const plot *p, const plot_axis *a, int left, int top, const char *label) {
    double height = a->from / COLOURS;
    start_group(p, left, top);
    draw_axis(p, a, 1, 0, label);
    for (int i = 0; i < COLOURS; i++) {
        double down = a->from - (i + 1) * height;
        const char *colour = heat((double)i / (COLOURS - 1));
        draw_rect(p, 0, down, 14, height, colour);
    }
    fputs("</g>\n", p->out);
}

/* --- The figures ---
 *
 * draw_lines: curves, activations and counts; draw_latents; draw_masks. Each of them computes the
 * size of the figure first. */

/* A column over column 0; of a long series, rows at equal distances. */
static void draw_line(const plot *p, int series, int column, const plot_axis *x,
                      const plot_axis *y) {
    const plot_series *s = &p->series[series];
    const char *colour = line_colour(series);
    size_t stride = s->rows / LINE_POINTS + (s->rows < LINE_POINTS);
    fprintf(p->out, "<polyline stroke=\"%s\" stroke-width=\"1.5\" points=\"", colour);
    for (size_t r = 0; r < s->rows; r += stride) {
        double value = s->row[r][column];
        if (y->is_log && !(value > 0)) continue;         /* has no logarithm */
        double across = axis_place(x, s->row[r][0]);
        double down = axis_place(y, value);
        fprintf(p->out, "%.1f,%.1f ", across, down);
        if (s->rows == 1)                                /* becomes a dash */
            fprintf(p->out, "%.1f,%.1f ", across + 8, down);
    }
    fputs("\"/>\n", p->out);
}

/* Panels side by side; below them the legend, one line per file. */
static void draw_lines(const plot *p) {
    const struct plot_kind *k = p->kind;
    int step = k->width + 104, legend = k->height + 86;
    plot_axis x, y;
    start_plot(p, step * k->panels, legend + 20 * p->count);
    for (int i = 0; i < k->panels; i++) {
        start_panel(p, i, 82 + step * i, 20, &x, &y);
        for (int n = 0; n < p->count; n++)
            draw_line(p, n, i + 1, &x, &y);
        fputs("</g>\n", p->out);
    }
    for (int n = 0; n < p->count; n++) {
        int down = legend + 20 * n;
        draw_rect(p, 82, down - 5, 22, 2, line_colour(n));
        const plot_series *s = &p->series[n];
        char line[TEXT_ROOM];
        snprintf(line, sizeof line, "%s%s", path_end(s->path, 50), s->words);
        draw_text(p, 112, down, "", line);
    }
}

/* The latents whose entropy has this colour, as one path. One point per cell of 3 x 3 pixels, so
 * that 49,152 latents make a small file. largest: of all entropies */
static void draw_points(const plot *p, const plot_series *s, const plot_axis *x,
                        const plot_axis *y, double largest, const char *colour) {
    unsigned char taken[CELLS + 1][CELLS + 1] = { 0 };
    double side = x->to / CELLS;
    fprintf(p->out, "<path stroke=\"%s\" stroke-width=\"3\" stroke-linecap=\"round\" d=\"", colour);
    for (size_t r = 0; r < s->rows; r++) {
        const double *row = s->row[r];
        int column = (int)(axis_place(x, row[0]) / side + 0.5);
        int line = (int)(axis_place(y, row[1]) / side + 0.5);
        if (heat(row[2] / largest) != colour || taken[line][column]) continue;
        taken[line][column] = 1;
        fprintf(p->out, "M%.0f %.0fh0", side * column, side * line);    /* h0: a dot */
    }
    fputs("\"/>\n", p->out);
}

/* One panel per file, all with the same axes. */
static void draw_latents(const plot *p) {
    int side = p->kind->height, step = side + 100;
    plot_axis x, y, entropy = fit_axis(p, 2, 0, side, 0);
    start_plot(p, step * p->count + 116, side + 120);
    for (int n = 0; n < p->count; n++) {
        const plot_series *s = &p->series[n];
        start_panel(p, 0, 82 + step * n, 40, &x, &y);
        draw_text(p, 0, -18, " font-weight=\"bold\"", path_end(s->path, 44));
        for (int c = -1; c < COLOURS; c++) {             /* -1: entropy not defined */
            const char *colour = heat((double)c / (COLOURS - 1));
            draw_points(p, s, &x, &y, entropy.high, colour);
        }
        fputs("</g>\n", p->out);
    }
    draw_scale(p, &entropy, step * p->count + 72, 40, "entropy of the top images' classes (nats)");
    draw_text(p, 82, side + 106, "", "grey: entropy not defined (too few images, or no labels)");
}

/* One mask in heat colours. Above it the latent's number, taken from the name latent_J_IMAGE.pgm
 * that `mask` gives its files, and the end of the name. */
static void draw_mask(const plot *p, const plot_series *s, int side) {
    const char *name = base_name(s->path);
    char latent[32] = "latent ";
    int grid = (int)sqrt((double)s->rows);
    double cell = (double)side / grid;
    if (sscanf(name, "latent_%20[0-9]", latent + 7) == 1)
        draw_text(p, 0, -24, " font-weight=\"bold\"", latent);
    draw_text(p, 0, -8, "", path_end(name, 30));
    for (int i = 0; i < grid * grid; i++) {
        double across = cell * (i % grid);
        double down = cell * (i / grid);
        draw_rect(p, across, down, cell, cell, heat(s->row[i][0]));
    }
}

/* Four masks per row. */
static void draw_masks(const plot *p) {
    int side = p->kind->height, columns = p->count < 4 ? p->count : 4;
    int rows = (p->count + 3) / 4;
    int step = side + 24, down = side + 56;
    plot_axis value = { 0, side, 0, 0, 1, 0.2 };         /* from 0 to 1, ticks 0.2 apart */
    start_plot(p, step * columns + 120, down * rows + 16);
    for (int n = 0; n < p->count; n++) {
        int left = 20 + step * (n % 4), top = 48 + down * (n / 4);
        start_group(p, left, top);
        draw_mask(p, &p->series[n], side);
        fputs("</g>\n", p->out);
    }
    draw_scale(p, &value, step * columns + 82, 48, "activation (share of the largest)");
}

/* How each kind reads a file and draws; panels, sizes, scales and labels. */
static const struct plot_kind plot_kinds[] = {
    { "curves", read_log, NULL, draw_lines, 3, 260, 260, 0, 1, "step",
      { "loss (log scale)", "MSE (log scale)", "L0 (active latents per token, log scale)" } },
    { "latents", NULL, latent_rows, draw_latents, 1, 300, 300, 1, 1,
      "frequency (share of the images, log scale)",
      { "mean activation where it fires (log scale)" } },
    { "activations", NULL, histogram_rows, draw_lines, 1, 620, 260, 1, 0,
      "activation of an active latent (log scale)", { "active values in a bin (%)" } },
    { "counts", NULL, count_rows, draw_lines, 1, 620, 260, 0, 1,
      "latents, the most frequent first", { "images on which a latent fires (log scale)" } },
    { "mask", read_mask, NULL, draw_masks, 1, 200, 200, 0, 0, "", { "" } } };

/* path: the files, up to NULL */
static int read_and_draw(plot *p, const char *const *path, const char *output) {
    sc_output out;
    for (; path[p->count]; p->count++) {
        if (p->count == MAX_FILES) return usage("plot: more than %d files", MAX_FILES);
        plot_series *s = &p->series[p->count];
        s->path = path[p->count];
        SC_TRY(read_series(p->kind, s));
    }
    SC_TRY(output_open(&out, output));
    p->out = out.file;
    p->kind->draw(p);
    fputs("</svg>\n", p->out);
    return output_commit(&out);
}

static int command_plot(session *s) {
    const char *const *operand = s->o->operand;
    plot p = { .kind = NULL };
    for (size_t i = 0; i < COUNT(plot_kinds); i++) {
        const struct plot_kind *kind = &plot_kinds[i];
        if (strcmp(kind->name, operand[0]) == 0) p.kind = kind;
    }
    if (!p.kind)
        return usage("plot: invalid value '%s' (expected curves, latents, activations, counts or "
                     "mask)", operand[0]);
    int status = read_and_draw(&p, operand + 1, s->o->output);
    for (int n = 0; n < MAX_FILES; n++)
        free(p.series[n].row);
    return status;
}

/* ============================================================================================
 * 23. The atlas
 *
 * A folder that a browser opens without a server. index.html is the page (section 26). data/ holds
 * what the page shows: latents.js, the numbers of all latents; N.js, the top images of 64 latents
 * with their masks; I.jpg, image I, once, however many latents show it. A page that comes from a
 * file may not read files, but it may run scripts: each .js file calls a function of the page.
 * ============================================================================================ */

enum { PART = 64 };                  /* latents per N.js */

/* An image is among a latent's top images: slot = latent * K + rank. */
typedef struct { int64_t image; size_t slot; } atlas_use;

typedef struct {
    viewer *v;
    const statistics *stats;
    atlas_use *use;                  /* [uses], in the order of images */
    size_t uses;
    int no_cjpeg;                    /* cjpeg is not installed: images are bitmaps */
    char *digits;                    /* [patches], one mask */
    FILE *masks;                     /* [n, K, patches], all masks, in a temporary file */
} atlas;

/* Writes the contents of one of the atlas's files; number: which one of its kind. */
typedef int write_function(atlas *a, FILE *out, size_t number);

/* Writes DIR/NAME: either the whole file stands there, or nothing changes. */
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

/* --- Images --- */

/* For qsort: by image. */
static int by_image(const void *left, const void *right) {
    const atlas_use *a = left, *b = right;
    return (a->image > b->image) - (a->image < b->image);
}

/* Which latents show which image. v->image gets each of the images once, in ascending order. */
static int list_uses(atlas *a) {
    viewer *v = a->v;
    size_t slots = a->stats->n * a->stats->K;
    const array_spec arrays[] = {
        ARRAY(a->use, slots, 1),
        ARRAY(v->image, slots, 1),
        ARRAY(a->digits, v->patches, 1) };
    SC_TRY(new_arrays(&v->s->memory, arrays, COUNT(arrays)));
    for (size_t slot = 0; slot < slots; slot++) {
        int64_t image = a->stats->top[slot].image;
        if (image < 0) continue;                         /* fewer than K images */
        a->use[a->uses++] = (atlas_use){ image, slot };
    }
    if (a->uses > 0) qsort(a->use, a->uses, sizeof *a->use, by_image);
    for (size_t i = 0; i < a->uses; i++) {
        int64_t image = a->use[i].image;
        if (i > 0 && image == a->use[i - 1].image) continue;
        v->image[v->images++] = image;
    }
    return SC_OK;
}

/* An image as JPEG, by the program cjpeg; SC_END where it is not installed. pixels: [S, S, 3] */
static int write_jpeg(FILE *out, const unsigned char *pixels, size_t S) {
    char *argument[] = { "cjpeg", "-quality", "85", NULL };
    char words[256], bytes[4096];
    child_process child;
    FILE *ppm = tmpfile();
    if (!ppm) return spool_failed();
    fprintf(ppm, "P6\n%zu %zu\n255\n", S, S);
    fwrite(pixels, 3 * S, S, ppm);
    int error = fflush(ppm) != 0 || ferror(ppm) ? EIO : 0;
    lseek(fileno(ppm), 0, SEEK_SET);                     /* cjpeg reads from the beginning */
    if (!error) error = start_child(&child, argument, fileno(ppm));
    fclose(ppm);
    if (error == ENOENT || error == EACCES) return SC_END;
    if (error) return fail("cjpeg cannot be started: %s", strerror(error));
    for (size_t n; (n = fread(bytes, 1, sizeof bytes, child.output)) > 0;)
        fwrite(bytes, 1, n, out);
    int ended = end_child(&child, NULL, words, sizeof words);
    if (ended == 0) return SC_OK;
    if (WIFEXITED(ended) && WEXITSTATUS(ended) == 127 && !*words) return SC_END;
    return fail("cjpeg failed: %s", *words ? words : "no message");
}

/* An image as BMP of at most 128 x 128: two headers, then per pixel blue, green, red, 0. With 32
 * bits per pixel rows need no padding; the negative height says that the top row comes first. */
static void write_bitmap(FILE *out, const unsigned char *pixels, size_t S) {
    uint32_t side = S < 128 ? (uint32_t)S : 128, bytes = 4 * side * side;
    const uint32_t fields[] = {
        54 + bytes, 0, 54,                               /* bytes of the file, of the headers */
        40, side, 0 - side,                              /* of the second header; width, height */
        1 | 32 << 16, 0, bytes, 0, 0, 0, 0 };            /* 1 plane, 32 bits, not compressed */
    unsigned char header[sizeof fields];
    copy_numbers(header, fields, COUNT(fields), 4);      /* little-endian */
    fputs("BM", out);
    fwrite(header, sizeof header, 1, out);
    for (size_t i = 0; i < (size_t)side * side; i++) {
        size_t y = i / side * S / side, x = i % side * S / side;     /* nearest neighbour */
        const unsigned char *rgb = pixels + (y * S + x) * 3;
        putc(rgb[2], out);
        putc(rgb[1], out);
        putc(rgb[0], out);
        putc(0, out);
    }
}

/* Image i of the batch. A bitmap has the name of a JPEG too: browsers go by the first bytes. */
static int write_image(atlas *a, FILE *out, size_t i) {
    const feed *f = &a->v->s->data;
    size_t S = f->model.image_size;
    const unsigned char *pixels = f->pixels + i * S * S * 3;
    int status = SC_END;
    if (!a->no_cjpeg) status = write_jpeg(out, pixels, S);
    if (status != SC_END) return status;
    if (!a->no_cjpeg) note("cjpeg is not installed: images become bitmaps, which are larger");
    a->no_cjpeg = 1;
    write_bitmap(out, pixels, S);
    return SC_OK;
}

/* --- Masks --- */

/* Keeps a mask in 16 levels: 0 is silent, f the latent's largest activation on any patch of the
 * whole data set, so that the masks of a latent can be compared. */
static int keep_mask(atlas *a, size_t slot, const double *mask) {
    const statistics *stats = a->stats;
    size_t patches = a->v->patches, latent = slot / stats->K;
    double largest = stats->patch[latent * stats->P].value;
    for (size_t p = 0; p < patches; p++) {
        int level = 0;
        double share = fmin(mask[p] / largest, 1);
        if (mask[p] > 0) level = (int)ceil(15 * share);
        a->digits[p] = "0123456789abcdef"[level];
    }
    if (fseeko(a->masks, (off_t)(slot * patches), SEEK_SET) != 0) return spool_failed();
    if (fwrite(a->digits, patches, 1, a->masks) != 1) return spool_failed();
    return SC_OK;
}

/* One pass over the images that any latent shows, for the images and the masks. */
static int look_at_images(atlas *a) {
    viewer *v = a->v;
    feed *f = &v->s->data;
    char name[64];
    size_t at = 0;
    int status = SC_END;
    f->skip_bad = 0;                             /* the statistics' images are readable */
    SC_TRY(start_feed(f, MEASURE_IMAGES, listed_draw, v, 0));
    while (v->images > 0 && (status = next_encoded(v->s, v->images)) == SC_OK) {
        for (size_t i = 0; i < f->count; i++) {
            snprintf(name, sizeof name, "data/%zu.jpg", f->image[i]);
            SC_TRY(save_file(a, name, write_image, i));
            for (; at < a->uses && a->use[at].image == (int64_t)f->image[i]; at++) {
                size_t slot = a->use[at].slot;
                find_masks(v, slot / a->stats->K);
                SC_TRY(keep_mask(a, slot, v->mask + i * v->patches));
            }
        }
    }
    return status == SC_END ? SC_OK : status;
}

/* --- Scripts --- */

/* The patches of an image that are among the top patches of latent j, separated by commas. */
static void write_top_patches(const atlas *a, FILE *out, size_t j, int64_t image) {
    const statistics *stats = a->stats;
    const char *comma = "";
    for (size_t p = 0; p < stats->P; p++) {
        const sc_top *top = &stats->patch[j * stats->P + p];
        size_t patch = (size_t)top->other - stats->first_patch;
        if (top->image != image || patch >= a->v->patches) continue;
        fprintf(out, "%s%zu", comma, patch);
        comma = ",";
    }
}

/* The top images of latent j, each [image, activation, class, name, mask, [top patches]]. */
static int write_latent(atlas *a, FILE *out, size_t j) {
    size_t patches = a->v->patches;
    for (size_t k = 0; k < top_images(a->stats, j); k++) {
        size_t slot = j * a->stats->K + k;
        const sc_top *top = &a->stats->top[slot];
        if (fseeko(a->masks, (off_t)(slot * patches), SEEK_SET) != 0) return spool_failed();
        if (fread(a->digits, patches, 1, a->masks) != 1) return spool_failed();
        if (k > 0) fputs(",\n", out);
        fprintf(out, "[%lld,%.6g,%lld,", (long long)top->image, (double)top->value,
                (long long)top->other);
        print_json(out, image_name(&a->v->s->data, (size_t)top->image));
        fprintf(out, ",\"%.*s\",[", (int)patches, a->digits);
        write_top_patches(a, out, j, top->image);
        fputs("]]", out);
    }
    return SC_OK;
}

/* N.js: a list of top images per latent. */
static int write_latents(atlas *a, FILE *out, size_t part) {
    fprintf(out, "atlas.part(%zu,[\n", part);
    size_t first = part * PART, end = first + PART;
    if (end > a->stats->n) end = a->stats->n;
    for (size_t j = first; j < end; j++) {
        fputs(j > first ? ",\n[" : "[", out);
        SC_TRY(write_latent(a, out, j));
        putc(']', out);
    }
    fputs("]);\n", out);
    return SC_OK;
}

/* latents.js. Per latent: [frequency, mean, entropy, class with the largest share]. */
static int write_numbers(atlas *a, FILE *out, size_t ignored) {
    const feed *f = &a->v->s->data;
    const sc_images *set = &f->set;
    (void)ignored;
    fputs("atlas.open({\"name\":", out);
    print_json(out, base_name(a->v->s->sae[0].path));
    fprintf(out, ",\"images\":%zu,\"part\":%d,\"grid\":%zu", set->count, PART, f->grid);
    fputs(",\n\"classes\":[", out);
    for (size_t c = 0; c < set->classes && set->class_name; c++) {
        if (c > 0) putc(',', out);
        print_json(out, set->class_name[c]);
    }
    fputs("],\n\"latents\":[", out);
    for (size_t j = 0; j < a->stats->n; j++) {
        const latent_record *l = &a->stats->latent[j];
        sc_top class;
        top_classes(a->stats, j, &class, 1);
        if (j > 0) fputs(",\n", out);
        fprintf(out, "[%.6g,%.6g,%.6g,%lld]", (double)l->sparsity, (double)l->mean,
                (double)l->entropy, (long long)class.other);
    }
    fputs("]});\n", out);
    return SC_OK;
}

/* --- The folder --- */

static void write_page(FILE *out);           /* section 26 */

/* Everything in data/. */
static int write_data(atlas *a) {
    char name[64];
    SC_TRY(list_uses(a));
    SC_TRY(look_at_images(a));
    for (size_t part = 0; part * PART < a->stats->n; part++) {
        snprintf(name, sizeof name, "data/%zu.js", part);
        SC_TRY(save_file(a, name, write_latents, part));
    }
    return save_file(a, "data/latents.js", write_numbers, 0);
}

/* index.html itself. The page is written last: a folder that has one is complete. It is open, and
 * locked, from the beginning, so that two processes cannot write into one folder. */
static int write_atlas(atlas *a, FILE *out, size_t ignored) {
    char path[MAX_PATH];
    (void)ignored;
    SC_TRY(join_path(a->v->s->o->output, "index.html", path));
    if (unlink(path) != 0 && errno != ENOENT)
        return fail("%s: cannot be replaced: %s", path, strerror(errno));
    SC_TRY(write_data(a));
    write_page(out);
    return SC_OK;
}

static int show_atlas(viewer *v) {
    char data[MAX_PATH];
    atlas a = { .v = v, .stats = &v->stats };
    v->kind = VALUE_MASK;
    SC_TRY(open_viewer(v, 1));
    SC_TRY(join_path(v->s->o->output, "data", data));
    a.masks = v->s->spool[0] = tmpfile();
    if (!a.masks) return spool_failed();
    if (mkdir(data, 0777) != 0 && errno != EEXIST)
        return fail("%s: the folder cannot be made: %s", data, strerror(errno));
    int status = save_file(&a, "index.html", write_atlas, 0);
    if (status != SC_OK) rmdir(data);                    /* only if it is empty */
    return status;
}

static int command_atlas(session *s) { return look(s, show_atlas); }

/* ============================================================================================
 * 24. Info and compare
 *
 * `info` says what a file or this machine is, `compare` how far apart two files are.
 * ============================================================================================ */

/* The sizes of a tensor, "192 x 12288", or an index into it, "3, 4". */
static const char *join_sizes(const size_t *sizes, int count, const char *between) {
    char *out = strcpy(text_room(), "scalar");           /* a tensor without sizes */
    for (int d = 0, used = 0; d < count; d++) {
        if (d > 0) used += sprintf(out + used, "%s", between);
        used += sprintf(out + used, "%zu", sizes[d]);
    }
    return out;
}

/* --- info --- */

/* A file is of the first kind whose tensor it has, with that rank; the text shows its shape. */
static const struct { const char *tensor; int rank; const char *text; } file_kinds[] = {
    { "W_enc_m", 2, "checkpoint of a training: %zu latents, %zu inputs\n" },
    { "W_enc", 2, "sparse autoencoder: %zu inputs, %zu latents\n" },
    { "max_activating_image_indices", 2, "statistics: %zu latents, %zu top images each\n" },
    { "activations", 3, "activations: %zu images, %zu tokens each, %zu numbers each\n" },
    { "images", 4, "packed images: %zu images, %zu high, %zu wide, %zu colours\n" },
    { "value", 1, "codes: %zu active values\n" } };

/* All sizes of a model, and the settings that its numbers depend on. */
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

/* The last line of `info`, after the file's name. */
static void describe(const sc_safetensors *file) {
    for (size_t i = 0; i < COUNT(file_kinds); i++) {
        const sc_tensor *t = sc_tensor_find(file, file_kinds[i].tensor);
        if (!t || t->rank != file_kinds[i].rank) continue;
        printf(file_kinds[i].text, t->shape[0], t->shape[1], t->shape[2], t->shape[3]);
        return;
    }
    if (naming_of(file) == NAMINGS) puts("a safetensors file of an unknown kind");
    else describe_model(file->path);
}

/* The tensors, on request, then the metadata, then what the file is. */
static int describe_file(const char *path, int with_tensors) {
    sc_safetensors file;
    SC_TRY(sc_safetensors_open(&file, path));
    printf("%zu tensors in %zu bytes\n", file.tensors, file.size);
    for (size_t i = 0; i < file.tensors && with_tensors; i++) {
        const sc_tensor *t = &file.tensor[i];
        printf("    %-48s %-5s %-20s %12zu bytes\n", shown(t->name), sc_dtype_name(t->dtype),
               join_sizes(t->shape, t->rank, " x "), t->bytes);
    }
    printf("%zu entries of metadata\n", file.entries);
    for (size_t i = 0; i < file.entries; i++)
        printf("    %s = %s\n", shown(file.metadata[i].key), shown(file.metadata[i].value));
    printf("%s: ", shown(path));
    describe(&file);
    sc_safetensors_close(&file);
    return end_of_output();
}

/* Without a file: this machine, and what of it the program uses. */
static int command_info(session *s) {
    const char *path = s->o->operand[0];
    if (path) return describe_file(path, s->o->tensors);
    printf("saeclip %s\ninstruction sets:", SC_VERSION);
    for (size_t i = 0; i < COUNT(kernel_sets); i++) {
        const kernel_set *set = kernel_sets[i];
        if (is_usable(set)) printf(" %s", set->name);
        if (set == kernels) printf(" (in use)");
    }
    printf("\nthreads: %d of %ld processors\n", thread_count(), sysconf(_SC_NPROCESSORS_ONLN));
    return end_of_output();
}

/* --- compare --- */

/* |a - b| of element i, exact for integers, infinite where it is not a number; b in *y. */
static double distance_at(const sc_tensor *a, const sc_tensor *b, size_t i, double *y) {
    int64_t p = 0, q = 0;
    if (a->dtype > SC_U8 || b->dtype > SC_U8) return INFINITY;   /* types not read as numbers */
    double x = number_at(a, i, &p);
    *y = number_at(b, i, &q);
    if (a->dtype > SC_F64 && b->dtype > SC_F64) {                /* I64, I32 or U8 */
        uint64_t apart = (uint64_t)p - (uint64_t)q;
        return (double)(p < q ? 0 - apart : apart);
    }
    if (x == *y || (isnan(x) && isnan(*y))) return 0;            /* also of two infinities */
    double apart = fabs(x - *y);
    return isfinite(apart) ? apart : INFINITY;
}

/* Element number `at` of a tensor as an index. */
static const char *index_text(const sc_tensor *t, size_t at) {
    size_t index[SC_MAX_RANK] = { 0 };
    for (int d = t->rank - 1; d >= 0; d--) {
        index[d] = at % t->shape[d];
        at /= t->shape[d];
    }
    return join_sizes(index, t->rank, ", ");
}

/* Prints the largest |a - b| and, over elements where b is not 0, the largest |a - b| / |b| of two
 * tensors of one shape. Returns whether some elements are beyond the tolerance. */
static int compare_numbers(const sc_tensor *a, const sc_tensor *b, const options *o) {
    size_t size = sc_dtype_size(a->dtype), beyond = 0, at = 0, share_at = 0;
    int same_type = a->dtype == b->dtype, same_bits = same_type;
    double largest = 0, largest_share = -1;              /* -1: b is 0 everywhere */
    for (size_t i = 0; i < a->count; i++) {
        double y = 0;
        if (same_type && memcmp(a->data + i * size, b->data + i * size, size) == 0) continue;
        same_bits = 0;
        double apart = distance_at(a, b, i, &y);
        if (apart == INFINITY || apart > o->atol + o->rtol * fabs(y)) beyond++;
        double share = apart / fabs(y);
        if (apart == INFINITY) share = apart;            /* also where y is infinite or NaN */
        if (apart > largest) at = i;
        largest = fmax(largest, apart);
        if (y == 0 || !(share > largest_share)) continue;
        share_at = i;
        largest_share = share;
    }
    if (same_bits) puts("the same bits");
    else if (largest == 0) puts("equal, in other bits");     /* as 0 and -0, or F16 and F32 */
    if (largest == 0) return 0;
    printf("%zu of %zu beyond the tolerance, |a - b| up to %.9g at [%s], |a - b| / |b| ", beyond,
           a->count, largest, index_text(a, at));
    if (largest_share < 0) puts("-");
    else printf("up to %.9g at [%s]\n", largest_share, index_text(a, share_at));
    return beyond > 0;
}

/* Prints a line. Returns whether the tensors differ. */
static int compare_tensors(const sc_tensor *a, const sc_tensor *b, const options *o) {
    printf("%-40s %s", shown(a->name), sc_dtype_name(a->dtype));
    if (a->dtype != b->dtype) printf(" and %s", sc_dtype_name(b->dtype));
    printf(", %s: ", join_sizes(a->shape, a->rank, " x "));
    if (a->rank == b->rank && memcmp(a->shape, b->shape, sizeof a->shape) == 0)
        return compare_numbers(a, b, o);
    printf("the other is %s\n", join_sizes(b->shape, b->rank, " x "));
    return 1;
}

/* Names the keys whose values differ, which do not count as differences. */
static void compare_metadata(const sc_safetensors *file, const options *o) {
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < file[k].entries; i++) {
            const char *key = file[k].metadata[i].key;
            const char *a = sc_metadata_find(&file[0], key);
            const char *b = sc_metadata_find(&file[1], key);
            if (o->common && !(a && b)) continue;
            if (a && b && (k == 1 || strcmp(a, b) == 0)) continue;
            if (!a) a = "nothing";
            if (!b) b = "nothing";
            printf("metadata %s: %s and %s\n", shown(key), shown(a), shown(b));
        }
    }
}

/* Tensors of the first file, then those that only the second one has. */
static int compare_files(const sc_safetensors *file, const options *o) {
    int differing = 0, lines = 0;
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < file[k].tensors; i++) {
            const sc_tensor *t = &file[k].tensor[i], *other = sc_tensor_find(&file[!k], t->name);
            if (other && k == 1) continue;
            if (!other && o->common) continue;
            lines++;
            if (!other) printf("%-40s only in %s\n", shown(t->name), shown(file[k].path));
            if (!other || compare_tensors(t, other, o)) differing++;
        }
    }
    compare_metadata(file, o);
    SC_TRY(end_of_output());
    if (o->common && lines == 0)
        return fail("%s: has no tensor in common with %s", file[0].path, file[1].path);
    if (differing == 0) return SC_OK;
    return fail("%s: differs from %s in %d of %d tensors", file[0].path, file[1].path, differing,
                lines);
}

static int command_compare(session *s) {
    sc_safetensors file[2];
    SC_TRY(sc_safetensors_open(&file[0], s->o->operand[0]));
    int status = sc_safetensors_open(&file[1], s->o->operand[1]);
    if (status == SC_OK) status = compare_files(file, s->o);
    for (int k = 0; k < 2; k++)
        sc_safetensors_close(&file[k]);
    return status;
}

/* ============================================================================================
 * 25. The command line
 *
 * One table of options, whose rows say which commands take them; one of options that exclude or
 * need each other; one of commands. The help texts, the checks and the parser follow the tables.
 * ============================================================================================ */
#ifndef SAECLIP_NO_MAIN

/* Commands, and sets of commands that take the same options. */
enum {
    INFO = 1, PACK = 2, EXTRACT = 4, TRAIN = 8, ENCODE = 16, EVAL = 32, STATS = 64, TOP = 128,
    MASK = 256, ZEROSHOT = 512, COMPARE = 1024, MERGE = 2048, EXPLAIN = 4096, PLOT = 8192,
    ATLAS = 16384, EVERY = 32767,
    LATENTS = TOP | MASK,
    LOOKS = LATENTS | EXPLAIN | ATLAS,           /* show latents on images */
    SAES = ENCODE | EVAL | STATS | LOOKS | ZEROSHOT,
    DATA = TRAIN | ENCODE | EVAL | STATS,
    ACTS = DATA | MASK,
    PHOTOS = DATA | EXTRACT | LOOKS | ZEROSHOT,  /* run a model on images */
    IMAGES = PHOTOS | PACK,
    OUTPUT = LOOKS | PACK | EXTRACT | TRAIN | ENCODE | STATS | PLOT | MERGE
};

/* The type of an option's value: FLAG has none, TEXTS is a list, CHOICE one of several words. WHOLE
 * is an integer kept as a long, LARGE one that may need more than 32 bits, kept as a double. */
typedef enum { FLAG, TEXT, TEXTS, CHOICE, WHOLE, LARGE, NUMBER } option_kind;

/* value: its name in the help or, of a CHOICE, the possible words; place: where it goes in options;
 * fallback: its default; least, most: limits of a number. */
static const struct option_row {
    const char *name, *value;
    option_kind kind;
    size_t place;
    int commands;
    const char *help, *fallback;
    double least, most;
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
    { "--hook", "attn|mlp|resid", CHOICE, AT(hook), PHOTOS,
      "hook point (default: the SAE's, else mlp)" },
    { "--tokens", "all|cls|patches", CHOICE, AT(tokens), EXTRACT,
      "tokens to write (default: all)" },
    { "--dtype", "f32|f16", CHOICE, AT(dtype), EXTRACT,
      "number type", "f32" },
    /* Images and preprocessing */
    { "--size", "S", WHOLE, AT(size), PACK,
      "side of the images in pixels", "224", 1, 16384 },
    { "--square", "N", WHOLE, AT(square), IMAGES,
      "first resize the centre square to N x N", NULL, 0, 16384 },
    { "--crop", "torchvision|hf", CHOICE, AT(crop), IMAGES,
      "rounding of the centre crop (default: the SAE's, else torchvision)" },
    { "--limit", "N", WHOLE, AT(limit), IMAGES,
      "only the first N images", NULL, 1, 2e9 },
    { "--skip-bad", NULL, FLAG, AT(skip_bad), IMAGES & ~(TOP | EXPLAIN | ATLAS),
      "name unreadable images and go on" },
    /* What the model file may not say */
    { "--mean", "R,G,B", TEXT, AT(settings.mean), PHOTOS,
      "overrules the model's image_mean" },
    { "--std", "R,G,B", TEXT, AT(settings.std), PHOTOS,
      "overrules the model's image_std" },
    { "--gelu", "quick|erf", CHOICE, AT(settings.gelu), PHOTOS,
      "overrules the model's activation function" },
    { "--eps", "X", TEXT, AT(settings.epsilon), PHOTOS,
      "overrules the layer norms' epsilon" },
    { "--heads", "N", TEXT, AT(settings.heads), PHOTOS,
      "overrules the number of heads" },
    /* The SAE and its training */
    { "--arch", "relu|topk", CHOICE, AT(arch), TRAIN | SAES,
      "default: relu, or the file's" },
    { "--k", "K", WHOLE, AT(k), TRAIN | SAES,
      "of TopK (default: 32, or the file's)", NULL, 1, 1e9 },
    { "--expansion", "E", WHOLE, AT(expansion), TRAIN,
      "latents per input", "64", 1, 65536 },
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
    { "--seed", "N", LARGE, AT(seed), TRAIN,
      "of all random numbers", "42", 0, 0x1p53 - 1 },
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
    { "--tensors", NULL, FLAG, AT(tensors), INFO,
      "also list the tensors" },
    { "--common", NULL, FLAG, AT(common), COMPARE,
      "only tensors and metadata that both have" },
    { "--rtol", "X", NUMBER, AT(rtol), COMPARE,
      "relative tolerance", "0", 0, 1e30 },
    { "--atol", "X", NUMBER, AT(atol), COMPARE,
      "absolute tolerance", "0", 0, 1e30 },
    { "--format", "text|csv|json", CHOICE, AT(format), EVAL | EXPLAIN | ZEROSHOT,
      "of the output", "text" },
    /* All commands */
    { "--threads", "N", WHOLE, AT(threads), EVERY,
      "default: all cores", NULL, 1, SC_MAX_THREADS },
    { "--quiet", NULL, FLAG, AT(quiet), EVERY,
      "no progress, no remarks" } };

#define OPTIONS COUNT(option_table)
_Static_assert(COUNT(option_table) <= MAX_OPTIONS, "options.given has room for each");

/* Options of which one would make the other ineffective. */
static const char *const excluded[][2] = {
    { "--init", "--expansion" }, { "--init", "--latents" }, { "--init", "--b-dec" },
    { "--steps", "--epochs" }, { "--square", "--size" }, { "--latents", "--expansion" },
    { "--acts", "-m" }, { "--acts", "--square" }, { "--acts", "--crop" }, { "--acts", "--mean" },
    { "--acts", "--std" }, { "--acts", "--gelu" }, { "--acts", "--eps" }, { "--acts", "--heads" },
    { "--acts", "--skip-bad" } };

/* Options that have no effect without the other. */
static const char *const needed[][2] = {
    { "--b-dec-images", "--b-dec" }, { "--dead-window", "--ghost" },
    { "--checkpoint-every", "--checkpoint" }, { "--threshold", "--class-counts" } };

/* Options that a synopsis names must be given; least, most: numbers of operands. */
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

static int print_help(void) {
    puts("saeclip: sparse autoencoders on a vision transformer's activations\n\n"
         "    saeclip COMMAND [options] [IMAGES or FILE ...]\n");
    for (size_t i = 0; i < COUNT(command_table); i++)
        printf("    %-9s %s\n", command_table[i].name, command_table[i].help);
    puts("\nIMAGES: a folder (or a folder of folders, one per class), a list (.txt), a packed set\n"
         "(.safetensors) or one image. `saeclip COMMAND --help` lists the options of a command.\n"
         "Environment: SAECLIP_ISA and SAECLIP_DECODER, see README.md.");
    return end_of_output();
}

static int print_command_help(const struct command_row *command) {
    printf("saeclip %s %s\n\n%s\n\n", command->name, command->synopsis, command->help);
    for (size_t i = 0; i < OPTIONS; i++) {
        const struct option_row *row = &option_table[i];
        const char *value = row->value ? row->value : "";
        if (!(row->commands & command->bit)) continue;
        if (row->kind == CHOICE) value = "KIND";
        printf("    %s %-*s %s", row->name, 23 - (int)strlen(row->name), value, row->help);
        if (row->kind == CHOICE) printf(": %s", row->value);
        if (row->fallback) printf(" (default %s)", row->fallback);
        puts("");
    }
    printf("\nexample: saeclip %s %s\n", command->name, command->example);
    return end_of_output();
}

/* --- Parsing --- */

/* Stores the value of an option; text: NULL where it is missing. */
static int set_option(options *o, const struct option_row *row, const char *text) {
    void *place = (char *)o + row->place;
    double number;
    if (row->kind == FLAG) {
        *(int *)place = 1;
        return SC_OK;
    }
    if (!text || !*text) return usage("%s: no value (expected %s)", row->name, row->value);
    if (row->kind == CHOICE && !is_choice(row->value, text))
        return usage("%s: invalid value '%s' (expected one of %s)", row->name, text, row->value);
    if (row->kind == TEXT || row->kind == CHOICE) {
        *(const char **)place = text;
        return SC_OK;
    }
    if (row->kind == TEXTS) {
        if (o->saes == SC_MAX_TAPS)
            return usage("%s: given more than %d times", row->name, SC_MAX_TAPS);
        o->sae[o->saes++] = text;
        return SC_OK;
    }
    SC_TRY(parse_number(text, row->name, row->least, row->most, &number));
    if (row->kind != NUMBER && number != floor(number))
        return usage("%s: invalid value '%s' (expected a whole number)", row->name, text);
    if (row->kind == WHOLE) *(long *)place = (long)number;
    else *(double *)place = number;
    return SC_OK;
}

/* The option of a command with this name of `length` bytes, or NULL. */
static const struct option_row *find_option(int command, const char *name, size_t length) {
    for (size_t i = 0; i < OPTIONS; i++) {
        const struct option_row *row = &option_table[i];
        if (!(row->commands & command)) continue;
        if (strlen(row->name) == length && strncmp(row->name, name, length) == 0) return row;
    }
    return NULL;
}

/* One argument that begins with "-", and its value: "-o FILE", "--lr 1" or "--lr=1". */
static int parse_option(options *o, const struct command_row *command, char **argv, int *at) {
    const char *name = argv[*at], *text = NULL;
    size_t length = strlen(name);
    if (name[1] == '-' && strchr(name, '=')) {
        length = strcspn(name, "=");
        text = name + length + 1;
    }
    const struct option_row *row = find_option(command->bit, name, length);
    if (!row)
        return usage("%s: unknown option %s (see saeclip %s --help)", command->name, name,
                     command->name);
    unsigned char *given = &o->given[row - option_table];
    if (row->kind == FLAG && text) return usage("%s: takes no value", row->name);
    if (*given && row->kind != TEXTS) return usage("%s: given twice", row->name);
    *given = 1;
    if (row->kind != FLAG && !text && argv[*at + 1]) text = argv[++*at];
    return set_option(o, row, text);
}

/* --- Checking --- */

static int was_given(const options *o, const char *name) {
    for (size_t i = 0; i < OPTIONS; i++)
        if (o->given[i] && strcmp(option_table[i].name, name) == 0) return 1;
    return 0;
}

/* Whether two paths name one regular file. */
static int same_file(const char *a, const char *b) {
    struct stat at[2];
    if (stat(a, &at[0]) != 0 || stat(b, &at[1]) != 0) return strcmp(a, b) == 0;
    return S_ISREG(at[0].st_mode) && at[0].st_ino == at[1].st_ino && at[0].st_dev == at[1].st_dev;
}

/* The outputs of training must be different files. The log is appended to; so it must not be an
 * input either, whereas other outputs may replace inputs. */
static int check_outputs(const options *o) {
    const char *path[] = { o->log, o->output, o->checkpoint,
                           o->model, o->acts, o->init, o->operand[0] };
    for (size_t i = 0; i < 3; i++) {
        size_t end = i == 0 ? COUNT(path) : 3;
        for (size_t j = i + 1; j < end; j++)
            if (path[i] && path[j] && same_file(path[i], path[j]))
                return usage("%s: given for two files, one of them an output", path[j]);
    }
    return SC_OK;
}

/* Rules that depend on the values of options. */
static int check_values(const options *o, const struct command_row *command) {
    int topk = o->arch && strcmp(o->arch, "topk") == 0, train = command->bit == TRAIN;
    int top_mask = o->mask && strcmp(o->mask, "top") == 0;
    if (o->k && !topk && (train || o->arch)) return usage("--k needs --arch topk");
    if (train && topk && was_given(o, "--l1"))
        return usage("--l1 and --arch topk exclude each other");
    if (command->bit == ZEROSHOT && !o->saes && (o->layer || o->hook || o->arch || o->k))
        return usage("zeroshot: --layer, --hook, --arch and --k need an SAE (-s FILE)");
    if (top_mask && !o->stats) return usage("--mask top needs -t FILE");
    if (command->bit == MASK && o->stats && !top_mask) return usage("-t needs --mask top");
    if (was_given(o, "--layer") && o->layer == 0)
        return usage("--layer: invalid value '0' (expected 1 for the first, -1 for the last)");
    return SC_OK;
}

/* Whether a command has the options and operands that it needs, and none that contradict. */
static int check_options(const options *o, const struct command_row *command, int operands) {
    const char *name = command->name;
    for (const char *c = command->synopsis; (c = strchr(c, '-')) != NULL; c++) {
        const char option[] = { '-', c[1], '\0' };
        if (c[2] == ' ' && !was_given(o, option))
            return usage("%s: %s is missing (see saeclip %s --help)", name, option, name);
    }
    for (size_t i = 0; i < COUNT(excluded); i++)
        if (was_given(o, excluded[i][0]) && was_given(o, excluded[i][1]))
            return usage("%s and %s exclude each other", excluded[i][0], excluded[i][1]);
    for (size_t i = 0; i < COUNT(needed); i++)
        if (was_given(o, needed[i][0]) && !was_given(o, needed[i][1]))
            return usage("%s needs %s", needed[i][0], needed[i][1]);
    if (o->acts && operands) return usage("--acts and IMAGES exclude each other");
    if (operands < command->least || operands > command->most)
        return usage("%s: %d operands (expected %s)", name, operands, command->synopsis);
    if (o->saes > 1 && command->bit != EVAL) return usage("%s: takes one SAE (-s FILE)", name);
    SC_TRY(check_values(o, command));
    return check_outputs(o);
}

/* argv ends with NULL. */
static int run_command(const struct command_row *command, char **argv) {
    options o = { .square = -1, .steps = -1, .threshold = -1, .class_index = -1 };   /* not given */
    int operands = 0, plain = 0;
    for (size_t i = 0; i < OPTIONS; i++) {
        const struct option_row *row = &option_table[i];
        if (row->fallback) SC_TRY(set_option(&o, row, row->fallback));
    }
    for (int i = 0; argv[i]; i++) {
        if (!plain && strcmp(argv[i], "--help") == 0) return print_command_help(command);
        if (!plain && strcmp(argv[i], "--") == 0) {
            plain = 1;
        } else if (!plain && argv[i][0] == '-' && argv[i][1]) {
            SC_TRY(parse_option(&o, command, argv, &i));
        } else {
            if (operands < MAX_OPERANDS) o.operand[operands] = argv[i];
            operands++;
        }
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
    if (argc < 2) return usage("no command (see saeclip --help)");
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) return print_help();
    for (size_t i = 0; i < COUNT(command_table); i++)
        if (strcmp(argv[1], command_table[i].name) == 0)
            return run_command(&command_table[i], argv + 2);
    if (strcmp(argv[1], "--version") != 0)
        return usage("unknown command '%s' (see saeclip --help)", argv[1]);
    puts("saeclip " SC_VERSION);
    return end_of_output();
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

/* ============================================================================================
 * 26. The atlas's page
 *
 * index.html, line by line: style, elements, script. It shows a list of latents, which can be
 * sorted by column and filtered by class, a scatter plot, and the top images of one latent.
 * ============================================================================================ */

static const char *const atlas_page[] = {
    /* Style. From 801 pixels on, the list stands at the left of the images, each with its own
     * scroll bar; narrower windows have it above them, three images per row. */
    "<!DOCTYPE html>",
    "<html lang='en'>",
    "<head>",
    "<meta charset='utf-8'>",
    "<meta name='viewport' content='width=device-width, initial-scale=1'>",
    "<title>Atlas</title>",
    "<style>",
    ":root { color-scheme: light dark; }",
    "* { box-sizing: border-box; }",
    "body { margin: 0; font: 15px/1.4 system-ui, sans-serif; overflow-wrap: anywhere; }",
    "header, section, main { padding: 10px 14px; }",
    "h1, h2 { display: inline; font-size: 19px; margin-right: 10px; }",
    ".soft { color: GrayText; }",
    "table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }",
    "th { cursor: pointer; font-weight: normal; color: LinkText; }",
    "th, td { text-align: right; padding: 2px 4px; white-space: nowrap; }",
    "th:last-child, td:last-child { text-align: left; width: 99%; max-width: 0; }",
    "td:last-child, figcaption { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }",
    "tbody tr { cursor: pointer; }",
    "tbody tr:hover, .chosen { background: Highlight; color: HighlightText; }",
    "#filter { width: 100%; font: inherit; margin-bottom: 8px; }",
    "#scatter { width: 100%; height: 220px; cursor: crosshair; }",
    "#rows { height: 180px; overflow-y: auto; }",
    "#figures { display: grid; gap: 10px; grid-template-columns: repeat(3, 1fr); }",
    "figure { margin: 0; min-width: 0; }",
    ".image { position: relative; aspect-ratio: 1; }",
    ".image > * { position: absolute; width: 100%; height: 100%; }",
    ".image > canvas { image-rendering: pixelated; }",
    "@media (min-width: 801px) {",
    "    body { display: grid; grid-template: auto 1fr / 430px 1fr; height: 100vh; }",
    "    header { grid-column: 1 / 3; }",
    "    section { display: flex; flex-direction: column; min-height: 0; }",
    "    main, #rows { flex: 1; overflow-y: auto; }",
    "    #figures { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }",
    "}",
    "</style>",
    "</head>",
    /* The list of latents, and one latent with its images. */
    "<body>",
    "<header><h1>Atlas</h1><span id='about' class='soft'>needs JavaScript</span></header>",
    "<section>",
    "<input id='filter' type='search' placeholder='class or latent' aria-label='class or latent'>",
    "<canvas id='scatter' role='img' aria-label='frequency and mean of the latents'></canvas>",
    "<div id='rows'><table><thead><tr><th>latent</th>",
    "<th title='share of the images on which it fires'>images</th>",
    "<th title='mean activation over these images'>mean</th>",
    "<th title='of the classes of its top images, in nats'>entropy</th>",
    "<th title='with the largest share of its top images'>class</th>",
    "</tr></thead><tbody></tbody></table></div>",
    "</section>",
    "<main>",
    "<h2 id='name'></h2><span id='facts' class='soft'></span>",
    "<p><button id='before' title='left arrow'>&#8592;</button>",
    "<button id='after' title='right arrow'>&#8594;</button>",
    "<span id='masks'><label><input type='radio' name='mask' value='none'> images</label>",
    "<label><input type='radio' name='mask' value='value' checked> where it fires</label>",
    "<label><input type='radio' name='mask' value='top'> top patches</label></span></p>",
    "<p id='classes'></p>",
    "<div id='figures'></div>",
    "</main>",
    /* data: the contents of latents.js; a row of data.latents is [latent, frequency, mean,
     * entropy, class]. parts: the N.js read so far. order: the listed rows, sorted by column `key`,
     * ascending if `way` is 1. */
    "<script>",
    "'use strict';",
    "const $ = id => document.getElementById(id);",
    "const parts = {};",
    "let data, latent = 0, order = [], key = 3, way = 1;",
    /* What the scripts in data/ call. */
    "const atlas = {",
    "    open(all) {",
    "        data = all;",
    "        data.latents.forEach((row, j) => row.unshift(j));",
    "        $('about').textContent = data.name + ': ' + data.latents.length + ' latents, ' +",
    "            data.images + ' images';",
    "        arrange();",
    "        follow();",
    "    },",
    "    part(number, latents) {",
    "        parts[number] = latents;",
    "        load();",
    "    }",
    "};",
    /* Texts; "-" where a value is not defined. */
    "function make(tag, parent, properties) {",
    "    return parent.appendChild(Object.assign(document.createElement(tag), properties));",
    "}",
    "function digits(x) {",
    "    return x > 0 && x < 1e-3 ? x.toExponential(1) : Number(x.toPrecision(3));",
    "}",
    "function percent(share) { return digits(100 * share) + ' %'; }",
    "function nameOf(c) { return c < 0 ? '-' : data.classes[c] ?? 'class ' + c; }",
    "function meanOf(row) { return row[1] === 0 ? '-' : digits(row[2]); }",
    "function entropyOf(row) { return row[3] < 0 ? '-' : row[3].toFixed(2); }",
    /* The latents that match the filter, sorted; silent ones and undefined values come last. */
    "function arrange() {",
    "    const text = $('filter').value.trim().toLowerCase();",
    "    const last = row => row[1] === 0 || row[key] < 0;",
    "    order = data.latents.filter(row => text === '' || String(row[0]) === text ||",
    "                                       nameOf(row[4]).toLowerCase().includes(text));",
    "    order.sort((a, b) => last(a) - last(b) || way * (a[key] - b[key]) || a[0] - b[0]);",
    "    fill();",
    "}",
    /* The first 500 rows of the list. */
    "function fill() {",
    "    const body = document.querySelector('tbody');",
    "    body.replaceChildren();",
    "    for (const row of order.slice(0, 500)) {",
    "        const tr = make('tr', body, { onclick: () => location.hash = 'latent=' + row[0] });",
    "        tr.className = row[0] === latent ? 'chosen' : '';",
    "        for (const textContent of [row[0], percent(row[1]), meanOf(row), entropyOf(row),",
    "                                   nameOf(row[4])]) make('td', tr, { textContent });",
    "    }",
    "    const more = order.length - 500;",
    "    if (more > 0) make('td', make('tr', body), { textContent: more + ' more', colSpan: 5 });",
    "    draw();",
    "}",
    /* Each latent that fires as [row, x, y] in pixels of the scatter plot: log10 of frequency
     * across, log10 of mean activation up. */
    "function places() {",
    "    const canvas = $('scatter'), live = order.filter(row => row[1] > 0 && row[2] > 0);",
    "    const scale = (i, from, to) => {",
    "        const logs = live.map(row => Math.log10(row[i]));",
    "        const low = logs.reduce((a, b) => Math.min(a, b), 0) - 0.1;",
    "        const high = logs.reduce((a, b) => Math.max(a, b), -9) + 0.1;",
    "        return logs.map(log => from + (to - from) * (log - low) / (high - low));",
    "    };",
    "    const x = scale(1, 8, canvas.clientWidth - 8);",
    "    const y = scale(2, canvas.clientHeight - 18, 18);",
    "    return live.map((row, i) => [row, x[i], y[i]]);",
    "}",
    "function draw() {",
    "    const canvas = $('scatter'), g = canvas.getContext('2d');",
    "    canvas.width = canvas.clientWidth * devicePixelRatio;",
    "    canvas.height = canvas.clientHeight * devicePixelRatio;",
    "    g.scale(devicePixelRatio, devicePixelRatio);",
    "    g.fillStyle = g.strokeStyle = getComputedStyle(document.body).color;",
    "    g.font = '12px system-ui, sans-serif';",
    "    g.fillText('mean activation (log) \\u2191', 0, 11);",
    "    g.fillText('share of images (log) \\u2192  colour: entropy', 0, canvas.clientHeight - 3);",
    "    for (const [row, x, y] of places()) {",
    "        g.fillStyle = row[3] < 0 ? '#888' : 'hsl(' + (215 + 70 * row[3]) + ' 75% 55%)';",
    "        g.fillRect(x - 1.5, y - 1.5, 3, 3);",
    "        if (row[0] !== latent) continue;",
    "        g.beginPath();",
    "        g.arc(x, y, 7, 0, 7);",
    "        g.stroke();",
    "    }",
    "}",
    /* A click chooses the nearest latent within 20 pixels. */
    "$('scatter').onclick = event => {",
    "    const far = ([, x, y]) => Math.hypot(x - event.offsetX, y - event.offsetY);",
    "    const [best] = places().sort((a, b) => far(a) - far(b));",
    "    if (best && far(best) < 20) location.hash = 'latent=' + best[0][0];",
    "};",
    /* Shows the latent that the address names, else the first of the list. */
    "function follow() {",
    "    const named = new URLSearchParams(location.hash.slice(1)).get('latent') ?? order[0]?.[0];",
    "    const row = data.latents[named];",
    "    if (!row) return tell('There is no latent ' + named + '.');",
    "    latent = row[0];",
    "    $('name').textContent = document.title = 'Latent ' + latent;",
    "    $('facts').textContent = 'fires on ' + percent(row[1]) + ' of the images, mean ' +",
    "        'activation ' + meanOf(row) + ', entropy ' + entropyOf(row);",
    "    fill();",
    "    load();",
    "}",
    "function tell(text) {",
    "    $('classes').textContent = text;",
    "    $('figures').replaceChildren();",
    "}",
    /* A page that comes from a file may not read files, but it may run scripts. */
    "function load() {",
    "    const number = Math.floor(latent / data.part), src = 'data/' + number + '.js';",
    "    if (parts[number]) return show(parts[number][latent % data.part]);",
    "    make('script', document.head, { src, onerror: () => tell(src + ' cannot be read.') });",
    "}",
    /* The classes' shares of the activation, then the images. strength(p) of a canvas: how strong
     * the latent is on patch p, from 0 to 1, in each kind of mask. */
    "function show(images) {",
    "    const shares = new Map(), total = images.reduce((sum, image) => sum + image[1], 0);",
    "    for (const image of images) shares.set(image[2], (shares.get(image[2]) ?? 0) + image[1]);",
    "    tell([...shares].filter(([c]) => c >= 0).sort((a, b) => b[1] - a[1]).slice(0, 6)",
    "        .map(([c, sum]) => nameOf(c) + ' ' + percent(sum / total)).join(', '));",
    "    for (const [number, activation, label, title, mask, patches] of images) {",
    "        const figure = make('figure', $('figures'));",
    "        const image = make('div', figure, { className: 'image' });",
    "        make('img', image, { src: 'data/' + number + '.jpg', alt: title, title });",
    "        make('canvas', image, { title, width: data.grid, height: data.grid, strength: {",
    "            none: () => 1,",
    "            value: p => parseInt(mask[p], 16) / 15,",
    "            top: p => Number(patches.includes(p))",
    "        } });",
    "        const text = make('figcaption', figure, { textContent: digits(activation) + ' ' });",
    "        make('span', text, { className: 'soft', textContent: nameOf(label) });",
    "    }",
    "    paint();",
    "}",
    /* A veil of grey, through which the image stays visible: thick over silent patches, thin over
     * weak ones, none where the latent is strongest. */
    "function paint() {",
    "    const kind = document.querySelector('[name=mask]:checked').value;",
    "    for (const canvas of document.querySelectorAll('.image canvas')) {",
    "        const g = canvas.getContext('2d'), pixels = g.createImageData(data.grid, data.grid);",
    "        pixels.data.fill(128);",
    "        for (let p = 0; p < data.grid ** 2; p++) {",
    "            const strength = canvas.strength[kind](p);",
    "            pixels.data[4 * p + 3] = strength ? 90 * (1 - strength) : 160;",
    "        }",
    "        g.putImageData(pixels, 0, 0);",
    "    }",
    "}",
    /* The neighbour in the list. */
    "function step(by) {",
    "    const next = order[order.findIndex(row => row[0] === latent) + by];",
    "    if (next) location.replace('#latent=' + next[0]);",
    "}",
    "document.querySelectorAll('th').forEach((head, i) => head.onclick = () => {",
    "    way = key === i ? -way : 1;",
    "    key = i;",
    "    arrange();",
    "});",
    "$('filter').oninput = arrange;",
    "$('masks').onchange = paint;",
    "$('before').onclick = () => step(-1);",
    "$('after').onclick = () => step(1);",
    "onkeydown = event => {",
    "    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];",
    "    if (by && !event.altKey && !event.metaKey && event.target.id !== 'filter') step(by);",
    "};",
    "onhashchange = follow;",
    "onresize = draw;",
    "</script>",
    "<script src='data/latents.js'></script>",
    "</body>",
    "</html>",
};

static void write_page(FILE *out) {
    for (size_t i = 0; i < COUNT(atlas_page); i++)
        fprintf(out, "%s\n", atlas_page[i]);
}

#endif /* !SC_ISA */
