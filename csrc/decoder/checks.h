/* What a decoder refuses, on every device alike and in the same words: weights that do not fit
 * their slots, and rows that a step cannot take. */
#ifndef QLLM_DECODER_CHECKS_H
#define QLLM_DECODER_CHECKS_H

#include "decoder/slots.h"

/* What a slot is to hold: standard bytes, or unquantized values that become `format`, with a name
 * for error sentences.  bias (bias_length) or NULL. */
typedef struct qllm_weight_source {
    const char *slot;
    const qllm_qweight *weight; /* or NULL, then: */
    const qllm_tensor *values;
    qllm_format format;
    int64_t blocksize;
    const char *name;
    const float *bias;
    int64_t bias_length;
} qllm_weight_source;

qllm_format qllm_source_format(const qllm_weight_source *source);

/* Whether the source fits the linear slot that it names, which is described in *slot. */
qllm_status qllm_check_linear(const qllm_decoder_config *config, const qllm_weight_source *source,
                              int64_t *index, qllm_slot *slot, qllm_error *error);

/* The same for a vector of n values, and for the embedding, whose source needs no slot. */
qllm_status qllm_check_vector(const qllm_decoder_config *config, const char *name, int64_t n,
                              int64_t *index, qllm_slot *slot, qllm_error *error);
qllm_status qllm_check_embedding(const qllm_decoder_config *config,
                                 const qllm_weight_source *source, qllm_error *error);

/* Whether the embedding can share the head's weight, of that format if it is set. */
qllm_status qllm_check_tie(bool set, qllm_format format, qllm_error *error);

/* The index of a slot that can be read back: a linear one or the embedding. */
qllm_status qllm_check_readable(const qllm_decoder_config *config, const char *name,
                                int64_t *index, qllm_error *error);

/* Refuse a slot that is read, or needed by a step, while it is not set. */
qllm_status qllm_refuse_unset(const char *name, qllm_error *error);
qllm_status qllm_refuse_missing(const qllm_decoder_config *config, int64_t index,
                                qllm_error *error);

qllm_status qllm_check_token(const qllm_decoder_config *config, const int64_t *tokens, int64_t i,
                             qllm_error *error);

/* Row i of a step, which is at `position`.  foreign: its sequence belongs to another decoder;
 * parted: rows of other sequences stand between it and one before of its sequence.  tokens NULL:
 * rows that come as hidden states. */
typedef struct qllm_row_facts {
    int64_t position;
    bool foreign, parted;
} qllm_row_facts;
qllm_status qllm_check_row(const qllm_decoder_config *config, const qllm_row_facts *row,
                           const int64_t *tokens, int64_t i, qllm_error *error);

/* A sequence of `stored` positions that is to keep `length`. */
qllm_status qllm_check_truncation(int64_t stored, int64_t length, qllm_error *error);

#endif
