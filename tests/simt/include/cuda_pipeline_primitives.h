// Asynchronous copies to shared memory, on tests/simt's device.
#pragma once

#include "../simt.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) { simt::copy_async(to, from, bytes); }
inline void __pipeline_commit() { simt::commit_copies(); }
inline void __pipeline_wait_prior(size_t but) { simt::wait_for_copies(int(but)); }
