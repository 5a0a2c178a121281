#include "cpu/encode.h"

#include <math.h>
#include <string.h>

#include "core/codebook.h"

const qllm_encode_ops *qllm_encode_ops_get(qllm_isa isa)
{
    switch (isa) {
#if defined(__x86_64__)
    case QLLM_ISA_AVX2: return &qllm_encode_ops_avx2;
    case QLLM_ISA_AVX512: /* the sets beyond differ in their linear layers alone */
    case QLLM_ISA_AVX512_VBMI:
    case QLLM_ISA_AVX512_BF16:
    case QLLM_ISA_AVX512_AMX: return &qllm_encode_ops_avx512;
#elif defined(__aarch64__)
    case QLLM_ISA_NEON: return &qllm_encode_ops_neon;
    case QLLM_ISA_NEONDOT: return &qllm_encode_ops_neondot;
#endif
    default: return &qllm_encode_ops_scalar;
    }
}

/* As the lanes compute it: any monotone function of x serves, if it is the same one. */
static int bin_of(float x)
{
    return 16 + (int)(fmaf(x, QLLM_BIN_SCALE, 12582912.0f) - 12582912.0f);
}

void qllm_code_table_init(qllm_code_table *table, bool is_fp4)
{
    qllm_encoder encoder = is_fp4 ? qllm_fp4_encoder() : qllm_nf4_encoder();
    uint8_t zero = is_fp4 ? qllm_fp4_encode(0.0f) : qllm_nf4_encode(0.0f);
    int n_extra = 0;
    *table = (qllm_code_table){.is_fp4 = is_fp4, .zero = (uint8_t)(zero << 4 | zero)};
    memcpy(table->codes, encoder.codes, sizeof table->codes);
    memcpy(table->thresholds, encoder.thresholds, sizeof encoder.thresholds);
    table->thresholds[15] = INFINITY;
    for (int b = 0; b < QLLM_BIN_COUNT; b++)
        table->bin_threshold[b] = INFINITY;
    for (int i = 0; i < QLLM_EXTRA_COUNT; i++)
        table->extra[i] = INFINITY;
    for (int i = 0; i < 15; i++) {
        float t = encoder.thresholds[i];
        bool is_extra = is_fp4 && t != 0.0f && fabsf(t) < 0.01f;
        if (is_extra) {
            table->extra[n_extra++] = t;
            continue;
        }
        table->bin_threshold[bin_of(t)] = t;
        for (int b = bin_of(t) + 1; b < QLLM_BIN_COUNT; b++)
            table->base[b]++;
    }
}

static int nested_bin(float x)
{
    uint32_t bits = qllm_bits_from_float(x), magnitude = bits & 0x7fffffffu;
    magnitude = magnitude < QLLM_NESTED_LOWEST ? QLLM_NESTED_LOWEST : magnitude;
    int bin = (int)((magnitude - QLLM_NESTED_LOWEST) >> QLLM_NESTED_SHIFT);
    return bin + (bits >> 31 ? QLLM_NESTED_BINS : 0);
}

/* x is nearer to the upper of two neighbours when it exceeds their midpoint, which float64 holds
 * exactly: when it exceeds the largest float32 that is not above the midpoint. */
static float midpoint_below(float low, float high)
{
    double middle = 0.5 * ((double)low + (double)high);
    float nearest = (float)middle;
    return (double)nearest > middle ? nextafterf(nearest, -INFINITY) : nearest;
}

void qllm_nested_table_init(qllm_nested_table *table)
{
    for (int b = 0; b < 2 * QLLM_NESTED_BINS; b++)
        table->threshold[b] = INFINITY;
    memset(table->base, 0, sizeof table->base);
    for (int i = 0; i < 255; i++) {
        float t = midpoint_below(qllm_dynamic_map[i], qllm_dynamic_map[i + 1]);
        table->threshold[nested_bin(t)] = t;
    }
    float count = 0.0f; /* ascending: negative bins from the largest magnitude on, then positive */
    for (int b = 2 * QLLM_NESTED_BINS - 1; b >= QLLM_NESTED_BINS; b--) {
        table->base[b] = count;
        count += table->threshold[b] < INFINITY;
    }
    for (int b = 0; b < QLLM_NESTED_BINS; b++) {
        table->base[b] = count;
        count += table->threshold[b] < INFINITY;
    }
}
