/* Tests of README.md: its commands run as they are printed, in a folder with drawn images and the
 * small model under the names that it uses; what it mentions exists; its length. Links are checked
 * in all *.md files. */

enum { README_MOST_WORDS = 1300, README_MOST_COLUMNS = 100, README_MOST_PICTURE = 100 * 1024 };

/* The checkout's text file as one string, to be freed. */
static char *readme_text(const char *path)
{
    size_t count;
    char *text = read_whole(path, &count);
    if (!text) need("%s", path);
    return text;
}

static void readme_length(const char *text)
{
    size_t words = 0, line = 1, columns = 0;
    int inside = 0;
    for (const char *c = text; *c; c++) {
        int blank = isspace((unsigned char)*c) != 0;
        words += !blank && !inside;
        inside = !blank;
        columns += ((unsigned char)*c & 0xc0) != 0x80;   /* UTF-8: the first byte of a character */
        if (*c != '\n') continue;
        columns--;
        check(columns <= README_MOST_COLUMNS, "README.md:%zu: %zu columns", line++, columns);
        columns = 0;
    }
    check(words <= README_MOST_WORDS, "README.md has %zu words", words);
}

/* --- Commands --- */

/* The files that the commands name: photos/ with 16 images; photo.jpg, which is read as PPM, since
 * the first bytes decide; the model as clip.safetensors; two files to compare. Returns whether the
 * images could be drawn. */
static int readme_inputs(const char *synth)
{
    size_t count;
    const char *model = get_file("weights/demo.safetensors", &count);
    if (mkdir(in_folder("readme"), 0777) != 0 || !model) need("weights/demo.safetensors");
    put_file(in_folder("readme/clip.safetensors"), model, count);
    put_file(in_folder("readme/yours.safetensors"), model, count);
    put_file(in_folder("readme/saeclips.safetensors"), model, count);
    other_program = synth;
    run("draw -o %s --seed 11 --count 16", in_folder("readme/world"));
    int drawn = check(ran.status == 0, "synth draw: %s", ran.err);
    run("stream --seed 11 --count 1");
    other_program = NULL;
    if (!drawn || !check(ran.out_count >= DEMO_RECORD, "synth stream: %s", ran.err)) return 0;
    FILE *photo = fopen(in_folder("readme/photo.jpg"), "wb");
    if (!photo) need("a file");
    fprintf(photo, "P6 112 112 255\n");
    fwrite(ran.out + DEMO_PIXELS, 1, DEMO_RECORD - DEMO_PIXELS, photo);
    if (fclose(photo) != 0) need("photo.jpg");
    if (rename(in_folder("readme/world/pictures"), in_folder("readme/photos")) != 0) need("photos");
    return 1;
}

/* Runs one line of a code block, continuation lines joined, and counts those of saeclip. The small
 * model has 6 blocks, not 12: block 11 becomes block 5. */
static void readme_command(char *line, const char *makefile, size_t *ran_count)
{
    char target[64], *layer = strstr(line, "--layer 11");
    if (layer) memcpy(layer, "--layer 05", 10);
    if (strncmp(line, "saeclip ", 8) == 0) {
        *ran_count += (size_t)works("%s --quiet", line + 8);
    } else if (sscanf(line, "make %50[a-z-]", target) == 1) {    /* too long to run */
        char rule[80];
        snprintf(rule, sizeof rule, "\n%s:", target);
        check(strstr(makefile, rule) != NULL, "README.md: no rule for '%s'", line);
    } else {
        check(strncmp(line, "fingerprint ", 12) == 0, "README.md: nothing tests '%s'", line);
    }
}

static void readme_commands(const char *text, const char *makefile)
{
    char line[1000] = "";
    size_t used = 0, ran_count = 0;
    for (const char *c = text; *c; c += strcspn(c, "\n") + 1) {
        size_t length = strcspn(c, "\n");
        if (strncmp(c, "    ", 4) != 0 || length > 200 || used + length > sizeof line) continue;
        int more = c[length - 1] == '\\';
        used += (size_t)snprintf(line + used, sizeof line - used, "%.*s ",
                                 (int)length - 4 - more, c + 4);
        if (more) continue;
        readme_command(line, makefile, &ran_count);
        used = 0;
    }
    check(ran_count > 5, "README.md: only %zu commands ran", ran_count);
}

/* --- What is mentioned --- */

/* Every command has a place in README.md's table, and every option in README.md is one of some
 * command. */
static void readme_options(const char *text)
{
    static char help[1 << 16];
    char list[4000], name[20];
    size_t used = 0;
    const char *table = strstr(text, "\n## Commands\n");
    run("--help");
    snprintf(list, sizeof list, "%s", ran.out);
    for (const char *row = strstr(list, "\n    info "); row; row = strstr(row + 1, "\n    ")) {
        char alone[40], followed[40];                    /* `top` or `info [FILE]` */
        if (sscanf(row, " %19[a-z]", name) != 1) continue;
        snprintf(alone, sizeof alone, "`%s`", name);
        snprintf(followed, sizeof followed, "`%s ", name);
        check(table && (strstr(table, alone) || strstr(table, followed)),
              "README.md's table lacks the command %s", name);
        works("%s --help", name);
        if (used + ran.out_count < sizeof help) memcpy(help + used, ran.out, ran.out_count);
        used += ran.out_count;
    }
    if (!check(used > 1000 && used < sizeof help, "the help has %zu bytes", used)) return;
    help[used] = '\0';
    for (const char *c = text; (c = strstr(c, "--")) != NULL; c += strspn(c, "-")) {
        char option[40];
        size_t length = strspn(c + 2, "abcdefghijklmnopqrstuvwxyz-");
        if (length < 2 || length > 30 || strncmp(c, "--help", 6) == 0) continue;
        snprintf(option, sizeof option, "    %.*s ", (int)length + 2, c);
        check(strstr(help, option) != NULL, "README.md: no command has%s", option + 3);
    }
}

/* Links to files of this repository, and names in `code` that have an ending and begin with one of
 * its folders. */
static void readme_links(const char *path)
{
    char *text = readme_text(path), target[1024], name[200];
    int folder_length = (int)(strrchr(path, '/') - path) + 1;
    for (const char *c = text; (c = strstr(c, "](")) != NULL; c++) {
        if (sscanf(c, "](%199[^)#\n ]", name) != 1 || strstr(name, "://")) continue;
        snprintf(target, sizeof target, "%.*s%s", folder_length, path, name);
        check(exists(target), "%s: a link to '%s', which is not there", path, name);
    }
    for (const char *c = text; (c = strchr(c, '`')) != NULL; c++) {
        if (sscanf(c, "`%199[a-zA-Z0-9_./-]", name) != 1 || !strchr(name, '.')) continue;
        if (strncmp(name, "tests/", 6) != 0 && strncmp(name, "weights/", 8) != 0) continue;
        check(exists(name), "%s: it mentions '%s', which is not there", path, name);
    }
    free(text);
}

/* All *.md below a folder but those of builds. */
static size_t readme_walk(const char *path)
{
    size_t found = 0;
    struct dirent *entry;
    struct stat about;
    DIR *inside = opendir(path);
    while (inside && (entry = readdir(inside)) != NULL) {
        char name[1024];
        size_t length = strlen(entry->d_name);
        if (entry->d_name[0] == '.' || strcmp(entry->d_name, "build") == 0) continue;
        if (strcmp(entry->d_name, "out") == 0) continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        if (lstat(name, &about) != 0) continue;
        if (S_ISDIR(about.st_mode)) found += readme_walk(name);
        if (!S_ISREG(about.st_mode) || length < 4) continue;
        if (strcmp(entry->d_name + length - 3, ".md") != 0) continue;
        readme_links(name);
        found++;
    }
    if (inside) closedir(inside);
    return found;
}

static void test_readme(void)
{
    char *text = readme_text("README.md"), *makefile = readme_text("Makefile");
    static char saeclip[8400], synth[8400], root[8400];
    struct stat about;
    readme_length(text);
    check(readme_walk(".") > 3, "no *.md files were found");
    check(stat("weights/demo.svg", &about) == 0 && about.st_size <= README_MOST_PICTURE,
          "weights/demo.svg is missing or too large");
    snprintf(root, sizeof root, "%s", absolute_path("."));
    snprintf(saeclip, sizeof saeclip, "%s", absolute_path(program()));
    snprintf(synth, sizeof synth, "%s", absolute_path(demo_synth()));
    readme_options(text);
    if (!exists(synth)) skip("README.md's commands: %s is not there (make tests/synth)", synth);
    else if (readme_inputs(synth)) {
        if (chdir(in_folder("readme")) != 0) need("%s", in_folder("readme"));
        other_program = saeclip;
        readme_commands(text, makefile);
        other_program = NULL;
        if (chdir(root) != 0) need("%s", root);
    }
    free(text);
    free(makefile);
}
