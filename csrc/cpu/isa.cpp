#include "cpu/isa.h"

#include <cstring>
#include <initializer_list>

namespace avatar_rt::cpu {
namespace {
constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};
}

bool supported(Isa isa) {
#ifdef AVATAR_RT_X86
    switch (isa) {
        case Isa::scalar:
            return true;
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Isa::avx512:
            return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        case Isa::avx512bf16:
#ifdef AVATAR_RT_AVX512BF16
            return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#else
            return false;
#endif
    }
#endif
    return isa == Isa::scalar;
}

Isa best_isa() {
    static const Isa best = [] {
        for (Isa isa : {Isa::avx512bf16, Isa::avx512, Isa::avx2})
            if (supported(isa)) return isa;
        return Isa::scalar;
    }();
    return best;
}

const char* isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

bool parse_isa(const char* name, Isa* isa) {
    for (int i = 0; i < 4; ++i)
        if (std::strcmp(name, kNames[i]) == 0) {
            *isa = static_cast<Isa>(i);
            return true;
        }
    return false;
}

}  // namespace avatar_rt::cpu
