/* Tests of the fast code against Part I of saeclip.c: the same bits for both kinds of SAE, with and
 * without ghost gradients, in odd shapes, with 1, 2 and 5 threads and every instruction set of this
 * machine. Tests of the library: three programs that are built as their users would, and Part I's
 * training against PyTorch in float64 (tests/golden/make_golden.py). */

/* Numbers of [-1, 1), a third of the columns 0.5 higher, so that directions are not random.
 * x: [count, D] */
static void plain_tokens(float *x, size_t count, size_t D)
{
    for (size_t i = 0; i < count * D; i++) x[i] = random_float() + (i % D % 3 == 0 ? 0.5f : 0);
}

static float *plain_floats(size_t count)
{
    float *room = new_array(count, sizeof *room);
    if (!room) need("memory");
    return room;
}

static int plain_same(const float *a, const float *b, size_t count)
{
    return memcmp(a, b, count * sizeof *a) == 0;
}

/* --- Codes and training --- */

/* Widths and numbers of latents beside multiples of 16 (vector), 64 (tile) and 256 (chain). */
typedef struct { size_t tokens, D, n, k, window; double l1; } plain_shape;

static const plain_shape plain_shapes[] = {
    { 1, 5, 7, 3, 0, 1e-3 },
    { 7, 33, 70, 3, 0, 0 },
    { 64, 300, 31, 31, 0, 1e-3 },                    /* k = n */
    { 65, 16, 600, 1, 0, 1e-2 },
    { 197, 23, 131, 6, 0, 1e-2 },
    { 257, 17, 270, 4, 0, 1e-3 },
    { 300, 37, 90, 3, 1, 1e-1 },
};

enum { PLAIN_STEPS = 6, PLAIN_CASES = 4 * COUNT(plain_shapes) };

/* A shape, a kind of SAE, ghosts or not; and what Part I computes. */
typedef struct {
    plain_shape shape;
    int topk, ghost;
    float *x, *f, *decoded;          /* [tokens, D], [tokens, n], [tokens, D]: plain_codes() */
    sc_sae trained;
    sc_step step[PLAIN_STEPS];
} plain_case;

static plain_case plain_cases[PLAIN_CASES];

/* The case in words, for a failed check. */
static const char *plain_name(const plain_case *c)
{
    static char name[120];
    snprintf(name, sizeof name, "%zu tokens of %zu, %zu latents, %s, ghosts %d", c->shape.tokens,
             c->shape.D, c->shape.n, c->topk ? "TopK" : "ReLU", c->ghost);
    return name;
}

/* The SAE that training starts from. With ghosts, each third latent is dead. */
static void plain_sae(const plain_case *c, sc_sae *sae)
{
    if (sc_sae_init(sae, c->shape.D, c->shape.n, 7) != SC_OK) need("%s", sc_error());
    sae->topk = c->topk;
    sae->k = c->topk ? c->shape.k : 0;
    for (size_t j = 0; j < c->shape.n && c->ghost; j += 3) {
        sae->b_enc[j] = -1;
        for (size_t d = 0; d < c->shape.D; d++) sae->W_enc[j * sae->stride + d] *= 0.01f;
    }
}

static sc_trainer *plain_trainer(const plain_case *c, sc_sae *sae)
{
    sc_train_options settings = { .l1 = c->shape.l1, .lr = 1e-2, .warmup = 3,
                                  .dead_window = c->shape.window, .ghost = c->ghost };
    sc_trainer *t = sc_trainer_new(sae, &settings, c->shape.tokens);
    if (!t) need("%s", sc_error());
    return t;
}

/* Six steps; bit s of `fast` says whether step s is a fast one. */
static int plain_train(const plain_case *c, sc_sae *sae, unsigned fast, sc_step *result)
{
    float *x = plain_floats(c->shape.tokens * c->shape.D);
    int status = SC_OK;
    plain_sae(c, sae);
    sc_trainer *t = plain_trainer(c, sae);
    test_random_state = 5;
    for (int step = 0; step < PLAIN_STEPS && status == SC_OK; step++) {
        plain_tokens(x, c->shape.tokens, c->shape.D);
        if (fast >> step & 1) status = sc_train_step(t, x, &result[step]);
        else status = sc_train_step_plain(t, x, &result[step]);
    }
    sc_trainer_free(t);
    free(x);
    return check(status == SC_OK, "%s: a step fails", plain_name(c));
}

/* An SAE in which each odd latent has the encoder weights of the one before: codes with ties. The
 * cases of ReLU with ghosts have a threshold here, of JumpReLU. */
static void plain_tied_sae(const plain_case *c, sc_sae *sae)
{
    plain_sae(c, sae);
    for (size_t j = 1; j < c->shape.n; j += 2) {
        memcpy(sae->W_enc + j * sae->stride, sae->W_enc + (j - 1) * sae->stride,
               sae->stride * sizeof *sae->W_enc);
        sae->b_enc[j] = sae->b_enc[j - 1];
    }
    if (c->topk || !c->ghost) return;
    sae->threshold = plain_floats(c->shape.n);
    for (size_t j = 0; j < c->shape.n; j++) sae->threshold[j] = 0.01f * (float)(j % 50);
}

/* All cases, by Part I. */
static void plain_prepare(void)
{
    for (size_t i = 0; i < PLAIN_CASES; i++) {
        plain_case *c = &plain_cases[i];
        double ghosts = 0;
        sc_sae tied;
        c->shape = plain_shapes[i / 4];
        c->topk = i / 2 % 2;
        c->ghost = i % 2;
        c->x = plain_floats(c->shape.tokens * c->shape.D);
        c->f = plain_floats(c->shape.tokens * c->shape.n);
        c->decoded = plain_floats(c->shape.tokens * c->shape.D);
        plain_tied_sae(c, &tied);
        test_random_state = 11;
        plain_tokens(c->x, c->shape.tokens, c->shape.D);
        check(sc_sae_encode_plain(&tied, c->x, c->shape.tokens, c->f) == SC_OK
              && sc_sae_decode_plain(&tied, c->f, c->shape.tokens, c->decoded) == SC_OK,
              "%s: Part I does not encode and decode", plain_name(c));
        sc_sae_close(&tied);
        plain_train(c, &c->trained, 0, c->step);
        for (int s = 0; s < PLAIN_STEPS; s++) ghosts += c->step[s].ghost;
        check(c->ghost == (ghosts > 0), "%s: the sum of ghost losses is %g", plain_name(c), ghosts);
    }
}

static void plain_free(void)
{
    for (size_t i = 0; i < PLAIN_CASES; i++) {
        free(plain_cases[i].x);
        free(plain_cases[i].f);
        free(plain_cases[i].decoded);
        sc_sae_close(&plain_cases[i].trained);
    }
}

/* Training by fast steps, or by fast and plain ones, ends in the same bits as by plain ones. */
static void plain_training(const plain_case *c, unsigned fast, const char *how)
{
    sc_sae sae;
    sc_step step[PLAIN_STEPS];
    if (plain_train(c, &sae, fast, step)) {
        const sc_sae *expected = &c->trained;
        size_t numbers = c->shape.n * sae.stride;
        check(memcmp(step, c->step, sizeof step) == 0,
              "%s, steps 0x%x: %s: losses differ from Part I", how, fast, plain_name(c));
        check(plain_same(sae.W_enc, expected->W_enc, numbers)
              && plain_same(sae.W_dec, expected->W_dec, numbers)
              && plain_same(sae.b_enc, expected->b_enc, c->shape.n)
              && plain_same(sae.b_dec, expected->b_dec, c->shape.D),
              "%s, steps 0x%x: %s: weights differ from Part I", how, fast, plain_name(c));
    }
    sc_sae_close(&sae);
}

static void plain_codes(const plain_case *c, const char *how)
{
    sc_sae sae;
    size_t T = c->shape.tokens;
    float *f = plain_floats(T * c->shape.n);
    float *decoded = plain_floats(T * c->shape.D);
    plain_tied_sae(c, &sae);
    check(sc_sae_encode(&sae, c->x, T, f) == SC_OK && plain_same(f, c->f, T * c->shape.n),
          "%s: %s: codes differ from Part I", how, plain_name(c));
    check(sc_sae_decode(&sae, f, T, decoded) == SC_OK
          && plain_same(decoded, c->decoded, T * c->shape.D),
          "%s: %s: reconstructions differ from Part I", how, plain_name(c));
    sc_sae_close(&sae);
    free(f);
    free(decoded);
}

/* --- The vision transformer --- */

/* Writes a ViT of one block with random weights, under timm's names: width 30 in 3 heads, patches
 * of 3 x 3 pixels, grid^2 of them, 7 classes. */
static void plain_write_model(const char *path, size_t grid)
{
    enum { D = 30, H = 50, P = 3, C = 7 };
    const struct { const char *name; int rank; size_t shape[4]; } tensors[] = {
        { "cls_token", 3, { 1, 1, D } },
        { "pos_embed", 3, { 1, 1 + grid * grid, D } },
        { "patch_embed.proj.weight", 4, { D, 3, P, P } },
        { "patch_embed.proj.bias", 1, { D } },
        { "blocks.0.norm1.weight", 1, { D } },
        { "blocks.0.norm1.bias", 1, { D } },
        { "blocks.0.attn.qkv.weight", 2, { 3 * D, D } },
        { "blocks.0.attn.qkv.bias", 1, { 3 * D } },
        { "blocks.0.attn.proj.weight", 2, { D, D } },
        { "blocks.0.attn.proj.bias", 1, { D } },
        { "blocks.0.norm2.weight", 1, { D } },
        { "blocks.0.norm2.bias", 1, { D } },
        { "blocks.0.mlp.fc1.weight", 2, { H, D } },
        { "blocks.0.mlp.fc1.bias", 1, { H } },
        { "blocks.0.mlp.fc2.weight", 2, { D, H } },
        { "blocks.0.mlp.fc2.bias", 1, { D } },
        { "norm.weight", 1, { D } },
        { "norm.bias", 1, { D } },
        { "head.weight", 2, { C, D } },
        { "head.bias", 1, { C } } };
    sc_writer w;
    int status = sc_writer_open(&w, path);
    if (status == SC_OK) status = sc_writer_metadata(&w, "num_attention_heads", "3");
    for (size_t i = 0; i < COUNT(tensors) && status == SC_OK; i++) {
        size_t count = 1;
        for (int r = 0; r < tensors[i].rank; r++) count *= tensors[i].shape[r];
        float *value = plain_floats(count);
        for (size_t e = 0; e < count; e++) value[e] = random_float() / 2;
        status = sc_writer_tensor(&w, tensors[i].name, SC_F32, tensors[i].rank, tensors[i].shape);
        if (status == SC_OK) status = sc_writer_floats(&w, value, count);
        free(value);
    }
    if (status != SC_OK || sc_writer_close(&w, SC_OK) != SC_OK) need("%s", sc_error());
}

/* The models: the golden ones, and those of 2, 197 and 257 tokens that test_plain() writes. */
static const char *plain_model_path(size_t i)
{
    static const char *const names[] = { "clip_hf", "clip_openai", "clip_timm", "vit_timm" };
    static const int tokens[] = { 2, 197, 257 };
    static char path[300];
    if (i >= COUNT(names) + COUNT(tokens)) return NULL;
    if (i < COUNT(names)) snprintf(path, sizeof path, GOLDEN "%s.safetensors", names[i]);
    else snprintf(path, sizeof path, "%s", in_folder("vit%d", tokens[i - COUNT(names)]));
    return path;
}

/* Every hook point of a model for two images at once, which Part I computes one after the other. */
static void plain_hooks(const sc_model *m, const unsigned char *pixels, const char *how)
{
    size_t numbers = m->tokens * m->width;
    size_t image = m->image_size * m->image_size * 3;
    float *a = plain_floats(2 * numbers);
    float *b = plain_floats(2 * numbers);
    for (size_t layer = 1; layer <= m->blocks; layer++)
        for (sc_hook hook = SC_ATTN; hook <= SC_RESID; hook++) {
            sc_tap tap = { .layer = layer, .hook = hook, .out = a, .stride = m->width };
            int status = sc_model_forward(m, pixels, 2, &tap, 1, NULL);
            if (status == SC_OK) status = sc_model_forward_plain(m, pixels, layer, hook, b);
            if (status == SC_OK)
                status = sc_model_forward_plain(m, pixels + image, layer, hook, b + numbers);
            check(status == SC_OK && plain_same(a, b, 2 * numbers),
                  "%s: %s: hook point %d of layer %zu differs from Part I", how, m->file.path, hook,
                  layer);
        }
    free(a);
    free(b);
}

static void plain_head(const sc_model *m, const unsigned char *pixels, const char *how)
{
    sc_model plain = *m;
    float *head = plain_floats(m->classes);
    float *expected = plain_floats(m->classes);
    int status = sc_model_forward(m, pixels, 1, NULL, 0, head);
    plain.pass = NULL;             /* the weights are read for Part I */
    plain.layer = NULL;
    if (status == SC_OK) status = load_layers(&plain, m->blocks);
    if (status == SC_OK) status = vit_forward(&plain, pixels, 0, SC_MLP, NULL, expected);
    check(status == SC_OK && plain_same(head, expected, m->classes),
          "%s: the head of %s differs from Part I", how, m->file.path);
    free_layers(&plain);
    free(head);
    free(expected);
}

static void plain_model(const char *path, const char *how)
{
    sc_model m;
    if (sc_model_open(&m, path, NULL) != SC_OK) need("%s", sc_error());
    float head;
    check(sc_model_forward(&m, NULL, 1, NULL, 0, &head) == SC_FAILED, "%s: runs before it is loaded", path);
    if (sc_model_load(&m, m.blocks, 0) != SC_OK) need("%s", sc_error());
    check(sc_model_forward(&m, NULL, 1, NULL, 0, &head) == SC_FAILED,
          "%s: a head that is not loaded", path);
    sc_model_close(&m);
    if (sc_model_open(&m, path, NULL) != SC_OK) need("%s", sc_error());
    if (sc_model_load(&m, m.blocks, 1) != SC_OK) need("%s", sc_error());
    size_t bytes = m.image_size * m.image_size * 3 * 2;
    unsigned char *pixels = new_array(bytes, 1);
    if (!pixels) need("memory");
    for (size_t e = 0; e < bytes; e++) pixels[e] = (unsigned char)(e * e / 97 + e);
    plain_hooks(&m, pixels, how);
    plain_head(&m, pixels, how);
    sc_model_close(&m);
    free(pixels);
}

/* --- Measuring --- */

/* An SAE and a data set, encoded by Part I. x, decoded: [N T, D]; f: [N T, n]; label: [N] */
typedef struct {
    sc_sae sae;
    size_t N, T, first_patch;
    float *x, *f, *decoded;
    int64_t *label;
} plain_data;

/* Reads activations and labels (-1 without) from a file. */
static void plain_read_acts(plain_data *p, const char *path)
{
    sc_safetensors file;
    if (sc_safetensors_open(&file, path) != SC_OK) need("%s", sc_error());
    const sc_tensor *acts = sc_tensor_find(&file, "activations");
    const sc_tensor *labels = sc_tensor_find(&file, "labels");
    p->N = acts->shape[0];
    p->T = acts->shape[1];
    p->x = plain_floats(acts->count);
    p->label = new_array(p->N, sizeof *p->label);
    if (!p->label) need("memory");
    int status = sc_tensor_floats(&file, acts, 0, acts->count, p->x);
    for (size_t i = 0; i < p->N; i++) p->label[i] = -1;
    if (labels) status |= sc_tensor_integers(&file, labels, 0, p->N, p->label);
    if (status != SC_OK) need("%s", sc_error());
    sc_safetensors_close(&file);
}

/* Runs a model's plain forward pass on a set of images up to the SAE's hook point. */
static void plain_read_images(plain_data *p, const char *model, const char *images)
{
    sc_model m;
    sc_images set;
    if (sc_model_open(&m, model, NULL) != SC_OK || sc_images_open(&set, images, 0) != SC_OK)
        need("%s", sc_error());
    sc_preprocess prep = { .size = (int)m.image_size };
    sc_tap tap;
    unsigned char *pixels = new_array(m.image_size * m.image_size, 3);
    p->N = set.count;
    p->T = m.tokens;
    p->x = plain_floats(p->N * p->T * m.width);
    p->label = new_array(p->N, sizeof *p->label);
    if (!pixels || !p->label) need("memory");
    for (size_t i = 0; i < p->N; i++) {
        float *x = p->x + i * p->T * m.width;
        p->label[i] = set.image[i].label;
        if (sc_image_load(&set, i, &prep, pixels) != SC_OK
            || sc_hook_point(&p->sae.origin, &tap) != SC_OK
            || sc_model_forward_plain(&m, pixels, tap.layer, tap.hook, x) != SC_OK)
            need("%s", sc_error());
    }
    free(pixels);
    sc_images_close(&set);
    sc_model_close(&m);
}

/* Checks a tensor of statistics: [n, columns] numbers, exactly. */
static void plain_check_tensor(const char *how, const char *name, const double *expected,
                               size_t columns, size_t n)
{
    size_t count;
    size_t wrong = 0;
    const double *got = numbers_of(in_folder("measured"), name, &count);
    if (!got || !check(count == n * columns, "%s: %s has %zu numbers", how, name, count)) return;
    for (size_t i = 0; i < count; i++) wrong += !(got[i] == expected[i]);
    check(wrong == 0, "%s: %s: %zu of %zu numbers differ from sc_latent_measure_plain()", how, name,
          wrong, count);
}

/* Compares the statistics in the folder's file "measured" with Part I, number by number. */
static void plain_check_statistics(const plain_data *p, size_t K, size_t P, const char *how)
{
    enum { TENSORS = 11 };
    const struct { const char *name; size_t columns; } tensors[TENSORS] = {
        { "image_count", 1 }, { "token_count", 1 }, { "activation_sum", 1 }, { "sae_sparsity", 1 },
        { "sae_mean_acts", 1 }, { "top_entropy", 1 }, { "max_activating_image_values", K },
        { "max_activating_image_indices", K }, { "max_activating_image_label_indices", K },
        { "max_activating_patch_values", P }, { "max_activating_patch_indices", 2 * P } };
    size_t n = p->sae.d_sae;
    double *expected[TENSORS];
    sc_top *top = new_array(K, sizeof *top);
    sc_top *patch = new_array(P, sizeof *patch);
    if (!top || !patch) need("memory");
    for (size_t i = 0; i < TENSORS; i++) {
        expected[i] = new_array(n * tensors[i].columns, sizeof **expected);
        if (!expected[i]) need("memory");
    }
    for (size_t j = 0; j < n; j++) {
        sc_latent l;
        sc_latent_measure_plain(&l, top, K, patch, P, p->f, p->label, p->N, p->T, n, j,
                                p->first_patch);
        const double single[6] = { (double)l.image_count, (double)l.token_count, l.activation_sum,
                                   (double)l.sparsity, (double)l.mean_act, (double)l.top_entropy };
        for (size_t i = 0; i < 6; i++) expected[i][j] = single[i];
        for (size_t k = 0; k < K; k++) {
            expected[6][j * K + k] = (double)top[k].value;
            expected[7][j * K + k] = (double)top[k].image;
            expected[8][j * K + k] = (double)top[k].other;
        }
        for (size_t k = 0; k < P; k++) {
            expected[9][j * P + k] = (double)patch[k].value;
            expected[10][2 * (j * P + k)] = (double)patch[k].image;
            expected[10][2 * (j * P + k) + 1] = (double)patch[k].other;
        }
    }
    for (size_t i = 0; i < TENSORS; i++) {
        plain_check_tensor(how, tensors[i].name, expected[i], tensors[i].columns, n);
        free(expected[i]);
    }
    free(top);
    free(patch);
}

/* Compares the table that eval printed, in its 9 digits, with Part I. */
static void plain_check_eval(const plain_data *p, const char *how)
{
    sc_metrics m;
    size_t tokens = p->N * p->T;
    if (sc_metrics_plain(&m, p->x, p->decoded, p->f, tokens, p->sae.d_in, p->sae.d_sae) != SC_OK)
        need("%s", sc_error());
    const struct { const char *column; double expected; } cells[] = {
        { "mse", m.mse }, { "mse_raw", m.mse_raw }, { "explained_variance", m.explained_variance },
        { "explained_variance_uncentred", m.explained_variance_uncentred }, { "l0", m.l0 },
        { "l1", m.l1 }, { "mean_activation", m.mean_activation } };
    for (size_t i = 0; i < COUNT(cells); i++) {
        char digits[40];
        snprintf(digits, sizeof digits, "%.9g", cells[i].expected);
        check(csv_number(ran.out, 0, cells[i].column) == strtod(digits, NULL),
              "%s: eval's %s is %.9g, sc_metrics_plain() has %s", how, cells[i].column,
              csv_number(ran.out, 0, cells[i].column), digits);
    }
}

/* What stats and eval write is what Part I's measuring functions compute from Part I's codes:
 * activations with and without labels, more than 256 tokens, patches alone, and images. */
static void plain_measures(void)
{
    static const struct { const char *sae, *model, *data; int k, K, P, patches; } sets[] = {
        { "stats_exact_sae", NULL, "stats_exact_acts", 0, 16, 64, 0 },
        { "stats_exact_sae", NULL, "stats_exact_acts", 5, 4, 3, 0 },
        { "init_300", NULL, "acts", 0, 12, 400, 0 },
        { "init_300", NULL, "acts", 7, 1, 1, 0 },
        { "loop_sae", "clip_hf", "images", 0, 3, 9, 0 },
        { "loop_sae", "clip_hf", "images", 2, 2, 16, 0 },
        { "loop_sae", NULL, NULL, 6, 3, 9, 1 } };
    works("extract --quiet -m " GOLDEN "clip_hf.safetensors " GOLDEN "images.safetensors --layer 2"
          " --hook mlp --tokens patches -o %s", in_folder("patches"));
    for (size_t i = 0; i < COUNT(sets); i++) {
        plain_data p = { .first_patch = sets[i].patches ? 0 : 1 };
        char sae[100], model[100], data[300], how[600];
        char arch[40] = "relu";
        snprintf(sae, sizeof sae, GOLDEN "%s.safetensors", sets[i].sae);
        snprintf(model, sizeof model, GOLDEN "%s.safetensors", sets[i].model ? sets[i].model : "");
        if (sets[i].data) snprintf(data, sizeof data, GOLDEN "%s.safetensors", sets[i].data);
        else snprintf(data, sizeof data, "%s", in_folder("patches"));
        if (sc_sae_open(&p.sae, sae) != SC_OK) need("%s", sc_error());
        p.sae.topk = sets[i].k > 0;
        p.sae.k = (size_t)sets[i].k;
        if (sets[i].k) snprintf(arch, sizeof arch, "topk --k %d", sets[i].k);
        if (sets[i].model) {
            plain_read_images(&p, model, data);
            snprintf(how, sizeof how, "-s %s --arch %s -m %s %s", sae, arch, model, data);
        } else {
            plain_read_acts(&p, data);
            snprintf(how, sizeof how, "-s %s --arch %s --acts %s", sae, arch, data);
        }
        p.f = plain_floats(p.N * p.T * p.sae.d_sae);
        p.decoded = plain_floats(p.N * p.T * p.sae.d_in);
        if (sc_sae_encode_plain(&p.sae, p.x, p.N * p.T, p.f) != SC_OK
            || sc_sae_decode_plain(&p.sae, p.f, p.N * p.T, p.decoded) != SC_OK)
            need("%s", sc_error());
        if (works("stats --quiet %s --top %d --top-patches %d -o %s", how, sets[i].K, sets[i].P,
                  in_folder("measured")))
            plain_check_statistics(&p, (size_t)sets[i].K, (size_t)sets[i].P, how);
        if (works("eval --quiet %s --format csv", how)) plain_check_eval(&p, how);
        sc_sae_close(&p.sae);
        free(p.x);
        free(p.f);
        free(p.decoded);
        free(p.label);
    }
}

/* --- Refusals --- */

/* What the library refuses: tokens that no SAE can be trained on, and trainers that cannot be. */
static void plain_refusals(void)
{
    float x[2 * 3] = { 1, 2, 3, 0, 0, 0 }, f[2 * 4];
    sc_sae sae;
    sc_step result;
    sc_train_options settings = { .lr = 1e-3 };
    if (sc_sae_init(&sae, 3, 4, 1) != SC_OK) need("%s", sc_error());
    sc_trainer *t = sc_trainer_new(&sae, &settings, 2);
    if (!t) need("%s", sc_error());
    check(sc_train_step(t, x, &result) == SC_FAILED && says("token 1") && says("||x|| is 0"),
          "a token of zeros is trained on");
    check(sc_train_step_plain(t, x, &result) == SC_FAILED && says("token 1"),
          "a token of zeros is trained on by Part I");
    x[4] = NAN;
    check(sc_train_step(t, x, &result) == SC_FAILED && says("token 1"), "NaN is trained on");
    check(sc_train_step_plain(t, x, &result) == SC_FAILED && says("token 1"),
          "NaN is trained on by Part I");
    check(sc_sae_encode(&sae, x, 2, f) == SC_FAILED && says("token 1"), "NaN is encoded");
    check(sc_sae_encode_plain(&sae, x, 2, f) == SC_FAILED && says("token 1"),
          "NaN is encoded by Part I");
    f[5] = INFINITY;
    for (int i = 0; i < 5; i++) f[i] = 0;
    f[6] = f[7] = 0;
    check(sc_sae_decode(&sae, f, 2, x) == SC_FAILED && says("token 1"), "infinity is decoded");
    check(sc_sae_decode_plain(&sae, f, 2, x) == SC_FAILED && says("token 1"),
          "infinity is decoded by Part I");
    sc_trainer_free(t);
    sc_trainer_free(NULL);
    sae.topk = 1;
    sae.k = 5;
    check(!sc_trainer_new(&sae, &settings, 2) && says("k"),
          "a trainer with a k above the number of latents is made");
    check(sc_sae_encode(&sae, f, 2, f) == SC_USAGE, "a k above n is encoded with");
    sae.k = 4;
    check(!sc_trainer_new(&sae, &settings, 0) && says("token"), "a trainer of no tokens is made");
    sc_sae_close(&sae);
}

/* --- Programs that use the library --- */

/* The compiler that make was called with: make puts CC=... into the environment. */
static const char *plain_compiler(void)
{
    static char text[600];
    const char *cc = getenv("CC");
    const char *extra = getenv("CFLAGS_EXTRA");
    if (!cc || !*cc) cc = "cc";
    snprintf(text, sizeof text, "%s -std=c11 -ffp-contract=off -I. -DSAECLIP_NO_MAIN", cc);
#ifdef __i386__
    strcat(text, " -msse2 -mfpmath=sse");
#endif
    if (extra) snprintf(text + strlen(text), sizeof text - strlen(text), " %s", extra);
    return text;
}

/* Builds a program from its source and the library; NULL where that fails. */
static const char *plain_build(const char *source, const char *library, const char *flags)
{
    char command[2000];
    const char *path = in_folder("program");
    snprintf(command, sizeof command, "%s %s %s %s -lm -pthread -o %s >%s.log 2>&1",
             plain_compiler(), flags, source, library, path, path);
    if (check(system(command) == 0, "%s does not build: %s", source,
              get_file(in_folder("program.log"), NULL))) return path;
    return NULL;
}

/* The batches of the golden training, 30 of 11 of the 12 images in turn, as a file of floats. */
static void plain_write_batches(const char *path)
{
    enum { IMAGES = 12, IMAGE = 26 * 20, BATCH = 11 };
    static float x[30 * BATCH][IMAGE];
    size_t count;
    const double *acts = numbers_of(GOLDEN "acts.safetensors", "activations", &count);
    if (!acts || count != IMAGES * IMAGE) return;
    for (size_t i = 0; i < 30 * BATCH; i++)
        for (size_t e = 0; e < IMAGE; e++) x[i][e] = (float)acts[i % IMAGES * IMAGE + e];
    put_file(path, x, sizeof x);
}

/* Six steps from one file, by fast steps, plain ones and both in turn, save the same bytes and have
 * the same losses; 30 steps agree with PyTorch in float64. */
static void plain_library(void)
{
    static const struct {
        const char *name, *start;
        int k;
        double l1, lr;
        int warmup, ghost;
    } runs[] = {
        { "relu", "init_90", 0, 0.00390625, 0.00390625, 10, 0 },
        { "relu_ghost", "init_300", 0, 0.00390625, 0.0009765625, 5, 1 },
        { "topk", "init_300", 6, 0, 0.00390625, 0, 0 },
        { "topk_ghost", "init_90", 5, 0, 0.0009765625, 5, 1 } };
    static const char *const tensors[] = { "W_enc", "b_enc", "W_dec", "b_dec" };
    static const char *const losses[] = { "loss", "mse", "l1", "ghost" };
    char out[300], golden[128];
    plain_write_batches(in_folder("batches"));
    snprintf(out, sizeof out, "%s", in_folder("library"));
    other_program = plain_build("tests/library.c", "saeclip.c", "-O2");
    for (size_t i = 0; i < COUNT(runs) && other_program; i++) {
        const char *name = runs[i].name;
        if (!works(GOLDEN "%s.safetensors %s %s %d %.17g %.17g %d %d", runs[i].start,
                   in_folder("batches"), out, runs[i].k, runs[i].l1, runs[i].lr, runs[i].warmup,
                   runs[i].ghost)) continue;
        check(same_files(in_folder("library.fast"), in_folder("library.plain")),
              "%s: six plain steps save other bytes than six fast ones", name);
        check(same_files(in_folder("library.fast"), in_folder("library.mixed")),
              "%s: fast and plain steps in turn save other bytes", name);
        snprintf(golden, sizeof golden, GOLDEN "train_%s.safetensors", name);
        for (size_t t = 0; t < COUNT(tensors); t++)
            check_tensor(in_folder("library.end"), tensors[t], golden, tensors[t], 1e-4);
        snprintf(golden, sizeof golden, GOLDEN "train_%s.csv", name);
        for (size_t l = 0; l < COUNT(losses); l++) {
            double got[30], expected[30];
            for (size_t row = 0; row < 30; row++) {
                got[row] = csv_number(ran.out, row, losses[l]);
                expected[row] = csv_number(get_file(golden, NULL), row, losses[l]);
            }
            check(off(got, expected, 30) <= 1e-4, "%s: %s is off by %.2g of the largest", name,
                  losses[l], off(got, expected, 30));
        }
    }
    other_program = NULL;
}

/* The largest of some numbers. */
static double plain_largest(const double *number, size_t count)
{
    double largest = 0;
    for (size_t i = 0; i < count; i++) largest = fmax(largest, number[i]);
    return largest;
}

/* The two examples, linked with the library's object file. */
static void plain_examples(const char *object)
{
    char expected[64], image[3 * 20 * 20 + 16];
    size_t count;
    other_program = plain_build("tests/examples/train_array.c", object, "-O1");
    if (other_program) {
        works("%s", in_folder("array.safetensors"));
        check(strstr(ran.out, "step 300: loss") != NULL, "train_array prints %s", ran.out);
        other_program = NULL;
        works("info %s", in_folder("array.safetensors"));
        check(strstr(ran.out, "d_in = 16") && strstr(ran.out, "d_sae = 32"), "train_array wrote %s", ran.out);
    }
    int head = snprintf(image, sizeof image, "P6 20 20 255\n");
    for (int i = 0; i < 3 * 20 * 20; i++) image[head + i] = (char)(i * i / 7);
    put_file(in_folder("image.ppm"), image, (size_t)(head + 3 * 20 * 20));
    works("train --quiet -m weights/demo.safetensors %s --expansion 2 --batch 1 --steps 2 -o %s",
          in_folder("image.ppm"), in_folder("strong.safetensors"));
    works("encode --quiet -s %s -m weights/demo.safetensors %s --image-means -o %s",
          in_folder("strong.safetensors"), in_folder("image.ppm"), in_folder("strong.codes"));
    const double *means = numbers_of(in_folder("strong.codes"), "image_means", &count);
    other_program = plain_build("tests/examples/strongest.c", object, "-O1");
    if (other_program) {
        works("weights/demo.safetensors %s %s", in_folder("strong.safetensors"),
              in_folder("image.ppm"));
        snprintf(expected, sizeof expected, ": %.4g\n", plain_largest(means, count));
        check(strncmp(ran.out, "latent ", 7) == 0 && strstr(ran.out, expected),
              "strongest prints %s, expected%s", ran.out, expected);
    }
    other_program = NULL;
}

static void plain_programs(void)
{
    char command[1000];
    char object[300];
    snprintf(command, sizeof command, "%s --version >/dev/null 2>&1", plain_compiler());
    if (system(command) != 0) {
        skip("programs that use the library: cannot run the compiler, %s", plain_compiler());
        return;
    }
    snprintf(object, sizeof object, "%s", in_folder("saeclip.o"));
    snprintf(command, sizeof command, "%s -O1 -c saeclip.c -o %s", plain_compiler(), object);
    check(system(command) == 0, "saeclip.c does not compile as a library");
    plain_library();
    plain_examples(object);
}

/* With each instruction set and number of threads: all cases by fast steps, a fifth of them by fast
 * and plain steps in turn, and a third of the models. */
static void plain_equal(void)
{
    static const int threads[] = { 1, 2, 5 };
    size_t round = 0;
    const char *path;
    char how[60];
    for (size_t i = 0; i < COUNT(kernel_sets); i++) {
        const char *isa = kernel_sets[i]->name;
        if (!is_usable(kernel_sets[i]) || (given_isa() && strcmp(given_isa(), isa) != 0)) continue;
        if (sc_instruction_set(isa) != SC_OK) need("%s", sc_error());
        for (size_t k = 0; k < COUNT(threads); k++, round++) {
            if (sc_threads_start(threads[k]) != SC_OK) need("%s", sc_error());
            snprintf(how, sizeof how, "%s, %d threads", isa, threads[k]);
            for (size_t c = 0; c < PLAIN_CASES; c++) {
#ifdef SANITIZED
                if ((c + round) % 5 != 0) continue;          /* it is slow, and memory errors repeat */
#endif
                plain_training(&plain_cases[c], 0x3f, how);
                if ((c + round) % 5 == 0) plain_training(&plain_cases[c], c % 2 ? 0x15 : 0x2c, how);
                plain_codes(&plain_cases[c], how);
            }
            for (size_t m = 0; (path = plain_model_path(m)) != NULL; m++)
                if (m % 3 == round % 3) plain_model(path, how);
        }
    }
    if (sc_instruction_set(given_isa()) != SC_OK || sc_threads_start(2) != SC_OK)
        need("%s", sc_error());
}

/* --- The table of contents --- */

/* The number of the line that follows the line break in `head`; 0 if the text has no `head`. */
static long plain_line_of(const char *text, const char *head)
{
    const char *at = strstr(text, head);
    long line = 2;
    if (!at) return 0;
    for (const char *c = text; c < at; c++) line += *c == '\n';
    return line;
}

/* The contents at the top of saeclip.c name the lines of the parts: right to within 30 lines. */
static void plain_contents(void)
{
    static const char *const parts[] = { "Part I: the method", "Part II: the same, fast",
                                         "Part III: data in and out", "Part IV: the program" };
    long line[COUNT(parts)];
    const char *text = get_file("saeclip.c", NULL);
    if (!check(text != NULL, "saeclip.c cannot be read")) return;
    for (size_t i = 0; i < COUNT(parts); i++) {
        char head[60];
        char contents[60];
        snprintf(head, sizeof head, "\n * %s\n", parts[i]);
        snprintf(contents, sizeof contents, "\n *  %s ", parts[i]);
        const char *entry = strstr(text, contents);
        line[i] = plain_line_of(text, head);
        if (!check(entry && line[i] > 0, "saeclip.c's contents lack '%s'", parts[i])) return;
        const char *named = entry + strlen(contents);
        named += strspn(named, " ");
        long said = strncmp(named, "line ", 5) == 0 ? strtol(named + 5, NULL, 10) : 0;
        check(labs(said - line[i]) <= 30, "the contents name line %ld for '%s' (expected %ld)",
              said, parts[i], line[i]);
    }
    const char *about = strstr(text, "read this; about ");
    long said = about ? strtol(about + strlen("read this; about "), NULL, 10) : 0;
    long length = line[1] - line[0];
    check(labs(said - length) <= 30, "the contents give Part I %ld lines (expected %ld)", said,
          length);
}

static void test_plain(void)
{
    plain_contents();
    plain_prepare();
    plain_write_model(in_folder("vit2"), 1);
    plain_write_model(in_folder("vit197"), 14);
    plain_write_model(in_folder("vit257"), 16);
    plain_equal();
    plain_free();
    plain_measures();
    plain_refusals();
    plain_programs();
}
