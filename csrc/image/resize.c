/* resize.c - two passes, horizontal then vertical, 8 bits between them, weights in 22-bit fixed point.
 *
 * The models were trained on Pillow's pictures, so the aim is the same bytes, not a better filter: the weights are computed in
 * double by the same expressions, rounded to fixed point the same way, and a direction whose size does not change is copied.
 * Sums of integers have no order, so the taps that fall on the canvas beside the picture become one product: the summed weight
 * times the background. Time and memory grow with the picture, not with the canvas (1 x 65535 padded is 65535 squared).
 * Road not taken: one float pass with a final rounding. It is shorter and differs from Pillow by one level in many pixels. */
#include "image/resize.h"

#include "base/alloc.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>

enum { CHANNELS = 3, WEIGHT_BITS = 32 - 8 - 2 }; /* 8-bit pixels, and two bits for the filter's overshoot */

/* One direction: the canvas line (n_in) with the picture at [left, left + n_own) becomes a line of n_out, of which the
 * positions [first, first + n) are computed. */
typedef struct axis {
    int n_in, left, n_own, n_out, first, n, n_taps;
    bool identity;   /* n_in == n_out: the one tap of a position has weight one */
    int32_t *weight; /* (n, n_taps) of the taps on the picture */
    int32_t *begin;  /* (n) their first position in the picture; rises with n */
    int32_t *count;  /* (n) how many there are */
    int32_t *beside; /* (n) summed weight of the taps beside the picture */
} axis;

static double bicubic(double x)
{
    const double a = -0.5;
    if (x < 0.0) x = -x;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

/* Shrinking widens the filter by the same factor: that is the antialias. */
static double filter_scale(const axis *a) { return a->n_in > a->n_out ? (double)a->n_in / a->n_out : 1.0; }

static axis axis_of(int n_in, int left, int n_own, int n_out, int first, int n)
{
    axis a = {.n_in = n_in, .left = left, .n_own = n_own, .n_out = n_out, .first = first, .n = n, .identity = n_in == n_out};
    a.n_taps = a.identity ? 1 : (int)ceil(2.0 * filter_scale(&a)) * 2 + 1;
    return a;
}

static int32_t to_fixed(double weight)
{
    const double fixed = weight * (1 << WEIGHT_BITS);
    return (int32_t)(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
}

/* w (n_taps) is scratch. */
static void fill_weights(axis *a, double *w)
{
    const double scale = (double)a->n_in / a->n_out, inverse = 1.0 / filter_scale(a), support = 2.0 * filter_scale(a);
    for (int i = 0; i < a->n; i++) {
        const double center = (a->first + i + 0.5) * scale;
        int begin = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
        if (begin < 0) begin = 0;
        if (end > a->n_in) end = a->n_in;
        double sum = 0.0;
        if (a->identity) {
            begin = a->first + i;
            end = begin + 1;
            w[0] = sum = 1.0;
        } else {
            for (int k = 0; k < end - begin; k++) sum += w[k] = bicubic((k + begin - center + 0.5) * inverse);
        }
        int32_t *weight = a->weight + (size_t)i * (size_t)a->n_taps;
        a->begin[i] = begin < a->left ? 0 : begin - a->left < a->n_own ? begin - a->left : a->n_own;
        a->count[i] = a->beside[i] = 0;
        for (int k = 0; k < end - begin; k++) {
            const int32_t fixed = to_fixed(sum != 0.0 ? w[k] / sum : w[k]);
            const int own = k + begin - a->left;
            if (own >= 0 && own < a->n_own) weight[a->count[i]++] = fixed;
            else a->beside[i] += fixed;
        }
    }
}

static uint8_t to_byte(int32_t sum)
{
    const int32_t v = sum >> WEIGHT_BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* out (a->n, 3) from one picture row. */
static void resize_row(uint8_t *out, const uint8_t *row, const uint8_t background[CHANNELS], const axis *a)
{
    const int32_t half = 1 << (WEIGHT_BITS - 1);
    for (int i = 0; i < a->n; i++) {
        const int32_t *weight = a->weight + (size_t)i * (size_t)a->n_taps;
        const uint8_t *in = row + (size_t)a->begin[i] * CHANNELS;
        int32_t r = half + a->beside[i] * background[0], g = half + a->beside[i] * background[1], b = half + a->beside[i] * background[2];
        for (int k = 0; k < a->count[i]; k++, in += CHANNELS) {
            r += in[0] * weight[k];
            g += in[1] * weight[k];
            b += in[2] * weight[k];
        }
        *out++ = to_byte(r);
        *out++ = to_byte(g);
        *out++ = to_byte(b);
    }
}

/* The same of a canvas row that is all background. */
static void resize_margin(uint8_t *out, const uint8_t background[CHANNELS], const axis *a)
{
    for (int i = 0; i < a->n; i++) {
        int32_t all = a->beside[i];
        for (int k = 0; k < a->count[i]; k++) all += a->weight[(size_t)i * (size_t)a->n_taps + (size_t)k];
        for (int c = 0; c < CHANNELS; c++) *out++ = to_byte((1 << (WEIGHT_BITS - 1)) + all * background[c]);
    }
}

/* Hands out the pieces of one block; with base NULL it only counts. */
typedef struct pieces {
    char *base;
    size_t used;
} pieces;

static void *take(pieces *p, size_t n, size_t item_bytes)
{
    void *piece = p->base ? p->base + p->used : NULL;
    p->used += (n * item_bytes + STV_ALIGN - 1) & ~(size_t)(STV_ALIGN - 1);
    return piece;
}

typedef struct scratch {
    double *filter;  /* (max n_taps) */
    uint8_t *narrow; /* (picture height, window width, 3): the horizontal pass of the picture's rows */
    uint8_t *margin; /* (window width, 3): the same of a row that is all background */
    int32_t *sums;   /* (window width, 3) */
    uint8_t *out;    /* (window width, 3) */
} scratch;

static size_t lay_out(scratch *s, axis *h, axis *v, char *base)
{
    pieces p = {.base = base};
    const size_t row = (size_t)h->n * CHANNELS;
    for (int i = 0; i < 2; i++) {
        axis *a = i ? v : h;
        const size_t n = (size_t)a->n;
        a->weight = take(&p, n * (size_t)a->n_taps, sizeof *a->weight);
        a->begin = take(&p, n, sizeof *a->begin);
        a->count = take(&p, n, sizeof *a->count);
        a->beside = take(&p, n, sizeof *a->beside);
    }
    s->filter = take(&p, (size_t)(h->n_taps > v->n_taps ? h->n_taps : v->n_taps), sizeof *s->filter);
    s->narrow = take(&p, (size_t)v->n_own * row, 1);
    s->margin = take(&p, row, 1);
    s->sums = take(&p, row, sizeof *s->sums);
    s->out = take(&p, row, 1);
    return p.used;
}

stv_status stv_image_resize(const stv_resize *job, stv_resize_emit *emit, void *arg)
{
    assert(job->left_px >= 0 && job->left_px + job->width_px <= job->canvas_width_px);
    assert(job->top_px >= 0 && job->top_px + job->height_px <= job->canvas_height_px);
    assert(job->window_left_px >= 0 && job->window_left_px + job->window_width_px <= job->resized_width_px);
    assert(job->window_top_px >= 0 && job->window_top_px + job->window_height_px <= job->resized_height_px);

    axis h = axis_of(job->canvas_width_px, job->left_px, job->width_px, job->resized_width_px, job->window_left_px, job->window_width_px);
    axis v = axis_of(job->canvas_height_px, job->top_px, job->height_px, job->resized_height_px, job->window_top_px, job->window_height_px);
    scratch s;
    char *block = stv_alloc(lay_out(&s, &h, &v, NULL));
    if (!block) return stv_fail(STV_ERR_MEMORY, "image resize: no memory for a picture of %dx%d", job->width_px, job->height_px);
    lay_out(&s, &h, &v, block);
    fill_weights(&h, s.filter);
    fill_weights(&v, s.filter);

    /* Horizontal pass, of the rows that the window needs. */
    const size_t row_bytes = (size_t)h.n * CHANNELS, picture_bytes = (size_t)job->width_px * CHANNELS;
    const int end = v.begin[v.n - 1] + v.count[v.n - 1];
    resize_margin(s.margin, job->background, &h);
    for (int y = v.begin[0]; y < end; y++) resize_row(s.narrow + (size_t)y * row_bytes, job->rgb + (size_t)y * picture_bytes, job->background, &h);

    /* Vertical pass, whole rows at a time. */
    int32_t *restrict sums = s.sums;
    for (int i = 0; i < v.n; i++) {
        const int32_t *weight = v.weight + (size_t)i * (size_t)v.n_taps;
        for (size_t x = 0; x < row_bytes; x++) sums[x] = (1 << (WEIGHT_BITS - 1)) + v.beside[i] * s.margin[x];
        for (int k = 0; k < v.count[i]; k++) {
            const uint8_t *row = s.narrow + (size_t)(v.begin[i] + k) * row_bytes;
            for (size_t x = 0; x < row_bytes; x++) sums[x] += row[x] * weight[k];
        }
        for (size_t x = 0; x < row_bytes; x++) s.out[x] = to_byte(sums[x]);
        emit(arg, i, s.out);
    }
    stv_free(block);
    return STV_OK;
}
