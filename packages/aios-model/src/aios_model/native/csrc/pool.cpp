// C ABI of the thread pool.
#include "pool.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

// Null if the system does not grant so many threads.
AIOS_EXPORT void* aios_pool_create(int32_t num_threads, const int32_t* cpus) try {
  return new aios::Pool(num_threads, cpus);
} catch (...) {
  return nullptr;
}

AIOS_EXPORT void aios_pool_destroy(void* pool) { delete static_cast<aios::Pool*>(pool); }

AIOS_EXPORT int32_t aios_pool_size(void* pool) { return static_cast<aios::Pool*>(pool)->size(); }
