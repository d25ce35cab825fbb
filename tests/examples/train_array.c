/* Trains an SAE on vectors from an array: each is the sum of two of six fixed directions.
 *
 *     cc -std=c11 -O3 -ffp-contract=off -I. -DSAECLIP_NO_MAIN tests/examples/train_array.c saeclip.c \
 *        -lm -pthread -o train_array
 *     ./train_array sae.safetensors
 */
#include "saeclip.h"

#include <stdlib.h>

enum { TOKENS = 256, D = 16, LATENTS = 32, DIRECTIONS = 6, STEPS = 300 };

/* The next x: [TOKENS, D]; rand() is good enough for an example. */
static void draw(float *x) {
    for (int t = 0; t < TOKENS; t++)
        for (int term = 0; term < 2; term++) {
            int direction = rand() % DIRECTIONS;
            for (int d = 0; d < D; d++)
                x[t * D + d] = (term ? x[t * D + d] : 0) + (float)((direction * 7 + d * d * 3) % 5 - 2);
        }
}

int main(int count, char **argument) {
    static float x[TOKENS * D];
    sc_sae sae;
    sc_train_options options = { .lr = 1e-2, .warmup = 20, .dead_window = 64 };
    sc_step step = { 0 };
    if (count != 2) return SC_USAGE;
    int status = sc_sae_init(&sae, D, LATENTS, 42);
    if (status == SC_OK) {
        sae.topk = 1;                                /* at most two latents per token */
        sae.k = 2;
    }
    sc_trainer *trainer = status == SC_OK ? sc_trainer_new(&sae, &options, TOKENS) : NULL;
    for (int i = 0; i < STEPS && trainer && status == SC_OK; i++) {
        draw(x);
        status = sc_train_step(trainer, x, &step);
        if (i % 50 == 49)
            printf("step %d: loss %.4g, explained variance %.3f\n", i + 1, step.loss,
                   step.explained_variance);
    }
    if (trainer && status == SC_OK) status = sc_sae_save(&sae, argument[1]);
    if (!trainer || status != SC_OK) fprintf(stderr, "train_array: %s\n", sc_error());
    sc_trainer_free(trainer);
    sc_sae_close(&sae);
    return trainer ? status : SC_FAILED;
}
