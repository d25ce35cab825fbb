/* Tests of files: numbers as bytes, the digest, JSON, safetensors, outputs. */

static uint32_t load32(const unsigned char *from)
{
    uint32_t value;
    copy_numbers(&value, from, 1, 4);
    return value;
}

static uint64_t load64(const unsigned char *from)
{
    uint64_t value;
    copy_numbers(&value, from, 1, 8);
    return value;
}

static void files_put64(unsigned char *to, uint64_t value) { copy_numbers(to, &value, 1, 8); }

/* --- numbers --- */

static float files_reference_half(uint32_t half)
{
    int exponent = (int)(half >> 10 & 31), fraction = (int)(half & 1023);
    double value = exponent == 31 ? (fraction ? (double)NAN : (double)INFINITY)
                 : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return (float)(half & 0x8000 ? -value : value);
}

static void files_numbers(void)
{
    unsigned char b[8] = { 0x01, 0x82, 0x03, 0x84, 0x05, 0x86, 0x07, 0x88 }, c[8];
    check(load32(b) == 0x84038201 && load64(b) == 0x8807860584038201, "load");
    files_put64(c, 0x8807860584038201);
    check(memcmp(b, c, 8) == 0, "copy_numbers, to bytes");
    uint32_t words[2];
    copy_numbers(words, b, 2, 4);
    check(words[0] == 0x84038201 && words[1] == 0x88078605, "copy_numbers 4");
    uint64_t word;
    copy_numbers(&word, b, 1, 8);
    check(word == 0x8807860584038201, "copy_numbers 8");

    size_t wrong = 0, back = 0, ties = 0;
    for (uint32_t h = 0; h < 65536; h++) {
        float value = float_of_half(h), expected = files_reference_half(h);
        if (expected != expected) {
            wrong += !(value != value);
            continue;
        }
        wrong += bits_of_float(value) != bits_of_float(expected);
        if (isinf(expected)) continue;               /* infinities and NaN are never written */
        back += half_of_float(value) != h;
        if ((h & 0x7fff) >= 0x7bff) continue;
        /* Half way to the next half: an exact float. To the even one; beside it to the nearer. */
        float middle = (float)(((double)value + (double)float_of_half(h + 1)) / 2);
        ties += half_of_float(middle) != (h & 1 ? h + 1 : h);
        ties += half_of_float(float_of_bits(bits_of_float(middle) - 1)) != h;
        ties += half_of_float(float_of_bits(bits_of_float(middle) + 1)) != h + 1;
    }
    check(wrong == 0, "float_of_half, all 65536 (%zu wrong)", wrong);
    check(back == 0, "half_of_float(float_of_half), all 65536 (%zu wrong)", back);
    check(ties == 0, "half_of_float, all ties and their neighbours (%zu wrong)", ties);
    static const struct { uint32_t bits, half; } edges[] = {
        { 0x477fefff, 0x7bff }, { 0xc77fefff, 0xfbff }, { 0x00000001, 0 }, { 0x80000001, 0x8000 },
        { 0x33000000, 0 }, { 0x33000001, 1 }, { 0x387fffff, 0x0400 },
    };
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
        check(half_of_float(float_of_bits(edges[i].bits)) == edges[i].half, "half of %08x",
              (unsigned)edges[i].bits);
}

static void files_digest(void)
{
    uint64_t number[13], whole = 0, seen[120];
    for (size_t i = 0; i < 13; i++) digest64_number(&whole, number[i] = i * 0x123456789abcdefu + 37);
    check(whole == 0x5049b7a2905963b6u, "digest's own value, %016jx", (uintmax_t)whole);
    size_t same = 0, changed = 0, flips = 0;
    for (size_t bit = 0; bit < 64 * 12; bit++) {
        uint64_t other = 0;
        for (size_t i = 0; i < 13; i++)
            digest64_number(&other, number[i] ^ (i == bit / 64 ? (uint64_t)1 << bit % 64 : 0));
        same += other == whole;
        for (uint64_t d = other ^ whole; d; d &= d - 1) changed++;
        flips++;
    }
    check(same == 0, "digest sees every bit");
    check(changed > 31 * flips && changed < 33 * flips, "digest mixes: %.2f of 64 bits change",
          (double)changed / (double)flips);
    size_t equal = 0;
    seen[0] = 0;
    for (size_t n = 1; n < 120; n++) {
        seen[n] = seen[n - 1];
        digest64_number(&seen[n], 0);
        for (size_t i = 0; i < n; i++) equal += seen[i] == seen[n];
    }
    check(equal == 0, "digest tells zeros of different number apart");
    uint64_t name = 0, written = 0, other = 0;
    digest64_name(&name, "a\xff\xc2\x9b\xe2\x82z");      /* as print_json() writes it and json_string() reads it */
    digest64_name(&written, "a\xc3\xbf\xc2\x9b\xc3\xa2\xc2\x82z");
    digest64_name(&other, "a\xfe\xc2\x9b\xe2\x82z");
    check(name == written && name != other, "a name that is not UTF-8 has the digest of what is written");
}

/* --- JSON --- */

static void files_json(void)
{
    static const struct { const char *text; size_t count; const char *first, *last; } good[] = {
        { "[]", 0, "", "" },
        { " [ ] \n", 0, "", "" },
        { "[\"a\"]", 1, "a", "a" },
        { "\t[\r\n\"a\" , \"b,c\",\"]\"] ", 3, "a", "]" },
        { "[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\",\"\"]", 2, "\"\\/\b\f\n\r\t", "" },
        { "[\"\\u0041\\u00e9\\u20AC\\uD83d\\uDe00\"]", 1, "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80",
          "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80" },
        { "[\"\\u007f\\u0080\\u07ff\\u0800\\uffff\\ud800\\udc00\\udbff\\udfff\"]", 1,
          "\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf",
          "\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf" },
        { "[\"\xc2\x80\",\"\xed\x9f\xbf\",\"\xf4\x8f\xbf\xbf\x7f\"]", 3, "\xc2\x80",
          "\xf4\x8f\xbf\xbf\x7f" },
    };
    static const char *const bad[] = {
        "", "x", "{}", "[", "[\"a\"", "[\"a\"]x", "[\"a\"][", "[,]", "[\"a\",]", "[\"a\" \"b\"]", "[a]",
        "[1]", "[null]", "[[]]", "[\"a]", "[\"\\\"]", "[\"\\x\"]", "[\"\\", "[\"\\u", "[\"\\u12\"]",
        "[\"\\u12g4\"]", "[\"\\u0000\"]", "[\"\\ud800\"]", "[\"\\udc00\"]", "[\"\\ud800\\ud800\"]",
        "[\"\\udc00\\ud800\"]", "[\"\\ud800x\"]", "[\"\\ud800\\n\"]", "[\"\n\"]", "[\"\x1f\"]",
        "[\"\x80\"]", "[\"\xc0\x80\"]", "[\"\xc1\xbf\"]", "[\"\xc3\"]", "[\"\xe0\x9f\xbf\"]",
        "[\"\xed\xa0\x80\"]", "[\"\xe2\x82\"]", "[\"\xf0\x8f\xbf\xbf\"]", "[\"\xf4\x90\x80\x80\"]",
        "[\"\xf5\x80\x80\x80\"]", "[\"\xf0\x9f\x98\"]", "[\"\xe2\x82\x28\"]", "[\"\xf0\x9f\x98\xc0\"]",
        "['a']", "\"a\"", "[\"a\"}", "[\"a\"\v]",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        char **list = NULL;
        size_t count = 99;
        int status = json_string_array(good[i].text, "names", &list, &count);
        if (check(status == SC_OK && count == good[i].count, "json list %zu", i) && count > 0)
            check(strcmp(list[0], good[i].first) == 0 && strcmp(list[count - 1], good[i].last) == 0,
                  "json strings of %zu", i);
        if (status == SC_OK) free(list);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char **list = NULL;
        size_t count;
        int status = json_string_array(bad[i], "names", &list, &count);
        check(status == SC_FAILED && !list && strncmp(sc_error(), "names: JSON byte ", 17) == 0,
              "json refuses %s", bad[i]);
    }
    char *text = NULL, *list_text = NULL;
    size_t length = 0;
    FILE *stream = open_memstream(&text, &length);
    print_json(stream, "a\"\\\n\x01\x1f\x7f\xc2\x9b\xc2\xa0\xc3\xa9/\xff\xe2\x82z\xed\xa0\x80");
    fclose(stream);
    check(strcmp(text, "\"a\\u0022\\u005c\\u000a\\u0001\\u001f\\u007f\\u009b\xc2\xa0\xc3\xa9/"
          "\\u00ff\\u00e2\\u0082z\\u00ed\\u00a0\\u0080\"") == 0,
          "print_json");
    free(text);
    /* What print_json writes, json_string reads back. */
    char all[127 + 1], **list = NULL;
    size_t count = 0;
    for (int i = 0; i < 127; i++) all[i] = (char)(i + 1);
    all[127] = '\0';
    stream = open_memstream(&list_text, &length);
    putc('[', stream);
    print_json(stream, all);
    putc(']', stream);
    fclose(stream);
    check(json_string_array(list_text, "all", &list, &count) == SC_OK && count == 1 &&
          strcmp(list[0], all) == 0, "json round trip");
    free(list);
    free(list_text);
}

/* --- reading safetensors --- */

/* A file with this header and so many bytes of data (0, 1, 2, ...). */
static const char *files_put_tensors(const char *header, size_t header_bytes, size_t data_bytes)
{
    size_t count = 8 + header_bytes + data_bytes;
    unsigned char *bytes = new_array(count, 1);
    if (!bytes) need("memory");
    files_put64(bytes, header_bytes);
    memcpy(bytes + 8, header, header_bytes);
    for (size_t i = 0; i < data_bytes; i++) bytes[8 + header_bytes + i] = (unsigned char)i;
    const char *path = in_folder("case.safetensors");
    put_file(path, bytes, count);
    free(bytes);
    return path;
}

#define TENSOR(name, dtype, shape, begin, end)                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" begin "," end "]}"

static const struct { const char *header; size_t data; const char *error; } files_headers[] = {
    { "{}", 0, NULL },
    { "{}  \n ", 0, NULL },
    { "{\"__metadata__\":{}}", 0, NULL },
    { "{" TENSOR("a", "F32", "2", "0", "8") "}", 8, NULL },
    { "{" TENSOR("a", "F32", "", "0", "4") "}", 4, NULL },
    { "{ \"a\" : { \"shape\" : [ 2 , 1 ] , \"data_offsets\" : [ 0 , 4 ] , \"dtype\" : \"F16\" } } ", 4,
      NULL },
    { "{" TENSOR("b", "U8", "3", "2", "5") "," TENSOR("a", "BF16", "1", "0", "2") "}", 5, NULL },
    { "{" TENSOR("a", "F32", "0", "0", "0") "}", 0, NULL },
    { "{" TENSOR("a", "F32", "0,4611686018427387903", "0", "0") "}", 0, NULL },
    { "{" TENSOR("z", "F32", "0", "4", "4") "," TENSOR("a", "F32", "1", "0", "4") ","
      TENSOR("y", "F32", "1", "4", "8") "}", 8, NULL },
    { "{" TENSOR("a", "BOOL", "1", "0", "1") "," TENSOR("b", "I8", "1", "1", "2") "," TENSOR("c", "I16", "1", "2", "4")
      "," TENSOR("d", "U16", "1", "4", "6") "," TENSOR("e", "U32", "1", "6", "10") "," TENSOR("f", "U64", "1", "10", "18")
      "," TENSOR("g", "C64", "1", "18", "26") "," TENSOR("h", "F8_E4M3", "1", "26", "27") ","
      TENSOR("i", "F8_E5M2", "1", "27", "28") "," TENSOR("j", "F8_E8M0", "1", "28", "29") "," TENSOR("k", "F64", "1", "29",
      "37") "," TENSOR("l", "I64", "1", "37", "45") "," TENSOR("m", "I32", "1", "45", "49") ","
      TENSOR("n", "F8_E4M3FNUZ", "1", "49", "50") "," TENSOR("o", "F8_E5M2FNUZ", "1", "50", "51") "}", 51, NULL },
    { "{" TENSOR("a", "U8", "1,1,1,1,1,1,1,1", "0", "1") "}", 1, NULL },
    { "{" TENSOR("\\u0061\\ud83d\\ude00", "U8", "1", "0", "1") "}", 1, NULL },
    { "{\"__metadata__\":{\"a\":\"b\",\"c\":\"d\"}," TENSOR("a", "U8", "1", "0", "1") "}", 1, NULL },
    { " {}", 0, "JSON byte 1: expected {}" },
    { "[]", 0, "JSON byte 0: expected {}" },
    { "{}x", 0, "nothing more" },
    { "{}{}", 0, "nothing more" },
    { "{\"a\"", 0, "':'" },
    { "{a:1}", 0, "a string" },
    { "{" TENSOR("a", "U8", "1", "0", "1") ",}", 1, "a string" },
    { "{" TENSOR("a", "U8", "1", "0", "1"), 1, "a comma or the end" },
    { "{\"a\":1}", 0, "expected {}" },
    { "{\"a\":{}}", 0, "dtype, shape and two data_offsets" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "dtype, shape and two data_offsets" },
    { "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "dtype, shape and two data_offsets" },
    { "{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "dtype, shape and two data_offsets" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, "dtype, shape and two data_offsets" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[]}}", 1, "dtype, shape and two data_offsets" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}", 1, "expected no more numbers" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", 1, "each once" },
    { "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
      "each once" },
    { "{" TENSOR("a", "U8", "1,1,1,1,1,1,1,1,1", "0", "1") "}", 1, "expected no more numbers" },
    { "{" TENSOR("a", "U9", "1", "0", "1") "}", 1, "unknown dtype 'U9'" },
    { "{" TENSOR("a", "f32", "1", "0", "4") "}", 4, "unknown dtype 'f32'" },
    { "{\"a\":{\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "a string" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1, "expected []" },
    { "{" TENSOR("a", "U8", "-1", "0", "1") "}", 1, "a whole number" },
    { "{" TENSOR("a", "U8", "01", "0", "1") "}", 1, "a whole number" },
    { "{" TENSOR("a", "U8", "1.0", "0", "1") "}", 1, "a comma or the end" },
    { "{" TENSOR("a", "U8", "1e0", "0", "1") "}", 1, "a comma or the end" },
    { "{" TENSOR("a", "U8", "+1", "0", "1") "}", 1, "a whole number" },
    { "{" TENSOR("a", "U8", "\"1\"", "0", "1") "}", 1, "a whole number" },
    { "{" TENSOR("a", "U8", "[1]", "0", "1") "}", 1, "a whole number" },
    { "{" TENSOR("a", "U8", "1,", "0", "1") "}", 1, "a whole number" },
    { "{" TENSOR("a", "U8", "1 1", "0", "1") "}", 1, "a comma or the end" },
    { "{" TENSOR("a", "U8", "18446744073709551616", "0", "1") "}", 1, "machine can address" },
    { "{" TENSOR("a", "U8", "99999999999999999999999999", "0", "1") "}", 1, "machine can address" },
    { "{" TENSOR("a", "U8", "18446744073709551615,18446744073709551615", "0", "1") "}", 1, "too large" },
    { "{" TENSOR("a", "F32", "4611686018427387904", "0", "0") "}", 0, "too large" },
    { "{" TENSOR("a", "F32", "4611686018427387904,4,0", "0", "0") "}", 0, "too large" },
    { "{" TENSOR("a", "F32", "0,4611686018427387904,4", "0", "0") "}", 0, "too large" },
    { "{" TENSOR("a", "U8", "1125899906842624", "0", "1125899906842624") "}", 1, " of 1" },
    { "{" TENSOR("a", "U8", "2", "0", "2") "}", 1, " of 1" },
    { "{" TENSOR("a", "U8", "1", "1", "0") "}", 1, "lies at 1 to 0" },
    { "{" TENSOR("a", "U8", "1", "18446744073709551615", "0") "}", 1, " of 1" },
    { "{" TENSOR("a", "F32", "1", "0", "3") "}", 3, "needs 4 bytes by its dtype and shape, but lies at 0 to 3" },
    { "{" TENSOR("a", "F32", "1", "0", "5") "}", 5, "needs 4 bytes by its dtype and shape, but lies at 0 to 5" },
    { "{" TENSOR("a", "U8", "2", "0", "2") "," TENSOR("b", "U8", "2", "1", "3") "}", 3,
      "'b' begins at byte 1 of the data (expected 2)" },
    { "{" TENSOR("a", "U8", "2", "0", "2") "," TENSOR("b", "U8", "2", "0", "2") "}", 2,
      "begins at byte 0 of the data (expected 2)" },
    { "{" TENSOR("a", "U8", "1", "0", "1") "," TENSOR("b", "U8", "1", "2", "3") "}", 3,
      "'b' begins at byte 2 of the data (expected 1)" },
    { "{" TENSOR("a", "U8", "1", "1", "2") "}", 2, "begins at byte 1 of the data (expected 0)" },
    { "{" TENSOR("a", "U8", "1", "0", "1") "}", 2, "1 bytes of data belong to no tensor" },
    { "{}", 3, "3 bytes of data belong to no tensor" },
    { "{" TENSOR("a", "U8", "1", "0", "1") "," TENSOR("a", "U8", "1", "1", "2") "}", 2, "'a' appears twice" },
    { "{" TENSOR("a", "U8", "1", "0", "1") "," TENSOR("\\u0061", "U8", "1", "1", "2") "}", 2, "'a' appears twice" },
    { "{\"__metadata__\":{\"k\":\"1\",\"j\":\"\",\"k\":\"2\"}}", 0, "'k' appears twice" },
    { "{\"__metadata__\":{\"a\":\"\"},\"__metadata__\":{}}", 0, "only once" },
    { "{\"__metadata__\":{\"k\":1}}", 0, "a string" },
    { "{\"__metadata__\":{\"k\":{}}}", 0, "a string" },
    { "{\"__metadata__\":null}", 0, "expected {}" },
    { "{\"__metadata__\":{\"k\":\"v\",}}", 0, "a string" },
    { "{\"__metadata__\":{\"k\":\"\xff\"}}", 0, "valid UTF-8" },
    { "{\"__metadata__\":{\"k\":\"\\u0000\"}}", 0, "a valid escape" },
    { "{\"__metadata__\":{\"k", 0, "the string's end" },
};

/* The error that a header must give; a number of 13 digits is more than 32 bits can address. */
static const char *files_error(const char *header, const char *error)
{
    for (size_t digits; SIZE_MAX == UINT32_MAX && *header; header += digits ? digits : 1)
        if ((digits = strspn(header, "0123456789")) >= 13) return "machine can address";
    return error;
}

static void files_layouts(void)
{
    for (size_t i = 0; i < sizeof files_headers / sizeof *files_headers; i++) {
        const char *path = files_put_tensors(files_headers[i].header, strlen(files_headers[i].header), files_headers[i].data);
        sc_safetensors file;
        int status = sc_safetensors_open(&file, path);
        const char *error = files_error(files_headers[i].header, files_headers[i].error);
        if (!error) {
            check(status == SC_OK, "accepts %s", files_headers[i].header);
        } else {
            check(status == SC_FAILED && says(error), "refuses %s", files_headers[i].header);
            check(strncmp(sc_error(), path, strlen(path)) == 0 && !strchr(sc_error(), '\n'),
                  "one line, file first: %s", files_headers[i].header);
            check(!file.path && !file.map, "nothing left open: %s", files_headers[i].header);
        }
        sc_safetensors_close(&file);
    }
    /* A NUL ends nothing, neither in the header nor behind it. */
    sc_safetensors file = { 0 };
    check(sc_safetensors_open(&file, files_put_tensors("{}\0", 3, 0)) == SC_FAILED, "NUL behind the header");
    check(sc_safetensors_open(&file, files_put_tensors("{}\0 ", 4, 0)) == SC_FAILED, "NUL behind, then blank");
    check(sc_safetensors_open(&file, files_put_tensors("{\0}", 3, 0)) == SC_FAILED, "NUL within the header");
    /* Every truncation of a good file is refused. */
    const char *header = "{\"__metadata__\":{\"a\":\"\\u00e9\"}," TENSOR("a", "F32", "2", "0", "8") "}";
    size_t count;
    char *bytes = get_file(files_put_tensors(header, strlen(header), 8), &count), whole[256];
    memcpy(whole, bytes, count);
    size_t accepted = 0;
    for (size_t n = 0; n < count; n++) {
        put_file(in_folder("cut"), whole, n);
        accepted += sc_safetensors_open(&file, in_folder("cut")) == SC_OK;
        /* the header's size made to fit: the JSON reader has to notice */
        if (n < 9 || n >= 8 + strlen(header)) continue;
        accepted += sc_safetensors_open(&file, files_put_tensors(header, n - 8, 8)) == SC_OK;
    }
    check(accepted == 0, "no truncated file is accepted (%zu were)", accepted);
    /* Arrays nested without end need no stack. */
    size_t deep = 1000000;
    char *nested = new_array(deep + 8, 1);
    memcpy(nested, "{\"a\":", 5);
    memset(nested + 5, '[', deep);
    check(sc_safetensors_open(&file, files_put_tensors(nested, deep + 5, 0)) == SC_FAILED, "deep arrays");
    memset(nested + 5, '{', deep);
    check(sc_safetensors_open(&file, files_put_tensors(nested, deep + 5, 0)) == SC_FAILED, "deep objects");
    free(nested);
}

static void files_bad_files(void)
{
    static const struct { const char *name; uint64_t header; size_t count; const char *error; } raw[] = {
        { "empty", 0, 0, "at least 8 bytes" },
        { "seven", 2, 7, "at least 8 bytes" },
        { "eight", 0, 8, "a header of 0 bytes" },
        { "one", 1, 9, "a header of 1 bytes" },
        { "beyond", 3, 10, "a header of 3 bytes (expected 2 to 2)" },
        { "huge", UINT64_MAX, 64, "a header of 18446744073709551615 bytes (expected 2 to 56)" },
        { "wraps", UINT64_MAX - 7, 64, "a header of 18446744073709551608 bytes" },
        { "jpeg", 0x464a1000e0ffd8ff, 64, "not a safetensors file" },
    };
    sc_safetensors file = { 0 };
    for (size_t i = 0; i < sizeof raw / sizeof *raw; i++) {
        unsigned char bytes[64] = { 0 };
        files_put64(bytes, raw[i].header);
        memcpy(bytes + 8, "{}", 2);
        put_file(in_folder("%s", raw[i].name), bytes, raw[i].count);
        check(sc_safetensors_open(&file, in_folder("%s", raw[i].name)) == SC_FAILED && says(raw[i].error),
              "refuses file '%s'", raw[i].name);
    }
    static const struct { const char *bytes, *error; } others[] = {
        { "version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer" },
        { "PK\003\004 and so on, for 30 bytes", "a PyTorch file" },
        { "\x80\002}q\001(X\006weight", "a PyTorch pickle" },
        { "<!DOCTYPE html><html>", "a web page" },
        { "{\"weight_map\": {}}", "JSON" },
    };
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        put_text(in_folder("other"), others[i].bytes);
        check(sc_safetensors_open(&file, in_folder("other")) == SC_FAILED && says("other: not a safetensors file but")
              && says(others[i].error), "does not recognise %s", others[i].error);
    }
    /* 100,000,001 bytes of header, really there (as a hole) */
    unsigned char size[8];
    files_put64(size, 100000001);
    put_file(in_folder("long"), size, 8);
    if (truncate(in_folder("long"), 8 + 100000001) == 0)
        check(sc_safetensors_open(&file, in_folder("long")) == SC_FAILED &&
              says("expected 2 to 100000000"), "refuses a header beyond the limit");
    files_put64(size, 100000000);
    put_file(in_folder("long"), size, 8);
    if (truncate(in_folder("long"), 8 + 100000000) == 0)
        check(sc_safetensors_open(&file, in_folder("long")) == SC_FAILED && says("JSON byte 0"),
              "reads a header at the limit");
    unlink(in_folder("long"));
    check(sc_safetensors_open(&file, in_folder("missing")) == SC_FAILED &&
          says("cannot be opened: No such file"), "missing file");
    check(sc_safetensors_open(&file, folder) == SC_FAILED && says("cannot be read (expected a safetensors file"), "directory");
    mkfifo(in_folder("fifo"), 0600);
    check(sc_safetensors_open(&file, in_folder("fifo")) == SC_FAILED && says("cannot be read (expected a safetensors file"),
          "a pipe is refused without waiting");
    check(sc_safetensors_open(&file, "/dev/zero") == SC_FAILED && says("cannot be read (expected a safetensors file"), "device");
    put_file(in_folder("secret"), "", 0);
    chmod(in_folder("secret"), 0);
    if (geteuid() == 0) skip("a file without permission: root may read all");
    else check(sc_safetensors_open(&file, in_folder("secret")) == SC_FAILED && says("Permission"),
               "no permission");
}

static void files_values(void)
{
    sc_safetensors file = { 0 };
    const char *header =
        "{" TENSOR("f", "F32", "4", "0", "16") "," TENSOR("h", "F16", "4", "16", "24") ","
        TENSOR("b", "BF16", "4", "24", "32") "," TENSOR("d", "F64", "4", "32", "64") ","
        TENSOR("l", "I64", "2", "64", "80") "," TENSOR("i", "I32", "2", "80", "88") ","
        TENSOR("u", "U8", "2", "88", "90") "," TENSOR("e", "F32", "0", "90", "90") ","
        TENSOR("s", "I8", "1", "90", "91") "}";
    static const unsigned char data[91] = {
        0, 0, 0x80, 0x3f, 0, 0, 0, 0x80, 1, 0, 0, 0, 0xff, 0xff, 0x7f, 0x7f,      /* 1 -0 tiny max */
        0, 0x3c, 0, 0x80, 1, 0, 0xff, 0x7b,                                      /* 1 -0 2^-24 65504 */
        0x80, 0x3f, 0, 0x80, 1, 0, 0x7f, 0x7f,                                   /* 1 -0 tiny 3.39e38 */
        0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0, 0, 0, 0x10, 0, 0, 0xf0, 0x3f,   /* 1, 1 + 2^-24 (tie: even) */
        0, 0, 0, 0x30, 0, 0, 0xf0, 0x3f, 1, 0, 0, 0x10, 0, 0, 0xf0, 0x3f, /* 1 + 3 2^-24, above 2^-24 */
        0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5, 6, 7, 8,  /* -2, 0x0807... */
        0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0x80,                                   /* -1, INT32_MIN */
        200, 7, 9,
    };
    static const struct { const char *name; uint32_t bits[4]; } floats[] = {
        { "f", { 0x3f800000, 0x80000000, 1, 0x7f7fffff } },
        { "h", { 0x3f800000, 0x80000000, 0x33800000, 0x477fe000 } },
        { "b", { 0x3f800000, 0x80000000, 0x00010000, 0x7f7f0000 } },
        { "d", { 0x3f800000, 0x3f800000, 0x3f800002, 0x3f800001 } },
    };
    static const struct { const char *name; int64_t value[2]; } integers[] = {
        { "l", { -2, 0x0807060504030201 } }, { "i", { -1, INT32_MIN } }, { "u", { 200, 7 } },
    };
    static const struct { const char *name; size_t at; const char *bytes; size_t count; } bad[] = {
        { "f", 8, "\0\0\xc0\x7f", 4 }, { "h", 20, "\0\x7c", 2 }, { "b", 28, "\x80\xff", 2 },
        { "d", 48, "\0\0\0\0\0\0\0\x7f", 8 },                                /* beyond float32 */
    };
    size_t bytes = 8 + strlen(header) + sizeof data, start = bytes - sizeof data;
    unsigned char *whole = new_array(bytes, 1);
    memcpy(whole, get_file(files_put_tensors(header, strlen(header), sizeof data), &bytes), start);
    memcpy(whole + start, data, sizeof data);
    const char *path = in_folder("values");
    put_file(path, whole, bytes);
    if (!check(sc_safetensors_open(&file, path) == SC_OK, "values")) return;
    float out[8];                                /* room for one too many */
    for (size_t i = 0; i < 4; i++) {
        const sc_tensor *tensor = sc_tensor_find(&file, floats[i].name);
        check(tensor && sc_tensor_floats(&file, tensor, 0, 4, out) == SC_OK &&
              bits_of_float(out[0]) == floats[i].bits[0] && bits_of_float(out[1]) == floats[i].bits[1] &&
              bits_of_float(out[2]) == floats[i].bits[2] && bits_of_float(out[3]) == floats[i].bits[3],
              "floats of '%s'", floats[i].name);
        check(sc_tensor_floats(&file, tensor, 2, 1, out) == SC_OK &&
              bits_of_float(out[0]) == floats[i].bits[2], "one float of '%s'", floats[i].name);
        int64_t integer;
        check(sc_tensor_integers(&file, tensor, 0, 1, &integer) == SC_FAILED && says("of type I64, I32"),
              "'%s' is not of integers", floats[i].name);
    }
    for (size_t i = 0; i < 3; i++) {
        int64_t value[2] = { 0 };
        const sc_tensor *tensor = sc_tensor_find(&file, integers[i].name);
        check(sc_tensor_integers(&file, tensor, 0, 2, value) == SC_OK &&
              value[0] == integers[i].value[0] && value[1] == integers[i].value[1] &&
              sc_tensor_integers(&file, tensor, 1, 1, value) == SC_OK &&
              value[0] == integers[i].value[1], "integers of '%s'", integers[i].name);
        check(sc_tensor_floats(&file, tensor, 0, 1, out) == SC_FAILED && says("of type F32, F16"),
              "'%s' is not of floats", integers[i].name);
    }
    const sc_tensor *f = sc_tensor_find(&file, "f"), *e = sc_tensor_find(&file, "e");
    check(sc_tensor_floats(&file, f, 0, 5, out) == SC_FAILED && says("'f' has 4 values of type F32 (expected 5 from"), "one too many");
    check(sc_tensor_floats(&file, f, 5, 0, out) == SC_FAILED, "first beyond the end");
    volatile size_t most = SIZE_MAX;             /* the compiler would warn of the number itself */
    check(sc_tensor_floats(&file, f, 2, most, out) == SC_FAILED, "first + count wraps");
    check(sc_tensor_floats(&file, f, 4, 0, NULL) == SC_OK, "none at the end");
    check(e && e->count == 0 && sc_tensor_floats(&file, e, 0, 0, NULL) == SC_OK, "none of none");
    check(e && sc_tensor_floats(&file, e, 0, 1, out) == SC_FAILED, "one of none");
    check(!sc_tensor_find(&file, "g") && !sc_tensor_find(&file, ""), "absent tensors");
    const sc_tensor *s = sc_tensor_find(&file, "s");
    check(s && s->dtype == SC_I8 && s->rank == 1 && s->shape[0] == 1 && s->data[0] == 9 &&
          strcmp(sc_dtype_name(s->dtype), "I8") == 0 && sc_dtype_size(SC_C64) == 8, "a tensor's fields");
    sc_safetensors_close(&file);
    sc_safetensors_close(&file);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        memcpy(whole + start, data, sizeof data);
        memcpy(whole + start + bad[i].at, bad[i].bytes, bad[i].count);
        put_file(path, whole, bytes);
        char expected[64];
        snprintf(expected, sizeof expected, "tensor '%s', element 2 is ", bad[i].name);
        if (!check(sc_safetensors_open(&file, path) == SC_OK, "bad values")) continue;
        const sc_tensor *tensor = sc_tensor_find(&file, bad[i].name);
        check(sc_tensor_floats(&file, tensor, 0, 4, out) == SC_FAILED && says(expected),
              "'%s' with a value that is not finite", bad[i].name);
        check(sc_tensor_floats(&file, tensor, 1, 3, out) == SC_FAILED && says(expected),
              "its number counts from the start");
        check(sc_tensor_floats(&file, tensor, 3, 1, out) == SC_OK, "values beside it are read");
        sc_safetensors_close(&file);
    }
    free(whole);
}

/* --- output --- */

static void files_put(sc_output *out, const char *bytes, size_t count)
{
    check(fwrite(bytes, 1, count, out->file) == count, "output takes %zu bytes", count);
}

static void files_output(void)
{
    sc_output out;
    const char *path = in_folder("out"), *temporary = in_folder("out.tmp");
    put_file(path, "old", 3);
    check(output_open(&out, path) == SC_OK, "output_open");
    fprintf(out.file, "%s %d", "new", 42);
    fflush(out.file);
    check(holds(path, "old") && exists(temporary), "the old file stands until the commit");
    files_put(&out, "!", 1);
    check(output_close(&out, SC_OK) == SC_OK && holds(path, "new 42!") && !exists(temporary), "output_close");
    output_close(&out, SC_FAILED);
    check(exists(path), "discard after commit does nothing");

    output_open(&out, path);
    files_put(&out, "x", 1);
    output_close(&out, SC_FAILED);
    check(holds(path, "new 42!") && !exists(temporary), "output_close of a failure");
    output_close(&out, SC_FAILED);
    sc_output zero = { 0 };
    output_close(&zero, SC_FAILED);
    check(fcntl(0, F_GETFD) >= 0 || errno == EBADF, "discarding a zeroed output");

    put_file(temporary, "left by a run that was killed", 29);
    check(output_open(&out, path) == SC_OK, "a stale temporary is reused");
    files_put(&out, "short", 5);
    check(output_close(&out, SC_OK) == SC_OK && holds(path, "short"), "and emptied first");

    /* more than the buffer, in pieces of every kind */
    size_t big = (3 << 19), count = 0;
    char *bytes = new_array(2 * big, 1);
    for (size_t i = 0; i < 2 * big; i++) bytes[i] = (char)('a' + i * 7 % 26);
    bytes[2 * big - 1] = '\0';
    output_open(&out, path);
    fprintf(out.file, "%.*s", 1000, bytes);
    files_put(&out, bytes + 1000, big - 1000);
    for (size_t i = big; i < big + 1000; i++) files_put(&out, bytes + i, 1);
    fprintf(out.file, "%s", bytes + big + 1000);
    check(output_close(&out, SC_OK) == SC_OK, "a long output");
    const char *back = get_file(path, &count);
    check(back && count == 2 * big - 1 && memcmp(back, bytes, count) == 0, "a long output's bytes");
    free(bytes);
}

static void files_output_destinations(void)
{
    sc_output out;
    check(output_open(&out, in_folder("no/such/out")) == SC_FAILED && says("No such file") && !out.path,
          "missing folder");
    check(output_open(&out, folder) == SC_FAILED && says("Is a directory"), "a directory");
    check(output_open(&out, "") == SC_FAILED || (output_close(&out, SC_FAILED), 1), "no name");

    const char *full = device("full"), *null = device("null");
    if (!full) skip("no device that is always full");
    if (full) {
        check(output_open(&out, full) == SC_OK && !out.temporary, "/dev/full is opened as it is");
        files_put(&out, "x", 1);
        check(output_close(&out, SC_OK) == SC_FAILED && says("full: cannot be written: No space left"),
              "/dev/full is full");
        check(exists(full) && !exists(in_folder("full.tmp")), "/dev/full stays");
    }
    if (null) {
        check(output_open(&out, null) == SC_OK, "/dev/null");
        files_put(&out, "x", 1);
        check(output_close(&out, SC_OK) == SC_OK && exists(null), "/dev/null takes all");
    }

    mkfifo(in_folder("pipe"), 0600);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        size_t count;
        char *got = get_file(in_folder("pipe"), &count);
        _exit(got && count == (3 << 19) && got[7] == 'x' ? 0 : 1);
    }
    check(output_open(&out, in_folder("pipe")) == SC_OK && !out.temporary, "a pipe");
    for (int i = 0; i < 3 << 19; i++) putc('x', out.file);
    int ended = -1;
    check(output_close(&out, SC_OK) == SC_OK && waitpid(child, &ended, 0) == child && ended == 0,
          "a pipe's bytes");
    struct stat about;
    check(stat(in_folder("pipe"), &about) == 0 && S_ISFIFO(about.st_mode), "a pipe stays");

    /* A disk that is full after 1000 bytes. */
    struct rlimit before, small = { 1000, 0 };
    getrlimit(RLIMIT_FSIZE, &before);
    small.rlim_max = before.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    const char *large = in_folder("large");
    check(output_open(&out, large) == SC_OK, "a large file");
    for (int i = 0; i < 2000; i++) putc('x', out.file);
    check(output_close(&out, SC_OK) == SC_FAILED && says("large: cannot be written: File too large"), "a full disk");
    output_open(&out, large);
    for (int i = 0; i < 2000; i++) putc('x', out.file);
    fflush(out.file);
    fail("something else");
    check(output_close(&out, SC_OK) == SC_FAILED && says("large: cannot be written: "), "a failure is not forgotten");
    sc_writer w;
    int status = SC_OK;
    sc_writer_open(&w, large);
    sc_writer_tensor(&w, "a", SC_U8, 1, &(size_t){ SC_ROWS });
    for (int i = 0; i < 100 && status == SC_OK; i++)
        status = sc_writer_bytes(&w, (unsigned char[100000]){ 0 }, 100000);
    check(status == SC_FAILED && says("File too large"), "a full disk shows while writing");
    check(sc_writer_close(&w, status) == SC_FAILED && !exists(large) && !exists(in_folder("large.tmp")),
          "a full disk leaves a file");
    setrlimit(RLIMIT_FSIZE, &before);
    put_file(in_folder("victim"), "keep", 4);
    symlink("victim", in_folder("planted.tmp"));
    check(output_open(&out, in_folder("planted")) == SC_FAILED && holds(in_folder("victim"), "keep"),
          "a link planted as temporary is not written through");

    int here = open(".", O_RDONLY);
    check(chdir(folder) == 0 && output_open(&out, "plain") == SC_OK && putc('x', out.file) == 'x' && output_close(&out, SC_OK) == SC_OK && holds("plain", "x"),
          "a name without a folder");
    check(fchdir(here) == 0 && close(here) == 0, "back");
}

/* Children that all write one name: each succeeds with all its bytes or says that it may not. */
static void files_output_lock(void)
{
    sc_output out;
    int status, go[2], ready[2];
    char c = 0;
    const char *path = in_folder("shared");
    check(pipe(go) == 0 && pipe(ready) == 0, "pipes");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (output_open(&out, path) != SC_OK) _exit(1);
        files_put(&out, "child", 5);
        if (write(ready[1], &c, 1) != 1 || read(go[0], &c, 1) != 1) _exit(2);
        _exit(output_close(&out, SC_OK) == SC_OK ? 0 : 3);
    }
    check(read(ready[0], &c, 1) == 1, "the child holds the lock");
    check(output_open(&out, path) == SC_FAILED && says("another process is writing it"), "lock");
    check(exists(in_folder("shared.tmp")), "the other's temporary stays");
    check(write(go[1], &c, 1) == 1 && waitpid(child, &status, 0) == child && status == 0 &&
          holds(path, "child"), "the other ends well");
    check(output_open(&out, path) == SC_OK, "then the lock is free");
    output_close(&out, SC_FAILED);
    for (int i = 0; i < 4; i++) (void)!close(i < 2 ? go[i] : ready[i - 2]);

    unlink(path);
    fflush(stdout);
    for (int p = 0; p < 8; p++)
        if (fork() == 0) {
            for (int i = 0; i < 300; i++) {
                if (output_open(&out, path) != SC_OK) {
                    if (!says("another process")) _exit(1);
                    continue;
                }
                for (int k = 0; k < 50; k++) fprintf(out.file, "%d", p);
                fflush(out.file);
                for (int k = 0; k < 50; k++) fprintf(out.file, "%d", p);
                if (i % 3 == 0) output_close(&out, SC_FAILED);
                else if (output_close(&out, SC_OK) != SC_OK) _exit(2);
                size_t count;
                FILE *f = fopen(path, "rb");
                char got[200];
                count = f ? fread(got, 1, sizeof got, f) : 0;
                if (f) fclose(f);
                for (size_t k = 0; k < count; k++)
                    if (count != 100 || got[k] != got[0]) _exit(3);
            }
            _exit(0);
        }
    int bad = 0;
    for (int p = 0; p < 8; p++)
        if (wait(&status) < 0 || status != 0) bad = status;
    check(bad == 0 && exists(path) && !exists(in_folder("shared.tmp")), "eight writers of one name (%d)", bad >> 8);
}

/* --- writing safetensors --- */

static void files_write_sample(sc_writer *w, size_t rows, const char *name)
{
    static const float floats[6] = { 1, -2.5f, 65504, 1e-8f, -0.0f, 3 };
    static const double doubles[2] = { 0.1, -1e300 };
    static const int64_t integers[3] = { -1, INT32_MAX, INT32_MIN };
    static const int32_t narrow[3] = { -1, INT32_MAX, INT32_MIN };
    const size_t open_rows[2] = { SC_ROWS, 2 }, six[2] = { 2, 3 }, three[1] = { 3 }, two[1] = { 2 };
    check(sc_writer_open(w, in_folder("%s", name)) == SC_OK, "writer_open");
    check(sc_writer_metadata(w, "model", "\"quoted\"\n") == SC_OK, "metadata");
    check(sc_writer_tensor(w, "rows", SC_F16, 2, open_rows) == SC_OK, "tensor of open rows");
    for (size_t i = 0; i < rows; i++)
        if (sc_writer_floats(w, floats + 2 * (i % 3), 2) != SC_OK) check(0, "row %zu", i);
    check(sc_writer_tensor(w, "f", SC_F32, 2, six) == SC_OK && sc_writer_floats(w, floats, 4) == SC_OK &&
          sc_writer_floats(w, floats + 4, 2) == SC_OK, "F32");
    check(sc_writer_tensor(w, "d", SC_F64, 1, two) == SC_OK &&
          sc_writer_doubles(w, doubles, 2) == SC_OK, "F64");
    check(sc_writer_tensor(w, "l", SC_I64, 1, three) == SC_OK &&
          sc_writer_integers(w, integers, 3) == SC_OK, "I64");
    check(sc_writer_tensor(w, "i", SC_I32, 1, three) == SC_OK &&
          sc_writer_values(w, narrow, 3, SC_I32) == SC_OK, "I32");
    check(sc_writer_tensor(w, "u", SC_U8, 1, three) == SC_OK &&
          sc_writer_bytes(w, (const unsigned char *)"\1\2\xff", 3) == SC_OK, "U8");
    check(sc_writer_tensor(w, "scalar", SC_F32, 0, NULL) == SC_OK &&
          sc_writer_floats(w, floats, 1) == SC_OK, "scalar");
    check(sc_writer_metadata(w, "layer", "11") == SC_OK, "metadata late");
}

static void files_read_sample(const char *name, size_t rows)
{
    sc_safetensors file = { 0 };
    float f[6];
    int64_t n[3];
    if (!check(sc_safetensors_open(&file, in_folder("%s", name)) == SC_OK, "read what was written")) return;
    check(load64(file.map) % 64 == 56, "data are aligned");
    check(file.tensors == 7 && file.entries == 2, "all is there");
    check(strcmp(sc_metadata_find(&file, "model"), "\"quoted\"\n") == 0 &&
          strcmp(sc_metadata_find(&file, "layer"), "11") == 0 && !sc_metadata_find(&file, "hook"), "metadata");
    const sc_tensor *r = sc_tensor_find(&file, "rows"), *t = sc_tensor_find(&file, "f");
    check(r->rank == 2 && r->shape[0] == rows && r->shape[1] == 2, "open rows: %zu", r->shape[0]);
    if (rows >= 3)
        check(sc_tensor_floats(&file, r, 2 * (rows - 3), 6, f) == SC_OK && f[0] == 1 && f[2] == 65504 &&
              f[3] == 0 && f[5] == 3, "F16 values");
    check(t->shape[1] == 3 && sc_tensor_floats(&file, t, 0, 6, f) == SC_OK && f[3] == 1e-8f && f[5] == 3 &&
          bits_of_float(f[4]) == 0x80000000, "F32 values");
    t = sc_tensor_find(&file, "d");
    check(load64(t->data) == 0x3fb999999999999a && load64(t->data + 8) == 0xfe37e43c8800759c, "F64 bytes");
    check(sc_tensor_integers(&file, sc_tensor_find(&file, "l"), 0, 3, n) == SC_OK && n[0] == -1 &&
          n[1] == INT32_MAX && n[2] == INT32_MIN, "I64 values");
    check(sc_tensor_integers(&file, sc_tensor_find(&file, "i"), 0, 3, n) == SC_OK && n[0] == -1 &&
          n[1] == INT32_MAX && n[2] == INT32_MIN, "I32 values");
    check(sc_tensor_integers(&file, sc_tensor_find(&file, "u"), 0, 3, n) == SC_OK && n[0] == 1 &&
          n[2] == 255, "U8 values");
    check(sc_tensor_find(&file, "scalar")->rank == 0, "scalar");
    sc_safetensors_close(&file);
}

static void files_writer(void)
{
    sc_writer w;
    size_t count;
    files_write_sample(&w, 3, "sample");
    check(sc_writer_close(&w, SC_OK) == SC_OK && !w.out.path && !exists(in_folder("sample.tmp")), "finish");
    files_read_sample("sample", 3);
    char *bytes = get_file(in_folder("sample"), &count);
    const char *start = "{\"__metadata__\":{\"model\":\"\\u0022quoted\\u0022\\u000a\",\"layer\":\"11\"},"
        "\"rows\":{\"dtype\":\"F16\",\"shape\":[3,2],\"data_offsets\":[0,12]},\"f\":{\"dtype\":\"F32\","
        "\"shape\":[2,3],\"data_offsets\":[12,36]},";
    check(bytes && strncmp(bytes + 8, start, strlen(start)) == 0, "the header's text");
    check(bytes && digest_bytes(bytes, count) == 0x45b00772013f6835u, "the file's digest %016jx", (uintmax_t)digest_bytes(bytes, count));
    files_write_sample(&w, 3, "again");
    check(sc_writer_close(&w, SC_OK) == SC_OK && same_files(in_folder("sample"), in_folder("again")),
          "equal content, equal bytes");
    files_write_sample(&w, 600000, "long");
    check(sc_writer_close(&w, SC_OK) == SC_OK, "finish with much data");
    files_read_sample("long", 600000);
    files_write_sample(&w, 0, "none");
    check(sc_writer_close(&w, SC_OK) == SC_OK, "finish with no rows");
    files_read_sample("none", 0);
    files_write_sample(&w, 1, "dropped");
    sc_writer_close(&w, SC_FAILED);
    sc_writer_close(&w, SC_FAILED);
    check(!exists(in_folder("dropped")) && !exists(in_folder("dropped.tmp")), "discard");
    sc_safetensors file = { 0 };
    check(sc_writer_open(&w, in_folder("bare")) == SC_OK && sc_writer_metadata(&w, "a", "b") == SC_OK &&
          sc_writer_close(&w, SC_OK) == SC_FAILED && !exists(in_folder("bare")), "a file without tensors");
    check(sc_writer_open(&w, in_folder("bare")) == SC_OK &&
          sc_writer_tensor(&w, "none", SC_F32, 2, (size_t[]){ SC_ROWS, 0 }) == SC_OK &&
          sc_writer_close(&w, SC_OK) == SC_OK && sc_safetensors_open(&file, in_folder("bare")) == SC_OK &&
          file.entries == 0 && file.tensors == 1 && file.tensor->count == 0, "rows of nothing, no metadata");
    sc_safetensors_close(&file);
}

/* Names with all that is escaped, as a list in metadata. A byte of invalid UTF-8 comes back as the character of its value. */
static void files_name_list(void)
{
    static char *names[] = { "plain", "\"q\" \\ \\\"", "<b>\n\x1f\x7f", "\xe2\x80\xae\xc2\x9b", "", "a\xff" };
    enum { NAMES = sizeof names / sizeof *names };
    sc_writer w;
    sc_safetensors file = { 0 };
    char **list = NULL;
    size_t count = 0;
    check(sc_writer_open(&w, in_folder("names")) == SC_OK && write_name_list(&w, "n", names, NAMES) == SC_OK
          && write_name_list(&w, "none", NULL, 0) == SC_OK
          && sc_writer_tensor(&w, "a", SC_U8, 1, &(size_t){ 0 }) == SC_OK && sc_writer_close(&w, SC_OK) == SC_OK, "a list of names");
    if (!check(sc_safetensors_open(&file, in_folder("names")) == SC_OK, "a list of names is read")) return;
    const char *text = sc_metadata_find(&file, "n"), *none = sc_metadata_find(&file, "none");
    const char *start = "[\"plain\",\"\\u0022q\\u0022 \\u005c \\u005c\\u0022\",\"\\u003cb>";
    check(text && strncmp(text, start, strlen(start)) == 0, "a list's text");
    check(none && strcmp(none, "[]") == 0, "an empty list");
    if (check(text && json_string_array(text, "n", &list, &count) == SC_OK && count == NAMES, "names come back")) {
        for (size_t i = 0; i < NAMES - 1; i++) check(strcmp(list[i], names[i]) == 0, "name %zu: %s", i, list[i]);
        check(strcmp(list[NAMES - 1], "a\xc3\xbf") == 0, "an invalid byte: %s", list[NAMES - 1]);
    }
    free(list);
    sc_safetensors_close(&file);
    /* After the first tensor there is room for 16 KiB, or for what the caller asks for. */
    static char longest[20001], *many[5];            /* what takes most room: control characters */
    memset(longest, 1, 20000);
    for (size_t i = 0; i < 5; i++) many[i] = longest;
    for (int asked = 0; asked < 3; asked++) {
        check(sc_writer_open(&w, in_folder("names")) == SC_OK, "open");
        if (asked == 1) w.room += 5 * (7 * 20000 + 5);
        if (asked == 2) write_name_list(&w, "n", many, 5);
        sc_writer_tensor(&w, "a", SC_U8, 1, &(size_t){ 0 });
        if (asked < 2) write_name_list(&w, "n", many, 5);
        int status = sc_writer_close(&w, SC_OK);
        check(asked ? status == SC_OK : status == SC_FAILED && says("too many or too long names"), "room, case %d", asked);
    }
}

static void files_writer_errors(void)
{
    sc_writer w;
    const size_t two[1] = { 2 }, open_two[2] = { SC_ROWS, 2 },
        wide[2] = { SIZE_MAX / 2, 4 }, nine[9] = { 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    float floats[2] = { 1, 2 };
    double doubles[2] = { 1, 2 };
    int64_t integers[2] = { 1, 2 };
    check(sc_writer_open(&w, in_folder("bad")) == SC_OK, "open");
    check(sc_writer_floats(&w, floats, 1) == SC_FAILED && says("without a tensor"), "values before a tensor");
    check(sc_writer_tensor(&w, "a", SC_F32, 9, nine) == SC_FAILED, "rank 9");
    check(sc_writer_tensor(&w, "a", SC_F32, 1, two) == SC_OK, "a");
    check(sc_writer_doubles(&w, doubles, 1) == SC_FAILED && sc_writer_integers(&w, integers, 1) == SC_FAILED
          && sc_writer_bytes(&w, (const unsigned char *)"", 1) == SC_FAILED, "wrong kinds");
    check(sc_writer_floats(&w, floats, 1) == SC_OK, "one");
    check(sc_writer_tensor(&w, "b", SC_F32, 1, two) == SC_FAILED && says("got 1 values (expected 2"),
          "incomplete");
    check(sc_writer_floats(&w, floats, 1) == SC_OK && sc_writer_floats(&w, floats, 1) == SC_OK, "more");
    check(sc_writer_tensor(&w, "b", SC_F32, 1, two) == SC_FAILED && says("got 3 values"), "overfull");
    check(sc_writer_close(&w, SC_OK) == SC_FAILED && says("got 3 values") && !exists(in_folder("bad")) &&
          !exists(in_folder("bad.tmp")), "nothing is left of a failure");
    check(sc_writer_open(&w, in_folder("bad")) == SC_OK && sc_writer_tensor(&w, "a", SC_F32, 2, wide) == SC_OK
          && sc_writer_close(&w, SC_OK) == SC_FAILED && says("too large"), "too large");

    check(sc_writer_open(&w, in_folder("bad")) == SC_OK, "open");
    check(sc_writer_tensor(&w, "h", SC_F16, 2, open_two) == SC_OK, "h");
    sc_writer_floats(&w, floats, 1);
    check(sc_writer_tensor(&w, "b", SC_F16, 1, two) == SC_FAILED && says("got 1 values (expected 0"),
          "half a row");
    sc_writer_floats(&w, floats, 1);
    sc_writer_close(&w, SC_FAILED);

    /* two numbers of 2 bytes; what follows them in memory is NaN as float32 */
    const uint16_t brief[4] = { 0x3f80, 0x4000, 0xffff, 0xffff };
    check(sc_writer_open(&w, in_folder("bad")) == SC_OK && sc_writer_tensor(&w, "b", SC_BF16, 1, two) == SC_OK &&
          sc_writer_values(&w, brief, 2, SC_BF16) == SC_OK, "BF16: %s", sc_error());
    sc_writer_close(&w, SC_FAILED);

    /* the file before stays until there is a newer one, and a device has none */
    put_file(in_folder("kept.prev"), "old", 3);
    symlink("/dev/null", in_folder("null"));
    static const char *const names[] = { "kept", "null" };
    for (int i = 0; i < 2; i++) {
        check(sc_writer_open(&w, in_folder("%s", names[i])) == SC_OK, "open");
        w.out.previous = in_folder("%s.prev", names[i]);
        check(sc_writer_tensor(&w, "b", SC_F32, 1, two) == SC_OK && sc_writer_floats(&w, floats, 2) == SC_OK &&
              sc_writer_close(&w, SC_OK) == SC_OK, "%s: %s", names[i], sc_error());
    }
    check(holds(in_folder("kept.prev"), "old") && !exists(in_folder("null.prev")), "the file before");

    /* what the dtype cannot hold */
    static const struct { sc_dtype dtype; double value; const char *error; } held[] = {
        { SC_F32, (double)FLT_MAX, NULL }, { SC_F32, (double)-INFINITY, "element 3 cannot be held" },
        { SC_F32, (double)NAN, "element 3 cannot be held" },
        { SC_F16, 65519, NULL }, { SC_F16, 65520, "element 3 cannot be held by F16" },
        { SC_F16, -65520, "element 3 cannot be held" }, { SC_F16, (double)NAN, "element 3 cannot be held" },
        { SC_F64, DBL_MAX, NULL }, { SC_F64, (double)INFINITY, "element 3 cannot be held" },
        { SC_F64, (double)NAN, "element 3 cannot be held" },
        { SC_I64, 9e18, NULL },
    };
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) {
        double value = held[i].value, d[3] = { 0, value, 0 };
        float f[3] = { 0, fabs(value) > (double)FLT_MAX ? copysignf(INFINITY, (float)copysign(1, value)) :
                       (float)value, 0 };
        if (value != value) f[1] = NAN;
        int64_t n[3] = { 0, fabs(value) < 1e19 ? (int64_t)value : 0, 0 };
        const size_t five[1] = { 5 };
        int status;
        sc_writer_open(&w, in_folder("bad"));
        sc_writer_tensor(&w, "x", held[i].dtype, 1, five);
        const double zero[2] = { 0, 0 };
        const float zero32[2] = { 0, 0 };
        const int64_t none[2] = { 0, 0 };
        if (held[i].dtype == SC_F64) {
            sc_writer_doubles(&w, zero, 2);
            status = sc_writer_doubles(&w, d, 3);
        } else if (held[i].dtype >= SC_I64) {
            sc_writer_integers(&w, none, 2);
            status = sc_writer_integers(&w, n, 3);
        } else {
            sc_writer_floats(&w, zero32, 2);
            status = sc_writer_floats(&w, f, 3);
        }
        if (held[i].error) {
            check(status == SC_FAILED && says(held[i].error), "%s refuses %g",
                  sc_dtype_name(held[i].dtype), value);
            sc_writer_close(&w, SC_FAILED);
            check(!exists(in_folder("bad")), "a discarded file stays");
        } else {
            check(status == SC_OK && sc_writer_close(&w, SC_OK) == SC_OK, "%s takes %g",
                  sc_dtype_name(held[i].dtype), value);
            unlink(in_folder("bad"));
        }
    }
    char *large = new_array(100000000, 1);
    memset(large, 'x', 100000000 - 1);
    sc_writer_open(&w, in_folder("bad"));
    sc_writer_metadata(&w, "large", large);
    sc_writer_tensor(&w, "a", SC_U8, 1, &(size_t){ 0 });
    check(sc_writer_close(&w, SC_OK) == SC_FAILED && says("header needs more than"), "header too large");
    free(large);
}

static void files_many(void)
{
    enum { MANY = 5000 };
    sc_writer w;
    sc_safetensors file = { 0 };
    char name[40];
    sc_writer_open(&w, in_folder("many"));
    w.room = 100 * MANY;
    for (size_t i = 0; i < MANY; i++) {
        float value = (float)i;
        snprintf(name, sizeof name, "tensor.%zu", i * 7919 % MANY);
        if (sc_writer_tensor(&w, name, SC_F32, 0, NULL) != SC_OK ||
            sc_writer_floats(&w, &value, 1) != SC_OK) check(0, "tensor %zu", i);
    }
    check(sc_writer_close(&w, SC_OK) == SC_OK && sc_safetensors_open(&file, in_folder("many")) == SC_OK &&
          file.tensors == MANY, "thousands of tensors");
    size_t wrong = 0;
    for (size_t i = 0; i < MANY; i++) {
        float value = -1;
        snprintf(name, sizeof name, "tensor.%zu", i * 7919 % MANY);
        const sc_tensor *tensor = sc_tensor_find(&file, name);
        wrong += !tensor || sc_tensor_floats(&file, tensor, 0, 1, &value) != SC_OK || value != (float)i;
    }
    check(wrong == 0, "thousands of tensors are found (%zu were not)", wrong);
    sc_safetensors_close(&file);
}

/* A header of many tiny things costs memory in proportion to the header. */
static void files_memory(void)
{
    size_t entries = 200000, n = 0;
    char *header = new_array(entries * 16 + 64, 1);
    n += (size_t)sprintf(header, "{\"__metadata__\":{");
    for (size_t i = 0; i < entries; i++)
        n += (size_t)sprintf(header + n, "%s\"%zx\":\"\"", i ? "," : "", i);
    n += (size_t)sprintf(header + n, "}}");
    sc_safetensors file = { 0 };
    check(sc_safetensors_open(&file, files_put_tensors(header, n, 0)) == SC_OK && file.entries == entries,
          "many entries");
    check(file.entry_capacity * sizeof *file.metadata < 8 * n, "memory is bounded by the header");
    check(sc_metadata_find(&file, "1f") && !sc_metadata_find(&file, "x"), "metadata among many");
    sc_safetensors_close(&file);
    free(header);
}

static void test_files(void)
{
    files_numbers();
    files_digest();
    files_json();
    files_layouts();
    files_bad_files();
    files_values();
    files_output();
    files_output_destinations();
    files_output_lock();
    files_writer();
    files_name_list();
    files_writer_errors();
    files_many();
    files_memory();
}
