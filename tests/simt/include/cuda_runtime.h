// What kernels and launches use of CUDA's header of this name, on tests/simt's device.
#pragma once

#include <cmath>
#include <map>

#include "../simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

// threadIdx and its kin: one dimension is all that is used here.
template <unsigned (*kValue)()>
struct Builtin {
  struct X {
    operator unsigned() const {
      Quiet quiet;
      return kValue();
    }
  } x;
};
inline unsigned thread_index() { return self().index; }
inline unsigned block_index() { return here().index.x; }
inline unsigned block_size() { return device().block.x; }
inline unsigned grid_size() { return device().grid.x; }

// What cudaFuncSetAttribute was told, by kernel.
struct Allowed {
  int shared_bytes = 48 * 1024;
  bool large_clusters = false;
};
inline Allowed& allowed(const void* kernel) {
  static auto* all = new std::map<const void*, Allowed>;
  return (*all)[kernel];
}

}  // namespace simt

inline const simt::Builtin<simt::thread_index> threadIdx{};
inline const simt::Builtin<simt::block_index> blockIdx{};
inline const simt::Builtin<simt::block_size> blockDim{};
inline const simt::Builtin<simt::grid_size> gridDim{};

inline void __syncthreads(int line = __builtin_LINE()) {
  auto& block = simt::here();
  const unsigned n = simt::device().threads_per_block;
  simt::sync_threads("__syncthreads", line, block.barrier, n, block.first, n, ~0u);
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  auto& block = simt::here();
  const unsigned warp = simt::self().index / simt::kLanes;
  simt::sync_threads("__syncwarp", line, block.warps[warp], unsigned(__builtin_popcount(mask)),
                     block.first + warp * simt::kLanes, simt::kLanes, mask);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  return simt::shuffle(mask, value, (simt::self().index % simt::kLanes) ^ unsigned(by), "__shfl_xor_sync", line);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __ballot_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  unsigned all = unsigned(vote) << simt::self().index % simt::kLanes;
  for (int by = 1; by < int(simt::kLanes); by *= 2) all |= __shfl_xor_sync(mask, all, by, line);
  return all;
}

using uint4 = unsigned __attribute__((vector_size(16)));

inline float __expf(float x) { return std::exp(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// Host -----------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* id) { return *id = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& model = simt::model();
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? model.arch / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? model.arch % 10
                                                            : model.shared_per_sm;
  return cudaSuccess;
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  auto& allowed = simt::allowed(reinterpret_cast<const void*>(kernel));
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) return allowed.large_clusters = value != 0, cudaSuccess;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (value > simt::model().shared_per_sm - 1024) return cudaErrorInvalidValue;
  return allowed.shared_bytes = value, cudaSuccess;
}

template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...), const cudaLaunchConfig_t* config) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) cluster = config->attrs[i].val.clusterDim.x;
  return *clusters = cluster <= simt::model().largest_cluster, cudaSuccess;
}

// Refuses what a device of the model would refuse.
template <class... P, class... X>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), X... arguments) {
  const auto& allowed = simt::allowed(reinterpret_cast<const void*>(kernel));
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) cluster = config->attrs[i].val.clusterDim.x;
  if (config->numAttrs > 0 && simt::model().arch < 90) return cudaErrorInvalidConfiguration;
  if (cluster > std::min(allowed.large_clusters ? 16u : 8u, simt::model().largest_cluster)) return cudaErrorInvalidConfiguration;
  if (config->gridDim.x == 0 || config->gridDim.x % cluster != 0) return cudaErrorInvalidConfiguration;
  if (config->blockDim.x == 0 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (int64_t(config->dynamicSmemBytes) > std::min(allowed.shared_bytes, simt::model().shared_per_sm - 1024))
    return cudaErrorInvalidValue;
  simt::launch(config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return cudaSuccess;
}
