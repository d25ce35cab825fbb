/* saeclip's tests: `make test`, or tests/test [SUBJECT...] in the checkout's root for some of them.
 * One translation unit with the program, so that tests reach what is static there. */
#define SAECLIP_NO_MAIN
#include "../saeclip.c"

#include "check.h"
#include "test_numbers.c"
#include "test_files.c"
#include "test_images.c"
#include "test_model.c"
#include "test_sae.c"
#include "test_plain.c"
#include "test_stats.c"
#include "test_threads.c"
#include "test_cli.c"
#include "test_origin.c"
#include "test_saelens.c"
#include "test_look.c"
#include "test_figures.c"
#include "test_atlas.c"
#include "test_demo.c"
#include "test_convert.c"
#include "test_fingerprint.c"
#include "test_readme.c"

static const struct { const char *name; void (*test)(void); } subjects[] = {
    { "numbers", test_numbers },
    { "files", test_files },
    { "images", test_images },
    { "model", test_model },
    { "sae", test_sae },
    { "plain", test_plain },
    { "stats", test_stats },
    { "threads", test_threads },
    { "cli", test_cli },
    { "origin", test_origin },
    { "saelens", test_saelens },
    { "look", test_look },
    { "figures", test_figures },
    { "atlas", test_atlas },
    { "demo", test_demo },
    { "convert", test_convert },
    { "fingerprint", test_fingerprint },
    { "readme", test_readme },
    { NULL, NULL }
};

int main(int count, char **names)
{
    signal(SIGINT, SIG_DFL);                 /* a shell ignores it for what runs in the background */
    make_folder();
    quiet = 1;
    if (sc_instruction_set(given_isa()) != SC_OK || sc_threads_start(2) != SC_OK) need("%s", sc_error());
    for (int i = 3; i < 256; i++) fcntl(i, F_SETFD, FD_CLOEXEC);   /* what we were started with */
    for (size_t i = 0; subjects[i].name; i++) {
        int wanted = count < 2;
        for (int n = 1; n < count; n++) wanted |= strcmp(names[n], subjects[i].name) == 0;
        if (!wanted) continue;
        double start = seconds_now();
        subjects[i].test();
        fprintf(stderr, "%s: %.1f s\n", subjects[i].name, seconds_now() - start);
    }
    sc_threads_stop();
    remove_tree(folder);
    printf("%zu passed, %zu failed, %zu skipped\n", passed, failed, skipped);
    return failed != 0;
}
