/* SAEs of others: SAELens's folder of sae_weights.safetensors and cfg.json, TopK and JumpReLU SAEs, keys
 * and tensors that change what an SAE computes. Uses the inputs and helpers of test_cli.c. */

/* The weights of @sae without metadata in @lens/, with a tensor more where `tensor` is given, and a cfg.json. */
static void saelens_make(const char *config, const char *tensor, float value)
{
    sc_safetensors file;
    sc_writer w;
    mkdir(cli("@lens"), 0777);
    if (sc_safetensors_open(&file, cli("@sae")) != SC_OK
        || sc_writer_open(&w, cli("@lens/sae_weights.safetensors")) != SC_OK) need("%s", sc_error());
    for (size_t i = 0; i < file.tensors; i++)
        cli_write_tensor(&w, &file, &file.tensor[i], &(cli_change){ 0 });
    if (tensor) {
        sc_writer_tensor(&w, tensor, SC_F32, 1, (size_t[]){ 24 });
        for (int j = 0; j < 24; j++) sc_writer_floats(&w, &(float){ value + 0.01f * (float)j }, 1);
    }
    if (sc_writer_close(&w, SC_OK) != SC_OK) need("%s", sc_error());
    sc_safetensors_close(&file);
    put_text(cli("@lens/cfg.json"), config);
}

/* The codes f [tokens, 24] of an SAE on @acts; the caller frees them. */
static float *saelens_codes(const char *sae, size_t *count)
{
    sc_safetensors file;
    works("%s", cli("encode --quiet --dense %s --acts @acts -o @codes", sae));
    if (sc_safetensors_open(&file, cli("@codes")) != SC_OK) need("%s", sc_error());
    const sc_tensor *dense = sc_tensor_find(&file, "f");
    if (!dense) need("no tensor f");
    float *f = malloc(dense->count * sizeof *f);
    if (!f || sc_tensor_floats(&file, dense, 0, dense->count, f) != SC_OK) need("%s", sc_error());
    *count = dense->count;
    sc_safetensors_close(&file);
    return f;
}

/* What train writes for SAELens: its own loader (versions 3 to 6) needs these keys, and no other tensors. */
static void saelens_test_written(void)
{
    static const char expected[] =
        "{\n  \"architecture\": \"topk\",\n  \"d_in\": 32,\n  \"d_sae\": 24,\n"
        "  \"activation_fn_str\": \"topk\",\n  \"activation_fn_kwargs\": {\"k\": 5},\n"
        "  \"apply_b_dec_to_input\": true,\n  \"normalize_activations\": \"none\",\n"
        "  \"hook_name\": \"blocks.1.hook_mlp_out\",\n  \"hook_layer\": 1,\n  \"hook_head_index\": null,\n"
        "  \"dtype\": \"float32\",\n  \"device\": \"cpu\",\n"
        "  \"context_size\": 1,\n  \"dataset_path\": \"\",\n  \"model_name\": \"cli_model\"\n}\n";
    const struct { const char *name; int rank; size_t shape[2]; } tensors[] = {
        { "W_dec", 2, { 24, 32 } }, { "W_enc", 2, { 32, 24 } }, { "b_dec", 1, { 32 } }, { "b_enc", 1, { 24 } } };
    size_t length;
    sc_safetensors file;
    works("%s", cli("train --quiet --acts @acts --latents 24 --arch topk --k 5 --steps 3 --batch 4 -o @folder/"));
    char *text = get_file(cli("@folder/cfg.json"), &length);
    check(text && strcmp(text, expected) == 0, "cfg.json: %s", text ? text : "missing");
    check(cli_same("@folder/sae_weights.safetensors", "@topk"), "the weights are those of train -o FILE");
    if (sc_safetensors_open(&file, cli("@folder/sae_weights.safetensors")) != SC_OK) need("%s", sc_error());
    check(file.tensors == 4, "%zu tensors", file.tensors);
    for (size_t i = 0; i < 4; i++) {
        const sc_tensor *t = sc_tensor_find(&file, tensors[i].name);
        check(t && t->dtype == SC_F32 && t->rank == tensors[i].rank && t->shape[0] == tensors[i].shape[0]
              && (t->rank == 1 || t->shape[1] == tensors[i].shape[1]), "tensor %s", tensors[i].name);
    }
    sc_safetensors_close(&file);
    works("%s", cli("encode --quiet -s @folder --acts @acts -o @codes_folder"));
    works("%s", cli("encode --quiet -s @folder/ --acts @acts -o @codes_slash"));
    works("%s", cli("encode --quiet -s @topk --acts @acts -o @codes_file"));
    check(cli_same("@codes_folder", "@codes_file") && cli_same("@codes_slash", "@codes_file"), "the folder is read");
    works("%s", cli("train --quiet --acts @acts --latents 24 --steps 3 --batch 4 -o @standard/"));
    text = get_file(cli("@standard/cfg.json"), &length);
    check(text && strstr(text, "\"architecture\": \"standard\"") && strstr(text, "\"activation_fn_str\": \"relu\"")
          && !strstr(text, "\"k\""), "cfg.json of a ReLU SAE: %s", text ? text : "missing");
    works("%s", cli("train --quiet --init @standard --acts @acts --steps 1 --batch 4 -o @again"));
}

/* The ways in which a configuration says TopK; expected: our own --arch topk --k 5 on the same weights. */
static void saelens_test_topk(void)
{
    static const char *const configs[] = {
        "{\"architecture\": \"topk\", \"k\": 5, \"d_in\": 32, \"d_sae\": 24}",
        "{\"architecture\": \"standard\", \"activation_fn_str\": \"topk\", \"activation_fn_kwargs\": {\"k\": 5}}",
        "{\"activation_fn\": \"topk\", \"activation_fn_kwargs\": {\"k\": 5}, \"normalize_activations\": false}",
        (" {\n\"meta\": {\"hook_name\": \"x\", \"hook_head_index\": null, \"list\": [1, [2.5e-3], {}]}, \"k\": 5,\n"
        "\"\\u0061rchitecture\": \"topk\", \"apply_b_dec_to_input\": true, \"x\": NaN}\n") };
    size_t count, found;
    saelens_make("{}", NULL, 0);
    float *expected = saelens_codes("-s @lens --arch topk --k 5", &count);
    float *relu = saelens_codes("-s @lens", &found);
    check(memcmp(expected, relu, count * sizeof *relu) != 0, "TopK and ReLU differ on these weights");
    free(relu);
    for (size_t i = 0; i < COUNT(configs); i++) {
        saelens_make(configs[i], NULL, 0);
        float *f = saelens_codes("-s @lens", &found);
        check(found == count && memcmp(f, expected, count * sizeof *f) == 0, "%s", configs[i]);
        free(f);
    }
    free(expected);
}

/* f = h where h > threshold, so what ReLU gives, without what is not above the threshold. */
static void saelens_test_jumprelu(void)
{
    size_t count, found, cleared = 0, wrong = 0;
    sc_sae sae;
    saelens_make("{}", NULL, 0);
    float *relu = saelens_codes("-s @lens", &count);
    saelens_make("{\"architecture\": \"jumprelu\", \"activation_fn_str\": \"relu\"}", "threshold", 0.05f);
    float *f = saelens_codes("-s @lens", &found);
    for (size_t i = 0; i < count && found == count; i++) {
        float threshold = 0.05f + 0.01f * (float)(i % 24), expected = relu[i] > threshold ? relu[i] : 0;
        cleared += relu[i] > 0 && expected == 0;
        wrong += f[i] != expected;
    }
    check(found == count && wrong == 0 && cleared > 100, "%zu values wrong, %zu of %zu cleared", wrong, cleared, count);
    if (sc_sae_open(&sae, cli("@lens")) != SC_OK) need("%s", sc_error());
    float x[19 * 32], fast[19 * 24], plain[19 * 24];
    for (int i = 0; i < 19 * 32; i++) x[i] = (float)(i * 37 % 101 - 50) / 50;
    check(sc_sae_encode(&sae, x, 19, fast) == SC_OK && sc_sae_encode_plain(&sae, x, 19, plain) == SC_OK
          && memcmp(fast, plain, sizeof fast) == 0, "Part I gives the same bits");
    check(sc_sae_save(&sae, cli("@jumped")) == SC_OK, "%s", sc_error());
    sc_sae_close(&sae);
    float *again = saelens_codes("-s @jumped", &found);
    check(found == count && memcmp(again, f, count * sizeof *f) == 0, "a saved JumpReLU SAE is one again");
    free(again);
    refuses(1, "JumpReLU SAE cannot be trained", "%s", cli("train --acts @acts --init @lens --steps 1 -o @out"));
    again = saelens_codes("-s @lens --arch relu", &found);
    check(found == count && memcmp(again, relu, count * sizeof *f) == 0, "--arch relu overrules");
    free(again);
    free(relu);
    free(f);
    saelens_make("{\"architecture\": \"jumprelu\"}", NULL, 0);
    refuses(1, "missing or of another shape: tensor threshold", "%s", cli("eval -s @lens --acts @acts"));
    saelens_make("{\"architecture\": \"jumprelu\"}", "threshold", -0.001f);
    refuses(1, "threshold[0] is -0.001 (expected at least 0)", "%s", cli("eval -s @lens --acts @acts"));
    saelens_make("{\"d_in\": 32}", "threshold", 0.1f);
    refuses(1, "tensor threshold may change", "%s", cli("eval -s @lens --acts @acts"));
}

static void saelens_test_refused(void)
{
    static const struct { const char *words, *config; } cases[] = {
        { "architecture is gated (expected standard|topk|jumprelu)", "{\"architecture\": \"gated\"}" },
        { "apply_b_dec_to_input is false (expected true)", "{\"apply_b_dec_to_input\": false}" },
        { "normalize_activations is expected_average_only_in (", "{\"normalize_activations\": \"expected_average_only_in\"}" },
        { "normalize_activations is layer_norm (", "{\"normalize_activations\": \"layer_norm\"}" },
        { "normalize_activations is true (", "{\"normalize_activations\": true}" },
        { "finetuning_scaling_factor is true (", "{\"finetuning_scaling_factor\": true}" },
        { "rescale_acts_by_decoder_norm is true (", "{\"rescale_acts_by_decoder_norm\": true}" },
        { "reshape_activations is hook_z (", "{\"reshape_activations\": \"hook_z\"}" },
        { "activation_fn_str is tanh-relu (", "{\"activation_fn_str\": \"tanh-relu\"}" },
        { "hook_head_index is 3 (", "{\"metadata\": {\"hook_head_index\": 3}}" },
        { "k is 4.5 (expected a whole number", "{\"k\": 4.5}" },
        { "k is 6 (expected 5, as read before)", "{\"k\": 5, \"activation_fn_kwargs\": {\"k\": 6}}" },
        { "k is 25 (expected 1 to 24", "{\"architecture\": \"topk\", \"k\": 25}" },
        { "k is 0 (expected 1 to 24", "{\"architecture\": \"topk\"}" },
        { "cfg.json: d_sae is 48 (expected 24, as read before)", "{\"d_in\": 32, \"d_sae\": 48}" },
        { "JSON byte 0: expected a value", "" },
        { "JSON byte 8: expected nothing more", "{\"k\": 5}x" },
        { "JSON byte 6: expected a value", "{\"k\": }" }, { "a comma or the end", "{\"k\": 5 \"d_in\": 32}" },
        { "expected less nesting", "{\"a\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[" } };
    for (size_t i = 0; i < COUNT(cases); i++) {
        saelens_make(cases[i].config, NULL, 0);
        refuses(1, cases[i].words, "%s", cli("eval -s @lens --acts @acts"));
        refuses(1, cases[i].words, "%s", cli("eval -s @lens/sae_weights.safetensors --acts @acts"));
    }
    saelens_make("{}", "scaling_factor", 1);
    refuses(1, "tensor scaling_factor may change what the SAE computes", "%s", cli("eval -s @lens --acts @acts"));
    saelens_make("{}", "activation_mean", 1);
    refuses(1, "tensor activation_mean may change", "%s", cli("eval -s @lens --acts @acts"));
    saelens_make("{}", "silent", 1);                          /* of a checkpoint */
    works("%s", cli("eval --quiet -s @lens --acts @acts"));
    cli_edit(cli("@topk"), cli("@lens/sae_weights.safetensors"), (cli_change){ 0 });
    put_text(cli("@lens/cfg.json"), "{\"architecture\": \"standard\"}");
    refuses(1, "architecture is standard (expected topk, as", "%s", cli("eval -s @lens --acts @acts"));
    put_text(cli("@lens/cfg.json"), "{\"architecture\": \"topk\", \"k\": 6}");
    refuses(1, "k is 6 (expected 5, as", "%s", cli("eval -s @lens --acts @acts"));
    mkdir(cli("@nothing_here"), 0777);
    refuses(1, "sae_weights.safetensors", "%s", cli("eval -s @nothing_here --acts @acts"));
}

static void test_saelens(void)
{
    cli_make_inputs();
    saelens_test_written();
    saelens_test_topk();
    saelens_test_jumprelu();
    saelens_test_refused();
}
