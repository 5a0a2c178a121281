#include "cpu/image.h"

#include <inttypes.h>
#include <string.h>

#include "core/checked.h"
#include "cpu/image_open.h"
#include "cpu/packing.h"

/* The header; the arrays follow in the order of list_parts, each on a line of its own. */
typedef struct image_header {
    uint64_t magic;
    int64_t header_bytes;
    qllm_packed packed; /* without its pointers */
} image_header;

static const uint64_t MAGIC = 0x31676d696d6c6c71u; /* "qllmimg1", little-endian */

/* One array: where its pointer stands in a packed weight, and its bytes. */
typedef struct part {
    void *pointer;
    int64_t bytes;
} part;

enum { PARTS = 8 };

static void list_parts(qllm_packed *p, part parts[PARTS])
{
    bool bytes = p->layout == QLLM_LAYOUT_BYTES, nested = qllm_packed_nested(p);
    int64_t row_values = p->layout == QLLM_LAYOUT_INT8 ? p->tiles * QLLM_TILE_ROWS * 4 : 0;
    int64_t blocks = bytes ? qllm_qweight_blocks(&p->standard) : 0;
    int64_t groups = bytes ? qllm_qweight_nested_blocks(&p->standard) : 0;
    parts[0] = (part){&p->data, p->data_bytes};
    parts[1] = (part){&p->nested_absmax, p->nested_bytes};
    parts[2] = (part){&p->row_absmax, row_values};
    parts[3] = (part){&p->row_sums, row_values};
    parts[4] = (part){&p->standard.data, bytes ? p->standard.data_bytes : 0};
    parts[5] = (part){&p->standard.absmax, nested ? 0 : blocks * 4};
    parts[6] = (part){&p->standard.absmax_codes, nested ? blocks : 0};
    parts[7] = (part){&p->standard.nested_absmax, groups * 4};
}

static bool advance(int64_t *at, int64_t bytes)
{
    int64_t padded;
    return qllm_checked_round_up(bytes, QLLM_LINE, &padded) && qllm_checked_add(*at, padded, at);
}

/* The bytes of an image with these parts, or false. */
static bool total_bytes(const part parts[PARTS], int64_t *bytes)
{
    *bytes = 0;
    bool fits = advance(bytes, sizeof(image_header));
    for (int i = 0; i < PARTS; i++)
        fits = fits && advance(bytes, parts[i].bytes);
    return fits;
}

qllm_status qllm_image_size(const qllm_qweight *like, const char *name, int64_t *bytes,
                            qllm_error *error)
{
    qllm_packed packed;
    part parts[PARTS];
    qllm_status status = qllm_packed_measure(like, name, &packed, error);
    if (status != QLLM_OK)
        return status;
    packed.standard = *like;
    list_parts(&packed, parts);
    if (!total_bytes(parts, bytes))
        return qllm_fail(error, QLLM_MEMORY, "%s: the packed form is larger than can be addressed",
                         name);
    return QLLM_OK;
}

int64_t qllm_image_bytes(const qllm_packed *packed)
{
    qllm_packed copy = *packed;
    part parts[PARTS];
    int64_t bytes;
    list_parts(&copy, parts);
    return total_bytes(parts, &bytes) ? bytes : -1; /* of arrays in memory, it fits */
}

void qllm_image_write(const qllm_packed *packed, void *data)
{
    uint8_t *base = data;
    qllm_packed copy = *packed;
    part parts[PARTS];
    int64_t at = 0;
    image_header *header = data;
    list_parts(&copy, parts);
    advance(&at, sizeof *header);
    memset(data, 0, (size_t)at);
    for (int i = 0; i < PARTS; i++) {
        const void *from;
        int64_t start = at;
        memcpy(&from, parts[i].pointer, sizeof from);
        advance(&at, parts[i].bytes);
        if (parts[i].bytes > 0)
            memcpy(base + start, from, (size_t)parts[i].bytes);
        memset(base + start + parts[i].bytes, 0, (size_t)(at - start - parts[i].bytes));
        memset(parts[i].pointer, 0, sizeof from);
    }
    header->magic = MAGIC;
    header->header_bytes = sizeof *header;
    header->packed = copy;
}

static qllm_status refuse(const char *what, qllm_error *error)
{
    return qllm_fail(error, QLLM_VALUE, "the packed weight %s; load the layer's state dict, or "
                     "make the layer again from its weight", what);
}

/* Format, shape and blocksize of an image, checked. */
static qllm_status read_header(const qllm_image *image, qllm_qweight *like, qllm_error *error)
{
    const image_header *header = image->data;
    uint64_t magic = 0;
    if (image->bytes >= (int64_t)sizeof *header)
        memcpy(&magic, image->data, sizeof magic); /* of any alignment */
    if (magic != MAGIC)
        return refuse("holds none: it was not set, or something else was put in its place", error);
    if ((uintptr_t)image->data % QLLM_IMAGE_ALIGNMENT != 0)
        return qllm_fail(error, QLLM_VALUE, "the packed weight is not aligned to %d bytes; copy it "
                         "(clone) first", QLLM_IMAGE_ALIGNMENT);
    if (header->header_bytes != sizeof *header)
        return refuse("is damaged", error);
    const qllm_packed *p = &header->packed;
    if ((unsigned)p->format >= QLLM_FORMAT_COUNT ||
        qllm_qweight_describe(like, p->format, p->rows, p->cols, p->blocksize, "the packed weight",
                              error) != QLLM_OK)
        return refuse("is damaged", error);
    return QLLM_OK;
}

qllm_status qllm_image_open(const qllm_image *image, qllm_packed *out, qllm_error *error)
{
    const image_header *header = image->data;
    qllm_qweight like;
    part parts[PARTS];
    int64_t bytes, at = 0;
    qllm_status status = read_header(image, &like, error);
    if (status != QLLM_OK)
        return status;
    *out = header->packed;
    if (qllm_packed_measure(&like, "the packed weight", out, error) != QLLM_OK)
        return refuse("is damaged", error);
    memcpy(like.code, out->standard.code, sizeof like.code);
    memcpy(like.nested_code, out->standard.nested_code, sizeof like.nested_code);
    like.offset = out->standard.offset;
    out->standard = like;
    list_parts(out, parts);
    if (!total_bytes(parts, &bytes) || bytes != image->bytes)
        return refuse("is damaged", error);
    advance(&at, sizeof *header);
    for (int i = 0; i < PARTS; i++) {
        const uint8_t *part = parts[i].bytes > 0 ? (const uint8_t *)image->data + at : NULL;
        memcpy(parts[i].pointer, &part, sizeof part);
        advance(&at, parts[i].bytes);
    }
    return QLLM_OK;
}

qllm_status qllm_image_describe(const qllm_image *image, qllm_qweight *out, qllm_error *error)
{
    qllm_packed packed;
    qllm_status status = qllm_image_open(image, &packed, error);
    if (status != QLLM_OK)
        return status;
    return qllm_qweight_describe(out, packed.format, packed.rows, packed.cols, packed.blocksize,
                                 "the packed weight", error);
}

qllm_status qllm_image_unpack(const qllm_packer *packer, const qllm_image *image,
                              qllm_qweight *out, qllm_error *error)
{
    qllm_packed packed;
    qllm_status status = qllm_image_open(image, &packed, error);
    return status == QLLM_OK ? qllm_unpack(packer, &packed, out, error) : status;
}

qllm_status qllm_image_error(const qllm_packer *packer, const qllm_image *image,
                             const qllm_tensor *source, const char *name, qllm_quant_error *out,
                             qllm_error *error)
{
    qllm_packed packed;
    qllm_status status = qllm_image_open(image, &packed, error);
    return status == QLLM_OK ? qllm_packed_error(packer, &packed, source, name, out, error)
                             : status;
}

qllm_status qllm_image_dequantize(const qllm_packer *packer, const qllm_image *image,
                                  int64_t first, int64_t n, qllm_dtype dtype, void *out,
                                  qllm_error *error)
{
    qllm_packed packed;
    qllm_status status = qllm_image_open(image, &packed, error);
    if (status != QLLM_OK)
        return status;
    if (first < 0 || n < 0 || first > packed.rows || n > packed.rows - first)
        return qllm_fail(error, QLLM_VALUE, "rows: %" PRId64 " from %" PRId64 " on were asked for, "
                         "but the weight has %" PRId64, n, first, packed.rows);
    return qllm_packed_dequantize(packer, &packed, first, n, dtype, out, error);
}
