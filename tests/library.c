/* Trains an SAE through the library by fast steps, by plain ones and by both in turn. test_plain.c
 * builds this program, compares the three SAEs with each other and the last one with PyTorch's.
 *
 *     gcc -std=c11 -O2 -ffp-contract=off -I. -DSAECLIP_NO_MAIN tests/library.c saeclip.c -lm \
 *         -pthread -o library
 *     ./library START TOKENS OUT K L1 LR WARMUP GHOST
 *
 * START: an SAE's file; TOKENS: float32 of this machine, batches of 286 tokens one after the other;
 * OUT: writes OUT.fast, OUT.plain and OUT.mixed after six steps, OUT.end after all batches. K: for
 * TopK, 0 for ReLU; GHOST: 1 for ghost gradients; a latent is dead after more than 3 silent steps.
 * Prints a table of losses with one row per step. The status is 1 if losses of plain and fast steps
 * differ. */
#include "saeclip.h"

#include <stdlib.h>

enum { TOKENS = 286, WIDTH = 20, STEPS = 6 };
enum { FAST, PLAIN, MIXED, KINDS };

static float x[TOKENS * WIDTH];

static void need(int status) {
    if (status == SC_OK) return;
    fprintf(stderr, "library: %s\n", sc_error());
    exit(status);
}

static void save(const sc_sae *sae, const char *out, const char *ending) {
    char path[1000];
    snprintf(path, sizeof path, "%s.%s", out, ending);
    need(sc_sae_save(sae, path));
}

static int same_losses(const sc_step *a, const sc_step *b) {
    return a->loss == b->loss && a->mse == b->mse && a->l1 == b->l1 && a->ghost == b->ghost;
}

int main(int count, char **argument) {
    static const char *const endings[KINDS] = { "fast", "plain", "mixed" };
    sc_sae sae[KINDS];
    sc_trainer *trainer[KINDS];
    if (count != 9) return SC_USAGE;
    FILE *tokens = fopen(argument[2], "rb");
    if (!tokens) return SC_FAILED;
    sc_train_options options = { .l1 = atof(argument[5]), .lr = atof(argument[6]),
                                 .warmup = (size_t)atoi(argument[7]), .dead_window = 3,
                                 .ghost = atoi(argument[8]) };
    for (int kind = 0; kind < KINDS; kind++) {
        need(sc_sae_open(&sae[kind], argument[1]));
        sae[kind].topk = atoi(argument[4]) > 0;
        sae[kind].k = (size_t)atoi(argument[4]);
        trainer[kind] = sc_trainer_new(&sae[kind], &options, TOKENS);
        if (!trainer[kind]) need(SC_FAILED);
    }
    puts("loss,mse,l1,ghost");
    for (int step = 0; fread(x, sizeof x, 1, tokens) == 1; step++) {
        sc_step result[KINDS];
        for (int kind = 0; kind < KINDS && step < STEPS; kind++) {
            int plain = kind == PLAIN || (kind == MIXED && step % 2 == 0);
            need(plain ? sc_train_step_plain(trainer[kind], x, &result[kind])
                       : sc_train_step(trainer[kind], x, &result[kind]));
            if (step == STEPS - 1) save(&sae[kind], argument[3], endings[kind]);
            if (!same_losses(&result[kind], &result[FAST])) {
                fprintf(stderr, "library: step %d: losses of %s differ\n", step, endings[kind]);
                return SC_FAILED;
            }
        }
        if (step >= STEPS) need(sc_train_step(trainer[MIXED], x, &result[MIXED]));
        const sc_step *r = &result[MIXED];
        printf("%.17g,%.17g,%.17g,%.17g\n", r->loss, r->mse, r->l1, r->ghost);
    }
    save(&sae[MIXED], argument[3], "end");
    for (int kind = 0; kind < KINDS; kind++) {
        sc_trainer_free(trainer[kind]);
        sc_sae_close(&sae[kind]);
    }
    fclose(tokens);
    return SC_OK;
}
