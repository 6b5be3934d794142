/* image.c - image functions: bytes of a file -> pixels -> what the tower reads. */
#include "binding.h"

static core_state *module_state(PyObject *module) { return PyModule_GetState(module); }

PyDoc_STRVAR(image_probe_doc, "image_probe(data)\n--\n\n"
                              "Reads the header of a PNG, BMP or JPEG file and decodes nothing.\n\n"
                              "Args:\n"
                              "    data: bytes of the file.\n\n"
                              "Returns:\n"
                              "    (width, height, channels, bits): pixels, pixels, 1 to 4, and bits per sample as stored.\n\n"
                              "Raises:\n"
                              "    Error: \"format\" = damaged; \"unsupported\" = another kind of file, or too large.");

static PyObject *image_probe(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", NULL};
    Py_buffer bytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*:image_probe", names, &bytes)) return NULL;
    int width_px, height_px, channels, bits;
    stv_status status = stv_image_probe(bytes.buf, (size_t)bytes.len, &width_px, &height_px, &channels, &bits);
    PyBuffer_Release(&bytes);
    if (status != STV_OK) return raise_status(module_state(module), status);
    return Py_BuildValue("iiii", width_px, height_px, channels, bits);
}

PyDoc_STRVAR(image_decode_doc,
             "image_decode(data)\n--\n\n"
             "Decodes an 8-bit RGB, grey or palette PNG or BMP file, without the GIL, to the bytes Pillow gives.\n\n"
             "Args:\n"
             "    data: bytes of the file.\n\n"
             "Returns:\n"
             "    ndarray (height, width, 3) uint8.\n\n"
             "Raises:\n"
             "    Error: \"format\" = damaged or truncated; \"unsupported\" = ask Pillow: another kind, alpha, 16 bits, too large, or a build\n"
             "    without stb_image. MemoryError.");

static PyObject *image_decode(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", NULL};
    Py_buffer bytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*:image_decode", names, &bytes)) return NULL;
    int width_px, height_px, channels, bits;
    PyObject *rgb = NULL;
    stv_status status = stv_image_probe(bytes.buf, (size_t)bytes.len, &width_px, &height_px, &channels, &bits);
    if (status == STV_OK) {
        void *data;
        rgb = array_new(KIND_U8, 3, (Py_ssize_t[]){height_px, width_px, 3}, &data);
        if (rgb) {
            Py_BEGIN_ALLOW_THREADS
            status = stv_image_decode(bytes.buf, (size_t)bytes.len, data, (size_t)width_px * (size_t)height_px * 3);
            Py_END_ALLOW_THREADS
        }
    }
    PyBuffer_Release(&bytes);
    if (status == STV_OK) return rgb;
    Py_XDECREF(rgb);
    return raise_status(module_state(module), status);
}

/* ---- preprocessing ------------------------------------------------------------------------------------------------------------- */

typedef struct picture {
    PyObject *array;
    const void *rgb;
    int width_px, height_px;
} picture;

static int take_picture(picture *p, const char *what, PyObject *value)
{
    Py_ssize_t shape[3] = {-1, -1, 3};
    if (!(p->array = array_take(value, what, KIND_U8, 3, shape, &p->rgb))) return -1;
    if (shape[0] <= INT_MAX && shape[1] <= INT_MAX) {
        p->height_px = (int)shape[0];
        p->width_px = (int)shape[1];
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: %zd x %zd pixels are too many", what, shape[1], shape[0]);
    Py_CLEAR(p->array);
    return -1;
}

static int take_background(stv_image_options *options, const char *what, PyObject *value)
{
    Py_ssize_t n = 3;
    const void *data;
    PyObject *array = array_take_list(value, what, KIND_I32, &n, &data);
    if (!array) return -1;
    const int32_t *levels = data;
    for (int i = 0; i < 3; i++) {
        if (levels[i] < 0 || levels[i] > 255) PyErr_Format(PyExc_ValueError, "%s: element %d is %d, want 0 to 255", what, i, (int)levels[i]);
        options->background[i] = (uint8_t)levels[i];
    }
    Py_DECREF(array);
    return PyErr_Occurred() ? -1 : 0;
}

static int take_three(float out[3], const char *what, PyObject *value)
{
    Py_ssize_t n = 3;
    const void *data;
    PyObject *array = array_take_list(value, what, KIND_F32, &n, &data);
    if (!array) return -1;
    for (int i = 0; i < 3; i++) out[i] = ((const float *)data)[i];
    Py_DECREF(array);
    return 0;
}

PyDoc_STRVAR(image_resize_crop_doc,
             "image_resize_crop(rgb, size, pad, background)\n--\n\n"
             "The square picture the model sees: padded to a square, or its long sides cut away; bicubic, the same bytes as Pillow's.\n\n"
             "Args:\n"
             "    rgb: (height, width, 3) uint8.\n"
             "    size: int >= 1, side of the result in pixels.\n"
             "    pad: bool. background: (r, g, b) in 0 to 255, the colour of the padding.\n\n"
             "Returns:\n"
             "    ndarray (size, size, 3) uint8.\n\n"
             "Raises:\n"
             "    ValueError, TypeError: what does not fit. MemoryError.\n\n"
             "Source: LLaVA expand2square; Transformers 4.31 CLIPImageProcessor (resize, center_crop); Pillow's resample.");

static PyObject *image_resize_crop(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"rgb", "size", "pad", "background", NULL};
    PyObject *rgb_value, *background_value, *result = NULL;
    int pad;
    stv_image_options options = {.std = {1, 1, 1}};
    picture p = {0};
    void *data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OipO:image_resize_crop", names, &rgb_value, &options.size_px, &pad, &background_value))
        return NULL;
    options.pad = pad;
    if (options.size_px < 1) return PyErr_Format(PyExc_ValueError, "image_resize_crop: size is %d, want at least 1", options.size_px);
    if (take_background(&options, "image_resize_crop: background", background_value) < 0 || take_picture(&p, "image_resize_crop: rgb", rgb_value) < 0)
        return NULL;
    stv_status status = STV_OK;
    if ((result = array_new(KIND_U8, 3, (Py_ssize_t[]){options.size_px, options.size_px, 3}, &data))) {
        Py_BEGIN_ALLOW_THREADS
        status = stv_image_resize_crop(data, p.rgb, p.width_px, p.height_px, &options);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(p.array);
    if (status == STV_OK) return result;
    Py_DECREF(result);
    return raise_status(module_state(module), status);
}

PyDoc_STRVAR(image_preprocess_doc, "image_preprocess(rgb, size, pad, background, mean, std)\n--\n\n"
                                   "image_resize_crop, then (pixel / 255 - mean) / std.\n\n"
                                   "Args:\n"
                                   "    rgb, size, pad, background: as in image_resize_crop.\n"
                                   "    mean, std: three floats each, of pixels in 0 to 1; std > 0.\n\n"
                                   "Returns:\n"
                                   "    ndarray (3, size, size) float32.\n\n"
                                   "Raises:\n"
                                   "    ValueError, TypeError: what does not fit. MemoryError.\n\n"
                                   "Source: Transformers 4.31 CLIPImageProcessor (rescale, normalize).");

static PyObject *image_preprocess(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"rgb", "size", "pad", "background", "mean", "std", NULL};
    PyObject *rgb_value, *background_value, *mean_value, *std_value, *result = NULL;
    int pad;
    stv_image_options options = {0};
    picture p = {0};
    void *data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OipOOO:image_preprocess", names, &rgb_value, &options.size_px, &pad, &background_value,
                                     &mean_value, &std_value))
        return NULL;
    options.pad = pad;
    if (options.size_px < 1) return PyErr_Format(PyExc_ValueError, "image_preprocess: size is %d, want at least 1", options.size_px);
    if (take_background(&options, "image_preprocess: background", background_value) < 0 ||
        take_three(options.mean, "image_preprocess: mean", mean_value) < 0 || take_three(options.std, "image_preprocess: std", std_value) < 0 ||
        take_picture(&p, "image_preprocess: rgb", rgb_value) < 0)
        return NULL;
    stv_status status = STV_OK;
    if ((result = array_new(KIND_F32, 3, (Py_ssize_t[]){3, options.size_px, options.size_px}, &data))) {
        Py_BEGIN_ALLOW_THREADS
        status = stv_image_preprocess(data, p.rgb, p.width_px, p.height_px, &options);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(p.array);
    if (status == STV_OK) return result;
    Py_DECREF(result);
    return raise_status(module_state(module), status);
}

PyMethodDef image_functions[] = {
    {"image_probe", KEYWORDS(image_probe), image_probe_doc},
    {"image_decode", KEYWORDS(image_decode), image_decode_doc},
    {"image_resize_crop", KEYWORDS(image_resize_crop), image_resize_crop_doc},
    {"image_preprocess", KEYWORDS(image_preprocess), image_preprocess_doc},
    {NULL, NULL, 0, NULL},
};
