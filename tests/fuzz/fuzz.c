/* Fuzz targets: hostile input for every reader of saeclip. See `make fuzz`.
 *
 * Built with -DLIBFUZZER and -fsanitize=fuzzer it is a fuzzer of the target that the environment's
 * SAECLIP_FUZZ names; built without, it writes the seeds and runs inputs once:
 *     fuzz seeds FOLDER             FOLDER/TARGET/..., and FOLDER/words, a dictionary
 *     fuzz run TARGET FILE...       each file (a folder: all in it), under any compiler's sanitizers
 *     fuzz targets                  their names
 * What is checked beside what the sanitizers see: a run ends with status 0, 1 or 2, a failure with a
 * reason, and nothing that reaches the terminal is a control byte or invalid UTF-8. All files are
 * made in a scratch folder under TMPDIR, where runs take place; it is put in order after each. */
#define main saeclip_main
#include "../../saeclip.c"
#undef main

#include "../check.h"

/* --- Files from text ---
 *
 * Mutated bytes are hardly ever a valid safetensors file, whose sizes must all agree. So most
 * targets take lines of text, from which a file is made that does:
 *     name dtype size size ... [=value]      a tensor; its values are a pattern, or all `value`
 *     @key=value                             an entry of the metadata */

enum { MOST_DATA = 1 << 16, MOST_INPUT = 1 << 16 };

static double value_of(const char *text, const char *name, size_t i, int whole) {
    double pattern = (double)(i * 40503 % 1009) / 504.5 - 1;
    if (text) return strtod(text, NULL);
    return whole ? (double)(i % 2) : strstr(name, "_v") ? fabs(pattern) : pattern;
}

static void put_number(unsigned char *to, size_t dtype, double value) {
    double bounded = value >= -9e18 && value <= 9e18 ? value : 0;
    int64_t whole = (int64_t)bounded;
    int32_t narrow = (int32_t)(uint32_t)whole;
    float single = (float)value;
    uint16_t half = dtype == SC_F16 ? half_of_float(single)
                                    : (uint16_t)(bits_of_float(single) >> 16);
    if (dtype == SC_F32) copy_numbers(to, &single, 1, 4);
    if (dtype == SC_F16 || dtype == SC_BF16) copy_numbers(to, &half, 1, 2);
    if (dtype == SC_F64) copy_numbers(to, &value, 1, 8);
    if (dtype == SC_I64) copy_numbers(to, &whole, 1, 8);
    if (dtype == SC_I32) copy_numbers(to, &narrow, 1, 4);
    if (dtype == SC_U8) *to = (unsigned char)whole;
}

/* A line's tensor: its description to `header`, its values behind `used` bytes of data. */
static size_t put_tensor(FILE *header, char *line, unsigned char *data, size_t used) {
    char *rest = line, *name = strtok_r(rest, " \t\r", &rest), *type = strtok_r(rest, " \t\r", &rest);
    size_t d = 0, sizes = 0, bytes, count;
    const char *value = NULL, *between = "";
    if (!name) return used;
    while (type && d < COUNT(dtypes) && strcmp(dtypes[d].name, type) != 0) d++;
    count = 1;
    bytes = d < COUNT(dtypes) ? dtypes[d].size : 4;
    print_json(header, name);
    fputs(":{\"dtype\":", header);
    print_json(header, type ? type : "F32");
    fputs(",\"shape\":[", header);
    for (char *word; (word = strtok_r(rest, " \t\r", &rest)) != NULL;) {
        if (*word == '=') value = word + 1;
        if (*word == '=' || sizes++ > 9) continue;
        fprintf(header, "%s%s", between, word);
        between = ",";
        count *= (size_t)strtoull(word, NULL, 10);
    }
    if (count > (MOST_DATA - used) / bytes) count = 0;       /* not to be had; a lie, then */
    for (size_t i = 0; i < count; i++)
        put_number(data + used + i * bytes, d, value_of(value, name, i, d >= SC_I64));
    fprintf(header, "],\"data_offsets\":[%zu,%zu]}", used, used + count * bytes);
    return used + count * bytes;
}

/* Writes a file from lines. */
static void make_tensors(const char *path, const char *text) {
    static unsigned char data[MOST_DATA];
    static char copy[MOST_INPUT + 1];
    char *header = NULL, *rest = strcpy(copy, text);
    size_t length = 0, used = 0;
    uint64_t size, bytes;
    memset(data, 0, sizeof data);
    FILE *out = open_memstream(&header, &length);
    if (!out) need("memory");
    fputs("{\"__metadata__\":{", out);
    for (int pass = 0, some = 0; pass < 2; pass++, some = 0) {
        rest = strcpy(copy, text);
        for (char *line; (line = strtok_r(rest, "\n", &rest)) != NULL;) {
            char *equals = *line == '@' ? strchr(line, '=') : NULL;
            if ((*line == '@') == pass || strspn(line, " \t\r") == strlen(line)) continue;
            if (pass == 0 && !equals) continue;
            fputs(some++ ? "," : "", out);
            if (pass == 1) used = put_tensor(out, line, data, used);
            if (pass == 1) continue;
            *equals = '\0';
            print_json(out, line + 1);
            putc(':', out);
            print_json(out, equals + 1);
        }
        if (pass == 0) fputs(some ? "}," : "}", out);
    }
    putc('}', out);
    fclose(out);
    char *file = malloc(8 + length + used);
    if (!file) need("memory");
    size = length;
    copy_numbers(&bytes, &size, 1, 8);
    memcpy(file, &bytes, 8);
    memcpy(file + 8, header, length);
    memcpy(file + 8 + length, data, used);
    put_file(path, file, 8 + length + used);
    free(file);
    free(header);
}

/* The lines that make a file like this one, but for its values. */
static void print_lines(FILE *out, const char *path) {
    sc_safetensors file;
    if (sc_safetensors_open(&file, path) != SC_OK) need("%s", sc_error());
    for (size_t i = 0; i < file.entries; i++)
        fprintf(out, "@%s=%s\n", file.metadata[i].key, file.metadata[i].value);
    for (size_t i = 0; i < file.tensors; i++) {
        const sc_tensor *t = &file.tensor[i];
        fprintf(out, "%s %s", t->name, sc_dtype_name(t->dtype));
        for (int d = 0; d < t->rank; d++) fprintf(out, " %zu", t->shape[d]);
        putc('\n', out);
    }
    sc_safetensors_close(&file);
}

/* A vision transformer of 2 blocks, width 8, 4 patches of 2 x 2, under one of the namings. */
static void print_model(FILE *out, int naming) {
    const size_t sizes[] = { 1, 8, 24, 8, 5, 12, 3 };
    char name[NAME_LENGTH];
    fputs("@num_attention_heads=2\n", out);
    for (int i = 0; i < 2 * 2 * ROLES; i++) {
        enum role role = (enum role)(i / 4);
        int bias = i / 2 % 2, parts = role == QKV && naming == HUGGING_FACE ? 3 : 1;
        size_t rows = sizes[layers[role].rows], columns = sizes[layers[role].columns];
        if ((i % 2 && (role < NORM1 || role > FC2))
            || (bias && (!strchr(layers[role].name[naming], '*') || role == HEAD))) continue;
        for (int part = 0; part < parts; part++) {
            spell_name(name, naming, role, (size_t)i % 2, bias, "qkv"[part]);
            if (bias) fprintf(out, "%s F32 %zu\n", name, rows > 1 ? rows / (size_t)parts : columns);
            else if (role == PATCHES) fprintf(out, "%s F32 8 3 2 2\n", name);
            else if (rows == 1) fprintf(out, "%s F32 %zu\n", name, columns);
            else if (role == HEAD && naming == OPENAI) fprintf(out, "%s F32 8 3\n", name);
            else fprintf(out, "%s F32 %zu %zu\n", name, rows / (size_t)parts, columns);
        }
    }
    if (naming != TIMM) fputs("text_embeds F32 2 3\n", out);
}

/* --- The scratch folder --- */

/* What every run finds there. */
static struct fixture { const char *name; char *bytes; size_t count; struct stat about; } fixtures[] = {
    { .name = "photos" }, { .name = "photos/a.ppm" }, { .name = "photos/b.pgm" }, { .name = "list.txt" },
    { .name = "image.ppm" }, { .name = "model" }, { .name = "acts" }, { .name = "sae" }, { .name = "topk" },
    { .name = "stats" }, { .name = "first" }, { .name = "second" },
    { .name = "set.safetensors" }, { .name = "ckpt" }, { .name = "log.csv" } };

static int report = -1;              /* where we may complain: standard error is a file of ours */

SC_PRINTF(1, 2) static void wrong(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vdprintf(report < 0 ? 2 : report, format, arguments);
    va_end(arguments);
    dprintf(report < 0 ? 2 : report, "\n");
    abort();
}

/* Runs one command as main() does. argv: [count + 1], without the program's name */
static int run_list_here(int count, char **words) {
    static char program_name[] = "saeclip";
    char *argv[70] = { program_name };
    for (int i = 0; i < count && i < 68; i++) argv[i + 1] = words[i];
    error_text[0] = '\0';
    int status = run_saeclip(count + 1, argv);
    quiet = 0;
    if (status < SC_OK || status > SC_USAGE) wrong("status %d: %s", status, sc_error());
    if (status != SC_OK && !*error_text) wrong("status %d without a reason", status);
    if (status != SC_OK) note("%s", sc_error());
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    stop_signal = 0;
    return status;
}

static int run_here(const char *line) {
    char text[1024], *words[68], *rest = text;
    int count = 0;
    snprintf(text, sizeof text, "%s", line);
    while (count < 67 && (words[count] = strtok_r(rest, " ", &rest)) != NULL) count++;
    words[count] = NULL;
    return run_list_here(count, words);
}

/* Puts the folder in order: what is not a fixture goes, fixtures that changed come back. */
static void tidy(int anew) {
    struct dirent *entry;
    struct stat about;
    DIR *here = opendir(".");
    if (!here) need("the scratch folder");
    while ((entry = readdir(here)) != NULL) {
        int known = entry->d_name[0] == '.';
        for (size_t i = 0; i < COUNT(fixtures); i++)
            known |= strcmp(entry->d_name, fixtures[i].name) == 0;
        if (!known) remove_tree(entry->d_name);
    }
    closedir(here);
    for (size_t i = 0; i < COUNT(fixtures) && !anew; i++) {
        const struct stat *old = &fixtures[i].about;
        anew = stat(fixtures[i].name, &about) != 0 || about.st_ino != old->st_ino
            || about.st_size != old->st_size || about.st_mtim.tv_nsec != old->st_mtim.tv_nsec
            || about.st_mtim.tv_sec != old->st_mtim.tv_sec;
    }
    if (!anew) return;
    for (size_t i = 0; i < COUNT(fixtures); i++) remove_tree(fixtures[i].name);
    mkdir("photos", 0777);
    for (size_t i = 1; i < COUNT(fixtures); i++)
        put_file(fixtures[i].name, fixtures[i].bytes, fixtures[i].count);
    for (size_t i = 0; i < COUNT(fixtures); i++) stat(fixtures[i].name, &fixtures[i].about);
}

/* What was printed must be harmless on a terminal; the next input's goes to an empty file. */
static void check_prints(void) {
    static char text[1 << 16];
    for (int fd = 1; fd <= 2; fd++) {
        FILE *stream = fd == 1 ? stdout : stderr;
        fflush(stream);
        ssize_t count = pread(fd, text, sizeof text - 1, 0);
        text[count > 0 ? count : 0] = '\0';
        for (size_t i = 0, length; count > 0 && i < (size_t)count; i += length) {
            const unsigned char *byte = (const unsigned char *)text + i;
            uint32_t point;
            length = utf8_length(text + i, &point);
            if (length == 0 && (size_t)count > sizeof text - 8) break;       /* cut by us */
            if (*byte == '\n' || *byte == '\t') continue;
            if (length == 0 || is_control(point))
                wrong("prints byte 0x%02x: %s", (unsigned)*byte, text);
        }
        clearerr(stream);
        rewind(stream);
        if (ftruncate(fd, 0) != 0) wrong("no file for what is printed");
    }
}

/* Standard streams become files of the scratch folder. */
static void take_streams(void) {
    if (report >= 0) return;
    report = fcntl(2, F_DUPFD_CLOEXEC, 100);
    if (!freopen(".out", "w+", stdout) || !freopen(".err", "w+", stderr)) wrong("no files for standard streams");
}

static void make_fixture(const char *line) {
    if (run_here(line) != SC_OK) need("%s: %s", line, sc_error());
}

#define RESUMED "train --threads 1 --acts acts --latents 4 --batch 1 --ghost --dead-window 0 "

static void make_fixtures(void) {
    static char lines[MOST_INPUT];
    unsigned char photo[] = "P6\n5 4\n255\n012345678901234567890123456789012345678901234567890123456789";
    FILE *text = fmemopen(lines, sizeof lines, "w");
    make_folder();
    if (chdir(folder) != 0 || !text) need("%s", folder);
    print_model(text, TIMM);
    fclose(text);
    make_tensors("model", lines);
    mkdir("photos", 0777);
    put_file("photos/a.ppm", photo, sizeof photo - 1);
    put_file("image.ppm", photo, sizeof photo - 1);
    put_text("photos/b.pgm", "P2 3 3 9 1 2 3 4 5 6 7 8 9\n");
    put_text("list.txt", "photos/a.ppm\t0\nphotos/b.pgm\t1\n");
    quiet = 1;
    make_fixture("extract --quiet -m model --layer 1 --hook mlp list.txt -o acts");
    make_fixture("train --quiet --acts acts --latents 4 --steps 2 --batch 1 -o sae");
    make_fixture("train --quiet --acts acts --latents 4 --arch topk --k 2 --steps 2 --batch 1 -o topk");
    make_fixture("stats --quiet -s sae --acts acts --class-counts -o stats");
    make_fixture("stats --quiet -s sae --acts acts --class-counts --shard 1/2 -o first");
    make_fixture("stats --quiet -s sae --acts acts --class-counts --shard 2/2 -o second");
    make_fixture("pack --quiet list.txt --size 4 -o set.safetensors");
    make_fixture(RESUMED "--quiet --steps 2 -o out --checkpoint ckpt --log log.csv");
    for (size_t i = 1; i < COUNT(fixtures); i++)
        if (!(fixtures[i].bytes = read_whole(fixtures[i].name, &fixtures[i].count)))
            need("%s", fixtures[i].name);
    tidy(1);
}

/* --- The targets: text is their input and a zero byte --- */

/* A raw file; or, where the input begins with a brace, its header, and behind a zero byte its data. */
static void fuzz_safetensors(const char *text, size_t count) {
    static unsigned char file[MOST_INPUT + 16];
    size_t header = strnlen(text, count), rest = count - header - (header < count);
    uint64_t size = header, bytes;
    sc_safetensors f;
    float value[16];
    int64_t whole[16], exact;
    int made = *text == '{';
    if (made) {
        copy_numbers(&bytes, &size, 1, 8);
        memcpy(file, &bytes, 8);
        memcpy(file + 8, text, header);
        memcpy(file + 8 + header, text + count - rest, rest);
    }
    put_file("fuzz", made ? (const char *)file : text, made ? 8 + header + rest : count);
    if (sc_safetensors_open(&f, "fuzz") != SC_OK) {
        note("%s", sc_error());
        return;
    }
    for (size_t i = 0; i < f.tensors; i++) {
        const sc_tensor *t = &f.tensor[i];
        if (sc_tensor_find(&f, t->name) != t) wrong("a tensor is not found");
        for (size_t first = 0; first <= t->count; first += 16) {
            size_t n = t->count - first < 16 ? t->count - first : 16;
            sc_tensor_floats(&f, t, first, n, value);
            sc_tensor_integers(&f, t, first, n, whole);
            for (size_t e = 0; t->dtype <= SC_U8 && e < n; e++) number_at(t, first + e, &exact);
        }
        if (sc_tensor_floats(&f, t, t->count, 1, value) == SC_OK) wrong("reads beyond a tensor");
    }
    for (size_t i = 0; i < f.entries; i++)
        if (sc_metadata_find(&f, f.metadata[i].key) != f.metadata[i].value) wrong("metadata lost");
    sc_safetensors_close(&f);
    run_here("info fuzz --threads 1");
    run_here("compare fuzz sae --threads 1");
}

/* What a made file is taken for; the input's first line is one of the words, else it is the first. */
static const struct { const char *word, *fixture, *line; } uses[] = {
    { "model", "model", "extract --threads 1 -m fuzz.safetensors --layer -1 --hook resid photos -o out" },
    { "head", "model", "zeroshot --threads 1 -m fuzz.safetensors list.txt" },
    { "sae", "sae", "eval --threads 1 -s fuzz.safetensors -s topk --acts acts --format json" },
    { "codes", "topk", "encode --threads 1 -s fuzz.safetensors --acts acts --dense --mean "
                       "--reconstruction -o out" },
    { "init", "sae", "train --threads 1 --init fuzz.safetensors --acts acts --batch 1 -o out" },
    { "top", "stats", "top --threads 1 -s sae -t fuzz.safetensors -m model list.txt -l 0,3 -o out" },
    { "toppatches", "stats", "mask --threads 1 -s sae -t fuzz.safetensors --acts acts -l 0,3 "
                             "--mask top -o out" },
    { "atlas", "stats", "atlas --threads 1 -s sae -t fuzz.safetensors -m model list.txt -o out" },
    { "explain", "stats", "explain --threads 1 -s sae -t fuzz.safetensors -m model photos/a.ppm" },
    { "latents", "stats", "plot latents fuzz.safetensors stats -o out" },
    { "counts", "stats", "plot counts fuzz.safetensors -o out" },
    { "histogram", "stats", "plot activations fuzz.safetensors -o out" },
    { "merge", "first", "merge fuzz.safetensors second -o out" },
    { "acts", "acts", "train --threads 1 --acts fuzz.safetensors --latents 3 --steps 2 --batch 1 "
                      "--b-dec geomedian-images --ghost --dead-window 0 -o out" },
    { "labels", "acts", "stats --threads 1 --acts fuzz.safetensors -s sae --class-counts -o out" },
    { "images", "set.safetensors", "pack --threads 1 fuzz.safetensors --size 3 -o out" },
    { "classes", "set.safetensors", "extract --threads 1 -m model fuzz.safetensors -o out" },
    { "info", "model", "info fuzz.safetensors" } };

static void fuzz_tensors(const char *text, size_t count) {
    size_t use = 0, length = strcspn(text, "\n");
    (void)count;
    while (use < COUNT(uses) && (strlen(uses[use].word) != length
                                 || memcmp(uses[use].word, text, length) != 0)) use++;
    int named = use < COUNT(uses);
    make_tensors("fuzz.safetensors", text + (named ? length : 0));
    run_here(uses[named ? use : 0].line);
}

/* One image file. */
static void fuzz_images(const char *text, size_t count) {
    const sc_preprocess preps[] = { { .size = 4 }, { .size = 3, .square = 5, .crop_hf = 1 } };
    unsigned char pixels[4 * 4 * 3];
    sc_images set;
    put_file("fuzz.ppm", text, count);
    if (*text != 'P') return;                /* other formats start a decoder */
    if (sc_images_open(&set, "fuzz.ppm", 0) != SC_OK) note("%s", sc_error());
    else {
        for (int i = 0; i < 2; i++)
            if (sc_image_load(&set, 0, &preps[i], pixels) != SC_OK) note("%s", sc_error());
        sc_images_close(&set);
    }
    run_here("pack --threads 1 fuzz.ppm --size 3 -o out");
    run_here("plot mask fuzz.ppm photos/b.pgm -o out");
}

static void fuzz_lists(const char *text, size_t count) {
    sc_images set;
    put_file("fuzz.txt", text, count);
    if (sc_images_open(&set, "fuzz.txt", 0) != SC_OK) note("%s", sc_error());
    else sc_images_close(&set);
    if (!memchr(text, '/', count))           /* no file but ours is opened */
        run_here("pack --threads 1 --skip-bad fuzz.txt --size 3 -o out");
}

/* JSON lists of names: what was read and written again is the same. */
static void fuzz_names(const char *text) {
    char **name, **again, *written = NULL;
    size_t count, count_again, length;
    if (json_string_array(text, "names", &name, &count) != SC_OK) {
        note("%s", sc_error());
        return;
    }
    FILE *out = open_memstream(&written, &length);
    for (size_t i = 0; out && i < count; i++) {
        putc(i ? ',' : '[', out);
        print_json(out, name[i]);
        note("%s %s", shown(name[i]), base_name(name[i]));
    }
    if (!out || fputs(count ? "]" : "[]", out) < 0 || fclose(out) != 0) need("memory");
    if (json_string_array(written, "names", &again, &count_again) != SC_OK || count_again != count)
        wrong("%s is not read again: %s", written, sc_error());
    for (size_t i = 0; i < count; i++)
        if (strcmp(name[i], again[i]) != 0) wrong("a name changed: %s", written);
    free(name);
    free(again);
    free(written);
}

/* A log to go on with: a beginning of it stays, up to the step, or a header is written. */
static void fuzz_log(const char *text, size_t count) {
    options o = { .log = "fuzz.csv" };
    sc_trainer trainer = { .step = (uint64_t)(count % 5) };
    training_run run = { .o = &o, .trainer = &trainer };
    size_t kept;
    put_file("fuzz.csv", text, count);
    if (open_log(&run) != SC_OK) wrong("%s", sc_error());
    fclose(run.log);
    char *file = read_whole("fuzz.csv", &kept);
    if (!file || ((kept > count || memcmp(file, text, kept) != 0) && strncmp(file, "step,", 5) != 0))
        wrong("the log became %s", file ? file : "nothing");
    free(file);
}

/* JSON behind J, a log to go on with behind C, to draw behind P. */
static void fuzz_texts(const char *text, size_t count) {
    if (count == 0) return;
    if (*text == 'C') fuzz_log(text + 1, count - 1);
    else if (*text == 'P') {
        put_file("fuzz.csv", text + 1, count - 1);
        run_here("plot curves fuzz.csv log.csv -o out");
    }
    else fuzz_names(text + 1);
}

/* As command lines have them, a word a line; no path leads out of the folder. */
static void fuzz_commands(const char *text, size_t count) {
    static char copy[MOST_INPUT + 1];
    char *words[68], *rest = strcpy(copy, text);
    int n = 0;
    (void)count;
    for (; n < 67 && rest; n++) {
        words[n] = rest;
        rest = strchr(rest, '\n');
        if (rest) *rest++ = '\0';
        const char *equals = strchr(words[n], '='), *number = equals ? equals + 1 : words[n];
        int many = n > 0 && (strncmp(words[n], "--steps", 7) == 0 || strncmp(words[n], "--epochs", 8) == 0
            || (!equals && (strcmp(words[n - 1], "--steps") == 0 || strcmp(words[n - 1], "--epochs") == 0)));
        if (many && !(strtod(number, NULL) <= 4)) stop_signal = SIGTERM;     /* after one step */
        if (strchr(words[n], '/')) return;
    }
    words[n] = NULL;
    run_list_here(n, words);
    stop_signal = 0;
}

/* A checkpoint to go on from: its tensors are read before its checksum is compared. */
static void fuzz_checkpoints(const char *text, size_t count) {
    (void)count;
    make_tensors("fuzz.safetensors", text);
    run_here(RESUMED "--steps 3 -o out --checkpoint fuzz.safetensors --log log.csv --resume");
}

/* --- Seeds --- */

static const char *seed_folder, *seed_target;

/* One more seed; its name is its number. */
static void seed(const void *bytes, size_t count) {
    static int number;
    char path[1200];
    snprintf(path, sizeof path, "%s/%s/%03d", seed_folder, seed_target, number++);
    put_file(path, bytes, count);
}

static void seed_text(const char *text) { seed(text, strlen(text)); }

#define SEED(bytes) seed(bytes, sizeof bytes - 1)        /* may hold zero bytes */

static void seed_safetensors(void) {
    size_t count;
    static const char *const files[] = { "sae", "stats", "set.safetensors", "acts" };
    for (size_t i = 0; i < COUNT(files); i++) {
        char *bytes = read_whole(files[i], &count);
        seed(bytes, count);
        free(bytes);
    }
    SEED("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}\0\0\0\200\77\0\0\0\100");
    SEED("{\"__metadata__\":{\"\\u00e9\\ud83d\\ude00\\n\":\"\\\\\"},\"h\":{\"data_offsets\":[0,2],"
         "\"dtype\":\"BF16\",\"shape\":[1,1]},\"i\":{\"dtype\":\"I32\",\"shape\":[0,9],"
         "\"data_offsets\":[2,2]}} \0\1\2");
    seed_text("{}");
    seed_text("{\"t\":{\"dtype\":\"F8_E4M3\",\"shape\":[1125899906842624,0],\"data_offsets\":[0,0]}}");
}

static void seed_lines(const char *first, const char *path) {
    char *lines = NULL;
    size_t length;
    FILE *out = open_memstream(&lines, &length);
    if (!out) need("memory");
    fprintf(out, "%s\n", first);
    print_lines(out, path);
    fclose(out);
    seed(lines, length);
    free(lines);
}

static void seed_tensors(void) {
    for (size_t i = 0; i < COUNT(uses); i++) seed_lines(uses[i].word, uses[i].fixture);
    for (int i = 0; i < 2 * NAMINGS; i++) {
        char lines[16384];
        FILE *out = fmemopen(lines, sizeof lines, "w");
        if (!out) need("memory");
        fputs(i % 2 ? "head\n" : "model\n", out);
        print_model(out, i / 2);
        fputs("@hidden_act=gelu\n@layer_norm_eps=1e-6\n@image_mean=0,0,0\n@image_std=1,1,1\n", out);
        fclose(out);
        seed_text(lines);
    }
    seed_text("classes\nimages U8 2 3 3 3\nlabels I64 2\n@class_names=[\"a\",\"b\",\"c\"]\n"
              "@file_names=[\"x.ppm\",\"\\u001b[31m\"]\n");
    seed_text("sae\n@architecture=topk\n@k=3\n@layer=1\n@hook=mlp\nW_enc F16 8 5\nb_enc BF16 5\n"
              "W_dec F64 5 8\nb_dec F32 8 =nan\n");
}

static void seed_images(void) {
    seed_text("P2 3 3 9 1 2 3 4 5 6 7 8 9 P3 1 1 65535 1 40000 65535");
    SEED("P4\n9 3\n\1\2\3\4\5\6P5 2 2 255\n\0\1\2\3P5 2 1 300\n\1\0\0\1");
    seed_text("P6 # comment\n3 2 255 012345678901234567P6 2 2 1000 000000000000000000000000");
    seed_text("P6 16384 16384 255\n0");
}

static void seed_lists(void) {
    seed_text("# pictures\nphotos/a.ppm\t0\nphotos/b.pgm\t2\r\n");
    seed_text("sae\nmodel\n\n  set.safetensors  \n");
    seed_text("a b#c.ppm\t16777215\n\tx\n");
}

static void seed_texts(void) {
    size_t count;
    char *log = read_whole("log.csv", &count), *text = join_text("C", log ? log : "");
    seed_text(text ? text : "C");
    free(text);
    text = join_text("P", log ? log : "");
    seed_text(text ? text : "P");
    free(log);
    free(text);
    seed_text("J[\"a\", \"\\u00e9\\\"\\ud83d\\ude00\", \"\"]");
    seed_text("J [ ] ");
    seed_text("J[\"\xc3\xa9<b>&amp;\\/\\b\\f\\n\\r\\t\"]");
    seed_text("Cstep,images\n1,16\n2,32\n3,4");
}

static void seed_commands(void) {
    static const char *const lines[] = {
        "", "--help", "--version", "info", "info sae", "info --help", "compare --rtol 1e-3 sae topk",
        "pack --size 4 photos -o out", "pack --square 3 --crop hf --limit 1 --skip-bad list.txt -o out",
        "pack list.txt -o out --size 3", "extract -m model --layer -1 --hook attn photos --tokens cls -o out",
        "extract -m model --dtype f16 --tokens patches set.safetensors -o out --gelu erf --eps 1e-5 "
        "--heads 4 --mean 0,0,0 --std 1,1,1",
        "train --acts acts --latents 5 --b-dec geomedian --b-dec-images 2 --l1 1e-3 --lr 1e-2 -o out",
        "train -m model photos --order sequential --batch 1 --expansion 1 -o out --log=x.csv --seed 7",
        "train --acts acts --arch topk --k 1 --epochs 2 --batch 1 -o out --checkpoint c --resume",
        "train --acts acts --latents 4 --batch 1 --ghost --dead-window 0 --steps 3 --checkpoint ckpt "
        "--resume -o out --checkpoint-every 1",
        "train --acts acts --init sae --steps 1 -o out",
        "encode -s topk --acts acts --dense --reconstruction --image-means -o out",
        "eval -s sae -s topk --acts acts --also acts --format csv",
        "eval -s sae -m model photos --format text --threads 2",
        "stats -s sae -m model list.txt --class-counts --threshold 0.1 --top 3 --top-patches 2 -o out",
        "top -s sae -t stats --mask value -m model list.txt -l 0,2 -o out",
        "mask -s sae -m model list.txt -l 1 --class 0 -o out", "mask -s topk --acts acts -l 3 -o out",
        "merge second first -o out", "stats --shard 1/1 -s topk --acts acts -o out",
        "plot curves log.csv -o out", "plot latents stats -o out", "plot mask list.txt -o out",
        "explain -s sae -t stats -m model image.ppm --patch 0,1 --max-frequency 0.5 -o out",
        "atlas -s sae -t stats -m model list.txt -o out",
        "zeroshot -m model list.txt --format json --quiet", "-- info", "info -- -x" };
    for (size_t i = 0; i < COUNT(lines); i++) {
        char text[400];
        snprintf(text, sizeof text, "%s", lines[i]);
        for (char *c = text; *c; c++)
            if (*c == ' ') *c = '\n';
        seed_text(text);
    }
}

static void seed_checkpoints(void) {
    char *lines = NULL;
    size_t length;
    FILE *out = open_memstream(&lines, &length);
    if (!out) need("memory");
    print_lines(out, "ckpt");
    fclose(out);
    seed(lines, length);
    char *steps = strstr(lines, "@steps=");          /* another step than the checksum's */
    if (!steps) need("metadata steps");
    steps[strlen("@steps=")] ^= 1;
    seed(lines, length);
    free(lines);
}

static const struct {
    const char *name;
    void (*run)(const char *text, size_t count);
    void (*seeds)(void);
} targets[] = {
    { "safetensors", fuzz_safetensors, seed_safetensors }, { "tensors", fuzz_tensors, seed_tensors },
    { "images", fuzz_images, seed_images }, { "lists", fuzz_lists, seed_lists },
    { "texts", fuzz_texts, seed_texts }, { "commands", fuzz_commands, seed_commands },
    { "checkpoints", fuzz_checkpoints, seed_checkpoints } };

static size_t find_target(const char *name) {
    size_t i = 0;
    while (i < COUNT(targets) && (!name || strcmp(targets[i].name, name) != 0)) i++;
    if (i == COUNT(targets)) wrong("'%s' is no target", name ? name : "");
    return i;
}

static void run_input(size_t target, const unsigned char *bytes, size_t count) {
    static char text[MOST_INPUT + 1];
    if (count > MOST_INPUT) count = MOST_INPUT;
    if (count > 0) memcpy(text, bytes, count);
    text[count] = '\0';
    take_streams();
    targets[target].run(text, count);
    check_prints();
    tidy(0);
}

static void remove_folder(void) { remove_tree(folder); }

#ifdef LIBFUZZER

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count);

static size_t chosen;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    chosen = find_target(getenv("SAECLIP_FUZZ"));
    make_fixtures();
    atexit(remove_folder);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count) {
    run_input(chosen, bytes, count);
    return 0;
}

#else

/* The dictionary: what names, kinds and options there are, from saeclip's own tables. */
static void write_word(FILE *out, const char *word) {
    if (!word || !*word) return;
    putc('"', out);
    for (; *word; word++) fprintf(out, *word == '"' || *word == '\\' ? "\\%c" : "%c", *word);
    fputs("\"\n", out);
}

static void write_words(void) {
    static const char *const more[] = {
        "\"dtype\":\"", "\"shape\":[", "\"data_offsets\":[", "__metadata__", "\\u00e9", "\\ud83d\\ude00",
        "P2\n", "P3\n", "P4\n", "P5\n", "P6\n", "65535", "18446744073709551615", "9223372036854775808",
        "-1", "nan", "inf", "1e-5", "=nan", "=inf", "=-1", "=0", "@architecture=topk", "@k=", "@layer=",
        "@hook=mlp", "@class_names=[\"", "@file_names=[\"", "@data_digest=", "@sae_digest=", "@tokens=cls",
        "@steps=", "@next_draw=", "@checksum=", "labels I64 ", "text_embeds F32 ", "\t", "#" };
    char path[1200], name[NAME_LENGTH];
    snprintf(path, sizeof path, "%s/words", seed_folder);
    FILE *out = fopen(path, "w");
    if (!out) need("%s", path);
    for (size_t i = 0; i < COUNT(more); i++) {
        if (*more[i] == '\t' || strchr(more[i], '\n')) continue;
        write_word(out, more[i]);
    }
    for (size_t i = 0; i < COUNT(dtypes); i++) write_word(out, dtypes[i].name);
    for (size_t i = 0; i < COUNT(option_table); i++) {
        write_word(out, option_table[i].name);
        const char *list = option_table[i].kind == CHOICE ? option_table[i].value : "";
        for (size_t length; *list; list += length + (list[length] == '|')) {
            length = strcspn(list, "|");
            snprintf(name, sizeof name, "%.*s", (int)length, list);
            write_word(out, name);
        }
    }
    for (size_t i = 0; i < COUNT(command_table); i++) write_word(out, command_table[i].name);
    for (size_t i = 0; i < COUNT(fixtures); i++) write_word(out, fixtures[i].name);
    for (size_t i = 0; i < COUNT(uses); i++) write_word(out, uses[i].word);
    for (int i = 0; i < NAMINGS * ROLES * 2; i++) {
        spell_name(name, i % NAMINGS, (enum role)(i / NAMINGS % ROLES), 0, i / NAMINGS / ROLES, 'q');
        write_word(out, name);
    }
    if (fclose(out) != 0) need("%s", path);
}

static void write_seeds(const char *to) {
    char path[1200];
    seed_folder = to;
    mkdir(to, 0777);
    write_words();
    for (size_t i = 0; i < COUNT(targets); i++) {
        seed_target = targets[i].name;
        snprintf(path, sizeof path, "%s/%s", to, seed_target);
        mkdir(path, 0777);
        targets[i].seeds();
    }
}

static size_t runs;

/* A file, or every file in a folder. */
static void run_path(size_t target, const char *path) {
    struct dirent *entry;
    char name[4200];
    size_t count;
    DIR *inside = opendir(path);
    char *bytes = inside ? NULL : read_whole(path, &count);
    if (!inside && !bytes) wrong("%s: cannot be read", path);
    if (bytes) run_input(target, (unsigned char *)bytes, count), runs++;
    free(bytes);
    while (inside && (entry = readdir(inside)) != NULL) {
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        if (entry->d_name[0] != '.') run_path(target, name);
    }
    if (inside) closedir(inside);
}

int main(int argc, char **argv) {
    const char *word = argc > 1 ? argv[1] : "";
    if (strcmp(word, "targets") == 0) {
        for (size_t i = 0; i < COUNT(targets); i++) puts(targets[i].name);
        return 0;
    }
    if (argc < 3) wrong("fuzz seeds FOLDER, fuzz run TARGET FILE, or fuzz targets");
    char *path = absolute_path(argv[argc - 1]);
    make_fixtures();
    atexit(remove_folder);
    if (strcmp(word, "seeds") == 0) write_seeds(path);
    else run_path(find_target(argc > 3 ? argv[2] : NULL), path);
    if (report >= 0) dprintf(report, "%s: ", argv[2]);
    for (size_t i = 1; i < COUNT(fixtures); i++) free(fixtures[i].bytes);
    if (runs) dprintf(report, "%zu passed, 0 failed, 0 skipped\n", runs);
    return 0;
}

#endif
