#if defined(__linux__)
#define _DEFAULT_SOURCE /* syscall */
#endif
#include "cpu/features.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__x86_64__)

/* State components of XCR0 (Intel SDM vol. 1, 13.3): SSE and AVX; opmask, upper ZMM, ZMM 16-31; AMX
 * configuration and registers. */
enum { XCR0_AVX = 0x06, XCR0_AVX512 = 0xe6, XCR0_AMX = 0x60000 };

/* The register state that the operating system saves; 0 where XGETBV is not enabled. */
static uint32_t saved_state(void)
{
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !((c >> 27) & 1u)) /* OSXSAVE */
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return a;
}

/* Linux gives the state of AMX to processes that ask for it, which threads and children inherit; it
 * refuses where a signal stack is too small for it (Documentation/arch/x86/xstate.rst). */
static bool may_use_amx(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

static void read_model(char model[64])
{
    uint32_t words[12], a, b, c, d;
    if (!__get_cpuid(0x80000000u, &a, &b, &c, &d) || a < 0x80000004u)
        return;
    for (uint32_t i = 0; i < 3; i++)
        __get_cpuid(0x80000002u + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2],
                    &words[4 * i + 3]);
    char text[sizeof words + 1] = "";
    memcpy(text, words, sizeof words);
    const char *first = text + strspn(text, " ");
    size_t length = strlen(first);
    while (length > 0 && first[length - 1] == ' ')
        length--;
    memcpy(model, first, length);
    model[length] = '\0';
}

static qllm_cpu_features detect(void)
{
    qllm_cpu_features f = {.model = ""};
    uint32_t a, b, c, d, state = saved_state();
    bool avx = (state & XCR0_AVX) == XCR0_AVX, avx512 = (state & XCR0_AVX512) == XCR0_AVX512;
    read_model(f.model);
    if (!avx || !__get_cpuid(1, &a, &b, &c, &d))
        return f;
    f.fma = (c >> 12) & 1u;
    f.f16c = (c >> 29) & 1u;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return f;
    f.avx2 = (b >> 5) & 1u;
    f.avx512f = avx512 && ((b >> 16) & 1u);
    f.avx512dq = avx512 && ((b >> 17) & 1u);
    f.avx512bw = avx512 && ((b >> 30) & 1u);
    f.avx512vl = avx512 && ((b >> 31) & 1u);
    f.avx512vbmi = avx512 && ((c >> 1) & 1u);
    f.avx512vnni = avx512 && ((c >> 11) & 1u);
    bool amx = (d >> 24) & (d >> 25) & 1u; /* AMX-TILE, AMX-INT8 */
    f.amxint8 = amx && (state & XCR0_AMX) == XCR0_AMX && may_use_amx();
    f.amxbf16 = f.amxint8 && ((d >> 22) & 1u);
    f.amx_refused = amx && !f.amxint8;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d))
        f.avx512bf16 = avx512 && ((a >> 5) & 1u);
    return f;
}

#elif defined(__aarch64__) && defined(__linux__)

/* Bits of AT_HWCAP: Documentation/arch/arm64/elf_hwcaps.rst of the Linux kernel. */
enum { HAS_CPUID = 1 << 11, HAS_DOTPROD = 1 << 20 };

/* Implementer and part number of a core as MIDR_EL1 holds them (Arm's manuals of these cores). */
static const struct { uint32_t implementer, part; const char *name; } cores[] = {
    {0x41, 0xd03, "Arm Cortex-A53"},    {0x41, 0xd05, "Arm Cortex-A55"},
    {0x41, 0xd07, "Arm Cortex-A57"},    {0x41, 0xd08, "Arm Cortex-A72"},
    {0x41, 0xd09, "Arm Cortex-A73"},    {0x41, 0xd0a, "Arm Cortex-A75"},
    {0x41, 0xd0b, "Arm Cortex-A76"},    {0x41, 0xd0c, "Arm Neoverse N1"},
    {0x41, 0xd40, "Arm Neoverse V1"},   {0x41, 0xd49, "Arm Neoverse N2"},
    {0x41, 0xd4f, "Arm Neoverse V2"},   {0xc0, 0xac3, "Ampere Ampere-1"},
};

/* With HAS_CPUID the kernel answers a program's reading of this register. */
static void read_model(char model[64])
{
    uint64_t midr;
    __asm__("mrs %0, MIDR_EL1" : "=r"(midr));
    uint32_t implementer = (uint32_t)(midr >> 24) & 255u, part = (uint32_t)(midr >> 4) & 4095u;
    for (size_t i = 0; i < sizeof cores / sizeof *cores; i++)
        if (cores[i].implementer == implementer && cores[i].part == part)
            memcpy(model, cores[i].name, strlen(cores[i].name) + 1);
}

static qllm_cpu_features detect(void)
{
    qllm_cpu_features f = {.model = "", .neon = true};
    unsigned long has = getauxval(AT_HWCAP);
    if (has & HAS_CPUID)
        read_model(f.model);
    f.dotprod = (has & HAS_DOTPROD) != 0;
    return f;
}

#else

/* Elsewhere nothing is asked. */
static qllm_cpu_features detect(void)
{
    qllm_cpu_features f = {.model = ""};
#if defined(__aarch64__)
    f.neon = true;
#endif
    return f;
}

#endif

/* Before main: no other thread can look while it is written. */
static qllm_cpu_features features;

__attribute__((constructor)) static void detect_once(void)
{
    features = detect();
}

const qllm_cpu_features *qllm_cpu_features_get(void)
{
    return &features;
}

static const char *const isa_names[QLLM_ISA_COUNT] = {
    "scalar", "avx2", "avx512", "avx512vbmi", "avx512bf16", "avx512amx", "neon", "neondot",
};

const char *qllm_isa_name(qllm_isa isa)
{
    return isa_names[isa];
}

bool qllm_isa_compiled(qllm_isa isa)
{
    switch (isa) {
    case QLLM_ISA_SCALAR: return true;
#if defined(__x86_64__)
    case QLLM_ISA_AVX2:
    case QLLM_ISA_AVX512:
    case QLLM_ISA_AVX512_VBMI:
    case QLLM_ISA_AVX512_BF16:
    case QLLM_ISA_AVX512_AMX: return true;
#elif defined(__aarch64__)
    case QLLM_ISA_NEON:
    case QLLM_ISA_NEONDOT: return true;
#endif
    default: return false;
    }
}

bool qllm_isa_supported(qllm_isa isa)
{
    const qllm_cpu_features *f = &features;
    bool avx2 = f->avx2 && f->fma && f->f16c;
    bool avx512 = avx2 && f->avx512f && f->avx512bw && f->avx512vl && f->avx512dq && f->avx512vnni;
    if (!qllm_isa_compiled(isa))
        return false;
    switch (isa) {
    case QLLM_ISA_AVX2: return avx2;
    case QLLM_ISA_AVX512: return avx512;
    case QLLM_ISA_AVX512_VBMI: return avx512 && f->avx512vbmi;
    case QLLM_ISA_AVX512_BF16: return avx512 && f->avx512vbmi && f->avx512bf16;
    case QLLM_ISA_AVX512_AMX:
        return avx512 && f->avx512vbmi && f->avx512bf16 && f->amxint8 && f->amxbf16;
    case QLLM_ISA_NEON: return f->neon;
    case QLLM_ISA_NEONDOT: return f->neon && f->dotprod;
    default: return true;
    }
}

/* "scalar, avx2": the sets this machine can run. */
static void list_supported(char *out, size_t capacity)
{
    size_t used = 0;
    for (int i = 0; i < QLLM_ISA_COUNT; i++) {
        const char *separator = used > 0 ? ", " : "", *name = isa_names[i];
        if (!qllm_isa_supported((qllm_isa)i) ||
            used + strlen(separator) + strlen(name) + 1 > capacity)
            continue;
        memcpy(out + used, separator, strlen(separator));
        used += strlen(separator);
        memcpy(out + used, name, strlen(name));
        used += strlen(name);
    }
    out[used] = '\0';
}

qllm_status qllm_isa_choose(const char *name, qllm_isa *isa, qllm_error *error)
{
    char list[96];
    if (name == NULL || name[0] == '\0' || strcmp(name, "auto") == 0) {
        *isa = QLLM_ISA_SCALAR;
        for (int i = 0; i < QLLM_ISA_COUNT; i++)
            if (qllm_isa_supported((qllm_isa)i))
                *isa = (qllm_isa)i;
        return QLLM_OK;
    }
    list_supported(list, sizeof list);
    for (int i = 0; i < QLLM_ISA_COUNT; i++) {
        if (strcmp(name, isa_names[i]) != 0)
            continue;
        *isa = (qllm_isa)i;
        if (qllm_isa_supported(*isa))
            return QLLM_OK;
        return qllm_fail(error, QLLM_UNSUPPORTED, "instruction set '%s' %s; choose one of: %s, or "
                         "auto", name, qllm_isa_compiled(*isa) ? "is not offered by this machine"
                         : "is not part of this build", list);
    }
    return qllm_fail(error, QLLM_VALUE, "instruction set '%.40s' is not known; choose one of: %s, "
                     "or auto", name, list);
}
