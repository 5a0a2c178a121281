/* What the processor and the operating system allow, asked once: on x86 CPUID and, for the register
 * state that the system saves, XGETBV; on 64-bit Arm what Linux tells a program at its start. */
#ifndef QLLM_CPU_FEATURES_H
#define QLLM_CPU_FEATURES_H

#include <stdbool.h>

#include "core/status.h"

typedef enum qllm_isa {
    QLLM_ISA_SCALAR = 0,
    QLLM_ISA_AVX2 = 1,   /* AVX2, FMA, F16C */
    QLLM_ISA_AVX512 = 2, /* AVX-512 F, BW, VL, DQ and VNNI, besides the above */
    QLLM_ISA_AVX512_VBMI = 3, /* VBMI, besides the above */
    QLLM_ISA_AVX512_BF16 = 4, /* BF16, besides the above */
    QLLM_ISA_AVX512_AMX = 5, /* AMX for int8 and bf16, besides the above */
    QLLM_ISA_NEON = 6,   /* Armv8-A, which has Advanced SIMD with fused multiply-add */
    QLLM_ISA_NEONDOT = 7, /* the dot product extension of Armv8.2 besides */
    QLLM_ISA_COUNT = 8
} qllm_isa;

typedef struct qllm_cpu_features {
    char model[64]; /* the processor's name, "" where it is not known */
    bool avx2, fma, f16c;
    bool avx512f, avx512bw, avx512vl, avx512dq, avx512vnni, avx512vbmi, avx512bf16;
    bool amxint8, amxbf16; /* and the system lets this process use them */
    bool amx_refused;  /* the processor has it, but the system does not let this process use it */
    bool neon, dotprod;
} qllm_cpu_features;

const qllm_cpu_features *qllm_cpu_features_get(void);

const char *qllm_isa_name(qllm_isa isa);   /* "scalar", "avx2", ... */
bool qllm_isa_compiled(qllm_isa isa);      /* part of this build */
bool qllm_isa_supported(qllm_isa isa);     /* compiled, and this machine can run it */

/* The best supported set for name NULL or "auto", else the one of that name.  An unknown name, one
 * that is not compiled or that this machine cannot run is an error which lists those it can run:
 * never another set in silence. */
qllm_status qllm_isa_choose(const char *name, qllm_isa *isa, qllm_error *error);

#endif
