/* The functions of qllm.h, which stands alone for C programs, by those of the rooms below.  It is
 * part of the static library and not of the extension. */
#include <qllm.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "core/linear_ref.h"
#include "core/logit_stats.h"
#include "core/sampler.h"
#include "cpu/linear.h"
#include "cpu/logits.h"

_Static_assert(QLLM_DONE == (int)QLLM_OK && QLLM_BAD_VALUE == (int)QLLM_VALUE &&
               QLLM_NO_MEMORY == (int)QLLM_MEMORY && QLLM_NOT_OFFERED == (int)QLLM_UNSUPPORTED &&
               QLLM_BROKEN == (int)QLLM_INTERNAL && QLLM_TEXT == (int)QLLM_ERROR_CAPACITY,
               "the codes and the texts of both headers are the same");

struct qllm_engine {
    qllm_isa isa;
    qllm_threads *threads;
    qllm_linear_options options;
};

struct qllm_matrix {
    qllm_packed *packed;
};

/* The code of a status; its sentence goes to the caller. */
static int answer(qllm_status status, const qllm_error *error, char *text)
{
    if (status != QLLM_OK && text != NULL)
        qllm_format_text(text, QLLM_TEXT, "%s", error->text);
    return (int)status;
}

/* the engine ----------------------------------------------------------------------------------- */

qllm_engine_options qllm_engine_defaults(void)
{
    return (qllm_engine_options){.int8_threshold = (double)QLLM_INT8_THRESHOLD};
}

static qllm_status create_engine(const qllm_engine_options *options, qllm_engine *engine,
                                 qllm_error *error)
{
    const char *isa = options->isa != NULL ? options->isa : getenv("QLLM_CPU");
    const char *compute = options->compute != NULL ? options->compute : "auto";
    if (options->threads < 0)
        return qllm_fail(error, QLLM_VALUE, "threads: %d, expected 1 or more, or 0 for one "
                         "per core", options->threads);
    if (isnan(options->int8_threshold))
        return qllm_fail(error, QLLM_VALUE, "int8_threshold: NaN was given; use 6, or 0 for no "
                         "outliers");
    qllm_status status = qllm_isa_choose(isa, &engine->isa, error);
    if (status == QLLM_OK)
        status = qllm_compute_find(compute, &engine->options.compute, error);
    engine->options.int8_threshold = (float)options->int8_threshold;
    return status == QLLM_OK ? qllm_threads_create(options->threads, &engine->threads, error)
                             : status;
}

int qllm_engine_create(const qllm_engine_options *options, qllm_engine **out, char *text)
{
    const qllm_engine_options defaults = qllm_engine_defaults();
    void *memory = NULL;
    qllm_error error;
    *out = NULL;
    qllm_status status = qllm_alloc(&memory, 1, sizeof(qllm_engine), "an engine", &error);
    if (status == QLLM_OK)
        status = create_engine(options != NULL ? options : &defaults, memory, &error);
    if (status == QLLM_OK)
        *out = memory;
    else
        qllm_free(memory);
    return answer(status, &error, text);
}

void qllm_engine_free(qllm_engine *engine)
{
    if (engine == NULL)
        return;
    qllm_threads_destroy(engine->threads);
    qllm_free(engine);
}

const char *qllm_engine_isa(const qllm_engine *engine)
{
    return qllm_isa_name(engine->isa);
}

int qllm_engine_threads(const qllm_engine *engine)
{
    return qllm_threads_count(engine->threads);
}

/* matrices ------------------------------------------------------------------------------------- */

static qllm_packer packer_of(const qllm_engine *engine)
{
    return (qllm_packer){qllm_encode_ops_get(engine->isa), engine->threads};
}

static qllm_status find_dtype(const char *name, qllm_dtype *out, qllm_error *error)
{
    for (int i = QLLM_F32; i <= QLLM_BF16; i++)
        if (strcmp(name, qllm_dtype_name((qllm_dtype)i)) == 0) {
            *out = (qllm_dtype)i;
            return QLLM_OK;
        }
    return qllm_fail(error, QLLM_VALUE, "dtype: '%.64s' is unknown; use float32, float16 or "
                     "bfloat16", name);
}

static qllm_status quantize(const qllm_engine *engine, qllm_tensor *source, const char *dtype,
                            const char *name, int64_t blocksize, qllm_packed **out,
                            qllm_error *error)
{
    const qllm_packer packer = packer_of(engine);
    qllm_format format;
    int64_t size;
    qllm_status status = find_dtype(dtype, &source->dtype, error);
    if (status != QLLM_OK)
        return status;
    if (!qllm_format_parse(name, &format))
        return qllm_fail(error, QLLM_VALUE, "format: '%.64s' is unknown; use nf4, nf4-dq, fp4, "
                         "fp4-dq, int8, bf16, f16 or f32", name);
    if (source->rows < 1 || source->cols < 1 ||
        !qllm_checked_mul(source->rows, source->cols, &size) ||
        !qllm_checked_mul(size, qllm_dtype_size(source->dtype), &source->nbytes))
        return qllm_fail(error, QLLM_VALUE, "values: a shape of (%lld, %lld) cannot be used",
                         (long long)source->rows, (long long)source->cols);
    return qllm_pack_source(&packer, source, format,
                            blocksize != 0 ? blocksize : QLLM_BLOCKSIZE_DEFAULT, "values", out,
                            error);
}

int qllm_matrix_quantize(qllm_engine *engine, const void *values, const char *dtype, int64_t rows,
                         int64_t cols, const char *format, int64_t blocksize, qllm_matrix **out,
                         char *text)
{
    qllm_tensor source = {.data = values, .rows = rows, .cols = cols};
    void *memory = NULL;
    qllm_error error;
    *out = NULL;
    qllm_status status = qllm_alloc(&memory, 1, sizeof(qllm_matrix), "a matrix", &error);
    if (status == QLLM_OK)
        status = quantize(engine, &source, dtype, format, blocksize,
                          &((qllm_matrix *)memory)->packed, &error);
    if (status == QLLM_OK)
        *out = memory;
    else
        qllm_free(memory);
    return answer(status, &error, text);
}

void qllm_matrix_free(qllm_matrix *matrix)
{
    if (matrix == NULL)
        return;
    qllm_packed_destroy(matrix->packed);
    qllm_free(matrix);
}

int64_t qllm_matrix_rows(const qllm_matrix *matrix)
{
    return qllm_packed_rows(matrix->packed);
}

int64_t qllm_matrix_cols(const qllm_matrix *matrix)
{
    return qllm_packed_cols(matrix->packed);
}

int64_t qllm_matrix_bytes(const qllm_matrix *matrix)
{
    return qllm_packed_nbytes(matrix->packed);
}

int qllm_matrix_dequantize(qllm_engine *engine, const qllm_matrix *matrix, float *out, char *text)
{
    const qllm_packer packer = packer_of(engine);
    qllm_qweight standard;
    qllm_error error;
    qllm_status status = qllm_unpack(&packer, matrix->packed, &standard, &error);
    if (status == QLLM_OK) {
        qllm_dequantize(&standard, 0, standard.rows * standard.cols, out);
        qllm_qweight_clear(&standard);
    }
    return answer(status, &error, text);
}

int qllm_matrix_multiply(qllm_engine *engine, const qllm_matrix *matrix, const float *x, int64_t n,
                         const float *bias, float *y, char *text)
{
    const int64_t rows = qllm_matrix_rows(matrix), cols = qllm_matrix_cols(matrix);
    const int64_t bytes = n < 0 ? -1 : qllm_cpu_linear_scratch(cols, n);
    const qllm_linear_part part = {matrix->packed, bias, y, rows};
    void *scratch = NULL;
    qllm_error error;
    qllm_status status =
        bytes < 0 ? qllm_fail(&error, QLLM_VALUE, "n: %lld rows cannot be used", (long long)n)
                  : qllm_alloc_scratch(&scratch, bytes, 1, "the rounded form of x", &error);
    if (status == QLLM_OK && n > 0)
        qllm_cpu_linear(engine->threads, qllm_cpu_ops_get(engine->isa), &part, 1, x, n, cols,
                        &engine->options, scratch);
    qllm_free(scratch);
    return answer(status, &error, text);
}

const char *qllm_matrix_kernel(const qllm_engine *engine, const qllm_matrix *matrix, int64_t n)
{
    const qllm_cpu_ops *ops = qllm_cpu_ops_get(engine->isa);
    qllm_tier tier = qllm_cpu_linear_tier(ops, matrix->packed, engine->options.compute);
    return ops->linear_name(matrix->packed, tier, n);
}

/* logits --------------------------------------------------------------------------------------- */

qllm_draw_options qllm_draw_defaults(void)
{
    const qllm_sampling s = qllm_sampling_default();
    return (qllm_draw_options){s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty,
                               s.seed, s.prompt};
}

int qllm_draw_token(qllm_engine *engine, const float *logits, int64_t vocab,
                    const qllm_draw_options *options, const int64_t *history, int64_t n_history,
                    uint32_t step, qllm_drawn *out, char *text)
{
    const qllm_draw_options defaults = qllm_draw_defaults(), *o = options ? options : &defaults;
    const qllm_sampling sampling = {
        .temperature = o->temperature, .top_k = o->top_k, .top_p = o->top_p, .min_p = o->min_p,
        .repetition_penalty = o->repetition_penalty, .seed = o->seed, .prompt = o->prompt,
    };
    const int64_t bytes = qllm_sample_scratch(vocab);
    void *scratch = NULL;
    qllm_sampled drawn;
    qllm_error error;
    qllm_status status = qllm_alloc_scratch(&scratch, bytes < 0 ? 0 : bytes, 1, "a draw", &error);
    if (status == QLLM_OK) /* a vocabulary that cannot be used is refused before scratch is used */
        status = qllm_sample(qllm_logit_ops_get(engine->isa), logits, vocab, &sampling, history,
                             n_history, step, scratch, &drawn, &error);
    qllm_free(scratch);
    if (status == QLLM_OK)
        *out = (qllm_drawn){drawn.token, drawn.logprob, drawn.sampling_logprob};
    return answer(status, &error, text);
}

static qllm_status compare(const qllm_engine *engine, const float *reference, const float *test,
                           int64_t vocab, double temperature, void *scratch, qllm_comparison *out,
                           qllm_error *error)
{
    double max_ref, delta_p, cross, log_z_ref; /* that a comparison leaves out */
    int same_top;
    const qllm_logit_stats stats = {
        .kl = &out->kl, .kl_reverse = &out->kl_reverse, .tv = &out->tv,
        .disagreement = &out->disagreement, .entropy_ref = &out->entropy_reference,
        .entropy_test = &out->entropy_test, .max_ref = &max_ref, .delta_p = &delta_p,
        .cross = &cross, .log_z_ref = &log_z_ref,
    };
    return qllm_logit_stats_row(qllm_logit_ops_get(engine->isa), reference, test, vocab,
                                &temperature, 1, -1, scratch, &stats, &same_top, error);
}

int qllm_compare_logits(qllm_engine *engine, const float *reference, const float *test,
                        int64_t vocab, double temperature, qllm_comparison *out, char *text)
{
    const int64_t bytes = qllm_logit_stats_scratch(vocab);
    qllm_comparison found;
    void *scratch = NULL;
    qllm_error error;
    qllm_status status =
        bytes < 0 ? qllm_fail(&error, QLLM_VALUE, "vocab: %lld tokens cannot be used",
                              (long long)vocab)
                  : qllm_alloc_scratch(&scratch, bytes, 1, "a comparison", &error);
    if (status == QLLM_OK)
        status = compare(engine, reference, test, vocab, temperature, scratch, &found, &error);
    qllm_free(scratch);
    if (status == QLLM_OK)
        *out = found;
    return answer(status, &error, text);
}
