/* synth: pictures with known answers. Draws pictures of 112 x 112 pixels with one to three objects
 * of known shape, colour and texture, and says where each of them is.
 *
 *     make tests/synth
 *     tests/synth draw -o out/world --count 2000          pictures, masks and factors as files
 *     tests/synth stream --objects 1 | ...                records without end, to train on
 *     tests/synth score --seed S --codes A --unseen B     which latent knows which shape or colour
 *
 * What `draw` writes below its folder:
 *     pictures/<class>/<number>.ppm    class: colour and shape of the main object, as "red star"
 *     pictures.txt                     a line a picture: path, tab, class index
 *     masks/<number>-<object>.pgm      255 where the object is, object 0 is the main one
 *     factors.csv                      a line an object: everything that was drawn by lot
 *
 * A picture depends on the seed and its number alone, and all arithmetic is that of integers, so
 * the bytes are the same on every machine. `score` draws them again instead of reading them: A is
 * what `saeclip encode --image-means` made of the pictures 0 to N - 1, and B of those from N on. */
#define _FILE_OFFSET_BITS 64
#include "../saeclip.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { SIDE = 112, PATCH = 8, GRID = SIDE / PATCH, MOST_OBJECTS = 3 };
enum { UNIT = 16 };                      /* positions and radii are in sixteenths of a pixel */

/* Values in byte order of their names, so that a class is the rank of its folder. */
enum { CROSS, DISC, RING, SQUARE, STAR, TRIANGLE, SHAPES };
enum { COLOURS = 8, CLASSES = COLOURS * SHAPES };
enum { CHECKED, DOTTED, PLAIN, STRIPED, TEXTURES };
enum { BLOTCHES, EVEN, GRADIENT, WAVES, BACKGROUNDS };

static const char *const shape_names[] = { "cross", "disc", "ring", "square", "star", "triangle" };
static const char *const texture_names[] = { "checked", "dotted", "plain", "striped" };
static const char *const background_names[] = { "blotches", "even", "gradient", "waves" };
static const struct { const char *name; int rgb[3]; } colours[COLOURS] = {
    { "blue", { 30, 60, 225 } }, { "cyan", { 40, 210, 225 } }, { "green", { 30, 160, 50 } },
    { "orange", { 245, 130, 15 } }, { "purple", { 145, 40, 190 } }, { "red", { 220, 30, 35 } },
    { "white", { 240, 240, 240 } }, { "yellow", { 240, 225, 45 } },
};

typedef struct {
    int shape, colour, texture;
    int x, y, radius;                    /* of the centre, and how far the shape reaches, about */
    int angle;                           /* 0 .. 63, of a turn of 64 */
    int shade[3];                        /* its colour in this picture */
} object;

typedef struct {
    int background, objects;
    object object[MOST_OBJECTS];         /* the main one first: the largest */
    unsigned char rgb[SIDE * SIDE * 3];
    unsigned char owner[SIDE * SIDE];    /* 1 + the object that has most of a pixel, 0: none */
} picture;

/* --- Random integers: SplitMix64 (Steele, Lea and Flood, 2014) --- */

static uint64_t draw(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Uniform in low .. high. */
static int between(uint64_t *state, int low, int high) {
    return low + (int)((draw(state) >> 32) * (uint64_t)(high - low + 1) >> 32);
}

/* --- Shapes --- */

/* sin(angle / 64 of a turn) * 2^14 */
static int sine(int angle) {
    static const int quarter[17] = { 0, 1606, 3196, 4756, 6270, 7723, 9102, 10394, 11585, 12665,
                                     13623, 14449, 15137, 15679, 16069, 16305, 16384 };
    int a = angle & 31, value = quarter[a <= 16 ? a : 32 - a];
    return angle & 32 ? -value : value;
}

/* Corners in 1/1024 of the radius; discs and rings have none. */
static const struct { int corners; int at[12][2]; } polygons[SHAPES] = {
    [CROSS] = { 12, { { -310, -1040 }, { 310, -1040 }, { 310, -310 }, { 1040, -310 },
                      { 1040, 310 }, { 310, 310 }, { 310, 1040 }, { -310, 1040 },
                      { -310, 310 }, { -1040, 310 }, { -1040, -310 }, { -310, -310 } } },
    [SQUARE] = { 4, { { -810, -810 }, { 810, -810 }, { 810, 810 }, { -810, 810 } } },
    [STAR] = { 10, { { 0, -1120 }, { 282, -388 }, { 1065, -346 }, { 457, 148 }, { 658, 906 },
                     { 0, 480 }, { -658, 906 }, { -457, 148 }, { -1065, -346 }, { -282, -388 } } },
    [TRIANGLE] = { 3, { { 0, -1120 }, { 970, 560 }, { -970, 560 } } },
};

/* u, v: in 1/1024 of the radius, seen from the object */
static int inside(int shape, int u, int v) {
    int corners = polygons[shape].corners, in = 0, square = u * u + v * v;
    if (shape == DISC) return square <= 980 * 980;
    if (shape == RING) return square <= 1024 * 1024 && square >= 560 * 560;
    for (int i = 0, j = corners - 1; i < corners; j = i++) {
        const int *a = polygons[shape].at[i], *b = polygons[shape].at[j];
        if ((a[1] > v) == (b[1] > v)) continue;
        int turn = (b[0] - a[0]) * (v - a[1]) - (u - a[0]) * (b[1] - a[1]);
        in ^= (turn > 0) == (b[1] > a[1]);
    }
    return in;
}

/* Whether a texture is dark at x, y, in sixteenths of a pixel along the object's axes. */
static int dark(int texture, int x, int y) {
    int half = 5 * UNIT, u = x + 64 * half, v = y + 64 * half;
    if (texture == STRIPED) return u / half % 2;
    if (texture == CHECKED) return (u / half + v / half) % 2;
    if (texture == PLAIN) return 0;
    int p = u % (2 * half) - half, q = v % (2 * half) - half;
    return p * p + q * q < 45 * 45;
}

static void draw_object(picture *p, int number) {
    const object *o = &p->object[number];
    int c = sine(o->angle + 16), s = sine(o->angle), reach = o->radius * 9 / 8;
    int left = (o->x - reach) / UNIT, right = (o->x + reach) / UNIT;
    int top = (o->y - reach) / UNIT, bottom = (o->y + reach) / UNIT;
    for (int y = top < 0 ? 0 : top; y <= bottom && y < SIDE; y++) {
        for (int x = left < 0 ? 0 : left; x <= right && x < SIDE; x++) {
            int dx = x * UNIT + UNIT / 2 - o->x, dy = y * UNIT + UNIT / 2 - o->y, covered = 0;
            for (int part = 0; part < 4; part++) {           /* four samples a pixel */
                int ex = dx + (part & 1 ? 4 : -4), ey = dy + (part & 2 ? 4 : -4);
                covered += inside(o->shape, (ex * c + ey * s) / (16 * o->radius),
                                  (ey * c - ex * s) / (16 * o->radius));
            }
            if (covered == 0) continue;
            int shadow = dark(o->texture, (dx * c + dy * s) / 16384, (dy * c - dx * s) / 16384);
            unsigned char *pixel = p->rgb + (y * SIDE + x) * 3;
            for (int i = 0; i < 3; i++) {
                int value = shadow ? o->shade[i] * 5 / 8 : o->shade[i];
                pixel[i] = (unsigned char)((value * covered + pixel[i] * (4 - covered) + 2) / 4);
            }
            if (covered >= 2) p->owner[y * SIDE + x] = (unsigned char)(number + 1);
        }
    }
}

/* --- Pictures --- */

static unsigned char to_byte(int value) {
    return (unsigned char)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* Dull colours, so that no background is taken for an object. */
static void draw_background(picture *p, uint64_t *lot) {
    int grey = between(lot, 45, 135), base[3], knot[10 * 10], tilt[2], phase = between(lot, 0, 63);
    for (int i = 0; i < 3; i++) base[i] = grey + between(lot, -16, 16);
    for (int i = 0; i < 100; i++) knot[i] = between(lot, -26, 26);
    for (int i = 0; i < 2; i++) tilt[i] = between(lot, -22, 22);
    p->background = between(lot, 0, BACKGROUNDS - 1);
    for (int y = 0; y < SIDE; y++) {
        for (int x = 0; x < SIDE; x++) {
            uint64_t noise = draw(lot);
            const int *k = knot + y / 14 * 10 + x / 14;
            int a = x % 14, b = y % 14, more = 0;
            if (p->background == BLOTCHES)
                more = ((k[0] * (14 - a) + k[1] * a) * (14 - b)
                        + (k[10] * (14 - a) + k[11] * a) * b) / 196;
            else if (p->background == GRADIENT)
                more = ((x - SIDE / 2) * tilt[0] + (y - SIDE / 2) * tilt[1]) / (SIDE / 2);
            else if (p->background == WAVES)
                more = sine(phase + (x * tilt[0] + y * tilt[1]) / 6) / 900;
            for (int i = 0; i < 3; i++) {
                int grain = (int)(noise >> 8 * i & 7) - (int)(noise >> (8 * i + 4) & 7);
                int value = base[i] + more + grain;
                p->rgb[(y * SIDE + x) * 3 + i] = to_byte(value);
            }
        }
    }
}

static object draw_lots(uint64_t *lot, int smallest, int largest) {
    object o;                            /* one by one: initialisers have no order of their own */
    o.shape = between(lot, 0, SHAPES - 1);
    o.colour = between(lot, 0, COLOURS - 1);
    o.texture = between(lot, 0, TEXTURES - 1);
    o.radius = between(lot, smallest * UNIT, largest * UNIT);
    o.angle = between(lot, 0, 63);
    int reach = o.radius * 9 / 8, light = between(lot, 218, 266);
    o.x = between(lot, reach, SIDE * UNIT - reach);
    o.y = between(lot, reach, SIDE * UNIT - reach);
    for (int i = 0; i < 3; i++) {
        o.shade[i] = to_byte(colours[o.colour].rgb[i] * light / 256 + between(lot, -10, 10));
    }
    return o;
}

/* Picture `number` of the world that a seed stands for; objects: how many, 0: one to three. Small
 * objects stay clear of the others; one that finds no room after 50 tries is left out. */
static void draw_picture(picture *p, uint64_t seed, uint64_t number, int objects) {
    uint64_t lot = seed;
    lot = draw(&lot) ^ number * 0xd1342543de82ef95u;
    int wanted = between(&lot, 1, MOST_OBJECTS);
    if (objects) wanted = objects;
    memset(p->owner, 0, sizeof p->owner);
    draw_background(p, &lot);
    p->object[0] = draw_lots(&lot, 22, wanted == 1 ? 34 : 28);
    p->objects = 1;
    for (int try = 0; try < 50 && p->objects < wanted; try++) {
        object o = draw_lots(&lot, 11, 15);
        int clear = 1;
        for (int i = 0; i < p->objects; i++) {
            int dx = o.x - p->object[i].x, dy = o.y - p->object[i].y;
            int apart = (o.radius + p->object[i].radius) * 9 / 8;
            clear &= dx * dx + dy * dy > apart * apart;
        }
        if (clear) p->object[p->objects++] = o;
    }
    for (int i = 0; i < p->objects; i++) draw_object(p, i);
}

static int picture_class(const picture *p) {
    return p->object[0].colour * SHAPES + p->object[0].shape;
}

/* --- Files --- */

typedef struct {
    const char *folder, *codes, *unseen;
    uint64_t seed, first, count;
    int objects;
} options;

/* The path of what lies in the folder -o names, in a buffer that the next call writes again. */
static const char *below(const options *o, const char *format, ...) {
    static char path[1000];
    va_list arguments;
    int used = snprintf(path, sizeof path, "%s/", o->folder);
    va_start(arguments, format);
    vsnprintf(path + used, sizeof path - (size_t)used, format, arguments);
    va_end(arguments);
    return path;
}

static int complain(const char *path, const char *what) {
    fprintf(stderr, "synth: %s: %s: %s\n", path, what, strerror(errno));
    return SC_FAILED;
}

static int make_folder(const char *path) {
    return mkdir(path, 0777) == 0 || errno == EEXIST ? SC_OK : complain(path, "cannot be made");
}

static FILE *create(const char *path) {
    FILE *file = fopen(path, "wb");
    if (!file) complain(path, "cannot be written");
    return file;
}

/* file may be NULL: create() has complained. */
static int finish(FILE *file, const options *o) {
    if (!file) return SC_FAILED;
    int bad = ferror(file);
    return fclose(file) == 0 && !bad ? SC_OK : complain(o->folder, "a file cannot be written");
}

/* One Netpbm file. kind: 6 for rgb [SIDE, SIDE, 3], 5 for grey [SIDE, SIDE] */
static int write_pnm(const options *o, const char *path, int kind, const unsigned char *pixels) {
    FILE *file = create(path);
    if (file) fprintf(file, "P%d\n%d %d\n255\n", kind, SIDE, SIDE);
    if (file) fwrite(pixels, kind == 6 ? 3 : 1, SIDE * SIDE, file);
    return finish(file, o);
}

/* --- Commands --- */

/* Also the name of its folder. */
static const char *class_name(int c) {
    static char name[40];
    snprintf(name, sizeof name, "%s %s", colours[c / SHAPES].name, shape_names[c % SHAPES]);
    return name;
}

static int write_picture(const options *o, const picture *p, uint64_t number, FILE *list,
                         FILE *factors) {
    unsigned char mask[SIDE * SIDE];
    const char *path = below(o, "pictures/%s/%06" PRIu64 ".ppm", class_name(picture_class(p)),
                             number);
    fprintf(list, "%s\t%d\n", path + strlen(o->folder) + 1, picture_class(p));
    int status = write_pnm(o, path, 6, p->rgb);
    for (int i = 0; i < p->objects && status == SC_OK; i++) {
        const object *x = &p->object[i];
        fprintf(factors, "%06" PRIu64 ",%d,%s,%s,%s,%s,%d,%d,%d,%d\n", number, i,
                shape_names[x->shape], colours[x->colour].name, texture_names[x->texture],
                background_names[p->background], x->x, x->y, x->radius, x->angle);
        for (int k = 0; k < SIDE * SIDE; k++) mask[k] = p->owner[k] == i + 1 ? 255 : 0;
        status = write_pnm(o, below(o, "masks/%06" PRIu64 "-%d.pgm", number, i), 5, mask);
    }
    return status;
}

static int command_draw(const options *o) {
    static picture p;
    int status = make_folder(o->folder);
    if (status == SC_OK) status = make_folder(below(o, "pictures"));
    if (status == SC_OK) status = make_folder(below(o, "masks"));
    for (int c = 0; c < CLASSES && status == SC_OK; c++)     /* all, so that ranks are classes */
        status = make_folder(below(o, "pictures/%s", class_name(c)));
    if (status != SC_OK) return status;
    FILE *list = create(below(o, "pictures.txt")), *factors = create(below(o, "factors.csv"));
    static const char columns[] = "shape,colour,texture,background,x,y,radius,angle";
    if (factors) fprintf(factors, "picture,object,%s\n", columns);
    for (uint64_t i = 0; list && factors && status == SC_OK && i < o->count; i++) {
        draw_picture(&p, o->seed, o->first + i, o->objects);
        status = write_picture(o, &p, o->first + i, list, factors);
    }
    if (finish(list, o) != SC_OK) status = SC_FAILED;
    return finish(factors, o) == SC_OK ? status : SC_FAILED;
}

/* Records to standard output until it is closed, bytes: class, background, objects; for each of
 * three objects shape, colour, texture, x, y, radius in pixels (0 where there is none); for each of
 * three how many pixels of every patch it has [3, 14, 14]; the pixels [112, 112, 3]. */
static int command_stream(const options *o) {
    static picture p;
    for (uint64_t i = o->first; o->count == 0 || i < o->first + o->count; i++) {
        unsigned char head[3 + 6 * MOST_OBJECTS] = { 0 };
        unsigned char cover[MOST_OBJECTS][GRID * GRID] = { { 0 } };
        draw_picture(&p, o->seed, i, o->objects);
        head[0] = (unsigned char)picture_class(&p);
        head[1] = (unsigned char)p.background;
        head[2] = (unsigned char)p.objects;
        for (int k = 0; k < p.objects; k++) {
            const object *x = &p.object[k];
            const int facts[] = { x->shape, x->colour, x->texture, x->x / UNIT, x->y / UNIT,
                                  x->radius / UNIT };
            for (int f = 0; f < 6; f++) head[3 + 6 * k + f] = (unsigned char)facts[f];
        }
        for (int k = 0; k < SIDE * SIDE; k++)
            if (p.owner[k]) cover[p.owner[k] - 1][k / SIDE / PATCH * GRID + k % SIDE / PATCH]++;
        fwrite(head, 1, sizeof head, stdout);
        fwrite(cover, 1, sizeof cover, stdout);
        if (fwrite(p.rgb, 1, sizeof p.rgb, stdout) != sizeof p.rgb) break;
    }
    return fflush(stdout) == 0 && !ferror(stdout) ? SC_OK : complain("stream", "cut off");
}

/* Prints one number for the bytes of all files, in this order, and their sizes: FNV-1a (Fowler, Noll
 * and Vo), 64 bits. paths: up to a NULL */
static int command_digest(char **paths) {
    uint64_t state = 0xcbf29ce484222325u, total = 0;
    for (; *paths; paths++) {
        FILE *file = fopen(*paths, "rb");
        uint64_t bytes = 0;
        if (!file) return complain(*paths, "cannot be read");
        for (int c; (c = getc(file)) != EOF; bytes++) state = (state ^ (unsigned)c) * 0x100000001b3u;
        int bad = ferror(file);
        fclose(file);
        if (bad) return complain(*paths, "cannot be read");
        for (int i = 0; i < 8; i++) state = (state ^ (bytes >> 8 * i & 255)) * 0x100000001b3u;
        total += bytes;
    }
    printf("fingerprint %016" PRIx64 " (%" PRIu64 " bytes)\n", state, total);
    return fflush(stdout) == 0 ? SC_OK : complain("digest", "cut off");
}

/* --- Scores: the latent that knows a value best, found on one set, tried on another --- */

enum { VALUES = SHAPES + COLOURS + TEXTURES, PATCHES = GRID * GRID, TOKENS = PATCHES + 1 };

typedef struct { float value; uint32_t place; } activation;  /* place: picture * PATCHES + patch */

/* A set of pictures in the order of their files, and what an SAE made of them. */
typedef struct {
    size_t pictures, latents;
    unsigned char (*cover)[VALUES][PATCHES];     /* [pictures], pixels with a value in each patch */
    unsigned char (*has)[VALUES];                /* [pictures], whether an object has it */
    size_t *start;                               /* [latents + 1], of each latent's activations */
    activation *code;                            /* [start[latents]], of patches */
    activation *most;                            /* [pictures], a latent's strongest patches */
} world;

static int wrong_codes(const char *path) {
    fprintf(stderr, "synth: %s: not what `saeclip encode --image-means` writes of this world\n", path);
    return SC_FAILED;
}

/* Draws pictures first, first + 1, ... again. Files are in the order of their classes. */
static int know_pictures(world *w, uint64_t seed, uint64_t first) {
    static picture p;
    size_t at[CLASSES + 1] = { 0 };
    w->cover = calloc(w->pictures, sizeof *w->cover);
    w->has = calloc(w->pictures, sizeof *w->has);
    w->most = calloc(w->pictures, sizeof *w->most);
    if (!w->cover || !w->has || !w->most) return complain("score", "no memory");
    for (int round = 0; round < 2; round++) {                /* count classes, then sort by them */
        for (size_t i = 0; i < w->pictures; i++) {
            draw_picture(&p, seed, first + i, 0);
            if (round == 0) at[picture_class(&p) + 1]++;
            if (round == 0) continue;
            size_t place = at[picture_class(&p)]++;
            for (int k = 0; k < SIDE * SIDE; k++) {
                if (!p.owner[k]) continue;
                const object *o = &p.object[p.owner[k] - 1];
                const int value[] = { o->shape, SHAPES + o->colour, SHAPES + COLOURS + o->texture };
                for (int v = 0; v < 3; v++) {
                    w->cover[place][value[v]][k / SIDE / PATCH * GRID + k % SIDE / PATCH]++;
                    w->has[place][value[v]] = 1;
                }
            }
        }
        for (int c = 0; c < CLASSES && round == 0; c++) at[c + 1] += at[c];
    }
    return SC_OK;
}

/* Visits all codes: counts each latent's or, once there is room, puts them where they belong. */
static int visit_codes(world *w, const sc_safetensors *file) {
    enum { BLOCK = 4096 };
    static int64_t row[BLOCK], index[BLOCK];
    static float value[BLOCK];
    const sc_tensor *rows = sc_tensor_find(file, "row"), *values = sc_tensor_find(file, "value");
    const sc_tensor *indices = sc_tensor_find(file, "index");
    if (!rows || !indices || !values || rows->count != values->count
        || indices->count != values->count) return wrong_codes(file->path);
    for (size_t first = 0; first < values->count; first += BLOCK) {
        size_t count = values->count - first < BLOCK ? values->count - first : BLOCK;
        if (sc_tensor_integers(file, rows, first, count, row) != SC_OK
            || sc_tensor_integers(file, indices, first, count, index) != SC_OK
            || sc_tensor_floats(file, values, first, count, value) != SC_OK)
            return wrong_codes(file->path);
        for (size_t i = 0; i < count; i++) {
            if (row[i] < 0 || (uint64_t)row[i] >= w->pictures * TOKENS || index[i] < 0
                || (uint64_t)index[i] >= w->latents) return wrong_codes(file->path);
            if (row[i] % TOKENS == 0) continue;              /* the class token is nowhere */
            size_t at = w->start[index[i] + 1]++, image = (size_t)row[i] / TOKENS;
            uint32_t place = (uint32_t)(image * PATCHES + (size_t)row[i] % TOKENS - 1);
            if (w->code) w->code[at] = (activation){ value[i], place };
        }
    }
    return SC_OK;
}

/* Sorts the codes by latent, by counting. start[j + 1] is where latent j's next code goes. */
static int read_codes(world *w, const sc_safetensors *file) {
    const sc_tensor *means = sc_tensor_find(file, "image_means");
    if (!means || means->rank != 2 || means->shape[0] > UINT32_MAX / PATCHES)
        return wrong_codes(file->path);
    w->pictures = means->shape[0];
    w->latents = means->shape[1];
    w->start = calloc(w->latents + 2, sizeof *w->start);
    if (!w->start) return complain("score", "no memory");
    if (visit_codes(w, file) != SC_OK) return SC_FAILED;
    size_t sum = 0;
    for (size_t j = 0; j <= w->latents; j++) {
        size_t count = w->start[j + 1];
        w->start[j + 1] = sum;
        sum += count;
    }
    w->code = calloc(sum + 1, sizeof *w->code);
    return w->code ? visit_codes(w, file) : complain("score", "no memory");
}

static int open_world(world *w, const char *codes, uint64_t seed, uint64_t first) {
    sc_safetensors file;
    if (sc_safetensors_open(&file, codes) != SC_OK) {
        fprintf(stderr, "synth: %s\n", sc_error());
        return SC_FAILED;
    }
    int status = read_codes(w, &file);
    sc_safetensors_close(&file);
    return status == SC_OK ? know_pictures(w, seed, first) : status;
}

static void close_world(world *w) {
    free(w->cover);
    free(w->has);
    free(w->start);
    free(w->code);
    free(w->most);
}

static int by_value(const void *a, const void *b) {
    float x = ((const activation *)a)->value, y = ((const activation *)b)->value;
    return (x > y) - (x < y);
}

/* Areas under the ROC curve of a latent's strongest patch as a sign that a picture holds a value:
 * the share of pairs, a picture that does and one that does not, in which the first has more; equal
 * ones count half. (The mean over patches finds less where pictures hold more than one object.)
 * area: [VALUES] */
static void find_areas(world *w, size_t j, double *area) {
    uint64_t twice[VALUES] = { 0 }, with[VALUES] = { 0 };    /* the pairs; pictures that hold it */
    memset(w->most, 0, w->pictures * sizeof *w->most);
    for (size_t i = 0; i < w->pictures; i++) w->most[i].place = (uint32_t)i;
    for (size_t c = w->start[j]; c < w->start[j + 1]; c++) {
        activation *most = &w->most[w->code[c].place / PATCHES];
        if (w->code[c].value > most->value) most->value = w->code[c].value;
    }
    qsort(w->most, w->pictures, sizeof *w->most, by_value);
    for (size_t first = 0, end; first < w->pictures; first = end) {      /* equal ones at once */
        uint64_t here[VALUES] = { 0 };
        for (end = first; end < w->pictures && w->most[end].value == w->most[first].value; end++)
            for (int v = 0; v < VALUES; v++) here[v] += w->has[w->most[end].place][v];
        for (int v = 0; v < VALUES; v++) {
            uint64_t below = first - with[v], equal = end - first - here[v];     /* without it */
            twice[v] += here[v] * (2 * below + equal);
            with[v] += here[v];
        }
    }
    for (int v = 0; v < VALUES; v++) {
        uint64_t pairs = with[v] * (w->pictures - with[v]);
        area[v] = pairs ? (double)twice[v] / (double)(2 * pairs) : 0.5;
    }
}

/* Overlap of where a latent's activation reaches a threshold, patches as squares of pixels, with
 * the objects of a value, over all pictures as one: what both have by what one of them has. With
 * choose the threshold becomes the one where that is most. */
static double overlap(world *w, size_t j, int v, float *threshold, int choose) {
    uint64_t total = 0, lit = 0, both = 0, best[2] = { 0, 1 };
    activation *code = w->code + w->start[j];
    size_t count = w->start[j + 1] - w->start[j];
    for (size_t i = 0; i < w->pictures; i++)
        for (int patch = 0; patch < PATCHES; patch++) total += w->cover[i][v][patch];
    qsort(code, count, sizeof *code, by_value);
    for (size_t c = count; c-- > 0;) {
        if (!choose && code[c].value < *threshold) break;
        lit += PATCH * PATCH;
        both += w->cover[code[c].place / PATCHES][v][code[c].place % PATCHES];
        if (choose && c > 0 && code[c - 1].value == code[c].value) continue;
        uint64_t either = total + lit - both;
        if (choose && both * best[1] <= best[0] * either) continue;
        best[0] = both;
        best[1] = either;
        if (choose) *threshold = code[c].value;
    }
    return (double)best[0] / (double)best[1];
}

static const char *value_name(int v) {
    if (v < SHAPES) return shape_names[v];
    return v < SHAPES + COLOURS ? colours[v - SHAPES].name : texture_names[v - SHAPES - COLOURS];
}

/* latent: [VALUES], the best ones */
static void print_scores(world *w, const size_t *latent, const double *area) {
    int areas = 0, overlaps = 0;
    printf("                    latent    area   unseen   overlap\n");
    for (int v = 0; v < VALUES; v++) {
        const char *kind = v == 0 ? "shape" : v == SHAPES ? "colour"
            : v == SHAPES + COLOURS ? "texture" : "";
        double unseen[VALUES];
        float threshold = 0;
        overlap(&w[0], latent[v], v, &threshold, 1);
        double shared = overlap(&w[1], latent[v], v, &threshold, 0);
        find_areas(&w[1], latent[v], unseen);
        printf("  %-8s%-9s %6zu   %5.3f    %5.3f     %5.3f\n", kind, value_name(v), latent[v],
               area[v], unseen[v], shared);
        areas += v < SHAPES + COLOURS && unseen[v] > 0.95;
        overlaps += v < SHAPES + COLOURS && shared > 0.5;
    }
    printf("Of %d shapes and colours %d have an area over 0.95 and %d an overlap over 0.5 on "
           "unseen images.\n", SHAPES + COLOURS, areas, overlaps);
}

static int command_score(const options *o) {
    static world w[2];                           /* the pictures it was trained on, unseen ones */
    size_t latent[VALUES] = { 0 };
    double area[VALUES] = { 0 }, here[VALUES];
    int status = open_world(&w[0], o->codes, o->seed, 0);
    if (status == SC_OK) status = open_world(&w[1], o->unseen, o->seed, w[0].pictures);
    if (status == SC_OK && w[0].latents != w[1].latents) status = wrong_codes(o->unseen);
    for (size_t j = 0; status == SC_OK && j < w[0].latents; j++) {
        find_areas(&w[0], j, here);
        for (int v = 0; v < VALUES; v++) {
            if (here[v] <= area[v]) continue;
            area[v] = here[v];
            latent[v] = j;
        }
    }
    if (status == SC_OK) print_scores(w, latent, area);
    for (int i = 0; i < 2; i++) close_world(&w[i]);
    if (status != SC_OK) return status;
    return fflush(stdout) == 0 && !ferror(stdout) ? SC_OK : complain("score", "cut off");
}

static const struct { const char *name; int (*run)(const options *); } commands[] = {
    { "draw", command_draw }, { "stream", command_stream }, { "score", command_score },
};

static int usage(void) {
    fprintf(stderr, "usage: synth draw -o FOLDER --count N [--first I] [--objects K] [--seed S]\n"
                    "       synth stream [--count N] [--first I] [--objects K] [--seed S]\n"
                    "       synth digest FILE...\n"
                    "       synth score --codes FILE --unseen FILE [--seed S]\n");
    return SC_USAGE;
}

int main(int count, char **words) {
    options o = { .seed = 42 };
    if (count > 2 && strcmp(words[1], "digest") == 0) return command_digest(words + 2);
    for (int i = 2; i < count; i += 2) {
        const char *word = words[i], *value = i + 1 < count ? words[i + 1] : "none";
        char *end;
        uint64_t number = strtoull(value, &end, 10);
        if (strcmp(word, "-o") == 0) o.folder = value;
        else if (strcmp(word, "--codes") == 0) o.codes = value;
        else if (strcmp(word, "--unseen") == 0) o.unseen = value;
        else if (end == value || *end) return usage();
        else if (strcmp(word, "--count") == 0) o.count = number;
        else if (strcmp(word, "--first") == 0) o.first = number;
        else if (strcmp(word, "--seed") == 0) o.seed = number;
        else if (strcmp(word, "--objects") == 0 && number <= 3) o.objects = (int)number;
        else return usage();
    }
    for (size_t c = 0; count > 1 && c < sizeof commands / sizeof *commands; c++) {
        if (strcmp(words[1], commands[c].name) != 0) continue;
        int draws = o.folder && o.count > 0 && strlen(o.folder) < 900;
        if (commands[c].run == command_draw && !draws) return usage();
        if (commands[c].run == command_score && !(o.codes && o.unseen)) return usage();
        return commands[c].run(&o);
    }
    return usage();
}
