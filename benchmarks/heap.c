/* A preloaded library that counts the bytes of all blocks that malloc and its relatives have given out, on all threads.
   torch's profiler sees only threads that it records, so blocks that a backend frees on its own threads never return. */
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);

static atomic_long in_use, most;

static void *counted(void *block) {
    if (block) {
        long size = malloc_usable_size(block), now = atomic_fetch_add(&in_use, size) + size, was = atomic_load(&most);
        while (now > was && !atomic_compare_exchange_weak(&most, &was, now)) {
        }
    }
    return block;
}

void *malloc(size_t size) { return counted(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }
void *memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

void *realloc(void *block, size_t size) {
    long before = block ? malloc_usable_size(block) : 0;
    void *moved = __libc_realloc(block, size);
    if (moved || !size) {
        atomic_fetch_sub(&in_use, before);
    }
    return counted(moved);
}

int posix_memalign(void **block, size_t alignment, size_t size) {
    void *made = memalign(alignment, size);
    if (!made) {
        return ENOMEM;
    }
    *block = made;
    return 0;
}

void free(void *block) {
    if (block) {
        atomic_fetch_sub(&in_use, (long)malloc_usable_size(block));
    }
    __libc_free(block);
}

long heap_in_use(void) { return atomic_load(&in_use); }
long heap_peak(void) { return atomic_load(&most); }
void heap_reset_peak(void) { atomic_store(&most, atomic_load(&in_use)); }
