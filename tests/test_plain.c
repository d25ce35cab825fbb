/* Tests of the fast code against Part I of saeclip.c: the same bits for both kinds of SAE, with and without
 * ghost gradients, in odd shapes, with 1, 2 and 5 threads and every instruction set of this machine. */

/* numbers of [-1, 1), some of them shared by all rows, so that directions are not random. x: [count, D] */
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

static int plain_same(const void *a, const void *b, size_t count, size_t size) { return memcmp(a, b, count * size) == 0; }

typedef struct { size_t tokens, D, n, k; int ghost; size_t window; double l1; } plain_case;

static const plain_case plain_cases[] = {
    { 1, 5, 7, 0, 0, 64, 1e-3 },                     /* k = 0: ReLU */
    { 7, 33, 70, 3, 0, 64, 0 },
    { 197, 40, 300, 0, 1, 0, 1e-2 },
    { 257, 17, 513, 4, 1, 0, 0 },
    { 300, 70, 90, 0, 1, 1, 1e-1 },
    { 65, 16, 600, 1, 1, 0, 0 },
    { 64, 300, 31, 31, 0, 0, 0 },                    /* k = n */
};

/* Three SAEs from one start: one trained by fast steps, one by plain ones, one by both in turn. */
static void plain_training(const plain_case *c, const char *isa, int threads)
{
    enum { STEPS = 6 };
    sc_train_options settings = { .l1 = c->l1, .lr = 1e-2, .warmup = 3, .dead_window = c->window, .ghost = c->ghost };
    sc_sae sae[3] = { { 0 } };
    sc_trainer *trainer[3] = { NULL };
    float *x = plain_floats(c->tokens * c->D);
    size_t dead = 0, wrong = 0;
    for (int i = 0; i < 3; i++) {
        if (sc_sae_init(&sae[i], c->D, c->n, 7) != SC_OK) need("%s", sc_error());
        sae[i].topk = c->k > 0;
        sae[i].k = c->k;
        for (size_t j = 0; j < c->n && c->ghost; j++) sae[i].b_enc[j] = -(float)(j % 4);    /* some do not fire */
        trainer[i] = sc_trainer_new(&sae[i], &settings, c->tokens);
        if (!trainer[i]) need("%s", sc_error());
    }
    test_random_state = 5;
    for (int step = 0; step < STEPS; step++) {
        sc_step result[3];
        memset(result, 0, sizeof result);
        plain_tokens(x, c->tokens, c->D);
        for (int i = 0; i < 3; i++) {
            int plain = i == 1 || (i == 2 && step % 2 == 0);
            int status = plain ? sc_train_step_plain(trainer[i], x, &result[i]) : sc_train_step(trainer[i], x, &result[i]);
            if (!check(status == SC_OK, "a step of %zu tokens fails", c->tokens)) goto end;
        }
        dead += result[0].dead;
        for (int i = 1; i < 3; i++) wrong += !plain_same(&result[0], &result[i], 1, sizeof result[0]);
    }
    for (int i = 1; i < 3; i++) {
        size_t numbers = c->n * sae[0].stride;
        wrong += !plain_same(sae[0].W_enc, sae[i].W_enc, numbers, 4) || !plain_same(sae[0].W_dec, sae[i].W_dec, numbers, 4);
        wrong += !plain_same(sae[0].b_enc, sae[i].b_enc, c->n, 4) || !plain_same(sae[0].b_dec, sae[i].b_dec, c->D, 4);
    }
    check(wrong == 0, "%s, %d threads: training on %zu tokens of %zu with %zu latents, k %zu, ghost %d differs from Part I",
          isa, threads, c->tokens, c->D, c->n, c->k, c->ghost);
    check(!c->ghost || c->window > 0 || dead > 0, "no latent was dead: the ghost gradients were not tested");
end:
    for (int i = 0; i < 3; i++) {
        sc_trainer_free(trainer[i]);
        sc_sae_close(&sae[i]);
    }
    free(x);
}

/* Codes and reconstruction; codes with ties, which go to the lower index. */
static void plain_codes(const plain_case *c, const char *isa, int threads)
{
    sc_sae sae = { 0 };
    float *x = plain_floats(c->tokens * c->D), *f = plain_floats(c->tokens * c->n), *g = plain_floats(c->tokens * c->n);
    float *y = plain_floats(c->tokens * c->D), *z = plain_floats(c->tokens * c->D);
    if (sc_sae_init(&sae, c->D, c->n, 3) != SC_OK) need("%s", sc_error());
    sae.topk = c->k > 0;
    sae.k = c->k;
    test_random_state = 11;
    plain_tokens(x, c->tokens, c->D);
    for (size_t j = 1; j < c->n; j += 2)             /* each odd latent is as strong as the one before */
        memcpy(sae.W_enc + j * sae.stride, sae.W_enc + (j - 1) * sae.stride, sae.stride * sizeof *x);
    int encoded = sc_sae_encode(&sae, x, c->tokens, f) == SC_OK && sc_sae_encode_plain(&sae, x, c->tokens, g) == SC_OK;
    check(encoded && plain_same(f, g, c->tokens * c->n, 4), "%s, %d threads: codes of %zu tokens, %zu latents, k %zu differ",
          isa, threads, c->tokens, c->n, c->k);
    int decoded = sc_sae_decode(&sae, f, c->tokens, y) == SC_OK && sc_sae_decode_plain(&sae, f, c->tokens, z) == SC_OK;
    check(decoded && plain_same(y, z, c->tokens * c->D, 4), "%s, %d threads: reconstruction of %zu tokens differs", isa,
          threads, c->tokens);
    sc_sae_close(&sae);
    free(x); free(f); free(g); free(y); free(z);
}

/* Every hook point of the golden models, and their heads. */
static void plain_models(const char *isa, int threads)
{
    static const char *const models[] = { "clip_hf", "clip_openai", "clip_timm", "vit_timm" };
    for (size_t i = 0; i < COUNT(models); i++) {
        sc_model m;
        char path[80];
        snprintf(path, sizeof path, GOLDEN "%s.safetensors", models[i]);
        if (sc_model_open(&m, path, NULL) != SC_OK || sc_model_load(&m, m.blocks, 1) != SC_OK) need("%s", sc_error());
        size_t numbers = m.tokens * m.width, S = m.image_size, wrong = 0;
        float *a = plain_floats(numbers), *b = plain_floats(numbers);
        unsigned char *pixels = new_array(S * S, 3);
        if (!pixels) need("memory");
        for (size_t e = 0; e < S * S * 3; e++) pixels[e] = (unsigned char)(e * e / 97 + e);
        for (size_t layer = 1; layer <= m.blocks; layer++)
            for (sc_hook hook = SC_ATTN; hook <= SC_RESID; hook++) {
                sc_tap tap = { .layer = layer, .hook = hook, .out = a, .stride = m.width };
                wrong += sc_model_forward(&m, pixels, 1, &tap, 1, NULL) != SC_OK;
                wrong += sc_model_forward_plain(&m, pixels, layer, hook, b) != SC_OK;
                wrong += !plain_same(a, b, numbers, 4);
            }
        check(wrong == 0, "%s, %d threads: %zu hook points of %s differ from Part I", isa, threads, wrong, models[i]);
        sc_model plain = { .loaded = 0 };
        float *head = plain_floats(m.classes), *plain_head = plain_floats(m.classes);
        int status = sc_model_forward(&m, pixels, 1, NULL, 0, head);
        if (status == SC_OK) status = open_plain_model(&plain, &m, m.blocks, 1);
        if (status == SC_OK) status = vit_forward(&plain, pixels, 0, SC_MLP, NULL, plain_head);
        check(status == SC_OK && plain_same(head, plain_head, m.classes, 4), "%s, %d threads: the head of %s differs", isa,
              threads, models[i]);
        free_layers(&plain);
        sc_model_close(&m);
        free(a); free(b); free(pixels); free(head); free(plain_head);
    }
}

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
    check(sc_train_step(t, x, &result) == SC_FAILED && says("token 1") && says("||x|| is 0"), "a token of zeros is trained on");
    check(sc_train_step_plain(t, x, &result) == SC_FAILED && says("token 1"), "a token of zeros is trained on by Part I");
    x[4] = NAN;
    check(sc_train_step(t, x, &result) == SC_FAILED && says("token 1"), "NaN is trained on");
    check(sc_train_step_plain(t, x, &result) == SC_FAILED && says("token 1"), "NaN is trained on by Part I");
    check(sc_sae_encode(&sae, x, 2, f) == SC_FAILED && says("token 1"), "NaN is encoded");
    check(sc_sae_encode_plain(&sae, x, 2, f) == SC_FAILED && says("token 1"), "NaN is encoded by Part I");
    f[5] = INFINITY;
    for (int i = 0; i < 5; i++) f[i] = 0;
    f[6] = f[7] = 0;
    check(sc_sae_decode(&sae, f, 2, x) == SC_FAILED && says("token 1"), "infinity is decoded");
    check(sc_sae_decode_plain(&sae, f, 2, x) == SC_FAILED && says("token 1"), "infinity is decoded by Part I");
    sc_trainer_free(t);
    sc_trainer_free(NULL);
    sae.topk = 1;
    sae.k = 5;
    check(!sc_trainer_new(&sae, &settings, 2) && says("k"), "k above the number of latents is taken");
    check(sc_sae_encode(&sae, f, 2, f) == SC_USAGE, "k above the number of latents is encoded with");
    sae.k = 4;
    check(!sc_trainer_new(&sae, &settings, 0) && says("token"), "a trainer of no tokens is made");
    sc_sae_close(&sae);
}

/* Builds an example as its head says, with the compiler that is here; NULL where there is none. */
static const char *plain_example(const char *name)
{
    char command[1000];
    const char *path = in_folder("%s", name);
    snprintf(command, sizeof command, "cc -std=c11 -O1 -ffp-contract=off -I. -DSAECLIP_NO_MAIN tests/examples/%s.c "
             "saeclip.c -lm -pthread -o %s >%s.log 2>&1", name, path, path);
    return system(command) == 0 ? path : NULL;
}

/* The largest of some numbers. */
static double plain_largest(const double *number, size_t count)
{
    double largest = 0;
    for (size_t i = 0; i < count; i++) largest = fmax(largest, number[i]);
    return largest;
}

static void plain_examples(void)
{
    char expected[64], image[3 * 20 * 20 + 16];
    size_t count;
    if (system("cc --version >/dev/null 2>&1") != 0) {
        skip("the examples: no compiler is here under the name cc");
        return;
    }
    other_program = plain_example("train_array");
    if (check(other_program != NULL, "tests/examples/train_array.c does not build")) {
        works("%s", in_folder("array.safetensors"));
        check(strstr(ran.out, "step 300: loss") != NULL, "train_array prints %s", ran.out);
        other_program = NULL;
        works("info %s", in_folder("array.safetensors"));
        check(strstr(ran.out, "16 inputs, 32 latents") != NULL, "train_array wrote %s", ran.out);
    }
    int head = snprintf(image, sizeof image, "P6 20 20 255\n");
    for (int i = 0; i < 3 * 20 * 20; i++) image[head + i] = (char)(i * i / 7);
    put_file(in_folder("image.ppm"), image, (size_t)(head + 3 * 20 * 20));
    works("train --quiet -m weights/demo.safetensors %s --expansion 2 --batch 1 --steps 2 -o %s", in_folder("image.ppm"),
          in_folder("strong.safetensors"));
    works("encode --quiet -s %s -m weights/demo.safetensors %s --image-means -o %s", in_folder("strong.safetensors"),
          in_folder("image.ppm"), in_folder("strong.codes"));
    const double *means = numbers_of(in_folder("strong.codes"), "image_means", &count);
    other_program = plain_example("strongest");
    if (check(other_program != NULL, "tests/examples/strongest.c does not build")) {
        works("weights/demo.safetensors %s %s", in_folder("strong.safetensors"), in_folder("image.ppm"));
        snprintf(expected, sizeof expected, ": %.4g\n", plain_largest(means, count));
        check(strncmp(ran.out, "latent ", 7) == 0 && strstr(ran.out, expected), "strongest prints %s, expected%s", ran.out,
              expected);
    }
    other_program = NULL;
}

static void test_plain(void)
{
    static const int threads[] = { 1, 2, 5 };
    int tested = 0;
    for (size_t i = 0; i < COUNT(kernel_sets); i++) {
        const char *isa = kernel_sets[i]->name;
        if (!is_usable(kernel_sets[i]) || (given_isa() && strcmp(given_isa(), isa) != 0)) continue;
        if (sc_instruction_set(isa) != SC_OK) need("%s", sc_error());
        for (size_t k = 0; k < COUNT(threads); k++) {
            if (tested && threads[k] != 2) continue;     /* all numbers of threads with the first instruction set */
            if (sc_threads_start(threads[k]) != SC_OK) need("%s", sc_error());
            for (size_t c = 0; c < COUNT(plain_cases); c++) {
                plain_training(&plain_cases[c], isa, threads[k]);
                plain_codes(&plain_cases[c], isa, threads[k]);
            }
            plain_models(isa, threads[k]);
        }
        tested = 1;
    }
    restore_isa();
    if (sc_threads_start(2) != SC_OK) need("%s", sc_error());
    plain_refusals();
    plain_examples();
}
