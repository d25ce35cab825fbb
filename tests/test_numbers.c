/* Tests of numbers and kernels: what decides bits. Every usable set of kernels against the plain loops,
 * bit for bit; the own functions against the C library's. */

/* --- The fused multiply-add --- */

static float numbers_any_float(void)
{
    uint32_t bits = (uint32_t)(random64() >> 32);
    float value;
    if ((bits >> 23 & 255) == 255) bits &= ~(1u << 30);              /* finite */
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A float of few digits near 1, so that products and sums meet half way. */
static float numbers_short_float(void)
{
    return (float)((int)(random64() >> 51) - 4096) * ldexpf(1, -(int)(random64() % 24));
}

static void numbers_fma(void)
{
    size_t wrong = 0, tiny = 0, huge = 0, zero = 0;
    for (size_t i = 0; i < 3000000; i++) {
        float a = numbers_any_float(), b = numbers_any_float(), c = numbers_any_float();
        switch (i % 7) {
        case 1: c = -(a * b); if (!isfinite(c)) c = 1; break;           /* cancels all but the rest */
        case 2: a = numbers_short_float(), b = numbers_short_float(), c = numbers_short_float(); break;
        case 3: a = ldexpf(numbers_short_float(), -70), b = ldexpf(numbers_short_float(), -70),
                c = ldexpf(numbers_short_float(), -136); break;         /* subnormal results */
        case 4: a = ldexpf(numbers_short_float(), 62), b = ldexpf(numbers_short_float(), 62),
                c = ldexpf(numbers_short_float(), 115); break;          /* about the largest */
        case 6: a = ldexpf(0x800000 + (float)(random64() % 64), (int)(random64() % 40) - 50);
                b = ldexpf(0x800000 - (float)(random64() % 64), -23);   /* about half of c's last place */
                c = copysignf(ldexpf(a, 24) + ldexpf((float)(int)(random64() % 99), ilogbf(a) + 1),
                              random64() % 2 ? 1.0f : -1.0f); break;
        case 5: c = ldexpf(a * b, 24 - (int)(random64() % 50)); if (!isfinite(c)) c = -1; break;
        }
        float expected = fmaf(a, b, c), got = fma32(a, b, c);
        wrong += bits_of(expected) != bits_of(got);
        tiny += expected != 0 && fabsf(expected) < FLT_MIN;
        huge += isinf(expected);
        zero += expected == 0;
    }
    check(wrong == 0, "fma32 is not fmaf in %zu of 3,000,000 cases", wrong);
    check(tiny > 100000 && huge > 50000 && zero > 1000,
          "the cases are not what they should be: %zu subnormal, %zu infinite, %zu zero", tiny, huge, zero);
#ifdef __FP_FAST_FMAF
    skip("the emulation of fmaf: this build has the instruction");
#endif
}

/* --- Functions --- */

/* How many floats lie between a value and the true one. */
static double numbers_ulps(float value, double truth)
{
    int exponent;
    frexp(truth, &exponent);
    double unit = ldexp(1, (exponent < -125 ? -125 : exponent) - 24);
    return fabs((double)value - truth) / unit;
}

static void numbers_functions(void)
{
    double worst_exp = 0, worst_quick = 0, worst_gelu = 0, worst_tail = 0, worst_log = 0;
    for (double x = -103.9; x < 88.7; x += 0.00037) {
        float f = (float)x;
        worst_exp = fmax(worst_exp, numbers_ulps(exp32(f), exp((double)f)));
    }
    for (double x = -60; x < 60; x += 0.000511) {
        float f = (float)x;
        double d = (double)f, quick = d / (1 + exp(-1.702 * d)), exact = d * 0.5 * erfc(-d / sqrt(2.0));
        if (d > -50) worst_quick = fmax(worst_quick, fabs((double)quick_gelu(f) - quick) / fabs(quick));
        if (d > -1) worst_gelu = fmax(worst_gelu, numbers_ulps(gelu(f), exact));
        else if (d > -12) worst_tail = fmax(worst_tail, fabs((double)gelu(f) - exact) / fabs(exact));
    }
    for (int i = 0; i < 500000; i++) {
        double x = ldexp(1 + (double)(random64() >> 12) * 0x1p-52, (int)(random64() % 2000) - 1000);
        if (i % 2) x = 1 + (double)(int64_t)random64() * 0x1p-70 * (double)(i % 1000);   /* near 1 */
        double truth = log(x);
        worst_log = fmax(worst_log, truth == 0 ? fabs(log64(x)) : fabs(log64(x) - truth) / fabs(truth));
    }
    check(worst_exp <= 1.01, "exp32 is off by %.3g units in the last place", worst_exp);
    check(worst_quick <= 1e-5, "quick_gelu is off by %.3g of its value", worst_quick);
    check(worst_gelu <= 6, "gelu is off by %.3g units in the last place above -1", worst_gelu);
    check(worst_tail <= 1e-5, "gelu is off by %.3g of its value in the left tail", worst_tail);
    check(worst_log <= 1e-15, "log64 is off by %.3g of its value", worst_log);
    check(exp32(0) == 1 && exp32(-200) == 0 && isinf(exp32(100)) && exp32(-INFINITY) == 0
          && isinf(exp32(INFINITY)) && exp32(NAN) != exp32(NAN), "exp32 is wrong at its ends");
    check(gelu(0) == 0 && quick_gelu(0) == 0 && gelu(50) == 50 && quick_gelu(100) == 100
          && log64(1) == 0 && fabs(log64(0x1p-1060) + 1060 * 0.693147180559945309) < 1e-12,
          "a function is wrong where its value is known");
    for (size_t i = 0; i < COUNT(kernel_sets); i++)
        if (is_usable(kernel_sets[i]))
            check(!kernel_sets[i]->contracts() && FLT_EVAL_METHOD == 0,
                  "%s contracts or widens arithmetic", kernel_sets[i]->name);
}

/* The functions' bits are part of every result: pinned, for other machines and compilers. */
static void numbers_pinned(void)
{
    uint64_t digests[4] = { 0 };
    static const uint64_t pinned[4] = {
        0xf95e43a64916dbe7, 0x25565fa67ae6fc11, 0x70e3cd269a323619, 0x98abdc6247561660 };
    static const char *const names[] = { "exp32", "quick_gelu", "gelu", "log64" };
    for (int f = 0; f < 4; f++) {
        for (int i = -40000; i < 40000; i++) {
            float x = (float)i * 0x1.91p-9f;
            double logarithm = f == 3 ? log64(ldexp(1 + (double)(i + 40000) * 0x1.3p-17, i / 64)) : 0;
            uint64_t bits;
            memcpy(&bits, &logarithm, sizeof bits);
            digest64_number(&digests[f], f == 0 ? bits_of(exp32(x)) : f == 1 ? bits_of(quick_gelu(x))
                                     : f == 2 ? bits_of(gelu(x)) : bits);
        }
        check(digests[f] == pinned[f], "the bits of %s have the digest 0x%016llx, elsewhere 0x%016llx", names[f],
              (unsigned long long)digests[f], (unsigned long long)pinned[f]);
    }
}

/* --- Random numbers --- */

static void numbers_random(void)
{
    /* Known answers of the authors' Random123, kat_vectors: philox4x32 10 */
    static const struct { uint64_t position, stream, key; uint32_t out[4]; } known[] = {
        { 0, 0, 0, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
        { UINT64_MAX, UINT64_MAX, UINT64_MAX, { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
        { 0x85a308d3243f6a88, 0x0370734413198a2e, 0x299f31d0a4093822,
          { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } },
    };
    enum { N = 1000 };
    uint64_t order[N], other[N];
    uint32_t out[4];
    size_t same = 0, fixed = 0, repeated = 0;
    char seen[N] = { 0 };
    for (size_t i = 0; i < 3; i++) {
        philox(known[i].key, known[i].stream, known[i].position, out);
        check(memcmp(out, known[i].out, sizeof out) == 0, "philox misses known answer %zu", i);
    }
    double sum = 0, least = 1, most = -1;
    for (uint64_t i = 0; i < 100000; i++) {
        float u = uniform(42, STREAM_W_ENC, i);
        sum += (double)u;
        least = fmin(least, (double)u);
        most = fmax(most, (double)u);
    }
    check(least >= -1 && least < -0.9999 && most < 1 && most > 0.9999 && fabs(sum) < 600,
          "uniform does not fill [-1, 1) evenly: %g to %g, sum %g", least, most, sum);
    philox(7, STREAM_W_DEC, 2, out);
    check(uniform(7, STREAM_W_DEC, 9) == (float)(out[1] >> 8) * 0x1p-23f - 1, "uniform is not word index mod 4");
    permutation(42, 0, order, N);
    permutation(42, 1, other, N);
    for (size_t i = 0; i < N; i++) {
        repeated += order[i] >= N || seen[order[i]];
        if (order[i] < N) seen[order[i]] = 1;
        same += order[i] == other[i];
        fixed += order[i] == i;
    }
    check(repeated == 0, "a permutation repeats %zu numbers or leaves its range", repeated);
    check(same < 10 && fixed < 10, "epochs' permutations agree in %zu places, %zu stay", same, fixed);
    uint64_t digest = 0;
    for (size_t i = 0; i < N; i++) digest64_number(&digest, order[i]), digest64_number(&digest, other[i]);
    check(digest == 0xe79340da1107941f, "permutations have the digest 0x%016llx",
          (unsigned long long)digest);
    permutation(43, 0, other, N);
    check(memcmp(order, other, sizeof order) != 0, "the seed does not change the permutation");
    permutation(42, 0, order, 1);
    check(order[0] == 0, "the permutation of one is wrong");
}

/* --- Exact sums --- */

static void numbers_exact(void)
{
    enum { N = 5000, PARTS = 7 };
    static float term[N];
    exact_sum forward = { 0, 0 }, backward = { 0, 0 }, part[PARTS] = { { 0, 0 } }, joined = { 0, 0 };
    long double truth = 0;
    for (size_t i = 0; i < N; i++) {
        term[i] = ldexpf((float)(1 + random64() % 0xffffff), (int)(random64() % 60) - 40 - (int)(i % 20));
        truth += (long double)term[i];
    }
    for (size_t i = 0; i < N; i++) {
        exact_add_float(&forward, term[i]);
        exact_add_float(&backward, term[N - 1 - i]);
        exact_add_float(&part[random64() % PARTS], term[i]);
    }
    for (size_t p = PARTS; p > 0; p--) exact_add(&joined, part[p - 1]);
    check(forward.high == backward.high && forward.low == backward.low, "exact sums depend on the order");
    check(forward.high == joined.high && forward.low == joined.low, "exact sums depend on the parts");
    check(fabs((double)((long double)exact_value(forward) - truth)) <= 1e-15 * (double)truth,
          "an exact sum is %.17g, expected %.17Lg", exact_value(forward), truth);
    static const struct { float value; uint64_t high, low; } one[] = {
        { 0, 0, 0 }, { 1, 1, 0 }, { 0.5f, 0, (uint64_t)1 << 63 }, { 0x1p-64f, 0, 1 }, { 0x1p-65f, 0, 0 },
        { 0x1.8p-64f, 0, 1 }, { 0x1p62f, (uint64_t)1 << 62, 0 }, { 3.75f, 3, (uint64_t)3 << 62 },
        { 0x1.fffffep-1f, 0, 0xffffff0000000000u }, { 0x1p-149f, 0, 0 }, { 0x1.fffffep61f, 0x3fffffc000000000u, 0 },
    };
    for (size_t i = 0; i < sizeof one / sizeof *one; i++) {
        exact_sum sum = { 0, 0 };
        exact_add_float(&sum, one[i].value);
        check(sum.high == one[i].high && sum.low == one[i].low, "the exact sum of %a alone is wrong",
              (double)one[i].value);
    }
    exact_sum carry = { 0, UINT64_MAX };
    exact_add_float(&carry, 0x1p-64f);
    check(carry.high == 1 && carry.low == 0, "an exact sum loses the carry");
}

/* --- Kernels --- */

enum { NUMBERS_LONGEST = 1024 };

/* Rows that hold what kernels must not stumble over. */
static void numbers_fill(float *row, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        row[i] = random_float() * ldexpf(1, (int)(random64() % 8) - 4);
        if (random64() % 32 == 0) row[i] = i % 2 ? 0.0f : -0.0f;
        if (random64() % 64 == 0) row[i] = ldexpf(row[i], -130);
    }
}

/* 16 interleaved partial sums, joined by halves: section 2 of the definitions, once more. */
static float numbers_row_sum(const float *row, size_t n)
{
    float p[16] = { 0 };
    for (size_t e = 0; e < n; e++) p[e % 16] += row[e];
    for (int h = 8; h > 0; h /= 2)
        for (int i = 0; i < h; i++) p[i] += p[i + h];
    return p[0];
}

/* The definition's chains and partial sums, with their lengths spelled out: what the plain loops are held to. */
static void numbers_definition(void)
{
    enum { K = 700, N = 3 };
    float a[K], b[K * N], bias[N], residual[N], c[N], p[16] = { 0 };
    numbers_fill(a, K);
    numbers_fill(b, K * N);
    numbers_fill(bias, N);
    numbers_fill(residual, N);
    sc_matmul_plain(1, N, K, a, b, bias, residual, c);
    for (size_t j = 0; j < N; j++) {
        float chain[3] = { 0, 0, 0 };
        for (size_t k = 0; k < K; k++) chain[k / 256] = fmaf(a[k], b[k * N + j], chain[k / 256]);
        float sum = ((chain[0] + chain[1] + chain[2]) + bias[j]) + residual[j];
        check(bits_of(c[j]) == bits_of(sum), "column %zu of the plain product is not the definition's", j);
    }
    for (size_t e = 0; e < K; e++) p[e % 16] = fmaf(a[e], b[e], p[e % 16]);
    for (int h = 8; h > 0; h /= 2)
        for (int i = 0; i < h; i++) p[i] += p[i + h];
    check(bits_of(sc_dot_plain(a, b, K)) == bits_of(p[0]), "the plain dot product is not the definition's");
    size_t wrong = 0;
    for (int round = 0; round < 50; round++) {
        double terms[K], block[3] = { 0, 0, 0 };
        for (size_t e = 0; e < K; e++) {
            terms[e] = (double)random_float() * ldexp(1, (int)(random64() % 20)) / 3;
            block[e / 256] += terms[e];
        }
        wrong += sum_in_blocks(terms, K) != block[0] + block[1] + block[2];
    }
    check(wrong == 0, "%zu of 50 float64 sums are not those of blocks of 256", wrong);
    a[0] = -0x1p-100f, b[0] = 0x1p-100f;
    sc_matmul_plain(1, 1, 1, a, b, NULL, NULL, c);
    check(bits_of(c[0]) == 0, "a product is -0 where +0 was to be added last");
}

static int numbers_same(const float *a, const float *b, size_t n) { return memcmp(a, b, n * sizeof *a) == 0; }

static void numbers_products(const char *isa)
{
    static const size_t Ms[] = { 1, 7, 197, 513 }, Ks[] = { 1, 64, 255, 256, 257, 513 }, Ns[] = { 1, 31, 77 };
    float *a = new_array(513 * 520, 4), *b = new_array(513 * 77, 4), *bias = new_array(77, 4);
    float *residual = new_array(513 * 80, 4), *dense = new_array(513 * 77, 4), *plain = new_array(513 * 77, 4);
    float *c = new_array(513 * 80, 4), *tight = new_array(513 * 513, 4), *bare = new_array(513 * 77, 4);
    size_t wrong = 0, strayed = 0, cases = 0;
    for (size_t shape = 0; shape < 4 * 6 * 3; shape++) {
        size_t M = Ms[shape % 4], K = Ks[shape / 4 % 6], N = Ns[shape / 24], a_stride = K + shape % 3;
        packed_matrix packed;
        if (M * N > 10000 && K != 257 && shape % 5) continue;          /* not every large one: time */
        numbers_fill(a, M * a_stride);
        numbers_fill(b, K * N);
        numbers_fill(bias, N);
        numbers_fill(residual, M * 80);
        for (size_t i = 0; i < M; i++) {
            memcpy(tight + i * K, a + i * a_stride, K * sizeof *a);
            memcpy(dense + i * N, residual + i * 80, N * sizeof *a);
        }
        sc_matmul_plain(M, N, K, tight, b, NULL, NULL, bare);
        for (int kind = 0; kind < 5; kind++) {       /* bare, bias, both, and with either activation */
            tile_target to = { .c = c, .c_stride = 80, .bias = kind > 0 ? bias : NULL,
                               .residual = kind > 1 ? residual : NULL,
                               .activation = kind == 3 ? QUICK_GELU : kind == 4 ? ERF_GELU : NO_ACTIVATION };
            for (size_t i = 0; i < M * N; i++) {     /* + 0 once more changes nothing */
                float sum = bare[i];
                if (kind > 0) sum += bias[i % N];
                if (kind > 1) sum += dense[i];
                sum += 0.0f;
                plain[i] = kind == 3 ? quick_gelu(sum) : kind == 4 ? gelu(sum) : sum;
            }
            for (size_t i = 0; i < M * 80; i++) c[i] = 12345;
            if (new_packed(&packed, K, N) != SC_OK) need("memory");
            pack_panels(&packed, 0, packed.panels, b, N, 1);
            if (multiply(a, M, a_stride, &packed, to) != SC_OK) need("memory");
            free(packed.data);
            for (size_t i = 0; i < M; i++) {
                wrong += !numbers_same(c + i * 80, plain + i * N, N);
                for (size_t j = N; j < 80; j++) strayed += c[i * 80 + j] != 12345;
            }
            cases++;
        }
        if (shape % 8 == 0) {                        /* a transposed b packs to the same panels */
            packed_matrix other;
            if (new_packed(&packed, K, N) != SC_OK || new_packed(&other, K, N) != SC_OK) need("memory");
            for (size_t k = 0; k < K; k++)
                for (size_t j = 0; j < N; j++) plain[j * K + k] = b[k * N + j];
            pack_panels(&packed, 0, packed.panels, b, N, 1);
            pack_panels(&other, 0, other.panels, plain, 1, K);
            check(numbers_same(packed.data, other.data, packed.panels * K * (size_t)kernels->columns),
                  "%s: a transposed matrix packs differently", isa);
            free(packed.data);
            free(other.data);
        }
    }
    check(wrong == 0, "%s: %zu rows of products in %zu shapes are not the plain loops'", isa, wrong, cases);
    check(strayed == 0, "%s: %zu numbers beside a product were written", isa, strayed);
    free(a); free(b); free(bias); free(residual); free(dense); free(plain); free(c); free(tight); free(bare);
}

static void numbers_rows(const char *isa)
{
    static const size_t lengths[] = { 1, 2, 15, 16, 17, 20, 63, 64, 100, 197, 255, 513, 768 };
    float x[NUMBERS_LONGEST], w[NUMBERS_LONGEST], b[NUMBERS_LONGEST], y[NUMBERS_LONGEST], z[NUMBERS_LONGEST];
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
        size_t n = lengths[l], whole = padded(n);
        memset(x, 0, sizeof x);
        memset(w, 0, sizeof w);
        numbers_fill(x, n);
        numbers_fill(w, n);
        numbers_fill(b, n);
        float dot = kernels->dot(x, w, whole), plain = sc_dot_plain(x, w, whole);
        check(bits_of(dot) == bits_of(plain), "%s: the dot product of %zu is not the plain one", isa, n);

        memcpy(y, w, sizeof y);
        memcpy(z, w, sizeof z);
        kernels->add_scaled(b[0], x, y, whole);
        for (size_t e = 0; e < whole; e++) z[e] = fma32(b[0], x[e], z[e]);
        check(numbers_same(y, z, whole), "%s: add_scaled of %zu is not the plain one", isa, n);

        float mean = numbers_row_sum(x, n) / (float)n;
        memset(z, 0, sizeof z);
        for (size_t e = 0; e < n; e++) z[e] = x[e] - mean;
        float scale = 1.0f / sqrtf(sc_dot_plain(z, z, whole) / (float)n + 1e-5f);
        for (size_t e = 0; e < n; e++) z[e] = z[e] * scale * w[e] + b[e];
        norm_row(y, x, &(sc_layer){ .weight = w, .bias = b }, 1e-5f, n);
        check(numbers_same(y, z, whole), "%s: layer_norm of %zu is not the plain one", isa, n);

        memcpy(y, x, sizeof y);
        memcpy(z, x, sizeof z);
        float largest = z[0], factor = 0.125f;
        for (size_t e = 1; e < n; e++) largest = z[e] > largest ? z[e] : largest;
        for (size_t e = 0; e < n; e++) z[e] = exp32(factor * (z[e] - largest));
        float sum = numbers_row_sum(z, n);
        for (size_t e = 0; e < n; e++) z[e] /= sum;
        kernels->softmax(y, n, factor);
        check(numbers_same(y, z, n), "%s: softmax of %zu is not the plain one", isa, n);

    }
}

/* Chains over listed rows, at sizes that are no multiple of the kernels' blocks. */
static void numbers_chains(const char *isa)
{
    enum { ROWS = 40, N = 784 };
    float *b = new_array(ROWS, N * 4), sum[N], plain[N], factor[9], dot[9];
    uint32_t index[9];
    size_t chains = 0, dots = 0;
    if (!b) need("memory");
    numbers_fill(b, ROWS * N);
    for (size_t n = 16; n <= N; n += 48)
        for (size_t count = 0; count <= 9; count++) {
            for (size_t i = 0; i < count; i++) {
                index[i] = (uint32_t)(random64() % ROWS);
                factor[i] = numbers_any_float();
            }
            numbers_fill(sum, n);
            kernels->dots(sum, b, n, index, count, dot);
            for (size_t i = 0; i < count; i++)
                dots += bits_of(dot[i]) != bits_of(sc_dot_plain(sum, b + index[i] * n, n));
            for (size_t e = 0; e < n; e++) {
                float chain = 0;
                for (size_t i = 0; i < count; i++) chain = fma32(factor[i], b[index[i] * n + e], chain);
                plain[e] = sum[e] + chain;
            }
            kernels->add_chain(factor, index, count, b, sum, n);
            chains += !numbers_same(sum, plain, n);
        }
    check(chains == 0, "%s: %zu chains over rows are not the plain ones", isa, chains);
    check(dots == 0, "%s: %zu dot products with rows are not the plain ones", isa, dots);
    free(b);
}

/* Rows with a bias each and many terms; more rows and columns than are computed at once. */
static void numbers_long(const char *isa)
{
    enum { K = 1100, N = 1600, ROWS = 130 };
    float *a = new_array(ROWS, K * 4), *b = new_array(K, N * 4), *c = new_array(ROWS, N * 4), bias[ROWS];
    packed_matrix packed;
    if (!a || !b || !c || new_packed(&packed, K, N) != SC_OK) need("memory");
    numbers_fill(a, ROWS * K);
    numbers_fill(b, K * N);
    numbers_fill(bias, ROWS);
    pack_panels(&packed, 0, packed.panels, b, N, 1);
    size_t wrong = 0;
    tile_target to = { .c = c, .c_stride = N, .row_bias = bias };
    product_rows(a, K, ROWS, &packed, 0, packed.panels, &to);
    for (size_t i = 0; i < ROWS * N; i++)
        wrong += bits_of(c[i]) != bits_of(chained_sum(a + i / N * K, 1, b + i % N, N, K) + bias[i / N] + 0.0f);
    check(wrong == 0, "%s: %zu elements of a long product are wrong", isa, wrong);
    free(a); free(b); free(c); free(packed.data);
}

static void numbers_adam(const char *isa)
{
    float w[2][37], m[2][37], v[2][37], g[37];
    adam_step step = { 0.01f, 3.3f };
    for (int i = 0; i < 2; i++) memset(m[i], 0, sizeof m[i]), memset(v[i], 0, sizeof v[i]);
    numbers_fill(w[0], 37);
    memcpy(w[1], w[0], sizeof w[1]);
    for (int t = 0; t < 20; t++) {
        numbers_fill(g, 37);
        kernels->adam(w[0], (adam_moments){ m[0], v[0] }, g, 37, step);
        for (size_t e = 0; e < 37; e++) {
            m[1][e] = 0.9f * m[1][e] + 0.1f * g[e];
            v[1][e] = 0.999f * v[1][e] + 0.001f * (g[e] * g[e]);
            w[1][e] -= step.step_size * (m[1][e] / (sqrtf(v[1][e]) * step.root_scale + 1e-8f));
        }
    }
    check(numbers_same(w[0], w[1], 37) && numbers_same(m[0], m[1], 37) && numbers_same(v[0], v[1], 37),
          "%s: Adam's steps are not the plain ones", isa);
}

static void numbers_sparse(const char *isa)
{
    float row[256], limit[256];
    uint32_t index[256];
    for (int round = 0; round < 60; round++) {
        size_t n = (size_t)(round % 4 + 1) * 64, next = 0, wrong = 0;
        numbers_fill(row, n);
        numbers_fill(limit, n);
        for (size_t e = 0; e < n; e++) {
            if (round < 20) row[e] = round < 10 ? -fabsf(row[e]) : fabsf(row[e]);   /* none, or nearly all */
            if (random64() % 8 == 0) limit[e] = row[e];                             /* equal is not above */
            if (random64() % 8 == 0) limit[e] = INFINITY;
        }
        size_t found = kernels->find_above(row, limit, n, index);
        for (size_t e = 0; e < n; e++)
            if (row[e] > limit[e]) wrong += next >= found || index[next] != e, next++;
        check(wrong == 0 && next == found, "%s: find_above of %zu: %zu wrong", isa, n, wrong);
    }
}

/* The instruction sets that any machine may have. */
static const char *const instruction_set_names[] = { "scalar", "neon", "avx2", "avx512" };

static void test_numbers(void)
{
    numbers_fma();
    numbers_functions();
    numbers_pinned();
    numbers_random();
    numbers_exact();
    numbers_definition();
    for (size_t i = 0; i < 4; i++) {
        const char *isa = instruction_set_names[i];
        if (sc_instruction_set(isa) != SC_OK) {
            skip("kernels for %s: this machine or build has not got it", isa);
            continue;
        }
        check(strcmp(kernels->name, isa) == 0, "%s was asked for, %s came", isa, kernels->name);
        numbers_products(isa);
        numbers_rows(isa);
        numbers_chains(isa);
        numbers_long(isa);
        numbers_adam(isa);
        numbers_sparse(isa);
    }
    check(sc_instruction_set("mmx") == SC_USAGE, "an unknown instruction set is taken");
    if (sc_instruction_set(given_isa()) != SC_OK) need("instruction set");
}
