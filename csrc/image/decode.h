/* decode.h - bytes of an image file -> 8-bit RGB, for the files where stb_image and Pillow give the same picture.
 *
 * The models were trained on what Pillow reads. What stb_image reads differently or not safely (JPEG), and what has more in it
 * than 8-bit RGB (alpha, 16 bits, orientation, animation), is STV_ERR_UNSUPPORTED, and so is every picture when the build has
 * no stb_image: the caller then asks Pillow. Any number of threads may decode. The functions are declared in stllava.h; here are the room's limits. */
#ifndef STV_IMAGE_DECODE_H
#define STV_IMAGE_DECODE_H

#include "stllava.h"

#define STV_IMAGE_MAX_SIDE_PX 65535
#define STV_IMAGE_MAX_PIXELS 178956970 /* Pillow's own error limit */
#define STV_IMAGE_MAX_FILE_BYTES (64 << 20)
#define STV_IMAGE_MAX_SIZE_PX 4096 /* of the model's square input */

#endif
