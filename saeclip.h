/* saeclip.h: the C API of saeclip, sparse autoencoders on a vision transformer's activations.
 *
 *     cc -DSAECLIP_NO_MAIN -ffp-contract=off -c saeclip.c        and link with -lm -pthread
 *
 * Functions that can fail return SC_OK, SC_FAILED (the input or the machine is at fault) or
 * SC_USAGE (the caller is), and sc_error() then gives the reason in one line to the thread that
 * called. Call sc_instruction_set() and sc_threads_start() once, before anything else; call all
 * other functions from one thread; they share the work among the pool's threads. Without these two
 * calls the fastest kernels are chosen at the first use, and one thread works. Every number is the
 * same bit for bit on every machine. Shapes are written [rows, columns], row by row. The licence is
 * at the end.
 */
#ifndef SAECLIP_H
#define SAECLIP_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define SC_VERSION "0.1"

enum { SC_OK = 0, SC_FAILED = 1, SC_USAGE = 2 };

enum {
    SC_MAX_THREADS = 1024,
    SC_MAX_RANK = 8,                 /* dimensions of a tensor */
    SC_MAX_TAPS = 16,                /* hook points, or SAEs, in one pass */
    SC_MAX_WIDTH = 1 << 20,
    SC_MAX_LATENTS = 1 << 28,
    SC_MAX_TOKENS = 1 << 20,         /* of an image */
    SC_MAX_CLASSES = 1 << 24,
    SC_MAX_BATCH_TOKENS = 1 << 28
};

/* The reason of this thread's last failure: "FILE: what is wrong and what was expected". */
const char *sc_error(void);

/* Chooses the kernels: "avx512", "avx2", "neon", "scalar", or NULL for the fastest the machine has.
 * Call it before any model or SAE is opened. SC_USAGE if the machine does not have it; SC_FAILED if
 * the build contracts floating-point expressions. */
int sc_instruction_set(const char *name);

/* Starts the pool: `threads` in all, 0 for one per core. No result depends on their number. */
int sc_threads_start(int threads);
void sc_threads_stop(void);

/* The definitions that all matrix products and dot products are held to, as plain loops.
 * c = a b + bias + residual: each element is the sum of chains of 256 fused multiply-adds over k,
 * then bias, residual and +0. a: [M, K]; b: [K, N]; bias: [N] or NULL; residual: [M, N] or NULL */
void sc_matmul_plain(size_t M, size_t N, size_t K, const float *a, const float *b,
                     const float *bias, const float *residual, float *c);
/* 16 interleaved partial sums, joined by halves. a, b: [n] */
float sc_dot_plain(const float *a, const float *b, size_t n);

/* --- Safetensors (github.com/huggingface/safetensors) --- */

/* The first seven can be read as numbers, the others only named and measured. */
typedef enum {
    SC_F32, SC_F16, SC_BF16, SC_F64, SC_I64, SC_I32, SC_U8,
    SC_BOOL, SC_I8, SC_I16, SC_U16, SC_U32, SC_U64, SC_C64,
    SC_F8_E4M3, SC_F8_E5M2, SC_F8_E8M0, SC_F8_E4M3FNUZ, SC_F8_E5M2FNUZ
} sc_dtype;

typedef struct {
    const char *name;
    sc_dtype dtype;
    int rank;
    size_t shape[SC_MAX_RANK];
    size_t count, bytes;             /* values, and the bytes they take in the file */
    const unsigned char *data;       /* in the mapped file: little-endian, aligned to nothing */
} sc_tensor;

typedef struct { const char *key, *value; } sc_entry;

typedef struct {
    char *path;
    const unsigned char *map, *data; /* the whole file; where its data begin */
    size_t size;                     /* of the whole file */
    char *text;                      /* the header; names and metadata point into it */
    sc_tensor *tensor;               /* in byte order of their names */
    size_t tensors, tensor_capacity;
    sc_entry *metadata;              /* in byte order of their keys */
    size_t entries, entry_capacity;
} sc_safetensors;

const char *sc_dtype_name(sc_dtype dtype);
size_t sc_dtype_size(sc_dtype dtype);

/* Maps a file and checks everything its header claims. SC_FAILED leaves nothing to close. */
int sc_safetensors_open(sc_safetensors *file, const char *path);
void sc_safetensors_close(sc_safetensors *file);
const sc_tensor *sc_tensor_find(const sc_safetensors *file, const char *name);
const char *sc_metadata_find(const sc_safetensors *file, const char *key);

/* Values first .. first + count - 1: F32, F16, BF16, F64 as floats (F64 is rounded; what is not
 * finite is refused), I64, I32, U8 as integers. */
int sc_tensor_floats(const sc_safetensors *file, const sc_tensor *tensor, size_t first,
                     size_t count, float *out);
int sc_tensor_integers(const sc_safetensors *file, const sc_tensor *tensor, size_t first,
                       size_t count, int64_t *out);

/* A file that appears under its name only when it is complete. */
typedef struct {
    const char *path;                /* the caller's */
    char *temporary;                 /* path.tmp */
    const char *previous;            /* the file that is replaced keeps this name; NULL: it goes */
    FILE *file;
} sc_output;

#define SC_ROWS SIZE_MAX             /* as a tensor's first dimension: as many rows as come */

typedef struct {
    sc_output out;
    size_t room;                     /* bytes for the header's entries after the first tensor */
    uint64_t data;                   /* where in the file the data begin; 0: no tensor yet */
    FILE *metadata, *tensors;        /* two parts of the header, in memory */
    char *text[2];                   /* their bytes, and how many */
    size_t length[2];
    sc_tensor tensor;                /* the one that is being written; no name: none is */
    size_t end;                      /* the bytes of data of the tensors before it */
    size_t values;                   /* how many it got so far */
} sc_writer;

/* Writes tensors one after the other, at least one, no name or key twice, and none `__metadata__`.
 * path must last until the end, a tensor's name until the next begins. A tensor's entry in the
 * header takes about 100 bytes. All of them, and the metadata that come after the first tensor,
 * must fit in w->room: raise its 16384 before the first tensor where they do not.
 * sc_writer_close() ends the writer: if the status it gets is SC_OK the whole file appears under its
 * name, otherwise nothing changes. It returns that status, or that of a failure. */
int sc_writer_open(sc_writer *w, const char *path);
int sc_writer_metadata(sc_writer *w, const char *key, const char *value);
int sc_writer_tensor(sc_writer *w, const char *name, sc_dtype dtype, int rank,
                     const size_t *shape);
/* The next values of the last tensor; kind: their type in memory, which is the tensor's, but F32 for
 * a tensor of F16. */
int sc_writer_values(sc_writer *w, const void *values, size_t count, sc_dtype kind);
#define sc_writer_floats(w, v, n) sc_writer_values(w, (const float *){ v }, n, SC_F32)
#define sc_writer_doubles(w, v, n) sc_writer_values(w, (const double *){ v }, n, SC_F64)
#define sc_writer_integers(w, v, n) sc_writer_values(w, (const int64_t *){ v }, n, SC_I64)
#define sc_writer_bytes(w, v, n) sc_writer_values(w, (const unsigned char *){ v }, n, SC_U8)
int sc_writer_close(sc_writer *w, int status);

/* --- Images --- */

/* From an image of any size to the model's input: [3, size, size]. Resized and cropped as
 * Pillow (bicubic, 8 bits) and torchvision do it, bit for bit. */
typedef struct {
    int size;                        /* 1 .. 16384 */
    int square;                      /* first the centre square at this size; 0: no */
    int crop_hf;                     /* crop at floor((n - S) / 2), as Hugging Face does */
    float mean[3], std[3];           /* of pixels in 0 .. 1 */
} sc_preprocess;

typedef struct {
    char *name;                      /* relative to the set's root; "" where there is none */
    int64_t label;                   /* class index, -1: none */
} sc_image;

typedef struct {
    size_t count;
    sc_image *image;                 /* [count] */
    size_t classes;                  /* class names, else largest label + 1, 0 without labels */
    char **class_name;               /* [classes], NULL if the classes have numbers only */
    uint64_t digest;                 /* of names, labels, class names and count */
    char *root;                      /* what stands before names: a folder with its slash, or "" */
    size_t limit;                    /* at most so many images; SIZE_MAX: all */
    sc_safetensors packed;           /* path NULL: not a packed set */
    void *memory;                    /* holds the names of class folders */
    size_t capacity, class_capacity; /* of image and class_name */
} sc_images;

/* A folder of class folders, a flat folder, a list, a packed set or one image; limit: how many
 * images to take, 0 for all. */
int sc_images_open(sc_images *set, const char *path, size_t limit);
void sc_images_close(sc_images *set);
/* pixels: [size, size, 3] */
int sc_image_load(const sc_images *set, size_t index, const sc_preprocess *prep,
                  unsigned char *pixels);

/* --- The vision transformer (Dosovitskiy et al., 2021; Radford et al., 2021) --- */

typedef enum { SC_ATTN, SC_MLP, SC_RESID } sc_hook;

/* One hook point of a forward pass. */
typedef struct {
    size_t layer;                    /* block, from 1 */
    sc_hook hook;
    float *out;                      /* [images tokens, width], `stride` floats from row to row */
    size_t stride;
    /* NULL, or what changes `out` where the pass is to go on with other values */
    int (*replace)(void *context, float *out, size_t rows);
    void *context;
} sc_tap;

/* A matrix as the kernels take it; see saeclip.c. */
typedef struct { size_t K, N, panels; float *data; } sc_matrix;

/* A layer's tensors: a linear layer has a matrix [K, N] for x W and a bias [N], a norm has weight
 * and bias [N], an embedding a weight alone. NULL where the model has none. */
typedef struct { sc_matrix matrix; float *weight, *bias; } sc_layer;

typedef struct {
    sc_safetensors file;
    int naming;                      /* Hugging Face, OpenAI, timm */
    size_t width, heads, hidden, blocks, patch;
    size_t grid, tokens, image_size; /* tokens = 1 + grid^2, image_size = grid patch */
    size_t outputs, classes;         /* of the head; classes: prompts, where it has text_embeds */
    int activation;                  /* 1 QuickGELU, 2 exact GELU */
    float epsilon, mean[3], std[3];
    size_t loaded;                   /* blocks whose weights are in memory */
    sc_layer *layer;                 /* block by block in the order of saeclip.c's table */
    float *text;                     /* [classes, outputs], unit rows, or NULL */
    struct sc_forward_pass *pass;    /* the last one, whose arrays are kept for the next */
} sc_model;

/* Where activations come from: the model's file (without its folder), the block and the hook point,
 * the tokens kept (all, cls or patches), and the settings in force, whether an option, the model's
 * file or the usual value gave them. Activations, SAEs and statistics keep it as metadata. */
enum {
    SC_MODEL, SC_LAYER, SC_HOOK, SC_TOKENS, SC_MEAN, SC_STD, SC_GELU, SC_EPSILON, SC_HEADS,
    SC_SQUARE, SC_CROP, SC_ORIGIN_KEYS
};
typedef struct { char text[SC_ORIGIN_KEYS][256]; } sc_origin;    /* "" where it is not known */

/* Recognises a model by its tensors' names; weights are read by sc_model_load(). What an origin says
 * of mean, std, gelu, epsilon and heads overrules the model's metadata; given: NULL for none */
int sc_model_open(sc_model *model, const char *path, const sc_origin *given);
int sc_model_load(sc_model *model, size_t blocks, int head);
void sc_model_close(sc_model *model);

/* The definition, by the plain loops of Part I, for one image: reads the weights it needs from the
 * model's file, whether they are loaded or not. pixels: [S, S, 3]; layer: from 1; out: [T, D] */
int sc_model_forward_plain(const sc_model *model, const unsigned char *pixels, size_t layer,
                           sc_hook hook, float *out);

/* pixels: [images, S, S, 3]; writes each tap's out; head: [images, classes] logits, or cosines with
 * the text embeddings, or NULL. Runs no block after the last one needed. */
int sc_model_forward(const sc_model *model, const unsigned char *pixels, size_t images,
                     const sc_tap *taps, size_t count, float *head);

/* Sets a tap's layer and hook. SC_FAILED if the origin does not name them. */
int sc_hook_point(const sc_origin *origin, sc_tap *tap);

/* --- The sparse autoencoder (Bricken et al., 2023; Gao et al., 2024; Lim et al., 2025) ---
 *
 *     h = W_enc^T (x - b_dec) + b_enc      f = relu(h), or relu of the k largest, or JumpReLU
 *     x' = W_dec^T f + b_dec
 */

typedef struct {
    size_t d_in, d_sae, stride;      /* D, n; floats from row to row, D padded to 16 */
    int topk;
    size_t k;
    float *W_enc;                    /* [n, stride]: latent by latent; in files [D, n] */
    float *b_enc;                    /* [n] */
    float *W_dec;                    /* [n, stride] */
    float *b_dec;                    /* [stride] */
    float *threshold;                /* [n], >= 0: JumpReLU, f = h where h > it; NULL: none */
    sc_origin origin;                /* of the activations it was trained on */
    char *path;                      /* its file, NULL: none */
    char b_dec_start[32];            /* where training started b_dec; "" where it is not known */
    uint64_t digest;                 /* of the tensors in its file */
} sc_sae;

int sc_sae_open(sc_sae *sae, const char *path);
/* W_enc uniform in +-sqrt(6 / n), W_dec uniform then unit rows, biases 0. A ReLU SAE; set topk and
 * k for TopK. */
int sc_sae_init(sc_sae *sae, size_t d_in, size_t d_sae, uint64_t seed);
int sc_sae_save(const sc_sae *sae, const char *path);
void sc_sae_close(sc_sae *sae);

/* Below, x: [tokens, d_in] and f: [tokens, d_sae] are dense, rows without padding; what is not
 * finite is refused (SC_FAILED, "token T: ..."), and a k that is not 1 .. d_sae (SC_USAGE).
 * A function whose name ends in _plain computes the same bits by the plain loops of Part I. */
int sc_sae_encode(const sc_sae *sae, const float *x, size_t tokens, float *f);
int sc_sae_encode_plain(const sc_sae *sae, const float *x, size_t tokens, float *f);
int sc_sae_decode(const sc_sae *sae, const float *f, size_t tokens, float *reconstruction);
int sc_sae_decode_plain(const sc_sae *sae, const float *f, size_t tokens, float *reconstruction);

/* --- Training (Lim et al., 2025; saeclip.c, section 4, has the formulas) --- */

typedef struct {
    double l1, lr;                   /* lambda (ReLU only); the learning rate after the warm-up */
    size_t warmup;                   /* steps over which the rate rises linearly; 0: none */
    size_t dead_window;              /* silent steps after which a latent is dead */
    int ghost;                       /* whether dead latents get ghost gradients */
} sc_train_options;

/* A step's figures: losses before its update, over its tokens. */
typedef struct {
    double loss, mse, l1, ghost;     /* loss = mse + l1 + ghost */
    double l0;                       /* active latents per token */
    double explained_variance;       /* about the mean token */
    double lr;
    size_t dead;                     /* latents, when the step begins */
    double explained_variance_uncentred;         /* PatchSAE's: the mean is not subtracted */
} sc_step;

typedef struct sc_trainer sc_trainer;

/* A trainer for steps of `tokens` tokens. It trains the caller's SAE in place: that must stay where
 * it is until sc_trainer_free(). NULL on failure; sc_error() says why. */
sc_trainer *sc_trainer_new(sc_sae *sae, const sc_train_options *options, size_t tokens);
/* x: [tokens, d_in], no row of zeros. Rows of W_dec to unit norm, forward, backward, Adam.
 * Fast and plain steps may be mixed. After SC_FAILED the weights are undefined. */
int sc_train_step(sc_trainer *t, const float *x, sc_step *result);
int sc_train_step_plain(sc_trainer *t, const float *x, sc_step *result);
void sc_trainer_free(sc_trainer *t); /* NULL is allowed */

/* --- What is measured (saeclip.c, section 5): the definitions, as plain loops --- */

/* One of a latent's largest values: the mean activation of an image (other: its label, -1 without)
 * or the activation of a patch token (other: the token). (0, -1, -1): no image. */
typedef struct { float value; int64_t image, other; } sc_top;

/* Over a data set; a latent fires on an image if its mean activation over all tokens is above 0. */
typedef struct {
    int64_t image_count, token_count;/* images and tokens on which it fires */
    double activation_sum;           /* over all tokens */
    float sparsity;                  /* image_count / images: its frequency */
    float mean_act;                  /* mean activation, over the images on which it fires */
    float top_entropy;               /* in nats, of the labels of its top images; -1, not defined,
                                      * where fewer than min(10, K) fire or one has no label */
} sc_latent;

/* Latent j of f: [N, T, n]. label: [N], -1 for none, or NULL; first_patch: the first token that is
 * a patch, 1 where token 0 is the class token; top: [K] and patch: [P], in descending order. */
void sc_latent_measure_plain(sc_latent *latent, sc_top *top, size_t K, sc_top *patch, size_t P,
                             const float *f, const int64_t *label, size_t N, size_t T, size_t n,
                             size_t j, size_t first_patch);

/* Over all tokens of a data set. */
typedef struct {
    double mse;                      /* mean of (x' - x)^2 / ||x||: PatchSAE's */
    double mse_raw;                  /* mean of (x' - x)^2 */
    double explained_variance, explained_variance_uncentred;
    double l0, l1;                   /* active latents, and the sum of f, per token */
    double mean_activation;          /* of the active ones */
} sc_metrics;

/* x, reconstruction: [tokens, D]; f: [tokens, n] */
int sc_metrics_plain(sc_metrics *metrics, const float *x, const float *reconstruction,
                     const float *f, size_t tokens, size_t D, size_t n);

#endif

/* MIT License
 *
 * Copyright (c) 2026 the saeclip authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
 * associated documentation files (the "Software"), to deal in the Software without restriction,
 * including without limitation the rights to use, copy, modify, merge, publish, distribute,
 * sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
 * furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or
 * substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
 * NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
 * NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
 * DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
