/* Tests of weights/convert.py on checkpoints that test_convert.py makes with PyTorch from golden
 * files: the converted file equals the golden file that the checkpoint was made from, and saeclip
 * computes the same with both. */

static const char *convert_python(void) {
    const char *name = getenv("PYTHON");
    return name && *name ? name : "python3";
}

/* NAME.safetensors in the tests' folder, where NAME.pt lies. */
static const char *convert_output(const char *name) { return in_folder("pt/%s.safetensors", name); }

/* Converts a file; returns the exit status. more: further arguments */
static int convert_file(const char *in, const char *out, const char *more) {
    other_program = "/usr/bin/env";
    int status = run("%s weights/convert.py %s %s %s", convert_python(), in, out, more);
    other_program = NULL;
    return status;
}

static int convert_run(const char *name, const char *more) {
    return convert_file(in_folder("pt/%s.pt", name), convert_output(name), more);
}

/* Converts NAME.pt and checks that no number differs from those in another file. */
static int convert_equals(const char *name, const char *more, const char *path) {
    int status = convert_run(name, more);
    if (!check(status == 0, "%s.pt is not converted: %s", name, ran.err)) return 0;
    return works("compare %s %s", convert_output(name), path);
}

/* extract computes the same with a converted model as with the golden file. Both get the same base
 * name, which becomes part of the output. */
static void convert_model(const char *name, const char *more, const char *golden) {
    char path[600];
    const char *ours = in_folder("pt/model/%s.safetensors", golden);
    size_t count;
    snprintf(path, sizeof path, GOLDEN "%s.safetensors", golden);
    if (!convert_equals(name, more, path)) return;
    const char *bytes = get_file(convert_output(name), &count);
    put_file(ours, bytes, count);
    works("extract --quiet --heads 2 -m %s " GOLDEN "images.safetensors -o %s", ours,
          in_folder("pt/converted.acts"));
    works("extract --quiet --heads 2 -m %s " GOLDEN "images.safetensors -o %s", path,
          in_folder("pt/golden.acts"));
    check(same_files(in_folder("pt/converted.acts"), in_folder("pt/golden.acts")),
          "extract differs with %s.pt, converted", name);
}

static void convert_encode(const char *sae, const char *out) {
    works("encode --quiet --dense --reconstruction -s %s --acts %s -o %s", sae,
          GOLDEN "stats_small_acts.safetensors", out);
}

/* encode computes the same with a converted SAE as with another file. */
static void convert_sae(const char *name, const char *path) {
    if (!convert_equals(name, "", path)) return;
    convert_encode(convert_output(name), in_folder("pt/converted.codes"));
    convert_encode(path, in_folder("pt/golden.codes"));
    check(same_files(in_folder("pt/converted.codes"), in_folder("pt/golden.codes")),
          "encode differs with %s.pt, converted", name);
}

/* A safetensors file whose names begin with a prefix, and its metadata. */
static void convert_safetensors(void) {
    char golden[600];
    if (!check(convert_run("names", "") == 0, "names.pt is not converted: %s", ran.err)) return;
    refuses(1, "weights/convert.py cuts", "extract --quiet -m %s " GOLDEN "images.safetensors -o %s",
            convert_output("names"), in_folder("pt/none"));
    int status = convert_file(convert_output("names"), convert_output("cut"), "module. trunk.");
    if (check(status == 0, "a safetensors file is not converted: %s", ran.err))
        works("compare %s " GOLDEN "clip_hf.safetensors", convert_output("cut"));
    snprintf(golden, sizeof golden, GOLDEN "stats_small_sae.safetensors");
    status = convert_file(golden, convert_output("again"), "");
    if (!check(status == 0, "an SAE in safetensors is not converted: %s", ran.err)) return;
    works("info %s", convert_output("again"));
    check(strstr(ran.out, "k = 4") && strstr(ran.out, "hook = mlp"),
          "metadata is lost when safetensors is converted: %s", ran.out);
}

static void convert_refusals(void) {
    static const struct { const char *name, *more, *reason; } refused[] = {
        { "evil", "", "holds a posix.system (expected a state dict" },
        { "evil_old", "", "holds a posix.system (expected a state dict" },
        { "evil_value", "", "'b_enc' is a posix.system (expected a dense tensor" },
        { "sparse", "", "'a' is a torch._utils._rebuild_sparse_tensor (expected a dense tensor" },
        { "complex", "", "'a' is a tensor of an unknown kind (expected" },
        { "negative", "", "'a' is a tensor of an unknown kind (expected" },
        { "big_endian", "", "big-endian" },
        { "module", "", "holds a torch.nn.modules.linear.Linear (expected a state dict" },
        { "list", "", "holds a list (expected a state dict" },
        { "empty", "", "no tensors" },
        { "text", "", "not a PyTorch checkpoint" },
        { "state_cut", "", "incomplete" },
        { "old_state_cut", "", "bytes (expected" },
        { "beyond", "", "past the end of its storage" },
        { "beyond_old", "", "past the end of its storage" },
        { "same_name", "", "the same name without 'module." },
        { "prefixed", "visual.trunk. model.", "no tensor's name begins with 'model.'" },
        { "sae_shape", "", "W_enc is [16, 39] (expected [16, 40])" },
        { "sae_normalized", "", "normalize_activations = layer_norm (expected none)" },
        { "sae_tanh", "", "activation_fn_str = tanh-relu (expected relu or topk)" },
        { "sae_unshifted", "", "apply_b_dec_to_input = False (expected True)" } };
    for (size_t i = 0; i < COUNT(refused); i++) {
        const char *name = refused[i].name, *reason = refused[i].reason, *end;
        remove(convert_output(name));
        int status = convert_run(name, refused[i].more);
        end = strchr(ran.err, '\n');
        check(status == 1 && strstr(ran.err, reason) && end && !end[1] && ran.out_count == 0,
              "%s.pt is not refused with '%s': status %d, %s", name, reason, status, ran.err);
        check(!exists(convert_output(name)) && !exists(in_folder("pt/%s.safetensors.tmp", name)),
              "a file is left of %s.pt, which is refused", name);
    }
}

static void test_convert(void) {
    char command[600], expected[600];
    const char *python = convert_python();
    snprintf(command, sizeof command, "%s -c 'import torch' >/dev/null 2>&1", python);
    if (!exists("/usr/bin/env") || system(command) != 0) {
        skip("weights/convert.py: %s has no PyTorch (PYTHON=... names another)", python);
        return;
    }
    if (mkdir(in_folder("pt"), 0777) != 0) need("a folder");
    if (mkdir(in_folder("pt/model"), 0777) != 0) need("a folder");
    other_program = "/usr/bin/env";
    int status = run("%s tests/test_convert.py " GOLDEN " %s", python, in_folder("pt"));
    other_program = NULL;
    if (!check(status == 0, "test_convert.py fails: %s", ran.err)) return;

    convert_model("state", "", "clip_hf");               /* BF16, a scalar, int64 */
    convert_model("old_state", "", "clip_hf");
    convert_model("script", "", "clip_openai");          /* F16 */
    convert_model("training", "", "clip_openai");
    convert_model("parameters", "", "clip_timm");
    convert_model("prefixed", "visual.trunk.", "clip_timm");
    convert_model("shared", "", "clip_timm");
    convert_model("old_shared", "", "clip_timm");
    convert_model("strided", "", "clip_timm");
    status = convert_run("expanded_plain", "");
    if (check(status == 0, "expanded_plain.pt is not converted: %s", ran.err))
        convert_equals("expanded", "", convert_output("expanded_plain"));

    convert_sae("sae", GOLDEN "stats_small_sae.safetensors");
    convert_sae("sae_linear", GOLDEN "stats_small_sae.safetensors");
    convert_sae("k_alone", GOLDEN "stats_small_sae.safetensors");
    check(convert_run("square", "") == 0, "square.pt is not converted: %s", ran.err);
    snprintf(expected, sizeof expected, "%s", convert_output("square"));
    convert_sae("square_linear", expected);
    convert_safetensors();

    convert_equals("evil_beside", "", GOLDEN "stats_small_sae.safetensors");
    convert_refusals();
    check(!exists(in_folder("pt/evil")), "the code of a hostile checkpoint was run");
}
