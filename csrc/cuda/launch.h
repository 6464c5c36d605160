// How a kernel of this folder is launched by its plan, and what is said where that fails.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "plan.h"
#include "row_kernels.h"

namespace trapo::cuda {

constexpr const char* kNames[] = {"float32", "float64", "float16", "bfloat16"};

// A launch. Where something fails, it is said of which call.
struct Call {
  const char* kernel;
  const Logits& logits;
  Plan plan;

  void check(cudaError_t error, const char* what) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the next call starts clean
    const auto n = [](int64_t value) { return std::to_string(value); };
    throw std::runtime_error(std::string("trapo_kernels: ") + what + " of " + kernel + " failed for logits [" +
                             n(logits.rows) + ", " + n(logits.vocab) + "] " + kNames[int(logits.dtype)] + " with " +
                             n(plan.threads) + " threads a block, " + n(plan.cluster) + " blocks a row, " + n(plan.shared) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
  }

  template <class... P>
  void allow(void (*function)(P...)) const {
    const auto set = [&](cudaFuncAttribute what, int value) { check(cudaFuncSetAttribute(function, what, value), "set-up"); };
    if (plan.shared > 48 * 1024) set(cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    // The plan counts on all of an SM's memory that can be shared, not on what the driver would divide it into.
    if (plan.slots > 0) set(cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (plan.cluster > 8) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  // f(how the kernel is launched)
  template <class F>
  auto configured(F f) const {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(plan.cluster), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(logits.rows * plan.cluster)), config.blockDim = dim3(unsigned(plan.threads));
    config.dynamicSmemBytes = size_t(plan.shared), config.stream = static_cast<cudaStream_t>(logits.stream);
    config.attrs = &cluster, config.numAttrs = plan.cluster > 1;
    return f(config);
  }
  template <class... P, class... X>
  void launch(void (*function)(P...), X... arguments) const {
    if (logits.rows == 0) return;
    allow(function);
    check(configured([&](auto& config) { return cudaLaunchKernelEx(&config, function, arguments...); }), "launch");
  }
  // Whether the device has a place for the plan's clusters: a part of one, or a small one, may have none for 8 or 16.
  template <class... P>
  bool has_place(void (*function)(P...)) const {
    if (plan.cluster == 1 || logits.rows == 0) return true;
    using Key = std::tuple<const void*, int, int, int>;
    static std::mutex mutex;
    static std::map<Key, bool> known;
    int device = 0, clusters = 0;
    check(cudaGetDevice(&device), "set-up");
    const std::lock_guard<std::mutex> lock(mutex);
    const Key key{reinterpret_cast<const void*>(function), device, plan.cluster, plan.shared};
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    allow(function);
    const auto ask = [&](auto& config) { return cudaOccupancyMaxActiveClusters(&clusters, function, &config); };
    if (configured(ask) != cudaSuccess) cudaGetLastError(), clusters = 0;
    return known[key] = clusters > 0;
  }
};

}  // namespace trapo::cuda
