/* Tests of top, mask, info and compare: pixels and lines worked out by hand, on inputs made here.
 *
 * The model: images of 4 x 4 in 2 x 2 patches, width 4, one block that adds nothing, so `resid` of
 * layer 1 is the embedding: (R / 255, G / 255, B / 255, 1) of a patch's first pixel, the class token
 * (0, 0, 0, 1). The SAE: f_0 = relu(R / 255 - 0.2), f_1 = relu(G / 255 - 0.2), f_2 = 0. */

static char look_output[1 << 16];            /* what the last run printed, standard error behind */

static size_t look_read(const char *name, unsigned char *bytes, size_t room)
{
    size_t count;
    const char *all = get_file(in_folder("look/%s", name), &count);
    if (count > room) count = room;
    if (all) memcpy(bytes, all, count);
    return count;
}

static void look_write(const char *name, const void *bytes, size_t count)
{
    put_file(in_folder("look/%s", name), bytes, count);
}

/* Runs the program inside the folder, as a shell would; returns its exit status. */
SC_PRINTF(1, 2) static int look_run(const char *format, ...)
{
    char arguments[1500], line[8000], whole[4200];
    va_list list;
    va_start(list, format);
    vsnprintf(arguments, sizeof arguments, format, list);
    va_end(list);
    if (!realpath(program(), whole)) need("%s", program());
    snprintf(line, sizeof line, "cd '%s/look' && '%s' >printed 2>said %s", folder, whole, arguments);
    fflush(stdout);
    int status = system(line);
    unsigned char *output = (unsigned char *)look_output;
    size_t count = look_read("printed", output, sizeof look_output - 1);
    count += look_read("said", output + count, sizeof look_output - 1 - count);
    look_output[count] = '\0';
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

/* A full disk to write to; skipped, loudly, where /dev/full is not the device of that name. */
static void check_full_disk(const char *command)
{
    struct stat about;
    if (stat("/dev/full", &about) != 0 || !S_ISCHR(about.st_mode))
        skip("%s on a full disk: /dev/full is no device here", command);
    else check(look_run("%s > /dev/full", command) == 1, "%s notices a full disk", command);
}

static int look_says(const char *text) { return strstr(look_output, text) != NULL; }

/* --- Inputs --- */

static void little(unsigned char *to, uint64_t number, int bytes)
{
    for (int i = 0; i < bytes; i++) to[i] = (unsigned char)(number >> 8 * i);
}

/* A safetensors file from its header (without the offsets' help) and its data. */
static void look_tensors(const char *name, const char *header, const void *data, size_t bytes)
{
    static unsigned char file[1 << 16];
    size_t length = strlen(header);
    little(file, length, 8);
    memcpy(file + 8, header, length);
    if (bytes) memcpy(file + 8 + length, data, bytes);
    look_write(name, file, 8 + length + bytes);
}

static unsigned char made[1 << 14];          /* the data of a file being made */
static size_t made_bytes;
static char made_header[1 << 13];

static void begin_tensors(const char *metadata)
{
    made_bytes = 0;
    snprintf(made_header, sizeof made_header, "{\"__metadata__\":{%s}", metadata);
}

/* Adds an F32 tensor of zeros and returns its data. */
static unsigned char *add_floats(const char *name, const char *shape, size_t count)
{
    unsigned char *data = made + made_bytes;
    size_t used = strlen(made_header);
    snprintf(made_header + used, sizeof made_header - used,
             ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", name, shape,
             made_bytes, made_bytes + 4 * count);
    memset(data, 0, 4 * count);
    made_bytes += 4 * count;
    return data;
}

static void set_float(unsigned char *data, size_t at, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    little(data + 4 * at, bits, 4);
}

static void end_tensors(const char *name)
{
    strcat(made_header, "}");
    look_tensors(name, made_header, made, made_bytes);
}

/* classes: of a head whose logits are 0 but for that of the class `best`; 0: no head. metadata: more of it */
static void look_model(const char *name, size_t classes, size_t best, const char *metadata)
{
    static const struct { const char *name, *shape; size_t count; int ones; } rest[] = {
        { "blocks.0.norm1.weight", "4", 4, 1 }, { "blocks.0.norm1.bias", "4", 4, 0 },
        { "blocks.0.attn.qkv.weight", "12,4", 48, 0 }, { "blocks.0.attn.qkv.bias", "12", 12, 0 },
        { "blocks.0.attn.proj.weight", "4,4", 16, 0 }, { "blocks.0.attn.proj.bias", "4", 4, 0 },
        { "blocks.0.norm2.weight", "4", 4, 1 }, { "blocks.0.norm2.bias", "4", 4, 0 },
        { "blocks.0.mlp.fc1.weight", "8,4", 32, 0 }, { "blocks.0.mlp.fc1.bias", "8", 8, 0 },
        { "blocks.0.mlp.fc2.weight", "4,8", 32, 0 }, { "blocks.0.mlp.fc2.bias", "4", 4, 0 } };
    char text[500], shape[40];
    snprintf(text, sizeof text, "\"image_mean\":\"0,0,0\",\"image_std\":\"1,1,1\",\"hidden_act\":\"gelu\","
             "\"layer_norm_eps\":\"1e-6\",\"num_attention_heads\":\"1\"%s", metadata);
    begin_tensors(text);
    set_float(add_floats("cls_token", "1,1,4", 4), 3, 1);
    add_floats("pos_embed", "1,5,4", 20);
    unsigned char *patch = add_floats("patch_embed.proj.weight", "4,3,2,2", 48);
    for (size_t c = 0; c < 3; c++) set_float(patch, c * 12 + c * 4, 1);
    set_float(add_floats("patch_embed.proj.bias", "4", 4), 3, 1);
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) {
        unsigned char *data = add_floats(rest[i].name, rest[i].shape, rest[i].count);
        for (size_t e = 0; e < rest[i].count && rest[i].ones; e++) set_float(data, e, 1);
    }
    if (classes > 0) {
        unsigned char *weight = add_floats("norm.weight", "4", 4);
        for (size_t e = 0; e < 4; e++) set_float(weight, e, 1);
        add_floats("norm.bias", "4", 4);
        snprintf(shape, sizeof shape, "%zu,4", classes);
        add_floats("head.weight", shape, classes * 4);
        snprintf(shape, sizeof shape, "%zu", classes);
        set_float(add_floats("head.bias", shape, classes), best, 1);
    }
    end_tensors(name);
}

static void look_sae(const char *name, float threshold)
{
    begin_tensors("\"layer\":\"1\",\"hook\":\"resid\"");
    unsigned char *encoder = add_floats("W_enc", "4,3", 12);
    set_float(encoder, 0, 1);
    set_float(encoder, 4, 1);
    unsigned char *bias = add_floats("b_enc", "3", 3);
    for (size_t j = 0; j < 3; j++) set_float(bias, j, j < 2 ? -threshold : -10);
    unsigned char *decoder = add_floats("W_dec", "3,4", 12);
    for (size_t j = 0; j < 3; j++) set_float(decoder, 5 * j, 1);
    add_floats("b_dec", "4", 4);
    end_tensors(name);
}

/* red, green: of the four patches; blue is 100 everywhere. */
static void look_patches(const char *name, const int *red, const int *green)
{
    unsigned char file[11 + 48] = "P6\n4 4\n255\n";
    for (size_t i = 0; i < 16; i++) {
        size_t patch = i / 8 * 2 + i % 4 / 2;
        file[11 + 3 * i] = (unsigned char)red[patch];
        file[12 + 3 * i] = (unsigned char)green[patch];
        file[13 + 3 * i] = 100;
    }
    look_write(name, file, sizeof file);
}

static const int none[4] = { 0 }, red0[4] = { 255, 204, 102, 0 }, red1[4] = { 0, 0, 0, 255 };
static const int green2[4] = { 0, 255, 0, 0 };

static void look_folder(const char *name)
{
    if (mkdir(in_folder("look/%s", name), 0777) != 0) need("%s", name);
}

static void make_look_inputs(void)
{
    look_model("model.safetensors", 0, 0, "");
    look_sae("sae.safetensors", 0.2f);
    look_sae("other.safetensors", 0.3f);
    look_folder("set");
    look_folder("set/a");
    look_folder("set/b");
    look_folder("set/c");
    look_patches("set/a/0.ppm", red0, none);
    look_patches("set/a/1.ppm", red1, none);
    look_patches("set/b/2.ppm", none, green2);
    look_folder("flat");
    look_patches("flat/-\033[2J;.ppm", red0, none);
    check(look_run("stats -s sae.safetensors -m model.safetensors set --top 4 --top-patches 2 -o stats "
              "--quiet") == 0, "statistics are made");
}

#define LOOK "-s sae.safetensors -m model.safetensors set --quiet"

/* --- Pictures --- */

/* A picture of 4 x 4 with corner at x, y: each patch as it is, or silent at 30 / 255. */
static int is_crop(const unsigned char *pixels, size_t width, size_t x, size_t y, const int *red,
                   const int *green, unsigned bright)
{
    for (size_t i = 0; i < 16; i++) {
        size_t patch = i / 8 * 2 + i % 4 / 2;
        const unsigned char *at = pixels + ((y + i / 4) * width + x + i % 4) * 3;
        const int wanted[3] = { red[patch], green[patch], 100 };
        for (int c = 0; c < 3; c++)
            if (at[c] != (bright >> patch & 1 ? wanted[c] : wanted[c] * 30 / 255)) return 0;
    }
    return 1;
}

static int is_dark(const unsigned char *pixels, size_t from, size_t to)
{
    for (size_t i = from * 3; i < to * 3; i++)
        if (pixels[i]) return 0;
    return 1;
}

static void look_top(void)
{
    unsigned char file[400], *pixels = file + 13;        /* behind "P6\n10 10\n255\n" */
    static const struct { const char *mask; unsigned first, second; } kinds[] = {
        { "", 15, 15 }, { "--mask value", 7, 8 }, { "--mask top", 1, 8 } };
    for (int k = 0; k < 3; k++) {
        check(look_run("top " LOOK " -t stats -l 0,1,2 -o sheets %s", kinds[k].mask) == 0, "top %s runs",
              kinds[k].mask);
        check(look_read("sheets/latent_0.ppm", file, sizeof file) == 313
              && memcmp(file, "P6\n10 10\n255\n", 13) == 0, "the sheet is 2 x 2 cells, 2 between");
        check(is_crop(pixels, 10, 0, 0, red0, none, kinds[k].first), "%s: the strongest image is "
              "first", kinds[k].mask);
        check(is_crop(pixels, 10, 6, 0, red1, none, kinds[k].second), "%s: then the next",
              kinds[k].mask);
        check(is_dark(pixels, 4, 6) && is_dark(pixels, 40, 100), "gaps and unused cells are dark");
        check(look_read("sheets/latent_1.ppm", file, sizeof file) == 313
              && is_crop(pixels, 10, 0, 0, none, green2, k ? 2 : 15), "latent 1 has its image");
        check(look_read("sheets/latent_2.ppm", file, sizeof file) == 313 && is_dark(pixels, 0, 100),
              "a latent that never fires has an empty sheet");
    }
}

static int is_mask(const char *name, int a, int b, int c, int d)
{
    const unsigned char wanted[] = { 'P', '5', '\n', '2', ' ', '2', '\n', '2', '5', '5', '\n',
        (unsigned char)a, (unsigned char)b, (unsigned char)c, (unsigned char)d };
    unsigned char file[64];
    return look_read(name, file, sizeof file) == sizeof wanted
           && memcmp(file, wanted, sizeof wanted) == 0;
}

static void look_mask(void)
{
    unsigned char file[100];
    check(look_run("mask " LOOK " -l 1,0 -o masks") == 0, "mask runs");
    check(is_mask("masks/latent_0_0_0.ppm.pgm", 255, 191, 64, 0), "0.8 0.6 0.2 0 to the largest");
    check(is_mask("masks/latent_0_1_1.ppm.pgm", 0, 0, 0, 255), "one patch fires");
    check(is_mask("masks/latent_0_2_2.ppm.pgm", 0, 0, 0, 0), "nothing fires: all 0");
    check(is_mask("masks/latent_1_2_2.ppm.pgm", 0, 255, 0, 0), "latent 1 sees green");
    check(look_read("masks/latent_0_0_0.ppm.ppm", file, 100) == 59
          && is_crop(file + 11, 4, 0, 0, red0, none, 7), "the overlay: silent patches are dark");
    check(look_run("mask " LOOK " -l 0 -o masks --mask top -t stats") == 0
          && is_mask("masks/latent_0_0_0.ppm.pgm", 255, 0, 0, 0)
          && is_mask("masks/latent_0_1_1.ppm.pgm", 0, 0, 0, 255), "the two top patches");
    check(look_run("mask " LOOK " -l 0 -o classes --class 0") == 0
          && is_mask("classes/latent_0_class_0.pgm", 255, 191, 64, 255), "the mean over a class");
    check(look_run("mask " LOOK " -l 1,0 -o classes --class 1") == 0
          && is_mask("classes/latent_0_class_1.pgm", 0, 0, 0, 0)
          && is_mask("classes/latent_1_class_1.pgm", 0, 255, 0, 0), "class by class");
    check(access("classes/latent_0_0_0.ppm.pgm", F_OK) != 0, "a class has no single masks");
    check(!exists(in_folder("look/classes/latent_0_class_0.ppm")), "a class has no image for an overlay");
    /* Class 0 has 16 images, one batch, and a bad one; class 1 has a bad one alone. */
    look_folder("skip");
    look_folder("skip/a");
    look_folder("skip/b");
    for (char name[] = "skip/a/a.ppm"; name[7] < 'a' + 16; name[7]++) look_patches(name, red0, none);
    look_write("skip/a/z.ppm", "P6\n4 4\n255\n", 11);
    look_write("skip/b/z.ppm", "P6\n4 4\n255\n", 11);
    check(look_run("mask -s sae.safetensors -m model.safetensors skip --skip-bad -l 0 -o classes --class 0") == 0
          && is_mask("classes/latent_0_class_0.pgm", 255, 191, 64, 0), "a class whose last image is bad");
    check(look_run("mask -s sae.safetensors -m model.safetensors skip --skip-bad -l 0 -o bad --class 1") == 1
          && look_says("--class 1: none of 1 images can be read"), "a class whose images are all bad");
    check(look_run("mask -s sae.safetensors -m model.safetensors flat --quiet -l 0 -o safe") == 0
          && is_mask("safe/latent_0_0_-__2J_.ppm.pgm", 255, 191, 64, 0), "names are made safe");
}

/* A file's name begins with the latent and the image's index, however long the image's name is. */
static void look_long_names(void)
{
    char name[300], file[400], letters[201];
    memset(letters, 'x', 200);
    letters[200] = '\0';
    look_folder("long");
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof name, "long/%s%d.ppm", letters, i);
        look_patches(name, red0, none);
    }
    check(look_run("mask -s sae.safetensors -m model.safetensors long --quiet -l 0 -o longmasks") == 0, "mask runs");
    for (int i = 0; i < 2; i++) {
        snprintf(file, sizeof file, "longmasks/latent_0_%d_%.117s.pgm", i, letters);
        check(is_mask(file, 255, 191, 64, 0), "the mask of image %d, whose name is long, is not %s", i, file);
    }
}

/* What is not defined is "-": the entropy of fewer images than it needs, the classes of images without labels. */
static void look_undefined(void)
{
    check(look_run("stats -s sae.safetensors -m model.safetensors flat -o flat.stats --quiet") == 0,
          "statistics are made");
#define FLAT "explain -s sae.safetensors -m model.safetensors -t flat.stats set/a/0.ppm --quiet "
    check(look_run(FLAT) == 0 && strcmp(look_output,
          "latent      activation  frequency   entropy     classes of its top images\n"
          "0           0.32        1           -           -\n") == 0,
          "what is not defined is not -: %s", look_output);
    check(look_run("eval -s sae.safetensors -m model.safetensors flat --quiet") == 0
          && look_says("\nentropy_mean                                      -1\n"), "eval: %s", look_output);
}

/* --- zeroshot --- */

#define LOOK_NAMES(list) ",\"class_names\":\"" list "\""

/* Which class of the model a label is. The model knows one answer, the class `best`, and every image has another
 * label; so top-1 counts the images of that class. Folders are in byte order: 0, 10, 2. */
static void look_zeroshot(void)
{
    static const struct {
        const char *images;
        size_t classes, best;
        const char *names;                           /* of the model's classes */
        int status;
        const char *words;
    } cases[] = {
        { "set", 3, 0, "", 0, "{\"images\": 3, \"top1\": 2," },          /* a, b, c: ranks; c is empty */
        { "set", 3, 1, "", 0, "{\"images\": 3, \"top1\": 1," },
        { "set", 4, 1, "", 1, "a/0.ppm: not in one of the model's 4 classes" },
        { "numbers", 12, 10, "", 0, "{\"images\": 3, \"top1\": 1," },    /* numbers: their own class */
        { "numbers", 12, 1, "", 0, "{\"images\": 3, \"top1\": 0," },
        { "numbers", 12, 2, "", 0, "{\"images\": 3, \"top1\": 1," },
        { "numbers", 3, 1, "", 1, "10/image.ppm: not in one of the model's 3 classes" },
        { "set", 4, 3, LOOK_NAMES("[\\\"c\\\",\\\"b\\\",\\\"x\\\",\\\"a\\\"]"), 0, "{\"images\": 3, \"top1\": 2," },
        { "set", 4, 1, LOOK_NAMES("[\\\"c\\\",\\\"b\\\",\\\"x\\\",\\\"a\\\"]"), 0, "{\"images\": 3, \"top1\": 1," },
        { "set", 2, 1, LOOK_NAMES("[\\\"c\\\",\\\"b\\\"]"), 1, "a/0.ppm: not in one of the model's 2 classes" },
        { "numbers", 3, 0, LOOK_NAMES("[\\\"10\\\",\\\"0\\\",\\\"2\\\"]"), 0, "{\"images\": 3, \"top1\": 1," },
        { "half", 12, 1, "", 1, "the model's 12 classes" },                    /* 1, a: not all are numbers */
        { "half", 2, 1, "", 0, "{\"images\": 2, \"top1\": 1," },
        { "huge", 12, 1, "", 1, "the model's 12 classes" },         /* 2^64 and more */
        { "zeros", 2, 1, "", 0, "{\"images\": 2, \"top1\": 2," },       /* 1 and 01 are the same number */
        { "padded", 12, 10, "", 0, "{\"images\": 2, \"top1\": 1," },     /* 01, 10 */
        { "classes.txt", 12, 7, "", 0, "{\"images\": 2, \"top1\": 1," }, /* a list has the model's classes */
        { "classes.txt", 12, 7, LOOK_NAMES("[\\\"a\\\",\\\"b\\\"]"), 0, "{\"images\": 2, \"top1\": 1," },
        { "flat", 3, 0, "", 1, "not in one of the model's 3 classes" },
    };
    static const char *const folders[] = { "numbers", "numbers/0", "numbers/2", "numbers/10", "half", "half/1",
                                           "half/a", "huge", "huge/99999999999999999999", "zeros", "zeros/1",
                                           "zeros/01", "padded", "padded/01", "padded/10" };
    static const char list[] = "set/a/0.ppm\t7\nset/b/2.ppm\t3\n";
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        char name[80];
        look_folder(folders[i]);
        snprintf(name, sizeof name, "%s/image.ppm", folders[i]);
        if (strchr(folders[i], '/')) look_patches(name, red0, none);
    }
    look_write("classes.txt", list, sizeof list - 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        look_model("head.safetensors", cases[i].classes, cases[i].best, cases[i].names);
        int status = look_run("zeroshot -m head.safetensors %s --quiet --format json", cases[i].images);
        check(status == cases[i].status && look_says(cases[i].words),
              "zeroshot of %s, %zu classes%s: status %d and '%s' expected, got %d and %s", cases[i].images,
              cases[i].classes, cases[i].names, cases[i].status, cases[i].words, status, look_output);
    }
}

static void look_refusals(void)
{
    static const struct { const char *arguments; int status; const char *words; } bad[] = {
        { "mask " LOOK " -l 3 -o x", 2, "from 0 to 2" }, { "mask " LOOK " -l -1 -o x", 2, "-l" },
        { "mask " LOOK " -l 0, -o x", 2, "-l" }, { "mask " LOOK " -l 0x1 -o x", 2, "-l" },
        { "mask " LOOK " -l 99999999999999999999999 -o x", 2, "from 0 to 2" },
        { "mask " LOOK " -l 0 -o x --mask top", 2, "-t" },
        { "top " LOOK " -l 0 -o x", 2, "-t" },
        { "top " LOOK " -l 0 -o x -t nowhere", 1, "nowhere" },
        { "top " LOOK " -l 0 -o x -t sae.safetensors", 1, "not statistics" },
        { "top " LOOK " -l 0 -o x -t stats --limit 2", 1, "other data" },
        { "top -s other.safetensors -m model.safetensors set --quiet -l 0 -o x -t stats", 1,
          "another SAE" },
        { "mask " LOOK " -l 0 -o x --class 2", 1, "--class 2" },
        { "mask " LOOK " -l 0 -o x --class 3", 1, "--class 3" },
        { "mask -s sae.safetensors -m model.safetensors flat --quiet -l 0 -o x --class 0", 1,
          "no image is of this class" },
        { "mask " LOOK " -l 0 -o none/x", 1, "none/x" },
        { "mask " LOOK " -l 0 -o stats", 1, "stats" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check(look_run("%s", bad[i].arguments) == bad[i].status && look_says(bad[i].words),
              "%s: status %d", bad[i].arguments, bad[i].status);
}

/* --- info --- */

static void look_info(void)
{
    check(look_run("info") == 0 && look_says("(in use)") && look_says("threads: "), "info describes the machine");
    check(look_run("info model.safetensors") == 0 && look_says("vision transformer, timm")
          && look_says("1 blocks, width 4, 1 heads, hidden 8, images of 4 x 4 in 2 x 2 patches of 2 x 2"),
          "info knows a model");
    check(look_run("info sae.safetensors") == 0
          && look_says("layer = 1")
          && look_says("hook = resid") && look_says("W_enc ") && look_says("4 x 3 "), "info knows an SAE");
    static const char last[] = "\nsae.safetensors: sparse autoencoder\n";
    check(strlen(look_output) > sizeof last && strcmp(look_output + strlen(look_output) - sizeof last + 1, last) == 0,
          "the last line says what the file is: %s", look_output);
    check(look_run("info stats") == 0 && look_says("stats: statistics\n") && look_says(" 3 x 4 "),
          "info knows statistics");
    check(look_run("info nowhere") == 1 && look_run("info set") == 1 && look_run("info set/a/0.ppm") == 1,
          "info refuses other files");
    check_full_disk("info sae.safetensors");
    look_tensors("evil", "{\"__metadata__\":{\"k\\u0007\":\"\\u009b31m\\u001b]0;x\\r\"},\"a\\n\\u001b"
                  "[2Jé\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", "x", 1);
    check(look_run("info evil") == 0 && look_says("a\\x0a\\x1b[2J\303\251 ") && look_says("scalar")
          && look_says("k\\x07 = \\xc2\\x9b31m\\x1b]0;x\\x0d"), "names are harmless on a terminal");
}

/* --- compare --- */

/* Two files of a single tensor t; returns the status of their comparison. */
static int look_pair(const char *types, const void *a, size_t a_bytes, const void *b, size_t b_bytes,
                   const char *option)
{
    char one[16], two[16], header[200];
    int a_count, b_count;
    sscanf(types, "%15s %d %15s %d", one, &a_count, two, &b_count);
    snprintf(header, sizeof header, "{\"t\":{\"dtype\":\"%s\",\"shape\":[%d],\"data_offsets\":[0,%zu]}}",
             one, a_count, a_bytes);
    look_tensors("A", header, a, a_bytes);
    snprintf(header, sizeof header, "{\"t\":{\"dtype\":\"%s\",\"shape\":[%d],\"data_offsets\":[0,%zu]}}",
             two, b_count, b_bytes);
    look_tensors("B", header, b, b_bytes);
    return look_run("compare A B %s", option);
}

static void look_compare(void)
{
    static const struct {
        const char *types;
        uint64_t a, b;
        const char *option;
        int status;
        const char *words;
    } pairs[] = {
        { "F32 1 F32 1", 0x40800000, 0x40800000, "", 0, "the same bits" },
        { "F32 1 F32 1", 0x40800000, 0x40a00000, "", 1, "1 of 1 beyond" },      /* 4, 5 */
        { "F32 1 F32 1", 0x40800000, 0x40a00000, "--atol 1", 0, "up to 1 at [0]" },
        { "F32 1 F32 1", 0x40800000, 0x40a00000, "--rtol 0.2", 0, "0 of 1 beyond the tolerance, |a - b| up to 1 at [0]\n" },
        { "F32 1 F32 1", 0x40800000, 0x40a00000, "--rtol 0.19", 1, "1 of 1 tensors" },
        { "F32 1 F32 1", 0x40800000, 0x00000000, "", 1, "|a - b| up to 4 at [0]\n" },
        { "F32 1 F32 1", 0x00000000, 0x80000000, "", 0, "equal, in other bits" },
        { "F32 1 F32 1", 0x7fc00000, 0x7fc00001, "", 0, "equal, in other bits" },   /* NaN */
        { "F32 1 F32 1", 0x7fc00000, 0x40800000, "--atol 1e30", 1, "up to inf" },
        { "F32 1 F32 1", 0x40800000, 0x7fc00000, "--rtol 1e30", 1, "up to inf" },
        { "F32 1 F32 1", 0x40800000, 0x7f800000, "--rtol 1", 1, "up to inf" },  /* 4, infinity */
        { "F32 1 F32 1", 0x7f800000, 0xff800000, "--rtol 1", 1, "up to inf" },
        { "F16 1 F32 1", 0x4400, 0x40800000, "", 0, "F16 and F32, 1: equal" },
        { "F16 1 BF16 1", 0x4400, 0x40a0, "--atol 1", 0, "0 of 1 beyond" },
        { "F64 1 F64 1", 0x3ff0000000000000, 0x3ff0000000000001, "", 1, "2.22044605e-16" },
        { "F64 1 I64 1", 0x4010000000000000, 4, "", 0, "equal, in other bits" },
        { "I64 1 I64 1", 0x20000000000000, 0x20000000000001, "", 1, "up to 1 at" },
        { "I64 1 I64 1", 0x20000000000000, 0x20000000000001, "--atol 1", 0, "0 of 1" },
        { "I64 1 I64 1", 0x8000000000000000, 0x7fffffffffffffff, "", 1, "1.84467441e+19" },
        { "I32 1 I64 1", 0xfffffffe, 0xfffffffffffffffe, "", 0, "equal" },
        { "U8 1 U8 1", 7, 9, "", 1, "up to 2 at [0]" },
        { "U8 2 U8 2", 0x0907, 0x0909, "--atol 2", 0, "up to 2 at [0]" },
        { "BOOL 2 BOOL 2", 0x0100, 0x0101, "--atol 9", 1, "beyond" },
        { "U8 2 U8 1", 0x0907, 0x09, "--atol 99", 1, "2: the other is 1" },
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        unsigned char a[8], b[8];
        char types[2][16];
        int count[2];
        size_t bytes[2];
        sscanf(pairs[i].types, "%15s %d %15s %d", types[0], &count[0], types[1], &count[1]);
        for (int k = 0; k < 2; k++)
            bytes[k] = (size_t)count[k] * (strstr(types[k], "64") ? 8 : strstr(types[k], "32") ? 4
                                           : strstr(types[k], "16") ? 2 : 1);
        little(a, pairs[i].a, 8);
        little(b, pairs[i].b, 8);
        check(look_pair(pairs[i].types, a, bytes[0], b, bytes[1], pairs[i].option) == pairs[i].status
              && look_says(pairs[i].words), "compare number %zu (%s)", i, pairs[i].types);
    }
}

static void look_compare_files(void)
{
    static unsigned char a[3 * 5000], b[3 * 5000];
    const char *header = "{\"__metadata__\":{\"m\":\"1\"},\"t\":{\"dtype\":\"U8\",\"shape\":[3,5000],"
                         "\"data_offsets\":[0,15000]}}";
    memset(b, 0, sizeof b);
    b[2 * 5000 + 17] = 3;
    b[5000 + 4999] = 2;
    look_tensors("A", header, a, sizeof a);
    look_tensors("B", header, b, sizeof b);
    check(look_run("compare A B --atol 2") == 1 && look_says("1 of 15000 beyond") && look_says("up to 3 at [2, 17]"),
          "the largest difference has its place");
    check(look_run("compare A A") == 0 && look_says("3 x 5000: the same bits"), "a file is like itself");
    look_tensors("B", "{\"__metadata__\":{\"m\":\"2\",\"n\":\"3\"},\"t\":{\"dtype\":\"U8\",\"shape\":"
                  "[3,5000],\"data_offsets\":[0,15000]}}", a, sizeof a);
    check(look_run("compare A B") == 0 && look_says("3 x 5000: the same bits"), "metadata differ without harm");
    look_tensors("B", "{\"u\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", a, 0);
    check(look_run("compare A B") == 1 && look_says("only in A") && look_says("only in B") && look_says("2 of 2 tensors"),
          "missing tensors on either side");
    check(look_run("compare A B --common") == 1 && look_says("no tensor in common") && !look_says("only in"),
          "--common of files without a common tensor");
    look_tensors("B", "{\"t\":{\"dtype\":\"U8\",\"shape\":[3,5000],\"data_offsets\":[0,15000]},"
                  "\"u\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[15000,15000]}}", b, sizeof b);
    check(look_run("compare A B") == 1 && look_says("2 of 2 tensors") && look_run("compare A B --common") == 1
              && look_says("1 of 1 tensors") && !look_says("only in") && look_run("compare B A --common --atol 3") == 0,
          "--common: a tensor that only one file has does not count, a common one does");
    check(look_run("compare B B") == 0, "an empty tensor is like itself");
    check(look_run("compare A nowhere") == 1 && look_run("compare A") == 2, "compare needs two files");
    check_full_disk("compare A A");
}

static void test_look(void)
{
    if (mkdir(in_folder("look"), 0777) != 0) need("look");
    make_look_inputs();
    look_top();
    look_mask();
    look_long_names();
    look_undefined();
    look_zeroshot();
    look_refusals();
    look_info();
    look_compare();
    look_compare_files();
}
