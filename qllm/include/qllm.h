/* qllm for C and C++ programs: quantized matrices, products with them, draws of tokens, and what
 * separates two rows of logits.  Nothing of Python is needed.
 *
 * The library is made by `python setup.py static_library` (docs/c-api.md); link with
 * -lqllm -lm -lpthread.  This header stands alone.
 *
 * Every function that can fail returns QLLM_DONE or one of the other codes, and then writes one
 * sentence for the user into `text`: QLLM_TEXT bytes that the caller owns, or NULL.  Nothing is
 * changed by a call that fails.  The library never prints, exits or aborts.  Matrices are
 * row-major and contiguous.  All functions may be called from any thread; an object is freed when
 * no other call uses it. */
#ifndef QLLM_H
#define QLLM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { QLLM_TEXT = 512 }; /* bytes of a sentence, its end included */

enum {
    QLLM_DONE = 0,
    QLLM_BAD_VALUE = 1,    /* a value, shape or name that cannot be used */
    QLLM_NO_MEMORY = 2,
    QLLM_NOT_OFFERED = 3,  /* understood, but not by this build or machine */
    QLLM_BROKEN = 4        /* an error of the library's own: please report it */
};

/* the engine: kernels and threads -------------------------------------------------------------- */

typedef struct qllm_engine qllm_engine;

typedef struct qllm_engine_options {
    const char *isa;        /* instruction set: "avx2", ...; NULL: QLLM_CPU of the environment, or
                               the best that this machine has */
    const char *compute;    /* "exact", "auto" or "int8": to what activations are rounded
                               (docs/compute.md); NULL: "auto" */
    int threads;            /* the caller included; 0: QLLM_THREADS of the environment, or one per
                               physical core */
    double int8_threshold;  /* int8 weights: activations of at least this size are not rounded
                               (LLM.int8(), arXiv 2208.07339); <= 0: all are rounded */
} qllm_engine_options;

/* {NULL, NULL, 0, 6.0} */
qllm_engine_options qllm_engine_defaults(void);

/* `options` NULL: the defaults.  *out is for qllm_engine_free; on failure it is NULL. */
int qllm_engine_create(const qllm_engine_options *options, qllm_engine **out, char *text);
void qllm_engine_free(qllm_engine *engine); /* NULL is allowed */

const char *qllm_engine_isa(const qllm_engine *engine); /* of the kernels: "avx512"; static */
int qllm_engine_threads(const qllm_engine *engine);

/* quantized matrices --------------------------------------------------------------------------- */

typedef struct qllm_matrix qllm_matrix;

/* Quantizes values (rows, cols) of `dtype` "float32", "float16" or "bfloat16" to `format`: "nf4",
 * "fp4", "nf4-dq", "fp4-dq" (QLoRA, arXiv 2305.14314), "int8" (LLM.int8()), "f32", "f16" or "bf16".
 * blocksize: weights that share a scale in a 4-bit format, a power of two from 32 to 4096; 0 means
 * 64.  NaN and infinity are refused.  *out is for qllm_matrix_free; on failure it is NULL. */
int qllm_matrix_quantize(qllm_engine *engine, const void *values, const char *dtype, int64_t rows,
                         int64_t cols, const char *format, int64_t blocksize, qllm_matrix **out,
                         char *text);
void qllm_matrix_free(qllm_matrix *matrix); /* NULL is allowed */

int64_t qllm_matrix_rows(const qllm_matrix *matrix);
int64_t qllm_matrix_cols(const qllm_matrix *matrix);
int64_t qllm_matrix_bytes(const qllm_matrix *matrix); /* of memory held, padding included */

/* The weights as they are after quantization, into out (rows, cols). */
int qllm_matrix_dequantize(qllm_engine *engine, const qllm_matrix *matrix, float *out, char *text);

/* y (n, rows) = x (n, cols) W^T + bias (rows) or NULL.  A row of y depends on its row of x alone
 * and has the same bits with any n and any number of threads.  x and y do not overlap. */
int qllm_matrix_multiply(qllm_engine *engine, const qllm_matrix *matrix, const float *x, int64_t n,
                         const float *bias, float *y, char *text);

/* The kernel that multiplies n rows: "nf4 avx512, fused, few rows"; static. */
const char *qllm_matrix_kernel(const qllm_engine *engine, const qllm_matrix *matrix, int64_t n);

/* draws of tokens ------------------------------------------------------------------------------ */

typedef struct qllm_draw_options {
    double temperature;        /* >= 0; 0 takes the largest logit, the lowest id among equals */
    int64_t top_k;             /* keep the k largest logits; 0: all */
    double top_p;              /* (0, 1]: keep the fewest tokens that hold this probability */
    double min_p;              /* [0, 1]: keep tokens of at least this share of the largest */
    double repetition_penalty; /* > 0; 1: none */
    uint64_t seed, prompt;     /* a draw depends on (seed, prompt, step, token id) alone */
} qllm_draw_options;

/* {1, 0, 1, 0, 1, 0, 0}: plain sampling. */
qllm_draw_options qllm_draw_defaults(void);

typedef struct qllm_drawn {
    int64_t token;
    float logprob;          /* log softmax(logits)[token], nats */
    float sampling_logprob; /* the same of the distribution that was drawn from; 0 when greedy */
} qllm_drawn;

/* One draw from softmax(logits / temperature) after the filters (docs/sampling.md).  logits (vocab)
 * are finite, or -inf for tokens that cannot be drawn; history (n_history) holds the ids that the
 * repetition penalty looks at; `step` counts the tokens of a text.  `options` NULL: defaults. */
int qllm_draw_token(qllm_engine *engine, const float *logits, int64_t vocab,
                    const qllm_draw_options *options, const int64_t *history, int64_t n_history,
                    uint32_t step, qllm_drawn *out, char *text);

/* what separates two rows of logits ------------------------------------------------------------ */

typedef struct qllm_comparison {
    double kl;           /* KL(p || q) of p = softmax(reference / T), q = softmax(test / T), nats */
    double kl_reverse;   /* KL(q || p) */
    double tv;           /* total variation, 0.5 sum |p - q| */
    double disagreement; /* probability that draws with common noise differ */
    double entropy_reference, entropy_test; /* nats */
} qllm_comparison;

/* reference and test (vocab), temperature >= 0.  Equal rows give exactly 0. */
int qllm_compare_logits(qllm_engine *engine, const float *reference, const float *test,
                        int64_t vocab, double temperature, qllm_comparison *out, char *text);

#ifdef __cplusplus
}
#endif

#endif
