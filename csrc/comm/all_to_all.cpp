// Uneven all-to-all of rows over a c10d group: the only unit that knows torch.distributed.
// Called through the dispatcher, hence without the GIL: a gloo worker thread may need the GIL to drop a
// tensor that Python owns, and a caller that waited while holding it would hang for ever.
#include <ATen/ops/empty.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/library.h>
#include <torch/version.h>

#include <numeric>
#include <string>
#include <vector>

#include "check.h"

namespace moetrain {
namespace {

int64_t checked_total(at::IntArrayRef splits, int64_t world, const char* name) {
  MOETRAIN_CHECK(static_cast<int64_t>(splits.size()) == world, "all_to_all: ", name, " has ", splits.size(),
                 " entries, the group has ", world, " ranks");
  for (const int64_t rows : splits) {
    MOETRAIN_CHECK(rows >= 0, "all_to_all: ", name, " must not be negative, it is ", splits);
  }
  return std::accumulate(splits.begin(), splits.end(), int64_t{0});
}

at::Tensor all_to_all(const at::Tensor& x, at::IntArrayRef output_splits, at::IntArrayRef input_splits,
                      std::string group_name) {
  const auto group = c10d::resolve_process_group(group_name);
  MOETRAIN_CHECK(x.dim() >= 1, "all_to_all: x must have at least one dimension");
  const int64_t received = checked_total(output_splits, group->getSize(), "output_splits");
  const int64_t sent = checked_total(input_splits, group->getSize(), "input_splits");
  MOETRAIN_CHECK(sent == x.size(0), "all_to_all: input_splits sum to ", sent, ", x has ", x.size(0), " rows");
  if (group->getSize() == 1) {
    MOETRAIN_CHECK(received == sent, "all_to_all: a group of one receives what it sends: ", received, " != ", sent);
    return x.clone(at::MemoryFormat::Contiguous);
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape[0] = received;
  at::Tensor out = at::empty(shape, x.options());
  at::Tensor in = x.contiguous();
  std::vector<int64_t> out_splits = output_splits.vec(), in_splits = input_splits.vec();
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 13)
  group->all_to_all_single(out, in, out_splits, in_splits)->wait();
#else
  group->alltoall_base(out, in, out_splits, in_splits)->wait();
#endif
  return out;
}

}  // namespace

// One kernel for every backend: the group decides between gloo and NCCL by the tensor's device.
TORCH_LIBRARY_IMPL(moetrain, CompositeExplicitAutograd, m) {
  m.impl("all_to_all", &all_to_all);
}

}  // namespace moetrain
