// A recorded sequence of kernel calls with fixed addresses: what a CUDA graph is to a GPU. One call runs all of it, so
// that nothing but the kernels takes time between them. Only for machines with Isa::avx512bf16.
#pragma once

#include <functional>
#include <vector>

#include "cpu/attention.h"
#include "cpu/norm.h"

namespace avatar_rt::cpu {

class Program {
  public:
    void add(const LinearArgs& args);
    void add(const NormArgs& args);
    void add(AttentionArgs args);

    // In the order of their recording; what they read and write must still be there.
    void run(int num_threads);

    size_t size() const { return calls_.size(); }

  private:
    std::vector<std::function<void(int)>> calls_;
};

}  // namespace avatar_rt::cpu
