/* The weights of a decoder on the CPU, by slot: packed linear layers with their biases, float32
 * vectors, the packed embedding. */
#ifndef QLLM_DECODER_WEIGHTS_H
#define QLLM_DECODER_WEIGHTS_H

#include "cpu/packed.h"
#include "decoder/checks.h"

typedef struct qllm_weight {
    qllm_packed *packed;  /* linear slots; NULL: not set */
    float *values;        /* vector slots: the vector; linear slots: the bias, or NULL */
} qllm_weight;

typedef struct qllm_weights {
    int64_t count;
    qllm_weight *slots;     /* (count), in the order of decoder/slots.h */
    qllm_packed *embedding; /* a float format; NULL: not set.  Where it is that of the head, they
                               share it: what replaces one of them leaves it to the other. */
} qllm_weights;

qllm_status qllm_weights_init(const qllm_decoder_config *config, qllm_weights *weights,
                              qllm_error *error);
void qllm_weights_clear(qllm_weights *weights);

/* A weight made ready outside of any lock (this is where packing takes its time), then exchanged
 * with what the slot holds.  `index` is the slot's. */
qllm_status qllm_weight_pack(const qllm_decoder_config *config, const qllm_packer *packer,
                             const qllm_weight_source *source, int64_t *index, qllm_weight *out,
                             qllm_error *error);
qllm_status qllm_weight_vector(const qllm_decoder_config *config, const char *slot,
                               const float *values, int64_t n, int64_t *index, qllm_weight *out,
                               qllm_error *error);
/* slot and bias of `source` are not used. */
qllm_status qllm_weight_embedding(const qllm_decoder_config *config, const qllm_packer *packer,
                                  const qllm_weight_source *source, qllm_packed **out,
                                  qllm_error *error);

/* Puts *fresh in; what was there is in *fresh afterwards, for the caller to clear. */
void qllm_weights_exchange(qllm_weights *weights, const qllm_decoder_config *config, int64_t index,
                           qllm_weight *fresh);
void qllm_weights_exchange_embedding(qllm_weights *weights, const qllm_decoder_config *config,
                                     qllm_packed **fresh);

/* Lets the embedding be the head's weight, held once; *old is what the caller destroys. */
qllm_status qllm_weights_tie(qllm_weights *weights, const qllm_decoder_config *config,
                             qllm_packed **old, qllm_error *error);
void qllm_weight_clear(qllm_weight *weight);

bool qllm_weights_is_set(const qllm_weights *weights, const qllm_decoder_config *config,
                         int64_t index);

/* The first slot in [begin, end) that is needed and not set, or -1. */
int64_t qllm_weights_missing(const qllm_weights *weights, const qllm_decoder_config *config,
                             int64_t begin, int64_t end);

/* The weight of a linear slot or of the embedding. */
qllm_status qllm_weights_find(const qllm_weights *weights, const qllm_decoder_config *config,
                              const char *slot, const qllm_packed **out, qllm_error *error);

/* Bytes held by linear layers, biases and vectors; by an embedding that is not the head's. */
void qllm_weights_nbytes(const qllm_weights *weights, const qllm_decoder_config *config,
                         int64_t *linear, int64_t *embedding);

/* Row `token` of the embedding as float32 (hidden). */
void qllm_weights_embed(const qllm_weights *weights, int64_t token, float *out);

#endif
