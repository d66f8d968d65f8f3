// How reference keys and values may lie, packed once and read in place by every later call.
//
//   rows   keys and values in the call's dtype, any strides
//   pairs  bf16: keys as rows; values [pair of rows][channel][2], contiguous, the second of an odd last pair never
//          mattering: what vdpbf16ps multiplies, so that no values are interleaved per call. For Isa::avx512bf16.
//   int8   keys and values as int8 rows, each with an fp32 factor: half the bytes of bf16
#pragma once

namespace avatar_rt::cpu {

constexpr int kMaxHeadDim = 256;  // of every layout

enum class KeyLayout { rows, pairs, int8 };

}  // namespace avatar_rt::cpu
