/* A small harness for saeclip's tests, included once, by test.c.
 *
 *     check(condition, "the fault that a failure shows, %d of it", i);   counts; prints failures
 *     skip("reason, %s", reason);                                        counts; prints
 *     const char *path = in_folder("a.safetensors");   in a temporary folder, removed at the end
 *     put_text(path, "text");  put_file(path, bytes, count);  get_file(path, &count);
 *     run("eval -s %s --acts %s", in_folder("s"), in_folder("a"));   starts ./saeclip, waits for it
 *     pid_t child = start_program("...");  end_program(child);    the same in the background
 *     works("...");  refuses(2, "not a number", "...");   runs it and checks the outcome
 *     check(ran.status == 1 && strstr(ran.err, "cannot"), "...");   the outcome of the last run
 *     if (!can_decode("JPEG")) skip(...);              before a test that needs an image decoder
 *
 * Every test file (test_*.c) is included by test.c after saeclip.c, so tests may call its static
 * functions; all files share one name space, so a file's helpers begin with its subject (cli_...,
 * look_...). A file has one entry, void test_SUBJECT(void), listed in test.c's table;
 * `tests/test SUBJECT...` runs only these. Tests run in the checkout's root; golden files are at
 * GOLDEN "name". Names of checks describe the fault; passed checks print nothing. */
#ifndef CHECK_H
#define CHECK_H

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif

#include <sys/resource.h>

#define GOLDEN "tests/golden/"

static size_t passed, failed, skipped;

/* Counts a check and returns whether it passed. A failure prints the name and the library's last
 * error message. */
SC_PRINTF(2, 3) static int check(_Bool condition, const char *name, ...)
{
    va_list arguments;
    if (condition) {
        passed++;
        return 1;
    }
    failed++;
    va_start(arguments, name);
    printf("FAILED: ");
    vprintf(name, arguments);
    printf("   [last reason: %s]\n", sc_error());
    va_end(arguments);
    fflush(stdout);
    return 0;
}

/* Counts a test that cannot run on this machine and prints the reason. */
SC_PRINTF(1, 2) static void skip(const char *reason, ...)
{
    va_list arguments;
    skipped++;
    va_start(arguments, reason);
    printf("skipped: ");
    vprintf(reason, arguments);
    printf("\n");
    va_end(arguments);
}

/* Whether the library's last error message contains a text. */
static int says(const char *text) { return strstr(sc_error(), text) != NULL; }

/* Ends the tests: something that all of them need failed. */
SC_PRINTF(1, 2) static void need(const char *what, ...)
{
    va_list arguments;
    va_start(arguments, what);
    fflush(stdout);
    vfprintf(stderr, what, arguments);
    fprintf(stderr, ": %s; the tests cannot go on\n", strerror(errno));
    va_end(arguments);
    exit(1);
}

/* --- Files --- */

static char folder[256];             /* the tests' temporary folder, without a final slash */

/* A path in the temporary folder; 64 may be in use at a time. */
SC_PRINTF(1, 2) static const char *in_folder(const char *name, ...)
{
    static char paths[64][1024];
    static int turn;
    va_list arguments;
    char *path = paths[turn = (turn + 1) % 64];
    size_t length = (size_t)snprintf(path, sizeof paths[0], "%s/", folder);
    va_start(arguments, name);
    vsnprintf(path + length, sizeof paths[0] - length, name, arguments);
    va_end(arguments);
    return path;
}

static void put_file(const char *path, const void *bytes, size_t count)
{
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, count, file) != count || fclose(file) != 0) need("%s", path);
}

static void put_text(const char *path, const char *text) { put_file(path, text, strlen(text)); }

/* The bytes of a file and a zero byte, to be freed; NULL if it cannot be opened. */
static char *read_whole(const char *path, size_t *count)
{
    size_t room = 65536, got;
    FILE *file = fopen(path, "rb");
    *count = 0;
    if (!file) return NULL;
    char *bytes = malloc(room);
    while (bytes && (got = fread(bytes + *count, 1, room - 1 - *count, file)) > 0)
        if ((*count += got) == room - 1) bytes = realloc(bytes, room *= 2);
    fclose(file);
    if (!bytes) need("%s", path);
    bytes[*count] = '\0';
    return bytes;
}

/* The same, freed automatically: 16 may be in use at a time. */
static char *get_file(const char *path, size_t *count)
{
    static char *kept[16];
    static int turn;
    size_t length;
    free(kept[turn = (turn + 1) % 16]);
    kept[turn] = read_whole(path, count ? count : &length);
    return kept[turn];
}

/* FNV-1a (Fowler, Noll and Vo) */
static uint64_t digest_bytes(const void *bytes, size_t count)
{
    const unsigned char *byte = bytes;
    uint64_t digest = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++) digest = (digest ^ byte[i]) * 0x100000001b3u;
    return digest;
}

static int exists(const char *path)
{
    struct stat about;
    return lstat(path, &about) == 0;
}

/* A path that stays right in another folder; 4 may be in use at a time. */
static char *absolute_path(const char *path)
{
    static char paths[4][8400];
    static int turn;
    char here[4200], *whole = paths[turn = (turn + 1) % 4];
    if (!getcwd(here, sizeof here)) need("the current folder");
    if (*path == '/') here[0] = '\0';
    snprintf(whole, sizeof paths[0], "%s%s%s", here, *here ? "/" : "", path);
    return whole;
}

/* Whether the contents of a file are exactly this text. */
static int holds(const char *path, const char *text)
{
    size_t count;
    const char *bytes = get_file(path, &count);
    return bytes && count == strlen(text) && memcmp(bytes, text, count) == 0;
}

/* Whether two files exist and are equal. */
static int same_files(const char *a, const char *b)
{
    size_t count_a, count_b;
    const char *bytes_a = get_file(a, &count_a), *bytes_b = get_file(b, &count_b);
    return bytes_a && bytes_b && count_a == count_b && memcmp(bytes_a, bytes_b, count_a) == 0;
}

/* Removes a file, or a folder with its contents. */
static void remove_tree(const char *path)
{
    struct dirent *entry;
    DIR *inside = remove(path) == 0 || errno == ENOENT ? NULL : opendir(path);
    if (!inside) return;
    while ((entry = readdir(inside)) != NULL) {
        char name[4200];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        remove_tree(name);
    }
    closedir(inside);
    if (remove(path) != 0) printf("%s stays: %s\n", path, strerror(errno));
}

static void make_folder(void)
{
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/saeclip-tests-XXXXXX", base && *base ? base : "/tmp");
    if (!mkdtemp(folder)) need("%s", folder);
}

int mknod(const char *path, mode_t mode, dev_t device);      /* XSI: not in POSIX's own headers */

/* The device "full" or "null" to write to; NULL if there is none. Root gets a node in the temporary
 * folder, since a faulty program could replace the machine's own. */
static const char *device(const char *name)
{
    struct stat about;
    static char ours[2][300];
    int full = strcmp(name, "full") == 0;
    const char *path = ours[full], *system = full ? "/dev/full" : "/dev/null";
    snprintf(ours[full], sizeof ours[full], "%s/%s", folder, name);
    if (stat(system, &about) != 0 || !S_ISCHR(about.st_mode)) return NULL;
    if (geteuid() != 0) return system;
    if (!exists(path) && mknod(path, S_IFCHR | 0666, about.st_rdev) != 0) return NULL;
    int opened = open(path, O_WRONLY);               /* a file system may forbid it */
    if (opened >= 0) close(opened);
    return opened >= 0 ? path : NULL;
}

/* --- The program --- */

/* The outcome of the last run. status: the exit status, or minus the signal that ended it. */
static struct { int status; char *out, *err; size_t out_count, err_count; } ran;

/* The conditions of the runs that follow. Environment variables are inherited: call setenv() and
 * unsetenv() before. */
static struct {
    const char *input;               /* standard input; NULL: empty */
    const char *output;              /* standard output; NULL: ran.out, "|": a pipe that is not read */
    const char *folder;              /* the working directory; NULL: the tests' own */
    size_t memory;                   /* limit on memory in bytes; 0: none; not under a sanitizer */
    rlim_t file_bytes;               /* limit on the size of a file, as on a full disk; 0: none */
    int closed;                      /* bit i: standard stream i is closed */
    unsigned seconds;                /* until the program is killed */
} with = { .seconds = 1200 };

/* The instruction set that the tests were started with, from SAECLIP_ISA; NULL for the best one. */
static const char *given_isa(void)
{
    static char name[20];
    static int known;
    const char *now = getenv("SAECLIP_ISA");
    if (!known++ && now) snprintf(name, sizeof name, "%s", now);
    return *name ? name : NULL;
}

static void restore_isa(void)
{
    if (given_isa()) setenv("SAECLIP_ISA", given_isa(), 1);
    else unsetenv("SAECLIP_ISA");
}

static const char *other_program;    /* runs instead of saeclip while it is not NULL */

/* The program under test: ./saeclip, or the one that the environment variable SAECLIP names. */
static const char *program(void)
{
    const char *name = other_program ? other_program : getenv("SAECLIP");
    return name && *name ? name : "./saeclip";
}

static void set_limit(int resource, rlim_t most)
{
    struct rlimit both = { most, most };
    if (most && setrlimit(resource, &both) != 0) _exit(126);
}

/* In the new process: becomes the program under the conditions of `with`. */
static void become_program(const char *whole, char *const *arguments)
{
    const char *output = with.output ? with.output : in_folder(".out");
    int in = open(with.input ? with.input : "/dev/null", O_RDONLY), out, end[2];
    int err = open(in_folder(".err"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (strcmp(output, "|") != 0) out = open(output, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    else out = pipe(end) == 0 && close(end[0]) == 0 ? end[1] : -1;
    if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0) _exit(126);
    for (int i = 0; i < 64; i++)
        if (i > 2 || with.closed >> i & 1) close(i);
    set_limit(RLIMIT_AS, with.memory);
    set_limit(RLIMIT_FSIZE, with.file_bytes);
    if (with.folder && chdir(with.folder) != 0) _exit(126);
    alarm(with.seconds);
    execv(whole, arguments);
    _exit(127);
}

/* Starts the program with arguments (its own name first, NULL last) in the background. */
static pid_t start_list(char *const *arguments)
{
    char whole[8400];
    snprintf(whole, sizeof whole, "%s", absolute_path(program()));
    remove(in_folder(".out"));
    remove(in_folder(".err"));
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) need("fork");
    if (child == 0) become_program(whole, arguments);
    return child;
}

/* Waits for the program's end; returns its status. */
static int end_program(pid_t child)
{
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) need("waitpid");
    ran.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    if (ran.status == 126 || ran.status == 127) need("%s could not be started", program());
    free(ran.out);
    free(ran.err);
    ran.out = read_whole(in_folder(".out"), &ran.out_count);
    ran.err = read_whole(in_folder(".err"), &ran.err_count);
    if (!ran.out) ran.out = strdup("");          /* written elsewhere, or killed before it was opened */
    if (!ran.err) ran.err = strdup("");
    if (!ran.out || !ran.err) need("memory");
    return ran.status;
}

static int run_list(char *const *arguments) { return end_program(start_list(arguments)); }

/* Starts the program with arguments in one line, split at blanks, without its own name; a path with a
 * blank needs start_list(). */
SC_PRINTF(1, 2) static pid_t start_program(const char *format, ...)
{
    static char line[65536];
    char *arguments[256], *rest = line;
    int count = 0;
    va_list list;
    va_start(list, format);
    vsnprintf(line, sizeof line, format, list);
    va_end(list);
    arguments[count++] = (char *)(uintptr_t)program();
    for (char *word; count < 255 && (word = strtok_r(rest, " ", &rest)) != NULL;)
        arguments[count++] = word;
    arguments[count] = NULL;
    return start_list(arguments);
}

/* The same in the foreground. Returns the status. */
SC_PRINTF(1, 2) static int run(const char *format, ...)
{
    static char line[65536];
    va_list list;
    va_start(list, format);
    vsnprintf(line, sizeof line, format, list);
    va_end(list);
    return end_program(start_program("%s", line));
}

/* Runs the program and checks that its status is 0. */
SC_PRINTF(1, 2) static int works(const char *format, ...)
{
    static char line[65536];
    va_list list;
    va_start(list, format);
    vsnprintf(line, sizeof line, format, list);
    va_end(list);
    int status = run("%s", line);
    return check(status == 0, "saeclip %s: status %d, %s", line, status, ran.err);
}

/* Runs the program and checks that it refuses: the status, one line on standard error that contains a
 * text, and nothing on standard output. */
SC_PRINTF(3, 4) static int refuses(int status, const char *text, const char *format, ...)
{
    static char line[65536];
    va_list list;
    va_start(list, format);
    vsnprintf(line, sizeof line, format, list);
    va_end(list);
    run("%s", line);
    const char *end = strchr(ran.err, '\n');
    return check(ran.status == status && strncmp(ran.err, "saeclip: ", 9) == 0 && end && !end[1]
                 && strstr(ran.err, text) && ran.out_count == 0,
                 "saeclip %s: status %d and a line with '%s' expected, got %d and %s", line, status,
                 text, ran.status, ran.err);
}

/* Whether a program on this machine really decodes an image file, of those that saeclip would start: the
 * format's own decoder, or "" for none, and ImageMagick. A program of that name may be there and do nothing. */
static int decodes(const char *decoder, const char *path)
{
    char command[2000];
    snprintf(command, sizeof command, "for decoder in %s 'magick - ppm:-' 'convert - ppm:-'; do"
             " case $($decoder 2>/dev/null <%s | head -c 2) in P[1-6]) exit 0;; esac; done; exit 1", decoder, path);
    return system(command) == 0;
}

/* The same for a format, "JPEG" or "PNG", with a file of one pixel. */
static int can_decode(const char *format)
{
#define FF "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"
    static const char jpeg[] = "\xff\xd8\xff\xdb\0\x43\0" FF FF FF FF "\xff\xc0\0\x0b\x08\0\1\0\1\1\1\x11\0"
        "\xff\xc4\0\x14\0\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" "\xff\xc4\0\x14\x10\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        "\xff\xda\0\x08\1\1\0\0\x3f\0\x3f\xff\xd9";
    static const char png[] = "\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\1\0\0\0\1\1\3\0\0\0\x25\xdb\x56\xca"
        "\0\0\0\3PLTE\x80\x80\x80\x90\x74\x3d\x31\0\0\0\x0aIDAT\x08\x99\x63\x60\0\0\0\2\0\1\xf4\x71\x64\xa6"
        "\0\0\0\0IEND\xae\x42\x60\x82";
#undef FF
    int is_jpeg = strcmp(format, "JPEG") == 0;
    const char *path = in_folder(".pixel");
    if (is_jpeg) put_file(path, jpeg, sizeof jpeg - 1);
    else put_file(path, png, sizeof png - 1);
    return decodes(is_jpeg ? "djpeg" : "pngtopnm", path);
}

/* --- Numbers --- */

/* A tensor's values as float64, whatever its type; NULL (and a failed check) if the file has no such
 * tensor. 16 may be in use at a time. */
static double *numbers_of(const char *path, const char *name, size_t *count)
{
    static double *kept[16];
    static int turn;
    sc_safetensors file;
    *count = 0;
    if (!check(sc_safetensors_open(&file, path) == SC_OK, "%s cannot be read", path)) return NULL;
    const sc_tensor *t = sc_tensor_find(&file, name);
    double *out = NULL;
    if (check(t != NULL, "%s has no tensor %s", path, name)) {
        free(kept[turn = (turn + 1) % 16]);
        out = kept[turn] = malloc((t->count + 1) * sizeof *out);
        for (size_t i = 0; i < t->count; i++) {
            float value;
            int64_t whole = 0;
            uint64_t bits = 0;
            if (t->dtype == SC_F64) {
                for (int b = 0; b < 8; b++) bits |= (uint64_t)t->data[8 * i + (size_t)b] << 8 * b;
                memcpy(&out[i], &bits, sizeof bits);
            } else if (t->dtype < SC_F64) {
                out[i] = sc_tensor_floats(&file, t, i, 1, &value) == SC_OK ? (double)value : (double)NAN;
            } else out[i] = sc_tensor_integers(&file, t, i, 1, &whole) == SC_OK ? (double)whole : (double)NAN;
        }
        *count = t->count;
    }
    sc_safetensors_close(&file);
    return out;
}

/* The largest difference over the largest value: tolerances for golden files are given in this. */
static double off(const double *a, const double *b, size_t count)
{
    double worst = 0, largest = 0;
    for (size_t i = 0; i < count; i++) {
        double error = fabs(a[i] - b[i]), value = fabs(b[i]);
        if (!(error <= worst)) worst = error;        /* a NaN stays */
        if (value > largest) largest = value;
    }
    return worst == 0 ? 0 : largest > 0 ? worst / largest : (double)INFINITY;
}

/* Checks tensor `name` of a file against tensor `golden` of another. */
static void check_tensor(const char *path, const char *name, const char *golden_path,
                         const char *golden, double tolerance)
{
    size_t count, golden_count;
    const double *a = numbers_of(path, name, &count), *b = numbers_of(golden_path, golden, &golden_count);
    if (!a || !b || !check(count == golden_count, "%s: %s has %zu values, %s has %zu", path, name,
                           count, golden_path, golden_count)) return;
    double error = off(a, b, count);
    check(error <= tolerance, "%s: %s is off %s's %s by %.2g, more than %g", path, name, golden_path,
          golden, error, tolerance);
}

/* The number in a row of a CSV file (from 0, after the header) in the named column; NaN if there is
 * none. A cell may be quoted, but must not contain a comma. */
static double csv_number(const char *text, size_t row, const char *column)
{
    size_t at = 0, width = strlen(column);
    const char *cell = text;
    while (strncmp(cell, column, width) != 0 || (cell[width] != ',' && cell[width] != '\n')) {
        cell += strcspn(cell, ",\n");
        if (*cell++ != ',') return (double)NAN;
        at++;
    }
    for (cell = text; row + 1 > 0; row--) {
        cell += strcspn(cell, "\n");
        if (*cell++ == '\0') return (double)NAN;
        if (row == 0) break;
    }
    for (; at > 0; at--) {
        cell += strcspn(cell, ",\n");
        if (*cell++ != ',') return (double)NAN;
    }
    char *end;
    double value = strtod(cell, &end);
    return end == cell ? (double)NAN : value;
}

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Random numbers for tests (xorshift64*, Vigna, 2016). */
static uint64_t test_random_state = 88172645463325252u;

static uint64_t random64(void)
{
    test_random_state ^= test_random_state >> 12;
    test_random_state ^= test_random_state << 25;
    test_random_state ^= test_random_state >> 27;
    return test_random_state * 2685821657736338717u;
}

static float random_float(void) { return (float)(int32_t)(random64() >> 32) * 0x1p-31f; } /* [-1, 1) */

#endif
