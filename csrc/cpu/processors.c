#if defined(__linux__)
#define _GNU_SOURCE /* sched_getaffinity, sched_getcpu, pthread_setaffinity_np */
#endif
#include "cpu/processors.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

enum { TEXT_BYTES = 4096, PATH_BYTES = 1024, MOST = 4096 };

static _Atomic int pretended = 0;

void qllm_processors_pretend(int n)
{
    atomic_store(&pretended, n > 0 ? n : 0);
}

int qllm_processors_usable(const qllm_processors *p)
{
    return p->quota > 0 && p->quota < p->logical ? p->quota : p->logical;
}

int qllm_processors_default(const qllm_processors *p)
{
    return p->quota > 0 && p->quota < p->cores ? p->quota : p->cores;
}

#if defined(__linux__)

/* a path of four parts, or an empty one, which no file has, where it is too long */
static void join(char path[PATH_BYTES], const char *a, const char *b, const char *c, const char *d)
{
    const char *parts[] = {a, b, c, d};
    size_t at = 0;
    for (int i = 0; i < 4; i++) {
        size_t length = strlen(parts[i]);
        if (length >= PATH_BYTES - at) {
            path[0] = '\0';
            return;
        }
        memcpy(path + at, parts[i], length);
        at += length;
    }
    path[at] = '\0';
}

/* The beginning of a small file as text; false when it cannot be read or is empty. */
static bool read_text(const char *path, char text[TEXT_BYTES])
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    ssize_t length = read(file, text, TEXT_BYTES - 1);
    close(file);
    if (length <= 0)
        return false;
    text[length] = '\0';
    return true;
}

/* ------------------------------------------------------------------------------ physical cores */

/* A whole number from 0 in a file of one processor's topology, or -1. */
static long topology(const char *root, int processor, const char *name)
{
    char digits[16], path[PATH_BYTES], folder[PATH_BYTES], text[TEXT_BYTES], *end;
    int at = sizeof digits - 1;
    digits[at] = '\0';
    do
        digits[--at] = (char)('0' + processor % 10);
    while ((processor /= 10) > 0);
    join(folder, root, "/sys/devices/system/cpu/cpu", digits + at, "/topology/");
    join(path, folder, name, "", "");
    if (!read_text(path, text))
        return -1;
    long value = strtol(text, &end, 10);
    return end != text && value >= 0 && value < 1 << 15 ? value : -1;
}

/* A number for the physical core of a processor; one of its own where the system does not say. */
static int core_of(const char *root, int processor)
{
    long package = topology(root, processor, "physical_package_id");
    long core = topology(root, processor, "core_id");
    if (core < 0)
        return 1 << 30 | processor;
    return (int)((package < 0 ? 0 : package) << 15 | core);
}

/* It does not change while a system runs: read once for each processor. */
static int known_core_of(int processor)
{
    static _Atomic int known[CPU_SETSIZE]; /* number + 1; 0 = not read yet */
    if (processor < 0 || processor >= CPU_SETSIZE)
        return -1;
    int core = atomic_load_explicit(&known[processor], memory_order_relaxed);
    if (core == 0) {
        core = core_of("", processor) + 1;
        atomic_store_explicit(&known[processor], core, memory_order_relaxed);
    }
    return core - 1;
}

static int count_cores(const char *root, const cpu_set_t *set)
{
    int core[CPU_SETSIZE], count = 0;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        if (!CPU_ISSET(i, set))
            continue;
        core[count] = root[0] == '\0' ? known_core_of(i) : core_of(root, i);
        bool seen = false;
        for (int j = 0; j < count && !seen; j++)
            seen = core[j] == core[count];
        count += !seen;
    }
    return count;
}

/* ------------------------------------------------------------------------------ control groups */

/* Processors' worth of time, rounded up; 0 where it is not limited. */
static int quotient(long long quota, long long period)
{
    if (quota <= 0 || period <= 0)
        return 0;
    long long processors = quota / period + (quota % period != 0);
    return processors < MOST ? (int)processors : 0;
}

/* cpu.max of version 2, "max 100000" or "150000 100000": microseconds of time per period. */
static int quota_of_version_2(const char *folder)
{
    char path[PATH_BYTES], text[TEXT_BYTES], *end;
    join(path, folder, "/cpu.max", "", "");
    if (!read_text(path, text))
        return 0;
    long long quota = strtoll(text, &end, 10); /* "max" gives 0 */
    return quotient(quota, strtoll(end, NULL, 10));
}

/* Version 1: the same in two files, and a quota of -1 for none. */
static int quota_of_version_1(const char *folder)
{
    char path[PATH_BYTES], quota[TEXT_BYTES], period[TEXT_BYTES];
    join(path, folder, "/cpu.cfs_quota_us", "", "");
    if (!read_text(path, quota))
        return 0;
    join(path, folder, "/cpu.cfs_period_us", "", "");
    if (!read_text(path, period))
        return 0;
    return quotient(strtoll(quota, NULL, 10), strtoll(period, NULL, 10));
}

static int smaller_quota(int a, int b)
{
    return a == 0 || (b > 0 && b < a) ? b : a;
}

/* The smallest quota from a group up to the mount, which may show a container's group as its root:
 * then the folder of the group's own name is not there, and the root speaks. */
static int quota_upwards(const char *root, const char *mount, const char *group,
                         int (*read_quota)(const char *folder))
{
    char folder[PATH_BYTES];
    int quota = 0;
    join(folder, root, mount, group, "");
    size_t top = strlen(root) + strlen(mount), length = strlen(folder);
    while (length >= top && length > 0) {
        folder[length] = '\0';
        quota = smaller_quota(quota, read_quota(folder));
        while (length > top && folder[length - 1] != '/')
            length--;
        if (length <= top)
            break;
        length--; /* the slash */
    }
    return quota;
}

/* Does a list such as "cpu,cpuacct" name the controller "cpu"? */
static bool names_cpu(const char *list)
{
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        if (strcspn(at, ",") == 3 && memcmp(at, "cpu", 3) == 0)
            return true;
    }
    return false;
}

/* One line of /proc/self/cgroup: "number:controllers:/path", of version 2 "0::/path". */
static int quota_of_line(const char *root, char *line)
{
    char *controllers = strchr(line, ':');
    char *group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
    if (group == NULL || group[1] != '/')
        return 0;
    *controllers++ = '\0';
    *group++ = '\0';
    if (controllers[0] == '\0')
        return smaller_quota(
            quota_upwards(root, "/sys/fs/cgroup", group, quota_of_version_2),
            quota_upwards(root, "/sys/fs/cgroup/unified", group, quota_of_version_2));
    if (!names_cpu(controllers))
        return 0;
    return smaller_quota(
        quota_upwards(root, "/sys/fs/cgroup/cpu", group, quota_of_version_1),
        quota_upwards(root, "/sys/fs/cgroup/cpu,cpuacct", group, quota_of_version_1));
}

static int read_quota(const char *root)
{
    char path[PATH_BYTES], text[TEXT_BYTES];
    int quota = 0;
    join(path, root, "/proc/self/cgroup", "", "");
    if (!read_text(path, text)) {
        join(path, root, "/sys/fs/cgroup", "", "");
        return quota_of_version_2(path);
    }
    for (char *line = text, *next; line != NULL && *line != '\0'; line = next) {
        next = strchr(line, '\n');
        if (next != NULL)
            *next++ = '\0';
        quota = smaller_quota(quota, quota_of_line(root, line));
    }
    return quota;
}

/* Read once: a dozen files are too much to read for every small multiplication. */
static int known_quota(void)
{
    static _Atomic int known = 0; /* quota + 1; 0 = not read yet */
    int quota = atomic_load_explicit(&known, memory_order_relaxed);
    if (quota == 0) {
        quota = read_quota("") + 1;
        atomic_store_explicit(&known, quota, memory_order_relaxed);
    }
    return quota - 1;
}

/* --------------------------------------------------------------------------------------- places */

void qllm_processors_read(const char *root, qllm_processors *out)
{
    cpu_set_t set;
    *out = (qllm_processors){1, 1, root[0] == '\0' ? known_quota() : read_quota(root)};
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) {
        out->logical = CPU_COUNT(&set);
        out->cores = count_cores(root, &set);
    }
}

_Static_assert(sizeof(cpu_set_t) == sizeof((qllm_affinity *)0)->bits, "128 bytes of mask");

void qllm_affinity_get(qllm_affinity *out)
{
    cpu_set_t set;
    memset(out, 0, sizeof *out);
    if (atomic_load_explicit(&pretended, memory_order_relaxed) > 0 ||
        sched_getaffinity(0, sizeof set, &set) != 0)
        return;
    out->count = CPU_COUNT(&set);
    memcpy(out->bits, &set, sizeof set);
}

int qllm_processors_core(void)
{
    return known_core_of(sched_getcpu());
}

void qllm_affinity_keep_off(pthread_t thread, const qllm_affinity *mask, int core)
{
    cpu_set_t set, others;
    memcpy(&set, mask->bits, sizeof set);
    others = set;
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &set) && known_core_of(i) == core)
            CPU_CLR(i, &others);
    pthread_setaffinity_np(thread, sizeof set, CPU_COUNT(&others) > 0 ? &others : &set);
}

#else

void qllm_processors_read(const char *root, qllm_processors *out)
{
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    int count = online > 0 && online < MOST ? (int)online : 1;
    (void)root;
    *out = (qllm_processors){count, count, 0};
}

void qllm_affinity_get(qllm_affinity *out)
{
    memset(out, 0, sizeof *out);
}

int qllm_processors_core(void)
{
    return -1;
}

void qllm_affinity_keep_off(pthread_t thread, const qllm_affinity *mask, int core)
{
    (void)thread;
    (void)mask;
    (void)core;
}

#endif

void qllm_processors_get(qllm_processors *out)
{
    int n = atomic_load(&pretended);
    if (n > 0)
        *out = (qllm_processors){n, n, 0};
    else
        qllm_processors_read("", out);
}
