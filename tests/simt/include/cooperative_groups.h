// Clusters, on tests/simt's device.
#pragma once

#include "../simt.h"

namespace cooperative_groups {

struct cluster_group {
  static void barrier_arrive(int line = __builtin_LINE()) { simt::cluster_arrive(line); }
  static void barrier_wait(int line = __builtin_LINE()) { simt::cluster_wait(line); }
  template <class T>
  static T* map_shared_rank(T* mine, int rank) {
    return simt::of_block(mine, unsigned(rank));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
