/* Tests of images: PNM, decoders, data sets, Pillow's resize, the reader. */

static const char *images_file(const char *name) { return in_folder("images/%s", name); }

static void images_write(const char *name, const void *bytes, size_t count)
{
    put_file(images_file(name), bytes, count);
}

static void images_write_text(const char *name, const char *text)
{
    put_text(images_file(name), text);
}

/* --- What is said on standard error --- */

static int images_stderr = -1;

static void images_listen(void)
{
    int to = open(images_file("said"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    images_stderr = dup(2);
    if (to < 0 || images_stderr < 0 || dup2(to, 2) < 0) need("listening");
    close(to);
    quiet = 0;
}

/* Ends listening: how many lines there were, and whether the last holds a text. */
static int images_heard(const char *text)
{
    int lines = 0;
    quiet = 1;
    if (dup2(images_stderr, 2) < 0) need("listening");
    close(images_stderr);
    const char *said = get_file(images_file("said"), NULL);
    for (const char *c = said; *c; c++) lines += *c == '\n';
    return strstr(said, text) ? lines : -lines;
}

/* A P6 of one colour: 11 + 3 w h bytes for one-digit sizes. */
static void images_write_ppm(const char *name, int width, int height, int value)
{
    unsigned char bytes[4096];
    int head = snprintf((char *)bytes, sizeof bytes, "P6\n%d %d\n255\n", width, height);
    memset(bytes + head, value, (size_t)(3 * width * height));
    images_write(name, bytes, (size_t)(head + 3 * width * height));
}

static unsigned char images_formula(uint32_t x, uint32_t y, uint32_t c)
{
    uint32_t h = x * 374761393u + y * 668265263u + c * 2246822519u;
    h = (h ^ h >> 13) * 1274126177u;
    return (unsigned char)(((x >> 4) + (y >> 4)) & 1 ? h >> 16 : x * 5 + y * 3 + c * 85);
}

static void images_write_formula(const char *name, uint32_t width, uint32_t height)
{
    char head[64];
    size_t length = (size_t)snprintf(head, sizeof head, "P6 %u %u 255\n", width, height);
    unsigned char *bytes = new_array(length + (size_t)3 * width * height, 1), *to = bytes + length;
    memcpy(bytes, head, length);
    for (uint32_t y = 0; y < height; y++)
        for (uint32_t x = 0; x < width; x++)
            for (uint32_t c = 0; c < 3; c++) *to++ = images_formula(x, y, c);
    images_write(name, bytes, length + (size_t)3 * width * height);
    free(bytes);
}

static const sc_preprocess images_one = { .size = 1, .std = { 1, 1, 1 } };

/* --- PNM --- */

static int images_parse(const char *bytes, size_t count, picture *result)
{
    images_write("parse", bytes, count);
    FILE *file = fopen(images_file("parse"), "r");
    if (!file) need("a file");
    *result = (picture){ 0 };
    int status = pnm_read("memory", file, result);
    fclose(file);
    return status;
}

static void images_test_pnm(void)
{
    static const struct { const char *text; size_t count; int width,
        height; const char *rgb; } good[] = {
        { "P2 2 1 255 7 9", 14, 2, 1, "\7\7\7\11\11\11" },
        { "P2\n# a comment\n2#x\n1 255\n7 #\n 9 ", 32, 2, 1, "\7\7\7\11\11\11" },
        { "P5 2 1 255\n\7\11", 13, 2, 1, "\7\7\7\11\11\11" },
        { "P5 1 1 255\n#", 12, 1, 1, "###" },
        { "P6 1 2 255\n\1\2\3\4\5\6", 17, 1, 2, "\1\2\3\4\5\6" },
        { "P6 1 1 65535\n\377\377\200\0\0\1", 19, 1, 1, "\377\200\0" },
        { "P6 1 1 256\n\1\0\0\200\0\0", 17, 1, 1, "\377\200\0" },
        { "P5 4 1 2\n\0\1\2\1", 13, 4, 1, "\0\0\0\200\200\200\377\377\377\200\200\200" },
        { "P5 3 1 102\n\1\3\5", 14, 3, 1, "\2\2\2\10\10\10\14\14\14" },   /* 2.5, 7.5, 12.5 */
        { "P4 3 2\n\100\240", 9, 3, 2, "\377\377\377\0\0\0\377\377\377\0\0\0\377\377\377\0\0\0" },
    };
    static const struct { const char *text; size_t count; const char *says; } bad[] = {
        { "P7 1 1 255\n...", 14, "not a PNM" }, { "hello", 5, "not a PNM" }, { "P", 1,
            "not a PNM" },
        { "P6", 2, "width" }, { "P6 0 1 255\n", 11, "at least 1" }, { "P6 1 1 0\n", 9,
            "at least 1" },
        { "P6 1 1 65536\n", 13, "maxval" }, { "P6 -1 1 255\n", 12, "its width is missing or invalid" },
        { "P6 16385 16384 255\n", 19, "at most" }, { "P6 99999999999999999999 1 255\n", 30,
            "width" },
        { "P6 268435456 268435456 255\n", 27, "at most" }, { "P6 1 1 255", 10, "ends before its last sample" },
        { "P6 16384 16384 255\nabc", 22, "ends before its last sample" },
        { "P5 2 1 65535\nabc", 16, "ends before its last sample" }, { "P2 1 1 9 10", 11, "last sample is missing or invalid (expected a PNM number of at most 9)" },
        { "P5 2 1 9\n\1\12", 11, "a sample of 10" }, { "P2 2 1 255 7", 12, "last sample is missing" },
        { "P2 1 1 255 x", 12, "last sample is missing" }, { "P3 1 1 255 1 2 3x", 17, "last sample is missing" },
    };
    picture result;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        int status = images_parse(good[i].text, good[i].count, &result);
        check(status == SC_OK && result.width == (size_t)good[i].width &&
              result.height == (size_t)good[i].height &&
              memcmp(result.rgb, good[i].rgb, 3 * result.width * result.height) == 0,
              "PNM number %zu is read", i);
        free(result.memory);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int status = images_parse(bad[i].text, bad[i].count, &result);
        check(status == SC_FAILED && strstr(sc_error(), bad[i].says),
              "bad PNM number %zu is refused with '%s'", i, bad[i].says);
        free(result.memory);
    }
    check(images_parse("", 0, &result) == SC_END, "an empty PNM is another case");
}

/* --- Resize --- */

static uint32_t get32(const unsigned char *b)
{
    return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static uint64_t get64(const unsigned char *b) { return get32(b) | (uint64_t)get32(b + 4) << 32; }

static void images_test_golden(void)
{
    unsigned char head[24], *expected = NULL, *pixels = NULL;
    FILE *file = fopen(GOLDEN "images.bin", "rb");
    if (!check(file != NULL, GOLDEN "images.bin is missing")) return;
    while (fread(head, 1, 24, file) == 24 && get32(head) > 0) {
        uint32_t width = get32(head), height = get32(head + 4);
        sc_preprocess prep = { .size = (int)get32(head + 8), .square = (int)get32(head + 12),
                               .crop_hf = (int)get32(head + 16) };
        size_t bytes = 3 * (size_t)prep.size * (size_t)prep.size,
            stored = get32(head + 20) ? 8 : bytes;
        expected = new_array(stored, 1);
        pixels = new_array(bytes, 1);
        if (fread(expected, 1, stored, file) != stored) break;
        images_write_formula("formula.ppm", width, height);
        sc_images set;
        int status = sc_images_open(&set, images_file("formula.ppm"), 0);
        if (status == SC_OK) status = sc_image_load(&set, 0, &prep, pixels);
        int same = stored == bytes ? memcmp(pixels, expected, bytes) == 0
                                   : digest_bytes(pixels, bytes) == get64(expected);
        check(status == SC_OK && same, "%ux%u to %d (square %d, hf %d) is Pillow's", width, height,
              prep.size, prep.square, prep.crop_hf);
        sc_images_close(&set);
        free(expected);
        free(pixels);
    }
    fclose(file);
    /* 256 million rows that share one pixel: only those that the crop needs take memory */
    const picture tall = { .width = 1, .height = MAX_PIXELS, .rgb = (const unsigned char *)"abc" };
    pixels = new_array(224 * 224, 3);
    check(resize_and_crop(&tall, 224, 0, pixels) == SC_OK && memcmp(pixels, "abc", 3) == 0 &&
          memcmp(pixels, pixels + 3, 3 * 224 * 224 - 3) == 0, "a very tall image");
    free(pixels);
}

/* --- Data sets --- */

static int images_said;              /* lines; negative if none tells of files passed over */

static int images_opens(sc_images *set, const char *name, size_t limit)
{
    images_listen();
    int status = sc_images_open(set, images_file(name), limit);
    images_said = images_heard("passed over");
    return status == SC_OK;
}

static int images_refuses(const char *name, const char *says)
{
    sc_images set;
    int status = sc_images_open(&set, images_file(name), 0);
    if (status == SC_OK) sc_images_close(&set);
    return status == SC_FAILED && strstr(sc_error(), says) != NULL;
}

static int images_named(const sc_images *set, size_t i, const char *name, int label)
{
    return i < set->count && strcmp(set->image[i].name, name) == 0 && set->image[i].label == label;
}

static void images_make_folder(const char *name) { mkdir(images_file(name), 0777); }

static void images_test_folder(void)
{
    sc_images set, other;
    images_make_folder("set");
    check(images_refuses("set", "no image"), "an empty folder is refused");
    images_write_text("set/notes", "hello");
    check(images_refuses("set", "no image among the 1 files"), "a folder without an image is refused");
    images_write_ppm("set/loose.ppm", 2, 2, 1);
    images_write_ppm("set/Loose.ppm", 2, 2, 1);
    images_make_folder("set/empty");
    check(images_opens(&set, "set", 0) && set.count == 2 && !set.classes &&
          !set.class_name &&
          images_named(&set, 0, "Loose.ppm", -1) && images_named(&set, 1, "loose.ppm", -1), "a flat folder");
    check(images_said == 1, "files that are no images are counted in one line");
    sc_images_close(&set);
    images_make_folder("set/b");
    images_make_folder("set/b-1");
    images_make_folder("set/b/deep");
    images_make_folder("set/.hidden");
    images_write_ppm("set/b/x", 2, 2, 1);
    images_write_ppm("set/b/deep/x", 2, 2, 1);
    images_write_ppm("set/b-1/x", 2, 2, 1);
    images_write_ppm("set/.hidden/x", 2, 2, 1);
    images_write_ppm("set/b/.x", 2, 2, 1);
    images_make_folder("set/@eaDir");
    images_write_ppm("set/@eaDir/x", 2, 2, 1);
    check(symlink("x", images_file("set/b/link")) == 0, "a link");
    check(images_refuses("set", "4 images in class folders and 2 beside them"), "a folder of both kinds is refused");
    unlink(images_file("set/loose.ppm"));
    unlink(images_file("set/Loose.ppm"));
    check(images_opens(&set, "set", 0) && set.count == 4 && set.classes == 3 &&
          images_named(&set, 0, "b-1/x", 1) && images_named(&set, 1, "b/deep/x", 0) && images_named(&set, 2, "b/link",
              0) &&
          images_named(&set, 3, "b/x", 0) && strcmp(set.class_name[1], "b-1") == 0, "class folders");
    check(images_said == 1, "files that are not images are named in one line");
    check(rename(images_file("set"), images_file("moved")) == 0 && images_opens(&other, "moved///", 0) &&
          other.digest == set.digest && other.digest != 0 && !strncmp(other.root, images_file("moved"), strlen(images_file("moved"))),
          "a moved folder keeps its digest");
    sc_images_close(&other);
    check(images_opens(&other, "moved", 2) && other.count == 2 && other.classes == 3 &&
          other.digest != set.digest, "--limit takes the first");
    sc_images_close(&other);
    rename(images_file("moved/b-1"), images_file("moved/a"));
    check(images_opens(&other, "moved", 0) && other.digest != set.digest, "class names are in the digest");
    sc_images_close(&other);
    sc_images_close(&set);
    check(symlink("..", images_file("moved/b/loop")) == 0 && images_refuses("moved", "lies too deep"),
          "a folder in itself ends");
    unlink(images_file("moved/b/loop"));
    check(images_refuses("absent", "No such file"), "a missing folder is refused");
    check(images_opens(&set, "moved/b/x", 0) && set.count == 1 && images_named(&set, 0, "x", -1),
          "one image file");
    sc_images_close(&set);
    check(images_refuses("moved/notes", "not an image"), "a file that is none is refused");
    check(symlink("nowhere", images_file("moved/b/zzz")) == 0 && images_opens(&set, "moved", 0) && set.count == 5 &&
          images_named(&set, 4, "b/zzz", 1), "a link to nowhere is an image");
    unsigned char pixel[3];
    check(sc_image_load(&set, 4, &images_one, pixel) == SC_FAILED && strstr(sc_error(), "No such file"),
          "whose turn to be an error comes");
    sc_images_close(&set);
    unlink(images_file("moved/b/zzz"));
    check(mkfifo(images_file("fifo"), 0600) == 0 && images_refuses("fifo", "fifo: "),
          "a fifo is refused");
}

static void images_test_list(void)
{
    sc_images set;
    unsigned char pixel[3];
    images_write_text("list.txt", "# c\r\n\r\nmoved/b/x\t7\r\nmoved/a/x\t0\n#e\nmoved/b/deep/x\t2");
    check(images_opens(&set, "list.txt", 0) && set.count == 3 && set.classes == 8 &&
          !set.class_name && images_named(&set, 0, "moved/b/x", 7) && images_named(&set, 1, "moved/a/x", 0) &&
          images_named(&set, 2, "moved/b/deep/x", 2), "a labelled list");
    check(sc_image_load(&set, 2, &images_one, pixel) == SC_OK && pixel[0] == 1, "paths are the list's");
    check(sc_image_load(&set, 3, &images_one, pixel) == SC_USAGE, "no image beyond the last");
    sc_images_close(&set);
    images_write_text("list.txt", "fifo\nmoved\nnone\nmoved/notes\n");
    static const char *const says[] = { "fifo: ", "directory", "No such", "not an image" };
    check(images_opens(&set, "list.txt", 0) && set.count == 4, "a list of what is no image");
    for (size_t i = 0; i < 4; i++)
        check(sc_image_load(&set, i, &images_one, pixel) == SC_FAILED && strstr(sc_error(), says[i]),
              "%s is refused when its turn comes", set.image[i].name);
    sc_images_close(&set);
    images_write_text("list.txt", "moved/b/x\nwith #1 blank\na#b\n");
    check(images_opens(&set, "list.txt", 0) && set.count == 3 && !set.classes &&
          images_named(&set, 1, "with #1 blank", -1) && images_named(&set, 2, "a#b", -1), "an unlabelled list");
    sc_images_close(&set);
    static const struct { const char *text, *says; } bad[] = {
        { "a\t1\nb\n", "line 2: labels on some lines" }, { "a\nb\t1\n", "line 2: labels on some lines" },
        { "a\t-2\n", "line 1: invalid label" }, { "#\na\tx\n", "line 2: invalid label" },
        { "a\t1\nb\t-1\n", "line 2: invalid label" }, { "a\t1.5\n", "line 1: invalid label" },
        { "a\t99999999999999999999\n", "line 1: invalid label" },
        { "a\t2147483647\n", "line 1: invalid label" }, { "a\t1\t2\n", "line 1: invalid label" },
        { "# nothing\n", "without an image" }, { "", "without an image" },
        { "moved/b/x 3\n", "line 1: a blank before the label (expected path<TAB>label)" },
        { "# c\nmoved/a/x   12\n", "line 2: a blank before the label" },
        { "# c\ra\rb\n", "line 1: a carriage return" }, { "a\nb\rc", "line 2: a carriage return" },
        { "a\t1 # c\n", "line 1: invalid label" }, { "moved/b/x \n", "line 1: a blank before the label" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        images_write_text("list.txt", bad[i].text);
        check(images_refuses("list.txt", bad[i].says), "bad list %zu is refused with '%s'", i,
              bad[i].says);
    }
    images_write_text("list.txt", "\xef\xbb\xbf# c\nmoved/b/x\t3\n");
    check(images_opens(&set, "list.txt", 0) && set.count == 1 && images_named(&set, 0, "moved/b/x", 3),
          "a byte order mark before a comment");
    sc_images_close(&set);
    images_write_text("list.txt", "\xef\xbb\xbfmoved/b/x\n");
    check(images_opens(&set, "list.txt", 0) && set.count == 1 && images_named(&set, 0, "moved/b/x", -1),
          "a byte order mark before a path");
    sc_images_close(&set);
    images_write_ppm("x 3", 2, 2, 1);
    images_write_text("list.txt", "x 3\n");
    check(images_opens(&set, "list.txt", 0) && images_named(&set, 0, "x 3", -1), "a name that ends with a number");
    sc_images_close(&set);
    images_write_text("list.csv", "x 3\n");
    check(images_refuses("list.csv", "a list named *.txt or a packed set named *.safetensors"), "another suffix");
    char *line = new_array(6000, 1);
    memset(line, 'a', 5999);
    images_write_text("list.txt", line);
    check(images_refuses("list.txt", "line 1: too long"), "an endless line is refused");
    put_file(images_file("list.txt"), "a.ppm\nb.p\0m\n", 13);
    check(images_refuses("list.txt", "line 2: too long, or with a byte 0"), "a byte 0 is refused");
    put_file(images_file("list.txt"), "\xff\xfe" "a\0\n\0b\0\n", 10);
    check(images_refuses("list.txt", "line 1: too long, or with a byte 0 (expected text in UTF-8)"), "UTF-16 is refused");
    free(line);
}

static void images_test_packed(void)
{
    static const size_t images[4] = { 2, 2, 3, 3 }, two[1] = { 2 };
    static const int64_t labels[2] = { 1, 0 }, wrong[2] = { 1, 2 };
    unsigned char bytes[36], pixels[12];
    sc_images set, same;
    for (int i = 0; i < 36; i++) bytes[i] = (unsigned char)i;
    for (int kind = 0; kind < 3; kind++) {
        sc_writer w;
        int status = sc_writer_open(&w, images_file("packed.safetensors"));
        if (kind != 1) {
            status |= sc_writer_metadata(&w, "class_names", "[\"a\",\"b\"]");
            status |= sc_writer_metadata(&w, "file_names", "[\"b/x\",\"a/y\"]");
        }
        status |= sc_writer_tensor(&w, "images", SC_U8, 4, images);
        status |= sc_writer_bytes(&w, bytes, 36);
        if (kind != 1) {
            status |= sc_writer_tensor(&w, "labels", SC_I64, 1, two);
            status |= sc_writer_integers(&w, kind == 0 ? labels : wrong, 2);
        }
        check(status == SC_OK && sc_writer_close(&w, SC_OK) == SC_OK, "a packed set is written");
        if (kind == 2) {
            check(images_refuses("packed.safetensors", "image 1: label 2 (expected one of 2 classes)"), "a label beyond the names is refused");
            break;
        }
        check(images_opens(&set, "packed.safetensors", 0) && set.count == 2, "a packed set is opened");
        sc_preprocess prep = { .size = 2 };
        check(sc_image_load(&set, 1, &prep, pixels) == SC_OK && pixels[0] == 18 && pixels[6] == 27,
              "its images are the tensor's, cropped");
        if (kind == 0)
            check(images_named(&set, 0, "b/x", 1) && images_named(&set, 1, "a/y", 0) && set.classes == 2,
                  "its names");
        else check(images_named(&set, 0, "", -1) && !set.classes, "no names");
        sc_images_close(&set);
    }
    images_make_folder("as");
    images_make_folder("as/a");
    images_make_folder("as/b");
    images_write_ppm("as/a/y", 2, 2, 1);
    images_write_ppm("as/b/x", 2, 2, 1);
    sc_writer w;
    static const int64_t sorted[2] = { 0, 1 };
    int status = sc_writer_open(&w, images_file("packed.safetensors"));
    status |= sc_writer_metadata(&w, "class_names", "[\"a\",\"b\"]");
    status |= sc_writer_metadata(&w, "file_names", "[\"a/y\",\"b/x\"]");
    status |= sc_writer_tensor(&w, "images", SC_U8, 4, images) | sc_writer_bytes(&w, bytes, 36);
    status |= sc_writer_tensor(&w, "labels", SC_I64, 1, two) | sc_writer_integers(&w, sorted, 2);
    check(status == SC_OK && sc_writer_close(&w, SC_OK) == SC_OK, "a packed set is written");
    check(images_opens(&set, "as", 0) && images_opens(&same, "packed.safetensors", 0) &&
          set.digest == same.digest,
          "a folder and its packed set have one digest");
    sc_images_close(&set);
    sc_images_close(&same);
    images_write_text("not.safetensors", "hello hello");
    check(images_refuses("not.safetensors", "safetensors"), "a broken packed set is refused");
}

/* Names that are not UTF-8 are written as Latin-1: packing keeps the digest and the classes' numbers. */
static void images_test_names(void)
{
    static const char *const classes[] = { "latin", "latin/\xe9", "latin/\xea", "latin/\xc3\xa9" };
    char name[64];
    sc_images set, packed;
    for (size_t c = 0; c < COUNT(classes); c++) {
        images_make_folder(classes[c]);
        snprintf(name, sizeof name, "%s/\xe8\x01.ppm", classes[c]);
        if (c > 0) images_write_ppm(name, 2, 2, 1);
    }
    works("pack --quiet --size 2 %s -o %s", images_file("latin"), images_file("latin.safetensors"));
    check(images_opens(&set, "latin", 0) && images_opens(&packed, "latin.safetensors", 0)
          && set.digest == packed.digest, "a packed set has the digest of its folder");
    check(packed.classes == 3 && packed.image[2].label == 2 && strcmp(packed.class_name[0], "\xc3\xa9") == 0
          && strcmp(packed.class_name[1], "\xc3\xa9") == 0 && strcmp(packed.class_name[2], "\xc3\xaa") == 0,
          "three classes");
    sc_images_close(&packed);
    sc_images_close(&set);
}

/* --- Decoders --- */

/* What loading `name` as one pixel says with a shell script as decoder; "" if all is well. */
static const char *images_decoded(const char *script, const char *name, unsigned char pixel[3])
{
    char command[600];
    sc_images set;
    images_write_text("decode.sh", script);
    snprintf(command, sizeof command, "  sh  %s", images_file("decode.sh"));
    setenv("SAECLIP_DECODER", command, 1);
    int status = sc_images_open(&set, images_file(name), 0);
    if (status == SC_OK) status = sc_image_load(&set, 0, &images_one, pixel);
    sc_images_close(&set);
    unsetenv("SAECLIP_DECODER");
    return status == SC_OK ? "" : sc_error();
}

static void images_test_decoders(void)
{
    unsigned char pixel[3] = { 0 };
    images_write_text("fake.jpg", "\xff\xd8\xff hello");
    check(!*images_decoded("printf 'P6 1 1 255\\nabc'", "fake.jpg", pixel) && memcmp(pixel, "abc", 3) == 0,
          "a decoder's picture is taken");
    check(!*images_decoded("printf 'P2 1 1 255 '; wc -c", "fake.jpg", pixel) && pixel[0] == 9,
          "the whole file is on its standard input");
    check(!*images_decoded("head -c 300000 /dev/zero >&2; printf 'P2 1 1 255 7 ';"
                    "head -c 300000 /dev/zero;"
                    "head -c 300000 /dev/zero >&2; exit 0", "fake.jpg", pixel) && pixel[0] == 7,
          "much on both outputs is no deadlock");
    check(strstr(images_decoded("printf 'P2 1 1 255 7'; echo; echo ' bad thing\nmore' >&2; exit 3",
          "fake.jpg",
                         pixel), "fake.jpg: sh ended with status 3: more") &&
          !strstr(sc_error(), "bad"), "a complaint counts, and its last line is quoted");
    check(strstr(images_decoded("printf 'banner\nan error\nanother error\nmore' >&2; exit 3", "fake.jpg", pixel),
                 "status 3: an error"), "the first line about an error is quoted");
    check(strstr(images_decoded("kill -9 $$", "fake.jpg", pixel), "signal 9"),
          "a killed decoder is named");
    check(strstr(images_decoded("exit 0", "fake.jpg", pixel), "status 0"), "no picture is an error");
    check(strstr(images_decoded("printf 'P6 2 2 255\\nabc'", "fake.jpg", pixel), "last sample"),
          "half a picture is an error");
    check(!*images_decoded("ls -l /proc/$$/fd >$0.fd; echo P2 1 1 255 $(grep -c -e pipe: -e fake $0.fd)",
                    "fake.jpg", pixel) && pixel[0] == 2, "no other file is inherited");
    setenv("SAECLIP_DECODER", "no-such-program-here -x", 1);
    sc_images set;
    check(sc_images_open(&set, images_file("fake.jpg"), 0) == SC_OK &&
          sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED &&
          strstr(sc_error(), "cannot start 'no-such-program-here' (expected a decoder of JPEG"), "it must be there");
    setenv("SAECLIP_DECODER", "", 1);
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED && strstr(sc_error(), "cannot start ''"),
          "none");
    unsetenv("SAECLIP_DECODER");
    struct rlimit files, few;                    /* one more file can be opened: the image */
    int fd = dup(0);
    close(fd);
    getrlimit(RLIMIT_NOFILE, &files);
    few = files;
    few.rlim_cur = (rlim_t)fd + 1;
    setrlimit(RLIMIT_NOFILE, &few);
    int status = load_image(&set, 0, &images_one, pixel);
    setrlimit(RLIMIT_NOFILE, &files);
    check(status == MACHINE_FAILED && strstr(sc_error(), "cannot start 'djpeg': Too many open files"),
          "a machine without a free file is not a missing program: %s", sc_error());
    char *path = strdup(getenv("PATH"));
    setenv("PATH", in_folder("images"), 1);
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED && strstr(sc_error(),
          "libjpeg-turbo-progs"),
          "a missing decoder's package is named");
    images_write_text("djpeg", "#!/bin/sh\nread all\necho first >&2\nexit 1\n");
    images_write_text("convert", "#!/bin/sh\nread all && exit 2\nprintf \"P2 1 1 255 ${#all}\"\n");
    chmod(images_file("djpeg"), 0755);
    chmod(images_file("convert"), 0755);
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_OK && pixel[0] >= 6,
          "the next decoder's turn comes if the first refuses");
    images_write_text("convert", "#!/bin/sh\necho second >&2\nexit 1\n");
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED && strstr(sc_error(), "first"),
          "the format's own decoder is quoted");
    unlink(images_file("convert"));
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED && strstr(sc_error(), "first"),
          "of those that are there");
    images_write_text("djpeg", "#!/bin/sh\nprintf 'P2 1 1 255 7'\necho Corrupt >&2\nexit 2\n");
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_OK && pixel[0] == 7, "djpeg may warn");
    images_write_text("djpeg", "#!/bin/sh\nprintf 'P2 1 1 255 7'\necho Premature end of JPEG file >&2\nexit 2\n");
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED && strstr(sc_error(), "Premature"),
          "but not of a file's end");
    images_write_text("djpeg", "#!/bin/sh\nprintf 'P2 1 1 255 7'\n[ \"$1$2$3\" = -verbose-verbose-verbose ] || exit 0\n"
                      "printf 'banner\\n%2000s\\nCorrupt\\nPremature end of JPEG file\\nEnd Of Image\\n' x >&2\nexit 2\n");
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED
          && strstr(sc_error(), "djpeg lost or changed samples: Premature end of JPEG file"), "even if it is not the first warning");
    images_write_text("djpeg", "#!/bin/sh\nprintf 'banner\\n\\nNot a JPEG\\n' >&2\nexit 1\n");
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED && strstr(sc_error(), "status 1: Not a JPEG"),
          "its last words are quoted");
    images_write_text("djpeg", "#!/bin/sh\nprintf 'P2 1 1 255 7'\necho first >&2\nexit 1\n");
    images_write_text("convert", "#!/bin/sh\nprintf 'P2 1 1 255 9'\n");
    chmod(images_file("convert"), 0755);
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED && strstr(sc_error(), "first"),
          "but not if it has written");
    setenv("PATH", path, 1);
    free(path);
    sc_images_close(&set);
}

static void images_put32(unsigned char *at, uint32_t value)
{
    for (int i = 0; i < 4; i++) at[i] = (unsigned char)(value >> (24 - 8 * i));
}

/* Appends a PNG's chunk: length, name, data, CRC-32 (PNG specification, 5.3 and annex D). */
static size_t images_png_chunk(unsigned char *png, size_t at, const char *name, const void *data, size_t size)
{
    uint32_t crc = 0xffffffff;
    images_put32(png + at, (uint32_t)size);
    memcpy(png + at + 4, name, 4);
    memcpy(png + at + 8, data, size);
    for (size_t i = 0; i < size + 4; i++) {
        crc ^= png[at + 4 + i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    images_put32(png + at + 8 + size, ~crc);
    return at + size + 12;
}

/* One black pixel as a PNG of a colour type and bit depth, with an sBIT chunk: [bits]. */
static void images_write_png(const char *name, int type, int depth, const char *sbit, size_t bits)
{
    static const size_t channels[] = { 1, 0, 3, 1, 2, 0, 4 };
    unsigned char png[256] = "\x89PNG\r\n\x1a\n", header[13] = { 0, 0, 0, 1, 0, 0, 0, 1 }, data[32] = { 0x78, 1, 1 };
    size_t row = 1 + (channels[type] * (size_t)depth + 7) / 8, at = 8;
    header[8] = (unsigned char)depth;
    header[9] = (unsigned char)type;
    data[3] = (unsigned char)row;                /* a stored block (RFC 1951): length, its complement */
    data[5] = (unsigned char)~row;
    data[4] = 0;
    data[6] = 0xff;
    images_put32(data + 7 + row, (uint32_t)row << 16 | 1);       /* Adler-32 of zeros */
    at = images_png_chunk(png, at, "IHDR", header, 13);
    at = images_png_chunk(png, at, "gAMA", "\0\0\xb1\x8f", 4);
    if (bits) at = images_png_chunk(png, at, "sBIT", sbit, bits);
    if (type == 3) at = images_png_chunk(png, at, "PLTE", "\0\0\0", 3);
    at = images_png_chunk(png, at, "IDAT", data, 7 + row + 4);
    at = images_png_chunk(png, at, "IEND", "", 0);
    put_file(images_file(name), png, at);
}

/* pngtopnm changes the samples of a PNG with an sBIT chunk of fewer bits than they have. */
static void images_test_sbit(void)
{
    static const struct { int type, depth; const char *sbit; size_t bits; int refused; } cases[] = {
        { 2, 8, "", 0, 0 }, { 2, 8, "\x8\x8\x8", 3, 0 }, { 2, 8, "\x5\x6\x5", 3, 0 }, { 2, 8, "\x5\x5\x5", 3, 1 },
        { 0, 8, "\x8", 1, 0 }, { 0, 8, "\x4", 1, 1 }, { 0, 4, "\x4", 1, 0 }, { 0, 4, "\x3", 1, 1 },
        { 0, 16, "\x10", 1, 0 }, { 0, 16, "\xc", 1, 1 }, { 6, 8, "\x8\x8\x8\x8", 4, 0 },
        { 6, 8, "\x8\x8\x8\x1", 4, 0 }, { 3, 8, "\x8\x8\x8", 3, 0 }, { 3, 8, "\x5\x5\x5", 3, 1 },
        { 3, 1, "\x8\x8\x8", 3, 0 }, { 4, 8, "\x2\x8", 2, 1 } };
    unsigned char pixel[3];
    sc_images set;
    if (!can_decode("PNG") || system("pngtopnm --version >/dev/null 2>&1") != 0) {
        skip("PNGs with the chunk sBIT: no pngtopnm here");
        return;
    }
    for (size_t i = 0; i < COUNT(cases); i++) {
        images_write_png("sbit.png", cases[i].type, cases[i].depth, cases[i].sbit, cases[i].bits);
        if (sc_images_open(&set, images_file("sbit.png"), 0) != SC_OK) need("%s", sc_error());
        int status = sc_image_load(&set, 0, &images_one, pixel);
        check(cases[i].refused ? status != SC_OK && strstr(sc_error(), "fewer significant bits") != NULL
                               : status == SC_OK && pixel[0] == 0,
              "a PNG of type %d, depth %d, with sBIT: %s", cases[i].type, cases[i].depth, sc_error());
        sc_images_close(&set);
    }
    char *path = strdup(getenv("PATH"));    /* an older pngtopnm says so only if it is verbose */
    setenv("PATH", in_folder("images"), 1);
    images_write_text("pngtopnm", "#!/bin/sh\nprintf 'P2 1 1 31 7'\n[ \"$1\" != -verbose ] || printf 'pngtopnm: reading\\n"
                      "pngtopnm: image has fewer significant bits\\npngtopnm: Writing\\n' >&2\n");
    chmod(images_file("pngtopnm"), 0755);
    if (sc_images_open(&set, images_file("sbit.png"), 0) != SC_OK) need("%s", sc_error());
    check(sc_image_load(&set, 0, &images_one, pixel) == SC_FAILED
          && strstr(sc_error(), "pngtopnm lost or changed samples: pngtopnm: image has fewer significant bits"),
          "a decoder that changes samples: %s", sc_error());
    sc_images_close(&set);
    unlink(images_file("pngtopnm"));
    setenv("PATH", path, 1);
    free(path);
}

/* A GIF of one red pixel: on a canvas of 1 x 1, or at (1, 0) or (0, 0) of a canvas of 2 x 1, whose other pixel
 * decoders fill differently. */
static void images_test_gif(void)
{
    static const unsigned char start[] = "GIF89a\2\0\1\0\x80\0\0\0\0\xff\xff\0\0";
    static const unsigned char control[] = "\x21\xf9\4\1\0\0\0\0";
    static const unsigned char frame[] = "\x2c\1\0\0\0\1\0\1\0\0\2\2\x4c\1\0;";
    static const struct { int width, x, control, right; } cases[] = {
        { 1, 0, 0, 1 }, { 1, 0, 1, 1 }, { 2, 1, 0, 0 }, { 2, 0, 0, 0 }, { 2, 1, 1, 0 } };
    unsigned char gif[64], pixel[3];
    sc_images set;
    for (size_t i = 0; i < COUNT(cases); i++) {
        size_t size = sizeof start - 1;
        memcpy(gif, start, size);
        gif[6] = (unsigned char)cases[i].width;
        if (cases[i].control) memcpy(gif + size, control, sizeof control - 1);
        if (cases[i].control) size += sizeof control - 1;
        memcpy(gif + size, frame, sizeof frame - 1);
        gif[size + 1] = (unsigned char)cases[i].x;
        size += sizeof frame - 1;
        put_file(images_file("canvas.gif"), gif, size);
        if (!decodes("", images_file("canvas.gif"))) {
            skip("GIF %zu: no program here decodes it", i);
            continue;
        }
        if (sc_images_open(&set, images_file("canvas.gif"), 0) != SC_OK) need("%s", sc_error());
        int status = sc_image_load(&set, 0, &images_one, pixel);
        if (cases[i].right)
            check(status == SC_OK && pixel[0] == 255 && pixel[2] == 0, "GIF %zu: %d, %d %d %d", i, status, pixel[0],
                  pixel[1], pixel[2]);
        else check(status != SC_OK && strstr(sc_error(), "canvas"), "GIF %zu is refused", i);
        sc_images_close(&set);
    }
}

/* Each format by its real decoder: a grey image through an encoder and back. */
static void images_test_formats(void)
{
    static const struct { const char *encoder, *decoder, *name; int tolerance; } format[] = {
        { "cjpeg -quality 100", "djpeg", "f.jpg", 2 }, { "pnmtopng", "pngtopnm", "f.png", 0 },
        { "pamdepth 65535 | pnmtopng", "pngtopnm", "f16.png", 0 },
        { "convert - bmp:-", "", "f.bmp", 0 }, { "convert - gif:-", "", "f.gif", 0 },
        { "convert - tiff:-", "", "f.tif", 0 },
        { "ppmtopgm | pgmtopbm -threshold | pnmtopng", "pngtopnm", "f1.png", 155 } };
    images_write_ppm("f.ppm", 9, 7, 100);
    for (size_t i = 0; i < COUNT(format); i++) {
        char command[2048];
        unsigned char pixel[3] = { 0 };
        sc_images set = { 0 };
        const char *path = images_file(format[i].name);
        snprintf(command, sizeof command, "(%s) <%s >%s 2>/dev/null", format[i].encoder, images_file("f.ppm"), path);
        if (system(command) != 0 || !decodes(format[i].decoder, path)) {
            skip("%s: no '%s' here, or no program that decodes its output", format[i].name, format[i].encoder);
            continue;
        }
        int status = sc_images_open(&set, path, 0);
        if (status == SC_OK) status = sc_image_load(&set, 0, &images_one, pixel);
        check(status == SC_OK && abs(pixel[0] - 100) <= format[i].tolerance && pixel[0] == pixel[2],
              "%s is decoded (%d)", format[i].name, pixel[0]);
        sc_images_close(&set);
    }
}

/* --- The reader --- */

typedef struct { size_t count, end; } images_circle;

static int images_in_circles(void *context, size_t draw, size_t *image)
{
    const images_circle *order = context;
    *image = draw * 7 % order->count;
    return draw < order->end ? SC_OK : SC_END;
}

/* A feed of pixels alone, `room` images at a time. */
static int images_feed(feed *f, const sc_images *set, draw_function *order, void *context,
                       size_t room, int skip_bad)
{
    *f = (feed){ .set = *set, .preprocess = images_one, .skip_bad = skip_bad };
    return start_feed(f, room, order, context, 0);
}

static int images_next(feed *f)
{
    int status = next_batch(f, 1);
    return status == SC_OK && f->count == 0 ? SC_END : status;
}

/* The set stays, without the names that bad images lost. */
static void images_end(feed *f)
{
    f->set = (sc_images){ 0 };
    close_feed(f);
}

static void images_test_reader(void)
{
    enum { N = 40 };
    sc_images set;
    feed f;
    char name[32];
    images_make_folder("many");
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "many/%02d.ppm", i);
        images_write_ppm(name, 1 + i % 9, 1 + i % 7, i);
    }
    check(images_opens(&set, "many", 0) && set.count == N, "forty images");
    images_circle order = { N, 3 * N + 5 };
    for (size_t room = 1; room <= 64; room *= 4) {
        size_t draw = 0, wrong = 0;
        int status = images_feed(&f, &set, images_in_circles, &order, room, 0);
        while (status == SC_OK && (status = images_next(&f)) == SC_OK) {
            wrong += f.drawn != draw + 1 || f.image[0] != draw * 7 % N || f.pixels[0] != f.image[0];
            draw++;
        }
        check(status == SC_END && draw == 3 * N + 5 && wrong == 0, "in order with room for %zu",
              room);
        check(images_next(&f) == SC_END, "the end stays the end");
        images_end(&f);
        images_end(&f);
    }
    for (size_t want = 2; want <= 50; want += 3) {
        size_t draw = 0, wrong = 0;
        int status = images_feed(&f, &set, images_in_circles, &order, 50, 0);
        for (; status == SC_OK && (status = next_batch(&f, want)) == SC_OK && f.count > 0;) {
            for (size_t i = 0; i < f.count; i++, draw++)
                wrong += f.image[i] != draw * 7 % N || f.label[i] != -1
                         || f.pixels[3 * i] != f.image[i];
            wrong += f.drawn != draw;
        }
        check(status == SC_OK && draw == 3 * N + 5 && wrong == 0, "in batches of %zu", want);
        images_end(&f);
    }
    check(images_feed(&f, &set, NULL, NULL, 16, 0) == SC_OK && images_next(&f) == SC_OK &&
          f.pixels[0] == 0, "in the set's order");
    f.drawn = f.count = 0;
    check(images_next(&f) == SC_OK && f.pixels[0] == 0 && images_next(&f) == SC_OK &&
          f.pixels[0] == 1, "a feed can begin again");
    images_end(&f);                            /* in the middle */
    images_write_text("many/07.ppm", "P6 9 9 255\nshort");
    images_write_text("many/11.ppm", "P6 9 9 255\nshort");
    size_t good = 0;
    int status = images_feed(&f, &set, NULL, NULL, 16, 0);
    while (status == SC_OK && (status = images_next(&f)) == SC_OK) good++;
    check(status == SC_FAILED && good == 7 && strstr(sc_error(), "07.ppm") && f.drawn == 7,
          "an error comes in its turn (%zu)", good);
    check(images_next(&f) == SC_FAILED && strstr(sc_error(), "07.ppm"), "and stays");
    images_end(&f);
    size_t last = 1, gaps = 0;
    good = 0;
    images_listen();
    status = images_feed(&f, &set, images_in_circles, &order, 16, 1);
    while (status == SC_OK && (status = images_next(&f)) == SC_OK) {
        gaps += f.drawn > last + 1;
        last = f.drawn;
        good++;
    }
    int lines = images_heard("short");
    check(status == SC_END && abs(lines) == 2 && good == 3 * N + 5 - 7 && gaps == 7,
          "bad images are passed over, and named once (%d lines, %zu good, %zu gaps)",
          lines, good, gaps);
    images_end(&f);
    sc_images_close(&set);
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "many/%02d.ppm", i);
        images_write_text(name, "P6 9 9 255\nshort");
    }
    images_circle endless = { N, SIZE_MAX };
    check(images_opens(&set, "many", 0) &&
          images_feed(&f, &set, images_in_circles, &endless, 3, 1) == SC_OK &&
          images_next(&f) == SC_FAILED && strstr(sc_error(), "none of 40"),
          "an endless order of bad images ends");
    images_end(&f);
    sc_images_close(&set);
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "many/%02d.ppm", i);
        images_write_text(name, "\xff\xd8\xff fake");
    }
    setenv("SAECLIP_DECODER", "no-such-program-here", 1);
    check(images_opens(&set, "many", 0) && images_feed(&f, &set, NULL, NULL, 16, 1) == SC_OK &&
          images_next(&f) == SC_FAILED && strstr(sc_error(), "no-such"),
          "--skip-bad does not skip a missing decoder");
    images_end(&f);
    unsetenv("SAECLIP_DECODER");
    check(waitpid(-1, NULL, WNOHANG) < 0, "no child is left");
    sc_images_close(&set);
}

static void test_images(void)
{
    mkdir(in_folder("images"), 0700);
    images_test_pnm();
    images_test_golden();
    images_test_folder();
    images_test_list();
    images_test_packed();
    images_test_decoders();
    images_test_names();
    images_test_sbit();
    images_test_gif();
    images_test_formats();
    images_test_reader();
}
