/* decode.c - our own walk over the file's structure, then stb_image for the pixels.
 *
 * stb_image is not made for hostile or damaged files: it checks no checksum, fills truncated BMP files with whatever is there,
 * and reads palette entries that nobody wrote. So the walk admits only complete files of the plain kinds, memory handed to
 * stb_image is zeroed and bounded, and its messages (a shared static buffer) are compiled out.
 *
 * Road not taken: JPEG. In version 2.27, the one distributions ship, a single flipped bit in a Huffman table writes past it; on a
 * 1411x1411 picture it takes 12 ms against the 10 ms of Pillow (which also lets other threads run), and is off by 3 levels. */
#include "image/decode.h"

#include "base/alloc.h"

#include <stdbool.h>
#include <string.h>

typedef struct header {
    int width_px, height_px, channels, bits;
    const char *refusal; /* why the picture is not decoded here, or NULL */
} header;

typedef struct file {
    const uint8_t *p;
    size_t n;
    bool whole; /* check the file to its end; false: stop where the header ends */
} file;

static uint32_t be16(const uint8_t *p) { return (uint32_t)p[0] << 8 | p[1]; }
static uint32_t be32(const uint8_t *p) { return be16(p) << 16 | be16(p + 2); }
static uint32_t le16(const uint8_t *p) { return (uint32_t)p[1] << 8 | p[0]; }
static uint32_t le32(const uint8_t *p) { return le16(p + 2) << 16 | le16(p); }

/* The first reason is the one reported. */
static void refuse(header *h, const char *why)
{
    if (!h->refusal) h->refusal = why;
}

static stv_status set_size(header *h, uint32_t width_px, uint32_t height_px)
{
    if (width_px == 0 || height_px == 0) return stv_fail(STV_ERR_FORMAT, "image: the header says %ux%u pixels", width_px, height_px);
    if (width_px > STV_IMAGE_MAX_SIDE_PX || height_px > STV_IMAGE_MAX_SIDE_PX || (uint64_t)width_px * height_px > STV_IMAGE_MAX_PIXELS)
        return stv_fail(STV_ERR_UNSUPPORTED, "image: %ux%u pixels, the limits are %d a side and %d in all", width_px, height_px,
                        STV_IMAGE_MAX_SIDE_PX, STV_IMAGE_MAX_PIXELS);
    h->width_px = (int)width_px;
    h->height_px = (int)height_px;
    return STV_OK;
}

/* ---- PNG ------------------------------------------------------------------------------------------------------------------ */

static uint32_t crc32_of(const uint8_t *p, size_t n)
{
    static const uint32_t of_nibble[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
                                           0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        crc = crc >> 4 ^ of_nibble[crc & 15];
        crc = crc >> 4 ^ of_nibble[crc & 15];
    }
    return ~crc;
}

static stv_status read_ihdr(header *h, const uint8_t *p, int *palette_bits)
{
    static const struct {
        uint8_t channels, depths; /* bit i of depths: 1 << i bits are allowed */
    } colour_type[7] = {{1, 1 | 2 | 4 | 8 | 16}, {0, 0}, {3, 8 | 16}, {3, 1 | 2 | 4 | 8}, {2, 8 | 16}, {0, 0}, {4, 8 | 16}};
    const int depth = p[8], type = p[9];
    STV_TRY(set_size(h, be32(p), be32(p + 4)));
    if (type > 6 || !colour_type[type].channels || !(depth & colour_type[type].depths) || (depth & (depth - 1)) || p[10] || p[11] || p[12] > 1)
        return stv_fail(STV_ERR_FORMAT, "PNG: colour type %d with %d bits, methods %d, %d, %d do not exist", type, depth, p[10], p[11], p[12]);
    h->channels = colour_type[type].channels;
    h->bits = type == 3 ? 8 : depth;
    *palette_bits = type == 3 ? depth : 0;
    if (depth == 16) refuse(h, "a 16-bit PNG");
    if (type >= 4) refuse(h, "a PNG with alpha");
    return STV_OK;
}

/* Chunks that cannot change the picture: neither stb_image nor Pillow applies them. */
static bool is_harmless(const uint8_t *name, const uint8_t *data, size_t n)
{
    static const char names[][5] = {"gAMA", "cHRM", "sRGB", "iCCP", "sBIT", "pHYs", "tIME", "bKGD", "hIST"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (!memcmp(name, names[i], 4)) return true;
    static const char exif_in_text[] = "Raw profile type"; /* where older writers hide the orientation */
    return !memcmp(name, "tEXt", 4) && (n < sizeof exif_in_text - 1 || memcmp(data, exif_in_text, sizeof exif_in_text - 1) != 0);
}

static stv_status walk_png(header *h, const file *f)
{
    int palette_bits = 0, n_idat = 0;
    bool palette = false;
    for (size_t at = 8;;) {
        if (f->n - at < 12 || be32(f->p + at) > f->n - at - 12) return stv_fail(STV_ERR_FORMAT, "PNG: truncated after %zu bytes", f->n);
        const uint8_t *name = f->p + at + 4, *data = name + 4;
        const size_t n = be32(f->p + at);
        const bool is_first = at == 8;
        if (f->whole && crc32_of(name, n + 4) != be32(data + n)) return stv_fail(STV_ERR_FORMAT, "PNG: wrong checksum in the chunk at byte %zu", at);
        at += n + 12;
        if (is_first != !memcmp(name, "IHDR", 4) || (is_first && n != 13))
            return stv_fail(STV_ERR_FORMAT, "PNG: wants one IHDR chunk of 13 bytes, first");
        const bool idat_ended = n_idat > 0 && memcmp(name, "IDAT", 4) != 0;
        if (is_first) {
            STV_TRY(read_ihdr(h, data, &palette_bits));
        } else if (!memcmp(name, "IDAT", 4)) {
            if (palette_bits && !palette) refuse(h, "a PNG whose palette is missing or shorter than its pixels allow");
            if (!f->whole) return STV_OK;
            n_idat++;
        } else if (!memcmp(name, "PLTE", 4)) {
            if (palette || !palette_bits) refuse(h, "a PNG with an unused palette");
            palette = n % 3 == 0 && n / 3 <= 256 && n / 3 >= (size_t)1 << palette_bits;
        } else if (!memcmp(name, "tRNS", 4)) {
            h->channels += h->channels & 1;
            refuse(h, "a PNG with transparency");
        } else if (!memcmp(name, "IEND", 4)) {
            return n_idat ? STV_OK : stv_fail(STV_ERR_FORMAT, "PNG: no image data");
        } else if (!is_harmless(name, data, n)) {
            refuse(h, "a PNG with chunks that may change the picture");
        }
        if (idat_ended) refuse(h, "a PNG with chunks after its image data");
    }
}

/* ---- BMP ------------------------------------------------------------------------------------------------------------------ */

static stv_status walk_bmp(header *h, const file *f)
{
    if (f->n < 14 + 40) return stv_fail(STV_ERR_FORMAT, "BMP: truncated after %zu bytes", f->n);
    const uint32_t offset = le32(f->p + 10), info_bytes = le32(f->p + 14), height = le32(f->p + 22), compression = le32(f->p + 30);
    const uint32_t bits = le16(f->p + 28);
    if (info_bytes < 40) return stv_fail(STV_ERR_UNSUPPORTED, "image: a BMP of the OS/2 kind");
    STV_TRY(set_size(h, le32(f->p + 18), height >> 31 ? 0u - height : height)); /* negative: rows run from top to bottom */
    h->channels = bits == 32 ? 4 : 3;
    h->bits = 8;
    if (bits != 24 || compression || le16(f->p + 26) != 1) refuse(h, "a BMP that is not plain 24-bit");
    if ((info_bytes != 40 && info_bytes != 108 && info_bytes != 124) || offset != 14 + info_bytes) refuse(h, "a BMP with an unusual header");
    const uint64_t row_bytes = ((uint64_t)h->width_px * 3 + 3) & ~(uint64_t)3;
    if (!h->refusal && f->n < offset + row_bytes * (uint64_t)h->height_px) return stv_fail(STV_ERR_FORMAT, "BMP: truncated after %zu bytes", f->n);
    return STV_OK;
}

/* ---- JPEG: size only ------------------------------------------------------------------------------------------------------ */

static bool is_frame_header(int marker) { return marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc; }

static stv_status read_jpeg_size(header *h, const file *f)
{
    refuse(h, "a JPEG");
    for (size_t at = 2;;) {
        while (f->n - at >= 2 && f->p[at] == 0xff && f->p[at + 1] == 0xff) at++; /* fill bytes */
        if (f->n - at < 4 || be16(f->p + at + 2) > f->n - at - 2) return stv_fail(STV_ERR_FORMAT, "JPEG: truncated after %zu bytes", f->n);
        const int marker = f->p[at + 1];
        const uint8_t *data = f->p + at + 4;
        const uint32_t n = be16(f->p + at + 2); /* counts its own two bytes */
        if (f->p[at] != 0xff || marker == 0xda || n < 2) return stv_fail(STV_ERR_FORMAT, "JPEG: no frame header, but other data at byte %zu", at);
        if (is_frame_header(marker)) {
            if (n < 8) return stv_fail(STV_ERR_FORMAT, "JPEG: frame header of %u bytes", n);
            h->bits = data[0];
            h->channels = data[5];
            return set_size(h, be16(data + 3), be16(data + 1));
        }
        at += n + 2;
    }
}

/* ---- the two doors -------------------------------------------------------------------------------------------------------- */

static stv_status walk(header *h, const void *bytes, size_t n, bool whole)
{
    const file f = {.p = bytes, .n = n, .whole = whole};
    *h = (header){0};
    if (n > STV_IMAGE_MAX_FILE_BYTES)
        return stv_fail(STV_ERR_UNSUPPORTED, "image: a file of %zu bytes, the limit is %d", n, STV_IMAGE_MAX_FILE_BYTES);
    if (n >= 8 && !memcmp(bytes, "\x89PNG\r\n\x1a\n", 8)) return walk_png(h, &f);
    if (n >= 3 && !memcmp(bytes, "\xff\xd8\xff", 3)) return read_jpeg_size(h, &f);
    if (n >= 2 && !memcmp(bytes, "BM", 2)) return walk_bmp(h, &f);
    return stv_fail(STV_ERR_UNSUPPORTED, "image: neither PNG nor BMP nor JPEG");
}

stv_status stv_image_probe(const void *bytes, size_t n, int *width_px, int *height_px, int *channels, int *bits)
{
    header h;
    STV_TRY(walk(&h, bytes, n, false));
    *width_px = h.width_px;
    *height_px = h.height_px;
    *channels = h.channels;
    *bits = h.bits;
    return STV_OK;
}

#ifdef STV_HAVE_STB

/* No single buffer of the picture in work is larger (buffers grow by doubling); a PNG that inflates beyond it is refused. */
static _Thread_local size_t max_bytes;

static size_t largest_buffer(const header *h, size_t n) { return 2 * n + 8 * (size_t)h->height_px * ((size_t)h->width_px + 1) + 65536; }

static _Thread_local bool out_of_memory; /* why the last decoding failed, if not for a damaged picture */

static void *stb_alloc(size_t size_bytes)
{
    if (size_bytes > max_bytes) return NULL;
    void *p = stv_alloc_zero(size_bytes);
    if (!p) out_of_memory = true;
    return p;
}

static void *stb_realloc(void *old, size_t old_bytes, size_t new_bytes)
{
    void *grown = stb_alloc(new_bytes);
    if (grown && old) memcpy(grown, old, old_bytes < new_bytes ? old_bytes : new_bytes);
    if (grown) stv_free(old);
    return grown;
}

#define STB_IMAGE_IMPLEMENTATION
#define STBIDEF __attribute__((visibility("hidden"))) /* not static: it declares loaders that the lines below switch off */
#define STBI_ONLY_PNG
#define STBI_ONLY_BMP
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_NO_HDR
#define STBI_NO_FAILURE_STRINGS
#define STBI_MAX_DIMENSIONS STV_IMAGE_MAX_SIDE_PX
#define STBI_ASSERT(x) ((void)0) /* its asserts are on file contents, and each is followed by an error return */
#define STBI_MALLOC(size) stb_alloc(size)
#define STBI_REALLOC_SIZED(p, old_size, new_size) stb_realloc(p, old_size, new_size)
#define STBI_FREE(p) stv_free(p)
#include <stb/stb_image.h>

static stv_status decode(uint8_t *rgb, const header *h, const void *bytes, size_t n)
{
    int width_px, height_px, channels;
    out_of_memory = false;
    max_bytes = largest_buffer(h, n);
    uint8_t *decoded = stbi_load_from_memory(bytes, (int)n, &width_px, &height_px, &channels, 3);
    if (!decoded && out_of_memory) return stv_fail(STV_ERR_MEMORY, "image: no memory for decoding %dx%d pixels", h->width_px, h->height_px);
    if (!decoded) return stv_fail(STV_ERR_FORMAT, "image: damaged, the pixels of %dx%d cannot be decoded", h->width_px, h->height_px);
    if (width_px != h->width_px || height_px != h->height_px) {
        stbi_image_free(decoded);
        return stv_fail(STV_ERR_FORMAT, "image: the header says %dx%d pixels, the data %dx%d", h->width_px, h->height_px, width_px, height_px);
    }
    memcpy(rgb, decoded, (size_t)width_px * (size_t)height_px * 3);
    stbi_image_free(decoded);
    return STV_OK;
}

#else

static stv_status decode(uint8_t *rgb, const header *h, const void *bytes, size_t n)
{
    (void)rgb, (void)h, (void)bytes, (void)n;
    return stv_fail(STV_ERR_UNSUPPORTED, "image: this build has no stb_image");
}

#endif

stv_status stv_image_decode(const void *bytes, size_t n, uint8_t *rgb, size_t rgb_bytes)
{
    header h;
    STV_TRY(walk(&h, bytes, n, true));
    if (h.refusal) return stv_fail(STV_ERR_UNSUPPORTED, "image: %s", h.refusal);
    const size_t want = (size_t)h.width_px * (size_t)h.height_px * 3;
    if (rgb_bytes != want)
        return stv_fail(STV_ERR_SHAPE, "image: %dx%d pixels want a buffer of %zu bytes, found %zu", h.width_px, h.height_px, want, rgb_bytes);
    return decode(rgb, &h, bytes, n);
}
