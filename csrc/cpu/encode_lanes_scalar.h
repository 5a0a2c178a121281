/* What encoding needs of sixteen lanes beyond lanes_scalar.h, in plain C; encode_lanes_avx2.h and
 * encode_lanes_avx512.h are the same with registers. */
#ifndef QLLM_CPU_ENCODE_LANES_SCALAR_H
#define QLLM_CPU_ENCODE_LANES_SCALAR_H

#include "cpu/encode.h"
#include "cpu/lanes_scalar.h"

QLLM_INLINE void ilanes_store(void *p, ilanes a) { memcpy(p, a.v, sizeof a.v); }

/* the first n (0 .. 64) bytes of p, zeros behind; the first n bytes to p */
QLLM_INLINE ilanes ilanes_load_bytes(const void *p, int64_t n)
{
    ilanes out = ilanes_set1(0);
    memcpy(out.v, p, (size_t)n);
    return out;
}

QLLM_INLINE void ilanes_store_bytes(void *p, ilanes a, int64_t n) { memcpy(p, a.v, (size_t)n); }

QLLM_INLINE ilanes ilanes_sub(ilanes a, ilanes b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] -= b.v[i];
    return a;
}

/* all ones where the dword is negative, else 0 */
QLLM_INLINE ilanes ilanes_negative(ilanes a)
{
    for (int i = 0; i < 16; i++)
        a.v[i] = a.v[i] >> 31 ? 0xffffffffu : 0u;
    return a;
}

/* the same bits */
QLLM_INLINE lanes ilanes_as_float(ilanes a)
{
    lanes out;
    memcpy(out.v, a.v, sizeof out.v);
    return out;
}

/* sixteen bfloat16 */
QLLM_INLINE lanes lanes_load_bf16(const void *p)
{
    lanes out;
    qllm_to_float(p, QLLM_BF16, 16, out.v);
    return out;
}

/* the even and the odd elements of the 32 in a and b */
QLLM_INLINE void lanes_deinterleave(lanes a, lanes b, lanes *even, lanes *odd)
{
    for (int i = 0; i < 8; i++) {
        even->v[i] = a.v[2 * i];
        odd->v[i] = a.v[2 * i + 1];
        even->v[i + 8] = b.v[2 * i];
        odd->v[i + 8] = b.v[2 * i + 1];
    }
}

/* rounded to float16 and back */
QLLM_INLINE lanes lanes_round_f16(lanes a)
{
    uint16_t half[16];
    qllm_from_float(a.v, QLLM_F16, 16, half);
    qllm_to_float(half, QLLM_F16, 16, a.v);
    return a;
}

/* the larger of each half dword, unsigned; the largest of all */
QLLM_INLINE ilanes ilanes_max_halves(ilanes a, ilanes b)
{
    for (int i = 0; i < 16; i++) {
        uint32_t high = (a.v[i] >> 16) > (b.v[i] >> 16) ? a.v[i] >> 16 : b.v[i] >> 16;
        uint32_t low = (a.v[i] & 0xffffu) > (b.v[i] & 0xffffu) ? a.v[i] : b.v[i];
        a.v[i] = high << 16 | (low & 0xffffu);
    }
    return a;
}

QLLM_INLINE uint32_t ilanes_max_all_halves(ilanes a)
{
    uint32_t largest = 0;
    for (int i = 0; i < 16; i++) {
        largest = (a.v[i] >> 16) > largest ? a.v[i] >> 16 : largest;
        largest = (a.v[i] & 0xffffu) > largest ? a.v[i] & 0xffffu : largest;
    }
    return largest;
}

/* a > b ? 1 : 0 */
QLLM_INLINE ilanes lanes_exceeds(lanes a, lanes b)
{
    ilanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = a.v[i] > b.v[i];
    return out;
}

/* the low byte of each dword */
QLLM_INLINE void ilanes_store_low_bytes(uint8_t *p, ilanes a)
{
    for (int i = 0; i < 16; i++)
        p[i] = (uint8_t)a.v[i];
}

/* integers below 256, as floats */
QLLM_INLINE ilanes ilanes_from_float(lanes a)
{
    ilanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = (uint32_t)(int32_t)a.v[i];
    return out;
}

/* dword j of rows[i] <-> dword i of rows[j] */
QLLM_INLINE void ilanes_transpose(ilanes rows[16])
{
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            uint32_t kept = rows[i].v[j];
            rows[i].v[j] = rows[j].v[i];
            rows[j].v[i] = kept;
        }
}

/* the low halves of all dwords, then the high halves; and back */
QLLM_INLINE ilanes ilanes_split_halves(ilanes a)
{
    uint16_t from[32], to[32];
    memcpy(from, a.v, sizeof from);
    for (int i = 0; i < 16; i++) {
        to[i] = from[2 * i];
        to[i + 16] = from[2 * i + 1];
    }
    memcpy(a.v, to, sizeof to);
    return a;
}

QLLM_INLINE ilanes ilanes_join_halves(ilanes a)
{
    uint16_t from[32], to[32];
    memcpy(from, a.v, sizeof from);
    for (int i = 0; i < 16; i++) {
        to[2 * i] = from[i];
        to[2 * i + 1] = from[i + 16];
    }
    memcpy(a.v, to, sizeof to);
    return a;
}

/* the table, and code(even) << 4 | code(odd) for values in [-1, 1] */
typedef const qllm_code_table *lanes_coder;

QLLM_INLINE lanes_coder lanes_coder_load(const qllm_code_table *table) { return table; }

QLLM_INLINE ilanes lanes_code_pairs(lanes_coder coder, bool is_fp4, lanes even, lanes odd)
{
    ilanes high = ilanes_set1(0), low = ilanes_set1(0);
    (void)is_fp4;
    for (int j = 0; j < 15; j++) {
        high = ilanes_add(high, lanes_exceeds(even, lanes_set1(coder->thresholds[j])));
        low = ilanes_add(low, lanes_exceeds(odd, lanes_set1(coder->thresholds[j])));
    }
    for (int i = 0; i < 16; i++)
        low.v[i] = (uint32_t)(coder->codes[high.v[i]] << 4 | coder->codes[low.v[i]]);
    return low;
}

/* The 16 values of a format, and those of the 16 codes in 8 bytes, in order. */
typedef struct value_table { const float *code; } value_table;

QLLM_INLINE value_table value_table_load(const float code[16])
{
    return (value_table){code};
}

QLLM_INLINE lanes lanes_values(value_table table, const uint8_t *bytes)
{
    lanes out;
    for (int i = 0; i < 8; i++) {
        out.v[2 * i] = table.code[bytes[i] >> 4];
        out.v[2 * i + 1] = table.code[bytes[i] & 15];
    }
    return out;
}

#endif
