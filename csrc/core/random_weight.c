#include "core/random_weight.h"

#include <math.h>

#include "core/dtype.h"

/* Root mean squares: of a uniform float 0.58, of a uniform nf4 code 0.55, of an fp4 code 0.47. */
qllm_random_recipe qllm_random_recipe_of(qllm_format format, int64_t cols, uint64_t seed)
{
    float deviation = 1.0f / sqrtf((float)cols);
    qllm_random_recipe recipe = {seed, 1.75f * deviation, 1.75f * deviation, 0, 0};
    if (qllm_format_is_nested(format)) { /* codes stand for -1 to 1 */
        recipe.offset = recipe.absmax;
        recipe.nested = 0.25f * recipe.absmax;
    }
    return recipe;
}

static void fill_data(qllm_qweight *w, const qllm_random_recipe *recipe)
{
    int64_t n = qllm_format_is_4bit(w->format) ? w->data_bytes : w->rows * w->cols;
    void *data = w->data;
    for (int64_t i = 0; i < n; i++)
        switch (w->format) {
        case QLLM_FORMAT_F32: ((float *)data)[i] = qllm_random_value(recipe, i); break;
        case QLLM_FORMAT_F16:
            ((uint16_t *)data)[i] = qllm_float_to_f16(qllm_random_value(recipe, i));
            break;
        case QLLM_FORMAT_BF16:
            ((uint16_t *)data)[i] = qllm_float_to_bf16(qllm_random_value(recipe, i));
            break;
        case QLLM_FORMAT_INT8: w->data[i] = qllm_random_int8(recipe, i); break;
        default: w->data[i] = qllm_random_byte(recipe, i);
        }
}

qllm_status qllm_random_weight(qllm_qweight *out, qllm_format format, int64_t rows, int64_t cols,
                               int64_t blocksize, uint64_t seed, const char *name,
                               qllm_error *error)
{
    qllm_status status = qllm_qweight_init(out, format, rows, cols, blocksize, name, error);
    if (status != QLLM_OK)
        return status;
    const qllm_random_recipe recipe = qllm_random_recipe_of(format, cols, seed);
    int64_t scales = format == QLLM_FORMAT_INT8 ? rows : qllm_qweight_blocks(out);
    fill_data(out, &recipe);
    for (int64_t i = 0; out->absmax != NULL && i < scales; i++)
        out->absmax[i] = qllm_random_scale(&recipe, QLLM_RANDOM_ABSMAX, recipe.absmax, i);
    for (int64_t i = 0; out->absmax_codes != NULL && i < scales; i++)
        out->absmax_codes[i] = (uint8_t)qllm_random_word(seed, QLLM_RANDOM_CODES, i);
    for (int64_t i = 0; out->nested_absmax != NULL && i < qllm_qweight_nested_blocks(out); i++)
        out->nested_absmax[i] = qllm_random_scale(&recipe, QLLM_RANDOM_NESTED, recipe.nested, i);
    out->offset = recipe.offset;
    return QLLM_OK;
}
