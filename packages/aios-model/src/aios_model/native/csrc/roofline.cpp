// C ABI of what a machine can do at best; see roofline.h.
#include "roofline.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

AIOS_EXPORT int32_t aios_read_once(const void* data, int64_t num_bytes) { return aios::read_once(data, num_bytes); }

AIOS_EXPORT int64_t aios_multiply_floats(int64_t operations) { return aios::multiply_floats(operations); }

AIOS_EXPORT int64_t aios_multiply_bytes(int64_t operations) { return aios::multiply_bytes(operations); }
