/* Tests of section 2, one result everywhere: 1, 2 and 5 threads times every instruction set of this machine
 * give the same bytes for extract, train, stats and encode; and the threads themselves. */

static int threads_count_task(void *context, size_t task)
{
    atomic_int *count = context;
    atomic_fetch_add(&count[task], 1);
    return worker < (size_t)thread_count() ? SC_OK : fail("worker %zu", worker);
}

static int threads_fail_task(void *context, size_t task)
{
    if (task == 5) nanosleep(&(struct timespec){ 0, 2000000 }, NULL);    /* 12 fails first */
    return task % 7 == *(size_t *)context ? fail("task %zu failed", task) : SC_OK;
}

/* Each task once; of several failures the lowest. */
static void threads_pool(void)
{
    enum { TASKS = 3000 };
    static atomic_int count[TASKS];
    for (int threads = 1; threads <= 8; threads += 1 + threads) {
        size_t wrong = 0, failing = 5;
        check(sc_threads_start(threads) == SC_OK && thread_count() == threads, "%d threads do not start", threads);
        for (int round = 0; round < 50; round++) {
            for (size_t i = 0; i < TASKS; i++) atomic_store(&count[i], 0);
            size_t tasks = round % 5 ? (size_t)(random64() % TASKS) : (size_t)round / 5;
            wrong += parallel_for(tasks, threads_count_task, count) != SC_OK;
            for (size_t i = 0; i < TASKS; i++) wrong += atomic_load(&count[i]) != (i < tasks);
            if (tasks <= failing || round % 4) continue;
            wrong += parallel_for(tasks, threads_fail_task, &failing) != SC_FAILED || !says("task 5 failed");
        }
        check(wrong == 0, "with %d threads tasks are lost, doubled or fail out of order (%zu times)", threads, wrong);
    }
    if (sc_threads_start(2) != SC_OK) need("threads");
}

/* Pictures in files of their own, so that several are read at once. */
static void threads_pictures(void)
{
    unsigned char bytes[3 * 64 * 48 + 16];
    test_random_state = 1;                           /* the same pictures everywhere */
    mkdir(in_folder("threads"), 0700);
    mkdir(in_folder("threads/a"), 0700);
    mkdir(in_folder("threads/b"), 0700);
    for (int i = 0; i < 19; i++) {
        int head = snprintf((char *)bytes, sizeof bytes, "P6 %d %d 255\n", 40 + i, 48 - i);
        size_t size = (size_t)(3 * (40 + i) * (48 - i));
        for (size_t b = 0; b < size; b++) bytes[(size_t)head + b] = (unsigned char)(random64() >> 56);
        put_file(in_folder("threads/%c/%02d.ppm", i % 3 ? 'a' : 'b', i), bytes, (size_t)head + size);
    }
}

#define THREADS_ACTS "--acts " GOLDEN "acts.safetensors --batch 11 --lr 0.00390625 --warmup 4 "

/* digest: of the tensors' names and bytes as every machine and compiler writes them. */
static const struct { const char *name, *command; uint64_t digest; } threads_commands[] = {
    { "extract of a CLIP", "extract -m " GOLDEN "clip_hf.safetensors --layer 3 --hook resid " GOLDEN
      "images.safetensors -o",
      0x8f15a9fe7d99eee6 },
    { "extract of a ViT", "extract -m " GOLDEN "vit_timm.safetensors --layer 1 --hook mlp " GOLDEN
      "images.safetensors -o",
      0x825e04f5e72cde97 },
    { "extract of files", "extract -m " GOLDEN "clip_timm.safetensors --layer 1 --hook attn --dtype f16 FOLDER -o",
      0x9ea702897927e4d3 },
    { "train of ReLU with ghosts", "train " THREADS_ACTS "--arch relu --latents 300 --l1 0.004 --ghost "
      "--dead-window 1 --b-dec geomedian-images --steps 12 -o",
      0x782279183c266c5e },
    { "train of a dense ReLU", "train " THREADS_ACTS "--arch relu --init " GOLDEN "init_300.safetensors "
      "--l1 0.001 --steps 12 -o",
      0xc98ce466c187879a },
    { "train of TopK with ghosts", "train " THREADS_ACTS "--arch topk --k 5 --latents 515 --b-dec geomedian "
      "--ghost --dead-window 1 --steps 12 -o",
      0xc9e117b28c4b2107 },
    { "train from pictures", "train -m " GOLDEN "clip_timm.safetensors --layer 2 --hook attn FOLDER --arch topk "
      "--k 4 --latents 96 --batch 5 --epochs 2 --b-dec mean -o",
      0x50284bf1144b76f8 },
    { "stats of ReLU", "stats -s " GOLDEN "stats_exact_sae.safetensors --acts " GOLDEN
      "stats_exact_acts.safetensors --class-counts -o",
      0xfb86ad2264beaa64 },
    { "stats of TopK", "stats -s " GOLDEN "stats_small_sae.safetensors --acts " GOLDEN
      "stats_small_acts.safetensors -o",
      0xd4cd93e372965668 },
    { "encode", "encode -s " GOLDEN "train_relu.safetensors --layer 2 --hook mlp --acts " GOLDEN
      "acts.safetensors --reconstruction -o",
      0xddae0eeb49ae39e8 },
};

static uint64_t threads_digest(const char *path)
{
    sc_safetensors file;
    uint64_t digest = 0;
    if (sc_safetensors_open(&file, path) != SC_OK) return 0;
    for (size_t i = 0; i < file.tensors; i++) {      /* in the order of their names */
        digest64_name(&digest, file.tensor[i].name);
        digest64_number(&digest, digest_bytes(file.tensor[i].data, file.tensor[i].bytes));
    }
    sc_safetensors_close(&file);
    return digest;
}

static void threads_same_bytes(void)
{
    static const int threads[] = { 1, 2, 5 };
    enum { COMMANDS = sizeof threads_commands / sizeof *threads_commands };
    int firsts = 1;
    for (size_t i = 0; i < 4; i++) {
        setenv("SAECLIP_ISA", instruction_set_names[i], 1);
        if (run("info") == 2) {
            skip("the same bytes with %s: this machine or build has not got it", instruction_set_names[i]);
            continue;
        }
        check(strstr(ran.out, instruction_set_names[i]) != NULL, "SAECLIP_ISA=%s is not what info says",
              instruction_set_names[i]);
        for (size_t t = 0; t < 3; t++) {
            for (size_t c = 0; c < COMMANDS; c++) {
                char command[1024];
                const char *place = strstr(threads_commands[c].command, "FOLDER");
                if (!place) snprintf(command, sizeof command, "%s", threads_commands[c].command);
                else snprintf(command, sizeof command, "%.*s%s%s", (int)(place - threads_commands[c].command),
                              threads_commands[c].command, in_folder("threads"), place + strlen("FOLDER"));
                if (works("%s %s --quiet --threads %d", command, in_folder(firsts ? "first%zu" : "other", c),
                          threads[t]) && !firsts)
                    check(same_files(in_folder("first%zu", c), in_folder("other")),
                          "%s with %d threads and %s gives other bytes", threads_commands[c].name, threads[t],
                          instruction_set_names[i]);
            }
            for (size_t c = 0; c < COMMANDS && firsts; c++) {
                uint64_t digest = threads_digest(in_folder("first%zu", c));
                check(digest == threads_commands[c].digest, "%s writes tensors of digest 0x%016llx, elsewhere "
                      "0x%016llx", threads_commands[c].name, (unsigned long long)digest,
                      (unsigned long long)threads_commands[c].digest);
            }
            firsts = 0;
        }
    }
    restore_isa();
}

static void test_threads(void)
{
    threads_pool();
    threads_pictures();
    threads_same_bytes();
}
