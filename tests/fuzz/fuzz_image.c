/* fuzz_image.c - a file's bytes through probe, decode and pre-processing.
 *
 *   [0] side of the model's input   [1] bit 0: pad   [2..4] background   [5..] the file
 *
 * libFuzzer cannot guess checksums, so bit 1 of [1] asks for them to be mended before the file is read. */
#include "fuzz.h"

#include "image/decode.h"

#include <math.h>
#include <string.h>

enum { MAX_PIXELS = 1 << 20 }; /* larger pictures are probed only: the search wants many small ones */

static uint32_t be32(const uint8_t *p) { return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]; }

static void mend_checksums(uint8_t *p, size_t n)
{
    for (size_t at = 8; n >= 12 && at <= n - 12 && be32(p + at) <= n - at - 12; at += be32(p + at) + 12) {
        const size_t size = be32(p + at);
        uint32_t crc = 0xffffffff;
        for (size_t i = at + 4; i < at + 8 + size; i++) {
            crc ^= p[i];
            for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
        }
        for (int i = 0; i < 4; i++) p[at + 8 + size + (size_t)i] = (uint8_t)(~crc >> (24 - 8 * i));
    }
}

static void preprocess(const uint8_t *rgb, int width_px, int height_px, const stv_image_options *options)
{
    const size_t size = (size_t)options->size_px;
    uint8_t *hwc = malloc(size * size * 3);
    float *chw = malloc(size * size * 3 * sizeof *chw);
    FUZZ_REQUIRE(hwc && chw);
    FUZZ_REQUIRE(!fuzz_refused(stv_image_resize_crop(hwc, rgb, width_px, height_px, options)));
    FUZZ_REQUIRE(!fuzz_refused(stv_image_preprocess(chw, rgb, width_px, height_px, options)));
    for (size_t i = 0; i < size * size * 3; i++) {
        const int level = hwc[i / 3 % (size * size) * 3 + i % 3];
        const float want = (float)level / 255, found = chw[i % 3 * size * size + i / 3];
        FUZZ_REQUIRE(fabsf(found - want) < 1e-6f); /* mean 0, std 1: the same picture twice */
    }
    free(hwc);
    free(chw);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (n < 5) return 0;
    const stv_image_options options = {.size_px = data[0] % 64 + 1, .pad = data[1] & 1, .background = {data[2], data[3], data[4]}, .std = {1, 1, 1}};
    uint8_t *file = malloc(n - 5 + 1); /* never 0 bytes; the file lies at its end */
    FUZZ_REQUIRE(file);
    memcpy(file + 1, data + 5, n - 5);
    if (data[1] & 2) mend_checksums(file + 1, n - 5);

    int width_px, height_px, channels, bits;
    if (!fuzz_refused(stv_image_probe(file + 1, n - 5, &width_px, &height_px, &channels, &bits))) {
        FUZZ_REQUIRE(width_px >= 1 && width_px <= STV_IMAGE_MAX_SIDE_PX && height_px >= 1 && height_px <= STV_IMAGE_MAX_SIDE_PX);
        const size_t n_pixels = (size_t)width_px * (size_t)height_px;
        uint8_t *rgb = n_pixels <= MAX_PIXELS ? malloc(n_pixels * 3) : NULL;
        if (rgb) {
            FUZZ_REQUIRE(stv_image_decode(file + 1, n - 5, rgb, n_pixels * 3 - 1) != STV_OK);
            if (fuzz_refused(stv_image_decode(file + 1, n - 5, rgb, n_pixels * 3))) memset(rgb, data[2], n_pixels * 3);
            preprocess(rgb, width_px, height_px, &options);
        }
        free(rgb);
    }
    free(file);
    return 0;
}
