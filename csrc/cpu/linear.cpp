#include "cpu/linear.h"

#include <algorithm>
#include <cstring>

namespace avatar_rt::cpu {

int64_t packed_linear_size(int64_t num_taps, int64_t channels, int64_t outputs) {
    return num_taps * channels * ((outputs + 15) / 16 * 16);
}

void pack_linear(const uint16_t* weight, int64_t num_taps, int64_t channels, int64_t outputs, uint16_t* packed) {
    std::memset(packed, 0, sizeof(uint16_t) * packed_linear_size(num_taps, channels, outputs));
    const int64_t k = num_taps * channels;
    for (int64_t first = 0; first < outputs; first += kPanel) {
        const int64_t width = (std::min(kPanel, outputs - first) + 15) / 16 * 16;
        for (int64_t n = 0; n < std::min(kPanel, outputs - first); ++n)
            for (int64_t c = 0; c < k; ++c)
                packed[first * k + c / 2 * 2 * width + 2 * n + c % 2] = weight[(first + n) * k + c];
    }
}

}  // namespace avatar_rt::cpu
