/* Faults: `make faults`, or build/guard_faults [ROW|rows|damaged|disk|kill ...] in the checkout's root.
 *
 * saeclip.c is compiled into this program with every call that may fail (memory, files, names, threads, children)
 * replaced by one that counts. Then call i of a run is made to fail, for every i. The run must end with status 1 and
 * one line, or with status 0 and the right bytes, without a half-written file, a NAME.tmp, or a change to an older
 * file, and without a leak or an open descriptor, mapping or child. Each row of `rows` is run in three modes:
 *     once     files of an earlier run exist; this one call fails
 *     from     no files exist; from this call on all calls of its kind fail, as on a full disk
 *     die      (training only) the process is killed at this call; the same command then goes on from there
 * Then checkpoints are damaged, the disk is too small for one, and training is killed 200 times at random moments:
 * the resumed run must end with the same bytes. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif

#include "../saeclip.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>               /* it declares posix_memalign(), which is replaced below */
#endif

#if defined(__GNUC__)
#define SC_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define SC_PRINTF(text, first)
#endif
#include "check.h"

int saeclip_main(int argc, char **argv);

/* ------------------------------------------------------------------------------------------------------
 * The seam
 * ------------------------------------------------------------------------------------------------------ */

enum { FAULT_MEMORY, FAULT_OPENING, FAULT_READING, FAULT_WRITING, FAULT_NAMES, FAULT_STARTING, FAULT_KINDS };
enum { FAULT_COUNTING, FAULT_ONCE, FAULT_FROM, FAULT_DIE };

static const char *const kind_names[] = { "memory", "opening", "reading", "writing", "names", "starting" };
static const char *const mode_names[] = { "counting", "once", "from", "die" };

enum { FAULT_MOST_LINES = 20000, FAULT_MOST_VERSIONS = 100, FAULT_MOST_SPOILED = 64 };

/* About the current run. In shared memory: the child, which runs, writes it, and the parent reads it. */
static struct seam {
    int mode;
    long target, calls;              /* the call to fail, from 1; calls so far */
    int kind, line;                  /* of the call that failed; line 0: none did */
    char name[32];                   /* the function called */
    long of_kind[FAULT_KINDS];
    int mappings, descriptors, children;
    uint64_t version[FAULT_MOST_VERSIONS]; /* digests of the files that a run without faults renamed */
    int versions;
} *seam;

static pthread_mutex_t seam_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned seam_lines[FAULT_MOST_LINES];
static FILE *seam_spoiled[FAULT_MOST_SPOILED];

/* Whether this call is to fail, with errno. Of a line that is called very often, such as one that reads a
 * header's characters, the first 6 calls count, then every 101st. */
static int seam_hit(int kind, const char *name, int line, int error)
{
    pthread_mutex_lock(&seam_lock);
    unsigned before = seam_lines[line % FAULT_MOST_LINES]++;
    int counted = line <= 2 || before < 6 || before % 101 == 0, fails = 0;
    if (counted) seam->calls++, seam->of_kind[kind]++;
    if (counted && seam->calls == seam->target && seam->mode != FAULT_COUNTING) {
        if (seam->mode == FAULT_DIE) kill(getpid(), SIGKILL);
        seam->kind = kind;
        seam->line = line;
        snprintf(seam->name, sizeof seam->name, "%s", name);
        fails = 1;
    } else if (seam->mode == FAULT_FROM && seam->line && kind == seam->kind) fails = 1;
    pthread_mutex_unlock(&seam_lock);
    if (fails) errno = error;
    return fails;
}

/* Whether a stream has failed: as in stdio, it stays in that state until it is closed. */
static int seam_is_spoiled(FILE *file)
{
    int found = 0;
    pthread_mutex_lock(&seam_lock);
    for (int i = 0; i < FAULT_MOST_SPOILED; i++) found |= seam_spoiled[i] == file;
    pthread_mutex_unlock(&seam_lock);
    return found;
}

/* Replaces the first entry `file` of the list of failed streams by `as`. */
static void seam_mark(FILE *file, FILE *as)
{
    int i = 0;
    pthread_mutex_lock(&seam_lock);
    while (i < FAULT_MOST_SPOILED && seam_spoiled[i] != file) i++;
    if (i == FAULT_MOST_SPOILED) abort();
    seam_spoiled[i] = as;
    pthread_mutex_unlock(&seam_lock);
}

static int seam_stream_hit(FILE *file, int kind, const char *name, int line, int error)
{
    if (file == stderr || !seam_hit(kind, name, line, error)) return 0;
    if (!seam_is_spoiled(file)) seam_mark(NULL, file);
    errno = error;
    return 1;
}

/* Loses the last byte written, so that a program that ignores the error leaves a file that is too short. */
static void seam_lose(int descriptor)
{
    struct stat about;
    int error = errno;
    if (fstat(descriptor, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0)
        if (ftruncate(descriptor, about.st_size - 1) != 0) abort();
    errno = error;
}

static int seam_fflush(FILE *file, int line)
{
    if (!seam_stream_hit(file, FAULT_WRITING, "fflush", line, ENOSPC)) return fflush(file);
    fflush(file);
    if (fileno(file) >= 0) seam_lose(fileno(file));
    errno = ENOSPC;
    return EOF;
}

static int seam_fsync(int descriptor, int line)
{
    if (!seam_hit(FAULT_WRITING, "fsync", line, EIO)) return 0;        /* the disk itself is not tested */
    seam_lose(descriptor);
    return -1;
}

static int seam_fclose(FILE *file, int line)
{
    int fails = seam_hit(FAULT_WRITING, "fclose", line, ENOSPC), spoiled = seam_is_spoiled(file);
    if (spoiled) seam_mark(file, NULL);
    int status = fclose(file);
    if (fails) errno = ENOSPC;
    return fails ? EOF : status;
}

static uint64_t digest_of(const char *path)
{
    size_t count;
    const char *bytes = get_file(path, &count);
    return bytes ? digest_bytes(bytes, count) : 0;
}

static int seam_rename(const char *from, const char *to, int line)
{
    if (seam_hit(FAULT_NAMES, "rename", line, EIO)) return -1;
    if (seam->mode == FAULT_COUNTING && seam->versions < FAULT_MOST_VERSIONS)
        seam->version[seam->versions++] = digest_of(from);
    return rename(from, to);
}

static ssize_t seam_read(int descriptor, void *bytes, size_t count)
{
    return seam_hit(FAULT_READING, "read", 2, EIO) ? -1 : read(descriptor, bytes, count);
}

static int seam_clock(struct timespec *now)
{
    *now = (struct timespec){ 1, 0 };
    return 0;
}

static void *seam_mapped(void *map)
{
    if (map != MAP_FAILED) seam->mappings++;
    return map;
}

/* ------------------------------------------------------------------------------------------------------
 * What is run
 * ------------------------------------------------------------------------------------------------------ */

/* Each row runs in an empty folder beside the inputs in ../in (see make_inputs). before: the files that exist in mode
 * `once`: NAME a text, NAME/ a folder with a text, =FILE NAME a copy of an input. resume: appended to the command when
 * it is repeated after a failure. says: status 0 with this text on standard output is correct too. */
typedef struct { const char *name, *command, *before, *resume, *decoder, *says; int trains; } row;

#define FAULT_RELU "train --quiet --threads 1 --acts ../in/acts --arch relu --latents 20 --batch 3 --lr 1e-2 " \
             "--warmup 2 --ghost --dead-window 1 --b-dec geomedian "
#define FAULT_TOPK "train --quiet --threads 1 --acts ../in/acts --arch topk --k 4 --latents 20 --batch 3 --lr 1e-2 "
#define FAULT_SAVE "--log log.csv --checkpoint ckpt --checkpoint-every 2 "

static const row rows[] = {
    { .name = "version", .command = "--version" },
    { .name = "help", .command = "train --help" },
    { .name = "info", .command = "info --quiet" },
    { .name = "info-model", .command = "info --quiet ../in/model", .says = "that cannot be used: " },
    { .name = "info-sae", .command = "info --quiet ../in/sae" },
    { .name = "pack", .command = "pack --quiet --threads 1 ../in/photos --size 12 -o out", .before = "out" },
    { .name = "pack-list", .command = "pack --quiet --threads 1 ../in/list.txt --square 9 -o out",
      .before = "out" },
    { .name = "pack-decoded", .command = "pack --quiet --threads 1 --size 8 ../in/decoded -o out",
      .before = "out", .decoder = "tail -c +9" },
    { .name = "extract", .command = "extract --quiet --threads 1 -m ../in/model --layer 2 --hook mlp "
      "../in/photos --dtype f16 -o out", .before = "out" },
    { .name = "extract-threads", .command = "extract --quiet --threads 3 -m ../in/model --layer 1 --hook attn "
      "../in/set.safetensors --tokens patches -o out", .before = "out" },
    { .name = "train", .command = FAULT_RELU "--steps 5 -o out " FAULT_SAVE, .before = "out =log3.csv log.csv", .resume = "--resume",
      .trains = 1 },
    { .name = "train-resumed", .command = FAULT_TOPK "--steps 5 -o out --resume " FAULT_SAVE,
      .before = "out =ckpt3 ckpt =ckpt2 ckpt.prev =log3.csv log.csv", .resume = "", .trains = 1 },
    { .name = "train-photos", .command = "train --quiet --threads 2 -m ../in/model --layer 2 --hook attn "
      "../in/photos --latents 8 --batch 3 --steps 3 -o out", .before = "out" },
    { .name = "train-init", .command = "train --quiet --threads 1 --acts ../in/acts --init ../in/sae --batch 2 "
      "--steps 2 --order sequential -o out", .before = "out" },
    { .name = "encode", .command = "encode --quiet --threads 1 -s ../in/topk --acts ../in/acts --dense "
      "--reconstruction --image-means -o out", .before = "out" },
    { .name = "eval", .command = "eval --quiet --threads 1 -s ../in/sae -s ../in/topk --acts ../in/acts" },
    { .name = "eval-also", .command = "eval --quiet --threads 1 -s ../in/sae -m ../in/model ../in/photos --also "
      "../in/photos/birds --format json" },
    { .name = "stats", .command = "stats --quiet --threads 1 -s ../in/sae --acts ../in/acts --class-counts "
      "-o out", .before = "out" },
    { .name = "stats-threads", .command = "stats --quiet --threads 3 -s ../in/topk -m ../in/model ../in/photos "
      "-o out", .before = "out" },
    { .name = "merge", .command = "merge --quiet --threads 1 ../in/half1 ../in/half2 -o out", .before = "out" },
    { .name = "top", .command = "top --quiet --threads 1 -s ../in/sae -t ../in/stats -m ../in/model ../in/photos "
      "-l 1,5 --mask value -o out", .before = "out/" },
    { .name = "mask", .command = "mask --quiet --threads 1 -s ../in/sae -m ../in/model ../in/photos/cats -l 1 "
      "-o out", .before = "out/" },
    { .name = "mask-class", .command = "mask --quiet --threads 1 -s ../in/sae -t ../in/stats --acts ../in/acts "
      "-l 1,2 --class 1 --mask top -o out", .before = "out/" },
    { .name = "explain", .command = "explain --quiet --threads 1 -s ../in/sae -m ../in/model -t ../in/stats "
      "../in/photos/cats/a.ppm --patch 1,2 -o out", .before = "out/" },
    { .name = "plot-curves", .command = "plot curves ../in/log3.csv -o out", .before = "out" },
    { .name = "plot-latents", .command = "plot latents ../in/stats -o out", .before = "out" },
    { .name = "plot-activations", .command = "plot activations ../in/stats -o out", .before = "out" },
    { .name = "plot-counts", .command = "plot counts ../in/stats -o out", .before = "out" },
    { .name = "atlas", .command = "atlas --quiet --threads 1 -s ../in/sae -t ../in/stats -m ../in/model "
      "../in/photos --limit 6 -o out", .before = "out/" },
    { .name = "zeroshot-sae", .command = "zeroshot --quiet --threads 1 -s ../in/sae -m ../in/model ../in/photos" },
    { .name = "zeroshot", .command = "zeroshot --quiet --threads 1 -m ../in/model ../in/photos --format json" },
    { .name = "compare", .command = "compare --quiet ../in/sae ../in/sae" },
};

enum { FAULT_ROWS = sizeof rows / sizeof *rows, FAULT_MOST_FILES = 64 };

static void put_picture(const char *path, unsigned seed, const char *magic)
{
    static unsigned char bytes[64 + 3 * 64 * 64];
    size_t width = 40 + seed % 3 * 3, height = 40 + seed % 4 * 2;
    int head = sprintf((char *)bytes, "%sP6\n%zu %zu\n255\n", magic, width, height);
    for (size_t i = 0; i < 3 * width * height; i++)
        bytes[(size_t)head + i] = (unsigned char)(seed * 37 + i * (seed + 3) % 251 + i / 7 * seed);
    put_file(path, bytes, (size_t)head + 3 * width * height);
}

static void copy_file(const char *from, const char *to)
{
    size_t count;
    const char *bytes = get_file(from, &count);
    if (!bytes) need("%s", from);
    put_file(to, bytes, count);
}

/* Makes the inputs with ./saeclip, in which no call fails. */
static void make_inputs(void)
{
    static const char *const folders[] = { "in", "work", "in/photos", "in/photos/birds", "in/photos/cats",
                                           "in/photos/dogs", "in/decoded" };
    static const char *const pictures[] = { "birds/a", "birds/b", "birds/c", "cats/a", "cats/b", "dogs/a" };
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) mkdir(in_folder("%s", folders[i]), 0777);
    for (unsigned i = 0; i < sizeof pictures / sizeof *pictures; i++)
        put_picture(in_folder("in/photos/%s.ppm", pictures[i]), i + 1, "");
    put_text(in_folder("in/list.txt"), "# two\nphotos/cats/a.ppm\t1\nphotos/birds/c.ppm\t0\n");
    put_picture(in_folder("in/decoded/a.png"), 3, "\x89PNG\r\n\x1a\n");
    put_picture(in_folder("in/decoded/b.png"), 4, "\x89PNG\r\n\x1a\n");
    copy_file(GOLDEN "clip_timm.safetensors", in_folder("in/model"));
    const char *in = in_folder("in");
    works("pack --quiet %s/photos --size 32 -o %s/set.safetensors", in, in);
    works("extract --quiet -m %s/model --layer 2 --hook mlp %s/photos -o %s/acts", in, in, in);
    works("train --quiet --acts %s/acts --latents 20 --steps 3 --batch 4 -o %s/sae", in, in);
    works("train --quiet --acts %s/acts --latents 20 --arch topk --k 4 --steps 3 --batch 4 -o %s/topk", in, in);
    works("stats --quiet -s %s/sae --acts %s/acts -o %s/stats", in, in, in);
    for (int i = 1; i <= 2; i++)
        works("stats --quiet -s %s/sae --acts %s/acts --shard %d/2 -o %s/half%d", in, in, i, in, i);
    char recipe[500] = FAULT_TOPK, *place = strstr(recipe, "../in");
    memmove(place + strlen(in), place + 5, strlen(place + 5) + 1);
    memcpy(place, in, strlen(in));
    works("%s--steps 3 -o %s/ignored --log %s/log3.csv --checkpoint %s/ckpt3 --checkpoint-every 2", recipe, in,
          in, in);
    if (rename(in_folder("in/ckpt3.prev"), in_folder("in/ckpt2")) != 0) need("no checkpoint before the last");
}

/* ------------------------------------------------------------------------------------------------------
 * A run, and what it left
 * ------------------------------------------------------------------------------------------------------ */

typedef struct { char name[200]; uint64_t digest; } found_file;
typedef struct { found_file file[FAULT_MOST_FILES]; int count; } tree;

static tree before, expected, left;  /* before the run; after a run without faults; after this one */
static struct seam reference;        /* of the run without a fault */
static char *expected_out, *expected_log;

static void list_tree(tree *t, const char *path, const char *name)
{
    struct dirent *entry;
    DIR *inside = opendir(path);
    if (!inside) need("%s", path);
    while ((entry = readdir(inside)) != NULL) {
        char below[4200], inner[200];
        struct stat about;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
        snprintf(inner, sizeof inner, "%s%.90s", name, entry->d_name);
        if (lstat(below, &about) != 0) need("%s", below);
        if (S_ISDIR(about.st_mode)) strcat(inner, "/");
        if (t->count == FAULT_MOST_FILES) need("more files than room");
        found_file *file = &t->file[t->count++];
        snprintf(file->name, sizeof file->name, "%s", inner);
        file->digest = S_ISDIR(about.st_mode) ? 1 : digest_of(below);
        if (S_ISDIR(about.st_mode)) list_tree(t, below, inner);
    }
    closedir(inside);
}

static const found_file *find_file(const tree *t, const char *name)
{
    for (int i = 0; i < t->count; i++)
        if (strcmp(t->file[i].name, name) == 0) return &t->file[i];
    return NULL;
}

static int ends_with(const char *text, const char *end)
{
    size_t length = strlen(text), n = strlen(end);
    return length >= n && strcmp(text + length - n, end) == 0;
}

/* Puts the files that a row needs into its folder. */
static void prepare_folder(const row *r, int mode)
{
    char words[400], *rest = words, *end;
    remove_tree(in_folder("work"));
    mkdir(in_folder("work"), 0777);
    snprintf(words, sizeof words, "%s", mode == FAULT_FROM || !r->before ? "" : r->before);
    for (char *word; (word = strtok_r(rest, " ", &rest)) != NULL;) {
        if (*word == '=') {
            char *name = strtok_r(rest, " ", &rest);
            copy_file(in_folder("in/%s", word + 1), in_folder("work/%s", name));
            continue;
        }
        if (*(end = word + strlen(word) - 1) == '/') {
            mkdir(in_folder("work/%s", word), 0777);
            strcpy(end, "/earlier");
        }
        put_text(in_folder("work/%s", word), "of an earlier run\n");
    }
    before.count = 0;
    list_tree(&before, in_folder("work"), "");
}

#if defined(__SANITIZE_ADDRESS__)
/* Freed memory is kept only shortly: a small process forks faster. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "quarantine_size_mb=4"; }

/* The search for leaks takes longer than most runs. It is skipped if as many bytes are allocated after the
 * run as before. */
size_t __sanitizer_get_current_allocated_bytes(void);
#define HEAP() __sanitizer_get_current_allocated_bytes()
#else
#define HEAP() (size_t)0
#endif

static void run_child(const row *r, const char *more)
{
    static char buffer[BUFSIZ];
    char line[2000], *words[128] = { (char[]){ "saeclip" } }, *rest = line;
    int count = 1;
    snprintf(line, sizeof line, "%s %s", r->command, more);
    for (char *word; count < 127 && (word = strtok_r(rest, " ", &rest)) != NULL;) words[count++] = word;
    int in = open("/dev/null", O_RDONLY);
    int out = open(in_folder(".out"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    int err = open(in_folder(".err"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0 || chdir(in_folder("work")) != 0) _exit(126);
    for (int i = 3; i < 64; i++) close(i);
    if (r->decoder) setenv("SAECLIP_DECODER", r->decoder, 1);
    setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
    alarm(20);
    size_t heap = HEAP();
    int status = saeclip_main(count, words);
    for (int i = 3; i < 64; i++) seam->descriptors += fcntl(i, F_GETFD) >= 0;
    seam->children = waitpid(-1, NULL, WNOHANG) >= 0;
    fflush(stdout);
    if (heap > 0 && HEAP() == heap) _exit(status);
    exit(status);
}

/* Runs a row with call `target` failing, in the folder as it is; returns its status. */
static int run_row(const row *r, const char *more, int mode, long target)
{
    int status;
    memset(seam, 0, sizeof *seam);
    seam->mode = mode;
    seam->target = target;
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) need("fork");
    if (child == 0) run_child(r, more);
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) need("waitpid");
    left.count = 0;
    list_tree(&left, in_folder("work"), "");
    free(ran.err);
    free(ran.out);
    ran.err = read_whole(in_folder(".err"), &ran.err_count);
    ran.out = read_whole(in_folder(".out"), &ran.out_count);
    return ran.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int is_one_line(const char *text)
{
    const char *end = strchr(text, '\n');
    return strncmp(text, "saeclip: ", 9) == 0 && end && !end[1] && !strstr(text, "(null)")
           && !strstr(text, "Success");
}

/* NAME.tmp may stay if it could not be removed or locked: it may belong to another process. */
static int temporary_may_stay(void)
{
    return strcmp(seam->name, "unlink") == 0 || strcmp(seam->name, "fcntl") == 0
           || strcmp(seam->name, "fstat") == 0 || (seam->mode == FAULT_FROM && seam->kind == FAULT_NAMES);
}

/* A failed run may leave files as they were, complete files, and the first rows of the log. Returns the name of
 * a file for which this does not hold, or NULL. */
static const char *spoiled_file(int killed)
{
    for (int i = 0; i < left.count; i++) {
        const found_file *file = &left.file[i];
        int whole = file->digest == 1;
        for (int b = 0; b < before.count; b++) whole |= file->digest == before.file[b].digest;
        for (int v = 0; v < reference.versions; v++) whole |= file->digest == reference.version[v];
        if (strcmp(file->name, "log.csv") == 0 && expected_log) {
            const char *log = get_file(in_folder("work/log.csv"), NULL);
            whole |= strncmp(log, expected_log, strlen(log)) == 0;
        }
        int may_stay = ends_with(file->name, ".tmp") && (killed || temporary_may_stay());
        if (!whole && !may_stay) return file->name;
        if (ends_with(file->name, ".tmp") && !may_stay) return file->name;
    }
    for (int i = 0; i < before.count; i++) {
        const char *name = before.file[i].name;      /* FILE exists while .prev is replaced */
        if (!find_file(&left, name) && !(killed && ends_with(name, ".prev"))) return name;
    }
    return NULL;
}

/* A file that differs from that of a run without faults, or NULL. The contents of .prev depend on earlier runs. */
static const char *other_file(void)
{
    for (int i = 0; i < expected.count; i++) {
        const found_file *file = find_file(&left, expected.file[i].name);
        if (ends_with(expected.file[i].name, ".prev")) continue;
        if (!file || file->digest != expected.file[i].digest) return expected.file[i].name;
    }
    for (int i = 0; i < left.count; i++) {
        const char *name = left.file[i].name;
        if (!find_file(&expected, name) && !ends_with(name, ".prev")
            && !(ends_with(name, ".tmp") && temporary_may_stay())) return name;
    }
    return NULL;
}

/* Checks a run in which a call failed. */
static void judge(const row *r, int mode, long target)
{
    const char *why = NULL, *which = "", *file;
    if (seam->line == 0 && mode != FAULT_DIE) why = ran.status == 0 ? NULL : "fails though no call did";
    if (mode == FAULT_DIE ? ran.status != -SIGKILL && ran.status != 0 : ran.status != 0 && ran.status != 1)
        why = "ends badly";
    else if (ran.status == 1 && !is_one_line(ran.err)) why = "does not say why in one line";
    else if (ran.status == 0 && (file = other_file()) != NULL) why = "ends well with another", which = file;
    else if (ran.status == 0 && strcmp(ran.out, expected_out) != 0
             && !(r->says && strstr(ran.out, r->says))) why = "ends well and prints something else";
    else if (ran.status != 0 && (file = spoiled_file(mode == FAULT_DIE)) != NULL) why = "spoils", which = file;
    else if (mode == FAULT_DIE) why = NULL;
    else if (seam->descriptors) why = "leaves a descriptor open";
    else if (seam->mappings) why = "leaves a mapping";
    else if (seam->children) why = "leaves a child";
    check(!why, "%s: call %ld, %s, failing (%s: %s in line %d): %s %s; status %d, %s", r->name, target,
          mode_names[mode], kind_names[seam->kind], seam->name, seam->line, why ? why : "", which, ran.status,
          ran.err);
}

/* After a failure the same command, run again, ends with the right files. */
static void judge_again(const row *r, int mode, long target)
{
    char name[sizeof seam->name];
    memcpy(name, seam->name, sizeof name);
    run_row(r, r->resume ? r->resume : "", FAULT_COUNTING, 0);
    const char *file = ran.status == 0 ? other_file() : "";
    check(ran.status == 0 && !file, "%s, given again after call %ld (%s) failed, %s: another '%s'; status %d, %s",
          r->name, target, name, mode_names[mode], file ? file : "", ran.status, ran.err);
}

static void expect(const row *r, int mode)
{
    prepare_folder(r, mode);
    run_row(r, "", FAULT_COUNTING, 0);
    check(ran.status == 0 && ran.err_count == 0, "%s: status %d, %s", r->name, ran.status, ran.err);
    reference = *seam;
    expected = left;
    free(expected_out);
    free(expected_log);
    expected_out = strdup(ran.out);
    const char *log = get_file(in_folder("work/log.csv"), NULL);
    expected_log = log ? strdup(log) : NULL;
}

static long injected[FAULT_KINDS], deaths, harmless;

static void harm_row(const row *r)
{
    long calls = 0;
    for (int mode = FAULT_ONCE; mode <= (r->trains ? FAULT_DIE : FAULT_FROM); mode++) {
        expect(r, mode);
        calls += reference.calls;
        for (long target = 1; target <= reference.calls; target++) {
            prepare_folder(r, mode);
            run_row(r, "", mode, target);
            judge(r, mode, target);
            if (mode == FAULT_DIE) deaths += ran.status == -SIGKILL;
            else if (seam->line) injected[seam->kind]++, harmless += ran.status == 0;
            if (ran.status != 0 && (r->resume || target % 5 == 0)) judge_again(r, mode, target);
        }
    }
    fprintf(stderr, "%-16s %ld faults\n", r->name, calls);
}

/* ------------------------------------------------------------------------------------------------------
 * Checkpoints: damaged ones, a full disk, kill -9 at any time
 * ------------------------------------------------------------------------------------------------------ */

/* Changes one byte of a checkpoint after another: either it is refused, with the name of the checkpoint before
 * it, or the byte has no effect. Training from the checkpoint before ends with the same bytes. */
static void damage_checkpoints(const row *r)
{
    size_t count, refused = 0;
    expect(r, FAULT_ONCE);
    char *bytes = read_whole(in_folder("in/ckpt3"), &count);
    for (size_t i = 0; i < count + 7; i += i < count ? 37 : 1) {
        prepare_folder(r, FAULT_ONCE);
        if (i < count) bytes[i] = (char)(bytes[i] ^ (1 << i % 8));
        put_file(in_folder("work/ckpt"), bytes, i < count ? count : count / 7 * (i - count));
        if (i < count) bytes[i] = (char)(bytes[i] ^ (1 << i % 8));
        before.count = 0;
        list_tree(&before, in_folder("work"), "");
        run_row(r, "", FAULT_COUNTING, 0);
        const char *file = ran.status ? spoiled_file(0) : other_file();
        check(!file && (ran.status == 0 || (ran.status == 1 && is_one_line(ran.err) &&
              strstr(ran.err, "; the checkpoint before it is ckpt.prev"))),
              "a checkpoint with byte %zu of %zu changed, or short: another '%s', status %d, %s", i, count,
              file ? file : "", ran.status, ran.err);
        refused += ran.status != 0;
    }
    free(bytes);
    check(refused > count / 37 / 2, "only %zu of damaged checkpoints are refused", refused);
    rename(in_folder("work/ckpt.prev"), in_folder("work/ckpt"));
    run_row(r, "", FAULT_COUNTING, 0);
    check(ran.status == 0 && digest_of(in_folder("work/out")) == find_file(&expected, "out")->digest,
          "the checkpoint before goes on to another SAE: status %d, %s", ran.status, ran.err);
    fprintf(stderr, "%-16s %zu refused\n", "damaged", refused);
}

/* Starts ./saeclip in the folder "work". most: the size in bytes of the largest file that the disk holds; 0: any */
static pid_t start_in_work(const char *command, rlim_t most)
{
    with.folder = in_folder("work");
    with.file_bytes = most;
    with.seconds = 120;
    pid_t child = start_program("%s", command);
    with.folder = NULL;
    with.file_bytes = 0;
    return child;
}

/* A log without its last column, the seconds. */
static char *log_without_times(void)
{
    char *log = read_whole(in_folder("work/log.csv"), &(size_t){ 0 }), *to = log;
    for (const char *line = log; line && *line; line += strcspn(line, "\n") + 1) {
        size_t length = strcspn(line, "\n");
        while (length > 0 && line[length] != ',') length--;
        memmove(to, line, length);
        to += length;
        *to++ = '\n';
    }
    if (log) *to = '\0';
    return log;
}

#define FAULT_LONG FAULT_RELU "--steps 1500 -o out --log log.csv --checkpoint ckpt --checkpoint-every 4 "

static char *whole_log;              /* the log of a run that is not killed; its SAE is in/whole */

static void expect_long(void)
{
    remove_tree(in_folder("work"));
    mkdir(in_folder("work"), 0777);
    end_program(start_in_work(FAULT_LONG, 0));
    check(ran.status == 0, "the run that is not killed: status %d, %s", ran.status, ran.err);
    copy_file(in_folder("work/out"), in_folder("in/whole"));
    whole_log = log_without_times();
}

/* Checks that the files are those of the run that is not killed. */
static void check_long(const char *what)
{
    char *log = log_without_times();
    left.count = 0;
    list_tree(&left, in_folder("work"), "");
    check(ran.status == 0, "%s, resumed: status %d, %s", what, ran.status, ran.err);
    check(same_files(in_folder("work/out"), in_folder("in/whole")), "%s, resumed: another SAE", what);
    check(log && strcmp(log, whole_log) == 0, "%s, resumed: another log", what);
    check(left.count == 4, "%s, resumed: %d files where out, log.csv, ckpt and ckpt.prev were expected", what,
          left.count);
    free(log);
}

/* Kills training after 1 to 120 ms, resumes it and kills it again until a run ends by itself; then from the start. */
static void kill_training(int wanted)
{
    int kills = 0, laps = 0;
    test_random_state = 9;
    for (; kills < wanted; laps++) {
        remove_tree(in_folder("work"));
        mkdir(in_folder("work"), 0777);
        do {
            pid_t child = start_in_work(FAULT_LONG "--resume", 0);
            long wait = 1 + (long)(random64() % 120);
            nanosleep(&(struct timespec){ 0, wait * 1000000 }, NULL);
            kill(child, SIGKILL);
            kills += end_program(child) == -SIGKILL;
        } while (ran.status == -SIGKILL && kills < wanted);
        if (ran.status == -SIGKILL) end_program(start_in_work(FAULT_LONG "--resume", 0));
        check_long("killed at random");
    }
    printf("killed at random moments: %d times in %d runs\n", kills, laps);
}

/* The next checkpoint does not fit on the disk: the one before stays, and training resumes from it. */
static void fill_disk(const row *r)
{
    size_t count;
    expect(r, FAULT_ONCE);
    remove_tree(in_folder("work"));
    mkdir(in_folder("work"), 0777);
    copy_file(in_folder("in/ckpt3"), in_folder("work/ckpt"));
    get_file(in_folder("work/ckpt"), &count);
    end_program(start_in_work(r->command, (rlim_t)count - 100));
    check(ran.status == 1 && is_one_line(ran.err) && strstr(ran.err, "ckpt: cannot be written: "),
          "a disk too small for a checkpoint: status %d, %s", ran.status, ran.err);
    check(same_files(in_folder("work/ckpt"), in_folder("in/ckpt3")) && !exists(in_folder("work/ckpt.tmp")),
          "a disk too small for a checkpoint: the one before is lost, or half of one left");
    end_program(start_in_work(r->command, 0));
    check(ran.status == 0 && digest_of(in_folder("work/out")) == find_file(&expected, "out")->digest,
          "after a full disk: status %d, %s", ran.status, ran.err);
}

static void make_seam(void)
{
    int file = open(in_folder(".seam"), O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof *seam) != 0) need("shared memory");
    seam = mmap(NULL, sizeof *seam, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (seam == MAP_FAILED) need("shared memory");
    close(file);
}

static int is_wanted(const char *name, int count, char **names)
{
    for (int n = 1; n < count; n++)
        if (strcmp(names[n], name) == 0) return 1;
    return count < 2;
}

int main(int count, char **names)
{
    const row *resumed = rows;
    while (strcmp(resumed->name, "train-resumed") != 0) resumed++;
    make_folder();
    make_seam();
    make_inputs();
    for (size_t i = 0; i < FAULT_ROWS; i++)
        if (is_wanted(rows[i].name, count, names) || (count == 2 && strcmp(names[1], "rows") == 0))
            harm_row(&rows[i]);
    if (is_wanted("damaged", count, names)) damage_checkpoints(resumed);
    if (is_wanted("disk", count, names)) fill_disk(resumed);
    if (is_wanted("kill", count, names)) {
        expect_long();
        kill_training(200);
    }
    printf("faults injected:");
    for (int k = 0; k < FAULT_KINDS; k++) printf("%s %s %ld", k ? "," : "", kind_names[k], injected[k]);
    printf("; %ld did no harm; killed at a call: %ld\n", harmless, deaths);
    free(whole_log);
    remove_tree(folder);
    printf("%zu passed, %zu failed, %zu skipped\n", passed, failed, skipped);
    return failed != 0;
}

/* ------------------------------------------------------------------------------------------------------
 * The program, its calls replaced. A macro's own name is not replaced again inside it.
 * ------------------------------------------------------------------------------------------------------ */

const char *sc_error(void);

#undef putc
#undef putchar
#undef ferror
#undef getc_unlocked
#define FAULT(kind, name, error) seam_hit(kind, name, __LINE__, error)
#define STREAM(file, kind, name, error) seam_stream_hit(file, kind, name, __LINE__, error)
#define FIRST(a, ...) (a)

#define posix_memalign(p, a, n) (FAULT(FAULT_MEMORY, "posix_memalign", ENOMEM) ? ENOMEM : posix_memalign(p, a, n))
#define strdup(t) (FAULT(FAULT_MEMORY, "strdup", ENOMEM) ? NULL : strdup(t))
#define scandir(f, l, v, b) (FAULT(FAULT_MEMORY, "scandir", ENOMEM) ? -1 : scandir(f, l, v, b))
#define open_memstream(p, n) (FAULT(FAULT_MEMORY, "open_memstream", ENOMEM) ? NULL : open_memstream(p, n))
#define mmap(...) (FAULT(FAULT_MEMORY, "mmap", ENOMEM) ? MAP_FAILED : seam_mapped(mmap(__VA_ARGS__)))
#define munmap(p, n) (seam->mappings--, munmap(p, n))

#define open(...) (FAULT(FAULT_OPENING, "open", EMFILE) ? -1 : open(__VA_ARGS__))
#define fopen(p, m) (FAULT(FAULT_OPENING, "fopen", EMFILE) ? NULL : fopen(p, m))
#define fdopen(d, m) (FAULT(FAULT_OPENING, "fdopen", ENOMEM) ? NULL : fdopen(d, m))
#define tmpfile() (FAULT(FAULT_OPENING, "tmpfile", EMFILE) ? NULL : tmpfile())
#define fstat(d, s) (FAULT(FAULT_OPENING, "fstat", EIO) ? -1 : fstat(d, s))
#define pipe(e) (FAULT(FAULT_OPENING, "pipe", EMFILE) ? -1 : pipe(e))
#define fcntl(d, ...)                                                                                       \
    (FIRST(__VA_ARGS__, 0) == F_SETLK && FAULT(FAULT_OPENING, "fcntl", ENOLCK) ? -1 : fcntl(d, __VA_ARGS__))
#define access(p, m) (FAULT(FAULT_OPENING, "access", EIO) ? -1 : access(p, m))

#define fread(p, s, n, f) (STREAM(f, FAULT_READING, "fread", EIO) ? 0 : fread(p, s, n, f))
#define fgets(t, n, f) (STREAM(f, FAULT_READING, "fgets", EIO) ? NULL : fgets(t, n, f))
#define getc_unlocked(f) (STREAM(f, FAULT_READING, "getc", EIO) ? EOF : getc_unlocked(f))
#define read seam_read               /* also what members are called */
#define lseek(d, o, w) (FAULT(FAULT_READING, "lseek", EIO) ? -1 : lseek(d, o, w))

#define fwrite(p, s, n, f) (STREAM(f, FAULT_WRITING, "fwrite", ENOSPC) ? 0 : fwrite(p, s, n, f))
#define fputs(t, f) (STREAM(f, FAULT_WRITING, "fputs", ENOSPC) ? EOF : fputs(t, f))
#define putc(c, f) (STREAM(f, FAULT_WRITING, "putc", ENOSPC) ? EOF : putc(c, f))
#define fprintf(f, ...) (STREAM(f, FAULT_WRITING, "fprintf", ENOSPC) ? -1 : fprintf(f, __VA_ARGS__))
#define printf(...) (STREAM(stdout, FAULT_WRITING, "printf", ENOSPC) ? -1 : printf(__VA_ARGS__))
#define puts(t) (STREAM(stdout, FAULT_WRITING, "puts", ENOSPC) ? EOF : puts(t))
#define putchar(c) (STREAM(stdout, FAULT_WRITING, "putchar", ENOSPC) ? EOF : putchar(c))
#define fseeko(f, o, w) (FAULT(FAULT_WRITING, "fseeko", EIO) ? -1 : fseeko(f, o, w))
#define fseek(f, o, w) (FAULT(FAULT_WRITING, "fseek", EIO) ? -1 : fseek(f, o, w))
#define ftruncate(d, n) (FAULT(FAULT_WRITING, "ftruncate", EIO) ? -1 : ftruncate(d, n))
#define fflush(f) seam_fflush(f, __LINE__)
#define fsync(d) seam_fsync(d, __LINE__)
#define fclose(f) seam_fclose(f, __LINE__)
#define ferror(f) (seam_is_spoiled(f) || ferror(f))

#define rename(a, b) seam_rename(a, b, __LINE__)
#define link(a, b) (FAULT(FAULT_NAMES, "link", EIO) ? -1 : link(a, b))
#define unlink(p) (FAULT(FAULT_NAMES, "unlink", EIO) ? -1 : unlink(p))
#define mkdir(p, m) (FAULT(FAULT_NAMES, "mkdir", EIO) ? -1 : mkdir(p, m))
#define rmdir(p) (FAULT(FAULT_NAMES, "rmdir", EIO) ? -1 : rmdir(p))

#define pthread_create(t, a, f, x)                                                                          \
    (FAULT(FAULT_STARTING, "pthread_create", EAGAIN) ? EAGAIN : pthread_create(t, a, f, x))
#define posix_spawnattr_init(a) (FAULT(FAULT_STARTING, "spawnattr", ENOMEM) ? ENOMEM : posix_spawnattr_init(a))
#define posix_spawn_file_actions_init(a)                                                                    \
    (FAULT(FAULT_STARTING, "spawn actions", ENOMEM) ? ENOMEM : posix_spawn_file_actions_init(a))
#define posix_spawn_file_actions_adddup2(a, d, n)                                                           \
    (FAULT(FAULT_STARTING, "adddup2", ENOMEM) ? ENOMEM : posix_spawn_file_actions_adddup2(a, d, n))
#define posix_spawnp(p, n, a, s, w, e)                                                                      \
    (FAULT(FAULT_STARTING, "posix_spawnp", EAGAIN) ? EAGAIN : posix_spawnp(p, n, a, s, w, e))

/* Time stands still, so that logs agree. */
#define clock_gettime(clock, t) seam_clock(t)
#define main saeclip_main
#include "../saeclip.c"
