// Which instruction set runs. A kernel is declared once with PYLLM_KERNEL(name, Args): that declares name(const Args&)
// in each instruction set's namespace and makes pyllm::name callable, a jump through the chosen one. Args is a plain
// struct, so that a call can be stored and replayed.
#pragma once
#include <string>
#include <vector>

namespace pyllm {

enum class Isa { baseline, avx2, avx512 };
constexpr int kIsas = 3;

namespace cpu {
extern int chosen_isa;

std::vector<std::string> available_isas();  // built in and supported by this processor, slowest first
std::string isa_name();
void set_isa(const std::string& name);
}  // namespace cpu

template <class Args>
struct Kernel {
  void (*table[kIsas])(const Args&);
  void operator()(const Args& args) const { table[cpu::chosen_isa](args); }
};

}  // namespace pyllm

#if PYLLM_WITH_AVX2
#define PYLLM_IF_AVX2(kernel) kernel
#else
#define PYLLM_IF_AVX2(kernel) nullptr
#endif
#if PYLLM_WITH_AVX512
#define PYLLM_IF_AVX512(kernel) kernel
#else
#define PYLLM_IF_AVX512(kernel) nullptr
#endif

#ifdef ISA  // inside the kernels: only the one to define
#define PYLLM_KERNEL(name, Args) \
  namespace ISA {                \
  void name(const Args&);        \
  }
#else
#define PYLLM_KERNEL(name, Args) \
  namespace baseline {           \
  void name(const Args&);        \
  }                              \
  namespace avx2 {               \
  void name(const Args&);        \
  }                              \
  namespace avx512 {             \
  void name(const Args&);        \
  }                              \
  inline constexpr Kernel<Args> name{{&baseline::name, PYLLM_IF_AVX2(&avx2::name), PYLLM_IF_AVX512(&avx512::name)}};
#endif
