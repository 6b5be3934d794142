/* decode.h - bytes of an image file -> 8-bit RGB, for the files where stb_image and Pillow give the same picture.
 *
 * The models were trained on what Pillow reads. What stb_image reads differently or not safely (JPEG), and what has more in it
 * than 8-bit RGB (alpha, 16 bits, orientation, animation), is STV_ERR_UNSUPPORTED, and so is every picture when the build has
 * no stb_image: the caller then asks Pillow. Any number of threads may decode. */
#ifndef STV_IMAGE_DECODE_H
#define STV_IMAGE_DECODE_H

#include "base/status.h"

#include <stddef.h>
#include <stdint.h>

#define STV_IMAGE_MAX_SIDE_PX 65535
#define STV_IMAGE_MAX_PIXELS 178956970 /* Pillow's own error limit */
#define STV_IMAGE_MAX_FILE_BYTES (64 << 20)

/* Reads the header of a PNG, BMP or JPEG file, decodes nothing. channels: 1 grey, 2 grey + alpha, 3 colour or palette,
 * 4 colour + alpha or CMYK; bits: per sample as stored (palette: 8). Errors: format; unsupported = another kind of file, or
 * beyond the limits above. */
stv_status stv_image_probe(const void *bytes, size_t n, int *width_px, int *height_px, int *channels, int *bits);

/* Fills rgb (height_px, width_px, 3); rgb_bytes must be exactly that. The whole file is checked first: PNG structure and
 * checksums, BMP length. Errors: format = damaged or truncated; unsupported; shape. */
stv_status stv_image_decode(const void *bytes, size_t n, uint8_t *rgb, size_t rgb_bytes);

#endif
