/* test_image.c - image/: what is admitted and refused, Pillow's bytes, damaged files. */
#include "base/alloc.h"
#include "check.h"
#include "image/decode.h"
#include "image/resize.h"

#ifdef STV_HAVE_STB
#define DECODED STV_OK
#else
#define DECODED STV_ERR_UNSUPPORTED
#endif

/* ---- files ---------------------------------------------------------------------------------------------------------------- */

typedef struct builder {
    uint8_t bytes[2048];
    size_t n;
} builder;

static void put(builder *b, const void *data, size_t n)
{
    memcpy(b->bytes + b->n, data, n);
    b->n += n;
}

static void put_be32(builder *b, uint32_t v) { put(b, (uint8_t[]){(uint8_t)(v >> 24), (uint8_t)(v >> 16), (uint8_t)(v >> 8), (uint8_t)v}, 4); }
static void put_le32(builder *b, uint32_t v) { put(b, (uint8_t[]){(uint8_t)v, (uint8_t)(v >> 8), (uint8_t)(v >> 16), (uint8_t)(v >> 24)}, 4); }

static void put_chunk(builder *b, const char *name, const void *data, size_t n)
{
    put_be32(b, (uint32_t)n);
    const size_t begin = b->n;
    put(b, name, 4);
    put(b, data, n);
    uint32_t crc = 0xffffffff;
    for (size_t i = begin; i < b->n; i++) {
        crc ^= b->bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    put_be32(b, ~crc);
}

static builder png_start(uint32_t width, uint32_t height, int depth, int colour_type)
{
    builder b = {.n = 0}, ihdr = {.n = 0};
    put(&b, "\x89PNG\r\n\x1a\n", 8);
    put_be32(&ihdr, width);
    put_be32(&ihdr, height);
    put(&ihdr, (uint8_t[]){(uint8_t)depth, (uint8_t)colour_type, 0, 0, 0}, 5);
    put_chunk(&b, "IHDR", ihdr.bytes, ihdr.n);
    return b;
}

/* scanlines with their filter bytes, in one stored deflate block */
static void png_end(builder *b, const uint8_t *lines, size_t n)
{
    builder z = {.n = 0};
    uint32_t s1 = 1, s2 = 0;
    for (size_t i = 0; i < n; i++) {
        s1 = (s1 + lines[i]) % 65521;
        s2 = (s2 + s1) % 65521;
    }
    put(&z, (uint8_t[]){0x78, 1, 1, (uint8_t)n, (uint8_t)(n >> 8), (uint8_t)~n, (uint8_t)(~n >> 8)}, 7);
    put(&z, lines, n);
    put_be32(&z, s2 << 16 | s1);
    put_chunk(b, "IDAT", z.bytes, z.n);
    put_chunk(b, "IEND", "", 0);
}

static const uint8_t rgb_2x2[12] = {1, 2, 3, 250, 251, 252, 7, 8, 9, 100, 110, 120};
static const uint8_t lines_2x2[14] = {0, 1, 2, 3, 250, 251, 252, 0, 7, 8, 9, 100, 110, 120};

static builder png_2x2(void)
{
    builder b = png_start(2, 2, 8, 2);
    png_end(&b, lines_2x2, sizeof lines_2x2);
    return b;
}

static builder bmp_2x2(void)
{
    builder b = {.n = 0};
    put(&b, "BM", 2);
    put_le32(&b, 14 + 40 + 16);
    put_le32(&b, 0);
    put_le32(&b, 14 + 40);
    put_le32(&b, 40);
    put_le32(&b, 2);
    put_le32(&b, 2);
    put(&b, (uint8_t[]){1, 0, 24, 0}, 4);
    for (int i = 0; i < 6; i++) put_le32(&b, 0);
    put(&b, (uint8_t[]){9, 8, 7, 120, 110, 100, 0, 0, 3, 2, 1, 252, 251, 250, 0, 0}, 16); /* bottom row first, blue first, rows of 4 n bytes */
    return b;
}

/* a comment, fill bytes, a Huffman table and the frame header of a 300 x 200 picture of 3 components */
static const uint8_t jpeg_head[] = {0xff, 0xd8, 0xff, 0xfe, 0,   4, 'h', 'i', 0xff, 0xff, 0xff, 0xc4, 0,    3, 0, 0xff, 0xc2,
                                    0,    17,   8,    0,    200, 1, 44,  3,   1,    0x11, 0,    2,    0x11, 0, 3, 0x11, 0};

/* The bytes are copied to the heap so that ASan sees a read past them. */
static stv_status decode_copy(const uint8_t *bytes, size_t n, uint8_t *rgb, size_t rgb_bytes)
{
    uint8_t *copy = malloc(n ? n : 1);
    memcpy(copy, bytes, n);
    const stv_status status = stv_image_decode(copy, n, rgb, rgb_bytes);
    free(copy);
    return status;
}

/* ---- decode --------------------------------------------------------------------------------------------------------------- */

static void decodes_plain_files(void)
{
    const builder files[] = {png_2x2(), bmp_2x2()};
    for (int i = 0; i < 2; i++) {
        uint8_t *rgb = check_new(12);
        int w = 0, h = 0, channels = 0, bits = 0;
        CHECK_INT(stv_image_probe(files[i].bytes, files[i].n, &w, &h, &channels, &bits), STV_OK);
        CHECK(w == 2 && h == 2 && channels == 3 && bits == 8);
        CHECK_INT(decode_copy(files[i].bytes, files[i].n, rgb, 12), DECODED);
        if (DECODED == STV_OK) CHECK_SAME_BITS(i ? "bmp" : "png", rgb, rgb_2x2, 12);
        CHECK_INT(decode_copy(files[i].bytes, files[i].n, rgb, 11), STV_ERR_SHAPE);
    }
}

static void jpeg_is_measured_only(void)
{
    int w = 0, h = 0, channels = 0, bits = 0;
    CHECK_INT(stv_image_probe(jpeg_head, sizeof jpeg_head, &w, &h, &channels, &bits), STV_OK);
    CHECK(w == 300 && h == 200 && channels == 3 && bits == 8);
    uint8_t *rgb = check_new(300 * 200 * 3);
    CHECK_INT(decode_copy(jpeg_head, sizeof jpeg_head, rgb, 300 * 200 * 3), STV_ERR_UNSUPPORTED);
}

static void decodes_grey_bits_and_palettes(void)
{
    if (DECODED != STV_OK) return;
    uint8_t *rgb = check_new(4 * 3);
    builder b = png_start(4, 1, 2, 0); /* four 2-bit greys: 0, 1, 2, 3 */
    png_end(&b, (uint8_t[]){0, 0x1b}, 2);
    CHECK_INT(decode_copy(b.bytes, b.n, rgb, 12), STV_OK);
    for (int i = 0; i < 12; i++) CHECK_INT(rgb[i], 85 * (i / 3));

    b = png_start(4, 1, 1, 3);
    put_chunk(&b, "PLTE", (uint8_t[]){10, 20, 30, 40, 50, 60}, 6);
    png_end(&b, (uint8_t[]){0, 0x50}, 2); /* indices 0, 1, 0, 1 */
    CHECK_INT(decode_copy(b.bytes, b.n, rgb, 12), STV_OK);
    for (int i = 0; i < 12; i++) CHECK_INT(rgb[i], 10 + 10 * (i % 6));
}

static void refuses_what_pillow_reads_otherwise(void)
{
    static const struct {
        const char *chunk;
        int depth, colour_type, channels;
        size_t n_data;
    } kinds[] = {
        {NULL, 16, 0, 1, 0},  {NULL, 16, 2, 3, 0},  {NULL, 8, 4, 2, 0},   {NULL, 8, 6, 4, 0},   {"tRNS", 8, 2, 4, 6}, {"tRNS", 8, 0, 2, 2},
        {"eXIf", 8, 2, 3, 4}, {"acTL", 8, 2, 3, 8}, {"iTXt", 8, 2, 3, 9}, {"CgBI", 8, 2, 3, 4}, {"PLTE", 8, 2, 3, 6}, {"PLTE", 2, 3, 3, 9},
    };
    static const uint8_t zeros[64];
    uint8_t *rgb = check_new(12);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        builder b = png_start(2, 2, kinds[i].depth, kinds[i].colour_type);
        if (kinds[i].chunk) put_chunk(&b, kinds[i].chunk, zeros, kinds[i].n_data);
        png_end(&b, zeros, 2 * (1 + 2 * 4 * 2));
        int w, h, channels = 0, bits = 0;
        CHECK_INT(stv_image_probe(b.bytes, b.n, &w, &h, &channels, &bits), STV_OK);
        CHECK_INT(channels, kinds[i].channels);
        CHECK_INT(bits, kinds[i].colour_type == 3 ? 8 : kinds[i].depth);
        CHECK_INT(decode_copy(b.bytes, b.n, rgb, 12), STV_ERR_UNSUPPORTED);
    }
    builder b = png_start(2, 2, 8, 2);
    put_chunk(&b, "tEXt", "Raw profile type exif\0", 22);
    png_end(&b, lines_2x2, sizeof lines_2x2);
    CHECK_INT(decode_copy(b.bytes, b.n, rgb, 12), STV_ERR_UNSUPPORTED);
    b = png_start(2, 2, 8, 2);
    put_chunk(&b, "tEXt", "Software\0x", 10);
    put_chunk(&b, "gAMA", zeros, 4);
    png_end(&b, lines_2x2, sizeof lines_2x2);
    CHECK_INT(decode_copy(b.bytes, b.n, rgb, 12), DECODED);

    builder bmp = bmp_2x2();
    bmp.bytes[28] = 32;
    CHECK_INT(decode_copy(bmp.bytes, bmp.n, rgb, 12), STV_ERR_UNSUPPORTED);
    CHECK_INT(decode_copy((const uint8_t *)"GIF89a", 6, rgb, 12), STV_ERR_UNSUPPORTED);
}

static void limits_come_before_decoding(void)
{
    static const struct {
        uint32_t width, height;
        stv_status status;
    } sizes[] = {{65535, 1, STV_OK},     {1, 65535, STV_OK},     {65536, 1, STV_ERR_UNSUPPORTED}, {1, 65536, STV_ERR_UNSUPPORTED},
                 {0, 1, STV_ERR_FORMAT}, {1, 0, STV_ERR_FORMAT}, {13377, 13377, STV_OK},          {13378, 13377, STV_ERR_UNSUPPORTED}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        builder b = png_start(sizes[i].width, sizes[i].height, 8, 2);
        png_end(&b, lines_2x2, sizeof lines_2x2);
        int w, h, channels, bits;
        const uint64_t before = stv_alloc_count();
        CHECK_INT(stv_image_probe(b.bytes, b.n, &w, &h, &channels, &bits), sizes[i].status);
        if (sizes[i].status != STV_OK) CHECK_INT(stv_image_decode(b.bytes, b.n, NULL, 0), sizes[i].status);
        CHECK_INT(stv_alloc_count(), before);
    }
}

/* Every file cut anywhere, and every byte changed, ends in a status or in a picture: never in a read or write outside. */
static void damaged_files_are_reported(void)
{
    const builder png = png_2x2(), bmp = bmp_2x2();
    const struct {
        const uint8_t *bytes;
        size_t n, rgb_bytes;
        bool has_checksum;
    } files[] = {{png.bytes, png.n, 12, true}, {bmp.bytes, bmp.n, 12, false}, {jpeg_head, sizeof jpeg_head, 192, false}};
    uint8_t copy[2048];
    for (int i = 0; i < 3; i++) {
        uint8_t *rgb = check_new(files[i].rgb_bytes);
        for (size_t n = 0; n < files[i].n; n++) {
            const stv_status status = decode_copy(files[i].bytes, n, rgb, files[i].rgb_bytes);
            CHECK(status == STV_ERR_FORMAT || (status == STV_ERR_UNSUPPORTED && n < 8));
        }
        for (size_t at = 0; at < files[i].n; at++)
            for (int bit = 0; bit < 8; bit++) {
                memcpy(copy, files[i].bytes, files[i].n);
                copy[at] ^= (uint8_t)(1 << bit);
                const stv_status status = decode_copy(copy, files[i].n, rgb, files[i].rgb_bytes);
                if (files[i].has_checksum) CHECK(status != STV_OK);
            }
    }
}

static void png_with_too_little_data(void)
{
    static const uint8_t lines[512];
    uint8_t *rgb = check_new(12);
    builder b = png_start(2, 2, 8, 2);
    png_end(&b, lines, 13);
    CHECK_INT(decode_copy(b.bytes, b.n, rgb, 12), DECODED == STV_OK ? STV_ERR_FORMAT : DECODED);
    b = png_start(2, 2, 8, 2);
    put_chunk(&b, "IEND", "", 0);
    CHECK_INT(decode_copy(b.bytes, b.n, rgb, 12), STV_ERR_FORMAT);
}

/* ---- resize and preprocess ------------------------------------------------------------------------------------------------ */

static void pattern_5x3(uint8_t rgb[45])
{
    for (int y = 0; y < 3; y++)
        for (int x = 0; x < 5; x++)
            for (int c = 0; c < 3; c++) rgb[(5 * y + x) * 3 + c] = (uint8_t)(37 * x + 91 * y + 53 * c + x * y * c);
}

static const float unit_mean[3] = {0, 0, 0}, unit_std[3] = {1, 1, 1};

static stv_image_options options_of(int size_px, bool pad)
{
    stv_image_options options = {.size_px = size_px, .pad = pad, .background = {122, 116, 104}};
    memcpy(options.mean, unit_mean, sizeof unit_mean);
    memcpy(options.std, unit_std, sizeof unit_std);
    return options;
}

static void pillows_bytes(void)
{
    /* recorded with Pillow 13.0.0, one direction at a time: resize((4,5)) of the padded, resize((6,3)) of the plain picture, then the other */
    static const uint8_t padded[48] = {95,  100, 100, 104, 108, 114, 113, 126, 132, 121, 140, 140, 30,  89,  162, 83,
                                       155, 159, 143, 128, 133, 188, 125, 187, 168, 183, 111, 142, 100, 112, 80,  79,
                                       88,  136, 79,  146, 142, 133, 82,  124, 89,  98,  91,  109, 117, 103, 124, 125};
    static const uint8_t cropped[48] = {21,  74,  126, 54,  106, 168, 84, 142, 204, 117, 184, 236, 75,  144, 214, 121,
                                        195, 127, 159, 141, 75,  191, 58, 121, 164, 137, 182, 132, 157, 97,  119, 111,
                                        47,  158, 28,  94,  232, 57,  52, 83,  18,  97,  0,   70,  137, 39,  113, 172};
    uint8_t rgb[45], *out = check_new(48);
    pattern_5x3(rgb);
    for (int pad = 0; pad < 2; pad++) {
        const stv_image_options options = options_of(4, pad);
        CHECK_INT(stv_image_resize_crop(out, rgb, 5, 3, &options), STV_OK);
        CHECK_SAME_BITS(pad ? "pad" : "crop", out, pad ? padded : cropped, 48);
    }
}

static void same_size_copies(void)
{
    uint8_t rgb[45], *out = check_new(27);
    pattern_5x3(rgb);
    const stv_image_options options = options_of(3, false);
    CHECK_INT(stv_image_resize_crop(out, rgb, 5, 3, &options), STV_OK); /* columns 1..3 */
    for (int y = 0; y < 3; y++) CHECK_SAME_BITS("row", out + 9 * y, rgb + 15 * y + 3, 9);

    uint8_t *square = check_new(75);
    const stv_image_options padded = options_of(5, true);
    CHECK_INT(stv_image_resize_crop(square, rgb, 5, 3, &padded), STV_OK);
    CHECK_SAME_BITS("picture", square + 15, rgb, 45);
    for (int x = 0; x < 5; x++) {
        CHECK_SAME_BITS("top", square + 3 * x, padded.background, 3);
        CHECK_SAME_BITS("bottom", square + 60 + 3 * x, padded.background, 3);
    }
}

/* A window is the same bytes as that part of the whole. */
static void collect_row(void *arg, int row, const uint8_t *rgb) { memcpy((uint8_t *)arg + row * 11 * 3, rgb, 11 * 3); }

static void collect_window(void *arg, int row, const uint8_t *rgb) { memcpy((uint8_t *)arg + row * 4 * 3, rgb, 4 * 3); }

static void window_of_the_whole(void)
{
    uint8_t rgb[45], *whole = check_new(11 * 7 * 3), *window = check_new(4 * 3 * 3);
    pattern_5x3(rgb);
    stv_resize job = {.rgb = rgb,
                      .width_px = 5,
                      .height_px = 3,
                      .canvas_width_px = 8,
                      .canvas_height_px = 9,
                      .left_px = 2,
                      .top_px = 5,
                      .background = {9, 99, 199},
                      .resized_width_px = 11,
                      .resized_height_px = 7,
                      .window_width_px = 11,
                      .window_height_px = 7};
    CHECK_INT(stv_image_resize(&job, collect_row, whole), STV_OK);
    job.window_left_px = 6;
    job.window_top_px = 2;
    job.window_width_px = 4;
    job.window_height_px = 3;
    CHECK_INT(stv_image_resize(&job, collect_window, window), STV_OK);
    for (int y = 0; y < 3; y++) CHECK_SAME_BITS("row", window + 12 * y, whole + (2 + y) * 33 + 18, 12);
}

static void one_allocation_and_odd_sizes(void)
{
    static const int sides[] = {1, 2, 3, 7, 31, 257, 65535};
    const int n = sizeof sides / sizeof *sides;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            for (int pad = 0; pad < 2; pad++) {
                const int w = sides[i], h = sides[j];
                if ((int64_t)w * h > 600000) continue;
                uint8_t *rgb = check_new((size_t)w * (size_t)h * 3), *out = check_new(7 * 7 * 3);
                memset(rgb, 200, (size_t)w * (size_t)h * 3);
                stv_image_options options = options_of(7, pad);
                memset(options.background, 200, 3);
                const uint64_t before = stv_alloc_count();
                CHECK_INT(stv_image_resize_crop(out, rgb, w, h, &options), STV_OK);
                CHECK_INT(stv_alloc_count() - before, 1);
                int worst = 0; /* one colour stays that colour, up to the rounding of up to 37,449 taps */
                for (int k = 0; k < 7 * 7 * 3; k++) worst = abs(out[k] - 200) > worst ? abs(out[k] - 200) : worst;
                CHECK(worst <= (w > 10000 || h > 10000));
            }
}

static void normalises_into_planes(void)
{
    uint8_t rgb[45], *bytes = check_new(16 * 3);
    float *chw = check_new(48 * sizeof *chw), want[48];
    pattern_5x3(rgb);
    stv_image_options options = options_of(4, true);
    for (int c = 0; c < 3; c++) {
        options.mean[c] = 0.4f + 0.05f * (float)c;
        options.std[c] = 0.25f + 0.01f * (float)c;
    }
    const uint64_t before = stv_alloc_count();
    CHECK_INT(stv_image_preprocess(chw, rgb, 5, 3, &options), STV_OK);
    CHECK_INT(stv_alloc_count() - before, 1);
    CHECK_INT(stv_image_resize_crop(bytes, rgb, 5, 3, &options), STV_OK);
    for (int c = 0; c < 3; c++)
        for (int i = 0; i < 16; i++) want[16 * c + i] = (float)((bytes[3 * i + c] / 255.0 - (double)options.mean[c]) / (double)options.std[c]);
    CHECK_MREL("chw", chw, want, 48, 2e-7); /* float rounding of two operations */
}

static void bad_arguments(void)
{
    const uint8_t rgb[3] = {0};
    float chw[3];
    uint8_t hwc[3];
    stv_image_options options = options_of(1, true);
    CHECK_INT(stv_image_resize_crop(hwc, rgb, 0, 1, &options), STV_ERR_ARGUMENT);
    CHECK_INT(stv_image_resize_crop(hwc, rgb, 1, 65536, &options), STV_ERR_ARGUMENT);
    CHECK_INT(stv_image_preprocess(chw, rgb, 1, 1, &options), STV_OK);
    options.std[1] = 0;
    CHECK_INT(stv_image_preprocess(chw, rgb, 1, 1, &options), STV_ERR_ARGUMENT);
    options = options_of(0, true);
    CHECK_INT(stv_image_preprocess(chw, rgb, 1, 1, &options), STV_ERR_ARGUMENT);
    options = options_of(STV_IMAGE_MAX_SIZE_PX + 1, true);
    CHECK_INT(stv_image_preprocess(chw, rgb, 1, 1, &options), STV_ERR_ARGUMENT);
}

static const check_case cases[] = {
    {"decodes plain files", decodes_plain_files},
    {"JPEG is measured only", jpeg_is_measured_only},
    {"decodes grey bits and palettes", decodes_grey_bits_and_palettes},
    {"refuses what Pillow reads otherwise", refuses_what_pillow_reads_otherwise},
    {"limits come before decoding", limits_come_before_decoding},
    {"damaged files are reported", damaged_files_are_reported},
    {"png with too little data", png_with_too_little_data},
    {"Pillow's bytes", pillows_bytes},
    {"same size copies", same_size_copies},
    {"window of the whole", window_of_the_whole},
    {"one allocation and odd sizes", one_allocation_and_odd_sizes},
    {"normalises into planes", normalises_into_planes},
    {"bad arguments", bad_arguments},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
