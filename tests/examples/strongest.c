/* Prints the ten latents of an SAE that are strongest on one image, by their mean over all tokens.
 *
 *     cc -std=c11 -O3 -ffp-contract=off -I. -DSAECLIP_NO_MAIN tests/examples/strongest.c saeclip.c \
 *        -lm -pthread -o strongest
 *     ./strongest MODEL.safetensors SAE.safetensors IMAGE
 */
#include "saeclip.h"

#include <stdlib.h>

static void need(int status) {
    if (status == SC_OK) return;
    fprintf(stderr, "strongest: %s\n", sc_error());
    exit(status);
}

int main(int count, char **argument) {
    sc_model model;
    sc_sae sae;
    sc_images images;
    if (count != 4) return SC_USAGE;
    need(sc_threads_start(0));
    need(sc_model_open(&model, argument[1], NULL));
    need(sc_sae_open(&sae, argument[2]));
    need(sc_images_open(&images, argument[3], 1));

    sc_preprocess prep = { .size = (int)model.image_size };
    unsigned char *pixels = calloc(3 * model.image_size, model.image_size);
    float *x = calloc(model.tokens, model.width * sizeof *x);
    float *f = calloc(model.tokens, sae.d_sae * sizeof *f);
    if (!pixels || !x || !f) return SC_FAILED;
    sc_tap tap = { .out = x, .stride = model.width };
    need(sc_hook_point(&sae.origin, &tap));
    need(sc_model_load(&model, tap.layer, 0));       /* the blocks up to the SAE's hook point */
    need(sc_image_load(&images, 0, &prep, pixels));
    need(sc_model_forward(&model, pixels, 1, &tap, 1, NULL));
    need(sc_sae_encode(&sae, x, model.tokens, f));

    for (size_t t = 1; t < model.tokens; t++)        /* the sum over tokens, in the first one's row */
        for (size_t j = 0; j < sae.d_sae; j++) f[j] += f[t * sae.d_sae + j];
    for (int rank = 0; rank < 10; rank++) {
        size_t best = 0;
        for (size_t j = 1; j < sae.d_sae; j++)
            if (f[j] > f[best]) best = j;
        if (f[best] > 0) printf("latent %zu: %.4g\n", best, (double)f[best] / (double)model.tokens);
        f[best] = 0;
    }
    return SC_OK;
}
