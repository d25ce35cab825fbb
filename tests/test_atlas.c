/* Tests of explain and of the atlas: figures worked out by hand on test_look.c's model and SAE, whose
 * f_0 is relu(R / 255 - 0.2) and f_1 the same of G; the atlas's page also in a browser that shows no
 * window, where there is one. */

/* Class a: a picture on which f_0 is 0.8 0.6 0.2 0, its mean over 5 tokens 0.32; b: one with 0.16;
 * c: one on which f_1 is 0.16. Two top images a latent. */
static void make_atlas_inputs(void)
{
    static const int red[4] = { 255, 0, 0, 0 }, green[4] = { 0, 255, 204, 0 };
    if (!exists(in_folder("look"))) {
        if (mkdir(in_folder("look"), 0777) != 0) need("look");
        make_look_inputs();
    }
    look_folder("mixed");
    look_folder("mixed/a");
    look_folder("mixed/b<script>\342\200\250\377");
    look_folder("mixed/c");
    look_patches("mixed/a/0.ppm", red0, none);
    look_patches("mixed/b<script>\342\200\250\377/'\"\\<!--1.ppm", red1, none);
    look_patches("mixed/c/2.ppm", none, green2);
    look_patches("both.ppm", red, green);
    look_patches("dark.ppm", none, none);
    check(look_run("stats -s sae.safetensors -m model.safetensors mixed --top 2 --top-patches 3 -o mixed.stats "
                   "--quiet") == 0, "statistics are made");
}

/* --- explain --- */

#define EXPLAIN "explain -s sae.safetensors -m model.safetensors -t mixed.stats --quiet "

static void atlas_explain(void)
{
    /* entropy: -(2/3 ln 2/3 + 1/3 ln 1/3); latent 1 has one top image of the two that it would need */
    static const char zero[] = "\"frequency\": 0.666666687, \"entropy\": 0.636514187, \"classes\": \"a 67 %, "
                               "b\\u003cscript>\\u2028\357\277\275 33 %\"}";
    static const char one[] = "\"frequency\": 0.333333343, \"entropy\": -1, \"classes\": \"c 100 %\"}";
    char wanted[500];
    check(look_run(EXPLAIN "both.ppm --format json") == 0, "explain runs");
    snprintf(wanted, sizeof wanted, "[\n  {\"latent\": 1, \"activation\": 0.280000001, %s,\n"
             "  {\"latent\": 0, \"activation\": 0.159999996, %s\n]\n", one, zero);
    check(strcmp(look_output, wanted) == 0, "the strongest first, each with its figures: %s", look_output);
    check(look_run(EXPLAIN "both.ppm --format json --patch 1,0") == 0, "explain runs on a patch");
    snprintf(wanted, sizeof wanted, "[\n  {\"latent\": 1, \"activation\": 0.600000024, %s\n]\n", one);
    check(strcmp(look_output, wanted) == 0, "row 1, column 0 is the third patch: %s", look_output);
    check(look_run(EXPLAIN "both.ppm --format json --max-frequency 0.5") == 0
          && look_says("\"latent\": 1,") && !look_says("\"latent\": 0,"), "frequent latents are left out");
    check(look_run(EXPLAIN "both.ppm --max-frequency 0.66666669") == 0 && look_says("\n     0        0.16"),
          "the bound itself is not left out");
    check(look_run(EXPLAIN "set/b/2.ppm -o explained") == 0 && is_mask("explained/latent_1_0_2.ppm.pgm", 0, 255, 0, 0)
          && exists(in_folder("look/explained/latent_1_0_2.ppm.ppm"))
          && !exists(in_folder("look/explained/latent_0_0_2.ppm.pgm")), "masks of the latents that fire");
    check(look_run(EXPLAIN "- --patch 0,0 < both.ppm") == 0 && look_says("0.8"), "a picture on standard input");
    check(look_run("explain -s sae.safetensors -m model.safetensors -t mixed.stats dark.ppm") == 0
          && look_says("no latent fires"), "where none fires explain says so");
    check_full_disk(EXPLAIN "both.ppm");
}

static void atlas_explain_refusals(void)
{
    static const struct { const char *arguments; int status; const char *words; } bad[] = {
        { "both.ppm --patch 2,0", 2, "0,0 to 1,1" }, { "both.ppm --patch 0,2", 2, "0,0 to 1,1" },
        { "both.ppm --patch -1,0", 2, "--patch" }, { "both.ppm --patch 0", 2, "--patch" },
        { "both.ppm --patch 0,0x", 2, "--patch" }, { "both.ppm --max-frequency 1.5", 2, "--max-frequency" },
        { "set", 1, "one image" }, { "both.ppm -l 0", 2, "no option -l" }, { "both.ppm -o stats", 1, "stats" },
        { "nowhere.ppm", 1, "nowhere.ppm" }, { "", 2, "IMAGE" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check(look_run(EXPLAIN "%s", bad[i].arguments) == bad[i].status && look_says(bad[i].words),
              "explain %s: status %d and '%s', got %s", bad[i].arguments, bad[i].status, bad[i].words,
              look_output);
    check(look_run("explain -s other.safetensors -m model.safetensors -t mixed.stats both.ppm") == 1
          && look_says("another SAE"), "statistics of another SAE are refused");
    check(look_run("explain -s sae.safetensors -m model.safetensors both.ppm") == 2 && look_says("-t"),
          "explain needs statistics");
}

static void test_atlas(void)
{
    make_atlas_inputs();
    atlas_explain();
    atlas_explain_refusals();
}
