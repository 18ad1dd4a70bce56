// The kernels on the CPU, by fibers (common/emulate.h), as plain C functions for ctypes: the very
// source that runs on a GPU, without one.
//
//     g++ -std=c++17 -O2 -ffp-contract=off -shared -fPIC host.cpp -o quantize_host.so
#define MEGATRON_EXT_EMULATE

#include "amax.cu"
#include "quantize.cu"

extern "C" {

const char* quantize_matrix(const megatron_ext::Matrix* matrix, const megatron_ext::Copy* row,
                            const megatron_ext::Copy* transposed) {
  return megatron_ext::quantize_matrix(*matrix, *row, *transposed, nullptr);
}

const char* largest_magnitudes(const megatron_ext::Matrix* matrix, const megatron_ext::Rule* rule,
                               const float* signs, int is_transposed, float* amax) {
  return megatron_ext::largest_magnitudes(*matrix, *rule, signs, is_transposed != 0, amax, nullptr);
}

// Codes of count numbers: E4M3, E5M2, E2M1 (0, 1, 2); uniform: numbers in [0, 1), or nullptr.
void encode(const float* values, const float* uniform, int element, int64_t count, uint8_t* codes) {
  using namespace megatron_ext;
  for (int64_t i = 0; i < count; ++i) {
    switch (Element(element)) {
      case Element::kE4M3:
        codes[i] = uint8_t(uniform ? encode_random<E4M3>(values[i], uniform[i])
                                   : encode_nearest<E4M3>(values[i]));
        break;
      case Element::kE5M2:
        codes[i] = uint8_t(uniform ? encode_random<E5M2>(values[i], uniform[i])
                                   : encode_nearest<E5M2>(values[i]));
        break;
      default:
        codes[i] = uint8_t(uniform ? encode_random<E2M1>(values[i], uniform[i])
                                   : encode_nearest<E2M1>(values[i]));
    }
  }
}

}  // extern "C"
