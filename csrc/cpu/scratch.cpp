#include "cpu/scratch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace moetrain {
namespace {

std::atomic<int64_t> held{0};

}  // namespace

int64_t scratch_bytes() { return held.load(std::memory_order_relaxed); }

Scratch::~Scratch() {
  held -= static_cast<int64_t>(size_);
  std::free(data_);
}

void* Scratch::bytes(size_t count) {
  if (count > size_) {
    std::free(data_);
    held -= static_cast<int64_t>(size_);
    size_ = 0;
    const size_t rounded = (count + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(4096, rounded);
    if (!data_) throw std::bad_alloc();
    size_ = rounded;
    held += static_cast<int64_t>(size_);
  }
  return data_;
}

bool is_mapped(const void* data, size_t bytes) {
#ifdef __linux__
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(data) / page * page;
  constexpr size_t kLooks = 8;
  for (size_t i = 0; i < kLooks; ++i) {
    const uintptr_t at = (first + (bytes > 0 ? bytes - 1 : 0) * i / (kLooks - 1)) / page * page;
    unsigned char here = 0;
    if (mincore(reinterpret_cast<void*>(at), 1, &here) != 0 || !(here & 1)) return false;
  }
  return true;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

}  // namespace moetrain
