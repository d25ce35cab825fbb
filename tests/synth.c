/* synth: pictures with known answers. Draws pictures of 112 x 112 pixels with one to three objects
 * of known shape, colour and texture, and says where each of them is.
 *
 *     make tests/synth
 *     tests/synth draw -o out/world --count 2000          pictures, masks and factors as files
 *     tests/synth stream --objects 1 | ...                records without end, to train on
 *
 * What `draw` writes below its folder:
 *     pictures/<class>/<number>.ppm    class: colour and shape of the main object, as "red star"
 *     pictures.txt                     a line a picture: path, tab, class index
 *     masks/<number>-<object>.pgm      255 where the object is, object 0 is the main one
 *     factors.csv                      a line an object: everything that was drawn by lot
 *
 * A picture depends on the seed and its number alone, and all arithmetic is that of integers, so
 * the bytes are the same on every machine. */
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

typedef struct { const char *folder; uint64_t seed, first, count; int objects; } options;

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

static const struct { const char *name; int (*run)(const options *); } commands[] = {
    { "draw", command_draw }, { "stream", command_stream },
};

static int usage(void) {
    fprintf(stderr, "usage: synth draw -o FOLDER --count N [--first I] [--objects K] [--seed S]\n"
                    "       synth stream [--count N] [--first I] [--objects K] [--seed S]\n"
                    "       synth digest FILE...\n");
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
        else if (end == value || *end) return usage();
        else if (strcmp(word, "--count") == 0) o.count = number;
        else if (strcmp(word, "--first") == 0) o.first = number;
        else if (strcmp(word, "--seed") == 0) o.seed = number;
        else if (strcmp(word, "--objects") == 0 && number <= 3) o.objects = (int)number;
        else return usage();
    }
    for (size_t c = 0; count > 1 && c < sizeof commands / sizeof *commands; c++) {
        if (strcmp(words[1], commands[c].name) != 0) continue;
        if (commands[c].run == command_stream) return command_stream(&o);
        return o.folder && o.count > 0 && strlen(o.folder) < 900 ? command_draw(&o) : usage();
    }
    return usage();
}
