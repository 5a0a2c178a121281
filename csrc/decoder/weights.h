/* The weights of a decoder on the CPU, by slot: packed linear layers with their biases, float32
 * vectors, the embedding as standard bytes. */
#ifndef QLLM_DECODER_WEIGHTS_H
#define QLLM_DECODER_WEIGHTS_H

#include "cpu/packed.h"
#include "decoder/slots.h"

typedef struct qllm_weight {
    qllm_packed *packed;  /* linear slots; NULL: not set */
    float *values;        /* vector slots: the vector; linear slots: the bias, or NULL */
} qllm_weight;

typedef struct qllm_weights {
    int64_t count;
    qllm_weight *slots;     /* (count), in the order of decoder/slots.h */
    qllm_qweight embedding; /* rows 0: not set */
} qllm_weights;

qllm_status qllm_weights_init(const qllm_decoder_config *config, qllm_weights *weights,
                              qllm_error *error);
void qllm_weights_clear(qllm_weights *weights);

/* A weight made ready outside of any lock (this is where packing takes its time), then exchanged
 * with what the slot holds; the caller clears what it gets back.  `index` is the slot's. */
qllm_status qllm_weight_pack(const qllm_decoder_config *config, const char *slot,
                             const qllm_qweight *source, const float *bias, int64_t bias_length,
                             int64_t *index, qllm_weight *out, qllm_error *error);
qllm_status qllm_weight_vector(const qllm_decoder_config *config, const char *slot,
                               const float *values, int64_t n, int64_t *index, qllm_weight *out,
                               qllm_error *error);
qllm_status qllm_weight_embedding(const qllm_decoder_config *config, const qllm_qweight *source,
                                  qllm_qweight *out, qllm_error *error);
void qllm_weight_clear(qllm_weight *weight);

bool qllm_weights_is_set(const qllm_weights *weights, const qllm_decoder_config *config,
                         int64_t index);

/* The first slot that is needed and not set, or -1. */
int64_t qllm_weights_missing(const qllm_weights *weights, const qllm_decoder_config *config);

/* Standard bytes of a linear slot or of the embedding. */
qllm_status qllm_weights_get(const qllm_weights *weights, const qllm_decoder_config *config,
                             const char *slot, qllm_qweight *out, qllm_error *error);

/* Bytes held by linear layers, biases and vectors; by the embedding. */
void qllm_weights_nbytes(const qllm_weights *weights, const qllm_decoder_config *config,
                         int64_t *linear, int64_t *embedding);

/* Row `token` of the embedding as float32 (hidden). */
void qllm_weights_embed(const qllm_weights *weights, int64_t token, float *out);

/* A deep copy of standard bytes. */
qllm_status qllm_qweight_copy(const qllm_qweight *source, const char *name, qllm_qweight *out,
                              qllm_error *error);

#endif
