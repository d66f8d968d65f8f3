#include "cpu/program.h"

namespace avatar_rt::cpu {

void Program::add(const LinearArgs& args) {
#ifdef AVATAR_RT_AVX512BF16
    calls_.push_back([args](int threads) { linear_avx512bf16(args, threads); });
#else
    (void)args;
#endif
}

void Program::add(const NormArgs& args) {
#ifdef AVATAR_RT_AVX512BF16
    calls_.push_back([args](int threads) { norm_avx512bf16(args, threads); });
#else
    (void)args;
#endif
}

void Program::add(AttentionArgs args) {
    calls_.push_back([args](int threads) mutable {
        args.num_threads = threads;
        attention(args);
    });
}

void Program::run(int num_threads) {
    for (auto& call : calls_) call(num_threads);
}

}  // namespace avatar_rt::cpu
