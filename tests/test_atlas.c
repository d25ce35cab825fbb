/* Tests of explain and of the atlas: figures worked out by hand on test_look.c's model and SAE, whose
 * f_0 is relu(R / 255 - 0.2) and f_1 the same of G; the atlas's page also in a browser that shows no
 * window, where there is one. */

/* Class a: an image on which f_0 is 0.8 0.6 0.2 0, its mean over 5 tokens 0.32; b: one on which it is 0 0 0 0.4,
 * mean 0.08; c: one on which the mean of f_1 is 0.16. Two top images per latent. */
static void make_atlas_inputs(void)
{
    static const int red[4] = { 255, 0, 0, 0 }, green[4] = { 0, 255, 204, 0 }, weak[4] = { 0, 0, 0, 153 };
    if (!exists(in_folder("look"))) {
        if (mkdir(in_folder("look"), 0777) != 0) need("look");
        make_look_inputs();
    }
    look_folder("mixed");
    look_folder("mixed/a");
    look_folder("mixed/b<script>\342\200\250\377");
    look_folder("mixed/c");
    look_patches("mixed/a/0.ppm", red0, none);
    look_patches("mixed/b<script>\342\200\250\377/'\"\\<!--1.ppm", weak, none);
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
    /* entropy: -(0.8 ln 0.8 + 0.2 ln 0.2); latent 1 has one top image of the two that it would need */
    static const char head[] = "latent      activation  frequency   entropy     classes of its top images\n";
    static const char zero[] = "0.6667      0.5004      a 80 %, b<script>\\xe2\\x80\\xa8\303\277 20 %\n";
    static const char one[] = "0.3333      -           c 100 %\n";
    char wanted[500];
    check(look_run(EXPLAIN "both.ppm") == 0, "explain runs");
    snprintf(wanted, sizeof wanted, "%s1           0.28        %s0           0.16        %s", head, one, zero);
    check(strcmp(look_output, wanted) == 0, "the strongest first, each with its figures: %s", look_output);
    check(look_run(EXPLAIN "both.ppm --patch 1,0") == 0, "explain runs on a patch");
    snprintf(wanted, sizeof wanted, "%s1           0.6         %s", head, one);
    check(strcmp(look_output, wanted) == 0, "row 1, column 0 is the third patch: %s", look_output);
    check(look_run(EXPLAIN "both.ppm --max-frequency 0.5") == 0
          && look_says("\n1           ") && !look_says("\n0           "), "frequent latents are left out");
    check(look_run(EXPLAIN "both.ppm --max-frequency 0.666666686534881591796875") == 0 && look_says("\n0           0.16 "),
          "the bound itself is not left out");
    check(look_run(EXPLAIN "set --limit 1") == 0 && look_says("b<script"),
          "classes have the names that they have in the statistics");
    check(look_run(EXPLAIN "set/b/2.ppm -o explained") == 0 && is_mask("explained/latent_1_0_2.ppm.pgm", 0, 255, 0, 0)
          && exists(in_folder("look/explained/latent_1_0_2.ppm.ppm"))
          && !exists(in_folder("look/explained/latent_0_0_2.ppm.pgm")), "masks of the latents that fire");
    check(look_run(EXPLAIN "dark.ppm") == 0 && strcmp(look_output, head) == 0, "where none fires: %s", look_output);
    check_full_disk(EXPLAIN "both.ppm");
}

static void atlas_explain_refusals(void)
{
    static const struct { const char *arguments; int status; const char *words; } bad[] = {
        { "both.ppm --patch 2,0", 2, "from 0 to 1" }, { "both.ppm --patch 0,2", 2, "from 0 to 1" },
        { "both.ppm --patch -1,0", 2, "--patch" }, { "both.ppm --patch 0", 2, "R,C" },
        { "both.ppm --patch 0,0,0", 2, "at most 2" }, { "both.ppm --format csv", 2, "unknown option --format" },
        { "both.ppm --patch 0,0x", 2, "--patch" }, { "both.ppm --max-frequency 1.5", 2, "--max-frequency" },
        { "set", 1, "one image" }, { "both.ppm -l 0", 2, "unknown option -l" }, { "both.ppm -o stats", 1, "stats" },
        { "nowhere.ppm", 1, "nowhere.ppm" }, { "", 2, "IMAGE" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check(look_run(EXPLAIN "%s", bad[i].arguments) == bad[i].status && look_says(bad[i].words),
              "explain %s: status %d and '%s', got %s", bad[i].arguments, bad[i].status, bad[i].words,
              look_output);
    check(look_run("explain -s other.safetensors -m model.safetensors -t mixed.stats both.ppm") == 1
          && look_says("another SAE"), "statistics of another SAE are refused");
    check(look_run("stats -s sae.safetensors -m model.safetensors mixed --shard 1/2 -o half.stats --quiet") == 0
          && look_run("explain -s sae.safetensors -m model.safetensors -t half.stats both.ppm") == 1
          && look_says("one shard"), "statistics of a part of the data are refused");
    check(look_run("explain -s sae.safetensors -m model.safetensors both.ppm") == 2 && look_says("-t"),
          "explain needs statistics");
}

/* --- The atlas's files --- */

#define ATLAS "atlas -s sae.safetensors -m model.safetensors -t mixed.stats mixed --quiet "

static void atlas_files(void)
{
    /* 0.8 0.6 0.2 0 in fifteenths of the largest, rounded up: 15 12 4 0. The largest is that of both
     * images: 0.4 on image 1 becomes 8. Names are JSON that may stand in a script. */
    static const char part[] =
        "parts[0] = [\n[[0,0.32,0,\"a/0.ppm\",\"fc40\"],\n[1,0.08,1,\"b\\u003cscript>\\u2028\\u00ff/'"
        "\\u0022\\u005c\\u003c!--1.ppm\",\"0008\"],\n],\n[[2,0.16,2,\"c/2.ppm\",\"0f00\"],\n],\n[],\n];\n";
    static const char begin[] =
        "<!DOCTYPE html>\n<html lang='en'>\n<meta charset='utf-8'>\n<script>\nconst data = { name: "
        "\"sae.safetensors\", images: 3, part: 64, grid: 2,\nclasses: [\n\"a\",\n"
        "\"b\\u003cscript>\\u2028\\u00ff\",\n\"c\",\n], latents: [\n[0,0.666667,0.2,0.500402,0],\n"
        "[1,0.333333,0.16,-1,2],\n[2,0,0,-1,-1],\n] };\n</script>\n";
    size_t count;
    check(look_run(ATLAS "-o atlas") == 0, "atlas runs: %s", look_output);
    check(holds(in_folder("look/atlas/data/0.js"), part), "the top images and their masks: %s",
          get_file(in_folder("look/atlas/data/0.js"), NULL));
    check(!exists(in_folder("look/atlas/data/1.js")) && !exists(in_folder("look/atlas/data/3.jpg")),
          "no other file");
    int jpegs = system("command -v cjpeg >/dev/null 2>&1") == 0;
    if (!jpegs) skip("the atlas's images as JPEG: cjpeg is not here");
    for (int i = 0; i < 3 && jpegs; i++) {
        const unsigned char *jpeg = (unsigned char *)get_file(in_folder("look/atlas/data/%d.jpg", i), &count);
        check(jpeg && count > 100 && jpeg[0] == 0xff && jpeg[1] == 0xd8 && jpeg[count - 2] == 0xff
              && jpeg[count - 1] == 0xd9, "image %d is a JPEG from its first to its last marker", i);
    }
    const char *page = get_file(in_folder("look/atlas/index.html"), &count);
    check(page && strncmp(page, begin, sizeof begin - 1) == 0, "the numbers come first: %.600s",
          page ? page : "no page");
    check(page && strcmp(page + count - 8, "</html>\n") == 0, "the page is whole");
    check(page && !strstr(page, "http:") && !strstr(page, "https:"), "the page loads nothing from elsewhere");
    put_text(in_folder("look/atlas/data/0.js"), "old");
    check(look_run(ATLAS "-o atlas --threads 1") == 0 && holds(in_folder("look/atlas/data/0.js"), part),
          "an atlas is replaced by a new one");
}

/* The same as the files of `mask`: 255 f / largest, rounded, against 15 f / largest, up; image 1 has half the
 * latent's largest activation. */
static void atlas_masks(void)
{
    const char *mask, *line, *part = get_file(in_folder("look/atlas/data/0.js"), NULL);
    check(look_run("mask -s sae.safetensors -m model.safetensors mixed --quiet -l 0,1 -o mixed.masks") == 0, "masks");
    for (int i = 0; part && i < 3; i++) {
        static const char *const names[] = { "latent_0_0_0.ppm.pgm", "latent_0_1______--1.ppm.pgm",
                                             "latent_1_2_2.ppm.pgm" };
        size_t count;
        char begin[16];
        snprintf(begin, sizeof begin, "[%d,", i);
        mask = get_file(in_folder("look/mixed.masks/%s", names[i]), &count);
        line = strstr(part, begin);
        line = line ? strstr(line, ".ppm\",\"") + 7 : "";
        if (!check(mask != NULL, "mask %d is there", i)) continue;
        for (size_t p = 0; p < 4; p++) {
            double share = (double)(unsigned char)mask[count - 4 + p] / (i == 1 ? 510 : 255);
            double level = *line ? (double)strtol((char[]){ line[p], 0 }, NULL, 16) / 15 : -1;
            check(level > share - 0.003 && level < share + 1.0 / 15 + 0.003,
                  "image %d, patch %zu: %g in the atlas, %g in the mask", i, p, level, share);
        }
    }
}

/* Without cjpeg the images are bitmaps, under the same names: 54 bytes of header, then rows from the top down of
 * blue, green, red, 0. Image 0 is 4 x 4 pixels, red where red0 says so. */
static void atlas_bitmaps(void)
{
    char *path = strdup(getenv("PATH"));
    size_t count;
    setenv("PATH", in_folder("nothing"), 1);
    int status = look_run(ATLAS "-o bitmaps");
    setenv("PATH", path, 1);
    free(path);
    const unsigned char *bmp = (unsigned char *)get_file(in_folder("look/bitmaps/data/0.jpg"), &count);
    if (!check(status == 0 && bmp && count == 54 + 4 * 16 && memcmp(bmp, "BM", 2) == 0 && bmp[2] == count
               && bmp[18] == 4 && bmp[22] == 0xfc && bmp[25] == 0xff && bmp[28] == 32,
               "a bitmap of %zu bytes, status %d", count, status)) return;
    const unsigned char *top = bmp + 54;                     /* the first row of pixels: patches 0 and 1 */
    check(top[0] == 100 && top[1] == 0 && top[2] == red0[0] && top[4 * 2 + 2] == red0[1] && top[4 * 8 + 2] == red0[2],
          "the bitmap's first row: red %d and %d", top[2], top[4 * 2 + 2]);
}

static void atlas_refusals(void)
{
    static const struct { const char *arguments; int status; const char *words; } bad[] = {
        { "atlas " LOOK " -t mixed.stats -o x", 1, "another data set" }, { "atlas " LOOK " -o x", 2, "-t" },
        { "atlas " LOOK " -t stats", 2, "-o" }, { "atlas " LOOK " -t sae.safetensors -o x", 1, "not statistics" },
        { "atlas -s other.safetensors -m model.safetensors set --quiet -o x -t stats", 1, "another SAE" },
        { "atlas " LOOK " -t stats -o model.safetensors", 1, "model.safetensors" },
        { "atlas " LOOK " -t stats -o none/x", 1, "none/x" },
        { "atlas " LOOK " -t stats -o blocked", 1, "blocked/data" },
    };
    look_folder("blocked");
    put_text(in_folder("look/blocked/data"), "a file");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check(look_run("%s", bad[i].arguments) == bad[i].status && look_says(bad[i].words),
              "%s: status %d and '%s', got %s", bad[i].arguments, bad[i].status, bad[i].words, look_output);
    check(!exists(in_folder("look/x")), "what is refused leaves no folder");
}

/* A picture that has become unreadable since the statistics: no page stays that would show a mixture. */
static void atlas_failures(void)
{
    put_text(in_folder("look/mixed/c/2.ppm"), "P6\n4 4\n255\nshort");
    check(look_run(ATLAS "-o atlas") == 1 && look_says("c/2.ppm"), "a bad picture ends the run");
    check(!exists(in_folder("look/atlas/index.html")), "then there is no page");
    put_text(in_folder("look/mixed/a/0.ppm"), "P6\n4 4\n255\nshort");
    check(look_run(ATLAS "-o early") == 1 && !exists(in_folder("look/early")), "what is empty goes");
    look_patches("mixed/a/0.ppm", red0, none);
    look_patches("mixed/c/2.ppm", none, green2);
}

/* --- The page in a browser --- */

/* Runs in the page, after its own scripts, and sends one line per check. */
static const char *const atlas_script[] = {
    "<script>(async () => {",
    "const results = document.createElement('pre');",
    "const say = (good, what) => { results.textContent += (good ? 'GOOD ' : 'BAD ') + what + '\\n'; };",
    "const wait = async (test, what) => {",
    "    for (let i = 0; i < 300 && !test(); i++) await new Promise(go => setTimeout(go, 10));",
    "    say(test(), what + ': ' + document.title + ' ' + $('facts').textContent);",
    "};",
    "const pictures = () => [...document.querySelectorAll('figure img')];",
    "const files = () => pictures().map(p => p.getAttribute('src')).join();",
    "const copy = document.createElement('canvas').getContext('2d', { willReadFrequently: true });",
    "const alphas = () => [...document.querySelectorAll('figure canvas')].map(c => {",
    "    copy.clearRect(0, 0, 2, 2);",
    "    copy.drawImage(c, 0, 0);",
    "    return [...copy.getImageData(0, 0, 2, 2).data].filter((v, i) => i % 4 === 3).join();",
    "});",
    "const shows = (text, what) => say(alphas().join(' ') === text, what + ': ' + alphas().join(' '));",
    "const rows = () => [...document.querySelectorAll('tbody tr')].map(r => r.firstChild.textContent).join();",
    "addEventListener('error', event => say(false, 'error: ' + event.message));",
    "await wait(() => files() === 'data/0.jpg,data/1.jpg', 'the lowest entropy comes first');",
    "await wait(() => pictures().every(p => p.naturalWidth === 4), 'pictures are decoded');",
    /* of 255: 0.35 (1 - level / 15) for levels 15 12 4 and 8, 0.65 where it is silent */
    "shows('0,18,65,166 166,166,166,42', 'masks are shown as they fire');",
    "const hidden = () => getComputedStyle(document.querySelector('figure canvas')).display === 'none';",
    "say(!hidden(), 'masks are on');",
    "$('masked').click();",
    "say(hidden(), 'masks are off');",
    "$('masked').click();",
    "say(!hidden(), 'masks are on again');",
    /* on a phone nothing scrolls sideways */
    "say(innerWidth === 390, 'the window is ' + innerWidth + ' pixels wide');",
    "for (const part of [document.documentElement, $('rows')])",
    "    say(part.scrollWidth <= part.clientWidth, part.tagName + ' is ' + part.scrollWidth + ' pixels wide');",
    "document.querySelectorAll('tbody tr')[1].click();",
    "await wait(() => location.hash === '#latent=1' && files() === 'data/2.jpg', 'a click on a row');",
    "say(document.title === 'Latent 1' && $('facts').textContent.includes('33.3 %'), 'facts of the latent');",
    "say(document.querySelector('.chosen').firstChild.textContent === '1', 'the row is marked');",
    "$('before').click();",
    "await wait(() => location.hash === '#latent=0' && files() === 'data/0.jpg,data/1.jpg', 'the one before');",
    "$('before').click();",
    "$('after').click();",
    "await wait(() => location.hash === '#latent=1' && files() === 'data/2.jpg', 'the next one');",
    "$('after').click();",
    "await wait(() => location.hash === '#latent=2' && files() === '', 'a latent that never fires');",
    "say(rows() === '0,1,2', 'by entropy, what has none at the end: ' + rows());",
    "document.querySelectorAll('th')[2].click();",
    "say(rows() === '1,0,2', 'by mean activation: ' + rows());",
    "document.querySelectorAll('th')[2].click();",
    "say(rows() === '0,1,2', 'the other way round, the silent one still last: ' + rows());",
    "document.querySelectorAll('th')[0].click();",
    "document.querySelectorAll('th')[0].click();",
    "say(rows() === '1,0,2', 'by index, backwards: ' + rows());",
    "$('filter').value = 'C';",
    "$('filter').oninput();",
    "say(rows() === '1', 'only class c: ' + rows());",
    "$('filter').value = '0';",
    "$('filter').oninput();",
    "say(rows() === '0', 'only latent 0: ' + rows());",
    "$('filter').value = '';",
    "$('filter').oninput();",
    "location.hash = 'latent=0';",
    "await wait(() => files() === 'data/0.jpg,data/1.jpg', 'the address names a latent');",
    "say([...document.querySelectorAll('tbody tr:last-child td')].map(c => c.textContent).join(' ') === '2 0 % - - -',"
    "    'values of a latent that never fires');",
    "say([...document.querySelectorAll('figcaption')].map(c => c.textContent).join() ==="
    "    '0.32 a,0.08 b<script>\\u2028\\u00ff', 'class names are only text');",
    "say(document.querySelectorAll('figure')[1].title.endsWith(`'\"\\\\<!--1.ppm`), 'file names');",
    "location.hash = 'latent=3';",
    "await wait(() => $('facts').textContent === 'There is no such latent.', 'an address beyond');",
    "parent.postMessage(results.textContent + 'END\\n', '*');",
    "})();</script>", NULL };

/* Shows the page in a frame as wide as a phone's screen, and what it reports. */
static const char atlas_phone[] =
    "<!DOCTYPE html><iframe src='test.html' width=390 height=844 frameborder=0></iframe><pre></pre>\n"
    "<script>onmessage = event => { document.querySelector('pre').textContent = event.data; };</script>\n";

/* Starts a browser on a page; returns what it printed, and in *err what it complained about. */
static const char *atlas_browse(const char *browser, const char *page, const char **err)
{
    static char address[1200], profile[1200];
    char *arguments[] = { (char *)(uintptr_t)browser, "--headless", "--no-sandbox", "--disable-gpu",
                          "--disable-dev-shm-usage", "--dump-dom", "--enable-logging=stderr",
                          "--virtual-time-budget=60000", profile, address, NULL };
    int status;
    snprintf(address, sizeof address, "file://%s", page);
    snprintf(profile, sizeof profile, "--user-data-dir=%s", in_folder("browser"));
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) need("fork");
    if (child == 0) {
        if (!freopen("/dev/null", "r", stdin) || !freopen(in_folder("look/dom"), "w", stdout)
            || !freopen(in_folder("look/log"), "w", stderr)) _exit(126);
        alarm(120);
        execvp(browser, arguments);
        _exit(127);
    }
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) need("waitpid");
    *err = get_file(in_folder("look/log"), NULL);
    return get_file(in_folder("look/dom"), NULL);
}

/* Two that write one folder would mix: the second is told so, and does no harm. */
static void atlas_shared(void)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
    char page[400];
    snprintf(page, sizeof page, "%s", in_folder("look/shared/index.html"));
    if (!check(look_run(ATLAS "-o shared") == 0, "atlas runs")) return;
    remove(in_folder("look/shared/data/0.js"));
    int fd = open(in_folder("look/shared/index.html.tmp"), O_RDWR | O_CREAT, 0600);
    if (fd < 0 || fcntl(fd, F_SETLK, &lock) != 0) need("a lock");
    check(look_run(ATLAS "-o shared") == 1 && strstr(look_output, "index.html: cannot be written: another process"),
          "a folder that another writes: %s", look_output);
    check(exists(page) && !exists(in_folder("look/shared/data/0.js")), "and it is written");
    close(fd);
    check(look_run(ATLAS "-o shared") == 0 && exists(page) && !exists(in_folder("look/shared/index.html.tmp"))
          && exists(in_folder("look/shared/data/0.js")), "afterwards: %s", look_output);
}

static void atlas_browser(void)
{
    static const char *const browsers[] = { "chromium", "chromium-browser", "google-chrome" };
    size_t browser = 0;
    char command[100], *end = NULL;
    for (; browser < COUNT(browsers); browser++) {
        snprintf(command, sizeof command, "command -v %s > /dev/null 2>&1", browsers[browser]);
        if (system(command) == 0) break;
    }
    if (browser == COUNT(browsers)) {
        skip("THE ATLAS IN A BROWSER: chromium is not here (Debian's package of that name)");
        return;
    }
    if (!check(look_run(ATLAS "-o atlas") == 0, "atlas runs")) return;
    char *page = get_file(in_folder("look/atlas/index.html"), NULL);
    FILE *out = fopen(in_folder("look/atlas/test.html"), "w");
    if (!page || !out || (end = strstr(page, "</body>")) == NULL) need("test.html");
    fprintf(out, "%.*s", (int)(end - page), page);
    for (const char *const *line = atlas_script; *line; line++) fprintf(out, "%s\n", *line);
    fputs(end, out);
    fclose(out);
    put_text(in_folder("look/atlas/phone.html"), atlas_phone);
    const char *log, *dom = atlas_browse(browsers[browser], in_folder("look/atlas/phone.html"), &log);
    check(dom && strstr(dom, "END\n"), "the page's test comes to its end: %s", dom ? dom : "nothing");
    check(log && !strstr(log, "CONSOLE"), "nothing on the console: %s", log ? strstr(log, "CONSOLE") : "no log");
    const char *line = dom ? strstr(dom, "<pre>") : NULL;
    for (line = line ? line + 5 : NULL; line && strncmp(line, "END", 3) != 0;) {
        check(strncmp(line, "GOOD ", 5) == 0, "in the browser: %.*s", (int)strcspn(line, "\n"), line);
        line = strchr(line, '\n');
        if (line) line++;
    }
}

static void test_atlas(void)
{
    make_atlas_inputs();
    atlas_explain();
    atlas_explain_refusals();
    atlas_files();
    atlas_masks();
    atlas_bitmaps();
    atlas_shared();
    atlas_browser();
    atlas_refusals();
    atlas_failures();
}
