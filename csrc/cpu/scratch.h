// Memory that a thread keeps between calls: fresh pages cost more than what is done with them. Huge pages where the
// system gives them: a packed panel in small ones would not fit into the first TLB.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moetrain {

class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `count` elements, aligned to a cache line; what was there is lost when it grows.
  template <class T>
  T* at_least(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* bytes(size_t count);
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Whether the pages under [data, data + bytes) are there already, by a look at some of them.
bool is_mapped(const void* data, size_t bytes);

}  // namespace moetrain
