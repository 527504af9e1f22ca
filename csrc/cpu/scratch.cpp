#include "cpu/scratch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

namespace moetrain {

Scratch::~Scratch() { std::free(data_); }

void* Scratch::bytes(size_t count) {
  if (count > size_) {
    std::free(data_);
    size_ = 0;
    constexpr size_t kPage = 4096, kHugePage = 1 << 21;
    const size_t page = count > kHugePage / 4 ? kHugePage : kPage;
    const size_t rounded = (count + page - 1) / page * page;
    data_ = std::aligned_alloc(page, rounded);
    if (!data_) throw std::bad_alloc();
    if (page == kHugePage) madvise(data_, rounded, MADV_HUGEPAGE);
    size_ = rounded;
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
