/* The origin of activations travels with the numbers: activations, SAEs and statistics record the
 * settings in force; commands that run a model for an SAE take them from it; files that contradict
 * each other are refused by the key. Uses the inputs and helpers of test_cli.c. */

/* Settings that all differ from what the model's file says or would be assumed. */
static const char origin_odd[] = "--layer 2 --hook attn --mean .5,.25,.125 --std 1,2,.5 --gelu erf --eps 1e-3 "
                                 "--heads 4 --square 23 --crop hf";
static const char *const origin_values[SC_ORIGIN_KEYS] = {
    "cli_model", "2", "attn", "all", "0.5,0.25,0.125", "1,2,0.5", "gelu", "0.001", "4", "23", "hf" };
/* Another valid value of each key. */
static const char *const origin_others[SC_ORIGIN_KEYS] = {
    "other", "3", "mlp", "cls", "0.5,0.25,0", "1,2,1", "quick_gelu", "1e-05", "2", "0", "torchvision" };

static void origin_test_record(const char *name)
{
    sc_safetensors file;
    if (!check(sc_safetensors_open(&file, cli("%s", name)) == SC_OK, "%s", sc_error())) return;
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) {
        const char *found = sc_metadata_find(&file, origin_keys[k]);
        check(found && strcmp(found, origin_values[k]) == 0, "%s: %s is %s (expected %s)", name, origin_keys[k],
              found ? found : "missing", origin_values[k]);
    }
    sc_safetensors_close(&file);
}

/* What eval prints as CSV after its first columns, the names; the caller frees it. */
static char *origin_eval(const char *line)
{
    works("%s", cli("eval --format csv %s", line));
    const char *mse = ran.out ? strchr(ran.out, '\n') : NULL;
    for (int comma = 0; mse && comma < 5; comma++) {
        mse = strchr(mse + 1, ',');
    }
    return strdup(mse ? mse : "");
}

/* Whether two ways to evaluate give the same numbers. */
static int origin_same(const char *a, const char *b)
{
    char *first = origin_eval(a), *second = origin_eval(b);
    int same = *first && strcmp(first, second) == 0;
    free(first);
    free(second);
    return same;
}

static void origin_test_settings(void)
{
    char line[1024];
    works("%s", cli("train --quiet -m @model %s @photos --latents 24 --steps 2 --batch 4 -o @odd", origin_odd));
    works("%s", cli("extract --quiet -m @model %s @photos -o @odd_acts", origin_odd));
    works("%s", cli("train --quiet --acts @odd_acts --latents 24 --steps 2 --batch 4 -o @odd_too"));
    works("%s", cli("stats --quiet -s @odd -m @model @photos -o @odd_stats"));
    origin_test_record("@odd");
    origin_test_record("@odd_acts");
    origin_test_record("@odd_too");
    origin_test_record("@odd_stats");
    check(cli_same("@odd", "@odd_too"), "an SAE trained through the model and one on saved activations");
    snprintf(line, sizeof line, "-s @odd -m @model %s @photos", origin_odd);
    check(origin_same("-s @odd -m @model @photos", line), "the SAE's settings are used");
    check(origin_same("-s @odd -m @model @photos", "-s @odd --acts @odd_acts"), "... as in the activations");
    check(!strstr(ran.err, "overruled"), "no remark without a difference: %s", ran.err);
    check(!origin_same("-s @odd -m @model @photos", "-s @odd -m @model --square 0 @photos"), "--square overrules");
    check(strstr(ran.err, "square is 23, overruled by 0\n") != NULL, "a remark says so: %s", ran.err);
    check(!origin_same("-s @odd -m @model @photos", "-s @odd -m @model --layer -1 --mean 0,0,0 @photos"),
          "--layer and --mean overrule");
    check(strstr(ran.err, "layer is 2, overruled by 3\n") && strstr(ran.err, "mean is 0.5,0.25,0.125, overruled by 0,0,0\n"),
          "remarks say so: %s", ran.err);
    works("%s", cli("train --quiet --init @odd -m @model @photos --steps 2 --batch 4 -o @odd_again"));
    origin_test_record("@odd_again");
}

/* Every key by itself: saved activations and statistics that say something else are refused. */
static void origin_test_contradictions(void)
{
    char words[200];
    for (size_t k = 0; k < SC_ORIGIN_KEYS; k++) {
        const cli_change other = { .key = origin_keys[k], .text = origin_others[k] };
        const cli_change none = { .key = origin_keys[k] };
        cli_edit(cli("@odd_acts"), cli("@other_acts"), other);
        cli_edit(cli("@odd_stats"), cli("@other_stats"), other);
        snprintf(words, sizeof words, "cli_odd: %s is %s (expected %s, the value in force)", origin_keys[k], origin_values[k],
                 origin_others[k]);
        refuses(1, words, "%s", cli("eval -s @odd --acts @other_acts"));
        snprintf(words, sizeof words, "cli_other_stats: %s is %s (expected %s, the value in force)", origin_keys[k],
                 origin_others[k], origin_values[k]);
        refuses(1, words, "%s", cli("top -s @odd -t @other_stats -m @model @photos -l 1 -o @out"));
        cli_edit(cli("@odd_acts"), cli("@other_acts"), none);
        works("%s", cli("eval --quiet -s @odd --acts @other_acts"));
    }
    refuses(1, "cli_other_stats: crop is torchvision (expected hf, the value in force)", "%s", cli("merge @odd_stats @other_stats -o @out"));
}

/* Values that a key cannot have, and their status and error. */
static void origin_test_values(void)
{
    static const struct { const char *value, *words; int status; } bad[SC_ORIGIN_KEYS] = {
        [SC_LAYER] = { "-1", "cli_bad_value: layer is -1 (expected 3", 1 },
        [SC_HOOK] = { "MLP", "cli_bad_value: does not name its hook point", 2 },
        [SC_TOKENS] = { "some", "cli_bad_value: tokens is some (expected all", 1 },
        [SC_MEAN] = { "1,2", "--mean: invalid value '1,2' (", 1 },
        [SC_STD] = { "a,b,c", "--std: invalid value 'a,b,c' (", 1 },
        [SC_GELU] = { "relu", "--gelu: invalid value 'relu' (", 1 },
        [SC_EPSILON] = { "2", "--eps: invalid value '2' (", 1 },
        [SC_HEADS] = { "0.5", "--heads: invalid value '0.5' (", 1 },
        [SC_SQUARE] = { "20000", "cli_bad_value: square is 20000 (expected 16384", 1 },
        [SC_CROP] = { "left", "cli_bad_value: crop is left (expected torchvision", 1 } };
    for (size_t k = SC_LAYER; k < SC_ORIGIN_KEYS; k++) {
        cli_edit(cli("@odd"), cli("@bad_value"), (cli_change){ .key = origin_keys[k], .text = bad[k].value });
        refuses(bad[k].status, bad[k].words, "%s", cli("eval -s @bad_value -m @model @photos"));
        check(strstr(ran.err, "cli_bad_value") != NULL, "the file is named: %s", ran.err);
    }
    works("%s", cli("pack --quiet --square 30 @photos -o @bad.safetensors"));
    cli_edit(cli("@bad.safetensors"), cli("@worse.safetensors"), (cli_change){ .key = "square", .text = "99999999" });
    refuses(1, "cli_worse.safetensors: square is 99999999 (expected 16384", "%s", cli("extract --quiet -m @model @worse.safetensors -o @out"));
}

/* Whether saved activations of the photos are tokens first .. of those in @all_acts. */
static int origin_tokens_are(const char *name, size_t first)
{
    enum { D = 32, T = 17 };
    size_t count, all_count, wrong = 0;
    const double *some = numbers_of(cli("%s", name), "activations", &count);
    const double *all = numbers_of(cli("@all_acts"), "activations", &all_count);
    if (!some || !all || all_count != CLI_PICTURES * T * D || count % CLI_PICTURES != 0) return 0;
    size_t kept = count / CLI_PICTURES;          /* numbers per image */
    for (size_t i = 0; i < count; i++)
        wrong += some[i] != all[i / kept * T * D + first * D + i % kept];
    return wrong == 0;
}

/* SAEs of class tokens and of patches see the same tokens through the model. */
static void origin_test_tokens(void)
{
    const char *const kinds[] = { "cls", "patches" };
    works("%s", cli("extract --quiet -m @model --layer 2 @photos -o @all_acts"));
    for (size_t k = 0; k < COUNT(kinds); k++) {
        char a[200], b[200];
        works("%s", cli("extract --quiet -m @model --layer 2 --tokens %s @photos -o @%s_acts", kinds[k], kinds[k]));
        works("%s", cli("train --quiet --acts @%s_acts --latents 24 --steps 2 --batch 4 -o @%s", kinds[k], kinds[k]));
        snprintf(a, sizeof a, "@%s_acts", kinds[k]);
        check(origin_tokens_are(a, k), "the %s of all tokens", kinds[k]);
        snprintf(a, sizeof a, "-s @%s --acts @%s_acts", kinds[k], kinds[k]);
        snprintf(b, sizeof b, "-s @%s -m @model @photos", kinds[k]);
        check(origin_same(a, b), "%s through the model and from saved activations", kinds[k]);
    }
    refuses(1, "cli_cls: tokens is cls (expected all, the value in force)", "%s", cli("eval -s @cls --acts @acts"));
    refuses(1, "cli_patches: tokens is patches (expected cls, the value in force)", "%s", cli("eval -s @cls -s @patches -m @model @photos"));
    refuses(1, "trained on tokens cls (expected all", "%s", cli("zeroshot --quiet -s @cls -m " GOLDEN "clip_hf.safetensors "
            "--layer 1 --hook attn @photos"));
}

/* Several SAEs share one pass: they must agree, unless an option overrules them. */
static void origin_test_several(void)
{
    works("%s", cli("train --quiet -m @model --square 30 @photos --latents 24 --steps 2 --batch 4 -o @wide"));
    works("%s", cli("train --quiet -m @model --square 20 @photos --latents 24 --steps 2 --batch 4 -o @small"));
    refuses(1, "cli_small: square is 20 (expected 30", "%s", cli("eval -s @wide -s @small -m @model @photos"));
    works("%s", cli("eval -s @wide -s @small --square 30 -m @model @photos"));
    check(strstr(ran.err, "cli_small: square is 20, overruled by 30\n") != NULL, "a remark: %s", ran.err);
}

/* A packed square is part of the origin: photos are resized in the same way. */
static void origin_test_packed(void)
{
    works("%s", cli("pack --quiet --square 30 @photos -o @square.safetensors"));
    works("%s", cli("train --quiet -m @model @square.safetensors --latents 24 --steps 2 --batch 4 -o @squared"));
    works("%s", cli("train --quiet -m @model --square 30 @photos --latents 24 --steps 2 --batch 4 -o @same"));
    check(cli_same("@squared", "@same"), "a packed set and --square give the same SAE");
    check(origin_same("-s @squared -m @model @photos", "-s @squared -m @model @square.safetensors"),
          "photos are resized as the set was");
    works("%s", cli("train --quiet -m @model @photos --latents 24 --steps 2 --batch 4 -o @plain"));
    refuses(1, "cli_plain: square is 0 (expected 30, the value in force)", "%s", cli("eval -s @plain -m @model @square.safetensors"));
    works("%s", cli("eval -s @plain --square 0 -m @model @square.safetensors"));
    check(strstr(ran.err, "square.safetensors: square is 30, overruled by 0\n") != NULL, "a remark: %s", ran.err);
}

static void test_origin(void)
{
    cli_make_inputs();
    origin_test_settings();
    origin_test_contradictions();
    origin_test_values();
    origin_test_tokens();
    origin_test_several();
    origin_test_packed();
}
