/* Tests of bad input and of the command line: which input each command refuses, with which message,
 * leaving no output; lists, packed sets, standard streams; training and checkpoints. The inputs are
 * made from the golden files' small models. In command lines @NAME is a file in the tests' folder. */

/* line with each @ replaced by the folder and a prefix of ours. 8 may be in use at a time. */
SC_PRINTF(1, 2) static const char *cli(const char *line, ...)
{
    static char texts[8][16384];
    static int turn;
    char plain[8192], *text = texts[turn = (turn + 1) % 8];
    size_t used = 0;
    va_list arguments;
    va_start(arguments, line);
    vsnprintf(plain, sizeof plain, line, arguments);
    va_end(arguments);
    for (const char *c = plain; *c && used + sizeof folder + 8 < sizeof texts[0]; c++) {
        if (*c == '@') used += (size_t)sprintf(text + used, "%s/cli_", folder);
        else text[used++] = *c;
    }
    text[used] = '\0';
    return text;
}

/* Whether the last run ended with a status and one line that begins right and holds a text. */
static int cli_said(int status, const char *text)
{
    const char *end = strchr(ran.err, '\n');
    return ran.status == status && strncmp(ran.err, "saeclip: ", 9) == 0 && end && !end[1]
           && strstr(ran.err, text) != NULL;
}

/* A run that must fail: the status, one line on standard error that contains text, and neither @out nor
 * @out.tmp. text: "A*B" for a line that contains A and then B. */
static int cli_refuses(int status, const char *text, const char *line)
{
    char wanted[1024];
    snprintf(wanted, sizeof wanted, "%s", cli("%s", text));
    char *more = strchr(wanted, '*');
    if (more) *more++ = '\0';
    int right = refuses(status, wanted, "%s", cli("%s", line));
    const char *place = strstr(ran.err, wanted);
    if (more && right)
        right = check(strstr(place + strlen(wanted), more) != NULL, "%s: the line lacks '%s': %s", line, more, ran.err);
    right = check(!exists(cli("@out")) && !exists(cli("@out.tmp")), "%s leaves output behind", line)
            && right;
    remove_tree(cli("@out"));
    remove(cli("@out.tmp"));
    return right;
}

typedef struct { int status; const char *text, *line; } cli_case;

static void cli_all(const cli_case *cases)
{
    for (; cases->line; cases++) cli_refuses(cases->status, cases->text, cases->line);
}

/* run() and works() with each @ replaced. */
#define cli_run(...) run("%s", cli(__VA_ARGS__))
#define cli_works(...) works("%s", cli(__VA_ARGS__))

static int cli_same(const char *a, const char *b) { return same_files(cli("%s", a), cli("%s", b)); }

/* --- Inputs --- */

/* What cli_edit changes: it leaves a tensor out, gives it another shape (repeating its values as far as
 * needed) or changes one of its values; it changes or removes an entry of the metadata. */
typedef struct {
    const char *drop, *shape_of;
    int rank;
    size_t shape[4];
    const char *value_of;
    size_t element;
    float value;
    const char *key, *text;
    const char *add;                 /* the name of an additional tensor of shape [1] */
} cli_change;

static void cli_write_tensor(sc_writer *w, const sc_safetensors *file, const sc_tensor *t,
                             const cli_change *c)
{
    int shaped = c->shape_of && strcmp(c->shape_of, t->name) == 0;
    int rank = shaped ? c->rank : t->rank;
    const size_t *shape = shaped ? c->shape : t->shape;
    size_t count = 1;
    for (int d = 0; d < rank; d++) count *= shape[d];
    sc_dtype dtype = t->dtype < SC_F64 ? SC_F32 : t->dtype;
    if (sc_writer_tensor(w, t->name, dtype, rank, shape) != SC_OK) need("%s", sc_error());
    for (size_t i = 0; i < count; i++) {
        int64_t whole = 0;
        float number = 0;
        double wide = 0;
        if (dtype == SC_F32) sc_tensor_floats(file, t, i % t->count, 1, &number);
        else if (dtype == SC_F64) copy_numbers(&wide, t->data + i % t->count * sizeof wide, 1, sizeof wide);
        else sc_tensor_integers(file, t, i % t->count, 1, &whole);
        if (c->value_of && strcmp(c->value_of, t->name) == 0 && i == c->element) {
            number = c->value;
            whole = (int64_t)c->value;
        }
        unsigned char byte = (unsigned char)whole;
        if (dtype == SC_F32) sc_writer_floats(w, &number, 1);
        else if (dtype == SC_F64) sc_writer_values(w, &wide, 1, SC_F64);
        else if (dtype == SC_U8) sc_writer_bytes(w, &byte, 1);
        else sc_writer_integers(w, &whole, 1);
    }
}

/* A copy of a safetensors file with one change. */
static void cli_edit(const char *from, const char *to, cli_change c)
{
    sc_safetensors file;
    sc_writer w;
    if (sc_safetensors_open(&file, from) != SC_OK || sc_writer_open(&w, to) != SC_OK)
        need("%s", sc_error());
    for (size_t i = 0; i < file.entries; i++)
        if (!c.key || strcmp(c.key, file.metadata[i].key) != 0)
            sc_writer_metadata(&w, file.metadata[i].key, file.metadata[i].value);
    if (c.key && c.text) sc_writer_metadata(&w, c.key, c.text);
    for (size_t i = 0; i < file.tensors; i++)
        if (!c.drop || strcmp(c.drop, file.tensor[i].name) != 0)
            cli_write_tensor(&w, &file, &file.tensor[i], &c);
    if (c.add && (sc_writer_tensor(&w, c.add, SC_F32, 1, (size_t[]){ 1 }) != SC_OK
                  || sc_writer_floats(&w, &(float){ 1 }, 1) != SC_OK)) need("%s", sc_error());
    if (sc_writer_close(&w, SC_OK) != SC_OK) need("%s", sc_error());
    sc_safetensors_close(&file);
}

#define RESHAPED(tensor, ...) { .shape_of = tensor, .shape = { __VA_ARGS__ }, \
                               .rank = (int)(sizeof (size_t[]){ __VA_ARGS__ } / sizeof(size_t)) }
#define CHANGED(tensor, place, number) { .value_of = tensor, .element = place, .value = number }
#define METADATA(name, value) { .key = name, .text = value }

/* Copies of a file with one change each, under another name, in runs that must fail with status 1. The
 * runs are the given lines in turn. */
typedef struct { const char *text; cli_change change; } cli_damage;

static void cli_all_damaged(const char *from, const char *to, const cli_damage *damage, size_t count,
                            const char *const *lines, size_t line_count)
{
    for (size_t i = 0; i < count; i++) {
        char text[400];
        snprintf(text, sizeof text, "%s: *%s", to, damage[i].text);
        cli_edit(cli("%s", from), cli("%s", to), damage[i].change);
        cli_refuses(1, text, lines[i % line_count]);
    }
}

/* A copy with other bits in one element of a tensor, such as those of NaN, which sc_writer refuses. */
static void cli_poke(const char *from, const char *to, const char *tensor, size_t element,
                     uint32_t bits)
{
    sc_safetensors file;
    size_t count;
    char *bytes = get_file(from, &count);
    if (sc_safetensors_open(&file, from) != SC_OK) need("%s", sc_error());
    const sc_tensor *t = sc_tensor_find(&file, tensor);
    if (!t || t->dtype != SC_F32) need("%s in %s", tensor, from);
    for (int b = 0; b < 4; b++)
        bytes[t->data - file.map + (ptrdiff_t)element * 4 + b] = (char)(bits >> 8 * b);
    put_file(to, bytes, count);
    sc_safetensors_close(&file);
}

/* A copy with the first occurrence of a text replaced by one of the same length. */
static void cli_replace(const char *from, const char *to, const char *old, const char *text)
{
    size_t count, i = 0, length = strlen(old);
    char *bytes = get_file(from, &count);
    while (bytes && i + length < count && memcmp(bytes + i, old, length) != 0) i++;
    if (!bytes || i + length >= count || strlen(text) != length) need("%s in %s", old, from);
    memcpy(bytes + i, text, length);
    put_file(to, bytes, count);
}

/* An image of width x height, different for every seed. */
static void cli_picture(const char *path, unsigned seed, size_t width, size_t height)
{
    static unsigned char bytes[64 + 3 * 64 * 64];
    int head = sprintf((char *)bytes, "P6\n%zu %zu\n255\n", width, height);
    for (size_t i = 0; i < 3 * width * height; i++)
        bytes[(size_t)head + i] = (unsigned char)(seed * 37 + i * (seed + 3) % 251 + i / 7 * seed);
    put_file(path, bytes, (size_t)head + 3 * width * height);
}

enum { CLI_PICTURES = 7 };

static const char *const cli_pictures[CLI_PICTURES] = {
    "birds/a.ppm", "birds/b.ppm", "birds/c.ppm", "cats/a.ppm", "cats/b.ppm", "dogs/a.ppm",
    "dogs/b.ppm" };

static const int cli_labels[CLI_PICTURES] = { 0, 0, 0, 1, 1, 2, 2 };

/* A folder with three classes, a list of the same images, a model, activations, SAEs and statistics. */
static void cli_make_inputs(void)
{
    char list[4096] = "# the images of @photos\n\n";
    mkdir(cli("@photos"), 0777);
    mkdir(cli("@photos/birds"), 0777);
    mkdir(cli("@photos/cats"), 0777);
    mkdir(cli("@photos/dogs"), 0777);
    for (int i = 0; i < CLI_PICTURES; i++) {
        const char *path = cli("@photos/%s", cli_pictures[i]);
        cli_picture(path, (unsigned)i + 1, (size_t)(40 + 3 * (i % 3)), (size_t)(40 + 2 * (i % 4)));
        sprintf(list + strlen(list), "cli_photos/%s\t%d%s", cli_pictures[i], cli_labels[i],
                i == 3 ? "\r\n" : "\n");
    }
    put_text(cli("@list.txt"), list);
    cli_edit(GOLDEN "clip_timm.safetensors", cli("@model"), (cli_change){ 0 });
    cli_works("extract --quiet -m @model --layer 2 --hook mlp @photos -o @acts");
    cli_works("train --quiet --acts @acts --latents 24 --steps 3 --batch 4 -o @sae");
    cli_works("train --quiet --acts @acts --latents 24 --arch topk --k 5 --steps 3 --batch 4 "
              "-o @topk");
    cli_works("stats --quiet -s @sae --acts @acts -o @stats");
}

/* --- The command line itself --- */

static const cli_case cli_usage[] = {
    { 2, "no command", "" },
    { 2, "unknown command 'trian'", "trian --acts @acts -o @out" },
    { 2, "extract: unknown option --lr", "extract -m @model @photos --lr 1 -o @out" },
    { 2, "unknown option --no-such", "train --acts @acts --no-such 1 -o @out" },
    { 2, "unknown option --layers", "train --acts @acts --layers 1 -o @out" },
    { 2, "unknown option -x", "info -x" },
    { 2, "-o: no value (expected PATH)", "train --acts @acts -o" },
    { 2, "-o: given twice", "train --acts @acts -o @out -o @out" },
    { 2, "--lr: given twice", "train --acts @acts --lr 1 --lr=1 -o @out" },
    { 2, "train: unknown option --ghost=1", "train --acts @acts --ghost=1 -o @out" },
    { 2, "-o is missing", "train --acts @acts" },
    { 2, "-m is missing", "extract @photos -o @out" },
    { 2, "-s is missing", "stats --acts @acts -o @out" },
    { 2, "-l is missing", "mask -s @sae -m @model @photos -o @out" },
    { 2, "-t is missing", "top -s @sae -m @model @photos -l 1 -o @out" },
    { 2, "-m is missing", "top -s @sae -t @stats @photos -l 1 -o @out" },
    { 2, "extract: ", "extract -m @model -o @out" },
    { 2, "extract: ", "extract -m @model @photos @photos -o @out" },
    { 2, "compare: ", "compare @acts" },
    { 2, "info: ", "info @acts @acts" },
    { 2, "exclude each other", "train --acts @acts @photos -o @out" },
    { 2, "no data", "train -o @out" },
    { 2, "no data", "train -m @model -o @out" },
    { 2, "no data", "eval -s @sae --also @acts" },
    { 2, "--lr: ", "train --acts @acts --lr= -o @out" },
    { 2, "--acts: no value (expected FILE)", "eval -s @sae --acts=" },
    { 2, "top: unknown option --skip-bad",
      "top --skip-bad -s @sae -t @stats -m @model @photos -l 1 -o @out" },
    { 2, "--mean: ", "extract --quiet -m @model --mean 1,2 @photos -o @out" },
    { 2, "--std: ", "extract --quiet -m @model --std 1,2,3,4 @photos -o @out" },
    { 2, "--steps and --epochs", "train --acts @acts --steps 1 --epochs 1 -o @out" },
    { 1, "@acts: not a training log", "train --acts @acts --steps 1 --log @acts -o @out" },
    { 1, "cli_sae: not a training log",
      "train --acts @acts --init @sae --steps 1 --log @photos/../cli_sae -o @out" },
    { 1, "@model: not a training log", "train --quiet -m @model @photos --steps 1 --log @model -o @out" },
    { 1, "@list.txt: not a training log", "train --quiet -m @model @list.txt --steps 1 --log @list.txt -o @out" },
    { 2, "--log: @out is another output", "train --acts @acts --steps 1 -o @out --log @out" },
    { 2, "--log: @out is another output", "train --acts @acts --steps 1 -o @part --checkpoint @out --log @out" },
    { 2, "--init and --expansion", "train --acts @acts --init @sae --expansion 2 -o @out" },
    { 2, "--init and --latents", "train --acts @acts --init @sae --latents 2 -o @out" },
    { 2, "--init and --b-dec", "train --acts @acts --init @sae --b-dec mean -o @out" },
    { 2, "--square and --size", "pack @photos --size 8 --square 8 -o @out" },
    { 2, "--layer", "extract --quiet -m @model --layer 0 @photos -o @out" },
    { 2, "merge: ", "merge -o @out" },
    { 2, "-o is missing", "merge @stats" },
    { 2, "stats: takes one SAE", "stats -s @sae -s @sae --acts @acts -o @out" },
    { 2, "encode: takes one SAE", "encode -s @sae -s @sae --acts @acts -o @out" },
    { 2, "-l: ", "mask -s @sae --acts @acts -l 1, -o @out" },
    { 2, "-l: ", "mask -s @sae --acts @acts -l x -o @out" },
    { 2, "-l: ", "mask -s @sae --acts @acts -l -1 -o @out" },
    { 2, "--mask=top needs -t", "mask -s @sae --acts @acts -l 1 --mask top -o @out" },
    { 2, "-t needs --mask=top", "mask -s @sae -t @stats --acts @acts -l 1 --mask value -o @out" },
    { 2, "--k needs --arch=topk", "train --acts @acts --k 3 -o @out" },
    { 2, "--arch=relu and --k exclude each other", "eval -s @sae --acts @acts --arch relu --k 3" },
    { 2, "--arch=topk and --l1 exclude each other", "train --acts @acts --arch topk --l1 1 -o @out" },
    { 2, "--acts and --heads exclude each other", "eval -s @sae --acts @acts --heads 4" },
    { 2, "--threshold needs --class-counts", "stats -s @sae --acts @acts --threshold 1 -o @out" },
    { 2, "--hook needs -s", "zeroshot -m @model @photos --hook mlp" },
    { 0, NULL, NULL } };

/* Invalid values: "OPTION VALUE ...", and the rest of the command line. */
static const struct { const char *values, *line; } cli_values[] = {
    { "--lr fast 1x -1 nan inf", "train --acts @acts -o @out" },
    { "--batch 0 2.5 1e30", "train --acts @acts -o @out" },
    { "--steps -1", "train --acts @acts -o @out" },
    { "--epochs -1", "train --acts @acts -o @out" },
    { "--expansion 0 4096", "train --acts @acts -o @out" },
    { "--k 0", "train --acts @acts -o @out" },
    { "--latents 0", "train --acts @acts -o @out" },
    { "--seed 1.5 -1 3e9", "train --acts @acts -o @out" },
    { "--threads 0 many", "train --acts @acts -o @out" },
    { "--limit 0", "train --acts @acts -o @out" },
    { "--top 0", "stats -s @sae --acts @acts -o @out" },
    { "--threshold -1", "stats -s @sae --acts @acts -o @out" },
    { "--rtol -1", "compare @acts @acts" },
    { "--size 0", "pack @photos -o @out" },
    { "--square 99999", "pack @photos -o @out" },
    { "--hook residual m", "extract -m @model @photos -o @out" },
    { "--tokens none", "extract -m @model @photos -o @out" },
    { "--dtype f64", "extract -m @model @photos -o @out" },
    { "--arch gated", "train --acts @acts -o @out" },
    { "--b-dec median", "train --acts @acts -o @out" },
    { "--order random", "train --acts @acts -o @out" },
    { "--mask all", "mask -s @sae --acts @acts -l 1 -o @out" },
    { "--format xml", "eval -s @sae --acts @acts" },
    { "--format markdown", "zeroshot -m @model @photos" },
    { "--gelu tanh", "extract -m @model @photos -o @out" },
    { "--eps small", "extract --quiet -m @model @photos -o @out" },
    { "--heads two", "extract --quiet -m @model @photos -o @out" } };

static void cli_test_usage(void)
{
    cli_all(cli_usage);
    for (size_t i = 0; i < COUNT(cli_values); i++) {
        char words[200], line[400], text[200], *rest = words;
        snprintf(words, sizeof words, "%s", cli_values[i].values);
        const char *option = strtok_r(rest, " ", &rest);
        for (char *value; (value = strtok_r(rest, " ", &rest)) != NULL;) {
            snprintf(line, sizeof line, "%s %s %s", cli_values[i].line, option, value);
            snprintf(text, sizeof text, "%s: invalid value '%s'", option, value);
            cli_refuses(2, text, line);
        }
    }
    setenv("SAECLIP_ISA", "mmx", 1);
    cli_refuses(2, "SAECLIP_ISA=mmx", "train --acts @acts --steps 1 -o @out");
    restore_isa();
}

/* --- Help --- */

/* Whether every option of a command's example is among those its help lists. */
static int cli_example_fits(const char *help, const char *example)
{
    char words[1024], *rest = words;
    snprintf(words, sizeof words, "%.*s", (int)strcspn(example, "\n"), example);
    for (char *word; (word = strtok_r(rest, " ", &rest)) != NULL;) {
        char listed[300];
        snprintf(listed, sizeof listed, "\n    %s ", word);
        if (word[0] == '-' && word[1] && !strstr(help, listed)) return 0;
    }
    return 1;
}

static const char *const cli_commands[] = { "info", "pack", "extract", "train", "encode", "eval",
                                            "stats", "merge", "top", "mask", "plot", "zeroshot",
                                            "compare" };

enum { CLI_COMMANDS = COUNT(cli_commands) };

/* A model of 12 blocks: the golden one's three, over and over. */
static void cli_write_deep_model(const char *path)
{
    sc_safetensors file;
    sc_writer w;
    if (sc_safetensors_open(&file, GOLDEN "clip_timm.safetensors") != SC_OK
        || sc_writer_open(&w, path) != SC_OK) need("%s", sc_error());
    for (size_t i = 0; i < file.entries; i++)
        sc_writer_metadata(&w, file.metadata[i].key, file.metadata[i].value);
    for (size_t i = 0; i < file.tensors; i++) {
        unsigned block, copies = 1;
        if (sscanf(file.tensor[i].name, "blocks.%u.", &block) == 1) copies = 4;
        for (unsigned copy = 0; copy < copies; copy++) {
            char name[200];
            sc_tensor renamed = file.tensor[i];
            if (copies > 1) snprintf(name, sizeof name, "blocks.%u.%s", block + 3 * copy,
                                     strchr(renamed.name + 7, '.') + 1);
            if (copies > 1) renamed.name = name;
            cli_write_tensor(&w, &file, &renamed, &(cli_change){ 0 });
        }
    }
    if (sc_writer_close(&w, SC_OK) != SC_OK) need("%s", sc_error());
    sc_safetensors_close(&file);
}

static void cli_copy(const char *from, const char *to)
{
    size_t count;
    const char *bytes = get_file(cli("%s", from), &count);
    if (!bytes) need("%s", from);
    put_file(cli("%s", to), bytes, count);
}

/* Runs each command's example as --help prints it, in a folder with the files that it names. */
static void cli_test_help(void)
{
    char text[1024], place[400];
    snprintf(place, sizeof place, "%s", cli("@example"));
    mkdir(place, 0777);
    if (symlink(cli("@photos"), cli("@example/photos")) != 0) need("a link");
    cli_write_deep_model(cli("@example/clip.safetensors"));
    cli_copy("@example/clip.safetensors", "@example/vit.safetensors");
    cli_picture(cli("@example/photo.jpg"), 5, 50, 40);         /* the first bytes count */
    put_text(cli("@example/photos.txt"), "photo.jpg\t3\n");
    with.folder = place;
    for (size_t i = 0; i < CLI_COMMANDS; i++) {
        works("%s --help", cli_commands[i]);
        const char *example = strstr(ran.out, "\nexample: saeclip ");
        if (!check(example != NULL, "%s --help has no example", cli_commands[i])) continue;
        check(strstr(ran.out, "--quiet") != NULL, "%s --help lists no options", cli_commands[i]);
        check(cli_example_fits(ran.out, example + 10), "%s: the example has another's option",
              cli_commands[i]);
        snprintf(text, sizeof text, "%.*s", (int)strcspn(example + 18, "\n"), example + 18);
        run("%s", text);
        check(ran.status == 0, "%s, as printed: %d %s", text, ran.status, ran.err);
        if (strcmp(cli_commands[i], "extract") == 0) {
            cli_copy("@example/acts.safetensors", "@example/mine.safetensors");
            cli_copy("@example/acts.safetensors", "@example/theirs.safetensors");
        }
        if (strcmp(cli_commands[i], "stats") == 0) {           /* merge's example */
            cli_works("stats --quiet -s @example/sae.safetensors -m @example/clip.safetensors @photos "
                      "--shard 1/2 -o @example/first.safetensors");
            cli_works("stats --quiet -s @example/sae.safetensors -m @example/clip.safetensors @photos "
                      "--shard 2/2 -o @example/second.safetensors");
        }
        if (strcmp(cli_commands[i], "train") != 0) continue;
        cli_copy("@example/topk.safetensors", "@example/sae.safetensors");
        cli_copy("@example/topk.safetensors", "@example/relu.safetensors");
    }
    with.folder = NULL;
    check(cli_same("@example/both.safetensors", "@example/stats.safetensors"), "merge's example is not the whole");
    works("--help");
    for (size_t i = 0; i < CLI_COMMANDS; i++)
        check(strstr(ran.out, cli_commands[i]) != NULL, "--help does not list %s", cli_commands[i]);
    works("--version");
    check(strcmp(ran.out, "saeclip " SC_VERSION "\n") == 0, "--version says %s", ran.out);
    cli_works("train --lr 1 --ghost --help --no-such");
}

/* --- Models, SAEs, activations --- */

static void cli_test_layers(void)
{
    static const cli_case cases[] = {
        { 1, "@model: layer 4 (expected 1 to 3", "extract --quiet -m @model --layer 4 @photos -o @out" },
        { 1, "@model: layer -4 (expected 1 to 3", "extract --quiet -m @model --layer -4 @photos -o @out" },
        { 1, "layer 4 (expected 1 to 3", "train --quiet -m @model --layer 4 @photos -o @out" },
        { 1, "layer 4 (expected 1 to 3", "eval --quiet -s @sae -m @model --layer 4 @photos" },
        { 1, "layer 4 (expected 1 to 3", "stats --quiet -s @sae -m @model --layer 4 @photos -o @out" },
        { 2, "--layer", "train --quiet -m @model --layer 0 @photos -o @out" },
        { 2, "--layer", "eval --quiet -s @sae -m @model --layer 0 @photos" },
        { 0, NULL, NULL } };
    cli_all(cases);
    cli_works("extract --quiet -m @model --layer -2 --hook mlp @photos -o @out");
    check(cli_same("@out", "@acts"), "layer -2 of 3 is not layer 2");
    remove(cli("@out"));
}

static void cli_test_models(void)
{
    static const cli_damage damage[] = {
        { "not a vision transformer", { .drop = "cls_token" } },
        { "tensor blocks.1.norm2.bias", { .drop = "blocks.1.norm2.bias" } },
        { "tensor blocks.2.attn.qkv.weight", { .drop = "blocks.2.attn.qkv.weight" } },
        { "tensor norm_pre.bias is missing", { .drop = "norm_pre.bias" } },
        { "patch embedding", { .drop = "patch_embed.proj.weight" } },
        { "position embedding", { .drop = "pos_embed" } },
        { "block 0's MLP", { .drop = "blocks.0.mlp.fc1.weight" } },
        { "has no block 0", { .drop = "blocks.0.norm1.weight" } },
        { "position embedding", RESHAPED("pos_embed", 1, 34, 16) },
        { "square", RESHAPED("pos_embed", 1, 16, 32) },
        { "square", RESHAPED("pos_embed", 1, 1, 32) },
        { "patch embedding", RESHAPED("patch_embed.proj.weight", 32, 1, 10, 10) },
        { "patch embedding", RESHAPED("patch_embed.proj.weight", 32, 3, 10, 20) },
        { "patch embedding", RESHAPED("patch_embed.proj.weight", 9600) },
        { "cls_token", RESHAPED("cls_token", 1, 1, 31) },
        { "blocks.0.mlp.fc1.weight", RESHAPED("blocks.0.mlp.fc1.weight", 32, 100) },
        { "blocks.1.mlp.fc2.weight", RESHAPED("blocks.1.mlp.fc2.weight", 100, 32) },
        { "blocks.1.mlp.fc1.weight", RESHAPED("blocks.1.mlp.fc1.weight", 99, 32) },
        { "blocks.0.mlp", RESHAPED("blocks.0.mlp.fc1.weight", 0, 32) },
        { "fc1.weight has 0 numbers (expected", RESHAPED("blocks.0.mlp.fc1.weight", 1 << 30, 0) },
        { "qkv.weight", RESHAPED("blocks.0.attn.qkv.weight", 32, 32) },
        { "qkv.bias", RESHAPED("blocks.0.attn.qkv.bias", 32) },
        { "norm1.bias", RESHAPED("blocks.0.norm1.bias", 33) },
        { "metadata num_attention_heads", METADATA("num_attention_heads", "two") },
        { "metadata num_attention_heads", METADATA("num_attention_heads", "0") },
        { "3 heads", METADATA("num_attention_heads", "3") },
        { "2.5 heads", METADATA("num_attention_heads", "2.5") },
        { "'swish'", METADATA("hidden_act", "swish") },
        { "metadata layer_norm_eps", METADATA("layer_norm_eps", "-1") },
        { "metadata image_mean", METADATA("image_mean", "0.5,0.5") },
        { "metadata image_std", METADATA("image_std", "a,b,c") },
        { "three numbers above 0", METADATA("image_std", "1,0,1") } };
    static const char *const line = "extract --quiet -m @bad --layer 3 --hook resid @photos -o @out";
    char text[300];
    cli_all_damaged("@model", "@bad", damage, COUNT(damage), &line, 1);
    static const struct { const char *tensor; size_t element; } spoilt[] = {
        { "cls_token", 31 }, { "pos_embed", 500 }, { "patch_embed.proj.weight", 1 },
        { "norm_pre.weight", 0 }, { "blocks.2.mlp.fc2.weight", 7 },
        { "blocks.0.attn.qkv.bias", 95 } };
    for (size_t i = 0; i < COUNT(spoilt); i++) {
        const uint32_t odd[] = { 0x7fc00000, 0x7f800000, 0xff800000 };
        snprintf(text, sizeof text, "@bad: tensor '%s', element %zu", spoilt[i].tensor,
                 spoilt[i].element);
        cli_poke(cli("@model"), cli("@bad"), spoilt[i].tensor, spoilt[i].element, odd[i % 3]);
        cli_refuses(1, text, "train --quiet -m @bad --layer 3 --hook resid @photos -o @out");
    }
}

static void cli_test_more_models(void)
{
    static const cli_case cases[] = {
        { 1, "@no-such: cannot be opened", "extract -m @no-such @photos -o @out" },
        { 1, "@photos: cannot be read (expected a safetensors file", "extract -m @photos @photos -o @out" },
        { 1, "@list.txt: not a safetensors file", "extract -m @list.txt @photos -o @out" },
        { 1, "@empty: cannot be read (expected a safetensors file of at least 8 bytes", "extract -m @empty @photos -o @out" },
        { 1, "@half: tensor", "extract -m @half @photos -o @out" },
        { 1, "@half: tensor", "zeroshot -m @half @photos" },
        { 1, "@half: tensor", "info @half" },
        { 1, "@half: tensor", "compare @half @half" },
        { 1, "@half: tensor", "compare @model @half" },
        { 1, "@sae: not a vision transformer", "extract -m @sae @photos -o @out" },
        { 1, "@whole: tensor 'cls_token' has 32 values of type I32 (expected 32", "extract --quiet -m @whole @photos -o @out" },
        { 1, "@text: tensor text_embeds (expected [classes, 20]", "zeroshot --quiet -m @text @photos" },
        { 1, "@nohead: no head", "zeroshot --quiet -m @nohead @photos" },
        { 1, "norm.weight", "zeroshot --quiet -m @nonorm @photos" },
        { 1, "finite", "zeroshot --quiet -m @loud @list.txt" },
        { 1, "finite", "extract --quiet -m @loud --layer 3 @photos -o @out" },
        { 1, "finite", "stats --quiet -s @sae -m @loud --layer 3 @photos -o @out" },
        { 1, "step 1: image", "train --quiet -m @loud --layer 3 --latents 8 @photos -o @out" },
        { 0, NULL, NULL } };
    size_t count;
    const char *bytes = get_file(cli("@model"), &count);
    put_file(cli("@half"), bytes, count / 2);
    put_text(cli("@empty"), "");
    cli_replace(GOLDEN "clip_timm.safetensors", cli("@whole"), "\"cls_token\": {\"dtype\": \"F32\"",
                "\"cls_token\": {\"dtype\": \"I32\"");
    cli_replace(GOLDEN "clip_hf.safetensors", cli("@text"),
                "\"text_embeds\": {\"dtype\": \"F32\", \"shape\": [10, 20]",
                "\"text_embeds\": {\"dtype\": \"F32\", \"shape\": [20, 10]");
    cli_edit(cli("@model"), cli("@nohead"), (cli_change){ .drop = "head.weight" });
    cli_edit(cli("@model"), cli("@nonorm"), (cli_change){ .drop = "norm.weight" });
    cli_edit(cli("@model"), cli("@loud"), (cli_change){
        .value_of = "blocks.2.mlp.fc2.bias", .element = 3, .value = 3e38f });
    cli_edit(cli("@loud"), cli("@louder"), (cli_change){
        .value_of = "blocks.2.mlp.fc2.weight", .element = 300, .value = 3e38f });
    cli_edit(cli("@louder"), cli("@loud"), (cli_change){
        .value_of = "blocks.2.mlp.fc1.bias", .element = 0, .value = 1e30f });
    cli_all(cases);
}

static void cli_test_saes(void)
{
    static const cli_damage damage[] = {
        { "not an SAE", { .drop = "W_enc" } },
        { "tensor W_dec (expected 24 x 32)", { .drop = "W_dec" } },
        { "tensor b_enc (expected 1 x 24)", { .drop = "b_enc" } },
        { "tensor b_dec (expected 1 x 32)", { .drop = "b_dec" } },
        { "W_dec", RESHAPED("W_dec", 32, 24) },
        { "d_in is 32 (expected 24, as read before)", RESHAPED("W_enc", 24, 32) },
        { "not an SAE", RESHAPED("W_enc", 768) },
        { "not an SAE", RESHAPED("W_enc", 32, 0) },
        { "b_enc", RESHAPED("b_enc", 23) },
        { "b_enc", { .shape_of = "b_enc", .rank = 0 } },
        { "b_dec", RESHAPED("b_dec", 2, 16) },
        { "architecture is gated", METADATA("architecture", "gated") },
        { "k is 25 (expected 1 to 24, the number of latents): see --k", METADATA("k", "25") },
        { "k is 0 (expected 1 to 24", METADATA("k", "0") },
        { "k is 2.5 (expected a whole number", METADATA("k", "2.5") },
        { "k is few (expected a whole number", METADATA("k", "few") },
        { "k is 0 (expected 1 to 24", METADATA("k", NULL) },
        { "layer is 0 (expected 2, the value in force)", METADATA("layer", "0") },
        { "layer is 1.5 (expected 2", METADATA("layer", "1.5") },
        { "hook is ear (expected mlp", METADATA("hook", "ear") } };
    static const char *const lines[] = {
        "eval -s @bad --acts @acts", "stats -s @bad --acts @acts -o @out",
        "encode -s @bad --acts @acts -o @out", "mask -s @bad --acts @acts -l 0 -o @out" };
    char text[300];
    cli_all_damaged("@topk", "@bad", damage, COUNT(damage), lines, COUNT(lines));
    static const char *const tensors[] = { "W_enc", "W_dec", "b_enc", "b_dec" };
    for (size_t i = 0; i < 4; i++) {
        cli_poke(cli("@sae"), cli("@bad"), tensors[i], 20, i % 2 ? 0x7fc00000 : 0x7f800000);
        snprintf(text, sizeof text, "@bad: tensor '%s', element 20", tensors[i]);
        cli_refuses(1, text, lines[i]);
        cli_refuses(1, text, "train --acts @acts --init @bad --steps 1 -o @out");
    }
}

static void cli_test_mismatches(void)
{
    static const cli_case cases[] = {
        { 1, "init_90.safetensors: the SAE has width 20",
          "eval -s " GOLDEN "init_90.safetensors --acts @acts" },
        { 1, "width 20", "stats -s " GOLDEN "init_90.safetensors --acts @acts -o @out" },
        { 1, "width 20", "encode -s " GOLDEN "init_90.safetensors --acts @acts -o @out" },
        { 1, "width 20",
          "mask --quiet -s " GOLDEN "init_90.safetensors -m @model @photos -l 1 -o @out" },
        { 1, "width 20", "train --acts @acts --init " GOLDEN "init_90.safetensors -o @out" },
        { 1, "@model: not an SAE", "eval -s @model --acts @acts" },
        { 1, "@no-such: cannot be opened", "eval -s @sae -s @no-such --acts @acts" },
        { 1, "@layer3: layer is 3 (expected 2, the value in force)", "eval -s @layer3 --acts @acts" },
        { 1, "@layer3: layer is 3 (expected 2, the value in force)",
          "stats -s @layer3 --acts @acts -o @out" },
        { 1, "@layer3: layer is 3 (expected 2, the value in force)",
          "train --init @layer3 --acts @acts -o @out" },
        { 1, "@attn: hook is attn (expected mlp, the value in force)", "encode -s @attn --acts @acts -o @out" },
        { 1, "@attn: hook is attn (expected mlp, the value in force)",
          "train --init @attn --acts @acts -o @out" },
        { 1, "layer 9 (expected 1 to 3", "eval --quiet -s @layer9 -m @model @photos" },
        { 2, "@nowhere: does not name its hook point",
          "eval --quiet -s @nowhere -m @model @photos" },
        { 2, "--k: k is 25 (expected 1 to 24", "eval -s @sae --arch topk --k 25 --acts @acts" },
        { 1, "k is 0 (expected 1 to 24", "eval -s @sae --arch topk --acts @acts" },
        { 2, "--k: k is 25 (expected 1 to 24",
          "train --acts @acts --latents 24 --arch topk --k 25 -o @out" },
        { 2, "-l: invalid value at '24' (expected at most 1024 numbers from 0 to 23", "mask -s @sae --acts @acts -l 3,24 -o @out" },
        { 1, "@stats: statistics of another SAE",
          "top --quiet -s @topk -t @stats -m @model @photos -l 1 -o @out" },
        { 1, "@stats: statistics of another data set",
          "top --quiet -s @sae -t @stats -m @model @photos --limit 5 -l 1 -o @out" },
        { 1, "@acts: not statistics",
          "mask --quiet -s @sae -t @acts -m @model @photos --mask top -l 1 -o @out" },
        { 1, "--class 7: no image",
          "mask --quiet -s @sae -m @model @photos --class 7 -l 1 -o @out" },
        { 1, "--class-counts: ", "stats -s @sae --acts @bare --class-counts -o @out" },
        { 0, NULL, NULL } };
    cli_edit(cli("@sae"), cli("@layer3"), (cli_change)METADATA("layer", "3"));
    cli_edit(cli("@sae"), cli("@layer9"), (cli_change)METADATA("layer", "9"));
    cli_edit(cli("@sae"), cli("@attn"), (cli_change)METADATA("hook", "attn"));
    cli_edit(cli("@sae"), cli("@nowhere"), (cli_change){ .key = "layer" });
    cli_edit(cli("@acts"), cli("@bare"), (cli_change){ .drop = "labels", .key = "class_names" });
    cli_all(cases);
    cli_works("eval -s @layer3 --layer 2 --acts @acts");      /* options overrule metadata */
    cli_works("eval -s @attn --hook mlp --acts @acts");
    cli_edit(cli("@acts"), cli("@silent"), (cli_change){ .key = "layer" });
    cli_works("eval -s @layer3 --acts @silent");              /* activations without a layer */
    cli_works("mask -s @sae --acts @acts -l 1,2 -o @masks");  /* no images, so no overlays */
    check(exists(cli("@masks/latent_2_6_.pgm")) && !exists(cli("@masks/latent_2_6_.ppm")),
          "masks of activations are missing");
}

static void cli_test_activations(void)
{
    static const cli_case cases[] = {
        { 1, "@nan: tensor 'activations', element 1000", "eval -s @sae --acts @nan" },
        { 1, "@nan: tensor 'activations', element 1000", "stats -s @sae --acts @nan -o @out" },
        { 1, "image 1, token 14", "encode -s @sae --acts @nan -o @out" },
        { 1, "step 1: image 1, token 14: @nan", "train --acts @nan --latents 8 --batch 7 -o @out" },
        { 1, "step 2: image 4, token 3: ",
          "train --acts @zero --latents 8 --batch 3 --order sequential -o @out" },
        { 1, "image 4, token 3: ||x|| is 0", "eval -s @sae --acts @zero" },
        { 1, "image 4, token 3: ||x|| is 0", "train --acts @zero --latents 8 --batch 7 -o @out" },
        { 1, "@flat: not saved activations", "eval -s @sae --acts @flat" },
        { 1, "@none: not saved activations", "train --acts @none -o @out" },
        { 1, "@sae: not saved activations", "train --acts @sae -o @out" },
        { 1, "@few: tensor labels (expected I64 [7])", "stats -s @sae --acts @few -o @out" },
        { 1, "@below: image 2: label", "stats -s @sae --acts @below -o @out" },
        { 1, "@above: image 2: label", "stats -s @sae --acts @above -o @out" },
        { 1, "@names: ", "stats -s @sae --acts @names -o @out" },
        { 1, "an SAE of 131072 inputs and 268566528 latents is not possible",
          "train --acts @wide --expansion 2049 -o @out" },
        { 1, "@sae: hook is mlp (expected ear, the value in force)", "eval -s @sae --acts @ear" },
        { 1, "@no-such: cannot be opened", "eval -s @sae --acts @acts --also @no-such" },
        { 0, NULL, NULL } };
    const char *activations = "activations", *labels = "labels";
    cli_poke(cli("@acts"), cli("@nan"), activations, 1000, 0x7fc00000);      /* 17 x 32 an image */
    cli_edit(cli("@acts"), cli("@zero"), (cli_change){ 0 });
    for (size_t d = 0; d < 32; d++)
        cli_poke(cli("@zero"), cli("@zero"), activations, (4 * 17 + 3) * 32 + d, 0);
    cli_edit(cli("@acts"), cli("@flat"), (cli_change){
        .shape_of = activations, .rank = 2, .shape = { 119, 32 } });
    cli_edit(cli("@acts"), cli("@none"), (cli_change){
        .shape_of = activations, .rank = 3, .shape = { 0, 17, 32 } });
    cli_edit(cli("@acts"), cli("@few"), (cli_change){ .shape_of = labels, .rank = 1,
                                                      .shape = { 6 } });
    cli_edit(cli("@acts"), cli("@below"), (cli_change){ .value_of = labels, .element = 2,
                                                        .value = -5 });
    cli_edit(cli("@acts"), cli("@above"), (cli_change){ .value_of = labels, .element = 2,
                                                        .value = 3 });
    cli_edit(cli("@acts"), cli("@ear"), (cli_change)METADATA("hook", "ear"));
    cli_edit(cli("@acts"), cli("@names"), (cli_change)METADATA("class_names", "[\"a\",]"));
    cli_edit(cli("@acts"), cli("@wide"), (cli_change){
        .shape_of = activations, .rank = 3, .shape = { 7, 1, 131072 } });
    cli_all(cases);
}

/* Errors that are found only after the files have been read. */
static void cli_test_late_refusals(void)
{
#define MANY " -s @sae -s @sae -s @sae -s @sae"
    static const cli_case cases[] = {
        { 1, "@scaled: tensor blocks.0.ls1.gamma has no place",
          "extract --quiet -m @scaled @photos -o @out" },
        { 1, "@half_norm: tensor norm_pre.weight is missing", "extract --quiet --layer 1 -m @half_norm @photos -o @out" },
        { 1, "@mute: no tensor text_embeds [classes", "zeroshot --quiet -m @mute @photos" },
        { 1, "@jump: tensor threshold may change", "eval -s @jump --acts @acts" },
        { 2, "-s: given more than 16", "eval" MANY MANY MANY MANY " -s @sae --acts @acts" },
        { 2, "@late.ckpt: a checkpoint of step 4, but this run ends at step 2", "train --acts @acts --latents 8 --steps 2 "
                                                              "--checkpoint @late.ckpt --resume -o @out" },
        { 2, "--batch: 99999999 images of 17 tokens", "train --acts @acts --latents 8 --batch 99999999 -o @out" },
        { 1, "image 0, token 0: activations of 1", "stats -s @huge --acts @acts -o @out" },
        { 1, "@shard: not statistics", "merge @shard -o @out" },
        { 1, "@poor: tensor top_entropy is missing",
          "top --quiet -s @sae -t @poor -m @model @photos -l 0 -o @out" },
        { 1, "@far: statistics of another data set", "top --quiet -s @sae -t @far -m @model @photos -l 0 -o @out" },
        { 1, "@far: statistics of another data set", "atlas --quiet -s @sae -t @far -m @model @photos -o @out" },
        { 0, NULL, NULL } };
#undef MANY
    cli_edit(GOLDEN "clip_timm.safetensors", cli("@scaled"), (cli_change){ .add = "blocks.0.ls1.gamma" });
    cli_edit(GOLDEN "vit_timm.safetensors", cli("@half_norm"), (cli_change){ .add = "norm_pre.bias" });
    cli_edit(GOLDEN "clip_hf.safetensors", cli("@mute"), (cli_change){ .drop = "text_embeds" });
    cli_edit(cli("@sae"), cli("@jump"), (cli_change){ .add = "threshold" });
    cli_edit(cli("@sae"), cli("@huge"), (cli_change){ .value_of = "b_enc", .value = 1e14f });
    cli_edit(cli("@stats"), cli("@shard"), (cli_change)METADATA("shard", "2"));
    cli_edit(cli("@stats"), cli("@poor"), (cli_change){ .drop = "top_entropy" });
    cli_edit(cli("@stats"), cli("@far"), (cli_change){ .value_of = "max_activating_image_indices", .value = 99 });
    cli_works("train --acts @acts --latents 8 --steps 4 --checkpoint @late.ckpt -o @part");
    cli_all(cases);
}

/* --- Images --- */

static void cli_test_pictures(void)
{
    static const struct { const char *text, *bytes; } broken[] = {
        { "not an image", "" }, { "not an image", "hello" }, { "not an image", "P7\nWIDTH 2\n" },
        { "ends before its last sample", "P6\n2 2\n255\n12345678901" },
        { "ends before its last sample", "P6\n2 1\n65535\n12345678901" },
        { "maxval 0", "P6\n2 2\n0\n123456789012" },
        { "its maxval is missing or invalid", "P6\n2 2\n65536\n123456789012" },
        { "0 x 2", "P6\n0 2\n255\n" }, { "its maxval is missing or invalid", "P6\n2 2" },
        { "its width is missing or invalid", "P5\n-2 2\n255\n1234" }, { "its width is missing or invalid", "P5 99999999999 1 255 x" },
        { "at most", "P6\n268435456 2\n255\n" },
        { "ends before its last sample", "P5\n16384 16384\n255\n1234" },
        { "last sample is missing or invalid (expected a PNM number of at most 15)", "P2\n2 2\n15\n1 2 3 16\n" },
        { "a sample of 200 above maxval 100", "P5\n2 2\n100\n12\xc8\x01" },
        { "last sample is missing", "P2\n2 2\n255\n1 2 3" },
        { "last sample is missing", "P3\n1 1\n255\n1 2 x" } };
    char text[100];
    mkdir(cli("@one"), 0777);
    for (size_t i = 0; i < COUNT(broken); i++) {
        put_text(cli("@one/a.ppm"), broken[i].bytes);
        snprintf(text, sizeof text, "@one/a.ppm: *%s", broken[i].text);
        cli_refuses(1, text, i % 2 ? "pack @one/a.ppm -o @out"
                                   : "extract --quiet -m @model @one/a.ppm -o @out");
        snprintf(text, sizeof text, i < 3 ? "@one: no image among the 1 files" : "@one/a.ppm: ");
        cli_refuses(1, text, i % 2 ? "extract --quiet -m @model @one -o @out"
                                   : "train --quiet -m @model @one --latents 8 --steps 1 -o @out");
    }
    remove(cli("@one/a.ppm"));
    static const cli_case cases[] = {
        { 1, "@one: no image among the 0 files", "extract --quiet -m @model @one -o @out" },
        { 1, "@no-such: cannot be opened", "extract --quiet -m @model @no-such -o @out" },
        { 1, "@no-such: cannot be opened", "train --quiet -m @model @no-such -o @out" },
        { 1, "@acts: not an image", "zeroshot --quiet -m @model @acts" },
        { 1, "/dev/null: not an image", "zeroshot --quiet -m @model /dev/null" },
        { 1, "@gone.safetensors: cannot be opened", "pack @gone.safetensors -o @out" },
        { 1, "@p.safetensors: not a packed set", "pack @p.safetensors -o @out" },
        { 1, "again/again: lies too deep", "pack @deep -o @out" },
        { 0, NULL, NULL } };
    cli_copy("@acts", "@p.safetensors");
    mkdir(cli("@deep"), 0777);
    if (symlink(".", cli("@deep/again")) != 0) need("a link");
    cli_all(cases);
    mkdir(cli("@locked"), 0);
    if (access(cli("@locked"), R_OK) == 0) skip("this user may read every folder");
    else cli_refuses(1, "@locked: cannot be opened", "extract --quiet -m @model @locked -o @out");
}

static void cli_test_packed(void)
{
    static const cli_damage damage[] = {
        { "a tensor images U8 [N, H, W, 3]", { .drop = "images" } },
        { "not a packed set", RESHAPED("images", 7, 8, 12, 2) },
        { "not a packed set", RESHAPED("images", 7, 8, 24) },
        { "not a packed set", RESHAPED("images", 0, 8, 8, 3) },
        { "tensor labels (expected I64 [7])",
          RESHAPED("labels", 8) },
        { "tensor labels (expected I64 [7])",
          RESHAPED("labels", 7, 1) },
        { "image 3: label", CHANGED("labels", 3, -2) },
        { "image 3: label 3 (expected one of 3 classes)", CHANGED("labels", 3, 3) },
        { "image 0: label", CHANGED("labels", 0, -1) },
        { "JSON byte 0: expected []", METADATA("class_names", "birds") },
        { "6 file_names for 7 images", METADATA("file_names", "[\"a\",\"b\",\"c\",\"d\",\"e\",\"f\"]") } };
    cli_works("pack --size 8 @photos -o @small.safetensors");
    static const char *const line = "extract --quiet -m @model @bad.safetensors -o @out";
    cli_all_damaged("@small.safetensors", "@bad.safetensors", damage, COUNT(damage), &line, 1);
}

static void cli_test_decoders(void)
{
    char path[4096], text[200];
    snprintf(path, sizeof path, "%s", getenv("PATH") ? getenv("PATH") : "/bin:/usr/bin");
    put_file(cli("@shot.jpg"), "\xff\xd8\xff\xe0 no more", 12);
    put_file(cli("@shot.png"), "\x89PNG\r\n\x1a\n no more", 16);
    put_file(cli("@shot.gif"), "GIF89a no more", 14);
    setenv("PATH", "/no-such", 1);
    cli_refuses(1, "@shot.jpg: cannot start 'djpeg' (expected a decoder of JPEG: Debian's package "
                "libjpeg-turbo-progs has one)",
                "extract --quiet -m @model @shot.jpg -o @out");
    cli_refuses(1, "@shot.png: cannot start 'pngtopnm' *Debian's package netpbm",
                "extract --quiet -m @model @shot.png -o @out");
    cli_refuses(1, "package imagemagick", "pack --skip-bad @shot.gif -o @out");
    setenv("PATH", path, 1);
    static const struct { const char *decoder, *text; } decoders[] = {
        { "no-such-decoder --fast",
          "cannot start 'no-such-decoder'" },
        { "/dev/null", "cannot start '/dev/null'" },
        { "", "cannot start ''" },
        { "false", "false ended with status 1: no message" },
        { "true", "status 0: no message" },
        { "ls /no-such-folder", "/no-such-folder" }, { "echo garbage", "not a PNM image" },
        { "printf P6\\n2\\t2\\n255\\n123", "ends before its last sample" } };
    for (size_t i = 0; i < COUNT(decoders); i++) {
        setenv("SAECLIP_DECODER", decoders[i].decoder, 1);
        snprintf(text, sizeof text, "@shot.jpg: *%s", decoders[i].text);
        cli_refuses(1, text, "extract --quiet -m @model @shot.jpg -o @out");
    }
    setenv("SAECLIP_DECODER", cli("cat @photos/cats/a.ppm"), 1);
    cli_works("extract --quiet -m @model @shot.jpg -o @decoded");
    cli_works("extract --quiet -m @model @photos/cats/a.ppm -o @direct");
    unsetenv("SAECLIP_DECODER");
    cli_run("compare @decoded @direct");
    check(strstr(ran.out, "the same bits") != NULL, "a decoder's pixels give another result");
}

/* --- Lists, folders, packed sets --- */

static void cli_test_lists(void)
{
    static const struct { const char *text, *list; } broken[] = {
        { "a list without an image", "" }, { "a list without an image", "# nothing\n\n\r\n" },
        { "line 1: invalid label", "a.ppm\tx\n" },
        { "line 2: invalid label", "# a\na.ppm\t-1\n" },
        { "line 1: invalid label", "a.ppm\t1.5\n" },
        { "line 1: invalid label", "a.ppm\t\tb\n" },
        { "line 2: invalid label", "a.ppm\t0\nb.ppm\t1 2\n" },
        { "line 1: invalid label", "a.ppm\t99999999999999999999\n" },
        { "line 1: invalid label", "a.ppm\t3000000000\n" },
        { "line 2: labels on some lines only", "a.ppm\t1\nb.ppm\n" },
        { "line 3: labels on some lines only", "a.ppm\n\nb.ppm\t1\n" } };
    static const char line[] = "extract --quiet -m @model @bad.txt -o @out";
    char text[6000];
    for (size_t i = 0; i < COUNT(broken); i++) {
        snprintf(text, sizeof text, "@bad.txt: *%s", broken[i].text);
        put_text(cli("@bad.txt"), broken[i].list);
        cli_refuses(1, text, line);
    }
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    put_text(cli("@bad.txt"), text);
    cli_refuses(1, "@bad.txt: line 1: too long", line);
    put_text(cli("@bad.txt"), "cli_photos/birds/a.ppm\nno-such.ppm\n");
    cli_refuses(1, "no-such.ppm: cannot be opened", line);
    put_text(cli("@bad.txt"), "cli_photos/birds/a.ppm\t2\ncli_photos/birds/b.ppm\t20\n");
    cli_refuses(1, "image 1 cli_photos/birds/b.ppm: not in one of the model's 20 classes",
                "zeroshot --quiet -m @model @bad.txt");
    put_text(cli("@bad.txt"), "cli_photos/birds/a.ppm\n");
    cli_refuses(1, "image 0 cli_photos/birds/a.ppm", "zeroshot --quiet -m @model @bad.txt");
}

/* Whether two files hold the same activations, bit for bit; their metadata may differ. */
static int cli_same_activations(const char *a, const char *b)
{
    sc_safetensors one, two;
    if (sc_safetensors_open(&one, cli("%s", a)) != SC_OK) return 0;
    if (sc_safetensors_open(&two, cli("%s", b)) != SC_OK) return 0;
    const sc_tensor *x = sc_tensor_find(&one, "activations");
    const sc_tensor *y = sc_tensor_find(&two, "activations");
    int same = x && y && x->bytes == y->bytes && memcmp(x->data, y->data, x->bytes) == 0;
    sc_safetensors_close(&one);
    sc_safetensors_close(&two);
    return same;
}

/* One data set given in five ways. */
static void cli_test_sources(void)
{
    cli_works("extract --quiet -m @model --layer 2 --hook mlp @photos/ -o @again");
    check(cli_same("@acts", "@again"), "the same folder with a slash gives other bytes");
    cli_works("extract --quiet -m @model --layer 2 --hook mlp @list.txt -o @again");
    check(cli_same_activations("@acts", "@again"), "a list gives other activations");
    cli_works("pack --quiet --size 40 @photos -o @packed.safetensors");
    cli_works("extract --quiet -m @model --layer 2 --hook mlp @packed.safetensors -o @again");
    check(cli_same("@acts", "@again"), "a packed set gives other bytes than its folder");
    cli_works("train --quiet --acts @acts --latents 8 --steps 9 --batch 4 -o @one_sae");
    cli_works("train --quiet -m @model --layer 2 --hook mlp @photos --latents 8 --steps 9 "
              "--batch 4 -o @other_sae");
    check(cli_same("@one_sae", "@other_sae"), "photos train another SAE than their activations");
    cli_works("stats --quiet -s @sae -m @model @photos -o @again");
    check(cli_same("@stats", "@again"), "photos give other statistics than their activations");
}

static size_t cli_images_in(const char *path)
{
    sc_safetensors file;
    size_t images = 0;
    if (sc_safetensors_open(&file, cli("%s", path)) != SC_OK) return 0;
    const sc_tensor *t = sc_tensor_find(&file, "activations");
    const char *text = sc_metadata_find(&file, "images");
    images = t ? t->shape[0] : text ? strtoul(text, NULL, 10) : 0;
    sc_safetensors_close(&file);
    return images;
}

static size_t cli_count(const char *text, const char *part)
{
    size_t count = 0;
    for (; (text = strstr(text, part)) != NULL; text += strlen(part)) count++;
    return count;
}

static void cli_test_skipping(void)
{
    put_text(cli("@photos/cats/aa.ppm"), "P6\n2 2\n255\n123");
    put_text(cli("@photos/cats/notes.md"), "not a picture\n");
    cli_refuses(1, "@photos/cats/aa.ppm: ", "extract --quiet -m @model @photos -o @out");
    cli_refuses(1, "@photos/cats/aa.ppm: ",
                "train --quiet -m @model @photos --latents 8 --steps 30 --batch 4 -o @out");
    cli_works("extract --skip-bad -m @model --layer 2 --hook mlp @photos -o @again");
    check(cli_count(ran.err, "aa.ppm") == 1, "--skip-bad names a bad image not once but: %s",
          ran.err);
    check(strstr(ran.err, "1 files passed over") != NULL, "other files are not counted: %s",
          ran.err);
    check(cli_same_activations("@again", "@acts"), "--skip-bad changes the good images");
    cli_works("stats --skip-bad -s @sae -m @model @photos -o @bad_stats");
    check(cli_count(ran.err, "aa.ppm") == 1, "--skip-bad names a bad image not once but: %s",
          ran.err);
    check(cli_images_in("@bad_stats") == 7, "statistics over %zu images",
          cli_images_in("@bad_stats"));
    cli_works("train --skip-bad -m @model @photos --latents 8 --steps 30 --batch 4 -o @skipped "
              "--threads 2");
    check(cli_count(ran.err, "aa.ppm") == 1, "--skip-bad names a bad image not once but: %s",
          ran.err);
    cli_works("train --quiet --skip-bad -m @model @photos --latents 8 --steps 30 --batch 4 "
              "-o @again --threads 1");
    check(cli_same("@skipped", "@again"), "a bad image makes training depend on the threads");
    cli_works("train --quiet --skip-bad -m @model @photos --latents 8 --steps 11 --batch 4 "
              "-o @again --checkpoint @bad_ckpt");
    cli_works("train --quiet --skip-bad -m @model @photos --latents 8 --steps 30 --batch 4 "
              "-o @again --checkpoint @bad_ckpt --resume");
    check(cli_same("@skipped", "@again"), "with a bad image, resumed, another SAE");
    cli_works("extract --quiet --skip-bad -m @model --limit 4 @photos -o @again");
    check(cli_images_in("@again") == 4, "--limit 4 takes %zu", cli_images_in("@again"));
    cli_works("extract --quiet --skip-bad -m @model --limit 5 @photos -o @again");
    check(cli_images_in("@again") == 4, "of the first 5, one of them bad, %zu are taken",
          cli_images_in("@again"));
    cli_works("extract --quiet -m @model --limit 99 --skip-bad @photos -o @again");
    check(cli_images_in("@again") == 7, "--limit 99 takes %zu of 7", cli_images_in("@again"));
    put_text(cli("@photos/birds/A.ppm"), "P6\n2 2\n255\n123");   /* the first shard's only image */
    cli_works("stats --quiet --skip-bad -s @sae -m @model @photos -o @again");
    char shards[1000] = "";
    for (int i = 9; i > 0; i--) {
        works("%s --shard %d/9 -o %s", cli("stats --quiet --skip-bad -s @sae -m @model @photos"), i,
              cli("@shard%d", i));
        sprintf(shards + strlen(shards), "@shard%d ", i);
    }
    works("%s -o %s", cli("merge %s", shards), cli("@merged"));
    check(cli_same("@merged", "@again"), "shards of bad images alone do not merge");
    remove(cli("@photos/birds/A.ppm"));
    mkdir(cli("@allbad"), 0777);
    put_text(cli("@allbad/a.ppm"), "P6\n2 2\n255\n123");
    put_text(cli("@allbad/b.ppm"), "P6\n2 2\n255\n123");
    cli_refuses(1, "@allbad/b.ppm: the file ends before its last sample; none of 2 images",
                "extract --quiet --skip-bad -m @model @allbad -o @out");
    cli_refuses(1, "; none of 2 images can be read",
                "train --quiet --skip-bad -m @model @allbad --latents 8 --epochs 9 -o @out");
    remove(cli("@photos/cats/aa.ppm"));
    remove(cli("@photos/cats/notes.md"));
    cli_works("stats --quiet -s @sae --limit 3 --acts @acts -o @again");
    check(cli_images_in("@again") == 3, "--limit 3 of activations takes %zu",
          cli_images_in("@again"));
}

/* --- Outputs --- */

static void cli_test_outputs(void)
{
    static const char *const lines[] = {
        "pack @photos -o %s", "extract --quiet -m @model @photos -o %s",
        "train --acts @acts --latents 8 --steps 1 -o %s", "encode -s @sae --acts @acts -o %s",
        "stats -s @sae --acts @acts -o %s" };
    char line[500], text[500];
    put_text(cli("@file"), "a file\n");
    for (size_t i = 0; i < COUNT(lines); i++) {
        const char *places[] = { "@file/x", "@no-such/x", "@photos" };
        for (int p = 0; p < 3; p++) {
            snprintf(line, sizeof line, lines[i], places[p]);
            snprintf(text, sizeof text, "%s: cannot be written", places[p]);
            cli_refuses(1, text, line);
        }
        snprintf(line, sizeof line, lines[i], "/dev/full");
        if (exists("/dev/full"))
            cli_refuses(1, "/dev/full: cannot be written: No space left", line);
        snprintf(line, sizeof line, lines[i], "@out");       /* a disk that fills up */
        snprintf(text, sizeof text, i == 3 ? "a temporary file cannot" : "@out: cannot");
        with.file_bytes = 600;
        cli_run("%s", line);
        with.file_bytes = 0;
        check(cli_said(1, cli("%s be written", text)), "%s, disk full: %d %s", line, ran.status,
              ran.err);
        check(!exists(cli("@out")) && !exists(cli("@out.tmp")), "%s, disk full: output is left",
              line);
    }
    char list[600] = "";                                     /* image 16, which is missing, is in the second batch */
    for (int i = 0; i < 16; i++) strcat(list, "cli_photos/cats/a.ppm\n");
    put_text(cli("@full.txt"), strcat(list, "missing.ppm\n"));
    with.file_bytes = 600;
    cli_run("encode --dense -s @sae -m @model @full.txt -o @out");
    with.file_bytes = 0;
    check(cli_said(1, "a temporary file cannot be written"), "encode goes on when the disk is full: %s", ran.err);
    static const cli_case cases[] = {
        { 1, "@file/x/latent_1_0_a.ppm.pgm: cannot be written",
          "mask --quiet -s @sae -m @model @photos -l 1 -o @file/x" },
        { 1, "@file/x/latent_1.ppm: cannot be written",
          "top --quiet -s @sae -t @stats -m @model @photos -l 1 -o @file/x" },
        { 1, "@file/latent_1_0_a.ppm.pgm: cannot be written",
          "mask --quiet -s @sae -m @model @photos -l 1 -o @file" },
        { 1, "@file/latent_1.ppm: cannot be written",
          "top --quiet -s @sae -t @stats -m @model @photos -l 1 -o @file" },
        { 1, "@file/log: cannot be written",
          "train --acts @acts --latents 8 --steps 1 --log @file/log -o @out" },
        { 1, "@file/c: cannot be written",
          "train --acts @acts --latents 8 --steps 3 --checkpoint @file/c -o @out" },
        { 0, NULL, NULL } };
    cli_all(cases);
    check(holds(cli("@file"), "a file\n"), "a file where a folder was expected is not kept");
    if (exists("/dev/full"))
        cli_refuses(1, "/dev/full: cannot be written: No space left",
                    "train --acts @acts --latents 8 --steps 1 --log /dev/full -o @out");
}

/* A run that fails keeps an older file of the output's name. A .tmp that a killed run left is reused. */
static void cli_test_keeping(void)
{
    put_text(cli("@kept"), "what was there before");
    cli_run("train --acts @zero --latents 8 --batch 7 --steps 3 -o @kept");
    check(ran.status == 1, "a token of 0 is taken");
    cli_run("extract --quiet -m @loud --layer 3 @photos -o @kept");
    check(ran.status == 1, "infinite activations are written");
    with.file_bytes = 600;
    cli_run("stats -s @sae --acts @acts -o @kept");
    with.file_bytes = 0;
    check(ran.status == 1 && holds(cli("@kept"), "what was there before"),
          "an older file is not kept");
    check(!exists(cli("@kept.tmp")), "a failed run leaves @kept.tmp");
    static char stale[300000];                   /* more than the next run writes */
    memset(stale, 'x', sizeof stale);
    put_file(cli("@kept.tmp"), stale, sizeof stale);
    cli_works("extract --quiet -m @model --layer 2 --hook mlp @photos -o @kept");
    check(cli_same("@kept", "@acts") && !exists(cli("@kept.tmp")), "a stale .tmp does harm");
    put_file(cli("@kept.tmp"), stale, sizeof stale);
    cli_works("stats -s @sae --acts @acts -o @kept");
    check(cli_same("@kept", "@stats") && !exists(cli("@kept.tmp")), "a stale .tmp does harm");
    int fd = open(cli("@kept.tmp"), O_RDWR | O_CREAT, 0600);
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    if (fd < 0 || fcntl(fd, F_SETLK, &lock) != 0) need("a lock");
    cli_run("stats -s @topk --acts @acts -o @kept");
    check(cli_said(1, cli("@kept: cannot be written: another process is writing it")),
          "two write one file: %d %s", ran.status, ran.err);
    check(exists(cli("@kept.tmp")) && cli_same("@kept", "@stats"), "another's .tmp is taken away");
    close(fd);
    remove(cli("@kept.tmp"));
}

/* Standard output full or closed; standard input and standard error closed. */
static void cli_test_streams(void)
{
    static const char *const lines[] = {
        "info", "info --quiet @model", "compare @acts @acts", "eval -s @sae --acts @acts",
        "eval -s @sae --acts @acts --format json", "eval -s @sae --acts @acts --format csv",
        "zeroshot --quiet -m @model @list.txt", "zeroshot --quiet -m @model @list.txt --format json",
        "--help", "--version", "train --help" };
    for (size_t i = 0; i < COUNT(lines); i++) {
        with.output = "/dev/full";
        if (exists(with.output)) {
            cli_run("%s", lines[i]);
            check(cli_said(1, "standard output: cannot be written: No space left"),
                  "%s, output full: %d %s", lines[i], ran.status, ran.err);
        }
        with.output = "|";
        cli_run("%s", lines[i]);
        check(ran.status == -SIGPIPE && ran.err_count == 0, "%s, nobody reads: %d %s", lines[i], ran.status,
              ran.err);
        with.output = NULL;
        with.closed = 1 << 1;
        cli_run("%s", lines[i]);
        check(cli_said(1, "standard output: cannot be written"), "%s, output closed: %d %s",
              lines[i], ran.status, ran.err);
        with.closed = 0;
    }
    with.closed = 7;             /* what is opened must not become stream 0, 1 or 2 */
    cli_run("stats -s @sae --acts @acts -o @again");
    check(ran.status == 0 && cli_same("@again", "@stats"), "closed streams: status %d", ran.status);
    cli_run("extract -m @model --layer 2 --hook mlp @photos -o @again");
    check(ran.status == 0 && cli_same("@again", "@acts"), "closed streams: status %d", ran.status);
    with.closed = 0;
}

static void cli_test_memory(void)
{
#ifdef SANITIZED
    skip("memory cannot be limited under a sanitizer");
#else
    with.memory = (size_t)400 << 20;
    cli_works("train --acts @acts --latents 8 --steps 1 -o @again --threads 2");
    cli_refuses(1, "out of memory",
                "train --acts @acts --latents 4000000 --steps 1 -o @out --threads 2");
    cli_refuses(1, "out of memory",
                "train --acts @acts --latents 8 --batch 1000000 --steps 1 -o @out --threads 2");
    cli_refuses(1, "out of memory", "pack @photos --size 16000 -o @out --threads 2");
    put_text(cli("@huge.ppm"), "P6\n16000 16000\n255\n");      /* not a fault of the image */
    if (truncate(cli("@huge.ppm"), 19 + 3 * 16000 * 16000) != 0) need("a sparse file");
    put_text(cli("@bad.txt"), "cli_huge.ppm\ncli_photos/birds/a.ppm\n");
    cli_refuses(1, "out of memory", "pack --skip-bad @bad.txt -o @out --threads 2");
    remove(cli("@huge.ppm"));
    with.memory = 0;
#endif
}

/* Headers that promise a petabyte, and images without pixels, are refused without allocating much. */
static void cli_test_claims(void)
{
    static const char claim[] =
        "{\n\"__metadata__\":\n{},\n\"%s\":\n{\"dtype\":\"%s\",\n\"shape\":\n[%s],\n"
        "\"data_offsets\":[0,%s]}\n}";
    static const struct { const char *name, *dtype, *shape, *bytes, *text, *line; } claims[] = {
        { "activations", "F32", "250000000000,1,1000", "1000000000000000", "of 8",
          "train --acts @claim --latents 8 -o @out --threads 2" },
        { "activations", "F32", "250000000000,0,1000", "0", "belong to no tensor",
          "train --acts @claim --latents 8 -o @out --threads 2" },
        { "W_enc", "F32", "1000000,250000000", "1000000000000000", "of 8",
          "eval -s @claim --acts @acts --threads 2" },
        { "images", "U8", "1,18257418,18257418,3", "1000000000000000", "by its dtype and shape",
          "pack @claim.safetensors -o @out --threads 2" },
        { "max_activating_image_indices", "I64", "24,5000000000000", "960000000000000", "of 8",
          "top -s @sae -t @claim -m @model @photos -l 1 -o @out --quiet --threads 2" },
        { "blocks.0.norm1.weight", "F64", "2305843009213693952", "18446744073709551615", "too large",
          "info @claim" } };
#ifndef SANITIZED
    with.memory = (size_t)100 << 20;
#endif
    for (size_t i = 0; i < COUNT(claims); i++) {
        unsigned char file[1000] = { 0 };
        int length = snprintf((char *)file + 8, sizeof file - 8, claim, claims[i].name,
                              claims[i].dtype, claims[i].shape, claims[i].bytes);
        file[0] = (unsigned char)length;
        file[1] = (unsigned char)(length >> 8);
        put_file(cli("@claim"), file, 16 + (size_t)length);
        put_file(cli("@claim.safetensors"), file, 16 + (size_t)length);
        cli_refuses(1, SIZE_MAX == UINT32_MAX ? "this machine can address" : claims[i].text,
                    claims[i].line);
    }
    put_text(cli("@claim.ppm"), "P6 16384 16384 255\n");
    cli_refuses(1, "file ends before", "pack @claim.ppm -o @out --threads 2");
    put_text(cli("@claim.ppm"), "P6 16384 16385 255\n");
    cli_refuses(1, "at most 268435456 pixels", "pack @claim.ppm -o @out --threads 2");
    put_text(cli("@claim.ppm"), "P5 99999999999999999999 1 255\n");
    cli_refuses(1, "its width is missing or invalid (expected a PNM number of at most 268435456)", "pack @claim.ppm -o @out --threads 2");
    with.memory = 0;
}

/* Whether a text consists of printable characters and newlines. */
static int cli_harmless(const char *text)
{
    uint32_t c;
    for (size_t length; *text; text += length) {
        length = utf8_length(text, &c);
        if (length == 0 || (c < ' ' && c != '\n') || (c >= 0x7f && c < 0xa0)) return 0;
        if ((c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069)) return 0;
    }
    return 1;
}

/* Escapes that a terminal would obey, in names that come from anywhere. */
static void cli_test_escapes(void)
{
    static const char *const names[] = { "a\033[31mb.ppm", "a\x9b" "31mb.ppm",
                                         "a\xc2\x9b" "31m.ppm",
                                         "a\nb.ppm", "a\rb.ppm", "a\177.ppm" };
    for (size_t i = 0; i < COUNT(names); i++) {
        mkdir(cli("@odd"), 0777);
        put_text(cli("@odd/%s", names[i]), "P6\n2 2\n255\n123");
        cli_refuses(1, "@odd/a", "extract --quiet -m @model @odd -o @out");
        check(cli_harmless(ran.err), "name %zu reaches the terminal as it is: %s", i, ran.err);
        remove_tree(cli("@odd"));
    }
    put_text(cli("@odd"), "");
    cli_copy("@sae", "@od\033[31md");
    static const char *const lines[] = { "eval -s @od\033[31md --acts @acts",
        "eval -s @od\033[31md --acts @acts --format csv",
        "eval -s @od\033[31md --acts @acts --format csv",
        "eval -s @od\033[31md --acts @acts --format json", "info @od\033[31md",
        "compare @od\033[31md @acts" };
    for (size_t i = 0; i < COUNT(lines); i++) {
        cli_run("%s", lines[i]);
        check(ran.status == (i == 5), "%s: status %d, %s", lines[i], ran.status, ran.err);
        check(!strchr(ran.out, '\033') && !strchr(ran.err, '\033'), "line %zu prints an escape", i);
    }
}

/* A long name does not push the reason out of the line. */
static void cli_test_long_names(void)
{
    char line[2100] = "info ";
    memset(line + 5, 'a', 2000);
    strcpy(line + 2005, "/b");
    run("%s", line);
    char reason[200];
    snprintf(reason, sizeof reason, "/b: cannot be opened: %s\n", strerror(ENAMETOOLONG));
    check(ran.status == 1 && strstr(ran.err, reason), "a long name: %d, %s",
          ran.status, ran.err);
}

/* Names that do harm where they are not escaped: markup, quotes, formulas, options, commands, paths. */
static const char *const cli_odd_names[] = {
    "a\"b',c.ppm", "<script src=x>", "&lt;|pipe|`tick`[x](y)*", "-rf", "--help",
    "$(touch pwned);touch pwned|touch pwned", "`touch pwned`", "..", "new\nline\r\n# list",
    "\033[2J\033]0;title\007\302\2331m\177", "\xff\xfe\2331m latin", "=1+1,@x", "%s%n%d\\n", "\t\tx",
    "a\xe2\x80\xaegpj.exe\xe2\x80\xac", "\xe2\x81\xa6left\xe2\x81\xa9 \xe2\x80\xa7\xe2\x80\xaf\xe2\x81\xa5" };

/* The table of one SAE under an odd name, as text, CSV and JSON. */
static void cli_table_of(const char *name)
{
    static char path[600];
    char *arguments[] = { (char *)(uintptr_t)program(), "eval", "-s", path, "--acts", "", "--format",
                          "", NULL };
    static const char *const kinds[] = { "text", "csv", "json" };
    snprintf(path, sizeof path, "%s", cli("@odd.%s", name));
    cli_copy("@sae", "@odd.sae");
    if (strchr(name, '/') || rename(cli("@odd.sae"), path) != 0) return;
    arguments[5] = (char *)(uintptr_t)cli("@acts");
    for (int i = 0; i < 3; i++) {
        arguments[7] = (char *)(uintptr_t)kinds[i];
        check(run_list(arguments) == 0 && cli_harmless(ran.out) && cli_harmless(ran.err),
              "eval --format %s of '%s': status %d %s %s", kinds[i], name, ran.status, ran.out,
              ran.err);
        static const size_t expected[] = { EVAL_COLUMNS, 2, 3 };     /* lines of each format */
        size_t quotes = cli_count(ran.out, "\""), lines = cli_count(ran.out, "\n");
        check(lines == expected[i], "%s of '%s' has %zu lines", kinds[i], name, lines);
        check(i != 1 || quotes % 2 == 0, "CSV of '%s' has %zu quotes", name, quotes);
    }
    char *value = strstr(ran.out, "\"sae\": "), *end = value ? strstr(value, ", \"data\":") : NULL;
    char **list = NULL;
    size_t count = 0;
    if (end) {
        strcpy(end, "]");
        memset(value, ' ', 6);
        value[6] = '[';
    }
    int read = end && json_string_array(value, "JSON", &list, &count) == SC_OK && count == 1;
    check(read && (*name == '\xff' || strcmp(list[0], path) == 0), "JSON has '%s' for '%s'",
          read ? list[0] : "nothing", path);
    free(list);
    char *arguments2[] = { arguments[0], "info", path, NULL };
    check(run_list(arguments2) == 0 && cli_harmless(ran.out), "info of '%s'", name);
    char *arguments3[] = { arguments[0], "compare", path, arguments[5], NULL };
    check(run_list(arguments3) == 1 && cli_harmless(ran.out) && cli_harmless(ran.err),
          "compare of '%s'", name);
    remove(path);
}

/* Odd names of classes and images: a packed set keeps them, except those that are not UTF-8, and files
 * named after them are written into the output folder. */
static void cli_test_names(void)
{
    char place[400], odd[600];
    sc_images folder_set, packed_set;
    size_t same = 0, images = 0;
    struct dirent *entry;
    for (size_t i = 0; i < COUNT(cli_odd_names); i++) cli_table_of(cli_odd_names[i]);
    mkdir(cli("@oddnames"), 0777);
    for (size_t i = 0; i < COUNT(cli_odd_names); i++) {
        if (strchr(cli_odd_names[i], '/') || strcmp(cli_odd_names[i], "..") == 0) continue;
        snprintf(odd, sizeof odd, "%s/%s", cli("@oddnames"), cli_odd_names[i]);
        if (mkdir(odd, 0777) != 0) need("%s", odd);
        snprintf(odd + strlen(odd), sizeof odd - strlen(odd), "/%s", cli_odd_names[i]);
        cli_picture(odd, (unsigned)i + 1, 30, 30);
        images++;
    }
    snprintf(place, sizeof place, "%s", cli("@oddnames"));
    with.folder = place;
    cli_run("pack . -o ../cli_oddnames.safetensors --size 16");
    check(ran.status == 0 && cli_harmless(ran.err), "odd names are not packed: %s", ran.err);
    if (sc_images_open(&folder_set, place, 0) != SC_OK
        || sc_images_open(&packed_set, cli("@oddnames.safetensors"), 0) != SC_OK) need("%s", sc_error());
    check(packed_set.count == images && packed_set.classes == images, "%zu images, %zu classes",
          packed_set.count, packed_set.classes);
    for (size_t i = 0; i < packed_set.count && i < folder_set.count; i++)
        same += strcmp(packed_set.image[i].name, folder_set.image[i].name) == 0
                && strcmp(packed_set.class_name[i], folder_set.class_name[i]) == 0;
    check(same == images - 1, "%zu of %zu names are the same again; one is no UTF-8", same, images);
    sc_images_close(&folder_set);
    sc_images_close(&packed_set);
    cli_run("info ../cli_oddnames.safetensors");
    check(ran.status == 0 && cli_harmless(ran.out), "info shows odd names: %s", ran.out);
    cli_run("mask --quiet -s @sae -m @model . -l 0 -o ../cli_out");
    check(ran.status == 0, "masks of odd names: %s", ran.err);
    DIR *out = opendir(cli("@out"));
    for (images = 0; out && (entry = readdir(out)) != NULL;) {
        if (entry->d_name[0] == '.') continue;
        images += strncmp(entry->d_name, "latent_0_", 9) == 0 && strspn(entry->d_name,
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == strlen(entry->d_name);
    }
    if (out) closedir(out);
    check(images == 2 * same + 2, "%zu masks and overlays under harmless names", images);
    remove_tree(cli("@out"));
    cli_edit(cli("@oddnames.safetensors"), cli("@paths.safetensors"), (cli_change){
        .key = "file_names", .text = "[\"../../cli_a\",\"/tmp/cli_b\",\"\",\"..\",\"a/\",\"-\",\"f\","
        "\"g\",\"h\",\"i\",\"j\",\"k\",\"l\",\"m\",\"n\"]" });
    cli_works("mask --quiet -s @sae -m @model @paths.safetensors -l 0 -o @out");
    check(exists(cli("@out/latent_0_0_cli_a.pgm")) && exists(cli("@out/latent_0_1_cli_b.ppm"))
          && exists(cli("@out/latent_0_3_...pgm")) && !exists(in_folder("../cli_a.pgm"))
          && !exists("/tmp/cli_b.pgm"), "a path in a packed set's names leads out of the folder");
    remove_tree(cli("@out"));
    run("%s", "pack --size 4 -o ../cli_out ./--help");
    check(ran.status == 0 && exists(cli("@out")), "a folder called --help: %d %s", ran.status, ran.err);
    setenv("SAECLIP_DECODER", "cat", 1);         /* a shell would run what these names say */
    for (size_t i = 5; i < 7; i++) {
        snprintf(odd, sizeof odd, "%s/shell", place);
        mkdir(odd, 0777);
        snprintf(odd, sizeof odd, "%s/shell/%s.jpg", place, cli_odd_names[i]);
        put_file(odd, "\xff\xd8\xff", 3);
    }
    run("%s", "pack . -o ../cli_out --skip-bad --limit 30");
    check(ran.status == 0 && !exists(cli("@oddnames/pwned")), "a name was run: %d %s", ran.status, ran.err);
    unsetenv("SAECLIP_DECODER");
    with.folder = NULL;
    remove(cli("@out"));
    remove_tree(cli("@oddnames"));
}

/* --- Training: steps, checkpoints, signals --- */

static const char cli_recipe[] = "train --acts @acts --latents 24 --batch 3 --warmup 10 --lr 1e-2 "
                                 "--dead-window 3 --ghost --b-dec geomedian --b-dec-images 5 ";

/* A log without its last column, the seconds. */
static const char *cli_log(const char *name)
{
    static char texts[2][65536];
    static int turn;
    const char *from = get_file(cli("%s", name), NULL);
    char *to = texts[turn = !turn];
    size_t used = 0;
    while (from && *from && used + 600 < sizeof texts[0]) {
        size_t length = strcspn(from, "\n"), keep = length;
        while (keep > 0 && from[keep - 1] != ',') keep--;
        memcpy(to + used, from, keep);
        used += keep;
        to[used++] = '\n';
        from += length + (from[length] == '\n');
    }
    to[used] = '\0';
    return to;
}

static void cli_test_steps(void)
{
    cli_works("train --acts @acts --latents 24 --steps 0 -o @zero_steps");
    cli_works("train --acts @acts --latents 24 --epochs 0 -o @again --log @log");
    check(cli_same("@zero_steps", "@again"), "--epochs 0 is not --steps 0");
    check(cli_count(cli_log("@log"), "\n") == 1, "the log of no steps has rows");
    cli_works("train --acts @acts --init @zero_steps --steps 3 --batch 4 -o @one_sae");
    cli_works("eval -s @zero_steps --acts @acts");
    sc_sae initial, file;
    int same = sc_sae_open(&file, cli("@zero_steps")) == SC_OK;
    same = sc_sae_init(&initial, 32, 24, 42) == SC_OK && same;
    same = same && memcmp(initial.W_enc, file.W_enc, 24 * 32 * sizeof(float)) == 0
           && memcmp(initial.W_dec, file.W_dec, 24 * 32 * sizeof(float)) == 0;
    check(same, "--steps 0 does not write the initial SAE");
    sc_sae_close(&initial);
    sc_sae_close(&file);
    cli_works("train --acts @acts --latents 8 --batch 4 --epochs 2 -o @again --log @log");
    check(cli_count(cli_log("@log"), "\n") == 1 + 4,
          "2 epochs of 7 images by 4 are %zu steps, not 4",
          cli_count(cli_log("@log"), "\n") - 1);
    check(strstr(cli_log("@log"), "\n4,16,272,") != NULL, "step 4 is not after 16 images");
    cli_works("train --acts @acts --latents 8 --batch 20 --steps 2 -o @again --log @log");
    check(strstr(cli_log("@log"), "\n2,40,680,") != NULL, "batches beyond one epoch are not full");
}

/* With a learning rate of 0 and batches of one image, the MSE identifies the image. */
static void cli_test_epochs(void)
{
    static const char *const variants[] = { "--init @zero8 --order sequential", "--init @zero8",
                                            "--init @zero8 --seed 1" };
    char image[3][2 * CLI_PICTURES][24] = { { "" } };
    cli_works("train --acts @acts --latents 8 --steps 1 --lr 0 -o @zero8");
    for (int v = 0; v < 3; v++) {
        cli_works("train --acts @acts --lr 0 --batch 1 --epochs 2 -o @again --log @log %s",
                  variants[v]);
        const char *row = cli_log("@log");
        for (int i = 0; i < 2 * CLI_PICTURES && (row = strchr(row, '\n')) != NULL; i++) {
            const char *mse = ++row;
            for (int comma = 0; comma < 5 && mse; comma++)
                if ((mse = strchr(mse, ',')) != NULL) mse++;
            if (mse) snprintf(image[v][i], 24, "%.*s", (int)strcspn(mse, ","), mse);
        }
    }
    for (int k = 0; k < 6; k++) {                /* every epoch takes each image once */
        unsigned seen = 0;
        for (int i = 0; i < CLI_PICTURES; i++)
            for (int j = 0; j < CLI_PICTURES; j++)
                if (strcmp(image[k / 2][k % 2 * CLI_PICTURES + i], image[0][j]) == 0)
                    seen |= 1u << j;
        check(seen == (1u << CLI_PICTURES) - 1, "run %d, epoch %d takes not every image", k / 2,
              k % 2);
    }
    size_t epoch = sizeof image[0] / 2;
    check(memcmp(image[0], image[0][CLI_PICTURES], epoch) == 0, "the sequential order changes");
    check(memcmp(image[1], image[1][CLI_PICTURES], epoch) != 0, "two epochs have one order");
    check(memcmp(image[1], image[0], epoch) != 0, "the order is not shuffled");
    check(memcmp(image[1], image[2], epoch) != 0, "two seeds give one order");
}

static void cli_test_resume(void)
{
    char line[1200];
    const char *recipe = cli_recipe;
    cli_works("%s--steps 30 -o @whole_sae --log @whole.csv", recipe);
    cli_works("%s--steps 12 -o @part --log @part.csv --checkpoint @ckpt --checkpoint-every 5",
              recipe);
    check(exists(cli("@ckpt")) && exists(cli("@ckpt.prev")),
          "there is no checkpoint, or none before");
    works("info %s", cli("@ckpt"));
    check(strstr(ran.out, "checkpoint") != NULL && strstr(ran.out, "steps = 12") != NULL,
          "info does not know the checkpoint of step 12: %s", ran.out);
    cli_copy("@ckpt", "@ckpt12");
    cli_copy("@ckpt.prev", "@ckpt10");
    cli_works("%s--steps 30 -o @part --log @part.csv --checkpoint @ckpt --resume --threads 1",
              recipe);
    check(cli_same("@part", "@whole_sae"), "a resumed run ends with another SAE");
    check(strcmp(cli_log("@part.csv"), cli_log("@whole.csv")) == 0, "a resumed run's log differs");
    if (symlink(cli("@ckpt12"), cli("@led")) != 0) need("a link");
    cli_copy("@ckpt12", "@was12");
    cli_works("%s--steps 13 -o @part --checkpoint @led --resume", recipe);
    check(cli_same("@led.prev", "@was12") && !cli_same("@led", "@was12"),
          "a checkpoint that a link leads to is lost");
    cli_copy("@was12", "@ckpt12");
    cli_copy("@ckpt10", "@ckpt");                /* as if killed after step 12, the log ahead */
    cli_works("%s--steps 30 -o @part --log @part.csv --checkpoint @ckpt --resume", recipe);
    check(cli_same("@part", "@whole_sae"), "a second resumed run ends with another SAE");
    check(strcmp(cli_log("@part.csv"), cli_log("@whole.csv")) == 0, "a log is not cut back");
    cli_works("%s--steps 30 -o @part --log @part.csv --checkpoint @ckpt --resume", recipe);
    check(cli_same("@part", "@whole_sae"), "a finished run, resumed, ends with another SAE");
    check(strcmp(cli_log("@part.csv"), cli_log("@whole.csv")) == 0, "and with another log");
    static const char *const others[] = {
        "--lr 1e-3", "--warmup 11", "--batch 4", "--seed 7", "--dead-window 4", "--latents 25",
        "--order sequential", "--arch topk --k 5", "--b-dec mean", "--b-dec-images 4", "--limit 6",
        "--l1 1e-3", "--layer 3" };
    for (size_t i = 0; i < COUNT(others); i++) {
        char changed[1000], option[40];
        snprintf(option, sizeof option, " %.*s ", (int)strcspn(others[i], " "), others[i]);
        snprintf(changed, sizeof changed, "%s", cli_recipe);
        char *old = strstr(changed, option), *value = old ? strchr(old + 1, ' ') + 1 : NULL;
        if (old) memmove(old, strchr(value, ' '), strlen(strchr(value, ' ')) + 1);
        snprintf(line, sizeof line, "%s%s --quiet --steps 30 -o @out --checkpoint @ckpt12 --resume",
                 changed, others[i]);
        cli_refuses(1, "@ckpt12: a checkpoint of another run", line);
    }
    snprintf(line, sizeof line, "%s--steps 30 -o @out --checkpoint @fresh --resume", recipe);
    cli_works("%s", line);
    check(cli_same("@out", "@whole_sae")
          && strstr(ran.err, cli("@fresh: no checkpoint yet")),
          "--resume without a checkpoint: %s", ran.err);
    remove(cli("@out"));
}

/* Options and data that a resumed run from images may not change. */
static void cli_test_resume_photos(void)
{
    static const char recipe[] =
        "train --quiet --layer 2 --hook mlp --latents 8 --batch 3 --lr 1e-2 ";
    static const char *const others[] = {
        "-m @model @list.txt", "-m @other @photos", "-m @model @photos --square 32",
        "-m @model @photos --mean 0.5,0.5,0.5", "-m @model @photos --std 0.5,0.5,0.5",
        "-m @model @photos --gelu erf", "-m @model @photos --eps 1e-3",
        "-m @model @photos --heads 4",
        "-m @model @photos --crop hf" };
    char line[1000];
    cli_copy("@model", "@other");
    cli_works("%s-m @model @photos --steps 20 -o @whole_sae", recipe);
    cli_works("%s-m @model @photos --steps 8 -o @part --checkpoint @pc", recipe);
    cli_copy("@pc", "@pc8");
    cli_works("%s-m @model @photos --steps 20 -o @part --checkpoint @pc --resume", recipe);
    check(cli_same("@part", "@whole_sae"), "a run from photos, resumed, ends with another SAE");
    for (size_t i = 0; i < COUNT(others); i++) {
        snprintf(line, sizeof line, "%s%s --steps 20 -o @out --checkpoint @pc8 --resume", recipe,
                 others[i]);
        cli_refuses(1, "@pc8: a checkpoint of another run", line);
    }
    cli_works("train --quiet --acts @acts --latents 8 --batch 2 --steps 1 -o @part "
              "--checkpoint @ac");
    cli_copy("@acts", "@kept_acts");
    cli_poke(cli("@kept_acts"), cli("@acts"), "activations", 0, 0x3f000000);
    cli_refuses(1, "@ac: a checkpoint of another run",
                "train --acts @acts --latents 8 --batch 2 --steps 2 -o @out --checkpoint @ac "
                "--resume");
    cli_copy("@kept_acts", "@acts");
}

static void cli_test_damage(void)
{
    char line[1000];
    size_t count, header;
    snprintf(line, sizeof line, "%s--steps 30 -o @out --checkpoint @hurt --resume", cli_recipe);
    cli_copy("@ckpt10", "@hurt.prev");
    char *bytes = get_file(cli("@ckpt12"), &count);
    header = 8 + (size_t)load64((const unsigned char *)bytes);
    for (int i = 0; i < 12; i++) {
        bytes = get_file(cli("@ckpt12"), &count);
        size_t place = header + (count - header) / 12 * (size_t)i + 2;
        bytes[place] = (char)(bytes[place] ^ 1);
        put_file(cli("@hurt"), bytes, count);
        cli_refuses(1, "@hurt.prev", line);
        check(strstr(ran.err, cli("@hurt: ")) != NULL, "byte %zu changed: %s", place, ran.err);
    }
    bytes = get_file(cli("@ckpt12"), &count);
    put_file(cli("@hurt"), bytes, count - 5);
    cli_refuses(1, "@hurt.prev", line);
    put_text(cli("@hurt"), "");
    cli_refuses(1, "@hurt.prev", line);
    cli_copy("@sae", "@hurt");
    cli_refuses(1, "@hurt: not a checkpoint: metadata next_draw is missing; the checkpoint before it is @hurt.prev", line);
    cli_edit(cli("@ckpt12"), cli("@hurt"), (cli_change)METADATA("checksum", "x"));
    cli_refuses(1, "@hurt: damaged", line);
    cli_edit(cli("@ckpt12"), cli("@hurt"), (cli_change)METADATA("next_draw", "1"));
    cli_refuses(1, "@hurt: damaged", line);
    static const char *const tensors[] = { "W_enc", "W_dec", "b_enc", "W_enc_m", "b_dec_v",
                                           "silent" };
    for (size_t i = 0; i < COUNT(tensors); i++) {
        cli_edit(cli("@ckpt12"), cli("@hurt"), (cli_change){ .drop = tensors[i] });
        cli_refuses(1, "@hurt: ", line);
        check(strstr(ran.err, tensors[i]) != NULL, "no %s: %s", tensors[i], ran.err);
    }
    cli_edit(cli("@ckpt12"), cli("@hurt"), (cli_change)METADATA("steps", "18446744073709551615"));
    with.seconds = 60;
    cli_refuses(1, "@hurt: damaged", line);
    with.seconds = 300;
    remove(cli("@hurt"));
    cli_refuses(1, "; the checkpoint before it is @hurt.prev", line);
    check(strstr(ran.err, cli("@hurt: cannot be opened")) != NULL, "no checkpoint: %s", ran.err);
}

/* Where the disk is too small for a checkpoint, the last one and the one before stay. An image that
 * cannot be read ends training with a checkpoint. */
static void cli_test_kept_checkpoints(void)
{
    static const char recipe[] = "train --quiet --acts @acts --latents 64 --batch 2 --checkpoint @kept.ckpt "
                                 "--checkpoint-every 1 -o @kept_sae ";
    struct stat about, before;
    cli_works("%s--steps 4", recipe);
    cli_copy("@kept.ckpt", "@kept4");
    cli_copy("@kept.ckpt.prev", "@kept3");
    if (stat(cli("@kept.ckpt"), &about) != 0) need("@kept.ckpt");
    for (rlim_t less = 1; less < 20000; less += 3000) {
        with.file_bytes = (rlim_t)about.st_size - less;
        cli_run("%s--steps 6 --resume", recipe);
        with.file_bytes = 0;
        check(cli_said(1, cli("@kept.ckpt: cannot be written: File too large")), "no room: %d, %s",
              ran.status, ran.err);
        check(cli_same("@kept.ckpt", "@kept4") && cli_same("@kept.ckpt.prev", "@kept3")
              && !exists(cli("@kept.ckpt.tmp")), "%d bytes short: a checkpoint is lost", (int)less);
    }
    check(stat(cli("@kept.ckpt"), &about) == 0 && stat(cli("@kept.ckpt.prev"), &before) == 0
          && about.st_ino != before.st_ino, "both are one file");
    put_text(cli("@gone.txt"), cli("@photos/birds/a.ppm\n@photos/birds/b.ppm\n@no-such.ppm\n"));
    cli_refuses(1, "step 3: ", "train --quiet -m @model @gone.txt --order sequential --latents 8 --batch 1 "
                               "--steps 9 --checkpoint @gone.ckpt -o @out");
    check(strstr(ran.err, "no-such.ppm") && exists(cli("@gone.ckpt")), "no checkpoint of step 2: %s", ran.err);
    cli_works("train --quiet -m @model @gone.txt --order sequential --latents 8 --batch 1 --steps 2 "
              "--checkpoint @two.ckpt -o @part");
    check(cli_same("@gone.ckpt", "@two.ckpt"), "not that of step 2");
}

/* A signal during training. The log is a pipe that this test reads, so that training does not end first. */
static void cli_test_signals(void)
{
    static const char recipe[] = "train --acts @acts --latents 8 --batch 1 --lr 1e-2 --quiet "
                                 "--steps 3000 ";
    const int signals[] = { SIGTERM, SIGINT };
    char line[200];
    cli_works("%s-o @whole_sae", recipe);
    if (mkfifo(cli("@fifo"), 0600) != 0) need("a pipe");
    for (int i = 0; i < 2; i++) {
        pid_t child = start_program("%s", cli("%s-o @stopped --log @fifo%s", recipe,
                                   i ? "" : " --checkpoint @signal.ckpt"));
        FILE *log = fopen(cli("@fifo"), "r");
        if (!log) need("a pipe");
        for (int row = 0; row < 20; row++)
            if (!fgets(line, sizeof line, log)) break;
        kill(child, signals[i]);
        while (fgets(line, sizeof line, log)) {}
        fclose(log);
        end_program(child);
        const char *checkpoint = cli(i ? "@stopped.ckpt" : "@signal.ckpt");
        check(cli_said(1, checkpoint) && strstr(ran.err, "--resume"), "signal %d: status %d, %s",
              signals[i], ran.status, ran.err);
        check(exists(checkpoint) && !exists(cli("@stopped")) && !exists(cli("@stopped.tmp")),
              "signal %d: no checkpoint, or output", signals[i]);
        child = start_program("%s", cli("%s-o @stopped --resume --log @fifo%s", recipe,
                              i ? "" : " --checkpoint @signal.ckpt"));
        log = fopen(cli("@fifo"), "r");          /* a pipe cannot be cut back, nor read */
        if (!log) need("a pipe");
        while (fgets(line, sizeof line, log)) {}
        fclose(log);
        end_program(child);
        check(ran.status == 0 && strncmp(line, "3000,", 5) == 0, "resumed into a pipe: %d, %s %s",
              ran.status, ran.err, line);
        check(cli_same("@stopped", "@whole_sae"), "signal %d, resumed: another SAE", signals[i]);
        remove(cli("@stopped"));
    }
}

/* A second signal ends training at once. The log is a full pipe, where training waits. */
static void cli_test_impatience(void)
{
#ifdef SANITIZED
    skip("a second signal: sanitizers may deliver signals later");
    return;
#endif
    int log = open(cli("@fifo"), O_RDWR | O_NONBLOCK), status, tries = 0;
    if (log < 0) need("a pipe");
    while (write(log, "", 1) == 1) {}
    pid_t child = start_program("%s", cli("train --quiet --acts @acts --latents 8 --batch 1 --steps 20000 -o @stopped "
                                "--log @fifo"));
    nanosleep(&(struct timespec){ .tv_nsec = 300000000 }, NULL);
    kill(child, SIGINT);
    do nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
    while (kill(child, ++tries < 100 ? SIGTERM : SIGKILL) == 0 && waitpid(child, &status, WNOHANG) == 0);
    close(log);
    ran.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    check(ran.status == -SIGTERM || ran.status == -SIGINT, "a second signal: status %d, %s", ran.status,
          ran.err);
}

/* Weights so large after step 1 that the squared gradient of step 2 overflows: the error names the step
 * and the latent, and the checkpoint is that of step 1. */
static void cli_test_overflow(void)
{
    const size_t acts[] = { 4, 3, 16 }, enc[] = { 16, 8 }, dec[] = { 8, 16 };
    const struct { const char *name; int rank; const size_t *shape; float scale; } tensors[] = {
        { "W_enc", 2, enc, 1 }, { "b_enc", 1, dec, 0 }, { "W_dec", 2, dec, 1 },
        { "b_dec", 1, enc, 0 }, { "activations", 3, acts, 1e-3f } };
    sc_writer w;
    test_random_state = 1;
    for (int t = 0; t < 5; t++) {
        size_t values = 1;
        if ((t == 0 || t == 4) && sc_writer_open(&w, cli(t ? "@tiny" : "@steep")) != SC_OK)
            need("%s", sc_error());
        sc_writer_tensor(&w, tensors[t].name, SC_F32, tensors[t].rank, tensors[t].shape);
        for (int d = 0; d < tensors[t].rank; d++) values *= tensors[t].shape[d];
        for (size_t i = 0; i < values; i++)
            sc_writer_floats(&w, &(float){ random_float() * tensors[t].scale }, 1);
        if (t >= 3 && sc_writer_close(&w, SC_OK) != SC_OK) need("%s", sc_error());
    }
    static const char recipe[] = "train --acts @tiny --init @steep --batch 2 --warmup 0 --lr 1e8 "
                                 "--l1 0 --checkpoint-every 1 -o @out --steps ";
    char line[400];
    snprintf(line, sizeof line, "%s1 --checkpoint @first", recipe);
    cli_works("%s", line);
    remove(cli("@out"));
    snprintf(line, sizeof line, "%s6 --checkpoint @last --log @overflow.csv", recipe);
    cli_refuses(1, "step 2: latent ", line);
    check(strstr(ran.err, "a weight or moment is not finite") != NULL, "not the weights: %s", ran.err);
    check(cli_same("@first", "@last"), "a checkpoint holds what is not finite");
    const char *row = strstr(get_file(cli("@overflow.csv"), NULL), "\n1,");
    check(row && strchr(row + 1, '\n') && strchr(row + 1, '\n')[1] == '\0',
          "the step that failed is logged");
}

/* Two runs with one log: the second is refused, and the log stays as it is. */
static void cli_test_shared_log(void)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    put_text(cli("@shared.csv"), "a row\n");
    int fd = open(cli("@shared.csv"), O_RDWR);
    if (fd < 0 || fcntl(fd, F_SETLK, &lock) != 0) need("a lock");
    cli_refuses(1, "@shared.csv: cannot be written: another process is writing it",
                "train --acts @acts --latents 8 --steps 1 --log @shared.csv -o @out");
    check(holds(cli("@shared.csv"), "a row\n"), "another run's log is emptied");
    close(fd);
    cli_refuses(1, "@shared.csv: not a training log",
                "train --acts @acts --latents 8 --steps 1 --log @shared.csv -o @out");
    check(holds(cli("@shared.csv"), "a row\n"), "a file that is not a log is emptied");
    remove(cli("@shared.csv"));
    for (int run = 0; run < 2; run++)
        cli_works("train --acts @acts --latents 8 --steps 1 --log @shared.csv -o @part");
    check(cli_count(cli_log("@shared.csv"), "\n") == 2, "a log keeps an old row");
}

static void test_cli(void)
{
    cli_make_inputs();
    cli_test_usage();
    cli_test_help();
    cli_test_layers();
    cli_test_models();
    cli_test_more_models();
    cli_test_saes();
    cli_test_mismatches();
    cli_test_activations();
    cli_test_late_refusals();
    cli_test_pictures();
    cli_test_packed();
    cli_test_decoders();
    cli_test_lists();
    cli_test_sources();
    cli_test_skipping();
    cli_test_outputs();
    cli_test_keeping();
    cli_test_streams();
    cli_test_memory();
    cli_test_claims();
    cli_test_names();
    cli_test_escapes();
    cli_test_long_names();
    cli_test_steps();
    cli_test_epochs();
    cli_test_resume();
    cli_test_resume_photos();
    cli_test_damage();
    cli_test_kept_checkpoints();
    cli_test_signals();
    cli_test_impatience();
    cli_test_overflow();
    cli_test_shared_log();
}
