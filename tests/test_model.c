/* Tests of the vision transformer: every hook of a three-block CLIP under its three namings and of a plain
 * ViT against PyTorch in float64 (tests/golden/make_golden.py), the heads, tokens, dtypes, inputs. */

static const char *const model_hooks[] = { "attn", "mlp", "resid" };

static void model_golden(void)
{
    static const struct { const char *model, *expected; int blocks; } models[] = {
        { "clip_hf", "clip", 3 }, { "clip_openai", "clip", 3 }, { "clip_timm", "clip", 3 },
        { "vit_timm", "vit", 1 },
    };
    char path[64], expected[64], name[32];
    for (size_t m = 0; m < 4; m++)
        for (int layer = 1; layer <= models[m].blocks; layer++)
            for (int h = 0; h < 3; h++) {
                snprintf(path, sizeof path, "acts.%s.%d.%s", models[m].model, layer, model_hooks[h]);
                snprintf(expected, sizeof expected, GOLDEN "%s_expected.safetensors", models[m].expected);
                snprintf(name, sizeof name, "layer%d.%s", layer, model_hooks[h]);
                if (!works("extract --quiet -m " GOLDEN "%s.safetensors --layer %d --hook %s "
                           GOLDEN "images.safetensors -o %s", models[m].model, layer, model_hooks[h],
                           in_folder("%s", path))) continue;
                check_tensor(in_folder("%s", path), "activations", expected, name, 4e-6);
                if (m == 1 || m == 2) {              /* one model under three names: one result */
                    size_t a_count, b_count;
                    const double *a = numbers_of(in_folder("%s", path), "activations", &a_count);
                    const double *b = numbers_of(in_folder("acts.clip_hf.%d.%s", layer, model_hooks[h]),
                                                 "activations", &b_count);
                    check(a && b && a_count == b_count && memcmp(a, b, a_count * sizeof *a) == 0,
                          "%s gives other numbers than clip_hf at layer %d, %s", models[m].model, layer,
                          model_hooks[h]);
                }
            }
}

static void model_zeroshot(void)
{
    static const struct { const char *model; int top1, top5; } heads[] = {
        { "clip_hf", 1, 2 }, { "vit_timm", 0, 1 },
    };
    for (size_t m = 0; m < 2; m++) {
        char object[80], csv[80];
        snprintf(object, sizeof object, "{\"images\": 3, \"top1\": %d, \"top5\": %d}", heads[m].top1, heads[m].top5);
        snprintf(csv, sizeof csv, "images,top1,top5\n3,%d,%d\n", heads[m].top1, heads[m].top5);
        works("zeroshot --quiet -m " GOLDEN "%s.safetensors " GOLDEN "images.safetensors --format json",
              heads[m].model);
        check(strncmp(ran.out, object, strlen(object)) == 0, "zeroshot of %s gives %s", heads[m].model, ran.out);
        works("zeroshot --quiet -m " GOLDEN "%s.safetensors " GOLDEN "images.safetensors --format csv",
              heads[m].model);
        check(strcmp(ran.out, csv) == 0, "zeroshot of %s gives %s", heads[m].model, ran.out);
    }
}

/* The cosines of zeroshot's first batch, all the golden pictures. logits: [3, 10] */
static int model_loop_logits(const char *sae, const char *hook, long k, float *logits)
{
    options o = { .model = GOLDEN "clip_hf.safetensors", .operand = { GOLDEN "images.safetensors" },
                  .sae = { sae }, .saes = 1, .origin[SC_HOOK] = hook, .arch = k ? "topk" : "relu", .k = k,
                  .origin[SC_CROP] = "torchvision" };
    session s = { .o = &o };
    int status = start_zeroshot(&s);
    if (status == SC_OK) status = next_batch(&s.data, MEASURE_IMAGES);
    if (status == SC_OK && s.data.count * s.data.model.classes == 30)
        memcpy(logits, s.data.logits, 30 * sizeof *logits);
    close_session(&s);
    return status;
}

/* The SAE in the loop: the cosines that the rest of the pass makes of x', for every instruction set and
 * number of threads, and what the command says of them. top1, top5: as make_golden.py printed them. */
static void model_loop(void)
{
    static const struct { const char *hook, *golden; int k, top1, top5; } cases[] = {
        { "attn", "attn_relu", 0, 1, 2 }, { "mlp", "mlp_relu", 0, 1, 2 },
        { "resid", "resid_relu", 0, 0, 1 }, { "mlp", "mlp_6", 6, 1, 1 },
    };
    static const char sae[] = GOLDEN "loop_sae.safetensors";
    for (size_t c = 0; c < 4; c++) {
        size_t count;
        float first[30] = { 0 }, other[30];
        double mine[30];
        char line[64];
        const double *golden = numbers_of(GOLDEN "loop_expected.safetensors", cases[c].golden, &count);
        if (!check(golden && count == 30 && model_loop_logits(sae, cases[c].hook, cases[c].k, first) == SC_OK,
                   "no cosines with the SAE in the loop at %s", cases[c].hook)) continue;
        for (size_t i = 0; i < 30; i++) mine[i] = (double)first[i];
        double error = off(mine, golden, 30);
        check(error <= 4e-6, "%s: with the SAE in the loop cosines are off by %.2g", cases[c].golden, error);
        for (int i = 0; i < 12; i++) {
            static const char *const sets[] = { "scalar", "neon", "avx2", "avx512" };
            if (sc_instruction_set(sets[i / 3]) != SC_OK) continue;      /* test_numbers says which */
            if (sc_threads_start(1 + 2 * (i % 3)) != SC_OK) need("threads");
            check(model_loop_logits(sae, cases[c].hook, cases[c].k, other) == SC_OK
                  && memcmp(first, other, sizeof first) == 0, "%s: other cosines with %d threads and %s",
                  cases[c].golden, 1 + 2 * (i % 3), sets[i / 3]);
        }
        if (sc_instruction_set(NULL) != SC_OK || sc_threads_start(2) != SC_OK) need("threads");
        char kind[40] = "relu";
        if (cases[c].k) snprintf(kind, sizeof kind, "topk --k %d", (int)cases[c].k);
        works("zeroshot --quiet -m " GOLDEN "clip_hf.safetensors -s %s --hook %s --arch %s " GOLDEN
              "images.safetensors --format csv", sae, cases[c].hook, kind);
        snprintf(line, sizeof line, "images,top1,top5\n3,%d,%d\n", cases[c].top1, cases[c].top5);
        check(strcmp(ran.out, line) == 0, "zeroshot with the SAE at %s gives %s", cases[c].golden, ran.out);
    }
    refuses(2, "--hook needs -s", "zeroshot -m " GOLDEN "clip_hf.safetensors --hook attn " GOLDEN "images.safetensors");
    refuses(1, "has width 20, the activations have 32", "zeroshot --quiet -m " GOLDEN "clip_hf.safetensors -s "
            GOLDEN "init_90.safetensors " GOLDEN "images.safetensors");
}

#define MODEL_EXTRACT "extract --quiet -m " GOLDEN "clip_timm.safetensors "

/* What --tokens, --dtype, --layer and --limit choose from. */
static void model_choices(void)
{
    enum { N = 3, T = 17, D = 32 };
    size_t count;
    works(MODEL_EXTRACT "--layer 2 --hook mlp " GOLDEN "images.safetensors -o %s", in_folder("all"));
    works(MODEL_EXTRACT "--layer -2 --hook mlp " GOLDEN "images.safetensors -o %s", in_folder("negative"));
    check(same_files(in_folder("all"), in_folder("negative")), "layer -2 of 3 is not layer 2");
    works(MODEL_EXTRACT GOLDEN "images.safetensors -o %s", in_folder("default"));
    check(same_files(in_folder("all"), in_folder("default")), "the default is not mlp of the last layer but one");
    works(MODEL_EXTRACT "--layer 2 --hook mlp --tokens cls " GOLDEN "images.safetensors -o %s", in_folder("cls"));
    works(MODEL_EXTRACT "--layer 2 --hook mlp --tokens patches " GOLDEN "images.safetensors -o %s",
          in_folder("patches"));
    works(MODEL_EXTRACT "--layer 2 --hook mlp --dtype f16 " GOLDEN "images.safetensors -o %s", in_folder("half"));
    works(MODEL_EXTRACT "--layer 2 --hook mlp --limit 1 " GOLDEN "images.safetensors -o %s", in_folder("first"));
    const double *all = numbers_of(in_folder("all"), "activations", &count);
    if (!check(all && count == N * T * D, "extract wrote %zu numbers", count)) return;
    const double *cls = numbers_of(in_folder("cls"), "activations", &count);
    int same = cls && count == N * D;
    for (size_t i = 0; i < N && same; i++) same = memcmp(cls + i * D, all + i * T * D, D * sizeof *all) == 0;
    check(same, "--tokens cls is not the first token of each image");
    const double *patches = numbers_of(in_folder("patches"), "activations", &count);
    same = patches && count == N * (T - 1) * D;
    for (size_t i = 0; i < N && same; i++)
        same = memcmp(patches + i * (T - 1) * D, all + (i * T + 1) * D, (T - 1) * D * sizeof *all) == 0;
    check(same, "--tokens patches is not all tokens but the first");
    const double *half = numbers_of(in_folder("half"), "activations", &count);
    double worst = 0;
    for (size_t i = 0; i < count && half; i++)
        worst = fmax(worst, fabs(half[i] - all[i]) / (fabs(all[i]) + 1e-4));
    check(half && count == N * T * D && worst > 0 && worst <= 0x1p-11, "--dtype f16 is off by %g", worst);
    const double *first = numbers_of(in_folder("first"), "activations", &count);
    check(first && count == T * D && memcmp(first, all, count * sizeof *all) == 0,
          "an image alone gives other numbers than among others");
    const double *labels = numbers_of(in_folder("all"), "labels", &count), *given;
    given = numbers_of(GOLDEN "images.safetensors", "labels", &count);
    check(labels && given && memcmp(labels, given, 3 * sizeof *given) == 0, "labels are not passed on");
}

/* The same pictures as a packed set, a folder, a list, a stream: the same numbers. */
static void model_inputs(void)
{
    static const char head[] = "P6 40 40 255\n";
    enum { BYTES = 3 * 40 * 40 };
    static unsigned char ppm[3 * (BYTES + sizeof head - 1)];
    size_t count, one = BYTES + sizeof head - 1;
    const double *pixels = numbers_of(GOLDEN "images.safetensors", "images", &count);
    if (!pixels) return;
    mkdir(in_folder("pictures"), 0700);
    for (size_t i = 0; i < 3; i++) {
        memcpy(ppm + i * one, head, sizeof head - 1);
        for (size_t b = 0; b < BYTES; b++)
            ppm[i * one + sizeof head - 1 + b] = (unsigned char)pixels[i * BYTES + b];
        put_file(in_folder("pictures/%zu.ppm", i), ppm + i * one, one);
    }
    put_text(in_folder("list.txt"), "pictures/0.ppm\npictures/1.ppm\npictures/2.ppm\n");
    works(MODEL_EXTRACT "%s -o %s", in_folder("pictures"), in_folder("by_folder"));
    works(MODEL_EXTRACT "%s -o %s", in_folder("list.txt"), in_folder("by_list"));
    works("pack --quiet --size 40 %s -o %s", in_folder("pictures"), in_folder("set.safetensors"));
    works(MODEL_EXTRACT "%s -o %s", in_folder("set.safetensors"), in_folder("by_pack"));
    static const char *const ways[] = { "by_folder", "by_list", "by_pack" };
    const double *all = numbers_of(in_folder("default"), "activations", &count);
    for (size_t w = 0; w < COUNT(ways); w++) {
        size_t others;
        const double *other = numbers_of(in_folder("%s", ways[w]), "activations", &others);
        check(all && other && others == count && memcmp(all, other, count * sizeof *all) == 0,
              "pictures %s give other numbers than the packed set", ways[w]);
    }
}

/* ViT-B/16's shapes with random weights, and real photos. They are large: SAECLIP_DATA names a folder with
 * vit_b16.safetensors, pictures.safetensors, expected.safetensors (python3 tests/golden/vit_b16.py make DIR)
 * or with vit_tiny_patch16_224.safetensors and imagenet-700.txt. */
static void model_large(void)
{
    const char *data = getenv("SAECLIP_DATA");
    char path[4200], name[64];
    with.seconds = 1800;
    snprintf(path, sizeof path, "%s/vit_b16.safetensors", data ? data : "");
    if (!data || !exists(path)) skip("ViT-B/16's shapes: SAECLIP_DATA names no folder with vit_b16.safetensors");
    else for (int layer = 1; layer <= 12; layer++)
        for (int h = 0; h < 3; h++) {
            size_t count;
            snprintf(name, sizeof name, "float32_error.layer%d.%s", layer, model_hooks[h]);
            snprintf(path, sizeof path, "%s/expected.safetensors", data);
            const double *own = numbers_of(path, name, &count);
            if (!own || !works("extract --quiet -m %s/vit_b16.safetensors --layer %d --hook %s "
                               "%s/pictures.safetensors -o %s", data, layer, model_hooks[h], data,
                               in_folder("large"))) continue;
            check_tensor(in_folder("large"), "activations", path, name + strlen("float32_error."),
                         fmin(2e-5, 3 * own[0]));
        }
    snprintf(path, sizeof path, "%s/vit_tiny_patch16_224.safetensors", data ? data : "");
    if (!data || !exists(path))
        skip("real photos: SAECLIP_DATA names no folder with vit_tiny_patch16_224.safetensors");
    else if (works("zeroshot --quiet -m %s %s/imagenet-700.txt --format json", path, data))
        check(strstr(ran.out, "\"images\": 700, \"top1\": 577, \"top5\": 675") != NULL,
              "ViT-Ti/16 on imagenet-700 gives %s", ran.out);
    with.seconds = 300;
}

static void test_model(void)
{
    model_golden();
    model_zeroshot();
    model_loop();
    model_choices();
    model_inputs();
    model_large();
}
