/* Tests of the SAE and its training: 30 steps of four kinds, the decoder bias's starts against PyTorch in
 * float64 (tests/golden/make_golden.py), the gradient against finite differences, resuming, ties. */

static const struct { const char *name, *init, *options; double tolerance; } sae_cases[] = {
    { "relu", "init_90", "--arch relu --lr 0.00390625 --l1 0.00390625 --warmup 10", 1e-5 },
    { "relu_ghost", "init_300",
      "--arch relu --lr 0.0009765625 --l1 0.00390625 --warmup 5 --ghost --dead-window 3", 1e-4 },
    { "topk", "init_300", "--arch topk --k 6 --lr 0.00390625 --warmup 0", 1e-5 },
    { "topk_ghost", "init_90", "--arch topk --k 5 --lr 0.0009765625 --warmup 5 --ghost --dead-window 3", 3e-5 },
};

#define SAE_TRAIN "train --quiet --acts " GOLDEN "acts.safetensors --batch 11 "

static void sae_check_log(const char *name, const char *log)
{
    static const struct { const char *column; double relative, absolute; } columns[] = {
        { "step", 0, 0 }, { "images", 0, 0 }, { "tokens", 0, 0 }, { "lr", 1e-8, 0 }, { "loss", 3e-6, 0 },
        { "mse", 3e-6, 0 }, { "l1", 3e-6, 0 }, { "ghost", 3e-6, 0 }, { "l0", 1e-8, 1.01 / 286 },
        { "explained_variance", 0, 1e-5 }, { "explained_variance_uncentred", 0, 1e-5 }, { "dead", 0, 0 },
    };
    char path[128];
    snprintf(path, sizeof path, GOLDEN "train_%s.csv", name);
    const char *golden = get_file(path, NULL);
    if (!check(golden && log && strncmp(golden, log, strcspn(golden, "\n") + 1) == 0,
               "%s: the log's header is not the golden file's", name)) return;
    for (size_t c = 0; c < sizeof columns / sizeof *columns; c++) {
        double worst = 0;
        size_t wrong = 0;
        for (size_t row = 0; row < 30; row++) {
            double got = csv_number(log, row, columns[c].column), expected = csv_number(golden, row, columns[c].column);
            double error = fabs(got - expected);
            if (!(error <= columns[c].relative * fabs(expected) + columns[c].absolute)) wrong++;
            worst = fmax(worst, error);
        }
        check(wrong == 0, "%s: %s is wrong in %zu of 30 steps, by at most %.3g", name, columns[c].column, wrong,
              worst);
    }
    check(isnan(csv_number(log, 30, "step")), "%s: the log has more than 30 rows", name);
}

static void sae_golden(void)
{
    static const char *const tensors[] = { "W_enc", "b_enc", "W_dec", "b_dec" };
    for (size_t i = 0; i < 4; i++) {
        char golden[128];
        const char *out = in_folder("train_%s", sae_cases[i].name);
        snprintf(golden, sizeof golden, GOLDEN "train_%s.safetensors", sae_cases[i].name);
        if (!works(SAE_TRAIN "--order sequential --steps 30 --init " GOLDEN "%s.safetensors --log %s.csv -o %s %s",
                   sae_cases[i].init, out, out, sae_cases[i].options)) continue;
        for (size_t t = 0; t < 4; t++) check_tensor(out, tensors[t], golden, tensors[t], sae_cases[i].tolerance);
        sae_check_log(sae_cases[i].name, get_file(in_folder("train_%s.csv", sae_cases[i].name), NULL));
    }
}

static void sae_starts(void)
{
    static const char *const kinds[] = { "mean", "geomedian", "geomedian-images" };
    const char *golden = get_file(GOLDEN "b_dec.csv", NULL);
    for (size_t k = 0; k < 3; k++)
        for (int images = 5; images <= 11; images += 6) {
            char column[64];
            double expected[20];
            size_t count;
            snprintf(column, sizeof column, "%s_%d", kinds[k], images);
            for (size_t d = 0; d < 20; d++) expected[d] = csv_number(golden, d, column);
            if (!works(SAE_TRAIN "--order sequential --steps 0 --latents 32 --b-dec %s --b-dec-images %d -o %s",
                       kinds[k], images, in_folder("start"))) continue;
            const double *b_dec = numbers_of(in_folder("start"), "b_dec", &count);
            if (!b_dec || !check(count == 20, "b_dec has %zu numbers", count)) continue;
            double error = off(b_dec, expected, 20);
            check(error <= 1e-6, "the %s of %d images is off by %.2g", kinds[k], images, error);
        }
    works(SAE_TRAIN "--steps 0 --latents 600 -o %s", in_folder("start"));
    size_t n, e, d, b;
    const double *W_enc = numbers_of(in_folder("start"), "W_enc", &e), *W_dec = numbers_of(in_folder("start"), "W_dec", &d);
    const double *b_dec = numbers_of(in_folder("start"), "b_dec", &b), *b_enc = numbers_of(in_folder("start"), "b_enc", &n);
    if (!W_enc || !W_dec || !b_enc || !b_dec || !check(e == 12000 && d == 12000 && n == 600 && b == 20, "shapes")) return;
    double largest = 0, worst_norm = 0, biases = 0, sum = 0;
    for (size_t i = 0; i < e; i++) largest = fmax(largest, fabs(W_enc[i])), sum += W_enc[i];
    for (size_t j = 0; j < n; j++) {
        double norm = 0;
        for (size_t i = 0; i < 20; i++) norm += W_dec[j * 20 + i] * W_dec[j * 20 + i];
        worst_norm = fmax(worst_norm, fabs(sqrt(norm) - 1));
        biases += fabs(b_enc[j]);
    }
    for (size_t i = 0; i < 20; i++) biases += fabs(b_dec[i]);
    check(largest <= 0.1 && largest > 0.0999 && fabs(sum) < 20, "W_enc does not start uniform in +-sqrt(6 / n)");
    check(worst_norm < 1e-6, "W_dec's rows do not start with norm 1 (off by %g)", worst_norm);
    check(biases == 0, "biases do not start at 0");
}

/* --- The gradient: a float64 copy of the loss, ghosts' constants frozen --- */

enum { SAE_D = 20, SAE_T = 286, SAE_MOST = 300 };

/* One point in the space of weights. W_enc here [n, D] like W_dec. */
typedef struct { size_t n; double W_enc[SAE_MOST][SAE_D], b_enc[SAE_MOST], W_dec[SAE_MOST][SAE_D], b_dec[SAE_D]; } sae_point;

/* The batch, what kind of loss, and what is frozen at the point of the gradient. */
static struct {
    double x[SAE_T][SAE_D], l1;
    size_t k;                                        /* 0: ReLU */
    int dead[SAE_MOST], any_dead, freeze;
    double r[SAE_T][SAE_D], match[SAE_T], factor[SAE_T][SAE_D];
    uint64_t active, frozen_active;                  /* a digest of who fires */
} sae_loss;

static double sae_dot(const double *a, const double *b)
{
    double sum = 0;
    for (size_t d = 0; d < SAE_D; d++) sum += a[d] * b[d];
    return sum;
}

/* f of a token; TopK's choice is part of the digest, so a step across a kink shows. */
static void sae_encode(const sae_point *p, size_t t, double *h, double *f)
{
    double centred[SAE_D];
    for (size_t d = 0; d < SAE_D; d++) centred[d] = sae_loss.x[t][d] - p->b_dec[d];
    for (size_t j = 0; j < p->n; j++) {
        h[j] = sae_dot(p->W_enc[j], centred) + p->b_enc[j];
        f[j] = !sae_loss.k && h[j] > 0 ? h[j] : 0;
    }
    for (size_t i = 0; i < sae_loss.k; i++) {
        size_t best = SIZE_MAX;
        for (size_t j = 0; j < p->n; j++)
            if (f[j] == 0 && h[j] > 0 && (best == SIZE_MAX || h[j] > h[best])) best = j;
        if (best != SIZE_MAX) f[best] = h[best];
    }
    for (size_t j = 0; j < p->n; j++)
        sae_loss.active = (sae_loss.active ^ (f[j] > 0)) * 0x9E3779B97F4A7C15u;
}

static double sae_ghost_token(const sae_point *p, size_t t, const double *h, const double *output)
{
    double g[SAE_D] = { 0 }, sum = 0, norm_r, norm_x = sqrt(sae_dot(sae_loss.x[t], sae_loss.x[t]));
    for (size_t j = 0; j < p->n; j++)
        for (size_t d = 0; sae_loss.dead[j] && d < SAE_D; d++) g[d] += exp(h[j]) * p->W_dec[j][d];
    if (sae_loss.freeze) {
        for (size_t d = 0; d < SAE_D; d++) sae_loss.r[t][d] = sae_loss.x[t][d] - output[d];
        sae_loss.match[t] = sqrt(sae_dot(sae_loss.r[t], sae_loss.r[t])) / (1e-6 + 2 * sqrt(sae_dot(g, g)));
    }
    norm_r = sqrt(sae_dot(sae_loss.r[t], sae_loss.r[t]));
    for (size_t d = 0; d < SAE_D; d++) {
        double apart = g[d] * sae_loss.match[t] - sae_loss.r[t][d], m = apart * apart / norm_r;
        if (sae_loss.freeze)
            sae_loss.factor[t][d] = sae_loss.r[t][d] * sae_loss.r[t][d] / norm_x / (m + 1e-6);
        sum += m * sae_loss.factor[t][d];
    }
    return sum;
}

/* mse + l1 + ghost; freeze: this is the point where the constants are taken. */
static double sae_loss_at(const sae_point *p, int freeze)
{
    double mse = 0, l1 = 0, ghost = 0, h[SAE_MOST], f[SAE_MOST];
    sae_loss.freeze = freeze;
    sae_loss.active = 0;
    for (size_t t = 0; t < SAE_T; t++) {
        double output[SAE_D], error = 0;
        sae_encode(p, t, h, f);
        memcpy(output, p->b_dec, sizeof output);
        for (size_t j = 0; j < p->n; j++) {
            l1 += f[j];
            for (size_t d = 0; f[j] != 0 && d < SAE_D; d++) output[d] += f[j] * p->W_dec[j][d];
        }
        for (size_t d = 0; d < SAE_D; d++) error += (output[d] - sae_loss.x[t][d]) * (output[d] - sae_loss.x[t][d]);
        mse += error / sqrt(sae_dot(sae_loss.x[t], sae_loss.x[t]));
        if (sae_loss.any_dead) ghost += sae_ghost_token(p, t, h, output);
    }
    if (freeze) sae_loss.frozen_active = sae_loss.active;
    return (mse + ghost) / (SAE_T * SAE_D) + (sae_loss.k ? 0 : sae_loss.l1 * l1 / SAE_T);
}

/* d loss / d *weight by central differences; NaN where a latent starts or stops firing in between. */
static double sae_difference(const sae_point *p, double *weight)
{
    double at = *weight, step = 1e-6 * (fabs(at) + 0.01), up, down;
    int kink;
    *weight = at + step;
    up = sae_loss_at(p, 0);
    kink = sae_loss.active != sae_loss.frozen_active;
    *weight = at - step;
    down = sae_loss_at(p, 0);
    kink |= sae_loss.active != sae_loss.frozen_active;
    *weight = at;
    return kink ? (double)NAN : (up - down) / (2 * step);
}

/* An SAE's file as a point, rows of W_dec scaled to norm 1 as the step begins with that. */
static int sae_read_point(const char *path, sae_point *p)
{
    size_t n, d, e, b;
    const double *W_enc = numbers_of(path, "W_enc", &e), *W_dec = numbers_of(path, "W_dec", &d);
    const double *b_enc = numbers_of(path, "b_enc", &n), *b_dec = numbers_of(path, "b_dec", &b);
    if (!W_enc || !W_dec || !b_enc || !b_dec || n > SAE_MOST || b != SAE_D || e != n * b || d != e) return 0;
    p->n = n;
    memcpy(p->b_enc, b_enc, n * sizeof *b_enc);
    memcpy(p->b_dec, b_dec, sizeof p->b_dec);
    for (size_t j = 0; j < n; j++) {
        double norm = sqrt(sae_dot(W_dec + j * SAE_D, W_dec + j * SAE_D));
        for (size_t i = 0; i < SAE_D; i++) {
            p->W_enc[j][i] = W_enc[i * n + j];
            p->W_dec[j][i] = W_dec[j * SAE_D + i] / norm;
        }
    }
    return 1;
}

/* The step's gradient out of Adam's first moments before and after it: m' = 0.9 m + 0.1 g. */
static int sae_step_gradient(const char *before, const char *after, const char *name, double *gradient, size_t n)
{
    size_t count, same;
    const double *now = numbers_of(after, name, &count);
    const double *then = before ? numbers_of(before, name, &same) : NULL;
    if (!now || count != n || (before && (!then || same != n))) return check(0, "%s has no %zu numbers", name, n);
    for (size_t i = 0; i < n; i++) gradient[i] = (now[i] - (then ? 0.9 * then[i] : 0)) / 0.1;
    return 1;
}

/* Adds a weight's two gradients to what is compared. */
typedef struct { double worst, largest; size_t weights, kinks; } sae_comparison;

static void sae_compare(sae_comparison *c, double expected, double got)
{
    if (expected != expected) { c->kinks++; return; }
    c->worst = fmax(c->worst, fabs(expected - got));
    c->largest = fmax(c->largest, fabs(expected));
    c->weights++;
}

static void sae_end_comparison(const char *name, const char *part, const sae_comparison *c, double tolerance)
{
    check(c->weights > 5 * c->kinks && c->worst <= tolerance * c->largest,
          "%s: d loss / d %s is off by %.2g of %.2g in %zu weights (%zu at kinks)", name, part, c->worst,
          c->largest, c->weights, c->kinks);
}

static void sae_check_gradient(const char *name, const char *before, const char *after, sae_point *p)
{
    static double dW_enc[SAE_MOST * SAE_D], dW_dec[SAE_MOST * SAE_D], db_enc[SAE_MOST], db_dec[SAE_D];
    sae_comparison enc = { 0 }, dec = { 0 }, bias = { 0 }, centre = { 0 }, ghosts = { 0 };
    if (!sae_step_gradient(before, after, "W_enc_m", dW_enc, p->n * SAE_D)
        || !sae_step_gradient(before, after, "W_dec_m", dW_dec, p->n * SAE_D)
        || !sae_step_gradient(before, after, "b_enc_m", db_enc, p->n)
        || !sae_step_gradient(before, after, "b_dec_m", db_dec, SAE_D)) return;
    sae_loss_at(p, 1);
    for (size_t d = 0; d < SAE_D; d++) sae_compare(&centre, sae_difference(p, &p->b_dec[d]), db_dec[d]);
    for (size_t s = 0, next = 0; s < 36; s++) {      /* 24 spread out, 12 dead ones if there are as many */
        size_t j = s * p->n / 24 + s % 3;
        if (s >= 24) {
            while (next < p->n && !sae_loss.dead[next]) next++;
            if (next == p->n) break;
            j = next++;
        }
        sae_compare(sae_loss.dead[j] ? &ghosts : &bias, sae_difference(p, &p->b_enc[j]), db_enc[j]);
        for (size_t d = s % 5; d < SAE_D; d += 5)
            sae_compare(sae_loss.dead[j] ? &ghosts : &enc, sae_difference(p, &p->W_enc[j][d]), dW_enc[j * SAE_D + d]);
    }
    for (size_t s = 0; s < 6; s++) {                 /* whole rows: what lies along them is removed */
        size_t j = s * p->n / 6 + s % 3;
        double row[SAE_D];
        for (size_t d = 0; d < SAE_D; d++) row[d] = sae_difference(p, &p->W_dec[j][d]);
        double along = sae_dot(row, p->W_dec[j]);
        for (size_t d = 0; d < SAE_D; d++)
            sae_compare(&dec, row[d] - along * p->W_dec[j][d], dW_dec[j * SAE_D + d]);
    }
    sae_end_comparison(name, "W_enc", &enc, 2e-5);
    sae_end_comparison(name, "W_dec", &dec, 2e-5);
    sae_end_comparison(name, "b_enc", &bias, 2e-5);
    sae_end_comparison(name, "b_dec", &centre, 2e-5);
    if (sae_loss.any_dead) sae_end_comparison(name, "dead latents' W_enc and b_enc", &ghosts, 2e-5);
}

static void sae_gradient(void)
{
    static sae_point point;
    size_t count;
    static double x[12 * 26 * SAE_D];
    const double *acts = numbers_of(GOLDEN "acts.safetensors", "activations", &count);
    if (!acts || count != sizeof x / sizeof *x) return;
    memcpy(x, acts, sizeof x);
    for (size_t i = 0; i < 2 * 2; i++) {
        int topk = i % 2, ghost = i / 2, steps = ghost ? 5 : 1;
        const char *name = topk ? ghost ? "TopK, ghosts" : "TopK" : ghost ? "ReLU, ghosts" : "ReLU";
        char before[300], after[300];
        snprintf(before, sizeof before, "%s", in_folder("before.ckpt"));
        snprintf(after, sizeof after, "%s", in_folder("after.ckpt"));
        remove_tree(before);
        remove_tree(after);
        for (int last = 0; last < 2; last++)         /* steps - 1 steps, then one more */
            if (steps - 1 + last > 0)
                works(SAE_TRAIN "--order sequential --init " GOLDEN "init_90.safetensors --steps %d %s %s "
                      "--lr 0.0009765625 --warmup 0 --checkpoint %s -o %s", steps - 1 + last,
                      topk ? "--arch topk --k 5" : "--arch relu --l1 0.00390625", ghost ? "--ghost --dead-window 1" : "",
                      last ? after : before, in_folder("gradient"));
        if (!sae_read_point(ghost ? before : GOLDEN "init_90.safetensors", &point)) continue;
        size_t draw = (size_t)(steps - 1) * 11;
        for (size_t t = 0; t < SAE_T; t++)
            memcpy(sae_loss.x[t], x + ((draw + t / 26) % 12 * 26 + t % 26) * SAE_D, sizeof sae_loss.x[t]);
        sae_loss.l1 = 0.00390625;
        sae_loss.k = topk ? 5 : 0;
        sae_loss.any_dead = 0;
        const double *silent = ghost ? numbers_of(before, "silent", &count) : NULL;
        for (size_t j = 0; j < point.n; j++)
            sae_loss.any_dead += sae_loss.dead[j] = silent && silent[j] > 1;
        check(!ghost == !sae_loss.any_dead, "%s: %d latents are dead", name, sae_loss.any_dead);
        sae_check_gradient(name, ghost ? before : NULL, after, &point);
    }
}

/* --- Resuming --- */

/* A log without its last column, the seconds. */
static const char *sae_log_body(const char *path)
{
    char *log = get_file(path, NULL), *to = log;
    for (char *line = log; line && *line;) {
        char *end = line + strcspn(line, "\n"), *comma = end;
        while (comma > line && *comma != ',') comma--;
        memmove(to, line, (size_t)(comma - line));
        to += comma - line;
        *to++ = '\n';
        line = end + (*end == '\n');
    }
    if (log) *to = '\0';
    return log ? log : "";
}

static void sae_resume(void)
{
    static const char *const kinds[] = { "--arch relu --ghost --dead-window 2 --b-dec geomedian", "--arch topk --k 4" };
    for (size_t k = 0; k < 2; k++) {
#define SAE_RUN SAE_TRAIN "--latents 64 --seed 7 --lr 1e-3 --warmup 5 %s --checkpoint-every 7 "
        const char *whole = in_folder("whole"), *part = in_folder("part");
        remove_tree(in_folder("whole.ckpt"));
        remove_tree(in_folder("part.ckpt"));
        works(SAE_RUN "--steps 30 --checkpoint %s.ckpt --log %s.csv -o %s", kinds[k], whole, whole, whole);
        works(SAE_RUN "--steps 17 --checkpoint %s.ckpt --log %s.csv -o %s", kinds[k], part, part, part);
        check(exists(in_folder("part.ckpt.prev")), "the checkpoint before the last is not kept");
        works(SAE_RUN "--steps 30 --checkpoint %s.ckpt --resume --log %s.csv -o %s", kinds[k], part, part, part);
        check(same_files(whole, part), "%s: a resumed run ends elsewhere", kinds[k]);
        check(strcmp(sae_log_body(in_folder("whole.csv")), sae_log_body(in_folder("part.csv"))) == 0,
              "%s: a resumed run logs something else", kinds[k]);
        rename(in_folder("whole.ckpt.prev"), in_folder("part.ckpt"));      /* of step 28: cuts the log back */
        works(SAE_RUN "--steps 30 --checkpoint %s.ckpt --resume --log %s.csv -o %s", kinds[k], part, part, part);
        check(same_files(whole, part), "%s: a run resumed from an older checkpoint ends elsewhere", kinds[k]);
        check(strcmp(sae_log_body(in_folder("whole.csv")), sae_log_body(in_folder("part.csv"))) == 0,
              "%s: the log is not cut back to the checkpoint's step", kinds[k]);
        refuses(1, "part.ckpt", SAE_TRAIN "--latents 64 --seed 8 --lr 1e-3 --warmup 5 %s --steps 31 "
                "--checkpoint %s.ckpt --resume -o %s", kinds[k], part, part);
        size_t count;
        char *bytes = get_file(in_folder("part.ckpt"), &count);
        if (check(bytes != NULL, "there is no checkpoint")) {
            bytes[count / 2] ^= 4;
            put_file(in_folder("part.ckpt"), bytes, count);
            refuses(1, "part.ckpt.prev", SAE_RUN "--steps 31 --checkpoint %s.ckpt --resume -o %s", kinds[k],
                    part, part);
        }
    }
}

/* --- Order and ties --- */

static void sae_order(void)
{
    works(SAE_TRAIN "--latents 40 --steps 12 -o %s", in_folder("order42"));
    works(SAE_TRAIN "--latents 40 --steps 12 --seed 42 --order shuffle -o %s", in_folder("order42b"));
    works(SAE_TRAIN "--latents 40 --steps 12 --seed 43 -o %s", in_folder("order43"));
    works(SAE_TRAIN "--latents 40 --steps 12 --order sequential -o %s", in_folder("ordered"));
    check(same_files(in_folder("order42"), in_folder("order42b")), "the same run twice gives other bytes");
    check(!same_files(in_folder("order42"), in_folder("order43")), "the seed changes nothing");
    check(!same_files(in_folder("order42"), in_folder("ordered")), "--order changes nothing");
    works(SAE_TRAIN "--latents 40 --epochs 2.5 -o %s --log %s", in_folder("epochs"), in_folder("epochs.csv"));
    const char *log = get_file(in_folder("epochs.csv"), NULL);
    check(log && csv_number(log, 2, "images") == 33 && isnan(csv_number(log, 3, "step")),
          "2.5 epochs of 12 images in batches of 11 are not 3 steps");
}

/* Latents in pairs with the same weights: of two equal h the lower index is taken. */
static void sae_ties(void)
{
    enum { N = 40, PAIRS = N / 2 };
    sc_writer w;
    size_t count, rows, wrong = 0;
    float W_enc[SAE_D][N], W_dec[N][SAE_D], zeros[N] = { 0 };
    for (size_t d = 0; d < SAE_D; d++)
        for (size_t j = 0; j < PAIRS; j++) W_enc[d][j] = W_enc[d][N - 1 - j] = W_dec[j][d] = W_dec[N - 1 - j][d] = random_float();
    int status = sc_writer_open(&w, in_folder("ties"));
    status |= sc_writer_metadata(&w, "architecture", "topk") | sc_writer_metadata(&w, "k", "3");
    status |= sc_writer_tensor(&w, "W_enc", SC_F32, 2, (size_t[]){ SAE_D, N }) | sc_writer_floats(&w, W_enc[0], SAE_D * N);
    status |= sc_writer_tensor(&w, "b_enc", SC_F32, 1, (size_t[]){ N }) | sc_writer_floats(&w, zeros, N);
    status |= sc_writer_tensor(&w, "W_dec", SC_F32, 2, (size_t[]){ N, SAE_D }) | sc_writer_floats(&w, W_dec[0], SAE_D * N);
    status |= sc_writer_tensor(&w, "b_dec", SC_F32, 1, (size_t[]){ SAE_D }) | sc_writer_floats(&w, zeros, SAE_D);
    if (status != SC_OK || sc_writer_close(&w, SC_OK) != SC_OK) need("ties");
    works("encode --quiet -s %s --acts " GOLDEN "acts.safetensors --layer 2 --hook mlp -o %s", in_folder("ties"),
          in_folder("tied"));
    const double *row = numbers_of(in_folder("tied"), "row", &rows), *index = numbers_of(in_folder("tied"), "index", &count);
    for (size_t i = 0; row && index && i + 2 < count; i += 3)        /* a pair, and the lower of the next pair */
        wrong += row[i] != row[i + 2] || index[i] + index[i + 2] + index[i + 1] < N - 1
                 || !(index[i] + index[i + 1] == N - 1 || index[i] + index[i + 2] == N - 1
                      || index[i + 1] + index[i + 2] == N - 1)
                 || (index[i] >= PAIRS) || (index[i + 1] >= PAIRS);
    check(count == 3 * 12 * 26 && wrong == 0, "of %zu codes of TopK ties %zu triples are wrong", count, wrong);
}

static void test_sae(void)
{
    sae_golden();
    sae_starts();
    sae_gradient();
    sae_resume();
    sae_order();
    sae_ties();
}
