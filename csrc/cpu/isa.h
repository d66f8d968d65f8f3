// The instruction sets that the CPU kernels are built for, chosen at run time.
#pragma once

namespace avatar_rt::cpu {

// Ordered: a machine that has one has those before it. `scalar` is the baseline of the target, any machine.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// Whether this build contains the instruction set and this machine runs it.
bool supported(Isa isa);

// The last supported one.
Isa best_isa();

const char* isa_name(Isa isa);

// False when `name` is none of the four names.
bool parse_isa(const char* name, Isa* isa);

}  // namespace avatar_rt::cpu
