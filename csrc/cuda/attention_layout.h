// Where things lie: matrix fragments in a warp's lanes, tiles in shared memory. Facts of the instruction set, stated
// once and used by the kernels, by the instructions' software twins and by nobody else.
#pragma once

#include "cuda/numbers.h"

namespace avatar_rt::cuda {

// --- fragments -------------------------------------------------------------------------------------------------------
// Accumulators of mma.sync m16n8k16 and, per warp of a warpgroup (rows 16 * warp ..), of wgmma m64nNk16:
// register [j][i] of a lane is row row_of(lane, i), column 8 * j + column_of(lane, i).
AVATAR_RT_DEVICE int row_of(int lane, int i) {
    return lane / 4 + 8 * (i / 2);
}
AVATAR_RT_DEVICE int column_of(int lane, int i) {
    return 2 * (lane % 4) + i % 2;
}

// --- sm_80: rows of head_dim elements, 16-byte chunks exchanged within a row so that ldmatrix meets no bank twice
// -----
template <int kRowBytes>
AVATAR_RT_DEVICE uint32_t swizzled(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row % 8)) * 16);
}

// Chunk `chunk` (0 or 1) of the d-th 16 elements of a row of a tile at `tile`, a multiple of the row: chunk 2 * d +
// chunk, written so that no register has to keep an offset per d.
template <int kRowBytes>
AVATAR_RT_DEVICE uint32_t step_of(uint32_t tile, int row, int chunk, int d) {
    return (tile + swizzled<kRowBytes>(row, chunk)) ^ (32 * d);
}

// ldmatrix.x4 takes from lane i the address of row i % 8 of its matrix i / 8; these give row and chunk of 8 elements.
// A operand (and, transposed, B of V): matrices are (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
AVATAR_RT_DEVICE int a_row(int lane) {
    return lane % 16;
}
AVATAR_RT_DEVICE int a_chunk(int lane) {
    return lane / 16;
}
// B operands of two neighbouring tiles of 8 keys: (keys 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
AVATAR_RT_DEVICE int b_row(int lane) {
    return lane % 8 + 8 * (lane / 16);
}
AVATAR_RT_DEVICE int b_chunk(int lane) {
    return lane / 8 % 2;
}

// --- sm_90: panels of rows of 128 bytes, as the bulk tensor copy writes and wgmma reads them with the 128-byte swizzle
// - Bits 4-6 of a shared address are xor-ed with its bits 7-9; panels start at multiples of 1024 bytes.
AVATAR_RT_DEVICE uint32_t swizzle128(uint32_t address) {
    return address ^ (address >> 3 & 0x70);
}

// A wgmma matrix descriptor for that swizzle. `leading` and `stride` are byte offsets with a meaning per major-ness:
// K-major (Q, K: the contiguous dimension is summed over): stride from 8 rows to the next 8; leading is not used.
// MN-major (V: the contiguous dimension is the result's): stride from 8 summed rows to the next 8, leading from 64
// contiguous elements to the next 64.
AVATAR_RT_DEVICE uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3FFFF) >> 4); };
    return field(address) | field(leading) << 16 | field(stride) << 32 | uint64_t{1} << 62;
}

constexpr uint32_t kAtomBytes = 1024;  // 8 rows of 128 bytes

}  // namespace avatar_rt::cuda
